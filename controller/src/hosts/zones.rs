//! The zone of a host: that of the aggregate it is in which has one, else the one that it said when it joined.

use std::collections::BTreeMap;

use sqlx::FromRow;

use crate::{db::Conn, http::error::ApiError};

/// The aggregate's metadata that makes a zone.
pub(crate) const ZONE_KEY: &str = "availability_zone";

#[derive(Debug, FromRow)]
struct Row {
    id: String,
    name: String,
    availability_zone: String,
    own_zone: String,
    servers: i64,
}

/// Gives each host the zone that follows from its aggregates; to be called in each transaction that changes those.
///
/// # Errors
/// 409 if a host would be in two zones, or if it has servers, which can't leave their zone.
pub(crate) async fn settle_zones(tx: &mut Conn) -> Result<(), ApiError> {
    let of_aggregates: Vec<(String, String)> = sqlx::query_as(
        "SELECT h.host_id, m.value FROM aggregate_hosts h JOIN aggregate_metadata m ON m.aggregate_id = h.aggregate_id
         WHERE m.key = $1 ORDER BY h.host_id",
    )
    .bind(ZONE_KEY)
    .fetch_all(&mut *tx)
    .await?;
    let mut zones = BTreeMap::<String, String>::new();
    for (host, zone) in of_aggregates {
        match zones.get(&host) {
            Some(other) if *other != zone => {
                return Err(ApiError::Conflict(format!(
                    "Host {} is already in availability zone {other}: it can't be in {zone} as well.",
                    name(tx, &host).await?
                )));
            }
            _ => drop(zones.insert(host, zone)),
        }
    }
    let hosts: Vec<Row> = sqlx::query_as(
        "SELECT id, name, availability_zone, own_zone,
             (SELECT COUNT(*) FROM servers WHERE servers.host_id = hosts.id) AS servers FROM hosts",
    )
    .fetch_all(&mut *tx)
    .await?;
    for host in hosts {
        let zone = zones.get(&host.id).unwrap_or(&host.own_zone);
        if *zone == host.availability_zone {
            continue;
        }
        if host.servers > 0 {
            return Err(ApiError::Conflict(format!(
                "Host {} has instances in availability zone {}: it can't go to {zone}.",
                host.name, host.availability_zone
            )));
        }
        sqlx::query("UPDATE hosts SET availability_zone = $2 WHERE id = $1")
            .bind(&host.id)
            .bind(zone)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

async fn name(tx: &mut Conn, id: &str) -> Result<String, ApiError> {
    Ok(sqlx::query_scalar("SELECT name FROM hosts WHERE id = $1").bind(id).fetch_one(tx).await?)
}
