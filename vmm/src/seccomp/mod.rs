//! One seccomp filter for each kind of thread: a system call that isn't listed in [`lists`] ends the process.
//!
//! ```text
//!   main (API, slow path)          vCPU ──── activate, reset ───► set-up ──── makes ───► worker
//!   installs its own before the    installs its own before      its list holds the     installs its own on top
//!   first vCPU may run             it runs the guest            workers', too          of the set-up thread's
//! ```
//!
//! A thread inherits the filter of the one that makes it, and both hold. So workers are made by a thread of its own
//! ([`set_up`]) rather than by the vCPU whose guest asked for it: a vCPU's list stays short.
//!
//! A refused call raises SIGSYS; its handler says which call it was, leaves a line in the metrics' file and ends the process
//! with Firecracker's code 148.

pub mod lists;
mod program;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock, PoisonError};

use seccompiler::{BpfProgram, SeccompAction, TargetArch};

/// Exit code after a refused system call, as Firecracker's.
const REFUSED: libc::c_int = 148;
/// Largest file of filters.
const MAX_FILTER_FILE: u64 = 1 << 20;

/// What a thread is for; each has its own filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// API, signals, devices' slow path.
    Main,
    /// Activates and resets devices.
    SetUp,
    /// Serves a device's queues.
    Worker,
    /// Runs a virtual processor.
    Vcpu,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Main, Self::SetUp, Self::Worker, Self::Vcpu];

    /// The name in a file of filters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::SetUp => "setup",
            Self::Worker => "worker",
            Self::Vcpu => "vcpu",
        }
    }
}

/// Filters could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The file of filters cannot be read.
    #[error("cannot read the file of seccomp filters")]
    Read(#[source] io::Error),
    /// It is larger than any real one.
    #[error("the file of seccomp filters has {0} bytes, more than {MAX_FILTER_FILE}")]
    TooLarge(u64),
    /// A filter is wrong.
    #[error("cannot compile the seccomp filters")]
    Compile(#[source] Box<seccompiler::Error>),
    /// A kind of thread is missing.
    #[error("the file of seccomp filters has none for {0:?}; it needs main, setup, worker and vcpu")]
    Missing(&'static str),
    /// The kernel refused.
    #[error("cannot install the seccomp filter of a {0} thread")]
    Install(&'static str, #[source] Box<seccompiler::Error>),
    /// No thread or no signal handler.
    #[error("cannot prepare for seccomp filters")]
    Prepare(#[source] io::Error),
}

/// Where this process's filters come from; absent with `--no-seccomp`.
static FILTERS: OnceLock<Filters> = OnceLock::new();

enum Filters {
    /// [`lists`]. Each is compiled when a thread installs it: most threads of most VMs are a main and a vCPU.
    BuiltIn,
    /// A file's, in the order of [`ThreadKind::ALL`].
    Own([BpfProgram; 4]),
}

/// Makes filters ready to be installed: those of the file, or the ones built in. Also installs the handler that tells
/// which call was refused.
///
/// # Errors
/// See [`SeccompError`].
pub fn prepare(file: Option<&Path>) -> Result<(), SeccompError> {
    let filters = match file {
        Some(path) => Filters::Own(from_file(path)?),
        None => Filters::BuiltIn,
    };
    install_handler().map_err(SeccompError::Prepare)?;
    // A second call is ignored: filters are chosen once for a process.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Restricts the calling thread from now on, if filters were prepared.
///
/// # Errors
/// The kernel refused.
pub fn enter(kind: ThreadKind) -> Result<(), SeccompError> {
    let applied = match FILTERS.get() {
        None => return Ok(()),
        Some(Filters::BuiltIn) => {
            seccompiler::apply_filter(&program::compile(lists::of(kind), SeccompAction::Trap))
        }
        Some(Filters::Own(filters)) => seccompiler::apply_filter(&filters[kind as usize]),
    };
    applied.map_err(|error| SeccompError::Install(kind.name(), Box::new(error)))
}

fn from_file(path: &Path) -> Result<[BpfProgram; 4], SeccompError> {
    let file = File::open(path).map_err(SeccompError::Read)?;
    let size = file.metadata().map_err(SeccompError::Read)?.len();
    if size > MAX_FILTER_FILE {
        return Err(SeccompError::TooLarge(size));
    }
    let mut named = seccompiler::compile_from_json(file, TargetArch::x86_64)
        .map_err(|error| SeccompError::Compile(Box::new(error)))?;
    let mut filters = [const { Vec::new() }; 4];
    for kind in ThreadKind::ALL {
        let name = kind.name();
        filters[kind as usize] = named.remove(name).ok_or(SeccompError::Missing(name))?;
    }
    Ok(filters)
}

/// SIGSYS: one line on stderr, and the end.
fn install_handler() -> io::Result<()> {
    extern "C" fn refused(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
        /// Offset of `si_syscall` in `siginfo_t` on x86-64: three ints, padding, and the address of the instruction.
        const SI_SYSCALL: usize = 24;
        // SAFETY: the kernel gives a whole `siginfo_t` (128 bytes), which for SIGSYS has this int.
        let number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<libc::c_int>().read() };
        let mut line = *b"mote-vmm: the seccomp filter refused system call 0000\n";
        let mut rest = number.unsigned_abs();
        for digit in line[49..53].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        crate::metrics::SECCOMP.num_faults.add_one();
        crate::metrics::write_refusal();
        // SAFETY: both are async-signal-safe; the buffer is valid for its length.
        unsafe {
            libc::write(2, line.as_ptr().cast(), line.len());
            libc::_exit(REFUSED);
        }
    }
    // SAFETY: all-zero is a valid `sigaction`: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction =
        refused as extern "C" fn(libc::c_int, *const libc::siginfo_t, *const libc::c_void) as usize;
    // SAFETY: `action` is initialized, and its handler only makes async-signal-safe calls.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The way to the set-up thread.
static SET_UP: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();

/// Starts the set-up thread if filters were prepared and it does not run yet: a machine without virtio devices needs
/// none. The calling thread is the main one, restricted or not: its list holds all of the set-up thread's.
///
/// # Errors
/// No thread could be made.
pub fn start_set_up_thread() -> Result<(), SeccompError> {
    if FILTERS.get().is_none() || SET_UP.get().is_some() {
        return Ok(());
    }
    const STACK: usize = 256 << 10;
    let (sender, jobs) = mpsc::channel::<Job>();
    let run = move || match enter(ThreadKind::SetUp) {
        Ok(()) => jobs.iter().for_each(|job| job()),
        // Without it there is no thread to make workers: the next activation fails.
        Err(error) => crate::log::error!("{}", crate::error_chain(&error)),
    };
    let thread = std::thread::Builder::new().name("setup".to_owned()).stack_size(STACK).spawn(run);
    thread.map_err(SeccompError::Prepare)?;
    let _ = SET_UP.set(Mutex::new(sender));
    Ok(())
}

/// Runs `work` in the set-up thread and waits for it; in the calling thread if there are no filters. None if the
/// thread is gone, and then `work` was dropped.
pub fn set_up<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let Some(sender) = SET_UP.get() else { return Some(work()) };
    let (result, done) = mpsc::channel();
    let job = Box::new(move || {
        // Nobody waits any more only if the caller is gone, and with it the process.
        let _ = result.send(work());
    });
    sender.lock().unwrap_or_else(PoisonError::into_inner).send(job).ok()?;
    done.recv().ok()
}

#[cfg(test)]
mod tests;
