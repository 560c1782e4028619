//! The filter of one network.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mote_host_api::{
    AddressSetId, AddressSetSpec, Direction, EtherType, NetworkSpec, PortId, PortSpec, Remote,
    SecurityGroupId, SecurityGroupSpec, host_net,
};

use super::{
    limits::limits,
    memory::{Input, Memory},
    rules::{View, elements, matching, rules, set_name},
    ruleset::{Chain, Family, Fragment, FragmentKey, GENERATION, Ruleset},
};
use crate::{
    names::{BRIDGE, METADATA_IP, METADATA_IP_V6, MacAddress, bridge_mac, tap_name},
    spec::{SpecProblem, station_mac},
};

/// Where conntrack sees bridged packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Conntrack {
    /// In the inet family, by br_netfilter.
    #[default]
    BridgeNetfilter,
    /// In the bridge family.
    Bridge,
    /// Nowhere: ports can't be filtered, and so networks with ports that shall be are refused.
    Missing,
}

/// What the ports of networks refer to, by id.
#[derive(Debug, Default)]
pub struct Surroundings<'a> {
    groups: HashMap<SecurityGroupId, &'a SecurityGroupSpec>,
    sets: HashMap<AddressSetId, &'a AddressSetSpec>,
    conntrack: Conntrack,
}

impl<'a> Surroundings<'a> {
    /// Of these groups and sets.
    pub fn new(groups: &'a [SecurityGroupSpec], sets: &'a [AddressSetSpec], conntrack: Conntrack) -> Self {
        Self {
            groups: groups.iter().map(|group| (group.id, group)).collect(),
            sets: sets.iter().map(|set| (set.id, set)).collect(),
            conntrack,
        }
    }
}

/// What a guest may be told by (DHCP, router advertisements) and what it thus may not send.
const SERVER_GUARD: [&str; 3] = [
    "meta l4proto udp udp sport 67 udp dport 68 drop",
    "meta l4proto udp udp sport 547 udp dport 546 drop",
    "icmpv6 type { 134, 137 } drop",
];

/// Sets that the chains of all ports name: name, kind, elements.
const SHARED: [(&str, &str, &[&str]); 3] = [
    ("ethertypes", "type ether_type;", &["arp", "ip", "ip6"]),
    ("advertised", "type icmpv6_type;", &["134", "137"]),
    ("unspecified", "type icmpv6_type;", &["135", "143"]),
];

/// A port as the filter needs it.
struct FilteredPort<'a> {
    tap: String,
    spec: &'a PortSpec,
    index: u16,
    stateful: bool,
}

/// The filter of a network's ports here.
///
/// # Errors
/// When a port refers to what isn't described.
pub fn filter(
    network: &NetworkSpec,
    around: &Surroundings<'_>,
    memory: &mut Memory,
) -> Result<Ruleset, SpecProblem> {
    let mut base = Fragment::default();
    input(&mut base);
    beyond(&mut base, network);
    let ports = filtered_ports(network, around)?;
    let down = network.ports.iter().filter(|port| !port.admin_state_up);
    let down: BTreeSet<String> = down.map(|port| tap_name(port.id)).collect();
    let limited = |port: &&PortSpec| port.admin_state_up && !port.port_security && port.qos.is_some();
    let limited: Vec<&PortSpec> = network.ports.iter().filter(limited).collect();
    if ports.is_empty() && down.is_empty() && limited.is_empty() {
        return Ok(base.into());
    }
    bridge_chains(&mut base, &ports, &down);
    let mut fragments = BTreeMap::new();
    for spec in limited {
        let key = FragmentKey::Port(spec.id);
        let made =
            memory.fragment(key, Input::Port(Cow::Borrowed(spec), 0, true, None), || limits_only(spec))?;
        fragments.insert(key, made);
    }
    if !ports.is_empty() {
        let family = match around.conntrack {
            Conntrack::BridgeNetfilter => Family::Inet,
            Conntrack::Bridge => Family::Bridge,
            Conntrack::Missing => return Err(SpecProblem::NoConntrack),
        };
        stateful_chains(&mut base, family);
        group_fragments(&mut fragments, family, &ports, around, memory)?;
        for port in &ports {
            let key = FragmentKey::Port(port.spec.id);
            let input = Input::Port(Cow::Borrowed(port.spec), port.index, port.stateful, Some(family));
            fragments.insert(key, memory.fragment(key, input, || port_fragment(family, port))?);
        }
    }
    fragments.insert(FragmentKey::Base, base.finish());
    Ok(fragments.into_iter().collect())
}

/// A port that is limited and not filtered.
fn limits_only(spec: &PortSpec) -> Result<Fragment, SpecProblem> {
    let mut fragment = Fragment::default();
    let (out, into) = limits(spec.qos.as_ref())?;
    let tap = tap_name(spec.id);
    fragment.rules(Family::Bridge, format!("f-{tap}"), out);
    fragment.rules(Family::Bridge, format!("t-{tap}"), into);
    put_in_maps(&mut fragment, &tap);
    Ok(fragment)
}

const INTERFACE_MAP: &str = "type ifname : verdict;";

/// Frames from and to the port pass its chains.
fn put_in_maps(fragment: &mut Fragment, tap: &str) {
    for (map, initial) in [("from", 'f'), ("to", 't')] {
        let elements = &mut fragment.set(Family::Bridge, map, INTERFACE_MAP).elements;
        elements.insert(format!("\"{tap}\""), Some(format!("jump {initial}-{tap}")));
    }
}

fn filtered_ports<'a>(
    network: &'a NetworkSpec,
    around: &Surroundings<'_>,
) -> Result<Vec<FilteredPort<'a>>, SpecProblem> {
    let mut taken = BTreeSet::new();
    let mut specs: Vec<&PortSpec> =
        network.ports.iter().filter(|port| port.port_security && port.admin_state_up).collect();
    specs.sort_unstable_by_key(|port| port.id);
    let port = |spec: &'a PortSpec| {
        let mut stateful = None;
        for id in &spec.security_groups {
            let group = around.groups.get(id).ok_or(SpecProblem::UnknownGroup(spec.id, *id))?;
            if *stateful.get_or_insert(group.stateful) != group.stateful {
                return Err(SpecProblem::MixedGroups(spec.id));
            }
        }
        let index = index(spec.id, &mut taken);
        Ok(FilteredPort { tap: tap_name(spec.id), spec, index, stateful: stateful.unwrap_or(true) })
    };
    specs.into_iter().map(port).collect()
}

/// A number that follows from the port's id and rarely depends on the other ports: changing it would change the rules of
/// a port to which nothing has happened.
fn index(port: PortId, taken: &mut BTreeSet<u16>) -> u16 {
    let mut index = (port.0.as_u128() % 0xffff) as u16;
    loop {
        index = index.checked_add(1).unwrap_or(1);
        if taken.insert(index) {
            return index;
        }
    }
}

fn stations(spec: &PortSpec) -> Result<Stations, SpecProblem> {
    let own = station_mac(spec).ok_or_else(|| SpecProblem::Mac(spec.id, spec.mac_address.clone()))?;
    let mut stations = BTreeMap::new();
    let fixed = spec.fixed_ips.iter().map(|fixed| IpAddr::V4(fixed.ip_address));
    let fixed = fixed.chain(spec.fixed_ips_v6.iter().map(|fixed| IpAddr::V6(fixed.ip_address)));
    stations.insert(own, fixed.map(host_net).collect::<Vec<_>>());
    for pair in &spec.allowed_address_pairs {
        let mac = match &pair.mac_address {
            Some(text) => text.parse::<MacAddress>().ok().filter(|mac| mac.is_station()),
            None => Some(own),
        };
        let mac =
            mac.ok_or_else(|| SpecProblem::Mac(spec.id, pair.mac_address.clone().unwrap_or_default()))?;
        stations.entry(mac).or_default().push(pair.ip_address);
    }
    for (mac, ranges) in &mut stations {
        ranges.push(host_net(IpAddr::V6(mac.link_local())));
    }
    Ok(stations)
}

/// What guests may ask this host for.
fn input(base: &mut Fragment) {
    let rules = vec![
        format!("iifname != \"{BRIDGE}\" accept"),
        // Answers to what was begun on the host (an operator's ping or curl inside the namespace).
        "ct state established ct direction reply accept".to_owned(),
        "udp dport { 53, 67, 547 } accept".to_owned(),
        "tcp dport 53 accept".to_owned(),
        format!("ip daddr {METADATA_IP} tcp dport 80 accept"),
        format!("ip6 daddr {METADATA_IP_V6} tcp dport 80 accept"),
        // Echo requests and what belongs to a connection.
        "icmp type { 3, 8, 11, 12 } accept".to_owned(),
        "icmpv6 type { 1, 2, 3, 4, 128, 133, 135, 136 } accept".to_owned(),
        "counter name denied-host drop".to_owned(),
    ];
    base.counter(Family::Inet, "denied-host");
    let hook = Some("type filter hook input priority 0; policy drop;");
    base.chain(Family::Inet, "input", Chain { hook, rules });
}

/// Frames to the bridge itself that are for somebody behind it: nobody is. The host would drop them, too, without a word.
fn beyond(base: &mut Fragment, network: &NetworkSpec) {
    let v4 = network.subnets.iter().map(|subnet| subnet.service_ip).chain([METADATA_IP]);
    let services = base.set(Family::Bridge, "services4", "type ipv4_addr;");
    services.elements.extend(v4.map(|ip| (ip.to_string(), None)));
    let services = base.set(Family::Bridge, "services6", "type ipv6_addr;");
    services.elements.insert(METADATA_IP_V6.to_string(), None);
    base.counter(Family::Bridge, "denied-beyond");
    let to_bridge = format!("ether daddr {}", bridge_mac(network.id));
    let rules = [("ip", "services4"), ("ip6", "services6")].map(|(version, set)| {
        format!("{to_bridge} {version} daddr != @{set} counter name denied-beyond drop")
    });
    let hook = Some("type filter hook input priority 0; policy accept;");
    base.chain(Family::Bridge, "input", Chain { hook, rules: rules.to_vec() });
}

fn bridge_chains(base: &mut Fragment, ports: &[FilteredPort<'_>], down: &BTreeSet<String>) {
    for (name, kind, elements) in SHARED.iter().filter(|_| !ports.is_empty()) {
        let set = base.set(Family::Bridge, *name, kind);
        set.elements.extend(elements.iter().map(|element| ((*element).to_owned(), None)));
    }
    for name in ["from", "to"] {
        let map = base.set(Family::Bridge, name, INTERFACE_MAP);
        map.elements.extend(down.iter().map(|tap| (format!("\"{tap}\""), Some("drop".to_owned()))));
    }
    // Before br_netfilter (priority 0 at prerouting, -1 at forward).
    let hook = Some("type filter hook prerouting priority -250; policy accept;");
    base.chain(Family::Bridge, "prerouting", Chain { hook, rules: vec!["iifname vmap @from".to_owned()] });
    let hook = Some("type filter hook forward priority -200; policy accept;");
    let rules = vec!["oifname vmap @to".to_owned()];
    base.chain(Family::Bridge, "forward", Chain { hook, rules });
    let hook = Some("type filter hook output priority -200; policy accept;");
    let rules = down.iter().map(|tap| format!("oifname \"{tap}\" drop")).collect();
    base.chain(Family::Bridge, "output", Chain { hook, rules });
}

/// The mask of the sender's half of the mark, and of the receiver's.
const HALVES: [(&str, &str, &str); 2] = [("egress", "0xffff0000", "0"), ("ingress", "0x0000ffff", "1")];

const MARK_MAP: &str = "type mark : verdict;";

fn stateful_chains(base: &mut Fragment, family: Family) {
    for (name, mask, _) in HALVES {
        for map in ["", "-reply", "-stateless"] {
            base.set(family, format!("{name}{map}"), MARK_MAP);
        }
        let key = format!("meta mark and {mask}");
        let mut rules = vec![format!("{key} == 0x0 accept")];
        if name == "egress" {
            rules.extend(SERVER_GUARD.map(str::to_owned));
        } else {
            rules.push("meta l4proto udp udp sport 67 udp dport 68 accept".to_owned());
            rules.push("meta l4proto udp udp sport 547 udp dport 546 accept".to_owned());
        }
        rules.extend([
            // Neighbour discovery and multicast listeners, which conntrack leaves out.
            "ct state untracked icmpv6 type { 130-136, 143 } accept".to_owned(),
            format!("{key} vmap @{name}-stateless"),
            "ct state related accept".to_owned(),
            format!("ct state established ct mark {GENERATION} accept"),
            "ct state invalid,untracked counter drop".to_owned(),
            format!("ct direction original {key} vmap @{name}"),
            // Requests are judged; their answers have other types.
            "meta l4proto { 1, 58 } accept".to_owned(),
            format!("{key} vmap @{name}-reply"),
        ]);
        let hook = match name {
            "egress" => "type filter hook forward priority 0; policy drop;",
            _ => "type filter hook forward priority 1; policy drop;",
        };
        base.chain(family, name, Chain { hook: Some(hook), rules });
    }
    let rules = vec![
        "meta mark 0x0 accept".to_owned(),
        "ct direction reply meta l4proto { 1, 58 } accept".to_owned(),
        format!("ct state new,established ct mark != {GENERATION} ct mark set {GENERATION}"),
    ];
    let hook = Some("type filter hook forward priority 2; policy accept;");
    base.chain(family, "commit", Chain { hook, rules });
}

fn group_name(id: SecurityGroupId, direction: Direction) -> String {
    let initial = if direction == Direction::Ingress { 'i' } else { 'e' };
    format!("g{initial}-{}", id.0.simple())
}

/// The groups that ports here are in, and the sets that their rules name.
fn group_fragments(
    fragments: &mut BTreeMap<FragmentKey, Arc<Fragment>>,
    family: Family,
    ports: &[FilteredPort<'_>],
    around: &Surroundings<'_>,
    memory: &mut Memory,
) -> Result<(), SpecProblem> {
    let ids: BTreeSet<SecurityGroupId> =
        ports.iter().flat_map(|port| port.spec.security_groups.iter().copied()).collect();
    for group in ids.iter().filter_map(|id| around.groups.get(id)) {
        let key = FragmentKey::Group(group.id);
        let input = Input::Group(Cow::Borrowed(group), family);
        fragments.insert(key, memory.fragment(key, input, || Ok(group_fragment(family, group)))?);
        for rule in &group.rules {
            let Some(Remote::Set(id)) = rule.remote else { continue };
            let set = around.sets.get(&id).ok_or(SpecProblem::UnknownSet(group.id, id))?;
            let key = FragmentKey::Set(id, rule.ethertype);
            if fragments.contains_key(&key) {
                continue;
            }
            let input = Input::Set(Cow::Borrowed(&set.addresses), family);
            let made = memory.fragment(key, input, || Ok(set_fragment(family, set, rule.ethertype)))?;
            fragments.insert(key, made);
        }
    }
    Ok(())
}

fn group_fragment(family: Family, group: &SecurityGroupSpec) -> Fragment {
    let mut fragment = Fragment::default();
    let view = View { stateful: group.stateful, bridge: family == Family::Bridge };
    for direction in [Direction::Ingress, Direction::Egress] {
        fragment.rules(family, group_name(group.id, direction), rules(&group.rules, direction, view));
    }
    fragment
}

fn set_fragment(family: Family, set: &AddressSetSpec, version: EtherType) -> Fragment {
    let mut fragment = Fragment::default();
    let kind = match version {
        EtherType::Ipv4 => "type ipv4_addr; flags interval;",
        EtherType::Ipv6 => "type ipv6_addr; flags interval;",
    };
    let put = fragment.set(family, set_name(set.id, version), kind);
    put.elements = elements(&set.addresses, version).into_iter().map(|text| (text, None)).collect();
    fragment
}

fn port_fragment(family: Family, port: &FilteredPort<'_>) -> Result<Fragment, SpecProblem> {
    let mut fragment = Fragment::default();
    let stations = stations(port.spec)?;
    let (mut out, mut into) = limits(port.spec.qos.as_ref())?;
    let (tap, index) = (&port.tap, u32::from(port.index));
    fragment.counter(Family::Bridge, format!("spoofed-{tap}"));
    fragment.counter(Family::Bridge, format!("fragments-{tap}"));
    fragment.counter(family, format!("denied-{tap}"));
    put_in_maps(&mut fragment, tap);
    out.extend(from_rules(port, &stations));
    fragment.rules(Family::Bridge, format!("f-{tap}"), out);
    let mark = format!("meta mark set meta mark and 0xffff0000 or 0x{index:08x}");
    into.push(mark);
    fragment.rules(Family::Bridge, format!("t-{tap}"), into);
    let mut sources = source_rules(&stations);
    sources.push(format!("counter name spoofed-{tap} drop"));
    fragment.rules(Family::Bridge, format!("s-{tap}"), sources);
    for direction in [Direction::Egress, Direction::Ingress] {
        let initial = if direction == Direction::Ingress { 'i' } else { 'e' };
        let groups = port.spec.security_groups.iter();
        let mut rules: Vec<String> =
            groups.map(|id| format!("jump {}", group_name(*id, direction))).collect();
        rules.push(format!("counter name denied-{tap} drop"));
        fragment.rules(family, format!("{initial}-{tap}"), rules);
    }
    for (name, _, _) in HALVES {
        let (shift, own, other) = if name == "egress" { (16, 'e', 'i') } else { (0, 'i', 'e') };
        let key = format!("0x{:08x}", index << shift);
        let mut put = |map: &str, chain: char| {
            let map = fragment.set(family, format!("{name}{map}"), MARK_MAP);
            map.elements.insert(key.clone(), Some(format!("goto {chain}-{tap}")));
        };
        if port.stateful {
            put("", own);
            put("-reply", other);
        } else {
            put("-stateless", own);
        }
    }
    Ok(fragment)
}

/// Ethernet addresses that a port may send from, own and paired, each with what may be sent from it.
type Stations = BTreeMap<MacAddress, Vec<IpNet>>;

/// What a port may send.
fn from_rules(port: &FilteredPort<'_>, stations: &Stations) -> Vec<String> {
    let drop = format!("counter name spoofed-{} drop", port.tap);
    let macs: Vec<String> = stations.keys().map(ToString::to_string).collect();
    let mut rules = vec![
        format!("{} {drop}", matching("ether saddr !=", &macs)),
        // Anything else, and tagged frames, which conntrack would not look into.
        format!("ether type != @ethertypes {drop}"),
        format!("meta mark set 0x{:08x}", u32::from(port.index) << 16),
    ];
    for (mac, ranges) in stations {
        // A probe (RFC 5227) asks whether an address is free.
        let probe = vec!["0.0.0.0".to_owned()];
        for senders in [probe, elements(ranges, EtherType::Ipv4)].iter().filter(|senders| !senders.is_empty())
        {
            rules.push(format!(
                "ether type arp ether saddr {mac} arp saddr ether {mac} {} accept",
                matching("arp saddr ip", senders)
            ));
        }
    }
    rules.push(format!("ether type arp {drop}"));
    // Conntrack puts fragments together before they are judged, and one whose beginning never comes gets no further: no
    // chain after this one sees it.
    let count = format!("!= 0 counter name fragments-{}", port.tap);
    rules.push(format!("ip frag-off and 0x1fff {count}"));
    let guard = SERVER_GUARD.map(|rule| rule.replace("{ 134, 137 }", "@advertised").replace("drop", &drop));
    rules.extend(guard);
    rules.push(
        "ip saddr 0.0.0.0 ip daddr 255.255.255.255 meta l4proto udp udp sport 68 udp dport 67 accept"
            .to_owned(),
    );
    rules.push("ip6 saddr :: icmpv6 type @unspecified accept".to_owned());
    for (mac, ranges) in stations {
        let v4 = elements(ranges, EtherType::Ipv4);
        if !v4.is_empty() {
            rules.push(format!("ether saddr {mac} {} accept", matching("ip saddr", &v4)));
        }
    }
    rules.push(format!("ether type ip {drop}"));
    rules.push(format!("frag frag-off {count}"));
    let targets = stations.values().flatten();
    rules.extend(targets.filter_map(|range| match range {
        IpNet::V6(range) => {
            Some(format!("icmpv6 type 136 {} goto s-{}", target(range.network(), range.netmask()), port.tap))
        }
        IpNet::V4(_) => None,
    }));
    rules.push(format!("icmpv6 type 136 {drop}"));
    rules.push(format!("goto s-{}", port.tap));
    rules
}

/// Which IPv6 addresses may be sent from: the link-local one, and the others apart, which are mostly one.
fn source_rules(stations: &Stations) -> Vec<String> {
    let mut rules = Vec::new();
    for (mac, ranges) in stations {
        let own = host_net(IpAddr::V6(mac.link_local()));
        let (own, others): (Vec<&IpNet>, Vec<&IpNet>) = ranges.iter().partition(|range| **range == own);
        for ranges in [elements(own, EtherType::Ipv6), elements(others, EtherType::Ipv6)] {
            if !ranges.is_empty() {
                rules.push(format!("ether saddr {mac} {} accept", matching("ip6 saddr", &ranges)));
            }
        }
    }
    rules
}

/// The target of a neighbour advertisement (RFC 4861 §4.4) is in a range.
fn target(network: Ipv6Addr, mask: Ipv6Addr) -> String {
    let (network, mask) = (u128::from(network), u128::from(mask));
    if mask == u128::MAX {
        format!("@th,64,128 0x{network:032x}")
    } else {
        format!("@th,64,128 and 0x{mask:032x} == 0x{network:032x}")
    }
}

#[cfg(test)]
#[path = "ports_tests.rs"]
mod tests;
