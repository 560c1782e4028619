//! virtio-rng (virtio 1.2 §5.4): the kernel's random bytes, straight into the guest's buffers.
//!
//! Served on the vCPU that asks: requests are rare and small, and so the device costs neither a thread nor a file
//! descriptor. One request gets at most [`MAX_REQUEST_BYTES`], one notification at most [`MAX_REQUESTS`] requests, so
//! that no vCPU is away from its guest for long.

use super::queue::{Chain, QueueError, VirtQueue};
use super::{Activation, VirtioDevice, device_type};
use crate::devices::{DeviceError, report};

const QUEUE_SIZE: u16 = 256;
/// Most bytes that one request is answered with; a driver must be content with fewer than it asked for.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most requests served for one notification: every slot of the queue, twice.
pub const MAX_REQUESTS: usize = 2 * QUEUE_SIZE as usize;

/// A virtio entropy device.
#[derive(Default)]
pub struct Rng {
    running: Option<(VirtQueue, Chain)>,
}

impl Rng {
    /// As configured; there is nothing to open.
    ///
    /// # Errors
    /// None so far.
    pub const fn open(_config: &mote_vmm_api::Entropy) -> Result<Self, DeviceError> {
        Ok(Self { running: None })
    }
}

fn serve(queue: &mut VirtQueue, chain: &mut Chain) -> Result<(), QueueError> {
    for _ in 0..MAX_REQUESTS {
        if queue.pop(chain)? {
            // A faulty chain is answered with nothing.
            let written = if chain.faulty { 0 } else { chain.writable.fill_random(MAX_REQUEST_BYTES) };
            queue.push_used(chain.head, written as u32)?;
        } else if !queue.enable_notification()? {
            break;
        }
    }
    queue.signal()
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
        let chain = queue.new_chain();
        self.running = Some((queue, chain));
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn serves_inline(&self) -> bool {
        true
    }

    fn notify(&mut self, _queue: u16) {
        let Some((queue, chain)) = &mut self.running else { return };
        if let Err(error) = serve(queue, chain) {
            report("rng device", &error);
            queue.set_needs_reset();
            self.running = None;
        }
    }
}
