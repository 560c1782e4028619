//! qcow2 disks read once, from their first byte to their last, to make a raw disk of them.
//!
//! Written from QEMU's `docs/interop/qcow2.txt`, versions 2 and 3, with clusters that are allocated, zero or compressed by
//! zlib. The file is a tenant's, and only what one file can say by itself is read: one that names a backing file or a data
//! file is refused, so that no other file of this machine is ever looked at. (The VMM has a reader of its own, for disks
//! that are in use: it writes, caches and knows chains.)
//!
//! # What a hostile file can cost
//! Time and room are bounded by the *file*, not by what its tables claim. Every offset must be inside the file; a sound
//! image refers to each of its clusters once, so one whose tables name more bytes than it has is refused; a compressed
//! cluster gives one cluster and no more. Zeros, which cost nothing to claim, are bounded by the caller's limit on the size
//! of the disk.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt as _,
};

use flate2::{Decompress, FlushDecompress};

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Bytes of a version 2 header.
const V2_BYTES: usize = 72;
/// Bytes of a version 3 header without optional fields.
const V3_BYTES: usize = 104;
/// Largest L1 table, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Bits of an L1 or L2 entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L2: the rest describes compressed data.
const COMPRESSED: u64 = 1 << 62;
/// L2, version 3: the cluster reads as zeros.
const ZERO: u64 = 1;
/// Incompatible feature: reference counts may be wrong. They aren't used for reading.
const DIRTY: u64 = 1;
/// Zeros are written in pieces of this size.
const ZEROS_BYTES: usize = 256 << 10;
/// Compressed data is counted in sectors.
const SECTOR_BYTES: u64 = 512;

/// Why a qcow2 disk is not taken. All texts but that of [`Io`](Self::Io) are fit for the tenant.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The file can't be read, or the disk can't be written.
    #[error("can't convert the qcow2 disk")]
    Io(#[from] io::Error),
    /// The first bytes are others.
    #[error("it is no qcow2 disk")]
    Magic,
    /// Something that a disk of its own doesn't have, or that isn't read here.
    #[error("the qcow2 disk {0}")]
    Unsupported(&'static str),
    /// A number that no sound image has.
    #[error("the qcow2 disk is damaged: its {0} can't be")]
    Damaged(&'static str),
    /// The disk is larger than disks may be.
    #[error("the qcow2 disk stands for {size} bytes, of which at most {limit} are allowed")]
    TooLarge {
        /// Bytes of the disk.
        size: u64,
        /// Bytes allowed.
        limit: u64,
    },
}

/// A qcow2 disk whose header was checked.
#[derive(Debug)]
pub struct Qcow2 {
    file: File,
    file_bytes: u64,
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1: Vec<u64>,
}

impl Qcow2 {
    /// Reads header and L1 table of a disk that may have at most `limit` bytes.
    ///
    /// # Errors
    /// [`Qcow2Error`], for all that isn't a sound disk of its own.
    pub fn open(file: File, limit: u64) -> Result<Self, Qcow2Error> {
        let file_bytes = file.metadata()?.len();
        let mut head = vec![0; usize::try_from(file_bytes).unwrap_or(usize::MAX).min(V3_BYTES)];
        file.read_exact_at(&mut head, 0)?;
        if head.len() < V2_BYTES || word(&head, 0) != MAGIC {
            return Err(Qcow2Error::Magic);
        }
        let version = word(&head, 4);
        check_features(&head, version)?;
        let cluster_bits = word(&head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Qcow2Error::Damaged("size of clusters"));
        }
        let mut disk =
            Self { file, file_bytes, version, cluster_bits, size: long(&head, 24), l1: Vec::new() };
        if disk.size == 0 || !disk.size.is_multiple_of(SECTOR_BYTES) {
            return Err(Qcow2Error::Damaged("size, which is no number of sectors,"));
        }
        if disk.size > limit {
            return Err(Qcow2Error::TooLarge { size: disk.size, limit });
        }
        let wanted = disk.size.div_ceil(disk.cluster_bytes()).div_ceil(disk.l2_entries());
        let entries = u64::from(word(&head, 36));
        if entries < wanted || entries * 8 > MAX_L1_BYTES {
            return Err(Qcow2Error::Damaged("number of L1 entries"));
        }
        disk.l1 = disk.table(long(&head, 40), wanted).ok_or(Qcow2Error::Damaged("L1 table's place"))??;
        Ok(disk)
    }

    /// Bytes of the raw disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the raw disk.
    ///
    /// # Errors
    /// [`Qcow2Error`]; what was written so far is of no use then.
    pub fn write_raw(&self, out: &mut impl Write) -> Result<(), Qcow2Error> {
        let cluster = self.cluster_bytes();
        let mut used = Used { disk: self, tables: 0, data: 0, compressed: 0 };
        let mut buffer = vec![0; usize::try_from(cluster).map_err(io::Error::other)?];
        let mut left = self.size;
        for &entry in &self.l1 {
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                let bytes = left.min(cluster * self.l2_entries());
                write_zeros(out, bytes)?;
                left -= bytes;
                continue;
            }
            used.table()?;
            let l2 =
                self.table(offset, self.l2_entries()).ok_or(Qcow2Error::Damaged("L2 table's place"))??;
            for entry in l2 {
                let bytes = left.min(cluster);
                match self.read(entry, &mut buffer, &mut used)? {
                    true => out.write_all(&buffer[..usize::try_from(bytes).map_err(io::Error::other)?])?,
                    false => write_zeros(out, bytes)?,
                }
                left -= bytes;
                if left == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reads the cluster of an L2 entry; `false` if it is zeros.
    fn read(&self, entry: u64, buffer: &mut [u8], used: &mut Used) -> Result<bool, Qcow2Error> {
        if entry & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1_u64 << bits) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> bits;
            let bytes = (sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES;
            used.compressed(bytes)?;
            self.inflate(offset, bytes, buffer)?;
            return Ok(true);
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 || (self.version >= 3 && entry & ZERO != 0) {
            return Ok(false);
        }
        used.data()?;
        if !offset.is_multiple_of(self.cluster_bytes()) || offset >= self.file_bytes {
            return Err(Qcow2Error::Damaged("place of data"));
        }
        // The last cluster of a file may be cut short: what is missing reads as zeros, as in QEMU.
        let there = buffer.len().min(usize::try_from(self.file_bytes - offset).unwrap_or(usize::MAX));
        self.file.read_exact_at(&mut buffer[..there], offset)?;
        buffer[there..].fill(0);
        Ok(true)
    }

    fn inflate(&self, offset: u64, bytes: u64, buffer: &mut [u8]) -> Result<(), Qcow2Error> {
        let damaged = || Qcow2Error::Damaged("compressed data");
        let end = offset.saturating_add(bytes).min(self.file_bytes);
        let there = end.checked_sub(offset).filter(|bytes| *bytes > 0).ok_or_else(damaged)?;
        let mut deflated = vec![0; usize::try_from(there).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut deflated, offset)?;
        // What lies behind the end of the stream, up to the end of the sector, is not looked at.
        let mut inflater = Decompress::new(false);
        inflater.decompress(&deflated, buffer, FlushDecompress::Finish).map_err(|_| damaged())?;
        if inflater.total_out() != buffer.len() as u64 {
            return Err(damaged());
        }
        Ok(())
    }

    /// A table of big-endian numbers; `None` if it isn't wholly inside the file, or not at a cluster's start.
    fn table(&self, offset: u64, entries: u64) -> Option<io::Result<Vec<u64>>> {
        let bytes = entries.checked_mul(8)?;
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.file_bytes);
        if !inside || offset == 0 || !offset.is_multiple_of(self.cluster_bytes()) {
            return None;
        }
        let mut table = vec![0; usize::try_from(bytes).ok()?];
        let read = self.file.read_exact_at(&mut table, offset);
        Some(read.map(|()| table.chunks_exact(8).map(|number| long(number, 0)).collect()))
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table, which is one cluster.
    fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }
}

/// How much of the file was referred to so far. Clusters that are named more than once make these grow beyond the file.
struct Used<'a> {
    disk: &'a Qcow2,
    tables: u64,
    data: u64,
    compressed: u64,
}

impl Used<'_> {
    fn table(&mut self) -> Result<(), Qcow2Error> {
        self.tables += self.disk.cluster_bytes();
        self.within(self.tables)
    }

    fn data(&mut self) -> Result<(), Qcow2Error> {
        self.data += self.disk.cluster_bytes();
        self.within(self.data)
    }

    /// Neighbours share a sector, which both count.
    fn compressed(&mut self, bytes: u64) -> Result<(), Qcow2Error> {
        self.compressed += bytes.saturating_sub(SECTOR_BYTES);
        self.within(self.compressed)
    }

    fn within(&self, bytes: u64) -> Result<(), Qcow2Error> {
        match bytes > self.disk.file_bytes + self.disk.cluster_bytes() {
            true => Err(Qcow2Error::Unsupported("refers to the same data more than once (a bomb)")),
            false => Ok(()),
        }
    }
}

fn check_features(head: &[u8], version: u32) -> Result<(), Qcow2Error> {
    let refused = |what| Err(Qcow2Error::Unsupported(what));
    if !matches!(version, 2 | 3) {
        return refused("is of a version other than 2 and 3: write it anew with `qemu-img convert -O qcow2`");
    }
    if long(head, 8) != 0 || word(head, 16) != 0 {
        return refused("has a backing file: flatten it with `qemu-img convert -O qcow2`");
    }
    if word(head, 32) != 0 {
        return refused("is encrypted");
    }
    if version == 2 {
        return Ok(());
    }
    if head.len() < V3_BYTES || word(head, 100) < 104 || !word(head, 100).is_multiple_of(8) {
        return Err(Qcow2Error::Damaged("header's length"));
    }
    let incompatible = long(head, 72);
    for (bit, what) in [
        (1 << 1, "is marked as corrupt: run `qemu-img check -r all` on it"),
        (1 << 2, "has its data in another file: flatten it with `qemu-img convert -O qcow2`"),
        (1 << 3, "is compressed by something else than zlib: convert it with `-o compression_type=zlib`"),
        (1 << 4, "has extended L2 entries: convert it with `-o extended_l2=off`"),
        (!(DIRTY | 0b11110), "needs a feature that is unknown here"),
    ] {
        if incompatible & bit != 0 {
            return refused(what);
        }
    }
    Ok(())
}

fn write_zeros(out: &mut impl Write, bytes: u64) -> io::Result<()> {
    static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(ZEROS_BYTES as u64);
        out.write_all(&ZEROS[..usize::try_from(piece).map_err(io::Error::other)?])?;
        left -= piece;
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;
    use crate::samples::qcow2 as disk;

    const LIMIT: u64 = 1 << 30;

    fn convert(bytes: &[u8]) -> Result<Vec<u8>, Qcow2Error> {
        convert_at_most(bytes, LIMIT)
    }

    fn convert_at_most(bytes: &[u8], limit: u64) -> Result<Vec<u8>, Qcow2Error> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut raw = Vec::new();
        Qcow2::open(file, limit)?.write_raw(&mut raw)?;
        Ok(raw)
    }

    /// The disk with other bytes at a place is refused with these words.
    fn refused(at: usize, bytes: &[u8], words: &str) {
        let mut file = disk(8);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let said = convert(&file).expect_err(words).to_string();
        assert!(said.contains(words), "{said}");
    }

    #[test]
    fn data_and_zeros_are_where_the_tables_say() {
        let raw = convert(&disk(8)).unwrap();
        assert_eq!(raw.len(), 8 << 16);
        assert!(raw[..1 << 16].iter().all(|b| *b == 7) && raw[1 << 16..].iter().all(|b| *b == 0));
    }

    #[test]
    fn what_names_other_files_is_refused() {
        refused(8, &200_u64.to_be_bytes(), "backing file");
        refused(16, &9_u32.to_be_bytes(), "backing file");
        refused(72, &(1_u64 << 2).to_be_bytes(), "in another file");
    }

    #[test]
    fn features_that_are_not_read_are_refused_by_name() {
        refused(4, &1_u32.to_be_bytes(), "version");
        refused(32, &1_u32.to_be_bytes(), "encrypted");
        refused(72, &(1_u64 << 1).to_be_bytes(), "corrupt");
        refused(72, &(1_u64 << 3).to_be_bytes(), "compression_type=zlib");
        refused(72, &(1_u64 << 4).to_be_bytes(), "extended");
        refused(72, &(1_u64 << 40).to_be_bytes(), "unknown");
    }

    #[test]
    fn absurd_headers_are_refused() {
        refused(20, &63_u32.to_be_bytes(), "size of clusters");
        refused(24, &0_u64.to_be_bytes(), "size");
        refused(24, &1000_u64.to_be_bytes(), "size");
        refused(24, &u64::MAX.to_be_bytes(), "size");
        refused(24, &(LIMIT + 512).to_be_bytes(), "at most");
        refused(36, &0_u32.to_be_bytes(), "number of L1 entries");
        refused(36, &u32::MAX.to_be_bytes(), "number of L1 entries");
        refused(40, &(1_u64 << 60).to_be_bytes(), "L1 table");
        refused(40, &70_000_u64.to_be_bytes(), "L1 table");
        refused(100, &8_u32.to_be_bytes(), "header's length");
        refused(1 << 16, &(1_u64 << 40).to_be_bytes(), "L2 table");
        refused(2 << 16, &(1_u64 << 40).to_be_bytes(), "place of data");
        assert!(matches!(convert(b"QFI\xfb"), Err(Qcow2Error::Magic)));
        assert!(matches!(convert(b""), Err(Qcow2Error::Magic)));
    }

    #[test]
    fn a_bomb_that_names_the_same_data_again_and_again_is_refused() {
        let mut file = disk(8000);
        for entry in 0..8000 {
            let at = (2 << 16) + entry * 8;
            file[at..at + 8].copy_from_slice(&(3_u64 << 16).to_be_bytes());
        }
        assert!(convert(&file).unwrap_err().to_string().contains("bomb"));
        // The same with one compressed cluster of four sectors.
        for entry in 0..8000 {
            let at = (2 << 16) + entry * 8;
            file[at..at + 8].copy_from_slice(&(COMPRESSED | 3 << 54 | 3 << 16).to_be_bytes());
        }
        let mut deflate = flate2::Compress::new(flate2::Compression::best(), false);
        let mut packed = Vec::with_capacity(4096);
        deflate.compress_vec(&[7; 1 << 16], &mut packed, flate2::FlushCompress::Finish).unwrap();
        file[3 << 16..(3 << 16) + packed.len()].copy_from_slice(&packed);
        assert!(convert(&file).unwrap_err().to_string().contains("bomb"));
    }

    #[test]
    fn compressed_data_that_is_none_is_refused() {
        refused(2 << 16, &(COMPRESSED | 3 << 54 | 3 << 16).to_be_bytes(), "compressed data");
        refused(2 << 16, &(COMPRESSED | 3 << 54 | 1 << 40).to_be_bytes(), "compressed data");
    }

    /// QEMU's own program is the other opinion.
    #[test]
    fn what_qemu_img_writes_is_read_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("qcow2"));
        let mut bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7 % 251) as u8).collect();
        bytes[500_000..1_500_000].fill(0);
        bytes.resize(5 << 20, 0);
        bytes[(4 << 20) + 9] = 1;
        std::fs::write(&raw, &bytes).unwrap();
        for options in [
            &["-o", "compat=0.10"][..],
            &["-o", "compat=1.1"],
            &["-c"],
            &["-c", "-o", "cluster_size=512"],
            &["-o", "cluster_size=2M,lazy_refcounts=on"],
        ] {
            let made = Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .args(options)
                .args([&raw, &qcow2])
                .status();
            let Ok(made) = made else {
                println!("SKIPPED: qemu-img is not installed");
                return;
            };
            assert!(made.success(), "{options:?}");
            assert!(convert(&std::fs::read(&qcow2).unwrap()).unwrap() == bytes, "{options:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_damage_ends_within_the_limit(
            changes in proptest::collection::vec((0..(3_usize << 16), any::<u8>()), 1..16),
            head in proptest::collection::vec((0..112_usize, any::<u8>()), 0..4),
            len in 0..(4_usize << 16),
        ) {
            let mut file = disk(8);
            for (at, byte) in changes.into_iter().chain(head) {
                file[at] = byte;
            }
            for bytes in [&file[..], &file[..len]] {
                if let Ok(raw) = convert_at_most(bytes, 16 << 20) {
                    prop_assert!(raw.len() <= 16 << 20);
                }
            }
        }
    }
}
