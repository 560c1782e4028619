//! Neutron v2.0 below `/network`: networks, subnets, ports.
//!
//! | Call | |
//! |---|---|
//! | `GET /network`, `/network/v2.0` | versions, resources |
//! | `GET /network/v2.0/extensions[/{alias}]` | what is there beyond the core, and nothing else |
//! | `/network/v2.0/networks`, `/subnets`, `/ports` | create, list, show, update, delete |
//! | `GET /network/v2.0/quotas[/{project}]`, `/quotas/{project}/default` | the limits |
//! | `GET /network/v2.0/availability_zones` | zones of the hosts |
//!
//! A change of what hosts know of a network bumps their generations in the same transaction. A port that belongs to a
//! server takes status and host from it. Each network with a subnet has one port with device owner
//! `network:distributed` (as in OVN): the address of its DHCP and metadata service, the same on every host.
//!
//! What is not there (routers, floating IPs, security groups) is 404 and not in the list of extensions. An attribute
//! that can have one value only is refused with any other.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use serde_json::{Value, json};

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

mod attributes;
mod extensions;
pub(crate) mod ipam;
mod listing;
pub(crate) mod networks;
pub(crate) mod ports;
pub(crate) mod quotas;
pub(crate) mod subnets;

/// The routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/", get(versions))
        .route("/v2.0", get(resources))
        .route("/v2.0/extensions", get(extensions::list))
        .route("/v2.0/extensions/{alias}", get(extensions::show))
        .route("/v2.0/networks", get(networks::list).post(networks::create))
        .route("/v2.0/networks/{id}", get(networks::show).put(networks::update).delete(networks::delete))
        .route("/v2.0/subnets", get(subnets::list).post(subnets::create))
        .route("/v2.0/subnets/{id}", get(subnets::show).put(subnets::update).delete(subnets::delete))
        .route("/v2.0/ports", get(ports::list).post(ports::create))
        .route("/v2.0/ports/{id}", get(ports::show).put(ports::update).delete(ports::delete))
        .route("/v2.0/quotas", get(quotas::list))
        .route("/v2.0/quotas/{project}", get(quotas::show).put(quotas::update).delete(quotas::reset))
        .route("/v2.0/quotas/{project}/default", get(quotas::default))
        .route("/v2.0/availability_zones", get(availability_zones))
}

/// The base of all links.
fn base(app: &App) -> String {
    format!("{}/network/v2.0", app.config.public_url)
}

async fn versions(State(app): State<App>) -> Json<Value> {
    let links = json!([{"rel": "self", "href": base(&app) + "/"}]);
    Json(json!({"versions": [{"id": "v2.0", "status": "CURRENT", "links": links}]}))
}

async fn resources(State(app): State<App>) -> Json<Value> {
    let resource = |name: &str| {
        let href = format!("{}/{name}s", base(&app));
        json!({"name": name, "collection": format!("{name}s"), "links": [{"rel": "self", "href": href}]})
    };
    let resources = ["network", "subnet", "port", "quota", "extension"].map(resource);
    Json(json!({"resources": resources}))
}

async fn availability_zones(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_project()?;
    let zones: Vec<Value> = zones(&app)
        .await?
        .into_iter()
        .map(|name| json!({"name": name, "resource": "network", "state": "available"}))
        .collect();
    Ok(Json(json!({"availability_zones": zones})))
}

/// The zones that hosts are in: a network can be on each of them.
async fn zones(app: &App) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT DISTINCT availability_zone FROM hosts ORDER BY availability_zone";
    Ok(sqlx::query_scalar(sql).fetch_all(&app.db).await?)
}

/// Whose resources a request may see and change.
#[derive(Debug, Clone)]
struct Scope {
    project: String,
    admin: bool,
}

impl Scope {
    fn reading(ctx: &Ctx) -> Result<Self, ApiError> {
        Ok(Self { project: ctx.require_project()?.to_owned(), admin: ctx.is_admin })
    }

    fn writing(ctx: &Ctx) -> Result<Self, ApiError> {
        ctx.require_writer()?;
        Self::reading(ctx)
    }

    /// The project of a new resource: the asker's, or the one that an admin names.
    fn owner(&self, body: &mut attributes::Attributes) -> Result<String, ApiError> {
        let named = [body.string("project_id")?, body.string("tenant_id")?];
        let owner = named.into_iter().flatten().next().unwrap_or_else(|| self.project.clone());
        match self.owns(&owner) {
            true => Ok(owner),
            false => {
                Err(ApiError::Forbidden("Only an admin can create resources of another project.".into()))
            }
        }
    }

    fn owns(&self, project: &str) -> bool {
        self.admin || self.project == project
    }
}

/// Neutron's 404.
fn not_found(kind: &'static str, id: &str) -> ApiError {
    let name = match kind {
        "Network" => "NetworkNotFound",
        "Subnet" => "SubnetNotFound",
        _ => "PortNotFound",
    };
    ApiError::NotFound(format!("{kind} {id} could not be found.")).named(name)
}

/// A path's last part.
type Id = Path<String>;
