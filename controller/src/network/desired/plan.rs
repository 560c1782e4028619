//! From rows to what one host is told. Pure: the same rows give the same state, in the same order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use mote_host_api::{
    AddressPair, AddressSetSpec, BandwidthLimit, Direction, DnsName, EtherType, FixedIp, FixedIpV6,
    FloatingIpSpec, ForwardedProtocol, GatewayPlace, HostRoute, HostRouteV6, Ipv6Mode, NetworkSpec,
    PortForwarding, PortSpec, Protocol, QosSpec, Remote, RemotePort, RouterGateway, RouterInterface,
    RouterSpec, SecurityGroupRule, SecurityGroupSpec, SegmentSpec, SubnetSpec, SubnetV6Spec, TunnelSpec,
    host_net,
};
use serde::Deserialize;

use super::{
    super::{
        ports::SERVICE_OWNER,
        routers::Route,
        security_group_rules::{RuleRow, protocol_number},
    },
    HostNetworks,
    rows::{FloatingIpRow, GatewayRow, Index, NetworkRow, PortRow, RouterRow, SubnetRow},
};
use crate::http::error::ApiError;

/// UDP port of VXLAN (RFC 7348).
const VXLAN_PORT: u16 = 4789;

/// What one host is told.
pub(super) fn plan(index: &Index<'_>, host: &str) -> Result<HostNetworks, ApiError> {
    let own = index.ports_of_host.get(host).map_or(&[][..], Vec::as_slice);
    let (networks, routers) = reach(index, host, own);
    let mut state = HostNetworks::default();
    for id in &networks {
        if let Some(network) = index.networks.get(id) {
            state.networks.push(network_spec(index, network, host)?);
        }
    }
    for id in routers {
        if let Some(router) = index.routers.get(id) {
            state.routers.push(router_spec(index, router, host)?);
        }
    }
    let tunnel = index.tunnels.get(host);
    state.tunnel = tunnel.map(|local_ip| TunnelSpec { local_ip: *local_ip, udp_port: VXLAN_PORT });
    filters(index, own, &mut state)?;
    Ok(state)
}

/// The networks and routers that the host knows: those of its ports, what routers lead to from there, and the outside of
/// the gateways that it holds.
fn reach<'a>(index: &Index<'a>, host: &str, own: &[&'a PortRow]) -> (BTreeSet<&'a str>, BTreeSet<&'a str>) {
    let held = |router: &&&RouterRow| router.gateway_host_id.as_deref() == Some(host);
    let held: Vec<&RouterRow> = index.routers.values().filter(held).copied().collect();
    let mut networks: BTreeSet<&str> = BTreeSet::new();
    let mut routers: BTreeSet<&str> = BTreeSet::new();
    let mut new_networks: Vec<&str> = own.iter().map(|port| port.network_id.as_str()).collect();
    let mut new_routers: Vec<&str> = held.iter().map(|router| router.id.as_str()).collect();
    loop {
        if let Some(network) = new_networks.pop() {
            if networks.insert(network) {
                new_routers.extend(index.routers_of_network.get(network).into_iter().flatten());
            }
        } else if let Some(router) = new_routers.pop() {
            if routers.insert(router) {
                let ports = index.ports_of_router.get(router).into_iter().flatten();
                new_networks
                    .extend(ports.filter(|port| port.is_interface()).map(|port| port.network_id.as_str()));
            }
        } else {
            break;
        }
    }
    let outside = held.iter().flat_map(|router| index.gateways.get(router.id.as_str()).into_iter().flatten());
    networks.extend(outside.map(|gateway| gateway.network_id.as_str()));
    (networks, routers)
}

fn parse<T: std::str::FromStr>(stored: &str) -> Result<T, ApiError>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    stored.parse().map_err(ApiError::internal)
}

fn json<T: serde::de::DeserializeOwned>(stored: &str) -> Result<T, ApiError> {
    serde_json::from_str(stored).map_err(ApiError::internal)
}

fn number<T: TryFrom<i64, Error = std::num::TryFromIntError>>(stored: i64) -> Result<T, ApiError> {
    T::try_from(stored).map_err(ApiError::internal)
}

fn network_spec(index: &Index<'_>, network: &NetworkRow, host: &str) -> Result<NetworkSpec, ApiError> {
    let ports = index.ports_of_network.get(network.id.as_str()).map_or(&[][..], Vec::as_slice);
    let segment = match network.network_type.as_str() {
        "flat" => SegmentSpec::Flat { physical_network: network.physical_network.clone() },
        "vlan" => SegmentSpec::Vlan {
            physical_network: network.physical_network.clone(),
            vlan_id: number(network.segmentation_id)?,
        },
        _ => SegmentSpec::Vxlan { vni: number(network.segmentation_id)? },
    };
    let mut spec = NetworkSpec {
        id: parse(&network.id)?,
        mtu: number(network.mtu)?,
        segment: Some(segment),
        ..NetworkSpec::default()
    };
    let service = ports.iter().find(|port| port.device_owner == SERVICE_OWNER);
    for subnet in index.subnets.get(network.id.as_str()).into_iter().flatten() {
        add_subnet(&mut spec, subnet, service.copied())?;
    }
    let overlay = matches!(spec.segment, Some(SegmentSpec::Vxlan { .. }));
    spec.dns_names.reserve(ports.len());
    spec.remote_ports.reserve(if overlay { ports.len() } else { 0 });
    for port in ports.iter().filter(|port| port.server_id.is_some()) {
        let Some(its_host) = port.host_id.as_deref() else { continue };
        if let Some(name) = port.hostname.as_ref().filter(|_| !port.addresses.is_empty()) {
            let addresses = port.addresses.iter().map(|(_, ip)| *ip).collect();
            spec.dns_names.push(DnsName { name: name.clone(), addresses });
        }
        if its_host == host {
            spec.ports.push(port_spec(index, network, port)?);
        } else if let (true, Some(tunnel_ip)) = (overlay, index.tunnels.get(its_host)) {
            spec.remote_ports.push(RemotePort {
                mac_address: port.mac_address.clone(),
                ip_addresses: port.addresses.iter().map(|(_, ip)| *ip).collect(),
                tunnel_ip: *tunnel_ip,
            });
        }
    }
    Ok(spec)
}

fn add_subnet(spec: &mut NetworkSpec, subnet: &SubnetRow, service: Option<&PortRow>) -> Result<(), ApiError> {
    match parse::<IpNet>(&subnet.cidr)? {
        IpNet::V4(cidr) => {
            let address = service.and_then(|port| port.addresses.iter().find(|(id, _)| *id == subnet.id));
            let Some((_, IpAddr::V4(service_ip))) = address else {
                return Err(ApiError::internal(format!("subnet {} has no service address", subnet.id)));
            };
            spec.subnets.push(SubnetSpec {
                id: parse(&subnet.id)?,
                cidr,
                gateway_ip: subnet.gateway_ip.as_deref().map(parse).transpose()?,
                service_ip: *service_ip,
                enable_dhcp: subnet.enable_dhcp,
                dns_nameservers: json(&subnet.dns_nameservers)?,
                host_routes: json(&subnet.host_routes)?,
            });
        }
        IpNet::V6(cidr) => {
            let mode = |stored: &Option<String>| match stored.as_deref() {
                None => None,
                Some("slaac") => Some(Ipv6Mode::Slaac),
                Some("dhcpv6-stateless") => Some(Ipv6Mode::Dhcpv6Stateless),
                Some(_) => Some(Ipv6Mode::Dhcpv6Stateful),
            };
            spec.subnets_v6.push(SubnetV6Spec {
                id: parse(&subnet.id)?,
                cidr,
                gateway_ip: subnet.gateway_ip.as_deref().map(parse).transpose()?,
                ra_mode: mode(&subnet.ipv6_ra_mode),
                address_mode: mode(&subnet.ipv6_address_mode),
                dns_nameservers: json(&subnet.dns_nameservers)?,
            });
        }
    }
    Ok(())
}

/// An allowed address pair as stored.
#[derive(Deserialize)]
struct StoredPair {
    ip_address: String,
    mac_address: String,
}

fn pairs(stored: &str) -> Result<Vec<(IpNet, String)>, ApiError> {
    if stored == "[]" {
        return Ok(Vec::new());
    }
    let parse_net = |text: &str| match text.contains('/') {
        true => parse::<IpNet>(text),
        false => parse::<IpAddr>(text).map(host_net),
    };
    json::<Vec<StoredPair>>(stored)?
        .into_iter()
        .map(|pair| Ok((parse_net(&pair.ip_address)?, pair.mac_address)))
        .collect()
}

fn port_spec(index: &Index<'_>, network: &NetworkRow, port: &PortRow) -> Result<PortSpec, ApiError> {
    let mut spec = PortSpec {
        id: parse(&port.id)?,
        server_id: parse(port.server_id.as_deref().unwrap_or_default())?,
        mac_address: port.mac_address.clone(),
        port_security: port.port_security_enabled,
        security_groups: port.groups.iter().map(|id| parse(id)).collect::<Result<_, _>>()?,
        admin_state_up: port.admin_state_up && network.admin_state_up,
        qos: qos(index, port.qos_policy_id.as_ref().or(network.qos_policy_id.as_ref()))?,
        ..PortSpec::default()
    };
    for (subnet, ip) in &port.addresses {
        let subnet_id = parse(subnet)?;
        match ip {
            IpAddr::V4(ip_address) => spec.fixed_ips.push(FixedIp { subnet_id, ip_address: *ip_address }),
            IpAddr::V6(ip_address) => {
                spec.fixed_ips_v6.push(FixedIpV6 { subnet_id, ip_address: *ip_address });
            }
        }
    }
    let pair = |(ip_address, mac): (IpNet, String)| AddressPair {
        mac_address: (mac != port.mac_address).then_some(mac),
        ip_address,
    };
    spec.allowed_address_pairs = pairs(&port.allowed_address_pairs)?.into_iter().map(pair).collect();
    Ok(spec)
}

/// The rules of a policy; none if it has none.
fn qos(index: &Index<'_>, policy: Option<&String>) -> Result<Option<QosSpec>, ApiError> {
    let Some(rules) = policy.and_then(|policy| index.qos.get(policy.as_str())) else { return Ok(None) };
    let mut spec = QosSpec::default();
    for rule in rules {
        match (rule.kind.as_str(), rule.direction.as_str()) {
            ("dscp_marking", _) => spec.dscp_mark = Some(number(rule.dscp_mark)?),
            (_, direction) => {
                let limit = BandwidthLimit {
                    max_kbps: number(rule.max_kbps)?,
                    max_burst_kbps: number(rule.max_burst_kbps)?,
                };
                match direction {
                    "ingress" => spec.ingress = Some(limit),
                    _ => spec.egress = Some(limit),
                }
            }
        }
    }
    Ok(Some(spec))
}

/// Addresses with the prefix lengths of their subnets.
fn addressed(index: &Index<'_>, port: &PortRow) -> Result<Vec<IpNet>, ApiError> {
    let with_prefix = |(subnet, ip): &(String, IpAddr)| {
        let subnet = index.subnet.get(subnet.as_str());
        let subnet = subnet.ok_or_else(|| ApiError::internal(format!("port {} is on no subnet", port.id)))?;
        IpNet::new(*ip, parse::<IpNet>(&subnet.cidr)?.prefix_len()).map_err(ApiError::internal)
    };
    port.addresses.iter().map(with_prefix).collect()
}

fn router_spec(index: &Index<'_>, router: &RouterRow, host: &str) -> Result<RouterSpec, ApiError> {
    let ports = index.ports_of_router.get(router.id.as_str()).map_or(&[][..], Vec::as_slice);
    let mut spec = RouterSpec {
        id: parse(&router.id)?,
        admin_state_up: router.admin_state_up,
        interfaces: Vec::new(),
        gateway: None,
        extra_gateways: Vec::new(),
        default_route_ecmp: router.enable_default_route_ecmp,
        routes: Vec::new(),
        routes_v6: Vec::new(),
    };
    for port in ports.iter().filter(|port| port.is_interface()) {
        spec.interfaces.push(RouterInterface {
            port_id: parse(&port.id)?,
            network_id: parse(&port.network_id)?,
            mac_address: port.mac_address.clone(),
            addresses: addressed(index, port)?,
        });
    }
    spec.interfaces.sort_by_key(|interface| interface.port_id);
    for route in json::<Vec<Route>>(&router.routes)? {
        match (route.destination, route.nexthop) {
            (IpNet::V4(destination), IpAddr::V4(nexthop)) => {
                spec.routes.push(HostRoute { destination, nexthop });
            }
            (IpNet::V6(destination), IpAddr::V6(nexthop)) => {
                spec.routes_v6.push(HostRouteV6 { destination, nexthop });
            }
            _ => return Err(ApiError::internal(format!("router {} has a mixed route", router.id))),
        }
    }
    let mut gateways = gateways(index, router, host)?.into_iter();
    spec.gateway = gateways.next();
    spec.extra_gateways = gateways.collect();
    Ok(spec)
}

/// The ways out; none as long as no host that this one reaches holds them.
fn gateways(index: &Index<'_>, router: &RouterRow, host: &str) -> Result<Vec<RouterGateway>, ApiError> {
    let Some(holder) = router.gateway_host_id.as_deref() else { return Ok(Vec::new()) };
    let place = match index.tunnels.get(holder) {
        _ if holder == host => GatewayPlace::Here,
        Some(tunnel_ip) => GatewayPlace::Remote(*tunnel_ip),
        None => return Ok(Vec::new()),
    };
    let rows = index.gateways.get(router.id.as_str()).map_or(&[][..], Vec::as_slice);
    let mut gateways: Vec<RouterGateway> =
        rows.iter().map(|row| gateway(index, row, place)).collect::<Result<_, _>>()?;
    // Of two gateways on one network the first has its floating IPs.
    for floating in index.floating_ips.get(router.id.as_str()).into_iter().flatten() {
        let at = rows.iter().position(|row| row.network_id == floating.floating_network_id);
        if let Some(gateway) = at.and_then(|at| gateways.get_mut(at)) {
            gateway.floating_ips.push(floating_spec(index, floating)?);
        }
    }
    Ok(gateways)
}

fn gateway(index: &Index<'_>, row: &GatewayRow, place: GatewayPlace) -> Result<RouterGateway, ApiError> {
    let port = index.gateway_ports.get(row.port_id.as_str());
    let port = port.ok_or_else(|| ApiError::internal(format!("gateway {} has no port", row.port_id)))?;
    let mut spec = RouterGateway {
        place,
        port_id: parse(&port.id)?,
        network_id: parse(&port.network_id)?,
        mac_address: port.mac_address.clone(),
        addresses: addressed(index, port)?,
        next_hop: None,
        next_hop_v6: None,
        enable_snat: row.enable_snat,
        floating_ips: Vec::new(),
    };
    for (subnet, _) in &port.addresses {
        let next_hop = index.subnet.get(subnet.as_str()).and_then(|subnet| subnet.gateway_ip.as_deref());
        match next_hop.map(parse::<IpAddr>).transpose()? {
            Some(IpAddr::V4(ip)) => spec.next_hop = spec.next_hop.or(Some(ip)),
            Some(IpAddr::V6(ip)) => spec.next_hop_v6 = spec.next_hop_v6.or(Some(ip)),
            None => {}
        }
    }
    Ok(spec)
}

fn floating_spec(index: &Index<'_>, floating: &FloatingIpRow) -> Result<FloatingIpSpec, ApiError> {
    let mut spec = FloatingIpSpec {
        id: parse(&floating.id)?,
        floating_ip_address: parse(&floating.floating_ip_address)?,
        fixed_ip_address: floating.fixed_ip_address.as_deref().map(parse::<Ipv4Addr>).transpose()?,
        port_forwardings: Vec::new(),
        qos: qos(index, floating.qos_policy_id.as_ref())?,
    };
    for row in index.forwardings.get(floating.id.as_str()).into_iter().flatten() {
        let (external, internal) = (number(row.external_port)?, number(row.internal_port)?);
        spec.port_forwardings.push(PortForwarding {
            protocol: match row.protocol.as_str() {
                "udp" => ForwardedProtocol::Udp,
                _ => ForwardedProtocol::Tcp,
            },
            external_ports: (external, external),
            internal_ip_address: parse(&row.internal_ip_address)?,
            internal_ports: (internal, internal),
        });
    }
    Ok(spec)
}

/// The groups that the host's ports name, and the sets that their rules name.
fn filters(index: &Index<'_>, own: &[&PortRow], state: &mut HostNetworks) -> Result<(), ApiError> {
    let groups: BTreeSet<&str> = own.iter().flat_map(|port| port.groups.iter().map(String::as_str)).collect();
    let mut sets: BTreeMap<&str, BTreeSet<IpNet>> = BTreeMap::new();
    for id in groups {
        let rules = index.rules.get(id).map_or(&[][..], Vec::as_slice);
        for rule in rules {
            if let Some(remote) = rule.remote_group_id.as_deref()
                && !sets.contains_key(remote)
            {
                sets.insert(remote, members(index, remote)?);
            }
            if let Some(remote) = rule.remote_address_group_id.as_deref()
                && !sets.contains_key(remote)
            {
                let addresses = index.group_addresses.get(remote).into_iter().flatten();
                sets.insert(remote, addresses.map(|text| parse(text)).collect::<Result<_, _>>()?);
            }
        }
        state.security_groups.push(SecurityGroupSpec {
            id: parse(id)?,
            stateful: index.groups.get(id).copied().unwrap_or(true),
            rules: rules.iter().map(|rule| rule_spec(rule)).collect::<Result<_, _>>()?,
        });
    }
    for (id, addresses) in sets {
        state.address_sets.push(AddressSetSpec { id: parse(id)?, addresses });
    }
    Ok(())
}

fn members(index: &Index<'_>, group: &str) -> Result<BTreeSet<IpNet>, ApiError> {
    let mut addresses = Vec::new();
    for member in index.members.get(group).into_iter().flatten() {
        if let Some(address) = &member.address {
            addresses.push(host_net(parse(address)?));
        }
        addresses.extend(pairs(&member.allowed_address_pairs)?.into_iter().map(|(net, _)| net));
    }
    // At once: a set that grows one by one costs several times as much.
    Ok(addresses.into_iter().collect())
}

fn rule_spec(rule: &RuleRow) -> Result<SecurityGroupRule, ApiError> {
    let remote = match (&rule.remote_ip_prefix, &rule.remote_group_id, &rule.remote_address_group_id) {
        (Some(prefix), ..) => Some(Remote::Cidr(parse::<IpNet>(prefix)?.trunc())),
        (None, Some(group), _) | (None, None, Some(group)) => Some(Remote::Set(parse(group)?)),
        (None, None, None) => None,
    };
    Ok(SecurityGroupRule {
        direction: match rule.direction.as_str() {
            "ingress" => Direction::Ingress,
            _ => Direction::Egress,
        },
        ethertype: match rule.ethertype.as_str() {
            "IPv6" => EtherType::Ipv6,
            _ => EtherType::Ipv4,
        },
        protocol: protocol(rule)?,
        remote,
    })
}

fn protocol(rule: &RuleRow) -> Result<Protocol, ApiError> {
    // "ip" is any, as it is for Neutron's drivers.
    let Some(name) = rule.protocol.as_deref().filter(|name| *name != "ip") else { return Ok(Protocol::Any) };
    let unknown = || ApiError::internal(format!("rule {} has the unknown protocol '{name}'", rule.id));
    let protocol = protocol_number(name).ok_or_else(unknown)?;
    let (min, max) = (rule.port_range_min, rule.port_range_max);
    let ports = match (min, max) {
        (Some(min), Some(max)) => Some((number(min)?, number(max)?)),
        _ => None,
    };
    Ok(match protocol {
        6 => Protocol::Tcp { ports },
        17 => Protocol::Udp { ports },
        132 => Protocol::Sctp { ports },
        1 | 58 if (protocol == 58) == (rule.ethertype == "IPv6") => {
            Protocol::Icmp { icmp_type: min.map(number).transpose()?, code: max.map(number).transpose()? }
        }
        number => Protocol::Number { number },
    })
}
