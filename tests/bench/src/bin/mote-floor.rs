//! The least that starts a guest on KVM: what no monitor can be faster than.
//!
//! `mote-floor GUEST COMMAND_LINE [MEMORY_MIB]` maps memory, registers it *before* the interrupt controller exists, reads
//! the segments of an ELF file into it, enters it by PVH on one processor, copies what it writes to COM1 to stdout and
//! ends with the i8042's reset. No devices, tables, threads or checks beyond those that keep it from going wrong silently.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

const DEFAULT_MEMORY_MIB: usize = 128;
/// Where the boot structures are: below the guest, which begins at 1 MiB.
const START_INFO: usize = 0x6000;
const MEMORY_MAP: usize = 0x6100;
const COMMAND_LINE: usize = 0x7000;
const MAX_COMMAND_LINE: usize = 0x1000;
const PVH_MAGIC: u32 = 0x336e_c578;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PVH_NOTE: u32 = 18;
const MAX_PROGRAM_HEADERS: u16 = 16;
const IOAPIC_PINS: u64 = 24;
const COM1_DATA: u16 = 0x3f8;
const COM1_LINE_STATUS: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

fn main() -> Result<ExitCode> {
    let mut arguments = env::args().skip(1);
    let (Some(guest), Some(line)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: mote-floor GUEST COMMAND_LINE [MEMORY_MIB]");
        return Ok(ExitCode::from(2));
    };
    let mib = arguments.next().map_or(Ok(DEFAULT_MEMORY_MIB), |text| text.parse()).context("MEMORY_MIB")?;
    run(&guest, &line, mib)?;
    Ok(ExitCode::SUCCESS)
}

fn run(guest: &str, line: &str, mib: usize) -> Result<()> {
    let kvm = Kvm::new().context("open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let bytes = NonZeroUsize::new(mib << 20).context("no memory")?;
    // SAFETY: a fresh anonymous mapping, which nothing else can refer to.
    let mapping = unsafe {
        mmap_anonymous(
            None,
            bytes,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
        )
    }
    .context("map guest memory")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: bytes.get() as u64,
        userspace_addr: mapping.as_ptr() as u64,
    };
    // SAFETY: the mapping has this size and stays until the process ends.
    unsafe { vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION")?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
    split.args[0] = IOAPIC_PINS;
    vm.enable_cap(&split).context("KVM_CAP_SPLIT_IRQCHIP")?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    // SAFETY: the whole mapping, in which nothing runs yet; the slice is gone before the vCPU starts.
    let memory = unsafe { std::slice::from_raw_parts_mut(mapping.cast::<u8>().as_ptr(), bytes.get()) };
    let entry = load(guest, memory)?;
    start_info(memory, line)?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    set_registers(&vcpu, entry)?;
    serve(&mut vcpu)
}

/// Reads the segments into memory; returns the entry point of the PVH note.
fn load(path: &str, memory: &mut [u8]) -> Result<u32> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).context("ELF header")?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        bail!("{path} is no 64-bit ELF file");
    }
    let table = word64(&header, 32);
    let count = u16::from_le_bytes([header[56], header[57]]).min(MAX_PROGRAM_HEADERS);
    let mut entry = None;
    for number in 0..u64::from(count) {
        let mut program = [0; 56];
        file.read_exact_at(&mut program, table + 56 * number).context("program header")?;
        let (kind, offset) = (word32(&program, 0), word64(&program, 8));
        let (address, length) = (word64(&program, 24) as usize, word64(&program, 32) as usize);
        if kind == PT_LOAD {
            let place = address.checked_add(length).and_then(|end| memory.get_mut(address..end));
            file.read_exact_at(place.context("a segment is outside of memory")?, offset)
                .context("segment")?;
        } else if kind == PT_NOTE {
            let mut note = [0; 24];
            file.read_exact_at(&mut note, offset).context("note")?;
            entry = (word32(&note, 8) == PVH_NOTE).then(|| word32(&note, 16)).or(entry);
        }
    }
    entry.context("no PVH note")
}

/// struct hvm_start_info with a memory map of one entry (xen/include/public/arch-x86/hvm/start_info.h).
fn start_info(memory: &mut [u8], line: &str) -> Result<()> {
    if line.len() >= MAX_COMMAND_LINE {
        bail!("the command line is longer than {MAX_COMMAND_LINE} bytes");
    }
    let size = memory.len() as u64;
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    put(START_INFO, &PVH_MAGIC.to_le_bytes());
    put(START_INFO + 4, &1_u32.to_le_bytes());
    put(START_INFO + 24, &(COMMAND_LINE as u64).to_le_bytes());
    put(START_INFO + 40, &(MEMORY_MAP as u64).to_le_bytes());
    put(START_INFO + 48, &1_u32.to_le_bytes());
    put(MEMORY_MAP + 8, &size.to_le_bytes());
    put(MEMORY_MAP + 16, &1_u32.to_le_bytes());
    put(COMMAND_LINE, line.as_bytes());
    Ok(())
}

/// 32-bit protected mode with flat segments, paging off.
fn set_registers(vcpu: &VcpuFd, entry: u32) -> Result<()> {
    let flat =
        kvm_segment { limit: u32::MAX, type_: 3, present: 1, s: 1, db: 1, g: 1, ..kvm_segment::default() };
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    sregs.cs = kvm_segment { selector: 0x08, type_: 11, ..flat };
    let data = kvm_segment { selector: 0x10, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..kvm_segment::default() };
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs { rip: u64::from(entry), rbx: START_INFO as u64, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}

fn serve(vcpu: &mut VcpuFd) -> Result<()> {
    let mut stdout = io::stdout().lock();
    loop {
        match vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(COM1_DATA, data) => {
                stdout.write_all(data).context("write to stdout")?;
                stdout.flush().context("write to stdout")?;
            }
            VcpuExit::IoOut(I8042_COMMAND, [I8042_RESET]) => return Ok(()),
            VcpuExit::IoIn(COM1_LINE_STATUS, data) => data.fill(TRANSMITTER_EMPTY),
            VcpuExit::IoOut(..) | VcpuExit::IoIn(..) => {}
            other => bail!("unexpected exit {other:?}"),
        }
    }
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from(word32(bytes, at)) | u64::from(word32(bytes, at + 4)) << 32
}
