//! Against a backend that only takes down what it is told; that a real one serves requests is tested from outside, in
//! tests/guest/tests/vhost_user.rs.

use super::testing::*;
use super::*;
use crate::devices::virtio::lifecycle::status;
use crate::devices::virtio::testing::Driver;
use crate::devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::memory;
use crate::snapshot::Stateful;

const READ_ONLY: u64 = 1 << abi::VIRTIO_BLK_F_RO;
const FLUSH: u64 = 1 << abi::VIRTIO_BLK_F_FLUSH;

fn drive() -> Drive {
    Drive { drive_id: "served".to_owned(), ..Drive::default() }
}

fn running(device: VhostUserBlock) -> Driver {
    let mut driver = Driver::with_memory(Box::new(device), memory::create(4).unwrap());
    driver.start(0);
    driver
}

fn sectors(device: &VhostUserBlock) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn queues(device: &VhostUserBlock) -> u16 {
    let mut bytes = [0; 2];
    device.read_config(NUM_QUEUES.start as u64, &mut bytes);
    u16::from_le_bytes(bytes)
}

#[test]
fn the_guest_is_offered_what_the_backend_offers_and_this_program_knows() {
    let fake = Fake::new(Manner::default());
    let device = fake.open(&drive()).unwrap();
    assert_eq!(device.features(), F_VERSION_1 | F_EVENT_IDX, "no flush if Unsafe, one queue by default");
    assert_eq!(device.common_features() & F_INDIRECT_DESC, 0);
    assert_eq!((sectors(&device), queues(&device), device.queue_max_sizes().len()), (2048, 1, 1));
    drop(device);
    let safe = Drive { cache_type: CacheType::Writeback, num_queues: Some(3), ..drive() };
    let device = fake.open(&safe).unwrap();
    assert_eq!(device.features(), F_VERSION_1 | F_EVENT_IDX | FLUSH | SEVERAL_QUEUES);
    assert_eq!((queues(&device), device.queue_max_sizes().len()), (3, 3));
    drop(device);
    let many = Drive { num_queues: Some(32), ..drive() };
    assert_eq!(fake.open(&many).unwrap().queue_max_sizes().len(), 4, "no more than the backend has");
}

#[test]
fn a_backend_that_lacks_what_is_needed_is_refused_by_name() {
    let with = |change: fn(&mut Manner), drive: Drive| {
        let mut manner = Manner::default();
        change(&mut manner);
        crate::error_chain(&Fake::new(manner).open(&drive).err().unwrap())
    };
    assert!(with(|manner| manner.features &= !F_VERSION_1, drive()).contains("VIRTIO_F_VERSION_1"));
    assert!(with(|manner| manner.features &= !PROTOCOL, drive()).contains("PROTOCOL_FEATURES"));
    assert!(with(|manner| manner.protocol &= !PROTOCOL_CONFIG, drive()).contains("F_CONFIG"));
    let read_only = || Drive { is_read_only: true, ..drive() };
    assert!(with(|_| (), read_only()).contains("is_read_only"));
    let fake = Fake::new(Manner { features: Manner::default().features | READ_ONLY, ..Manner::default() });
    assert!(fake.open(&read_only()).unwrap().is_read_only());
    assert!(fake.open(&drive()).unwrap().is_read_only(), "also if nobody asked for it");
    let nobody = VhostUserBlock::open(&drive(), Path::new("/no/such/socket")).err().unwrap();
    assert!(crate::error_chain(&nobody).contains("/no/such/socket"));
}

#[test]
fn queues_are_handed_over_at_the_start_and_taken_back_where_they_were_left() {
    let fake = Fake::new(Manner::default());
    let device = fake.open(&Drive { num_queues: Some(2), ..drive() }).unwrap();
    fake.requests();
    let mut driver = running(device);
    // Answered after all before it.
    driver.transport.pause();
    let requests = fake.requests();
    let kinds: Vec<_> = requests.iter().map(|(request, _)| *request).collect();
    let queue = [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_KICK];
    let start = [&[SET_FEATURES, SET_MEM_TABLE][..], &queue, &queue, &[SET_VRING_ENABLE; 2]].concat();
    let stop = [SET_VRING_ENABLE, GET_VRING_BASE].repeat(2);
    assert_eq!(kinds, [start, stop].concat());
    assert_eq!(requests[0].1, (F_VERSION_1 | PROTOCOL).to_le_bytes());
    assert_eq!(requests[3].1, [0; 8], "the first base of the first queue");
    driver.transport.resume();
    driver.transport.pause();
    let requests = fake.requests();
    assert_eq!(requests[3], (SET_VRING_BASE, [[0; 4], 7u32.to_le_bytes()].concat()));
    driver.transport.resume();
    driver.start(0);
    driver.write(0x70, 0);
    let mut bases = fake.requests().into_iter().filter(|(request, _)| *request == SET_VRING_BASE);
    assert_eq!(bases.next_back().unwrap().1[4..], [0; 4], "a reset forgets");
    let error = driver.transport.save().unwrap_err().to_string();
    assert!(error.contains("vhost-user"), "{error}");
}

#[test]
fn a_backend_that_goes_away_needs_a_reset_after_which_it_is_connected_anew() {
    let fake = Fake::new(Manner::default());
    let device = fake.open(&drive()).unwrap();
    let (control, metrics) = (device.control(), device.backend.metrics.clone());
    let mut driver = running(device);
    fake.hang_up();
    driver.wait_needs_reset();
    assert_eq!(metrics.disconnects.total(), 1);
    assert!(control.update(&DrivePatch::default()).is_err());
    assert_eq!(metrics.cfg_fails.total(), 1);
    driver.start(0);
    control.update(&DrivePatch::default()).unwrap();
    // Also while it is stopped.
    driver.write(0x70, 0);
    fake.hang_up();
    driver.start(0);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_patch_reads_the_configuration_again_and_tells_the_guest_if_it_has_changed() {
    let fake = Fake::new(Manner::default());
    let device = fake.open(&drive()).unwrap();
    let control = device.control();
    let mut driver = running(device);
    let generation = driver.read(0xfc);
    control.update(&DrivePatch::default()).unwrap();
    assert_eq!(driver.read(0xfc), generation);
    fake.set_sectors(4096);
    control.update(&DrivePatch::default()).unwrap();
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(driver.read(0x60) & 2, 2, "a configuration interrupt");
    assert_eq!(driver.read(0x100), 4096);
    let other = DrivePatch { path_on_host: Some("/x".into()), ..DrivePatch::default() };
    assert!(control.update(&other).unwrap_err().to_string().contains("path_on_host"));
}
