//! A VM's configuration while it is put together: Firecracker's rules about what may stand beside what.

use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mote_vmm_api::{
    Balloon, BootSource, Console, CpuConfig, CpuConfigSource, CpuTemplate, Drive, DriveFormat, DrivePatch,
    HugePages, IoEngine, MAX_QUEUE_PAIRS, MAX_VCPUS, MachineConfig, MachineConfigPatch, MemoryHotplug,
    MmdsConfig, NetworkInterface, NetworkInterfacePatch, Pmem, PmemPatch, RateLimiter, Serial, Smbios,
    VmConfig, Vsock,
};

use crate::memory::MAX_MEMORY_MIB;
use crate::smbios::{self, SmbiosError};

/// Where the metadata service is if nothing else is said.
pub const MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Largest file with a CPU template.
const MAX_CPU_TEMPLATE: u64 = 1 << 20;
/// Smallest block of memory that can be plugged, and smallest slot.
const MIN_BLOCK_MIB: usize = 2;
const MIN_SLOT_MIB: usize = 128;
/// Most slots: KVM has some more, and other devices want some, too.
const MAX_SLOTS: usize = 16_384;
/// Longest chain of backing files.
const MAX_BACKING_FILES: usize = 16;
/// Longest id of a drive or interface.
const MAX_ID: usize = 64;
/// Longest path of a Unix socket (`sun_path` with its terminator) less `_` and ten digits of a port.
const MAX_UDS_PATH: usize = 107 - 11;

/// A part of the configuration is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// vCPU count.
    #[error("vcpu_count must be between 1 and {MAX_VCPUS}, and 1 or even with smt, not {0}")]
    VcpuCount(u8),
    /// Memory size.
    #[error("mem_size_mib must be between 1 and {MAX_MEMORY_MIB}, not {0}")]
    MemorySize(usize),
    /// Huge pages are whole.
    #[error("mem_size_mib {0} must be even with huge_pages 2M")]
    HugePagesSize(usize),
    /// A balloon gives back ordinary pages.
    #[error("a balloon cannot give back parts of huge pages: leave out huge_pages 2M or the balloon")]
    HugePagesBalloon,
    /// Huge pages are reserved at the start.
    #[error("memory that can be plugged has ordinary pages: leave out huge_pages 2M or memory-hotplug")]
    HugePagesHotplug,
    /// Sizes of memory that can be plugged.
    #[error(
        "memory hot-plug: block_size_mib {} must be a power of two and at least {MIN_BLOCK_MIB}, slot_size_mib {} a \
         multiple of it and at least {MIN_SLOT_MIB}, total_size_mib {} a multiple of that, at least one and at most \
         {MAX_SLOTS} slots",
        .0.block_size_mib, .0.slot_size_mib, .0.total_size_mib
    )]
    MemoryHotplug(MemoryHotplug),
    /// An id.
    #[error("the {what} {id:?} must have 1 to {MAX_ID} characters, letters, digits and underscores only")]
    Id {
        /// Which field.
        what: &'static str,
        /// What was given.
        id: String,
    },
    /// The same id twice in one file.
    #[error("the {what} {id:?} is used twice")]
    DuplicateId {
        /// Which field.
        what: &'static str,
        /// What was given.
        id: String,
    },
    /// Two root devices.
    #[error("A root block device already exists! (is_root_device of drive {0:?})")]
    SecondRoot(String),
    /// Two root devices.
    #[error("A root pmem device already exist (root_device of pmem {0:?})")]
    SecondRootPmem(String),
    /// Two root devices of different kinds.
    #[error(
        "Attempt to add {what} as a root device while the root device defined as a {other} device (of {id:?})"
    )]
    OtherRoot {
        /// What was added.
        what: &'static str,
        /// What there is.
        other: &'static str,
        /// Id of what was added.
        id: String,
    },
    /// `partuuid` goes into the command line.
    #[error("partuuid of drive {0:?} may only have letters, digits and hyphens")]
    PartitionUuid(String),
    /// An engine for raw files.
    #[error("io_engine Async of drive {0:?} is for format Raw only; leave it out")]
    FormatEngine(String),
    /// Backing files of nothing, or too many.
    #[error("backing_files of drive {0:?} need format Qcow2, and there may be {MAX_BACKING_FILES} of them")]
    BackingFiles(String),
    /// Neither of both.
    #[error("drive {0:?} needs path_on_host (a file or block device), or the socket of a vhost-user backend")]
    NoBackend(String),
    /// What is the backend's.
    #[error(
        "drive {0:?} has a socket: leave out path_on_host, rate_limiter, io_engine, format and backing_files, which are its \
         backend's"
    )]
    SocketAndMore(String),
    /// A path that no socket can have.
    #[error("socket of drive {0:?} is no Unix socket: start the vhost-user backend before")]
    NoSocket(String),
    /// Whoever serves queues elsewhere has all memory, and memory that isn't plugged must not be touched.
    #[error(
        "memory-hotplug does not go with a drive that has a socket (vhost-user) or an interface with vhost: whoever serves them \
         could touch memory that is not plugged"
    )]
    VhostHotplug,
    /// A number of queues.
    #[error("num_queues of drive {0:?} must be between 1 and {MAX_VCPUS}")]
    Queues(String),
    /// A MAC address.
    #[error("guest_mac {0:?} is no unicast MAC address like 06:00:ac:10:00:02")]
    Mac(String),
    /// More memory than there is.
    #[error(
        "amount_mib {amount_mib} of the balloon is more than the mem_size_mib {mem_size_mib} of the machine"
    )]
    BalloonAmount {
        /// What was given.
        amount_mib: u32,
        /// The machine's.
        mem_size_mib: usize,
    },
    /// The statistics' queue is there or not from the start on.
    #[error("stats_polling_interval_s can't be changed from or to 0 after the start")]
    BalloonStatistics,
    /// A context id of somebody else.
    #[error("guest_cid must be from 3 to 4294967294, not {0}")]
    GuestCid(u32),
    /// A path that no socket can have.
    #[error("uds_path must have 1 to {max} bytes, so that a port fits behind it", max = MAX_UDS_PATH)]
    UdsPath,
    /// A MAC address in use.
    #[error("The MAC address is already in use: {0}")]
    MacInUse(String),
    /// An MTU.
    #[error("mtu must be at least 68, not {0}")]
    Mtu(u16),
    /// Anti-spoofing compares with `guest_mac`.
    #[error("anti_spoofing of interface {0:?} needs guest_mac")]
    AntiSpoofing(String),
    /// What the VMM does can't be done where it sees no frame.
    #[error("interface {id:?} has vhost, its frames pass the VMM by: leave out {field}, or vhost")]
    VhostInterface {
        /// Which interface.
        id: String,
        /// What can't be there.
        field: &'static str,
    },
    /// A number of queue pairs.
    #[error(
        "num_queue_pairs of interface {0:?} must be between 1 and {MAX_QUEUE_PAIRS}, and 1 with tap_fd and tap_from_request"
    )]
    QueuePairs(String),
    /// The metadata service has one queue pair.
    #[error(
        "the metadata service needs an interface with one queue pair: leave out num_queue_pairs of {0:?}"
    )]
    MmdsQueuePairs(String),
    /// A descriptor of the process cannot be named by an API client.
    #[error("tap_fd of interface {0:?} can only be given in the config file")]
    TapFd(String),
    /// A descriptor of a request that isn't there when the machine starts.
    #[error(
        "tap_from_request of interface {0:?} can only be given for an interface that is added to a running microVM"
    )]
    TapFromRequest(String),
    /// A file that is not there.
    #[error("{what}: cannot open {}", .path.display())]
    File {
        /// Which field.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A template's file.
    #[error("the CPU template {} is wrong", .path.display())]
    CpuTemplate {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// Nobody would reach the metadata service.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    MmdsNoInterfaces,
    /// RFC 3927 §2.1: the first and the last 256 addresses are reserved.
    #[error("The MMDS IPv4 address is not link local.")]
    MmdsAddress,
    /// An interface that isn't there.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface."
    )]
    MmdsInterface,
    /// A snapshot beside a configuration.
    #[error("snapshot-load must stand alone: the snapshot brings the whole configuration")]
    SnapshotLoad,
    /// A string of the SMBIOS tables.
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// Neither of both.
    #[error(
        "boot-source needs kernel_image_path, or boot_from_disk: true for a root drive that brings its own kernel"
    )]
    NoKernel,
    /// Two kernels.
    #[error(
        "boot_from_disk takes kernel and initrd from the root drive: leave kernel_image_path and initrd_path out"
    )]
    BootFromDisk,
    /// `log_limit_bytes` alone.
    #[error("log_limit_bytes of the console needs output_path")]
    ConsoleLogLimit,
    /// `log_limit_bytes` alone.
    #[error("log_limit_bytes needs serial_out_path")]
    LogLimit,
}

/// Where a configuration comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The config file: the one who starts the process.
    File,
    /// A client of the socket, before the start.
    Api,
    /// A client of the socket that adds a device to a machine that runs.
    HotPlug,
}

/// Checks a whole configuration by putting it together part by part.
///
/// # Errors
/// The first part that is wrong.
pub fn validate(config: VmConfig) -> Result<VmConfig, ConfigError> {
    let mut valid = VmConfig::default();
    set_machine(&mut valid, config.machine_config)?;
    if let Some(source) = config.boot_source {
        set_boot_source(&mut valid, source)?;
    }
    for drive in config.drives {
        if valid.drives.iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(ConfigError::DuplicateId { what: "drive_id", id: drive.drive_id });
        }
        set_drive(&mut valid, drive)?;
    }
    for pmem in config.pmem {
        if valid.pmem.iter().any(|other| other.id == pmem.id) {
            return Err(ConfigError::DuplicateId { what: "pmem id", id: pmem.id });
        }
        set_pmem(&mut valid, pmem)?;
    }
    for interface in config.network_interfaces {
        if valid.network_interfaces.iter().any(|other| other.iface_id == interface.iface_id) {
            return Err(ConfigError::DuplicateId { what: "iface_id", id: interface.iface_id });
        }
        set_network_interface(&mut valid, interface, Origin::File)?;
    }
    valid.cpu_config = match config.cpu_config {
        Some(CpuConfigSource::File(path)) => Some(CpuConfigSource::Template(read_cpu_template(&path)?)),
        source => source,
    };
    if valid.cpu_config.is_some() {
        valid.machine_config.cpu_template = None;
    }
    if let Some(mmds) = config.mmds_config {
        set_mmds(&mut valid, mmds)?;
    }
    valid.entropy = config.entropy;
    if let Some(balloon) = config.balloon {
        set_balloon(&mut valid, balloon)?;
    }
    if let Some(hotplug) = config.memory_hotplug {
        set_memory_hotplug(&mut valid, hotplug)?;
    }
    if let Some(vsock) = config.vsock {
        set_vsock(&mut valid, vsock)?;
    }
    if let Some(serial) = config.serial {
        set_serial(&mut valid, serial)?;
    }
    if let Some(console) = config.console {
        set_console(&mut valid, console)?;
    }
    if let Some(smbios) = config.smbios {
        set_smbios(&mut valid, smbios)?;
    }
    Ok(valid)
}

/// Sets vCPUs and memory.
///
/// # Errors
/// A number is out of range.
pub fn set_machine(config: &mut VmConfig, mut machine: MachineConfig) -> Result<(), ConfigError> {
    let vcpus = machine.vcpu_count;
    if vcpus == 0 || vcpus > MAX_VCPUS || machine.smt && vcpus > 1 && vcpus % 2 == 1 {
        return Err(ConfigError::VcpuCount(vcpus));
    }
    if machine.mem_size_mib == 0 || machine.mem_size_mib > MAX_MEMORY_MIB {
        return Err(ConfigError::MemorySize(machine.mem_size_mib));
    }
    if machine.huge_pages == HugePages::TwoMib {
        if !machine.mem_size_mib.is_multiple_of(2) {
            return Err(ConfigError::HugePagesSize(machine.mem_size_mib));
        }
        if config.balloon.is_some() {
            return Err(ConfigError::HugePagesBalloon);
        }
        if config.memory_hotplug.is_some() {
            return Err(ConfigError::HugePagesHotplug);
        }
    }
    // There is one template, and the last one counts, as in Firecracker.
    match machine.cpu_template {
        None => machine.cpu_template = config.machine_config.cpu_template,
        Some(template) => {
            config.cpu_config = None;
            machine.cpu_template = Some(template).filter(|template| *template != CpuTemplate::None);
        }
    }
    config.machine_config = machine;
    Ok(())
}

/// Changes the given parts of vCPUs and memory.
///
/// # Errors
/// The result would be out of range; nothing is changed then.
pub fn patch_machine(config: &mut VmConfig, patch: &MachineConfigPatch) -> Result<(), ConfigError> {
    let old = &config.machine_config;
    let machine = MachineConfig {
        vcpu_count: patch.vcpu_count.unwrap_or(old.vcpu_count),
        mem_size_mib: patch.mem_size_mib.unwrap_or(old.mem_size_mib),
        smt: patch.smt.unwrap_or(old.smt),
        track_dirty_pages: patch.track_dirty_pages.unwrap_or(old.track_dirty_pages),
        huge_pages: patch.huge_pages.unwrap_or(old.huge_pages),
        cpu_template: patch.cpu_template,
    };
    set_machine(config, machine)
}

/// Sets kernel, initrd and command line; the files must be there.
///
/// # Errors
/// A file cannot be opened.
pub fn set_boot_source(config: &mut VmConfig, source: BootSource) -> Result<(), ConfigError> {
    let names_kernel = !source.kernel_image_path.as_os_str().is_empty();
    if source.boot_from_disk {
        if names_kernel || source.initrd_path.is_some() {
            return Err(ConfigError::BootFromDisk);
        }
        config.boot_source = Some(source);
        return Ok(());
    }
    if !names_kernel {
        return Err(ConfigError::NoKernel);
    }
    check_file("kernel_image_path", &source.kernel_image_path)?;
    if let Some(initrd) = &source.initrd_path {
        check_file("initrd_path", initrd)?;
    }
    config.boot_source = Some(source);
    Ok(())
}

/// Adds a drive or replaces the one with its id.
///
/// # Errors
/// The id, the partition or the file is wrong, or there is another root device.
pub fn set_drive(config: &mut VmConfig, drive: Drive) -> Result<(), ConfigError> {
    check_id("drive_id", &drive.drive_id)?;
    if let Some(uuid) = &drive.partuuid
        && (uuid.is_empty() || !uuid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
    {
        return Err(ConfigError::PartitionUuid(drive.drive_id));
    }
    let is_other_root = |other: &Drive| other.is_root_device && other.drive_id != drive.drive_id;
    if drive.is_root_device && config.drives.iter().any(is_other_root) {
        return Err(ConfigError::SecondRoot(drive.drive_id));
    }
    if drive.is_root_device && config.pmem.iter().any(|pmem| pmem.root_device) {
        return Err(ConfigError::OtherRoot { what: "block", other: "pmem", id: drive.drive_id });
    }
    if drive.format != DriveFormat::Raw && drive.io_engine != IoEngine::Sync {
        return Err(ConfigError::FormatEngine(drive.drive_id));
    }
    if drive.format == DriveFormat::Raw && !drive.backing_files.is_empty()
        || drive.backing_files.len() > MAX_BACKING_FILES
    {
        return Err(ConfigError::BackingFiles(drive.drive_id));
    }
    if drive.num_queues.is_some_and(|queues| queues == 0 || queues > MAX_VCPUS) {
        return Err(ConfigError::Queues(drive.drive_id));
    }
    if drive.socket.is_some() {
        check_vhost_user(config, &drive)?;
    } else if drive.path_on_host.as_os_str().is_empty() {
        return Err(ConfigError::NoBackend(drive.drive_id));
    } else {
        check_file("path_on_host", &drive.path_on_host)?;
    }
    for backing in &drive.backing_files {
        check_file("backing_files", &backing.path_on_host)?;
    }
    replace_or_add(&mut config.drives, drive, |drive| &drive.drive_id);
    Ok(())
}

/// What a drive that another process serves must not have.
fn check_vhost_user(config: &VmConfig, drive: &Drive) -> Result<(), ConfigError> {
    let Drive { path_on_host, rate_limiter, io_engine, format, backing_files, .. } = drive;
    let alone = path_on_host.as_os_str().is_empty()
        && rate_limiter.is_none()
        && *io_engine == IoEngine::Sync
        && *format == DriveFormat::Raw
        && backing_files.is_empty();
    if !alone {
        return Err(ConfigError::SocketAndMore(drive.drive_id.clone()));
    }
    if config.memory_hotplug.is_some() {
        return Err(ConfigError::VhostHotplug);
    }
    let kind = drive.socket.as_deref().and_then(|path| std::fs::metadata(path).ok());
    if kind.is_some_and(|found| found.file_type().is_socket()) {
        Ok(())
    } else {
        Err(ConfigError::NoSocket(drive.drive_id.clone()))
    }
}

/// Takes over a change of a running machine's drive, for who asks for the configuration.
pub fn patch_drive(config: &mut VmConfig, patch: &DrivePatch) {
    let Some(drive) = config.drives.iter_mut().find(|drive| drive.drive_id == patch.drive_id) else { return };
    if let Some(path) = &patch.path_on_host {
        drive.path_on_host.clone_from(path);
    }
    drive.rate_limiter = patched(drive.rate_limiter, patch.rate_limiter);
}

/// Adds a persistent memory device or replaces the one with its id.
///
/// # Errors
/// The id or the file is wrong, or there is another root device.
pub fn set_pmem(config: &mut VmConfig, pmem: Pmem) -> Result<(), ConfigError> {
    check_id("pmem id", &pmem.id)?;
    if pmem.root_device {
        if config.pmem.iter().any(|other| other.root_device && other.id != pmem.id) {
            return Err(ConfigError::SecondRootPmem(pmem.id));
        }
        if config.drives.iter().any(|drive| drive.is_root_device) {
            return Err(ConfigError::OtherRoot { what: "pmem", other: "block", id: pmem.id });
        }
    }
    check_file("path_on_host", &pmem.path_on_host)?;
    replace_or_add(&mut config.pmem, pmem, |pmem| &pmem.id);
    Ok(())
}

/// Notes what was changed of a running persistent memory device.
pub fn patch_pmem(config: &mut VmConfig, patch: &PmemPatch) {
    if let Some(pmem) = config.pmem.iter_mut().find(|pmem| pmem.id == patch.id) {
        pmem.rate_limiter = patched(pmem.rate_limiter, patch.rate_limiter);
    }
}

/// Adds an interface or replaces the one with its id.
///
/// # Errors
/// The id, the MAC address or the MTU is wrong, or a descriptor is named by an API client.
pub fn set_network_interface(
    config: &mut VmConfig,
    interface: NetworkInterface,
    origin: Origin,
) -> Result<(), ConfigError> {
    check_id("iface_id", &interface.iface_id)?;
    if interface.tap_fd.is_some() && origin != Origin::File {
        return Err(ConfigError::TapFd(interface.iface_id));
    }
    if interface.tap_from_request && origin != Origin::HotPlug {
        return Err(ConfigError::TapFromRequest(interface.iface_id));
    }
    if let Some(mtu) = interface.mtu.filter(|mtu| *mtu < 68) {
        return Err(ConfigError::Mtu(mtu));
    }
    let pairs = interface.num_queue_pairs.unwrap_or(1);
    let has_one_queue = interface.tap_fd.is_some() || interface.tap_from_request;
    if pairs == 0 || pairs > MAX_QUEUE_PAIRS || pairs > 1 && has_one_queue {
        return Err(ConfigError::QueuePairs(interface.iface_id));
    }
    let has_metadata = |mmds: &MmdsConfig| mmds.network_interfaces.contains(&interface.iface_id);
    if pairs > 1 && config.mmds_config.as_ref().is_some_and(has_metadata) {
        return Err(ConfigError::MmdsQueuePairs(interface.iface_id));
    }
    if interface.vhost {
        check_vhost_interface(config, &interface)?;
    }
    if interface.anti_spoofing && interface.guest_mac.is_none() {
        return Err(ConfigError::AntiSpoofing(interface.iface_id));
    }
    if let Some(mac) = &interface.guest_mac {
        let bytes = parse_mac(mac).ok_or_else(|| ConfigError::Mac(mac.clone()))?;
        let taken = config.network_interfaces.iter().any(|other| {
            other.iface_id != interface.iface_id
                && other.guest_mac.as_deref().and_then(parse_mac) == Some(bytes)
        });
        if taken {
            return Err(ConfigError::MacInUse(mac.clone()));
        }
    }
    replace_or_add(&mut config.network_interfaces, interface, |interface| &interface.iface_id);
    Ok(())
}

/// What an interface that the kernel serves must not have.
fn check_vhost_interface(config: &VmConfig, interface: &NetworkInterface) -> Result<(), ConfigError> {
    let served = |mmds: &MmdsConfig| mmds.network_interfaces.contains(&interface.iface_id);
    let wrong = [
        ("rx_rate_limiter", interface.rx_rate_limiter.is_some()),
        ("tx_rate_limiter", interface.tx_rate_limiter.is_some()),
        ("anti_spoofing", interface.anti_spoofing),
        ("link_up", !interface.link_up),
        ("num_queue_pairs", interface.num_queue_pairs.is_some_and(|pairs| pairs > 1)),
        ("it in mmds-config", config.mmds_config.as_ref().is_some_and(served)),
    ];
    if let Some((field, _)) = wrong.into_iter().find(|(_, is_there)| *is_there) {
        return Err(ConfigError::VhostInterface { id: interface.iface_id.clone(), field });
    }
    if config.memory_hotplug.is_some() { Err(ConfigError::VhostHotplug) } else { Ok(()) }
}

/// Sets the balloon.
///
/// # Errors
/// It is asked for more memory than the machine has.
pub fn set_balloon(config: &mut VmConfig, balloon: Balloon) -> Result<(), ConfigError> {
    check_balloon_amount(config, balloon.amount_mib)?;
    if config.machine_config.huge_pages == HugePages::TwoMib {
        return Err(ConfigError::HugePagesBalloon);
    }
    config.balloon = Some(balloon);
    Ok(())
}

/// Whether the machine has as much memory.
///
/// # Errors
/// It hasn't.
pub fn check_balloon_amount(config: &VmConfig, amount_mib: u32) -> Result<(), ConfigError> {
    let mem_size_mib = config.machine_config.mem_size_mib;
    if amount_mib as usize > mem_size_mib {
        return Err(ConfigError::BalloonAmount { amount_mib, mem_size_mib });
    }
    Ok(())
}

/// Sets memory that can be plugged.
///
/// # Errors
/// The sizes are impossible.
pub fn set_memory_hotplug(config: &mut VmConfig, hotplug: MemoryHotplug) -> Result<(), ConfigError> {
    let MemoryHotplug { total_size_mib: total, block_size_mib: block, slot_size_mib: slot } = hotplug;
    let possible = block >= MIN_BLOCK_MIB
        && block.is_power_of_two()
        && slot >= MIN_SLOT_MIB
        && slot.is_multiple_of(block)
        && total >= slot
        && total.is_multiple_of(slot)
        && total / slot <= MAX_SLOTS
        && total <= MAX_MEMORY_MIB;
    if !possible {
        return Err(ConfigError::MemoryHotplug(hotplug));
    }
    if config.machine_config.huge_pages == HugePages::TwoMib {
        return Err(ConfigError::HugePagesHotplug);
    }
    if config.drives.iter().any(|drive| drive.socket.is_some())
        || config.network_interfaces.iter().any(|interface| interface.vhost)
    {
        return Err(ConfigError::VhostHotplug);
    }
    config.memory_hotplug = Some(hotplug);
    Ok(())
}

/// Sets the socket device.
///
/// # Errors
/// The context id is reserved (virtio 1.2 §5.10.4), or the path too long for a socket.
pub fn set_vsock(config: &mut VmConfig, vsock: Vsock) -> Result<(), ConfigError> {
    if !(3..u32::MAX).contains(&vsock.guest_cid) {
        return Err(ConfigError::GuestCid(vsock.guest_cid));
    }
    if !(1..=MAX_UDS_PATH).contains(&vsock.uds_path.as_os_str().len()) {
        return Err(ConfigError::UdsPath);
    }
    config.vsock = Some(vsock);
    Ok(())
}

/// Sets a custom CPU template, which takes the place of a static one.
pub fn set_cpu_config(config: &mut VmConfig, template: CpuConfig) {
    config.machine_config.cpu_template = None;
    config.cpu_config = Some(CpuConfigSource::Template(template));
}

/// Reads a CPU template.
///
/// # Errors
/// The file can't be read, is too large, or is no template.
pub fn read_cpu_template(path: &Path) -> Result<CpuConfig, ConfigError> {
    let failed = |source| ConfigError::File { what: "cpu-config", path: path.to_owned(), source };
    let mut bytes = Vec::new();
    // One byte more, to see whether there is one.
    let limited = File::open(path).map(|file| file.take(MAX_CPU_TEMPLATE + 1));
    limited.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MAX_CPU_TEMPLATE {
        return Err(failed(io::Error::other(format!("it has more than {MAX_CPU_TEMPLATE} bytes"))));
    }
    serde_json::from_slice(&bytes)
        .map_err(|source| ConfigError::CpuTemplate { path: path.to_owned(), source })
}

/// Sets the metadata service, whose interfaces must be there.
///
/// # Errors
/// Interfaces or address are wrong.
pub fn set_mmds(config: &mut VmConfig, mut mmds: MmdsConfig) -> Result<(), ConfigError> {
    let address = *mmds.ipv4_address.get_or_insert(MMDS_ADDRESS);
    let [169, 254, third, _] = address.octets() else { return Err(ConfigError::MmdsAddress) };
    if !(1..=254).contains(&third) {
        return Err(ConfigError::MmdsAddress);
    }
    if mmds.network_interfaces.is_empty() {
        return Err(ConfigError::MmdsNoInterfaces);
    }
    let exists = |id: &String| config.network_interfaces.iter().any(|interface| interface.iface_id == *id);
    if !mmds.network_interfaces.iter().all(exists) {
        return Err(ConfigError::MmdsInterface);
    }
    let several = |interface: &&NetworkInterface| interface.num_queue_pairs.is_some_and(|pairs| pairs > 1);
    let named = |interface: &&NetworkInterface| mmds.network_interfaces.contains(&interface.iface_id);
    if let Some(interface) = config.network_interfaces.iter().filter(several).find(named) {
        return Err(ConfigError::MmdsQueuePairs(interface.iface_id.clone()));
    }
    if let Some(interface) = config.network_interfaces.iter().filter(named).find(|interface| interface.vhost)
    {
        let id = interface.iface_id.clone();
        return Err(ConfigError::VhostInterface { id, field: "it in mmds-config" });
    }
    config.mmds_config = Some(mmds);
    Ok(())
}

/// Notes what was changed of a running interface.
pub fn patch_network_interface(config: &mut VmConfig, patch: &NetworkInterfacePatch) {
    let of_patch = |interface: &&mut NetworkInterface| interface.iface_id == patch.iface_id;
    let Some(interface) = config.network_interfaces.iter_mut().find(of_patch) else { return };
    interface.rx_rate_limiter = patched(interface.rx_rate_limiter, patch.rx_rate_limiter);
    interface.tx_rate_limiter = patched(interface.tx_rate_limiter, patch.tx_rate_limiter);
    interface.link_up = patch.link_up.unwrap_or(interface.link_up);
}

/// The limits after a patch replaced the buckets that it names.
fn patched(limits: Option<RateLimiter>, patch: Option<RateLimiter>) -> Option<RateLimiter> {
    let (Some(limits), Some(patch)) = (limits, patch) else { return patch.or(limits) };
    Some(RateLimiter { bandwidth: patch.bandwidth.or(limits.bandwidth), ops: patch.ops.or(limits.ops) })
}

/// Sets where the serial port leads.
///
/// # Errors
/// A limit for no file.
pub fn set_serial(config: &mut VmConfig, serial: Serial) -> Result<(), ConfigError> {
    if serial.log_limit_bytes.is_some() && serial.serial_out_path.is_none() {
        return Err(ConfigError::LogLimit);
    }
    config.serial = Some(serial);
    Ok(())
}

/// Sets the virtio console.
///
/// # Errors
/// A limit of no file.
pub fn set_console(config: &mut VmConfig, console: Console) -> Result<(), ConfigError> {
    if console.log_limit_bytes.is_some() && console.output_path.is_none() {
        return Err(ConfigError::ConsoleLogLimit);
    }
    config.console = Some(console);
    Ok(())
}

/// Sets the strings of the SMBIOS tables.
///
/// # Errors
/// One of them can't be there.
pub fn set_smbios(config: &mut VmConfig, smbios: Smbios) -> Result<(), ConfigError> {
    smbios::check(&smbios)?;
    config.smbios = Some(smbios);
    Ok(())
}

fn replace_or_add<T>(list: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match list.iter().position(|other| id(other) == id(&item)) {
        Some(index) => list[index] = item,
        None => list.push(item),
    }
}

fn check_id(what: &'static str, id: &str) -> Result<(), ConfigError> {
    let valid = (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if valid { Ok(()) } else { Err(ConfigError::Id { what, id: id.chars().take(MAX_ID).collect() }) }
}

/// The file can be read and is one that has content (not a directory, not a pipe).
fn check_file(what: &'static str, path: &Path) -> Result<(), ConfigError> {
    let failed = |source| ConfigError::File { what, path: path.to_owned(), source };
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(failed(io::Error::other("it is neither a file nor a block device")));
    }
    File::open(path).map(drop).map_err(failed)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let is_multicast = bytes[0] & 1 == 1;
    (parts.next().is_none() && !is_multicast).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(id: &str, root: bool) -> Drive {
        serde_json::from_value(serde_json::json!({
            "drive_id": id, "path_on_host": "/proc/self/exe", "is_root_device": root,
        }))
        .unwrap()
    }

    fn interface(id: &str, mac: &str) -> NetworkInterface {
        serde_json::from_value(serde_json::json!({"iface_id": id, "host_dev_name": "t", "guest_mac": mac}))
            .unwrap()
    }

    #[test]
    fn vcpu_counts_follow_firecrackers_rule() {
        let mut config = VmConfig::default();
        let mut try_count = |vcpu_count, smt| {
            set_machine(&mut config, MachineConfig { vcpu_count, smt, ..Default::default() }).is_ok()
        };
        assert!(try_count(1, true) && try_count(2, true) && try_count(32, false) && try_count(3, false));
        assert!(!try_count(0, false) && !try_count(33, false) && !try_count(3, true));
    }

    #[test]
    fn huge_pages_are_whole_and_without_a_balloon() {
        let machine = |mem_size_mib| MachineConfig {
            mem_size_mib,
            huge_pages: HugePages::TwoMib,
            ..MachineConfig::default()
        };
        let balloon = Balloon { amount_mib: 1, ..Balloon::default() };
        let mut config = VmConfig::default();
        assert!(matches!(set_machine(&mut config, machine(33)), Err(ConfigError::HugePagesSize(33))));
        set_machine(&mut config, machine(32)).unwrap();
        assert!(matches!(set_balloon(&mut config, balloon.clone()), Err(ConfigError::HugePagesBalloon)));
        let mut config = VmConfig { balloon: Some(balloon), ..VmConfig::default() };
        assert!(matches!(set_machine(&mut config, machine(32)), Err(ConfigError::HugePagesBalloon)));
    }

    #[test]
    fn a_patch_that_fails_changes_nothing() {
        let mut config = VmConfig::default();
        let patch = MachineConfigPatch { vcpu_count: Some(2), mem_size_mib: Some(0), ..Default::default() };
        assert!(patch_machine(&mut config, &patch).is_err());
        assert_eq!(config, VmConfig::default());
    }

    #[test]
    fn a_second_root_device_is_refused_but_the_first_may_be_replaced() {
        let mut config = VmConfig::default();
        set_drive(&mut config, drive("a", true)).unwrap();
        set_drive(&mut config, drive("a", true)).unwrap();
        assert_eq!(config.drives.len(), 1);
        assert!(matches!(set_drive(&mut config, drive("b", true)), Err(ConfigError::SecondRoot(_))));
    }

    #[test]
    fn what_does_not_fit_together_in_a_drive_is_refused() {
        let mut config = VmConfig::default();
        let qcow2 = Drive { format: DriveFormat::Qcow2, ..drive("a", false) };
        let ring = Drive { io_engine: IoEngine::Async, ..qcow2.clone() };
        assert!(matches!(set_drive(&mut config, ring), Err(ConfigError::FormatEngine(_))));
        let backing =
            mote_vmm_api::BackingFile { path_on_host: "/proc/self/exe".into(), format: DriveFormat::Raw };
        let raw = Drive { backing_files: vec![backing.clone()], ..drive("a", false) };
        assert!(matches!(set_drive(&mut config, raw), Err(ConfigError::BackingFiles(_))));
        let long = Drive { backing_files: vec![backing; MAX_BACKING_FILES + 1], ..qcow2 };
        assert!(matches!(set_drive(&mut config, long), Err(ConfigError::BackingFiles(_))));
        for (queues, fits) in [(0, false), (1, true), (MAX_VCPUS, true), (MAX_VCPUS + 1, false)] {
            let drive = Drive { num_queues: Some(queues), ..drive("a", false) };
            assert_eq!(set_drive(&mut config, drive).is_ok(), fits, "{queues}");
        }
    }

    #[test]
    fn ids_and_macs_are_checked() {
        let mut config = VmConfig::default();
        assert!(set_drive(&mut config, drive("a-b", false)).is_err());
        assert!(set_drive(&mut config, drive(&"a".repeat(65), false)).is_err());
        let mut set = |id, mac| set_network_interface(&mut config, interface(id, mac), Origin::Api);
        set("e0", "06:00:00:00:00:0a").unwrap();
        assert!(matches!(set("e1", "06:00:00:00:00:0A"), Err(ConfigError::MacInUse(_))));
        for bad in ["", "06:00:00:00:00", "06:00:00:00:00:0a:0b", "+6:00:00:00:00:00", "01:00:00:00:00:00"] {
            assert!(matches!(set("e1", bad), Err(ConfigError::Mac(_))), "{bad}");
        }
    }

    #[test]
    fn the_metadata_service_needs_an_interface_and_a_link_local_address() {
        let mut config = VmConfig::default();
        set_network_interface(&mut config, interface("e0", "06:00:00:00:00:0a"), Origin::Api).unwrap();
        let mut set = |ids: &[&str], address: &str| {
            let network_interfaces = ids.iter().map(|id| (*id).to_owned()).collect();
            let ipv4_address = Some(address.parse().unwrap());
            set_mmds(&mut config, MmdsConfig { network_interfaces, ipv4_address, ..MmdsConfig::default() })
        };
        assert!(matches!(set(&[], "169.254.169.254"), Err(ConfigError::MmdsNoInterfaces)));
        assert!(matches!(set(&["e0", "e1"], "169.254.169.254"), Err(ConfigError::MmdsInterface)));
        for outside in ["169.254.0.5", "169.254.255.1", "10.0.0.1"] {
            assert!(matches!(set(&["e0"], outside), Err(ConfigError::MmdsAddress)), "{outside}");
        }
        set(&["e0"], "169.254.170.2").unwrap();
        let default = MmdsConfig { network_interfaces: vec!["e0".to_owned()], ..MmdsConfig::default() };
        set_mmds(&mut config, default).unwrap();
        assert_eq!(config.mmds_config.unwrap().ipv4_address, Some(MMDS_ADDRESS));
    }

    #[test]
    fn there_is_one_root_device_among_drives_and_persistent_memory() {
        let pmem = |id: &str, root_device| Pmem {
            id: id.to_owned(),
            path_on_host: "/proc/self/exe".into(),
            root_device,
            ..Pmem::default()
        };
        let mut config = VmConfig::default();
        set_pmem(&mut config, pmem("a", true)).unwrap();
        assert!(matches!(set_pmem(&mut config, pmem("b", true)), Err(ConfigError::SecondRootPmem(_))));
        set_pmem(&mut config, pmem("b", false)).unwrap();
        let error = set_drive(&mut config, drive("d", true)).unwrap_err();
        assert!(error.to_string().contains("block as a root device while the root device defined as a pmem"));
        set_pmem(&mut config, pmem("a", false)).unwrap();
        set_drive(&mut config, drive("d", true)).unwrap();
        assert!(matches!(set_pmem(&mut config, pmem("a", true)), Err(ConfigError::OtherRoot { .. })));
        assert_eq!(config.pmem.len(), 2);
        config.pmem.push(pmem("b", false));
        assert!(matches!(validate(config), Err(ConfigError::DuplicateId { .. })));
        let missing = Pmem { path_on_host: "/no/such/file".into(), ..pmem("c", false) };
        assert!(set_pmem(&mut VmConfig::default(), missing).is_err());
    }

    #[test]
    fn sizes_of_memory_that_can_be_plugged_fit_each_other() {
        let set = |total_size_mib, block_size_mib, slot_size_mib| {
            let hotplug = MemoryHotplug { total_size_mib, block_size_mib, slot_size_mib };
            set_memory_hotplug(&mut VmConfig::default(), hotplug).is_ok()
        };
        for (total, block, slot) in
            [(128, 2, 128), (1024, 128, 128), (MAX_SLOTS * 128, 2, 128), (260, 2, 130)]
        {
            assert!(set(total, block, slot), "{total} {block} {slot}");
        }
        let wrong = [
            (0, 2, 128),
            (64, 2, 128),
            (1000, 2, 128),
            (1024, 1, 128),
            (1024, 0, 128),
            (1024, 3, 129),
            (1024, 2, 64),
            (1040, 4, 130),
            ((MAX_SLOTS + 1) * 128, 2, 128),
            (usize::MAX / 128 * 128, 2, 128),
        ];
        for (total, block, slot) in wrong {
            assert!(!set(total, block, slot), "{total} {block} {slot}");
        }
        let hotplug = MemoryHotplug { total_size_mib: 128, block_size_mib: 2, slot_size_mib: 128 };
        let huge = MachineConfig { huge_pages: HugePages::TwoMib, ..MachineConfig::default() };
        let mut config = VmConfig::default();
        set_memory_hotplug(&mut config, hotplug).unwrap();
        assert!(matches!(set_machine(&mut config, huge.clone()), Err(ConfigError::HugePagesHotplug)));
        let mut config = VmConfig::default();
        set_machine(&mut config, huge).unwrap();
        assert!(matches!(set_memory_hotplug(&mut config, hotplug), Err(ConfigError::HugePagesHotplug)));
    }

    #[test]
    fn queue_pairs_are_few_and_not_for_descriptors_or_metadata() {
        let with = |num_queue_pairs, tap_fd| NetworkInterface {
            num_queue_pairs,
            tap_fd,
            ..interface("e0", "06:00:00:00:00:0a")
        };
        let set = |interface| set_network_interface(&mut VmConfig::default(), interface, Origin::File);
        for (pairs, fd) in [(Some(0), None), (Some(17), None), (Some(2), Some(3))] {
            assert!(matches!(set(with(pairs, fd)), Err(ConfigError::QueuePairs(_))), "{pairs:?}");
        }
        for (pairs, fd) in [(None, Some(3)), (Some(1), Some(3)), (Some(16), None)] {
            set(with(pairs, fd)).unwrap();
        }
        let mut config = VmConfig::default();
        set_network_interface(&mut config, with(Some(2), None), Origin::Api).unwrap();
        let mmds = MmdsConfig { network_interfaces: vec!["e0".to_owned()], ..MmdsConfig::default() };
        assert!(matches!(set_mmds(&mut config, mmds.clone()), Err(ConfigError::MmdsQueuePairs(_))));
        set_network_interface(&mut config, with(None, None), Origin::Api).unwrap();
        set_mmds(&mut config, mmds).unwrap();
        let several = set_network_interface(&mut config, with(Some(2), None), Origin::Api);
        assert!(matches!(several, Err(ConfigError::MmdsQueuePairs(_))));
    }

    #[test]
    fn what_others_serve_has_nothing_that_this_program_does() {
        let vhost = || NetworkInterface { vhost: true, ..interface("e0", "06:00:00:00:00:0a") };
        let limiter = || Some(RateLimiter::default());
        let wrong = [
            ("rx_rate_limiter", NetworkInterface { rx_rate_limiter: limiter(), ..vhost() }),
            ("tx_rate_limiter", NetworkInterface { tx_rate_limiter: limiter(), ..vhost() }),
            ("anti_spoofing", NetworkInterface { anti_spoofing: true, ..vhost() }),
            ("link_up", NetworkInterface { link_up: false, ..vhost() }),
            ("num_queue_pairs", NetworkInterface { num_queue_pairs: Some(2), ..vhost() }),
        ];
        for (field, interface) in wrong {
            let error = set_network_interface(&mut VmConfig::default(), interface, Origin::Api).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
        let hotplug = MemoryHotplug { total_size_mib: 128, block_size_mib: 2, slot_size_mib: 128 };
        let mmds = || MmdsConfig { network_interfaces: vec!["e0".to_owned()], ..MmdsConfig::default() };
        let mut config = VmConfig::default();
        set_network_interface(&mut config, vhost(), Origin::Api).unwrap();
        assert!(matches!(set_memory_hotplug(&mut config, hotplug), Err(ConfigError::VhostHotplug)));
        assert!(matches!(set_mmds(&mut config, mmds()), Err(ConfigError::VhostInterface { .. })));
        let plain = NetworkInterface { vhost: false, ..vhost() };
        set_network_interface(&mut config, plain, Origin::Api).unwrap();
        set_memory_hotplug(&mut config, hotplug).unwrap();
        set_mmds(&mut config, mmds()).unwrap();
        let late = set_network_interface(&mut config, vhost(), Origin::Api).unwrap_err();
        assert!(late.to_string().contains("mmds-config"), "{late}");
        config.mmds_config = None;
        let late = set_network_interface(&mut config, vhost(), Origin::Api);
        assert!(matches!(late, Err(ConfigError::VhostHotplug)));
        let served =
            || Drive { path_on_host: PathBuf::new(), socket: Some("/proc".into()), ..drive("a", false) };
        assert!(matches!(set_drive(&mut config, served()), Err(ConfigError::VhostHotplug)));
        config.memory_hotplug = None;
        assert!(matches!(set_drive(&mut config, served()), Err(ConfigError::NoSocket(_))));
        let both = Drive { path_on_host: "/proc/self/exe".into(), ..served() };
        assert!(matches!(set_drive(&mut config, both), Err(ConfigError::SocketAndMore(_))));
        let neither = Drive { socket: None, ..served() };
        assert!(matches!(set_drive(&mut config, neither), Err(ConfigError::NoBackend(_))));
    }

    #[test]
    fn the_last_cpu_template_counts() {
        let machine = |cpu_template| MachineConfig { cpu_template, ..MachineConfig::default() };
        let templates = |config: &VmConfig| (config.machine_config.cpu_template, config.cpu_config.is_some());
        let mut config = VmConfig::default();
        set_machine(&mut config, machine(Some(CpuTemplate::T2))).unwrap();
        set_machine(&mut config, machine(None)).unwrap();
        assert_eq!(templates(&config), (Some(CpuTemplate::T2), false));
        set_cpu_config(&mut config, CpuConfig::default());
        assert_eq!(templates(&config), (None, true));
        let patch = MachineConfigPatch { cpu_template: Some(CpuTemplate::T2A), ..Default::default() };
        patch_machine(&mut config, &patch).unwrap();
        assert_eq!(templates(&config), (Some(CpuTemplate::T2A), false));
        assert_eq!(validate(config.clone()).unwrap(), config);
        set_machine(&mut config, machine(Some(CpuTemplate::None))).unwrap();
        assert_eq!(templates(&config), (None, false));
        set_cpu_config(&mut config, CpuConfig::default());
        set_machine(&mut config, machine(Some(CpuTemplate::None))).unwrap();
        assert_eq!(templates(&config), (None, false));
    }

    #[test]
    fn a_cpu_template_is_read_from_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t");
        let mut config =
            VmConfig { cpu_config: Some(CpuConfigSource::File(path.clone())), ..VmConfig::default() };
        assert!(matches!(validate(config.clone()), Err(ConfigError::File { what: "cpu-config", .. })));
        std::fs::write(&path, r#"{"msr_modifiers":[{"addr":"10","bitmap":"0b1"}]}"#).unwrap();
        let error = crate::error_chain(&validate(config.clone()).unwrap_err());
        assert!(error.contains("\"10\" must be 0x"), "{error}");
        std::fs::write(&path, r#"{"msr_modifiers":[{"addr":"0x10","bitmap":"0b1"}]}"#).unwrap();
        config = validate(config).unwrap();
        let Some(CpuConfigSource::Template(template)) = &config.cpu_config else { panic!("{config:?}") };
        assert_eq!(template.msr_modifiers[0].addr.0, 16);
        // As in a snapshot.
        assert_eq!(validate(config.clone()).unwrap(), config);
    }

    #[test]
    fn a_kernel_is_named_or_on_the_disk_and_not_both() {
        let mut config = VmConfig::default();
        let kernel = BootSource { kernel_image_path: "/proc/self/exe".into(), ..BootSource::default() };
        let disk = BootSource { boot_from_disk: true, ..BootSource::default() };
        set_boot_source(&mut config, kernel.clone()).unwrap();
        set_boot_source(&mut config, disk).unwrap();
        let both = BootSource { boot_from_disk: true, ..kernel };
        assert!(matches!(set_boot_source(&mut config, both), Err(ConfigError::BootFromDisk)));
        let neither = set_boot_source(&mut config, BootSource::default());
        assert!(matches!(neither, Err(ConfigError::NoKernel)));
    }

    #[test]
    fn only_the_config_file_may_name_descriptors() {
        let mut tap = interface("e0", "06:00:00:00:00:0a");
        tap.tap_fd = Some(3);
        let mut config = VmConfig::default();
        assert!(set_network_interface(&mut config, tap.clone(), Origin::Api).is_err());
        assert!(set_network_interface(&mut config, tap.clone(), Origin::HotPlug).is_err());
        assert!(set_network_interface(&mut config, tap, Origin::File).is_ok());
        let sent = NetworkInterface { tap_from_request: true, ..interface("e2", "06:00:00:00:00:0c") };
        for origin in [Origin::Api, Origin::File] {
            let error = set_network_interface(&mut config, sent.clone(), origin).unwrap_err();
            assert!(matches!(error, ConfigError::TapFromRequest(_)), "{error}");
        }
        let several = NetworkInterface { num_queue_pairs: Some(2), ..sent.clone() };
        assert!(set_network_interface(&mut config, several, Origin::HotPlug).is_err());
        assert!(set_network_interface(&mut config, sent, Origin::HotPlug).is_ok());
    }

    #[test]
    fn missing_files_and_directories_are_named() {
        let mut config = VmConfig::default();
        for path in ["/no/such/kernel", "/tmp", "/dev/null"] {
            let source = BootSource { kernel_image_path: path.into(), ..BootSource::default() };
            let error = set_boot_source(&mut config, source).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
