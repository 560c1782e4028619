//! The types of `mote-vmm`'s API: Firecracker v1's JSON (field names, defaults and error shape as in its
//! OpenAPI file), plus Mote's additions, which are marked *Mote* and never change what a Firecracker request means.
//!
//! The same types are read from `--config-file` (one [`VmConfig`] object) and from the HTTP API on the Unix socket.
//! Every request type refuses unknown fields.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod balloon;
mod console;
mod cpu_template;
mod exit;
mod memory_hotplug;
mod mmds;
mod observe;
#[cfg(test)]
mod openapi;
mod pmem;
mod rate_limiter;
pub use balloon::{
    Balloon, BalloonHintingStart, BalloonHintingStatus, BalloonPatch, BalloonStats, BalloonStatsPatch,
};
pub use console::{Console, ConsoleSize};
pub use cpu_template::{
    Bitmap, CpuConfig, CpuConfigSource, CpuTemplate, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier,
    KvmCapability, MsrModifier, Number, TextError,
};
mod smbios;
mod snapshot;
pub use exit::{ExitReason, ExitReport};
pub use memory_hotplug::{MemoryHotplug, MemoryHotplugPatch, MemoryHotplugStatus};
pub use mmds::{MmdsConfig, MmdsVersion};
pub use observe::{Logger, Metrics};
pub use pmem::{Pmem, PmemPatch};
pub use rate_limiter::{RateLimiter, TokenBucket};
pub use smbios::Smbios;
pub use snapshot::{
    DriveOverride, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotCreate, SnapshotHugePages,
    SnapshotLoad, SnapshotType, VsockOverride,
};

/// The release of Firecracker's API that the request and answer types follow, as told by `GET /version`.
pub const FIRECRACKER_API_VERSION: &str = "1.14.0";
/// Largest number of queue pairs of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 16;
/// Largest number of vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;

/// `GET /`: what this process is and in which state its VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InstanceInfo {
    /// `"mote-vmm"`.
    pub app_name: String,
    /// The VM's id, given by `--id`.
    pub id: String,
    /// Where the VM is in its life.
    pub state: InstanceState,
    /// Version of this program.
    pub vmm_version: String,
}

/// The state of the VM as Firecracker words it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum InstanceState {
    /// Not yet started.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and can be resumed.
    Paused,
}

/// `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Version {
    /// [`FIRECRACKER_API_VERSION`].
    pub firecracker_version: String,
    /// *Mote*: version of this program.
    pub mote_version: String,
}

/// The body of every 4xx answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Fault {
    /// What is wrong and what to change.
    pub fault_message: String,
}

/// `/machine-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory in MiB, at least 1.
    pub mem_size_mib: usize,
    /// Pairs of vCPUs share a core in the topology the guest sees.
    #[serde(default)]
    pub smt: bool,
    /// Record dirty pages for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// A static CPU template. Takes the place of a custom one, and `None` ends either; left out, what is set stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

/// Which pages back guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum HugePages {
    /// Ordinary ones.
    #[default]
    None,
    /// 2 MiB each, from the host's pool.
    #[serde(rename = "2M")]
    TwoMib,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        }
    }
}

/// `PATCH /machine-config`: any subset of [`MachineConfig`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// See [`MachineConfig::vcpu_count`].
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig::mem_size_mib`].
    pub mem_size_mib: Option<usize>,
    /// See [`MachineConfig::smt`].
    pub smt: Option<bool>,
    /// See [`MachineConfig::track_dirty_pages`].
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig::huge_pages`].
    pub huge_pages: Option<HugePages>,
    /// See [`MachineConfig::cpu_template`].
    pub cpu_template: Option<CpuTemplate>,
}

/// `/boot-source`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// ELF vmlinux (PVH or 64-bit entry) or bzImage. Required unless `boot_from_disk`, and left out with it.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub kernel_image_path: PathBuf,
    /// Initial ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// Kernel command line; with `boot_from_disk`, what follows the disk's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// *Mote*: boot what is on the root drive, a whole disk with a file system of its own: kernel, initrd and command line are those of its boot
    /// loader's default entry.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub boot_from_disk: bool,
}

fn is_empty(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

/// How the guest's flushes are treated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum CacheType {
    /// The device offers no flush; data reaches the disk when the host writes it back (Firecracker's default).
    #[default]
    Unsafe,
    /// The device offers flush and each one ends with `fdatasync` of the backing file.
    Writeback,
}

/// Which engine serves a drive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// A call for each request in the device's thread.
    #[default]
    Sync,
    /// io_uring; where it isn't available, as `Sync`, with a line in the log.
    Async,
}

/// *Mote*: the format of a file. It is never guessed: a guest could make a raw disk look like something else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum DriveFormat {
    /// The disk's bytes as they are.
    #[default]
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

impl DriveFormat {
    /// Whether this is [`DriveFormat::Raw`].
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
    pub fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

/// *Mote*: a file that a qcow2 image is based on. Opened read-only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BackingFile {
    /// Raw file, block device or qcow2 image.
    pub path_on_host: PathBuf,
    /// Its format.
    #[serde(default, skip_serializing_if = "DriveFormat::is_raw")]
    pub format: DriveFormat,
}

/// `/drives/{drive_id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// 1–64 characters, letters, digits and `_`; equals the id in the path. Also the serial number the guest reads
    /// (first 20 bytes, virtio 1.2 §5.2.6 `VIRTIO_BLK_T_GET_ID`).
    pub drive_id: String,
    /// File or block device. Required unless `socket`, and left out with it.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path_on_host: PathBuf,
    /// Unix socket of a vhost-user backend that serves the drive. `path_on_host`, `rate_limiter`, `io_engine`, `format` and
    /// `backing_files` are left out with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Adds `root=/dev/vda ro|rw` to the command line, or `root=PARTUUID=…`.
    pub is_root_device: bool,
    /// The partition to name as root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Opened and offered read-only. With `socket` (*Mote*): the backend must be read-only; one that is needs no word of it.
    #[serde(default)]
    pub is_read_only: bool,
    /// What a flush does.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Engine.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits of bytes and operations; every request is an operation, reads and writes are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// *Mote*: most queues that the guest may use, each with a thread of its own, 1 to [`MAX_VCPUS`]; more than vCPUs are
    /// of no use. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u8>,
    /// *Mote*: the format of `path_on_host`.
    #[serde(default, skip_serializing_if = "DriveFormat::is_raw")]
    pub format: DriveFormat,
    /// *Mote*: what a qcow2 image is based on: the first is its backing file, the second that one's, and so on. The names
    /// in the images are not used: they are content, and a tenant may have written it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing_files: Vec<BackingFile>,
}

/// `PATCH /drives/{drive_id}`, after the start. What is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Equals the id in the path.
    pub drive_id: String,
    /// Another file, or the same one after its size has changed. The guest is told the new size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Buckets to replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `/network-interfaces/{iface_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Equals the id in the path.
    pub iface_id: String,
    /// Name of a tap in the network namespace of this process. With `tap_fd` and `tap_from_request` it is only a label.
    pub host_dev_name: String,
    /// `aa:bb:cc:dd:ee:ff`; without it the guest's driver makes one up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// *Mote*: number of an inherited file descriptor that already is the tap (opened with
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-persistent: it goes when this process goes). Config file only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap_fd: Option<i32>,
    /// *Mote*: the tap is the file descriptor that comes with the request (`SCM_RIGHTS` on the API's socket, with any byte of the request;
    /// opened as for `tap_fd`). For interfaces that are added to a running machine; exactly one descriptor must come then, and none
    /// with any other request.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tap_from_request: bool,
    /// MTU to announce to the guest (VIRTIO_NET_F_MTU), at least 68.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives: bytes of frames, and frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// *Mote*: most pairs of queues that the guest may use, each with a queue of the tap (made with `multi_queue`) and a thread of its
    /// own, 1 to [`MAX_QUEUE_PAIRS`]. Default 1. Not with `tap_fd` or `tap_from_request`, nor with the metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queue_pairs: Option<u8>,
    /// *Mote*: drop what the guest sends from another source address than `guest_mac`, which is needed then.
    #[serde(default, skip_serializing_if = "is_false")]
    pub anti_spoofing: bool,
    /// *Mote*: the kernel moves the frames (/dev/vhost-net). What the VMM does itself can't stand beside it: rate limits, several queue
    /// pairs, anti-spoofing, the metadata service, the link's state.
    #[serde(default, skip_serializing_if = "is_false")]
    pub vhost: bool,
    /// *Mote*: the link is up (VIRTIO_NET_F_STATUS). While it is down, frames of both directions are lost.
    #[serde(default = "up", skip_serializing_if = "is_up")]
    pub link_up: bool,
}

impl Default for NetworkInterface {
    fn default() -> Self {
        Self {
            iface_id: String::new(),
            host_dev_name: String::new(),
            guest_mac: None,
            tap_fd: None,
            tap_from_request: false,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            num_queue_pairs: None,
            anti_spoofing: false,
            vhost: false,
            link_up: true,
        }
    }
}

const fn up() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_up(link_up: &bool) -> bool {
    *link_up
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// `PATCH /network-interfaces/{iface_id}`; what is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Equals the id in the path.
    pub iface_id: String,
    /// See [`NetworkInterface::rx_rate_limiter`]; a bucket that is given starts full, with `size` 0 it is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// See [`NetworkInterface::tx_rate_limiter`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// *Mote*: see [`NetworkInterface::link_up`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_up: Option<bool>,
}

/// `/entropy`: a virtio-rng device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits of the random bytes and of the requests for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `/vsock`: stream sockets between guest and host, over Unix sockets of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Firecracker's old name of the device; means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id, from 3 on.
    pub guest_cid: u32,
    /// Unix socket that host-initiated connections come to; with `_PORT` behind it, those that guest-initiated
    /// connections go to.
    pub uds_path: PathBuf,
}

/// `/serial`: where the first serial port's output goes. Default: stdout, with input from stdin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File the output is appended to (created 0600).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit of the output, a token is a byte: what exceeds it is dropped, the guest doesn't wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
    /// *Mote*: when the file would pass this many bytes it is renamed to `<path>.1` (replacing an older one) and
    /// started anew, so that at most twice this much is kept. Default 1 MiB. Needs `serial_out_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_limit_bytes: Option<u64>,
    /// *Mote*: a Unix stream socket that the VMM listens on: what a client writes becomes the guest's input, and each
    /// client is sent the output from when it connects (a slow client loses bytes, never the guest time).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<PathBuf>,
}

/// `PUT /actions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// The actions of `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum ActionType {
    /// Boot the VM.
    InstanceStart,
    /// Keyboard sequence through the i8042 controller.
    SendCtrlAltDel,
    /// Write metrics now.
    FlushMetrics,
}

/// `GET /vm/config` and the config file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// Kernel, initrd and command line; required to start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Block devices, in the order the guest sees them (the root device first).
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Persistent memory devices: `/dev/pmem0` and so on, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// vCPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Network devices, in the order the guest sees them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// virtio-rng.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// virtio-balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Memory that the guest can be given later (virtio-mem).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplug>,
    /// virtio-vsock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// First serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// *Mote*: a virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// *Mote*: strings of the SMBIOS tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smbios: Option<Smbios>,
    /// A custom CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfigSource>,
    /// The metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// The process's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// The process's metrics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// *Mote*: make the VM from a snapshot. Config file only, and nothing else but logger and
    /// metrics may be configured beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_load: Option<SnapshotLoad>,
}

/// `PATCH /vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VmStatePatch {
    /// The state to bring the VM into.
    pub state: VmState,
}

/// The states of `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum VmState {
    /// vCPUs stopped.
    Paused,
    /// vCPUs running.
    Resumed,
}
