//! The catalog, and the regions, services and endpoints that it consists of: rows.
//!
//! In an endpoint's URL `$(public_url)s` stands for the controller's own address (what it is made with at first), and
//! `$(project_id)s` or `$(tenant_id)s` for the project of the token; an endpoint that needs a project isn't shown without. A project may see
//! only some of them ([`super::endpoint_filter`]).

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    MAX_LIST,
    endpoint_filter::{self, Chosen},
    fields::{Fields, invalid, merge_extra, with_extra},
    list, new_id, not_found,
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

const INTERFACES: [&str; 3] = ["public", "internal", "admin"];
/// Longest URL of an endpoint.
const MAX_URL_BYTES: usize = 2048;

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/services", get(services).post(create_service))
        .route("/v3/services/{id}", get(service).patch(update_service).delete(delete_service))
        .route("/v3/endpoints", get(endpoints).post(create_endpoint))
        .route("/v3/endpoints/{id}", get(endpoint).patch(update_endpoint).delete(delete_endpoint))
        .route("/v3/regions", get(regions).post(create_region))
        .route("/v3/regions/{id}", get(region).put(put_region).patch(update_region).delete(delete_region))
}

#[derive(Debug, sqlx::FromRow)]
struct ServiceRow {
    id: String,
    r#type: String,
    name: String,
    description: String,
    enabled: bool,
    extra: String,
}

/// A stored endpoint.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct EndpointRow {
    pub(super) id: String,
    pub(super) service_id: String,
    pub(super) region_id: Option<String>,
    pub(super) interface: String,
    url: String,
    enabled: bool,
    extra: String,
}

#[derive(Debug, sqlx::FromRow)]
struct RegionRow {
    id: String,
    description: String,
    parent_region_id: Option<String>,
    extra: String,
}

impl ServiceRow {
    fn json(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/services/{}", app.config.public_url, self.id);
        let own = json!({
            "id": self.id, "type": self.r#type, "name": self.name, "description": self.description,
            "enabled": self.enabled, "links": {"self": url},
        });
        with_extra(&self.extra, own)
    }

    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        self.r#type = fields.text("type")?.unwrap_or(std::mem::take(&mut self.r#type));
        if self.r#type.is_empty() || self.r#type.len() > super::fields::MAX_NAME_CHARS {
            return Err(invalid("type", "must have 1 to 255 characters"));
        }
        self.name = fields.text("name")?.unwrap_or(std::mem::take(&mut self.name));
        self.description = fields.text("description")?.unwrap_or(std::mem::take(&mut self.description));
        self.enabled = fields.boolean("enabled")?.unwrap_or(self.enabled);
        self.extra = merge_extra(&self.extra, fields.rest()?);
        Ok(())
    }
}

impl EndpointRow {
    pub(super) fn json(&self, app: &App) -> Value {
        let links = format!("{}/identity/v3/endpoints/{}", app.config.public_url, self.id);
        let own = json!({
            "id": self.id, "service_id": self.service_id, "interface": self.interface, "enabled": self.enabled,
            "region": self.region_id, "region_id": self.region_id, "links": {"self": links},
            "url": self.url.replace("$(public_url)s", &app.config.public_url),
        });
        with_extra(&self.extra, own)
    }

    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        self.service_id = fields.text("service_id")?.unwrap_or(std::mem::take(&mut self.service_id));
        self.interface = fields.text("interface")?.unwrap_or(std::mem::take(&mut self.interface));
        if !INTERFACES.contains(&self.interface.as_str()) {
            return Err(invalid("interface", "must be public, internal or admin"));
        }
        self.url = fields.text("url")?.unwrap_or(std::mem::take(&mut self.url));
        let scheme =
            ["http://", "https://", "$(public_url)s"].iter().any(|start| self.url.starts_with(start));
        if !scheme || self.url.len() > MAX_URL_BYTES {
            return Err(invalid("url", "must begin with http:// or https:// and have at most 2048 bytes"));
        }
        // Older clients name the region "region".
        let region = match fields.nullable_text("region_id")? {
            None => fields.nullable_text("region")?,
            region => fields.nullable_text("region").map(|_| region)?,
        };
        self.region_id = region.unwrap_or(self.region_id.take());
        self.enabled = fields.boolean("enabled")?.unwrap_or(self.enabled);
        self.extra = merge_extra(&self.extra, fields.rest()?);
        Ok(())
    }

    /// Who names the region as older clients do means one that is made by being named, as in Keystone.
    async fn make_region(&self, conn: &mut Conn) -> Result<(), ApiError> {
        let Some(region) =
            self.region_id.as_ref().filter(|id| !id.is_empty() && id.len() <= super::fields::MAX_NAME_CHARS)
        else {
            return Ok(());
        };
        sqlx::query("INSERT INTO regions (id, description) VALUES ($1, '') ON CONFLICT DO NOTHING")
            .bind(region)
            .execute(conn)
            .await?;
        Ok(())
    }

    async fn check(&self, conn: &mut Conn) -> Result<(), ApiError> {
        find_service(conn, &self.service_id).await?;
        match &self.region_id {
            Some(region) => find_region(conn, region).await.map(drop),
            None => Ok(()),
        }
    }
}

impl RegionRow {
    fn json(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/regions/{}", app.config.public_url, self.id);
        let own = json!({
            "id": self.id, "description": self.description, "parent_region_id": self.parent_region_id,
            "links": {"self": url},
        });
        with_extra(&self.extra, own)
    }
}

/// Type, id and name of a service; id, interface, region and URL of an endpoint.
pub type CatalogRow = (String, String, String, String, String, Option<String>, String);

/// What catalogs are made of.
#[derive(Debug)]
pub(super) struct Catalog {
    rows: Vec<CatalogRow>,
    /// Which of them projects see that don't see all.
    chosen: Chosen,
}

/// What catalogs are made of, as remembered under this version of identity.
async fn remembered(app: &App, version: i64) -> Result<Arc<Catalog>, ApiError> {
    if let Some(catalog) = &app.identity.at(version).catalog {
        return Ok(catalog.clone());
    }
    let mut conn = app.db.acquire().await?;
    let rows: Vec<CatalogRow> = sqlx::query_as(
        "SELECT s.type, s.id, s.name, e.id, e.interface, e.region_id, e.url
         FROM services s JOIN endpoints e ON e.service_id = s.id WHERE s.enabled AND e.enabled
         ORDER BY s.type, s.id, e.id",
    )
    .fetch_all(&mut *conn)
    .await?;
    let chosen = endpoint_filter::chosen(&mut conn).await?;
    let catalog = Arc::new(Catalog { rows, chosen });
    app.identity.at(version).catalog = Some(catalog.clone());
    Ok(catalog)
}

/// The `catalog` of a token, by type of service.
///
/// # Errors
/// Of the database.
pub async fn catalog(app: &App, version: i64, project: Option<&str>) -> Result<Value, ApiError> {
    let catalog = remembered(app, version).await?;
    let chosen = project.and_then(|project| catalog.chosen.get(project));
    let mut services: BTreeMap<(String, String), (String, Vec<Value>)> = BTreeMap::new();
    let rows = catalog.rows.iter().filter(|row| chosen.is_none_or(|chosen| chosen.contains(&row.3)));
    for (kind, service, name, id, interface, region, url) in rows.cloned() {
        let mut url = url.replace("$(public_url)s", &app.config.public_url);
        for word in ["$(project_id)s", "$(tenant_id)s"] {
            url = project.map_or(url.clone(), |project| url.replace(word, project));
        }
        if url.contains("$(") {
            continue;
        }
        let endpoints = &mut services.entry((kind, service)).or_insert((name, Vec::new())).1;
        endpoints.push(json!({
            "id": id, "interface": interface, "region": region, "region_id": region, "url": url,
        }));
    }
    let service = |((kind, id), (name, endpoints)): ((String, String), (String, Vec<Value>))| json!({"id": id, "type": kind, "name": name, "endpoints": endpoints});
    Ok(services.into_iter().map(service).collect())
}

/// `GET /v3/auth/catalog`.
///
/// # Errors
/// 403 for a token without scope, which has none.
pub async fn of_asker(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    if ctx.project_id.is_none() && ctx.domain_id.is_none() && !ctx.system {
        return Err(ApiError::Forbidden("A token without scope has no catalog.".into()));
    }
    let version = super::version(&mut *app.db.acquire().await?).await?;
    let items = match catalog(&app, version, ctx.project_id.as_deref()).await? {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    Ok(Json(list(&app, "catalog", "/v3/auth/catalog", items)))
}

async fn find_service(conn: &mut Conn, id: &str) -> Result<ServiceRow, ApiError> {
    let row = sqlx::query_as("SELECT * FROM services WHERE id = $1").bind(id).fetch_optional(conn).await?;
    row.ok_or_else(|| not_found("service", id))
}

/// An endpoint.
///
/// # Errors
/// 404.
pub(super) async fn find_endpoint(conn: &mut Conn, id: &str) -> Result<EndpointRow, ApiError> {
    let row = sqlx::query_as("SELECT * FROM endpoints WHERE id = $1").bind(id).fetch_optional(conn).await?;
    row.ok_or_else(|| not_found("endpoint", id))
}

async fn find_region(conn: &mut Conn, id: &str) -> Result<RegionRow, ApiError> {
    let row = sqlx::query_as("SELECT * FROM regions WHERE id = $1").bind(id).fetch_optional(conn).await?;
    row.ok_or_else(|| not_found("region", id))
}

async fn services(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let rows: Vec<ServiceRow> = sqlx::query_as(
        "SELECT * FROM services WHERE (CAST($1 AS TEXT) IS NULL OR type = $1)
         AND (CAST($2 AS TEXT) IS NULL OR name = $2) ORDER BY type, id LIMIT $3",
    )
    .bind(params.get("type"))
    .bind(params.get("name"))
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    Ok(Json(list(&app, "services", "/v3/services", rows.iter().map(|row| row.json(&app)).collect())))
}

async fn service(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = find_service(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"service": row.json(&app)})))
}

async fn create_service(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (name, description, extra) = (String::new(), String::new(), "{}".to_owned());
    let mut row = ServiceRow { id: new_id(), r#type: String::new(), name, description, enabled: true, extra };
    row.apply(Fields::of(body, "service")?)?;
    let mut tx = super::begin(&app).await?;
    sqlx::query(
        "INSERT INTO services (id, type, name, description, enabled, extra) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&row.id)
    .bind(&row.r#type)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"service": row.json(&app)}))))
}

async fn update_service(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = super::begin(&app).await?;
    let mut row = find_service(&mut tx, &id).await?;
    row.apply(Fields::of(body, "service")?)?;
    sqlx::query(
        "UPDATE services SET type = $2, name = $3, description = $4, enabled = $5, extra = $6 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.r#type)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Json(json!({"service": row.json(&app)})))
}

/// Its endpoints go as well.
async fn delete_service(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = super::begin(&app).await?;
    find_service(&mut tx, &id).await?;
    sqlx::query("DELETE FROM services WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn endpoints(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let rows: Vec<EndpointRow> = sqlx::query_as(
        "SELECT * FROM endpoints WHERE (CAST($1 AS TEXT) IS NULL OR service_id = $1)
         AND (CAST($2 AS TEXT) IS NULL OR interface = $2) AND (CAST($3 AS TEXT) IS NULL OR region_id = $3)
         ORDER BY service_id, id LIMIT $4",
    )
    .bind(params.get("service_id"))
    .bind(params.get("interface"))
    .bind(params.get("region_id").or(params.get("region")))
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    Ok(Json(list(&app, "endpoints", "/v3/endpoints", rows.iter().map(|row| row.json(&app)).collect())))
}

async fn endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = find_endpoint(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"endpoint": row.json(&app)})))
}

async fn create_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (service_id, interface, url) = (String::new(), String::new(), String::new());
    let (id, extra) = (new_id(), "{}".to_owned());
    let mut row = EndpointRow { id, service_id, region_id: None, interface, url, enabled: true, extra };
    let older = body["endpoint"]["region"].is_string();
    row.apply(Fields::of(body, "endpoint")?)?;
    let mut tx = super::begin(&app).await?;
    if older {
        row.make_region(&mut tx).await?;
    }
    row.check(&mut tx).await?;
    sqlx::query(
        "INSERT INTO endpoints (id, service_id, region_id, interface, url, enabled, extra)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&row.id)
    .bind(&row.service_id)
    .bind(&row.region_id)
    .bind(&row.interface)
    .bind(&row.url)
    .bind(row.enabled)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"endpoint": row.json(&app)}))))
}

async fn update_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = super::begin(&app).await?;
    let mut row = find_endpoint(&mut tx, &id).await?;
    let older = body["endpoint"]["region"].is_string();
    row.apply(Fields::of(body, "endpoint")?)?;
    if older {
        row.make_region(&mut tx).await?;
    }
    row.check(&mut tx).await?;
    sqlx::query(
        "UPDATE endpoints SET service_id = $2, region_id = $3, interface = $4, url = $5, enabled = $6, extra = $7
         WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.service_id)
    .bind(&row.region_id)
    .bind(&row.interface)
    .bind(&row.url)
    .bind(row.enabled)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Json(json!({"endpoint": row.json(&app)})))
}

async fn delete_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = super::begin(&app).await?;
    find_endpoint(&mut tx, &id).await?;
    sqlx::query("DELETE FROM endpoints WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn regions(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let rows: Vec<RegionRow> = sqlx::query_as(
        "SELECT * FROM regions WHERE (CAST($1 AS TEXT) IS NULL OR parent_region_id = $1) ORDER BY id LIMIT $2",
    )
    .bind(params.get("parent_region_id"))
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    Ok(Json(list(&app, "regions", "/v3/regions", rows.iter().map(|row| row.json(&app)).collect())))
}

async fn region(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = find_region(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"region": row.json(&app)})))
}

async fn create_region(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    insert_region(&app, None, body).await
}

async fn put_region(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    insert_region(&app, Some(id), body).await
}

async fn insert_region(
    app: &App,
    id: Option<String>,
    mut body: Value,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    // A region's id is its name: the client may choose it, in the body or in the path.
    let chosen = body.get_mut("region").and_then(|region| region.get_mut("id")).map(Value::take);
    let chosen = chosen.and_then(|id| id.as_str().map(str::to_owned));
    let mut fields = Fields::of(body, "region")?;
    let row = RegionRow {
        id: id.or(chosen).unwrap_or_else(new_id),
        description: fields.text("description")?.unwrap_or_default(),
        parent_region_id: fields.text("parent_region_id")?,
        extra: merge_extra("{}", fields.rest()?),
    };
    if row.id.is_empty() || row.id.len() > super::fields::MAX_NAME_CHARS {
        return Err(invalid("id", "must have 1 to 255 characters"));
    }
    let mut tx = super::begin(app).await?;
    if let Some(parent) = &row.parent_region_id {
        find_region(&mut tx, parent).await?;
    }
    sqlx::query("INSERT INTO regions (id, description, parent_region_id, extra) VALUES ($1, $2, $3, $4)")
        .bind(&row.id)
        .bind(&row.description)
        .bind(&row.parent_region_id)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await
        .map_err(|error| match db::is_unique_violation(&error) {
            true => ApiError::Conflict(format!("Conflict occurred: there is already a region {}.", row.id)),
            false => error.into(),
        })?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"region": row.json(app)}))))
}

async fn update_region(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "region")?;
    let mut tx = super::begin(&app).await?;
    let mut row = find_region(&mut tx, &id).await?;
    row.description = fields.text("description")?.unwrap_or(row.description);
    if let Some(parent) = fields.nullable_text("parent_region_id")? {
        // A chain upwards that meets this region would be a ring.
        let mut above = parent.clone();
        while let Some(region) = above {
            if region == id {
                return Err(invalid("parent_region_id", "is this region or one below it"));
            }
            above = find_region(&mut tx, &region).await?.parent_region_id;
        }
        row.parent_region_id = parent;
    }
    fields.unchanged("id", &row.id)?;
    row.extra = merge_extra(&row.extra, fields.rest()?);
    sqlx::query("UPDATE regions SET description = $2, parent_region_id = $3, extra = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.description)
        .bind(&row.parent_region_id)
        .bind(&row.extra)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Json(json!({"region": row.json(&app)})))
}

async fn delete_region(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = super::begin(&app).await?;
    find_region(&mut tx, &id).await?;
    let used: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM regions WHERE parent_region_id = $1)
             OR EXISTS (SELECT 1 FROM endpoints WHERE region_id = $1)",
    )
    .bind(&id)
    .fetch_one(&mut *tx)
    .await?;
    if used {
        return Err(ApiError::Conflict("The region still has regions or endpoints.".into()));
    }
    sqlx::query("DELETE FROM regions WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
