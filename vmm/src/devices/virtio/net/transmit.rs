//! Guest → tap.

use std::io;
use std::time::{Duration, Instant};

use super::server::ServeError;
use super::{ETHERNET_HEADER_BYTES, HEADER_BYTES, MAX_FRAME, Tap};
use crate::devices::virtio::queue::{Chain, VirtQueue};
use crate::rate_limiter::RateLimiter;

/// Virtio header and Ethernet header.
const HEADERS: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES;
/// Where the source address is.
const SOURCE_AT: std::ops::Range<usize> = HEADER_BYTES + 6..HEADER_BYTES + 12;

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
    chain: Chain,
    /// The one source address that frames may have.
    source: Option<[u8; 6]>,
    /// Frames taken from the ring by the last [`Transmitter::serve`].
    taken: usize,
}

impl Transmitter {
    /// Over `queue`; with `source`, frames from another source address are dropped.
    pub fn new(queue: VirtQueue, source: Option<[u8; 6]>) -> Self {
        Self { chain: queue.new_chain(), queue, source, taken: 0 }
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

    /// Sends up to `budget` frames (without a link: drops them) and interrupts as needed.
    pub fn serve(
        &mut self,
        tap: &mut Tap,
        link_up: bool,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Transmitted, ServeError> {
        self.queue.disable_notification()?;
        self.taken = 0;
        let transmitted = self.send_frames(tap, link_up, limiter, budget);
        self.queue.signal()?;
        transmitted
    }

    fn send_frames(
        &mut self,
        tap: &mut Tap,
        link_up: bool,
        limiter: &mut RateLimiter,
        budget: usize,
    ) -> Result<Transmitted, ServeError> {
        let limited = !limiter.is_unlimited();
        while self.taken < budget {
            if !self.queue.pop(&mut self.chain)? {
                return Ok(Transmitted::Empty);
            }
            if self.chain.faulty {
                return Err(ServeError::FaultyChain { direction: "transmit" });
            }
            let bytes = self.chain.readable.bytes();
            if link_up && (HEADER_BYTES..=MAX_FRAME).contains(&bytes) {
                let now = limited.then(Instant::now);
                let frame = (bytes - HEADER_BYTES) as u64;
                if let Some(wait) = now.map(|now| limiter.wait(frame, 1, now)).filter(|wait| !wait.is_zero())
                {
                    self.queue.undo_pop();
                    return Ok(Transmitted::Limited(wait));
                }
                if self.send(tap) == Sent::Blocked {
                    self.queue.undo_pop();
                    return Ok(Transmitted::Blocked);
                }
                if let Some(now) = now {
                    limiter.take(frame, 1, now);
                }
            }
            self.taken += 1;
            self.queue.push_used(self.chain.head, 0)?;
        }
        Ok(Transmitted::Budget)
    }

    /// Sends the frame in `chain`. What the tap refuses (a nonsensical header, a tap that is down or gone) is lost on
    /// the wire.
    fn send(&mut self, tap: &mut Tap) -> Sent {
        let frame = &mut self.chain.readable;
        let result = match self.source {
            None => tap.send(&[], frame),
            Some(source) => {
                // The headers are sent from a copy of ours: the guest could change its own after the check.
                let mut headers = [0; HEADERS];
                if frame.read_at(0, &mut headers) < HEADERS || headers[SOURCE_AT] != source {
                    return Sent::Gone;
                }
                frame.skip_front(HEADERS);
                tap.send(&headers, frame)
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
            _ => Sent::Gone,
        }
    }
}

/// What became of a frame.
#[derive(PartialEq, Eq)]
enum Sent {
    /// It is the driver's again.
    Gone,
    /// It is to be tried again.
    Blocked,
}
