//! Guest memory: one memfd, mapped shared, so that it can later be shared with other processes, saved and faulted; of ordinary or of huge pages.
//!
//! Memory is one region from 0 up to [`layout::MMIO_HOLE`]; what does not fit below continues at 4 GiB.
//! Memory that can be plugged and unplugged is one more region behind it ([`Hotplug`]).
//! Nothing is populated: a page costs something from when the guest or a loader first touches it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use mote_vmm_api::{HugePages, VmConfig};
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap,
};

use crate::layout;

mod pages;
mod region;

pub(crate) use pages::HUGE_PAGE;
use pages::Pages;
pub use region::{Blocks, Region};

/// The guest's physical memory as devices and loaders see it. Cheap to clone: it is shared.
pub type GuestMemory = GuestRegionCollection<Region>;

/// More than any host has and less than what the arithmetic here or a 46-bit physical address space holds.
pub const MAX_MEMORY_MIB: usize = 32 << 20;

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or beyond [`MAX_MEMORY_MIB`].
    #[error("mem_size_mib must be between 1 and {MAX_MEMORY_MIB}, not {0}")]
    Size(usize),
    /// The memory file could not be created.
    #[error("cannot create the memory file of {size_mib} MiB")]
    Create {
        /// Wanted size.
        size_mib: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The host's pool of huge pages is too small.
    #[error(
        "cannot map {size_mib} MiB of huge pages: are so many free (sysctl vm.nr_hugepages, pages of 2 MiB)?"
    )]
    HugePages {
        /// Wanted size.
        size_mib: usize,
        /// Cause.
        #[source]
        source: FromRangesError,
    },
    /// The memory file could not be mapped.
    #[error("cannot map guest memory")]
    Map(#[from] FromRangesError),
}

/// The address ranges (start, length in bytes) that hold `size` bytes of memory.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::MMIO_HOLE);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::MMIO_HOLE_END, size - low));
    }
    ranges
}

/// Makes guest memory of `size_mib` MiB of ordinary pages, all zero.
pub fn create(size_mib: usize) -> Result<GuestMemory, MemoryError> {
    create_of(size_mib, HugePages::None)
}

/// Memory that can be plugged and unplugged, in blocks.
#[derive(Debug, Clone, Copy)]
pub struct Hotplug {
    /// All of it.
    pub bytes: u64,
    /// A divisor of `bytes`.
    pub block_bytes: u64,
}

/// Where [`Hotplug`] memory begins behind `size` bytes of other memory.
pub fn hotplug_start(size: u64) -> u64 {
    let end = ranges(size).last().map_or(0, |(start, length)| start + length);
    end.max(layout::MMIO_HOLE_END).next_multiple_of(layout::DEVICE_MEMORY_ALIGNMENT)
}

/// Makes a machine's guest memory, all zero, nothing plugged.
pub fn create_for(config: &VmConfig) -> Result<GuestMemory, MemoryError> {
    let machine = &config.machine_config;
    let hotplug = config.memory_hotplug.map(|hotplug| Hotplug {
        bytes: (hotplug.total_size_mib as u64) << 20,
        block_bytes: (hotplug.block_size_mib as u64) << 20,
    });
    create_with(machine.mem_size_mib, machine.huge_pages, hotplug)
}

/// Makes guest memory of `size_mib` MiB (even with huge pages), all zero.
pub fn create_of(size_mib: usize, pages: HugePages) -> Result<GuestMemory, MemoryError> {
    create_with(size_mib, pages, None)
}

/// The same and, with ordinary pages, memory that can be plugged.
///
/// Huge pages are taken from the pool at once, in number: a page that isn't there at a fault would be the end of the process.
pub fn create_with(
    size_mib: usize,
    pages: HugePages,
    hotplug: Option<Hotplug>,
) -> Result<GuestMemory, MemoryError> {
    let is_huge = pages == HugePages::TwoMib;
    if size_mib == 0 || size_mib > MAX_MEMORY_MIB {
        return Err(MemoryError::Size(size_mib));
    }
    let size = (size_mib as u64) << 20;
    let more = hotplug.map_or(0, |hotplug| hotplug.bytes);
    let file =
        memory_file(size + more, is_huge).map_err(|source| MemoryError::Create { size_mib, source })?;
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::with_capacity(2);
    let hotplug = hotplug.map(|hotplug| (hotplug_start(size), hotplug.bytes, Some(hotplug.block_bytes)));
    let always = ranges(size).into_iter().map(|(start, length)| (start, length, None));
    for (start, length, block_bytes) in always.chain(hotplug) {
        let flags = libc::MAP_SHARED | if is_huge { 0 } else { libc::MAP_NORESERVE };
        let failed = |source| match FromRangesError::from(source) {
            source if is_huge => MemoryError::HugePages { size_mib, source },
            source => source.into(),
        };
        let pages = Pages::of_file(&file, offset, length as usize, flags)
            .map_err(|source| failed(MmapRegionError::Mmap(source)))?;
        let builder = MmapRegionBuilder::new(length as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_file_offset(FileOffset::from_arc(file.clone(), offset));
        // SAFETY: `pages` has as many bytes mapped, and the region keeps it as long as itself.
        let mapping = unsafe { builder.with_raw_mmap_pointer(pages.start()) }.build().map_err(failed)?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(FromRangesError::InvalidGuestRegion)?;
        let blocks = block_bytes.map(|block_bytes| Arc::new(Blocks::new(length, block_bytes)));
        regions.push(Region::new(region, blocks).with_pages(pages));
        offset += length;
    }
    Ok(GuestMemory::from_regions(regions).map_err(FromRangesError::from)?)
}

/// Has the blocks of 2 MiB that are wholly within `range` in huge pages, if the host's kernel can do that now (Linux 6.1 with
/// memory that isn't too fragmented), whatever its settings are for memory of which it isn't known whether it is used. For
/// what is about to be filled: one fault and one clearing instead of 512, in this process and in the guest.
pub fn prefer_huge_pages(memory: &GuestMemory, range: Range<u64>) {
    let (start, end) = (range.start.next_multiple_of(HUGE_PAGE), range.end & !(HUGE_PAGE - 1));
    let Some(region) = memory.find_region(GuestAddress(start)) else { return };
    let first = region.start_addr().0;
    if start < end && end <= first + region.len() {
        // Linux collapses no block of a file that is a hole: a page of each is brought into being.
        let touched =
            (start..end).step_by(HUGE_PAGE as usize).map(|at| memory.read_obj::<u8>(GuestAddress(at)));
        if touched.collect::<Result<Vec<_>, _>>().is_ok() {
            // A kernel that can't leaves all as it is.
            let _ = region.collapse(start - first..end - first);
        }
    }
}

fn memory_file(size: u64, is_huge: bool) -> io::Result<File> {
    let pages = if is_huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    // SAFETY: the name is a C string literal; the call has no other pointer.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | pages) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        assert_eq!(ranges(1 << 20), [(0, 1 << 20)]);
        assert_eq!(ranges(0xc000_0000), [(0, 0xc000_0000)]);
    }

    #[test]
    fn memory_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(ranges(0xc000_0000 + (5 << 20)), [(0, 0xc000_0000), (1 << 32, 5 << 20)]);
    }

    proptest::proptest! {
        /// Whatever the size: all of it is somewhere, once, outside of what devices and KVM have below 4 GiB, and memory that
        /// is plugged in begins behind it.
        #[test]
        fn every_byte_is_in_one_range_and_none_where_devices_are(mib in 1..=MAX_MEMORY_MIB as u64) {
            let size = mib << 20;
            let ranges = ranges(size);
            proptest::prop_assert_eq!(ranges.iter().map(|(_, length)| length).sum::<u64>(), size);
            let hole = layout::MMIO_HOLE..layout::MMIO_HOLE_END;
            let mut end = 0;
            for (start, length) in ranges {
                proptest::prop_assert!(length > 0 && start >= end);
                end = start + length;
                proptest::prop_assert!(end <= hole.start || start >= hole.end);
            }
            let plugged = hotplug_start(size);
            proptest::prop_assert!(plugged >= end.max(hole.end) && plugged % layout::DEVICE_MEMORY_ALIGNMENT == 0);
            proptest::prop_assert!(plugged - end.max(hole.end) < layout::DEVICE_MEMORY_ALIGNMENT);
        }
    }

    #[test]
    fn what_lies_in_the_first_mebibyte_and_in_the_hole_does_not_overlap() {
        let places = [
            [layout::GDT, layout::PVH_START_INFO],
            [layout::PVH_START_INFO, layout::PVH_MODULES],
            [layout::PVH_MODULES, layout::PVH_MEMORY_MAP],
            [layout::PVH_MEMORY_MAP, layout::ZERO_PAGE],
            [layout::ZERO_PAGE, layout::ZERO_PAGE + 0x1000],
            [layout::BOOT_STACK, layout::PAGE_TABLES],
            [layout::PAGE_TABLES, layout::COMMAND_LINE],
            [layout::COMMAND_LINE, layout::COMMAND_LINE + layout::COMMAND_LINE_MAX as u64],
            [layout::LOW_RAM_END, layout::VM_GENERATION_ID],
            [layout::VM_GENERATION_ID, layout::ACPI_TABLES],
            [layout::ACPI_TABLES, layout::ACPI_TABLES_END],
            [layout::SMBIOS, layout::SMBIOS_END],
            [layout::RESET_VECTOR, layout::HIGH_RAM],
            [layout::BOOT_TIMER, layout::BOOT_TIMER + 8],
            [
                layout::VIRTIO_MMIO,
                layout::VIRTIO_MMIO + layout::VIRTIO_MMIO_SIZE * layout::MAX_VIRTIO_DEVICES as u64,
            ],
            [layout::PCI_WINDOW, layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE],
            [layout::PCI_ECAM, layout::PCI_ECAM + layout::PCI_ECAM_SIZE],
            [layout::IO_APIC.into(), u64::from(layout::IO_APIC) + 0x1000],
            [layout::LOCAL_APIC.into(), u64::from(layout::LOCAL_APIC) + 0x1000],
            [layout::KVM_IDENTITY_MAP, layout::KVM_TSS],
            [layout::KVM_TSS, layout::KVM_TSS + 0x3000],
        ];
        for [start, end] in places {
            assert!(start < end && end <= layout::MMIO_HOLE_END, "{start:#x} to {end:#x}");
        }
        for ([_, end], [start, _]) in places.iter().zip(&places[1..]) {
            assert!(end <= start, "{end:#x} is behind {start:#x}");
        }
    }

    #[test]
    fn both_ranges_are_separate_parts_of_the_file() {
        let memory = create(3 * 1024 + 1).unwrap();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 32)).unwrap(), 0);
        assert_eq!(memory.num_regions(), 2);
        assert!(memory.read_obj::<u8>(GuestAddress(0xc000_0000)).is_err());
    }

    #[test]
    fn huge_pages_are_there_or_the_pool_is_named() {
        match create_of(4, HugePages::TwoMib) {
            Ok(memory) => memory.write_obj(1u8, GuestAddress(0x3f_ffff)).unwrap(),
            // At least the mistake of a small pool must not wait for the first fault.
            Err(error) => assert!(
                matches!(error, MemoryError::HugePages { .. } | MemoryError::Create { .. }),
                "{error}"
            ),
        }
        // More than any pool.
        let error = create_of(MAX_MEMORY_MIB, HugePages::TwoMib).unwrap_err();
        assert!(!matches!(error, MemoryError::Size(_)), "{error}");
    }

    #[test]
    fn memory_lies_where_huge_pages_can_be_and_keeps_its_content_in_them() {
        let memory = create(8).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as u64 % HUGE_PAGE, 0);
        }
        let marks = [0_u64, 2 << 20, (4 << 20) - 8, (6 << 20) - 8, (8 << 20) - 8];
        marks.iter().for_each(|&at| memory.write_obj(at + 1, GuestAddress(at)).unwrap());
        // Whole blocks, parts of blocks, none, and what isn't there.
        for range in [1 << 20..7 << 20, 0..8 << 20, 5..4096, 7 << 20..u64::MAX, 9 << 20..10 << 20] {
            prefer_huge_pages(&memory, range);
        }
        for at in marks {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), at + 1);
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress(5 << 20)).unwrap(), 0);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(matches!(create(0), Err(MemoryError::Size(0))));
        assert!(matches!(create(usize::MAX), Err(MemoryError::Size(_))));
    }
}
