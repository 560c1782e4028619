//! What the host may change while the guest runs: the link's state and the rate limits.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mote_vmm_api as api;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::DeviceError;
use crate::devices::virtio::Interrupt;
use crate::metrics::{self, NetMetrics};
use crate::rate_limiter::RateLimiter;

/// The limits of both directions.
#[derive(Default)]
pub struct Limits {
    /// Tap → guest.
    pub receive: RateLimiter,
    /// Guest → tap.
    pub transmit: RateLimiter,
}

impl Limits {
    const fn are_any(&self) -> bool {
        !self.receive.is_unlimited() || !self.transmit.is_unlimited()
    }
}

/// What device, worker and the outside share of one interface.
pub struct Shared {
    link_up: AtomicBool,
    /// Number of changes of the configuration space.
    generation: AtomicU32,
    limits: Mutex<Limits>,
    /// Whether there are any.
    limited: AtomicBool,
    /// The way to a running driver that knows VIRTIO_NET_F_STATUS.
    interrupt: Mutex<Option<Arc<Interrupt>>>,
    /// What the interface counts.
    pub metrics: Arc<NetMetrics>,
    /// Tells the worker that something changed.
    pub wake: EventFd,
}

impl Shared {
    /// As configured.
    pub fn new(interface: &api::NetworkInterface) -> Result<Arc<Self>, DeviceError> {
        let now = Instant::now();
        let limits = Limits {
            receive: RateLimiter::new(interface.rx_rate_limiter.as_ref(), now),
            transmit: RateLimiter::new(interface.tx_rate_limiter.as_ref(), now),
        };
        Ok(Arc::new(Self {
            limited: AtomicBool::new(limits.are_any()),
            link_up: AtomicBool::new(interface.link_up),
            generation: AtomicU32::new(0),
            limits: Mutex::new(limits),
            interrupt: Mutex::new(None),
            metrics: metrics::device("net", Some(&interface.iface_id)),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?,
        }))
    }

    /// Whether the cable is plugged in.
    pub fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// Changes with the configuration space.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether there are limits: without, the threads of an interface need not wait for each other.
    pub fn limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// The limits; held while frames are served, so for less than a millisecond.
    pub fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whom to tell of a change of the link, or nobody.
    pub fn set_interrupt(&self, interrupt: Option<Arc<Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Lets the workers look at everything again.
    pub fn wake_worker(&self) {
        // Fails only if the counter is full, and then the worker is being woken anyway.
        let _ = self.wake.write(1);
    }
}

/// The outside's handle of an interface. Works whether or not the guest drives the device.
#[derive(Clone)]
pub struct NetControl(pub(super) Arc<Shared>);

impl NetControl {
    /// Plugs the cable in or pulls it: the guest is told (if its driver knows VIRTIO_NET_F_STATUS), and without a link
    /// frames of both directions are lost.
    pub fn set_link_up(&self, up: bool) {
        if self.0.link_up.swap(up, Ordering::Relaxed) == up {
            return;
        }
        self.0.generation.fetch_add(1, Ordering::Release);
        if let Some(interrupt) = &*self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config_changed();
        }
        self.0.wake_worker();
    }

    /// Replaces the buckets that are given, as Firecracker's PATCH does.
    pub fn update_limits(&self, receive: Option<&api::RateLimiter>, transmit: Option<&api::RateLimiter>) {
        let now = Instant::now();
        let mut limits = self.0.limits();
        if let Some(receive) = receive {
            limits.receive.update(receive, now);
        }
        if let Some(transmit) = transmit {
            limits.transmit.update(transmit, now);
        }
        self.0.limited.store(limits.are_any(), Ordering::Relaxed);
        drop(limits);
        self.0.wake_worker();
    }
}
