//! The boot timer of `--boot-timer`: the guest's init writes 123 to its page, and the time since the start of the VM
//! was asked for is logged (the same address and value as Firecracker's).

use std::time::Instant;

use crate::devices::bus::BusDevice;
use crate::log;

/// One write-only register.
#[derive(Debug)]
pub struct BootTimer {
    start: Instant,
    told: bool,
}

impl BootTimer {
    /// Bytes of address space.
    pub const SIZE: u64 = 0x1000;
    const BOOTED: u8 = 123;

    /// Measures from `start`.
    pub fn new(start: Instant) -> Self {
        Self { start, told: false }
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Told once only: a guest must not fill the log.
        if offset == 0 && data.first() == Some(&Self::BOOTED) && !self.told {
            self.told = true;
            let elapsed = self.start.elapsed();
            log::info!("Guest-boot-time = {:6} us {} ms", elapsed.as_micros(), elapsed.as_millis());
        }
    }
}
