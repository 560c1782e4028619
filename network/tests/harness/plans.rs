//! Random descriptions of all that a host can have of networks, and what nft(8) shows of a packet filter.

use std::net::IpAddr;

use ipnet::IpNet;
use mote_host_api::{
    AddressPair, AddressSetId, AddressSetSpec, BandwidthLimit, Direction, EtherType, FixedIp, FixedIpV6,
    FloatingIpSpec, ForwardedProtocol, GatewayPlace, HostRoute, NetworkId, NetworkSpec, PortForwarding,
    PortId, PortSpec, Protocol, QosSpec, Remote, RemotePort, RouterGateway, RouterId, RouterInterface,
    RouterSpec, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec, SegmentSpec, ServerId, SubnetId,
    SubnetSpec, TunnelSpec,
};
use mote_network::Desired;
use uuid::Uuid;

const NETWORKS: u8 = 3;
const GROUPS: u8 = 3;
/// A second network outside of routers.
const OUTSIDE: u8 = NETWORKS;

/// SplitMix64: the same numbers from the same seed, in every process.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u8) -> u8 {
        (self.next() % u64::from(end)) as u8
    }

    pub fn often(&mut self) -> bool {
        self.below(4) != 0
    }

    pub fn one<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u8) as usize].clone()
    }
}

/// Some of the numbers.
fn some(random: &mut Random, numbers: std::ops::Range<u8>) -> Vec<u8> {
    numbers.filter(|_| random.often()).collect()
}

/// The same thing has the same id under every seed; ids of different things differ in their first digits.
fn id(kind: u8, number: u8) -> Uuid {
    Uuid::from_bytes([
        kind << 4 | number >> 4,
        number << 4,
        1,
        2,
        3,
        4,
        0x45,
        6,
        0x87,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
    ])
}

fn group(random: &mut Random, number: u8) -> SecurityGroupSpec {
    let rules = (0..random.below(6)).map(|_| {
        let ethertype = random.one(&[EtherType::Ipv4, EtherType::Ipv4, EtherType::Ipv6]);
        let ports = random.often().then(|| (u16::from(random.below(9)) + 1, random.one(&[9, 20, 65535])));
        SecurityGroupRule {
            direction: random.one(&[Direction::Ingress, Direction::Egress]),
            ethertype,
            protocol: match random.below(7) {
                0 => Protocol::Any,
                1 => Protocol::Icmp { icmp_type: Some(8), code: random.often().then_some(0) },
                2 => Protocol::Udp { ports },
                3 => Protocol::Sctp { ports },
                4 => Protocol::Number { number: 47 + random.below(3) },
                _ => Protocol::Tcp { ports },
            },
            remote: match random.below(4) {
                0 => None,
                1 => Some(Remote::Set(AddressSetId(id(7, random.below(GROUPS))))),
                _ if ethertype == EtherType::Ipv6 => {
                    let range = format!("fd00:{}::/{}", random.below(3), random.one(&[32, 61, 64, 128]));
                    Some(Remote::Cidr(range.parse().unwrap()))
                }
                _ => {
                    let length = random.one(&[8, 15, 16, 24, 32]);
                    Some(Remote::Cidr(IpNet::new([10, random.below(3), 0, 0].into(), length).unwrap()))
                }
            },
        }
    });
    SecurityGroupSpec { id: SecurityGroupId(id(6, number)), stateful: true, rules: rules.collect() }
}

fn port(random: &mut Random, network: u8, host: u8) -> PortSpec {
    let fixed = FixedIp { subnet_id: SubnetId(id(2, network)), ip_address: [10, network, 0, host].into() };
    let limit = |random: &mut Random| {
        random
            .often()
            .then(|| BandwidthLimit { max_kbps: 1000 + u32::from(random.below(9)), max_burst_kbps: 0 })
    };
    PortSpec {
        id: PortId(id(3, network << 4 | host & 15)),
        server_id: ServerId(id(4, host)),
        mac_address: format!("fa:16:3e:{network:02x}:{:02x}:{host:02x}", random.below(2)),
        fixed_ips: vec![fixed],
        fixed_ips_v6: (0..random.below(3))
            .map(|n| FixedIpV6 {
                subnet_id: SubnetId(id(2, network)),
                ip_address: format!("fd00:{network}::{n}:{host}").parse().unwrap(),
            })
            .collect(),
        port_security: random.often(),
        security_groups: (0..GROUPS).filter(|_| random.often()).map(|n| SecurityGroupId(id(6, n))).collect(),
        allowed_address_pairs: (0..random.below(2))
            .map(|_| AddressPair { mac_address: None, ip_address: "192.168.7.0/24".parse().unwrap() })
            .collect(),
        admin_state_up: random.often(),
        qos: random.often().then(|| QosSpec {
            ingress: limit(random),
            egress: limit(random),
            dscp_mark: random.often().then(|| random.below(64)),
        }),
    }
}

fn network(random: &mut Random, number: u8) -> NetworkSpec {
    let segment = match number {
        0 => Some(SegmentSpec::Flat { physical_network: "public".to_owned() }),
        OUTSIDE => Some(SegmentSpec::Flat { physical_network: "second".to_owned() }),
        _ => Some(SegmentSpec::Vxlan { vni: 100 * u32::from(random.below(2)) + u32::from(number) }),
    };
    let remote = |random: &mut Random, host: u8| RemotePort {
        mac_address: format!("fa:16:3e:{number:02x}:99:{host:02x}"),
        ip_addresses: vec![[10, number, 0, host].into()],
        tunnel_ip: [192, 0, 2, 20 + random.below(3)].into(),
    };
    let ports: Vec<u8> = (10..16).filter(|_| random.often()).collect();
    NetworkSpec {
        id: NetworkId(id(1, number)),
        mtu: random.one(&[1450, 1400, 1280]),
        subnets: vec![SubnetSpec {
            id: SubnetId(id(2, number)),
            cidr: format!("10.{number}.0.0/24").parse().unwrap(),
            gateway_ip: None,
            service_ip: [10, number, 0, 2 + random.below(2)].into(),
            enable_dhcp: true,
            dns_nameservers: Vec::new(),
            host_routes: Vec::new(),
        }],
        ports: ports.into_iter().map(|host| port(random, number, host)).collect(),
        remote_ports: match number {
            0 | OUTSIDE => Vec::new(),
            _ => some(random, 100..104).into_iter().map(|host| remote(random, host)).collect(),
        },
        segment,
        ..NetworkSpec::default()
    }
}

/// Gateways are numbered downwards from 15; 15 and 14 are on one network, 13 on another.
fn gateway(random: &mut Random, here: bool, number: u8) -> RouterGateway {
    let network = if number == 13 { OUTSIDE } else { 0 };
    let floating = |random: &mut Random, floating: u8| FloatingIpSpec {
        id: mote_host_api::FloatingIpId(id(8, 3 * (15 - number) + floating)),
        floating_ip_address: [10, network, 0, 50 + 10 * (15 - number) + floating].into(),
        fixed_ip_address: random.often().then(|| [10, 1, 0, 10 + random.below(6)].into()),
        port_forwardings: vec![PortForwarding {
            protocol: ForwardedProtocol::Tcp,
            external_ports: (80, 80),
            internal_ip_address: [10, 1, 0, 10].into(),
            internal_ports: (8080, 8080),
        }],
        qos: random.often().then(|| QosSpec {
            egress: Some(BandwidthLimit { max_kbps: 1000 + u32::from(random.below(9)), max_burst_kbps: 0 }),
            ..QosSpec::default()
        }),
    };
    RouterGateway {
        place: if here { GatewayPlace::Here } else { GatewayPlace::Remote([192, 0, 2, 21].into()) },
        port_id: PortId(id(5, number)),
        network_id: NetworkId(id(1, network)),
        mac_address: format!("fa:16:3e:aa:00:{number:02x}"),
        addresses: [format!("10.{network}.0.{}/24", 200 + number), format!("fd00:{network}::{number}/64")]
            .map(|range| range.parse().unwrap())
            .into(),
        next_hop: random.often().then_some([10, network, 0, 1].into()),
        next_hop_v6: random.often().then(|| format!("fd00:{network}::1").parse().unwrap()),
        enable_snat: random.often(),
        floating_ips: some(random, 0..3).into_iter().map(|number| floating(random, number)).collect(),
    }
}

/// Networks of the overlay are always there together, so that a router's interfaces have somewhere to be.
pub fn desired(seed: u64) -> Desired {
    let mut random = Random(seed);
    let random = &mut random;
    let tunnel = Some(TunnelSpec { local_ip: IpAddr::from([192, 0, 2, 10]), udp_port: 4789 });
    let set = |random: &mut Random, number| AddressSetSpec {
        id: AddressSetId(id(7, number)),
        addresses: (0..random.below(9))
            .map(|n| match random.below(4) {
                0 => format!("fd00:1::{n}/{}", random.one(&[128, 125])).parse().unwrap(),
                1 => IpNet::new([10, 1, n, 0].into(), random.one(&[24, 29, 32])).unwrap(),
                _ => IpNet::new([10, 1, 0, n].into(), 32).unwrap(),
            })
            .collect(),
    };
    let mut desired = Desired {
        security_groups: (0..GROUPS).map(|number| group(random, number)).collect(),
        address_sets: (0..GROUPS).map(|number| set(random, number)).collect(),
        tunnel,
        ..Desired::default()
    };
    let outside = random.often();
    if outside {
        desired.networks.extend([0, OUTSIDE].map(|number| network(random, number)));
    }
    if !random.often() {
        return desired;
    }
    desired.networks.extend((1..NETWORKS).map(|number| network(random, number)));
    if random.often() {
        let interface = |number: u8| RouterInterface {
            port_id: PortId(id(5, number)),
            network_id: NetworkId(id(1, number)),
            mac_address: format!("fa:16:3e:aa:00:{number:02x}"),
            addresses: vec![format!("10.{number}.0.1/24").parse().unwrap()],
        };
        let interfaces: Vec<_> = (1..NETWORKS).filter(|_| random.often()).map(interface).collect();
        let routes = interfaces.first().filter(|_| random.often()).map(|interface| HostRoute {
            destination: "172.16.0.0/16".parse().unwrap(),
            nexthop: match interface.addresses[0].addr() {
                IpAddr::V4(ip) => (u32::from(ip) + 9).into(),
                IpAddr::V6(_) => unreachable!(),
            },
        });
        let elsewhere = !interfaces.is_empty() && random.below(2) == 0;
        let mut gateways = Vec::new();
        if elsewhere || outside {
            let numbers = random.one(&[&[15][..], &[15, 13], &[13, 15], &[14, 13, 15], &[15, 14]]);
            gateways.extend(numbers.iter().map(|number| gateway(random, !elsewhere, *number)));
        }
        let mut gateways = gateways.into_iter();
        desired.routers.push(RouterSpec {
            id: RouterId(id(9, 0)),
            admin_state_up: random.often(),
            routes: routes.into_iter().collect(),
            gateway: gateways.next(),
            extra_gateways: gateways.collect(),
            default_route_ecmp: random.below(2) == 0,
            interfaces,
            routes_v6: Vec::new(),
        });
    }
    desired
}

/// Chains and sets in the order of their names, elements of sets in theirs, counters at 0.
pub fn blocks(ruleset: &str) -> Vec<String> {
    let (mut table, mut current, mut blocks) = (String::new(), Vec::new(), Vec::new());
    for line in ruleset.lines().map(str::trim) {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        for at in 1..words.len() {
            if matches!(words[at - 1], "packets" | "bytes") {
                words[at] = "N";
            }
        }
        match line {
            _ if line.starts_with("table ") => table = words.join(" "),
            "}" => blocks.push(std::mem::take(&mut current)),
            "" => {}
            _ => current.push(words.join(" ")),
        }
    }
    let mut blocks: Vec<String> = blocks
        .into_iter()
        .filter(|block| !block.is_empty())
        .map(|block| {
            let is_chain = block[0].starts_with("chain");
            let text = block.join("\n");
            if is_chain {
                return format!("{table}: {text}");
            }
            let mut words: Vec<&str> = text.split([' ', '\n', ',']).filter(|word| !word.is_empty()).collect();
            words.sort_unstable();
            words.join(" ")
        })
        .collect();
    blocks.sort_unstable();
    blocks
}
