//! `mote.test`: every device by the rules. More words on the command line:
//!
//! - `mote.expect=NETS,BLOCKS,RNGS`: how many devices there must be.
//! - `mote.pmems=N`: how many persistent memory devices there must be; `mote.pmem_read_only=N`: device N (from 0) is read-only.
//! - `mote.console=COLUMNSxROWS`: there is a console of this size, and somebody who answers each line `mote-console WAY` with
//!   `answer WAY`.
//! - `mote.transport=pci` or `mmio`: where all of them must be.
//! - `mote.snapshots`: the machine is saved now and then, and what waits on its tap is lost by that.
//! - `mote.pairs=N`: the first network device has so many queue pairs (needs `mote.net`).
//! - `mote.net=ADDRESS/PREFIX,PEER`: the first network device has this address, and PEER answers pings.
//! - `mote.memory_mib=N`, `mote.processors=N`: what the memory map and the MADT must say.
//! - `mote.smbios=PRODUCT,SERIAL,TAG,OEM`: the strings of the SMBIOS tables, `_` for spaces, the OEM strings with `+` between.
//! - `mote.time=SECONDS`: the real-time clock tells this time since 1970, give or take an hour.
//! - `mote.read_only=N`: block device N (from 0) is read-only.
//! - `mote.block_ids=A,B`: the serial numbers of the block devices.
//! - `mote.no_reset`: leaves out what needs a device reset, `mote.no_irq` what needs the I/O APIC, `mote.no_acpi` what
//!   needs a way to switch off.
//! - `mote.serial_echo`: waits for a line of input and prints it.

mod block;
pub mod console;
mod net;
mod pairs;
mod pci;
mod platform;
pub mod pmem;
mod rng;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::boot::Boot;
use crate::cpu;
use crate::ensure;
use crate::plug;
use crate::report::Report;
use crate::virtio::{self, EVENT_IDX, INDIRECT, Kind, Place, StatusWrites, Window, register};

/// How a device is driven: name, features held back, status writes.
const WAYS: [(&str, u64, StatusWrites); 4] = [
    ("all", 0, StatusWrites::Single),
    ("no-event-idx", EVENT_IDX, StatusWrites::Single),
    ("no-indirect", INDIRECT, StatusWrites::Combined),
    ("plain", EVENT_IDX | INDIRECT, StatusWrites::Combined),
];
/// How long an interrupt may take.
const IRQ_TIMEOUT_US: u64 = 1_000_000;

type TestResult = Result<(), String>;

/// Runs all tests.
pub fn run(boot: &Boot) {
    let mut report = Report::default();
    cpu::calibrate();
    let line = boot.command_line;
    let use_irqs = !line.has("mote.no_irq");
    platform::run(boot, &mut report);
    if use_irqs {
        cpu::enable_interrupts();
        report.result("timer-interrupt", platform::timer_interrupt());
    }
    let windows = virtio::discover(boot);
    if let Some(expected) = line.value("mote.transport") {
        let pci = windows.iter().filter(|window| matches!(window.place, Place::Pci(_))).count();
        let right = pci == if expected == "pci" { windows.len() } else { 0 };
        let why = || format!("{pci} of {} devices are on PCI, expected {expected}", windows.len());
        report.result("transport", if right { Ok(()) } else { Err(why()) });
    }
    let count = |kind| windows.iter().filter(|window| window.kind == kind).count();
    if let Some(expected) = line.value("mote.expect") {
        let found = format!("{},{},{}", count(Kind::Net), count(Kind::Block), count(Kind::Rng));
        report.result(
            "devices",
            if found == expected { Ok(()) } else { Err(format!("found {found}, expected {expected}")) },
        );
    }
    if let Some(expected) = line.number("mote.pmems") {
        let found = count(Kind::Pmem) as u64;
        let right = found == expected;
        report.result(
            "pmems",
            right.then_some(()).ok_or_else(|| format!("found {found}, expected {expected}")),
        );
    }
    if line.has("mote.console") {
        let found = count(Kind::Console);
        report.result("console", if found == 1 { Ok(()) } else { Err(format!("found {found}, expected 1")) });
    }
    let ways = if line.has("mote.no_reset") { &WAYS[..1] } else { &WAYS[..] };
    let mut numbers = [0_usize; 6];
    for window in &windows {
        let (name, number) = match window.kind {
            Kind::Net => ("net", &mut numbers[0]),
            Kind::Block => ("block", &mut numbers[1]),
            Kind::Rng => ("rng", &mut numbers[2]),
            Kind::Pmem => ("pmem", &mut numbers[3]),
            Kind::Mem => ("mem", &mut numbers[4]),
            Kind::Console => ("console", &mut numbers[5]),
            Kind::Other(_) => continue,
        };
        let subject = Subject { boot, window, name: format!("{name}{number}"), number: *number, use_irqs };
        *number += 1;
        report.result(format!("{}-registers", subject.name), registers(window));
        if let Place::Pci(function) = &window.place {
            pci::run(&subject, function, &mut report);
        }
        for way in ways {
            match window.kind {
                Kind::Net => net::run(&subject, way, &mut report),
                Kind::Block => block::run(&subject, way, &mut report),
                Kind::Pmem => pmem::run(&subject, way, &mut report),
                Kind::Console => console::run(&subject, way, &mut report),
                Kind::Mem => report.result(format!("{}-{}", subject.name, way.0), plug::idle(window)),
                _ => rng::run(&subject, way, &mut report),
            }
        }
        if ways.len() > 1 {
            report.result(format!("{}-reset", subject.name), reset(window));
        }
    }
    report.finish();
}

/// A device under test.
struct Subject<'a> {
    boot: &'a Boot,
    window: &'a Window,
    name: String,
    /// Counted among its kind.
    number: usize,
    use_irqs: bool,
}

impl Subject<'_> {
    /// Routes the device's interrupt and waits for one more than `before` while `poll` is called.
    fn wait_for_irq(&self, before: u32) -> TestResult {
        let irq = self.window.pin();
        ensure!(cpu::wait_until(IRQ_TIMEOUT_US, || cpu::irq_count(irq) != before), "no interrupt {irq}");
        Ok(())
    }

    /// Routes the device's interrupt and returns how often it came so far.
    fn route_irq(&self) -> u32 {
        self.window.route_irq();
        cpu::irq_count(self.window.pin())
    }
}

/// What holds for every device before it is driven (virtio 1.2 §4.2.2.1, §2.2).
fn registers(window: &Window) -> TestResult {
    ensure!(window.get(register::VERSION) == 2, "version {}", window.get(register::VERSION));
    ensure!(window.features() & 1 << 32 != 0, "VIRTIO_F_VERSION_1 is not offered");
    ensure!(
        window.get(register::STATUS) == 0,
        "status is {:#x} before a driver",
        window.get(register::STATUS)
    );
    window.set(register::QUEUE_SELECT, 0);
    let size = window.get(register::QUEUE_SIZE_MAX);
    ensure!(size.is_power_of_two() && size <= 32768, "queue 0 has size {size}");
    window.set(register::QUEUE_SELECT, 200);
    let none = window.get(register::QUEUE_SIZE_MAX);
    ensure!(none == 0, "queue 200 has size {none}");
    window.set(register::DEVICE_FEATURES_SELECT, 7);
    let beyond = window.get(register::DEVICE_FEATURES);
    ensure!(beyond == 0, "features 224 and above are {beyond:#x}");
    Ok(())
}

/// A reset device is as new (virtio 1.2 §2.4).
fn reset(window: &Window) -> TestResult {
    window.set(register::STATUS, 1);
    window.set(register::STATUS, 3);
    let features = window.features();
    window.set(register::DRIVER_FEATURES_SELECT, 1);
    window.set(register::DRIVER_FEATURES, (features >> 32) as u32);
    window.set(register::STATUS, 0xb);
    ensure!(
        window.get(register::STATUS) == 0xb,
        "FEATURES_OK was not kept: {:#x}",
        window.get(register::STATUS)
    );
    window.set(register::STATUS, 0);
    ensure!(window.get(register::STATUS) == 0, "status is {:#x} after a reset", window.get(register::STATUS));
    window.set(register::QUEUE_SELECT, 0);
    ensure!(window.get(register::QUEUE_READY) == 0, "queue 0 is ready after a reset");
    ensure!(window.get(register::INTERRUPT_STATUS) == 0, "interrupt status is set after a reset");
    Ok(())
}

/// `buffer` filled with what sector `sector` and those behind hold after `generation`.
fn pattern(sector: usize, generation: u64, bytes: usize) -> Vec<u8> {
    let words = (0..bytes / 8).map(|word| {
        let place = (sector * 64 + word) as u64;
        (place ^ generation << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    words.flat_map(u64::to_le_bytes).collect()
}
