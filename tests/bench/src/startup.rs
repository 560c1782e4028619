//! `mote-bench startup`.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use mote_guest::host::{self, Monitor};
use serde::Serialize;

use crate::StartupArguments;
use crate::candidate::{Candidate, FIRECRACKER, Shape};
use crate::measure::{self, Memory, Times};

/// Starts of each in which memory is read. It varies little.
const MEMORY_RUNS: u32 = 5;
/// Size of the disk, if there is one. Nothing is read from it.
const DISK_BYTES: u64 = 16 << 20;
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
    /// Program, with its number of vCPUs if it is not one.
    pub name: String,
    /// Program.
    pub program: &'static str,
    /// Its number of vCPUs.
    pub vcpus: u8,
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
    /// With a disk and a network interface.
    pub devices: bool,
    /// In the order of the runs.
    pub rows: Vec<Row>,
    /// What one vCPU more costs until the first byte, in milliseconds, by program.
    pub vcpu_ms: Vec<(&'static str, f64)>,
}

/// A program in a machine of some number of vCPUs.
struct Subject<'a> {
    candidate: &'a Candidate,
    vcpus: u8,
    times: Vec<Times>,
    memory: Vec<Memory>,
}

/// Measures.
pub fn run(arguments: &StartupArguments) -> Result<Results> {
    if !arguments.devices {
        return run_here(arguments);
    }
    // The namespace is a thread's.
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            host::enter_network(&["10.77.0.1/24"]).context("a network namespace")?;
            run_here(arguments)
        });
        inside.join().map_err(|_| anyhow!("the measuring thread panicked"))?
    })
}

fn run_here(arguments: &StartupArguments) -> Result<Results> {
    let candidates = candidates(arguments)?;
    for candidate in &candidates {
        candidate.write_back().context(candidate.name())?;
    }
    let directory = tempfile::tempdir().context("temporary directory")?;
    let disk = directory.path().join("disk");
    File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).context("a disk")?;
    let guest =
        arguments.guest.canonicalize().with_context(|| format!("guest {}", arguments.guest.display()))?;
    let command = |subject: &Subject<'_>, line: &str| {
        let disk = arguments.devices.then_some(disk.as_path());
        let shape = Shape { memory_mib: arguments.memory_mib, vcpus: subject.vcpus, disk };
        subject.candidate.command(&guest, line, &shape, directory.path())
    };
    let mut subjects: Vec<Subject<'_>> = Vec::new();
    for candidate in &candidates {
        // The others are there with the machine that they can make.
        let shapes = if candidate.takes_shapes() { arguments.vcpus.as_slice() } else { &[1] };
        subjects.extend(shapes.iter().map(|&vcpus| Subject {
            candidate,
            vcpus,
            times: Vec::new(),
            memory: Vec::new(),
        }));
    }
    // The first round brings programs and guest into the page cache and is not counted.
    for round in 0..=arguments.runs {
        for subject in &mut subjects {
            let name = subject.name();
            let one = measure::times(&mut command(subject, "mote.hello")?)
                .with_context(|| format!("{name}: start"))?;
            if round > 0 {
                subject.times.push(one);
            }
        }
    }
    let waiting = format!("mote.hello mote.wait_mcycles={WAIT_MCYCLES}");
    for _ in 0..MEMORY_RUNS {
        for subject in &mut subjects {
            let name = subject.name();
            let one = measure::memory(&mut command(subject, &waiting)?);
            subject.memory.push(one.with_context(|| format!("{name}: memory"))?);
        }
    }
    let rows: Vec<Row> = subjects.iter().map(Subject::row).collect();
    let more = candidates.iter().filter_map(|candidate| cost_of_a_vcpu(candidate.name(), &rows)).collect();
    Ok(Results {
        runs: arguments.runs,
        memory_mib: arguments.memory_mib,
        devices: arguments.devices,
        rows,
        vcpu_ms: more,
    })
}

/// From the row with the least to that with the most vCPUs, by the medians of the first byte.
fn cost_of_a_vcpu(program: &'static str, rows: &[Row]) -> Option<(&'static str, f64)> {
    let of_program = || rows.iter().filter(|row| row.program == program);
    let (least, most) =
        (of_program().min_by_key(|row| row.vcpus)?, of_program().max_by_key(|row| row.vcpus)?);
    let more = most.vcpus.checked_sub(least.vcpus).filter(|more| *more > 0)?;
    Some((program, (most.first_byte_ms.median - least.first_byte_ms.median) / f64::from(more)))
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

impl Subject<'_> {
    /// What it is called in results.
    fn name(&self) -> String {
        match self.vcpus {
            1 => self.candidate.name().to_owned(),
            vcpus => format!("{} {vcpus}", self.candidate.name()),
        }
    }

    fn row(&self) -> Row {
        let milliseconds =
            |what: fn(&Times) -> Duration| spread(self.times.iter().map(|one| what(one).as_secs_f64() * 1e3));
        let kib = |what: fn(&Memory) -> u64| spread(self.memory.iter().map(|one| what(one) as f64));
        Row {
            name: self.name(),
            program: self.candidate.name(),
            vcpus: self.vcpus,
            first_byte_ms: milliseconds(|one| one.first_byte),
            exit_ms: milliseconds(|one| one.exit),
            cpu_ms: milliseconds(|one| one.cpu),
            peak_resident_kib: kib(|one| one.peak_resident),
            private_dirty_kib: kib(|one| one.private_dirty),
        }
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
    fn the_cost_of_a_vcpu_is_that_of_the_programs_own_rows() {
        let row = |program, vcpus, first_byte| {
            let spread = spread([first_byte].into_iter());
            Row {
                name: String::new(),
                program,
                vcpus,
                first_byte_ms: spread,
                exit_ms: spread,
                cpu_ms: spread,
                peak_resident_kib: spread,
                private_dirty_kib: spread,
            }
        };
        let rows = [row("a", 1, 2.0), row("a", 16, 5.0), row("b", 1, 1.0)];
        assert_eq!(cost_of_a_vcpu("a", &rows), Some(("a", 0.2)));
        assert_eq!(cost_of_a_vcpu("b", &rows), None);
    }

    #[test]
    fn the_median_of_an_even_number_lies_in_between() {
        assert_eq!(spread([4.0, 1.0, 3.0, 2.0].into_iter()), Spread { min: 1.0, median: 2.5, max: 4.0 });
        assert_eq!(spread([7.0].into_iter()), Spread { min: 7.0, median: 7.0, max: 7.0 });
    }
}
