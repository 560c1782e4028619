//! Firecracker's memory hot-plug.

use serde::{Deserialize, Serialize};

/// `PUT /hotplug/memory`: memory beside the machine's that the guest can be given and asked to give back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// Most memory in MiB; a multiple of `slot_size_mib`.
    pub total_size_mib: usize,
    /// What the guest takes or gives at a time, in MiB: a power of two, at least 2.
    #[serde(default = "block_size")]
    pub block_size_mib: usize,
    /// What the host shows to the guest or hides from it at a time, in MiB: a multiple of `block_size_mib`, at least 128.
    #[serde(default = "slot_size")]
    pub slot_size_mib: usize,
}

const fn block_size() -> usize {
    2
}

const fn slot_size() -> usize {
    128
}

/// `PATCH /hotplug/memory`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugPatch {
    /// Memory that the guest is asked to have of it, in MiB: a multiple of the block size, at most `total_size_mib`.
    pub requested_size_mib: usize,
}

/// `GET /hotplug/memory`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MemoryHotplugStatus {
    /// See [`MemoryHotplug::total_size_mib`].
    pub total_size_mib: usize,
    /// See [`MemoryHotplug::slot_size_mib`].
    pub slot_size_mib: usize,
    /// See [`MemoryHotplug::block_size_mib`].
    pub block_size_mib: usize,
    /// Memory that the guest has of it, in MiB.
    pub plugged_size_mib: usize,
    /// Memory that it is asked to have.
    pub requested_size_mib: usize,
}
