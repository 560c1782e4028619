//! addFixedIp, removeFixedIp: addresses of a server's ports, until microversion 2.43.

use std::net::IpAddr;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use super::{
    super::input::{self, Fields, invalid},
    ApiError, Asked, check_lock, row,
};
use crate::network::ports::server;

enum Change {
    /// One more address, on this network.
    Add(String),
    /// Without this address.
    Remove(String),
}

pub(super) async fn act(asked: &Asked<'_>) -> Result<Response, ApiError> {
    if asked.version.has(44) {
        let text = format!("API version does not have {}: change the port's fixed_ips instead.", asked.name);
        return Err(ApiError::NotFound(text));
    }
    let mut fields = Fields::open(json!({ asked.name: asked.argument }), asked.name, &[])?;
    let change = match asked.name {
        "addFixedIp" => Change::Add(fields.uuid("networkId")?.ok_or_else(|| input::required("networkId"))?),
        _ => Change::Remove(fields.string("address")?.ok_or_else(|| input::required("address"))?),
    };
    fields.finish()?;
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    check_lock(asked.ctx, &row)?;
    let touched = match change {
        Change::Add(network) => server::add_address(&mut tx, asked.ctx, &row.id, &network).await?,
        Change::Remove(text) => {
            let ip = text
                .parse::<IpAddr>()
                .map_err(|_| invalid("address", &text.into(), "is not an IP address"))?;
            server::remove_address(&mut tx, asked.ctx, &row.id, ip).await?
        }
    };
    row::record_action(&mut tx, asked.ctx, &row.id, asked.name).await?;
    tx.commit().await?;
    asked.app.hub.wake_all(touched);
    Ok(StatusCode::ACCEPTED.into_response())
}
