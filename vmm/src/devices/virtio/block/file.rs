//! A raw file or block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use io_uring::Submitter;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::SECTOR;
use crate::devices::virtio::buffers::GuestBuffers;
use crate::disk::qcow2::FormatError;

/// Why a file can't be a drive.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Not there, not allowed.
    #[error("open drive {path} {access}")]
    Open {
        /// The file.
        path: PathBuf,
        /// `"read-only"` or `"for reading and writing"`.
        access: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory, a socket, …
    #[error("drive {path} is neither a regular file nor a block device")]
    NotADisk {
        /// The file.
        path: PathBuf,
    },
    /// Type or size can't be found out.
    #[error("find the size of drive {path}")]
    Size {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A raw file is its own content.
    #[error("{path} is raw and can't have a backing file: leave backing_files out, or say its format")]
    RawBacking {
        /// The file.
        path: PathBuf,
    },
    /// Not as configured.
    #[error("cannot use {path} as a qcow2 image")]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: FormatError,
    },
    /// Less than a sector.
    #[error("drive {path} has {bytes} bytes, less than one sector of {SECTOR}")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

/// An open raw image.
pub struct RawFile {
    file: File,
    bytes: u64,
    read_only: bool,
    in_memory: bool,
    /// Held while the status flags differ from what they are otherwise.
    registering: Mutex<()>,
}

impl RawFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// As [`BlockError`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let owned = || path.to_owned();
        let access = if read_only { "read-only" } else { "for reading and writing" };
        // O_NONBLOCK: a FIFO must be refused, not waited for.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| BlockError::Open { path: owned(), access, source })?;
        let size_error = |source| BlockError::Size { path: owned(), source };
        let kind = file.metadata().map_err(size_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::NotADisk { path: owned() });
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(size_error)?;
        if bytes < SECTOR {
            return Err(BlockError::TooSmall { path: owned(), bytes });
        }
        set_status_flags(&file, OFlag::empty()).map_err(size_error)?;
        let in_memory = fstatfs(&file)
            .map_err(|error| size_error(error.into()))
            .map(|file_system| file_system.filesystem_type() == TMPFS_MAGIC)?;
        Ok(Self { file, bytes, read_only, in_memory, registering: Mutex::new(()) })
    }

    /// The file and its length in bytes.
    pub fn into_file(self) -> (File, u64) {
        (self.file, self.bytes)
    }

    /// Fills memory of this process from `offset` bytes on.
    ///
    /// # Errors
    /// As pread(2), or the file ends before.
    pub fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Capacity in sectors of 512 bytes.
    pub const fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    /// Whether writes are refused.
    pub const fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the file is in memory, so that writing it never waits for a disk.
    pub const fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Registers the file with an io_uring, as file 0.
    ///
    /// # Errors
    /// As io_uring_register(2).
    pub fn register(&self, ring: &Submitter<'_>) -> io::Result<()> {
        // Registered while O_NONBLOCK is set, the file counts as one that can be tried without waiting. io_uring would
        // otherwise give every request for a file of tmpfs to a kernel worker, though none of them waits. With the flag
        // gone again, what would wait goes to a worker rather than back as EAGAIN.
        let _registering = self.registering.lock().unwrap_or_else(PoisonError::into_inner);
        set_status_flags(&self.file, OFlag::O_NONBLOCK)?;
        let registered = ring.register_files(&[self.file.as_raw_fd()]);
        set_status_flags(&self.file, OFlag::empty())?;
        registered
    }

    /// Fills `buffers` from `offset` bytes on.
    ///
    /// # Errors
    /// As preadv(2).
    pub fn read(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        buffers.read_file(self.file.as_fd(), offset)
    }

    /// Writes `buffers` at `offset` bytes.
    ///
    /// # Errors
    /// As pwritev(2).
    pub fn write(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        buffers.write_file(self.file.as_fd(), offset)
    }

    /// Brings everything written to stable storage.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// As fallocate(2).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
    }

    /// Makes a range read as zeros, keeping its space if the file system can.
    ///
    /// # Errors
    /// As fallocate(2).
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if !may_unmap {
            let kept = self.fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len);
            // tmpfs and others can only punch.
            if !kept.as_ref().is_err_and(is_unsupported) {
                return kept;
            }
        }
        self.discard(offset, len)
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: no pointers are passed.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn set_status_flags(file: &File, flags: OFlag) -> io::Result<()> {
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// The file system can't do it, as opposed to: it failed.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}
