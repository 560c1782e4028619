//! Routers' namespaces: observation and steps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    link::{InfoData, InfoVeth},
    neighbour::NeighbourState,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags,
        RouteProtocol, RouteScope,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{IpVersion, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::{
    Executor, ExecutorError, delete_namespace, filter::Sockets, netlink::Netlink, observe, set_sysctls,
};
use crate::{
    names::BRIDGE,
    namespace::{self, NamespaceError},
    observed::{LinkKind, PortFlags},
    router::{
        NextHop, ObservedRouter, PolicyRule, RouteKey, RouterAction, RouterContent, RouterKey, RouterLink,
        RouterLinkState, RouterStep,
    },
};

impl Executor {
    /// Reads the state of all of this host's routers.
    pub async fn observe_routers(&self) -> Result<Vec<ObservedRouter>, ExecutorError> {
        let names = namespace::list().map_err(ExecutorError::List)?;
        let keys = names.iter().filter_map(|name| RouterKey::parse(name.strip_prefix(&self.config.prefix)?));
        let mut routers = Vec::new();
        for key in keys {
            let content = match content(&key.namespace(&self.config.prefix), &self.sockets).await {
                Ok(content) => Some(content),
                Err(ExecutorError::Namespace(NamespaceError::NotANamespace(_) | NamespaceError::Own(_))) => {
                    None
                }
                Err(ExecutorError::Namespace(NamespaceError::Missing(_))) => continue,
                Err(error) => return Err(error),
            };
            routers.push(ObservedRouter { key, content });
        }
        Ok(routers)
    }

    /// Carries out a step of a router. It may have been carried out before, wholly or in part.
    pub async fn execute_router(&self, step: &RouterStep) -> Result<(), ExecutorError> {
        let namespace = step.router.namespace(&self.config.prefix);
        match &step.action {
            RouterAction::DeleteNamespace => {
                self.sockets.forget(&namespace);
                return delete_namespace(&namespace).await;
            }
            RouterAction::CreateNamespace => {
                self.sockets.forget(&namespace);
                return Ok(namespace::create(&namespace).await?);
            }
            RouterAction::SetFilter { filter } => return self.sockets.replace(&namespace, filter).await,
            RouterAction::SetSysctls { settings } => return set_sysctls(&namespace, settings.clone()).await,
            _ => {}
        }
        let netlink = Netlink::connect(&namespace).await?;
        match &step.action {
            RouterAction::DeleteLink { link } => netlink.delete_link(link).await,
            RouterAction::CreateLink { name, link } => self.create_router_link(&netlink, name, link).await,
            RouterAction::SetMtu { link, mtu } => netlink.set_mtu(link, *mtu).await,
            RouterAction::SetUp { link } => netlink.set_up(link).await,
            RouterAction::AddAddress { link, address } => netlink.add_address_to(link, *address).await,
            RouterAction::DeleteAddress { link, address } => netlink.delete_address_of(link, *address).await,
            RouterAction::SetRoute { route, next } => set_route(&netlink, *route, next).await,
            RouterAction::DeleteRoute { route } => delete_route(&netlink, *route).await,
            RouterAction::AddRule { rule } => add_rule(&netlink, *rule).await,
            RouterAction::DeleteRule { rule } => delete_rule(&netlink, *rule).await,
            RouterAction::SetNeighbour { link, ip, mac } => netlink.set_neighbour_of(link, *ip, *mac).await,
            RouterAction::DeleteNeighbour { link, ip } => netlink.delete_neighbour_of(link, *ip).await,
            RouterAction::DeleteNamespace
            | RouterAction::CreateNamespace
            | RouterAction::SetFilter { .. }
            | RouterAction::SetSysctls { .. } => Ok(()),
        }
    }

    async fn create_router_link(
        &self,
        netlink: &Netlink,
        name: &str,
        link: &RouterLink,
    ) -> Result<(), ExecutorError> {
        let network = self.namespace(link.network);
        let file = namespace::open(&network)?;
        let there = Netlink::connect(&network).await?;
        // Half made before, or of a router's namespace that the kernel hasn't taken down yet.
        netlink.delete_link(name).await?;
        there.delete_link(&link.peer).await?;
        let mtu = u32::from(link.mtu);
        let peer = LinkUnspec::new_with_name(&link.peer).mtu(mtu).setns_by_fd(file.as_raw_fd()).build();
        let message = LinkMessageBuilder::<LinkVeth>::new(name, &link.peer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .address(link.mac.0.to_vec())
            .mtu(mtu)
            .build();
        netlink.add_link(name, message).await?;
        there.attach(&link.peer, there.index(BRIDGE).await?).await?;
        there.set_port_flags(&link.peer, PortFlags::GUEST).await?;
        there.add_station(&link.peer, link.mac).await?;
        there.set_up(&link.peer).await
    }
}

async fn content(namespace: &str, sockets: &Sockets) -> Result<RouterContent, ExecutorError> {
    let netlink = Netlink::connect(namespace).await?;
    let (links, indices) = observe::links_with_indices(&netlink).await?;
    let names: BTreeMap<u32, &str> = indices.iter().map(|(name, index)| (*index, name.as_str())).collect();
    let mut content = RouterContent {
        sysctls: observe::sysctls(namespace, crate::router::sysctl_paths()).await?,
        filter: sockets.loaded(namespace).await?,
        loopback_up: links.iter().any(|link| link.kind == LinkKind::Loopback && link.up),
        rules: rules(&netlink).await?,
        ..RouterContent::default()
    };
    for link in links.iter().filter(|link| link.kind != LinkKind::Loopback) {
        let state =
            RouterLinkState { mac: link.mac, mtu: link.mtu, up: link.up, ..RouterLinkState::default() };
        // What a kernel puts into every namespace by itself (sit0, …) isn't Ethernet.
        if link.mac.is_some() && (link.name.starts_with("if") || link.name.starts_with("gw")) {
            content.links.insert(link.name.clone(), state);
        }
    }
    for (name, state) in &mut content.links {
        let addresses = observe::addresses(&netlink, indices.get(name).copied()).await?;
        let link_local =
            |address: &IpNet| matches!(address.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        state.addresses = addresses.into_iter().filter(|address| !link_local(address)).collect();
    }
    for version in [AddressFamily::Inet, AddressFamily::Inet6] {
        for message in observe::neighbour_messages(&netlink, version).await? {
            if message.header.state != NeighbourState::Permanent {
                continue;
            }
            let name = names.get(&message.header.ifindex).map(|name| (*name).to_owned());
            let entry = name.zip(observe::destination(&message)).zip(observe::link_layer_address(&message));
            content.neighbours.extend(entry);
        }
        let mut request = RouteMessage::default();
        request.header.address_family = version;
        let routes: Vec<RouteMessage> = netlink
            .handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(netlink.failed("list routes"))?;
        content.routes.extend(routes.iter().filter_map(|message| route(message, &names)));
    }
    Ok(content)
}

/// A route that was set (static), with where it leads.
fn route(message: &RouteMessage, names: &BTreeMap<u32, &str>) -> Option<(RouteKey, BTreeSet<NextHop>)> {
    let header = &message.header;
    if header.protocol != RouteProtocol::Static {
        return None;
    }
    let (mut destination, mut table) = (None, u32::from(header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let everywhere = || match header.address_family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    };
    let destination = IpNet::new(destination.or_else(everywhere)?, header.destination_prefix_length).ok()?;
    let next = next_hops(&message.attributes, names);
    (!next.is_empty()).then_some((RouteKey { table, destination }, next))
}

/// Those that are alive.
fn next_hops(attributes: &[RouteAttribute], names: &BTreeMap<u32, &str>) -> BTreeSet<NextHop> {
    let name = |index: u32| names.get(&index).map(|name| (*name).to_owned());
    let (mut gateway, mut link, mut all) = (None, None, BTreeSet::new());
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => link = name(*index),
            RouteAttribute::MultiPath(hops) => {
                let alive = hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead));
                all.extend(alive.filter_map(|hop| {
                    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                        RouteAttribute::Gateway(address) => ip(address),
                        _ => None,
                    });
                    Some(NextHop { gateway, link: name(hop.interface_index)? })
                }));
            }
            _ => {}
        }
    }
    all.extend(link.map(|link| NextHop { gateway, link }));
    all
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// The message that names a route; its next hops are still to come.
fn named(route: RouteKey) -> RouteMessage {
    let RouteKey { table, destination } = route;
    match destination {
        IpNet::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to.addr(), to.prefix_len())
            .table_id(table)
            .protocol(RouteProtocol::Static)
            .build(),
        IpNet::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to.addr(), to.prefix_len())
            .table_id(table)
            .protocol(RouteProtocol::Static)
            .build(),
    }
}

async fn set_route(
    netlink: &Netlink,
    route: RouteKey,
    next: &BTreeSet<NextHop>,
) -> Result<(), ExecutorError> {
    let mut message = named(route);
    let mut hops = Vec::with_capacity(next.len());
    for next in next {
        hops.push((netlink.index(&next.link).await?, next.gateway));
    }
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    match hops[..] {
        [(link, gateway)] => {
            message.attributes.push(RouteAttribute::Oif(link));
            match gateway {
                Some(gateway) => {
                    message.header.flags |= RouteFlags::Onlink;
                    message.attributes.push(RouteAttribute::Gateway(address(gateway)));
                }
                None => message.header.scope = RouteScope::Link,
            }
        }
        _ => {
            let hops = hops.into_iter().map(|(link, gateway)| {
                let mut hop = RouteNextHop::default();
                hop.interface_index = link;
                if let Some(gateway) = gateway {
                    hop.flags = RouteNextHopFlags::Onlink;
                    hop.attributes.push(RouteAttribute::Gateway(address(gateway)));
                }
                hop
            });
            message.attributes.push(RouteAttribute::MultiPath(hops.collect()));
        }
    }
    let set = netlink.handle.route().add(message).replace().execute().await;
    set.map_err(netlink.failed(format!("set the route to {}", route.destination)))
}

async fn delete_route(netlink: &Netlink, route: RouteKey) -> Result<(), ExecutorError> {
    let mut message = named(route);
    // Whatever its scope is, and wherever it leads.
    message.header.scope = RouteScope::NoWhere;
    let deleted = netlink.handle.route().del(message).execute().await;
    // With its link the route went, too.
    super::netlink::unless(deleted, &[libc::ESRCH])
        .map_err(netlink.failed(format!("delete the route to {}", route.destination)))
}

/// Order of rules among all: before the main table, which holds the routes of what has no mark.
const RULE_PRIORITY: u32 = 1000;

fn rule_message(rule: PolicyRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::Table(rule.mark),
    ];
    message
}

async fn add_rule(netlink: &Netlink, rule: PolicyRule) -> Result<(), ExecutorError> {
    let mut request = netlink.handle.rule().add();
    *request.message_mut() = rule_message(rule);
    let added = request.execute().await;
    super::netlink::unless(added, &[libc::EEXIST])
        .map_err(netlink.failed(format!("add the rule of mark {:#x}", rule.mark)))
}

async fn delete_rule(netlink: &Netlink, rule: PolicyRule) -> Result<(), ExecutorError> {
    let deleted = netlink.handle.rule().del(rule_message(rule)).execute().await;
    super::netlink::unless(deleted, &[libc::ENOENT])
        .map_err(netlink.failed(format!("delete the rule of mark {:#x}", rule.mark)))
}

async fn rules(netlink: &Netlink) -> Result<BTreeSet<PolicyRule>, ExecutorError> {
    let mut found = BTreeSet::new();
    for (v6, version) in [(false, IpVersion::V4), (true, IpVersion::V6)] {
        let messages = netlink.handle.rule().get(version).execute();
        let messages: Vec<RuleMessage> =
            messages.try_collect().await.map_err(netlink.failed("list rules"))?;
        for message in messages {
            let is_ours = message.attributes.contains(&RuleAttribute::Priority(RULE_PRIORITY));
            let mark = message.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::FwMark(mark) => Some(*mark),
                _ => None,
            });
            found.extend(mark.filter(|_| is_ours).map(|mark| PolicyRule { v6, mark }));
        }
    }
    Ok(found)
}
