//! Runs all tests and closes with one line that counts what passed, failed and was skipped. A test that can't run where it
//! is prints `SKIPPED: reason` and returns; it counts as skipped, never as passed.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Stdio};

use anyhow::{Context as _, bail};

/// What a test prints when it can't run here.
const SKIPPED: &str = "SKIPPED: ";

/// `cargo xtask test`.
pub fn run(args: &[String]) -> anyhow::Result<()> {
    let (fuzz, args): (Vec<_>, Vec<_>) =
        args.iter().filter(|arg| *arg != "--").cloned().partition(|arg| arg == "--fuzz");
    let log = target_directory().join("fuzz.log");
    let fuzzing = if fuzz.is_empty() { None } else { Some(crate::fuzz::in_background(&log)?) };
    let nextest = crate::cargo_command()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let mut counts =
        if nextest.is_ok_and(|s| s.success()) { with_nextest(&args)? } else { with_cargo_test(&args)? };
    if let Some(mut fuzzing) = fuzzing {
        println!("waiting for the fuzz targets (log: {})", log.display());
        let status = fuzzing.wait().context("waiting for the fuzz targets")?;
        counts.add_fuzzing(&fs::read_to_string(&log).unwrap_or_default(), status.success());
    }
    for (reason, count) in &counts.skipped {
        println!("skipped ({count}): {reason}");
    }
    let skipped: usize = counts.skipped.values().sum();
    println!("{} passed, {} failed, {skipped} skipped", counts.passed, counts.failed);
    if counts.failed > 0 || !counts.succeeded {
        bail!("tests failed");
    }
    Ok(())
}

struct Counts {
    passed: usize,
    failed: usize,
    skipped: BTreeMap<String, usize>,
    succeeded: bool,
}

impl Counts {
    /// Each fuzz target is a test.
    fn add_fuzzing(&mut self, log: &str, succeeded: bool) {
        print!("{log}");
        let (passed, failed) = crate::fuzz::counts(log).unwrap_or((0, 1));
        self.passed += passed;
        self.failed += failed;
        self.succeeded &= succeeded;
    }
}

/// Cargo's.
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

fn with_nextest(args: &[String]) -> anyhow::Result<Counts> {
    let mut command = crate::cargo_command();
    command.args(["nextest", "run", "--release", "--workspace", "--no-fail-fast", "--profile", "ci"]);
    let status = command.args(args).status().context("running nextest")?;
    let path = target_directory().join("nextest/ci/junit.xml");
    let report = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(count_junit(&report, status.success()))
}

/// Counts in nextest's JUnit report; output of tests that passed is stored there.
fn count_junit(report: &str, succeeded: bool) -> Counts {
    let mut counts = Counts { passed: 0, failed: 0, skipped: BTreeMap::new(), succeeded };
    for case in report.split("<testcase ").skip(1) {
        if case.contains("<failure") || case.contains("<error") {
            counts.failed += 1;
        } else if let Some(reason) = skipped(case) {
            *counts.skipped.entry(reason).or_default() += 1;
        } else {
            counts.passed += 1;
        }
    }
    counts
}

/// Without nextest: cargo's own runner, with the output of every test shown.
fn with_cargo_test(args: &[String]) -> anyhow::Result<Counts> {
    let output = crate::cargo_command()
        .args(["test", "--release", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests", "--"])
        .args(["--test-threads=2", "--show-output"])
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    Ok(count_cargo(&text, output.status.success()))
}

fn count_cargo(text: &str, succeeded: bool) -> Counts {
    let mut counts = Counts { passed: 0, failed: 0, skipped: BTreeMap::new(), succeeded };
    for line in text.lines() {
        if line.starts_with("test ") && line.ends_with("... ok") {
            counts.passed += 1;
        } else if line.starts_with("test ") && line.ends_with("... FAILED") {
            counts.failed += 1;
        } else if let Some(reason) = skipped(line) {
            counts.passed = counts.passed.saturating_sub(1);
            *counts.skipped.entry(reason).or_default() += 1;
        }
    }
    counts
}

/// The reason for which a test was skipped, from its output.
fn skipped(output: &str) -> Option<String> {
    let reason = output.lines().find_map(|l| l.split_once(SKIPPED))?.1;
    Some(reason.split("</").next().unwrap_or(reason).to_owned())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_skipped_test_is_counted_as_skipped_with_either_runner() {
        let junit = r#"<testsuite><testcase name="a"></testcase><testcase name="b"><system-err>SKIPPED: needs root
</system-err></testcase><testcase name="c"><failure>no</failure></testcase></testsuite>"#;
        let text = "test a ... ok\ntest b ... ok\nSKIPPED: needs root\ntest c ... FAILED\n";
        for counts in [count_junit(junit, false), count_cargo(text, false)] {
            assert_eq!((counts.passed, counts.failed), (1, 1));
            assert_eq!(counts.skipped, [("needs root".to_owned(), 1)].into());
        }
    }
}
