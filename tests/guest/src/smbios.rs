//! The SMBIOS tables as a guest without UEFI finds them (DMTF DSP0134 3.7 §5.2.2, §6.1).

use alloc::string::String;
use alloc::vec::Vec;

use crate::acpi::Memory;

const FIRST: u64 = 0xf_0000;
const LAST: u64 = 0xf_ffe0;
const ENTRY_BYTES: usize = 24;
/// Longest table that is read: its length comes from the monitor that is under test.
const MAX_TABLE_BYTES: usize = 64 << 10;

/// The strings that a test knows beforehand.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Strings {
    /// System product name.
    pub product_name: String,
    /// System serial number.
    pub serial_number: String,
    /// Asset tag of the chassis.
    pub asset_tag: String,
    /// OEM strings.
    pub oem: Vec<String>,
}

impl Strings {
    /// Reads the tables, with every length and checksum verified.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(memory: &impl Memory) -> Result<Self, &'static str> {
        let mut structures = table(memory)?;
        let mut strings = Self::default();
        loop {
            let (&[kind, length, ..], true) = (structures, structures.len() >= 4) else {
                return Err("no end-of-table structure");
            };
            let formatted = structures.get(..usize::from(length)).filter(|formatted| formatted.len() >= 4);
            let formatted = formatted.ok_or("a structure with a wrong length")?;
            let rest = &structures[formatted.len()..];
            let end = rest.windows(2).position(|pair| pair == [0, 0]).ok_or("strings without an end")?;
            let texts: Vec<&[u8]> =
                rest[..end].split(|byte| *byte == 0).filter(|text| !text.is_empty()).collect();
            let text = |at: usize| {
                let number = formatted.get(at).map_or(0, |number| usize::from(*number));
                let text = number.checked_sub(1).and_then(|index| texts.get(index));
                String::from_utf8_lossy(text.copied().unwrap_or_default()).into_owned()
            };
            match kind {
                1 => (strings.product_name, strings.serial_number) = (text(5), text(7)),
                3 => strings.asset_tag = text(8),
                11 => {
                    strings.oem =
                        texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect();
                }
                127 => return Ok(strings),
                _ => {}
            }
            structures = &rest[end + 2..];
        }
    }
}

/// The structures that the first valid entry point leads to.
fn table(memory: &impl Memory) -> Result<&[u8], &'static str> {
    let valid = |entry: &&[u8]| {
        let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        entry.starts_with(b"_SM3_") && entry[6] == ENTRY_BYTES as u8 && sum == 0
    };
    let mut entries = (FIRST..=LAST).step_by(16).filter_map(|address| memory.bytes(address, ENTRY_BYTES));
    let entry = entries.find(valid).ok_or("no entry point between 0xf0000 and 0xfffff")?;
    let length = u32::from_le_bytes([entry[12], entry[13], entry[14], entry[15]]) as usize;
    let address = entry[16..].iter().rev().fold(0, |address, byte| address << 8 | u64::from(*byte));
    if length > MAX_TABLE_BYTES {
        return Err("an impossibly long table");
    }
    memory.bytes(address, length).ok_or("a table outside of RAM")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The last 64 KiB below 1 MiB.
    struct Firmware(Vec<u8>);

    impl Memory for Firmware {
        fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
            let start = usize::try_from(address.checked_sub(FIRST)?).ok()?;
            self.0.get(start..start.checked_add(length)?)
        }
    }

    fn firmware(structures: &[u8]) -> Firmware {
        let mut bytes = [0; 0x1_0000].to_vec();
        let mut entry = *b"_SM3_\0\x18\x03\x07\0\x01\0\0\0\0\0\0\0\x0f\0\0\0\0\0";
        entry[12] = structures.len() as u8;
        entry[5] = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg();
        bytes[0x40..0x40 + ENTRY_BYTES].copy_from_slice(&entry);
        bytes[..structures.len()].copy_from_slice(structures);
        Firmware(bytes)
    }

    const SYSTEM: &[u8] = b"\x01\x08\0\0\0\x01\0\x02Nova\0s-1\0\0";
    const OEM: &[u8] = b"\x0b\x05\0\0\x02a\0b\0\0";
    const END: &[u8] = b"\x7f\x04\0\0\0\0";

    #[test]
    fn strings_are_found_by_their_numbers() {
        let strings = Strings::read(&firmware(&[SYSTEM, OEM, END].concat())).unwrap();
        assert_eq!((strings.product_name.as_str(), strings.serial_number.as_str()), ("Nova", "s-1"));
        assert_eq!(strings.oem, ["a", "b"]);
    }

    #[test]
    fn a_table_without_end_and_a_wrong_checksum_are_errors() {
        assert!(Strings::read(&firmware(SYSTEM)).is_err());
        let mut damaged = firmware(END);
        damaged.0[0x40 + 9] ^= 1;
        assert!(Strings::read(&damaged).is_err());
    }

    proptest! {
        #[test]
        fn any_structures_end_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Strings::read(&firmware(&bytes));
        }
    }
}
