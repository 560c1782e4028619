//! How a machine starts, top to bottom: [`boot`].

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mote_vmm_api::{
    BootSource, Console, CpuConfig, CpuConfigSource, Drive, DriveFormat, ExitReason, MemoryHotplug,
    NetworkInterface, Pmem as PmemConfig, Serial, VmConfig,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi::{self, AcpiError};
use crate::boot_timer::BootTimer;
use crate::config;
use crate::devices::bus::{BusDevice, BusError};
use crate::devices::controls::{Controls, DriveControl};
use crate::devices::generation::{self, GenerationError};
use crate::devices::i8042::I8042;
use crate::devices::pci::PciBus;
use crate::devices::pci::host::{DEVICES as PCI_DEVICES, PciHost, Slot};
use crate::devices::pci::hotplug::HotPlug;
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, ImageCloser};
use crate::devices::virtio::console::VirtioConsole;
use crate::devices::virtio::mem::{self, Mem};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pci::{PciTransport, REGISTERS_SIZE};
use crate::devices::virtio::pmem::{self, Pmem, PmemError, PmemFile};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vhost::block::VhostUserBlock;
use crate::devices::virtio::vhost::net::VhostNet;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::{DeviceError, EventSource};
use crate::disk_boot::{self, DiskBootError};
use crate::hotplug::{drive_name, interface_name};
use crate::ioapic::IoApic;
use crate::kvm::{InterruptRoutes, KvmError, Topology, Vm, Wiring};
use crate::layout;
use crate::loader::{self, LoadError};
use crate::machine::{Buses, Machine, Parts, SharedState};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::mmds::{Endpoint, SharedMmds};
use crate::outcome::Outcome;
use crate::power::{RESET_CODE, ResetRegister, SleepRegisters};
use crate::seccomp::{self, SeccompError};
use crate::smbios;
use crate::snapshot::Stateful;

/// The command line of a boot source without `boot_args`.
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 8250.nr_uarts=0 swiotlb=noforce";

/// A machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No kernel was named.
    #[error("cannot start without a boot source (PUT /boot-source, or \"boot-source\" in the config file)")]
    NoBootSource,
    /// Memory.
    #[error("cannot make guest memory")]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What the root drive boots.
    #[error(transparent)]
    DiskBoot(#[from] DiskBootError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device.
    #[error("cannot make {device}")]
    Device {
        /// Which.
        device: String,
        /// Cause.
        #[source]
        source: DeviceError,
    },
    /// More devices than interrupts or slots.
    #[error("{count} virtio devices are too many; the machine has room for {max}{}", more_room(*.max))]
    TooManyDevices {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Guest memory ends below them.
    #[error("cannot write the SMBIOS tables into guest memory")]
    Smbios(#[source] GuestMemoryError),
    /// Guest memory ends below 1 MiB.
    #[error("cannot write the reset vector into guest memory")]
    ResetVector(#[source] GuestMemoryError),
    /// The VM generation id.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A mistake in `layout`.
    #[error("cannot place a device")]
    Bus(#[from] BusError),
    /// An eventfd.
    #[error("cannot make an eventfd for {device}")]
    EventFd {
        /// Which device.
        device: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// No random numbers.
    #[error("cannot get random numbers for the metadata service")]
    Random(#[source] getrandom::Error),
    /// A vCPU thread.
    #[error("cannot start the vCPU threads")]
    Threads(#[source] std::io::Error),
    /// The thread that sets up devices.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

impl BootError {
    /// Whether the configuration or the host is to blame.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::NoBootSource
            | Self::Load(_)
            | Self::Device { .. }
            | Self::TooManyDevices { .. }
            | Self::Memory(MemoryError::Size(_))
            | Self::Kvm(KvmError::AddressBits { .. } | KvmError::Template(_)) => ExitReason::BadConfig,
            Self::DiskBoot(error) if !error.is_hosts() => ExitReason::BadConfig,
            _ => ExitReason::HostError,
        }
    }
}

/// What to do about too many devices.
fn more_room(max: usize) -> &'static str {
    if max < MAX_PCI_DEVICES { ", with --enable-pci for more" } else { "" }
}

/// Largest number of devices on the PCI bus: all but the host bridge.
const MAX_PCI_DEVICES: usize = PCI_DEVICES - 1;

/// What a start needs beside the VM's configuration.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// Offer the boot timer, which measures from this moment.
    pub boot_timer: Option<Instant>,
    /// Put virtio devices on a PCI bus rather than behind mmio registers.
    pub enable_pci: bool,
    /// The metadata that interfaces named in `mmds-config` reach.
    pub mmds: Option<SharedMmds>,
}

/// Makes the machine that `config` (validated: see `config`) describes and starts its vCPUs.
///
/// # Errors
/// See [`BootError`]; nothing is left running then.
pub fn boot(config: &VmConfig, options: &BootOptions, outcome: &Arc<Outcome>) -> Result<Machine, BootError> {
    let source = config.boot_source.as_ref().ok_or(BootError::NoBootSource)?;
    let machine = &config.machine_config;

    // Before there is guest memory and KVM: the process that reads the disk has neither.
    let memory_bytes = (machine.mem_size_mib as u64) << 20;
    let found = source.boot_from_disk.then(|| disk_boot::read(&config.drives, memory_bytes)).transpose()?;

    // Memory first, interrupt controllers after it: the other order costs milliseconds (see `kvm`).
    let memory = memory::create_for(config)?;
    let vm = Vm::create(&memory, machine.track_dirty_pages)?;
    vm.create_interrupt_controllers()?;

    let loaded = load(&memory, source, found)?;

    let mut devices = Devices::new(vm.wiring(), &memory);
    devices.mmds.clone_from(&options.mmds);
    if options.enable_pci {
        devices.attach_pci_bus(BTreeMap::new())?;
    }
    let keyboard = devices.attach_legacy(config, outcome)?;
    devices.attach_boot_timer(options.boot_timer)?;
    devices.attach_virtio(config)?;

    let transport = match devices.pci {
        Some(_) => Transport::Pci,
        None => Transport::Mmio(&devices.virtio),
    };
    let root = if source.boot_from_disk { None } else { root_arguments(config, devices.root_is_read_only) };
    let command_line = command_line(loaded.arguments.as_deref(), root.as_deref(), transport);
    let platform =
        acpi::Platform { vcpus: machine.vcpu_count, virtio: &devices.virtio, pci: devices.pci.is_some() };
    let rsdp = acpi::write_tables(&memory, &platform)?;
    generation::write(&memory)?;
    let strings = config.smbios.clone().unwrap_or_default();
    smbios::write_tables(&memory, &strings).map_err(BootError::Smbios)?;
    memory.write_slice(&RESET_CODE, GuestAddress(layout::RESET_VECTOR)).map_err(BootError::ResetVector)?;
    let entry = loader::write_boot_information(&memory, &loaded.kernel, loaded.initrd, &command_line, rsdp)?;

    let mut parts = devices.into_parts(keyboard);
    let topology = Topology { vcpus: machine.vcpu_count, smt: machine.smt };
    let fixed = machine.cpu_template.map(|template| vm.static_template(template)).transpose()?;
    parts.vcpus = vm.create_vcpus(topology, fixed.as_ref().or_else(|| cpu_template(config)), &entry)?;
    Machine::start(parts, outcome).map_err(BootError::Threads)
}

/// The CPU template of a validated configuration.
fn cpu_template(config: &VmConfig) -> Option<&CpuConfig> {
    match &config.cpu_config {
        Some(CpuConfigSource::Template(template)) => Some(template),
        // `config::validate` has read the file.
        Some(CpuConfigSource::File(_)) | None => None,
    }
}

/// Kernel and initrd in guest memory, and the command line without what devices add.
struct Loaded {
    kernel: loader::Kernel,
    initrd: Option<loader::Initrd>,
    arguments: Option<String>,
}

/// Loads what the boot source names, or what was found on the root drive.
fn load(
    memory: &GuestMemory,
    source: &BootSource,
    found: Option<disk_boot::Found>,
) -> Result<Loaded, BootError> {
    let Some(found) = found else {
        let kernel = loader::load_kernel(memory, &source.kernel_image_path)?;
        let initrd = source.initrd_path.as_deref();
        let initrd = initrd.map(|path| loader::load_initrd(memory, &kernel, path)).transpose()?;
        return Ok(Loaded { kernel, initrd, arguments: source.boot_args.clone() });
    };
    let kernel = loader::load_drives_kernel(memory, found.kernel)?;
    let initrd = found.initrd.map(|file| loader::load_drives_initrd(memory, &kernel, file)).transpose()?;
    let more = source.boot_args.as_deref().unwrap_or("");
    Ok(Loaded { kernel, initrd, arguments: Some(format!("{} {more}", found.options)) })
}

/// Name of the PCI bus in snapshots: a machine without it has its virtio devices on mmio.
pub(crate) const PCI_BUS: &str = "pci-bus";
/// Name of the real-time clock in snapshots.
pub(crate) const RTC: &str = "rtc";
/// Name of the registers for hot-plug in snapshots; they say which slot each function is in.
pub(crate) const PCI_HOT_PLUG: &str = "pci-hot-plug";

/// The machine's devices while they are put together: at a boot, or for a snapshot.
pub(crate) struct Devices<'a> {
    wiring: Wiring,
    memory: &'a GuestMemory,
    /// Where the next device's part of physical memory may begin; 0 before the first.
    device_memory: u64,
    buses: Buses,
    /// The PCI bus, if devices go there.
    pci: Option<PciBus>,
    /// Slots that functions must have: those of a snapshot.
    slots: BTreeMap<String, u8>,
    /// What `mmds-config` is about.
    pub(crate) mmds: Option<SharedMmds>,
    /// Those with mmio registers.
    virtio: Vec<acpi::VirtioDevice>,
    /// The backend of the root drive says so.
    root_is_read_only: bool,
    controls: Controls,
    event_sources: Vec<Box<dyn EventSource>>,
    /// What is stopped by a pause and goes into snapshots. Every device with state that a guest can see is here.
    stateful: Vec<SharedState>,
}

impl<'a> Devices<'a> {
    pub(crate) fn new(wiring: Wiring, memory: &'a GuestMemory) -> Self {
        Self {
            wiring,
            memory,
            device_memory: 0,
            buses: Buses::default(),
            pci: None,
            slots: BTreeMap::new(),
            mmds: None,
            virtio: Vec::new(),
            root_is_read_only: false,
            controls: Controls::default(),
            event_sources: Vec::new(),
            stateful: Vec::new(),
        }
    }

    /// Makes the bus, on which functions named in `slots` go there.
    pub(crate) fn attach_pci_bus(&mut self, slots: BTreeMap<String, u8>) -> Result<(), BootError> {
        let host = Arc::new(Mutex::new(PciHost::new(self.buses.mmio.clone())));
        self.buses.mmio.insert(layout::PCI_ECAM, layout::PCI_ECAM_SIZE, host.clone())?;
        let what = "PCI hot-plug";
        let irq = self.interrupt(what, layout::HOT_PLUG_IRQ)?;
        let hot_plug = HotPlug::new(host.clone(), irq)
            .map_err(|source| BootError::EventFd { device: what.to_owned(), source })?;
        self.event_sources.push(Box::new(hot_plug.event_source()));
        let hot_plug = Arc::new(Mutex::new(hot_plug));
        self.buses.ports.insert(layout::HOT_PLUG_PORT.into(), HotPlug::PORTS, hot_plug.clone())?;
        self.stateful.push((PCI_HOT_PLUG.to_owned(), hot_plug.clone()));
        self.pci = Some(PciBus::new(host, hot_plug));
        self.slots = slots;
        Ok(())
    }

    /// Puts devices on the bus of a machine that runs.
    pub(crate) fn use_bus(&mut self, bus: PciBus) {
        self.pci = Some(bus);
    }

    /// What a machine that runs takes over.
    pub(crate) fn into_added(self) -> Added {
        Added { devices: self.stateful, controls: self.controls, event_sources: self.event_sources }
    }

    /// The devices that have a state.
    pub(crate) fn stateful(&self) -> &[SharedState] {
        &self.stateful
    }

    /// A machine that lacks its processors only.
    pub(crate) fn into_parts(self, keyboard: Arc<Mutex<I8042>>) -> Parts {
        Parts {
            vcpus: Vec::new(),
            buses: self.buses,
            keyboard,
            controls: self.controls,
            event_sources: self.event_sources,
            devices: self.stateful,
            memory: self.memory.clone(),
            clock: self.wiring.clock(),
            wiring: self.wiring,
            pci: self.pci,
            paused: false,
        }
    }

    /// Puts a device on the list of those that are stopped by a pause and go into snapshots.
    fn stateful_device<D: Stateful + 'static>(
        &mut self,
        name: impl Into<String>,
        device: D,
    ) -> Arc<Mutex<D>> {
        let device = Arc::new(Mutex::new(device));
        self.stateful.push((name.into(), device.clone()));
        device
    }

    /// An eventfd that raises `irq`.
    pub(crate) fn interrupt(&self, device: &str, irq: u32) -> Result<EventFd, BootError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| BootError::EventFd { device: device.to_owned(), source })?;
        self.wiring.connect_interrupt(&event, irq)?;
        Ok(event)
    }

    fn port_device(
        &mut self,
        port: u16,
        ports: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BootError> {
        Ok(self.buses.ports.insert(port.into(), ports, Arc::new(Mutex::new(device)))?)
    }

    /// Serial port, keyboard controller, real-time clock, I/O APIC, and the registers that end the machine.
    pub(crate) fn attach_legacy(
        &mut self,
        config: &VmConfig,
        outcome: &Arc<Outcome>,
    ) -> Result<Arc<Mutex<I8042>>, BootError> {
        let irq = self.interrupt("the serial port", layout::SERIAL_IRQ)?;
        let (serial, sources) = serial::Serial::new(config.serial.as_ref(), irq)
            .map_err(|source| BootError::Device { device: "the serial port".to_owned(), source })?;
        self.event_sources.extend(sources);
        let serial = self.stateful_device("serial", serial);
        self.buses.ports.insert(layout::SERIAL_PORT.into(), 8, serial)?;

        let irq = self.interrupt("the keyboard controller", layout::I8042_IRQ)?;
        let reset = outcome.clone();
        let keyboard = I8042::new(irq, move || {
            reset.decide(ExitReason::Reboot, "the guest asked for a reset (keyboard controller)");
        });
        let keyboard = self.stateful_device("keyboard", keyboard);
        self.buses.ports.insert(layout::I8042_PORT.into(), 5, keyboard.clone())?;

        let clock = self.stateful_device(RTC, Rtc::new(rtc::host_time));
        self.buses.ports.insert(layout::RTC_PORT.into(), Rtc::PORTS, clock)?;

        let io_apic = IoApic::new(self.wiring.interrupt_routes());
        let io_apic = self.stateful_device("io-apic", io_apic);
        let size = IoApic::<InterruptRoutes>::SIZE;
        self.buses.mmio.insert(layout::IO_APIC.into(), size, io_apic)?;

        self.port_device(
            layout::ACPI_SLEEP_PORT,
            SleepRegisters::PORTS,
            SleepRegisters::new(outcome.clone()),
        )?;
        let reset = self.stateful_device("reset-register", ResetRegister::new(outcome.clone()));
        self.buses.ports.insert(layout::RESET_PORT.into(), 1, reset)?;
        Ok(keyboard)
    }

    fn attach_boot_timer(&mut self, start: Option<Instant>) -> Result<(), BootError> {
        let Some(start) = start else { return Ok(()) };
        let timer = Arc::new(Mutex::new(BootTimer::new(start)));
        Ok(self.buses.mmio.insert(layout::BOOT_TIMER, BootTimer::SIZE, timer)?)
    }

    /// Drives (the root device first), network interfaces, entropy and so on: the guest numbers them in this order.
    pub(crate) fn attach_virtio(&mut self, config: &VmConfig) -> Result<(), BootError> {
        let count = config.drives.len()
            + config.pmem.len()
            + config.network_interfaces.len()
            + usize::from(config.entropy.is_some())
            + usize::from(config.balloon.is_some())
            + usize::from(config.memory_hotplug.is_some())
            + usize::from(config.vsock.is_some())
            + usize::from(config.console.is_some());
        let max = if self.pci.is_some() { MAX_PCI_DEVICES } else { layout::MAX_VIRTIO_DEVICES };
        if count > max {
            return Err(BootError::TooManyDevices { count, max });
        }
        let (root, others): (Vec<_>, Vec<_>) = config.drives.iter().partition(|drive| drive.is_root_device);
        for drive in root.into_iter().chain(others) {
            self.attach_drive(drive)?;
        }
        for pmem in &config.pmem {
            self.attach_pmem(pmem)?;
        }
        for interface in &config.network_interfaces {
            let endpoint = self.metadata_endpoint(config, &interface.iface_id)?;
            self.attach_interface(interface, endpoint, None)?;
        }
        if let Some(entropy) = &config.entropy {
            self.virtio_device("the entropy device".to_owned(), || Rng::open(entropy))?;
        }
        if let Some(balloon) = &config.balloon {
            let mut control = None;
            self.virtio_device("the balloon".to_owned(), || {
                let balloon = Balloon::open(balloon)?;
                control = Some(balloon.control());
                Ok(balloon)
            })?;
            self.controls.balloon = control;
        }
        if let Some(hotplug) = &config.memory_hotplug {
            self.attach_mem(hotplug)?;
        }
        if let Some(vsock) = &config.vsock {
            let mut socket = None;
            self.virtio_device("the vsock device".to_owned(), || {
                let vsock = Vsock::open(vsock)?;
                socket = Some(vsock.socket_file()?);
                Ok(vsock)
            })?;
            self.event_sources.extend(socket.map(|file| Box::new(file) as Box<dyn EventSource>));
        }
        if let Some(console) = &config.console {
            self.attach_console(console, config.serial.as_ref())?;
        }
        if let Some(bus) = &self.pci {
            // After its functions: it decodes them where their restored state says.
            self.stateful.push((PCI_BUS.to_owned(), bus.shared_host().clone()));
        }
        Ok(())
    }

    /// The metadata service on the interface `iface_id`, if the guest shall reach it there.
    fn metadata_endpoint(&self, config: &VmConfig, iface_id: &str) -> Result<Option<Endpoint>, BootError> {
        let (Some(mmds), Some(service)) = (&self.mmds, &config.mmds_config) else { return Ok(None) };
        if !service.network_interfaces.iter().any(|id| id == iface_id) {
            return Ok(None);
        }
        let address = service.ipv4_address.unwrap_or(config::MMDS_ADDRESS);
        Endpoint::new(mmds.clone(), address).map(Some).map_err(BootError::Random)
    }

    /// A drive.
    pub(crate) fn attach_drive(&mut self, drive: &Drive) -> Result<(), BootError> {
        let name = drive_name(&drive.drive_id);
        if let Some(socket) = &drive.socket {
            return self.attach_vhost_user(drive, socket, name);
        }
        let mut control = None;
        let open = || Block::open(drive).inspect(|block| control = Some(block.control()));
        self.virtio_device(name.clone(), open)?;
        let Some(control) = control else { return Ok(()) };
        if drive.format != DriveFormat::Raw {
            let closer = ImageCloser::new(control.clone());
            let failed = |source| BootError::Device { device: name, source };
            self.event_sources.push(Box::new(closer.map_err(failed)?));
        }
        self.controls.drives.insert(drive.drive_id.clone(), DriveControl::Own(control));
        Ok(())
    }

    /// A drive that another process serves.
    fn attach_vhost_user(&mut self, drive: &Drive, socket: &Path, name: String) -> Result<(), BootError> {
        let mut opened = None;
        self.virtio_device(name, || {
            let block = VhostUserBlock::open(drive, socket)?;
            opened = Some((block.control(), block.is_read_only()));
            Ok(block)
        })?;
        let Some((control, read_only)) = opened else { return Ok(()) };
        self.root_is_read_only |= drive.is_root_device && read_only;
        self.controls.drives.insert(drive.drive_id.clone(), DriveControl::VhostUser(control));
        Ok(())
    }

    /// A persistent memory device.
    fn attach_pmem(&mut self, config: &PmemConfig) -> Result<(), BootError> {
        let device = format!("pmem {}", config.id);
        let failed = |source: PmemError| BootError::Device { device: device.clone(), source: source.into() };
        let file = PmemFile::open(config).map_err(failed)?;
        let mapping = file.map().map_err(failed)?;
        let bytes = mapping.len() as u64;
        let start =
            self.device_memory(bytes, pmem::ALIGNMENT).ok_or(failed(PmemError::Addresses { bytes }))?;
        self.wiring.map(mapping, start, config.read_only)?;
        let mut control = None;
        self.virtio_device(device, || {
            let pmem = Pmem::new(config, file, start)?;
            control = Some(pmem.control());
            Ok(pmem)
        })?;
        self.controls.pmem.extend(control.map(|control| (config.id.clone(), control)));
        Ok(())
    }

    /// A virtio console.
    fn attach_console(&mut self, config: &Console, serial: Option<&Serial>) -> Result<(), BootError> {
        let stdio = config.output_path.is_none() && config.socket_path.is_none();
        let taken = serial.is_none_or(|serial| serial.serial_out_path.is_none());
        let mut closer = None;
        self.virtio_device("the console".to_owned(), || {
            if stdio && taken {
                return Err(DeviceError::Stdio);
            }
            let console = VirtioConsole::open(config)?;
            closer = Some(console.closer()?);
            Ok(console)
        })?;
        self.event_sources.extend(closer.map(|closer| Box::new(closer) as Box<dyn EventSource>));
        Ok(())
    }

    /// Memory that can be plugged.
    fn attach_mem(&mut self, config: &MemoryHotplug) -> Result<(), BootError> {
        const MIB: u64 = 1 << 20;
        let memory = self.memory.clone();
        let start = mem::region_start(&memory).unwrap_or(0);
        let count = config.total_size_mib / config.slot_size_mib;
        let slots = self.wiring.pluggable_slots(start, config.slot_size_mib as u64 * MIB, count as u32);
        let mut control = None;
        self.virtio_device("the memory hot-plug device".to_owned(), || {
            let mem = Mem::new(config, &memory, Arc::new(slots))?;
            control = Some(mem.control());
            Ok(mem)
        })?;
        self.controls.memory = control;
        Ok(())
    }

    /// Takes physical addresses for a device, behind the RAM and what devices have already. The same configuration leads to
    /// the same addresses: that of a snapshot must.
    fn device_memory(&mut self, bytes: u64, alignment: u64) -> Option<u64> {
        let ram_end = self.memory.last_addr().raw_value().checked_add(1)?.max(layout::MMIO_HOLE_END);
        let first = ram_end.checked_next_multiple_of(layout::DEVICE_MEMORY_ALIGNMENT)?;
        let start = self.device_memory.max(first).checked_next_multiple_of(alignment)?;
        self.device_memory = start.checked_add(bytes)?;
        Some(start)
    }

    /// A network interface.
    pub(crate) fn attach_interface(
        &mut self,
        interface: &NetworkInterface,
        endpoint: Option<Endpoint>,
        tap: Option<OwnedFd>,
    ) -> Result<(), BootError> {
        let id = &interface.iface_id;
        if interface.vhost {
            let memory = self.memory.clone();
            return self.virtio_device(interface_name(id), || VhostNet::open(interface, &memory, tap));
        }
        let mut control = None;
        self.virtio_device(interface_name(id), || {
            let net = Net::open(interface, tap)?;
            control = Some(net.control());
            Ok(match endpoint {
                Some(endpoint) => net.with_service(endpoint),
                None => net,
            })
        })?;
        self.controls.interfaces.extend(control.map(|control| (id.clone(), control)));
        Ok(())
    }

    fn virtio_device<D: VirtioDevice + 'static>(
        &mut self,
        name: String,
        open: impl FnOnce() -> Result<D, DeviceError>,
    ) -> Result<(), BootError> {
        seccomp::start_set_up_thread()?;
        let device = open().map_err(|source| BootError::Device { device: name.clone(), source })?;
        match self.pci.clone() {
            Some(bus) => self.virtio_on_pci(&name, Box::new(device), &bus),
            None => self.virtio_on_mmio(&name, Box::new(device)),
        }
    }

    fn virtio_on_mmio(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), BootError> {
        let irq = layout::VIRTIO_IRQ + self.virtio.len() as u32;
        let address = layout::VIRTIO_MMIO + self.virtio.len() as u64 * layout::VIRTIO_MMIO_SIZE;
        let interrupt = self.interrupt(name, irq)?;
        let transport = MmioTransport::new(device, self.memory.clone(), interrupt)
            .map_err(|source| BootError::Device { device: name.to_owned(), source })?;
        for (queue, notifier) in transport.queue_notifiers().iter().enumerate() {
            self.wiring.connect_notifier(notifier, address + QUEUE_NOTIFY, queue as u32)?;
        }
        let transport = self.stateful_device(name, transport);
        self.buses.mmio.insert(address, layout::VIRTIO_MMIO_SIZE, transport)?;
        self.virtio.push(acpi::VirtioDevice { address: address as u32, irq });
        Ok(())
    }

    fn virtio_on_pci(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        bus: &PciBus,
    ) -> Result<(), BootError> {
        let full = BootError::TooManyDevices { count: PCI_DEVICES, max: MAX_PCI_DEVICES };
        let slot = match self.slots.get(name) {
            Some(number) => Slot::new(usize::from(*number)),
            None => bus.host().free_slot(),
        };
        let slot = slot.ok_or(full)?;
        // One after the other, in the order of the slots: a guest may leave them there.
        let address = layout::PCI_WINDOW as u32 + slot.number() as u32 * REGISTERS_SIZE;
        let transport = PciTransport::new(device, self.memory.clone(), &self.wiring, address)
            .map_err(|source| BootError::Device { device: name.to_owned(), source })?;
        let transport = self.stateful_device(name, transport);
        // Taken only if a snapshot names a slot twice; its registers then refuse their state.
        bus.host().insert(slot, transport);
        bus.hot_plug().occupy(slot, name);
        Ok(())
    }
}

/// Devices for a machine that runs.
pub(crate) struct Added {
    pub(crate) devices: Vec<SharedState>,
    pub(crate) controls: Controls,
    pub(crate) event_sources: Vec<Box<dyn EventSource>>,
}

/// What the command line says of the root device, if there is one. `read_only` is what a drive says that isn't configured so.
fn root_arguments(config: &VmConfig, read_only: bool) -> Option<String> {
    let mode = |read_only| if read_only { "ro" } else { "rw" };
    if let Some(drive) = config.drives.iter().find(|drive| drive.is_root_device) {
        let mode = mode(drive.is_read_only || read_only);
        return Some(match &drive.partuuid {
            Some(partition) => format!("root=PARTUUID={partition} {mode}"),
            None => format!("root=/dev/vda {mode}"),
        });
    }
    let (number, pmem) = config.pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device)?;
    Some(format!("root=/dev/pmem{number} {}", mode(pmem.read_only)))
}

/// How the guest finds its virtio devices.
#[derive(Clone, Copy)]
enum Transport<'a> {
    /// Named one by one.
    Mmio(&'a [acpi::VirtioDevice]),
    /// On a bus that it scans.
    Pci,
}

/// The user's arguments and what the devices add. Arguments for init (after `--`) stay last.
///
/// Devices are declared here *and* in ACPI, like Firecracker does: stock kernels without
/// `VIRTIO_MMIO_CMDLINE_DEVICES` find them by ACPI, bare-metal guests and kernels without ACPI by the command line. A
/// kernel with both probes each device once: the second probe finds the registers taken and gives up.
///
/// Devices on a PCI bus are not named at all: every kernel with PCI scans the bus that ACPI describes.
fn command_line(boot_args: Option<&str>, root: Option<&str>, transport: Transport<'_>) -> String {
    let args = boot_args.unwrap_or(DEFAULT_BOOT_ARGS).trim();
    let (kernel, init) = match args.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (args, None),
    };
    let mut line = kernel.trim_end().to_owned();
    let mut add = |argument: &str| {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(argument);
    };
    let names_pci = kernel.split_whitespace().any(|argument| argument.starts_with("pci="));
    if matches!(transport, Transport::Mmio(_)) && !names_pci {
        add("pci=off");
    }
    if let Some(root) = root {
        add(root);
    }
    let Transport::Mmio(devices) = transport else {
        return with_init(line, init);
    };
    for device in devices {
        add(&format!("virtio_mmio.device=4K@{:#x}:{}", device.address, device.irq));
    }
    with_init(line, init)
}

fn with_init(line: String, init: Option<&str>) -> String {
    init.map_or(line.clone(), |init| format!("{line} -- {init}"))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn root(partuuid: Option<&str>, is_read_only: bool) -> Option<String> {
        let drive = Drive {
            drive_id: "root".to_owned(),
            path_on_host: PathBuf::from("/x"),
            is_root_device: true,
            partuuid: partuuid.map(str::to_owned),
            is_read_only,
            ..Drive::default()
        };
        root_arguments(&VmConfig { drives: vec![drive], ..VmConfig::default() }, false)
    }

    #[test]
    fn a_persistent_memory_device_is_named_by_its_place() {
        let pmem = |root_device, read_only| PmemConfig { root_device, read_only, ..PmemConfig::default() };
        let config = VmConfig { pmem: vec![pmem(false, false), pmem(true, true)], ..VmConfig::default() };
        assert_eq!(root_arguments(&config, false).as_deref(), Some("root=/dev/pmem1 ro"));
        assert_eq!(root_arguments(&VmConfig::default(), false), None);
    }

    #[test]
    fn devices_are_added_before_the_arguments_of_init() {
        let devices = [acpi::VirtioDevice { address: 0xc000_1000, irq: 5 }];
        assert_eq!(
            command_line(
                Some("console=ttyS0 -- single"),
                root(None, false).as_deref(),
                Transport::Mmio(&devices)
            ),
            "console=ttyS0 pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 -- single"
        );
    }

    #[test]
    fn pci_is_left_alone_when_the_user_names_it() {
        assert_eq!(command_line(Some("pci=lastbus=0"), None, Transport::Mmio(&[])), "pci=lastbus=0");
        assert_eq!(command_line(Some(""), None, Transport::Mmio(&[])), "pci=off");
    }

    #[test]
    fn devices_on_pci_are_not_named() {
        assert_eq!(
            command_line(Some("quiet -- x"), root(None, false).as_deref(), Transport::Pci),
            "quiet root=/dev/vda rw -- x"
        );
    }

    #[test]
    fn a_partition_is_named_by_its_uuid() {
        assert_eq!(
            command_line(Some("a"), root(Some("12-34"), true).as_deref(), Transport::Mmio(&[])),
            "a pci=off root=PARTUUID=12-34 ro"
        );
    }
}
