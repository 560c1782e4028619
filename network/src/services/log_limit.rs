//! Keeps what guests provoke from filling the log.

use std::time::{Duration, Instant};

use tracing::warn;

use crate::names::NetworkKey;

/// One line per [`LogLimit::INTERVAL`]; the others are counted.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// Shortest time between two lines.
    pub const INTERVAL: Duration = Duration::from_secs(10);

    /// Whether a line may be written now, and if so how many were left out since the last one.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < Self::INTERVAL) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }

    /// Warns of what happened to a service of a network, if a line may be written now.
    pub fn warn(&mut self, network: NetworkKey, service: &str, text: &str) {
        if let Some(suppressed) = self.admit(Instant::now()) {
            warn!(%network, suppressed, "{service}: {text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        assert_eq!(limit.admit(start), Some(0));
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start + LogLimit::INTERVAL - Duration::from_millis(1)), None);
        assert_eq!(limit.admit(start + LogLimit::INTERVAL), Some(2));
        assert_eq!(limit.admit(start + 2 * LogLimit::INTERVAL), Some(0));
    }
}
