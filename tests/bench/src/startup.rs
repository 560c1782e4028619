//! `mote-bench startup`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use mote_guest::host::Monitor;
use serde::Serialize;

use crate::StartupArguments;
use crate::candidate::{Candidate, FIRECRACKER};
use crate::measure::{self, Memory, Times};

/// Starts of each in which memory is read. It varies little.
const MEMORY_RUNS: u32 = 5;
/// How long the guest waits in those, in millions of TSC cycles: at least a tenth of a second.
const WAIT_MCYCLES: u32 = 500;

/// Smallest, middle and largest of some measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Middle; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

/// Results of one program. Times in milliseconds, memory in KiB.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Program.
    pub name: &'static str,
    /// Process start → first serial byte of the guest.
    pub first_byte_ms: Spread,
    /// Process start → process ended.
    pub exit_ms: Spread,
    /// User and system time.
    pub cpu_ms: Spread,
    /// Largest resident set while the guest waits.
    pub peak_resident_kib: Spread,
    /// Private dirty memory while the guest waits.
    pub private_dirty_kib: Spread,
}

/// Results of all programs.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Timed starts of each.
    pub runs: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// In the order of the runs.
    pub rows: Vec<Row>,
}

/// Measures.
pub fn run(arguments: &StartupArguments) -> Result<Results> {
    let candidates = candidates(arguments)?;
    for candidate in &candidates {
        candidate.write_back().context(candidate.name())?;
    }
    let directory = tempfile::tempdir().context("temporary directory")?;
    let guest =
        arguments.guest.canonicalize().with_context(|| format!("guest {}", arguments.guest.display()))?;
    let command = |candidate: &Candidate, line: &str| {
        candidate.command(&guest, line, arguments.memory_mib, directory.path())
    };
    let mut times: Vec<Vec<Times>> = candidates.iter().map(|_| Vec::new()).collect();
    let mut memory: Vec<Vec<Memory>> = candidates.iter().map(|_| Vec::new()).collect();
    // The first round brings programs and guest into the page cache and is not counted.
    for round in 0..=arguments.runs {
        for (candidate, times) in candidates.iter().zip(&mut times) {
            let name = candidate.name();
            let one = measure::times(&mut command(candidate, "mote.hello")?)
                .with_context(|| format!("{name}: start"))?;
            if round > 0 {
                times.push(one);
            }
        }
    }
    let waiting = format!("mote.hello mote.wait_mcycles={WAIT_MCYCLES}");
    for _ in 0..MEMORY_RUNS {
        for (candidate, memory) in candidates.iter().zip(&mut memory) {
            let name = candidate.name();
            memory.push(
                measure::memory(&mut command(candidate, &waiting)?)
                    .with_context(|| format!("{name}: memory"))?,
            );
        }
    }
    let rows = candidates
        .iter()
        .zip(&times)
        .zip(&memory)
        .map(|((candidate, times), memory)| row(candidate, times, memory));
    Ok(Results { runs: arguments.runs, memory_mib: arguments.memory_mib, rows: rows.collect() })
}

fn candidates(arguments: &StartupArguments) -> Result<Vec<Candidate>> {
    let floor = match &arguments.floor {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("path of this program")?.with_file_name("mote-floor"),
    };
    let monitor = |name, path: &Option<PathBuf>, kind: fn(PathBuf) -> Monitor| {
        path.clone().map(|path| Candidate::Monitor(name, kind(path)))
    };
    let all = [
        Some(Candidate::Floor(floor)),
        monitor("mote-vmm", &arguments.vmm, Monitor::Mote),
        monitor(FIRECRACKER, &arguments.firecracker, Monitor::Firecracker),
        arguments.cloud_hypervisor.clone().map(Candidate::CloudHypervisor),
    ];
    Ok(all.into_iter().flatten().collect())
}

fn row(candidate: &Candidate, times: &[Times], memory: &[Memory]) -> Row {
    let milliseconds =
        |what: fn(&Times) -> Duration| spread(times.iter().map(|one| what(one).as_secs_f64() * 1e3));
    let kib = |what: fn(&Memory) -> u64| spread(memory.iter().map(|one| what(one) as f64));
    Row {
        name: candidate.name(),
        first_byte_ms: milliseconds(|one| one.first_byte),
        exit_ms: milliseconds(|one| one.exit),
        cpu_ms: milliseconds(|one| one.cpu),
        peak_resident_kib: kib(|one| one.peak_resident),
        private_dirty_kib: kib(|one| one.private_dirty),
    }
}

/// Smallest, middle and largest.
///
/// # Panics
/// Without values; there is at least one run.
pub fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = ((values.len() - 1) / 2, values.len() / 2);
    Spread { min: values[0], median: f64::midpoint(values[low], values[high]), max: values[values.len() - 1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_in_between() {
        assert_eq!(spread([4.0, 1.0, 3.0, 2.0].into_iter()), Spread { min: 1.0, median: 2.5, max: 4.0 });
        assert_eq!(spread([7.0].into_iter()), Spread { min: 7.0, median: 7.0, max: 7.0 });
    }
}
