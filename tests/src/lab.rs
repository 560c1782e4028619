//! The lab as a host of a cloud: an ordinary Linux with a real `kvm_amd` under emulation, for machines without hardware
//! virtualization. Its host daemon joins the controller outside.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mote::client::{Client, Service};
use serde_json::json;

use crate::{
    place::Place,
    programs::{program, source_dir},
};

/// How long a host in the lab may take from its join until it is up: emulated code is slow.
const JOIN_TIMEOUT: Duration = Duration::from_secs(120);
/// Where the host in the lab keeps its state and its sockets: memory that goes with the lab.
const STATE: &str = "/run/mote-host";
const RUN: &str = "/run/mote";

/// A running lab; stopped when dropped.
pub struct Lab {
    name: String,
    keep: bool,
}

/// The script that makes and runs labs.
fn script() -> PathBuf {
    source_dir().join("tests/lab/lab")
}

/// Why a lab is needed here, if it is.
pub fn needed() -> Option<String> {
    let output = Command::new(script()).arg("needed").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Lab {
    /// Boots a lab.
    pub fn start(name: &str) -> anyhow::Result<Self> {
        let output = Command::new(script())
            .args(["start", "--name", name, "--for", &std::process::id().to_string()])
            .output()
            .context("running tests/lab/lab")?;
        if !output.status.success() {
            bail!("the lab doesn't start: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(Self { name: name.to_owned(), keep: false })
    }

    /// Leaves it running when this value goes.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// The place inside.
    pub fn place(&self) -> Place {
        Place::Lab(self.name.clone())
    }

    /// Directories in which its host may leave files.
    pub fn server_dirs(&self) -> Vec<String> {
        vec![STATE.into(), RUN.into()]
    }

    /// Joins the lab's host daemon to the controller that listens on this machine's loopback at `port`, and waits until it
    /// is up.
    pub async fn join(&self, client: &Client, port: u16, zone: &str) -> anyhow::Result<()> {
        let answer = client.post(Service::Mote, "/v1/join-tokens", json!({})).await?;
        let token = answer["token"].as_str().context("no join token")?;
        let hostd = program("mote-hostd");
        let hostd = hostd.display();
        let dirs = format!("--state-dir {STATE} --run-dir {RUN}");
        // 10.0.2.2 is the outer machine's loopback, seen from inside.
        self.place().sh(&format!(
            "{hostd} join http://10.0.2.2:{port} --token {token} --name {name} --zone {zone} {dirs} &&
             (setsid {hostd} run {dirs} </dev/null >/run/mote-hostd.log 2>&1 &)",
            name = self.name
        ))?;
        let deadline = Instant::now() + JOIN_TIMEOUT;
        loop {
            let hosts = client.list(Service::Mote, "/v1/hosts", "hosts").await?;
            if hosts.iter().any(|h| h["name"] == self.name.as_str() && h["state"] == "up") {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the lab's host is not up: {}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The log of its host daemon.
    pub fn log(&self) -> String {
        self.place().sh("cat /run/mote-hostd.log").unwrap_or_else(|e| e.to_string())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            eprintln!("--- log of the lab's mote-hostd ---\n{}", self.log());
        }
        match Command::new(script()).args(["stop", "--name", &self.name]).output() {
            Ok(output) if output.status.success() => {}
            other => eprintln!("stopping lab {}: {other:?}", self.name),
        }
    }
}

/// The Debian image that `mote-image build-debian` made in a directory.
pub fn debian_dir() -> Option<PathBuf> {
    image_dir("MOTE_DEBIAN", "/var/cache/mote/images/debian")
}

/// The Debian image with cloud-init that `mote-image build-debian --cloud-init` made in a directory.
pub fn cloud_init_dir() -> Option<PathBuf> {
    image_dir("MOTE_DEBIAN_CLOUD_INIT", "/var/cache/mote/images/debian-cloud-init")
}

fn image_dir(variable: &str, otherwise: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map_or_else(|| Path::new(otherwise).to_owned(), PathBuf::from);
    dir.join("image.json").exists().then_some(dir)
}
