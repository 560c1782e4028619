//! What is around the router.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, HttpBody as _, to_bytes},
    extract::{DefaultBodyLimit, Request, State},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use http::{HeaderName, HeaderValue, Uri, Version, header, uri::PathAndQuery};
use tracing::Instrument;
use uuid::Uuid;

use super::{
    error::{ApiError, Asked, Service, render},
    json::MAX_JSON_BYTES,
    limits::owner_of,
};
use crate::{app::App, compute, server::Peer};

/// Longest time for a request, except the transfer of image bytes (which has its own limits): twice the longest long poll.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Largest body that is read before a handler sees the request.
const READ_AHEAD: usize = 16 << 10;

/// How much of a path is logged.
const MAX_LOGGED_PATH: usize = 256;

/// The id of a request: `req-<uuid>`; an extension of each request.
#[derive(Debug, Clone)]
pub struct RequestId(pub Arc<str>);

/// Marks (as an extension) a request whose handler keeps its own time limits.
#[derive(Debug, Clone, Copy)]
struct OwnTimeLimit;

/// Puts everything around the router.
pub fn wrap(router: Router, app: App) -> Router {
    let inner = router
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        .layer(from_fn(read_ahead))
        .layer(from_fn(guard))
        .layer(from_fn_with_state(app.clone(), limit_log_ins))
        .layer(from_fn_with_state(app, observe));
    #[cfg(test)]
    let inner = inner.layer(from_fn(crate::schema::answers::watch));
    // A layer of a router runs after its routing; what changes the path must be around a router that has no routes.
    Router::new().fallback_service(inner).layer(from_fn(normalise))
}

/// Removes slashes at the end and doubled at the start: clients join URLs in both ways, and mean the same.
async fn normalise(mut request: Request, next: Next) -> Response {
    if request.uri().path().trim_start_matches('/').starts_with("compute/v2/") {
        for name in compute::MICROVERSION_HEADERS {
            request.headers_mut().remove(name);
        }
    }
    if let Some(uri) = normalised(request.uri()) {
        *request.uri_mut() = uri;
    }
    next.run(request).await
}

fn normalised(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    // An image without an id is one that isn't there, and no list.
    if path == "/image/v2/images/" {
        return None;
    }
    let mut trimmed = format!("/{}", path.trim_matches('/'));
    // The compute API before microversions is the first of them.
    if let Some(rest) = trimmed.strip_prefix("/compute/v2/") {
        trimmed = format!("/compute/v2.1/{rest}");
    }
    if trimmed == path {
        return None;
    }
    let text = match uri.query() {
        Some(query) => format!("{trimmed}?{query}"),
        None => trimmed,
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(text).ok()?);
    Uri::from_parts(parts).ok()
}

/// Gives the request its id, logs it, and renders errors.
async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let id = format!("req-{}", Uuid::new_v4());
    let service = Service::of_path(request.uri().path());
    let path: String = request.uri().path().chars().take(MAX_LOGGED_PATH).collect();
    let span = tracing::info_span!("request", id = %id, method = %request.method(), path);
    request.extensions_mut().insert(RequestId(id.as_str().into()));
    if is_image_transfer(request.uri().path()) {
        request.extensions_mut().insert(OwnTimeLimit);
    }
    let started = Instant::now();
    app.metrics.begun();
    let counted = Counted { app: &app, service, status: std::sync::atomic::AtomicU16::new(499), started };
    async {
        let response = next.run(request).await;
        let mut response =
            render(response, &Asked { service, request_id: &id, public_url: &app.config.public_url });
        if let Ok(value) = HeaderValue::from_str(&id) {
            let headers = response.headers_mut();
            if service == Service::Compute {
                headers.insert(HeaderName::from_static("x-compute-request-id"), value.clone());
            }
            headers.insert(HeaderName::from_static("x-openstack-request-id"), value);
        }
        let status = response.status().as_u16();
        counted.status.store(status, std::sync::atomic::Ordering::Relaxed);
        // Not at info: how often clients ask must not decide how much is logged.
        tracing::debug!(status, elapsed_us = started.elapsed().as_micros() as u64, "answered");
        response
    }
    .instrument(span)
    .await
}

/// Counts a request when it is over, also when the client went away meanwhile (status 499).
struct Counted<'a> {
    app: &'a App,
    service: Service,
    status: std::sync::atomic::AtomicU16,
    started: Instant,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.app.metrics.answered(
            self.service,
            self.status.load(std::sync::atomic::Ordering::Relaxed),
            self.started.elapsed(),
        );
    }
}

/// Trying passwords is bounded by address, before anything is computed or asked of the database.
async fn limit_log_ins(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let log_in = request.method() == http::Method::POST
        && (path == "/identity/v3/auth/tokens"
            || (path.starts_with("/identity/v3/users/") && path.ends_with("/password")));
    let peer = request.extensions().get::<Peer>().copied();
    if log_in
        && let Some(Peer(address)) = peer
        && !app.login_limit.take(owner_of(address), Instant::now())
    {
        return ApiError::RateLimited("Too many log-ins from this address. Please try later.".into())
            .into_response();
    }
    next.run(request).await
}

/// `/image/v2/images/{id}/file` and `stage`, `/mote/v1/hosts/{id}/images/{sha256}` and `captures/{id}` take as long as the
/// bytes do.
fn is_image_transfer(path: &str) -> bool {
    let segments: Vec<&str> = path.split('/').skip(1).take(7).collect();
    matches!(
        segments[..],
        ["image", "v2", "images", _, "file" | "stage"] | ["mote", "v1", "hosts", _, "images" | "captures", _]
    )
}

/// A handler that takes too long or panics answers all the same.
async fn guard(request: Request, next: Next) -> Response {
    let unlimited = request.extensions().get::<OwnTimeLimit>().is_some();
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind();
    let outcome = match unlimited {
        true => Ok(answer.await),
        false => tokio::time::timeout(REQUEST_TIMEOUT, answer).await,
    };
    match outcome {
        Ok(Ok(response)) => response,
        // The panic's text went to stderr by the panic hook.
        Ok(Err(_)) => ApiError::internal("a handler panicked").into_response(),
        Err(_) => ApiError::Timeout(format!("The request took longer than {} s.", REQUEST_TIMEOUT.as_secs()))
            .into_response(),
    }
}

/// Reads small bodies first. A connection whose request's body was not read to its end is closed after the answer, and an
/// answer does not say so: a client that sends its headers and then a body, and is refused for the headers alone, would lose
/// the request that it sends next. After the refusal of a larger body the answer says that the connection ends.
async fn read_ahead(request: Request, next: Next) -> Response {
    let own_limit = request.extensions().get::<OwnTimeLimit>().is_some();
    let size = request.body().size_hint().exact();
    match size {
        Some(0) => next.run(request).await,
        Some(size) if size <= READ_AHEAD as u64 && !own_limit => {
            let (head, body) = request.into_parts();
            match to_bytes(body, READ_AHEAD).await {
                Ok(bytes) => next.run(Request::from_parts(head, Body::from(bytes))).await,
                Err(_) => ApiError::BadRequest("The body could not be read.".into()).into_response(),
            }
        }
        _ => {
            let has_connection = request.version() <= Version::HTTP_11;
            let mut response = next.run(request).await;
            if has_connection && (response.status().is_client_error() || response.status().is_server_error())
            {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_needless_slashes_and_keep_their_query() {
        let of = |s: &str| normalised(&s.parse().unwrap()).map(|u| u.to_string());
        assert_eq!(of("/identity/v3/?a=b"), Some("/identity/v3?a=b".into()));
        assert_eq!(of("//identity"), Some("/identity".into()));
        assert_eq!(of("/identity"), None);
        assert_eq!(of("/"), None);
    }

    #[test]
    fn only_transfers_of_image_bytes_are_without_the_general_time_limit() {
        assert!(is_image_transfer("/image/v2/images/x/file"));
        assert!(is_image_transfer("/mote/v1/hosts/h/images/abc"));
        assert!(is_image_transfer("/image/v2/images/x/stage"));
        assert!(is_image_transfer("/mote/v1/hosts/h/captures/x"));
        assert!(!is_image_transfer("/image/v2/images/x"));
        assert!(!is_image_transfer("/mote/v1/hosts/h/desired"));
    }
}
