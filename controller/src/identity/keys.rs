//! The keys of identity, in the database, so that all controllers of one cloud have the same.
//!
//! **Token keys rotate.** The newest makes tokens; the older ones read until the last token of theirs is over, then they
//! are deleted. Whichever controller finds the newest too old makes the next, in a transaction that looks again. The others
//! meet a token with an unknown key, and read the keys again ([`refresh`], at most once a second however many such tokens
//! come). Whoever can read the database can read them, as the password hashes: it is as secret as the cloud itself.
//!
//! The **credential key** seals what users keep in `/v3/credentials` and stays.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{Key, KeyInit, XChaCha20Poly1305, XNonce, aead::Aead};

use super::{new_id, tokens::Sealer};
use crate::{
    db::{self, Conn, Pools},
    http::error::ApiError,
};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// How long one key makes tokens.
const ROTATION: Duration = Duration::from_secs(24 * 3600);
/// How often keys are read again because of tokens with an unknown key.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);
/// Of XChaCha20.
const NONCE_BYTES: usize = 24;

/// A key of the database.
#[derive(Clone)]
pub struct StoredKey {
    /// 32 hex digits.
    pub id: String,
    /// The key.
    pub bytes: [u8; KEY_BYTES],
    /// When it was made, µs since 1970.
    pub created_us: i64,
}

impl std::fmt::Debug for StoredKey {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "key {}", self.id)
    }
}

impl StoredKey {
    /// How tokens name it: the first bytes of its id.
    pub fn hint(&self) -> [u8; 4] {
        let id = u128::from_str_radix(&self.id, 16).unwrap_or_default().to_be_bytes();
        [id[0], id[1], id[2], id[3]]
    }
}

/// Keys of this controller: what the database has, as last read.
#[derive(Debug)]
pub struct Keys {
    /// Seals and opens tokens.
    pub tokens: Sealer,
    credential: CredentialKey,
    refreshed: Mutex<Instant>,
}

impl Keys {
    /// Reads the keys; makes those that are missing.
    ///
    /// # Errors
    /// Of the database.
    pub async fn open(pools: &Pools) -> Result<Self, ApiError> {
        let mut tx = db::begin_immediate(&pools.write).await?;
        if read(&mut tx, "credential").await?.is_empty() {
            make(&mut tx, "credential", db::now_us()).await?;
        }
        let credential = read(&mut tx, "credential").await?;
        tx.commit().await?;
        let key = credential.first().ok_or_else(|| ApiError::internal("the credential key can't be read"))?;
        let keys = Self {
            tokens: Sealer::default(),
            credential: CredentialKey(XChaCha20Poly1305::new(Key::from_slice(&key.bytes))),
            refreshed: Mutex::new(Instant::now()),
        };
        keys.rotate(pools, db::now_us(), Duration::ZERO).await?;
        Ok(keys)
    }

    /// Makes the next token key if the newest is too old, deletes those whose last token is over (`lifetime` after the
    /// key stopped making any), and reads them.
    ///
    /// # Errors
    /// Of the database.
    pub async fn rotate(&self, pools: &Pools, now_us: i64, lifetime: Duration) -> Result<(), ApiError> {
        let us = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX / 4);
        let keys = read(&mut *pools.read.acquire().await?, "token").await?;
        let due = |keys: &[StoredKey]| keys.first().is_none_or(|key| key.created_us <= now_us - us(ROTATION));
        if !due(&keys) {
            self.tokens.set_keys(&keys);
            return Ok(());
        }
        let mut tx = db::begin_immediate(&pools.write).await?;
        if due(&read(&mut tx, "token").await?) {
            make(&mut tx, "token", now_us).await?;
            if !lifetime.is_zero() {
                // A key made tokens for at most two periods (a controller may have noticed late).
                sqlx::query("DELETE FROM identity_keys WHERE purpose = 'token' AND created_us < $1")
                    .bind(now_us - 2 * us(ROTATION) - us(lifetime))
                    .execute(&mut *tx)
                    .await?;
            }
        }
        let keys = read(&mut tx, "token").await?;
        tx.commit().await?;
        self.tokens.set_keys(&keys);
        Ok(())
    }

    /// Reads the token keys again, unless that was done just now; false then.
    ///
    /// # Errors
    /// Of the database.
    pub async fn refresh(&self, conn: &mut Conn) -> Result<bool, ApiError> {
        {
            let mut refreshed = self.refreshed.lock().unwrap_or_else(PoisonError::into_inner);
            if refreshed.elapsed() < REFRESH_PAUSE {
                return Ok(false);
            }
            *refreshed = Instant::now();
        }
        self.tokens.set_keys(&read(conn, "token").await?);
        Ok(true)
    }

    /// Seals what a user keeps.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn seal(&self, plain: &str) -> Result<String, ApiError> {
        let mut sealed = vec![0; NONCE_BYTES];
        getrandom::fill(&mut sealed).map_err(|error| ApiError::internal(error.to_string()))?;
        let bytes = self.credential.0.encrypt(XNonce::from_slice(&sealed), plain.as_bytes());
        sealed.extend(bytes.map_err(|_| ApiError::internal("sealing a credential failed"))?);
        Ok(URL_SAFE_NO_PAD.encode(sealed))
    }

    /// What [`Self::seal`] sealed.
    ///
    /// # Errors
    /// If it was not sealed with this key.
    pub fn unseal(&self, sealed: &str) -> Result<String, ApiError> {
        let unreadable = || ApiError::internal("a stored credential can't be read with this cloud's key");
        let bytes = URL_SAFE_NO_PAD.decode(sealed).map_err(|_| unreadable())?;
        let (nonce, text) = bytes.split_at_checked(NONCE_BYTES).ok_or_else(unreadable)?;
        let plain = self.credential.0.decrypt(XNonce::from_slice(nonce), text).map_err(|_| unreadable())?;
        String::from_utf8(plain).map_err(|_| unreadable())
    }
}

struct CredentialKey(XChaCha20Poly1305);

impl std::fmt::Debug for CredentialKey {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CredentialKey")
    }
}

/// The newest first.
async fn read(conn: &mut Conn, purpose: &str) -> Result<Vec<StoredKey>, ApiError> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT id, key_hex, created_us FROM identity_keys WHERE purpose = $1 ORDER BY created_us DESC, id",
    )
    .bind(purpose)
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|(id, text, created_us)| {
            let mut bytes = [0; KEY_BYTES];
            hex::decode_to_slice(&text, &mut bytes).map_err(ApiError::internal)?;
            Ok(StoredKey { id, bytes, created_us })
        })
        .collect()
}

async fn make(conn: &mut Conn, purpose: &str, now_us: i64) -> Result<(), ApiError> {
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(|error| ApiError::internal(error.to_string()))?;
    sqlx::query("INSERT INTO identity_keys (id, purpose, key_hex, created_us) VALUES ($1, $2, $3, $4)")
        .bind(new_id())
        .bind(purpose)
        .bind(hex::encode(key))
        .bind(now_us)
        .execute(conn)
        .await?;
    Ok(())
}
