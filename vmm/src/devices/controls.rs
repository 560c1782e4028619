//! What of the devices can be changed while the machine runs: one handle each, shared with the device.

use std::collections::BTreeMap;

use super::virtio::balloon::BalloonControl;
use super::virtio::block::BlockControl;
use super::virtio::mem::MemControl;
use super::virtio::net::NetControl;
use super::virtio::pmem::PmemControl;

/// The handles of a machine's devices.
#[derive(Default)]
pub struct Controls {
    /// Drives by `drive_id`.
    pub drives: BTreeMap<String, BlockControl>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonControl>,
    /// Memory that can be plugged, if there is any.
    pub memory: Option<MemControl>,
    /// Network interfaces by `iface_id`.
    pub interfaces: BTreeMap<String, NetControl>,
    /// Persistent memory by `id`.
    pub pmem: BTreeMap<String, PmemControl>,
}
