//! The conformance guest under mote-vmm on this machine's KVM: every device, a hostile guest, every way to end.
#![cfg(feature = "host")]

use std::{fs, path::PathBuf, process::Command};

use mote_guest::host::{self, Ended, Run};

/// The programs, or why the test can't run here.
fn programs() -> Result<(PathBuf, PathBuf), String> {
    let exe = std::env::current_exe().expect("a test has a path");
    let release = exe.parent().and_then(|p| p.parent()).expect("…/release/deps/test").to_owned();
    let path = |key: &str, default: PathBuf| std::env::var_os(key).map_or(default, PathBuf::from);
    let vmm = path("MOTE_VMM", release.join("mote-vmm"));
    let guest = path("MOTE_GUEST", release.with_file_name("guest").join("mote-guest"));
    for file in [&vmm, &guest] {
        if !file.exists() {
            return Err(format!("{} is not built", file.display()));
        }
    }
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| format!("needs /dev/kvm: {e}"))?;
    Ok((vmm, guest))
}

macro_rules! run_or_skip {
    ($command_line:expr) => {
        match programs() {
            Ok((vmm, guest)) => Run::new(&vmm, &guest, $command_line),
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return;
            }
        }
    };
}

fn passes(ended: &Ended, at_least: usize) {
    let report = host::report(&ended.output);
    assert_eq!(report.failed, Vec::<String>::new(), "{ended:?}");
    assert!(report.complete && report.passed.len() >= at_least, "{ended:?}");
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn every_device_follows_the_rules_again_and_again() {
    let mut run =
        run_or_skip!("mote.test mote.expect=0,2,1 mote.memory_mib=64 mote.processors=2 mote.read_only=1");
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["rw", "ro"] {
        let path = dir.path().join(name);
        fs::write(&path, vec![0u8; 4 << 20]).expect("a disk");
        run.disks.push((name.into(), path, name == "ro"));
    }
    run.rng = true;
    run.vcpus = 2;
    let times = std::env::var("MOTE_REPEAT").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for _ in 0..times {
        passes(&run.run().expect("it starts"), 20);
    }
}

#[test]
fn a_network_device_carries_frames_of_every_size() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root (a tap)");
        return;
    }
    let mut run = run_or_skip!("mote.test mote.expect=1,0,0 mote.net=192.0.2.2/24,192.0.2.1");
    // The tap is in a network namespace of its own, in which the VMM runs, too.
    let namespace = format!("mg{}", std::process::id());
    let script = format!(
        "ip netns add {namespace} && ip -n {namespace} tuntap add tap0 mode tap vnet_hdr &&
         ip -n {namespace} addr add 192.0.2.1/24 dev tap0 && ip -n {namespace} link set tap0 up"
    );
    assert!(Command::new("sh").args(["-c", &script]).status().expect("sh runs").success());
    let wrapper = tempfile::tempdir().expect("a directory");
    let program = wrapper.path().join("vmm");
    let text = format!("#!/bin/sh\nexec nsenter --net=/run/netns/{namespace} {} \"$@\"\n", run.vmm.display());
    fs::write(&program, text).expect("a script");
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("executable");
    run.vmm = program;
    run.taps.push("tap0".into());
    let ended = run.run();
    let removed = Command::new("ip").args(["netns", "delete", &namespace]).status().expect("ip runs");
    assert!(removed.success());
    passes(&ended.expect("it starts"), 8);
}

#[test]
fn a_hostile_guest_harms_nobody() {
    let mut run = run_or_skip!("mote.hostile");
    let disk = tempfile::NamedTempFile::new().expect("a disk");
    disk.as_file().set_len(4 << 20).expect("a size");
    run.disks.push(("d".into(), disk.path().to_owned(), false));
    run.rng = true;
    passes(&run.run().expect("it starts"), 50);
}

#[test]
fn every_way_to_end_has_its_exit_code() {
    let mut run = run_or_skip!("");
    for (mode, code) in [
        ("mote.hello", 0),
        ("mote.off", 0),
        ("mote.reboot", 3),
        ("mote.reboot=acpi", 3),
        ("mote.reboot=cf9", 3),
        ("mote.crash", 4),
        ("mote.internal-error", 4),
    ] {
        run.command_line = mode.into();
        let ended = run.run().expect("it starts");
        assert_eq!(ended.code, Some(code), "{mode}: {ended:?}");
        if code == 4 {
            assert!(!ended.errors.is_empty(), "a crash says why: {ended:?}");
        }
    }
}
