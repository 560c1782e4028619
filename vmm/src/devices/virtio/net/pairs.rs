//! Several queue pairs (virtio 1.2 §5.1.2, §5.1.6.5.5): each has a queue of the tap, a thread of its own and, while the driver
//! doesn't use it, neither frames nor a part in the tap's choice. A control queue says how many are used.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_bindings::virtio_net as abi;

use super::server::ServeError;
use super::tap;
use crate::devices::report;
use crate::devices::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::devices::virtio::worker::Poller;

/// Chains of the control queue before a stop gets its turn.
const BUDGET: usize = 64;
/// Bytes of a command to set the number of pairs: class, command, number.
const COMMAND_BYTES: usize = 4;

/// Attaches a queue of a tap, or detaches it.
pub struct Switch {
    /// The queue's descriptor once more; missing in tests without a tap.
    pub fd: Option<OwnedFd>,
    /// Shared with the queue's [`Tap`](super::Tap): what isn't attached carries nothing.
    pub attached: Arc<AtomicBool>,
}

impl Switch {
    fn set(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Acquire) == attached {
            return Ok(());
        }
        // The other thread stops before, and starts after.
        self.attached.fetch_and(attached, Ordering::AcqRel);
        if let Some(fd) = &self.fd {
            tap::attach_queue(fd, attached)?;
        }
        self.attached.store(attached, Ordering::Release);
        Ok(())
    }
}

/// The pairs of an interface.
pub struct Pairs {
    /// One for each pair, the first of which is always attached; none for an interface with one pair.
    pub switches: Vec<Switch>,
    used: AtomicUsize,
}

impl Pairs {
    /// All of them are attached.
    pub fn new(switches: Vec<Switch>) -> Self {
        Self { switches, used: AtomicUsize::new(1) }
    }

    /// How many there are.
    pub fn max(&self) -> usize {
        self.switches.len().max(1)
    }

    /// How many the driver uses.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// The driver uses the first `count`.
    ///
    /// # Errors
    /// The tap's queues can't be attached or detached.
    pub fn set_used(&self, count: usize) -> io::Result<()> {
        self.used.store(count, Ordering::Release);
        self.switches.iter().enumerate().try_for_each(|(pair, switch)| switch.set(pair < count))
    }
}

/// The control queue's thread.
pub struct Control {
    queue: VirtQueue,
    chain: Chain,
    pairs: Arc<Pairs>,
    /// Tells the pairs' threads to look again.
    changed: Box<dyn Fn() + Send>,
    failed: bool,
}

impl Control {
    pub fn new(queue: VirtQueue, pairs: Arc<Pairs>, changed: Box<dyn Fn() + Send>) -> Self {
        Self { chain: queue.new_chain(), queue, pairs, changed, failed: false }
    }

    /// Serves until `stop`.
    pub fn run(&mut self, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let served = poller.watch_stop(stop).map_err(ServeError::Wait).and_then(|()| self.serve(poller));
        if let Err(error) = served {
            report("control queue of a network device", &error);
            self.queue.set_needs_reset();
            poller.wait_for_stop();
        }
    }

    fn serve(&mut self, poller: &mut Poller) -> Result<(), ServeError> {
        while !poller.stopped() {
            let more = self.batch()?;
            poller.wait(!more, |_, _| {}).map_err(ServeError::Wait)?;
        }
        Ok(())
    }

    /// Whether there may be more.
    fn batch(&mut self) -> Result<bool, QueueError> {
        for _ in 0..BUDGET {
            if !self.queue.pop(&mut self.chain)? {
                self.queue.signal()?;
                return self.queue.enable_notification();
            }
            let mut command = [0; COMMAND_BYTES];
            let whole = self.chain.readable.read_at(0, &mut command) == COMMAND_BYTES && !self.chain.faulty;
            let acknowledge =
                if whole && self.carry_out(command) { abi::VIRTIO_NET_OK } else { abi::VIRTIO_NET_ERR };
            let written = self.chain.writable.write_at(0, &[acknowledge as u8]);
            self.queue.push_used(self.chain.head, written as u32)?;
        }
        self.queue.signal()?;
        Ok(true)
    }

    fn carry_out(&mut self, [class, command, low, high]: [u8; COMMAND_BYTES]) -> bool {
        if u32::from(class) != abi::VIRTIO_NET_CTRL_MQ
            || u32::from(command) != abi::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
        {
            return false;
        }
        let count = usize::from(u16::from_le_bytes([low, high]));
        if count == 0 || count > self.pairs.max() {
            return false;
        }
        let set = self.pairs.set_used(count);
        (self.changed)();
        if let Err(error) = &set
            && !std::mem::replace(&mut self.failed, true)
        {
            report("cannot attach or detach a queue of a tap (told once)", error);
        }
        set.is_ok()
    }
}
