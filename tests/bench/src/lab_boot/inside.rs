//! The side inside the lab: starts each program in turn and tells what it took.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::plan::{DRIVE_READ, PROFILE, Plan, RESULT, Start, Subject, USER_SPACE};

/// Most output of a guest that is read.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// Longest wait for the API, in the lab's time.
const TIMEOUT: Duration = Duration::from_secs(120);
/// KVM's counters: a directory for each VM.
const COUNTERS: &str = "/sys/kernel/debug/kvm";
const TRACING: &str = "/sys/kernel/tracing/events/kvm";
/// Trace events and what of them is counted.
const EVENTS: [(&str, &str); 5] = [
    ("kvm_exit", "exit_reason"),
    ("kvm_userspace_exit", "reason"),
    ("kvm_pio", "port,rw"),
    ("kvm_mmio", "gpa,type"),
    ("kvm_msr", "ecx,write"),
];

/// Carries out the plan in this file.
pub fn run(plan: &Path) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&fs::read(plan).context("reading the plan")?)?;
    for round in 0..=plan.rounds {
        for subject in &plan.subjects {
            let counts = round > 0;
            let profile = plan.profile && counts;
            if profile {
                trace(true)?;
            }
            let start = start(subject, &plan).with_context(|| subject.name.clone())?;
            if profile {
                print_profile(&subject.name)?;
                trace(false)?;
            }
            if counts {
                println!("{RESULT}{}", serde_json::to_string(&start)?);
            }
        }
    }
    Ok(())
}

fn start(subject: &Subject, plan: &Plan) -> Result<Start> {
    let directory = tempfile::tempdir_in("/run").context("a directory")?;
    let (socket, errors) = (directory.path().join("api"), directory.path().join("errors"));
    let begin = Instant::now();
    let mut child = Command::new(&subject.program)
        .arg("--api-sock")
        .arg(&socket)
        .args(&subject.arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&errors).context("a file for errors")?)
        .spawn()
        .context("starting it")?;
    let measured = measure(&mut child, &socket, plan, begin);
    let counters = counters(child.id());
    child.kill().context("ending it")?;
    child.wait().context("waiting for it")?;
    let [whole_ms, user_space_ms, drive_read_ms] =
        measured.with_context(|| fs::read_to_string(&errors).unwrap_or_default())?;
    Ok(Start { subject: subject.name.clone(), whole_ms, user_space_ms, drive_read_ms, counters })
}

fn measure(child: &mut Child, socket: &Path, plan: &Plan, begin: Instant) -> Result<[f64; 3]> {
    let mut output = Output { from: child.stdout.take().context("its output")?, seen: Vec::new() };
    for (path, body) in &plan.requests {
        put(socket, path, &body.to_string())?;
    }
    let started = Instant::now();
    put(socket, "/actions", r#"{"action_type": "InstanceStart"}"#)?;
    output.wait_for(USER_SPACE)?;
    let user_space = Instant::now();
    output.wait_for(DRIVE_READ)?;
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    Ok([ms(begin, user_space), ms(started, user_space), ms(started, Instant::now())])
}

/// Firecracker leaves the connection open after its answer.
fn put(socket: &Path, path: &str, body: &str) -> Result<()> {
    let mut stream = connect(socket).context("the API socket")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let length = body.len();
    write!(
        stream,
        "PUT {path} HTTP/1.1\r\nHost: vmm\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let (mut answer, mut buffer) = (String::new(), [0; 4096]);
    while !answer.contains("\r\n\r\n") {
        let count = stream.read(&mut buffer).with_context(|| format!("PUT {path}"))?;
        ensure!(count > 0, "PUT {path}: no answer");
        answer.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    ensure!(answer.starts_with("HTTP/1.1 204"), "PUT {path} {body}: {answer}");
    Ok(())
}

fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    let end = Instant::now() + TIMEOUT;
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            result => return result,
        }
    }
}

struct Output {
    from: ChildStdout,
    seen: Vec<u8>,
}

impl Output {
    fn wait_for(&mut self, mark: &str) -> Result<()> {
        let mut buffer = [0; 4096];
        while !self.seen.windows(mark.len()).any(|window| window == mark.as_bytes()) {
            let count = self.from.read(&mut buffer).context("reading its output")?;
            self.seen.extend_from_slice(&buffer[..count]);
            if count == 0 || self.seen.len() > MAX_OUTPUT_BYTES {
                bail!("no {mark:?} in {:?}", String::from_utf8_lossy(&self.seen));
            }
        }
        Ok(())
    }
}

/// KVM's counters of the VM that this process has made.
fn counters(process: u32) -> BTreeMap<String, u64> {
    let prefix = format!("{process}-");
    let all = fs::read_dir(COUNTERS).into_iter().flatten().flatten();
    let of_vm = all.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let files = of_vm.filter_map(|entry| fs::read_dir(entry.path()).ok()).flatten().flatten();
    let counter = |file: fs::DirEntry| {
        let value = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
        Some((file.file_name().to_string_lossy().into_owned(), value))
    };
    files.filter_map(counter).filter(|(_, value)| *value > 0).collect()
}

/// Counts trace events from now on, or no longer.
fn trace(on: bool) -> Result<()> {
    for (event, keys) in EVENTS {
        let remove = if on { "" } else { "!" };
        let trigger = format!("{remove}hist:keys={keys}:sort=hitcount.descending\n");
        let file = format!("{TRACING}/{event}/trigger");
        fs::write(&file, trigger).with_context(|| format!("writing {file}"))?;
    }
    Ok(())
}

fn print_profile(name: &str) -> Result<()> {
    for (event, _) in EVENTS {
        let counted =
            fs::read_to_string(format!("{TRACING}/{event}/hist")).context("reading counted events")?;
        for line in counted.lines().filter(|line| line.starts_with('{')) {
            println!("{PROFILE}{name} {event} {line}");
        }
    }
    Ok(())
}
