//! `mote-image`: makes guest images from Debian packages and tells what a file is.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::Context as _;
use clap::Parser;

/// Make guest images, and tell what a file is.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
enum Args {
    /// A small Debian (kernel, initial ramdisk, disk) from this machine's package sources, as root.
    BuildDebian {
        /// Directory to make; one that is up to date is left as it is.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Tell what a file is by its content.
    Probe {
        /// The file.
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mote-image: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    match args {
        Args::BuildDebian { out } => {
            let started = Instant::now();
            mote_images::build::build_debian(&out, |step| {
                eprintln!("{:>7.1} s  {step}", started.elapsed().as_secs_f64());
            })?;
            eprintln!("{:>7.1} s  {} is ready", started.elapsed().as_secs_f64(), out.display());
        }
        Args::Probe { file } => {
            let format = mote_images::format::probe_file(&file)
                .with_context(|| format!("reading {}", file.display()))?;
            println!("{format:?}");
        }
    }
    Ok(())
}
