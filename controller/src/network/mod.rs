//! Neutron v2.0 below `/network`.
//!
//! | Call | |
//! |---|---|
//! | `GET /network`, `/network/v2.0`, `/v2.0/extensions` | versions, resources, what is there beyond the core and nothing else |
//! | `/networks`, `/subnets`, `/subnetpools`, `/ports` | with provider attributes, IPv6, port security |
//! | `/security-groups`, `/security-group-rules`, `/address-groups` | filters |
//! | `/routers`, `/floatingips`, `/floatingips/{id}/port_forwardings` | ways between networks and to the outside |
//! | `/qos/policies`, their rules, `/qos/rule-types` | shaping |
//! | `/rbac-policies` | sharing |
//! | `/{collection}/{id}/tags` | tags |
//! | `/quotas`, `/availability_zones`, `/agents`, `/network-ip-availabilities` | limits and views |
//!
//! Each kind of resource is a module that implements [`resource::Resource`]; what the calls have in common is there. A
//! change of what hosts know bumps the generations of those hosts, and of no others, in the same transaction: [`reach`]
//! finds them. A port that belongs to a server takes status and host from it. Each network with an IPv4 subnet has one port
//! with device owner `network:distributed` (as in OVN): the address of its DHCP and metadata service, the same on every
//! host.
//!
//! What is not there is 404 and not in the list of extensions. An attribute that can have one value only is refused with
//! any other. What belongs to another project is not found, whether it is there or not.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, put},
};
use serde_json::{Value, json};

use crate::{
    app::App,
    db::Conn,
    http::{context::Ctx, error::ApiError},
};

mod address_groups;
mod attributes;
pub mod desired;
mod extensions;
mod floating_ips;
pub(crate) mod gateways;
pub(crate) mod ipam;
mod listing;
pub(crate) mod networks;
mod port_forwardings;
pub(crate) mod ports;
mod qos;
pub(crate) mod quotas;
mod rbac;
mod reach;
mod resource;
mod revision;
mod routers;
pub(crate) mod security_group_rules;
mod security_groups;
mod segments;
mod subnet_pools;
pub(crate) mod subnets;
#[cfg(test)]
mod tests;
pub(crate) mod upgrade;
mod views;

use resource::{routes, routes_below};

/// The routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/", get(versions))
        .route("/v2.0", get(resources))
        .route("/v2.0/extensions", get(extensions::list))
        .route("/v2.0/extensions/{alias}", get(extensions::show))
        .merge(routes::<networks::Networks>())
        .merge(routes::<subnets::Subnets>())
        .merge(routes::<subnet_pools::SubnetPools>())
        .merge(routes::<ports::Ports>())
        .merge(routes::<security_groups::SecurityGroups>())
        .merge(routes::<security_group_rules::SecurityGroupRules>())
        .merge(routes::<address_groups::AddressGroups>())
        .route("/v2.0/address-groups/{id}/add_addresses", put(address_groups::add_addresses))
        .route("/v2.0/address-groups/{id}/remove_addresses", put(address_groups::remove_addresses))
        .merge(routes::<routers::Routers>())
        .route("/v2.0/routers/{id}/add_router_interface", put(routers::interfaces::add))
        .route("/v2.0/routers/{id}/remove_router_interface", put(routers::interfaces::remove))
        .route("/v2.0/routers/{id}/add_extraroutes", put(routers::routes::add))
        .route("/v2.0/routers/{id}/remove_extraroutes", put(routers::routes::remove))
        .route("/v2.0/routers/{id}/add_external_gateways", put(routers::external::add))
        .route("/v2.0/routers/{id}/update_external_gateways", put(routers::external::update))
        .route("/v2.0/routers/{id}/remove_external_gateways", put(routers::external::remove))
        .merge(routes::<floating_ips::FloatingIps>())
        .merge(routes_below::<port_forwardings::PortForwardings>("/v2.0/floatingips"))
        .merge(routes::<rbac::RbacPolicies>())
        .merge(routes::<qos::Policies>())
        .merge(routes_below::<qos::BandwidthLimits>("/v2.0/qos/policies"))
        .merge(routes_below::<qos::DscpMarks>("/v2.0/qos/policies"))
        .route("/v2.0/qos/rule-types", get(qos::rule_types))
        .route("/v2.0/qos/rule-types/{type}", get(qos::rule_type))
        .route("/v2.0/quotas", get(quotas::list))
        .route("/v2.0/quotas/{project}", get(quotas::show).put(quotas::update).delete(quotas::reset))
        .route("/v2.0/quotas/{project}/default", get(quotas::default))
        .route("/v2.0/quotas/{project}/details", get(quotas::details))
        .route("/v2.0/availability_zones", get(views::availability_zones))
        .route("/v2.0/agents", get(views::agents))
        .route("/v2.0/agents/{id}", get(views::agent))
        .route("/v2.0/network-ip-availabilities", get(views::ip_availabilities))
        .route("/v2.0/network-ip-availabilities/{id}", get(views::ip_availability))
}

/// The paths of lists and of what is in them, with the attributes that they are filtered and ordered by, for docs/openapi.json.
#[cfg(test)]
pub(crate) fn collections() -> Vec<(String, &'static [&'static str])> {
    use resource::Resource;
    fn of<R: Resource>(parent: &str) -> (String, &'static [&'static str]) {
        (format!("/network/v2.0/{parent}{}", R::PATH), R::COLLECTION.attributes)
    }
    vec![
        of::<networks::Networks>(""),
        of::<subnets::Subnets>(""),
        of::<subnet_pools::SubnetPools>(""),
        of::<ports::Ports>(""),
        of::<security_groups::SecurityGroups>(""),
        of::<security_group_rules::SecurityGroupRules>(""),
        of::<address_groups::AddressGroups>(""),
        of::<routers::Routers>(""),
        of::<floating_ips::FloatingIps>(""),
        of::<port_forwardings::PortForwardings>("floatingips/{parent}/"),
        of::<rbac::RbacPolicies>(""),
        of::<qos::Policies>(""),
        of::<qos::BandwidthLimits>("qos/policies/{parent}/"),
        of::<qos::DscpMarks>("qos/policies/{parent}/"),
        ("/network/v2.0/agents".into(), views::AGENTS.attributes),
        ("/network/v2.0/network-ip-availabilities".into(), views::AVAILABILITIES.attributes),
    ]
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
    let resource = |(name, collection): (&str, &str)| {
        let href = format!("{}/{collection}", base(&app));
        json!({"name": name, "collection": collection, "links": [{"rel": "self", "href": href}]})
    };
    let resources = [
        ("network", "networks"),
        ("subnet", "subnets"),
        ("subnetpool", "subnetpools"),
        ("port", "ports"),
        ("security_group", "security-groups"),
        ("security_group_rule", "security-group-rules"),
        ("address_group", "address-groups"),
        ("router", "routers"),
        ("floatingip", "floatingips"),
        ("rbac_policy", "rbac-policies"),
        ("quota", "quotas"),
        ("agent", "agents"),
        ("extension", "extensions"),
    ];
    Json(json!({"resources": resources.map(resource)}))
}

/// The zones that hosts are in: a network can be on each of them.
async fn zones(db: &mut Conn) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT DISTINCT availability_zone FROM hosts ORDER BY availability_zone";
    Ok(sqlx::query_scalar(sql).fetch_all(db).await?)
}

/// Whose resources a request may see and change.
#[derive(Debug, Clone)]
struct Scope {
    project: String,
    admin: bool,
    /// The resource that the request's resources are below, if any.
    parent: String,
}

impl Scope {
    fn reading(ctx: &Ctx) -> Result<Self, ApiError> {
        let project = ctx.require_project()?.to_owned();
        Ok(Self { project, admin: ctx.is_admin, parent: String::new() })
    }

    fn writing(ctx: &Ctx) -> Result<Self, ApiError> {
        ctx.require_writer()?;
        Self::reading(ctx)
    }

    /// What a project may do by itself.
    fn of_project(project: &str) -> Self {
        Self { project: project.to_owned(), admin: false, parent: String::new() }
    }

    fn below(self, parent: String) -> Self {
        Self { parent, ..self }
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

/// A path's last part.
type Id = Path<String>;
