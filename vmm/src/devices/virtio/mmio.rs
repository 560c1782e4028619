//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): registers only.
//!
//! Registers are 32 bits wide and are answered at their own offsets and width only; the configuration space from 0x100
//! on takes any width. Every other access reads zeros and writes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::{Lifecycle, LifecycleState, QueueSetup};
use super::{Interrupt, InterruptLine, VirtioDevice};
use crate::devices::DeviceError;
use crate::devices::bus::BusDevice;
use crate::memory::GuestMemory;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// Size of a device's register window in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of QueueNotify, for the ioeventfd (datamatch = queue index, 32 bits).
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No vendor has registered itself for this field; "MOTE".
const VENDOR: u32 = u32::from_le_bytes(*b"MOTE");
const CONFIG_SPACE: u64 = 0x100;

/// InterruptStatus: buffers were used.
const INTERRUPT_USED: u32 = 1;
/// InterruptStatus: configuration or status changed.
const INTERRUPT_CONFIG: u32 = 2;

/// The one interrupt of a mmio device: edges on an irqfd, causes in InterruptStatus.
struct MmioLine {
    status: AtomicU32,
    irq: EventFd,
}

impl MmioLine {
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // Fails only if the counter is full, and then the interrupt is pending anyway.
        let _ = self.irq.write(1);
    }
}

impl InterruptLine for Arc<MmioLine> {
    fn used_buffers(&self, _queue: u16) {
        self.raise(INTERRUPT_USED);
    }
    fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }
}

/// A virtio device behind mmio registers.
pub struct MmioTransport {
    lifecycle: Lifecycle,
    line: Arc<MmioLine>,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

impl MmioTransport {
    /// Puts `device` behind registers; `interrupt` is (or will be) the irqfd of its line.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        interrupt: EventFd,
    ) -> Result<Self, DeviceError> {
        let line = Arc::new(MmioLine { status: AtomicU32::new(0), irq: interrupt });
        let interrupt = Arc::new(Interrupt::new(Box::new(line.clone())));
        Ok(Self {
            lifecycle: Lifecycle::new(device, mem, interrupt)?,
            line,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// The eventfd of each queue, in order, to register with KVM at [`QUEUE_NOTIFY`]. Empty for a device that serves
    /// its queues inline and therefore wants the write itself. Registering them is an optimization only.
    pub fn queue_notifiers(&self) -> &[Arc<EventFd>] {
        self.lifecycle.notifiers()
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.lifecycle.queue(self.queue_select);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.lifecycle.device().device_type(),
            0x0c => VENDOR,
            0x10 => match self.device_features_select {
                0 => self.lifecycle.offered_features() as u32,
                1 => (self.lifecycle.offered_features() >> 32) as u32,
                _ => 0,
            },
            0x34 => self.queue_max_size(),
            0x44 => queue.is_some_and(|queue| queue.ready).into(),
            0x60 => self.line.status.load(Ordering::SeqCst),
            0x70 => self.lifecycle.status().into(),
            // No shared memory region exists: length and base are -1 (virtio 1.2 §4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => self.lifecycle.device().config_generation(),
            _ => 0,
        }
    }

    /// 0 for a queue that isn't there.
    fn queue_max_size(&self) -> u32 {
        let sizes = self.lifecycle.device().queue_max_sizes();
        usize::try_from(self.queue_select)
            .ok()
            .and_then(|index| sizes.get(index))
            .map_or(0, |&max| max.into())
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.lifecycle.set_driver_features(self.driver_features_select, value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x38 => self.update_queue(|queue| queue.size = value),
            0x44 => self.update_queue(|queue| queue.ready = value == 1),
            QUEUE_NOTIFY => self.lifecycle.notify(value),
            0x64 => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
            }
            // Bits past the eighth don't exist; they alone don't make a reset.
            0x70 if value == 0 || value as u8 != 0 => self.set_status(value as u8),
            0x80 => self.update_queue(|queue| set_low(&mut queue.desc_table, value)),
            0x84 => self.update_queue(|queue| set_high(&mut queue.desc_table, value)),
            0x90 => self.update_queue(|queue| set_low(&mut queue.avail_ring, value)),
            0x94 => self.update_queue(|queue| set_high(&mut queue.avail_ring, value)),
            0xa0 => self.update_queue(|queue| set_low(&mut queue.used_ring, value)),
            0xa4 => self.update_queue(|queue| set_high(&mut queue.used_ring, value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        self.lifecycle.set_status(value);
        if value == 0 {
            self.line.status.store(0, Ordering::SeqCst);
            self.device_features_select = 0;
            self.driver_features_select = 0;
            self.queue_select = 0;
        }
    }

    fn update_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        self.lifecycle.update_queue(self.queue_select, change);
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | (u64::from(value) << 32);
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.lifecycle.device().read_config(offset, data);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(&mut *data) {
            *register = self.read_register(offset).to_le_bytes();
        } else {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.lifecycle.device_mut().write_config(offset, data);
        } else if let Ok(register) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }
}

/// The registers in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MmioState {
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    lifecycle: LifecycleState,
}

impl Stateful for MmioTransport {
    fn pause(&mut self) {
        self.lifecycle.pause();
    }

    fn resume(&mut self) {
        self.lifecycle.resume();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&MmioState {
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.line.status.load(Ordering::SeqCst),
            lifecycle: self.lifecycle.save()?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: MmioState = state.get()?;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.line.status.store(state.interrupt_status, Ordering::SeqCst);
        self.lifecycle.restore(&state.lifecycle)
    }
}

#[cfg(test)]
mod tests;
