//! The device with a driver that writes packets by hand, and real Unix sockets on the host's side.

use std::io::{Read, Write};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::devices::virtio::F_EVENT_IDX;
use crate::devices::virtio::testing::{BUFFERS, Driver, SIZE, WRITE, hostile};
use crate::snapshot::Stateful;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const CID: u64 = 3;
const GUEST_PORT: u32 = 1234;
const HOST_PORT: u32 = 52;
/// Where packets of the guest are put, and the receive buffers.
const SENT: u64 = BUFFERS;
const ROOM: u64 = BUFFERS + 0x4_0000;
const ROOM_BYTES: u32 = 4096;
const PEER_ROOM: u32 = 1 << 20;

/// A guest that keeps its receive queue filled.
struct Guest {
    driver: Driver,
    directory: TempDir,
    given: u64,
    /// What the guest tells of its side.
    forwarded: u32,
    room: u32,
}

impl Guest {
    fn new(features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let uds_path = directory.path().join("v.sock");
        let config = mote_vmm_api::Vsock { vsock_id: None, guest_cid: CID as u32, uds_path };
        let driver = Driver::running(Box::new(Vsock::open(&config).unwrap()), features);
        let mut guest = Self { driver, directory, given: 0, forwarded: 0, room: PEER_ROOM };
        for _ in 0..SIZE {
            guest.give_buffer();
        }
        guest
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.directory.path().join(format!("v.sock{suffix}"))
    }

    fn give_buffer(&mut self) {
        let at = ROOM + self.given % u64::from(SIZE) * u64::from(ROOM_BYTES);
        self.given += 1;
        self.driver.chain(RX, &[(at, ROOM_BYTES, WRITE)]);
        self.driver.kick(RX);
    }

    fn send_header(&mut self, header: Header, data: &[u8]) {
        self.driver.fill(SENT, &header.to_bytes());
        self.driver.fill(SENT + 0x100, data);
        let mut parts = vec![(SENT, HEADER_BYTES as u32, 0)];
        if !data.is_empty() {
            parts.push((SENT + 0x100, data.len() as u32, 0));
        }
        self.driver.chain(TX, &parts);
        self.driver.kick(TX);
        self.driver.wait_used(TX);
    }

    fn header(&self, host_port: u32, operation: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: host_port,
            kind: TYPE_STREAM,
            op: operation,
            buf_alloc: self.room,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    fn send(&mut self, host_port: u32, operation: u16, flags: u32, data: &[u8]) {
        let header = Header { flags, len: data.len() as u32, ..self.header(host_port, operation) };
        self.send_header(header, data);
    }

    fn taken(&mut self, (head, len): (u32, u32)) -> (Header, Vec<u8>) {
        let at = ROOM + u64::from(head) * u64::from(ROOM_BYTES);
        let bytes = self.driver.bytes(at, len as usize);
        self.give_buffer();
        let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
        assert_eq!((header.dst_cid, header.kind), (CID, TYPE_STREAM));
        (header, bytes[HEADER_BYTES..].to_vec())
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(RX);
        self.taken(used)
    }

    fn expect(&mut self, operation: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, operation, "{header:?}");
        header
    }

    fn quiet(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(20));
        self.driver.used(RX).is_none()
    }

    /// A connection that the guest has made, and the host's end.
    fn connected(&mut self) -> UnixStream {
        let listener = UnixListener::bind(self.path("_52")).unwrap();
        self.send(HOST_PORT, op::REQUEST, 0, &[]);
        let header = self.expect(op::RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (HOST_PORT, GUEST_PORT));
        assert_eq!(header.buf_alloc, BUFFER_BYTES);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// A connection that the host has made, and the host's port.
    fn asked(&mut self) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(self.path("")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // What follows the line at once is already data.
        stream.write_all(b"CONNECT 1234\nearly").unwrap();
        let header = self.expect(op::REQUEST);
        assert_eq!(header.dst_port, GUEST_PORT);
        self.send(header.src_port, op::RESPONSE, 0, &[]);
        let mut line = vec![0; format!("OK {}\n", header.src_port).len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", header.src_port).into_bytes());
        (stream, header.src_port)
    }
}

#[test]
fn the_guest_connects_to_the_socket_of_the_port_and_data_flows_both_ways() {
    for features in [0, F_EVENT_IDX] {
        let mut guest = Guest::new(features);
        let mut host = guest.connected();
        guest.send(HOST_PORT, op::RW, 0, b"from the guest");
        let mut bytes = [0; 14];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"from the guest");
        host.write_all(b"from the host").unwrap();
        let (header, data) = guest.receive();
        assert_eq!((header.op, &data[..]), (op::RW, &b"from the host"[..]));
        assert_eq!(header.fwd_cnt, 14);
    }
}

#[test]
fn the_host_connects_by_a_line_and_reads_the_port_it_was_given() {
    let mut guest = Guest::new(0);
    let (mut host, port) = guest.asked();
    assert!(port >= 1 << 30);
    let (header, data) = guest.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"early"[..]));
    guest.send(port, op::RW, 0, b"answer");
    let mut bytes = [0; 6];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
}

#[test]
fn without_a_listener_the_guest_is_refused() {
    let mut guest = Guest::new(0);
    guest.send(HOST_PORT, op::REQUEST, 0, &[]);
    let header = guest.expect(op::RST);
    assert_eq!((header.src_port, header.dst_port, header.src_cid), (HOST_PORT, GUEST_PORT, HOST_CID));
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_and_resets_with_nothing() {
    let mut guest = Guest::new(0);
    guest.send(HOST_PORT, op::RST, 0, &[]);
    assert!(guest.quiet());
    for operation in [op::RW, op::SHUTDOWN, op::CREDIT_REQUEST, 77] {
        guest.send(HOST_PORT, operation, 0, &[]);
        guest.expect(op::RST);
    }
    // For another host, or from another guest.
    guest.send_header(Header { dst_cid: 99, ..guest.header(HOST_PORT, op::REQUEST) }, &[]);
    assert_eq!(guest.expect(op::RST).src_cid, 99);
    guest.send_header(Header { src_cid: 99, ..guest.header(HOST_PORT, op::REQUEST) }, &[]);
    guest.expect(op::RST);
}

#[test]
fn a_line_that_is_none_closes_the_stream_and_a_guest_that_refuses_does_too() {
    let mut guest = Guest::new(0);
    for line in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "HELLO 1\n",
        "CONNECT 1 CONNECT 1 CONNECT 1 CONNECT 1",
    ] {
        let mut host = UnixStream::connect(guest.path("")).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        // The end, or a reset where unread bytes were left behind.
        assert!(!matches!(host.read(&mut [0; 8]), Ok(1..)), "{line:?}");
    }
    let mut host = UnixStream::connect(guest.path("")).unwrap();
    host.write_all(b"connect ").unwrap();
    assert!(guest.quiet());
    host.write_all(b"7\n").unwrap();
    let header = guest.expect(op::REQUEST);
    let refusal = Header { src_port: 7, ..guest.header(header.src_port, op::RST) };
    guest.send_header(refusal, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_guest_that_does_not_answer_loses_the_request() {
    let mut guest = Guest::new(0);
    let mut host = UnixStream::connect(guest.path("")).unwrap();
    host.write_all(b"CONNECT 7\n").unwrap();
    guest.expect(op::REQUEST);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    guest.expect(op::RST);
}

#[test]
fn what_the_host_does_not_take_is_kept_up_to_the_credit_and_more_is_a_reset() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    let piece = [5; 4096];
    // A well-behaved guest stops at its credit: what was sent less what is told as taken. A greedy one goes on.
    let mut sent = 0;
    let reset = loop {
        guest.send(HOST_PORT, op::RW, 0, &piece);
        sent += piece.len();
        if let Some(used) = guest.driver.used(RX) {
            let (header, _) = guest.taken(used);
            if header.op == op::RST {
                break header;
            }
            assert_eq!(header.op, op::CREDIT_UPDATE);
        }
        assert!(sent < 16 << 20, "nothing bounds what is kept");
    };
    assert_eq!(reset.src_port, HOST_PORT);
    let mut kept = Vec::new();
    host.read_to_end(&mut kept).unwrap();
    assert!(kept.iter().all(|byte| *byte == 5) && kept.len() < sent);
}

#[test]
fn the_guest_is_told_when_the_host_has_taken_its_data() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    // Fill the socket and half of the buffer behind it, which no update can have announced.
    let piece = [6; 4096];
    let (mut sent, mut told) = (0u32, 0u32);
    while sent.wrapping_sub(told) + 4096 <= BUFFER_BYTES {
        guest.send(HOST_PORT, op::RW, 0, &piece);
        sent += 4096;
        while let Some(used) = guest.driver.used(RX) {
            let (header, _) = guest.taken(used);
            assert_eq!(header.op, op::CREDIT_UPDATE);
            told = header.fwd_cnt;
        }
    }
    let mut bytes = vec![0; sent as usize];
    host.read_exact(&mut bytes).unwrap();
    while told != sent {
        let header = guest.expect(op::CREDIT_UPDATE);
        assert!(header.fwd_cnt > told);
        told = header.fwd_cnt;
        if sent - told <= BUFFER_BYTES / 2 {
            break;
        }
    }
    guest.send(HOST_PORT, op::CREDIT_REQUEST, 0, &[]);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).fwd_cnt, sent);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new(0);
    guest.room = 100;
    let mut host = guest.connected();
    host.write_all(&[7; 250]).unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, data.len()), (op::RW, 100));
    guest.expect(op::CREDIT_REQUEST);
    assert!(guest.quiet());
    guest.forwarded = 60;
    guest.send(HOST_PORT, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.receive().1.len(), 60);
    guest.expect(op::CREDIT_REQUEST);
    // Nonsense is no room.
    guest.forwarded = 1_000_000;
    guest.send(HOST_PORT, op::CREDIT_UPDATE, 0, &[]);
    assert!(guest.quiet());
    guest.forwarded = 160;
    guest.send(HOST_PORT, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.receive().1.len(), 90);
}

#[test]
fn when_the_host_closes_the_guest_gets_what_was_written_and_the_end() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    host.write_all(b"last words").unwrap();
    drop(host);
    assert_eq!(guest.receive().1, b"last words");
    let flags = guest.expect(op::SHUTDOWN).flags;
    assert_eq!(flags, SHUTDOWN_BOTH);
    guest.send(HOST_PORT, op::RST, 0, &[]);
    assert!(guest.quiet());
    // The connection is gone, so that its ports may be used again.
    std::fs::remove_file(guest.path("_52")).unwrap();
    guest.connected();
}

#[test]
fn a_guest_that_keeps_a_closed_connection_is_reset_after_a_while() {
    let mut guest = Guest::new(0);
    drop(guest.connected());
    guest.expect(op::SHUTDOWN);
    guest.expect(op::RST);
}

#[test]
fn one_direction_may_end_before_the_other() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(HOST_PORT, op::RW, 0, b"still");
    guest.send(HOST_PORT, op::SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"still");
    guest.expect(op::RST);
}

#[test]
fn when_the_guest_closes_the_host_gets_what_was_sent_and_the_end() {
    let mut guest = Guest::new(0);
    let (mut host, port) = guest.asked();
    guest.receive();
    guest.send(port, op::RW, 0, b"bye");
    guest.send(port, op::SHUTDOWN, SHUTDOWN_RECEIVE, &[]);
    assert!(guest.quiet());
    guest.send(port, op::SHUTDOWN, SHUTDOWN_SEND, &[]);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    guest.expect(op::RST);
}

#[test]
fn a_packet_that_is_shorter_than_it_says_ends_its_connection() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    let header = Header { len: 100, ..guest.header(HOST_PORT, op::RW) };
    guest.send_header(header, &[1; 99]);
    guest.expect(op::RST);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_reset_of_the_device_ends_all_connections_and_new_ones_can_be_made() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    guest.driver.start(0);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    guest.given = 0;
    for _ in 0..SIZE {
        guest.give_buffer();
    }
    std::fs::remove_file(guest.path("_52")).unwrap();
    guest.connected();
}

#[test]
fn a_pause_keeps_the_connections_and_what_was_on_its_way() {
    let mut guest = Guest::new(0);
    let mut host = guest.connected();
    guest.driver.transport.pause();
    host.write_all(b"meanwhile").unwrap();
    let mut late = UnixStream::connect(guest.path("")).unwrap();
    late.write_all(b"CONNECT 9\n").unwrap();
    guest.driver.transport.resume();
    let (first, second) = (guest.receive(), guest.receive());
    let mut operations = [(first.0.op, &first.1[..]), (second.0.op, &second.1[..])];
    operations.sort_unstable();
    assert_eq!(operations, [(op::REQUEST, &b""[..]), (op::RW, &b"meanwhile"[..])]);
    guest.send(HOST_PORT, op::RW, 0, b"after");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"after");
}

#[test]
fn a_guest_from_a_snapshot_is_told_once_that_its_connections_are_gone() {
    for buffer_first in [true, false] {
        let mut guest = Guest::new(0);
        let mut host = guest.connected();
        let give = |driver: &mut Driver| {
            driver.fill(SENT, &[0xff; 4]);
            let head = driver.chain(EVENT, &[(SENT, 4, WRITE)]);
            driver.kick(EVENT);
            head
        };
        let before = buffer_first.then(|| give(&mut guest.driver));
        let uds_path = guest.path("");
        let Guest { driver, directory, given, forwarded, room } = guest;
        let driver = driver.reloaded(|| {
            let config = mote_vmm_api::Vsock { vsock_id: None, guest_cid: CID as u32, uds_path };
            Box::new(Vsock::open(&config).unwrap())
        });
        let mut guest = Guest { driver, directory, given, forwarded, room };
        let head = before.unwrap_or_else(|| give(&mut guest.driver));
        assert_eq!(guest.driver.wait_used(EVENT), (head.into(), 4));
        assert_eq!(guest.driver.bytes(SENT, 4), [0; 4]);
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
        give(&mut guest.driver);
        // New connections work, and a pause is no reason to say it again.
        guest.driver.transport.pause();
        guest.driver.transport.resume();
        std::fs::remove_file(guest.path("_52")).unwrap();
        guest.connected();
        assert_eq!(guest.driver.used(EVENT), None);
    }
}

#[test]
fn resets_that_the_guest_does_not_take_are_bounded() {
    let mut guest = Guest::new(0);
    // No receive buffers beyond those that are there: after them resets wait.
    let mut answered = 0;
    for _ in 0..muxer::MAX_RESETS + usize::from(SIZE) + 8 {
        let header = guest.header(HOST_PORT, op::RW);
        guest.driver.fill(SENT, &header.to_bytes());
        guest.driver.chain(TX, &[(SENT, HEADER_BYTES as u32, 0)]);
        guest.driver.kick(TX);
        std::thread::sleep(Duration::from_micros(500));
        match guest.driver.used(TX) {
            Some(_) => answered += 1,
            None => break,
        }
    }
    assert!(answered <= muxer::MAX_RESETS + usize::from(SIZE), "{answered}");
    // Room lets it go on.
    for _ in 0..answered.min(40) {
        guest.expect(op::RST);
    }
    guest.driver.wait_used(TX);
}

#[test]
fn a_socket_nobody_answers_on_is_replaced_and_another_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let config =
        |name| mote_vmm_api::Vsock { vsock_id: None, guest_cid: 3, uds_path: directory.path().join(name) };
    drop(UnixListener::bind(directory.path().join("stale")).unwrap());
    let vsock = Vsock::open(&config("stale")).unwrap();
    assert!(Vsock::open(&config("stale")).is_err());
    vsock.socket_file().unwrap().finish();
    assert!(!directory.path().join("stale").exists());
    std::fs::write(directory.path().join("file"), "x").unwrap();
    assert!(Vsock::open(&config("file")).is_err());
    assert!(directory.path().join("file").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(
        receive in hostile::abuse(), transmit in hostile::abuse(), headers in proptest::collection::vec(
            (0u64..5, 0u64..4, 0u32..3, 50u32..53, any::<u32>(), 0u16..3, 0u16..9, 0u32..4, any::<u32>(), any::<u32>()), 1..40),
    ) {
        let mut guest = Guest::new(0);
        let _listener = UnixListener::bind(guest.path("_52")).unwrap();
        for (src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt) in headers {
            let len = len % 64;
            let header = Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt };
            guest.send_header(header, &[0; 32]);
            while guest.driver.used(RX).is_some() {
                guest.give_buffer();
            }
        }
        hostile::inflict(&mut guest.driver, RX, &receive);
        hostile::inflict(&mut guest.driver, TX, &transmit);
        guest.driver.start(0);
        guest.given = 0;
        for _ in 0..SIZE {
            guest.give_buffer();
        }
        guest.send(99, op::REQUEST, 0, &[]);
        prop_assert_eq!(guest.receive().0.op, op::RST);
    }
}
