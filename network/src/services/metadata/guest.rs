//! What the metadata service tells one guest: pure data, ready to be served.

use std::net::{IpAddr, Ipv4Addr};

use base64::{Engine, engine::general_purpose::STANDARD};
use mote_host_api::{InstanceMetadata, Ipv6Mode, NetworkSpec, PortId, PortSpec};
use serde_json::{Value, json};

use crate::{
    names::tap_name,
    services::directory::{Plugged, ports_by_server, subnet},
};

/// A guest, as seen from one of its ports (from none where it asks by its config drive and has no port).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// What the controller says of it.
    pub metadata: InstanceMetadata,
    /// User data, decoded.
    pub user_data: Option<Vec<u8>>,
    /// First address of the port that it asks from.
    pub local_ipv4: Option<Ipv4Addr>,
    /// `network_data.json`.
    pub network_data: Value,
}

impl Guest {
    /// As seen from its first NIC, which need not be there: what its config drive tells.
    pub fn of_server(metadata: &InstanceMetadata, nics: &[PortId], networks: &[NetworkSpec]) -> Self {
        let links = ports_by_server(networks).remove(&metadata.uuid).unwrap_or_default();
        let first = links.iter().find(|(_, port)| Some(&port.id) == nics.first());
        Self::new(metadata, first.map(|(_, port)| *port), &links)
    }

    /// `port` is the one that it asks from, `links` are all of its ports.
    pub(crate) fn new(metadata: &InstanceMetadata, port: Option<&PortSpec>, links: &[Plugged<'_>]) -> Self {
        // The controller has verified it; what is no base64 is not there.
        let user_data = metadata.user_data.as_ref().and_then(|text| STANDARD.decode(text.trim_ascii()).ok());
        Self {
            metadata: metadata.clone(),
            user_data,
            local_ipv4: port.and_then(|port| port.fixed_ips.first()).map(|fixed| fixed.ip_address),
            network_data: network_data(links),
        }
    }
}

/// Nova's `network_data.json`: links, for each link a network for its first IPv4 address and one for each IPv6 subnet, DNS
/// servers.
fn network_data(plugged: &[Plugged<'_>]) -> Value {
    let (mut links, mut networks, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for (network, port) in plugged {
        let link = tap_name(port.id);
        links.push(json!({
            "id": link,
            "vif_id": port.id,
            "type": "bridge",
            "mtu": network.mtu,
            "ethernet_mac_address": port.mac_address,
        }));
        for (mut entry, dns) in v4(network, port).into_iter().chain(v6(network, port)) {
            entry["id"] = json!(format!("network{}", networks.len()));
            entry["link"] = json!(link);
            entry["network_id"] = json!(network.id);
            networks.push(entry);
            for server in dns {
                if !services.contains(&server) {
                    services.push(server);
                }
            }
        }
    }
    json!({"links": links, "networks": networks, "services": services})
}

/// An entry of `networks`, and its DNS servers.
type Described = (Value, Vec<Value>);

fn dns(servers: impl Iterator<Item = IpAddr>) -> Vec<Value> {
    servers.map(|ip| json!({"type": "dns", "address": ip})).collect()
}

/// Of the port's first IPv4 address.
fn v4(network: &NetworkSpec, port: &PortSpec) -> Option<Described> {
    let fixed = port.fixed_ips.first()?;
    let subnet = subnet(network, fixed)?;
    let dns = dns(subnet.dns_nameservers.iter().copied().map(IpAddr::V4));
    if subnet.enable_dhcp {
        return Some((json!({"type": "ipv4_dhcp"}), dns));
    }
    let default = subnet.gateway_ip.map(|gateway| (ipnet::Ipv4Net::default(), gateway));
    let others = subnet.host_routes.iter().map(|route| (route.destination.trunc(), route.nexthop));
    let routes = default.into_iter().chain(others).map(|(destination, gateway)| {
        json!({"network": destination.addr(), "netmask": destination.netmask(), "gateway": gateway})
    });
    let entry = json!({
        "type": "ipv4",
        "ip_address": fixed.ip_address,
        "netmask": subnet.cidr.netmask(),
        "routes": routes.collect::<Vec<_>>(),
        "services": dns,
    });
    Some((entry, dns))
}

/// Of the port's first address in each IPv6 subnet; how the guest gets it is in the type.
fn v6(network: &NetworkSpec, port: &PortSpec) -> Vec<Described> {
    let mut described = Vec::new();
    for subnet in &network.subnets_v6 {
        let fixed = port.fixed_ips_v6.iter().find(|fixed| fixed.subnet_id == subnet.id);
        let Some(fixed) = fixed else { continue };
        let kind = match subnet.address_mode {
            None => "ipv6",
            Some(Ipv6Mode::Slaac) => "ipv6_slaac",
            Some(Ipv6Mode::Dhcpv6Stateful) => "ipv6_dhcpv6-stateful",
            Some(Ipv6Mode::Dhcpv6Stateless) => "ipv6_dhcpv6-stateless",
        };
        let dns = dns(subnet.dns_nameservers.iter().copied().map(IpAddr::V6));
        let default = |gateway| json!({"network": "::", "netmask": "::", "gateway": gateway});
        let entry = json!({
            "type": kind,
            "ip_address": fixed.ip_address,
            "netmask": subnet.cidr.netmask(),
            "routes": subnet.gateway_ip.into_iter().map(default).collect::<Vec<_>>(),
            "services": dns,
        });
        described.push((entry, dns));
    }
    described
}
