//! The host protocol, client side (`mote_host_api`). Always asked by the host: nothing listens for the controller.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use http::StatusCode;
use mote_host_api::{
    DesiredState, HostReply, HostRequest, ImageId, JoinRequest, JoinResponse, MAX_WAIT_S, ObservedState,
    RequestId,
};
use reqwest::{Response, Url};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::io::ReaderStream;

use crate::{
    errors::bounded,
    identity::Identity,
    image_cache::{FetchError, ImageSource},
};

/// Longest time to a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an idle connection is kept: well below the time after which the controller closes it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for an answer that nobody waits for on the other side.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest pause within the bytes of an image.
const IMAGE_STALL: Duration = Duration::from_secs(60);
/// Bytes of a capture that are read at once.
const PIECE: usize = 256 << 10;
/// Largest answer other than an image, in bytes.
const ANSWER_MAX: usize = 64 << 20;
/// Largest error answer that is read, in bytes.
const ERROR_MAX: usize = 64 << 10;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Address.
    #[error("{0:?} is no controller's address: it looks like http://192.0.2.1:8774")]
    Url(String),
    /// No connection or no answer.
    #[error("no answer from the controller")]
    Http(#[from] reqwest::Error),
    /// Not welcome.
    #[error("the controller refuses this host: {0}")]
    Unauthorized(String),
    /// Not with this token.
    #[error(
        "the controller does not take this join token: it is wrong, expired or used up; \
         make a new one with `mote host join-token`"
    )]
    JoinToken,
    /// Other error answers.
    #[error("the controller answers {status}: {message}")]
    Status {
        /// Status.
        status: StatusCode,
        /// Its message.
        message: String,
    },
    /// What shall be sent.
    #[error("cannot read {}", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// An answer that isn't one.
    #[error("the controller's answer is not what was asked for")]
    Parse(#[source] serde_json::Error),
    /// An answer without end.
    #[error("the controller's answer is longer than {ANSWER_MAX} bytes")]
    TooLong,
}

/// What a host asks of its controller.
pub trait Controller: Send + Sync {
    /// The desired state as soon as its generation is greater than `after`; `None` when that takes too long.
    fn desired(
        &self,
        after: u64,
        wait: Duration,
    ) -> BoxFuture<'_, Result<Option<DesiredState>, ControllerError>>;
    /// Tells what is observed.
    fn report<'a>(&'a self, observed: &'a ObservedState) -> BoxFuture<'a, Result<(), ControllerError>>;
    /// Questions, as soon as there are some.
    fn requests(&self, wait: Duration) -> BoxFuture<'_, Result<Vec<HostRequest>, ControllerError>>;
    /// Sends a copy of a root disk that shall become this image; false if nobody wants it any more.
    fn send_capture<'a>(
        &'a self,
        image: ImageId,
        path: &'a Path,
    ) -> BoxFuture<'a, Result<bool, ControllerError>>;
    /// Answers one.
    fn reply<'a>(&'a self, id: RequestId, reply: &'a HostReply)
    -> BoxFuture<'a, Result<(), ControllerError>>;
}

/// A controller over HTTP.
pub struct HttpController {
    http: reqwest::Client,
    identity: watch::Receiver<Identity>,
}

/// The URL of a controller without path or trailing slash.
///
/// # Errors
/// [`ControllerError::Url`]; only http is spoken yet.
pub fn base_url(text: &str) -> Result<String, ControllerError> {
    let wrong = || ControllerError::Url(text.to_owned());
    let url = Url::parse(text).map_err(|_| wrong())?;
    if url.scheme() != "http" || url.host_str().is_none() || url.query().is_some() || url.fragment().is_some()
    {
        return Err(wrong());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

fn client() -> Result<reqwest::Client, ControllerError> {
    Ok(reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("mote-hostd/", env!("CARGO_PKG_VERSION")))
        .build()?)
}

/// Joins a cloud.
///
/// # Errors
/// [`ControllerError`].
pub async fn join(url: &str, request: &JoinRequest) -> Result<JoinResponse, ControllerError> {
    let call = client()?.post(format!("{url}/mote/v1/hosts")).timeout(ANSWER_TIMEOUT).json(request);
    let answer = call.send().await?;
    if answer.status() == StatusCode::UNAUTHORIZED {
        return Err(ControllerError::JoinToken);
    }
    json(success(answer).await?).await
}

impl HttpController {
    /// The controller of the identity, always the newest.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(identity: watch::Receiver<Identity>) -> Result<Self, ControllerError> {
        Ok(Self { http: client()?, identity })
    }

    fn call(&self, method: http::Method, path: &str) -> reqwest::RequestBuilder {
        let identity = self.identity.borrow();
        let url = format!("{}/mote/v1/hosts/{}/{path}", identity.url, identity.host_id);
        self.http.request(method, url).bearer_auth(&identity.secret)
    }

    /// Long poll: 204 is `None`.
    async fn poll<T: DeserializeOwned>(
        &self,
        path: String,
        wait: Duration,
    ) -> Result<Option<T>, ControllerError> {
        let call = self.call(http::Method::GET, &path).timeout(wait + ANSWER_TIMEOUT);
        let response = success(call.send().await?).await?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        json(response).await.map(Some)
    }
}

impl Controller for HttpController {
    fn desired(
        &self,
        after: u64,
        wait: Duration,
    ) -> BoxFuture<'_, Result<Option<DesiredState>, ControllerError>> {
        Box::pin(self.poll(format!("desired?after={after}&wait={}", wait.as_secs().min(MAX_WAIT_S)), wait))
    }

    fn report<'a>(&'a self, observed: &'a ObservedState) -> BoxFuture<'a, Result<(), ControllerError>> {
        Box::pin(async move {
            let call = self.call(http::Method::PUT, "observed").timeout(ANSWER_TIMEOUT).json(observed);
            success(call.send().await?).await.map(drop)
        })
    }

    fn requests(&self, wait: Duration) -> BoxFuture<'_, Result<Vec<HostRequest>, ControllerError>> {
        let path = format!("requests?wait={}", wait.as_secs().min(MAX_WAIT_S));
        Box::pin(async move { Ok(self.poll(path, wait).await?.unwrap_or_default()) })
    }

    fn send_capture<'a>(
        &'a self,
        image: ImageId,
        path: &'a Path,
    ) -> BoxFuture<'a, Result<bool, ControllerError>> {
        Box::pin(async move {
            let unreadable = |source| ControllerError::Read { path: path.to_owned(), source };
            let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
            let length = file.metadata().await.map_err(unreadable)?.len();
            let bytes = ReaderStream::with_capacity(file, PIECE);
            // No time limit for the whole, as for images that are fetched.
            let call = self.call(http::Method::PUT, &format!("captures/{image}"));
            let call = call
                .header(http::header::CONTENT_TYPE, "application/octet-stream")
                .header(http::header::CONTENT_LENGTH, length)
                .body(reqwest::Body::wrap_stream(bytes));
            match success(call.send().await?).await {
                Ok(_) => Ok(true),
                Err(ControllerError::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(false),
                Err(e) => Err(e),
            }
        })
    }

    fn reply<'a>(
        &'a self,
        id: RequestId,
        reply: &'a HostReply,
    ) -> BoxFuture<'a, Result<(), ControllerError>> {
        Box::pin(async move {
            let call = self.call(http::Method::POST, &format!("requests/{id}"));
            success(call.timeout(ANSWER_TIMEOUT).json(reply).send().await?).await.map(drop)
        })
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl ImageSource for HttpController {
    fn fetch<'a>(
        &'a self,
        sha256: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, BoxError>>, FetchError>> {
        Box::pin(async move {
            let away = |e: ControllerError| FetchError::Away(Box::new(e));
            // No time limit for the whole: images can be large. A pause limit instead.
            let sent = self.call(http::Method::GET, &format!("images/{sha256}")).send();
            let response = tokio::time::timeout(IMAGE_STALL, sent)
                .await
                .map_err(|e| FetchError::Away(Box::new(e)))?
                .map_err(|e| away(e.into()))?;
            let response = match success(response).await {
                Err(ControllerError::Status { status: StatusCode::NOT_FOUND, .. }) => {
                    return Err(FetchError::Unknown);
                }
                other => other.map_err(away)?,
            };
            Ok(pieces(response).boxed())
        })
    }
}

fn pieces(response: Response) -> impl futures_util::Stream<Item = Result<Bytes, BoxError>> + Send + 'static {
    stream::try_unfold(response, |mut response| async move {
        let chunk = tokio::time::timeout(IMAGE_STALL, response.chunk()).await??;
        Ok(chunk.map(|chunk| (chunk, response)))
    })
}

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Deserialize)]
struct ErrorDetail {
    message: String,
}

/// The response if it is one of success.
async fn success(response: Response) -> Result<Response, ControllerError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = read(response, ERROR_MAX).await.unwrap_or_default();
    let message = serde_json::from_slice::<ErrorBody>(&body)
        .map(|body| body.error.message)
        .unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned());
    let message = bounded(message.trim());
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ControllerError::Unauthorized(message),
        _ => ControllerError::Status { status, message },
    })
}

async fn json<T: DeserializeOwned>(response: Response) -> Result<T, ControllerError> {
    let body = read(response, ANSWER_MAX).await?;
    serde_json::from_slice(&body).map_err(ControllerError::Parse)
}

async fn read(mut response: Response, most: usize) -> Result<Vec<u8>, ControllerError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > most {
            return Err(ControllerError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_addresses_are_controllers() {
        assert_eq!(base_url("http://192.0.2.1:8774/").unwrap(), "http://192.0.2.1:8774");
        assert_eq!(base_url("http://c.example/base/").unwrap(), "http://c.example/base");
        for wrong in ["https://x", "192.0.2.1:8774", "ftp://x", "http://", "http://x/?q", ""] {
            assert!(matches!(base_url(wrong), Err(ControllerError::Url(_))), "{wrong}");
        }
    }
}
