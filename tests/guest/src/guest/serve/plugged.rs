//! NICs that are plugged in while the guest serves: each gets its address and asks for its metadata, and is given up when the host
//! asks for that.

use alloc::string::String;
use alloc::vec::Vec;

use mote_guest::json;

use super::stack::Stack;
use super::{META_DATA, fetch, printable};
use crate::boot::Boot;
use crate::hotplug::{EJECT, INSERTED, IRQ, LEAVING, SLOTS};
use crate::virtio::{self, Kind, Place, Window};
use crate::{cpu, pci, println};

/// How long a new NIC may wait for its address.
const ADDRESS_US: u64 = 20_000_000;

/// The registers of PCI hot-plug, and the NICs that came by them.
pub struct Plugged {
    there: bool,
    seen: u32,
    /// Their drivers: what they gave the devices may be written to until these are gone.
    nics: Vec<(u32, Stack)>,
}

impl Plugged {
    /// Listens, if there is PCI.
    pub fn new(boot: &Boot) -> Self {
        let there = pci::ecam(boot).is_some();
        if there {
            cpu::route_irq(IRQ);
        }
        // The first look is for what came before anybody listened.
        Self { there, seen: u32::MAX, nics: Vec::new() }
    }

    /// Takes what has come and gives up what is asked for.
    pub fn look(&mut self, boot: &Boot) {
        let count = cpu::irq_count(IRQ);
        if !self.there || count == self.seen {
            return;
        }
        self.seen = count;
        let (inserted, leaving) = (cpu::inl(INSERTED), cpu::inl(LEAVING));
        for slot in (0..SLOTS).filter(|slot| leaving & 1 << slot != 0) {
            // Its driver resets the device, which is there until it is given up.
            self.nics.retain(|(other, _)| *other != slot);
            cpu::outl(EJECT, 1 << slot);
            println!("mote-guest: gave up slot {slot}");
        }
        let windows = if inserted == 0 { Vec::new() } else { virtio::discover(boot) };
        for slot in (0..SLOTS).filter(|slot| inserted & 1 << slot != 0) {
            let is_there = |window: &&Window| {
                window.kind == Kind::Net
                    && matches!(&window.place, Place::Pci(function) if u32::from(function.device) == slot)
            };
            let Some(window) = windows.iter().find(is_there) else { continue };
            match Stack::new(window) {
                Err(why) => println!("mote-guest: slot {slot}: {why}"),
                Ok(mut stack) => {
                    introduce(slot, &mut stack);
                    self.nics.push((slot, stack));
                }
            }
        }
    }
}

fn introduce(slot: u32, stack: &mut Stack) {
    let Some(address) = stack.address_within(ADDRESS_US) else {
        return println!("mote-guest: slot {slot} got no address");
    };
    let metadata = fetch::get(stack, META_DATA).unwrap_or_else(|why| {
        println!("mote-guest: slot {slot}: {META_DATA}: {why}");
        String::new()
    });
    let host_name = json::string_member(&metadata, "hostname").unwrap_or_default();
    println!("mote-guest: slot {slot} has {} as {}", address.address(), printable(&host_name));
}
