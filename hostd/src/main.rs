//! `mote-hostd`: the agent of one Mote host.

use std::{io::IsTerminal, net::IpAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use mote_hostd::{
    daemon, identity, kvm_check,
    paths::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, RunDir, StateDir},
    status, wiring,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Time that work in flight gets at the end; being cut off is harmless.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// The agent of one Mote host: runs the servers that the controller places here.
///
/// A host joins a cloud once (`join`), then `run` keeps it connected; `run` only calls out, it listens on no network address.
/// Stopping it (SIGTERM, even SIGKILL) leaves the servers running; the next `run` takes them over.
#[derive(Debug, Parser)]
#[command(version, about, after_help = "Logs go to standard error; RUST_LOG=debug shows more.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a cloud with a token that its administrator made (`mote host token`, or POST /mote/v1/join-tokens).
    ///
    /// Joining again is harmless: the host stays the same one and gets a new secret.
    Join(JoinArgs),
    /// Run the agent (in the foreground; a service manager restarts it).
    Run(RunArgs),
    /// Show what the running agent knows: connection, generation, servers.
    Status(StatusArgs),
    /// Say whether this machine can run servers, and what to do if not.
    ///
    /// Exit code 0: KVM works (perhaps without hardware virtualization, which is said); 1: it does not.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct Dirs {
    /// Where state is kept: identity, images, servers' disks.
    #[arg(long, env = "MOTE_HOST_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Where sockets are kept; the path must be short.
    #[arg(long, env = "MOTE_HOST_RUN_DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
struct JoinArgs {
    /// Address of the controller, as http://192.0.2.1:8774.
    url: String,
    /// The join token.
    #[arg(long, env = "MOTE_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Name of this host, unique in the cloud [default: the machine's host name].
    #[arg(long)]
    name: Option<String>,
    /// Availability zone.
    #[arg(long, default_value = "nova")]
    zone: String,
    #[command(flatten)]
    dirs: Dirs,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    dirs: Dirs,
    /// The VM monitor [default: mote-vmm beside this program].
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// Address at which other hosts reach this one for tenants' networks [default: the one that this host has towards
    /// the controller, if that is on another machine].
    #[arg(long, env = "MOTE_HOST_TUNNEL_IP", value_name = "ADDRESS")]
    tunnel_ip: Option<IpAddr>,
    /// A physical network that this host is connected to, and the interface or bridge that leads there; repeatable.
    #[arg(
        long = "physical-network",
        env = "MOTE_HOST_PHYSICAL_NETWORKS",
        value_delimiter = ',',
        value_name = "NAME=INTERFACE",
        value_parser = wiring::physical_network
    )]
    physical_networks: Vec<(String, String)>,
    /// A resolver that servers' questions for names outside of their network are passed on to; repeatable (the first that
    /// answers). Without one, servers on subnets without dns_nameservers find the names of their own network only.
    #[arg(
        long = "dns-forwarder",
        env = "MOTE_HOST_DNS_FORWARDERS",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    dns_forwarders: Vec<IpAddr>,
    /// Simulate VMMs and networks: servers have all their states, disks and images, but no machine. Needs neither KVM nor
    /// root.
    #[arg(long)]
    simulated: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    dirs: Dirs,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("mote-hostd: cannot start: {e}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(command(cli.command));
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("mote-hostd: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn command(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Join(args) => join(args).await,
        Command::Run(args) => run(args).await,
        Command::Status(args) => show_status(args).await,
        Command::Check { json } => check(json),
    }
}

async fn join(args: JoinArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::new(args.dirs.state_dir);
    let identity = identity::join(identity::Join {
        url: &args.url,
        token: &args.token,
        name: args.name,
        zone: &args.zone,
        state: &state,
    })
    .await?;
    println!("joined: {identity:?}");
    Ok(ExitCode::SUCCESS)
}

async fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let vmm = match args.vmm {
        Some(vmm) => vmm,
        None => {
            std::env::current_exe().context("finding this program's own place")?.with_file_name("mote-vmm")
        }
    };
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for SIGINT")?;
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        }
    });
    let options = daemon::Options {
        state: StateDir::new(args.dirs.state_dir),
        run: RunDir::new(args.dirs.run_dir),
        vmm,
        underlay: wiring::Underlay {
            tunnel_ip: args.tunnel_ip,
            physical_networks: args.physical_networks.into_iter().collect(),
            dns_forwarders: args.dns_forwarders,
        },
        simulated: args.simulated,
    };
    daemon::run(options, stop).await?;
    Ok(ExitCode::SUCCESS)
}

async fn show_status(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let status = status::ask(&RunDir::new(args.dirs.run_dir)).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status).context("writing JSON")?);
    } else {
        print!("{}", status::text(&status));
    }
    Ok(ExitCode::SUCCESS)
}

fn check(json: bool) -> anyhow::Result<ExitCode> {
    let status = kvm_check::check();
    let (works, message) = (status.works(), status.message());
    if json {
        let mut value = serde_json::to_value(&status).context("writing JSON")?;
        value["works"] = works.into();
        value["traits"] = status.traits().into();
        value["message"] = message.into();
        println!("{value:#}");
    } else if message.is_empty() {
        println!("This machine can run servers ({}).", status.traits().join(" "));
    } else {
        println!("{message}");
    }
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
