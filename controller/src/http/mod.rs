//! What every request passes, whatever service it asks.
//!
//! From outside to inside: path normalised ([`middleware`]) → request id, span, error body ([`error`]) → panic and time
//! limit → body limit → router → handler with [`context::Ctx`] (who asks) and [`json::JsonBody`] (what is asked).

pub mod context;
pub mod error;
pub mod json;
pub mod middleware;
pub mod query;

use axum::{
    Json,
    extract::{OriginalUri, State},
};
use serde_json::{Value, json};

use crate::app::App;
use error::ApiError;

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

/// A path that does not exist.
pub async fn not_found(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::NotFound(format!("The resource could not be found: there is nothing at {}.", uri.path()))
}

/// A path that exists, but not with this method.
pub async fn method_not_allowed(method: ::http::Method) -> ApiError {
    ApiError::MethodNotAllowed(format!("The method {method} is not allowed for this resource."))
}
