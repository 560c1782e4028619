//! qcow2 (QEMU's docs/interop/qcow2.txt), versions 2 and 3: backing files, copy on write, zero clusters, and compressed
//! clusters (zlib) for reading.
//!
//! What is written in which order: counts of new clusters are stable before the clusters are handed out (see
//! [`refcounts`](self)); data before the L2 entry that names them; a cluster that was replaced is released only after the
//! next [`Qcow2::flush`]. So a crash at any point leaves at most clusters that are counted and not used.
//!
//! The image is a tenant's: every offset in it is checked to be in its own file, nothing in it makes another file be
//! opened, and each request does a bounded amount of work. One that is damaged gives I/O errors.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{Bytes, Sink, Source, Zeros, read_with_zeros};

mod header;
mod refcounts;

pub use header::FormatError;
use header::{AUTOCLEAR_OFFSET, Header};
use refcounts::Refcounts;

/// Bits of an L1 or L2 entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 and L2: the count of the cluster is exactly 1.
const COPIED: u64 = 1 << 63;
/// L2: the rest describes compressed data.
const COMPRESSED: u64 = 1 << 62;
/// L2, version 3: the cluster reads as zeros.
const ZERO: u64 = 1;
/// Memory for L2 tables of one image.
const L2_CACHE_BYTES: u64 = 4 << 20;
/// Clusters that were replaced and wait for a flush.
const MAX_RELEASED: usize = 256;

/// What an image is based on.
pub enum Backing {
    /// A raw file of so many bytes.
    Raw(File, u64),
    /// Another qcow2 image, read-only.
    Qcow2(Box<Qcow2>),
}

impl Backing {
    fn bytes(&self) -> u64 {
        match self {
            Self::Raw(_, bytes) => *bytes,
            Self::Qcow2(image) => image.size(),
        }
    }

    /// What lies past its end is zeros.
    fn read(&mut self, sink: &mut dyn Sink, offset: u64, len: usize) -> io::Result<()> {
        let inside = self.bytes().saturating_sub(offset).min(len as u64) as usize;
        if inside > 0 {
            match self {
                Self::Raw(file, _) => sink.take_from_file(inside, file, offset)?,
                Self::Qcow2(image) => image.read(sink, offset, inside)?,
            }
        }
        if inside < len {
            sink.take_zeros(len - inside);
        }
        Ok(())
    }
}

/// Where a guest cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    /// In the backing file, or zeros without one.
    Unallocated,
    /// Zeros; the host cluster that is kept for it, if any.
    Zeros { kept: Option<Host> },
    /// At this place.
    Standard(Host),
    /// Compressed, from this byte on, at most so many bytes.
    Compressed { offset: u64, bytes: usize },
}

/// A host cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Host {
    offset: u64,
    /// Nothing else refers to it: it can be written in place.
    exclusive: bool,
}

/// An open image.
pub struct Qcow2 {
    file: File,
    header: Header,
    /// Of the file when it was opened; it only grows.
    file_bytes: u64,
    l1: Vec<u64>,
    /// L2 tables by L1 index, as they are in the file.
    l2: HashMap<usize, Vec<u64>>,
    /// Of images that can be written.
    refcounts: Option<Refcounts>,
    /// Host offsets to which one less refers, after the next flush.
    released: Vec<u64>,
    backing: Option<Backing>,
    /// The compressed cluster that was read last.
    inflated: Option<(u64, Vec<u8>)>,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image's {what} is damaged"))
}

/// Big-endian 64-bit numbers.
fn numbers(bytes: &[u8]) -> Vec<u64> {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    bytes.chunks_exact(8).map(number).collect()
}

fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (libc::off_t::try_from(offset), libc::off_t::try_from(len));
    let (Ok(offset), Ok(len)) = (offset, len) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers are passed.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Qcow2 {
    /// Opens an image over what it is based on.
    ///
    /// # Errors
    /// It is no image that can be used as wanted, or its header says something else about a backing file.
    pub fn open(path: &Path, writable: bool, backing: Option<Backing>) -> Result<Self, FormatError> {
        // O_NONBLOCK: a FIFO is refused, not waited for.
        let flags = libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(FormatError::NotAFile);
        }
        // Two writers would give the same cluster twice.
        let lock = if writable { libc::LOCK_EX } else { libc::LOCK_SH };
        // SAFETY: no pointers are passed.
        if unsafe { libc::flock(file.as_raw_fd(), lock | libc::LOCK_NB) } != 0 {
            return Err(FormatError::InUse);
        }
        let file_bytes = file.metadata()?.len();
        let mut first = vec![0; file_bytes.min(512) as usize];
        file.read_exact_at(&mut first, 0)?;
        let header = Header::parse(&first, file_bytes, writable)?;
        match (header.has_backing, &backing) {
            (true, None) => {
                return Err(FormatError::Backing("has a backing file, and none is given in backing_files"));
            }
            (false, Some(_)) => {
                return Err(FormatError::Backing("has no backing file, and one is given in backing_files"));
            }
            _ => {}
        }
        let mut l1 = vec![0; header.l1_entries * 8];
        file.read_exact_at(&mut l1, header.l1_offset)?;
        let refcounts = writable.then(|| Refcounts::open(&file, &header)).transpose()?;
        if writable && header.autoclear_features != 0 {
            file.write_all_at(&[0; 8], AUTOCLEAR_OFFSET)?;
        }
        Ok(Self {
            l1: numbers(&l1),
            l2: HashMap::new(),
            refcounts,
            released: Vec::new(),
            backing,
            inflated: None,
            file,
            header,
            file_bytes,
        })
    }

    /// Bytes of the guest's disk.
    pub const fn size(&self) -> u64 {
        self.header.size
    }

    const fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    /// A host offset out of a table, if it is a cluster of the file.
    fn host_offset(&self, entry: u64, what: &str) -> io::Result<u64> {
        let offset = entry & OFFSET_MASK;
        // Clusters that were allocated here may lie behind the end that the file had.
        let in_file = offset < self.file_bytes || offset < self.file.metadata()?.len();
        if offset.is_multiple_of(self.cluster_bytes()) && in_file { Ok(offset) } else { Err(damaged(what)) }
    }

    /// L1 index and index in the L2 table.
    const fn indexes(&self, cluster: u64) -> (usize, usize) {
        let entries = self.header.l2_entries();
        ((cluster / entries) as usize, (cluster % entries) as usize)
    }

    /// The L2 table with this L1 index, read if need be; None if there is none.
    fn l2_table(&mut self, index: usize) -> io::Result<Option<&mut Vec<u64>>> {
        let entry = self.l1.get(index).copied().ok_or_else(|| damaged("L1 table"))?;
        if entry & OFFSET_MASK == 0 {
            return Ok(None);
        }
        if !self.l2.contains_key(&index) {
            let offset = self.host_offset(entry, "L1 table")?;
            let mut bytes = vec![0; self.cluster_bytes() as usize];
            read_with_zeros(&self.file, &mut bytes, offset)?;
            self.make_room();
            self.l2.insert(index, numbers(&bytes));
        }
        Ok(self.l2.get_mut(&index))
    }

    /// Forgets a table (they are all in the file, too) if there are too many.
    fn make_room(&mut self) {
        let most = (L2_CACHE_BYTES >> self.header.cluster_bits).max(4) as usize;
        if self.l2.len() >= most
            && let Some(some) = self.l2.keys().next().copied()
        {
            self.l2.remove(&some);
        }
    }

    fn entry(&mut self, cluster: u64) -> io::Result<u64> {
        let (l1, l2) = self.indexes(cluster);
        Ok(self.l2_table(l1)?.and_then(|table| table.get(l2).copied()).unwrap_or(0))
    }

    fn find(&mut self, cluster: u64) -> io::Result<Cluster> {
        let entry = self.entry(cluster)?;
        if entry & COMPRESSED != 0 {
            return self.compressed(entry);
        }
        let zeros = entry & ZERO != 0;
        if zeros && self.header.version < 3 {
            return Err(damaged("L2 table"));
        }
        let host = if entry & OFFSET_MASK == 0 {
            None
        } else {
            let offset = self.host_offset(entry, "L2 table")?;
            Some(Host { offset, exclusive: entry & COPIED != 0 })
        };
        Ok(match (zeros, host) {
            (true, kept) => Cluster::Zeros { kept },
            (false, Some(host)) => Cluster::Standard(host),
            (false, None) => Cluster::Unallocated,
        })
    }

    fn compressed(&self, entry: u64) -> io::Result<Cluster> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> offset_bits;
        // The first sector counts from where the data begin.
        let bytes = (sectors + 1) * 512 - offset % 512;
        if offset >= self.file_bytes {
            return Err(damaged("L2 table"));
        }
        Ok(Cluster::Compressed { offset, bytes: bytes as usize })
    }

    /// Reads `len` bytes from `offset` on, which must be within the disk.
    ///
    /// # Errors
    /// The file can't be read, or the image is damaged.
    pub fn read(&mut self, sink: &mut dyn Sink, offset: u64, len: usize) -> io::Result<()> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let cluster = at >> self.header.cluster_bits;
            let within = at & (self.cluster_bytes() - 1);
            let found = self.find(cluster)?;
            let n = self.run(cluster, found, within, left)?;
            match found {
                Cluster::Standard(host) => sink.take_from_file(n, &self.file, host.offset + within)?,
                Cluster::Zeros { .. } => sink.take_zeros(n),
                Cluster::Unallocated => match &mut self.backing {
                    Some(backing) => backing.read(sink, at, n)?,
                    None => sink.take_zeros(n),
                },
                Cluster::Compressed { offset, bytes } => {
                    let data = self.inflate(offset, bytes)?;
                    sink.take_bytes(&data[within as usize..within as usize + n]);
                }
            }
            at += n as u64;
            left -= n;
        }
        Ok(())
    }

    /// How many of `left` bytes from `within` the cluster on can be read at once: as far as clusters of the same kind follow
    /// each other, in the guest and in the file.
    fn run(&mut self, cluster: u64, found: Cluster, within: u64, left: usize) -> io::Result<usize> {
        let mut bytes = self.cluster_bytes() - within;
        let mut next = cluster + 1;
        while bytes < left as u64 && !matches!(found, Cluster::Compressed { .. }) {
            let follows = match (found, self.find(next)?) {
                (Cluster::Standard(first), Cluster::Standard(host)) => {
                    host.offset == first.offset + ((next - cluster) << self.header.cluster_bits)
                }
                (Cluster::Zeros { .. }, Cluster::Zeros { .. }) => true,
                (Cluster::Unallocated, Cluster::Unallocated) => true,
                _ => false,
            };
            if !follows {
                break;
            }
            bytes += self.cluster_bytes();
            next += 1;
        }
        Ok(left.min(usize::try_from(bytes).unwrap_or(usize::MAX)))
    }

    /// The data of a compressed cluster.
    fn inflate(&mut self, offset: u64, bytes: usize) -> io::Result<&[u8]> {
        if self.inflated.as_ref().is_none_or(|(at, _)| *at != offset) {
            // At most two clusters: the number of sectors has no more bits.
            let mut compressed = vec![0; bytes];
            read_with_zeros(&self.file, &mut compressed, offset)?;
            let mut data = vec![0; self.cluster_bytes() as usize];
            let mut inflater = flate2::Decompress::new(false);
            inflater
                .decompress(&compressed, &mut data, flate2::FlushDecompress::Finish)
                .map_err(|_| damaged("compressed data"))?;
            if inflater.total_out() != self.cluster_bytes() {
                return Err(damaged("compressed data"));
            }
            self.inflated = Some((offset, data));
        }
        self.inflated.as_ref().map(|(_, data)| data.as_slice()).ok_or_else(|| damaged("compressed data"))
    }

    /// Writes `len` bytes at `offset`, which must be within the disk.
    ///
    /// # Errors
    /// The file can't be written, the image is damaged, or it was opened read-only.
    pub fn write(&mut self, source: &mut dyn Source, offset: u64, len: usize) -> io::Result<()> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let cluster = at >> self.header.cluster_bits;
            let within = at & (self.cluster_bytes() - 1);
            let found = self.find(cluster)?;
            let n = match found {
                Cluster::Standard(host) if host.exclusive => {
                    let n = self.exclusive_run(cluster, host, within, left)?;
                    source.give_to_file(n, &self.file, host.offset + within)?;
                    n
                }
                _ => {
                    let n = left.min((self.cluster_bytes() - within) as usize);
                    self.replace(source, cluster, found, within, n)?;
                    n
                }
            };
            at += n as u64;
            left -= n;
        }
        Ok(())
    }

    /// As [`Qcow2::run`], of clusters that can be written in place.
    fn exclusive_run(&mut self, cluster: u64, host: Host, within: u64, left: usize) -> io::Result<usize> {
        let mut bytes = self.cluster_bytes() - within;
        let mut next = cluster + 1;
        while bytes < left as u64 {
            let offset = host.offset + ((next - cluster) << self.header.cluster_bits);
            if self.find(next)? != Cluster::Standard(Host { offset, exclusive: true }) {
                break;
            }
            bytes += self.cluster_bytes();
            next += 1;
        }
        Ok(left.min(usize::try_from(bytes).unwrap_or(usize::MAX)))
    }

    /// Gives a guest cluster a host cluster of its own, with `n` new bytes from `within` on and the old ones around them.
    fn replace(
        &mut self,
        source: &mut dyn Source,
        cluster: u64,
        old: Cluster,
        within: u64,
        n: usize,
    ) -> io::Result<()> {
        let size = self.cluster_bytes();
        // The table first: without it nothing can refer to the new cluster.
        self.own_l2_table(cluster)?;
        let kept = match old {
            Cluster::Zeros { kept: Some(host) } if host.exclusive => Some(host.offset),
            _ => None,
        };
        let fresh = kept.is_none();
        let host = kept.map_or_else(|| self.allocate(), Ok)?;
        let is_zeros = match old {
            Cluster::Zeros { .. } => true,
            Cluster::Unallocated => self.backing.is_none(),
            _ => false,
        };
        if n as u64 == size || (fresh && is_zeros) {
            // A fresh cluster is a hole of the file.
            source.give_to_file(n, &self.file, host + within)?;
        } else {
            let mut data = vec![0; size as usize];
            if !is_zeros {
                // The last cluster of a disk may reach past its end, and past the backing file's.
                let start = cluster << self.header.cluster_bits;
                let inside = (self.size() - start).min(size) as usize;
                self.read(&mut Bytes::new(&mut data[..inside]), start, inside)?;
            }
            source.give_bytes(&mut data[within as usize..within as usize + n]);
            self.file.write_all_at(&data, host)?;
        }
        self.set_entry(cluster, host | COPIED)?;
        if fresh {
            self.release(old)?;
        }
        Ok(())
    }

    fn allocate(&mut self) -> io::Result<u64> {
        let refcounts = self.refcounts.as_mut().ok_or(io::ErrorKind::PermissionDenied)?;
        refcounts.allocate(&self.file)
    }

    /// Makes sure that there is an L2 table for a cluster that nothing else refers to.
    fn own_l2_table(&mut self, cluster: u64) -> io::Result<()> {
        let (index, _) = self.indexes(cluster);
        let entry = self.l1.get(index).copied().ok_or_else(|| damaged("L1 table"))?;
        if entry & COPIED != 0 && entry & OFFSET_MASK != 0 {
            return Ok(());
        }
        let old = self.l2_table(index)?.cloned();
        let offset = self.allocate()?;
        let table = match &old {
            Some(table) => {
                let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                self.file.write_all_at(&bytes, offset)?;
                table.clone()
            }
            // The new cluster is all zeros already.
            None => vec![0; self.header.l2_entries() as usize],
        };
        let new = offset | COPIED;
        self.file.write_all_at(&new.to_be_bytes(), self.header.l1_offset + index as u64 * 8)?;
        self.l1[index] = new;
        self.make_room();
        self.l2.insert(index, table);
        if old.is_some() {
            self.release_cluster(entry & OFFSET_MASK)?;
        }
        Ok(())
    }

    /// Changes an L2 entry, in the file and in memory; the table is an own one.
    fn set_entry(&mut self, cluster: u64, entry: u64) -> io::Result<()> {
        let (l1, l2) = self.indexes(cluster);
        let offset = self.l1.get(l1).copied().unwrap_or(0) & OFFSET_MASK;
        if offset == 0 {
            return Err(damaged("L1 table"));
        }
        self.file.write_all_at(&entry.to_be_bytes(), offset + l2 as u64 * 8)?;
        if let Some(slot) = self.l2_table(l1)?.and_then(|table| table.get_mut(l2)) {
            *slot = entry;
        }
        Ok(())
    }

    /// Nothing refers to what a guest cluster was before any more.
    fn release(&mut self, old: Cluster) -> io::Result<()> {
        match old {
            Cluster::Unallocated | Cluster::Zeros { kept: None } => Ok(()),
            Cluster::Standard(host) | Cluster::Zeros { kept: Some(host) } => {
                self.release_cluster(host.offset)
            }
            Cluster::Compressed { offset, bytes } => {
                // Its data count once in every host cluster that they touch.
                let bits = self.header.cluster_bits;
                for host in offset >> bits..=(offset + bytes as u64 - 1) >> bits {
                    self.release_cluster(host << bits)?;
                }
                self.inflated = None;
                Ok(())
            }
        }
    }

    fn release_cluster(&mut self, offset: u64) -> io::Result<()> {
        self.released.push(offset);
        if self.released.len() >= MAX_RELEASED { self.flush() } else { Ok(()) }
    }

    /// Brings everything to stable storage, and releases what was replaced.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn flush(&mut self) -> io::Result<()> {
        if self.refcounts.is_none() {
            return Ok(());
        }
        self.file.sync_data()?;
        for offset in std::mem::take(&mut self.released) {
            if let Some(refcounts) = &self.refcounts {
                refcounts.decrement(&self.file, offset)?;
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As [`Qcow2::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.each_cluster(offset, len, |image, cluster, within, n| {
            let size = image.cluster_bytes();
            // A disk's last cluster may be cut by its end.
            let whole =
                within == 0 && (n == size || (cluster << image.header.cluster_bits) + n == image.size());
            let found = image.find(cluster)?;
            match found {
                Cluster::Zeros { .. } => Ok(()),
                Cluster::Unallocated if image.backing.is_none() => Ok(()),
                Cluster::Standard(host) if whole && host.exclusive => {
                    punch_hole(&image.file, host.offset, size)
                        .or_else(|_| Zeros.give_to_file(size as usize, &image.file, host.offset))
                }
                _ if whole && image.header.version >= 3 => {
                    image.own_l2_table(cluster)?;
                    image.set_entry(cluster, ZERO)?;
                    image.release(found)
                }
                _ => image.write(&mut Zeros, (cluster << image.header.cluster_bits) + within, n as usize),
            }
        })
    }

    /// Gives the space of whole clusters back; what the range reads as afterwards is either the old data or zeros.
    ///
    /// # Errors
    /// As [`Qcow2::write`].
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.each_cluster(offset, len, |image, cluster, _, n| match image.find(cluster)? {
            Cluster::Standard(host) if host.exclusive && n == image.cluster_bytes() => {
                punch_hole(&image.file, host.offset, n)
            }
            _ => Ok(()),
        })
    }

    /// Calls `each(image, cluster, first byte within, bytes)` for a range.
    fn each_cluster(
        &mut self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&mut Self, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let within = at & (self.cluster_bytes() - 1);
            let n = left.min(self.cluster_bytes() - within);
            each(self, at >> self.header.cluster_bits, within, n)?;
            at += n;
            left -= n;
        }
        Ok(())
    }

    /// Leaves a clean image behind. Nothing may be written afterwards.
    ///
    /// # Errors
    /// As [`Qcow2::write`].
    pub fn close(&mut self) -> io::Result<()> {
        self.flush()?;
        match self.refcounts.take() {
            Some(mut refcounts) => refcounts.close(&self.file),
            None => Ok(()),
        }
    }
}

/// As [`Qcow2::close`], where nobody is left to be told of an error.
impl Drop for Qcow2 {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

#[cfg(test)]
mod tests;
