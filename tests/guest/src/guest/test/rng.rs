//! virtio-rng.

use alloc::format;
use alloc::string::ToString;
use alloc::vec;

use virtio_drivers::device::rng::VirtIORng;

use super::{Subject, TestResult};
use crate::heap::Identity;
use crate::report::Report;
use crate::virtio::{Masked, StatusWrites};
use crate::{cpu, ensure};

const SIZES: [usize; 5] = [1, 16, 64, 1000, 4096];

pub fn run(subject: &Subject<'_>, (way, withheld, status): &(&str, u64, StatusWrites), report: &mut Report) {
    let name = &subject.name;
    match subject.window.transport(*withheld, *status) {
        Ok(transport) => report.result(format!("{name}-{way}"), drive(subject, transport)),
        Err(why) => report.result(format!("{name}-{way}"), Err(why)),
    }
}

fn drive(subject: &Subject<'_>, transport: Masked) -> TestResult {
    let mut rng = VirtIORng::<Identity, _>::new(transport).map_err(|error| error.to_string())?;
    let before = if subject.use_irqs { subject.route_irq() } else { 0 };
    for bytes in SIZES {
        let mut buffer = vec![0; bytes];
        let got = rng.request_entropy(&mut buffer).map_err(|error| error.to_string())?;
        ensure!((1..=bytes).contains(&got), "{got} bytes for {bytes}");
        let set: u32 = buffer[..got].iter().map(|byte| byte.count_ones()).sum();
        let bits = 8 * got as u32;
        // Ten standard deviations (half the root of the number of bits) around one half.
        ensure!(bits < 1000 || set.abs_diff(bits / 2) < 5 * bits.isqrt(), "{set} of {bits} bits are set");
    }
    let mut halves = [[0; 32]; 2];
    for half in &mut halves {
        rng.request_entropy(half).map_err(|error| error.to_string())?;
    }
    ensure!(halves[0] != halves[1], "the same bytes twice");
    if subject.use_irqs {
        subject.wait_for_irq(before)?;
        if subject.window.has_interrupt_status() {
            ensure!(!rng.ack_interrupt().is_empty(), "interrupt {} without status", subject.window.pin());
            ensure!(rng.ack_interrupt().is_empty(), "interrupt status is set after acknowledgement");
        }
        ensure!(cpu::irq_count(subject.window.pin()) > before, "no interrupt");
    }
    Ok(())
}
