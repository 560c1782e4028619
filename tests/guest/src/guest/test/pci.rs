//! What a function on the PCI bus must do beside its device's work.

use alloc::format;
use alloc::string::ToString;

use virtio_drivers::device::rng::VirtIORng;

use super::{Subject, TestResult};
use crate::cpu::{self, mmio_read, mmio_write};
use crate::ensure;
use crate::heap::Identity;
use crate::pci::Function;
use crate::report::Report;
use crate::virtio::{EVENT_IDX, Kind, StatusWrites, register};

const COMMAND: u64 = 0x04;
const REGISTERS: u64 = 0x10;
/// How far the registers are moved.
const MOVED_BY: u64 = 0x200_0000;
/// How long an interrupt that must not come is waited for.
const QUIET_US: u64 = 2_000;

pub fn run(subject: &Subject<'_>, function: &Function, report: &mut Report) {
    let name = &subject.name;
    report.result(format!("{name}-pci-registers-move"), registers_move(function));
    report.result(format!("{name}-pci-halves"), halves(function));
    report.result(format!("{name}-pci-window"), window(function));
    if subject.use_irqs && subject.window.kind == Kind::Rng {
        report.result(format!("{name}-pci-pending"), pending(subject, function));
    }
}

/// Registers are where the base address register says, and nowhere while memory space is off.
fn registers_move(function: &Function) -> TestResult {
    let status = function.common + 0x14;
    let config = function.config;
    let low: u32 = mmio_read(config + REGISTERS);
    mmio_write(config + COMMAND, 4_u16);
    let off: u8 = mmio_read(status);
    mmio_write(config + REGISTERS, u32::MAX);
    let size = !(mmio_read::<u32>(config + REGISTERS) & !0xf) + 1;
    mmio_write(config + REGISTERS, low + MOVED_BY as u32);
    mmio_write(config + COMMAND, 6_u16);
    let (here, there): (u8, u8) = (mmio_read(status), mmio_read(status + MOVED_BY));
    mmio_write(status + MOVED_BY, 1_u8);
    mmio_write(config + COMMAND, 4_u16);
    mmio_write(config + REGISTERS, low);
    mmio_write(config + COMMAND, 6_u16);
    let back: u8 = mmio_read(status);
    mmio_write(status, 0_u8);
    ensure!(size.is_power_of_two() && size >= 0x1000, "the registers have {size:#x} bytes");
    ensure!(low.is_multiple_of(size), "{low:#x} is not aligned to {size:#x}");
    ensure!(off == 0xff, "a register reads {off:#x} while memory space is off");
    ensure!(
        (here, there) == (0xff, 0),
        "moved registers read {here:#x} at the old and {there:#x} at the new place"
    );
    ensure!(back == 1, "status is {back:#x} after the way back, 1 was written before");
    Ok(())
}

/// 64-bit fields are read and written whole and by halves (virtio 1.2 §4.1.3.1).
fn halves(function: &Function) -> TestResult {
    let common = function.common;
    let queue: [u64; 3] = [common + 0x20, common + 0x28, common + 0x30];
    for status in [0, 1, 3] {
        function.set(register::STATUS, status);
    }
    function.set(register::DRIVER_FEATURES_SELECT, 1);
    function.set(register::DRIVER_FEATURES, 1);
    function.set(register::STATUS, 0xb);
    function.set(register::QUEUE_SELECT, 0);
    let result = queue.iter().try_for_each(|&field| {
        mmio_write(field, 0x1122_3344_5566_7788_u64);
        let (low, high): (u32, u32) = (mmio_read(field), mmio_read(field + 4));
        ensure!(
            (low, high) == (0x5566_7788, 0x1122_3344),
            "written whole, the halves read {low:#x} {high:#x}"
        );
        mmio_write(field + 4, 0x99aa_bbcc_u32);
        mmio_write(field, 0xddee_ff00_u32);
        let whole: u64 = mmio_read(field);
        ensure!(whole == 0x99aa_bbcc_ddee_ff00, "written by halves, the whole reads {whole:#x}");
        Ok(())
    });
    function.set(register::STATUS, 0);
    result
}

/// The registers by way of configuration space (virtio 1.2 §4.1.4.9).
fn window(function: &Function) -> TestResult {
    ensure!(function.window != 0, "no VIRTIO_PCI_CAP_PCI_CFG");
    let at = function.config + function.window;
    let status = (function.common - function.registers + 0x14) as u32;
    mmio_write(at + 4, 0_u8);
    mmio_write(at + 8, status);
    mmio_write(at + 12, 1_u32);
    mmio_write(at + 16, 1_u32);
    let direct = function.get(register::STATUS);
    let indirect: u32 = mmio_read(at + 16);
    mmio_write(at + 16, 0_u32);
    let after = function.get(register::STATUS);
    mmio_write(at + 12, 0_u32);
    ensure!(
        (direct, indirect & 0xff) == (1, 1),
        "1 was written to the status, it reads {direct:#x}, {indirect:#x}"
    );
    ensure!(after == 0, "status is {after:#x} after a reset");
    Ok(())
}

/// An interrupt while the messages are masked is pending, and comes when they no longer are.
fn pending(subject: &Subject<'_>, function: &Function) -> TestResult {
    // With EVENT_IDX a driver that polls may have told the device that it needs no interrupt (virtio 1.2 §2.7.10).
    let transport = subject.window.transport(EVENT_IDX, StatusWrites::Single)?;
    let mut rng = VirtIORng::<Identity, _>::new(transport).map_err(|error| error.to_string())?;
    let before = subject.route_irq();
    function.mask_messages(true);
    rng.request_entropy(&mut [0; 8]).map_err(|error| error.to_string())?;
    let came = cpu::wait_until(QUIET_US, || cpu::irq_count(subject.window.pin()) != before);
    let bits: u64 = mmio_read(function.pending);
    function.mask_messages(false);
    subject.wait_for_irq(before)?;
    let after: u64 = mmio_read(function.pending);
    ensure!(!came, "a masked interrupt came");
    ensure!(bits != 0, "no bit is pending");
    ensure!(after == 0, "{after:#x} is pending after the interrupt came");
    Ok(())
}
