//! Digests of image content.

use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// Length of a SHA-256 digest in lower-case hexadecimal digits.
pub const SHA256_HEX_LEN: usize = 64;

/// Size and digests of one piece of content. All digests are lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest {
    /// The content's name in the store.
    pub sha256: String,
    /// Glance v2 `checksum`.
    pub md5: String,
    /// Glance v2 `os_hash_value` with `os_hash_algo` = `sha512`.
    pub sha512: String,
    /// Length of the content in bytes.
    pub size: u64,
}

/// Computes a [`Digest`] piece by piece.
#[derive(Clone, Default)]
pub struct Hasher {
    sha256: Sha256,
    md5: Md5,
    sha512: Sha512,
    size: u64,
}

impl Hasher {
    /// A hasher that has seen nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.md5.update(bytes);
        self.sha512.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// Number of bytes seen so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all bytes seen.
    #[must_use]
    pub fn finish(self) -> Digest {
        Digest {
            sha256: hex::encode(self.sha256.finalize()),
            md5: hex::encode(self.md5.finalize()),
            sha512: hex::encode(self.sha512.finalize()),
            size: self.size,
        }
    }
}

/// Whether `name` is a SHA-256 digest in the one spelling that the store uses (64 lower-case hexadecimal digits).
///
/// Everything that becomes part of a path passes through here first.
#[must_use]
pub fn is_sha256_hex(name: &str) -> bool {
    name.len() == SHA256_HEX_LEN && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_abc_is_the_published_one() {
        let mut hasher = Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        let digest = hasher.finish();
        assert_eq!(digest.size, 3);
        // FIPS 180-4 examples and RFC 1321 appendix A.5.
        assert_eq!(digest.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.md5, "900150983cd24fb0d6963f7d28e17f72");
        assert!(digest.sha512.starts_with("ddaf35a193617abacc417349ae204131"));
    }

    #[test]
    fn only_lower_case_digests_are_names() {
        let name = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(is_sha256_hex(name));
        assert!(!is_sha256_hex(&name.to_uppercase()));
        assert!(!is_sha256_hex(&name[1..]));
        assert!(!is_sha256_hex("../../../../../../../../../../../../../../../../../../../etc/passwd"));
        assert!(!is_sha256_hex(""));
    }
}
