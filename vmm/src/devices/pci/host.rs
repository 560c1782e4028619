//! The host bridge: configuration accesses to the functions of bus 0, and where their registers are decoded.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::PciFunction;
use super::config::{ConfigSpace, Identity};
use crate::devices::bus::{Bus, BusDevice, SharedDevice};
use crate::layout;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// Devices of a bus, the host bridge (device 0) among them.
pub const DEVICES: usize = 32;
/// Configuration space of one function.
const FUNCTION: u64 = 0x1000;
const FUNCTIONS_OF_DEVICE: u64 = 8;

/// A device number on the bus, 1 to 31.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u8);

impl Slot {
    /// Device `number`, unless it is the host bridge's or there is none.
    pub fn new(number: usize) -> Option<Self> {
        (1..DEVICES).contains(&number).then_some(Self(number as u8))
    }

    /// The device number.
    pub fn number(self) -> usize {
        self.0.into()
    }
}

/// A function as the bus holds it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// What a device number holds.
struct Device {
    function: SharedFunction,
    /// The same, as the MMIO bus holds it.
    registers: SharedDevice,
    /// Where its registers are decoded.
    base: Option<u64>,
}

/// Bus 0. A [`BusDevice`] of [`layout::PCI_ECAM_SIZE`] bytes.
pub struct PciHost {
    bridge: ConfigSpace,
    devices: [Option<Device>; DEVICES],
    mmio: Arc<Bus>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciHost {
    /// A bus with nothing on it but the host bridge; registers are decoded on `mmio`.
    pub fn new(mmio: Arc<Bus>) -> Self {
        // Any host bridge will do: the class is what drivers look at. This is QEMU's number for its own.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [6, 0, 0],
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        Self { bridge: ConfigSpace::new(identity), devices: [const { None }; DEVICES], mmio }
    }

    /// The first free device number.
    pub fn free_slot(&self) -> Option<Slot> {
        let number = self.devices.iter().skip(1).position(Option::is_none)? + 1;
        Slot::new(number)
    }

    /// Puts a function in a slot; returns false if it is taken.
    pub fn insert<F: PciFunction + 'static>(&mut self, slot: Slot, function: Arc<Mutex<F>>) -> bool {
        let place = &mut self.devices[slot.number()];
        if place.is_some() {
            return false;
        }
        *place = Some(Device { function: function.clone(), registers: function, base: None });
        true
    }

    /// Takes the function out of a slot: its registers are gone from the bus when this returns.
    pub fn remove(&mut self, slot: Slot) -> Option<SharedFunction> {
        let device = self.devices[slot.number()].take()?;
        if let Some(base) = device.base {
            self.mmio.remove(base);
            lock(&device.function).placed(None);
        }
        Some(device.function)
    }

    /// The device and register of an offset in the configuration space, if the access stays in one function.
    fn decode(offset: u64, length: usize) -> Option<(usize, u64)> {
        let (function, register) = (offset / FUNCTION, offset % FUNCTION);
        let device = usize::try_from(function / FUNCTIONS_OF_DEVICE).ok()?;
        let inside = register + length as u64 <= FUNCTION;
        (inside && function.is_multiple_of(FUNCTIONS_OF_DEVICE) && device < DEVICES)
            .then_some((device, register))
    }

    /// Decodes the registers of a device where the guest wants them, if they may be there.
    fn place(&mut self, number: usize) {
        let Some(device) = &mut self.devices[number] else { return };
        let wanted = lock(&device.function).wanted_range().filter(|(base, size)| {
            let end = layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE;
            *base >= layout::PCI_WINDOW && base.checked_add(*size).is_some_and(|last| last <= end)
        });
        if device.base == wanted.map(|(base, _)| base) {
            return;
        }
        if let Some(old) = device.base.take() {
            self.mmio.remove(old);
        }
        // Where another function already is, the guest gets what the first one answers.
        device.base = wanted
            .filter(|(base, size)| self.mmio.insert(*base, *size, device.registers.clone()).is_ok())
            .map(|(base, _)| base);
        lock(&device.function).placed(device.base);
    }
}

impl BusDevice for PciHost {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Self::decode(offset, data.len()) {
            Some((0, register)) => self.bridge.read(register, data),
            Some((number, register)) => match &self.devices[number] {
                Some(device) => lock(&device.function).read_config(register, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match Self::decode(offset, data.len()) {
            Some((0, register)) => self.bridge.write(register, data),
            Some((number, register)) => {
                if let Some(device) = &self.devices[number] {
                    lock(&device.function).write_config(register, data);
                    self.place(number);
                }
            }
            None => {}
        }
    }
}

/// The bridge's configuration, and every function decoded where its own restored state says.
impl Stateful for PciHost {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.bridge.all().to_vec())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let bytes: Vec<u8> = state.get()?;
        self.bridge.write(0, &bytes);
        (0..DEVICES).for_each(|number| self.place(number));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
