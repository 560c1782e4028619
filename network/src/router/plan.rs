//! What has to be done so that routers are as desired: a pure function, with the same properties as [`crate::plan`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{NextHop, RouteKey, RouterConfig, RouterError, RouterKey, RouterLink, Routes, configure};
use crate::{
    Desired,
    filter::{Digest, Ruleset},
    names::MacAddress,
};

/// Sysctls of a router's namespace that don't depend on it. Forwarding is first: it changes others.
pub const ROUTER_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    // A packet and its answer may take different hosts.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    // Each address is answered for on its own link only.
    ("net/ipv4/conf/all/arp_ignore", "1"),
    ("net/ipv4/conf/all/arp_announce", "2"),
    ("net/ipv4/conf/default/arp_notify", "1"),
    ("net/ipv4/conf/all/promote_secondaries", "1"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    // Connections, not pairs of hosts, are shared out among several next hops.
    ("net/ipv4/fib_multipath_hash_policy", "1"),
    ("net/ipv6/fib_multipath_hash_policy", "1"),
];
const FORWARDING_ON: &[(&str, &str)] = &[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")];
const FORWARDING_OFF: &[(&str, &str)] =
    &[("net/ipv4/ip_forward", "0"), ("net/ipv6/conf/all/forwarding", "0")];

/// Paths of all sysctls of a router's namespace.
pub(crate) fn sysctl_paths() -> impl Iterator<Item = &'static str> {
    FORWARDING_ON.iter().chain(ROUTER_SYSCTLS).map(|(path, _)| *path)
}

/// A router's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedRouter {
    /// From its name.
    pub key: RouterKey,
    /// What is in it; none: the name leads to no namespace of its own.
    pub content: Option<RouterContent>,
}

/// State of a router's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouterContent {
    /// Those that exist in this kernel: path below /proc/sys → value.
    pub sysctls: BTreeMap<&'static str, String>,
    /// The address translation that is loaded.
    pub filter: Option<Digest>,
    /// Whether `lo` is up.
    pub loopback_up: bool,
    /// Links other than `lo`.
    pub links: BTreeMap<String, RouterLinkState>,
    /// Routes that were set, not those that follow from addresses.
    pub routes: Routes,
    /// Which marks lead to which routing table.
    pub rules: BTreeSet<PolicyRule>,
    /// Permanent neighbours.
    pub neighbours: BTreeMap<(String, IpAddr), MacAddress>,
}

/// What has this mark is routed by the table of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyRule {
    /// IPv6, not IPv4.
    pub v6: bool,
    /// The mark.
    pub mark: u32,
}

/// State of a router's link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouterLinkState {
    /// Ethernet address.
    pub mac: Option<MacAddress>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Addresses, without link-local ones.
    pub addresses: BTreeSet<IpNet>,
}

/// One step. Every step can be repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterStep {
    /// The router.
    pub router: RouterKey,
    /// What to do.
    pub action: RouterAction,
}

impl fmt::Display for RouterStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match &self.action {
            RouterAction::DeleteNamespace => "delete namespace".to_owned(),
            RouterAction::CreateNamespace => "create namespace".to_owned(),
            RouterAction::SetFilter { .. } => "load address translation".to_owned(),
            RouterAction::SetSysctls { settings } => format!("set {} sysctls", settings.len()),
            RouterAction::DeleteLink { link } => format!("delete link {link}"),
            RouterAction::CreateLink { name, .. } => format!("create link {name}"),
            RouterAction::SetMtu { link, mtu } => format!("set MTU of {link} to {mtu}"),
            RouterAction::SetUp { link } => format!("set {link} up"),
            RouterAction::AddAddress { link, address } => format!("add address {address} to {link}"),
            RouterAction::DeleteAddress { link, address } => format!("delete address {address} of {link}"),
            RouterAction::DeleteRoute { route } => format!("delete route to {}", route.destination),
            RouterAction::SetRoute { route, .. } => format!("set route to {}", route.destination),
            RouterAction::AddRule { rule } => format!("add rule of mark {:#x}", rule.mark),
            RouterAction::DeleteRule { rule } => format!("delete rule of mark {:#x}", rule.mark),
            RouterAction::SetNeighbour { ip, .. } => format!("set neighbour {ip}"),
            RouterAction::DeleteNeighbour { ip, .. } => format!("delete neighbour {ip}"),
        };
        write!(f, "router {}: {what}", self.router)
    }
}

/// What to do to a router's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of RouterConfig and RouterLink")]
pub enum RouterAction {
    /// Remove it with everything in it.
    DeleteNamespace,
    /// Make it, with `lo` up.
    CreateNamespace,
    /// Load the address translation in place of any other.
    SetFilter { filter: Arc<Ruleset> },
    /// Write sysctls.
    SetSysctls { settings: Vec<(&'static str, &'static str)> },
    /// Remove a link, and its other end.
    DeleteLink { link: String },
    /// Make a link, its other end a port of its network's bridge.
    CreateLink { name: String, link: RouterLink },
    /// Set an MTU.
    SetMtu { link: String, mtu: u16 },
    /// Set a link up.
    SetUp { link: String },
    /// Add an address.
    AddAddress { link: String, address: IpNet },
    /// Remove an address.
    DeleteAddress { link: String, address: IpNet },
    /// Remove a route.
    DeleteRoute { route: RouteKey },
    /// Add or change a route.
    SetRoute { route: RouteKey, next: BTreeSet<NextHop> },
    /// Lead a mark to a table.
    AddRule { rule: PolicyRule },
    /// No longer.
    DeleteRule { rule: PolicyRule },
    /// Add or change a permanent neighbour.
    SetNeighbour { link: String, ip: IpAddr, mac: MacAddress },
    /// Remove a permanent neighbour.
    DeleteNeighbour { link: String, ip: IpAddr },
}

/// Compares what is desired with what exists.
pub fn plan_routers(desired: &Desired, observed: &[ObservedRouter]) -> (Vec<RouterStep>, Vec<RouterError>) {
    let (configs, refused) = configure(desired);
    let known: BTreeSet<RouterKey> = desired.routers.iter().map(|router| router.id.into()).collect();
    let unwanted = observed.iter().map(|router| router.key).filter(|key| !known.contains(key));
    let mut steps: Vec<RouterStep> =
        unwanted.map(|router| RouterStep { router, action: RouterAction::DeleteNamespace }).collect();
    for config in &configs {
        let observed = observed.iter().find(|router| router.key == config.key);
        let actions = plan_router(config, observed.and_then(|router| router.content.as_ref()));
        steps.extend(actions.into_iter().map(|action| RouterStep { router: config.key, action }));
    }
    (steps, refused)
}

fn plan_router(config: &RouterConfig, content: Option<&RouterContent>) -> Vec<RouterAction> {
    let mut actions = Vec::new();
    let mut content = content.cloned().unwrap_or_else(|| {
        actions.push(RouterAction::CreateNamespace);
        let sysctls = sysctl_paths().map(|path| (path, String::new())).collect();
        RouterContent { sysctls, ..RouterContent::default() }
    });
    if !content.loopback_up {
        actions.push(RouterAction::SetUp { link: "lo".to_owned() });
    }
    let wanted = (!config.filter.is_empty()).then(|| config.filter.digest());
    if content.filter != wanted {
        actions.push(RouterAction::SetFilter { filter: config.filter.clone() });
    }
    // All of them when one is wrong: changing forwarding changes accept_redirects.
    let forwarding = if config.forwarding { FORWARDING_ON } else { FORWARDING_OFF };
    let settings =
        forwarding.iter().chain(ROUTER_SYSCTLS).filter(|(path, _)| content.sysctls.contains_key(path));
    let settings: Vec<_> = settings.copied().collect();
    if settings.iter().any(|(path, value)| content.sysctls[path] != *value) {
        actions.push(RouterAction::SetSysctls { settings });
    }
    plan_links(config, &mut content, &mut actions);
    let gone = content.rules.difference(&config.rules);
    actions.extend(gone.map(|rule| RouterAction::DeleteRule { rule: *rule }));
    let gone = content.routes.keys().filter(|route| !config.routes.contains_key(route));
    actions.extend(gone.map(|route| RouterAction::DeleteRoute { route: *route }));
    let gone = content.neighbours.keys().filter(|key| !config.neighbours.contains_key(key));
    actions.extend(gone.map(|(link, ip)| RouterAction::DeleteNeighbour { link: link.clone(), ip: *ip }));
    let missing = config.neighbours.iter().filter(|(key, mac)| content.neighbours.get(key) != Some(mac));
    actions.extend(missing.map(|((link, ip), mac)| RouterAction::SetNeighbour {
        link: link.clone(),
        ip: *ip,
        mac: *mac,
    }));
    let missing = config.routes.iter().filter(|(to, next)| content.routes.get(to) != Some(next));
    actions.extend(missing.map(|(to, next)| RouterAction::SetRoute { route: *to, next: next.clone() }));
    let missing = config.rules.difference(&content.rules);
    actions.extend(missing.map(|rule| RouterAction::AddRule { rule: *rule }));
    actions
}

fn plan_links(config: &RouterConfig, content: &mut RouterContent, actions: &mut Vec<RouterAction>) {
    let mut delete = Vec::new();
    for (name, state) in &content.links {
        // The Ethernet address is given when the link is made.
        if config.links.get(name).is_none_or(|link| state.mac != Some(link.mac)) {
            delete.push(name.clone());
        }
    }
    for link in delete {
        content.links.remove(&link);
        content.routes.retain(|_, next| next.iter().all(|next| next.link != link));
        content.neighbours.retain(|(name, _), _| *name != link);
        actions.push(RouterAction::DeleteLink { link });
    }
    for (name, link) in &config.links {
        let state = content.links.remove(name).unwrap_or_else(|| {
            actions.push(RouterAction::CreateLink { name: name.clone(), link: link.clone() });
            RouterLinkState { mac: Some(link.mac), mtu: link.mtu.into(), ..RouterLinkState::default() }
        });
        let named = || name.clone();
        if state.mtu != u32::from(link.mtu) {
            actions.push(RouterAction::SetMtu { link: named(), mtu: link.mtu });
        }
        let gone = state.addresses.difference(&link.addresses);
        actions.extend(gone.map(|address| RouterAction::DeleteAddress { link: named(), address: *address }));
        if !state.up {
            actions.push(RouterAction::SetUp { link: named() });
            content.routes.retain(|_, next| next.iter().all(|next| next.link != *name));
            content.neighbours.retain(|(other, _), _| other != name);
        }
        let missing = link.addresses.difference(&state.addresses);
        actions.extend(missing.map(|address| RouterAction::AddAddress { link: named(), address: *address }));
    }
}
