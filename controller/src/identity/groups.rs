//! `/v3/groups` and their members.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, patch, post, put},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    MAX_LIST, assignments, begin,
    fields::{Fields, merge_extra, with_extra},
    list, new_id, not_found, projects,
    resource::{self, Filters, Resource},
    users,
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// A stored group.
#[derive(Debug, sqlx::FromRow)]
struct GroupRow {
    id: String,
    domain_id: String,
    name: String,
    description: String,
    extra: String,
}

impl Resource for GroupRow {
    const NAME: &'static str = "group";
    const PATH: &'static str = "/v3/groups";
    const TABLE: &'static str = "groups";
    const FILTERS: Filters = &["name", "domain_id"];
    const ORDER: &'static str = "name, id";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    /// Members and roles go with it.
    async fn before_delete(&self, conn: &mut Conn) -> Result<(), ApiError> {
        Ok(assignments::forget(conn, "group", &self.id).await?)
    }
}

impl GroupRow {
    fn json(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/groups/{}", app.config.public_url, self.id);
        let own = json!({
            "id": self.id, "domain_id": self.domain_id, "name": self.name, "description": self.description,
            "links": {"self": url},
        });
        with_extra(&self.extra, own)
    }
}

/// Routes.
pub fn router() -> Router<App> {
    resource::routes::<GroupRow>(post(create), patch(update))
        .route("/v3/groups/{id}/users", get(members))
        .route("/v3/groups/{id}/users/{user}", put(add).get(check).head(check).delete(remove))
        .route("/v3/users/{user}/groups", get(groups_of))
}

async fn find(conn: &mut Conn, id: &str) -> Result<GroupRow, ApiError> {
    resource::find(conn, id).await
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "Conflict occurred: there is already a group named {name:?} in this domain."
        )),
        false => error.into(),
    }
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "group")?;
    let row = GroupRow {
        id: new_id(),
        domain_id: fields.text("domain_id")?.unwrap_or_else(|| projects::own_domain(&ctx)),
        name: fields.name()?.ok_or_else(|| ApiError::BadRequest("A group needs a name.".into()))?,
        description: fields.text("description")?.unwrap_or_default(),
        extra: merge_extra("{}", fields.rest_of("")?),
    };
    let mut tx = app.begin().await?;
    projects::require_domain(&mut tx, &row.domain_id).await?;
    sqlx::query("INSERT INTO groups (id, domain_id, name, description, extra) VALUES ($1, $2, $3, $4, $5)")
        .bind(&row.id)
        .bind(&row.domain_id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"group": row.json(&app)}))))
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "group")?;
    let mut tx = app.begin().await?;
    let mut row = find(&mut tx, &id).await?;
    fields.unchanged("domain_id", &row.domain_id)?;
    row.name = fields.name()?.unwrap_or(row.name);
    if let Some(description) = fields.nullable_text("description")? {
        row.description = description.unwrap_or_default();
    }
    row.extra = merge_extra(&row.extra, fields.rest_of(&row.id)?);
    sqlx::query("UPDATE groups SET name = $2, description = $3, extra = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"group": row.json(&app)})))
}

/// Removes a group.
///
/// # Errors
/// Of the database.
pub(super) async fn delete_row(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    assignments::forget(conn, "group", id).await?;
    sqlx::query("DELETE FROM groups WHERE id = $1").bind(id).execute(conn).await?;
    Ok(())
}

async fn members(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    find(&mut conn, &id).await?;
    let items = users::of_group(&app, &mut conn, &id, &params).await?;
    Ok(Json(list(&app, "users", &format!("/v3/groups/{id}/users"), items)))
}

type MemberPath = Path<(String, String)>;

async fn add(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, user)): MemberPath,
) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    find(&mut tx, &group).await?;
    users::require(&mut tx, &user).await?;
    sqlx::query("INSERT INTO group_members (group_id, user_id) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(&group)
        .bind(&user)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn check(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, user)): MemberPath,
) -> Result<StatusCode, ApiError> {
    let mut conn = app.db.acquire().await?;
    find(&mut conn, &group).await?;
    let there: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM group_members WHERE group_id = $1 AND user_id = $2)",
    )
    .bind(&group)
    .bind(&user)
    .fetch_one(&mut *conn)
    .await?;
    there.then_some(StatusCode::NO_CONTENT).ok_or_else(|| not_found("user in the group", &user))
}

/// Who leaves a group loses its roles at once.
async fn remove(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, user)): MemberPath,
) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    find(&mut tx, &group).await?;
    let gone = sqlx::query("DELETE FROM group_members WHERE group_id = $1 AND user_id = $2")
        .bind(&group)
        .bind(&user)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("user in the group", &user));
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn groups_of(
    State(app): State<App>,
    _ctx: Ctx,
    Path(user): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    users::require(&mut conn, &user).await?;
    let rows: Vec<GroupRow> = sqlx::query_as(
        "SELECT g.* FROM groups g JOIN group_members m ON m.group_id = g.id
         WHERE m.user_id = $1 AND (CAST($2 AS TEXT) IS NULL OR g.name = $2) ORDER BY g.name, g.id LIMIT $3",
    )
    .bind(&user)
    .bind(params.get("name"))
    .bind(MAX_LIST + 1)
    .fetch_all(&mut *conn)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "groups", &format!("/v3/users/{user}/groups"), items)))
}
