//! Servers' serial consoles, by a question to the host.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, State},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::StatusCode;
use mote_host_api::{HostId, HostReply, HostRequestKind, ServerId};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::FromRow;

use super::{AskError, is_up};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Longest wait for console output, as the protocol says.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// How long a host may take to answer, beyond what it was asked to wait.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of one input.
const MAX_INPUT: usize = 64 << 10;

#[derive(FromRow)]
struct Place {
    project_id: String,
    host_id: Option<String>,
    last_seen_us: Option<i64>,
}

/// Asks the host of a server. A server of another project is 404.
///
/// # Errors
/// 404 without such a server, 409 if it is on no host or the host can't do it, 503 if the host is down or silent.
pub(crate) async fn ask(
    app: &App,
    ctx: &Ctx,
    server_id: &str,
    kind: HostRequestKind,
    wait: Duration,
) -> Result<HostReply, ApiError> {
    let project = ctx.require_project()?;
    let place = place(app, server_id).await?;
    match ctx.is_admin || place.project_id == project {
        true => ask_at(app, server_id, &place, kind, wait).await,
        false => Err(not_found(server_id)),
    }
}

/// [`ask`] for whoever may use the server's console.
pub(super) async fn ask_of(
    app: &App,
    server_id: &str,
    kind: HostRequestKind,
    wait: Duration,
) -> Result<HostReply, ApiError> {
    let place = place(app, server_id).await?;
    ask_at(app, server_id, &place, kind, wait).await
}

async fn place(app: &App, server_id: &str) -> Result<Place, ApiError> {
    let place: Option<Place> = sqlx::query_as(
        "SELECT servers.project_id, servers.host_id, hosts.last_seen_us
         FROM servers LEFT JOIN hosts ON hosts.id = servers.host_id WHERE servers.id = $1",
    )
    .bind(server_id)
    .fetch_optional(&app.db)
    .await?;
    place.ok_or_else(|| not_found(server_id))
}

async fn ask_at(
    app: &App,
    server_id: &str,
    place: &Place,
    kind: HostRequestKind,
    wait: Duration,
) -> Result<HostReply, ApiError> {
    let (Some(host), Some(last_seen_us)) = (&place.host_id, place.last_seen_us) else {
        return Err(ApiError::Conflict(format!("Server {server_id} is on no host.")));
    };
    if !is_up(last_seen_us) {
        return Err(ApiError::Unavailable(format!("The host of server {server_id} is down.")));
    }
    let host: HostId = host.parse().map_err(ApiError::internal)?;
    match app.hub.ask(host, kind, wait + PATIENCE).await {
        Ok(HostReply::Error { message }) => Err(ApiError::Conflict(message)),
        Ok(reply) => Ok(reply),
        Err(AskError::Busy) => Err(ApiError::Unavailable("The server's host has too much to answer.".into())),
        Err(AskError::TimedOut) => Err(ApiError::Unavailable("The server's host did not answer.".into())),
    }
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::NotFound(format!("Instance {id} could not be found."))
}

fn unexpected(reply: &HostReply) -> ApiError {
    ApiError::internal(format!("a host gave an answer of another kind: {}", name(reply)))
}

fn name(reply: &HostReply) -> &'static str {
    match reply {
        HostReply::ConsoleOutput { .. } => "console_output",
        HostReply::ConsoleRead { .. } => "console_read",
        HostReply::Diagnostics(_) => "diagnostics",
        HostReply::Done => "done",
        HostReply::Error { .. } => "error",
    }
}

/// `GET /servers/{id}/console?offset=&wait_ms=`.
pub(super) async fn read(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    ctx.require_writer()?;
    let server_id: ServerId = id.parse().map_err(|_| not_found(&id))?;
    let offset = params.number("offset")?.unwrap_or(0);
    let wait = Duration::from_millis(params.number("wait_ms")?.unwrap_or(0)).min(MAX_WAIT);
    let wait_ms = u64::try_from(wait.as_millis()).map_err(ApiError::internal)?;
    let kind = HostRequestKind::ConsoleRead { server_id, offset, wait_ms };
    match ask(&app, &ctx, &server_id.to_string(), kind, wait).await? {
        HostReply::ConsoleRead { next_offset, data } => {
            Ok(Json(json!({"next_offset": next_offset, "data": data})))
        }
        other => Err(unexpected(&other)),
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Input {
    /// Base64.
    data: String,
}

/// `POST /servers/{id}/console`.
pub(super) async fn write(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(input): JsonBody<Input>,
) -> Result<StatusCode, ApiError> {
    ctx.require_writer()?;
    let server_id: ServerId = id.parse().map_err(|_| not_found(&id))?;
    let bytes = STANDARD.decode(&input.data);
    if !bytes.is_ok_and(|bytes| bytes.len() <= MAX_INPUT) {
        return Err(ApiError::BadRequest(format!("data must be base64 of {MAX_INPUT} bytes at most.")));
    }
    let kind = HostRequestKind::ConsoleWrite { server_id, data: input.data };
    match ask(&app, &ctx, &server_id.to_string(), kind, Duration::ZERO).await? {
        HostReply::Done => Ok(StatusCode::NO_CONTENT),
        other => Err(unexpected(&other)),
    }
}
