//! The names of one network's own servers: pure data, and who may ask for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use mote_host_api::{NetworkSpec, SegmentSpec};

use crate::spec;

/// The domain of networks that have none of their own (Neutron's default).
pub const DEFAULT_DOMAIN: &str = "openstacklocal";
/// Longest name, in bytes of its text (RFC 1035 §2.3.4).
const NAME_MAX: usize = 253;
/// Longest label, in bytes.
const LABEL_MAX: usize = 63;
/// Addresses of one name: ports can have the same one.
const ADDRESSES_MAX: usize = 64;

/// What the resolver of one network knows. All names are in lower case.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Zone {
    domain: String,
    names: BTreeMap<String, BTreeSet<IpAddr>>,
    reverse: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Nobody else knows who has an address in these.
    subnets: Vec<IpNet>,
}

/// What there is to say of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Addresses of a server.
    Addresses(Vec<IpAddr>),
    /// Whole names of who has an address.
    Pointers(Vec<String>),
    /// The name exists and has nothing of what can be asked for here.
    Nothing,
    /// There is no such name.
    NoName,
    /// It is none of this network's.
    Foreign,
}

impl Zone {
    /// Of a network.
    pub fn new(network: &NetworkSpec) -> Self {
        let v4 = network.subnets.iter().map(|subnet| IpNet::V4(subnet.cidr));
        let v6 = network.subnets_v6.iter().map(|subnet| IpNet::V6(subnet.cidr));
        let mut zone = Self { domain: domain(network), subnets: v4.chain(v6).collect(), ..Self::default() };
        for name in &network.dns_names {
            let label = name.name.to_ascii_lowercase();
            // One label only: in a network that is shared, nobody shall be able to take names like www.example.com.
            if !is_label(&label) || label == "localhost" {
                continue;
            }
            let full = zone.full(&label);
            for address in &name.addresses {
                let known = zone.names.entry(label.clone()).or_default();
                if known.len() < ADDRESSES_MAX {
                    known.insert(*address);
                    zone.reverse.entry(*address).or_default().insert(full.clone());
                }
            }
        }
        zone
    }

    /// The domain that guests search, without the closing dot.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    fn full(&self, label: &str) -> String {
        format!("{label}.{}", self.domain)
    }

    /// Looks up a name in lower case without the closing dot.
    pub fn find(&self, name: &str) -> Found {
        let inside = name.strip_suffix(&self.domain).and_then(|rest| match rest {
            "" => Some(""),
            rest => rest.strip_suffix('.'),
        });
        match inside {
            Some("") => return Found::Nothing,
            Some(label) => return self.addresses(label).unwrap_or(Found::NoName),
            None => {}
        }
        if let Some(address) = reversed(name) {
            let local = || self.subnets.iter().any(|subnet| subnet.contains(&address));
            return match self.reverse.get(&address) {
                Some(names) => Found::Pointers(names.iter().cloned().collect()),
                None if local() => Found::NoName,
                None => Found::Foreign,
            };
        }
        self.addresses(name).unwrap_or(Found::Foreign)
    }

    fn addresses(&self, label: &str) -> Option<Found> {
        Some(Found::Addresses(self.names.get(label)?.iter().copied().collect()))
    }
}

fn domain(network: &NetworkSpec) -> String {
    let domain = network.dns_domain.as_deref().unwrap_or_default();
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    // A label and a dot come before it.
    let usable = domain.len() + LABEL_MAX < NAME_MAX && domain.split('.').all(is_label);
    if usable { domain } else { DEFAULT_DOMAIN.to_owned() }
}

/// Letters, digits and hyphens (RFC 1123 §2.1).
fn is_label(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    (1..=LABEL_MAX).contains(&text.len()) && text.bytes().all(legal) && !text.starts_with('-')
}

/// The address that a name in in-addr.arpa (RFC 1035 §3.5) or ip6.arpa (RFC 3596 §2.5) stands for.
fn reversed(name: &str) -> Option<IpAddr> {
    if let Some(octets) = name.strip_suffix(".in-addr.arpa") {
        let parts: Option<Vec<u8>> = octets.split('.').rev().map(|part| part.parse().ok()).collect();
        let octets: [u8; 4] = parts?.try_into().ok()?;
        return Some(IpAddr::V4(Ipv4Addr::from(octets)));
    }
    let digits: Vec<&str> = name.strip_suffix(".ip6.arpa")?.split('.').collect();
    if digits.len() != 32 || digits.iter().any(|digit| digit.len() != 1) {
        return None;
    }
    let text: String = digits.into_iter().rev().collect();
    u128::from_str_radix(&text, 16).ok().map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits)))
}

/// Who may ask.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Clients {
    /// None: whoever is on the network, since nobody but its ports is.
    known: Option<(BTreeSet<IpAddr>, Vec<IpNet>)>,
}

impl Clients {
    /// Of a network. On a physical network there are others, for whom this host resolves nothing.
    pub fn new(network: &NetworkSpec) -> Self {
        if !matches!(network.segment, Some(SegmentSpec::Flat { .. } | SegmentSpec::Vlan { .. })) {
            return Self::default();
        }
        let (mut addresses, mut ranges) = (BTreeSet::new(), Vec::new());
        for port in &network.ports {
            addresses.extend(port.fixed_ips.iter().map(|fixed| IpAddr::V4(fixed.ip_address)));
            addresses.extend(port.fixed_ips_v6.iter().map(|fixed| IpAddr::V6(fixed.ip_address)));
            addresses.extend(spec::station_mac(port).map(|mac| IpAddr::V6(mac.link_local())));
            ranges.extend(port.allowed_address_pairs.iter().map(|pair| pair.ip_address));
        }
        Self { known: Some((addresses, ranges)) }
    }

    /// Whether an address is one of them.
    pub fn allows(&self, address: &IpAddr) -> bool {
        self.known.as_ref().is_none_or(|(addresses, ranges)| {
            addresses.contains(address) || ranges.iter().any(|range| range.contains(address))
        })
    }
}

#[cfg(test)]
pub(super) fn example() -> Zone {
    use mote_host_api::{DnsName, SubnetId, SubnetSpec};
    let subnet = SubnetSpec {
        id: SubnetId::new(),
        cidr: "10.0.0.0/24".parse().unwrap(),
        gateway_ip: None,
        service_ip: Ipv4Addr::new(10, 0, 0, 2),
        enable_dhcp: true,
        dns_nameservers: Vec::new(),
        host_routes: Vec::new(),
    };
    let name = |name: &str, addresses: &[&str]| DnsName {
        name: name.to_owned(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
    };
    Zone::new(&NetworkSpec {
        subnets: vec![subnet],
        dns_names: vec![
            name("Web", &["10.0.0.10", "fd00::10"]),
            name("www.example.com", &["10.0.0.11"]),
            name("localhost", &["10.0.0.12"]),
        ],
        ..NetworkSpec::default()
    })
}

#[cfg(test)]
mod tests {
    use mote_host_api::PortSpec;

    use super::*;

    #[test]
    fn servers_are_found_by_label_by_whole_name_and_by_address() {
        let zone = example();
        let both = Found::Addresses(vec!["10.0.0.10".parse().unwrap(), "fd00::10".parse().unwrap()]);
        let pointer = Found::Pointers(vec!["web.openstacklocal".into()]);
        let v6 = format!("0.1.{}d.f.ip6.arpa", "0.".repeat(28));
        for (name, found) in [
            ("web", both.clone()),
            ("web.openstacklocal", both),
            ("10.0.0.10.in-addr.arpa", pointer.clone()),
            (&v6, pointer),
            ("11.0.0.10.in-addr.arpa", Found::NoName),
            ("openstacklocal", Found::Nothing),
            ("nobody.openstacklocal", Found::NoName),
            ("a.web.openstacklocal", Found::NoName),
        ] {
            assert_eq!(zone.find(name), found, "{name}");
        }
    }

    #[test]
    fn what_is_none_of_the_networks_is_foreign_also_if_a_server_would_like_to_be_it() {
        let zone = example();
        for name in [
            "www.example.com",
            "localhost",
            "xopenstacklocal",
            "10.0.0.192.in-addr.arpa",
            "0.0.10.in-addr.arpa",
            "",
            "256.0.0.10.in-addr.arpa",
        ] {
            assert_eq!(zone.find(name), Found::Foreign, "{name}");
        }
    }

    #[test]
    fn a_networks_own_domain_is_taken_and_one_that_is_none_is_not() {
        let network =
            |domain: &str| NetworkSpec { dns_domain: Some(domain.into()), ..NetworkSpec::default() };
        assert_eq!(Zone::new(&network("Lab.Example.")).domain(), "lab.example");
        for wrong in ["", ".", "a..b", "-a", "ä", &"a.".repeat(120)] {
            assert_eq!(Zone::new(&network(wrong)).domain(), DEFAULT_DOMAIN, "{wrong}");
        }
    }

    #[test]
    fn on_a_physical_network_only_the_hosts_own_ports_may_ask() {
        let mac = "fa:16:3e:00:00:01".to_owned();
        let port = PortSpec { mac_address: mac, ..PortSpec::default() };
        let mut network = NetworkSpec { ports: vec![port], ..NetworkSpec::default() };
        let stranger: IpAddr = "203.0.113.9".parse().unwrap();
        assert!(Clients::new(&network).allows(&stranger));
        network.segment = Some(SegmentSpec::Flat { physical_network: "public".into() });
        let clients = Clients::new(&network);
        assert!(!clients.allows(&stranger));
        assert!(clients.allows(&"fe80::f816:3eff:fe00:1".parse().unwrap()));
    }
}
