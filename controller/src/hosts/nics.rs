//! Ports on their way into running VMMs and out of them: when a host says that they have arrived, or are gone.
//!
//! A port that leaves keeps its server, its addresses and its filter until the host has no tap of it any more, so that nobody else
//! can be given an address that a guest still uses.

use std::collections::HashMap;

use mote_host_api::{ObservedServer, ServerState};
use serde_json::json;
use sqlx::FromRow;

use super::{Touched, touch, touch_all};
use crate::{
    db::Conn,
    events::{self, NewEvent},
    http::error::ApiError,
    network::ports::server::{self, PlugState},
};

#[derive(FromRow)]
struct Row {
    id: String,
    server_id: String,
    project_id: String,
    network_id: String,
    plug_state: String,
    plug_generation: i64,
}

/// Takes what `host` reports of its servers' NICs. `applied` is the newest generation that it had seen when it did.
pub(super) async fn take(
    tx: &mut Conn,
    host: &str,
    applied: i64,
    seen: &HashMap<String, &ObservedServer>,
) -> Result<Vec<Touched>, ApiError> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT ports.id, ports.server_id, servers.project_id, ports.network_id, ports.plug_state, ports.plug_generation
         FROM ports JOIN servers ON servers.id = ports.server_id
         WHERE ports.plug_state IS NOT NULL AND servers.host_id = $1
             AND NOT (servers.deleting OR servers.offloading) ORDER BY ports.id",
    )
    .bind(host)
    .fetch_all(&mut *tx)
    .await?;
    let mut touched = Vec::new();
    for row in rows.into_iter().filter(|row| row.plug_generation <= applied) {
        let state = PlugState::from_word(&row.plug_state);
        let state = state.ok_or_else(|| ApiError::internal(format!("port {} has no known state", row.id)))?;
        let server = seen.get(&row.server_id).copied();
        let has = has_port(server, &row.id);
        match state {
            // With the next start of a server that is off, it is there.
            PlugState::Plugging if has == Some(true) || is_off(server) => {
                server::settle_plugged(tx, &row.id).await?;
                note(tx, &row, "attached").await?;
            }
            PlugState::Unplugging | PlugState::Deleting if has == Some(false) => {
                let concerned = server::concerned(tx, &row.network_id, &row.id).await?;
                touched.extend(touch_all(tx, &concerned).await?);
                if !concerned.contains(host) {
                    touched.push(touch(tx, host).await?.0);
                }
                server::unplug(tx, &row.server_id, &row.id).await?;
                note(tx, &row, "detached").await?;
            }
            _ => {}
        }
    }
    Ok(touched)
}

fn is_off(server: Option<&ObservedServer>) -> bool {
    server.is_none_or(|server| matches!(server.state, ServerState::Stopped | ServerState::Failed))
}

/// Whether its host has a tap of the port; none if that isn't known. One that is suspended has it in its files.
fn has_port(server: Option<&ObservedServer>, port: &str) -> Option<bool> {
    match server {
        Some(server) if !is_off(Some(server)) => {
            let ports = server.ports.as_ref()?;
            Some(ports.iter().any(|other| other.to_string() == port))
        }
        _ => Some(false),
    }
}

async fn note(tx: &mut Conn, row: &Row, state: &str) -> Result<(), ApiError> {
    let event = NewEvent {
        kind: "server.interface",
        project_id: &row.project_id,
        by: None,
        resource_id: &row.server_id,
        payload: json!({ "port_id": row.id, "state": state }),
    };
    events::note(tx, &event).await
}
