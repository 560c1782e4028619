//! What hosts have and what is promised of it: the scheduler's input, read in the transaction that decides.

use crate::db::Conn;
use std::collections::{BTreeSet, HashMap};

use mote_host_api::HOST_DOWN_AFTER_S;
use sqlx::FromRow;

use crate::{
    db::now_us,
    http::error::ApiError,
    scheduler::{HostView, Policy, Resources, aggregates::Metadata},
};

/// The name of the policy in `settings`.
const POLICY_SETTING: &str = "scheduler_policy";

/// A host with the sums of its servers.
#[derive(Debug, Clone, FromRow)]
pub(super) struct HostRow {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) availability_zone: String,
    pub(super) enabled: bool,
    vcpus: i64,
    memory_mib: i64,
    disk_gib: i64,
    pub(super) kernel: String,
    pub(super) version: String,
    traits: String,
    last_seen_us: i64,
    servers: i64,
    used_vcpus: i64,
    used_memory_mib: i64,
    used_disk_gib: i64,
}

impl HostRow {
    /// As the scheduler sees it.
    pub(super) fn view(&self) -> Result<HostView, ApiError> {
        Ok(HostView {
            id: self.id.parse().map_err(ApiError::internal)?,
            name: self.name.clone(),
            zone: self.availability_zone.clone(),
            up: is_up(self.last_seen_us),
            enabled: self.enabled,
            aggregates: Metadata::new(),
            traits: serde_json::from_str::<BTreeSet<String>>(&self.traits).map_err(ApiError::internal)?,
            capacity: resources(self.vcpus, self.memory_mib, self.disk_gib),
            used: resources(self.used_vcpus, self.used_memory_mib, self.used_disk_gib),
            servers: u32::try_from(self.servers).map_err(ApiError::internal)?,
        })
    }
}

fn resources(vcpus: i64, memory_mib: i64, disk_gib: i64) -> Resources {
    let amount = |stored: i64| u64::try_from(stored).unwrap_or(0);
    Resources { vcpus: amount(vcpus), memory_mib: amount(memory_mib), disk_gib: amount(disk_gib) }
}

/// Whether a host that reported at that time (µs since 1970) counts as up now.
pub(crate) fn is_up(last_seen_us: i64) -> bool {
    let silent_us = now_us().saturating_sub(last_seen_us);
    silent_us <= i64::try_from(HOST_DOWN_AFTER_S).unwrap_or(i64::MAX).saturating_mul(1_000_000)
}

/// All hosts by name, with what triggers have counted (migration 0096). A server counts from the moment that its row names the host until the host has removed it.
pub(super) async fn rows(conn: &mut Conn) -> Result<Vec<HostRow>, ApiError> {
    let sql =
        "SELECT id, name, availability_zone, enabled, vcpus, memory_mib, disk_gib, kernel, version, traits,
            last_seen_us, promised_servers AS servers, promised_vcpus AS used_vcpus,
            promised_memory_mib AS used_memory_mib, promised_disk_gib AS used_disk_gib
        FROM hosts ORDER BY name";
    Ok(sqlx::query_as(sql).fetch_all(conn).await?)
}

/// All hosts, as [`crate::scheduler::schedule`] takes them. Ask in the write transaction that makes the claim.
pub(crate) async fn views(conn: &mut Conn) -> Result<Vec<HostView>, ApiError> {
    let mut views: Vec<HostView> = rows(conn).await?.iter().map(HostRow::view).collect::<Result<_, _>>()?;
    let mut of_hosts = aggregates_metadata(conn).await?;
    for view in &mut views {
        view.aggregates = of_hosts.remove(&view.id.to_string()).unwrap_or_default();
    }
    Ok(views)
}

/// Metadata of the aggregates of each host that is in some.
async fn aggregates_metadata(conn: &mut Conn) -> Result<HashMap<String, Metadata>, ApiError> {
    let sql = "SELECT h.host_id, m.key, m.value FROM aggregate_hosts h
         JOIN aggregate_metadata m ON m.aggregate_id = h.aggregate_id";
    let rows: Vec<(String, String, String)> = sqlx::query_as(sql).fetch_all(conn).await?;
    let mut of_hosts = HashMap::<String, Metadata>::new();
    for (host, key, value) in rows {
        let values = of_hosts.entry(host).or_default().entry(key).or_default();
        values.extend(value.split(',').map(|value| value.trim().to_owned()));
    }
    Ok(of_hosts)
}

/// The cloud's policy of placement.
pub(crate) async fn policy(conn: &mut Conn) -> Result<Policy, ApiError> {
    let name: Option<String> = sqlx::query_scalar("SELECT value FROM settings WHERE name = $1")
        .bind(POLICY_SETTING)
        .fetch_optional(conn)
        .await?;
    match name {
        None => Ok(Policy::default()),
        Some(name) => Policy::from_name(&name)
            .ok_or_else(|| ApiError::internal(format!("unknown scheduler policy '{name}' in the database"))),
    }
}

/// Changes the policy; it counts from the next decision on.
pub(super) async fn set_policy(conn: &mut Conn, policy: Policy) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = $2",
    )
    .bind(POLICY_SETTING)
    .bind(policy.name())
    .execute(conn)
    .await?;
    Ok(())
}
