//! The loop of a service that answers datagrams.

use std::{
    io,
    net::{SocketAddr, UdpSocket as StdUdpSocket},
    sync::Arc,
    time::Duration,
};

use tokio::{net::UdpSocket, sync::watch};
use tracing::debug;

use super::{directory::Directory, log_limit::LogLimit};
use crate::names::NetworkKey;

/// Requests that are answered without a pause.
const BURST: u32 = 64;

/// Pauses after each [`BURST`] requests: a flood beyond waits in the socket's buffer and overflows there.
pub(super) struct Pace {
    pause: Duration,
    answered: u32,
}

impl Pace {
    pub(super) fn new(pause: Duration) -> Self {
        Self { pause, answered: 0 }
    }

    /// After a request.
    pub(super) async fn answered(&mut self) {
        self.answered += 1;
        if self.answered == BURST {
            self.rest().await;
        }
    }

    /// Pauses now.
    pub(super) async fn rest(&mut self) {
        self.answered = 0;
        tokio::time::sleep(self.pause).await;
    }
}

/// What came of a datagram.
pub(super) enum Answered {
    /// It was answered.
    Yes,
    /// It was ignored, as many are.
    Ignored(String),
    /// It was answered with a refusal, or couldn't be answered.
    Warn(String),
}

/// One service of a network.
pub(super) struct Service {
    pub(super) network: NetworkKey,
    pub(super) name: &'static str,
    /// Longest datagram that is read, in bytes; what is longer is cut, and so malformed.
    pub(super) longest: usize,
    pub(super) pause: Duration,
}

impl Service {
    /// Serves until the sender of `directory` is dropped.
    pub(super) async fn serve(
        self,
        socket: StdUdpSocket,
        mut directory: watch::Receiver<Arc<Directory>>,
        mut answer: impl FnMut(&UdpSocket, &Directory, &[u8], SocketAddr) -> Answered,
    ) -> io::Result<()> {
        let socket = UdpSocket::from_std(socket)?;
        let (mut limit, mut pace) = (LogLimit::default(), Pace::new(self.pause));
        let mut buffer = vec![0; self.longest];
        loop {
            let received = tokio::select! {
                biased;
                changed = directory.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Ok(()),
                },
                received = socket.recv_from(&mut buffer) => received,
            };
            let (length, from) = match received {
                Ok(received) => received,
                Err(error) => {
                    // The bridge is down or gone; the next update starts the service anew.
                    limit.warn(self.network, self.name, &format!("cannot receive: {error}"));
                    pace.rest().await;
                    continue;
                }
            };
            let answered = answer(&socket, &directory.borrow(), &buffer[..length], from);
            match answered {
                Answered::Yes => {}
                Answered::Ignored(why) => debug!(network = %self.network, "{}: ignored: {why}", self.name),
                Answered::Warn(why) => limit.warn(self.network, self.name, &why),
            }
            pace.answered().await;
        }
    }
}
