//! The memory file: the guest's memory as it lies in its ranges, one after the other, with holes where it is zero, and a
//! checksum for each chunk of it in the state file.
//!
//! A file that lacks bytes, has been changed or belongs to another snapshot is noticed. The chunks are as large as a huge
//! page, so that a reader that fetches them one by one can check each.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// Bytes that one checksum covers.
const CHUNK: usize = 2 << 20;
/// What is left out where it is zero.
const PAGE: usize = 4096;

/// The memory file could not be written, or is not the right one.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// Writing it failed.
    #[error("cannot write it")]
    Write(#[source] io::Error),
    /// Reading it failed.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// Guest memory that can't be read.
    #[error("cannot read guest memory at {0:#x}")]
    Guest(u64),
    /// A wrong size.
    #[error("it is truncated or of another snapshot: it has {found} bytes, not {expected}")]
    Length {
        /// What it has.
        found: u64,
        /// What the state file says.
        expected: u64,
    },
    /// A wrong checksum.
    #[error(
        "it is damaged or of another snapshot: the checksum of the {CHUNK} bytes at {offset:#x} is wrong"
    )]
    Checksum {
        /// Where in the file.
        offset: u64,
    },
    /// The state file's table doesn't fit its own memory size.
    #[error("the state file has {found} checksums for it, not {expected}")]
    Table {
        /// In the state file.
        found: usize,
        /// For this size.
        expected: usize,
    },
}

/// The memory file as the state file describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMap {
    /// Length of the file.
    bytes: u64,
    /// CRC-32 (IEEE 802.3) of each chunk.
    chunks: Checksums,
}

/// Numbers in base64 of their little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Checksums(Vec<u32>);

impl Serialize for Checksums {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|number| number.to_le_bytes()).collect();
        serializer.serialize_str(&BASE64.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Checksums {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = BASE64.decode(text).map_err(serde::de::Error::custom)?;
        Ok(Self(bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()))
    }
}

/// A part of guest memory of at most [`CHUNK`] bytes, and where it is in the file.
struct Chunk {
    address: u64,
    offset: u64,
    length: usize,
}

/// The chunks of `memory`, in the order of the file. A chunk doesn't reach across the end of a region.
fn chunks(memory: &GuestMemory) -> Vec<Chunk> {
    let mut offset = 0;
    let mut chunks = Vec::new();
    for region in memory.iter() {
        let (start, end) = (region.start_addr().raw_value(), region.start_addr().raw_value() + region.len());
        let mut address = start;
        while address < end {
            let length = (end - address).min(CHUNK as u64);
            chunks.push(Chunk { address, offset, length: length as usize });
            address += length;
            offset += length;
        }
    }
    chunks
}

/// Whether there is anything but a hole in `length` bytes at `offset`; yes, if the file system can't tell.
fn has_data(file: &File, offset: u64, length: usize) -> bool {
    let Ok(start) = libc::off_t::try_from(offset) else { return true };
    // SAFETY: no pointers are passed. The file's position is used by nobody.
    let data = unsafe { libc::lseek(file.as_raw_fd(), start, libc::SEEK_DATA) };
    if data < 0 {
        // No data from there to the end of the file.
        return io::Error::last_os_error().raw_os_error() != Some(libc::ENXIO);
    }
    (data as u64) < offset + length as u64
}

/// Checksums of zeros, which most chunks of a small guest are.
struct Zeros {
    chunk: u32,
}

impl Zeros {
    fn new() -> Self {
        Self { chunk: crc32fast::hash(&vec![0; CHUNK]) }
    }

    fn checksum(&self, length: usize) -> u32 {
        if length == CHUNK { self.chunk } else { crc32fast::hash(&vec![0; length]) }
    }
}

/// The parts of `bytes` that are not zero, in whole pages: offset and content.
fn nonzero(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut pages = bytes.chunks(PAGE).enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, _) = pages.find(|(_, page)| !is_zero(page))?;
        let mut end = first + 1;
        while pages.next_if(|(_, page)| !is_zero(page)).is_some() {
            end += 1;
        }
        Some((first * PAGE, &bytes[first * PAGE..(end * PAGE).min(bytes.len())]))
    })
}

/// Writes `memory`, which nobody may be changing, to an empty file.
pub fn write(memory: &GuestMemory, file: &File) -> Result<MemoryMap, MemoryFileError> {
    let chunks = chunks(memory);
    let bytes = chunks.last().map_or(0, |last| last.offset + last.length as u64);
    file.set_len(bytes).map_err(MemoryFileError::Write)?;
    let zeros = Zeros::new();
    let mut buffer = vec![0; CHUNK];
    let mut checksums = Vec::with_capacity(chunks.len());
    for chunk in &chunks {
        if is_hole(memory, chunk) {
            checksums.push(zeros.checksum(chunk.length));
            continue;
        }
        let content = &mut buffer[..chunk.length];
        let failed = || MemoryFileError::Guest(chunk.address);
        let (region, at) = memory.to_region_addr(GuestAddress(chunk.address)).ok_or_else(failed)?;
        // Blocks that the guest doesn't have are holes.
        region.mapping().read_slice(content, at).map_err(|_| failed())?;
        checksums.push(crc32fast::hash(content));
        for (at, part) in nonzero(content) {
            file.write_all_at(part, chunk.offset + at as u64).map_err(MemoryFileError::Write)?;
        }
    }
    Ok(MemoryMap { bytes, chunks: Checksums(checksums) })
}

/// Whether the chunk was never touched: reading it through its mapping would allocate it.
fn is_hole(memory: &GuestMemory, chunk: &Chunk) -> bool {
    let Some((region, offset)) = memory.to_region_addr(GuestAddress(chunk.address)) else { return false };
    let Some(backing) = region.file_offset() else { return false };
    !has_data(backing.file(), backing.start() + offset.raw_value(), chunk.length)
}

/// Fills `memory`, which is all zero, from a file.
///
/// # Errors
/// It is not the file that [`write`] made when it returned `map`; what is in `memory` is undefined then.
pub fn read(map: &MemoryMap, file: &File, memory: &GuestMemory) -> Result<(), MemoryFileError> {
    let chunks = chunks(memory);
    let expected = chunks.last().map_or(0, |last| last.offset + last.length as u64);
    let found = file.metadata().map_err(MemoryFileError::Read)?.len();
    if found != expected || map.bytes != expected {
        return Err(MemoryFileError::Length { found, expected });
    }
    let Checksums(checksums) = &map.chunks;
    if checksums.len() != chunks.len() {
        return Err(MemoryFileError::Table { found: checksums.len(), expected: chunks.len() });
    }
    let zeros = Zeros::new();
    let mut buffer = vec![0; CHUNK];
    for (chunk, &checksum) in chunks.iter().zip(checksums) {
        let wrong = MemoryFileError::Checksum { offset: chunk.offset };
        if !has_data(file, chunk.offset, chunk.length) {
            if zeros.checksum(chunk.length) != checksum {
                return Err(wrong);
            }
            continue;
        }
        let content = &mut buffer[..chunk.length];
        file.read_exact_at(content, chunk.offset).map_err(MemoryFileError::Read)?;
        if crc32fast::hash(content) != checksum {
            return Err(wrong);
        }
        for (at, part) in nonzero(content) {
            let address = GuestAddress(chunk.address + at as u64);
            let failed = || MemoryFileError::Guest(address.0);
            // Which blocks the guest has is told later.
            let (region, at) = memory.to_region_addr(address).ok_or_else(failed)?;
            region.mapping().write_slice(part, at).map_err(|_| failed())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 5;

    fn guest(contents: &[(u64, Vec<u8>)]) -> GuestMemory {
        let memory = crate::memory::create(MIB).unwrap();
        for (address, bytes) in contents {
            let address = address % ((MIB << 20) as u64 - bytes.len() as u64);
            memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
        memory
    }

    fn bytes_of(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; MIB << 20];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn written(memory: &GuestMemory) -> (File, MemoryMap) {
        let file = tempfile::tempfile().unwrap();
        let map = write(memory, &file).unwrap();
        (file, map)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn memory_goes_through_a_file_unchanged_and_any_change_is_noticed(
            contents in proptest::collection::vec(
                (any::<u64>(), proptest::collection::vec(any::<u8>(), 1..10_000)), 0..6),
            at in 0..(MIB << 20) as u64, change in 1u8..,
        ) {
            let memory = guest(&contents);
            let (file, map) = written(&memory);
            let other = guest(&[]);
            read(&map, &file, &other).unwrap();
            prop_assert!(bytes_of(&other) == bytes_of(&memory));

            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ change], at).unwrap();
            let found = read(&map, &file, &guest(&[]));
            let expected = at / CHUNK as u64 * CHUNK as u64;
            prop_assert!(matches!(found, Err(MemoryFileError::Checksum { offset }) if offset == expected), "{found:?}");
        }
    }

    #[test]
    fn untouched_and_zero_memory_takes_no_space() {
        let memory = guest(&[(3 << 20, vec![1]), (1 << 20, vec![0; 1 << 19])]);
        let (file, _) = written(&memory);
        let blocks = file.metadata().unwrap().blocks();
        assert!(blocks * 512 <= 16 << 10, "{blocks} blocks for one page");
    }

    #[test]
    fn a_truncated_file_and_one_of_another_machine_are_refused() {
        let memory = guest(&[(4096, vec![7; 100])]);
        let (file, map) = written(&memory);
        let (_, other_map) = written(&guest(&[(4096, vec![8; 100])]));
        assert!(matches!(read(&other_map, &file, &guest(&[])), Err(MemoryFileError::Checksum { offset: 0 })));
        assert!(matches!(
            read(&map, &file, &crate::memory::create(MIB + 1).unwrap()),
            Err(MemoryFileError::Length { .. })
        ));
        file.set_len((MIB << 20) as u64 - 1).unwrap();
        assert!(matches!(read(&map, &file, &guest(&[])), Err(MemoryFileError::Length { .. })));
        // The same length again, but the last chunk's bytes are gone.
        let memory = guest(&[((MIB << 20) as u64 - 2, vec![9])]);
        let (file, map) = written(&memory);
        file.set_len((MIB << 20) as u64 / 2).unwrap();
        file.set_len((MIB << 20) as u64).unwrap();
        assert!(matches!(read(&map, &file, &guest(&[])), Err(MemoryFileError::Checksum { .. })));
    }

    #[test]
    fn both_ranges_of_a_large_memory_follow_each_other() {
        let memory = crate::memory::create(3 * 1024 + 3).unwrap();
        memory.write_obj(0x1122_u16, GuestAddress((1 << 32) + 10)).unwrap();
        let (file, map) = written(&memory);
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, 0xc000_0000 + 10).unwrap();
        assert_eq!(bytes, [0x22, 0x11]);
        let other = crate::memory::create(3 * 1024 + 3).unwrap();
        read(&map, &file, &other).unwrap();
        assert_eq!(other.read_obj::<u16>(GuestAddress((1 << 32) + 10)).unwrap(), 0x1122);
    }
}
