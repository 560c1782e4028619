//! Whether a file is a kernel that the VMM can start.
//!
//! Two shapes are taken: an ELF executable whose entry point is a physical address (a `vmlinux`, or any freestanding
//! program for the 64-bit Linux boot protocol or PVH), and a Linux bzImage with a 64-bit entry point.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::format::{self, ElfKind, Format};

/// Program headers beyond this number are refused (a vmlinux has five).
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Notes beyond this size are not searched for the PVH entry.
const MAX_NOTE_BYTES: u64 = 64 * 1024;
/// A kernel must lie in the physical memory that a guest can have: below 1 TiB.
const MAX_PHYSICAL_ADDRESS: u64 = 1 << 40;

const EHDR_LEN: usize = 64;
const PHDR_LEN: u16 = 56;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const PT_TLS: u32 = 7;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry point (Xen's public/elfnote.h).
const PVH_NOTE_TYPE: u32 = 18;

/// A kernel that could boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelInfo {
    /// An x86-64 ELF kernel.
    Elf {
        /// Physical address of the entry point.
        entry: u64,
        /// Physical address of the 32-bit PVH entry point, if it has one.
        pvh_entry: Option<u64>,
    },
    /// A bzImage with a 64-bit entry.
    Bzimage {
        /// Version of the boot protocol, e.g. 0x020f.
        protocol: u16,
    },
}

/// Why a file is no kernel that could boot.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It can't be read.
    #[error("can't read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("no kernel: it is {0}, not an x86-64 ELF kernel (vmlinux) or a bzImage")]
    NotAKernel(Format),
    /// It is an ELF executable or bzImage that can't boot.
    #[error("no kernel that could boot: {0}")]
    Unbootable(&'static str),
}

/// Checks that the file at `path` is an x86-64 kernel that could boot.
///
/// # Errors
/// [`KernelError`], whose text is fit for the tenant (save for the path of [`KernelError::Io`]).
pub fn check_kernel(path: &Path) -> Result<KernelInfo, KernelError> {
    let io_error = |source| KernelError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io_error)?;
    let len = file.metadata().map_err(io_error)?.len();
    let mut reader = FileReader { file, len, error: None };
    let result = check(&mut reader);
    match reader.error {
        Some(source) => Err(io_error(source)),
        None => result,
    }
}

/// Where the bytes come from: a file, or memory in tests.
trait Content {
    fn len(&self) -> u64;
    /// The bytes at `offset`, as many as were asked for; `None` if they aren't there.
    fn bytes(&mut self, offset: u64, len: usize) -> Option<Vec<u8>>;
}

struct FileReader {
    file: File,
    len: u64,
    error: Option<io::Error>,
}

impl Content for FileReader {
    fn len(&self) -> u64 {
        self.len
    }

    fn bytes(&mut self, offset: u64, len: usize) -> Option<Vec<u8>> {
        if offset.checked_add(len as u64)? > self.len {
            return None;
        }
        let mut bytes = vec![0; len];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Some(bytes),
            Err(e) => {
                self.error = Some(e);
                None
            }
        }
    }
}

fn check(content: &mut dyn Content) -> Result<KernelInfo, KernelError> {
    let head_len = content.len().min(format::PROBE_BYTES as u64) as usize;
    let head = content.bytes(0, head_len).unwrap_or_default();
    match format::probe(&head) {
        Format::Elf(ElfKind::X86_64Executable) => check_elf(&head, content),
        Format::Bzimage => check_bzimage(&head, content.len()),
        other => Err(KernelError::NotAKernel(other)),
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..offset + 8)?.try_into().ok()?))
}

/// One ELF64 program header (System V ABI, "Program Header").
struct ProgramHeader {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
}

impl ProgramHeader {
    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(bytes, 0)?,
            offset: u64_at(bytes, 8)?,
            physical: u64_at(bytes, 24)?,
            file_size: u64_at(bytes, 32)?,
            memory_size: u64_at(bytes, 40)?,
        })
    }

    /// Whether the bytes are in the file and the memory can exist.
    fn check_load(&self, content_len: u64) -> Result<(), KernelError> {
        let unbootable = |reason| Err(KernelError::Unbootable(reason));
        if self.file_size > self.memory_size {
            return unbootable("a segment has more bytes in the file than in memory");
        }
        if self.offset.checked_add(self.file_size).is_none_or(|end| end > content_len) {
            return unbootable("the file is shorter than its segments (was it cut off?)");
        }
        if self.physical.checked_add(self.memory_size).is_none_or(|end| end > MAX_PHYSICAL_ADDRESS) {
            return unbootable("a segment lies at a physical address beyond 1 TiB");
        }
        Ok(())
    }

    fn contains(&self, address: u64) -> bool {
        self.physical <= address && address - self.physical < self.memory_size
    }
}

fn check_elf(head: &[u8], content: &mut dyn Content) -> Result<KernelInfo, KernelError> {
    const CUT: KernelError = KernelError::Unbootable("the ELF header is cut off");
    if head.len() < EHDR_LEN {
        return Err(CUT);
    }
    let entry = u64_at(head, 24).ok_or(CUT)?;
    let table = u64_at(head, 32).ok_or(CUT)?;
    let (entry_len, count) = (u16_at(head, 54).ok_or(CUT)?, u16_at(head, 56).ok_or(CUT)?);
    if count == 0 || count > MAX_PROGRAM_HEADERS || entry_len != PHDR_LEN {
        return Err(KernelError::Unbootable("the ELF file has no usable program headers"));
    }
    let bytes = content
        .bytes(table, usize::from(count) * usize::from(PHDR_LEN))
        .ok_or(KernelError::Unbootable("the ELF program headers lie beyond the end of the file"))?;
    let headers: Vec<_> =
        bytes.chunks_exact(usize::from(PHDR_LEN)).filter_map(ProgramHeader::parse).collect();
    if headers.iter().any(|h| matches!(h.kind, PT_INTERP | PT_TLS)) {
        return Err(KernelError::Unbootable("it is a program for an operating system, not a kernel"));
    }
    for header in headers.iter().filter(|h| h.kind == PT_LOAD) {
        header.check_load(content.len())?;
    }
    if !headers.iter().any(|h| h.kind == PT_LOAD && h.contains(entry)) {
        return Err(KernelError::Unbootable("its entry point lies in none of its segments' physical memory"));
    }
    let pvh_entry = headers.iter().filter(|h| h.kind == PT_NOTE).find_map(|h| find_pvh(h, content));
    if let Some(pvh) = pvh_entry
        && !headers.iter().any(|h| h.kind == PT_LOAD && h.contains(pvh))
    {
        return Err(KernelError::Unbootable(
            "its PVH entry point lies in none of its segments' physical memory",
        ));
    }
    Ok(KernelInfo::Elf { entry, pvh_entry })
}

/// Searches one note segment for Xen's PVH entry (System V ABI, "Note Section"; all fields are padded to 4 bytes).
fn find_pvh(header: &ProgramHeader, content: &mut dyn Content) -> Option<u64> {
    let notes = content.bytes(header.offset, usize::try_from(header.file_size.min(MAX_NOTE_BYTES)).ok()?)?;
    let mut rest = notes.as_slice();
    while rest.len() >= 12 {
        let (name_len, value_len, kind) = (u32_at(rest, 0)?, u32_at(rest, 4)?, u32_at(rest, 8)?);
        let name_end = 12_usize.checked_add(name_len as usize)?;
        let value_start = name_end.checked_next_multiple_of(4)?;
        let value_end = value_start.checked_add(value_len as usize)?;
        if kind == PVH_NOTE_TYPE && rest.get(12..name_end)? == b"Xen\0" {
            let value = rest.get(value_start..value_end)?;
            return u64_at(value, 0).or_else(|| u32_at(value, 0).map(u64::from));
        }
        rest = rest.get(value_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

/// Checks the setup header (Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
fn check_bzimage(head: &[u8], len: u64) -> Result<KernelInfo, KernelError> {
    const CUT: KernelError = KernelError::Unbootable("the bzImage's setup header is cut off");
    let protocol = u16_at(head, 0x206).ok_or(CUT)?;
    if protocol < 0x020c {
        return Err(KernelError::Unbootable(
            "the bzImage's boot protocol is older than 2.12 and has no 64-bit entry",
        ));
    }
    let xloadflags = u16_at(head, 0x236).ok_or(CUT)?;
    let loadflags = *head.get(0x211).ok_or(CUT)?;
    if xloadflags & 1 == 0 || loadflags & 1 == 0 {
        return Err(KernelError::Unbootable(
            "the bzImage has no 64-bit entry point (is it a 32-bit kernel?)",
        ));
    }
    // 0 sectors stand for 4, for old times' sake.
    let sectors = match *head.get(0x1f1).ok_or(CUT)? {
        0 => 4,
        n => u64::from(n),
    };
    let payload = u64::from(u32_at(head, 0x1f4).ok_or(CUT)?) * 16;
    let setup = (sectors + 1) * 512;
    // The size is rounded up to 16 bytes, so up to 15 of them may not be there.
    if payload == 0 || len + 15 < setup + payload {
        return Err(KernelError::Unbootable("the bzImage is shorter than its header says (was it cut off?)"));
    }
    Ok(KernelInfo::Bzimage { protocol })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Content for &[u8] {
        fn len(&self) -> u64 {
            <[u8]>::len(self) as u64
        }
        fn bytes(&mut self, offset: u64, len: usize) -> Option<Vec<u8>> {
            let start = usize::try_from(offset).ok()?;
            self.get(start..start.checked_add(len)?).map(<[u8]>::to_vec)
        }
    }

    fn check_bytes(bytes: &[u8]) -> Result<KernelInfo, KernelError> {
        check(&mut &*bytes)
    }

    struct Segment {
        kind: u32,
        offset: u64,
        physical: u64,
        file_size: u64,
        memory_size: u64,
    }

    fn elf(entry: u64, segments: &[Segment], len: usize) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        bytes.extend(entry.to_le_bytes());
        bytes.extend(64_u64.to_le_bytes());
        bytes.resize(54, 0);
        bytes.extend(PHDR_LEN.to_le_bytes());
        bytes.extend((segments.len() as u16).to_le_bytes());
        bytes.resize(64, 0);
        for s in segments {
            bytes.extend(s.kind.to_le_bytes());
            bytes.extend(5_u32.to_le_bytes());
            for field in [s.offset, 0, s.physical, s.file_size, s.memory_size, 4096] {
                bytes.extend(field.to_le_bytes());
            }
        }
        bytes.resize(len.max(bytes.len()), 0);
        bytes
    }

    fn load(offset: u64, physical: u64, file_size: u64, memory_size: u64) -> Segment {
        Segment { kind: PT_LOAD, offset, physical, file_size, memory_size }
    }

    fn bzimage() -> Vec<u8> {
        let mut bytes = vec![0; 5 * 512 + 4096];
        bytes[0x1f1] = 4;
        bytes[0x1f4..0x1f8].copy_from_slice(&256_u32.to_le_bytes());
        bytes[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x236] = 1;
        bytes
    }

    fn reason(bytes: &[u8]) -> String {
        check_bytes(bytes).expect_err("refused").to_string()
    }

    #[test]
    fn kernel_elf_passes_with_and_without_pvh() {
        let plain = elf(0x100_0000, &[load(0, 0x100_0000, 256, 4096)], 256);
        assert_eq!(
            check_bytes(&plain).expect("kernel"),
            KernelInfo::Elf { entry: 0x100_0000, pvh_entry: None }
        );
        let note = Segment { kind: PT_NOTE, offset: 256, physical: 0, file_size: 24, memory_size: 24 };
        let mut pvh = elf(0x100_0000, &[load(0, 0x100_0000, 256, 4096), note], 256);
        for word in [4, 8, PVH_NOTE_TYPE] {
            pvh.extend(word.to_le_bytes());
        }
        pvh.extend(b"Xen\0");
        pvh.extend(0x100_0010_u64.to_le_bytes());
        let expected = KernelInfo::Elf { entry: 0x100_0000, pvh_entry: Some(0x100_0010) };
        assert_eq!(check_bytes(&pvh).expect("kernel"), expected);
    }

    #[test]
    fn unbootable_elf_is_refused_with_the_reason() {
        let good = || load(0, 0x100_0000, 256, 4096);
        assert!(reason(&elf(0x100_1000, &[good()], 256)).contains("entry point"));
        assert!(reason(&elf(0x100_0000, &[], 256)).contains("program headers"));
        assert!(reason(&elf(0x100_0000, &[load(0, 0x100_0000, 512, 4096)], 256)).contains("shorter"));
        assert!(reason(&elf(0x100_0000, &[load(0, 0x100_0000, 256, 255)], 256)).contains("more bytes"));
        assert!(reason(&elf(0x100_0000, &[load(u64::MAX, 0x100_0000, 256, 256)], 256)).contains("shorter"));
        assert!(reason(&elf(u64::MAX, &[load(0, u64::MAX, 1, 1)], 256)).contains("beyond"));
        let interpreter = Segment { kind: PT_INTERP, ..good() };
        assert!(reason(&elf(0x100_0000, &[good(), interpreter], 256)).contains("operating system"));
        assert!(reason(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0").contains("cut off"));
    }

    #[test]
    fn programs_and_text_are_no_kernels() {
        let error = check_kernel(Path::new("/proc/self/exe")).expect_err("a program");
        assert!(error.to_string().contains("operating system"), "{error}");
        assert!(reason(b"#!/bin/sh\n").contains("raw disk"));
        assert!(reason(b"").contains("empty"));
        assert!(matches!(check_kernel(Path::new("/nonexistent")), Err(KernelError::Io { .. })));
    }

    #[test]
    fn bzimage_passes_only_whole_and_64_bit() {
        assert_eq!(check_bytes(&bzimage()).expect("kernel"), KernelInfo::Bzimage { protocol: 0x020f });
        let mut short = bzimage();
        short.truncate(5 * 512 + 4000);
        assert!(reason(&short).contains("shorter"));
        let mut old = bzimage();
        old[0x206] = 0x0b;
        assert!(reason(&old).contains("2.12"));
        let mut narrow = bzimage();
        narrow[0x236] = 0;
        assert!(reason(&narrow).contains("32-bit"));
        assert!(reason(&bzimage()[..0x206]).contains("cut off"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            check_bytes(&bytes).ok();
        }

        #[test]
        fn damaged_elf_never_panics(at in 16..256_usize, value in any::<u64>()) {
            let note = Segment { kind: PT_NOTE, offset: 100, physical: 0, file_size: 80, memory_size: 80 };
            let mut bytes = elf(0x100_0000, &[load(0, 0x100_0000, 256, 4096), note], 256);
            let end = bytes.len().min(at + 8);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            if let Ok(KernelInfo::Elf { entry, .. }) = check_bytes(&bytes) {
                prop_assert!(entry < MAX_PHYSICAL_ADDRESS);
            }
        }

        #[test]
        fn damaged_bzimage_never_panics(at in 0..0x260_usize, value in any::<u8>(), len in 0..7000_usize) {
            let mut bytes = bzimage();
            bytes[at] = value;
            bytes.truncate(len);
            check_bytes(&bytes).ok();
        }
    }
}
