//! virtio-console.

use alloc::format;
use alloc::string::{String, ToString};

use virtio_drivers::device::console::VirtIOConsole;

use super::{Subject, TestResult};
use crate::heap::Identity;
use crate::report::Report;
use crate::virtio::{Masked, StatusWrites};
use crate::{cpu, ensure};

/// Longest wait for an answer.
const ANSWER_TIMEOUT_US: u64 = 10_000_000;
/// Longer than what one buffer of the device's own holds.
const LONG: usize = 50_000;

pub(super) fn run(
    subject: &Subject<'_>,
    (way, withheld, status): &(&str, u64, StatusWrites),
    report: &mut Report,
) {
    let name = &subject.name;
    match subject.window.transport(*withheld, *status) {
        Ok(transport) => report.result(format!("{name}-{way}"), drive(subject, way, transport)),
        Err(why) => report.result(format!("{name}-{way}"), Err(why)),
    }
}

fn drive(subject: &Subject<'_>, way: &str, transport: Masked) -> TestResult {
    let mut console = VirtIOConsole::<Identity, _>::new(transport).map_err(|error| error.to_string())?;
    let Some(expected) = subject.boot.command_line.value("mote.console") else {
        return send(&mut console, b"nobody answers\n");
    };
    let size = console.size().map_err(|error| error.to_string())?;
    let size = size.map_or_else(String::new, |size| size.to_string());
    ensure!(size == expected, "the size is {size:?}, expected {expected}");
    let before = if subject.use_irqs { subject.route_irq() } else { 0 };
    let long: alloc::vec::Vec<u8> = (0..LONG).map(|at| b'a' + (at % 26) as u8).collect();
    send(&mut console, &long)?;
    send(&mut console, format!("\nmote-console {way}\n").as_bytes())?;
    let mut answer = String::new();
    let answered = cpu::wait_until(ANSWER_TIMEOUT_US, || {
        while let Ok(Some(byte)) = console.recv(true) {
            answer.push(char::from(byte));
        }
        answer.ends_with('\n')
    });
    ensure!(answered, "no answer but {answer:?}");
    ensure!(answer == format!("answer {way}\n"), "the answer is {answer:?}");
    if subject.use_irqs {
        subject.wait_for_irq(before)?;
    }
    Ok(())
}

fn send(console: &mut VirtIOConsole<Identity, Masked>, bytes: &[u8]) -> TestResult {
    console.send_bytes(bytes).map_err(|error| error.to_string())
}

/// The device takes output.
pub fn works(transport: Masked) -> TestResult {
    let mut console = VirtIOConsole::<Identity, _>::new(transport).map_err(|error| error.to_string())?;
    send(&mut console, b"after the abuse\n")
}
