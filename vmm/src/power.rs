//! The guest's ways to end itself by ports: the ACPI sleep control register (off) and the reset control register.

use std::sync::Arc;

use mote_vmm_api::ExitReason;

use crate::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::devices::bus::BusDevice;
use crate::outcome::Outcome;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// What lies at the firmware's reset vector, in 16-bit code: a write of 6 to port 0xcf9, and a halt.
///
/// Linux on a hardware-reduced ACPI platform takes for granted that it was started by EFI and prefers EFI's reset, so
/// without EFI and without a `reboot=` argument it ends by jumping to this vector.
pub const RESET_CODE: [u8; 9] = [
    0xba,
    0xf9,
    0x0c, // mov dx, 0xcf9
    0xb0,
    RESET_VALUE, // mov al, 6
    0xee,        // out dx, al
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to hlt
];

/// Sleep control (offset 0) and sleep status (offset 1) of ACPI 6.5 §4.8.3.7.
#[derive(Debug)]
pub struct SleepRegisters {
    outcome: Arc<Outcome>,
}

impl SleepRegisters {
    /// Number of ports.
    pub const PORTS: u64 = 2;
    /// SLP_EN: go to sleep now.
    const ENABLE: u8 = 1 << 5;

    /// Ends the machine through `outcome`.
    pub fn new(outcome: Arc<Outcome>) -> Self {
        Self { outcome }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(value) = data.first().filter(|_| offset == 0) else { return };
        if value & Self::ENABLE != 0 && value >> 2 & 0x7 == SLEEP_TYPE_OFF {
            self.outcome.decide(ExitReason::PowerOff, "the guest switched itself off (ACPI S5)");
        }
    }
}

/// The reset control register at port 0xcf9 of a PC's chipset, also the ACPI reset register.
#[derive(Debug)]
pub struct ResetRegister {
    outcome: Arc<Outcome>,
    value: u8,
}

impl ResetRegister {
    /// RST_CPU: its rise resets.
    const RESET: u8 = 1 << 2;

    /// Ends the machine through `outcome`.
    pub fn new(outcome: Arc<Outcome>) -> Self {
        Self { outcome, value: 0 }
    }
}

impl BusDevice for ResetRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        if value & Self::RESET != 0 {
            self.outcome.decide(ExitReason::Reboot, "the guest asked for a reset (reset control register)");
        }
        self.value = value & !Self::RESET;
    }
}

impl Stateful for ResetRegister {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.value)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        self.value = state.get()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Arc<Outcome> {
        Arc::new(Outcome::new().unwrap())
    }

    #[test]
    fn only_an_enabled_s5_switches_off() {
        let outcome = outcome();
        let mut registers = SleepRegisters::new(outcome.clone());
        registers.write(0, &[SLEEP_TYPE_OFF << 2]);
        registers.write(0, &[1 << 2 | 1 << 5]);
        registers.write(1, &[SLEEP_TYPE_OFF << 2 | 1 << 5]);
        registers.write(0, &[]);
        assert_eq!(outcome.report(), None);
        registers.write(0, &[SLEEP_TYPE_OFF << 2 | 1 << 5]);
        assert_eq!(outcome.report().unwrap().reason, ExitReason::PowerOff);
    }

    #[test]
    fn the_reset_bit_reboots() {
        let outcome = outcome();
        let mut register = ResetRegister::new(outcome.clone());
        register.write(0, &[0x02]);
        assert_eq!(outcome.report(), None);
        let mut value = [0];
        register.read(0, &mut value);
        assert_eq!(value, [0x02]);
        register.write(0, &[RESET_VALUE]);
        assert_eq!(outcome.report().unwrap().reason, ExitReason::Reboot);
    }
}
