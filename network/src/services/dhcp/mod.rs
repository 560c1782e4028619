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
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, send};
use tokio::{net::UdpSocket, sync::watch};
use tracing::{debug, warn};

use super::{directory::Directory, log_limit::LogLimit};
use crate::names::{MacAddress, NetworkKey};
use frame::Endpoint;
pub use message::Lease;
use message::{Ignored, Reply};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Longest request that is read, in bytes; what is longer is cut, and so malformed.
const REQUEST_MAX: usize = 2048;
/// Requests that are answered without a pause.
const BURST: u32 = 64;
/// Length of the pause. A flood beyond 64 requests in this time waits in the socket's buffer and overflows there.
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
    mut directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let requests = UdpSocket::from_std(sockets.requests)?;
    let mut limit = LogLimit::default();
    let mut buffer = [0; REQUEST_MAX];
    let mut burst = 0;
    loop {
        let length = tokio::select! {
            biased;
            changed = directory.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Ok(()),
            },
            received = requests.recv_from(&mut buffer) => match received {
                Ok((length, _)) => length,
                Err(error) => {
                    // The bridge is down or gone; the next update starts the service anew.
                    log(&mut limit, network, &format!("cannot receive: {error}"));
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let answer = message::respond(&directory.borrow().leases, &buffer[..length]);
        match answer {
            Ok(reply) => {
                if let Err(error) = send_reply(&sockets.replies, bridge, &reply) {
                    log(&mut limit, network, &format!("cannot send to {}: {error}", reply.mac));
                }
            }
            Err(declined @ Ignored::Declined(..)) => log(&mut limit, network, &declined.to_string()),
            Err(ignored) => debug!(%network, "DHCP request ignored: {ignored}"),
        }
        burst += 1;
        if burst == BURST {
            burst = 0;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn log(limit: &mut LogLimit, network: NetworkKey, text: &str) {
    if let Some(suppressed) = limit.admit(Instant::now()) {
        warn!(%network, suppressed, "DHCP: {text}");
    }
}

fn send_reply(socket: &OwnedFd, bridge: MacAddress, reply: &Reply) -> io::Result<()> {
    let from = Endpoint { mac: bridge, ip: reply.server, port: SERVER_PORT };
    let to = Endpoint { mac: reply.mac, ip: reply.ip, port: CLIENT_PORT };
    let frame = frame::udp_frame(from, to, &reply.payload).ok_or(io::ErrorKind::InvalidData)?;
    // Not blocking: when the device's queue is full, the client asks again.
    send(socket.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}
