//! Token buckets: how many bytes and operations a device may serve.
//!
//! A bucket of `size` tokens fills evenly, in `refill_time` from empty to full, and beside it there is a burst that is
//! spent first and never comes back. A request passes when its tokens are there. One that is larger than the bucket
//! passes when the bucket is full and leaves it in debt, so that every request passes in the end and none passes for
//! less than its price: over any time, what passed is at most `burst + size + rate × time` and one request.
//!
//! Time is an argument: nothing here looks at a clock. Fractions of tokens are exact.

use std::time::{Duration, Instant};

use mote_vmm_api as api;

/// One bucket.
#[derive(Debug, Clone)]
struct TokenBucket {
    /// Tokens that it holds when full.
    size: i128,
    /// Nanoseconds from empty to full. With `size` it fits 127 bits when multiplied.
    refill_nanos: i128,
    /// What it holds, in `1 / refill_nanos` of a token, so that each nanosecond adds `size`. Negative in debt.
    level: i128,
    /// Tokens that are spent first.
    burst: u64,
    /// Up to when `level` is right.
    filled_at: Instant,
}

impl TokenBucket {
    /// A full bucket; None is no limit.
    fn new(config: &api::TokenBucket, now: Instant) -> Option<Self> {
        const NANOS_PER_MILLI: u64 = 1_000_000;
        if config.size == 0 || config.refill_time == 0 {
            return None;
        }
        // 292 years are as good as never.
        let refill_nanos =
            i64::try_from(config.refill_time.saturating_mul(NANOS_PER_MILLI)).unwrap_or(i64::MAX);
        let (size, refill_nanos) = (i128::from(config.size), i128::from(refill_nanos));
        let burst = config.one_time_burst.unwrap_or(0);
        Some(Self { size, refill_nanos, level: size * refill_nanos, burst, filled_at: now })
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_nanos();
        let elapsed = i128::from(i64::try_from(elapsed).unwrap_or(i64::MAX));
        self.filled_at = self.filled_at.max(now);
        let full = self.size * self.refill_nanos;
        self.level = self.level.saturating_add(elapsed * self.size).min(full);
    }

    /// How long until `tokens` may pass.
    fn wait(&self, tokens: u64) -> Duration {
        let beyond_burst = i128::from(tokens.saturating_sub(self.burst));
        let needed = beyond_burst.min(self.size) * self.refill_nanos;
        if beyond_burst == 0 || self.level >= needed {
            return Duration::ZERO;
        }
        let missing = needed.saturating_sub(self.level);
        let nanos = missing / self.size + i128::from(missing % self.size != 0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let cost = i128::from(tokens - from_burst) * self.refill_nanos;
        self.level = self.level.saturating_sub(cost);
    }
}

/// The limits of one device or direction, over bytes and operations.
#[derive(Debug, Clone, Default)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// With full buckets; no configuration is no limit.
    pub fn new(config: Option<&api::RateLimiter>, now: Instant) -> Self {
        let bucket =
            |config: Option<&api::TokenBucket>| config.and_then(|config| TokenBucket::new(config, now));
        Self {
            bandwidth: bucket(config.and_then(|config| config.bandwidth.as_ref())),
            ops: bucket(config.and_then(|config| config.ops.as_ref())),
        }
    }

    /// Whether nothing is limited, so that a device need not ask.
    pub const fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }

    /// Replaces the buckets that `config` has by new, full ones (or by no limit, for a size or time of 0), and leaves
    /// the others alone, as Firecracker's PATCH does.
    pub fn update(&mut self, config: &api::RateLimiter, now: Instant) {
        if let Some(bandwidth) = &config.bandwidth {
            self.bandwidth = TokenBucket::new(bandwidth, now);
        }
        if let Some(ops) = &config.ops {
            self.ops = TokenBucket::new(ops, now);
        }
    }

    /// How long until so many bytes and operations may pass; zero if they may now. Takes nothing.
    pub fn wait(&mut self, bytes: u64, ops: u64, now: Instant) -> Duration {
        let wait = |bucket: &mut Option<TokenBucket>, tokens| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| {
                bucket.fill(now);
                bucket.wait(tokens)
            })
        };
        wait(&mut self.bandwidth, bytes).max(wait(&mut self.ops, ops))
    }

    /// Takes so many bytes and operations, into debt if they aren't there: for what has already happened. Otherwise ask
    /// [`RateLimiter::consume`].
    pub fn take(&mut self, bytes: u64, ops: u64, now: Instant) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                bucket.take(tokens);
            }
        }
    }

    /// Takes so many bytes and operations, or neither.
    ///
    /// # Errors
    /// They aren't there yet; they may be after this time.
    pub fn consume(&mut self, bytes: u64, ops: u64, now: Instant) -> Result<(), Duration> {
        let wait = self.wait(bytes, ops, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.take(bytes, ops, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, burst: u64, refill_time: u64) -> api::TokenBucket {
        api::TokenBucket { size, one_time_burst: Some(burst), refill_time }
    }

    fn limiter(
        bandwidth: Option<api::TokenBucket>,
        ops: Option<api::TokenBucket>,
        now: Instant,
    ) -> RateLimiter {
        RateLimiter::new(Some(&api::RateLimiter { bandwidth, ops }), now)
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_bucket_starts_full_and_fills_evenly() {
        let start = Instant::now();
        let mut limiter = limiter(Some(bucket(100, 0, 100)), None, start);
        assert_eq!(limiter.consume(100, 1, start), Ok(()));
        assert_eq!(limiter.consume(10, 1, start), Err(10 * MS));
        assert_eq!(limiter.consume(10, 1, start + 10 * MS), Ok(()));
        assert_eq!(limiter.consume(1, 1, start + 10 * MS), Err(MS));
        assert_eq!(limiter.consume(101, 1, start + 500 * MS), Ok(()));
        // A token of debt.
        assert_eq!(limiter.consume(1, 1, start + 500 * MS), Err(2 * MS));
    }

    #[test]
    fn the_burst_is_spent_first_and_once() {
        let start = Instant::now();
        let mut limiter = limiter(None, Some(bucket(10, 5, 10)), start);
        assert_eq!(limiter.consume(0, 15, start), Ok(()));
        assert!(limiter.consume(0, 1, start).is_err());
        let later = start + 1000 * MS;
        assert_eq!(limiter.consume(0, 10, later), Ok(()));
        assert!(limiter.consume(0, 1, later).is_err());
    }

    #[test]
    fn both_buckets_give_or_neither() {
        let start = Instant::now();
        let mut limiter = limiter(Some(bucket(100, 0, 100)), Some(bucket(1, 0, 50)), start);
        limiter.consume(40, 1, start).unwrap();
        assert_eq!(limiter.consume(60, 1, start), Err(50 * MS));
        // The 60 bytes were not taken by the refusal.
        limiter.update(&api::RateLimiter { bandwidth: None, ops: Some(bucket(0, 0, 0)) }, start);
        assert_eq!(limiter.consume(60, 1, start), Ok(()));
    }

    #[test]
    fn zero_size_or_time_is_no_limit() {
        let now = Instant::now();
        assert!(RateLimiter::new(None, now).is_unlimited());
        for (size, time) in [(0, 1), (1, 0)] {
            let mut unlimited = limiter(Some(bucket(size, 0, time)), None, now);
            assert!(unlimited.is_unlimited());
            assert_eq!(unlimited.consume(u64::MAX, u64::MAX, now), Ok(()));
        }
    }

    #[test]
    fn an_update_replaces_what_it_names_by_a_full_bucket() {
        let now = Instant::now();
        let mut limiter = limiter(Some(bucket(10, 0, 1000)), Some(bucket(10, 0, 1000)), now);
        limiter.consume(10, 10, now).unwrap();
        limiter.update(&api::RateLimiter { bandwidth: Some(bucket(20, 0, 1000)), ops: None }, now);
        assert_eq!(limiter.wait(20, 0, now), Duration::ZERO);
        assert_eq!(limiter.wait(0, 1, now), 100 * MS);
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        let start = Instant::now() + 10 * MS;
        let mut limiter = limiter(Some(bucket(10, 0, 10)), None, start);
        limiter.consume(10, 0, start).unwrap();
        assert!(limiter.consume(1, 0, start - 5 * MS).is_err());
        assert_eq!(limiter.consume(1, 0, start + MS), Ok(()));
    }

    /// Numbers of every magnitude.
    fn magnitude() -> impl Strategy<Value = u64> {
        prop_oneof![1u64..10, 1u64..100_000, any::<u64>(), Just(u64::MAX), Just(0)]
    }

    proptest! {
        /// What passes is bounded by burst, bucket, rate and the one request that may overdraw.
        #[test]
        fn no_more_passes_than_the_rate_allows(
            size in 1u64..10_000, burst in 0u64..10_000, refill_time in 1u64..2_000,
            requests in proptest::collection::vec((1u64..20_000, 0u64..300_000_000), 1..100),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(Some(bucket(size, burst, refill_time)), None, start);
            let (mut now, mut passed, mut largest) = (start, 0u128, 0u128);
            for (bytes, nanos) in requests {
                now += Duration::from_nanos(nanos);
                if limiter.consume(bytes, 1, now).is_ok() {
                    passed += u128::from(bytes);
                    largest = largest.max(u128::from(bytes));
                }
                let filled = (now - start).as_nanos() * u128::from(size) / (u128::from(refill_time) * 1_000_000);
                let bound = u128::from(burst) + u128::from(size) + filled + largest.saturating_sub(u128::from(size));
                prop_assert!(passed <= bound, "{passed} > {bound}");
            }
        }

        /// The time that a refusal names is right to the nanosecond.
        #[test]
        fn a_request_passes_after_the_named_time_and_not_before(
            size in 1u64..1_000_000, burst in 0u64..1_000, refill_time in 1u64..100_000,
            requests in proptest::collection::vec(1u64..2_000_000, 1..40),
        ) {
            let mut now = Instant::now();
            let mut limiter = limiter(Some(bucket(size, burst, refill_time)), None, now);
            for bytes in requests {
                if let Err(wait) = limiter.consume(bytes, 1, now) {
                    let before = now + wait - Duration::from_nanos(1);
                    prop_assert_eq!(limiter.clone().consume(bytes, 1, before), Err(Duration::from_nanos(1)));
                    now += wait;
                    prop_assert_eq!(limiter.consume(bytes, 1, now), Ok(()));
                }
            }
        }

        /// One who always wants more gets the whole rate.
        #[test]
        fn nothing_of_the_rate_is_lost(size in 1u64..1_000, refill_time in 1u64..1_000, steps in 1u64..200) {
            let start = Instant::now();
            let mut limiter = limiter(None, Some(bucket(size, 0, refill_time)), start);
            limiter.consume(0, size, start).unwrap();
            let (mut now, mut passed) = (start, 0u128);
            for _ in 0..steps {
                match limiter.consume(0, 1, now) {
                    Ok(()) => passed += 1,
                    Err(wait) => now += wait,
                }
            }
            let filled = (now - start).as_nanos() * u128::from(size) / (u128::from(refill_time) * 1_000_000);
            prop_assert!(passed <= filled && filled <= passed + 1, "{passed} of {filled}");
        }

        #[test]
        fn no_number_overflows(
            size in magnitude(), burst in magnitude(), refill_time in magnitude(),
            requests in proptest::collection::vec((magnitude(), 0u64..=u64::MAX / 4), 1..20),
        ) {
            let mut now = Instant::now();
            let mut limiter = limiter(Some(bucket(size, burst, refill_time)), None, now);
            for (bytes, nanos) in requests {
                now = now.checked_add(Duration::from_nanos(nanos)).unwrap_or(now);
                let _ = limiter.consume(bytes, 1, now);
                limiter.take(bytes, 1, now);
            }
        }
    }
}
