//! `mote-bench net`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mote_guest::host::{self, Monitor};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use nix::unistd::Pid;
use serde::Serialize;

use crate::NetArguments;
use crate::block::{Measurement, measurements};
use crate::startup::{Spread, spread};

/// Guest memory.
const MEMORY_MIB: usize = 64;
/// The guest's link address.
const MAC: &str = "06:00:ac:10:00:02";
/// See tests/guest/src/guest/bench/net.rs.
const FLOOD: &str = "10.77.0.1:7777";
/// Data of a datagram in a frame of 64 bytes.
const DATAGRAM: usize = 22;
/// Datagrams that the kernel makes of one call.
const SEGMENTS: usize = 64;
/// For how long after its start new threads of a program are looked for.
const PIN_TIME: Duration = Duration::from_millis(60);
/// No flood lasts longer, whatever is asked for.
const MAX_FLOOD: Duration = Duration::from_secs(60);

/// Results of one case of the guest's benchmark, by candidate.
#[derive(Debug, Serialize)]
pub struct Case {
    /// As the guest calls it.
    pub name: String,
    /// What is measured.
    pub unit: &'static str,
    /// In the order of the runs.
    pub rows: Vec<Row>,
    /// Median of mote-vmm over the best median of the peers.
    pub ratio: Option<f64>,
}

/// Results of one candidate in one case.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Program.
    pub name: String,
    /// The measured value.
    pub value: Spread,
}

/// How a case is read: the guest's key, the divisor for the unit, the unit, and whether less is better.
fn reading(case: &str) -> (&'static str, f64, &'static str, bool) {
    match case {
        "echo" => ("p50_ns", 1e3, "us", true),
        "send-tso" => ("mbit", 1e3, "Gb/s", false),
        _ => ("pps", 1e3, "kpps", false),
    }
}

enum Program {
    Monitor(Monitor),
    CloudHypervisor(PathBuf),
}

/// A program in the comparison; the first is ours.
struct Candidate {
    name: &'static str,
    program: Program,
}

/// Measures, in a network namespace of its own that ends with the benchmark.
pub fn run(arguments: &NetArguments) -> Result<Vec<Case>> {
    let measured = thread::scope(|scope| scope.spawn(|| run_in_namespace(arguments)).join());
    measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn run_in_namespace(arguments: &NetArguments) -> Result<Vec<Case>> {
    host::enter_network(&["10.77.0.1/24"]).context("a network namespace")?;
    for words in [
        "link set tap0 address 02:00:00:00:00:01",
        "neigh replace 10.77.0.2 lladdr 06:00:ac:10:00:02 dev tap0 nud permanent",
    ] {
        let status = Command::new("ip").args(words.split(' ')).status().context("start ip")?;
        ensure!(status.success(), "ip {words}: {status}");
    }
    let socket = UdpSocket::bind(FLOOD).context("the socket that floods")?;
    thread::spawn(move || flood(&socket));
    let directory = tempfile::tempdir().context("temporary directory")?;
    let guest = arguments.guest.canonicalize().context("guest")?;
    let line = format!("mote.bench=net mote.bench_ms={}", arguments.ms);
    let candidates = candidates(arguments);
    let mut found: BTreeMap<(usize, usize), Vec<Measurement>> = BTreeMap::new();
    let mut names: Vec<String> = Vec::new();
    // Run by run, so that what disturbs the machine disturbs all alike.
    for _ in 0..arguments.rounds {
        for (number, candidate) in candidates.iter().enumerate() {
            let mut command = candidate.command(&guest, &line, directory.path())?;
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

/// Answers each request (a number of milliseconds) with datagrams as fast as they go.
fn flood(socket: &UdpSocket) {
    let data = [0x55; DATAGRAM * SEGMENTS];
    let mut request = [0; 4];
    while let Ok((4, from)) = socket.recv_from(&mut request) {
        let length = Duration::from_millis(u32::from_be_bytes(request).into()).min(MAX_FLOOD);
        // Segmentation by the kernel leaves the processors to those who are measured.
        let Ok(sender) = UdpSocket::bind("10.77.0.1:0") else { return };
        if setsockopt(&sender, UdpGsoSegment, &(DATAGRAM as i32)).is_err() {
            return;
        }
        let start = Instant::now();
        while start.elapsed() < length {
            // A full tap loses what comes; the guest counts what arrives.
            let _ = sender.send_to(&data, from);
        }
    }
}

fn candidates(arguments: &NetArguments) -> Vec<Candidate> {
    let all = [
        arguments
            .vmm
            .clone()
            .map(|path| Candidate { name: "mote-vmm", program: Program::Monitor(Monitor::Mote(path)) }),
        arguments.firecracker.clone().map(|path| Candidate {
            name: "firecracker",
            program: Program::Monitor(Monitor::Firecracker(path)),
        }),
        arguments
            .cloud_hypervisor
            .clone()
            .map(|path| Candidate { name: "cloud-hypervisor", program: Program::CloudHypervisor(path) }),
    ];
    all.into_iter().flatten().collect()
}

impl Candidate {
    fn command(&self, guest: &Path, line: &str, directory: &Path) -> Result<Command> {
        match &self.program {
            Program::Monitor(monitor) => {
                let mut config = host::config(guest, line);
                config.machine_config.mem_size_mib = MEMORY_MIB;
                host::add_tap(&mut config, "tap0", MAC);
                let file = directory.join("config.json");
                fs::write(&file, serde_json::to_vec(&config)?).context("write the configuration")?;
                let mut command = Command::new(monitor.program());
                command.args(monitor.arguments(&file));
                Ok(command)
            }
            Program::CloudHypervisor(program) => {
                let mut command = Command::new(program);
                command.arg("--kernel").arg(guest).arg("--cmdline").arg(line);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")]);
                command.args(["--serial", "tty", "--console", "off"]);
                command.arg("--net").arg(format!("tap=tap0,mac={MAC}"));
                Ok(command)
            }
        }
    }
}

fn case(
    number: usize,
    name: String,
    candidates: &[Candidate],
    found: &BTreeMap<(usize, usize), Vec<Measurement>>,
) -> Result<Case> {
    let (key, divisor, unit, less) = reading(&name);
    let mut rows = Vec::new();
    for (position, candidate) in candidates.iter().enumerate() {
        let Some(measurements) = found.get(&(number, position)) else { continue };
        let values: Option<Vec<f64>> =
            measurements.iter().map(|one| one.get(key).map(|value| value / divisor)).collect();
        let values = values.with_context(|| format!("{name} without {key}"))?;
        rows.push(Row { name: candidate.name.to_owned(), value: spread(values.into_iter()) });
    }
    let (ours, peers): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.name == "mote-vmm");
    let peers = peers.iter().map(|row| row.value.median);
    let best = if less { peers.min_by(f64::total_cmp) } else { peers.max_by(f64::total_cmp) };
    let ratio = ours.first().zip(best).map(|(ours, best)| ours.value.median / best);
    Ok(Case { name, unit, rows, ratio })
}

/// One run. The processor's thread has CPU 0 and all others have CPU 1, for every program alike: whether the host's
/// scheduler happens to put the two busiest threads on one processor would otherwise decide.
fn measure(command: &mut Command) -> Result<Vec<(String, Measurement)>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
    let end = Instant::now() + PIN_TIME;
    while Instant::now() < end {
        pin(child.id());
        thread::sleep(Duration::from_millis(1));
    }
    measurements(&child.wait_with_output().context("wait")?)
}

/// Pins the threads that are there. A thread that ends meanwhile, or a machine with one processor, is left alone.
fn pin(process: u32) {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return };
    for thread in threads.flatten() {
        let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        let Some(id) = thread.file_name().to_str().and_then(|id| id.parse().ok()) else { continue };
        let mut set = CpuSet::new();
        let set_up = set.set(usize::from(!name.contains("vcpu")));
        let _ = set_up.and_then(|()| sched_setaffinity(Pid::from_raw(id), &set));
    }
}

/// A table for each case: min/median/max.
pub fn render(cases: &[Case]) -> String {
    let mut text = String::new();
    for case in cases {
        let _ = writeln!(text, "{:28}{:>30}", case.name, format!("{} min/median/max", case.unit));
        for row in &case.rows {
            let Spread { min, median, max } = row.value;
            let _ = writeln!(text, "  {:26}{:>30}", row.name, format!("{min:.1} / {median:.1} / {max:.1}"));
        }
        if let Some(ratio) = case.ratio {
            let _ = writeln!(text, "  mote-vmm over the best peer: {ratio:.2}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_to_the_best_peer_which_for_times_is_the_fastest() {
        let candidate = |name| Candidate { name, program: Program::CloudHypervisor(PathBuf::new()) };
        let candidates = [candidate("mote-vmm"), candidate("a"), candidate("b")];
        let measured = |value: f64| -> Vec<Measurement> {
            vec![["pps", "mbit", "p50_ns"].map(|key| (key.to_owned(), value)).into()]
        };
        let found = [((0, 0), measured(20.0)), ((0, 1), measured(10.0)), ((0, 2), measured(40.0))].into();
        let ratio = |name: &str| case(0, name.to_owned(), &candidates, &found).expect("complete").ratio;
        assert_eq!((ratio("echo"), ratio("send-64")), (Some(2.0), Some(0.5)));
    }
}
