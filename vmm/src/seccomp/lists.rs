//! What each kind of thread may ask of the kernel, in groups, each with its reason.
//!
//! **To add a call:** put it in the group whose reason is its reason, or make a new group with a reason and name it in
//! [`of`]. A test (tests/guest/tests/seccomp.rs) runs microVMs and finds what no thread uses; what it can't meet is in groups
//! that say [`elsewhere`](Group::elsewhere). A worker's call must be in the list of the set-up thread, too, which makes workers; [`SET_UP`] holds all of
//! [`WORKER`]. Prefer a restriction of an argument (`ioctl` always has one).

use libc::{
    SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close,
    SYS_connect, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_eventfd2, SYS_exit,
    SYS_exit_group, SYS_fallocate, SYS_fcntl, SYS_fdatasync, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync,
    SYS_ftruncate, SYS_futex, SYS_getpid, SYS_getrandom, SYS_getsockopt, SYS_gettid, SYS_io_uring_enter,
    SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect,
    SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_poll, SYS_prctl, SYS_pread64,
    SYS_preadv, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_rename,
    SYS_restart_syscall, SYS_rseq, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_yield, SYS_seccomp,
    SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_setsockopt, SYS_shutdown, SYS_socket, SYS_statx,
    SYS_tgkill, SYS_timerfd_settime, SYS_unlink, SYS_write, SYS_writev, c_long,
};

use super::ThreadKind;

/// Which arguments a call may have.
#[derive(Debug, Clone, Copy)]
pub enum Arguments {
    /// Any.
    All,
    /// Argument `.0` (from 0) is one of these 32-bit values.
    OneOf(u8, &'static [u32]),
    /// Argument 1 (the request of an ioctl) has one of these types, its bits 8 to 15.
    IoctlTypes(&'static [u32]),
}

impl Arguments {
    /// The argument, its values and the bits that count.
    pub(super) const fn condition(&self) -> Option<(u8, &'static [u32], u32)> {
        match self {
            Self::All => None,
            Self::OneOf(index, values) => Some((*index, values, u32::MAX)),
            Self::IoctlTypes(values) => Some((1, values, 0xff00)),
        }
    }
}

/// Calls with one reason.
#[derive(Debug)]
pub struct Group {
    /// Why threads of this kind make them.
    pub reason: &'static str,
    /// Number and arguments.
    pub calls: &'static [(c_long, Arguments)],
    /// What makes these calls where the test doesn't meet it; None for calls that its threads make.
    pub elsewhere: Option<&'static str>,
}

use Arguments::{All, IoctlTypes, OneOf};

const MEMORY: Group = Group {
    reason: "the allocator, and stacks that go with their threads",
    elsewhere: None,
    calls: &[(SYS_brk, All), (SYS_madvise, All), (SYS_mmap, All), (SYS_mprotect, All), (SYS_munmap, All)],
};

const THREADS: Group = Group {
    reason: "locks, clocks where the vDSO has none, seeds of hash maps, signals, and the end of a thread or the process",
    elsewhere: None,
    calls: &[
        (SYS_getrandom, All),
        (SYS_exit, All),
        (SYS_exit_group, All),
        (SYS_futex, All),
        (SYS_rt_sigprocmask, All),
        (SYS_rt_sigreturn, All),
    ],
};

const THREADS_ELSEWHERE: Group = Group {
    reason: "allocations of megabytes that grow, clocks, pauses, locks that many want at once, and the message of a panic",
    elsewhere: Some(
        "hosts whose clock the vDSO can't read; another libc; a process that was stopped; threads that meet in a channel; a panic, \
         whose message names the thread",
    ),
    calls: &[
        (SYS_clock_gettime, All),
        (SYS_clock_nanosleep, All),
        (SYS_gettid, All),
        (SYS_mremap, All),
        (SYS_nanosleep, All),
        (SYS_restart_syscall, All),
        (SYS_sched_yield, All),
    ],
};

const DESCRIPTORS: Group = Group {
    reason: "eventfds, the log, and looking whether something is ready",
    elsewhere: None,
    calls: &[(SYS_close, All), (SYS_poll, All), (SYS_read, All), (SYS_write, All)],
};

/// `KVM_RUN`, `KVM_KVMCLOCK_CTRL`, what a crash report reads (`KVM_GET_REGS`, `KVM_GET_SREGS`), and what a write to the
/// I/O APIC or to a PCI function changes (`KVM_SET_GSI_ROUTING`, `KVM_IRQFD`, `KVM_IOEVENTFD`).
const VCPU_IOCTLS: &[u32] =
    &[0xae80, 0xaead, 0x8090_ae81, 0x8138_ae83, 0x4008_ae6a, 0x4020_ae76, 0x4040_ae79];

const RUN: Group = Group {
    reason: "running the guest, and the interrupts and notifications that it moves",
    elsewhere: None,
    calls: &[(SYS_ioctl, OneOf(1, VCPU_IOCTLS))],
};

/// `KVM_GET_` `MP_STATE`, `XSAVE`, `XCRS`, `DEBUGREGS`, `LAPIC`, `VCPU_EVENTS`, `TSC_KHZ`, `MSRS`, `MSR_INDEX_LIST`;
/// `KVM_CHECK_EXTENSION`.
const STATE_IOCTLS: &[u32] = &[
    0x8004_ae98,
    0x9000_aea4,
    0x8188_aea6,
    0x8080_aea1,
    0x8400_ae8e,
    0x8040_ae9f,
    0xaea3,
    0xc008_ae88,
    0xc004_ae02,
    0xae03,
];

const STATE: Group = Group {
    reason: "the processor's state for a snapshot, which its own thread reads",
    elsewhere: None,
    calls: &[(SYS_ioctl, OneOf(1, STATE_IOCTLS))],
};

/// `KVM_GET_XSAVE2`.
const LARGE_STATE_IOCTLS: &[u32] = &[0x9000_aecf];

const LARGE_STATE: Group = Group {
    reason: "the processor's state for a snapshot where it doesn't fit into 4 KiB",
    elsewhere: Some("processors with more registers (AMX)"),
    calls: &[(SYS_ioctl, OneOf(1, LARGE_STATE_IOCTLS))],
};

/// `O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK`.
const LOG_FLAGS: &[u32] = &[0o2_006_101];

const SERIAL: Group = Group {
    reason: "the serial port's output: a bounded file is renamed and started anew, clients of the socket are sent it",
    elsewhere: None,
    calls: &[
        (SYS_openat, OneOf(2, LOG_FLAGS)),
        (SYS_rename, All),
        (SYS_statx, All),
        (SYS_sendto, All),
        (SYS_timerfd_settime, All),
    ],
};

const WAIT: Group = Group {
    reason: "waiting for queues, taps, sockets and timers",
    elsewhere: None,
    calls: &[(SYS_epoll_create1, All), (SYS_epoll_ctl, All), (SYS_epoll_wait, All), (SYS_eventfd2, All)],
};

const MESSAGES: Group = Group {
    reason: "requests of the API's clients with the taps that they send along, and answers of backends (vhost-user) of drives",
    elsewhere: None,
    calls: &[(SYS_recvmsg, All)],
};

const OTHER_LIBC: Group = Group {
    reason: "what glibc does by newer calls",
    elsewhere: Some("another libc (musl), or a kernel before clone3 and statx"),
    calls: &[(SYS_clone, All), (SYS_epoll_pwait, All), (SYS_fstat, All), (SYS_newfstatat, All)],
};

const LOCKS: Group = Group {
    reason: "images that no other process may write meanwhile",
    elsewhere: Some("qcow2 images that are plugged in or exchanged while the guest runs"),
    calls: &[(SYS_flock, All)],
};

const SERIAL_TIMER: Group = Group {
    reason: "output of the serial port that could not be written yet",
    elsewhere: Some("a pipe or a terminal that takes nothing for a while"),
    calls: &[(SYS_timerfd_settime, All)],
};

const OTHER_DISKS: Group = Group {
    reason: "drives: discard, write-zeroes, and the tables of qcow2 images",
    elsewhere: Some(
        "discards, which this guest doesn't send, and qcow2 images, with which tests/qcow2.rs runs it",
    ),
    calls: &[(SYS_fallocate, All), (SYS_pread64, All)],
};

const DISK: Group = Group {
    reason: "drives: data, flush, discard, write-zeroes, and the size after a change of the file",
    elsewhere: None,
    calls: &[
        (SYS_fdatasync, All),
        (SYS_fsync, All),
        (SYS_ftruncate, All),
        (SYS_lseek, All),
        (SYS_preadv, All),
        (SYS_pwrite64, All),
        (SYS_pwritev, All),
        (SYS_statx, All),
    ],
};

const IO_URING: Group = Group {
    reason: "drives with io_engine Async; the file and the guest's memory are registered, nothing is opened through it",
    elsewhere: None,
    calls: &[(SYS_io_uring_enter, All), (SYS_io_uring_register, All), (SYS_io_uring_setup, All)],
};

const NETWORK: Group = Group {
    reason: "taps, and sockets that are open already",
    elsewhere: None,
    calls: &[(SYS_accept4, All), (SYS_readv, All), (SYS_recvfrom, All), (SYS_sendto, All), (SYS_writev, All)],
};

const CONNECTIONS: Group = Group {
    reason: "connections of vsock, and backends (vhost-user) of drives",
    elsewhere: Some("a guest with a driver for vsock, and a backend; unit tests have both"),
    calls: &[
        (SYS_connect, All),
        (SYS_getsockopt, All),
        (SYS_sendmsg, All),
        (SYS_setsockopt, All),
        (SYS_shutdown, All),
        (SYS_socket, OneOf(0, &[libc::AF_UNIX as u32])),
    ],
};

/// Taps: `TUNSETIFF`, `TUNGETIFF`, `TUNSETOFFLOAD`, `TUNSETVNETHDRSZ`. Descriptors: `FIONBIO`.
const DEVICE_IOCTLS: &[u32] = &[0x4004_54ca, 0x8004_54d2, 0x4004_54d0, 0x4004_54d8, 0x5421];

const DEVICES: Group = Group {
    reason: "queues, offloads and link of a tap",
    elsewhere: None,
    calls: &[(SYS_ioctl, OneOf(1, DEVICE_IOCTLS)), (SYS_fcntl, All)],
};

/// Taps: `TUNSETQUEUE`, `TUNGETFEATURES`, `TUNSETVNETLE`. Descriptors: `FIONREAD`, `FIOCLEX`. The terminal of the serial
/// port: `TCGETS`, `TCSETS`, `TCSETSW`.
const OTHER_DEVICE_IOCTLS: &[u32] =
    &[0x4004_54d9, 0x8004_54cf, 0x4004_54dc, 0x541b, 0x5451, 0x5401, 0x5402, 0x5403];
/// Block devices and vhost.
const DEVICE_IOCTL_TYPES: &[u32] = &[0x1200, 0xaf00];

const OTHER_DEVICES: Group = Group {
    reason: "several queues of a tap, size of and discard on a block device, vhost, a terminal as the serial port",
    elsewhere: Some("taps that have several queues, block devices, vhost and a terminal"),
    calls: &[(SYS_ioctl, OneOf(1, OTHER_DEVICE_IOCTLS)), (SYS_ioctl, IoctlTypes(DEVICE_IOCTL_TYPES))],
};

const MAKE_THREADS: Group = Group {
    reason: "making threads, with their names and their own filters",
    elsewhere: None,
    calls: &[
        (SYS_clone3, All),
        (SYS_prctl, All),
        (SYS_rseq, All),
        (SYS_seccomp, All),
        (SYS_set_robust_list, All),
    ],
};

const FILES: Group = Group {
    reason: "what API requests name: drives, logs, metrics, snapshots; the exit report; sockets that are removed",
    elsewhere: None,
    calls: &[(SYS_fstatfs, All), (SYS_openat, All), (SYS_rename, All), (SYS_unlink, All)],
};

/// KVM: interrupts of devices that are added, and the state of the machine.
const MAIN_IOCTLS: &[u32] = &[0xae00];

const MACHINE: Group = Group {
    reason: "devices that come and go, pause, snapshots; kicks to the vCPUs",
    elsewhere: None,
    calls: &[(SYS_ioctl, IoctlTypes(MAIN_IOCTLS)), (SYS_getpid, All), (SYS_tgkill, All)],
};

/// `KVM_SET_USER_MEMORY_REGION`.
const MEMORY_SLOT_IOCTLS: &[u32] = &[0x4020_ae46];

const MEMORY_SLOTS: Group = Group {
    reason: "memory that the guest plugs or unplugs (virtio-mem) is shown to it or hidden from it",
    elsewhere: None,
    calls: &[(SYS_ioctl, OneOf(1, MEMORY_SLOT_IOCTLS))],
};

const VCPU: &[&Group] =
    &[&MEMORY, &THREADS, &THREADS_ELSEWHERE, &DESCRIPTORS, &RUN, &STATE, &LARGE_STATE, &SERIAL];
const WORKER: &[&Group] = &[
    &MEMORY,
    &THREADS,
    &THREADS_ELSEWHERE,
    &DESCRIPTORS,
    &WAIT,
    &OTHER_LIBC,
    &DISK,
    &OTHER_DISKS,
    &IO_URING,
    &NETWORK,
    &CONNECTIONS,
    &MESSAGES,
    &DEVICES,
    &OTHER_DEVICES,
];
const SET_UP: &[&Group] = &[
    &MEMORY,
    &THREADS,
    &THREADS_ELSEWHERE,
    &DESCRIPTORS,
    &WAIT,
    &OTHER_LIBC,
    &DISK,
    &OTHER_DISKS,
    &IO_URING,
    &NETWORK,
    &CONNECTIONS,
    &MESSAGES,
    &DEVICES,
    &OTHER_DEVICES,
    &MAKE_THREADS,
    &MEMORY_SLOTS,
];
const MAIN: &[&Group] = &[
    &MEMORY,
    &THREADS,
    &THREADS_ELSEWHERE,
    &DESCRIPTORS,
    &WAIT,
    &OTHER_LIBC,
    &DISK,
    &OTHER_DISKS,
    &IO_URING,
    &NETWORK,
    &CONNECTIONS,
    &DEVICES,
    &OTHER_DEVICES,
    &MAKE_THREADS,
    &FILES,
    &MESSAGES,
    &LOCKS,
    &SERIAL_TIMER,
    &MEMORY_SLOTS,
    &MACHINE,
];

/// The groups of a kind of thread.
pub const fn of(kind: ThreadKind) -> &'static [&'static Group] {
    match kind {
        ThreadKind::Main => MAIN,
        ThreadKind::SetUp => SET_UP,
        ThreadKind::Worker => WORKER,
        ThreadKind::Vcpu => VCPU,
    }
}
