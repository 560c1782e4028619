//! Snapshots: a machine in two files, and a machine from two files.
//!
//! | module | what it is |
//! |---|---|
//! | [`state`] | what a device does to be part of one |
//! | [`format`] | the state file: version, checksum, body |
//! | [`memory`] | the memory file |
//! | [`create`], [`load`] | from a paused machine, and to one |
//!
//! The state file holds plain data only: the configuration and what processors, clock and devices say. Everything live
//! is made anew at load from the configuration (with overrides), just as at a boot, and then given its saved state. What
//! is on the drives is no part of a snapshot: who takes one keeps the drives as they are at that moment.
//!
//! A snapshot is refused, with words that say why, when any byte of either file has changed, when one of them is cut off
//! or belongs to another snapshot, when it is of a newer format or for a processor that this host can't stand in for.
//! Checksums don't authenticate: whoever may write the files may say what the guest's memory is.

use std::collections::BTreeMap;

use mote_vmm_api::{SnapshotType, VmConfig};
use serde::{Deserialize, Serialize};

use crate::kvm::{ClockState, VcpuState};

mod create;
mod format;
mod load;
mod memory;
mod state;

pub use create::{CreateError, create};
pub use format::{FormatError, VERSION, version};
pub use load::{LoadError, load};
pub use memory::MemoryFileError;
pub use state::{DeviceState, StateError, Stateful};

/// What a state file's body goes through before anything is made of it.
#[cfg(any(test, feature = "fuzzing"))]
pub fn parse(body: &[u8]) {
    if let Ok(state) = serde_json::from_slice::<MachineState>(body) {
        let _ = crate::config::validate(state.config);
    }
}

/// The body of a state file. Later minor versions add fields with a default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Version of the program that wrote it, for people.
    written_by: String,
    /// What the memory file holds.
    kind: SnapshotType,
    /// The configuration, without boot source: what it said is in memory.
    config: VmConfig,
    memory: memory::MemoryMap,
    vcpus: Vec<VcpuState>,
    clock: ClockState,
    /// By their names on the machine's list.
    devices: BTreeMap<String, DeviceState>,
}
