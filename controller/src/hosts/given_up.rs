//! What a host could not do for a server and has given up: the wish is taken back, and whoever asked for it can read why.

use mote_host_api::{DesiredPower, GivenUp, Wish};
use serde_json::json;

use super::{Touched, captures, touch};
use crate::{
    compute::state::{TaskState, power_word},
    db::{Conn, now_us},
    events::{self, NewEvent},
    http::error::ApiError,
};

/// Longest stored reason in characters.
const MAX_REASON: usize = 1024;
/// Actions that want a copy of the root disk.
const COPYING: [&str; 3] = ["createImage", "createBackup", "shelve"];

/// Takes back what `host` has given up for a server, as far as it is still wanted. `applied` is the newest generation that
/// the host had seen when it said so.
pub(super) async fn take(
    tx: &mut Conn,
    host: &str,
    server_id: &str,
    applied: i64,
    given_up: &GivenUp,
) -> Result<Option<Touched>, ApiError> {
    let reason: String = given_up.message.chars().take(MAX_REASON).collect();
    let (touched, actions, text) = match given_up.wish {
        Wish::Suspend => {
            let touched = take_suspend(tx, host, server_id, applied).await?;
            (touched, &["suspend"][..], format!("The server could not be suspended and goes on: {reason}"))
        }
        Wish::Capture(image) => {
            let touched = captures::finish(tx, host, &image.to_string(), false).await?;
            (touched, &COPYING[..], format!("The server's disk could not be copied: {reason}"))
        }
    };
    if touched.is_some() {
        tracing::warn!(server_id, "{text}");
        fail_action(tx, server_id, actions, &text).await?;
    }
    Ok(touched)
}

/// The server shall run, as it does.
async fn take_suspend(
    tx: &mut Conn,
    host: &str,
    server_id: &str,
    applied: i64,
) -> Result<Option<Touched>, ApiError> {
    let still: Option<i64> = sqlx::query_scalar(
        "SELECT 1 FROM servers WHERE id = $1 AND host_id = $2 AND desired_power = $3 AND task_state = $4
             AND changed_generation <= $5 AND NOT deleting",
    )
    .bind(server_id)
    .bind(host)
    .bind(power_word(DesiredPower::Suspended))
    .bind(TaskState::Suspending.word())
    .bind(applied)
    .fetch_optional(&mut *tx)
    .await?;
    if still.is_none() {
        return Ok(None);
    }
    let (touched, generation) = touch(tx, host).await?;
    sqlx::query(
        "UPDATE servers SET desired_power = $2, task_state = NULL, changed_generation = $3, updated_us = $4
         WHERE id = $1",
    )
    .bind(server_id)
    .bind(power_word(DesiredPower::Running))
    .bind(generation)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(Some(touched))
}

/// Writes down how the newest of such actions ended.
async fn fail_action(tx: &mut Conn, server_id: &str, actions: &[&str], text: &str) -> Result<(), ApiError> {
    let rows: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT request_id, action, project_id FROM server_actions WHERE server_id = $1 AND error IS NULL
         ORDER BY started_us DESC, request_id",
    )
    .bind(server_id)
    .fetch_all(&mut *tx)
    .await?;
    let newest = rows.into_iter().find(|(_, action, _)| actions.contains(&action.as_str()));
    let Some((request, action, project)) = newest else { return Ok(()) };
    sqlx::query(
        "UPDATE server_actions SET error = $4, finished_us = $5
         WHERE server_id = $1 AND request_id = $2 AND action = $3",
    )
    .bind(server_id)
    .bind(request)
    .bind(&action)
    .bind(text)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    let event = NewEvent {
        kind: "server.action_failed",
        project_id: &project,
        by: None,
        resource_id: server_id,
        payload: json!({ "action": action, "reason": text }),
    };
    events::note(tx, &event).await
}
