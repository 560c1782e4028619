//! Services that a serving guest needs, just enough of them, in the network namespace of the calling thread.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::thread;

/// Gives every DHCP client (RFC 2131) the address `guest`, with `server` as its router (a /24), and answers every request
/// to port 80 of `server` with an empty document. The threads live as long as the process.
///
/// # Panics
/// The ports can't be had.
pub fn dhcp_and_metadata(guest: Ipv4Addr, server: Ipv4Addr) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 67)).expect("port 67 of an own namespace");
    socket.set_broadcast(true).expect("a socket option");
    thread::spawn(move || {
        let mut packet = [0; 1500];
        while let Ok((length, _)) = socket.recv_from(&mut packet) {
            // Option 53 is the first of smoltcp's options.
            if length < 243 || packet[240] != 53 {
                continue;
            }
            let kind = if packet[242] == 1 { 2 } else { 5 };
            let mut reply = packet[..240].to_vec();
            reply[0] = 2;
            reply[16..20].copy_from_slice(&guest.octets());
            let [a, b, c, d] = server.octets();
            reply.extend_from_slice(&[53, 1, kind, 54, 4, a, b, c, d, 51, 4, 0, 0, 14, 16]);
            // Mask, and the metadata address (RFC 3442) through the server.
            reply.extend_from_slice(&[1, 4, 255, 255, 255, 0, 121, 14, 32, 169, 254, 169, 254, a, b, c, d]);
            reply.extend_from_slice(&[0, a, b, c, d, 255]);
            let _ = socket.send_to(&reply, (Ipv4Addr::BROADCAST, 68));
        }
    });
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).expect("port 80 of an own namespace");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        }
    });
}
