//! Debian's unmodified cloud-init against this crate's metadata: in a copy of the distribution's root file system, in a
//! namespace that is plugged in as a guest is.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use harness::{Client, Lab, add_port, metadata_of, network, skip_reason};
use mote_host_api::{InstanceMetadata, NetworkSpec, PortSpec};
use mote_network::services::metadata::{Guest, config_drive};

/// The server's key.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBQgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA test";
/// A file, and a command that notes that it ran.
const USER_DATA: &str = "#cloud-config
write_files:
- path: /etc/marker
  content: written by cloud-init
runcmd:
- echo as it should >/run/ran
";

/// The copy's root is no disk that could be resized.
const NO_MACHINE: [&str; 1] = ["cc_resizefs"];

/// Why it can't run here.
fn skipped() -> Option<String> {
    let disk = disk();
    skip_reason().or_else(|| {
        (!disk.exists()).then(|| {
            format!("{} is not there (./test makes it: mote-image build-debian --cloud-init)", disk.display())
        })
    })
}

fn disk() -> PathBuf {
    std::env::var_os("MOTE_DEBIAN_CLOUD_INIT")
        .map_or_else(|| Path::new("/var/cache/mote/images/debian-cloud-init").to_owned(), PathBuf::from)
        .join("disk.raw")
}

/// A server that is about to boot for the first time.
struct Server {
    lab: Lab,
    network: NetworkSpec,
    port: PortSpec,
    metadata: InstanceMetadata,
    client: Client,
}

impl Server {
    async fn new(dhcp: bool) -> Self {
        let mut lab = Lab::new();
        let mut network = network();
        network.subnets[0].enable_dhcp = dhcp;
        let port = add_port(&mut network, 10);
        let mut metadata = metadata_of(std::slice::from_ref(&network));
        let of_server = metadata.get_mut(&port.server_id).unwrap();
        of_server.public_keys = [("key".to_owned(), KEY.to_owned())].into();
        of_server.user_data = Some(STANDARD.encode(USER_DATA));
        let of_server = of_server.clone();
        lab.converge(std::slice::from_ref(&network), &metadata).await;
        let client = lab.plug_in(network.id, &port);
        lab.converge(std::slice::from_ref(&network), &metadata).await;
        Self { lab, network, port, metadata: of_server, client }
    }

    /// Boots with this command line; gives what cloud-init made, by section.
    async fn boot(&self, line: &str, seed: &[(String, Vec<u8>)]) -> HashMap<String, String> {
        let work = self.lab.directory.join("guest");
        for (path, bytes) in seed {
            let path = work.join("seed").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        fs::create_dir_all(work.join("dmi")).unwrap();
        let id = self.port.server_id.to_string();
        // As a host starts its VMMs.
        for (name, text) in [
            ("sys_vendor", "OpenStack Foundation"),
            ("product_name", "OpenStack Nova"),
            ("product_serial", &id),
            ("product_uuid", &id),
        ] {
            fs::write(work.join("dmi").join(name), format!("{text}\n")).unwrap();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/harness/cloud-init.sh");
        let mut command = self.client.command("unshare");
        command.args(["--mount", "--uts", "--propagation", "private", "sh"]);
        command.args([script.as_path(), &disk(), &work]).arg(line);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        let sections = said.split("<<").skip(1).filter_map(|section| section.split_once('\n'));
        sections.map(|(name, text)| (name.to_owned(), text.trim().to_owned())).collect()
    }

    /// What is the same whatever the metadata comes from; the log warns only of what is `expected`.
    fn check(&self, found: &HashMap<String, String>, source: &str, expected: &[&str]) {
        assert_eq!(found["source"], source, "{found:?}");
        assert_eq!(found["hostname"], "vm-10", "{found:?}");
        assert_eq!(found["marker"], "written by cloud-init", "{found:?}");
        assert_eq!(found["ran"], "as it should", "{found:?}");
        assert!(found["keys"].contains(KEY), "{found:?}");
        assert!(found["result"].contains("\"errors\": []"), "{found:?}");
        let unexpected = |line: &&str| !expected.iter().any(|part| line.contains(part));
        assert_eq!(found["warnings"].lines().filter(unexpected).collect::<Vec<_>>(), [""; 0], "{found:?}");
        assert!(found["network"].contains("MACAddress=fa:16:3e:00:00:0a"), "{found:?}");
    }
}

#[tokio::test]
async fn it_finds_the_metadata_service_by_the_machines_name_alone() {
    skip_if!(skipped());
    let server = Server::new(true).await;
    let found = server.boot("quiet", &[]).await;
    server.check(&found, "openstack", &NO_MACHINE);
    assert_eq!(found["identified"], "datasource_list: [ OpenStack, None ]");
    assert_eq!(found["instance"], server.port.server_id.to_string());
    assert!(found["network"].contains("DHCP=ipv4"), "{found:?}");
}

#[tokio::test]
async fn it_takes_ec2s_layout_when_it_is_told_to() {
    skip_if!(skipped());
    let server = Server::new(true).await;
    let found = server.boot("quiet ci.ds=Ec2", &[]).await;
    // Nova's EC2 metadata tell of no networks, and it isn't Amazon's cloud; and there is no init that restarts networkd.
    let expected = ["cc_resizefs", "'network' key not valid", "'systemctl', 'restart'", "Traceback", "*****"];
    server.check(&found, "ec2", &expected);
    assert!(found["identified"].contains("Ec2"), "{found:?}");
    assert_eq!(found["instance"], format!("i-{}", &server.port.server_id.to_string()[..8]));
}

#[tokio::test]
async fn it_takes_a_config_drives_files_with_the_address_that_no_dhcp_gives() {
    skip_if!(skipped());
    let server = Server::new(false).await;
    let networks = [server.network.clone()];
    let guest = Guest::of_server(&server.metadata, &[server.port.id], &networks);
    let files: Vec<_> = config_drive(&guest)
        .into_iter()
        .map(|(path, bytes)| (format!("config_drive/{path}"), bytes))
        .collect();
    let found = server.boot("quiet", &files).await;
    server.check(&found, "configdrive", &NO_MACHINE);
    assert_eq!(found["instance"], server.port.server_id.to_string());
    assert!(found["network"].contains("Address=10.0.0.10/24"), "{found:?}");
    assert!(found["network"].contains("Gateway=10.0.0.1"), "{found:?}");
}

#[tokio::test]
async fn it_takes_a_seed_although_there_is_a_metadata_service() {
    skip_if!(skipped());
    let server = Server::new(true).await;
    let network =
        "version: 2\nethernets:\n  first:\n    match: {macaddress: 'fa:16:3e:00:00:0a'}\n    dhcp4: true\n";
    let metadata = format!("instance-id: seeded\nlocal-hostname: vm-10\npublic-keys: ['{KEY}']\n");
    let seed = [("meta-data", metadata.as_str()), ("user-data", USER_DATA), ("network-config", network)];
    let seed = seed.map(|(name, text)| (format!("nocloud/{name}"), text.as_bytes().to_vec()));
    let found = server.boot("quiet", &seed).await;
    server.check(&found, "nocloud", &NO_MACHINE);
    assert_eq!(found["identified"], "datasource_list: [ NoCloud, OpenStack, None ]");
    assert_eq!(found["instance"], "seeded");
}
