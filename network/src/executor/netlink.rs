//! A route netlink socket in a namespace, and the operations on it. Each is repeatable.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::AddressHeaderFlags,
    link::{InfoBridge, LinkMessage},
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage,
        NeighbourState,
    },
};
use rtnetlink::{
    AddressMessageBuilder, Error, Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec,
};
use tokio::{runtime, task::JoinHandle};

use super::{ExecutorError, observe};
use crate::{
    names::{BRIDGE, MacAddress, VXLAN},
    namespace,
    observed::{ObservedLink, PortFlags},
};

/// An open socket; closed on drop.
pub(super) struct Netlink {
    namespace: String,
    pub(super) handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether the kernel answered with this error number.
fn is_errno(error: &Error, errno: i32) -> bool {
    matches!(error, Error::NetlinkError(message) if message.raw_code() == -errno)
}

fn as_io(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => io::Error::from_raw_os_error(message.raw_code().saturating_neg()),
        other => io::Error::other(other),
    }
}

/// The errors that mean that it was done before.
pub(super) fn unless(result: Result<(), Error>, done_before: &[i32]) -> Result<(), Error> {
    match result {
        Err(error) if done_before.iter().any(|errno| is_errno(&error, *errno)) => Ok(()),
        other => other,
    }
}

fn flagged(
    builder: LinkMessageBuilder<LinkBridgePort>,
    flags: PortFlags,
) -> LinkMessageBuilder<LinkBridgePort> {
    builder
        .learning(flags.learning)
        .flood(flags.flood)
        .hairpin(flags.hairpin)
        .bcast_flood(flags.broadcast)
        .mcast_flood(flags.broadcast)
        .neigh_suppress(flags.suppress)
}

impl Netlink {
    pub(super) async fn connect(namespace: &str) -> Result<Self, ExecutorError> {
        let runtime = runtime::Handle::current();
        let connected = namespace::run_in(namespace, move || {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        });
        let (connection, handle, _unsolicited) = connected
            .await?
            .map_err(|source| ExecutorError::Connect { namespace: namespace.to_owned(), source })?;
        Ok(Self { namespace: namespace.to_owned(), handle, task: tokio::spawn(connection) })
    }

    pub(super) fn failed(&self, operation: impl Into<String>) -> impl FnOnce(Error) -> ExecutorError {
        let (namespace, operation) = (self.namespace.clone(), operation.into());
        move |error| ExecutorError::Netlink { namespace, operation, source: as_io(error) }
    }

    fn no_link(&self, link: &str) -> ExecutorError {
        ExecutorError::NoLink { namespace: self.namespace.clone(), link: link.to_owned() }
    }

    async fn find(&self, link: &str) -> Result<Option<u32>, ExecutorError> {
        match self.handle.link().get().match_name(link).execute().try_next().await {
            Ok(message) => Ok(message.map(|message| message.header.index)),
            Err(error) if is_errno(&error, libc::ENODEV) => Ok(None),
            Err(error) => Err(self.failed(format!("look up link {link}"))(error)),
        }
    }

    pub(super) async fn index(&self, link: &str) -> Result<u32, ExecutorError> {
        self.find(link).await?.ok_or_else(|| self.no_link(link))
    }

    pub(super) async fn links(&self) -> Result<Vec<ObservedLink>, ExecutorError> {
        observe::links(self).await
    }

    pub(super) async fn create_bridge(&self, mac: MacAddress, mtu: u16) -> Result<(), ExecutorError> {
        // Snooping off: without a querier on the network it only loses multicast.
        let bridge = LinkMessageBuilder::<LinkBridge>::new(BRIDGE)
            .append_info_data(InfoBridge::MulticastSnooping(false))
            .address(mac.0.to_vec())
            .mtu(mtu.into())
            .build();
        let created = self.handle.link().add(bridge).execute().await;
        match created {
            Err(error) if is_errno(&error, libc::EEXIST) => {
                self.set_mac(BRIDGE, mac).await?;
                self.set_mtu(BRIDGE, mtu).await
            }
            other => other.map_err(self.failed("create the bridge")),
        }
    }

    pub(super) async fn delete_link(&self, link: &str) -> Result<(), ExecutorError> {
        let Some(index) = self.find(link).await? else { return Ok(()) };
        let deleted = self.handle.link().del(index).execute().await;
        unless(deleted, &[libc::ENODEV]).map_err(self.failed(format!("delete link {link}")))
    }

    async fn change(&self, link: &str, operation: &str, message: LinkMessage) -> Result<(), ExecutorError> {
        match self.handle.link().change(message).execute().await {
            Err(error) if is_errno(&error, libc::ENODEV) => Err(self.no_link(link)),
            other => other.map_err(self.failed(format!("{operation} {link}"))),
        }
    }

    pub(super) async fn set_up(&self, link: &str) -> Result<(), ExecutorError> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).up().build();
        self.change(link, "set up", message).await
    }

    pub(super) async fn set_mtu(&self, link: &str, mtu: u16) -> Result<(), ExecutorError> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).mtu(mtu.into()).build();
        self.change(link, "set the MTU of", message).await
    }

    pub(super) async fn set_mac(&self, link: &str, mac: MacAddress) -> Result<(), ExecutorError> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).address(mac.0.to_vec()).build();
        self.change(link, "set the Ethernet address of", message).await
    }

    pub(super) async fn set_alias(&self, link: &str, alias: &str) -> Result<(), ExecutorError> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).alias(alias).build();
        self.change(link, "set the alias of", message).await
    }

    pub(super) async fn attach(&self, link: &str, bridge: u32) -> Result<(), ExecutorError> {
        let message = LinkUnspec::new_with_index(self.index(link).await?).controller(bridge).build();
        self.change(link, "attach to the bridge", message).await
    }

    pub(super) async fn set_port_flags(&self, link: &str, flags: PortFlags) -> Result<(), ExecutorError> {
        let message = flagged(LinkBridgePort::new(self.index(link).await?), flags).build();
        self.change(link, "set port flags of", message).await
    }

    /// All that makes a new link a guest's port, in as few requests as the order allows: nothing passes before the flags
    /// and the station are set.
    pub(super) async fn wire(
        &self,
        link: &str,
        bridge: u32,
        mtu: u16,
        mac: MacAddress,
    ) -> Result<(), ExecutorError> {
        let index = self.index(link).await?;
        let message = LinkUnspec::new_with_index(index).mtu(mtu.into()).controller(bridge).build();
        self.change(link, "attach to the bridge", message).await?;
        self.add_station_at(link, index, mac).await?;
        // The kernel sets the flags before it sets the link up.
        let message = flagged(LinkBridgePort::new(index), PortFlags::GUEST).up().build();
        self.change(link, "set port flags of and set up", message).await
    }

    pub(super) async fn add_address(&self, address: IpNet) -> Result<(), ExecutorError> {
        self.add_address_to(BRIDGE, address).await
    }

    pub(super) async fn add_address_to(&self, link: &str, address: IpNet) -> Result<(), ExecutorError> {
        let index = self.index(link).await?;
        let mut request = self.handle.address().add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Usable at once: sockets are bound to it next, and nobody else may have it.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        let added = request.execute().await;
        unless(added, &[libc::EEXIST]).map_err(self.failed(format!("add address {address}")))
    }

    pub(super) async fn delete_address(&self, address: IpNet) -> Result<(), ExecutorError> {
        self.delete_address_of(BRIDGE, address).await
    }

    pub(super) async fn delete_address_of(&self, link: &str, address: IpNet) -> Result<(), ExecutorError> {
        let Some(index) = self.find(link).await? else { return Ok(()) };
        let message = match address {
            IpNet::V4(address) => AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(address.addr(), address.prefix_len())
                .build(),
            IpNet::V6(address) => AddressMessageBuilder::<Ipv6Addr>::new()
                .index(index)
                .address(address.addr(), address.prefix_len())
                .build(),
        };
        let deleted = self.handle.address().del(message).execute().await;
        unless(deleted, &[libc::EADDRNOTAVAIL, libc::ENODEV])
            .map_err(self.failed(format!("delete address {address}")))
    }

    pub(super) async fn set_neighbour(&self, ip: IpAddr, mac: MacAddress) -> Result<(), ExecutorError> {
        self.set_neighbour_of(BRIDGE, ip, mac).await
    }

    pub(super) async fn set_neighbour_of(
        &self,
        link: &str,
        ip: IpAddr,
        mac: MacAddress,
    ) -> Result<(), ExecutorError> {
        let index = self.index(link).await?;
        let request = self.handle.neighbours().add(index, ip).link_layer_address(&mac.0);
        request.replace().execute().await.map_err(self.failed(format!("set neighbour {ip}")))
    }

    pub(super) async fn delete_neighbour(&self, ip: IpAddr) -> Result<(), ExecutorError> {
        self.delete_neighbour_of(BRIDGE, ip).await
    }

    pub(super) async fn delete_neighbour_of(&self, link: &str, ip: IpAddr) -> Result<(), ExecutorError> {
        let Some(index) = self.find(link).await? else { return Ok(()) };
        let mut message = NeighbourMessage::default();
        let (family, address) = match ip {
            IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
            IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
        };
        message.header = NeighbourHeader { family, ifindex: index, ..Default::default() };
        message.attributes = vec![NeighbourAttribute::Destination(address)];
        let deleted = self.handle.neighbours().del(message).execute().await;
        unless(deleted, &[libc::ENOENT, libc::ENODEV]).map_err(self.failed(format!("delete neighbour {ip}")))
    }

    /// Where the VXLAN link sends what is for an Ethernet address (`bridge fdb replace … self dst`).
    pub(super) async fn set_tunnel(&self, mac: MacAddress, host: IpAddr) -> Result<(), ExecutorError> {
        let index = self.index(VXLAN).await?;
        let request = self.handle.neighbours().add_bridge(index, &mac.0);
        let request = request.state(NeighbourState::Permanent).flags(NeighbourFlags::Own).destination(host);
        request.replace().execute().await.map_err(self.failed(format!("set the tunnel for {mac}")))
    }

    pub(super) async fn delete_tunnel(&self, mac: MacAddress) -> Result<(), ExecutorError> {
        let Some(index) = self.find(VXLAN).await? else { return Ok(()) };
        let mut message = NeighbourMessage::default();
        message.header = NeighbourHeader {
            family: AddressFamily::Bridge,
            ifindex: index,
            flags: NeighbourFlags::Own,
            ..Default::default()
        };
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
        let deleted = self.handle.neighbours().del(message).execute().await;
        unless(deleted, &[libc::ENOENT, libc::ENODEV])
            .map_err(self.failed(format!("delete the tunnel for {mac}")))
    }

    /// Makes a link from this namespace in another one, or with an end there.
    pub(super) async fn add_link(&self, what: &str, message: LinkMessage) -> Result<(), ExecutorError> {
        self.handle.link().add(message).execute().await.map_err(self.failed(format!("create {what}")))
    }

    /// In the namespace of this process.
    pub(super) fn own() -> Result<Self, ExecutorError> {
        let namespace = "of the host".to_owned();
        let (connection, handle, _unsolicited) = rtnetlink::new_connection()
            .map_err(|source| ExecutorError::Connect { namespace: namespace.clone(), source })?;
        Ok(Self { namespace, handle, task: tokio::spawn(connection) })
    }

    /// A static entry of the bridge's forwarding table (`bridge fdb add … master static`).
    pub(super) async fn add_station(&self, link: &str, mac: MacAddress) -> Result<(), ExecutorError> {
        self.add_station_at(link, self.index(link).await?, mac).await
    }

    async fn add_station_at(&self, link: &str, index: u32, mac: MacAddress) -> Result<(), ExecutorError> {
        let request = self.handle.neighbours().add_bridge(index, &mac.0);
        // Sticky: else a frame from a physical network, where the bridge learns, would take even a static entry along.
        let flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
        let request = request.state(NeighbourState::Noarp).flags(flags).replace();
        request.execute().await.map_err(self.failed(format!("add station {mac} behind {link}")))
    }

    pub(super) async fn delete_station(&self, link: &str, mac: MacAddress) -> Result<(), ExecutorError> {
        let Some(index) = self.find(link).await? else { return Ok(()) };
        let mut message = NeighbourMessage::default();
        message.header = NeighbourHeader {
            family: AddressFamily::Bridge,
            ifindex: index,
            flags: NeighbourFlags::Controller,
            ..Default::default()
        };
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
        let deleted = self.handle.neighbours().del(message).execute().await;
        unless(deleted, &[libc::ENOENT, libc::ENODEV])
            .map_err(self.failed(format!("delete station {mac} behind {link}")))
    }
}
