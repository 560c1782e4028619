//! Devices of the microVM.
