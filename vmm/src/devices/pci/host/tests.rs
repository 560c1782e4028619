//! The bus with functions that only remember.

use proptest::prelude::*;

use super::*;
use crate::devices::pci::config::COMMAND;

const SIZE: u32 = 0x1000;

struct Probe {
    config: ConfigSpace,
    base: Option<u64>,
}

impl BusDevice for Probe {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

impl PciFunction for Probe {
    fn read_config(&mut self, register: u64, data: &mut [u8]) {
        self.config.read(register, data);
    }
    fn write_config(&mut self, register: u64, data: &[u8]) {
        self.config.write(register, data);
    }
    fn wanted_range(&self) -> Option<(u64, u64)> {
        self.config.bar()
    }
    fn placed(&mut self, base: Option<u64>) {
        self.base = base;
    }
}

fn probe(slot: Slot) -> Arc<Mutex<Probe>> {
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1040 + slot.number() as u16,
        class: [0; 3],
        revision: 0,
        subsystem_vendor: 0,
        subsystem: 0,
    });
    config.add_bar(layout::PCI_WINDOW as u32 + slot.number() as u32 * SIZE, SIZE);
    Arc::new(Mutex::new(Probe { config, base: None }))
}

struct Machine {
    host: PciHost,
    mmio: Arc<Bus>,
    probes: Vec<Arc<Mutex<Probe>>>,
}

fn machine(functions: usize) -> Machine {
    let mmio = Arc::new(Bus::new());
    let mut host = PciHost::new(mmio.clone());
    let mut probes = Vec::new();
    for _ in 0..functions {
        let slot = host.free_slot().unwrap();
        probes.push(probe(slot));
        assert!(host.insert(slot, probes.last().unwrap().clone()));
    }
    Machine { host, mmio, probes }
}

impl Machine {
    fn read(&mut self, slot: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.host.read(slot * 0x8000 + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, slot: u64, register: u64, value: u32) {
        self.host.write(slot * 0x8000 + register, &value.to_le_bytes());
    }

    fn decodes(&self, address: u64) -> bool {
        self.mmio.read(address, &mut [0])
    }
}

const AT: u64 = layout::PCI_WINDOW + SIZE as u64;

#[test]
fn functions_are_found_at_their_device_number_and_nothing_elsewhere() {
    let mut machine = machine(2);
    assert_eq!(machine.read(0, 0) & 0xffff, 0x1b36, "host bridge");
    assert_eq!(machine.read(1, 0), 0x1041_1af4);
    assert_eq!(machine.read(2, 0), 0x1042_1af4);
    assert_eq!(machine.read(3, 0), u32::MAX);
    assert_eq!(machine.read(1, 0x1000), u32::MAX, "function 1");
    let mut across = [0; 4];
    machine.host.read(0x8000 + 0xffe, &mut across);
    assert_eq!(across, [0xff; 4], "an access from one function into the next");
}

#[test]
fn registers_are_decoded_while_memory_space_is_on_and_where_they_were_moved() {
    let mut machine = machine(1);
    assert!(!machine.decodes(AT));
    machine.write(1, COMMAND as u64, 2);
    assert!(machine.decodes(AT));
    assert_eq!(machine.probes[0].lock().unwrap().base, Some(AT));
    machine.write(1, 0x10, AT as u32 + 0x10_0000);
    assert!(!machine.decodes(AT) && machine.decodes(AT + 0x10_0000));
    machine.write(1, COMMAND as u64, 0);
    assert!(!machine.decodes(AT + 0x10_0000));
    assert_eq!(machine.probes[0].lock().unwrap().base, None);
}

#[test]
fn registers_are_never_decoded_outside_of_the_window_or_over_each_other() {
    let mut machine = machine(2);
    machine.write(1, COMMAND as u64, 2);
    machine.write(2, COMMAND as u64, 2);
    for outside in [0, 0xfee0_0000, 0xc000_0000, layout::PCI_ECAM as u32, u32::MAX] {
        machine.write(2, 0x10, outside);
        assert_eq!(machine.probes[1].lock().unwrap().base, None, "{outside:#x}");
    }
    machine.write(2, 0x10, AT as u32);
    assert_eq!(machine.probes[1].lock().unwrap().base, None, "taken by the other");
    machine.write(1, COMMAND as u64, 0);
    machine.write(2, COMMAND as u64, 2);
    assert_eq!(machine.probes[1].lock().unwrap().base, Some(AT), "free now");
}

#[test]
fn a_removed_function_is_gone_with_its_registers() {
    let mut machine = machine(1);
    machine.write(1, COMMAND as u64, 2);
    assert!(machine.host.remove(Slot::new(1).unwrap()).is_some());
    assert!(machine.host.remove(Slot::new(1).unwrap()).is_none());
    assert_eq!(machine.read(1, 0), u32::MAX);
    assert!(!machine.decodes(AT));
    assert_eq!(machine.host.free_slot(), Slot::new(1));
}

#[test]
fn there_is_room_for_31_functions() {
    let machine = machine(31);
    assert_eq!(machine.host.free_slot(), None);
    assert_eq!((Slot::new(0), Slot::new(32)), (None, None));
}

proptest! {
    /// Whatever is written to the configuration space of the bus, registers are decoded where the functions think
    /// they are, inside of the window only.
    #[test]
    fn decoding_follows_the_functions(
        writes in proptest::collection::vec(
            (0u64..4, prop_oneof![0u64..0x110, Just(4u64), Just(0x10)],
             prop_oneof![
                 proptest::collection::vec(any::<u8>(), 0..9),
                 (0u32..8).prop_map(|page| (layout::PCI_WINDOW as u32 + page * SIZE).to_le_bytes().to_vec()),
             ]),
            0..64),
    ) {
        let mut machine = machine(3);
        for (slot, register, mut data) in writes {
            machine.host.write(slot * 0x8000 + register, &data);
            machine.host.read(slot * 0x8000 + register, &mut data);
        }
        let bases: Vec<u64> = machine.probes.iter().filter_map(|probe| probe.lock().unwrap().base).collect();
        for page in 0..0x20 {
            let address = layout::PCI_WINDOW + page * u64::from(SIZE);
            prop_assert_eq!(machine.decodes(address), bases.contains(&address));
        }
        for base in bases {
            prop_assert!((layout::PCI_WINDOW..layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE).contains(&base));
        }
    }
}
