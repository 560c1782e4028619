//! Reference counts of host clusters, and where new clusters come from: always from behind the end of the file.
//!
//! A cluster that became free is not used again here (its space is given back to the file system). So a crash can leave
//! clusters that count as used and are not, which costs space, but never two owners of one cluster. New clusters are
//! reserved some at a time: the file is made longer and their counts are set and brought to stable storage before the
//! first is handed out. What is left of the reserve goes when the image is closed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{Header, REFCOUNT_TABLE_OFFSET};
use crate::disk::read_with_zeros;

/// Space to reserve at a time, within these numbers of clusters.
const RESERVE_BYTES: u64 = 4 << 20;
const RESERVE_CLUSTERS: std::ops::RangeInclusive<u64> = 16..=1024;
/// Bits of an entry of the refcount table that are an offset.
const OFFSET_MASK: u64 = !0x1ff;
/// Most bytes of the refcount table, here as when the header is checked.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// The refcounts of one image that is written to.
pub struct Refcounts {
    cluster_bits: u32,
    /// A count has 2^this bits.
    order: u32,
    table: Vec<u64>,
    table_offset: u64,
    /// Host clusters that are reserved and not handed out.
    reserve: std::ops::Range<u64>,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image's {what} is damaged"))
}

impl Refcounts {
    /// Reads the table.
    pub fn open(file: &File, header: &Header) -> io::Result<Self> {
        let bytes = header.refcount_table_clusters * header.cluster_bytes();
        let mut table = vec![0; bytes as usize];
        file.read_exact_at(&mut table, header.refcount_table_offset)?;
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: super::numbers(&table),
            table_offset: header.refcount_table_offset,
            reserve: 0..0,
        })
    }

    const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters whose counts are in one block.
    const fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// A new cluster of zeros that has the count 1; its offset.
    pub fn allocate(&mut self, file: &File) -> io::Result<u64> {
        if self.reserve.is_empty() {
            self.reserve(file)?;
        }
        let cluster = self.reserve.next().ok_or_else(|| damaged("refcount table"))?;
        Ok(cluster << self.cluster_bits)
    }

    /// Reserves clusters behind the end of the file.
    fn reserve(&mut self, file: &File) -> io::Result<()> {
        let wanted =
            (RESERVE_BYTES >> self.cluster_bits).clamp(*RESERVE_CLUSTERS.start(), *RESERVE_CLUSTERS.end());
        let first = file.metadata()?.len().div_ceil(self.cluster_bytes());
        let (table_clusters, blocks) = self.plan(first, wanted)?;
        let end = first + table_clusters + blocks.len() as u64 + wanted;
        file.set_len(end << self.cluster_bits)?;
        // The new blocks come first and then the new table: nothing refers to them before they are complete.
        let mut next = first;
        let blocks: Vec<(u64, u64)> = blocks.into_iter().zip(next..).collect();
        next += blocks.len() as u64;
        let count = |refcounts: &Self| refcounts.set_range(file, first, end);
        if table_clusters > 0 {
            let bytes = (table_clusters << self.cluster_bits) as usize;
            let mut table = self.table.clone();
            table.resize(bytes / 8, 0);
            blocks.iter().for_each(|(index, cluster)| table[*index as usize] = cluster << self.cluster_bits);
            let old = std::mem::replace(&mut self.table, table);
            let moved = self.move_table(file, next, table_clusters, count);
            if moved.is_err() {
                self.table = old;
            }
            moved?;
            next += table_clusters;
        } else {
            for (index, cluster) in &blocks {
                self.table[*index as usize] = cluster << self.cluster_bits;
            }
            let counted = count(self).and_then(|()| file.sync_data());
            if counted.is_err() {
                blocks.iter().for_each(|(index, _)| self.table[*index as usize] = 0);
            }
            counted?;
            for (index, cluster) in &blocks {
                let entry = (cluster << self.cluster_bits).to_be_bytes();
                file.write_all_at(&entry, self.table_offset + index * 8)?;
            }
        }
        file.sync_data()?;
        self.reserve = next..end;
        Ok(())
    }

    /// For `wanted` clusters from `first` on, and what their counts need in front of them: the clusters of a new table (0
    /// if the old one does), and the indexes of the blocks that are missing.
    fn plan(&self, first: u64, wanted: u64) -> io::Result<(u64, Vec<u64>)> {
        let (mut table_clusters, mut blocks) = (0, Vec::new());
        // Each round adds a block or a larger table, or is the last; both are few.
        loop {
            let end = first + wanted + table_clusters + blocks.len() as u64;
            let indexes = first / self.per_block()..=(end - 1) / self.per_block();
            let missing: Vec<u64> = indexes
                .clone()
                .filter(|index| self.table.get(*index as usize).is_none_or(|entry| entry & OFFSET_MASK == 0))
                .collect();
            // A larger table is larger by half, so that this happens rarely.
            let entries = indexes.end() + 1;
            let needed = if entries > self.table.len() as u64 {
                ((entries + entries / 2) * 8).div_ceil(self.cluster_bytes())
            } else {
                0
            };
            if needed << self.cluster_bits > MAX_TABLE_BYTES {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if needed <= table_clusters && missing.len() <= blocks.len() {
                return Ok((table_clusters, blocks));
            }
            table_clusters = table_clusters.max(needed);
            blocks = missing;
        }
    }

    /// Writes the table, already grown in memory, to `cluster`, and frees the old one.
    fn move_table(
        &mut self,
        file: &File,
        cluster: u64,
        clusters: u64,
        count: impl Fn(&Self) -> io::Result<()>,
    ) -> io::Result<()> {
        let old = (self.table_offset >> self.cluster_bits, self.table_offset);
        let old_clusters = file_table_clusters(file)?;
        count(self)?;
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write_all_at(&bytes, cluster << self.cluster_bits)?;
        file.sync_data()?;
        let mut field = [0; 12];
        field[..8].copy_from_slice(&(cluster << self.cluster_bits).to_be_bytes());
        field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        file.write_all_at(&field, REFCOUNT_TABLE_OFFSET)?;
        file.sync_data()?;
        self.table_offset = cluster << self.cluster_bits;
        for cluster in old.0..old.0 + old_clusters {
            self.decrement(file, cluster << self.cluster_bits)?;
        }
        Ok(())
    }

    /// Sets the counts of new clusters to 1. Blocks that are new are in holes of the file, all zero.
    fn set_range(&self, file: &File, first: u64, end: u64) -> io::Result<()> {
        for cluster in first..end {
            self.set(file, cluster, 1)?;
        }
        Ok(())
    }

    /// Where a cluster's count is: offset of its first byte, and shift within that byte.
    fn place(&self, cluster: u64) -> io::Result<(u64, u32)> {
        let entry = self.table.get((cluster / self.per_block()) as usize).copied().unwrap_or(0) & OFFSET_MASK;
        if entry == 0 || !entry.is_multiple_of(self.cluster_bytes()) {
            return Err(damaged("refcount table"));
        }
        let bit = (cluster % self.per_block()) << self.order;
        Ok((entry + bit / 8, (bit % 8) as u32))
    }

    fn set(&self, file: &File, cluster: u64, count: u64) -> io::Result<()> {
        let (at, shift) = self.place(cluster)?;
        if self.order >= 3 {
            let bytes = 1 << (self.order - 3);
            return file.write_all_at(&count.to_be_bytes()[8 - bytes..], at);
        }
        let mut byte = [0];
        read_with_zeros(file, &mut byte, at)?;
        let mask = ((1 << (1 << self.order)) - 1) << shift;
        byte[0] = byte[0] & !mask | (count as u8) << shift & mask;
        file.write_all_at(&byte, at)
    }

    fn get(&self, file: &File, cluster: u64) -> io::Result<u64> {
        let (at, shift) = self.place(cluster)?;
        if self.order >= 3 {
            let bytes = 1 << (self.order - 3);
            let mut count = [0; 8];
            read_with_zeros(file, &mut count[8 - bytes..], at)?;
            return Ok(u64::from_be_bytes(count));
        }
        let mut byte = [0];
        read_with_zeros(file, &mut byte, at)?;
        Ok(u64::from(byte[0] >> shift) & ((1 << (1 << self.order)) - 1))
    }

    /// One less refers to the cluster at `offset`; the space of one that nothing refers to is given back.
    pub fn decrement(&self, file: &File, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.cluster_bits;
        let count = self.get(file, cluster)?.checked_sub(1).ok_or_else(|| damaged("refcount"))?;
        self.set(file, cluster, count)?;
        if count == 0 {
            // Only space is lost if the file system can't.
            let _ = super::punch_hole(file, cluster << self.cluster_bits, self.cluster_bytes());
        }
        Ok(())
    }

    /// Gives what is reserved back.
    pub fn close(&mut self, file: &File) -> io::Result<()> {
        let reserve = std::mem::replace(&mut self.reserve, 0..0);
        if reserve.is_empty() {
            return Ok(());
        }
        for cluster in reserve.clone() {
            self.set(file, cluster, 0)?;
        }
        // Nothing lies behind what was reserved last.
        file.sync_data()?;
        file.set_len(reserve.start << self.cluster_bits)
    }
}

/// Clusters of the refcount table that the header names now.
fn file_table_clusters(file: &File) -> io::Result<u64> {
    let mut clusters = [0; 4];
    file.read_exact_at(&mut clusters, REFCOUNT_TABLE_OFFSET + 8)?;
    Ok(u32::from_be_bytes(clusters).into())
}
