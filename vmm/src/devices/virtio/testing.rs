//! A driver for tests and fuzzing: guest memory, rings that are written byte by byte, and a device behind its mmio registers.
#![allow(missing_docs, clippy::unwrap_used, reason = "nothing of it is in the program")]
#![cfg_attr(not(test), allow(dead_code, reason = "fuzzing needs only some of it"))]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::lifecycle::status;
use super::mmio::MmioTransport;
use super::{F_VERSION_1, VirtioDevice};
use crate::devices::bus::BusDevice;
use crate::memory::{GuestMemory, Region};
use crate::snapshot::Stateful;

/// Memory is 0..MEMORY_BYTES, but for a hole of a page that ends at [`HIGH`].
pub const MEMORY_BYTES: usize = 4 << 20;
/// Start of the second region of memory, after a hole.
pub const HIGH: u64 = 0x20_0000;
const HOLE: u64 = 0x1000;

/// Where tests put buffers: free memory up to the hole.
pub const BUFFERS: u64 = 0x10_0000;

/// Size that the driver gives each queue.
pub const SIZE: u16 = 16;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// No test waits longer, however busy the machine is.
const TIME_LIMIT: Duration = Duration::from_secs(30);

pub fn memory() -> GuestMemory {
    let high = MEMORY_BYTES - HIGH as usize;
    let regions = [(0, (HIGH - HOLE) as usize), (HIGH, high)].map(|(start, bytes)| {
        Region::new(GuestRegionMmap::from_range(GuestAddress(start), bytes, None).unwrap(), None)
    });
    GuestMemory::from_regions(regions.into()).unwrap()
}

/// A driver with its device.
pub struct Driver {
    pub mem: GuestMemory,
    pub transport: MmioTransport,
    pub irq: EventFd,
    rings: Vec<Ring>,
}

/// The driver's side of one queue.
#[derive(Default, Clone, Copy)]
struct Ring {
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, memory())
    }

    /// At least [`MEMORY_BYTES`] of memory.
    pub fn with_memory(device: Box<dyn VirtioDevice>, mem: GuestMemory) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let rings = vec![Ring::default(); device.queue_max_sizes().len()];
        let transport = MmioTransport::new(device, mem.clone(), irq.try_clone().unwrap()).unwrap();
        Self { mem, transport, irq, rings }
    }

    /// A device that runs, with `features` (and VERSION_1) agreed on.
    pub fn running(device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(features);
        driver
    }

    /// The same driver in a machine that was loaded from a snapshot of this one. The new device is made when the old one is
    /// gone.
    pub fn reloaded(self, device: impl FnOnce() -> Box<dyn VirtioDevice>) -> Self {
        let Self { mem, mut transport, irq, rings } = self;
        transport.pause();
        let state = transport.save().unwrap();
        drop(transport);
        let mut transport = MmioTransport::new(device(), mem.clone(), irq.try_clone().unwrap()).unwrap();
        transport.restore(&state).unwrap();
        transport.resume();
        Self { mem, transport, irq, rings }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u8 {
        self.read(0x70) as u8
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0x14, 1);
        let high = self.read(0x10);
        self.write(0x14, 0);
        u64::from(high) << 32 | u64::from(self.read(0x10))
    }

    /// Up to FEATURES_OK; returns whether the device took them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        let mut set = status::ACKNOWLEDGE;
        self.write(0x70, set.into());
        set |= status::DRIVER;
        self.write(0x70, set.into());
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, (set | status::FEATURES_OK).into());
        self.status() & status::FEATURES_OK != 0
    }

    fn table(queue: usize) -> u64 {
        0x1_0000 * (queue as u64 + 1)
    }

    pub fn avail(queue: usize) -> u64 {
        Self::table(queue) + 0x1000
    }

    pub fn used_ring(queue: usize) -> u64 {
        Self::table(queue) + 0x2000
    }

    pub fn set_up_queue(&mut self, queue: usize, size: u16) {
        self.mem.write_slice(&[0; 0x3000], GuestAddress(Self::table(queue))).unwrap();
        self.rings[queue] = Ring::default();
        self.write(0x30, queue as u32);
        self.write(0x38, size.into());
        for (register, address) in
            [(0x80, Self::table(queue)), (0x90, Self::avail(queue)), (0xa0, Self::used_ring(queue))]
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Resets the device and brings it to DRIVER_OK.
    pub fn start(&mut self, features: u64) {
        let status = self.try_start(features);
        assert_eq!(self.status(), status);
    }

    /// Resets the device and brings it to DRIVER_OK, which it may answer with DEVICE_NEEDS_RESET; the status that was written.
    pub fn try_start(&mut self, features: u64) -> u8 {
        self.write(0x70, 0);
        assert!(self.negotiate(features | F_VERSION_1));
        for queue in 0..self.rings.len() {
            self.set_up_queue(queue, SIZE);
        }
        let status = self.status() | status::DRIVER_OK;
        self.write(0x70, status.into());
        status
    }

    pub fn descriptor(&mut self, queue: usize, index: u16, parts: (u64, u32, u16, u16)) {
        self.raw_descriptor(Self::table(queue) + 16 * u64::from(index), parts);
    }

    /// Writes address, length, flags, next.
    pub fn raw_descriptor(&mut self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a head in the available ring.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.available % SIZE);
        ring.available = ring.available.wrapping_add(1);
        let available = ring.available;
        self.mem.write_obj(head.to_le(), GuestAddress(Self::avail(queue) + 4 + 2 * slot)).unwrap();
        self.set_available(queue, available);
    }

    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.mem.write_obj(index.to_le(), GuestAddress(Self::avail(queue) + 2)).unwrap();
    }

    /// Makes a chain of (address, length, flags) in the next free descriptors and offers it; its head.
    pub fn chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.rings[queue].next_descriptor;
        for (position, &(address, len, flags)) in parts.iter().enumerate() {
            let index = self.rings[queue].next_descriptor;
            let next = (index + 1) % SIZE;
            let flags = if position + 1 < parts.len() { flags | NEXT } else { flags };
            self.descriptor(queue, index, (address, len, flags, next));
            self.rings[queue].next_descriptor = next;
        }
        self.offer(queue, head);
        head
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// The next used element: id and length.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let base = Self::used_ring(queue);
        let ring = &mut self.rings[queue];
        let index = u16::from_le(self.mem.read_obj(GuestAddress(base + 2)).unwrap());
        if index == ring.seen {
            return None;
        }
        let at = base + 4 + 8 * u64::from(ring.seen % SIZE);
        ring.seen = ring.seen.wrapping_add(1);
        let [id, len]: [u32; 2] = [0, 4].map(|field| self.mem.read_obj(GuestAddress(at + field)).unwrap());
        Some((u32::from_le(id), u32::from_le(len)))
    }

    /// Waits for `ready`, looking again after each interrupt.
    pub fn wait<T>(&mut self, what: &str, mut ready: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(result) = ready(self) {
                return result;
            }
            assert!(start.elapsed() < TIME_LIMIT, "no {what}");
            // SAFETY: borrowed for the poll below only, while `self` lives.
            let irq = unsafe { BorrowedFd::borrow_raw(self.irq.as_raw_fd()) };
            let mut fds = [PollFd::new(irq, PollFlags::POLLIN)];
            // Also looks without an interrupt, since a test may have switched them off.
            poll(&mut fds, PollTimeout::from(5u8)).unwrap();
            let _ = self.irq.read();
        }
    }

    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        self.wait("used buffer", |driver| driver.used(queue))
    }

    pub fn wait_needs_reset(&mut self) {
        self.wait("DEVICE_NEEDS_RESET", |driver| (driver.status() & status::NEEDS_RESET != 0).then_some(()));
    }

    pub fn fill(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// What a hostile driver does to one queue: raw descriptors, heads, and how far it says the ring is filled.
#[cfg(test)]
pub mod hostile {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    pub struct Abuse {
        pub descriptors: Vec<(u64, u32, u16, u16)>,
        pub heads: Vec<u16>,
        pub available: u16,
        pub used_event: u16,
    }

    fn address() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => BUFFERS..BUFFERS + 0x2000,
            // The rings themselves.
            2 => 0x1_0000u64..0x3_0000,
            1 => HIGH - 0x1010..HIGH + 0x10,
            1 => MEMORY_BYTES as u64 - 8..MEMORY_BYTES as u64 + 8,
            1 => any::<u64>(),
        ]
    }

    fn len() -> impl Strategy<Value = u32> {
        prop_oneof![4 => 0u32..64, 2 => 500u32..5000, 1 => Just(16u32), 1 => Just(u32::MAX), 1 => any::<u32>()]
    }

    fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        (address(), len(), prop_oneof![8 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()], 0..SIZE + 2)
    }

    pub fn abuse() -> impl Strategy<Value = Abuse> {
        let descriptors = proptest::collection::vec(descriptor(), SIZE as usize);
        let heads = proptest::collection::vec(prop_oneof![8 => 0..SIZE, 1 => any::<u16>()], SIZE as usize);
        let available = prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()];
        (descriptors, heads, available, any::<u16>()).prop_map(
            |(descriptors, heads, available, used_event)| Abuse { descriptors, heads, available, used_event },
        )
    }

    /// Lets `driver` do this to `queue` of its running device, and notifies the device.
    pub fn inflict(driver: &mut Driver, queue: usize, abuse: &Abuse) {
        for (index, parts) in abuse.descriptors.iter().enumerate() {
            driver.descriptor(queue, index as u16, *parts);
        }
        for (slot, head) in abuse.heads.iter().enumerate() {
            let at = Driver::avail(queue) + 4 + 2 * slot as u64;
            driver.mem.write_obj(head.to_le(), GuestAddress(at)).unwrap();
        }
        let used_event = Driver::avail(queue) + 4 + 2 * u64::from(SIZE);
        driver.mem.write_obj(abuse.used_event.to_le(), GuestAddress(used_event)).unwrap();
        driver.set_available(queue, abuse.available);
        driver.kick(queue);
    }
}
