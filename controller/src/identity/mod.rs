//! Identity: Keystone v3.
//!
//! A request for a token ([`auth`]) names who asks (user and [`password`], or another token) and what for (a project, a
//! domain, or nothing). The answer is an encrypted statement ([`tokens`]) that only this cloud can read. Whenever a token
//! comes back, everything it says is checked against the database again ([`principal`]): user and project still enabled,
//! password not changed since, token not revoked, and the roles are those of now. So every revocation acts at once.
//!
//! What was found true is remembered as long as nothing in identity changes: a counter in the database grows with each
//! such change ([`changed`]), and each request compares it.
//!
//! Roles are given to users or groups, on projects, domains or the system, there or inherited by all projects below
//! ([`assignments`]); views in the database take that apart. `admin` anywhere is the cloud's administrator (only
//! administrators can grant it); `member` may change, `reader` only look, in the token's project. `admin` implies
//! `manager`, that `member`, that `reader`. Who may do what is one table ([`crate::policy`]).

pub mod application_credentials;
pub mod assignments;
pub mod auth;
pub mod bootstrap;
pub mod catalog;
pub mod credentials;
pub mod domains;
mod ec2;
mod endpoint_filter;
mod fields;
pub mod groups;
pub mod keys;
pub mod limits;
pub mod password;
pub mod principal;
pub mod projects;
mod resource;
pub mod roles;
pub mod tokens;
pub mod trusts;
pub mod users;
pub mod versions;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::Router;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    app::App,
    db::{self, Conn, Pools, Tx},
    http::error::ApiError,
};
use principal::Principal;
use tokens::{Claims, Unreadable};

/// Longest list that is answered; a longer one is cut and says `"truncated": true`, as Keystone's `list_limit`.
pub const MAX_LIST: i64 = 10_000;
/// Validated tokens that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// How often token keys are looked at.
const KEY_ROUND: Duration = Duration::from_secs(60);

/// Keys, password hashing, and what is remembered of tokens.
#[derive(Debug)]
pub struct Identity {
    /// Seals and opens tokens and credentials.
    pub keys: keys::Keys,
    /// Hashes passwords.
    pub passwords: password::Hasher,
    remembered: Mutex<Remembered>,
}

/// Validated tokens, true as long as the database's `identity_version` is the same.
#[derive(Debug, Default)]
struct Remembered {
    version: i64,
    principals: std::collections::HashMap<String, Arc<Principal>>,
    catalog: Option<Arc<catalog::Catalog>>,
}

impl Identity {
    /// Reads or makes the keys.
    ///
    /// # Errors
    /// Of the database.
    pub async fn open(pools: &Pools) -> Result<Self, ApiError> {
        Ok(Self {
            keys: keys::Keys::open(pools).await?,
            passwords: password::Hasher::new(),
            remembered: Mutex::default(),
        })
    }

    /// Makes new token keys in time; ends with the runtime.
    pub async fn rotate_keys(self: Arc<Self>, pools: Pools, token_lifetime: Duration) {
        loop {
            tokio::time::sleep(KEY_ROUND).await;
            if let Err(error) = self.keys.rotate(&pools, db::now_us(), token_lifetime).await {
                tracing::warn!(%error, "the token keys could not be looked at");
            }
        }
    }

    fn remembered(&self, token: &str, version: i64, now_us: i64) -> Option<Arc<Principal>> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let found = remembered.principals.get(token).filter(|_| remembered.version == version)?;
        let ends = |end: i64| end <= now_us;
        let over = ends(found.claims.expires_us)
            || found.restriction.as_ref().and_then(|restriction| restriction.expires_us).is_some_and(ends);
        (!over).then(|| found.clone())
    }

    /// What is remembered under this version; whatever was under another one is forgotten.
    fn at(&self, version: i64) -> std::sync::MutexGuard<'_, Remembered> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.version != version {
            *remembered = Remembered { version, ..Remembered::default() };
        }
        remembered
    }

    fn remember(&self, token: &str, principal: &Arc<Principal>) {
        let mut remembered = self.at(principal.version);
        if remembered.principals.len() >= MAX_REMEMBERED {
            remembered.principals.clear();
        }
        remembered.principals.insert(token.to_owned(), principal.clone());
    }
}

/// Begins a transaction that changes identity: tokens that were remembered before it is committed are looked at anew.
///
/// # Errors
/// As [`App::begin`].
pub async fn begin(app: &App) -> Result<Tx, ApiError> {
    let mut tx = app.begin().await?;
    changed(&mut tx).await?;
    Ok(tx)
}

/// Says that this transaction changes who may do what.
///
/// # Errors
/// Of the database.
pub async fn changed(conn: &mut Conn) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE identity_version SET version = version + 1").execute(conn).await.map(drop)
}

/// What a token says, if it is one of this cloud.
///
/// # Errors
/// 401.
async fn claims_of(app: &App, conn: &mut Conn, token: &str) -> Result<Claims, ApiError> {
    let keys = &app.identity.keys;
    match keys.tokens.open(token, db::now_us()) {
        Err(Unreadable::UnknownKey) if keys.refresh(conn).await? => keys.tokens.open(token, db::now_us()),
        opened => opened,
    }
    .map_err(|_| ApiError::Unauthorized)
}

/// The number that grows with each change of identity.
///
/// # Errors
/// Of the database.
async fn version(conn: &mut Conn) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT version FROM identity_version").fetch_one(conn).await
}

/// Who a token speaks for at this version (which the request has just read), if that is remembered.
fn principal_at(app: &App, token: &str, version: i64) -> Option<Arc<Principal>> {
    app.identity.remembered(token, version, db::now_us())
}

/// Who a token speaks for, now: one query if nothing in identity changed since this controller last saw the token.
///
/// # Errors
/// 401 if it is not valid.
pub async fn principal_of(app: &App, token: &str) -> Result<Arc<Principal>, ApiError> {
    let mut conn = app.db.acquire().await?;
    // Before the rest is read: if that is newer, the version is too old and the next use reads again.
    let version = version(&mut conn).await?;
    if let Some(principal) = app.identity.remembered(token, version, db::now_us()) {
        return Ok(principal);
    }
    let claims = claims_of(app, &mut conn, token).await?;
    let principal = principal::load(&mut conn, claims, version).await?.ok_or(ApiError::Unauthorized)?;
    let principal = Arc::new(principal);
    app.identity.remember(token, &principal);
    Ok(principal)
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
        .merge(groups::router())
        .merge(application_credentials::router())
        .merge(credentials::router())
        .merge(limits::router())
        .merge(ec2::router())
        .merge(trusts::router())
        .merge(endpoint_filter::router())
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
mod endpoint_filter_tests;
#[cfg(test)]
mod grant_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trust_tests;
