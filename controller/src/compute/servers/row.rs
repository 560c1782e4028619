//! Rows of servers.

use crate::db::{Conn, Db};
use std::collections::BTreeMap;

use mote_host_api::{BootSpec, DesiredPower, LocalDiskSpec, RescueSpec};
use serde_json::json;
use sqlx::{FromRow, QueryBuilder};

use super::{
    super::{
        flavors::Flavor,
        state::{TaskState, VmState, power_from_word, status},
    },
    guest::DiskConfig,
};
use crate::{
    app::App,
    events::{self, NewEvent},
    hosts,
    http::{context::Ctx, error::ApiError},
};

/// How much of an unknown id a message shows, in characters.
const MAX_SHOWN_ID: usize = 64;

/// A server without its large parts.
#[derive(Debug, Clone, FromRow)]
pub(super) struct ServerRow {
    pub(super) id: String,
    pub(super) project_id: String,
    pub(super) user_id: String,
    pub(super) name: String,
    pub(super) flavor_id: String,
    pub(super) image_id: String,
    pub(super) key_name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) hostname: String,
    pub(super) launch_index: i64,
    pub(super) locked_by: Option<String>,
    pub(super) locked_reason: Option<String>,
    pub(super) flavor_name: String,
    pub(super) vcpus: i64,
    pub(super) memory_mib: i64,
    pub(super) disk_gib: i64,
    pub(super) disk_claim_gib: i64,
    pub(super) ephemeral_gib: i64,
    pub(super) swap_mib: i64,
    local_disks: String,
    flavor_extra_specs: String,
    boot: String,
    pub(super) disk_number: i64,
    pub(super) disk_last: i64,
    pub(super) resized_from: Option<String>,
    rescue: Option<String>,
    config_drive: Option<i64>,
    pub(super) shelved_image_id: Option<String>,
    desired_power: String,
    metadata: String,
    pub(super) availability_zone: String,
    pub(super) host_id: Option<String>,
    pub(super) host_name: Option<String>,
    host_enabled: Option<bool>,
    host_seen_us: Option<i64>,
    pub(super) user_data: Option<String>,
    pub(super) deleting: bool,
    vm_state: String,
    task_state: Option<String>,
    pub(super) fault_code: Option<i64>,
    pub(super) fault_message: Option<String>,
    pub(super) fault_us: Option<i64>,
    pub(super) created_us: i64,
    pub(super) updated_us: i64,
    pub(super) launched_us: Option<i64>,
    pub(super) access_ipv4: String,
    pub(super) access_ipv6: String,
    disk_config: String,
    pub(super) reservation_id: Option<String>,
    /// When it was deleted.
    pub(super) deleted_us: Option<i64>,
}

/// The statement that reads [`ServerRow`]s, with these in place of its large columns.
macro_rules! select {
    ($boot:literal, $rescue:literal, $local:literal, $user_data:literal) => {
        select!($boot, $rescue, $local, $user_data, "CAST(NULL AS BIGINT)", "servers")
    };
    ($boot:literal, $rescue:literal, $local:literal, $user_data:literal, $deleted:literal, $from:literal) => {
        concat!(
            "SELECT servers.id, servers.project_id, servers.user_id, servers.name, servers.flavor_id,
                servers.image_id, servers.key_name, servers.metadata, servers.description, servers.hostname,
                servers.launch_index, servers.locked_by, servers.locked_reason, servers.flavor_name,
                servers.vcpus, servers.memory_mib, servers.disk_gib, servers.disk_claim_gib,
                servers.ephemeral_gib, servers.swap_mib,
                servers.flavor_extra_specs, servers.disk_number, servers.disk_last, servers.resized_from,
                servers.config_drive, servers.shelved_image_id, servers.desired_power, servers.availability_zone, servers.host_id,
                hosts.name AS host_name, hosts.enabled AS host_enabled, hosts.last_seen_us AS host_seen_us,
                servers.deleting, servers.vm_state, servers.task_state, servers.fault_code,
                servers.fault_message, servers.fault_us, servers.created_us, servers.updated_us,
                servers.launched_us, servers.access_ipv4, servers.access_ipv6, servers.disk_config,
                servers.reservation_id, ",
            $boot,
            " AS boot, ",
            $rescue,
            " AS rescue, ",
            $local,
            " AS local_disks, ",
            $user_data,
            " AS user_data, ",
            $deleted,
            " AS deleted_us FROM ",
            $from,
            " LEFT JOIN hosts ON hosts.id = servers.host_id "
        )
    };
}

/// What [`ServerRow`] is read from.
pub(super) const SELECT: &str =
    select!("servers.boot", "servers.rescue", "servers.local_disks", "servers.user_data");
/// The same for lists, which don't show what servers boot; with user data.
pub(super) const SELECT_LISTED: &str = select!("''", "NULL", "'[]'", "servers.user_data");
/// The same without user data.
pub(super) const SELECT_LISTED_SHORT: &str = select!("''", "NULL", "'[]'", "NULL");
/// The same for lists in which deleted servers may be, too.
pub(super) const SELECT_ALL: &str =
    select!("''", "NULL", "'[]'", "servers.user_data", "servers.deleted_us", "all_servers AS servers");

impl ServerRow {
    /// Nova's `vm_state`.
    pub(super) fn vm_state(&self) -> VmState {
        // The column has words of `VmState` only; were it not so, an error is what should be seen.
        VmState::from_word(&self.vm_state).unwrap_or(VmState::Error)
    }

    /// Nova's `task_state`.
    pub(super) fn task_state(&self) -> Option<TaskState> {
        match self.deleting {
            true => Some(TaskState::Deleting),
            false => self.task_state.as_deref().and_then(TaskState::from_word),
        }
    }

    /// The power that is wanted.
    pub(super) fn desired_power(&self) -> DesiredPower {
        power_from_word(&self.desired_power)
    }

    /// Nova's `host_status`: whether its host is there and takes new servers.
    pub(super) fn host_status(&self) -> &'static str {
        match (self.host_enabled, self.host_seen_us) {
            (Some(_), Some(seen)) if !hosts::is_up(seen) => "DOWN",
            (Some(true), Some(_)) => "UP",
            (Some(false), Some(_)) => "MAINTENANCE",
            _ => "",
        }
    }

    /// `OS-DCF:diskConfig`.
    pub(super) fn disk_config(&self) -> DiskConfig {
        DiskConfig::from_word(&self.disk_config)
    }

    /// Whether it has a config drive.
    pub(super) fn has_config_drive(&self) -> bool {
        self.config_drive.is_some()
    }

    /// What it boots when it isn't rescued.
    pub(super) fn boot(&self) -> Result<BootSpec, ApiError> {
        serde_json::from_str(&self.boot).map_err(ApiError::internal)
    }

    /// Its disks beside the root disk.
    pub(super) fn local_disks(&self) -> Result<Vec<LocalDiskSpec>, ApiError> {
        serde_json::from_str(&self.local_disks).map_err(ApiError::internal)
    }

    /// What it boots to be rescued.
    pub(super) fn rescue(&self) -> Result<Option<RescueSpec>, ApiError> {
        self.rescue.as_deref().map(serde_json::from_str).transpose().map_err(ApiError::internal)
    }

    /// The digests of all that it boots.
    pub(super) fn digests(&self) -> Result<Vec<String>, ApiError> {
        hosts::digests(&self.boot, self.rescue.as_deref())
    }

    /// The flavor's extra specs, as they were.
    pub(super) fn extra_specs(&self) -> Result<BTreeMap<String, String>, ApiError> {
        serde_json::from_str(&self.flavor_extra_specs).map_err(ApiError::internal)
    }

    /// Its flavor as it was.
    pub(super) fn flavor(&self) -> Flavor {
        Flavor {
            id: self.flavor_id.clone(),
            name: self.flavor_name.clone(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            disk_gib: self.disk_gib,
            ephemeral_gib: self.ephemeral_gib,
            swap_mib: self.swap_mib,
        }
    }

    /// Nova's `status`.
    pub(super) fn status(&self) -> &'static str {
        status(self.vm_state(), self.task_state())
    }

    /// The user's metadata.
    pub(super) fn metadata(&self) -> Result<BTreeMap<String, String>, ApiError> {
        serde_json::from_str(&self.metadata).map_err(ApiError::internal)
    }
}

/// The server of that id, if the asker may see it.
///
/// # Errors
/// 404.
pub(super) async fn visible(db: &mut Conn, ctx: &Ctx, id: &str) -> Result<ServerRow, ApiError> {
    let mut query = QueryBuilder::<Db>::new(SELECT);
    query.push(" WHERE servers.id = ").push_bind(id.to_owned());
    let row: Option<ServerRow> = query.build_query_as().fetch_optional(db).await?;
    seen(ctx, id, row)
}

fn seen(ctx: &Ctx, id: &str, row: Option<ServerRow>) -> Result<ServerRow, ApiError> {
    let project = ctx.require_project()?;
    row.filter(|row| ctx.is_admin || row.project_id == project).ok_or_else(|| {
        let id: String = id.chars().take(MAX_SHOWN_ID).collect();
        ApiError::NotFound(format!("Instance {id} could not be found."))
    })
}

/// The deleted server of that id, if the asker may see it and it is still kept.
///
/// # Errors
/// 404.
pub(super) async fn deleted(app: &App, db: &mut Conn, ctx: &Ctx, id: &str) -> Result<ServerRow, ApiError> {
    let mut query = QueryBuilder::<Db>::new(SELECT_ALL);
    query.push(" WHERE servers.id = ").push_bind(id.to_owned());
    query.push(" AND servers.deleted_us >= ").push_bind(hosts::kept_since(&app.config));
    let row: Option<ServerRow> = query.build_query_as().fetch_optional(db).await?;
    seen(ctx, id, row)
}

/// Gives a server these tags besides those that it has.
pub(super) async fn add_tags(tx: &mut Conn, server_id: &str, tags: &[String]) -> Result<(), ApiError> {
    for tag in tags {
        sqlx::query("INSERT INTO server_tags (server_id, tag) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(server_id)
            .bind(tag)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// Writes down what a user asked for.
pub(super) async fn record_action(
    tx: &mut Conn,
    ctx: &Ctx,
    server_id: &str,
    action: &str,
) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO server_actions (request_id, server_id, action, project_id, user_id, started_us)
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&ctx.request_id)
    .bind(server_id)
    .bind(action)
    .bind(ctx.require_project()?)
    .bind(&ctx.user_id)
    .bind(crate::db::now_us())
    .execute(&mut *tx)
    .await?;
    let project: String = sqlx::query_scalar("SELECT project_id FROM servers WHERE id = $1")
        .bind(server_id)
        .fetch_one(&mut *tx)
        .await?;
    let event = NewEvent {
        kind: "server.action",
        project_id: &project,
        by: Some(ctx),
        resource_id: server_id,
        payload: json!({ "action": action }),
    };
    events::note(tx, &event).await
}
