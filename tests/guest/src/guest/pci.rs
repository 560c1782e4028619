//! virtio on PCI without a driver: the bus by ECAM, the parts of a function (virtio 1.2 §4.1), and MSI-X.

use alloc::vec::Vec;

use mote_guest::acpi::Tables;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};

use crate::boot::{Boot, Low};
use crate::cpu::{self, mmio_read, mmio_write};
use crate::heap::Identity;
use crate::virtio::{ErrorText, register};

/// Devices of a bus.
const DEVICES: u8 = 32;
/// Bytes of configuration space from one device to the next: eight functions of 4 KiB.
const DEVICE_STEP: u64 = 0x8000;
const VENDOR: u32 = 0x1af4;
const MODERN: u32 = 0x1040;
const MAX_CAPABILITIES: usize = 48;
/// Where the guest can reach registers.
const REACHABLE: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Interrupts by message are counted under the numbers after the pins of the I/O APIC; so many are left.
const PINS: u32 = 6;
/// Message control: MSI-X on, all vectors masked.
const ENABLE: u16 = 1 << 15;
const MASK: u16 = 1 << 14;

/// A virtio function.
#[derive(Debug, Clone, Copy, Default)]
pub struct Function {
    /// Device number on bus 0.
    pub device: u8,
    /// Address of its configuration space.
    pub config: u64,
    /// Address and place of base address register 0, which has all the parts here.
    pub registers: u64,
    /// Addresses of the parts.
    pub common: u64,
    notify: u64,
    notify_step: u64,
    isr: u64,
    /// Address of the device configuration.
    pub device_config: u64,
    /// Offset of the capability that leads to the registers by configuration space.
    pub window: u64,
    msix: u64,
    /// Address of the MSI-X table.
    pub table: u64,
    /// Address of the pending bits.
    pub pending: u64,
}

/// Where the configuration space of bus 0 is, if there is PCI.
pub fn ecam(boot: &Boot) -> Option<u64> {
    Tables::read(&Low, boot.rsdp).ok()?.ecam.filter(|ecam| REACHABLE.contains(ecam))
}

/// The virtio functions of bus 0, with memory space and bus mastering on.
pub fn scan(boot: &Boot) -> Vec<Function> {
    let Some(ecam) = ecam(boot) else { return Vec::new() };
    (0..DEVICES)
        .filter_map(|device| Function::probe(device, ecam + u64::from(device) * DEVICE_STEP))
        .collect()
}

/// Configuration space for virtio-drivers.
struct Ecam {
    base: u64,
}

impl Ecam {
    fn address(&self, function: DeviceFunction, register: u8) -> u64 {
        self.base + u64::from(function.device) * DEVICE_STEP + u64::from(register)
    }
}

impl ConfigurationAccess for Ecam {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        mmio_read(self.address(function, register))
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        mmio_write(self.address(function, register), data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self { base: self.base }
    }
}

impl Function {
    fn probe(device: u8, config: u64) -> Option<Self> {
        let id: u32 = mmio_read(config);
        if id & 0xffff != VENDOR || id >> 16 < MODERN {
            return None;
        }
        // Memory space and bus mastering.
        mmio_write(config + 4, 6_u16);
        let mut function = Self { device, config, ..Self::default() };
        function.registers = function.bar(0)?;
        let mut next = u64::from(mmio_read::<u8>(config + 0x34));
        for _ in 0..MAX_CAPABILITIES {
            if next < 0x40 {
                break;
            }
            match mmio_read::<u8>(config + next) {
                0x09 => function.virtio_capability(next),
                0x11 => {
                    function.msix = next;
                    function.table = function.place(next + 4)?;
                    function.pending = function.place(next + 8)?;
                }
                _ => {}
            }
            next = u64::from(mmio_read::<u8>(config + next + 1));
        }
        let complete = function.common != 0 && function.notify != 0 && function.isr != 0;
        complete.then_some(function)
    }

    /// The address in a base address register.
    fn bar(&self, number: u8) -> Option<u64> {
        let register = self.config + 0x10 + 4 * u64::from(number);
        let low: u32 = mmio_read(register);
        let high = if low & 6 == 4 { mmio_read(register + 4) } else { 0_u32 };
        let address = u64::from(low & !0xf) | u64::from(high) << 32;
        REACHABLE.contains(&address).then_some(address)
    }

    /// What an MSI-X field says: offset, and the register in the low three bits.
    fn place(&self, field: u64) -> Option<u64> {
        let value: u32 = mmio_read(self.config + field);
        Some(self.bar(value as u8 & 7)? + u64::from(value & !7))
    }

    fn virtio_capability(&mut self, at: u64) {
        let field = |offset| -> u8 { mmio_read(self.config + at + offset) };
        let kind = field(3);
        let Some(base) = self.bar(field(4)) else { return };
        let part = base + u64::from(mmio_read::<u32>(self.config + at + 8));
        match kind {
            1 => self.common = part,
            2 => {
                self.notify = part;
                self.notify_step = mmio_read::<u32>(self.config + at + 16).into();
            }
            3 => self.isr = part,
            4 => self.device_config = part,
            5 => self.window = at,
            _ => {}
        }
    }

    /// A transport of virtio-drivers.
    pub fn transport(&self) -> Result<PciTransport, ErrorText> {
        let base = self.config - u64::from(self.device) * DEVICE_STEP;
        let mut root = PciRoot::new(Ecam { base });
        let function = DeviceFunction { bus: 0, device: self.device, function: 0 };
        // Base address registers are sized by writing to them; with memory space off nothing is there meanwhile.
        mmio_write(self.config + 4, 4_u16);
        let transport = PciTransport::new::<Identity, _>(&mut root, function);
        mmio_write(self.config + 4, 6_u16);
        transport.map_err(|_| "no virtio function")
    }

    /// Reads the field that means the same as a register of virtio-mmio.
    pub fn get(&self, register: u64) -> u32 {
        let half = |offset| -> u32 { mmio_read(self.common + offset) };
        let word = |offset| u32::from(mmio_read::<u16>(self.common + offset));
        let byte = |address| u32::from(mmio_read::<u8>(address));
        match register {
            register::MAGIC if mmio_read::<u16>(self.config) == VENDOR as u16 => 0x7472_6976,
            register::VERSION => 2,
            register::DEVICE_ID => u32::from(mmio_read::<u16>(self.config + 2)) - MODERN,
            register::DEVICE_FEATURES => half(0x04),
            // The size after a reset is the largest.
            register::QUEUE_SIZE_MAX => word(0x18),
            register::QUEUE_READY => word(0x1c),
            register::INTERRUPT_STATUS => byte(self.isr),
            register::STATUS => byte(self.common + 0x14),
            _ => 0,
        }
    }

    /// Writes the field that means the same as a register of virtio-mmio.
    pub fn set(&self, register: u64, value: u32) {
        let half = |offset| mmio_write(self.common + offset, value);
        let word = |offset| mmio_write(self.common + offset, value as u16);
        match register {
            register::DEVICE_FEATURES_SELECT => half(0x00),
            register::DRIVER_FEATURES_SELECT => half(0x08),
            register::DRIVER_FEATURES => half(0x0c),
            register::QUEUE_SELECT => word(0x16),
            register::QUEUE_SIZE => word(0x18),
            register::QUEUE_READY => word(0x1c),
            register::STATUS => mmio_write(self.common + 0x14, value as u8),
            register::QUEUE_NOTIFY => {
                mmio_write(self.notify_address(value as u16), value as u16);
            }
            _ => {
                // The 64-bit addresses, by halves.
                for (first, field) in [
                    (register::QUEUE_DESCRIPTORS, 0x20),
                    (register::QUEUE_DRIVER, 0x28),
                    (register::QUEUE_DEVICE, 0x30),
                ] {
                    if (first..first + 8).contains(&register) {
                        half(field + (register - first));
                    }
                }
            }
        }
    }

    /// Where a queue is notified.
    pub fn notify_address(&self, queue: u16) -> u64 {
        mmio_write(self.common + 0x16, queue);
        self.notify + u64::from(mmio_read::<u16>(self.common + 0x1e)) * self.notify_step
    }

    /// The number under which its interrupts are counted.
    pub fn pin(&self) -> u32 {
        cpu::IOAPIC_PINS + u32::from(self.device) % PINS
    }

    fn vectors(&self) -> u16 {
        (mmio_read::<u16>(self.config + self.msix + 2) & 0x7ff) + 1
    }

    /// Turns MSI-X on with the same message for all vectors.
    pub fn route_messages(&self) {
        let (address, data) = cpu::message(self.pin());
        for vector in 0..u64::from(self.vectors()) {
            let entry = self.table + 16 * vector;
            mmio_write(entry, address);
            mmio_write(entry + 4, 0_u32);
            mmio_write(entry + 8, data);
            mmio_write(entry + 12, 0_u32);
        }
        self.mask_messages(false);
    }

    /// Masks all messages, or lets them go; MSI-X is on in both cases.
    pub fn mask_messages(&self, mask: bool) {
        let control = if mask { ENABLE | MASK } else { ENABLE };
        mmio_write(self.config + self.msix + 2, control);
    }

    /// Gives a queue the vector with the number after its own; vector 0 is for changes of the configuration.
    pub fn assign_message(&self, queue: u16) {
        let vector = (queue + 1) % self.vectors();
        mmio_write(self.common + 0x10, 0_u16);
        mmio_write(self.common + 0x16, queue);
        mmio_write(self.common + 0x1a, vector);
    }
}
