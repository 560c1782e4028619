//! virtio-net.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Interface, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};

use super::{Subject, TestResult, pairs, pattern};
use crate::nic::{Nic, now};
use crate::report::Report;
use crate::virtio::StatusWrites;
use crate::{cpu, ensure};

const IDENT: u16 = 0x4d47;
/// Bytes of an echo request; the last one makes a frame of 1,514 bytes.
const SIZES: [usize; 6] = [8, 9, 56, 511, 1000, 1472];
const IP_AND_ICMP_HEADERS: usize = 28;
/// Echo requests sent before any answer is read: twice what a queue of 16 holds, less than the tap's queue.
const BURST: u16 = 32;
const BURST_BYTES: usize = 1000;
const ANSWER_TIMEOUT_US: u64 = 3_000_000;

pub fn run(subject: &Subject<'_>, (way, withheld, status): &(&str, u64, StatusWrites), report: &mut Report) {
    let name = format!("{}-{way}", subject.name);
    let several = subject.window.features() & pairs::SEVERAL != 0;
    if let Some(expected) = subject.boot.command_line.number("mote.pairs").filter(|_| subject.number == 0) {
        let found = if several { u64::from(subject.window.config(8) & 0xffff) } else { 1 };
        let right = found == expected;
        let why = || format!("{found} queue pairs, expected {expected}");
        report.result(
            format!("{name}-pairs"),
            right.then_some(()).ok_or_else(why).and_then(|()| pairs::run(subject)),
        );
    }
    let nic = subject.window.transport(*withheld, *status).map_err(String::from).and_then(Nic::new);
    let mut nic = match nic {
        Ok(nic) => nic,
        Err(why) => return report.result(name, Err(why)),
    };
    report.result(format!("{name}-send"), send(subject, &mut nic));
    let addresses = subject.boot.command_line.value("mote.net").filter(|_| subject.number == 0);
    let Some(addresses) = addresses else { return };
    match Pinger::new(&mut nic, addresses) {
        Ok(mut pinger) => {
            report.result(format!("{name}-ping"), pinger.sizes(&mut nic));
            let rounds = if subject.boot.command_line.has("mote.snapshots") { 2 } else { 1 };
            report.result(format!("{name}-burst"), pinger.burst(&mut nic, rounds));
            if subject.use_irqs {
                report.result(format!("{name}-interrupt"), pinger.interrupt(&mut nic, subject));
            }
        }
        Err(why) => report.result(format!("{name}-ping"), Err(why)),
    }
}

/// A frame of an experimental type (IEEE 802, 0x88b5) to everybody.
fn send(subject: &Subject<'_>, nic: &mut Nic) -> TestResult {
    let mac = nic.mac();
    ensure!(mac != [0; 6] && mac[0] & 1 == 0, "MAC address {mac:02x?}");
    if let Some(expected) = subject.boot.command_line.value("mote.mac").filter(|_| subject.number == 0) {
        let found = mac.map(|byte| format!("{byte:02x}")).join(":");
        ensure!(found == expected, "MAC address {found}, expected {expected}");
    }
    for bytes in [60, 64, 1514] {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&[0x88, 0xb5]);
        frame.resize(bytes, 0x55);
        nic.send(&frame)?;
    }
    Ok(())
}

struct Pinger {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: smoltcp::iface::SocketHandle,
    peer: IpAddress,
    sequence: u16,
}

/// Pings of which one must come with an interrupt.
const MAX_ASKS: usize = 200;

impl Pinger {
    fn new(nic: &mut Nic, addresses: &str) -> Result<Self, String> {
        let (own, peer) = addresses.split_once(',').ok_or("mote.net has no peer")?;
        let own: Ipv4Cidr = own.parse().map_err(|()| "mote.net has no address")?;
        let peer: Ipv4Address = peer.parse().map_err(|_| "mote.net has no peer address")?;
        let mut interface = nic.interface();
        interface.update_ip_addrs(|list| {
            let _ = list.push(IpCidr::Ipv4(own));
        });
        let buffer = || {
            let bytes = usize::from(BURST) * (BURST_BYTES + 64);
            icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; usize::from(BURST)], vec![0; bytes])
        };
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(IDENT)).map_err(|error| error.to_string())?;
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Ok(Self { interface, sockets, handle, peer: peer.into(), sequence: 0 })
    }

    fn ask(&mut self, data: &[u8]) -> TestResult {
        self.sequence += 1;
        let request = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no: self.sequence, data };
        let socket = self.sockets.get_mut::<icmp::Socket>(self.handle);
        let payload = socket.send(request.buffer_len(), self.peer).map_err(|error| error.to_string())?;
        request.emit(&mut Icmpv4Packet::new_unchecked(payload), &ChecksumCapabilities::default());
        Ok(())
    }

    /// Waits for the next answer; `Ok(None)` after the time-out.
    fn answer(&mut self, nic: &mut Nic) -> Result<Option<(u16, Vec<u8>)>, String> {
        let mut result = None;
        cpu::wait_until(ANSWER_TIMEOUT_US, || {
            self.interface.poll(now(), nic, &mut self.sockets);
            let socket = self.sockets.get_mut::<icmp::Socket>(self.handle);
            result = socket.recv().ok().map(|(bytes, _)| bytes.to_vec());
            result.is_some()
        });
        let Some(bytes) = result else { return Ok(None) };
        let packet = Icmpv4Packet::new_checked(&bytes[..]).map_err(|error| error.to_string())?;
        match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()) {
            Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) => Ok(Some((seq_no, data.to_vec()))),
            other => Err(format!("not an echo reply: {other:?}")),
        }
    }

    fn sizes(&mut self, nic: &mut Nic) -> TestResult {
        let mtu = nic.mtu();
        for bytes in SIZES.into_iter().filter(|bytes| bytes + IP_AND_ICMP_HEADERS <= mtu) {
            for _ in 0..8 {
                let mut data = pattern(bytes, u64::from(self.sequence), bytes + 8);
                data.truncate(bytes);
                self.ask(&data)?;
                let answer = self.answer(nic)?.ok_or_else(|| format!("no answer to {bytes} bytes"))?;
                ensure!(answer == (self.sequence, data), "wrong answer to {bytes} bytes");
            }
        }
        Ok(())
    }

    /// Asks many times before it looks for answers. Where snapshots are taken (`mote.snapshots`), what was in the tap's queue is
    /// lost with the process, as on a wire, and is asked once more. An answer that comes only then was not lost: it waited for
    /// a notification, and is a failure.
    fn burst(&mut self, nic: &mut Nic, rounds: u64) -> TestResult {
        let data = pattern(1, 2, BURST_BYTES);
        let mut missing = BURST;
        for _ in 0..rounds {
            let (first, asked) = (self.sequence + 1, missing);
            for _ in 0..asked {
                self.ask(&data)?;
            }
            while missing > 0 {
                let Some((sequence, answer)) = self.answer(nic)? else { break };
                ensure!(
                    sequence.wrapping_sub(first) < asked && answer == data,
                    "wrong or late answer {sequence}"
                );
                missing -= 1;
            }
            if missing == 0 {
                return Ok(());
            }
        }
        Err(format!("{} answers to {BURST} requests", BURST - missing))
    }

    fn interrupt(&mut self, nic: &mut Nic, subject: &Subject<'_>) -> TestResult {
        nic.acknowledge();
        let before = subject.route_irq();
        nic.enable_interrupts();
        // A driver that polls may have told the device that it needs no interrupt for one answer (virtio 1.2 §2.7.10), but
        // not for all of many.
        for _ in 0..MAX_ASKS {
            self.ask(&[7; 8])?;
            ensure!(self.answer(nic)?.is_some(), "no answer");
            if cpu::irq_count(subject.window.pin()) != before {
                break;
            }
        }
        subject.wait_for_irq(before)?;
        nic.acknowledge();
        Ok(())
    }
}
