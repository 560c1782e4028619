//! What a new version does once to what an earlier one has made, where SQL of a migration can't do it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use sqlx::FromRow;

use super::{reach, security_groups};
use crate::{
    app::App,
    db::{Conn, now_us},
    hosts,
    http::error::ApiError,
};

/// The setting that says that old ports have been looked at.
const DONE: &str = "ports from before security groups";
/// The migration that brought security groups.
const GROUPS_CAME: i64 = 40;
/// Ports that one line of the log names.
const NAMED: usize = 50;

/// A port without a filter from before there were any.
#[derive(Debug, FromRow)]
struct OldPort {
    id: String,
    project_id: String,
    updated_us: i64,
    host_id: Option<String>,
}

/// Filters ports as new ones are that were made before there were security groups, and says which.
///
/// # Errors
/// Of the database.
pub(crate) async fn run(app: &App) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let done: Option<String> = sqlx::query_scalar("SELECT value FROM settings WHERE name = $1")
        .bind(DONE)
        .fetch_optional(&mut *tx)
        .await?;
    if done.is_some() {
        return Ok(());
    }
    let came_us = groups_came(&mut tx).await?;
    let (untouched, changed): (Vec<_>, Vec<_>) =
        old_ports(&mut tx, came_us).await?.into_iter().partition(|port| port.updated_us < came_us);
    let mut hosts: BTreeSet<String> = BTreeSet::new();
    let mut groups: BTreeMap<&str, String> = BTreeMap::new();
    for port in &untouched {
        let group = match groups.get(port.project_id.as_str()) {
            Some(group) => group.clone(),
            None => {
                let group = security_groups::default_group(&mut tx, &port.project_id).await?;
                groups.insert(&port.project_id, group.clone());
                group
            }
        };
        filter(&mut tx, &port.id, &group).await?;
        hosts.extend(port.host_id.clone());
    }
    // Their addresses are members of the groups.
    for group in groups.values() {
        hosts.extend(reach::naming_group(&mut tx, group).await?);
    }
    sqlx::query("INSERT INTO settings (name, value) VALUES ($1, $2)")
        .bind(DONE)
        .bind(untouched.len().to_string())
        .execute(&mut *tx)
        .await?;
    let touched = hosts::touch_all(&mut tx, &hosts).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    tell(
        &untouched,
        "were made before there were security groups and have their projects' default group now",
    );
    tell(
        &changed,
        "were made before there were security groups, have been changed since, and stay without a filter; `openstack port set --enable-port-security --security-group default PORT` filters one",
    );
    Ok(())
}

fn tell(ports: &[OldPort], what: &str) {
    if ports.is_empty() {
        return;
    }
    let named: Vec<&str> = ports.iter().take(NAMED).map(|port| port.id.as_str()).collect();
    let more = ports.len() - named.len();
    tracing::warn!(count = ports.len(), more, ports = named.join(" "), "ports that {what}");
}

/// When this database got security groups, in microseconds.
async fn groups_came(tx: &mut Conn) -> Result<i64, ApiError> {
    let sql = "SELECT CAST(installed_on AS TEXT) FROM _sqlx_migrations WHERE version = $1";
    let text: String = sqlx::query_scalar(sql).bind(GROUPS_CAME).fetch_one(tx).await?;
    // SQLite writes UTC without saying so, and without parts of a second.
    let (text, end_us) = match text.len() == "2026-11-23 03:00:00".len() {
        true => (format!("{text}Z"), 999_999),
        false => (text, 0),
    };
    let time: Timestamp = text.parse().map_err(ApiError::internal)?;
    Ok(time.as_microsecond() + end_us)
}

/// Those on networks whose new ports are filtered.
async fn old_ports(tx: &mut Conn, came_us: i64) -> Result<Vec<OldPort>, ApiError> {
    Ok(sqlx::query_as(
        "SELECT ports.id, ports.project_id, ports.updated_us, servers.host_id
         FROM ports JOIN networks ON networks.id = ports.network_id
             LEFT JOIN servers ON servers.id = ports.server_id
         WHERE ports.created_us < $1 AND NOT ports.port_security_enabled AND networks.port_security_enabled
             AND ports.device_owner NOT LIKE 'network:%'
             AND NOT EXISTS (SELECT 1 FROM port_security_groups WHERE port_security_groups.port_id = ports.id)
         ORDER BY ports.id",
    )
    .bind(came_us)
    .fetch_all(tx)
    .await?)
}

async fn filter(tx: &mut Conn, port: &str, group: &str) -> Result<(), ApiError> {
    sqlx::query("INSERT INTO port_security_groups (port_id, security_group_id) VALUES ($1, $2)")
        .bind(port)
        .bind(group)
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "UPDATE ports SET port_security_enabled = TRUE, revision = revision + 1, updated_us = $2 WHERE id = $1",
    )
    .bind(port)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}
