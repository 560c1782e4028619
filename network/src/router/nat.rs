//! Address translation of a router on the host that holds its gateway.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use mote_host_api::{ForwardedProtocol, PortForwarding, RouterGateway, RouterSpec};

use super::{FLOATING_IPS_MAX, RouterProblem, SHIFTED_PORTS_MAX, link_name};
use crate::filter::{Chain, Family, Fragment, Ruleset, checked_dscp, policer};

const PREROUTING: &str = "type nat hook prerouting priority -100; policy accept;";
const POSTROUTING: &str = "type nat hook postrouting priority 100; policy accept;";
const FORWARD: &str = "type filter hook forward priority 0; policy accept;";
const MARKING: &str = "type filter hook prerouting priority -150; policy accept;";
const LIMIT_IN: &str = "type filter hook prerouting priority -140; policy accept;";
const LIMIT_OUT: &str = "type filter hook postrouting priority 150; policy accept;";
const ADDRESS_MAP: &str = "type ipv4_addr : ipv4_addr;";
/// Mark of what goes from an inner network to a floating IP: its answers must come back through here.
const HAIRPIN: &str = "0x1";

/// Floating IPs, port forwardings, and SNAT for the rest.
pub(super) fn ruleset(router: &RouterSpec, gateway: &RouterGateway) -> Result<Ruleset, RouterProblem> {
    let external = gateway.addresses.iter().find_map(|range| match range {
        IpNet::V4(range) => Some(range.addr()),
        IpNet::V6(_) => None,
    });
    let mut ruleset = Fragment::default();
    if !gateway.enable_snat && gateway.floating_ips.is_empty() {
        return Ok(Ruleset::default());
    }
    if gateway.floating_ips.len() > FLOATING_IPS_MAX {
        return Err(RouterProblem::TooMany);
    }
    let external = external.ok_or(RouterProblem::NoExternalAddress)?;
    let link = link_name(gateway.port_id);
    sets(&mut ruleset, gateway);
    limit(&mut ruleset, gateway, &link)?;
    ruleset.set(Family::Inet, "sources", "type ipv4_addr;").elements.insert(external.to_string(), None);

    let mark = vec![format!("iifname != \"{link}\" ip daddr @floating meta mark set {HAIRPIN}")];
    ruleset.chain(Family::Inet, "hairpin", Chain { hook: Some(MARKING), rules: mark });

    let mut inwards = Vec::new();
    for ip in &gateway.floating_ips {
        for forwarding in &ip.port_forwardings {
            forward(&mut inwards, ip.floating_ip_address, forwarding)?;
        }
    }
    inwards.push("dnat ip to ip daddr map @inwards".to_owned());
    ruleset.chain(Family::Inet, "prerouting", Chain { hook: Some(PREROUTING), rules: inwards });

    let mut outwards = vec![
        format!("oifname \"{link}\" snat ip to ip saddr map @outwards"),
        format!("meta mark {HAIRPIN} snat ip to ip saddr map @outwards"),
        format!("meta mark {HAIRPIN} meta nfproto ipv4 snat ip to {external}"),
    ];
    let inner = inner_ranges(router);
    if gateway.enable_snat && !inner.is_empty() {
        let inner = inner.join(", ");
        outwards.push(format!("oifname \"{link}\" ip saddr {{ {inner} }} snat ip to {external}"));
    }
    ruleset.chain(Family::Inet, "postrouting", Chain { hook: Some(POSTROUTING), rules: outwards });

    // What an earlier translation has opened and the present ones would not is cut.
    let forward = vec![
        "ct status dnat ct original ip daddr . ct reply ip saddr != @pairs counter drop".to_owned(),
        "ct status snat ct reply ip daddr != @sources counter drop".to_owned(),
        "ct status snat ct reply ip daddr @floating ct reply ip daddr . ct original ip saddr != @pairs counter drop"
            .to_owned(),
    ];
    ruleset.chain(Family::Inet, "forward", Chain { hook: Some(FORWARD), rules: forward });
    Ok(ruleset.into())
}

fn sets(ruleset: &mut Fragment, gateway: &RouterGateway) {
    ruleset.set(Family::Inet, "inwards", ADDRESS_MAP);
    ruleset.set(Family::Inet, "outwards", ADDRESS_MAP);
    ruleset.set(Family::Inet, "floating", "type ipv4_addr;");
    ruleset.set(Family::Inet, "sources", "type ipv4_addr;");
    ruleset.set(Family::Inet, "pairs", "type ipv4_addr . ipv4_addr;");
    for ip in &gateway.floating_ips {
        let floating = ip.floating_ip_address.to_string();
        let mut put = |set: &str, kind, key: String, value: Option<String>| {
            ruleset.set(Family::Inet, set, kind).elements.insert(key, value);
        };
        put("floating", "", floating.clone(), None);
        put("sources", "", floating.clone(), None);
        let fixed = ip.fixed_ip_address;
        for inner in fixed.iter().chain(ip.port_forwardings.iter().map(|f| &f.internal_ip_address)) {
            put("pairs", "", format!("{floating} . {inner}"), None);
        }
        if let Some(fixed) = fixed {
            put("inwards", "", floating.clone(), Some(fixed.to_string()));
            put("outwards", "", fixed.to_string(), Some(floating));
        }
    }
}

/// Policers of floating IPs, by their addresses as the world sees them: before what comes in is translated, after what goes
/// out is. Traffic between the router's own networks isn't limited, as in Neutron.
fn limit(ruleset: &mut Fragment, gateway: &RouterGateway, link: &str) -> Result<(), RouterProblem> {
    let limited: Vec<_> = gateway.floating_ips.iter().filter_map(|ip| Some((ip, ip.qos.as_ref()?))).collect();
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
    let into = vec![format!("iifname \"{link}\" ip daddr vmap @limited-in")];
    ruleset.chain(Family::Inet, "limit-in", Chain { hook: Some(LIMIT_IN), rules: into });
    let out = vec![format!("oifname \"{link}\" ip saddr vmap @limited-out")];
    ruleset.chain(Family::Inet, "limit-out", Chain { hook: Some(LIMIT_OUT), rules: out });
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
