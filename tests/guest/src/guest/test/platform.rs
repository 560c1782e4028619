//! The machine itself.

use alloc::format;
use alloc::string::ToString;

use mote_guest::acpi::Tables;
use mote_guest::smbios::Strings;

use super::TestResult;
use crate::boot::{Boot, Low, Protocol};
use crate::report::Report;
use crate::{cpu, ensure, println, serial};

const RAM: u32 = 1;
const MIB: u64 = 1 << 20;
/// The legacy hole below 1 MiB that a memory map may leave out of what is called N MiB of memory.
const LEGACY_HOLE: u64 = MIB;
/// Longest line that is echoed, and how long it may take to come.
const ECHO_BYTES: usize = 256;
const ECHO_TIMEOUT_US: u64 = 10_000_000;
/// CPUID 0x4000_0000: the hypervisor's name.
const KVM_NAME: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
const TIMER_US: u32 = 2_000;

/// Everything that needs no device.
pub fn run(boot: &Boot, report: &mut Report) {
    let name = match boot.protocol {
        Protocol::Linux => "linux",
        Protocol::Pvh => "pvh",
    };
    let expected = boot.command_line.value("mote.protocol").unwrap_or(name);
    report.result(
        "protocol",
        if expected == name { Ok(()) } else { Err(format!("entered by {name}, expected {expected}")) },
    );
    report.result("memory-map", memory_map(boot));
    report.result("memory", memory(boot));
    report.result("cpuid", cpuid());
    report.result("serial", serial_port());
    if !boot.command_line.has("mote.no_acpi") {
        report.result("acpi", acpi(boot));
    }
    if let Some(expected) = boot.command_line.number("mote.time") {
        report.result("clock", clock(expected));
    }
    if let Some(expected) = boot.command_line.value("mote.smbios") {
        report.result("smbios", smbios(expected));
    }
    if boot.command_line.has("mote.serial_echo") {
        report.result("serial-echo", serial_echo());
    }
}

fn memory_map(boot: &Boot) -> TestResult {
    let map = boot.memory_map();
    ensure!(!map.is_empty(), "no memory map");
    for (number, range) in map.iter().enumerate() {
        ensure!(range.start < range.end, "range {number} is empty");
        for other in &map[..number] {
            ensure!(
                range.end <= other.start || other.end <= range.start,
                "ranges overlap at {:#x}",
                range.start
            );
        }
    }
    let ram: u64 = map.iter().filter(|range| range.kind == RAM).map(|range| range.end - range.start).sum();
    if let Some(mib) = boot.command_line.number("mote.memory_mib") {
        ensure!(
            (mib * MIB - LEGACY_HOLE..=mib * MIB).contains(&ram),
            "{} KiB of RAM, expected {mib} MiB",
            ram >> 10
        );
    }
    Ok(())
}

/// Every MiB of RAM below 4 GiB keeps what is written to it. The last page of each is taken, none of the image and the
/// heap is.
fn memory(boot: &Boot) -> TestResult {
    const FIRST: u64 = 16 * MIB;
    let pages = || {
        boot.memory_map().into_iter().filter(|range| range.kind == RAM).flat_map(|range| {
            let first = range.start.max(FIRST).next_multiple_of(MIB);
            (first..range.end.min(4 << 30)).step_by(MIB as usize).filter(move |page| page + MIB <= range.end)
        })
    };
    for page in pages() {
        // SAFETY: RAM by the memory map above image and heap (FIRST), so no Rust object is there.
        unsafe { ((page + MIB - 8) as *mut u64).write_volatile(!page) };
    }
    for page in pages() {
        // SAFETY: as above.
        let value = unsafe { ((page + MIB - 8) as *const u64).read_volatile() };
        ensure!(value == !page, "{:#x} does not keep its value", page + MIB - 8);
    }
    Ok(())
}

fn cpuid() -> TestResult {
    ensure!(cpu::cpuid(1)[2] & 1 << 31 != 0, "the hypervisor bit is clear");
    ensure!(cpu::cpuid(0x4000_0000)[1..] == KVM_NAME, "the hypervisor is not KVM");
    // From the register: a KVM without hardware support runs CPL 3, and CPUID there, on the host's own processor.
    ensure!(cpu::apic_id() == 0, "APIC id of the boot processor is {}", cpu::apic_id());
    Ok(())
}

fn serial_port() -> TestResult {
    ensure!(serial::line_status() & 0x60 == 0x60, "line status is {:#x}", serial::line_status());
    for value in [0x5a, 0xa5] {
        let read = serial::scratch(value);
        ensure!(read == value, "scratch register keeps {read:#x} for {value:#x}");
    }
    Ok(())
}

fn serial_echo() -> TestResult {
    println!("mote-guest: type a line");
    let mut line = alloc::vec::Vec::new();
    let complete = cpu::wait_until(ECHO_TIMEOUT_US, || {
        while let Some(byte) = serial::read() {
            if byte == b'\n' || line.len() == ECHO_BYTES {
                return true;
            }
            line.push(byte);
        }
        false
    });
    ensure!(complete, "no line after {} s", ECHO_TIMEOUT_US / 1_000_000);
    println!("mote-guest: read {:?}", alloc::string::String::from_utf8_lossy(&line));
    Ok(())
}

/// A register of the real-time clock.
fn clock_register(index: u8) -> u64 {
    cpu::outb(0x70, index);
    cpu::inb(0x71).into()
}

/// The real-time clock's date and time in its default format, BCD and 24 hours.
fn clock(expected: u64) -> TestResult {
    let number = |index| {
        let bcd = clock_register(index);
        bcd / 16 * 10 + bcd % 16
    };
    ensure!(clock_register(0x0d) & 0x80 != 0, "status D says that the time is not valid");
    ensure!(clock_register(0x0b) & 0x06 == 2, "status B is {:#x}", clock_register(0x0b));
    let (year, month, day) = (number(0x32) * 100 + number(9), number(8), number(7));
    ensure!((1..=12).contains(&month) && (1..=31).contains(&day), "the date is {year}-{month}-{day}");
    // Days since 1970 with the year beginning in March, so that leap days are at its end.
    let (shifted, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + (153 * month + 2) / 5 + day - 719_469;
    let seconds = days * 86_400 + number(4) * 3_600 + number(2) * 60 + number(0);
    ensure!(seconds.abs_diff(expected) < 3_600, "the clock tells {seconds}, expected {expected}");
    Ok(())
}

fn smbios(expected: &str) -> TestResult {
    let strings = Strings::read(&Low)?;
    let Strings { product_name, serial_number, asset_tag, oem } = &strings;
    let found = format!("{product_name},{serial_number},{asset_tag},{}", oem.join("+")).replace(' ', "_");
    ensure!(found == expected, "found {found}, expected {expected}");
    Ok(())
}

fn acpi(boot: &Boot) -> TestResult {
    ensure!(boot.rsdp != 0, "no RSDP from the boot protocol");
    let tables = Tables::read(&Low, boot.rsdp).map_err(|error| error.to_string())?;
    ensure!(tables.s5_type.is_some(), "no \\_S5_ in the DSDT");
    ensure!(tables.pm1a_control.is_some() || tables.sleep_control.is_some(), "no register to switch off");
    if let Some(expected) = boot.command_line.number("mote.processors") {
        ensure!(
            tables.processors as u64 == expected,
            "{} processors, expected {expected}",
            tables.processors
        );
    }
    Ok(())
}

/// The local APIC's timer ends a halt, and not too early: also where a snapshot comes in the middle of it.
pub fn timer_interrupt() -> TestResult {
    let start = cpu::now_us();
    cpu::clear_pending();
    cpu::sleep(TIMER_US);
    let slept = cpu::now_us() - start;
    ensure!(slept >= u64::from(TIMER_US) / 2, "woke after {slept} us, expected {TIMER_US}");
    Ok(())
}
