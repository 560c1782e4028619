//! The first serial port: a 16550A (registers by `vm-superio`) whose output goes to stdout or a bounded log file and to
//! the clients of the console socket, and whose input comes from stdin and those clients.
//!
//! **Output.** Bytes are collected and written together at the end of a line, when the buffer is full, or
//! [`FLUSH_AFTER`] after the first of them, whichever is first: a guest that prints a line costs one write, a prompt
//! without a newline is not held back. The very first byte is written at once. [`EventSource::finish`] and `Drop` write
//! what is left.
//!
//! **A receiver that doesn't read never stops the guest**: stdout keeps a bounded backlog, a console client loses bytes.
//!
//! **Input** waits in a bounded queue until the guest has room in its FIFO; while the queue is full nothing is read, so
//! that the sender is held back.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mote_vmm_api as api;
use mote_vmm_api::Serial as SerialConfig;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, SerialState, Trigger};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::{DeviceError, EventSource};
use crate::metrics::UART;
use crate::rate_limiter::RateLimiter;
use crate::snapshot::{DeviceState, StateError, Stateful};

pub(crate) mod console;
pub(crate) mod output;
pub(crate) mod stdin;

use console::{Console, MAX_CLIENTS};
use output::Output;
use stdin::Stdin;

/// Longest time that a byte of output waits for others.
const FLUSH_AFTER: Duration = Duration::from_millis(5);
/// Time between attempts to write to a stdout that took nothing.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Output is written when this much has been collected.
const COLLECT_BYTES: usize = 1024;
/// Input that waits for the guest.
const INPUT_BYTES: usize = 4096;
/// Input read in one go.
const READ_BYTES: usize = 512;
/// Events taken from the port's descriptors in one go.
const EVENTS: usize = 8;

/// Register offset of the data register.
const DATA: u64 = 0;
/// Number of registers.
const REGISTERS: u64 = 8;

/// Tokens in the port's epoll instance; console clients follow.
const TIMER: u64 = 0;
const STDIN: u64 = 1;
const LISTENER: u64 = 2;
const FIRST_CLIENT: u64 = 3;

/// Why the serial port can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The output file can't be opened.
    #[error("open {path} for the guest's output")]
    Output {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Only a file can be limited.
    #[error("log_limit_bytes needs a regular file as output")]
    LimitWithoutFile,
    /// A limit that no line fits in.
    #[error("log_limit_bytes {bytes} is less than {min}")]
    LimitTooSmall {
        /// What was given.
        bytes: u64,
        /// The least.
        min: u64,
    },
    /// The console socket can't be made.
    #[error("listen on the console socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// epoll or timerfd.
    #[error("watch the serial port's descriptors")]
    Watch(#[source] io::Error),
}

/// The interrupt line as the UART triggers it.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is full: the interrupt is pending.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

/// What the UART writes to: bytes that wait to be written out.
#[derive(Default)]
struct Collected(Vec<u8>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port with everything attached to it.
struct Port {
    uart: Uart<Irq, NoEvents, Collected>,
    /// The interrupt once more, for a UART that is made from a snapshot.
    irq: EventFd,
    /// Of the output's bytes; `None` where there is no limit, so that nobody asks for the time.
    limiter: Option<RateLimiter>,
    /// Nothing was ever written.
    silent: bool,
    output: Output,
    console: Option<Console>,
    stdin: Option<Stdin>,
    input: VecDeque<u8>,
    /// Tokens of sources that are not polled until the guest has taken input.
    held_back: Vec<u64>,
    timer: TimerFd,
    timer_armed: bool,
    epoll: Epoll,
}

/// The serial port on the bus.
pub struct Serial {
    port: Arc<Mutex<Port>>,
}

/// The serial port in the main event loop.
struct SerialEvents {
    port: Arc<Mutex<Port>>,
    fd: RawFd,
}

fn lock(port: &Mutex<Port>) -> MutexGuard<'_, Port> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Serial {
    /// The port for the bus and what the main event loop must serve. `irq` is its interrupt. Without a configuration:
    /// stdout and stdin.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn new(
        config: Option<&SerialConfig>,
        irq: EventFd,
    ) -> Result<(Self, Vec<Box<dyn EventSource>>), DeviceError> {
        let default = SerialConfig::default();
        let port = Port::new(config.unwrap_or(&default), irq)?;
        let fd = port.epoll.as_raw_fd();
        let port = Arc::new(Mutex::new(port));
        Ok((Self { port: port.clone() }, vec![Box::new(SerialEvents { port, fd })]))
    }
}

impl BusDevice for Serial {
    /// Several bytes are the same register several times: string I/O arrives so.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut port = lock(&self.port);
        for byte in data {
            *byte = port.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut port = lock(&self.port);
        for byte in data {
            port.write(offset, *byte);
        }
        port.flush_if_due();
    }
}

/// The port in a snapshot: its registers, and input that the guest has not taken.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    input: Vec<u8>,
}

impl Stateful for Serial {
    /// What was collected is the output of this process.
    fn pause(&mut self) {
        lock(&self.port).flush();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let port = lock(&self.port);
        let uart = port.uart.state();
        DeviceState::new(&PortState {
            baud_divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            input: port.input.iter().copied().collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: PortState = state.get()?;
        if state.input.len() > INPUT_BYTES + READ_BYTES {
            return Err(StateError::new("more input waits than its queue holds"));
        }
        let uart = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo,
        };
        let mut port = lock(&self.port);
        let irq = port.irq.try_clone().map_err(|error| StateError::new(format!("no eventfd: {error}")))?;
        // Raises its interrupt again if one is pending in the registers.
        port.uart = Uart::from_state(&uart, Irq(irq), NoEvents, Collected::default())
            .map_err(|_| StateError::new("its FIFO holds more than it can"))?;
        port.input = state.input.into();
        Ok(())
    }
}

impl EventSource for SerialEvents {
    fn fd(&self) -> RawFd {
        self.fd
    }

    fn ready(&mut self) {
        lock(&self.port).handle_events();
    }

    fn finish(&mut self) {
        lock(&self.port).finish();
    }
}

impl Port {
    fn new(config: &SerialConfig, irq: EventFd) -> Result<Self, SerialError> {
        let output = Output::open(config)?;
        let console = config.socket_path.as_deref().map(Console::listen).transpose()?;
        let epoll = Epoll::new().map_err(SerialError::Watch)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
                .map_err(|error| SerialError::Watch(error.into()))?;
        let line = irq.try_clone().map_err(SerialError::Watch)?;
        let mut port = Self {
            uart: Uart::new(Irq(line), Collected::default()),
            irq,
            limiter: config.rate_limiter.map(|bandwidth| {
                let limits = api::RateLimiter { bandwidth: Some(bandwidth), ops: None };
                RateLimiter::new(Some(&limits), Instant::now())
            }),
            silent: true,
            output,
            console,
            stdin: None,
            input: VecDeque::new(),
            held_back: Vec::new(),
            timer,
            timer_armed: false,
            epoll,
        };
        let timer_fd = std::os::fd::AsFd::as_fd(&port.timer).as_raw_fd();
        port.watch(timer_fd, TIMER, EventSet::IN).map_err(SerialError::Watch)?;
        if let Some(console) = &port.console {
            port.watch(console.fd(), LISTENER, EventSet::IN).map_err(SerialError::Watch)?;
        }
        // A stdin that can't be polled (a file, /dev/null, closed) is no input.
        if config.serial_out_path.is_none() && port.watch(libc::STDIN_FILENO, STDIN, ONCE).is_ok() {
            port.stdin = Some(Stdin::attach());
        }
        Ok(port)
    }

    fn watch(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    fn read(&mut self, offset: u64) -> u8 {
        if offset >= REGISTERS {
            UART.missed_read_count.add_one();
            return 0;
        }
        UART.read_count.add_one();
        let value = self.uart.read(offset as u8);
        if offset == DATA && !self.input.is_empty() {
            self.feed();
        }
        value
    }

    fn write(&mut self, offset: u64, value: u8) {
        if offset < REGISTERS {
            let before = self.uart.writer().0.len();
            // The only failure is an interrupt that can't be raised, and then the guest polls or doesn't.
            let _ = self.uart.write(offset as u8, value);
            // Not every write to the data register is output: there is the divisor, and loopback.
            if self.uart.writer().0.len() > before {
                self.limit(before);
            }
        } else {
            UART.missed_write_count.add_one();
        }
        // Leaving loopback mode makes room.
        if !self.input.is_empty() {
            self.feed();
        }
    }

    /// Drops the byte that was just collected behind `before` others, if the limit lets it not pass.
    fn limit(&mut self, before: usize) {
        let passed =
            self.limiter.as_mut().is_none_or(|limiter| limiter.consume(1, 0, Instant::now()).is_ok());
        if passed {
            UART.write_count.add_one();
        } else {
            self.uart.writer_mut().0.truncate(before);
            UART.rate_limiter_dropped_bytes.add_one();
        }
    }

    /// Moves input to the guest's FIFO, as far as there is room, and polls its sources again.
    fn feed(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        if room > 0 {
            let (front, _) = self.input.as_slices();
            let chunk = &front[..room.min(front.len())];
            let taken = self.uart.enqueue_raw_bytes(chunk).unwrap_or(0);
            self.input.drain(..taken);
        }
        if self.input.len() <= INPUT_BYTES / 2 {
            for token in std::mem::take(&mut self.held_back) {
                self.poll_again(token);
            }
        }
    }

    fn flush_if_due(&mut self) {
        let collected = &self.uart.writer().0;
        if collected.is_empty() {
            return;
        }
        if self.silent || collected.len() >= COLLECT_BYTES || collected.last() == Some(&b'\n') {
            self.silent = false;
            self.flush();
        } else {
            self.arm_timer(FLUSH_AFTER);
        }
    }

    fn arm_timer(&mut self, after: Duration) {
        if self.timer_armed {
            return;
        }
        let expiration = Expiration::OneShot(TimeSpec::from_duration(after));
        // Without a timer, output waits for the end of the line.
        self.timer_armed = self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok();
    }

    /// Writes out what was collected.
    fn flush(&mut self) {
        let mut collected = std::mem::take(&mut self.uart.writer_mut().0);
        if !collected.is_empty()
            && let Some(console) = &mut self.console
        {
            console.send(&collected);
        }
        UART.flush_count.add_one();
        let blocked = self.output.write(&collected);
        collected.clear();
        // Keeps the allocation.
        self.uart.writer_mut().0 = collected;
        if blocked {
            self.arm_timer(RETRY_AFTER);
        }
    }

    fn finish(&mut self) {
        self.flush();
        self.output.finish();
        self.stdin = None;
        self.console = None;
    }

    fn handle_events(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        // A failure shows again in the main loop's next round.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                TIMER => {
                    // Reads the expirations, so that the timer is not readable any more.
                    let _ = nix::unistd::read(&self.timer, &mut [0; 8]);
                    self.timer_armed = false;
                    self.flush();
                }
                LISTENER => self.accept(),
                token => self.receive(token),
            }
        }
    }

    fn accept(&mut self) {
        let Some((slot, fd)) = self.console.as_mut().and_then(Console::accept) else { return };
        if self.watch(fd, FIRST_CLIENT + slot as u64, ONCE).is_err()
            && let Some(console) = &mut self.console
        {
            console.close(slot);
        }
    }

    /// Reads input from stdin or a client, unless too much waits already.
    fn receive(&mut self, token: u64) {
        let room = INPUT_BYTES.saturating_sub(self.input.len()).min(READ_BYTES);
        if room == 0 {
            self.held_back.push(token);
            return;
        }
        let mut buffer = [0; READ_BYTES];
        let read = match (token, &mut self.stdin, &mut self.console) {
            (STDIN, Some(stdin), _) => stdin.read(&mut buffer[..room]),
            (FIRST_CLIENT.., _, Some(console)) => {
                console.receive((token - FIRST_CLIENT) as usize, &mut buffer[..room])
            }
            _ => return,
        };
        match read {
            Ok(0) => self.end(token),
            Ok(n) => {
                self.input.extend(&buffer[..n]);
                self.feed();
                self.poll_again(token);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.poll_again(token);
            }
            Err(_) => self.end(token),
        }
    }

    /// The source has ended: it is not polled again.
    fn end(&mut self, token: u64) {
        if token == STDIN {
            let _ = self.epoll.ctl(ControlOperation::Delete, libc::STDIN_FILENO, EpollEvent::default());
            self.stdin = None;
        } else if let Some(console) = &mut self.console {
            // Closing takes it out of the epoll instance.
            console.close((token - FIRST_CLIENT) as usize);
        }
    }

    fn poll_again(&mut self, token: u64) {
        let fd = if token == STDIN {
            self.stdin.as_ref().map(|_| libc::STDIN_FILENO)
        } else {
            self.console.as_ref().and_then(|console| console.client_fd((token - FIRST_CLIENT) as usize))
        };
        // A client that closed meanwhile has no descriptor to poll.
        if let Some(fd) = fd {
            let _ = self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(ONCE, token));
        }
    }
}

/// Input sources report once and are then armed again, so that one that is held back costs nothing.
const ONCE: EventSet = EventSet::IN.union(EventSet::ONE_SHOT);

const _: () = assert!(MAX_CLIENTS < 64, "each client has a token and an epoll entry");

impl Drop for Port {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests;
