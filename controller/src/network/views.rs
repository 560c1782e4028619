//! What admins see of the cloud's networks: how full they are, and hosts as Neutron's agents.

use axum::{
    Json,
    extract::{Path, Query as Params, State},
};
use ipnet::IpNet;
use serde_json::{Value, json};
use sqlx::FromRow;

use super::{
    Id, Scope, base,
    listing::{Collection, Query},
    networks::Networks,
    resource::Resource,
};
use crate::{
    app::App,
    db::{Conn, rfc3339_s},
    hosts,
    http::{context::Ctx, error::ApiError},
};

type Pairs = Params<Vec<(String, String)>>;

pub(super) const AVAILABILITIES: Collection = Collection {
    name: "network_ip_availabilities",
    attributes: &[
        "network_id",
        "network_name",
        "project_id",
        "subnet_ip_availability",
        "tenant_id",
        "total_ips",
        "used_ips",
    ],
};

pub(super) const ZONES: Collection =
    Collection { name: "availability_zones", attributes: &["name", "resource", "state"] };

pub(super) const AGENTS: Collection = Collection {
    name: "agents",
    attributes: &[
        "admin_state_up",
        "agent_type",
        "alive",
        "availability_zone",
        "binary",
        "configurations",
        "created_at",
        "description",
        "heartbeat_timestamp",
        "host",
        "id",
        "started_at",
        "topic",
    ],
};

#[derive(Debug, FromRow)]
struct SubnetUse {
    network_id: String,
    network_name: String,
    project_id: String,
    subnet_id: Option<String>,
    subnet_name: Option<String>,
    cidr: Option<String>,
    ip_version: Option<i64>,
    allocation_pools: Option<String>,
    used: i64,
}

/// Addresses of a subnet's pools. A sum of IPv6 pools doesn't fit into JSON's usual numbers; it is exact all the same.
fn total(pools: &str) -> u128 {
    let pools: Vec<super::ipam::Pool> = serde_json::from_str(pools).unwrap_or_default();
    let number = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
        std::net::IpAddr::V6(ip) => u128::from(ip),
    };
    pools.iter().map(|pool| number(pool.end).saturating_sub(number(pool.start)).saturating_add(1)).sum()
}

/// A number for JSON: exact as far as 64 bits go, the largest of them beyond.
fn shown(number: u128) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// `ip_versions`: those that subnets are counted of; none: all. A network without any is left out then, as in Neutron.
async fn availabilities(db: &mut Conn, ip_versions: Option<&[String]>) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<SubnetUse> = sqlx::query_as(
        "SELECT networks.id AS network_id, networks.name AS network_name, networks.project_id,
             subnets.id AS subnet_id, subnets.name AS subnet_name, subnets.cidr, subnets.ip_version,
             subnets.allocation_pools,
             (SELECT COUNT(*) FROM fixed_ips WHERE fixed_ips.subnet_id = subnets.id) AS used
         FROM networks LEFT JOIN subnets ON subnets.network_id = networks.id
         ORDER BY networks.created_us, networks.id, subnets.created_us, subnets.id",
    )
    .fetch_all(db)
    .await?;
    let mut documents: Vec<(Value, u128, i64)> = Vec::new();
    let counts = |row: &SubnetUse| {
        let version = row.ip_version.map(|version| version.to_string());
        ip_versions.is_none_or(|wanted| version.is_some_and(|version| wanted.contains(&version)))
    };
    for row in rows.into_iter().filter(counts) {
        if documents.last().is_none_or(|(last, ..)| last["network_id"] != row.network_id.as_str()) {
            let document = json!({
                "network_id": row.network_id, "network_name": row.network_name, "project_id": row.project_id,
                "tenant_id": row.project_id, "subnet_ip_availability": [],
            });
            documents.push((document, 0, 0));
        }
        let (Some(id), Some((document, sum, used))) = (&row.subnet_id, documents.last_mut()) else {
            continue;
        };
        let all = total(row.allocation_pools.as_deref().unwrap_or_default());
        *sum = sum.saturating_add(all);
        *used += row.used;
        let cidr: Option<IpNet> = row.cidr.as_ref().and_then(|cidr| cidr.parse().ok());
        if let Value::Array(list) = &mut document["subnet_ip_availability"] {
            list.push(json!({
                "subnet_id": id, "subnet_name": row.subnet_name, "cidr": cidr.map(|net| net.to_string()),
                "ip_version": row.ip_version, "total_ips": shown(all), "used_ips": row.used,
            }));
        }
    }
    let finish = |(mut document, sum, used): (Value, u128, i64)| {
        document["total_ips"] = json!(shown(sum));
        document["used_ips"] = json!(used);
        document
    };
    Ok(documents.into_iter().map(finish).collect())
}

/// `GET /v2.0/network-ip-availabilities` (admin).
pub(super) async fn ip_availabilities(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    // By subnet, and no attribute of what is shown.
    let (versions, pairs): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(key, _)| key == "ip_version");
    let versions: Vec<String> = versions.into_iter().map(|(_, version)| version).collect();
    let versions = Some(&versions[..]).filter(|versions| !versions.is_empty());
    let query = Query::parse(pairs, AVAILABILITIES)?;
    let documents = availabilities(&mut *app.db.acquire().await?, versions).await?;
    query.answer(documents, AVAILABILITIES, &format!("{}/network-ip-availabilities", base(&app))).map(Json)
}

/// `GET /v2.0/network-ip-availabilities/{network}` (admin).
pub(super) async fn ip_availability(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let documents = availabilities(&mut *app.db.acquire().await?, None).await?;
    let found = documents.into_iter().find(|document| document["network_id"] == *id);
    Ok(Json(json!({"network_ip_availability": found.ok_or_else(|| Networks::missing(&id))?})))
}

#[derive(Debug, FromRow)]
struct HostRow {
    id: String,
    name: String,
    availability_zone: String,
    enabled: bool,
    last_seen_us: i64,
    created_us: i64,
    tunnel_ip: Option<String>,
    physical_networks: String,
    ports: i64,
    gateways: i64,
}

/// mote-hostd does what several of Neutron's agents do; it is shown as one.
async fn hosts_as_agents(db: &mut Conn) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<HostRow> = sqlx::query_as(
        "SELECT hosts.id, hosts.name, hosts.availability_zone, hosts.enabled, hosts.last_seen_us, hosts.created_us,
             hosts.tunnel_ip, hosts.physical_networks,
             (SELECT COUNT(*) FROM ports JOIN servers ON servers.id = ports.server_id
                 WHERE servers.host_id = hosts.id) AS ports,
             (SELECT COUNT(*) FROM routers WHERE routers.gateway_host_id = hosts.id) AS gateways
         FROM hosts ORDER BY hosts.name",
    )
    .fetch_all(db)
    .await?;
    let time = |us: i64| rfc3339_s(us).replace('T', " ").trim_end_matches('Z').to_owned();
    let document = |row: HostRow| {
        let physical: Value = serde_json::from_str(&row.physical_networks).unwrap_or_else(|_| json!([]));
        json!({
            "id": row.id, "host": row.name, "binary": "mote-hostd", "agent_type": "Mote host", "topic": "N/A",
            "availability_zone": row.availability_zone, "alive": hosts::is_up(row.last_seen_us),
            "admin_state_up": row.enabled, "description": "", "created_at": time(row.created_us),
            "started_at": time(row.created_us), "heartbeat_timestamp": time(row.last_seen_us),
            "configurations": {
                "devices": row.ports, "gateways": row.gateways, "tunnel_types": ["vxlan"],
                "tunneling_ip": row.tunnel_ip, "physical_networks": physical,
            },
        })
    };
    Ok(rows.into_iter().map(document).collect())
}

/// `GET /v2.0/agents` (admin).
pub(super) async fn agents(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let query = Query::parse(pairs, AGENTS)?;
    let documents = hosts_as_agents(&mut *app.db.acquire().await?).await?;
    query.answer(documents, AGENTS, &format!("{}/agents", base(&app))).map(Json)
}

/// `GET /v2.0/agents/{id}` (admin).
pub(super) async fn agent(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let documents = hosts_as_agents(&mut *app.db.acquire().await?).await?;
    let missing = || ApiError::NotFound(format!("Agent {id} could not be found.")).named("AgentNotFound");
    let found = documents.into_iter().find(|document| document["id"] == *id);
    Ok(Json(json!({"agent": found.ok_or_else(missing)?})))
}

/// `GET /v2.0/availability_zones`: for networks and for routers.
pub(super) async fn availability_zones(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    Scope::reading(&ctx)?;
    let query = Query::parse(pairs, ZONES)?;
    let zones = super::zones(&mut *app.db.acquire().await?).await?;
    let document =
        |name: &String, resource: &str| json!({"name": name, "resource": resource, "state": "available"});
    let zones: Vec<Value> = zones
        .iter()
        .flat_map(|name| ["network", "router"].map(|resource| document(name, resource)))
        .collect();
    query.answer(zones, ZONES, &format!("{}/availability_zones", base(&app))).map(Json)
}
