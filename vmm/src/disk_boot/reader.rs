//! The process that reads a tenant's disk: forked for it, with no way to reach anything but the disk's files, three files in memory, and its own
//! memory, and with limits of time and size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::{Disk, DiskBootError, Found, search};

/// Processor time that the reader may take, in seconds.
const CPU_SECONDS: u64 = 30;
/// Memory that it may have beyond what the process has already, in bytes.
const MEMORY: u64 = 256 << 20;
/// Longest answer, in bytes: a command line or a refusal.
const MAX_ANSWER: usize = 16 << 10;

/// How the reader ended.
mod code {
    pub const FOUND: i32 = 0;
    pub const FOUND_WITH_INITRD: i32 = 1;
    pub const REFUSED: i32 = 2;
    pub const PANIC: i32 = 3;
    pub const NO_LIMITS: i32 = 4;
}

/// What it may ask of the kernel: its memory, reading at a place and closing, the locks of the allocator, and its end. Writing is listed apart, since
/// only three descriptors may be written.
const CALLS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_pread64,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Reads `disk` in a process of its own. Kernel and initrd may have `limit` bytes together.
///
/// # Errors
/// The process can't be made, or finds nothing to boot.
pub fn read(disk: Box<dyn Disk>, limit: u64) -> Result<Found, DiskBootError> {
    let make = |name| memory_file(name).map_err(DiskBootError::Process);
    let (mut kernel, mut initrd, mut answer) = (make(c"kernel")?, make(c"initrd")?, make(c"answer")?);
    let filter = filter(&[&kernel, &initrd, &answer]).map_err(DiskBootError::Process)?;
    // SAFETY: the child runs only `child`, which never returns and ends by _exit: no destructor and no handler of this
    // process runs twice. It makes no use of other threads, and the allocator of the C library may be used after a fork.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => return Err(DiskBootError::Process(io::Error::last_os_error())),
        0 => child(disk, limit, [&mut kernel, &mut initrd, &mut answer], &filter),
        _ => {}
    }
    let code = wait(pid).map_err(DiskBootError::Process)?;
    answer.seek(SeekFrom::Start(0)).map_err(DiskBootError::Process)?;
    let mut text = Vec::new();
    (&answer).take(MAX_ANSWER as u64).read_to_end(&mut text).map_err(DiskBootError::Process)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    match code {
        Some(code @ (code::FOUND | code::FOUND_WITH_INITRD)) => {
            Ok(Found { kernel, initrd: (code == code::FOUND_WITH_INITRD).then_some(initrd), options: text })
        }
        Some(code::REFUSED) => Err(DiskBootError::Refused(text)),
        Some(code::NO_LIMITS) => Err(DiskBootError::Process(io::Error::other("it could not be restricted"))),
        // Out of memory or time, a call that isn't its own, or a mistake in the reader: all by what is on the disk.
        _ => Err(DiskBootError::Broken),
    }
}

fn memory_file(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: `name` is a C string; the call has no other pointer.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn filter(writable: &[&File]) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<_, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let only = |file: &&File| {
        let fd = file.as_raw_fd() as u64;
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, fd);
        condition.and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let writes = writable.iter().map(only).collect::<Result<_, _>>().map_err(io::Error::other)?;
    rules.insert(libc::SYS_write, writes);
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, kill, allow, TargetArch::x86_64).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

/// The child's whole life.
fn child(
    disk: Box<dyn Disk>,
    limit: u64,
    [kernel, initrd, answer]: [&mut File; 3],
    filter: &BpfProgram,
) -> ! {
    // What a disk makes it say goes nowhere: the parent says that the disk is broken.
    std::panic::set_hook(Box::new(|_| {}));
    let code = match restrict(limit, filter) {
        Err(_) => code::NO_LIMITS,
        Ok(()) => catch_unwind(AssertUnwindSafe(|| {
            let (text, code) = match search::search(disk, limit, kernel, initrd) {
                Ok((options, false)) => (options, code::FOUND),
                Ok((options, true)) => (options, code::FOUND_WITH_INITRD),
                Err(refusal) => (refusal, code::REFUSED),
            };
            let end = text.len().min(MAX_ANSWER);
            match answer.write_all(&text.as_bytes()[..end]) {
                Ok(()) => code,
                Err(_) => code::PANIC,
            }
        }))
        .unwrap_or(code::PANIC),
    };
    // SAFETY: ends the process at once, which is what the fork relies on.
    unsafe { libc::_exit(code) }
}

fn restrict(limit: u64, filter: &BpfProgram) -> io::Result<()> {
    let used = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = used.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    // In a jail there may be no /proc; the address space then has no limit of its own, and the files have theirs.
    let limits = [
        (libc::RLIMIT_CPU, Some(CPU_SECONDS)),
        (libc::RLIMIT_FSIZE, Some(limit.max(MAX_ANSWER as u64))),
        (libc::RLIMIT_CORE, Some(0)),
        (libc::RLIMIT_AS, pages.map(|pages| pages * 4096 + MEMORY)),
    ];
    for (resource, value) in limits {
        let Some(value) = value else { continue };
        let value = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: `value` is valid for the call.
        if unsafe { libc::setrlimit(resource, &raw const value) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: integers only. If the VMM is killed, this process ends with it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

/// The exit code; None if a signal ended it.
fn wait(pid: libc::pid_t) -> io::Result<Option<i32>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is valid for writes, and `pid` is a child that nobody else waits for.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
            return Ok(libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
