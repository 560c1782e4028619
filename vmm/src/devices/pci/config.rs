//! The 256 bytes of a type 0 configuration space (PCI Local Bus Specification 3.0 §6.1) as plain data: values, and
//! which bits of them the guest may write.

/// Bytes of the conventional configuration space; the rest of a function's 4 KiB reads as zeros.
pub const SIZE: usize = 256;

/// Command register.
pub const COMMAND: usize = 0x04;
/// Command: the function decodes memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may send messages and access memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: no legacy interrupts (there are none anyway).
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register.
const STATUS: usize = 0x06;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Base address register 0.
const BAR0: usize = 0x10;
/// Offset of the first capability.
const CAPABILITIES: usize = 0x34;
/// Interrupt line: a scratch byte.
const INTERRUPT_LINE: usize = 0x3c;
/// First byte after the header.
const HEADER_END: usize = 0x40;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Size of what base address register 0 covers; 0 if there is none.
    bar_size: u32,
    /// First byte behind the last capability.
    end: usize,
    /// Where the offset of the next capability goes.
    link: usize,
}

impl ConfigSpace {
    /// A function without registers and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config =
            Self { bytes: [0; SIZE], writable: [0; SIZE], bar_size: 0, end: HEADER_END, link: CAPABILITIES };
        config.set_u16(0x00, identity.vendor);
        config.set_u16(0x02, identity.device);
        config.bytes[0x08] = identity.revision;
        let [base, sub, interface] = identity.class;
        (config.bytes[0x0b], config.bytes[0x0a], config.bytes[0x09]) = (base, sub, interface);
        config.set_u16(0x2c, identity.subsystem_vendor);
        config.set_u16(0x2e, identity.subsystem);
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Adds base address register 0: 32-bit memory of `size` bytes (a power of two of at least a page) at `address`.
    pub fn add_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 0x1000 && address.is_multiple_of(size));
        self.bytes[BAR0..BAR0 + 4].copy_from_slice(&address.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.bar_size = size;
    }

    /// Adds a capability with this id and body (what follows id and link); returns its offset.
    ///
    /// # Panics
    /// The 256 bytes are full: the capabilities of a function are constants of the program.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.end;
        assert!(at + 2 + body.len() <= SIZE, "the configuration space is full");
        self.bytes[self.link] = at as u8;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        self.set_u16(STATUS, self.u16(STATUS) | STATUS_CAPABILITIES);
        at
    }

    /// Lets the guest write these bits from `at` on.
    pub fn make_writable(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// `data.len()` bytes at `register`; zeros past the end.
    pub fn read(&self, register: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(from) = usize::try_from(register).ok().and_then(|at| self.bytes.get(at..)) else { return };
        for (byte, value) in data.iter_mut().zip(from) {
            *byte = *value;
        }
    }

    /// Changes the writable bits of what `data` covers.
    pub fn write(&mut self, register: u64, data: &[u8]) {
        let Some(from) = usize::try_from(register).ok().filter(|at| *at < SIZE) else { return };
        for ((byte, mask), new) in self.bytes[from..].iter_mut().zip(&self.writable[from..]).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// All bytes, for a snapshot; [`ConfigSpace::write`] from 0 on takes them back.
    pub const fn all(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// The bytes from `at` on, for the owner of a capability.
    pub fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|index| self.bytes.get(at + index).copied().unwrap_or(0))
    }

    /// What base address register 0 says, if memory space is enabled: address and size.
    pub fn bar(&self) -> Option<(u64, u64)> {
        if self.bar_size == 0 || self.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        Some((u32::from_le_bytes(self.bytes(BAR0)).into(), self.bar_size.into()))
    }

    /// Whether the function may send messages.
    pub fn is_bus_master(&self) -> bool {
        self.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> ConfigSpace {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: [1, 0, 0],
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        config.add_bar(0xd000_0000, 0x8000);
        config.add_capability(0x11, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        config.add_capability(0x09, &[16, 1]);
        config
    }

    fn read(config: &ConfigSpace, register: u64) -> u32 {
        let mut data = [0; 4];
        config.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let config = config();
        assert_eq!(read(&config, 0), 0x1042_1af4);
        assert_eq!(read(&config, 8), 0x0100_0001);
        assert_eq!(read(&config, 0x2c), 0x0040_1af4);
        assert_eq!(read(&config, 0x3c), 0, "no legacy interrupt");
    }

    #[test]
    fn capabilities_are_linked() {
        let config = config();
        assert_eq!(read(&config, 4) >> 16 & 0x10, 0x10);
        assert_eq!(read(&config, 0x34) & 0xff, 0x40);
        assert_eq!(read(&config, 0x40), 0x0001_4c11);
        assert_eq!(read(&config, 0x4c), 0x0110_0009);
    }

    #[test]
    fn the_size_of_the_registers_is_told_by_writing_ones() {
        let mut config = config();
        assert_eq!(config.bar(), None, "memory space is off after reset");
        config.write(4, &[2]);
        assert_eq!(config.bar(), Some((0xd000_0000, 0x8000)));
        config.write(0x10, &[0xff; 4]);
        assert_eq!(read(&config, 0x10), 0xffff_8000);
        config.write(0x10, &0xd100_1234u32.to_le_bytes());
        assert_eq!(config.bar(), Some((0xd100_0000, 0x8000)));
        config.write(0x14, &[0xff; 4]);
        assert_eq!(read(&config, 0x14), 0, "there is no other");
    }

    proptest! {
        /// Whatever is written anywhere in any width, read-only bits stay and nothing is out of bounds.
        #[test]
        fn only_writable_bits_change(
            writes in proptest::collection::vec((prop_oneof![8 => 0u64..0x110, 1 => any::<u64>()], proptest::collection::vec(any::<u8>(), 0..9)), 0..64),
        ) {
            let before = config();
            let mut config = before.clone();
            for (register, mut data) in writes {
                config.write(register, &data);
                config.read(register, &mut data);
            }
            for at in 0..SIZE {
                prop_assert_eq!(config.bytes[at] & !before.writable[at], before.bytes[at] & !before.writable[at]);
            }
            prop_assert_eq!(config.writable, before.writable);
        }
    }
}
