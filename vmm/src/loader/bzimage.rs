//! bzImages: Linux `Documentation/arch/x86/boot.rst`, entered at their 64-bit entry point.

use linux_loader::bootparam::setup_header;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress};

use super::{Kernel, LoadError, Source, low_memory_end};
use crate::kvm::Protocol;
use crate::layout;
use crate::memory::GuestMemory;

/// Offset of the setup header in the file (and in the zero page).
const HEADER_OFFSET: u64 = 0x1f1;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// First protocol version with `xloadflags`.
const VERSION_2_12: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point is this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Whether the file has a bzImage's magic number.
pub(super) fn probe(source: &Source<'_>) -> Result<bool, LoadError> {
    Ok(read_header(source)?.is_some_and(|header| header.header == MAGIC))
}

fn read_header(source: &Source<'_>) -> Result<Option<setup_header>, LoadError> {
    let mut header = setup_header::default();
    if source.size < HEADER_OFFSET + size_of::<setup_header>() as u64 {
        return Ok(None);
    }
    source.read_at(HEADER_OFFSET, header.as_mut_slice())?;
    Ok(Some(header))
}

pub(super) fn load(memory: &GuestMemory, source: &mut Source<'_>) -> Result<Kernel, LoadError> {
    let header = read_header(source)?.ok_or_else(|| source.broken("it ends within its header"))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < VERSION_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(source.broken("it has no 64-bit entry point (a 32-bit kernel, or one older than 3.8)"));
    }
    let address = header.pref_address;
    if address < layout::HIGH_RAM || address % 0x1000 != 0 {
        return Err(source.broken(format!("its preferred address {address:#x} cannot be used")));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let payload = source
        .size
        .checked_sub((u64::from(sectors) + 1) * SECTOR)
        .filter(|payload| *payload > ENTRY_64)
        .ok_or_else(|| source.broken("it ends within its setup code"))?;
    let needed = payload.max(u64::from(header.init_size));
    let available = low_memory_end(memory);
    let end = match address.checked_add(needed) {
        Some(end) if end <= available => end,
        Some(end) => return Err(LoadError::KernelTooLarge { path: source.path.to_owned(), end, available }),
        None => return Err(source.broken(format!("its preferred address {address:#x} cannot be used"))),
    };
    let loaded = BzImage::load(memory, Some(GuestAddress(address)), &mut source.file, None)
        .map_err(|error| source.broken(error.to_string()))?;
    let limit = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    Ok(Kernel {
        entry: address + ENTRY_64,
        protocol: Protocol::Linux64,
        end,
        initrd_max: u64::from(header.initrd_addr_max) + 1,
        command_line_max: limit.min(layout::COMMAND_LINE_MAX - 1),
        header: loaded.setup_header,
    })
}
