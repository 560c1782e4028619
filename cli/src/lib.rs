//! The `mote` command: `mote up` runs a whole cloud on this machine; everything else speaks the public HTTP API and works
//! against any Mote (most of it against any OpenStack). As a library it gives the end-to-end tests the same client.
#![deny(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod client;
pub mod commands;
mod console;
mod output;
pub mod rc;
mod up;

/// A whole IaaS cloud in a handful of binaries.
///
/// Start one on this machine with `mote up`, boot a VM with `mote run IMAGE`. The other commands speak the same public API as
/// `openstack`; they take the cloud from the usual OS_* variables (source the openrc file that `mote up` prints), and without
/// them from the cloud that runs on this machine.
#[derive(Parser)]
#[command(name = "mote", version, max_term_width = 100, arg_required_else_help = true)]
struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(clap::Args, Clone, Debug)]
pub struct Global {
    /// Print JSON for programs instead of tables for people.
    #[arg(long, global = true, visible_alias = "format-json")]
    pub json: bool,
    /// Where `mote up` keeps everything; its admin-openrc.sh is read when no OS_* variables are set.
    #[arg(long, global = true, env = "MOTE_STATE_DIR", default_value = "/var/lib/mote", value_name = "DIR")]
    pub state_dir: std::path::PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cloud on this machine: controller and host daemon, an administrator, a network and flavors.
    Up(up::UpArgs),
    /// Stop what `mote up` started. Servers keep running and are found again by the next `mote up`.
    Down(up::DownArgs),
    /// Boot a server from an image and attach its console (leave with Ctrl-]).
    Run(commands::run::RunArgs),
    /// Servers.
    #[command(subcommand)]
    Server(commands::server::ServerCommand),
    /// Images: list, upload, build.
    #[command(subcommand)]
    Image(commands::image::ImageCommand),
    /// Networks with their subnets.
    #[command(subcommand)]
    Network(commands::network::NetworkCommand),
    /// Key pairs for SSH.
    #[command(subcommand)]
    Keypair(commands::keypair::KeypairCommand),
    /// Flavors: sizes of servers.
    #[command(subcommand)]
    Flavor(commands::flavor::FlavorCommand),
    /// Hosts of the cloud (administrators).
    #[command(subcommand)]
    Host(commands::host::HostCommand),
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("mote: cannot start: {e}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(dispatch(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mote: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(args: Args) -> anyhow::Result<()> {
    let global = args.global;
    match args.command {
        Command::Up(a) => up::up(&global, a).await,
        Command::Down(a) => up::down(&global, a).await,
        Command::Run(a) => commands::run::run(&global, a).await,
        Command::Server(c) => commands::server::run(&global, c).await,
        Command::Image(c) => commands::image::run(&global, c).await,
        Command::Network(c) => commands::network::run(&global, c).await,
        Command::Keypair(c) => commands::keypair::run(&global, c).await,
        Command::Flavor(c) => commands::flavor::run(&global, c).await,
        Command::Host(c) => commands::host::run(&global, c).await,
    }
}
