//! A router on one host: a namespace with one link into each of its networks, and on the host that holds its gateway one
//! into the external network.
//!
//! What goes from one of its networks to another is routed on the sender's host: every host has the same router with the
//! same Ethernet addresses, which stay on the host since bridges learn nothing. What leaves by the gateway goes over the
//! overlay of one of its networks to the host that holds it: to an Ethernet address that stands for "the gateway's host"
//! ([`transit_mac`]); what comes back goes straight from there.
//!
//! A router with several gateways has them all on one host, each with a routing table of its own. The default route leads to
//! the first one, or to all (ECMP). A connection remembers by its mark by which gateway it came or went ([`nat`]), and a
//! rule for each mark leads what belongs to it to that gateway's table.

mod nat;
mod plan;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use mote_host_api::{
    GatewayPlace, NetworkId, NetworkSpec, PortId, RouterGateway, RouterId, RouterInterface, RouterSpec,
    SegmentSpec,
};

use crate::{
    Desired,
    filter::Ruleset,
    names::{MacAddress, NetworkKey, leading_bits, router_port_name},
    spec::SpecProblem,
};
pub(crate) use plan::sysctl_paths;
pub use plan::{
    ObservedRouter, PolicyRule, ROUTER_SYSCTLS, RouterAction, RouterContent, RouterLinkState, RouterStep,
    plan_routers,
};

/// The address that stands for the gateway's host in routes of the others. On no wire: its neighbour entry is permanent.
const TRANSIT_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 88, 1);
/// Floating IPs of one router.
pub const FLOATING_IPS_MAX: usize = 1024;
/// Gateways of one router.
pub const GATEWAYS_MAX: usize = 16;
/// The main routing table.
pub(crate) const MAIN_TABLE: u32 = 254;
/// Ports of a port forwarding whose ranges start at different ports.
pub const SHIFTED_PORTS_MAX: u16 = 256;

/// The first 11 hex digits of a router's id: what its namespace is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouterKey(NetworkKey);

impl RouterKey {
    /// The key that `text` (`r` and 11 lower-case hex digits) writes.
    pub fn parse(text: &str) -> Option<Self> {
        text.strip_prefix('r').and_then(NetworkKey::parse).map(Self)
    }

    /// The key of a network with the same id, of which there is none.
    pub fn network_key(self) -> NetworkKey {
        self.0
    }

    /// Name of the namespace under /run/netns.
    pub fn namespace(self, prefix: &str) -> String {
        format!("{prefix}{self}")
    }
}

impl From<RouterId> for RouterKey {
    fn from(id: RouterId) -> Self {
        Self(NetworkKey::from(NetworkId(id.0)))
    }
}

impl std::fmt::Display for RouterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// Why a router can't be made as it is described. What exists of it stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("router {router}: {problem}")]
pub struct RouterError {
    /// The router.
    pub router: RouterId,
    /// What is wrong with it.
    pub problem: RouterProblem,
}

/// What is wrong with a router's description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouterProblem {
    /// Two routers of one name.
    #[error("named twice, or its id starts like another router's")]
    Duplicate,
    /// A network that isn't there.
    #[error("port {0}: network {1} is not described")]
    UnknownNetwork(PortId, NetworkId),
    /// Ethernet address.
    #[error("port {0}: {1:?} is no station's Ethernet address")]
    Mac(PortId, String),
    /// The gateway is elsewhere, and nothing leads there.
    #[error("its gateway is on another host, and none of its networks has a VXLAN segment to get there")]
    NoTransit,
    /// A next hop that no interface leads to.
    #[error("next hop {0} is in none of its subnets")]
    NextHop(IpAddr),
    /// SNAT or floating IPs without an address.
    #[error("its gateway has no IPv4 address to translate to")]
    NoExternalAddress,
    /// Too many.
    #[error("more than {FLOATING_IPS_MAX} floating IPs")]
    TooMany,
    /// Too many gateways, on several hosts, or indistinguishable ones.
    #[error(
        "its gateways are more than {GATEWAYS_MAX}, are on several hosts, or two of their ports' ids start with the same seven digits"
    )]
    Gateways,
    /// Port forwarding.
    #[error(
        "port forwarding of {0}: external and internal range differ in length, are empty, or start at different ports and have more than {SHIFTED_PORTS_MAX}"
    )]
    PortForwarding(Ipv4Addr),
    /// QoS policy.
    #[error("floating IP {0}: {1}")]
    Qos(Ipv4Addr, SpecProblem),
}

/// A router that can be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterConfig {
    /// Key of its names.
    pub key: RouterKey,
    /// Whether packets are forwarded.
    pub forwarding: bool,
    /// Links by name.
    pub links: BTreeMap<String, RouterLink>,
    /// Routes beside those of the links' own ranges.
    pub routes: Routes,
    /// Which marks lead to which routing table.
    pub rules: BTreeSet<PolicyRule>,
    /// Permanent neighbours.
    pub neighbours: BTreeMap<(String, IpAddr), MacAddress>,
    /// Address translation.
    pub filter: Arc<Ruleset>,
}

/// A link of a router into a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterLink {
    /// Ethernet address.
    pub mac: MacAddress,
    /// MTU in bytes.
    pub mtu: u16,
    /// Addresses with their prefix lengths.
    pub addresses: BTreeSet<IpNet>,
    /// The network.
    pub network: NetworkKey,
    /// Name of the other end, in the network's namespace.
    pub peer: String,
}

/// What a route is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// Number of its table.
    pub table: u32,
    /// Destination.
    pub destination: IpNet,
}

impl RouteKey {
    fn main(destination: IpNet) -> Self {
        Self { table: MAIN_TABLE, destination }
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// Address of the next router; none: the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// The link over which it is reached.
    pub link: String,
}

impl NextHop {
    fn by(gateway: IpAddr, link: &str) -> Self {
        Self { gateway: Some(gateway), link: link.to_owned() }
    }
}

/// Routes; several next hops share what they carry.
pub type Routes = BTreeMap<RouteKey, BTreeSet<NextHop>>;

/// The mark of what belongs to a gateway, and the number of its routing table. It stays the same whatever other gateways
/// there are. It is none of the kernel's tables and not [`nat`]'s own mark.
fn gateway_mark(port: PortId) -> u32 {
    ((port.0.as_u128() >> 100) as u32) << 4 | 2
}

/// Name of a router's link by its port.
pub fn link_name(port: PortId) -> String {
    format!("if{:011x}", leading_bits(port.0.as_u128()))
}

/// The Ethernet address of a router on the host that holds its gateway.
pub fn transit_mac(router: RouterId) -> MacAddress {
    let [a, b, c, d, e, ..] = *router.0.as_bytes();
    // Locally administered, unicast, and not that of a bridge.
    MacAddress([0x06, a, b, c, d, e])
}

fn transit_names(router: RouterId) -> (String, String) {
    let digits = format!("{:011x}", leading_bits(router.0.as_u128()));
    (format!("gw{digits}"), format!("rtg{digits}"))
}

fn station(port: PortId, text: &str) -> Result<MacAddress, RouterProblem> {
    let mac = text.parse().ok().filter(|mac: &MacAddress| mac.is_station());
    mac.ok_or_else(|| RouterProblem::Mac(port, text.to_owned()))
}

/// The interface over whose network the other hosts reach the gateway's: the same on every host.
fn transit<'a>(router: &'a RouterSpec, networks: &[NetworkSpec]) -> Option<&'a RouterInterface> {
    let overlay = |interface: &&RouterInterface| {
        let network = networks.iter().find(|network| network.id == interface.network_id);
        matches!(network.and_then(|network| network.segment.as_ref()), Some(SegmentSpec::Vxlan { .. }))
    };
    router.interfaces.iter().filter(overlay).min_by_key(|interface| interface.port_id)
}

/// What a network has of routers: the other ends of their links, and the host behind which gateways are.
pub(crate) fn in_network(
    network: NetworkId,
    desired: &Desired,
) -> (BTreeMap<String, MacAddress>, BTreeMap<MacAddress, IpAddr>) {
    let (mut ports, mut tunnels) = (BTreeMap::new(), BTreeMap::new());
    for router in &desired.routers {
        for interface in router.interfaces.iter().filter(|interface| interface.network_id == network) {
            if let Ok(mac) = station(interface.port_id, &interface.mac_address) {
                ports.insert(router_port_name(interface.port_id), mac);
            }
        }
        let Some(first) = &router.gateway else { continue };
        let here =
            transit(router, &desired.networks).is_some_and(|interface| interface.network_id == network);
        match first.place {
            GatewayPlace::Here => {
                if here {
                    ports.insert(transit_names(router.id).1, transit_mac(router.id));
                }
                for gateway in router.gateways().filter(|gateway| gateway.network_id == network) {
                    if let Ok(mac) = station(gateway.port_id, &gateway.mac_address) {
                        ports.insert(router_port_name(gateway.port_id), mac);
                    }
                }
            }
            GatewayPlace::Remote(host) if here => _ = tunnels.insert(transit_mac(router.id), host),
            GatewayPlace::Remote(_) => {}
        }
    }
    (ports, tunnels)
}

/// Whether other hosts send over this network though no port of it is there: what goes from one network of a router to
/// another is routed on the sender's host, and what leaves by a gateway goes over one of the networks to its host.
pub(crate) fn is_crossed(network: NetworkId, desired: &Desired) -> bool {
    let is_routed = |router: &RouterSpec| router.interfaces.iter().any(|other| other.network_id == network);
    let has_others = |network: &NetworkSpec| {
        let local = desired.tunnel.map(|tunnel| tunnel.local_ip);
        network.remote_ports.iter().any(|port| Some(port.tunnel_ip) != local)
    };
    // Routers may lead on to other routers, so any network may be where the sender is.
    desired.routers.iter().any(is_routed) && desired.networks.iter().any(has_others)
}

/// Sorts descriptions into those that can be executed and those that can't.
pub fn configure(desired: &Desired) -> (Vec<RouterConfig>, Vec<RouterError>) {
    let (mut configs, mut errors) = (Vec::new(), Vec::new());
    let mut seen: HashMap<RouterKey, usize> = HashMap::new();
    for router in &desired.routers {
        *seen.entry(router.id.into()).or_default() += 1;
    }
    for router in &desired.routers {
        let configured = match seen.get(&router.id.into()) {
            Some(1) => configure_one(router, desired),
            _ => Err(RouterProblem::Duplicate),
        };
        match configured {
            Ok(config) => configs.push(config),
            Err(problem) => errors.push(RouterError { router: router.id, problem }),
        }
    }
    (configs, errors)
}

fn configure_one(router: &RouterSpec, desired: &Desired) -> Result<RouterConfig, RouterProblem> {
    let mut config = RouterConfig {
        key: router.id.into(),
        forwarding: router.admin_state_up,
        links: BTreeMap::new(),
        routes: BTreeMap::new(),
        rules: BTreeSet::new(),
        neighbours: BTreeMap::new(),
        filter: Arc::default(),
    };
    let link = |port, network_id, mac: &str, addresses: &[IpNet]| {
        let network = desired.networks.iter().find(|network| network.id == network_id);
        let network = network.ok_or(RouterProblem::UnknownNetwork(port, network_id))?;
        Ok::<_, RouterProblem>(RouterLink {
            mac: station(port, mac)?,
            mtu: network.mtu,
            addresses: addresses.iter().copied().collect(),
            network: network_id.into(),
            peer: router_port_name(port),
        })
    };
    for interface in &router.interfaces {
        let made =
            link(interface.port_id, interface.network_id, &interface.mac_address, &interface.addresses)?;
        config.links.insert(link_name(interface.port_id), made);
    }
    if let Some(first) = &router.gateway {
        check_gateways(router, first)?;
        match first.place {
            GatewayPlace::Here => {
                for gateway in router.gateways() {
                    let mut made =
                        link(gateway.port_id, gateway.network_id, &gateway.mac_address, &gateway.addresses)?;
                    let floating = gateway.floating_ips.iter();
                    made.addresses
                        .extend(floating.map(|ip| mote_host_api::host_net(ip.floating_ip_address.into())));
                    config.links.insert(link_name(gateway.port_id), made);
                }
                gateways_here(&mut config, router, desired)?;
            }
            GatewayPlace::Remote(_) => gateway_elsewhere(&mut config, router, desired)?,
        }
    }
    extra_routes(&mut config, router)?;
    Ok(config)
}

/// The range of all addresses of a version.
fn everywhere(version: IpAddr) -> IpNet {
    match version {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

fn check_gateways(router: &RouterSpec, first: &RouterGateway) -> Result<(), RouterProblem> {
    let marks: BTreeSet<u32> = router.gateways().map(|gateway| gateway_mark(gateway.port_id)).collect();
    let count = router.gateways().count();
    let together = router.extra_gateways.iter().all(|gateway| gateway.place == first.place);
    match together && count <= GATEWAYS_MAX && marks.len() == count {
        true => Ok(()),
        false => Err(RouterProblem::Gateways),
    }
}

/// Ways out. With several gateways each has a table: its networks, and what is beyond its next hop.
fn route_out(config: &mut RouterConfig, router: &RouterSpec) {
    let several = !router.extra_gateways.is_empty();
    for gateway in router.gateways() {
        let (name, table) = (link_name(gateway.port_id), gateway_mark(gateway.port_id));
        let next = gateway.next_hop.map(IpAddr::V4).into_iter().chain(gateway.next_hop_v6.map(IpAddr::V6));
        for next in next {
            let main = config.routes.entry(RouteKey::main(everywhere(next))).or_default();
            if router.default_route_ecmp || main.is_empty() {
                main.insert(NextHop::by(next, &name));
            }
            if several {
                let key = RouteKey { table, destination: everywhere(next) };
                config.routes.insert(key, [NextHop::by(next, &name)].into());
            }
        }
        if several {
            for range in &gateway.addresses {
                let key = RouteKey { table, destination: range.trunc() };
                config.routes.insert(key, [NextHop { gateway: None, link: name.clone() }].into());
            }
            config.rules.extend([false, true].map(|v6| PolicyRule { v6, mark: table }));
        }
    }
}

fn gateways_here(
    config: &mut RouterConfig,
    router: &RouterSpec,
    desired: &Desired,
) -> Result<(), RouterProblem> {
    route_out(config, router);
    if let Some(interface) = transit(router, &desired.networks) {
        let (name, peer) = transit_names(router.id);
        let network = config.links.get(&link_name(interface.port_id));
        let (network, mtu) =
            network.map_or((interface.network_id.into(), 1280), |link| (link.network, link.mtu));
        let mac = transit_mac(router.id);
        config.links.insert(name, RouterLink { mac, mtu, addresses: BTreeSet::new(), network, peer });
    }
    config.filter = Arc::new(nat::ruleset(router)?);
    Ok(())
}

fn gateway_elsewhere(
    config: &mut RouterConfig,
    router: &RouterSpec,
    desired: &Desired,
) -> Result<(), RouterProblem> {
    let interface = transit(router, &desired.networks).ok_or(RouterProblem::NoTransit)?;
    let (link, mac) = (link_name(interface.port_id), transit_mac(router.id));
    for gateway in [IpAddr::V4(TRANSIT_IP), IpAddr::V6(mac.link_local())] {
        config.routes.insert(RouteKey::main(everywhere(gateway)), [NextHop::by(gateway, &link)].into());
        config.neighbours.insert((link.clone(), gateway), mac);
    }
    Ok(())
}

fn extra_routes(config: &mut RouterConfig, router: &RouterSpec) -> Result<(), RouterProblem> {
    let v4 = router.routes.iter().map(|r| (IpNet::V4(r.destination), IpAddr::V4(r.nexthop)));
    let v6 = router.routes_v6.iter().map(|r| (IpNet::V6(r.destination), IpAddr::V6(r.nexthop)));
    for (destination, gateway) in v4.chain(v6) {
        let leads =
            |(_, link): &(&String, &RouterLink)| link.addresses.iter().any(|range| range.contains(&gateway));
        let link = config.links.iter().find(leads).map(|(name, _)| name.clone());
        match link {
            Some(link) => {
                let next = [NextHop::by(gateway, &link)].into();
                config.routes.insert(RouteKey::main(destination.trunc()), next);
            }
            // It is in the external network, which the default route leads to.
            None if is_external(router, gateway) => {}
            None => return Err(RouterProblem::NextHop(gateway)),
        }
    }
    Ok(())
}

fn is_external(router: &RouterSpec, address: IpAddr) -> bool {
    let gateways = router.gateways().filter(|gateway| matches!(gateway.place, GatewayPlace::Remote(_)));
    gateways.flat_map(|gateway| &gateway.addresses).any(|range| range.contains(&address))
}
