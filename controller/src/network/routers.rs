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
    gateways,
    listing::{Collection, Query},
    networks,
    ports::{self, FixedIps, GATEWAY_OWNER, INTERFACE_OWNER, NewPort, wishes},
    quotas, reach,
    resource::{Change, Resource},
    subnets, zones,
};
use crate::{
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

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
    pub(super) external_network_id: Option<String>,
    enable_snat: bool,
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

    fn document(&self, addresses: &[RouterAddress], zones: &[String]) -> Result<Value, ApiError> {
        let gateway = self.external_network_id.as_ref().map(|network| {
            let fixed: Vec<Value> = addresses
                .iter()
                .filter(|address| address.device_owner == GATEWAY_OWNER)
                .map(|address| json!({"subnet_id": address.subnet_id, "ip_address": address.address}))
                .collect();
            json!({"network_id": network, "enable_snat": self.enable_snat, "external_fixed_ips": fixed})
        });
        Ok(json!({
            "id": self.id, "name": self.name, "description": self.description, "project_id": self.project_id,
            "tenant_id": self.project_id, "admin_state_up": self.admin_state_up,
            "status": if self.admin_state_up { "ACTIVE" } else { "DOWN" }, "external_gateway_info": gateway,
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

/// `external_gateway_info`.
struct Gateway {
    network_id: String,
    enable_snat: Option<bool>,
    fixed_ips: Option<Vec<ports::FixedIpWish>>,
}

/// None: not asked for; `Some(None)`: none wanted.
fn gateway(body: &mut Attributes, scope: &Scope) -> Result<Option<Option<Gateway>>, ApiError> {
    let value = match body.value("external_gateway_info") {
        None => return Ok(None),
        Some(Value::Null) => return Ok(Some(None)),
        Some(Value::Object(map)) if map.is_empty() => return Ok(Some(None)),
        Some(value) => value,
    };
    let mut info = Attributes::of("external_gateway_info", value)?;
    let gateway = Gateway {
        network_id: info.required("network_id")?,
        enable_snat: info.boolean("enable_snat")?,
        fixed_ips: info.list("external_fixed_ips")?.map(wishes).transpose()?,
    };
    info.only(&[("qos_policy_id", json!(""))])?;
    info.finish()?;
    // As in Neutron's policy: both spend or spare addresses of the cloud's.
    if (gateway.enable_snat.is_some() || gateway.fixed_ips.is_some()) && !scope.admin {
        return Err(ApiError::Forbidden(
            "Only an admin can choose SNAT and the addresses of a router's gateway.".into(),
        ));
    }
    Ok(Some(Some(gateway)))
}

async fn gateway_port(tx: &mut Conn, router_id: &str) -> Result<Option<String>, ApiError> {
    let sql = "SELECT id FROM ports WHERE router_id = $1 AND device_owner = $2";
    Ok(sqlx::query_scalar(sql).bind(router_id).bind(GATEWAY_OWNER).fetch_optional(tx).await?)
}

async fn refuse_in_use(tx: &mut Conn, row: &RouterRow) -> Result<(), ApiError> {
    let Some(network) = &row.external_network_id else { return Ok(()) };
    let used: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM floating_ips WHERE router_id = $1)")
        .bind(&row.id)
        .fetch_one(tx)
        .await?;
    match used {
        true => Err(ApiError::Conflict(format!(
            "Gateway cannot be updated for router {}, since a gateway to external network {network} is required by one \
             or more floating IPs.",
            row.id
        ))
        .named("RouterExternalGatewayInUseByFloatingIp")),
        false => Ok(()),
    }
}

async fn clear_gateway(change: &mut Change, row: &RouterRow) -> Result<(), ApiError> {
    refuse_in_use(&mut change.tx, row).await?;
    sqlx::query(
        "UPDATE routers SET external_network_id = NULL, gateway_host_id = NULL, enable_snat = TRUE WHERE id = $1",
    )
    .bind(&row.id)
    .execute(&mut *change.tx)
    .await?;
    if let Some(port) = gateway_port(&mut change.tx, &row.id).await? {
        ports::remove(&mut change.tx, &port).await?;
    }
    Ok(())
}

async fn set_gateway(change: &mut Change, row: &RouterRow, gateway: Gateway) -> Result<(), ApiError> {
    let id = &row.id;
    let same = row.external_network_id.as_ref() == Some(&gateway.network_id);
    if same && gateway.fixed_ips.is_none() {
        sqlx::query("UPDATE routers SET enable_snat = COALESCE($2, enable_snat) WHERE id = $1")
            .bind(id)
            .bind(gateway.enable_snat)
            .execute(&mut *change.tx)
            .await?;
        return Ok(());
    }
    let network = networks::visible(&mut change.tx, &gateway.network_id, &change.scope).await?;
    if !network.external {
        return Err(bad_request("router", format!("Network {} is not an external network", network.id)));
    }
    if !same {
        refuse_in_use(&mut change.tx, row).await?;
    }
    if let Some(port) = gateway_port(&mut change.tx, id).await? {
        ports::remove(&mut change.tx, &port).await?;
    }
    let interfaces = addresses(&mut change.tx, id).await?;
    for subnet in subnets::of_network(&mut change.tx, &network.id).await? {
        refuse_overlap(&interfaces, &subnet.id, subnet.net()?)?;
    }
    let wish = gateway.fixed_ips.map_or(FixedIps::Any, FixedIps::These);
    let new = NewPort { router_id: Some(id.clone()), ..NewPort::own("", GATEWAY_OWNER, id, wish) };
    let port = ports::insert(&mut change.tx, &network.id, &new).await?;
    let addressed = ports::find(&mut change.tx, &port).await?.is_some_and(|port| !port.fixed_ips.is_empty());
    if !addressed {
        return Err(bad_request(
            "router",
            format!("No subnet of network {} has an address left", network.id),
        ));
    }
    sqlx::query(
        "UPDATE routers SET external_network_id = $2, enable_snat = COALESCE($3, enable_snat),
             gateway_host_id = NULL WHERE id = $1",
    )
    .bind(id)
    .bind(&network.id)
    .bind(gateway.enable_snat)
    .execute(&mut *change.tx)
    .await?;
    gateways::place(&mut change.tx, id).await?;
    Ok(())
}

/// Attributes of routers that have one value here.
fn constants() -> [(&'static str, Value); 4] {
    [
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
            "external_gateway_info",
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
            documents.push(row.document(&addresses, &zones)?);
        }
        Ok(documents)
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        body.only(&constants())?;
        let gateway = gateway(&mut body, &change.scope)?;
        let name = body.string("name")?.unwrap_or_default();
        let description = body.string("description")?.unwrap_or_default();
        let up = body.boolean("admin_state_up")?.unwrap_or(true);
        body.finish()?;
        quotas::check(&mut change.tx, &project_id, quotas::Resource::Router).await?;
        let row: RouterRow = sqlx::query_as(
            "INSERT INTO routers (id, project_id, name, description, admin_state_up, created_us, updated_us)
             VALUES ($1, $2, $3, $4, $5, $6, $6) RETURNING *",
        )
        .bind(Uuid::new_v4().to_string())
        .bind(&project_id)
        .bind(name)
        .bind(description)
        .bind(up)
        .bind(now_us())
        .fetch_one(&mut *change.tx)
        .await?;
        if let Some(Some(gateway)) = gateway {
            set_gateway(change, &row, gateway).await?;
        }
        let hosts = reach::of_router(&mut change.tx, &row.id).await?;
        change.concern(hosts);
        Ok(row.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        body.only(&constants())?;
        let gateway = gateway(&mut body, &change.scope)?;
        let (name, description) = (body.string("name")?, body.string("description")?);
        let up = body.boolean("admin_state_up")?;
        let wanted = routes::parse(&mut body)?;
        body.finish()?;
        let row = owned(&mut change.tx, id, &change.scope).await?;
        let hosts = reach::of_router(&mut change.tx, id).await?;
        change.concern(hosts);
        let moves = gateway.is_some();
        match gateway {
            None => {}
            Some(None) => clear_gateway(change, &row).await?,
            Some(Some(gateway)) => set_gateway(change, &row, gateway).await?,
        }
        // Routes by the old gateway's network would lead nowhere.
        if moves || wanted.is_some() {
            let routes = wanted.map_or_else(|| row.routes(), Ok)?;
            routes::write(&mut change.tx, id, &routes).await?;
        }
        sqlx::query(
            "UPDATE routers SET name = COALESCE($2, name), description = COALESCE($3, description),
                 admin_state_up = COALESCE($4, admin_state_up), revision = revision + 1, updated_us = $5
             WHERE id = $1",
        )
        .bind(id)
        .bind(name)
        .bind(description)
        .bind(up)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        let hosts = reach::of_router(&mut change.tx, id).await?;
        change.concern(hosts);
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let row = owned(&mut change.tx, id, &change.scope).await?;
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
        clear_gateway(change, &row).await?;
        sqlx::query("DELETE FROM routers WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        Ok(())
    }
}
