//! What the guest prints.

/// The guest's report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Names of the tests that passed.
    pub passed: Vec<String>,
    /// Names and reasons of those that failed.
    pub failed: Vec<(String, String)>,
    /// The closing line's counts: passed, failed. Absent if the guest did not come to its end.
    pub closing: Option<(usize, usize)>,
}

/// Why a report is not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    /// No closing line.
    #[error("the guest did not come to its end after {0} tests")]
    Unfinished(usize),
    /// Lines were lost or doubled on the way.
    #[error("{lines:?} tests passed and failed, the guest says {closing:?}")]
    Miscounted {
        /// Lines read.
        lines: (usize, usize),
        /// The closing line.
        closing: (usize, usize),
    },
    /// Tests failed, one to a line.
    #[error("{}", .0.join("\n"))]
    Failed(Vec<String>),
    /// Nothing was tested.
    #[error("no test ran")]
    Empty,
}

impl Report {
    /// Reads serial output. Lines of another kind are passed over.
    pub fn parse(output: &str) -> Self {
        let mut report = Self::default();
        for line in output.lines().map(str::trim_end) {
            if let Some(name) = line.strip_prefix("ok ") {
                report.passed.push(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("FAIL ") {
                let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
                report.failed.push((name.to_owned(), why.to_owned()));
            } else if let Some(counts) = line.strip_prefix("mote-guest: ").and_then(closing) {
                report.closing = Some(counts);
            }
        }
        report
    }

    /// `Ok` if the guest came to its end, at least one test ran, none failed and no line is missing.
    ///
    /// # Errors
    /// See [`Verdict`].
    pub fn verdict(&self) -> Result<(), Verdict> {
        if !self.failed.is_empty() {
            return Err(Verdict::Failed(
                self.failed.iter().map(|(name, why)| format!("{name}: {why}")).collect(),
            ));
        }
        let lines = (self.passed.len(), self.failed.len());
        match self.closing {
            None => Err(Verdict::Unfinished(lines.0)),
            Some(closing) if closing != lines => Err(Verdict::Miscounted { lines, closing }),
            Some((0, 0)) => Err(Verdict::Empty),
            Some(_) => Ok(()),
        }
    }
}

fn closing(text: &str) -> Option<(usize, usize)> {
    let (passed, failed) = text.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_report_is_good() {
        let report = Report::parse("noise\nok a\r\nok b-c\r\nmote-guest: 2 passed, 0 failed\r\n");
        assert_eq!(report.passed, ["a", "b-c"]);
        assert_eq!(report.verdict(), Ok(()));
    }

    #[test]
    fn a_failure_names_its_reason() {
        let report = Report::parse("ok a\nFAIL b: x: y\nmote-guest: 1 passed, 1 failed\n");
        assert_eq!(report.verdict(), Err(Verdict::Failed(["b: x: y".into()].into())));
    }

    #[test]
    fn an_end_that_is_missing_empty_or_wrong_is_told() {
        assert_eq!(Report::parse("ok a\n").verdict(), Err(Verdict::Unfinished(1)));
        assert_eq!(Report::parse("mote-guest: 0 passed, 0 failed\n").verdict(), Err(Verdict::Empty));
        let lost = Report::parse("ok a\nmote-guest: 2 passed, 0 failed\n").verdict();
        assert_eq!(lost, Err(Verdict::Miscounted { lines: (1, 0), closing: (2, 0) }));
    }
}
