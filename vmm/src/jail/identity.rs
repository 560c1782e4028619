//! Whose process it is: descriptors, environment, namespaces, session, user.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid, setsid};

use super::{JailError, at};

/// Closes everything but the standard streams and `keep`.
pub(super) fn close_descriptors(keep: &[u32]) -> nix::Result<()> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut first = 3;
    for kept in keep.into_iter().chain([u32::MAX]) {
        if kept > first {
            let last = if kept == u32::MAX { kept } else { kept - 1 };
            // SAFETY: this process has just started: nothing in it owns a descriptor from 3 on but what it inherited.
            Errno::result(unsafe { libc::close_range(first, last, 0) })?;
        }
        first = first.max(kept.saturating_add(1));
    }
    Ok(())
}

/// Removes every variable, and wipes where they were: secrets of whoever started this are in there.
pub(super) fn clear_environment() {
    unsafe extern "C" {
        static environ: *mut *mut libc::c_char;
    }
    // SAFETY: there is one thread, and it holds no pointer into the environment. `environ` is null or an array that ends
    // with a null, of strings that are writable (they are on the stack of the process or from the allocator).
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            std::ptr::write_bytes(*entry, 0, libc::strlen(*entry));
            entry = entry.add(1);
        }
        libc::clearenv();
    }
}

/// Joins the network namespace that `path` names.
pub(super) fn join_network(path: &Path) -> Result<(), JailError> {
    let file = File::open(path).map_err(at::<io::Error>("open the network namespace", path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(at::<Errno>("join the network namespace", path))
}

/// The host's /dev/null, which the jail doesn't have.
pub(super) fn open_null() -> Result<File, JailError> {
    let path = Path::new("/dev/null");
    File::options().read(true).write(true).open(path).map_err(at::<io::Error>("open", path))
}

/// A session of its own, with nothing on the standard streams.
pub(super) fn daemonize(null: &File) -> nix::Result<()> {
    // Fails for the leader of a process group, which a shell makes of what it starts in the foreground.
    match setsid() {
        Ok(_) | Err(Errno::EPERM) => {}
        Err(error) => return Err(error),
    }
    nix::unistd::dup2_stdin(null.as_fd())?;
    nix::unistd::dup2_stdout(null.as_fd())?;
    nix::unistd::dup2_stderr(null.as_fd())
}

/// Forks into a pid namespace, whose process 1 is the child. True in the parent, which leaves the child's pid in a
/// file for whoever started it.
pub(super) fn fork_into_pid_namespace(name: &OsStr, uid: u32, gid: u32) -> Result<bool, JailError> {
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|error| JailError::Call("make a pid namespace", error.into()))?;
    // SAFETY: there is one thread, so that the child may do anything.
    match unsafe { fork() }.map_err(|error| JailError::Call("fork", error.into()))? {
        ForkResult::Child => Ok(false),
        ForkResult::Parent { child } => {
            let mut file = Path::new("/").join(name).into_os_string();
            file.push(".pid");
            let file = Path::new(&file);
            fs::write(file, child.to_string()).map_err(at::<io::Error>("write the pid to", file))?;
            chown(file, Some(uid), Some(gid)).map_err(at::<io::Error>("give away", file))?;
            Ok(true)
        }
    }
}

/// Becomes user and group, without other groups and without a way back. Capabilities go with the user id.
pub(super) fn drop_privileges(uid: u32, gid: u32) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    // Nothing that is executed from here on gets more.
    nix::sys::prctl::set_no_new_privs()?;
    // Changing the user made this process undumpable, and /proc/self root's: as Firecracker's, it stays so.
    Ok(())
}
