//! How long a worker looks for work by itself before it goes to sleep.
//!
//! A wake-up costs a notification by the driver (an exit of its vCPU) and a way through the host's scheduler, together
//! more than serving a frame or a small request. So a worker whose sleeps turn out short looks a little longer the next
//! time, and one whose sleeps are long goes to sleep at once: an idle device costs nothing.
//!
//! Sleeps are also short where looking can't help: when the vCPU that would give the work waits for the very processor
//! that the worker looks on. So what counts in the end is whether something was found. Each time that even the longest
//! window was in vain, twice as many sleeps pass until the next attempt.

use std::time::Duration;

/// The first window after a short sleep.
const FIRST: Duration = Duration::from_micros(10);
/// The longest window; also the longest sleep that counts as short.
pub const LONGEST: Duration = Duration::from_micros(100);

/// Attempts in vain that still lengthen the pause: 2^10 sleeps.
const MAX_MISSES: u32 = 10;

/// The time to look for work before sleeping.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PollWindow {
    window: Duration,
    /// Attempts in vain since something was found.
    misses: u32,
    /// Short sleeps until the next attempt.
    pause: u32,
}

impl PollWindow {
    /// How long to look now; zero is not at all.
    pub const fn get(self) -> Duration {
        self.window
    }

    /// Work was found while looking.
    pub const fn found(&mut self) {
        self.misses = 0;
    }

    /// The worker looked for work (or not, for a window of zero), found none and slept this long.
    pub fn slept(&mut self, slept: Duration) {
        if slept > LONGEST {
            self.window = Duration::ZERO;
        } else if self.window >= LONGEST {
            self.disturbed();
        } else if self.window.is_zero() && self.pause > 0 {
            self.pause -= 1;
        } else {
            self.window = (2 * self.window).clamp(FIRST, LONGEST);
        }
    }

    /// Looking was in vain or worse: others wanted the processor meanwhile.
    pub fn disturbed(&mut self) {
        self.window = Duration::ZERO;
        self.misses = (self.misses + 1).min(MAX_MISSES);
        self.pause = 1 << self.misses;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of short sleeps without looking before the next attempt, and the windows of that attempt.
    fn attempt(window: &mut PollWindow) -> (u32, Vec<Duration>) {
        let (mut sleeps, mut windows) = (0, Vec::new());
        while window.get().is_zero() {
            window.slept(Duration::from_micros(1));
            sleeps += 1;
        }
        while !window.get().is_zero() {
            windows.push(window.get());
            window.slept(LONGEST);
        }
        (sleeps, windows)
    }

    #[test]
    fn short_sleeps_widen_the_window_up_to_its_limit() {
        let mut window = PollWindow::default();
        assert_eq!(window.get(), Duration::ZERO);
        let (sleeps, windows) = attempt(&mut window);
        assert_eq!(sleeps, 1);
        assert!(
            windows.is_sorted() && windows[0] == FIRST && windows.last() == Some(&LONGEST),
            "{windows:?}"
        );
    }

    #[test]
    fn a_long_sleep_ends_looking() {
        let mut window = PollWindow::default();
        window.slept(Duration::ZERO);
        assert_eq!(window.get(), FIRST);
        window.slept(LONGEST + Duration::from_nanos(1));
        assert_eq!(window.get(), Duration::ZERO);
    }

    #[test]
    fn attempts_in_vain_become_rare_until_one_succeeds() {
        let mut window = PollWindow::default();
        let pauses: Vec<u32> = (0..14).map(|_| attempt(&mut window).0).collect();
        assert_eq!(pauses[..4], [1, 3, 5, 9]);
        assert_eq!(pauses[11..], [1025; 3]);
        window.found();
        attempt(&mut window);
        assert_eq!(attempt(&mut window).0, 3);
        window.slept(Duration::ZERO);
        window.disturbed();
        assert_eq!(window.get(), Duration::ZERO);
    }
}
