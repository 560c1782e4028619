//! Ed25519 key pairs in OpenSSH's forms.
//!
//! The private half is an `OPENSSH PRIVATE KEY` without passphrase (OpenSSH's `PROTOCOL.key`):
//! `"openssh-key-v1\0"`, cipher, key derivation and its options (`none`, `none`, empty), the number of keys (1), the public key,
//! and the private section: twice the same random number, key type, public key, private ‖ public key, comment, and 1, 2, 3, …
//! up to a multiple of 8 bytes. Numbers are 32 bits, big endian; texts have their length before them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use crate::http::error::ApiError;

const KIND: &[u8] = b"ssh-ed25519";
/// Characters of a line of the private key.
const LINE: usize = 70;
/// The private section of an unencrypted key is a multiple of so many bytes.
const BLOCK: usize = 8;

fn put(bytes: &mut Vec<u8>, text: &[u8]) {
    // Nothing here is longer than a comment of 255 characters.
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(text);
}

/// A new pair: the line of the public key, and the file of the private one.
///
/// # Errors
/// 500 if the kernel gives no random numbers.
pub(super) fn generate(comment: &str) -> Result<(String, String), ApiError> {
    let (mut seed, mut check) = ([0; 32], [0; 4]);
    for bytes in [&mut seed[..], &mut check[..]] {
        getrandom::fill(bytes).map_err(|error| ApiError::internal(error.to_string()))?;
    }
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|e| ApiError::internal(e.to_string()))?;
    let public = pair.public_key().as_ref();
    let mut blob = Vec::new();
    put(&mut blob, KIND);
    put(&mut blob, public);
    let mut section = [check, check].concat();
    put(&mut section, KIND);
    put(&mut section, public);
    put(&mut section, &[&seed[..], public].concat());
    put(&mut section, comment.as_bytes());
    let padding = section.len().next_multiple_of(BLOCK) - section.len();
    section.extend((1..).take(padding));
    let mut file = b"openssh-key-v1\0".to_vec();
    for text in [&b"none"[..], b"none", b""] {
        put(&mut file, text);
    }
    file.extend(1_u32.to_be_bytes());
    put(&mut file, &blob);
    put(&mut file, &section);
    let mut text = String::from("-----BEGIN OPENSSH PRIVATE KEY-----\n");
    for (index, character) in STANDARD.encode(file).chars().enumerate() {
        if index > 0 && index % LINE == 0 {
            text.push('\n');
        }
        text.push(character);
    }
    text.push_str("\n-----END OPENSSH PRIVATE KEY-----\n");
    Ok((format!("ssh-ed25519 {} {comment}", STANDARD.encode(blob)), text))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    #[test]
    fn ssh_keygen_finds_the_same_public_key_in_the_private_one() {
        let directory = tempfile::tempdir().unwrap();
        for comment in ["a", "with spaces", "1234567"] {
            let (public, private) = generate(comment).unwrap();
            assert_ne!(generate(comment).unwrap().0, public);
            let file = directory.path().join("key");
            std::fs::write(&file, private).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
            let Ok(output) = Command::new("ssh-keygen").args(["-y", "-f"]).arg(&file).output() else {
                eprintln!("SKIPPED: there is no ssh-keygen");
                return;
            };
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), public);
        }
    }
}
