//! The resolver of a network as dig(1), nslookup, and the C library see it, and a real resolver behind it.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    process::{Child, Command, Stdio},
    time::Duration,
};

use harness::{Client, Lab, add_port, cloud::Cloud, metadata_of, network, run};
use mote_host_api::{DnsName, NetworkSpec, SegmentSpec};
use mote_network::{Config, namespace};

const UPSTREAM: &str = "198.51.100.53";

/// A host's namespace in which dnsmasq knows www.example.org.
struct Upstream {
    namespace: String,
    dnsmasq: Child,
}

impl Upstream {
    fn start(lab: &Lab) -> Self {
        let namespace = format!("{}host", lab.prefix);
        namespace::create_blocking(&namespace).unwrap();
        run("ip", ["-n", &namespace, "link", "set", "lo", "up"]);
        run("ip", ["-n", &namespace, "address", "add", &format!("{UPSTREAM}/32"), "dev", "lo"]);
        let long = format!("--txt-record=long.example.org,{}", vec!["x".repeat(200); 12].join(","));
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            &namespace,
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
        ]);
        command.args(["--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file=", "--user=root"]);
        command.args([
            &format!("--listen-address={UPSTREAM}"),
            "--address=/www.example.org/192.0.2.80",
            &long,
        ]);
        let dnsmasq = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let upstream = Self { namespace, dnsmasq };
        for _ in 0..100 {
            let arguments = ["netns", "exec", &upstream.namespace, "dig", "+short", "+time=1", "+tries=1"];
            let server = format!("@{UPSTREAM}");
            let output =
                Command::new("ip").args(arguments).args([&server, "www.example.org"]).output().unwrap();
            if output.stdout.starts_with(b"192.0.2.80") {
                return upstream;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("dnsmasq doesn't answer");
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.dnsmasq.kill();
        let _ = self.dnsmasq.wait();
    }
}

fn named(network: &mut NetworkSpec, names: &[(&str, &[&str])]) {
    network.dns_names = names
        .iter()
        .map(|(name, addresses)| DnsName {
            name: (*name).to_owned(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        })
        .collect();
}

/// What dig prints.
fn dig(client: &Client, arguments: &[&str]) -> String {
    let fixed = ["+time=2", "+tries=1"];
    let output = client.run("dig", fixed.into_iter().chain(arguments.iter().copied()));
    String::from_utf8(output.stdout).unwrap()
}

fn short(client: &Client, arguments: &[&str]) -> String {
    dig(client, &[&["+short"], arguments].concat()).trim().to_owned()
}

/// Runs with a resolv.conf of the client's own.
fn with_resolver(client: &Client, arguments: &[&str]) -> String {
    let file = client.directory.join(format!("{}.resolv.conf", client.namespace));
    fs::write(&file, "search openstacklocal\nnameserver 10.0.0.2\noptions timeout:2 attempts:1\n").unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", file.display());
    let head = ["-m", "sh", "-c", &script, "sh"];
    let output = client.run("unshare", head.into_iter().chain(arguments.iter().copied()));
    String::from_utf8(output.stdout).unwrap()
}

/// A converged network with a configured client at 10.0.0.10.
async fn lab_with(lab: &mut Lab, network: NetworkSpec) -> Client {
    let port = network.ports[0].clone();
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    client
}

async fn beside<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(f).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_find_each_other_by_name_with_clients_that_we_did_not_write() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox").or(harness::skip_without("dig")));
    let mut lab = Lab::new();
    let mut network = network();
    add_port(&mut network, 10);
    network.subnets[0].dns_nameservers.clear();
    named(&mut network, &[("vm-10", &["10.0.0.10"]), ("web", &["10.0.0.11", "fd00::11"])]);
    let client = lab_with(&mut lab, network).await;
    beside(move || {
        client.configure_by_dhcp();
        let lease = client.lease();
        assert_eq!(lease.get("dns").map(String::as_str), Some("10.0.0.2"), "{lease:?}");
        assert_eq!(lease.get("domain").map(String::as_str), Some("openstacklocal"), "{lease:?}");
        for server in ["@10.0.0.2", "@169.254.169.254", "@fe80::a9fe:a9fe%eth0"] {
            for transport in ["+notcp", "+tcp"] {
                let ask = |arguments: &[&str]| short(&client, &[&[server, transport], arguments].concat());
                assert_eq!(ask(&["web.openstacklocal"]), "10.0.0.11", "{server} {transport}");
                assert_eq!(ask(&["web.openstacklocal", "AAAA"]), "fd00::11", "{server} {transport}");
                assert_eq!(ask(&["-x", "10.0.0.11"]), "web.openstacklocal.", "{server} {transport}");
                assert_eq!(ask(&["-x", "fd00::11"]), "web.openstacklocal.", "{server} {transport}");
            }
        }
        let unknown = dig(&client, &["@10.0.0.2", "nobody.openstacklocal"]);
        assert!(unknown.contains("NXDOMAIN"), "{unknown}");
        let foreign = dig(&client, &["@10.0.0.2", "www.example.org"]);
        assert!(foreign.contains("REFUSED"), "{foreign}");
        // The C library, by search domain and reverse; busybox.
        assert!(with_resolver(&client, &["getent", "ahostsv4", "web"]).contains("10.0.0.11"));
        assert!(with_resolver(&client, &["getent", "hosts", "10.0.0.11"]).contains("web.openstacklocal"));
        let looked_up = with_resolver(&client, &["busybox", "nslookup", "web.openstacklocal"]);
        assert!(looked_up.contains("10.0.0.11") && looked_up.contains("fd00::11"), "{looked_up}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_names_are_asked_for_at_the_hosts_resolvers() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("dnsmasq").or(harness::skip_without("dig")));
    let names = Lab::new();
    let upstream = Upstream::start(&names);
    // The first resolver is dead.
    let mut lab = Lab::with(Config {
        prefix: format!("{}n-", names.prefix.trim_end_matches('-')),
        host_namespace: Some(upstream.namespace.clone()),
        dns_forwarders: vec!["198.51.100.54".parse().unwrap(), UPSTREAM.parse().unwrap()],
        ..Config::default()
    });
    let mut network = network();
    add_port(&mut network, 10);
    named(&mut network, &[("vm-10", &["10.0.0.10"])]);
    let client = lab_with(&mut lab, network).await;
    beside(move || {
        client.configure_statically(Ipv4Addr::new(10, 0, 0, 10));
        let patient = ["@10.0.0.2", "+time=8"];
        assert_eq!(short(&client, &[&patient[..], &["www.example.org"]].concat()), "192.0.2.80");
        assert_eq!(short(&client, &[&patient[..], &["+noedns", "www.example.org"]].concat()), "192.0.2.80");
        assert_eq!(short(&client, &["@10.0.0.2", "vm-10.openstacklocal"]), "10.0.0.10");
        // Too long for a datagram: dig asks again by TCP.
        let long = dig(&client, &[&patient[..], &["long.example.org", "TXT"]].concat());
        assert!(long.contains("Truncated, retrying in TCP mode") && long.contains("xxxx"), "{long}");
        assert!(dig(&client, &[&patient[..], &["nothing.example.org"]].concat()).contains("REFUSED"));
        namespace::in_namespace(&client.namespace, flood).unwrap();
        assert_eq!(short(&client, &["@10.0.0.2", "vm-10"]), "10.0.0.10", "after a flood");
    })
    .await;
    drop(upstream);
}

/// Garbage, and more questions for other resolvers than may wait.
fn flood() {
    let socket = UdpSocket::bind("10.0.0.10:0").unwrap();
    let question = b"\x03www\x07example\x03org\x00\x00\x01\x00\x01";
    for i in 0..3000u32 {
        let mut packet = vec![0u8; 12];
        packet[..2].copy_from_slice(&(i as u16).to_be_bytes());
        packet[2] = 1;
        packet[5] = 1;
        packet.extend_from_slice(question);
        if i % 3 == 0 {
            let at = i as usize % packet.len();
            packet[at] ^= i as u8;
        }
        let _ = socket.send_to(&packet, "10.0.0.2:53");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_physical_network_nobody_but_the_hosts_ports_is_answered() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("dig"));
    let mut cloud = Cloud::new(1);
    let mut public = network();
    public.subnets[0].cidr = "203.0.113.0/24".parse().unwrap();
    public.subnets[0].service_ip = Ipv4Addr::new(203, 0, 113, 2);
    public.subnets[0].gateway_ip = Some(Ipv4Addr::new(203, 0, 113, 1));
    public.segment = Some(SegmentSpec::Flat { physical_network: "public".to_owned() });
    let mut port = add_port(&mut public, 10);
    port.fixed_ips[0].ip_address = Ipv4Addr::new(203, 0, 113, 10);
    public.ports[0] = port.clone();
    named(&mut public, &[("web", &["203.0.113.10"])]);
    cloud.place(&[(public.clone(), vec![0])]);
    cloud.converge().await;
    let client = cloud.plug_in(0, &public, &port);
    cloud.converge().await;
    let world = Client { namespace: cloud.world.clone(), directory: client.directory.clone() };
    beside(move || {
        assert_eq!(short(&client, &["@203.0.113.2", "web"]), "203.0.113.10");
        for transport in ["+notcp", "+tcp"] {
            let answer = dig(&world, &["@203.0.113.2", transport, "web"]);
            assert!(!answer.contains("203.0.113.10"), "{answer}");
        }
    })
    .await;
}
