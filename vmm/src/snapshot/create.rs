//! `PUT /snapshot/create`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mote_vmm_api::{SnapshotCreate, SnapshotType, VmConfig};

use super::memory::MemoryFileError;
use super::{MachineState, StateError, format, memory};
use crate::kvm::KvmError;
use crate::machine::Machine;

/// A snapshot could not be made; the files are as they were then.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The machine runs.
    #[error("the microVM must be paused first (PATCH /vm)")]
    NotPaused,
    /// A kind that doesn't exist yet.
    #[error("snapshot_type Diff is not supported by this version of mote-vmm; use Full")]
    Diff,
    /// One file for both.
    #[error("snapshot_path and mem_file_path are the same file {}", .0.display())]
    SamePath(PathBuf),
    /// A file can't be made.
    #[error("cannot write {field} {}", .path.display())]
    File {
        /// Which field names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The memory file.
    #[error("cannot save memory to {}", .0.display())]
    Memory(PathBuf, #[source] MemoryFileError),
    /// A processor or the clock.
    #[error("cannot save the processors")]
    Kvm(#[from] KvmError),
    /// A device.
    #[error("cannot save the device {device}: {source}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        source: StateError,
    },
    /// Something that is no JSON.
    #[error("cannot write the state as JSON")]
    Json(#[source] serde_json::Error),
}

/// A file that takes the place of `path` when it is whole, and goes when it is not.
struct NewFile<'a> {
    field: &'static str,
    path: &'a Path,
    temporary: PathBuf,
    file: File,
    kept: bool,
}

impl<'a> NewFile<'a> {
    fn create(field: &'static str, path: &'a Path) -> Result<Self, CreateError> {
        let failed = |source| CreateError::File { field, path: path.to_owned(), source };
        if std::fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(io::Error::other("it exists and is not a regular file")));
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let temporary = PathBuf::from(temporary);
        // Readable by its owner only: a guest's memory has its secrets.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(&temporary).map_err(failed)?;
        Ok(Self { field, path, temporary, file, kept: false })
    }

    fn failed(&self, source: io::Error) -> CreateError {
        CreateError::File { field: self.field, path: self.path.to_owned(), source }
    }

    /// Brings the content to the disk.
    fn sync(&self) -> Result<(), CreateError> {
        self.file.sync_all().map_err(|source| self.failed(source))
    }

    /// Puts the file in its place.
    fn keep(mut self) -> Result<(), CreateError> {
        std::fs::rename(&self.temporary, self.path).map_err(|source| self.failed(source))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // It may be gone already.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Writes `machine`, which stays paused, to the two files. Files that are there are replaced when both new ones are whole.
///
/// # Errors
/// See [`CreateError`].
pub fn create(machine: &Machine, config: &VmConfig, to: &SnapshotCreate) -> Result<(), CreateError> {
    if !machine.is_paused() {
        return Err(CreateError::NotPaused);
    }
    if to.snapshot_type == SnapshotType::Diff {
        return Err(CreateError::Diff);
    }
    if to.snapshot_path == to.mem_file_path {
        return Err(CreateError::SamePath(to.snapshot_path.clone()));
    }
    let memory_file = NewFile::create("mem_file_path", &to.mem_file_path)?;
    let mut state_file = NewFile::create("snapshot_path", &to.snapshot_path)?;
    // First what may be refused, then what takes long.
    let (devices, vcpus, clock) = (machine.save_devices()?, machine.save_vcpus()?, machine.clock().save()?);
    let memory = memory::write(machine.memory(), &memory_file.file)
        .map_err(|source| CreateError::Memory(to.mem_file_path.clone(), source))?;
    let state = MachineState {
        written_by: env!("CARGO_PKG_VERSION").to_owned(),
        kind: to.snapshot_type,
        config: VmConfig { boot_source: None, logger: None, metrics: None, ..config.clone() },
        memory,
        vcpus,
        clock,
        devices,
    };
    let body = serde_json::to_vec(&state).map_err(CreateError::Json)?;
    let written = state_file.file.write_all(&format::encode(&body));
    written.map_err(|source| state_file.failed(source))?;
    memory_file.sync()?;
    state_file.sync()?;
    memory_file.keep()?;
    state_file.keep()
}
