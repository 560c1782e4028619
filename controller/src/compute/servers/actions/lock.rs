//! lock, unlock, os-resetState: what is the controller's alone.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::Value;

use super::{ApiError, Asked, Ctx, ServerRow, VmState, invalid, now_us, row};

/// Longest reason, as in Nova.
const MAX_REASON: usize = 255;

/// A locked server is changed by administrators only.
pub(in super::super) fn check(ctx: &Ctx, row: &ServerRow) -> Result<(), ApiError> {
    match row.locked_by.is_some() && !ctx.is_admin {
        true => Err(ApiError::Conflict(format!("Instance {} is locked", row.id))),
        false => Ok(()),
    }
}

fn reason(asked: &Asked<'_>) -> Result<Option<String>, ApiError> {
    if !asked.version.has(73) || asked.argument.is_null() {
        return asked.nothing().map(|()| None);
    }
    let text = asked.argument.get("locked_reason").and_then(Value::as_str);
    let alone = asked.argument.as_object().is_some_and(|fields| fields.len() == 1);
    match text.filter(|text| alone && !text.is_empty() && text.chars().count() <= MAX_REASON) {
        Some(text) => Ok(Some(text.to_owned())),
        None if asked.argument.as_object().is_some_and(serde_json::Map::is_empty) => Ok(None),
        None => Err(invalid("lock", asked.argument, "is not {\"locked_reason\": \"1 to 255 characters\"}")),
    }
}

pub(super) async fn lock(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let reason = reason(asked)?;
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    let own = asked.ctx.project_id.as_deref() == Some(row.project_id.as_str());
    // An owner's lock does not weaken that of an administrator.
    let by = match row.locked_by.as_deref() {
        Some("admin") => "admin",
        _ if own => "owner",
        _ => "admin",
    };
    write(&mut tx, &row.id, Some(by), reason.as_deref()).await?;
    row::record_action(&mut tx, asked.ctx, &row.id, "lock").await?;
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

pub(super) async fn unlock(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    if row.locked_by.as_deref() == Some("admin") && !asked.ctx.is_admin {
        return Err(ApiError::Forbidden(
            "Policy does not allow this: an administrator has locked the server.".into(),
        ));
    }
    write(&mut tx, &row.id, None, None).await?;
    row::record_action(&mut tx, asked.ctx, &row.id, "unlock").await?;
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

async fn write(
    tx: &mut crate::db::Conn,
    id: &str,
    by: Option<&str>,
    reason: Option<&str>,
) -> Result<(), ApiError> {
    sqlx::query("UPDATE servers SET locked_by = $2, locked_reason = $3, updated_us = $4 WHERE id = $1")
        .bind(id)
        .bind(by)
        .bind(reason)
        .bind(now_us())
        .execute(tx)
        .await?;
    Ok(())
}

/// An administrator says that a server is in another state than is shown. The next report of its host has the last word.
pub(super) async fn reset_state(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.ctx.require_admin()?;
    let alone = asked.argument.as_object().is_some_and(|fields| fields.len() == 1);
    let state = match asked.argument.get("state").and_then(Value::as_str) {
        Some("active") if alone => VmState::Active,
        Some("error") if alone => VmState::Error,
        _ => {
            return Err(invalid(
                "os-resetState",
                asked.argument,
                "is not {\"state\": \"active\"} or \"error\"",
            ));
        }
    };
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    sqlx::query(
        "UPDATE servers SET vm_state = $2, task_state = NULL, updated_us = $3 WHERE id = $1 AND NOT deleting",
    )
    .bind(&row.id)
    .bind(state.word())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    row::record_action(&mut tx, asked.ctx, &row.id, "resetState").await?;
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED.into_response())
}
