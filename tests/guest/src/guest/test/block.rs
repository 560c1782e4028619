//! virtio-blk.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};

use super::{IRQ_TIMEOUT_US, Subject, TestResult, pattern};
use crate::heap::Identity;
use crate::report::Report;
use crate::virtio::{Masked, StatusWrites};
use crate::{cpu, ensure};

type Block = VirtIOBlk<Identity, Masked>;

/// Sectors of one request, as far as the disk has them.
const LENGTHS: [usize; 6] = [1, 2, 7, 8, 128, 2048];
/// Requests in flight at once: what the driver's queue of 16 takes without indirect descriptors.
const IN_FLIGHT: usize = 5;
const FLIGHT_TIMEOUT_US: u64 = 5_000_000;
/// The smallest disk the tests work on.
const MIN_SECTORS: usize = 64;

pub fn run(subject: &Subject<'_>, (way, withheld, status): &(&str, u64, StatusWrites), report: &mut Report) {
    let name = format!("{}-{way}", subject.name);
    let device = subject
        .window
        .transport(*withheld, *status)
        .map_err(String::from)
        .and_then(|transport| Block::new(transport).map_err(|error| error.to_string()));
    let mut device = match device {
        Ok(device) => device,
        Err(why) => return report.result(name, Err(why)),
    };
    let read_only = subject.boot.command_line.number("mote.read_only") == Some(subject.number as u64);
    if device.readonly() != read_only {
        report.result(&name, Err(format!("read-only: {}", device.readonly())));
        return;
    }
    report.result(format!("{name}-id"), id(subject, &mut device));
    report.result(format!("{name}-interrupt"), interrupt(subject, &mut device));
    if read_only {
        report.result(format!("{name}-refuses-writes"), refuses_writes(&mut device));
    } else {
        report.result(format!("{name}-patterns"), patterns(&mut device, *withheld >> 28));
        report.result(format!("{name}-flush"), device.flush());
    }
    report.result(format!("{name}-in-flight"), in_flight(&mut device));
    report.result(format!("{name}-range"), range(&mut device, read_only));
}

fn text(error: Error) -> String {
    error.to_string()
}

fn id(subject: &Subject<'_>, device: &mut Block) -> TestResult {
    let mut id = [0; 20];
    let length = device.device_id(&mut id).map_err(text)?;
    let id = core::str::from_utf8(&id[..length]).map_err(|_| "not text")?;
    let expected =
        subject.boot.command_line.value("mote.block_ids").and_then(|ids| ids.split(',').nth(subject.number));
    ensure!(expected.is_none_or(|expected| expected == id), "id is {id:?}, expected {expected:?}");
    Ok(())
}

fn interrupt(subject: &Subject<'_>, device: &mut Block) -> TestResult {
    if !subject.use_irqs {
        return Ok(());
    }
    let before = subject.route_irq();
    device.enable_interrupts();
    // The ring is looked at only after the interrupt: with EVENT_IDX a driver that takes the used buffer first may have
    // told the device that it needs none (virtio 1.2 §2.7.10).
    let mut request = Box::new((BlkReq::default(), [0_u8; SECTOR_SIZE], BlkResp::default()));
    let (head, data, status) = &mut *request;
    // SAFETY: the box is kept and left alone until the token was completed; without an interrupt it is leaked.
    let token = unsafe { device.read_blocks_nb(0, head, data, status) }.map_err(text)?;
    // An interrupt for an earlier request, whose used buffer was found by polling, may come late and first.
    let mut seen = before;
    while seen == before || device.peek_used() != Some(token) {
        if let Err(why) = subject.wait_for_irq(seen) {
            core::mem::forget(request);
            return Err(why);
        }
        seen = cpu::irq_count(subject.window.pin());
    }
    // SAFETY: the very buffers of this token.
    unsafe { device.complete_read_blocks(token, head, data, status) }.map_err(text)?;
    if !subject.window.has_interrupt_status() {
        return Ok(());
    }
    ensure!(!device.ack_interrupt().is_empty(), "interrupt without status");
    ensure!(
        cpu::wait_until(IRQ_TIMEOUT_US, || device.ack_interrupt().is_empty()),
        "interrupt status is set after acknowledgement"
    );
    Ok(())
}

fn sectors(device: &Block) -> Result<usize, String> {
    let sectors = device.capacity() as usize;
    ensure!(sectors >= MIN_SECTORS, "{sectors} sectors, the tests need {MIN_SECTORS}");
    Ok(sectors)
}

/// Writes at the start, in the middle and at the end in several lengths, then reads everything back, from buffers that
/// start at odd addresses, too.
fn patterns(device: &mut Block, generation: u64) -> TestResult {
    let sectors = sectors(device)?;
    for length in LENGTHS.into_iter().filter(|&length| length <= sectors) {
        for start in [0, (sectors - length) / 2, sectors - length] {
            let written = pattern(start, generation + length as u64, length * SECTOR_SIZE);
            device.write_blocks(start, &written).map_err(text)?;
            let mut read = vec![0; written.len() + 1];
            device.read_blocks(start, &mut read[1..]).map_err(text)?;
            ensure!(read[1..] == written[..], "{length} sectors at {start} read back wrong");
            if start > 0 {
                let mut shifted = vec![0; SECTOR_SIZE];
                device.read_blocks(start + length - 1, &mut shifted).map_err(text)?;
                ensure!(
                    shifted[..] == written[written.len() - SECTOR_SIZE..],
                    "sector {start} + {length} - 1 is wrong"
                );
            }
        }
    }
    // The state that a host can verify afterwards: every sector of the first and last 32 in generation 0.
    for start in [0, sectors - 32] {
        device.write_blocks(start, &pattern(start, 0, 32 * SECTOR_SIZE)).map_err(text)?;
    }
    Ok(())
}

fn refuses_writes(device: &mut Block) -> TestResult {
    let mut before = [0; SECTOR_SIZE];
    device.read_blocks(1, &mut before).map_err(text)?;
    let inverted = before.map(|byte| !byte);
    ensure!(device.write_blocks(1, &inverted).is_err(), "a write to a read-only device succeeded");
    let mut after = [0; SECTOR_SIZE];
    device.read_blocks(1, &mut after).map_err(text)?;
    ensure!(after == before, "a refused write changed the disk");
    Ok(())
}

/// Several reads at once, completed in whatever order they come.
fn in_flight(device: &mut Block) -> TestResult {
    let sectors = sectors(device)?;
    let places: Vec<usize> = (0..IN_FLIGHT).map(|n| n * (sectors - 1) / (IN_FLIGHT - 1)).collect();
    let mut expected = Vec::new();
    for &place in &places {
        let mut sector = [0; SECTOR_SIZE];
        device.read_blocks(place, &mut sector).map_err(text)?;
        expected.push(sector);
    }
    let mut requests: Vec<_> = (0..IN_FLIGHT)
        .map(|_| Box::new((BlkReq::default(), [0_u8; SECTOR_SIZE], BlkResp::default())))
        .collect();
    let mut tokens = Vec::new();
    for (request, &place) in requests.iter_mut().zip(&places) {
        let (head, data, status) = &mut **request;
        // SAFETY: the boxes are kept and left alone until their token was completed; on a time-out they are leaked.
        tokens.push(unsafe { device.read_blocks_nb(place, head, data, status) }.map_err(text)?);
    }
    let mut done = 0;
    while done < IN_FLIGHT {
        if !cpu::wait_until(FLIGHT_TIMEOUT_US, || device.peek_used().is_some()) {
            requests.into_iter().for_each(core::mem::forget);
            return Err(format!("{done} of {IN_FLIGHT} requests completed"));
        }
        let token = device.peek_used().unwrap_or(u16::MAX);
        let number =
            tokens.iter().position(|&t| t == token).ok_or("completed a request that was not made")?;
        let (head, data, status) = &mut *requests[number];
        // SAFETY: the very buffers of this token.
        unsafe { device.complete_read_blocks(token, head, data, status) }.map_err(text)?;
        ensure!(*data == expected[number], "request {number} read the wrong data");
        done += 1;
    }
    Ok(())
}

/// Requests that begin or end behind the disk are errors, and the device goes on.
fn range(device: &mut Block, read_only: bool) -> TestResult {
    let sectors = sectors(device)?;
    let mut two = [0; 2 * SECTOR_SIZE];
    for start in [sectors, sectors - 1, usize::MAX, usize::MAX / SECTOR_SIZE] {
        ensure!(
            device.read_blocks(start, &mut two) == Err(Error::IoError),
            "read at {start:#x} was no I/O error"
        );
        if !read_only {
            ensure!(
                device.write_blocks(start, &two) == Err(Error::IoError),
                "write at {start:#x} was no I/O error"
            );
        }
    }
    device.read_blocks(sectors - 1, &mut two[..SECTOR_SIZE]).map_err(text)
}
