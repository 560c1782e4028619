//! The catalog, and the lists of services, endpoints and regions that it consists of. Made from the configuration: it
//! can be read through Keystone's API, but not changed.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{list, not_found};
use crate::{
    app::App,
    config::{Config, REGION},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Type, name, path below the public URL.
const SERVICES: [(&str, &str, &str); 4] = [
    ("compute", "nova", "/compute/v2.1"),
    ("identity", "keystone", "/identity/v3"),
    ("image", "glance", "/image"),
    ("network", "neutron", "/network"),
];
const INTERFACES: [&str; 3] = ["public", "internal", "admin"];

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/services", get(services).post(fixed))
        .route("/v3/services/{id}", get(service).patch(fixed).delete(fixed))
        .route("/v3/endpoints", get(endpoints).post(fixed))
        .route("/v3/endpoints/{id}", get(endpoint).patch(fixed).delete(fixed))
        .route("/v3/regions", get(regions).post(fixed))
        .route("/v3/regions/{id}", get(region).patch(fixed).delete(fixed))
}

/// Ids that stay the same: a digest of the name.
fn stable_id(name: &str) -> String {
    hex::encode(&Sha256::digest(format!("mote {name}"))[..16])
}

/// The `catalog` of a token.
pub fn catalog(config: &Config) -> Value {
    SERVICES
        .iter()
        .map(|(kind, name, path)| {
            let endpoints: Vec<Value> = INTERFACES
                .iter()
                .map(|interface| {
                    json!({
                        "id": stable_id(&format!("endpoint {kind} {interface}")),
                        "interface": interface,
                        "region": REGION,
                        "region_id": REGION,
                        "url": format!("{}{path}", config.public_url),
                    })
                })
                .collect();
            json!({
                "id": stable_id(&format!("service {kind}")),
                "type": kind,
                "name": name,
                "endpoints": endpoints,
            })
        })
        .collect()
}

/// `GET /v3/auth/catalog`.
///
/// # Errors
/// 403 for a token without scope, which has none.
pub async fn of_asker(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    if ctx.project_id.is_none() && ctx.domain_id.is_none() {
        return Err(ApiError::Forbidden("A token without scope has no catalog.".into()));
    }
    let items = match catalog(&app.config) {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    Ok(Json(list(&app, "catalog", "/v3/auth/catalog", items)))
}

fn all_services(app: &App) -> Vec<Value> {
    SERVICES
        .iter()
        .map(|(kind, name, _)| {
            let id = stable_id(&format!("service {kind}"));
            let url = format!("{}/identity/v3/services/{id}", app.config.public_url);
            json!({"id": id, "type": kind, "name": name, "enabled": true, "description": "", "links": {"self": url}})
        })
        .collect()
}

fn all_endpoints(app: &App) -> Vec<Value> {
    let base = &app.config.public_url;
    let of_service = |(kind, _, path): &(&str, &str, &str)| {
        let service_id = stable_id(&format!("service {kind}"));
        INTERFACES.map(|interface| {
            let id = stable_id(&format!("endpoint {kind} {interface}"));
            let links = json!({"self": format!("{base}/identity/v3/endpoints/{id}")});
            json!({
                "id": id, "service_id": service_id, "interface": interface, "enabled": true,
                "region": REGION, "region_id": REGION, "url": format!("{base}{path}"), "links": links,
            })
        })
    };
    SERVICES.iter().flat_map(of_service).collect()
}

fn all_regions(app: &App) -> Vec<Value> {
    let url = format!("{}/identity/v3/regions/{REGION}", app.config.public_url);
    vec![json!({"id": REGION, "description": "", "parent_region_id": null, "links": {"self": url}})]
}

/// Keeps the items whose fields are as the parameters say.
fn filtered(items: Vec<Value>, params: &Params, fields: &[&str]) -> Vec<Value> {
    let fits = |item: &Value| {
        fields
            .iter()
            .all(|field| params.get(field).is_none_or(|wanted| item[*field].as_str() == Some(wanted)))
    };
    items.into_iter().filter(fits).collect()
}

fn one(items: Vec<Value>, what: &str, id: &str) -> Result<Json<Value>, ApiError> {
    let item = items.into_iter().find(|item| item["id"] == *id).ok_or_else(|| not_found(what, id))?;
    Ok(Json(json!({ what: item })))
}

async fn services(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let items = filtered(all_services(&app), &params, &["type", "name"]);
    Ok(Json(list(&app, "services", "/v3/services", items)))
}

async fn service(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    one(all_services(&app), "service", &id)
}

async fn endpoints(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let items = filtered(all_endpoints(&app), &params, &["service_id", "interface", "region_id"]);
    Ok(Json(list(&app, "endpoints", "/v3/endpoints", items)))
}

async fn endpoint(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    one(all_endpoints(&app), "endpoint", &id)
}

async fn regions(State(app): State<App>, _ctx: Ctx) -> Json<Value> {
    let items = all_regions(&app);
    Json(list(&app, "regions", "/v3/regions", items))
}

async fn region(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    one(all_regions(&app), "region", &id)
}

async fn fixed(ctx: Ctx, method: Method) -> Result<(), ApiError> {
    ctx.require_admin()?;
    let text = format!("{method} is not supported: the catalog follows from the controller's --public-url.");
    Err(ApiError::NotImplemented(text))
}
