//! Hosts: the protocol that they speak (`mote_host_api`) and Mote's own API, below `/mote/v1`.
//!
//! | Call | By | |
//! |---|---|---|
//! | `POST /join-tokens` `{description?, uses?, lifetime_s?}` | admin | → 201 `{token, expires_at}` |
//! | `GET /hosts` | admin | → `{hosts: [{id, name, availability_zone, state, enabled, inventory, usage}]}` |
//! | `GET`, `PUT`, `DELETE /hosts/{id}` | admin | show, `{enabled, disabled_reason?}`, delete one without servers |
//! | `GET /metering/ports` | admin | what ports have carried ([`traffic`]) |
//! | `GET`, `PUT /scheduler` | admin | `{policy}` |
//! | `GET /servers/{id}/console?offset=&wait_ms=` | project | → `{next_offset, data}`, data in base64 |
//! | `POST /servers/{id}/console` `{data}` | project | → 204 |
//! | `POST /hosts`, `/hosts/{id}/{desired, observed, images, captures, requests}` | hosts | see `mote_host_api` |
//!
//! Desired state is never stored as such: [`desired`] computes it from the rows, and a change of those bumps the host's
//! generation in the same transaction ([`touch`]). [`observed`] is where reports move servers.

use crate::db::Conn;
use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{get, post, put},
};
use mote_host_api::HostId;

use crate::{app::App, http::error::ApiError};

mod admin;
mod captures;
mod console;
mod desired;
#[cfg(test)]
pub(crate) mod fake;
mod hub;
mod inventory;
mod join;
mod observed;
mod protocol;
mod secrets;
mod share;
#[cfg(test)]
mod tests;
mod traffic;
mod zones;

pub(crate) use admin::remove;
pub(crate) use console::ask;
pub use hub::Hub;
pub(crate) use hub::{AskError, Touched};
pub(crate) use inventory::{is_up, policy, views};
pub(crate) use observed::{digests, finish_deletion};
pub use secrets::{DEFAULT_TOKEN_LIFETIME, JoinToken, TokenWish, make_join_token};
pub use share::share;
pub(crate) use zones::{ZONE_KEY, settle_zones};

/// Largest report or answer of a host: thousands of servers, or a console log of which every byte is escaped.
const MAX_HOST_BODY_BYTES: usize = 8 << 20;

/// The routes.
pub fn router() -> Router<App> {
    let large = DefaultBodyLimit::max(MAX_HOST_BODY_BYTES);
    Router::new()
        .route("/join-tokens", post(admin::create_token))
        .route("/hosts", get(admin::list).post(join::join))
        .route("/hosts/{id}", get(admin::show).put(admin::update).delete(admin::delete))
        .route("/hosts/{id}/desired", get(desired::poll))
        .route("/hosts/{id}/observed", put(observed::report).layer(large))
        .route("/hosts/{id}/images/{sha256}", get(protocol::image))
        .route("/hosts/{id}/captures/{image_id}", put(captures::receive).layer(DefaultBodyLimit::disable()))
        .route("/hosts/{id}/requests", get(protocol::requests))
        .route("/hosts/{id}/requests/{request_id}", post(protocol::reply).layer(large))
        .route("/metering/ports", get(traffic::list))
        .route("/scheduler", get(admin::policy).put(admin::set_policy))
        .route("/servers/{id}/console", get(console::read).post(console::write))
        .merge(crate::events::routes())
}

/// Bumps the generation of a host's desired state; to be called in the transaction that changes it. Returns the new
/// generation, too.
pub(crate) async fn touch(tx: &mut Conn, host_id: &str) -> Result<(Touched, i64), ApiError> {
    let generation: i64 =
        sqlx::query_scalar("UPDATE hosts SET generation = generation + 1 WHERE id = $1 RETURNING generation")
            .bind(host_id)
            .fetch_one(tx)
            .await?;
    let id: HostId = host_id.parse().map_err(ApiError::internal)?;
    Ok((Touched(id), generation))
}
