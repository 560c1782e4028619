//! Benchmarks of mote-vmm beside its peers, of the controller, and of tenant networks. They measure and print; they don't pass or fail.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod api;
mod block;
mod candidate;
mod lab_boot;
mod measure;
mod net;
mod network;
mod startup;
mod table;

/// Measures mote-vmm beside its peers.
#[derive(Debug, Parser)]
#[command(name = "mote-bench", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Time and memory to start the conformance guest
    ///
    /// Starts the guest's `mote.hello` (one line on the serial port, then power-off) under each monitor in turn, run by
    /// run, so that what disturbs the machine disturbs all alike. Then a few starts of a guest that waits before it
    /// powers off, in which memory is read from /proc.
    Startup(StartupArguments),
    /// Requests of a block device
    ///
    /// Starts the guest's `mote.bench=block` under each monitor and engine in turn: the guest keeps one or more requests
    /// in flight from user mode, with queue code of its own and without interrupts. Prints min / median / max of the
    /// rounds, and how the best engine of mote-vmm compares to the best of the peers.
    Block(BlockArguments),
    /// Requests of the controller's API
    ///
    /// Bootstraps a controller in a temporary directory, fills its database, and asks: tokens, validation, one server, a
    /// page of servers. Prints requests per second and latencies.
    Api(api::ApiArguments),
    /// Frames of a network interface
    ///
    /// Starts the guest's `mote.bench=net` under each monitor in turn, on a tap in a network namespace made for it: 64-byte
    /// frames sent and received, 60 KiB frames to be segmented, and echo round trips answered by the host's network
    /// stack. Prints min / median / max of the rounds, and how mote-vmm compares to the best of the peers.
    Net(NetArguments),
    /// Tenant networks on hosts
    ///
    /// In network namespaces made for it: TCP between two ports of one host and of two hosts, without a filter, with a few
    /// rules and with a hundred, beside a plain bridge and a plain VXLAN in the same run; how long a rule change takes on a
    /// host with many ports, and a port from its creation until it is wired. Needs root.
    Network(network::NetworkArguments),
    /// Debian's kernel until its user space, in the lab's repeatable mode
    ///
    /// Boots the kernel of the lab under Firecracker and mote-vmm in turn, inside the lab, whose clock counts instructions
    /// in this mode: two runs print the same. Prints min / median / max of the rounds with the ratio to Firecracker, and
    /// KVM's counters of exits. Some minutes.
    LabBoot(lab_boot::LabBootArguments),
    /// What `lab-boot` runs inside the lab
    #[command(hide = true)]
    LabBootInside {
        /// What is to be done
        plan: PathBuf,
    },
}

/// What `net` measures.
#[derive(Debug, clap::Args)]
struct NetArguments {
    /// mote-vmm
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// The conformance guest
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(10..=20_000))]
    ms: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `block` measures.
#[derive(Debug, clap::Args)]
struct BlockArguments {
    /// mote-vmm
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// The conformance guest
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Where the disk's file is made
    #[arg(long, value_name = "PATH", default_value = "/dev/shm")]
    directory: PathBuf,
    /// Size of the disk
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    size_mib: u32,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    ms: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `startup` measures.
#[derive(Debug, clap::Args)]
struct StartupArguments {
    /// mote-vmm
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// The floor program [default: mote-floor beside this program]
    #[arg(long, value_name = "PATH")]
    floor: Option<PathBuf>,
    /// The conformance guest
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Timed starts of each
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=3072))]
    memory_mib: u32,
    /// Numbers of vCPUs: each monitor once with each, and what one more costs from the least to the most
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u8).range(1..=32)
    )]
    vcpus: Vec<u8>,
    /// Give mote-vmm and Firecracker a disk and a network interface, on a tap in a network namespace made for it (needs root)
    #[arg(long)]
    devices: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Startup(arguments) => {
            let results = startup::run(&arguments)?;
            print(&results, arguments.json, table::render)
        }
        Command::Api(arguments) => {
            let report = api::run(&arguments)?;
            print(&report, arguments.json, api::render)
        }
        Command::Net(arguments) => {
            let cases = net::run(&arguments)?;
            print(&cases, arguments.json, |cases| net::render(cases))
        }
        Command::Network(arguments) => {
            let report = network::run(&arguments)?;
            print(&report, arguments.json, network::render)
        }
        Command::LabBoot(arguments) => {
            let report = lab_boot::run(&arguments)?;
            print(&report, arguments.json, lab_boot::render)
        }
        Command::LabBootInside { plan } => lab_boot::run_inside(&plan),
        Command::Block(arguments) => {
            let cases = block::run(&arguments)?;
            print(&cases, arguments.json, |cases| block::render(cases))
        }
    }
}

fn print<T: serde::Serialize>(results: &T, json: bool, table: impl Fn(&T) -> String) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(results)?);
    } else {
        print!("{}", table(results));
    }
    Ok(())
}
