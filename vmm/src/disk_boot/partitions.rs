//! Where file systems are on a disk: GPT (UEFI 2.11 §5.3), MBR with logical partitions, or the whole disk.

use std::io;

use super::Disk;

const SECTOR: u64 = 512;
/// Most GPT entries that are looked at; there are 128 on ordinary disks.
const MAX_ENTRIES: u32 = 1024;
/// Largest GPT entry, in bytes.
const MAX_ENTRY_BYTES: u32 = 4096;
/// Most logical partitions of an MBR.
const MAX_LOGICAL: usize = 32;
/// Bytes of a GPT header that are used.
const HEADER_BYTES: usize = 92;

/// MBR partition types.
mod mbr_type {
    pub const PROTECTIVE: u8 = 0xee;
    pub const LINUX: u8 = 0x83;
    /// "Linux extended boot" of the Discoverable Partitions Specification.
    pub const XBOOTLDR: u8 = 0xea;
    pub const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
}

/// A type GUID as it lies on the disk, from its usual text form.
const fn guid(text: u128) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = text.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// Extended boot loader partition (Discoverable Partitions Specification).
const XBOOTLDR: [u8; 16] = guid(0xbc13_c2ff_59e6_4262_a352_b275_fd6f_7172);
/// Root file system of x86-64.
const ROOT: [u8; 16] = guid(0x4f68_bce3_e8cd_4db1_96e7_fbca_f984_b709);
/// Linux file system data.
const LINUX: [u8; 16] = guid(0x0fc6_3daf_8483_4772_8e79_3d69_d847_7de4);

/// A range that may hold a file system. The order is that in which it is looked for boot loader entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Partition {
    kind: Kind,
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Boot,
    Root,
    Linux,
    WholeDisk,
}

/// The partitions that Linux's file systems may be in, those with boot loader entries first; the whole disk if there is no table.
///
/// # Errors
/// The disk can't be read.
pub fn partitions(disk: &mut dyn Disk) -> io::Result<Vec<Partition>> {
    let mut first = [0; SECTOR as usize];
    if disk.bytes() < SECTOR {
        return Ok(Vec::new());
    }
    disk.read(0, &mut first)?;
    let mut found = match mbr_entries(&first) {
        // A file system on the bare disk may end its first sector so, too: then the table is empty or nonsense.
        Some(entries) if entries.iter().any(|entry| entry.kind == mbr_type::PROTECTIVE) => gpt(disk)?,
        Some(entries) => mbr(disk, &entries)?,
        None => Vec::new(),
    };
    if found.is_empty() {
        found.push(Partition { kind: Kind::WholeDisk, start: 0, bytes: disk.bytes() });
    }
    found.sort_unstable();
    Ok(found)
}

/// `sectors` from `first` on, if they are on the disk.
fn range(disk: &dyn Disk, kind: Kind, first: u64, sectors: u64) -> Option<Partition> {
    let (start, bytes) = (first.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?);
    let inside = bytes > 0 && start.checked_add(bytes)? <= disk.bytes();
    inside.then_some(Partition { kind, start, bytes })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

struct MbrEntry {
    kind: u8,
    first: u64,
    sectors: u64,
}

fn mbr_entries(sector: &[u8; SECTOR as usize]) -> Option<[MbrEntry; 4]> {
    (sector[510..] == [0x55, 0xaa]).then(|| {
        std::array::from_fn(|index| {
            let at = 446 + 16 * index;
            let (first, sectors) = (u32_at(sector, at + 8).into(), u32_at(sector, at + 12).into());
            MbrEntry { kind: sector[at + 4], first, sectors }
        })
    })
}

fn linux(disk: &dyn Disk, entry: &MbrEntry, base: u64) -> Option<Partition> {
    let kind = match entry.kind {
        mbr_type::XBOOTLDR => Kind::Boot,
        mbr_type::LINUX => Kind::Linux,
        _ => return None,
    };
    range(disk, kind, base.checked_add(entry.first)?, entry.sectors)
}

fn mbr(disk: &mut dyn Disk, entries: &[MbrEntry; 4]) -> io::Result<Vec<Partition>> {
    let mut found: Vec<_> = entries.iter().filter_map(|entry| linux(disk, entry, 0)).collect();
    let Some(extended) = entries.iter().find(|entry| mbr_type::EXTENDED.contains(&entry.kind)) else {
        return Ok(found);
    };
    // A chain of tables, each with a partition relative to itself and the next table relative to the whole.
    let mut table = extended.first;
    for _ in 0..MAX_LOGICAL {
        let Some(place) = range(disk, Kind::Linux, table, 1) else { break };
        let mut sector = [0; SECTOR as usize];
        disk.read(place.start, &mut sector)?;
        let Some([partition, next, ..]) = mbr_entries(&sector) else { break };
        found.extend(linux(disk, &partition, table));
        if !mbr_type::EXTENDED.contains(&next.kind) || next.first == 0 {
            break;
        }
        table = extended.first + next.first;
    }
    Ok(found)
}

/// By the header at the start or, if it is damaged, by that at the end.
fn gpt(disk: &mut dyn Disk) -> io::Result<Vec<Partition>> {
    let last = disk.bytes() / SECTOR - 1;
    for header in [1, last] {
        if let Some(found) = gpt_at(disk, header)? {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// None if header or entries are not sound.
fn gpt_at(disk: &mut dyn Disk, sector: u64) -> io::Result<Option<Vec<Partition>>> {
    let Some(place) = range(disk, Kind::Linux, sector, 1) else { return Ok(None) };
    let mut header = [0; SECTOR as usize];
    disk.read(place.start, &mut header)?;
    let length = u32_at(&header, 12) as usize;
    if header[..8] != *b"EFI PART" || !(HEADER_BYTES..=header.len()).contains(&length) {
        return Ok(None);
    }
    let checksum = u32_at(&header, 16);
    header[16..20].fill(0);
    let (count, size) = (u32_at(&header, 80), u32_at(&header, 84));
    let sound = crc32fast::hash(&header[..length]) == checksum
        && u64_at(&header, 24) == sector
        && (1..=MAX_ENTRIES).contains(&count)
        && (128..=MAX_ENTRY_BYTES).contains(&size);
    let bytes = u64::from(count) * u64::from(size);
    let table = range(disk, Kind::Linux, u64_at(&header, 72), bytes.div_ceil(SECTOR));
    let (true, Some(table)) = (sound, table) else { return Ok(None) };
    let mut entries = vec![0; bytes as usize];
    disk.read(table.start, &mut entries)?;
    if crc32fast::hash(&entries) != u32_at(&header, 88) {
        return Ok(None);
    }
    let entries = entries.chunks_exact(size as usize).filter_map(|entry| {
        let kind = match &entry[..16] {
            kind if *kind == XBOOTLDR => Kind::Boot,
            kind if *kind == ROOT => Kind::Root,
            kind if *kind == LINUX => Kind::Linux,
            _ => return None,
        };
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        range(disk, kind, first, last.checked_sub(first)?.checked_add(1)?)
    });
    Ok(Some(entries.collect()))
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECTORS: u64 = 4096;

    fn put(disk: &mut [u8], at: u64, bytes: &[u8]) {
        disk[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn mbr_entry(kind: u8, first: u32, sectors: u32) -> Vec<u8> {
        let mut entry = vec![0, 0, 0, 0, kind, 0, 0, 0];
        entry.extend(first.to_le_bytes());
        entry.extend(sectors.to_le_bytes());
        entry
    }

    fn table(disk: &mut [u8], sector: u64, entries: &[Vec<u8>]) {
        put(disk, sector * 512 + 446, &entries.concat());
        put(disk, sector * 512 + 510, &[0x55, 0xaa]);
    }

    /// A disk with these partitions (type, first and last sector) in a GPT at both ends.
    pub fn with_gpt(mut disk: Vec<u8>, partitions: &[([u8; 16], u64, u64)]) -> Vec<u8> {
        let last = disk.len() as u64 / 512 - 1;
        table(&mut disk, 0, &[mbr_entry(mbr_type::PROTECTIVE, 1, u32::MAX)]);
        let mut entries = vec![0; 128 * 128];
        for (number, (kind, first, end)) in partitions.iter().enumerate() {
            put(&mut entries, number as u64 * 128, kind);
            put(&mut entries, number as u64 * 128 + 16, &[number as u8 + 1; 16]);
            put(&mut entries, number as u64 * 128 + 32, &first.to_le_bytes());
            put(&mut entries, number as u64 * 128 + 40, &end.to_le_bytes());
        }
        for (at, entries_at) in [(1, 2), (last, last - 32)] {
            let mut header = vec![0; 92];
            put(&mut header, 0, b"EFI PART\0\0\x01\0\x5c\0\0\0");
            put(&mut header, 24, &u64::to_le_bytes(at));
            put(&mut header, 72, &u64::to_le_bytes(entries_at));
            put(&mut header, 80, &128_u32.to_le_bytes());
            put(&mut header, 84, &128_u32.to_le_bytes());
            put(&mut header, 88, &crc32fast::hash(&entries).to_le_bytes());
            let checksum = crc32fast::hash(&header);
            put(&mut header, 16, &checksum.to_le_bytes());
            put(&mut disk, at * 512, &header);
            put(&mut disk, entries_at * 512, &entries);
        }
        disk
    }

    pub const LINUX_TYPE: [u8; 16] = LINUX;

    fn empty() -> Vec<u8> {
        vec![0; (SECTORS * 512) as usize]
    }

    fn found(mut disk: Vec<u8>) -> Vec<(u64, u64)> {
        let found = partitions(&mut disk).unwrap();
        found.iter().map(|partition| (partition.start / 512, partition.bytes / 512)).collect()
    }

    #[test]
    fn a_guid_lies_on_the_disk_with_its_first_fields_turned() {
        assert_eq!(LINUX[..6], [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84]);
        assert_eq!(LINUX[8..10], [0x8e, 0x79]);
    }

    #[test]
    fn gpt_partitions_come_in_the_order_of_their_types() {
        let esp = guid(0xc12a_7328_f81f_11d2_ba4b_00a0_c93e_c93b);
        let parts = [(LINUX, 300, 399), (esp, 100, 199), (ROOT, 400, 499), (XBOOTLDR, 200, 299)];
        let disk = with_gpt(empty(), &parts);
        assert_eq!(found(disk.clone()), [(200, 100), (400, 100), (300, 100)]);
        let mut damaged = disk;
        damaged[512 + 40] ^= 1;
        assert_eq!(found(damaged.clone()).len(), 3, "by the header at the end");
        let last = damaged.len() - 512;
        damaged[last] = 0;
        assert_eq!(found(damaged), [(0, SECTORS)], "no table is left");
    }

    #[test]
    fn gpt_partitions_beyond_the_disk_are_left_out() {
        let disk = with_gpt(empty(), &[(LINUX, 100, u64::MAX), (LINUX, 300, 200), (LINUX, 100, 100)]);
        assert_eq!(found(disk), [(100, 1)]);
    }

    #[test]
    fn mbr_partitions_are_found_with_the_logical_ones() {
        let mut disk = empty();
        table(&mut disk, 0, &[mbr_entry(0x82, 1, 9), mbr_entry(0x83, 10, 90), mbr_entry(0x0f, 1000, 1000)]);
        table(&mut disk, 1000, &[mbr_entry(0x83, 10, 90), mbr_entry(0x05, 200, 100)]);
        table(&mut disk, 1200, &[mbr_entry(0x83, 1, 99), mbr_entry(0x05, 0, 0)]);
        assert_eq!(found(disk.clone()), [(10, 90), (1010, 90), (1201, 99)]);
        // A chain that goes round in a circle ends.
        table(&mut disk, 1200, &[mbr_entry(0x83, 1, 99), mbr_entry(0x05, 200, 100)]);
        assert!(found(disk).len() <= 2 + MAX_LOGICAL);
    }

    #[test]
    fn a_disk_without_a_table_is_one_file_system() {
        assert_eq!(found(empty()), [(0, SECTORS)]);
        assert_eq!(found(vec![0; 100]), []);
    }

    proptest! {
        #[test]
        fn damaged_tables_end_without_a_panic_and_inside_of_the_disk(
            changes in proptest::collection::vec((0_usize..20_000, any::<u8>()), 0..40), logical in any::<bool>(),
        ) {
            let mut disk = with_gpt(empty(), &[(LINUX, 100, 199)]);
            if logical {
                table(&mut disk, 0, &[mbr_entry(0x05, 2, 100)]);
            }
            for (at, value) in changes {
                disk[at] = value;
            }
            let length = disk.bytes();
            for partition in partitions(&mut disk).unwrap() {
                prop_assert!(partition.start + partition.bytes <= length);
            }
        }
    }
}
