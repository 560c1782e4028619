//! Tags of servers (2.26).

use axum::{
    Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::{super::versions::Version, actions::check_lock, input, row};
use crate::{
    app::App,
    db::{Conn, Tx, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// The microversion that brought them.
const SINCE: u16 = 26;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers/{id}/tags", get(list).put(replace).delete(clear))
        .route("/servers/{id}/tags/{tag}", get(check).put(add).delete(remove))
}

/// Of one server, in their order.
pub(super) async fn of_server(db: &mut Conn, id: &str) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT tag FROM server_tags WHERE server_id = $1 ORDER BY tag";
    Ok(sqlx::query_scalar(sql).bind(id).fetch_all(db).await?)
}

fn known(version: Version) -> Result<(), ApiError> {
    match version.has(SINCE) {
        true => Ok(()),
        false => Err(ApiError::NotFound("The resource could not be found.".into())),
    }
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    known(version)?;
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, &ctx, &id).await?;
    Ok(Json(json!({"tags": of_server(&mut db, &row.id).await?})))
}

async fn check(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    known(version)?;
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, &ctx, &id).await?;
    match of_server(&mut db, &row.id).await?.contains(&tag) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(no_tag(&row.id, &tag)),
    }
}

fn no_tag(id: &str, tag: &str) -> ApiError {
    let tag: String = tag.chars().take(64).collect();
    ApiError::NotFound(format!("Server {id} has no tag '{tag}'"))
}

/// A server whose tags may be changed.
async fn begin(app: &App, ctx: &Ctx, version: Version, id: &str) -> Result<(Tx, String), ApiError> {
    known(version)?;
    ctx.require_writer()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, ctx, id).await?;
    check_lock(ctx, &row)?;
    sqlx::query("UPDATE servers SET updated_us = $2 WHERE id = $1")
        .bind(&row.id)
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    Ok((tx, row.id))
}

async fn replace(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let list = match body.get("tags").cloned() {
        Some(Value::Array(list)) if body.as_object().is_some_and(|body| body.len() == 1) => list,
        _ => return Err(ApiError::BadRequest("The body must be {\"tags\": [\"…\"]}.".into())),
    };
    let tags = input::tags(list)?;
    let (mut tx, id) = begin(&app, &ctx, version, &id).await?;
    sqlx::query("DELETE FROM server_tags WHERE server_id = $1").bind(&id).execute(&mut *tx).await?;
    row::add_tags(&mut tx, &id, &tags).await?;
    let tags = of_server(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(Json(json!({ "tags": tags })))
}

async fn add(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path((id, tag)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let tag = input::tag(&tag)?;
    let (mut tx, id) = begin(&app, &ctx, version, &id).await?;
    let there = of_server(&mut tx, &id).await?;
    if there.contains(&tag) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    if there.len() >= input::MAX_TAGS {
        let most = input::MAX_TAGS;
        return Err(ApiError::BadRequest(format!("The number of tags exceeded the per-server limit {most}")));
    }
    row::add_tags(&mut tx, &id, std::slice::from_ref(&tag)).await?;
    tx.commit().await?;
    let mut response = StatusCode::CREATED.into_response();
    let location = format!("{}/compute/v2.1/servers/{id}/tags/{tag}", app.config.public_url);
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

async fn remove(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (mut tx, id) = begin(&app, &ctx, version, &id).await?;
    let gone = sqlx::query("DELETE FROM server_tags WHERE server_id = $1 AND tag = $2")
        .bind(&id)
        .bind(&tag)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(no_tag(&id, &tag));
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn clear(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let (mut tx, id) = begin(&app, &ctx, version, &id).await?;
    sqlx::query("DELETE FROM server_tags WHERE server_id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a request says of tags: `tags`, `tags-any`, `not-tags`, `not-tags-any`, each a list with commas.
#[derive(Debug, Default)]
pub(super) struct Filter {
    all: Vec<String>,
    any: Vec<String>,
    not_all: Vec<String>,
    not_any: Vec<String>,
}

impl Filter {
    pub(super) fn parse<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Self {
        let list = |name: &str| -> Vec<String> {
            get(name).map(|text| text.split(',').map(str::to_owned).collect()).unwrap_or_default()
        };
        Self {
            all: list("tags"),
            any: list("tags-any"),
            not_all: list("not-tags"),
            not_any: list("not-tags-any"),
        }
    }

    /// Whether it lets all pass.
    pub(super) fn is_empty(&self) -> bool {
        [&self.all, &self.any, &self.not_all, &self.not_any].into_iter().all(Vec::is_empty)
    }

    pub(super) fn pass(&self, tags: &[String]) -> bool {
        let has = |tag: &String| tags.contains(tag);
        self.all.iter().all(has)
            && (self.any.is_empty() || self.any.iter().any(has))
            && (self.not_all.is_empty() || !self.not_all.iter().all(has))
            && !self.not_any.iter().any(has)
    }
}
