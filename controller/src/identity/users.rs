//! `/v3/users`.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    MAX_LIST, assignments, auth, begin,
    fields::{Fields, merge_extra, with_extra},
    list, new_id, not_found, projects,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// A stored user. (FromRow takes the columns that are named here, and no others.)
#[derive(Debug, sqlx::FromRow)]
struct UserRow {
    id: String,
    domain_id: String,
    name: String,
    enabled: bool,
    default_project_id: Option<String>,
    password_hash: Option<String>,
    password_changed_us: Option<i64>,
    tokens_valid_from_us: i64,
    extra: String,
}

impl UserRow {
    fn json(&self, app: &App) -> Value {
        let own = json!({
            "id": self.id,
            "name": self.name,
            "domain_id": self.domain_id,
            "enabled": self.enabled,
            "default_project_id": self.default_project_id,
            "password_expires_at": null,
            "options": {},
            "links": {"self": format!("{}/identity/v3/users/{}", app.config.public_url, self.id)},
        });
        with_extra(&self.extra, own)
    }

    /// Takes from the fields what may be changed; tokens of a user who is disabled end for good.
    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        if let Some(name) = fields.name()? {
            self.name = name;
        }
        if let Some(project) = fields.nullable_text("default_project_id")? {
            self.default_project_id = project;
        }
        let enabled = fields.boolean("enabled")?.unwrap_or(self.enabled);
        if self.enabled && !enabled {
            self.tokens_valid_from_us = db::now_us();
        }
        self.enabled = enabled;
        self.extra = merge_extra(&self.extra, fields.rest()?);
        Ok(())
    }

    /// A new password ends all tokens so far.
    fn set_password(&mut self, hash: String) {
        let now = db::now_us();
        self.password_hash = Some(hash);
        self.password_changed_us = Some(now);
        self.tokens_valid_from_us = now;
    }
}

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/users", get(index).post(create))
        .route("/v3/users/{user}", get(show).patch(update).delete(delete))
        .route("/v3/users/{user}/password", post(change_password))
        .route("/v3/users/{user}/projects", get(projects_of))
}

async fn find(conn: &mut Conn, id: &str) -> Result<UserRow, ApiError> {
    sqlx::query_as("SELECT * FROM users WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("user", id))
}

/// 404 unless the user exists.
///
/// # Errors
/// 404.
pub async fn require(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    find(conn, id).await.map(drop)
}

/// The members of a group, as Keystone shows them.
///
/// # Errors
/// Of the database.
pub async fn of_group(
    app: &App,
    conn: &mut Conn,
    group: &str,
    params: &Params,
) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<UserRow> = sqlx::query_as(
        "SELECT u.* FROM users u JOIN group_members m ON m.user_id = u.id
         WHERE m.group_id = $1 AND (CAST($2 AS TEXT) IS NULL OR u.name = $2) ORDER BY u.name, u.id LIMIT $3",
    )
    .bind(group)
    .bind(params.get("name"))
    .bind(MAX_LIST + 1)
    .fetch_all(conn)
    .await?;
    Ok(rows.iter().map(|row| row.json(app)).collect())
}

async fn index(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let rows: Vec<UserRow> = sqlx::query_as(
        "SELECT * FROM users WHERE (CAST($1 AS TEXT) IS NULL OR name = $1)
         AND (CAST($2 AS TEXT) IS NULL OR domain_id = $2)
         AND (CAST($3 AS BOOLEAN) IS NULL OR enabled = $3) ORDER BY name, id LIMIT $4",
    )
    .bind(params.get("name"))
    .bind(params.get("domain_id"))
    .bind(params.boolean("enabled")?)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "users", "/v3/users", items)))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "user")?;
    let password = fields.text("password")?;
    let mut row = UserRow {
        id: new_id(),
        domain_id: fields.text("domain_id")?.unwrap_or_else(|| projects::own_domain(&ctx)),
        name: String::new(),
        enabled: true,
        default_project_id: None,
        password_hash: None,
        password_changed_us: None,
        tokens_valid_from_us: 0,
        extra: "{}".into(),
    };
    row.apply(fields)?;
    if row.name.is_empty() {
        return Err(ApiError::BadRequest("A user needs a name.".into()));
    }
    if let Some(password) = password {
        row.set_password(new_hash(&app, &password).await?);
    }
    let mut tx = app.begin().await?;
    projects::require_domain(&mut tx, &row.domain_id).await?;
    sqlx::query(
        "INSERT INTO users (id, domain_id, name, enabled, default_project_id, password_hash,
                            password_changed_us, tokens_valid_from_us, extra)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(&row.id)
    .bind(&row.domain_id)
    .bind(&row.name)
    .bind(row.enabled)
    .bind(&row.default_project_id)
    .bind(&row.password_hash)
    .bind(row.password_changed_us)
    .bind(row.tokens_valid_from_us)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"user": row.json(&app)}))))
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "Conflict occurred: there is already a user named {name:?} in this domain."
        )),
        false => error.into(),
    }
}

async fn show(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = find(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"user": row.json(&app)})))
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "user")?;
    // Hashed before the transaction: nobody else's write waits for it.
    let hash = match fields.text("password")? {
        Some(password) => Some(new_hash(&app, &password).await?),
        None => None,
    };
    let mut tx = begin(&app).await?;
    let mut row = find(&mut tx, &id).await?;
    fields.unchanged("domain_id", &row.domain_id)?;
    row.apply(fields)?;
    if let Some(hash) = hash {
        row.set_password(hash);
    }
    store(&mut tx, &row).await?;
    tx.commit().await?;
    Ok(Json(json!({"user": row.json(&app)})))
}

async fn store(conn: &mut Conn, row: &UserRow) -> Result<(), ApiError> {
    sqlx::query(
        "UPDATE users SET name = $2, enabled = $3, default_project_id = $4, password_hash = $5,
             password_changed_us = $6, tokens_valid_from_us = $7, extra = $8 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.name)
    .bind(row.enabled)
    .bind(&row.default_project_id)
    .bind(&row.password_hash)
    .bind(row.password_changed_us)
    .bind(row.tokens_valid_from_us)
    .bind(&row.extra)
    .execute(conn)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    Ok(())
}

/// Role assignments go with the user.
async fn delete(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    find(&mut tx, &id).await?;
    remove(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a user with all that is its own.
///
/// # Errors
/// Of the database.
pub(super) async fn remove(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    assignments::forget(conn, "user", id).await?;
    sqlx::query("DELETE FROM users WHERE id = $1").bind(id).execute(conn).await?;
    Ok(())
}

/// The hash of a new password that keeps the rules.
async fn new_hash(app: &App, password: &str) -> Result<String, ApiError> {
    let least = app.config.password_min_chars;
    if password.chars().count() < least {
        return Err(ApiError::BadRequest(format!("A password must have at least {least} characters.")));
    }
    app.identity.passwords.hash(password).await
}

#[derive(Debug, Deserialize)]
struct PasswordChange {
    user: Passwords,
}

#[derive(Debug, Deserialize)]
struct Passwords {
    original_password: String,
    password: String,
}

/// A user's own change: the old password is the proof, as in Keystone; a token is not needed.
async fn change_password(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PasswordChange>,
) -> Result<StatusCode, ApiError> {
    let passwords = &app.identity.passwords;
    let before: Option<(Option<String>, i64, i64)> =
        sqlx::query_as("SELECT password_hash, failed_logins, failed_us FROM users WHERE id = $1 AND enabled")
            .bind(&id)
            .fetch_optional(&app.db)
            .await?;
    let locked = before.as_ref().is_some_and(|(_, count, us)| auth::is_locked(&app, *count, *us));
    let before = before.and_then(|(hash, ..)| hash).filter(|_| !locked);
    let fits = passwords.verify(&body.user.original_password, before.as_deref()).await?;
    if !locked {
        auth::count_failures(&app, &id, fits).await?;
    }
    if !fits {
        return Err(ApiError::Unauthorized);
    }
    if body.user.password == body.user.original_password {
        return Err(ApiError::BadRequest("The new password must not be the old one.".into()));
    }
    let hash = new_hash(&app, &body.user.password).await?;
    let mut tx = begin(&app).await?;
    let mut row = find(&mut tx, &id).await?;
    // Somebody else may have set another one meanwhile, to which the proof does not apply.
    if row.password_hash != before || !row.enabled {
        return Err(ApiError::Unauthorized);
    }
    row.set_password(hash);
    store(&mut tx, &row).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn projects_of(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    find(&mut *app.db.acquire().await?, &id).await?;
    let items = projects::of_user(&app, &id, false).await?;
    Ok(Json(list(&app, "projects", &format!("/v3/users/{id}/projects"), items)))
}
