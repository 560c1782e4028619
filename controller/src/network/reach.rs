//! Which hosts' desired state follows from what: found by the database, so that a change is told to those hosts only.
//!
//! A host that has a port of a network knows the network, its routers (they route on every host), and by them the networks
//! behind, as far as routers lead within the cloud. The host that holds a router's gateway knows the same.

use crate::{db::Conn, http::error::ApiError};

/// The hosts that know of a network.
pub(super) async fn of_network(tx: &mut Conn, network_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "WITH RECURSIVE reach (network_id) AS (
             SELECT CAST($1 AS TEXT)
             UNION
             SELECT other.network_id FROM reach
             JOIN ports AS mine ON mine.network_id = reach.network_id AND mine.router_id IS NOT NULL
                 AND mine.device_owner = 'network:router_interface'
             JOIN ports AS other ON other.router_id = mine.router_id
                 AND other.device_owner = 'network:router_interface'
         )
         SELECT servers.host_id FROM ports JOIN servers ON servers.id = ports.server_id
         WHERE ports.network_id IN (SELECT network_id FROM reach)
             AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)
         UNION
         SELECT routers.gateway_host_id FROM ports JOIN routers ON routers.id = ports.router_id
         WHERE ports.network_id IN (SELECT network_id FROM reach) AND routers.gateway_host_id IS NOT NULL",
    )
    .bind(network_id)
    .fetch_all(tx)
    .await?)
}

/// The hosts that know of a router.
pub(super) async fn of_router(tx: &mut Conn, router_id: &str) -> Result<Vec<String>, ApiError> {
    let networks: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT network_id FROM ports
         WHERE router_id = $1 AND device_owner = 'network:router_interface' ORDER BY network_id",
    )
    .bind(router_id)
    .fetch_all(&mut *tx)
    .await?;
    let gateway: Option<Option<String>> =
        sqlx::query_scalar("SELECT gateway_host_id FROM routers WHERE id = $1")
            .bind(router_id)
            .fetch_optional(&mut *tx)
            .await?;
    let mut hosts: Vec<String> = gateway.flatten().into_iter().collect();
    // The networks of one router reach the same hosts.
    if let Some(network) = networks.first() {
        hosts.extend(of_network(tx, network).await?);
    }
    Ok(hosts)
}

/// The hosts with a port that has the security group: its rules change.
pub(super) async fn with_group(tx: &mut Conn, group_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT servers.host_id FROM port_security_groups
             JOIN ports ON ports.id = port_security_groups.port_id JOIN servers ON servers.id = ports.server_id
         WHERE port_security_groups.security_group_id = $1 AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)",
    )
    .bind(group_id)
    .fetch_all(tx)
    .await?)
}

/// The hosts with a port that has a rule which names the group as remote: its members change.
pub(super) async fn naming_group(tx: &mut Conn, group_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT servers.host_id FROM security_group_rules
             JOIN port_security_groups
                 ON port_security_groups.security_group_id = security_group_rules.security_group_id
             JOIN ports ON ports.id = port_security_groups.port_id JOIN servers ON servers.id = ports.server_id
         WHERE security_group_rules.remote_group_id = $1
             AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)",
    )
    .bind(group_id)
    .fetch_all(tx)
    .await?)
}

/// The hosts with a port that has a rule which names the address group.
pub(super) async fn naming_addresses(tx: &mut Conn, group_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT servers.host_id FROM security_group_rules
             JOIN port_security_groups
                 ON port_security_groups.security_group_id = security_group_rules.security_group_id
             JOIN ports ON ports.id = port_security_groups.port_id JOIN servers ON servers.id = ports.server_id
         WHERE security_group_rules.remote_address_group_id = $1
             AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)",
    )
    .bind(group_id)
    .fetch_all(tx)
    .await?)
}

/// The hosts that know of a port: those of its network, and those with rules for its groups.
pub(super) async fn of_port(tx: &mut Conn, network_id: &str, port_id: &str) -> Result<Vec<String>, ApiError> {
    let mut hosts = of_network(tx, network_id).await?;
    hosts.extend(of_port_groups(tx, port_id).await?);
    Ok(hosts)
}

/// The hosts with rules for a port's groups: its addresses are in sets there, on whatever network it is.
pub(super) async fn of_port_groups(tx: &mut Conn, port_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT servers.host_id FROM port_security_groups AS own
             JOIN security_group_rules ON security_group_rules.remote_group_id = own.security_group_id
             JOIN port_security_groups
                 ON port_security_groups.security_group_id = security_group_rules.security_group_id
             JOIN ports ON ports.id = port_security_groups.port_id JOIN servers ON servers.id = ports.server_id
         WHERE own.port_id = $1
             AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)",
    )
    .bind(port_id)
    .fetch_all(tx)
    .await?)
}

/// The hosts with a port that a QoS policy shapes, or with the gateway of a floating IP that it shapes.
pub(super) async fn of_policy(tx: &mut Conn, policy_id: &str) -> Result<Vec<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT servers.host_id FROM ports JOIN networks ON networks.id = ports.network_id
             JOIN servers ON servers.id = ports.server_id
         WHERE (ports.qos_policy_id = $1 OR (ports.qos_policy_id IS NULL AND networks.qos_policy_id = $1))
             AND servers.host_id IS NOT NULL AND NOT (servers.deleting OR servers.offloading)
         UNION
         SELECT routers.gateway_host_id FROM floating_ips JOIN routers ON routers.id = floating_ips.router_id
         WHERE floating_ips.qos_policy_id = $1 AND routers.gateway_host_id IS NOT NULL",
    )
    .bind(policy_id)
    .fetch_all(tx)
    .await?)
}
