//! Subnets (IPv4).

use crate::db::Conn;
use std::net::Ipv4Addr;

use axum::{
    Json,
    extract::{Path, Query as Params, State},
};
use http::StatusCode;
use ipnet::Ipv4Net;
use mote_host_api::HostRoute;
use serde_json::{Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::{
    Id, Scope,
    attributes::{Attributes, address, invalid},
    base,
    ipam::{self, Pool, Range},
    listing::{Collection, Query},
    networks::{self, NetworkRow},
    not_found, ports, quotas,
};
use crate::{
    app::App,
    db::{now_us, rfc3339_s},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Prefixes that make sense: from a /8 to the smallest with a gateway and one more device.
const PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;
/// Neutron's limits (`max_dns_nameservers`, `max_subnet_host_routes`), and one for pools.
const MAX_NAMESERVERS: usize = 5;
const MAX_ROUTES: usize = 20;
const MAX_POOLS: usize = 64;

const SUBNETS: Collection = Collection {
    name: "subnets",
    attributes: &[
        "allocation_pools",
        "cidr",
        "created_at",
        "description",
        "dns_nameservers",
        "enable_dhcp",
        "gateway_ip",
        "host_routes",
        "id",
        "ip_version",
        "ipv6_address_mode",
        "ipv6_ra_mode",
        "name",
        "network_id",
        "project_id",
        "revision_number",
        "service_types",
        "shared",
        "subnetpool_id",
        "tags",
        "tenant_id",
        "updated_at",
    ],
};

#[derive(Debug, Clone, FromRow)]
struct SubnetRow {
    id: String,
    network_id: String,
    project_id: String,
    name: String,
    description: String,
    cidr: String,
    gateway_ip: Option<String>,
    enable_dhcp: bool,
    dns_nameservers: String,
    host_routes: String,
    allocation_pools: String,
    next_ip: i64,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

/// A subnet, checked.
#[derive(Debug, Clone)]
pub(crate) struct SubnetConfig {
    name: String,
    description: String,
    cidr: Ipv4Net,
    gateway_ip: Option<Ipv4Addr>,
    enable_dhcp: bool,
    dns_nameservers: Vec<Ipv4Addr>,
    host_routes: Vec<HostRoute>,
    pools: Vec<Pool>,
}

impl SubnetConfig {
    /// A subnet with gateway `.1`, all other addresses in its pool, and DHCP.
    pub(crate) fn plain(name: &str, cidr: Ipv4Net) -> Self {
        let gateway_ip = Some(ipam::device_range(cidr).0);
        Self {
            name: name.into(),
            description: String::new(),
            cidr,
            gateway_ip,
            enable_dhcp: true,
            dns_nameservers: Vec::new(),
            host_routes: Vec::new(),
            pools: ipam::default_pools(cidr, gateway_ip),
        }
    }

    fn parse(body: &mut Attributes) -> Result<Self, ApiError> {
        body.only(&constants())?;
        let cidr = body.string("cidr")?.ok_or_else(|| {
            ApiError::BadRequest("a subnet must have a cidr: subnet pools are not supported".into())
        })?;
        let mut config = Self::plain("", parse_subnet_cidr(&cidr)?);
        if let Some(gateway) = body.value("gateway_ip") {
            config.gateway_ip = parse_gateway(config.cidr, &gateway)?;
            config.pools = ipam::default_pools(config.cidr, config.gateway_ip);
        }
        config.merge(body)?;
        Ok(config)
    }

    /// What can be given at creation and changed later.
    fn merge(&mut self, body: &mut Attributes) -> Result<(), ApiError> {
        if let Some(name) = body.string("name")? {
            self.name = name;
        }
        if let Some(description) = body.string("description")? {
            self.description = description;
        }
        if let Some(enable_dhcp) = body.boolean("enable_dhcp")? {
            self.enable_dhcp = enable_dhcp;
        }
        if let Some(list) = body.list("dns_nameservers")? {
            limited("dns_nameservers", &list, MAX_NAMESERVERS)?;
            let parsed: Result<_, _> = list.iter().map(|server| address("dns_nameservers", server)).collect();
            self.dns_nameservers = parsed?;
        }
        if let Some(list) = body.list("host_routes")? {
            limited("host_routes", &list, MAX_ROUTES)?;
            let parsed: Result<_, _> = list.into_iter().map(serde_json::from_value).collect();
            self.host_routes = parsed.map_err(|error| invalid("host_routes", error))?;
        }
        if let Some(list) = body.list("allocation_pools")? {
            limited("allocation_pools", &list, MAX_POOLS)?;
            let parsed: Result<Vec<Pool>, _> = list.into_iter().map(serde_json::from_value).collect();
            let pools = parsed.map_err(|error| invalid("allocation_pools", error))?;
            self.pools = ipam::check_pools(self.cidr, self.gateway_ip, pools)?;
        }
        Ok(())
    }
}

impl SubnetRow {
    fn config(&self) -> Result<SubnetConfig, ApiError> {
        Ok(SubnetConfig {
            name: self.name.clone(),
            description: self.description.clone(),
            cidr: self.cidr.parse().map_err(ApiError::internal)?,
            gateway_ip: self.gateway_ip.as_deref().map(str::parse).transpose().map_err(ApiError::internal)?,
            enable_dhcp: self.enable_dhcp,
            dns_nameservers: stored(&self.dns_nameservers)?,
            host_routes: stored(&self.host_routes)?,
            pools: stored(&self.allocation_pools)?,
        })
    }

    fn range(&self) -> Result<Range, ApiError> {
        let config = self.config()?;
        Ok(Range {
            subnet_id: self.id.clone(),
            cidr: config.cidr,
            pools: config.pools,
            next: u32::try_from(self.next_ip).unwrap_or(0),
        })
    }

    fn document(&self) -> Result<Value, ApiError> {
        let config = self.config()?;
        Ok(json!({
            "id": self.id, "network_id": self.network_id, "name": self.name, "description": self.description,
            "project_id": self.project_id, "tenant_id": self.project_id,
            "ip_version": 4, "cidr": self.cidr, "gateway_ip": self.gateway_ip,
            "allocation_pools": config.pools, "enable_dhcp": self.enable_dhcp,
            "dns_nameservers": config.dns_nameservers, "host_routes": config.host_routes,
            "ipv6_address_mode": null, "ipv6_ra_mode": null, "subnetpool_id": null,
            "service_types": [], "tags": [], "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        }))
    }
}

fn stored<T: serde::de::DeserializeOwned>(json: &str) -> Result<T, ApiError> {
    serde_json::from_str(json).map_err(ApiError::internal)
}

fn limited(name: &str, list: &[Value], most: usize) -> Result<(), ApiError> {
    match list.len() > most {
        true => Err(invalid(name, format!("more than {most} entries"))),
        false => Ok(()),
    }
}

/// Attributes of subnets that have one value here.
fn constants() -> [(&'static str, Value); 7] {
    [
        ("ip_version", json!(4)),
        ("ipv6_address_mode", json!("")),
        ("ipv6_ra_mode", json!("")),
        ("subnetpool_id", json!("")),
        ("segment_id", json!("")),
        ("service_types", json!([])),
        ("tags", json!([])),
    ]
}

fn parse_subnet_cidr(text: &str) -> Result<Ipv4Net, ApiError> {
    let cidr = ipam::parse_cidr(text)?;
    if !PREFIXES.contains(&cidr.prefix_len()) {
        let reason = format!(
            "the prefix of '{text}' is not in range /{} through /{}",
            PREFIXES.start(),
            PREFIXES.end()
        );
        return Err(invalid("cidr", reason));
    }
    let first = cidr.network();
    let metadata: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);
    if first.is_loopback()
        || first.is_multicast()
        || first.octets()[0] == 0
        || first.octets()[0] >= 240
        || metadata.contains(&first)
    {
        return Err(invalid("cidr", format!("'{text}' is not a range for tenants")));
    }
    Ok(cidr)
}

fn parse_gateway(cidr: Ipv4Net, value: &Value) -> Result<Option<Ipv4Addr>, ApiError> {
    if value.is_null() {
        return Ok(None);
    }
    let gateway = address("gateway_ip", value)?;
    match ipam::is_device_address(cidr, gateway) {
        true => Ok(Some(gateway)),
        false => Err(invalid("gateway_ip", format!("'{gateway}' is not an address of {cidr}"))),
    }
}

/// The subnets of a network, oldest first, as IPAM sees them.
pub(super) async fn ranges(tx: &mut Conn, network_id: &str) -> Result<Vec<Range>, ApiError> {
    let sql = "SELECT * FROM subnets WHERE network_id = $1 ORDER BY created_us, id";
    let rows: Vec<SubnetRow> = sqlx::query_as(sql).bind(network_id).fetch_all(tx).await?;
    rows.iter().map(SubnetRow::range).collect()
}

/// Adds a subnet and its service address, within the owner's quota.
pub(crate) async fn insert(
    tx: &mut Conn,
    network: &NetworkRow,
    project_id: &str,
    config: &SubnetConfig,
) -> Result<String, ApiError> {
    quotas::check(tx, project_id, quotas::Resource::Subnet).await?;
    for other in ranges(tx, &network.id).await? {
        if other.cidr.contains(&config.cidr) || config.cidr.contains(&other.cidr) {
            let text = format!(
                "Invalid input for operation: Requested subnet with cidr: {} for network: {} overlaps with another subnet.",
                config.cidr, network.id
            );
            return Err(ApiError::BadRequest(text).named("InvalidInput"));
        }
    }
    let id = Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO subnets (id, network_id, project_id, name, description, cidr, gateway_ip, enable_dhcp,
             dns_nameservers, host_routes, allocation_pools, next_ip, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 0, $12, $12)",
    )
    .bind(&id)
    .bind(&network.id)
    .bind(project_id)
    .bind(&config.name)
    .bind(&config.description)
    .bind(config.cidr.to_string())
    .bind(config.gateway_ip.map(|ip| ip.to_string()))
    .bind(config.enable_dhcp)
    .bind(json!(config.dns_nameservers).to_string())
    .bind(json!(config.host_routes).to_string())
    .bind(json!(config.pools).to_string())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    ports::add_service_address(tx, network, &id).await?;
    Ok(id)
}

async fn find(db: &mut Conn, id: &str) -> Result<SubnetRow, ApiError> {
    let row = sqlx::query_as("SELECT * FROM subnets WHERE id = $1").bind(id).fetch_optional(db).await?;
    row.ok_or_else(|| not_found("Subnet", id))
}

/// The subnet with its network, if the asker may see it.
async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<(SubnetRow, NetworkRow), ApiError> {
    let row = find(db, id).await?;
    let network = networks::visible(db, &row.network_id, scope).await;
    network.map(|network| (row, network)).map_err(|_| not_found("Subnet", id))
}

async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<SubnetRow, ApiError> {
    let (row, _) = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only the owner of a subnet and admins can change it.".into())),
    }
}

/// `GET /v2.0/subnets`.
pub(super) async fn list(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, SUBNETS)?;
    let rows: Vec<SubnetRow> = sqlx::query_as(
        "SELECT subnets.* FROM subnets JOIN networks ON networks.id = subnets.network_id
         WHERE $1 OR networks.shared OR networks.project_id = $2 ORDER BY subnets.created_us, subnets.id",
    )
    .bind(scope.admin)
    .bind(&scope.project)
    .fetch_all(&app.db)
    .await?;
    let documents: Result<_, _> = rows.iter().map(SubnetRow::document).collect();
    query.answer(documents?, SUBNETS, &format!("{}/subnets", base(&app))).map(Json)
}

/// `POST /v2.0/subnets`.
pub(super) async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "subnet")?;
    let owner = scope.owner(&mut body)?;
    let network_id = body.string("network_id")?;
    let network_id = network_id.ok_or_else(|| {
        ApiError::BadRequest("Failed to parse request. Required attribute 'network_id' not specified".into())
    })?;
    let config = SubnetConfig::parse(&mut body)?;
    body.finish()?;
    let mut tx = app.begin().await?;
    let network = networks::visible(&mut tx, &network_id, &scope).await?;
    if !scope.owns(&network.project_id) {
        return Err(ApiError::Forbidden("Only the owner of a network can add subnets to it.".into()));
    }
    let id = insert(&mut tx, &network, &owner, &config).await?;
    let touched = networks::touch(&mut tx, &network.id).await?;
    let document = find(&mut tx, &id).await?.document()?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok((StatusCode::CREATED, Json(json!({"subnet": document}))))
}

/// `GET /v2.0/subnets/{id}`.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, SUBNETS)?;
    let mut db = app.db.acquire().await?;
    let mut document = visible(&mut db, &id, &scope).await?.0.document()?;
    query.pick(&mut document);
    Ok(Json(json!({"subnet": document})))
}

/// `PUT /v2.0/subnets/{id}`.
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "subnet")?;
    let mut tx = app.begin().await?;
    let row = owned(&mut tx, &id, &scope).await?;
    let mut config = row.config()?;
    if let Some(gateway) = body.value("gateway_ip") {
        config.gateway_ip = parse_gateway(config.cidr, &gateway)?;
    }
    config.merge(&mut body)?;
    body.finish()?;
    let pools = ipam::check_pools(config.cidr, config.gateway_ip, config.pools)?;
    sqlx::query(
        "UPDATE subnets SET name = $2, description = $3, gateway_ip = $4, enable_dhcp = $5, dns_nameservers = $6,
             host_routes = $7, allocation_pools = $8, revision = revision + 1, updated_us = $9 WHERE id = $1",
    )
    .bind(&id)
    .bind(&config.name)
    .bind(&config.description)
    .bind(config.gateway_ip.map(|ip| ip.to_string()))
    .bind(config.enable_dhcp)
    .bind(json!(config.dns_nameservers).to_string())
    .bind(json!(config.host_routes).to_string())
    .bind(json!(pools).to_string())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    let touched = networks::touch(&mut tx, &row.network_id).await?;
    let document = find(&mut tx, &id).await?.document()?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(Json(json!({"subnet": document})))
}

/// `DELETE /v2.0/subnets/{id}`.
pub(super) async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<StatusCode, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut tx = app.begin().await?;
    let row = owned(&mut tx, &id, &scope).await?;
    if ports::subnet_in_use(&mut tx, &id).await? {
        let text = format!(
            "Unable to complete operation on subnet {id}: One or more ports have an IP allocation from this subnet."
        );
        return Err(ApiError::Conflict(text).named("SubnetInUse"));
    }
    ports::remove_service_address(&mut tx, &row.network_id, &id).await?;
    sqlx::query("DELETE FROM subnets WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    let touched = networks::touch(&mut tx, &row.network_id).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(StatusCode::NO_CONTENT)
}
