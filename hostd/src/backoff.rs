//! Growing pauses between tries.

use std::time::Duration;

/// Pauses that double from `first` to `most`; [`Backoff::next_pause`] takes off up to a quarter at random, so that many
/// hosts that lost one controller do not come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    tries: u32,
}

impl Backoff {
    /// A fresh one.
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, tries: 0 }
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.tries = 0;
    }

    /// How many pauses were taken since the last success.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        let pause = doubled(self.first, self.tries, self.most);
        self.tries = self.tries.saturating_add(1);
        // Without randomness (no getrandom) the pause is merely not spread.
        let spread = getrandom::u32().unwrap_or(0) % 256;
        pause - pause * spread / 1024
    }
}

/// `first · 2^times`, at most `most`.
pub fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    first.checked_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).unwrap_or(most).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_bound_and_never_pass_it() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let first = backoff.next_pause();
        assert!(first <= Duration::from_millis(100) && first >= Duration::from_millis(75));
        for _ in 0..100 {
            assert!(backoff.next_pause() <= Duration::from_secs(5));
        }
        assert!(backoff.next_pause() >= Duration::from_millis(3750));
        backoff.reset();
        assert!(backoff.next_pause() <= Duration::from_millis(100));
    }
}
