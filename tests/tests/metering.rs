//! What ports have carried, with real traffic: exact over a `kill -9` of the host's agent, over restarts of the VMM, and
//! there after the server has gone.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use common::{guest_journey, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, Journey, Server},
    place::{Place, short_id},
};
use serde_json::{Value, json};

/// Pings of one go, and the bytes of their frames.
const PINGS: u64 = 20;
const FRAME: u64 = 14 + 20 + 8 + 1000;

struct Subject {
    cloud: Cloud,
    client: Client,
    journey: Journey,
    server: Server,
    port: String,
}

impl Subject {
    fn ping(&self) -> anyhow::Result<()> {
        let namespace = self.namespace()?;
        let address = &self.server.address;
        Place::Here.sh(&format!(
            "ip netns exec {namespace} ping -n -q -c {PINGS} -i 0.02 -s 1000 -W 10 {address}"
        ))?;
        Ok(())
    }

    fn namespace(&self) -> anyhow::Result<String> {
        Place::Here.namespace_of(&self.server.network_id)?.context("its network has no namespace")
    }

    /// What the kernel has counted at the tap, as the guest sees it: bytes received and sent.
    fn tap(&self) -> anyhow::Result<(u64, u64)> {
        let link = Place::Here.sh(&format!(
            "ip -j -s -n {} link show tap{}",
            self.namespace()?,
            short_id(&self.port)
        ))?;
        let link: Value = serde_json::from_str(&link)?;
        let stats = &link[0]["stats64"];
        let number = |way: &str| stats[way]["bytes"].as_u64().context("ip counts");
        Ok((number("tx")?, number("rx")?))
    }

    /// What the cloud says, over all VMMs.
    async fn metered(&self) -> anyhow::Result<(u64, u64)> {
        let path = format!("/v1/metering/ports?server_id={}", self.server.id);
        let ports = self.client.list(Service::Mote, &path, "ports").await?;
        let number = |name: &str| ports.first().and_then(|port| port[name].as_u64()).unwrap_or(0);
        Ok((number("rx_bytes"), number("tx_bytes")))
    }

    /// Waits until the cloud counts what the tap does beyond what was `before` it; nothing that it says meanwhile may be
    /// less than what it said.
    async fn agrees(&self, before: (u64, u64)) -> anyhow::Result<(u64, u64)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = (0, 0);
        loop {
            let counted = self.tap()?;
            let metered = self.metered().await?;
            ensure!(metered.0 >= last.0 && metered.1 >= last.1, "{metered:?} after {last:?}");
            last = metered;
            if metered == (before.0 + counted.0, before.1 + counted.1) && metered == self.metered().await? {
                return Ok(metered);
            }
            ensure!(Instant::now() < deadline, "{metered:?}, but {before:?} and the tap {counted:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn reboot(&self) -> anyhow::Result<()> {
        let before = Cloud::vmm(&self.server.id);
        let path = format!("/servers/{}/action", self.server.id);
        self.client.post(Service::Compute, &path, json!({"reboot": {"type": "HARD"}})).await?;
        while Cloud::vmm(&self.server.id).is_none_or(|now| Some(now) == before) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.journey.wait_status(&self.client, &self.server.id, "ACTIVE").await?;
        self.journey.wait_console(&self.client, &self.server).await?;
        Ok(())
    }
}

async fn metering() -> anyhow::Result<()> {
    let cloud = Cloud::start()?;
    let client = cloud.client().await?;
    let journey = guest_journey(&cloud, &client, "mote.serve").await?;
    let network = journey::network(&client, "meter", "10.63.0.0/24").await?;
    let server = journey.server(&client, "meter", &network, json!({})).await?;
    journey.wait_console(&client, &server).await?;
    let ports =
        client.list(Service::Network, &format!("/v2.0/ports?device_id={}", server.id), "ports").await?;
    let port = journey::id_of(ports.first().context("it has a port")?)?;
    let subject = Subject { cloud, client, journey, server, port };

    subject.ping()?;
    let first = subject.agrees((0, 0)).await?;
    ensure!(first.0 >= PINGS * FRAME && first.1 >= PINGS * FRAME, "{first:?}");
    let path = format!("/servers/{}/diagnostics", subject.server.id);
    let request = subject
        .client
        .request(reqwest::Method::GET, Service::Compute, &path)?
        .header("OpenStack-API-Version", "compute 2.48");
    let diagnostics: Value = subject.client.send(request).await?.json().await?;
    let nic = &diagnostics["nic_details"][0];
    let (rx, tx) = (nic["rx_octets"].as_u64().unwrap_or(0), nic["tx_octets"].as_u64().unwrap_or(0));
    ensure!(rx >= first.0 && tx >= first.1 && rx < first.0 + FRAME && tx < first.1 + FRAME, "{diagnostics}");
    ensure!(nic["rx_packets"].as_u64() >= Some(PINGS), "{diagnostics}");

    // The VMM and its tap go on without the agent; what is carried meanwhile is counted.
    subject.cloud.kill9_daemon("mote-hostd")?;
    subject.ping()?;
    let second = subject.agrees((0, 0)).await?;
    ensure!(second.0 >= first.0 + PINGS * FRAME, "{second:?} after {first:?}");

    // Another VMM has another tap, which counts from zero.
    subject.reboot().await?;
    subject.ping()?;
    let ended = subject.metered().await?;
    ensure!(ended.0 >= second.0, "{ended:?} after {second:?}");
    let tap = subject.tap()?;
    ensure!(tap.0 < second.0, "it is another tap: {tap:?}");
    // What the first VMM's tap had at its end is told with what the second's has.
    let before = {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (tap, metered) = (subject.tap()?, subject.metered().await?);
            if metered.0 >= second.0 + tap.0 && metered.1 >= second.1 + tap.1 {
                break (metered.0 - tap.0, metered.1 - tap.1);
            }
            ensure!(Instant::now() < deadline, "{metered:?}, the second tap has {tap:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    ensure!(before.0 < second.0 + 10 * FRAME, "nothing is counted twice: {before:?} after {second:?}");
    let third = subject.agrees(before).await?;

    subject.journey.delete(&subject.client, &subject.server).await?;
    let last = subject.metered().await?;
    ensure!(last.0 >= third.0 && last.0 < third.0 + 10 * FRAME, "{last:?} after {third:?}");
    Ok(())
}

#[test]
fn what_a_port_carries_is_counted_once_over_kills_restarts_and_the_end_of_its_server() {
    need_servers!();
    run(metering());
}
