//! The microVM monitor of Mote: one process per virtual machine, on KVM.
//!
//! | module | what it is |
//! |---|---|
//! | [`boot`] | how a machine starts, top to bottom |
//! | [`memory`], `layout` | guest memory, and what is where in it |
//! | `kvm` | the only place that calls KVM |
//! | `loader` | kernels, initrds and what they are told |
//! | `acpi` | ACPI tables |
//! | `ioapic`, `power` | the I/O APIC, and the registers that end the machine |
//! | [`rate_limiter`] | token buckets of devices |
//! | [`machine`] | the running machine: vCPU threads, pause and resume |
//! | [`devices`] | virtio and legacy devices, and the PCI bus |
//! | [`disk`] | formats of disk images |
//! | [`controller`], [`config`] | one command enum, the phases before and after the start, and the configuration's rules |
//! | `cpu_template` | `mote-vmm cpu-template`: what guests see of their processors here |
//! | [`snapshot`] | a machine in two files, and back |
//! | [`jail`] | `mote-vmm jail`: chroot, namespaces, cgroups, limits, an unprivileged user |
//! | `landlock` | what the process gives up for ever |
//! | [`seccomp`] | a filter for each kind of thread |
//! | `signals` | limits that are reached are counted |
//! | [`api`] | Firecracker's REST API |
//! | [`mmds`] | the metadata service |
//! | [`metrics`], `log` | what the process tells about itself |
//! | [`event_loop`] | the main thread |
//! | [`cli`] | the command line |
//!
//! Threads: the main thread (API, signals, slow path), one per vCPU, and those of busy devices. A guest's memory is
//! only touched by vCPUs, devices and, before the start, the loader.

use std::error::Error;

mod acpi;
pub mod api;
pub mod boot;
mod boot_timer;
mod civil;
pub mod cli;
pub mod config;
pub mod controller;
mod cpu_template;
pub mod devices;
pub mod disk;
mod disk_boot;
pub mod event_loop;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hotplug;
mod ioapic;
pub mod jail;
mod kvm;
mod landlock;
mod layout;
mod loader;
mod log;
pub mod machine;
mod mapping;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod outcome;
mod power;
mod process;
pub mod rate_limiter;
pub mod seccomp;
mod signals;
mod smbios;
pub mod snapshot;

/// An error with all its causes in one line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
