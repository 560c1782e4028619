//! Debian's unmodified cloud-init in Debian guests, by REST, on a host with hardware virtualization: this machine, or the lab.
//!
//! In the lab such a boot takes two minutes, nearly all of them systemd's and Python's. What differs between the sources is
//! also tried without a machine, in seconds, by `network/tests/cloud_init.rs`.

mod common;

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use common::{need_servers, on_hardware, run};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, ImageFiles, Journey, Server},
    lab,
    steps::Steps,
};
use serde_json::json;

/// What cloud-init does last of all: it tells the console what it made of the machine.
const USER_DATA: &str = r#"#cloud-config
write_files:
- path: /etc/marker
  content: written by cloud-init
runcmd:
- |
  {
    echo "report source $(cloud-id)"
    echo "report hostname $(hostname)"
    echo "report marker $(cat /etc/marker)"
    echo "report identified $(tr -d '\n' </run/cloud-init/cloud.cfg)"
    echo "report addresses $(ip -o -4 addr show scope global | tr -s ' ' | cut -d ' ' -f 4 | tr '\n' ' ')"
    echo "report instance $(cat /var/lib/cloud/data/instance-id)"
    echo "report keys $(cut -d ' ' -f 1,2 /home/debian/.ssh/authorized_keys)"
    echo "report end"
  } >/dev/ttyS0
"#;

/// The Ethernet address of the guest.
const MAC: &str = "fa:16:3e:00:00:0a";

/// A guest that boots with one source of data.
struct Boot {
    /// Further words of the kernel's command line.
    line: &'static str,
    config_drive: bool,
    dhcp: bool,
    /// NoCloud's files in the image, but for `meta-data`.
    seed: &'static [(&'static str, &'static str)],
    /// What `cloud-id` says.
    source: &'static str,
    /// What `ds-identify` wrote.
    identified: &'static str,
}

/// Makes an SSH key pair and gives the public half.
fn key_pair(directory: &Path) -> anyhow::Result<String> {
    let file = directory.join("key");
    command(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&file))?;
    Ok(fs::read_to_string(file.with_extension("pub")).context("reading the key")?.trim().to_owned())
}

/// The image with more on its command line, and with a seed.
async fn image(
    client: &Client,
    directory: &Path,
    scratch: &Path,
    boot: &Boot,
    key: &str,
) -> anyhow::Result<String> {
    let mut files = ImageFiles::bundle("debian", directory)?;
    for (name, value) in &mut files.properties {
        if name == "os_command_line" {
            *value = format!("{value} {}", boot.line).trim().to_owned();
        }
    }
    if !boot.seed.is_empty() {
        let disk = scratch.join("disk.raw");
        let metadata = format!("instance-id: seeded\nlocal-hostname: its-name\npublic-keys: ['{key}']\n");
        let mut commands = String::new();
        for directory in ["/var/lib/cloud", "/var/lib/cloud/seed", "/var/lib/cloud/seed/nocloud"] {
            commands += &format!("mkdir {directory}\n");
        }
        for (name, text) in boot.seed.iter().copied().chain([("meta-data", metadata.as_str())]) {
            let file = scratch.join(name);
            fs::write(&file, text).context("writing the seed")?;
            commands += &format!("write {} /var/lib/cloud/seed/nocloud/{name}\n", file.display());
        }
        fs::write(scratch.join("commands"), commands).context("writing debugfs's commands")?;
        command(Command::new("cp").arg("--sparse=always").arg(&files.disk).arg(&disk))?;
        command(Command::new("debugfs").arg("-w").arg("-f").arg(scratch.join("commands")).arg(&disk))?;
        files.disk = disk;
    }
    journey::image(client, &files).await
}

fn command(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn boots(boot: &Boot) {
    need_servers!();
    let Some(directory) = lab::cloud_init_dir() else {
        eprintln!("SKIPPED: the image is not built (./test builds it: mote-image build-debian --cloud-init)");
        return;
    };
    run(travel(boot, &directory));
}

async fn travel(boot: &Boot, directory: &Path) -> anyhow::Result<()> {
    let mut steps = Steps::new();
    let cloud = Cloud::start()?;
    let client = cloud.client().await?;
    let scratch = tempfile::tempdir()?;
    let public = key_pair(scratch.path())?;
    let body = json!({"keypair": {"name": "key", "public_key": public}});
    client.post(Service::Compute, "/os-keypairs", body).await?;
    let mut journey =
        Journey::guest(image(&client, directory, scratch.path(), boot, &public).await?, cloud.server_dirs());
    journey.patience = Duration::from_secs(600);
    journey.flavor = "m1.tiny".into();
    journey.console_mark = "report end".into();
    let name = format!("{}{}", boot.source, std::process::id());
    let _lab = on_hardware(&cloud, &client, &name, &mut journey, &mut steps).await?;
    let network = journey::network(&client, "net", "192.168.77.0/24").await?;
    if !boot.dhcp {
        let subnets = client.list(Service::Network, "/v2.0/subnets", "subnets").await?;
        let id = subnets[0]["id"].as_str().context("no subnet")?;
        let body = json!({"subnet": {"enable_dhcp": false}});
        client.put(Service::Network, &format!("/v2.0/subnets/{id}"), body).await?;
    }
    let port = json!({"port": {"network_id": network, "mac_address": MAC}});
    let port = client.post(Service::Network, "/v2.0/ports", port).await?;
    let more = json!({"networks": [{"port": port["port"]["id"]}], "key_name": "key", "user_data": STANDARD.encode(USER_DATA), "config_drive": boot.config_drive});
    let server = journey.server(&client, "its-name", &network, more).await?;
    steps.done(format!("server {} is ACTIVE", server.id));
    journey.wait_console(&client, &server).await?;
    steps.done("cloud-init has done its work");
    check(boot, &server, &journey::console(&client, &server.id).await?, &public)?;
    journey.delete(&client, &server).await?;
    steps.done("what it made of the machine is right");
    Ok(())
}

fn check(boot: &Boot, server: &Server, console: &str, public: &str) -> anyhow::Result<()> {
    for line in console.lines() {
        println!("| {line}");
    }
    let key = public.rsplit_once(' ').map_or(public, |(key, _)| key);
    let instance = match boot.source {
        "ec2" => format!("i-{}", &server.id[..8]),
        "nocloud" => "seeded".to_owned(),
        _ => server.id.clone(),
    };
    for (what, wanted) in [
        ("source", boot.source),
        ("hostname", "its-name"),
        ("marker", "written by cloud-init"),
        ("identified", boot.identified),
        ("addresses", &format!("{}/24", server.address)),
        ("instance", &instance),
        ("keys", key),
    ] {
        let report = format!("report {what} ");
        let found = console.lines().find_map(|l| l.trim().strip_prefix(report.as_str())).unwrap_or_default();
        if found.trim() != wanted {
            bail!("{what} is {found:?}, not {wanted:?}; the console:\n{console}");
        }
    }
    Ok(())
}

#[test]
fn it_finds_openstacks_metadata_service_by_the_machines_name_alone() {
    boots(&Boot {
        line: "",
        config_drive: false,
        dhcp: true,
        seed: &[],
        source: "openstack",
        identified: "datasource_list: [ OpenStack, None ]",
    });
}

#[test]
fn it_takes_ec2s_layout_when_it_is_told_to() {
    boots(&Boot {
        line: "ci.ds=Ec2",
        config_drive: false,
        dhcp: true,
        seed: &[],
        source: "ec2",
        identified: "datasource_list: [ Ec2, None ]",
    });
}

#[test]
fn it_takes_a_config_drive_with_the_address_that_no_dhcp_gives() {
    boots(&Boot {
        line: "",
        config_drive: true,
        dhcp: false,
        seed: &[],
        source: "configdrive",
        identified: "datasource_list: [ ConfigDrive, None ]",
    });
}

#[test]
fn it_takes_the_seed_in_its_image_although_there_is_a_metadata_service() {
    // cloud-init's renderer for networkd goes by Ethernet addresses.
    const NETWORK: &str =
        "version: 2\nethernets:\n  first:\n    match: {macaddress: 'fa:16:3e:00:00:0a'}\n    dhcp4: true\n";
    boots(&Boot {
        line: "",
        config_drive: false,
        dhcp: true,
        seed: &[("user-data", USER_DATA), ("network-config", NETWORK)],
        source: "nocloud",
        identified: "datasource_list: [ NoCloud, OpenStack, None ]",
    });
}
