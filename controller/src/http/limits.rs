//! Rate limits: how often an address may try to log in, and how often a project may ask at all.
//!
//! A token bucket for each, in the memory of this controller: with several controllers each grants its own. The number of
//! buckets is bounded; full ones are forgotten first, as they say nothing.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Buckets that are kept at most.
const MAX_BUCKETS: usize = 16_384;

/// A limit: `burst` at once, `per_second` in the long run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// In the long run; 0: no limit.
    pub per_second: u32,
    /// At once.
    pub burst: u32,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

/// The buckets of one kind.
#[derive(Debug)]
pub struct Limiter<K> {
    rate: Rate,
    buckets: Mutex<HashMap<K, Bucket>>,
}

impl<K: Hash + Eq> Limiter<K> {
    /// With this rate for each.
    pub fn new(rate: Rate) -> Self {
        Self { rate, buckets: Mutex::default() }
    }

    /// Takes one; false if there is none left.
    pub fn take(&self, key: K, now: Instant) -> bool {
        if self.rate.per_second == 0 {
            return true;
        }
        let (speed, burst) = (f64::from(self.rate.per_second), f64::from(self.rate.burst.max(1)));
        let filled = |bucket: &Bucket| {
            let elapsed = now.saturating_duration_since(bucket.filled).as_secs_f64();
            (bucket.tokens + elapsed * speed).min(burst)
        };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&key) {
            buckets.retain(|_, bucket| filled(bucket) < burst);
            if buckets.len() >= MAX_BUCKETS {
                // So many at once are an attack: all begin anew rather than any being refused for the others.
                buckets.clear();
            }
        }
        let bucket = buckets.entry(key).or_insert(Bucket { tokens: burst, filled: now });
        let tokens = filled(bucket);
        let taken = tokens >= 1.0;
        *bucket = Bucket { tokens: if taken { tokens - 1.0 } else { tokens }, filled: now };
        taken
    }
}

/// Whom an address belongs to, as far as limits go: in IPv6 the whole /64 is one's own.
pub fn owner_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_the_rate_and_each_for_itself() {
        let limiter = Limiter::new(Rate { per_second: 10, burst: 5 });
        let start = Instant::now();
        assert_eq!((0..8).filter(|_| limiter.take("a", start)).count(), 5);
        assert!(limiter.take("b", start));
        let later = start + Duration::from_millis(250);
        assert_eq!((0..8).filter(|_| limiter.take("a", later)).count(), 2);
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..8).filter(|_| limiter.take("a", much_later)).count(), 5);
    }

    #[test]
    fn without_a_rate_all_pass_and_nothing_is_kept() {
        let limiter = Limiter::new(Rate { per_second: 0, burst: 0 });
        assert!((0..100).all(|_| limiter.take(1, Instant::now())));
        assert!(limiter.buckets.lock().unwrap().is_empty());
    }

    #[test]
    fn buckets_are_bounded() {
        let limiter = Limiter::new(Rate { per_second: 1, burst: 2 });
        let now = Instant::now();
        for key in 0..3 * MAX_BUCKETS {
            limiter.take(key, now);
        }
        assert!(limiter.buckets.lock().unwrap().len() <= MAX_BUCKETS);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let of = |text: &str| owner_of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
