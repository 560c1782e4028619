//! The program from outside: small guests in machine code on the host's KVM, exit codes, the exit report, the API.
//!
//! Skipped, with the reason, where /dev/kvm cannot be used.

#![expect(
    clippy::unwrap_used,
    reason = "a test may fail by panic; clippy.toml knows only functions marked as tests"
)]

mod small_guest;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mote_vmm_api::{ExitReason, ExitReport};
use small_guest::{HALT, elf, out, say_then};
use tempfile::TempDir;

/// No run takes longer, however busy the machine is.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A directory with a guest and the program's files.
struct Vm {
    directory: TempDir,
}

impl Vm {
    /// None, with the reason told, if there is no usable KVM.
    fn new(code: &[u8], pvh: bool) -> Option<Self> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("SKIPPED: /dev/kvm cannot be used: {error}");
            return None;
        }
        let vm = Self { directory: tempfile::tempdir().unwrap() };
        fs::write(vm.path("kernel"), elf(code, pvh)).unwrap();
        vm.configure(1);
        Some(vm)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn configure(&self, vcpus: u8) {
        let config = serde_json::json!({
            "boot-source": {"kernel_image_path": self.path("kernel")},
            "machine-config": {"vcpu_count": vcpus, "mem_size_mib": 16},
        });
        fs::write(self.path("config"), config.to_string()).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mote-vmm"));
        command.args(["--level", "Off", "--exit-report"]).arg(self.path("report")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the guest to its end, without API.
    fn run(&self) -> (Output, ExitReport) {
        let child = self.command(&["--no-api", "--config-file"]).arg(self.path("config")).spawn().unwrap();
        let output = finish(child);
        (output, self.report())
    }

    fn report(&self) -> ExitReport {
        serde_json::from_slice(&fs::read(self.path("report")).unwrap()).unwrap()
    }
}

fn finish(mut child: Child) -> Output {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > TIME_LIMIT {
            child.kill().unwrap();
            panic!("the program did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn terminate(child: &Child) {
    // SAFETY: the child has not been waited for, so its id is its own.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
}

#[test]
fn both_entries_reach_the_serial_port_and_power_off_with_code_0() {
    for pvh in [false, true] {
        let Some(vm) = Vm::new(&say_then(b'A', &out(0x600, 5 << 2 | 1 << 5)), pvh) else { return };
        let (output, report) = vm.run();
        assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"A"[..], Some(0)), "{output:?}");
        assert_eq!(report.reason, ExitReason::PowerOff);
    }
}

#[test]
fn every_way_to_reset_ends_with_code_3() {
    for reset in [out(0xcf9, 6), out(0x64, 0xfe)] {
        let Some(vm) = Vm::new(&say_then(b'R', &reset), true) else { return };
        let (output, report) = vm.run();
        assert_eq!((output.status.code(), report.reason), (Some(3), ExitReason::Reboot), "{output:?}");
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    let Some(vm) = Vm::new(&[0x0f, 0x0b], false) else { return };
    let (output, report) = vm.run();
    assert_eq!((output.status.code(), report.reason), (Some(4), ExitReason::Crash), "{output:?}");
    assert!(report.message.contains("triple fault"), "{}", report.message);
}

#[test]
fn string_output_writes_each_byte_to_the_port() {
    // mov esi, text; mov ecx, 3; mov dx, SERIAL; cld; rep outsb
    let mut code = vec![0xbe, 0, 0, 0, 0, 0xb9, 3, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e];
    code.extend(out(0x600, 5 << 2 | 1 << 5));
    code.extend(HALT);
    let text = 0x10_0000 + code.len() as u32;
    code[1..5].copy_from_slice(&text.to_le_bytes());
    code.extend(b"abc");
    let Some(vm) = Vm::new(&code, true) else { return };
    let (output, _) = vm.run();
    assert_eq!(output.stdout, b"abc", "{output:?}");
}

#[test]
fn ports_without_a_device_read_as_ones() {
    // mov dx, 0x1234; in al, dx; mov dx, SERIAL; out dx, al
    let code = [&[0x66, 0xba, 0x34, 0x12, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &out(0x600, 0x34), &HALT]
        .concat();
    let Some(vm) = Vm::new(&code, true) else { return };
    assert_eq!(vm.run().0.stdout, [0xff]);
}

#[test]
fn sigterm_ends_a_halted_and_a_spinning_guest_with_code_5() {
    for rest in [&HALT[..], &[0xeb, 0xfe]] {
        let Some(vm) = Vm::new(&say_then(b'S', rest), true) else { return };
        vm.configure(2);
        let mut child = vm.command(&["--no-api", "--config-file"]).arg(vm.path("config")).spawn().unwrap();
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        terminate(&child);
        let output = finish(child);
        assert_eq!(
            (output.status.code(), vm.report().reason),
            (Some(5), ExitReason::Terminated),
            "{output:?}"
        );
    }
}

#[test]
fn what_is_no_kernel_ends_with_one_line_and_code_152() {
    let Some(vm) = Vm::new(&HALT, false) else { return };
    fs::write(vm.path("kernel"), "#!/bin/sh\n").unwrap();
    let (output, report) = vm.run();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), report.reason), (Some(152), ExitReason::BadConfig), "{error}");
    assert!(error.contains("neither an x86-64 ELF (vmlinux) nor a bzImage"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn bad_arguments_end_with_code_153() {
    let status = Command::new(env!("CARGO_BIN_EXE_mote-vmm"))
        .arg("--describe-snapshot")
        .stderr(Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(153));
}

/// One request on a connection of its own: status and body.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn wait_for(socket: &Path) {
    let start = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(start.elapsed() < TIME_LIMIT, "the API socket did not appear");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_machine_configured_started_and_paused_by_the_api() {
    let Some(vm) = Vm::new(&say_then(b'A', &[0xeb, 0xfe]), true) else { return };
    let socket = vm.path("socket");
    let mut child = vm.command(&["--id", "vm-1", "--api-sock"]).arg(&socket).spawn().unwrap();
    wait_for(&socket);
    let ask = |method, path, body: &str| ask(&socket, method, path, body);

    assert_eq!(ask("PATCH", "/vm", r#"{"state":"Paused"}"#).0, 400);
    let (status, fault) = ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
    assert_eq!(status, 400, "{fault}");
    assert!(fault.starts_with(r#"{"fault_message":"Cannot start the microVM: "#), "{fault}");
    assert_eq!(ask("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":16}"#), (204, String::new()));
    let source = serde_json::json!({"kernel_image_path": vm.path("kernel")}).to_string();
    assert_eq!(ask("PUT", "/boot-source", &source).0, 204);
    assert_eq!(ask("PUT", "/entropy", "{}").0, 204);
    assert_eq!(ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#), (204, String::new()));
    let mut byte = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();

    let (status, fault) = ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
    assert_eq!(status, 400);
    assert!(fault.contains("not supported after starting the microVM"), "{fault}");
    let state = |expected: &str| {
        let (status, info) = ask("GET", "/", "");
        assert!(status == 200 && info.contains(&format!("\"state\":\"{expected}\"")), "{info}");
    };
    state("Running");
    // The second pause finds the machine paused.
    for _ in 0..2 {
        assert_eq!(ask("PATCH", "/vm", r#"{"state":"Paused"}"#).0, 204);
        state("Paused");
    }
    assert_eq!(ask("PATCH", "/vm", r#"{"state":"Resumed"}"#).0, 204);
    state("Running");
    assert_eq!(ask("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#).0, 204, "they go nowhere");
    assert!(ask("GET", "/vm/config", "").1.contains("\"vcpu_count\":2"));

    terminate(&child);
    assert_eq!(finish(child).status.code(), Some(5));
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn log_and_metrics_go_where_the_flags_say() {
    let Some(vm) = Vm::new(&say_then(b'A', &out(0x600, 5 << 2 | 1 << 5)), true) else { return };
    let mut command = Command::new(env!("CARGO_BIN_EXE_mote-vmm"));
    command.args(["--no-api", "--show-level", "--show-log-origin", "--module", "mote_vmm::cli"]);
    command.args(["--start-time-us", "1", "--config-file"]).arg(vm.path("config"));
    command.arg("--log-path").arg(vm.path("log")).arg("--metrics-path").arg(vm.path("metrics"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finish(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let log = fs::read_to_string(vm.path("log")).unwrap();
    assert_eq!(log.lines().count(), 1, "one module only: {log}");
    assert!(log.contains("[anonymous-instance:Info:vmm/src/cli.rs:") && log.contains("exiting"), "{log}");
    let metrics = fs::read_to_string(vm.path("metrics")).unwrap();
    let line: serde_json::Value = serde_json::from_str(metrics.trim()).unwrap();
    assert!(line["api_server"]["process_startup_time_us"].as_u64() > Some(0), "{metrics}");
}

#[test]
fn logger_and_metrics_are_set_by_the_api_before_the_start_and_flushed_after_it() {
    let Some(vm) = Vm::new(&HALT, true) else { return };
    let child = vm.command(&["--api-sock"]).arg(vm.path("socket")).spawn().unwrap();
    wait_for(&vm.path("socket"));
    let log = format!(r#"{{"log_path":{:?},"level":"debug","show_level":true}}"#, vm.path("log"));
    assert_eq!(ask(&vm.path("socket"), "PUT", "/logger", &log).0, 204);
    let (status, answer) = ask(&vm.path("socket"), "PUT", "/logger", r#"{"level":"loud"}"#);
    assert!(status == 400 && answer.contains("loud"), "{answer}");
    let metrics = format!(r#"{{"metrics_path":{:?}}}"#, vm.path("metrics"));
    assert_eq!(ask(&vm.path("socket"), "PUT", "/metrics", &metrics).0, 204);
    assert!(ask(&vm.path("socket"), "PUT", "/metrics", &metrics).1.contains("Reinitialization"));
    let flush = r#"{"action_type":"FlushMetrics"}"#;
    assert!(ask(&vm.path("socket"), "PUT", "/actions", flush).1.contains("before starting"));
    let boot = format!(r#"{{"kernel_image_path":{:?}}}"#, vm.path("kernel"));
    assert_eq!(ask(&vm.path("socket"), "PUT", "/boot-source", &boot).0, 204);
    assert_eq!(ask(&vm.path("socket"), "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#).0, 204);
    assert_eq!(ask(&vm.path("socket"), "PUT", "/actions", flush).0, 204);
    assert!(ask(&vm.path("socket"), "PUT", "/logger", &log).1.contains("after starting"));
    let line = fs::read_to_string(vm.path("metrics")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
    assert_eq!(line["put_api_requests"]["boot_source_count"], 1);
    assert_eq!(line["put_api_requests"]["metrics_fails"], 1);
    assert!(fs::read_to_string(vm.path("log")).unwrap().contains(":Info] "));
    terminate(&child);
    finish(child);
}

#[test]
fn standard_descriptors_that_are_closed_are_opened_on_nothing_and_a_broken_pipe_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"exec "$0" --api-sock "$1" <&- >&- 2>&-"#, env!("CARGO_BIN_EXE_mote-vmm")])
        .arg(&socket);
    let child = shell.spawn().unwrap();
    wait_for(&socket);
    let of_process = |name: &str| Path::new("/proc").join(child.id().to_string()).join(name);
    for number in 0..3 {
        let path = fs::read_link(of_process(&format!("fd/{number}"))).unwrap();
        assert_eq!(path, Path::new("/dev/null"), "descriptor {number}");
    }
    let status = fs::read_to_string(of_process("status")).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    assert_ne!(ignored & 1 << (libc::SIGPIPE - 1), 0, "{status}");
    terminate(&child);
    finish(child);
}

#[test]
fn snapshot_versions_are_told() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_mote-vmm")).args(arguments).stdin(Stdio::null()).output().unwrap()
    };
    assert_eq!(run(&["--snapshot-version"]).stdout, b"v1.2\n");
    let output = run(&["--describe-snapshot", "/dev/null"]);
    assert_eq!(output.status.code(), Some(152));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/null"), "{output:?}");
}

/// Says the low byte of EAX on the serial port.
const SAY_AL: [u8; 5] = [0x66, 0xba, 0xf8, 0x03, 0xee];

/// Sets the low byte of EAX in CPUID leaf 0x8000_0002 (the processor's name) to T, and that of MSR 0x8b (the microcode's
/// version) to M.
const TEMPLATE: &str = r#"{"cpuid_modifiers":[{"leaf":"0x80000002","subleaf":"0x0","flags":0,"modifiers":
    [{"register":"eax","bitmap":"0b01010100"}]}],"msr_modifiers":[{"addr":"0x8b","bitmap":"0b01001101"}]}"#;

#[test]
fn a_cpu_template_changes_what_the_guest_sees() {
    // mov eax, 0x80000002; xor ecx, ecx; cpuid
    let cpuid = [0xb8, 0x02, 0, 0, 0x80, 0x31, 0xc9, 0x0f, 0xa2];
    // mov ecx, 0x8b; rdmsr
    let msr = [0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32];
    let code = [&cpuid[..], &SAY_AL, &msr, &SAY_AL, &out(0x600, 5 << 2 | 1 << 5), &HALT].concat();
    let Some(vm) = Vm::new(&code, true) else { return };
    let (plain, _) = vm.run();
    assert_ne!(plain.stdout, b"TM");
    fs::write(vm.path("template"), TEMPLATE).unwrap();
    let config = serde_json::json!({
        "boot-source": {"kernel_image_path": vm.path("kernel")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "cpu-config": vm.path("template"),
    });
    fs::write(vm.path("config"), config.to_string()).unwrap();
    let (output, report) = vm.run();
    assert_eq!((output.stdout.as_slice(), report.reason), (&b"TM"[..], ExitReason::PowerOff), "{output:?}");
}

#[test]
fn a_cpu_template_that_does_not_fit_the_host_is_bad_configuration() {
    for (template, named) in [
        (
            r#"{"cpuid_modifiers":[{"leaf":"0x3fffffff","subleaf":"0x0","flags":0,"modifiers":[]}]}"#,
            "0x3fffffff",
        ),
        (r#"{"msr_modifiers":[{"addr":"0x12345","bitmap":"0b1"}]}"#, "0x12345"),
        (r#"{"kvm_capabilities":["100000"]}"#, "100000"),
        (r#"{"kvm_capabilities":["!121"]}"#, "121"),
    ] {
        let Some(vm) = Vm::new(&HALT, true) else { return };
        let config = serde_json::json!({
            "boot-source": {"kernel_image_path": vm.path("kernel")},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
            "cpu-config": serde_json::from_str::<serde_json::Value>(template).unwrap(),
        });
        fs::write(vm.path("config"), config.to_string()).unwrap();
        let (output, report) = vm.run();
        assert_eq!((output.status.code(), report.reason), (Some(152), ExitReason::BadConfig), "{output:?}");
        assert!(report.message.contains(named), "{}", report.message);
    }
}

#[test]
fn templates_are_dumped_verified_and_stripped() {
    let Some(vm) = Vm::new(&HALT, true) else { return };
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mote-vmm"));
        let output = command.arg("cpu-template").args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout.clone()).unwrap(), output)
    };
    let text = |name: &str| vm.path(name).display().to_string();
    fs::write(vm.path("template.json"), TEMPLATE).unwrap();
    let (code, changes, output) = run(&["verify", "--template", &text("template.json")]);
    assert_eq!(code, Some(0), "{output:?}");
    assert!(changes.contains("CPUID 0x80000002.0x0 Eax: ") && changes.contains("MSR 0x8b: "), "{changes}");
    assert!(changes.ends_with("2 registers change\n"), "{changes}");
    // APIC ids are not a template's.
    let id = r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":
        [{"register":"ebx","bitmap":"0b00000111xxxxxxxxxxxxxxxxxxxxxxxx"}]}]}"#;
    fs::write(vm.path("id.json"), id).unwrap();
    let (code, said, output) = run(&["verify", "--template", &text("id.json")]);
    assert_eq!(code, Some(152), "{output:?}");
    assert!(said.contains("does not hold: CPUID 0x1.0x0 Ebx: bits 0x7000000"), "{said}");

    let dump = |arguments: &[&str]| assert_eq!(run(arguments).0, Some(0));
    dump(&["dump", "--output", &text("plain.json")]);
    dump(&["dump", "--template", &text("template.json"), "--output", &text("changed.json")]);
    dump(&["strip", &text("plain.json"), &text("changed.json")]);
    let stripped = fs::read_to_string(vm.path("changed_stripped.json")).unwrap();
    let stripped: serde_json::Value = serde_json::from_str(&stripped).unwrap();
    assert_eq!(stripped["cpuid_modifiers"].as_array().map(Vec::len), Some(1), "{stripped}");
    assert_eq!(stripped["msr_modifiers"][0]["addr"], "0x8b", "{stripped}");
    // What is seen here holds here.
    let (code, _, output) = run(&["verify", "--template", &text("plain.json")]);
    assert_eq!(code, Some(0), "{output:?}");
}

#[test]
fn metrics_that_reach_the_limit_of_files_do_not_end_the_vm() {
    // Jumps to itself.
    let Some(vm) = Vm::new(&say_then(b'L', &[0xeb, 0xfe]), true) else { return };
    // 20 MB in blocks of 512 bytes: more than the guest's memory, less than the file has already.
    fs::File::create(vm.path("metrics")).unwrap().set_len(25 << 20).unwrap();
    let program = env!("CARGO_BIN_EXE_mote-vmm");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 40000; exec \"$0\" \"$@\"", program, "--level", "Off"]);
    command.arg("--config-file").arg(vm.path("config")).arg("--api-sock").arg(vm.path("socket"));
    command.arg("--metrics-path").arg(vm.path("metrics"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    assert_eq!(child.stdout.as_mut().unwrap().read(&mut [0]).unwrap(), 1);
    let ask = |request: &str| {
        let mut stream = UnixStream::connect(vm.path("socket")).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let body = r#"{"action_type":"FlushMetrics"}"#;
    let answer = ask(&format!("PUT /actions HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    assert!(answer.contains("400") && answer.contains("Cannot write metrics"), "{answer}");
    assert!(ask("GET / HTTP/1.0\r\n\r\n").contains("Running"));
    terminate(&child);
    assert_eq!(finish(child).status.code(), Some(5));
}
