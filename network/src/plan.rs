//! What has to be done so that the kernel has what is desired: a pure function.
//!
//! Invariants (property tests below): executing the steps of a plan in order leads from any observed state to the
//! desired one; planning again gives no step; a step can be repeated, and stopping after any step leaves a state from
//! which the next plan goes on. A network whose description is refused is neither made, changed nor deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    Desired,
    filter::{Conntrack, Memory, Ruleset},
    names::{BRIDGE, MacAddress, NetworkKey, UPLINK, VXLAN},
    observed::{LinkKind, NamespaceContent, ObservedLink, ObservedNamespace, ObservedNetwork, PortFlags},
    spec::{self, NetworkConfig, Segment, SpecError},
};

/// Sysctls of a network's namespace (paths below /proc/sys) that exist as soon as the namespace does. What a kernel
/// does not have (IPv6 off, br_netfilter not loaded) is left out. Written in this order.
pub const SYSCTLS: &[(&str, &str)] = &[
    // Nothing is routed between subnets by the host, whatever the root namespace's setting was when this one was made.
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv4/conf/default/forwarding", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    // Sources that are not of this network's subnets are dropped before they reach a socket.
    ("net/ipv4/conf/all/rp_filter", "1"),
    // Removing one address of a subnet keeps the others.
    ("net/ipv4/conf/all/promote_secondaries", "1"),
    // The host speaks IPv6 on br0 only, and believes no router advertisement.
    ("net/ipv6/conf/default/disable_ipv6", "1"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/all/forwarding", "0"),
    ("net/bridge/bridge-nf-call-arptables", "0"),
];

/// Bridged packets pass the inet family's filters.
pub const BRIDGE_NETFILTER_ON: &[(&str, &str)] =
    &[("net/bridge/bridge-nf-call-iptables", "1"), ("net/bridge/bridge-nf-call-ip6tables", "1")];

/// They don't.
pub const BRIDGE_NETFILTER_OFF: &[(&str, &str)] =
    &[("net/bridge/bridge-nf-call-iptables", "0"), ("net/bridge/bridge-nf-call-ip6tables", "0")];

/// Sysctls that exist as soon as the bridge does.
pub const BRIDGE_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/br0/forwarding", "0"),
    ("net/ipv4/conf/br0/accept_redirects", "0"),
    ("net/ipv4/conf/br0/rp_filter", "1"),
    ("net/ipv6/conf/br0/accept_ra", "0"),
    ("net/ipv6/conf/br0/accept_dad", "0"),
    // No address by itself: only those that are planned.
    ("net/ipv6/conf/br0/addr_gen_mode", "1"),
    ("net/ipv6/conf/br0/disable_ipv6", "0"),
];

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order. When a step fails, the later ones of the same network must be left out; others can go on.
    pub steps: Vec<Step>,
    /// Networks that can't be made as described.
    pub refused: Vec<SpecError>,
}

/// One step. Every step can be repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The network.
    pub network: NetworkKey,
    /// What to do.
    pub action: Action,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network {}: {}", self.network, self.action)
    }
}

/// What to do to a network's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Remove it with everything in it.
    DeleteNamespace,
    /// Make it, or put one in place of a file that is none.
    CreateNamespace,
    /// Remove a link.
    DeleteLink {
        /// Its name.
        link: String,
    },
    /// Write sysctls.
    SetSysctls {
        /// Path below /proc/sys, value.
        settings: Vec<(&'static str, &'static str)>,
    },
    /// Load the packet filter in place of any other.
    SetFilter {
        /// It.
        filter: Arc<Ruleset>,
    },
    /// Make `br0` (down).
    CreateBridge {
        /// Its Ethernet address.
        mac: MacAddress,
        /// Its MTU.
        mtu: u16,
    },
    /// Set an Ethernet address.
    SetMac {
        /// Link.
        link: String,
        /// Address.
        mac: MacAddress,
    },
    /// Set an MTU.
    SetMtu {
        /// Link.
        link: String,
        /// MTU in bytes.
        mtu: u16,
    },
    /// Set a link up.
    SetUp {
        /// Link.
        link: String,
    },
    /// Remove an address of `br0`.
    DeleteAddress {
        /// Address and prefix length.
        address: IpNet,
    },
    /// Add an address to `br0`.
    AddAddress {
        /// Address and prefix length.
        address: IpNet,
    },
    /// Remove a permanent neighbour of `br0`.
    DeleteNeighbour {
        /// Its address.
        ip: IpAddr,
    },
    /// Add or change a permanent neighbour of `br0`.
    SetNeighbour {
        /// Its address.
        ip: IpAddr,
        /// Its Ethernet address.
        mac: MacAddress,
    },
    /// Make a link a port of `br0`.
    AttachPort {
        /// Link.
        link: String,
    },
    /// Set how a port of `br0` forwards.
    SetPortFlags {
        /// Link.
        link: String,
        /// Flags.
        flags: PortFlags,
    },
    /// Make the link to other hosts or to a physical network.
    CreateSegment {
        /// Which.
        segment: Segment,
        /// MTU in bytes.
        mtu: u16,
    },
    /// Remove a forwarding entry of the VXLAN link.
    DeleteTunnel {
        /// Ethernet address.
        mac: MacAddress,
    },
    /// Add or change a forwarding entry of the VXLAN link.
    SetTunnel {
        /// Ethernet address.
        mac: MacAddress,
        /// The host behind which it is.
        host: IpAddr,
    },
    /// Remove a static forwarding entry.
    DeleteStation {
        /// Link.
        link: String,
        /// Ethernet address behind it.
        mac: MacAddress,
    },
    /// Add a static forwarding entry.
    AddStation {
        /// Link.
        link: String,
        /// Ethernet address behind it.
        mac: MacAddress,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeleteNamespace => write!(f, "delete namespace"),
            Self::CreateNamespace => write!(f, "create namespace"),
            Self::DeleteLink { link } => write!(f, "delete link {link}"),
            Self::SetSysctls { settings } => write!(f, "set {} sysctls", settings.len()),
            Self::SetFilter { filter } => write!(f, "load filter {}", filter.digest().marker()),
            Self::CreateBridge { mac, mtu } => write!(f, "create bridge {mac} MTU {mtu}"),
            Self::SetMac { link, mac } => write!(f, "set address of {link} to {mac}"),
            Self::SetMtu { link, mtu } => write!(f, "set MTU of {link} to {mtu}"),
            Self::SetUp { link } => write!(f, "set {link} up"),
            Self::DeleteAddress { address } => write!(f, "delete address {address}"),
            Self::AddAddress { address } => write!(f, "add address {address}"),
            Self::DeleteNeighbour { ip } => write!(f, "delete neighbour {ip}"),
            Self::SetNeighbour { ip, mac } => write!(f, "set neighbour {ip} to {mac}"),
            Self::AttachPort { link } => write!(f, "attach {link} to the bridge"),
            Self::SetPortFlags { link, .. } => write!(f, "set port flags of {link}"),
            Self::CreateSegment { segment, .. } => write!(f, "create {}", segment.link_name()),
            Self::DeleteTunnel { mac } => write!(f, "delete tunnel for {mac}"),
            Self::SetTunnel { mac, host } => write!(f, "set tunnel for {mac} to {host}"),
            Self::DeleteStation { link, mac } => write!(f, "delete station {mac} behind {link}"),
            Self::AddStation { link, mac } => write!(f, "add station {mac} behind {link}"),
        }
    }
}

/// Compares what is desired with what exists.
pub fn plan(desired: &Desired, conntrack: Conntrack, observed: &[ObservedNetwork]) -> Plan {
    plan_with(&mut Memory::default(), desired, conntrack, observed)
}

/// As [`plan`], without making anew what the last pass with this memory has made and is still the same.
pub fn plan_with(
    memory: &mut Memory,
    desired: &Desired,
    conntrack: Conntrack,
    observed: &[ObservedNetwork],
) -> Plan {
    memory.begin_pass();
    let (configs, refused) = spec::configure(desired, conntrack, memory);
    let known: BTreeSet<NetworkKey> = desired.networks.iter().map(|spec| spec.id.into()).collect();
    let observed: BTreeMap<NetworkKey, &ObservedNamespace> =
        observed.iter().map(|network| (network.key, &network.namespace)).collect();

    let unwanted = observed.keys().filter(|key| !known.contains(key));
    let mut steps: Vec<Step> =
        unwanted.map(|key| Step { network: *key, action: Action::DeleteNamespace }).collect();
    for config in &configs {
        let actions = plan_network(config, observed.get(&config.key).copied());
        steps.extend(actions.into_iter().map(|action| Step { network: config.key, action }));
    }
    Plan { steps, refused }
}

/// State as it will be when the actions so far are done, and the actions.
struct Planner<'a> {
    config: &'a NetworkConfig,
    content: NamespaceContent,
    actions: Vec<Action>,
}

fn plan_network(config: &NetworkConfig, observed: Option<&ObservedNamespace>) -> Vec<Action> {
    let mut planner = match observed {
        Some(ObservedNamespace::Live(content)) => {
            Planner { config, content: content.clone(), actions: Vec::new() }
        }
        Some(ObservedNamespace::Broken) | None => {
            Planner { config, content: new_namespace(), actions: vec![Action::CreateNamespace] }
        }
    };
    planner.plan_links();
    planner.plan_filter();
    planner.plan_sysctls(SYSCTLS);
    planner.plan_sysctls(if config.bridge_netfilter { BRIDGE_NETFILTER_ON } else { BRIDGE_NETFILTER_OFF });
    planner.plan_bridge();
    planner.plan_sysctls(BRIDGE_SYSCTLS);
    planner.plan_addresses();
    planner.plan_neighbours();
    planner.plan_segment();
    for (name, port) in &config.ports {
        planner.plan_port(name, PortFlags::GUEST, &BTreeSet::from([port.mac]));
    }
    for (name, mac) in &config.router_ports {
        planner.plan_port(name, PortFlags::GUEST, &BTreeSet::from([*mac]));
    }
    planner.actions
}

/// A namespace that was just made; sysctls have unknown values.
fn new_namespace() -> NamespaceContent {
    let lo = ObservedLink {
        name: "lo".to_owned(),
        kind: LinkKind::Loopback,
        alias: None,
        up: false,
        mtu: 65536,
        mac: None,
        bridge_port: None,
    };
    let mut sysctls = unknown(SYSCTLS);
    sysctls.extend(unknown(BRIDGE_NETFILTER_OFF));
    NamespaceContent { sysctls, links: vec![lo], ..NamespaceContent::default() }
}

fn unknown(sysctls: &[(&'static str, &'static str)]) -> BTreeMap<&'static str, String> {
    sysctls.iter().map(|(path, _)| (*path, String::new())).collect()
}

impl Planner<'_> {
    /// Removes what must not be there, and sets `lo` up.
    fn plan_links(&mut self) {
        for link in std::mem::take(&mut self.content.links) {
            if self.is_foreign(&link) {
                if link.name == BRIDGE {
                    self.content.addresses.clear();
                    self.content.neighbours.clear();
                }
                if link.name == VXLAN {
                    self.content.tunnels.clear();
                }
                self.actions.push(Action::DeleteLink { link: link.name });
            } else {
                self.content.links.push(link);
            }
        }
        if self.content.links.iter().any(|link| link.kind == LinkKind::Loopback && !link.up) {
            self.actions.push(Action::SetUp { link: "lo".to_owned() });
        }
    }

    /// Before anything is plugged in: its rules go by the names that links will have.
    fn plan_filter(&mut self) {
        if self.content.filter != Some(self.config.filter.digest()) {
            self.actions.push(Action::SetFilter { filter: self.config.filter.clone() });
        }
    }

    /// Taps of unknown ports, other ports of the bridge, other bridges, and what took the bridge's name. Devices that a
    /// kernel puts into every namespace by itself (sit0, …) stay.
    fn is_foreign(&self, link: &ObservedLink) -> bool {
        if link.name == BRIDGE {
            return link.kind != LinkKind::Bridge;
        }
        if link.name == VXLAN || link.name == UPLINK {
            let segment = self.config.segment.as_ref().filter(|segment| segment.link_name() == link.name);
            return segment.is_none_or(|segment| !segment.is(link));
        }
        let pluggable = matches!(link.kind, LinkKind::Tun | LinkKind::Bridge | LinkKind::Vxlan(_))
            || link.bridge_port.is_some();
        pluggable
            && !self.config.ports.contains_key(&link.name)
            && !self.config.router_ports.contains_key(&link.name)
    }

    /// All of them when one is wrong: some change others (ip_forward resets accept_redirects), so their order counts.
    fn plan_sysctls(&mut self, wanted: &[(&'static str, &'static str)]) {
        let current = &self.content.sysctls;
        let existing = || wanted.iter().filter(|(path, _)| current.contains_key(path));
        if existing().any(|(path, value)| current[path] != *value) {
            self.actions.push(Action::SetSysctls { settings: existing().copied().collect() });
        }
    }

    fn plan_bridge(&mut self) {
        let (mac, mtu) = (self.config.bridge_mac, self.config.mtu);
        let link = || BRIDGE.to_owned();
        let Some(bridge) = self.content.link(BRIDGE) else {
            self.actions.push(Action::CreateBridge { mac, mtu });
            self.actions.push(Action::SetUp { link: link() });
            self.content.sysctls.extend(unknown(BRIDGE_SYSCTLS));
            self.content.addresses.clear();
            self.content.neighbours.clear();
            self.content.links.iter_mut().for_each(|link| link.bridge_port = None);
            return;
        };
        let (new_mac, new_mtu, set_up) = (bridge.mac != Some(mac), bridge.mtu != u32::from(mtu), !bridge.up);
        if new_mac {
            self.actions.push(Action::SetMac { link: link(), mac });
        }
        if new_mtu {
            // Below IPv6's smallest MTU a link has no IPv6, and forgets its settings.
            if bridge.mtu < u32::from(spec::MTU_MIN_V6) {
                self.content.sysctls.extend(unknown(BRIDGE_SYSCTLS));
                self.content.addresses.retain(|address| address.addr().is_ipv4());
            }
            self.actions.push(Action::SetMtu { link: link(), mtu });
        }
        if set_up {
            self.actions.push(Action::SetUp { link: link() });
        }
        if new_mac || set_up {
            // The kernel forgets a link's neighbours, permanent ones too, when its address changes and when it is down.
            self.content.neighbours.clear();
        }
    }

    fn plan_addresses(&mut self) {
        let (wanted, current) = (&self.config.addresses, &self.content.addresses);
        self.actions.extend(current.difference(wanted).map(|a| Action::DeleteAddress { address: *a }));
        self.actions.extend(wanted.difference(current).map(|a| Action::AddAddress { address: *a }));
    }

    /// The services' answers go to the port that has the address, whoever claims to have it.
    fn plan_neighbours(&mut self) {
        let (wanted, current) = (self.config.neighbours(), &self.content.neighbours);
        let gone = current.keys().filter(|ip| !wanted.contains_key(ip));
        self.actions.extend(gone.map(|ip| Action::DeleteNeighbour { ip: *ip }));
        let missing = wanted.iter().filter(|(ip, mac)| current.get(ip) != Some(mac));
        self.actions.extend(missing.map(|(ip, mac)| Action::SetNeighbour { ip: *ip, mac: *mac }));
    }

    fn plan_segment(&mut self) {
        let Some(segment) = &self.config.segment else { return };
        let (name, mtu) = (segment.link_name(), self.config.mtu);
        if self.content.link(name).is_none() {
            self.actions.push(Action::CreateSegment { segment: segment.clone(), mtu });
            self.content.tunnels.clear();
            self.content.links.push(ObservedLink {
                name: name.to_owned(),
                kind: LinkKind::Other,
                alias: None,
                up: false,
                mtu: mtu.into(),
                mac: None,
                bridge_port: None,
            });
        }
        let stations = self.config.tunnels.keys().copied().collect();
        self.plan_port(name, segment.flags(), &stations);
        if matches!(segment, Segment::Uplink { .. }) {
            return;
        }
        let (wanted, current) = (&self.config.tunnels, &self.content.tunnels);
        let gone = current.keys().filter(|mac| !wanted.contains_key(mac));
        self.actions.extend(gone.map(|mac| Action::DeleteTunnel { mac: *mac }));
        let missing = wanted.iter().filter(|(mac, host)| current.get(mac) != Some(host));
        self.actions.extend(missing.map(|(mac, host)| Action::SetTunnel { mac: *mac, host: *host }));
    }

    /// Corrects a port's link, if there is one: it is made when its server starts.
    fn plan_port(&mut self, name: &str, flags: PortFlags, stations: &BTreeSet<MacAddress>) {
        let Some(link) = self.content.link(name) else { return };
        let name = || name.to_owned();
        if link.mtu != u32::from(self.config.mtu) {
            self.actions.push(Action::SetMtu { link: name(), mtu: self.config.mtu });
        }
        if link.bridge_port.is_none() {
            self.actions.push(Action::AttachPort { link: name() });
        }
        let state = link.bridge_port.clone().unwrap_or_default();
        if state.flags != flags {
            self.actions.push(Action::SetPortFlags { link: name(), flags });
        }
        let others = state.stations.difference(stations);
        self.actions.extend(others.map(|mac| Action::DeleteStation { link: name(), mac: *mac }));
        let missing = stations.difference(&state.stations);
        self.actions.extend(missing.map(|mac| Action::AddStation { link: name(), mac: *mac }));
        if !link.up {
            self.actions.push(Action::SetUp { link: name() });
        }
    }
}

#[cfg(test)]
mod tests;
