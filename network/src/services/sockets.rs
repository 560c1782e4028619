//! Makes the services' sockets; runs on a thread inside the namespace. One of the few places with unsafe code: bind(2)
//! of a packet socket.

use std::{
    ffi::OsString,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrStorage, bind, listen,
        setsockopt, socket,
        sockopt::{BindToDevice, Ipv4PacketInfo, Ipv6V6Only, ReuseAddr},
    },
};

use super::{advert, dhcp, dns};
use crate::names::{BRIDGE, METADATA_IP, METADATA_IP_V6};

const DHCP_PORT: u16 = 67;
const DHCP6_PORT: u16 = 547;
const DNS_PORT: u16 = 53;
const METADATA_PORT: u16 = 80;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Everything that one network's services need.
pub(super) struct ServiceSockets {
    /// Index of the bridge that they are bound to.
    pub(super) bridge: u32,
    /// DHCP.
    pub(super) dhcp: dhcp::Sockets,
    /// DHCPv6.
    pub(super) dhcp6: Option<UdpSocket>,
    /// Metadata, one for each version of IP that there is.
    pub(super) metadata: Vec<TcpListener>,
    /// Router advertisements.
    pub(super) advert: advert::Sockets,
    /// DNS.
    pub(super) dns: dns::Sockets,
}

/// Whether this kernel has IPv6.
fn kernel_has_v6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Opens all sockets in the calling thread's namespace; `v6`: those for IPv6, too.
pub(super) fn open(v6: bool) -> io::Result<ServiceSockets> {
    let v6 = v6 && kernel_has_v6();
    let bridge = if_nametoindex(BRIDGE)?;
    let requests = open_dhcp()?;
    let replies = open_packet(bridge)?;
    let mut metadata = vec![TcpListener::bind(SocketAddrV4::new(METADATA_IP, METADATA_PORT))?];
    if v6 {
        metadata.push(TcpListener::bind(SocketAddrV6::new(METADATA_IP_V6, METADATA_PORT, 0, bridge))?);
    }
    metadata.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    let dhcp6 = v6.then(|| open_dhcp6(bridge)).transpose()?;
    // Without IPv6 (a small MTU, a kernel without it) there is nobody who could ask.
    let solicitations = v6.then(|| open_solicitations(bridge)).transpose()?;
    let advert = advert::Sockets { solicitations, adverts: open_packet(bridge)? };
    let dns = open_dns(v6.then_some(bridge))?;
    Ok(ServiceSockets { bridge, dhcp: dhcp::Sockets { requests, replies }, dhcp6, metadata, advert, dns })
}

/// The resolver's; `v6`: the bridge's index, if it has IPv6.
fn open_dns(v6: Option<u32>) -> io::Result<dns::Sockets> {
    let mut addresses: Vec<SocketAddr> = vec![SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, DNS_PORT).into()];
    addresses
        .extend(v6.map(|bridge| SocketAddr::from(SocketAddrV6::new(METADATA_IP_V6, DNS_PORT, 0, bridge))));
    let mut sockets = dns::Sockets { datagrams: Vec::new(), listeners: Vec::new() };
    for address in addresses {
        let datagrams = open_bound(SockType::Datagram, address)?;
        if address.is_ipv4() {
            setsockopt(&datagrams, Ipv4PacketInfo, &true)?;
        }
        sockets.datagrams.push(datagrams.into());
        let listener = open_bound(SockType::Stream, address)?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        sockets.listeners.push(listener.into());
    }
    Ok(sockets)
}

/// A socket at an address of the bridge, and reached from there only.
fn open_bound(kind: SockType, address: SocketAddr) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, flags, None)?;
    setsockopt(&fd, BindToDevice, &OsString::from(BRIDGE))?;
    if kind == SockType::Stream {
        // What a former process has left in TIME_WAIT doesn't matter.
        setsockopt(&fd, ReuseAddr, &true)?;
    }
    if address.is_ipv6() {
        setsockopt(&fd, Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd)
}

/// Gets what is sent to all routers.
fn open_solicitations(bridge: u32) -> io::Result<UdpSocket> {
    const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?;
    setsockopt(&fd, BindToDevice, &OsString::from(BRIDGE))?;
    let socket = UdpSocket::from(fd);
    socket.join_multicast_v6(&ALL_ROUTERS, bridge)?;
    Ok(socket)
}

/// Gets what is sent to all DHCPv6 servers.
fn open_dhcp6(bridge: u32) -> io::Result<UdpSocket> {
    const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, DHCP6_PORT, 0, 0);
    let socket = UdpSocket::from(open_bound(SockType::Datagram, any.into())?);
    socket.join_multicast_v6(&ALL_SERVERS, bridge)?;
    Ok(socket)
}

fn open_dhcp() -> io::Result<UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    setsockopt(&fd, BindToDevice, &OsString::from(BRIDGE))?;
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, DHCP_PORT)))?;
    Ok(fd.into())
}

/// A packet socket that sends on the bridge and receives nothing (its protocol is 0).
fn open_packet(bridge: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    let ifindex = libc::c_int::try_from(bridge).map_err(io::Error::other)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `fd` is an open socket; the pointer is that of a live, fully initialised sockaddr_ll whose size is the
    // length that is passed, and the kernel only reads it during the call.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    if result == 0 { Ok(fd) } else { Err(io::Error::last_os_error()) }
}
