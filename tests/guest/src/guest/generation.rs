//! `mote.generation`: tells the VM generation id, waits until it is another one and its interrupt has come, tells that, and ends.

use mote_guest::acpi::Tables;

use crate::boot::{Boot, Low};
use crate::{cpu, println};

/// Input of the I/O APIC that the event comes by.
const IRQ: u32 = 3;
/// How long the host has for a snapshot and its load.
const TIMEOUT_US: u64 = 60_000_000;

/// Waits for one change.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    cpu::enable_interrupts();
    let address = Tables::read(&Low, boot.rsdp).ok().and_then(|tables| tables.generation_id);
    let Some(address) = address else { return println!("mote-guest: no generation id") };
    let id = || {
        // SAFETY: reserved memory that ACPI names, identity-mapped, and aligned as its specification demands; no Rust object is there.
        unsafe { (address as *const u128).read_volatile() }
    };
    cpu::route_irq(IRQ);
    let (first, interrupts) = (id(), cpu::irq_count(IRQ));
    println!("mote-guest: generation {first:032x}");
    let told = cpu::wait_until(TIMEOUT_US, || id() != first && cpu::irq_count(IRQ) != interrupts);
    println!("mote-guest: then {:032x} {}", id(), if told { "told" } else { "silent" });
}
