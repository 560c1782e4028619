//! The part of `./quickstart` that speaks REST: the life of a server, first of the conformance guest, then of Debian.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::Parser;
use mote::{client::Client, rc::Credentials};
use mote_tests::{
    journey::{self, ImageFiles, Journey},
    place::Place,
    steps::Steps,
};

/// Takes a server through its whole life by REST, step by step with times, and checks that nothing is left.
#[derive(Parser)]
struct Args {
    /// The openrc file of the cloud.
    #[arg(long)]
    openrc: PathBuf,
    /// Name of the image (and of the server).
    #[arg(long)]
    name: String,
    /// Root disk.
    #[arg(long)]
    disk: PathBuf,
    /// Kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// Initial ramdisk.
    #[arg(long)]
    ramdisk: Option<PathBuf>,
    /// Image properties, KEY=VALUE.
    #[arg(long = "property")]
    properties: Vec<String>,
    /// Flavor.
    #[arg(long, default_value = "m1.tiny")]
    flavor: String,
    /// What the console shows when the guest is ready.
    #[arg(long)]
    console_mark: String,
    /// The lab that runs the server; default: this machine.
    #[arg(long)]
    lab: Option<String>,
    /// Availability zone that leads there.
    #[arg(long)]
    zone: Option<String>,
    /// Directories in which the host may leave files.
    #[arg(long = "dir")]
    dirs: Vec<String>,
    /// Limit in seconds for each thing that the guest does.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// SSH key to inject and to log in with.
    #[arg(long)]
    ssh_key: Option<PathBuf>,
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
    let client = Client::login(&Credentials::read(&args.openrc)?).await?;
    steps.done("token taken");
    let properties = args
        .properties
        .iter()
        .map(|p| {
            p.split_once('=')
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .with_context(|| format!("{p:?} is not KEY=VALUE"))
        })
        .collect::<anyhow::Result<_>>()?;
    let files = ImageFiles {
        name: args.name.clone(),
        disk: args.disk,
        kernel: args.kernel,
        ramdisk: args.ramdisk,
        properties,
    };
    let image_id = journey::image(&client, &files).await?;
    steps.done(format!("image {} is in the cloud: {image_id}", args.name));
    let journey = Journey {
        flavor: args.flavor,
        image_id,
        place: args.lab.map_or(Place::Here, Place::Lab),
        zone: args.zone,
        dirs: args.dirs,
        console_mark: args.console_mark,
        patience: Duration::from_secs(args.patience),
        ssh_key: args.ssh_key,
    };
    journey.travel(&client, &args.name, &mut steps).await?;
    println!("  {:>8.3} s  in all", steps.total_s());
    Ok(())
}
