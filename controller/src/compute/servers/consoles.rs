//! Remote consoles: the serial one, as a WebSocket. Others there are none: a microVM has no screen.

use axum::{
    Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};

use super::{
    super::{state::VmState, versions::Version},
    actions::Asked,
    input::{self, Fields},
    row,
};
use crate::{
    app::App,
    hosts::serial,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// The only protocol, and its only type.
const SERIAL: &str = "serial";
/// Nova's protocols.
const PROTOCOLS: [&str; 5] = ["vnc", "spice", "rdp", SERIAL, "mks"];

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers/{id}/remote-consoles", post(create))
        .route("/os-console-auth-tokens/{token}", get(authorized))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    if !version.has(6) {
        return Err(ApiError::NotFound("The resource could not be found.".into()));
    }
    let mut fields = Fields::open(body, "remote_console", &[])?;
    let (protocol, kind) = (fields.string("protocol")?, fields.string("type")?);
    fields.finish()?;
    let (Some(protocol), Some(kind)) = (protocol, kind) else {
        return Err(ApiError::BadRequest(
            "Invalid input: 'protocol' and 'type' are required properties.".into(),
        ));
    };
    if !PROTOCOLS.contains(&protocol.as_str()) {
        let text = format!("is not one of {}", PROTOCOLS.join(", "));
        return Err(input::invalid("protocol", &protocol.into(), &text));
    }
    // Of other protocols there is no type.
    let url = url(&app, &ctx, &id, &kind, protocol == SERIAL && kind == SERIAL).await?;
    Ok(Json(json!({"remote_console": {"protocol": protocol, "type": kind, "url": url}})))
}

/// `os-getSerialConsole`, until 2.5.
pub(super) async fn get_serial(asked: &Asked<'_>) -> Result<Response, ApiError> {
    if asked.version.has(6) {
        return Err(ApiError::NotFound("Since 2.6 consoles are had by POST …/remote-consoles.".into()));
    }
    let mut fields =
        Fields::open(json!({ "os-getSerialConsole": asked.argument }), "os-getSerialConsole", &[])?;
    let kind = fields.string("type")?;
    fields.finish()?;
    let kind =
        kind.ok_or_else(|| ApiError::BadRequest("Invalid input: 'type' is a required property.".into()))?;
    let url = url(asked.app, asked.ctx, asked.id, &kind, kind == SERIAL).await?;
    Ok(Json(json!({"console": {"type": kind, "url": url}})).into_response())
}

async fn url(app: &App, ctx: &Ctx, id: &str, kind: &str, there: bool) -> Result<String, ApiError> {
    let row = row::visible(&mut *app.db.acquire().await?, ctx, id).await?;
    if !there {
        let kind: String = kind.chars().take(64).collect();
        return Err(ApiError::BadRequest(format!("Unavailable console type {kind}.")));
    }
    if row.host_id.is_none() || row.vm_state() == VmState::Building {
        return Err(ApiError::Conflict(format!("Instance {id} is not ready")));
    }
    serial::make_url(app, ctx, &row.id).await
}

/// What a console's token is for (2.31; other types than RDP's then).
async fn authorized(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    Path(token): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if !version.has(31) {
        return Err(ApiError::BadRequest("Console tokens are shown since microversion 2.31.".into()));
    }
    let found = serial::find(&mut *app.db.acquire().await?, &token).await?;
    let found = found.ok_or_else(|| ApiError::NotFound("Token not found".into()))?;
    Ok(Json(json!({"console": {
        "instance_uuid": found.server_id, "host": found.host_name, "port": null, "internal_access_path": null,
    }})))
}
