//! Many starts and stops leave nothing: no file, descriptor, process, tap or cgroup, and later ones need no more than the
//! first. `MOTE_CYCLES` is how many of each kind (1000 for a long run). Skipped where /dev/kvm, root or /dev/net/tun is absent
//! or the programs aren't built.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mote_guest::host::{self, Unavailable};
use mote_vmm_api::{Serial, VmConfig, Vsock};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const TIME_LIMIT: Duration = Duration::from_secs(60);
const CYCLES: u64 = 15;
/// Memory of a process that starts late may be this much more than that of one that starts early.
const GROWTH_KIB: u64 = 2048;
const UID: &str = "42420";

fn cycles() -> u64 {
    std::env::var("MOTE_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(CYCLES)
}

fn entries(directory: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

/// Paths of cgroups with this name.
fn cgroups(name: &str) -> Vec<OsString> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let roots =
        mounts.lines().filter(|line| line.contains(" cgroup")).filter_map(|line| line.split(' ').nth(1));
    roots
        .flat_map(|root| {
            entries(Path::new(root)).into_iter().chain(entries(&Path::new(root).join("mote-cycles")))
        })
        .filter(|entry| entry.to_string_lossy().contains(name))
        .collect()
}

/// What there is on the host of which a VM has some.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    files: BTreeSet<OsString>,
    descriptors: usize,
    processes: usize,
    interfaces: BTreeSet<OsString>,
    mounts: usize,
    cgroups: Vec<OsString>,
}

fn traces(directory: &Path) -> Traces {
    let named = directory.display().to_string();
    let runs_here = |entry: &OsString| {
        let command = fs::read(Path::new("/proc").join(entry).join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(&named)
    };
    Traces {
        files: entries(directory),
        descriptors: entries(Path::new("/proc/self/fd")).len(),
        processes: entries(Path::new("/proc")).iter().filter(|entry| runs_here(entry)).count(),
        interfaces: entries(Path::new("/proc/self/task/self/net/dev_snmp6"))
            .into_iter()
            .chain(entries(Path::new("/proc/thread-self/net/dev_snmp6")))
            .collect(),
        // Others mount things meanwhile.
        mounts: fs::read_to_string("/proc/self/mounts").unwrap_or_default().matches(&named).count(),
        cgroups: cgroups(&format!("cycles-{}", std::process::id())),
    }
}

/// Everything that leaves a trace: sockets, a tap of its own, a drive.
fn config(guest: &Path, line: &str, directory: &Path, tap: &str) -> VmConfig {
    let disk = directory.join("disk");
    fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("a sparse file");
    let mut config = host::config(guest, line);
    host::add_drive(&mut config, "disk", &disk, false);
    host::add_rng(&mut config);
    host::add_tap(&mut config, tap, "06:00:ac:10:00:02");
    config.vsock = Some(Vsock { guest_cid: 3, uds_path: directory.join("vsock"), vsock_id: None });
    config.serial = Some(Serial { socket_path: Some(directory.join("serial")), ..Serial::default() });
    config
}

fn spawn(vmm: &Path, arguments: &[OsString]) -> Child {
    let mut command = Command::new(vmm);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("the monitor starts")
}

fn end(mut child: Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        match child.try_wait().expect("a child") {
            Some(status) => return status.code(),
            None if start.elapsed() > TIME_LIMIT => {
                let _ = child.kill();
                panic!("no end: {:?}", child.wait());
            }
            None => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Resident memory of a process in KiB.
fn resident_kib(child: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// Starts, waits until the API answers "Running", stops; returns how much memory it had.
fn start_and_stop(vmm: &Path, directory: &Path) -> u64 {
    let socket = directory.join("api");
    let config = directory.join("spin.json");
    let arguments = ["--api-sock".into(), socket.clone().into(), "--config-file".into(), config.into()];
    let child = spawn(vmm, &arguments);
    let (status, body) = host::request(&socket, "GET", "/", "").expect("an answer");
    assert!(status == 200 && body.contains("Running"), "{body}");
    let memory = resident_kib(&child);
    // The child is not reaped before `end`, so the id is still its own.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).expect("a signal");
    assert_eq!(end(child), Some(5));
    memory
}

fn cycle() -> Result<(), Unavailable> {
    host::kvm_usable()?;
    let (vmm, guest) = (host::vmm_path()?, host::guest_path()?);
    host::enter_network(&["10.77.0.1/24"])?;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path();
    for (name, line) in [("spin.json", "mote.spin"), ("hello.json", "mote.hello")] {
        let config = config(&guest, line, path, "cycle0");
        fs::write(path.join(name), serde_json::to_vec(&config).expect("plain data")).expect("a file");
    }
    let hello = ["--no-api".into(), "--config-file".into(), path.join("hello.json").into()];

    // The first of each kind makes what stays, if anything does.
    let first = start_and_stop(&vmm, path);
    assert_eq!(end(spawn(&vmm, &hello)), Some(0));
    let before = traces(path);
    assert!(before.processes == 0 && before.cgroups.is_empty(), "{before:?}");
    let mut last = first;
    for number in 0..cycles() {
        last = start_and_stop(&vmm, path);
        assert_eq!(end(spawn(&vmm, &hello)), Some(0), "cycle {number}");
    }
    assert_eq!(traces(path), before);
    assert!(last <= first + GROWTH_KIB, "{first} KiB became {last} KiB");
    eprintln!("{} cycles: {first} KiB at first, {last} KiB at last", cycles());
    jailed_cycles(&vmm, &guest, path)
}

/// The same in jails: a chroot, namespaces, a user and (where there is a hierarchy) a cgroup each.
fn jailed_cycles(vmm: &Path, guest: &Path, directory: &Path) -> Result<(), Unavailable> {
    let base = directory.join("jails");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let has_cpu = mounts.lines().any(|line| {
        let words: Vec<_> = line.split(' ').collect();
        words[2] == "cgroup" && words[3].split(',').any(|option| option == "cpu")
    });
    let jail = |number: u64| {
        let id = format!("cycles-{}-{number}", std::process::id());
        let root = base.join("mote-vmm").join(&id).join("root");
        fs::create_dir_all(&root).expect("a directory");
        fs::copy(guest, root.join("guest")).expect("a copy");
        let config = host::config(Path::new("/guest"), "mote.hello");
        fs::write(root.join("config"), serde_json::to_vec(&config).expect("plain data")).expect("a file");
        let mut arguments: Vec<OsString> =
            ["jail", "--id", &id, "--uid", UID, "--gid", UID].map(Into::into).to_vec();
        arguments.extend(["--chroot-base-dir".into(), base.clone().into()]);
        let group = format!("mote-cycles/{id}");
        if has_cpu {
            arguments
                .extend(["--parent-cgroup", "mote-cycles", "--cgroup", "cpu.shares=64"].map(OsString::from));
        }
        arguments
            .extend(["--", "--no-api", "--config-file", "/config", "--level", "Off"].map(OsString::from));
        assert_eq!(end(spawn(vmm, &arguments)), Some(0), "jail {number}");
        fs::remove_dir_all(base.join("mote-vmm").join(&id)).expect("nothing is mounted there");
        // As with Firecracker's jailer, who starts a jail removes its cgroup: it must be empty.
        for line in mounts.lines().filter(|line| line.contains(" cgroup")) {
            let Some(root) = line.split(' ').nth(1) else { continue };
            let group = Path::new(root).join(&group);
            if group.exists() {
                fs::remove_dir(&group).expect("a cgroup without processes");
            }
        }
    };
    jail(0);
    let before = traces(directory);
    (1..=cycles().min(200)).for_each(jail);
    assert_eq!(traces(directory), before);
    for line in mounts.lines().filter(|line| line.contains(" cgroup")) {
        let _ = line.split(' ').nth(1).map(|root| fs::remove_dir(Path::new(root).join("mote-cycles")));
    }
    Ok(())
}

#[test]
fn many_starts_and_stops_leave_nothing() {
    match thread::spawn(cycle).join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
