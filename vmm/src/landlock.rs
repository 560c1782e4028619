//! Landlock: what this process gives up for ever, in the kernel's file system, network and signals rather than call by call.
//!
//! Only rights that the VMM never needs are handled, and there are no rules: two calls, whatever paths the API names later.
//! Paths themselves are the jail's business (its root holds the VM's files and nothing else).

use std::io;

use crate::log;

/// linux/landlock.h, `struct landlock_ruleset_attr`; older kernels take its beginning.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

const CREATE_RULESET_VERSION: u32 = 1;

const FS_EXECUTE: u64 = 1 << 0;
const FS_REMOVE_DIR: u64 = 1 << 4;
const FS_MAKE_CHAR: u64 = 1 << 6;
const FS_MAKE_DIR: u64 = 1 << 7;
const FS_MAKE_FIFO: u64 = 1 << 10;
const FS_MAKE_BLOCK: u64 = 1 << 11;
const FS_MAKE_SYM: u64 = 1 << 12;
const NET_BIND_TCP: u64 = 1 << 0;
const NET_CONNECT_TCP: u64 = 1 << 1;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1 << 0;
const SCOPE_SIGNAL: u64 = 1 << 1;

/// What is given up at a version of the kernel's interface, and how many bytes of [`Ruleset`] that version knows.
const fn ruleset(version: i64) -> (Ruleset, usize) {
    let ruleset = Ruleset {
        handled_access_fs: FS_EXECUTE
            | FS_REMOVE_DIR
            | FS_MAKE_CHAR
            | FS_MAKE_DIR
            | FS_MAKE_FIFO
            | FS_MAKE_BLOCK
            | FS_MAKE_SYM,
        handled_access_net: if version >= 4 { NET_BIND_TCP | NET_CONNECT_TCP } else { 0 },
        scoped: if version >= 6 { SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL } else { 0 },
    };
    let known = match version {
        ..4 => 8,
        4..6 => 16,
        _ => size_of::<Ruleset>(),
    };
    (ruleset, known)
}

/// Gives it up for the calling thread and all that it makes from now on. Returns the version of the kernel's interface, None
/// where there is no Landlock.
///
/// # Errors
/// The kernel has it and refused.
pub fn restrict() -> io::Result<Option<i64>> {
    let version = create(None, 0, CREATE_RULESET_VERSION);
    let version = match version {
        Ok(version) => version,
        // Not in the kernel, not enabled at its start, or denied by a container's filter.
        Err(_) => return Ok(None),
    };
    let (ruleset, known) = ruleset(version);
    let descriptor = create(Some(&ruleset), known, 0)?;
    // Landlock asks for it; the seccomp filters do, too.
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: no pointer is passed.
    let restricted = match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, descriptor, 0) } {
        0 => Ok(Some(version)),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { libc::close(descriptor as libc::c_int) };
    restricted
}

/// landlock_create_ruleset(2).
fn create(ruleset: Option<&Ruleset>, bytes: usize, flags: u32) -> io::Result<i64> {
    let pointer = ruleset.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the pointer is null, with a length of 0, or to a structure of at least this length.
    match unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, pointer, bytes, flags) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// [`restrict`], with a line in the log about what there is.
///
/// # Errors
/// As [`restrict`].
pub fn restrict_and_tell() -> io::Result<()> {
    match restrict()? {
        Some(version) if version >= 6 => {
            log::debug!("Landlock version {version}: no programs, TCP, foreign signals")
        }
        Some(version) => log::info!("Landlock version {version} of this kernel does less than version 6"),
        None => log::info!("this kernel has no Landlock: the jail and the seccomp filters stand alone"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::process::Command;

    use super::*;

    #[test]
    fn older_kernels_are_asked_for_what_they_know() {
        assert_eq!(ruleset(1).1, 8);
        assert_eq!((ruleset(3).0.handled_access_net, ruleset(4).1), (0, 16));
        assert_eq!((ruleset(5).0.scoped, ruleset(6).1), (0, 24));
        assert_eq!(ruleset(9), ruleset(6));
    }

    #[test]
    fn a_restricted_thread_starts_no_program_and_reaches_nobody_outside() {
        let address = SocketAddr::from_abstract_name(format!("mote-test-{}", std::process::id())).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let test = move || {
            let Some(version) = restrict().unwrap() else {
                return eprintln!("SKIPPED: this kernel has no Landlock");
            };
            let denied = |result: io::Result<()>, what: &str| {
                let error = result.expect_err(what);
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}: {error}");
            };
            denied(Command::new("/bin/true").status().map(drop), "a program");
            denied(std::fs::create_dir(path.join("d")), "a directory");
            denied(std::os::unix::fs::symlink("x", path.join("s")), "a symbolic link");
            std::fs::write(path.join("f"), b"x").unwrap();
            std::fs::rename(path.join("f"), path.join("g")).unwrap();
            std::fs::remove_file(path.join("g")).unwrap();
            drop(UnixListener::bind(path.join("u")).unwrap());
            if version >= 4 {
                denied(TcpListener::bind("127.0.0.1:0").map(drop), "TCP");
            }
            if version >= 6 {
                denied(UnixStream::connect_addr(&address).map(drop), "an abstract socket");
                let parent = nix::unistd::getppid();
                let signal = nix::sys::signal::kill(parent, None);
                assert_eq!(signal, Err(nix::errno::Errno::EPERM), "a signal");
            }
        };
        std::thread::spawn(test).join().unwrap();
    }
}
