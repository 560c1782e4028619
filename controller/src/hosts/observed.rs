//! What a host reports, and what that makes of its servers.

use crate::db::Conn;
use std::collections::HashMap;

use axum::extract::State;
use http::StatusCode;
use mote_host_api::{BootSpec, DesiredPower, ObservedServer, ObservedState, RescueSpec};
use serde_json::json;
use sqlx::FromRow;

use super::{Touched, deleted, desired, given_up, join, nics, secrets::Speaker, touch, traffic};
use crate::{
    app::App,
    compute::{
        migrations,
        state::{self, Change, Known, TaskState, VmState},
    },
    config::Config,
    db::{now_us, rfc3339_us},
    events::{self, NewEvent},
    http::{error::ApiError, json::JsonBody},
    image,
    network::{gateways, ports},
};

/// Longest stored reason of a failure in characters.
const MAX_FAULT: usize = 1024;
/// Code of a fault that a host reports, as Nova's.
const FAULT_CODE: i64 = 500;

/// `PUT /hosts/{id}/observed`.
pub(super) async fn report(
    speaker: Speaker,
    State(app): State<App>,
    JsonBody(observed): JsonBody<ObservedState>,
) -> Result<StatusCode, ApiError> {
    if observed.host_id != speaker.id {
        return Err(ApiError::BadRequest("This is the report of another host.".into()));
    }
    let mut tx = app.begin().await?;
    let moved = gateways::heard(&mut tx, &speaker.key, observed.inventory.tunnel_ip).await?;
    let outcome = take(&mut tx, &app.config, &speaker.key, &observed).await?;
    tx.commit().await?;
    app.hub.wake_all(moved);
    app.hub.wake_all(outcome.touched);
    if let Err(error) = image::blobs::release(&app, &outcome.released).await {
        tracing::error!(%error, "the bytes of images stay until the next start");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// What is left to do after the commit.
#[derive(Debug, Default)]
struct Outcome {
    touched: Vec<Touched>,
    released: Vec<String>,
}

#[derive(FromRow)]
struct Row {
    id: String,
    project_id: String,
    vm_state: String,
    task_state: Option<String>,
    desired_power: String,
    run_generation: i64,
    changed_generation: i64,
    disk_number: i64,
    rescued: bool,
    resized: bool,
    deleting: bool,
    offloading: bool,
}

impl Row {
    fn known(&self) -> Result<Known, ApiError> {
        let unknown =
            |word: &str| ApiError::internal(format!("unknown state '{word}' of server {}", self.id));
        let task_state = match &self.task_state {
            Some(word) => Some(TaskState::from_word(word).ok_or_else(|| unknown(word))?),
            None => None,
        };
        Ok(Known {
            vm_state: VmState::from_word(&self.vm_state).ok_or_else(|| unknown(&self.vm_state))?,
            task_state,
            desired_power: desired::power(&self.desired_power)?,
            run_generation: u64::try_from(self.run_generation).map_err(ApiError::internal)?,
            changed_generation: u64::try_from(self.changed_generation).map_err(ApiError::internal)?,
            disk_number: u32::try_from(self.disk_number).map_err(ApiError::internal)?,
            rescued: self.rescued,
            resized: self.resized,
            leaving: self.deleting || self.offloading,
        })
    }
}

async fn take(
    tx: &mut Conn,
    config: &Config,
    host: &str,
    observed: &ObservedState,
) -> Result<Outcome, ApiError> {
    let generation: Option<i64> = sqlx::query_scalar("SELECT generation FROM hosts WHERE id = $1")
        .bind(host)
        .fetch_optional(&mut *tx)
        .await?;
    let generation = generation.ok_or(ApiError::Unauthorized)?;
    // A generation that was never given out is of a database that was put back since: it says nothing here.
    let applied = i64::try_from(observed.applied_generation).ok().filter(|applied| *applied <= generation);
    let applied = applied.unwrap_or(0);
    join::store_inventory(tx, host, &observed.inventory).await?;
    sqlx::query("UPDATE hosts SET applied_generation = $2 WHERE id = $1")
        .bind(host)
        .bind(applied)
        .execute(&mut *tx)
        .await?;
    // Before anything that the report says ends a server's life.
    traffic::store(tx, host, &observed.traffic).await?;
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT id, project_id, vm_state, task_state, desired_power, run_generation, changed_generation, disk_number,
             rescue IS NOT NULL AS rescued, resized_from IS NOT NULL AS resized, deleting, offloading
         FROM servers WHERE host_id = $1 ORDER BY id",
    )
    .bind(host)
    .fetch_all(&mut *tx)
    .await?;
    let seen: HashMap<String, &ObservedServer> =
        observed.servers.iter().map(|server| (server.id.to_string(), server)).collect();
    let mut outcome = Outcome::default();
    for row in rows {
        match (row.deleting || row.offloading, seen.get(&row.id)) {
            (true, None) if row.changed_generation <= applied && row.deleting => {
                outcome.released.extend(finish_deletion(tx, config, &row.id).await?);
            }
            (true, None) if row.changed_generation <= applied => finish_offload(tx, &row).await?,
            (false, Some(server)) => {
                for given_up in &server.given_up {
                    outcome.touched.extend(given_up::take(tx, host, &row.id, applied, given_up).await?);
                }
                let known = row.known()?;
                let Some(change) = state::observe(&known, server, applied.unsigned_abs()) else { continue };
                if change.desired_power != known.desired_power {
                    let (touched, generation) = touch(tx, host).await?;
                    outcome.touched.push(touched);
                    store_wish(tx, &row.id, change.desired_power, generation).await?;
                }
                store(tx, &row, &change).await?;
                migrations::follow(tx, &row.id, known.task_state, &change).await?;
            }
            _ => {}
        }
    }
    outcome.touched.extend(nics::take(tx, host, applied, &seen).await?);
    Ok(outcome)
}

async fn store(tx: &mut Conn, row: &Row, change: &Change) -> Result<(), ApiError> {
    let now = now_us();
    let fault: Option<String> = change.fault.as_ref().map(|text| text.chars().take(MAX_FAULT).collect());
    let launched = (change.vm_state == VmState::Active).then_some(now);
    sqlx::query(
        "UPDATE servers SET vm_state = $2, task_state = $3, fault_message = $4, fault_code = $5, fault_us = $6,
             updated_us = $7, launched_us = COALESCE(launched_us, $8) WHERE id = $1",
    )
    .bind(&row.id)
    .bind(change.vm_state.word())
    .bind(change.task_state.map(TaskState::word))
    .bind(&fault)
    .bind(fault.as_ref().map(|_| FAULT_CODE))
    .bind(fault.as_ref().map(|_| now))
    .bind(now)
    .bind(launched)
    .execute(&mut *tx)
    .await?;
    let event = NewEvent {
        kind: "server.state",
        project_id: &row.project_id,
        by: None,
        resource_id: &row.id,
        payload: json!({
            "vm_state": change.vm_state.word(), "task_state": change.task_state.map(TaskState::word),
            "fault": fault,
        }),
    };
    events::note(tx, &event).await
}

/// The guest has changed what is wanted, by powering itself off.
async fn store_wish(tx: &mut Conn, id: &str, power: DesiredPower, generation: i64) -> Result<(), ApiError> {
    sqlx::query("UPDATE servers SET desired_power = $2, changed_generation = $3 WHERE id = $1")
        .bind(id)
        .bind(state::power_word(power))
        .bind(generation)
        .execute(tx)
        .await?;
    Ok(())
}

/// A shelved server is on no host any more. Its ports and addresses stay its own.
async fn finish_offload(tx: &mut Conn, row: &Row) -> Result<(), ApiError> {
    sqlx::query(
        "UPDATE servers SET host_id = NULL, offloading = FALSE, vm_state = $2, task_state = NULL,
             availability_zone = '', updated_us = $3 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(VmState::ShelvedOffloaded.word())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    ports::server::settle_all(tx, &row.id).await?;
    let event = NewEvent {
        kind: "server.state",
        project_id: &row.project_id,
        by: None,
        resource_id: &row.id,
        payload: json!({"vm_state": VmState::ShelvedOffloaded.word(), "task_state": null, "fault": null}),
    };
    events::note(tx, &event).await
}

/// Ends the life of a server that no host has (any more): its ports go or are free, its usage is written, its row goes.
/// Returns the digests of what it booted: hand them to [`image::blobs::release`] after the commit.
pub(crate) async fn finish_deletion(
    tx: &mut Conn,
    config: &Config,
    id: &str,
) -> Result<Vec<String>, ApiError> {
    ports::server::release(tx, id).await?;
    // One that never ran was used for no time.
    sqlx::query(
        "INSERT INTO server_usage (server_id, project_id, name, flavor_name, vcpus, memory_mib, disk_gib,
             started_us, ended_us)
         SELECT id, project_id, name, flavor_name, vcpus, memory_mib, disk_gib + ephemeral_gib,
             COALESCE(launched_us, $2), $2
         FROM servers WHERE id = $1",
    )
    .bind(id)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    note_deletion(tx, id).await?;
    deleted::keep(tx, config, id).await?;
    image::snapshot::abandon_of_server(tx, id).await?;
    let (boot, rescue): (String, Option<String>) =
        sqlx::query_as("DELETE FROM servers WHERE id = $1 RETURNING boot, rescue")
            .bind(id)
            .fetch_one(tx)
            .await?;
    digests(&boot, rescue.as_deref())
}

/// Tells what a server was and how long it was there; its usage has just been written.
async fn note_deletion(tx: &mut Conn, id: &str) -> Result<(), ApiError> {
    #[derive(FromRow)]
    struct Used {
        project_id: String,
        name: String,
        flavor_name: String,
        vcpus: i64,
        memory_mib: i64,
        disk_gib: i64,
        started_us: i64,
        ended_us: i64,
    }
    let used: Used = sqlx::query_as(
        "SELECT project_id, name, flavor_name, vcpus, memory_mib, disk_gib, started_us, ended_us
         FROM server_usage WHERE server_id = $1",
    )
    .bind(id)
    .fetch_one(&mut *tx)
    .await?;
    let event = NewEvent {
        kind: "server.deleted",
        project_id: &used.project_id,
        by: None,
        resource_id: id,
        payload: json!({
            "name": used.name, "flavor": used.flavor_name, "vcpus": used.vcpus,
            "memory_mib": used.memory_mib, "disk_gib": used.disk_gib,
            "started_at": rfc3339_us(used.started_us), "ended_at": rfc3339_us(used.ended_us),
        }),
    };
    events::note(tx, &event).await
}

/// What a server boots, and what it is rescued with, by what is stored of it.
pub(super) fn boots(boot: &str, rescue: Option<&str>) -> Result<Vec<BootSpec>, ApiError> {
    let mut boots: Vec<BootSpec> = vec![serde_json::from_str(boot).map_err(ApiError::internal)?];
    if let Some(rescue) = rescue {
        boots.push(serde_json::from_str::<RescueSpec>(rescue).map_err(ApiError::internal)?.boot);
    }
    Ok(boots)
}

/// The digests of what a server boots by what is stored of it.
pub(crate) fn digests(boot: &str, rescue: Option<&str>) -> Result<Vec<String>, ApiError> {
    let boots = boots(boot, rescue)?;
    Ok(boots.iter().flat_map(BootSpec::images).map(|image| image.sha256.clone()).collect())
}
