//! Links that lead out of a network's namespace: made from the host's namespace, at once in the network's.

use std::os::fd::AsRawFd;

use netlink_packet_route::link::{InfoData, InfoVeth, InfoVxlan, MacVlanMode};
use rtnetlink::{LinkMacVlan, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVlan, LinkVxlan};

use super::{ExecutorError, netlink::Netlink};
use crate::{
    Config,
    names::{NetworkKey, UPLINK, VXLAN},
    namespace,
    observed::{LinkKind, VxlanLink},
    spec::Segment,
};

pub(super) async fn host(config: &Config) -> Result<Netlink, ExecutorError> {
    match &config.host_namespace {
        Some(name) => Netlink::connect(name).await,
        None => Netlink::own(),
    }
}

pub(super) async fn create(
    config: &Config,
    namespace: &str,
    network: NetworkKey,
    segment: &Segment,
    mtu: u16,
) -> Result<(), ExecutorError> {
    // Made before and not seen, or half made: whatever has the name gives way.
    Netlink::connect(namespace).await?.delete_link(segment.link_name()).await?;
    match segment {
        Segment::Vxlan(vxlan) => create_vxlan(config, namespace, *vxlan, mtu).await,
        Segment::Uplink { physical_network, vlan_id } => {
            let known = config.physical_networks.get(physical_network);
            let interface = known.ok_or_else(|| ExecutorError::PhysicalNetwork(physical_network.clone()))?;
            let alias = segment.alias().unwrap_or_default();
            create_uplink(config, namespace, network, (interface, *vlan_id), (&alias, mtu)).await
        }
    }
}

/// The socket stays in the host's namespace, in which the request is made.
async fn create_vxlan(
    config: &Config,
    namespace: &str,
    vxlan: VxlanLink,
    mtu: u16,
) -> Result<(), ExecutorError> {
    let file = namespace::open(namespace)?;
    let local = match vxlan.local {
        std::net::IpAddr::V4(ip) => InfoVxlan::Local(ip),
        std::net::IpAddr::V6(ip) => InfoVxlan::Local6(ip),
    };
    let message = LinkVxlan::new(VXLAN, vxlan.vni)
        .port(vxlan.port)
        .append_info_data(local)
        .append_info_data(InfoVxlan::Learning(false))
        .mtu(mtu.into())
        .setns_by_fd(file.as_raw_fd())
        .build();
    host(config).await?.add_link(VXLAN, message).await
}

/// From a bridge a pair of links, from an interface a link upon it, which takes all of it if untagged.
async fn create_uplink(
    config: &Config,
    namespace: &str,
    network: NetworkKey,
    (interface, vlan_id): (&str, Option<u16>),
    (alias, mtu): (&str, u16),
) -> Result<(), ExecutorError> {
    let file = namespace::open(namespace)?;
    let fd = file.as_raw_fd();
    let host = host(config).await?;
    let index = host.index(interface).await?;
    let is_bridge =
        host.links().await?.iter().any(|link| link.name == interface && link.kind == LinkKind::Bridge);
    let message = match vlan_id {
        Some(id) => LinkVlan::new(UPLINK, index, id).mtu(mtu.into()).setns_by_fd(fd).build(),
        None if is_bridge => {
            let name = format!("up{network}");
            host.delete_link(&name).await?;
            let peer = LinkUnspec::new_with_name(UPLINK).mtu(mtu.into()).setns_by_fd(fd).build();
            LinkMessageBuilder::<LinkVeth>::new(&name, UPLINK)
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                .mtu(mtu.into())
                .controller(index)
                .up()
                .build()
        }
        None => {
            LinkMacVlan::new(UPLINK, index, MacVlanMode::Passthrough).mtu(mtu.into()).setns_by_fd(fd).build()
        }
    };
    host.add_link(&format!("an uplink to {interface}"), message).await?;
    Netlink::connect(namespace).await?.set_alias(UPLINK, alias).await
}
