//! What servers do with ports: plug them in, show their addresses, let them go.

use std::{collections::BTreeSet, net::IpAddr};

use sqlx::FromRow;

use super::{
    super::{
        Scope, floating_ips, ipam, listing::Query, networks::NetworkRow, quotas, reach,
        resource::Resource as _, security_groups, subnets,
    },
    addresses::{FixedIpWish, FixedIps},
    input::Wanted,
    store::{self, Groups, NewPort, Plugged, Port},
};
use crate::{
    db::{Conn, now_us},
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError},
};

/// A NIC that a create request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NicWish {
    /// A new port on a network, possibly with a certain address.
    Network {
        /// Network.
        id: String,
        /// Address.
        fixed_ip: Option<IpAddr>,
    },
    /// A port that exists.
    Port {
        /// Port.
        id: String,
    },
}

/// The server that gets NICs.
#[derive(Debug, Clone)]
pub(crate) struct PluggedServer<'a> {
    /// Server.
    pub(crate) id: &'a str,
    /// Its project.
    pub(crate) project_id: &'a str,
    /// Its host's zone, or empty.
    pub(crate) zone: &'a str,
    /// The groups of its new ports; empty: the project's default group.
    pub(crate) security_groups: &'a [String],
}

/// Where a port is that a running server gets or loses (`ports.plug_state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlugState {
    /// The host is to plug it in.
    Plugging,
    /// The host is to take it out; then it is free, or goes if it was made for the server.
    Unplugging,
    /// The host is to take it out; then it goes.
    Deleting,
}

impl PlugState {
    /// As it is stored.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Plugging => "plugging",
            Self::Unplugging => "unplugging",
            Self::Deleting => "deleting",
        }
    }

    /// By what is stored.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        [Self::Plugging, Self::Unplugging, Self::Deleting].into_iter().find(|state| state.word() == word)
    }
}

/// `status` of a port, `port_state` of a NIC: one that is plugged into a server that runs is BUILD until its host has done so.
pub(crate) fn nic_state(server_is_active: bool, plug_state: Option<&str>) -> &'static str {
    match (server_is_active, plug_state.and_then(PlugState::from_word)) {
        (true, Some(PlugState::Plugging)) => "BUILD",
        (true, _) => "ACTIVE",
        (false, _) => "DOWN",
    }
}

/// One address of a server, as Nova shows it.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct ServerAddress {
    /// Port.
    pub(crate) port_id: String,
    /// Its MAC.
    pub(crate) mac_address: String,
    /// Network's id.
    pub(crate) network_id: String,
    /// The address's subnet; none if the port has no address.
    pub(crate) subnet_id: Option<String>,
    /// [`PlugState`] of the port.
    pub(crate) plug_state: Option<String>,
    address: Option<String>,
}

impl ServerAddress {
    /// The address.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        self.address.as_ref()?.parse().ok()
    }
}

/// Checks that the asker may use these NICs, before anything is written: what is wrong is a 400, as in Nova.
pub(crate) async fn check(
    tx: &mut Conn,
    ctx: &Ctx,
    wishes: &[NicWish],
    servers: usize,
) -> Result<(), ApiError> {
    let scope = Scope::writing(ctx)?;
    for (index, wish) in wishes.iter().enumerate() {
        match wish {
            NicWish::Network { id, fixed_ip } => {
                let network = network(tx, &scope, id).await?;
                if fixed_ip.is_some() && servers > 1 {
                    return Err(ApiError::BadRequest(
                        "max_count cannot be greater than 1 if an fixed_ip is specified.".into(),
                    ));
                }
                if fixed_ip.is_some() && !scope.owns(&network.project_id) {
                    return Err(ApiError::Forbidden(
                        "Only the owner of a network can choose addresses in it.".into(),
                    ));
                }
                if network.external && !network.shared && !scope.admin {
                    return Err(ApiError::Forbidden(format!(
                        "It is not allowed to create an interface on external network {id}"
                    )));
                }
                if subnets::ranges(tx, id).await?.is_empty() {
                    return Err(ApiError::BadRequest(format!(
                        "Network {id} requires a subnet in order to boot instances on."
                    )));
                }
            }
            NicWish::Port { id } => {
                if servers > 1 {
                    return Err(ApiError::BadRequest(
                        "max_count cannot be greater than 1 if a port is specified.".into(),
                    ));
                }
                let found = store::find(tx, id).await?.filter(|port| scope.owns(&port.row.project_id));
                let port =
                    found.ok_or_else(|| ApiError::BadRequest(format!("Port id {id} could not be found.")))?;
                let twice = wishes[..index].contains(wish);
                if twice || port.row.server_id.is_some() || !port.row.device_id.is_empty() {
                    return Err(ApiError::Conflict(format!("Port {id} is still in use.")));
                }
                if port.fixed_ips.is_empty() {
                    return Err(ApiError::BadRequest(format!(
                        "Port {id} requires a FixedIP in order to be used."
                    )));
                }
            }
        }
    }
    Ok(())
}

async fn network(tx: &mut Conn, scope: &Scope, id: &str) -> Result<NetworkRow, ApiError> {
    let found = super::networks::visible(tx, id, scope).await;
    found.map_err(|error| match error {
        ApiError::Named(..) => ApiError::BadRequest(format!("Network {id} could not be found.")),
        other => other,
    })
}

/// The ids of the groups that a create request names, by name or id; what is wrong is a 400, as in Nova.
pub(crate) async fn group_ids(tx: &mut Conn, ctx: &Ctx, names: &[String]) -> Result<Vec<String>, ApiError> {
    if names.is_empty() {
        // Its ports get the default group when they are made.
        return Ok(Vec::new());
    }
    let scope = Scope::of_project(ctx.require_project()?);
    // "default" is there for everybody who asks.
    security_groups::default_group(tx, &scope.project).await?;
    let found = security_groups::named(tx, &scope, names).await;
    found.map_err(|error| match error {
        ApiError::Named("SecurityGroupNotFound", inner) => {
            ApiError::BadRequest(format!("security_groups: {inner}."))
        }
        other => other,
    })
}

/// Puts the ports of a server into a group (by name or id), or takes them out of it; gives the hosts that hear of it.
///
/// # Errors
/// 400 for a group that the project has not, 404 for one that none of the ports is in.
pub(crate) async fn regroup(
    tx: &mut Conn,
    ctx: &Ctx,
    server_id: &str,
    group: &str,
    join: bool,
) -> Result<Vec<Touched>, ApiError> {
    let group_id = group_ids(tx, ctx, &[group.to_owned()]).await?.remove(0);
    let (scope, ports) = ports(tx, ctx, server_id).await?;
    let mut concerned = BTreeSet::new();
    let mut changed = false;
    for port in ports.iter().filter(|port| port.row.port_security_enabled) {
        let mut groups = port.groups.clone();
        groups.retain(|member| *member != group_id);
        if join {
            groups.push(group_id.clone());
        }
        if groups.len() == port.groups.len() {
            continue;
        }
        changed = true;
        let wanted = Wanted { security_groups: Some(groups), ..Wanted::default() };
        concerned.extend(super::apply(tx, &scope, port, wanted).await?);
    }
    if !join && !changed {
        let text = format!("Security group {group} not associated with the instance {server_id}");
        return Err(ApiError::NotFound(text));
    }
    hosts::touch_all(tx, &concerned).await
}

/// The ports of a server that the asker may change, in the order of its NICs.
async fn ports(tx: &mut Conn, ctx: &Ctx, server_id: &str) -> Result<(Scope, Vec<Port>), ApiError> {
    let scope = Scope { admin: true, ..Scope::of_project(ctx.require_project()?) };
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT id FROM ports WHERE server_id = $1 ORDER BY device_index, id")
            .bind(server_id)
            .fetch_all(&mut *tx)
            .await?;
    let mut ports = Vec::with_capacity(ids.len());
    for id in ids {
        ports.push(super::visible(tx, &id, &scope).await?);
    }
    Ok((scope, ports))
}

/// Gives a server's first port on this network one more address: the next free one of the first of its subnets that has
/// one (Nova's `addFixedIp`).
///
/// # Errors
/// 404 if the server has no port there, 409 if no address is left.
pub(crate) async fn add_address(
    tx: &mut Conn,
    ctx: &Ctx,
    server_id: &str,
    network_id: &str,
) -> Result<Vec<Touched>, ApiError> {
    let (scope, ports) = ports(tx, ctx, server_id).await?;
    let port = ports.into_iter().find(|port| port.row.network_id == network_id).ok_or_else(|| {
        ApiError::NotFound(format!("Instance {server_id} has no port on network {network_id}"))
    })?;
    let position = i64::try_from(port.fixed_ips.len()).map_err(ApiError::internal)?;
    for range in subnets::ranges(tx, network_id).await?.iter().filter(|range| !range.automatic) {
        if ipam::take_next(tx, range, &port.row.id, position).await?.is_some() {
            let concerned = super::apply(tx, &scope, &port, Wanted::default()).await?;
            return hosts::touch_all(tx, &concerned).await;
        }
    }
    Err(ipam::exhausted(network_id))
}

/// Takes an address from the server's port that has it (Nova's `removeFixedIp`).
///
/// # Errors
/// 404 if none has it, 409 if a floating IP leads to it.
pub(crate) async fn remove_address(
    tx: &mut Conn,
    ctx: &Ctx,
    server_id: &str,
    ip: IpAddr,
) -> Result<Vec<Touched>, ApiError> {
    let (scope, ports) = ports(tx, ctx, server_id).await?;
    let has = |port: &Port| port.fixed_ips.iter().any(|(_, other)| *other == ip);
    let port = ports.into_iter().find(has).ok_or_else(|| {
        ApiError::NotFound(format!("Fixed IP address {ip} is not associated with instance {server_id}"))
    })?;
    let left = port.fixed_ips.iter().filter(|(_, other)| *other != ip);
    let left = left.map(|(subnet, ip)| FixedIpWish { subnet_id: Some(subnet.clone()), ip: Some(*ip) });
    let wanted = Wanted { fixed_ips: Some(FixedIps::These(left.collect())), ..Wanted::default() };
    let concerned = super::apply(tx, &scope, &port, wanted).await?;
    hosts::touch_all(tx, &concerned).await
}

/// The groups of a server's ports, as Nova shows them.
pub(crate) async fn groups(db: &mut Conn, server_id: &str) -> Result<Vec<serde_json::Value>, ApiError> {
    let scope = Scope { project: String::new(), admin: true, parent: String::new() };
    let ids: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT port_security_groups.security_group_id FROM ports
             JOIN port_security_groups ON port_security_groups.port_id = ports.id WHERE ports.server_id = $1
         ORDER BY port_security_groups.security_group_id",
    )
    .bind(server_id)
    .fetch_all(&mut *db)
    .await?;
    let mut groups = Vec::with_capacity(ids.len());
    for id in ids {
        let of_id = Query::of_id(&id, &Query::default());
        for document in security_groups::SecurityGroups::read(db, &scope, &of_id).await? {
            let rules = document["security_group_rules"].as_array().cloned().unwrap_or_default();
            let rules: Vec<serde_json::Value> =
                rules.iter().filter(|rule| rule["direction"] == "ingress").map(nova_rule).collect();
            groups.push(serde_json::json!({
                "id": document["id"], "name": document["name"], "description": document["description"],
                "tenant_id": document["tenant_id"], "rules": rules,
            }));
        }
    }
    Ok(groups)
}

/// A rule in Nova's old form.
fn nova_rule(rule: &serde_json::Value) -> serde_json::Value {
    let any = serde_json::json!(-1);
    let or_any = |name: &str| if rule[name].is_null() { any.clone() } else { rule[name].clone() };
    let range = match rule["remote_ip_prefix"].as_str() {
        Some(cidr) => serde_json::json!({ "cidr": cidr }),
        None => serde_json::json!({}),
    };
    serde_json::json!({
        "id": rule["id"], "parent_group_id": rule["security_group_id"], "ip_protocol": rule["protocol"],
        "from_port": or_any("port_range_min"), "to_port": or_any("port_range_max"), "group": {}, "ip_range": range,
    })
}

/// Gives the hosts that know of the server's ports, except its own, their new state: to be called once the ports are
/// there, and before they go.
pub(crate) async fn touch_others(tx: &mut Conn, server_id: &str) -> Result<Vec<Touched>, ApiError> {
    let ports: Vec<(String, String, Option<String>)> = sqlx::query_as(
        "SELECT ports.id, ports.network_id, servers.host_id FROM ports
             JOIN servers ON servers.id = ports.server_id WHERE ports.server_id = $1",
    )
    .bind(server_id)
    .fetch_all(&mut *tx)
    .await?;
    let own = ports.iter().find_map(|(.., host)| host.clone());
    let mut concerned = BTreeSet::new();
    for (port, network, _) in ports {
        concerned.extend(reach::of_port(tx, &network, &port).await?);
    }
    if let Some(own) = own {
        concerned.remove(&own);
    }
    hosts::touch_all(tx, &concerned).await
}

/// Gives a server its NICs, in order; gives the other hosts that hear of them.
///
/// # Errors
/// Quota (403 in Nova), no address left, an address that is taken.
pub(crate) async fn plug(
    tx: &mut Conn,
    server: &PluggedServer<'_>,
    wishes: &[NicWish],
) -> Result<Vec<Touched>, ApiError> {
    let groups = match server.security_groups {
        [] => Groups::Default,
        groups => Groups::IfSecure(groups.to_vec()),
    };
    let device_owner = format!("compute:{}", server.zone);
    for (index, wish) in (0i64..).zip(wishes) {
        match wish {
            NicWish::Network { id, fixed_ip } => {
                quotas::check(tx, server.project_id, quotas::Resource::Port).await?;
                let fixed_ips = match fixed_ip {
                    Some(ip) => FixedIps::These(vec![FixedIpWish { subnet_id: None, ip: Some(*ip) }]),
                    None => FixedIps::Any,
                };
                let new = NewPort {
                    port_security: None,
                    groups: groups.clone(),
                    plugged: Some(Plugged { server_id: server.id.to_owned(), index }),
                    ..NewPort::own(server.project_id, &device_owner, server.id, fixed_ips)
                };
                store::insert(tx, id, &new).await?;
            }
            NicWish::Port { id } => {
                sqlx::query(
                    "UPDATE ports SET server_id = $2, device_id = $2, device_owner = $3, device_index = $4,
                         revision = revision + 1, updated_us = $5 WHERE id = $1",
                )
                .bind(id)
                .bind(server.id)
                .bind(&device_owner)
                .bind(index)
                .bind(now_us())
                .execute(&mut *tx)
                .await?;
            }
        }
    }
    touch_others(tx, server.id).await
}

/// Lets a server's ports go: those that were made for it are deleted, the others are free again.
pub(crate) async fn release(tx: &mut Conn, server_id: &str) -> Result<(), ApiError> {
    let going: Vec<String> = sqlx::query_scalar(
        "SELECT id FROM ports WHERE server_id = $1 AND (made_by_server OR plug_state = $2)",
    )
    .bind(server_id)
    .bind(PlugState::Deleting.word())
    .fetch_all(&mut *tx)
    .await?;
    for port in going {
        for host in floating_ips::let_go(tx, &port).await? {
            // The host hears of it with its next poll.
            let _ = hosts::touch(tx, &host).await?;
        }
        store::remove(tx, &port).await?;
    }
    sqlx::query(
        "UPDATE ports SET server_id = NULL, device_id = '', device_owner = '', device_index = 0, plug_state = NULL,
             revision = revision + 1, updated_us = $2 WHERE server_id = $1",
    )
    .bind(server_id)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// Says that a port of a server is on its way, and to whom: the host's desired state changes with it.
pub(crate) async fn set_plug_state(
    tx: &mut Conn,
    port: &str,
    state: PlugState,
    generation: i64,
) -> Result<(), ApiError> {
    sqlx::query("UPDATE ports SET plug_state = $2, plug_generation = $3, updated_us = $4 WHERE id = $1")
        .bind(port)
        .bind(state.word())
        .bind(generation)
        .bind(now_us())
        .execute(tx)
        .await?;
    Ok(())
}

/// A port that its host may have a tap of leaves its server: the host is told, and when it says that the tap is gone, the port is let
/// go. The host is to be woken after the commit.
pub(crate) async fn leave(tx: &mut Conn, port: &str, host: &str, state: PlugState) -> Result<(), ApiError> {
    let (_, generation) = hosts::touch(tx, host).await?;
    let before: Option<String> = sqlx::query_scalar("SELECT plug_state FROM ports WHERE id = $1")
        .bind(port)
        .fetch_one(&mut *tx)
        .await?;
    match before.as_deref().and_then(PlugState::from_word) {
        // It goes altogether: that is not taken back.
        Some(PlugState::Deleting) => Ok(()),
        _ => set_plug_state(tx, port, state, generation).await,
    }
}

/// A port has arrived.
pub(crate) async fn settle_plugged(tx: &mut Conn, port: &str) -> Result<(), ApiError> {
    sqlx::query("UPDATE ports SET plug_state = NULL, revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(port)
        .bind(now_us())
        .execute(tx)
        .await?;
    Ok(())
}

/// No host has the server any more: what was on its way has arrived.
pub(crate) async fn settle_all(tx: &mut Conn, server_id: &str) -> Result<(), ApiError> {
    let ports: Vec<(String, String)> =
        sqlx::query_as("SELECT id, plug_state FROM ports WHERE server_id = $1 AND plug_state IS NOT NULL")
            .bind(server_id)
            .fetch_all(&mut *tx)
            .await?;
    for (port, state) in ports {
        match PlugState::from_word(&state) {
            Some(PlugState::Plugging) | None => settle_plugged(tx, &port).await?,
            Some(_) => drop(unplug(tx, server_id, &port).await?),
        }
    }
    Ok(())
}

/// The hosts that hear of it when a port comes or goes: to be asked while it is there.
pub(crate) async fn concerned(
    tx: &mut Conn,
    network: &str,
    port: &str,
) -> Result<BTreeSet<String>, ApiError> {
    Ok(reach::of_port(tx, network, port).await?.into_iter().collect())
}

/// Lets one of a server's ports go, as [`release`] does it for all; false if it has no such port.
pub(crate) async fn unplug(tx: &mut Conn, server_id: &str, port: &str) -> Result<bool, ApiError> {
    let sql = "SELECT made_by_server OR COALESCE(plug_state = $3, FALSE) FROM ports WHERE id = $1 AND server_id = $2";
    let made: Option<bool> = sqlx::query_scalar(sql)
        .bind(port)
        .bind(server_id)
        .bind(PlugState::Deleting.word())
        .fetch_optional(&mut *tx)
        .await?;
    match made {
        None => return Ok(false),
        Some(true) => {
            for host in floating_ips::let_go(tx, port).await? {
                // The host hears of it with its next poll.
                let _ = hosts::touch(tx, &host).await?;
            }
            store::remove(tx, port).await?;
        }
        Some(false) => {
            sqlx::query(
                "UPDATE ports SET server_id = NULL, device_id = '', device_owner = '', device_index = 0,
                     plug_state = NULL, revision = revision + 1, updated_us = $2 WHERE id = $1",
            )
            .bind(port)
            .bind(now_us())
            .execute(tx)
            .await?;
        }
    }
    Ok(true)
}

/// The addresses of a server, in the order of its NICs.
pub(crate) async fn addresses(db: &mut Conn, server_id: &str) -> Result<Vec<ServerAddress>, ApiError> {
    let sql = "SELECT ports.id AS port_id, ports.mac_address, ports.network_id, fixed_ips.subnet_id,
             ports.plug_state, fixed_ips.address
         FROM ports LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id
         WHERE ports.server_id = $1 ORDER BY ports.device_index, fixed_ips.position";
    Ok(sqlx::query_as(sql).bind(server_id).fetch_all(db).await?)
}
