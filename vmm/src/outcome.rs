//! Why the process is going to end: decided once, by whoever comes first.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use mote_vmm_api::{ExitReason, ExitReport};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The end of the machine, shared by the vCPUs, the devices that can end it, and the main loop that carries it out.
#[derive(Debug)]
pub struct Outcome {
    report: Mutex<Option<ExitReport>>,
    ending: AtomicBool,
    event: EventFd,
}

impl Outcome {
    /// Nothing decided yet.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { report: Mutex::new(None), ending: AtomicBool::new(false), event })
    }

    /// Decides the end, unless it is decided already, and wakes the main loop.
    pub fn decide(&self, reason: ExitReason, message: impl Into<String>) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        if report.is_none() {
            *report = Some(ExitReport { reason, message: message.into() });
            self.ending.store(true, Ordering::Release);
            // Cannot fail: the counter goes from 0 to 1.
            let _ = self.event.write(1);
        }
    }

    /// True once the end is decided: vCPUs look at it after each exit.
    pub fn ending(&self) -> &AtomicBool {
        &self.ending
    }

    /// The decision.
    pub fn report(&self) -> Option<ExitReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl AsRawFd for Outcome {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decision_stays() {
        let outcome = Outcome::new().unwrap();
        assert!(!outcome.ending().load(Ordering::Relaxed));
        outcome.decide(ExitReason::PowerOff, "off");
        outcome.decide(ExitReason::Crash, "crash");
        assert_eq!(outcome.report().unwrap().reason, ExitReason::PowerOff);
        assert_eq!(outcome.event.read().unwrap(), 1);
    }
}
