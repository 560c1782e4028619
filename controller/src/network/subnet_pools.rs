//! Subnet pools: ranges from which subnets take theirs.

use ipnet::IpNet;
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::{Attributes, invalid, invalid_input, range},
    listing::{Collection, Query},
    quotas, rbac,
    resource::{Change, Resource},
};
use crate::{
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Most prefixes of a pool.
const MAX_PREFIXES: usize = 64;
/// Neutron's smallest prefix lengths.
const MIN_LENGTH: [u8; 2] = [8, 64];

/// Subnet pools as resources.
pub(super) struct SubnetPools;

/// A pool as stored.
#[derive(Debug, Clone, FromRow)]
pub(super) struct PoolRow {
    id: String,
    /// Owner.
    pub(super) project_id: String,
    name: String,
    description: String,
    ip_version: i64,
    prefixes: String,
    default_prefixlen: i64,
    min_prefixlen: i64,
    max_prefixlen: i64,
    default_quota: Option<i64>,
    is_default: bool,
    shared: bool,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

/// What a subnet asks of a pool.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// This range.
    pub(super) cidr: Option<IpNet>,
    /// A range of this size.
    pub(super) prefixlen: Option<i64>,
}

impl PoolRow {
    fn nets(&self) -> Result<Vec<IpNet>, ApiError> {
        serde_json::from_str(&self.prefixes).map_err(ApiError::internal)
    }

    fn document(&self) -> Result<Value, ApiError> {
        Ok(json!({
            "id": self.id, "name": self.name, "description": self.description, "project_id": self.project_id,
            "tenant_id": self.project_id, "ip_version": self.ip_version, "prefixes": self.nets()?,
            "default_prefixlen": self.default_prefixlen, "min_prefixlen": self.min_prefixlen,
            "max_prefixlen": self.max_prefixlen, "default_quota": self.default_quota,
            "is_default": self.is_default, "shared": self.shared, "address_scope_id": null,
            "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        }))
    }

    fn check_bounds(&self) -> Result<(), ApiError> {
        let longest = if self.ip_version == 4 { 32 } else { 128 };
        let [shortest_v4, shortest_v6] = MIN_LENGTH;
        let shortest = i64::from(if self.ip_version == 4 { shortest_v4 } else { shortest_v6 });
        let ordered = shortest <= self.min_prefixlen
            && self.min_prefixlen <= self.default_prefixlen
            && self.default_prefixlen <= self.max_prefixlen
            && self.max_prefixlen <= longest;
        match ordered {
            true => Ok(()),
            false => Err(ApiError::BadRequest(format!(
                "Illegal prefix bounds: {shortest} <= min_prefixlen ({}) <= default_prefixlen ({}) <= max_prefixlen \
                 ({}) <= {longest} must hold.",
                self.min_prefixlen, self.default_prefixlen, self.max_prefixlen
            ))
            .named("IllegalSubnetPoolPrefixBounds")),
        }
    }
}

fn select(scope: &Scope) -> QueryBuilder<crate::db::Db> {
    let mut query =
        QueryBuilder::new("SELECT subnet_pools.* FROM subnet_pools WHERE (subnet_pools.shared OR ");
    rbac::push_visible(&mut query, ["subnet_pools.id", "subnet_pools.project_id"], scope);
    query.push(")");
    query
}

/// The pool of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<PoolRow, ApiError> {
    let mut query = select(scope);
    query.push(" AND subnet_pools.id = ").push_bind(id.to_owned());
    let row: Option<PoolRow> = query.build_query_as().fetch_optional(db).await?;
    row.ok_or_else(|| SubnetPools::missing(id))
}

async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<PoolRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only the owner of a subnet pool and admins can change it.".into())),
    }
}

/// The pool that an admin made the default.
pub(super) async fn default_pool(tx: &mut Conn, version: i64) -> Result<String, ApiError> {
    let id: Option<String> =
        sqlx::query_scalar("SELECT id FROM subnet_pools WHERE is_default AND ip_version = $1")
            .bind(version)
            .fetch_optional(tx)
            .await?;
    id.ok_or_else(|| {
        ApiError::NotFound(format!("No default subnet pool found for IPv{version}."))
            .named("DefaultSubnetPoolNotFound")
    })
}

/// The first range of that size in a prefix that no taken range overlaps. All ranges are of one version of IP.
fn first_free(prefix: IpNet, length: u8, taken: &[IpNet]) -> Option<IpNet> {
    if length < prefix.prefix_len() {
        return None;
    }
    let bits = prefix.max_prefix_len();
    let number = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
        std::net::IpAddr::V6(ip) => u128::from(ip),
    };
    let size = 1_u128.checked_shl(u32::from(bits - length))?;
    let (mut start, end) = (number(prefix.network()), number(prefix.broadcast()));
    let mut taken: Vec<(u128, u128)> =
        taken.iter().map(|net| (number(net.network()), number(net.broadcast()))).collect();
    taken.sort_unstable();
    for (first, last) in taken {
        if last < start {
            continue;
        }
        if first > start.checked_add(size - 1)? {
            break;
        }
        // The next range of this size behind the taken one.
        start = last.checked_add(1)?.checked_next_multiple_of(size)?;
    }
    if start.checked_add(size - 1)? > end {
        return None;
    }
    let ip = match prefix {
        IpNet::V4(_) => std::net::Ipv4Addr::from(u32::try_from(start).ok()?).into(),
        IpNet::V6(_) => std::net::Ipv6Addr::from(start).into(),
    };
    IpNet::new(ip, length).ok()
}

fn refused(reason: &str) -> ApiError {
    ApiError::Conflict(format!("Failed to allocate subnet: {reason}.")).named("SubnetAllocationError")
}

/// Takes a range out of a pool that the asker may use.
///
/// # Errors
/// 404 without the pool, 400 for a size that it doesn't give, 409 if nothing is left.
pub(super) async fn allocate(
    tx: &mut Conn,
    scope: &Scope,
    pool_id: &str,
    wish: &Wish,
) -> Result<IpNet, ApiError> {
    let pool = visible(tx, pool_id, scope).await?;
    let length = match (wish.cidr, wish.prefixlen) {
        (Some(_), Some(_)) => return Err(invalid_input("cidr and prefixlen must not be supplied together")),
        (Some(cidr), None) => i64::from(cidr.prefix_len()),
        (None, length) => length.unwrap_or(pool.default_prefixlen),
    };
    if length < pool.min_prefixlen {
        let text = format!(
            "Unable to allocate subnet with prefix length {length}, minimum allowed prefix is {}.",
            pool.min_prefixlen
        );
        return Err(ApiError::BadRequest(text).named("MinPrefixSubnetAllocationError"));
    }
    if length > pool.max_prefixlen {
        let text = format!(
            "Unable to allocate subnet with prefix length {length}, maximum allowed prefix is {}.",
            pool.max_prefixlen
        );
        return Err(ApiError::BadRequest(text).named("MaxPrefixSubnetAllocationError"));
    }
    let length = u8::try_from(length).map_err(ApiError::internal)?;
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT cidr, project_id FROM subnets WHERE subnetpool_id = $1")
            .bind(&pool.id)
            .fetch_all(tx)
            .await?;
    let taken: Vec<IpNet> = rows.iter().filter_map(|(cidr, _)| cidr.parse().ok()).collect();
    if let Some(quota) = pool.default_quota {
        within_quota(&pool, &rows, &scope.project, length, quota)?;
    }
    let prefixes = pool.nets()?;
    match wish.cidr {
        None => prefixes
            .into_iter()
            .find_map(|prefix| first_free(prefix, length, &taken))
            .ok_or_else(|| refused(&format!("Insufficient prefix space to allocate subnet size /{length}"))),
        Some(cidr) => {
            let inside = prefixes.iter().any(|prefix| prefix.contains(&cidr));
            let overlaps = taken.iter().any(|other| other.contains(&cidr) || cidr.contains(other));
            match inside && !overlaps {
                true => Ok(cidr),
                false => Err(refused("Cannot allocate requested subnet from the available set of prefixes")),
            }
        }
    }
}

/// IPv4 counts addresses, IPv6 networks of /64, as in Neutron.
fn within_quota(
    pool: &PoolRow,
    rows: &[(String, String)],
    project: &str,
    length: u8,
    quota: i64,
) -> Result<(), ApiError> {
    let unit: u8 = if pool.ip_version == 4 { 32 } else { 64 };
    let units = |length: u8| 1_i64.checked_shl(u32::from(unit.saturating_sub(length))).unwrap_or(i64::MAX);
    let own = rows.iter().filter(|(_, owner)| owner == project);
    let used = own
        .filter_map(|(cidr, _)| cidr.parse::<IpNet>().ok())
        .fold(0_i64, |sum, net| sum.saturating_add(units(net.prefix_len())));
    match used.saturating_add(units(length)) > quota {
        true => Err(ApiError::Conflict("Per-project subnet pool prefix quota exceeded.".into())
            .named("SubnetPoolQuotaExceeded")),
        false => Ok(()),
    }
}

fn prefixes(body: &mut Attributes) -> Result<Option<Vec<IpNet>>, ApiError> {
    let Some(list) = body.list("prefixes")? else { return Ok(None) };
    if list.is_empty() || list.len() > MAX_PREFIXES {
        return Err(invalid("prefixes", format!("1 to {MAX_PREFIXES} prefixes are needed")));
    }
    let mut nets = Vec::with_capacity(list.len());
    for value in &list {
        nets.push(range(value.as_str().unwrap_or_default())?.trunc());
    }
    if nets.iter().any(|net| matches!(net, IpNet::V4(_)) != matches!(nets[0], IpNet::V4(_))) {
        return Err(ApiError::BadRequest("Cannot mix IPv4 and IPv6 prefixes in a subnet pool.".into())
            .named("PrefixVersionMismatch"));
    }
    let nets = match nets[0] {
        IpNet::V4(_) | IpNet::V6(_) => IpNet::aggregate(&nets),
    };
    Ok(Some(nets))
}

/// What can be given at creation and changed later.
fn merge(row: &mut PoolRow, body: &mut Attributes, scope: &Scope) -> Result<(), ApiError> {
    row.name = body.string("name")?.unwrap_or_else(|| row.name.clone());
    row.description = body.string("description")?.unwrap_or_else(|| row.description.clone());
    for (name, field) in [
        ("default_prefixlen", &mut row.default_prefixlen),
        ("min_prefixlen", &mut row.min_prefixlen),
        ("max_prefixlen", &mut row.max_prefixlen),
    ] {
        *field = body.integer(name)?.unwrap_or(*field);
    }
    row.check_bounds()?;
    match body.value("default_quota") {
        None => {}
        Some(Value::Null) => row.default_quota = None,
        Some(value) => {
            let quota = value.as_i64().filter(|quota| *quota >= 0);
            row.default_quota = Some(quota.ok_or_else(|| {
                invalid("default_quota", format!("'{value}' is not a number of at least 0"))
            })?);
        }
    }
    if let Some(is_default) = body.boolean("is_default")? {
        if is_default && !scope.admin {
            return Err(ApiError::Forbidden("Only an admin can make a subnet pool the default.".into()));
        }
        row.is_default = is_default;
    }
    Ok(())
}

async fn only_default(tx: &mut Conn, row: &PoolRow) -> Result<(), ApiError> {
    if !row.is_default {
        return Ok(());
    }
    let other: Option<String> =
        sqlx::query_scalar("SELECT id FROM subnet_pools WHERE is_default AND ip_version = $1 AND id != $2")
            .bind(row.ip_version)
            .bind(&row.id)
            .fetch_optional(tx)
            .await?;
    match other {
        Some(_) => Err(invalid_input(format!(
            "A default subnetpool for this IP family has already been set. Only one default may exist per IP family ({})",
            row.ip_version
        ))),
        None => Ok(()),
    }
}

async fn write(tx: &mut Conn, row: &PoolRow) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO subnet_pools (id, project_id, name, description, ip_version, prefixes, default_prefixlen,
             min_prefixlen, max_prefixlen, default_quota, is_default, shared, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, description = excluded.description,
             prefixes = excluded.prefixes, default_prefixlen = excluded.default_prefixlen,
             min_prefixlen = excluded.min_prefixlen, max_prefixlen = excluded.max_prefixlen,
             default_quota = excluded.default_quota, is_default = excluded.is_default,
             revision = subnet_pools.revision + 1, updated_us = excluded.updated_us",
    )
    .bind(&row.id)
    .bind(&row.project_id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.ip_version)
    .bind(&row.prefixes)
    .bind(row.default_prefixlen)
    .bind(row.min_prefixlen)
    .bind(row.max_prefixlen)
    .bind(row.default_quota)
    .bind(row.is_default)
    .bind(row.shared)
    .bind(row.created_us)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

impl Resource for SubnetPools {
    const NAME: &'static str = "subnetpool";
    const PATH: &'static str = "subnetpools";
    const COLLECTION: Collection = Collection {
        name: "subnetpools",
        attributes: &[
            "address_scope_id",
            "created_at",
            "default_prefixlen",
            "default_quota",
            "description",
            "id",
            "ip_version",
            "is_default",
            "max_prefixlen",
            "min_prefixlen",
            "name",
            "prefixes",
            "project_id",
            "revision_number",
            "shared",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Subnet pool {id} could not be found.")).named("SubnetPoolNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = select(scope);
        query.narrow(&mut statement, &[("id", "subnet_pools.id")]);
        statement.push(" ORDER BY created_us, id");
        let rows: Vec<PoolRow> = statement.build_query_as().fetch_all(db).await?;
        rows.iter().map(PoolRow::document).collect()
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        body.only(&[("address_scope_id", json!(""))])?;
        let name = body.required("name")?;
        let nets = prefixes(&mut body)?;
        let Some(nets) = nets else {
            body.required("prefixes")?;
            return Err(invalid("prefixes", "1 prefix is needed"));
        };
        let shared = body.boolean("shared")?.unwrap_or(false);
        if shared && !change.scope.admin {
            return Err(ApiError::Forbidden(
                "Only an admin can share a subnet pool with all projects.".into(),
            ));
        }
        let v4 = matches!(nets[0], IpNet::V4(_));
        let (shortest, longest) = if v4 { (MIN_LENGTH[0], 32) } else { (MIN_LENGTH[1], 128) };
        let min = body.integer("min_prefixlen")?.unwrap_or(i64::from(shortest));
        let now = now_us();
        let mut row = PoolRow {
            id: Uuid::new_v4().to_string(),
            project_id,
            name,
            description: String::new(),
            ip_version: if v4 { 4 } else { 6 },
            prefixes: json!(nets).to_string(),
            default_prefixlen: min,
            min_prefixlen: min,
            max_prefixlen: longest,
            default_quota: None,
            is_default: false,
            shared,
            revision: 1,
            created_us: now,
            updated_us: now,
        };
        merge(&mut row, &mut body, &change.scope)?;
        body.finish()?;
        quotas::check(&mut change.tx, &row.project_id, quotas::Resource::SubnetPool).await?;
        only_default(&mut change.tx, &row).await?;
        write(&mut change.tx, &row).await?;
        Ok(row.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let mut row = owned(&mut change.tx, id, &change.scope).await?;
        body.only(&[("address_scope_id", json!("")), ("shared", json!(row.shared))])?;
        if let Some(nets) = prefixes(&mut body)? {
            let version = if matches!(nets[0], IpNet::V4(_)) { 4 } else { 6 };
            let lost = row.nets()?.iter().any(|old| !nets.iter().any(|new| new.contains(old)));
            if version != row.ip_version || lost {
                return Err(ApiError::BadRequest(
                    "Illegal update to prefixes: a subnet pool's prefixes can only grow.".into(),
                )
                .named("IllegalSubnetPoolUpdate"));
            }
            row.prefixes = json!(nets).to_string();
        }
        merge(&mut row, &mut body, &change.scope)?;
        body.finish()?;
        only_default(&mut change.tx, &row).await?;
        write(&mut change.tx, &row).await
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        owned(&mut change.tx, id, &change.scope).await?;
        let used: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM subnets WHERE subnetpool_id = $1)")
            .bind(id)
            .fetch_one(&mut *change.tx)
            .await?;
        if used {
            let text = "Unable to delete subnet pool: Subnet pool has existing allocations.";
            return Err(ApiError::Conflict(text.into()).named("SubnetPoolDeleteError"));
        }
        for sql in
            ["DELETE FROM rbac_policies WHERE object_id = $1", "DELETE FROM subnet_pools WHERE id = $1"]
        {
            sqlx::query(sql).bind(id).execute(&mut *change.tx).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_gap_that_is_large_enough_is_taken() {
        let taken = [net("10.0.0.0/24"), net("10.0.1.128/25"), net("10.0.3.0/24")];
        assert_eq!(first_free(net("10.0.0.0/16"), 24, &taken), Some(net("10.0.2.0/24")));
        assert_eq!(first_free(net("10.0.0.0/16"), 25, &taken), Some(net("10.0.1.0/25")));
        assert_eq!(first_free(net("10.0.0.0/16"), 23, &taken), Some(net("10.0.4.0/23")));
        assert_eq!(first_free(net("10.0.0.0/22"), 23, &taken), None);
        assert_eq!(first_free(net("10.0.0.0/24"), 16, &[]), None);
        assert_eq!(first_free(net("fd00::/48"), 64, &[net("fd00::/64")]), Some(net("fd00:0:0:1::/64")));
        assert_eq!(first_free(net("255.255.255.0/24"), 24, &[net("255.255.255.0/24")]), None);
    }
}
