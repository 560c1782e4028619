//! The catalog, and the regions, services and endpoints that it consists of: rows.
//!
//! In an endpoint's URL `$(public_url)s` stands for the controller's own address (what it is made with at first), and
//! `$(project_id)s` or `$(tenant_id)s` for the project of the token; an endpoint that needs a project isn't shown without. A project may see
//! only some of them ([`super::endpoint_filter`]).

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{patch, post},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    endpoint_filter::{self, Chosen},
    fields::{Fields, invalid, merge_extra, with_extra},
    list, new_id,
    resource::{self, Filters, Resource},
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

const INTERFACES: [&str; 3] = ["public", "internal", "admin"];
/// Longest URL of an endpoint.
const MAX_URL_BYTES: usize = 2048;

/// Routes.
pub fn router() -> Router<App> {
    resource::routes::<ServiceRow>(post(create_service), patch(update_service))
        .merge(resource::routes::<EndpointRow>(post(create_endpoint), patch(update_endpoint)))
        .merge(resource::routes::<RegionRow>(post(create_region), patch(update_region).put(put_region)))
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

impl Resource for ServiceRow {
    const NAME: &'static str = "service";
    const PATH: &'static str = "/v3/services";
    const TABLE: &'static str = "services";
    const FILTERS: Filters = &["type", "name"];
    const ORDER: &'static str = "type, id";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }
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
        self.extra = merge_extra(&self.extra, fields.rest_of(&self.id)?);
        Ok(())
    }
}

impl Resource for EndpointRow {
    const NAME: &'static str = "endpoint";
    const PATH: &'static str = "/v3/endpoints";
    const TABLE: &'static str = "endpoints";
    const FILTERS: Filters = &["service_id", "interface", "region_id", "region"];
    const ORDER: &'static str = "service_id, id";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    /// Older clients name the region "region".
    fn column(parameter: &'static str) -> &'static str {
        if parameter == "region" { "region_id" } else { parameter }
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
        self.extra = merge_extra(&self.extra, fields.rest_of(&self.id)?);
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
        resource::find::<ServiceRow>(conn, &self.service_id).await?;
        match &self.region_id {
            Some(region) => resource::find::<RegionRow>(conn, region).await.map(drop),
            None => Ok(()),
        }
    }
}

impl Resource for RegionRow {
    const NAME: &'static str = "region";
    const PATH: &'static str = "/v3/regions";
    const TABLE: &'static str = "regions";
    const FILTERS: Filters = &["parent_region_id"];
    const ORDER: &'static str = "id";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }

    async fn before_delete(&self, conn: &mut Conn) -> Result<(), ApiError> {
        let used: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM regions WHERE parent_region_id = $1)
                 OR EXISTS (SELECT 1 FROM endpoints WHERE region_id = $1)",
        )
        .bind(&self.id)
        .fetch_one(conn)
        .await?;
        match used {
            true => Err(ApiError::Conflict("The region still has regions or endpoints.".into())),
            false => Ok(()),
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
    let mut row: ServiceRow = resource::find(&mut tx, &id).await?;
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
    let mut row: EndpointRow = resource::find(&mut tx, &id).await?;
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
        resource::find::<RegionRow>(&mut tx, parent).await?;
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
    let mut row: RegionRow = resource::find(&mut tx, &id).await?;
    row.description = fields.text("description")?.unwrap_or(row.description);
    if let Some(parent) = fields.nullable_text("parent_region_id")? {
        // A chain upwards that meets this region would be a ring.
        let mut above = parent.clone();
        while let Some(region) = above {
            if region == id {
                return Err(invalid("parent_region_id", "is this region or one below it"));
            }
            above = resource::find::<RegionRow>(&mut tx, &region).await?.parent_region_id;
        }
        row.parent_region_id = parent;
    }
    row.extra = merge_extra(&row.extra, fields.rest_of(&row.id)?);
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
