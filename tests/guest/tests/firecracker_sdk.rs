//! An unmodified SDK for Firecracker from PyPI (tests/clients/firecracker_sdk.py says which; `./test` installs it, and
//! `MOTE_FIRECRACKER_SDK` names its Python) drives mote-vmm with the guest. Skipped where it, /dev/kvm, root or /dev/net/tun
//! is absent or the programs aren't built.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use mote_guest::host::{self, Unavailable};

/// Fewest requests that the script must have made.
const REQUESTS: u64 = 25;

fn drives_the_monitor() -> Result<(), Unavailable> {
    let python = std::env::var_os("MOTE_FIRECRACKER_SDK").map(PathBuf::from);
    let missing = "MOTE_FIRECRACKER_SDK doesn't name the Python of a Firecracker SDK (./test installs it)";
    let python = python.ok_or_else(|| Unavailable(missing.into()))?;
    host::kvm_usable()?;
    let (vmm, guest) = (host::vmm_path()?, host::guest_path()?);
    host::enter_network(&["169.254.100.1/16"])?;
    // No random letters: the script wants a path in lower case.
    let name = format!("mote-sdk-{}", std::process::id());
    let directory =
        tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir().expect("a temporary directory");
    let output = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../clients/firecracker_sdk.py"))
        .args([&vmm, &guest])
        .arg(directory.path())
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", directory.path())
        .output()
        .expect("Python starts");
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
    let result: serde_json::Value =
        serde_json::from_str(said.lines().last().unwrap_or_default()).expect("the script's result");
    assert!(result["requests"].as_u64() >= Some(REQUESTS), "{result}");
    Ok(())
}

#[test]
fn an_unmodified_sdk_for_firecracker_drives_the_monitor() {
    // In a thread of its own, which enters a network of its own.
    match thread::spawn(drives_the_monitor).join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
