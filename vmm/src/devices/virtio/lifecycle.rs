//! The life of a virtio device, the same on every transport (virtio 1.2 §2.1, §3.1):
//!
//! ```text
//!          ACKNOWLEDGE      DRIVER        FEATURES_OK (if acceptable)     DRIVER_OK (if queues are valid)
//!  reset ────────────▶ ack ───────▶ driver ───────────────▶ features ──────────────────────▶ running
//!    ▲                                                                                         │
//!    └──────────────────────────── status := 0, from any state ◀───────────────────────────────┘
//! ```
//!
//! FAILED may be set at any time; DEVICE_NEEDS_RESET is the device's own. A write may set several bits at once: each is
//! taken in order, and a bit whose turn it isn't is ignored. Bits are never cleared but by a reset.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Progress, VirtQueue};
use super::{Activation, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};
use crate::devices::{DeviceError, report};
use crate::memory::GuestMemory;
use crate::seccomp;
use crate::snapshot::{DeviceState, StateError};

/// Bits of the device status field (virtio 1.2 §2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver runs.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device can't go on.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// The status after the driver wrote `written` (not 0) over `current`: each new bit is taken if its predecessor is set.
/// `features_ok` says whether the features the driver wants are acceptable.
pub fn next_status(current: u8, written: u8, features_ok: bool) -> u8 {
    let mut status = current | (written & (status::ACKNOWLEDGE | status::FAILED));
    if status & status::FAILED != 0 {
        return status;
    }
    for (bit, before, allowed) in [
        (status::DRIVER, status::ACKNOWLEDGE, true),
        (status::FEATURES_OK, status::DRIVER, features_ok),
        (status::DRIVER_OK, status::FEATURES_OK, true),
    ] {
        if written & bit != 0 && status & before != 0 && allowed {
            status |= bit;
        }
    }
    status
}

/// What the driver has said about one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Number of descriptors.
    pub size: u32,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Of the available ring.
    pub avail_ring: u64,
    /// Of the used ring.
    pub used_ring: u64,
}

impl QueueSetup {
    const fn new(max_size: u16) -> Self {
        Self { size: max_size as u32, ready: false, desc_table: 0, avail_ring: 0, used_ring: 0 }
    }
}

/// A [`Lifecycle`] in a snapshot; transports put it beside their own registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LifecycleState {
    device_type: u32,
    status: u8,
    driver_features: u64,
    needs_reset: bool,
    active: bool,
    queues: Vec<QueueState>,
    device: DeviceState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    setup: QueueSetup,
    next_avail: u16,
    next_used: u16,
}

/// See [`Lifecycle::in_set_up_thread`].
const PRESENT: &str = "the device is given back by the set-up thread, or the process ends";

/// A device and where it is in its life.
pub struct Lifecycle {
    /// Away only while the set-up thread has it, and then nobody else can get at this.
    device: Option<Box<dyn VirtioDevice>>,
    mem: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// One per queue, whether or not the device serves inline.
    notifiers: Vec<Arc<EventFd>>,
    status: u8,
    driver_features: u64,
    queues: Vec<QueueSetup>,
    progress: Vec<Arc<Progress>>,
    active: bool,
    paused: bool,
    /// The configuration's generation at the pause.
    paused_generation: u32,
}

impl Lifecycle {
    /// A device that was just reset.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, DeviceError> {
        let notifiers = if device.serves_inline() { 0 } else { device.queue_max_sizes().len() };
        let notifiers = (0..notifiers)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new).map_err(DeviceError::EventFd))
            .collect::<Result<_, _>>()?;
        let queues: Vec<_> = device.queue_max_sizes().iter().map(|&max| QueueSetup::new(max)).collect();
        let progress = queues.iter().map(|_| Arc::default()).collect();
        Ok(Self {
            device: Some(device),
            mem,
            interrupt,
            notifiers,
            status: 0,
            driver_features: 0,
            queues,
            progress,
            active: false,
            paused: false,
            paused_generation: 0,
        })
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_deref().expect(PRESENT)
    }

    /// The device, for writes to its configuration space.
    pub fn device_mut(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_deref_mut().expect(PRESENT)
    }

    /// An eventfd for each queue, in order; none if the device serves its queues inline.
    pub fn notifiers(&self) -> &[Arc<EventFd>] {
        &self.notifiers
    }

    /// Every feature on offer.
    pub fn offered_features(&self) -> u64 {
        self.device().features() | self.device().common_features()
    }

    /// Sets half of the features the driver wants; ignored once they are agreed on (virtio 1.2 §3.1.1).
    pub fn set_driver_features(&mut self, half: u32, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match half {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | (u64::from(value) << 32),
            // Feature bits past 63 don't exist here. Asking for one makes the set unacceptable only on real devices
            // that offer them; a zero written to higher halves is common, anything else is not ours.
            _ => {}
        }
    }

    /// What the driver has asked for so far.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The device status, with what the device itself has to say.
    pub fn status(&self) -> u8 {
        if self.interrupt.needs_reset() { self.status | status::NEEDS_RESET } else { self.status }
    }

    /// The driver writes the device status: 0 resets, DRIVER_OK activates.
    pub fn set_status(&mut self, written: u8) {
        if written == 0 {
            self.reset();
            return;
        }
        let wanted = self.driver_features;
        let features_ok = wanted & !self.offered_features() == 0 && wanted & F_VERSION_1 != 0;
        let before = self.status;
        self.status = next_status(before, written, features_ok);
        if self.status & !before & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    /// Whether the driver may change queues now: after the features, before running (virtio 1.2 §3.1.1).
    fn queues_settable(&self) -> bool {
        self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED) == status::FEATURES_OK
    }

    /// What was set for queue `index`, if there is one.
    pub fn queue(&self, index: u32) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    /// Changes queue `index` if there is one and it may be changed now.
    pub fn update_queue(&mut self, index: u32, change: impl FnOnce(&mut QueueSetup)) {
        if self.queues_settable()
            && let Some(queue) = usize::try_from(index).ok().and_then(|index| self.queues.get_mut(index))
        {
            change(queue);
        }
    }

    /// The driver notifies a queue through the transport (rather than by an ioeventfd).
    pub fn notify(&mut self, queue: u32) {
        if !self.active || self.interrupt.needs_reset() {
            return;
        }
        let Ok(index) = u16::try_from(queue) else { return };
        if usize::from(index) >= self.queues.len() {
            return;
        }
        if self.device().serves_inline() {
            self.device_mut().notify(index);
        } else if let Some(notifier) = self.notifiers.get(usize::from(index)) {
            // Fails only if the counter is full, and then the worker is being notified anyway.
            let _ = notifier.write(1);
        }
    }

    /// Stops the device, if it runs: until [`Lifecycle::resume`] nothing of it touches guest memory.
    pub fn pause(&mut self) {
        if !self.paused {
            self.paused = true;
            self.paused_generation = self.device().config_generation();
            if self.active {
                self.device_mut().pause();
            }
        }
    }

    /// Lets a paused device go on from where its queues were.
    pub fn resume(&mut self) {
        if !std::mem::take(&mut self.paused) || !self.active || self.interrupt.needs_reset() {
            return;
        }
        self.activate();
        // An interrupt may have been on its way, or have been withheld by the driver's wish at a moment that is lost:
        // one too many is harmless.
        for queue in 0..self.queues.len() {
            self.interrupt.used_buffers(queue as u16);
        }
        if self.device().config_generation() != self.paused_generation {
            self.interrupt.config_changed();
        }
    }

    /// What a snapshot must know; paused devices only.
    ///
    /// # Errors
    /// The device can't be part of a snapshot.
    pub fn save(&self) -> Result<LifecycleState, StateError> {
        let queues = self.queues.iter().zip(&self.progress).map(|(setup, progress)| {
            let (next_avail, next_used) = progress.get();
            QueueState { setup: *setup, next_avail, next_used }
        });
        Ok(LifecycleState {
            device_type: self.device().device_type(),
            status: self.status,
            driver_features: self.driver_features,
            needs_reset: self.interrupt.needs_reset(),
            active: self.active,
            queues: queues.collect(),
            device: self.device().save()?,
        })
    }

    /// Brings a device that was just made into the saved state, paused.
    ///
    /// # Errors
    /// It is the state of another device, of one with features that this one hasn't, or of queues that are not in memory.
    pub fn restore(&mut self, state: &LifecycleState) -> Result<(), StateError> {
        let (kind, queues) = (self.device().device_type(), self.queues.len());
        if (state.device_type, state.queues.len()) != (kind, queues) {
            return Err(StateError::new(format!(
                "it is a virtio device of type {kind} with {queues} queues, the snapshot has one of type {} with {}",
                state.device_type,
                state.queues.len()
            )));
        }
        self.device_mut().restore(&state.device)?;
        let missing = state.driver_features & !self.offered_features();
        if state.status & status::FEATURES_OK != 0 && missing != 0 {
            return Err(StateError::new(format!(
                "its driver uses features that are missing here: {missing:#x}"
            )));
        }
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.active = state.active;
        self.paused = true;
        self.paused_generation = self.device().config_generation();
        for ((queue, progress), saved) in self.queues.iter_mut().zip(&self.progress).zip(&state.queues) {
            *queue = saved.setup;
            progress.set(saved.next_avail, saved.next_used);
        }
        if state.needs_reset {
            self.interrupt.restore_needs_reset();
        }
        if self.active && !state.needs_reset && self.running_queues().is_none() {
            return Err(StateError::new("its queues are not in the guest's memory"));
        }
        Ok(())
    }

    fn activate(&mut self) {
        let activated = self.running_queues().ok_or(()).and_then(|queues| {
            let activation = Activation {
                mem: self.mem.clone(),
                features: self.driver_features,
                queues,
                interrupt: self.interrupt.clone(),
            };
            self.in_set_up_thread(|device| device.activate(activation)).map_err(|error| {
                report(&format!("virtio device of type {}", self.device().device_type()), &error);
            })
        });
        match activated {
            Ok(()) => self.active = true,
            Err(()) => self.interrupt.set_needs_reset(),
        }
    }

    /// Lets the set-up thread do what a vCPU may not: start and stop threads, open and close. Waits for it.
    fn in_set_up_thread<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
    ) -> T {
        let mut device = self.device.take().expect(PRESENT);
        let done = seccomp::set_up(move || {
            let result = work(device.as_mut());
            (device, result)
        });
        let Some((device, result)) = done else {
            // The thread ends only by a panic or with the process; without the device nothing here can go on.
            crate::log::error!("the set-up thread of the devices is gone");
            std::process::abort();
        };
        self.device = Some(device);
        result
    }

    /// The queues as the driver set them up; None unless every one of them that it uses is usable.
    fn running_queues(&self) -> Option<Vec<VirtQueue>> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let max_sizes = self.device().queue_max_sizes();
        let used = self.device().queues_used(self.driver_features);
        let mut running = Vec::with_capacity(used);
        for (index, (setup, max_size)) in self.queues.iter().zip(max_sizes).take(used).enumerate() {
            if !setup.ready && index > 0 && !self.device().needs_all_queues() {
                continue;
            }
            let mut queue = Queue::new(*max_size).ok()?;
            queue.try_set_size(u16::try_from(setup.size).ok()?).ok()?;
            queue.try_set_desc_table_address(GuestAddress(setup.desc_table)).ok()?;
            queue.try_set_avail_ring_address(GuestAddress(setup.avail_ring)).ok()?;
            queue.try_set_used_ring_address(GuestAddress(setup.used_ring)).ok()?;
            queue.set_event_idx(event_idx);
            queue.set_ready(setup.ready);
            if !queue.is_valid(&self.mem) {
                return None;
            }
            let notifier = self.notifiers.get(index).cloned();
            let index = u16::try_from(index).ok()?;
            let queue = VirtQueue::new(queue, self.mem.clone(), index, notifier, self.interrupt.clone());
            running.push(queue.continuing(self.progress[usize::from(index)].clone()));
        }
        Some(running)
    }

    fn reset(&mut self) {
        // Also a device whose activation failed may hold something.
        self.in_set_up_thread(|device| device.reset());
        self.active = false;
        self.interrupt.clear_needs_reset();
        self.status = 0;
        self.driver_features = 0;
        self.queues = self.device().queue_max_sizes().iter().map(|&max| QueueSetup::new(max)).collect();
        // After the device's queues are gone: they have left their last positions here.
        self.progress.iter().for_each(|progress| progress.set(0, 0));
    }
}

impl Drop for Lifecycle {
    fn drop(&mut self) {
        self.in_set_up_thread(|device| device.reset());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
    use super::*;

    #[test]
    fn status_bits_are_taken_in_order_one_by_one_or_together() {
        let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        for (current, written, features_ok, want) in [
            (0, ACKNOWLEDGE, false, ACKNOWLEDGE),
            (0, ACKNOWLEDGE | DRIVER, false, ACKNOWLEDGE | DRIVER),
            (0, all, true, all),
            // A bit whose turn it isn't.
            (0, DRIVER, true, 0),
            (0, DRIVER_OK, true, 0),
            (ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK, true, ACKNOWLEDGE),
            (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK, true, ACKNOWLEDGE | DRIVER),
            // Features that the device doesn't take, also together with what comes after.
            (ACKNOWLEDGE | DRIVER, all, false, ACKNOWLEDGE | DRIVER),
            // Bits are not cleared.
            (all, ACKNOWLEDGE, true, all),
            (all, FAILED, true, all | FAILED),
            // Nothing after failure.
            (FAILED, all, true, FAILED | ACKNOWLEDGE),
            // NEEDS_RESET and unknown bits are not the driver's.
            (0, status::NEEDS_RESET | 0x30, true, 0),
        ] {
            assert_eq!(
                next_status(current, written, features_ok),
                want,
                "{current:#x} {written:#x} {features_ok}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_the_status_stays_one_that_can_be_reached(
            writes in proptest::collection::vec((1u8.., any::<bool>()), 0..16),
        ) {
            let mut status = 0;
            let mut features_were_ok = false;
            for (written, features_ok) in writes {
                let before = status;
                status = next_status(before, written, features_ok);
                features_were_ok |= features_ok;
                prop_assert_eq!(status & before, before);
                prop_assert_eq!(status & !(written | before), 0);
                for (bit, needs) in [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)] {
                    prop_assert!(status & bit == 0 || status & needs != 0);
                }
                prop_assert!(status & FEATURES_OK == 0 || features_were_ok);
                prop_assert_eq!(status & status::NEEDS_RESET, 0);
            }
        }
    }
}
