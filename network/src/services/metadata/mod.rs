//! The metadata service of one network: HTTP/1 on 169.254.169.254:80 and [fe80::a9fe:a9fe]:80 in its namespace.
//!
//! Who asks is known by the source address. It can be believed: the plan gives every port's address a permanent
//! neighbour entry and every port's Ethernet address a static forwarding entry, so that the answer to a connection with a
//! neighbour's address goes to the neighbour, and the handshake of an impostor never ends. Headers that name an asker
//! (X-Forwarded-For, X-Instance-ID) mean nothing here.

mod documents;
mod guest;

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::{IpAddr, TcpListener as StdTcpListener},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mote_host_api::ServerId;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{self, JoinSet},
};

use super::{any_of, directory::Directory, log_limit::LogLimit};
use crate::names::NetworkKey;
pub use documents::{Document, config_drive, lookup};
pub use guest::Guest;

/// Connections of one network at a time; more are closed at once.
const CONNECTIONS_MAX: usize = 256;
/// Connections of one guest at a time, whichever of its addresses they come from.
const CONNECTIONS_PER_GUEST_MAX: usize = 16;
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 * 1024;
/// Header fields of a request.
const HEADERS_MAX: usize = 64;
/// Time for a request's head, and for the next one on the same connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Life of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after accept(2) failed (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until the sender of `directory` is dropped; all connections are closed when this returns.
pub(super) async fn serve(
    network: NetworkKey,
    listeners: Vec<StdTcpListener>,
    mut directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let listeners: Vec<_> = listeners.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?;
    let mut connections = Connections::default();
    let mut limit = LogLimit::default();
    loop {
        tokio::select! {
            biased;
            changed = directory.changed() => if changed.is_err() { break },
            Some(ended) = connections.tasks.join_next_with_id() => connections.forget(&ended),
            accepted = any_of(listeners.iter().map(|listener| Box::pin(listener.accept()))) => match accepted {
                Ok((stream, peer)) => connections.start(stream, peer.ip(), &directory),
                Err(error) => {
                    limit.warn(network, "metadata", &format!("cannot accept: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    connections.tasks.shutdown().await;
    Ok(())
}

/// The connections of one network, counted by guest.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    guests: HashMap<task::Id, ServerId>,
}

impl Connections {
    /// Serves a connection of a known guest; any other is closed without a word.
    fn start(&mut self, stream: TcpStream, peer: IpAddr, directory: &watch::Receiver<Arc<Directory>>) {
        let guest = directory.borrow().guests.get(&peer).map(|guest| guest.metadata.uuid);
        let Some(guest) = guest else { return };
        let of_guest = self.guests.values().filter(|other| **other == guest).count();
        if self.guests.len() >= CONNECTIONS_MAX || of_guest >= CONNECTIONS_PER_GUEST_MAX {
            return;
        }
        let task = self.tasks.spawn(serve_connection(stream, peer, directory.clone()));
        self.guests.insert(task.id(), guest);
    }

    fn forget(&mut self, ended: &Result<(task::Id, ()), task::JoinError>) {
        let id = match ended {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        self.guests.remove(&id);
    }
}

async fn serve_connection(stream: TcpStream, guest: IpAddr, directory: watch::Receiver<Arc<Directory>>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(&directory.borrow(), guest, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong on a guest's connection is the guest's business.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
}

fn answer(directory: &Directory, guest: IpAddr, method: &Method, path: &str) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let document = directory.guests.get(&guest).and_then(|guest| lookup(guest, path));
    let Some(document) = document else { return plain(StatusCode::NOT_FOUND) };
    let mut response = Response::new(Full::from(document.body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(document.content_type));
    response
}

fn plain(status: StatusCode) -> Response<Full<Bytes>> {
    let text = format!("{} {}\n", status.as_u16(), status.canonical_reason().unwrap_or_default());
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=UTF-8"));
    response
}
