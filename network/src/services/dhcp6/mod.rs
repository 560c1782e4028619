//! The DHCPv6 server of one network: a task with one socket in its namespace.

pub mod message;

use std::{
    io,
    net::{SocketAddr, SocketAddrV6, UdpSocket as StdUdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::UdpSocket, sync::watch};
use tracing::{debug, warn};

use super::{directory::Directory, log_limit::LogLimit};
use crate::names::{MacAddress, NetworkKey};
pub use message::LeaseV6;

const CLIENT_PORT: u16 = 546;
/// Longest message that is read, in bytes; what is longer is cut, and so malformed.
const REQUEST_MAX: usize = 1500;
/// Messages that are answered without a pause.
const BURST: u32 = 64;
/// Length of the pause. A flood beyond 64 messages in this time waits in the socket's buffer and overflows there.
const PAUSE: Duration = Duration::from_millis(10);

/// Serves until the sender of `directory` is dropped. `socket`: port 547 of the bridge, a member of ff02::1:2.
pub(super) async fn serve(
    network: NetworkKey,
    bridge: MacAddress,
    socket: Option<StdUdpSocket>,
    mut directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let Some(socket) = socket else {
        // Without IPv6 nobody asks.
        while directory.changed().await.is_ok() {}
        return Ok(());
    };
    let socket = UdpSocket::from_std(socket)?;
    let server = message::server_id(bridge);
    let mut limit = LogLimit::default();
    let mut buffer = [0; REQUEST_MAX];
    let mut burst = 0;
    loop {
        let (length, from) = tokio::select! {
            biased;
            changed = directory.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Ok(()),
            },
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(error) => {
                    log(&mut limit, network, &format!("cannot receive: {error}"));
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        if let SocketAddr::V6(from) = from {
            let answer =
                message::respond(&directory.borrow().leases_v6, &server, *from.ip(), &buffer[..length]);
            match answer {
                Ok(reply) => {
                    // RFC 8415 §7.2: clients listen there, wherever they send from.
                    let to = SocketAddrV6::new(*from.ip(), CLIENT_PORT, 0, from.scope_id());
                    if let Err(error) = socket.try_send_to(&reply, to.into()) {
                        log(&mut limit, network, &format!("cannot send to {to}: {error}"));
                    }
                }
                Err(ignored) => debug!(%network, "DHCPv6 message ignored: {ignored}"),
            }
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
        warn!(%network, suppressed, "DHCPv6: {text}");
    }
}
