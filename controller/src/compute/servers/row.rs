//! Rows of servers.

use crate::db::{Conn, Db};
use std::collections::BTreeMap;

use sqlx::{FromRow, QueryBuilder};

use super::super::state::{TaskState, VmState, status};
use crate::http::{context::Ctx, error::ApiError};

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
    metadata: String,
    pub(super) availability_zone: String,
    pub(super) host_id: Option<String>,
    pub(super) host_name: Option<String>,
    pub(super) deleting: bool,
    vm_state: String,
    task_state: Option<String>,
    pub(super) fault_code: Option<i64>,
    pub(super) fault_message: Option<String>,
    pub(super) fault_us: Option<i64>,
    pub(super) created_us: i64,
    pub(super) updated_us: i64,
    pub(super) launched_us: Option<i64>,
}

/// What [`ServerRow`] is read from.
pub(super) const SELECT: &str = "SELECT servers.id, servers.project_id, servers.user_id, servers.name,
        servers.flavor_id, servers.image_id, servers.key_name, servers.metadata,
        servers.availability_zone, servers.host_id, hosts.name AS host_name, servers.deleting,
        servers.vm_state, servers.task_state, servers.fault_code, servers.fault_message, servers.fault_us,
        servers.created_us, servers.updated_us, servers.launched_us
    FROM servers LEFT JOIN hosts ON hosts.id = servers.host_id ";

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
    let project = ctx.require_project()?;
    let mut query = QueryBuilder::<Db>::new(SELECT);
    query.push(" WHERE servers.id = ").push_bind(id.to_owned());
    let row: Option<ServerRow> = query.build_query_as().fetch_optional(db).await?;
    row.filter(|row| ctx.is_admin || row.project_id == project).ok_or_else(|| {
        let id: String = id.chars().take(MAX_SHOWN_ID).collect();
        ApiError::NotFound(format!("Instance {id} could not be found."))
    })
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
    .execute(tx)
    .await?;
    Ok(())
}
