//! `POST /servers/{id}/action`.
//!
//! A soft reboot is carried out as a hard one: Mote's machines have no power button that a guest could be asked by.

use std::time::Duration;

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use mote_host_api::{HostReply, HostRequestKind};
use serde_json::{Value, json};

use super::{
    super::state::{TaskState, VmState},
    input::{invalid, number},
    row::{self, ServerRow},
};
use crate::{
    app::App,
    db::now_us,
    hosts,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// A change of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Power {
    /// Nova's name of the action, for messages and the record.
    name: &'static str,
    /// States in which it is possible.
    from: &'static [VmState],
    /// Also while something else is going on.
    any_task: bool,
    task: TaskState,
    desired: &'static str,
    /// The VMM is started anew.
    run: bool,
}

const START: Power = Power {
    name: "start",
    from: &[VmState::Stopped],
    any_task: false,
    task: TaskState::PoweringOn,
    desired: "running",
    run: true,
};
const STOP: Power = Power {
    name: "stop",
    from: &[VmState::Active, VmState::Error],
    any_task: false,
    task: TaskState::PoweringOff,
    desired: "stopped",
    run: false,
};
const SOFT_REBOOT: Power = Power {
    name: "reboot",
    from: &[VmState::Active],
    any_task: false,
    task: TaskState::Rebooting,
    desired: "running",
    run: true,
};
const HARD_REBOOT: Power = Power {
    name: "reboot",
    from: &[VmState::Active, VmState::Stopped, VmState::Error],
    any_task: true,
    task: TaskState::RebootingHard,
    desired: "running",
    run: true,
};

/// The handler.
pub(super) async fn act(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Response, ApiError> {
    ctx.require_writer()?;
    let (name, argument) = match body {
        Value::Object(body) if body.len() == 1 => body.into_iter().next(),
        _ => None,
    }
    .ok_or_else(|| ApiError::BadRequest("The body must be an object with one action.".into()))?;
    let power = match name.as_str() {
        "os-start" => START,
        "os-stop" => STOP,
        "reboot" => reboot(&argument)?,
        "os-getConsoleOutput" => return console(&app, &ctx, &id, &argument).await,
        _ => {
            let name: String = name.chars().take(64).collect();
            return Err(ApiError::BadRequest(format!("There is no such action: {name}")));
        }
    };
    if power != SOFT_REBOOT && power != HARD_REBOOT && !(argument.is_null() || argument == json!({})) {
        return Err(invalid(&name, &argument, "is not null"));
    }
    change_power(&app, &ctx, &id, power).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

fn reboot(argument: &Value) -> Result<Power, ApiError> {
    let kind = argument.get("type").and_then(Value::as_str).unwrap_or_default();
    let alone = argument.as_object().is_some_and(|fields| fields.len() == 1);
    match kind.to_ascii_uppercase().as_str() {
        "SOFT" if alone => Ok(SOFT_REBOOT),
        "HARD" if alone => Ok(HARD_REBOOT),
        _ => Err(invalid("reboot", argument, "is not {\"type\": \"SOFT\"} or {\"type\": \"HARD\"}")),
    }
}

fn check(power: Power, row: &ServerRow) -> Result<(), ApiError> {
    let refused = |kind: &str, state: &str| {
        let text = format!("Cannot '{}' instance {} while it is in {kind} {state}", power.name, row.id);
        Err(ApiError::Conflict(text))
    };
    if row.deleting {
        return refused("task_state", TaskState::Deleting.word());
    }
    if !power.from.contains(&row.vm_state()) {
        return refused("vm_state", row.vm_state().word());
    }
    match row.task_state() {
        Some(task) if !power.any_task => refused("task_state", task.word()),
        _ => Ok(()),
    }
}

async fn change_power(app: &App, ctx: &Ctx, id: &str, power: Power) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let row = row::visible(&mut tx, ctx, id).await?;
    check(power, &row)?;
    let Some(host) = &row.host_id else {
        return Err(ApiError::Conflict(format!("Instance {id} has no host: it was never placed on one.")));
    };
    let (touched, generation) = hosts::touch(&mut tx, host).await?;
    sqlx::query(
        "UPDATE servers SET desired_power = $2, run_generation = run_generation + $3, changed_generation = $4,
             task_state = $5, updated_us = $6 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(power.desired)
    .bind(i64::from(power.run))
    .bind(generation)
    .bind(power.task.word())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    row::record_action(&mut tx, ctx, &row.id, power.name).await?;
    tx.commit().await?;
    app.hub.wake(touched);
    Ok(())
}

/// `length` of os-getConsoleOutput: a number, also as text; -1 or nothing is all.
fn lines(argument: &Value) -> Result<Option<u32>, ApiError> {
    let Value::Object(fields) = argument else {
        return Err(invalid("os-getConsoleOutput", argument, "is not an object"));
    };
    if let Some(unknown) = fields.keys().find(|name| *name != "length") {
        return Err(invalid("os-getConsoleOutput", &unknown.as_str().into(), "was unexpected"));
    }
    match fields.get("length") {
        None | Some(Value::Null) => Ok(None),
        Some(all) if *all == -1 || *all == "-1" => Ok(None),
        Some(value) => match number(value) {
            Some(lines) => Ok(Some(u32::try_from(lines).unwrap_or(u32::MAX))),
            None => Err(invalid("length", value, "is not a number of lines")),
        },
    }
}

async fn console(app: &App, ctx: &Ctx, id: &str, argument: &Value) -> Result<Response, ApiError> {
    let lines = lines(argument)?;
    let mut db = app.db.acquire().await?;
    let row = row::visible(&mut db, ctx, id).await?;
    drop(db);
    if row.host_id.is_none() || row.vm_state() == VmState::Building {
        return Err(ApiError::Conflict(format!("Instance {id} is not ready")));
    }
    let kind =
        HostRequestKind::ConsoleOutput { server_id: row.id.parse().map_err(ApiError::internal)?, lines };
    match hosts::ask(app, ctx, &row.id, kind, Duration::ZERO).await? {
        HostReply::ConsoleOutput { output } => Ok(Json(json!({ "output": output })).into_response()),
        _ => Err(ApiError::internal("a host answered a question that was not asked")),
    }
}
