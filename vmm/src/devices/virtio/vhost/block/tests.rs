//! Against a backend that only takes down what it is told; that a real one serves requests is tested from outside, in
//! tests/guest/tests/vhost_user.rs.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::devices::virtio::lifecycle::status;
use crate::devices::virtio::testing::Driver;
use crate::devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC};
use crate::memory;
use crate::snapshot::Stateful;

// Numbers of the protocol's requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;

const PROTOCOL: u64 = 1 << 30;
const READ_ONLY: u64 = 1 << abi::VIRTIO_BLK_F_RO;
const SEVERAL_QUEUES: u64 = 1 << abi::VIRTIO_BLK_F_MQ;
const FLUSH: u64 = 1 << abi::VIRTIO_BLK_F_FLUSH;
/// A feature that this program doesn't know.
const SECURE_ERASE: u64 = 1 << abi::VIRTIO_BLK_F_SECURE_ERASE;
const PROTOCOL_MQ: u64 = 1;
const PROTOCOL_CONFIG: u64 = 1 << 9;

/// What a backend says of itself.
#[derive(Clone, Copy)]
struct Manner {
    features: u64,
    protocol: u64,
    queues: u16,
}

impl Default for Manner {
    fn default() -> Self {
        let features = F_VERSION_1 | F_EVENT_IDX | PROTOCOL | SEVERAL_QUEUES | FLUSH | SECURE_ERASE;
        Self { features, protocol: PROTOCOL_MQ | PROTOCOL_CONFIG, queues: 4 }
    }
}

#[derive(Default)]
struct Record {
    requests: Vec<(u32, Vec<u8>)>,
    sectors: u64,
    connection: Option<UnixStream>,
}

struct Fake {
    _directory: TempDir,
    socket: PathBuf,
    record: Arc<Mutex<Record>>,
}

impl Fake {
    fn new(manner: Manner) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let record = Arc::new(Mutex::new(Record { sectors: 2048, ..Record::default() }));
        let shared = record.clone();
        // Ends with the process: it waits for connections.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                lock(&shared).connection = Some(stream.try_clone().unwrap());
                while converse(&stream, manner, &shared).is_some() {}
            }
        });
        Self { _directory: directory, socket, record }
    }

    fn open(&self, drive: &Drive) -> Result<VhostUserBlock, DeviceError> {
        VhostUserBlock::open(drive, &self.socket)
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut lock(&self.record).requests)
    }

    fn hang_up(&self) {
        let connection = lock(&self.record).connection.take();
        connection.unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// Answers one request; none when the other side is gone.
fn converse(mut stream: &UnixStream, manner: Manner, record: &Mutex<Record>) -> Option<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let (request, size) = (word(0), word(8));
    let mut body = vec![0; size as usize];
    stream.read_exact(&mut body).ok()?;
    let mut record = lock(record);
    record.requests.push((request, body.clone()));
    let answer = match request {
        GET_FEATURES => manner.features.to_le_bytes().to_vec(),
        GET_PROTOCOL_FEATURES => manner.protocol.to_le_bytes().to_vec(),
        GET_QUEUE_NUM => 8u64.to_le_bytes().to_vec(),
        GET_CONFIG => {
            let space = &mut body[12..];
            space[..8].copy_from_slice(&record.sectors.to_le_bytes());
            space[NUM_QUEUES].copy_from_slice(&manner.queues.to_le_bytes());
            body
        }
        // Each queue was left at 7.
        GET_VRING_BASE => [&body[..4], &7u32.to_le_bytes()].concat(),
        _ => return Some(()),
    };
    // Version 1, and a reply.
    let header = [request.to_le_bytes(), 5u32.to_le_bytes(), (answer.len() as u32).to_le_bytes()].concat();
    stream.write_all(&[header, answer].concat()).ok()
}

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
    lock(&fake.record).sectors = 4096;
    control.update(&DrivePatch::default()).unwrap();
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(driver.read(0x60) & 2, 2, "a configuration interrupt");
    assert_eq!(driver.read(0x100), 4096);
    let other = DrivePatch { path_on_host: Some("/x".into()), ..DrivePatch::default() };
    assert!(control.update(&other).unwrap_err().to_string().contains("path_on_host"));
}
