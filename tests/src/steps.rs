//! Steps that are printed with their times.

use std::time::Instant;

/// Prints each step when it is done, with how long it took.
pub struct Steps {
    started: Instant,
    last: Instant,
}

impl Steps {
    /// Starts the clock.
    #[expect(clippy::new_without_default, reason = "the clock starts here")]
    pub fn new() -> Self {
        Self { started: Instant::now(), last: Instant::now() }
    }

    /// A step is done: what was found.
    pub fn done(&mut self, what: impl AsRef<str>) {
        println!("  {:>8.3} s  {}", self.last.elapsed().as_secs_f64(), what.as_ref());
        self.last = Instant::now();
    }

    /// Seconds since the start.
    pub fn total_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}
