//! SMBIOS tables (DMTF DSP0134 3.7): what a guest reads as the machine's maker, model, serial number and UUID.
//!
//! Without UEFI a guest finds the 64-bit entry point by its anchor `_SM3_` on a 16-byte boundary between 0xf0000 and
//! 0xfffff (§5.2.2); the structures follow it. Only what says something true of a microVM is there: firmware, system, chassis, OEM strings,
//! boot status. Processors and memory are described by CPUID, ACPI and the memory map.

use mote_vmm_api::Smbios;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::GuestMemory;

/// Longest string, in bytes. The specification has no limit; many readers do.
pub const MAX_STRING: usize = 255;
/// Most OEM strings.
pub const MAX_OEM_STRINGS: usize = 32;

/// Bytes of the 64-bit entry point (§5.2.2).
const ENTRY_POINT: usize = 24;
/// Version of the specification that the structures follow.
const VERSION: (u8, u8, u8) = (3, 7, 0);
/// BIOS characteristics, bit 3: not supported, so none of the others says anything (§7.1.1).
const NO_CHARACTERISTICS: u64 = 1 << 3;
/// BIOS characteristics extension byte 2, bit 4: the table describes a virtual machine (§7.1.2.2).
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// Wake-up type: power switch (§7.2.2).
const POWER_SWITCH: u8 = 6;
/// Chassis type: other (§7.4.1).
const OTHER: u8 = 1;
/// Chassis state: safe (§7.4.2).
const SAFE: u8 = 3;
/// Chassis security status: none (§7.4.3).
const NO_SECURITY: u8 = 3;
/// What the firmware, which there isn't, calls itself; the date is that of this description.
const FIRMWARE: [&str; 3] = ["Mote", env!("CARGO_PKG_VERSION"), "11/01/2026"];

/// A string or the UUID can't be in the tables.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SmbiosError {
    /// Length or characters.
    #[error("{0} of smbios must have 1 to {MAX_STRING} characters of printable ASCII")]
    String(&'static str),
    /// No UUID.
    #[error("uuid of smbios must be a UUID with hyphens, not {0:?}")]
    Uuid(String),
    /// Too many.
    #[error("smbios may have at most {MAX_OEM_STRINGS} oem_strings")]
    OemStrings,
}

/// Whether the strings can be in the tables.
///
/// # Errors
/// The first that can't.
pub fn check(smbios: &Smbios) -> Result<(), SmbiosError> {
    let named = [
        ("manufacturer", &smbios.manufacturer),
        ("product_name", &smbios.product_name),
        ("version", &smbios.version),
        ("serial_number", &smbios.serial_number),
        ("sku_number", &smbios.sku_number),
        ("family", &smbios.family),
        ("chassis_asset_tag", &smbios.chassis_asset_tag),
    ];
    let named = named.iter().filter_map(|(name, text)| text.as_deref().map(|text| (*name, text)));
    for (name, text) in named.chain(smbios.oem_strings.iter().map(|text| ("oem_strings", text.as_str()))) {
        let printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        if !(1..=MAX_STRING).contains(&text.len()) || !printable {
            return Err(SmbiosError::String(name));
        }
    }
    if smbios.oem_strings.len() > MAX_OEM_STRINGS {
        return Err(SmbiosError::OemStrings);
    }
    match &smbios.uuid {
        Some(uuid) if parse_uuid(uuid).is_none() => {
            Err(SmbiosError::Uuid(uuid.chars().take(MAX_STRING).collect()))
        }
        _ => Ok(()),
    }
}

/// Writes entry point and structures for strings that passed [`check`].
///
/// # Errors
/// Guest memory ends below 1 MiB.
pub fn write_tables(memory: &GuestMemory, smbios: &Smbios) -> Result<(), GuestMemoryError> {
    let structures = structures(smbios);
    let address = layout::SMBIOS + ENTRY_POINT.next_multiple_of(16) as u64;
    let mut tables = entry_point(address, structures.len() as u32).to_vec();
    tables.resize(ENTRY_POINT.next_multiple_of(16), 0);
    tables.extend(structures);
    debug_assert!(layout::SMBIOS + tables.len() as u64 <= layout::SMBIOS_END, "the strings are bounded");
    memory.write_slice(&tables, GuestAddress(layout::SMBIOS))
}

/// §5.2.2, table 2.
fn entry_point(structures: u64, length: u32) -> [u8; ENTRY_POINT] {
    let mut bytes = [0; ENTRY_POINT];
    bytes[..5].copy_from_slice(b"_SM3_");
    bytes[6] = ENTRY_POINT as u8;
    (bytes[7], bytes[8], bytes[9]) = VERSION;
    bytes[10] = 1; // revision of the entry point
    bytes[12..16].copy_from_slice(&length.to_le_bytes());
    bytes[16..].copy_from_slice(&structures.to_le_bytes());
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[5] = sum.wrapping_neg();
    bytes
}

/// One structure after the other, each with a handle of its own (§6.1).
fn structures(smbios: &Smbios) -> Vec<u8> {
    let mut all = Vec::new();
    let manufacturer = Some(smbios.manufacturer.as_deref().unwrap_or("Mote"));

    let mut firmware = Structure::new(0);
    firmware.string(Some(FIRMWARE[0])).string(Some(FIRMWARE[1]));
    firmware.word(0); // start segment: nothing is mapped
    firmware.string(Some(FIRMWARE[2])).byte(0);
    firmware.bytes(&NO_CHARACTERISTICS.to_le_bytes()).byte(0).byte(VIRTUAL_MACHINE);
    firmware.bytes(&[0xff; 4]).word(0); // no release numbers, no ROM
    firmware.end(&mut all);

    let mut system = Structure::new(1);
    system.string(manufacturer).string(Some(smbios.product_name.as_deref().unwrap_or("microVM")));
    system.string(smbios.version.as_deref()).string(smbios.serial_number.as_deref());
    // All zero: there is none (§7.2.1).
    system.bytes(&smbios.uuid.as_deref().and_then(parse_uuid).unwrap_or_default()).byte(POWER_SWITCH);
    system.string(smbios.sku_number.as_deref()).string(smbios.family.as_deref());
    system.end(&mut all);

    let mut chassis = Structure::new(3);
    chassis.string(manufacturer).byte(OTHER);
    chassis.string(None).string(None).string(smbios.chassis_asset_tag.as_deref());
    chassis.byte(SAFE).byte(SAFE).byte(SAFE).byte(NO_SECURITY);
    // OEM-defined, height and power cords unspecified, no contained elements of 3 bytes, no SKU number.
    chassis.bytes(&[0; 4]).byte(0).byte(0).byte(0).byte(3).string(None);
    chassis.end(&mut all);

    if !smbios.oem_strings.is_empty() {
        let mut oem = Structure::new(11);
        oem.byte(smbios.oem_strings.len() as u8);
        oem.strings.extend(smbios.oem_strings.iter().cloned());
        oem.end(&mut all);
    }
    let mut boot = Structure::new(32);
    boot.bytes(&[0; 6]).byte(0); // no errors detected
    boot.end(&mut all);
    Structure::new(127).end(&mut all);
    all
}

/// A structure while it is put together: the formatted part, then its strings (§6.1.3).
struct Structure {
    formatted: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    /// The type is its handle, too: there is one of each.
    fn new(kind: u8) -> Self {
        Self { formatted: vec![kind, 0, kind, 0], strings: Vec::new() }
    }

    fn byte(&mut self, byte: u8) -> &mut Self {
        self.bytes(&[byte])
    }

    fn word(&mut self, word: u16) -> &mut Self {
        self.bytes(&word.to_le_bytes())
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.formatted.extend_from_slice(bytes);
        self
    }

    /// The number of a string, from 1; 0 for none.
    fn string(&mut self, text: Option<&str>) -> &mut Self {
        let Some(text) = text else { return self.byte(0) };
        self.strings.push(text.to_owned());
        self.byte(self.strings.len() as u8)
    }

    fn end(mut self, all: &mut Vec<u8>) {
        self.formatted[1] = self.formatted.len() as u8;
        all.extend(self.formatted);
        for text in &self.strings {
            all.extend(text.bytes());
            all.push(0);
        }
        if self.strings.is_empty() {
            all.push(0);
        }
        all.push(0);
    }
}

/// The UUID as it lies in memory: the first three fields are little-endian (§7.2.1).
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let lengths = [8, 4, 4, 4, 12];
    let fields: Vec<&str> = text.split('-').collect();
    let right = fields.len() == lengths.len()
        && fields.iter().zip(lengths).all(|(field, length)| {
            field.len() == length && field.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
    if !right {
        return None;
    }
    let number = u128::from_str_radix(&fields.concat(), 16).ok()?;
    let mut bytes = number.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Smbios {
        Smbios {
            manufacturer: Some("OpenStack Foundation".to_owned()),
            product_name: Some("OpenStack Nova".to_owned()),
            uuid: Some("00112233-4455-6677-8899-aabbccddeeff".to_owned()),
            oem_strings: vec!["a".to_owned(), "b".to_owned()],
            ..Smbios::default()
        }
    }

    /// The structures by type: formatted part and strings.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (formatted, rest) = bytes.split_at(usize::from(bytes[1]));
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let text = String::from_utf8(rest[..end].to_vec()).unwrap();
            let strings = text.split('\0').filter(|text| !text.is_empty()).map(str::to_owned).collect();
            found.push((formatted[0], formatted.to_vec(), strings));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn the_entry_point_leads_to_the_structures() {
        let memory = crate::memory::create(2).unwrap();
        write_tables(&memory, &sample()).unwrap();
        let mut entry = [0; ENTRY_POINT];
        memory.read_slice(&mut entry, GuestAddress(layout::SMBIOS)).unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let address = u64::from_le_bytes(entry[16..].try_into().unwrap());
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(bytes, structures(&sample()));
    }

    #[test]
    fn each_structure_has_its_length_and_strings() {
        let found = parse(&structures(&sample()));
        let lengths: Vec<_> = found.iter().map(|(kind, formatted, _)| (*kind, formatted.len())).collect();
        assert_eq!(lengths, [(0, 0x1a), (1, 0x1b), (3, 0x16), (11, 5), (32, 11), (127, 4)]);
        let (_, system, strings) = &found[1];
        assert_eq!(strings[..2], ["OpenStack Foundation", "OpenStack Nova"]);
        assert_eq!(system[4..8], [1, 2, 0, 0]);
        let uuid =
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        assert_eq!(system[8..24], uuid);
        assert_eq!(found[3].2, ["a", "b"]);
    }

    #[test]
    fn a_machine_that_nobody_described_says_what_it_is() {
        let found = parse(&structures(&Smbios::default()));
        assert_eq!(found[1].2, ["Mote", "microVM"]);
        assert_eq!(found[1].1[8..24], [0; 16]);
        assert!(found.iter().all(|(kind, ..)| *kind != 11));
    }

    #[test]
    fn what_cannot_be_a_string_is_refused_by_its_name() {
        let with = |change: fn(&mut Smbios)| {
            let mut smbios = sample();
            change(&mut smbios);
            check(&smbios)
        };
        assert_eq!(with(|_| {}), Ok(()));
        let refused = Err(SmbiosError::String("family"));
        assert_eq!(with(|smbios| smbios.family = Some(String::new())), refused);
        assert_eq!(with(|smbios| smbios.family = Some("a\0b".to_owned())), refused);
        assert_eq!(with(|smbios| smbios.family = Some("a".repeat(MAX_STRING + 1))), refused);
        let many = with(|smbios| smbios.oem_strings = vec!["x".to_owned(); MAX_OEM_STRINGS + 1]);
        assert_eq!(many, Err(SmbiosError::OemStrings));
        for bad in ["", "0011", "00112233445566778899aabbccddeeff", "+0112233-4455-6677-8899-aabbccddeeff"] {
            let smbios = Smbios { uuid: Some(bad.to_owned()), ..Smbios::default() };
            assert_eq!(check(&smbios), Err(SmbiosError::Uuid(bad.to_owned())));
        }
    }

    #[test]
    fn the_longest_strings_fit() {
        let long = || Some("x".repeat(MAX_STRING));
        let smbios = Smbios {
            manufacturer: long(),
            product_name: long(),
            version: long(),
            serial_number: long(),
            sku_number: long(),
            family: long(),
            chassis_asset_tag: long(),
            oem_strings: vec!["x".repeat(MAX_STRING); MAX_OEM_STRINGS],
            ..sample()
        };
        check(&smbios).unwrap();
        assert!((structures(&smbios).len() as u64) < layout::SMBIOS_END - layout::SMBIOS - 32);
    }

    proptest! {
        #[test]
        fn any_text_is_a_uuid_or_refused(text in "[0-9a-f+-]{30,40}") {
            let is_uuid = parse_uuid(&text).is_some();
            let smbios = Smbios { uuid: Some(text), ..Smbios::default() };
            prop_assert_eq!(check(&smbios).is_ok(), is_uuid);
        }
    }
}
