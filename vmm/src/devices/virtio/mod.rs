//! Virtio 1.2 devices: what a device is to its transport, and what a transport gives to a device.
//!
//! | module | what it is |
//! |---|---|
//! | [`lifecycle`] | the state machine every transport shares: status, features, queue set-up, activation, reset |
//! | [`mmio`], [`pci`] | the transports: registers only |
//! | [`queue`], [`buffers`] | a running virtqueue, and guest buffers as I/O vectors (with `block`'s io_uring the only unsafe part of the data path) |
//! | [`worker`], [`polling`] | a device's thread, and how long it looks for work before it sleeps |
//! | [`balloon`], [`block`], [`console`], [`mem`], [`net`], [`pmem`], [`rng`], [`vsock`] | the devices |
//! | [`vhost`] | devices whose queues another process or the kernel serves |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use crate::memory::GuestMemory;
use crate::snapshot::{DeviceState, StateError};

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
pub mod lifecycle;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod polling;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
pub mod vhost;
pub mod vsock;
pub mod worker;

use queue::VirtQueue;

/// Device ids, virtio 1.2 §5.
pub mod device_type {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Memory balloon.
    pub const BALLOON: u32 = 5;
    /// Sockets.
    pub const VSOCK: u32 = 19;
    /// Memory that can be plugged.
    pub const MEM: u32 = 24;
    /// Persistent memory.
    pub const PMEM: u32 = 27;
}

/// `VIRTIO_F_INDIRECT_DESC`, virtio 1.2 §6.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;
/// What every device offers in addition to its own features.
pub const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// A virtio device as its transport sees it.
pub trait VirtioDevice: Send {
    /// One of [`device_type`].
    fn device_type(&self) -> u32;

    /// The largest size of each queue, powers of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// How many of the queues, from the first on, a driver uses that has agreed on `features`. The others need not be set
    /// up and are not part of the [`Activation`].
    fn queues_used(&self, _features: u64) -> usize {
        self.queue_max_sizes().len()
    }

    /// The device's own features; [`VirtioDevice::common_features`] come on top.
    fn features(&self) -> u64;

    /// Which of [`COMMON_FEATURES`] there are: all, unless it isn't this program that serves the queues.
    fn common_features(&self) -> u64 {
        COMMON_FEATURES
    }

    /// Reads the configuration space; what lies past its end reads as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Devices without writable fields ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Changes whenever the configuration space has changed in a way that a driver could read torn.
    fn config_generation(&self) -> u32 {
        0
    }

    /// The driver is ready: start serving the queues.
    ///
    /// # Errors
    /// The device can't run; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops serving: when this returns, nothing of the device touches guest memory any more, every [`VirtQueue`] of its
    /// activation has been dropped, and the device can be activated again.
    fn reset(&mut self);

    /// Stops serving for a pause: like [`VirtioDevice::reset`], and every chain that was taken from a queue has either been
    /// used or been given back ([`VirtQueue::undo_pop`]). The device goes on with another [`VirtioDevice::activate`], whose
    /// queues continue where the dropped ones were. A device whose `reset` forgets more than that does less here.
    fn pause(&mut self) {
        self.reset();
    }

    /// What a snapshot must know about the device beyond its configuration, transport and queues. Called while paused.
    ///
    /// # Errors
    /// The device can't be part of a snapshot, which is so for every device that doesn't say otherwise.
    fn save(&self) -> Result<DeviceState, StateError> {
        Err(StateError::new(format!("a virtio device of type {} cannot be saved", self.device_type())))
    }

    /// Brings a device that was just made into a saved state; `activate` follows if the saved device was active.
    ///
    /// # Errors
    /// The state is not one of this device, or its backend is another one now.
    fn restore(&mut self, _state: &DeviceState) -> Result<(), StateError> {
        Err(StateError::new(format!("a virtio device of type {} cannot be restored", self.device_type())))
    }

    /// Whether a driver must enable every queue but the first that it could use. Where it need not, those that it left out
    /// are missing in the activation.
    fn needs_all_queues(&self) -> bool {
        true
    }

    /// Whether the device serves its queues in [`VirtioDevice::notify`], on the vCPU that notified, rather than in a
    /// thread that waits for the queue's eventfd. Such a device must bound the work of one notification.
    fn serves_inline(&self) -> bool {
        false
    }

    /// A queue was notified; called only while active, and only if [`VirtioDevice::serves_inline`].
    fn notify(&mut self, _queue: u16) {}
}

/// What a device is given to run with.
pub struct Activation {
    /// The guest's memory.
    pub mem: GuestMemory,
    /// The features that driver and device agreed on.
    pub features: u64,
    /// The queues in order, each valid, with its notifier and its way to interrupt.
    pub queues: Vec<VirtQueue>,
    /// For configuration changes and DEVICE_NEEDS_RESET.
    pub interrupt: Arc<Interrupt>,
}

/// How a transport interrupts the guest.
pub trait InterruptLine: Send + Sync {
    /// Buffers of this queue were used.
    fn used_buffers(&self, queue: u16);
    /// The configuration space or the device status changed.
    fn config_changed(&self);
    /// What to write to instead of [`InterruptLine::used_buffers`] of this queue, if there is such a thing. It stays so as long
    /// as the driver leaves the queue's interrupt as it is.
    fn direct(&self, _queue: u16) -> Option<Arc<EventFd>> {
        None
    }
}

/// A device's way to its driver: interrupts, and the one bit of the device status that a device sets by itself.
pub struct Interrupt {
    line: Box<dyn InterruptLine>,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// Over a transport's line.
    pub fn new(line: Box<dyn InterruptLine>) -> Self {
        Self { line, needs_reset: AtomicBool::new(false) }
    }

    /// Buffers of this queue were used and the driver wants to know.
    pub fn used_buffers(&self, queue: u16) {
        self.line.used_buffers(queue);
    }

    /// An eventfd to write to instead of [`Interrupt::used_buffers`] of this queue, for who isn't this process; none where more
    /// than a write is needed.
    pub fn direct(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.line.direct(queue)
    }

    /// The configuration space changed.
    pub fn config_changed(&self) {
        self.line.config_changed();
    }

    /// The driver broke the rules in a way the device can't answer: sets DEVICE_NEEDS_RESET and says so
    /// (virtio 1.2 §2.1.2).
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.line.config_changed();
    }

    /// Sets DEVICE_NEEDS_RESET as a snapshot has it; the driver was told before.
    pub fn restore_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The driver has reset the device.
    pub fn clear_needs_reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// Copies the part of `config` at `offset` to `data`, zeros past its end.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(from) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let n = from.len().min(data.len());
    data[..n].copy_from_slice(&from[..n]);
}
