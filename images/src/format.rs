//! What a file is, by its content.
//!
//! A tenant may declare anything: what counts is what the bytes are. Formats that name other files (a qcow2 backing
//! file, a VMDK descriptor) are dangerous where a later reader guesses the format again, so content that is in such a
//! format is never accepted as a raw disk.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Bytes from the beginning that [`probe`] looks at. More may be given; fewer make it miss ISO 9660.
pub const PROBE_BYTES: usize = 0x8000 + 2048;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// No bytes at all.
    Empty,
    /// Nothing that is known: so it can only be a raw disk.
    Raw,
    /// An ISO 9660 file system, which is also a raw disk.
    Iso,
    /// QEMU copy-on-write, version 2 or 3 (and 1, which has the same magic).
    Qcow2,
    /// QEMU enhanced disk.
    Qed,
    /// VMware disk, or its text descriptor.
    Vmdk,
    /// VirtualBox disk.
    Vdi,
    /// Virtual PC dynamic disk.
    Vhd,
    /// Hyper-V disk.
    Vhdx,
    /// Parallels disk.
    Parallels,
    /// LUKS-encrypted volume.
    Luks,
    /// An ELF file.
    Elf(ElfKind),
    /// A Linux bzImage.
    Bzimage,
    /// An initial RAM disk: a cpio archive, perhaps compressed.
    Initrd(Compression),
}

/// What kind of ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElfKind {
    /// 64-bit x86 executable (`ET_EXEC` or `ET_DYN`): may be a kernel.
    X86_64Executable,
    /// For another processor, word size or purpose.
    Other,
}

/// How an initial RAM disk is compressed (what the kernel's `lib/decompress.c` knows).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain "newc" cpio archive (also one that begins with processor microcode).
    None,
    /// gzip
    Gzip,
    /// xz
    Xz,
    /// Zstandard
    Zstd,
    /// LZ4 (legacy frame)
    Lz4,
    /// bzip2
    Bzip2,
    /// LZMA (alone)
    Lzma,
    /// LZO
    Lzo,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "an empty file",
            Self::Raw => "a raw disk (or data in no known format)",
            Self::Iso => "an ISO 9660 image",
            Self::Qcow2 => "a qcow2 disk",
            Self::Qed => "a QED disk",
            Self::Vmdk => "a VMDK disk",
            Self::Vdi => "a VDI disk",
            Self::Vhd => "a VHD disk",
            Self::Vhdx => "a VHDX disk",
            Self::Parallels => "a Parallels disk",
            Self::Luks => "a LUKS volume",
            Self::Elf(ElfKind::X86_64Executable) => "an x86-64 ELF executable",
            Self::Elf(ElfKind::Other) => "an ELF file that is no x86-64 executable",
            Self::Bzimage => "a Linux bzImage",
            Self::Initrd(Compression::None) => "an initial RAM disk (cpio)",
            Self::Initrd(Compression::Gzip) => "a gzip file (initial RAM disk)",
            Self::Initrd(Compression::Xz) => "an xz file (initial RAM disk)",
            Self::Initrd(Compression::Zstd) => "a Zstandard file (initial RAM disk)",
            Self::Initrd(Compression::Lz4) => "an LZ4 file (initial RAM disk)",
            Self::Initrd(Compression::Bzip2) => "a bzip2 file (initial RAM disk)",
            Self::Initrd(Compression::Lzma) => "an LZMA file (initial RAM disk)",
            Self::Initrd(Compression::Lzo) => "an LZO file (initial RAM disk)",
        })
    }
}

/// Recognises content by its first bytes ([`PROBE_BYTES`] are enough; any number is allowed).
#[must_use]
pub fn probe(head: &[u8]) -> Format {
    if head.is_empty() {
        return Format::Empty;
    }
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    const CONTAINERS: &[(usize, &[u8], Format)] = &[
        (0, b"QFI\xfb", Format::Qcow2),
        (0, b"QED\0", Format::Qed),
        (0, b"KDMV", Format::Vmdk),
        (0, b"COWD", Format::Vmdk),
        (0, b"# Disk DescriptorFile", Format::Vmdk),
        (0x40, b"\x7f\x10\xda\xbe", Format::Vdi),
        (0, b"conectix", Format::Vhd),
        (0, b"vhdxfile", Format::Vhdx),
        (0, b"WithoutFreeSpace", Format::Parallels),
        (0, b"WithouFreSpacExt", Format::Parallels),
        (0, b"LUKS\xba\xbe", Format::Luks),
        (0, b"070701", Format::Initrd(Compression::None)),
        (0, b"070702", Format::Initrd(Compression::None)),
        (0, b"\x1f\x8b\x08", Format::Initrd(Compression::Gzip)),
        (0, b"\xfd7zXZ\0", Format::Initrd(Compression::Xz)),
        (0, b"\x28\xb5\x2f\xfd", Format::Initrd(Compression::Zstd)),
        (0, b"\x02\x21\x4c\x18", Format::Initrd(Compression::Lz4)),
        (0, b"BZh", Format::Initrd(Compression::Bzip2)),
        (0, b"\x5d\0\0", Format::Initrd(Compression::Lzma)),
        (0, b"\x89LZO\0\x0d\x0a\x1a\x0a", Format::Initrd(Compression::Lzo)),
    ];
    if let Some((_, _, format)) = CONTAINERS.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return *format;
    }
    if at(0, b"\x7fELF") {
        // Class 64, little-endian; e_type at 16, e_machine at 18 (System V ABI, ELF header).
        let wanted = at(4, &[2, 1]) && at(18, &[62, 0]) && (at(16, &[2, 0]) || at(16, &[3, 0]));
        return Format::Elf(if wanted { ElfKind::X86_64Executable } else { ElfKind::Other });
    }
    // Linux x86 boot protocol: boot flag and header magic.
    if at(0x1fe, b"\x55\xaa") && at(0x202, b"HdrS") {
        return Format::Bzimage;
    }
    if at(0x8001, b"CD001") { Format::Iso } else { Format::Raw }
}

/// Recognises a file by its first bytes.
///
/// # Errors
/// What opening or reading the file gives.
pub fn probe_file(path: &Path) -> io::Result<Format> {
    let mut head = Vec::with_capacity(PROBE_BYTES);
    File::open(path)?.take(PROBE_BYTES as u64).read_to_end(&mut head)?;
    Ok(probe(&head))
}

/// Content that is not what its owner declared, or that Mote does not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The content is something else.
    #[error("the image was declared as '{declared}' ({meaning}), but its content is {actual}")]
    Mismatch {
        /// Glance's `disk_format`.
        declared: &'static str,
        /// What that stands for.
        meaning: &'static str,
        /// What was found.
        actual: Format,
    },
    /// The declared format is not supported.
    #[error(
        "disk_format '{0}' is not supported: use 'raw', 'qcow2' or 'iso' for disks, 'aki' for kernels, 'ari' for initial RAM disks"
    )]
    Unsupported(String),
}

/// Checks content against Glance's `disk_format`: `raw`, `qcow2`, `iso`, `aki` (kernel) or `ari` (initial RAM disk).
///
/// A qcow2 disk that passes is as hostile as before: see [`qcow2`](crate::qcow2). A kernel that passes should also pass [`check_kernel`](crate::kernel::check_kernel).
///
/// # Errors
/// [`FormatError`], whose text is fit for the tenant.
pub fn check_declared(disk_format: &str, actual: Format) -> Result<(), FormatError> {
    let (declared, meaning, fits) = match disk_format {
        "raw" => ("raw", "a raw disk", matches!(actual, Format::Raw | Format::Iso)),
        "qcow2" => ("qcow2", "a qcow2 disk", actual == Format::Qcow2),
        "iso" => ("iso", "an ISO 9660 image", actual == Format::Iso),
        "aki" => {
            ("aki", "a kernel", matches!(actual, Format::Elf(ElfKind::X86_64Executable) | Format::Bzimage))
        }
        "ari" => ("ari", "an initial RAM disk", matches!(actual, Format::Initrd(_))),
        other => return Err(FormatError::Unsupported(other.chars().take(64).collect())),
    };
    if fits { Ok(()) } else { Err(FormatError::Mismatch { declared, meaning, actual }) }
}

pub use crate::kernel::{KernelError, KernelInfo, check_kernel};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; PROBE_BYTES];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn known_formats_are_recognised() {
        assert_eq!(probe(b""), Format::Empty);
        assert_eq!(probe(b"hello, world"), Format::Raw);
        assert_eq!(probe(&with(0, b"QFI\xfb\0\0\0\x03")), Format::Qcow2);
        assert_eq!(probe(&with(0x40, b"\x7f\x10\xda\xbe")), Format::Vdi);
        assert_eq!(probe(&with(0x8001, b"CD001")), Format::Iso);
        assert_eq!(probe(&with(0, b"\x1f\x8b\x08")), Format::Initrd(Compression::Gzip));
        assert_eq!(probe(b"070701"), Format::Initrd(Compression::None));
        // A disk with a partition table is a disk, although its boot flag is a bzImage's, too.
        assert_eq!(probe(&with(0x1fe, b"\x55\xaa")), Format::Raw);
        assert_eq!(probe(&with(0x1fe, b"\x55\xaa\0\0HdrS")), Format::Bzimage);
    }

    #[test]
    fn elf_kinds_are_told_apart() {
        let own = probe_file(Path::new("/proc/self/exe")).expect("read");
        assert_eq!(own, Format::Elf(ElfKind::X86_64Executable));
        assert_eq!(probe(b"\x7fELF"), Format::Elf(ElfKind::Other));
        assert_eq!(probe(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0"), Format::Elf(ElfKind::Other));
    }

    #[test]
    fn declared_and_actual_must_agree() {
        assert_eq!(check_declared("raw", Format::Raw), Ok(()));
        assert_eq!(check_declared("raw", Format::Iso), Ok(()));
        assert_eq!(check_declared("qcow2", Format::Qcow2), Ok(()));
        assert_eq!(check_declared("aki", Format::Bzimage), Ok(()));
        assert_eq!(check_declared("ari", Format::Initrd(Compression::Zstd)), Ok(()));
        for (declared, actual) in [
            ("raw", Format::Qcow2),
            ("raw", Format::Empty),
            ("raw", Format::Elf(ElfKind::X86_64Executable)),
            ("aki", Format::Raw),
            ("aki", Format::Elf(ElfKind::Other)),
            ("ari", Format::Raw),
            ("iso", Format::Raw),
            ("qcow2", Format::Raw),
        ] {
            assert!(
                matches!(check_declared(declared, actual), Err(FormatError::Mismatch { .. })),
                "{declared} {actual}"
            );
        }
        assert!(matches!(check_declared("vmdk", Format::Vmdk), Err(FormatError::Unsupported(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_something(bytes in proptest::collection::vec(any::<u8>(), 0..40_000)) {
            prop_assert!(!probe(&bytes).to_string().is_empty());
        }

        #[test]
        fn truncation_never_panics(offset in 0..PROBE_BYTES, len in 0..PROBE_BYTES) {
            let bytes = with(offset.min(PROBE_BYTES - 6), b"\x7fELF\x02\x01");
            prop_assert!(!probe(&bytes[..len]).to_string().is_empty());
        }
    }
}
