//! The console socket: a few clients that see the output from when they connect and whose bytes are input.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::SerialError;

/// Clients at a time; further ones are closed at once.
pub const MAX_CLIENTS: usize = 8;

/// A listening socket and its clients. The socket file goes with it.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
    clients: [Option<UnixStream>; MAX_CLIENTS],
}

impl Console {
    /// Listens on `path` for the owner only. A socket that a dead process left there is replaced, one that somebody
    /// listens on is not.
    ///
    /// # Errors
    /// As bind(2).
    pub fn listen(path: &Path) -> Result<Self, SerialError> {
        let failed = |source| SerialError::Socket { path: path.to_owned(), source };
        let bound = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        let listener = bound.map_err(failed)?;
        // From here on, dropping removes the file.
        let console = Self { listener, path: path.to_owned(), clients: Default::default() };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        console.listener.set_nonblocking(true).map_err(failed)?;
        Ok(console)
    }

    /// The listening descriptor.
    pub fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Takes one new client, if there is one and room for it: its slot and descriptor.
    pub fn accept(&mut self) -> Option<(usize, RawFd)> {
        let (stream, _) = self.listener.accept().ok()?;
        let slot = self.clients.iter().position(Option::is_none)?;
        stream.set_nonblocking(true).ok()?;
        let fd = stream.as_raw_fd();
        self.clients[slot] = Some(stream);
        Some((slot, fd))
    }

    /// The descriptor of a client.
    pub fn client_fd(&self, slot: usize) -> Option<RawFd> {
        self.clients.get(slot)?.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Reads input of a client; 0 bytes if it has gone.
    pub fn receive(&mut self, slot: usize, buffer: &mut [u8]) -> io::Result<usize> {
        match self.clients.get_mut(slot) {
            Some(Some(client)) => client.read(buffer),
            _ => Ok(0),
        }
    }

    /// Forgets a client.
    pub fn close(&mut self, slot: usize) {
        if let Some(client) = self.clients.get_mut(slot) {
            *client = None;
        }
    }

    /// Sends output to every client: what one can't take now is lost to it, one that has gone is closed.
    pub fn send(&mut self, bytes: &[u8]) {
        for slot in &mut self.clients {
            let Some(client) = slot else { continue };
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the pointer and length are those of a live slice, which is only read.
            let sent = unsafe { libc::send(client.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
            if sent < 0 && io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock {
                *slot = None;
            }
        }
    }
}

/// Whether `path` is a socket that nobody listens on.
fn is_abandoned(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Drop for Console {
    fn drop(&mut self) {
        // Somebody else may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}
