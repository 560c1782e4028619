//! `POST /servers/{id}/action`.
//!
//! What is possible in which state is the table of [`super::super::state`]; [`Rule`] is a row of it. An action changes what
//! is wanted, in one transaction with the host's generation and the record of the action; the rest is the host's.
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
    super::{
        state::{TaskState, VmState},
        versions::Version,
    },
    consoles,
    input::{invalid, number},
    row::{self, ServerRow},
};
use crate::{
    app::App,
    db::{Conn, now_us},
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

mod addresses;
mod disks;
mod groups;
mod lock;
mod power;
mod resize;
mod shelve;

pub(super) use lock::check as check_lock;
pub(super) use shelve::remove_image;

/// Nova's actions that need what is not there, and what that is.
const ABSENT: [(&str, &str); 9] = [
    ("migrate", "servers stay on their host; shelve and unshelve moves one"),
    ("os-migrateLive", "servers stay on their host; shelve and unshelve moves one"),
    ("evacuate", "servers stay on their host"),
    ("trigger_crash_dump", "the VM monitor can't raise an NMI"),
    ("resetNetwork", "there is no agent in the guest"),
    ("injectNetworkInfo", "there is no agent in the guest"),
    ("os-getVNCConsole", "servers have a serial console only"),
    ("os-getSPICEConsole", "servers have a serial console only"),
    ("os-getRDPConsole", "servers have a serial console only"),
];

/// In which states an action is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    /// Nova's name of the action, for messages and the record.
    name: &'static str,
    /// States in which it is possible.
    from: &'static [VmState],
    /// Also while something else is going on.
    any_task: bool,
}

impl Rule {
    const fn new(name: &'static str, from: &'static [VmState]) -> Self {
        Self { name, from, any_task: false }
    }

    fn check(&self, row: &ServerRow) -> Result<(), ApiError> {
        let refused = |kind: &str, state: &str| {
            let text = format!("Cannot '{}' instance {} while it is in {kind} {state}", self.name, row.id);
            Err(ApiError::Conflict(text))
        };
        if row.deleting {
            return refused("task_state", TaskState::Deleting.word());
        }
        if !self.from.contains(&row.vm_state()) {
            return refused("vm_state", row.vm_state().word());
        }
        match row.task_state() {
            Some(task) if !self.any_task => refused("task_state", task.word()),
            _ => Ok(()),
        }
    }
}

const RESTORE: Rule = Rule::new("restore", &[]);

/// An action that is being carried out: the transaction, the server as it is, and its host.
struct Act {
    tx: crate::db::Tx,
    row: ServerRow,
    host: String,
}

impl Act {
    /// The server, if the asker may do this to it now.
    async fn begin(app: &App, ctx: &Ctx, id: &str, rule: &Rule) -> Result<Self, ApiError> {
        let mut tx = app.begin().await?;
        let row = row::visible(&mut tx, ctx, id).await?;
        check_lock(ctx, &row)?;
        rule.check(&row)?;
        let host = row.host_id.clone().ok_or_else(|| {
            ApiError::Conflict(format!("Instance {id} has no host: it was never placed on one."))
        })?;
        Ok(Self { tx, row, host })
    }

    /// Bumps the host's generation, writes down task and action, commits and wakes the host.
    async fn finish(
        mut self,
        app: &App,
        ctx: &Ctx,
        rule: &Rule,
        task: Option<TaskState>,
    ) -> Result<(), ApiError> {
        let touched = note(&mut self.tx, ctx, &self.row, &self.host, rule, task).await?;
        self.tx.commit().await?;
        app.hub.wake(touched);
        Ok(())
    }
}

async fn note(
    tx: &mut Conn,
    ctx: &Ctx,
    row: &ServerRow,
    host: &str,
    rule: &Rule,
    task: Option<TaskState>,
) -> Result<Touched, ApiError> {
    let (touched, generation) = hosts::touch(tx, host).await?;
    sqlx::query("UPDATE servers SET changed_generation = $2, task_state = $3, updated_us = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(generation)
        .bind(task.map(TaskState::word))
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    row::record_action(tx, ctx, &row.id, rule.name).await?;
    Ok(touched)
}

/// What a request asks for.
pub(super) struct Asked<'a> {
    pub(super) app: &'a App,
    pub(super) ctx: &'a Ctx,
    pub(super) version: Version,
    pub(super) id: &'a str,
    /// The action's name and what is said with it.
    pub(super) name: &'a str,
    pub(super) argument: &'a Value,
}

impl Asked<'_> {
    /// Actions without an argument.
    fn nothing(&self) -> Result<(), ApiError> {
        match self.argument.is_null() || *self.argument == json!({}) {
            true => Ok(()),
            false => Err(invalid(self.name, self.argument, "is not null")),
        }
    }
}

/// The handler.
pub(super) async fn act(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Response, ApiError> {
    ctx.require_writer()?;
    let (name, argument) = match body {
        Value::Object(body) if body.len() == 1 => body.into_iter().next(),
        _ => None,
    }
    .ok_or_else(|| ApiError::BadRequest("The body must be an object with one action.".into()))?;
    let asked = Asked { app: &app, ctx: &ctx, version, id: &id, name: &name, argument: &argument };
    match name.as_str() {
        "os-start" | "os-stop" | "reboot" | "pause" | "unpause" | "suspend" | "resume" => {
            power::act(&asked).await
        }
        "lock" => lock::lock(&asked).await,
        "unlock" => lock::unlock(&asked).await,
        "rebuild" => disks::rebuild(&asked).await,
        "rescue" => disks::rescue(&asked).await,
        "unrescue" => disks::unrescue(&asked).await,
        "createImage" => shelve::create_image(&asked).await,
        "createBackup" => shelve::create_backup(&asked).await,
        "shelve" => shelve::shelve(&asked).await,
        "shelveOffload" => shelve::offload(&asked).await,
        "unshelve" => shelve::unshelve(&asked).await,
        "resize" => resize::resize(&asked).await,
        "confirmResize" => resize::confirm(&asked).await,
        "revertResize" => resize::revert(&asked).await,
        "restore" => restore(&asked).await,
        "forceDelete" => force_delete(&asked).await,
        "changePassword" => change_password(&asked).await,
        "addSecurityGroup" => groups::act(&asked, true).await,
        "removeSecurityGroup" => groups::act(&asked, false).await,
        "addFixedIp" | "removeFixedIp" => addresses::act(&asked).await,
        "os-resetState" => lock::reset_state(&asked).await,
        "os-getConsoleOutput" => console(&asked).await,
        "os-getSerialConsole" => consoles::get_serial(&asked).await,
        _ => {
            // What isn't there to be acted upon comes first, as everywhere.
            row::visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
            Err(unknown(&name))
        }
    }
}

fn unknown(name: &str) -> ApiError {
    match ABSENT.iter().find(|(absent, _)| *absent == name) {
        Some((_, why)) => ApiError::NotImplemented(format!("The action {name} is not there: {why}.")),
        None => {
            let name: String = name.chars().take(64).collect();
            ApiError::BadRequest(format!("There is no such action: {name}"))
        }
    }
}

async fn force_delete(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    super::remove(asked.app, asked.ctx, asked.id).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// A server is never deleted softly, as by Nova's default: there is none that could be restored.
async fn restore(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    Act::begin(asked.app, asked.ctx, asked.id, &RESTORE).await?;
    Err(ApiError::internal("an action passed that no state allows"))
}

/// Nobody in the guest could be told a password.
async fn change_password(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let password = asked.argument.get("adminPass").and_then(Value::as_str);
    if password.is_none() || asked.argument.as_object().is_none_or(|fields| fields.len() != 1) {
        return Err(invalid("changePassword", &json!("…"), "is not {\"adminPass\": \"…\"}"));
    }
    let row = row::visible(&mut *asked.app.db.acquire().await?, asked.ctx, asked.id).await?;
    Rule::new("changePassword", &[VmState::Active]).check(&row)?;
    Err(ApiError::NotImplemented(
        "Unable to set password on instance: there is no agent in the guest.".into(),
    ))
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

async fn console(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let lines = lines(asked.argument)?;
    let mut db = asked.app.db.acquire().await?;
    let row = row::visible(&mut db, asked.ctx, asked.id).await?;
    drop(db);
    if row.host_id.is_none() || row.vm_state() == VmState::Building {
        return Err(ApiError::Conflict(format!("Instance {} is not ready", row.id)));
    }
    let kind =
        HostRequestKind::ConsoleOutput { server_id: row.id.parse().map_err(ApiError::internal)?, lines };
    match hosts::ask(asked.app, asked.ctx, &row.id, kind, Duration::ZERO).await? {
        HostReply::ConsoleOutput { mut output } => {
            // So many lines, and not an empty one after them.
            if lines.is_some() && output.ends_with('\n') {
                output.pop();
            }
            Ok(Json(json!({ "output": output })).into_response())
        }
        _ => Err(ApiError::internal("a host answered a question that was not asked")),
    }
}
