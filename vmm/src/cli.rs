//! The command line, with Firecracker's names for what Firecracker has.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use argh::FromArgs;
use mote_vmm_api::{ExitReason, ExitReport, Logger, Metrics};
use nix::time::ClockId;

use crate::api::http::MAX_BODY;
use crate::api::requests;
use crate::api::server::Server;
use crate::controller::{ActionError, Controller, VmmAction};
use crate::cpu_template::{self, TemplateOptions};
use crate::error_chain;
use crate::event_loop::{self, EventLoop};
use crate::jail::{self, JailOptions, Next};
use crate::landlock;
use crate::log::{self, Level};
use crate::metrics;
use crate::outcome::Outcome;
use crate::process;
use crate::seccomp::{self, SeccompError};
use crate::signals;
use crate::snapshot::{self, FormatError};

/// Where Firecracker has its socket when nothing is said.
const DEFAULT_API_SOCKET: &str = "/run/firecracker.socket";
/// Largest config file, and file with metadata.
const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Runs one microVM on KVM.
///
/// The VM is configured and started through Firecracker's REST API on a Unix socket, or from one JSON file with
/// --config-file. `mote-vmm jail` does the same in a jail; `mote-vmm cpu-template` shows and checks CPU templates. The
/// process ends with its VM; the exit code says why: 0 the guest switched itself off, 1 the host failed, 3 the guest
/// rebooted, 4 the guest crashed, 5 ended by a signal, 148 a system call was refused, 152 bad configuration, 153 bad
/// arguments.
#[derive(Debug, FromArgs)]
#[argh(help_triggers("-h", "--help"))]
pub struct Options {
    /// unix socket of the API [default: /run/firecracker.socket]; a socket left there by a dead process is replaced
    #[argh(option, arg_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// start the VM that this JSON file describes
    #[argh(option, arg_name = "PATH")]
    config_file: Option<PathBuf>,
    /// do not listen for API requests
    #[argh(switch)]
    no_api: bool,
    /// name of the VM: 1 to 64 letters, digits and hyphens [default: anonymous-instance]
    #[argh(option, arg_name = "ID", default = "\"anonymous-instance\".to_owned()", from_str_fn(parse_id))]
    id: String,
    /// how much to log: Off, Error, Warning, Info, Debug or Trace [default: Info]
    #[argh(option, arg_name = "LEVEL", default = "Level::Info")]
    level: Level,
    /// append the log to this file instead of stderr
    #[argh(option, arg_name = "PATH")]
    log_path: Option<PathBuf>,
    /// name the level in each line of the log
    #[argh(switch)]
    show_level: bool,
    /// name the source line in each line of the log
    #[argh(switch)]
    show_log_origin: bool,
    /// log only lines from source modules whose path starts with this, as mote_vmm::snapshot
    #[argh(option, arg_name = "PREFIX")]
    module: Option<String>,
    /// append metrics (a line of JSON each minute and at the end) to this file
    #[argh(option, arg_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// longest body of an API request in bytes [default: 51200]
    #[argh(option, arg_name = "BYTES", default = "MAX_BODY")]
    http_api_max_payload_size: usize,
    /// most bytes of metadata for the guest, as JSON [default: that of --http-api-max-payload-size]
    #[argh(option, arg_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// start with the metadata for the guest that this JSON file holds
    #[argh(option, arg_name = "PATH")]
    metadata: Option<PathBuf>,
    /// when the process was started, in microseconds of the monotonic clock: metrics tell how long that took
    #[argh(option, arg_name = "US")]
    start_time_us: Option<u64>,
    /// the same in CPU time of the process
    #[argh(option, arg_name = "US")]
    start_time_cpu_us: Option<u64>,
    /// CPU time of the parent that belongs to the start
    #[argh(option, arg_name = "US")]
    parent_cpu_time_us: Option<u64>,
    /// print the version of this program, and end
    #[argh(switch, short = 'V')]
    version: bool,
    /// print the version of the snapshot format that is written, and end
    #[argh(switch)]
    snapshot_version: bool,
    /// print the format version of a snapshot's state file, and end
    #[argh(option, arg_name = "PATH")]
    describe_snapshot: Option<PathBuf>,
    /// log the time from the start of the VM until the guest writes 123 to the first page of the device hole
    #[argh(switch)]
    boot_timer: bool,
    /// put the devices on a PCI bus, with MSI-X interrupts, instead of behind virtio-mmio registers
    #[argh(switch)]
    enable_pci: bool,
    /// do not restrict the system calls of this process: for debugging only
    #[argh(switch)]
    no_seccomp: bool,
    /// do not give up by Landlock what this process never needs: for debugging only
    #[argh(switch)]
    no_landlock: bool,
    /// take the seccomp filters from this JSON file (seccompiler's format) with filters named main, setup, worker, vcpu
    #[argh(option, arg_name = "PATH")]
    seccomp_filter: Option<PathBuf>,
    /// write why the process ended to this file (JSON, by way of PATH.tmp) just before it does
    #[argh(option, arg_name = "PATH")]
    exit_report: Option<PathBuf>,
}

impl Options {
    /// Options that don't go together.
    fn check(&self) -> Result<(), &'static str> {
        if self.no_api && self.config_file.is_none() {
            return Err("--no-api needs --config-file: nobody could start the VM");
        }
        if self.no_api && self.api_sock.is_some() {
            return Err("--no-api and --api-sock contradict each other");
        }
        if self.no_seccomp && self.seccomp_filter.is_some() {
            return Err("--no-seccomp and --seccomp-filter contradict each other");
        }
        if self.parent_cpu_time_us.is_some() && self.start_time_cpu_us.is_none() {
            return Err("--parent-cpu-time-us needs --start-time-cpu-us");
        }
        Ok(())
    }
}

/// Firecracker's rule for ids.
pub(crate) fn parse_id(id: &str) -> Result<String, String> {
    let valid =
        (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if valid { Ok(id.to_owned()) } else { Err("1 to 64 letters, digits and hyphens".to_owned()) }
}

/// The process could not do its work.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("cannot open the log {}", .0.display())]
    Log(PathBuf, #[source] io::Error),
    #[error(transparent)]
    LogLook(log::LogError),
    #[error(transparent)]
    Metrics(ActionError),
    #[error("cannot set up signals and events")]
    Events(#[source] io::Error),
    #[error("cannot give up rights by Landlock (--no-landlock does without)")]
    Landlock(#[source] io::Error),
    #[error("cannot read the config file {}", .0.display())]
    ReadConfig(PathBuf, #[source] io::Error),
    #[error("the config file {} is wrong", .0.display())]
    ParseConfig(PathBuf, #[source] requests::RequestError),
    #[error("the config file {} is wrong", .0.display())]
    Config(PathBuf, #[source] ActionError),
    #[error("cannot read the metadata {}", .0.display())]
    ReadMetadata(PathBuf, #[source] io::Error),
    #[error("the metadata {} is not JSON", .0.display())]
    ParseMetadata(PathBuf, #[source] serde_json::Error),
    #[error("the metadata {} cannot be used", .0.display())]
    Metadata(PathBuf, #[source] ActionError),
    #[error(transparent)]
    Start(ActionError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Bind(#[from] crate::api::server::BindError),
}

impl RunError {
    fn reason(&self) -> ExitReason {
        match self {
            Self::Log(..)
            | Self::LogLook(_)
            | Self::Metrics(_)
            | Self::ReadConfig(..)
            | Self::ParseConfig(..)
            | Self::Config(..)
            | Self::ReadMetadata(..)
            | Self::ParseMetadata(..)
            | Self::Metadata(..)
            | Self::Landlock(_)
            | Self::Seccomp(_)
            | Self::Bind(_) => ExitReason::BadConfig,
            Self::Start(ActionError::Start(error)) => error.reason(),
            Self::Start(_) | Self::Events(_) => ExitReason::HostError,
        }
    }
}

/// The whole program: reads the command line, runs the VM, and returns the exit code.
pub fn main() -> u8 {
    if let Err(error) = process::prepare() {
        eprintln!("mote-vmm: {}", error_chain(&error));
        return ExitReason::HostError.code();
    }
    let mut words = match command_line(std::env::args_os().skip(1)) {
        Ok(words) => words,
        Err(wrong) => return usage("mote-vmm", &wrong),
    };
    if words.first().is_some_and(|word| word == "jail") {
        words = match enter_jail(&words[1..]) {
            Ok(inside) => inside,
            Err(code) => return code,
        };
    }
    if words.first().is_some_and(|word| word == "cpu-template") {
        return match parse::<TemplateOptions>("mote-vmm cpu-template", &words[1..]) {
            Ok(options) => cpu_template::run(&options),
            Err(code) => code,
        };
    }
    let options = match parse::<Options>("mote-vmm", &words) {
        Ok(options) => options,
        Err(code) => return code,
    };
    if let Err(conflict) = options.check() {
        return usage("mote-vmm", conflict);
    }
    if let Some(code) = print_versions(&options) {
        return code;
    }
    let report = run(&options).unwrap_or_else(|error| {
        let message = error_chain(&error);
        eprintln!("mote-vmm: {message}");
        ExitReport { reason: error.reason(), message }
    });
    log::info!("exiting: {}", report.message);
    if let Some(path) = &options.exit_report
        && let Err(error) = write_report(path, &report)
    {
        eprintln!("mote-vmm: cannot write the exit report {}: {error}", path.display());
    }
    report.reason.code()
}

/// Answers `--version`, `--snapshot-version` and `--describe-snapshot`: the exit code, if one of them was there.
fn print_versions(options: &Options) -> Option<u8> {
    if options.version {
        println!("mote-vmm {}", env!("CARGO_PKG_VERSION"));
        return Some(0);
    }
    if options.snapshot_version {
        let (major, minor) = snapshot::VERSION;
        println!("v{major}.{minor}");
        return Some(0);
    }
    let path = options.describe_snapshot.as_ref()?;
    let version = std::fs::File::open(path).map_err(FormatError::Read).and_then(snapshot::version);
    match version {
        Ok((major, minor)) => {
            println!("v{major}.{minor}");
            Some(0)
        }
        Err(error) => {
            eprintln!("mote-vmm: the snapshot {}: {}", path.display(), error_chain(&error));
            Some(ExitReason::BadConfig.code())
        }
    }
}

/// The words of a command line, with `--name=value` as two; what follows `--` is left as it is.
fn command_line(arguments: impl Iterator<Item = OsString>) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut options_ended = false;
    for word in arguments {
        let word =
            word.into_string().map_err(|word| format!("the argument {} is not UTF-8", word.display()))?;
        options_ended |= word == "--";
        match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") && !options_ended => {
                words.extend([name.to_owned(), value.to_owned()]);
            }
            _ => words.push(word),
        }
    }
    Ok(words)
}

/// The options of a command, or the exit code after its help or what is wrong was printed.
pub(crate) fn parse<T: FromArgs>(command: &str, words: &[String]) -> Result<T, u8> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    T::from_args(&[command], &words).map_err(|exit| match exit.status {
        Ok(()) => {
            println!("{}", exit.output.trim_end());
            0
        }
        Err(()) => usage(command, exit.output.trim_end()),
    })
}

/// Says what is wrong with the command line.
fn usage(command: &str, wrong: &str) -> u8 {
    eprintln!("{command}: {wrong}\nRun {command} --help for its options.");
    ExitReason::BadArguments.code()
}

/// Makes the jail that these options of `mote-vmm jail` ask for. Returns the command line that goes on inside of it, or
/// the exit code.
fn enter_jail(words: &[String]) -> Result<Vec<String>, u8> {
    let options = parse::<JailOptions>("mote-vmm jail", words)?;
    match jail::enter(&options) {
        Ok(Next::Run(inside)) => {
            command_line(inside.into_iter().map(OsString::from)).map_err(|error| usage("mote-vmm", &error))
        }
        Ok(Next::Exit) => Err(0),
        Err(error) => {
            eprintln!("mote-vmm jail: {}", error_chain(&error));
            Err(ExitReason::BadConfig.code())
        }
    }
}

/// How long the process took to start, from what its parent says.
fn note_startup_time(options: &Options) {
    let since = |start: Option<u64>, clock: ClockId| {
        let now = clock.now().ok()?;
        let now = now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000;
        Some(now.saturating_sub(start?))
    };
    if let Some(took) = since(options.start_time_us, ClockId::CLOCK_MONOTONIC) {
        metrics::PROCESS_STARTUP_TIME_US.store(took, Ordering::Relaxed);
    }
    if let Some(took) = since(options.start_time_cpu_us, ClockId::CLOCK_PROCESS_CPUTIME_ID) {
        let took = took.saturating_add(options.parent_cpu_time_us.unwrap_or(0));
        metrics::PROCESS_STARTUP_TIME_CPU_US.store(took, Ordering::Relaxed);
    }
}

fn run(options: &Options) -> Result<ExitReport, RunError> {
    if let Some(path) = &options.log_path {
        log::set_up(&options.id, options.level, Some(path))
            .map_err(|error| RunError::Log(path.clone(), error))?;
    } else {
        log::set_up(&options.id, options.level, None).map_err(RunError::Events)?;
    }
    let look = Logger {
        show_level: Some(options.show_level),
        show_log_origin: Some(options.show_log_origin),
        module: options.module.clone(),
        ..Logger::default()
    };
    log::configure(&look).map_err(RunError::LogLook)?;
    note_startup_time(options);
    if !options.no_landlock {
        // Before any thread is made: they inherit it.
        landlock::restrict_and_tell().map_err(RunError::Landlock)?;
    }
    if !options.no_seccomp {
        seccomp::prepare(options.seccomp_filter.as_deref())?;
    }
    signals::count_limits().map_err(RunError::Events)?;
    // Before any thread is made: they inherit the mask.
    let signals: OwnedFd = event_loop::block_signals().map_err(RunError::Events)?;
    let outcome = Arc::new(Outcome::new().map_err(RunError::Events)?);
    let mut controller = Controller::new(options.id.clone(), options.boot_timer, outcome.clone());
    controller.set_enable_pci(options.enable_pci);
    if let Some(path) = &options.metrics_path {
        let metrics = Metrics {
            metrics_path: path.clone(),
            emit_id: false,
            properties: BTreeMap::new(),
            prometheus_path: None,
        };
        controller.set_metrics(metrics).map_err(RunError::Metrics)?;
    }
    controller.set_mmds_limit(options.mmds_size_limit.unwrap_or(options.http_api_max_payload_size));
    if let Some(path) = &options.metadata {
        put_metadata(&mut controller, path)?;
    }
    // Listening comes before the start: whoever waits for the socket can connect while the VM is put together.
    let server = if options.no_api {
        None
    } else {
        let socket = options.api_sock.as_deref().unwrap_or(Path::new(DEFAULT_API_SOCKET));
        Some(Server::bind(socket, options.http_api_max_payload_size)?)
    };
    if let Some(path) = &options.config_file {
        let config = read_bounded(path).map_err(|error| RunError::ReadConfig(path.clone(), error))?;
        let config = requests::parse_config_file(&config)
            .map_err(|error| RunError::ParseConfig(path.clone(), error))?;
        controller.configure(config).map_err(|error| RunError::Config(path.clone(), error))?;
        if controller.machine_mut().is_none() {
            controller.start().map_err(RunError::Start)?;
        }
    }
    let event_loop = EventLoop::new(controller, server, outcome, signals).map_err(RunError::Events)?;
    event_loop.run().map_err(RunError::Events)
}

fn put_metadata(controller: &mut Controller, path: &Path) -> Result<(), RunError> {
    let bytes = read_bounded(path).map_err(|error| RunError::ReadMetadata(path.to_owned(), error))?;
    let document =
        serde_json::from_slice(&bytes).map_err(|error| RunError::ParseMetadata(path.to_owned(), error))?;
    let put = controller.execute(VmmAction::PutMmds(document));
    put.map(drop).map_err(|error| RunError::Metadata(path.to_owned(), error))
}

/// The bytes of a file that is no larger than a config file may be.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_CONFIG_FILE {
        return Err(io::Error::other(format!("it has {size} bytes, more than {MAX_CONFIG_FILE}")));
    }
    std::fs::read(path)
}

fn write_report(path: &Path, report: &ExitReport) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(report)?)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        let words = command_line(arguments.iter().map(Into::into))?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let options = Options::from_args(&["mote-vmm"], &words).map_err(|exit| exit.output)?;
        options.check().map_err(str::to_owned)?;
        Ok(options)
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        assert!(parse(&["--no-api"]).unwrap_err().contains("--config-file"));
        assert!(parse(&["--no-api", "--config-file", "x"]).unwrap().no_api);
        assert!(parse(&["--no-api", "--config-file", "x", "--api-sock", "y"]).is_err());
        assert!(parse(&["--no-seccomp", "--seccomp-filter", "x"]).is_err());
        assert!(parse(&["--parent-cpu-time-us", "1"]).is_err());
        assert!(parse(&["--parent-cpu-time-us", "1", "--start-time-cpu-us", "2"]).is_ok());
    }

    #[test]
    fn a_value_follows_its_option_or_an_equals_sign() {
        assert_eq!(parse(&["--id", "a"]).unwrap().id, "a");
        assert_eq!(parse(&["--id=a"]).unwrap().id, "a");
        assert_eq!(parse(&["--config-file=/a=b"]).unwrap().config_file, Some("/a=b".into()));
        let inside = command_line(["jail", "--uid=1", "--", "--id=a"].into_iter().map(Into::into)).unwrap();
        assert_eq!(inside, ["jail", "--uid", "1", "--", "--id=a"]);
    }

    #[test]
    fn what_does_not_exist_or_is_wrong_is_refused() {
        assert!(parse(&["--describe-snapshot"]).is_err());
        assert!(parse(&["--enable-pci"]).unwrap().enable_pci);
        assert!(parse(&["--enable-pc"]).is_err());
        assert!(parse(&["--id", "a_b"]).is_err());
        assert!(parse(&["--id", "a", "--id", "b"]).is_err());
        assert!(parse(&["--level", "loud"]).is_err());
        assert!(parse(&["stray"]).is_err());
    }

    #[test]
    fn help_names_every_option_with_its_default() {
        let help = parse(&["--help"]).unwrap_err();
        assert!(help.contains("--api-sock") && help.contains(DEFAULT_API_SOCKET));
        assert!(help.contains("--http-api-max-payload-size") && help.contains(&MAX_BODY.to_string()));
    }
}
