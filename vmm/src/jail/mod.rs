//! `mote-vmm jail`: what Firecracker's jailer does, with its options.
//!
//! ```text
//!   as root                                                                       as --uid and --gid
//!   network namespace ─► close descriptors, clear the environment ─►              start the VM in this process,
//!   limits ─► cgroups ─► directory, devices ─► mount                              or replace it by --exec-file
//!   namespace, pivot_root ─► session, /dev/null ─► pid namespace ─► privileges ─►
//! ```
//!
//! The order matters: cgroups, network namespace and device nodes are made where the host's files can still be seen;
//! nothing of them can be reached after [`chroot::enter`].
//!
//! If `--exec-file` is this very program, nothing is copied or executed: the VM is started in this process, so that it
//! needs no dynamic linker or libraries in the jail. Another file is copied into the jail and executed; it must be
//! linked statically.

mod cgroup;
mod chroot;
mod identity;
mod limits;

use std::ffi::{CString, OsString};
use std::io;
use std::path::{Path, PathBuf};

use argh::FromArgs;

pub use cgroup::CgroupError;
pub use limits::Limit;

/// Where jails are made when nothing is said, as Firecracker's.
const DEFAULT_BASE: &str = "/srv/jailer";

/// Starts one microVM in a jail: chroot, namespaces, cgroups, limits, without privileges.
///
/// What follows -- is for the VM (see mote-vmm --help); its paths are those inside of the jail, whose root is
/// BASE/FILE/ID/root or that of --root.
#[derive(Debug, FromArgs)]
#[argh(help_triggers("-h", "--help"))]
pub struct JailOptions {
    /// name of the VM: 1 to 64 letters, digits and hyphens
    #[argh(option, arg_name = "ID", from_str_fn(crate::cli::parse_id))]
    id: String,
    /// program to run in the jail [default: this program]
    #[argh(option, arg_name = "PATH")]
    exec_file: Option<PathBuf>,
    /// user to run it as
    #[argh(option, arg_name = "UID")]
    uid: u32,
    /// group to run it as
    #[argh(option, arg_name = "GID")]
    gid: u32,
    /// directory of the jails [default: /srv/jailer]
    #[argh(option, arg_name = "PATH", default = "DEFAULT_BASE.into()")]
    chroot_base_dir: PathBuf,
    /// the jail's directory itself, whoever it belongs to, instead of BASE/FILE/ID/root; it must be there
    #[argh(option, arg_name = "PATH")]
    root: Option<PathBuf>,
    /// inherited descriptor, a tap's say, to be left open; may be given several times
    #[argh(option, long = "keep-fd", arg_name = "NUMBER")]
    keep_fds: Vec<u32>,
    /// network namespace to join, a file like /run/netns/NAME
    #[argh(option, arg_name = "PATH")]
    netns: Option<PathBuf>,
    /// value of a cgroup's file, like cpu.shares=10; may be given several times
    #[argh(option, long = "cgroup", arg_name = "FILE=VALUE", from_str_fn(cgroup::parse_setting))]
    cgroups: Vec<cgroup::Setting>,
    /// version of the host's cgroups: 1 or 2 [default: 1]
    #[argh(option, arg_name = "1|2", default = "1", from_str_fn(cgroup::parse_version))]
    cgroup_version: u8,
    /// cgroup below which the VM's is made [default: the name of the program]
    #[argh(option, arg_name = "NAME", from_str_fn(cgroup::parse_parent))]
    parent_cgroup: Option<PathBuf>,
    /// limit of a resource: fsize=BYTES (largest file) or no-file=NUMBER (open descriptors, 2048 if not given)
    #[argh(option, long = "resource-limit", arg_name = "NAME=VALUE")]
    limits: Vec<Limit>,
    /// leave the terminal's session; standard streams become /dev/null
    #[argh(switch)]
    daemonize: bool,
    /// run in a pid namespace of its own; this process ends, and the pid is left in FILE.pid in the jail
    #[argh(switch)]
    new_pid_ns: bool,
    /// arguments for the program in the jail, after --
    #[argh(positional, arg_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

/// The jail could not be made.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Not root.
    #[error("mote-vmm jail has to be started by root; it gives up what it doesn't need")]
    NotRoot,
    /// A file could not be used or made.
    #[error("{what} {}", .path.display())]
    Path {
        /// What was done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{0}")]
    Call(&'static str, #[source] io::Error),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A file that cannot run where there are no libraries.
    #[error("{} is linked dynamically and could not run in the jail; it must be linked statically", .0.display())]
    Dynamic(PathBuf),
    /// A name that can't be that of a directory.
    #[error("--exec-file {} has no file name", .0.display())]
    Name(PathBuf),
    /// An argument for the program.
    #[error("an argument contains a zero byte")]
    Argument,
}

/// A failed step with a path.
fn at<'a, E: Into<io::Error>>(what: &'static str, path: &'a Path) -> impl Fn(E) -> JailError + 'a {
    move |source| JailError::Path { what, path: path.to_owned(), source: source.into() }
}

/// What goes on after the jail was made.
#[derive(Debug)]
pub enum Next {
    /// The VM is to be started in this process with these arguments (without the name of the program).
    Run(Vec<String>),
    /// This process's work is done: the jail goes on in its child.
    Exit,
}

/// Makes the jail around this process. What it returns runs inside of it.
///
/// # Errors
/// See [`JailError`]. What was made so far (directory, cgroup) stays, as the caller's to remove.
pub fn enter(options: &JailOptions) -> Result<Next, JailError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(JailError::NotRoot);
    }
    let program = Program::find(options.exec_file.as_deref())?;
    // The path may be that of an inherited descriptor.
    if let Some(path) = &options.netns {
        identity::join_network(path)?;
    }
    identity::close_descriptors(&options.keep_fds)
        .map_err(|error| JailError::Call("close inherited descriptors", error.into()))?;
    identity::clear_environment();
    limits::apply(&options.limits).map_err(|error| JailError::Call("set resource limits", error.into()))?;

    let parent = options.parent_cgroup.clone().unwrap_or_else(|| PathBuf::from(&program.name));
    cgroup::enter(options.cgroup_version, &parent, &options.id, &options.cgroups)?;

    let root = match &options.root {
        Some(root) => root.clone(),
        None => {
            let root = options.chroot_base_dir.join(&program.name).join(&options.id).join("root");
            chroot::make(&root, options.uid, options.gid)?;
            root
        }
    };
    let executable = program.copy_into(&root, options.uid, options.gid)?;
    let null = if options.daemonize { Some(identity::open_null()?) } else { None };
    chroot::enter(&root, options.uid, options.gid)?;
    if let Some(null) = null {
        identity::daemonize(&null).map_err(|error| JailError::Call("leave the session", error.into()))?;
    }
    if options.new_pid_ns && identity::fork_into_pid_namespace(&program.name, options.uid, options.gid)? {
        return Ok(Next::Exit);
    }
    identity::drop_privileges(options.uid, options.gid)
        .map_err(|error| JailError::Call("give up privileges", error.into()))?;

    let mut arguments = vec!["--id".to_owned(), options.id.clone()];
    arguments.extend(options.arguments.iter().cloned());
    match executable {
        None => Ok(Next::Run(arguments)),
        Some(path) => execute(&path, arguments),
    }
}

/// Replaces this process by another program.
fn execute(path: &Path, arguments: Vec<String>) -> Result<Next, JailError> {
    use std::os::unix::ffi::OsStringExt;
    let words = std::iter::once(path.as_os_str().to_owned()).chain(arguments.into_iter().map(OsString::from));
    let words: Vec<CString> = words
        .map(|word| CString::new(word.into_vec()).map_err(|_| JailError::Argument))
        .collect::<Result<_, _>>()?;
    let Err(error) = nix::unistd::execve(&words[0], &words, &[] as &[&std::ffi::CStr]);
    Err(at("execute", path)(error))
}

/// What will run in the jail.
struct Program {
    /// Its file name, which names directories and cgroups.
    name: OsString,
    /// The file, unless it is this program.
    other: Option<PathBuf>,
}

impl Program {
    fn find(file: Option<&Path>) -> Result<Self, JailError> {
        const SELF: &str = "/proc/self/exe";
        let this = Path::new(SELF);
        let real = |path: &Path| path.canonicalize().map_err(at::<io::Error>("find", path));
        let (given, own) = (real(file.unwrap_or(this))?, real(this)?);
        let name = given.file_name().ok_or_else(|| JailError::Name(given.clone()))?.to_owned();
        let is_own = given == own;
        if !is_own && chroot::is_dynamic(&given).map_err(at::<io::Error>("read", &given))? {
            return Err(JailError::Dynamic(given));
        }
        Ok(Self { name, other: (!is_own).then_some(given) })
    }

    /// Copies the file, if it is another one; returns its path inside of the jail.
    fn copy_into(&self, root: &Path, uid: u32, gid: u32) -> Result<Option<PathBuf>, JailError> {
        let Some(file) = &self.other else { return Ok(None) };
        let target = root.join(&self.name);
        std::fs::copy(file, &target).map_err(at::<io::Error>("copy the program to", &target))?;
        std::os::unix::fs::chown(&target, Some(uid), Some(gid))
            .map_err(at::<io::Error>("give away", &target))?;
        Ok(Some(Path::new("/").join(&self.name)))
    }
}

#[cfg(test)]
mod tests;
