//! Drives and network interfaces that are added to a running machine and taken from it.

use std::os::fd::OwnedFd;

use mote_vmm_api::{Drive, NetworkInterface, VmConfig};

use crate::boot::{BootError, Devices};
use crate::config::{self, ConfigError, Origin};
use crate::machine::Machine;

/// A device could not be added or taken.
#[derive(Debug, thiserror::Error)]
pub enum HotPlugError {
    /// Devices behind mmio registers stay.
    #[error(
        "devices are added to and taken from a running microVM on a PCI bus only: start mote-vmm with --enable-pci"
    )]
    NoBus,
    /// Processors are stopped.
    #[error("devices are not added to or taken from a microVM that is paused: resume it first (PATCH /vm)")]
    Paused,
    /// The same id.
    #[error("there is already a {0}: PATCH changes it, DELETE asks the guest to give it up")]
    Exists(String),
    /// No such device.
    #[error("there is no {0}")]
    Unknown(String),
    /// The guest has mounted its root long ago.
    #[error("a root device cannot be added to a running microVM: leave is_root_device out or say false")]
    Root,
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device can't be made.
    #[error(transparent)]
    Device(#[from] BootError),
}

/// Name of a drive on the machine's list.
pub fn drive_name(drive_id: &str) -> String {
    format!("drive {drive_id}")
}

/// Name of a network interface on the machine's list.
pub fn interface_name(iface_id: &str) -> String {
    format!("network interface {iface_id}")
}

/// Opens a drive, puts it on the bus and tells the guest.
///
/// # Errors
/// See [`HotPlugError`]; nothing has changed then.
pub fn add_drive(machine: &mut Machine, config: &mut VmConfig, drive: &Drive) -> Result<(), HotPlugError> {
    if config.drives.iter().any(|other| other.drive_id == drive.drive_id) {
        return Err(HotPlugError::Exists(drive_name(&drive.drive_id)));
    }
    if drive.is_root_device {
        return Err(HotPlugError::Root);
    }
    let mut wanted = config.clone();
    config::set_drive(&mut wanted, drive.clone())?;
    plug(machine, &drive_name(&drive.drive_id), |devices| devices.attach_drive(drive))?;
    *config = wanted;
    Ok(())
}

/// Opens a network interface (over `tap`, which came with the request, if it is said to have one), puts it on the bus and tells the guest.
///
/// # Errors
/// See [`HotPlugError`]; nothing has changed then, and the tap is closed.
pub fn add_interface(
    machine: &mut Machine,
    config: &mut VmConfig,
    interface: &NetworkInterface,
    tap: Option<OwnedFd>,
) -> Result<(), HotPlugError> {
    let id = &interface.iface_id;
    if config.network_interfaces.iter().any(|other| other.iface_id == *id) {
        return Err(HotPlugError::Exists(interface_name(id)));
    }
    let mut wanted = config.clone();
    config::set_network_interface(&mut wanted, interface.clone(), Origin::HotPlug)?;
    plug(machine, &interface_name(id), |devices| devices.attach_interface(interface, None, tap))?;
    *config = wanted;
    Ok(())
}

fn plug(
    machine: &mut Machine,
    name: &str,
    attach: impl FnOnce(&mut Devices<'_>) -> Result<(), BootError>,
) -> Result<(), HotPlugError> {
    if machine.is_paused() {
        return Err(HotPlugError::Paused);
    }
    let bus = machine.pci().cloned().ok_or(HotPlugError::NoBus)?;
    let memory = machine.memory().clone();
    let mut devices = Devices::new(machine.wiring().clone(), &memory);
    devices.use_bus(bus.clone());
    if let Err(error) = attach(&mut devices) {
        bus.hot_plug().withdraw(name);
        return Err(error.into());
    }
    machine.take_over(devices.into_added());
    bus.hot_plug().announce(name);
    Ok(())
}

/// Asks the guest to give up a device of this name (see [`drive_name`]). It stays until the guest does.
///
/// # Errors
/// See [`HotPlugError`].
pub fn ask_for(machine: &Machine, name: &str) -> Result<(), HotPlugError> {
    if machine.is_paused() {
        return Err(HotPlugError::Paused);
    }
    let bus = machine.pci().ok_or(HotPlugError::NoBus)?;
    if bus.hot_plug().ask(name) { Ok(()) } else { Err(HotPlugError::Unknown(name.to_owned())) }
}

/// Closes what the guest has given up, and forgets its configuration; whether there was anything.
pub fn collect(machine: &mut Machine, config: &mut VmConfig) -> bool {
    let Some(bus) = machine.pci().cloned() else { return false };
    let ejected = bus.hot_plug().take_ejected();
    for name in &ejected {
        machine.forget(name);
        config.drives.retain(|drive| drive_name(&drive.drive_id) != *name);
        config.network_interfaces.retain(|interface| interface_name(&interface.iface_id) != *name);
        crate::log::info!("the guest gave up {name}");
    }
    !ejected.is_empty()
}
