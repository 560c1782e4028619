//! The microVM monitor of Mote: one process per virtual machine, on KVM.

pub mod devices;
pub mod memory;
