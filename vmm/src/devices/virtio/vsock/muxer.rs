//! All connections of a device: which packet belongs to which, who may connect, and in which order packets go to the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Fate};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::metrics::VsockMetrics;

/// Most connections at a time, with those that have not said yet where to (as in Firecracker).
pub const MAX_CONNECTIONS: usize = 1023;
/// Most resets that wait for room in the guest's queue; the guest is not listened to while there are so many.
pub const MAX_RESETS: usize = 256;
/// First port of the host for connections that the host makes (as in Firecracker).
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Longest `CONNECT PORT\n`.
const MAX_CONNECT_LINE: usize = 32;
/// Events taken at a time.
const EVENTS: usize = 16;

/// epoll tokens that are no stream's.
pub const LISTENER: u64 = 0;
/// The receive queue was notified.
pub const RECEIVE_KICK: u64 = 1;
/// The transmit queue was notified.
pub const TRANSMIT_KICK: u64 = 2;
/// The worker shall end.
pub const STOP: u64 = 3;
/// The event queue was notified.
pub const EVENT_KICK: u64 = 4;
const FIRST_TOKEN: u64 = 5;

/// A connection as the guest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// A reset that waits for room.
#[derive(Debug, Clone, Copy)]
struct Reset {
    ports: Ports,
    /// Whom the guest has addressed.
    cid: u64,
    kind: u16,
}

/// Whose a stream is.
enum Stream {
    /// It has not said yet where to.
    Undecided(UnixStream),
    Connection(Ports),
}

/// The connections.
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    listener: Arc<UnixListener>,
    epoll: Epoll,
    connections: HashMap<Ports, Connection>,
    streams: HashMap<u64, Stream>,
    next_token: u64,
    next_port: u32,
    /// Connections that may have a packet for the guest, each at most once.
    ready: VecDeque<Ports>,
    resets: VecDeque<Reset>,
    metrics: Arc<VsockMetrics>,
}

/// Events of descriptors that are not the muxer's.
#[derive(Debug, Default, Clone, Copy)]
pub struct Woken {
    /// The driver has supplied receive buffers.
    pub receive: bool,
    /// The driver has sent packets.
    pub transmit: bool,
    /// The driver has supplied buffers for events.
    pub event: bool,
    /// The worker shall end.
    pub stop: bool,
}

impl Muxer {
    /// Over the listening socket at `path`; `others` are watched, too, by the tokens above.
    ///
    /// # Errors
    /// As epoll_create(2) and epoll_ctl(2).
    pub fn new(
        guest_cid: u64,
        path: PathBuf,
        listener: Arc<UnixListener>,
        others: &[(RawFd, u64)],
        metrics: Arc<VsockMetrics>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let listening = [(listener.as_raw_fd(), LISTENER)];
        for &(fd, token) in others.iter().chain(&listening) {
            // Edge-triggered: an eventfd need not be read, and nobody spins when no more connections may come.
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token),
            )?;
        }
        Ok(Self {
            guest_cid,
            path,
            listener,
            epoll,
            connections: HashMap::new(),
            streams: HashMap::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            metrics,
        })
    }

    /// Also watches for the worker being stopped.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch_stop(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, STOP);
        self.epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event)
    }

    /// Waits for events (not at all, or until the next deadline) and serves those of streams.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub fn wait(&mut self, block: bool) -> io::Result<Woken> {
        let now = Instant::now();
        let next = self.connections.values().filter_map(Connection::deadline).min();
        let millis = match next.map(|deadline| deadline.saturating_duration_since(now).as_millis() + 1) {
            _ if !block => 0,
            None => -1,
            Some(millis) => i32::try_from(millis).unwrap_or(i32::MAX),
        };
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(millis, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut woken = Woken::default();
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(),
                RECEIVE_KICK => woken.receive = true,
                TRANSMIT_KICK => woken.transmit = true,
                EVENT_KICK => woken.event = true,
                STOP => woken.stop = true,
                token => self.stream_event(token, event.event_set()),
            }
        }
        if next.is_some() {
            self.end_overdue();
        }
        Ok(woken)
    }

    fn end_overdue(&mut self) {
        let now = Instant::now();
        let overdue = self.connections.iter().filter(|(_, connection)| connection.is_overdue(now));
        let overdue: Vec<Ports> = overdue.map(|(ports, _)| *ports).collect();
        for ports in overdue {
            self.apply(ports, Fate::Reset);
        }
    }

    /// Takes the host's new streams, as many as may be.
    fn accept(&mut self) {
        while self.streams.len() < MAX_CONNECTIONS {
            let Ok((stream, _)) = self.listener.accept() else { return };
            let Ok(token) = self.watch(&stream) else { continue };
            self.streams.insert(token, Stream::Undecided(stream));
            // The line may be there already; the edge comes in any case, so this is only sooner.
            self.read_connect_line(token);
        }
    }

    fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        stream.set_nonblocking(true)?;
        let token = self.next_token;
        self.next_token += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(events, token))?;
        Ok(token)
    }

    fn stream_event(&mut self, token: u64, events: EventSet) {
        match self.streams.get(&token) {
            None => {}
            Some(Stream::Undecided(_)) => self.read_connect_line(token),
            Some(Stream::Connection(ports)) => {
                let ports = *ports;
                let Some(connection) = self.connections.get_mut(&ports) else { return };
                let fate = connection.event(events);
                self.apply(ports, fate);
            }
        }
    }

    /// Takes `CONNECT PORT\n` from a stream once it is there, and not a byte more: data may follow at once.
    fn read_connect_line(&mut self, token: u64) {
        let Some(Stream::Undecided(stream)) = self.streams.get(&token) else { return };
        match connect_line(stream) {
            Ok(None) => {}
            Ok(Some(port)) => {
                let Some(Stream::Undecided(stream)) = self.streams.remove(&token) else { return };
                let ports = Ports { host: self.free_host_port(port), guest: port };
                self.streams.insert(token, Stream::Connection(ports));
                self.insert(ports, Connection::requested(stream, token, Instant::now()));
            }
            Err(_) => self.close(token),
        }
    }

    /// There are far fewer connections than ports.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = if host == (FIRST_HOST_PORT << 1) - 1 { FIRST_HOST_PORT } else { host + 1 };
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, ports: Ports, connection: Connection) {
        self.metrics.conns_added.add_one();
        self.connections.insert(ports, connection);
        self.apply(ports, Fate::Lives);
    }

    /// Forgets a stream, and accepts one that had to wait for its place.
    fn close(&mut self, token: u64) {
        let was_full = self.streams.len() >= MAX_CONNECTIONS;
        // Closing the descriptor takes it out of the epoll set.
        self.streams.remove(&token);
        if was_full {
            self.accept();
        }
    }

    fn apply(&mut self, ports: Ports, fate: Fate) {
        if fate == Fate::Lives {
            if let Some(connection) = self.connections.get_mut(&ports)
                && !connection.listed
                && connection.has_packet()
            {
                connection.listed = true;
                self.ready.push_back(ports);
            }
            return;
        }
        if let Some(connection) = self.connections.remove(&ports) {
            self.metrics.conns_removed.add_one();
            self.close(connection.token);
            if fate == Fate::Reset {
                self.reset(Reset { ports, cid: HOST_CID, kind: TYPE_STREAM });
            }
        }
    }

    fn reset(&mut self, reset: Reset) {
        // The guest isn't listened to while the list is full; what the host's side adds is bounded by its connections.
        if self.resets.len() < MAX_RESETS + MAX_CONNECTIONS {
            self.resets.push_back(reset);
        }
    }

    /// Whether packets of the guest may be taken.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// A packet of the guest with the data behind its header.
    pub fn receive(&mut self, header: &Header, data: &mut GuestBuffers) {
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let to_host = header.src_cid == self.guest_cid && header.dst_cid == HOST_CID;
        let whole = data.bytes() >= header.len as usize;
        if !to_host || header.kind != TYPE_STREAM {
            // virtio 1.2 §5.10.6.4: a socket type that isn't there is answered with RST, and so is a wrong address.
            if header.op != op::RST {
                self.reset(Reset { ports, cid: header.dst_cid, kind: header.kind });
            }
        } else if !whole {
            self.apply(ports, Fate::Reset);
        } else if self.connections.contains_key(&ports) {
            data.truncate(header.len as usize);
            let Some(connection) = self.connections.get_mut(&ports) else { return };
            let fate = connection.receive(header, data, ports.host);
            self.apply(ports, fate);
        } else if header.op == op::REQUEST {
            self.connect(ports, header);
        } else if header.op != op::RST {
            self.reset(Reset { ports, cid: HOST_CID, kind: TYPE_STREAM });
        }
    }

    /// The guest wants to connect to a port of the host: to the socket of that name.
    fn connect(&mut self, ports: Ports, request: &Header) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let connected = (self.streams.len() < MAX_CONNECTIONS)
            .then(|| connect_nonblocking(&path).ok())
            .flatten()
            .and_then(|stream| Some((self.watch(&stream).ok()?, stream)));
        match connected {
            Some((token, stream)) => {
                self.streams.insert(token, Stream::Connection(ports));
                self.insert(ports, Connection::accepted(stream, token, request));
            }
            None => self.reset(Reset { ports, cid: HOST_CID, kind: TYPE_STREAM }),
        }
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, into `room`; its length, or None if there is none after all.
    pub fn next_packet(&mut self, room: &mut GuestBuffers, data: &mut GuestBuffers) -> Option<usize> {
        if let Some(Reset { ports, cid, kind }) = self.resets.pop_front() {
            let header = Header { src_cid: cid, kind, op: op::RST, ..self.header(ports) };
            room.write_at(0, &header.to_bytes());
            return Some(HEADER_BYTES);
        }
        room.split_last(room.bytes() - HEADER_BYTES, data);
        while let Some(ports) = self.ready.pop_front() {
            let mut header = self.header(ports);
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            connection.listed = false;
            let packet = connection.next_packet(data, Instant::now());
            if let Some((operation, flags, len)) = packet {
                (header.op, header.flags, header.len) = (operation, flags, len);
                connection.tell_credit(&mut header);
            }
            self.apply(ports, Fate::Lives);
            if packet.is_some() {
                room.write_at(0, &header.to_bytes());
                return Some(HEADER_BYTES + header.len as usize);
            }
        }
        None
    }

    fn header(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }
}

/// Connects without waiting; a listener whose queue is full is one that isn't there.
fn connect_nonblocking(path: &std::ffi::OsStr) -> nix::Result<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd.into())
}

/// The port of a `CONNECT PORT\n` at the start of the stream, which is taken then; None if it isn't complete yet.
fn connect_line(stream: &UnixStream) -> io::Result<Option<u32>> {
    let refused = || io::Error::from(io::ErrorKind::InvalidData);
    let mut line = [0; MAX_CONNECT_LINE];
    let seen = match recv(stream.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK) {
        Ok(0) => return Err(refused()),
        Ok(seen) => seen,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let Some(end) = line[..seen].iter().position(|byte| *byte == b'\n') else {
        return if seen < MAX_CONNECT_LINE { Ok(None) } else { Err(refused()) };
    };
    let text = std::str::from_utf8(&line[..end]).map_err(|_| refused())?;
    let mut words = text.split_whitespace();
    let command = words.next().filter(|word| word.eq_ignore_ascii_case("connect"));
    let port = command.and(words.next()).and_then(|word| word.parse().ok()).ok_or_else(refused)?;
    // It was there a moment ago, and nobody else reads.
    if recv(stream.as_raw_fd(), &mut line[..=end], MsgFlags::empty())? != end + 1 {
        return Err(refused());
    }
    Ok(Some(port))
}
