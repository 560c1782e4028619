//! i8042 keyboard controller: enough for Linux to find a keyboard, for Ctrl-Alt-Del from the host, and for a guest that
//! resets the machine through it.
//!
//! Ports 0x60 (data) and 0x64 (status, command); everything else in the range reads as zero. Command and status bits as
//! in the IBM PS/2 Hardware Interface Technical Reference and Linux's `include/linux/i8042.h`.

use std::collections::VecDeque;

use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::metrics::I8042 as I8042_METRICS;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// First port, and the length of the range.
pub const BASE_PORT: u16 = 0x60;
/// Length of the port range: up to and including 0x64.
pub const PORTS: u16 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Bytes that may wait for the guest.
const BUFFER_BYTES: usize = 16;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_UNLOCKED: u8 = 0x10;

const CONFIG_KEYBOARD_INTERRUPT: u8 = 0x01;
const CONFIG_SYSTEM: u8 = 0x04;
const CONFIG_TRANSLATE: u8 = 0x40;

const COMMAND_READ_CONFIG: u8 = 0x20;
const COMMAND_WRITE_CONFIG: u8 = 0x60;
const COMMAND_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD: u8 = 0xab;
const COMMAND_READ_OUTPUT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT: u8 = 0xd1;
/// Pulses the reset line of the CPU.
const COMMAND_RESET: u8 = 0xfe;

const KEYBOARD_ACK: u8 = 0xfa;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_RESET: u8 = 0xff;

/// Ctrl, Alt, Del pressed and released, in scan code set 2 (what a keyboard sends)…
const CTRL_ALT_DEL_SET_2: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// … and in set 1 (what the controller makes of it when told to translate).
const CTRL_ALT_DEL_SET_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// The guest has not read what was sent before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest does not read its keyboard")]
pub struct KeyboardBusy;

/// The controller with its keyboard.
pub struct I8042 {
    reset: Box<dyn FnMut() + Send>,
    irq: EventFd,
    config: u8,
    output_port: u8,
    /// The command whose parameter is the next byte on the data port.
    awaiting: Option<u8>,
    buffer: VecDeque<u8>,
}

impl I8042 {
    /// `irq` is interrupt 1, `reset` is called whenever the guest resets the machine.
    pub fn new(irq: EventFd, reset: impl FnMut() + Send + 'static) -> Self {
        Self {
            reset: Box::new(reset),
            irq,
            config: CONFIG_SYSTEM | CONFIG_KEYBOARD_INTERRUPT,
            output_port: 0,
            awaiting: None,
            buffer: VecDeque::new(),
        }
    }

    /// Presses and releases Ctrl-Alt-Del.
    ///
    /// # Errors
    /// The guest hasn't read earlier keys.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), KeyboardBusy> {
        let keys: &[u8] =
            if self.config & CONFIG_TRANSLATE == 0 { &CTRL_ALT_DEL_SET_2 } else { &CTRL_ALT_DEL_SET_1 };
        if !self.buffer.is_empty() {
            return Err(KeyboardBusy);
        }
        self.buffer.extend(keys);
        self.interrupt();
        Ok(())
    }

    fn interrupt(&self) {
        if self.config & CONFIG_KEYBOARD_INTERRUPT != 0 && !self.buffer.is_empty() {
            // Fails only if the counter is full, and then the interrupt is pending anyway.
            let _ = self.irq.write(1);
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        // A guest that never reads gets no more than the buffer holds.
        let room = BUFFER_BYTES.saturating_sub(self.buffer.len());
        self.buffer.extend(bytes.iter().take(room));
    }

    /// An answer of the controller itself, in place of what waited.
    fn answer_at_once(&mut self, byte: u8) {
        self.buffer.clear();
        self.buffer.push_back(byte);
    }

    fn command(&mut self, command: u8) {
        self.awaiting = None;
        match command {
            COMMAND_RESET => {
                I8042_METRICS.reset_count.add_one();
                (self.reset)();
            }
            COMMAND_READ_CONFIG => self.answer_at_once(self.config),
            COMMAND_READ_OUTPUT => self.answer_at_once(self.output_port),
            COMMAND_TEST => self.answer_at_once(0x55),
            COMMAND_TEST_KEYBOARD => self.answer_at_once(0),
            COMMAND_WRITE_CONFIG | COMMAND_WRITE_OUTPUT => self.awaiting = Some(command),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        match self.awaiting.take() {
            Some(COMMAND_WRITE_CONFIG) => self.config = byte,
            Some(_) => self.output_port = byte,
            None => {
                match byte {
                    KEYBOARD_RESET => self.answer(&[KEYBOARD_ACK, 0xaa]),
                    KEYBOARD_IDENTIFY => self.answer(&[KEYBOARD_ACK, 0xab, 0x83]),
                    _ => self.answer(&[KEYBOARD_ACK]),
                }
                self.interrupt();
            }
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [byte] = data else { return I8042_METRICS.missed_read_count.add_one() };
        I8042_METRICS.read_count.add_one();
        match offset {
            DATA => {
                *byte = self.buffer.pop_front().unwrap_or(0);
                // One interrupt for each byte.
                self.interrupt();
            }
            COMMAND => {
                let full = if self.buffer.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
                *byte = STATUS_UNLOCKED | STATUS_SYSTEM | full;
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [byte] = *data else { return I8042_METRICS.missed_write_count.add_one() };
        I8042_METRICS.write_count.add_one();
        match offset {
            DATA => self.data(byte),
            COMMAND => self.command(byte),
            _ => {}
        }
    }
}

/// The controller in a snapshot.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct I8042State {
    config: u8,
    output_port: u8,
    awaiting: Option<u8>,
    buffer: Vec<u8>,
}

impl Stateful for I8042 {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&I8042State {
            config: self.config,
            output_port: self.output_port,
            awaiting: self.awaiting,
            buffer: self.buffer.iter().copied().collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: I8042State = state.get()?;
        if state.buffer.len() > BUFFER_BYTES {
            return Err(StateError::new("more keys wait than its buffer holds"));
        }
        self.config = state.config;
        self.output_port = state.output_port;
        self.awaiting = state.awaiting;
        self.buffer = state.buffer.into();
        Ok(())
    }

    /// An interrupt for a key may have been on its way.
    fn resume(&mut self) {
        self.interrupt();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn controller() -> (I8042, EventFd, EventFd) {
        let (reset, irq) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let signal = reset.try_clone().unwrap();
        (I8042::new(irq.try_clone().unwrap(), move || signal.write(1).unwrap()), reset, irq)
    }

    fn inb(device: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0xee];
        device.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn reset_command_signals_the_reset_event() {
        let (mut device, reset, _irq) = controller();
        device.write(COMMAND, &[COMMAND_RESET]);
        assert_eq!(reset.read().unwrap(), 1);
    }

    #[test]
    fn config_is_written_and_read_back() {
        let (mut device, _reset, _irq) = controller();
        device.write(COMMAND, &[COMMAND_WRITE_CONFIG]);
        device.write(DATA, &[0x47]);
        device.write(COMMAND, &[COMMAND_READ_CONFIG]);
        assert_eq!(inb(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 1);
        assert_eq!(inb(&mut device, DATA), 0x47);
        assert_eq!(inb(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn ctrl_alt_del_comes_byte_by_byte_with_interrupts_in_the_scan_code_set_asked_for() {
        for (config, want) in
            [(CONFIG_KEYBOARD_INTERRUPT, &CTRL_ALT_DEL_SET_2[..]), (0x41, &CTRL_ALT_DEL_SET_1[..])]
        {
            let (mut device, _reset, irq) = controller();
            device.write(COMMAND, &[COMMAND_WRITE_CONFIG]);
            device.write(DATA, &[config]);
            device.send_ctrl_alt_del().unwrap();
            assert_eq!(device.send_ctrl_alt_del(), Err(KeyboardBusy));
            let mut got = Vec::new();
            while irq.read().is_ok() {
                got.push(inb(&mut device, DATA));
            }
            assert_eq!(got, want);
        }
    }

    #[test]
    fn keyboard_identifies_itself() {
        let (mut device, _reset, irq) = controller();
        device.write(DATA, &[KEYBOARD_IDENTIFY]);
        assert!(irq.read().is_ok());
        assert_eq!([(); 4].map(|()| inb(&mut device, DATA)), [0xfa, 0xab, 0x83, 0]);
    }

    proptest! {
        #[test]
        fn any_access_is_harmless_and_the_buffer_stays_bounded(
            accesses in proptest::collection::vec((any::<bool>(), 0u64..8, proptest::collection::vec(any::<u8>(), 0..9)), 0..256),
        ) {
            let (mut device, _reset, _irq) = controller();
            for (write, offset, mut data) in accesses {
                if write { device.write(offset, &data) } else { device.read(offset, &mut data) }
                prop_assert!(device.buffer.len() <= BUFFER_BYTES);
            }
        }
    }
}
