//! virtio-console (virtio 1.2 §5.3) with one port: output to a file, to the clients of a Unix socket, or to stdout; input from
//! those clients, or from stdin. The receivers and senders are those of the serial port ([`crate::devices::serial`]).
//!
//! A thread serves both queues while a driver runs the device, and waits in poll(2) for whatever there is to do next.
//!
//! - **A receiver that doesn't read never stops the guest**: stdout keeps a bounded backlog, a client loses bytes, and a buffer gives at
//!   most [`MAX_OUTPUT`] bytes.
//! - **Input** waits in a bounded queue until the guest has buffers for it; while the queue is full nothing is read, so that the
//!   sender is held back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mote_vmm_api::{Console as ConsoleConfig, ConsoleSize, Serial as SerialConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{Chain, QueueError, VirtQueue};
use super::worker::Worker;
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::serial::console::{Console as Clients, MAX_CLIENTS};
use crate::devices::serial::output::Output;
use crate::devices::serial::stdin::Stdin;
use crate::devices::{DeviceError, EventSource, report};
use crate::metrics::{self, ConsoleMetrics};
use crate::snapshot::{DeviceState, StateError};

/// The configuration space has a size (virtio 1.2 §5.3.3).
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
const QUEUE_SIZE: u16 = 256;
/// Queue 0 is the guest's input, queue 1 its output (virtio 1.2 §5.3.2).
const QUEUES: [u16; 2] = [QUEUE_SIZE; 2];
/// Most bytes of output that one buffer gives; what is behind them is lost.
pub const MAX_OUTPUT: usize = 1 << 20;
/// Input that waits for the guest.
pub const INPUT_BYTES: usize = 4096;
/// Bytes moved in one go.
const PIECE: usize = 4096;
/// Buffers served before anything else is looked at.
const BUDGET: usize = 64;
/// Time between attempts to write to a stdout that took nothing.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The host's side of the console.
struct Host {
    output: Option<Output>,
    clients: Option<Clients>,
    stdin: Option<Stdin>,
    input: VecDeque<u8>,
    /// Output waits for a stdout that takes none.
    blocked: bool,
}

/// Something of the host's that can be waited for.
#[derive(Clone, Copy)]
enum Source {
    Stop,
    Input,
    Output,
    Listener,
    Stdin,
    Client(usize),
}

impl Host {
    fn open(config: &ConsoleConfig) -> Result<Self, DeviceError> {
        let clients = config.socket_path.as_deref().map(Clients::listen).transpose()?;
        let as_serial = SerialConfig {
            serial_out_path: config.output_path.clone(),
            log_limit_bytes: config.log_limit_bytes,
            ..SerialConfig::default()
        };
        let stdio = config.output_path.is_none() && clients.is_none();
        let output = if stdio || config.output_path.is_some() || config.log_limit_bytes.is_some() {
            Some(Output::open(&as_serial)?)
        } else {
            None
        };
        let stdin = stdio.then(Stdin::attach);
        Ok(Self { output, clients, stdin, input: VecDeque::new(), blocked: false })
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(clients) = &mut self.clients {
            clients.send(bytes);
        }
        if let Some(output) = &mut self.output {
            self.blocked = output.write(bytes);
        }
    }

    /// Takes the clients that have come while nobody looked: they are sent all of the output that comes now.
    fn accept_all(&mut self) {
        if let Some(clients) = &mut self.clients {
            while clients.accept().is_some() {}
        }
    }

    /// What to wait for beside the queues.
    fn sources(&self, sources: &mut Vec<(Source, RawFd)>) {
        let Self { clients, stdin, input, .. } = self;
        sources.extend(clients.as_ref().map(|clients| (Source::Listener, clients.fd())));
        // Whoever sends to a guest that takes nothing waits.
        if input.len() >= INPUT_BYTES {
            return;
        }
        sources.extend(stdin.as_ref().map(|_| (Source::Stdin, libc::STDIN_FILENO)));
        if let Some(clients) = clients {
            let each = |slot| Some((Source::Client(slot), clients.client_fd(slot)?));
            sources.extend((0..MAX_CLIENTS).filter_map(each));
        }
    }

    /// Takes what a source has.
    fn take(&mut self, source: Source) {
        let room = INPUT_BYTES.saturating_sub(self.input.len());
        let mut buffer = [0; PIECE];
        let buffer = &mut buffer[..room.min(PIECE)];
        let read = match (source, &mut self.clients, &mut self.stdin) {
            (Source::Listener, Some(clients), _) => {
                clients.accept();
                return;
            }
            // Several sources together may have filled the queue.
            (Source::Client(_) | Source::Stdin, ..) if buffer.is_empty() => return,
            (Source::Client(slot), Some(clients), _) => clients.receive(slot, buffer),
            (Source::Stdin, _, Some(stdin)) => stdin.read(buffer),
            _ => return,
        };
        let ended = match read {
            Ok(n) => {
                self.input.extend(&buffer[..n]);
                n == 0
            }
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        };
        match (source, &mut self.clients) {
            (Source::Client(slot), Some(clients)) if ended => clients.close(slot),
            (Source::Stdin, _) if ended => self.stdin = None,
            _ => {}
        }
    }

    fn finish(&mut self) {
        if let Some(output) = &mut self.output {
            output.finish();
        }
        self.stdin = None;
        self.clients = None;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.finish();
    }
}

fn lock(host: &Mutex<Host>) -> MutexGuard<'_, Host> {
    host.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A virtio console.
pub struct VirtioConsole {
    host: Arc<Mutex<Host>>,
    size: Option<ConsoleSize>,
    metrics: Arc<ConsoleMetrics>,
    worker: Option<Worker>,
}

impl VirtioConsole {
    /// As configured.
    ///
    /// # Errors
    /// File or socket can't be made.
    pub fn open(config: &ConsoleConfig) -> Result<Self, DeviceError> {
        let host = Arc::new(Mutex::new(Host::open(config)?));
        Ok(Self { host, size: config.size, metrics: metrics::device("console", None), worker: None })
    }

    /// What is left of the console when the process ends, which drops nothing.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn closer(&self) -> Result<ConsoleCloser, DeviceError> {
        let never = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        Ok(ConsoleCloser { host: self.host.clone(), never })
    }
}

/// Writes out what waits, removes the socket and gives the terminal back at the end of the process.
pub struct ConsoleCloser {
    host: Arc<Mutex<Host>>,
    /// Never readable.
    never: EventFd,
}

impl EventSource for ConsoleCloser {
    fn fd(&self) -> RawFd {
        self.never.as_raw_fd()
    }

    fn ready(&mut self) {}

    fn finish(&mut self) {
        lock(&self.host).finish();
    }
}

/// The queues and what serving them needs.
struct Server {
    receive: VirtQueue,
    transmit: VirtQueue,
    to_guest: Chain,
    from_guest: Chain,
    piece: Box<[u8; PIECE]>,
    metrics: Arc<ConsoleMetrics>,
}

impl Server {
    /// Guest → host; whether there may be more.
    fn take_output(&mut self, host: &mut Host) -> Result<bool, QueueError> {
        let mut more = true;
        for _ in 0..BUDGET {
            if !self.transmit.pop(&mut self.from_guest)? {
                if self.transmit.enable_notification()? {
                    continue;
                }
                more = false;
                break;
            }
            let Chain { readable, faulty, head, .. } = &self.from_guest;
            let bytes = if *faulty { 0 } else { readable.bytes().min(MAX_OUTPUT) };
            if *faulty || bytes < readable.bytes() {
                self.metrics.invalid_reqs_count.add_one();
            }
            let mut done = 0;
            while done < bytes {
                let room = PIECE.min(bytes - done);
                let n = readable.read_at(done, &mut self.piece[..room]);
                if n == 0 {
                    break;
                }
                host.write(&self.piece[..n]);
                done += n;
            }
            self.metrics.tx_bytes_count.add(done as u64);
            self.transmit.push_used(*head, 0)?;
        }
        self.transmit.signal()?;
        Ok(more)
    }

    /// Host → guest; whether there may be room for more.
    fn give_input(&mut self, host: &mut Host) -> Result<bool, QueueError> {
        let mut more = true;
        for _ in 0..BUDGET {
            if host.input.is_empty() {
                more = false;
                break;
            }
            if !self.receive.pop(&mut self.to_guest)? {
                if self.receive.enable_notification()? {
                    continue;
                }
                more = false;
                break;
            }
            let Chain { writable, faulty, head, .. } = &self.to_guest;
            let (front, _) = host.input.as_slices();
            let n = if *faulty { 0 } else { writable.write_at(0, front) };
            if n == 0 {
                self.metrics.invalid_reqs_count.add_one();
            }
            host.input.drain(..n);
            self.metrics.rx_bytes_count.add(n as u64);
            self.receive.push_used(*head, n as u32)?;
        }
        self.receive.signal()?;
        Ok(more)
    }

    fn run(&mut self, host: &Mutex<Host>, stop: BorrowedFd<'_>) -> io::Result<()> {
        let mut sources = Vec::with_capacity(MAX_CLIENTS + 5);
        lock(host).accept_all();
        loop {
            let mut guard = lock(host);
            let served = self
                .take_output(&mut guard)
                .and_then(|more| Ok((more, self.give_input(&mut guard)?)))
                .inspect_err(|_| self.transmit.set_needs_reset());
            sources.clear();
            sources.push((Source::Stop, stop.as_raw_fd()));
            let mut limit = match &served {
                Ok((false, false)) => PollTimeout::NONE,
                Ok(_) => PollTimeout::ZERO,
                Err(error) => {
                    // Nothing more until the driver resets the device.
                    report("the console", error);
                    wait(&sources, PollTimeout::NONE, |_| ())?;
                    return Ok(());
                }
            };
            sources.push((Source::Output, self.transmit.notifier_fd()));
            if !guard.input.is_empty() {
                sources.push((Source::Input, self.receive.notifier_fd()));
            }
            guard.sources(&mut sources);
            if guard.blocked {
                guard.write(&[]);
                if limit == PollTimeout::NONE {
                    limit = PollTimeout::try_from(RETRY_AFTER).unwrap_or(PollTimeout::ZERO);
                }
            }
            // The end of the process doesn't wait for this thread.
            drop(guard);
            let mut stopped = false;
            wait(&sources, limit, |source| match source {
                Source::Stop => stopped = true,
                Source::Input => self.receive.take_notification(),
                Source::Output => self.transmit.take_notification(),
                source => lock(host).take(source),
            })?;
            if stopped {
                return Ok(());
            }
        }
    }
}

/// Waits until one of them is ready, and calls `each` for those that are.
fn wait(sources: &[(Source, RawFd)], limit: PollTimeout, mut each: impl FnMut(Source)) -> io::Result<()> {
    let mut fds: Vec<_> = sources
        .iter()
        .map(|(_, fd)| {
            // SAFETY: borrowed for the call below only. The caller's thread is the only one that closes any of them, but for
            // the end of the process; one that is closed meanwhile is reported so and nothing else.
            PollFd::new(unsafe { BorrowedFd::borrow_raw(*fd) }, PollFlags::POLLIN)
        })
        .collect();
    match poll(&mut fds, limit) {
        Err(nix::errno::Errno::EINTR) => return Ok(()),
        result => result?,
    };
    for ((source, _), fd) in sources.iter().zip(fds) {
        if fd.any().unwrap_or(true) {
            each(*source);
        }
    }
    Ok(())
}

/// The console in a snapshot: input that the guest has not taken.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleState {
    input: Vec<u8>,
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        device_type::CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        u64::from(self.size.is_some()) << VIRTIO_CONSOLE_F_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config: columns, rows, and what belongs to features that are not offered.
        let ConsoleSize { columns, rows } = self.size.unwrap_or(ConsoleSize { columns: 0, rows: 0 });
        let [c0, c1] = columns.to_le_bytes();
        let [r0, r1] = rows.to_le_bytes();
        read_config_bytes(&[c0, c1, r0, r1], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([receive, transmit]) = <[VirtQueue; 2]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "console", given });
        };
        let mut server = Server {
            to_guest: receive.new_chain(),
            from_guest: transmit.new_chain(),
            receive,
            transmit,
            piece: Box::new([0; PIECE]),
            metrics: self.metrics.clone(),
        };
        let host = self.host.clone();
        self.worker = Some(Worker::spawn("console", move |stop| {
            if let Err(error) = server.run(&host, stop) {
                report("the console", &error);
                server.transmit.set_needs_reset();
            }
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&ConsoleState { input: lock(&self.host).input.iter().copied().collect() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let ConsoleState { input } = state.get()?;
        if input.len() > INPUT_BYTES {
            return Err(StateError::new("more input waits than its queue holds"));
        }
        lock(&self.host).input = input.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
