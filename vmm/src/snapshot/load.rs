//! `PUT /snapshot/load`, top to bottom: [`load`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use mote_vmm_api::{
    MemoryBackend, MemoryBackendType, SnapshotHugePages, SnapshotLoad, SnapshotType, VmConfig,
};

use super::memory::MemoryFileError;
use super::{DeviceState, FormatError, MachineState, StateError, format, memory};
use crate::boot::{BootError, Devices, PCI_BUS, PCI_HOT_PLUG, RTC};
use crate::config::{self, ConfigError, Origin};
use crate::devices::generation;
use crate::devices::pci::hotplug::HotPlugState;
use crate::kvm::{KvmError, Topology, Vm};
use crate::layout;
use crate::machine::{Machine, SharedState};
use crate::memory::MemoryError;
use crate::mmds::SharedMmds;
use crate::outcome::Outcome;

/// A snapshot could not be loaded; nothing is left running then.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No memory, or two.
    #[error("exactly one of mem_backend and mem_file_path must be given")]
    MemoryFields,
    /// A field that doesn't exist yet.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A file can't be opened.
    #[error("cannot open {field} {}", .path.display())]
    Open {
        /// Which field names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The state file is not usable.
    #[error("cannot use the state file {}", .0.display())]
    Format(PathBuf, #[source] FormatError),
    /// The memory file is not usable.
    #[error("cannot use the memory file {}", .0.display())]
    Memory(PathBuf, #[source] MemoryFileError),
    /// An override of nothing.
    #[error("{field} names {id:?}, which the snapshot does not have")]
    Override {
        /// Which field.
        field: &'static str,
        /// What it names.
        id: String,
    },
    /// A path of a device that isn't there.
    #[error("vsock_override: the snapshot has no vsock device")]
    NoVsock,
    /// A tap that was a descriptor of another process.
    #[error(
        "the tap of network interface {0:?} was an inherited descriptor: name another in network_overrides"
    )]
    TapFd(String),
    /// The configuration doesn't work here.
    #[error("the snapshot's configuration cannot be used here")]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    GuestMemory(#[from] MemoryError),
    /// A device can't be made.
    #[error("cannot make the snapshot's machine")]
    Devices(#[from] BootError),
    /// A device refuses its state.
    #[error("cannot restore the device {device}: {source}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        source: StateError,
    },
    /// Devices that don't match.
    #[error("the snapshot has a device {0:?} that its configuration does not explain")]
    ExtraDevice(String),
    /// Processors that don't match.
    #[error("the snapshot has {found} processors, its configuration says {expected}")]
    Vcpus {
        /// States.
        found: usize,
        /// Configured.
        expected: u8,
    },
    /// KVM.
    #[error("cannot restore the processors")]
    Kvm(#[from] KvmError),
    /// A vCPU thread.
    #[error("cannot start the vCPU threads")]
    Threads(#[source] io::Error),
}

/// Makes the machine of a snapshot, running if `resume_vm` says so and else paused, and its configuration.
///
/// # Errors
/// See [`LoadError`].
pub fn load(
    from: &SnapshotLoad,
    origin: Origin,
    mmds: &SharedMmds,
    outcome: &Arc<Outcome>,
) -> Result<(Machine, VmConfig), LoadError> {
    let memory_path = memory_path(from)?;
    let state = read_state(&from.snapshot_path)?;
    let memory_file = open("mem_file_path", memory_path)?;
    let config = config::validate(overridden(state.config, from, origin)?)?;
    let machine = &config.machine_config;
    if state.vcpus.len() != usize::from(machine.vcpu_count) {
        return Err(LoadError::Vcpus { found: state.vcpus.len(), expected: machine.vcpu_count });
    }

    let guest_memory = crate::memory::create_for(&config)?;
    let vm = Vm::create(&guest_memory, machine.track_dirty_pages)?;
    vm.create_interrupt_controllers()?;
    memory::read(&state.memory, &memory_file, &guest_memory)
        .map_err(|source| LoadError::Memory(memory_path.to_owned(), source))?;

    let mut devices = Devices::new(vm.wiring(), &guest_memory);
    if let Some(service) = &config.mmds_config {
        // Version and address are the saved machine's; its metadata and tokens are not: they may be about another one now.
        mmds.lock().configure(service);
        devices.mmds = Some(mmds.clone());
    }
    if state.devices.contains_key(PCI_BUS) {
        devices.attach_pci_bus(slots(&state.devices)?)?;
    }
    let keyboard = devices.attach_legacy(&config, outcome)?;
    devices.attach_virtio(&config)?;
    restore_devices(devices.stateful(), state.devices)?;
    let new_generation = devices.interrupt("the VM generation id", layout::GENERATION_IRQ)?;
    let mut parts = devices.into_parts(keyboard);

    parts.clock.restore(&state.clock, from.clock_realtime)?;
    let topology = Topology { vcpus: machine.vcpu_count, smt: machine.smt };
    parts.vcpus = vm.restore_vcpus(topology, &state.vcpus)?;
    // After the local APICs have their state, which takes the interrupt; before the guest runs.
    generation::renew(&guest_memory, &new_generation).map_err(BootError::from)?;
    parts.paused = true;
    let mut machine = Machine::start(parts, outcome).map_err(LoadError::Threads)?;
    if from.resume_vm {
        machine.resume();
    }
    Ok((machine, config))
}

fn memory_path(from: &SnapshotLoad) -> Result<&Path, LoadError> {
    if !matches!(from.huge_pages, SnapshotHugePages::Snapshot) {
        return Err(LoadError::Unsupported("huge_pages must be \"Snapshot\" (or left out)"));
    }
    match (&from.mem_backend, &from.mem_file_path) {
        (Some(MemoryBackend { backend_type: MemoryBackendType::File, backend_path }), None) => {
            Ok(backend_path)
        }
        (Some(MemoryBackend { backend_type: MemoryBackendType::Uffd, .. }), None) => {
            Err(LoadError::Unsupported(
                "backend_type Uffd is not supported by this version of mote-vmm; use File",
            ))
        }
        (None, Some(path)) => Ok(path),
        _ => Err(LoadError::MemoryFields),
    }
}

/// Opens a regular file.
fn open(field: &'static str, path: &Path) -> Result<File, LoadError> {
    let failed = |source| LoadError::Open { field, path: path.to_owned(), source };
    // O_NONBLOCK: a FIFO must be refused, not waited for.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    Ok(file)
}

fn read_state(path: &Path) -> Result<MachineState, LoadError> {
    let failed = |source| LoadError::Format(path.to_owned(), source);
    let body = format::decode(open("snapshot_path", path)?).map_err(failed)?;
    let state: MachineState = serde_json::from_slice(&body).map_err(FormatError::Body).map_err(failed)?;
    match state.kind {
        SnapshotType::Full => Ok(state),
        SnapshotType::Diff => Err(LoadError::Unsupported("diff snapshots are not supported by this version")),
    }
}

/// The saved configuration with what is different here.
fn overridden(mut config: VmConfig, from: &SnapshotLoad, origin: Origin) -> Result<VmConfig, LoadError> {
    // The descriptors are another process's.
    let mut descriptors: Vec<String> = Vec::new();
    for interface in &mut config.network_interfaces {
        if interface.tap_fd.take().is_some() | std::mem::take(&mut interface.tap_from_request) {
            descriptors.push(interface.iface_id.clone());
        }
    }
    for other in &from.network_overrides {
        if other.tap_fd.is_some() && origin == Origin::Api {
            return Err(ConfigError::TapFd(other.iface_id.clone()).into());
        }
        let interface = config.network_interfaces.iter_mut().find(|one| one.iface_id == other.iface_id);
        let unknown = || LoadError::Override { field: "network_overrides", id: other.iface_id.clone() };
        let interface = interface.ok_or_else(unknown)?;
        interface.host_dev_name.clone_from(&other.host_dev_name);
        interface.tap_fd = other.tap_fd;
        descriptors.retain(|id| *id != other.iface_id);
    }
    if let Some(iface_id) = descriptors.pop() {
        return Err(LoadError::TapFd(iface_id));
    }
    for other in &from.drive_overrides {
        let drive = config.drives.iter_mut().find(|one| one.drive_id == other.drive_id);
        let unknown = || LoadError::Override { field: "drive_overrides", id: other.drive_id.clone() };
        drive.ok_or_else(unknown)?.path_on_host.clone_from(&other.path_on_host);
    }
    if let Some(other) = &from.vsock_override {
        config.vsock.as_mut().ok_or(LoadError::NoVsock)?.uds_path.clone_from(&other.uds_path);
    }
    if from.serial_override.is_some() {
        config.serial.clone_from(&from.serial_override);
    }
    config.machine_config.track_dirty_pages = from.track_dirty_pages || from.enable_diff_snapshots;
    Ok(config)
}

/// Devices that snapshots of earlier versions don't have: they are as after a boot then.
const LATER: [&str; 2] = [RTC, PCI_HOT_PLUG];

/// The slots of the functions on the PCI bus: a machine that had some taken away has gaps.
fn slots(devices: &BTreeMap<String, DeviceState>) -> Result<BTreeMap<String, u8>, LoadError> {
    let Some(state) = devices.get(PCI_HOT_PLUG) else { return Ok(BTreeMap::new()) };
    let state: Result<HotPlugState, _> = state.get();
    let failed = |source| LoadError::Device { device: PCI_HOT_PLUG.to_owned(), source };
    Ok(state.map_err(failed)?.slots)
}

fn restore_devices(
    devices: &[SharedState],
    mut states: BTreeMap<String, DeviceState>,
) -> Result<(), LoadError> {
    for (name, device) in devices {
        let failed = |source| LoadError::Device { device: name.clone(), source };
        let Some(state) = states.remove(name) else {
            if LATER.contains(&name.as_str()) {
                continue;
            }
            return Err(failed(StateError::new("the snapshot does not have it")));
        };
        device.lock().unwrap_or_else(PoisonError::into_inner).restore(&state).map_err(failed)?;
    }
    match states.pop_first() {
        Some((name, _)) => Err(LoadError::ExtraDevice(name)),
        None => Ok(()),
    }
}
