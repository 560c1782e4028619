//! Named network namespaces under /run/netns, made and removed as `ip netns` does it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, fstatfs},
};

/// Where the names are.
pub const DIR: &str = "/run/netns";

/// statfs(2): type of the file system that namespaces' files are on.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// The namespace of this process (of its first thread).
const OWN: &str = "/proc/self/ns/net";
/// Mounts on one name that a deletion takes away (more than one only after outside interference).
const MOUNTS_MAX: usize = 16;

/// A failure of an operation on a named namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Not a name.
    #[error("{0:?} is no name of a namespace")]
    Name(String),
    /// The file does not exist.
    #[error("network namespace {0} does not exist")]
    Missing(String),
    /// The file exists, but is no namespace.
    #[error("{DIR}/{0} is no network namespace")]
    NotANamespace(String),
    /// The name leads to the namespace that this process itself lives in.
    #[error("{DIR}/{0} is this process's own network namespace")]
    Own(String),
    /// A system call failed.
    #[error("network namespace {name}: cannot {operation}")]
    Io {
        /// Name.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The code that ran in the namespace panicked.
    #[error("the thread in network namespace {0} panicked")]
    Panicked(String),
}

/// Distinguishes a namespace from every other that exists at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceIdentity {
    device: u64,
    inode: u64,
}

/// Runs `f` on a thread of its own inside the namespace and returns its result. Sockets that `f` makes stay in the
/// namespace for ever, whoever uses them. Blocks; [`run_in`] is for tasks.
pub fn in_namespace<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
    let file = open(name)?;
    thread::scope(|scope| {
        let inside = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| f()));
        let handle = inside.map_err(failed(name, "start a thread"))?;
        let entered = handle.join().map_err(|_| NamespaceError::Panicked(name.to_owned()))?;
        entered.map_err(|errno| failed(name, "enter")(errno.into()))
    })
}

/// As [`in_namespace`], without blocking the executor.
pub async fn run_in<T, F>(name: &str, f: F) -> Result<T, NamespaceError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let name = name.to_owned();
    blocking(name, move |name| in_namespace(name, f)).await
}

/// Makes the namespace if it doesn't exist. Repeatable; a file or foreign mount in its place is replaced.
pub async fn create(name: &str) -> Result<(), NamespaceError> {
    blocking(name.to_owned(), create_blocking).await
}

/// Removes the name; the namespace goes when nothing (socket, tap, process) is in it any more. Repeatable.
pub async fn delete(name: &str) -> Result<(), NamespaceError> {
    blocking(name.to_owned(), delete_blocking).await
}

/// Identity of the namespace behind the name.
pub fn identity(name: &str) -> Result<NamespaceIdentity, NamespaceError> {
    let metadata = open(name)?.metadata().map_err(failed(name, "stat"))?;
    Ok(NamespaceIdentity { device: metadata.dev(), inode: metadata.ino() })
}

/// All names, sorted.
pub fn list() -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name().into_string())).collect();
    let mut names: Vec<String> = names?.into_iter().filter_map(Result::ok).collect();
    names.sort_unstable();
    Ok(names)
}

async fn blocking<T, F>(name: String, f: F) -> Result<T, NamespaceError>
where
    T: Send + 'static,
    F: FnOnce(&str) -> Result<T, NamespaceError> + Send + 'static,
{
    let for_error = name.clone();
    let result = tokio::task::spawn_blocking(move || f(&name)).await;
    result.unwrap_or(Err(NamespaceError::Panicked(for_error)))
}

fn failed(name: &str, operation: &'static str) -> impl FnOnce(io::Error) -> NamespaceError {
    let name = name.to_owned();
    move |source| NamespaceError::Io { name, operation, source }
}

fn path_of(name: &str) -> Result<PathBuf, NamespaceError> {
    let usable =
        !name.is_empty() && name.len() <= 255 && !name.contains(['/', '\0']) && name != "." && name != "..";
    if usable { Ok(Path::new(DIR).join(name)) } else { Err(NamespaceError::Name(name.to_owned())) }
}

/// Opens a namespace that is another one than this process's.
pub(crate) fn open(name: &str) -> Result<File, NamespaceError> {
    let path = path_of(name)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags((OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits());
    let file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NamespaceError::Missing(name.to_owned()),
        // ELOOP: a symbolic link; ENXIO: a socket.
        _ if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            NamespaceError::NotANamespace(name.to_owned())
        }
        _ => failed(name, "open")(error),
    })?;
    let status = fstatfs(&file).map_err(|errno| failed(name, "stat")(errno.into()))?;
    if status.filesystem_type() != NSFS_MAGIC {
        return Err(NamespaceError::NotANamespace(name.to_owned()));
    }
    let (this, own) = (file.metadata(), fs::metadata(OWN));
    let (this, own) = (this.map_err(failed(name, "stat"))?, own.map_err(failed(name, "stat own"))?);
    if (this.dev(), this.ino()) == (own.dev(), own.ino()) {
        return Err(NamespaceError::Own(name.to_owned()));
    }
    Ok(file)
}

/// As [`create`], for callers outside of tokio.
pub fn create_blocking(name: &str) -> Result<(), NamespaceError> {
    let path = path_of(name)?;
    let _lock = lock_directory(name)?;
    share_directory(name)?;
    match open(name) {
        Ok(_) => return Ok(()),
        Err(NamespaceError::Missing(_)) => {}
        Err(NamespaceError::NotANamespace(_) | NamespaceError::Own(_)) => remove(name, &path)?,
        Err(error) => return Err(error),
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o000).custom_flags(OFlag::O_CLOEXEC.bits());
    options.open(&path).map_err(failed(name, "create its file"))?;
    // The new namespace is the thread's until the mount holds it, so a crash in between leaves only the file.
    let bound = thread::scope(|scope| {
        let inside = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        });
        let handle = inside.map_err(failed(name, "start a thread"))?;
        let bound = handle.join().map_err(|_| NamespaceError::Panicked(name.to_owned()))?;
        bound.map_err(|errno| failed(name, "create and mount")(errno.into()))
    });
    if bound.is_err() {
        // Best effort: what stays is found as broken by the next observation.
        let _ = fs::remove_file(&path);
    }
    bound
}

/// As [`delete`], for callers outside of tokio.
pub fn delete_blocking(name: &str) -> Result<(), NamespaceError> {
    let path = path_of(name)?;
    if !Path::new(DIR).exists() {
        return Ok(());
    }
    let _lock = lock_directory(name)?;
    remove(name, &path)
}

/// Unmounts and unlinks.
fn remove(name: &str, path: &Path) -> Result<(), NamespaceError> {
    for _ in 0..MOUNTS_MAX {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount (any more).
            Err(Errno::EINVAL) => break,
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(failed(name, "unmount")(errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(name, "unlink its file")(error)),
        _ => Ok(()),
    }
}

/// As `ip netns` does: one process at a time changes the directory and its mounts.
fn lock_directory(name: &str) -> Result<Flock<File>, NamespaceError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(DIR)
        .map_err(failed(name, "create the directory"))?;
    let directory = File::open(DIR).map_err(failed(name, "open the directory"))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed(name, "lock the directory")(errno.into()))
}

/// Makes the directory a mount with shared propagation: names made here are seen, and go away again, in every mount
/// namespace that was split off from this one (of `ip netns exec`, of services with PrivateMounts).
fn share_directory(name: &str) -> Result<(), NamespaceError> {
    let share = || mount(None::<&str>, DIR, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    let shared = match share() {
        // Not a mount yet.
        Err(Errno::EINVAL) => {
            mount(Some(DIR), DIR, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
                .and_then(|()| share())
        }
        other => other,
    };
    shared.map_err(|errno| failed(name, "share the directory's mounts")(errno.into()))
}
