//! The transport against the specification, with a device that only remembers.

use std::sync::Mutex;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::devices::virtio::lifecycle::status::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET,
};
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::testing::{Driver, MEMORY_BYTES, SIZE, memory};
use crate::devices::virtio::{Activation, COMMON_FEATURES, F_EVENT_IDX, F_VERSION_1, read_config_bytes};

const OWN_FEATURES: u64 = 1 << 5 | 1 << 40;
const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// What happened to the device.
#[derive(Default)]
struct Log {
    activations: Vec<u64>,
    resets: usize,
    queues: Vec<VirtQueue>,
    interrupt: Option<Arc<Interrupt>>,
    notified: Vec<u16>,
    config: [u8; 6],
}

#[derive(Clone, Default)]
struct Recorder {
    log: Arc<Mutex<Log>>,
    inline: bool,
    refuses: bool,
}

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE, 256]
    }
    fn features(&self) -> u64 {
        OWN_FEATURES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.log.lock().unwrap().config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let config = &mut self.log.lock().unwrap().config;
        for (at, byte) in (offset..).zip(data) {
            if let Some(to) = usize::try_from(at).ok().and_then(|at| config.get_mut(at)) {
                *to = *byte;
            }
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut log = self.log.lock().unwrap();
        log.activations.push(activation.features);
        log.queues = activation.queues;
        log.interrupt = Some(activation.interrupt);
        if self.refuses { Err(DeviceError::QueueCount { device: "test", given: 2 }) } else { Ok(()) }
    }
    fn reset(&mut self) {
        let mut log = self.log.lock().unwrap();
        log.resets += 1;
        log.queues.clear();
    }
    fn serves_inline(&self) -> bool {
        self.inline
    }
    fn notify(&mut self, queue: u16) {
        self.log.lock().unwrap().notified.push(queue);
    }
}

fn driver() -> (Driver, Arc<Mutex<Log>>) {
    let device = Recorder::default();
    let log = device.log.clone();
    (Driver::new(Box::new(device)), log)
}

#[test]
fn identity_registers_are_those_of_version_2() {
    let (mut driver, _log) = driver();
    assert_eq!([0, 4, 8].map(|offset| driver.read(offset)), [0x7472_6976, 2, 42]);
    assert_eq!(driver.read(0xb0), u32::MAX);
}

#[test]
fn all_features_are_offered_in_halves() {
    let (mut driver, _log) = driver();
    assert_eq!(driver.offered(), OWN_FEATURES | COMMON_FEATURES);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [F_VERSION_1 | 1, F_VERSION_1 | 1 << 63, 0, OWN_FEATURES] {
        let (mut driver, _log) = driver();
        assert!(!driver.negotiate(features), "{features:#x}");
        // A driver may try again with other features.
        driver.write(0x24, 0);
        driver.write(0x20, 1 << 5);
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, (ACKNOWLEDGE | DRIVER | FEATURES_OK).into());
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }
}

#[test]
fn features_are_fixed_once_agreed_on() {
    let (mut driver, log) = driver();
    assert!(driver.negotiate(F_VERSION_1));
    driver.write(0x24, 0);
    driver.write(0x20, 1 << 5);
    for queue in 0..2 {
        driver.set_up_queue(queue, SIZE);
    }
    driver.write(0x70, RUNNING.into());
    driver.write(0x20, u32::MAX);
    assert_eq!(log.lock().unwrap().activations, [F_VERSION_1]);
}

#[test]
fn device_is_activated_once_with_its_features_and_queues() {
    let (mut driver, log) = driver();
    driver.start(OWN_FEATURES | F_EVENT_IDX);
    driver.write(0x70, RUNNING.into());
    let log = log.lock().unwrap();
    assert_eq!(log.activations, [OWN_FEATURES | F_EVENT_IDX | F_VERSION_1]);
    assert_eq!(log.queues.iter().map(VirtQueue::size).collect::<Vec<_>>(), [SIZE, SIZE]);
}

#[test]
fn queues_can_only_be_set_up_between_features_ok_and_driver_ok() {
    let (mut driver, _log) = driver();
    driver.set_up_queue(0, SIZE);
    assert_eq!(driver.read(0x44), 0);
    driver.start(0);
    driver.write(0x30, 0);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x44), 0);
}

#[test]
fn queue_that_is_not_there_has_size_0_and_takes_nothing() {
    let (mut driver, _log) = driver();
    assert!(driver.negotiate(F_VERSION_1));
    for (queue, max) in [(0, u32::from(SIZE)), (1, 256), (2, 0), (u32::MAX, 0)] {
        driver.write(0x30, queue);
        assert_eq!(driver.read(0x34), max);
        driver.write(0x44, 1);
        assert_eq!(driver.read(0x44), u32::from(queue < 2));
    }
}

#[test]
fn unusable_queues_set_needs_reset_with_an_interrupt_and_a_reset_heals() {
    let end = MEMORY_BYTES as u32;
    // (register, value): size not a power of two, zero, too large; rings misaligned or not memory; not ready.
    for (register, value) in [
        (0x38, 3),
        (0x38, 0),
        (0x38, 512),
        (0x38, 1 << 16),
        (0x80, 0x1_0008),
        (0x90, 0x1_1001),
        (0xa0, 0x1_2002),
        (0x80, end),
        (0x94, 1),
        (0xa0, end - 4),
        (0x44, 0),
    ] {
        let (mut driver, log) = driver();
        assert!(driver.negotiate(F_VERSION_1));
        driver.set_up_queue(0, SIZE);
        driver.set_up_queue(1, SIZE);
        driver.write(register, value);
        driver.write(0x70, RUNNING.into());
        assert_eq!(driver.status(), RUNNING | NEEDS_RESET, "{register:#x} {value:#x}");
        assert_eq!(driver.read(0x60), INTERRUPT_CONFIG);
        assert!(driver.irq.read().is_ok());
        assert!(log.lock().unwrap().activations.is_empty());
        driver.start(0);
        assert_eq!(log.lock().unwrap().activations.len(), 1);
    }
}

#[test]
fn device_that_refuses_to_start_sets_needs_reset() {
    let mut driver = Driver::new(Box::new(Recorder { refuses: true, ..Recorder::default() }));
    assert!(driver.negotiate(F_VERSION_1));
    driver.set_up_queue(0, SIZE);
    driver.set_up_queue(1, SIZE);
    driver.write(0x70, RUNNING.into());
    assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
}

#[test]
fn reset_stops_the_device_and_forgets_everything() {
    let (mut driver, log) = driver();
    driver.start(OWN_FEATURES);
    let interrupt = log.lock().unwrap().interrupt.clone().unwrap();
    interrupt.used_buffers(0);
    interrupt.set_needs_reset();
    assert_eq!(driver.read(0x60), INTERRUPT_USED | INTERRUPT_CONFIG);
    let resets = log.lock().unwrap().resets;
    driver.write(0x70, 0);
    assert_eq!(log.lock().unwrap().resets, resets + 1);
    assert_eq!([0x70, 0x60, 0x44].map(|offset| driver.read(offset)), [0, 0, 0]);
}

#[test]
fn bits_of_the_status_that_do_not_exist_do_not_reset() {
    let (mut driver, _log) = driver();
    driver.start(0);
    driver.write(0x70, 0x100);
    assert_eq!(driver.status(), RUNNING);
    driver.write(0x70, FAILED.into());
    assert_eq!(driver.status(), RUNNING | FAILED);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let (mut driver, log) = driver();
    driver.start(0);
    let interrupt = log.lock().unwrap().interrupt.clone().unwrap();
    interrupt.used_buffers(1);
    interrupt.config_changed();
    assert_eq!(driver.irq.read().unwrap(), 2);
    driver.write(0x64, INTERRUPT_USED);
    assert_eq!(driver.read(0x60), INTERRUPT_CONFIG);
    driver.write(0x64, u32::MAX);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn notification_by_register_reaches_the_eventfd_of_a_running_queue() {
    let (mut driver, _log) = driver();
    let notifiers: Vec<_> = driver.transport.queue_notifiers().to_vec();
    assert_eq!(notifiers.len(), 2);
    driver.kick(1);
    assert!(notifiers[1].read().is_err(), "not running yet");
    driver.start(0);
    for queue in [1, 2, 0x1_0001, usize::MAX] {
        driver.kick(queue);
    }
    assert_eq!(notifiers[1].read().unwrap(), 1);
    assert!(notifiers[0].read().is_err());
}

#[test]
fn device_that_serves_inline_is_called_and_has_no_eventfds() {
    let device = Recorder { inline: true, ..Recorder::default() };
    let log = device.log.clone();
    let mut driver = Driver::new(Box::new(device));
    assert!(driver.transport.queue_notifiers().is_empty());
    driver.kick(0);
    driver.start(0);
    for queue in [1, 0, 2, 65_536] {
        driver.kick(queue);
    }
    assert_eq!(log.lock().unwrap().notified, [1, 0]);
}

#[test]
fn config_space_takes_any_width_and_reads_zeros_past_its_end() {
    let (mut driver, _log) = driver();
    driver.transport.write(0x101, &[1, 2, 3]);
    driver.transport.write(0x105, &[4, 5, 6, 7]);
    let mut data = [9; 10];
    driver.transport.read(0x100, &mut data);
    assert_eq!(data, [0, 1, 2, 3, 0, 4, 0, 0, 0, 0]);
    driver.transport.read(u64::MAX, &mut data[..1]);
    assert_eq!(data[0], 0);
}

#[test]
fn registers_answer_their_own_offset_and_width_only() {
    let (mut driver, _log) = driver();
    for (offset, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x71, 4)] {
        let mut data = vec![9; width];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; width], "{offset:#x} {width}");
    }
    driver.transport.write(0x70, &[1]);
    driver.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    driver.transport.write(0x6e, &[1, 0, 1, 0]);
    assert_eq!(driver.status(), 0);
}

fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let register = prop_oneof![
        4 => (0u64..0x40).prop_map(|n| n * 4),
        2 => Just(0x70),
        1 => 0u64..0x1100,
        1 => any::<u64>(),
    ];
    let data = prop_oneof![
        4 => prop_oneof![0u32..16, any::<u32>()].prop_map(|value| value.to_le_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..9),
    ];
    (prop::bool::weighted(0.7), register, data)
}

proptest! {
    /// Every width at every offset, in every order: no panic, a status that can be reached, and never an activation
    /// with features that weren't offered or with queues that aren't memory.
    #[test]
    fn any_access_is_harmless(accesses in proptest::collection::vec(access(), 0..200)) {
        let device = Recorder::default();
        let log = device.log.clone();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut transport = MmioTransport::new(Box::new(device), memory(), irq).unwrap();
        for (write, offset, mut data) in accesses {
            if write { transport.write(offset, &data) } else { transport.read(offset, &mut data) }
            let mut status = [0; 4];
            transport.read(0x70, &mut status);
            let status = status[0];
            for (bit, needs) in [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)] {
                prop_assert!(status & bit == 0 || status & needs != 0);
            }
            for features in &log.lock().unwrap().activations {
                prop_assert_eq!(features & !(OWN_FEATURES | COMMON_FEATURES), 0);
                prop_assert!(features & F_VERSION_1 != 0);
            }
        }
    }
}
