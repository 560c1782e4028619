//! The zero page of the 64-bit Linux protocol: `Documentation/arch/x86/zero-page.rst`.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, Kernel, LoadError, memory_map};
use crate::layout;
use crate::memory::GuestMemory;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// "Undefined": none of the assigned loader numbers.
const LOADER_UNDEFINED: u8 = 0xff;
/// Protocol version that a vmlinux, which has no header of its own, is told.
const PROTOCOL_2_15: u16 = 0x020f;
const LOADED_HIGH: u8 = 1;

pub(super) fn write_zero_page(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line_length: usize,
    rsdp: u64,
) -> Result<(), LoadError> {
    let mut params = boot_params::default();
    match kernel.header {
        Some(header) => params.hdr = header,
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = HEADER_MAGIC;
            params.hdr.version = PROTOCOL_2_15;
            params.hdr.loadflags = LOADED_HIGH;
            params.hdr.kernel_alignment = 0x100_0000;
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line_length as u32;
    if let Some(initrd) = initrd {
        // Both fit: an initrd lies wholly below 4 GiB.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    params.acpi_rsdp_addr = rsdp;
    let map = memory_map(memory);
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: *addr, size: *size, r#type: kind.number() };
    }
    params.e820_entries = map.len() as u8;
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| LoadError::Write("zero page", source))
}
