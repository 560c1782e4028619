//! virtio-net with several queue pairs, driven by the guest itself: the control queue, and an answer from the host to what is sent in each.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::wire::Ipv4Address;

use super::{Subject, TestResult};
use crate::bench::queue::{Queue, WRITE, negotiate};
use crate::cpu;
use crate::ensure;
use crate::virtio::{EVENT_IDX, INDIRECT, Window, register};

const MAC: u64 = 1 << 5;
const CONTROL_QUEUE: u64 = 1 << 17;
/// VIRTIO_NET_F_MQ.
pub const SEVERAL: u64 = 1 << 22;
/// Place of the number of pairs in the configuration.
const PAIRS_AT: u64 = 8;
const HEADER: usize = 12;
const BUFFER: usize = 2048;
const BUFFERS: u16 = 4;
const TIMEOUT_US: u64 = 3_000_000;
/// Requests that may stay unanswered: the host's stack may drop one.
const ATTEMPTS: u32 = 5;

type Buffer = *mut [u8; BUFFER];

fn buffer() -> Buffer {
    // A device may write to it as long as it runs: it is never freed.
    Box::into_raw(Box::new([0; BUFFER]))
}

/// Puts `bytes` at the start of a buffer that the device has no request for.
fn put(buffer: Buffer, bytes: &[u8]) {
    assert!(bytes.len() <= BUFFER, "{} bytes", bytes.len());
    // SAFETY: a leaked buffer of this size, to which nothing refers.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.cast(), bytes.len()) };
}

/// What is in a buffer, which the device may have written behind the compiler's back.
fn content(buffer: Buffer) -> [u8; BUFFER] {
    // SAFETY: a leaked buffer of this size; the device is done with it.
    unsafe { buffer.read_volatile() }
}

/// A device with all its queues.
struct Pairs {
    receive: Vec<(Queue, Vec<Buffer>)>,
    transmit: Vec<(Queue, Buffer)>,
    control: (Queue, Buffer),
    mac: [u8; 6],
}

impl Pairs {
    fn new(window: &Window) -> Result<Self, String> {
        let features = negotiate(window, MAC | CONTROL_QUEUE | SEVERAL | EVENT_IDX | INDIRECT)?;
        ensure!(features & SEVERAL != 0 && features & CONTROL_QUEUE != 0, "features {features:#x}");
        let pairs = window.config(PAIRS_AT) as u16;
        ensure!((2..=0x8000).contains(&pairs), "{pairs} pairs");
        let (low, high) = (window.config(0).to_le_bytes(), window.config(4).to_le_bytes());
        let mac = [low[0], low[1], low[2], low[3], high[0], high[1]];
        let (mut receive, mut transmit) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            let mut queue = Queue::new(window, 2 * pair, BUFFERS, features)?;
            let buffers: Vec<Buffer> = (0..BUFFERS).map(|_| buffer()).collect();
            for (at, buffer) in (0..).zip(&buffers) {
                queue.describe(at, *buffer as u64, BUFFER as u32, WRITE, None);
                queue.offer(at);
            }
            receive.push((queue, buffers));
            transmit.push((Queue::new(window, 2 * pair + 1, BUFFERS, features)?, buffer()));
        }
        let control = (Queue::new(window, 2 * pairs, 2, features)?, buffer());
        window.set(register::STATUS, 0xf);
        for (queue, _) in &mut receive {
            queue.kick();
        }
        Ok(Self { receive, transmit, control, mac })
    }

    /// Sets the number of pairs in use; what it is acknowledged with.
    fn set(&mut self, pairs: u16) -> Result<u8, String> {
        let (queue, buffer) = &mut self.control;
        let [low, high] = pairs.to_le_bytes();
        put(*buffer, &[4, 0, low, high, 0xff]);
        queue.describe(0, *buffer as u64, 4, 0, Some(1));
        queue.describe(1, *buffer as u64 + 4, 1, WRITE, None);
        queue.offer(0);
        queue.kick();
        ensure!(cpu::wait_until(TIMEOUT_US, || queue.take() == Some(0)), "no answer to a command");
        Ok(content(*buffer)[4])
    }

    /// Asks in this pair who has `peer`; in which pair the answer came.
    fn ask(&mut self, pair: usize, own: Ipv4Address, peer: Ipv4Address) -> Result<usize, String> {
        let mut frame = Vec::from([0; HEADER]);
        frame.extend_from_slice(&[0xff; 6]);
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&own.octets());
        frame.extend_from_slice(&[0; 6]);
        frame.extend_from_slice(&peer.octets());
        frame.resize(HEADER + 60, 0);
        for _ in 0..ATTEMPTS {
            let (queue, buffer) = &mut self.transmit[pair];
            put(*buffer, &frame);
            queue.describe(0, *buffer as u64, frame.len() as u32, 0, None);
            queue.offer(0);
            queue.kick();
            ensure!(cpu::wait_until(TIMEOUT_US, || queue.take() == Some(0)), "pair {pair} doesn't send");
            let mut answered = None;
            cpu::wait_until(TIMEOUT_US / u64::from(ATTEMPTS), || {
                answered = self.answer(peer);
                answered.is_some()
            });
            if let Some(pair) = answered {
                return Ok(pair);
            }
        }
        Err(format!("no answer to what was sent in pair {pair}"))
    }

    /// Looks through what was received.
    fn answer(&mut self, peer: Ipv4Address) -> Option<usize> {
        let mut found = None;
        for (pair, (queue, buffers)) in self.receive.iter_mut().enumerate() {
            while let Some(head) = queue.take() {
                let received = content(buffers[usize::from(head)]);
                let frame = &received[HEADER..];
                if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == peer.octets() {
                    found = Some(pair);
                }
                queue.offer(head);
                queue.kick();
            }
        }
        found
    }
}

pub(super) fn run(subject: &Subject<'_>) -> TestResult {
    let addresses = subject.boot.command_line.value("mote.net").ok_or("no mote.net")?;
    let (own, peer) = addresses.split_once(',').ok_or("mote.net")?;
    let own = own.split('/').next().and_then(|own| own.parse().ok()).ok_or("mote.net")?;
    let peer: Ipv4Address = peer.parse().map_err(|_| "mote.net")?;
    let mut pairs = Pairs::new(subject.window)?;
    let count = pairs.transmit.len();
    let result = drive(&mut pairs, count, own, peer);
    subject.window.set(register::STATUS, 0);
    result
}

fn drive(pairs: &mut Pairs, count: usize, own: Ipv4Address, peer: Ipv4Address) -> TestResult {
    ensure!(pairs.ask(0, own, peer)? == 0, "an answer in a pair that isn't used");
    for wrong in [0, count as u16 + 1, u16::MAX] {
        ensure!(pairs.set(wrong)? == 1, "{wrong} pairs were accepted");
    }
    ensure!(pairs.set(count as u16)? == 0, "{count} pairs were refused");
    for pair in 0..count {
        pairs.ask(pair, own, peer)?;
    }
    ensure!(pairs.set(1)? == 0, "one pair was refused");
    ensure!(pairs.ask(0, own, peer)? == 0, "an answer in a pair that isn't used any more");
    ensure!(pairs.set(count as u16)? == 0, "{count} pairs were refused the second time");
    pairs.ask(count - 1, own, peer).map(drop)
}
