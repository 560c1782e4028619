//! A stand-in for mote-vmm in tests: the same command line, API socket, exit report and signals, but no VM and no jail:
//! its files are where they would be if it were in one.
//!
//! It prints the descriptors that it was given, writes one line to the console file, and ends when told by SIGTERM, or at
//! once when the command line of its guest says `end=power_off` (or another reason of an exit report).

use std::{
    fs,
    io::{IoSliceMut, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use mote_vmm_api::{ExitReason, ExitReport, InstanceInfo, InstanceState, VmConfig};
use nix::sys::{
    signal::{SigSet, Signal},
    socket::{ControlMessageOwned, MsgFlags, recvmsg},
};

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
    #[arg(long)]
    enable_pci: bool,
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
    if let Some(path) = config.serial.clone().and_then(|serial| serial.serial_out_path) {
        fs::write(outside(&path), "hello from the guest\n")?;
    }
    let command_line = config.boot_source.clone().and_then(|source| source.boot_args).unwrap_or_default();
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
    let mut config = if cli.enable_pci { config } else { VmConfig::default() };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            // What can't be answered is not: the agent sees that.
            let Ok(body) = answer(&stream, &info, &mut config) else { continue };
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    terminate.wait()?;
    end(&cli, ExitReason::Terminated)
}

/// Answers `GET /`, `GET /vm/config`, and requests for interfaces: a tap that comes with one is kept open.
fn answer(stream: &UnixStream, info: &InstanceInfo, config: &mut VmConfig) -> std::io::Result<String> {
    let mut bytes = [0; 4096];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let length = message.bytes;
    let taps =
        message.cmsgs()?.filter(|part| matches!(part, ControlMessageOwned::ScmRights(fds) if fds.len() == 1));
    let taps = taps.count();
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    match (method, path.strip_prefix("/network-interfaces/")) {
        ("PUT", Some(_)) if taps == 1 => {
            config.network_interfaces.push(serde_json::from_str(body)?);
            Ok("null".to_owned())
        }
        ("DELETE", Some(id)) => {
            config.network_interfaces.retain(|nic| nic.iface_id != id);
            Ok("null".to_owned())
        }
        ("GET", None) if path == "/vm/config" => Ok(serde_json::to_string(&config)?),
        ("GET", None) => Ok(serde_json::to_string(info)?),
        _ => Err(std::io::ErrorKind::InvalidInput.into()),
    }
}

fn end(cli: &Cli, reason: ExitReason) -> std::io::Result<ExitCode> {
    let report = serde_json::to_vec(&ExitReport { reason, message: "as told".into() })?;
    let temporary = cli.exit_report.with_extension("tmp");
    fs::write(&temporary, report)?;
    fs::rename(temporary, &cli.exit_report)?;
    Ok(ExitCode::from(reason.code()))
}
