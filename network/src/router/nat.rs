//! Address translation of a router on the host that holds its gateways, and which connection belongs to which of several.
//!
//! A connection gets the mark of the gateway by which it came in or went out, with its first packet, and keeps it
//! (`ct mark`). Its packets from inside take over that mark, by which they are routed. So answers leave by the gateway that
//! the questions came by, and a connection doesn't change its gateway, nor its translated address, when default routes
//! do. What a fixed address with a floating IP opens goes by the floating IP's gateway.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use mote_host_api::{ForwardedProtocol, PortForwarding, RouterGateway, RouterSpec};

use super::{FLOATING_IPS_MAX, RouterProblem, SHIFTED_PORTS_MAX, gateway_mark, link_name};
use crate::filter::{Chain, Family, Fragment, Ruleset, checked_dscp, policer};

const PREROUTING: &str = "type nat hook prerouting priority -100; policy accept;";
const POSTROUTING: &str = "type nat hook postrouting priority 100; policy accept;";
const FORWARD: &str = "type filter hook forward priority 0; policy accept;";
const MARKING: &str = "type filter hook prerouting priority -150; policy accept;";
const LEAVING: &str = "type filter hook forward priority -150; policy accept;";
/// Of kind route: what the router itself sends is routed anew when its mark has changed.
const ANSWERING: &str = "type route hook output priority -150; policy accept;";
const LIMIT_IN: &str = "type filter hook prerouting priority -140; policy accept;";
const LIMIT_OUT: &str = "type filter hook postrouting priority 150; policy accept;";
const ADDRESS_MAP: &str = "type ipv4_addr : ipv4_addr;";
/// Mark of what goes from an inner network to a floating IP: its answers must come back through here.
const HAIRPIN: &str = "0x1";

fn external(gateway: &RouterGateway) -> Option<Ipv4Addr> {
    gateway.addresses.iter().find_map(|range| match range {
        IpNet::V4(range) => Some(range.addr()),
        IpNet::V6(_) => None,
    })
}

/// Floating IPs, port forwardings, and SNAT for the rest.
pub(super) fn ruleset(router: &RouterSpec) -> Result<Ruleset, RouterProblem> {
    let gateways: Vec<&RouterGateway> = router.gateways().collect();
    let floating: usize = gateways.iter().map(|gateway| gateway.floating_ips.len()).sum();
    if floating > FLOATING_IPS_MAX {
        return Err(RouterProblem::TooMany);
    }
    let sources: Vec<Ipv4Addr> = gateways.iter().filter_map(|gateway| external(gateway)).collect();
    // What has no IPv4 address outside translates nothing.
    let snat = gateways.iter().any(|gateway| gateway.enable_snat && external(gateway).is_some());
    let translates = snat || floating > 0;
    let mut ruleset = Fragment::default();
    if gateways.len() > 1 {
        follow(&mut ruleset, router, &gateways, translates);
    }
    if translates {
        let first = *sources.first().ok_or(RouterProblem::NoExternalAddress)?;
        translate(&mut ruleset, router, &gateways, first)?;
        let all = ruleset.set(Family::Inet, "sources", "type ipv4_addr;");
        all.elements.extend(sources.iter().map(|ip| (ip.to_string(), None)));
    }
    match ruleset == Fragment::default() {
        true => Ok(Ruleset::default()),
        false => Ok(ruleset.into()),
    }
}

/// Marks connections by their gateway, and what comes from inside by its connection.
fn follow(ruleset: &mut Fragment, router: &RouterSpec, gateways: &[&RouterGateway], translates: bool) {
    let named = |gateway: &RouterGateway| (link_name(gateway.port_id), hex(gateway_mark(gateway.port_id)));
    let named: Vec<(String, String)> = gateways.iter().map(|gateway| named(gateway)).collect();
    let mut marks: Vec<String> = named
        .iter()
        .map(|(link, mark)| format!("iifname \"{link}\" ct state new ct mark set {mark}"))
        .collect();
    marks.extend(named.iter().map(|(link, _)| format!("iifname \"{link}\" accept")));
    if translates {
        marks.push(format!("ip daddr @floating meta mark set {HAIRPIN} accept"));
    }
    marks.extend(named.iter().map(|(_, mark)| format!("ct mark {mark} meta mark set {mark} accept")));
    // Whom the main table leads elsewhere than out.
    let mut elsewhere = inner_ranges(router);
    elsewhere.extend(router.routes.iter().map(|route| route.destination.trunc().to_string()));
    elsewhere.sort_unstable();
    elsewhere.dedup();
    let not_elsewhere = match elsewhere.is_empty() {
        true => String::new(),
        false => format!("ip daddr != {{ {} }} ", elsewhere.join(", ")),
    };
    let mut known = BTreeSet::new();
    for (gateway, (link, mark)) in gateways.iter().zip(&named) {
        let fixed = gateway.floating_ips.iter().filter_map(|ip| ip.fixed_ip_address);
        let own: Vec<Ipv4Addr> = fixed.filter(|ip| known.insert(*ip)).collect();
        if own.is_empty() {
            continue;
        }
        let name = format!("from-{link}");
        marks.push(format!("ct state new ip saddr @{name} {not_elsewhere}meta mark set {mark} accept"));
        let set = ruleset.set(Family::Inet, name, "type ipv4_addr;");
        set.elements.extend(own.iter().map(|ip| (ip.to_string(), None)));
    }
    ruleset.chain(Family::Inet, "hairpin", Chain { hook: Some(MARKING), rules: marks });
    let leaving =
        named.iter().map(|(link, mark)| format!("oifname \"{link}\" ct state new ct mark set {mark}"));
    ruleset.chain(Family::Inet, "leaving", Chain { hook: Some(LEAVING), rules: leaving.collect() });
    let answers = named.iter().map(|(_, mark)| format!("ct mark {mark} meta mark set {mark}"));
    ruleset.chain(Family::Inet, "answering", Chain { hook: Some(ANSWERING), rules: answers.collect() });
}

fn hex(mark: u32) -> String {
    format!("{mark:#010x}")
}

/// `first`: what comes by a floating IP from inside is translated to it.
fn translate(
    ruleset: &mut Fragment,
    router: &RouterSpec,
    gateways: &[&RouterGateway],
    first: Ipv4Addr,
) -> Result<(), RouterProblem> {
    sets(ruleset, gateways);
    limit(ruleset, gateways)?;
    if let [gateway] = gateways {
        let link = link_name(gateway.port_id);
        let mark = vec![format!("iifname != \"{link}\" ip daddr @floating meta mark set {HAIRPIN}")];
        ruleset.chain(Family::Inet, "hairpin", Chain { hook: Some(MARKING), rules: mark });
    }

    let mut inwards = Vec::new();
    for ip in gateways.iter().flat_map(|gateway| &gateway.floating_ips) {
        for forwarding in &ip.port_forwardings {
            forward(&mut inwards, ip.floating_ip_address, forwarding)?;
        }
    }
    inwards.push("dnat ip to ip daddr map @inwards".to_owned());
    ruleset.chain(Family::Inet, "prerouting", Chain { hook: Some(PREROUTING), rules: inwards });

    let link = |gateway: &RouterGateway| link_name(gateway.port_id);
    let by_floating = gateways.iter().enumerate().map(|(number, gateway)| {
        format!("oifname \"{}\" snat ip to ip saddr map @{}", link(gateway), outwards(number, gateway))
    });
    let mut rules: Vec<String> = by_floating.collect();
    rules.push(format!("meta mark {HAIRPIN} snat ip to ip saddr map @outwards"));
    rules.push(format!("meta mark {HAIRPIN} meta nfproto ipv4 snat ip to {first}"));
    let inner = inner_ranges(router).join(", ");
    for gateway in gateways.iter().filter(|gateway| gateway.enable_snat && !inner.is_empty()) {
        if let Some(external) = external(gateway) {
            let link = link(gateway);
            rules.push(format!("oifname \"{link}\" ip saddr {{ {inner} }} snat ip to {external}"));
        }
    }
    ruleset.chain(Family::Inet, "postrouting", Chain { hook: Some(POSTROUTING), rules });

    // What an earlier translation has opened and the present ones would not is cut.
    let forward = vec![
        "ct status dnat ct original ip daddr . ct reply ip saddr != @pairs counter drop".to_owned(),
        "ct status snat ct reply ip daddr != @sources counter drop".to_owned(),
        "ct status snat ct reply ip daddr @floating ct reply ip daddr . ct original ip saddr != @pairs counter drop"
            .to_owned(),
    ];
    ruleset.chain(Family::Inet, "forward", Chain { hook: Some(FORWARD), rules: forward });
    Ok(())
}

/// The map from fixed addresses to the floating IPs of a gateway.
fn outwards(number: usize, gateway: &RouterGateway) -> String {
    match number {
        0 => "outwards".to_owned(),
        _ => format!("outwards-{}", link_name(gateway.port_id)),
    }
}

fn sets(ruleset: &mut Fragment, gateways: &[&RouterGateway]) {
    ruleset.set(Family::Inet, "inwards", ADDRESS_MAP);
    ruleset.set(Family::Inet, "floating", "type ipv4_addr;");
    ruleset.set(Family::Inet, "sources", "type ipv4_addr;");
    ruleset.set(Family::Inet, "pairs", "type ipv4_addr . ipv4_addr;");
    for (number, gateway) in gateways.iter().enumerate() {
        let outwards = outwards(number, gateway);
        ruleset.set(Family::Inet, outwards.as_str(), ADDRESS_MAP);
        for ip in &gateway.floating_ips {
            let floating = ip.floating_ip_address.to_string();
            let mut put = |set: &str, key: String, value: Option<String>| {
                ruleset.set(Family::Inet, set, "").elements.insert(key, value);
            };
            put("floating", floating.clone(), None);
            put("sources", floating.clone(), None);
            let fixed = ip.fixed_ip_address;
            for inner in fixed.iter().chain(ip.port_forwardings.iter().map(|f| &f.internal_ip_address)) {
                put("pairs", format!("{floating} . {inner}"), None);
            }
            if let Some(fixed) = fixed {
                put("inwards", floating.clone(), Some(fixed.to_string()));
                put(&outwards, fixed.to_string(), Some(floating));
            }
        }
    }
}

/// Policers of floating IPs, by their addresses as the world sees them: before what comes in is translated, after what goes
/// out is. Traffic between the router's own networks isn't limited, as in Neutron.
fn limit(ruleset: &mut Fragment, gateways: &[&RouterGateway]) -> Result<(), RouterProblem> {
    let all = gateways.iter().flat_map(|gateway| &gateway.floating_ips);
    let limited: Vec<_> = all.filter_map(|ip| Some((ip, ip.qos.as_ref()?))).collect();
    if limited.is_empty() {
        return Ok(());
    }
    for (ip, qos) in limited {
        let address = ip.floating_ip_address;
        let refuse = |problem| RouterProblem::Qos(address, problem);
        let into = qos.ingress.map(policer).transpose().map_err(refuse)?;
        let out = qos.egress.map(policer).transpose().map_err(refuse)?;
        let dscp = qos.dscp_mark.map(checked_dscp).transpose().map_err(refuse)?;
        let dscp = dscp.map(|dscp| format!("ip dscp set {dscp}"));
        for (direction, rules) in
            [("in", into.into_iter().collect()), ("out", Vec::from_iter(out.into_iter().chain(dscp)))]
        {
            let chain = format!("{direction}-{}", ip.id.0.simple());
            ruleset.rules(Family::Inet, chain.as_str(), rules);
            let map = ruleset.set(Family::Inet, format!("limited-{direction}"), "type ipv4_addr : verdict;");
            map.elements.insert(address.to_string(), Some(format!("jump {chain}")));
        }
    }
    let links: Vec<String> = gateways.iter().map(|gateway| link_name(gateway.port_id)).collect();
    let into = links.iter().map(|link| format!("iifname \"{link}\" ip daddr vmap @limited-in"));
    ruleset.chain(Family::Inet, "limit-in", Chain { hook: Some(LIMIT_IN), rules: into.collect() });
    let out = links.iter().map(|link| format!("oifname \"{link}\" ip saddr vmap @limited-out"));
    ruleset.chain(Family::Inet, "limit-out", Chain { hook: Some(LIMIT_OUT), rules: out.collect() });
    Ok(())
}

fn inner_ranges(router: &RouterSpec) -> Vec<String> {
    let ranges = router.interfaces.iter().flat_map(|interface| &interface.addresses);
    let ranges = ranges.filter(|range| matches!(range.addr(), IpAddr::V4(_)));
    let mut ranges: Vec<String> = ranges.map(|range| range.trunc().to_string()).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

fn forward(rules: &mut Vec<String>, floating: Ipv4Addr, wish: &PortForwarding) -> Result<(), RouterProblem> {
    let refuse = RouterProblem::PortForwarding(floating);
    let ((first, last), (inner_first, inner_last)) = (wish.external_ports, wish.internal_ports);
    let (length, inner_length) = (last.checked_sub(first), inner_last.checked_sub(inner_first));
    let Some(length) = length.filter(|_| length == inner_length) else { return Err(refuse) };
    let protocol = match wish.protocol {
        ForwardedProtocol::Tcp => "tcp",
        ForwardedProtocol::Udp => "udp",
    };
    let inner = wish.internal_ip_address;
    if first == inner_first {
        rules.push(format!("ip daddr {floating} {protocol} dport {first}-{last} dnat ip to {inner}"));
        return Ok(());
    }
    if length >= SHIFTED_PORTS_MAX {
        return Err(refuse);
    }
    rules.extend((0..=length).map(|offset| {
        let (outer, inner_port) = (first + offset, inner_first + offset);
        format!("ip daddr {floating} {protocol} dport {outer} dnat ip to {inner}:{inner_port}")
    }));
    Ok(())
}
