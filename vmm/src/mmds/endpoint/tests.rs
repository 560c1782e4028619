//! The endpoint with a guest that is another smoltcp on Ethernet, and with frames that no honest guest sends.

use mote_vmm_api::{MmdsConfig, MmdsVersion};
use proptest::prelude::*;
use serde_json::json;
use smoltcp::wire::EthernetAddress;

use super::super::Mmds;
use super::*;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST_MAC: [u8; 6] = [6, 0, 0, 0, 0, 2];
/// In the network of the service: smoltcp takes no ARP reply from elsewhere.
const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 3);
/// Steps of time until a guest gives up.
const STEPS: usize = 10_000;
const STEP: Duration = Duration::from_millis(1);

/// A guest's network card, and the endpoint at the other end of the cable.
struct Cable {
    endpoint: Endpoint,
    now: Instant,
    /// Frames that the guest has sent to elsewhere.
    elsewhere: usize,
}

struct Guest {
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
}

struct FromEndpoint(Vec<u8>);
struct ToEndpoint<'a>(&'a mut Cable);

impl phy::RxToken for FromEndpoint {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for ToEndpoint<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        let cable = self.0;
        if cable.endpoint.wants(&frame[..frame.len().min(PEEK_BYTES)]) {
            cable.endpoint.receive(&frame, cable.now);
        } else {
            cable.elsewhere += 1;
        }
        result
    }
}

impl phy::Device for Cable {
    type RxToken<'a> = FromEndpoint;
    type TxToken<'a> = ToEndpoint<'a>;

    fn receive(&mut self, _timestamp: StackInstant) -> Option<(FromEndpoint, ToEndpoint<'_>)> {
        let frame = self.endpoint.next_frame(self.now)?;
        Some((FromEndpoint(frame), ToEndpoint(self)))
    }

    fn transmit(&mut self, _timestamp: StackInstant) -> Option<ToEndpoint<'_>> {
        Some(ToEndpoint(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

fn shared(version: MmdsVersion) -> SharedMmds {
    let mut mmds = Mmds::new("test", 4 << 20).unwrap();
    mmds.configure(&MmdsConfig { version, ..MmdsConfig::default() });
    mmds.put(json!({"a": "b", "long": "x".repeat(300_000)})).unwrap();
    SharedMmds::new(mmds)
}

impl Guest {
    fn new(version: MmdsVersion) -> Self {
        let endpoint = Endpoint::new(shared(version), ADDRESS).unwrap();
        let mut cable = Cable { endpoint, now: Instant::now(), elsewhere: 0 };
        let config = Config::new(EthernetAddress(GUEST_MAC).into());
        let mut interface = Interface::new(config, &mut cable, StackInstant::ZERO);
        interface.update_ip_addrs(|list| list.push(IpCidr::new(GUEST.into(), 16)).unwrap());
        Self { cable, interface, sockets: SocketSet::new(Vec::new()) }
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(16 << 10), buffer(8 << 10));
        socket.connect(self.interface.context(), (ADDRESS, PORT), port).unwrap();
        self.sockets.add(socket)
    }

    fn step(&mut self) {
        self.cable.now += STEP;
        let now = self.cable.now;
        self.cable.endpoint.poll_if_due(now);
        let time = StackInstant::from_micros((now - self.cable.endpoint.epoch).as_micros() as i64);
        self.interface.poll(time, &mut self.cable, &mut self.sockets);
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends what it is given and reads until `done` or the end of the connection.
    fn exchange(&mut self, handle: SocketHandle, request: &[u8], done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (mut sent, mut answer) = (0, Vec::new());
        for _ in 0..STEPS {
            self.step();
            let socket = self.socket(handle);
            if sent < request.len() && socket.can_send() {
                sent += socket.send_slice(&request[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
            }
            let ended = !socket.may_recv() && socket.state() != State::SynSent;
            if done(&answer) || ended {
                return answer;
            }
        }
        panic!("no end after {:?}", String::from_utf8_lossy(&answer));
    }

    fn get(&mut self, port: u16, request: &str) -> String {
        let handle = self.connect(port);
        let answer = self.exchange(handle, request.as_bytes(), |_| false);
        self.socket(handle).close();
        self.step();
        self.step();
        String::from_utf8(answer).unwrap()
    }
}

#[test]
fn a_guest_reads_its_metadata_with_a_token() {
    let mut guest = Guest::new(MmdsVersion::V2);
    let end = "Connection: close\r\n\r\n";
    let answer = guest
        .get(5000, &format!("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n{end}"));
    let token = answer.split("\r\n\r\n").nth(1).unwrap().to_owned();
    let answer = guest.get(5001, &format!("GET /a HTTP/1.1\r\nX-metadata-token: {token}\r\n{end}"));
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\nb"), "{answer}");
    assert!(guest.get(5002, &format!("GET /a HTTP/1.1\r\n{end}")).starts_with("HTTP/1.1 401"));
    assert_eq!(guest.cable.elsewhere, 0);
    assert_eq!(guest.cable.endpoint.connections.len(), 0, "ended connections are removed");
}

#[test]
fn a_long_answer_arrives_whole_and_requests_follow_each_other_on_a_connection() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect(5000);
    let whole = |answer: &[u8]| answer.ends_with(b"xx") && answer.len() > 300_000;
    for _ in 0..3 {
        let answer = guest.exchange(handle, b"GET /long HTTP/1.1\r\n\r\n", whole);
        assert!(answer.len() < 301_000);
    }
    assert_eq!(guest.cable.endpoint.connections.len(), 1);
}

#[test]
fn a_guest_that_takes_no_frames_fills_nothing() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect(5000);
    let answer = guest.exchange(handle, b"GET /a HTTP/1.1\r\n\r\n", |answer| answer.ends_with(b"b"));
    assert!(!answer.is_empty());
    // From now on the guest only sends: the same SYN from ever other ports.
    let endpoint = &mut guest.cable.endpoint;
    let now = guest.cable.now;
    for port in 0..2000u16 {
        endpoint.receive(&syn(port.to_be_bytes()), now);
        assert!(endpoint.link.outgoing.len() <= MAX_FRAMES);
        assert!(endpoint.connections.len() <= MAX_CONNECTIONS);
    }
    assert_eq!(endpoint.delay(now), None, "nothing to do until the guest takes frames");
    while endpoint.next_frame(now).is_some() {}
    // All of them give up in the end, and a new connection is served.
    let answer = guest.get(7000, "GET /a HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with("\r\n\r\nb"), "{answer}");
}

#[test]
fn a_full_house_makes_room_for_the_next_connection() {
    let mut guest = Guest::new(MmdsVersion::V1);
    for port in 0..3 * MAX_CONNECTIONS as u16 {
        let handle = guest.connect(5000 + port);
        let answer = guest.exchange(handle, b"GET /a HTTP/1.1\r\n\r\n", |answer| answer.ends_with(b"b"));
        assert!(answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(guest.cable.endpoint.connections.len(), MAX_CONNECTIONS);
    guest.cable.endpoint.reset();
    assert_eq!(guest.cable.endpoint.connections.len(), 0);
    assert!(guest.get(9000, "GET /a HTTP/1.0\r\n\r\n").ends_with('b'));
}

#[test]
fn answers_that_nobody_reads_are_bounded() {
    let mut guest = Guest::new(MmdsVersion::V1);
    for port in 0..MAX_CONNECTIONS as u16 {
        let handle = guest.connect(5000 + port);
        (0..5).for_each(|_| guest.step());
        guest.socket(handle).send_slice(b"GET /long HTTP/1.1\r\n\r\n").unwrap();
        (0..5).for_each(|_| guest.step());
    }
    let unsent: usize = guest.cable.endpoint.connections.iter().map(|one| one.unsent.len()).sum();
    assert!((MAX_UNSENT..MAX_UNSENT + 301_000).contains(&unsent), "{unsent}");
    // Reading lets the others have theirs.
    let handles: Vec<_> = guest.sockets.iter().map(|(handle, _)| handle).collect();
    for handle in handles {
        let answer = guest.exchange(handle, b"", |answer| answer.ends_with(b"xx") && answer.len() > 300_000);
        assert!(answer.starts_with(b"HTTP/1.1 200"));
    }
}

#[test]
fn only_frames_to_the_service_are_wanted() {
    let endpoint = Endpoint::new(shared(MmdsVersion::V1), ADDRESS).unwrap();
    let frame = syn([1, 2]);
    assert!(endpoint.wants(&frame));
    let changed = |at: usize, byte: u8| {
        let mut frame = frame.clone();
        frame[at] = byte;
        frame
    };
    assert!(!endpoint.wants(&changed(33, 253)), "another address");
    assert!(!endpoint.wants(&changed(12, 0x86)), "another protocol");
    assert!(!endpoint.wants(&changed(14, 0x65)), "another version");
    assert!(!endpoint.wants(&frame[..33]) && !endpoint.wants(&[]));
    let arp = arp(ADDRESS);
    assert!(endpoint.wants(&arp) && !endpoint.wants(&arp[..41]));
    assert!(!endpoint.wants(&self::arp(GUEST)));
}

#[test]
fn who_asks_for_the_address_is_told_and_who_tells_is_not() {
    let mut endpoint = Endpoint::new(shared(MmdsVersion::V1), ADDRESS).unwrap();
    let now = Instant::now();
    let mut request = arp(ADDRESS);
    endpoint.receive(&request, now);
    let reply = endpoint.next_frame(now).unwrap();
    assert_eq!((&reply[..6], &reply[6..12], &reply[12..14]), (&GUEST_MAC[..], &MAC[..], &ARP[..]));
    assert_eq!((reply[21], &reply[22..28], &reply[28..32]), (2, &MAC[..], &ADDRESS.octets()[..]));
    assert_eq!((&reply[32..38], &reply[38..42]), (&GUEST_MAC[..], &GUEST.octets()[..]));
    request[21] = 2;
    endpoint.receive(&request, now);
    assert!(!endpoint.has_frames());
}

/// "Who has `target`?"
fn arp(target: Ipv4Addr) -> Vec<u8> {
    [&[0xff; 6][..], &GUEST_MAC, &ARP, &ARP_REQUEST, &GUEST_MAC, &GUEST.octets(), &[0; 6], &target.octets()]
        .concat()
}

/// The first segment of a connection from a port, without checksums.
fn syn(port: [u8; 2]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    ip.extend(GUEST.octets());
    ip.extend(ADDRESS.octets());
    let sum: u32 = ip.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(port);
    ip.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    [&MAC[..], &GUEST_MAC, &IPV4, &ip].concat()
}

proptest! {
    #[test]
    fn any_frame_is_taken_without_panic(
        start in 0usize..3,
        rest in proptest::collection::vec(any::<u8>(), 0..200),
        changes in proptest::collection::vec((0usize..60, any::<u8>()), 0..6),
    ) {
        let mut endpoint = Endpoint::new(shared(MmdsVersion::V2), ADDRESS).unwrap();
        let mut frame = match start {
            0 => Vec::new(),
            1 => arp(ADDRESS),
            _ => syn([1, 2]),
        };
        frame.extend(rest);
        for (at, byte) in changes {
            if let Some(old) = frame.get_mut(at) {
                *old = byte;
            }
        }
        let now = Instant::now();
        let _ = endpoint.wants(&frame);
        endpoint.receive(&frame, now);
        endpoint.poll(now + Duration::from_secs(1));
        while let Some(frame) = endpoint.next_frame(now + Duration::from_secs(1)) {
            prop_assert!(frame.len() <= ETHERNET_BYTES + MTU);
        }
    }
}
