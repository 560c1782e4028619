//! Security groups and anti-spoofing, packet by packet.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use harness::{
    Client, Lab, add_port, network,
    probe::{self, Wire, arp, ethernet, ipv4, ipv6, udp4},
    run,
};
use mote_host_api::{
    AddressPair, AddressSetId, AddressSetSpec, BandwidthLimit, Direction, EtherType, FixedIpV6, NetworkSpec,
    PortSpec, Protocol, QosSpec, Remote, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec, SubnetId,
};
use mote_network::{Desired, names::tap_name, namespace::in_namespace};

fn rule(
    direction: Direction,
    ethertype: EtherType,
    protocol: Protocol,
    remote: Option<Remote>,
) -> SecurityGroupRule {
    SecurityGroupRule { direction, ethertype, protocol, remote }
}

fn tcp(port: u16) -> Protocol {
    Protocol::Tcp { ports: Some((port, port)) }
}

fn both(direction: Direction, protocol: Protocol, remote: Option<Remote>) -> [SecurityGroupRule; 2] {
    [EtherType::Ipv4, EtherType::Ipv6].map(|version| rule(direction, version, protocol, remote))
}

/// A group that lets everything out and, in, what its arguments say.
fn group(ingress: &[(Protocol, Option<Remote>)]) -> SecurityGroupSpec {
    let mut rules = both(Direction::Egress, Protocol::Any, None).to_vec();
    rules.extend(ingress.iter().flat_map(|(protocol, remote)| both(Direction::Ingress, *protocol, *remote)));
    SecurityGroupSpec { id: SecurityGroupId::new(), stateful: true, rules }
}

/// A network with filtered ports at .10, .11, …: one for each list of groups.
struct Ground {
    lab: Lab,
    desired: Desired,
    clients: Vec<Client>,
}

fn v4(host: usize) -> IpAddr {
    IpAddr::from([10, 0, 0, 10 + host as u8])
}

fn v6(host: usize) -> IpAddr {
    format!("fd00::{}", 10 + host).parse().unwrap()
}

fn filtered_port(network: &mut NetworkSpec, host: usize, groups: &[SecurityGroupId]) -> PortSpec {
    add_port(network, 10 + host as u8);
    let port = network.ports.last_mut().unwrap();
    port.port_security = true;
    port.security_groups = groups.to_vec();
    let IpAddr::V6(ip_address) = v6(host) else { unreachable!() };
    port.fixed_ips_v6 = vec![FixedIpV6 { subnet_id: SubnetId::new(), ip_address }];
    port.clone()
}

impl Ground {
    async fn new(
        groups: Vec<SecurityGroupSpec>,
        address_sets: Vec<AddressSetSpec>,
        ports: &[&[SecurityGroupId]],
    ) -> Self {
        let mut lab = Lab::new();
        let mut network = network();
        let specs: Vec<_> =
            ports.iter().enumerate().map(|(i, groups)| filtered_port(&mut network, i, groups)).collect();
        let id = network.id;
        let desired =
            Desired { networks: vec![network], security_groups: groups, address_sets, ..Desired::default() };
        lab.converge_all(&desired, &HashMap::new()).await;
        let mut clients = Vec::new();
        for (host, spec) in specs.iter().enumerate() {
            let client = lab.plug_in(id, spec);
            client.configure_statically(match v4(host) {
                IpAddr::V4(ip) => ip,
                IpAddr::V6(_) => unreachable!(),
            });
            let address = format!("{}/64", v6(host));
            run("ip", ["-n", &client.namespace, "address", "add", &address, "dev", "eth0", "nodad"]);
            run("ip", ["-n", &client.namespace, "link", "set", "eth0", "mtu", "1442"]);
            clients.push(client);
        }
        let mut ground = Self { lab, desired, clients };
        ground.converge().await;
        ground
    }

    async fn converge(&mut self) -> usize {
        let executed = self.lab.converge_all(&self.desired, &HashMap::new()).await.executed;
        let again = self.lab.converge_all(&self.desired, &HashMap::new()).await.executed;
        assert_eq!(again, 0, "a second pass has nothing to do");
        executed
    }

    fn ns(&self, host: usize) -> &str {
        &self.clients[host].namespace
    }

    fn namespace(&self) -> String {
        self.lab.executor.namespace(self.desired.networks[0].id)
    }

    /// IPv4 and IPv6 packets that the kernel has dropped for want of their other fragments.
    fn never_whole(&self) -> [u64; 2] {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
        let (v4, v6) = in_namespace(&self.namespace(), || (read("snmp"), read("snmp6"))).unwrap();
        let mut lines = v4.lines().filter_map(|line| line.strip_prefix("Ip: ")).map(str::split_whitespace);
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let (_, v4) = names.zip(values).find(|(name, _)| *name == "ReasmFails").unwrap();
        let v6 = v6.lines().find_map(|line| line.strip_prefix("Ip6ReasmFails")).unwrap();
        [v4, v6].map(|count| count.trim().parse().unwrap())
    }

    /// Packets that a port's counters of that name have counted.
    fn counted(&self, family: &str, counter: &str, host: usize) -> u64 {
        let name = format!("{counter}-{}", tap_name(self.desired.networks[0].ports[host].id));
        let text = run(
            "ip",
            ["netns", "exec", &self.namespace(), "nft", "-j", "list", "counter", family, "mote", &name],
        );
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["nftables"][1]["counter"]["packets"].as_u64().unwrap()
    }
}

fn set_of(hosts: &[usize]) -> BTreeSet<ipnet::IpNet> {
    hosts.iter().flat_map(|host| [v4(*host), v6(*host)]).map(mote_host_api::host_net).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reaches_whom_is_what_the_groups_say() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    // Members reach each other; web lets in TCP 80, echo requests and UDP 500-600 from one range.
    let set = AddressSetId::new();
    let members = AddressSetSpec { id: set, addresses: set_of(&[0, 1]) };
    let inner = group(&[(Protocol::Any, Some(Remote::Set(set)))]);
    let ranges = Some(Remote::Cidr("10.0.0.10/32".parse().unwrap()));
    let mut web = group(&[(tcp(80), None), (Protocol::Icmp { icmp_type: None, code: None }, None)]);
    web.rules.push(rule(
        Direction::Ingress,
        EtherType::Ipv4,
        Protocol::Udp { ports: Some((500, 600)) },
        ranges,
    ));
    let (inner_id, web_id) = (inner.id, web.id);
    let ground =
        Ground::new(vec![inner, web], vec![members], &[&[inner_id], &[inner_id], &[web_id], &[]]).await;

    // Rows: sender; columns: receiver. Port 3 has no group: nothing in, nothing out.
    let yes_no = |table: [[u8; 4]; 4], what: &str, probe: &dyn Fn(usize, usize, bool) -> bool| {
        for (from, row) in table.iter().enumerate() {
            for (to, expected) in row.iter().enumerate().filter(|(to, _)| *to != from) {
                let expected = *expected == 1;
                assert_eq!(probe(from, to, expected), expected, "{what} from {from} to {to}");
            }
        }
    };
    let pings = [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]];
    yes_no(pings, "ping", &|from, to, expected| probe::ping(ground.ns(from), v4(to), expected));
    yes_no(pings, "ping IPv6", &|from, to, expected| probe::ping(ground.ns(from), v6(to), expected));
    let connect = |from: usize, to: usize, ip: IpAddr, port: u16, expected| {
        probe::tcp(ground.ns(from), ground.ns(to), SocketAddr::new(ip, port), expected)
    };
    yes_no(pings, "TCP 80", &|from, to, expected| connect(from, to, v4(to), 80, expected));
    yes_no(pings, "TCP 80 IPv6", &|from, to, expected| connect(from, to, v6(to), 80, expected));
    let other = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]];
    yes_no(other, "TCP 81", &|from, to, expected| connect(from, to, v4(to), 81, expected));
    yes_no(other, "TCP 81 IPv6", &|from, to, expected| connect(from, to, v6(to), 81, expected));
    let datagram = |from: usize, to: usize, port: u16, expected| {
        probe::udp(ground.ns(from), ground.ns(to), SocketAddr::new(v4(to), port), true, expected)
    };
    let ranges = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]];
    yes_no(ranges, "UDP 600", &|from, to, expected| datagram(from, to, 600, expected));
    yes_no(other, "UDP 601", &|from, to, expected| datagram(from, to, 601, expected));
    assert!(ground.counted("inet", "denied", 2) > 0, "denied packets are counted");
    // Fragments are put together before they are judged: a ping of three packets.
    let big = |ip: IpAddr, expected: bool| {
        let (ip, wait) = (ip.to_string(), if expected { "5" } else { "0.5" });
        let arguments = ["-n", "-q", "-c", "1", "-W", wait, "-s", "4000", &ip];
        ground.clients[0].run("ping", arguments).status.success()
    };
    for (host, expected) in [(1, true), (2, true), (3, false)] {
        let before = ground.counted("bridge", "fragments", 0);
        assert_eq!(big(v4(host), expected), expected, "{host}");
        assert_eq!(big(v6(host), expected), expected, "{host} by IPv6");
        // Of each request the packets after the first.
        assert_eq!(ground.counted("bridge", "fragments", 0) - before, 4, "{host}");
    }
    assert_eq!(ground.never_whole(), [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_survive_a_change_that_allows_them_and_are_cut_by_one_that_does_not() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let server = group(&[(tcp(80), None), (tcp(81), None)]);
    let client = group(&[]);
    let ids = (client.id, server.id);
    let mut ground = Ground::new(vec![client, server], vec![], &[&[ids.0], &[ids.1]]).await;
    let open = |port, ip| probe::connection(ground.ns(0), ground.ns(1), SocketAddr::new(ip, port));
    let mut kept = [open(80, v4(1)), open(80, v6(1))];
    let mut lost = [open(81, v4(1)), open(81, v6(1))];
    let mut silent = open(81, v4(1));
    ground.desired.security_groups[1] = SecurityGroupSpec { id: ids.1, ..group(&[(tcp(80), None)]) };
    assert_eq!(ground.converge().await, 1, "one transaction");
    for (client, server) in &mut kept {
        assert!(probe::carries(client, server, true) && probe::carries(server, client, true));
    }
    for (client, server) in &mut lost {
        assert!(!probe::carries(client, server, false) && !probe::carries(server, client, false));
    }
    // Also when it is the answering side that speaks first after the change.
    assert!(!probe::carries(&mut silent.1, &mut silent.0, false));
    assert!(!probe::tcp(ground.ns(0), ground.ns(1), SocketAddr::new(v4(1), 81), false));
    // And back: what was cut but is still open at both ends goes on.
    ground.desired.security_groups[1] =
        SecurityGroupSpec { id: ids.1, ..group(&[(tcp(80), None), (tcp(81), None)]) };
    ground.converge().await;
    assert!(probe::tcp(ground.ns(0), ground.ns(1), SocketAddr::new(v4(1), 81), true));
    let (client, server) = &mut kept[0];
    assert!(probe::carries(client, server, true) && probe::carries(server, client, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stateless_group_lets_through_what_its_rules_say_in_each_direction() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let mut one_way = group(&[]);
    one_way.stateful = false;
    let open = group(&[(Protocol::Any, None)]);
    let (one_way_id, open_id) = (one_way.id, open.id);
    let mut ground = Ground::new(vec![one_way, open], vec![], &[&[one_way_id], &[open_id]]).await;
    let address = SocketAddr::new(v4(1), 700);
    assert!(probe::udp(ground.ns(0), ground.ns(1), address, false, true), "out");
    assert!(!probe::udp(ground.ns(0), ground.ns(1), address, true, false), "no answer in");
    let answers = both(Direction::Ingress, Protocol::Udp { ports: None }, None);
    ground.desired.security_groups[0].rules.extend(answers);
    ground.converge().await;
    assert!(probe::udp(ground.ns(0), ground.ns(1), address, true, true));
}

/// An IPv4 packet made one that begins at 64 bytes of another.
fn later_fragment(mut packet: Vec<u8>) -> Vec<u8> {
    packet[7] = 8;
    packet[10..12].fill(0);
    let sum: u32 = packet[..20].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_hostile_port_forges_is_dropped_and_counted() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let mut ground = Ground::new(vec![open], vec![], &[&[id], &[id], &[id]]).await;
    let pair = AddressPair { mac_address: None, ip_address: "10.0.0.192/28".parse().unwrap() };
    ground.desired.networks[0].ports[0].allowed_address_pairs.push(pair);
    ground.converge().await;
    let mac = |host: u8| [0xfa, 0x16, 0x3e, 0, 0, 10 + host];
    let lla = |host: u8| [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 10 + host];
    let global = |host: usize| match v6(host) {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(_) => unreachable!(),
    };
    let ip = |host: u8| [10, 0, 0, host];
    let (attacker, victim) = (Wire::open(ground.ns(0), "eth0"), Wire::open(ground.ns(1), "eth0"));
    let (me, them) = (mac(0), mac(1));
    let udp = |from: u8, ports, mark: &[u8]| ipv4(ip(from), ip(11), 17, &udp4(ports, mark));
    let advertise = |source, target: [u8; 16], mark: &[u8]| {
        let body = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target, &[2, 1], &me, mark, &[0; 4]].concat();
        ipv6(source, lla(1), 58, &body)
    };
    let icmp6 =
        |kind: u8, mark: &[u8]| ipv6(lla(0), lla(1), 58, &[&[kind, 0, 0, 0][..], mark, &[0; 24]].concat());
    let udp6 = |from, ports: (u16, u16), mark: &[u8]| {
        let length = (8 + mark.len() as u16).to_be_bytes();
        let datagram = [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &length, &[0, 0], mark].concat();
        ipv6(from, global(1), 17, &datagram)
    };
    type Forge<'a> = (&'a str, bool, Box<dyn Fn(&[u8]) -> Vec<u8> + 'a>);
    let cases: Vec<Forge<'_>> = vec![
        ("an honest datagram", true, Box::new(|m| ethernet(them, me, 0x800, &udp(10, (9, 9), m)))),
        ("a paired address", true, Box::new(|m| ethernet(them, me, 0x800, &udp(200, (9, 9), m)))),
        ("an address beyond the pair", false, Box::new(|m| ethernet(them, me, 0x800, &udp(210, (9, 9), m)))),
        ("a neighbour's address", false, Box::new(|m| ethernet(them, me, 0x800, &udp(12, (9, 9), m)))),
        (
            "a neighbour's Ethernet address",
            false,
            Box::new(|m| ethernet(them, mac(2), 0x800, &udp(10, (9, 9), m))),
        ),
        (
            "honest ARP",
            true,
            Box::new(|m| ethernet(them, me, 0x806, &arp(true, (me, ip(10)), (them, ip(11)), m))),
        ),
        (
            "an ARP probe",
            true,
            Box::new(|m| ethernet(them, me, 0x806, &arp(false, (me, [0; 4]), ([0; 6], ip(10)), m))),
        ),
        (
            "ARP of the router",
            false,
            Box::new(|m| ethernet(them, me, 0x806, &arp(true, (me, ip(1)), (them, ip(11)), m))),
        ),
        (
            "ARP with another's hardware",
            false,
            Box::new(|m| ethernet(them, me, 0x806, &arp(true, (mac(2), ip(10)), (them, ip(11)), m))),
        ),
        ("a DHCP server", false, Box::new(|m| ethernet(them, me, 0x800, &udp(10, (67, 68), m)))),
        ("honest IPv6", true, Box::new(|m| ethernet(them, me, 0x86dd, &udp6(global(0), (9, 9), m)))),
        (
            "a neighbour's IPv6 address",
            false,
            Box::new(|m| ethernet(them, me, 0x86dd, &udp6(global(2), (9, 9), m))),
        ),
        ("a DHCPv6 server", false, Box::new(|m| ethernet(them, me, 0x86dd, &udp6(global(0), (547, 546), m)))),
        (
            "an honest advertisement",
            true,
            Box::new(|m| ethernet(them, me, 0x86dd, &advertise(lla(0), global(0), m))),
        ),
        (
            "an advertisement of a neighbour",
            false,
            Box::new(|m| ethernet(them, me, 0x86dd, &advertise(lla(0), global(2), m))),
        ),
        ("a router advertisement", false, Box::new(|m| ethernet(them, me, 0x86dd, &icmp6(134, m)))),
        ("a redirect", false, Box::new(|m| ethernet(them, me, 0x86dd, &icmp6(137, m)))),
        (
            "a tagged frame",
            false,
            Box::new(|m| ethernet(them, me, 0x8100, &[&[0, 5, 8, 0][..], &udp(10, (9, 9), m)].concat())),
        ),
        ("another ethertype", false, Box::new(|m| ethernet(them, me, 0x88cc, m))),
    ];
    for (number, (what, expected, forge)) in cases.iter().enumerate() {
        let mark = format!("mark{number:04}mark");
        let before = ground.counted("bridge", "spoofed", 0);
        attacker.send(&forge(mark.as_bytes()));
        assert_eq!(victim.sees(mark.as_bytes(), *expected), *expected, "{what}");
        let counted = ground.counted("bridge", "spoofed", 0) - before;
        assert_eq!(counted > 0, !expected, "{what}: counted {counted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fragments_hide_neither_who_sends_nor_what() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let ground = Ground::new(vec![open], vec![], &[&[id], &[id]]).await;
    let (attacker, victim) = (Wire::open(ground.ns(0), "eth0"), Wire::open(ground.ns(1), "eth0"));
    let mac = |host: u8| [0xfa, 0x16, 0x3e, 0, 0, 10 + host];
    // The kernel waits for a beginning for half a minute, which is long for a test.
    let waits = ["net/ipv4/ipfrag_time", "net/netfilter/nf_conntrack_frag6_timeout"];
    let shorten = || waits.map(|name| std::fs::write(format!("/proc/sys/{name}"), "1").unwrap());
    in_namespace(&ground.namespace(), shorten).unwrap();
    let v6 = |host: usize| match v6(host) {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(_) => unreachable!(),
    };
    let frame = |from: u8, is_v6: bool, mark: &[u8]| {
        let udp = udp4((9, 9), mark);
        if is_v6 {
            // RFC 8200 §4.5: UDP, at 64 bytes of packet 1, the last one.
            let fragment = [&[17, 0, 0, 64, 0, 0, 0, 1][..], &udp].concat();
            ethernet(mac(1), mac(0), 0x86dd, &ipv6(v6(usize::from(from) - 10), v6(1), 44, &fragment))
        } else {
            let packet = ipv4([10, 0, 0, from], [10, 0, 0, 11], 17, &udp);
            ethernet(mac(1), mac(0), 0x800, &later_fragment(packet))
        }
    };
    // From another's address it is dropped and counted. Without a beginning it is counted, nothing arrives, and the kernel
    // counts that it has dropped it.
    for (from, is_v6, spoofed) in [(12, false, 1), (10, false, 0), (12, true, 1), (10, true, 0)] {
        let mark = format!("mark{from}{is_v6}mark");
        let counted = || ["spoofed", "fragments"].map(|counter| ground.counted("bridge", counter, 0));
        let (before, whole) = (counted(), ground.never_whole());
        attacker.send(&frame(from, is_v6, mark.as_bytes()));
        assert!(!victim.sees(mark.as_bytes(), false), "{mark}");
        assert_eq!(counted(), [before[0] + spoofed, before[1] + 1], "{mark}");
        let mut expected = whole;
        expected[usize::from(is_v6)] += 1 - spoofed;
        let end = Instant::now() + probe::PATIENCE;
        while ground.never_whole() != expected && Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(ground.never_whole(), expected, "{mark}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_reach_nothing_of_the_host_but_its_services() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let ground = Ground::new(vec![open], vec![], &[&[id]]).await;
    let (host, service) = (ground.namespace(), "10.0.0.2".parse().unwrap());
    let dropped = || {
        let counter = ["nft", "-j", "list", "counter", "inet", "mote", "denied-host"];
        let text = run("ip", ["netns", "exec", &host].iter().chain(&counter));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["nftables"][1]["counter"]["packets"].as_u64().unwrap()
    };
    for port in [22, 80, 8774] {
        let before = dropped();
        assert!(!probe::tcp(ground.ns(0), &host, SocketAddr::new(service, port), false), "{port}");
        assert!(!probe::udp(ground.ns(0), &host, SocketAddr::new(service, port), false, false), "{port}");
        assert!(dropped() >= before + 2, "both are counted");
    }
    assert!(probe::ping(ground.ns(0), service, true));
    let resolver = SocketAddr::new(service, 53);
    let connect = || std::net::TcpStream::connect_timeout(&resolver, probe::PATIENCE);
    assert!(in_namespace(ground.ns(0), connect).unwrap().is_ok());
}

/// The underlay, the controller, another tenant, the host's own loopback: each by way of the bridge.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_sends_beyond_its_network_is_dropped_and_counted() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let ground = Ground::new(vec![open], vec![], &[&[id]]).await;
    let host = ground.namespace();
    let dropped = || {
        let counter = ["nft", "-j", "list", "counter", "bridge", "mote", "denied-beyond"];
        let text = run("ip", ["netns", "exec", &host].iter().chain(&counter));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["nftables"][1]["counter"]["packets"].as_u64().unwrap()
    };
    let (attacker, bridge) = (Wire::open(ground.ns(0), "eth0"), Wire::open(&host, "br0"));
    let to = mote_network::names::bridge_mac(ground.desired.networks[0].id).0;
    let me = [0xfa, 0x16, 0x3e, 0, 0, 10];
    let IpAddr::V6(own) = v6(0) else { unreachable!() };
    let cases: [(&str, bool, IpAddr); 7] = [
        ("the network's own service", true, "10.0.0.2".parse().unwrap()),
        ("the underlay", false, "192.0.2.10".parse().unwrap()),
        ("the controller", false, "203.0.113.77".parse().unwrap()),
        ("another tenant", false, "10.9.0.10".parse().unwrap()),
        ("the host's loopback", false, "127.0.0.1".parse().unwrap()),
        ("the underlay by IPv6", false, "2001:db8::10".parse().unwrap()),
        ("the host's loopback by IPv6", false, "::1".parse().unwrap()),
    ];
    for (number, (what, expected, address)) in cases.into_iter().enumerate() {
        let mark = format!("mark{number:04}mark");
        let before = dropped();
        let frame = match address {
            IpAddr::V4(ip) => {
                let packet = ipv4([10, 0, 0, 10], ip.octets(), 17, &udp4((9, 9), mark.as_bytes()));
                ethernet(to, me, 0x800, &packet)
            }
            IpAddr::V6(ip) => {
                let length = (8 + mark.len() as u16).to_be_bytes();
                let datagram = [&[0, 9, 0, 9][..], &length, &[0, 0], mark.as_bytes()].concat();
                ethernet(to, me, 0x86dd, &ipv6(own.octets(), ip.octets(), 17, &datagram))
            }
        };
        attacker.send(&frame);
        assert_eq!(bridge.sees(mark.as_bytes(), expected), expected, "{what}");
        assert_eq!(dropped() - before, u64::from(!expected), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_administratively_down_carries_nothing() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let mut ground = Ground::new(vec![open], vec![], &[&[id], &[id]]).await;
    assert!(probe::ping(ground.ns(0), v4(1), true));
    for security in [true, false] {
        ground.desired.networks[0].ports[1].port_security = security;
        ground.desired.networks[0].ports[1].admin_state_up = false;
        ground.converge().await;
        assert!(!probe::ping(ground.ns(0), v4(1), false));
        assert!(!probe::ping(ground.ns(1), "10.0.0.2".parse().unwrap(), false));
        ground.desired.networks[0].ports[1].admin_state_up = true;
        ground.converge().await;
        assert!(probe::ping(ground.ns(0), v4(1), true));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bandwidth_limit_is_what_passes_in_its_direction() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let open = group(&[(Protocol::Any, None)]);
    let id = open.id;
    let mut ground = Ground::new(vec![open], vec![], &[&[id], &[id]]).await;
    const KBPS: u32 = 16_000;
    let limit = Some(BandwidthLimit { max_kbps: KBPS, max_burst_kbps: 0 });
    let out = QosSpec { egress: limit, dscp_mark: Some(10), ..QosSpec::default() };
    let into = QosSpec { ingress: limit, ..QosSpec::default() };
    // Sender's egress, receiver's ingress, and a port without a filter.
    for (port, qos, security) in [(0, out.clone(), true), (1, into, true), (0, out, false)] {
        for port in &mut ground.desired.networks[0].ports {
            (port.qos, port.port_security) = (None, security);
        }
        ground.converge().await;
        let free = probe::bytes_per_second(ground.ns(0), ground.ns(1), v4(1));
        ground.desired.networks[0].ports[port].qos = Some(qos);
        ground.converge().await;
        let wanted = f64::from(KBPS) * 125.0;
        let least = 0.95 * wanted * 1400.0 / 1442.0;
        let limited = probe::limited_bytes_per_second(ground.ns(0), ground.ns(1), v4(1), least);
        println!(
            "port {port}, filter {security}: free {free:.0} B/s, limited {limited:.0} B/s of {wanted:.0}"
        );
        // Payload is 1400 of 1442 bytes that count.
        assert!((0.95..1.05).contains(&(limited * 1442.0 / 1400.0 / wanted)), "{limited} of {wanted}");
        assert!(free > 2.0 * wanted, "the limit is what limits: {free}");
    }
}

/// Five hundred ports, a group of a thousand members: the figures are printed, the rules' number is what is asserted.
#[tokio::test(flavor = "multi_thread")]
async fn a_rule_change_with_500_ports_is_one_small_transaction() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let set = AddressSetId::new();
    let addresses = (0..1000u32).map(|n| IpAddr::from((0x0a01_0000 + 2 * n).to_be_bytes()));
    let members = AddressSetSpec { id: set, addresses: addresses.map(mote_host_api::host_net).collect() };
    let default = group(&[(Protocol::Any, Some(Remote::Set(set)))]);
    let mut lab = Lab::new();
    let mut network = network();
    network.subnets[0].cidr = "10.0.0.0/16".parse().unwrap();
    for host in 0..500u16 {
        let mut port = add_port(&mut network, 3);
        let [high, low] = (host + 10).to_be_bytes();
        port.mac_address = format!("fa:16:3e:00:{high:02x}:{low:02x}");
        port.fixed_ips[0].ip_address = [10, 0, high, low].into();
        port.port_security = true;
        port.security_groups = vec![default.id];
        *network.ports.last_mut().unwrap() = port;
    }
    let mut desired = Desired {
        networks: vec![network],
        security_groups: vec![default],
        address_sets: vec![members],
        ..Desired::default()
    };
    let nothing = HashMap::new();
    let start = Instant::now();
    lab.converge_all(&desired, &nothing).await;
    println!("first pass: {:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(lab.converge_all(&desired, &nothing).await.executed, 0);
    println!("pass without a change: {:?}", start.elapsed());
    let namespace = lab.executor.namespace(desired.networks[0].id);
    let lines = || run("ip", ["netns", "exec", &namespace, "nft", "list", "ruleset"]).lines().count();
    let before = lines();
    for port in 0..100 {
        desired.security_groups[0].rules.extend(both(Direction::Ingress, tcp(1000 + 2 * port), None));
    }
    let start = Instant::now();
    assert_eq!(lab.converge_all(&desired, &nothing).await.executed, 1);
    println!("pass with a rule change: {:?}", start.elapsed());
    assert!(lines() < before + 60, "100 rules are not 100 lines: {before} → {}", lines());
    desired.address_sets[0].addresses.insert("10.9.9.9/32".parse().unwrap());
    let start = Instant::now();
    assert_eq!(lab.converge_all(&desired, &nothing).await.executed, 1);
    println!("pass with a member change: {:?}", start.elapsed());
}
