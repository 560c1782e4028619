//! Two hosts on one machine, each in a network namespace of its own with its own host daemon, joined by token over
//! their own addresses: where the scheduler's policies place servers.

mod common;

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use common::{guest_journey, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{cloud::Cloud, journey, place::Place, programs::program};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// A network between the machine (`10.254.N.1`) and two hosts (`.11`, `.12`), removed when dropped.
struct Underlay {
    tag: String,
    net: String,
}

impl Underlay {
    fn new() -> anyhow::Result<Self> {
        let number = std::process::id() % 200 + 20;
        let this = Self { tag: format!("mu{number}"), net: format!("10.254.{number}") };
        let Self { tag, net } = &this;
        let mut script = format!(
            "set -e; ip link add {tag} type bridge; ip addr add {net}.1/24 dev {tag}; ip link set {tag} up\n"
        );
        for n in [1, 2] {
            script += &format!(
                "ip netns add {tag}h{n}; ip link add {tag}v{n} type veth peer name eth0 netns {tag}h{n}
                 ip link set {tag}v{n} master {tag} up; ip -n {tag}h{n} link set lo up
                 ip -n {tag}h{n} addr add {net}.1{n}/24 dev eth0; ip -n {tag}h{n} link set eth0 up\n"
            );
        }
        Place::Here.sh(&script)?;
        Ok(this)
    }
}

impl Drop for Underlay {
    fn drop(&mut self) {
        let tag = &self.tag;
        let script = format!("ip netns delete {tag}h1; ip netns delete {tag}h2; ip link delete {tag}; true");
        if let Err(e) = Place::Here.sh(&script) {
            eprintln!("removing the underlay: {e:#}");
        }
    }
}

/// A host daemon in a namespace.
struct Host {
    dir: tempfile::TempDir,
    daemon: Child,
}

impl Host {
    fn join(namespace: &str, url: &str, token: &str, name: &str, zone: &str) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("mh").tempdir_in("/tmp")?;
        let state = dir.path().join("state");
        let run = dir.path().join("run");
        // The network namespace only: named namespaces must be seen by the whole machine.
        let enter = |arguments: &[&str]| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{namespace}")).arg(program("mote-hostd")).args(arguments);
            command.arg("--state-dir").arg(&state).arg("--run-dir").arg(&run);
            command
        };
        let joined = enter(&["join", url, "--token", token, "--name", name, "--zone", zone]).output()?;
        if !joined.status.success() {
            bail!("{name} can't join: {}", String::from_utf8_lossy(&joined.stderr));
        }
        let log = fs::File::create(dir.path().join("hostd.log"))?;
        let daemon = enter(&["run"]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        Ok(Self { dir, daemon })
    }

    fn dirs(&self) -> Vec<String> {
        vec![self.dir.path().display().to_string()]
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- hostd ---\n{}",
                fs::read_to_string(self.dir.path().join("hostd.log")).unwrap_or_default()
            );
        }
        if let Ok(pid) = i32::try_from(self.daemon.id()) {
            // It may have ended already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.daemon.wait();
    }
}

/// Where a server is: the name of its host.
async fn host_of(client: &Client, id: &str) -> anyhow::Result<String> {
    let answer = client.get(Service::Compute, &format!("/servers/{id}")).await?;
    let name = answer["server"]["OS-EXT-SRV-ATTR:host"].as_str();
    Ok(name.context("an administrator sees the host")?.to_owned())
}

#[test]
fn four_servers_spread_over_two_hosts_as_each_policy_says() {
    need_servers!();
    run(async {
        let underlay = Underlay::new()?;
        let cloud = Cloud::start_with(&format!("{}.1", underlay.net), &["--no-host"])?;
        let client = cloud.client().await?;
        let token: Value = serde_json::from_str(&cloud.mote(&["--json", "host", "join-token"])?)?;
        let token = token["token"].as_str().context("no token in the answer")?;
        let wrong = Host::join(&format!("{}h1", underlay.tag), &cloud.url, "wrong-token", "evil", "nova");
        assert!(wrong.is_err_and(|e| e.to_string().contains("token")), "a wrong join token is refused");
        let hosts = [
            Host::join(&format!("{}h1", underlay.tag), &cloud.url, token, "one", "zone-a")?,
            Host::join(&format!("{}h2", underlay.tag), &cloud.url, token, "two", "zone-b")?,
        ];
        wait_up(&client, 2).await?;
        let mut journey = guest_journey(&cloud, &client, "mote.serve").await?;
        journey.dirs = hosts.iter().flat_map(Host::dirs).collect();
        let network = journey::network(&client, "spread", "10.40.0.0/24").await?;

        for policy in ["least-loaded", "by-zone", "random"] {
            let shown: Value =
                serde_json::from_str(&cloud.mote(&["--json", "host", "scheduler", "--policy", policy])?)?;
            assert_eq!(shown["policy"], policy);
            let mut servers = Vec::new();
            let mut counts = std::collections::BTreeMap::new();
            for n in 0..4 {
                let server = journey.server(&client, &format!("{policy}-{n}"), &network, json!({})).await?;
                *counts.entry(host_of(&client, &server.id).await?).or_insert(0) += 1;
                servers.push(server);
            }
            eprintln!("{policy}: {counts:?}");
            assert_eq!(counts.values().sum::<i32>(), 4);
            if policy != "random" {
                assert_eq!(counts, [("one".to_owned(), 2), ("two".to_owned(), 2)].into(), "{policy}");
            }
            for server in &servers {
                journey.delete(&client, server).await?;
                assert_eq!(journey.place.leftovers(&journey.dirs, &server.id, None)?, "");
            }
        }
        // A zone that is asked for decides.
        journey.zone = Some("zone-b".into());
        let server = journey.server(&client, "asked", &network, json!({})).await?;
        assert_eq!(host_of(&client, &server.id).await?, "two");
        journey.wait_console(&client, &server).await?;
        journey.page(&server)?;
        journey.delete(&client, &server).await?;
        client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        assert_eq!(journey.place.leftovers(&journey.dirs, &server.id, Some(&network))?, "");
        Ok(())
    });
}

async fn wait_up(client: &Client, count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let hosts = client.list(Service::Mote, "/v1/hosts", "hosts").await?;
        if hosts.iter().filter(|h| h["state"] == "up").count() == count {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the hosts are not up: {hosts:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
