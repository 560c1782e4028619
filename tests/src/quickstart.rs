//! The part of `./quickstart` that speaks REST: the life of a server, of the conformance guest or of Debian.
#![forbid(unsafe_code)]

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Parser;
use mote::{client::Client, rc::Credentials};
use mote_tests::{
    journey::{self, ImageFiles, Journey},
    lab::Lab,
    place::Place,
    steps::Steps,
};

/// Takes a server through its whole life by REST, step by step with times, and checks that nothing is left.
#[derive(Parser)]
struct Args {
    /// The openrc file of the cloud.
    #[arg(long)]
    openrc: PathBuf,
    /// Name of the image and of the server.
    #[arg(long)]
    name: String,
    /// The conformance guest's ELF file.
    #[arg(long, value_name = "FILE", required_unless_present = "debian")]
    guest: Option<PathBuf>,
    /// Directory that `mote-image build-debian` made.
    #[arg(long, value_name = "DIR", conflicts_with = "guest")]
    debian: Option<PathBuf>,
    /// Start a lab of this name, join it to the cloud and run the server there.
    #[arg(long)]
    lab: Option<String>,
    /// Leave the lab running.
    #[arg(long)]
    keep: bool,
    /// Directories in which the host on this machine may leave files.
    #[arg(long = "dir")]
    dirs: Vec<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let run = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting")
        .and_then(|runtime| runtime.block_on(travel(args)));
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("quickstart: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn travel(args: Args) -> anyhow::Result<()> {
    let mut steps = Steps::new();
    let credentials = Credentials::read(&args.openrc)?;
    let client = Client::login(&credentials).await?;
    steps.done("token taken");
    let scratch = tempfile::tempdir().context("making a directory")?;
    let files = match (&args.guest, &args.debian) {
        (Some(guest), _) => ImageFiles::guest(&args.name, guest, scratch.path())?,
        (_, Some(dir)) => ImageFiles::bundle(&args.name, dir)?,
        _ => bail!("--guest or --debian is needed"),
    };
    let image_id = journey::image(&client, &files).await?;
    steps.done(format!("image {} is in the cloud: {image_id}", args.name));
    let lab = match &args.lab {
        None => None,
        Some(name) => {
            let lab = Lab::start(name)?;
            steps.done(format!("lab {name} has booted"));
            lab.join(&client, port_of(&credentials)?, "lab").await?;
            steps.done("its host daemon has joined the cloud and is up");
            Some(lab)
        }
    };
    let journey = if args.guest.is_some() {
        Journey::guest(image_id, args.dirs)
    } else {
        Journey {
            flavor: "m1.tiny".into(),
            image_id,
            place: lab.as_ref().map_or(Place::Here, Lab::place),
            zone: None,
            dirs: lab.as_ref().map_or(args.dirs, Lab::server_dirs),
            console_mark: "mote-debian: ready".into(),
            patience: Duration::from_secs(180),
            ssh_key: Some(ssh_key(scratch.path())?),
        }
    };
    journey.travel(&client, &args.name, &mut steps).await?;
    println!("  {:>8.3} s  in all", steps.total_s());
    if let (Some(lab), true) = (lab, args.keep) {
        lab.keep();
    }
    Ok(())
}

fn port_of(credentials: &Credentials) -> anyhow::Result<u16> {
    let authority = credentials.auth_url.split('/').nth(2).context("the URL of the cloud has no host")?;
    let port = authority.rsplit(':').next().context("the URL of the cloud has no port")?;
    port.parse().with_context(|| format!("{port:?} is no port"))
}

/// A new key pair; the private half stays in a directory that goes when this program ends.
fn ssh_key(dir: &Path) -> anyhow::Result<PathBuf> {
    let key = dir.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    if !made.context("running ssh-keygen")?.success() {
        bail!("ssh-keygen failed");
    }
    Ok(key)
}
