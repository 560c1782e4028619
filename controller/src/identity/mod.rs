//! Identity: Keystone v3.
//!
//! A request for a token ([`auth`]) names who asks (user and [`password`], or another token) and what for (a project, a
//! domain, or nothing). The answer is an encrypted statement ([`tokens`]) that only this cloud can read. Whenever a token
//! comes back, everything it says is checked against the database again ([`principal`]): user and project still enabled,
//! password not changed since, token not revoked, and the roles are those of now. So every revocation acts at once.
//!
//! Roles are cloud-wide as in OpenStack without further policy: `admin` on any project or domain is the cloud's
//! administrator (only administrators can grant it); `member` may change, `reader` only look, in the token's project.
//! `admin` implies `manager`, that `member`, that `reader`.
//!
//! The catalog ([`catalog`]) is made from the configuration, not stored.

pub mod assignments;
pub mod auth;
pub mod bootstrap;
pub mod catalog;
pub mod domains;
mod fields;
pub mod keys;
pub mod password;
pub mod principal;
pub mod projects;
pub mod roles;
pub mod tokens;
pub mod users;
pub mod versions;

use std::path::Path;

use axum::Router;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

pub use keys::KeyError;

/// Longest list that is answered; a longer one is cut and says `"truncated": true`, as Keystone's `list_limit`.
pub const MAX_LIST: i64 = 10_000;

/// Keys and password hashing.
#[derive(Debug)]
pub struct Identity {
    /// Seals and opens tokens.
    pub tokens: tokens::Sealer,
    /// Hashes passwords.
    pub passwords: password::Hasher,
}

impl Identity {
    /// Opens or creates the keys.
    ///
    /// # Errors
    /// If they can't be read or written.
    pub fn open(state_dir: &Path) -> Result<Self, KeyError> {
        let key = keys::open(&state_dir.join("token.key"))?;
        Ok(Self { tokens: tokens::Sealer::new(&key), passwords: password::Hasher::new() })
    }
}

/// Who a token speaks for, now.
///
/// # Errors
/// 401 if it is not valid.
pub async fn validate(app: &App, token: &str) -> Result<Ctx, ApiError> {
    let claims = app.identity.tokens.open(token, crate::db::now_us()).ok_or(ApiError::Unauthorized)?;
    let mut conn = app.db.acquire().await?;
    let principal = principal::load(&mut conn, claims).await?.ok_or(ApiError::Unauthorized)?;
    Ok(principal.into_ctx())
}

/// Routes below `/identity`.
pub fn router() -> Router<App> {
    Router::new()
        .merge(versions::router())
        .merge(auth::router())
        .merge(catalog::router())
        .merge(domains::router())
        .merge(projects::router())
        .merge(users::router())
        .merge(roles::router())
        .merge(assignments::router())
}

/// A new id, 32 hex digits.
pub fn new_id() -> String {
    Uuid::new_v4().simple().to_string()
}

fn not_found(what: &str, id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::NotFound(format!("Could not find {what}: {id}."))
}

/// `{"<plural>": […], "links": …}`, cut at [`MAX_LIST`] (the query asks for one row more).
fn list(app: &App, plural: &str, path: &str, mut items: Vec<Value>) -> Value {
    let limit = usize::try_from(MAX_LIST).unwrap_or(usize::MAX);
    let truncated = items.len() > limit;
    items.truncate(limit);
    let url = format!("{}/identity{path}", app.config.public_url);
    let mut body = json!({"links": {"self": url, "previous": null, "next": null}});
    body[plural] = Value::Array(items);
    if truncated {
        body["truncated"] = Value::Bool(true);
    }
    body
}

#[cfg(test)]
mod tests;
