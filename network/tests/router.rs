//! Routers over hosts: between networks, out to the world with SNAT, floating IPs, port forwardings.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use harness::{Client, add_port, cloud::Cloud, network, probe, run};
use mote_host_api::{
    BandwidthLimit, FixedIpV6, FloatingIpId, FloatingIpSpec, ForwardedProtocol, GatewayPlace, HostRoute,
    Ipv6Mode, NetworkSpec, PortForwarding, PortId, QosSpec, RouterGateway, RouterId, RouterInterface,
    RouterSpec, SegmentSpec, SubnetId, SubnetV6Spec,
};
use mote_network::{Config, Executor, NetworkKey, namespace, plan_routers};

const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const FLOATING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
const FORWARDING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 21);
const SECOND_GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 10);
const SECOND_FLOATING: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 20);
const SECOND_FORWARDING: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 21);

/// 10.0.`third`.0/24 and fd00:`third`::/64 over VXLAN with ports at .10, .11, ….
fn tenant_network(third: u8, ports: u8) -> NetworkSpec {
    let mut network = network();
    network.mtu = 1450;
    network.segment = Some(SegmentSpec::Vxlan { vni: 100 + u32::from(third) });
    network.subnets[0].cidr = format!("10.0.{third}.0/24").parse().unwrap();
    network.subnets[0].service_ip = [10, 0, third, 2].into();
    for host in 10..10 + ports {
        add_port(&mut network, host);
        let port = network.ports.last_mut().unwrap();
        port.mac_address = format!("fa:16:3e:00:{third:02x}:{host:02x}");
        port.fixed_ips[0].ip_address = [10, 0, third, host].into();
        let ip_address = format!("fd00:{third}::{host}").parse().unwrap();
        port.fixed_ips_v6 = vec![FixedIpV6 { subnet_id: SubnetId::new(), ip_address }];
    }
    network
}

fn public() -> NetworkSpec {
    let mut public = network();
    public.mtu = 1500;
    public.segment = Some(SegmentSpec::Flat { physical_network: "public".to_owned() });
    public.subnets[0].cidr = "203.0.113.0/24".parse().unwrap();
    public.subnets[0].service_ip = [203, 0, 113, 2].into();
    public
}

/// 198.18.0.0/24.
fn second() -> NetworkSpec {
    let mut second = public();
    second.segment = Some(SegmentSpec::Flat { physical_network: "second".to_owned() });
    second.subnets[0].cidr = "198.18.0.0/24".parse().unwrap();
    second.subnets[0].service_ip = [198, 18, 0, 2].into();
    second
}

fn second_gateway(network: &NetworkSpec) -> RouterGateway {
    RouterGateway {
        place: GatewayPlace::Here,
        port_id: PortId::new(),
        network_id: network.id,
        mac_address: "fa:16:3e:02:00:02".to_owned(),
        addresses: vec![format!("{SECOND_GATEWAY}/24").parse().unwrap()],
        next_hop: Some([198, 18, 0, 1].into()),
        next_hop_v6: None,
        enable_snat: true,
        floating_ips: vec![],
    }
}

fn interface(network: &NetworkSpec, third: u8) -> RouterInterface {
    RouterInterface {
        port_id: PortId::new(),
        network_id: network.id,
        mac_address: format!("fa:16:3e:01:{third:02x}:01"),
        addresses: vec![
            format!("10.0.{third}.1/24").parse().unwrap(),
            format!("fd00:{third}::1/64").parse().unwrap(),
        ],
    }
}

/// Networks 1 and 2, the router between them and to the world; its gateway on host 0.
struct Ground {
    cloud: Cloud,
    networks: Vec<(NetworkSpec, Vec<usize>)>,
    public: NetworkSpec,
    second: NetworkSpec,
    router: RouterSpec,
    gateway_host: usize,
    /// Of network 1: hosts 0 and 1; of network 2: host 1.
    clients: Vec<Client>,
}

impl Ground {
    async fn new() -> Self {
        let cloud = Cloud::new(2);
        let networks = vec![(tenant_network(1, 2), vec![0, 1]), (tenant_network(2, 1), vec![1])];
        let public = public();
        let second = second();
        let router = RouterSpec {
            id: RouterId::new(),
            admin_state_up: true,
            interfaces: vec![interface(&networks[0].0, 1), interface(&networks[1].0, 2)],
            gateway: Some(RouterGateway {
                place: GatewayPlace::Here,
                port_id: PortId::new(),
                network_id: public.id,
                mac_address: "fa:16:3e:02:00:01".to_owned(),
                addresses: vec![format!("{GATEWAY}/24").parse().unwrap()],
                next_hop: Some([203, 0, 113, 1].into()),
                next_hop_v6: None,
                enable_snat: true,
                floating_ips: vec![],
            }),
            routes: vec![],
            routes_v6: vec![],
            extra_gateways: Vec::new(),
            default_route_ecmp: false,
        };
        let mut ground =
            Self { cloud, networks, public, second, router, gateway_host: 0, clients: Vec::new() };
        ground.converge().await;
        for (network, places) in ground.networks.clone() {
            for (port, host) in network.ports.iter().zip(places) {
                let client = ground.cloud.plug_in(host, &network, port);
                let [_, _, third, _] = port.fixed_ips[0].ip_address.octets();
                let name = client.namespace.as_str();
                run("ip", ["-n", name, "route", "add", "default", "via", &format!("10.0.{third}.1")]);
                run("ip", ["-n", name, "-6", "route", "add", "default", "via", &format!("fd00:{third}::1")]);
                ground.clients.push(client);
            }
        }
        ground.converge().await;
        ground
    }

    async fn converge(&mut self) {
        self.cloud.place(&self.networks);
        let tunnel_ip = self.cloud.hosts[self.gateway_host].tunnel_ip;
        for (number, host) in self.cloud.hosts.iter_mut().enumerate() {
            let mut router = self.router.clone();
            let here = number == self.gateway_host;
            for gateway in router.gateway.iter_mut().chain(&mut router.extra_gateways) {
                gateway.place = if here { GatewayPlace::Here } else { GatewayPlace::Remote(tunnel_ip) };
            }
            for network in [&self.public, &self.second] {
                if here && router.gateways().any(|gateway| gateway.network_id == network.id) {
                    host.desired.networks.push(network.clone());
                }
            }
            host.desired.routers = vec![router];
        }
        self.cloud.converge().await;
    }

    fn ns(&self, client: usize) -> &str {
        &self.clients[client].namespace
    }

    fn gateway(&mut self) -> &mut RouterGateway {
        self.router.gateway.as_mut().unwrap()
    }

    /// Who the other end of a connection from a client to the world is.
    fn seen_by_the_world(&self, client: usize) -> Option<IpAddr> {
        self.seen_by(&self.cloud.world, client)
    }

    fn seen_by(&self, world: &str, client: usize) -> Option<IpAddr> {
        let address = SocketAddr::new(WORLD.into(), 8080);
        let listener = probe::listen(world, address);
        let stream = namespace::in_namespace(self.ns(client), || {
            std::net::TcpStream::connect_timeout(&address, probe::PATIENCE)
        });
        stream.unwrap().ok()?;
        Some(listener.accept().unwrap().1.ip())
    }
}

fn floating(fixed: Option<Ipv4Addr>, address: Ipv4Addr) -> FloatingIpSpec {
    FloatingIpSpec {
        id: FloatingIpId::new(),
        floating_ip_address: address,
        fixed_ip_address: fixed,
        port_forwardings: vec![],
        qos: None,
    }
}

fn inner(third: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 0, third, host])
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_of_a_router_reach_each_other_and_the_world_from_every_host() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut ground = Ground::new().await;
    // Between networks: both hosts route; IPv4 and IPv6, the same host and another.
    for (from, to) in
        [(0, inner(2, 10)), (1, inner(2, 10)), (2, inner(1, 10)), (2, inner(1, 11)), (0, inner(1, 11))]
    {
        assert!(probe::ping(ground.ns(from), to, true), "{from} to {to}");
    }
    assert!(probe::ping(ground.ns(0), "fd00:2::10".parse().unwrap(), true));
    assert!(probe::ping(ground.ns(2), "fd00:1::10".parse().unwrap(), true));
    // Out, from the gateway's host and from another one, as the router.
    for client in 0..3 {
        assert_eq!(ground.seen_by_the_world(client), Some(GATEWAY.into()), "{client}");
    }
    // Nobody comes in.
    assert!(!probe::ping(&ground.cloud.world, inner(1, 10), false));
    // A router that is administratively down routes nothing.
    ground.router.admin_state_up = false;
    ground.converge().await;
    assert!(!probe::ping(ground.ns(0), inner(2, 10), false));
    assert!(!probe::ping(ground.ns(0), WORLD.into(), false));
    ground.router.admin_state_up = true;
    // Without SNAT the inner address is seen, if the world knows the way back.
    ground.gateway().enable_snat = false;
    ground.converge().await;
    run("ip", ["-n", &ground.cloud.world, "route", "add", "10.0.0.0/16", "via", &GATEWAY.to_string()]);
    assert_eq!(ground.seen_by_the_world(1), Some(inner(1, 11)));
}

#[tokio::test(flavor = "multi_thread")]
async fn floating_ips_lead_to_their_ports_wherever_those_are_and_move() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let mut ground = Ground::new().await;
    // On the other host, in network 2; and forwardings to both hosts.
    let mut forwarding = floating(None, FORWARDING);
    let forward = |external_ports, internal_ip_address, internal_ports| PortForwarding {
        protocol: ForwardedProtocol::Tcp,
        external_ports,
        internal_ip_address,
        internal_ports,
    };
    forwarding.port_forwardings = vec![
        forward((2200, 2209), [10, 0, 1, 10].into(), (2200, 2209)),
        forward((80, 81), [10, 0, 1, 11].into(), (8080, 8081)),
    ];
    ground.gateway().floating_ips = vec![floating(Some([10, 0, 2, 10].into()), FLOATING), forwarding];
    ground.converge().await;
    let reaches =
        |ground: &Ground, from: &str, outer: (Ipv4Addr, u16), to: usize, inner: SocketAddr, expected| {
            let _listener = probe::listen(ground.ns(to), inner);
            let address = SocketAddr::new(outer.0.into(), outer.1);
            let wait = if expected { probe::PATIENCE } else { probe::NOTHING };
            let connect = || std::net::TcpStream::connect_timeout(&address, wait);
            namespace::in_namespace(from, connect).unwrap().is_ok() == expected
        };
    let at = |ip: IpAddr, port| SocketAddr::new(ip, port);
    let world = ground.cloud.world.clone();
    assert!(reaches(&ground, &world, (FLOATING, 22), 2, at(inner(2, 10), 22), true));
    assert_eq!(ground.seen_by_the_world(2), Some(FLOATING.into()), "and out as itself");
    assert_eq!(ground.seen_by_the_world(0), Some(GATEWAY.into()));
    assert!(reaches(&ground, &world, (FORWARDING, 2205), 0, at(inner(1, 10), 2205), true));
    assert!(reaches(&ground, &world, (FORWARDING, 81), 1, at(inner(1, 11), 8081), true));
    assert!(reaches(&ground, &world, (FORWARDING, 82), 1, at(inner(1, 11), 8082), false));
    // From inside, also by itself.
    for client in [0, 1, 2] {
        let from = ground.ns(client).to_owned();
        assert!(reaches(&ground, &from, (FLOATING, 22), 2, at(inner(2, 10), 22), true), "from {client}");
    }
    // It moves to another port: new connections go there, open ones are cut.
    let listener = probe::listen(ground.ns(2), at(inner(2, 10), 23));
    let address = SocketAddr::new(FLOATING.into(), 23);
    let connect = || std::net::TcpStream::connect_timeout(&address, probe::PATIENCE);
    let mut client = namespace::in_namespace(&world, connect).unwrap().unwrap();
    let mut server = listener.accept().unwrap().0;
    assert!(probe::carries(&mut client, &mut server, true));
    ground.gateway().floating_ips[0].fixed_ip_address = Some([10, 0, 1, 10].into());
    ground.converge().await;
    assert!(!probe::carries(&mut client, &mut server, false));
    assert!(!probe::carries(&mut server, &mut client, false));
    assert!(reaches(&ground, &world, (FLOATING, 22), 0, at(inner(1, 10), 22), true));
    // It goes.
    ground.gateway().floating_ips.clear();
    ground.converge().await;
    assert!(reaches(&ground, &world, (FLOATING, 22), 0, at(inner(1, 10), 22), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_floating_ips_policy_limits_what_passes_the_gateway_in_each_direction() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    const KBPS: u32 = 16_000;
    let mut ground = Ground::new().await;
    // At a port on another host than the gateway's.
    let mut limited = floating(Some([10, 0, 2, 10].into()), FLOATING);
    let limit = Some(BandwidthLimit { max_kbps: KBPS, max_burst_kbps: 0 });
    let world = ground.cloud.world.clone();
    for (ingress, egress) in [(limit, None), (None, limit)] {
        limited.qos = Some(QosSpec { ingress, egress, dscp_mark: egress.map(|_| 10) });
        ground.gateway().floating_ips = vec![limited.clone()];
        ground.converge().await;
        let least = 0.95 * f64::from(KBPS) * 125.0 * 1400.0 / 1428.0;
        let into = probe::limited_bytes_per_second(&world, ground.ns(2), FLOATING.into(), least);
        let out = probe::limited_bytes_per_second(ground.ns(2), &world, WORLD.into(), least);
        // Payload is 1400 of 1428 bytes that count.
        let of_limit = |rate: f64| rate * 1428.0 / 1400.0 / (f64::from(KBPS) * 125.0);
        println!("in {:.3}, out {:.3} of the limit", of_limit(into), of_limit(out));
        for (rate, limited) in [(into, ingress.is_some()), (out, egress.is_some())] {
            let share = of_limit(rate);
            assert!(if limited { (0.95..1.05).contains(&share) } else { share > 1.5 }, "{share}");
        }
        // From inside, by the same address, nothing is limited.
        assert!(of_limit(probe::bytes_per_second(ground.ns(0), ground.ns(2), FLOATING.into())) > 1.5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_moves_to_another_host_and_a_router_leaves_nothing() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut ground = Ground::new().await;
    assert_eq!(ground.seen_by_the_world(0), Some(GATEWAY.into()));
    ground.gateway_host = 1;
    ground.converge().await;
    // The old host's entry is not what the new one announces yet.
    run("ip", ["-n", &ground.cloud.world, "neighbour", "flush", "dev", "br0"]);
    for client in 0..3 {
        assert_eq!(ground.seen_by_the_world(client), Some(GATEWAY.into()), "{client}");
    }
    // A route to a network behind a port.
    ground.router.routes =
        vec![HostRoute { destination: "192.168.7.0/24".parse().unwrap(), nexthop: [10, 0, 2, 10].into() }];
    ground.converge().await;
    run("ip", ["-n", ground.ns(2), "address", "add", "192.168.7.1/32", "dev", "lo"]);
    assert!(probe::ping(ground.ns(0), "192.168.7.1".parse().unwrap(), true));
    for host in &mut ground.cloud.hosts {
        host.desired.routers.clear();
        host.desired.networks.clear();
    }
    ground.cloud.converge().await;
    for host in &ground.cloud.hosts {
        assert_eq!(host.lab.names(), Vec::<String>::new());
    }
    assert!(NetworkKey::parse("r0123456789").is_none(), "routers' names are no networks'");
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_of_a_slaac_subnet_configure_themselves_and_reach_the_others() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut ground = Ground::new().await;
    for (third, (network, _)) in (1..).zip(&mut ground.networks) {
        network.subnets_v6.push(SubnetV6Spec {
            id: SubnetId::new(),
            cidr: format!("fd00:{third}::/64").parse().unwrap(),
            gateway_ip: Some(format!("fd00:{third}::1").parse().unwrap()),
            ra_mode: Some(Ipv6Mode::Slaac),
            address_mode: Some(Ipv6Mode::Slaac),
            dns_nameservers: vec![],
        });
        for (port, host) in network.ports.iter_mut().zip(10..) {
            // RFC 4291, appendix A.
            let ip_address = format!("fd00:{third}::f816:3eff:fe00:{third}{host:02x}").parse().unwrap();
            port.fixed_ips_v6[0].ip_address = ip_address;
            port.port_security = false;
        }
    }
    for client in &ground.clients {
        let name = client.namespace.as_str();
        run("ip", ["-n", name, "-6", "address", "flush", "dev", "eth0", "scope", "global"]);
        run("ip", ["-n", name, "-6", "route", "flush", "default"]);
    }
    ground.converge().await;
    let address = |client: usize| {
        let text = run(
            "ip",
            ["-n", ground.ns(client), "-6", "-o", "address", "show", "dev", "eth0", "scope", "global"],
        );
        let field = text.split_whitespace().find(|word| word.starts_with("fd00:"))?;
        let tentative = text.contains("tentative");
        field.split('/').next().filter(|_| !tentative)?.parse::<IpAddr>().ok()
    };
    let end = std::time::Instant::now() + 4 * probe::PATIENCE;
    while (0..3).any(|client| address(client).is_none()) {
        assert!(std::time::Instant::now() < end, "no address");
        // Ask: a link that comes up does.
        for client in 0..3 {
            run("ip", ["-n", ground.ns(client), "link", "set", "eth0", "down"]);
            run("ip", ["-n", ground.ns(client), "link", "set", "eth0", "up"]);
        }
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    }
    for (from, to) in [(0, 2), (2, 1), (1, 0)] {
        assert!(probe::ping(ground.ns(from), address(to).unwrap(), true), "{from} to {to}");
    }
    let routes = run("ip", ["-n", ground.ns(0), "-6", "route", "show", "default"]);
    assert!(routes.contains("via fe80::f816:3eff:fe01:101"), "{routes}");
}

/// What comes in by a gateway, there and back: TCP, UDP, ping.
fn comes_in(ground: &Ground, world: &str, outer: SocketAddr, client: usize, inner: SocketAddr) {
    let what = format!("{outer} to {inner}");
    let (name, listener) = (ground.ns(client).to_owned(), probe::listen(ground.ns(client), inner));
    let connect = || std::net::TcpStream::connect_timeout(&outer, probe::PATIENCE);
    let mut near = namespace::in_namespace(world, connect).unwrap().expect(&what);
    let (mut far, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), IpAddr::V4(WORLD), "{what}");
    assert!(probe::carries(&mut near, &mut far, true) && probe::carries(&mut far, &mut near, true), "{what}");
    if outer.port() != inner.port() {
        // Forwarded for TCP only.
        return;
    }
    let server = namespace::in_namespace(&name, || UdpSocket::bind(inner)).unwrap().unwrap();
    let near = namespace::in_namespace(world, || UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    near.connect(outer).unwrap();
    let mut buffer = [0; 16];
    for socket in [&server, &near] {
        socket.set_read_timeout(Some(probe::PATIENCE)).unwrap();
    }
    near.send(b"question").unwrap();
    let (_, peer) = server.recv_from(&mut buffer).expect(&what);
    server.send_to(b"answer", peer).unwrap();
    assert_eq!(near.recv(&mut buffer).expect(&what), 6, "{what}");
    assert!(probe::ping(world, outer.ip(), true), "{what}");
}

/// Everything that goes in and out by two gateways. Both worlds send from the same address and have the same one to send to.
fn both_ways(ground: &Ground, second: &str) {
    let world = ground.cloud.world.as_str();
    let at = |ip: Ipv4Addr, port| SocketAddr::new(ip.into(), port);
    let inside = |third, host, port| SocketAddr::new(inner(third, host), port);
    comes_in(ground, world, at(FLOATING, 22), 0, inside(1, 10, 22));
    comes_in(ground, second, at(SECOND_FLOATING, 22), 2, inside(2, 10, 22));
    comes_in(ground, second, at(SECOND_FORWARDING, 2200), 1, inside(1, 11, 22));
    // The router itself, and IPv6, which nothing translates.
    assert!(probe::ping(second, SECOND_GATEWAY.into(), true));
    assert!(probe::ping(world, GATEWAY.into(), true));
    for world in [world, second] {
        for ip in ["fd00:1::10", "fd00:1::11", "fd00:2::10"] {
            assert!(probe::ping(world, ip.parse().unwrap(), true), "{ip} from {world}");
        }
    }
    // Out: by the floating IP's gateway, and else by the first.
    assert_eq!(ground.seen_by(world, 0), Some(FLOATING.into()));
    assert_eq!(ground.seen_by(second, 2), Some(SECOND_FLOATING.into()));
    // Inside, also by floating IPs.
    for (from, to) in [(0, inner(2, 10)), (2, inner(1, 11)), (2, FLOATING.into())] {
        assert!(probe::ping(ground.ns(from), to, true), "{from} to {to}");
    }
    for from in 0..3 {
        assert!(probe::ping(ground.ns(from), SECOND_FLOATING.into(), true), "{from}");
    }
}

impl Ground {
    /// A second gateway in a second world. Both worlds have the same addresses to send from.
    async fn with_two_worlds() -> (Self, String) {
        let mut ground = Self::new().await;
        let second = ground.cloud.second_world();
        for (world, v4, v6) in
            [(&ground.cloud.world, "203.0.113", "2001:db8:ffff"), (&second, "198.18.0", "2001:db8:eeee")]
        {
            run("ip", ["-n", world, "-6", "address", "add", "2001:db8:1::1/128", "dev", "lo", "nodad"]);
            let from = WORLD.to_string();
            run("ip", ["-n", world, "route", "replace", &format!("{v4}.0/24"), "dev", "br0", "src", &from]);
            let (via, from) = (format!("{v6}::10"), "2001:db8:1::1");
            run("ip", ["-n", world, "-6", "route", "add", "fd00::/16", "via", &via, "src", from]);
        }
        let floating_ip = |fixed: [u8; 4], address| floating(Some(fixed.into()), address);
        let mut forwarding = floating(None, SECOND_FORWARDING);
        forwarding.port_forwardings = vec![PortForwarding {
            protocol: ForwardedProtocol::Tcp,
            external_ports: (2200, 2200),
            internal_ip_address: [10, 0, 1, 11].into(),
            internal_ports: (22, 22),
        }];
        let mut extra = second_gateway(&ground.second);
        extra.floating_ips = vec![floating_ip([10, 0, 2, 10], SECOND_FLOATING), forwarding];
        let first = ground.gateway();
        first.floating_ips = vec![floating_ip([10, 0, 1, 10], FLOATING)];
        for (gateway, prefix) in [(first, "2001:db8:ffff"), (&mut extra, "2001:db8:eeee")] {
            gateway.addresses.push(format!("{prefix}::10/64").parse().unwrap());
            gateway.next_hop_v6 = Some(format!("{prefix}::1").parse().unwrap());
        }
        ground.router.extra_gateways = vec![extra];
        ground.converge().await;
        (ground, second)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_by_one_of_two_gateways_leaves_by_it_on_whatever_host_they_are() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let (mut ground, second) = Ground::with_two_worlds().await;
    let world = ground.cloud.world.clone();
    both_ways(&ground, &second);
    assert_eq!(ground.seen_by(&world, 1), Some(GATEWAY.into()));
    // A host agent that starts anew finds nothing to do.
    for host in &ground.cloud.hosts {
        let config = Config {
            prefix: host.lab.prefix.clone(),
            host_namespace: Some(host.namespace.clone()),
            ..Config::default()
        };
        let successor = Executor::new(config);
        let (steps, refused) = plan_routers(&host.desired, &successor.observe_routers().await.unwrap());
        assert_eq!((steps, refused), (vec![], vec![]));
    }
    // The host with the gateways is lost.
    ground.gateway_host = 1;
    ground.converge().await;
    for world in [&world, &second] {
        run("ip", ["-n", world, "neighbour", "flush", "dev", "br0"]);
    }
    both_ways(&ground, &second);
    // The other one becomes the first.
    let (router, first) = (&mut ground.router, 0);
    std::mem::swap(router.gateway.as_mut().unwrap(), &mut router.extra_gateways[first]);
    ground.converge().await;
    both_ways(&ground, &second);
    assert_eq!(ground.seen_by(&second, 1), Some(SECOND_GATEWAY.into()));
    // One is left.
    ground.router.gateway = Some(ground.router.extra_gateways.remove(0));
    ground.converge().await;
    assert_eq!(ground.seen_by(&world, 1), Some(GATEWAY.into()));
    assert_eq!(ground.seen_by(&world, 2), Some(GATEWAY.into()));
    let inside = SocketAddr::new(inner(1, 10), 22);
    comes_in(&ground, &world, SocketAddr::new(FLOATING.into(), 22), 0, inside);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_ecmp_connections_are_shared_out_and_each_stays_with_its_gateway() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    const CONNECTIONS: usize = 40;
    let (mut ground, second) = Ground::with_two_worlds().await;
    ground.router.default_route_ecmp = true;
    ground.converge().await;
    both_ways(&ground, &second);
    let address = SocketAddr::new(WORLD.into(), 8080);
    let worlds = [(ground.cloud.world.clone(), GATEWAY), (second.clone(), SECOND_GATEWAY)];
    let listeners = worlds.each_ref().map(|(world, _)| probe::listen(world, address));
    let mut near: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let connect = || std::net::TcpStream::connect_timeout(&address, probe::PATIENCE);
            namespace::in_namespace(ground.ns(1), connect).unwrap().unwrap()
        })
        .collect();
    let mut far = Vec::new();
    for (listener, (world, gateway)) in listeners.iter().zip(&worlds) {
        listener.set_nonblocking(true).unwrap();
        let before = far.len();
        while let Ok((stream, peer)) = listener.accept() {
            assert_eq!(peer.ip(), IpAddr::V4(*gateway), "{world}");
            stream.set_nonblocking(false).unwrap();
            far.push((peer.port(), stream));
        }
        assert!(far.len() > before, "none by {gateway}");
    }
    assert_eq!(far.len(), CONNECTIONS);
    // The default route leads to the first one again: whatever is open stays where it is.
    ground.router.default_route_ecmp = false;
    ground.converge().await;
    for stream in &mut near {
        let port = stream.local_addr().unwrap().port();
        // SNAT keeps ports where they are free.
        let (_, far) = far.iter_mut().find(|(peer, _)| *peer == port).unwrap();
        assert!(probe::carries(stream, far, true) && probe::carries(far, stream, true), "{port}");
    }
    drop(listeners);
    // Only one translates: what leaves by the other is seen as itself.
    ground.router.extra_gateways[0].enable_snat = false;
    std::mem::swap(ground.router.gateway.as_mut().unwrap(), &mut ground.router.extra_gateways[0]);
    ground.converge().await;
    run("ip", ["-n", &second, "route", "add", "10.0.0.0/16", "via", &SECOND_GATEWAY.to_string()]);
    assert_eq!(ground.seen_by(&second, 1), Some(inner(1, 11)));
}
