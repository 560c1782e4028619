//! Routers: documents, gateways, routes. Their interfaces are in [`interfaces`], the choice of the gateway's host in
//! [`gateways`](super::gateways).

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::Attributes,
    listing::{Collection, Query},
    ports::INTERFACE_OWNER,
    quotas, reach,
    resource::{Change, Resource},
    zones,
};
use crate::{
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

pub(super) mod external;
pub(super) mod interfaces;
pub(super) mod routes;

/// Routers as resources.
pub(super) struct Routers;

/// A router as stored.
#[derive(Debug, Clone, FromRow)]
pub(super) struct RouterRow {
    pub(super) id: String,
    pub(super) project_id: String,
    name: String,
    description: String,
    admin_state_up: bool,
    enable_default_route_ecmp: bool,
    routes: String,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

/// A static route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    pub(super) nexthop: IpAddr,
}

/// An address of a router with its subnet.
#[derive(Debug, Clone, FromRow)]
pub(super) struct RouterAddress {
    pub(super) port_id: String,
    pub(super) network_id: String,
    pub(super) device_owner: String,
    pub(super) subnet_id: String,
    pub(super) address: String,
    pub(super) cidr: String,
}

impl RouterRow {
    pub(super) fn routes(&self) -> Result<Vec<Route>, ApiError> {
        serde_json::from_str(&self.routes).map_err(ApiError::internal)
    }

    fn document(&self, gateways: &[Value], zones: &[String]) -> Result<Value, ApiError> {
        Ok(json!({
            "id": self.id, "name": self.name, "description": self.description, "project_id": self.project_id,
            "tenant_id": self.project_id, "admin_state_up": self.admin_state_up,
            "status": if self.admin_state_up { "ACTIVE" } else { "DOWN" },
            "external_gateway_info": gateways.first(), "external_gateways": gateways,
            "enable_default_route_ecmp": self.enable_default_route_ecmp,
            "routes": self.routes()?, "availability_zones": zones, "availability_zone_hints": [],
            "flavor_id": null, "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        }))
    }
}

/// Neutron's `BadRequest`.
pub(super) fn bad_request(resource: &str, text: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("Bad {resource} request: {text}.")).named("BadRequest")
}

/// The router, if it is the asker's.
pub(super) async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<RouterRow, ApiError> {
    let row: Option<RouterRow> =
        sqlx::query_as("SELECT * FROM routers WHERE id = $1").bind(id).fetch_optional(db).await?;
    row.filter(|row| scope.owns(&row.project_id)).ok_or_else(|| Routers::missing(id))
}

/// The addresses of a router's interfaces and of its gateway.
pub(super) async fn addresses(db: &mut Conn, router_id: &str) -> Result<Vec<RouterAddress>, ApiError> {
    Ok(sqlx::query_as(
        "SELECT ports.id AS port_id, ports.network_id, ports.device_owner, fixed_ips.subnet_id, fixed_ips.address,
             subnets.cidr
         FROM ports JOIN fixed_ips ON fixed_ips.port_id = ports.id JOIN subnets ON subnets.id = fixed_ips.subnet_id
         WHERE ports.router_id = $1 ORDER BY ports.created_us, ports.id, fixed_ips.position",
    )
    .bind(router_id)
    .fetch_all(db)
    .await?)
}

/// Refuses a subnet that overlaps with one that the router has already.
pub(super) fn refuse_overlap(
    addresses: &[RouterAddress],
    subnet_id: &str,
    cidr: IpNet,
) -> Result<(), ApiError> {
    for other in addresses {
        if other.subnet_id == subnet_id {
            return Err(bad_request("router", format!("Router already has a port on subnet {subnet_id}")));
        }
        let net: IpNet = other.cidr.parse().map_err(ApiError::internal)?;
        if net.contains(&cidr) || cidr.contains(&net) {
            return Err(bad_request(
                "router",
                format!(
                    "Cidr {cidr} of subnet {subnet_id} overlaps with cidr {net} of subnet {}",
                    other.subnet_id
                ),
            ));
        }
    }
    Ok(())
}

/// One more revision.
async fn touch(tx: &mut Conn, router_id: &str) -> Result<(), ApiError> {
    sqlx::query("UPDATE routers SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(router_id)
        .bind(now_us())
        .execute(tx)
        .await?;
    Ok(())
}

/// Takes `enable_default_route_ecmp`, which is for admins, as in Neutron's policy.
fn ecmp(body: &mut Attributes, scope: &Scope) -> Result<Option<bool>, ApiError> {
    if body.value_is_null("enable_default_route_ecmp") {
        body.value("enable_default_route_ecmp");
    }
    let wanted = body.boolean("enable_default_route_ecmp")?;
    match wanted.is_some() && !scope.admin {
        true => Err(ApiError::Forbidden("Only an admin can choose where default routes lead.".into())),
        false => Ok(wanted),
    }
}

/// Attributes of routers that have one value here.
fn constants() -> [(&'static str, Value); 5] {
    [
        // Nothing here watches gateways by BFD.
        ("enable_default_route_bfd", json!(false)),
        ("distributed", json!(true)),
        ("ha", json!(false)),
        ("availability_zone_hints", json!([])),
        ("flavor_id", json!("")),
    ]
}

impl Resource for Routers {
    const NAME: &'static str = "router";
    const PATH: &'static str = "routers";
    const COLLECTION: Collection = Collection {
        name: "routers",
        attributes: &[
            "admin_state_up",
            "availability_zone_hints",
            "availability_zones",
            "created_at",
            "description",
            "enable_default_route_ecmp",
            "external_gateway_info",
            "external_gateways",
            "flavor_id",
            "id",
            "name",
            "project_id",
            "revision_number",
            "routes",
            "status",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Router {id} could not be found")).named("RouterNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = QueryBuilder::new("SELECT * FROM routers WHERE (");
        statement.push_bind(scope.admin).push(" OR project_id = ").push_bind(scope.project.clone()).push(")");
        query.narrow(&mut statement, &[("id", "id"), ("name", "name")]);
        statement.push(" ORDER BY created_us, id");
        let rows: Vec<RouterRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let zones = zones(db).await?;
        let mut documents = Vec::with_capacity(rows.len());
        for row in rows {
            let addresses = addresses(db, &row.id).await?;
            let gateways = external::documents(&external::of(db, &row.id).await?, &addresses);
            documents.push(row.document(&gateways, &zones)?);
        }
        Ok(documents)
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        body.only(&constants())?;
        let gateway = external::first(&mut body, &change.scope)?;
        let ecmp = ecmp(&mut body, &change.scope)?.unwrap_or(false);
        let name = body.string("name")?.unwrap_or_default();
        let description = body.string("description")?.unwrap_or_default();
        let up = body.boolean("admin_state_up")?.unwrap_or(true);
        body.finish()?;
        quotas::check(&mut change.tx, &project_id, quotas::Resource::Router).await?;
        let row: RouterRow = sqlx::query_as(
            "INSERT INTO routers (id, project_id, name, description, admin_state_up, enable_default_route_ecmp,
                 created_us, updated_us) VALUES ($1, $2, $3, $4, $5, $6, $7, $7) RETURNING *",
        )
        .bind(Uuid::new_v4().to_string())
        .bind(&project_id)
        .bind(name)
        .bind(description)
        .bind(up)
        .bind(ecmp)
        .bind(now_us())
        .fetch_one(&mut *change.tx)
        .await?;
        if let Some(Some(gateway)) = gateway {
            external::set_first(change, &row.id, Some(gateway)).await?;
        }
        let hosts = reach::of_router(&mut change.tx, &row.id).await?;
        change.concern(hosts);
        Ok(row.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        body.only(&constants())?;
        let gateway = external::first(&mut body, &change.scope)?;
        let ecmp = ecmp(&mut body, &change.scope)?;
        let (name, description) = (body.string("name")?, body.string("description")?);
        let up = body.boolean("admin_state_up")?;
        let wanted = routes::parse(&mut body)?;
        body.finish()?;
        let row = owned(&mut change.tx, id, &change.scope).await?;
        let hosts = reach::of_router(&mut change.tx, id).await?;
        change.concern(hosts);
        let moves = gateway.is_some();
        if let Some(gateway) = gateway {
            external::set_first(change, id, gateway).await?;
        }
        // Routes by the old gateway's network would lead nowhere.
        if moves || wanted.is_some() {
            let routes = wanted.map_or_else(|| row.routes(), Ok)?;
            routes::write(&mut change.tx, id, &routes).await?;
        }
        sqlx::query(
            "UPDATE routers SET name = COALESCE($2, name), description = COALESCE($3, description),
                 admin_state_up = COALESCE($4, admin_state_up),
                 enable_default_route_ecmp = COALESCE($5, enable_default_route_ecmp), revision = revision + 1,
                 updated_us = $6 WHERE id = $1",
        )
        .bind(id)
        .bind(name)
        .bind(description)
        .bind(up)
        .bind(ecmp)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        let hosts = reach::of_router(&mut change.tx, id).await?;
        change.concern(hosts);
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        owned(&mut change.tx, id, &change.scope).await?;
        let used: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM ports WHERE router_id = $1 AND device_owner = $2)",
        )
        .bind(id)
        .bind(INTERFACE_OWNER)
        .fetch_one(&mut *change.tx)
        .await?;
        if used {
            return Err(ApiError::Conflict(format!("Router {id} still has ports")).named("RouterInUse"));
        }
        let hosts = reach::of_router(&mut change.tx, id).await?;
        change.concern(hosts);
        external::clear(change, id).await?;
        sqlx::query("DELETE FROM routers WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        Ok(())
    }
}
