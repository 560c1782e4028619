//! A server of an image that is a whole disk, as distributions publish them: no kernel and no ramdisk beside it.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use common::{need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, ImageFiles, Journey},
    programs,
};
use serde_json::json;

/// The conformance guest where a distribution has its kernel, with the boot loader's configuration beside it.
fn disk_with_system(scratch: &Path) -> anyhow::Result<PathBuf> {
    let boot = scratch.join("tree/boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::copy(programs::guest(), boot.join("vmlinuz-1"))?;
    let menu = "set default=\"0\"\nmenuentry 'Guest' {\n\tlinux /boot/vmlinuz-1 mote.serve\n}\n";
    fs::write(boot.join("grub/grub.cfg"), menu)?;
    let disk = scratch.join("disk.raw");
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(scratch.join("tree"))
        .arg(&disk)
        .arg("8M")
        .output()
        .context("running mke2fs")?;
    ensure!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    Ok(disk)
}

async fn image(client: &Client, name: &str, disk: PathBuf) -> anyhow::Result<String> {
    let files = ImageFiles { name: name.into(), disk, kernel: None, ramdisk: None, properties: Vec::new() };
    journey::image(client, &files).await
}

#[test]
fn a_server_boots_from_a_disk_that_brings_its_own_kernel() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let scratch = tempfile::tempdir()?;
        let disk = disk_with_system(scratch.path())?;
        let journey = Journey::guest(image(&client, "whole", disk).await?, cloud.server_dirs());
        let network = journey::network(&client, "whole", "10.41.0.0/24").await?;
        let server = journey.server(&client, "whole", &network, json!({})).await?;
        journey.wait_console(&client, &server).await?;
        journey.page(&server)?;
        journey.delete(&client, &server).await?;
        let left = cloud.leftovers(&server.id, None)?;
        ensure!(left.is_empty(), "something is left:\n{left}");
        Ok(())
    });
}

#[test]
fn a_disk_without_a_system_says_so_and_leaves_nothing() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let scratch = tempfile::tempdir()?;
        let disk = scratch.path().join("empty.raw");
        fs::write(&disk, vec![0; 1 << 20])?;
        let journey = Journey::guest(image(&client, "empty", disk).await?, cloud.server_dirs());
        let network = journey::network(&client, "empty", "10.42.0.0/24").await?;
        let refused =
            journey.server(&client, "empty", &network, json!({})).await.err().context("it starts")?;
        let text = format!("{refused:#}");
        ensure!(text.contains("ERROR") && text.contains("no ext4 file system"), "{text}");
        let servers = client.list(Service::Compute, "/servers", "servers").await?;
        let id = servers[0]["id"].as_str().context("the server is listed")?;
        mote::commands::server::delete(&client, id).await?;
        let left = cloud.leftovers(id, None)?;
        ensure!(left.is_empty(), "something is left:\n{left}");
        Ok(())
    });
}
