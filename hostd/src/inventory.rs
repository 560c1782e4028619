//! What this host has.

use std::{fs, path::Path};

use mote_host_api::Inventory;

use crate::kvm_check;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Why the host can't say what it has.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// Memory.
    #[error("cannot read /proc/meminfo")]
    Memory(#[source] std::io::Error),
    /// Memory.
    #[error("/proc/meminfo has no MemTotal")]
    MemTotal,
    /// Disk.
    #[error("cannot examine the file system of {}", path.display())]
    Disk {
        /// State directory.
        path: std::path::PathBuf,
        /// Cause.
        source: nix::Error,
    },
    /// Kernel.
    #[error("cannot ask for the kernel's name")]
    Kernel(#[source] nix::Error),
}

/// Looks at the machine; servers' disks are under `state_dir`, which exists.
///
/// # Errors
/// [`InventoryError`].
pub fn inventory(state_dir: &Path) -> Result<Inventory, InventoryError> {
    let meminfo = fs::read_to_string("/proc/meminfo").map_err(InventoryError::Memory)?;
    let disk = nix::sys::statvfs::statvfs(state_dir)
        .map_err(|source| InventoryError::Disk { path: state_dir.to_owned(), source })?;
    let uname = nix::sys::utsname::uname().map_err(InventoryError::Kernel)?;
    // Of what this process may use: in a container that can be less than the machine has.
    let vcpus =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Ok(Inventory {
        vcpus,
        memory_mib: mem_total(&meminfo).ok_or(InventoryError::MemTotal)? / MIB,
        disk_gib: disk.blocks() as u64 * disk.fragment_size() as u64 / GIB,
        kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        traits: kvm_check::check().traits(),
        ..Inventory::default()
    })
}

/// The machine's host name.
pub fn host_name() -> Option<String> {
    let name = nix::sys::utsname::uname().ok()?.nodename().to_str()?.trim().to_owned();
    (!name.is_empty() && name != "(none)").then_some(name)
}

/// `MemTotal` in bytes.
fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(mem_total("MemTotal:       16318396 kB\nMemFree: 1 kB\n"), Some(16_318_396 * 1024));
        assert_eq!(mem_total("MemFree: 1 kB\n"), None);
        assert_eq!(mem_total("MemTotal: 99999999999999999999 kB\n"), None);
    }

    #[test]
    fn this_machine_has_something() {
        let found = inventory(Path::new("/")).unwrap();
        assert!(found.vcpus > 0 && found.memory_mib > 0 && found.disk_gib > 0);
    }
}
