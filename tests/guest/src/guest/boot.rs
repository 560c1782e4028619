//! What the monitor handed over: command line, RSDP, memory map.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use mote_guest::acpi::Memory;
use mote_guest::cmdline::CommandLine;

use crate::{cpu, heap};

/// Longest command line that is read.
const MAX_COMMAND_LINE: usize = 4096;
/// Most memory map entries that are read.
const MAX_MAP: usize = 128;
/// The heap's size where memory allows it.
const HEAP_BYTES: u64 = 12 << 20;
const PVH_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// By which protocol the guest was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit Linux boot protocol.
    Linux,
    /// PVH.
    Pvh,
}

/// The boot structure, read.
pub struct Boot {
    /// How the guest was entered.
    pub protocol: Protocol,
    /// The kernel command line.
    pub command_line: CommandLine<'static>,
    /// Physical address of ACPI's root pointer, 0 if not told.
    pub rsdp: u64,
    map: u64,
    map_entries: usize,
    map_stride: u64,
}

/// A range of the memory map.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
    /// E820 type; 1 is RAM.
    pub kind: u32,
}

unsafe extern "C" {
    safe static image_end: u8;
}

fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the boot protocols promise that these structures are in RAM, which is identity-mapped; they are plain
    // numbers and the guest makes no reference to them.
    unsafe { (address as *const T).read_unaligned() }
}

impl Boot {
    /// Reads the structure that the entry code was given.
    pub fn read() -> Self {
        let at = cpu::BOOT_POINTER.load(Ordering::Relaxed);
        if cpu::BOOT_PROTOCOL.load(Ordering::Relaxed) == 2 {
            // struct hvm_start_info: magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries.
            assert_eq!(read::<u32>(at), PVH_MAGIC, "PVH magic");
            return Self {
                protocol: Protocol::Pvh,
                command_line: command_line(read(at + 24)),
                rsdp: read(at + 32),
                map: read(at + 40),
                map_entries: (read::<u32>(at + 48) as usize).min(MAX_MAP),
                map_stride: 24,
            };
        }
        // struct boot_params: ext_cmd_line_ptr 0xc8, hdr.cmd_line_ptr 0x228, acpi_rsdp_addr 0x70, e820 0x1e8 and 0x2d0.
        Self {
            protocol: Protocol::Linux,
            command_line: command_line(
                u64::from(read::<u32>(at + 0x228)) | u64::from(read::<u32>(at + 0xc8)) << 32,
            ),
            rsdp: read(at + 0x70),
            map: at + 0x2d0,
            map_entries: usize::from(read::<u8>(at + 0x1e8)).min(MAX_MAP),
            map_stride: 20,
        }
    }

    /// The memory map. Needs the heap.
    pub fn memory_map(&self) -> Vec<Range> {
        (0..self.map_entries).map(|n| self.range(n)).collect()
    }

    fn range(&self, number: usize) -> Range {
        let at = self.map + number as u64 * self.map_stride;
        let start: u64 = read(at);
        Range { start, end: start.saturating_add(read(at + 8)), kind: read(at + 16) }
    }

    /// Gives the heap the memory behind the image.
    pub fn give_heap(&self) {
        let start = &raw const image_end as u64;
        let ram = (0..self.map_entries)
            .map(|n| self.range(n))
            .find(|range| range.kind == RAM && (range.start..range.end).contains(&start))
            .expect("the image lies in no RAM of the memory map");
        let end = ram.end.min(start + HEAP_BYTES);
        // SAFETY: RAM behind the image, in the first GiB (image at 1 MiB plus HEAP_BYTES), which the image's tables map;
        // the boot structures are read before and the monitor puts them below 1 MiB.
        unsafe { heap::give(start as usize, end as usize) };
    }
}

fn command_line(at: u64) -> CommandLine<'static> {
    if at == 0 {
        return CommandLine("");
    }
    let length = (0..MAX_COMMAND_LINE).take_while(|&n| read::<u8>(at + n as u64) != 0).count();
    // SAFETY: `length` readable bytes, which nothing writes: they lie below the image.
    let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, length) };
    CommandLine(core::str::from_utf8(bytes).unwrap_or(""))
}

/// The RAM below 1 GiB as ACPI's reader sees it.
pub struct Low;

impl Memory for Low {
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
        let end = address.checked_add(length as u64)?;
        if address == 0 || end > 1 << 30 {
            return None;
        }
        // SAFETY: mapped; where there is no RAM, KVM's MMIO exit answers the read. Tables are outside of the image and
        // its heap, so no Rust object is there and nothing writes them.
        Some(unsafe { core::slice::from_raw_parts(address as *const u8, length) })
    }
}
