//! ELF kernels (vmlinux): entered by PVH if they carry its note, else by the 64-bit Linux protocol.

use std::ops::Range;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::ByteValued;

use super::{Kernel, LoadError, Source, low_memory_end};
use crate::kvm::Protocol;
use crate::layout;
use crate::memory::{self, GuestMemory, HUGE_PAGE};

/// More than any kernel has (Linux: 5).
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Notes are a few hundred bytes; this bounds the time spent on hostile ones.
const MAX_NOTES: u64 = 1 << 20;
const EM_X86_64: u16 = 62;
const ELFCLASS64: u8 = 2;
const EI_CLASS: usize = 4;

pub(super) fn load(memory: &GuestMemory, source: &mut Source<'_>) -> Result<Kernel, LoadError> {
    let (end, filled) = check(memory, source)?;
    filled.into_iter().for_each(|range| memory::prefer_huge_pages(memory, range));
    let loaded =
        Elf::load(memory, None, &mut source.file, None).map_err(|error| source.broken(error.to_string()))?;
    let (entry, protocol) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => (address.0, Protocol::Pvh),
        _ => (loaded.kernel_load.0, Protocol::Linux64),
    };
    if !(layout::HIGH_RAM..end).contains(&entry) {
        return Err(source.broken(format!("its entry point {entry:#x} lies outside of it")));
    }
    Ok(Kernel {
        entry,
        protocol,
        end,
        initrd_max: u64::from(u32::MAX),
        command_line_max: layout::COMMAND_LINE_MAX - 1,
        header: None,
    })
}

/// Checks all that the loader will use, and returns the end of the loaded kernel, and which parts of memory will be filled.
fn check(memory: &GuestMemory, source: &Source<'_>) -> Result<(u64, Vec<Range<u64>>), LoadError> {
    if source.size < size_of::<Elf64_Ehdr>() as u64 {
        return Err(source.broken("it ends within its ELF header"));
    }
    let mut header = Elf64_Ehdr::default();
    source.read_at(0, header.as_mut_slice())?;
    if header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64 {
        return Err(source.broken("it is an ELF file, but not for x86-64"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(source.broken("its program headers have an unknown size"));
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(source.broken(format!("it has {} program headers", header.e_phnum)));
    }
    let (mut end, mut filled) = (0, Vec::<Range<u64>>::new());
    for index in 0..u64::from(header.e_phnum) {
        let offset = index
            .checked_mul(size_of::<Elf64_Phdr>() as u64)
            .and_then(|offset| offset.checked_add(header.e_phoff))
            .filter(|offset| {
                offset.checked_add(size_of::<Elf64_Phdr>() as u64).is_some_and(|end| end <= source.size)
            })
            .ok_or_else(|| source.broken("it ends within its program headers"))?;
        let mut segment = Elf64_Phdr::default();
        source.read_at(offset, segment.as_mut_slice())?;
        let segment_end = check_segment(memory, source, &segment)?;
        end = end.max(segment_end);
        if segment_end > 0 {
            let start = segment.p_paddr;
            let range = start..start + segment.p_filesz;
            // Those of a kernel follow each other but for some pages.
            match filled.last_mut().filter(|last| start >= last.start && start < last.end + HUGE_PAGE) {
                Some(last) => last.end = last.end.max(range.end),
                None => filled.push(range),
            }
        }
    }
    if end == 0 {
        return Err(source.broken("it has nothing to load"));
    }
    Ok((end, filled))
}

/// Returns the end of a segment that is loaded, 0 for others.
fn check_segment(memory: &GuestMemory, source: &Source<'_>, segment: &Elf64_Phdr) -> Result<u64, LoadError> {
    if segment.p_type != PT_LOAD && segment.p_type != PT_NOTE {
        return Ok(0);
    }
    if segment.p_offset.checked_add(segment.p_filesz).is_none_or(|end| end > source.size) {
        return Err(source.broken("it ends within one of its segments"));
    }
    if segment.p_type == PT_NOTE {
        return match segment.p_filesz {
            0..=MAX_NOTES => Ok(0),
            size => Err(source.broken(format!("it has {size} bytes of notes"))),
        };
    }
    if segment.p_memsz == 0 {
        return Ok(0);
    }
    if segment.p_filesz > segment.p_memsz {
        return Err(source.broken("a segment is larger in the file than in memory"));
    }
    if segment.p_paddr < layout::HIGH_RAM {
        return Err(
            source.broken(format!("a segment is to be loaded at {:#x}, below 1 MiB", segment.p_paddr))
        );
    }
    let available = low_memory_end(memory);
    match segment.p_paddr.checked_add(segment.p_memsz) {
        Some(end) if end <= available => Ok(end),
        Some(end) => Err(LoadError::KernelTooLarge { path: source.path.to_owned(), end, available }),
        None => Err(source.broken("a segment wraps around the end of the address space")),
    }
}
