//! Requests to other web servers: only to hosts that the administrator has named, whatever a tenant asks for.

use std::{sync::Arc, time::Duration};

use axum::body::Body;
use http::{Request, Response, StatusCode, header};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};
use url::Url;

use super::error::ApiError;

/// Longest time until a connection is there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time until an answer's head has come.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Most redirections that are followed.
const MAX_REDIRECTS: usize = 5;
/// Where Debian keeps the certificates that are trusted.
const ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The usual variable that names another file.
const ROOTS_VARIABLE: &str = "SSL_CERT_FILE";

/// The address, if it is of a host in the list: `host` with the scheme's own port, or `host:port`.
///
/// # Errors
/// 400 for what is no `http` or `https` address, 403 for another host.
pub fn allowed(address: &str, hosts: &[String]) -> Result<Url, ApiError> {
    let no_address =
        || ApiError::BadRequest("The uri must be of the form http(s)://host[:port]/path.".into());
    let url: Url = address.parse().map_err(|_| no_address())?;
    if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.password().is_some() {
        return Err(no_address());
    }
    let host = url.host_str().ok_or_else(no_address)?.to_owned();
    let name = url.port().map_or_else(|| host.clone(), |port| format!("{host}:{port}"));
    match hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(&name)) {
        true => Ok(url),
        false => {
            let name: String = name.chars().take(128).collect();
            Err(ApiError::Forbidden(format!("Downloads from {name} are not allowed.")))
        }
    }
}

/// Gets what is at an address of an allowed host, following redirections to allowed hosts.
///
/// # Errors
/// 403 for a redirection to another host; 400 with what the server answered, or that it can't be reached.
pub async fn get(url: Url, hosts: &[String]) -> Result<Body, ApiError> {
    let mut url = url;
    for _ in 0..=MAX_REDIRECTS {
        let request = Request::get(target(&url)).header(header::USER_AGENT, "mote").body(Body::empty());
        let response = send(&url, request.map_err(ApiError::internal)?).await?;
        match response.status() {
            StatusCode::OK => return Ok(Body::new(response.into_body())),
            status if status.is_redirection() => {
                let to = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
                let to = to.and_then(|to| url.join(to).ok());
                let to = to.ok_or_else(|| ApiError::BadRequest(format!("The server answered {status}.")))?;
                url = allowed(to.as_str(), hosts)?;
            }
            status => return Err(ApiError::BadRequest(format!("The server answered {status}."))),
        }
    }
    Err(ApiError::BadRequest(format!("More than {MAX_REDIRECTS} redirections.")))
}

/// Path and query.
fn target(url: &Url) -> String {
    url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()))
}

/// Sends one request on a connection of its own; the `Host` is the address's.
///
/// # Errors
/// 400 if the server can't be reached or doesn't answer.
pub async fn send(url: &Url, mut request: Request<Body>) -> Result<Response<Incoming>, ApiError> {
    let unreachable = |what: String| ApiError::BadRequest(format!("The server can't be reached: {what}."));
    let host = url.host_str().unwrap_or_default().to_owned();
    let port = url.port_or_known_default().unwrap_or(80);
    let authority = url.port().map_or_else(|| host.clone(), |port| format!("{host}:{port}"));
    request.headers_mut().insert(header::HOST, authority.parse().map_err(ApiError::internal)?);
    // An IPv6 address has brackets in a URL, and none elsewhere.
    let bare = host.trim_matches(['[', ']']).to_owned();
    let connect = TcpStream::connect((bare.clone(), port));
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| unreachable("it does not answer in time".into()))?
        .map_err(|error| unreachable(error.kind().to_string()))?;
    let answer = async {
        if url.scheme() == "https" {
            let name = ServerName::try_from(bare).map_err(ApiError::internal)?;
            let stream = tls()?.connect(name, stream).await;
            exchange(stream.map_err(|error| unreachable(error.to_string()))?, request).await
        } else {
            exchange(stream, request).await
        }
    };
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, answer);
    answer.await.map_err(|_| unreachable("it does not answer in time".into()))?
}

async fn exchange<S>(stream: S, request: Request<Body>) -> Result<Response<Incoming>, ApiError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let broken =
        |error: hyper::Error| ApiError::BadRequest(format!("The server's answer broke off: {error}."));
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Ends with the answer's body, or when that is dropped.
    drop(tokio::spawn(connection));
    sender.send_request(request).await.map_err(broken)
}

/// Trusts what the machine trusts.
fn tls() -> Result<TlsConnector, ApiError> {
    let file = std::env::var(ROOTS_VARIABLE).unwrap_or_else(|_| ROOTS.to_owned());
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(&file).map_err(|error| {
        tracing::error!(%error, file, "no certificates to trust: install the package ca-certificates");
        ApiError::internal(error)
    })?;
    roots.add_parsable_certificates(certificates.flatten());
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(ApiError::internal)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_hosts_on_their_ports_are_allowed() {
        let hosts = ["cloud.example".to_owned(), "10.0.0.1:8080".to_owned(), "[fd00::1]".to_owned()];
        let status = |address: &str| match allowed(address, &hosts) {
            Ok(_) => 200,
            Err(ApiError::Forbidden(_)) => 403,
            Err(_) => 400,
        };
        for address in [
            "http://cloud.example/a?b=c",
            "https://CLOUD.example:443/",
            "http://10.0.0.1:8080/x",
            "http://[fd00::1]/x",
        ] {
            assert_eq!(status(address), 200, "{address}");
        }
        for address in [
            "http://10.0.0.1/",
            "http://cloud.example:22/",
            "http://cloud.example.evil/",
            "http://169.254.169.254/latest",
            "http://localhost/",
            "http://10.0.0.1.evil:8080/",
        ] {
            assert_eq!(status(address), 403, "{address}");
        }
        for address in [
            "file:///etc/passwd",
            "cloud.example",
            "http://",
            "http://a@cloud.example/",
            "ftp://cloud.example/",
        ] {
            assert_eq!(status(address), 400, "{address}");
        }
    }
}
