//! A monitor that runs the guest.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use mote_vmm_api::{ExitReport, VmConfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{Monitor, Report};

/// Most output that is kept; what comes later is dropped.
const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// How often a monitor that should end is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Why a run did not come to an end of its own.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file or the process could not be made.
    #[error("starting {program}: {step}")]
    Start {
        /// The monitor.
        program: String,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The monitor was killed after its time.
    #[error("no end after {timeout:?}; the output was:\n{output}")]
    Timeout {
        /// How long it had.
        timeout: Duration,
        /// Serial output and log so far.
        output: String,
    },
    /// The monitor ended or its time was over before a line came.
    #[error("no line with {wanted:?} within {timeout:?}; the output was:\n{output}")]
    NoLine {
        /// What the line should have contained.
        wanted: String,
        /// How long it had.
        timeout: Duration,
        /// Serial output and log so far.
        output: String,
    },
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; absent if a signal ended it.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Serial output.
    pub output: String,
    /// The monitor's stderr.
    pub log: String,
    /// What mote-vmm wrote to its `--exit-report`.
    pub exit: Option<ExitReport>,
}

impl Outcome {
    /// The guest's report.
    pub fn report(&self) -> Report {
        Report::parse(&self.output)
    }
}

/// A monitor with its guest; killed when dropped.
pub struct Running {
    child: Child,
    events: Receiver<Event>,
    output: Vec<u8>,
    log: Vec<u8>,
    open: usize,
    directory: TempDir,
}

enum Event {
    Output(Vec<u8>),
    Log(Vec<u8>),
    Closed,
}

impl Running {
    /// Starts the monitor, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`RunError::Start`].
    pub fn start(monitor: &Monitor, config: &VmConfig) -> Result<Self, RunError> {
        let program = monitor.program();
        let failed = |step| failed(program, step);
        let directory = tempfile::tempdir().map_err(failed("directory"))?;
        let file = directory.path().join("vm.json");
        let json =
            serde_json::to_vec_pretty(config).map_err(io::Error::other).map_err(failed("configuration"))?;
        fs::write(&file, json).map_err(failed("configuration file"))?;
        let mut arguments = monitor.arguments(&file);
        if !matches!(monitor, Monitor::Firecracker(_)) {
            arguments.extend(["--exit-report".into(), directory.path().join("exit.json").into()]);
        }
        Self::spawn(program, &arguments, directory)
    }

    /// Starts a monitor with these arguments, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`RunError::Start`].
    pub fn start_program(program: &Path, arguments: &[OsString]) -> Result<Self, RunError> {
        Self::spawn(program, arguments, tempfile::tempdir().map_err(failed(program, "directory"))?)
    }

    fn spawn(program: &Path, arguments: &[OsString], directory: TempDir) -> Result<Self, RunError> {
        let mut command = Command::new(program);
        command.args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed(program, "process"))?;
        let (sender, events) = mpsc::channel();
        let mut open = 0;
        if let Some(stdout) = child.stdout.take() {
            pump(stdout, sender.clone(), Event::Output);
            open += 1;
        }
        if let Some(stderr) = child.stderr.take() {
            pump(stderr, sender, Event::Log);
            open += 1;
        }
        Ok(Self { child, events, output: Vec::new(), log: Vec::new(), open, directory })
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of serial output that contains `wanted` and returns it.
    ///
    /// # Errors
    /// [`RunError::NoLine`].
    pub fn wait_for_line(&mut self, wanted: &str, timeout: Duration) -> Result<String, RunError> {
        let end = Instant::now() + timeout;
        loop {
            let text = String::from_utf8_lossy(&self.output);
            let whole = text.rfind('\n').map_or("", |last| &text[..last]);
            if let Some(line) = whole.lines().find(|line| line.contains(wanted)) {
                return Ok(line.trim_end().into());
            }
            if self.open == 0 || !self.take_event(end) {
                return Err(RunError::NoLine { wanted: wanted.into(), timeout, output: self.so_far() });
            }
        }
    }

    /// Asks the monitor to end with SIGTERM.
    pub fn terminate(&self) {
        // The child is not reaped before `finish`, so the id is still its own.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`RunError::Timeout`].
    pub fn finish(mut self, timeout: Duration) -> Result<Outcome, RunError> {
        let end = Instant::now() + timeout;
        while self.open > 0 && self.take_event(end) {}
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                _ if Instant::now() >= end => {
                    return Err(RunError::Timeout { timeout, output: self.so_far() });
                }
                _ => thread::sleep(POLL),
            }
        };
        let exit = fs::read(self.directory.path().join("exit.json")).ok();
        Ok(Outcome {
            code: status.code(),
            signal: status.signal(),
            output: String::from_utf8_lossy(&self.output).into_owned(),
            log: String::from_utf8_lossy(&self.log).into_owned(),
            exit: exit.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
        })
    }

    /// Takes what comes next; `false` if nothing came in time.
    fn take_event(&mut self, end: Instant) -> bool {
        let remaining = end.saturating_duration_since(Instant::now());
        let (kept, bytes) = match self.events.recv_timeout(remaining) {
            Ok(Event::Output(bytes)) => (&mut self.output, bytes),
            Ok(Event::Log(bytes)) => (&mut self.log, bytes),
            Ok(Event::Closed) => {
                self.open -= 1;
                return true;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return false,
        };
        let room = MAX_OUTPUT_BYTES.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        true
    }

    fn so_far(&self) -> String {
        format!("{}{}", String::from_utf8_lossy(&self.output), String::from_utf8_lossy(&self.log))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After `finish` both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(program: &Path, step: &'static str) -> impl FnOnce(io::Error) -> RunError + use<> {
    let program = program.display().to_string();
    move |source| RunError::Start { program, step, source }
}

fn pump(mut from: impl Read + Send + 'static, to: mpsc::Sender<Event>, kind: fn(Vec<u8>) -> Event) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.send(kind(buffer[..count].to_vec())).is_err() {
                return;
            }
        }
        let _ = to.send(Event::Closed);
    });
}
