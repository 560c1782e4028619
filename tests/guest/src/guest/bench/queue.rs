//! A split virtqueue of the guest's own (virtio 1.2 §2.7), for one thread that polls.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::format;
use alloc::string::String;
use core::sync::atomic::{Ordering, fence};

use crate::ensure;
use crate::virtio::{EVENT_IDX, Notifier, Window, register};

const VERSION_1: u64 = 1 << 32;
const NEXT: u16 = 1;
/// The device writes to it.
pub const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A queue whose descriptors are written once and offered again and again.
pub struct Queue {
    size: u16,
    descriptors: *mut u8,
    available: *mut u16,
    used: *mut u16,
    next: u16,
    seen: u16,
    /// The index up to which the device was told.
    told: u16,
    event_idx: bool,
    notify: Notifier,
    index: u16,
}

/// Brings a device to FEATURES_OK with `wanted` as far as it is offered; what was agreed on.
pub fn negotiate(window: &Window, wanted: u64) -> Result<u64, String> {
    window.set(register::STATUS, 0);
    window.set(register::STATUS, 1);
    window.set(register::STATUS, 3);
    let offered = window.features();
    let features = offered & (wanted | VERSION_1);
    for half in 0..2 {
        window.set(register::DRIVER_FEATURES_SELECT, half);
        window.set(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
    window.set(register::STATUS, 0xb);
    ensure!(window.get(register::STATUS) == 0xb, "features {features:#x} of {offered:#x} were refused");
    Ok(features)
}

impl Queue {
    /// Sets queue `index` up with at most `size` descriptors.
    pub fn new(window: &Window, index: u16, size: u16, features: u64) -> Result<Self, String> {
        window.set(register::QUEUE_SELECT, index.into());
        let max = window.get(register::QUEUE_SIZE_MAX);
        ensure!(max > 0, "there is no queue {index}");
        let size = size.min(u16::try_from(max).unwrap_or(u16::MAX));
        let pages = |bytes: usize| -> Result<*mut u8, String> {
            let layout = Layout::from_size_align(bytes, 4096).map_err(|_| "layout")?;
            // SAFETY: the layout isn't empty. The memory is never given back, so that the device may use it for ever.
            let memory = unsafe { alloc_zeroed(layout) };
            ensure!(!memory.is_null(), "out of memory");
            Ok(memory)
        };
        let descriptors = pages(16 * usize::from(size))?;
        let available = pages(6 + 2 * usize::from(size))?;
        let used = pages(6 + 8 * usize::from(size))?;
        window.set(register::QUEUE_SIZE, size.into());
        for (register, address) in [
            (register::QUEUE_DESCRIPTORS, descriptors),
            (register::QUEUE_DRIVER, available),
            (register::QUEUE_DEVICE, used),
        ] {
            window.set(register, address as u32);
            window.set(register + 4, (address as u64 >> 32) as u32);
        }
        window.set(register::QUEUE_READY, 1);
        let queue = Self {
            size,
            descriptors,
            available: available.cast(),
            used: used.cast(),
            next: 0,
            seen: 0,
            told: 0,
            event_idx: features & EVENT_IDX != 0,
            notify: window.notifier(index),
            index,
        };
        // SAFETY: the first field of the available ring.
        unsafe { queue.available.write_volatile(NO_INTERRUPT) };
        queue.want_no_interrupt();
        Ok(queue)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Writes a descriptor: what the device is given, and the descriptor that follows.
    pub fn describe(&mut self, at: u16, address: u64, bytes: u32, flags: u16, next: Option<u16>) {
        assert!(at < self.size, "descriptor {at}");
        let flags = flags | next.map_or(0, |_| NEXT);
        // SAFETY: within the table, which is aligned to a page and not referred to.
        unsafe {
            let descriptor = self.descriptors.add(16 * usize::from(at));
            descriptor.cast::<u64>().write_volatile(address);
            descriptor.add(8).cast::<u32>().write_volatile(bytes);
            descriptor.add(12).cast::<u16>().write_volatile(flags);
            descriptor.add(14).cast::<u16>().write_volatile(next.unwrap_or(0));
        }
    }

    /// Makes the chain that starts at `head` available. [`Queue::kick`] tells the device.
    pub fn offer(&mut self, head: u16) {
        let slot = 2 + usize::from(self.next % self.size);
        self.next = self.next.wrapping_add(1);
        // SAFETY: within the available ring; the entry is visible before the index.
        unsafe {
            self.available.add(slot).write_volatile(head);
            fence(Ordering::Release);
            self.available.add(1).write_volatile(self.next);
        }
    }

    /// Notifies the device if it wants to know of what was offered since the last time; whether it did.
    pub fn kick(&mut self) -> bool {
        // The index must be visible before the device's wish is read (virtio 1.2 §2.7.13.3.1).
        fence(Ordering::SeqCst);
        let before = core::mem::replace(&mut self.told, self.next);
        let wanted = if self.event_idx {
            // SAFETY: behind the used ring's elements.
            let event = unsafe { self.used.add(2 + 4 * usize::from(self.size)).read_volatile() };
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(before)
        } else {
            // SAFETY: the first field of the used ring.
            unsafe { self.used.read_volatile() & NO_NOTIFY == 0 }
        };
        if wanted {
            self.notify.notify(self.index);
        }
        wanted
    }

    /// The head of the next chain that the device is done with.
    pub fn take(&mut self) -> Option<u16> {
        self.take_written().map(|(head, _)| head)
    }

    /// The same with how many bytes the device has written.
    pub fn take_written(&mut self) -> Option<(u16, u32)> {
        // SAFETY: within the used ring; the index is read before the element.
        unsafe {
            if self.used.add(1).read_volatile() == self.seen {
                return None;
            }
            fence(Ordering::Acquire);
            let slot = 2 + 4 * usize::from(self.seen % self.size);
            self.seen = self.seen.wrapping_add(1);
            let head = self.used.add(slot).read_volatile();
            let written = self.used.add(slot + 2).cast::<u32>().read_volatile();
            self.want_no_interrupt();
            Some((head, written))
        }
    }

    /// Asks for an interrupt after the next chain.
    pub fn want_interrupt(&self) {
        // SAFETY: the first field of the available ring, and the one behind its elements.
        unsafe {
            self.available.write_volatile(0);
            self.available.add(2 + usize::from(self.size)).write_volatile(self.seen);
        }
    }

    /// With EVENT_IDX: the interrupt would come after 65535 more.
    fn want_no_interrupt(&self) {
        // SAFETY: behind the available ring's elements.
        unsafe { self.available.add(2 + usize::from(self.size)).write_volatile(self.seen.wrapping_sub(1)) };
    }
}

/// A message for `what` that didn't come.
pub fn timed_out(what: &str) -> String {
    format!("{what} timed out")
}
