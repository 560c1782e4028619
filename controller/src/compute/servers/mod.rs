//! Servers.
//!
//! | Call | |
//! |---|---|
//! | `POST /servers` | make some ([`create`]; what the body may say is in [`input`]) |
//! | `GET /servers`, `/servers/detail` | lists ([`list`]) |
//! | `GET`, `PUT`, `DELETE /servers/{id}` | show, change what is only told, delete |
//! | `POST /servers/{id}/action` | all that is done to one ([`actions`]) |
//! | `/servers/{id}/ips`, `/metadata`, … | parts of one ([`parts`], [`tags`], [`interfaces`]) |
//! | `/servers/{id}/remote-consoles` | the serial console ([`consoles`]) |
//! | `/servers/{id}/os-instance-actions`, `/diagnostics`, … | what was done to it and what it uses ([`records`]) |
//!
//! Handlers write what is wanted; [`super::state`] makes of hosts' reports what is.

use axum::{
    Router,
    extract::{Path, State},
    response::Response,
    routing::{get, post},
};
use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

mod actions;
mod consoles;
mod create;
mod details;
pub(crate) mod guest;
pub(super) mod input;
mod interfaces;
mod list;
pub(crate) mod local;
mod parts;
pub(super) mod records;
mod row;
mod tags;
#[cfg(test)]
mod tests;
mod view;

use super::{state::TaskState, versions::Version};
use crate::{
    app::App,
    db::{Conn, now_us},
    hosts,
    http::{
        context::Ctx,
        error::ApiError,
        json::{JsonBody, answer},
    },
    image::blobs,
    network::ports::server,
};
use details::Details;
use guest::DiskConfig;
use input::{Access, Fields};
use row::ServerRow;
use view::Form;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers", get(list::brief).post(create::create))
        .route("/servers/detail", get(list::detail))
        .route("/servers/{id}", get(show).put(update).delete(delete))
        .route("/servers/{id}/action", post(actions::act))
        .merge(parts::routes())
        .merge(tags::routes())
        .merge(interfaces::routes())
        .merge(records::routes())
        .merge(consoles::routes())
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, &ctx, &id).await?;
    whole(&app, &mut db, &ctx, (version, Form::Single), &row).await
}

/// Whether there is such a server that the asker may see.
///
/// # Errors
/// 404 if not.
pub(super) async fn exists(app: &App, ctx: &Ctx, id: &str) -> Result<(), ApiError> {
    row::visible(&mut *app.db.acquire().await?, ctx, id).await.map(drop)
}

/// `{"server": …}`.
#[derive(Debug, Serialize)]
struct Whole<'a> {
    server: view::Document<'a>,
}

async fn whole(
    app: &App,
    db: &mut Conn,
    ctx: &Ctx,
    form: (Version, Form),
    row: &ServerRow,
) -> Result<Response, ApiError> {
    let details = Details::of(db, &row.id).await?;
    answer(&Whole { server: view::document(app, ctx, form, row, &details)? })
}

/// A new display name, description (2.19) or host name (2.90); addresses by which it is reached, and its disk's configuration. A new name leaves the guest's host name as it is.
async fn update(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Response, ApiError> {
    ctx.require_writer()?;
    let mut fields = Fields::open(body, "server", &[])?;
    let name = fields.has("name").then(|| input::server_name(&mut fields)).transpose()?;
    // `null` takes a description away.
    let described = version.has(19) && fields.contains("description");
    let description = if described { input::description(&mut fields)? } else { None };
    let hostname = if version.has(90) { input::hostname(&mut fields)? } else { None };
    let (access, disk_config) = (Access::take(&mut fields)?, DiskConfig::take(&mut fields)?);
    fields.finish()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, &ctx, &id).await?;
    sqlx::query(
        "UPDATE servers SET name = COALESCE($2, name), description = $3, hostname = COALESCE($4, hostname),
             updated_us = $5, access_ipv4 = COALESCE($6, access_ipv4), access_ipv6 = COALESCE($7, access_ipv6),
             disk_config = COALESCE($8, disk_config) WHERE id = $1",
    )
    .bind(&row.id)
    .bind(name)
    .bind(if described { &description } else { &row.description })
    .bind(hostname)
    .bind(now_us())
    .bind(access.ipv4)
    .bind(access.ipv6)
    .bind(disk_config.map(DiskConfig::word))
    .execute(&mut *tx)
    .await?;
    let touched = match &row.host_id {
        Some(host) => Some(hosts::touch(&mut tx, host).await?.0),
        None => None,
    };
    let row = row::visible(&mut tx, &ctx, &id).await?;
    let document = whole(&app, &mut tx, &ctx, (version, Form::Updated), &row).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(document)
}

async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_writer()?;
    remove(&app, &ctx, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A server with a host goes when its host has removed it; one without goes at once.
async fn remove(app: &App, ctx: &Ctx, id: &str) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, ctx, id).await?;
    actions::check_lock(ctx, &row)?;
    if row.deleting {
        return Ok(());
    }
    let Some(host) = &row.host_id else {
        row::record_action(&mut tx, ctx, &row.id, "delete").await?;
        let mut released = hosts::finish_deletion(&mut tx, &app.config, &row.id).await?;
        if let Some(image) = &row.shelved_image_id {
            let digest: Option<Option<String>> =
                sqlx::query_scalar("SELECT sha256 FROM images WHERE id = $1")
                    .bind(image)
                    .fetch_optional(&mut *tx)
                    .await?;
            released.extend(digest.flatten());
            actions::remove_image(&mut tx, &row).await?;
        }
        tx.commit().await?;
        blobs::release(app, &released).await?;
        return Ok(());
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
    row::record_action(&mut tx, ctx, &row.id, "delete").await?;
    tx.commit().await?;
    app.hub.wake(touched);
    app.hub.wake_all(others);
    Ok(())
}
