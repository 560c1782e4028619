//! virtio-blk (virtio 1.2 §5.2) over a raw file, a block device or a qcow2 image.
//!
//! One queue or several, each served by a thread that is started when the driver activates the device. What it supports: read,
//! write, flush (cache type Writeback), GET_ID, discard and write-zeroes (as `fallocate`, if the drive is writable), rate
//! limits, and another file or size while the guest runs ([`BlockControl`]).
//! A file whose length is not a multiple of 512 bytes is offered without its last, partial sector, as Firecracker does.
//!
//! | module | what it is |
//! |---|---|
//! | `request` | from descriptor chain to command to status |
//! | `server` | the worker's loop over a queue |
//! | `ring` | the io_uring engine; the plain one is a call for each request |
//! | `image`, `file` | the backends |

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mote_vmm_api::{BackingFile, CacheType, Drive, DriveFormat, DrivePatch, IoEngine};
use virtio_bindings::virtio_blk as abi;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::worker::Worker;
use super::{Activation, Interrupt, VirtioDevice, device_type, read_config_bytes};
use crate::devices::{DeviceError, EventSource, report};
use crate::metrics::{self, BlockMetrics};
use crate::rate_limiter::RateLimiter;
use crate::snapshot::{DeviceState, StateError};

mod file;
mod image;
mod request;
mod ring;
mod server;

pub use file::{BlockError, RawFile};
pub(crate) use image::Image;
use request::{MAX_RANGES, Refusal, refusal};
use server::Server;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Length of the id that GET_ID answers with.
const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 256;
/// Segments of data in one request: what a chain of [`QUEUE_SIZE`] holds beside header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors that one range of a discard or write-zeroes may name: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// What the requests are served from. Replaced as a whole while no worker runs.
struct Disk {
    image: Arc<Image>,
    /// For messages: the drive's id.
    name: String,
    /// What GET_ID answers.
    serial: [u8; ID_BYTES],
    flush: bool,
    engine: IoEngine,
    limited: bool,
    limiter: Arc<Mutex<RateLimiter>>,
    /// An error of the image was logged.
    failed: AtomicBool,
    metrics: Arc<BlockMetrics>,
}

impl Disk {
    /// Takes an operation with so many bytes of data from the rate limit.
    ///
    /// # Errors
    /// It has to wait so long.
    fn limit(&self, bytes: u64) -> Result<(), Duration> {
        if !self.limited {
            return Ok(());
        }
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = limiter.consume(bytes, 1, Instant::now());
        passed.inspect_err(|_| self.metrics.rate_limiter_throttled_events.add_one())
    }

    /// Turns the image's answer into the guest's. The first failure is logged: a guest can repeat it as often as it likes.
    fn check(&self, operation: &str, result: io::Result<()>) -> Result<(), Refusal> {
        result.map_err(|error| {
            let refusal = refusal(&error);
            if refusal == Refusal::Io && !self.failed.swap(true, Ordering::Relaxed) {
                report(&format!("drive {}: cannot {operation} its file (told once)", self.name), &error);
            }
            refusal
        })
    }
}

impl Disk {
    /// The same drive after a change.
    fn updated(&self, image: Arc<Image>, patch: &DrivePatch) -> Self {
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limits) = &patch.rate_limiter {
            limiter.update(limits, Instant::now());
        }
        Self {
            image,
            name: self.name.clone(),
            serial: self.serial,
            flush: self.flush,
            engine: self.engine,
            limited: !limiter.is_unlimited(),
            limiter: self.limiter.clone(),
            failed: AtomicBool::new(false),
            metrics: self.metrics.clone(),
        }
    }
}

/// What the device and the outside share.
struct State {
    disk: Arc<Disk>,
    format: DriveFormat,
    backing_files: Vec<BackingFile>,
    /// Number of changes of the configuration space.
    generation: u32,
    running: Option<Running>,
}

/// What there is while a driver runs the device.
struct Running {
    /// Each is locked by its worker.
    servers: Vec<Arc<Mutex<Server>>>,
    workers: Vec<Worker>,
    interrupt: Arc<Interrupt>,
}

/// The queues go after their workers.
impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Running {
    /// Ends the workers; their queues stay where they are.
    fn stop(&mut self) {
        self.workers.clear();
    }

    /// Starts a worker for each queue.
    fn start(&mut self, disk: &Arc<Disk>) -> Result<(), DeviceError> {
        for server in &self.servers {
            let (disk, server) = (disk.clone(), server.clone());
            self.workers.push(Worker::spawn("block", move |stop| {
                server.lock().unwrap_or_else(PoisonError::into_inner).work(&disk, stop);
            })?);
        }
        Ok(())
    }
}

/// A virtio block device.
pub struct Block {
    state: Arc<Mutex<State>>,
    features: u64,
    queue_sizes: Vec<u16>,
}

impl Block {
    /// Opens the drive's file, so that a drive that can't be opened is refused when it is configured.
    ///
    /// # Errors
    /// The file can't be opened as wanted, or is no disk.
    pub fn open(drive: &Drive) -> Result<Self, DeviceError> {
        let image = Image::open(&drive.path_on_host, drive.is_read_only, drive.format, &drive.backing_files)?;
        Ok(Self::new(image, drive))
    }

    fn new(image: Image, drive: &Drive) -> Self {
        let mut serial = [0; ID_BYTES];
        let n = drive.drive_id.len().min(ID_BYTES);
        serial[..n].copy_from_slice(&drive.drive_id.as_bytes()[..n]);
        let flush = drive.cache_type == CacheType::Writeback;
        let queues = drive.num_queues.unwrap_or(1).max(1);
        let features = features(flush, image.is_read_only(), queues > 1);
        let limiter = RateLimiter::new(drive.rate_limiter.as_ref(), Instant::now());
        let disk = Disk {
            image: Arc::new(image),
            name: drive.drive_id.clone(),
            serial,
            flush,
            engine: drive.io_engine,
            limited: !limiter.is_unlimited(),
            limiter: Arc::new(Mutex::new(limiter)),
            failed: AtomicBool::new(false),
            metrics: metrics::device("block", Some(&drive.drive_id)),
        };
        let state = State {
            disk: Arc::new(disk),
            format: drive.format,
            backing_files: drive.backing_files.clone(),
            generation: 0,
            running: None,
        };
        let queue_sizes = vec![QUEUE_SIZE; queues.into()];
        Self { state: Arc::new(Mutex::new(state)), features, queue_sizes }
    }

    /// For changes while the guest runs.
    pub fn control(&self) -> BlockControl {
        BlockControl(self.state.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The outside's handle of a drive. Works whether or not the guest drives the device.
#[derive(Clone)]
pub struct BlockControl(Arc<Mutex<State>>);

impl BlockControl {
    /// Changes the drive as Firecracker's PATCH does: another file, or the same with another size, of which the guest is
    /// told; other buckets of the rate limit. When this returns, nothing touches the old file any more.
    ///
    /// # Errors
    /// The file can't be opened, or the worker can't be started again; the drive is as before in the first case, and
    /// needs a reset by its driver in the second.
    pub fn update(&self, patch: &DrivePatch) -> Result<(), DeviceError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = state.disk.metrics.clone();
        metrics.update_count.add_one();
        Self::change(&mut state, patch).inspect_err(|_| metrics.update_fails.add_one())
    }

    fn change(state: &mut State, patch: &DrivePatch) -> Result<(), DeviceError> {
        let old = state.disk.clone();
        let open = |path| Image::open(path, old.image.is_read_only(), state.format, &state.backing_files);
        let opened = patch.path_on_host.as_deref().map(open).transpose()?;
        if let Some(running) = &mut state.running {
            running.stop();
        }
        let exchanged = opened.is_some();
        let image = opened.map_or_else(|| old.image.clone(), Arc::new);
        if exchanged && let Err(error) = old.image.close() {
            report(&format!("drive {}: close the file that was exchanged", old.name), &error);
        }
        state.disk = Arc::new(old.updated(image, patch));
        if exchanged {
            state.generation = state.generation.wrapping_add(1);
        }
        state.go_on(exchanged)
    }
}

/// Closes a drive's image when the process ends, which joins no threads and drops nothing.
pub struct ImageCloser {
    control: BlockControl,
    /// Never readable.
    event: EventFd,
}

impl ImageCloser {
    /// For this drive.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(control: BlockControl) -> Result<Self, DeviceError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        Ok(Self { control, event })
    }
}

impl EventSource for ImageCloser {
    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn ready(&mut self) {}

    /// Only this handle is left of the drive.
    fn is_gone(&self) -> bool {
        Arc::strong_count(&self.control.0) == 1
    }

    fn finish(&mut self) {
        let mut state = self.control.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &mut state.running {
            running.stop();
        }
        if let Err(error) = state.disk.image.close() {
            report(&format!("drive {}: close its image", state.disk.name), &error);
        }
    }
}

impl State {
    /// Starts the workers again, after a change.
    fn go_on(&mut self, config_changed: bool) -> Result<(), DeviceError> {
        // A broken queue is not served again.
        let Some(running) = self.running.as_mut().filter(|running| !running.interrupt.needs_reset()) else {
            return Ok(());
        };
        if let Err(error) = running.start(&self.disk) {
            running.stop();
            running.interrupt.set_needs_reset();
            return Err(error);
        }
        if config_changed {
            running.interrupt.config_changed();
        }
        Ok(())
    }
}

fn features(flush: bool, read_only: bool, several_queues: bool) -> u64 {
    let mut bits = vec![abi::VIRTIO_BLK_F_SEG_MAX, abi::VIRTIO_BLK_F_BLK_SIZE, abi::VIRTIO_BLK_F_TOPOLOGY];
    if flush {
        bits.push(abi::VIRTIO_BLK_F_FLUSH);
    }
    if several_queues {
        bits.push(abi::VIRTIO_BLK_F_MQ);
    }
    if read_only {
        bits.push(abi::VIRTIO_BLK_F_RO);
    } else {
        bits.extend([abi::VIRTIO_BLK_F_DISCARD, abi::VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().fold(0, |features, bit| features | 1 << bit)
}

impl Block {
    fn sectors(&self) -> u64 {
        self.state().disk.image.sectors()
    }
}

/// `struct virtio_blk_config`, virtio 1.2 §5.2.4.
fn config_space(sectors: u64, queues: u16) -> [u8; 60] {
    let mut config = [0; 60];
    config[0..8].copy_from_slice(&sectors.to_le_bytes());
    config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
    // Requests may be of single sectors, but are best of whole, aligned blocks of 4 KiB, the host's page and the block of
    // most file systems: 2^3 sectors.
    config[24] = 3;
    config[26..28].copy_from_slice(&8u16.to_le_bytes());
    config[34..36].copy_from_slice(&queues.to_le_bytes());
    config[36..40].copy_from_slice(&MAX_RANGE_SECTORS.to_le_bytes());
    config[40..44].copy_from_slice(&MAX_RANGES.to_le_bytes());
    // Discards, too.
    config[44..48].copy_from_slice(&8u32.to_le_bytes());
    config[48..52].copy_from_slice(&MAX_RANGE_SECTORS.to_le_bytes());
    config[52..56].copy_from_slice(&MAX_RANGES.to_le_bytes());
    // Write-zeroes may unmap.
    config[56] = 1;
    config
}

/// A drive in a snapshot; its content is no part of it.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockState {
    sectors: u64,
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn needs_all_queues(&self) -> bool {
        false
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = config_space(self.state().disk.image.sectors(), self.queue_sizes.len() as u16);
        read_config_bytes(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.state().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let servers = activation.queues.into_iter().map(|queue| Arc::new(Mutex::new(Server::new(queue))));
        let (servers, interrupt) = (servers.collect(), activation.interrupt);
        let mut state = self.state();
        let mut running = Running { servers, workers: Vec::new(), interrupt };
        running.start(&state.disk)?;
        state.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        self.state().running = None;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&BlockState { sectors: self.sectors() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let BlockState { sectors } = state.get()?;
        if sectors != self.sectors() {
            return Err(StateError::new(format!(
                "its file has {} sectors, the snapshot's had {sectors}",
                self.sectors()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
