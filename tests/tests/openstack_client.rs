//! The unmodified `openstack` client from PyPI (`MOTE_OPENSTACK` names its program; `./test` installs it) against a running
//! cloud with a real server behind it.

mod common;

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use common::{guest_journey, need_servers, run};
use mote_tests::{cloud::Cloud, programs};
use serde_json::Value;

/// The client, with the environment of an openrc file.
struct OpenStack<'a> {
    program: PathBuf,
    cloud: &'a Cloud,
}

impl OpenStack<'_> {
    fn command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let credentials = self.cloud.credentials()?;
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/nonexistent");
        for (key, value) in [
            ("OS_AUTH_URL", credentials.auth_url),
            ("OS_USERNAME", credentials.username),
            ("OS_PASSWORD", credentials.password),
            ("OS_PROJECT_NAME", credentials.project),
            ("OS_USER_DOMAIN_NAME", credentials.user_domain),
            ("OS_PROJECT_DOMAIN_NAME", credentials.project_domain),
            ("OS_IDENTITY_API_VERSION", "3".into()),
        ] {
            command.env(key, value);
        }
        Ok(command)
    }

    /// Output as text.
    fn text(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(arguments)?.output().context("running openstack")?;
        if !output.status.success() {
            bail!(
                "openstack {arguments:?}: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Words of a command that gives JSON, or nothing.
    fn words(&self, command: &str) -> anyhow::Result<Value> {
        let arguments: Vec<&str> = command.split(' ').collect();
        let silent = ["set", "unset", "delete", "add", "remove"].iter().any(|verb| arguments.contains(verb));
        match silent {
            true => self.text(&arguments).map(|_| Value::Null),
            false => self.json(&arguments),
        }
    }

    /// Output as JSON.
    fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.text(&[arguments, &["-f", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("openstack {arguments:?} gave {text}"))
    }

    /// The error text of a command that must fail.
    fn fails(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(arguments)?.output().context("running openstack")?;
        if output.status.success() {
            bail!("openstack {arguments:?} should have failed: {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn names(list: &Value, column: &str) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|row| row[column].as_str().map(str::to_owned)).collect()
}

#[test]
fn the_openstack_client_takes_a_server_through_its_life() {
    need_servers!();
    let Some(program) = std::env::var_os("MOTE_OPENSTACK").map(PathBuf::from) else {
        eprintln!("SKIPPED: MOTE_OPENSTACK doesn't name the openstack client (./test installs it)");
        return;
    };
    run(async {
        let cloud = Cloud::start()?;
        let openstack = OpenStack { program, cloud: &cloud };
        identity(&openstack)?;
        image(&openstack)?;
        network(&openstack)?;
        routing(&openstack)?;
        filters(&openstack)?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let id = server(&openstack)?;
        let shown = client.get(mote::client::Service::Compute, &format!("/servers/{id}")).await;
        assert!(shown.is_err(), "the server is gone");
        assert_eq!(journey.place.leftovers(&cloud.server_dirs(), &id, None)?, "");
        for (family, name) in [("network", "net"), ("keypair", "key"), ("image", "disk"), ("image", "kernel")]
        {
            openstack.text(&[family, "delete", name])?;
        }
        Ok(())
    });
}

fn identity(openstack: &OpenStack) -> anyhow::Result<()> {
    let token = openstack.json(&["token", "issue"])?;
    assert!(token["id"].as_str().is_some_and(|t| t.len() > 30), "{token}");
    let catalog = openstack.json(&["catalog", "list"])?;
    let mut types = names(&catalog, "Type");
    types.sort();
    assert_eq!(types, ["compute", "identity", "image", "network"]);
    openstack.text(&["project", "create", "tenant"])?;
    openstack.text(&["user", "create", "--project", "tenant", "--password", "tenant-password", "alice"])?;
    openstack.text(&["role", "add", "--user", "alice", "--project", "tenant", "member"])?;
    let assigned = openstack.json(&["role", "assignment", "list", "--user", "alice", "--names"])?;
    assert_eq!(names(&assigned, "Role"), ["member"]);
    let as_alice =
        ["--os-username", "alice", "--os-password", "tenant-password", "--os-project-name", "tenant"];
    openstack.json(&[&as_alice[..], &["token", "issue"]].concat())?;
    let refused = openstack.fails(&[&as_alice[..], &["user", "list"]].concat())?;
    assert!(refused.contains("403"), "{refused}");
    let wrong = openstack.fails(&["--os-password", "wrong", "token", "issue"])?;
    assert!(wrong.contains("401"), "{wrong}");
    Ok(())
}

fn image(openstack: &OpenStack) -> anyhow::Result<()> {
    let mut disk = tempfile::NamedTempFile::new()?;
    disk.write_all(&vec![7; 1 << 20])?;
    let disk = disk.path().display().to_string();
    let guest = programs::guest().display().to_string();
    let kernel = openstack.json(&[
        "image",
        "create",
        "kernel",
        "--disk-format",
        "aki",
        "--container-format",
        "aki",
        "--file",
        &guest,
    ])?;
    assert_eq!(kernel["status"], "active", "{kernel}");
    let kernel_property = format!("kernel_id={}", kernel["id"].as_str().unwrap_or_default());
    let image = openstack.json(&[
        "image",
        "create",
        "disk",
        "--disk-format",
        "raw",
        "--container-format",
        "bare",
        "--file",
        &disk,
        "--property",
        &kernel_property,
        "--property",
        "os_command_line=mote.serve",
    ])?;
    assert_eq!(image["status"], "active", "{image}");
    assert_eq!(image["size"], 1 << 20, "{image}");
    let mut listed = names(&openstack.json(&["image", "list"])?, "Name");
    listed.sort();
    assert_eq!(listed, ["disk", "kernel"]);
    let shown = openstack.json(&["image", "show", "disk"])?;
    assert_eq!(shown["properties"]["kernel_id"], kernel["id"], "{shown}");
    let back = tempfile::NamedTempFile::new()?;
    openstack.text(&["image", "save", "--file", &back.path().display().to_string(), "disk"])?;
    assert_eq!(std::fs::read(back.path())?, vec![7; 1 << 20], "the bytes come back");
    Ok(())
}

fn network(openstack: &OpenStack) -> anyhow::Result<()> {
    let network = openstack.json(&["network", "create", "net"])?;
    assert_eq!(network["status"], "ACTIVE", "{network}");
    let subnet =
        openstack.json(&["subnet", "create", "--network", "net", "--subnet-range", "10.50.0.0/24", "sub"])?;
    assert_eq!(subnet["gateway_ip"], "10.50.0.1", "{subnet}");
    assert!(names(&openstack.json(&["network", "list"])?, "Name").contains(&"net".to_owned()));
    let used = openstack.fails(&[
        "subnet",
        "create",
        "--network",
        "net",
        "--subnet-range",
        "10.50.0.0/25",
        "again",
    ])?;
    assert!(used.contains("overlap"), "{used}");
    Ok(())
}

/// Routers, external networks, floating IPs.
fn routing(openstack: &OpenStack) -> anyhow::Result<()> {
    let outside = "--external --provider-network-type flat --provider-physical-network public public";
    openstack.words(&format!("network create {outside}"))?;
    openstack.words("subnet create --network public --subnet-range 203.0.113.0/24 --no-dhcp public-sub")?;
    openstack.words("network create inner --tag a")?;
    openstack.words("subnet create --network inner --subnet-range 10.60.0.0/24 inner-sub")?;
    let v6 = "--ip-version 6 --ipv6-ra-mode slaac --ipv6-address-mode slaac --subnet-range fd00:60::/64";
    openstack.words(&format!("subnet create --network inner {v6} inner-sub6"))?;
    openstack.words("router create r")?;
    openstack.words("router add subnet r inner-sub")?;
    openstack.words("router set --external-gateway public r")?;
    let port = openstack.words("port create --network inner p")?;
    assert_eq!(port["fixed_ips"].as_array().map(Vec::len), Some(2), "{port}");
    let floating = openstack.words("floating ip create public")?;
    let address = floating["floating_ip_address"].as_str().context("no address")?.to_owned();
    openstack.words(&format!("floating ip set --port p {address}"))?;
    let shown = openstack.words(&format!("floating ip show {address}"))?;
    assert_eq!((&shown["port_id"], &shown["status"]), (&port["id"], &"ACTIVE".into()), "{shown}");
    let used = openstack.fails(&["router", "unset", "--external-gateway", "r"])?;
    assert!(used.contains("floating"), "{used}");
    openstack.words(&format!("floating ip unset --port {address}"))?;
    let forward = "--internal-protocol-port 22 --external-protocol-port 2222 --protocol tcp";
    let ip = port["fixed_ips"][0]["ip_address"].as_str().context("no address")?;
    openstack.words(&format!(
        "floating ip port forwarding create --internal-ip-address {ip} --port p {forward} {address}"
    ))?;
    assert_eq!(openstack.words("network list --tags a")?.as_array().map(Vec::len), Some(1));
    openstack.words("router set --route destination=192.0.2.0/24,gateway=10.60.0.9 r")?;
    openstack.words("router unset --route destination=192.0.2.0/24,gateway=10.60.0.9 r")?;
    for list in ["floating ip list", "router list", "ip availability list", "network agent list"] {
        openstack.words(list)?;
    }
    for command in [
        &format!("floating ip delete {address}") as &str,
        "port delete p",
        "router unset --external-gateway r",
        "router remove subnet r inner-sub",
        "router delete r",
        "network delete inner",
        "network delete public",
    ] {
        openstack.words(command)?;
    }
    Ok(())
}

/// Security groups, address groups, QoS, sharing, pools.
fn filters(openstack: &OpenStack) -> anyhow::Result<()> {
    openstack.words("security group create web")?;
    openstack.words("security group rule create --protocol tcp --dst-port 80:81 web")?;
    openstack.words("security group rule create --protocol icmp --remote-group web web")?;
    let again = openstack.fails(&[
        "security",
        "group",
        "rule",
        "create",
        "--protocol",
        "tcp",
        "--dst-port",
        "80:81",
        "web",
    ])?;
    assert!(again.contains("already exists"), "{again}");
    let rules = openstack.words("security group rule list web")?;
    assert_eq!(rules.as_array().map(Vec::len), Some(4), "{rules}");
    openstack.words("security group show web")?;
    openstack.words("port create --network net --security-group web filtered")?;
    openstack.words("port set --allowed-address ip-address=10.50.0.200 filtered")?;
    openstack.words("network qos policy create slow")?;
    openstack.words("network qos rule create --type bandwidth-limit --max-kbps 1000 --egress slow")?;
    openstack.words("network qos rule create --type dscp-marking --dscp-mark 26 slow")?;
    assert_eq!(openstack.words("network qos rule list slow")?.as_array().map(Vec::len), Some(2));
    openstack.words("port set --qos-policy slow filtered")?;
    openstack.words("address group create --address 192.0.2.0/24 office")?;
    openstack.words("address group set --address 198.51.100.1 office")?;
    openstack.words("subnet pool create --pool-prefix 10.90.0.0/16 --default-prefix-length 24 pool")?;
    let subnet = openstack.words("subnet create --network net --subnet-pool pool pooled")?;
    assert_eq!(subnet["cidr"], "10.90.0.0/24", "{subnet}");
    let share = "--type network --action access_as_shared --target-project tenant";
    let policy = openstack.words(&format!("network rbac create {share} net"))?;
    let policy = policy["id"].as_str().context("no id")?;
    for command in [
        &format!("network rbac delete {policy}") as &str,
        "subnet delete pooled",
        "subnet pool delete pool",
        "port delete filtered",
        "network qos policy delete slow",
        "address group delete office",
        "security group delete web",
        "quota list --network",
    ] {
        openstack.words(command)?;
    }
    Ok(())
}

fn server(openstack: &OpenStack) -> anyhow::Result<String> {
    let mut key = tempfile::NamedTempFile::new()?;
    key.write_all(
        b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl test\n",
    )?;
    let key_path = key.path().display().to_string();
    let made = openstack.json(&["keypair", "create", "--public-key", &key_path, "key"])?;
    assert_eq!(made["name"], "key", "{made}");
    let server = openstack.json(&[
        "server",
        "create",
        "--wait",
        "--image",
        "disk",
        "--flavor",
        "m1.nano",
        "--network",
        "net",
        "--key-name",
        "key",
        "web",
    ])?;
    assert_eq!(server["status"], "ACTIVE", "{server}");
    let id = server["id"].as_str().context("the server has an id")?.to_owned();
    let listed = openstack.json(&["server", "list"])?;
    assert_eq!(names(&listed, "Name"), ["web"]);
    assert_eq!(listed[0]["Image"], "disk", "{listed}");
    let shown = openstack.json(&["server", "show", "web"])?;
    let address = shown["addresses"]["net"][0].as_str().context("the server shows its address")?.to_owned();
    assert!(address.starts_with("10.50.0."), "{shown}");
    let log = (0..100).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let log = openstack.text(&["console", "log", "show", "web"]).ok()?;
        log.contains("mote-guest: serving on").then_some(log)
    });
    let log = log.context("the console never showed that the guest serves")?;
    assert!(log.contains(&address), "{log}");
    for (family, arguments) in [
        ("ports", &["port", "list", "--server", "web"][..]),
        ("flavors", &["flavor", "list"]),
        ("hypervisors", &["hypervisor", "list"]),
        ("zones", &["availability", "zone", "list"]),
        ("keypairs", &["keypair", "list"]),
        ("subnets", &["subnet", "list"]),
    ] {
        let rows = openstack.json(arguments)?;
        assert!(rows.as_array().is_some_and(|r| !r.is_empty()), "{family}: {rows}");
    }
    openstack.text(&["server", "stop", "web"])?;
    openstack.text(&["server", "delete", "--wait", "web"])?;
    let gone = openstack.fails(&["server", "show", "web"])?;
    assert!(gone.contains("No Server found") || gone.contains("No server"), "{gone}");
    Ok(id)
}
