//! Version documents of Keystone.

use axum::{Json, Router, extract::State, routing::get};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{app::App, config::Config};

/// Routes; they need no token.
pub fn router() -> Router<App> {
    Router::new().route("/", get(versions)).route("/v3", get(version))
}

/// 3.14 is what Keystone has said since 2020.
fn v3(config: &Config) -> Value {
    json!({
        "id": "v3.14",
        "status": "stable",
        "updated": "2020-04-07T00:00:00Z",
        "links": [{"rel": "self", "href": format!("{}/identity/v3/", config.public_url)}],
        "media-types": [{"base": "application/json", "type": "application/vnd.openstack.identity-v3+json"}],
    })
}

/// `GET /identity`: 300, as Keystone.
async fn versions(State(app): State<App>) -> (StatusCode, Json<Value>) {
    (StatusCode::MULTIPLE_CHOICES, Json(json!({"versions": {"values": [v3(&app.config)]}})))
}

async fn version(State(app): State<App>) -> Json<Value> {
    Json(json!({"version": v3(&app.config)}))
}
