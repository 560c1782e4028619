//! Small files that are replaced as a whole or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Largest small JSON file that is read, in bytes (the desired state of a full host is the largest).
pub const JSON_FILE_MAX: u64 = 64 << 20;

/// What can go wrong with a small file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Reading.
    #[error("cannot read {}", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Writing, renaming or syncing.
    #[error("cannot write {}", path.display())]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The content is not what it should be.
    #[error("{} is not valid", path.display())]
    Parse {
        /// File.
        path: PathBuf,
        /// Cause.
        source: serde_json::Error,
    },
    /// Making a directory.
    #[error("cannot create directory {}", path.display())]
    CreateDir {
        /// Directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Removing.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Whether a write must be on the disk before it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// fsync of file and directory: survives a crash of the host.
    Host,
    /// Survives a crash of this process only; after one of the host the older content may be back.
    Process,
}

/// Replaces `path` (mode 0600) by `bytes`: written to `<path>.tmp`, then renamed.
///
/// # Errors
/// [`FileError::Write`].
pub fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let temporary = PathBuf::from(name);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        if durability == Durability::Host {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if durability == Durability::Host
            && let Some(parent) = path.parent()
        {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|source| FileError::Write { path: path.to_owned(), source })
}

/// [`replace`] by the JSON of `value`.
///
/// # Errors
/// [`FileError::Write`].
pub fn replace_json<T: Serialize>(path: &Path, value: &T, durability: Durability) -> Result<(), FileError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| FileError::Write { path: path.to_owned(), source: io::Error::other(e) })?;
    replace(path, &bytes, durability)
}

/// Opens a file for reading that somebody hostile may have put there: what isn't a file of its own (a link that leads
/// elsewhere, a pipe that never ends) is an error.
///
/// # Errors
/// Of opening, or [`io::ErrorKind::InvalidInput`].
pub fn open_untrusted(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    }
}

/// Reads JSON; `None` when there is no such file.
///
/// # Errors
/// [`FileError::Read`], [`FileError::Parse`].
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let read = |source| FileError::Read { path: path.to_owned(), source };
    let file = match open_untrusted(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(read(e)),
    };
    let mut bytes = Vec::new();
    file.take(JSON_FILE_MAX).read_to_end(&mut bytes).map_err(read)?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| FileError::Parse { path: path.to_owned(), source })
}

/// Makes a directory (0700) and what is above it; an existing one is fine.
///
/// # Errors
/// [`FileError::CreateDir`].
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| FileError::CreateDir { path: path.to_owned(), source })
}

/// Removes a file; one that does not exist is fine.
///
/// # Errors
/// [`FileError::Remove`].
pub fn remove_file(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(FileError::Remove { path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

/// Removes a directory with all in it; one that does not exist is fine.
///
/// # Errors
/// [`FileError::Remove`].
pub fn remove_dir(path: &Path) -> Result<(), FileError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(FileError::Remove { path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_replaced_file_is_private_and_whole_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        for durability in [Durability::Host, Durability::Process] {
            replace_json(&path, &vec![1, 2, 3], durability).unwrap();
            assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2, 3]));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn missing_is_none_and_broken_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
        fs::write(&path, b"{").unwrap();
        assert!(matches!(read_json::<u32>(&path), Err(FileError::Parse { .. })));
    }
}
