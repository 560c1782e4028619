//! The worker's loop: both directions in turn, a short look for more, then sleep.
//!
//! ```text
//!            ┌────────── frames ──────────┐
//!            ▼                            │
//!   step: receive, transmit ──nothing──► look (PollWindow) ──nothing──► arm notifications, sleep ──► step
//! ```
//! While the worker steps or looks, the driver is asked not to notify.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::Service;
use super::control::{Limits, Shared};
use super::receive::{Received, Receiver};
use super::tap::Tap;
use super::transmit::{Transmitted, Transmitter};
use crate::devices::report;
use crate::devices::virtio::polling::PollWindow;
use crate::devices::virtio::queue::{QueueError, VirtQueue};
use crate::devices::virtio::worker::Poller;

/// Steps of one direction before the other, and a stop, get their turn.
const BUDGET: usize = 256;
/// How long frames may be served before events (a stop, an edge of the tap) are looked at.
const EVENTS_EVERY: Duration = Duration::from_micros(20);
/// A batch so small that the answer to it may already be on the tap: the host's own stack answers within the write.
const ANSWERED_AT_ONCE: usize = 4;
/// Looks at the rings between two looks at the tap.
const RING_LOOKS: u32 = 16;
/// A look takes well under a microsecond, unless the host's scheduler took the processor away meanwhile.
const DISTURBED: Duration = Duration::from_micros(200);

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

/// What each direction waits for.
#[derive(Debug, Clone, Copy)]
struct Waits {
    /// The tap may have frames.
    tap_readable: bool,
    /// The metadata service has frames.
    service_ready: bool,
    /// The receive queue needs buffers before anything can be received.
    starved: bool,
    /// The transmit queue may have frames.
    transmit_pending: bool,
    /// The tap took no more.
    blocked: bool,
    /// Until when the rate limit lets nothing pass.
    receive_limited: Option<Instant>,
    /// The same for the other direction.
    transmit_limited: Option<Instant>,
}

impl Waits {
    const START: Self = Self {
        tap_readable: true,
        service_ready: false,
        starved: false,
        transmit_pending: true,
        blocked: false,
        receive_limited: None,
        transmit_limited: None,
    };

    const fn can_receive(&self) -> bool {
        (self.tap_readable || self.service_ready) && !self.starved && self.receive_limited.is_none()
    }

    const fn can_transmit(&self) -> bool {
        self.transmit_pending && !self.blocked && self.transmit_limited.is_none()
    }

    const fn can_go_on(&self) -> bool {
        self.can_receive() || self.can_transmit()
    }

    /// How long until the first limit ends.
    fn limit(&self, now: Instant) -> Option<Duration> {
        let ends = self.receive_limited.into_iter().chain(self.transmit_limited).min();
        ends.map(|end| end.saturating_duration_since(now))
    }

    fn end_limits(&mut self, now: Instant) {
        self.receive_limited = self.receive_limited.filter(|end| *end > now);
        self.transmit_limited = self.transmit_limited.filter(|end| *end > now);
    }

    fn wake(&mut self, token: u64, events: EventSet) {
        match token {
            RECEIVE_KICK => self.starved = false,
            TRANSMIT_KICK => self.transmit_pending = true,
            TAP => {
                self.tap_readable |= events.contains(EventSet::IN);
                self.blocked &= !events.contains(EventSet::OUT);
            }
            // The control's eventfd: another link state or other limits, so everything is tried again.
            _ => *self = Self::START,
        }
    }
}

/// Both directions of an interface, and what each waits for.
pub struct Server {
    receiver: Receiver,
    transmitter: Transmitter,
    shared: Arc<Shared>,
    service: Option<Service>,
    waits: Waits,
    window: PollWindow,
}

impl Server {
    /// Over the two queues; with `source`, only frames from that address leave the guest.
    pub fn new(
        receive: VirtQueue,
        transmit: VirtQueue,
        mergeable: bool,
        source: Option<[u8; 6]>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            receiver: Receiver::new(receive, mergeable, shared.metrics.clone()),
            transmitter: Transmitter::new(transmit, source, shared.metrics.clone()),
            shared,
            service: None,
            waits: Waits::START,
            window: PollWindow::default(),
        }
    }

    /// Hands frames to the metadata service's address to `service`.
    pub fn set_service(&mut self, service: Service) {
        self.service = Some(service);
    }

    /// Serves until `stop`.
    pub fn run(&mut self, tap: &mut Tap, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let served = poller.watch_stop(stop).map_err(ServeError::Wait).and_then(|()| self.serve(tap, poller));
        if let Err(error) = served {
            report("network device", &error);
            self.transmitter.queue().set_needs_reset();
            poller.wait_for_stop();
        }
    }

    fn serve(&mut self, tap: &mut Tap, poller: &mut Poller) -> Result<(), ServeError> {
        let mut events_at = Instant::now();
        while !poller.stopped() {
            self.step(tap)?;
            if self.waits.can_go_on() {
                let now = Instant::now();
                if now - events_at >= EVENTS_EVERY {
                    events_at = now;
                    self.take_events(poller)?;
                }
            } else if !self.look(poller)? && !self.arm()? {
                self.sleep(poller)?;
            }
        }
        Ok(())
    }

    /// Moves frames in both directions until something is missing or [`BUDGET`] is used up.
    fn step(&mut self, tap: &mut Tap) -> Result<(), ServeError> {
        let link_up = self.shared.link_up();
        let mut service =
            self.service.as_ref().map(|service| service.lock().unwrap_or_else(PoisonError::into_inner));
        let mut service = service.as_deref_mut();
        let mut none = Limits::default();
        let mut limits = self.shared.limited().then(|| self.shared.limits());
        let Limits { receive, transmit } = limits.as_deref_mut().unwrap_or(&mut none);
        let waits = &mut self.waits;
        if waits.can_transmit() {
            match self.transmitter.serve(tap, service.as_deref_mut(), link_up, transmit, BUDGET)? {
                Transmitted::Empty => waits.transmit_pending = false,
                Transmitted::Blocked => waits.blocked = true,
                Transmitted::Limited(wait) => {
                    self.shared.metrics.tx_rate_limiter_throttled.add_one();
                    waits.transmit_limited = Some(Instant::now() + wait);
                }
                Transmitted::Budget => {}
            }
            waits.tap_readable |= (1..=ANSWERED_AT_ONCE).contains(&self.transmitter.taken());
        }
        if let Some(service) = &mut service {
            service.poll_if_due(Instant::now());
            waits.service_ready = service.has_frames();
        }
        if waits.can_receive() {
            match self.receiver.serve(tap, service.as_deref_mut(), link_up, receive, BUDGET)? {
                Received::Empty => waits.tap_readable = false,
                Received::NoBuffers => {
                    self.shared.metrics.no_rx_avail_buffer.add_one();
                    waits.starved = true;
                }
                Received::Limited(wait) => {
                    self.shared.metrics.rx_rate_limiter_throttled.add_one();
                    waits.receive_limited = Some(Instant::now() + wait);
                }
                Received::Budget => {}
            }
            waits.service_ready = service.is_some_and(|service| service.has_frames());
        }
        Ok(())
    }

    fn take_events(&mut self, poller: &mut Poller) -> Result<(), ServeError> {
        let waits = &mut self.waits;
        poller.wait(false, |token, events| waits.wake(token, events)).map_err(ServeError::Wait)?;
        Ok(())
    }

    /// Looks at the rings: true if there is something to do.
    fn look_at_rings(&mut self) -> Result<bool, ServeError> {
        let waits = &mut self.waits;
        if !waits.transmit_pending && self.transmitter.has_frames()? {
            waits.transmit_pending = true;
        }
        if waits.starved && self.receiver.has_buffers()? {
            waits.starved = false;
        }
        Ok(waits.can_go_on())
    }

    /// Looks for work for as long as the window says; true if there is some.
    fn look(&mut self, poller: &mut Poller) -> Result<bool, ServeError> {
        let window = self.window.get();
        if window.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        let mut before = start;
        loop {
            for _ in 0..RING_LOOKS {
                if self.look_at_rings()? {
                    self.window.found();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            self.take_events(poller)?;
            let now = Instant::now();
            self.waits.end_limits(now);
            if self.waits.can_go_on() || poller.stopped() {
                self.window.found();
                return Ok(true);
            }
            if now - before > DISTURBED {
                self.window.disturbed();
                return Ok(false);
            }
            if now - start >= window {
                return Ok(false);
            }
            before = now;
        }
    }

    /// Asks the driver to notify of what is waited for; true if it has come meanwhile.
    fn arm(&mut self) -> Result<bool, ServeError> {
        let waits = &mut self.waits;
        if !waits.transmit_pending && self.transmitter.arm()? {
            waits.transmit_pending = true;
        }
        if waits.starved && self.receiver.arm()? {
            waits.starved = false;
        }
        Ok(waits.can_go_on())
    }

    fn sleep(&mut self, poller: &mut Poller) -> Result<(), ServeError> {
        let start = Instant::now();
        let due = self
            .service
            .as_ref()
            .and_then(|service| service.lock().unwrap_or_else(PoisonError::into_inner).delay(start));
        let waits = &mut self.waits;
        let limit = waits.limit(start).into_iter().chain(due).min();
        poller.wait_for(limit, |token, events| waits.wake(token, events)).map_err(ServeError::Wait)?;
        let now = Instant::now();
        self.waits.end_limits(now);
        if limit.is_none() {
            self.window.slept(now - start);
        }
        Ok(())
    }
}
