//! Servers.
//!
//! | Call | |
//! |---|---|
//! | `POST /servers` | make some ([`create`]; what the body may say is in [`input`]) |
//! | `GET /servers`, `/servers/detail` | lists ([`list`]) |
//! | `GET`, `PUT`, `DELETE /servers/{id}` | show, rename, delete |
//! | `POST /servers/{id}/action` | start, stop, reboot, console log ([`actions`]) |
//! | `GET /servers/{id}/ips`, `/metadata`, `/os-interface`, `/os-instance-actions`, … | parts of one ([`parts`]) |
//!
//! Handlers write what is wanted; [`super::state`] makes of hosts' reports what is.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use http::StatusCode;
use serde_json::{Value, json};

mod actions;
mod create;
mod input;
mod list;
mod parts;
mod row;
#[cfg(test)]
mod tests;
mod view;

use super::state::TaskState;
use crate::{
    app::App,
    db::now_us,
    hosts,
    http::{context::Ctx, error::ApiError, json::JsonBody},
    image::blobs,
    network::ports::server,
};
use input::Fields;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers", get(list::brief).post(create::create))
        .route("/servers/detail", get(list::detail))
        .route("/servers/{id}", get(show).put(rename).delete(delete))
        .route("/servers/{id}/action", post(actions::act))
        .merge(parts::routes())
}

async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, &ctx, &id).await?;
    let addresses = server::addresses(&mut db, Some(&row.id), None).await?;
    Ok(Json(json!({"server": view::document(&app, &ctx, &row, &addresses)?})))
}

/// A new display name. The guest's host name stays; its metadata tells the new name.
async fn rename(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_writer()?;
    let mut fields = Fields::open(body, "server", &[])?;
    let name = input::server_name(&mut fields)?;
    fields.finish()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, &ctx, &id).await?;
    sqlx::query("UPDATE servers SET name = $2, updated_us = $3 WHERE id = $1")
        .bind(&row.id)
        .bind(name)
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    let touched = match &row.host_id {
        Some(host) => Some(hosts::touch(&mut tx, host).await?.0),
        None => None,
    };
    let row = row::visible(&mut tx, &ctx, &id).await?;
    let addresses = server::addresses(&mut tx, Some(&row.id), None).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(Json(json!({"server": view::document(&app, &ctx, &row, &addresses)?})))
}

/// A server with a host goes when its host has removed it; one without goes at once.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_writer()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, &ctx, &id).await?;
    if row.deleting {
        return Ok(StatusCode::NO_CONTENT);
    }
    let Some(host) = &row.host_id else {
        let released = hosts::finish_deletion(&mut tx, &row.id).await?;
        tx.commit().await?;
        blobs::release(&app, &released).await?;
        return Ok(StatusCode::NO_CONTENT);
    };
    let others = server::touch_others(&mut tx, &row.id).await?;
    let (touched, generation) = hosts::touch(&mut tx, host).await?;
    sqlx::query(
        "UPDATE servers SET deleting = TRUE, task_state = $2, changed_generation = $3, updated_us = $4 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(TaskState::Deleting.word())
    .bind(generation)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    row::record_action(&mut tx, &ctx, &row.id, "delete").await?;
    tx.commit().await?;
    app.hub.wake(touched);
    app.hub.wake_all(others);
    Ok(StatusCode::NO_CONTENT)
}
