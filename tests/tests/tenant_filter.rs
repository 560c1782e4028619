//! A security group in front of a real microVM: what another port of its network reaches of it, before and after each change.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use common::{guest_journey, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, Journey, Server},
    place,
};
use serde_json::{Value, json};

/// A namespace with a network card that is plugged in where a server's tap would be; gone at the end.
struct Card<'a> {
    journey: &'a Journey,
    name: String,
    /// The security group of its port.
    group: String,
}

impl Drop for Card<'_> {
    fn drop(&mut self) {
        // Best effort: the card goes with it.
        let _ = self.journey.place.sh(&format!("ip netns delete {}", self.name));
    }
}

impl<'a> Card<'a> {
    /// In the place of a server that is off.
    async fn plug_in(client: &Client, journey: &'a Journey, server: &Server) -> anyhow::Result<Self> {
        let its = format!("/v2.0/ports?device_id={}", server.id);
        let ports = client.list(Service::Network, &its, "ports").await?;
        let port = ports.first().context("the server has no port")?;
        let mac = port["mac_address"].as_str().context("the port has no Ethernet address")?;
        let tap = format!("tap{}", place::short_id(&journey::id_of(port)?));
        let there =
            journey.place.namespace_of(&server.network_id)?.context("the network has no namespace")?;
        let group = port["security_groups"][0].as_str().context("the port has no security group")?;
        let name = format!("mtf{}x", std::process::id());
        let card = Self { journey, name, group: group.to_owned() };
        let name = &card.name;
        journey.place.sh(&format!(
            "set -e; ip netns add {name}; ip -n {name} link set lo up
             ip -n {there} link add {tap} type veth peer name eth0 address {mac} netns {name}
             ip -n {name} address add {}/24 dev eth0; ip -n {name} link set eth0 mtu 1400 up",
            server.address
        ))?;
        Ok(card)
    }

    fn reaches(&self, command: &str) -> bool {
        self.journey.place.sh(&format!("ip netns exec {} {command}", self.name)).is_ok()
    }

    fn pings(&self, address: &str) -> bool {
        self.reaches(&format!("ping -n -c 1 -W 1 {address}"))
    }

    fn sees_page(&self, address: &str) -> bool {
        self.reaches(&format!("curl -sS --noproxy '*' --max-time 1 http://{address}/"))
    }
}

/// Waits until ping and page of the server are, both, what they shall be.
async fn until(card: &Card<'_>, address: &str, expected: (bool, bool), when: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = (card.pings(address), card.sees_page(address));
        if found == expected {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{when}: ping and page are {found:?}, not {expected:?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn rule(client: &Client, group: &str, rule: Value) -> anyhow::Result<String> {
    let mut body = json!({"security_group_id": group, "direction": "ingress", "ethertype": "IPv4"});
    for (key, value) in rule.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    let body = json!({"security_group_rule": body});
    let made = client.post(Service::Network, "/v2.0/security-group-rules", body).await?;
    journey::id_of(&made["security_group_rule"])
}

#[test]
fn a_microvm_is_reached_by_what_its_group_lets_in_and_by_nothing_else() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "filter", "10.22.0.0/24").await?;
        let body = json!({"security_group": {"name": "shut"}});
        let group = client.post(Service::Network, "/v2.0/security-groups", body).await?;
        let group = journey::id_of(&group["security_group"])?;
        let shut = json!({"security_groups": [{"name": "shut"}]});
        let target = journey.server(&client, "target", &network, shut).await?;
        journey.wait_console(&client, &target).await?;
        let off = journey.server(&client, "off", &network, json!({})).await?;
        let stop = json!({"os-stop": null});
        client.post(Service::Compute, &format!("/servers/{}/action", off.id), stop).await?;
        journey.wait_status(&client, &off.id, "SHUTOFF").await?;

        let card = Card::plug_in(&client, &journey, &off).await?;
        let address = target.address.as_str();
        // Each change makes a pass of the host's; the first one attaches the card, too.
        let page =
            rule(&client, &group, json!({"protocol": "tcp", "port_range_min": 80, "port_range_max": 80}))
                .await?;
        until(&card, address, (false, true), "TCP 80 is let in").await?;
        let echo = rule(&client, &group, json!({"protocol": "icmp"})).await?;
        until(&card, address, (true, true), "ICMP is let in, too").await?;
        client.delete(Service::Network, &format!("/v2.0/security-group-rules/{page}")).await?;
        until(&card, address, (true, false), "TCP 80 is no longer let in").await?;
        client.delete(Service::Network, &format!("/v2.0/security-group-rules/{echo}")).await?;
        until(&card, address, (false, false), "nothing is let in").await?;
        rule(&client, &group, json!({"remote_group_id": card.group})).await?;
        until(&card, address, (true, true), "members of the card's group are let in").await?;

        drop(card);
        for server in [&target, &off] {
            journey.delete(&client, server).await?;
            assert_eq!(cloud.leftovers(&server.id, None)?, "");
        }
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(cloud.leftovers(&target.id, Some(&network))?, "");
        Ok(())
    });
}
