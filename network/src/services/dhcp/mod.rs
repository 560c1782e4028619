//! The DHCP server of one network: a task with two sockets in its namespace.
//!
//! Requests come in by a UDP socket. Replies go out as whole Ethernet frames by a packet socket, since a client that has
//! no address yet can't be reached by the host's IP stack.

mod frame;
pub mod message;

use std::{
    io,
    net::UdpSocket as StdUdpSocket,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{MsgFlags, send};
use tokio::{net::UdpSocket, sync::watch};

use super::{
    datagrams::{Answered, Service},
    directory::Directory,
};
use crate::names::{MacAddress, NetworkKey};
use frame::Endpoint;
pub use message::Lease;
use message::{Ignored, Reply};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Longest request that is read, in bytes; what is longer is cut, and so malformed.
const REQUEST_MAX: usize = 2048;
/// Length of the pause in a flood.
const PAUSE: Duration = Duration::from_millis(10);

/// The server's sockets, made inside the namespace.
pub(super) struct Sockets {
    /// Port 67 on the bridge.
    pub(super) requests: StdUdpSocket,
    /// Packet socket on the bridge.
    pub(super) replies: OwnedFd,
}

/// Serves until the sender of `directory` is dropped.
pub(super) async fn serve(
    network: NetworkKey,
    bridge: MacAddress,
    sockets: Sockets,
    directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let Sockets { requests, replies } = sockets;
    let service = Service { network, name: "DHCP", longest: REQUEST_MAX, pause: PAUSE };
    let answer = move |_: &UdpSocket, directory: &Directory, request: &[u8], _| match message::respond(
        &directory.leases,
        request,
    ) {
        Ok(reply) => match send_reply(&replies, bridge, &reply) {
            Ok(()) => Answered::Yes,
            Err(error) => Answered::Warn(format!("cannot send to {}: {error}", reply.mac)),
        },
        Err(declined @ Ignored::Declined(..)) => Answered::Warn(declined.to_string()),
        Err(ignored) => Answered::Ignored(ignored.to_string()),
    };
    service.serve(requests, directory, answer).await
}

fn send_reply(socket: &OwnedFd, bridge: MacAddress, reply: &Reply) -> io::Result<()> {
    let from = Endpoint { mac: bridge, ip: reply.server, port: SERVER_PORT };
    let to = Endpoint { mac: reply.mac, ip: reply.ip, port: CLIENT_PORT };
    let frame = frame::udp_frame(from, to, &reply.payload).ok_or(io::ErrorKind::InvalidData)?;
    // Not blocking: when the device's queue is full, the client asks again.
    send(socket.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}
