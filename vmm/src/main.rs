//! `mote-vmm`: see the library.
//!
//! The C runtime calls [`main`] here, and not the one that Rust puts before a `fn main`: that one reads /proc/self/maps and
//! makes a signal stack for each thread, to say a word about an overflow before the process dies of it, which is a tenth of
//! what a start costs beyond KVM's own calls. Guard pages end an overflow as before.
#![no_main]

use std::ffi::{c_char, c_int};

// SAFETY: the name is the one that the C runtime calls, once; no other symbol of the program has it.
#[unsafe(no_mangle)]
extern "C" fn main(_arguments: c_int, _values: *const *const c_char) -> c_int {
    c_int::from(mote_vmm::cli::main())
}
