//! `mote.memory_hotplug`: a driver for virtio-mem that does what the host asks for and tells when it is done, for ever. Each block is marked
//! when it is plugged and looked at as long as it is there; a disk, if there is one, reads into blocks that are and that are not.

use alloc::format;
use alloc::string::{String, ToString};

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};

use crate::bench::queue::{Queue, WRITE, negotiate};
use crate::boot::Boot;
use crate::cpu::{self, mmio_read, mmio_write};
use crate::heap::Identity;
use crate::virtio::{self, EVENT_IDX, INDIRECT, Kind, Place, StatusWrites, Window, register};
use crate::{ensure, println};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const TIMEOUT_US: u64 = 5_000_000;
const MIB: u64 = 1 << 20;

/// The device with its driver.
pub struct Memory<'a> {
    window: &'a Window,
    queue: Queue,
    block_bytes: u64,
    start: u64,
    bytes: u64,
    plugged: u64,
}

/// A request and its answer (virtio 1.2 §5.15.6.2).
#[repr(C)]
struct Request {
    kind: u16,
    padding: [u16; 3],
    address: u64,
    blocks: u16,
    more: [u16; 3],
    answer: [u16; 5],
}

impl<'a> Memory<'a> {
    /// Starts the device, with nothing plugged.
    pub fn new(window: &'a Window) -> Result<Self, String> {
        let word = |at: u64| u64::from(window.config(at)) | u64::from(window.config(at + 4)) << 32;
        let (block_bytes, start, bytes) = (word(0), word(16), word(24));
        ensure!(block_bytes.is_power_of_two() && block_bytes >= 2 * MIB, "blocks of {block_bytes:#x}");
        ensure!(start % block_bytes == 0 && bytes % block_bytes == 0, "{bytes:#x} bytes at {start:#x}");
        (0..bytes).step_by(1 << 30).chain([bytes - 1]).try_for_each(|at| cpu::map_gib_of(start + at))?;
        let features = negotiate(window, EVENT_IDX | INDIRECT | UNPLUGGED_INACCESSIBLE)?;
        ensure!(features & UNPLUGGED_INACCESSIBLE != 0, "features {features:#x}");
        if let Place::Pci(function) = &window.place {
            function.assign_message(0);
        }
        let queue = Queue::new(window, 0, 8, features)?;
        window.set(register::STATUS, 0xf);
        let mut memory = Self { window, queue, block_bytes, start, bytes, plugged: 0 };
        ensure!(memory.ask(UNPLUG_ALL, 0, 0)?[0] == 0, "not all could be unplugged");
        Ok(memory)
    }

    /// Type and state of the answer.
    pub fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> Result<[u16; 2], String> {
        let address = self.start + block * self.block_bytes;
        let request = Request { kind, padding: [0; 3], address, blocks, more: [0; 3], answer: [u16::MAX; 5] };
        // The device may write to it as long as it runs.
        let request: *mut Request = alloc::boxed::Box::into_raw(alloc::boxed::Box::new(request));
        self.queue.describe(0, request as u64, 24, 0, Some(1));
        self.queue.describe(1, request as u64 + 24, 10, WRITE, None);
        self.queue.offer(0);
        self.queue.kick();
        let mut used = None;
        cpu::wait_until(TIMEOUT_US, || {
            used = self.queue.take_written();
            used.is_some()
        });
        ensure!(used == Some((0, 10)), "request {kind} was used as {used:?}");
        // SAFETY: the device is done with it; a box that is left to it if it isn't.
        let request = unsafe { alloc::boxed::Box::from_raw(request) };
        // SAFETY: a valid reference; the device has written it behind the compiler's back.
        let answer = unsafe { (&raw const request.answer).read_volatile() };
        Ok([answer[0], answer[4]])
    }

    fn requested(&self) -> u64 {
        let half = |at| u64::from(self.window.config(at));
        (half(48) | half(52) << 32) / self.block_bytes
    }

    /// First and last word of a block.
    fn ends(&self, block: u64) -> [u64; 2] {
        let start = self.start + block * self.block_bytes;
        [start, start + self.block_bytes - 8]
    }

    fn mark(at: u64) -> u64 {
        at.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Plugs or unplugs blocks, the last one first, until there are so many.
    fn follow(&mut self, wanted: u64) -> Result<(), String> {
        while self.plugged < wanted {
            let answer = self.ask(PLUG, self.plugged, 1)?;
            ensure!(answer[0] == 0, "block {} can't be plugged: {answer:?}", self.plugged);
            for at in self.ends(self.plugged) {
                let before: u64 = mmio_read(at);
                ensure!(before == 0, "a new block has {before:#x} at {at:#x}");
                mmio_write(at, Self::mark(at));
            }
            self.plugged += 1;
        }
        while self.plugged > wanted {
            let answer = self.ask(UNPLUG, self.plugged - 1, 1)?;
            ensure!(answer[0] == 0, "block {} can't be unplugged: {answer:?}", self.plugged - 1);
            self.plugged -= 1;
        }
        for block in 0..self.plugged {
            for at in self.ends(block) {
                let found: u64 = mmio_read(at);
                ensure!(found == Self::mark(at), "block {block} has {found:#x} at {at:#x}");
            }
        }
        if self.plugged < self.bytes / self.block_bytes {
            let answer = self.ask(PLUG, self.plugged, 1)?;
            ensure!(answer[0] != 0, "more can be plugged than is asked for");
        }
        Ok(())
    }

    /// The disk's first sector, into a block that is there and into one that is not.
    fn read_disk(&self, disk: &Window) -> Result<(), String> {
        let transport = disk.transport(0, StatusWrites::Single)?;
        let mut disk = VirtIOBlk::<Identity, _>::new(transport).map_err(|error| error.to_string())?;
        let mut read = |block: u64| {
            let at = self.start + block * self.block_bytes + SECTOR_SIZE as u64;
            // SAFETY: memory of the device, mapped, which nothing else refers to; what isn't plugged is neither read nor written
            // here, only by the disk.
            let sector = unsafe { core::slice::from_raw_parts_mut(at as *mut u8, SECTOR_SIZE) };
            let done = disk.read_blocks(0, sector);
            done.map(|()| mmio_read::<u32>(at))
        };
        if self.plugged > 0 {
            let first = read(0).map_err(|error| format!("a plugged block: {error}"))?;
            ensure!(first == u32::from_le_bytes(*b"mote"), "the disk begins with {first:#x}");
        }
        if self.plugged < self.bytes / self.block_bytes {
            ensure!(read(self.plugged).is_err(), "the disk reads into a block that isn't plugged");
        }
        Ok(())
    }
}

/// What holds for a device whose host asks for nothing.
pub fn idle(window: &Window) -> Result<(), String> {
    let mut memory = Memory::new(window)?;
    let answers =
        [(PLUG, 1), (UNPLUG, 1), (STATE, 1), (9, 1)].map(|(kind, blocks)| memory.ask(kind, 0, blocks));
    for (answer, kind) in answers.into_iter().zip([PLUG, UNPLUG, STATE, 9]) {
        ensure!(
            answer.as_ref().is_ok_and(|answer| answer[0] == 3),
            "request {kind} is answered with {answer:?}"
        );
    }
    window.set(register::STATUS, 0);
    Ok(())
}

/// Serves for ever.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    let windows = virtio::discover(boot);
    let find = |kind| windows.iter().find(|window| window.kind == kind);
    let Some(window) = find(Kind::Mem) else { return println!("FAIL mote-guest: no virtio-mem") };
    cpu::enable_interrupts();
    window.route_irq();
    if let Err(why) = serve(window, find(Kind::Block)) {
        println!("FAIL mote-guest: {why}");
    }
}

fn serve(window: &Window, disk: Option<&Window>) -> Result<(), String> {
    let mut memory = Memory::new(window)?;
    println!("mote-guest: memory hot-plug of {} MiB", memory.bytes / MIB);
    loop {
        let seen = cpu::irq_count(window.pin());
        let wanted = memory.requested();
        if wanted != memory.plugged {
            memory.follow(wanted)?;
            disk.map_or(Ok(()), |disk| memory.read_disk(disk))?;
            println!("mote-guest: plugged {} MiB", memory.plugged * memory.block_bytes / MIB);
            continue;
        }
        // A change of the configuration comes with an interrupt.
        while cpu::irq_count(window.pin()) == seen {
            core::hint::spin_loop();
        }
        if window.has_interrupt_status() {
            let status = window.get(register::INTERRUPT_STATUS);
            window.set(register::INTERRUPT_ACKNOWLEDGE, status);
        }
    }
}
