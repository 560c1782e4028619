//! `mote.hotplug`: does with the registers for PCI hot-plug what an operating system's ACPI does, and tells what it sees, until it is ended.

use crate::boot::Boot;
use crate::{cpu, pci, println};

/// Input of the I/O APIC that the event comes by.
pub const IRQ: u32 = 5;
/// Slots with a new function, slots to give up, and slots that are given up.
pub const INSERTED: u16 = 0x610;
pub const LEAVING: u16 = 0x614;
pub const EJECT: u16 = 0x618;
pub const SLOTS: u32 = 32;
/// Bytes of configuration space from one device to the next.
const DEVICE_STEP: u64 = 0x8000;

/// Serves events for ever.
pub fn run(boot: &Boot) -> ! {
    cpu::enable_interrupts();
    let Some(ecam) = pci::ecam(boot) else {
        println!("mote-guest: no PCI");
        cpu::halt()
    };
    let identity = |slot: u32| cpu::mmio_read::<u32>(ecam + u64::from(slot) * DEVICE_STEP);
    cpu::route_irq(IRQ);
    println!("mote-guest: waiting");
    let mut seen = 0;
    loop {
        let count = cpu::irq_count(IRQ);
        if count == seen {
            core::hint::spin_loop();
            continue;
        }
        seen = count;
        let (inserted, leaving) = (cpu::inl(INSERTED), cpu::inl(LEAVING));
        for slot in (0..SLOTS).filter(|slot| inserted & 1 << slot != 0) {
            println!("mote-guest: slot {slot} holds {:08x}", identity(slot));
        }
        for slot in (0..SLOTS).filter(|slot| leaving & 1 << slot != 0) {
            cpu::outl(EJECT, 1 << slot);
            println!("mote-guest: slot {slot} has {:08x}", identity(slot));
        }
    }
}
