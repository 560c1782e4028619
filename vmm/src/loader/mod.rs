//! Puts a kernel, an initrd and what they are told into guest memory.
//!
//! Kernel and initrd are tenants' files and therefore hostile: everything that `linux-loader` relies on is checked
//! here first, and whatever is wrong becomes a [`LoadError`] that names the file.

mod bzimage;
mod elf;
mod linux;
mod pvh;

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::kvm::{Entry, Protocol};
use crate::layout;
use crate::memory::GuestMemory;

/// A kernel or initrd cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be opened or read.
    #[error("cannot read the {what} {}", .path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory, a device, a socket.
    #[error("the {what} {} is no regular file", .path.display())]
    NotAFile {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Neither ELF nor bzImage, or a broken one.
    #[error("the kernel {} cannot be booted: {why}", .path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The kernel needs more memory than there is.
    #[error("the kernel {} needs memory up to {end:#x}, the guest has {available:#x} below the device hole; raise \
             mem_size_mib", .path.display())]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// First address after the kernel.
        end: u64,
        /// First address after low memory.
        available: u64,
    },
    /// The initrd does not fit between the kernel and the end of memory.
    #[error("the initrd {} of {size} bytes does not fit in guest memory after the kernel, where {available} bytes \
             are left; raise mem_size_mib", .path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// What is left.
        available: u64,
    },
    /// An empty initrd.
    #[error("the initrd {} is empty", .0.display())]
    InitrdEmpty(PathBuf),
    /// The command line is longer than the kernel takes.
    #[error(
        "the kernel command line has {length} bytes with what the devices add; this kernel takes {limit}"
    )]
    CommandLine {
        /// Bytes without the terminating zero.
        length: usize,
        /// Largest number of them.
        limit: usize,
    },
    /// The command line holds a zero byte.
    #[error("the kernel command line contains a zero byte")]
    CommandLineZero,
    /// What the kernel is told could not be written: guest memory is smaller than 1 MiB or so.
    #[error("cannot write the {0} into guest memory")]
    Write(&'static str, #[source] GuestMemoryError),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct Kernel {
    /// First instruction.
    entry: u64,
    /// How it is entered.
    protocol: Protocol,
    /// First byte after everything the kernel needs before it has read its memory map.
    end: u64,
    /// The initrd must end at or below this address.
    initrd_max: u64,
    /// Longest command line without the terminating zero.
    command_line_max: usize,
    /// The setup header of a bzImage.
    header: Option<linux_loader::bootparam::setup_header>,
}

/// A range of guest memory that holds an initrd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// First byte.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

/// A regular file and its length.
struct Source<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    size: u64,
}

impl<'a> Source<'a> {
    fn open(what: &'static str, path: &'a Path) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Read { what, path: path.to_owned(), source };
        // Not blocking, so that a named pipe cannot hold up the start.
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(LoadError::NotAFile { what, path: path.to_owned() });
        }
        Ok(Self { what, path, file, size: metadata.len() })
    }

    /// A file that was read from the root drive.
    fn of_drive(what: &'static str, file: File) -> Result<Self, LoadError> {
        let path = Path::new("of the root drive");
        let failed = |source| LoadError::Read { what, path: path.to_owned(), source };
        let size = file.metadata().map_err(failed)?.len();
        // Whoever wrote it left the position at its end.
        (&file).rewind().map_err(failed)?;
        Ok(Self { what, path, file, size })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| LoadError::Read {
            what: self.what,
            path: self.path.to_owned(),
            source,
        })
    }

    fn broken(&self, why: impl Into<String>) -> LoadError {
        LoadError::Kernel { path: self.path.to_owned(), why: why.into() }
    }
}

/// First address after low memory.
fn low_memory_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, |region| region.start_addr().raw_value() + region.len())
}

/// Loads an ELF vmlinux or a bzImage.
pub fn load_kernel(memory: &GuestMemory, path: &Path) -> Result<Kernel, LoadError> {
    load_kernel_from(memory, Source::open("kernel", path)?)
}

/// The same from a file that was read from the root drive.
pub fn load_drives_kernel(memory: &GuestMemory, file: File) -> Result<Kernel, LoadError> {
    load_kernel_from(memory, Source::of_drive("kernel", file)?)
}

fn load_kernel_from(memory: &GuestMemory, mut source: Source<'_>) -> Result<Kernel, LoadError> {
    let mut magic = [0; 4];
    if source.size >= 4 {
        source.read_at(0, &mut magic)?;
    }
    if magic == *b"\x7fELF" {
        return elf::load(memory, &mut source);
    }
    if bzimage::probe(&source)? {
        return bzimage::load(memory, &mut source);
    }
    Err(source.broken("it is neither an x86-64 ELF (vmlinux) nor a bzImage"))
}

/// Loads the initrd as high as the kernel allows, away from where the kernel unpacks itself.
pub fn load_initrd(memory: &GuestMemory, kernel: &Kernel, path: &Path) -> Result<Initrd, LoadError> {
    load_initrd_from(memory, kernel, Source::open("initrd", path)?)
}

/// The same from a file that was read from the root drive.
pub fn load_drives_initrd(memory: &GuestMemory, kernel: &Kernel, file: File) -> Result<Initrd, LoadError> {
    load_initrd_from(memory, kernel, Source::of_drive("initrd", file)?)
}

fn load_initrd_from(
    memory: &GuestMemory,
    kernel: &Kernel,
    mut source: Source<'_>,
) -> Result<Initrd, LoadError> {
    const PAGE: u64 = 4096;
    let path = source.path;
    if source.size == 0 {
        return Err(LoadError::InitrdEmpty(path.to_owned()));
    }
    let top = low_memory_end(memory).min(kernel.initrd_max) & !(PAGE - 1);
    let bottom = kernel.end.next_multiple_of(PAGE);
    let available = top.saturating_sub(bottom);
    if source.size > available {
        return Err(LoadError::InitrdTooLarge { path: path.to_owned(), size: source.size, available });
    }
    let address = (top - source.size) & !(PAGE - 1);
    let size = source.size;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut source.file, size as usize)
        .map_err(|source| LoadError::Write("initrd", source))?;
    Ok(Initrd { address, size })
}

/// Tells the kernel its command line, memory map, initrd and ACPI tables, and says where to start it.
pub fn write_boot_information(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line: &str,
    rsdp: u64,
) -> Result<Entry, LoadError> {
    write_command_line(memory, kernel, command_line)?;
    match kernel.protocol {
        Protocol::Linux64 => linux::write_zero_page(memory, kernel, initrd, command_line.len(), rsdp)?,
        Protocol::Pvh => pvh::write_start_info(memory, initrd, rsdp)?,
    }
    Ok(Entry { address: kernel.entry, protocol: kernel.protocol, mapped: kernel.end })
}

fn write_command_line(memory: &GuestMemory, kernel: &Kernel, command_line: &str) -> Result<(), LoadError> {
    let (length, limit) = (command_line.len(), kernel.command_line_max);
    if length > limit {
        return Err(LoadError::CommandLine { length, limit });
    }
    if command_line.contains('\0') {
        return Err(LoadError::CommandLineZero);
    }
    let mut bytes = Vec::with_capacity(length + 1);
    bytes.extend_from_slice(command_line.as_bytes());
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(|source| LoadError::Write("command line", source))
}

/// What a range of the memory map holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MemoryKind {
    Ram,
    Reserved,
}

impl MemoryKind {
    /// The number that E820 and PVH use alike.
    fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// The memory map: start, length in bytes, kind; ascending, without empty ranges.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, MemoryKind)> {
    let low_end = low_memory_end(memory);
    let mut map = vec![
        (0, layout::LOW_RAM_END.min(low_end), MemoryKind::Ram),
        (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, MemoryKind::Reserved),
    ];
    if low_end > layout::HIGH_RAM {
        map.push((layout::HIGH_RAM, low_end - layout::HIGH_RAM, MemoryKind::Ram));
    }
    // Linux uses the configuration space of PCI only where the map or ACPI says that nothing else is there.
    map.push((layout::PCI_ECAM, layout::PCI_ECAM_SIZE, MemoryKind::Reserved));
    map.extend(
        memory
            .iter()
            .skip(1)
            // What can be plugged is a device's.
            .filter(|region| region.blocks().is_none())
            .map(|region| (region.start_addr().raw_value(), region.len(), MemoryKind::Ram)),
    );
    map
}

#[cfg(test)]
mod tests;
