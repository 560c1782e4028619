//! The worker's loop: both directions in turn, asleep when neither can go on.

use std::os::fd::BorrowedFd;

use vmm_sys_util::epoll::EventSet;

use super::Tap;
use super::receive::{Received, Receiver};
use super::transmit::{Transmitted, Transmitter};
use crate::devices::report;
use crate::devices::virtio::queue::{QueueError, VirtQueue};
use crate::devices::virtio::worker::Poller;

/// Steps of one direction before the other, and a stop, get their turn.
const BUDGET: usize = 256;

/// Positions in the worker's [`Poller`].
const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const TAP: u64 = 2;

/// Why the worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A ring is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// Not answerable: there is no status in a frame.
    #[error("faulty descriptor chain in the {direction} queue")]
    FaultyChain {
        /// Which queue.
        direction: &'static str,
    },
    /// epoll failed.
    #[error("wait for frames")]
    Wait(#[source] std::io::Error),
}

/// Both directions of an interface, and what each waits for.
pub struct Server {
    receiver: Receiver,
    transmitter: Transmitter,
    /// The tap may have frames.
    tap_readable: bool,
    /// The receive queue needs buffers before anything can be received.
    starved: bool,
    /// The transmit queue may have frames.
    transmit_pending: bool,
    /// The tap took no more.
    blocked: bool,
}

impl Server {
    /// Over the two queues.
    pub fn new(receive: VirtQueue, transmit: VirtQueue, mergeable: bool) -> Self {
        Self {
            receiver: Receiver::new(receive, mergeable),
            transmitter: Transmitter::new(transmit),
            tap_readable: true,
            starved: false,
            transmit_pending: true,
            blocked: false,
        }
    }

    /// Serves until `stop`.
    pub fn run(&mut self, tap: &Tap, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let served = poller.watch_stop(stop).map_err(ServeError::Wait).and_then(|()| self.serve(tap, poller));
        if let Err(error) = served {
            report("network device", &error);
            self.transmitter.queue().set_needs_reset();
            poller.wait_for_stop();
        }
    }

    fn serve(&mut self, tap: &Tap, poller: &mut Poller) -> Result<(), ServeError> {
        while !poller.stopped() {
            self.step(tap)?;
            let busy = self.can_receive() || self.can_transmit();
            poller.wait(!busy, |token, events| self.wake(token, events)).map_err(ServeError::Wait)?;
        }
        Ok(())
    }

    const fn can_receive(&self) -> bool {
        self.tap_readable && !self.starved
    }

    const fn can_transmit(&self) -> bool {
        self.transmit_pending && !self.blocked
    }

    /// Moves frames in both directions until something is missing or [`BUDGET`] is used up.
    pub fn step(&mut self, tap: &Tap) -> Result<(), ServeError> {
        if self.can_receive() {
            match self.receiver.serve(tap, BUDGET)? {
                Received::Empty => self.tap_readable = false,
                Received::NoBuffers => self.starved = true,
                Received::Budget => {}
            }
        }
        if self.can_transmit() {
            match self.transmitter.serve(tap, BUDGET)? {
                Transmitted::Empty => self.transmit_pending = false,
                Transmitted::Blocked => self.blocked = true,
                Transmitted::Budget => {}
            }
        }
        Ok(())
    }

    fn wake(&mut self, token: u64, events: EventSet) {
        match token {
            RECEIVE_KICK => self.starved = false,
            TRANSMIT_KICK => self.transmit_pending = true,
            TAP => {
                self.tap_readable |= events.contains(EventSet::IN);
                self.blocked &= !events.contains(EventSet::OUT);
            }
            _ => {}
        }
    }
}
