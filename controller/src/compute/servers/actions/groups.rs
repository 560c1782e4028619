//! addSecurityGroup, removeSecurityGroup: of all ports of a server.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use super::{
    super::input::{self, Fields},
    ApiError, Asked, check_lock, row,
};
use crate::network::ports::server;

pub(super) async fn act(asked: &Asked<'_>, join: bool) -> Result<Response, ApiError> {
    let mut fields = Fields::open(json!({ asked.name: asked.argument }), asked.name, &[])?;
    let group = fields.string("name")?.ok_or_else(|| input::required("name"))?;
    fields.finish()?;
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    check_lock(asked.ctx, &row)?;
    let touched = server::regroup(&mut tx, asked.ctx, &row.id, &group, join).await?;
    row::record_action(&mut tx, asked.ctx, &row.id, asked.name).await?;
    tx.commit().await?;
    asked.app.hub.wake_all(touched);
    Ok(StatusCode::ACCEPTED.into_response())
}
