//! `cargo xtask check`: style and architecture. `cargo xtask test`: all tests with one closing line. `cargo xtask fuzz`: what
//! reads a guest's or tenant's bytes, under libFuzzer.
#![forbid(unsafe_code)]

use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

mod architecture;
mod fuzz;
mod tests;

const HELP: &str = "\
cargo xtask check             formatting and the architecture's invariants
cargo xtask lint              clippy without warnings
cargo xtask test [-- ARGS]    all tests (ARGS go to the runner), ended by `N passed, N failed, N skipped`;
                              with --fuzz before ARGS the fuzz targets beside them, counted with them
cargo xtask fuzz [TARGET …]   fuzz targets under libFuzzer; see cargo xtask fuzz --help
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.first().map(String::as_str) {
        Some("check") => check(),
        Some("lint") => lint(),
        Some("fuzz") => fuzz::run(&args[1..]),
        Some("test") => tests::run(&args[1..]),
        _ => {
            print!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn check() -> anyhow::Result<()> {
    architecture::check()?;
    cargo(&["fmt", "--all", "--check"])
}

/// Clippy without warnings, for the host and for the bare-metal guest.
fn lint() -> anyhow::Result<()> {
    let all = [
        "clippy",
        "-q",
        "--release",
        "--workspace",
        "--all-targets",
        "--exclude",
        "mote-guest",
        "--",
        "-D",
        "warnings",
    ];
    cargo(&all)?;
    cargo(&["clippy", "-q", "--release", "-p", "mote-guest", "--all-targets", "--", "-D", "warnings"])?;
    let bare_metal = [
        "clippy",
        "-q",
        "--profile",
        "guest",
        "-p",
        "mote-guest",
        "--no-default-features",
        "--features",
        "freestanding",
        "--bins",
    ];
    cargo(&[&bare_metal[..], &["--", "-D", "warnings"]].concat())
}

/// Cargo, without what `cargo run` told this program about its own package: a crate whose build script looks at that
/// would be built anew, and all that depend on it.
fn cargo_command() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let about_us = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"];
        if about_us.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs cargo; its failure is ours.
fn cargo(args: &[&str]) -> anyhow::Result<()> {
    eprintln!("cargo {}", args.join(" "));
    let status = cargo_command().args(args).status().context("running cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", args.join(" "));
    }
    Ok(())
}
