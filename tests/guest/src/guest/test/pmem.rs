//! virtio-pmem, driven by the guest itself: a file in physical memory, and flushes.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use super::{Subject, TestResult};
use crate::bench::queue::{Queue, WRITE, negotiate};
use crate::cpu::{self, mmio_read, mmio_write};
use crate::ensure;
use crate::report::Report;
use crate::virtio::{EVENT_IDX, INDIRECT, Place, StatusWrites, Window, register};

const PAGE: u64 = 4096;
/// Address and size are multiples of it (virtio 1.3 §5.19.4 leaves it to the device; Linux wants it).
const ALIGNMENT: u64 = 2 << 20;
const FLUSH: u32 = 0;
const OK: u32 = 0;
const EIO: u32 = 1;
const TIMEOUT_US: u64 = 5_000_000;

pub(super) fn run(
    subject: &Subject<'_>,
    (way, withheld, _): &(&str, u64, StatusWrites),
    report: &mut Report,
) {
    let name = format!("{}-{way}", subject.name);
    let read_only = subject.boot.command_line.number("mote.pmem_read_only") == Some(subject.number as u64);
    report.result(&name, drive(subject, *withheld, read_only));
}

/// Request and answer of a flush.
#[repr(C)]
struct Request {
    kind: u32,
    answer: u32,
}

/// One flush, without interrupts.
pub fn works(window: &Window) -> TestResult {
    let features = negotiate(window, EVENT_IDX | INDIRECT)?;
    let mut queue = Queue::new(window, 0, 8, features)?;
    window.set(register::STATUS, 0xf);
    let result = request(&mut queue, FLUSH, OK, |_| Ok(()));
    window.set(register::STATUS, 0);
    result
}

fn drive(subject: &Subject<'_>, withheld: u64, read_only: bool) -> TestResult {
    let window = subject.window;
    let [start, size] =
        [0, 8].map(|at| u64::from(window.config(at)) | u64::from(window.config(at + 4)) << 32);
    ensure!(size > 0 && size % ALIGNMENT == 0 && start % ALIGNMENT == 0, "{size:#x} bytes at {start:#x}");
    ensure!(start >= 1 << 32, "it begins at {start:#x}");
    (0..size).step_by(1 << 30).chain([size - 1]).try_for_each(|at| cpu::map_gib_of(start + at))?;
    let features = negotiate(window, (EVENT_IDX | INDIRECT) & !withheld)?;
    if let Place::Pci(function) = &window.place {
        function.assign_message(0);
    }
    let mut queue = Queue::new(window, 0, 8, features)?;
    window.set(register::STATUS, 0xf);
    let result = content(start, size, read_only)
        .and_then(|()| flush(subject, &mut queue, FLUSH, OK))
        .and_then(|()| flush(subject, &mut queue, 7, EIO));
    window.set(register::STATUS, 0);
    result
}

/// What the file has, and whether it takes what is written: to the first and the last bytes of every 64th page, which the host
/// looks for in the file.
fn content(start: u64, size: u64, read_only: bool) -> TestResult {
    let first: u32 = mmio_read(start);
    ensure!(first == u32::from_le_bytes(*b"mote"), "the file begins with {first:#x}");
    for page in (0..size).step_by(64 * PAGE as usize) {
        for at in [page + 8, page + PAGE - 8] {
            let value = (at ^ 0x706d_656d).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let before: u64 = mmio_read(start + at);
            mmio_write(start + at, value);
            let after: u64 = mmio_read(start + at);
            let expected = if read_only { before } else { value };
            ensure!(after == expected, "offset {at:#x} reads {after:#x}, expected {expected:#x}");
        }
    }
    Ok(())
}

/// A request whose end comes with an interrupt.
fn flush(subject: &Subject<'_>, queue: &mut Queue, kind: u32, answer: u32) -> TestResult {
    if !subject.use_irqs {
        return request(queue, kind, answer, |_| Ok(()));
    }
    let before = subject.route_irq();
    request(queue, kind, answer, |queue| {
        queue.want_interrupt();
        queue.kick();
        subject.wait_for_irq(before)?;
        if subject.window.has_interrupt_status() {
            let status = subject.window.get(register::INTERRUPT_STATUS);
            subject.window.set(register::INTERRUPT_ACKNOWLEDGE, status);
            ensure!(status & 1 != 0, "interrupt status is {status}");
        }
        Ok(())
    })
}

/// Makes a request, lets `wait` wait for its end, and looks at the answer.
fn request(
    queue: &mut Queue,
    kind: u32,
    answer: u32,
    wait: impl FnOnce(&mut Queue) -> TestResult,
) -> TestResult {
    // The device may write to it as long as it runs.
    let request: *mut Request = Box::into_raw(Box::new(Request { kind, answer: u32::MAX }));
    queue.describe(0, request as u64, 4, 0, Some(1));
    queue.describe(1, request as u64 + 4, 4, WRITE, None);
    queue.offer(0);
    wait(queue)?;
    queue.kick();
    let mut used = None;
    cpu::wait_until(TIMEOUT_US, || {
        used = queue.take_written();
        used.is_some()
    });
    ensure!(used == Some((0, 4)), "request {kind} was used as {used:?}");
    // SAFETY: the device is done with it; a box that is left to it if it isn't.
    let request = unsafe { Box::from_raw(request) };
    // SAFETY: a valid reference; the device has written it behind the compiler's back.
    let found = unsafe { (&raw const request.answer).read_volatile() };
    ensure!(found == answer, "request {kind} was answered with {found}, expected {answer}");
    Ok::<(), String>(())
}
