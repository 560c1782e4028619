//! Tap → guest.
//!
//! Chains are taken from the ring ahead of the frames and kept in a window of I/O vectors; a frame is then read straight
//! into its first chains. Behind the window comes a spill buffer of ours, so that no frame is ever cut off: what of a
//! frame falls into it is copied to chains that are taken then. While frames are short, the window is, too: the kernel
//! looks at each vector of each read. After a frame that spilled it is large enough for the longest.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::server::ServeError;
use super::{HEADER_BYTES, MAX_FRAME, Tap};
use crate::devices::virtio::buffers::{GuestBuffers, MAX_SEGMENTS};
use crate::devices::virtio::queue::{Chain, VirtQueue};
use crate::metrics::NetMetrics;
use crate::mmds::Endpoint;
use crate::rate_limiter::RateLimiter;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS_AT: usize = 10;
/// Window while frames are short: a frame of the usual MTU with its headers.
const SHORT_WINDOW: usize = 2048;
/// Chains that are taken from the ring, and given back, together.
const BATCH: usize = 16;
/// Short frames in a row after which the window is short again.
const SHORT_FRAMES: u32 = 64;

/// Why [`Receiver::serve`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// The tap is empty, or can't be read.
    Empty,
    /// The driver must supply buffers. It does not notify before [`Receiver::arm`].
    NoBuffers,
    /// The rate limit lets nothing pass for this long.
    Limited(Duration),
    /// As many steps as asked for; there may be more.
    Budget,
}

/// A chain in the window.
struct Slot {
    head: u16,
    segments: usize,
    bytes: usize,
}

/// A frame whose end is in the spill buffer.
#[derive(Clone, Copy)]
struct Spilled {
    /// Its length with the header.
    len: usize,
    /// How much of it is in the window already.
    placed: usize,
}

/// The receive queue.
pub struct Receiver {
    queue: VirtQueue,
    mergeable: bool,
    /// Chains that were taken together, and which of them are not in the window yet.
    chains: Vec<Chain>,
    ahead: Range<usize>,
    /// What is the driver's again, to be told to it together.
    used: Vec<(u16, u32)>,
    window: GuestBuffers,
    slots: VecDeque<Slot>,
    /// Host memory behind the window.
    spill: Vec<u8>,
    waiting: Option<Spilled>,
    /// The next chain doesn't fit into the window for want of segments.
    window_full: bool,
    /// Bytes that the window should have.
    window_wanted: usize,
    /// Frames in a row that a short window holds.
    short_frames: u32,
    /// Frames for the guest, and their bytes, that are not counted yet.
    received: (u64, u64),
    metrics: Arc<NetMetrics>,
}

/// Chains that were taken ahead of their frames go back to the ring, for a queue that continues after a pause. A frame
/// that waits is lost, as on a wire.
impl Drop for Receiver {
    fn drop(&mut self) {
        for _ in 0..self.slots.len() + self.ahead.len() {
            self.queue.undo_pop();
        }
    }
}

impl Receiver {
    /// Over `queue`; `mergeable` if VIRTIO_NET_F_MRG_RXBUF was agreed on.
    pub fn new(queue: VirtQueue, mergeable: bool, metrics: Arc<NetMetrics>) -> Self {
        Self {
            chains: (0..BATCH).map(|_| queue.new_chain()).collect(),
            ahead: 0..0,
            used: Vec::with_capacity(2 * BATCH),
            window: queue.new_buffers(),
            queue,
            mergeable,
            slots: VecDeque::new(),
            spill: vec![0; MAX_FRAME],
            waiting: None,
            window_full: false,
            window_wanted: SHORT_WINDOW,
            short_frames: 0,
            received: (0, 0),
            metrics,
        }
    }

    /// Asks the driver to notify; true if there are buffers already.
    pub fn arm(&mut self) -> Result<bool, ServeError> {
        Ok(self.queue.enable_notification()?)
    }

    /// Whether the driver has made buffers available that are not in the window.
    pub fn has_buffers(&self) -> Result<bool, ServeError> {
        Ok(!self.ahead.is_empty() || self.queue.has_available()?)
    }

    /// Moves frames from the metadata service and the tap to the guest (without a link: to nowhere), in at most `budget` steps, and interrupts as
    /// needed.
    pub fn serve(
        &mut self,
        tap: &mut Tap,
        mut service: Option<&mut Endpoint>,
        link_up: bool,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Received, ServeError> {
        if !link_up {
            while service.as_deref_mut().is_some_and(|service| service.next_frame(Instant::now()).is_some()) {
            }
            return Ok(self.drop_frames(tap, budget));
        }
        self.queue.disable_notification()?;
        let received = self.move_frames(tap, service, limiter, budget);
        let (frames, bytes) = std::mem::take(&mut self.received);
        self.metrics.rx_packets_count.add(frames);
        self.metrics.rx_bytes_count.add(bytes);
        self.publish()?;
        self.queue.signal()?;
        received
    }

    /// Tells the driver of what is its own again.
    fn publish(&mut self) -> Result<(), ServeError> {
        Ok(self.queue.push_used_together(self.used.drain(..))?)
    }

    /// The next chain of the ring that is not in the window, by its number in `chains`.
    fn next_chain(&mut self) -> Result<Option<usize>, ServeError> {
        if self.ahead.is_empty() {
            self.ahead = 0..self.queue.pop_many(&mut self.chains)?;
        }
        Ok((!self.ahead.is_empty()).then_some(self.ahead.start))
    }

    fn drop_frames(&mut self, tap: &mut Tap, budget: usize) -> Received {
        self.waiting = None;
        for _ in 0..budget {
            match tap.discard() {
                Ok(0) | Err(_) => return Received::Empty,
                Ok(_) => {}
            }
        }
        Received::Budget
    }

    fn move_frames(
        &mut self,
        tap: &mut Tap,
        mut service: Option<&mut Endpoint>,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Received, ServeError> {
        let limited = !limiter.is_unlimited();
        for _ in 0..budget {
            self.refill()?;
            self.deliver_waiting()?;
            if self.waiting.is_some() || self.slots.is_empty() {
                return Ok(Received::NoBuffers);
            }
            let now = limited.then(Instant::now);
            // How long the frame is will be known when it is there: it may overdraw the account.
            if let Some(wait) = now.map(|now| limiter.wait(1, 1, now)).filter(|wait| !wait.is_zero()) {
                return Ok(Received::Limited(wait));
            }
            let frame = service.as_deref_mut().filter(|service| service.has_frames());
            if let Some(frame) = frame.and_then(|service| service.next_frame(Instant::now())) {
                if let Some(now) = now {
                    limiter.take(frame.len() as u64, 1, now);
                }
                let len = self.fill(&frame);
                self.received(len)?;
                continue;
            }
            match tap.receive(&mut self.window, &mut self.spill) {
                Ok(0) => return Ok(Received::Empty),
                Ok(len) => {
                    if let Some(now) = now {
                        limiter.take(len.saturating_sub(HEADER_BYTES) as u64, 1, now);
                    }
                    self.received(len)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.metrics.tap_read_fails.add_one();
                    }
                    return Ok(Received::Empty);
                }
            }
        }
        Ok(Received::Budget)
    }

    /// Puts an Ethernet frame and its header where one from the tap would be; their length.
    fn fill(&mut self, frame: &[u8]) -> usize {
        let frame = [&[0; HEADER_BYTES], frame].concat();
        let placed = self.window.write_at(0, &frame);
        let rest = &frame[placed..];
        // The service's frames are shorter than the longest of a tap.
        self.spill[..rest.len()].copy_from_slice(rest);
        frame.len()
    }

    /// A frame of `len` bytes was read into the window and perhaps the spill buffer.
    fn received(&mut self, len: usize) -> Result<(), ServeError> {
        if len <= SHORT_WINDOW {
            self.short_frames = self.short_frames.saturating_add(1);
            if self.short_frames == SHORT_FRAMES {
                self.window_wanted = SHORT_WINDOW;
            }
        } else {
            self.short_frames = 0;
        }
        if len <= self.window.bytes() {
            return self.place(len);
        }
        self.window_wanted = MAX_FRAME;
        // The kernel wrote no more than window and spill buffer hold.
        self.waiting = Some(Spilled { len, placed: self.window.bytes() });
        self.refill()?;
        self.deliver_waiting()
    }

    /// Takes chains from the ring until the window is as large as it should be (without MRG_RXBUF: holds one chain), or
    /// there are no more.
    fn refill(&mut self) -> Result<(), ServeError> {
        let enough = match self.waiting {
            _ if !self.mergeable => 1,
            Some(frame) => frame.len,
            None => self.window_wanted,
        };
        for _ in 0..self.queue.size() {
            if self.window.bytes() >= enough {
                break;
            }
            let Some(number) = self.next_chain()? else { break };
            let chain = &mut self.chains[number];
            if chain.faulty {
                return Err(ServeError::FaultyChain { direction: "receive" });
            }
            let head = chain.head;
            let (segments, bytes) = (chain.writable.segments(), chain.writable.bytes());
            if bytes < HEADER_BYTES {
                // Can't even hold a header: back, with nothing in it.
                self.used.push((head, 0));
            } else if segments + self.window.segments() >= MAX_SEGMENTS {
                // One vector of each read is the spill buffer.
                self.window_full = true;
                break;
            } else {
                self.window.append(&mut chain.writable);
                self.slots.push_back(Slot { head, segments, bytes });
            }
            self.ahead.start += 1;
        }
        Ok(())
    }

    /// Completes the waiting frame if the window holds it now, and drops it if no window ever will.
    fn deliver_waiting(&mut self) -> Result<(), ServeError> {
        let Some(Spilled { len, placed }) = self.waiting else { return Ok(()) };
        if self.window.bytes() >= len {
            self.window.write_at(placed, &self.spill[..len - placed]);
            self.waiting = None;
            return self.place(len);
        }
        let every_chain_taken = self.slots.len() >= usize::from(self.queue.size());
        if self.window_full || every_chain_taken || (!self.mergeable && !self.slots.is_empty()) {
            self.waiting = None;
            self.window_full = false;
        }
        Ok(())
    }

    /// The frame of `len` bytes at the start of the window is the guest's.
    fn place(&mut self, len: usize) -> Result<(), ServeError> {
        self.received.0 += 1;
        self.received.1 += len.saturating_sub(HEADER_BYTES) as u64;
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
        self.used.extend(self.slots.drain(..count).map(|slot| {
            let written = slot.bytes.min(left);
            left -= written;
            (slot.head, written as u32)
        }));
        // The buffers of one frame appear together (virtio 1.2 §5.1.6.4), and so do those of a batch.
        if self.used.len() >= BATCH { self.publish() } else { Ok(()) }
    }
}
