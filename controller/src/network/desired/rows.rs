//! Rows as the plan takes them, and the index over them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use sqlx::FromRow;

use super::super::security_group_rules::RuleRow;
use crate::http::error::ApiError;

/// A host.
#[derive(Debug, Clone, FromRow)]
pub(super) struct HostRow {
    pub(super) id: String,
    pub(super) tunnel_ip: Option<String>,
}

/// A network.
#[derive(Debug, Clone, FromRow)]
pub(super) struct NetworkRow {
    pub(super) id: String,
    pub(super) mtu: i64,
    pub(super) network_type: String,
    pub(super) physical_network: String,
    pub(super) segmentation_id: i64,
    pub(super) admin_state_up: bool,
    pub(super) qos_policy_id: Option<String>,
}

/// A subnet.
#[derive(Debug, Clone, FromRow)]
pub(super) struct SubnetRow {
    pub(super) id: String,
    pub(super) network_id: String,
    pub(super) cidr: String,
    pub(super) gateway_ip: Option<String>,
    pub(super) enable_dhcp: bool,
    pub(super) dns_nameservers: String,
    pub(super) host_routes: String,
    pub(super) ipv6_address_mode: Option<String>,
    pub(super) ipv6_ra_mode: Option<String>,
}

/// A port of any kind, with its server's host.
#[derive(Debug, Clone, FromRow)]
pub(super) struct PortRow {
    pub(super) id: String,
    pub(super) network_id: String,
    pub(super) mac_address: String,
    pub(super) device_owner: String,
    pub(super) router_id: Option<String>,
    pub(super) server_id: Option<String>,
    /// None while the server is on no host, or leaves it.
    pub(super) host_id: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) port_security_enabled: bool,
    pub(super) allowed_address_pairs: String,
    pub(super) admin_state_up: bool,
    pub(super) qos_policy_id: Option<String>,
    /// Subnet and address, in order.
    #[sqlx(skip)]
    pub(super) addresses: Vec<(String, IpAddr)>,
    /// Security groups.
    #[sqlx(skip)]
    pub(super) groups: Vec<String>,
}

/// A router.
#[derive(Debug, Clone, FromRow)]
pub(super) struct RouterRow {
    pub(super) id: String,
    pub(super) admin_state_up: bool,
    pub(super) enable_default_route_ecmp: bool,
    pub(super) gateway_host_id: Option<String>,
    pub(super) routes: String,
}

/// A router's gateway.
#[derive(Debug, Clone, FromRow)]
pub(super) struct GatewayRow {
    pub(super) router_id: String,
    pub(super) port_id: String,
    pub(super) network_id: String,
    pub(super) enable_snat: bool,
}

/// A floating IP that leads somewhere.
#[derive(Debug, Clone, FromRow)]
pub(super) struct FloatingIpRow {
    pub(super) id: String,
    pub(super) router_id: Option<String>,
    pub(super) floating_network_id: String,
    pub(super) floating_ip_address: String,
    pub(super) fixed_ip_address: Option<String>,
    pub(super) qos_policy_id: Option<String>,
}

/// A port forwarding.
#[derive(Debug, Clone, FromRow)]
pub(super) struct ForwardingRow {
    pub(super) floatingip_id: String,
    pub(super) internal_ip_address: String,
    pub(super) internal_port: i64,
    pub(super) external_port: i64,
    pub(super) protocol: String,
}

/// A rule of a QoS policy.
#[derive(Debug, Clone, FromRow)]
pub(super) struct QosRow {
    pub(super) policy_id: String,
    pub(super) kind: String,
    pub(super) direction: String,
    pub(super) max_kbps: i64,
    pub(super) max_burst_kbps: i64,
    pub(super) dscp_mark: i64,
}

/// What a group's members send from.
#[derive(Debug, Clone, FromRow)]
pub(super) struct MemberRow {
    pub(super) security_group_id: String,
    pub(super) address: Option<String>,
    pub(super) allowed_address_pairs: String,
}

/// Everything that the plan looks at. It may hold more than one host needs.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    pub(super) hosts: Vec<HostRow>,
    pub(super) networks: Vec<NetworkRow>,
    pub(super) subnets: Vec<SubnetRow>,
    pub(super) ports: Vec<PortRow>,
    pub(super) routers: Vec<RouterRow>,
    /// The first of a router's before the others.
    pub(super) gateways: Vec<GatewayRow>,
    pub(super) floating_ips: Vec<FloatingIpRow>,
    pub(super) forwardings: Vec<ForwardingRow>,
    /// Id and whether it is stateful.
    pub(super) groups: Vec<(String, bool)>,
    pub(super) rules: Vec<RuleRow>,
    pub(super) members: Vec<MemberRow>,
    /// Address group and range.
    pub(super) group_addresses: Vec<(String, String)>,
    pub(super) qos: Vec<QosRow>,
}

/// Rows by what they are looked up by.
pub(super) struct Index<'a> {
    pub(super) networks: BTreeMap<&'a str, &'a NetworkRow>,
    pub(super) routers: BTreeMap<&'a str, &'a RouterRow>,
    /// Addresses of hosts on the overlay.
    pub(super) tunnels: HashMap<&'a str, IpAddr>,
    pub(super) subnets: HashMap<&'a str, Vec<&'a SubnetRow>>,
    pub(super) subnet: HashMap<&'a str, &'a SubnetRow>,
    pub(super) ports_of_network: HashMap<&'a str, Vec<&'a PortRow>>,
    pub(super) ports_of_host: HashMap<&'a str, Vec<&'a PortRow>>,
    pub(super) ports_of_router: HashMap<&'a str, Vec<&'a PortRow>>,
    /// Routers with an interface in a network.
    pub(super) routers_of_network: HashMap<&'a str, BTreeSet<&'a str>>,
    pub(super) gateways: HashMap<&'a str, Vec<&'a GatewayRow>>,
    pub(super) gateway_ports: HashMap<&'a str, &'a PortRow>,
    pub(super) floating_ips: HashMap<&'a str, Vec<&'a FloatingIpRow>>,
    pub(super) forwardings: HashMap<&'a str, Vec<&'a ForwardingRow>>,
    pub(super) groups: HashMap<&'a str, bool>,
    pub(super) rules: HashMap<&'a str, Vec<&'a RuleRow>>,
    pub(super) members: HashMap<&'a str, Vec<&'a MemberRow>>,
    pub(super) group_addresses: HashMap<&'a str, Vec<&'a str>>,
    pub(super) qos: HashMap<&'a str, Vec<&'a QosRow>>,
}

fn by<'a, T>(rows: &'a [T], key: impl Fn(&'a T) -> Option<&'a str>) -> HashMap<&'a str, Vec<&'a T>> {
    let mut map: HashMap<&str, Vec<&T>> = HashMap::new();
    for row in rows {
        if let Some(key) = key(row) {
            map.entry(key).or_default().push(row);
        }
    }
    map
}

/// The ports of gateways by their ids.
fn gateway_ports(rows: &Rows) -> HashMap<&str, &PortRow> {
    let gateways = rows.ports.iter().filter(|port| port.is_gateway());
    gateways.map(|port| (port.id.as_str(), port)).collect()
}

impl<'a> Index<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self, ApiError> {
        let mut routers_of_network: HashMap<&str, BTreeSet<&str>> = HashMap::new();
        for port in rows.ports.iter().filter(|port| port.is_interface()) {
            let routers = routers_of_network.entry(&port.network_id).or_default();
            routers.extend(port.router_id.as_deref());
        }
        let mut group_addresses: HashMap<&str, Vec<&str>> = HashMap::new();
        for (group, address) in &rows.group_addresses {
            group_addresses.entry(group).or_default().push(address);
        }
        let mut tunnels = HashMap::new();
        for host in &rows.hosts {
            if let Some(ip) = &host.tunnel_ip {
                tunnels.insert(host.id.as_str(), ip.parse().map_err(ApiError::internal)?);
            }
        }
        Ok(Self {
            networks: rows.networks.iter().map(|row| (row.id.as_str(), row)).collect(),
            routers: rows.routers.iter().map(|row| (row.id.as_str(), row)).collect(),
            tunnels,
            subnets: by(&rows.subnets, |row| Some(&row.network_id)),
            subnet: rows.subnets.iter().map(|row| (row.id.as_str(), row)).collect(),
            ports_of_network: by(&rows.ports, |row| Some(&row.network_id)),
            ports_of_host: by(&rows.ports, |row| row.host_id.as_deref()),
            ports_of_router: by(&rows.ports, |row| row.router_id.as_deref()),
            routers_of_network,
            gateways: by(&rows.gateways, |row| Some(&row.router_id)),
            gateway_ports: gateway_ports(rows),
            floating_ips: by(&rows.floating_ips, |row| row.router_id.as_deref()),
            forwardings: by(&rows.forwardings, |row| Some(&row.floatingip_id)),
            groups: rows.groups.iter().map(|(id, stateful)| (id.as_str(), *stateful)).collect(),
            rules: by(&rows.rules, |row| Some(&row.security_group_id)),
            members: by(&rows.members, |row| Some(&row.security_group_id)),
            group_addresses,
            qos: by(&rows.qos, |row| Some(&row.policy_id)),
        })
    }
}

impl PortRow {
    /// Whether it is a router's interface.
    pub(super) fn is_interface(&self) -> bool {
        self.device_owner == super::super::ports::INTERFACE_OWNER
    }

    /// Whether it is a router's gateway.
    pub(super) fn is_gateway(&self) -> bool {
        self.device_owner == super::super::ports::GATEWAY_OWNER
    }
}
