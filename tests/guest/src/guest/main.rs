//! The bare-metal conformance guest. What it does is chosen on the kernel command line:
//!
//! | Word | |
//! |---|---|
//! | `mote.hello` | prints one line and switches off; `mote.wait_mcycles=N` waits N million TSC cycles in between |
//! | `mote.test` | drives every device with drivers from virtio-drivers, reports `ok NAME` or `FAIL NAME: why` |
//! | `mote.hostile` | breaks every rule of the transport and the rings, then checks that the devices still work |
//! | `mote.bench=block` | measures a device, see `bench` |
//! | `mote.backend` | reads a block device, waits until it needs a reset, resets it until it can be read again |
//! | `mote.serve` | DHCP, ping, metadata, a page on port 80 |
//! | `mote.memory_hotplug` | plugs and unplugs memory as the host asks |
//! | `mote.mmds=A.B.C.D/P` | with that address: the metadata service of the monitor, with tokens |
//! | `mote.off`, `mote.reboot[=acpi,cf9]`, `mote.crash`, `mote.internal-error`, `mote.halt`, `mote.spin` | ends that way |
#![no_std]
#![no_main]

extern crate alloc;

mod backend;
mod bench;
mod boot;
mod cpu;
mod entry;
mod freestanding;
mod generation;
mod heap;
mod hostile;
mod hotplug;
mod nic;
mod pci;
mod plug;
mod power;
mod report;
mod serial;
mod serve;
mod test;
mod virtio;

use core::fmt::Write;

use boot::Boot;

/// Where the entry code goes at CPL 3.
#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let boot = Boot::read();
    if boot.command_line.has("mote.hello") {
        hello(&boot);
    }
    serial::init();
    cpu::set_gates();
    cpu::map_all();
    boot.give_heap();
    run(&boot);
    power::off(boot.rsdp)
}

/// For the start-up benchmark: nothing is set up that one line doesn't need.
fn hello(boot: &Boot) -> ! {
    let _ = serial::Serial.write_str("mote-guest: hello\n");
    if let Some(millions) = boot.command_line.number("mote.wait_mcycles") {
        let end = cpu::tsc() + millions.saturating_mul(1_000_000);
        while cpu::tsc() < end {
            core::hint::spin_loop();
        }
    }
    power::off(boot.rsdp)
}

fn run(boot: &Boot) {
    let line = boot.command_line;
    match () {
        () if line.has("mote.test") => test::run(boot),
        () if line.has("mote.hostile") => hostile::run(boot),
        () if line.has("mote.serve") => serve::run(boot),
        () if line.has("mote.mmds") => serve::mmds(boot),
        () if line.has("mote.bench") => bench::run(boot),
        () if line.has("mote.off") => {}
        () if line.has("mote.reboot") => match line.value("mote.reboot") {
            Some("acpi") => power::reset_acpi(boot.rsdp),
            Some("cf9") => power::reset_cf9(),
            _ => power::reset(),
        },
        () if line.has("mote.backend") => backend::run(boot),
        () if line.has("mote.generation") => generation::run(boot),
        () if line.has("mote.hotplug") => hotplug::run(boot),
        () if line.has("mote.memory_hotplug") => plug::run(boot),
        () if line.has("mote.crash") => cpu::triple_fault(),
        () if line.has("mote.internal-error") => cpu::internal_error(),
        () if line.has("mote.halt") => {
            println!("mote-guest: halting");
            cpu::halt()
        }
        () if line.has("mote.spin") => {
            println!("mote-guest: spinning");
            cpu::spin()
        }
        () => println!("mote-guest: nothing to do: see tests/guest/src/guest/main.rs for the command line"),
    }
}
