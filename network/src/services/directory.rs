//! What the services of one network know: pure data, made anew at each update.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ipnet::Ipv4Net;
use mote_host_api::{InstanceMetadata, Ipv6Mode, NetworkSpec, PortSpec, ServerId, SubnetSpec};

use super::{
    dhcp::Lease,
    dhcp6::LeaseV6,
    dns::{Clients, Zone},
    metadata::Guest,
};
use crate::{
    names::{METADATA_IP, METADATA_IP_V6, MacAddress},
    spec,
};

/// Leases and guests of one network.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Directory {
    /// What DHCP offers to whom.
    pub leases: BTreeMap<MacAddress, Lease>,
    /// What DHCPv6 offers to whom, by link-local address.
    pub leases_v6: BTreeMap<Ipv6Addr, LeaseV6>,
    /// Who has which address.
    pub guests: BTreeMap<IpAddr, Arc<Guest>>,
    /// The router advertisement, a whole frame.
    pub advertisement: Option<Vec<u8>>,
    /// Names of the network's servers.
    pub zone: Arc<Zone>,
    /// Who may ask for names.
    pub dns_clients: Clients,
}

/// The port of a server in a network.
pub(super) type Plugged<'a> = (&'a NetworkSpec, &'a PortSpec);

/// All ports by server, in the order of the networks and ports.
pub(super) fn ports_by_server(networks: &[NetworkSpec]) -> HashMap<ServerId, Vec<Plugged<'_>>> {
    let mut ports: HashMap<ServerId, Vec<Plugged<'_>>> = HashMap::new();
    for network in networks {
        for port in &network.ports {
            ports.entry(port.server_id).or_default().push((network, port));
        }
    }
    ports
}

impl Directory {
    /// For one network, given the ports that the servers have in all networks.
    pub(super) fn new(
        network: &NetworkSpec,
        ports: &HashMap<ServerId, Vec<Plugged<'_>>>,
        metadata: &HashMap<ServerId, InstanceMetadata>,
    ) -> Self {
        let mut directory = Self {
            zone: Arc::new(Zone::new(network)),
            dns_clients: Clients::new(network),
            ..Self::default()
        };
        let domain = directory.zone.domain().to_owned();
        for port in &network.ports {
            let metadata = metadata.get(&port.server_id);
            if let (Some(mac), Some(lease)) =
                (spec::station_mac(port), lease(network, port, metadata, &domain))
            {
                directory.leases.insert(mac, lease);
            }
            let own = spec::station_mac(port).map(MacAddress::link_local);
            if let (Some(own), Some(lease)) = (own, lease_v6(network, port, &domain)) {
                directory.leases_v6.insert(own, lease);
            }
            let Some(metadata) = metadata else { continue };
            let links = ports.get(&port.server_id).map(Vec::as_slice).unwrap_or_default();
            let guest = Arc::new(Guest::new(metadata, Some(port), links));
            let v4 = port.fixed_ips.iter().map(|fixed| IpAddr::V4(fixed.ip_address));
            let v6 = port.fixed_ips_v6.iter().map(|fixed| fixed.ip_address).chain(own).map(IpAddr::V6);
            directory.guests.extend(v4.chain(v6).map(|address| (address, guest.clone())));
        }
        directory
    }
}

pub(super) fn subnet<'a>(network: &'a NetworkSpec, fixed: &mote_host_api::FixedIp) -> Option<&'a SubnetSpec> {
    network.subnets.iter().find(|subnet| subnet.id == fixed.subnet_id)
}

/// The port's first address in a subnet with DHCP.
fn lease(
    network: &NetworkSpec,
    port: &PortSpec,
    metadata: Option<&InstanceMetadata>,
    domain: &str,
) -> Option<Lease> {
    let addresses = port.fixed_ips.iter().filter_map(|fixed| Some((fixed, subnet(network, fixed)?)));
    let (fixed, subnet) = addresses.into_iter().find(|(_, subnet)| subnet.enable_dhcp)?;
    // RFC 3442: who takes this option ignores the router option, so that it has to have the default route, too.
    let mut routes = vec![(Ipv4Net::from(METADATA_IP), subnet.service_ip)];
    routes.extend(subnet.host_routes.iter().map(|route| (route.destination.trunc(), route.nexthop)));
    let has_default = routes.iter().any(|(destination, _)| destination.prefix_len() == 0);
    routes.extend(subnet.gateway_ip.filter(|_| !has_default).map(|gateway| (Ipv4Net::default(), gateway)));
    // Who is given no other resolver gets the network's own.
    let own = subnet.dns_nameservers.is_empty().then_some(subnet.service_ip);
    Some(Lease {
        address: fixed.ip_address,
        subnet: subnet.cidr,
        server: subnet.service_ip,
        router: subnet.gateway_ip,
        dns: subnet.dns_nameservers.iter().copied().chain(own).collect(),
        domain: Some(domain.to_owned()),
        routes,
        mtu: network.mtu,
        hostname: metadata.map(|metadata| metadata.hostname.clone()).filter(|name| is_hostname(name)),
    })
}

/// The port's addresses in subnets with stateful DHCPv6, and what else it may ask for; none without DHCPv6.
fn lease_v6(network: &NetworkSpec, port: &PortSpec, domain: &str) -> Option<LeaseV6> {
    let by_dhcp = |mode: Option<Ipv6Mode>| mode.is_some_and(|mode| mode != Ipv6Mode::Slaac);
    let subnet =
        |id| network.subnets_v6.iter().find(|subnet| subnet.id == id && by_dhcp(subnet.address_mode));
    let served: Vec<_> =
        port.fixed_ips_v6.iter().filter_map(|fixed| Some((fixed, subnet(fixed.subnet_id)?))).collect();
    if served.is_empty() {
        return None;
    }
    let stateful = served.iter().filter(|(_, subnet)| subnet.address_mode == Some(Ipv6Mode::Dhcpv6Stateful));
    let addresses = stateful.map(|(fixed, _)| fixed.ip_address).collect();
    let mut dns: Vec<Ipv6Addr> = Vec::new();
    for server in served.iter().flat_map(|(_, subnet)| &subnet.dns_nameservers) {
        if !dns.contains(server) {
            dns.push(*server);
        }
    }
    if dns.is_empty() {
        dns.push(METADATA_IP_V6);
    }
    Some(LeaseV6 { addresses, dns, domain: domain.to_owned() })
}

/// Letters, digits, hyphens and dots (RFC 1123 §2.1), short enough for the option.
fn is_hostname(name: &str) -> bool {
    const HOSTNAME_MAX: usize = 63;
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    (1..=HOSTNAME_MAX).contains(&name.len()) && name.bytes().all(legal) && !name.starts_with(['-', '.'])
}
