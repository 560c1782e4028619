//! kill -9 in the middle of any step of random plans, on a real kernel: the next pass of another process gives exactly what
//! is desired, as a host has it that never knew anything else, and the pass after that has nothing to do. Networks,
//! routers, the overlay, uplinks, filters, QoS.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    net::IpAddr,
    process::{Command, Stdio},
    time::Duration,
};

use harness::{cloud::Cloud, run};
use ipnet::IpNet;
use mote_host_api::{
    AddressPair, AddressSetId, AddressSetSpec, BandwidthLimit, Direction, EtherType, FixedIp, FixedIpV6,
    FloatingIpSpec, ForwardedProtocol, GatewayPlace, HostRoute, NetworkId, NetworkSpec, PortForwarding,
    PortId, PortSpec, Protocol, QosSpec, Remote, RemotePort, RouterGateway, RouterId, RouterInterface,
    RouterSpec, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec, SegmentSpec, ServerId, SubnetId,
    SubnetSpec, TunnelSpec,
};
use mote_network::{Config, Desired, Executor, namespace, plan, plan_routers};
use uuid::Uuid;

const NETWORKS: u8 = 3;
const GROUPS: u8 = 3;

/// SplitMix64: the same numbers from the same seed, in every process.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u8) -> u8 {
        (self.next() % u64::from(end)) as u8
    }

    fn often(&mut self) -> bool {
        self.below(4) != 0
    }

    fn one<T: Clone>(&mut self, choices: &[T]) -> T {
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
    let rules = (0..random.below(5)).map(|_| SecurityGroupRule {
        direction: random.one(&[Direction::Ingress, Direction::Egress]),
        ethertype: EtherType::Ipv4,
        protocol: match random.below(4) {
            0 => Protocol::Any,
            1 => Protocol::Icmp { icmp_type: Some(8), code: None },
            2 => Protocol::Udp { ports: None },
            _ => Protocol::Tcp { ports: Some((u16::from(random.below(9)) + 1, 20)) },
        },
        remote: match random.below(3) {
            0 => None,
            1 => Some(Remote::Cidr(IpNet::new([10, random.below(3), 0, 0].into(), 16).unwrap())),
            _ => Some(Remote::Set(AddressSetId(id(7, random.below(GROUPS))))),
        },
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
            0 => Vec::new(),
            _ => some(random, 100..104).into_iter().map(|host| remote(random, host)).collect(),
        },
        segment,
        ..NetworkSpec::default()
    }
}

fn gateway(random: &mut Random, here: bool) -> RouterGateway {
    let floating = |random: &mut Random, number: u8| FloatingIpSpec {
        id: mote_host_api::FloatingIpId(id(8, number)),
        floating_ip_address: [10, 0, 0, 50 + number].into(),
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
        port_id: PortId(id(5, 15)),
        network_id: NetworkId(id(1, 0)),
        mac_address: "fa:16:3e:aa:00:0f".to_owned(),
        addresses: vec!["10.0.0.9/24".parse().unwrap()],
        next_hop: Some([10, 0, 0, 1].into()),
        next_hop_v6: None,
        enable_snat: random.often(),
        floating_ips: some(random, 0..3).into_iter().map(|number| floating(random, number)).collect(),
    }
}

/// Networks of the overlay are always there together, so that a router's interfaces have somewhere to be.
fn desired(seed: u64) -> Desired {
    let mut random = Random(seed);
    let random = &mut random;
    let tunnel = Some(TunnelSpec { local_ip: IpAddr::from([192, 0, 2, 10]), udp_port: 4789 });
    let set = |random: &mut Random, number| AddressSetSpec {
        id: AddressSetId(id(7, number)),
        addresses: (0..random.below(9)).map(|n| IpNet::new([10, 1, 0, n].into(), 32).unwrap()).collect(),
    };
    let mut desired = Desired {
        security_groups: (0..GROUPS).map(|number| group(random, number)).collect(),
        address_sets: (0..GROUPS).map(|number| set(random, number)).collect(),
        tunnel,
        ..Desired::default()
    };
    let outside = random.often();
    if outside {
        desired.networks.push(network(random, 0));
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
        desired.routers.push(RouterSpec {
            id: RouterId(id(9, 0)),
            admin_state_up: random.often(),
            routes: routes.into_iter().collect(),
            gateway: (elsewhere || outside).then(|| gateway(random, !elsewhere)),
            interfaces,
            routes_v6: Vec::new(),
        });
    }
    desired
}

/// One pass. Everything must succeed, unless this process is there to be killed.
async fn pass(executor: &Executor, desired: &Desired) -> usize {
    let steps = plan(desired, executor.conntrack().await, &executor.observe().await.unwrap());
    assert_eq!(steps.refused, []);
    for step in &steps.steps {
        executor.execute(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
    let (routers, refused) = plan_routers(desired, &executor.observe_routers().await.unwrap());
    assert_eq!(refused, []);
    for step in &routers {
        executor.execute_router(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
    steps.steps.len() + routers.len()
}

/// One pass leads there, and another has nothing to do.
async fn reach(executor: &Executor, desired: &Desired) {
    pass(executor, desired).await;
    assert_eq!(pass(executor, desired).await, 0, "a second pass has nothing to do");
}

/// Everything that a kernel has of it, by the rest of the namespaces' names.
fn contents(prefix: &str) -> BTreeMap<String, Vec<String>> {
    let names = namespace::list().unwrap();
    let own = names.iter().filter_map(|name| Some((name, name.strip_prefix(prefix)?)));
    own.map(|(name, rest)| (rest.to_owned(), content(name))).collect()
}

fn content(namespace: &str) -> Vec<String> {
    let inside = |script: &str| run("ip", ["netns", "exec", namespace, "sh", "-c", script]);
    let sorted = |text: String, keep: fn(&str) -> bool| {
        let mut lines: Vec<String> = text.lines().filter(|line| keep(line)).map(without_index).collect();
        lines.sort_unstable();
        lines
    };
    let mut all = blocks(&inside("nft list ruleset"));
    // Devices that a kernel puts into every namespace by itself are the same everywhere.
    // The carrier follows a little later.
    let link = |line: &str| !line.contains("@if") || line.contains("rtr") || line.contains("uplink");
    all.extend(sorted(
        inside(
            "ip -o link | cut -d' ' -f2-5 | sed 's/@[^ :]*//; s/NO-CARRIER,//; s/,LOWER_UP//; s/,M-DOWN//'",
        ),
        link,
    ));
    all.extend(sorted(inside("ip -o address show scope global; ip -o address show scope host"), |_| true));
    all.extend(sorted(inside("ip route; ip -6 route show proto static"), |_| true));
    all.extend(sorted(inside("ip neighbour show nud permanent"), |_| true));
    let pushed = |line: &str| line.contains(" dst ") || line.contains(" static");
    all.extend(sorted(inside("bridge fdb show"), pushed));
    all.extend(sorted(inside("bridge -d -o link show | sed 's/state [a-z]*//; s/@[^ :]*//'"), |_| true));
    all
}

/// Without the leading index of a link, and runs of spaces.
fn without_index(line: &str) -> String {
    let line =
        line.split_once(": ").filter(|(index, _)| index.parse::<u32>().is_ok()).map_or(line, |(_, l)| l);
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Chains and sets in the order of their names, elements of sets in theirs, counters at 0.
fn blocks(ruleset: &str) -> Vec<String> {
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

/// Set in the process that shall be killed: prefix, host's namespace, first seed.
const VICTIM: &str = "MOTE_TEST_CRASH_VICTIM";
const NAME: &str = "what_a_process_leaves_that_is_killed_anywhere_is_made_exactly_what_is_desired";

fn config(prefix: &str, host: &str) -> Config {
    Config {
        prefix: prefix.to_owned(),
        host_namespace: Some(host.to_owned()),
        physical_networks: [("public".to_owned(), "br-public".to_owned())].into(),
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_process_leaves_that_is_killed_anywhere_is_made_exactly_what_is_desired() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    if let Ok(victim) = std::env::var(VICTIM) {
        let [prefix, host, seed] = victim.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let executor = Executor::new(config(prefix, host));
        for seed in seed.parse().unwrap().. {
            println!("pass {seed}");
            pass(&executor, &desired(seed)).await;
        }
    }
    let rounds = std::env::var("MOTE_TEST_CRASHES").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let start: u64 = rounds * u64::from(std::process::id());
    println!("seeds from {start}");
    // The second host never crashes and is made anew in each round.
    let cloud = Cloud::new(2);
    let [subject, twin] = &cloud.hosts[..] else { panic!() };
    for round in 0..rounds {
        let seed = start + 1000 * round;
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", NAME, "--nocapture"]).stdout(Stdio::piped());
        victim.env(VICTIM, format!("{} {} {seed}", subject.lab.prefix, subject.namespace));
        let mut victim = victim.spawn().unwrap();
        let mut output = BufReader::new(victim.stdout.take().unwrap()).lines();
        let passes = 1 + Random(seed).below(3);
        for _ in 0..passes {
            assert!(output.any(|line| line.unwrap().contains("pass")), "the victim ended by itself");
        }
        std::thread::sleep(Duration::from_micros(Random(seed).next() % 400_000));
        victim.kill().unwrap();
        victim.wait().unwrap();

        let goal = desired(seed + 500);
        let successor = Executor::new(config(&subject.lab.prefix, &subject.namespace));
        reach(&successor, &goal).await;
        reach(&twin.lab.executor, &goal).await;
        let (left, right) = (contents(&subject.lab.prefix), contents(&twin.lab.prefix));
        assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>(), "seed {seed}");
        for (name, content) in &left {
            let other = &right[name];
            let only =
                |a: &[String], b: &[String]| a.iter().filter(|l| !b.contains(l)).cloned().collect::<Vec<_>>();
            assert_eq!((only(content, other), only(other, content)), (vec![], vec![]), "seed {seed}, {name}");
            assert_eq!(content.len(), other.len(), "seed {seed}, {name}");
        }
        reach(&twin.lab.executor, &Desired::default()).await;
    }
    reach(&subject.lab.executor, &Desired::default()).await;
    for host in &cloud.hosts {
        assert_eq!(host.lab.names(), Vec::<String>::new());
    }
}
