//! The header, with every number checked before anything relies on it.

use std::io;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Bytes of a version 2 header.
const V2_BYTES: usize = 72;
/// Bytes of a version 3 header without optional fields.
const V3_BYTES: usize = 104;
/// Largest L1 table, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Incompatible feature: refcounts may be wrong.
const DIRTY: u64 = 1;
/// Incompatible feature: anything may be wrong.
const CORRUPT: u64 = 2;
/// Incompatible feature: data in another file.
const EXTERNAL: u64 = 4;
/// Incompatible feature: compressed otherwise than by zlib.
const COMPRESSION: u64 = 8;
/// Incompatible feature: L2 entries of 16 bytes.
const EXTENDED_L2: u64 = 16;
/// Byte of the auto-clear features.
pub const AUTOCLEAR_OFFSET: u64 = 88;
/// Byte of the refcount table's offset; its number of clusters follows.
pub const REFCOUNT_TABLE_OFFSET: u64 = 48;

/// Why a file can't be used as a qcow2 image.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The file can't be read or written.
    #[error("cannot read or write it")]
    Io(#[from] io::Error),
    /// Another format.
    #[error("it is no qcow2 image (its first bytes are others); for a raw disk leave format out")]
    Magic,
    /// Version 1, or one to come.
    #[error("its version is {0}; 2 and 3 are supported")]
    Version(u32),
    /// A number that no sound image has.
    #[error("its header is damaged or hostile: {0}")]
    Damaged(&'static str),
    /// A feature.
    #[error("it uses {0}, which is not supported")]
    Unsupported(&'static str),
    /// Not closed properly.
    #[error("it is marked as {0}: run `qemu-img check -r all` on it first")]
    NeedsCheck(&'static str),
    /// The chain differs from the configuration's.
    #[error("it {0}")]
    Backing(&'static str),
    /// Someone else has it open.
    #[error("it is in use (locked) by another drive or process")]
    InUse,
    /// Not a regular file.
    #[error("it is no regular file")]
    NotAFile,
}

/// What of the header is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the guest's disk, in bytes.
    pub size: u64,
    pub has_backing: bool,
    pub l1_entries: usize,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u64,
    /// A refcount has 2^this bits.
    pub refcount_order: u32,
    pub autoclear_features: u64,
}

impl Header {
    /// Reads the header of a file with `file_bytes` bytes, of which `bytes` are the first, at least 512 if it has them.
    ///
    /// # Errors
    /// As [`FormatError`].
    pub fn parse(bytes: &[u8], file_bytes: u64, writable: bool) -> Result<Self, FormatError> {
        if bytes.len() < V2_BYTES || word(bytes, 0) != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = word(bytes, 4);
        let mut header = Self {
            version,
            cluster_bits: word(bytes, 20),
            size: long(bytes, 24),
            has_backing: long(bytes, 8) != 0,
            l1_entries: word(bytes, 36) as usize,
            l1_offset: long(bytes, 40),
            refcount_table_offset: long(bytes, REFCOUNT_TABLE_OFFSET as usize),
            refcount_table_clusters: word(bytes, 56).into(),
            refcount_order: 4,
            autoclear_features: 0,
        };
        match version {
            2 => {}
            3 => header.parse_version_3(bytes, writable)?,
            other => return Err(FormatError::Version(other)),
        }
        if word(bytes, 32) != 0 {
            return Err(FormatError::Unsupported("encryption"));
        }
        if writable && word(bytes, 60) != 0 {
            return Err(FormatError::Unsupported("internal snapshots, on a drive that can be written"));
        }
        header.check(file_bytes)?;
        Ok(header)
    }

    fn parse_version_3(&mut self, bytes: &[u8], writable: bool) -> Result<(), FormatError> {
        if bytes.len() < V3_BYTES {
            return Err(FormatError::Damaged("the file is too short"));
        }
        let incompatible = long(bytes, 72);
        if writable && incompatible & DIRTY != 0 {
            return Err(FormatError::NeedsCheck("not closed properly"));
        }
        if incompatible & CORRUPT != 0 {
            return Err(FormatError::NeedsCheck("corrupt"));
        }
        for (bit, name) in [
            (EXTERNAL, "an external data file"),
            (COMPRESSION, "another compression than zlib"),
            (EXTENDED_L2, "extended L2 entries"),
            (u64::MAX << 5, "an incompatible feature that is unknown here"),
        ] {
            if incompatible & bit != 0 {
                return Err(FormatError::Unsupported(name));
            }
        }
        self.autoclear_features = long(bytes, AUTOCLEAR_OFFSET as usize);
        if writable && self.autoclear_features & 1 != 0 {
            return Err(FormatError::Unsupported("persistent bitmaps, on a drive that can be written"));
        }
        self.refcount_order = word(bytes, 96);
        let header_bytes = word(bytes, 100) as usize;
        if header_bytes < V3_BYTES || !header_bytes.is_multiple_of(8) {
            return Err(FormatError::Damaged("header_length"));
        }
        Ok(())
    }

    fn check(&self, file_bytes: u64) -> Result<(), FormatError> {
        let damaged = |what| Err(FormatError::Damaged(what));
        if !(9..=21).contains(&self.cluster_bits) {
            return damaged("cluster_bits");
        }
        if self.refcount_order > 6 {
            return damaged("refcount_order");
        }
        let cluster = self.cluster_bytes();
        let in_file = |offset: u64, bytes: u64| {
            offset.is_multiple_of(cluster)
                && offset >= cluster
                && offset.checked_add(bytes).is_some_and(|end| end <= file_bytes)
        };
        let l1_bytes = self.l1_entries as u64 * 8;
        // An empty table needs no place.
        if l1_bytes > MAX_L1_BYTES || (l1_bytes > 0 && !in_file(self.l1_offset, l1_bytes)) {
            return damaged("L1 table");
        }
        let covered = self.l1_entries as u64 * self.l2_entries();
        if self.size.div_ceil(cluster) > covered {
            return damaged("size, which the L1 table does not cover");
        }
        if i64::try_from(self.size).is_err() {
            return damaged("size");
        }
        let table_bytes = self.refcount_table_clusters * cluster;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES
            || table_bytes == 0
            || !in_file(self.refcount_table_offset, table_bytes)
        {
            return damaged("refcount table");
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table, which is a cluster of 8-byte entries.
    pub const fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}
