//! One connection: a stream of the host on one side, packets on the other.
//!
//! ```text
//!   host connects ──► Requested ──RESPONSE──► Open ──both sides done──► gone (RST)
//!   guest connects ───────────────────────────►┘
//! ```
//! What the guest sends and the host does not take is kept in a buffer of [`BUFFER_BYTES`]; the guest is told how much room
//! there is (virtio 1.2 §5.10.6.3) and a guest that sends more loses the connection. What the host sends stays in its
//! socket until the guest has room.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::devices::virtio::buffers::GuestBuffers;

/// Room for what the guest sends (`buf_alloc`).
pub const BUFFER_BYTES: u32 = 64 << 10;
/// Most data of one packet to the guest.
const MAX_DATA: usize = 64 << 10;
/// How long a guest may take to answer a request, or to let go of a connection that the host has closed.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest has not answered yet.
    Requested,
    /// Data may flow.
    Open,
}

/// What is to become of a connection after something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over, and the guest must be told.
    Reset,
    /// It is over, and the guest knows.
    Gone,
}

/// Packets without data that wait for room in the guest's queue.
#[derive(Debug, Default, Clone, Copy)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// Flags of a `SHUTDOWN`; 0 is none.
    shutdown: u32,
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    /// Names the stream in epoll.
    pub token: u64,
    /// It is in the muxer's list of those that may have a packet.
    pub listed: bool,
    state: State,
    pending: Pending,
    /// The stream may have data; cleared when it had none.
    readable: bool,
    /// The host's user has closed its side altogether.
    hung_up: bool,
    /// The host sends no more.
    host_done: bool,
    /// The host takes no more; data of the guest is thrown away.
    host_deaf: bool,
    /// Directions that the guest has shut down.
    guest_done: u32,
    buffer: VecDeque<u8>,
    /// Bytes from the guest, and of them those that have left the buffer, and that number as last told to the guest.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes to the guest, and what the guest said about its side.
    sent: Wrapping<u32>,
    peer_forwarded: Wrapping<u32>,
    peer_room: u32,
    /// When patience ends.
    deadline: Option<Instant>,
}

impl Connection {
    /// The guest connects: over a stream to the host's listener.
    pub fn accepted(stream: UnixStream, token: u64, request: &Header) -> Self {
        let mut connection = Self::new(stream, token, State::Open);
        connection.pending.response = true;
        connection.note_credit(request);
        connection
    }

    /// The host connects: the guest is asked.
    pub fn requested(stream: UnixStream, token: u64, now: Instant) -> Self {
        let mut connection = Self::new(stream, token, State::Requested);
        connection.pending.request = true;
        connection.deadline = Some(now + PATIENCE);
        connection
    }

    fn new(stream: UnixStream, token: u64, state: State) -> Self {
        Self {
            stream,
            token,
            listed: false,
            state,
            pending: Pending::default(),
            readable: true,
            hung_up: false,
            host_done: false,
            host_deaf: false,
            guest_done: 0,
            buffer: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_forwarded: Wrapping(0),
            peer_room: 0,
            deadline: None,
        }
    }

    /// When something is to be done at the latest.
    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_room = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        let under_way = (self.sent - self.peer_forwarded).0;
        self.peer_room.saturating_sub(under_way) as usize
    }

    /// Whether the guest should get a packet, as far as is known without reading the stream.
    pub fn has_packet(&self) -> bool {
        let Pending { request, response, credit_update, credit_request, shutdown } = self.pending;
        request || response || credit_update || credit_request || shutdown != 0 || self.may_read()
    }

    fn may_read(&self) -> bool {
        self.state == State::Open
            && !self.pending.response
            && self.readable
            && !self.host_done
            && self.guest_done & SHUTDOWN_RECEIVE == 0
            && self.credit() > 0
    }

    /// A packet from the guest with its data. `local_port` is told to a host that asked for the connection.
    pub fn receive(&mut self, header: &Header, data: &mut GuestBuffers, local_port: u32) -> Fate {
        self.note_credit(header);
        match (self.state, header.op) {
            (State::Requested, op::RESPONSE) => {
                self.state = State::Open;
                self.deadline = None;
                // The stream is fresh, so that its buffer takes a line.
                match self.stream.write_all(format!("OK {local_port}\n").as_bytes()) {
                    Ok(()) => Fate::Lives,
                    Err(_) => Fate::Reset,
                }
            }
            (_, op::RST) => Fate::Gone,
            (State::Open, op::RW) => self.take_data(data),
            (State::Open, op::SHUTDOWN) => self.guest_shuts_down(header.flags & SHUTDOWN_BOTH),
            (State::Open, op::CREDIT_UPDATE) => Fate::Lives,
            (State::Open, op::CREDIT_REQUEST) => {
                self.pending.credit_update = true;
                Fate::Lives
            }
            // A second request, an answer to none, or something that doesn't exist.
            _ => Fate::Reset,
        }
    }

    fn take_data(&mut self, data: &mut GuestBuffers) -> Fate {
        let len = data.bytes();
        let room = BUFFER_BYTES as usize - self.buffer.len();
        if len > room || self.guest_done & SHUTDOWN_SEND != 0 {
            return Fate::Reset;
        }
        self.received += Wrapping(len as u32);
        if self.host_deaf {
            self.forwarded = self.received;
            return Fate::Lives;
        }
        if self.buffer.is_empty() {
            match data.writev(self.stream.as_fd()) {
                Ok(n) => {
                    self.forwarded += Wrapping(n as u32);
                    data.skip_front(n);
                }
                Err(error) if would_block(&error) => {}
                Err(_) => {
                    self.host_stops_listening();
                    return Fate::Lives;
                }
            }
        }
        let old = self.buffer.len();
        self.buffer.resize(old + data.bytes(), 0);
        // A deque that was only appended to and cleared in order may be in two parts.
        let bytes = self.buffer.make_contiguous();
        data.read_at(0, &mut bytes[old..]);
        self.want_credit_update();
        Fate::Lives
    }

    /// Nothing that the guest sends will be taken any more.
    fn host_stops_listening(&mut self) {
        self.host_deaf = true;
        self.buffer.clear();
        self.forwarded = self.received;
        self.pending.shutdown |= SHUTDOWN_RECEIVE;
        self.want_credit_update();
    }

    /// Tells the guest of room when it may believe that there is less than half.
    fn want_credit_update(&mut self) {
        let believed_used = (self.received - self.told).0;
        if self.forwarded != self.told && believed_used > BUFFER_BYTES / 2 {
            self.pending.credit_update = true;
        }
    }

    fn guest_shuts_down(&mut self, flags: u32) -> Fate {
        self.guest_done |= flags;
        if self.guest_done & SHUTDOWN_RECEIVE != 0 {
            // Fails only if the host's side is gone, too.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.settle()
    }

    /// What follows when the buffer is empty.
    fn settle(&mut self) -> Fate {
        if !self.buffer.is_empty() || self.guest_done & SHUTDOWN_SEND == 0 {
            return Fate::Lives;
        }
        // Fails only if the host's side is gone.
        let _ = self.stream.shutdown(Shutdown::Write);
        // virtio 1.2 §5.10.6.5: a receiver of both flags, or of one after it sent the other, ends with RST.
        if self.guest_done == SHUTDOWN_BOTH || self.host_done { Fate::Reset } else { Fate::Lives }
    }

    /// Something happened on the host's side.
    pub fn event(&mut self, events: EventSet) -> Fate {
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) && !self.hung_up {
            self.hung_up = true;
            if self.state == State::Requested {
                return Fate::Reset;
            }
            if self.host_done {
                self.pending.shutdown = SHUTDOWN_BOTH;
            }
        }
        if events.contains(EventSet::OUT) { self.flush() } else { Fate::Lives }
    }

    fn flush(&mut self) -> Fate {
        while !self.buffer.is_empty() {
            match self.stream.write(self.buffer.as_slices().0) {
                Ok(n) => {
                    self.buffer.drain(..n);
                    self.forwarded += Wrapping(n as u32);
                }
                Err(error) if would_block(&error) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.host_stops_listening(),
            }
        }
        self.want_credit_update();
        self.settle()
    }

    /// Patience is over if the deadline is.
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// The next packet for the guest, with its data in `room`: operation, flags and length of the data. None if the
    /// stream turns out to have none.
    pub fn next_packet(&mut self, room: &mut GuestBuffers, now: Instant) -> Option<(u16, u32, u32)> {
        if std::mem::take(&mut self.pending.request) {
            return Some((op::REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.pending.response) {
            return Some((op::RESPONSE, 0, 0));
        }
        if self.may_read()
            && let Some(len) = self.read_stream(room)
        {
            return Some((op::RW, 0, len));
        }
        let shutdown = std::mem::take(&mut self.pending.shutdown);
        if shutdown != 0 {
            if shutdown == SHUTDOWN_BOTH {
                self.deadline = Some(now + PATIENCE);
            }
            return Some((op::SHUTDOWN, shutdown, 0));
        }
        if std::mem::take(&mut self.pending.credit_update) {
            return Some((op::CREDIT_UPDATE, 0, 0));
        }
        std::mem::take(&mut self.pending.credit_request).then_some((op::CREDIT_REQUEST, 0, 0))
    }

    /// Data for the guest, as much as it has room for; None if there is none now or ever.
    fn read_stream(&mut self, room: &mut GuestBuffers) -> Option<u32> {
        let limit = self.credit().min(MAX_DATA).min(room.bytes());
        if limit == 0 {
            return None;
        }
        room.truncate(limit);
        match room.readv(self.stream.as_fd()) {
            Ok(0) => {
                self.host_done = true;
                let flags = if self.hung_up || self.host_deaf { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                self.pending.shutdown |= flags;
                None
            }
            Ok(n) => {
                self.sent += Wrapping(n as u32);
                self.pending.credit_request = self.credit() == 0;
                Some(n as u32)
            }
            Err(error) if would_block(&error) => {
                self.readable = false;
                None
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => None,
            Err(_) => {
                self.host_done = true;
                self.pending.shutdown = SHUTDOWN_BOTH;
                None
            }
        }
    }

    /// Puts this side's credit into a header that is about to be sent.
    pub fn tell_credit(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER_BYTES;
        header.fwd_cnt = self.forwarded.0;
        self.told = self.forwarded;
        self.pending.credit_update = false;
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}
