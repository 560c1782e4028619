//! One agent per state directory.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    time::Duration,
};

use tokio::time::Instant;

use crate::paths::StateDir;

/// How long another holder is waited for, and how often it is looked.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

/// The lock, held as long as this lives (and by a child between its fork and exec, see [`crate::vmm`]).
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why the lock was not got.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Held.
    #[error("another mote-hostd{by} works on {}", state.display())]
    Held {
        /// State directory.
        state: PathBuf,
        /// ` (process N)`, where known.
        by: String,
    },
    /// File.
    #[error("cannot lock {}", path.display())]
    File {
        /// Lock file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Takes the lock or says who has it.
///
/// # Errors
/// [`LockError`].
pub fn acquire(state: &StateDir) -> Result<Lock, LockError> {
    let path = state.lock();
    let error = |source| LockError::File { path: path.clone(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).map_err(error)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Only for the message.
            let _ = (&mut file).take(32).read_to_string(&mut text);
            let by =
                text.trim().parse::<u32>().map_or_else(|_| String::new(), |pid| format!(" (process {pid})"));
            return Err(LockError::Held { state: state.path().to_owned(), by });
        }
        Err(TryLockError::Error(e)) => return Err(error(e)),
    }
    let note = |file: &mut File| -> io::Result<()> {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    note(&mut file).map_err(error)?;
    Ok(Lock { _file: file })
}

/// [`acquire`], but waits a moment: a process that was just killed holds it until it is gone.
///
/// # Errors
/// [`LockError`].
pub async fn acquire_soon(state: &StateDir) -> Result<Lock, LockError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match acquire(state) {
            Err(LockError::Held { .. }) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_has_it_and_gets_it_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let first = acquire(&state).unwrap();
        let second = acquire(&state).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
        drop(first);
        acquire(&state).unwrap();
    }
}
