//! The virtio-pci transport (virtio 1.2 §4.1), modern only: registers and capabilities, no device.
//!
//! ```text
//!   base address register 0 (32 KiB):
//!   0x0000 common configuration    0x3000 notifications, 4 bytes for each queue
//!   0x1000 ISR status              0x4000 MSI-X table
//!   0x2000 device configuration    0x5000 MSI-X pending bits
//! ```
//!
//! A field of the common configuration is answered at its own offset and width; a 64-bit field also by halves. Every
//! other access reads zeros and writes nothing. Interrupts are MSI-X only: one vector for each queue and one for
//! configuration changes, or as few as the driver assigns. A driver without MSI-X polls the ISR status.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::{Lifecycle, LifecycleState, QueueSetup};
use super::{Interrupt, InterruptLine, VirtioDevice, device_type};
use crate::devices::bus::BusDevice;
use crate::devices::pci::PciFunction;
use crate::devices::pci::config::{COMMAND, ConfigSpace, Identity};
use crate::devices::pci::msix::{self, MsiX, Sink};
use crate::devices::{DeviceError, report};
use crate::kvm;
use crate::memory::GuestMemory;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// Size of a device's registers in bytes.
pub const REGISTERS_SIZE: u32 = 0x8000;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
/// Bytes from one part to the next.
const PART: u64 = 0x1000;
/// Bytes between the doorbells of two queues (`notify_off_multiplier`).
const NOTIFY_STEP: u64 = 4;
/// `sizeof(struct virtio_pci_common_cfg)` without the fields of features that are not offered.
const COMMON_LENGTH: u32 = 0x38;

/// virtio's vendor, and what its device type is added to (virtio 1.2 §4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// Subsystem ids of modern devices are 0x40 or higher (virtio 1.2 §4.1.2.1).
const SUBSYSTEM: u16 = 0x0040;
/// "Vendor specific" capability.
const CAPABILITY_VENDOR: u8 = 0x09;
/// Length of the body of `struct virtio_pci_cap`: without id and link.
const CAPABILITY_BODY: u8 = 14;
/// Offset of `pci_cfg_data` in its capability, and of the fields that say where it leads.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// No vector.
const NO_VECTOR: u16 = 0xffff;
/// ISR: buffers were used.
const ISR_QUEUE: u8 = 1;
/// ISR: configuration or status changed.
const ISR_CONFIG: u8 = 2;

/// Most vectors that fit between the table and the pending bits.
const MAX_VECTORS: usize = (PART / msix::ENTRY) as usize;

/// A queue's address in the guest whose writes signal its eventfd.
pub trait Doorbell: Send {
    /// Puts it at `address`, or nowhere.
    ///
    /// # Errors
    /// KVM refused; the guest's write then takes the long way.
    fn place(&mut self, address: Option<u64>) -> io::Result<()>;
}

impl Doorbell for kvm::Doorbell {
    fn place(&mut self, address: Option<u64>) -> io::Result<()> {
        Self::place(self, address)
    }
}

/// Where interrupts and notifications come from: KVM, or a test.
pub trait Connections {
    /// One more vector.
    ///
    /// # Errors
    /// There is none left.
    fn vector(&self) -> io::Result<Box<dyn Sink>>;
    /// A doorbell for the queue with this eventfd.
    fn doorbell(&self, event: Arc<EventFd>) -> Box<dyn Doorbell>;
}

impl Connections for kvm::Wiring {
    fn vector(&self) -> io::Result<Box<dyn Sink>> {
        Ok(Box::new(self.message_interrupt()?))
    }
    fn doorbell(&self, event: Arc<EventFd>) -> Box<dyn Doorbell> {
        Box::new(Self::doorbell(self, event))
    }
}

/// The device's interrupts as its threads use them.
struct PciLine {
    isr: AtomicU8,
    msix_enabled: AtomicBool,
    events: Vec<Arc<EventFd>>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl PciLine {
    fn send(&self, vector: &AtomicU16) {
        if let Some(event) = self.events.get(usize::from(vector.load(Ordering::Acquire))) {
            // Fails only if the counter is full, and then the interrupt is pending anyway.
            let _ = event.write(1);
        }
    }

    fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
    }

    /// What the driver asked for, if there is such a vector (virtio 1.2 §4.1.5.1.2.1).
    fn assign(&self, slot: &AtomicU16, vector: u16) {
        let exists = usize::from(vector) < self.events.len();
        slot.store(if exists { vector } else { NO_VECTOR }, Ordering::Release);
    }
}

impl InterruptLine for Arc<PciLine> {
    fn used_buffers(&self, queue: u16) {
        if !self.msix_enabled.load(Ordering::Acquire) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        } else if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.send(vector);
        }
    }

    fn config_changed(&self) {
        // Also with MSI-X (virtio 1.2 §4.1.4.5.1).
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if self.msix_enabled.load(Ordering::Acquire) {
            self.send(&self.config_vector);
        }
    }

    fn direct(&self, queue: u16) -> Option<Arc<EventFd>> {
        if !self.msix_enabled.load(Ordering::Acquire) {
            return None;
        }
        let vector = self.queue_vectors.get(usize::from(queue))?.load(Ordering::Acquire);
        self.events.get(usize::from(vector)).cloned()
    }
}

/// A virtio device on the PCI bus.
pub struct PciTransport {
    lifecycle: Lifecycle,
    line: Arc<PciLine>,
    config: ConfigSpace,
    msix: MsiX,
    doorbells: Vec<Box<dyn Doorbell>>,
    /// Offsets of the capabilities that are more than data.
    msix_capability: usize,
    window: usize,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
    failed: bool,
}

impl PciTransport {
    /// Puts `device` behind registers that are at `address` when the guest enables them.
    ///
    /// # Errors
    /// No eventfd could be made, or there are no interrupts left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        connections: &dyn Connections,
        address: u32,
    ) -> Result<Self, DeviceError> {
        let queues = device.queue_max_sizes().len();
        let vectors = (queues + 1).min(MAX_VECTORS);
        let sinks = (0..vectors).map(|_| connections.vector().map_err(DeviceError::EventFd));
        let msix = MsiX::new(sinks.collect::<Result<Vec<_>, _>>()?);
        let line = Arc::new(PciLine {
            isr: AtomicU8::new(0),
            msix_enabled: AtomicBool::new(false),
            events: msix.events(),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        });
        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.add_bar(address, REGISTERS_SIZE);
        let (msix_capability, window) = add_capabilities(&mut config, &msix, queues);
        let interrupt = Arc::new(Interrupt::new(Box::new(line.clone())));
        let lifecycle = Lifecycle::new(device, mem, interrupt)?;
        let doorbells =
            lifecycle.notifiers().iter().map(|event| connections.doorbell(event.clone())).collect();
        Ok(Self {
            lifecycle,
            line,
            config,
            msix,
            doorbells,
            msix_capability,
            window,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            failed: false,
        })
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.lifecycle.queue(self.queue_select.into())
    }

    fn queue_vector(&self) -> Option<&AtomicU16> {
        self.line.queue_vectors.get(usize::from(self.queue_select))
    }

    /// A field of the common configuration by its offset and width (virtio 1.2 §4.1.4.3).
    fn read_common(&self, offset: u64, width: usize) -> u64 {
        let queue = self.queue();
        let half = |value: u64, high: bool| if high { value >> 32 } else { value & 0xffff_ffff };
        let address = |value: fn(&QueueSetup) -> u64| queue.map_or(0, value);
        match (offset, width) {
            (0x00, 4) => self.device_features_select.into(),
            (0x04, 4) => match self.device_features_select {
                select @ 0..=1 => half(self.lifecycle.offered_features(), select == 1),
                _ => 0,
            },
            (0x08, 4) => self.driver_features_select.into(),
            (0x0c, 4) => match self.driver_features_select {
                select @ 0..=1 => half(self.lifecycle.driver_features(), select == 1),
                _ => 0,
            },
            (0x10, 2) => self.line.config_vector.load(Ordering::Acquire).into(),
            (0x12, 2) => self.line.queue_vectors.len() as u64,
            (0x14, 1) => self.lifecycle.status().into(),
            (0x15, 1) => u64::from(self.lifecycle.device().config_generation() as u8),
            (0x16, 2) => self.queue_select.into(),
            (0x18, 2) => queue.map_or(0, |queue| u64::from(queue.size as u16)),
            (0x1a, 2) => {
                self.queue_vector().map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)).into()
            }
            (0x1c, 2) => queue.is_some_and(|queue| queue.ready).into(),
            (0x1e, 2) => queue.map_or(0, |_| self.queue_select.into()),
            (0x20, 8) => address(|queue| queue.desc_table),
            (0x20 | 0x24, 4) => half(address(|queue| queue.desc_table), offset == 0x24),
            (0x28, 8) => address(|queue| queue.avail_ring),
            (0x28 | 0x2c, 4) => half(address(|queue| queue.avail_ring), offset == 0x2c),
            (0x30, 8) => address(|queue| queue.used_ring),
            (0x30 | 0x34, 4) => half(address(|queue| queue.used_ring), offset == 0x34),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, width: usize, value: u64) {
        match (offset, width) {
            (0x00, 4) => self.device_features_select = value as u32,
            (0x08, 4) => self.driver_features_select = value as u32,
            (0x0c, 4) => self.lifecycle.set_driver_features(self.driver_features_select, value as u32),
            (0x10, 2) => self.line.assign(&self.line.config_vector, value as u16),
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18, 2) => self.update_queue(|queue| queue.size = value as u32),
            (0x1a, 2) => {
                if let Some(vector) = self.queue_vector() {
                    self.line.assign(vector, value as u16);
                }
            }
            // Only a reset disables a queue (virtio 1.2 §4.1.4.3.2).
            (0x1c, 2) if value == 1 => self.update_queue(|queue| queue.ready = true),
            (0x20..=0x27, _) => self.update_queue(|queue| set(&mut queue.desc_table, offset, width, value)),
            (0x28..=0x2f, _) => self.update_queue(|queue| set(&mut queue.avail_ring, offset, width, value)),
            (0x30..=0x37, _) => self.update_queue(|queue| set(&mut queue.used_ring, offset, width, value)),
            _ => {}
        }
    }

    fn update_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        self.lifecycle.update_queue(self.queue_select.into(), change);
    }

    fn set_status(&mut self, value: u8) {
        self.lifecycle.set_status(value);
        if value == 0 {
            self.line.reset();
            self.device_features_select = 0;
            self.driver_features_select = 0;
            self.queue_select = 0;
        }
    }

    /// Where `pci_cfg_data` leads, if what the driver wrote there makes sense: offset in register 0 and width
    /// (virtio 1.2 §4.1.4.9).
    fn window_target(&self) -> Option<(u64, usize)> {
        let [bar] = self.config.bytes(self.window + WINDOW_BAR);
        let offset = u32::from_le_bytes(self.config.bytes(self.window + WINDOW_OFFSET));
        let length = u32::from_le_bytes(self.config.bytes(self.window + WINDOW_LENGTH));
        let valid = bar == 0 && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        (valid && offset < REGISTERS_SIZE).then_some((offset.into(), length as usize))
    }

    /// Whether an access covers the first byte of `pci_cfg_data`.
    fn is_window(&self, register: u64) -> bool {
        register == (self.window + WINDOW_DATA) as u64
    }

    fn update_msix(&mut self) {
        let [control] = self.config.bytes(self.msix_capability + msix::CONTROL_HIGH);
        self.msix.set_control(control, self.config.is_bus_master());
        self.line.msix_enabled.store(self.msix.is_enabled(), Ordering::Release);
    }
}

/// Sets a 64-bit field or half of it; other widths are no access to it.
fn set(field: &mut u64, offset: u64, width: usize, value: u64) {
    *field = match (offset % 8, width) {
        (0, 8) => value,
        (0, 4) => *field & !0xffff_ffff | value,
        (4, 4) => *field & 0xffff_ffff | value << 32,
        _ => *field,
    };
}

fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        device_type::NET => [0x02, 0, 0],
        device_type::BLOCK => [0x01, 0, 0],
        device_type::CONSOLE => [0x07, 0x80, 0],
        _ => [0xff, 0, 0],
    };
    Identity {
        vendor: VENDOR,
        // All types that exist are small.
        device: DEVICE_BASE + device_type as u16,
        class,
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// Adds all capabilities; returns the offsets of MSI-X and of the window to the registers.
fn add_capabilities(config: &mut ConfigSpace, msix: &MsiX, queues: usize) -> (usize, usize) {
    let msix_capability =
        config.add_capability(msix::CAPABILITY, &msix.capability(MSIX_TABLE as u32, MSIX_PENDING as u32));
    config.make_writable(msix_capability + msix::CONTROL_HIGH, &[msix::CONTROL_HIGH_WRITABLE]);
    let notify_length = (queues as u64 * NOTIFY_STEP) as u32;
    for (kind, offset, length, extra) in [
        (1, COMMON, COMMON_LENGTH, &[][..]),
        (2, NOTIFY, notify_length, &(NOTIFY_STEP as u32).to_le_bytes()),
        (3, ISR, 1, &[]),
        (4, DEVICE, PART as u32, &[]),
    ] {
        config.add_capability(CAPABILITY_VENDOR, &capability(kind, offset, length, extra));
    }
    let window = config.add_capability(CAPABILITY_VENDOR, &capability(5, 0, 0, &[0; 4]));
    config.make_writable(window + WINDOW_BAR, &[0xff]);
    config.make_writable(window + WINDOW_OFFSET, &[0xff; 8]);
    (msix_capability, window)
}

/// `struct virtio_pci_cap` without id and link (virtio 1.2 §4.1.4).
fn capability(kind: u8, offset: u64, length: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![2 + CAPABILITY_BODY + extra.len() as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    body
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let inside = offset % PART;
        match offset - inside {
            COMMON => {
                let value = self.read_common(inside, data.len()).to_le_bytes();
                data.fill(0);
                let length = data.len().min(value.len());
                data[..length].copy_from_slice(&value[..length]);
            }
            ISR => {
                data.fill(0);
                if let Some(first) = data.first_mut().filter(|_| inside == 0) {
                    *first = self.line.isr.swap(0, Ordering::SeqCst);
                }
            }
            DEVICE => self.lifecycle.device().read_config(inside, data),
            MSIX_TABLE => self.msix.read_table(inside, data),
            MSIX_PENDING => self.msix.read_pending(inside, data),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let inside = offset % PART;
        match offset - inside {
            COMMON => {
                let mut value = [0; 8];
                let length = data.len().min(value.len());
                value[..length].copy_from_slice(&data[..length]);
                self.write_common(inside, data.len(), u64::from_le_bytes(value));
            }
            DEVICE => self.lifecycle.device_mut().write_config(inside, data),
            NOTIFY if inside.is_multiple_of(NOTIFY_STEP) => {
                self.lifecycle.notify((inside / NOTIFY_STEP) as u32);
            }
            MSIX_TABLE => self.msix.write_table(inside, data),
            _ => {}
        }
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, register: u64, data: &mut [u8]) {
        match self.window_target() {
            Some((offset, width)) if self.is_window(register) && width <= data.len() => {
                data.fill(0);
                self.read(offset, &mut data[..width]);
            }
            _ => self.config.read(register, data),
        }
    }

    fn write_config(&mut self, register: u64, data: &[u8]) {
        match self.window_target() {
            Some((offset, width)) if self.is_window(register) && width <= data.len() => {
                self.write(offset, &data[..width]);
            }
            _ => {
                self.config.write(register, data);
                let touches = |at: usize| {
                    let at = at as u64;
                    register <= at && at < register.saturating_add(data.len() as u64)
                };
                if touches(COMMAND) || touches(self.msix_capability + msix::CONTROL_HIGH) {
                    self.update_msix();
                }
            }
        }
    }

    fn wanted_range(&self) -> Option<(u64, u64)> {
        self.config.bar()
    }

    fn placed(&mut self, base: Option<u64>) {
        for (queue, doorbell) in (0..).zip(&mut self.doorbells) {
            let address = base.map(|base| base + NOTIFY + queue * NOTIFY_STEP);
            if let Err(error) = doorbell.place(address)
                && !self.failed
            {
                // Told once; without it the guest's notifications come by way of `write`.
                self.failed = true;
                report("the notifications of a PCI function", &error);
            }
        }
    }
}

/// The registers in a snapshot. Pending bits are not: each queue interrupts once more after a resume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PciState {
    config: Vec<u8>,
    msix_table: Vec<u8>,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
    lifecycle: LifecycleState,
}

impl Stateful for PciTransport {
    fn pause(&mut self) {
        self.lifecycle.pause();
    }

    fn resume(&mut self) {
        self.lifecycle.resume();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut msix_table = vec![0; usize::from(self.msix.len()) * msix::ENTRY as usize];
        self.msix.read_table(0, &mut msix_table);
        let vectors = self.line.queue_vectors.iter().map(|vector| vector.load(Ordering::Acquire));
        DeviceState::new(&PciState {
            config: self.config.all().to_vec(),
            msix_table,
            isr: self.line.isr.load(Ordering::SeqCst),
            config_vector: self.line.config_vector.load(Ordering::Acquire),
            queue_vectors: vectors.collect(),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            lifecycle: self.lifecycle.save()?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: PciState = state.get()?;
        let entries = state.msix_table.chunks(4);
        if state.queue_vectors.len() != self.line.queue_vectors.len() {
            return Err(StateError::new("the snapshot's device has another number of queues"));
        }
        self.config.write(0, &state.config);
        for (offset, part) in (0..).step_by(4).zip(entries) {
            self.msix.write_table(offset, part);
        }
        self.line.isr.store(state.isr, Ordering::SeqCst);
        self.line.assign(&self.line.config_vector, state.config_vector);
        for (slot, vector) in self.line.queue_vectors.iter().zip(state.queue_vectors) {
            self.line.assign(slot, vector);
        }
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.update_msix();
        self.lifecycle.restore(&state.lifecycle)
    }
}

#[cfg(test)]
mod tests;
