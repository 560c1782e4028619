//! The device behind its registers, over real files, with both engines.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mote_vmm_api::{RateLimiter as Limits, TokenBucket};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, HIGH, INDIRECT, NEXT, WRITE, hostile};
use crate::devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC};

const OK: u8 = abi::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = abi::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = abi::VIRTIO_BLK_S_UNSUPP as u8;
const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

/// Sectors of the test's disks.
const SECTORS: u64 = 64;
/// Where a request's header, status and data are.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const RO: u64 = 1 << abi::VIRTIO_BLK_F_RO;
const FLUSH: u64 = 1 << abi::VIRTIO_BLK_F_FLUSH;

/// What sector `sector` holds at first.
fn sector(sector: u64) -> Vec<u8> {
    (0..SECTOR).map(|n| (sector * 31 + n * 7 + 1) as u8).collect()
}

fn disk(sectors: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    (0..sectors).for_each(|number| file.write_all(&sector(number)).unwrap());
    file
}

fn drive(path: &Path, engine: IoEngine) -> Drive {
    Drive {
        drive_id: "scratch".to_owned(),
        path_on_host: path.to_owned(),
        cache_type: CacheType::Writeback,
        io_engine: engine,
        ..Drive::default()
    }
}

/// A running device.
struct Rig {
    driver: Driver,
    control: BlockControl,
}

impl Rig {
    fn new(drive: &Drive) -> Self {
        let block = Block::open(drive).unwrap();
        let (control, features) = (block.control(), block.features);
        Self { driver: Driver::running(Box::new(block), features), control }
    }

    fn over(file: &NamedTempFile, engine: IoEngine) -> Self {
        Self::new(&drive(file.path(), engine))
    }

    /// Offers a request with these data buffers, with header and status of their own; the chain's head.
    fn offer(&mut self, number: u64, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u16 {
        let (header, status) = (HEADER + 16 * number, STATUS + number);
        let mut bytes = [0; 16];
        bytes[0..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        self.driver.fill(header, &bytes);
        self.driver.fill(status, &[0xff]);
        let parts = [&[(header, 16, 0)], data, &[(status, 1, WRITE)]].concat();
        self.driver.chain(0, &parts)
    }

    /// The next answer's status, and the bytes written beside it.
    fn answer(&mut self) -> (u8, u32) {
        let (_, written) = self.driver.wait_used(0);
        (self.driver.bytes(STATUS, 1)[0], written)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        self.offer(0, kind, sector, data);
        self.driver.kick(0);
        self.answer().0
    }

    fn read(&mut self, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
        let status = self.request(abi::VIRTIO_BLK_T_IN, sector, &[(DATA, bytes, WRITE)]);
        (status, self.driver.bytes(DATA, bytes as usize))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.driver.fill(DATA, data);
        self.request(abi::VIRTIO_BLK_T_OUT, sector, &[(DATA, data.len() as u32, 0)])
    }

    fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.driver.fill(DATA, &bytes);
        self.request(kind, 0, &[(DATA, bytes.len() as u32, 0)])
    }

    fn capacity(&mut self) -> u64 {
        u64::from(self.driver.read(0x104)) << 32 | u64::from(self.driver.read(0x100))
    }
}

#[test]
fn requests_are_counted_by_kind_and_result() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        let metrics = rig.control.0.lock().unwrap().disk.metrics.clone();
        assert_eq!(rig.read(3, 1024).0, OK);
        assert_eq!(rig.read(5, 512).0, OK);
        assert_eq!(rig.write(7, &[1; 1536]), OK);
        assert_eq!(rig.request(abi::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(rig.read(SECTORS, 512).0, IOERR);
        assert_eq!(rig.request(0xffff, 0, &[]), UNSUPP);
        let counters: std::collections::BTreeMap<_, _> = crate::metrics::Group::counters(&*metrics)
            .into_iter()
            .map(|(name, counter)| (name, counter.total()))
            .filter(|(_, total)| *total > 0)
            .collect();
        let expected = [
            ("flush_count", 1),
            ("invalid_reqs_count", 2),
            ("read_bytes", 1536),
            ("read_count", 2),
            ("write_bytes", 1536),
            ("write_count", 1),
        ];
        assert_eq!(counters, expected.into(), "{engine:?}");
        rig.control.update(&DrivePatch { drive_id: "scratch".into(), ..DrivePatch::default() }).unwrap();
        assert_eq!(metrics.update_count.total(), 1, "the same counters after a change");
    }
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        assert_eq!(rig.read(5, 512), (OK, sector(5)));
        let data: Vec<u8> = (0..4096u32).map(|n| (n / 3) as u8).collect();
        assert_eq!(rig.write(8, &data), OK);
        assert_eq!(rig.read(8, 4096), (OK, data.clone()));
        let content = fs::read(file.path()).unwrap();
        assert_eq!(content[8 * 512..16 * 512], data);
        assert_eq!(content[7 * 512..8 * 512], sector(7));
        assert_eq!(content[16 * 512..17 * 512], sector(16));
    }
}

#[test]
fn a_request_may_be_cut_anywhere() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        // Odd pieces on both sides of the hole in memory.
        let pieces = [(DATA + 3, 5, WRITE), (HIGH - 0x1000 - 500, 500, WRITE), (HIGH + 1, 519, WRITE)];
        assert_eq!(rig.request(abi::VIRTIO_BLK_T_IN, 3, &pieces), OK);
        let got: Vec<u8> =
            pieces.iter().flat_map(|(at, len, _)| rig.driver.bytes(*at, *len as usize)).collect();
        assert_eq!(got, [sector(3), sector(4)].concat());
    }
}

#[test]
fn the_length_written_is_told() {
    let file = disk(SECTORS);
    let mut rig = Rig::over(&file, IoEngine::Sync);
    for (kind, flags, written) in [(abi::VIRTIO_BLK_T_IN, WRITE, 513), (abi::VIRTIO_BLK_T_OUT, 0, 1)] {
        rig.offer(0, kind, 0, &[(DATA, 512, flags)]);
        rig.driver.kick(0);
        assert_eq!(rig.answer(), (OK, written));
    }
}

#[test]
fn many_requests_at_once_are_all_answered_with_their_own_data() {
    for (engine, features) in ENGINES.iter().flat_map(|engine| [0, F_EVENT_IDX].map(|bits| (*engine, bits))) {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        rig.driver.start(features);
        for round in 0..50u64 {
            let wanted: Vec<u64> = (0..5).map(|number| (round * 13 + number * 7) % SECTORS).collect();
            let mut heads = Vec::new();
            for (number, wanted) in (0..).zip(&wanted) {
                let buffer = DATA + 512 * number;
                heads.push(rig.offer(number, abi::VIRTIO_BLK_T_IN, *wanted, &[(buffer, 512, WRITE)]));
            }
            rig.driver.kick(0);
            let mut answered: Vec<u16> = (0..5).map(|_| rig.driver.wait_used(0).0 as u16).collect();
            answered.sort_unstable();
            heads.sort_unstable();
            assert_eq!(answered, heads);
            for (number, wanted) in (0..).zip(&wanted) {
                assert_eq!(rig.driver.bytes(STATUS + number, 1), [OK]);
                assert_eq!(rig.driver.bytes(DATA + 512 * number, 512), sector(*wanted), "{engine:?}");
            }
        }
    }
}

#[test]
fn an_indirect_request_is_served() {
    let file = disk(SECTORS);
    let mut rig = Rig::over(&file, IoEngine::Sync);
    rig.driver.start(F_INDIRECT_DESC);
    let table = BUFFERS + 0x8000;
    rig.driver.fill(HEADER, &[0; 16]);
    rig.driver.raw_descriptor(table, (HEADER, 16, NEXT, 1));
    rig.driver.raw_descriptor(table + 16, (DATA, 512, NEXT | WRITE, 2));
    rig.driver.raw_descriptor(table + 32, (STATUS, 1, WRITE, 0));
    rig.driver.chain(0, &[(table, 48, INDIRECT)]);
    rig.driver.kick(0);
    assert_eq!(rig.answer(), (OK, 513));
    assert_eq!(rig.driver.bytes(DATA, 512), sector(0));
}

#[test]
fn the_id_is_the_drives_and_needs_its_room() {
    let file = disk(SECTORS);
    let mut rig = Rig::over(&file, IoEngine::Async);
    assert_eq!(rig.request(abi::VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]), OK);
    assert_eq!(rig.driver.bytes(DATA, 20), b"scratch\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.request(abi::VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, WRITE)]), IOERR);
}

#[test]
fn flush_is_there_with_writeback_only() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        assert_eq!(rig.driver.offered() & FLUSH, FLUSH);
        assert_eq!(rig.request(abi::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let mut rig = Rig::new(&Drive { cache_type: CacheType::Unsafe, ..drive(file.path(), engine) });
        assert_eq!(rig.driver.offered() & FLUSH, 0);
        assert_eq!(rig.request(abi::VIRTIO_BLK_T_FLUSH, 0, &[]), UNSUPP);
    }
}

#[test]
fn a_read_only_drive_refuses_all_that_would_change_it() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let before = fs::read(file.path()).unwrap();
        let mut rig = Rig::new(&Drive { is_read_only: true, ..drive(file.path(), engine) });
        assert_eq!(rig.driver.offered() & (RO | 1 << abi::VIRTIO_BLK_F_DISCARD), RO);
        assert_eq!(rig.write(0, &[1; 512]), IOERR);
        assert_eq!(rig.clear(abi::VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IOERR);
        assert_eq!(rig.clear(abi::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
        assert_eq!(rig.read(1, 512), (OK, sector(1)));
        assert_eq!(fs::read(file.path()).unwrap(), before);
    }
}

#[test]
fn cleared_ranges_read_as_zeros_and_their_neighbours_stay() {
    for kind in [abi::VIRTIO_BLK_T_DISCARD, abi::VIRTIO_BLK_T_WRITE_ZEROES] {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, IoEngine::Async);
        assert_eq!(rig.clear(kind, &[(3, 2, 0), (60, 4, 0), (10, 0, 0)]), OK);
        for number in 0..SECTORS {
            let cleared = (3..5).contains(&number) || number >= 60;
            let expected = if cleared { vec![0; 512] } else { sector(number) };
            assert_eq!(rig.read(number, 512), (OK, expected), "sector {number}");
        }
        assert_eq!(fs::metadata(file.path()).unwrap().len(), SECTORS * SECTOR);
    }
}

#[test]
fn ranges_that_break_the_rules_are_refused() {
    let file = disk(SECTORS);
    let mut rig = Rig::over(&file, IoEngine::Sync);
    let (discard, zeroes) = (abi::VIRTIO_BLK_T_DISCARD, abi::VIRTIO_BLK_T_WRITE_ZEROES);
    let unmap = abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    assert_eq!(rig.clear(zeroes, &[(0, 1, unmap)]), OK);
    assert_eq!(rig.clear(discard, &[(1, 1, unmap)]), UNSUPP);
    assert_eq!(rig.clear(zeroes, &[(1, 1, 2)]), UNSUPP);
    for range in [(SECTORS, 1, 0), (SECTORS - 1, 2, 0), (u64::MAX, 1, 0), (0, MAX_RANGE_SECTORS + 1, 0)] {
        assert_eq!(rig.clear(zeroes, &[range]), IOERR, "{range:?}");
    }
    assert_eq!(rig.clear(discard, &[(1, 1, 0); MAX_RANGES as usize + 1]), IOERR);
    assert_eq!(rig.clear(discard, &[]), IOERR);
    assert_eq!(rig.request(discard, 0, &[(DATA, 15, 0)]), IOERR);
    assert_eq!(rig.read(1, 512), (OK, sector(1)));
}

#[test]
fn requests_beyond_the_disk_or_of_half_sectors_are_errors() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        for (first, bytes) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)]
        {
            assert_eq!(rig.read(first, bytes).0, IOERR, "{first} {bytes}");
            assert_eq!(rig.write(first, &vec![0; bytes as usize]), IOERR, "{first} {bytes}");
        }
        assert_eq!(rig.request(77, 0, &[]), UNSUPP);
        assert_eq!(fs::metadata(file.path()).unwrap().len(), SECTORS * SECTOR);
    }
}

#[test]
fn a_request_without_room_for_its_status_ends_the_device_until_reset() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        rig.driver.fill(HEADER, &[0; 16]);
        rig.driver.chain(0, &[(HEADER, 16, 0)]);
        rig.driver.kick(0);
        rig.driver.wait_needs_reset();
        // A change from outside doesn't bring it back.
        rig.control.update(&DrivePatch::default()).unwrap();
        rig.driver.start(0);
        assert_eq!(rig.read(2, 512), (OK, sector(2)));
    }
}

#[test]
fn a_file_that_was_cut_short_gives_errors_and_not_a_crash() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        file.as_file().set_len(10 * SECTOR).unwrap();
        assert_eq!(rig.read(20, 512).0, IOERR);
        assert_eq!(rig.read(9, 1024).0, IOERR);
        assert_eq!(rig.read(9, 512), (OK, sector(9)));
    }
}

#[test]
fn a_file_that_was_deleted_is_served_further() {
    let file = disk(SECTORS);
    let mut rig = Rig::over(&file, IoEngine::Async);
    file.close().unwrap();
    assert_eq!(rig.write(0, &[9; 512]), OK);
    assert_eq!(rig.read(0, 512), (OK, vec![9; 512]));
}

/// A memory file that takes no more writes, by path.
fn sealed() -> (fs::File, PathBuf) {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string; the descriptor is new and ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        fs::File::from_raw_fd(fd)
    };
    file.set_len(SECTORS * SECTOR).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

#[test]
fn errors_of_the_file_are_the_guests_and_are_logged_once() {
    let log = NamedTempFile::new().unwrap();
    crate::log::set_up("test", crate::log::Level::Error, Some(log.path())).unwrap();
    for (engine, id) in [(IoEngine::Sync, "plain_once"), (IoEngine::Async, "ring_once")] {
        let (file, path) = sealed();
        let mut rig = Rig::new(&Drive { drive_id: id.to_owned(), ..drive(&path, engine) });
        // SAFETY: no pointers are passed.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
        for _ in 0..5 {
            assert_eq!(rig.write(0, &[1; 512]), IOERR);
            assert_eq!(rig.read(0, 512), (OK, vec![0; 512]));
        }
        let lines = fs::read_to_string(log.path()).unwrap();
        assert_eq!(lines.lines().filter(|line| line.contains(id)).count(), 1, "{lines}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_the_device_goes_on() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let directory = tempfile::tempdir().unwrap();
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
        println!("SKIPPED: no mount namespace: {error}");
        return;
    }
    // The mounts of this thread's namespace go with the thread.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    mount(Some("small"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
    for engine in ENGINES {
        let path = directory.path().join("disk");
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let mut rig = Rig::new(&drive(&path, engine));
        let statuses: Vec<u8> = (0..32).map(|block| rig.write(8 * block, &[3; 4096])).collect();
        assert!(statuses.starts_with(&[OK]) && statuses.ends_with(&[IOERR]), "{statuses:?}");
        assert_eq!(rig.read(0, 512), (OK, vec![3; 512]));
        // Room again.
        assert_eq!(rig.clear(abi::VIRTIO_BLK_T_DISCARD, &[(0, 64, 0)]), OK);
        assert_eq!(rig.write(2040, &[4; 4096]), OK);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let refused = |path: &Path| Block::open(&drive(path, IoEngine::Sync)).err().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    assert!(refused(&directory.path().join("none")).contains("open drive"));
    assert!(refused(Path::new("/dev/null")).contains("neither"));
    let small = directory.path().join("small");
    fs::write(&small, [0; 511]).unwrap();
    assert!(refused(&small).contains("511 bytes"));
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(!refused(&pipe).is_empty());
}

#[test]
fn the_configuration_space_says_what_the_drive_is() {
    let file = disk(SECTORS);
    file.as_file().write_all_at(&[1; 100], SECTORS * SECTOR).unwrap();
    let mut rig = Rig::over(&file, IoEngine::Sync);
    assert_eq!(rig.capacity(), SECTORS);
    assert_eq!(rig.driver.read(0x10c), SEG_MAX);
    assert_eq!(rig.driver.read(0x114), 512);
    // 8 sectors make a physical block, and are the least to ask for.
    assert_eq!(rig.driver.read(0x118), 8 << 16 | 3);
    assert_eq!(rig.driver.read(0x138) & 0xff, 1);
    assert_eq!(rig.driver.read(0x13c), 0);
}

/// The least time that `count` requests of 512 bytes take.
fn takes_at_least(limits: Limits, engine: IoEngine, count: u32) -> Duration {
    let file = disk(SECTORS);
    let mut rig = Rig::new(&Drive { rate_limiter: Some(limits), ..drive(file.path(), engine) });
    let start = Instant::now();
    for _ in 0..count {
        assert_eq!(rig.read(7, 512), (OK, sector(7)));
    }
    start.elapsed()
}

#[test]
fn limited_requests_wait_for_their_tokens() {
    let bucket = |size, burst| Some(TokenBucket { size, one_time_burst: Some(burst), refill_time: 20 });
    for engine in ENGINES {
        // 2 of the bucket, 1 of the burst, and 4 more at 2 in 20 ms.
        let ops = Limits { bandwidth: None, ops: bucket(2, 1) };
        assert!(takes_at_least(ops, engine, 7) >= Duration::from_millis(40));
        let bandwidth = Limits { bandwidth: bucket(1024, 0), ops: None };
        assert!(takes_at_least(bandwidth, engine, 6) >= Duration::from_millis(40));
    }
}

#[test]
fn a_limit_can_be_lifted_while_a_request_waits() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let forever = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: u64::MAX });
        let limits = Limits { bandwidth: None, ops: forever };
        let mut rig = Rig::new(&Drive { rate_limiter: Some(limits), ..drive(file.path(), engine) });
        assert_eq!(rig.read(0, 512).0, OK);
        rig.offer(0, abi::VIRTIO_BLK_T_IN, 1, &[(DATA, 512, WRITE)]);
        rig.driver.kick(0);
        let unlimited = Some(TokenBucket { size: 0, one_time_burst: None, refill_time: 0 });
        let lifted = Some(Limits { bandwidth: None, ops: unlimited });
        rig.control.update(&DrivePatch { rate_limiter: lifted, ..DrivePatch::default() }).unwrap();
        assert_eq!(rig.answer().0, OK);
        assert_eq!(rig.driver.bytes(DATA, 512), sector(1));
    }
}

#[test]
fn a_drive_gets_another_file_or_size_while_it_runs() {
    for engine in ENGINES {
        let (first, second) = (disk(SECTORS), disk(2 * SECTORS));
        let mut rig = Rig::over(&first, engine);
        assert_eq!(rig.write(0, &[7; 512]), OK);
        let generation = rig.driver.read(0xfc);
        let to = |path: &Path| DrivePatch { path_on_host: Some(path.to_owned()), ..DrivePatch::default() };
        rig.control.update(&to(second.path())).unwrap();
        assert_eq!(rig.driver.read(0x60) & 2, 2, "no configuration interrupt");
        assert_ne!(rig.driver.read(0xfc), generation);
        assert_eq!(rig.capacity(), 2 * SECTORS);
        assert_eq!(rig.read(0, 512), (OK, sector(0)));
        assert_eq!(rig.read(2 * SECTORS - 1, 512).0, OK);
        // The same file, grown.
        second.as_file().set_len(3 * SECTORS * SECTOR).unwrap();
        assert_eq!(rig.read(3 * SECTORS - 1, 512).0, IOERR);
        rig.control.update(&to(second.path())).unwrap();
        assert_eq!(rig.read(3 * SECTORS - 1, 512), (OK, vec![0; 512]));
        // One that isn't there changes nothing.
        assert!(rig.control.update(&to(Path::new("/no/such/file"))).is_err());
        assert_eq!(rig.capacity(), 3 * SECTORS);
        assert_eq!(rig.read(1, 512), (OK, sector(1)));
        assert_eq!(fs::read(first.path()).unwrap()[..512], [7; 512]);
    }
}

#[test]
fn changes_lose_no_request_and_answer_none_twice() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        let (control, path) = (rig.control.clone(), file.path().to_owned());
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let changer = std::thread::spawn(move || {
            let patch = DrivePatch { path_on_host: Some(path), ..DrivePatch::default() };
            while !stop.load(Ordering::Relaxed) {
                control.update(&patch).unwrap();
            }
        });
        for round in 0..200 {
            for number in 0..4 {
                rig.offer(
                    number,
                    abi::VIRTIO_BLK_T_IN,
                    round % SECTORS,
                    &[(DATA + 512 * number, 512, WRITE)],
                );
                rig.driver.kick(0);
            }
            for _ in 0..4 {
                rig.driver.wait_used(0);
            }
            assert_eq!(rig.driver.used(0), None);
            for number in 0..4 {
                assert_eq!(rig.driver.bytes(DATA + 512 * number, 512), sector(round % SECTORS));
            }
        }
        done.store(true, Ordering::Relaxed);
        changer.join().unwrap();
    }
}

#[test]
fn an_unused_device_has_no_thread_and_can_be_changed() {
    let file = disk(SECTORS);
    let block = Block::open(&drive(file.path(), IoEngine::Async)).unwrap();
    let control = block.control();
    file.as_file().set_len(2 * SECTORS * SECTOR).unwrap();
    let patch = DrivePatch { path_on_host: Some(file.path().to_owned()), ..DrivePatch::default() };
    control.update(&patch).unwrap();
    assert!(block.state().running.is_none());
    let mut rig = Rig { driver: Driver::new(Box::new(block)), control };
    assert_eq!(rig.capacity(), 2 * SECTORS);
}

#[test]
fn several_queues_are_served_side_by_side_and_those_left_out_are_not_missed() {
    for engine in ENGINES {
        let file = disk(SECTORS);
        let limits = Limits {
            bandwidth: Some(TokenBucket { size: 1 << 30, one_time_burst: None, refill_time: 1 }),
            ops: None,
        };
        let drive = Drive { num_queues: Some(4), rate_limiter: Some(limits), ..drive(file.path(), engine) };
        let mut rig = Rig::new(&drive);
        assert_eq!(rig.driver.offered() & 1 << abi::VIRTIO_BLK_F_MQ, 1 << abi::VIRTIO_BLK_F_MQ);
        assert_eq!(rig.driver.read(0x120) >> 16, 4);
        for round in 0..20 {
            for queue in 0..4_u64 {
                let (header, status) = (HEADER + 16 * queue, STATUS + queue);
                let mut bytes = [0; 16];
                bytes[8..16].copy_from_slice(&(round + queue).to_le_bytes());
                rig.driver.fill(header, &bytes);
                let parts = [(header, 16, 0), (DATA + 512 * queue, 512, WRITE), (status, 1, WRITE)];
                rig.driver.chain(queue as usize, &parts);
                rig.driver.kick(queue as usize);
            }
            for queue in 0..4_u64 {
                rig.driver.wait_used(queue as usize);
                assert_eq!(rig.driver.bytes(STATUS + queue, 1), [OK]);
                assert_eq!(rig.driver.bytes(DATA + 512 * queue, 512), sector(round + queue));
            }
        }
        // A driver with two processors enables two; a simple one the first only.
        for queues in [2, 1] {
            rig.driver.write(0x70, 0);
            assert!(rig.driver.negotiate(crate::devices::virtio::F_VERSION_1));
            (0..queues).for_each(|queue| rig.driver.set_up_queue(queue, 16));
            rig.driver.write(0x70, 0xf);
            assert_eq!(rig.read(3, 512), (OK, sector(3)));
        }
        // None at all is no way to use a device.
        rig.driver.write(0x70, 0);
        assert!(rig.driver.negotiate(crate::devices::virtio::F_VERSION_1));
        rig.driver.write(0x70, 0xf);
        rig.driver.wait_needs_reset();
    }
}

/// Processor time of this process's block workers so far: thread and nanoseconds.
fn workers() -> Vec<(PathBuf, u64)> {
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap().path());
    let is_worker =
        |thread: &PathBuf| fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim() == "block");
    threads
        .filter(is_worker)
        .filter_map(|thread| {
            let times = fs::read_to_string(thread.join("schedstat")).ok()?;
            Some((thread, times.split(' ').next()?.parse().ok()?))
        })
        .collect()
}

#[test]
fn an_idle_worker_uses_no_processor() {
    if !Path::new("/proc/self/schedstat").exists() {
        println!("SKIPPED: the kernel has no schedstat");
        return;
    }
    for engine in ENGINES {
        let others: Vec<PathBuf> = workers().into_iter().map(|(thread, _)| thread).collect();
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, engine);
        // Busy enough that it has begun to look for work.
        for round in 0..2000 {
            assert_eq!(rig.read(round % SECTORS, 512).0, OK);
        }
        let own = || -> u64 {
            workers().iter().filter(|(thread, _)| !others.contains(thread)).map(|(_, nanos)| nanos).sum()
        };
        let start = Instant::now();
        let mut before = own();
        assert!(before > 0, "the worker's thread was not found");
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = own();
            if now == before {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "the worker never sleeps");
            before = now;
        }
    }
}

/// A drive with a qcow2 image over a raw file, made by qemu-img.
fn layered(directory: &Path) -> Option<Drive> {
    let (base, top) = (directory.join("base"), directory.join("top"));
    fs::write(&base, (0..SECTORS).flat_map(sector).collect::<Vec<u8>>()).unwrap();
    let arguments = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    let made = std::process::Command::new("qemu-img").args(arguments).arg(&base).arg(&top).arg("1M").status();
    if made.is_err() {
        println!("SKIPPED: no qemu-img");
        return None;
    }
    let backing_files = vec![BackingFile { path_on_host: base, format: DriveFormat::Raw }];
    Some(Drive { format: DriveFormat::Qcow2, backing_files, ..drive(&top, IoEngine::Sync) })
}

fn qemu_check(path: &Path) {
    let checked = std::process::Command::new("qemu-img").args(["check", "-q"]).arg(path).status().unwrap();
    assert!(checked.success(), "{checked}");
}

#[test]
fn a_layered_drive_is_read_through_and_written_on_top() {
    let directory = tempfile::tempdir().unwrap();
    let Some(drive) = layered(directory.path()) else { return };
    let before = fs::read(&drive.backing_files[0].path_on_host).unwrap();
    let mut rig = Rig::new(&drive);
    assert_eq!(rig.capacity(), 2048);
    assert_eq!(rig.read(5, 512), (OK, sector(5)));
    // Over the end of the base, in odd pieces.
    let pieces = [(DATA + 3, 5, WRITE), (HIGH - 0x1000 - 500, 500, WRITE), (HIGH + 1, 519, WRITE)];
    assert_eq!(rig.request(abi::VIRTIO_BLK_T_IN, SECTORS - 1, &pieces), OK);
    let got: Vec<u8> = pieces.iter().flat_map(|(at, len, _)| rig.driver.bytes(*at, *len as usize)).collect();
    assert_eq!(got, [sector(SECTORS - 1), vec![0; 512]].concat());
    assert_eq!(rig.write(6, &[8; 1024]), OK);
    assert_eq!(rig.clear(abi::VIRTIO_BLK_T_WRITE_ZEROES, &[(20, 2, 0)]), OK);
    assert_eq!(rig.request(abi::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    for (number, wanted) in
        [(5, sector(5)), (6, vec![8; 512]), (8, sector(8)), (20, vec![0; 512]), (1000, vec![0; 512])]
    {
        assert_eq!(rig.read(number, 512), (OK, wanted), "sector {number}");
    }
    assert_eq!(rig.read(2048, 512).0, IOERR);
    let mut closer = ImageCloser::new(rig.control.clone()).unwrap();
    closer.finish();
    qemu_check(&drive.path_on_host);
    assert_eq!(fs::read(&drive.backing_files[0].path_on_host).unwrap(), before);
}

#[test]
fn a_layered_drive_is_exchanged_but_not_for_itself() {
    let directory = tempfile::tempdir().unwrap();
    let Some(drive) = layered(directory.path()) else { return };
    let other = directory.path().join("other");
    fs::copy(&drive.path_on_host, &other).unwrap();
    let mut rig = Rig::new(&drive);
    assert_eq!(rig.write(0, &[1; 512]), OK);
    let to = |path: &Path| DrivePatch { path_on_host: Some(path.to_owned()), ..DrivePatch::default() };
    let error = crate::error_chain(&rig.control.update(&to(&drive.path_on_host)).unwrap_err());
    assert!(error.contains("in use"), "{error}");
    assert_eq!(rig.read(0, 512), (OK, vec![1; 512]));
    rig.control.update(&to(&other)).unwrap();
    assert_eq!(rig.read(0, 512), (OK, sector(0)));
    qemu_check(&drive.path_on_host);
}

#[test]
fn what_does_not_fit_the_format_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let Some(drive) = layered(directory.path()) else { return };
    let refused = |drive: Drive| crate::error_chain(&Block::open(&drive).err().unwrap());
    let base = drive.backing_files[0].clone();
    assert!(refused(Drive { backing_files: Vec::new(), ..drive.clone() }).contains("backing_files"));
    assert!(refused(Drive { backing_files: vec![base.clone(); 2], ..drive.clone() }).contains("is raw"));
    assert!(refused(Drive { format: DriveFormat::Raw, ..drive.clone() }).contains("is raw"));
    let wrong = BackingFile { format: DriveFormat::Qcow2, ..base };
    assert!(refused(Drive { backing_files: vec![wrong], ..drive }).contains("no qcow2 image"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a driver does to the queue, the device can be reset and then works, and the file keeps its size.
    #[test]
    fn no_driver_breaks_the_device(
        abuses in proptest::collection::vec(hostile::abuse(), 1..4), ring in any::<bool>(), event_idx in any::<bool>(),
    ) {
        let file = disk(SECTORS);
        let mut rig = Rig::over(&file, ENGINES[usize::from(ring)]);
        for abuse in &abuses {
            rig.driver.start(if event_idx { F_EVENT_IDX | F_INDIRECT_DESC } else { 0 });
            hostile::inflict(&mut rig.driver, 0, abuse);
        }
        rig.driver.start(0);
        prop_assert_eq!(rig.write(63, &[5; 512]), OK);
        prop_assert_eq!(rig.read(63, 512), (OK, vec![5; 512]));
        prop_assert_eq!(fs::metadata(file.path()).unwrap().len(), SECTORS * SECTOR);
    }
}
