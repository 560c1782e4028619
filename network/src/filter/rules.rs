//! Rules of security groups as rules of nft.
//!
//! A stateful group's rules look at the *connection's* first direction (`ct original`), not at the packet: so they can be
//! applied again, to a packet of either direction, when the rules have changed while the connection was open.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mote_host_api::{AddressSetId, Direction, EtherType, Protocol, Remote, SecurityGroupRule};

/// Name of an address set of one version of IP.
pub fn set_name(id: AddressSetId, version: EtherType) -> String {
    let digit = match version {
        EtherType::Ipv4 => 4,
        EtherType::Ipv6 => 6,
    };
    format!("s{digit}-{}", id.0.simple())
}

/// Ranges as elements of an interval set, without overlaps (which nft refuses).
pub fn elements<'a>(ranges: impl IntoIterator<Item = &'a IpNet>, version: EtherType) -> Vec<String> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for range in ranges {
        match range {
            IpNet::V4(range) => v4.push(range.trunc()),
            IpNet::V6(range) => v6.push(range.trunc()),
        }
    }
    // A single address without its prefix length: with one, nft makes an interval of it.
    let text = |address: IpAddr, length: u8, max: u8| {
        if length == max { address.to_string() } else { format!("{address}/{length}") }
    };
    match version {
        EtherType::Ipv4 => {
            Ipv4Net::aggregate(&v4).iter().map(|r| text(r.addr().into(), r.prefix_len(), 32)).collect()
        }
        EtherType::Ipv6 => {
            Ipv6Net::aggregate(&v6).iter().map(|r| text(r.addr().into(), r.prefix_len(), 128)).collect()
        }
    }
}

/// A comparison with one value or with several. One value makes no set: each costs all later transactions time, since nft
/// asks the kernel for all of them.
pub fn matching(key: &str, values: &[String]) -> String {
    match values {
        [one] => format!("{key} {one}"),
        several => format!("{key} {{ {} }}", several.join(", ")),
    }
}

/// Where a rule looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// At the connection, else at the packet.
    pub stateful: bool,
    /// In the bridge family, else inet.
    pub bridge: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Ports {
    All,
    Some(BTreeSet<(u16, u16)>),
}

/// What is the same in rules that become one: version and protocol.
type Kind = (EtherType, Protocol);

/// The rules of one direction, as few as possible: rules that differ in ports or ranges only become one with a set.
pub fn rules(all: &[SecurityGroupRule], direction: Direction, view: View) -> Vec<String> {
    let mut by_remote: BTreeMap<(Kind, Option<Remote>), Ports> = BTreeMap::new();
    for rule in all.iter().filter(|rule| rule.direction == direction) {
        let (protocol, ports) = split(rule.protocol);
        let remote =
            rule.remote.filter(|remote| !matches!(remote, Remote::Cidr(range) if range.prefix_len() == 0));
        let entry = by_remote.entry(((rule.ethertype, protocol), remote));
        let known = entry.or_insert_with(|| Ports::Some(BTreeSet::new()));
        match (ports, &mut *known) {
            (Some(range), Ports::Some(ranges)) => _ = ranges.insert(range),
            (None, _) => *known = Ports::All,
            (Some(_), Ports::All) => {}
        }
    }
    let mut by_ports: BTreeMap<(Kind, Ports), BTreeSet<Option<Remote>>> = BTreeMap::new();
    for ((kind, remote), ports) in by_remote {
        by_ports.entry((kind, ports)).or_default().insert(remote);
    }
    let mut texts = Vec::new();
    for ((kind, ports), remotes) in &by_ports {
        texts.extend(rule_texts(*kind, ports, remotes, direction, view));
    }
    texts
}

/// A protocol without its ports, and the ports.
fn split(protocol: Protocol) -> (Protocol, Option<(u16, u16)>) {
    match protocol {
        Protocol::Tcp { ports } => (Protocol::Tcp { ports: None }, ports),
        Protocol::Udp { ports } => (Protocol::Udp { ports: None }, ports),
        Protocol::Sctp { ports } => (Protocol::Sctp { ports: None }, ports),
        other => (other, None),
    }
}

fn rule_texts(
    (version, protocol): Kind,
    ports: &Ports,
    remotes: &BTreeSet<Option<Remote>>,
    direction: Direction,
    view: View,
) -> Vec<String> {
    let mut head = version_match(version, view).to_owned();
    head.push_str(&protocol_match(version, protocol));
    if let Ports::Some(ranges) = ports {
        let key = match (view.stateful, protocol) {
            (true, _) => "ct original proto-dst",
            (false, Protocol::Udp { .. }) => "udp dport",
            (false, Protocol::Sctp { .. }) => "sctp dport",
            (false, _) => "tcp dport",
        };
        head.push_str(&format!(" {}", matching(key, &merged(ranges))));
    }
    let (word, end) = (
        if version == EtherType::Ipv4 { "ip" } else { "ip6" },
        if direction == Direction::Ingress { "saddr" } else { "daddr" },
    );
    let key = if view.stateful { format!("ct original {word} {end}") } else { format!("{word} {end}") };
    if remotes.contains(&None) {
        return vec![format!("{head} accept")];
    }
    let mut texts = Vec::new();
    let cidrs = remotes.iter().filter_map(|remote| match remote {
        Some(Remote::Cidr(range)) => Some(range),
        _ => None,
    });
    let cidrs = elements(cidrs, version);
    if !cidrs.is_empty() {
        texts.push(format!("{head} {} accept", matching(&key, &cidrs)));
    }
    let sets = remotes.iter().filter_map(|remote| match remote {
        Some(Remote::Set(id)) => Some(set_name(*id, version)),
        _ => None,
    });
    texts.extend(sets.map(|set| format!("{head} {key} @{set} accept")));
    texts
}

fn version_match(version: EtherType, view: View) -> &'static str {
    match (view.bridge, version) {
        (true, EtherType::Ipv4) => "ether type ip",
        (true, EtherType::Ipv6) => "ether type ip6",
        (false, EtherType::Ipv4) => "meta nfproto ipv4",
        (false, EtherType::Ipv6) => "meta nfproto ipv6",
    }
}

fn protocol_match(version: EtherType, protocol: Protocol) -> String {
    let number = |n: u8| format!(" meta l4proto {n}");
    match protocol {
        Protocol::Any => String::new(),
        Protocol::Tcp { .. } => number(6),
        Protocol::Udp { .. } => number(17),
        Protocol::Sctp { .. } => number(132),
        Protocol::Number { number: n } => number(n),
        Protocol::Icmp { icmp_type, code } => {
            let (word, n) = if version == EtherType::Ipv4 { ("icmp", 1) } else { ("icmpv6", 58) };
            let mut text = number(n);
            text.extend(icmp_type.map(|value| format!(" {word} type {value}")));
            text.extend(code.map(|value| format!(" {word} code {value}")));
            text
        }
    }
}

/// Ranges without overlaps.
fn merged(ranges: &BTreeSet<(u16, u16)>) -> Vec<String> {
    let mut all: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match all.last_mut() {
            Some((_, end)) if u32::from(*first) <= u32::from(*end) + 1 => *end = (*end).max(*last),
            _ => all.push((*first, *last)),
        }
    }
    let text = |(first, last): &(u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    all.iter().map(text).collect()
}
