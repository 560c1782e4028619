//! Mote's own API for administrators: join tokens, hosts, the scheduler's policy.

use crate::db::Conn;
use std::time::Duration;

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use http::StatusCode;
use mote_host_api::HostId;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    inventory::{self, HostRow},
    secrets::{self, TokenWish},
};
use crate::{
    app::App,
    db::rfc3339_s,
    http::{
        context::Ctx,
        error::ApiError,
        json::{self, JsonBody},
    },
    scheduler::{Policy, Resources},
    schema::Expected,
};

/// Longest description and reason in bytes.
const MAX_TEXT: usize = 255;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenBody {
    #[serde(default)]
    description: String,
    uses: Option<u32>,
    lifetime_s: Option<u64>,
}

/// `POST /join-tokens`, the body may be missing.
pub(super) async fn create_token(
    State(app): State<App>,
    ctx: Ctx,
    expected: Expected,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    ctx.require_admin()?;
    let body: TokenBody =
        if body.is_empty() { TokenBody::default() } else { json::parse_as(&body, &expected)? };
    short("description", &body.description)?;
    let wish = TokenWish {
        description: body.description,
        uses: body.uses,
        lifetime: body.lifetime_s.map_or(secrets::DEFAULT_TOKEN_LIFETIME, Duration::from_secs),
    };
    let mut tx = app.begin().await?;
    let made = secrets::make_join_token(&mut tx, &wish).await?;
    tx.commit().await?;
    let body = json!({"token": made.token, "expires_at": rfc3339_s(made.expires_us)});
    Ok((StatusCode::CREATED, Json(body)))
}

/// `GET /hosts`.
pub(super) async fn list(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let rows = inventory::rows(&mut *app.db.acquire().await?).await?;
    let hosts = rows.iter().map(document).collect::<Result<Vec<_>, _>>()?;
    Ok(Json(json!({"hosts": hosts})))
}

/// `GET /hosts/{id}`.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    Ok(Json(json!({"host": found(&mut *app.db.acquire().await?, &id).await?})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HostBody {
    enabled: bool,
    disabled_reason: Option<String>,
}

/// `PUT /hosts/{id}`: whether it takes new servers. Those that it has stay.
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<HostBody>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let reason = body.disabled_reason;
    if body.enabled && reason.is_some() {
        return Err(ApiError::BadRequest("A host that is enabled has no disabled_reason.".into()));
    }
    short("disabled_reason", reason.as_deref().unwrap_or_default())?;
    let mut tx = app.begin().await?;
    sqlx::query("UPDATE hosts SET enabled = $2, disabled_reason = $3 WHERE id = $1")
        .bind(&id)
        .bind(body.enabled)
        .bind(reason)
        .execute(&mut *tx)
        .await?;
    let host = found(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(Json(json!({ "host": host })))
}

/// `DELETE /hosts/{id}`: its secret is worth nothing from then on.
pub(super) async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    remove(&mut tx, &id).await?;
    tx.commit().await?;
    let id: HostId = id.parse().map_err(ApiError::internal)?;
    app.hub.forget(id);
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a host without servers; forget it in the hub after the commit.
pub(crate) async fn remove(tx: &mut Conn, id: &str) -> Result<(), ApiError> {
    let row = row(tx, id).await?;
    let servers = row.view()?.servers;
    if servers > 0 {
        return Err(ApiError::Conflict(format!("Host {} still has {servers} server(s).", row.name)));
    }
    sqlx::query("DELETE FROM hosts WHERE id = $1").bind(id).execute(tx).await?;
    Ok(())
}

async fn row(conn: &mut Conn, id: &str) -> Result<HostRow, ApiError> {
    let rows = inventory::rows(conn).await?;
    let found = rows.into_iter().find(|row| row.id == id);
    found.ok_or_else(|| ApiError::NotFound("There is no such host.".into()))
}

async fn found(conn: &mut Conn, id: &str) -> Result<Value, ApiError> {
    document(&row(conn, id).await?)
}

fn document(row: &HostRow) -> Result<Value, ApiError> {
    let view = row.view()?;
    let amounts =
        |of: Resources| json!({"vcpus": of.vcpus, "memory_mib": of.memory_mib, "disk_gib": of.disk_gib});
    let (mut has, mut usage) = (amounts(view.capacity), amounts(view.used));
    has["kernel"] = json!(row.kernel);
    has["version"] = json!(row.version);
    has["traits"] = json!(view.traits);
    usage["servers"] = json!(view.servers);
    Ok(json!({
        "id": row.id, "name": row.name, "availability_zone": row.availability_zone,
        "state": if view.up { "up" } else { "down" }, "enabled": row.enabled,
        "inventory": has, "usage": usage,
    }))
}

/// `GET /scheduler`.
pub(super) async fn policy(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let policy = inventory::policy(&mut *app.db.acquire().await?).await?;
    Ok(Json(json!({"policy": policy.name()})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyBody {
    policy: String,
}

/// `PUT /scheduler`.
pub(super) async fn set_policy(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<PolicyBody>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let policy = Policy::from_name(&body.policy).ok_or_else(|| {
        let names = Policy::ALL.map(Policy::name).join(", ");
        ApiError::BadRequest(format!("There is no such policy; there are: {names}."))
    })?;
    let mut tx = app.begin().await?;
    inventory::set_policy(&mut tx, policy).await?;
    tx.commit().await?;
    Ok(Json(json!({"policy": policy.name()})))
}

fn short(field: &str, text: &str) -> Result<(), ApiError> {
    match text.len() > MAX_TEXT {
        true => Err(ApiError::BadRequest(format!("{field}: {MAX_TEXT} bytes at most."))),
        false => Ok(()),
    }
}
