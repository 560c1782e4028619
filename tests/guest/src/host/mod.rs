//! The host's side: where the guest and the monitor are, a configuration, a run, the report.
//!
//! ```no_run
//! use mote_guest::host::{self, Monitor};
//! use std::time::Duration;
//!
//! let (monitor, guest) = (Monitor::Mote(host::vmm_path()?), host::guest_path()?);
//! let outcome = host::run(&monitor, &host::config(&guest, "mote.test"), Duration::from_secs(30))?;
//! outcome.report().verdict()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mote_vmm_api::{BootSource, Drive, Entropy, MachineConfig, NetworkInterface, Pmem, VmConfig};

mod api;
mod elf;
mod network;
mod report;
mod running;
mod services;

pub use api::{request, request_with};
pub use elf::without_pvh;
pub use network::{enter_network, open_tap};
pub use report::{Report, Verdict};
pub use running::{Outcome, RunError, Running};
pub use services::dhcp_and_metadata;

/// Memory of the machines that [`config`] describes, in MiB: what the guest needs with room for its hostile mode.
pub const MEMORY_MIB: usize = 32;
/// Environment variable with the path of the monitor.
pub const VMM_VARIABLE: &str = "MOTE_VMM";
/// Environment variable with the path of the guest.
pub const GUEST_VARIABLE: &str = "MOTE_GUEST";

/// What can't be done here, as a reason to skip a test.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub String);

/// A program that can start the guest from a configuration file.
#[derive(Debug, Clone)]
pub enum Monitor {
    /// mote-vmm.
    Mote(PathBuf),
    /// mote-vmm with the devices on a PCI bus.
    MotePci(PathBuf),
    /// Firecracker.
    Firecracker(PathBuf),
}

impl Monitor {
    /// The program.
    pub fn program(&self) -> &Path {
        match self {
            Self::Mote(path) | Self::MotePci(path) | Self::Firecracker(path) => path,
        }
    }

    /// The arguments that start `config_file` without an API socket; serial output goes to stdout.
    pub fn arguments(&self, config_file: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--no-api".into(), "--config-file".into(), config_file.into()];
        match self {
            Self::Mote(_) => {}
            Self::MotePci(_) => arguments.push("--enable-pci".into()),
            // Firecracker's log goes to stdout, too.
            Self::Firecracker(_) => arguments.extend(["--level".into(), "Error".into()]),
        }
        arguments
    }
}

/// Path of mote-vmm: `$MOTE_VMM`, or `release/mote-vmm` in the target directory of the running program.
///
/// # Errors
/// There is no such file.
pub fn vmm_path() -> Result<PathBuf, Unavailable> {
    built(VMM_VARIABLE, "release/mote-vmm", "cargo build --release -p mote-vmm")
}

/// Path of the guest: `$MOTE_GUEST`, or `guest/mote-guest` in the target directory of the running program.
///
/// # Errors
/// There is no such file.
pub fn guest_path() -> Result<PathBuf, Unavailable> {
    const BUILD: &str = "cargo build -p mote-guest --features freestanding --profile guest";
    built(GUEST_VARIABLE, "guest/mote-guest", BUILD)
}

fn built(variable: &str, in_target: &str, build: &str) -> Result<PathBuf, Unavailable> {
    if let Some(path) = env::var_os(variable).map(PathBuf::from) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Unavailable(format!("{variable}={} is no file", path.display())))
        };
    }
    // target/<profile>/program or target/<profile>/deps/test.
    let program =
        env::current_exe().map_err(|error| Unavailable(format!("the path of this program: {error}")))?;
    let found = program.ancestors().skip(1).take(3).map(|directory| directory.join("..").join(in_target));
    found
        .filter(|path| path.is_file())
        .find_map(|path| path.canonicalize().ok())
        .ok_or_else(|| Unavailable(format!("{in_target} is not built: {build}, or set {variable}")))
}

/// Whether /dev/kvm can be opened.
///
/// # Errors
/// Why not.
pub fn kvm_usable() -> Result<(), Unavailable> {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    opened.map(|_| ()).map_err(|error| Unavailable(format!("/dev/kvm: {error}")))
}

/// A machine with one processor and [`MEMORY_MIB`] that starts the guest with this command line.
pub fn config(guest: &Path, command_line: &str) -> VmConfig {
    VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: guest.to_owned(),
            initrd_path: None,
            boot_args: Some(command_line.into()),
            ..BootSource::default()
        }),
        machine_config: MachineConfig { mem_size_mib: MEMORY_MIB, ..MachineConfig::default() },
        ..VmConfig::default()
    }
}

/// Adds a block device with this file.
pub fn add_drive(config: &mut VmConfig, id: &str, file: &Path, read_only: bool) {
    config.drives.push(Drive {
        drive_id: id.into(),
        path_on_host: file.to_owned(),
        is_read_only: read_only,
        cache_type: mote_vmm_api::CacheType::Writeback,
        ..Drive::default()
    });
}

/// Adds a persistent memory device with this file.
pub fn add_pmem(config: &mut VmConfig, id: &str, file: &Path, read_only: bool) {
    config.pmem.push(Pmem { id: id.into(), path_on_host: file.to_owned(), read_only, ..Pmem::default() });
}

/// Adds a network device on an existing tap.
pub fn add_tap(config: &mut VmConfig, tap: &str, mac: &str) {
    config.network_interfaces.push(NetworkInterface {
        iface_id: format!("eth{}", config.network_interfaces.len()),
        host_dev_name: tap.into(),
        guest_mac: Some(mac.into()),
        ..NetworkInterface::default()
    });
}

/// Adds virtio-rng.
pub fn add_rng(config: &mut VmConfig) {
    config.entropy = Some(Entropy::default());
}

/// Runs the guest to its end.
///
/// # Errors
/// The monitor can't be started, or it did not end in time (it is killed then).
pub fn run(monitor: &Monitor, config: &VmConfig, timeout: Duration) -> Result<Outcome, RunError> {
    Running::start(monitor, config)?.finish(timeout)
}
