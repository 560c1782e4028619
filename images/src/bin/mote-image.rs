//! `mote-image`: makes guest images from Debian packages and tells what a file is.
#![forbid(unsafe_code)]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::Context as _;
use clap::Parser;
use mote_images::{
    build::{BuildError, Variant},
    build_kernel,
};

/// Make guest images, and tell what a file is.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
enum Args {
    /// A Debian (kernel, initial ramdisk, disk) from this machine's package sources, as root.
    BuildDebian {
        /// Directory to make; one that is up to date is left as it is.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// With systemd, OpenSSH and cloud-init as the distribution has them, instead of the smallest that answers.
        #[arg(long)]
        cloud_init: bool,
    },
    /// A small kernel for microVMs (no modules, no initial ramdisk needed) from Debian's linux-source-6.12; takes minutes.
    BuildKernel {
        /// Directory to make (vmlinux, config); one that is up to date is left as it is.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// For one processor only: smaller and quicker.
        #[arg(long)]
        uniprocessor: bool,
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
        Args::BuildDebian { out, cloud_init } => {
            let variant = if cloud_init { Variant::CloudInit } else { Variant::Small };
            build(&out, |progress| mote_images::build::build_debian(&out, variant, progress).map(drop))?;
        }
        Args::BuildKernel { out, uniprocessor } => {
            let variant =
                if uniprocessor { build_kernel::Variant::Uniprocessor } else { build_kernel::Variant::Smp };
            build(&out, |progress| build_kernel::build_kernel(&out, variant, progress))?;
        }
        Args::Probe { file } => {
            let format = mote_images::format::probe_file(&file)
                .with_context(|| format!("reading {}", file.display()))?;
            println!("{format:?}");
        }
    }
    Ok(())
}

/// Runs a build whose steps are printed with their times.
fn build(
    out: &Path,
    run: impl FnOnce(&mut dyn FnMut(&str)) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let started = Instant::now();
    let mut say = |step: &str| eprintln!("{:>7.1} s  {step}", started.elapsed().as_secs_f64());
    run(&mut say)?;
    say(&format!("{} is ready", out.display()));
    Ok(())
}
