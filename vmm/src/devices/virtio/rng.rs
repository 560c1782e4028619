//! virtio-rng (virtio 1.2 §5.4): the kernel's random bytes, straight into the guest's buffers.
//!
//! Without a rate limit it is served on the vCPU that asks: requests are rare and small, and so the device costs neither a
//! thread nor a file descriptor. With a limit, a thread of its own serves it and sleeps while nothing may pass. One
//! request gets at most [`MAX_REQUEST_BYTES`], one notification at most [`MAX_REQUESTS`] requests, so that no vCPU is away
//! from its guest for long.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::queue::{Chain, QueueError, VirtQueue};
use super::worker::{Poller, Worker};
use super::{Activation, VirtioDevice, device_type};
use crate::devices::{DeviceError, report};
use crate::metrics::{self, EntropyMetrics};
use crate::rate_limiter::RateLimiter;
use crate::snapshot::{DeviceState, StateError};

const QUEUE_SIZE: u16 = 256;
/// Most bytes that one request is answered with; a driver must be content with fewer than it asked for.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most requests served for one notification: every slot of the queue, twice.
pub const MAX_REQUESTS: usize = 2 * QUEUE_SIZE as usize;

/// A virtio entropy device.
pub struct Rng {
    /// Shared with the worker, so that a reset of the device does not fill the buckets.
    limiter: Arc<Mutex<RateLimiter>>,
    limited: bool,
    metrics: Arc<EntropyMetrics>,
    serving: Serving,
}

/// How the device serves while it is active.
enum Serving {
    Nothing,
    Inline(Requests),
    Worker { _worker: Worker },
}

impl Rng {
    /// As configured.
    ///
    /// # Errors
    /// None so far.
    pub fn open(config: &mote_vmm_api::Entropy) -> Result<Self, DeviceError> {
        let limiter = RateLimiter::new(config.rate_limiter.as_ref(), Instant::now());
        let limited = !limiter.is_unlimited();
        let limiter = Arc::new(Mutex::new(limiter));
        Ok(Self { limiter, limited, metrics: metrics::device("entropy", None), serving: Serving::Nothing })
    }
}

/// The queue and what serving it needs.
struct Requests {
    queue: VirtQueue,
    chain: Chain,
    metrics: Arc<EntropyMetrics>,
}

impl Requests {
    /// Serves what is there; how long to wait if the limit lets no more pass.
    fn serve(&mut self, limiter: &mut RateLimiter) -> Result<Option<Duration>, QueueError> {
        // If the loop runs out there may be more.
        let mut wait = Some(Duration::ZERO);
        for _ in 0..MAX_REQUESTS {
            if !self.queue.pop(&mut self.chain)? {
                if self.queue.enable_notification()? {
                    continue;
                }
                wait = None;
                break;
            }
            // A faulty chain is answered with nothing.
            let room = if self.chain.faulty { 0 } else { self.chain.writable.bytes().min(MAX_REQUEST_BYTES) };
            if let Err(too_early) = limiter.consume(room as u64, 1, Instant::now()) {
                self.queue.undo_pop();
                self.metrics.entropy_rate_limiter_throttled.add_one();
                wait = Some(too_early);
                break;
            }
            let written = self.chain.writable.fill_random(room);
            self.metrics.entropy_event_count.add_one();
            self.metrics.entropy_bytes.add(written as u64);
            self.queue.push_used(self.chain.head, written as u32)?;
        }
        self.queue.signal()?;
        Ok(wait)
    }

    /// The worker of a limited device.
    fn run(&mut self, limiter: &Mutex<RateLimiter>, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let failed = |error: &dyn std::error::Error, queue: &VirtQueue| {
            report("rng device", error);
            queue.set_needs_reset();
        };
        if let Err(error) = poller.watch_stop(stop) {
            failed(&error, &self.queue);
        }
        while !poller.stopped() {
            let wait = match self.serve(&mut limiter.lock().unwrap_or_else(PoisonError::into_inner)) {
                Ok(wait) => wait,
                Err(error) => {
                    failed(&error, &self.queue);
                    return poller.wait_for_stop();
                }
            };
            if let Err(error) = poller.wait_for(wait, |_, _| {}) {
                return failed(&error, &self.queue);
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        device_type::RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "rng", given });
        };
        let mut requests = Requests { chain: queue.new_chain(), queue, metrics: self.metrics.clone() };
        if !self.limited {
            self.serving = Serving::Inline(requests);
            return Ok(());
        }
        let mut poller =
            Poller::new(&[(requests.queue.notifier_fd(), EventSet::IN)]).map_err(DeviceError::EventFd)?;
        let limiter = self.limiter.clone();
        let worker = Worker::spawn("rng", move |stop| requests.run(&limiter, &mut poller, stop))?;
        self.serving = Serving::Worker { _worker: worker };
        Ok(())
    }

    fn reset(&mut self) {
        self.serving = Serving::Nothing;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::NONE)
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    fn serves_inline(&self) -> bool {
        !self.limited
    }

    fn notify(&mut self, _queue: u16) {
        let Serving::Inline(requests) = &mut self.serving else { return };
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = requests.serve(&mut limiter) {
            report("rng device", &error);
            requests.queue.set_needs_reset();
            self.serving = Serving::Nothing;
        }
    }
}

#[cfg(test)]
mod tests;
