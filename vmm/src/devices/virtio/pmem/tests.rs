use std::os::unix::fs::FileExt;

use mote_vmm_api::{PmemPatch, RateLimiter as Limits, TokenBucket};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE, hostile};

/// Longer than any test runs.
const NEVER_MS: u64 = 3_600_000;
const START: u64 = 0x1_4000_0000;

fn file(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn config(file: &NamedTempFile, rate_limiter: Option<Limits>) -> api::Pmem {
    api::Pmem { id: "p".into(), path_on_host: file.path().into(), rate_limiter, ..api::Pmem::default() }
}

fn pmem(config: &api::Pmem) -> Box<Pmem> {
    Box::new(Pmem::new(config, PmemFile::open(config).unwrap(), START).unwrap())
}

fn ops(size: u64, refill_time: u64) -> Option<Limits> {
    Some(Limits { bandwidth: None, ops: Some(TokenBucket { size, one_time_burst: None, refill_time }) })
}

/// Puts a request of this type there and offers it with room for an answer.
fn request(driver: &mut Driver, kind: u32) -> u16 {
    driver.fill(BUFFERS, &kind.to_le_bytes());
    driver.fill(BUFFERS + 16, &[0xaa; 4]);
    driver.chain(0, &[(BUFFERS, 4, 0), (BUFFERS + 16, 4, WRITE)])
}

#[test]
fn the_guest_is_told_where_the_file_is_and_its_size_in_whole_pages_of_2_mib() {
    let file = file(3 << 20);
    let mut driver = Driver::running(pmem(&config(&file, None)), 0);
    let words: Vec<u32> = (0..4).map(|word| driver.read(0x100 + 4 * word)).collect();
    assert_eq!(words, [0x4000_0000, 1, 4 << 20, 0]);
}

#[test]
fn a_flush_is_answered_with_success_and_other_requests_with_an_error() {
    let file = file(4096);
    let mut driver = Driver::running(pmem(&config(&file, None)), 0);
    for (kind, answer) in [(FLUSH, OK), (1, EIO), (u32::MAX, EIO)] {
        let head = request(&mut driver, kind);
        driver.kick(0);
        assert_eq!(driver.wait_used(0), (head.into(), 4));
        assert_eq!(driver.bytes(BUFFERS + 16, 4), answer.to_le_bytes(), "request {kind}");
    }
    // No room for an answer, and too short a request.
    let head = driver.chain(0, &[(BUFFERS, 4, 0)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (head.into(), 0));
    let head = driver.chain(0, &[(BUFFERS, 3, 0), (BUFFERS + 16, 4, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (head.into(), 4));
    assert_eq!(driver.bytes(BUFFERS + 16, 4), EIO.to_le_bytes());
}

#[test]
fn a_limited_device_waits_until_the_limit_is_lifted() {
    let file = file(4096);
    let device = pmem(&config(&file, ops(1, NEVER_MS)));
    let control = device.control();
    let mut driver = Driver::running(device, 0);
    request(&mut driver, FLUSH);
    driver.kick(0);
    driver.wait_used(0);
    request(&mut driver, FLUSH);
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(0), None);
    control.update(&PmemPatch { id: "p".into(), rate_limiter: ops(0, 0) });
    driver.wait_used(0);
}

#[test]
fn a_flush_counts_as_all_bytes_of_the_file() {
    let file = file(4096);
    let bandwidth = Some(TokenBucket { size: 8192, one_time_burst: None, refill_time: NEVER_MS });
    let mut driver = Driver::running(pmem(&config(&file, Some(Limits { bandwidth, ops: None }))), 0);
    for _ in 0..2 {
        request(&mut driver, FLUSH);
        driver.kick(0);
        driver.wait_used(0);
    }
    request(&mut driver, FLUSH);
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.used(0), None);
}

#[test]
fn a_device_goes_on_in_a_machine_from_a_snapshot_and_one_with_another_size_is_refused() {
    let file = file(4096);
    let config = config(&file, None);
    let driver = Driver::running(pmem(&config), 0);
    let mut driver = driver.reloaded(|| pmem(&config));
    request(&mut driver, FLUSH);
    driver.kick(0);
    driver.wait_used(0);
    let saved = pmem(&config).save().unwrap();
    file.as_file().set_len(3 << 20).unwrap();
    let error = pmem(&config).restore(&saved).unwrap_err().to_string();
    assert!(error.contains("another size"), "{error}");
}

#[test]
fn the_mapping_shows_the_file_and_zeros_behind_it() {
    let file = file(5000);
    file.as_file().write_all_at(b"file", 4996).unwrap();
    let opened = PmemFile::open(&config(&file, None)).unwrap();
    let mapping = opened.map().unwrap();
    assert_eq!(mapping.len() as u64, ALIGNMENT);
    // SAFETY: within the mapping, which lives, and nothing writes to it at the same time.
    let bytes = unsafe { std::slice::from_raw_parts(mapping.address() as *const u8, mapping.len()) };
    assert_eq!(&bytes[4996..5002], b"file\0\0");
    assert!(bytes[5000..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_cannot_be_mapped_is_named() {
    let empty = file(0);
    let error = |path: &std::path::Path, read_only| {
        let config = api::Pmem { path_on_host: path.into(), read_only, ..api::Pmem::default() };
        PmemFile::open(&config).err().unwrap().to_string()
    };
    assert!(error(empty.path(), false).contains("is empty"));
    assert!(error("/dev/null".as_ref(), true).contains("neither a file nor"));
    assert!(error("/no/such".as_ref(), false).contains("/no/such for reading and writing"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(abuse in hostile::abuse()) {
        let file = file(4096);
        let mut driver = Driver::running(pmem(&config(&file, None)), 0);
        hostile::inflict(&mut driver, 0, &abuse);
        driver.start(0);
        let head = request(&mut driver, FLUSH);
        driver.kick(0);
        prop_assert_eq!(driver.wait_used(0), (head.into(), 4));
    }
}
