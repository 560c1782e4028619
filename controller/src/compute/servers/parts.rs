//! Parts of one server: addresses, metadata.

use crate::db::Conn;
use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    actions::check_lock,
    details::Details,
    input::{self, Fields},
    row::{self, ServerRow},
    view,
};
use crate::{
    app::App,
    db::now_us,
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError, json::JsonBody},
    network::ports::server,
};

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers/{id}/ips", get(ips))
        .route("/servers/{id}/ips/{network}", get(ips_of))
        .route("/servers/{id}/metadata", get(metadata).post(add_metadata).put(replace_metadata))
        .route(
            "/servers/{id}/metadata/{key}",
            get(metadata_item).put(set_metadata_item).delete(delete_metadata_item),
        )
        .route("/servers/{id}/os-volume_attachments", get(volumes))
        .route("/servers/{id}/os-security-groups", get(security_groups))
}

type Id = Path<String>;

async fn find(app: &App, ctx: &Ctx, id: &str) -> Result<Details, ApiError> {
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, ctx, id).await?;
    Details::of(&mut db, &row.id).await
}

async fn ips(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    let details = find(&app, &ctx, &id).await?;
    Ok(Json(json!({"addresses": view::addresses(&details.addresses, false)})))
}

async fn ips_of(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, network)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let details = find(&app, &ctx, &id).await?;
    match view::addresses(&details.addresses, false).get(network.as_str()) {
        None => Err(ApiError::NotFound("Instance is not a member of specified network".into())),
        Some(list) => Ok(Json(json!({ network: list }))),
    }
}

async fn volumes(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    find(&app, &ctx, &id).await?;
    Ok(Json(json!({"volumeAttachments": []})))
}

async fn security_groups(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    find(&app, &ctx, &id).await?;
    let groups = server::groups(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({ "security_groups": groups })))
}

async fn metadata(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    let row = row::visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    Ok(Json(json!({"metadata": row.metadata()?})))
}

async fn metadata_item(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let row = row::visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    let value = row.metadata()?.remove(&key).ok_or_else(no_item)?;
    Ok(Json(json!({"meta": {key: value}})))
}

fn no_item() -> ApiError {
    ApiError::NotFound("Metadata item was not found".into())
}

type Items = BTreeMap<String, String>;

/// `{"metadata": {…}}`.
fn items(body: Value) -> Result<Items, ApiError> {
    input::metadata(Some(Value::Object(Fields::open(body, "metadata", &[])?.into_inner())))
}

async fn add_metadata(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let new = items(body)?;
    let all = change(&app, &ctx, &id, |mut all| {
        all.extend(new);
        Ok(all)
    });
    Ok(Json(json!({"metadata": all.await?})))
}

async fn replace_metadata(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let new = items(body)?;
    Ok(Json(json!({"metadata": change(&app, &ctx, &id, |_| Ok(new)).await?})))
}

async fn set_metadata_item(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let new = input::metadata(Some(Value::Object(Fields::open(body, "meta", &[])?.into_inner())))?;
    if new.len() != 1 || !new.contains_key(&key) {
        return Err(ApiError::BadRequest("Request body and URI mismatch".into()));
    }
    let meta = json!({"meta": new});
    change(&app, &ctx, &id, |mut all| {
        all.extend(new);
        Ok(all)
    })
    .await?;
    Ok(Json(meta))
}

async fn delete_metadata_item(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    change(&app, &ctx, &id, |mut all| {
        all.remove(&key).ok_or_else(no_item)?;
        Ok(all)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes the metadata; its host hears of it, since guests read it and the restart policy is part of it.
async fn change(
    app: &App,
    ctx: &Ctx,
    id: &str,
    how: impl FnOnce(Items) -> Result<Items, ApiError>,
) -> Result<Items, ApiError> {
    ctx.require_writer()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, ctx, id).await?;
    check_lock(ctx, &row)?;
    let items = how(row.metadata()?)?;
    input::check_count(&items)?;
    let touched = write_metadata(&mut tx, &row, &items).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(items)
}

async fn write_metadata(tx: &mut Conn, row: &ServerRow, items: &Items) -> Result<Option<Touched>, ApiError> {
    sqlx::query("UPDATE servers SET metadata = $2, restart_policy = $3, updated_us = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(serde_json::to_string(items).map_err(ApiError::internal)?)
        .bind(input::restart_policy(items)?)
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    match &row.host_id {
        Some(host) => Ok(Some(hosts::touch(tx, host).await?.0)),
        None => Ok(None),
    }
}
