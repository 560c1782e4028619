//! Finding the virtio devices, and a transport that can hold features back.

use alloc::vec::Vec;
use core::ptr::NonNull;

use mote_guest::cmdline::MmioDevice;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, SomeTransport, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::boot::Boot;
use crate::cpu::{self, mmio_read, mmio_write};
use crate::pci::{self, Function};

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2 §6).
pub const INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;

/// Registers of virtio-mmio (virtio 1.2 §4.2.2) that are used without a driver. On PCI they stand for the fields of the
/// common configuration with the same meaning.
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
}

/// Where a device's configuration is among the registers of virtio-mmio.
const MMIO_CONFIG: u64 = 0x100;

/// What a device is, as far as the guest has tests for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Net,
    Block,
    Rng,
    Pmem,
    Mem,
    Console,
    Other(u32),
}

/// Where a queue is notified, and how wide the write is.
#[derive(Debug, Clone, Copy)]
pub enum Notifier {
    /// 32 bits.
    Word(u64),
    /// 16 bits.
    Half(u64),
}

impl Notifier {
    /// Notifies the queue with this index.
    pub fn notify(self, queue: u16) {
        match self {
            Self::Word(address) => mmio_write(address, u32::from(queue)),
            Self::Half(address) => mmio_write(address, queue),
        }
    }
}

/// Where a device's registers are.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// A window of virtio-mmio registers.
    Mmio(MmioDevice),
    /// A function on the PCI bus.
    Pci(Function),
}

/// A device's registers.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Where they are.
    pub place: Place,
    /// What the device is.
    pub kind: Kind,
}

/// All devices of the command line whose magic number is right, then those on the PCI bus.
pub fn discover(boot: &Boot) -> Vec<Window> {
    let named = boot.command_line.mmio_devices().map(Place::Mmio);
    let named = named.chain(pci::scan(boot).into_iter().map(Place::Pci));
    named
        .map(|place| Window { place, kind: Kind::Other(0) })
        .filter(|window| window.get(register::MAGIC) == 0x7472_6976)
        .map(|window| {
            let kind = match window.get(register::DEVICE_ID) {
                1 => Kind::Net,
                2 => Kind::Block,
                3 => Kind::Console,
                4 => Kind::Rng,
                24 => Kind::Mem,
                27 => Kind::Pmem,
                other => Kind::Other(other),
            };
            Window { kind, ..window }
        })
        .collect()
}

impl Window {
    /// Reads a register.
    pub fn get(&self, register: u64) -> u32 {
        match &self.place {
            Place::Mmio(place) => mmio_read(place.address + register),
            Place::Pci(function) => function.get(register),
        }
    }

    /// Writes a register.
    pub fn set(&self, register: u64, value: u32) {
        match &self.place {
            Place::Mmio(place) => mmio_write(place.address + register, value),
            Place::Pci(function) => function.set(register, value),
        }
    }

    /// How a queue is notified, with a single write.
    pub fn notifier(&self, queue: u16) -> Notifier {
        match &self.place {
            Place::Mmio(place) => Notifier::Word(place.address + register::QUEUE_NOTIFY),
            Place::Pci(function) => Notifier::Half(function.notify_address(queue)),
        }
    }

    /// Reads 32 bits of the device's configuration.
    pub fn config(&self, offset: u64) -> u32 {
        match &self.place {
            Place::Mmio(place) => mmio_read(place.address + MMIO_CONFIG + offset),
            Place::Pci(function) => mmio_read(function.device_config + offset),
        }
    }

    /// The number under which its interrupts are counted.
    pub fn pin(&self) -> u32 {
        match &self.place {
            Place::Mmio(place) => place.irq,
            Place::Pci(function) => function.pin(),
        }
    }

    /// Lets the device interrupt the processor.
    pub fn route_irq(&self) {
        match &self.place {
            Place::Mmio(place) => cpu::route_irq(place.irq),
            Place::Pci(function) => function.route_messages(),
        }
    }

    /// Whether an interrupt comes with a bit in the interrupt status; messages do without.
    pub fn has_interrupt_status(&self) -> bool {
        matches!(self.place, Place::Mmio(_))
    }

    /// The device's 64 feature bits.
    pub fn features(&self) -> u64 {
        let half = |number| {
            self.set(register::DEVICE_FEATURES_SELECT, number);
            u64::from(self.get(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// The transport for a driver.
    ///
    /// # Errors
    /// The registers are not those of a virtio device.
    pub fn transport(&self, withheld: u64, status: StatusWrites) -> core::result::Result<Masked, ErrorText> {
        let (inner, function) = match self.place {
            Place::Mmio(place) => (SomeTransport::Mmio(mmio_transport(&place)?), None),
            Place::Pci(function) => (SomeTransport::Pci(function.transport()?), Some(function)),
        };
        Ok(Masked { inner, function, withheld, status })
    }
}

fn mmio_transport(place: &MmioDevice) -> core::result::Result<MmioTransport<'static>, ErrorText> {
    let header = NonNull::new(place.address as *mut _).ok_or("address 0")?;
    // SAFETY: a register window by the command line, identity-mapped and not RAM (mmio_read asserted it in
    // `discover`); callers have one transport for a window at a time.
    let inner = unsafe { MmioTransport::new(header, place.size as usize) };
    inner.map_err(|_| "no virtio-mmio registers, or a legacy device")
}

pub type ErrorText = &'static str;

/// How the status bits ACKNOWLEDGE and DRIVER are set. Both are right (virtio 1.2 §3.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusWrites {
    /// One write for each bit, as Linux does.
    Single,
    /// Both in one write, as virtio-drivers does.
    Combined,
}

/// A transport that does not show some of the device's features to the driver.
pub struct Masked {
    inner: SomeTransport<'static>,
    /// Gives each queue its message, which virtio-drivers doesn't.
    function: Option<Function>,
    withheld: u64,
    status: StatusWrites,
}

impl Transport for Masked {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features() & !self.withheld
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.inner.write_driver_features(driver_features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.inner.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if self.status == StatusWrites::Single && status == DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER {
            self.inner.set_status(DeviceStatus::ACKNOWLEDGE);
        }
        self.inner.set_status(status);
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.inner.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        if let Some(function) = &self.function {
            function.assign_message(queue);
        }
        self.inner.queue_set(queue, size, descriptors, driver, device);
    }

    fn queue_unset(&mut self, _queue: u16) {
        // A driver that goes resets the device, which ends its queues. virtio 1.2 §4.2.2.2 lets QueueReady be cleared
        // by a reset only, and waiting for it to read 0 would hang on devices that follow it.
        self.inner.set_status(DeviceStatus::empty());
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        self.inner.write_config_space(offset, value)
    }
}
