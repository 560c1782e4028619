//! COM1, polled.

use core::fmt::{self, Write};

use crate::cpu::{inb, outb};

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const SCRATCH: u16 = DATA + 7;
/// Bytes that may be written once the transmitter's FIFO is empty (16550A).
const FIFO_BYTES: usize = 16;
/// Polls for an empty transmitter before the output is dropped: a broken port must not hang the guest.
const MAX_POLLS: u32 = 100_000;

/// COM1 as a [`fmt::Write`].
pub struct Serial;

/// Collects a line's pieces, so that they go out in full bursts. Without allocation: panics print, too.
pub struct Line {
    bytes: [u8; FIFO_BYTES],
    used: usize,
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { bytes: [0; FIFO_BYTES], used: 0 }
    }

    /// Writes what is left.
    pub fn finish(&mut self) {
        send(&self.bytes[..self.used]);
        self.used = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            self.bytes[self.used] = byte;
            self.used += 1;
            if self.used == FIFO_BYTES {
                self.finish();
            }
        }
        Ok(())
    }
}

/// Writes at most a FIFO's worth. A port that never takes anything loses it.
fn send(burst: &[u8]) {
    if (0..MAX_POLLS).any(|_| line_status() & 0x20 != 0) {
        burst.iter().for_each(|&byte| outb(DATA, byte));
    }
}

/// Turns the FIFOs on and clears them.
pub fn init() {
    outb(FIFO_CONTROL, 0x07);
}

/// What was written to the scratch register, read back.
pub fn scratch(value: u8) -> u8 {
    outb(SCRATCH, value);
    inb(SCRATCH)
}

/// The line status register.
pub fn line_status() -> u8 {
    inb(LINE_STATUS)
}

/// A byte of input, if there is one.
pub fn read() -> Option<u8> {
    (line_status() & 1 != 0).then(|| inb(DATA))
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.as_bytes().chunks(FIFO_BYTES).for_each(send);
        Ok(())
    }
}

/// Prints a line. A port that takes nothing loses it.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        let mut line = $crate::serial::Line::new();
        let _ = ::core::fmt::Write::write_fmt(&mut line, format_args!("{}\n", format_args!($($argument)*)));
        line.finish();
    }};
}
