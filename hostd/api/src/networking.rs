//! Desired state of networks beyond one host's bridge: filters, the overlay, provider networks, routers, IPv6, names,
//! quality of service. Everything here has a default that means "not wanted".
//!
//! The controller names what a host needs and nothing else: what a host gets follows from the ports and gateways that
//! are placed there.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{AddressSetId, FloatingIpId, HostRoute, NetworkId, PortId, RouterId, SecurityGroupId, SubnetId};

/// A security group's rules. Who is in it is not said here: ports name their groups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityGroupSpec {
    /// Id.
    pub id: SecurityGroupId,
    /// Answers to what a rule lets through pass, too. A stateless group's rules are applied to every packet by itself;
    /// a port's groups are all of one kind (the controller refuses a mixture, as Neutron does).
    pub stateful: bool,
    /// Its rules, in any order: each only ever allows. The order and duplicates don't matter.
    pub rules: Vec<SecurityGroupRule>,
}

/// What a security group lets through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SecurityGroupRule {
    /// Into the port or out of it.
    pub direction: Direction,
    /// IPv4 or IPv6.
    pub ethertype: EtherType,
    /// Protocol and ports.
    #[serde(default)]
    pub protocol: Protocol,
    /// The other end; none: anyone. `remote_group_id` and `remote_address_group_id` are both [`Remote::Set`].
    #[serde(default)]
    pub remote: Option<Remote>,
}

/// Direction of a rule, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Into the guest.
    Ingress,
    /// Out of the guest.
    Egress,
}

/// Version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EtherType {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// Protocol of a rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum Protocol {
    /// Any.
    #[default]
    Any,
    /// TCP.
    Tcp {
        /// Destination ports, first and last; none: all.
        #[serde(default)]
        ports: Option<(u16, u16)>,
    },
    /// UDP.
    Udp {
        /// Destination ports, first and last; none: all.
        #[serde(default)]
        ports: Option<(u16, u16)>,
    },
    /// SCTP.
    Sctp {
        /// Destination ports, first and last; none: all.
        #[serde(default)]
        ports: Option<(u16, u16)>,
    },
    /// ICMP in a rule for IPv4, ICMPv6 in one for IPv6.
    Icmp {
        /// Type (Neutron's `port_range_min`); none: all.
        #[serde(default)]
        icmp_type: Option<u8>,
        /// Code (Neutron's `port_range_max`); none: all.
        #[serde(default)]
        code: Option<u8>,
    },
    /// Any other by its number (which may also be that of one of the above: all of it, then).
    Number {
        /// IANA protocol number.
        number: u8,
    },
}

/// The other end of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// A range; of the rule's version of IP.
    Cidr(IpNet),
    /// An address set in [`crate::DesiredState::address_sets`].
    Set(AddressSetId),
}

/// Addresses that rules refer to by one name: all addresses (fixed ones and those of allowed address pairs) of the ports
/// of a security group, on whatever host, or the addresses of an address group. Its id is that of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressSetSpec {
    /// Id.
    pub id: AddressSetId,
    /// Addresses and ranges of both versions; they may overlap.
    pub addresses: BTreeSet<IpNet>,
}

/// An allowed address pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPair {
    /// Ethernet address; none: the port's own.
    #[serde(default)]
    pub mac_address: Option<String>,
    /// Address or range.
    pub ip_address: IpNet,
}

/// This host's end of the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelSpec {
    /// The address that this host announced in [`crate::Inventory::tunnel_ip`].
    pub local_ip: IpAddr,
    /// UDP port of all hosts; 4789 (RFC 7348) if absent.
    #[serde(default = "vxlan_port")]
    pub udp_port: u16,
}

fn vxlan_port() -> u16 {
    4789
}

/// Bytes that VXLAN adds to a guest's packet: Ethernet header, VXLAN, UDP and the outer IP header.
pub const fn vxlan_overhead(underlay_is_ipv6: bool) -> u16 {
    14 + 8 + 8 + if underlay_is_ipv6 { 40 } else { 20 }
}

/// How a network reaches beyond this host (Neutron's provider attributes).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SegmentSpec {
    /// An overlay. The network's MTU must be smaller than the underlay's by [`vxlan_overhead`].
    Vxlan {
        /// VXLAN network identifier, 1 to 16,777,215, unique in the cloud.
        vni: u32,
    },
    /// The untagged frames of a physical network. At most one network uses it.
    Flat {
        /// One of those in [`crate::Inventory::physical_networks`].
        physical_network: String,
    },
    /// A VLAN of a physical network.
    Vlan {
        /// One of those in [`crate::Inventory::physical_networks`].
        physical_network: String,
        /// VLAN id, 1 to 4094.
        vlan_id: u16,
    },
}

/// A port of the same network on another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemotePort {
    /// `fa:16:3e:xx:xx:xx`.
    pub mac_address: String,
    /// Its addresses of both versions (no ranges of allowed pairs).
    pub ip_addresses: Vec<IpAddr>,
    /// [`TunnelSpec::local_ip`] of its host.
    pub tunnel_ip: IpAddr,
}

/// A subnet of IPv6.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetV6Spec {
    /// Id.
    pub id: SubnetId,
    /// Prefix.
    pub cidr: Ipv6Net,
    /// Router's address. It may be a link-local one.
    pub gateway_ip: Option<Ipv6Addr>,
    /// `ipv6_ra_mode`: how this host's router advertisements say that addresses are got; none: the subnet isn't
    /// announced (guests are configured by hand, or by somebody else's router).
    #[serde(default)]
    pub ra_mode: Option<Ipv6Mode>,
    /// `ipv6_address_mode`: with one of DHCPv6 this host's server answers. Equal to `ra_mode` if both are set (Neutron's
    /// own rule).
    #[serde(default)]
    pub address_mode: Option<Ipv6Mode>,
    /// Announced to guests.
    #[serde(default)]
    pub dns_nameservers: Vec<Ipv6Addr>,
}

/// How guests of an IPv6 subnet get their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ipv6Mode {
    /// By router advertisements alone (the prefix is a /64).
    Slaac,
    /// By DHCPv6.
    Dhcpv6Stateful,
    /// Addresses by router advertisements (the prefix is a /64), the rest by DHCPv6.
    Dhcpv6Stateless,
}

/// An IPv6 address of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIpV6 {
    /// Subnet.
    pub subnet_id: SubnetId,
    /// Address.
    pub ip_address: Ipv6Addr,
}

/// A name that a network's resolver knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsName {
    /// The port's `dns_name` (the server's host name): one label, without the network's domain.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// The rules of a QoS policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QosSpec {
    /// What the guest may get.
    #[serde(default)]
    pub ingress: Option<BandwidthLimit>,
    /// What the guest may send.
    #[serde(default)]
    pub egress: Option<BandwidthLimit>,
    /// DSCP that its packets are marked with, 0 to 63.
    #[serde(default)]
    pub dscp_mark: Option<u8>,
}

/// A bandwidth limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BandwidthLimit {
    /// Thousands of bits per second, at least 1.
    pub max_kbps: u32,
    /// Thousands of bits; 0: 80 % of what passes in a second, as Neutron has it for TCP.
    #[serde(default)]
    pub max_burst_kbps: u32,
}

/// A router. It is on every host that has a server's port in one of its networks: what is between its networks is routed
/// on the sender's host, what leaves by the gateway on the host that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterSpec {
    /// Id.
    pub id: RouterId,
    /// `admin_state_up`; while it is false, nothing is routed.
    pub admin_state_up: bool,
    /// Its interfaces, all of them on every host. Their networks are all in [`crate::DesiredState::networks`].
    pub interfaces: Vec<RouterInterface>,
    /// `external_gateway_info`, the first of `external_gateways`: the default route leads there.
    #[serde(default)]
    pub gateway: Option<RouterGateway>,
    /// The others of `external_gateways`; none without a first one. All gateways of a router are on one host.
    #[serde(default)]
    pub extra_gateways: Vec<RouterGateway>,
    /// `enable_default_route_ecmp`: default routes lead to all gateways.
    #[serde(default)]
    pub default_route_ecmp: bool,
    /// `routes` (IPv4).
    #[serde(default)]
    pub routes: Vec<HostRoute>,
    /// `routes` (IPv6).
    #[serde(default)]
    pub routes_v6: Vec<HostRouteV6>,
}

impl RouterSpec {
    /// All gateways, the first one first.
    pub fn gateways(&self) -> impl Iterator<Item = &RouterGateway> {
        self.gateway.iter().chain(&self.extra_gateways)
    }
}

/// A static route of IPv6.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRouteV6 {
    /// Destination.
    pub destination: Ipv6Net,
    /// Next hop.
    pub nexthop: Ipv6Addr,
}

/// An interface of a router in a tenant's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterInterface {
    /// The port with device owner `network:router_interface`.
    pub port_id: PortId,
    /// Its network.
    pub network_id: NetworkId,
    /// The port's Ethernet address.
    pub mac_address: String,
    /// The port's addresses with their subnets' prefix lengths.
    pub addresses: Vec<IpNet>,
}

/// The way out of a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterGateway {
    /// What the host that is spoken to has to do with it.
    pub place: GatewayPlace,
    /// The port with device owner `network:router_gateway`.
    pub port_id: PortId,
    /// The external network; named in [`crate::DesiredState::networks`] only of the host that holds the gateway.
    pub network_id: NetworkId,
    /// The port's Ethernet address.
    pub mac_address: String,
    /// The port's addresses with their subnets' prefix lengths.
    pub addresses: Vec<IpNet>,
    /// `gateway_ip` of the external IPv4 subnet.
    pub next_hop: Option<Ipv4Addr>,
    /// `gateway_ip` of the external IPv6 subnet.
    #[serde(default)]
    pub next_hop_v6: Option<Ipv6Addr>,
    /// IPv4 packets of the interfaces' subnets that leave by the gateway get its first IPv4 address.
    pub enable_snat: bool,
    /// The router's floating IPs on this network that are associated with a fixed address or have port forwardings; where
    /// several gateways are on one network, those of the first.
    #[serde(default)]
    pub floating_ips: Vec<FloatingIpSpec>,
}

/// Where a router's gateway is, seen from a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GatewayPlace {
    /// On this host.
    Here,
    /// On the host with this tunnel address.
    Remote(IpAddr),
}

/// A floating IP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloatingIpSpec {
    /// Id.
    pub id: FloatingIpId,
    /// The address in the external network.
    pub floating_ip_address: Ipv4Addr,
    /// The fixed address that all of it is translated to and from; none for one with port forwardings.
    pub fixed_ip_address: Option<Ipv4Addr>,
    /// Port forwardings.
    #[serde(default)]
    pub port_forwardings: Vec<PortForwarding>,
    /// Its QoS policy.
    #[serde(default)]
    pub qos: Option<QosSpec>,
}

/// A port forwarding of a floating IP. External and internal range have the same length (1 for single ports).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortForwarding {
    /// TCP or UDP.
    pub protocol: ForwardedProtocol,
    /// Ports of the floating IP, first and last.
    pub external_ports: (u16, u16),
    /// The fixed address.
    pub internal_ip_address: Ipv4Addr,
    /// Its ports, first and last.
    pub internal_ports: (u16, u16),
}

/// Protocols of port forwardings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForwardedProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One address as an element of a set (a /32 or /128).
pub fn host_net(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(ip) => IpNet::V4(Ipv4Net::from(ip)),
        IpAddr::V6(ip) => IpNet::V6(Ipv6Net::from(ip)),
    }
}
