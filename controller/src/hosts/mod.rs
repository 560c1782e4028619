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
//! | `GET /serial-console?token=` | whoever has the URL | a WebSocket ([`serial`]) |
//! | `POST /hosts`, `/hosts/{id}/{desired, observed, images, captures, requests}` | hosts | see `mote_host_api` |
//!
//! Desired state is never stored as such: [`desired`] computes it from the rows, and a change of those bumps the host's
//! generation in the same transaction ([`touch`]). [`observed`] is where reports move servers.

use crate::db::{Conn, Db};
use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{get, post, put},
};
use mote_host_api::HostId;
use sqlx::QueryBuilder;

use crate::{app::App, http::error::ApiError};

mod admin;
mod captures;
mod console;
mod deleted;
mod desired;
#[cfg(test)]
pub(crate) mod fake;
mod given_up;
mod hub;
mod inventory;
mod join;
mod nics;
mod observed;
mod protocol;
mod secrets;
pub(crate) mod serial;
mod share;
#[cfg(test)]
mod tests;
mod traffic;
mod zones;

pub(crate) use admin::remove;
pub(crate) use console::ask;
pub(crate) use deleted::kept_since;
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
        .route("/serial-console", get(serial::open))
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

/// Hosts of one statement of [`touch_all`].
const TOUCHED_AT_ONCE: usize = 32;

/// [`touch`] for hosts that hear of a change, with few statements however many they are.
pub(crate) async fn touch_all<'a>(
    tx: &mut Conn,
    hosts: impl IntoIterator<Item = &'a String>,
) -> Result<Vec<Touched>, ApiError> {
    let hosts: Vec<&String> = hosts.into_iter().collect();
    let mut touched = Vec::with_capacity(hosts.len());
    for some in hosts.chunks(TOUCHED_AT_ONCE) {
        // Always the same text, so that it is prepared once: what is left over is filled up with the last.
        let last = some.last().map(|last| last.as_str()).unwrap_or_default();
        let ids = some.iter().map(|id| id.as_str()).chain(std::iter::repeat(last)).take(TOUCHED_AT_ONCE);
        let mut query = QueryBuilder::<Db>::new("UPDATE hosts SET generation = generation + 1 WHERE id IN (");
        let mut list = query.separated(", ");
        for id in ids {
            list.push_bind(id.to_owned());
        }
        query.push(")");
        query.build().execute(&mut *tx).await?;
        for id in some {
            touched.push(Touched(id.parse().map_err(ApiError::internal)?));
        }
    }
    Ok(touched)
}
