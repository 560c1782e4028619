//! What a PVH kernel is told: Xen's `public/arch-x86/hvm/start_info.h`, version 1.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, LoadError, memory_map};
use crate::layout;
use crate::memory::GuestMemory;

pub(super) fn write_start_info(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), LoadError> {
    let failed = |source| LoadError::Write("PVH start info", source);
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        memory.write_obj(module, GuestAddress(layout::PVH_MODULES)).map_err(failed)?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    let mut address = layout::PVH_MEMORY_MAP;
    for (addr, size, kind) in memory_map(memory) {
        let entry = hvm_memmap_table_entry { addr, size, type_: kind.number(), reserved: 0 };
        memory.write_obj(entry, GuestAddress(address)).map_err(failed)?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
        info.memmap_entries += 1;
    }
    memory.write_obj(info, GuestAddress(layout::PVH_START_INFO)).map_err(failed)
}
