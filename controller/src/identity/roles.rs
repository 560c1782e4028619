//! `/v3/roles`: roles of the whole cloud.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{MAX_LIST, bootstrap::ROLES, fields::Fields, list, new_id, not_found};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// A stored role.
#[derive(Debug, sqlx::FromRow)]
pub struct RoleRow {
    id: String,
    name: String,
    description: String,
}

impl RoleRow {
    /// As Keystone shows it.
    pub fn json(&self, app: &App) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "domain_id": null,
            "description": self.description,
            "options": {},
            "links": {"self": format!("{}/identity/v3/roles/{}", app.config.public_url, self.id)},
        })
    }
}

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/roles", get(index).post(create))
        .route("/v3/roles/{id}", get(show).patch(update).delete(delete))
}

async fn find(conn: &mut Conn, id: &str) -> Result<RoleRow, ApiError> {
    sqlx::query_as("SELECT * FROM roles WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("role", id))
}

async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let rows: Vec<RoleRow> =
        match params.get("domain_id") {
            // Roles that belong to a domain: there are none.
            Some(domain) if !domain.is_empty() && domain != "null" => Vec::new(),
            _ => sqlx::query_as(
                "SELECT * FROM roles WHERE (CAST($1 AS TEXT) IS NULL OR name = $1) ORDER BY name LIMIT $2",
            )
            .bind(params.get("name"))
            .bind(MAX_LIST + 1)
            .fetch_all(&app.db)
            .await?,
        };
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "roles", "/v3/roles", items)))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    ctx.require_admin()?;
    let mut fields = Fields::of(body, "role")?;
    let row = RoleRow {
        id: new_id(),
        name: fields.name()?.ok_or_else(|| ApiError::BadRequest("A role needs a name.".into()))?,
        description: fields.text("description")?.unwrap_or_default(),
    };
    fields.no_options()?;
    if fields.text("domain_id")?.is_some() {
        return Err(ApiError::BadRequest("Roles of a domain are not supported.".into()));
    }
    fields.nothing_else()?;
    let mut tx = app.begin().await?;
    sqlx::query("INSERT INTO roles (id, name, description) VALUES ($1, $2, $3)")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"role": row.json(&app)}))))
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!("Conflict occurred: there is already a role named {name:?}.")),
        false => error.into(),
    }
}

async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let row = find(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"role": row.json(&app)})))
}

/// The roles that Mote's own rules name can't be renamed or deleted: that would lock everybody out.
fn require_not_built_in(row: &RoleRow) -> Result<(), ApiError> {
    match ROLES.contains(&row.name.as_str()) {
        true => Err(ApiError::Forbidden(format!("The role {} is built in and can't be changed.", row.name))),
        false => Ok(()),
    }
}

async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut fields = Fields::of(body, "role")?;
    let mut tx = app.begin().await?;
    let mut row = find(&mut tx, &id).await?;
    if let Some(name) = fields.name()?
        && name != row.name
    {
        require_not_built_in(&row)?;
        row.name = name;
    }
    row.description = fields.text("description")?.unwrap_or(row.description);
    fields.no_options()?;
    fields.nothing_else()?;
    sqlx::query("UPDATE roles SET name = $2, description = $3 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"role": row.json(&app)})))
}

async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    require_not_built_in(&find(&mut tx, &id).await?)?;
    sqlx::query("DELETE FROM roles WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
