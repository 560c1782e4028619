//! `mote-bench block`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use mote_guest::host::{self, Monitor};
use mote_vmm_api::IoEngine;
use serde::Serialize;

use crate::BlockArguments;
use crate::startup::{Spread, spread};

/// Guest memory: the guest keeps 8 MiB in flight.
const MEMORY_MIB: usize = 64;
/// The file is written in pieces of this.
const PIECE: usize = 1 << 20;

/// A program with an engine.
struct Candidate {
    name: String,
    ours: bool,
    program: Program,
}

enum Program {
    Monitor(Monitor, IoEngine),
    CloudHypervisor { program: PathBuf, io_uring: bool },
}

/// Results of one case of the guest's benchmark, by candidate.
#[derive(Debug, Serialize)]
pub struct Case {
    /// As the guest calls it.
    pub name: String,
    /// In the order of the runs.
    pub rows: Vec<Row>,
    /// Median of our best engine over that of the best peer's.
    pub ratio: Option<f64>,
}

/// Results of one candidate in one case.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Program and engine.
    pub name: String,
    /// Whether it is mote-vmm.
    pub ours: bool,
    /// Thousands of requests per second.
    pub kiops: Spread,
    /// Megabytes per second.
    pub mb_s: Spread,
    /// Median latency in microseconds.
    pub p50_us: Spread,
    /// 99th percentile of it.
    pub p99_us: Spread,
}

/// Numbers of one case of one run.
pub type Measurement = BTreeMap<String, f64>;

/// Measures.
pub fn run(arguments: &BlockArguments) -> Result<Vec<Case>> {
    let directory = tempfile::tempdir_in(&arguments.directory).context("temporary directory")?;
    let disk = directory.path().join("disk");
    fill(&disk, arguments.size_mib)?;
    let guest = arguments.guest.canonicalize().context("guest")?;
    let line = format!("mote.bench=block mote.bench_ms={}", arguments.ms);
    let candidates = candidates(arguments);
    let mut found: BTreeMap<(usize, usize), Vec<Measurement>> = BTreeMap::new();
    let mut names: Vec<String> = Vec::new();
    // Run by run, so that what disturbs the machine disturbs all alike.
    for _ in 0..arguments.rounds {
        for (number, candidate) in candidates.iter().enumerate() {
            let mut command = candidate.command(&guest, &line, &disk, directory.path())?;
            for (name, measurement) in
                measure(&mut command).with_context(|| format!("{}: run", candidate.name))?
            {
                let case = names.iter().position(|known| *known == name).unwrap_or_else(|| {
                    names.push(name);
                    names.len() - 1
                });
                found.entry((case, number)).or_default().push(measurement);
            }
        }
    }
    let case = |(number, name)| case(number, name, &candidates, &found);
    names.into_iter().enumerate().map(case).collect()
}

fn case(
    number: usize,
    name: String,
    candidates: &[Candidate],
    found: &BTreeMap<(usize, usize), Vec<Measurement>>,
) -> Result<Case> {
    let mut rows = Vec::new();
    for (position, candidate) in candidates.iter().enumerate() {
        let Some(measurements) = found.get(&(number, position)) else { continue };
        let value = |key: &str, divisor: f64| -> Result<Spread> {
            let values: Option<Vec<f64>> =
                measurements.iter().map(|one| one.get(key).map(|value| value / divisor)).collect();
            Ok(spread(values.with_context(|| format!("{name} without {key}"))?.into_iter()))
        };
        rows.push(Row {
            name: candidate.name.clone(),
            ours: candidate.ours,
            kiops: value("iops", 1e3)?,
            mb_s: value("mb_s", 1.0)?,
            p50_us: value("p50_ns", 1e3)?,
            p99_us: value("p99_ns", 1e3)?,
        });
    }
    let best = |ours| {
        let medians = rows.iter().filter(|row| row.ours == ours).map(|row| row.kiops.median);
        medians.max_by(f64::total_cmp)
    };
    let ratio = best(true).zip(best(false)).map(|(ours, peer)| ours / peer);
    Ok(Case { name, rows, ratio })
}

/// A file without holes, whose blocks differ.
fn fill(path: &Path, size_mib: u32) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut piece = vec![0_u8; PIECE];
    for number in 0..size_mib {
        for (at, byte) in piece.iter_mut().enumerate() {
            *byte = (at / 512) as u8 ^ number as u8;
        }
        file.write_all(&piece).with_context(|| format!("fill {}", path.display()))?;
    }
    Ok(())
}

fn candidates(arguments: &BlockArguments) -> Vec<Candidate> {
    let mut all = Vec::new();
    let mut monitor = |name: &str, ours, program: Option<Monitor>| {
        for (engine, label) in [(IoEngine::Sync, "sync"), (IoEngine::Async, "io_uring")] {
            if let Some(program) = program.clone() {
                let program = Program::Monitor(program, engine);
                all.push(Candidate { name: format!("{name} {label}"), ours, program });
            }
        }
    };
    monitor("mote-vmm", true, arguments.vmm.clone().map(Monitor::Mote));
    monitor("firecracker", false, arguments.firecracker.clone().map(Monitor::Firecracker));
    for (io_uring, label) in [(false, "sync"), (true, "io_uring")] {
        if let Some(program) = arguments.cloud_hypervisor.clone() {
            let program = Program::CloudHypervisor { program, io_uring };
            all.push(Candidate { name: format!("cloud-hypervisor {label}"), ours: false, program });
        }
    }
    all
}

impl Candidate {
    fn command(&self, guest: &Path, line: &str, disk: &Path, directory: &Path) -> Result<Command> {
        match &self.program {
            Program::Monitor(monitor, engine) => {
                let mut config = host::config(guest, line);
                config.machine_config.mem_size_mib = MEMORY_MIB;
                host::add_drive(&mut config, "disk", disk, false);
                config.drives.iter_mut().for_each(|drive| drive.io_engine = *engine);
                let file = directory.join("config.json");
                fs::write(&file, serde_json::to_vec(&config)?).context("write the configuration")?;
                let mut command = Command::new(monitor.program());
                command.args(monitor.arguments(&file));
                Ok(command)
            }
            Program::CloudHypervisor { program, io_uring } => {
                let engine = if *io_uring { "" } else { ",_disable_io_uring=on" };
                let mut command = Command::new(program);
                command.arg("--kernel").arg(guest).arg("--cmdline").arg(line);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")]);
                command.args(["--serial", "tty", "--console", "off"]);
                command.arg("--disk").arg(format!("path={},image_type=raw{engine}", disk.display()));
                Ok(command)
            }
        }
    }
}

/// One run: the cases and their numbers.
fn measure(command: &mut Command) -> Result<Vec<(String, Measurement)>> {
    command.stdin(Stdio::null());
    let output = command.output().with_context(|| format!("start {}", command.get_program().display()))?;
    measurements(&output)
}

/// The cases and their numbers in what a run has printed.
pub fn measurements(output: &Output) -> Result<Vec<(String, Measurement)>> {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = || text.lines().filter_map(|line| line.trim().strip_prefix("bench "));
    if !lines().any(|line| line == "done") {
        bail!("{}, output: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    lines().filter(|line| *line != "done").map(parse).collect()
}

/// `NAME key=value …`.
fn parse(line: &str) -> Result<(String, Measurement)> {
    let mut words = line.split_whitespace();
    let name = words.next().context("an empty line")?;
    let mut numbers = Measurement::new();
    for word in words {
        let (key, value) = word.split_once('=').with_context(|| format!("{word:?} in {line:?}"))?;
        numbers.insert(key.to_owned(), value.parse().with_context(|| format!("{word:?} in {line:?}"))?);
    }
    ensure!(!numbers.is_empty(), "no numbers in {line:?}");
    Ok((name.to_owned(), numbers))
}

/// A table for each case: min/median/max.
pub fn render(cases: &[Case]) -> String {
    let mut text = String::new();
    let cell = |spread: &Spread, decimals: usize| {
        let Spread { min, median, max } = spread;
        format!("{min:.decimals$} / {median:.decimals$} / {max:.decimals$}")
    };
    for case in cases {
        let _ = writeln!(
            text,
            "{:28}{:>26}{:>26}{:>24}{:>24}",
            case.name, "kIOPS min/median/max", "MB/s", "p50 us", "p99 us"
        );
        for row in &case.rows {
            let _ = writeln!(
                text,
                "  {:26}{:>26}{:>26}{:>24}{:>24}",
                row.name,
                cell(&row.kiops, 1),
                cell(&row.mb_s, 0),
                cell(&row.p50_us, 1),
                cell(&row.p99_us, 1)
            );
        }
        if let Some(ratio) = case.ratio {
            let _ = writeln!(text, "  best of mote-vmm over best peer: {ratio:.2}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_name_and_numbers() {
        let (name, numbers) = parse("randread-d1 iops=1000 p50_ns=17").expect("a good line");
        assert_eq!((name.as_str(), numbers["iops"], numbers["p50_ns"]), ("randread-d1", 1000.0, 17.0));
        assert!(
            parse("x").is_err() && parse("").is_err() && parse("x y").is_err() && parse("x y=z").is_err()
        );
    }

    #[test]
    fn the_ratio_is_of_the_best_engines() {
        let candidate = |name: &str, ours| Candidate {
            name: name.to_owned(),
            ours,
            program: Program::CloudHypervisor { program: PathBuf::new(), io_uring: false },
        };
        let candidates = [candidate("a", true), candidate("b", true), candidate("c", false)];
        let measured = |iops: f64| -> Vec<Measurement> {
            vec![["iops", "mb_s", "p50_ns", "p99_ns"].map(|key| (key.to_owned(), iops)).into()]
        };
        let found = [((0, 0), measured(10.0)), ((0, 1), measured(30.0)), ((0, 2), measured(20.0))].into();
        let case = case(0, "x".to_owned(), &candidates, &found).expect("complete measurements");
        assert_eq!(case.ratio, Some(1.5));
    }
}
