//! A server's life on this machine, with the conformance guest under the machine's own KVM: by REST from image to
//! nothing left, through `kill -9` of everything, and every way in which a guest ends.

mod common;

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use common::{guest_journey, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{cloud::Cloud, journey, steps::Steps};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

#[test]
fn a_server_lives_by_rest_and_leaves_nothing() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        for round in 0..3 {
            journey.travel(&client, &format!("life-{round}"), &mut Steps::new()).await?;
        }
        Ok(())
    });
}

#[test]
fn kill_9_of_hostd_and_controller_loses_no_server_and_both_come_back_to_the_same_state() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "kill", "10.20.0.0/24").await?;
        let server = journey.server(&client, "kill-one", &network, json!({})).await?;
        journey.wait_console(&client, &server).await?;
        let vmm = Cloud::vmm(&server.id).context("the server has no VMM")?;
        let before = shown(&client, &server.id).await?;

        for daemon in ["mote-hostd", "mote-controller", "mote-hostd"] {
            cloud.kill9_daemon(daemon)?;
            journey.ping(&server).with_context(|| format!("after kill -9 of {daemon}"))?;
            journey.page(&server).with_context(|| format!("after kill -9 of {daemon}"))?;
            let after = eventually("the same state", || shown_when_up(&cloud, &server.id)).await?;
            assert_eq!(before, after, "after kill -9 of {daemon}");
            assert_eq!(
                Cloud::vmm(&server.id),
                Some(vmm),
                "the VMM is the same process after kill -9 of {daemon}"
            );
        }

        // Both daemons still do their work: a second server comes, both go.
        let client = cloud.client().await?;
        let second = journey.server(&client, "kill-two", &network, json!({})).await?;
        journey.wait_console(&client, &second).await?;
        journey.ping(&second)?;
        for server in [&server, &second] {
            journey.delete(&client, server).await?;
            assert_eq!(cloud.leftovers(&server.id, None)?, "");
        }
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(cloud.leftovers(&server.id, Some(&network))?, "");
        Ok(())
    });
}

#[test]
fn a_servers_vmm_is_in_a_jail_and_the_host_does_not_believe_what_it_finds_there() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "jail", "10.24.0.0/24").await?;
        let server = journey.server(&client, "jailed", &network, json!({})).await?;
        journey.wait_console(&client, &server).await?;
        let process = format!("/proc/{}", Cloud::vmm(&server.id).context("the server has no VMM")?);

        let status = std::fs::read_to_string(format!("{process}/status"))?;
        let words = |name: &str| -> Vec<&str> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().collect()
        };
        for ids in [words("Uid:"), words("Gid:")] {
            anyhow::ensure!(
                ids.len() == 4 && ids.iter().all(|id| id.parse::<u32>().is_ok_and(|id| id > 1 << 30)),
                "{ids:?}"
            );
        }
        anyhow::ensure!(words("Groups:").is_empty() && words("CapEff:") == ["0000000000000000"], "{status}");
        for kind in ["net", "mnt"] {
            let (its, ours) = (format!("{process}/ns/{kind}"), format!("/proc/self/ns/{kind}"));
            anyhow::ensure!(std::fs::read_link(its)? != std::fs::read_link(ours)?, "namespace {kind}");
        }
        let mut names: Vec<_> = std::fs::read_dir(format!("{process}/root/"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        anyhow::ensure!(names == ["dev", "kernel", "root.img", "run", "vmm.json"], "{names:?}");

        // As a VMM does that its guest has taken over: the host's secrets instead of its console.
        let vm = cloud.state_dir().join("host/servers").join(&server.id).join("vm/run");
        let secret = cloud.state_dir().join("host/identity.json");
        std::fs::rename(vm.join("console.log"), vm.join("kept"))?;
        std::os::unix::fs::symlink(&secret, vm.join("console.log"))?;
        let body = json!({"os-getConsoleOutput": {}});
        let shown = client.post(Service::Compute, &format!("/servers/{}/action", server.id), body).await;
        let told = format!("{shown:?}");
        anyhow::ensure!(!told.contains("secret") && !told.contains("cloud_id"), "{told}");
        std::fs::remove_file(vm.join("console.log"))?;
        std::fs::rename(vm.join("kept"), vm.join("console.log"))?;

        journey.page(&server)?;
        journey.delete(&client, &server).await?;
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(cloud.leftovers(&server.id, Some(&network))?, "");
        Ok(())
    });
}

#[test]
fn kill_9_of_hostd_while_servers_are_made_and_deleted_leaves_nothing() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "storm", "10.21.0.0/24").await?;
        for (round, pause_ms) in [0u64, 15, 40, 80, 150, 300].into_iter().enumerate() {
            let body = json!({"server": {"name": format!("storm-{round}"), "imageRef": journey.image_id,
                "flavorRef": flavor_id(&client, &journey.flavor).await?, "networks": [{"uuid": network}]}});
            let id = journey::id_of(&client.post(Service::Compute, "/servers", body).await?["server"])?;
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            cloud.kill9_daemon("mote-hostd")?;
            journey
                .wait_status(&client, &id, "ACTIVE")
                .await
                .with_context(|| format!("killed after {pause_ms} ms"))?;
            client.delete(Service::Compute, &format!("/servers/{id}")).await?;
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            cloud.kill9_daemon("mote-hostd")?;
            eventually("the server is gone", async || {
                Ok(client.find(Service::Compute, &format!("/servers/{id}")).await?.is_none().then_some(()))
            })
            .await?;
            assert_eq!(cloud.leftovers(&id, None)?, "", "killed after {pause_ms} ms");
        }
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(cloud.leftovers("no-server", Some(&network))?, "");
        Ok(())
    });
}

#[test]
fn kill_9_of_the_vmm_makes_an_error_or_a_new_start_as_the_policy_says() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "vmm", "10.22.0.0/24").await?;

        let never = journey.server(&client, "never", &network, json!({})).await?;
        let again = json!({"metadata": {"mote:restart_policy": "on-failure"}});
        let again = journey.server(&client, "again", &network, again).await?;
        for server in [&never, &again] {
            journey.wait_console(&client, server).await?;
            let vmm = Cloud::vmm(&server.id).context("the server has no VMM")?;
            kill(Pid::from_raw(vmm), Signal::SIGKILL)?;
        }
        let fault = eventually("ERROR", async || {
            let server = shown(&client, &never.id).await?;
            Ok((server["status"] == "ERROR")
                .then(|| server["fault"]["message"].as_str().unwrap_or_default().to_owned()))
        })
        .await?;
        assert!(fault.contains("killed"), "the fault says why: {fault:?}");
        assert_eq!(Cloud::vmm(&never.id), None);

        eventually("a new VMM", async || Ok(Cloud::vmm(&again.id))).await?;
        eventually("an answer", async || Ok(journey.page(&again).ok())).await?;
        assert_eq!(shown(&client, &again.id).await?["status"], "ACTIVE");

        // A user starts the failed one again, then both go.
        client
            .post(
                Service::Compute,
                &format!("/servers/{}/action", never.id),
                json!({"reboot": {"type": "HARD"}}),
            )
            .await?;
        eventually("ACTIVE again", async || {
            Ok((shown(&client, &never.id).await?["status"] == "ACTIVE").then_some(()))
        })
        .await?;
        for server in [&never, &again] {
            journey.delete(&client, server).await?;
            assert_eq!(cloud.leftovers(&server.id, None)?, "");
        }
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(cloud.leftovers(&never.id, Some(&network))?, "");
        Ok(())
    });
}

#[test]
fn every_way_in_which_a_guest_ends_shows_in_its_status() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let network = journey::network(&client, "ends", "10.23.0.0/24").await?;
        for (mode, wanted) in [("mote.hello", "SHUTOFF"), ("mote.crash", "ERROR")] {
            let journey = guest_journey(&cloud, &client, mode).await?;
            let body = json!({"server": {"name": "ends", "imageRef": journey.image_id,
                "flavorRef": flavor_id(&client, &journey.flavor).await?, "networks": [{"uuid": network}]}});
            let id = journey::id_of(&client.post(Service::Compute, "/servers", body).await?["server"])?;
            let server = eventually(wanted, async || {
                let server = shown(&client, &id).await?;
                Ok((server["status"] == wanted).then_some(server))
            })
            .await?;
            if wanted == "ERROR" {
                assert_ne!(server["fault"]["message"], "", "an ERROR says why: {server}");
            }
            assert_eq!(Cloud::vmm(&id), None, "no VMM is left after {mode}");
            mote::commands::server::delete(&client, &id).await?;
            assert_eq!(cloud.leftovers(&id, None)?, "");
        }
        Ok(())
    });
}

/// A server as the API shows it.
async fn shown(client: &Client, id: &str) -> anyhow::Result<Value> {
    let mut server = client.get(Service::Compute, &format!("/servers/{id}")).await?["server"].take();
    // Times of reports may differ; what counts is what is.
    if let Some(fields) = server.as_object_mut() {
        fields.remove("updated");
    }
    Ok(server)
}

/// The same, while a controller may still be starting.
async fn shown_when_up(cloud: &Cloud, id: &str) -> anyhow::Result<Option<Value>> {
    let Ok(client) = cloud.client().await else { return Ok(None) };
    let server = shown(&client, id).await?;
    Ok((server["status"] == "ACTIVE" && server["OS-EXT-STS:task_state"].is_null()).then_some(server))
}

async fn flavor_id(client: &Client, name: &str) -> anyhow::Result<Value> {
    Ok(client.resolve(Service::Compute, "/flavors", "flavors", name).await?["id"].take())
}

/// Asks until there is an answer, for at most a minute.
async fn eventually<T>(
    what: &str,
    mut ask: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("{what} never came");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
