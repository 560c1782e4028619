//! Routers' namespaces: observation and steps.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use futures_util::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily,
    link::{InfoData, InfoVeth},
    neighbour::NeighbourState,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::{
    Executor, ExecutorError, delete_namespace, filter::Sockets, netlink::Netlink, observe, set_sysctls,
};
use crate::{
    names::BRIDGE,
    namespace::{self, NamespaceError},
    observed::{LinkKind, PortFlags},
    router::{
        NextHop, ObservedRouter, RouterAction, RouterContent, RouterKey, RouterLink, RouterLinkState,
        RouterStep,
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
            RouterAction::SetRoute { destination, next } => set_route(&netlink, *destination, next).await,
            RouterAction::DeleteRoute { destination, next } => {
                delete_route(&netlink, *destination, next).await
            }
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

/// A route that was set (static, in the main table), if it leads to a next hop.
fn route(message: &RouteMessage, names: &BTreeMap<u32, &str>) -> Option<(IpNet, NextHop)> {
    let header = &message.header;
    if header.protocol != RouteProtocol::Static || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut destination, mut gateway, mut link) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => link = names.get(index),
            _ => {}
        }
    }
    let everywhere = || match header.address_family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    };
    let destination = IpNet::new(destination.or_else(everywhere)?, header.destination_prefix_length).ok()?;
    Some((destination, NextHop { gateway: gateway?, link: (*link?).to_owned() }))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

async fn message(
    netlink: &Netlink,
    destination: IpNet,
    next: &NextHop,
) -> Result<Option<RouteMessage>, ExecutorError> {
    let link = netlink.index(&next.link).await?;
    Ok(match (destination, next.gateway) {
        (IpNet::V4(to), IpAddr::V4(gateway)) => Some(v4(to, gateway, link)),
        (IpNet::V6(to), IpAddr::V6(gateway)) => Some(v6(to, gateway, link)),
        _ => None,
    })
}

fn v4(to: Ipv4Net, gateway: Ipv4Addr, link: u32) -> RouteMessage {
    let builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.addr(), to.prefix_len());
    builder.gateway(gateway).output_interface(link).protocol(RouteProtocol::Static).onlink().build()
}

fn v6(to: Ipv6Net, gateway: Ipv6Addr, link: u32) -> RouteMessage {
    let builder = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to.addr(), to.prefix_len());
    builder.gateway(gateway).output_interface(link).protocol(RouteProtocol::Static).onlink().build()
}

async fn set_route(netlink: &Netlink, destination: IpNet, next: &NextHop) -> Result<(), ExecutorError> {
    let Some(message) = message(netlink, destination, next).await? else { return Ok(()) };
    let set = netlink.handle.route().add(message).replace().execute().await;
    set.map_err(netlink.failed(format!("set the route to {destination}")))
}

async fn delete_route(netlink: &Netlink, destination: IpNet, next: &NextHop) -> Result<(), ExecutorError> {
    let message = match message(netlink, destination, next).await {
        Ok(Some(message)) => message,
        // With its link the route went, too.
        Ok(None) | Err(ExecutorError::NoLink { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let deleted = netlink.handle.route().del(message).execute().await;
    super::netlink::unless(deleted, &[libc::ESRCH])
        .map_err(netlink.failed(format!("delete the route to {destination}")))
}
