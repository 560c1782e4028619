//! virtio-blk (virtio 1.2 §5.2) whose requests another process serves, over the vhost-user protocol.
//!
//! ```text
//!   open: connect ──► features ──► protocol features ──► configuration ──► offered to the guest
//!   activate (DRIVER_OK): agreed features ──► memory ──► rings ──► enabled: served
//!   reset, pause: disabled ──► GET_VRING_BASE: where each queue was left
//! ```
//!
//! What the guest may agree on is what the backend offers and this program knows. A backend that goes away is told to the guest
//! by DEVICE_NEEDS_RESET: its requests stay unanswered. A driver that resets the device and starts it anew has it connected anew, so
//! that a backend which was started again serves again.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mote_vmm_api::{CacheType, Drive, DrivePatch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_blk as abi;
use vmm_sys_util::epoll::EventSet;

use super::{Addresses, Call, hand_over, memory_table, watch};
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    Activation, COMMON_FEATURES, F_VERSION_1, Interrupt, VirtioDevice, device_type, read_config_bytes,
};
use crate::devices::{DeviceError, report};
use crate::metrics::{self, Counter, VhostUserBlockMetrics};
use crate::snapshot::{DeviceState, StateError};

const QUEUE_SIZE: u16 = 256;
/// `sizeof(struct virtio_blk_config)` up to and with the fields of write-zeroes (virtio 1.2 §5.2.4).
const CONFIG_BYTES: usize = 60;
/// Place of the number of queues in it.
const NUM_QUEUES: std::ops::Range<usize> = 34..36;

/// A backend can't be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody there.
    #[error("connect to the vhost-user backend at {}", .socket.display())]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It went away, or answers what it may not.
    #[error("{step} of the vhost-user backend at {}", .socket.display())]
    Request {
        /// What was asked for.
        step: &'static str,
        /// Where.
        socket: PathBuf,
        /// Cause.
        #[source]
        source: vhost::Error,
    },
    /// It is too simple.
    #[error("the vhost-user backend at {} does not offer {feature}, which is needed", .socket.display())]
    Feature {
        /// Where.
        socket: PathBuf,
        /// The specification's name of it.
        feature: &'static str,
    },
    /// Another backend is there now.
    #[error(
        "the vhost-user backend at {} does not offer features {missing:#x} any more, which the guest was offered",
        .socket.display()
    )]
    Changed {
        /// Where.
        socket: PathBuf,
        /// Bits.
        missing: u64,
    },
    /// The backend writes.
    #[error(
        "is_read_only needs a backend that is read-only, which the one at {} is not: start it so, or leave is_read_only out",
        .0.display()
    )]
    Writable(PathBuf),
    /// Nothing that can be changed here.
    #[error(
        "path_on_host and rate_limiter are not for a drive with a socket: its backend changes them; without them its \
         configuration is read again"
    )]
    Patch,
}

/// The connection to a backend.
struct Connection {
    frontend: Frontend,
    /// What the backend can and the guest may be offered.
    features: u64,
    /// Most queues that it serves.
    queues: u64,
    config: [u8; CONFIG_BYTES],
    /// The other end was closed.
    gone: Arc<AtomicBool>,
}

/// The features that this program knows.
fn known_features(flush: bool) -> u64 {
    let mut bits = vec![
        abi::VIRTIO_BLK_F_SIZE_MAX,
        abi::VIRTIO_BLK_F_SEG_MAX,
        abi::VIRTIO_BLK_F_GEOMETRY,
        abi::VIRTIO_BLK_F_RO,
        abi::VIRTIO_BLK_F_BLK_SIZE,
        abi::VIRTIO_BLK_F_TOPOLOGY,
        abi::VIRTIO_BLK_F_MQ,
        abi::VIRTIO_BLK_F_DISCARD,
        abi::VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    if flush {
        bits.push(abi::VIRTIO_BLK_F_FLUSH);
    }
    bits.into_iter().fold(COMMON_FEATURES, |features, bit| features | 1 << bit)
}

impl Connection {
    /// Connects and agrees on what doesn't depend on the guest.
    fn open(socket: &Path, flush: bool) -> Result<Self, VhostUserError> {
        let failed = |step| {
            let socket = socket.to_owned();
            move |source| VhostUserError::Request { step, socket, source }
        };
        let lacks = |feature| VhostUserError::Feature { socket: socket.to_owned(), feature };
        let stream = UnixStream::connect(socket)
            .map_err(|source| VhostUserError::Connect { socket: socket.to_owned(), source })?;
        let mut frontend = Frontend::from_stream(stream, mote_vmm_api::MAX_VCPUS.into());
        frontend.set_owner().map_err(failed("become the owner"))?;
        let offered = frontend.get_features().map_err(failed("read the features"))?;
        if offered & F_VERSION_1 == 0 {
            return Err(lacks("VIRTIO_F_VERSION_1"));
        }
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let protocol = frontend.get_protocol_features().map_err(failed("read the protocol features"))?;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = protocol & wanted;
        frontend.set_protocol_features(protocol).map_err(failed("set the protocol features"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // Errors are told for every request from now on.
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let config = read_config(&mut frontend).map_err(failed("read the configuration"))?;
        let mut queues = 1;
        if protocol.contains(VhostUserProtocolFeatures::MQ) && offered & 1 << abi::VIRTIO_BLK_F_MQ != 0 {
            let most = frontend.get_queue_num().map_err(failed("read the number of queues"))?;
            let told = u16::from_le_bytes([config[NUM_QUEUES.start], config[NUM_QUEUES.start + 1]]);
            queues = most.min(told.into()).max(1);
        }
        let features = offered & known_features(flush);
        Ok(Self { frontend, features, queues, config, gone: Arc::default() })
    }
}

impl Connection {
    /// Whether the other end was closed. Nobody watches it while no driver runs the device.
    fn is_gone(&self) -> bool {
        if self.gone.load(Ordering::Acquire) {
            return true;
        }
        // SAFETY: borrowed for the call only, while `self.frontend` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(self.frontend.as_raw_fd()) };
        // A backend says nothing unasked: what can be read is its end.
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

fn read_config(frontend: &mut Frontend) -> Result<[u8; CONFIG_BYTES], vhost::Error> {
    let room = [0; CONFIG_BYTES];
    let (_, bytes) = frontend.get_config(0, CONFIG_BYTES as u32, VhostUserConfigFlags::empty(), &room)?;
    // The crate has checked the length.
    bytes.try_into().map_err(|_| vhost::Error::InvalidOperation)
}

/// The configuration space as the guest sees it.
struct Config {
    bytes: [u8; CONFIG_BYTES],
    generation: u32,
    /// Of a guest that drives the device.
    interrupt: Option<Arc<Interrupt>>,
}

/// What the device and the outside share.
struct Backend {
    name: String,
    socket: PathBuf,
    flush: bool,
    /// Number of queues that the guest sees.
    queues: u16,
    /// None after a request failed: the next activation makes another.
    connection: Mutex<Option<Connection>>,
    config: Mutex<Config>,
    metrics: Arc<VhostUserBlockMetrics>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds the microseconds since `start`.
fn add_time(counter: &Counter, start: Instant) {
    counter.add(start.elapsed().as_micros() as u64);
}

impl Backend {
    fn failed(&self, step: &'static str) -> impl FnOnce(vhost::Error) -> VhostUserError {
        let socket = self.socket.clone();
        move |source| VhostUserError::Request { step, socket, source }
    }

    /// Takes over a configuration; whether it is another one.
    fn set_config(&self, mut bytes: [u8; CONFIG_BYTES]) -> bool {
        // What the guest may use, not what the backend could.
        bytes[NUM_QUEUES].copy_from_slice(&self.queues.to_le_bytes());
        let mut config = lock(&self.config);
        let changed = config.bytes != bytes;
        if changed {
            config.bytes = bytes;
            config.generation = config.generation.wrapping_add(1);
        }
        changed
    }
}

/// A virtio block device that another process serves.
pub struct VhostUserBlock {
    backend: Arc<Backend>,
    features: u64,
    queue_sizes: Vec<u16>,
    served: Option<Served>,
}

/// What there is while a driver runs the device.
struct Served {
    queues: Vec<VirtQueue>,
    gone: Arc<AtomicBool>,
    /// Ends before the queues' last positions are asked for: nothing is told of a connection that is given up.
    _worker: Worker,
}

impl VhostUserBlock {
    /// Connects to the drive's backend.
    ///
    /// # Errors
    /// Nobody is there, or it can't serve such a drive.
    pub fn open(drive: &Drive, socket: &Path) -> Result<Self, DeviceError> {
        let start = Instant::now();
        let flush = drive.cache_type == CacheType::Writeback;
        let connection = Connection::open(socket, flush)?;
        let mut features = connection.features;
        if drive.is_read_only && features & 1 << abi::VIRTIO_BLK_F_RO == 0 {
            return Err(VhostUserError::Writable(socket.to_owned()).into());
        }
        let queues = connection.queues.min(drive.num_queues.unwrap_or(1).max(1).into()) as u16;
        if queues == 1 {
            features &= !(1 << abi::VIRTIO_BLK_F_MQ);
        }
        let config = connection.config;
        let backend = Backend {
            name: drive.drive_id.clone(),
            socket: socket.to_owned(),
            flush,
            queues,
            connection: Mutex::new(Some(connection)),
            config: Mutex::new(Config { bytes: [0; CONFIG_BYTES], generation: 0, interrupt: None }),
            metrics: metrics::device("vhost_user_block", Some(&drive.drive_id)),
        };
        backend.set_config(config);
        add_time(&backend.metrics.init_time_us, start);
        let queue_sizes = vec![QUEUE_SIZE; queues.into()];
        Ok(Self { backend: Arc::new(backend), features, queue_sizes, served: None })
    }

    /// Whether the backend takes no writes.
    pub const fn is_read_only(&self) -> bool {
        self.features & 1 << abi::VIRTIO_BLK_F_RO != 0
    }

    /// For changes while the guest runs.
    pub fn control(&self) -> VhostUserControl {
        VhostUserControl(self.backend.clone())
    }

    /// The connection, made anew if it is gone.
    fn connected<'a>(&self, slot: &'a mut Option<Connection>) -> Result<&'a mut Connection, VhostUserError> {
        if slot.as_ref().is_none_or(Connection::is_gone) {
            *slot = None;
            let connection = Connection::open(&self.backend.socket, self.backend.flush)?;
            let mut missing = self.features & !connection.features;
            if connection.queues < self.backend.queues.into() {
                missing |= 1 << abi::VIRTIO_BLK_F_MQ;
            }
            if missing != 0 {
                return Err(VhostUserError::Changed { socket: self.backend.socket.clone(), missing });
            }
            self.backend.set_config(connection.config);
            *slot = Some(connection);
        }
        // Just made, if there was none.
        slot.as_mut()
            .ok_or_else(|| self.backend.failed("find the connection")(vhost::Error::InvalidOperation))
    }

    fn serve(&self, activation: Activation) -> Result<Served, DeviceError> {
        let Activation { mem, features, queues, interrupt } = activation;
        let mut slot = lock(&self.backend.connection);
        let connection = self.connected(&mut slot)?;
        let gone = connection.gone.clone();
        let calls: Vec<_> =
            queues.iter().map(|queue| Call::of(queue, &interrupt)).collect::<Result<_, _>>()?;
        let features = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let set_up = |frontend: &mut Frontend| {
            frontend.set_features(features)?;
            frontend.set_mem_table(&memory_table(&mem)?)?;
            for (queue, call) in queues.iter().zip(&calls) {
                hand_over(frontend, queue, &call.event, Addresses::Process)?;
            }
            queues.iter().try_for_each(|queue| frontend.set_vring_enable(queue.index().into(), true))
        };
        if let Err(error) = set_up(&mut connection.frontend) {
            // What it has taken over of this driver it must not use.
            *slot = None;
            return Err(self.backend.failed("hand the queues over")(error).into());
        }
        let fd = connection.frontend.as_raw_fd();
        let (backend, told, line) = (self.backend.clone(), gone.clone(), interrupt.clone());
        let worker = watch("vhost-user", calls, Some((fd, EventSet::READ_HANG_UP)), interrupt, move || {
            told.store(true, Ordering::Release);
            backend.metrics.disconnects.add_one();
            let error = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            report(&format!("drive {}: its vhost-user backend has gone", backend.name), &error);
            line.set_needs_reset();
        })?;
        // Chains may have come before the backend had the eventfd.
        for notifier in queues.iter().filter_map(VirtQueue::notifier) {
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = notifier.write(1);
        }
        Ok(Served { queues, gone, _worker: worker })
    }
}

impl VirtioDevice for VhostUserBlock {
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

    fn common_features(&self) -> u64 {
        // The backend's, too.
        self.features & COMMON_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&lock(&self.backend.config).bytes, offset, data);
    }

    fn config_generation(&self) -> u32 {
        lock(&self.backend.config).generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let start = Instant::now();
        let interrupt = activation.interrupt.clone();
        let generation = self.config_generation();
        let served = self.serve(activation);
        let metrics = &self.backend.metrics;
        self.served = Some(served.inspect_err(|_| metrics.activate_fails.add_one())?);
        add_time(&metrics.activate_time_us, start);
        if self.config_generation() != generation {
            interrupt.config_changed();
        }
        lock(&self.backend.config).interrupt = Some(interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        lock(&self.backend.config).interrupt = None;
        let Some(Served { mut queues, gone, _worker: worker }) = self.served.take() else { return };
        let mut slot = lock(&self.backend.connection);
        let stop = |frontend: &mut Frontend, queue: &mut VirtQueue| {
            frontend.set_vring_enable(queue.index().into(), false)?;
            let next_avail = frontend.get_vring_base(queue.index().into())?;
            queue.left_at(next_avail as u16);
            Ok(())
        };
        let result = match slot.as_mut().filter(|_| !gone.load(Ordering::Acquire)) {
            Some(Connection { frontend, .. }) => {
                queues.iter_mut().try_for_each(|queue| stop(frontend, queue))
            }
            None => Ok(()),
        };
        // After the last interrupts.
        drop(worker);
        if let Err(error) = result
            && !gone.load(Ordering::Acquire)
        {
            report(&format!("drive {}", self.backend.name), &self.backend.failed("stop the queues")(error));
            *slot = None;
        }
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Err(StateError::new("a drive with a socket (vhost-user) cannot be part of a snapshot"))
    }
}

/// The outside's handle of a drive that another process serves.
#[derive(Clone)]
pub struct VhostUserControl(Arc<Backend>);

impl VhostUserControl {
    /// Reads the configuration again, as Firecracker's PATCH does, and tells the guest if it has changed.
    ///
    /// # Errors
    /// The backend doesn't answer, or the patch names what is the backend's.
    pub fn update(&self, patch: &DrivePatch) -> Result<(), DeviceError> {
        let backend = &self.0;
        if patch.path_on_host.is_some() || patch.rate_limiter.is_some() {
            return Err(VhostUserError::Patch.into());
        }
        let start = Instant::now();
        let mut slot = lock(&backend.connection);
        let result = match slot.as_mut().filter(|connection| !connection.is_gone()) {
            Some(connection) => read_config(&mut connection.frontend),
            None => Err(vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::Disconnected)),
        };
        drop(slot);
        let failed = backend.failed("read the configuration");
        let bytes = result.map_err(failed).inspect_err(|_| backend.metrics.cfg_fails.add_one())?;
        if backend.set_config(bytes)
            && let Some(interrupt) = &lock(&backend.config).interrupt
        {
            interrupt.config_changed();
        }
        add_time(&backend.metrics.config_change_time_us, start);
        Ok(())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod tests;
