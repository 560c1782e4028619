//! The bare-metal conformance guest, seen from both sides.
//!
//! The binary `mote-guest` (feature `freestanding`, see `src/guest`) is the guest. This library holds what is pure and
//! therefore tested on the host, [`acpi`], [`cmdline`], [`json`], [`routes`] and [`smbios`], and for programs on the host [`host`]:
//! writing a configuration, starting the guest under a VMM, reading its report.
#![cfg_attr(feature = "freestanding", no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod cmdline;
pub mod json;
pub mod routes;
pub mod smbios;

#[cfg(all(feature = "host", not(feature = "freestanding")))]
pub mod host;
