use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE, hostile};
use crate::memory::{self, Hotplug};

const CONFIG: api::MemoryHotplug =
    api::MemoryHotplug { total_size_mib: 256, block_size_mib: 2, slot_size_mib: 128 };
const BLOCK: u64 = 2 * MIB;
const BLOCKS: u64 = 128;

/// Slots that remember whether they are shown.
#[derive(Default)]
struct FakeSlots {
    shown: Mutex<Vec<u32>>,
    full: AtomicBool,
}

impl Slots for FakeSlots {
    fn show(&self, index: u32, visible: bool) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut shown = self.shown.lock().unwrap();
        let was = shown.contains(&index);
        assert_ne!(was, visible, "slot {index} is shown or hidden twice");
        if visible {
            shown.push(index)
        } else {
            shown.retain(|other| *other != index)
        }
        Ok(())
    }
}

struct Rig {
    driver: Driver,
    memory: GuestMemory,
    start: u64,
    slots: Arc<FakeSlots>,
    control: MemControl,
}

fn device() -> (Box<Mem>, GuestMemory, Arc<FakeSlots>) {
    let hotplug = Hotplug { bytes: 256 * MIB, block_bytes: BLOCK };
    let memory = memory::create_with(1, api::HugePages::None, Some(hotplug)).unwrap();
    let slots = Arc::new(FakeSlots::default());
    (Box::new(Mem::new(&CONFIG, &memory, slots.clone()).unwrap()), memory, slots)
}

impl Rig {
    fn new() -> Self {
        let (device, memory, slots) = device();
        let control = device.control();
        let driver = Driver::running(device, F_UNPLUGGED_INACCESSIBLE);
        Self { driver, start: region_start(&memory).unwrap(), memory, slots, control }
    }

    /// Makes a request; type and state of the answer.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u8, u8) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.driver.fill(BUFFERS, &request);
        self.driver.fill(BUFFERS + 64, &[0xff; 10]);
        let head = self.driver.chain(0, &[(BUFFERS, 24, 0), (BUFFERS + 64, 10, WRITE)]);
        self.driver.kick(0);
        assert_eq!(self.driver.used(0), Some((head.into(), 10)));
        let answer = self.driver.bytes(BUFFERS + 64, 10);
        (answer[0], answer[8])
    }

    /// The same for blocks, counted from the region's first.
    fn blocks(&mut self, kind: u16, first: u64, count: u16) -> (u8, u8) {
        self.ask(kind, self.start + first * BLOCK, count)
    }

    fn config(&mut self) -> Vec<u64> {
        let words = (0..14).map(|word| u64::from(self.driver.read(0x100 + 4 * word))).collect::<Vec<_>>();
        words.chunks(2).map(|pair| pair[0] | pair[1] << 32).collect()
    }

    fn shown(&self) -> Vec<u32> {
        self.slots.shown.lock().unwrap().clone()
    }

    fn plugged_mib(&self) -> usize {
        self.control.status().plugged_size_mib
    }
}

const ACK: (u8, u8) = (0, 0);
const NACK: (u8, u8) = (1, 0);
const ERROR: (u8, u8) = (3, 0);

#[test]
fn the_guest_plugs_what_is_asked_for_and_no_more() {
    let mut rig = Rig::new();
    assert_eq!(rig.config(), [BLOCK, 0, rig.start, 256 * MIB, 0, 0, 0]);
    assert_eq!(rig.blocks(request::PLUG, 0, 1), ERROR, "nothing is usable");
    rig.control.request(130).unwrap();
    assert_eq!(rig.config()[4..], [256 * MIB, 0, 130 * MIB]);
    assert_eq!(rig.blocks(request::PLUG, 0, 66), NACK);
    assert_eq!(rig.blocks(request::PLUG, 0, 64), ACK);
    assert_eq!((rig.plugged_mib(), rig.shown()), (128, vec![0]));
    assert_eq!(rig.blocks(request::PLUG, 63, 1), ERROR, "plugged twice");
    assert_eq!(rig.blocks(request::PLUG, 100, 1), ACK);
    assert_eq!((rig.config()[5], rig.shown()), (130 * MIB, vec![0, 1]));
    assert_eq!(rig.blocks(request::PLUG, 101, 1), NACK);
    let state = |rig: &mut Rig, first, count| rig.blocks(request::STATE, first, count);
    assert_eq!(state(&mut rig, 0, 64), (0, BlockState::Plugged as u8));
    assert_eq!(state(&mut rig, 64, 36), (0, BlockState::Unplugged as u8));
    assert_eq!(state(&mut rig, 0, 128), (0, BlockState::Mixed as u8));
}

#[test]
fn what_is_unplugged_is_hidden_given_back_and_no_memory_for_devices() {
    let mut rig = Rig::new();
    rig.control.request(256).unwrap();
    assert_eq!(rig.blocks(request::PLUG, 0, 128), ACK);
    let at = |block: u64| GuestAddress(rig.start + block * BLOCK);
    rig.memory.write_slice(&vec![5; 2 * BLOCK as usize], at(10)).unwrap();
    let file = rig.memory.find_region(at(0)).unwrap().file_offset().unwrap().file().try_clone().unwrap();
    let before = file.metadata().unwrap().blocks();
    let second = at(11);
    assert_eq!(rig.blocks(request::UNPLUG, 10, 1), ACK);
    assert_eq!(before - file.metadata().unwrap().blocks(), BLOCK / 512);
    assert!(rig.memory.read_obj::<u8>(GuestAddress(second.0 - 1)).is_err());
    assert_eq!(rig.memory.read_obj::<u8>(second).unwrap(), 5);
    assert_eq!(rig.blocks(request::UNPLUG, 10, 2), ERROR, "one of them isn't plugged");
    assert_eq!(rig.shown(), [0, 1]);
    assert_eq!(rig.blocks(request::UNPLUG, 64, 64), ACK);
    assert_eq!((rig.shown(), rig.plugged_mib()), (vec![0], 126));
    rig.control.request(2).unwrap();
    assert_eq!(rig.ask(request::UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((rig.shown(), rig.plugged_mib()), (vec![], 0));
    assert_eq!(rig.config()[4..], [128 * MIB, 0, 2 * MIB]);
    assert_eq!(rig.blocks(request::PLUG, 11, 1), ACK);
    assert_eq!(rig.memory.read_obj::<u8>(second).unwrap(), 0);
}

#[test]
fn nonsense_is_answered_with_an_error_and_changes_nothing() {
    let mut rig = Rig::new();
    rig.control.request(100).unwrap();
    let start = rig.start;
    for (kind, address, count) in [
        (4, start, 1),
        (u16::MAX, start, 1),
        (request::PLUG, start, 0),
        (request::PLUG, start + 4096, 1),
        (request::PLUG, start - BLOCK, 1),
        (request::PLUG, start + 128 * MIB, 1),
        (request::PLUG, start + 126 * MIB, 2),
        (request::PLUG, start, u16::MAX),
        (request::PLUG, u64::MAX - BLOCK + 1, u16::MAX),
        (request::UNPLUG, start, 1),
        (request::STATE, start + 256 * MIB, 1),
        (request::STATE, 0, 1),
    ] {
        assert_eq!(rig.ask(kind, address, count), ERROR, "{kind} {address:#x} {count}");
    }
    // Too short a request, no room for an answer.
    let head = rig.driver.chain(0, &[(BUFFERS, 17, 0)]);
    rig.driver.kick(0);
    assert_eq!(rig.driver.used(0), Some((head.into(), 0)));
    assert_eq!((rig.plugged_mib(), rig.shown()), (0, vec![]));
}

#[test]
fn a_driver_that_touches_what_it_has_not_plugged_gets_nothing() {
    let mut rig = Rig::new();
    rig.control.request(100).unwrap();
    rig.driver.start(0);
    assert_eq!(rig.blocks(request::PLUG, 0, 1), ERROR);
}

#[test]
fn a_slot_that_cannot_be_shown_is_an_error_and_those_before_are_hidden_again() {
    let mut rig = Rig::new();
    rig.control.request(256).unwrap();
    rig.slots.full.store(true, Ordering::Relaxed);
    assert_eq!(rig.blocks(request::PLUG, 0, 128), ERROR);
    rig.slots.full.store(false, Ordering::Relaxed);
    assert_eq!((rig.plugged_mib(), rig.shown()), (0, vec![]));
    assert_eq!(rig.blocks(request::PLUG, 0, 128), ACK);
}

#[test]
fn the_guest_is_told_of_a_new_size_and_wrong_ones_are_refused() {
    let mut rig = Rig::new();
    let _ = rig.driver.irq.read();
    rig.control.request(4).unwrap();
    assert!(rig.driver.irq.read().is_ok());
    assert_eq!(rig.driver.read(0x60) & 2, 2, "a change of the configuration");
    assert!(rig.control.request(3).unwrap_err().to_string().contains("multiple of block_size_mib 2"));
    assert!(rig.control.request(258).is_err());
    assert_eq!(rig.control.status().requested_size_mib, 4);
}

#[test]
fn memory_stays_plugged_across_a_reset_and_a_snapshot() {
    let mut rig = Rig::new();
    rig.control.request(200).unwrap();
    assert_eq!(rig.blocks(request::PLUG, 1, 2), ACK);
    assert_eq!(rig.blocks(request::PLUG, 70, 1), ACK);
    rig.driver.start(F_UNPLUGGED_INACCESSIBLE);
    assert_eq!(rig.plugged_mib(), 6);
    let (other, memory, slots) = device();
    let (control, start) = (other.control(), rig.start);
    let driver = rig.driver.reloaded(|| other);
    rig = Rig { driver, memory, start, slots, control };
    assert_eq!((rig.plugged_mib(), rig.shown()), (6, vec![0, 1]));
    assert_eq!(rig.control.status().requested_size_mib, 200);
    assert_eq!(rig.blocks(request::STATE, 1, 2), (0, BlockState::Plugged as u8));
    assert_eq!(rig.blocks(request::STATE, 0, 1), (0, BlockState::Unplugged as u8));
    let state = |plugged| {
        let saved = SavedState { address: start, requested: 0, usable: 0, plugged };
        DeviceState::new(&saved).unwrap()
    };
    for plugged in [vec![(BLOCKS as usize, 1)], vec![(usize::MAX, 1)], vec![(0, BLOCKS as usize + 1)]] {
        assert!(device().0.restore(&state(plugged)).is_err());
    }
    let elsewhere = SavedState { address: 0, requested: 0, usable: 0, plugged: vec![] };
    assert!(device().0.restore(&DeviceState::new(&elsewhere).unwrap()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(abuse in hostile::abuse()) {
        let mut rig = Rig::new();
        rig.control.request(64).unwrap();
        hostile::inflict(&mut rig.driver, 0, &abuse);
        rig.driver.start(F_UNPLUGGED_INACCESSIBLE);
        prop_assert_eq!(rig.ask(request::UNPLUG_ALL, 0, 0), ACK);
        prop_assert_eq!(rig.blocks(request::PLUG, 0, 32), ACK);
    }

    /// Whatever is plugged and unplugged, sizes agree with a model and a slot is shown if a block of it is plugged.
    #[test]
    fn sizes_and_slots_agree_with_a_model(
        steps in proptest::collection::vec((any::<bool>(), 0..BLOCKS, 1u16..80), 1..40), requested in 0usize..=128,
    ) {
        let mut rig = Rig::new();
        rig.control.request(256).unwrap();
        rig.control.request(2 * requested).unwrap();
        let mut model = vec![false; BLOCKS as usize];
        for (plug, first, count) in steps {
            let range = first as usize..first as usize + usize::from(count);
            let all = |wanted: bool| model.get(range.clone()).is_some_and(|blocks| blocks.iter().all(|b| *b == wanted));
            let fits = model.iter().filter(|b| **b).count() + usize::from(count) <= requested;
            let expected = match plug {
                _ if !all(!plug) => ERROR,
                true if !fits => NACK,
                _ => ACK,
            };
            let kind = if plug { request::PLUG } else { request::UNPLUG };
            prop_assert_eq!(rig.blocks(kind, first, count), expected);
            if expected == ACK {
                model[range].fill(plug);
            }
            prop_assert_eq!(rig.plugged_mib(), 2 * model.iter().filter(|b| **b).count());
            let mut shown = rig.shown();
            shown.sort_unstable();
            let slots: Vec<u32> =
                (0..2).filter(|slot| model[64 * *slot as usize..][..64].contains(&true)).collect();
            prop_assert_eq!(shown, slots);
        }
    }
}
