//! Tokens: a sealed statement, not a row.
//!
//! `base64url(version ‖ key ‖ nonce ‖ XChaCha20-Poly1305(claims))` with 1, 4, 24 and n + 16 bytes, claims as JSON. The nonce
//! is random (192 bits: no counter to keep), version and key's name are authenticated with the claims. Nobody without the
//! key can make or read one; what it says still counts only as far as the database agrees ([`super::principal`]).
//! Keys come and go, see [`super::keys`].

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    Key, KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use serde::{Deserialize, Serialize};

use std::sync::{PoisonError, RwLock};

use super::keys::StoredKey;
use crate::http::error::ApiError;

/// First byte of a token; a change of format is a new number.
const VERSION: u8 = 2;
/// How a token names its key.
const HINT_BYTES: usize = 4;
/// Version and key: what is authenticated beside the claims.
const HEAD_BYTES: usize = 1 + HINT_BYTES;
/// Of XChaCha20.
const NONCE_BYTES: usize = 24;
/// Longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 2048;

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Only to ask for another token.
    #[serde(rename = "n")]
    Unscoped,
    /// A project.
    #[serde(rename = "p")]
    Project(String),
    /// A domain.
    #[serde(rename = "d")]
    Domain(String),
    /// The whole cloud.
    #[serde(rename = "s")]
    System,
}

impl Scope {
    /// The project's id, if it is one.
    pub fn project(&self) -> Option<&str> {
        match self {
            Self::Project(id) => Some(id),
            Self::Unscoped | Self::Domain(_) | Self::System => None,
        }
    }
}

/// How the user authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By password.
    Password,
    /// By another token.
    Token,
    /// By an application credential.
    ApplicationCredential,
    /// By a request that was signed with an EC2 key pair.
    #[serde(rename = "ec2credential")]
    Ec2Credential,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who.
    #[serde(rename = "u")]
    pub user_id: String,
    /// What for.
    #[serde(rename = "s")]
    pub scope: Scope,
    /// How it was had, as Keystone lists it.
    #[serde(rename = "m")]
    pub methods: Vec<Method>,
    /// µs since 1970.
    #[serde(rename = "i")]
    pub issued_us: i64,
    /// µs since 1970.
    #[serde(rename = "e")]
    pub expires_us: i64,
    /// The token's own audit id, then that of the first of its chain (if that is another).
    #[serde(rename = "a")]
    pub audit_ids: Vec<String>,
    /// The application credential that it was had with.
    #[serde(rename = "c", default, skip_serializing_if = "Option::is_none")]
    pub application_credential: Option<String>,
    /// The trust that it was had with; the user is then the trustee.
    #[serde(rename = "t", default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<String>,
}

impl Claims {
    /// The token's own audit id.
    pub fn audit_id(&self) -> &str {
        self.audit_ids.first().map_or("", String::as_str)
    }
}

/// Makes and reads tokens.
#[derive(Default)]
pub struct Sealer {
    /// The newest first: that one makes tokens.
    keys: RwLock<Vec<TokenKey>>,
}

struct TokenKey {
    hint: [u8; HINT_BYTES],
    cipher: XChaCha20Poly1305,
}

impl std::fmt::Debug for Sealer {
    /// Without the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

/// Why a token can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// Its key is not among ours: another controller may have made it with a newer one.
    UnknownKey,
    /// It is none, or is over.
    Invalid,
}

impl Sealer {
    /// Takes these keys, the newest first, in place of those so far.
    pub fn set_keys(&self, keys: &[StoredKey]) {
        let keys = keys.iter().map(|key| TokenKey {
            hint: key.hint(),
            cipher: XChaCha20Poly1305::new(Key::from_slice(&key.bytes)),
        });
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys.collect();
    }

    /// Makes the token.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn seal(&self, claims: &Claims) -> Result<String, ApiError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.first().ok_or_else(|| ApiError::internal("there is no key for tokens"))?;
        let mut token = vec![VERSION; HEAD_BYTES + NONCE_BYTES];
        token[1..HEAD_BYTES].copy_from_slice(&key.hint);
        getrandom::fill(&mut token[HEAD_BYTES..]).map_err(|error| ApiError::internal(error.to_string()))?;
        let plain = serde_json::to_vec(claims).map_err(ApiError::internal)?;
        let payload = Payload { msg: &plain, aad: &token[..HEAD_BYTES] };
        let sealed = key
            .cipher
            .encrypt(XNonce::from_slice(&token[HEAD_BYTES..]), payload)
            .map_err(|_| ApiError::internal("sealing a token failed"))?;
        token.extend_from_slice(&sealed);
        Ok(URL_SAFE_NO_PAD.encode(token))
    }

    /// What a token says, if it is ours and not over.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub fn open(&self, token: &str, now_us: i64) -> Result<Claims, Unreadable> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Unreadable::Invalid);
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| Unreadable::Invalid)?;
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES).ok_or(Unreadable::Invalid)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_BYTES).ok_or(Unreadable::Invalid)?;
        if head[0] != VERSION {
            return Err(Unreadable::Invalid);
        }
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.iter().find(|key| key.hint == head[1..]).ok_or(Unreadable::UnknownKey)?;
        let payload = Payload { msg: sealed, aad: head };
        let plain =
            key.cipher.decrypt(XNonce::from_slice(nonce), payload).map_err(|_| Unreadable::Invalid)?;
        let claims: Claims = serde_json::from_slice(&plain).map_err(|_| Unreadable::Invalid)?;
        if now_us < claims.expires_us { Ok(claims) } else { Err(Unreadable::Invalid) }
    }
}

/// A new audit id, as Keystone's: 16 random bytes, base64url.
pub fn new_audit_id() -> String {
    URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4().as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::identity::keys::KEY_BYTES;

    use super::*;

    fn claims() -> Claims {
        Claims {
            user_id: "u".repeat(32),
            scope: Scope::Project("p".repeat(32)),
            methods: vec![Method::Token, Method::Password],
            issued_us: 5,
            expires_us: 1000,
            audit_ids: vec![new_audit_id(), new_audit_id()],
            application_credential: None,
            trust: None,
        }
    }

    fn key(byte: u8) -> StoredKey {
        StoredKey { id: hex::encode([byte; 16]), bytes: [byte; KEY_BYTES], created_us: 0 }
    }

    fn sealer(bytes: &[u8]) -> Sealer {
        let sealer = Sealer::default();
        sealer.set_keys(&bytes.iter().map(|byte| key(*byte)).collect::<Vec<_>>());
        sealer
    }

    #[test]
    fn a_token_of_an_older_key_is_read_until_that_key_goes() {
        let token = sealer(&[1]).seal(&claims()).unwrap();
        assert!(sealer(&[2, 1]).open(&token, 10).is_ok());
        assert_eq!(sealer(&[2]).open(&token, 10), Err(Unreadable::UnknownKey));
        let newer = sealer(&[2, 1]).seal(&claims()).unwrap();
        assert_eq!(sealer(&[1]).open(&newer, 10), Err(Unreadable::UnknownKey));
    }

    #[test]
    fn a_token_says_what_was_sealed_until_it_is_over() {
        let sealer = sealer(&[7]);
        let token = sealer.seal(&claims()).unwrap();
        assert!(token.len() < 512, "{}", token.len());
        assert_eq!(sealer.open(&token, 999).unwrap().scope, claims().scope);
        assert_eq!(sealer.open(&token, 1000), Err(Unreadable::Invalid));
    }

    #[test]
    fn a_token_of_another_key_is_none() {
        let token = sealer(&[7]).seal(&claims()).unwrap();
        assert!(sealer(&[8]).open(&token, 10).is_err());
    }

    proptest! {
        #[test]
        fn any_change_makes_it_invalid(index in 0_usize..400, bit in 0_u8..8) {
            let sealer = sealer(&[7]);
            let token = sealer.seal(&claims()).unwrap();
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
            let index = index % bytes.len();
            bytes[index] ^= 1 << bit;
            prop_assert!(sealer.open(&URL_SAFE_NO_PAD.encode(bytes), 10).is_err());
        }

        #[test]
        fn any_text_is_no_token(text in "\\PC{0,300}") {
            prop_assert!(sealer(&[7]).open(&text, 10).is_err());
        }
    }
}
