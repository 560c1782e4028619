//! What a guest can do: connect, send datagrams, ping, send any frame, and see what arrives. By the kernel's own sockets in
//! the client's namespace.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    ffi::CString,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use mote_network::namespace::in_namespace;
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
    },
};

/// How long something that must arrive may take.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long is waited for something that must not arrive. (Everything is on one machine and takes microseconds.)
pub const NOTHING: Duration = Duration::from_millis(250);

fn wait(expected: bool) -> Duration {
    if expected { PATIENCE } else { NOTHING }
}

/// Opens a listening TCP socket.
pub fn listen(namespace: &str, address: SocketAddr) -> TcpListener {
    in_namespace(namespace, || TcpListener::bind(address)).unwrap().unwrap()
}

/// A connected UDP or TCP pair's ability to carry bytes is asked for by `expected`, which only chooses how long to wait.
pub fn tcp(from: &str, to: &str, address: SocketAddr, expected: bool) -> bool {
    let _listener = listen(to, address);
    in_namespace(from, || TcpStream::connect_timeout(&address, wait(expected))).unwrap().is_ok()
}

/// An open connection: client's and server's end.
pub fn connection(from: &str, to: &str, address: SocketAddr) -> (TcpStream, TcpStream) {
    let listener = listen(to, address);
    let client = in_namespace(from, || TcpStream::connect_timeout(&address, PATIENCE)).unwrap().unwrap();
    (client, listener.accept().unwrap().0)
}

/// Whether a byte gets from one end of a connection to the other.
pub fn carries(from: &mut TcpStream, to: &mut TcpStream, expected: bool) -> bool {
    from.write_all(b"x").unwrap();
    to.set_read_timeout(Some(wait(expected))).unwrap();
    matches!(to.read(&mut [0]), Ok(1))
}

/// A datagram there; with `answer`, also one back.
pub fn udp(from: &str, to: &str, address: SocketAddr, answer: bool, expected: bool) -> bool {
    let server = in_namespace(to, || UdpSocket::bind(address)).unwrap().unwrap();
    let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    let client = in_namespace(from, || UdpSocket::bind(any)).unwrap().unwrap();
    let _ = client.send_to(b"question", address);
    let mut buffer = [0; 64];
    server.set_read_timeout(Some(wait(expected))).unwrap();
    let Ok((_, peer)) = server.recv_from(&mut buffer) else { return false };
    if !answer {
        return true;
    }
    server.send_to(b"answer", peer).unwrap();
    client.set_read_timeout(Some(wait(expected))).unwrap();
    client.recv(&mut buffer).is_ok()
}

/// As [`bytes_per_second`], until it is within a share of `wanted`, or for the third time: a machine that has more to do than
/// it can makes the receiver lose, never gain.
pub fn limited_bytes_per_second(from: &str, to: &str, ip: IpAddr, least: f64) -> f64 {
    let mut best: f64 = 0.0;
    for _ in 0..3 {
        best = best.max(bytes_per_second(from, to, ip));
        if best >= least {
            break;
        }
    }
    best
}

/// What of a flood of UDP arrives, once the bucket of a limit is empty.
pub fn bytes_per_second(from: &str, to: &str, ip: IpAddr) -> f64 {
    let address = SocketAddr::new(ip, 5001);
    // The address may be translated on the way.
    let server = in_namespace(to, || UdpSocket::bind(("0.0.0.0", address.port()))).unwrap().unwrap();
    let client = in_namespace(from, || UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    client.connect(address).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // At most about 100 Mbit/s, so that the receiver loses nothing.
                for _ in 0..10 {
                    let _ = client.send(&[0; 1400]);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut buffer = [0; 2048];
        let count_for = |duration: Duration, buffer: &mut [u8]| {
            let (start, mut bytes) = (Instant::now(), 0);
            while start.elapsed() < duration {
                bytes += server.recv(buffer).unwrap();
            }
            bytes as f64 / start.elapsed().as_secs_f64()
        };
        count_for(Duration::from_millis(1500), &mut buffer);
        let rate = count_for(Duration::from_secs(2), &mut buffer);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        rate
    })
}

/// By ping(8), again and again if it is expected: a bridge drops what is for a new port until the kernel has noticed that
/// the port's link has a carrier, which on a busy machine can take longer than a request to get there.
pub fn ping(from: &str, to: IpAddr, expected: bool) -> bool {
    let to = to.to_string();
    let once = |seconds| {
        let arguments = ["netns", "exec", from, "ping", "-n", "-q", "-c", "1", "-W", seconds, &to];
        std::process::Command::new("ip").args(arguments).output().unwrap().status.success()
    };
    if !expected {
        return once("0.3");
    }
    let end = Instant::now() + PATIENCE;
    loop {
        if once("1") {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
    }
}

/// A packet socket on a link: sends and sees any frame.
pub struct Wire(OwnedFd);

impl Wire {
    pub fn open(namespace: &str, link: &str) -> Self {
        let opened = in_namespace(namespace, || {
            let protocol = SockProtocol::EthAll;
            let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
            let index = if_nametoindex(CString::new(link).unwrap().as_c_str())?;
            bind_to(&fd, index);
            nix::Result::Ok(fd)
        });
        Self(opened.unwrap().unwrap())
    }

    pub fn send(&self, frame: &[u8]) {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
    }

    /// Whether a frame with this content arrives.
    pub fn sees(&self, content: &[u8], expected: bool) -> bool {
        let end = Instant::now() + wait(expected);
        let mut buffer = [0; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = nix::sys::time::TimeVal::new(0, left.as_micros().min(900_000) as i64);
            setsockopt(&self.0, sockopt::ReceiveTimeout, &timeout).unwrap();
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    if buffer[..length].windows(content.len()).any(|window| window == content) {
                        return true;
                    }
                }
                Err(errno) => assert!(matches!(std::io::Error::from(errno).kind(), ErrorKind::WouldBlock)),
            }
        }
    }
}

fn bind_to(fd: &OwnedFd, index: u32) {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the descriptor is an open packet socket and `address` a live sockaddr_ll of the length given.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

// Frames by hand: what a hostile guest would make.

pub fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &ethertype.to_be_bytes()[..], payload].concat()
}

pub fn arp(reply: bool, sender: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4]), mark: &[u8]) -> Vec<u8> {
    let operation = if reply { 2 } else { 1 };
    [&[0, 1, 8, 0, 6, 4, 0, operation][..], &sender.0, &sender.1, &target.0, &target.1, mark].concat()
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}

pub fn ipv4(from: [u8; 4], to: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let mut header = [&[0x45, 0][..], &length, &[0, 1, 0, 0, 64, protocol, 0, 0], &from, &to].concat();
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum);
    [header, payload.to_vec()].concat()
}

/// Without a checksum (which UDP over IPv4 needs none of).
pub fn udp4(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len() as u16).to_be_bytes();
    [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &length, &[0, 0], payload].concat()
}

pub fn ipv6(from: [u8; 16], to: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let at = match next {
        58 => Some(2),
        17 => Some(6),
        _ => None,
    };
    let length = (payload.len() as u16).to_be_bytes();
    if let Some(at) = at {
        payload[at..at + 2].fill(0);
        let sum = checksum(&[&from, &to, &[0, 0], &length, &[0, 0, 0, next], &payload]);
        payload[at..at + 2].copy_from_slice(&sum);
    }
    [&[0x60, 0, 0, 0][..], &length, &[next, 255], &from, &to, &payload].concat()
}
