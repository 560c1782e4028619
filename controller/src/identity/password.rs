//! Passwords: argon2id, on threads that may block, a few at a time.
//!
//! Each hash takes some 20 ms and 19 MiB (OWASP's parameters, the crate's default), so a flood of log-ins is a load: more
//! than [`MAX_WAITING`] waiting are told to come back. A log-in of a user who does not exist costs the same time.
//!
//! The memory is kept and used again, one piece per processor: freed by ever other threads, the allocator would hold on
//! to it in all its arenas (190 MB were measured), and fresh pages cost time.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use argon2::{
    Argon2, Block, Params, PasswordHash,
    password_hash::{Error, Output, PasswordHash as Phc, Salt, SaltString, rand_core::OsRng},
};
use tokio::sync::Semaphore;

use crate::http::error::ApiError;

/// Longest password in bytes, Keystone's `max_password_length`.
pub const MAX_PASSWORD_BYTES: usize = 4096;
/// Log-ins that wait for a hash; more are refused.
const MAX_WAITING: usize = 64;
/// What is hashed against when there is no user: no password is known for it.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$bW90ZS1ub2JvZHktc2FsdA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Hashes and checks passwords.
#[derive(Debug)]
pub struct Hasher {
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    memory: Arc<Memory>,
}

/// Memory that no hash uses now.
#[derive(Debug, Default)]
struct Memory(Mutex<Vec<Vec<Block>>>);

impl Memory {
    fn argon2id(&self, password: &[u8], salt: &[u8], params: Params) -> Result<Output, Error> {
        let blocks = params.block_count();
        let length = params.output_len().unwrap_or(Params::DEFAULT_OUTPUT_LEN);
        let argon2 = Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        memory.resize(blocks, Block::default());
        let output = Output::init_with(length, |out| {
            argon2.hash_password_into_with_memory(password, salt, out, &mut memory[..]).map_err(Error::from)
        });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        output
    }

    /// In PHC form.
    fn hash(&self, password: &[u8]) -> Result<String, Error> {
        let salt = SaltString::generate(&mut OsRng);
        let mut bytes = [0; Salt::MAX_LENGTH];
        let output = self.argon2id(password, salt.decode_b64(&mut bytes)?, Params::default())?;
        let phc = Phc {
            algorithm: argon2::Algorithm::Argon2id.ident(),
            version: Some(argon2::Version::V0x13.into()),
            params: (&Params::default()).try_into()?,
            salt: Some(salt.as_salt()),
            hash: Some(output),
        };
        Ok(phc.to_string())
    }

    /// With the parameters of the hash; compares in constant time.
    fn verify(&self, password: &[u8], hash: &str) -> Result<bool, Error> {
        let hash = PasswordHash::new(hash)?;
        if hash.algorithm != argon2::Algorithm::Argon2id.ident() {
            return Err(Error::Algorithm);
        }
        let (Some(salt), Some(expected)) = (hash.salt, hash.hash) else { return Err(Error::Password) };
        let mut bytes = [0; Salt::MAX_LENGTH];
        let output = self.argon2id(password, salt.decode_b64(&mut bytes)?, Params::try_from(&hash)?)?;
        Ok(output == expected)
    }
}

impl Hasher {
    /// With as many hashes at a time as there are processors.
    pub fn new() -> Self {
        let running = thread::available_parallelism().map_or(1, usize::from);
        Self {
            running: Arc::new(Semaphore::new(running)),
            waiting: Arc::new(Semaphore::new(running + MAX_WAITING)),
            memory: Arc::default(),
        }
    }

    /// Hash of a new password, in PHC form.
    ///
    /// # Errors
    /// 400 for a password that is too long or empty, 503 under overload.
    pub async fn hash(&self, password: &str) -> Result<String, ApiError> {
        if password.is_empty() || password.len() > MAX_PASSWORD_BYTES {
            let text = format!("A password must have 1 to {MAX_PASSWORD_BYTES} bytes.");
            return Err(ApiError::BadRequest(text));
        }
        let (password, memory) = (password.to_owned(), self.memory.clone());
        self.run(move || memory.hash(password.as_bytes()))
            .await?
            .map_err(|error| ApiError::internal(format!("hashing a password failed: {error}")))
    }

    /// Whether a password is the one that was hashed. `None` (no such user, or no password) takes as long and is false.
    ///
    /// # Errors
    /// 503 under overload.
    pub async fn verify(&self, password: &str, hash: Option<&str>) -> Result<bool, ApiError> {
        let known = hash.is_some();
        let hash = hash.unwrap_or(NOBODY).to_owned();
        // Longer ones were never hashed; cutting keeps the cost bounded and the answer false.
        let too_long = password.len() > MAX_PASSWORD_BYTES;
        let password = password.as_bytes()[..password.len().min(MAX_PASSWORD_BYTES)].to_vec();
        let memory = self.memory.clone();
        let fits = self
            .run(move || memory.verify(&password, &hash))
            .await?
            .map_err(|error| ApiError::internal(format!("checking a password failed: {error}")))?;
        Ok(fits && known && !too_long)
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
        let _waiting = self
            .waiting
            .clone()
            .try_acquire_owned()
            .map_err(|_| ApiError::Unavailable("Too many log-ins at once. Please try again.".into()))?;
        // Given to the thread: a client that goes away does not make room for another hash before its own is done.
        let running = self.running.clone().acquire_owned().await.map_err(ApiError::internal)?;
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(running);
            result
        });
        done.await.map_err(ApiError::internal)
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_hashed_password_fits() {
        let hasher = Hasher::new();
        let hash = hasher.hash("correct horse").await.unwrap();
        assert!(hash.starts_with("$argon2id$"));
        assert!(hasher.verify("correct horse", Some(&hash)).await.unwrap());
        for wrong in ["", "Correct horse", "correct horse "] {
            assert!(!hasher.verify(wrong, Some(&hash)).await.unwrap());
        }
        assert!(!hasher.verify("correct horse", None).await.unwrap());
    }

    #[tokio::test]
    async fn hashes_are_those_of_the_crate_itself() {
        use argon2::{PasswordHasher, PasswordVerifier};
        let hasher = Hasher::new();
        let ours = hasher.hash("pw").await.unwrap();
        Argon2::default().verify_password(b"pw", &PasswordHash::new(&ours).unwrap()).unwrap();
        let salt = SaltString::generate(&mut OsRng);
        // With other parameters than ours, and memory that was used before.
        let weak = Argon2::new(
            argon2::Algorithm::Argon2id,
            argon2::Version::V0x13,
            Params::new(64, 1, 1, None).unwrap(),
        );
        let theirs = weak.hash_password(b"pw", &salt).unwrap().to_string();
        assert!(hasher.verify("pw", Some(&theirs)).await.unwrap());
        assert!(!hasher.verify("pW", Some(&theirs)).await.unwrap());
        assert!(hasher.verify("pw", Some(&ours)).await.unwrap());
    }

    #[tokio::test]
    async fn empty_and_huge_passwords_are_refused_and_never_fit() {
        let hasher = Hasher::new();
        let limit = "x".repeat(MAX_PASSWORD_BYTES);
        assert!(hasher.hash("").await.is_err());
        assert!(hasher.hash(&format!("{limit}y")).await.is_err());
        let hash = hasher.hash(&limit).await.unwrap();
        assert!(hasher.verify(&limit, Some(&hash)).await.unwrap());
        assert!(!hasher.verify(&format!("{limit}y"), Some(&hash)).await.unwrap());
    }

    #[tokio::test]
    async fn a_flood_is_refused_and_does_not_stay() {
        let hasher = Arc::new(Hasher::new());
        let flood = (0..2 * MAX_WAITING + 16).map(|_| {
            let hasher = hasher.clone();
            async move { hasher.verify("x", None).await.is_err() }
        });
        let refused =
            futures_util::future::join_all(flood).await.into_iter().filter(|refused| *refused).count();
        assert!(refused > 0);
        assert!(!hasher.verify("x", None).await.unwrap());
    }
}
