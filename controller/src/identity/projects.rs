//! `/v3/projects`. Projects are flat: the parent of each is its domain.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    MAX_LIST,
    fields::{Fields, invalid, merge_extra},
    list, new_id, not_found,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Most tags of a project (Keystone's limit).
const MAX_TAGS: usize = 80;
/// Longest tag in characters (Keystone's limit).
const MAX_TAG_CHARS: usize = 255;

/// A stored project.
#[derive(Debug, sqlx::FromRow)]
struct ProjectRow {
    id: String,
    domain_id: String,
    name: String,
    description: String,
    enabled: bool,
    tags: String,
    extra: String,
}

impl ProjectRow {
    fn json(&self, app: &App) -> Value {
        let mut project: Map<String, Value> = serde_json::from_str(&self.extra).unwrap_or_default();
        let own = json!({
            "id": self.id,
            "name": self.name,
            "domain_id": self.domain_id,
            "parent_id": self.domain_id,
            "is_domain": false,
            "description": self.description,
            "enabled": self.enabled,
            "tags": serde_json::from_str::<Value>(&self.tags).unwrap_or_else(|_| json!([])),
            "options": {},
            "links": {"self": format!("{}/identity/v3/projects/{}", app.config.public_url, self.id)},
        });
        if let Value::Object(own) = own {
            project.extend(own);
        }
        Value::Object(project)
    }

    /// Takes from the fields what may be changed.
    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        if let Some(name) = fields.name()? {
            self.name = name;
        }
        if let Some(description) = fields.nullable_text("description")? {
            self.description = description.unwrap_or_default();
        }
        self.enabled = fields.boolean("enabled")?.unwrap_or(self.enabled);
        if let Some(tags) = fields.texts("tags")? {
            self.tags = checked_tags(tags)?;
        }
        if fields.boolean("is_domain")? == Some(true) {
            return Err(invalid("is_domain", "can't be true: use /v3/domains"));
        }
        match fields.text("parent_id")? {
            Some(parent) if parent != self.domain_id => {
                return Err(invalid("parent_id", "must be the project's domain: projects can't be nested"));
            }
            _ => {}
        }
        fields.no_options()?;
        self.extra = merge_extra(&self.extra, fields.rest()?);
        Ok(())
    }
}

fn checked_tags(mut tags: Vec<String>) -> Result<String, ApiError> {
    tags.sort();
    tags.dedup();
    let bad =
        |tag: &String| tag.is_empty() || tag.chars().count() > MAX_TAG_CHARS || tag.contains([',', '/']);
    if tags.len() > MAX_TAGS || tags.iter().any(bad) {
        return Err(invalid(
            "tags",
            "must have at most 80 tags of 1 to 255 characters without comma and slash",
        ));
    }
    serde_json::to_string(&tags).map_err(ApiError::internal)
}

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/projects", get(index).post(create))
        .route("/v3/projects/{id}", get(show).patch(update).delete(delete))
}

async fn find(conn: &mut Conn, id: &str) -> Result<ProjectRow, ApiError> {
    sqlx::query_as("SELECT * FROM projects WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("project", id))
}

/// The projects in which a user has a role, as Keystone shows them.
///
/// # Errors
/// Of the database.
pub async fn of_user(app: &App, user_id: &str, only_enabled: bool) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<ProjectRow> = sqlx::query_as(
        "SELECT * FROM projects p WHERE (p.enabled OR NOT $2) AND EXISTS (
             SELECT 1 FROM role_assignments a
             WHERE a.user_id = $1 AND a.target_kind = 'project' AND a.target_id = p.id)
         ORDER BY p.name, p.id LIMIT $3",
    )
    .bind(user_id)
    .bind(only_enabled)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    Ok(rows.iter().map(|row| row.json(app)).collect())
}

async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    if params.flag("is_domain") {
        return Ok(Json(list(&app, "projects", "/v3/projects", Vec::new())));
    }
    let rows: Vec<ProjectRow> = sqlx::query_as(
        "SELECT * FROM projects WHERE (CAST($1 AS TEXT) IS NULL OR name = $1)
         AND (CAST($2 AS TEXT) IS NULL OR domain_id = $2) AND (CAST($3 AS TEXT) IS NULL OR domain_id = $3)
         AND (CAST($4 AS BOOLEAN) IS NULL OR enabled = $4) ORDER BY name, id LIMIT $5",
    )
    .bind(params.get("name"))
    .bind(params.get("domain_id"))
    .bind(params.get("parent_id"))
    .bind(params.boolean("enabled")?)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let wanted: Vec<&str> = params.get("tags").map(|tags| tags.split(',').collect()).unwrap_or_default();
    let items = rows
        .iter()
        .map(|row| row.json(&app))
        .filter(|project| {
            wanted.iter().all(|tag| project["tags"].as_array().is_some_and(|t| t.contains(&json!(tag))))
        })
        .collect();
    Ok(Json(list(&app, "projects", "/v3/projects", items)))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    ctx.require_admin()?;
    let mut fields = Fields::of(body, "project")?;
    let domain_id = fields.text("domain_id")?.unwrap_or_else(|| own_domain(&ctx));
    let mut row = ProjectRow {
        id: new_id(),
        domain_id,
        name: String::new(),
        description: String::new(),
        enabled: true,
        tags: "[]".into(),
        extra: "{}".into(),
    };
    row.apply(fields)?;
    if row.name.is_empty() {
        return Err(ApiError::BadRequest("A project needs a name.".into()));
    }
    let mut tx = app.begin().await?;
    require_domain(&mut tx, &row.domain_id).await?;
    insert(&mut tx, &row).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"project": row.json(&app)}))))
}

async fn insert(conn: &mut Conn, row: &ProjectRow) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO projects (id, domain_id, name, description, enabled, tags, extra)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&row.id)
    .bind(&row.domain_id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.tags)
    .bind(&row.extra)
    .execute(conn)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    Ok(())
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => {
            let text =
                format!("Conflict occurred: there is already a project named {name:?} in this domain.");
            ApiError::Conflict(text)
        }
        false => error.into(),
    }
}

/// Where new projects and users go if the request doesn't say: the domain of the token, as in Keystone.
pub fn own_domain(ctx: &Ctx) -> String {
    let scoped = ctx.domain_id.as_ref().or(ctx.project_domain_id.as_ref());
    scoped.unwrap_or(&ctx.user_domain_id).clone()
}

/// 404 unless the domain exists.
///
/// # Errors
/// 404.
pub async fn require_domain(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM domains WHERE id = $1)")
        .bind(id)
        .fetch_one(conn)
        .await?;
    there.then_some(()).ok_or_else(|| not_found("domain", id))
}

async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if ctx.project_id.as_deref() != Some(&id) {
        ctx.require_admin()?;
    }
    let row = find(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"project": row.json(&app)})))
}

async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut fields = Fields::of(body, "project")?;
    let mut tx = app.begin().await?;
    let mut row = find(&mut tx, &id).await?;
    fields.unchanged("domain_id", &row.domain_id)?;
    row.apply(fields)?;
    sqlx::query(
        "UPDATE projects SET name = $2, description = $3, enabled = $4, tags = $5, extra = $6 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.tags)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"project": row.json(&app)})))
}

/// Unlike Keystone, refuses while the project owns something: nobody could see or delete it any more.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    find(&mut tx, &id).await?;
    let owned: Option<String> = sqlx::query_scalar(
        "SELECT 'servers' FROM servers WHERE project_id = $1 UNION ALL
         SELECT 'networks' FROM networks WHERE project_id = $1 UNION ALL
         SELECT 'ports' FROM ports WHERE project_id = $1 UNION ALL
         SELECT 'images' FROM images WHERE owner = $1 LIMIT 1",
    )
    .bind(&id)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(what) = owned {
        return Err(ApiError::Conflict(format!("The project still owns {what}. Delete them first.")));
    }
    sqlx::query("DELETE FROM role_assignments WHERE target_kind = 'project' AND target_id = $1")
        .bind(&id)
        .execute(&mut *tx)
        .await?;
    sqlx::query("UPDATE users SET default_project_id = NULL WHERE default_project_id = $1")
        .bind(&id)
        .execute(&mut *tx)
        .await?;
    sqlx::query("DELETE FROM projects WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
