//! No call that the seccomp filters list is without a user: microVMs with every kind of device are booted, paused, saved,
//! loaded, changed and ended under strace(1), and what their threads ask of the kernel once they are restricted is compared
//! with the lists. Skipped where strace, /dev/kvm or a network of one's own is absent or the programs aren't built.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mote_guest::host::{self, Running, Unavailable, request};
use mote_vmm::seccomp::ThreadKind;
use mote_vmm::seccomp::lists::{self, Arguments, Group};
use mote_vmm_api::VmConfig;
use serde_json::json;
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(60);
const MAC: &str = "06:00:ac:10:00:02";
/// The smallest.
const LOG_LIMIT: usize = 8192;

/// Calls of threads of each kind: number, and the low halves of the first three arguments.
type Calls = BTreeMap<&'static str, BTreeSet<(i64, [Option<u32>; 3])>>;

/// The monitor under strace, and what it is given.
struct Traced {
    directory: TempDir,
    /// Starts the monitor traced; the process that it becomes is the monitor itself.
    program: PathBuf,
    guest: PathBuf,
}

impl Traced {
    fn new() -> Result<Self, Unavailable> {
        host::kvm_usable()?;
        let (vmm, guest) = (host::vmm_path()?, host::guest_path()?);
        let strace = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !strace.is_ok_and(|status| status.success()) {
            return Err(Unavailable("no strace".into()));
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let program = directory.path().join("traced");
        let (traces, vmm) = (directory.path().join("traces"), vmm.display());
        fs::create_dir(&traces).expect("a directory");
        let traces = traces.display();
        let script = format!("#!/bin/sh\nexec strace -D -f -q -n -X raw -s 16 -o {traces}/$$ {vmm} \"$@\"\n");
        fs::write(&program, script).expect("a script");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a mode");
        Ok(Self { directory, program, guest })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, config: &VmConfig, more: &[&str]) -> Running {
        fs::write(self.path("config"), serde_json::to_vec(config).expect("plain data")).expect("a file");
        let mut arguments = vec!["--api-sock".into(), self.path("socket").into()];
        arguments.extend(["--exit-report".into(), self.path("exit").into()]);
        arguments.extend(["--config-file".into(), self.path("config").into()]);
        arguments.extend(more.iter().map(Into::into));
        Running::start_program(&self.program, &arguments).expect("the monitor starts")
    }

    fn expect(&self, method: &str, path: &str, body: &serde_json::Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = request(&self.path("socket"), method, path, &body).expect("an answer");
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    }

    fn save_and_end(&self, running: Running) {
        self.expect("PATCH", "/vm", &json!({"state": "Paused"}));
        let files = json!({"snapshot_path": self.path("state"), "mem_file_path": self.path("memory")});
        self.expect("PUT", "/snapshot/create", &files);
        running.terminate();
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    }

    fn load(&self) -> VmConfig {
        let backend = json!({"backend_type": "File", "backend_path": self.path("memory")});
        let load = json!({"snapshot_path": self.path("state"), "mem_backend": backend, "resume_vm": true});
        VmConfig { snapshot_load: serde_json::from_value(load).ok(), ..VmConfig::default() }
    }

    /// All devices, the device test, a snapshot in the middle of it.
    fn devices(&self, transport: &[&str]) {
        let line = format!(
            "mote.test mote.expect=1,2,1 mote.pmems=1 mote.block_ids=fast,plain mote.net=10.77.0.2/24,10.77.0.1 mote.mac={MAC}"
        );
        for (name, bytes) in [("fast", 8 << 20), ("plain", 1 << 20), ("pages", 1 << 20)] {
            fs::write(self.path(name), [b"mote".as_slice(), &vec![0; bytes - 4]].concat()).expect("a file");
        }
        let bucket = json!({"size": 4_000_000, "refill_time": 10});
        let limiter = json!({"bandwidth": bucket});
        let config = json!({
            "boot-source": {"kernel_image_path": self.guest, "boot_args": line},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": host::MEMORY_MIB},
            "drives": [
                {
                    "drive_id": "fast", "path_on_host": self.path("fast"), "is_root_device": false,
                    "io_engine": "Async", "cache_type": "Writeback", "rate_limiter": limiter,
                },
                {
                    "drive_id": "plain", "path_on_host": self.path("plain"), "is_root_device": false,
                    "cache_type": "Writeback",
                },
            ],
            "pmem": [{"id": "pages", "path_on_host": self.path("pages")}],
            "network-interfaces": [{
                "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": MAC,
                "rx_rate_limiter": limiter, "tx_rate_limiter": limiter,
            }],
            "entropy": {"rate_limiter": limiter},
            "balloon": {"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1},
            "vsock": {"guest_cid": 3, "uds_path": self.path("vsock")},
            "metrics": {"metrics_path": self.path("metrics")},
        });
        let config: VmConfig = serde_json::from_value(config).expect("a configuration");
        let mut running = self.start(&config, transport);
        let wait = |running: &mut Running, line: &str| {
            running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        };
        wait(&mut running, "block0-all-id");
        self.expect("PUT", "/actions", &json!({"action_type": "FlushMetrics"}));
        self.expect("PATCH", "/balloon", &json!({"amount_mib": 2}));
        let drive = json!({"drive_id": "plain", "path_on_host": self.path("plain")});
        self.expect("PATCH", "/drives/plain", &drive);
        self.save_and_end(running);
        let outcome = self.start(&self.load(), &[]).finish(TIMEOUT);
        let outcome = outcome.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(outcome.code, Some(0), "{}\n{}", outcome.output, outcome.log);
    }

    /// Devices that come and go, in a machine whose serial port has a socket and a small log.
    fn changes(&self) {
        for name in ["a", "b"] {
            fs::write(self.path(name), vec![0; 1 << 20]).expect("a file");
        }
        let config = json!({
            "boot-source": {"kernel_image_path": self.guest, "boot_args": "mote.hotplug"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": host::MEMORY_MIB},
            "drives": [{"drive_id": "a", "path_on_host": self.path("a"), "is_root_device": false}],
            "serial": {
                "serial_out_path": self.path("log"), "log_limit_bytes": LOG_LIMIT, "socket_path": self.path("serial"),
                "rate_limiter": {"size": 100_000, "refill_time": 100},
            },
        });
        // Full: the first byte, which the processor's own thread writes, starts it anew.
        fs::write(self.path("log"), vec![b'.'; LOG_LIMIT]).expect("a log");
        let config: VmConfig = serde_json::from_value(config).expect("a configuration");
        let running = self.start(&config, &["--enable-pci"]);
        let end = Instant::now() + TIMEOUT;
        let mut client = loop {
            match UnixStream::connect(self.path("serial")) {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < end, "the serial port's socket: {error}"),
            }
            thread::sleep(Duration::from_millis(2));
        };
        client.set_read_timeout(Some(TIMEOUT)).expect("a time limit");
        client.write_all(b"x").expect("input");
        // What the guest said before there was a client is in the log, or in what the log was before.
        let has_said = |line: &str| {
            let logs = ["log", "log.1"].map(|name| fs::read(self.path(name)).unwrap_or_default());
            logs.iter().any(|log| String::from_utf8_lossy(log).contains(line))
        };
        while !has_said("waiting") {
            assert!(Instant::now() < end, "the guest doesn't come to its wait");
            thread::sleep(Duration::from_millis(2));
        }
        let body = |id: &str| json!({"drive_id": id, "path_on_host": self.path(id), "is_root_device": false});
        self.expect("PUT", "/drives/b", &body("b"));
        let interface =
            json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": MAC, "tap_from_request": true});
        let (path, tap) = ("/network-interfaces/eth0", host::open_tap("tap0").expect("a tap"));
        let answer = host::request_with(&self.path("socket"), "PUT", path, &interface.to_string(), &[&tap]);
        assert_eq!(answer.expect("an answer").0, 204);
        drop(tap);
        let by_name = json!({"iface_id": "eth1", "host_dev_name": "tap2", "guest_mac": "06:00:ac:10:00:03"});
        self.expect("PUT", "/network-interfaces/eth1", &by_name);
        let mut seen = String::new();
        let mut wait = |line: &str| {
            while !seen.contains(line) {
                let mut bytes = [0; 256];
                let count = client.read(&mut bytes).expect("output");
                assert!(count > 0, "no {line:?} in {seen:?}");
                seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        };
        wait("slot 2 holds");
        self.expect("DELETE", "/drives/a", &json!(null));
        wait("slot 1 has ffffffff");
        self.expect("PUT", "/actions", &json!({"action_type": "SendCtrlAltDel"}));
        self.save_and_end(running);
    }

    /// Memory that comes while the guest runs.
    fn memory(&self) {
        fs::write(self.path("disk"), [b"mote".as_slice(), &[0; 65_532]].concat()).expect("a file");
        let config = json!({
            "boot-source": {"kernel_image_path": self.guest, "boot_args": "mote.memory_hotplug"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": host::MEMORY_MIB},
            "drives": [{"drive_id": "disk", "path_on_host": self.path("disk"), "is_root_device": false}],
            "memory-hotplug": {"total_size_mib": 512, "block_size_mib": 2, "slot_size_mib": 128},
        });
        let config: VmConfig = serde_json::from_value(config).expect("a configuration");
        let mut running = self.start(&config, &[]);
        for (line, mib) in [("hot-plug of 512 MiB", 64), ("plugged 64 MiB", 0)] {
            running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
            self.expect("PATCH", "/hotplug/memory", &json!({"requested_size_mib": mib}));
        }
        running.terminate();
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    }

    /// What the threads of all monitors that have ended have asked.
    fn calls(&self) -> Calls {
        let mut calls = Calls::new();
        for trace in fs::read_dir(self.path("traces")).expect("a directory").flatten() {
            let main = trace.file_name().to_string_lossy().into_owned();
            let end = Instant::now() + TIMEOUT;
            // strace, which nobody waits for, writes that last.
            let ends = |line: &str| line.starts_with(&main) && line.contains("] +++ ");
            let text = loop {
                let text = fs::read(trace.path()).expect("a trace");
                let text = String::from_utf8_lossy(&text).into_owned();
                if text.lines().any(ends) {
                    break text;
                }
                assert!(Instant::now() < end, "the trace of {main} doesn't end");
                thread::sleep(Duration::from_millis(5));
            };
            read_trace(&main, &text, &mut calls);
        }
        calls
    }
}

/// Adds the calls of a process's restricted threads. A worker is made by the set-up thread, whose list counts until it has
/// one of its own.
fn read_trace(main: &str, text: &str, calls: &mut Calls) {
    let mut kinds = BTreeMap::from([(main, (ThreadKind::Main, false))]);
    for line in text.lines() {
        let Some((thread, rest)) = line.split_once([' ']) else { continue };
        let Some((number, call)) = rest.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("] "))
        else {
            continue;
        };
        let (Ok(number), Some((name, arguments))) = (number.trim().parse::<i64>(), call.split_once('('))
        else {
            continue;
        };
        let arguments: Vec<&str> = arguments.split([',', ')', ' ']).filter(|word| !word.is_empty()).collect();
        let is_naming = name == "prctl" && arguments.first() == Some(&"0xf");
        let (kind, restricted) = kinds.entry(thread).or_insert((ThreadKind::SetUp, true));
        if is_naming && thread != main {
            let title = arguments.get(1).map_or("", |title| title.trim_matches('"'));
            if title.starts_with("vcpu") {
                (*kind, *restricted) = (ThreadKind::Vcpu, false);
            } else if title == "setup" {
                (*kind, *restricted) = (ThreadKind::SetUp, false);
            }
        }
        if *restricted {
            let value = |index: usize| arguments.get(index).and_then(|word| low_half(word));
            calls.entry(kind.name()).or_default().insert((number, [value(0), value(1), value(2)]));
        }
        if name == "seccomp" {
            if *restricted {
                *kind = ThreadKind::Worker;
            }
            *restricted = true;
        }
    }
}

fn low_half(word: &str) -> Option<u32> {
    let number = match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    };
    number.ok().map(|number| number as u32)
}

/// The parts of a group that no thread whose list has it has used.
fn unused(group: &Group, calls: &Calls) -> Vec<String> {
    let has = |kind: &&ThreadKind| lists::of(**kind).iter().any(|other| other.reason == group.reason);
    let used: BTreeSet<_> =
        ThreadKind::ALL.iter().filter(has).filter_map(|kind| calls.get(kind.name())).flatten().collect();
    let is_used = |number: i64, argument: Option<(usize, u32, u32)>| {
        used.iter().any(|(other, values)| {
            *other == number
                && argument
                    .is_none_or(|(index, value, mask)| values[index].is_some_and(|seen| seen & mask == value))
        })
    };
    let mut missing = Vec::new();
    for (number, arguments) in group.calls {
        let (index, values, mask): (u8, &[u32], u32) = match arguments {
            Arguments::All => {
                if !is_used(*number, None) {
                    missing.push(format!("{number}"));
                }
                continue;
            }
            Arguments::OneOf(index, values) => (*index, values, u32::MAX),
            Arguments::IoctlTypes(values) => (1, values, 0xff00),
        };
        let without = values.iter().filter(|value| !is_used(*number, Some((index.into(), **value, mask))));
        missing.extend(without.map(|value| format!("{number} with {value:#x}")));
    }
    missing
}

fn every_listed_call_is_made() -> Result<(), Unavailable> {
    let traced = Traced::new()?;
    host::enter_network(&["10.77.0.1/24"])?;
    traced.devices(&[]);
    traced.devices(&["--enable-pci"]);
    traced.changes();
    traced.memory();
    let calls = traced.calls();
    let mut wrong = Vec::new();
    let groups = ThreadKind::ALL.iter().flat_map(|kind| lists::of(*kind));
    for group in groups.map(|group| (group.reason, *group)).collect::<BTreeMap<_, _>>().values() {
        let missing = unused(group, &calls);
        if group.elsewhere.is_none() && !missing.is_empty() {
            wrong.push(format!("{}: {}", group.reason, missing.join(", ")));
        }
    }
    assert!(wrong.is_empty(), "no thread made these calls:\n{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn no_call_is_listed_that_no_thread_makes() {
    match thread::spawn(every_listed_call_is_made).join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn a_trace_is_read_by_the_kinds_of_its_threads() {
    let text = "7     [ 16] ioctl(3, 0xae01, 0) = 4
7     [317] seccomp(0x1, 0, 0x7ffe) = 0
7     [ 16] ioctl(3, 0xffffffff8000ae80, 0 <unfinished ...>
8     [157] prctl(0xf, \"vcpu0\") = 0
7     [ 16] <... ioctl resumed>) = 0
8     [  3] close(1) = 0
8     [317] seccomp(0x1, 0, 0x7ffe) = 0
8     [  1] write(1, \"x\", 1) = 1
9     [334] rseq(0x7f, 0x20, 0, 0x53) = 0
9     [157] prctl(0xf, \"block\") = 0
9     [317] seccomp(0x1, 0, 0x7ffe) = 0
9     [ 39] getpid() = 7
7     [231] +++ exited with 0 +++
";
    let mut calls = Calls::new();
    read_trace("7", text, &mut calls);
    let numbers = |kind: ThreadKind| calls[kind.name()].iter().map(|(number, _)| *number).collect::<Vec<_>>();
    assert_eq!(numbers(ThreadKind::Main), [16]);
    assert!(calls["main"].contains(&(16, [Some(3), Some(0x8000_ae80), Some(0)])));
    assert_eq!(numbers(ThreadKind::Vcpu), [1]);
    assert_eq!(numbers(ThreadKind::SetUp), [157, 317, 334]);
    assert_eq!(numbers(ThreadKind::Worker), [39]);
    let none = Group { reason: "r", calls: &[(999, Arguments::All)], elsewhere: None };
    assert_eq!(unused(&none, &calls), ["999"]);
}
