//! The transport against the specification, with a device that only remembers.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::devices::pci::msix::testing::Recorder as SinkRecorder;
use crate::devices::virtio::lifecycle::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use crate::devices::virtio::testing::memory;
use crate::devices::virtio::{Activation, COMMON_FEATURES, F_VERSION_1, read_config_bytes};
use crate::kvm::Message;

#[derive(Default)]
struct Log {
    activations: Vec<u64>,
    sizes: Vec<u16>,
    interrupt: Option<Arc<Interrupt>>,
    notified: Vec<u16>,
    inline: bool,
}

#[derive(Default, Clone)]
struct Device(Arc<Mutex<Log>>);

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 256]
    }
    fn features(&self) -> u64 {
        1 << 40
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[1, 2, 3, 4, 5, 6], offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut log = self.0.lock().unwrap();
        log.activations.push(activation.features);
        log.sizes = activation.queues.iter().map(|queue| queue.size()).collect();
        log.interrupt = Some(activation.interrupt);
        Ok(())
    }
    fn reset(&mut self) {}
    fn serves_inline(&self) -> bool {
        self.0.lock().unwrap().inline
    }
    fn notify(&mut self, queue: u16) {
        self.0.lock().unwrap().notified.push(queue);
    }
}

#[derive(Default)]
struct Fake {
    messages: Mutex<Vec<Arc<Mutex<Option<Message>>>>>,
    doorbells: Mutex<Vec<Arc<Mutex<Option<u64>>>>>,
}

struct FakeDoorbell(Arc<Mutex<Option<u64>>>);

impl Doorbell for FakeDoorbell {
    fn place(&mut self, address: Option<u64>) -> io::Result<()> {
        *self.0.lock().unwrap() = address;
        Ok(())
    }
}

impl Connections for Fake {
    fn vector(&self) -> io::Result<Box<dyn Sink>> {
        let sink = SinkRecorder::new();
        self.messages.lock().unwrap().push(sink.connected.clone());
        Ok(Box::new(sink))
    }
    fn doorbell(&self, _event: Arc<EventFd>) -> Box<dyn Doorbell> {
        let place = Arc::new(Mutex::new(None));
        self.doorbells.lock().unwrap().push(place.clone());
        Box::new(FakeDoorbell(place))
    }
}

struct Driver {
    transport: PciTransport,
    fake: Fake,
    log: Arc<Mutex<Log>>,
}

fn driver(inline: bool) -> Driver {
    let device = Device::default();
    let log = device.0.clone();
    log.lock().unwrap().inline = inline;
    let fake = Fake::default();
    let transport = PciTransport::new(Box::new(device), memory(), &fake, 0xd000_8000).unwrap();
    Driver { transport, fake, log }
}

impl Driver {
    fn get(&mut self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.transport.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, width: usize, value: u64) {
        self.transport.write(offset, &value.to_le_bytes()[..width]);
    }

    fn config(&mut self, register: u64, width: usize) -> u32 {
        let mut data = [0; 4];
        self.transport.read_config(register, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn set_config(&mut self, register: u64, width: usize, value: u32) {
        self.transport.write_config(register, &value.to_le_bytes()[..width]);
    }

    fn negotiate(&mut self) {
        for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
            self.set(0x14, 1, status.into());
        }
        self.set(0x08, 4, 1);
        self.set(0x0c, 4, 1);
        self.set(0x14, 1, (ACKNOWLEDGE | DRIVER | FEATURES_OK).into());
    }

    /// Brings the device to DRIVER_OK with queues of 8 and queue vectors 1 and 2.
    fn start(&mut self) {
        self.negotiate();
        for queue in 0..2u64 {
            self.set(0x16, 2, queue);
            self.set(0x18, 2, 8);
            self.set(0x1a, 2, queue + 1);
            self.set(0x20, 8, 0x1_0000 * (queue + 1));
            self.set(0x28, 4, 0x1_0000 * (queue + 1) + 0x1000);
            self.set(0x30, 4, 0x1_0000 * (queue + 1) + 0x2000);
            self.set(0x1c, 2, 1);
        }
        self.set(0x14, 1, (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK).into());
    }
}

/// The capabilities: offset and bytes of each.
fn capabilities(driver: &mut Driver) -> Vec<(u64, [u8; 20])> {
    let mut found = Vec::new();
    let mut next = u64::from(driver.config(0x34, 1));
    while next != 0 && found.len() < 48 {
        let mut bytes = [0; 20];
        driver.transport.config.read(next, &mut bytes);
        found.push((next, bytes));
        next = bytes[1].into();
    }
    found
}

#[test]
fn identity_is_that_of_a_modern_device() {
    let mut driver = driver(false);
    assert_eq!(driver.config(0, 4), 0x1042_1af4);
    assert_eq!(driver.config(8, 4), 0x0100_0001);
    assert_eq!(driver.config(0x2c, 4), 0x0040_1af4);
}

#[test]
fn every_structure_of_the_specification_has_its_capability() {
    let mut driver = driver(false);
    let found = capabilities(&mut driver);
    let kinds: Vec<_> =
        found.iter().map(|(_, bytes)| (bytes[0], if bytes[0] == 9 { bytes[3] } else { 0 })).collect();
    assert_eq!(kinds, [(0x11, 0), (9, 1), (9, 2), (9, 3), (9, 4), (9, 5)]);
    let (_, msix) = found[0];
    assert_eq!(u16::from_le_bytes([msix[2], msix[3]]), 2, "three vectors: the number minus one");
    for (_, bytes) in &found[1..5] {
        let offset = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
        assert!(bytes[4] == 0 && offset + length <= REGISTERS_SIZE && length > 0 && offset.is_multiple_of(4));
        assert!(usize::from(bytes[2]) >= if bytes[3] == 2 { 20 } else { 16 });
    }
}

#[test]
fn device_is_activated_with_features_and_queues_set_by_any_width() {
    let mut driver = driver(false);
    driver.set(0x00, 4, 1);
    assert_eq!(driver.get(0x04, 4), (COMMON_FEATURES | 1 << 40) >> 32);
    assert_eq!(driver.get(0x12, 2), 2);
    assert_eq!(driver.get(0x18, 2), 16, "the largest size after a reset");
    driver.start();
    assert_eq!(driver.get(0x14, 1), 0xf);
    let log = driver.log.lock().unwrap();
    assert_eq!((&log.activations[..], &log.sizes[..]), (&[F_VERSION_1][..], &[8, 8][..]));
}

#[test]
fn fields_are_answered_at_their_own_width_only() {
    let mut driver = driver(false);
    driver.negotiate();
    driver.set(0x20, 8, 0x1122_3344_5566_7788);
    assert_eq!((driver.get(0x20, 4), driver.get(0x24, 4)), (0x5566_7788, 0x1122_3344));
    for (offset, width) in
        [(0x20, 1), (0x20, 2), (0x22, 4), (0x21, 8), (0x14, 4), (0x16, 1), (0x38, 4), (0x800, 8)]
    {
        assert_eq!(driver.get(offset, width), 0, "{offset:#x} {width}");
        driver.set(offset, width, u64::MAX);
    }
    assert_eq!(driver.get(0x20, 8), 0x1122_3344_5566_7788);
    assert_eq!(driver.get(0x14, 1), 0xb);
}

#[test]
fn a_queue_that_is_not_there_has_no_size_and_takes_nothing() {
    let mut driver = driver(false);
    driver.negotiate();
    driver.set(0x16, 2, 2);
    for (offset, width) in [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8)] {
        driver.set(offset, width, 1);
    }
    assert_eq!(
        (driver.get(0x18, 2), driver.get(0x1a, 2), driver.get(0x1c, 2), driver.get(0x20, 8)),
        (0, 0xffff, 0, 0)
    );
}

#[test]
fn vectors_that_do_not_exist_are_not_assigned() {
    let mut driver = driver(false);
    assert_eq!((driver.get(0x10, 2), driver.get(0x1a, 2)), (0xffff, 0xffff), "none after a reset");
    for (vector, got) in [(2, 2), (3, 0xffff), (0, 0), (0xffff, 0xffff)] {
        driver.set(0x10, 2, vector);
        driver.set(0x1a, 2, vector);
        assert_eq!((driver.get(0x10, 2), driver.get(0x1a, 2)), (got, got));
    }
}

#[test]
fn with_msix_a_queue_sends_on_its_vector_and_without_it_sets_the_isr() {
    let mut driver = driver(false);
    driver.start();
    let interrupt = driver.log.lock().unwrap().interrupt.clone().unwrap();
    interrupt.used_buffers(1);
    assert_eq!((driver.get(0x1000, 1), driver.get(0x1000, 1)), (1, 0), "reading clears");
    let (msix, _) = capabilities(&mut driver)[0];
    driver.set_config(4, 2, 6);
    driver.set_config(msix + 2, 2, 0x8000);
    let events = driver.transport.msix.events();
    interrupt.used_buffers(1);
    assert_eq!(driver.get(0x1000, 1), 0);
    assert!(events[0].read().is_err() && events[1].read().is_err());
    assert_eq!(events[2].read().unwrap(), 1);
    driver.set(0x10, 2, 0);
    interrupt.config_changed();
    assert_eq!((driver.get(0x1000, 1), events[0].read().unwrap()), (2, 1));
    // A reset takes the vectors away.
    driver.set(0x14, 1, 0);
    interrupt.used_buffers(1);
    assert!(events.iter().all(|event| event.read().is_err()));
}

#[test]
fn messages_of_the_table_reach_their_vectors() {
    let mut driver = driver(false);
    let (msix, _) = capabilities(&mut driver)[0];
    driver.set_config(4, 2, 6);
    driver.set_config(msix + 2, 2, 0x8000);
    driver.set(0x4010, 8, 0xfee0_1000);
    driver.set(0x4018, 8, 0x41);
    let messages: Vec<_> =
        driver.fake.messages.lock().unwrap().iter().map(|message| *message.lock().unwrap()).collect();
    assert_eq!(messages, [None, Some(Message { address: 0xfee0_1000, data: 0x41 }), None]);
    driver.set_config(4, 2, 2);
    assert!(driver.fake.messages.lock().unwrap().iter().all(|message| message.lock().unwrap().is_none()));
}

#[test]
fn doorbells_follow_the_registers() {
    let mut driver = driver(false);
    let places = |driver: &Driver| -> Vec<_> {
        driver.fake.doorbells.lock().unwrap().iter().map(|place| *place.lock().unwrap()).collect()
    };
    driver.transport.placed(Some(0xd000_8000));
    assert_eq!(places(&driver), [Some(0xd000_b000), Some(0xd000_b004)]);
    driver.transport.placed(None);
    assert_eq!(places(&driver), [None, None]);
}

#[test]
fn a_notification_of_any_width_reaches_an_inline_device_while_it_runs() {
    let mut driver = driver(true);
    driver.set(0x3004, 2, 1);
    driver.start();
    for (offset, width) in [(0x3004, 2), (0x3000, 4), (0x3004, 8), (0x3008, 2), (0x3002, 2)] {
        driver.set(offset, width, 7);
    }
    assert_eq!(driver.log.lock().unwrap().notified, [1, 0, 1]);
}

#[test]
fn configuration_space_leads_to_the_registers() {
    let mut driver = driver(false);
    let (window, _) = capabilities(&mut driver)[5];
    driver.set_config(window + 8, 4, 0x14);
    driver.set_config(window + 12, 4, 1);
    driver.set_config(window + 16, 4, 1);
    assert_eq!(driver.get(0x14, 1), 1);
    assert_eq!(driver.config(window + 16, 4) & 0xff, 1);
    // To the device configuration, two bytes.
    driver.set_config(window + 8, 4, 0x2002);
    driver.set_config(window + 12, 4, 2);
    assert_eq!(driver.config(window + 16, 2), 0x0403);
    // What makes no sense leads nowhere.
    for (bar, offset, length) in [(1, 0x14, 1), (0, 0x15, 2), (0, 0x14, 3), (0, 0x8000, 1), (0, u32::MAX, 1)]
    {
        driver.set_config(window + 4, 1, bar);
        driver.set_config(window + 8, 4, offset);
        driver.set_config(window + 12, 4, length);
        driver.set_config(window + 16, 4, 3);
        assert_eq!(driver.get(0x14, 1), 1);
    }
}

#[test]
fn every_offset_in_every_width_is_harmless() {
    for running in [false, true] {
        let mut driver = driver(false);
        if running {
            driver.start();
        }
        for offset in (0..u64::from(REGISTERS_SIZE)).chain([u64::MAX - 8]) {
            for width in [0, 1, 2, 3, 4, 8] {
                let mut data = [0xff; 8];
                driver.transport.write(offset, &data[..width]);
                driver.transport.read(offset, &mut data[..width]);
            }
        }
        for register in (0..0x1000).chain([u64::MAX - 8]) {
            for width in [0, 1, 2, 3, 4, 8] {
                let mut data = [0xff; 8];
                driver.transport.write_config(register, &data[..width]);
                driver.transport.read_config(register, &mut data[..width]);
            }
        }
        assert_eq!(driver.config(0, 4), 0x1042_1af4);
    }
}

proptest! {
    /// Whatever is written, no vector is connected unless MSI-X is on, and identity and capabilities stay.
    #[test]
    fn any_access_is_harmless(
        accesses in proptest::collection::vec(
            (any::<bool>(),
             prop_oneof![0u64..0x60, 0u64..0x6000, 0x4000u64..0x4040, any::<u64>()],
             proptest::collection::vec(any::<u8>(), 0..9)),
            0..96),
    ) {
        let mut driver = driver(false);
        let before = capabilities(&mut driver).iter().map(|(at, bytes)| (*at, bytes[0])).collect::<Vec<_>>();
        for (config, offset, mut data) in accesses {
            if config {
                driver.transport.write_config(offset, &data);
                driver.transport.read_config(offset, &mut data);
            } else {
                driver.transport.write(offset, &data);
                driver.transport.read(offset, &mut data);
            }
            let connected = driver.fake.messages.lock().unwrap().iter().any(|message| message.lock().unwrap().is_some());
            prop_assert!(!connected || driver.transport.msix.is_enabled());
        }
        prop_assert_eq!(driver.config(0, 4), 0x1042_1af4);
        let after = capabilities(&mut driver).iter().map(|(at, bytes)| (*at, bytes[0])).collect::<Vec<_>>();
        prop_assert_eq!(before, after);
    }
}
