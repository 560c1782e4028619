//! os-start, os-stop, reboot, pause, unpause, suspend, resume.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use mote_host_api::DesiredPower;
use serde_json::Value;

use super::{super::super::state::power_word, Act, ApiError, Asked, Rule, TaskState, VmState, invalid};

/// A change of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Power {
    rule: Rule,
    task: TaskState,
    desired: DesiredPower,
    /// The VMM is started anew.
    run: bool,
}

const START: Power = Power {
    rule: Rule::new("start", &[VmState::Stopped]),
    task: TaskState::PoweringOn,
    desired: DesiredPower::Running,
    run: true,
};
const STOP: Power = Power {
    rule: Rule::new("stop", &[VmState::Active, VmState::Error]),
    task: TaskState::PoweringOff,
    desired: DesiredPower::Stopped,
    run: false,
};
const SOFT_REBOOT: Power = Power {
    rule: Rule::new("reboot", &[VmState::Active]),
    task: TaskState::Rebooting,
    desired: DesiredPower::Running,
    run: true,
};
const HARD_REBOOT: Power = Power {
    rule: Rule {
        name: "reboot",
        from: &[VmState::Active, VmState::Stopped, VmState::Paused, VmState::Suspended, VmState::Error],
        any_task: true,
    },
    task: TaskState::RebootingHard,
    desired: DesiredPower::Running,
    run: true,
};
const PAUSE: Power = Power {
    rule: Rule::new("pause", &[VmState::Active]),
    task: TaskState::Pausing,
    desired: DesiredPower::Paused,
    run: false,
};
const UNPAUSE: Power = Power {
    rule: Rule::new("unpause", &[VmState::Paused]),
    task: TaskState::Unpausing,
    desired: DesiredPower::Running,
    run: false,
};

const SUSPEND: Power = Power {
    rule: Rule::new("suspend", &[VmState::Active]),
    task: TaskState::Suspending,
    desired: DesiredPower::Suspended,
    run: false,
};
const RESUME: Power = Power {
    rule: Rule::new("resume", &[VmState::Suspended]),
    task: TaskState::Resuming,
    desired: DesiredPower::Running,
    run: false,
};

pub(super) async fn act(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let power = match asked.name {
        "os-start" => START,
        "os-stop" => STOP,
        "pause" => PAUSE,
        "unpause" => UNPAUSE,
        "suspend" => SUSPEND,
        "resume" => RESUME,
        _ => reboot(asked.argument)?,
    };
    if asked.name != "reboot" {
        asked.nothing()?;
    }
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &power.rule).await?;
    sqlx::query("UPDATE servers SET desired_power = $2, run_generation = run_generation + $3 WHERE id = $1")
        .bind(&act.row.id)
        .bind(power_word(power.desired))
        .bind(i64::from(power.run))
        .execute(&mut *act.tx)
        .await?;
    act.finish(asked.app, asked.ctx, &power.rule, Some(power.task)).await?;
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
