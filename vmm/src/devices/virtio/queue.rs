//! A running split virtqueue: chains out, used buffers in, and when to notify.
//!
//! Whatever the rings hold, a chain has at most [`MAX_SEGMENTS`](super::buffers::MAX_SEGMENTS) segments, all of them
//! guest memory. Damage falls in two classes: a *faulty chain* (loop, bad address, wrong order) is handed to the
//! device, which may still be able to answer with an error status; a *broken ring* ([`QueueError`]) is the end until
//! the driver resets the device.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::buffers::{GuestBuffers, MAX_SEGMENTS};
use crate::memory::GuestMemory;

/// Bytes before the elements of the used ring: flags and index.
const USED_RING_HEADER: u64 = 4;
/// Bytes of an element of the used ring.
const USED_ELEMENT: u64 = 8;
/// Place of the index in the available ring.
const AVAIL_INDEX: u64 = 2;
/// Bytes before the elements of the available ring.
const AVAIL_RING_HEADER: u64 = 4;

/// A ring that can't be used any more.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {queue} is broken")]
pub struct QueueError {
    /// Index of the queue.
    pub queue: u16,
    /// What is wrong.
    #[source]
    pub source: virtio_queue::Error,
}

/// A descriptor chain as buffers. Made once per queue and filled by each [`VirtQueue::pop`], so that serving a request
/// allocates nothing.
pub struct Chain {
    /// What to name in the used ring.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: GuestBuffers,
    /// Where the device may answer.
    pub writable: GuestBuffers,
    /// Something in the chain is wrong: it doesn't end properly, is too long, names what isn't memory, or has a
    /// readable part after a writable one. What could be used is in the buffers nevertheless.
    pub faulty: bool,
    /// The end of `writable` is really the end of the chain's writable part, even if `faulty`.
    pub tail_valid: bool,
}

impl Chain {
    /// An empty chain over `mem`.
    pub fn new(mem: &GuestMemory) -> Self {
        Self {
            head: 0,
            readable: GuestBuffers::new(mem.clone()),
            writable: GuestBuffers::new(mem.clone()),
            faulty: false,
            tail_valid: false,
        }
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.faulty = false;
        self.tail_valid = false;
    }

    /// Takes over a chain of the ring.
    fn fill(&mut self, descriptors: virtio_queue::DescriptorChain<&GuestMemory>) {
        self.clear(descriptors.head_index());
        // The crate's iterator ends silently on a loop, a bad index or a bad table: an orderly chain's last descriptor
        // has no NEXT.
        let (mut ended, mut count) = (false, 0);
        for descriptor in descriptors {
            count += 1;
            if count > MAX_SEGMENTS {
                ended = false;
                break;
            }
            ended = !descriptor.has_next();
            let (buffers, access) = if descriptor.is_write_only() {
                (&mut self.writable, Permissions::Write)
            } else {
                // virtio 1.2 §2.7.4.2: device-writable buffers come after all device-readable ones.
                self.faulty |= self.writable.segments() > 0;
                (&mut self.readable, Permissions::Read)
            };
            let pushed = buffers.push(descriptor.addr(), descriptor.len(), access);
            self.faulty |= pushed.is_err();
            self.tail_valid = pushed.is_ok() && descriptor.is_write_only() && descriptor.len() > 0;
        }
        self.faulty |= !ended;
        self.tail_valid &= ended;
    }
}

/// How far a queue has come: what [`VirtQueue`] leaves behind when it is dropped, for the queue that continues.
#[derive(Debug, Default)]
pub struct Progress(AtomicU32);

impl Progress {
    /// The next available and the next used index.
    pub fn get(&self) -> (u16, u16) {
        let both = self.0.load(Ordering::SeqCst);
        ((both >> 16) as u16, both as u16)
    }

    /// Sets them.
    pub fn set(&self, next_avail: u16, next_used: u16) {
        self.0.store(u32::from(next_avail) << 16 | u32::from(next_used), Ordering::SeqCst);
    }
}

/// Where a queue's rings are, for somebody else who serves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Number of descriptors.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Of the available ring.
    pub avail_ring: u64,
    /// Of the used ring.
    pub used_ring: u64,
    /// The next available index.
    pub next_avail: u16,
}

/// A queue in use by its device.
pub struct VirtQueue {
    queue: Queue,
    mem: GuestMemory,
    index: u16,
    /// The used index at the last [`VirtQueue::signal`].
    signalled: u16,
    notifier: Option<Arc<EventFd>>,
    interrupt: Arc<Interrupt>,
    progress: Option<Arc<Progress>>,
}

impl Drop for VirtQueue {
    fn drop(&mut self) {
        if let Some(progress) = &self.progress {
            progress.set(self.queue.next_avail(), self.queue.next_used());
        }
    }
}

impl VirtQueue {
    /// `queue` must be valid for `mem` ([`QueueT::is_valid`]).
    pub const fn new(
        queue: Queue,
        mem: GuestMemory,
        index: u16,
        notifier: Option<Arc<EventFd>>,
        interrupt: Arc<Interrupt>,
    ) -> Self {
        Self { queue, mem, index, signalled: 0, notifier, interrupt, progress: None }
    }

    /// Continues where `progress` says, and leaves there how far it has come when it is dropped.
    #[must_use]
    pub fn continuing(mut self, progress: Arc<Progress>) -> Self {
        let (next_avail, next_used) = progress.get();
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
        self.signalled = next_used;
        self.progress = Some(progress);
        self
    }

    /// The eventfd that becomes readable when the driver notifies; -1 if the device serves inline.
    pub fn notifier_fd(&self) -> RawFd {
        self.notifier.as_ref().map_or(-1, |notifier| notifier.as_raw_fd())
    }

    /// Takes what was notified so far, for who waits for the eventfd level by level.
    pub fn take_notification(&self) {
        // Fails only if there was none.
        let _ = self.notifier.as_ref().map(|notifier| notifier.read());
    }

    /// The eventfd itself, for somebody else who serves the queue.
    pub const fn notifier(&self) -> Option<&Arc<EventFd>> {
        self.notifier.as_ref()
    }

    /// Its number among the device's queues.
    pub const fn index(&self) -> u16 {
        self.index
    }

    /// Where its rings are.
    pub fn rings(&self) -> Rings {
        Rings {
            size: self.queue.size(),
            desc_table: self.queue.desc_table(),
            avail_ring: self.queue.avail_ring(),
            used_ring: self.queue.used_ring(),
            next_avail: self.queue.next_avail(),
        }
    }

    /// The address in this process of a place in guest memory.
    pub fn host_address(&self, guest: u64) -> Option<u64> {
        self.mem.get_host_address(GuestAddress(guest)).ok().map(|address| address as u64)
    }

    /// Somebody else has served the queue, and left it with this next available index.
    pub fn left_at(&mut self, next_avail: u16) {
        self.queue.set_next_avail(next_avail);
        // Can't fail: the ring was checked to be memory. How far it was used it says itself.
        if let Ok(used) = self.queue.used_idx(&self.mem, Ordering::Acquire) {
            self.queue.set_next_used(used.0);
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// An empty chain for [`VirtQueue::pop`].
    pub fn new_chain(&self) -> Chain {
        Chain::new(&self.mem)
    }

    /// No buffers yet, of the queue's memory.
    pub fn new_buffers(&self) -> GuestBuffers {
        GuestBuffers::new(self.mem.clone())
    }

    const fn broken(&self) -> impl Fn(virtio_queue::Error) -> QueueError + use<> {
        let queue = self.index;
        move |source| QueueError { queue, source }
    }

    /// Takes the next available chain; false if there is none.
    ///
    /// # Errors
    /// The available ring is broken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        Ok(self.pop_many(std::slice::from_mut(chain))? == 1)
    }

    /// Takes as many available chains as there are and as `chains` has room for; returns how many. The driver's index is
    /// read once: each read of it costs a cache miss while the driver is busy.
    ///
    /// # Errors
    /// The available ring is broken.
    pub fn pop_many(&mut self, chains: &mut [Chain]) -> Result<usize, QueueError> {
        let broken = self.broken();
        let available = self.queue.iter(&self.mem).map_err(broken)?;
        let mut count = 0;
        // The slot comes first, so that no chain is taken that finds none.
        for (chain, descriptors) in chains.iter_mut().zip(available) {
            chain.fill(descriptors);
            count += 1;
        }
        Ok(count)
    }

    /// Whether the driver has made chains available that were not popped yet.
    ///
    /// # Errors
    /// The available ring is broken.
    pub fn has_available(&self) -> Result<bool, QueueError> {
        Ok(self.load_avail(AVAIL_INDEX)? != self.queue.next_avail())
    }

    /// Gives the chain that was popped last back to the available ring.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Puts a chain in the used ring, `written` bytes of it written from its first writable byte on.
    ///
    /// # Errors
    /// The used ring is broken, or `head` isn't a descriptor of the queue.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&self.mem, head, written).map_err(self.broken())
    }

    /// Puts several chains in the used ring so that the driver sees all of them or none (virtio 1.2 §5.1.6.4: the
    /// buffers of one packet). There must be no more than the queue has descriptors.
    ///
    /// # Errors
    /// As [`VirtQueue::push_used`].
    pub fn push_used_together(
        &mut self,
        chains: impl ExactSizeIterator<Item = (u16, u32)>,
    ) -> Result<(), QueueError> {
        let broken = self.broken();
        let (first, size, count) = (self.queue.next_used(), self.queue.size(), chains.len());
        for (position, (head, written)) in chains.enumerate() {
            if head >= size {
                return Err(broken(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let index = first.wrapping_add(position as u16);
            if position + 1 == count {
                // Writes the last element and then the index, with release ordering.
                self.queue.set_next_used(index);
                return self.push_used(head, written);
            }
            // struct virtq_used_elem (virtio 1.2 §2.7.8): id, then length, both little-endian.
            let element = (u64::from(written) << 32 | u64::from(head)).to_le();
            let at = USED_RING_HEADER + u64::from(index % size) * USED_ELEMENT;
            self.mem
                .write_obj(element, GuestAddress(self.queue.used_ring() + at))
                .map_err(virtio_queue::Error::GuestMemory)
                .map_err(&broken)?;
        }
        Ok(())
    }

    /// Interrupts if buffers were used since the last call and the driver wants to know.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let (before, used) = (self.signalled, self.queue.next_used());
        self.signalled = used;
        if before == used {
            return Ok(());
        }
        // The used entries must be visible before the driver's wish is read (virtio 1.2 §2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let at = AVAIL_RING_HEADER + 2 * u64::from(self.queue.size());
            let event = self.load_avail(at)?;
            // virtio 1.2 §2.7.10: whether the index passed `event` since the last time, modulo 2^16.
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            u32::from(self.load_avail(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used_buffers(self.index);
        }
        Ok(())
    }

    /// A field of the available ring, whose whole extent was checked to be memory when the queue was made.
    fn load_avail(&self, offset: u64) -> Result<u16, QueueError> {
        self.mem
            .load(GuestAddress(self.queue.avail_ring() + offset), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(virtio_queue::Error::GuestMemory)
            .map_err(self.broken())
    }

    /// Asks the driver not to notify while the queue is being served.
    ///
    /// # Errors
    /// The used ring is broken.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&self.mem).map_err(self.broken())
    }

    /// Asks the driver to notify; true if chains came meanwhile, which must be served first.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&self.mem).map_err(self.broken())
    }

    /// The driver broke the rules: DEVICE_NEEDS_RESET.
    pub fn set_needs_reset(&self) {
        self.interrupt.set_needs_reset();
    }
}

#[cfg(test)]
mod tests;
