//! What ports have carried: counted by hosts ([`PortTraffic`]), kept here, read for metering.
//!
//! | Call | By | |
//! |---|---|---|
//! | `GET /mote/v1/metering/ports?project_id=&server_id=&network_id=&port_id=&marker=&limit=` | admin | → `{ports: […]}` in the order of their ids, those that are gone, too |
//!
//! A row for each VMM, of which each number only grows: a report that comes twice, late or again after a restart changes
//! nothing that is true.

use axum::{Json, extract::State};
use mote_host_api::{PortTraffic, Traffic};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};

use crate::{
    app::App,
    db::{Conn, Db, now_us, rfc3339_us},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Ports in one answer.
const MAX_PAGE: u64 = 1000;
/// Series that are longer than a host makes them are nobody's.
const MAX_SERIES_LEN: usize = 128;
/// Rows of a port of which none has grown for so long are added up when the next begins: no host will tell of them again.
const FOLD_AFTER_US: i64 = 3_600_000_000;

/// Takes what a host tells of ports of its own servers; of others it is not heard.
pub(super) async fn store(tx: &mut Conn, host: &str, told: &[PortTraffic]) -> Result<(), ApiError> {
    let now = now_us();
    for one in told {
        if one.series.is_empty() || one.series.len() > MAX_SERIES_LEN {
            return Err(ApiError::BadRequest("A series of traffic has no name, or too long a one.".into()));
        }
        let port = one.port_id.to_string();
        let known: Option<i64> =
            sqlx::query_scalar("SELECT since_us FROM port_traffic WHERE port_id = $1 AND series = $2")
                .bind(&port)
                .bind(&one.series)
                .fetch_optional(&mut *tx)
                .await?;
        if known.is_none() {
            fold(tx, &port, now - FOLD_AFTER_US).await?;
        }
        let Traffic { rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped } = one.traffic;
        let mut query = sqlx::query(
            "INSERT INTO port_traffic (port_id, series, server_id, project_id, network_id, since_us, updated_us,
                 rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped)
             SELECT ports.id, $3, servers.id, servers.project_id, ports.network_id, $4, $4, $5, $6, $7, $8, $9, $10
             FROM ports JOIN servers ON servers.id = ports.server_id
             WHERE ports.id = $1 AND servers.host_id = $2
             ON CONFLICT (port_id, series) DO UPDATE SET updated_us = excluded.updated_us,
                 rx_bytes = excluded.rx_bytes, rx_packets = excluded.rx_packets, rx_dropped = excluded.rx_dropped,
                 tx_bytes = excluded.tx_bytes, tx_packets = excluded.tx_packets, tx_dropped = excluded.tx_dropped
             WHERE excluded.rx_packets >= port_traffic.rx_packets AND excluded.tx_packets >= port_traffic.tx_packets
                 AND excluded.rx_bytes >= port_traffic.rx_bytes AND excluded.tx_bytes >= port_traffic.tx_bytes",
        )
        .bind(&port)
        .bind(host)
        .bind(&one.series)
        .bind(now);
        for number in [rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped] {
            query = query.bind(i64::try_from(number).unwrap_or(i64::MAX));
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

/// Adds up the rows of a port that have not grown since then, so that a server that is started again and again has few.
async fn fold(tx: &mut Conn, port: &str, before: i64) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO port_traffic (port_id, series, server_id, project_id, network_id, since_us, updated_us,
             rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped)
         SELECT port_id, '', MAX(server_id), MAX(project_id), MAX(network_id), MIN(since_us), MAX(updated_us),
             CAST(SUM(rx_bytes) AS BIGINT), CAST(SUM(rx_packets) AS BIGINT), CAST(SUM(rx_dropped) AS BIGINT),
             CAST(SUM(tx_bytes) AS BIGINT), CAST(SUM(tx_packets) AS BIGINT), CAST(SUM(tx_dropped) AS BIGINT)
         FROM port_traffic WHERE port_id = $1 AND (series = '' OR updated_us < $2)
         GROUP BY port_id
         ON CONFLICT (port_id, series) DO UPDATE SET since_us = excluded.since_us, updated_us = excluded.updated_us,
             rx_bytes = excluded.rx_bytes, rx_packets = excluded.rx_packets, rx_dropped = excluded.rx_dropped,
             tx_bytes = excluded.tx_bytes, tx_packets = excluded.tx_packets, tx_dropped = excluded.tx_dropped",
    )
    .bind(port)
    .bind(before)
    .execute(&mut *tx)
    .await?;
    sqlx::query("DELETE FROM port_traffic WHERE port_id = $1 AND series <> '' AND updated_us < $2")
        .bind(port)
        .bind(before)
        .execute(tx)
        .await?;
    Ok(())
}

#[derive(FromRow)]
struct Row {
    port_id: String,
    server_id: String,
    project_id: String,
    network_id: String,
    rx_bytes: i64,
    rx_packets: i64,
    rx_dropped: i64,
    tx_bytes: i64,
    tx_packets: i64,
    tx_dropped: i64,
    since_us: i64,
    updated_us: i64,
}

impl Row {
    fn document(&self) -> Value {
        json!({
            "port_id": self.port_id, "server_id": self.server_id, "project_id": self.project_id,
            "network_id": self.network_id, "rx_bytes": self.rx_bytes, "rx_packets": self.rx_packets,
            "rx_dropped": self.rx_dropped, "tx_bytes": self.tx_bytes, "tx_packets": self.tx_packets,
            "tx_dropped": self.tx_dropped, "since": rfc3339_us(self.since_us), "updated_at": rfc3339_us(self.updated_us),
        })
    }
}

/// `GET /metering/ports`.
pub(super) async fn list(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut query = QueryBuilder::<Db>::new(
        "SELECT port_id, MAX(server_id) AS server_id, MAX(project_id) AS project_id, MAX(network_id) AS network_id,
             CAST(SUM(rx_bytes) AS BIGINT) AS rx_bytes, CAST(SUM(rx_packets) AS BIGINT) AS rx_packets,
             CAST(SUM(rx_dropped) AS BIGINT) AS rx_dropped, CAST(SUM(tx_bytes) AS BIGINT) AS tx_bytes,
             CAST(SUM(tx_packets) AS BIGINT) AS tx_packets, CAST(SUM(tx_dropped) AS BIGINT) AS tx_dropped,
             MIN(since_us) AS since_us, MAX(updated_us) AS updated_us
         FROM port_traffic WHERE port_id > ",
    );
    query.push_bind(params.get("marker").unwrap_or_default().to_owned());
    for (name, value) in params.iter() {
        let column = match name {
            "project_id" => " AND project_id = ",
            "server_id" => " AND server_id = ",
            "network_id" => " AND network_id = ",
            "port_id" => " AND port_id = ",
            "marker" | "limit" => continue,
            other => return Err(ApiError::BadRequest(format!("There is no parameter {other}."))),
        };
        query.push(column).push_bind(value.to_owned());
    }
    let limit = params.number("limit")?.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
    query.push(" GROUP BY port_id ORDER BY port_id LIMIT ");
    query.push_bind(i64::try_from(limit).map_err(ApiError::internal)?);
    let rows: Vec<Row> = query.build_query_as().fetch_all(&app.db).await?;
    Ok(Json(json!({"ports": rows.iter().map(Row::document).collect::<Vec<_>>()})))
}

#[cfg(test)]
#[path = "traffic_tests.rs"]
mod tests;
