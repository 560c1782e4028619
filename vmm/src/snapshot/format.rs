//! The state file. All numbers are little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 0–7 | `MOTESNAP` |
//! | 8–9 | major version: another one is another format |
//! | 10–11 | minor version: a reader reads its own and all before |
//! | 12–15 | reserved, zero |
//! | 16–23 | length of the body in bytes |
//! | 24–55 | SHA-256 of bytes 0–23 and the body |
//! | 56– | the body: one JSON object, see [`MachineState`](super::MachineState) |
//!
//! Nothing follows the body. There is no byte whose change goes unnoticed.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

/// What a state file starts with.
const MAGIC: [u8; 8] = *b"MOTESNAP";
/// Version of the format that is written.
/// 1.1 has a real-time clock, 1.2 registers for PCI hot-plug.
pub const VERSION: (u16, u16) = (1, 2);
/// Bytes before the body.
const HEADER: usize = 56;
/// Bytes of the header that the checksum covers.
const COVERED: usize = 24;
/// Largest body: 32 processors and all devices are below 1 MiB, the checksums of 1 TiB of memory have 3 MiB.
const MAX_BODY: u64 = 64 << 20;

/// A file that is no usable state file.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It can't be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// Something else.
    #[error("it is not a snapshot of mote-vmm (Firecracker's snapshots have another format)")]
    Magic,
    /// Written by a program with another format.
    #[error("it has version {major}.{minor}, this mote-vmm reads 1.0 to {}.{}; use the mote-vmm that wrote it", VERSION.0, VERSION.1)]
    Version {
        /// Major.
        major: u16,
        /// Minor.
        minor: u16,
    },
    /// Shorter than it says.
    #[error("it is truncated")]
    Truncated,
    /// Longer than it says, or than any is.
    #[error("it is damaged: its length is wrong")]
    Length,
    /// Changed.
    #[error("it is damaged: its checksum is wrong")]
    Checksum,
    /// The checksum is right and the body still makes no sense.
    #[error("its content is not a machine's state")]
    Body(#[source] serde_json::Error),
}

/// A file's bytes for this body.
pub fn encode(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.0.to_le_bytes());
    bytes.extend(VERSION.1.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((body.len() as u64).to_le_bytes());
    let checksum = checksum(&bytes, body);
    bytes.extend(checksum);
    bytes.extend(body);
    bytes
}

fn checksum(covered: &[u8], body: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(covered).chain_update(body).finalize().into()
}

/// The version in a state file's header, for `--describe-snapshot`.
///
/// # Errors
/// It is no state file.
pub fn version(mut file: impl Read) -> Result<(u16, u16), FormatError> {
    let mut start = [0; 12];
    file.read_exact(&mut start).map_err(short)?;
    let [magic @ .., a, b, c, d] = start;
    if magic != MAGIC {
        return Err(FormatError::Magic);
    }
    Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
}

fn short(error: io::Error) -> FormatError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        FormatError::Truncated
    } else {
        FormatError::Read(error)
    }
}

/// The body of a state file.
///
/// # Errors
/// It is damaged, truncated, newer, or something else.
pub fn decode(mut file: impl Read) -> Result<Vec<u8>, FormatError> {
    let mut header = [0; HEADER];
    let (start, rest) = header.split_at_mut(12);
    file.read_exact(start).map_err(short)?;
    let (major, minor) = version(&*start)?;
    if major != VERSION.0 || minor > VERSION.1 {
        return Err(FormatError::Version { major, minor });
    }
    file.read_exact(rest).map_err(short)?;
    let [.., l0, l1, l2, l3, l4, l5, l6, l7] =
        *header.first_chunk::<COVERED>().expect("the header is longer");
    let length = u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
    if length > MAX_BODY {
        return Err(FormatError::Length);
    }
    let mut body = Vec::new();
    // One byte more, to see that there is none. The file's real length bounds what is allocated.
    file.take(length + 1).read_to_end(&mut body).map_err(FormatError::Read)?;
    match (body.len() as u64).cmp(&length) {
        std::cmp::Ordering::Less => return Err(FormatError::Truncated),
        std::cmp::Ordering::Greater => return Err(FormatError::Length),
        std::cmp::Ordering::Equal => {}
    }
    if checksum(&header[..COVERED], &body) != header[COVERED..] {
        return Err(FormatError::Checksum);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(decode(&*encode(&body)).unwrap(), body);
        }

        #[test]
        fn any_changed_byte_is_noticed(
            body in proptest::collection::vec(any::<u8>(), 0..100), at in any::<prop::sample::Index>(), change in 1u8..,
        ) {
            let mut bytes = encode(&body);
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(decode(&*bytes).is_err());
        }

        #[test]
        fn any_other_length_is_noticed(body in proptest::collection::vec(any::<u8>(), 0..100), cut in any::<prop::sample::Index>()) {
            let bytes = encode(&body);
            prop_assert!(matches!(decode(&bytes[..cut.index(bytes.len())]), Err(FormatError::Truncated)));
            let longer = [&bytes[..], &[0]].concat();
            prop_assert!(matches!(decode(&*longer), Err(FormatError::Length)));
        }

        #[test]
        fn any_bytes_are_refused_or_decoded_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&*bytes);
            let mut with_header = encode(&[]);
            with_header.truncate(12);
            with_header.extend(&bytes);
            let _ = decode(&*with_header);
        }
    }

    #[test]
    fn newer_versions_and_other_files_are_named() {
        let mut newer = encode(b"{}");
        newer[10] = VERSION.1 as u8 + 1;
        let error = decode(&*newer).unwrap_err().to_string();
        assert!(error.contains(&format!("1.{}", VERSION.1 + 1)), "{error}");
        let mut other = encode(b"{}");
        other[8] = 2;
        assert!(matches!(decode(&*other), Err(FormatError::Version { major: 2, .. })));
        assert!(matches!(decode(&b"a text file, say"[..]), Err(FormatError::Magic)));
        assert_eq!(version(&*newer).unwrap(), (1, VERSION.1 + 1));
    }
}
