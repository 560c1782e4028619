//! Where the programs under test are.

use std::path::{Path, PathBuf};

/// The directory of the built programs: `MOTE_BIN_DIR`, else the one this test was built into.
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("MOTE_BIN_DIR") {
        return dir.into();
    }
    let mut dir = std::env::current_exe().unwrap_or_default();
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    dir
}

/// A program of ours.
pub fn program(name: &str) -> PathBuf {
    bin_dir().join(name)
}

/// The conformance guest: `MOTE_GUEST`, else beside the programs in the directory of its own profile.
pub fn guest() -> PathBuf {
    std::env::var_os("MOTE_GUEST")
        .map_or_else(|| bin_dir().with_file_name("guest").join("mote-guest"), Into::into)
}

/// The top of the source tree.
pub fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Why tests that start servers on this machine can't run here, if they can't.
pub fn why_no_servers() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root (network namespaces and taps)".into());
    }
    for device in ["/dev/kvm", "/dev/net/tun"] {
        if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(device) {
            return Some(format!("needs {device}: {e}"));
        }
    }
    let missing =
        [program("mote"), program("mote-hostd"), program("mote-controller"), program("mote-vmm"), guest()]
            .into_iter()
            .find(|p| !p.exists());
    missing.map(|p| format!("{} is not built (./test builds everything)", p.display()))
}
