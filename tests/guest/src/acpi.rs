//! The ACPI tables that a guest needs to switch itself off or reset (ACPI 6.5 §5.2, §4.8).

use core::fmt;

/// Longest table that is read: a table's length comes from the monitor that is under test.
const MAX_TABLE_BYTES: usize = 1 << 20;
/// Most tables in the XSDT.
const MAX_TABLES: usize = 64;
const HEADER_BYTES: usize = 36;

/// Physical memory.
pub trait Memory {
    /// `length` bytes at `address`, if all of them are RAM.
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]>;
}

/// What is wrong with the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The root pointer or a table points outside of RAM, or is impossibly long or short.
    Unreadable([u8; 4]),
    /// Wrong signature.
    Signature([u8; 4]),
    /// The bytes don't add up to zero.
    Checksum([u8; 4]),
    /// A table that must be there isn't.
    Missing([u8; 4]),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, table) = match self {
            Self::Unreadable(table) => ("unreadable", table),
            Self::Signature(table) => ("wrong signature of", table),
            Self::Checksum(table) => ("wrong checksum of", table),
            Self::Missing(table) => ("missing", table),
        };
        write!(f, "{what} {}", core::str::from_utf8(table).unwrap_or("table"))
    }
}

/// Where a write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// I/O port.
    Port(u16),
    /// Physical address.
    Memory(u64),
}

/// What the tables tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tables {
    /// PM1a control block, a 16-bit port; absent on hardware-reduced platforms.
    pub pm1a_control: Option<u16>,
    /// Sleep control register of hardware-reduced platforms, 8 bits.
    pub sleep_control: Option<Register>,
    /// Reset register, 8 bits, and the value that resets.
    pub reset: Option<(Register, u8)>,
    /// SLP_TYPa of `\_S5_`.
    pub s5_type: Option<u8>,
    /// Enabled local APICs in the MADT.
    pub processors: usize,
    /// Where the configuration space of PCI segment 0, bus 0 is (MCFG, PCI Firmware Specification 3.3 §4.1.2).
    pub ecam: Option<u64>,
    /// Where the VM generation id is: what the DSDT says under the name ADDR.
    pub generation_id: Option<u64>,
}

impl Tables {
    /// Reads the tables from the RSDP on, and verifies every checksum on the way.
    ///
    /// # Errors
    /// See [`Error`]; the FADT and the DSDT must be there, the MADT may be absent.
    pub fn read(memory: &impl Memory, rsdp: u64) -> Result<Self, Error> {
        let mut fadt = None;
        let mut processors = 0;
        let mut ecam = None;
        for table in listed(memory, rsdp)? {
            let Some(bytes) = table else { continue };
            let table = self::table(memory, bytes)?;
            match &table[..4] {
                b"FACP" => fadt = Some(table),
                b"APIC" => processors = count_processors(table),
                b"MCFG" => ecam = bus_0(table),
                _ => {}
            }
        }
        let fadt = fadt.ok_or(Error::Missing(*b"FACP"))?;
        let dsdt = match word64(fadt, 140) {
            Some(address) if address != 0 => address,
            _ => u64::from(word32(fadt, 40).unwrap_or(0)),
        };
        let dsdt = table(memory, dsdt)?;
        if &dsdt[..4] != b"DSDT" {
            return Err(Error::Signature(*b"DSDT"));
        }
        let (s5_type, generation_id) = (s5_type(dsdt), generation_id(dsdt));
        Ok(Self { s5_type, processors, ecam, generation_id, ..registers(fadt) })
    }
}

/// `Name (ADDR, Package () { 0xLOW, 0 })` in AML: NameOp, name, PackageOp, length, two elements, DWordPrefix, low half.
fn generation_id(dsdt: &[u8]) -> Option<u64> {
    const NAMED: &[u8] = b"\x08ADDR\x12\x08\x02\x0c";
    let at = dsdt.windows(NAMED.len()).position(|bytes| bytes == NAMED)? + NAMED.len();
    word32(dsdt, at).map(u64::from)
}

fn registers(fadt: &[u8]) -> Tables {
    let flags = word32(fadt, 112).unwrap_or(0);
    let hardware_reduced = flags & (1 << 20) != 0;
    let pm1a = word32(fadt, 64).filter(|&port| port != 0 && !hardware_reduced);
    let reset_supported = flags & (1 << 10) != 0;
    Tables {
        pm1a_control: pm1a.and_then(|port| u16::try_from(port).ok()).or_else(|| match generic(fadt, 172) {
            Some(Register::Port(port)) if !hardware_reduced => Some(port),
            _ => None,
        }),
        sleep_control: generic(fadt, 244).filter(|_| hardware_reduced),
        reset: generic(fadt, 116).filter(|_| reset_supported).zip(fadt.get(128).copied()),
        ..Tables::default()
    }
}

/// Addresses of the tables in XSDT or RSDT.
fn listed(memory: &impl Memory, rsdp: u64) -> Result<[Option<u64>; MAX_TABLES], Error> {
    const NAME: [u8; 4] = *b"RSDP";
    let root = memory.bytes(rsdp, 20).ok_or(Error::Unreadable(NAME))?;
    if &root[..8] != b"RSD PTR " {
        return Err(Error::Signature(NAME));
    }
    check_sum(root, NAME)?;
    let (address, width) = if root[15] >= 2 {
        let root = memory.bytes(rsdp, 36).ok_or(Error::Unreadable(NAME))?;
        check_sum(root, NAME)?;
        (word64(root, 24).unwrap_or(0), 8)
    } else {
        (u64::from(word32(root, 16).unwrap_or(0)), 4)
    };
    let list = table(memory, address)?;
    if &list[..4] != if width == 8 { b"XSDT" } else { b"RSDT" } {
        return Err(Error::Signature(*b"XSDT"));
    }
    let mut addresses = [None; MAX_TABLES];
    for (slot, entry) in addresses.iter_mut().zip(list[HEADER_BYTES..].chunks_exact(width)) {
        *slot = if width == 8 { word64(entry, 0) } else { word32(entry, 0).map(u64::from) };
    }
    Ok(addresses)
}

fn table(memory: &impl Memory, address: u64) -> Result<&[u8], Error> {
    const UNKNOWN: [u8; 4] = *b"????";
    let header = memory.bytes(address, HEADER_BYTES).ok_or(Error::Unreadable(UNKNOWN))?;
    let name = <[u8; 4]>::try_from(&header[..4]).unwrap_or(UNKNOWN);
    let length = word32(header, 4).unwrap_or(0) as usize;
    if !(HEADER_BYTES..=MAX_TABLE_BYTES).contains(&length) {
        return Err(Error::Unreadable(name));
    }
    let bytes = memory.bytes(address, length).ok_or(Error::Unreadable(name))?;
    check_sum(bytes, name)?;
    Ok(bytes)
}

fn check_sum(bytes: &[u8], name: [u8; 4]) -> Result<(), Error> {
    let sum = bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
    if sum == 0 { Ok(()) } else { Err(Error::Checksum(name)) }
}

/// A generic address structure (§5.2.3.2) in system I/O or system memory; all zero means "none".
fn generic(table: &[u8], offset: usize) -> Option<Register> {
    let address = word64(table, offset + 4).filter(|&address| address != 0)?;
    match table.get(offset)? {
        0 => Some(Register::Memory(address)),
        1 => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// Finds `Name (_S5_, Package () {SLP_TYPa, …})` in AML by its bytes (§20.2.5.4): NameOp 0x08, the name, PackageOp 0x12,
/// PkgLength, NumElements, then ZeroOp, OneOp or BytePrefix and the byte.
fn s5_type(dsdt: &[u8]) -> Option<u8> {
    let at = dsdt
        .windows(6)
        .position(|w| matches!(w, [0x08, b'_', b'S', b'5', b'_', 0x12]) || w == b"\x08\\_S5_")?;
    let package = dsdt[at..].iter().position(|&byte| byte == 0x12)? + at;
    let extra_length_bytes = usize::from(*dsdt.get(package + 1)? >> 6);
    let element = package + 3 + extra_length_bytes;
    match *dsdt.get(element)? {
        0x0a => dsdt.get(element + 1).copied(),
        value @ (0 | 1) => Some(value),
        _ => None,
    }
}

/// Local APIC entries (type 0) with the enabled flag (§5.2.12.2), and x2APIC entries (type 9).
fn count_processors(madt: &[u8]) -> usize {
    let mut rest = &madt[(HEADER_BYTES + 8).min(madt.len())..];
    let mut enabled = 0;
    while let [kind, length, ..] = *rest {
        let length = usize::from(length);
        if length < 2 || length > rest.len() {
            break;
        }
        enabled += match (kind, length) {
            (0, 8) => usize::from(rest[4] & 1 != 0),
            (9, 16) => usize::from(rest[8] & 1 != 0),
            _ => 0,
        };
        rest = &rest[length..];
    }
    enabled
}

/// The entry of an MCFG that has segment 0 and bus 0.
fn bus_0(mcfg: &[u8]) -> Option<u64> {
    let entries = mcfg.get(HEADER_BYTES + 8..)?.chunks_exact(16);
    entries.filter(|entry| entry[8..11] == [0; 3]).find_map(|entry| word64(entry, 0))
}

fn word32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn word64(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..offset + 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use proptest::prelude::*;

    struct Flat(Vec<u8>);

    impl Memory for Flat {
        fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
            let start = usize::try_from(address).ok()?;
            self.0.get(start..start.checked_add(length)?)
        }
    }

    fn finished(mut table: Vec<u8>, sum_at: usize) -> Vec<u8> {
        table[sum_at] = 0;
        table[sum_at] = 0_u8.wrapping_sub(table.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)));
        table
    }

    fn with_header(name: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = vec![0; HEADER_BYTES];
        table[..4].copy_from_slice(name);
        table[4..8].copy_from_slice(&((HEADER_BYTES + body.len()) as u32).to_le_bytes());
        table.extend_from_slice(body);
        finished(table, 9)
    }

    fn machine() -> Flat {
        let mut memory = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        let mut root = b"RSD PTR \0OEMOEM\x02\0\0\0\0".to_vec();
        root.extend_from_slice(&36_u32.to_le_bytes());
        root.extend_from_slice(&0x100_u64.to_le_bytes());
        root.extend_from_slice(&[0; 4]);
        let first = finished(root[..20].to_vec(), 8);
        root[..20].copy_from_slice(&first);
        put(0x40, &finished(root, 32));
        put(0x100, &with_header(b"XSDT", &[0x200_u64.to_le_bytes(), 0x400_u64.to_le_bytes()].concat()));
        let mut fadt = vec![0; 276 - HEADER_BYTES];
        fadt[64 - 36..68 - 36].copy_from_slice(&0x604_u32.to_le_bytes());
        fadt[112 - 36..116 - 36].copy_from_slice(&(1_u32 << 10).to_le_bytes());
        fadt[116 - 36] = 1;
        fadt[120 - 36..128 - 36].copy_from_slice(&0xcf9_u64.to_le_bytes());
        fadt[128 - 36] = 6;
        fadt[140 - 36..148 - 36].copy_from_slice(&0x500_u64.to_le_bytes());
        put(0x200, &with_header(b"FACP", &fadt));
        put(
            0x400,
            &with_header(
                b"APIC",
                &[0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 1, 0, 0, 0, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
        );
        put(0x500, &with_header(b"DSDT", b"\x10\x08_S5_\x12\x06\x04\x0a\x05\x0a\x05\0\0"));
        Flat(memory)
    }

    #[test]
    fn a_whole_set_of_tables_is_read() {
        let tables = Tables::read(&machine(), 0x40).expect("valid tables");
        assert_eq!(tables.pm1a_control, Some(0x604));
        assert_eq!(tables.reset, Some((Register::Port(0xcf9), 6)));
        assert_eq!(tables.s5_type, Some(5));
        assert_eq!((tables.processors, tables.sleep_control), (1, None));
    }

    #[test]
    fn the_configuration_space_is_that_of_segment_and_bus_0() {
        let entry = |base: u64, segment: u8, first: u8| {
            [&base.to_le_bytes()[..], &[segment, 0, first, 0xff, 0, 0, 0, 0]].concat()
        };
        let entries = [entry(1, 1, 0), entry(2, 0, 1), entry(3, 0, 0)].concat();
        let table = with_header(b"MCFG", &[&[0; 8][..], &entries].concat());
        assert_eq!(bus_0(&table), Some(3));
        assert_eq!(bus_0(&table[..40]), None);
    }

    #[test]
    fn a_wrong_byte_is_a_checksum_error() {
        let mut memory = machine();
        memory.0[0x530] ^= 1;
        assert_eq!(Tables::read(&memory, 0x40), Err(Error::Checksum(*b"DSDT")));
    }

    #[test]
    fn one_op_is_a_sleep_type() {
        assert_eq!(s5_type(b"\x08_S5_\x12\x04\x01\x01"), Some(1));
        assert_eq!(s5_type(b"\x08_S5_\x12"), None);
    }

    proptest! {
        #[test]
        fn any_byte_may_be_wrong(at in 0_usize..0x1000, value: u8) {
            let mut memory = machine();
            memory.0[at] = value;
            let _ = Tables::read(&memory, 0x40);
        }
    }
}
