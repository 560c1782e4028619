//! `cargo xtask fuzz`: the targets of `vmm/src/fuzzing` under libFuzzer, with AddressSanitizer.
//!
//! One program (`vmm/fuzz`) has them all. It is built by the ordinary toolchain into a directory of its own, with the flags that
//! `cargo fuzz` passes; `RUSTC_BOOTSTRAP` lets a stable compiler take `-Zsanitizer`, whose runtime comes with it.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail, ensure};

pub const HELP: &str = "\
cargo xtask fuzz [OPTIONS] [TARGET …]

Runs fuzz targets (default: all) under libFuzzer and AddressSanitizer, beginning with the kept corpus. Needs a C++ compiler.

  --seconds N     how long each target runs (60)
  --jobs N        how many run at a time (number of processors)
  --seed N        libFuzzer's seed (the time; it is printed)
  --keep          afterwards add to vmm/fuzz/corpus what brings coverage that it doesn't have, and nothing else
  --replay FILE   run one target on one input and nothing else
  --build         only build the program
  --list          print the names of the targets

A finding is a panic, a memory error, an input that takes more than two minutes, or 2 GiB of memory. Its input is kept below
target/fuzz/findings; move it to vmm/fuzz/corpus/TARGET with the fix. What else was found new is in target/fuzz/corpus and is
where the next run begins.
";

const CORPUS: &str = "vmm/fuzz/corpus";
const MANIFEST: &str = "vmm/fuzz/Cargo.toml";
/// The longest that one input may take, by the clock: on a busy machine this process runs only when nothing else does.
const TIMEOUT_SECONDS: u64 = 120;
const MEMORY_MIB: u64 = 2048;
/// Longest input.
const MAX_INPUT: u64 = 64 << 10;
/// Lines of a target's log that are shown with a finding.
const LAST_LINES: usize = 40;

/// What `cargo fuzz` passes for coverage, checks and AddressSanitizer.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Cdebug-assertions",
    "-Zsanitizer=address",
    "--cfg=fuzzing",
];

#[derive(Debug, PartialEq, Eq)]
struct Options {
    seconds: u64,
    jobs: usize,
    seed: u32,
    keep: bool,
    only_build: bool,
    replay: Option<PathBuf>,
    targets: Vec<String>,
}

/// `cargo xtask fuzz`.
pub fn run(args: &[String]) -> anyhow::Result<()> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        print!("{HELP}");
        return Ok(());
    }
    let all = targets()?;
    if args.iter().any(|arg| arg == "--list") {
        println!("{}", all.join("\n"));
        return Ok(());
    }
    let options = parse(args, &all)?;
    let directory = directory();
    let program = build(&directory)?;
    if options.only_build {
        return Ok(());
    }
    if let Some(input) = &options.replay {
        return replay(&program, &options.targets, input);
    }
    println!(
        "{} targets, {} s each, {} at a time, seed {}",
        options.targets.len(),
        options.seconds,
        options.jobs,
        options.seed
    );
    let outcomes = run_all(&program, &directory, &options)?;
    let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.finding.is_some()).collect();
    for outcome in &failed {
        print!("\n{}", outcome.finding.as_deref().unwrap_or_default());
    }
    if options.keep {
        options.targets.iter().try_for_each(|target| keep(&program, &directory, target))?;
    }
    println!("{} passed, {} failed, 0 skipped", outcomes.len() - failed.len(), failed.len());
    ensure!(failed.is_empty(), "fuzzing found something");
    Ok(())
}

/// A run in the background that only takes what nothing else wants; its output goes to `log`.
pub fn in_background(log: &Path) -> anyhow::Result<Child> {
    let output = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let errors = output.try_clone().context("sharing the log")?;
    let this = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new("chrt");
    command.args(["--idle", "0"]).arg(this).arg("fuzz").stdin(Stdio::null()).stdout(output).stderr(errors);
    command.spawn().context("starting the fuzz targets (chrt is in util-linux)")
}

/// The targets that passed and failed, from the output of a run that has ended.
pub fn counts(log: &str) -> Option<(usize, usize)> {
    let (passed, rest) = log.trim_end().lines().rev().find_map(|line| line.split_once(" passed, "))?;
    Some((passed.parse().ok()?, rest.split_once(" failed")?.0.parse().ok()?))
}

/// Every target has a kept corpus, which a test of `vmm/src/fuzzing` checks.
fn targets() -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(CORPUS).with_context(|| format!("reading {CORPUS}"))?;
    let mut names: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn parse(args: &[String], all: &[String]) -> anyhow::Result<Options> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut options = Options {
        seconds: 60,
        jobs: thread::available_parallelism().map_or(1, usize::from),
        // Never 0, which libFuzzer takes for "choose one".
        seed: since_epoch.as_secs() as u32 | 1,
        keep: false,
        only_build: false,
        replay: None,
        targets: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            // libFuzzer takes 0 for "for ever".
            "--seconds" => options.seconds = number::<u64>(arg, value()?)?.max(1),
            "--jobs" => options.jobs = number::<usize>(arg, value()?)?.max(1),
            "--seed" => options.seed = number(arg, value()?)?,
            "--keep" => options.keep = true,
            "--build" => options.only_build = true,
            "--replay" => options.replay = Some(value()?.into()),
            name if all.iter().any(|target| target == name) => options.targets.push(name.to_owned()),
            other => bail!("{other} is neither an option nor a target ({}); see --help", all.join(", ")),
        }
    }
    if options.targets.is_empty() {
        options.targets = all.to_vec();
    }
    Ok(options)
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> anyhow::Result<T> {
    text.parse().ok().with_context(|| format!("{option} needs a number, not {text:?}"))
}

/// Where the build, new inputs, findings and logs go.
fn directory() -> PathBuf {
    crate::tests::target_directory().join("fuzz")
}

/// The program with all targets.
fn build(directory: &Path) -> anyhow::Result<PathBuf> {
    let version = Command::new("rustc").arg("-vV").output().context("running rustc")?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let triple =
        version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    // With a target, even if it is the host's, build scripts and macros are left as they are.
    let mut command = crate::cargo_command();
    command
        .args(["build", "--release", "--manifest-path", MANIFEST, "--target", triple, "--target-dir"])
        .arg(directory)
        .env("RUSTFLAGS", FLAGS.join(" "))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTC_BOOTSTRAP", "1");
    let status = command.status().context("running cargo")?;
    ensure!(status.success(), "the fuzz targets can't be built (libFuzzer needs a C++ compiler, g++ say)");
    Ok(directory.join(triple).join("release/target"))
}

/// The program with one target, its files below `directory`.
fn target_command(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("MOTE_FUZZ_TARGET", target)
        .arg(format!("-timeout={TIMEOUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .stdin(Stdio::null());
    command
}

fn replay(program: &Path, targets: &[String], input: &Path) -> anyhow::Result<()> {
    let [target] = targets else { bail!("--replay needs the name of one target") };
    let status = target_command(program, target).arg(input).status().context("running the target")?;
    ensure!(status.success(), "{} is a finding ({status})", input.display());
    println!("{target}: {} is no finding", input.display());
    Ok(())
}

struct Outcome {
    /// What to tell of it.
    finding: Option<String>,
}

/// Runs the targets, some at a time, and prints a line for each as it ends.
fn run_all(program: &Path, directory: &Path, options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let waiting = Mutex::new(options.targets.iter());
    let work = || -> anyhow::Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        loop {
            let next = waiting.lock().expect("nobody panics with it").next();
            let Some(target) = next else { return Ok(outcomes) };
            outcomes.push(run_one(program, directory, options, target)?);
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|worker| worker.join().expect("no panic"));
        done.collect::<anyhow::Result<Vec<_>>>().map(|outcomes| outcomes.into_iter().flatten().collect())
    })
}

fn run_one(program: &Path, directory: &Path, options: &Options, target: &str) -> anyhow::Result<Outcome> {
    let (new, findings) = (directory.join("corpus").join(target), directory.join("findings").join(target));
    for path in [&new, &findings] {
        fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
    }
    let log = directory.join(format!("{target}.log"));
    let output = fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let mut command = target_command(program, target);
    command
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-seed={}", options.seed))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .args(["-print_final_stats=1", "-reload=0"])
        // New inputs go into the first.
        .args([new.as_path(), &Path::new(CORPUS).join(target)])
        .stdout(output.try_clone().context("sharing the log")?)
        .stderr(output);
    let status = command.status().with_context(|| format!("running {}", program.display()))?;
    let text = fs::read(&log).with_context(|| format!("reading {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let result = if status.success() { "no finding" } else { "FINDING" };
    println!("{target:<9} {}: {result}", summary(&text));
    let finding = (!status.success()).then(|| described(target, &log, &text));
    Ok(Outcome { finding })
}

/// Executions, their rate and coverage, from libFuzzer's log.
fn summary(log: &str) -> String {
    let stat = |name: &str| {
        let value = log.lines().rev().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        value.map_or("?", |value| value.trim_start_matches(':').trim())
    };
    let covered = log.lines().rev().find_map(|line| line.split_once(" cov: ")?.1.split(' ').next());
    format!(
        "{:>9} executions, {:>6}/s, {:>5} edges, {:>4} new inputs, {:>4} MiB",
        stat("number_of_executed_units"),
        stat("average_exec_per_sec"),
        covered.unwrap_or("?"),
        stat("new_units_added"),
        stat("peak_rss_mb")
    )
}

fn described(target: &str, log: &Path, text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    let input =
        lines.iter().rev().find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path));
    let again = input.map_or_else(
        || "it left no input".to_owned(),
        |path| format!("input: {path}\nagain: cargo xtask fuzz --replay {path} {target}"),
    );
    format!("{target}: a finding (all of it: {})\n{last}\n{again}\n", log.display())
}

/// Adds to the kept corpus what brings coverage that it doesn't have.
fn keep(program: &Path, directory: &Path, target: &str) -> anyhow::Result<()> {
    let (kept, new) = (Path::new(CORPUS).join(target), directory.join("corpus").join(target));
    let files = |path: &Path| fs::read_dir(path).map_or(0, Iterator::count);
    let before = files(&kept);
    let output = target_command(program, target)
        .arg("-set_cover_merge=1")
        .args([kept.as_os_str(), new.as_os_str() as &OsStr])
        .output()
        .context("merging")?;
    ensure!(output.status.success(), "merging {target}: {}", String::from_utf8_lossy(&output.stderr));
    println!("{target:<9} {} inputs kept, {} of them new", files(&kept), files(&kept) - before);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> anyhow::Result<Options> {
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        parse(&args, &["block".to_owned(), "net".to_owned()])
    }

    #[test]
    fn all_targets_run_unless_some_are_named_and_what_is_unknown_is_refused() {
        let options = parsed(&[]).unwrap();
        assert_eq!((options.seconds, options.targets.len(), options.seed % 2), (60, 2, 1));
        let options = parsed(&["--seconds", "5", "--keep", "net"]).unwrap();
        assert_eq!((options.seconds, options.keep, options.targets), (5, true, vec!["net".to_owned()]));
        for (wrong, named) in
            [(&["disc"][..], "block, net"), (&["--seconds"], "value"), (&["--jobs", "x"], "\"x\"")]
        {
            let error = format!("{:#}", parsed(wrong).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_log_is_summed_up_and_a_finding_says_how_to_run_it_again() {
        let log = "#2\tINITED cov: 61 ft: 62\n#9\tDONE   cov: 70 ft: 99 corp: 3\nstat::number_of_executed_units: 9\n\
            stat::average_exec_per_sec:     4\nstat::new_units_added:          1\nstat::peak_rss_mb: 70\n";
        let summary = summary(log);
        assert_eq!(
            summary.split_whitespace().collect::<Vec<_>>().join(" "),
            "9 executions, 4/s, 70 edges, 1 new inputs, 70 MiB"
        );
        let crash = "panicked\nartifact_prefix='f/'; Test unit written to f/crash-1\nBase64: AA==\n";
        let finding = described("net", Path::new("net.log"), crash);
        assert!(finding.contains("again: cargo xtask fuzz --replay f/crash-1 net\n"), "{finding}");
    }

    #[test]
    fn the_last_line_says_how_many_passed() {
        assert_eq!(
            counts("x\nnet: no finding\n16 passed, 1 failed, 0 skipped\nxtask: found\n"),
            Some((16, 1))
        );
        assert_eq!(counts("error: no C++ compiler\n"), None);
    }
}
