//! virtio-pmem (virtio 1.3 §5.19): a file in the guest's physical memory, beside its RAM.
//!
//! The guest reads and writes the file's pages themselves; the device's one queue is there for flushes, each of which ends
//! with `fdatasync` of the file. A thread, started when the driver activates the device, serves it: flushes that come
//! together are one, so that a guest gets no more of the disk's time by asking more often.
//!
//! The file's pages are not memory of the other devices: a descriptor that points there is as wrong as any other that
//! points to no RAM. So this process never touches them itself, and a file that is cut short while the guest uses it stops
//! that guest's processor and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mote_vmm_api as api;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Chain, QueueError, VirtQueue};
use super::worker::{Poller, Worker};
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::{DeviceError, report};
use crate::mapping::Mapping;
use crate::metrics::{self, PmemMetrics};
use crate::rate_limiter::RateLimiter;
use crate::snapshot::{DeviceState, StateError};

const QUEUE_SIZE: u16 = 256;
/// Address and size are multiples of this: what Linux wants of memory that it makes a device of.
pub const ALIGNMENT: u64 = 2 << 20;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`.
const OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`.
const EIO: u32 = 1;
/// Bytes of `struct virtio_pmem_req` and of `struct virtio_pmem_resp`: one number.
const NUMBER: usize = 4;

/// Why a persistent memory device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file can't be opened.
    #[error("cannot open {} {access}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What for.
        access: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not a file.
    #[error("{} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Nothing in it.
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),
    /// The file can't be mapped.
    #[error("cannot map {} ({bytes} bytes)", .path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The guest's physical addresses are used up.
    #[error("there are no physical addresses left for {bytes} bytes")]
    Addresses {
        /// How many are wanted.
        bytes: u64,
    },
}

/// A file that can be mapped.
pub struct PmemFile {
    file: File,
    path: PathBuf,
    bytes: u64,
    read_only: bool,
}

impl PmemFile {
    /// Opens the file.
    ///
    /// # Errors
    /// It can't be opened as wanted, or there is nothing in it.
    pub fn open(config: &api::Pmem) -> Result<Self, PmemError> {
        let path = config.path_on_host.clone();
        let access = if config.read_only { "read-only" } else { "for reading and writing" };
        // O_NONBLOCK: a FIFO must be refused, not waited for.
        let opened = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .and_then(|mut file| {
                let kind = file.metadata()?.file_type();
                let bytes = file.seek(SeekFrom::End(0))?;
                Ok((kind.is_file() || kind.is_block_device(), bytes, file))
            });
        let (mappable, bytes, file) =
            opened.map_err(|source| PmemError::Open { path: path.clone(), access, source })?;
        match bytes {
            _ if !mappable => Err(PmemError::Kind(path)),
            0 => Err(PmemError::Empty(path)),
            bytes => Ok(Self { file, path, bytes, read_only: config.read_only }),
        }
    }

    /// Bytes that the guest sees, if there are numbers for them.
    fn size(&self) -> Option<u64> {
        self.bytes.checked_next_multiple_of(ALIGNMENT)
    }

    /// Maps it.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(&self) -> Result<Mapping, PmemError> {
        let bytes = |bytes: u64| usize::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge.into());
        let size = self.size().ok_or_else(|| io::ErrorKind::FileTooLarge.into());
        size.and_then(bytes)
            .and_then(|size| Mapping::of_file(&self.file, bytes(self.bytes)?, size, self.read_only))
            .map_err(|source| PmemError::Map { path: self.path.clone(), bytes: self.bytes, source })
    }
}

/// What device, worker and API share.
struct Shared {
    name: String,
    file: File,
    file_bytes: u64,
    read_only: bool,
    limiter: Mutex<RateLimiter>,
    /// The limits have changed.
    wake: EventFd,
    /// A failed flush was logged.
    failed: AtomicBool,
    metrics: Arc<PmemMetrics>,
}

impl Shared {
    fn limiter(&self) -> MutexGuard<'_, RateLimiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the file to the disk; what to answer.
    fn flush(&self) -> u32 {
        if self.read_only {
            return OK;
        }
        let Err(error) = self.file.sync_data() else { return OK };
        self.metrics.event_fails.add_one();
        // A guest can repeat it as often as it likes.
        if !self.failed.swap(true, Ordering::Relaxed) {
            report(&format!("pmem {}: cannot flush its file (told once)", self.name), &error);
        }
        EIO
    }
}

/// The API's handle.
#[derive(Clone)]
pub struct PmemControl(Arc<Shared>);

impl PmemControl {
    /// Changes the limits.
    pub fn update(&self, patch: &api::PmemPatch) {
        if let Some(limits) = &patch.rate_limiter {
            self.0.limiter().update(limits, Instant::now());
            // Fails only if the counter is full, and then the worker is being woken anyway.
            let _ = self.0.wake.write(1);
        }
    }
}

/// Where the file is in the guest's memory; in snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    start: u64,
    size: u64,
}

/// A persistent memory device.
pub struct Pmem {
    place: Place,
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Pmem {
    /// A device for `file`, whose mapping the guest sees at `start`.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(config: &api::Pmem, file: PmemFile, start: u64) -> Result<Self, DeviceError> {
        let size = file.size().ok_or(PmemError::Addresses { bytes: file.bytes })?;
        let shared = Shared {
            name: config.id.clone(),
            file_bytes: file.bytes,
            read_only: file.read_only,
            file: file.file,
            limiter: Mutex::new(RateLimiter::new(config.rate_limiter.as_ref(), Instant::now())),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?,
            failed: AtomicBool::new(false),
            metrics: metrics::device("pmem", Some(&config.id)),
        };
        let shared = Arc::new(shared);
        Ok(Self { place: Place { start, size }, shared, worker: None })
    }

    /// The API's handle.
    pub fn control(&self) -> PmemControl {
        PmemControl(self.shared.clone())
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        device_type::PMEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    /// `struct virtio_pmem_config`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.place.start.to_le_bytes());
        config[8..].copy_from_slice(&self.place.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "pmem", given });
        };
        let fds = [(queue.notifier_fd(), EventSet::IN), (self.shared.wake.as_raw_fd(), EventSet::IN)];
        let mut poller = Poller::new(&fds).map_err(DeviceError::EventFd)?;
        let mut server = Server { chain: queue.new_chain(), queue, shared: self.shared.clone() };
        self.worker = Some(Worker::spawn("pmem", move |stop| server.run(&mut poller, stop))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.place)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Place = state.get()?;
        if saved == self.place {
            return Ok(());
        }
        Err(StateError::new(format!(
            "it has {} bytes at {:#x} here, and in the snapshot {} at {:#x}: its file has another size",
            self.place.size, self.place.start, saved.size, saved.start
        )))
    }
}

/// The queue and what serving it needs.
struct Server {
    queue: VirtQueue,
    chain: Chain,
    shared: Arc<Shared>,
}

/// Why the worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("wait for the driver")]
    Wait(#[source] io::Error),
}

/// What is to be done after a batch.
enum Next {
    /// Look again.
    Again,
    /// Wait for so long, or for the driver.
    Wait(Option<Duration>),
}

impl Server {
    fn run(&mut self, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let served = poller.watch_stop(stop).map_err(ServeError::Wait).and_then(|()| self.serve(poller));
        if let Err(error) = served {
            report(&format!("pmem {}", self.shared.name), &error);
            self.queue.set_needs_reset();
            poller.wait_for_stop();
        }
    }

    fn serve(&mut self, poller: &mut Poller) -> Result<(), ServeError> {
        while !poller.stopped() {
            let waited = match self.batch()? {
                Next::Again => poller.wait(false, |_, _| {}),
                Next::Wait(limit) => poller.wait_for(limit, |_, _| {}),
            };
            waited.map_err(ServeError::Wait)?;
        }
        Ok(())
    }

    /// Serves what is there with one flush.
    fn batch(&mut self) -> Result<Next, QueueError> {
        if !self.queue.has_available()? {
            return Ok(if self.queue.enable_notification()? { Next::Again } else { Next::Wait(None) });
        }
        let passed = self.shared.limiter().consume(self.shared.file_bytes, 1, Instant::now());
        if let Err(too_early) = passed {
            self.shared.metrics.rate_limiter_throttled_events.add_one();
            return Ok(Next::Wait(Some(too_early)));
        }
        self.shared.metrics.queue_event_count.add_one();
        let mut flushed = None;
        for _ in 0..self.queue.size() {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            let Chain { readable, writable, faulty, head, .. } = &self.chain;
            let mut request = [0; NUMBER];
            let whole = readable.read_at(0, &mut request) == NUMBER && !faulty;
            let answer = if whole && u32::from_le_bytes(request) == FLUSH {
                *flushed.get_or_insert_with(|| self.shared.flush())
            } else {
                self.shared.metrics.event_fails.add_one();
                EIO
            };
            let written = writable.write_at(0, &answer.to_le_bytes());
            self.queue.push_used(*head, written as u32)?;
        }
        self.queue.signal()?;
        Ok(Next::Again)
    }
}

#[cfg(test)]
mod tests;
