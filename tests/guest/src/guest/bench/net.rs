//! Network devices: 64-byte frames out and in, large frames to be segmented, and how long an echo takes.
//!
//! The host's side is at [`PEER`]: it answers pings, and floods whoever sends a datagram to port [`FLOOD_PORT`] for the
//! number of milliseconds in it.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::string::String;

use super::Samples;
use super::queue::{self, Queue, WRITE};
use crate::boot::Boot;
use crate::virtio::{self, EVENT_IDX, Kind, Window};
use crate::{cpu, ensure, println};

/// Addresses of the guest and of the host's side, and the link address of the latter.
const OWN: [u8; 4] = [10, 77, 0, 2];
const PEER: [u8; 4] = [10, 77, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Somebody else, whom the host's network stack doesn't receive for.
const NOBODY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
const FLOOD_PORT: u16 = 7777;

const RX: u16 = 0;
const TX: u16 = 1;
const SIZE: u16 = 256;
/// A receive buffer, and the room for a short frame to send.
const BUFFER_BYTES: usize = 2048;
/// Virtio header: `struct virtio_net_hdr_v1` (virtio 1.2 §5.1.6).
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const SMALL: usize = 64;
/// IP packet of a large frame.
const LARGE: usize = 60 << 10;
/// Large frames in flight.
const LARGE_DEPTH: u16 = 64;
/// A frame that takes longer has been lost.
const TIMEOUT_MS: u64 = 2_000;

const F_CSUM: u64 = 1 << 0;
const F_MAC: u64 = 1 << 5;
const F_HOST_TSO4: u64 = 1 << 11;
const F_MRG_RXBUF: u64 = 1 << 15;

/// Measures the first network device.
pub fn run(boot: &Boot, ms: u64) -> Result<(), String> {
    let windows = virtio::discover(boot);
    let window = windows.iter().find(|window| window.kind == Kind::Net).ok_or("no network device")?;
    let mut nic = Nic::new(window)?;
    let mut samples = Samples::new();
    let small = nic.small_frame();
    nic.send_flood("send-64-batch", small, SIZE, true, ms)?;
    nic.send_flood("send-64", small, SIZE, false, ms)?;
    let large = nic.large_frame()?;
    nic.send_flood("send-tso", large, LARGE_DEPTH, false, ms)?;
    nic.echo("echo", ms, &mut samples)?;
    // Last, since what of the flood is still on its way would disturb the others.
    nic.receive_flood("receive-64", ms)
}

/// A frame in memory with its header.
#[derive(Clone, Copy)]
struct Frame {
    address: u64,
    bytes: usize,
}

struct Nic {
    receive: Queue,
    transmit: Queue,
    mac: [u8; 6],
    /// [`BUFFER_BYTES`] for each descriptor of the receive queue.
    buffers: *mut u8,
}

fn allocate(bytes: usize) -> Result<*mut u8, String> {
    let layout = Layout::from_size_align(bytes, 4096).map_err(|_| "layout")?;
    // SAFETY: the layout isn't empty. Never given back: the device may use it at any time.
    let memory = unsafe { alloc_zeroed(layout) };
    ensure!(!memory.is_null(), "out of memory");
    Ok(memory)
}

/// Writes bytes to memory that the device reads.
fn put(at: *mut u8, offset: usize, bytes: &[u8]) {
    for (n, byte) in bytes.iter().enumerate() {
        // SAFETY: callers stay within the block that they allocated.
        unsafe { at.add(offset + n).write_volatile(*byte) };
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// An IPv4 header from the guest to `PEER`.
fn ip_header(protocol: u8, payload: usize) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&(20 + payload as u16).to_be_bytes());
    header[8] = 64;
    header[9] = protocol;
    header[12..16].copy_from_slice(&OWN);
    header[16..20].copy_from_slice(&PEER);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

impl Nic {
    fn new(window: &Window) -> Result<Self, String> {
        let features = queue::negotiate(window, EVENT_IDX | F_CSUM | F_MAC | F_HOST_TSO4 | F_MRG_RXBUF)?;
        let needed = F_CSUM | F_MAC | F_HOST_TSO4 | F_MRG_RXBUF;
        ensure!(features & needed == needed, "features {features:#x}");
        let mut receive = Queue::new(window, RX, SIZE, features)?;
        let transmit = Queue::new(window, TX, SIZE, features)?;
        ensure!(
            receive.size() == SIZE && transmit.size() == SIZE,
            "a queue has fewer than {SIZE} descriptors"
        );
        let buffers = allocate(BUFFER_BYTES * usize::from(SIZE))?;
        for number in 0..SIZE {
            let address = buffers as u64 + BUFFER_BYTES as u64 * u64::from(number);
            receive.describe(number, address, BUFFER_BYTES as u32, WRITE, None);
            receive.offer(number);
        }
        window.set(virtio::register::STATUS, 0xf);
        receive.kick();
        let low = window.config(0).to_le_bytes();
        let high = window.config(4).to_le_bytes();
        let mac = [low[0], low[1], low[2], low[3], high[0], high[1]];
        Ok(Self { receive, transmit, mac, buffers })
    }

    fn frame(&self, to: [u8; 6], ethertype: u16, room: usize) -> Result<*mut u8, String> {
        let memory = allocate(HEADER + ETHERNET + room)?;
        put(memory, HEADER, &to);
        put(memory, HEADER + 6, &self.mac);
        put(memory, HEADER + 12, &ethertype.to_be_bytes());
        Ok(memory)
    }

    /// 64 bytes of an experimental type, which no protocol of the host takes.
    fn small_frame(&self) -> Frame {
        let memory = self.frame(NOBODY_MAC, 0x88b5, SMALL).unwrap_or(core::ptr::null_mut());
        Frame { address: memory as u64, bytes: HEADER + SMALL }
    }

    /// A TCP segment of 60 KiB, to be cut into ones of 1,460 bytes.
    fn large_frame(&self) -> Result<Frame, String> {
        let memory = self.frame(NOBODY_MAC, 0x0800, LARGE)?;
        // NEEDS_CSUM, TCPV4, length of the headers, size of a segment, where the checksum starts and goes to.
        put(memory, 0, &[1, 1]);
        for (at, value) in [(2, 54u16), (4, 1460), (6, 34), (8, 16)] {
            put(memory, at, &value.to_le_bytes());
        }
        put(memory, HEADER + ETHERNET, &ip_header(6, LARGE - 20));
        // Data offset of 5 words, ACK.
        put(memory, HEADER + ETHERNET + 20 + 12, &[0x50, 0x10]);
        Ok(Frame { address: memory as u64, bytes: HEADER + ETHERNET + LARGE })
    }

    /// Sends the same frame again and again, `depth` of them at a time.
    fn send_flood(
        &mut self,
        name: &str,
        frame: Frame,
        depth: u16,
        batch: bool,
        ms: u64,
    ) -> Result<(), String> {
        ensure!(frame.address != 0, "out of memory");
        for number in 0..depth {
            self.transmit.describe(number, frame.address, frame.bytes as u32, 0, None);
        }
        // What the first frames meet (a device asleep, cold caches) is not measured.
        self.flood(name, depth, batch, ms / 10 + 1)?;
        let (frames, kicks, ticks) = self.flood(name, depth, batch, ms)?;
        let ns = u128::from(ticks) * 1_000_000 / u128::from(cpu::tsc_per_ms());
        let pps = u128::from(frames) * 1_000_000_000 / ns.max(1);
        let mbit = pps * (frame.bytes - HEADER) as u128 * 8 / 1_000_000;
        println!("bench {name} pps={pps} mbit={mbit} kicks={kicks} frames={frames}");
        Ok(())
    }

    /// Frames, notifications, ticks.
    fn flood(&mut self, name: &str, depth: u16, batch: bool, ms: u64) -> Result<(u64, u64, u64), String> {
        let (mut frames, mut kicks) = (0, 0);
        let start = cpu::tsc();
        let end = start + ms * cpu::tsc_per_ms();
        let limit = end + TIMEOUT_MS * cpu::tsc_per_ms();
        for number in 0..depth {
            self.transmit.offer(number);
            if !batch {
                kicks += u64::from(self.transmit.kick());
            }
        }
        let mut in_flight = depth;
        let mut unannounced = batch;
        while in_flight > 0 {
            let Some(number) = self.transmit.take() else {
                if core::mem::take(&mut unannounced) {
                    kicks += u64::from(self.transmit.kick());
                }
                ensure!(cpu::tsc() < limit, "{}", queue::timed_out(name));
                core::hint::spin_loop();
                continue;
            };
            frames += 1;
            // Looking at the clock for each frame would be most of the work.
            if frames % 16 == 0 && cpu::tsc() >= end || in_flight < depth {
                in_flight -= 1;
                continue;
            }
            self.transmit.offer(number);
            if batch {
                unannounced = true;
            } else {
                kicks += u64::from(self.transmit.kick());
            }
        }
        Ok((frames, kicks, cpu::tsc() - start))
    }

    /// Sends one frame and waits until it is the guest's again.
    fn send_one(&mut self, frame: Frame) -> Result<(), String> {
        self.transmit.describe(0, frame.address, frame.bytes as u32, 0, None);
        self.transmit.offer(0);
        self.transmit.kick();
        let limit = cpu::tsc() + TIMEOUT_MS * cpu::tsc_per_ms();
        while self.transmit.take().is_none() {
            ensure!(cpu::tsc() < limit, "{}", queue::timed_out("a frame to send"));
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// The next received frame's buffer, which goes back at the next call of [`Nic::give`].
    fn take(&mut self, limit: u64) -> Result<u16, String> {
        loop {
            if let Some(number) = self.receive.take() {
                return Ok(number);
            }
            ensure!(cpu::tsc() < limit, "{}", queue::timed_out("a frame to receive"));
            core::hint::spin_loop();
        }
    }

    fn give(&mut self, number: u16) {
        self.receive.offer(number);
        self.receive.kick();
    }

    /// Has the host's side send as fast as it can, and counts.
    fn receive_flood(&mut self, name: &str, ms: u64) -> Result<(), String> {
        let request = (ms * 3 / 2) as u32;
        let memory = self.frame(PEER_MAC, 0x0800, SMALL)?;
        put(memory, HEADER + ETHERNET, &ip_header(17, 8 + 4));
        // UDP: ports, length, no checksum.
        let [high, low] = FLOOD_PORT.to_be_bytes();
        put(memory, HEADER + ETHERNET + 20, &[high, low, high, low, 0, 12, 0, 0]);
        put(memory, HEADER + ETHERNET + 28, &request.to_be_bytes());
        self.send_one(Frame { address: memory as u64, bytes: HEADER + SMALL })?;
        let limit = cpu::tsc() + (ms + TIMEOUT_MS) * cpu::tsc_per_ms();
        // The first tenth is not measured.
        let mut start = None;
        let mut frames = 0_u64;
        let first = self.take(limit)?;
        self.give(first);
        let warm = cpu::tsc() + ms * cpu::tsc_per_ms() / 10;
        let ticks = loop {
            let number = self.take(limit)?;
            self.give(number);
            frames += 1;
            if frames % 16 != 0 {
                continue;
            }
            let now = cpu::tsc();
            match start {
                None if now >= warm => {
                    frames = 0;
                    start = Some(now);
                }
                Some(start) if now >= start + ms * cpu::tsc_per_ms() => break now - start,
                _ => {}
            }
        };
        let ns = u128::from(ticks) * 1_000_000 / u128::from(cpu::tsc_per_ms());
        let pps = u128::from(frames) * 1_000_000_000 / ns.max(1);
        println!("bench {name} pps={pps} mbit={} frames={frames}", pps * SMALL as u128 * 8 / 1_000_000);
        Ok(())
    }

    /// Sends what is in descriptor 0 and waits for an echo reply; the ticks until it came, or None if it didn't.
    fn ping(&mut self, ms: u64) -> Result<Option<u64>, String> {
        let start = cpu::tsc();
        let limit = start + ms * cpu::tsc_per_ms();
        self.transmit.offer(0);
        self.transmit.kick();
        let mut answered = None;
        while answered.is_none() && cpu::tsc() < limit {
            let Some(number) = self.receive.take() else {
                core::hint::spin_loop();
                continue;
            };
            // SAFETY: within the receive buffers: type of the IP protocol and of the ICMP message.
            let [protocol, kind] = [23, 34].map(|at| unsafe {
                self.buffers.add(BUFFER_BYTES * usize::from(number) + HEADER + at).read_volatile()
            });
            if (protocol, kind) == (1, 0) {
                answered = Some(cpu::tsc() - start);
            }
            self.give(number);
        }
        let limit = cpu::tsc() + TIMEOUT_MS * cpu::tsc_per_ms();
        while self.transmit.take().is_none() {
            ensure!(cpu::tsc() < limit, "{}", queue::timed_out("a frame to send"));
        }
        Ok(answered)
    }

    /// Pings the host's side, one at a time.
    fn echo(&mut self, name: &str, ms: u64, samples: &mut Samples) -> Result<(), String> {
        const PAYLOAD: usize = SMALL - ETHERNET - 20;
        let memory = self.frame(PEER_MAC, 0x0800, SMALL)?;
        put(memory, HEADER + ETHERNET, &ip_header(1, PAYLOAD));
        let mut request = [0; PAYLOAD];
        request[0] = 8;
        let sum = checksum(&request);
        request[2..4].copy_from_slice(&sum.to_be_bytes());
        put(memory, HEADER + ETHERNET + 20, &request);
        let frame = Frame { address: memory as u64, bytes: HEADER + SMALL };
        self.transmit.describe(0, frame.address, frame.bytes as u32, 0, None);
        // The host's stack sends nothing before it has noticed that the link is up, which takes it up to a second.
        let limit = cpu::tsc() + TIMEOUT_MS * cpu::tsc_per_ms();
        while self.ping(10)?.is_none() {
            ensure!(cpu::tsc() < limit, "{}", queue::timed_out("the first echo"));
        }
        for ms in [ms / 10 + 1, ms] {
            samples.clear();
            let end = cpu::tsc() + ms * cpu::tsc_per_ms();
            while cpu::tsc() < end {
                let ticks = self.ping(TIMEOUT_MS)?;
                samples.add(ticks.ok_or_else(|| queue::timed_out("an echo"))?);
            }
        }
        let ns = |ticks: u64| u128::from(ticks) * 1_000_000 / u128::from(cpu::tsc_per_ms());
        let (p50, p99) = (ns(samples.percentile(50)), ns(samples.percentile(99)));
        println!("bench {name} p50_ns={p50} p99_ns={p99}");
        Ok(())
    }
}
