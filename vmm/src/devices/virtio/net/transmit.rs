//! Guest → tap.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::server::ServeError;
use super::{ETHERNET_HEADER_BYTES, HEADER_BYTES, MAX_FRAME, Tap};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::queue::{Chain, VirtQueue};
use crate::metrics::NetMetrics;
use crate::mmds::{Endpoint, PEEK_BYTES};
use crate::rate_limiter::RateLimiter;

/// Virtio header and Ethernet header.
const HEADERS: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES;
/// Where the source address is.
const SOURCE_AT: std::ops::Range<usize> = HEADER_BYTES + 6..HEADER_BYTES + 12;

/// Frames that are taken from the ring, and given back, together.
const BATCH: usize = 16;

/// Why [`Transmitter::serve`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmitted {
    /// The queue is empty. The driver does not notify before [`Transmitter::arm`].
    Empty,
    /// The tap takes no more for now; it will become writable.
    Blocked,
    /// The rate limit takes no more for this long.
    Limited(Duration),
    /// As many frames as asked for; there may be more.
    Budget,
}

/// The transmit queue.
pub struct Transmitter {
    queue: VirtQueue,
    /// Chains that are taken together; empty between two calls.
    chains: Vec<Chain>,
    /// Heads of those that are done with, to be told to the driver together.
    done: Vec<u16>,
    /// The one source address that frames may have.
    source: Option<[u8; 6]>,
    /// Frames taken from the ring by the last [`Transmitter::serve`].
    taken: usize,
    /// Frames that the tap has taken, and their bytes, that are not counted yet.
    sent: (u64, u64),
    metrics: Arc<NetMetrics>,
}

impl Transmitter {
    /// Over `queue`; with `source`, frames from another source address are dropped.
    pub fn new(queue: VirtQueue, source: Option<[u8; 6]>, metrics: Arc<NetMetrics>) -> Self {
        let chains = (0..BATCH).map(|_| queue.new_chain()).collect();
        Self { chains, done: Vec::with_capacity(BATCH), queue, source, taken: 0, sent: (0, 0), metrics }
    }

    /// For DEVICE_NEEDS_RESET.
    pub const fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Frames taken from the ring by the last [`Transmitter::serve`].
    pub const fn taken(&self) -> usize {
        self.taken
    }

    /// Whether the driver has made frames available.
    pub fn has_frames(&self) -> Result<bool, ServeError> {
        Ok(self.queue.has_available()?)
    }

    /// Asks the driver to notify; true if there are frames already.
    pub fn arm(&mut self) -> Result<bool, ServeError> {
        Ok(self.queue.enable_notification()?)
    }

    /// Sends up to `budget` frames (without a link: drops them) to the tap, or to `service` those that it wants, and
    /// interrupts as needed.
    pub fn serve(
        &mut self,
        tap: &mut Tap,
        service: Option<&mut Endpoint>,
        link_up: bool,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Transmitted, ServeError> {
        self.queue.disable_notification()?;
        self.taken = 0;
        let transmitted = self.send_frames(tap, service, link_up, limiter, budget);
        let (frames, bytes) = std::mem::take(&mut self.sent);
        self.metrics.tx_packets_count.add(frames);
        self.metrics.tx_bytes_count.add(bytes);
        self.queue.signal()?;
        transmitted
    }

    fn send_frames(
        &mut self,
        tap: &mut Tap,
        mut service: Option<&mut Endpoint>,
        link_up: bool,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Transmitted, ServeError> {
        while self.taken < budget {
            let count = self.queue.pop_many(&mut self.chains)?;
            let sent = self.send_batch(count, tap, service.as_deref_mut(), link_up, limiter);
            for _ in self.done.len()..count {
                self.queue.undo_pop();
            }
            self.taken += self.done.len();
            self.queue.push_used_together(self.done.drain(..).map(|head| (head, 0)))?;
            if let Some(ended) = sent? {
                return Ok(ended);
            }
            if count < BATCH && !self.queue.has_available()? {
                return Ok(Transmitted::Empty);
            }
        }
        Ok(Transmitted::Budget)
    }

    /// Sends the first `count` of the chains; why not all of them are done, if so.
    fn send_batch(
        &mut self,
        count: usize,
        tap: &mut Tap,
        mut service: Option<&mut Endpoint>,
        link_up: bool,
        limiter: &mut RateLimiter,
    ) -> Result<Option<Transmitted>, ServeError> {
        let limited = !limiter.is_unlimited();
        for chain in &mut self.chains[..count] {
            if chain.faulty {
                return Err(ServeError::FaultyChain { direction: "transmit" });
            }
            let bytes = chain.readable.bytes();
            let taken = |service: &mut Endpoint| take(&chain.readable, self.source, service);
            let sendable = link_up && (HEADER_BYTES..=MAX_FRAME).contains(&bytes);
            // Rate limits are the network's.
            if sendable && !service.as_deref_mut().is_some_and(taken) {
                let now = limited.then(Instant::now);
                let frame = (bytes - HEADER_BYTES) as u64;
                if let Some(wait) = now.map(|now| limiter.wait(frame, 1, now)).filter(|wait| !wait.is_zero())
                {
                    return Ok(Some(Transmitted::Limited(wait)));
                }
                match send(&mut chain.readable, self.source, tap) {
                    Sent::Blocked => return Ok(Some(Transmitted::Blocked)),
                    Sent::Gone => {
                        self.sent.0 += 1;
                        self.sent.1 += frame;
                    }
                    Sent::Refused => self.metrics.tap_write_fails.add_one(),
                    Sent::Spoofed => self.metrics.tx_spoofed_mac_count.add_one(),
                }
                if let Some(now) = now {
                    limiter.take(frame, 1, now);
                }
            }
            if !(HEADER_BYTES..=MAX_FRAME).contains(&bytes) {
                self.metrics.tx_malformed_frames.add_one();
            }
            self.done.push(chain.head);
        }
        Ok(None)
    }
}

/// Sends a frame. What the tap refuses (a nonsensical header, a tap that is down or gone) is lost on the wire.
fn send(frame: &mut GuestBuffers, source: Option<[u8; 6]>, tap: &mut Tap) -> Sent {
    let result = match source {
        None => tap.send(&[], frame),
        Some(source) => {
            // The headers are sent from a copy of ours: the guest could change its own after the check.
            let mut headers = [0; HEADERS];
            if frame.read_at(0, &mut headers) < HEADERS || headers[SOURCE_AT] != source {
                return Sent::Spoofed;
            }
            frame.skip_front(HEADERS);
            tap.send(&headers, frame)
        }
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
        Err(_) => Sent::Refused,
        Ok(_) => Sent::Gone,
    }
}

/// Hands a frame to the metadata service, if it is for it. As on the tap, a frame from a wrong source is lost.
fn take(frame: &GuestBuffers, source: Option<[u8; 6]>, service: &mut Endpoint) -> bool {
    let mut start = [0; HEADER_BYTES + PEEK_BYTES];
    let length = frame.read_at(0, &mut start);
    if !service.wants(start.get(HEADER_BYTES..length).unwrap_or(&[])) {
        return false;
    }
    let mut bytes = vec![0; frame.bytes() - HEADER_BYTES];
    let length = frame.read_at(HEADER_BYTES, &mut bytes);
    bytes.truncate(length);
    // The copy is what counts: the guest may have changed its own meanwhile.
    if source.is_none_or(|source| bytes.get(6..12) == Some(&source)) {
        service.receive(&bytes, Instant::now());
    }
    true
}

/// What became of a frame.
#[derive(PartialEq, Eq)]
enum Sent {
    /// It is on its way.
    Gone,
    /// The tap did not like it, and it is lost.
    Refused,
    /// It has another source than the guest may have, and is lost.
    Spoofed,
    /// It is to be tried again.
    Blocked,
}
