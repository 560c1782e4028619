//! Drives that another process serves: the conformance guest against qemu-storage-daemon (Debian's qemu-system-common). Skipped
//! where that or /dev/kvm is absent or the programs aren't built.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mote_guest::host::{self, Monitor, Running, Unavailable};
use mote_vmm_api::{CacheType, Drive, ExitReason, VmConfig};
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 8 << 20;
const DAEMON: &str = "qemu-storage-daemon";

fn programs() -> Result<(PathBuf, PathBuf), Unavailable> {
    host::kvm_usable()?;
    let found = Command::new(DAEMON).arg("--version").stdout(Stdio::null()).status();
    found.map_err(|error| Unavailable(format!("{DAEMON}: {error}")))?;
    Ok((host::vmm_path()?, host::guest_path()?))
}

/// The programs, or a line that says why the test is skipped.
macro_rules! programs_or_skip {
    () => {
        match programs() {
            Ok(programs) => programs,
            Err(why) => return eprintln!("SKIPPED: {why}"),
        }
    };
}

/// A backend with its disk; killed when dropped.
struct Backend {
    child: Child,
    socket: PathBuf,
}

impl Backend {
    fn start(directory: &Path, name: &str, options: &str) -> Self {
        let at = |suffix: &str| directory.join(format!("{name}{suffix}"));
        let (disk, socket, ready) = (at(""), at(".socket"), at(".ready"));
        if !disk.exists() {
            File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).expect("a sparse file");
        }
        let _ = fs::remove_file(&ready);
        let blockdev = format!("driver=file,node-name=disk,filename={}", disk.display());
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={}{options}",
            socket.display()
        );
        let child = Command::new(DAEMON)
            .args(["--blockdev", &blockdev, "--export", &export, "--pidfile"])
            .arg(&ready)
            .stdin(Stdio::null())
            .spawn()
            .expect("the daemon starts");
        let backend = Self { child, socket };
        let end = Instant::now() + TIMEOUT;
        while !ready.exists() {
            assert!(Instant::now() < end, "{DAEMON} is not ready");
            thread::sleep(Duration::from_millis(2));
        }
        backend
    }

    fn drive(&self, id: &str) -> Drive {
        Drive {
            drive_id: id.into(),
            socket: Some(self.socket.clone()),
            cache_type: CacheType::Writeback,
            ..Drive::default()
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Left by one that is killed.
        let _ = fs::remove_file(&self.socket);
    }
}

/// Both transports, one processor and several.
fn each_machine(vmm: &Path, mut test: impl FnMut(&Monitor, u8)) {
    for monitor in [Monitor::Mote(vmm.to_owned()), Monitor::MotePci(vmm.to_owned())] {
        for processors in [1, 3] {
            test(&monitor, processors);
        }
    }
}

/// What the guest leaves in the first and last 32 sectors (tests/guest/src/guest/test/mod.rs, `pattern`).
fn assert_pattern(disk: &Path) {
    let file = File::open(disk).expect("the disk");
    let sectors = DISK_BYTES / 512;
    for sector in (0..32).chain(sectors - 32..sectors) {
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, sector * 512).expect("a sector");
        for (word, found) in bytes.chunks_exact(8).enumerate() {
            let expected = (sector * 64 + word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(found, expected.to_le_bytes(), "word {word} of sector {sector}");
        }
    }
}

#[test]
fn the_guest_passes_on_drives_that_another_process_serves() {
    let (vmm, guest) = programs_or_skip!();
    each_machine(&vmm, |monitor, processors| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let data = Backend::start(directory.path(), "data", ",writable=on,num-queues=2");
        let fixed = Backend::start(directory.path(), "fixed", "");
        let mut config = host::config(&guest, "mote.test mote.expect=0,2,0 mote.read_only=1");
        config.machine_config.vcpu_count = processors;
        config.drives = vec![
            Drive { num_queues: Some(2), ..data.drive("data") },
            Drive { is_read_only: true, ..fixed.drive("fixed") },
        ];
        let outcome = host::run(monitor, &config, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        if let Err(why) = outcome.report().verdict() {
            panic!("{why}\n{}\n{}", outcome.output, outcome.log);
        }
        assert_eq!(outcome.code, Some(0), "{}", outcome.log);
        assert_pattern(&directory.path().join("data"));
        // Not said to be read-only by the configuration alone.
        config.drives = vec![Drive { is_read_only: true, ..data.drive("data") }];
        let outcome = host::run(monitor, &config, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(outcome.code, Some(i32::from(ExitReason::BadConfig.code())), "{}", outcome.log);
        assert!(outcome.log.contains("is_read_only needs a backend that is read-only"), "{}", outcome.log);
    });
}

/// How often the thread of this name has run and been stopped.
fn switches(pid: u32, thread: &str) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").flatten();
    let status = tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap_or_default());
    let found = status.into_iter().find(|status| status.contains(&format!("Name:\t{thread}\n")));
    let found = found.unwrap_or_else(|| panic!("no thread {thread}"));
    found.lines().filter(|line| line.contains("ctxt_switches")).collect()
}

#[test]
fn a_backend_that_is_killed_is_told_once_and_serves_again_when_it_is_back() {
    let (vmm, guest) = programs_or_skip!();
    each_machine(&vmm, |monitor, processors| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let backend = Backend::start(directory.path(), "data", ",writable=on");
        let mut config = host::config(&guest, "mote.backend");
        config.machine_config.vcpu_count = processors;
        config.drives = vec![backend.drive("data")];
        let mut running = Running::start(monitor, &config).unwrap_or_else(|error| panic!("{error}"));
        let mut expect =
            |line| running.wait_for_line(line, TIMEOUT).map(drop).unwrap_or_else(|error| panic!("{error}"));
        expect("mote-guest: served");
        drop(backend);
        expect("mote-guest: needs a reset");
        let _backend = Backend::start(directory.path(), "data", ",writable=on");
        expect("mote-guest: served again");
        let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(outcome.code, Some(0), "{}", outcome.log);
        let told = outcome.log.matches("its vhost-user backend has gone").count();
        assert_eq!(told, 1, "{}", outcome.log);
    });
}

#[test]
fn a_dead_backend_costs_no_processor_time() {
    let (vmm, guest) = programs_or_skip!();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let backend = Backend::start(directory.path(), "data", ",writable=on");
    let mut config = host::config(&guest, "mote.backend=stay");
    config.drives = vec![backend.drive("data")];
    let mut running = Running::start(&Monitor::Mote(vmm), &config).unwrap_or_else(|error| panic!("{error}"));
    running.wait_for_line("mote-guest: served", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    drop(backend);
    running.wait_for_line("mote-guest: needs a reset", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    // It may still be on its way back to sleep.
    let end = Instant::now() + TIMEOUT;
    let look = || switches(running.pid(), "vhost-user");
    let mut before = look();
    loop {
        thread::sleep(Duration::from_millis(100));
        let now = look();
        if now == before {
            break;
        }
        assert!(Instant::now() < end, "its thread runs on and on: {before}, {now}");
        before = now;
    }
}

/// A monitor with an API socket and a guest that waits for hot-plug.
struct Place {
    directory: TempDir,
    running: Running,
}

impl Place {
    fn start(vmm: &Path, config: &VmConfig) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("config");
        fs::write(&file, serde_json::to_vec(config).expect("plain data")).expect("a file");
        let socket = directory.path().join("api");
        let arguments: [OsString; 5] =
            ["--api-sock".into(), socket.into(), "--config-file".into(), file.into(), "--enable-pci".into()];
        let running = Running::start_program(vmm, &arguments).unwrap_or_else(|error| panic!("{error}"));
        Self { directory, running }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        host::request(&self.directory.path().join("api"), method, path, body).expect("an answer")
    }

    fn expect_line(&mut self, line: &str) {
        self.running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_served_drive_comes_and_goes_and_is_read_again_but_not_saved() {
    let (vmm, guest) = programs_or_skip!();
    let mut place = Place::start(&vmm, &host::config(&guest, "mote.hotplug"));
    let backend = Backend::start(place.directory.path(), "data", ",writable=on");
    place.expect_line("waiting");
    let refused = |answer: (u16, String), why: &str| {
        assert_eq!(answer.0, 400, "{}", answer.1);
        assert!(answer.1.contains(why), "{}", answer.1);
    };
    let socket = backend.socket.display();
    let body =
        |more: &str| format!(r#"{{"drive_id":"data","is_root_device":false,"socket":"{socket}"{more}}}"#);
    for more in [
        r#","path_on_host":"/dev/null""#,
        r#","io_engine":"Async""#,
        r#","rate_limiter":{"ops":{"size":1,"refill_time":1}}"#,
    ] {
        refused(place.ask("PUT", "/drives/data", &body(more)), "has a socket: leave out");
    }
    let nobody = r#"{"drive_id":"data","is_root_device":false,"socket":"/no/such/socket"}"#;
    refused(place.ask("PUT", "/drives/data", nobody), "no Unix socket");
    assert_eq!(place.ask("PUT", "/drives/data", &body("")).0, 204);
    place.expect_line("slot 1 holds 10421af4");
    assert_eq!(place.ask("PATCH", "/drives/data", r#"{"drive_id":"data"}"#).0, 204);
    let other = r#"{"drive_id":"data","path_on_host":"/dev/null"}"#;
    refused(place.ask("PATCH", "/drives/data", other), "drive with a socket");
    let configuration = place.ask("GET", "/vm/config", "").1;
    assert!(configuration.contains(&socket.to_string()), "{configuration}");
    assert_eq!(place.ask("PATCH", "/vm", r#"{"state":"Paused"}"#).0, 204);
    let files = place.directory.path().display();
    let create = format!(r#"{{"snapshot_path":"{files}/state","mem_file_path":"{files}/memory"}}"#);
    refused(place.ask("PUT", "/snapshot/create", &create), "vhost-user");
    assert_eq!(place.ask("PATCH", "/vm", r#"{"state":"Resumed"}"#).0, 204);
    assert_eq!(place.ask("DELETE", "/drives/data", "").0, 204);
    place.expect_line("slot 1 has ffffffff");
    place.running.terminate();
    let outcome = place.running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(outcome.code, Some(i32::from(ExitReason::Terminated.code())), "{}", outcome.log);
}
