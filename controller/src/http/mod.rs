//! What every request passes, whatever service it asks.
//!
//! From outside to inside: path normalised ([`middleware`]) → request id, span, error body ([`error`]) → panic and time
//! limit → body limit → router → handler with [`context::Ctx`] (who asks) and [`json::JsonBody`] (what is asked).

pub mod client;
pub mod context;
pub mod error;
pub mod json;
pub mod limits;
pub mod metrics;
pub mod middleware;
pub mod openapi;
pub mod query;
#[cfg(test)]
mod tests;

use std::time::Duration;

use axum::{
    Json,
    extract::{FromRequestParts, OriginalUri, State},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{app::App, server::Peer};
use error::ApiError;

/// How long [`readyz`] waits for the database.
const READY_WITHIN: Duration = Duration::from_secs(2);

/// `GET /`: what is here.
pub async fn root(State(app): State<App>) -> Json<Value> {
    let base = &app.config.public_url;
    Json(json!({
        "name": "mote",
        "version": env!("CARGO_PKG_VERSION"),
        "services": {
            "identity": format!("{base}/identity/v3"),
            "image": format!("{base}/image"),
            "compute": format!("{base}/compute/v2.1"),
            "network": format!("{base}/network"),
            "mote": format!("{base}/mote/v1"),
        }
    }))
}

/// `GET /healthz`: 200 when the database answers.
///
/// # Errors
/// 500 when it doesn't.
pub async fn healthz(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let _one: i64 = sqlx::query_scalar("SELECT 1").fetch_one(&app.db).await?;
    Ok(Json(json!({"status": "ok"})))
}

/// `GET /readyz`: 200 when requests can be answered: the database reads, and is at this program's schema or newer.
///
/// # Errors
/// 503 when not.
pub async fn readyz(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let read = sqlx::query_scalar::<_, i64>("SELECT version FROM identity_version").fetch_one(&app.db);
    match tokio::time::timeout(READY_WITHIN, read).await {
        Ok(Ok(_)) => Ok(Json(json!({"status": "ready"}))),
        Ok(Err(error)) => {
            tracing::warn!(%error, "not ready");
            Err(ApiError::Unavailable("The database does not answer.".into()))
        }
        Err(_) => Err(ApiError::Unavailable("The database does not answer in time.".into())),
    }
}

/// `GET /metrics`, for programs on this machine, and for others with an administrator's token.
///
/// # Errors
/// 401 or 403.
pub async fn metrics(State(app): State<App>, request: axum::extract::Request) -> Result<Response, ApiError> {
    let local = request.extensions().get::<Peer>().is_some_and(|peer| peer.0.is_loopback());
    if !local {
        let (mut parts, _) = request.into_parts();
        context::Ctx::from_request_parts(&mut parts, &app).await?.require_admin()?;
    }
    let headers = [(::http::header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((headers, app.metrics_text()).into_response())
}

/// A path that does not exist.
pub async fn not_found(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::NotFound(format!("The resource could not be found: there is nothing at {}.", uri.path()))
}

/// A path that exists, but not with this method.
pub async fn method_not_allowed(method: ::http::Method) -> ApiError {
    ApiError::MethodNotAllowed(format!("The method {method} is not allowed for this resource."))
}
