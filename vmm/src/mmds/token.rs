//! Session tokens: the time at which a token ends, encrypted and authenticated with a key that only this process knows.
//! Nothing is remembered of a token, so a guest can ask for any number of them.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Nonce};

/// Shortest and longest life of a token in seconds.
pub const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;
const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;
/// Nonce, eight bytes of time, tag.
const TOKEN_BYTES: usize = NONCE_BYTES + 8 + 16;
/// What is longer isn't even decoded.
const MAX_ENCODED: usize = TOKEN_BYTES.div_ceil(3) * 4;

/// Gives out tokens and knows them again.
pub struct Authority {
    cipher: ChaCha20Poly1305,
    /// The machine that tokens are good for.
    machine: String,
    epoch: Instant,
}

impl Authority {
    /// For one machine, with a key of its own.
    ///
    /// # Errors
    /// The kernel has no random numbers.
    pub fn new(id: &str) -> Result<Self, getrandom::Error> {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        Ok(Self {
            cipher: ChaCha20Poly1305::new(&key.into()),
            machine: format!("microvmid={id}"),
            epoch: Instant::now(),
        })
    }

    /// A token that is good until `ttl_seconds` from `now`; absent if there are no random numbers.
    pub fn issue(&self, ttl_seconds: u32, now: Instant) -> Option<String> {
        let end = now + Duration::from_secs(ttl_seconds.into());
        let end = (end - self.epoch).as_millis() as u64;
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).ok()?;
        let payload = Payload { msg: &end.to_le_bytes(), aad: self.machine.as_bytes() };
        let sealed = self.cipher.encrypt(&Nonce::from(nonce), payload).ok()?;
        Some(STANDARD.encode([&nonce[..], &sealed].concat()))
    }

    /// Whether `token` was given out here and has not ended.
    pub fn is_valid(&self, token: &str, now: Instant) -> bool {
        let end = (token.len() <= MAX_ENCODED).then(|| self.open(token)).flatten();
        end.is_some_and(|end| now.saturating_duration_since(self.epoch).as_millis() < u128::from(end))
    }

    /// When the token ends, in milliseconds from the epoch.
    fn open(&self, token: &str) -> Option<u64> {
        let token: [u8; TOKEN_BYTES] = STANDARD.decode(token).ok()?.try_into().ok()?;
        let (nonce, sealed) = token.split_first_chunk::<NONCE_BYTES>()?;
        let payload = Payload { msg: sealed, aad: self.machine.as_bytes() };
        let end = self.cipher.decrypt(&Nonce::from(*nonce), payload).ok()?;
        Some(u64::from_le_bytes(end.try_into().ok()?))
    }
}

/// Without the key.
impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Authority").field("machine", &self.machine).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_is_good_until_its_time_is_over() {
        let authority = Authority::new("a").unwrap();
        let now = Instant::now();
        let token = authority.issue(60, now).unwrap();
        assert!(authority.is_valid(&token, now));
        assert!(authority.is_valid(&token, now + Duration::from_millis(59_990)));
        assert!(!authority.is_valid(&token, now + Duration::from_secs(60)));
        assert_ne!(token, authority.issue(60, now).unwrap());
    }

    #[test]
    fn a_token_of_another_process_or_machine_is_not_good() {
        let now = Instant::now();
        let (one, mut other) = (Authority::new("a").unwrap(), Authority::new("a").unwrap());
        assert!(!other.is_valid(&one.issue(60, now).unwrap(), now));
        let token = other.issue(60, now).unwrap();
        other.machine = "microvmid=b".to_owned();
        assert!(!other.is_valid(&token, now));
    }

    proptest! {
        #[test]
        fn a_changed_token_is_not_good(at in 0usize..TOKEN_BYTES, bit in 0u8..8) {
            let authority = Authority::new("a").unwrap();
            let now = Instant::now();
            let mut bytes = STANDARD.decode(authority.issue(60, now).unwrap()).unwrap();
            bytes[at] ^= 1 << bit;
            prop_assert!(!authority.is_valid(&STANDARD.encode(bytes), now));
        }

        #[test]
        fn any_text_is_looked_at_without_panic(text in ".{0,80}") {
            prop_assert!(!Authority::new("a").unwrap().is_valid(&text, Instant::now()));
        }
    }
}
