use mote_vmm_api::{Entropy, RateLimiter as Limits, TokenBucket};
use proptest::prelude::*;

use super::Rng;
use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE, hostile};

/// Longer than any test runs.
const NEVER_MS: u64 = 3_600_000;

fn rng(rate_limiter: Option<Limits>) -> Box<Rng> {
    Box::new(Rng::open(&Entropy { rate_limiter }).unwrap())
}

fn ops(size: u64, refill_time: u64) -> Option<Limits> {
    let ops = Some(TokenBucket { size, one_time_burst: None, refill_time });
    Some(Limits { bandwidth: None, ops })
}

#[test]
fn requests_are_answered_within_the_notification_and_up_to_the_limit_of_one() {
    let mut driver = Driver::running(rng(None), 0);
    driver.fill(BUFFERS, &[0; 3 * 4096]);
    let small = driver.chain(0, &[(BUFFERS, 10, WRITE), (BUFFERS + 100, 22, WRITE)]);
    let large = driver.chain(0, &[(BUFFERS + 4096, 8192, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((small.into(), 32)));
    assert_eq!(driver.used(0), Some((large.into(), MAX_REQUEST_BYTES as u32)));
    assert!(driver.bytes(BUFFERS, 10) != [0; 10] && driver.bytes(BUFFERS + 100, 22) != [0; 22]);
    assert_eq!(driver.bytes(BUFFERS + 10, 90), [0; 90]);
    assert_eq!(driver.bytes(BUFFERS + 4096 + 4096, 4096), [0; 4096]);
}

#[test]
fn a_request_without_room_is_answered_with_nothing() {
    let mut driver = Driver::running(rng(None), 0);
    let head = driver.chain(0, &[(BUFFERS, 10, 0)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((head.into(), 0)));
}

#[test]
fn a_limited_device_serves_what_the_bucket_holds_and_no_more_also_after_a_reset() {
    let mut driver = Driver::running(rng(ops(2, NEVER_MS)), 0);
    for _ in 0..3 {
        driver.chain(0, &[(BUFFERS, 8, WRITE)]);
    }
    driver.kick(0);
    driver.wait_used(0);
    driver.wait_used(0);
    assert_eq!(driver.used(0), None);
    driver.start(0);
    driver.chain(0, &[(BUFFERS, 8, WRITE)]);
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_limited_device_goes_on_without_a_notification_when_the_bucket_has_filled() {
    let mut driver = Driver::running(rng(ops(1, 5)), 0);
    let start = Instant::now();
    for _ in 0..5 {
        driver.chain(0, &[(BUFFERS, 8, WRITE)]);
    }
    driver.kick(0);
    for _ in 0..5 {
        driver.wait_used(0);
    }
    assert!(start.elapsed() >= Duration::from_millis(20), "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(abuse in hostile::abuse(), limited: bool) {
        let mut driver = Driver::running(rng(limited.then(|| ops(u64::MAX, 1)).flatten()), 0);
        hostile::inflict(&mut driver, 0, &abuse);
        driver.start(0);
        let head = driver.chain(0, &[(BUFFERS, 8, WRITE)]);
        driver.kick(0);
        prop_assert_eq!(driver.wait_used(0), (head.into(), 8));
    }
}
