//! The whole of it at once: two tenants with the same addresses over three hosts, routers, floating IPs, groups, IPv4 and
//! IPv6. A table says who reaches whom by which protocol; ping and nc check every cell of it before and after each change.
//! iperf3 shows that the paths carry more than a packet.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::BTreeSet,
    fmt::Write,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use harness::{Client, add_port, cloud::Cloud, network, probe, run};
use mote_host_api::{
    AddressSetId, AddressSetSpec, Direction, EtherType, FixedIpV6, FloatingIpId, FloatingIpSpec,
    GatewayPlace, NetworkSpec, PortId, Protocol, Remote, RouterGateway, RouterId, RouterInterface,
    RouterSpec, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec, SegmentSpec, SubnetId,
};

const TENANTS: [&str; 2] = ["red", "blue"];

/// One tenant: networks a (10.0.1.0/24, fd00:1::/64) and b, a router, and groups `web` (TCP 80 and echo from anywhere)
/// and `inner` (anything from its own members).
struct Tenant {
    networks: Vec<(NetworkSpec, Vec<usize>)>,
    router: RouterSpec,
    gateway_host: usize,
    groups: Vec<SecurityGroupSpec>,
    members: AddressSetSpec,
}

fn rules(direction: Direction, protocol: Protocol, remote: Option<Remote>) -> [SecurityGroupRule; 2] {
    [EtherType::Ipv4, EtherType::Ipv6].map(|ethertype| SecurityGroupRule {
        direction,
        ethertype,
        protocol,
        remote,
    })
}

fn group(inwards: &[(Protocol, Option<Remote>)]) -> SecurityGroupSpec {
    let inwards = inwards.iter().flat_map(|(protocol, remote)| rules(Direction::Ingress, *protocol, *remote));
    let out = rules(Direction::Egress, Protocol::Any, None);
    SecurityGroupSpec { id: SecurityGroupId::new(), stateful: true, rules: inwards.chain(out).collect() }
}

fn web() -> Vec<(Protocol, Option<Remote>)> {
    vec![
        (Protocol::Tcp { ports: Some((80, 80)) }, None),
        (Protocol::Icmp { icmp_type: Some(8), code: None }, None),
        (Protocol::Icmp { icmp_type: Some(128), code: None }, None),
    ]
}

impl Tenant {
    fn new(number: u8, public: &NetworkSpec) -> Self {
        let set = AddressSetId::new();
        let groups = vec![group(&web()), group(&[(Protocol::Any, Some(Remote::Set(set)))])];
        // a: web on host 0, inner on host 1; b: inner on host 2.
        let members = [&[(0, 0), (1, 1)][..], &[(1, 2)]];
        let networks = members.iter().zip(1..).map(|(ports, third)| {
            let mut network = overlay(number, third);
            for ((group, _), host) in ports.iter().zip(10..) {
                add_port(&mut network, host);
                let port = network.ports.last_mut().unwrap();
                port.mac_address = format!("fa:16:3e:{number:02x}:{third:02x}:{host:02x}");
                port.fixed_ips[0].ip_address = [10, 0, third, host].into();
                let ip_address = format!("fd00:{third}::{host}").parse().unwrap();
                port.fixed_ips_v6 = vec![FixedIpV6 { subnet_id: SubnetId::new(), ip_address }];
                port.port_security = true;
                port.security_groups = vec![groups[*group as usize].id];
            }
            (network, ports.iter().map(|(_, host)| *host).collect::<Vec<usize>>())
        });
        let networks: Vec<_> = networks.collect();
        let interfaces = networks.iter().zip(1u8..).map(|((network, _), third)| RouterInterface {
            port_id: PortId::new(),
            network_id: network.id,
            mac_address: format!("fa:16:3e:{number:02x}:{third:02x}:01"),
            addresses: vec![
                format!("10.0.{third}.1/24").parse().unwrap(),
                format!("fd00:{third}::1/64").parse().unwrap(),
            ],
        });
        let router = RouterSpec {
            id: RouterId::new(),
            admin_state_up: true,
            interfaces: interfaces.collect(),
            gateway: Some(RouterGateway {
                place: GatewayPlace::Here,
                port_id: PortId::new(),
                network_id: public.id,
                mac_address: format!("fa:16:3e:{number:02x}:ff:01"),
                addresses: vec![format!("203.0.113.{}/24", 10 * number).parse().unwrap()],
                next_hop: Some([203, 0, 113, 1].into()),
                next_hop_v6: None,
                enable_snat: true,
                floating_ips: vec![FloatingIpSpec {
                    id: FloatingIpId::new(),
                    floating_ip_address: [203, 0, 113, 10 * number + 5].into(),
                    fixed_ip_address: Some([10, 0, 1, 10].into()),
                    port_forwardings: vec![],
                    qos: None,
                }],
            }),
            routes: vec![],
            routes_v6: vec![],
            extra_gateways: Vec::new(),
            default_route_ecmp: false,
        };
        let members = ["10.0.1.11/32", "10.0.2.10/32", "fd00:1::11/128", "fd00:2::10/128"];
        let addresses: BTreeSet<_> = members.iter().map(|range| range.parse().unwrap()).collect();
        let gateway_host = usize::from(number) % 3;
        Self { networks, router, gateway_host, groups, members: AddressSetSpec { id: set, addresses } }
    }
}

fn overlay(number: u8, third: u8) -> NetworkSpec {
    let mut network = network();
    network.mtu = 1450;
    network.segment = Some(SegmentSpec::Vxlan { vni: 100 * u32::from(number) + u32::from(third) });
    network.subnets[0].cidr = format!("10.0.{third}.0/24").parse().unwrap();
    network.subnets[0].service_ip = [10, 0, third, 2].into();
    network
}

struct Ground {
    cloud: Cloud,
    tenants: Vec<Tenant>,
    public: NetworkSpec,
    /// Per tenant: web, inner in a, inner in b.
    clients: Vec<Vec<Client>>,
    servers: Vec<Child>,
}

impl Drop for Ground {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

impl Ground {
    async fn new(tenants: impl FnOnce(&NetworkSpec) -> Vec<Tenant>) -> Self {
        let mut public = network();
        public.mtu = 1500;
        public.segment = Some(SegmentSpec::Flat { physical_network: "public".to_owned() });
        public.subnets[0].cidr = "203.0.113.0/24".parse().unwrap();
        public.subnets[0].service_ip = [203, 0, 113, 2].into();
        let tenants = tenants(&public);
        let mut ground =
            Self { cloud: Cloud::new(3), tenants, public, clients: Vec::new(), servers: Vec::new() };
        ground.converge().await;
        for tenant in &ground.tenants {
            let mut clients = Vec::new();
            for (network, places) in &tenant.networks {
                for (port, host) in network.ports.iter().zip(places) {
                    let client = ground.cloud.plug_in(*host, network, port);
                    let third = port.fixed_ips[0].ip_address.octets()[2];
                    let (v4, v6) = (format!("10.0.{third}.1"), format!("fd00:{third}::1"));
                    run("ip", ["-n", &client.namespace, "route", "add", "default", "via", &v4]);
                    run("ip", ["-n", &client.namespace, "-6", "route", "add", "default", "via", &v6]);
                    clients.push(client);
                }
            }
            ground.clients.push(clients);
        }
        ground.converge().await;
        ground
    }

    /// nc, on every port and every host.
    fn serve_everywhere(&mut self) {
        let names: Vec<String> =
            self.clients.iter().flatten().map(|client| client.namespace.clone()).collect();
        let hosts = self.cloud.hosts.iter().map(|host| host.namespace.clone());
        for name in names.into_iter().chain(hosts.collect::<Vec<_>>()) {
            for (version, port) in [("-4", "80"), ("-4", "81"), ("-6", "80"), ("-6", "81")] {
                self.servers.push(serve(&name, port, &["nc", version, "-lk", port]));
            }
        }
    }

    async fn converge(&mut self) {
        let networks: Vec<_> = self.tenants.iter().flat_map(|tenant| tenant.networks.clone()).collect();
        self.cloud.place(&networks);
        let tunnels: Vec<_> = self.cloud.hosts.iter().map(|host| host.tunnel_ip).collect();
        for (number, host) in self.cloud.hosts.iter_mut().enumerate() {
            let desired = &mut host.desired;
            desired.routers.clear();
            desired.security_groups = self.tenants.iter().flat_map(|tenant| tenant.groups.clone()).collect();
            desired.address_sets = self.tenants.iter().map(|tenant| tenant.members.clone()).collect();
            for tenant in &self.tenants {
                let mut router = tenant.router.clone();
                let here = tenant.gateway_host == number;
                if let Some(gateway) = &mut router.gateway {
                    let elsewhere = GatewayPlace::Remote(tunnels[tenant.gateway_host]);
                    gateway.place = if here { GatewayPlace::Here } else { elsewhere };
                }
                if here && !desired.networks.iter().any(|network| network.id == self.public.id) {
                    desired.networks.push(self.public.clone());
                }
                desired.routers.push(router);
            }
        }
        self.cloud.converge().await;
    }

    /// Everything that can be tried, each with what came of it.
    fn table(&self) -> BTreeSet<String> {
        let mut reached = BTreeSet::new();
        let inner = [
            ("web", "10.0.1.10", "fd00:1::10"),
            ("a", "10.0.1.11", "fd00:1::11"),
            ("b", "10.0.2.10", "fd00:2::10"),
        ];
        std::thread::scope(|scope| {
            let mut trials = Vec::new();
            for (tenant, clients) in TENANTS.iter().zip(&self.clients) {
                for (client, (from, ..)) in clients.iter().zip(&inner) {
                    let mut targets: Vec<(String, &str)> = Vec::new();
                    for (to, v4, v6) in inner.iter().filter(|(to, ..)| to != from) {
                        targets.extend([((*to).to_owned(), *v4), (format!("{to}/6"), *v6)]);
                    }
                    targets.extend([
                        ("world".to_owned(), "198.51.100.1"),
                        // The hosts' own addresses, where the controller might be.
                        ("underlay".to_owned(), "192.0.2.10"),
                        ("other-host".to_owned(), "192.0.2.12"),
                        ("red-floating".to_owned(), "203.0.113.15"),
                        ("blue-floating".to_owned(), "203.0.113.25"),
                    ]);
                    for (to, ip) in targets {
                        let name = format!("{tenant}.{from} {to}");
                        trials.push(scope.spawn(move || (name, reaches(&client.namespace, ip))));
                    }
                }
            }
            for ip in ["203.0.113.15", "203.0.113.25", "10.0.1.10"] {
                let world = &self.cloud.world;
                trials.push(scope.spawn(move || (format!("world {ip}"), reaches(world, ip))));
            }
            for trial in trials {
                let (name, protocols) = trial.join().unwrap();
                reached.insert(format!("{name}: {protocols}"));
            }
        });
        reached
    }
}

/// A server that listens on a port; its version of IP is its second argument.
fn serve(namespace: &str, port: &str, arguments: &[&str]) -> Child {
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", namespace]).args(arguments);
    let server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let version = arguments[1];
    let listens = || {
        let sockets = run("ip", ["netns", "exec", namespace, "ss", version, "-Hltn", "sport", "=", port]);
        !sockets.trim().is_empty()
    };
    let end = Instant::now() + probe::PATIENCE;
    while !listens() {
        assert!(Instant::now() < end, "{arguments:?} doesn't listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    server
}

/// Port that iperf3's server listens on, and one that groups open for its control connection (TCP) but not for UDP.
const IPERF: u16 = 5201;
const IPERF_TCP_ONLY: u16 = 5202;
/// What one transfer carries.
const TRANSFER: u64 = 512 * 1024;
/// What of it must be counted: a machine that is busy loses some datagrams.
const LEAST: u64 = TRANSFER / 4;

/// Bytes that iperf3's server got from its client; none if they could not even begin.
fn carried(from: &str, to: &str, ip: &str, port: u16, udp: bool, expected: bool) -> Option<u64> {
    let (port, bytes) = (port.to_string(), TRANSFER.to_string());
    let version = if ip.contains(':') { "-6" } else { "-4" };
    // One that serves one client, so that none finds it busy with another that it has given up.
    let mut server = serve(to, &port, &["iperf3", version, "-s", "-1", "-p", &port]);
    let seconds = if expected { "20" } else { "2" };
    let mut client = std::process::Command::new("ip");
    client.args([
        "netns", "exec", from, "timeout", seconds, "iperf3", "-J", "-c", ip, "-p", &port, "-n", &bytes,
    ]);
    if udp {
        // Whole datagrams, slowly enough for a machine with much else to do.
        client.args(["-u", "-b", "20M", "-l", "1200"]);
    } else {
        // Of what is sent, the server counts all but what is in buffers at the end.
        client.args(["-w", "64K"]);
    }
    let output = client.output().unwrap();
    let _ = server.kill();
    let _ = server.wait();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let end = &report["end"];
    if udp {
        let count = |name: &str| end["sum"][name].as_u64();
        return Some(1200 * (count("packets")? - count("lost_packets")?));
    }
    end["sum_received"]["bytes"].as_u64()
}

/// The protocols by which an address is reached.
fn reaches(from: &str, ip: &str) -> String {
    let mut text = String::new();
    let inside = |arguments: &[&str]| {
        let output = std::process::Command::new("ip").args(["netns", "exec", from]).args(arguments).output();
        output.unwrap().status.success()
    };
    if inside(&["ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", ip]) {
        text.push_str("ping ");
    }
    for port in ["80", "81"] {
        // Time for one more SYN: nc takes one connection at a time.
        if inside(&["nc", "-z", "-w", "2", ip, port]) {
            write!(text, "{port} ").unwrap();
        }
    }
    text.trim_end().to_owned()
}

/// What is expected of both tenants alike, by the rows of one.
fn of_both(rows: &[(&str, &str)]) -> BTreeSet<String> {
    TENANTS.iter().flat_map(|tenant| rows.iter().map(move |row| of(tenant, row))).collect()
}

fn of(tenant: &str, (name, protocols): &(&str, &str)) -> String {
    format!("{tenant}.{name}: {protocols}")
}

fn check(what: &str, found: &BTreeSet<String>, expected: &BTreeSet<String>) {
    let (only_found, missing): (Vec<_>, Vec<_>) =
        (found.difference(expected).collect(), expected.difference(found).collect());
    assert!(
        only_found.is_empty() && missing.is_empty(),
        "{what}: found {only_found:#?}\nexpected {missing:#?}"
    );
}

fn replace(table: &mut BTreeSet<String>, rows: &[(&str, &str)]) {
    for (name, protocols) in rows {
        let there = table.len();
        table.retain(|row| row.split_once(": ").is_none_or(|(own, _)| own != *name));
        assert_eq!(table.len() + 1, there, "{name}");
        table.insert(format!("{name}: {protocols}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reaches_whom_is_the_table_before_and_after_each_change() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    skip_if!(harness::skip_without("ping").or(harness::skip_without("nc")).or(harness::skip_without("ss")));
    let mut ground = Ground::new(|public| vec![Tenant::new(1, public), Tenant::new(2, public)]).await;
    ground.serve_everywhere();
    // Web is open for echo and TCP 80; the two inner ones reach each other by everything, and nobody else reaches them.
    let mut expected = of_both(&[
        ("web a", ""),
        ("web a/6", ""),
        ("web b", ""),
        ("web b/6", ""),
        ("a web", "ping 80"),
        ("a web/6", "ping 80"),
        ("a b", "ping 80 81"),
        ("a b/6", "ping 80 81"),
        ("b web", "ping 80"),
        ("b web/6", "ping 80"),
        ("b a", "ping 80 81"),
        ("b a/6", "ping 80 81"),
        ("web underlay", ""),
        ("a underlay", ""),
        ("b underlay", ""),
        ("web other-host", ""),
        ("a other-host", ""),
        ("b other-host", ""),
        ("web world", "ping"),
        ("a world", "ping"),
        ("b world", "ping"),
        ("web red-floating", "ping 80"),
        ("a red-floating", "ping 80"),
        ("b red-floating", "ping 80"),
        ("web blue-floating", "ping 80"),
        ("a blue-floating", "ping 80"),
        ("b blue-floating", "ping 80"),
    ]);
    expected.extend(
        ["203.0.113.15: ping 80", "203.0.113.25: ping 80", "10.0.1.10: "].map(|row| format!("world {row}")),
    );
    check("at first", &ground.table(), &expected);

    // A rule goes: red's web is no longer open for TCP; blue's is.
    let id = ground.tenants[0].groups[0].id;
    ground.tenants[0].groups[0] = SecurityGroupSpec { id, ..group(&web()[1..]) };
    ground.converge().await;
    let to_red_web = ["red.a web", "red.a web/6", "red.b web", "red.b web/6", "world 203.0.113.15"];
    let through = TENANTS
        .iter()
        .flat_map(|tenant| ["web", "a", "b"].map(|from| format!("{tenant}.{from} red-floating")));
    let through: Vec<String> = through.collect();
    let rows =
        to_red_web.iter().copied().chain(through.iter().map(String::as_str)).map(|name| (name, "ping"));
    replace(&mut expected, &rows.collect::<Vec<_>>());
    check("without the rule", &ground.table(), &expected);

    // A floating IP moves to a port that nobody outside of its group reaches.
    ground.tenants[1].router.gateway.as_mut().unwrap().floating_ips[0].fixed_ip_address =
        Some([10, 0, 2, 10].into());
    ground.converge().await;
    let to_blue: Vec<String> = TENANTS
        .iter()
        .flat_map(|tenant| ["web", "a", "b"].map(|from| format!("{tenant}.{from} blue-floating")))
        .chain(["world 203.0.113.25".to_owned()])
        .collect();
    replace(&mut expected, &to_blue.iter().map(|name| (name.as_str(), "")).collect::<Vec<_>>());
    check("with the floating IP at another port", &ground.table(), &expected);

    // A member leaves: what it was allowed as one ends.
    let gone = ["10.0.2.10/32", "fd00:2::10/128"].map(|range| range.parse().unwrap());
    ground.tenants[0].members.addresses.retain(|range| !gone.contains(range));
    ground.converge().await;
    replace(&mut expected, &[("red.b a", ""), ("red.b a/6", "")]);
    check("without the member", &ground.table(), &expected);

    // The router loses its interface in b.
    ground.tenants[1].router.interfaces.pop();
    ground.converge().await;
    let cut = ["a b", "a b/6", "b a", "b a/6", "b web", "b web/6", "b world", "b red-floating"];
    let cut: Vec<String> = cut.iter().map(|name| format!("blue.{name}")).collect();
    replace(&mut expected, &cut.iter().map(|name| (name.as_str(), "")).collect::<Vec<_>>());
    check("without the interface", &ground.table(), &expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn iperf3_carries_data_wherever_the_groups_allow_it_and_nowhere_else() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ss")));
    skip_if!(harness::skip_without("iperf3").or(harness::skip_without("timeout")));
    let mut open = web();
    open.extend([IPERF, IPERF_TCP_ONLY].map(|port| (Protocol::Tcp { ports: Some((port, port)) }, None)));
    open.push((Protocol::Udp { ports: Some((IPERF, IPERF)) }, None));
    let ground = Ground::new(|public| {
        let mut tenant = Tenant::new(1, public);
        let id = tenant.groups[0].id;
        tenant.groups[0] = SecurityGroupSpec { id, ..group(&open) };
        // Beside web, on its host.
        let (network, places) = &mut tenant.networks[0];
        let mut port = network.ports[1].clone();
        port.id = PortId::new();
        port.mac_address = "fa:16:3e:01:01:0c".to_owned();
        port.fixed_ips[0].ip_address = [10, 0, 1, 12].into();
        port.fixed_ips_v6[0].ip_address = "fd00:1::12".parse().unwrap();
        network.ports.push(port);
        places.push(0);
        vec![tenant]
    });
    let ground = ground.await;
    let [web, inner, beside, routed] = &ground.clients[0][..] else { panic!() };
    let (world, web_ips) = (ground.cloud.world.as_str(), ["10.0.1.10", "fd00:1::10"]);
    let paths: [(&str, &str, &[&str]); 4] = [
        ("one host", &beside.namespace, &web_ips),
        ("two hosts", &inner.namespace, &web_ips),
        ("two hosts and a router", &routed.namespace, &web_ips),
        ("a floating IP", world, &["203.0.113.15"]),
    ];
    for (what, from, ips) in paths {
        for (ip, udp) in ips.iter().flat_map(|ip| [(ip, false), (ip, true)]) {
            let bytes = carried(from, &web.namespace, ip, IPERF, udp, true).unwrap_or_default();
            assert!(bytes >= LEAST, "{what}, {ip}, UDP {udp}: {bytes} of {TRANSFER}");
        }
        for ip in ips {
            let bytes = carried(from, &web.namespace, ip, IPERF_TCP_ONLY, true, false);
            assert_eq!(bytes.unwrap_or_default(), 0, "{what}, {ip}: UDP of a port that is open for TCP only");
        }
    }
    // Nobody outside of its group reaches the other one, on the same host or another.
    let closed = [(beside, ["10.0.1.12", "fd00:1::12"]), (inner, ["10.0.1.11", "fd00:1::11"])];
    for (to, ips) in closed {
        for (ip, udp) in ips.iter().flat_map(|ip| [(ip, false), (ip, true)]) {
            let bytes = carried(&web.namespace, &to.namespace, ip, IPERF, udp, false);
            assert_eq!(bytes.unwrap_or_default(), 0, "web to {ip}, UDP {udp}");
        }
    }
}
