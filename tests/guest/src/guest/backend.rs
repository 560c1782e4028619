//! `mote.backend`: a block device whose backend is somebody who goes away and comes back; with `=stay` it isn't waited for.

use alloc::string::{String, ToString};

use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};

use crate::boot::Boot;
use crate::heap::Identity;
use crate::virtio::{self, Kind, Masked, StatusWrites, Window, register};
use crate::{cpu, println};

/// DEVICE_NEEDS_RESET.
const NEEDS_RESET: u32 = 64;
/// Time between two attempts.
const PAUSE_US: u64 = 50_000;

/// Reads, waits until the device needs a reset, and resets it until it can be read again.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    let windows = virtio::discover(boot);
    let Some(window) = windows.iter().find(|window| window.kind == Kind::Block) else {
        return println!("mote-guest: no block device");
    };
    let needs_reset = || window.get(register::STATUS) & NEEDS_RESET != 0;
    let device = match serve(window) {
        Ok(device) => device,
        Err(why) => return println!("mote-guest: {why}"),
    };
    println!("mote-guest: served");
    while !needs_reset() {
        core::hint::spin_loop();
    }
    println!("mote-guest: needs a reset");
    if boot.command_line.value("mote.backend") == Some("stay") {
        cpu::halt();
    }
    // Nobody answers its last words, and the memory of its queue is not used again.
    core::mem::forget(device);
    loop {
        match serve(window) {
            Ok(_) => return println!("mote-guest: served again"),
            Err(_) => {
                cpu::wait_until(PAUSE_US, || false);
            }
        }
    }
}

/// A device that runs and has answered a read.
fn serve(window: &Window) -> Result<VirtIOBlk<Identity, Masked>, String> {
    let transport = window.transport(0, StatusWrites::Single).map_err(String::from)?;
    let mut device = VirtIOBlk::<Identity, Masked>::new(transport).map_err(|error| error.to_string())?;
    if window.get(register::STATUS) & NEEDS_RESET != 0 {
        core::mem::forget(device);
        return Err("the device needs a reset".into());
    }
    let mut sector = [0; SECTOR_SIZE];
    device.read_blocks(1, &mut sector).map_err(|error| error.to_string())?;
    Ok(device)
}
