//! From what the controller says to what can be executed: [`NetworkSpec`] → [`NetworkConfig`], or a [`SpecError`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mote_host_api::{
    AddressSetId, NetworkId, NetworkSpec, PortId, PortSpec, SecurityGroupId, SegmentSpec, SubnetId,
    SubnetSpec, TunnelSpec,
};

use crate::names::{
    METADATA_IP, METADATA_IP_V6, MacAddress, NetworkKey, UPLINK, VXLAN, bridge_mac, tap_name,
};
use crate::{
    Desired,
    filter::{Conntrack, Memory, Ruleset, Surroundings, filter},
    observed::{LinkKind, ObservedLink, PortFlags, VxlanLink},
    router,
};

/// Smallest MTU: what every IPv4 link carries (RFC 791).
pub const MTU_MIN: u16 = 68;
/// Smallest MTU of a network with IPv6 (RFC 8200 §5).
pub const MTU_MIN_V6: u16 = 1280;
/// Largest MTU: that of a tap (65535 less the Ethernet header).
pub const MTU_MAX: u16 = 65521;
/// Subnets per network and host.
pub const SUBNETS_MAX: usize = 64;
/// Ports per network and host: the kernel's bridge has 1023 (BR_MAX_PORTS).
pub const PORTS_MAX: usize = 1023;
/// Addresses of one port.
pub const FIXED_IPS_MAX: usize = 64;
/// DNS servers of one subnet (Neutron's default is 5).
pub const DNS_NAMESERVERS_MAX: usize = 16;
/// Host routes of one subnet (Neutron's default is 20).
pub const HOST_ROUTES_MAX: usize = 64;

/// Why a network can't be made as it is described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("network {network}: {problem}")]
pub struct SpecError {
    /// The network that is refused. What exists of it stays as it is.
    pub network: NetworkId,
    /// What is wrong with it.
    pub problem: SpecProblem,
}

/// What is wrong with a description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecProblem {
    /// Two descriptions of one network.
    #[error("named twice")]
    Duplicate,
    /// Namespaces would have the same name.
    #[error("its id starts like that of network {0}: both would use one namespace")]
    KeyCollision(NetworkId),
    /// MTU.
    #[error("MTU {0} is not within {MTU_MIN}..={MTU_MAX}")]
    Mtu(u16),
    /// Too many of something.
    #[error("{count} {what}, at most {max} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// Limit.
        max: usize,
    },
    /// Address range.
    #[error("subnet {0}: {1} is no range for hosts (prefix length 1 to 30, unicast)")]
    Cidr(SubnetId, Ipv4Net),
    /// Two ranges overlap.
    #[error("subnets {0} and {1} overlap")]
    Overlap(SubnetId, SubnetId),
    /// A subnet is named twice.
    #[error("subnet {0} is named twice")]
    DuplicateSubnet(SubnetId),
    /// Service address.
    #[error("subnet {0}: service address {1} is no host address of {2}")]
    ServiceIp(SubnetId, Ipv4Addr, Ipv4Net),
    /// A port is named twice, or two taps would have the same name.
    #[error("port {0}: another port has the same id, or one with the same first 11 digits")]
    DuplicatePort(PortId),
    /// Ethernet address.
    #[error("port {0}: {1:?} is no station's Ethernet address")]
    Mac(PortId, String),
    /// Ethernet address.
    #[error("port {0}: {1} is in use by another port or by the bridge")]
    DuplicateMac(PortId, MacAddress),
    /// Address of a subnet that isn't in this network.
    #[error("port {0}: subnet {1} is not of this network")]
    UnknownSubnet(PortId, SubnetId),
    /// Address outside of its subnet, or one that is no host's.
    #[error("port {0}: {1} is no host address of {2}")]
    FixedIp(PortId, Ipv4Addr, Ipv4Net),
    /// A group that isn't described.
    #[error("port {0}: security group {1} is not described")]
    UnknownGroup(PortId, SecurityGroupId),
    /// Groups of both kinds.
    #[error("port {0}: its security groups are partly stateful and partly stateless")]
    MixedGroups(PortId),
    /// A VXLAN segment without this host's end of the overlay.
    #[error(
        "it is on other hosts, too, and this host has no tunnel address to reach them from: give mote-hostd run --tunnel-ip ADDRESS, or MOTE_HOST_TUNNEL_IP to mote up"
    )]
    NoTunnel,
    /// Segment.
    #[error("{0}")]
    Segment(&'static str),
    /// A port on another host.
    #[error(
        "port {0} on host {1}: no station's Ethernet address, or an address of another version than this host's"
    )]
    Remote(String, IpAddr),
    /// The kernel can't do it.
    #[error(
        "its ports shall be filtered, and this kernel's conntrack doesn't see bridged packets: it needs the module nf_conntrack_bridge or br_netfilter"
    )]
    NoConntrack,
    /// QoS policy.
    #[error("QoS policy of a port: {0}")]
    Qos(&'static str),
    /// What this host can't do.
    #[error("{0} is not possible on this host yet")]
    NotYet(&'static str),
    /// A set that isn't described.
    #[error("security group {0}: address set {1} is not described")]
    UnknownSet(SecurityGroupId, AddressSetId),
    /// Address.
    #[error("port {0}: {1} is in use by another port or by the network's services")]
    DuplicateIp(PortId, Ipv4Addr),
}

/// A network that can be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Id.
    pub id: NetworkId,
    /// Key of its names.
    pub key: NetworkKey,
    /// Address of `br0`.
    pub bridge_mac: MacAddress,
    /// MTU of bridge and taps.
    pub mtu: u16,
    /// What its ports may send and get.
    pub filter: Arc<Ruleset>,
    /// Whether the filter needs br_netfilter.
    pub bridge_netfilter: bool,
    /// How it reaches other hosts.
    pub segment: Option<Segment>,
    /// Ports on other hosts, with the addresses of those hosts.
    pub tunnels: BTreeMap<MacAddress, IpAddr>,
    /// Addresses of ports on other hosts.
    pub remote_neighbours: BTreeMap<IpAddr, MacAddress>,
    /// Interfaces of routers by the names of their links.
    pub router_ports: BTreeMap<String, MacAddress>,
    /// Addresses of `br0`.
    pub addresses: BTreeSet<IpNet>,
    /// Its ports by the names of their taps.
    pub ports: BTreeMap<String, PortConfig>,
}

/// A port that can be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Id.
    pub id: PortId,
    /// Ethernet address of the guest.
    pub mac: MacAddress,
    /// Addresses of the guest.
    pub addresses: Vec<IpAddr>,
}

impl NetworkConfig {
    /// Every address of every port.
    pub fn neighbours(&self) -> BTreeMap<IpAddr, MacAddress> {
        let mut neighbours = self.remote_neighbours.clone();
        neighbours.extend(self.local_neighbours());
        neighbours.retain(|ip, _| ip.is_ipv4() || self.mtu >= MTU_MIN_V6);
        neighbours
    }

    fn local_neighbours(&self) -> BTreeMap<IpAddr, MacAddress> {
        self.ports.values().flat_map(|port| port.addresses.iter().map(|ip| (*ip, port.mac))).collect()
    }
}

/// As [`validate_all`], with the filters.
pub fn configure(
    desired: &Desired,
    conntrack: Conntrack,
    memory: &mut Memory,
) -> (Vec<NetworkConfig>, Vec<SpecError>) {
    let (mut configs, mut errors) = validate_all(&desired.networks);
    let around = Surroundings::new(&desired.security_groups, &desired.address_sets, conntrack);
    let specs: HashMap<NetworkId, &NetworkSpec> =
        desired.networks.iter().map(|spec| (spec.id, spec)).collect();
    configs.retain_mut(|config| {
        let Some(spec) = specs.get(&config.id) else { return false };
        match surround(config, spec, desired).and_then(|()| filter(spec, &around, memory)) {
            Ok(ruleset) => {
                config.filter = Arc::new(ruleset);
                config.bridge_netfilter = conntrack == Conntrack::BridgeNetfilter
                    && spec.ports.iter().any(|port| port.port_security && port.admin_state_up);
                true
            }
            Err(problem) => {
                errors.push(SpecError { network: config.id, problem });
                false
            }
        }
    });
    (configs, errors)
}

/// How a network reaches beyond this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// An overlay.
    Vxlan(VxlanLink),
    /// A physical network.
    Uplink {
        /// Its name.
        physical_network: String,
        /// Tag; none: untagged frames.
        vlan_id: Option<u16>,
    },
}

impl Segment {
    /// Name of its link in the network's namespace.
    pub fn link_name(&self) -> &'static str {
        match self {
            Self::Vxlan(_) => VXLAN,
            Self::Uplink { .. } => UPLINK,
        }
    }

    /// What an uplink's alias says.
    pub fn alias(&self) -> Option<String> {
        match self {
            Self::Vxlan(_) => None,
            Self::Uplink { physical_network, vlan_id: None } => Some(format!("flat:{physical_network}")),
            Self::Uplink { physical_network, vlan_id: Some(id) } => {
                Some(format!("vlan:{id}:{physical_network}"))
            }
        }
    }

    /// How its link forwards.
    pub fn flags(&self) -> PortFlags {
        match self {
            Self::Vxlan(_) => PortFlags::OVERLAY,
            Self::Uplink { .. } => PortFlags::UPLINK,
        }
    }

    /// Whether a link of that name is this one.
    pub fn is(&self, link: &ObservedLink) -> bool {
        match self {
            Self::Vxlan(wanted) => link.kind == LinkKind::Vxlan(*wanted),
            Self::Uplink { .. } => link.alias == self.alias(),
        }
    }
}

const VNI_MAX: u32 = (1 << 24) - 1;
const VLAN_ID_MAX: u16 = 4094;

/// How the network leaves this host. `is_elsewhere`: whether something of it is on other hosts.
fn segment(
    spec: &NetworkSpec,
    tunnel: Option<TunnelSpec>,
    is_elsewhere: bool,
) -> Result<Option<Segment>, SpecProblem> {
    let uplink = |name: &String, vlan_id| Segment::Uplink { physical_network: name.clone(), vlan_id };
    Ok(match &spec.segment {
        None => None,
        Some(SegmentSpec::Vxlan { vni }) => {
            if !(1..=VNI_MAX).contains(vni) {
                return Err(SpecProblem::Segment("a VXLAN network identifier is 1 to 16777215"));
            }
            if tunnel.is_none() && !spec.remote_ports.is_empty() {
                return Err(SpecProblem::NoTunnel);
            }
            // The network ends here as long as all of it is here: of one host alone nothing is asked, and two clouds on one
            // machine don't get into each other's way.
            tunnel.filter(|_| is_elsewhere).map(|tunnel| {
                Segment::Vxlan(VxlanLink { vni: *vni, local: tunnel.local_ip, port: tunnel.udp_port })
            })
        }
        Some(SegmentSpec::Flat { physical_network }) => Some(uplink(physical_network, None)),
        Some(SegmentSpec::Vlan { physical_network, vlan_id }) => {
            if !(1..=VLAN_ID_MAX).contains(vlan_id) {
                return Err(SpecProblem::Segment("a VLAN id is 1 to 4094"));
            }
            Some(uplink(physical_network, Some(*vlan_id)))
        }
    })
}

/// What belongs to the network but isn't in its own description.
fn surround(config: &mut NetworkConfig, spec: &NetworkSpec, desired: &Desired) -> Result<(), SpecProblem> {
    let (router_ports, gateways) = router::in_network(spec.id, desired);
    let local = desired.tunnel.map(|tunnel| tunnel.local_ip);
    // Another host agent of this machine: no overlay leads to it.
    let remote_ports = || spec.remote_ports.iter().filter(|port| Some(port.tunnel_ip) != local);
    let is_elsewhere =
        remote_ports().next().is_some() || !gateways.is_empty() || router::is_crossed(spec.id, desired);
    config.segment = segment(spec, desired.tunnel, is_elsewhere)?;
    for port in remote_ports() {
        let mac = port.mac_address.parse().ok().filter(|mac: &MacAddress| mac.is_station());
        let mac = mac.filter(|_| local.is_some_and(|local| local.is_ipv4() == port.tunnel_ip.is_ipv4()));
        let mac = mac.ok_or_else(|| SpecProblem::Remote(port.mac_address.clone(), port.tunnel_ip))?;
        config.tunnels.insert(mac, port.tunnel_ip);
        let own = IpAddr::V6(mac.link_local());
        config.remote_neighbours.extend(port.ip_addresses.iter().chain([&own]).map(|ip| (*ip, mac)));
    }
    config.router_ports = router_ports;
    config.tunnels.extend(gateways);
    if !config.tunnels.is_empty() && !matches!(config.segment, Some(Segment::Vxlan(_))) {
        return Err(SpecProblem::Segment("ports on other hosts need a VXLAN segment"));
    }
    Ok(())
}

/// Sorts descriptions into those that can be executed and those that can't.
pub fn validate_all(desired: &[NetworkSpec]) -> (Vec<NetworkConfig>, Vec<SpecError>) {
    let mut configs = Vec::with_capacity(desired.len());
    let mut errors = Vec::new();
    let mut seen: HashMap<NetworkKey, NetworkId> = HashMap::new();
    for spec in desired {
        let result = match seen.insert(spec.id.into(), spec.id) {
            Some(other) if other == spec.id => {
                Err(SpecError { network: spec.id, problem: SpecProblem::Duplicate })
            }
            Some(other) => Err(SpecError { network: spec.id, problem: SpecProblem::KeyCollision(other) }),
            None => validate(spec),
        };
        match result {
            Ok(config) => configs.push(config),
            Err(error) => errors.push(error),
        }
    }
    // Of two descriptions that exclude each other, neither is taken.
    let refused: BTreeSet<NetworkKey> = errors.iter().map(|error| error.network.into()).collect();
    configs.retain(|config: &NetworkConfig| !refused.contains(&config.key));
    (configs, errors)
}

/// Checks one description.
pub fn validate(spec: &NetworkSpec) -> Result<NetworkConfig, SpecError> {
    let refuse = |problem| SpecError { network: spec.id, problem };
    if !(MTU_MIN..=MTU_MAX).contains(&spec.mtu) {
        return Err(refuse(SpecProblem::Mtu(spec.mtu)));
    }
    at_most("subnets", spec.subnets.len(), SUBNETS_MAX).map_err(refuse)?;
    at_most("ports", spec.ports.len(), PORTS_MAX).map_err(refuse)?;
    validate_subnets(&spec.subnets).map_err(refuse)?;
    let ports = validate_ports(spec).map_err(refuse)?;

    let metadata = [IpNet::V4(METADATA_IP.into()), IpNet::V6(Ipv6Net::new_assert(METADATA_IP_V6, 64))];
    let services =
        spec.subnets.iter().filter_map(|s| IpNet::new(s.service_ip.into(), s.cidr.prefix_len()).ok());
    Ok(NetworkConfig {
        id: spec.id,
        key: spec.id.into(),
        bridge_mac: bridge_mac(spec.id),
        mtu: spec.mtu,
        filter: Arc::default(),
        bridge_netfilter: false,
        segment: None,
        tunnels: BTreeMap::new(),
        remote_neighbours: BTreeMap::new(),
        router_ports: BTreeMap::new(),
        addresses: services
            .chain(metadata)
            .filter(|a| a.addr().is_ipv4() || spec.mtu >= MTU_MIN_V6)
            .collect(),
        ports,
    })
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), SpecProblem> {
    if count > max { Err(SpecProblem::TooMany { what, count, max }) } else { Ok(()) }
}

fn validate_subnets(subnets: &[SubnetSpec]) -> Result<(), SpecProblem> {
    for (i, subnet) in subnets.iter().enumerate() {
        let cidr = subnet.cidr;
        if !(1..=30).contains(&cidr.prefix_len()) || cidr.addr() != cidr.network() || !is_unicast(cidr) {
            return Err(SpecProblem::Cidr(subnet.id, cidr));
        }
        if !is_host_of(cidr, subnet.service_ip) || subnet.service_ip == METADATA_IP {
            return Err(SpecProblem::ServiceIp(subnet.id, subnet.service_ip, cidr));
        }
        at_most("DNS servers of a subnet", subnet.dns_nameservers.len(), DNS_NAMESERVERS_MAX)?;
        at_most("host routes of a subnet", subnet.host_routes.len(), HOST_ROUTES_MAX)?;
        for other in &subnets[..i] {
            if other.id == subnet.id {
                return Err(SpecProblem::DuplicateSubnet(subnet.id));
            }
            if other.cidr.contains(&cidr) || cidr.contains(&other.cidr) {
                return Err(SpecProblem::Overlap(other.id, subnet.id));
            }
        }
    }
    Ok(())
}

fn validate_ports(spec: &NetworkSpec) -> Result<BTreeMap<String, PortConfig>, SpecProblem> {
    let mut macs = BTreeSet::from([bridge_mac(spec.id)]);
    let mut addresses: BTreeSet<Ipv4Addr> = spec.subnets.iter().map(|subnet| subnet.service_ip).collect();
    addresses.insert(METADATA_IP);
    let mut ports = BTreeMap::new();
    for port in &spec.ports {
        at_most("addresses of a port", port.fixed_ips.len(), FIXED_IPS_MAX)?;
        let mac = station_mac(port).ok_or_else(|| SpecProblem::Mac(port.id, port.mac_address.clone()))?;
        if !macs.insert(mac) {
            return Err(SpecProblem::DuplicateMac(port.id, mac));
        }
        for fixed in &port.fixed_ips {
            let subnet = spec.subnets.iter().find(|subnet| subnet.id == fixed.subnet_id);
            let cidr = subnet.ok_or(SpecProblem::UnknownSubnet(port.id, fixed.subnet_id))?.cidr;
            if !is_host_of(cidr, fixed.ip_address) {
                return Err(SpecProblem::FixedIp(port.id, fixed.ip_address, cidr));
            }
            if !addresses.insert(fixed.ip_address) {
                return Err(SpecProblem::DuplicateIp(port.id, fixed.ip_address));
            }
        }
        let v6 = port.fixed_ips_v6.iter().map(|fixed| fixed.ip_address).chain([mac.link_local()]);
        let v4 = port.fixed_ips.iter().map(|fixed| IpAddr::V4(fixed.ip_address));
        let addresses = v4.chain(v6.map(IpAddr::V6)).collect();
        if ports.insert(tap_name(port.id), PortConfig { id: port.id, mac, addresses }).is_some() {
            return Err(SpecProblem::DuplicatePort(port.id));
        }
    }
    Ok(ports)
}

/// The port's Ethernet address if a station can have it.
pub fn station_mac(port: &PortSpec) -> Option<MacAddress> {
    port.mac_address.parse().ok().filter(|mac: &MacAddress| mac.is_station())
}

/// Neither 0.0.0.0/8, loopback, multicast nor beyond.
fn is_unicast(cidr: Ipv4Net) -> bool {
    let reserved =
        [Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8), Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8)];
    let class_d_and_e = Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3);
    !reserved
        .iter()
        .chain([&class_d_and_e])
        .any(|net| net.contains(&cidr.network()) || cidr.contains(&net.network()))
}

/// Within the range, and neither its network nor its broadcast address.
fn is_host_of(cidr: Ipv4Net, ip: Ipv4Addr) -> bool {
    cidr.contains(&ip) && ip != cidr.network() && ip != cidr.broadcast()
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
