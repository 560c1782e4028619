//! `mote.bench=block`, `mote.bench=net`: how fast a device is, with queue code of the guest's own and without interrupts, so that what is
//! measured is the device. Prints `bench NAME key=value …` lines, between measurements only: each byte is an exit.
//!
//! - `mote.bench_ms=N`: how long each measurement runs.
//! - `mote.bench_case=NAME`: only this one, for a profile.

mod block;
mod net;
pub mod queue;

use alloc::vec::Vec;

use crate::boot::Boot;
use crate::{cpu, println};

/// How long a measurement runs unless told otherwise.
const DEFAULT_MS: u64 = 300;
/// Latencies that are kept for one measurement.
const MAX_SAMPLES: usize = 1 << 16;

/// Measures what the command line says.
pub fn run(boot: &Boot) {
    cpu::calibrate();
    let ms = boot.command_line.number("mote.bench_ms").unwrap_or(DEFAULT_MS);
    let done = match boot.command_line.value("mote.bench") {
        Some("block") => block::run(boot, ms),
        Some("net") => net::run(boot, ms),
        other => Err(alloc::format!("no benchmark {other:?}")),
    };
    match done {
        Ok(()) => println!("bench done"),
        Err(why) => println!("bench FAIL {why}"),
    }
}

/// Times of requests, in TSC ticks.
struct Samples(Vec<u32>);

impl Samples {
    fn new() -> Self {
        Self(Vec::with_capacity(MAX_SAMPLES))
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    /// Keeps a sample while there is room: the buffer is never grown inside a measurement.
    fn add(&mut self, ticks: u64) {
        if self.0.len() < MAX_SAMPLES {
            self.0.push(u32::try_from(ticks).unwrap_or(u32::MAX));
        }
    }

    /// The value below which `percent` of the samples are.
    fn percentile(&mut self, percent: usize) -> u64 {
        self.0.sort_unstable();
        let at = self.0.len().saturating_sub(1) * percent / 100;
        self.0.get(at).copied().unwrap_or(0).into()
    }
}
