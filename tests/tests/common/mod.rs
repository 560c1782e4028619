//! What the end-to-end tests share: the conformance guest as an image and as a journey.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::Write as _;

use mote::client::Client;
use mote_tests::{
    cloud::Cloud,
    journey::{self, ImageFiles, Journey},
    lab::{self, Lab},
    programs,
    steps::Steps,
};

/// Ends a test early, saying why, where servers can't run.
macro_rules! need_servers {
    () => {
        if let Some(reason) = mote_tests::programs::why_no_servers() {
            eprintln!("SKIPPED: {reason}");
            return;
        }
    };
}
pub(crate) use need_servers;

/// Runs an async test.
pub fn run<F: Future<Output = anyhow::Result<()>>>(test: F) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    if let Err(e) = runtime.block_on(test) {
        panic!("{e:#}");
    }
}

/// Where this machine has no hardware virtualization, starts the lab as a host of the cloud, on which the journey then is.
pub async fn on_hardware(
    cloud: &Cloud,
    client: &Client,
    name: &str,
    journey: &mut Journey,
    steps: &mut Steps,
) -> anyhow::Result<Option<Lab>> {
    let Some(reason) = lab::needed() else { return Ok(None) };
    steps.done(format!("a lab is needed: {reason}"));
    let lab = Lab::start(name)?;
    let port = cloud.url.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_default();
    lab.join(client, port, "lab").await?;
    steps.done("the lab's host is up");
    journey.place = lab.place();
    journey.dirs = lab.server_dirs();
    Ok(Some(lab))
}

/// Uploads the conformance guest with a mode (`mote.serve`, `mote.hello`, …) and gives the image's id.
pub async fn guest_image(client: &Client, mode: &str) -> anyhow::Result<String> {
    let mut disk = tempfile::NamedTempFile::new()?;
    disk.write_all(&vec![0; 1 << 20])?;
    let files = ImageFiles {
        name: format!("guest-{}", mode.replace('.', "-")),
        disk: disk.path().to_owned(),
        kernel: Some(programs::guest()),
        ramdisk: None,
        properties: vec![("os_command_line".into(), mode.into())],
    };
    journey::image(client, &files).await
}

/// A journey with the conformance guest on this machine.
pub async fn guest_journey(cloud: &Cloud, client: &Client, mode: &str) -> anyhow::Result<Journey> {
    Ok(Journey::guest(guest_image(client, mode).await?, cloud.server_dirs()))
}
