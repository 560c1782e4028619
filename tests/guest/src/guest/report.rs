//! The machine-readable report: a line a test, and a closing line with the counts.

use core::fmt::Display;

use crate::println;

/// Counts results as they are printed.
#[derive(Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Prints the result of one test.
    pub fn result<E: Display>(&mut self, name: impl Display, result: Result<(), E>) {
        match result {
            Ok(()) => {
                println!("ok {name}");
                self.passed += 1;
            }
            Err(why) => {
                println!("FAIL {name}: {why}");
                self.failed += 1;
            }
        }
    }

    /// Prints the counts.
    pub fn finish(&self) {
        println!("mote-guest: {} passed, {} failed", self.passed, self.failed);
    }
}

/// `Err` with a formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(::alloc::format!($($why)+));
        }
    };
}
