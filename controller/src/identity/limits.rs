//! Unified limits: `/v3/registered_limits` (defaults of a service's resources) and `/v3/limits` (what differs for a project or
//! a domain). The model is flat: a limit holds for its project alone, whatever is above or below.
//!
//! They are kept for services that ask here. Mote's own compute and network have the quotas of their APIs
//! (`os-quota-sets`, `/v2.0/quotas`).

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, patch, post},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    fields::{Fields, invalid},
    list, new_id,
    resource::{self, Filters, Query, Resource},
};
use crate::{
    app::App,
    db::{Conn, is_unique_violation},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Most limits of one request.
const MAX_AT_ONCE: usize = 1000;
/// Most of either kind.
const MAX_KEPT: i64 = 100_000;
/// Longest name of a resource, as Keystone's column.
const MAX_RESOURCE_CHARS: usize = 255;
/// Largest limit, as Keystone's schema.
const MAX_LIMIT: i64 = 2_147_483_647;

/// Routes.
pub fn router() -> Router<App> {
    resource::routes::<Registered>(post(register), patch(change_registered))
        .merge(resource::routes::<Limit>(post(create), patch(change)))
        .route("/v3/limits/model", get(model))
}

#[derive(Debug, sqlx::FromRow)]
struct Registered {
    id: String,
    service_id: String,
    region_id: Option<String>,
    resource_name: String,
    default_limit: i64,
    description: Option<String>,
}

impl Resource for Registered {
    const NAME: &'static str = "registered_limit";
    const PATH: &'static str = "/v3/registered_limits";
    const TABLE: &'static str = "registered_limits";
    const FILTERS: Filters = &["service_id", "region_id", "resource_name"];
    const ORDER: &'static str = "service_id, resource_name, id";
    const MATTERS: bool = false;

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    async fn before_delete(&self, conn: &mut Conn) -> Result<(), ApiError> {
        if is_used(conn, &self.id).await? { Err(in_use()) } else { Ok(()) }
    }
}

impl Registered {
    fn json(&self, app: &App) -> Value {
        json!({
            "id": self.id, "service_id": self.service_id, "region_id": self.region_id,
            "resource_name": self.resource_name, "default_limit": self.default_limit,
            "description": self.description,
            "links": {"self": format!("{}/identity/v3/registered_limits/{}", app.config.public_url, self.id)},
        })
    }

    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        if let Some(service) = fields.text("service_id")? {
            self.service_id = service;
        }
        if let Some(region) = fields.nullable_text("region_id")? {
            self.region_id = region;
        }
        if let Some(name) = fields.text("resource_name")? {
            self.resource_name = name;
        }
        if let Some(limit) = limit(&mut fields, "default_limit")? {
            self.default_limit = limit;
        }
        if let Some(text) = fields.nullable_text("description")? {
            self.description = text;
        }
        if !(1..=MAX_RESOURCE_CHARS).contains(&self.resource_name.chars().count()) {
            return Err(invalid("resource_name", "must have 1 to 255 characters"));
        }
        Ok(())
    }

    /// Refuses services and regions that don't exist.
    async fn check(&self, tx: &mut Conn) -> Result<(), ApiError> {
        known(tx, "SELECT EXISTS (SELECT 1 FROM services WHERE id = $1)", "service_id", &self.service_id)
            .await?;
        match &self.region_id {
            Some(region) => {
                known(tx, "SELECT EXISTS (SELECT 1 FROM regions WHERE id = $1)", "region_id", region).await
            }
            None => Ok(()),
        }
    }
}

#[derive(Debug, sqlx::FromRow)]
struct Limit {
    id: String,
    project_id: Option<String>,
    domain_id: Option<String>,
    resource_limit: i64,
    description: Option<String>,
    service_id: String,
    region_id: Option<String>,
    resource_name: String,
}

impl Resource for Limit {
    const NAME: &'static str = "limit";
    const PATH: &'static str = "/v3/limits";
    const TABLE: &'static str = "limits";
    const COLUMNS: &'static str =
        "l.id, l.project_id, l.domain_id, l.resource_limit, l.description, r.service_id,
         r.region_id, r.resource_name";
    const FROM: &'static str = "limits l JOIN registered_limits r ON r.id = l.registered_limit_id";
    const ID: &'static str = "l.id";
    const FILTERS: Filters = &["service_id", "region_id", "resource_name", "project_id", "domain_id"];
    const ORDER: &'static str = "service_id, resource_name, l.id";
    const MATTERS: bool = false;

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    /// What is of the token's project or domain.
    fn push_own(query: &mut Query, ctx: &Ctx) {
        query.push("(project_id = ").push_bind(ctx.project_id.clone());
        query.push(" OR domain_id = ").push_bind(ctx.domain_id.clone()).push(")");
    }
}

impl Limit {
    fn json(&self, app: &App) -> Value {
        json!({
            "id": self.id, "project_id": self.project_id, "domain_id": self.domain_id,
            "resource_limit": self.resource_limit, "description": self.description,
            "service_id": self.service_id, "region_id": self.region_id, "resource_name": self.resource_name,
            "links": {"self": format!("{}/identity/v3/limits/{}", app.config.public_url, self.id)},
        })
    }
}

async fn known(tx: &mut Conn, sql: &'static str, field: &str, id: &str) -> Result<(), ApiError> {
    let there: bool = sqlx::query_scalar(sql).bind(id).fetch_one(tx).await?;
    match there {
        true => Ok(()),
        false => Err(invalid(field, "does not exist")),
    }
}

fn limit(fields: &mut Fields, name: &str) -> Result<Option<i64>, ApiError> {
    match fields.integer(name)? {
        Some(limit) if !(-1..=MAX_LIMIT).contains(&limit) => {
            Err(invalid(name, "must be -1 (none) or a number from 0"))
        }
        other => Ok(other),
    }
}

/// Each object of a list, as the requests have them that make several.
fn several(mut body: Value, key: &str) -> Result<Vec<Fields>, ApiError> {
    match body.get_mut(key).map(Value::take) {
        Some(Value::Array(items)) if (1..=MAX_AT_ONCE).contains(&items.len()) => {
            items.into_iter().map(|item| Fields::of(json!({ "limit": item }), "limit")).collect()
        }
        _ => Err(ApiError::BadRequest(format!(
            "The body must have a list {key:?} of 1 to {MAX_AT_ONCE} limits."
        ))),
    }
}

fn exists(error: sqlx::Error) -> ApiError {
    match is_unique_violation(&error) {
        true => ApiError::Conflict("Conflict occurred: there is already such a limit.".into()),
        false => error.into(),
    }
}

async fn room(tx: &mut Conn, sql: &'static str) -> Result<(), ApiError> {
    let kept: i64 = sqlx::query_scalar(sql).fetch_one(tx).await?;
    match kept > MAX_KEPT {
        true => Err(ApiError::OverQuota(format!("There are at most {MAX_KEPT} limits."))),
        false => Ok(()),
    }
}

/// `GET /v3/limits/model`.
async fn model(_ctx: Ctx) -> Json<Value> {
    Json(json!({"model": {
        "name": "flat",
        "description": "Limit enforcement and validation does not take project hierarchy into consideration.",
    }}))
}

async fn register(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut tx = app.begin().await?;
    let mut made = Vec::new();
    for fields in several(body, "registered_limits")? {
        let (service_id, resource_name) = (String::new(), String::new());
        let mut row = Registered {
            id: new_id(),
            service_id,
            region_id: None,
            resource_name,
            default_limit: i64::MIN,
            description: None,
        };
        row.apply(fields)?;
        if row.default_limit == i64::MIN {
            return Err(invalid("default_limit", "is missing"));
        }
        row.check(&mut tx).await?;
        sqlx::query(
            "INSERT INTO registered_limits (id, service_id, region_id, resource_name, default_limit, description)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(&row.id)
        .bind(&row.service_id)
        .bind(&row.region_id)
        .bind(&row.resource_name)
        .bind(row.default_limit)
        .bind(&row.description)
        .execute(&mut *tx)
        .await
        .map_err(exists)?;
        made.push(row.json(&app));
    }
    room(&mut tx, "SELECT COUNT(*) FROM registered_limits").await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(list(&app, "registered_limits", "/v3/registered_limits", made))))
}

/// Whether a project or a domain has a limit of its own by a registered one.
async fn is_used(tx: &mut Conn, id: &str) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM limits WHERE registered_limit_id = $1)";
    Ok(sqlx::query_scalar(sql).bind(id).fetch_one(tx).await?)
}

fn in_use() -> ApiError {
    ApiError::Forbidden(
        "Unable to change or delete the registered limit: there are project limits by it.".into(),
    )
}

async fn change_registered(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = app.begin().await?;
    let before: Registered = resource::find(&mut tx, &id).await?;
    let mut row: Registered = resource::find(&mut tx, &id).await?;
    row.apply(Fields::of(body, "registered_limit")?)?;
    row.check(&mut tx).await?;
    let of = |row: &Registered| (row.service_id.clone(), row.region_id.clone(), row.resource_name.clone());
    if of(&before) != of(&row) && is_used(&mut tx, &id).await? {
        return Err(in_use());
    }
    sqlx::query(
        "UPDATE registered_limits SET service_id = $2, region_id = $3, resource_name = $4, default_limit = $5,
             description = $6 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.service_id)
    .bind(&row.region_id)
    .bind(&row.resource_name)
    .bind(row.default_limit)
    .bind(&row.description)
    .execute(&mut *tx)
    .await
    .map_err(exists)?;
    tx.commit().await?;
    Ok(Json(json!({"registered_limit": row.json(&app)})))
}

async fn create(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut tx = app.begin().await?;
    let mut made = Vec::new();
    for mut fields in several(body, "limits")? {
        let (service, name) = (fields.text("service_id")?, fields.text("resource_name")?);
        let service = service.ok_or_else(|| invalid("service_id", "is missing"))?;
        let name = name.ok_or_else(|| invalid("resource_name", "is missing"))?;
        let region = fields.text("region_id")?;
        let (project, domain) = (fields.text("project_id")?, fields.text("domain_id")?);
        let amount = limit(&mut fields, "resource_limit")?;
        let amount = amount.ok_or_else(|| invalid("resource_limit", "is missing"))?;
        let description = fields.text("description")?;
        match (&project, &domain) {
            (Some(id), None) => {
                known(&mut tx, "SELECT EXISTS (SELECT 1 FROM projects WHERE id = $1)", "project_id", id)
                    .await?;
            }
            (None, Some(id)) => {
                known(&mut tx, "SELECT EXISTS (SELECT 1 FROM domains WHERE id = $1)", "domain_id", id)
                    .await?;
            }
            _ => {
                return Err(ApiError::BadRequest("A limit needs either a project_id or a domain_id.".into()));
            }
        }
        let registered: Option<String> = sqlx::query_scalar(
            "SELECT id FROM registered_limits
             WHERE service_id = $1 AND COALESCE(region_id, '') = $2 AND resource_name = $3",
        )
        .bind(&service)
        .bind(region.unwrap_or_default())
        .bind(&name)
        .fetch_optional(&mut *tx)
        .await?;
        let registered = registered.ok_or_else(|| {
            ApiError::Forbidden("Unable to create a limit that has no registered limit.".into())
        })?;
        let id = new_id();
        sqlx::query(
            "INSERT INTO limits (id, registered_limit_id, project_id, domain_id, resource_limit, description)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(&id)
        .bind(registered)
        .bind(project)
        .bind(domain)
        .bind(amount)
        .bind(description)
        .execute(&mut *tx)
        .await
        .map_err(exists)?;
        made.push(resource::find::<Limit>(&mut tx, &id).await?.json(&app));
    }
    room(&mut tx, "SELECT COUNT(*) FROM limits").await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(list(&app, "limits", "/v3/limits", made))))
}

async fn change(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "limit")?;
    let amount = limit(&mut fields, "resource_limit")?;
    let description = fields.nullable_text("description")?;
    let mut tx = app.begin().await?;
    let mut row: Limit = resource::find(&mut tx, &id).await?;
    row.resource_limit = amount.unwrap_or(row.resource_limit);
    row.description = description.unwrap_or(row.description);
    sqlx::query("UPDATE limits SET resource_limit = $2, description = $3 WHERE id = $1")
        .bind(&row.id)
        .bind(row.resource_limit)
        .bind(&row.description)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Json(json!({"limit": row.json(&app)})))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::testing::TestApp;

    const REGISTERED: &str = "/identity/v3/registered_limits";
    const LIMITS: &str = "/identity/v3/limits";

    #[tokio::test]
    async fn defaults_are_registered_and_differ_for_single_projects() {
        let test = TestApp::new().await;
        let admin = test.admin_token.as_str();
        let (project, token) = test.tenant("ada", "reader").await;
        let (_, other) = test.tenant("bob", "reader").await;
        let services = test.get("/identity/v3/services?type=compute", admin).await.expect(200);
        let service = services["services"][0]["id"].as_str().unwrap();
        let body = json!({"registered_limits": [
            {"service_id": service, "resource_name": "cores", "default_limit": 10},
            {"service_id": service, "region_id": "RegionOne", "resource_name": "cores", "default_limit": 5,
             "description": "here"},
        ]});
        test.post(REGISTERED, &token, body.clone()).await.expect(403);
        let made = test.post(REGISTERED, admin, body.clone()).await.expect(201);
        let one = format!("{REGISTERED}/{}", made["registered_limits"][0]["id"].as_str().unwrap());
        test.post(REGISTERED, admin, body).await.expect(409);
        let found = test.get(&format!("{REGISTERED}?region_id=RegionOne"), &token).await.expect(200);
        assert_eq!(found["registered_limits"].as_array().unwrap().len(), 1);
        assert_eq!(found["registered_limits"][0]["description"], "here");
        for wrong in [
            json!({"service_id": "none", "resource_name": "x", "default_limit": 1}),
            json!({"service_id": service, "resource_name": "", "default_limit": 1}),
            json!({"service_id": service, "resource_name": "x"}),
            json!({"service_id": service, "resource_name": "x", "default_limit": -2}),
            json!({"service_id": service, "resource_name": "x", "default_limit": 1, "color": "red"}),
        ] {
            test.post(REGISTERED, admin, json!({"registered_limits": [wrong]})).await.expect(400);
        }
        test.post(REGISTERED, admin, json!({"registered_limits": []})).await.expect(400);
        let limit = |name: &str| {
            json!({"limits": [{"service_id": service, "project_id": project, "resource_name": name,
                               "resource_limit": 20}]})
        };
        test.post(LIMITS, &token, limit("cores")).await.expect(403);
        test.post(LIMITS, admin, limit("ram")).await.expect(403);
        let made = test.post(LIMITS, admin, limit("cores")).await.expect(201)["limits"][0].take();
        test.post(LIMITS, admin, limit("cores")).await.expect(409);
        assert_eq!(
            (&made["resource_limit"], &made["resource_name"], &made["domain_id"]),
            (&json!(20), &json!("cores"), &Value::Null)
        );
        let path = format!("{LIMITS}/{}", made["id"].as_str().unwrap());
        assert_eq!(test.get(LIMITS, &token).await.expect(200)["limits"], json!([made]));
        assert_eq!(test.get(LIMITS, &other).await.expect(200)["limits"], json!([]));
        test.get(&path, &token).await.expect(200);
        test.get(&path, &other).await.expect(404);
        let body = json!({"limit": {"resource_limit": -1, "description": "much"}});
        let changed = test.call(Method::PATCH, &path, admin, body).await.expect(200);
        assert_eq!(
            (&changed["limit"]["resource_limit"], &changed["limit"]["description"]),
            (&json!(-1), &json!("much"))
        );
        // A default can be changed while projects differ from it, but not what it is of.
        let body = json!({"registered_limit": {"default_limit": 12}});
        let changed = test.call(Method::PATCH, &one, admin, body).await.expect(200);
        assert_eq!(changed["registered_limit"]["default_limit"], 12);
        let body = json!({"registered_limit": {"resource_name": "ram"}});
        test.call(Method::PATCH, &one, admin, body).await.expect(403);
        test.delete(&one, admin).await.expect(403);
        test.delete(&path, admin).await.expect(204);
        test.delete(&one, admin).await.expect(204);
        test.get(&one, admin).await.expect(404);
        assert_eq!(test.get(&format!("{LIMITS}/model"), &token).await.expect(200)["model"]["name"], "flat");
    }

    #[tokio::test]
    async fn limits_go_with_their_project() {
        let test = TestApp::new().await;
        let admin = test.admin_token.as_str();
        let (project, _) = test.tenant("ada", "reader").await;
        let services = test.get("/identity/v3/services?type=compute", admin).await.expect(200);
        let service = services["services"][0]["id"].as_str().unwrap();
        let body =
            json!({"registered_limits": [{"service_id": service, "resource_name": "a", "default_limit": 1}]});
        test.post(REGISTERED, admin, body).await.expect(201);
        for owner in [json!({"project_id": project}), json!({"domain_id": "default"})] {
            let mut limit = json!({"service_id": service, "resource_name": "a", "resource_limit": 2});
            limit.as_object_mut().unwrap().extend(owner.as_object().unwrap().clone());
            test.post(LIMITS, admin, json!({"limits": [limit]})).await.expect(201);
        }
        test.delete(&format!("/identity/v3/projects/{project}"), admin).await.expect(204);
        let left = test.get(LIMITS, admin).await.expect(200);
        assert_eq!(left["limits"].as_array().unwrap().len(), 1);
        assert_eq!(left["limits"][0]["domain_id"], "default");
    }
}
