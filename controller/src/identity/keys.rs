//! The key of the tokens: 32 random bytes in a file that only its owner can read.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// Why a key can't be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Reading or writing.
    #[error("can't {operation} the key {path}")]
    Io {
        /// Verb.
        operation: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Not a key.
    #[error("the key {path} has {actual} bytes instead of {KEY_BYTES}")]
    Length {
        /// File.
        path: PathBuf,
        /// Bytes found.
        actual: usize,
    },
    /// No randomness.
    #[error("no random bytes from the kernel: {0}")]
    Random(getrandom::Error),
}

/// Reads the key; makes it first if there is none. Several processes that do so at the same time get the same.
///
/// # Errors
/// See [`KeyError`].
pub fn open(path: &Path) -> Result<[u8; KEY_BYTES], KeyError> {
    if !path.exists() {
        create(path)?;
    }
    let bytes =
        fs::read(path).map_err(|source| KeyError::Io { operation: "read", path: path.to_owned(), source })?;
    bytes.as_slice().try_into().map_err(|_| KeyError::Length { path: path.to_owned(), actual: bytes.len() })
}

/// Under a name of its own first, then linked: whoever comes second finds the complete key of the first.
fn create(path: &Path) -> Result<(), KeyError> {
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(KeyError::Random)?;
    let own = path.with_extension(format!("new-{}", std::process::id()));
    let failed = |source| KeyError::Io { operation: "create", path: path.to_owned(), source };
    let written = write_synced(&own, &key).and_then(|()| match fs::hard_link(&own, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    });
    let _ = fs::remove_file(&own);
    written.map_err(failed)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token.key");
        let first = open(&path).unwrap();
        assert_eq!(open(&path).unwrap(), first);
        assert_ne!(first, [0; KEY_BYTES]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_truncated_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token.key");
        fs::write(&path, b"short").unwrap();
        assert!(matches!(open(&path), Err(KeyError::Length { actual: 5, .. })));
    }
}
