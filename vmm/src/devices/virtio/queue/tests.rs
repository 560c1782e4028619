//! Rings in memory, orderly and hostile.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::InterruptLine;
use crate::devices::virtio::testing::{BUFFERS, HIGH, INDIRECT, MEMORY_BYTES, NEXT, SIZE, WRITE, memory};

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;

#[derive(Clone, Default)]
struct Counter(Arc<AtomicUsize>);

impl InterruptLine for Counter {
    fn used_buffers(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {}
}

struct Rig {
    mem: GuestMemory,
    queue: VirtQueue,
    interrupts: Counter,
}

fn rig(event_idx: bool) -> Rig {
    let (mem, interrupts) = (memory(), Counter::default());
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    assert!(queue.is_valid(&mem));
    let interrupt = Arc::new(Interrupt::new(Box::new(interrupts.clone())));
    let queue = VirtQueue::new(queue, mem.clone(), 0, None, interrupt);
    Rig { mem, queue, interrupts }
}

impl Rig {
    fn put(&self, address: u64, value: u16) {
        self.mem.write_obj(value.to_le(), GuestAddress(address)).unwrap();
    }

    fn descriptor_at(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        self.mem.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        self.mem.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Descriptors from 0 on, and one available chain that starts at 0.
    fn offer(&self, descriptors: &[(u64, u32, u16, u16)]) {
        for (index, descriptor) in descriptors.iter().enumerate() {
            self.descriptor_at(TABLE + 16 * index as u64, *descriptor);
        }
        self.put(AVAIL + 4, 0);
        self.put(AVAIL + 2, 1);
    }

    fn pop(&mut self) -> Chain {
        let mut chain = self.queue.new_chain();
        assert!(self.queue.pop(&mut chain).unwrap());
        chain
    }
}

#[test]
fn orderly_chain_is_split_into_readable_and_writable() {
    let mut rig = rig(false);
    rig.offer(&[(BUFFERS, 16, NEXT, 5), (0, 0, 0, 0), (BUFFERS + 64, 4, WRITE, 0)]);
    rig.descriptor_at(TABLE + 16 * 5, (BUFFERS + 32, 8, NEXT, 2));
    let chain = rig.pop();
    assert_eq!((chain.readable.bytes(), chain.writable.bytes()), (24, 4));
    assert!(!chain.faulty && chain.tail_valid);
    let mut chain = rig.queue.new_chain();
    assert!(!rig.queue.pop(&mut chain).unwrap());
}

#[test]
fn indirect_chain_is_followed() {
    let mut rig = rig(false);
    rig.offer(&[(BUFFERS, 32, INDIRECT, 0)]);
    rig.descriptor_at(BUFFERS, (BUFFERS + 0x100, 16, NEXT, 1));
    rig.descriptor_at(BUFFERS + 16, (BUFFERS + 0x200, 16, WRITE, 0));
    let chain = rig.pop();
    assert_eq!((chain.readable.bytes(), chain.writable.bytes(), chain.faulty), (16, 16, false));
}

#[test]
fn damaged_chains_are_faulty_and_bounded() {
    let end = MEMORY_BYTES as u64;
    type Case<'a> = (&'a str, &'a [(u64, u32, u16, u16)], bool);
    let cases: &[Case] = &[
        ("loop on itself", &[(BUFFERS, 4, NEXT, 0)], false),
        ("loop of two", &[(BUFFERS, 4, NEXT, 1), (BUFFERS, 4, NEXT | WRITE, 0)], false),
        ("next out of range", &[(BUFFERS, 4, NEXT | WRITE, SIZE)], false),
        ("not memory", &[(end, 4, WRITE, 0)], false),
        ("wraps", &[(u64::MAX - 1, 4, 0, 0)], false),
        ("across the hole", &[(HIGH - 0x1004, 8, 0, 0)], false),
        ("4 GiB", &[(BUFFERS, u32::MAX, WRITE, 0)], false),
        ("bad in front of a good tail", &[(end, 4, NEXT, 1), (BUFFERS, 4, WRITE, 0)], true),
        ("readable after writable", &[(BUFFERS, 4, NEXT | WRITE, 1), (BUFFERS, 4, 0, 0)], false),
        ("indirect of odd length", &[(BUFFERS, 17, INDIRECT, 0)], false),
        ("indirect of nothing", &[(BUFFERS, 0, INDIRECT, 0)], false),
        ("indirect not in memory", &[(end, 16, INDIRECT, 0)], false),
        ("indirect in itself", &[(TABLE, 16, INDIRECT, 0)], false),
    ];
    for (name, descriptors, tail_valid) in cases {
        let mut rig = rig(false);
        rig.offer(descriptors);
        let chain = rig.pop();
        assert!(chain.faulty, "{name}");
        assert_eq!(chain.tail_valid, *tail_valid, "{name}");
    }
}

#[test]
fn long_indirect_chain_ends_at_the_segment_limit() {
    let mut rig = rig(false);
    rig.offer(&[(BUFFERS, 16 * 4096, INDIRECT, 0)]);
    for index in 0..4096u16 {
        let flags = if index == 4095 { WRITE } else { NEXT | WRITE };
        rig.descriptor_at(BUFFERS + 16 * u64::from(index), (0x8000, 1, flags, index + 1));
    }
    let chain = rig.pop();
    assert!(chain.faulty && !chain.tail_valid);
    assert_eq!(chain.writable.segments(), MAX_SEGMENTS);
}

#[test]
fn more_available_than_the_ring_holds_is_a_broken_ring() {
    let mut rig = rig(false);
    rig.put(AVAIL + 2, SIZE + 1);
    let mut chain = rig.queue.new_chain();
    assert!(rig.queue.pop(&mut chain).is_err());
    assert!(rig.queue.push_used(SIZE, 0).is_err());
    assert!(rig.queue.push_used_together([(SIZE, 0), (0, 0)].into_iter()).is_err());
}

#[test]
fn chains_used_together_appear_with_one_step_of_the_index() {
    let mut rig = rig(false);
    // Across the end of the ring.
    for _ in 0..SIZE - 1 {
        rig.queue.push_used(0, 0).unwrap();
    }
    rig.queue.push_used_together([(3, 100), (7, 200), (9, 300)].into_iter()).unwrap();
    let index: u16 = rig.mem.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!(index, SIZE + 2);
    let element = |slot: u64| -> [u32; 2] {
        [0, 4].map(|field| rig.mem.read_obj(GuestAddress(USED + 4 + 8 * slot + field)).unwrap())
    };
    assert_eq!([SIZE as u64 - 1, 0, 1].map(element), [[3, 100], [7, 200], [9, 300]]);
}

#[test]
fn without_event_idx_the_flag_of_the_driver_suppresses_interrupts() {
    let mut rig = rig(false);
    let count = |rig: &mut Rig| {
        rig.queue.push_used(0, 0).unwrap();
        rig.queue.signal().unwrap();
        rig.interrupts.0.swap(0, Ordering::SeqCst)
    };
    assert_eq!(count(&mut rig), 1);
    rig.put(AVAIL, 1);
    assert_eq!(count(&mut rig), 0);
    rig.put(AVAIL, 0);
    assert_eq!(count(&mut rig), 1);
    rig.queue.signal().unwrap();
    assert_eq!(rig.interrupts.0.load(Ordering::SeqCst), 0, "nothing was used since");
}

proptest! {
    /// EVENT_IDX: an interrupt is due exactly if one of the indices passed since the last look is the driver's event
    /// (virtio 1.2 §2.7.7.2), also when indices wrap.
    #[test]
    fn event_index_is_met_exactly(start in any::<u16>(), steps in proptest::collection::vec((0u16..5, 0u16..8), 1..40)) {
        let mut rig = rig(true);
        rig.queue.queue.set_next_used(start);
        rig.queue.signalled = start;
        let mut index = start;
        for (used, event) in steps {
            let event = index.wrapping_add(event).wrapping_sub(4);
            rig.put(AVAIL + 4 + 2 * u64::from(SIZE), event);
            let mut due = false;
            for _ in 0..used {
                due |= index == event;
                index = index.wrapping_add(1);
                rig.queue.push_used(0, 0).unwrap();
            }
            rig.queue.signal().unwrap();
            prop_assert_eq!(rig.interrupts.0.swap(0, Ordering::SeqCst), usize::from(due));
        }
    }
}
