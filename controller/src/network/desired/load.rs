//! Reads what one host needs.

use std::collections::{BTreeSet, HashMap};

use sqlx::{FromRow, QueryBuilder};

use super::rows::{PortRow, Rows};
use crate::{
    db::{Conn, Db},
    http::error::ApiError,
};

/// Ids in one statement, below the limit of parameters of either database.
const CHUNK: usize = 10_000;

const PORTS: &str =
    "SELECT ports.id, ports.network_id, ports.mac_address, ports.device_owner, ports.router_id,
        ports.server_id, CASE WHEN servers.deleting OR servers.offloading THEN NULL ELSE servers.host_id END AS host_id,
        servers.hostname, ports.port_security_enabled, ports.allowed_address_pairs, ports.admin_state_up,
        ports.qos_policy_id
    FROM ports LEFT JOIN servers ON servers.id = ports.server_id WHERE ";
const PORT_ORDER: &str = " ORDER BY ports.id";

/// Rows of `sql` followed by a column that is one of the ids, and by `order`.
async fn rows<T>(
    db: &mut Conn,
    sql: &'static str,
    column: &'static str,
    ids: &BTreeSet<String>,
    order: &'static str,
) -> Result<Vec<T>, ApiError>
where
    T: for<'r> FromRow<'r, <Db as sqlx::Database>::Row> + Send + Unpin,
{
    let ids: Vec<&String> = ids.iter().collect();
    let mut found = Vec::new();
    for chunk in ids.chunks(CHUNK) {
        let mut query = QueryBuilder::<Db>::new(sql);
        query.push(column).push(" IN (");
        let mut list = query.separated(", ");
        for id in chunk {
            list.push_bind((*id).clone());
        }
        query.push(")").push(order);
        found.extend(query.build_query_as::<T>().fetch_all(&mut *db).await?);
    }
    Ok(found)
}

/// Single columns of text.
async fn texts(
    db: &mut Conn,
    sql: &'static str,
    column: &'static str,
    ids: &BTreeSet<String>,
) -> Result<BTreeSet<String>, ApiError> {
    let found: Vec<(String,)> = rows(db, sql, column, ids, "").await?;
    Ok(found.into_iter().map(|(text,)| text).collect())
}

/// The networks that the host knows, and the routers.
async fn reach(
    db: &mut Conn,
    host: &str,
    servers: &BTreeSet<String>,
) -> Result<(BTreeSet<String>, BTreeSet<String>), ApiError> {
    let held: Vec<String> = sqlx::query_scalar("SELECT id FROM routers WHERE gateway_host_id = $1")
        .bind(host)
        .fetch_all(&mut *db)
        .await?;
    let mut networks =
        texts(db, "SELECT DISTINCT network_id FROM ports WHERE ", "server_id", servers).await?;
    let mut routers: BTreeSet<String> = BTreeSet::new();
    let (mut new_networks, mut new_routers) = (networks.clone(), held.into_iter().collect::<BTreeSet<_>>());
    while !new_networks.is_empty() || !new_routers.is_empty() {
        routers.extend(new_routers.iter().cloned());
        let sql = "SELECT DISTINCT router_id FROM ports WHERE device_owner = 'network:router_interface' AND ";
        let mut found_routers = texts(db, sql, "network_id", &new_networks).await?;
        let sql =
            "SELECT DISTINCT network_id FROM ports WHERE device_owner = 'network:router_interface' AND ";
        let mut found_networks = texts(db, sql, "router_id", &new_routers).await?;
        found_routers.retain(|id| !routers.contains(id));
        found_networks.retain(|id| !networks.contains(id));
        networks.extend(found_networks.iter().cloned());
        (new_networks, new_routers) = (found_networks, found_routers);
    }
    Ok((networks, routers))
}

/// All that the host needs.
pub(super) async fn load(db: &mut Conn, host: &str, server_ids: &[String]) -> Result<Rows, ApiError> {
    let servers: BTreeSet<String> = server_ids.iter().cloned().collect();
    let (mut networks, routers) = reach(db, host, &servers).await?;
    let mut loaded = Rows {
        hosts: sqlx::query_as("SELECT id, tunnel_ip FROM hosts ORDER BY id").fetch_all(&mut *db).await?,
        routers: rows(db, "SELECT * FROM routers WHERE ", "id", &routers, " ORDER BY id").await?,
        ..Rows::default()
    };
    loaded.ports = rows(db, PORTS, "ports.network_id", &networks, PORT_ORDER).await?;
    // The gateways' ports are on other networks; those of gateways here bring theirs.
    let there: BTreeSet<String> = loaded.ports.iter().map(|port| port.id.clone()).collect();
    let of_routers: Vec<PortRow> = rows(db, PORTS, "ports.router_id", &routers, PORT_ORDER).await?;
    loaded.ports.extend(of_routers.into_iter().filter(|port| !there.contains(&port.id)));
    let sql = "SELECT router_gateways.router_id, router_gateways.port_id, ports.network_id, router_gateways.enable_snat
        FROM router_gateways JOIN ports ON ports.id = router_gateways.port_id WHERE ";
    let order = " ORDER BY router_gateways.router_id, router_gateways.position, router_gateways.port_id";
    loaded.gateways = rows(db, sql, "router_gateways.router_id", &routers, order).await?;
    let here = |router: &&super::rows::RouterRow| router.gateway_host_id.as_deref() == Some(host);
    let here: BTreeSet<&String> = loaded.routers.iter().filter(here).map(|router| &router.id).collect();
    let outside = loaded.gateways.iter().filter(|gateway| here.contains(&gateway.router_id));
    let outside: BTreeSet<String> = outside.map(|gateway| gateway.network_id.clone()).collect();
    let outside: BTreeSet<String> = outside.difference(&networks).cloned().collect();
    let own: Vec<PortRow> = rows(db, PORTS, "ports.network_id", &outside, PORT_ORDER).await?;
    let there: BTreeSet<String> = loaded.ports.iter().map(|port| port.id.clone()).collect();
    loaded.ports.extend(own.into_iter().filter(|port| !there.contains(&port.id)));
    networks.extend(outside);
    loaded.networks = rows(db, "SELECT * FROM networks WHERE ", "id", &networks, " ORDER BY id").await?;
    // The subnets of all external networks that routers lead to: the gateways' prefix lengths and next hops.
    let mut subnets_of = networks.clone();
    subnets_of.extend(loaded.gateways.iter().map(|gateway| gateway.network_id.clone()));
    loaded.subnets =
        rows(db, "SELECT * FROM subnets WHERE ", "network_id", &subnets_of, " ORDER BY created_us, id")
            .await?;
    let sql = "SELECT * FROM floating_ips WHERE ";
    loaded.floating_ips = rows(db, sql, "router_id", &routers, " ORDER BY id").await?;
    let floating: BTreeSet<String> = loaded.floating_ips.iter().map(|row| row.id.clone()).collect();
    let sql = "SELECT * FROM port_forwardings WHERE ";
    loaded.forwardings = rows(db, sql, "floatingip_id", &floating, " ORDER BY id").await?;
    addresses(db, &mut loaded.ports).await?;
    filters(db, &servers, &mut loaded).await?;
    let policies = loaded.networks.iter().filter_map(|row| row.qos_policy_id.clone());
    let policies = policies.chain(loaded.ports.iter().filter_map(|row| row.qos_policy_id.clone()));
    let policies = policies.chain(loaded.floating_ips.iter().filter_map(|row| row.qos_policy_id.clone()));
    let policies: BTreeSet<String> = policies.collect();
    loaded.qos = rows(db, "SELECT * FROM qos_rules WHERE ", "policy_id", &policies, " ORDER BY id").await?;
    Ok(loaded)
}

async fn addresses(db: &mut Conn, ports: &mut [PortRow]) -> Result<(), ApiError> {
    let ids: BTreeSet<String> = ports.iter().map(|port| port.id.clone()).collect();
    let sql = "SELECT port_id, subnet_id, address FROM fixed_ips WHERE ";
    let found: Vec<(String, String, String)> =
        rows(db, sql, "port_id", &ids, " ORDER BY port_id, position").await?;
    let mut of_port: HashMap<String, Vec<(String, std::net::IpAddr)>> = HashMap::new();
    for (port, subnet, address) in found {
        let address = address.parse().map_err(ApiError::internal)?;
        of_port.entry(port).or_default().push((subnet, address));
    }
    for port in ports {
        port.addresses = of_port.remove(&port.id).unwrap_or_default();
    }
    Ok(())
}

/// The groups of the host's own ports, with all that their rules name.
async fn filters(db: &mut Conn, servers: &BTreeSet<String>, loaded: &mut Rows) -> Result<(), ApiError> {
    let own = |port: &&mut PortRow| port.server_id.as_ref().is_some_and(|server| servers.contains(server));
    let own: Vec<&mut PortRow> = loaded.ports.iter_mut().filter(own).collect();
    let ids: BTreeSet<String> = own.iter().map(|port| port.id.clone()).collect();
    let sql = "SELECT port_id, security_group_id FROM port_security_groups WHERE ";
    let found: Vec<(String, String)> =
        rows(db, sql, "port_id", &ids, " ORDER BY port_id, security_group_id").await?;
    let groups: BTreeSet<String> = found.iter().map(|(_, group)| group.clone()).collect();
    let mut of_port: HashMap<String, Vec<String>> = HashMap::new();
    for (port, group) in found {
        of_port.entry(port).or_default().push(group);
    }
    for port in own {
        port.groups = of_port.remove(&port.id).unwrap_or_default();
    }
    loaded.groups =
        rows(db, "SELECT id, stateful FROM security_groups WHERE ", "id", &groups, " ORDER BY id").await?;
    let sql = "SELECT * FROM security_group_rules WHERE ";
    loaded.rules = rows(db, sql, "security_group_id", &groups, " ORDER BY id").await?;
    let remotes: BTreeSet<String> =
        loaded.rules.iter().filter_map(|rule| rule.remote_group_id.clone()).collect();
    let sql = "SELECT port_security_groups.security_group_id, fixed_ips.address, ports.allowed_address_pairs
        FROM port_security_groups JOIN ports ON ports.id = port_security_groups.port_id
            LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id WHERE ";
    loaded.members = rows(db, sql, "port_security_groups.security_group_id", &remotes, "").await?;
    let named: BTreeSet<String> =
        loaded.rules.iter().filter_map(|rule| rule.remote_address_group_id.clone()).collect();
    let sql = "SELECT address_group_id, address FROM address_group_addresses WHERE ";
    loaded.group_addresses = rows(db, sql, "address_group_id", &named, "").await?;
    Ok(())
}
