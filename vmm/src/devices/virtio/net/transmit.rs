//! Guest → tap.

use std::io;

use super::server::ServeError;
use super::{HEADER_BYTES, MAX_FRAME, Tap};
use crate::devices::virtio::queue::{Chain, VirtQueue};

/// Why [`Transmitter::serve`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmitted {
    /// The queue is empty and the driver will notify.
    Empty,
    /// The tap takes no more for now; it will become writable.
    Blocked,
    /// As many frames as asked for; there may be more.
    Budget,
}

/// The transmit queue.
pub struct Transmitter {
    queue: VirtQueue,
    chain: Chain,
}

impl Transmitter {
    /// Over `queue`.
    pub fn new(queue: VirtQueue) -> Self {
        Self { chain: queue.new_chain(), queue }
    }

    /// For DEVICE_NEEDS_RESET.
    pub const fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Sends up to `budget` frames and interrupts as needed.
    pub fn serve(&mut self, tap: &Tap, budget: usize) -> Result<Transmitted, ServeError> {
        self.queue.disable_notification()?;
        let transmitted = self.send_frames(tap, budget);
        self.queue.signal()?;
        transmitted
    }

    fn send_frames(&mut self, tap: &Tap, budget: usize) -> Result<Transmitted, ServeError> {
        for _ in 0..budget {
            if !self.queue.pop(&mut self.chain)? {
                if self.queue.enable_notification()? {
                    continue;
                }
                return Ok(Transmitted::Empty);
            }
            if self.chain.faulty {
                return Err(ServeError::FaultyChain { direction: "transmit" });
            }
            if (HEADER_BYTES..=MAX_FRAME).contains(&self.chain.readable.bytes())
                && let Err(error) = tap.send(&self.chain.readable)
                && error.kind() == io::ErrorKind::WouldBlock
            {
                self.queue.undo_pop();
                return Ok(Transmitted::Blocked);
            }
            // What the tap refuses otherwise (a nonsensical header, a tap that is down or gone) is lost on the wire.
            self.queue.push_used(self.chain.head, 0)?;
        }
        Ok(Transmitted::Budget)
    }
}
