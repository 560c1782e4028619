//! What a VMM's jail is made of: a user of its own, a directory, a network namespace with nothing in it.
//!
//! ```text
//!   servers/ID/        root's alone             ledger, logs, captures
//!     vm/              root's, the VMM's root   disks (the VMM's), configuration, config drive (its group may read),
//!                                               kernel and initrd (everybody may read)
//!       run/           the VMM's                sockets, console, exit report: what it says, and nothing to rely on
//! ```
//!
//! A VMM that its guest has taken over can write to its disks and to `run`. It can't put anything in the place of a disk,
//! since `vm` isn't its own; in `run` it can, so whatever is in there is opened without following links
//! ([`crate::files::open_untrusted`], [`connect`]).

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::Path,
};

use mote_host_api::ServerId;
use mote_vmm_api::VmConfig;
use nix::sched::{CloneFlags, unshare};
use tokio::net::UnixStream;

use crate::{
    files::{self, FileError},
    paths::ServerDir,
};

/// First of the user and group ids of VMMs, and how many there are: a range that systemd's conventions leave unused.
const FIRST_USER: u32 = 0x7000_0000;
const USERS: u32 = 0x1000_0000;

/// The user (and group) that the VMM of a server runs as: the same one always, and another one than that of any other
/// server of the host, but for one chance in 268 million for each pair.
pub fn user_of(id: ServerId) -> u32 {
    FIRST_USER + (id.0.as_u128() as u32) % USERS
}

/// Makes the directories of a server's jail, unless they are there.
///
/// # Errors
/// [`FileError`].
pub fn make_directories(id: ServerId, dir: &ServerDir) -> Result<(), FileError> {
    files::create_private_dir(dir.path())?;
    let vm = dir.vm();
    let made = match fs::create_dir(&vm) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.and_then(|()| fs::set_permissions(&vm, Permissions::from_mode(0o755))),
    };
    made.map_err(|source| FileError::CreateDir { path: vm, source })?;
    make_writable(id, &dir.vm_run())
}

/// Makes a directory of the jail that the VMM may write to.
///
/// # Errors
/// [`FileError::CreateDir`].
pub fn make_writable(id: ServerId, path: &Path) -> Result<(), FileError> {
    files::create_private_dir(path)?;
    give(path, id).map_err(|source| FileError::CreateDir { path: path.to_owned(), source })
}

/// Puts an image of the cache into the jail under another name: the same file, which everybody may read.
///
/// # Errors
/// [`FileError::Write`].
pub fn link_image(image: &Path, path: &Path) -> Result<(), FileError> {
    files::remove_file(path)?;
    let link = || -> io::Result<()> {
        fs::set_permissions(image, Permissions::from_mode(0o444))?;
        match fs::hard_link(image, path) {
            // The cache is on a disk of its own.
            Err(e) if e.kind() == io::ErrorKind::CrossesDevices => fs::copy(image, path).map(drop),
            result => result,
        }
    };
    link().map_err(|source| FileError::Write { path: path.to_owned(), source })
}

/// Lets the VMM at what its configuration names: disks that it writes to become its own, the rest is for it to read.
///
/// # Errors
/// [`FileError::Write`].
pub fn hand_over(id: ServerId, dir: &ServerDir, config: &VmConfig) -> Result<(), FileError> {
    let readable = |path: &Path| -> io::Result<()> {
        own(path, 0, user_of(id))?;
        fs::set_permissions(path, Permissions::from_mode(0o640))
    };
    let one = |path: &Path, result: io::Result<()>| {
        result.map_err(|source| FileError::Write { path: path.to_owned(), source })
    };
    for drive in &config.drives {
        let path = dir.outside(&drive.path_on_host);
        one(&path, if drive.is_read_only { readable(&path) } else { give(&path, id) })?;
    }
    let path = dir.vmm_config();
    one(&path, readable(&path))
}

/// Makes a file or directory the VMM's.
fn give(path: &Path, id: ServerId) -> io::Result<()> {
    own(path, user_of(id), user_of(id))
}

/// Changes the owner. Without privileges (as tests and simulated hosts run) files stay the agent's.
fn own(path: &Path, user: u32, group: u32) -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    chown(path, Some(user), Some(group))
}

/// A network namespace without a name and with nothing in it, which lives as long as the descriptor or a process in it.
///
/// # Errors
/// Of unshare(2) or of a thread.
pub fn empty_network() -> io::Result<OwnedFd> {
    let make = || -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    };
    // Only a thread of its own can leave the agent's namespace, and it ends in the new one.
    std::thread::Builder::new()
        .name("namespace".to_owned())
        .spawn(make)?
        .join()
        .map_err(|_| io::Error::other("the thread that makes a network namespace has panicked"))?
}

/// Connects to a socket that is where a VMM puts it, and is no link to another one.
///
/// # Errors
/// Of opening or connecting, or [`io::ErrorKind::InvalidInput`].
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    if !socket.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no socket"));
    }
    // By the descriptor: so it is this one, however long its path is.
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;
    use crate::paths::StateDir;

    #[test]
    fn users_are_in_their_range_and_stay() {
        for _ in 0..100 {
            let id = ServerId::new();
            assert!((FIRST_USER..=i32::MAX.cast_unsigned()).contains(&user_of(id)));
            assert_eq!(user_of(id), user_of(id));
        }
    }

    #[tokio::test]
    async fn a_socket_is_connected_to_and_a_link_to_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(120));
        fs::create_dir(&deep).unwrap();
        let _listener = UnixListener::bind(dir.path().join("s")).unwrap();
        fs::rename(dir.path().join("s"), deep.join("s")).unwrap();
        assert!(connect(&deep.join("s")).await.is_ok());
        std::os::unix::fs::symlink(deep.join("s"), dir.path().join("link")).unwrap();
        assert!(connect(&dir.path().join("link")).await.is_err());
        fs::write(dir.path().join("file"), b"").unwrap();
        let error = connect(&dir.path().join("file")).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn an_image_is_linked_for_reading_and_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (dir.path().join("image"), dir.path().join("kernel"));
        fs::write(&image, b"new").unwrap();
        fs::write(&path, b"old").unwrap();
        link_image(&image, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
    }

    #[test]
    fn a_vmm_owns_its_disks_and_its_run_directory_and_may_read_the_rest() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: not root");
        }
        use std::os::unix::fs::MetadataExt;
        let state = tempfile::tempdir().unwrap();
        let id = ServerId::new();
        let dir = StateDir::new(state.path()).server(id);
        make_directories(id, &dir).unwrap();
        make_directories(id, &dir).unwrap();
        for path in [dir.disk(1), dir.config_drive(1), dir.vmm_config()] {
            fs::write(path, b"").unwrap();
        }
        let config = serde_json::json!({"drives": [
            {"drive_id": "root", "path_on_host": "/root.img", "is_root_device": true},
            {"drive_id": "config", "path_on_host": "/config-1.img", "is_root_device": false, "is_read_only": true},
        ]});
        hand_over(id, &dir, &serde_json::from_value(config).unwrap()).unwrap();
        let (user, of) = (user_of(id), |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            (metadata.uid(), metadata.gid(), metadata.mode() & 0o777)
        });
        assert_eq!(of(dir.path()), (0, 0, 0o700));
        assert_eq!(of(&dir.vm()), (0, 0, 0o755));
        assert_eq!(of(&dir.vm_run()), (user, user, 0o700));
        assert_eq!((of(&dir.disk(1)).0, of(&dir.disk(1)).1), (user, user));
        assert_eq!(of(&dir.config_drive(1)), (0, user, 0o640));
        assert_eq!(of(&dir.vmm_config()), (0, user, 0o640));
    }
}
