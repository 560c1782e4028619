//! Where the output goes: stdout, or a file that is kept within bounds.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mote_vmm_api::Serial as SerialConfig;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::SerialError;
use crate::devices::report;

/// Output kept for a stdout that takes nothing; what comes after that is lost.
const BACKLOG_BYTES: usize = 64 << 10;
/// What a pipe that polls as writable takes without blocking (POSIX `PIPE_BUF` on Linux).
const PIPE_BUF: usize = 4096;
/// `log_limit_bytes` by default.
const DEFAULT_LIMIT: u64 = 1 << 20;
/// The least limit: what is written at a time always fits.
const MIN_LIMIT: u64 = 8192;

/// A receiver of output.
pub enum Output {
    /// Not a regular file: may block.
    Stream(Stream),
    /// A regular file.
    Log(Log),
}

impl Output {
    /// As configured.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn open(config: &SerialConfig) -> Result<Self, SerialError> {
        let Some(path) = &config.serial_out_path else {
            return if config.log_limit_bytes.is_some() {
                Err(SerialError::LimitWithoutFile)
            } else {
                Ok(Self::Stream(Stream::stdout()))
            };
        };
        let limit = config.log_limit_bytes.unwrap_or(DEFAULT_LIMIT);
        if limit < MIN_LIMIT {
            return Err(SerialError::LimitTooSmall { bytes: limit, min: MIN_LIMIT });
        }
        let failed = |source| SerialError::Output { path: path.clone(), source };
        let file = open_log(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() {
            return Ok(Self::Log(Log { file, path: path.clone(), bytes: metadata.len(), limit }));
        }
        if config.log_limit_bytes.is_some() {
            return Err(SerialError::LimitWithoutFile);
        }
        Ok(Self::Stream(Stream { target: Target::Own(file), backlog: VecDeque::new() }))
    }

    /// Writes `bytes`, without ever blocking on a receiver that doesn't read. Returns whether output is waiting to be
    /// written; then this must be called again later, with or without more.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Log(log) => {
                if !bytes.is_empty()
                    && let Err(error) = log.write(bytes)
                {
                    report(&format!("write the guest's output to {}", log.path.display()), &error);
                }
                false
            }
        }
    }

    /// A last attempt at what waits.
    pub fn finish(&mut self) {
        if let Self::Stream(stream) = self {
            stream.write(&[]);
        }
    }
}

/// What a [`Stream`] writes to.
enum Target {
    /// Standard output as it was inherited: its mode is shared with others and left alone.
    Stdout,
    /// Opened by us, non-blocking.
    Own(File),
}

/// A pipe, terminal, socket or character device.
pub struct Stream {
    target: Target,
    backlog: VecDeque<u8>,
}

impl Stream {
    /// A terminal is opened anew, since it may stop taking output in the middle of a write (Ctrl-S) and the mode of the
    /// inherited description isn't ours to change.
    fn stdout() -> Self {
        let terminal = io::IsTerminal::is_terminal(&io::stdout());
        let reopened = || {
            OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open("/proc/self/fd/1")
                .ok()
        };
        let target = terminal.then(reopened).flatten().map_or(Target::Stdout, Target::Own);
        Self { target, backlog: VecDeque::new() }
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        if self.backlog.is_empty() {
            rest = &rest[self.write_now(rest)..];
        }
        let room = BACKLOG_BYTES - self.backlog.len();
        let had_backlog = !self.backlog.is_empty();
        self.backlog.extend(&rest[..rest.len().min(room)]);
        if had_backlog {
            let backlog = std::mem::take(&mut self.backlog);
            let (front, back) = backlog.as_slices();
            let mut done = self.write_now(front);
            if done == front.len() {
                done += self.write_now(back);
            }
            self.backlog = backlog;
            self.backlog.drain(..done);
        }
        !self.backlog.is_empty()
    }

    /// Writes what can be written without blocking; returns how much. A receiver that has gone takes everything.
    fn write_now(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let written = match &self.target {
                Target::Own(file) => (&mut &*file).write(rest),
                Target::Stdout => write_if_ready(io::stdout().as_fd(), &rest[..rest.len().min(PIPE_BUF)]),
            };
            match written {
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return bytes.len(),
            }
        }
        done
    }
}

/// Writes to a descriptor in blocking mode if it polls as writable. SIGPIPE is ignored in Rust programs.
fn write_if_ready(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO)? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    // SAFETY: the pointer and length are those of a live slice, which is only read.
    let n = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A log that is renamed to `<path>.1` when it would pass its limit.
pub struct Log {
    file: File,
    path: PathBuf,
    bytes: u64,
    limit: u64,
}

/// Opens (or makes, for the owner only) a file to append to. A FIFO without a reader is an error instead of a wait.
fn open_log(path: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is a block device"));
    }
    Ok(file)
}

impl Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes > 0 && self.bytes + bytes.len() as u64 > self.limit {
            self.rotate()?;
        }
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = open_log(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}
