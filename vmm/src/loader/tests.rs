//! Kernels and initrds, good and hostile.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::ByteValued;

use super::*;

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn memory() -> GuestMemory {
    crate::memory::create(64).unwrap()
}

/// An ELF kernel of one segment at 1 MiB, with a PVH note if asked for.
fn elf(pvh: Option<u32>, load_at: u64, memory_size: u64) -> Vec<u8> {
    use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
    let mut header =
        Elf64_Ehdr { e_machine: 62, e_entry: load_at, e_phoff: 64, e_phentsize: 56, ..Default::default() };
    header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header.e_phnum = 2;
    let code = [0xf4u8; 32];
    let mut note = Vec::new();
    if let Some(entry) = pvh {
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
    }
    let offset = 64 + 2 * 56;
    let load = Elf64_Phdr {
        p_type: PT_LOAD,
        p_offset: offset,
        p_paddr: load_at,
        p_filesz: code.len() as u64,
        p_memsz: memory_size,
        ..Default::default()
    };
    let notes = Elf64_Phdr {
        p_type: PT_NOTE,
        p_offset: offset + code.len() as u64,
        p_filesz: note.len() as u64,
        ..Default::default()
    };
    [header.as_slice(), load.as_slice(), notes.as_slice(), &code, &note].concat()
}

/// A bzImage of which only the header matters.
fn bzimage(init_size: u32, version: u16) -> Vec<u8> {
    let header = linux_loader::bootparam::setup_header {
        setup_sects: 1,
        header: u32::from_le_bytes(*b"HdrS"),
        version,
        loadflags: 1,
        xloadflags: 1,
        pref_address: 16 * MIB,
        init_size,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 255,
        ..Default::default()
    };
    let mut bytes = vec![0; 2 * 512 + 4096];
    bytes[0x1f1..][..size_of_val(&header)].copy_from_slice(header.as_slice());
    bytes[1024] = 0x90;
    bytes
}

fn load(bytes: &[u8]) -> Result<Kernel, LoadError> {
    load_kernel(&memory(), file(bytes).path())
}

#[test]
fn an_elf_is_entered_by_its_note_or_else_at_its_entry_point() {
    let kernel = load(&elf(Some(0x10_0010), MIB, 4096)).unwrap();
    assert_eq!((kernel.entry, kernel.protocol, kernel.end), (0x10_0010, Protocol::Pvh, MIB + 4096));
    let kernel = load(&elf(None, MIB, 4096)).unwrap();
    assert_eq!((kernel.entry, kernel.protocol), (MIB, Protocol::Linux64));
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry_point() {
    let memory = memory();
    let kernel = load_kernel(&memory, file(&bzimage(8 << 20, 0x020f)).path()).unwrap();
    assert_eq!((kernel.entry, kernel.end), (16 * MIB + 0x200, 24 * MIB));
    assert_eq!((kernel.initrd_max, kernel.command_line_max), (0x8000_0000, 255));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(16 * MIB)).unwrap(), 0x90);
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    for bytes in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0; 4096], &bzimage(8 << 20, 0x0204)] {
        let error = load(bytes).unwrap_err();
        assert!(matches!(error, LoadError::Kernel { .. }), "{error}");
        assert!(error.to_string().starts_with("the kernel /"), "{error}");
    }
}

#[test]
fn a_kernel_for_another_processor_is_refused() {
    let mut bytes = elf(None, MIB, 4096);
    bytes[18] = 183;
    assert!(load(&bytes).unwrap_err().to_string().contains("not for x86-64"));
}

#[test]
fn kernels_larger_than_memory_are_told_from_broken_ones() {
    assert!(matches!(load(&elf(None, MIB, 64 * MIB)), Err(LoadError::KernelTooLarge { .. })));
    assert!(matches!(load(&elf(None, u64::MAX - 4096, 4096)), Err(LoadError::KernelTooLarge { .. })));
    assert!(matches!(load(&elf(None, u64::MAX - 100, 4096)), Err(LoadError::Kernel { .. })));
    assert!(matches!(load(&bzimage(49 << 20, 0x020f)), Err(LoadError::KernelTooLarge { .. })));
    assert!(load(&bzimage(48 << 20, 0x020f)).is_ok());
}

#[test]
fn segments_over_the_boot_information_are_refused() {
    assert!(load(&elf(None, 0x7000, 4096)).unwrap_err().to_string().contains("below 1 MiB"));
}

#[test]
fn an_entry_point_outside_of_the_kernel_is_refused() {
    assert!(load(&elf(Some(0x7000), MIB, 4096)).is_err());
    assert!(load(&elf(Some(0x7000_0000), MIB, 4096)).is_err());
}

#[test]
fn directories_pipes_and_missing_files_are_refused() {
    assert!(matches!(load_kernel(&memory(), Path::new("/tmp")), Err(LoadError::NotAFile { .. })));
    assert!(matches!(load_kernel(&memory(), Path::new("/dev/zero")), Err(LoadError::NotAFile { .. })));
    assert!(matches!(load_kernel(&memory(), Path::new("/no/such")), Err(LoadError::Read { .. })));
}

#[test]
fn an_initrd_lies_at_the_top_and_never_in_the_kernel() {
    let memory = memory();
    let kernel = load_kernel(&memory, file(&elf(None, MIB, 4096)).path()).unwrap();
    let initrd = load_initrd(&memory, &kernel, file(&[7; 5000]).path()).unwrap();
    assert_eq!(initrd, Initrd { address: 64 * MIB - 8192, size: 5000 });
    assert_eq!(memory.read_obj::<u8>(GuestAddress(initrd.address + 4999)).unwrap(), 7);
    let large = NamedTempFile::new().unwrap();
    large.as_file().set_len(63 * MIB).unwrap();
    let error = load_initrd(&memory, &kernel, large.path()).unwrap_err();
    assert!(
        matches!(error, LoadError::InitrdTooLarge { available, .. } if available == 63 * MIB - 4096),
        "{error}"
    );
    assert!(matches!(load_initrd(&memory, &kernel, file(b"").path()), Err(LoadError::InitrdEmpty(_))));
}

#[test]
fn the_command_line_is_limited_by_the_kernel() {
    let memory = memory();
    let kernel = load_kernel(&memory, file(&bzimage(8 << 20, 0x020f)).path()).unwrap();
    let write = |line: &str| write_boot_information(&memory, &kernel, None, line, 0xe_0000);
    assert!(write(&"a".repeat(255)).is_ok());
    assert!(matches!(write(&"a".repeat(256)), Err(LoadError::CommandLine { length: 256, limit: 255 })));
    assert!(matches!(write("a\0b"), Err(LoadError::CommandLineZero)));
}

#[test]
fn a_pvh_kernel_is_told_its_memory_and_initrd() {
    let memory = memory();
    let kernel = load_kernel(&memory, file(&elf(Some(MIB as u32), MIB, 4096)).path()).unwrap();
    let initrd = Initrd { address: 32 * MIB, size: 10 };
    write_boot_information(&memory, &kernel, Some(initrd), "x", 0xe_0000).unwrap();
    let word = |address: u64| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
    assert_eq!(word(layout::PVH_START_INFO), 0x336e_c578);
    assert_eq!(word(layout::PVH_START_INFO + 12), 1, "one module");
    assert_eq!(u64::from(word(layout::PVH_MODULES)), 32 * MIB);
    assert_eq!(word(layout::PVH_START_INFO + 48), 4, "four ranges");
    assert_eq!(u64::from(word(layout::PVH_MEMORY_MAP + 2 * 24)), layout::HIGH_RAM);
}

#[test]
fn the_zero_page_has_e820_and_rsdp() {
    let memory = memory();
    let kernel = load_kernel(&memory, file(&elf(None, MIB, 4096)).path()).unwrap();
    write_boot_information(&memory, &kernel, None, "x", 0xe_0000).unwrap();
    let byte = |offset: u64| memory.read_obj::<u8>(GuestAddress(layout::ZERO_PAGE + offset)).unwrap();
    assert_eq!(byte(0x1e8), 4, "e820 entries");
    assert_eq!(memory.read_obj::<u64>(GuestAddress(layout::ZERO_PAGE + 0x70)).unwrap(), 0xe_0000);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + 0x228)).unwrap(), 0x2_0000);
}

#[test]
fn the_memory_map_continues_after_the_hole() {
    let map = memory_map(&crate::memory::create(4096).unwrap());
    assert_eq!(map.last(), Some(&(1 << 32, 1 << 30, MemoryKind::Ram)));
    assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_damage_to_a_kernel_panics(
        kind in 0..2, offset in 0usize..0x300, bytes in proptest::collection::vec(any::<u8>(), 1..16), cut in any::<u16>(),
    ) {
        let mut kernel = if kind == 0 { elf(Some(MIB as u32), MIB, 4096) } else { bzimage(8 << 20, 0x020f) };
        for (byte, value) in kernel.iter_mut().skip(offset).zip(&bytes) {
            *byte = *value;
        }
        let length = kernel.len().min(usize::from(cut) + 1);
        kernel.truncate(length);
        let memory = memory();
        if let Ok(kernel) = load_kernel(&memory, file(&kernel).path()) {
            let _ = write_boot_information(&memory, &kernel, None, "x", 0xe_0000);
        }
    }
}
