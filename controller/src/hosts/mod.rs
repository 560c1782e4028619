//! Hosts: the protocol that they speak (`mote_host_api`) and Mote's own API, below `/mote/v1`.

use axum::Router;
use mote_host_api::HostId;
use sqlx::SqliteConnection;

use crate::{app::App, http::error::ApiError};

mod hub;
mod inventory;

pub use hub::Hub;
pub(crate) use hub::Touched;
pub(crate) use inventory::{is_up, policy, views};

/// The routes.
pub fn router() -> Router<App> {
    Router::new()
}

/// Bumps the generation of a host's desired state; to be called in the transaction that changes it. Returns the new
/// generation, too.
pub(crate) async fn touch(tx: &mut SqliteConnection, host_id: &str) -> Result<(Touched, i64), ApiError> {
    let generation: i64 =
        sqlx::query_scalar("UPDATE hosts SET generation = generation + 1 WHERE id = $1 RETURNING generation")
            .bind(host_id)
            .fetch_one(tx)
            .await?;
    let id: HostId = host_id.parse().map_err(ApiError::internal)?;
    Ok((Touched(id), generation))
}
