//! `/v3/domains`.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    MAX_LIST, assignments, begin,
    fields::{Fields, merge_extra, with_extra},
    groups, list, new_id, not_found, projects, users,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
    policy,
};

/// The domain that always exists.
pub const DEFAULT_DOMAIN: &str = "default";

/// A stored domain.
#[derive(Debug, sqlx::FromRow)]
pub struct DomainRow {
    id: String,
    name: String,
    description: String,
    enabled: bool,
    extra: String,
}

impl DomainRow {
    /// As Keystone shows it.
    pub fn json(&self, app: &App) -> Value {
        let own = json!({
            "id": self.id,
            "name": self.name,
            "description": self.description,
            "enabled": self.enabled,
            "options": {},
            "tags": [],
            "links": {"self": format!("{}/identity/v3/domains/{}", app.config.public_url, self.id)},
        });
        with_extra(&self.extra, own)
    }
}

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/domains", get(index).post(create))
        .route("/v3/domains/{id}", get(show).patch(update).delete(delete))
}

async fn find(conn: &mut Conn, id: &str) -> Result<DomainRow, ApiError> {
    sqlx::query_as("SELECT * FROM domains WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("domain", id))
}

async fn index(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let rows: Vec<DomainRow> = sqlx::query_as(
        "SELECT * FROM domains WHERE (CAST($1 AS TEXT) IS NULL OR name = $1)
         AND (CAST($2 AS BOOLEAN) IS NULL OR enabled = $2) ORDER BY name LIMIT $3",
    )
    .bind(params.get("name"))
    .bind(params.boolean("enabled")?)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "domains", "/v3/domains", items)))
}

async fn create(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "domain")?;
    let row = DomainRow {
        id: new_id(),
        name: fields.short_name()?.ok_or_else(|| ApiError::BadRequest("A domain needs a name.".into()))?,
        description: fields.text("description")?.unwrap_or_default(),
        enabled: fields.boolean("enabled")?.unwrap_or(true),
        extra: merge_extra("{}", without_tags(fields)?.rest_of("")?),
    };
    let mut tx = app.begin().await?;
    sqlx::query("INSERT INTO domains (id, name, description, enabled, extra) VALUES ($1, $2, $3, $4, $5)")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(row.enabled)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"domain": row.json(&app)}))))
}

/// Domains have no tags here; the table of bodies lets an empty list in.
fn without_tags(mut fields: Fields) -> Result<Fields, ApiError> {
    fields.texts("tags").map(|_| fields)
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!("Conflict occurred: there is already a domain named {name:?}.")),
        false => error.into(),
    }
}

async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if ctx.user_domain_id != id && ctx.project_domain_id.as_deref() != Some(&id) && !policy::may_read(&ctx) {
        return Err(ApiError::Forbidden("Policy does not allow this: it is another domain.".into()));
    }
    let row = find(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"domain": row.json(&app)})))
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "domain")?;
    let mut tx = begin(&app).await?;
    let mut row = find(&mut tx, &id).await?;
    row.name = fields.short_name()?.unwrap_or(row.name);
    row.description = fields.text("description")?.unwrap_or(row.description);
    row.enabled = fields.boolean("enabled")?.unwrap_or(row.enabled);
    if row.id == DEFAULT_DOMAIN && !row.enabled {
        return Err(ApiError::Forbidden("The default domain can't be disabled.".into()));
    }
    row.extra = merge_extra(&row.extra, without_tags(fields)?.rest_of(&row.id)?);
    sqlx::query("UPDATE domains SET name = $2, description = $3, enabled = $4, extra = $5 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(row.enabled)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"domain": row.json(&app)})))
}

/// Only a disabled domain, with all its projects, users and groups, as in Keystone; unlike there, not while a project owns
/// something: nobody could see or delete that any more.
async fn delete(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    let row = find(&mut tx, &id).await?;
    if row.enabled {
        return Err(ApiError::Forbidden(
            "Cannot delete a domain that is enabled, please disable it first.".into(),
        ));
    }
    for project in within(&mut tx, "SELECT id FROM projects WHERE domain_id = $1", &id).await? {
        projects::remove(&mut tx, &project).await?;
    }
    for user in within(&mut tx, "SELECT id FROM users WHERE domain_id = $1", &id).await? {
        users::remove(&mut tx, &user).await?;
    }
    for group in within(&mut tx, "SELECT id FROM groups WHERE domain_id = $1", &id).await? {
        groups::delete_row(&mut tx, &group).await?;
    }
    assignments::forget(&mut tx, "domain", &id).await?;
    sqlx::query("DELETE FROM domains WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn within(conn: &mut Conn, sql: &'static str, domain: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(sql).bind(domain).fetch_all(conn).await
}
