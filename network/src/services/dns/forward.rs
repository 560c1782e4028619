//! Asks the resolvers that the host's operator named, for guests.
//!
//! Only these: what a tenant writes into a subnet's `dns_nameservers` is told to guests, who reach it or not by their own
//! routers, and never asked from the host's network.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::message::{Query, Transport};
use crate::{Config, namespace};

const DNS_PORT: u16 = 53;
/// Questions of all networks that wait for answers at a time.
const WAITING_MAX: usize = 512;
/// How long one resolver gets.
const PATIENCE: Duration = Duration::from_secs(2);
/// Resolvers that are asked one after another.
const RESOLVERS_MAX: usize = 3;
/// Datagrams that are no answer, before a resolver is given up.
const STRAYS_MAX: usize = 16;

/// The way to other resolvers, shared by all networks.
#[derive(Debug)]
pub(in crate::services) struct Forwarder {
    resolvers: Vec<SocketAddr>,
    host_namespace: Option<String>,
    waiting: Arc<Semaphore>,
}

impl Forwarder {
    pub(in crate::services) fn new(config: &Config) -> Self {
        let resolvers = config.dns_forwarders.iter().take(RESOLVERS_MAX);
        Self {
            resolvers: resolvers.map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect(),
            host_namespace: config.host_namespace.clone(),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
        }
    }

    /// Whether there is anybody to ask.
    pub(super) fn exists(&self) -> bool {
        !self.resolvers.is_empty()
    }

    /// A place among the questions that wait; none when all are taken.
    pub(super) fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.waiting.clone().try_acquire_owned().ok()
    }

    /// The answer for the client, if any resolver gives one.
    pub(super) async fn ask(&self, query: &Query, transport: Transport) -> Option<Vec<u8>> {
        for resolver in &self.resolvers {
            let answer = timeout(PATIENCE, async {
                match transport {
                    Transport::Udp => self.ask_by_datagram(query, *resolver).await,
                    Transport::Tcp => self.ask_by_stream(query, *resolver).await,
                }
            });
            if let Ok(Ok(Some(answer))) = answer.await {
                return Some(answer);
            }
        }
        None
    }

    async fn ask_by_datagram(&self, query: &Query, resolver: SocketAddr) -> io::Result<Option<Vec<u8>>> {
        // A port of its own for each question, chosen by the kernel at random, beside the random id (RFC 5452).
        let socket = self.in_host(move || std::net::UdpSocket::bind(any(resolver))).await?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        socket.connect(resolver).await?;
        let id = random_id()?;
        socket.send(&query.with_id(id)).await?;
        let mut buffer = vec![0; u16::MAX.into()];
        for _ in 0..STRAYS_MAX {
            let length = socket.recv(&mut buffer).await?;
            if let Some(answer) = query.accept(id, &buffer[..length]) {
                return Ok(Some(answer));
            }
        }
        Ok(None)
    }

    async fn ask_by_stream(&self, query: &Query, resolver: SocketAddr) -> io::Result<Option<Vec<u8>>> {
        let socket = self
            .in_host(move || if resolver.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })
            .await?;
        let mut stream = socket.connect(resolver).await?;
        let id = random_id()?;
        write(&mut stream, &query.with_id(id)).await?;
        Ok(query.accept(id, &read(&mut stream).await?))
    }

    /// Makes a socket in the host's own network.
    async fn in_host<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match &self.host_namespace {
            None => make(),
            Some(name) => namespace::run_in(name, make).await.map_err(io::Error::other)?,
        }
    }
}

fn any(of: SocketAddr) -> SocketAddr {
    let ip = if of.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    SocketAddr::new(ip, 0)
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u16::from_be_bytes(bytes))
}

/// Writes a message to a stream (RFC 1035 §4.2.2).
pub(super) async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

/// Reads a message from a stream.
pub(super) async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}
