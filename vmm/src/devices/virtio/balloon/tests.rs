use proptest::prelude::*;

use super::*;
use crate::devices::bus::BusDevice;
use crate::devices::virtio::lifecycle::status::{DRIVER_OK, NEEDS_RESET};
use crate::devices::virtio::testing::{BUFFERS, Driver, MEMORY_BYTES, SIZE, WRITE, hostile};
use crate::devices::virtio::{F_EVENT_IDX, F_VERSION_1};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const PAGE: u64 = 4096;
/// Offset of the configuration space of a mmio device.
const CONFIG: u64 = 0x100;

fn config() -> api::Balloon {
    api::Balloon {
        amount_mib: 2,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

fn running(config: &api::Balloon, features: u64) -> (Driver, BalloonControl) {
    let balloon = Balloon::open(config).unwrap();
    let control = balloon.control();
    (Driver::running(Box::new(balloon), features), control)
}

fn all() -> (Driver, BalloonControl) {
    running(&config(), F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_REPORTING)
}

fn read_config(driver: &mut Driver, at: u64) -> u32 {
    driver.read(CONFIG + at)
}

/// Sends page numbers.
fn give(driver: &mut Driver, queue: usize, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.fill(0x8000, &bytes);
    driver.chain(queue, &[(0x8000, bytes.len() as u32, 0)]);
    driver.kick(queue);
    driver.wait_used(queue);
}

#[test]
fn what_is_configured_is_offered_with_its_queues() {
    let queues = |config: &api::Balloon| Balloon::open(config).unwrap().queue_max_sizes().len();
    assert_eq!(queues(&config()), 5);
    let plain = api::Balloon { amount_mib: 1, ..api::Balloon::default() };
    assert_eq!(queues(&plain), 2);
    assert_eq!(Balloon::open(&plain).unwrap().features(), 0);
    assert!(Balloon::open(&api::Balloon { amount_mib: u32::MAX, ..plain }).is_err());
}

#[test]
fn a_driver_that_takes_fewer_features_needs_fewer_queues() {
    let balloon = Balloon::open(&config()).unwrap();
    let mut driver = Driver::new(Box::new(balloon));
    assert!(driver.negotiate(F_VERSION_1 | F_REPORTING));
    // Inflate, deflate, and reporting as the third.
    for queue in 0..3 {
        driver.set_up_queue(queue, SIZE);
    }
    let status = driver.status() | DRIVER_OK;
    driver.write(0x70, status.into());
    assert_eq!(driver.status(), status);
    driver.fill(BUFFERS, &[1; PAGE as usize]);
    driver.chain(2, &[(BUFFERS, PAGE as u32, WRITE)]);
    driver.kick(2);
    driver.wait_used(2);
    assert_eq!(driver.bytes(BUFFERS, PAGE as usize), [0; PAGE as usize]);
}

#[test]
fn pages_that_are_given_read_as_zeros_and_others_stay() {
    for features in [0, F_EVENT_IDX] {
        let (mut driver, _) = running(&api::Balloon { amount_mib: 2, ..api::Balloon::default() }, features);
        driver.fill(BUFFERS, &[1; 8 * PAGE as usize]);
        let first = (BUFFERS / PAGE) as u32;
        // A run, a page alone, and numbers that are no memory, one of them within a run.
        let beyond = (MEMORY_BYTES as u64 / PAGE) as u32;
        give(&mut driver, INFLATE, &[first, first + 1, first + 3, u32::MAX, beyond - 1, beyond]);
        for (page, zero) in [(0, true), (1, true), (2, false), (3, true), (4, false)] {
            let bytes = driver.bytes(BUFFERS + page * PAGE, PAGE as usize);
            assert!(bytes.iter().all(|byte| (*byte == 0) == zero), "page {page}");
        }
        give(&mut driver, DEFLATE, &[first]);
        driver.fill(BUFFERS, &[3; 16]);
        assert_eq!(driver.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_new_target_is_announced_and_the_driver_tells_how_far_it_is() {
    let (mut driver, control) = all();
    assert_eq!(read_config(&mut driver, 0), 2 * 256);
    control.set_amount(3).unwrap();
    assert_eq!(read_config(&mut driver, 0), 3 * 256);
    assert_eq!(driver.read(0x60) & 2, 2);
    driver.write(CONFIG + 4, 700);
    // The target isn't the driver's.
    driver.write(CONFIG, 9);
    let statistics = control.statistics();
    assert_eq!((statistics.target_pages, statistics.target_mib), (768, 3));
    assert_eq!((statistics.actual_pages, statistics.actual_mib), (700, 2));
    driver.transport.write(CONFIG + 7, &[1, 1, 1, 1]);
    assert_eq!(control.statistics().actual_pages, 700 | 1 << 24);
    assert!(control.set_amount(u32::MAX).is_err());
}

#[test]
fn statistics_are_taken_and_asked_for_again_after_the_interval() {
    let (mut driver, control) = all();
    let pair = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let send = |driver: &mut Driver, free: u64| {
        // Of the pairs, one is unknown, and the last is cut off.
        let bytes = [pair(4, free), pair(77, 1), pair(15, 8), vec![5, 0, 1]].concat();
        driver.fill(0x8000, &bytes);
        let head = driver.chain(2, &[(0x8000, bytes.len() as u32, 0)]);
        driver.kick(2);
        head
    };
    let seen =
        |control: &BalloonControl, free| (control.statistics().free_memory == Some(free)).then_some(());
    let head = send(&mut driver, 5000);
    driver.wait("statistics", |_| seen(&control, 5000));
    let statistics = control.statistics();
    assert_eq!((statistics.direct_reclaim, statistics.total_memory), (Some(8), None));
    assert_eq!(driver.wait_used(2), (head.into(), 0));
    send(&mut driver, 6000);
    driver.wait("statistics", |_| seen(&control, 6000));
    // A driver that doesn't wait to be asked gets the older buffer back.
    let (older, newer) = (send(&mut driver, 7000), send(&mut driver, 8000));
    driver.wait("statistics", |_| seen(&control, 8000));
    assert_eq!(driver.wait_used(2).0, u32::from(older) - 1);
    assert_eq!(driver.wait_used(2).0, u32::from(older));
    assert_ne!(older, newer);
}

/// Sends a command, or pages, to the hinting queue.
fn hint(driver: &mut Driver, parts: &[(u64, u32, u16)]) {
    driver.chain(3, parts);
    driver.kick(3);
    driver.wait_used(3);
}

fn command(driver: &mut Driver, command: u32) {
    driver.fill(0x8000, &command.to_le_bytes());
    hint(driver, &[(0x8000, 4, 0)]);
}

#[test]
fn hints_are_taken_within_a_run_only() {
    let (mut driver, control) = all();
    let filled = |driver: &mut Driver| driver.fill(BUFFERS, &[1; 2 * PAGE as usize]);
    let page = [(BUFFERS, PAGE as u32, WRITE)];
    filled(&mut driver);
    hint(&mut driver, &page);
    assert_eq!(driver.bytes(BUFFERS, 1), [1]);
    control.start_hinting(true).unwrap();
    let run = read_config(&mut driver, 8);
    assert!(run > 1);
    // Of an older run.
    command(&mut driver, run - 1);
    hint(&mut driver, &page);
    assert_eq!(driver.bytes(BUFFERS, 1), [1]);
    command(&mut driver, run);
    hint(&mut driver, &page);
    assert_eq!(driver.bytes(BUFFERS, PAGE as usize), [0; PAGE as usize]);
    assert_eq!(driver.bytes(BUFFERS + PAGE, 1), [1]);
    let status = control.hinting_status().unwrap();
    assert_eq!((status.host_cmd, status.guest_cmd), (run, Some(run)));
    // The end is acknowledged; what comes after it is not taken.
    command(&mut driver, 0);
    assert_eq!(read_config(&mut driver, 8), 1);
    filled(&mut driver);
    hint(&mut driver, &page);
    assert_eq!(driver.bytes(BUFFERS, 1), [1]);
    // Without acknowledgement the run stays until it is ended.
    control.start_hinting(false).unwrap();
    assert_eq!(read_config(&mut driver, 8), run + 1);
    command(&mut driver, 0);
    assert_eq!(read_config(&mut driver, 8), run + 1);
    control.stop_hinting().unwrap();
    assert_eq!(read_config(&mut driver, 8), 1);
}

#[test]
fn hinting_that_was_not_configured_is_refused() {
    let (_driver, control) = running(&api::Balloon::default(), 0);
    assert_eq!(control.start_hinting(true), Err(HintingOff));
    assert_eq!(control.stop_hinting(), Err(HintingOff));
    assert_eq!(control.hinting_status(), Err(HintingOff));
}

#[test]
fn reported_pages_are_given_back_whole_ones_only() {
    let (mut driver, _) = all();
    driver.fill(BUFFERS, &[1; 4 * PAGE as usize]);
    // A page and a half, from the middle of one.
    driver
        .chain(4, &[(BUFFERS + PAGE / 2, 2 * PAGE as u32, WRITE), (BUFFERS + 3 * PAGE, PAGE as u32, WRITE)]);
    driver.kick(4);
    driver.wait_used(4);
    for (page, value) in [(0, 1), (1, 0), (2, 1), (3, 0)] {
        let bytes = driver.bytes(BUFFERS + page * PAGE, PAGE as usize);
        assert!(bytes.iter().all(|byte| *byte == value), "page {page}");
    }
}

#[test]
fn a_balloon_from_a_snapshot_has_its_size_statistics_and_run_and_goes_on() {
    let (mut driver, control) = all();
    driver.write(CONFIG + 4, 512);
    let pair = [&4_u16.to_le_bytes()[..], &77_u64.to_le_bytes()].concat();
    driver.fill(0x8000, &pair);
    let head = driver.chain(2, &[(0x8000, pair.len() as u32, 0)]);
    driver.kick(2);
    driver.wait("statistics", |_| control.statistics().free_memory.map(drop));
    control.start_hinting(false).unwrap();
    let run = read_config(&mut driver, 8);
    command(&mut driver, run);
    let mut loaded = None;
    let mut driver = driver.reloaded(|| {
        let balloon = Balloon::open(&config()).unwrap();
        loaded = Some(balloon.control());
        Box::new(balloon)
    });
    let loaded = loaded.unwrap();
    let (before, after) = (control.statistics(), loaded.statistics());
    assert_eq!(
        (after.actual_pages, after.free_memory, after.target_pages),
        (512, Some(77), before.target_pages)
    );
    assert_eq!(read_config(&mut driver, 8), run);
    // The run goes on, the buffer of the statistics is asked for again, and the next run has another id.
    driver.fill(BUFFERS, &[1; PAGE as usize]);
    hint(&mut driver, &[(BUFFERS, PAGE as u32, WRITE)]);
    assert_eq!(driver.bytes(BUFFERS, 1), [0]);
    assert_eq!(driver.wait_used(2), (head.into(), 0));
    loaded.start_hinting(false).unwrap();
    assert_eq!(read_config(&mut driver, 8), run + 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_hostile_driver_gets_nowhere_and_a_reset_helps(abuses in proptest::collection::vec(hostile::abuse(), 5)) {
        let (mut driver, control) = all();
        control.start_hinting(true).unwrap();
        for (queue, abuse) in abuses.iter().enumerate() {
            hostile::inflict(&mut driver, queue, abuse);
        }
        driver.start(F_STATS_VQ | F_FREE_PAGE_HINT | F_REPORTING);
        driver.fill(BUFFERS, &[1; PAGE as usize]);
        give(&mut driver, INFLATE, &[(BUFFERS / PAGE) as u32]);
        prop_assert_eq!(driver.bytes(BUFFERS, PAGE as usize), vec![0; PAGE as usize]);
    }
}
