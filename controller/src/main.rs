//! `mote-controller`: see `--help`.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use mote_controller::{
    app::{self, App},
    config::Config,
    server,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// Mote's controller: identity, image, compute and network APIs of a whole cloud in one program and one port.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the APIs until SIGTERM.
    Run(Run),
}

#[derive(Debug, Args)]
struct Common {
    /// Directory of the database, the keys and the images' bytes.
    #[arg(long, default_value = "/var/lib/mote/controller", env = "MOTE_CONTROLLER_STATE_DIR")]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    common: Common,
    /// Address and port to serve HTTP on.
    #[arg(long, default_value = "127.0.0.1:8774")]
    listen: SocketAddr,
    /// How clients reach this controller, the base of all URLs in the catalog [default: http://LISTEN].
    #[arg(long)]
    public_url: Option<String>,
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,sqlx=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let outcome =
        tokio::runtime::Runtime::new().context("can't start the async runtime").and_then(|runtime| {
            runtime.block_on(async {
                match cli.command {
                    Command::Run(args) => run(args).await,
                }
            })
        });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mote-controller: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn run(args: Run) -> anyhow::Result<()> {
    let public_url = args.public_url.unwrap_or_else(|| format!("http://{}", args.listen));
    let config = Config::new(args.listen, args.common.state_dir, &public_url)?;
    let listener = TcpListener::bind(args.listen).await.with_context(|| {
        format!("can't listen on {} (another program may be using the port)", args.listen)
    })?;
    let app = App::open(config).await?;
    tracing::info!(listen = %args.listen, public_url, "serving");
    server::serve(listener, app::router(app), stop_signal()?).await;
    Ok(())
}

/// Resolves at SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate()).context("can't watch for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("can't watch for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("stopping");
    })
}
