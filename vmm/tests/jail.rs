//! `mote-vmm jail` and the seccomp filters from outside, as the host sees them. Skipped, with the reason, without root
//! or a usable /dev/kvm.

#![expect(
    clippy::unwrap_used,
    reason = "a test may fail by panic; clippy.toml knows only functions marked as tests"
)]

mod small_guest;

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use small_guest::{HALT, elf, out, say_then};
use tempfile::TempDir;

/// Nothing takes longer, however busy the machine is.
const TIME_LIMIT: Duration = Duration::from_secs(60);
const PROGRAM: &str = env!("CARGO_BIN_EXE_mote-vmm");
const UID: u32 = 42_420;
const GID: u32 = 42_421;
/// Jumps to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];

/// A directory of jails with one in which a guest and its configuration are.
struct Jail {
    base: TempDir,
    id: String,
}

impl Jail {
    /// None, with the reason told, where there can be no jail.
    fn new(name: &str, code: &[u8]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: not root");
            return None;
        }
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIPPED: /dev/kvm cannot be used: {error}");
            return None;
        }
        let jail = Self { base: tempfile::tempdir().unwrap(), id: format!("{name}-{}", std::process::id()) };
        jail.furnish(code);
        Some(jail)
    }

    /// Puts guest and configuration into the jail's directory.
    fn furnish(&self, code: &[u8]) {
        fs::create_dir_all(self.root()).unwrap();
        fs::write(self.root().join("kernel"), elf(code, true)).unwrap();
        let config = serde_json::json!({
            "boot-source": {"kernel_image_path": "/kernel"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 16},
            "entropy": {},
        });
        fs::write(self.root().join("config"), config.to_string()).unwrap();
    }

    fn root(&self) -> PathBuf {
        self.base.path().join("mote-vmm").join(&self.id).join("root")
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["jail", "--id", &self.id, "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--chroot-base-dir").arg(self.base.path()).args(options);
        command.args(["--", "--no-api", "--config-file", "/config", "--level", "Off"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts it and waits until the guest has spoken.
    fn start(&self, options: &[&str]) -> Child {
        let mut child = self.command(options).spawn().unwrap();
        let mut byte = [0];
        if child.stdout.as_mut().unwrap().read_exact(&mut byte).is_err() {
            let output = child.wait_with_output().unwrap();
            panic!("{output:?}");
        }
        child
    }
}

fn terminate(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::SIGTERM).unwrap();
}

fn code_of(mut child: Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if start.elapsed() > TIME_LIMIT {
            child.kill().unwrap();
            panic!("the process does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A line of a /proc file that starts with `name`, without it.
fn line(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap();
    let found = text.lines().find_map(|line| line.strip_prefix(name));
    found.unwrap_or_else(|| panic!("no {name} in {path}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn link(path: &str) -> PathBuf {
    fs::read_link(path).unwrap()
}

#[test]
fn a_jailed_vm_has_an_unprivileged_user_its_own_namespaces_and_filters_on_every_thread() {
    let Some(jail) = Jail::new("whole", &say_then(b'J', &SPIN)) else { return };
    // A network namespace of a thread that lives as long as `keep`.
    let (keep, kept) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        tell.send(nix::unistd::gettid()).unwrap();
        let _ = kept.recv();
    });
    let network = format!("/proc/self/task/{}/ns/net", told.recv().unwrap());
    let network = format!("/proc/{}{}", std::process::id(), network.strip_prefix("/proc/self").unwrap());
    // An open file that a careless parent leaves to its children.
    let secret = fs::File::open("/proc/self/status").unwrap();
    nix::fcntl::fcntl(&secret, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let leaked = format!("fd/{}", secret.as_raw_fd());

    let child = jail.start(&["--netns", &network, "--resource-limit", "fsize=123456789"]);
    let process = format!("/proc/{}", child.id());
    let status = format!("{process}/status");
    assert_eq!(line(&status, "Uid:"), [UID; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(line(&status, "Gid:"), [GID; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(line(&status, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(line(&status, "NoNewPrivs:"), "1");
    let mut threads = 0;
    for task in fs::read_dir(format!("{process}/task")).unwrap() {
        let path = task.unwrap().path();
        let status = path.join("status");
        assert_eq!(line(status.to_str().unwrap(), "Seccomp:"), "2", "{}", path.display());
        threads += 1;
    }
    assert!(threads >= 4, "main, set-up, two vCPUs, and perhaps one of KVM's: {threads}");
    assert_eq!(line(&format!("{process}/limits"), "Max open files"), "2048 2048 files");
    assert_eq!(line(&format!("{process}/limits"), "Max file size"), "123456789 123456789 bytes");
    assert_eq!(link(&format!("{process}/ns/net")), link(&network));
    assert_ne!(link(&format!("{process}/ns/mnt")), link("/proc/self/ns/mnt"));
    assert!(fs::read(format!("{process}/environ")).unwrap().iter().all(|byte| *byte == 0));
    let mut names: Vec<_> =
        fs::read_dir(format!("{process}/root/")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config", "dev", "kernel", "run"]);
    assert_eq!(fs::read_to_string(format!("{process}/mounts")).unwrap().lines().count(), 1, "only the jail");
    if let Ok(target) = fs::read_link(format!("{process}/{leaked}")) {
        assert!(!target.ends_with("status"), "a descriptor was inherited: {}", target.display());
    }
    terminate(child.id());
    assert_eq!(code_of(child), Some(5));
    drop(keep);
}

#[test]
fn a_guest_in_the_jail_can_switch_itself_off() {
    let Some(jail) = Jail::new("off", &[&out(0x600, 0x34)[..], &HALT].concat()) else { return };
    let output = jail.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // A second start finds the directory of the first.
    assert_eq!(jail.command(&[]).output().unwrap().status.code(), Some(0));
}

#[test]
fn a_directory_of_somebody_else_is_a_jail_and_named_descriptors_stay_open() {
    let Some(jail) = Jail::new("own", &say_then(b'J', &SPIN)) else { return };
    let root = jail.base.path().join("elsewhere");
    fs::create_dir(&root).unwrap();
    for file in ["kernel", "config"] {
        fs::rename(jail.root().join(file), root.join(file)).unwrap();
    }
    let kept = fs::File::open("/proc/self/status").unwrap();
    let closed = fs::File::open("/proc/self/status").unwrap();
    for file in [&kept, &closed] {
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    }
    let number = kept.as_raw_fd().to_string();
    let child = jail.start(&["--root", root.to_str().unwrap(), "--keep-fd", &number]);
    let is_status = |file: &fs::File| {
        let place = format!("/proc/{}/fd/{}", child.id(), file.as_raw_fd());
        fs::read_link(place).is_ok_and(|target| target.ends_with("status"))
    };
    assert_eq!((is_status(&kept), is_status(&closed)), (true, false));
    for directory in [&root, &root.join("dev")] {
        assert_eq!(
            fs::metadata(directory).unwrap().uid(),
            0,
            "{}: the VM can't replace what is in it",
            directory.display()
        );
    }
    assert!(!jail.root().join("dev").exists());
    terminate(child.id());
    assert_eq!(code_of(child), Some(5));
}

#[test]
fn on_a_file_system_without_devices_the_jail_brings_its_own() {
    let code = [&out(0x600, 0x34)[..], &HALT].concat();
    let Some(jail) = Jail::new("nodev", &code) else { return };
    let output = std::thread::scope(|scope| {
        // In a mount namespace of this thread alone.
        let there = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
            nix::mount::mount(Some("x"), jail.base.path(), Some("tmpfs"), MsFlags::MS_NODEV, none).unwrap();
            jail.furnish(&code);
            jail.command(&[]).output().unwrap()
        };
        scope.spawn(there).join().unwrap()
    });
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_link_that_an_earlier_vm_left_is_not_followed() {
    let Some(jail) = Jail::new("link", &HALT) else { return };
    let outside = jail.base.path().join("outside");
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, jail.root().join("dev")).unwrap();
    let output = jail.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(152), "{output:?}");
    assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn values_of_cgroups_are_set_and_the_process_is_in_them() {
    let Some(jail) = Jail::new("cgroup", &say_then(b'J', &SPIN)) else { return };
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let place = mounts.lines().find(|line| {
        let words: Vec<_> = line.split(' ').collect();
        words[2] == "cgroup" && words[3].split(',').any(|option| option == "cpu")
    });
    let Some(place) = place else {
        return eprintln!("SKIPPED: no cgroup v1 hierarchy with the cpu controller");
    };
    let parent = format!("mote-test-{}", jail.id);
    let parent_path = Path::new(place.split(' ').nth(1).unwrap()).join(&parent);
    let group = parent_path.join(&jail.id);
    let child = jail.start(&["--parent-cgroup", &parent, "--cgroup", "cpu.shares=77"]);
    let shares = fs::read_to_string(group.join("cpu.shares"));
    let members = fs::read_to_string(group.join("cgroup.procs"));
    let pid = child.id();
    terminate(pid);
    let code = code_of(child);
    // The last thread leaves a moment after the process is seen to end.
    let start = Instant::now();
    while let Err(error) = fs::remove_dir(&group) {
        assert!(start.elapsed() < TIME_LIMIT, "{error}");
        std::thread::sleep(Duration::from_millis(2));
    }
    fs::remove_dir(&parent_path).unwrap();
    assert_eq!(shares.unwrap().trim(), "77");
    assert_eq!(members.unwrap().trim(), pid.to_string());
    assert_eq!(code, Some(5));
}

#[test]
fn in_a_pid_namespace_the_vm_is_process_1_and_its_pid_is_left_in_a_file() {
    let Some(jail) = Jail::new("pid", &say_then(b'J', &SPIN)) else { return };
    let child = jail.start(&["--new-pid-ns"]);
    let pid: u32 = fs::read_to_string(jail.root().join("mote-vmm.pid")).unwrap().parse().unwrap();
    assert_eq!(code_of(child), Some(0), "the parent's work is done");
    assert_eq!(line(&format!("/proc/{pid}/status"), "NSpid:"), format!("{pid} 1"));
    terminate(pid);
    let start = Instant::now();
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(start.elapsed() < TIME_LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_daemon_has_nothing_on_its_streams() {
    let Some(jail) = Jail::new("daemon", &[&out(0x600, 0x34)[..], &HALT].concat()) else { return };
    let output = jail.command(&["--daemonize"]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.len(), output.stderr.len()),
        (Some(0), 0, 0),
        "{output:?}"
    );
}

#[test]
fn what_cannot_be_jailed_is_refused_with_the_reason() {
    let Some(jail) = Jail::new("bad", &HALT) else { return };
    for (options, reason) in [
        (&["--exec-file", "/bin/ls"][..], "linked dynamically"),
        (&["--exec-file", "/no/such"], "/no/such"),
        (&["--netns", "/no/such"], "join the network namespace"),
        (&["--cgroup", "nothing.such=1"], "no cgroup version 1 hierarchy"),
        (&["--cgroup-version", "7"], "7"),
    ] {
        let output = jail.command(options).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
        assert!(text.contains(reason) || text.contains("network namespace"), "{text}");
    }
}

/// Runs a guest outside of a jail with these options; exit code and stderr.
fn run_unjailed(jail: &Jail, options: &[&str]) -> (Option<i32>, String) {
    let config = serde_json::json!({
        "boot-source": {"kernel_image_path": jail.root().join("kernel")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "metrics": {"metrics_path": jail.base.path().join("metrics")},
    });
    let file = jail.base.path().join("unjailed");
    fs::write(&file, config.to_string()).unwrap();
    let mut command = Command::new(PROGRAM);
    command
        .args(["--no-api", "--level", "Off", "--config-file"])
        .arg(file)
        .args(options)
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_refused_system_call_ends_the_process_with_148_and_its_number() {
    let Some(jail) = Jail::new("seccomp", &say_then(b'J', &out(0x600, 0x34))) else { return };
    assert_eq!(run_unjailed(&jail, &[]).0, Some(0));
    assert_eq!(run_unjailed(&jail, &["--no-seccomp"]).0, Some(0));
    // Everything but ioctl (16), without which a vCPU cannot run.
    let allow = |calls: &str| {
        format!(r#"{{"mismatch_action": "trap", "match_action": "allow", "filter": [{calls}]}}"#)
    };
    let all = r#"{"mismatch_action": "allow", "match_action": "trap", "filter": [{"syscall": "reboot"}]}"#;
    let vcpu = allow(
        &[
            "futex",
            "write",
            "mmap",
            "munmap",
            "mprotect",
            "exit_group",
            "rt_sigreturn",
            "rt_sigprocmask",
            "madvise",
        ]
        .map(|name| format!(r#"{{"syscall": "{name}"}}"#))
        .join(","),
    );
    let file = jail.base.path().join("filters");
    fs::write(&file, format!(r#"{{"main": {all}, "setup": {all}, "worker": {all}, "vcpu": {vcpu}}}"#))
        .unwrap();
    let (code, text) = run_unjailed(&jail, &["--seccomp-filter", file.to_str().unwrap()]);
    assert_eq!(code, Some(148), "{text}");
    assert!(text.contains("the seccomp filter refused system call 0016"), "{text}");
    let metrics = fs::read_to_string(jail.base.path().join("metrics")).unwrap();
    assert_eq!(metrics.lines().next_back(), Some(r#"{"seccomp":{"num_faults":1}}"#), "{metrics}");
    fs::write(&file, "{}").unwrap();
    let (code, text) = run_unjailed(&jail, &["--seccomp-filter", file.to_str().unwrap()]);
    assert_eq!(code, Some(152), "{text}");
}
