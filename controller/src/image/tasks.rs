//! `/v2/tasks`: what became of imports. A task is a record of work that is done elsewhere ([`super::import`]); it can be
//! looked at, not made.

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};
use sqlx::QueryBuilder;

use super::{
    data::Upload,
    record::{self, Image},
};
use crate::{
    app::App,
    db::{self, Conn, Db},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// How long a task that has ended can be looked at (Glance's `task_time_to_live`: two days).
const KEPT_US: i64 = 48 * 3600 * 1_000_000;
/// Most tasks of a project that are kept.
const KEPT_OF_PROJECT: i64 = 1000;
/// Tasks on a page if the client doesn't say.
const DEFAULT_LIMIT: u64 = 25;
/// Most tasks on a page.
const MAX_LIMIT: u64 = 1000;
/// Longest message.
const MAX_MESSAGE_CHARS: usize = 1000;

#[derive(Debug, sqlx::FromRow)]
struct Task {
    id: String,
    image_id: String,
    owner: String,
    user_id: String,
    request_id: String,
    status: String,
    input: String,
    message: String,
    created_us: i64,
    updated_us: i64,
    expires_us: Option<i64>,
}

impl Task {
    /// As Glance lists it.
    fn brief(&self) -> Value {
        json!({
            "id": self.id,
            "type": "api_image_import",
            "status": self.status,
            "owner": self.owner,
            "image_id": self.image_id,
            "user_id": self.user_id,
            "request_id": self.request_id,
            "created_at": db::rfc3339_s(self.created_us),
            "updated_at": db::rfc3339_s(self.updated_us),
            "expires_at": self.expires_us.map(db::rfc3339_s),
            "self": format!("/v2/tasks/{}", self.id),
            "schema": "/v2/schemas/task",
        })
    }

    fn json(&self) -> Value {
        let mut task = self.brief();
        task["input"] = serde_json::from_str(&self.input).unwrap_or_default();
        task["result"] = match self.status.as_str() {
            "success" => json!({"image_id": self.image_id}),
            _ => Value::Null,
        };
        task["message"] = json!(self.message);
        task
    }
}

/// Writes a task for an upload, and gives its id.
///
/// # Errors
/// Of the database.
pub(super) async fn insert(
    tx: &mut Conn,
    ctx: &Ctx,
    image: &Image,
    upload_id: &str,
    input: &Value,
) -> Result<String, ApiError> {
    let now = db::now_us();
    sqlx::query(
        "DELETE FROM image_tasks WHERE expires_us < $1 OR (owner = $2 AND expires_us IS NOT NULL AND id NOT IN (
             SELECT id FROM image_tasks WHERE owner = $2 ORDER BY created_us DESC, id DESC LIMIT $3))",
    )
    .bind(now)
    .bind(&image.owner)
    .bind(KEPT_OF_PROJECT)
    .execute(&mut *tx)
    .await?;
    let id = uuid::Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO image_tasks (id, image_id, owner, user_id, request_id, upload_id, status, input, message, created_us,
             updated_us) VALUES ($1, $2, $3, $4, $5, $6, 'pending', $7, '', $8, $8)",
    )
    .bind(&id)
    .bind(&image.id)
    .bind(&image.owner)
    .bind(&ctx.user_id)
    .bind(&ctx.request_id)
    .bind(upload_id)
    .bind(input.to_string())
    .bind(now)
    .execute(tx)
    .await?;
    Ok(id)
}

/// The work on an upload has begun.
///
/// # Errors
/// Of the database.
pub(super) async fn begin(app: &App, upload: &Upload) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let sql = "UPDATE image_tasks SET status = 'processing', updated_us = $2 WHERE upload_id = $1 AND status = 'pending'";
    sqlx::query(sql).bind(&upload.upload_id).bind(db::now_us()).execute(&mut *tx).await?;
    Ok(tx.commit().await?)
}

/// The work on an upload has ended well, or with what went wrong.
///
/// # Errors
/// Of the database.
pub(super) async fn end(app: &App, upload: &Upload, failure: Option<&str>) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    set_ended(&mut tx, Some(&upload.upload_id), failure).await?;
    Ok(tx.commit().await?)
}

/// The work on an upload was broken off.
///
/// # Errors
/// Of the database.
pub(super) async fn fail(tx: &mut Conn, upload_id: Option<&str>, message: &str) -> Result<(), ApiError> {
    set_ended(tx, upload_id, Some(message)).await
}

async fn set_ended(tx: &mut Conn, upload_id: Option<&str>, failure: Option<&str>) -> Result<(), ApiError> {
    let now = db::now_us();
    let message: String = failure.unwrap_or_default().chars().take(MAX_MESSAGE_CHARS).collect();
    sqlx::query(
        "UPDATE image_tasks SET status = $2, message = $3, updated_us = $4, expires_us = $5
         WHERE upload_id = $1 AND status IN ('pending', 'processing')",
    )
    .bind(upload_id)
    .bind(if failure.is_some() { "failure" } else { "success" })
    .bind(message)
    .bind(now)
    .bind(now + KEPT_US)
    .execute(tx)
    .await?;
    Ok(())
}

/// `GET /v2/tasks`: those of the asker's project; all for administrators.
///
/// # Errors
/// 400 for impossible parameters.
pub async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let limit = params.number("limit")?.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT);
    let column = match params.get("sort_key").unwrap_or("created_at") {
        "created_at" => "created_us",
        "updated_at" => "updated_us",
        _ => return Err(ApiError::BadRequest("sort_key must be created_at or updated_at.".into())),
    };
    let (order, after) = match params.get("sort_dir").unwrap_or("desc") {
        "desc" => ("DESC", "<"),
        "asc" => ("ASC", ">"),
        _ => return Err(ApiError::BadRequest("sort_dir must be asc or desc.".into())),
    };
    let mut query = visible(&ctx);
    for (name, value) in params.iter() {
        let sql = match name {
            "limit" | "marker" | "sort_key" | "sort_dir" => continue,
            "type" if value == "api_image_import" => continue,
            "type" => " AND 'api_image_import' = ",
            "status" => " AND status = ",
            "owner" => " AND owner = ",
            "image_id" => " AND image_id = ",
            _ => {
                let name: String = name.chars().take(64).collect();
                return Err(ApiError::BadRequest(format!("Tasks can't be filtered by {name:?}.")));
            }
        };
        query.push(sql).push_bind(value.to_owned());
    }
    if let Some(marker) = params.get("marker") {
        let marker = find(&mut conn, marker, &ctx).await;
        let marker = marker.map_err(|_| ApiError::BadRequest("The marker is no task.".into()))?;
        let value = if column == "created_us" { marker.created_us } else { marker.updated_us };
        query.push(format!(" AND ({column}, id) {after} (")).push_bind(value);
        query.push(", ").push_bind(marker.id).push(")");
    }
    query.push(format!(" ORDER BY {column} {order}, id {order} LIMIT "));
    query.push_bind(i64::try_from(limit + 1).unwrap_or(i64::MAX));
    let mut tasks: Vec<Task> = query.build_query_as().fetch_all(&mut *conn).await?;
    let more = tasks.len() as u64 > limit;
    tasks.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let mut body = json!({
        "tasks": tasks.iter().map(Task::brief).collect::<Vec<_>>(),
        "first": params.link("/v2/tasks", None),
        "schema": "/v2/schemas/tasks",
    });
    if let (true, Some(last)) = (more, tasks.last()) {
        body["next"] = json!(params.link("/v2/tasks", Some(&last.id)));
    }
    Ok(Json(body))
}

fn visible(ctx: &Ctx) -> QueryBuilder<Db> {
    let mut query = QueryBuilder::<Db>::new("SELECT * FROM image_tasks WHERE (");
    query.push_bind(ctx.is_admin).push(" OR owner = ").push_bind(ctx.project_id.clone()).push(")");
    query
}

async fn find(conn: &mut Conn, id: &str, ctx: &Ctx) -> Result<Task, ApiError> {
    let mut query = visible(ctx);
    query.push(" AND id = ").push_bind(id.to_owned());
    let task: Option<Task> = query.build_query_as().fetch_optional(conn).await?;
    task.ok_or_else(|| ApiError::NotFound("There is no such task.".into()))
}

/// `GET /v2/tasks/{id}`.
///
/// # Errors
/// 404.
pub async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(find(&mut *app.db.acquire().await?, &id, &ctx).await?.json()))
}

/// `GET /v2/images/{id}/tasks`.
///
/// # Errors
/// 404 for an image that isn't the asker's to see.
pub async fn of_image(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let image = record::find(&mut conn, &id, &ctx).await?;
    let mut query = visible(&ctx);
    query.push(" AND image_id = ").push_bind(image.id).push(" ORDER BY created_us DESC, id DESC LIMIT ");
    query.push_bind(KEPT_OF_PROJECT);
    let tasks: Vec<Task> = query.build_query_as().fetch_all(&mut *conn).await?;
    Ok(Json(json!({"tasks": tasks.iter().map(Task::json).collect::<Vec<_>>()})))
}

/// `POST /v2/tasks`: Glance's first way to import, which nobody but administrators ever had.
///
/// # Errors
/// Always: 403 that says what to do instead.
pub async fn refuse(_ctx: Ctx) -> ApiError {
    let text = "Tasks can't be made by hand: import an image by POST /v2/images/{image_id}/import.";
    ApiError::Forbidden(text.into())
}
