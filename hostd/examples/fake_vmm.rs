//! A stand-in for mote-vmm in tests: the same command line, API socket, exit report and signals, but no VM and no jail:
//! its files are where they would be if it were in one.
//!
//! It prints the descriptors that it was given, writes one line to the console file, and ends when told by SIGTERM, or at
//! once when the command line of its guest says `end=power_off` (or another reason of an exit report).

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use mote_vmm_api::{ExitReason, ExitReport, InstanceInfo, InstanceState, VmConfig};
use nix::sys::signal::{SigSet, Signal};

/// `fake_vmm jail OPTIONS -- ARGUMENTS`.
#[derive(Debug, Parser)]
struct Jail {
    #[arg(long)]
    id: String,
    #[arg(long)]
    uid: u32,
    #[arg(long)]
    gid: u32,
    #[arg(long)]
    root: PathBuf,
    #[arg(long)]
    netns: PathBuf,
    #[arg(long)]
    keep_fd: Vec<u32>,
    #[arg(last = true)]
    arguments: Vec<String>,
}

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Cli {
    #[arg(long)]
    api_sock: PathBuf,
    #[arg(long)]
    config_file: PathBuf,
    #[arg(long)]
    exit_report: PathBuf,
}

fn main() -> std::io::Result<ExitCode> {
    let mut arguments = std::env::args();
    let program = arguments.next();
    assert_eq!(arguments.next().as_deref(), Some("jail"));
    let jail = Jail::parse_from(program.into_iter().chain(arguments));
    assert!(fs::metadata(&jail.netns)?.is_file());
    let mut cli = Cli::parse_from(&jail.arguments);
    let outside = |path: &Path| jail.root.join(path.strip_prefix("/").expect("paths in a jail are absolute"));
    for path in [&mut cli.api_sock, &mut cli.config_file, &mut cli.exit_report] {
        *path = outside(path);
    }
    let mut terminate = SigSet::empty();
    terminate.add(Signal::SIGTERM);
    terminate.thread_block()?;

    // Sorted, without the one that reads the directory.
    let mut open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| {
            let to = fs::read_link(format!("/proc/self/fd/{fd}"));
            // A jail closes the network namespace once it has joined it.
            to.is_ok_and(|to| !to.ends_with("fd") && !to.to_string_lossy().starts_with("net:"))
        })
        .collect();
    open.sort_unstable();
    println!("open: {open:?}");

    let config: VmConfig = serde_json::from_slice(&fs::read(&cli.config_file)?)?;
    if let Some(path) = config.serial.and_then(|serial| serial.serial_out_path) {
        fs::write(outside(&path), "hello from the guest\n")?;
    }
    let command_line = config.boot_source.and_then(|source| source.boot_args).unwrap_or_default();
    let ends = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix("end="));
    if let Some(reason) = ends {
        return end(&cli, serde_json::from_value(reason.into())?);
    }
    let listener = UnixListener::bind(&cli.api_sock)?;
    let info = InstanceInfo {
        app_name: "mote-vmm".into(),
        id: jail.id.clone(),
        state: InstanceState::Running,
        vmm_version: "0".into(),
    };
    let body = serde_json::to_string(&info)?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    terminate.wait()?;
    end(&cli, ExitReason::Terminated)
}

fn end(cli: &Cli, reason: ExitReason) -> std::io::Result<ExitCode> {
    let report = serde_json::to_vec(&ExitReport { reason, message: "as told".into() })?;
    let temporary = cli.exit_report.with_extension("tmp");
    fs::write(&temporary, report)?;
    fs::rename(temporary, &cli.exit_report)?;
    Ok(ExitCode::from(reason.code()))
}
