//! Routers over hosts: between networks, out to the world with SNAT, floating IPs, port forwardings.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use harness::{Client, add_port, cloud::Cloud, network, probe, run};
use mote_host_api::{
    BandwidthLimit, FixedIpV6, FloatingIpId, FloatingIpSpec, ForwardedProtocol, GatewayPlace, HostRoute,
    Ipv6Mode, NetworkSpec, PortForwarding, PortId, QosSpec, RouterGateway, RouterId, RouterInterface,
    RouterSpec, SegmentSpec, SubnetId, SubnetV6Spec,
};
use mote_network::{NetworkKey, namespace};

const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const FLOATING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
const FORWARDING: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 21);

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
        };
        let mut ground = Self { cloud, networks, public, router, gateway_host: 0, clients: Vec::new() };
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
            if let Some(gateway) = &mut router.gateway {
                gateway.place = if here { GatewayPlace::Here } else { GatewayPlace::Remote(tunnel_ip) };
                if here {
                    host.desired.networks.push(self.public.clone());
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
        let address = SocketAddr::new(WORLD.into(), 8080);
        let listener = probe::listen(&self.cloud.world, address);
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
