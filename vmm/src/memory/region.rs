//! A region of guest memory, all of which is there or only some blocks.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use super::pages::Pages;

/// Which blocks of a region the guest has.
pub struct Blocks {
    block_bytes: u64,
    count: usize,
    /// A bit for each.
    plugged: Vec<AtomicU64>,
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks of {} bytes", self.count, self.block_bytes)
    }
}

impl Blocks {
    /// None plugged. `bytes` is a multiple of `block_bytes`.
    pub fn new(bytes: u64, block_bytes: u64) -> Self {
        let count = (bytes / block_bytes) as usize;
        Self { block_bytes, count, plugged: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Bytes of each.
    pub const fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// How many there are.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// How many of `range` are plugged. What lies behind the last one is not.
    pub fn plugged_in(&self, range: Range<usize>) -> usize {
        let is_plugged = |index: &usize| {
            let word = self.plugged.get(index / 64).map_or(0, |word| word.load(Ordering::Acquire));
            word >> (index % 64) & 1 != 0
        };
        range.filter(is_plugged).count()
    }

    /// Plugs or unplugs all of `range`.
    pub fn set(&self, range: Range<usize>, plugged: bool) {
        for index in range.start..range.end.min(self.count) {
            let bit = 1 << (index % 64);
            if plugged {
                self.plugged[index / 64].fetch_or(bit, Ordering::Release);
            } else {
                self.plugged[index / 64].fetch_and(!bit, Ordering::Release);
            }
        }
    }

    /// Whether all of these bytes are the guest's.
    fn has(&self, offset: u64, bytes: usize) -> bool {
        let Some(last) = offset.checked_add((bytes as u64).saturating_sub(1)) else { return false };
        let range = (offset / self.block_bytes) as usize..(last / self.block_bytes) as usize + 1;
        let wanted = range.len();
        self.plugged_in(range) == wanted
    }
}

/// A region. Everything that devices and loaders do with guest memory asks it for the bytes.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    /// What `mapping` is about, if it doesn't own it.
    _pages: Option<Pages>,
    /// Where only some of it is there.
    blocks: Option<Arc<Blocks>>,
}

impl Region {
    /// All of `mapping`, or the plugged ones of `blocks`.
    pub const fn new(mapping: GuestRegionMmap<()>, blocks: Option<Arc<Blocks>>) -> Self {
        Self { mapping, _pages: None, blocks }
    }

    /// The same with what is mapped there, unmapped with the region, where `mapping` doesn't own it.
    pub(super) fn with_pages(self, pages: Pages) -> Self {
        Self { _pages: Some(pages), ..self }
    }

    /// The blocks, if not all of the region is there.
    pub const fn blocks(&self) -> Option<&Arc<Blocks>> {
        self.blocks.as_ref()
    }

    /// All of the region's bytes, whether the guest has them or not.
    pub const fn mapping(&self) -> &GuestRegionMmap<()> {
        &self.mapping
    }

    // The small methods here are called for each access to guest memory: unlike those of a generic type they are only inlined
    // into other parts of the program if they say so.
    #[inline]
    fn check(&self, offset: MemoryRegionAddress, bytes: usize) -> Result<(), GuestMemoryError> {
        match &self.blocks {
            None => Ok(()),
            Some(blocks) => self.check_blocks(blocks, offset, bytes),
        }
    }

    #[cold]
    fn check_blocks(
        &self,
        blocks: &Blocks,
        offset: MemoryRegionAddress,
        bytes: usize,
    ) -> Result<(), GuestMemoryError> {
        if blocks.has(offset.0, bytes) {
            return Ok(());
        }
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(self.start_addr().0 + offset.0)))
    }

    /// Gives the pages of `range` (whole pages within the region) back to the host: they read as zeros if they are touched again.
    ///
    /// # Errors
    /// As madvise(2); `InvalidInput` if the range isn't in the region.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        // SAFETY: Rust refers to no byte of guest memory, so that it doesn't matter that they become zeros; the mapping stays.
        unsafe { self.advise(range, libc::MADV_REMOVE) }
    }

    /// Puts the pages of `range` (within the region) into huge pages, with their content, or zeros where nothing is yet.
    ///
    /// # Errors
    /// As madvise(2); `InvalidInput` if the range isn't in the region.
    pub fn collapse(&self, range: Range<u64>) -> io::Result<()> {
        // SAFETY: no content changes.
        unsafe { self.advise(range, libc::MADV_COLLAPSE) }
    }

    /// madvise(2) for a part of the region.
    ///
    /// # Safety
    /// Whatever the advice does to the bytes of the range must be right for guest memory.
    unsafe fn advise(&self, range: Range<u64>, advice: i32) -> io::Result<()> {
        if range.start > range.end || range.end > self.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = (range.end - range.start) as usize;
        // SAFETY: within the mapping, which lives as long as `self`; the rest is the caller's promise.
        let result =
            unsafe { libc::madvise(self.mapping.as_ptr().add(range.start as usize).cast(), bytes, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Deref for Region {
    type Target = GuestRegionMmap<()>;

    #[inline]
    fn deref(&self) -> &Self::Target {
        &self.mapping
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    #[inline]
    fn len(&self) -> u64 {
        self.mapping.len()
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    #[inline]
    fn bitmap(&self) -> BS<'_, Self::B> {}

    #[inline]
    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.check(addr, 1)?;
        self.mapping.get_host_address(addr)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapping.file_offset()
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        self.check(offset, count)?;
        GuestMemoryRegion::get_slice(&self.mapping, offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::memory;

    #[test]
    fn only_plugged_blocks_are_memory_and_what_is_discarded_is_zero() {
        const MIB: u64 = 1 << 20;
        let hotplug = memory::Hotplug { bytes: 8 * MIB, block_bytes: 2 * MIB };
        let memory = memory::create_with(1, mote_vmm_api::HugePages::None, Some(hotplug)).unwrap();
        let start = memory::hotplug_start(MIB);
        let region = memory.find_region(GuestAddress(start)).unwrap();
        let blocks = region.blocks().unwrap();
        assert_eq!((blocks.count(), blocks.block_bytes()), (4, 2 * MIB));
        assert!(memory.write_obj(1_u8, GuestAddress(start)).is_err());
        blocks.set(1..3, true);
        assert_eq!((blocks.plugged_in(0..4), blocks.plugged_in(2..10)), (2, 1));
        let at = |offset| GuestAddress(start + offset);
        memory.write_slice(&[7; 4096], at(4 * MIB - 2048)).unwrap();
        for (offset, bytes) in [(2 * MIB - 1, 2), (6 * MIB - 1, 2), (0, 1), (6 * MIB, 1), (8 * MIB - 1, 1)] {
            assert!(memory.read_slice(&mut vec![0; bytes], at(offset)).is_err(), "{offset:#x}");
            assert!(memory.get_host_address(at(offset + bytes as u64 - 1)).is_err() || offset == 2 * MIB - 1);
        }
        blocks.set(1..2, false);
        assert!(memory.read_obj::<u8>(at(4 * MIB - 1)).is_err());
        assert_eq!(memory.read_obj::<u8>(at(4 * MIB)).unwrap(), 7);
        region.discard(4 * MIB..6 * MIB).unwrap();
        assert_eq!(memory.read_obj::<u8>(at(4 * MIB)).unwrap(), 0);
        assert!(region.discard(6 * MIB..9 * MIB).is_err());
    }
}
