//! Tenant networks on hosts, beside a plain bridge and a plain VXLAN, in network namespaces of its own.

mod ground;

use std::{
    fmt::Write as _,
    io::{Read, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use mote_host_api::{Protocol, SegmentSpec};
use mote_network::{Desired, namespace::in_namespace};
use serde::Serialize;
use tokio::runtime::Runtime;

use ground::{Ground, Place, a_rule, group, network_with_ports, port};

const PORT: u16 = 5001;
/// What is written at once, in bytes.
const CHUNK: usize = 128 * 1024;

/// What `network` measures.
#[derive(Debug, clap::Args)]
pub struct NetworkArguments {
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Milliseconds of each throughput measurement
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    ms: u64,
    /// Ports of the host whose rules are changed
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    ports: u16,
    /// The program that plans for many hosts [default: examples/plan_networks beside this program]
    #[arg(long, value_name = "PATH")]
    planner: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Values of the rounds, sorted.
#[derive(Debug, Serialize)]
pub struct Case {
    name: &'static str,
    /// Compared to this case.
    base: Option<&'static str>,
    unit: &'static str,
    values: Vec<f64>,
}

impl Case {
    fn median(&self) -> f64 {
        self.values[self.values.len() / 2]
    }
}

/// Measures everything.
///
/// # Errors
/// What couldn't be set up.
pub fn run(arguments: &NetworkArguments) -> Result<Vec<Case>> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root");
    }
    let runtime = Runtime::new()?;
    let mut cases = throughput(&runtime, arguments)?;
    cases.extend(changes(&runtime, arguments)?);
    cases.extend(planning(arguments)?);
    for case in &mut cases {
        case.values.sort_unstable_by(f64::total_cmp);
    }
    Ok(cases)
}

/// The names of the rows, each with what it is compared to.
const THROUGHPUT: [(&str, Option<&str>); 6] = [
    ("one host: plain bridge", None),
    ("one host: no filter", Some("one host: plain bridge")),
    ("one host: 2 rules", Some("one host: plain bridge")),
    ("one host: 100 rules", Some("one host: plain bridge")),
    ("two hosts: plain VXLAN", None),
    ("two hosts: 100 rules", Some("two hosts: plain VXLAN")),
];

fn throughput(runtime: &Runtime, arguments: &NetworkArguments) -> Result<Vec<Case>> {
    // Each has its own namespaces; all are there at the same time, and are measured in turn.
    let mut grounds = vec![Ground::plain_bridge()?];
    for rules in [None, Some(2), Some(100)] {
        grounds.push(runtime.block_on(Ground::mote(&[Place::One, Place::One], rules))?);
    }
    grounds.push(Ground::plain_vxlan()?);
    grounds.push(runtime.block_on(Ground::mote(&[Place::One, Place::Two], Some(100)))?);
    let case = |(name, base)| Case { name, base, unit: "MB/s", values: Vec::new() };
    let mut cases: Vec<Case> = THROUGHPUT.into_iter().map(case).collect();
    for _ in 0..arguments.rounds {
        for (case, ground) in cases.iter_mut().zip(&grounds) {
            let [from, to] = ground.clients();
            let rate = stream(from, to, ground.receiver(), Duration::from_millis(arguments.ms));
            case.values.push(rate.with_context(|| case.name)?);
        }
    }
    Ok(cases)
}

/// MB/s of one connection.
fn stream(from: &str, to: &str, address: Ipv4Addr, time: Duration) -> Result<f64> {
    let address = SocketAddr::from((address, PORT));
    let listener = in_namespace(to, || TcpListener::bind(address))??;
    let mut sender = in_namespace(from, || TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
    let (mut receiver, _) = listener.accept()?;
    let writer = thread::spawn(move || {
        let chunk = vec![0; CHUNK];
        // It ends when the other side closes.
        while sender.write_all(&chunk).is_ok() {}
    });
    let mut buffer = vec![0; CHUNK];
    let mut read_for = |time: Duration| {
        let (started, mut bytes) = (Instant::now(), 0);
        while started.elapsed() < time {
            bytes += receiver.read(&mut buffer)?;
        }
        anyhow::Ok(bytes as f64 / started.elapsed().as_secs_f64() / 1e6)
    };
    // The window opens.
    read_for(time / 5)?;
    let rate = read_for(time)?;
    drop(receiver);
    writer.join().ok().context("the sender panicked")?;
    Ok(rate)
}

/// Changes on a host with many ports of one group whose rules name it.
fn changes(runtime: &Runtime, arguments: &NetworkArguments) -> Result<Vec<Case>> {
    let case = |name| Case { name, base: None, unit: "ms", values: Vec::new() };
    let mut cases =
        [case("rule change"), case("member change"), case("nothing to do"), case("port created and wired")];
    let host = Ground::host()?;
    let (group, members) = group(2);
    let mut network = network_with_ports(arguments.ports, Some(group.id));
    network.segment = Some(SegmentSpec::Vxlan { vni: 77 });
    let mut desired = Desired {
        networks: vec![network],
        security_groups: vec![group],
        address_sets: vec![members],
        ..Desired::default()
    };
    runtime.block_on(host.converge(&desired))?;
    let mut taps = Vec::new();
    for round in 0..arguments.rounds {
        let timed = |case: &mut Case, desired: &Desired| {
            let started = Instant::now();
            runtime.block_on(host.converge(desired))?;
            case.values.push(started.elapsed().as_secs_f64() * 1e3);
            anyhow::Ok(())
        };
        let first = 1000 + 2 * u16::try_from(round)?;
        desired.security_groups[0].rules.push(a_rule(Protocol::Tcp { ports: Some((first, first)) }, None));
        timed(&mut cases[0], &desired)?;
        let member = Ipv4Addr::from(0x0a63_0000 + 2 * round);
        desired.address_sets[0].addresses.insert(mote_host_api::host_net(member.into()));
        timed(&mut cases[1], &desired)?;
        timed(&mut cases[2], &desired)?;
        let new = port(
            &desired.networks[0],
            arguments.ports + u16::try_from(round)?,
            Some(desired.security_groups[0].id),
        );
        desired.networks[0].ports.push(new.clone());
        let started = Instant::now();
        runtime.block_on(host.converge(&desired))?;
        taps.push(runtime.block_on(host.open_tap(&desired.networks[0], &new))?);
        cases[3].values.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(cases.into())
}

/// What `plan_networks` prints.
#[derive(Debug, serde::Deserialize)]
struct Planned {
    ms: Vec<f64>,
}

/// The controller's part: a member of a group of 1,000 changes, in a cloud of 10,000 ports on 100 hosts. None without the
/// program.
fn planning(arguments: &NetworkArguments) -> Result<Option<Case>> {
    let beside = std::env::current_exe()?.parent().context("this program is in a directory")?.to_owned();
    let program = arguments.planner.clone().unwrap_or_else(|| beside.join("examples/plan_networks"));
    if !program.exists() {
        eprintln!(
            "no {}, so planning is not measured: cargo build --release -p mote-controller --example plan_networks",
            program.display()
        );
        return Ok(None);
    }
    let output =
        Command::new(&program).arg(arguments.rounds.to_string()).output().context("plan_networks")?;
    if !output.status.success() {
        bail!("{}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    let planned: Planned = serde_json::from_slice(&output.stdout).context("what plan_networks printed")?;
    Ok(Some(Case { name: "group of 1000 planned", base: None, unit: "ms", values: planned.ms }))
}

/// A table of min / median / max, and how the medians compare.
pub fn render(cases: &Vec<Case>) -> String {
    let mut text = format!("{:26}{:>34}\n", "", "min / median / max");
    for case in cases {
        let [min, median, max] = [0, case.values.len() / 2, case.values.len() - 1].map(|at| case.values[at]);
        let _ = write!(
            text,
            "{:26}{:>34} {}",
            case.name,
            format!("{min:.1} / {median:.1} / {max:.1}"),
            case.unit
        );
        if let Some(base) = cases.iter().find(|other| Some(other.name) == case.base) {
            let _ = write!(text, "   {:.2} x", case.median() / base.median());
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_compared_to_its_base() {
        let case = |name, base, values: &[f64]| Case { name, base, unit: "MB/s", values: values.to_vec() };
        let cases = vec![case("a", None, &[1.0, 2.0, 4.0]), case("b", Some("a"), &[1.0])];
        let text = render(&cases);
        assert!(text.contains("1.0 / 2.0 / 4.0 MB/s") && text.contains("0.50 x"), "{text}");
    }
}
