//! Snapshots of the conformance guest: a guest that is saved, ended, and goes on in a new process. Skipped where /dev/kvm is
//! absent or the programs aren't built.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mote_guest::host::{self, Report, Running, Unavailable, request};
use mote_vmm_api::VmConfig;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tempfile::TempDir;

const TIMEOUT: Duration = Duration::from_secs(60);
const MAC: &str = "06:00:ac:10:00:02";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// A machine that can be saved, and where its files are.
struct Place {
    vmm: PathBuf,
    guest: PathBuf,
    directory: TempDir,
    /// For processes that boot a guest.
    more_arguments: Vec<OsString>,
}

impl Place {
    fn new() -> Result<Self, Unavailable> {
        host::kvm_usable()?;
        on_the_first_cpu();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let more_arguments = Vec::new();
        Ok(Self { vmm: host::vmm_path()?, guest: host::guest_path()?, directory, more_arguments })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A process with an API socket, and with a VM if there is a configuration.
    fn start(&self, config: Option<&VmConfig>) -> Running {
        let mut arguments = vec!["--api-sock".into(), self.path("socket").into()];
        if let Some(config) = config {
            fs::write(self.path("config"), serde_json::to_vec(config).expect("plain data")).expect("a file");
            arguments.extend(["--config-file".into(), self.path("config").into()]);
            if config.snapshot_load.is_none() {
                arguments.extend_from_slice(&self.more_arguments);
            }
        }
        Running::start_program(&self.vmm, &arguments).expect("the monitor starts")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        request(&self.path("socket"), method, path, body).expect("an answer")
    }

    fn expect(&self, method: &str, path: &str, body: &str) {
        let answer = self.ask(method, path, body);
        assert_eq!(answer.0, 204, "{method} {path}: {}", answer.1);
    }

    fn create_body(&self) -> String {
        format!(r#"{{"snapshot_path":"{}","mem_file_path":"{}"}}"#, self.text("state"), self.text("memory"))
    }

    fn load_body(&self, more: &str) -> String {
        format!(
            r#"{{"snapshot_path":"{}","mem_backend":{{"backend_type":"File","backend_path":"{}"}}{more}}}"#,
            self.text("state"),
            self.text("memory")
        )
    }

    /// Pauses, saves and ends the machine; returns its output.
    fn save_and_end(&self, running: Running) -> String {
        self.expect("PATCH", "/vm", r#"{"state":"Paused"}"#);
        self.expect("PUT", "/snapshot/create", &self.create_body());
        running.terminate();
        let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(outcome.code, Some(5), "{}", outcome.log);
        outcome.output
    }
}

/// Where KVM doesn't intercept CPUID (it is missing the hardware), the guest reads the APIC id of the host's processor: the
/// guest's own test of it passes on the first one. The monitor inherits this.
fn on_the_first_cpu() {
    let mut cpus = CpuSet::new();
    // Not allowed in some containers, and not needed on most hosts.
    let _ = cpus.set(0).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus));
}

/// Runs `test` in a thread that has a network of its own.
fn with_network(test: impl FnOnce() -> Result<(), Unavailable> + Send) {
    let outcome = thread::scope(|scope| {
        scope
            .spawn(|| {
                host::enter_network(&["10.77.0.1/24", "169.254.169.254/32"])?;
                test()
            })
            .join()
    });
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn page() -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST, 80)), Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

#[test]
fn a_server_goes_on_answering_in_a_new_process() {
    with_network(|| {
        let place = Place::new()?;
        host::dhcp_and_metadata(GUEST, Ipv4Addr::new(10, 77, 0, 1));
        let mut config = host::config(&place.guest, "mote.serve");
        host::add_tap(&mut config, "tap0", MAC);
        let mut running = place.start(Some(&config));
        running.wait_for_line("serving on", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        let before = page().expect("the page");
        assert!(before.contains("200 OK"), "{before}");
        // A pause alone changes nothing.
        place.expect("PATCH", "/vm", r#"{"state":"Paused"}"#);
        place.expect("PATCH", "/vm", r#"{"state":"Resumed"}"#);
        assert_eq!(page().expect("the page"), before);
        place.save_and_end(running);

        // Twice from the same files, the second time paused first.
        let running = place.start(None);
        place.expect("PUT", "/snapshot/load", &place.load_body(r#","resume_vm":true"#));
        assert_eq!(page().expect("the page after the first load"), before);
        running.terminate();
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));

        let running = place.start(None);
        place.expect("PUT", "/snapshot/load", &place.load_body(""));
        let info = place.ask("GET", "/", "").1;
        assert!(info.contains("Paused"), "{info}");
        place.expect("PATCH", "/vm", r#"{"state":"Resumed"}"#);
        assert_eq!(page().expect("the page after the second load"), before);
        // And a snapshot of what came from a snapshot, loaded by a config file.
        place.save_and_end(running);
        let load = serde_json::from_str(&place.load_body(r#","resume_vm":true"#)).expect("a load");
        let running = place.start(Some(&VmConfig { snapshot_load: Some(load), ..VmConfig::default() }));
        assert_eq!(page().expect("the page after the third load"), before);
        running.terminate();
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        Ok(())
    });
}

#[test]
fn the_device_test_passes_across_snapshots_on_mmio() {
    device_test(&[]);
}

#[test]
fn the_device_test_passes_across_snapshots_on_pci() {
    device_test(&["--enable-pci"]);
}

#[test]
fn memory_is_plugged_and_unplugged_across_a_snapshot() {
    for more_arguments in [&[][..], &["--enable-pci"]] {
        match plug_memory(more_arguments) {
            Ok(()) => {}
            Err(why) => return eprintln!("SKIPPED: {why}"),
        }
    }
}

fn plug_memory(more_arguments: &[&str]) -> Result<(), Unavailable> {
    let mut place = Place::new()?;
    place.more_arguments = more_arguments.iter().map(Into::into).collect();
    let mut config = host::config(&place.guest, "mote.memory_hotplug");
    let hotplug = mote_vmm_api::MemoryHotplug { total_size_mib: 512, block_size_mib: 2, slot_size_mib: 128 };
    config.memory_hotplug = Some(hotplug);
    fs::write(place.path("disk"), [b"mote".as_slice(), &[0; 65_532]].concat()).expect("a file");
    host::add_drive(&mut config, "disk", &place.path("disk"), false);
    let plugged = |place: &Place| {
        let (status, body) = place.ask("GET", "/hotplug/memory", "");
        assert_eq!(status, 200, "{body}");
        let sizes: mote_vmm_api::MemoryHotplugStatus = serde_json::from_str(&body).expect("sizes");
        assert_eq!((sizes.total_size_mib, sizes.block_size_mib, sizes.slot_size_mib), (512, 2, 128));
        sizes.plugged_size_mib
    };
    let resize = |place: &Place, running: &mut Running, mib: usize| {
        place.expect("PATCH", "/hotplug/memory", &format!(r#"{{"requested_size_mib":{mib}}}"#));
        let line = format!("mote-guest: plugged {mib} MiB");
        running.wait_for_line(&line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(plugged(place), mib);
    };
    let mut running = place.start(Some(&config));
    running.wait_for_line("hot-plug of 512 MiB", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    for wrong in [3, 514] {
        let body = format!(r#"{{"requested_size_mib":{wrong}}}"#);
        let (status, answer) = place.ask("PATCH", "/hotplug/memory", &body);
        assert!(status == 400 && answer.contains("requested_size_mib"), "{status} {answer}");
    }
    resize(&place, &mut running, 300);
    resize(&place, &mut running, 64);
    place.save_and_end(running);

    let mut running = place.start(None);
    place.expect("PUT", "/snapshot/load", &place.load_body(r#","resume_vm":true"#));
    assert_eq!(plugged(&place), 64);
    // What was plugged before has its content, and what is plugged now is zero.
    resize(&place, &mut running, 512);
    resize(&place, &mut running, 0);
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    Ok(())
}

/// The whole device test, saved and loaded at several moments, with block, rng and network devices in use.
fn device_test(more_arguments: &[&str]) {
    with_network(|| {
        let mut place = Place::new()?;
        place.more_arguments = more_arguments.iter().map(Into::into).collect();
        let line = format!(
            "mote.test mote.snapshots mote.expect=1,1,1 mote.pmems=1 mote.block_ids=disk mote.net=10.77.0.2/24,10.77.0.1 mote.mac={MAC}"
        );
        let mut config = host::config(&place.guest, &line);
        let disk = fs::File::create(place.path("disk")).expect("a file");
        disk.set_len(8 << 20).expect("a sparse file");
        host::add_drive(&mut config, "disk", &place.path("disk"), false);
        host::add_rng(&mut config);
        fs::write(place.path("pages"), [b"mote".as_slice(), &[0; 8188]].concat()).expect("a file");
        host::add_pmem(&mut config, "pages", &place.path("pages"), false);
        host::add_tap(&mut config, "tap0", MAC);
        config.balloon = Some(mote_vmm_api::Balloon { amount_mib: 1, ..Default::default() });
        let uds_path = place.path("vsock");
        config.vsock = Some(mote_vmm_api::Vsock { vsock_id: None, guest_cid: 3, uds_path });
        let mut running = place.start(Some(&config));
        let mut output = String::new();
        let mut snapshots = 0;
        for wanted in
            ["block0-all-id", "block0-no-event-idx-patterns", "net0-all-ping", "pmem0-all", "rng0-all"]
        {
            if running.wait_for_line(wanted, TIMEOUT).is_err() {
                break;
            }
            let (status, answer) = place.ask("PATCH", "/vm", r#"{"state":"Paused"}"#);
            assert_eq!(status, 204, "{answer}");
            output.push_str(&place.save_and_end(running));
            snapshots += 1;
            running = place.start(None);
            place.expect("PUT", "/snapshot/load", &place.load_body(r#","resume_vm":true"#));
        }
        let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}\nbefore: {output}"));
        output.push_str(&outcome.output);
        if let Err(why) = Report::parse(&output).verdict() {
            panic!("{why}\n{output}\n{}", outcome.log);
        }
        assert_eq!(outcome.code, Some(0), "{}", outcome.log);
        assert!(snapshots >= 2, "only {snapshots} snapshots were taken");
        Ok(())
    });
}

#[test]
fn two_machines_from_one_snapshot_are_told_two_generation_ids() {
    let place = match Place::new() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let mut running = place.start(Some(&host::config(&place.guest, "mote.generation")));
    let id = |line: String, before: &str| {
        let rest = line.split(before).nth(1).unwrap_or_else(|| panic!("{line}")).to_owned();
        assert!(rest.len() >= 32, "{line}");
        rest
    };
    let line = running.wait_for_line("generation", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    let mut ids = vec![id(line, "generation ")];
    place.save_and_end(running);
    for _ in 0..2 {
        let mut running = place.start(None);
        place.expect("PUT", "/snapshot/load", &place.load_body(r#","resume_vm":true"#));
        let line = running.wait_for_line("then", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        let rest = id(line, "then ");
        let (id, told) = rest.split_once(' ').expect("two words");
        assert_eq!(told, "told");
        assert!(!ids.iter().any(|other| other == id), "{id} came twice");
        ids.push(id.to_owned());
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Waits until the machine's configuration has no such drive.
fn wait_until_gone(place: &Place, drive_id: &str) {
    let end = Instant::now() + TIMEOUT;
    let named = format!(r#""drive_id":"{drive_id}""#);
    while place.ask("GET", "/vm/config", "").1.contains(&named) {
        assert!(Instant::now() < end, "drive {drive_id} stays");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn drives_come_and_go_and_a_snapshot_keeps_the_gaps() {
    let mut place = match Place::new() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    place.more_arguments = vec!["--enable-pci".into()];
    for name in ["a", "b", "c", "d"] {
        let file = fs::File::create(place.path(name)).expect("a file");
        file.set_len(1 << 20).expect("a sparse file");
    }
    let mut config = host::config(&place.guest, "mote.hotplug");
    host::add_drive(&mut config, "a", &place.path("a"), false);
    host::add_drive(&mut config, "b", &place.path("b"), false);
    let mut running = place.start(Some(&config));
    let wait = |running: &mut Running, line: &str| {
        running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    };
    let body = |id: &str, root: bool| {
        format!(r#"{{"drive_id":"{id}","path_on_host":"{}","is_root_device":{root}}}"#, place.text(id))
    };
    wait(&mut running, "waiting");
    for (id, root, why) in [("a", false, "already a drive a"), ("c", true, "a root device")] {
        let (status, answer) = place.ask("PUT", &format!("/drives/{id}"), &body(id, root));
        assert!(status == 400 && answer.contains(why), "{status} {answer}");
    }
    place.expect("PUT", "/drives/c", &body("c", false));
    wait(&mut running, "slot 3 holds 10421af4");
    place.expect("DELETE", "/drives/a", "");
    wait(&mut running, "slot 1 has ffffffff");
    wait_until_gone(&place, "a");
    assert!(place.ask("DELETE", "/drives/a", "").1.contains("there is no drive a"));
    let open = fs::read_dir(format!("/proc/{}/fd", running.pid())).expect("its descriptors");
    let open: Vec<_> = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).collect();
    assert!(!open.contains(&place.path("a")) && open.contains(&place.path("c")), "{open:?}");
    // Slot 1 stays empty until something comes: in another process, too.
    place.save_and_end(running);
    let mut running = place.start(None);
    place.expect("PUT", "/snapshot/load", &place.load_body(""));
    let (status, answer) = place.ask("PUT", "/drives/d", &body("d", false));
    assert!(status == 400 && answer.contains("paused"), "{status} {answer}");
    place.expect("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    place.expect("PUT", "/drives/d", &body("d", false));
    wait(&mut running, "slot 1 holds 10421af4");
    place.expect("DELETE", "/drives/c", "");
    wait(&mut running, "slot 3 has ffffffff");
    wait_until_gone(&place, "c");
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
}

/// How many tap devices a process has open.
fn taps_of(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let is_tap = |path: &PathBuf| path == Path::new("/dev/net/tun");
    open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).filter(is_tap).count()
}

#[test]
fn interfaces_come_with_the_descriptors_of_their_taps_and_a_snapshot_needs_new_ones() {
    with_network(|| {
        let mut place = Place::new()?;
        place.more_arguments = vec!["--enable-pci".into()];
        let mut config = host::config(&place.guest, "mote.hotplug");
        fs::write(place.path("a"), vec![0; 1 << 20]).expect("a file");
        host::add_drive(&mut config, "a", &place.path("a"), false);
        let mut running = place.start(Some(&config));
        let wait = |running: &mut Running, line: &str| {
            running.wait_for_line(line, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        };
        wait(&mut running, "waiting");
        let interface = |from_request: bool| {
            format!(
                r#"{{"iface_id":"nic","host_dev_name":"label","guest_mac":"{MAC}","tap_from_request":{from_request}}}"#
            )
        };
        let put = |body: &str, taps: &[&OwnedFd]| {
            host::request_with(&place.path("socket"), "PUT", "/network-interfaces/nic", body, taps)
                .expect("an answer")
        };
        let tap = host::open_tap("tap1").expect("a tap");
        let file: OwnedFd = fs::File::open(place.path("a")).expect("a file").into();
        for (body, taps, why) in [
            (interface(true), [].as_slice(), "needs one file descriptor"),
            (interface(true), [&tap, &tap].as_slice(), "needs one file descriptor"),
            (interface(false), [&tap].as_slice(), "takes none"),
            (interface(true), [&file].as_slice(), "is not a tap"),
        ] {
            let (status, answer) = put(&body, taps);
            assert!(status == 400 && answer.contains(why), "{status} {answer}");
        }
        assert_eq!(taps_of(running.pid()), 0, "what wasn't used is closed");
        assert_eq!(put(&interface(true), &[&tap]).0, 204);
        drop(tap);
        wait(&mut running, "slot 2 holds 10411af4");
        assert_eq!(taps_of(running.pid()), 1);

        place.save_and_end(running);
        assert!(!Path::new("/sys/class/net/tap1").exists(), "the monitor's was the last");
        let mut running = place.start(None);
        let (status, answer) = place.ask("PUT", "/snapshot/load", &place.load_body(""));
        assert!(status == 400 && answer.contains("network_overrides"), "{status} {answer}");
        let other = r#","resume_vm":true,"network_overrides":[{"iface_id":"nic","host_dev_name":"tap0"}]"#;
        place.expect("PUT", "/snapshot/load", &place.load_body(other));
        place.expect("DELETE", "/network-interfaces/nic", "");
        wait(&mut running, "slot 2 has ffffffff");
        let end = Instant::now() + TIMEOUT;
        while place.ask("GET", "/vm/config", "").1.contains("iface_id") {
            assert!(Instant::now() < end, "the interface stays");
            thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(taps_of(running.pid()), 0);
        running.terminate();
        running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
        Ok(())
    });
}

#[test]
fn devices_behind_mmio_registers_stay() {
    let place = match Place::new() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    fs::write(place.path("a"), vec![0; 1 << 20]).expect("a file");
    let mut config = host::config(&place.guest, "mote.spin");
    host::add_drive(&mut config, "a", &place.path("a"), false);
    let mut running = place.start(Some(&config));
    running.wait_for_line("spinning", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    let body = format!(r#"{{"drive_id":"b","path_on_host":"{}","is_root_device":false}}"#, place.text("a"));
    for (method, path, body) in [("PUT", "/drives/b", body.as_str()), ("DELETE", "/drives/a", "")] {
        let (status, answer) = place.ask(method, path, body);
        assert!(status == 400 && answer.contains("--enable-pci"), "{method}: {status} {answer}");
    }
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
}

/// A small machine that was saved, for tests of what is refused.
fn saved() -> Result<Place, Unavailable> {
    let place = Place::new()?;
    let mut config = host::config(&place.guest, "mote.test");
    config.machine_config.mem_size_mib = 16;
    fs::write(place.path("disk"), vec![0; 1 << 20]).expect("a file");
    host::add_drive(&mut config, "disk", &place.path("disk"), false);
    let running = place.start(Some(&config));
    place.save_and_end(running);
    Ok(place)
}

/// What a fresh process answers to the load.
fn refusal(place: &Place, more: &str) -> String {
    let running = place.start(None);
    let (status, answer) = place.ask("PUT", "/snapshot/load", &place.load_body(more));
    assert_eq!(status, 400, "{answer}");
    // It can still be configured.
    place.expect("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#);
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    answer
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("the file");
    bytes[at] ^= 1;
    fs::write(path, bytes).expect("the file");
}

#[test]
fn damaged_truncated_and_foreign_snapshots_are_refused_with_the_reason() {
    let place = match saved() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let (state, memory) = (place.path("state"), place.path("memory"));
    let good = fs::read(&state).expect("the state file");
    // Magic, version, reserved, length, checksum, first, middle and last byte of the body.
    let places = [0, 8, 10, 12, 16, 24, 56, good.len() / 2, good.len() - 1];
    for at in places {
        flip(&state, at);
        let answer = refusal(&place, "");
        assert!(answer.contains("state file"), "byte {at}: {answer}");
        fs::write(&state, &good).expect("the state file");
    }
    fs::write(&state, &good[..good.len() - 1]).expect("the state file");
    assert!(refusal(&place, "").contains("truncated"));
    fs::write(&state, &good).expect("the state file");

    // Memory: the guest's first code, and a page that was zero.
    for at in [0x10_0000, (15 << 20) + 5] {
        flip(&memory, at);
        assert!(refusal(&place, "").contains("damaged"));
        flip(&memory, at);
    }
    let file = fs::File::options().write(true).open(&memory).expect("the memory file");
    file.set_len(8 << 20).expect("shorter");
    assert!(refusal(&place, "").contains("truncated"));
    file.set_len(16 << 20).expect("longer");
    assert!(
        refusal(&place, r#","drive_overrides":[{"drive_id":"x","path_on_host":"/"}]"#)
            .contains("drive_overrides")
    );

    // Another disk.
    fs::write(place.path("disk"), vec![0; 2 << 20]).expect("a file");
    fs::remove_file(&memory).expect("the memory file");
    assert!(refusal(&place, "").contains("mem_file_path"));
}

#[test]
fn what_is_not_supported_yet_and_what_is_too_early_is_refused_by_name() {
    let place = match saved() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let running = place.start(None);
    let uffd = place.load_body("").replace("File", "Uffd");
    let both = place.load_body(r#","mem_file_path":"/x""#);
    for (body, wanted) in [
        (uffd, "Uffd"),
        (both, "exactly one of mem_backend and mem_file_path"),
        (place.load_body(r#","vsock_override":{"uds_path":"/x"}"#), "vsock_override"),
        (place.load_body(r#","huge_pages":"2M""#), "huge_pages"),
        (
            place.load_body(r#","network_overrides":[{"iface_id":"e","host_dev_name":"t"}]"#),
            "network_overrides",
        ),
    ] {
        let (status, answer) = place.ask("PUT", "/snapshot/load", &body);
        assert!(status == 400 && answer.contains(wanted), "{wanted}: {answer}");
    }
    assert!(place.ask("PUT", "/snapshot/create", &place.create_body()).1.contains("before starting"));
    place.expect("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
    let (status, answer) = place.ask("PUT", "/snapshot/load", &place.load_body(""));
    assert!(status == 400 && answer.contains("after configuring boot-specific resources"), "{answer}");
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));

    let running = place.start(None);
    place.expect("PUT", "/snapshot/load", &place.load_body(""));
    let diff = place.create_body().replace('{', r#"{"snapshot_type":"Diff","#);
    assert!(place.ask("PUT", "/snapshot/create", &diff).1.contains("snapshot_type Diff"));
    let device = place.create_body().replace(&place.text("state"), "/dev/null");
    assert!(place.ask("PUT", "/snapshot/create", &device).1.contains("not a regular file"));
    assert_eq!(
        fs::read_dir(place.directory.path())
            .expect("it")
            .filter_map(Result::ok)
            .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "tmp"))
            .count(),
        0
    );
    running.terminate();
    running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn several_processors_go_on() {
    let place = match Place::new() {
        Ok(place) => place,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let mut config = host::config(&place.guest, "mote.test mote.processors=4");
    config.machine_config.vcpu_count = 4;
    let running = place.start(Some(&config));
    let mut output = place.save_and_end(running);
    let running = place.start(None);
    place.expect("PUT", "/snapshot/load", &place.load_body(r#","resume_vm":true"#));
    let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    output.push_str(&outcome.output);
    if let Err(why) = Report::parse(&output).verdict() {
        panic!("{why}\n{output}\n{}", outcome.log);
    }
}
