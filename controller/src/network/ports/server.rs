//! What servers do with ports: plug them in, show their addresses, let them go.

use crate::db::{Conn, Db};
use std::net::Ipv4Addr;

use sqlx::FromRow;

use super::{
    super::{Scope, networks::NetworkRow, quotas, subnets},
    store::{self, FixedIpWish, FixedIps, NewPort, Plugged},
};
use crate::{
    db::now_us,
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
        fixed_ip: Option<Ipv4Addr>,
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
}

/// One address of a server, as Nova shows it.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct ServerAddress {
    /// Server.
    pub(crate) server_id: String,
    /// Port.
    pub(crate) port_id: String,
    /// Its MAC.
    pub(crate) mac_address: String,
    /// Network's id.
    pub(crate) network_id: String,
    /// Network's name.
    pub(crate) network_name: String,
    /// The address's subnet; none if the port has no address.
    pub(crate) subnet_id: Option<String>,
    ip: Option<i64>,
}

impl ServerAddress {
    /// The address.
    pub(crate) fn ip(&self) -> Option<Ipv4Addr> {
        self.ip.and_then(|ip| u32::try_from(ip).ok()).map(Ipv4Addr::from)
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

/// Gives a server its NICs, in order.
///
/// # Errors
/// Quota (403 in Nova), no address left, an address that is taken.
pub(crate) async fn plug(
    tx: &mut Conn,
    server: &PluggedServer<'_>,
    wishes: &[NicWish],
) -> Result<(), ApiError> {
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
                    project_id: server.project_id.to_owned(),
                    name: String::new(),
                    description: String::new(),
                    mac_address: None,
                    device_id: server.id.to_owned(),
                    device_owner: device_owner.clone(),
                    fixed_ips,
                    plugged: Some(Plugged { server_id: server.id.to_owned(), index }),
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
    Ok(())
}

/// Lets a server's ports go: those that were made for it are deleted, the others are free again.
pub(crate) async fn release(tx: &mut Conn, server_id: &str) -> Result<(), ApiError> {
    sqlx::query("DELETE FROM ports WHERE server_id = $1 AND made_by_server")
        .bind(server_id)
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "UPDATE ports SET server_id = NULL, device_id = '', device_owner = '', device_index = 0,
             revision = revision + 1, updated_us = $2 WHERE server_id = $1",
    )
    .bind(server_id)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// The addresses of one server, or of all servers of a project, or of all; in the order of their NICs.
pub(crate) async fn addresses(
    db: &mut Conn,
    server_id: Option<&str>,
    project_id: Option<&str>,
) -> Result<Vec<ServerAddress>, ApiError> {
    let mut query = sqlx::QueryBuilder::<Db>::new(
        "SELECT ports.server_id, ports.id AS port_id, ports.mac_address, ports.network_id,
             networks.name AS network_name, fixed_ips.subnet_id, fixed_ips.ip
         FROM ports JOIN networks ON networks.id = ports.network_id
             LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id
         WHERE ports.server_id IS NOT NULL",
    );
    if let Some(id) = server_id {
        query.push(" AND ports.server_id = ").push_bind(id.to_owned());
    }
    if let Some(id) = project_id {
        query
            .push(" AND ports.server_id IN (SELECT id FROM servers WHERE project_id = ")
            .push_bind(id.to_owned());
        query.push(")");
    }
    query.push(" ORDER BY ports.server_id, ports.device_index, fixed_ips.position");
    Ok(query.build_query_as().fetch_all(db).await?)
}
