//! The conformance guest under mote-vmm on this machine's /dev/kvm. Skipped where /dev/kvm is absent or the programs
//! aren't built. `MOTE_VMM` and `MOTE_GUEST` name them, `MOTE_REPEAT=N` runs the device test N times in a row.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use mote_guest::host::{self, Monitor, Outcome, Unavailable};
use mote_vmm_api::{Console, ConsoleSize, ExitReason, MemoryHotplug, VmConfig};

const TIMEOUT: Duration = Duration::from_secs(60);
const MAC: &str = "06:00:ac:10:00:02";
const DISK_BYTES: u64 = 8 << 20;
const SMALL_DISK_BYTES: u64 = 1 << 20;
/// Not a multiple of what the guest sees it in.
const PMEM_BYTES: u64 = 3 << 20;
const SECTOR_BYTES: u64 = 512;

fn programs() -> Result<(Monitor, PathBuf), Unavailable> {
    host::kvm_usable()?;
    Ok((Monitor::Mote(host::vmm_path()?), host::guest_path()?))
}

/// The same monitor with the devices on a PCI bus.
fn with_pci(monitor: &Monitor) -> Monitor {
    Monitor::MotePci(monitor.program().to_owned())
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

fn run(monitor: &Monitor, config: &VmConfig) -> Outcome {
    host::run(monitor, config, TIMEOUT).unwrap_or_else(|error| panic!("{error}"))
}

fn disk(directory: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = directory.join(name);
    let file = File::create(&path).expect("a file in a temporary directory");
    file.set_len(bytes).expect("a sparse file");
    file.write_all_at(b"mote", 0).expect("a small write");
    path
}

/// All device types; without network if that can't be had here.
fn full_config(guest: &Path, mode: &str, directory: &Path, network: bool, processors: u8) -> VmConfig {
    let nets = u8::from(network);
    let net = if network { format!("mote.net=10.77.0.2/24,10.77.0.1 mote.mac={MAC}") } else { String::new() };
    let line = format!(
        "{mode} mote.expect={nets},2,1 mote.pmems=2 mote.console=90x31 mote.pmem_read_only=1 mote.memory_mib={} mote.processors={processors} mote.read_only=1 mote.block_ids=disk,fixed {net}",
        host::MEMORY_MIB
    );
    let mut config = host::config(guest, &line);
    config.machine_config.vcpu_count = processors;
    host::add_drive(&mut config, "disk", &disk(directory, "disk", DISK_BYTES), false);
    host::add_drive(&mut config, "fixed", &disk(directory, "fixed", SMALL_DISK_BYTES), true);
    host::add_rng(&mut config);
    host::add_pmem(&mut config, "pages", &disk(directory, "pages", PMEM_BYTES), false);
    host::add_pmem(&mut config, "fixed_pages", &disk(directory, "fixed_pages", 4096), true);
    config.console = Some(Console {
        output_path: Some(directory.join("console")),
        socket_path: Some(directory.join("console.socket")),
        size: Some(ConsoleSize { columns: 90, rows: 31 }),
        ..Console::default()
    });
    config.memory_hotplug =
        Some(MemoryHotplug { total_size_mib: 256, block_size_mib: 2, slot_size_mib: 128 });
    if network {
        host::add_tap(&mut config, "tap0", MAC);
    }
    config
}

/// Runs `test` in a thread that has a network of its own, or without one where that's impossible.
fn with_network(test: impl FnOnce(bool) + Send) {
    thread::scope(|scope| {
        let outcome = scope
            .spawn(|| {
                let network = host::enter_network(&["10.77.0.1/24"]);
                if let Err(why) = &network {
                    eprintln!("SKIPPED the network part: {why}");
                }
                test(network.is_ok());
            })
            .join();
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

/// What the guest leaves in the first and last 32 sectors (tests/guest/src/guest/test/mod.rs, `pattern`).
fn assert_pattern(disk: &Path) {
    let mut file = File::open(disk).expect("the disk");
    let sectors = DISK_BYTES / SECTOR_BYTES;
    for sector in (0..32).chain(sectors - 32..sectors) {
        let mut bytes = [0; SECTOR_BYTES as usize];
        file.seek(SeekFrom::Start(sector * SECTOR_BYTES)).expect("a seek");
        file.read_exact(&mut bytes).expect("a sector");
        for (word, found) in bytes.chunks_exact(8).enumerate() {
            let expected = (sector * 64 + word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(found, expected.to_le_bytes(), "word {word} of sector {sector}");
        }
    }
}

/// What the guest leaves in a persistent memory device's file (tests/guest/src/guest/test/pmem.rs, `content`).
fn assert_pages(file: &Path) {
    let content = std::fs::read(file).expect("the file");
    assert_eq!(content.len() as u64, PMEM_BYTES);
    for page in (0..PMEM_BYTES).step_by(64 * 4096) {
        for at in [page + 8, page + 4096 - 8] {
            let expected = (at ^ 0x706d_656d).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(content[at as usize..][..8], expected.to_le_bytes(), "offset {at:#x}");
        }
    }
    assert_eq!(content[..4], *b"mote");
}

/// The other end of the console: answers each line that asks for it (tests/guest/src/guest/test/console.rs) until it is closed.
fn answer_console(socket: &Path) {
    let end = Instant::now() + TIMEOUT;
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < end, "the console's socket: {error}"),
        }
        thread::sleep(Duration::from_millis(1));
    };
    for line in BufReader::new(&stream).lines().map_while(Result::ok) {
        if let Some(way) = line.strip_prefix("mote-console ") {
            // A guest that has ended meanwhile needs no answer.
            let _ = (&stream).write_all(format!("answer {way}\n").as_bytes());
        }
    }
}

fn device_test(monitor: &Monitor, guest: &Path, mode: &str) {
    device_test_on(monitor, guest, mode, 1);
}

fn device_test_on(monitor: &Monitor, guest: &Path, mode: &str, processors: u8) {
    let transport = if matches!(monitor, Monitor::MotePci(_)) { "pci" } else { "mmio" };
    let mode = &format!("{mode} mote.transport={transport}");
    with_network(|network| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let config = full_config(guest, mode, directory.path(), network, processors);
        let socket = directory.path().join("console.socket");
        let waiting = socket.clone();
        let answering = thread::spawn(move || answer_console(&waiting));
        let outcome = run(monitor, &config);
        assert!(!socket.exists(), "the console's socket stays");
        answering.join().expect("somebody who answers");
        if let Err(why) = outcome.report().verdict() {
            panic!("{why}\n{}\n{}", outcome.output, outcome.log);
        }
        assert_eq!(outcome.code, Some(0), "{}", outcome.log);
        let console = std::fs::read(directory.path().join("console")).expect("the console's file");
        let console = String::from_utf8_lossy(&console);
        let last = if mode.starts_with("mote.test") { "mote-console plain" } else { "after the abuse" };
        assert!(console.ends_with(&format!("{last}\n")), "the console ends otherwise");
        if mode.starts_with("mote.test") {
            assert_pattern(&directory.path().join("disk"));
            assert_pages(&directory.path().join("pages"));
            let fixed = std::fs::read(directory.path().join("fixed_pages")).expect("the file");
            assert!(fixed.starts_with(b"mote") && fixed[4..].iter().all(|byte| *byte == 0), "it was written");
        }
    });
}

#[test]
fn the_guest_passes_entered_by_pvh() {
    let (monitor, guest) = programs_or_skip!();
    device_test(&monitor, &guest, "mote.test mote.protocol=pvh");
}

#[test]
fn the_guest_passes_entered_by_the_linux_boot_protocol() {
    let (monitor, guest) = programs_or_skip!();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let image = host::without_pvh(&std::fs::read(&guest).expect("the guest")).expect("a PVH note");
    let other = directory.path().join("guest");
    std::fs::write(&other, image).expect("a file in a temporary directory");
    device_test(&monitor, &other, "mote.test mote.protocol=linux");
}

#[test]
fn the_guest_finds_the_processors_and_memory_it_was_given() {
    let (monitor, guest) = programs_or_skip!();
    // The last one has memory above 4 GiB.
    for (processors, mib) in [(1, 16), (4, 256), (32, 4096)] {
        let line = format!("mote.test mote.processors={processors} mote.memory_mib={mib}");
        let mut config = host::config(&guest, &line);
        config.machine_config.vcpu_count = processors;
        config.machine_config.mem_size_mib = mib;
        let outcome = run(&monitor, &config);
        if let Err(why) = outcome.report().verdict() {
            panic!("{processors} processors, {mib} MiB: {why}\n{}\n{}", outcome.output, outcome.log);
        }
    }
}

#[test]
fn the_guest_reads_the_time_and_the_smbios_strings_it_was_given_or_those_of_a_machine_without() {
    let (monitor, guest) = programs_or_skip!();
    let strings = mote_vmm_api::Smbios {
        product_name: Some("OpenStack Nova".into()),
        serial_number: Some("b5a1".into()),
        chassis_asset_tag: Some("rack 7".into()),
        oem_strings: vec!["one".into(), "two words".into()],
        ..mote_vmm_api::Smbios::default()
    };
    let cases = [("OpenStack_Nova,b5a1,rack_7,one+two_words", Some(strings)), ("microVM,,,", None)];
    for (expected, smbios) in cases {
        for monitor in [&monitor, &with_pci(&monitor)] {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
            let line = format!("mote.test mote.smbios={expected} mote.time={}", now.as_secs());
            let mut config = host::config(&guest, &line);
            config.smbios.clone_from(&smbios);
            let outcome = run(monitor, &config);
            if let Err(why) = outcome.report().verdict() {
                panic!("{why}\n{}\n{}", outcome.output, outcome.log);
            }
        }
    }
}

#[test]
fn the_guest_passes_with_its_devices_on_pci() {
    let (monitor, guest) = programs_or_skip!();
    device_test(&with_pci(&monitor), &guest, "mote.test");
}

#[test]
fn the_guest_passes_with_several_processors_on_both_transports() {
    let (monitor, guest) = programs_or_skip!();
    for processors in [2, 4] {
        device_test_on(&monitor, &guest, "mote.test", processors);
        device_test_on(&with_pci(&monitor), &guest, "mote.test", processors);
    }
}

#[test]
fn several_queue_pairs_carry_frames_and_a_tap_without_them_is_refused() {
    let (monitor, guest) = programs_or_skip!();
    let ip = |words: &str| {
        let status = Command::new("ip").args(words.split(' ')).status().expect("ip");
        assert!(status.success(), "ip {words}");
    };
    with_network(|network| {
        if !network {
            return;
        }
        ip("tuntap add dev tap1 mode tap vnet_hdr multi_queue");
        ip("addr add 10.78.0.1/24 dev tap1");
        ip("link set tap1 up");
        for monitor in [&monitor, &with_pci(&monitor)] {
            for processors in [1, 3] {
                let line = format!(
                    "mote.test mote.expect=1,0,0 mote.pairs=3 mote.net=10.78.0.2/24,10.78.0.1 mote.mac={MAC}"
                );
                let mut config = host::config(&guest, &line);
                config.machine_config.vcpu_count = processors;
                host::add_tap(&mut config, "tap1", MAC);
                config.network_interfaces[0].num_queue_pairs = Some(3);
                let outcome = run(monitor, &config);
                if let Err(why) = outcome.report().verdict() {
                    panic!("{why}\n{}\n{}", outcome.output, outcome.log);
                }
                // A tap with one queue.
                config.network_interfaces[0].host_dev_name = "tap0".into();
                let outcome = run(monitor, &config);
                assert_eq!(outcome.code, Some(i32::from(ExitReason::BadConfig.code())), "{}", outcome.log);
                assert!(outcome.log.contains("multi_queue"), "{}", outcome.log);
            }
        }
    });
}

#[test]
fn the_kernel_carries_frames_where_it_has_vhost_net_and_it_is_named_where_not() {
    let (monitor, guest) = programs_or_skip!();
    let is_there = Path::new("/dev/vhost-net").exists();
    with_network(|network| {
        if !network {
            return;
        }
        for monitor in [&monitor, &with_pci(&monitor)] {
            for processors in [1, 3] {
                let net = "mote.net=10.77.0.2/24,10.77.0.1";
                let line = format!("mote.test mote.expect=1,0,0 {net} mote.mac={MAC}");
                let mut config = host::config(&guest, &line);
                config.machine_config.vcpu_count = processors;
                host::add_tap(&mut config, "tap0", MAC);
                config.network_interfaces[0].vhost = true;
                let outcome = run(monitor, &config);
                if is_there {
                    if let Err(why) = outcome.report().verdict() {
                        panic!("{why}\n{}\n{}", outcome.output, outcome.log);
                    }
                    assert_eq!(outcome.code, Some(0), "{}", outcome.log);
                    eprintln!("carried by vhost-net");
                    // Once is enough where exits are dear.
                    if processors > 1 || matches!(monitor, Monitor::Mote(_)) {
                        continue;
                    }
                    config = host::config(&guest, "mote.hostile");
                    config.machine_config.vcpu_count = processors;
                    host::add_tap(&mut config, "tap0", MAC);
                    config.network_interfaces[0].vhost = true;
                    let outcome = run(monitor, &config);
                    if let Err(why) = outcome.report().verdict() {
                        panic!("{why}\n{}\n{}", outcome.output, outcome.log);
                    }
                } else {
                    let expected = Some(i32::from(ExitReason::BadConfig.code()));
                    assert_eq!(outcome.code, expected, "{}", outcome.log);
                    assert!(outcome.log.contains("cannot use /dev/vhost-net"), "{}", outcome.log);
                }
            }
        }
    });
}

#[test]
fn a_static_cpu_template_is_for_its_processors_only() {
    let (monitor, guest) = programs_or_skip!();
    use mote_vmm_api::CpuTemplate;
    let info = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let is_intel = info.contains("GenuineIntel");
    let mut config = host::config(&guest, "mote.hello");
    // For the other vendor: refused on every machine.
    let other = if is_intel { CpuTemplate::T2A } else { CpuTemplate::T2 };
    config.machine_config.cpu_template = Some(other);
    let outcome = run(&monitor, &config);
    assert_eq!(outcome.code, Some(i32::from(ExitReason::BadConfig.code())), "{}", outcome.log);
    assert!(
        outcome.log.contains(&format!("the CPU template {other:?} is for processors of")),
        "{}",
        outcome.log
    );
    config.machine_config.cpu_template = Some(CpuTemplate::None);
    let outcome = run(&monitor, &config);
    assert_eq!(outcome.code, Some(0), "{}", outcome.log);
    // For this vendor: applied, or not for this model.
    config.machine_config.cpu_template = Some(if is_intel { CpuTemplate::T2 } else { CpuTemplate::T2A });
    let outcome = run(&monitor, &config);
    let refused = outcome.log.contains("is not for the model of this host's processor");
    let expected = if refused { ExitReason::BadConfig } else { ExitReason::PowerOff };
    assert_eq!(outcome.code, Some(i32::from(expected.code())), "{}", outcome.log);
}

#[test]
fn the_monitor_survives_a_hostile_guest() {
    let (monitor, guest) = programs_or_skip!();
    device_test(&monitor, &guest, "mote.hostile");
}

#[test]
fn the_monitor_survives_a_hostile_guest_on_pci() {
    let (monitor, guest) = programs_or_skip!();
    device_test(&with_pci(&monitor), &guest, "mote.hostile");
}

#[test]
fn the_guest_passes_again_and_again() {
    let (monitor, guest) = programs_or_skip!();
    let count: u32 = std::env::var("MOTE_REPEAT").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    if count == 0 {
        return eprintln!("SKIPPED: MOTE_REPEAT is not set");
    }
    for _ in 0..count {
        device_test(&monitor, &guest, "mote.test");
        device_test(&with_pci(&monitor), &guest, "mote.test");
    }
}

/// A lab (an ordinary Linux with its own KVM, under emulation) that is stopped when dropped.
struct Lab(String);

impl Lab {
    fn script() -> Command {
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab/lab"))
    }

    fn start(name: String) -> Self {
        let pid = std::process::id().to_string();
        let output =
            Self::script().args(["start", "--name", &name, "--for", &pid]).output().expect("a script");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let stopped = Self::script().args(["stop", "--name", &self.0]).status();
        assert!(stopped.is_ok_and(|status| status.success()), "lab {} stays", self.0);
    }
}

#[test]
fn the_guest_passes_under_the_kvm_of_an_ordinary_linux() {
    let (monitor, guest) = programs_or_skip!();
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: a lab needs root");
    }
    if !Lab::script().arg("needed").output().expect("a script").status.success() {
        return eprintln!("SKIPPED: this machine's own KVM is an ordinary one");
    }
    let lab = Lab::start(format!("conformance-{}", std::process::id()));
    // This program again, inside: its file system is this machine's.
    let test = std::env::current_exe().expect("this program");
    let variables = [("MOTE_VMM", monitor.program()), ("MOTE_GUEST", &guest)]
        .map(|(name, path)| format!("{name}={}", path.display()));
    let names = [
        "the_guest_passes_entered_by_pvh",
        "the_guest_passes_entered_by_the_linux_boot_protocol",
        "the_guest_passes_with_its_devices_on_pci",
        "the_kernel_carries_frames_where_it_has_vhost_net_and_it_is_named_where_not",
    ];
    let loaded = Lab::script().args(["exec", "--name", &lab.0, "--", "modprobe", "vhost_net"]).status();
    assert!(loaded.is_ok_and(|status| status.success()), "no vhost_net in the lab");
    let output = Lab::script()
        .args(["exec", "--name", &lab.0, "--", "env"])
        .args(variables)
        .arg(test)
        .args(["--exact", "--show-output", "--test-threads=1"])
        .args(names)
        .output()
        .expect("a script");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("4 passed") && !text.contains("SKIPPED"), "{text}");
    assert_eq!(text.matches("carried by vhost-net").count(), 4, "{text}");
}

#[test]
fn every_end_has_its_exit_code() {
    let (monitor, guest) = programs_or_skip!();
    let ends = [
        ("mote.hello", ExitReason::PowerOff),
        ("mote.off", ExitReason::PowerOff),
        ("mote.reboot", ExitReason::Reboot),
        ("mote.reboot=acpi", ExitReason::Reboot),
        ("mote.reboot=cf9", ExitReason::Reboot),
        ("mote.crash", ExitReason::Crash),
        ("mote.internal-error", ExitReason::Crash),
    ];
    for (mode, reason) in ends {
        let outcome = run(&monitor, &host::config(&guest, mode));
        assert_eq!(outcome.code, Some(i32::from(reason.code())), "{mode}: {}", outcome.log);
        assert_eq!(outcome.exit.map(|exit| exit.reason), Some(reason), "{mode}");
    }
}

#[test]
fn a_guest_that_never_ends_is_ended_by_sigterm() {
    let (monitor, guest) = programs_or_skip!();
    for (mode, line) in [("mote.spin", "spinning"), ("mote.halt", "halting")] {
        let mut running =
            host::Running::start(&monitor, &host::config(&guest, mode)).expect("the monitor starts");
        running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        running.terminate();
        let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(outcome.code, Some(i32::from(ExitReason::Terminated.code())), "{mode}: {}", outcome.log);
        assert_eq!(outcome.exit.map(|exit| exit.reason), Some(ExitReason::Terminated), "{mode}");
    }
}
