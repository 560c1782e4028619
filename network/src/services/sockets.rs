//! Makes the services' sockets; runs on a thread inside the namespace. One of the few places with unsafe code: bind(2)
//! of a packet socket.

use std::{
    ffi::OsString,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, bind, setsockopt, socket,
        sockopt::BindToDevice,
    },
};

use super::{advert, dhcp};
use crate::names::{BRIDGE, METADATA_IP};

const DHCP_PORT: u16 = 67;
const METADATA_PORT: u16 = 80;

/// Everything that one network's services need.
pub(super) struct ServiceSockets {
    /// Index of the bridge that they are bound to.
    pub(super) bridge: u32,
    /// DHCP.
    pub(super) dhcp: dhcp::Sockets,
    /// Metadata.
    pub(super) metadata: TcpListener,
    /// Router advertisements.
    pub(super) advert: advert::Sockets,
}

/// Opens all sockets in the calling thread's namespace.
pub(super) fn open() -> io::Result<ServiceSockets> {
    let bridge = if_nametoindex(BRIDGE)?;
    let requests = open_dhcp()?;
    let replies = open_packet(bridge)?;
    let metadata = TcpListener::bind(SocketAddrV4::new(METADATA_IP, METADATA_PORT))?;
    metadata.set_nonblocking(true)?;
    // Without IPv6 (a small MTU, a kernel without it) there is nobody who could ask.
    let solicitations = open_solicitations(bridge).ok();
    let advert = advert::Sockets { solicitations, adverts: open_packet(bridge)? };
    Ok(ServiceSockets { bridge, dhcp: dhcp::Sockets { requests, replies }, metadata, advert })
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
