//! Guests that break the rules of virtio: registers, rings and memory of every device.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use mote_vmm_api as api;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Input;
use super::files::memory_file;
use crate::devices::EventSource;
use crate::devices::bus::{Bus, BusDevice};
use crate::devices::pci::host::PciHost;
use crate::devices::pci::msix::Sink;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console::VirtioConsole;
use crate::devices::virtio::mem::{Mem, Slots};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pci::{Connections, Doorbell, PciTransport};
use crate::devices::virtio::pmem::{Pmem, PmemFile};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::testing::{BUFFERS, Driver, HIGH, MEMORY_BYTES, SIZE, memory as driver_memory};
use crate::devices::virtio::vhost::block::testing::{Fake, Manner};
use crate::devices::virtio::vsock::{SocketFile, Vsock};
use crate::devices::virtio::{F_VERSION_1, VirtioDevice};
use crate::kvm::Message;
use crate::layout;
use crate::memory::{self, GuestMemory, Hotplug};
use crate::snapshot::DeviceState;

/// Most steps of one input.
const MAX_STEPS: usize = 100;
const DISK_BYTES: u64 = 1 << 20;

/// A guest's address: mostly of its buffers and rings, now and then of anything.
fn address(input: &mut Input<'_>) -> Option<u64> {
    let kind = input.byte()?;
    let offset = u64::from(input.u16()?);
    Some(match kind % 8 {
        0..4 => BUFFERS + offset,
        4 | 5 => 0x1_0000 * (1 + u64::from(kind >> 3) % 5) + offset % 0x3000,
        6 => HIGH - 0x1010 + offset % 0x2000,
        _ if kind > 128 => MEMORY_BYTES as u64 - 16 + offset % 32,
        _ => input.u64()?,
    })
}

/// One thing that a driver does; None at the end of the input.
fn step(driver: &mut Driver, queues: usize, input: &mut Input<'_>) -> Option<()> {
    let kind = input.byte()?;
    let queue = usize::from(kind >> 4) % queues;
    match kind % 16 {
        0..4 => {
            let index = u16::from(input.byte()?) % (SIZE + 1);
            let (address, length) = (address(input)?, input.u32()?);
            let flags = input.byte()?;
            // Mostly lengths that are worth something, and known flags.
            let length = if flags & 0x80 == 0 { length % 4096 } else { length };
            let flags = if flags & 0x40 == 0 { u16::from(flags & 7) } else { u16::from(flags) << 3 };
            driver.descriptor(queue, index, (address, length, flags, (index + 1) % SIZE));
        }
        4 | 5 => driver.offer(queue, u16::from(input.byte()?) % (SIZE + 1)),
        6 => driver.set_available(queue, input.u16()?),
        7..10 => driver.kick(queue),
        10 | 11 => {
            let at = address(input)?;
            let bytes = input.piece()?;
            // Where there is no memory, there is nothing to write to.
            let _ = driver.mem.write(bytes, GuestAddress(at));
        }
        12 => {
            let (offset, width) = (u64::from(input.u16()?) % 0x1000, usize::from(kind >> 4) % 8 + 1);
            let value = input.u64()?.to_le_bytes();
            driver.transport.write(offset, &value[..width]);
        }
        13 => {
            let offset = u64::from(input.u16()?) % 0x1000;
            let mut data = [0xaa; 8];
            driver.transport.read(offset, &mut data[..usize::from(kind >> 4) % 8 + 1]);
        }
        14 => {
            let features = input.u64()?;
            driver.write(0x70, 0);
            let offered = driver.offered();
            driver.try_start(features & offered & !F_VERSION_1);
        }
        _ => drop(driver.irq.read()),
    }
    Some(())
}

/// A driver that does what the input says with a running device, and then resets it: the device must come back from all.
fn abuse(device: Box<dyn VirtioDevice>, data: &[u8]) {
    abuse_in(device, driver_memory(), data);
}

fn abuse_in(device: Box<dyn VirtioDevice>, memory: GuestMemory, data: &[u8]) {
    let mut input = Input(data);
    let queues = device.queue_max_sizes().len();
    let mut driver = Driver::with_memory(device, memory);
    let features = input.u64().unwrap_or(0);
    let offered = driver.offered();
    driver.try_start(features & offered & !F_VERSION_1);
    for _ in 0..MAX_STEPS {
        if step(&mut driver, queues, &mut input).is_none() {
            break;
        }
    }
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 0, "a reset device");
}

/// An empty disk.
pub fn disk() -> (File, PathBuf) {
    let (file, path) = memory_file(&[]);
    file.set_len(DISK_BYTES).expect("memory");
    (file, path)
}

/// A limit that is reached at once, and soon has more.
const fn bucket(size: u64) -> api::TokenBucket {
    api::TokenBucket { size, one_time_burst: None, refill_time: 1 }
}

/// A drive with several queues that is flushed.
pub fn new_block(path_on_host: PathBuf, ring: bool) -> Box<dyn VirtioDevice> {
    let drive = api::Drive {
        drive_id: "fuzz".into(),
        path_on_host,
        cache_type: api::CacheType::Writeback,
        num_queues: Some(2),
        io_engine: if ring { api::IoEngine::Async } else { api::IoEngine::Sync },
        ..api::Drive::default()
    };
    Box::new(Block::open(&drive).expect("a drive"))
}

/// A drive: several queues, flushes, both engines.
pub fn block(data: &[u8]) {
    let (_file, path) = disk();
    abuse(new_block(path, data.len().is_multiple_of(4)), data);
}

/// A drive that another process serves, which answers what the input says: here only what the device itself does.
pub fn vhost(data: &[u8]) {
    let mut input = Input(data);
    let (flipped, most, base) = (input.byte(), input.byte(), input.u32());
    let mut manner = Manner { queues: 2, ..Manner::default() };
    manner.most_queues = most.unwrap_or(0).into();
    manner.base = base.unwrap_or(0);
    // One bit of the features is another one than usual, now and then.
    manner.features ^= flipped.filter(|bit| *bit < 64).map_or(0, |bit| 1 << bit);
    let backend = Fake::new(manner);
    let drive =
        api::Drive { num_queues: Some(4), cache_type: api::CacheType::Writeback, ..api::Drive::default() };
    let Ok(device) = backend.open(&drive) else { return };
    let control = device.control();
    if data.len() % 8 == 7 {
        backend.hang_up();
    }
    abuse_in(Box::new(device), memory::create(4).expect("memory"), input.0);
    backend.set_sectors(data.len() as u64);
    let _ = control.update(&api::DrivePatch::default());
}

/// A network interface, and what is on its wire.
pub fn new_net(several: bool) -> (Box<dyn VirtioDevice>, UnixDatagram) {
    let (net, wire) = Net::for_fuzzing(several);
    (Box::new(net), wire)
}

/// A network interface with the metadata service, on a tap that has a frame for the guest now and then.
pub fn net(data: &[u8]) {
    let (net, wire) = new_net(data.len() % 2 == 1);
    for piece in data.chunks(97).take(8) {
        // A full tap takes no more.
        let _ = wire.send(piece);
    }
    abuse(net, data);
}

/// A persistent memory device.
pub fn new_pmem(path_on_host: PathBuf, limited: bool) -> Box<dyn VirtioDevice> {
    let rate_limiter = limited.then_some(api::RateLimiter { bandwidth: None, ops: Some(bucket(3)) });
    let config = api::Pmem { id: "fuzz".into(), path_on_host, rate_limiter, ..api::Pmem::default() };
    let file = PmemFile::open(&config).expect("a file");
    Box::new(Pmem::new(&config, file, layout::MMIO_HOLE_END).expect("a device"))
}

/// A persistent memory device, with a limit and without.
pub fn pmem(data: &[u8]) {
    let (_file, path) = disk();
    abuse(new_pmem(path, data.len() % 2 == 1), data);
}

/// The entropy device.
pub fn new_rng(limited: bool) -> Box<dyn VirtioDevice> {
    let rate_limiter = limited.then_some(api::RateLimiter { bandwidth: Some(bucket(1000)), ops: None });
    Box::new(Rng::open(&api::Entropy { rate_limiter }).expect("a device"))
}

/// The entropy device, with a limit and without.
pub fn rng(data: &[u8]) {
    abuse(new_rng(data.len() % 2 == 1), data);
}

/// A balloon with all its queues.
pub fn new_balloon() -> Balloon {
    let config = api::Balloon {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    Balloon::open(&config).expect("a balloon")
}

/// The balloon with all its queues.
pub fn balloon(data: &[u8]) {
    let balloon = new_balloon();
    let control = balloon.control();
    let _ = control.start_hinting(true);
    abuse(Box::new(balloon), data);
    let _ = (control.statistics(), control.hinting_status());
}

/// Memory that can be plugged.
pub fn new_mem() -> Mem {
    let config = api::MemoryHotplug { total_size_mib: 256, block_size_mib: 2, slot_size_mib: 128 };
    let hotplug = Hotplug { bytes: 256 << 20, block_bytes: 2 << 20 };
    let memory = memory::create_with(1, api::HugePages::None, Some(hotplug)).expect("memory");
    Mem::new(&config, &memory, Arc::new(Nobody)).expect("a device")
}

/// Memory that can be plugged, half of which the guest is asked to have.
pub fn mem(data: &[u8]) {
    let mem = new_mem();
    let control = mem.control();
    control.request(128).expect("half of it");
    abuse(Box::new(mem), data);
    let status = control.status();
    assert!(status.plugged_size_mib <= status.requested_size_mib, "{status:?}");
}

/// A console with output to nowhere.
pub fn new_console(sized: bool) -> VirtioConsole {
    let size = sized.then_some(api::ConsoleSize { columns: 80, rows: 25 });
    let config = api::Console { output_path: Some("/dev/null".into()), size, ..api::Console::default() };
    VirtioConsole::open(&config).expect("a console")
}

/// A console with input that waits, and output to nowhere.
pub fn console(data: &[u8]) {
    let mut console = new_console(data.len().is_multiple_of(2));
    let input = serde_json::json!({"input": &data[..data.len().min(64)]});
    console.restore(&DeviceState::new(&input).expect("plain data")).expect("input");
    abuse(Box::new(console), data);
}

/// The socket device, with nobody behind it.
pub fn new_vsock() -> (Box<dyn VirtioDevice>, SocketFile) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("mote-fuzz-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let config = api::Vsock { guest_cid: 3, uds_path: std::env::temp_dir().join(name), vsock_id: None };
    let vsock = Vsock::open(&config).expect("a socket");
    let file = vsock.socket_file().expect("an eventfd");
    (Box::new(vsock), file)
}

/// The socket device, with nobody behind it.
pub fn vsock(data: &[u8]) {
    let (vsock, mut file) = new_vsock();
    abuse(vsock, data);
    file.finish();
}

/// Interrupts and doorbells of nobody.
pub struct Nobody;

struct Vector(Arc<EventFd>);

impl Sink for Vector {
    fn event(&self) -> &Arc<EventFd> {
        &self.0
    }
    fn connect(&mut self, _message: Message) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&mut self) {}
}

impl Slots for Nobody {
    fn show(&self, _index: u32, _visible: bool) -> io::Result<()> {
        Ok(())
    }
}

impl Doorbell for Nobody {
    fn place(&mut self, _address: Option<u64>) -> io::Result<()> {
        Ok(())
    }
}

impl Connections for Nobody {
    fn vector(&self) -> io::Result<Box<dyn Sink>> {
        Ok(Box::new(Vector(Arc::new(EventFd::new(EFD_NONBLOCK)?))))
    }
    fn doorbell(&self, _event: Arc<EventFd>) -> Box<dyn Doorbell> {
        Box::new(Self)
    }
}

/// The PCI bus with a drive and an entropy device: configuration space and registers, any width, wherever the guest puts them.
pub fn pci(data: &[u8]) {
    let mmio = Arc::new(Bus::default());
    let host = Arc::new(Mutex::new(PciHost::new(mmio.clone())));
    mmio.insert(layout::PCI_ECAM, layout::PCI_ECAM_SIZE, host.clone()).expect("an empty bus");
    let (_file, path_on_host) = disk();
    let drive = api::Drive { drive_id: "fuzz".into(), path_on_host, ..api::Drive::default() };
    let block: Box<dyn VirtioDevice> = Box::new(Block::open(&drive).expect("a drive"));
    let rng: Box<dyn VirtioDevice> = Box::new(Rng::open(&api::Entropy::default()).expect("a device"));
    let mut slots = Vec::new();
    for (index, device) in [block, rng].into_iter().enumerate() {
        let address = layout::PCI_WINDOW as u32 + index as u32 * 0x8000;
        let transport = PciTransport::new(device, driver_memory(), &Nobody, address).expect("a transport");
        let mut host = host.lock().expect("no panic while locked");
        let slot = host.free_slot().expect("a free slot");
        assert!(host.insert(slot, Arc::new(Mutex::new(transport))));
        slots.push(slot);
    }
    let mut input = Input(data);
    for _ in 0..4 * MAX_STEPS {
        let Some(kind) = input.byte() else { break };
        let Some(offset) = input.u16() else { break };
        let width = [1, 2, 4, 8][usize::from(kind >> 2) % 4];
        let address = match kind % 4 {
            0 | 1 => layout::PCI_ECAM + u64::from(kind >> 4 & 3) * 0x8000 + u64::from(offset) % 0x1000,
            2 => layout::PCI_WINDOW + u64::from(kind >> 4 & 1) * 0x8000 + u64::from(offset) % 0x8000,
            _ => {
                let Some(page) = input.u32() else { break };
                layout::PCI_WINDOW
                    + u64::from(page) % layout::PCI_WINDOW_SIZE / 0x1000 * 0x1000
                    + u64::from(offset)
            }
        };
        if kind & 0x80 == 0 {
            let Some(value) = input.u64() else { break };
            mmio.write(address, &value.to_le_bytes()[..width]);
        } else {
            mmio.read(address, &mut [0; 8][..width]);
        }
    }
    // Bus and bridge hold each other, which a process that ends need not care about.
    let mut host = host.lock().expect("no panic while locked");
    for slot in slots {
        assert!(host.remove(slot).is_some());
    }
    drop(host);
    mmio.remove(layout::PCI_ECAM);
}
