//! Ways to end.

use mote_guest::acpi::{Register, Tables};

use crate::boot::Low;
use crate::cpu::{mmio_write, outb, outw, spin};

/// SLP_EN in the PM1 control register (ACPI 6.5 §4.8.3.2.1) and in the sleep control register (§4.8.3.7).
const PM1_SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_ENABLE: u8 = 1 << 5;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
const RESET_CONTROL: u16 = 0xcf9;

/// Switches off: ACPI S5, or where the tables offer none (Firecracker) the i8042's reset.
pub fn off(rsdp: u64) -> ! {
    if let Ok(tables) = Tables::read(&Low, rsdp)
        && let Some(kind) = tables.s5_type
    {
        if let Some(port) = tables.pm1a_control {
            outw(port, u16::from(kind) << 10 | PM1_SLEEP_ENABLE);
        } else if let Some(register) = tables.sleep_control {
            write(register, kind << 2 | SLEEP_ENABLE);
        }
    }
    reset()
}

/// Resets through the keyboard controller.
pub fn reset() -> ! {
    outb(I8042_COMMAND, I8042_RESET);
    spin()
}

/// Resets through the register that the FADT names.
pub fn reset_acpi(rsdp: u64) -> ! {
    if let Ok(Tables { reset: Some((register, value)), .. }) = Tables::read(&Low, rsdp) {
        write(register, value);
    }
    crate::println!("mote-guest: the FADT's reset register did nothing");
    spin()
}

/// Resets through port 0xcf9 (PIIX3): hard reset, then the rising edge.
pub fn reset_cf9() -> ! {
    outb(RESET_CONTROL, 0x02);
    outb(RESET_CONTROL, 0x06);
    spin()
}

fn write(register: Register, value: u8) {
    match register {
        Register::Port(port) => outb(port, value),
        Register::Memory(address) => mmio_write(address, value),
    }
}
