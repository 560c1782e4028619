//! What the metadata service tells one guest: pure data, ready to be served.

use std::net::Ipv4Addr;

use base64::{Engine, engine::general_purpose::STANDARD};
use mote_host_api::{InstanceMetadata, PortSpec};
use serde_json::{Value, json};

use crate::{
    names::tap_name,
    services::directory::{Plugged, subnet},
};

/// A guest, as seen from one of its ports.
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
    /// `port` is the one that it asks from, `links` are all of its ports.
    pub(crate) fn new(metadata: &InstanceMetadata, port: &PortSpec, links: &[Plugged<'_>]) -> Self {
        // The controller has verified it; what is no base64 is not there.
        let user_data = metadata.user_data.as_ref().and_then(|text| STANDARD.decode(text.trim_ascii()).ok());
        Self {
            metadata: metadata.clone(),
            user_data,
            local_ipv4: port.fixed_ips.first().map(|fixed| fixed.ip_address),
            network_data: network_data(links),
        }
    }
}

/// Nova's `network_data.json`: links, one network per link (its first address), DNS servers.
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
        let first = port.fixed_ips.first();
        let Some((fixed, subnet)) = first.and_then(|fixed| Some((fixed, subnet(network, fixed)?))) else {
            continue;
        };
        let dns: Vec<Value> =
            subnet.dns_nameservers.iter().map(|ip| json!({"type": "dns", "address": ip})).collect();
        let mut entry = json!({
            "id": format!("network{}", networks.len()),
            "type": if subnet.enable_dhcp { "ipv4_dhcp" } else { "ipv4" },
            "link": link,
            "network_id": network.id,
        });
        if !subnet.enable_dhcp {
            let default = subnet.gateway_ip.map(|gateway| (ipnet::Ipv4Net::default(), gateway));
            let others = subnet.host_routes.iter().map(|route| (route.destination.trunc(), route.nexthop));
            let routes = default.into_iter().chain(others).map(|(destination, gateway)| {
                json!({"network": destination.addr(), "netmask": destination.netmask(), "gateway": gateway})
            });
            entry["ip_address"] = json!(fixed.ip_address);
            entry["netmask"] = json!(subnet.cidr.netmask());
            entry["routes"] = routes.collect();
            entry["services"] = json!(dns);
        }
        networks.push(entry);
        for server in dns {
            if !services.contains(&server) {
                services.push(server);
            }
        }
    }
    json!({"links": links, "networks": networks, "services": services})
}
