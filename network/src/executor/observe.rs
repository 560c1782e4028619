//! Reads the state of namespaces back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    link::{
        InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{ExecutorError, PROC_SYS, filter::Sockets, netlink::Netlink};
use crate::{
    Config,
    names::{BRIDGE, MacAddress, NetworkKey, VXLAN},
    namespace::{self, NamespaceError},
    observed::{
        BridgePort, LinkKind, NamespaceContent, ObservedLink, ObservedNamespace, ObservedNetwork, PortFlags,
        VxlanLink,
    },
    plan::{BRIDGE_NETFILTER_OFF, BRIDGE_SYSCTLS, SYSCTLS},
};

pub(super) async fn observe(
    config: &Config,
    sockets: &Sockets,
) -> Result<Vec<ObservedNetwork>, ExecutorError> {
    let names = namespace::list().map_err(ExecutorError::List)?;
    sockets.retain(|namespace| names.iter().any(|name| name == namespace));
    let keys = names.iter().filter_map(|name| NetworkKey::parse(name.strip_prefix(&config.prefix)?));
    let mut networks = Vec::new();
    for key in keys {
        let namespace = match content(&key.namespace(&config.prefix), sockets).await {
            Ok(content) => ObservedNamespace::Live(content),
            Err(ExecutorError::Namespace(NamespaceError::NotANamespace(_) | NamespaceError::Own(_))) => {
                ObservedNamespace::Broken
            }
            // Gone since the names were read.
            Err(ExecutorError::Namespace(NamespaceError::Missing(_))) => continue,
            Err(error) => return Err(error),
        };
        networks.push(ObservedNetwork { key, namespace });
    }
    Ok(networks)
}

async fn content(namespace: &str, sockets: &Sockets) -> Result<NamespaceContent, ExecutorError> {
    let netlink = Netlink::connect(namespace).await?;
    let (links, indices) = links_with_indices(&netlink).await?;
    let bridge = indices.get(BRIDGE).copied();
    let paths = SYSCTLS.iter().chain(BRIDGE_NETFILTER_OFF).chain(BRIDGE_SYSCTLS).map(|(path, _)| *path);
    Ok(NamespaceContent {
        sysctls: sysctls(namespace, paths).await?,
        filter: sockets.loaded(namespace).await?,
        tunnels: tunnels(&netlink, indices.get(VXLAN).copied()).await?,
        links,
        addresses: addresses(&netlink, bridge).await?,
        neighbours: neighbours(&netlink, bridge).await?,
    })
}

/// Those sysctls that exist.
pub(super) async fn sysctls(
    namespace: &str,
    paths: impl Iterator<Item = &'static str> + Send + 'static,
) -> Result<BTreeMap<&'static str, String>, ExecutorError> {
    let name = namespace.to_owned();
    let read = move || {
        let mut values = BTreeMap::new();
        for path in paths {
            match fs::read_to_string(format!("{PROC_SYS}/{path}")) {
                Ok(value) => _ = values.insert(path, value.trim().to_owned()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ExecutorError::Sysctl { namespace: name, path, source }),
            }
        }
        Ok(values)
    };
    namespace::run_in(namespace, read).await?
}

pub(super) async fn links(netlink: &Netlink) -> Result<Vec<ObservedLink>, ExecutorError> {
    Ok(links_with_indices(netlink).await?.0)
}

pub(super) async fn links_with_indices(
    netlink: &Netlink,
) -> Result<(Vec<ObservedLink>, BTreeMap<String, u32>), ExecutorError> {
    let messages: Vec<LinkMessage> =
        netlink.handle.link().get().execute().try_collect().await.map_err(netlink.failed("list links"))?;
    let indices: BTreeMap<String, u32> =
        messages.iter().filter_map(|message| Some((name_of(message)?, message.header.index))).collect();
    let stations = stations(netlink).await?;
    let bridge = indices.get(BRIDGE).copied();
    let links = messages.iter().filter_map(|message| {
        let stations = stations.get(&message.header.index).cloned().unwrap_or_default();
        link(message, bridge, stations)
    });
    let mut links: Vec<ObservedLink> = links.collect();
    links.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok((links, indices))
}

fn name_of(message: &LinkMessage) -> Option<String> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn link(message: &LinkMessage, bridge: Option<u32>, stations: BTreeSet<MacAddress>) -> Option<ObservedLink> {
    let mut link = ObservedLink {
        name: name_of(message)?,
        kind: LinkKind::Other,
        alias: None,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        mac: None,
        bridge_port: None,
    };
    if message.header.flags.contains(LinkFlags::Loopback) {
        link.kind = LinkKind::Loopback;
    }
    let mut flags = PortFlags::default();
    let mut controller = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) => link.mac = mac(address),
            LinkAttribute::Controller(index) => controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => link_info(infos, &mut link.kind, &mut flags),
            _ => {}
        }
    }
    if controller.is_some() && controller == bridge {
        link.bridge_port = Some(BridgePort { flags, stations });
    }
    Some(link)
}

fn link_info(infos: &[LinkInfo], kind: &mut LinkKind, flags: &mut PortFlags) {
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => *kind = LinkKind::Bridge,
            LinkInfo::Kind(InfoKind::Tun) => *kind = LinkKind::Tun,
            LinkInfo::Data(InfoData::Vxlan(data)) => {
                *kind = vxlan(data).map_or(LinkKind::Other, LinkKind::Vxlan)
            }
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                for attribute in port {
                    match attribute {
                        InfoBridgePort::Learning(on) => flags.learning = *on,
                        InfoBridgePort::UnicastFlood(on) => flags.flood = *on,
                        InfoBridgePort::HairpinMode(on) => flags.hairpin = *on,
                        InfoBridgePort::BroadcastFlood(on) => flags.broadcast = *on,
                        InfoBridgePort::NeighSupress(on) => flags.suppress = *on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

fn vxlan(data: &[InfoVxlan]) -> Option<VxlanLink> {
    let (mut vni, mut local, mut port) = (None, None, None);
    for info in data {
        match info {
            InfoVxlan::Id(id) => vni = Some(*id),
            InfoVxlan::Local(ip) => local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => local = Some(IpAddr::V6(*ip)),
            InfoVxlan::Port(number) => port = Some(*number),
            _ => {}
        }
    }
    Some(VxlanLink { vni: vni?, local: local?, port: port? })
}

/// Where the VXLAN link sends what is for whom.
async fn tunnels(
    netlink: &Netlink,
    vxlan: Option<u32>,
) -> Result<BTreeMap<MacAddress, IpAddr>, ExecutorError> {
    let Some(vxlan) = vxlan else { return Ok(BTreeMap::new()) };
    let messages = neighbour_messages(netlink, AddressFamily::Bridge).await?;
    let of_link = messages.iter().filter(|message| message.header.ifindex == vxlan);
    Ok(of_link.filter_map(|message| Some((link_layer_address(message)?, destination(message)?))).collect())
}

fn mac(octets: &[u8]) -> Option<MacAddress> {
    octets.try_into().ok().map(MacAddress)
}

pub(super) async fn addresses(
    netlink: &Netlink,
    bridge: Option<u32>,
) -> Result<BTreeSet<IpNet>, ExecutorError> {
    let Some(bridge) = bridge else { return Ok(BTreeSet::new()) };
    let messages: Vec<AddressMessage> = netlink
        .handle
        .address()
        .get()
        .set_link_index_filter(bridge)
        .execute()
        .try_collect()
        .await
        .map_err(netlink.failed("list addresses"))?;
    Ok(messages.iter().filter_map(address).collect())
}

fn address(message: &AddressMessage) -> Option<IpNet> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    // An IPv6 address that has no peer is only the "address".
    let local = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    });
    IpNet::new(local?, message.header.prefix_len).ok()
}

pub(super) async fn neighbour_messages(
    netlink: &Netlink,
    family: AddressFamily,
) -> Result<Vec<NeighbourMessage>, ExecutorError> {
    let request = netlink.handle.neighbours().get().set_address_family(family);
    request.execute().try_collect().await.map_err(netlink.failed("list neighbours"))
}

async fn neighbours(
    netlink: &Netlink,
    bridge: Option<u32>,
) -> Result<BTreeMap<IpAddr, MacAddress>, ExecutorError> {
    let Some(bridge) = bridge else { return Ok(BTreeMap::new()) };
    let mut messages = neighbour_messages(netlink, AddressFamily::Inet).await?;
    messages.extend(neighbour_messages(netlink, AddressFamily::Inet6).await?);
    let permanent = messages.iter().filter(|message| {
        message.header.ifindex == bridge && message.header.state == NeighbourState::Permanent
    });
    Ok(permanent.filter_map(|message| Some((destination(message)?, link_layer_address(message)?))).collect())
}

pub(super) fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        // Of a forwarding entry.
        NeighbourAttribute::Destination(NeighbourAddress::Other(octets)) => match octets.len() {
            4 => <[u8; 4]>::try_from(octets.as_slice()).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(octets.as_slice()).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    })
}

pub(super) fn link_layer_address(message: &NeighbourMessage) -> Option<MacAddress> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(octets) => mac(octets),
        _ => None,
    })
}

/// Static forwarding entries of bridges by the index of the port. (A port's own address is "permanent", what is learnt
/// is neither.)
async fn stations(netlink: &Netlink) -> Result<BTreeMap<u32, BTreeSet<MacAddress>>, ExecutorError> {
    let messages = neighbour_messages(netlink, AddressFamily::Bridge).await?;
    let mut stations: BTreeMap<u32, BTreeSet<MacAddress>> = BTreeMap::new();
    for message in messages.iter().filter(|message| message.header.state == NeighbourState::Noarp) {
        if let Some(mac) = link_layer_address(message) {
            stations.entry(message.header.ifindex).or_default().insert(mac);
        }
    }
    Ok(stations)
}
