//! Tokens: a sealed statement, not a row.
//!
//! `base64url(version ‖ nonce ‖ XChaCha20-Poly1305(claims))` with 1, 24 and n + 16 bytes, claims as JSON. The nonce is
//! random (192 bits: no counter to keep), the version is authenticated with the claims. Nobody without the key can make
//! or read one; what it says still counts only as far as the database agrees ([`super::principal`]).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    Key, KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use serde::{Deserialize, Serialize};

use super::keys::KEY_BYTES;
use crate::http::error::ApiError;

/// First byte of a token; a change of format is a new number.
const VERSION: u8 = 1;
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
}

/// How the user authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By password.
    Password,
    /// By another token.
    Token,
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
}

impl Claims {
    /// The token's own audit id.
    pub fn audit_id(&self) -> &str {
        self.audit_ids.first().map_or("", String::as_str)
    }
}

/// Makes and reads tokens.
pub struct Sealer {
    cipher: XChaCha20Poly1305,
}

impl std::fmt::Debug for Sealer {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    /// With this key.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self { cipher: XChaCha20Poly1305::new(Key::from_slice(key)) }
    }

    /// Makes the token.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub fn seal(&self, claims: &Claims) -> Result<String, ApiError> {
        let mut token = vec![VERSION; 1 + NONCE_BYTES];
        getrandom::fill(&mut token[1..]).map_err(|error| ApiError::internal(error.to_string()))?;
        let plain = serde_json::to_vec(claims).map_err(ApiError::internal)?;
        let payload = Payload { msg: &plain, aad: &[VERSION] };
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(&token[1..]), payload)
            .map_err(|_| ApiError::internal("sealing a token failed"))?;
        token.extend_from_slice(&sealed);
        Ok(URL_SAFE_NO_PAD.encode(token))
    }

    /// What a token says, if it is ours and not over.
    pub fn open(&self, token: &str, now_us: i64) -> Option<Claims> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (version, rest) = bytes.split_first()?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_BYTES)?;
        if *version != VERSION {
            return None;
        }
        let payload = Payload { msg: sealed, aad: &[VERSION] };
        let plain = self.cipher.decrypt(XNonce::from_slice(nonce), payload).ok()?;
        let claims: Claims = serde_json::from_slice(&plain).ok()?;
        (now_us < claims.expires_us).then_some(claims)
    }
}

/// A new audit id, as Keystone's: 16 random bytes, base64url.
pub fn new_audit_id() -> String {
    URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4().as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claims() -> Claims {
        Claims {
            user_id: "u".repeat(32),
            scope: Scope::Project("p".repeat(32)),
            methods: vec![Method::Token, Method::Password],
            issued_us: 5,
            expires_us: 1000,
            audit_ids: vec![new_audit_id(), new_audit_id()],
        }
    }

    #[test]
    fn a_token_says_what_was_sealed_until_it_is_over() {
        let sealer = Sealer::new(&[7; 32]);
        let token = sealer.seal(&claims()).unwrap();
        assert!(token.len() < 512, "{}", token.len());
        assert_eq!(sealer.open(&token, 999).unwrap().scope, claims().scope);
        assert_eq!(sealer.open(&token, 1000), None);
    }

    #[test]
    fn a_token_of_another_key_is_none() {
        let token = Sealer::new(&[7; 32]).seal(&claims()).unwrap();
        assert_eq!(Sealer::new(&[8; 32]).open(&token, 10), None);
    }

    proptest! {
        #[test]
        fn any_change_makes_it_invalid(index in 0_usize..400, bit in 0_u8..8) {
            let sealer = Sealer::new(&[7; 32]);
            let token = sealer.seal(&claims()).unwrap();
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
            let index = index % bytes.len();
            bytes[index] ^= 1 << bit;
            prop_assert_eq!(sealer.open(&URL_SAFE_NO_PAD.encode(bytes), 10), None);
        }

        #[test]
        fn any_text_is_no_token(text in "\\PC{0,300}") {
            prop_assert_eq!(Sealer::new(&[7; 32]).open(&text, 10), None);
        }
    }
}
