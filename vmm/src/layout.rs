//! Where things are in the guest's physical address space and which interrupts they have.
//!
//! ```text
//! 0x0000_0500  GDT                                   ┐
//! 0x0000_6000  PVH start info, memory map, modules   │ written by the loader, reported as RAM:
//! 0x0000_7000  zero page (boot_params)               │ the kernel may reuse it once it has read it
//! 0x0000_9000  page tables (64-bit entry)            │
//! 0x0002_0000  command line                          ┘
//! 0x0009_fc00  end of conventional memory
//! 0x000d_f000  VM generation id (reserved)
//! 0x000e_0000  RSDP and the other ACPI tables (reserved)
//! 0x000f_0000  SMBIOS tables (reserved)
//! 0x000f_fff0  reset vector (reserved)
//! 0x0010_0000  kernel and everything else
//! 0xc000_0000  end of low memory, start of the MMIO hole: boot timer page, then one page per virtio device
//! 0xd000_0000  registers of PCI functions (with --enable-pci)
//! 0xe000_0000  configuration space of PCI bus 0 (ECAM)
//! 0xfec0_0000  I/O APIC        0xfee0_0000  local APICs        0xfffb_d000  TSS and identity map (Intel)
//! 0x1_0000_0000  rest of the memory, then what devices have of physical memory, from the next GiB on
//! ```

/// GDT of the boot processor at entry.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of the PVH protocol.
pub const PVH_MODULES: u64 = 0x6040;
/// Memory map of the PVH protocol.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `boot_params` of the 64-bit Linux protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at the 64-bit entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4; the page directory pointer table and up to four page directories follow it.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its terminating zero (`COMMAND_LINE_SIZE` of Linux on x86).
pub const COMMAND_LINE_MAX: usize = 2048;
/// First byte after conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// VM generation id, in a page of its own.
pub const VM_GENERATION_ID: u64 = 0xd_f000;
/// RSDP; the other tables follow.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// First byte after the space for ACPI tables.
pub const ACPI_TABLES_END: u64 = SMBIOS;
/// SMBIOS entry point, where a guest without UEFI looks first; the structures follow.
pub const SMBIOS: u64 = 0xf_0000;
/// First byte after the space for SMBIOS tables.
pub const SMBIOS_END: u64 = RESET_VECTOR;
/// Where a PC's firmware starts after a reset (FFFF:0000).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Lowest address a kernel may be loaded to.
pub const HIGH_RAM: u64 = 0x10_0000;

/// What devices have of physical memory begins at a multiple of this behind the RAM: no kernel has a block of memory that both
/// are in.
pub const DEVICE_MEMORY_ALIGNMENT: u64 = 1 << 30;

/// Start of the hole below 4 GiB where there is no memory.
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// First address after the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// Page of the boot timer (`--boot-timer`), at the address Firecracker has it.
pub const BOOT_TIMER: u64 = MMIO_HOLE;
/// Register page of the first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = MMIO_HOLE + 0x1000;
/// Size of a virtio-mmio device's registers.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Start of the window for the base address registers of PCI functions.
pub const PCI_WINDOW: u64 = 0xd000_0000;
/// Size of that window.
pub const PCI_WINDOW_SIZE: u64 = 0x1000_0000;
/// Configuration space of PCI bus 0, the only one (PCI Express Base Specification §7.2.2: 4 KiB for each function).
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Size of the configuration space of one bus.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where KVM keeps its one-page identity map on processors without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where KVM keeps its three-page task state segment on Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Interrupt that makes the guest look for functions that come or go on PCI, where no virtio device has one of these. (Linux doesn't
/// hand out input 2, the cascade of the PICs.)
pub const HOT_PLUG_IRQ: u32 = VIRTIO_IRQ;
/// Interrupt of the notification that the VM generation id has changed.
pub const GENERATION_IRQ: u32 = 3;
/// Interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// First I/O port of the first serial port (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the keyboard controller.
pub const I8042_IRQ: u32 = 1;
/// First I/O port of the keyboard controller (0x60 data, 0x64 command).
pub const I8042_PORT: u16 = 0x60;
/// Interrupt of the first virtio device; each device has its own.
pub const VIRTIO_IRQ: u32 = 5;
/// Last input of the I/O APIC.
pub const LAST_IRQ: u32 = 23;
/// Largest number of virtio devices, given by the inputs of the I/O APIC.
pub const MAX_VIRTIO_DEVICES: usize = (LAST_IRQ - VIRTIO_IRQ + 1) as usize;

/// First I/O port of the real-time clock (index; data follows it).
pub const RTC_PORT: u16 = 0x70;

/// ACPI sleep control register (status follows it).
pub const ACPI_SLEEP_PORT: u16 = 0x600;
/// First I/O port of the registers for PCI hot-plug.
pub const HOT_PLUG_PORT: u16 = 0x610;
/// Reset control register, at its place in a PC's chipset.
pub const RESET_PORT: u16 = 0xcf9;
