//! virtio-vsock (virtio 1.2 §5.10) over Unix sockets, by Firecracker's convention.
//!
//! | who connects | how |
//! |---|---|
//! | host → guest port P | connect to `uds_path`, write `CONNECT P\n`, read `OK HOSTPORT\n`; from then on it is the stream |
//! | guest → host port P | a listener at `uds_path_P` gets the stream |
//!
//! A pause keeps the connections. A snapshot has none: the guest that is made from one is told by an event that all are gone.
//!
//! One thread, started when the driver activates the device, moves data straight between sockets and guest memory; only
//! what a host's user does not take is buffered ([`connection`]), bounded per connection and in their number ([`muxer`]).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Chain, QueueError, VirtQueue};
use super::worker::Worker;
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::{DeviceError, EventSource, report};
use crate::metrics::{self, VsockMetrics};
use crate::snapshot::{DeviceState, StateError};

mod connection;
mod muxer;
mod packet;

use muxer::Muxer;
use packet::{HEADER_BYTES, Header};

const QUEUE_SIZE: u16 = 256;
/// Packets of one direction before the other gets its turn.
const BUDGET: usize = 64;
/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// Why a vsock device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket that the host's connections come to.
    #[error("listen on uds_path {}", .path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A virtio socket device.
pub struct Vsock {
    guest_cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    metrics: Arc<VsockMetrics>,
    worker: Option<Worker>,
    /// The connections of a worker that has ended, for the next one.
    kept: Arc<Mutex<Option<Muxer>>>,
    /// The guest has yet to be told that its connections are gone.
    reset_due: Arc<AtomicBool>,
}

impl Vsock {
    /// Listens on `uds_path`. A socket there that nobody answers on is replaced, as the API's socket is.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn open(config: &mote_vmm_api::Vsock) -> Result<Self, DeviceError> {
        let path = &config.uds_path;
        let failed = |source| VsockError::Listen { path: path.clone(), source };
        let listener = listen(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            guest_cid: config.guest_cid.into(),
            path: path.clone(),
            listener: Arc::new(listener),
            metrics: metrics::device("vsock", None),
            worker: None,
            kept: Arc::default(),
            reset_due: Arc::default(),
        })
    }

    /// What removes the socket when the process ends.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn socket_file(&self) -> Result<SocketFile, DeviceError> {
        let never = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        Ok(SocketFile { path: self.path.clone(), never })
    }
}

fn lock(kept: &Mutex<Option<Muxer>>) -> std::sync::MutexGuard<'_, Option<Muxer>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // What is no socket refuses connections, too.
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let answer = UnixStream::connect(path).map(drop);
            if is_socket && answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                std::fs::remove_file(path)?;
                return UnixListener::bind(path);
            }
            Err(error)
        }
        result => result,
    }
}

/// The socket in the file system, which would outlive the process.
pub struct SocketFile {
    path: PathBuf,
    /// Never readable.
    never: EventFd,
}

impl EventSource for SocketFile {
    fn fd(&self) -> RawFd {
        self.never.as_raw_fd()
    }

    fn ready(&mut self) {}

    fn finish(&mut self) {
        // Whoever removed it already has done the same.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The queues and what serving them needs.
struct Server {
    receive: VirtQueue,
    transmit: VirtQueue,
    event: VirtQueue,
    from_guest: Chain,
    to_guest: Chain,
    event_chain: Chain,
    reset_due: Arc<AtomicBool>,
    data: super::buffers::GuestBuffers,
    muxer: Muxer,
    /// The driver has supplied receive buffers, or may have.
    has_room: bool,
    metrics: Arc<VsockMetrics>,
}

/// Why the worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("wait for connections")]
    Wait(#[source] io::Error),
}

impl Server {
    fn run(&mut self) {
        if let Err(error) = self.serve() {
            report("vsock device", &error);
            self.receive.set_needs_reset();
            // Streams of the host end here: nothing will come of them.
            while self.muxer.wait(true).is_ok_and(|woken| !woken.stop) {}
        }
    }

    fn serve(&mut self) -> Result<(), ServeError> {
        let mut more = true;
        self.announce_reset()?;
        loop {
            let woken = self.muxer.wait(!more).map_err(ServeError::Wait)?;
            if woken.stop {
                return Ok(());
            }
            self.has_room |= woken.receive;
            if woken.event {
                self.announce_reset()?;
            }
            let sent = self.take_packets()?;
            let received = self.give_packets()?;
            more = sent || received;
        }
    }

    /// Tells the guest that its connections are gone, if that is due and there is a buffer for it.
    fn announce_reset(&mut self) -> Result<(), ServeError> {
        while self.reset_due.load(Ordering::Acquire) {
            if self.event.pop(&mut self.event_chain)? {
                // A buffer that is too short for an event is the driver's mistake.
                let written = match self.event_chain.faulty {
                    true => 0,
                    false => self.event_chain.writable.write_at(0, &TRANSPORT_RESET),
                };
                self.event.push_used(self.event_chain.head, written as u32)?;
                self.reset_due.store(false, Ordering::Release);
            } else if !self.event.enable_notification()? {
                return Ok(());
            }
        }
        Ok(self.event.signal()?)
    }

    /// Guest → host; whether there may be more.
    fn take_packets(&mut self) -> Result<bool, ServeError> {
        let mut more = true;
        for _ in 0..BUDGET {
            if !self.muxer.takes_packets() {
                // Goes on when the driver has taken some resets.
                more = self.has_room;
                break;
            }
            if !self.transmit.pop(&mut self.from_guest)? {
                if self.transmit.enable_notification()? {
                    continue;
                }
                more = false;
                break;
            }
            let packet = &mut self.from_guest.readable;
            let mut header = [0; HEADER_BYTES];
            if !self.from_guest.faulty && packet.read_at(0, &mut header) == HEADER_BYTES {
                self.metrics.tx_packets_count.add_one();
                self.metrics.tx_bytes_count.add(packet.bytes() as u64);
                packet.skip_front(HEADER_BYTES);
                self.muxer.receive(&Header::from_bytes(&header), packet);
            }
            self.transmit.push_used(self.from_guest.head, 0)?;
        }
        self.transmit.signal()?;
        Ok(more)
    }

    /// Host → guest; whether there may be more.
    fn give_packets(&mut self) -> Result<bool, ServeError> {
        let mut more = true;
        for _ in 0..BUDGET {
            if !self.has_room || !self.muxer.has_packet() {
                more = false;
                break;
            }
            if !self.receive.pop(&mut self.to_guest)? {
                self.has_room = self.receive.enable_notification()?;
                continue;
            }
            let room = &mut self.to_guest.writable;
            if self.to_guest.faulty || room.bytes() < HEADER_BYTES {
                self.receive.push_used(self.to_guest.head, 0)?;
                continue;
            }
            self.data.clear();
            match self.muxer.next_packet(room, &mut self.data) {
                Some(len) => {
                    self.metrics.rx_packets_count.add_one();
                    self.metrics.rx_bytes_count.add(len as u64);
                    self.receive.push_used(self.to_guest.head, len as u32)?;
                }
                None => self.receive.undo_pop(),
            }
        }
        self.receive.signal()?;
        Ok(more)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        device_type::VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        0
    }

    /// `struct virtio_vsock_config`: the guest's context id.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([receive, transmit, event]) = <[VirtQueue; 3]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "vsock", given });
        };
        let kicks = [
            (receive.notifier_fd(), muxer::RECEIVE_KICK),
            (transmit.notifier_fd(), muxer::TRANSMIT_KICK),
            (event.notifier_fd(), muxer::EVENT_KICK),
        ];
        let (cid, path, listener) = (self.guest_cid, self.path.clone(), self.listener.clone());
        // One that was kept watches the notifiers already: they are the device's as long as it lives.
        let muxer = match lock(&self.kept).take() {
            Some(muxer) => muxer,
            None => {
                Muxer::new(cid, path, listener, &kicks, self.metrics.clone()).map_err(DeviceError::EventFd)?
            }
        };
        let mut server = Server {
            from_guest: transmit.new_chain(),
            to_guest: receive.new_chain(),
            data: receive.new_buffers(),
            receive,
            transmit,
            event_chain: event.new_chain(),
            event,
            reset_due: self.reset_due.clone(),
            muxer,
            has_room: true,
            metrics: self.metrics.clone(),
        };
        let kept = self.kept.clone();
        self.worker = Some(Worker::spawn("vsock", move |stop: BorrowedFd<'_>| {
            match server.muxer.watch_stop(stop) {
                Ok(()) => server.run(),
                Err(error) => {
                    report("vsock device", &error);
                    server.receive.set_needs_reset();
                }
            }
            *lock(&kept) = Some(server.muxer);
        })?);
        Ok(())
    }

    /// The connections stay: only the thread ends.
    fn pause(&mut self) {
        self.worker = None;
    }

    fn reset(&mut self) {
        self.worker = None;
        *lock(&self.kept) = None;
        self.reset_due.store(false, Ordering::Release);
    }

    /// Connections are not part of a snapshot, and the rest is in the configuration.
    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::NONE)
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), StateError> {
        self.reset_due.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
