//! Subnets of both versions of IP.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mote_host_api::HostRoute;
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::{Attributes, address, invalid, invalid_input},
    ipam::{self, Pool, Range},
    listing::{Collection, Query},
    networks::{self, MIN_MTU_IPV6, NetworkRow},
    ports, quotas, rbac, reach,
    resource::{Change, Resource},
    subnet_pools,
};
use crate::{
    db::{Conn, Db, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Prefixes that make sense: from a /8 to the smallest with a gateway and one more device.
const PREFIXES_V4: std::ops::RangeInclusive<u8> = 8..=30;
/// IPAM orders IPv6 addresses by their last 64 bits.
const PREFIXES_V6: std::ops::RangeInclusive<u8> = 64..=126;
/// Neutron's limits (`max_dns_nameservers`, `max_subnet_host_routes`), and one for pools.
const MAX_NAMESERVERS: usize = 5;
const MAX_ROUTES: usize = 20;
const MAX_POOLS: usize = 64;
/// How addresses are made known.
const MODES: [&str; 3] = ["slaac", "dhcpv6-stateful", "dhcpv6-stateless"];

/// Subnets as resources.
pub(super) struct Subnets;

#[derive(Debug, Clone, FromRow)]
pub(super) struct SubnetRow {
    pub(super) id: String,
    pub(super) network_id: String,
    pub(super) project_id: String,
    name: String,
    description: String,
    pub(super) cidr: String,
    pub(super) gateway_ip: Option<String>,
    enable_dhcp: bool,
    dns_nameservers: String,
    host_routes: String,
    allocation_pools: String,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    ip_version: i64,
    ipv6_address_mode: Option<String>,
    ipv6_ra_mode: Option<String>,
    subnetpool_id: Option<String>,
    #[sqlx(default)]
    shared: bool,
}

/// A subnet, checked.
#[derive(Debug, Clone)]
pub(crate) struct SubnetConfig {
    name: String,
    description: String,
    cidr: IpNet,
    gateway_ip: Option<IpAddr>,
    enable_dhcp: bool,
    dns_nameservers: Vec<IpAddr>,
    host_routes: Vec<HostRoute>,
    pools: Vec<Pool>,
    address_mode: Option<String>,
    ra_mode: Option<String>,
    subnetpool_id: Option<String>,
}

impl SubnetConfig {
    /// A subnet with gateway `.1`, all other addresses in its pool, and DHCP.
    pub(crate) fn plain(name: &str, cidr: impl Into<IpNet>) -> Self {
        let cidr = cidr.into();
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
            address_mode: None,
            ra_mode: None,
            subnetpool_id: None,
        }
    }

    fn parse(body: &mut Attributes, cidr: IpNet) -> Result<Self, ApiError> {
        let mut config = Self::plain("", cidr);
        if let Some(gateway) = body.value("gateway_ip") {
            config.gateway_ip = parse_gateway(config.cidr, &gateway)?;
            config.pools = ipam::default_pools(config.cidr, config.gateway_ip);
        }
        config.merge(body)?;
        config.address_mode = mode(body, "ipv6_address_mode")?;
        config.ra_mode = mode(body, "ipv6_ra_mode")?;
        config.check_modes()?;
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
            let parsed: Result<Vec<IpAddr>, _> =
                list.iter().map(|server| address("dns_nameservers", server)).collect();
            self.dns_nameservers = parsed?;
            let other = self.dns_nameservers.iter().find(|ip| ip.is_ipv4() != self.is_ipv4());
            if let Some(other) = other {
                let reason =
                    format!("'{other}' is not of the subnet's version of IP, by which it would be announced");
                return Err(invalid("dns_nameservers", reason));
            }
        }
        if let Some(list) = body.list("host_routes")? {
            limited("host_routes", &list, MAX_ROUTES)?;
            if !list.is_empty() && !self.is_ipv4() {
                return Err(invalid(
                    "host_routes",
                    "routes of IPv6 can't be announced; use a router's routes",
                ));
            }
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

    fn is_ipv4(&self) -> bool {
        matches!(self.cidr, IpNet::V4(_))
    }

    /// Neutron's rules for `ipv6_address_mode` and `ipv6_ra_mode`.
    fn check_modes(&self) -> Result<(), ApiError> {
        let modes = [&self.ra_mode, &self.address_mode];
        if modes.iter().all(|mode| mode.is_none()) {
            return Ok(());
        }
        if self.is_ipv4() {
            return Err(invalid_input("ipv6_ra_mode and ipv6_address_mode are not valid for IPv4 subnets"));
        }
        if !self.enable_dhcp {
            return Err(invalid_input(
                "ipv6_ra_mode or ipv6_address_mode cannot be set when enable_dhcp is set to False",
            ));
        }
        if let (Some(ra), Some(address)) = (&self.ra_mode, &self.address_mode)
            && ra != address
        {
            return Err(invalid_input(format!(
                "ipv6_ra_mode set to '{ra}' with ipv6_address_mode set to '{address}' is not valid. If both \
                 attributes are set, they must be the same value"
            )));
        }
        let by_prefix = modes.into_iter().flatten().any(|mode| mode != "dhcpv6-stateful");
        match by_prefix && self.cidr.prefix_len() != 64 {
            true => Err(invalid_input(format!(
                "Invalid CIDR {} for IPv6 address mode. OpenStack uses the EUI-64 address format, which requires \
                 the prefix to be /64",
                self.cidr
            ))),
            false => Ok(()),
        }
    }
}

impl SubnetRow {
    fn config(&self) -> Result<SubnetConfig, ApiError> {
        Ok(SubnetConfig {
            name: self.name.clone(),
            description: self.description.clone(),
            cidr: self.net()?,
            gateway_ip: self.gateway_ip.as_deref().map(str::parse).transpose().map_err(ApiError::internal)?,
            enable_dhcp: self.enable_dhcp,
            dns_nameservers: stored(&self.dns_nameservers)?,
            host_routes: stored(&self.host_routes)?,
            pools: stored(&self.allocation_pools)?,
            address_mode: self.ipv6_address_mode.clone(),
            ra_mode: self.ipv6_ra_mode.clone(),
            subnetpool_id: self.subnetpool_id.clone(),
        })
    }

    /// Its range.
    pub(super) fn net(&self) -> Result<IpNet, ApiError> {
        self.cidr.parse().map_err(ApiError::internal)
    }

    /// Whether ports' addresses follow from their MACs.
    fn automatic(&self) -> bool {
        matches!(self.ipv6_address_mode.as_deref(), Some("slaac" | "dhcpv6-stateless"))
    }

    fn range(&self) -> Result<Range, ApiError> {
        Ok(Range {
            subnet_id: self.id.clone(),
            cidr: self.net()?,
            pools: stored(&self.allocation_pools)?,
            automatic: self.automatic(),
        })
    }

    fn document(&self) -> Result<Value, ApiError> {
        let config = self.config()?;
        Ok(json!({
            "id": self.id, "network_id": self.network_id, "name": self.name, "description": self.description,
            "project_id": self.project_id, "tenant_id": self.project_id,
            "ip_version": self.ip_version, "cidr": self.cidr, "gateway_ip": self.gateway_ip,
            "allocation_pools": config.pools, "enable_dhcp": self.enable_dhcp,
            "dns_nameservers": config.dns_nameservers, "host_routes": config.host_routes,
            "ipv6_address_mode": self.ipv6_address_mode, "ipv6_ra_mode": self.ipv6_ra_mode,
            "subnetpool_id": self.subnetpool_id, "service_types": [], "segment_id": null,
            "shared": self.shared, "revision_number": self.revision,
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

fn mode(body: &mut Attributes, name: &str) -> Result<Option<String>, ApiError> {
    let Some(text) = body.nullable(name)?.flatten() else { return Ok(None) };
    match MODES.contains(&text.as_str()) {
        true => Ok(Some(text)),
        false => Err(invalid(name, format!("'{text}' is not in {MODES:?}"))),
    }
}

/// Attributes of subnets that have one value here.
fn constants() -> [(&'static str, Value); 3] {
    [("segment_id", json!("")), ("service_types", json!([])), ("dns_publish_fixed_ip", json!(false))]
}

/// A range that a subnet can have.
pub(super) fn check_cidr(cidr: IpNet) -> Result<IpNet, ApiError> {
    let prefixes = match cidr {
        IpNet::V4(_) => PREFIXES_V4,
        IpNet::V6(_) => PREFIXES_V6,
    };
    if !prefixes.contains(&cidr.prefix_len()) {
        let reason = format!(
            "the prefix of '{cidr}' is not in range /{} through /{}",
            prefixes.start(),
            prefixes.end()
        );
        return Err(invalid("cidr", reason));
    }
    let reserved = match cidr {
        IpNet::V4(net) => {
            let first = net.network();
            let link_local = Ipv4Net::new_assert([169, 254, 0, 0].into(), 16);
            first.is_loopback()
                || first.is_multicast()
                || first.octets()[0] == 0
                || first.octets()[0] >= 240
                || link_local.contains(&first)
        }
        IpNet::V6(net) => {
            let link_local = Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);
            let first = net.network();
            // ::/8 is unassigned but for loopback and addresses that embed IPv4 ones (RFC 4291 §2.4).
            first.octets()[0] == 0 || first.is_multicast() || link_local.contains(&first)
        }
    };
    match reserved {
        true => Err(invalid("cidr", format!("'{cidr}' is not a range for tenants"))),
        false => Ok(cidr),
    }
}

fn parse_gateway(cidr: IpNet, value: &Value) -> Result<Option<IpAddr>, ApiError> {
    if value.is_null() {
        return Ok(None);
    }
    let gateway = address("gateway_ip", value)?;
    let link_local = matches!((cidr, gateway), (IpNet::V6(_), IpAddr::V6(ip)) if ip.is_unicast_link_local());
    match link_local || ipam::is_device_address(cidr, gateway) {
        true => Ok(Some(gateway)),
        false => Err(invalid("gateway_ip", format!("'{gateway}' is not an address of {cidr}"))),
    }
}

/// The subnets of a network, oldest first, as IPAM sees them.
pub(super) async fn ranges(tx: &mut Conn, network_id: &str) -> Result<Vec<Range>, ApiError> {
    let rows = of_network(tx, network_id).await?;
    rows.iter().map(SubnetRow::range).collect()
}

/// The subnets of a network, oldest first.
pub(super) async fn of_network(tx: &mut Conn, network_id: &str) -> Result<Vec<SubnetRow>, ApiError> {
    let sql = "SELECT * FROM subnets WHERE network_id = $1 ORDER BY created_us, id";
    Ok(sqlx::query_as(sql).bind(network_id).fetch_all(tx).await?)
}

/// 400 if the network has a subnet of IPv6, whose links need a larger MTU than the one that is asked for.
pub(super) async fn refuse_ipv6(tx: &mut Conn, network_id: &str) -> Result<(), ApiError> {
    let there: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM subnets WHERE network_id = $1 AND ip_version = 6)")
            .bind(network_id)
            .fetch_one(tx)
            .await?;
    match there {
        true => Err(invalid("mtu", format!("a network with an IPv6 subnet needs at least {MIN_MTU_IPV6}"))),
        false => Ok(()),
    }
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
            return Err(invalid_input(format!(
                "Requested subnet with cidr: {} for network: {} overlaps with another subnet",
                config.cidr, network.id
            )));
        }
    }
    if !config.is_ipv4() && network.mtu < MIN_MTU_IPV6 {
        return Err(invalid_input(format!(
            "the network's MTU is {}, and IPv6 needs at least {MIN_MTU_IPV6}",
            network.mtu
        )));
    }
    let id = Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO subnets (id, network_id, project_id, name, description, cidr, gateway_ip, enable_dhcp,
             dns_nameservers, host_routes, allocation_pools, next_ip, ip_version, ipv6_address_mode, ipv6_ra_mode,
             subnetpool_id, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $17)",
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
    .bind(ipam::first_key(config.cidr))
    .bind(if config.is_ipv4() { 4_i64 } else { 6 })
    .bind(&config.address_mode)
    .bind(&config.ra_mode)
    .bind(&config.subnetpool_id)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    match config.is_ipv4() {
        true => ports::add_service_address(tx, network, &id).await?,
        false => ports::add_automatic_addresses(tx, &network.id, &id).await?,
    }
    Ok(id)
}

/// One subnet, whoever asks.
pub(super) async fn find(db: &mut Conn, id: &str) -> Result<SubnetRow, ApiError> {
    let row = sqlx::query_as("SELECT * FROM subnets WHERE id = $1").bind(id).fetch_optional(db).await?;
    row.ok_or_else(|| Subnets::missing(id))
}

/// Adds the condition that the asker may see the subnets of a network: its own, or shared with it. That a network leads to
/// the outside lets everybody see it, and not what is in it.
fn push_visible(query: &mut QueryBuilder<Db>, scope: &Scope) {
    rbac::push_visible(query, ["networks.id", "networks.project_id"], scope);
}

/// The subnet with its network, if the asker may see it.
pub(super) async fn visible(
    db: &mut Conn,
    id: &str,
    scope: &Scope,
) -> Result<(SubnetRow, NetworkRow), ApiError> {
    let mut query = QueryBuilder::<Db>::new(
        "SELECT subnets.* FROM subnets JOIN networks ON networks.id = subnets.network_id WHERE subnets.id = ",
    );
    query.push_bind(id.to_owned()).push(" AND ");
    push_visible(&mut query, scope);
    let row: Option<SubnetRow> = query.build_query_as().fetch_optional(&mut *db).await?;
    let row = row.ok_or_else(|| Subnets::missing(id))?;
    let network = networks::visible(db, &row.network_id, scope).await?;
    Ok((row, network))
}

async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<SubnetRow, ApiError> {
    let (row, network) = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) || scope.owns(&network.project_id) {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only the owner of a subnet and admins can change it.".into())),
    }
}

/// Where a new subnet's range comes from: the request, or a pool.
async fn cidr(change: &mut Change, body: &mut Attributes) -> Result<(IpNet, Option<String>), ApiError> {
    let version = body.integer("ip_version")?;
    if version.is_some_and(|version| version != 4 && version != 6) {
        return Err(invalid("ip_version", format!("'{}' is not in [4, 6]", version.unwrap_or_default())));
    }
    let asked = body.string("cidr")?.map(|text| ipam::parse_cidr(&text)).transpose()?;
    let prefixlen = body.integer("prefixlen")?;
    let mut pool = body.nullable_id("subnetpool_id")?.flatten();
    if body.boolean("use_default_subnetpool")? == Some(true) {
        if pool.is_some() {
            return Err(invalid_input("subnetpool_id and use_default_subnetpool cannot both be specified"));
        }
        pool = Some(subnet_pools::default_pool(&mut change.tx, version.unwrap_or(4)).await?);
    }
    let cidr = match (asked, &pool) {
        (asked, Some(pool)) => {
            let wish = subnet_pools::Wish { cidr: asked, prefixlen };
            subnet_pools::allocate(&mut change.tx, &change.scope, pool, &wish).await?
        }
        (Some(_), None) if prefixlen.is_some() => {
            return Err(invalid_input("cidr and prefixlen must not be supplied together"));
        }
        (Some(cidr), None) => cidr,
        (None, None) => {
            return Err(ApiError::BadRequest(
                "Bad subnets request: a subnetpool must be specified in the absence of a cidr.".into(),
            )
            .named("BadRequest"));
        }
    };
    let of = if matches!(cidr, IpNet::V4(_)) { 4 } else { 6 };
    if version.is_some_and(|version| version != of) {
        return Err(invalid_input(format!(
            "cidr '{cidr}' does not match the ip_version '{}'",
            version.unwrap_or_default()
        )));
    }
    Ok((check_cidr(cidr)?, pool))
}

/// 409 while a router has the gateway's address.
async fn refuse_moving_gateway(tx: &mut Conn, row: &SubnetRow) -> Result<(), ApiError> {
    let Some(gateway) = &row.gateway_ip else { return Ok(()) };
    let port: Option<String> = sqlx::query_scalar(
        "SELECT ports.id FROM fixed_ips JOIN ports ON ports.id = fixed_ips.port_id
         WHERE fixed_ips.subnet_id = $1 AND fixed_ips.address = $2 AND ports.router_id IS NOT NULL",
    )
    .bind(&row.id)
    .bind(gateway)
    .fetch_optional(tx)
    .await?;
    match port {
        Some(port) => Err(ApiError::Conflict(format!(
            "Current gateway ip {gateway} already in use by port {port}. Unable to update."
        ))
        .named("GatewayIpInUse")),
        None => Ok(()),
    }
}

impl Resource for Subnets {
    const NAME: &'static str = "subnet";
    const PATH: &'static str = "subnets";
    const COLLECTION: Collection = Collection {
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
            "segment_id",
            "service_types",
            "shared",
            "subnetpool_id",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Subnet {id} could not be found.")).named("SubnetNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = QueryBuilder::new(
            "SELECT subnets.*, networks.shared FROM subnets JOIN networks ON networks.id = subnets.network_id
             WHERE ",
        );
        push_visible(&mut statement, scope);
        query.narrow(&mut statement, &[("id", "subnets.id"), ("network_id", "subnets.network_id")]);
        statement.push(" ORDER BY subnets.created_us, subnets.id");
        let rows: Vec<SubnetRow> = statement.build_query_as().fetch_all(db).await?;
        rows.iter().map(SubnetRow::document).collect()
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let owner = change.scope.owner(&mut body)?;
        let network_id = body.required("network_id")?;
        body.only(&constants())?;
        let network = networks::visible(&mut change.tx, &network_id, &change.scope).await?;
        if !change.scope.owns(&network.project_id) {
            return Err(ApiError::Forbidden("Only the owner of a network can add subnets to it.".into()));
        }
        let (cidr, pool) = cidr(change, &mut body).await?;
        let mut config = SubnetConfig::parse(&mut body, cidr)?;
        config.subnetpool_id = pool;
        body.finish()?;
        let id = insert(&mut change.tx, &network, &owner, &config).await?;
        let hosts = reach::of_network(&mut change.tx, &network.id).await?;
        change.concern(hosts);
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let row = owned(&mut change.tx, id, &change.scope).await?;
        let mut config = row.config()?;
        if let Some(gateway) = body.value("gateway_ip") {
            let gateway = parse_gateway(config.cidr, &gateway)?;
            if gateway != config.gateway_ip {
                refuse_moving_gateway(&mut change.tx, &row).await?;
            }
            config.gateway_ip = gateway;
        }
        config.merge(&mut body)?;
        config.check_modes()?;
        body.only(&constants())?;
        for (name, value) in
            [("ipv6_address_mode", &row.ipv6_address_mode), ("ipv6_ra_mode", &row.ipv6_ra_mode)]
        {
            body.only(&[(name, json!(value))])?;
        }
        body.only(&[("cidr", json!(row.cidr)), ("ip_version", json!(row.ip_version))])?;
        body.finish()?;
        let pools = ipam::check_pools(config.cidr, config.gateway_ip, config.pools)?;
        sqlx::query(
            "UPDATE subnets SET name = $2, description = $3, gateway_ip = $4, enable_dhcp = $5, dns_nameservers = $6,
                 host_routes = $7, allocation_pools = $8, revision = revision + 1, updated_us = $9 WHERE id = $1",
        )
        .bind(id)
        .bind(&config.name)
        .bind(&config.description)
        .bind(config.gateway_ip.map(|ip| ip.to_string()))
        .bind(config.enable_dhcp)
        .bind(json!(config.dns_nameservers).to_string())
        .bind(json!(config.host_routes).to_string())
        .bind(json!(pools).to_string())
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        let hosts = reach::of_network(&mut change.tx, &row.network_id).await?;
        change.concern(hosts);
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let row = owned(&mut change.tx, id, &change.scope).await?;
        if row.automatic() {
            ports::remove_automatic_addresses(&mut change.tx, id).await?;
        }
        if ports::subnet_in_use(&mut change.tx, id).await? {
            let text = format!(
                "Unable to complete operation on subnet {id}: One or more ports have an IP allocation from this subnet."
            );
            return Err(ApiError::Conflict(text).named("SubnetInUse"));
        }
        ports::remove_service_address(&mut change.tx, &row.network_id, id).await?;
        sqlx::query("DELETE FROM subnets WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        let hosts = reach::of_network(&mut change.tx, &row.network_id).await?;
        change.concern(hosts);
        Ok(())
    }
}
