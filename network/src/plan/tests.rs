use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use mote_host_api::{
    FixedIp, NetworkId, NetworkSpec, PortId, PortSpec, RemotePort, SegmentSpec, ServerId, SubnetId,
    SubnetSpec, TunnelSpec,
};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::{
    names::{bridge_mac, tap_name},
    observed::{BridgePort, VxlanLink},
};

/// What the kernel does with a step, as far as the plan relies on it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kernel {
    networks: BTreeMap<NetworkKey, ObservedNamespace>,
    /// Sysctls that this kernel doesn't have.
    missing: BTreeSet<&'static str>,
}

impl Kernel {
    fn observe(&self) -> Vec<ObservedNetwork> {
        let networks = self.networks.iter();
        networks.map(|(key, namespace)| ObservedNetwork { key: *key, namespace: namespace.clone() }).collect()
    }

    fn sysctls(&self, all: &[(&'static str, &'static str)]) -> BTreeMap<&'static str, String> {
        let existing = all.iter().filter(|(path, _)| !self.missing.contains(path));
        existing.map(|(path, _)| (*path, "7".to_owned())).collect()
    }

    fn execute(&mut self, step: &Step) {
        match step.action {
            Action::DeleteNamespace => _ = self.networks.remove(&step.network),
            Action::CreateNamespace => {
                if let Some(ObservedNamespace::Live(_)) = self.networks.get(&step.network) {
                    return;
                }
                let mut sysctls = self.sysctls(SYSCTLS);
                sysctls.extend(self.sysctls(BRIDGE_NETFILTER_OFF));
                let content = NamespaceContent { sysctls, ..new_namespace() };
                self.networks.insert(step.network, ObservedNamespace::Live(content));
            }
            _ => {
                let bridge_sysctls = self.sysctls(BRIDGE_SYSCTLS);
                let missing = self.missing.clone();
                let Some(ObservedNamespace::Live(content)) = self.networks.get_mut(&step.network) else {
                    panic!("{step}: no namespace")
                };
                change(content, &step.action, bridge_sysctls, &missing);
            }
        }
    }
}

fn link_mut<'a>(content: &'a mut NamespaceContent, name: &str) -> &'a mut ObservedLink {
    content.links.iter_mut().find(|link| link.name == name).unwrap_or_else(|| panic!("no link {name}"))
}

fn port_mut<'a>(content: &'a mut NamespaceContent, name: &str) -> &'a mut BridgePort {
    link_mut(content, name).bridge_port.as_mut().unwrap_or_else(|| panic!("{name} is no port"))
}

fn change(
    content: &mut NamespaceContent,
    action: &Action,
    bridge_sysctls: BTreeMap<&'static str, String>,
    missing: &BTreeSet<&'static str>,
) {
    match action {
        Action::CreateNamespace | Action::DeleteNamespace => unreachable!(),
        Action::DeleteLink { link } => {
            content.links.retain(|other| other.name != *link);
            if link == VXLAN {
                content.tunnels.clear();
            }
            if link == BRIDGE {
                forget_bridge(content);
            }
        }
        Action::SetFilter { filter } => content.filter = Some(filter.digest()),
        Action::SetSysctls { settings } => {
            for (path, value) in settings.iter().filter(|(path, _)| !missing.contains(path)) {
                let before = content.sysctls.insert(path, (*value).to_owned());
                // inet_forward_change() of the kernel.
                let redirects = content.sysctls.get_mut("net/ipv4/conf/all/accept_redirects");
                let changes_forwarding = *path == "net/ipv4/ip_forward" && before.as_deref() != Some(value);
                if let (true, Some(redirects)) = (changes_forwarding, redirects) {
                    *redirects = "1".to_owned();
                }
            }
        }
        Action::CreateBridge { mac, mtu } => {
            if content.link(BRIDGE).is_none() {
                let kind = LinkKind::Bridge;
                let name = BRIDGE.to_owned();
                content.links.push(ObservedLink {
                    name,
                    kind,
                    alias: None,
                    up: false,
                    mtu: 0,
                    mac: None,
                    bridge_port: None,
                });
                content.sysctls.extend(bridge_sysctls);
            }
            assert_eq!(link_mut(content, BRIDGE).kind, LinkKind::Bridge);
            change(content, &Action::SetMac { link: BRIDGE.into(), mac: *mac }, BTreeMap::new(), missing);
            link_mut(content, BRIDGE).mtu = u32::from(*mtu);
        }
        Action::SetMac { link, mac } => {
            link_mut(content, link).mac = Some(*mac);
            content.neighbours.clear();
        }
        Action::SetMtu { link, mtu } => link_mut(content, link).mtu = u32::from(*mtu),
        Action::SetUp { link } => {
            if link == BRIDGE && !link_mut(content, link).up {
                content.neighbours.clear();
            }
            link_mut(content, link).up = true;
        }
        Action::DeleteAddress { address } => _ = content.addresses.remove(address),
        Action::AddAddress { address } => {
            link_mut(content, BRIDGE);
            content.addresses.insert(*address);
        }
        Action::DeleteNeighbour { ip } => _ = content.neighbours.remove(ip),
        Action::SetNeighbour { ip, mac } => {
            assert!(link_mut(content, BRIDGE).up);
            content.neighbours.insert(*ip, *mac);
        }
        Action::AttachPort { link } => {
            link_mut(content, BRIDGE);
            link_mut(content, link).bridge_port.get_or_insert_default();
        }
        Action::SetPortFlags { link, flags } => port_mut(content, link).flags = *flags,
        Action::CreateSegment { segment, mtu } => {
            let kind = match segment {
                Segment::Vxlan(vxlan) => LinkKind::Vxlan(*vxlan),
                Segment::Uplink { .. } => LinkKind::Other,
            };
            content.links.retain(|other| other.name != segment.link_name());
            content.tunnels.clear();
            content.links.push(ObservedLink {
                name: segment.link_name().to_owned(),
                kind,
                alias: segment.alias(),
                up: false,
                mtu: u32::from(*mtu),
                mac: None,
                bridge_port: None,
            });
        }
        Action::SetTunnel { mac, host } => _ = content.tunnels.insert(*mac, *host),
        Action::DeleteTunnel { mac } => _ = content.tunnels.remove(mac),
        Action::DeleteStation { link, mac } => _ = port_mut(content, link).stations.remove(mac),
        Action::AddStation { link, mac } => _ = port_mut(content, link).stations.insert(*mac),
    }
}

fn forget_bridge(content: &mut NamespaceContent) {
    content.addresses.clear();
    content.neighbours.clear();
    content.links.iter_mut().for_each(|link| link.bridge_port = None);
    BRIDGE_SYSCTLS.iter().for_each(|(path, _)| _ = content.sysctls.remove(path));
}

// A small world, so that what is desired and what exists often meet.

fn id(kind: u8, index: u8) -> Uuid {
    Uuid::from_bytes([kind, index, 0, 0, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, 0])
}

fn mac(index: u8) -> MacAddress {
    MacAddress([0xfa, 0x16, 0x3e, 0, 0, index])
}

fn ip(subnet: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, subnet, host)
}

prop_compose! {
    fn subnet(index: u8)(host in 1u8..5, len in 24u8..=25) -> SubnetSpec {
        SubnetSpec {
            id: SubnetId(id(2, index)),
            cidr: Ipv4Net::new(ip(index, 0), len).unwrap(),
            gateway_ip: None,
            service_ip: ip(index, host),
            enable_dhcp: true,
            dns_nameservers: vec![],
            host_routes: vec![],
        }
    }
}

prop_compose! {
    // Some ports are bad: same Ethernet address or IP address as others, a subnet that isn't there.
    fn port(index: u8)(mac_index in 0u8..8, subnet in 0u8..2, shared in prop::bool::weighted(0.1), addresses in 0usize..3) -> PortSpec {
        let host = if shared { 10 } else { 10 + index };
        let fixed = |i: usize| FixedIp {
            subnet_id: SubnetId(id(2, subnet)),
            ip_address: ip(subnet, host + 10 * i as u8),
        };
        PortSpec {
            id: PortId(id(3, index)),
            server_id: ServerId(id(4, index)),
            port_security: index > 0,
            mac_address: mac(if mac_index == 0 { 0 } else { index }).to_string(),
            fixed_ips: (0..addresses).map(fixed).collect(),
            ..PortSpec::default()
        }
    }
}

fn segment() -> impl Strategy<Value = SegmentSpec> {
    prop_oneof![
        (1u32..3).prop_map(|vni| SegmentSpec::Vxlan { vni }),
        Just(SegmentSpec::Flat { physical_network: "a".to_owned() }),
        Just(SegmentSpec::Flat { physical_network: "b".to_owned() }),
    ]
}

prop_compose! {
    fn segment_link()(vni in 1u32..3, vxlan: bool, a: bool, up: bool, port in prop::option::of(bridge_port()))
        -> ObservedLink {
        let kind = if vxlan { LinkKind::Vxlan(VxlanLink { vni, local: ip(9, 9).into(), port: 4789 }) } else { LinkKind::Other };
        let alias = (!vxlan).then(|| format!("flat:{}", if a { 'a' } else { 'b' }));
        let name = if vxlan { VXLAN } else { UPLINK };
        ObservedLink { name: name.to_owned(), kind, alias, up, mtu: 1500, mac: None, bridge_port: port }
    }
}

prop_compose! {
    fn network(index: u8)(
        mtu in prop_oneof![9 => Just(1500u16), 4 => Just(9000), 1 => Just(0)],
        subnets in (subnet(0), subnet(1)),
        subnet_count in prop_oneof![1 => 0usize..2, 4 => 2usize..=2],
        ports in (port(0), port(1), port(2)),
        port_count in 0usize..=3,
        segment in prop::option::of(segment()),
        remote in prop::collection::btree_map(20u8..23, 1u8..3, 0..3),
    ) -> NetworkSpec {
        let mut subnets = vec![subnets.0, subnets.1];
        subnets.truncate(subnet_count);
        let mut ports = vec![ports.0, ports.1, ports.2];
        ports.truncate(port_count);
        let overlay = matches!(segment, Some(SegmentSpec::Vxlan { .. }));
        let remote = remote.into_iter().filter(|_| overlay);
        let remote_ports = remote.map(|(port, host)| RemotePort {
            mac_address: mac(port).to_string(),
            ip_addresses: vec![ip(0, port).into()],
            tunnel_ip: ip(9, host).into(),
        });
        let remote_ports = remote_ports.collect();
        NetworkSpec { id: NetworkId(id(1, index)), mtu, subnets, ports, segment, remote_ports, ..NetworkSpec::default() }
    }
}

fn desired() -> impl Strategy<Value = Vec<NetworkSpec>> {
    (network(0), network(1), network(2), prop::sample::subsequence(vec![0usize, 1, 2, 2], 0..=4))
        .prop_map(|(a, b, c, chosen)| chosen.into_iter().map(|i| [&a, &b, &c][i].clone()).collect())
}

prop_compose! {
    fn bridge_port()(learning: bool, flood: bool, hairpin: bool, stations in prop::collection::btree_set(0u8..4, 0..3))
        -> BridgePort {
        BridgePort { flags: PortFlags { learning, flood, hairpin, ..PortFlags::UPLINK }, stations: stations.into_iter().map(mac).collect() }
    }
}

prop_compose! {
    fn link(name: String)(
        kind in prop_oneof![4 => Just(LinkKind::Tun), 1 => Just(LinkKind::Other), 1 => Just(LinkKind::Bridge)],
        up: bool,
        mtu in prop::sample::select(vec![1500u32, 9000, 65536]),
        mac_index in 0u8..4,
        port in prop::option::of(bridge_port()),
    ) -> ObservedLink {
        ObservedLink { name: name.clone(), kind, alias: None, up, mtu, mac: Some(mac(mac_index)), bridge_port: port }
    }
}

fn taps(indices: Vec<u8>) -> impl Strategy<Value = Vec<ObservedLink>> {
    indices.into_iter().map(|i| link(tap_name(PortId(id(3, i))))).collect::<Vec<_>>()
}

prop_compose! {
    fn bridge(network: u8)(
        kind in prop_oneof![4 => Just(LinkKind::Bridge), 1 => Just(LinkKind::Tun)],
        up: bool,
        mtu in prop::sample::select(vec![1500u32, 9000]),
        right_mac: bool,
    ) -> ObservedLink {
        let mac = if right_mac { bridge_mac(NetworkId(id(1, network))) } else { mac(9) };
        ObservedLink { name: BRIDGE.to_owned(), kind, alias: None, up, mtu, mac: Some(mac), bridge_port: None }
    }
}

prop_compose! {
    fn content(network: u8)(
        bridge in prop::option::weighted(0.8, bridge(network)),
        lo_up: bool,
        links in prop::sample::subsequence(vec![0u8, 1, 2, 3, 4], 0..4).prop_flat_map(taps),
        other in link("sit0".to_owned()),
        segment in prop::option::of(segment_link()),
        tunnels in prop::collection::btree_map(20u8..23, 1u8..3, 0..3),
        addresses in prop::collection::btree_set((0u8..2, 1u8..5, 24u8..=25), 0..4),
        neighbours in prop::collection::btree_map((0u8..2, 0u8..3, 0u8..2), prop::bool::weighted(0.8), 0..8),
        sysctls in prop::collection::vec(prop::sample::select(vec!["0", "1"]), SYSCTLS.len() + 2 + BRIDGE_SYSCTLS.len()),
    ) -> NamespaceContent {
        let bridge_is_bridge = bridge.as_ref().is_some_and(|bridge| bridge.kind == LinkKind::Bridge);
        let has_other = bridge.is_some() && !bridge_is_bridge;
        let mut content = new_namespace();
        content.links[0].up = lo_up;
        content.links.extend(links);
        content.links.extend(bridge);
        content.links.push(other);
        if segment.as_ref().is_some_and(|link| link.name == VXLAN) {
            content.tunnels = tunnels.into_iter().map(|(port, host)| (mac(port), ip(9, host).into())).collect();
        }
        content.links.extend(segment);
        let paths = SYSCTLS.iter().chain(BRIDGE_NETFILTER_OFF).chain(BRIDGE_SYSCTLS).map(|(path, _)| *path);
        content.sysctls = paths.zip(sysctls).map(|(path, value)| (path, value.to_owned())).collect();
        content.addresses =
            addresses.into_iter().map(|(s, h, len)| IpNet::new(ip(s, h).into(), len).unwrap()).collect();
        content.neighbours = neighbours
            .into_iter()
            .map(|((subnet, port, i), right)| (IpAddr::V4(ip(subnet, 10 + port + 10 * i)), mac(if right { port } else { 9 })))
            .collect();
        if !bridge_is_bridge {
            let links = content.links.clone();
            forget_bridge(&mut content);
            if has_other {
                // Something else that took the bridge's name can have ports, too.
                content.links = links;
            }
        }
        content
    }
}

fn observed_namespace(network: u8) -> impl Strategy<Value = Option<ObservedNamespace>> {
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(ObservedNamespace::Broken)),
        4 => content(network).prop_map(|content| Some(ObservedNamespace::Live(content))),
    ]
}

fn kernel() -> impl Strategy<Value = Kernel> {
    let all: Vec<&'static str> =
        SYSCTLS.iter().chain(BRIDGE_NETFILTER_OFF).chain(BRIDGE_SYSCTLS).map(|(path, _)| *path).collect();
    let networks = (0u8..4).map(observed_namespace).collect::<Vec<_>>();
    (networks, prop::sample::subsequence(all, 0..4)).prop_map(|(networks, missing)| {
        let missing: BTreeSet<&'static str> = missing.into_iter().collect();
        let named = networks.into_iter().enumerate();
        let mut networks: BTreeMap<NetworkKey, ObservedNamespace> =
            named.filter_map(|(i, namespace)| Some((NetworkId(id(1, i as u8)).into(), namespace?))).collect();
        for namespace in networks.values_mut() {
            if let ObservedNamespace::Live(content) = namespace {
                content.sysctls.retain(|path, _| !missing.contains(path));
            }
        }
        Kernel { networks, missing }
    })
}

/// States what is desired without any of the plan's own comparisons.
fn assert_is_desired(kernel: &Kernel, desired: &[NetworkSpec]) {
    let (configs, errors) =
        spec::configure(&with_tunnel(desired), Conntrack::BridgeNetfilter, &mut Memory::default());
    let refused: BTreeSet<NetworkKey> = errors.iter().map(|error| error.network.into()).collect();
    let wanted: BTreeSet<NetworkKey> = configs.iter().map(|config| config.key).collect();
    let existing: BTreeSet<NetworkKey> = kernel.networks.keys().copied().collect();
    assert_eq!(existing.difference(&refused).copied().collect::<BTreeSet<_>>(), wanted);
    for config in &configs {
        let Some(ObservedNamespace::Live(content)) = kernel.networks.get(&config.key) else {
            panic!("not live")
        };
        assert!(content.link("lo").unwrap().up);
        let bridge = content.link(BRIDGE).unwrap();
        assert_eq!(
            (bridge.kind, bridge.up, bridge.mtu, bridge.mac),
            (LinkKind::Bridge, true, u32::from(config.mtu), Some(config.bridge_mac))
        );
        assert_eq!(content.filter, Some(config.filter.digest()));
        let bridge_netfilter = content.sysctls.get(BRIDGE_NETFILTER_ON[0].0);
        assert!(bridge_netfilter.is_none_or(|value| (value == "1") == config.bridge_netfilter));
        assert_eq!(content.addresses, config.addresses);
        assert_eq!(content.neighbours, config.neighbours());
        let segment = config.segment.as_ref().map(Segment::link_name);
        assert!(segment.is_none_or(|name| content.link(name).is_some()));
        if segment == Some(VXLAN) {
            assert_eq!(content.tunnels, config.tunnels);
        }
        for (path, value) in
            SYSCTLS.iter().chain(BRIDGE_SYSCTLS).filter(|(path, _)| !kernel.missing.contains(path))
        {
            assert_eq!(content.sysctls[path], *value, "{path}");
        }
        for link in content.links.iter().filter(|link| link.name != "lo" && link.name != BRIDGE) {
            if let Some(segment) = config.segment.as_ref().filter(|segment| segment.link_name() == link.name)
            {
                assert!(segment.is(link));
                let stations = config.tunnels.keys().copied().collect();
                let wanted = BridgePort { flags: segment.flags(), stations };
                assert_eq!(
                    (link.up, link.mtu, &link.bridge_port),
                    (true, u32::from(config.mtu), &Some(wanted))
                );
                continue;
            }
            let Some(port) = config.ports.get(&link.name) else {
                assert_eq!((link.kind, &link.bridge_port), (LinkKind::Other, &None));
                continue;
            };
            let wanted = BridgePort { flags: PortFlags::GUEST, stations: [port.mac].into() };
            assert_eq!((link.up, link.mtu, &link.bridge_port), (true, u32::from(config.mtu), &Some(wanted)));
        }
    }
}

fn with_tunnel(desired: &[NetworkSpec]) -> Desired {
    let tunnel = Some(TunnelSpec { local_ip: ip(9, 9).into(), udp_port: 4789 });
    Desired { tunnel, ..desired.into() }
}

fn plan_networks(desired: &[NetworkSpec], observed: &[ObservedNetwork]) -> Plan {
    plan(&with_tunnel(desired), Conntrack::BridgeNetfilter, observed)
}

fn execute_all(kernel: &mut Kernel, steps: &[Step]) {
    steps.iter().for_each(|step| kernel.execute(step));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn executing_a_plan_reaches_what_is_desired_and_then_nothing_is_left_to_do(
        desired in desired(), mut kernel in kernel()
    ) {
        let before = kernel.clone();
        let first = plan_networks(&desired, &kernel.observe());
        execute_all(&mut kernel, &first.steps);
        assert_is_desired(&kernel, &desired);
        let second = plan_networks(&desired, &kernel.observe());
        prop_assert_eq!(&second.steps, &vec![]);
        prop_assert_eq!(&first.refused, &second.refused);
        for error in &first.refused {
            let key = NetworkKey::from(error.network);
            prop_assert_eq!(before.networks.get(&key), kernel.networks.get(&key));
        }
    }

    #[test]
    fn a_crash_after_any_step_is_made_good_by_the_next_plan(
        desired in desired(), mut kernel in kernel(), crash in any::<prop::sample::Index>()
    ) {
        let steps = plan_networks(&desired, &kernel.observe()).steps;
        execute_all(&mut kernel, &steps[..crash.index(steps.len() + 1)]);
        let rest = plan_networks(&desired, &kernel.observe()).steps;
        execute_all(&mut kernel, &rest);
        assert_is_desired(&kernel, &desired);
    }

    #[test]
    fn every_step_can_be_repeated(desired in desired(), mut kernel in kernel()) {
        for step in plan_networks(&desired, &kernel.observe()).steps {
            kernel.execute(&step);
            let once = kernel.clone();
            kernel.execute(&step);
            prop_assert_eq!(&once, &kernel, "{}", step);
        }
        assert_is_desired(&kernel, &desired);
    }

    #[test]
    fn without_any_desired_network_everything_goes(mut kernel in kernel()) {
        let steps = plan_networks(&[], &kernel.observe()).steps;
        execute_all(&mut kernel, &steps);
        prop_assert!(kernel.networks.is_empty());
    }
}
