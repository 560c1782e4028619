//! Tap → guest.
//!
//! Chains are taken from the ring ahead of the frames and kept in a window of I/O vectors that is large enough for the
//! longest frame; a frame is then read straight into its first chains. A driver that offers less room than the longest
//! frame needs (small buffers without MRG_RXBUF, or few of them) is served by way of a buffer of ours, so that no frame
//! is ever cut off.

use std::collections::VecDeque;
use std::io;

use super::server::ServeError;
use super::{HEADER_BYTES, MAX_FRAME, Tap};
use crate::devices::report;
use crate::devices::virtio::buffers::{GuestBuffers, MAX_SEGMENTS};
use crate::devices::virtio::queue::{Chain, VirtQueue};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS_AT: usize = 10;

/// Why [`Receiver::serve`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// The tap is empty, or can't be read.
    Empty,
    /// The driver must supply buffers and will notify.
    NoBuffers,
    /// As many steps as asked for; there may be more.
    Budget,
}

/// A chain in the window.
struct Slot {
    head: u16,
    segments: usize,
    bytes: usize,
}

/// The receive queue.
pub struct Receiver {
    pub queue: VirtQueue,
    mergeable: bool,
    chain: Chain,
    window: GuestBuffers,
    slots: VecDeque<Slot>,
    /// Host memory for frames that don't fit into the window; made when first needed.
    bounce: Vec<u8>,
    /// The next chain doesn't fit into the window for want of segments.
    window_full: bool,
    /// Length of the frame in `bounce` that waits for buffers, or 0.
    waiting: usize,
}

impl Receiver {
    /// Over `queue`; `mergeable` if VIRTIO_NET_F_MRG_RXBUF was agreed on.
    pub fn new(queue: VirtQueue, mergeable: bool) -> Self {
        Self {
            chain: queue.new_chain(),
            window: queue.new_buffers(),
            queue,
            mergeable,
            slots: VecDeque::new(),
            bounce: Vec::new(),
            window_full: false,
            waiting: 0,
        }
    }

    /// Moves frames from the tap to the guest, in at most `budget` steps, and interrupts as needed.
    pub fn serve(&mut self, tap: &Tap, budget: usize) -> Result<Received, ServeError> {
        let received = self.move_frames(tap, budget);
        self.queue.signal()?;
        received
    }

    fn move_frames(&mut self, tap: &Tap, budget: usize) -> Result<Received, ServeError> {
        for _ in 0..budget {
            self.refill()?;
            if self.waiting > 0 {
                self.deliver_waiting()?;
            }
            if self.waiting > 0 || self.slots.is_empty() {
                // More buffers are needed; some may have come since they were last looked for.
                if self.queue.enable_notification()? {
                    continue;
                }
                return Ok(Received::NoBuffers);
            }
            let direct = self.window.bytes() >= MAX_FRAME;
            let read = if direct { tap.receive(&self.window) } else { self.receive_bounced(tap) };
            match read {
                Ok(0) => return Ok(Received::Empty),
                Ok(len) if direct => self.place(len)?,
                Ok(len) => {
                    self.waiting = len;
                    self.deliver_waiting()?;
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // Down or removed; the edge-triggered poll says when it is back.
                        report("read from a tap", &error);
                    }
                    return Ok(Received::Empty);
                }
            }
        }
        Ok(Received::Budget)
    }

    /// Takes chains from the ring until the window holds the longest frame (without MRG_RXBUF: one chain), or there are
    /// no more.
    fn refill(&mut self) -> Result<(), ServeError> {
        let enough = if self.mergeable { MAX_FRAME } else { 1 };
        for _ in 0..self.queue.size() {
            if self.window.bytes() >= enough || !self.queue.pop(&mut self.chain)? {
                break;
            }
            if self.chain.faulty {
                return Err(ServeError::FaultyChain { direction: "receive" });
            }
            let head = self.chain.head;
            let (segments, bytes) = (self.chain.writable.segments(), self.chain.writable.bytes());
            if bytes < HEADER_BYTES {
                // Can't even hold a header: back, with nothing in it.
                self.queue.push_used(head, 0)?;
            } else if segments + self.window.segments() > MAX_SEGMENTS {
                self.queue.undo_pop();
                self.window_full = true;
                break;
            } else {
                self.window.append(&mut self.chain.writable);
                self.slots.push_back(Slot { head, segments, bytes });
            }
        }
        Ok(())
    }

    fn receive_bounced(&mut self, tap: &Tap) -> io::Result<usize> {
        self.bounce.resize(MAX_FRAME, 0);
        tap.receive_bounced(&mut self.bounce)
    }

    /// Copies the waiting frame to the guest if the window holds it, and drops it if no window ever will.
    fn deliver_waiting(&mut self) -> Result<(), ServeError> {
        let len = self.waiting;
        if self.window.bytes() >= len {
            self.window.write_at(0, &self.bounce[..len]);
            self.waiting = 0;
            return self.place(len);
        }
        let every_chain_taken = self.slots.len() >= usize::from(self.queue.size());
        if self.window_full || every_chain_taken || (!self.mergeable && !self.slots.is_empty()) {
            self.waiting = 0;
        }
        Ok(())
    }

    /// The frame of `len` bytes at the start of the window is the guest's.
    fn place(&mut self, len: usize) -> Result<(), ServeError> {
        let (mut count, mut segments, mut room) = (0, 0, 0);
        for slot in &self.slots {
            count += 1;
            segments += slot.segments;
            room += slot.bytes;
            if room >= len {
                break;
            }
        }
        // A queue has far fewer than 2^16 chains.
        self.window.write_at(NUM_BUFFERS_AT, &(count as u16).to_le_bytes());
        self.window.drop_segments(segments);
        self.window_full = false;
        let mut left = len;
        let used = self.slots.drain(..count).map(|slot| {
            let written = slot.bytes.min(left);
            left -= written;
            (slot.head, written as u32)
        });
        self.queue.push_used_together(used)?;
        Ok(())
    }
}
