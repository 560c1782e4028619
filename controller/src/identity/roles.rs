//! `/v3/roles`: roles of the whole cloud.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, patch, post},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    MAX_LIST, begin,
    bootstrap::ROLES,
    fields::{Fields, merge_extra, with_extra},
    list, new_id, not_found,
    resource::{self, Filters, Resource},
};
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
    extra: String,
}

impl Resource for RoleRow {
    const NAME: &'static str = "role";
    const PATH: &'static str = "/v3/roles";
    const TABLE: &'static str = "roles";
    const FILTERS: Filters = &["name"];
    const ORDER: &'static str = "name";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    /// Roles that belong to a domain: there are none.
    fn is_none(params: &Params) -> bool {
        params.get("domain_id").is_some_and(|domain| !domain.is_empty() && domain != "null")
    }

    /// What follows from what it implies goes with it.
    async fn before_delete(&self, conn: &mut Conn) -> Result<(), ApiError> {
        require_not_built_in(self)?;
        sqlx::query("DELETE FROM role_inferences WHERE prior_role_id = $1 OR implied_role_id = $1")
            .bind(&self.id)
            .execute(&mut *conn)
            .await?;
        Ok(close(conn).await?)
    }
}

impl RoleRow {
    /// The role's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// As Keystone shows it.
    pub fn json(&self, app: &App) -> Value {
        let own = json!({
            "id": self.id,
            "name": self.name,
            "domain_id": null,
            "description": self.description,
            "options": {},
            "links": {"self": format!("{}/identity/v3/roles/{}", app.config.public_url, self.id)},
        });
        with_extra(&self.extra, own)
    }
}

/// Routes.
pub fn router() -> Router<App> {
    resource::routes::<RoleRow>(post(create), patch(update))
        .route("/v3/roles/{id}/implies", get(implied))
        .route("/v3/roles/{id}/implies/{implied}", get(inference).put(imply).delete(imply_no_more))
        .route("/v3/role_inferences", get(inferences))
}

async fn find(conn: &mut Conn, id: &str) -> Result<RoleRow, ApiError> {
    resource::find(conn, id).await
}

async fn create(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "role")?;
    if fields.text("domain_id")?.is_some() {
        return Err(ApiError::BadRequest("Roles of a domain are not supported.".into()));
    }
    let row = RoleRow {
        id: new_id(),
        name: fields.name()?.ok_or_else(|| ApiError::BadRequest("A role needs a name.".into()))?,
        description: fields.text("description")?.unwrap_or_default(),
        extra: merge_extra("{}", fields.rest_of("")?),
    };
    let mut tx = app.begin().await?;
    sqlx::query("INSERT INTO roles (id, name, description, extra) VALUES ($1, $2, $3, $4)")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.extra)
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

/// The roles that Mote's own rules name can't be renamed or deleted: that would lock everybody out.
fn require_not_built_in(row: &RoleRow) -> Result<(), ApiError> {
    match ROLES.contains(&row.name.as_str()) {
        true => Err(ApiError::Forbidden(format!("The role {} is built in and can't be changed.", row.name))),
        false => Ok(()),
    }
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "role")?;
    let mut tx = begin(&app).await?;
    let mut row = find(&mut tx, &id).await?;
    if let Some(name) = fields.name()?
        && name != row.name
    {
        require_not_built_in(&row)?;
        row.name = name;
    }
    row.description = fields.text("description")?.unwrap_or(row.description);
    fields.unchanged("domain_id", "")?;
    row.extra = merge_extra(&row.extra, fields.rest_of(&row.id)?);
    sqlx::query("UPDATE roles SET name = $2, description = $3, extra = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"role": row.json(&app)})))
}

type Inference = Path<(String, String)>;

impl RoleRow {
    fn short(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/roles/{}", app.config.public_url, self.id);
        json!({"id": self.id, "name": self.name, "links": {"self": url}})
    }
}

/// All pairs that an administrator made, by the prior role.
async fn pairs(conn: &mut Conn, prior: Option<&str>) -> Result<Vec<(String, String)>, ApiError> {
    Ok(sqlx::query_as(
        "SELECT i.prior_role_id, i.implied_role_id FROM role_inferences i
         JOIN roles p ON p.id = i.prior_role_id JOIN roles r ON r.id = i.implied_role_id
         WHERE (CAST($1 AS TEXT) IS NULL OR i.prior_role_id = $1) ORDER BY p.name, r.name LIMIT $2",
    )
    .bind(prior)
    .bind(MAX_LIST)
    .fetch_all(conn)
    .await?)
}

async fn inferences(State(app): State<App>, _ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.begin().await?;
    let mut items: Vec<Value> = Vec::new();
    let mut last = String::new();
    for (prior, implied) in pairs(&mut conn, None).await? {
        let implied = find(&mut conn, &implied).await?.short(&app);
        if prior != last {
            let prior = find(&mut conn, &prior).await?.short(&app);
            items.push(json!({"prior_role": prior, "implies": []}));
        }
        if let Some(Value::Array(implies)) = items.last_mut().map(|item| &mut item["implies"]) {
            implies.push(implied);
        }
        last = prior;
    }
    Ok(Json(list(&app, "role_inferences", "/v3/role_inferences", items)))
}

async fn implied(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.begin().await?;
    let prior = find(&mut conn, &id).await?.short(&app);
    let mut implies = Vec::new();
    for (_, implied) in pairs(&mut conn, Some(&id)).await? {
        implies.push(find(&mut conn, &implied).await?.short(&app));
    }
    let url = format!("{}/identity/v3/roles/{id}/implies", app.config.public_url);
    Ok(Json(json!({"role_inference": {"prior_role": prior, "implies": implies}, "links": {"self": url}})))
}

async fn inference_json(app: &App, conn: &mut Conn, prior: &str, implied: &str) -> Result<Value, ApiError> {
    let url = format!("{}/identity/v3/roles/{prior}/implies/{implied}", app.config.public_url);
    let prior = find(conn, prior).await?.short(app);
    let implied = find(conn, implied).await?.short(app);
    Ok(json!({"role_inference": {"prior_role": prior, "implies": implied}, "links": {"self": url}}))
}

async fn inference(
    State(app): State<App>,
    _ctx: Ctx,
    Path((prior, implied)): Inference,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.begin().await?;
    let shown = inference_json(&app, &mut conn, &prior, &implied).await?;
    let there = pairs(&mut conn, Some(&prior)).await?.iter().any(|pair| pair.1 == implied);
    there.then_some(Json(shown)).ok_or_else(|| not_found("implied role", &implied))
}

async fn imply(
    State(app): State<App>,
    _ctx: Ctx,
    Path((prior, implied)): Inference,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut tx = begin(&app).await?;
    let shown = inference_json(&app, &mut tx, &prior, &implied).await?;
    if find(&mut tx, &implied).await?.name == ROLES[0] {
        return Err(ApiError::Forbidden("The role admin can't be implied.".into()));
    }
    let ring: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM role_implications WHERE prior_role_id = $1 AND implied_role_id = $2)",
    )
    .bind(&implied)
    .bind(&prior)
    .fetch_one(&mut *tx)
    .await?;
    if ring || prior == implied {
        return Err(ApiError::BadRequest("The second role implies the first: that would be a ring.".into()));
    }
    sqlx::query(
        "INSERT INTO role_inferences (prior_role_id, implied_role_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
    )
    .bind(&prior)
    .bind(&implied)
    .execute(&mut *tx)
    .await?;
    close(&mut tx).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(shown)))
}

async fn imply_no_more(
    State(app): State<App>,
    _ctx: Ctx,
    Path((prior, implied)): Inference,
) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    let gone = sqlx::query("DELETE FROM role_inferences WHERE prior_role_id = $1 AND implied_role_id = $2")
        .bind(&prior)
        .bind(&implied)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("implied role", &implied));
    }
    close(&mut tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Computes which role implies which, over any number of steps, from the single steps.
///
/// # Errors
/// Of the database.
pub async fn close(conn: &mut Conn) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM role_implications").execute(&mut *conn).await?;
    sqlx::query(
        "INSERT INTO role_implications (prior_role_id, implied_role_id)
         WITH RECURSIVE steps (prior, implied) AS (
             SELECT prior_role_id, implied_role_id FROM role_inferences
             UNION
             SELECT s.prior, i.implied_role_id FROM steps s JOIN role_inferences i ON i.prior_role_id = s.implied)
         SELECT prior, implied FROM steps",
    )
    .execute(conn)
    .await?;
    Ok(())
}
