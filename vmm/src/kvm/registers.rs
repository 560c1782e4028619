//! The state of a processor when the kernel's first instruction runs.
//!
//! 64-bit protocol: Linux `Documentation/arch/x86/boot.rst` §1.15 (long mode, identity-mapped page tables, `__BOOT_CS`
//! 0x10, `__BOOT_DS` 0x18, RSI = zero page). PVH: Xen `docs/misc/pvh.pandoc` (32-bit protected mode without paging,
//! EBX = start info).

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use mote_vmm_api::CpuConfig;
use vm_memory::{Bytes, GuestAddress};

use super::{KvmError, Vcpu, template};
use crate::layout;
use crate::memory::GuestMemory;

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Linux' 64-bit boot protocol.
    Linux64,
    /// Xen's PVH.
    Pvh,
}

/// Where the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub address: u64,
    /// State of the processor there.
    pub protocol: Protocol,
    /// End of what the kernel needs mapped at entry (64-bit protocol), from 0.
    pub mapped: u64,
}

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory is write-back where no range register says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x0000_8b00_0000_0067;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0b111 << 8;
const DELIVERY_NMI: u32 = 0b100 << 8;

/// Gives a processor its identification and model-specific registers.
pub(super) fn identify(
    vcpu: &Vcpu,
    cpuid: &[kvm_cpuid_entry2],
    template: Option<&CpuConfig>,
) -> Result<(), KvmError> {
    let failed = |source| KvmError::Vcpu { call: "KVM_SET_CPUID2", vcpu: vcpu.index(), source };
    let cpuid =
        kvm_bindings::CpuId::from_entries(cpuid).expect("at most as many leaves as KVM itself gave, plus 6");
    vcpu.fd().set_cpuid2(&cpuid).map_err(failed)?;
    if let Some(template) = template {
        template::change_msrs(&vcpu.processor(), template)?;
    }
    set_msrs(vcpu.fd(), vcpu.index())
}

/// Gives the boot processor (`index` 0) its whole state at `entry`.
pub(super) fn set_up(vcpu: &VcpuFd, index: u8, entry: &Entry, memory: &GuestMemory) -> Result<(), KvmError> {
    let failed = |call: &'static str| move |source| KvmError::Vcpu { call, vcpu: index, source };
    if index != 0 {
        // The others wait for the boot processor's INIT and start-up interrupts, with KVM's reset state.
        return Ok(());
    }
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs { rip: entry.address, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => {
            segments(&mut sregs, memory, CODE_64)?;
            page_tables(&mut sregs, memory, entry.mapped)?;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            regs.rsi = layout::ZERO_PAGE;
        }
        Protocol::Pvh => {
            segments(&mut sregs, memory, CODE_32)?;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            regs.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(failed("KVM_SET_FPU"))?;
    virtual_wire(vcpu, index)
}

fn set_msrs(vcpu: &VcpuFd, index: u8) -> Result<(), KvmError> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        msr(MSR_IA32_TSC, 0),
        msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).expect("three entries fit");
    let written = vcpu.set_msrs(&msrs).map_err(|source| KvmError::Vcpu {
        call: "KVM_SET_MSRS",
        vcpu: index,
        source,
    })?;
    match entries.get(written) {
        Some(refused) => Err(KvmError::Msr { index: refused.index, vcpu: index }),
        None => Ok(()),
    }
}

/// A flat GDT in guest memory and the same segments in the hidden registers.
fn segments(sregs: &mut kvm_sregs, memory: &GuestMemory, code: u64) -> Result<(), KvmError> {
    let table: [u64; 5] = [0, 0, code, DATA, TSS];
    memory.write_obj(table, GuestAddress(layout::GDT)).map_err(KvmError::Tables)?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&table) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(code, CODE_SELECTOR);
    let data = segment(DATA, DATA_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS, TSS_SELECTOR);
    Ok(())
}

/// Unpacks a descriptor (SDM vol. 3A §3.4.5) whose base is 0.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bit = |position: u32| (descriptor >> position & 1) as u8;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: 0,
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (descriptor >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        unusable: 0,
        padding: 0,
    }
}

/// Identity-maps the first `mapped` bytes (rounded up to GiB, at most 4) with 2 MiB pages and turns on long mode.
fn page_tables(sregs: &mut kvm_sregs, memory: &GuestMemory, mapped: u64) -> Result<(), KvmError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 0x1000;
    let gib = mapped.div_ceil(1 << 30).clamp(1, 4);
    let pdpt = layout::PAGE_TABLES + TABLE;
    let write =
        |address: u64, entry: u64| memory.write_obj(entry, GuestAddress(address)).map_err(KvmError::Tables);
    write(layout::PAGE_TABLES, pdpt | PRESENT_WRITABLE)?;
    for directory in 0..gib {
        let address = pdpt + TABLE * (1 + directory);
        write(pdpt + directory * 8, address | PRESENT_WRITABLE)?;
        let mut pages = [0u8; TABLE as usize];
        for (index, page) in pages.chunks_exact_mut(8).enumerate() {
            let entry = directory << 30 | (index as u64) << 21 | LARGE | PRESENT_WRITABLE;
            page.copy_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&pages, GuestAddress(address)).map_err(KvmError::Tables)?;
    }
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    Ok(())
}

/// The boot processor takes the PIC's interrupts at LINT0 and NMIs at LINT1 (MultiProcessor Specification §3.6.2.1).
fn virtual_wire(vcpu: &VcpuFd, index: u8) -> Result<(), KvmError> {
    let failed = |call: &'static str| move |source| KvmError::Vcpu { call, vcpu: index, source };
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    for (register, delivery) in [(LAPIC_LVT_LINT0, DELIVERY_EXTINT), (LAPIC_LVT_LINT1, DELIVERY_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(delivery.to_le_bytes()) {
            *byte = value as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_unpack_to_flat_segments() {
        let code = segment(CODE_64, CODE_SELECTOR);
        assert_eq!(
            (code.limit, code.l, code.db, code.type_, code.s, code.present),
            (u32::MAX, 1, 0, 0xb, 1, 1)
        );
        let data = segment(DATA, DATA_SELECTOR);
        assert_eq!((data.limit, data.l, data.db, data.type_), (u32::MAX, 0, 1, 3));
        let tss = segment(TSS, TSS_SELECTOR);
        assert_eq!((tss.limit, tss.s, tss.type_, tss.g), (0x67, 0, 0xb, 0));
    }

    #[test]
    fn page_tables_map_each_gib_up_to_the_kernels_end() {
        let memory = crate::memory::create(16).unwrap();
        let mut sregs = kvm_sregs::default();
        page_tables(&mut sregs, &memory, (1 << 30) + 1).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(layout::PAGE_TABLES), 0xa003);
        assert_eq!((read(0xa000), read(0xa008), read(0xa010)), (0xb003, 0xc003, 0));
        assert_eq!(read(0xc000 + 511 * 8), (2 << 30) - (2 << 20) + 0x83);
    }
}
