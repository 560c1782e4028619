//! The accept loop: bounded connections, TLS if there is a certificate, time limits on headers, graceful end.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tower::Service;

/// Connections at a time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 2048;
/// Longest time for a client to send a request's head (and longest idle time of a kept connection).
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest head of a request in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Longest time for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after `accept` failed (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests under way may take once the end was asked for.
const DRAIN: Duration = Duration::from_secs(10);

/// Where a request comes from: an extension of each request.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// Why a certificate can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate's file.
    #[error("can't read a certificate chain (PEM) from {0}")]
    Certificate(String, #[source] rustls::pki_types::pem::Error),
    /// The key's file.
    #[error("can't read a private key (PEM) from {0}")]
    Key(String, #[source] rustls::pki_types::pem::Error),
    /// The two don't fit.
    #[error("the certificate and the key can't be used")]
    Unusable(#[from] rustls::Error),
}

/// TLS with this certificate chain and key, both in PEM.
///
/// # Errors
/// See [`TlsError`].
pub fn tls(certificate: &Path, key: &Path) -> Result<TlsAcceptor, TlsError> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| TlsError::Certificate(certificate.display().to_string(), source))?;
    let secret = PrivateKeyDer::from_pem_file(key)
        .map_err(|source| TlsError::Key(key.display().to_string(), source))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, secret)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until `stop` resolves, then lets the requests under way finish.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stopping, watch) = watch::channel(false);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, place)
        };
        tokio::select! {
            () = &mut stop => break,
            (accepted, place) = accepted => match accepted {
                Ok((stream, peer)) => {
                    let incoming = Incoming { stream, peer, tls: tls.clone(), _place: place };
                    drop(tokio::spawn(accepted_one(incoming, router.clone(), watch.clone())));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let _ = stopping.send(true);
    // All places free: no connection left.
    let all = u32::try_from(MAX_CONNECTIONS).expect("a small constant");
    if tokio::time::timeout(DRAIN, places.acquire_many(all)).await.is_err() {
        tracing::warn!("requests under way were cut off");
    }
}

/// A connection with its place.
struct Incoming {
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    _place: OwnedSemaphorePermit,
}

async fn accepted_one(incoming: Incoming, router: Router, stopping: watch::Receiver<bool>) {
    let Incoming { stream, peer, tls, _place } = incoming;
    // Answers are small and complete: never wait for more.
    let _ = stream.set_nodelay(true);
    let peer = Peer(peer.ip().to_canonical());
    let Some(tls) = tls else { return connection(stream, peer, router, stopping).await };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => connection(stream, peer, router, stopping).await,
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

async fn connection<S>(stream: S, peer: Peer, router: Router, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer);
        router.clone().call(request)
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = asked_to_stop(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

async fn asked_to_stop(stopping: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: the end as well.
    let _ = stopping.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use axum::{Extension, routing::get};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsConnector, rustls::RootCertStore};

    use super::*;

    #[tokio::test]
    async fn a_certificate_gives_https_and_requests_know_where_they_come_from() {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args(["-days", "2", "-subj", "/CN=cloud.test", "-addext", "subjectAltName=DNS:cloud.test"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-out"])
            .arg(&certificate)
            .arg("-keyout")
            .arg(&key)
            .output();
        let Ok(made) = made else {
            println!("SKIPPED: openssl is not installed");
            return;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let router = Router::new()
            .route("/", get(|Extension(peer): Extension<Peer>| async move { peer.0.to_string() }));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let acceptor = tls(&certificate, &key).unwrap();
        let server = tokio::spawn(serve(listener, Some(acceptor), router, async {
            let _ = stopped.await;
        }));
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&certificate).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await.unwrap();
        let name = "cloud.test".try_into().unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: cloud.test\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("127.0.0.1"), "{answer}");
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(matches!(tls(&key, &key), Err(TlsError::Unusable(_) | TlsError::Certificate(..))));
        assert!(matches!(tls(&certificate, &certificate), Err(TlsError::Key(..))));
    }

    #[tokio::test]
    async fn a_refused_request_does_not_take_the_next_one_of_its_connection_with_it() {
        let test = crate::testing::TestApp::new().await;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, None, test.router.clone(), async {
            let _ = stopped.await;
        }));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = |length: usize| {
            format!(
                "POST /compute/v2.1/servers HTTP/1.1\r\nHost: cloud\r\nX-Auth-Token: no\r\nContent-Length: {length}\r\n\r\n"
            )
        };
        let mut answer = [0_u8; 4096];
        for _ in 0..2 {
            // Python's client sends a body apart from its headers, which alone are enough to refuse it.
            stream.write_all(head(1000).as_bytes()).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            stream.write_all(&[b' '; 1000]).await.unwrap();
            let length = stream.read(&mut answer).await.unwrap();
            let said = String::from_utf8_lossy(&answer[..length]).to_lowercase();
            assert!(said.starts_with("http/1.1 401") && !said.contains("connection: close"), "{said}");
        }
        stream.write_all(head(1_000_000).as_bytes()).await.unwrap();
        let length = stream.read(&mut answer).await.unwrap();
        let said = String::from_utf8_lossy(&answer[..length]).to_lowercase();
        assert!(said.starts_with("http/1.1 401") && said.contains("connection: close"), "{said}");
        stop.send(()).unwrap();
        drop(stream);
        server.await.unwrap();
    }
}
