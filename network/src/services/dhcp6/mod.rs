//! The DHCPv6 server of one network: a task with one socket in its namespace.

pub mod message;

use std::{
    io,
    net::{SocketAddr, SocketAddrV6, UdpSocket as StdUdpSocket},
    sync::Arc,
    time::Duration,
};

use tokio::{net::UdpSocket, sync::watch};

use super::{
    datagrams::{Answered, Service},
    directory::Directory,
};
use crate::names::{MacAddress, NetworkKey};
pub use message::LeaseV6;

const CLIENT_PORT: u16 = 546;
/// Longest message that is read, in bytes; what is longer is cut, and so malformed.
const REQUEST_MAX: usize = 1500;
/// Length of the pause in a flood.
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
    let server = message::server_id(bridge);
    let service = Service { network, name: "DHCPv6", longest: REQUEST_MAX, pause: PAUSE };
    let answer = move |socket: &UdpSocket, directory: &Directory, request: &[u8], from| {
        let SocketAddr::V6(from) = from else { return Answered::Ignored("it came by IPv4".to_owned()) };
        match message::respond(&directory.leases_v6, &server, *from.ip(), request) {
            Ok(reply) => {
                // RFC 8415 §7.2: clients listen there, wherever they send from.
                let to = SocketAddrV6::new(*from.ip(), CLIENT_PORT, 0, from.scope_id());
                match socket.try_send_to(&reply, to.into()) {
                    Ok(_) => Answered::Yes,
                    Err(error) => Answered::Warn(format!("cannot send to {to}: {error}")),
                }
            }
            Err(ignored) => Answered::Ignored(ignored.to_string()),
        }
    };
    service.serve(socket, directory, answer).await
}
