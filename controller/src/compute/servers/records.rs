//! What was done to a server (`os-instance-actions`), and what it uses (`diagnostics`, `topology`).

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use jiff::Timestamp;
use mote_host_api::{Diagnostics, HostReply, HostRequestKind, Traffic};
use serde_json::{Value, json};
use sqlx::FromRow;

use super::{
    super::versions::Version,
    row::{self, ServerRow},
    view,
};
use crate::{
    app::App,
    db::rfc3339_us,
    hosts,
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;
/// KiB of a MiB: Nova counts memory of diagnostics in KiB before 2.48, in MiB since.
const KIB_PER_MIB: u64 = 1024;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers/{id}/os-instance-actions", get(actions))
        .route("/servers/{id}/os-instance-actions/{request}", get(action))
        .route("/servers/{id}/diagnostics", get(diagnostics))
        .route("/servers/{id}/topology", get(topology))
}

#[derive(Debug, FromRow)]
struct ActionRow {
    request_id: String,
    server_id: String,
    action: String,
    project_id: String,
    user_id: String,
    started_us: i64,
    /// Why it could not be carried out, and when that was known.
    error: Option<String>,
    finished_us: Option<i64>,
}

/// The statement that reads the actions of a server.
macro_rules! select {
    ($from:literal) => {
        concat!(
            "SELECT request_id, server_id, action, project_id, user_id, started_us, error, finished_us FROM ",
            $from,
            " WHERE server_id = $1 ORDER BY started_us DESC, request_id"
        )
    };
}

/// A time as Nova writes it here.
pub(in super::super) fn time(us: i64) -> String {
    rfc3339_us(us).trim_end_matches('Z').to_owned()
}

impl ActionRow {
    fn document(&self, version: Version) -> Value {
        let mut document = json!({
            "action": self.action, "instance_uuid": self.server_id, "request_id": self.request_id,
            "project_id": self.project_id, "user_id": self.user_id,
            "message": self.error.as_ref().map(|_| "Error"), "start_time": time(self.started_us),
        });
        if version.has(58) {
            document["updated_at"] = json!(time(self.finished_us.unwrap_or(self.started_us)));
        }
        document
    }

    /// The one event of an action here: that the wish was written down for the host, or that it had to be taken back.
    fn event(&self, version: Version, ctx: &Ctx, row: &ServerRow) -> Value {
        let at = time(self.started_us);
        let mut event = json!({
            "event": format!("controller_{}_server", self.action), "start_time": at,
            "finish_time": time(self.finished_us.unwrap_or(self.started_us)),
            "result": if self.error.is_some() { "Error" } else { "Success" },
        });
        if ctx.is_admin || !version.has(51) {
            // The reason is all that there is to trace.
            event["traceback"] = json!(self.error);
        }
        if version.has(62) {
            event["hostId"] = json!(view::host_id(row));
            if ctx.is_admin {
                event["host"] = json!(row.host_name);
            }
        }
        if version.has(84) {
            event["details"] = json!(self.error);
        }
        event
    }
}

/// A server with what was done to it; since 2.21 also one that is deleted.
async fn rows(
    app: &App,
    ctx: &Ctx,
    version: Version,
    id: &str,
) -> Result<(ServerRow, Vec<ActionRow>), ApiError> {
    let mut db = app.db.acquire().await?;
    let row = match row::visible(&mut db, ctx, id).await {
        Err(ApiError::NotFound(_)) if version.has(21) => row::deleted(app, &mut db, ctx, id).await?,
        other => other?,
    };
    let sql = match row.deleted_us {
        None => select!("server_actions"),
        Some(_) => select!("deleted_server_actions"),
    };
    let rows = sqlx::query_as(sql).bind(&row.id).fetch_all(&mut *db).await?;
    Ok((row, rows))
}

/// A time of the query, µs since 1970.
pub(in super::super) fn moment(params: &Params, name: &str) -> Result<Option<i64>, ApiError> {
    let Some(text) = params.get(name) else { return Ok(None) };
    let zoned = text.parse::<Timestamp>().or_else(|_| format!("{text}Z").parse::<Timestamp>());
    let refused = |_| ApiError::BadRequest(format!("The parameter {name} must be a time as in ISO 8601."));
    zoned.map(|time| Some(time.as_microsecond())).map_err(refused)
}

async fn actions(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (_, mut rows) = rows(&app, &ctx, version, &id).await?;
    let mut next = None;
    if version.has(58) {
        let since = moment(&params, "changes-since")?;
        let before = if version.has(66) { moment(&params, "changes-before")? } else { None };
        rows.retain(|row| {
            since.is_none_or(|since| row.started_us >= since)
                && before.is_none_or(|before| row.started_us <= before)
        });
        if let Some(marker) = params.get("marker") {
            let at = rows.iter().position(|row| row.request_id == marker);
            let at = at.ok_or_else(|| ApiError::BadRequest("marker not found".into()))?;
            rows.drain(..=at);
        }
        let limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = rows.len() > limit;
        rows.truncate(limit);
        next = rows.last().filter(|_| more).map(|last| format!("limit={limit}&marker={}", last.request_id));
    }
    let list: Vec<Value> = rows.iter().map(|row| row.document(version)).collect();
    let mut answer = json!({ "instanceActions": list });
    if let Some(next) = next {
        let base = &app.config.public_url;
        let href = format!("{base}/compute/v2.1/servers/{id}/os-instance-actions?{next}");
        answer["links"] = json!([{"rel": "next", "href": href}]);
    }
    Ok(Json(answer))
}

async fn action(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path((id, request)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let (server, rows) = rows(&app, &ctx, version, &id).await?;
    let found = rows.iter().find(|row| row.request_id == request);
    let found = found.ok_or_else(|| {
        let request: String = request.chars().take(64).collect();
        ApiError::NotFound(format!("Action for request_id {request} on instance {id} not found"))
    })?;
    let mut document = found.document(version);
    if ctx.is_admin || version.has(51) {
        document["events"] = json!([found.event(version, &ctx, &server)]);
    }
    Ok(Json(json!({ "instanceAction": document })))
}

async fn diagnostics(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let row = row::visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    if row.host_id.is_none() {
        return Err(ApiError::Conflict(format!("Instance {id} is on no host.")));
    }
    let kind = HostRequestKind::Diagnostics { server_id: row.id.parse().map_err(ApiError::internal)? };
    match hosts::ask(&app, &ctx, &row.id, kind, Duration::ZERO).await? {
        HostReply::Diagnostics(found) => Ok(Json(document(version, &row, &found))),
        _ => Err(ApiError::internal("a host answered a question that was not asked")),
    }
}

fn document(version: Version, row: &ServerRow, found: &Diagnostics) -> Value {
    let maximum = u64::try_from(row.memory_mib).unwrap_or(0);
    if !version.has(48) {
        let mut flat = json!({
            "memory": maximum * KIB_PER_MIB, "memory-rss": found.memory_used_mib.map(|mib| mib * KIB_PER_MIB),
            "vda_read": found.disk_read_bytes, "vda_write": found.disk_write_bytes,
        });
        for (index, time) in found.vcpu_time_ns.iter().enumerate() {
            flat[format!("cpu{index}_time")] = json!(time);
        }
        return flat;
    }
    let cpu = |(id, time): (usize, &u64)| json!({"id": id, "time": time, "utilisation": null});
    let disk = json!({
        "read_bytes": found.disk_read_bytes, "write_bytes": found.disk_write_bytes, "read_requests": null,
        "write_requests": null, "errors_count": null,
    });
    let traffic = found.traffic.iter().copied().chain(std::iter::repeat(None));
    let nic = |(mac, carried): (&String, Option<Traffic>)| {
        let number = |of: fn(Traffic) -> u64| carried.map(of);
        json!({
            "mac_address": mac, "rx_octets": number(|t| t.rx_bytes), "rx_errors": null,
            "rx_drop": number(|t| t.rx_dropped), "rx_packets": number(|t| t.rx_packets), "rx_rate": null,
            "tx_octets": number(|t| t.tx_bytes), "tx_errors": null, "tx_drop": number(|t| t.tx_dropped),
            "tx_packets": number(|t| t.tx_packets), "tx_rate": null,
        })
    };
    let state = match row.vm_state().word() {
        "active" | "rescued" | "resized" => "running",
        "paused" => "paused",
        "error" => "crashed",
        _ => "shutdown",
    };
    json!({
        "state": state, "driver": "mote", "hypervisor": "kvm", "hypervisor_os": "linux",
        "uptime": found.uptime_s, "config_drive": row.has_config_drive(), "num_cpus": row.vcpus, "num_nics": found.nics.len(),
        "num_disks": found.disks, "memory_details": {"maximum": maximum, "used": found.memory_used_mib},
        "cpu_details": found.vcpu_time_ns.iter().enumerate().map(cpu).collect::<Vec<_>>(),
        "disk_details": match found.disks { 0 => json!([]), _ => json!([disk]) },
        "nic_details": found.nics.iter().zip(traffic).map(nic).collect::<Vec<_>>(),
    })
}

/// Guests have no NUMA topology (2.78).
async fn topology(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    row::visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    match version.has(78) {
        true => Ok(Json(json!({"nodes": [], "pagesize_kb": null}))),
        false => Err(ApiError::NotFound("The resource could not be found.".into())),
    }
}
