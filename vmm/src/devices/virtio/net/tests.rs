//! The device with a driver that writes its rings byte by byte. A pair of datagram sockets is the tap: like a tap it keeps
//! frames apart and takes a limited number of them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use mote_vmm_api::{RateLimiter as Limits, TokenBucket};
use proptest::prelude::*;

use super::*;
use crate::devices::virtio::F_EVENT_IDX;
use crate::devices::virtio::lifecycle::status::NEEDS_RESET;
use crate::devices::virtio::testing::{BUFFERS, Driver, HIGH, INDIRECT, SIZE, WRITE, hostile};

const RX: usize = 0;
const TX: usize = 1;
const MERGEABLE: u64 = bit(abi::VIRTIO_NET_F_MRG_RXBUF);
const STATUS: u64 = bit(abi::VIRTIO_NET_F_STATUS);
const MAC: [u8; 6] = [6, 0, 0, 0, 0, 1];
/// Longer than any test runs.
const NEVER_MS: u64 = 3_600_000;
/// For what must not happen.
const A_WHILE: Duration = Duration::from_millis(20);
/// Offset of the configuration space of a mmio device.
const CONFIG: u64 = 0x100;

fn interface() -> NetworkInterface {
    NetworkInterface {
        iface_id: "e".into(),
        guest_mac: Some("06:00:00:00:00:01".into()),
        ..Default::default()
    }
}

/// A device, and the other end of its tap.
fn net(interface: &NetworkInterface) -> (Net, UnixDatagram) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut config = [0; 12];
    config[..6].copy_from_slice(&MAC);
    let features = FEATURES | bit(abi::VIRTIO_NET_F_MAC);
    (Net::over(Tap::for_test(OwnedFd::from(tap)), interface, config, features).unwrap(), wire)
}

/// A device with two queue pairs, and the other ends of its tap's queues.
fn two_pairs() -> (Net, [UnixDatagram; 2]) {
    let sockets = [(); 2].map(|()| UnixDatagram::pair().unwrap());
    let mut queues = Vec::new();
    let wires = sockets.map(|(tap, wire)| {
        tap.set_nonblocking(true).unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        queues.push(Tap::queue_for_test(OwnedFd::from(tap)));
        wire
    });
    let features = FEATURES | bit(abi::VIRTIO_NET_F_MAC);
    (Net::over_queues(queues, &interface(), [0; 12], features).unwrap(), wires)
}

/// Queues of a device with two queue pairs.
const RX1: usize = 2;
const TX1: usize = 3;
const CONTROL: usize = 4;

/// Sends a command over the control queue; what it is acknowledged with.
fn control(driver: &mut Driver, command: &[u8]) -> u8 {
    let at = BUFFERS + 0x8000;
    driver.fill(at, command);
    driver.fill(at + 64, &[0xff]);
    let head = driver.chain(CONTROL, &[(at, command.len() as u32, 0), (at + 64, 1, WRITE)]);
    driver.kick(CONTROL);
    assert_eq!(driver.wait_used(CONTROL), (head.into(), 1));
    driver.bytes(at + 64, 1)[0]
}

/// Sends a frame in a queue, and waits until the device is done with it.
fn send_in(driver: &mut Driver, queue: usize, bytes: &[u8]) {
    driver.fill(BUFFERS, bytes);
    driver.chain(queue, &[(BUFFERS, bytes.len() as u32, 0)]);
    driver.kick(queue);
    driver.wait_used(queue);
}

#[test]
fn a_queue_pair_carries_frames_when_the_driver_has_said_that_it_uses_it() {
    let (net, [first, second]) = two_pairs();
    let mut driver = Driver::running(Box::new(net), SEVERAL);
    assert_eq!(driver.read(CONFIG + 8) & 0xffff, 2);
    let (one, other) = (frame(MAC, 1, 100), frame(MAC, 2, 100));
    send_in(&mut driver, TX, &one);
    send_in(&mut driver, TX1, &other);
    assert_eq!(from_wire(&first), one);
    assert!(nothing_on(&second), "a frame of a pair that isn't used");
    second.set_nonblocking(false).unwrap();
    for wrong in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 1, 2, 0], &[0, 0, 2, 0], &[4, 0, 2], &[4]] {
        assert_eq!(control(&mut driver, wrong), 1, "{wrong:?}");
    }
    assert_eq!(control(&mut driver, &[4, 0, 2, 0]), 0);
    send_in(&mut driver, TX1, &other);
    assert_eq!(from_wire(&second), other);
    for (queue, wire) in [(RX, &first), (RX1, &second)] {
        let head = driver.chain(queue, &[(BUFFERS + 0x1000, 2000, WRITE)]);
        driver.kick(queue);
        wire.send(&one).unwrap();
        assert_eq!(driver.wait_used(queue), (head.into(), one.len() as u32));
    }
    // And back to one, by command and by reset.
    assert_eq!(control(&mut driver, &[4, 0, 1, 0]), 0);
    send_in(&mut driver, TX1, &other);
    assert!(nothing_on(&second));
    second.set_nonblocking(false).unwrap();
    assert_eq!(control(&mut driver, &[4, 0, 2, 0]), 0);
    driver.start(SEVERAL);
    send_in(&mut driver, TX1, &other);
    assert!(nothing_on(&second));
}

#[test]
fn pairs_in_use_stay_so_across_a_snapshot() {
    let (net, _) = two_pairs();
    let mut driver = Driver::running(Box::new(net), SEVERAL);
    assert_eq!(control(&mut driver, &[4, 0, 2, 0]), 0);
    let (net, [_first, second]) = two_pairs();
    let mut driver = driver.reloaded(|| Box::new(net));
    let frame = frame(MAC, 3, 80);
    send_in(&mut driver, TX1, &frame);
    assert_eq!(from_wire(&second), frame);
    let too_many = DeviceState::new(&SavedState { pairs_used: 3 }).unwrap();
    assert!(two_pairs().0.restore(&too_many).is_err());
}

#[test]
fn no_frame_of_a_burst_is_lost_or_stuck_whenever_the_machine_is_saved() {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    let device = || -> Box<dyn VirtioDevice> {
        let tap = Tap::for_test(OwnedFd::from(tap.try_clone().unwrap()));
        Box::new(Net::over(tap, &interface(), [0; 12], FEATURES).unwrap())
    };
    let mut driver = Driver::running(device(), MERGEABLE | F_EVENT_IDX);
    // More frames than buffers at first, and as many as the socket takes.
    let (buffers, frames) = (4, 8);
    let address = |number: u8| BUFFERS + 0x1000 * u64::from(number % buffers);
    for round in 0..40 {
        let sent = |number: u8| frame(MAC, round * 4 + number, 100 + usize::from(number));
        let offer = |driver: &mut Driver| {
            for number in 0..buffers {
                driver.chain(RX, &[(address(number), 0x1000, WRITE)]);
            }
            driver.kick(RX);
        };
        offer(&mut driver);
        for number in 0..frames {
            wire.send(&sent(number)).unwrap();
        }
        for number in 0..frames {
            if number == round % frames {
                driver = driver.reloaded(device);
            }
            if number == buffers {
                offer(&mut driver);
            }
            driver.wait_used(RX);
            let expected = &sent(number)[HEADER_BYTES..];
            assert_eq!(driver.bytes(address(number) + HEADER_BYTES as u64, expected.len()), expected);
        }
    }
}

#[test]
fn a_driver_that_knows_one_pair_gets_one() {
    for features in [0, bit(abi::VIRTIO_NET_F_CTRL_VQ)] {
        let (net, [first, _second]) = two_pairs();
        let mut driver = Driver::running(Box::new(net), features);
        let frame = frame(MAC, 3, 80);
        send_in(&mut driver, TX, &frame);
        assert_eq!(from_wire(&first), frame);
        if features != 0 {
            // Its control queue is the third (virtio 1.2 §5.1.2).
            driver.fill(BUFFERS, &[4, 0, 1, 0]);
            let head = driver.chain(RX1, &[(BUFFERS, 4, 0), (BUFFERS + 64, 1, WRITE)]);
            driver.kick(RX1);
            assert_eq!(driver.wait_used(RX1), (head.into(), 1));
        }
    }
}

#[test]
fn limits_of_an_interface_are_those_of_all_its_pairs_together() {
    let ops = Some(TokenBucket { size: 3, one_time_burst: None, refill_time: NEVER_MS });
    let (net, [first, second]) = two_pairs();
    let handle = net.control();
    handle.update_limits(None, Some(&Limits { bandwidth: None, ops }));
    let mut driver = Driver::running(Box::new(net), SEVERAL);
    assert_eq!(control(&mut driver, &[4, 0, 2, 0]), 0);
    let frame = frame(MAC, 3, 80);
    for queue in [TX, TX1, TX, TX1, TX] {
        driver.fill(BUFFERS, &frame);
        driver.chain(queue, &[(BUFFERS, frame.len() as u32, 0)]);
        driver.kick(queue);
    }
    std::thread::sleep(A_WHILE);
    let passed = [&first, &second].map(|wire| {
        wire.set_nonblocking(true).unwrap();
        std::iter::from_fn(|| wire.recv(&mut [0; 2000]).ok()).count()
    });
    assert_eq!(passed.iter().sum::<usize>(), 3, "{passed:?}");
}

fn running(interface: &NetworkInterface, features: u64) -> (Driver, UnixDatagram, NetControl) {
    let (net, wire) = net(interface);
    let control = net.control();
    (Driver::running(Box::new(net), features), wire, control)
}

/// Header (of zeros) and frame.
fn frame(source: [u8; 6], filler: u8, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(source);
    frame.extend([0x88, 0xb5]);
    frame.resize(HEADER_BYTES + bytes, filler);
    frame
}

fn send(driver: &mut Driver, at: u64, bytes: &[u8]) -> u16 {
    driver.fill(at, bytes);
    let head = driver.chain(TX, &[(at, bytes.len() as u32, 0)]);
    driver.kick(TX);
    head
}

fn from_wire(wire: &UnixDatagram) -> Vec<u8> {
    let mut bytes = vec![0; MAX_FRAME];
    let len = wire.recv(&mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn nothing_on(wire: &UnixDatagram) -> bool {
    std::thread::sleep(A_WHILE);
    wire.set_nonblocking(true).unwrap();
    let received = wire.recv(&mut [0; 16]);
    wire.set_nonblocking(false).unwrap();
    received.is_err()
}

#[test]
fn a_frame_leaves_byte_for_byte_whatever_it_is_made_of() {
    for features in [0, F_EVENT_IDX] {
        let (mut driver, wire, _) = running(&interface(), features);
        let bytes = frame(MAC, 7, 1000);
        driver.fill(BUFFERS, &bytes[..5]);
        driver.fill(HIGH, &bytes[5..12]);
        driver.fill(BUFFERS + 0x1000, &bytes[12..]);
        let rest = bytes.len() as u32 - 12;
        let head = driver.chain(TX, &[(BUFFERS, 5, 0), (HIGH, 7, 0), (BUFFERS + 0x1000, rest, 0)]);
        driver.kick(TX);
        assert_eq!(from_wire(&wire), bytes);
        assert_eq!(driver.wait_used(TX), (head.into(), 0));
        // The same as an indirect table.
        driver.raw_descriptor(BUFFERS + 0x3000, (BUFFERS, 5, 1, 1));
        driver.raw_descriptor(BUFFERS + 0x3010, (HIGH, 7, 1, 2));
        driver.raw_descriptor(BUFFERS + 0x3020, (BUFFERS + 0x1000, rest, 0, 0));
        let head = driver.chain(TX, &[(BUFFERS + 0x3000, 48, INDIRECT)]);
        driver.kick(TX);
        assert_eq!(from_wire(&wire), bytes);
        assert_eq!(driver.wait_used(TX), (head.into(), 0));
    }
}

#[test]
fn a_frame_arrives_in_one_buffer_with_their_number_in_its_header() {
    for features in [0, MERGEABLE, MERGEABLE | F_EVENT_IDX] {
        let (mut driver, wire, _) = running(&interface(), features);
        let head = driver.chain(RX, &[(BUFFERS, 20, WRITE), (BUFFERS + 0x1000, 2000, WRITE)]);
        driver.kick(RX);
        let mut bytes = frame([2; 6], 9, 500);
        wire.send(&bytes).unwrap();
        assert_eq!(driver.wait_used(RX), (head.into(), bytes.len() as u32));
        bytes[10] = 1;
        assert_eq!(driver.bytes(BUFFERS, 20), bytes[..20]);
        assert_eq!(driver.bytes(BUFFERS + 0x1000, bytes.len() - 20), bytes[20..]);
    }
}

#[test]
fn a_long_frame_is_spread_over_buffers_again_and_again() {
    let (mut driver, wire, _) = running(&interface(), MERGEABLE);
    let mut bytes = frame([2; 6], 9, 40_000);
    for (at, byte) in bytes.iter_mut().enumerate().skip(HEADER_BYTES) {
        *byte = (at / 7) as u8;
    }
    // The first time the window is short and the frame spills, the second time it doesn't.
    for _ in 0..2 {
        let heads: Vec<_> =
            (0..8u64).map(|n| driver.chain(RX, &[(BUFFERS + n * 0x2000, 6000, WRITE)])).collect();
        driver.kick(RX);
        wire.send(&bytes).unwrap();
        let mut received = Vec::new();
        for (n, head) in heads.iter().take(7).enumerate() {
            let (id, len) = driver.wait_used(RX);
            assert_eq!(id, u32::from(*head));
            received.extend(driver.bytes(BUFFERS + n as u64 * 0x2000, len as usize));
        }
        assert_eq!(received[10..12], [7, 0]);
        received[10] = 0;
        assert!(received == bytes, "other contents");
        assert_eq!(driver.used(RX), None);
        // The eighth buffer is used by a short frame.
        wire.send(&frame([2; 6], 1, 60)).unwrap();
        assert_eq!(driver.wait_used(RX), (u32::from(heads[7]), 72));
    }
}

#[test]
fn a_frame_that_no_buffer_holds_is_lost_and_the_next_arrives() {
    let (mut driver, wire, _) = running(&interface(), 0);
    let head = driver.chain(RX, &[(BUFFERS, 100, WRITE)]);
    driver.kick(RX);
    wire.send(&frame([2; 6], 9, 89)).unwrap();
    wire.send(&frame([2; 6], 8, 88)).unwrap();
    assert_eq!(driver.wait_used(RX), (head.into(), 100));
    assert_eq!(driver.bytes(BUFFERS + 99, 1), [8]);
}

#[test]
fn a_mergeable_frame_waits_for_the_buffers_it_needs() {
    let (mut driver, wire, _) = running(&interface(), MERGEABLE);
    driver.chain(RX, &[(BUFFERS, 100, WRITE)]);
    driver.kick(RX);
    let mut bytes = frame([2; 6], 9, 150);
    wire.send(&bytes).unwrap();
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.used(RX), None);
    driver.chain(RX, &[(BUFFERS + 0x1000, 100, WRITE)]);
    driver.kick(RX);
    assert_eq!(driver.wait_used(RX).1, 100);
    assert_eq!(driver.wait_used(RX).1, 62);
    bytes[10] = 2;
    assert_eq!(driver.bytes(BUFFERS, 100), bytes[..100]);
    assert_eq!(driver.bytes(BUFFERS + 0x1000, 62), bytes[100..]);
}

#[test]
fn frames_wait_on_the_tap_until_there_are_buffers() {
    let (mut driver, wire, _) = running(&interface(), 0);
    wire.send(&frame([2; 6], 5, 60)).unwrap();
    std::thread::sleep(A_WHILE);
    driver.chain(RX, &[(BUFFERS, 2000, WRITE)]);
    driver.kick(RX);
    assert_eq!(driver.wait_used(RX).1, 72);
    // A buffer that can't even hold a header comes back empty.
    driver.chain(RX, &[(BUFFERS, 11, WRITE)]);
    driver.kick(RX);
    assert_eq!(driver.wait_used(RX).1, 0);
}

#[test]
fn a_full_tap_is_waited_for_and_the_order_kept() {
    let (mut driver, wire, _) = running(&interface(), F_EVENT_IDX);
    for round in 0..10 {
        // More than the socket takes: the device has to wait in between.
        for n in 0..SIZE as u8 {
            send(&mut driver, BUFFERS + u64::from(n) * 0x100, &frame(MAC, 16 * round + n, 60));
        }
        for n in 0..SIZE as u8 {
            assert_eq!(from_wire(&wire)[71], 16 * round + n);
        }
        for _ in 0..SIZE {
            driver.wait_used(TX);
        }
    }
}

#[test]
fn a_faulty_chain_needs_a_reset_and_nothing_else() {
    for queue in [RX, TX] {
        let (mut driver, wire, _) = running(&interface(), 0);
        let flags = if queue == RX { WRITE } else { 0 };
        driver.chain(queue, &[(u64::MAX - 100, 50, flags)]);
        driver.kick(queue);
        driver.wait_needs_reset();
        driver.start(0);
        assert_eq!(driver.status() & NEEDS_RESET, 0);
        send(&mut driver, BUFFERS, &frame(MAC, 1, 60));
        assert_eq!(from_wire(&wire).len(), 72);
    }
}

#[test]
fn frames_of_impossible_length_are_used_and_not_sent() {
    let (mut driver, wire, _) = running(&interface(), 0);
    for len in [0, 11, MAX_FRAME as u32 + 1] {
        driver.chain(TX, &[(BUFFERS, len, 0)]);
        driver.kick(TX);
        driver.wait_used(TX);
    }
    send(&mut driver, BUFFERS, &frame(MAC, 3, 60));
    assert_eq!(from_wire(&wire)[71], 3);
}

fn config(driver: &mut Driver, at: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    crate::devices::bus::BusDevice::read(&mut driver.transport, CONFIG + at, &mut data);
    data
}

#[test]
fn mac_mtu_and_status_are_in_the_configuration_space() {
    let (mut driver, _wire, control) = running(&interface(), STATUS);
    assert_eq!(config(&mut driver, 0, 6), MAC);
    assert_eq!(config(&mut driver, 6, 2), [1, 0]);
    assert_ne!(driver.offered() & bit(abi::VIRTIO_NET_F_MAC), 0);
    let generation = driver.read(0xfc);
    control.set_link_up(false);
    assert_eq!(config(&mut driver, 6, 2), [0, 0]);
    assert_ne!(driver.read(0xfc), generation);
}

#[test]
fn a_pulled_cable_is_announced_and_loses_frames_of_both_directions() {
    let (mut driver, wire, control) = running(&interface(), STATUS);
    driver.chain(RX, &[(BUFFERS + 0x8000, 2000, WRITE)]);
    driver.kick(RX);
    control.set_link_up(false);
    let config_interrupt = |driver: &mut Driver| (driver.read(0x60) & 2 != 0).then_some(());
    driver.wait("configuration interrupt", config_interrupt);
    driver.write(0x64, 3);
    // Once more is no change.
    control.set_link_up(false);
    assert_eq!(driver.read(0x60), 0);
    send(&mut driver, BUFFERS, &frame(MAC, 1, 60));
    driver.wait_used(TX);
    wire.send(&frame([2; 6], 1, 60)).unwrap();
    assert!(nothing_on(&wire));
    assert_eq!(driver.used(RX), None);
    control.set_link_up(true);
    driver.wait("configuration interrupt", config_interrupt);
    send(&mut driver, BUFFERS, &frame(MAC, 2, 60));
    assert_eq!(from_wire(&wire)[71], 2);
    wire.send(&frame([2; 6], 9, 70)).unwrap();
    assert_eq!(driver.wait_used(RX).1, 82);
}

#[test]
fn a_driver_that_does_not_know_the_status_is_not_interrupted() {
    let (mut driver, _wire, control) = running(&interface(), 0);
    control.set_link_up(false);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn with_anti_spoofing_only_the_own_address_leaves() {
    let interface = NetworkInterface { anti_spoofing: true, ..interface() };
    let (mut driver, wire, _) = running(&interface, 0);
    send(&mut driver, BUFFERS, &frame([6, 0, 0, 0, 0, 2], 1, 60));
    // Too short for a source address.
    send(&mut driver, BUFFERS + 0x1000, &frame(MAC, 1, 60)[..HEADER_BYTES + 13]);
    let bytes = frame(MAC, 5, 60);
    send(&mut driver, BUFFERS + 0x2000, &bytes);
    assert_eq!(from_wire(&wire), bytes);
    for _ in 0..3 {
        driver.wait_used(TX);
    }
    // Headers in pieces are looked at all the same.
    driver.chain(TX, &[(BUFFERS + 0x2000, 20, 0), (BUFFERS + 0x2000 + 20, 52, 0)]);
    driver.kick(TX);
    assert_eq!(from_wire(&wire), bytes);
    assert!(nothing_on(&wire));
}

fn limits(ops: u64, refill_time: u64) -> Option<Limits> {
    let ops = Some(TokenBucket { size: ops, one_time_burst: None, refill_time });
    Some(Limits { bandwidth: None, ops })
}

#[test]
fn the_transmit_limit_lets_its_bucket_pass_and_a_patch_ends_it() {
    let interface = NetworkInterface { tx_rate_limiter: limits(2, NEVER_MS), ..interface() };
    let (mut driver, wire, control) = running(&interface, F_EVENT_IDX);
    for n in 0..4 {
        send(&mut driver, BUFFERS + n * 0x100, &frame(MAC, n as u8, 60));
    }
    assert_eq!((from_wire(&wire)[71], from_wire(&wire)[71]), (0, 1));
    assert!(nothing_on(&wire));
    control.update_limits(None, limits(0, 0).as_ref());
    assert_eq!((from_wire(&wire)[71], from_wire(&wire)[71]), (2, 3));
}

#[test]
fn the_receive_limit_counts_bytes_and_goes_on_by_itself() {
    let bandwidth = Some(TokenBucket { size: 100, one_time_burst: None, refill_time: 10 });
    let rx_rate_limiter = Some(Limits { bandwidth, ops: None });
    let (mut driver, wire, _) = running(&NetworkInterface { rx_rate_limiter, ..interface() }, 0);
    for n in 0..4 {
        driver.chain(RX, &[(BUFFERS + n * 0x1000, 2000, WRITE)]);
    }
    driver.kick(RX);
    let start = Instant::now();
    for _ in 0..4 {
        wire.send(&frame([2; 6], 1, 100)).unwrap();
    }
    for _ in 0..4 {
        assert_eq!(driver.wait_used(RX).1, 112);
    }
    // The first frame empties the bucket; the second may overdraw it as soon as there is a byte, and so on.
    assert!(start.elapsed() >= Duration::from_millis(20), "{:?}", start.elapsed());
}

#[test]
fn a_reset_ends_a_device_that_is_flooded_and_it_starts_again() {
    let (mut driver, wire, _) = running(&interface(), MERGEABLE);
    wire.set_nonblocking(true).unwrap();
    for round in 0..20u8 {
        for n in 0..SIZE {
            driver.chain(RX, &[(BUFFERS + u64::from(n) * 0x1000, 2000, WRITE)]);
        }
        driver.kick(RX);
        while wire.send(&frame([2; 6], round, 60)).is_ok() {}
        driver.start(MERGEABLE);
    }
}

#[test]
fn offloads_need_the_checksum_feature() {
    let all = bit(abi::VIRTIO_NET_F_GUEST_CSUM)
        | bit(abi::VIRTIO_NET_F_GUEST_TSO4)
        | bit(abi::VIRTIO_NET_F_GUEST_TSO6)
        | bit(abi::VIRTIO_NET_F_GUEST_UFO);
    let tap = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_UFO;
    assert_eq!(offloads(all), tap);
    assert_eq!(offloads(all & !bit(abi::VIRTIO_NET_F_GUEST_CSUM)), 0);
    let v4 = bit(abi::VIRTIO_NET_F_GUEST_CSUM) | bit(abi::VIRTIO_NET_F_GUEST_TSO4);
    assert_eq!(offloads(v4), libc::TUN_F_CSUM | libc::TUN_F_TSO4);
    // What the guest may send needs nothing of the tap.
    assert_eq!(offloads(bit(abi::VIRTIO_NET_F_HOST_TSO4) | bit(abi::VIRTIO_NET_F_CSUM)), 0);
}

#[test]
fn group_addresses_and_other_texts_are_no_mac() {
    assert_eq!(parse_mac("06:00:00:00:00:01"), Some(MAC));
    for text in
        ["01:00:00:00:00:01", "6:0:0:0:0:1", "06:00:00:00:00", "06:00:00:00:00:01:02", "+6:00:00:00:00:01"]
    {
        assert_eq!(parse_mac(text), None, "{text}");
    }
}

/// Runs `ip` with these words in the namespace of the calling thread.
fn ip(words: &str) -> bool {
    let status = std::process::Command::new("ip").args(words.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

/// A tap of the kernel in a network namespace that ends with the test.
#[test]
fn a_tap_that_goes_down_loses_frames_until_it_is_up_again() {
    let test = || {
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err()
            || !ip("tuntap add dev t0 mode tap vnet_hdr")
        {
            return eprintln!(
                "SKIPPED: a tap in a network namespace of its own needs root, /dev/net/tun and ip"
            );
        }
        assert!(ip("link set t0 up"));
        let interface = NetworkInterface { host_dev_name: "t0".into(), ..interface() };
        let net = Net::open(&interface, None).unwrap();
        let mut driver = Driver::running(Box::new(net), FEATURES);
        for n in 0..SIZE {
            driver.chain(RX, &[(BUFFERS + 0x4000 + u64::from(n) * 0x800, 0x800, WRITE)]);
        }
        driver.kick(RX);
        let sent = || {
            let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = text.lines().find(|line| line.trim_start().starts_with("t0:")).unwrap().to_owned();
            line.split_whitespace().nth(2).unwrap().parse::<u64>().unwrap()
        };
        let send_one = |driver: &mut Driver| {
            send(driver, BUFFERS, &frame(MAC, 1, 60));
            driver.wait_used(TX);
        };
        send_one(&mut driver);
        let before = sent();
        assert!(before >= 1);
        assert!(ip("link set t0 down"));
        for _ in 0..3 {
            send_one(&mut driver);
        }
        assert_eq!(sent(), before);
        assert!(ip("link set t0 up"));
        send_one(&mut driver);
        assert_eq!(sent(), before + 1);
        // Gone for good: still no crash, and no frame hangs.
        assert!(ip("link del t0"));
        send_one(&mut driver);
        assert_eq!(driver.status() & NEEDS_RESET, 0);
    };
    std::thread::scope(|scope| scope.spawn(test).join().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(
        receive in hostile::abuse(), transmit in hostile::abuse(), mergeable: bool, event_idx: bool,
    ) {
        let features = if mergeable { MERGEABLE } else { 0 } | if event_idx { F_EVENT_IDX } else { 0 };
        let (mut driver, wire, _) = running(&NetworkInterface { anti_spoofing: true, ..interface() }, features);
        for len in [60, 1500, 40_000] {
            let _ = wire.send(&frame([2; 6], 0, len));
        }
        hostile::inflict(&mut driver, RX, &receive);
        hostile::inflict(&mut driver, TX, &transmit);
        wire.set_nonblocking(true).unwrap();
        while wire.recv(&mut [0; 16]).is_ok() {}
        driver.start(features);
        while wire.recv(&mut [0; 16]).is_ok() {}
        wire.set_nonblocking(false).unwrap();
        send(&mut driver, BUFFERS, &frame(MAC, 1, 60));
        prop_assert_eq!(from_wire(&wire).len(), 72);
    }
}
