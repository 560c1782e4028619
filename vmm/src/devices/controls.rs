//! What of the devices can be changed while the machine runs: one handle each, shared with the device.

use std::collections::BTreeMap;

use mote_vmm_api::DrivePatch;

use super::DeviceError;
use super::virtio::balloon::BalloonControl;
use super::virtio::block::BlockControl;
use super::virtio::mem::MemControl;
use super::virtio::net::NetControl;
use super::virtio::pmem::PmemControl;
use super::virtio::vhost::block::VhostUserControl;

/// A drive, by who serves it.
#[derive(Clone)]
pub enum DriveControl {
    /// This process.
    Own(BlockControl),
    /// Another one.
    VhostUser(VhostUserControl),
}

impl DriveControl {
    /// Changes the drive.
    ///
    /// # Errors
    /// See [`BlockControl::update`] and [`VhostUserControl::update`].
    pub fn update(&self, patch: &DrivePatch) -> Result<(), DeviceError> {
        match self {
            Self::Own(control) => control.update(patch),
            Self::VhostUser(control) => control.update(patch),
        }
    }
}

/// The handles of a machine's devices.
#[derive(Default)]
pub struct Controls {
    /// Drives by `drive_id`.
    pub drives: BTreeMap<String, DriveControl>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonControl>,
    /// Memory that can be plugged, if there is any.
    pub memory: Option<MemControl>,
    /// Network interfaces by `iface_id`.
    pub interfaces: BTreeMap<String, NetControl>,
    /// Persistent memory by `id`.
    pub pmem: BTreeMap<String, PmemControl>,
}
