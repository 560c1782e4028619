//! Snapshots: what `PUT /snapshot/create` and `PUT /snapshot/load` take.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Serial;

/// What a snapshot holds of the memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What has changed since the last snapshot. Not supported by this version.
    Diff,
}

/// `PUT /snapshot/create`; the VM must be paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// [`SnapshotType::Full`] unless said otherwise.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File that the machine's state is written to. A regular file that is there is replaced when the new one is whole.
    pub snapshot_path: PathBuf,
    /// File that the guest's memory is written to, sparse.
    pub mem_file_path: PathBuf,
}

/// Where the memory of a snapshot comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// Kind.
    pub backend_type: MemoryBackendType,
    /// The memory file.
    pub backend_path: PathBuf,
}

/// Kinds of [`MemoryBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum MemoryBackendType {
    /// The file that `PUT /snapshot/create` wrote; it is read and checked as a whole.
    File,
    /// Pages by userfaultfd from another process. Not supported by this version.
    Uffd,
}

/// Another tap for an interface of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Name of the tap to use.
    pub host_dev_name: String,
    /// *Mote*: number of an inherited file descriptor that is the tap, as in
    /// [`NetworkInterface::tap_fd`](crate::NetworkInterface::tap_fd). Config file only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap_fd: Option<i32>,
}

/// Another socket for the vsock device of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: PathBuf,
}

/// *Mote*: another file for a drive of a snapshot, with the same content and size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// Its file here.
    pub path_on_host: PathBuf,
}

/// Huge pages of a VM made from a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum SnapshotHugePages {
    /// As the snapshot's VM had it.
    #[default]
    Snapshot,
    /// The host's default.
    None,
    /// Transparent huge pages.
    Transparent,
    /// hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// `PUT /snapshot/load`, before anything else is configured. *Mote*: also `snapshot-load` in the config file, alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory. This or `mem_file_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// The memory file: the older way to say `mem_backend` with `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Older name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Record dirty pages for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Run at once; else the VM is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other taps.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for vsock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// The guest's monotonic clock goes on as if it had not stopped.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Huge pages.
    #[serde(default)]
    pub huge_pages: SnapshotHugePages,
    /// *Mote*: other files for drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// *Mote*: another place for the serial port's output and input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_override: Option<Serial>,
}
