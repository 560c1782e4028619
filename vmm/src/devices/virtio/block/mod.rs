//! virtio-blk (virtio 1.2 §5.2) over a raw file or block device.
//!
//! One queue, served by one thread that is started when the driver activates the device. What it supports: read,
//! write, flush (cache type Writeback), GET_ID, discard and write-zeroes (as `fallocate`, if the drive is writable).
//! A file whose length is not a multiple of 512 bytes is offered without its last, partial sector, as Firecracker does.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mote_vmm_api::{CacheType, Drive, IoEngine};
use virtio_bindings::virtio_blk as abi;
use vmm_sys_util::epoll::EventSet;

use super::queue::{QueueError, VirtQueue};
use super::worker::{Poller, Worker};
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::{DeviceError, report};

mod file;
mod request;

pub use file::{BlockError, RawFile};
use request::{MAX_RANGES, Request};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Length of the id that GET_ID answers with.
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// Segments of data in one request: what a chain of [`QUEUE_SIZE`] holds beside header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors that one range of a discard or write-zeroes may name: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// After this long, used buffers are signalled although more requests are waiting.
const SIGNAL_AFTER: Duration = Duration::from_micros(50);

/// What the requests are served from, and the id of the drive.
struct Disk {
    file: RawFile,
    id: [u8; ID_BYTES],
    flush: bool,
}

/// A virtio block device.
pub struct Block {
    disk: Arc<Mutex<Disk>>,
    config: [u8; 60],
    features: u64,
    worker: Option<Worker>,
}

impl Block {
    /// Opens the drive's file, so that a drive that can't be opened is refused when it is configured.
    ///
    /// # Errors
    /// The file can't be opened as wanted, or is no disk.
    pub fn open(drive: &Drive) -> Result<Self, DeviceError> {
        let IoEngine::Sync = drive.io_engine;
        let file = RawFile::open(&drive.path_on_host, drive.is_read_only)?;
        Ok(Self::new(file, &drive.drive_id, drive.cache_type))
    }

    fn new(file: RawFile, drive_id: &str, cache_type: CacheType) -> Self {
        let mut id = [0; ID_BYTES];
        let n = drive_id.len().min(ID_BYTES);
        id[..n].copy_from_slice(&drive_id.as_bytes()[..n]);
        let flush = cache_type == CacheType::Writeback;
        let mut features = 1 << abi::VIRTIO_BLK_F_SEG_MAX;
        if flush {
            features |= 1 << abi::VIRTIO_BLK_F_FLUSH;
        }
        if file.is_read_only() {
            features |= 1 << abi::VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << abi::VIRTIO_BLK_F_DISCARD | 1 << abi::VIRTIO_BLK_F_WRITE_ZEROES;
        }
        let config = config_space(file.sectors());
        Self { disk: Arc::new(Mutex::new(Disk { file, id, flush })), config, features, worker: None }
    }
}

/// `struct virtio_blk_config`, virtio 1.2 §5.2.4.
fn config_space(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    config[0..8].copy_from_slice(&sectors.to_le_bytes());
    config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    config[36..40].copy_from_slice(&MAX_RANGE_SECTORS.to_le_bytes());
    config[40..44].copy_from_slice(&MAX_RANGES.to_le_bytes());
    // Discards are best aligned to 4 KiB, the block size of most file systems.
    config[44..48].copy_from_slice(&8u32.to_le_bytes());
    config[48..52].copy_from_slice(&MAX_RANGE_SECTORS.to_le_bytes());
    config[52..56].copy_from_slice(&MAX_RANGES.to_le_bytes());
    // Write-zeroes may unmap.
    config[56] = 1;
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "block", given });
        };
        let mut poller = Poller::new(&[(queue.notifier_fd(), EventSet::IN)]).map_err(DeviceError::EventFd)?;
        let request = Request::new(queue.new_chain(), queue.new_buffers());
        let disk = self.disk.clone();
        self.worker = Some(Worker::spawn("block", move |stop| {
            let disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
            let mut server = Server { queue, request };
            if let Err(error) = poller.watch_stop(stop).map_err(ServeError::Wait) {
                server.give_up(&error);
            } else if let Err(error) = server.run(&disk, &mut poller) {
                server.give_up(&error);
                poller.wait_for_stop();
            }
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Why a worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no room for its status")]
    Unanswerable,
    #[error("wait for requests")]
    Wait(#[source] std::io::Error),
}

/// The worker's loop over its queue.
struct Server {
    queue: VirtQueue,
    request: Request,
}

impl Server {
    fn give_up(&self, error: &ServeError) {
        report("block device", error);
        self.queue.set_needs_reset();
    }

    /// Serves until the worker is stopped.
    fn run(&mut self, disk: &Disk, poller: &mut Poller) -> Result<(), ServeError> {
        loop {
            self.serve_available(disk, poller)?;
            if poller.stopped() || !poller.wait(true, |_, _| {}).map_err(ServeError::Wait)? {
                return Ok(());
            }
        }
    }

    /// Serves until the queue is empty and the driver will notify, or the worker is stopped.
    fn serve_available(&mut self, disk: &Disk, poller: &mut Poller) -> Result<(), ServeError> {
        loop {
            self.queue.disable_notification()?;
            // When the oldest completion that wasn't signalled was made.
            let mut unsignalled: Option<Instant> = None;
            while self.queue.pop(&mut self.request.chain)? {
                let Ok(written) = self.request.serve(disk) else { return Err(ServeError::Unanswerable) };
                self.queue.push_used(self.request.chain.head, written)?;
                let since = unsignalled.get_or_insert_with(Instant::now);
                if since.elapsed() > SIGNAL_AFTER {
                    self.queue.signal()?;
                    unsignalled = None;
                    // A queue that never runs dry must not outlive a reset.
                    if !poller.wait(false, |_, _| {}).map_err(ServeError::Wait)? {
                        return Ok(());
                    }
                }
            }
            if unsignalled.is_some() {
                self.queue.signal()?;
            }
            // A driver that always adds one more must not outlive a reset, either.
            if !self.queue.enable_notification()?
                || !poller.wait(false, |_, _| {}).map_err(ServeError::Wait)?
            {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests;
