//! Filters in threads of their own. What is refused gets an error number of the tests here, since the real answer ends
//! the process; that one is tested from outside, in tests/jail.rs.

use super::*;

/// No call fails with this.
const REFUSED_ERRNO: i32 = 0xaaa;
/// Numbers of calls on x86-64, with room for new ones.
const CALLS: std::ops::Range<libc::c_long> = 0..500;
/// `uretprobe` and `uprobe`: Linux lets them pass every filter, and they are only of use to its own trampolines.
const NEVER_FILTERED: [libc::c_long; 2] = [335, 336];

/// Runs `test` in a thread with the filter of `kind`.
fn restricted<T: Send + 'static>(kind: ThreadKind, test: impl FnOnce() -> T + Send + 'static) -> T {
    let program = program::compile(lists::of(kind), SeccompAction::Errno(REFUSED_ERRNO as u32));
    std::thread::spawn(move || {
        seccompiler::apply_filter(&program).unwrap();
        test()
    })
    .join()
    .unwrap()
}

fn call(number: libc::c_long, arguments: [u64; 3]) -> io::Result<libc::c_long> {
    let [a, b, c] = arguments;
    // SAFETY: callers make sure that the call is refused or harmless with these arguments.
    let result = unsafe { libc::syscall(number, a, b, c, u64::MAX, u64::MAX, u64::MAX) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn is_refused(result: io::Result<libc::c_long>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(REFUSED_ERRNO))
}

fn listed(kind: ThreadKind) -> Vec<libc::c_long> {
    lists::of(kind).iter().flat_map(|group| group.calls).map(|(number, _)| *number).collect()
}

#[test]
fn each_filter_refuses_every_call_that_it_does_not_list() {
    for kind in ThreadKind::ALL {
        let listed = listed(kind);
        let passed = restricted(kind, move || {
            let unlisted =
                CALLS.filter(|number| !listed.contains(number) && !NEVER_FILTERED.contains(number));
            unlisted.filter(|number| !is_refused(call(*number, [u64::MAX; 3]))).collect::<Vec<_>>()
        });
        assert!(passed.is_empty(), "{}: {passed:?}", kind.name());
    }
}

#[test]
fn ioctls_that_are_not_listed_are_refused() {
    const TIOCSTI: u64 = 0x5412;
    const KVM_CREATE_VM: u64 = 0xae01;
    const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
    for (kind, refused, allowed) in [
        (ThreadKind::Vcpu, &[TIOCSTI, KVM_CREATE_VM, FS_IOC_SETFLAGS][..], &[0xae80][..]),
        (ThreadKind::Worker, &[TIOCSTI, KVM_CREATE_VM, 0xae80, FS_IOC_SETFLAGS], &[0x4004_54d0]),
        (ThreadKind::SetUp, &[TIOCSTI, KVM_CREATE_VM, FS_IOC_SETFLAGS], &[0x4004_54d0]),
        (ThreadKind::Main, &[TIOCSTI, FS_IOC_SETFLAGS], &[0xae80]),
    ] {
        restricted(kind, move || {
            for request in refused {
                assert!(is_refused(call(libc::SYS_ioctl, [u64::MAX, *request, 0])), "{kind:?} {request:#x}");
            }
            for request in allowed {
                let error = call(libc::SYS_ioctl, [u64::MAX, *request, 0]).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{kind:?} {request:#x}");
            }
        });
    }
}

#[test]
fn a_vcpu_opens_nothing_but_the_serial_log() {
    restricted(ThreadKind::Vcpu, || {
        let path = c"/dev/null".as_ptr() as u64;
        let open = |flags: i32| call(libc::SYS_openat, [libc::AT_FDCWD as u64, path, flags as u64]);
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_CLOEXEC] {
            assert!(is_refused(open(flags)), "{flags:#o}");
        }
        assert!(is_refused(call(libc::SYS_execve, [path, 0, 0])));
        assert!(is_refused(call(libc::SYS_socket, [libc::AF_INET as u64, 1, 0])));
        let log = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = open(log).unwrap();
        call(libc::SYS_close, [fd as u64, 0, 0]).unwrap();
    });
}

#[test]
fn no_thread_may_open_a_socket_of_another_family_than_unix() {
    for kind in ThreadKind::ALL {
        restricted(kind, move || {
            for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET] {
                assert!(is_refused(call(libc::SYS_socket, [family as u64, 1, 0])), "{kind:?} {family}");
            }
        });
    }
}

#[test]
fn what_a_thread_may_do_the_one_that_makes_it_may_do() {
    for (made, maker) in [(ThreadKind::Worker, ThreadKind::SetUp), (ThreadKind::SetUp, ThreadKind::Main)] {
        let maker: Vec<_> = lists::of(maker).iter().map(|group| group.reason).collect();
        assert!(lists::of(made).iter().all(|group| maker.contains(&group.reason)), "{made:?}");
    }
}

#[test]
fn no_call_is_listed_twice_for_one_kind_but_with_other_arguments() {
    for kind in ThreadKind::ALL {
        let mut whole: Vec<_> = lists::of(kind)
            .iter()
            .flat_map(|group| group.calls)
            .filter(|(_, arguments)| arguments.condition().is_none())
            .map(|(number, _)| *number)
            .collect();
        let count = whole.len();
        whole.sort_unstable();
        whole.dedup();
        assert_eq!(whole.len(), count, "{}", kind.name());
        assert!(lists::of(kind).iter().all(|group| !group.reason.is_empty() && !group.calls.is_empty()));
    }
}

#[test]
fn a_file_needs_a_filter_for_every_kind() {
    let filter = r#"{"mismatch_action": "trap", "match_action": "allow", "filter": [{"syscall": "read"}]}"#;
    let write = |names: &[&str]| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let filters: Vec<_> = names.iter().map(|name| format!("{name:?}: {filter}")).collect();
        std::fs::write(file.path(), format!("{{{}}}", filters.join(","))).unwrap();
        file
    };
    let whole = write(&["main", "setup", "worker", "vcpu"]);
    assert!(from_file(whole.path()).unwrap().iter().all(|program| !program.is_empty()));
    let part = write(&["main", "vcpu"]);
    assert!(matches!(from_file(part.path()), Err(SeccompError::Missing("setup"))));
    let broken = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(broken.path(), "{").unwrap();
    assert!(matches!(from_file(broken.path()), Err(SeccompError::Compile(_))));
    assert!(matches!(from_file(Path::new("/no/such/file")), Err(SeccompError::Read(_))));
}
