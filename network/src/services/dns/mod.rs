//! The resolver of one network, on its service addresses and on fe80::a9fe:a9fe: names of the network's own servers, and
//! for other names what the host's resolvers say, where the operator has named any.
//!
//! Not an open one: it is reached from the network's bridge only, and on a physical network it answers the ports of this
//! host and nobody else. Nothing is kept of what other resolvers say, so there is no cache that could be poisoned.

mod forward;
pub mod message;
mod socket;
mod zone;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{self, JoinError, JoinSet},
    time::timeout,
};

use super::{any_of, datagrams::Pace, directory::Directory, log_limit::LogLimit};
use crate::names::NetworkKey;
pub(super) use forward::Forwarder;
use message::{Outcome, Query, Transport, respond};
use socket::{Datagrams, Exchange};
pub use zone::{Clients, DEFAULT_DOMAIN, Found, Zone};

/// Longest question that is read from a datagram, in bytes.
const QUESTION_MAX: usize = 1500;
/// Questions in flight to other resolvers and connections of one network at a time.
const TASKS_MAX: usize = 256;
/// The same of one client.
const TASKS_PER_CLIENT_MAX: usize = 32;
/// Length of the pause in a flood.
const PAUSE: Duration = Duration::from_millis(5);
/// Time for the next question on a connection (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Life of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// The sockets, made inside the namespace.
pub(super) struct Sockets {
    /// Port 53, one for each version of IP that there is.
    pub(super) datagrams: Vec<StdUdpSocket>,
    /// The same for connections.
    pub(super) listeners: Vec<StdTcpListener>,
}

/// Serves until the sender of `directory` is dropped; all its sockets are closed when this returns.
pub(super) async fn serve(
    network: NetworkKey,
    sockets: Sockets,
    forwarder: Arc<Forwarder>,
    mut directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let datagrams = sockets.datagrams.into_iter().map(|socket| Ok(Arc::new(Datagrams::new(socket)?)));
    let datagrams: Vec<_> = datagrams.collect::<io::Result<_>>()?;
    let listeners = sockets.listeners.into_iter().map(TcpListener::from_std);
    let listeners: Vec<_> = listeners.collect::<io::Result<_>>()?;
    let mut work =
        Work { forwarder, directory: directory.clone(), tasks: JoinSet::new(), clients: HashMap::new() };
    let (mut limit, mut pace) = (LogLimit::default(), Pace::new(PAUSE));
    let mut buffers = vec![[0; QUESTION_MAX]; datagrams.len()];
    loop {
        let question = any_of(datagrams.iter().zip(&mut buffers).map(|(socket, buffer)| {
            Box::pin(async move {
                let received = socket.receive(buffer).await;
                (socket, received.map(|(length, exchange)| (&buffer[..length], exchange)))
            })
        }));
        let connection = any_of(listeners.iter().map(|listener| Box::pin(listener.accept())));
        let failed = tokio::select! {
            biased;
            changed = directory.changed() => match changed {
                Ok(()) => continue,
                Err(_) => break,
            },
            Some(ended) = work.tasks.join_next_with_id() => {
                work.forget(&ended);
                continue;
            }
            (socket, received) = question => received.map(|(bytes, exchange)| work.answer(socket, bytes, exchange)),
            accepted = connection => accepted.map(|(stream, peer)| work.connection(stream, peer.ip())),
        };
        match failed {
            Ok(()) => pace.answered().await,
            Err(error) => {
                // The bridge is down or gone, or there are too many open files.
                limit.warn(network, "DNS", &format!("cannot receive: {error}"));
                pace.rest().await;
            }
        }
    }
    work.tasks.shutdown().await;
    Ok(())
}

/// What takes longer than a moment, counted by client.
struct Work {
    forwarder: Arc<Forwarder>,
    directory: watch::Receiver<Arc<Directory>>,
    tasks: JoinSet<()>,
    clients: HashMap<task::Id, IpAddr>,
}

impl Work {
    fn answer(&mut self, socket: &Arc<Datagrams>, bytes: &[u8], exchange: Exchange) {
        let directory = self.directory.borrow().clone();
        if !directory.dns_clients.allows(&exchange.client()) {
            return;
        }
        let outcome = respond(&directory.zone, bytes, Transport::Udp, self.forwarder.exists());
        let outcome = match outcome {
            Outcome::Forward(query) => match self.forward(socket, query, exchange) {
                Some(()) => return,
                None => message::servfail(bytes),
            },
            other => other,
        };
        if let Outcome::Answer(answer) = outcome {
            // What can't be sent is asked for again.
            let _ = socket.reply(exchange, &answer);
        }
    }

    /// None when too many wait already.
    fn forward(&mut self, socket: &Arc<Datagrams>, query: Query, exchange: Exchange) -> Option<()> {
        if !self.has_room(exchange.client()) {
            return None;
        }
        let permit = self.forwarder.permit()?;
        let (socket, forwarder) = (socket.clone(), self.forwarder.clone());
        let task = self.tasks.spawn(async move {
            let answer = forwarder.ask(&query, Transport::Udp).await.or_else(|| query.failed());
            if let Some(answer) = answer {
                let _ = socket.reply(exchange, &answer);
            }
            drop(permit);
        });
        self.clients.insert(task.id(), exchange.client());
        Some(())
    }

    fn connection(&mut self, stream: TcpStream, client: IpAddr) {
        if !self.has_room(client) || !self.directory.borrow().dns_clients.allows(&client) {
            return;
        }
        let (forwarder, directory) = (self.forwarder.clone(), self.directory.clone());
        let task = self.tasks.spawn(async move {
            // What goes wrong on a guest's connection is the guest's business.
            let _ = timeout(CONNECTION_TIMEOUT, serve_connection(stream, &forwarder, &directory)).await;
        });
        self.clients.insert(task.id(), client);
    }

    fn has_room(&self, client: IpAddr) -> bool {
        let of_client = self.clients.values().filter(|other| **other == client).count();
        self.clients.len() < TASKS_MAX && of_client < TASKS_PER_CLIENT_MAX
    }

    fn forget(&mut self, ended: &Result<(task::Id, ()), JoinError>) {
        let id = match ended {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        self.clients.remove(&id);
    }
}

async fn serve_connection(
    mut stream: TcpStream,
    forwarder: &Forwarder,
    directory: &watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    loop {
        let question = timeout(IDLE, forward::read(&mut stream)).await??;
        let zone = directory.borrow().zone.clone();
        let answer = match respond(&zone, &question, Transport::Tcp, forwarder.exists()) {
            Outcome::Ignore => return Ok(()),
            Outcome::Answer(answer) => Some(answer),
            Outcome::Forward(query) => match forwarder.permit() {
                Some(_permit) => forwarder.ask(&query, Transport::Tcp).await.or_else(|| query.failed()),
                None => query.failed(),
            },
        };
        let Some(answer) = answer else { return Ok(()) };
        timeout(IDLE, forward::write(&mut stream, &answer)).await??;
    }
}
