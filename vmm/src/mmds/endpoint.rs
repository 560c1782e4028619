//! One interface's way to the metadata: Ethernet and ARP by hand, TCP/IP by smoltcp, HTTP by [`respond`].
//!
//! Everything is driven by the thread that serves the interface: frames in ([`Endpoint::receive`]), frames out
//! ([`Endpoint::next_frame`]), time ([`Endpoint::poll`], [`Endpoint::delay`]).

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::SharedMmds;
use super::request::{MAX_REQUEST, respond};
use crate::metrics;

/// As much of a frame as [`Endpoint::wants`] looks at: Ethernet and ARP, or Ethernet and IPv4 without options.
pub const PEEK_BYTES: usize = ETHERNET_BYTES + ARP_BYTES;
const ETHERNET_BYTES: usize = 14;
/// RFC 826 with Ethernet and IPv4.
const ARP_BYTES: usize = 28;
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
/// Ethernet, IPv4, their addresses' lengths, "request".
const ARP_REQUEST: [u8; 8] = [0, 1, 0x08, 0x00, 6, 4, 0, 1];
const ARP_REPLY: u8 = 2;
/// The service's Ethernet address: Firecracker's.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
const PORT: u16 = 80;
const MTU: usize = 1500;

/// Most connections at a time, as Firecracker has it. One more ends the one that was silent longest.
const MAX_CONNECTIONS: usize = 30;
/// Most frames that wait for the guest. TCP sends again what had no room; everything else is lost.
const MAX_FRAMES: usize = 32;
/// While connections have this many bytes of answers to send, no further request is answered: memory is bounded by this
/// and one document.
const MAX_UNSENT: usize = 1 << 20;
const SEND_BUFFER: usize = 8 << 10;
/// A guest that acknowledges nothing for this long has lost its connection.
const TIMEOUT: StackDuration = StackDuration::from_secs(30);

/// The metadata service on one interface.
pub struct Endpoint {
    mmds: SharedMmds,
    address: Ipv4Addr,
    link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    listener: SocketHandle,
    connections: Vec<Connection>,
    /// Counts the frames received, to know which connection was silent longest.
    turn: u64,
    epoch: Instant,
}

struct Connection {
    handle: SocketHandle,
    received: Vec<u8>,
    unsent: Vec<u8>,
    /// Close when `unsent` is sent.
    closing: bool,
    last_active: u64,
}

impl Endpoint {
    /// Serves `mmds` at `address`.
    ///
    /// # Errors
    /// The host has no random numbers for TCP's sequence numbers.
    pub fn new(mmds: SharedMmds, address: Ipv4Addr) -> Result<Self, getrandom::Error> {
        let epoch = Instant::now();
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        let mut link = Link { incoming: None, outgoing: VecDeque::new(), guest: [0; 6] };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_le_bytes(seed);
        let mut interface = Interface::new(config, &mut link, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The list has room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 32));
        });
        // Every guest address is reached by the one link. The table has room for one route.
        let _ = interface.routes_mut().add_default_ipv4_route(address);
        let mut sockets = SocketSet::new(Vec::new());
        let listener = sockets.add(listening());
        let connections = Vec::new();
        Ok(Self { mmds, address, link, interface, sockets, listener, connections, turn: 0, epoch })
    }

    /// Whether a frame that starts so goes to the service rather than to the network: IPv4 to its address, or an ARP
    /// packet about it.
    pub fn wants(&self, start: &[u8]) -> bool {
        let Some((ethernet, payload)) = start.split_first_chunk::<ETHERNET_BYTES>() else { return false };
        let address = self.address.octets();
        if ethernet[12..] == IPV4 {
            payload.first().is_some_and(|first| first >> 4 == 4) && payload.get(16..20) == Some(&address)
        } else {
            ethernet[12..] == ARP
                && payload.get(..6) == Some(&ARP_REQUEST[..6])
                && payload.get(24..28) == Some(&address)
        }
    }

    /// Takes a whole frame from the guest, one that is [wanted](Self::wants).
    pub fn receive(&mut self, frame: &[u8], now: Instant) {
        metrics::MMDS.rx_accepted.add_one();
        let Some((ethernet, payload)) = frame.split_first_chunk::<ETHERNET_BYTES>() else {
            metrics::MMDS.rx_bad_eth.add_one();
            return;
        };
        metrics::MMDS.rx_count.add_one();
        self.turn += 1;
        self.link.guest.copy_from_slice(&ethernet[6..12]);
        if ethernet[12..] == ARP {
            self.answer_arp(payload);
        } else {
            self.link.incoming = Some(payload.to_vec());
            self.poll(now);
        }
    }

    fn answer_arp(&mut self, packet: &[u8]) {
        let Some(packet) = packet.first_chunk::<ARP_BYTES>() else { return };
        if packet[..8] != ARP_REQUEST || packet[24..28] != self.address.octets() {
            return;
        }
        let mut reply = ARP_REQUEST.to_vec();
        reply[7] = ARP_REPLY;
        reply.extend(MAC);
        reply.extend(self.address.octets());
        // Sender's addresses become the target's.
        reply.extend(&packet[8..18]);
        if self.link.has_room() {
            let frame = self.link.frame(ARP, &reply);
            self.link.outgoing.push_back(frame);
        }
    }

    /// Does what is due at `now`.
    pub fn poll(&mut self, now: Instant) {
        let time = StackInstant::from_micros((now - self.epoch).as_micros() as i64);
        self.interface.poll(time, &mut self.link, &mut self.sockets);
        // What finds no room for its answer is lost.
        self.link.incoming = None;
        self.accept();
        let mut moved = false;
        for index in 0..self.connections.len() {
            moved |= self.serve(index, now);
        }
        if moved {
            self.interface.poll(time, &mut self.link, &mut self.sockets);
        }
        self.remove_ended();
    }

    /// [Polls](Self::poll) if something is due, which is cheap to ask.
    pub fn poll_if_due(&mut self, now: Instant) {
        if self.delay(now).is_some_and(|delay| delay.is_zero()) {
            self.poll(now);
        }
    }

    /// Whether there is a frame for the guest.
    pub fn has_frames(&self) -> bool {
        !self.link.outgoing.is_empty()
    }

    /// The next frame for the guest.
    pub fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        if !self.link.has_room() {
            // The sockets may wait for the room that there will be.
            let frame = self.link.outgoing.pop_front();
            self.poll(now);
            return frame.inspect(count);
        }
        self.link.outgoing.pop_front().inspect(count)
    }

    /// Time until [`Endpoint::poll`] has something to do, if nothing else happens.
    pub fn delay(&mut self, now: Instant) -> Option<Duration> {
        if !self.link.has_room() {
            return None;
        }
        let time = StackInstant::from_micros((now - self.epoch).as_micros() as i64);
        self.interface.poll_delay(time, &self.sockets).map(Into::into)
    }

    /// Forgets all connections and frames: the guest's driver starts anew.
    pub fn reset(&mut self) {
        for connection in self.connections.drain(..) {
            self.sockets.remove(connection.handle);
            metrics::MMDS.connections_destroyed.add_one();
        }
        self.sockets.remove(self.listener);
        self.listener = self.sockets.add(listening());
        self.link.outgoing.clear();
    }

    /// A listener that was connected to becomes a connection, and there is a new one.
    fn accept(&mut self) {
        if self.sockets.get::<Socket<'_>>(self.listener).state() == State::Listen {
            return;
        }
        if self.connections.len() == MAX_CONNECTIONS {
            let silent = self.connections.iter().enumerate().min_by_key(|(_, one)| one.last_active);
            if let Some((index, _)) = silent {
                self.remove(index);
            }
        }
        metrics::MMDS.connections_created.add_one();
        self.connections.push(Connection {
            handle: self.listener,
            received: Vec::new(),
            unsent: Vec::new(),
            closing: false,
            last_active: self.turn,
        });
        self.listener = self.sockets.add(listening());
    }

    fn remove(&mut self, index: usize) {
        self.sockets.remove(self.connections.swap_remove(index).handle);
        metrics::MMDS.connections_destroyed.add_one();
    }

    fn remove_ended(&mut self) {
        for index in (0..self.connections.len()).rev() {
            let state = self.sockets.get::<Socket<'_>>(self.connections[index].handle).state();
            // Nobody connects from the same port while TIME-WAIT matters: the link neither delays nor reorders.
            if matches!(state, State::Closed | State::TimeWait) {
                self.remove(index);
            }
        }
    }

    /// Moves bytes of one connection; true if there are some to send, or an end.
    fn serve(&mut self, index: usize, now: Instant) -> bool {
        let mut budget = MAX_UNSENT.saturating_sub(self.connections.iter().map(|one| one.unsent.len()).sum());
        let connection = &mut self.connections[index];
        let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
        let mut moved = false;
        loop {
            if !connection.unsent.is_empty() {
                let Ok(sent @ 1..) = socket.send_slice(&connection.unsent) else { return moved };
                connection.unsent.drain(..sent);
                connection.last_active = self.turn;
                moved = true;
                continue;
            }
            if connection.closing {
                socket.close();
                return true;
            }
            moved |= connection.receive(socket, self.turn);
            if budget == 0 {
                return moved;
            }
            let Some(reply) = respond(&self.mmds.lock(), &connection.received, now) else {
                // An end without a request is answered with an end.
                connection.closing = !socket.may_recv() && !matches!(socket.state(), State::SynReceived);
                if connection.closing {
                    continue;
                }
                return moved;
            };
            connection.received.drain(..reply.consumed);
            budget = budget.saturating_sub(reply.bytes.len());
            connection.closing = !reply.keep_alive;
            connection.unsent = reply.bytes;
        }
    }
}

impl Connection {
    /// Takes what came, up to the longest request.
    fn receive(&mut self, socket: &mut Socket<'_>, turn: u64) -> bool {
        let mut moved = false;
        while socket.can_recv() && self.received.len() < MAX_REQUEST {
            let room = MAX_REQUEST - self.received.len();
            let taken = socket.recv(|bytes| {
                let taken = bytes.len().min(room);
                self.received.extend_from_slice(&bytes[..taken]);
                (taken, taken)
            });
            if !matches!(taken, Ok(1..)) {
                break;
            }
            self.last_active = turn;
            moved = true;
        }
        moved
    }
}

fn listening() -> Socket<'static> {
    let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
    let mut socket = Socket::new(buffer(MAX_REQUEST), buffer(SEND_BUFFER));
    socket.set_timeout(Some(TIMEOUT));
    socket.set_nagle_enabled(false);
    // Acknowledging at once costs a frame now and then and saves a timer.
    socket.set_ack_delay(None);
    // A new socket listens on any port but 0.
    let _ = socket.listen(PORT);
    socket
}

#[expect(clippy::ptr_arg, reason = "what `inspect` passes")]
fn count(frame: &Vec<u8>) {
    metrics::MMDS.tx_frames.add_one();
    metrics::MMDS.tx_count.add_one();
    metrics::MMDS.tx_bytes.add(frame.len() as u64);
}

/// Frames between the interface and smoltcp.
struct Link {
    /// The IP packet that is being received.
    incoming: Option<Vec<u8>>,
    /// Frames for the guest.
    outgoing: VecDeque<Vec<u8>>,
    /// The guest's Ethernet address: the last one that it used.
    guest: [u8; 6],
}

impl Link {
    fn has_room(&self) -> bool {
        self.outgoing.len() < MAX_FRAMES
    }

    fn frame(&self, kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
        [&self.guest[..], &MAC, &kind, payload].concat()
    }
}

/// A received packet.
struct Packet(Vec<u8>);

/// The right to send one.
struct Sending<'a>(&'a mut Link);

impl phy::Device for Link {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _timestamp: StackInstant) -> Option<(Packet, Sending<'_>)> {
        let packet = self.has_room().then(|| self.incoming.take()).flatten()?;
        Some((Packet(packet), Sending(self)))
    }

    fn transmit(&mut self, _timestamp: StackInstant) -> Option<Sending<'_>> {
        self.has_room().then_some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // With checksum offload the guest leaves TCP's to the device; the wire is memory.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl phy::RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = self.0.frame(IPV4, &[]);
        frame.resize(ETHERNET_BYTES + length, 0);
        let result = f(&mut frame[ETHERNET_BYTES..]);
        self.0.outgoing.push_back(frame);
        result
    }
}

#[cfg(test)]
mod tests;
