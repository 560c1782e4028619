//! The I/O APIC (Intel 82093AA data sheet, §3), in user space.
//!
//! KVM keeps only the local APICs ("split irqchip"): without its I/O APIC, PIC and PIT a VM starts a little and ends
//! much faster, and a device's eventfd reaches the guest as a message without a detour through a kernel worker. What is
//! left to do here is to turn the redirection table into KVM's message routes.
//!
//! Interrupts are edges: devices signal eventfds. An edge at a masked input is lost, as on the real chip.

use std::io;

use crate::devices::bus::BusDevice;
use crate::kvm::{InterruptRoutes, Message};
use crate::layout;
use crate::log;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// Number of inputs.
const INPUTS: usize = layout::LAST_IRQ as usize + 1;

/// Register select and data window, the two registers of the memory range.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0x00;
const REGISTER_VERSION: u8 = 0x01;
const REGISTER_ARBITRATION: u8 = 0x02;
const FIRST_ENTRY: u8 = 0x10;
const VERSION: u32 = 0x11;

/// Bits of a redirection entry.
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const LOGICAL: u64 = 1 << 11;
/// Delivery status and remote IRR are the chip's.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// Vector, delivery mode, destination mode, polarity, trigger, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !READ_ONLY;

/// Where the routes go.
pub trait Router: Send {
    /// Sets the message of each input; `None` for an input that is masked.
    ///
    /// # Errors
    /// KVM refused.
    fn set(&mut self, routes: &[Option<Message>]) -> io::Result<()>;
}

impl Router for InterruptRoutes {
    fn set(&mut self, routes: &[Option<Message>]) -> io::Result<()> {
        InterruptRoutes::set(self, routes)
    }
}

/// The chip.
#[derive(Debug)]
pub struct IoApic<R> {
    router: R,
    id: u32,
    selected: u8,
    entries: [u64; INPUTS],
    routes: [Option<Message>; INPUTS],
    failed: bool,
}

impl<R: Router> IoApic<R> {
    /// Bytes of address space.
    pub const SIZE: u64 = 0x1000;

    /// All inputs masked.
    pub fn new(router: R) -> Self {
        Self { router, id: 0, selected: 0, entries: [MASKED; INPUTS], routes: [None; INPUTS], failed: false }
    }

    fn read_register(&self) -> u32 {
        match self.selected {
            REGISTER_ID | REGISTER_ARBITRATION => self.id,
            REGISTER_VERSION => VERSION | (INPUTS as u32 - 1) << 16,
            _ => self.entry_half().map_or(0, |(input, shift)| (self.entries[input] >> shift) as u32),
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.selected == REGISTER_ID {
            self.id = value & 0x0f00_0000;
        }
        let Some((input, shift)) = self.entry_half() else { return };
        let half = 0xffff_ffffu64 << shift;
        let entry = self.entries[input] & !half | u64::from(value) << shift & half & WRITABLE;
        self.entries[input] = entry;
        self.update(input, entry);
    }

    /// The input whose entry is selected, and which half of it.
    fn entry_half(&self) -> Option<(usize, u32)> {
        let index = usize::from(self.selected.checked_sub(FIRST_ENTRY)?);
        (index / 2 < INPUTS).then_some((index / 2, if index % 2 == 0 { 0 } else { 32 }))
    }

    /// Tells KVM, but only what it does not know yet: each change of the routes waits for KVM's readers.
    fn update(&mut self, input: usize, entry: u64) {
        let route = message(entry);
        if self.routes[input] == route {
            return;
        }
        self.routes[input] = route;
        if let Err(error) = self.router.set(&self.routes)
            && !self.failed
        {
            // Told once: the guest can make it happen again and again.
            self.failed = true;
            log::error!("cannot route the guest's interrupts: {error}");
        }
    }
}

/// The message that an input sends (SDM vol. 3A §11.11).
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let logical = u32::from(entry & LOGICAL != 0);
    let level = entry & LEVEL != 0;
    let assert = u32::from(level) << 14;
    let vector_and_delivery = entry as u32 & 0x7ff;
    Some(Message {
        address: u64::from(layout::LOCAL_APIC | destination << 12 | logical << 2),
        data: vector_and_delivery | assert | u32::from(level) << 15,
    })
}

/// The registers in a snapshot.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct IoApicState {
    id: u32,
    selected: u8,
    entries: Vec<u64>,
}

impl<R: Router> Stateful for IoApic<R> {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&IoApicState {
            id: self.id,
            selected: self.selected,
            entries: self.entries.to_vec(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: IoApicState = state.get()?;
        let inputs = state.entries.len();
        self.entries = state.entries.try_into().map_err(|_| {
            StateError::new(format!("the snapshot's I/O APIC has {inputs} inputs, not {INPUTS}"))
        })?;
        self.id = state.id;
        self.selected = state.selected;
        self.routes = self.entries.map(message);
        self.router
            .set(&self.routes)
            .map_err(|error| StateError::new(format!("cannot route interrupts: {error}")))
    }
}

impl<R: Router> BusDevice for IoApic<R> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            SELECT => u32::from(self.selected),
            WINDOW => self.read_register(),
            _ => return,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, [selected, ..]) => self.selected = *selected,
            (WINDOW, &[a, b, c, d]) => self.write_register(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        calls: usize,
        last: Vec<Option<Message>>,
    }

    impl Router for Recorder {
        fn set(&mut self, routes: &[Option<Message>]) -> io::Result<()> {
            self.calls += 1;
            self.last = routes.to_vec();
            Ok(())
        }
    }

    fn write(chip: &mut IoApic<Recorder>, register: u8, value: u32) {
        chip.write(SELECT, &[register, 0, 0, 0]);
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn read(chip: &mut IoApic<Recorder>, register: u8) -> u32 {
        chip.write(SELECT, &[register, 0, 0, 0]);
        let mut bytes = [0; 4];
        chip.read(WINDOW, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_chip_tells_its_version_and_number_of_inputs() {
        let mut chip = IoApic::new(Recorder::default());
        assert_eq!(read(&mut chip, 1), 0x0017_0011);
        assert_eq!(read(&mut chip, 0x10 + 2 * 23), 0x1_0000, "masked");
        assert_eq!(read(&mut chip, 0x10 + 2 * 24), 0, "no such input");
    }

    #[test]
    fn an_unmasked_edge_input_becomes_a_message_and_masking_removes_it() {
        let mut chip = IoApic::new(Recorder::default());
        write(&mut chip, 0x10 + 2 * 5 + 1, 3 << 24);
        assert_eq!(chip.router.calls, 0, "nothing to tell while it is masked");
        write(&mut chip, 0x10 + 2 * 5, 0x0831);
        let expected = Message { address: 0xfee0_3004, data: 0x31 };
        assert_eq!(chip.router.last[5], Some(expected));
        assert_eq!(chip.router.last.iter().flatten().count(), 1);
        write(&mut chip, 0x10 + 2 * 5, 0x0831);
        assert_eq!(chip.router.calls, 1, "no change, no call");
        write(&mut chip, 0x10 + 2 * 5, 0x1_0831);
        assert_eq!(chip.router.last[5], None);
    }

    #[test]
    fn a_level_input_is_sent_as_level() {
        let mut chip = IoApic::new(Recorder::default());
        write(&mut chip, 0x10, 0x8040);
        assert_eq!(chip.router.last[0], Some(Message { address: 0xfee0_0000, data: 0xc040 }));
    }

    #[test]
    fn status_bits_cannot_be_written() {
        let mut chip = IoApic::new(Recorder::default());
        write(&mut chip, 0x10, u32::MAX);
        assert_eq!(read(&mut chip, 0x10), 0x0001_afff);
        write(&mut chip, 0x11, u32::MAX);
        assert_eq!(read(&mut chip, 0x11), 0xff00_0000);
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(
            accesses in proptest::collection::vec((0u64..0x50, proptest::collection::vec(any::<u8>(), 0..9)), 0..64),
        ) {
            let mut chip = IoApic::new(Recorder::default());
            for (offset, mut data) in accesses {
                chip.write(offset, &data);
                chip.read(offset, &mut data);
            }
        }
    }
}
