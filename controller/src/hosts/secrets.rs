//! Join tokens and hosts' secrets: random, and only their hashes are stored.

use crate::db::Conn;
use std::time::Duration;

use axum::extract::{FromRequestParts, Path};
use http::{header, request::Parts};
use mote_host_api::HostId;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use subtle::ConstantTimeEq;
use uuid::Uuid;

use crate::{app::App, db::now_us, http::error::ApiError};

/// Random bytes of a token or secret.
const SECRET_BYTES: usize = 32;
/// How long a join token is good for unless the administrator says otherwise.
pub const DEFAULT_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Longest life of a join token.
const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// A new token or secret: 64 hex digits.
pub(super) fn random() -> Result<String, ApiError> {
    let mut bytes = [0; SECRET_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(hex::encode(bytes))
}

/// What is stored of a secret. (256 random bits need no salt and no slow hash.)
pub(super) fn hash(secret: &str) -> String {
    hex::encode(Sha256::digest(secret.as_bytes()))
}

/// What a join token shall be good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenWish {
    /// For people.
    pub description: String,
    /// Number of hosts that may join with it; without, any number.
    pub uses: Option<u32>,
    /// How long, at least a second and at most a year.
    pub lifetime: Duration,
}

impl Default for TokenWish {
    fn default() -> Self {
        Self { description: String::new(), uses: None, lifetime: DEFAULT_TOKEN_LIFETIME }
    }
}

/// A token with which hosts can join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// To be handed to `mote-hostd join`; it is not stored.
    pub token: String,
    /// End of its life, µs since 1970 UTC.
    pub expires_us: i64,
}

/// Makes a join token, and forgets those that have expired.
///
/// # Errors
/// 400 for a life of no length or more than a year, or no uses; of the database.
pub async fn make_join_token(tx: &mut Conn, wish: &TokenWish) -> Result<JoinToken, ApiError> {
    if wish.lifetime < Duration::from_secs(1) || wish.lifetime > MAX_TOKEN_LIFETIME {
        let text = format!(
            "The lifetime of a join token must be between 1 and {} seconds.",
            MAX_TOKEN_LIFETIME.as_secs()
        );
        return Err(ApiError::BadRequest(text));
    }
    if wish.uses == Some(0) {
        return Err(ApiError::BadRequest("A join token needs at least one use.".into()));
    }
    let token = random()?;
    let now = now_us();
    let lifetime_us = i64::try_from(wish.lifetime.as_micros()).map_err(ApiError::internal)?;
    let expires_us = now.saturating_add(lifetime_us);
    sqlx::query("DELETE FROM join_tokens WHERE expires_us <= $1").bind(now).execute(&mut *tx).await?;
    sqlx::query(
        "INSERT INTO join_tokens (id, token_hash, description, uses_left, created_us, expires_us)
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(hash(&token))
    .bind(&wish.description)
    .bind(wish.uses.map(i64::from))
    .bind(now)
    .bind(expires_us)
    .execute(tx)
    .await?;
    Ok(JoinToken { token, expires_us })
}

/// Uses a join token once.
///
/// # Errors
/// 401 if it is unknown, expired or used up.
pub(super) async fn use_join_token(tx: &mut Conn, token: &str) -> Result<(), ApiError> {
    // Found by its hash: how long that takes tells nothing of a token that one doesn't have.
    let used = sqlx::query(
        "UPDATE join_tokens SET uses_left = uses_left - 1
         WHERE token_hash = $1 AND expires_us > $2 AND (uses_left IS NULL OR uses_left > 0)",
    )
    .bind(hash(token))
    .bind(now_us())
    .execute(tx)
    .await?;
    match used.rows_affected() {
        0 => Err(ApiError::Unauthorized),
        _ => Ok(()),
    }
}

/// The host that speaks: the one in the path, with its secret. As the first argument of a handler it keeps everybody
/// else out before a body is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Speaker {
    /// Id.
    pub(super) id: HostId,
    /// The same as in the database.
    pub(super) key: String,
}

/// The part of a path that names the host.
#[derive(Debug, Deserialize)]
struct HostPath {
    id: String,
}

impl FromRequestParts<App> for Speaker {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Path(HostPath { id }) =
            Path::from_request_parts(parts, app).await.map_err(|_| ApiError::Unauthorized)?;
        let secret = bearer(parts).ok_or(ApiError::Unauthorized)?;
        let id: HostId = id.parse().map_err(|_| ApiError::Unauthorized)?;
        let key = id.to_string();
        let stored: Option<String> = sqlx::query_scalar("SELECT secret_hash FROM hosts WHERE id = $1")
            .bind(&key)
            .fetch_optional(&app.db)
            .await?;
        let stored = stored.ok_or(ApiError::Unauthorized)?;
        match bool::from(hash(secret).as_bytes().ct_eq(stored.as_bytes())) {
            true => Ok(Self { id, key }),
            false => Err(ApiError::Unauthorized),
        }
    }
}

/// The credentials of `Authorization: Bearer …` (RFC 6750 §2.1).
fn bearer(parts: &Parts) -> Option<&str> {
    let value = parts.headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(secret.trim())
}
