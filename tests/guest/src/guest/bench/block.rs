//! Block devices: 4 KiB at random places at depth 1 and 32, 1 MiB one after the other at depth 8.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::string::String;
use alloc::vec::Vec;

use super::Samples;
use super::queue::{self, Queue, WRITE};
use crate::boot::Boot;
use crate::virtio::{self, EVENT_IDX, Kind, Window};
use crate::{cpu, ensure, println};

const SECTOR: u64 = 512;
const IN: u32 = 0;
const OUT: u32 = 1;
/// A request that takes longer has been lost.
const TIMEOUT_US: u64 = 5_000_000;
/// Descriptors of a request: header, data, status.
const PARTS: u16 = 3;
const SIZE: u16 = 128;
const DEPTHS: usize = 32;
const SMALL: u64 = 4 << 10;
const LARGE: u64 = 1 << 20;
const LARGE_DEPTH: usize = 8;

/// What is measured.
struct Case {
    name: &'static str,
    kind: u32,
    bytes: u64,
    depth: usize,
    random: bool,
    /// One notification for all that were completed together, rather than one for each.
    batch: bool,
}

const CASES: [Case; 8] = [
    Case { name: "randread-d1", kind: IN, bytes: SMALL, depth: 1, random: true, batch: false },
    Case { name: "randwrite-d1", kind: OUT, bytes: SMALL, depth: 1, random: true, batch: false },
    Case { name: "randread-d32", kind: IN, bytes: SMALL, depth: DEPTHS, random: true, batch: false },
    Case { name: "randwrite-d32", kind: OUT, bytes: SMALL, depth: DEPTHS, random: true, batch: false },
    Case { name: "randread-d32-batch", kind: IN, bytes: SMALL, depth: DEPTHS, random: true, batch: true },
    Case { name: "randwrite-d32-batch", kind: OUT, bytes: SMALL, depth: DEPTHS, random: true, batch: true },
    Case { name: "seqread-1m-d8", kind: IN, bytes: LARGE, depth: LARGE_DEPTH, random: false, batch: false },
    Case { name: "seqwrite-1m-d8", kind: OUT, bytes: LARGE, depth: LARGE_DEPTH, random: false, batch: false },
];

/// Measures the first block device.
pub fn run(boot: &Boot, ms: u64) -> Result<(), String> {
    let windows = virtio::discover(boot);
    let window = windows.iter().find(|window| window.kind == Kind::Block).ok_or("no block device")?;
    let mut disk = Disk::new(window)?;
    let mut samples = Samples::new();
    let only = boot.command_line.value("mote.bench_case");
    for case in CASES.iter().filter(|case| only.is_none_or(|only| only == case.name)) {
        disk.measure(case, ms, &mut samples)?;
    }
    Ok(())
}

struct Disk {
    queue: Queue,
    sectors: u64,
    /// Header and status of each request.
    headers: *mut u8,
    /// [`LARGE`] for each of the first eight requests; small requests have [`SMALL`] each in the first ones.
    data: Vec<u64>,
    place: u64,
    random: u64,
}

/// Bytes between the headers of two requests: each in cache lines of its own.
const HEADER_STEP: usize = 64;
const STATUS_OFFSET: usize = 16;

impl Disk {
    fn new(window: &Window) -> Result<Self, String> {
        let features = queue::negotiate(window, EVENT_IDX)?;
        let queue = Queue::new(window, 0, SIZE, features)?;
        ensure!(queue.size() >= PARTS * DEPTHS as u16, "the queue has {} descriptors", queue.size());
        window.set(virtio::register::STATUS, 0xf);
        let sectors = u64::from(window.config(0)) | u64::from(window.config(4)) << 32;
        ensure!(sectors * SECTOR >= 16 * LARGE, "{sectors} sectors are too few");
        let allocate = |bytes: usize, align: usize| -> Result<*mut u8, String> {
            let layout = Layout::from_size_align(bytes, align).map_err(|_| "layout")?;
            // SAFETY: the layout isn't empty. Never given back: the device may write to it at any time.
            let memory = unsafe { alloc_zeroed(layout) };
            ensure!(!memory.is_null(), "out of memory");
            Ok(memory)
        };
        let headers = allocate(DEPTHS * HEADER_STEP, 4096)?;
        let data = (0..LARGE_DEPTH).map(|_| allocate(LARGE as usize, 4096).map(|data| data as u64));
        let data = data.collect::<Result<_, _>>()?;
        Ok(Self { queue, sectors, headers, data, place: 0, random: 0x9e37_79b9_7f4a_7c15 })
    }

    fn data(&self, request: usize, bytes: u64) -> u64 {
        if bytes == LARGE { self.data[request] } else { self.data[0] + request as u64 * bytes }
    }

    /// Writes the descriptors of all requests of a case.
    fn prepare(&mut self, case: &Case) {
        for request in 0..case.depth {
            let first = PARTS * request as u16;
            // SAFETY: the block has room for DEPTHS requests.
            let header = unsafe { self.headers.add(HEADER_STEP * request) };
            // SAFETY: as above; the device is idle.
            unsafe { header.cast::<u32>().write_volatile(case.kind) };
            let flags = if case.kind == IN { WRITE } else { 0 };
            let data = self.data(request, case.bytes);
            self.queue.describe(first, header as u64, 16, 0, Some(first + 1));
            self.queue.describe(first + 1, data, case.bytes as u32, flags, Some(first + 2));
            self.queue.describe(first + 2, header as u64 + STATUS_OFFSET as u64, 1, WRITE, None);
        }
    }

    /// The sector for the next request.
    fn next_sector(&mut self, case: &Case) -> u64 {
        let blocks = self.sectors * SECTOR / case.bytes;
        let block = if case.random {
            // xorshift64 (Marsaglia 2003); the multiplication spreads it evenly over the blocks.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            ((u128::from(self.random) * u128::from(blocks)) >> 64) as u64
        } else {
            self.place = (self.place + 1) % blocks;
            self.place
        };
        block * (case.bytes / SECTOR)
    }

    fn submit(&mut self, case: &Case, request: usize) {
        let sector = self.next_sector(case);
        // SAFETY: within the block of headers; the device doesn't have this request.
        unsafe {
            let header = self.headers.add(HEADER_STEP * request);
            header.add(8).cast::<u64>().write_volatile(sector);
            header.add(STATUS_OFFSET).write_volatile(0xff);
        }
        self.queue.offer(PARTS * request as u16);
    }

    /// The next request that is done, if one is.
    fn complete(&mut self) -> Result<Option<usize>, String> {
        let Some(head) = self.queue.take() else { return Ok(None) };
        let request = usize::from(head / PARTS);
        ensure!(request < DEPTHS, "completed chain {head}");
        // SAFETY: within the block of headers.
        let status = unsafe { self.headers.add(HEADER_STEP * request + STATUS_OFFSET).read_volatile() };
        ensure!(status == 0, "status {status:#x}");
        Ok(Some(request))
    }

    fn measure(&mut self, case: &Case, ms: u64, samples: &mut Samples) -> Result<(), String> {
        self.prepare(case);
        // What the first requests meet (a device asleep, cold caches) is not measured.
        self.rounds(case, ms / 10 + 1, samples)?;
        samples.clear();
        let (requests, kicks, ticks) = self.rounds(case, ms, samples)?;
        let ns = |ticks: u64| ticks as u128 * 1_000_000 / u128::from(cpu::tsc_per_ms());
        let iops = u128::from(requests) * 1_000_000_000 / ns(ticks).max(1);
        println!(
            "bench {} iops={iops} mb_s={} p50_ns={} p99_ns={} kicks={kicks} requests={requests}",
            case.name,
            iops * u128::from(case.bytes) / 1_000_000,
            ns(samples.percentile(50)),
            ns(samples.percentile(99)),
        );
        Ok(())
    }

    /// Keeps `depth` requests in flight for some time; requests, notifications, ticks.
    fn rounds(&mut self, case: &Case, ms: u64, samples: &mut Samples) -> Result<(u64, u64, u64), String> {
        let mut begun = [0_u64; DEPTHS];
        let (mut requests, mut kicks) = (0, 0);
        let start = cpu::tsc();
        let end = start + ms * cpu::tsc_per_ms();
        let limit = end + TIMEOUT_US / 1_000 * cpu::tsc_per_ms();
        for (request, begun) in begun.iter_mut().enumerate().take(case.depth) {
            *begun = cpu::tsc();
            self.submit(case, request);
            if !case.batch {
                kicks += u64::from(self.queue.kick());
            }
        }
        let mut in_flight = case.depth;
        let mut unannounced = case.batch;
        while in_flight > 0 {
            let Some(request) = self.complete()? else {
                if core::mem::take(&mut unannounced) {
                    kicks += u64::from(self.queue.kick());
                }
                ensure!(cpu::tsc() < limit, "{}", queue::timed_out(case.name));
                core::hint::spin_loop();
                continue;
            };
            let now = cpu::tsc();
            samples.add(now - begun[request]);
            requests += 1;
            if now >= end {
                in_flight -= 1;
                continue;
            }
            begun[request] = now;
            self.submit(case, request);
            if case.batch {
                unannounced = true;
            } else {
                kicks += u64::from(self.queue.kick());
            }
        }
        Ok((requests, kicks, cpu::tsc() - start))
    }
}
