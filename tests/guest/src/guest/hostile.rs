//! `mote.hostile`: what no driver may do. After each case the monitor must still be there and answer for the device's
//! registers; at the end a reset device must work as if nothing had been. Needs at least 32 MiB of RAM.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::rng::VirtIORng;

use crate::boot::Boot;
use crate::cpu::{self, mmio_read, mmio_write};
use crate::heap::Identity;
use crate::nic::Nic;
use crate::pci::Function;
use crate::report::Report;
use crate::test::{console, pmem};
use crate::virtio::{self, Kind, Place, StatusWrites, Window, register};
use crate::{ensure, plug, println};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Queue size of most cases.
const SIZE: u16 = 16;
/// How long a device gets to fall over a case.
const SETTLE_US: u64 = 500;
/// Bytes of a register window that are tried, from before its start to behind the configuration space.
const WINDOW_BYTES: u64 = 0x200;
/// Bytes from one part of a PCI function's registers to the next here, and how many of each are tried.
const PART: u64 = 0x1000;
const PART_BYTES: u64 = 0x50;
const UNMAPPED: u64 = 0xffff_ffff_ffff_f000;

/// One descriptor (virtio 1.2 §2.7.5).
#[derive(Clone, Copy, Default)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

const fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, length, flags, next }
}

/// A queue to be shown to a device.
struct Case {
    name: &'static str,
    table: Vec<Descriptor>,
    /// What the available ring says; its index is `index`.
    heads: Vec<u16>,
    index: u16,
    size: u32,
    /// Added to the addresses of descriptor table, available and used ring.
    offsets: [u64; 3],
}

impl Case {
    fn new(name: &'static str, table: Vec<Descriptor>) -> Self {
        Self { name, table, heads: vec![0], index: 1, size: u32::from(SIZE), offsets: [0; 3] }
    }
}

/// Memory that devices are pointed at. A device may write to it at any time, so it is never freed and never read.
#[repr(C, align(4096))]
struct Arena([u8; ARENA_BYTES]);

const ARENA_BYTES: usize = 0x4000;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const DATA: usize = 0x3000;

/// Arenas are used in turn: more than the cases of one queue need, so that none is used again while a case is shown.
const ARENAS: usize = 256;
static POOL: [AtomicU64; ARENAS] = [const { AtomicU64::new(0) }; ARENAS];
static NEXT_ARENA: AtomicUsize = AtomicUsize::new(0);

impl Arena {
    /// An arena with the case's rings; returns its address.
    fn filled(case: &Case) -> u64 {
        let mut content = vec![0; ARENA_BYTES];
        let mut put = |at: usize, bytes: &[u8]| content[at..at + bytes.len()].copy_from_slice(bytes);
        for (number, d) in case.table.iter().enumerate() {
            put(16 * number, &d.address.to_le_bytes());
            put(16 * number + 8, &d.length.to_le_bytes());
            put(16 * number + 12, &d.flags.to_le_bytes());
            put(16 * number + 14, &d.next.to_le_bytes());
        }
        put(AVAILABLE + 2, &case.index.to_le_bytes());
        for (number, head) in case.heads.iter().enumerate() {
            put(AVAILABLE + 4 + 2 * number, &head.to_le_bytes());
        }
        let slot = &POOL[NEXT_ARENA.fetch_add(1, Ordering::Relaxed) % ARENAS];
        if slot.load(Ordering::Relaxed) == 0 {
            let fresh = Box::leak(Box::new(Self([0; ARENA_BYTES])));
            slot.store(&raw mut *fresh as u64, Ordering::Relaxed);
        }
        let address = slot.load(Ordering::Relaxed);
        // SAFETY: a leaked arena of this size, to which no reference is kept; a device that writes to it at the same
        // time changes bytes that the guest never reads.
        unsafe { core::ptr::copy_nonoverlapping(content.as_ptr(), address as *mut u8, ARENA_BYTES) };
        fence(Ordering::SeqCst);
        address
    }
}

/// Runs all cases on all devices.
pub fn run(boot: &Boot) {
    let mut report = Report::default();
    cpu::calibrate();
    let top =
        boot.memory_map().iter().filter(|range| range.kind == 1).map(|range| range.end).max().unwrap_or(0);
    for (number, window) in virtio::discover(boot).iter().enumerate() {
        let name = format!("{}-{:?}", number, window.kind).to_lowercase();
        report.result(format!("hostile-{name}-registers"), registers(window));
        for queue in 0..3 {
            for case in cases(window.kind, top) {
                report
                    .result(format!("hostile-{name}-queue{queue}-{}", case.name), show(window, queue, &case));
            }
        }
        report.result(format!("hostile-{name}-order"), wrong_order(window));
        report.result(format!("hostile-{name}-queues-change-while-running"), change_queues(window));
        report.result(format!("hostile-{name}-features-after-driver-ok"), change_features(window));
        report.result(format!("hostile-{name}-recovers"), recovers(window));
    }
    println!("mote-guest: hostile part over");
    report.finish();
}

fn alive(window: &Window) -> Result<(), String> {
    let magic = window.get(register::MAGIC);
    ensure!(magic == 0x7472_6976, "magic number reads {magic:#x}");
    Ok(())
}

/// Every offset in every width, read and written, on a device that is reset and on one that runs.
fn registers(window: &Window) -> Result<(), String> {
    for running in [false, true] {
        window.set(register::STATUS, 0);
        if running {
            let case = Case::new("", vec![]);
            start(window, 0, &case);
        }
        match &window.place {
            Place::Mmio(place) => every_width(place.address..place.address + WINDOW_BYTES),
            Place::Pci(function) => pci_registers(function),
        }
    }
    window.set(register::STATUS, 0);
    alive(window)
}

/// Reads and writes ones, which are valid nowhere; a status of all ones tells the device that its driver gave up.
fn every_width(addresses: Range<u64>) {
    for at in addresses {
        let _ = (mmio_read::<u8>(at), mmio_read::<u16>(at), mmio_read::<u32>(at), mmio_read::<u64>(at));
        mmio_write(at, 0xff_u8);
        mmio_write(at, 0xffff_u16);
        mmio_write(at, u64::MAX);
        mmio_write(at, u32::MAX);
    }
}

/// All parts of a function's registers as far as something may be there, their ends, and its configuration space.
fn pci_registers(function: &Function) {
    let registers = function.registers;
    for part in 0..8 {
        every_width(registers + part * PART..registers + part * PART + PART_BYTES);
        every_width(registers + (part + 1) * PART - 4..registers + (part + 1) * PART - 1);
    }
    let saved: Vec<u32> = (0..64).map(|word| mmio_read(function.config + 4 * word)).collect();
    every_width(function.config..function.config + 0x110);
    every_width(function.config + 0xff8..function.config + 0xfff);
    for (word, value) in (0..).zip(&saved) {
        mmio_write(function.config + 4 * word, *value);
    }
}

/// Negotiates everything that the device offers, as a correct driver does.
fn negotiate(window: &Window) {
    window.set(register::STATUS, 0);
    window.set(register::STATUS, 1);
    window.set(register::STATUS, 3);
    let features = window.features();
    for half in 0..2 {
        window.set(register::DRIVER_FEATURES_SELECT, half);
        window.set(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
    window.set(register::STATUS, 0xb);
}

fn place_queue(window: &Window, queue: u32, case: &Case) {
    let arena = Arena::filled(case);
    window.set(register::QUEUE_SELECT, queue);
    window.set(register::QUEUE_SIZE, case.size);
    let parts = [
        (register::QUEUE_DESCRIPTORS, 0),
        (register::QUEUE_DRIVER, AVAILABLE),
        (register::QUEUE_DEVICE, USED),
    ];
    for ((register, part), offset) in parts.into_iter().zip(case.offsets) {
        let address = (arena + part as u64).wrapping_add(offset);
        window.set(register, address as u32);
        window.set(register + 4, (address >> 32) as u32);
    }
    window.set(register::QUEUE_READY, 1);
}

fn start(window: &Window, queue: u32, case: &Case) {
    negotiate(window);
    for number in 0..=queue {
        let idle = Case { index: 0, ..Case::new("", vec![]) };
        place_queue(window, number, if number == queue { case } else { &idle });
    }
    window.set(register::STATUS, 0xf);
}

fn show(window: &Window, queue: u32, case: &Case) -> Result<(), String> {
    start(window, queue, case);
    for _ in 0..2 {
        window.set(register::QUEUE_NOTIFY, queue);
    }
    cpu::wait_until(SETTLE_US, || false);
    let result = alive(window);
    window.set(register::STATUS, 0);
    result
}

/// Notifications, queue changes and resets at the wrong time.
fn wrong_order(window: &Window) -> Result<(), String> {
    let case = Case::new("", vec![descriptor(0x1000, 16, 0, 0)]);
    for queue in [0, 1, 2, 99, u32::MAX] {
        window.set(register::STATUS, 0);
        window.set(register::QUEUE_NOTIFY, queue);
        window.set(register::QUEUE_SELECT, queue);
        window.set(register::QUEUE_READY, 1);
        window.set(register::STATUS, 0xf);
        window.set(register::QUEUE_NOTIFY, queue);
        start(window, 0, &case);
        window.set(register::QUEUE_NOTIFY, queue);
        place_queue(window, 0, &case);
        window.set(register::QUEUE_READY, 0);
        window.set(register::QUEUE_NOTIFY, 0);
        window.set(register::INTERRUPT_ACKNOWLEDGE, u32::MAX);
        window.set(register::STATUS, 3);
        window.set(register::STATUS, 0);
    }
    alive(window)
}

/// Other sizes, addresses and readiness of queues that the device is serving (virtio 1.2 §2.1, §4.2.3.2: they are the
/// driver's to set before DRIVER_OK only).
fn change_queues(window: &Window) -> Result<(), String> {
    let busy =
        Case { heads: vec![0; 16], index: 16, ..Case::new("", vec![descriptor(0x1000, 64, WRITE, 0)]) };
    for queue in 0..3 {
        for (register, value) in [
            (register::QUEUE_SIZE, 0),
            (register::QUEUE_SIZE, 1),
            (register::QUEUE_SIZE, 3),
            (register::QUEUE_SIZE, u32::MAX),
            (register::QUEUE_DESCRIPTORS, u32::MAX),
            (register::QUEUE_DRIVER + 4, 0xffff),
            (register::QUEUE_DEVICE, 1),
            (register::QUEUE_READY, 0),
            (register::QUEUE_READY, 1),
        ] {
            start(window, queue, &busy);
            window.set(register::QUEUE_NOTIFY, queue);
            window.set(register::QUEUE_SELECT, queue);
            window.set(register, value);
            for _ in 0..4 {
                window.set(register::QUEUE_NOTIFY, queue);
            }
            alive(window)?;
            window.set(register::STATUS, 0);
        }
    }
    let status = window.get(register::STATUS);
    ensure!(status == 0, "status {status:#x} after a reset");
    Ok(())
}

/// Features are settled with FEATURES_OK (virtio 1.2 §3.1.1): what a driver writes later must change nothing, and what it
/// leaves out of the order neither.
fn change_features(window: &Window) -> Result<(), String> {
    let idle = Case { index: 0, ..Case::new("", vec![]) };
    for bits in [0, 1, 0xffff_0000, u32::MAX] {
        start(window, 0, &idle);
        let before = window.get(register::STATUS);
        for half in [0, 1, 2, u32::MAX] {
            window.set(register::DRIVER_FEATURES_SELECT, half);
            window.set(register::DRIVER_FEATURES, bits);
            window.set(register::QUEUE_NOTIFY, 0);
        }
        let after = window.get(register::STATUS);
        ensure!(before == after, "status {before:#x} became {after:#x}");
        // Back to FEATURES_OK and further, without a reset.
        for status in [0xb, 0x3, 0x1, 0xf, 0x8b, 0xff] {
            window.set(register::STATUS, status);
            window.set(register::QUEUE_NOTIFY, 0);
        }
        alive(window)?;
        window.set(register::STATUS, 0);
        let status = window.get(register::STATUS);
        ensure!(status == 0, "status {status:#x} after a reset");
    }
    Ok(())
}

/// The device works after a reset.
fn recovers(window: &Window) -> Result<(), String> {
    let transport = || window.transport(0, StatusWrites::Single);
    match window.kind {
        Kind::Block => {
            let mut block = VirtIOBlk::<Identity, _>::new(transport()?).map_err(|error| error.to_string())?;
            block.read_blocks(0, &mut [0; SECTOR_SIZE]).map_err(|error| error.to_string())
        }
        Kind::Rng => {
            let mut rng = VirtIORng::<Identity, _>::new(transport()?).map_err(|error| error.to_string())?;
            let mut bytes = [0; 32];
            let got = rng.request_entropy(&mut bytes).map_err(|error| error.to_string())?;
            ensure!(got > 0 && bytes != [0; 32], "no bytes");
            Ok(())
        }
        Kind::Net => Nic::new(transport()?)?.send(&[0xff; 60]),
        Kind::Pmem => pmem::works(window),
        Kind::Mem => plug::idle(window),
        Kind::Console => console::works(transport()?),
        Kind::Other(_) => Ok(()),
    }
}

/// `top` is the end of RAM: a buffer that begins there can't be there, one that begins before it is cut.
fn cases(kind: Kind, top: u64) -> Vec<Case> {
    let data = top - 0x10_0000;
    let mut cases = ring_cases(data);
    cases.extend(table_cases(data, top));
    cases.extend(indirect_cases(data));
    if kind == Kind::Block {
        cases.extend(block_cases(data));
    }
    cases
}

fn ring_cases(data: u64) -> Vec<Case> {
    let good = || vec![descriptor(data, 64, WRITE, 0)];
    let case = |name| Case::new(name, good());
    vec![
        Case { heads: vec![u16::MAX], ..case("head-out-of-range") },
        Case { heads: vec![SIZE], ..case("head-one-too-far") },
        Case { index: 40_000, ..case("index-jumps") },
        Case { index: u16::MAX, ..case("index-wraps") },
        Case { heads: vec![0; 16], index: 16, ..case("one-head-many-times") },
        Case { size: 0, ..case("size-zero") },
        Case { size: 3, ..case("size-three") },
        Case { size: 65_535, ..case("size-huge") },
        Case { size: u32::MAX, ..case("size-all-ones") },
        Case { offsets: [UNMAPPED, 0, 0], ..case("table-unmapped") },
        Case { offsets: [0, UNMAPPED, 0], ..case("available-unmapped") },
        Case { offsets: [0, 0, UNMAPPED], ..case("used-unmapped") },
        Case { offsets: [8, 0, 0], ..case("table-unaligned") },
        Case { offsets: [0, 1, 0], ..case("available-unaligned") },
        Case { offsets: [0, 0, 2], ..case("used-unaligned") },
        Case { offsets: [0, 0, 0_u64.wrapping_sub(USED as u64)], ..case("used-over-table") },
        Case { offsets: [1 << 40; 3], ..case("all-beyond-ram") },
        Case { offsets: [0xd000_0000, 0, 0], ..case("table-in-device") },
    ]
}

fn table_cases(data: u64, top: u64) -> Vec<Case> {
    let long = (0..SIZE).map(|n| descriptor(data, 64, NEXT | if n > 0 { WRITE } else { 0 }, (n + 1) % SIZE));
    vec![
        Case::new("loop-of-one", vec![descriptor(data, 64, NEXT, 0)]),
        Case::new("loop-of-two", vec![descriptor(data, 64, NEXT, 1), descriptor(data, 64, NEXT | WRITE, 0)]),
        Case::new("loop-of-all", long.collect()),
        Case::new("next-out-of-range", vec![descriptor(data, 64, NEXT, 60_000)]),
        Case::new("next-one-too-far", vec![descriptor(data, 64, NEXT | WRITE, SIZE)]),
        Case::new("buffer-unmapped", vec![descriptor(UNMAPPED, 4096, WRITE, 0)]),
        Case::new("buffer-wraps", vec![descriptor(u64::MAX - 1, u32::MAX, 0, 0)]),
        Case::new("buffer-behind-ram", vec![descriptor(top, 64, WRITE, 0)]),
        Case::new("buffer-over-the-end", vec![descriptor(top - 16, u32::MAX, WRITE, 0)]),
        Case::new(
            "buffer-over-the-end-read",
            vec![descriptor(top - 16, 4096, NEXT, 1), descriptor(data, 64, WRITE, 0)],
        ),
        Case::new("buffer-in-device", vec![descriptor(0xfee0_0000, 64, WRITE, 0)]),
        Case::new("buffer-empty", vec![descriptor(data, 0, WRITE, 0)]),
        Case::new("buffer-empty-read", vec![descriptor(data, 0, NEXT, 1), descriptor(data, 0, WRITE, 0)]),
        Case::new("read-only", vec![descriptor(data, 64, 0, 0)]),
        Case::new("write-then-read", vec![descriptor(data, 64, NEXT | WRITE, 1), descriptor(data, 64, 0, 0)]),
        Case::new("flags-all", vec![descriptor(data, 64, u16::MAX, 0)]),
    ]
}

/// The indirect tables are in arenas of their own.
fn indirect_cases(data: u64) -> Vec<Case> {
    let table_of = |table: Vec<Descriptor>| Arena::filled(&Case::new("", table));
    let endless = table_of(vec![descriptor(data, 64, NEXT, 1), descriptor(data, 64, NEXT | WRITE, 0)]);
    let nested = table_of(vec![descriptor(endless, 32, INDIRECT, 0)]);
    let far = table_of(vec![descriptor(data, 64, NEXT, 1000)]);
    let one = |name, address, length, flags| Case::new(name, vec![descriptor(address, length, flags, 0)]);
    vec![
        one("indirect-loop", endless, 32, INDIRECT),
        one("indirect-nested", nested, 16, INDIRECT),
        one("indirect-far", far, 32, INDIRECT),
        one("indirect-empty", endless, 0, INDIRECT),
        one("indirect-odd-length", endless, 17, INDIRECT),
        one("indirect-huge", endless, 0xffff_fff0, INDIRECT),
        one("indirect-64k-entries", endless, 1 << 20, INDIRECT),
        one("indirect-unmapped", UNMAPPED, 32, INDIRECT),
        one("indirect-writable", endless, 32, INDIRECT | WRITE),
        one("indirect-and-next", endless, 32, INDIRECT | NEXT),
    ]
}

/// Block requests (virtio 1.2 §5.2.6): a 16-byte header {type, reserved, sector}, data, one status byte.
fn block_cases(data: u64) -> Vec<Case> {
    let header = |kind: u32, sector: u64| {
        let [low, high] = [u64::from(kind), sector];
        // The header's 16 bytes are those of a descriptor: address = type, then the sector.
        Arena::filled(&Case::new(
            "",
            vec![descriptor(low, high as u32, (high >> 32) as u16, (high >> 48) as u16)],
        ))
    };
    let request = |name, head: u64, head_bytes, data_bytes, data_flags| {
        Case::new(
            name,
            vec![
                descriptor(head, head_bytes, NEXT, 1),
                descriptor(data, data_bytes, NEXT | data_flags, 2),
                descriptor(data + DATA as u64, 1, WRITE, 0),
            ],
        )
    };
    let (read, write, unknown) = (header(0, 0), header(1, 0), header(0xffff, 0));
    vec![
        request("block-unknown-type", unknown, 16, 512, WRITE),
        request("block-header-of-one", read, 1, 512, WRITE),
        request("block-header-of-15", read, 15, 512, WRITE),
        request("block-sector-max", header(0, u64::MAX), 16, 512, WRITE),
        request("block-sector-wraps", header(1, u64::MAX / 512), 16, 512, 0),
        request("block-half-sector", read, 16, 100, WRITE),
        request("block-read-into-read-only", read, 16, 512, 0),
        request("block-write-from-write-only", write, 16, 512, WRITE),
        request("block-short-id", header(8, 0), 16, 3, WRITE),
        Case::new("block-status-only", vec![descriptor(data, 1, WRITE, 0)]),
        Case::new("block-no-status", vec![descriptor(read, 16, NEXT, 1), descriptor(data, 512, 0, 0)]),
        Case::new("block-no-data", vec![descriptor(read, 16, NEXT, 1), descriptor(data, 1, WRITE, 0)]),
        Case::new(
            "block-status-of-zero",
            vec![descriptor(write, 16, NEXT, 1), descriptor(data, 0, WRITE, 0)],
        ),
    ]
}
