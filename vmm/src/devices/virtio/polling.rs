//! How long a worker looks for work by itself before it goes to sleep.
//!
//! A wake-up costs a notification by the driver (an exit of its vCPU) and a way through the host's scheduler, together
//! more than serving a frame or a small request. So a worker whose sleeps turn out short stays awake a little longer the
//! next time, and one whose sleeps are long goes to sleep at once: an idle device costs nothing.

use std::time::Duration;

/// The first window after a short sleep.
const FIRST: Duration = Duration::from_micros(10);
/// The longest window; also the longest sleep that counts as short.
pub const LONGEST: Duration = Duration::from_micros(100);

/// The time to look for work before sleeping.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PollWindow {
    window: Duration,
}

impl PollWindow {
    /// How long to look now; zero is not at all.
    pub const fn get(self) -> Duration {
        self.window
    }

    /// The worker looked for work, found none and slept this long.
    pub fn slept(&mut self, slept: Duration) {
        self.window = if slept <= LONGEST { (2 * self.window).clamp(FIRST, LONGEST) } else { Duration::ZERO };
    }

    /// Others wanted the processor while the worker looked for work.
    pub const fn disturbed(&mut self) {
        self.window = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_widen_the_window_up_to_its_limit() {
        let mut window = PollWindow::default();
        assert_eq!(window.get(), Duration::ZERO);
        window.slept(LONGEST);
        assert_eq!(window.get(), FIRST);
        for _ in 0..10 {
            window.slept(Duration::from_micros(1));
        }
        assert_eq!(window.get(), LONGEST);
    }

    #[test]
    fn a_long_sleep_or_a_busy_host_ends_polling() {
        let mut window = PollWindow::default();
        window.slept(Duration::ZERO);
        window.slept(LONGEST + Duration::from_nanos(1));
        assert_eq!(window.get(), Duration::ZERO);
        window.slept(Duration::ZERO);
        window.disturbed();
        assert_eq!(window.get(), Duration::ZERO);
    }
}
