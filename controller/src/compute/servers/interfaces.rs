//! NICs of a server (`os-interface`).
//!
//! A NIC is plugged into and out of a server that is active, paused or stopped, as in Nova. A host carries out what concerns a
//! server that isn't off, and until it has said so the port is on its way ([`PlugState`]): one that comes is `BUILD`, one that
//! goes is still there.

use std::net::IpAddr;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    super::{state::VmState, versions::Version},
    actions::check_lock,
    input::{Fields, MAX_NICS, invalid},
    row::{self, ServerRow},
};
use crate::{
    app::App,
    db::{Conn, Tx, now_us},
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError, json::JsonBody},
    network::ports::server::{self, NicWish, PlugState, PluggedServer, ServerAddress},
};

/// Names of the instance actions.
const ATTACH: &str = "attach_interface";
const DETACH: &str = "detach_interface";

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/servers/{id}/os-interface", get(list).post(attach))
        .route("/servers/{id}/os-interface/{port}", get(show).delete(detach))
}

fn attachments(row: &ServerRow, addresses: &[ServerAddress], version: Version) -> Vec<Value> {
    let active = row.vm_state() == VmState::Active;
    let mut attachments: Vec<Value> = Vec::new();
    for address in addresses {
        let ip = address.ip().map(|ip| json!({"subnet_id": address.subnet_id, "ip_address": ip.to_string()}));
        match attachments.last_mut().filter(|last| last["port_id"] == address.port_id.as_str()) {
            Some(last) => last["fixed_ips"].as_array_mut().into_iter().for_each(|ips| ips.extend(ip.clone())),
            None => {
                let mut attachment = json!({
                    "net_id": address.network_id, "port_id": address.port_id, "mac_addr": address.mac_address,
                    "port_state": server::nic_state(active, address.plug_state.as_deref()), "fixed_ips": ip.into_iter().collect::<Vec<_>>(),
                });
                if version.has(70) {
                    attachment["tag"] = Value::Null;
                }
                attachments.push(attachment);
            }
        }
    }
    attachments
}

async fn of_server(
    db: &mut Conn,
    ctx: &Ctx,
    id: &str,
    version: Version,
) -> Result<(ServerRow, Vec<Value>), ApiError> {
    let row = row::visible(db, ctx, id).await?;
    let addresses = server::addresses(db, &row.id).await?;
    let attachments = attachments(&row, &addresses, version);
    Ok((row, attachments))
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (_, attachments) = of_server(&mut *app.db.acquire().await?, &ctx, &id, version).await?;
    Ok(Json(json!({"interfaceAttachments": attachments})))
}

fn no_port(id: &str, port: &str) -> ApiError {
    let port: String = port.chars().take(64).collect();
    ApiError::NotFound(format!("Instance {id} does not have a port with id {port}"))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path((id, port)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let (_, attachments) = of_server(&mut *app.db.acquire().await?, &ctx, &id, version).await?;
    let found = attachments.into_iter().find(|attachment| attachment["port_id"] == port.as_str());
    Ok(Json(json!({"interfaceAttachment": found.ok_or_else(|| no_port(&id, &port))?})))
}

/// The server, if its NICs may be changed now.
async fn begin(app: &App, ctx: &Ctx, id: &str, action: &str) -> Result<(Tx, ServerRow), ApiError> {
    ctx.require_writer()?;
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, ctx, id).await?;
    check_lock(ctx, &row)?;
    let refused = |kind: &str, state: &str| {
        Err(ApiError::Conflict(format!(
            "Cannot '{action}' instance {} while it is in {kind} {state}",
            row.id
        )))
    };
    match (row.vm_state(), row.task_state()) {
        (_, Some(task)) => refused("task_state", task.word()),
        (VmState::Active | VmState::Paused | VmState::Stopped, None) => Ok((tx, row)),
        (state, None) => refused("vm_state", state.word()),
    }
}

fn wish(body: Value, version: Version) -> Result<Option<NicWish>, ApiError> {
    let shown = body.clone();
    let mut fields = Fields::open(body, "interfaceAttachment", &[])?;
    let (network, port) = (fields.uuid("net_id")?, fields.uuid("port_id")?);
    let fixed_ips = fields.list("fixed_ips")?;
    if version.has(49) {
        fields.only("tag", &[])?;
    }
    fields.finish()?;
    let fixed_ip = match fixed_ips.as_slice() {
        [] => None,
        [one] => {
            let ip = one.get("ip_address").and_then(Value::as_str).and_then(|ip| ip.parse::<IpAddr>().ok());
            Some(ip.ok_or_else(|| invalid("fixed_ips", one, "is not {\"ip_address\": \"an address\"}"))?)
        }
        _ => return Err(invalid("fixed_ips", &shown, "has more than one address")),
    };
    match (network, port) {
        (Some(_), Some(_)) => Err(ApiError::BadRequest("Must not input both network_id and port_id".into())),
        (None, _) if fixed_ip.is_some() => {
            Err(ApiError::BadRequest("Must input network_id when request IP address".into()))
        }
        (None, Some(id)) => Ok(Some(NicWish::Port { id })),
        (Some(id), None) => Ok(Some(NicWish::Network { id, fixed_ip })),
        (None, None) => Ok(None),
    }
}

async fn attach(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let wish = wish(body, version)?;
    let (mut tx, row) = begin(&app, &ctx, &id, ATTACH).await?;
    let before = server::addresses(&mut tx, &row.id).await?;
    let mut ports: Vec<String> = before.iter().map(|address| address.port_id.clone()).collect();
    ports.dedup();
    if ports.len() >= MAX_NICS {
        return Err(ApiError::BadRequest(format!("A server can have {MAX_NICS} NICs at most.")));
    }
    let wish = match wish {
        Some(wish) => wish,
        None => super::create::only_network(&mut tx, &row.project_id).await?,
    };
    server::check(&mut tx, &ctx, std::slice::from_ref(&wish), 1).await?;
    let plugged = PluggedServer {
        id: &row.id,
        project_id: &row.project_id,
        zone: &row.availability_zone,
        security_groups: &[],
    };
    let mut touched = server::plug(&mut tx, &plugged, std::slice::from_ref(&wish)).await?;
    let after = server::addresses(&mut tx, &row.id).await?;
    let new = after.iter().find(|address| !ports.contains(&address.port_id));
    let new = new.map(|address| address.port_id.clone());
    let new = new.ok_or_else(|| ApiError::internal("a port that was just plugged in is not there"))?;
    // The newest is the last NIC of the guest.
    sqlx::query(
        "UPDATE ports SET device_index =
             (SELECT COALESCE(MAX(others.device_index), -1) + 1 FROM ports others
              WHERE others.server_id = $2 AND others.id <> $1)
         WHERE id = $1",
    )
    .bind(&new)
    .bind(&row.id)
    .execute(&mut *tx)
    .await?;
    let (own, generation) = finish(&ctx, &mut tx, &row, ATTACH).await?;
    touched.extend(own);
    if row.vm_state() != VmState::Stopped {
        server::set_plug_state(&mut tx, &new, PlugState::Plugging, generation).await?;
    }
    let (_, attachments) = of_server(&mut tx, &ctx, &row.id, version).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    let found = attachments.into_iter().find(|attachment| attachment["port_id"] == new.as_str());
    Ok(Json(json!({"interfaceAttachment": found})))
}

async fn detach(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, port)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (mut tx, row) = begin(&app, &ctx, &id, DETACH).await?;
    let mut touched = Vec::new();
    match (&row.host_id, row.vm_state()) {
        (Some(host), state) if state != VmState::Stopped => {
            let addresses = server::addresses(&mut tx, &row.id).await?;
            if !addresses.iter().any(|address| address.port_id == port) {
                return Err(no_port(&row.id, &port));
            }
            server::leave(&mut tx, &port, host, PlugState::Unplugging).await?;
        }
        _ => {
            touched.extend(server::touch_others(&mut tx, &row.id).await?);
            if !server::unplug(&mut tx, &row.id, &port).await? {
                return Err(no_port(&row.id, &port));
            }
        }
    }
    touched.extend(finish(&ctx, &mut tx, &row, DETACH).await?.0);
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(StatusCode::ACCEPTED)
}

/// The host learns of it; the action is written down. Gives the host's new generation.
async fn finish(
    ctx: &Ctx,
    tx: &mut Conn,
    row: &ServerRow,
    action: &str,
) -> Result<(Option<Touched>, i64), ApiError> {
    sqlx::query("UPDATE servers SET updated_us = $2 WHERE id = $1")
        .bind(&row.id)
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    row::record_action(tx, ctx, &row.id, action).await?;
    match &row.host_id {
        Some(host) => hosts::touch(tx, host).await.map(|(touched, generation)| (Some(touched), generation)),
        None => Ok((None, 0)),
    }
}
