//! One start, measured from outside, in the same way for every program.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};

/// What the guest prints.
const MARK: &[u8] = b"mote-guest: hello";
/// Most output of one start.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// How long after the guest's first line memory is read, so that what follows the start has settled.
const SETTLE: Duration = Duration::from_millis(20);

/// Times of one start.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// From just before the process is made to the guest's first serial byte on its stdout.
    pub first_byte: Duration,
    /// To the process having been reaped.
    pub exit: Duration,
    /// User and system time of the process and its threads.
    pub cpu: Duration,
}

/// Memory of one start while the guest waits, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Largest resident set so far (`VmHWM`).
    pub peak_resident: u64,
    /// `Private_Dirty` of `smaps_rollup`: what this process costs beyond what it shares.
    pub private_dirty: u64,
}

/// Starts the command and waits for its end.
pub fn times(command: &mut Command) -> Result<Times> {
    let cpu_before = cpu_of_children()?;
    let start = Instant::now();
    let mut child = spawn(command)?;
    let (output, arrivals) = read_to_end(&mut child)?;
    let status = child.wait().context("wait")?;
    let exit = start.elapsed();
    let mark = output.windows(MARK.len()).position(|window| window == MARK);
    let Some(mark) = mark.filter(|_| status.success()) else {
        bail!("{status}, output: {}", String::from_utf8_lossy(&output));
    };
    let arrival = arrivals.iter().find(|(end, _)| *end > mark).map_or(start, |(_, at)| *at);
    Ok(Times { first_byte: arrival - start, exit, cpu: cpu_of_children()?.saturating_sub(cpu_before) })
}

/// Starts the command, whose guest waits after its line, and reads its memory then.
pub fn memory(command: &mut Command) -> Result<Memory> {
    let mut child = spawn(command)?;
    let mut seen = Vec::new();
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    let mut byte = [0];
    while !seen.windows(MARK.len()).any(|window| window == MARK) {
        if seen.len() >= MAX_OUTPUT_BYTES || stdout.read(&mut byte).context("read output")? == 0 {
            let _ = child.kill();
            bail!("{}, output: {}", child.wait().context("wait")?, String::from_utf8_lossy(&seen));
        }
        seen.push(byte[0]);
    }
    thread::sleep(SETTLE);
    let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", child.id())).context("read /proc");
    let memory = read("status").and_then(|status| {
        let rollup = read("smaps_rollup")?;
        let missing = "the guest was over before its memory was read";
        Ok(Memory {
            peak_resident: field(&status, "VmHWM:").context(missing)?,
            private_dirty: field(&rollup, "Private_Dirty:").context(missing)?,
        })
    });
    std::io::copy(&mut stdout, &mut std::io::sink()).context("read output")?;
    child.wait().context("wait")?;
    memory
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().with_context(|| format!("start {}", command.get_program().display()))
}

/// For each piece of output where it ended and when it came.
type Arrivals = Vec<(usize, Instant)>;

fn read_to_end(child: &mut Child) -> Result<(Vec<u8>, Arrivals)> {
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    let (mut output, mut arrivals) = (Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    while output.len() < MAX_OUTPUT_BYTES {
        let count = stdout.read(&mut buffer).context("read output")?;
        if count == 0 {
            break;
        }
        output.extend_from_slice(&buffer[..count]);
        arrivals.push((output.len(), Instant::now()));
    }
    Ok((output, arrivals))
}

/// Children are started one at a time, so that the difference around one is its own.
fn cpu_of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    let micros =
        [usage.user_time(), usage.system_time()].map(|time| time.tv_sec() * 1_000_000 + time.tv_usec());
    Ok(Duration::from_micros(micros.iter().sum::<i64>().unsigned_abs()))
}

/// The number of a line `name   N kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "Private_Clean:  8 kB\nPrivate_Dirty:        368 kB\n";
        assert_eq!(field(text, "Private_Dirty:"), Some(368));
        assert_eq!(field(text, "Dirty:"), None);
    }

    #[test]
    fn the_first_byte_is_that_of_the_mark() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo noise; sleep 0.05; printf 'mote-guest: hello\\n'; sleep 0.05"]);
        let times = times(&mut command).expect("a shell");
        assert!(times.first_byte >= Duration::from_millis(50), "{times:?}");
        assert!(times.exit >= times.first_byte + Duration::from_millis(50), "{times:?}");
    }

    #[test]
    fn output_without_the_mark_is_an_error() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo noise"]);
        assert!(times(&mut command).is_err());
        assert!(memory(&mut command).is_err());
    }
}
