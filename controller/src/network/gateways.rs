//! On which host a router's gateways are: one that is up and connected to all of their networks, with the fewest routers.
//! They stay there as long as it is fit. When it is lost, each living host's report moves what it held.

use std::{collections::HashMap, net::IpAddr};

use sqlx::FromRow;

use super::reach;
use crate::{
    db::Conn,
    hosts::{self, Touched},
    http::error::ApiError,
};

#[derive(Debug, FromRow)]
struct HostRow {
    id: String,
    enabled: bool,
    last_seen_us: i64,
    tunnel_ip: Option<String>,
    physical_networks: String,
}

/// What an external network asks of a host.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
struct Needs {
    network_type: String,
    physical_network: String,
}

impl HostRow {
    fn is_fit(&self, needs: &[Needs]) -> bool {
        let names: Vec<String> = serde_json::from_str(&self.physical_networks).unwrap_or_default();
        let connected = |needs: &Needs| match needs.network_type.as_str() {
            // Where a single host is all there is, it needs no overlay.
            "vxlan" => true,
            _ => names.contains(&needs.physical_network),
        };
        self.enabled && hosts::is_up(self.last_seen_us) && needs.iter().all(connected)
    }
}

/// The fit host with the fewest gateways; one that takes part in the overlay, so that the others reach it, comes first.
fn choose<'a>(hosts: &'a [HostRow], needs: &[Needs], held: &HashMap<String, i64>) -> Option<&'a HostRow> {
    hosts.iter().filter(|host| host.is_fit(needs)).min_by_key(|host| {
        (host.tunnel_ip.is_none(), held.get(&host.id).copied().unwrap_or(0), host.id.clone())
    })
}

async fn hosts(tx: &mut Conn) -> Result<Vec<HostRow>, ApiError> {
    let sql = "SELECT id, enabled, last_seen_us, tunnel_ip, physical_networks FROM hosts ORDER BY id";
    Ok(sqlx::query_as(sql).fetch_all(tx).await?)
}

/// The host that holds a router's gateways.
pub(super) async fn held_by(tx: &mut Conn, router_id: &str) -> Result<Option<String>, ApiError> {
    let held: Option<Option<String>> =
        sqlx::query_scalar("SELECT gateway_host_id FROM routers WHERE id = $1")
            .bind(router_id)
            .fetch_optional(tx)
            .await?;
    Ok(held.flatten())
}

/// Chooses the host of a router's gateways, if it isn't on a fit one; gives whether there is one.
pub(super) async fn place(tx: &mut Conn, router_id: &str) -> Result<bool, ApiError> {
    let needs: Vec<Needs> = sqlx::query_as(
        "SELECT networks.network_type, networks.physical_network FROM router_gateways
             JOIN ports ON ports.id = router_gateways.port_id JOIN networks ON networks.id = ports.network_id
         WHERE router_gateways.router_id = $1",
    )
    .bind(router_id)
    .fetch_all(&mut *tx)
    .await?;
    let holder = held_by(tx, router_id).await?;
    let held: Vec<(String, i64)> = sqlx::query_as(
        "SELECT gateway_host_id, COUNT(*) FROM routers WHERE gateway_host_id IS NOT NULL GROUP BY gateway_host_id",
    )
    .fetch_all(&mut *tx)
    .await?;
    let hosts = hosts(tx).await?;
    let stays = hosts.iter().find(|host| holder.as_ref() == Some(&host.id) && host.is_fit(&needs));
    let chosen = stays.or_else(|| choose(&hosts, &needs, &held.into_iter().collect()));
    let chosen = chosen.filter(|_| !needs.is_empty()).map(|host| host.id.clone());
    sqlx::query("UPDATE routers SET gateway_host_id = $2 WHERE id = $1")
        .bind(router_id)
        .bind(&chosen)
        .execute(tx)
        .await?;
    Ok(chosen.is_some())
}

/// The routers whose gateways have no host that is up.
async fn lost(db: &mut Conn) -> Result<Vec<String>, ApiError> {
    let rows: Vec<(String, Option<i64>)> = sqlx::query_as(
        "SELECT routers.id, hosts.last_seen_us FROM routers LEFT JOIN hosts ON hosts.id = routers.gateway_host_id
         WHERE routers.id IN (SELECT router_id FROM router_gateways) ORDER BY routers.id",
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().filter(|(_, seen)| !seen.is_some_and(hosts::is_up)).map(|(id, _)| id).collect())
}

/// Takes a host's report, before it is stored: moves the gateways of hosts that are lost, places those that had no host,
/// and tells the others if the host's address in the overlay is new. Gives the hosts that have a new desired state.
///
/// # Errors
/// Of the database.
pub(crate) async fn heard(
    tx: &mut Conn,
    host: &str,
    tunnel_ip: Option<IpAddr>,
) -> Result<Vec<Touched>, ApiError> {
    let mut concerned = std::collections::BTreeSet::new();
    let known: Option<Option<String>> = sqlx::query_scalar("SELECT tunnel_ip FROM hosts WHERE id = $1")
        .bind(host)
        .fetch_optional(&mut *tx)
        .await?;
    if known.flatten() != tunnel_ip.map(|ip| ip.to_string()) {
        concerned.extend(neighbours(tx, host).await?);
    }
    for router in lost(tx).await? {
        let before = reach::of_router(tx, &router).await?;
        // Where there is no other host, the one that was lost may come back: nothing changes.
        let held = held_by(tx, &router).await?;
        match place(tx, &router).await? {
            true => {
                concerned.extend(before);
                concerned.extend(reach::of_router(tx, &router).await?);
            }
            false => {
                sqlx::query("UPDATE routers SET gateway_host_id = $2 WHERE id = $1")
                    .bind(&router)
                    .bind(held)
                    .execute(&mut *tx)
                    .await?;
            }
        }
    }
    hosts::touch_all(tx, &concerned).await
}

/// The hosts that know of a host: those that share a network with it, and it itself.
async fn neighbours(tx: &mut Conn, host: &str) -> Result<Vec<String>, ApiError> {
    let networks: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT ports.network_id FROM ports JOIN servers ON servers.id = ports.server_id
         WHERE servers.host_id = $1
         UNION SELECT ports.network_id FROM ports JOIN routers ON routers.id = ports.router_id
         WHERE routers.gateway_host_id = $1",
    )
    .bind(host)
    .fetch_all(&mut *tx)
    .await?;
    let mut hosts = vec![host.to_owned()];
    for network in networks {
        hosts.extend(reach::of_network(tx, &network).await?);
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::now_us;

    fn host(id: &str, physical: &str, up: bool) -> HostRow {
        HostRow {
            id: id.into(),
            enabled: true,
            last_seen_us: if up { now_us() } else { 0 },
            tunnel_ip: Some("192.0.2.1".into()),
            physical_networks: format!("[\"{physical}\"]"),
        }
    }

    #[test]
    fn the_gateway_goes_to_the_fit_host_with_the_fewest() {
        let needs = [Needs { network_type: "flat".into(), physical_network: "public".into() }];
        let hosts = [
            host("a", "public", true),
            host("b", "public", true),
            host("c", "other", true),
            host("d", "public", false),
        ];
        let held = HashMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]);
        assert_eq!(choose(&hosts, &needs, &held).unwrap().id, "b");
        assert_eq!(choose(&hosts, &needs, &HashMap::new()).unwrap().id, "a");
        assert!(choose(&hosts[2..], &needs, &held).is_none());
        // One for all.
        let both =
            ["public", "other"].map(|name| Needs { physical_network: name.into(), ..needs[0].clone() });
        assert!(choose(&hosts, &both, &held).is_none());
    }
}
