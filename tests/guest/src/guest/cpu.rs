//! Ports, MMIO, processor and interrupt controllers, from CPL 3.

use alloc::alloc::{Layout, alloc_zeroed};
use core::arch::{asm, x86_64};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{power, println};

const LAPIC: u64 = 0xfee0_0000;
const LAPIC_SPURIOUS: u64 = LAPIC + 0xf0;
const LAPIC_TIMER: u64 = LAPIC + 0x320;
const LAPIC_LINT0: u64 = LAPIC + 0x350;
const LAPIC_TIMER_INITIAL: u64 = LAPIC + 0x380;
const LAPIC_TIMER_CURRENT: u64 = LAPIC + 0x390;
const LAPIC_TIMER_DIVIDE: u64 = LAPIC + 0x3e0;
const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_WINDOW: u64 = 0xfec0_0010;
/// Redirection entries of an 82093AA.
pub const IOAPIC_PINS: u32 = 24;

/// First interrupt vector; interrupt `n` of the I/O APIC gets vector `FIRST_VECTOR + n`.
const FIRST_VECTOR: u32 = 32;
const TIMER_VECTOR: u32 = FIRST_VECTOR + 30;
const SPURIOUS_VECTOR: u32 = FIRST_VECTOR + 31;
/// That of INT3: a KVM that emulates CPL 0 doesn't take other software interrupts from CPL 3.
const SERVICE_VECTOR: usize = 3;

/// KVM's local APIC timer counts nanoseconds (`APIC_BUS_CYCLE_NS`).
const LAPIC_TIMER_PER_US: u32 = 1_000;
/// How long the TSC is compared with the local APIC's timer.
const CALIBRATION_US: u32 = 500;

/// Written by the entry code: physical address of the boot protocol's structure.
#[unsafe(no_mangle)]
pub static BOOT_POINTER: AtomicU64 = AtomicU64::new(0);
/// Written by the entry code: 1 Linux, 2 PVH.
#[unsafe(no_mangle)]
pub static BOOT_PROTOCOL: AtomicU32 = AtomicU32::new(0);
/// Written by the interrupt stubs, which never run at the same time as code at CPL 3.
#[unsafe(no_mangle)]
static IRQ_COUNTS: [AtomicU32; 32] = [const { AtomicU32::new(0) }; 32];
#[unsafe(no_mangle)]
static IRQ_PENDING: AtomicU32 = AtomicU32::new(0);
/// Vector, error code, RIP, CR2 of the last fault.
#[unsafe(no_mangle)]
static FAULT: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
#[unsafe(no_mangle)]
static IDT: Table<256> = Table(UnsafeCell::new([[0; 2]; 256]));
static TSC_PER_MS: AtomicU64 = AtomicU64::new(0);

#[repr(C, align(4096))]
struct Table<const ENTRIES: usize>(UnsafeCell<[[u64; 2]; ENTRIES]>);

// SAFETY: the guest has one thread on one processor; entries are written by it only, with the processor as reader.
unsafe impl<const ENTRIES: usize> Sync for Table<ENTRIES> {}

unsafe extern "C" {
    safe fn service_gate();
    safe fn fault_stubs();
    safe fn interrupt_stubs();
    static page_directories: UnsafeCell<[u64; 3 * 512]>;
    static page_directory_pointers: UnsafeCell<[u64; 512]>;
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the TSS allows every port; port reads don't touch memory.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as in `inb`; what a device does to memory, it does through addresses that the drivers gave it.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nostack, preserves_flags)) };
}

/// Writes 16 bits to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, ax", in("ax") value, in("dx") port, options(nostack, preserves_flags)) };
}

/// Reads 32 bits from an I/O port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as in `inb`.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes 32 bits to an I/O port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("eax") value, in("dx") port, options(nostack, preserves_flags)) };
}

/// Reads a device register of `T`'s width at a physical address that is no RAM.
///
/// # Panics
/// Below the image's end plus heap, that is where the guest's own memory could be.
pub fn mmio_read<T: Copy>(address: u64) -> T {
    assert!(address >= 0xc000_0000, "MMIO below 3 GiB");
    // SAFETY: identity-mapped (see `map_all`), never RAM of this guest (checked by boot::heap), so no Rust object is there;
    // x86 permits unaligned access.
    unsafe {
        let pointer = address as *const T;
        if pointer.is_aligned() { pointer.read_volatile() } else { pointer.read_unaligned() }
    }
}

/// Writes a device register of `T`'s width.
///
/// # Panics
/// As [`mmio_read`].
pub fn mmio_write<T: Copy>(address: u64, value: T) {
    assert!(address >= 0xc000_0000, "MMIO below 3 GiB");
    // SAFETY: as in `mmio_read`.
    unsafe {
        let pointer = address as *mut T;
        if pointer.is_aligned() { pointer.write_volatile(value) } else { pointer.write_unaligned(value) }
    }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear, so RDTSC works at CPL 3.
    unsafe { x86_64::_rdtsc() }
}

/// CPUID leaf `leaf`, subleaf 0: EAX, EBX, ECX, EDX. Asked at CPL 0: a KVM that emulates it runs CPL 3 on the processor
/// itself, where CPUID need not trap and then shows the host's values.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let (eax, ebx, ecx, edx): (u32, u32, u32, u32);
    // SAFETY: the gate (see `entry`) changes the registers of CPUID's answer and nothing else. RBX is the compiler's own:
    // it is kept in RSI meanwhile.
    unsafe {
        asm!(
            "mov rsi, rbx",
            "int3",
            "xchg rsi, rbx",
            inout("eax") 4 => eax,
            out("esi") ebx,
            inout("ecx") leaf => ecx,
            out("edx") edx,
        );
    }
    [eax, ebx, ecx, edx]
}

/// Adds 1–4 GiB to the mapping; the image's own tables cover the first.
pub fn map_all() {
    // SAFETY: the tables are reserved by the entry code, nothing in Rust refers to them, and entries only go from
    // "not present" to present, which needs no TLB flush (SDM vol. 3 §4.10.4.3).
    let tables = unsafe { &mut *page_directories.get() };
    for (number, entry) in tables.iter_mut().enumerate() {
        *entry = ((512 + number as u64) << 21) | 0x87;
    }
}

/// Maps the GiB that `address` is in, as far as the first 512 GiB go. Needs the heap.
///
/// # Errors
/// It is beyond them, or there is no memory for a table.
pub fn map_gib_of(address: u64) -> Result<(), &'static str> {
    let gib = address >> 30;
    let slot = usize::try_from(gib).ok().filter(|slot| *slot < 512).ok_or("beyond 512 GiB")?;
    // SAFETY: the table is reserved by the entry code, and nothing in Rust refers to it.
    let pointers = unsafe { &mut *page_directory_pointers.get() };
    if pointers[slot] != 0 {
        return Ok(());
    }
    let layout = Layout::from_size_align(4096, 4096).map_err(|_| "layout")?;
    // SAFETY: the layout isn't empty; the table is never given back.
    let table = unsafe { alloc_zeroed(layout) }.cast::<u64>();
    if table.is_null() {
        return Err("out of memory");
    }
    for number in 0..512 {
        // SAFETY: within the table, which nothing else has.
        unsafe { table.add(number).write(gib << 30 | (number as u64) << 21 | 0x87) };
    }
    // From "not present" to present, as in `map_all`.
    pointers[slot] = table as u64 | 7;
    Ok(())
}

fn service(number: u64) {
    // SAFETY: the gate (see `entry`) changes RAX at most, and runs on its own stack.
    unsafe { asm!("int3", inout("rax") number => _) };
}

fn gate(vector: usize, handler: u64, dpl: u64) {
    let low =
        (handler & 0xffff) | (0x08 << 16) | ((0x8e00 | (dpl << 13)) << 32) | ((handler & 0xffff_0000) << 32);
    // SAFETY: `vector` < 256 by the callers; the one thread writes, see `Table`.
    unsafe { (*IDT.0.get())[vector] = [low, handler >> 32] };
}

/// Fills the IDT: faults are reported from now on, and services work.
pub fn set_gates() {
    for vector in 0..32 {
        gate(vector, fault_stubs as *const () as u64 + 16 * vector as u64, 0);
        gate(32 + vector, interrupt_stubs as *const () as u64 + 64 * vector as u64, 0);
    }
    gate(SERVICE_VECTOR, service_gate as *const () as u64, 3);
}

/// Empties the IDT and faults: a triple fault.
pub fn triple_fault() -> ! {
    // SAFETY: nothing runs after this.
    unsafe {
        (*IDT.0.get()) = [[0; 2]; 256];
        asm!("ud2", options(noreturn))
    }
}

/// Turns on the local APIC and interrupts at CPL 3; the old interrupt controllers are masked.
pub fn enable_interrupts() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    mmio_write(LAPIC_LINT0, 1u32 << 16);
    mmio_write(LAPIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    service(1);
}

/// Routes I/O APIC pin `pin` to its vector, edge-triggered and active high, on the processor that runs.
pub fn route_irq(pin: u32) {
    assert!(pin < IOAPIC_PINS, "interrupt {pin} has no pin");
    let destination = mmio_read::<u32>(LAPIC + 0x20) & 0xff00_0000;
    mmio_write(IOAPIC_SELECT, 0x11 + 2 * pin);
    mmio_write(IOAPIC_WINDOW, destination);
    mmio_write(IOAPIC_SELECT, 0x10 + 2 * pin);
    mmio_write(IOAPIC_WINDOW, FIRST_VECTOR + pin);
}

/// Id of the local APIC of the processor that runs.
pub fn apic_id() -> u32 {
    mmio_read::<u32>(LAPIC + 0x20) >> 24
}

/// The message that interrupts the processor that runs, counted under number `pin`: address and data (SDM vol. 3A §11.11).
pub fn message(pin: u32) -> (u32, u32) {
    (LAPIC as u32 | apic_id() << 12, FIRST_VECTOR + pin)
}

/// How often the interrupt of I/O APIC pin `pin`, or of the message with this number, came.
pub fn irq_count(pin: u32) -> u32 {
    IRQ_COUNTS[pin as usize].load(Ordering::Relaxed)
}

/// Forgets earlier interrupts: [`sleep`] from now on returns at once only if one came after this.
pub fn clear_pending() {
    IRQ_PENDING.store(0, Ordering::Relaxed);
}

/// Halts until an interrupt comes or came since [`clear_pending`], or `us` microseconds passed.
pub fn sleep(us: u32) {
    mmio_write(LAPIC_TIMER_DIVIDE, 0xbu32);
    mmio_write(LAPIC_TIMER, TIMER_VECTOR);
    mmio_write(LAPIC_TIMER_INITIAL, us.saturating_mul(LAPIC_TIMER_PER_US).max(1));
    service(0);
    mmio_write(LAPIC_TIMER_INITIAL, 0u32);
}

/// Halts with interrupts off.
pub fn halt() -> ! {
    service(2);
    spin()
}

/// Never returns and never exits.
pub fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Does at CPL 0 what a KVM without hardware support cannot emulate, then jumps to where no memory is.
pub fn internal_error() {
    service(3);
}

/// The timer's count and the TSC at the same moment: of a few attempts the one that took least time, since the host may
/// take the processor away in between.
fn timer_and_tsc() -> (u32, u64) {
    let attempt = || {
        let before = tsc();
        let current = mmio_read::<u32>(LAPIC_TIMER_CURRENT);
        let after = tsc();
        (after - before, (current, before + (after - before) / 2))
    };
    let attempts = [attempt(), attempt(), attempt(), attempt()];
    attempts.into_iter().min_by_key(|(took, _)| *took).map_or((0, 0), |(_, both)| both)
}

/// Compares the TSC with the local APIC's timer, three times, and takes the middle: one of them may have met a snapshot,
/// which doesn't stop and start both at the same moment.
pub fn calibrate() {
    let mut measured = [measure_tsc(), measure_tsc(), measure_tsc()];
    measured.sort_unstable();
    TSC_PER_MS.store(measured[1], Ordering::Relaxed);
}

/// Ticks of the TSC in a millisecond of the local APIC's timer.
fn measure_tsc() -> u64 {
    mmio_write(LAPIC_TIMER_DIVIDE, 0xbu32);
    mmio_write(LAPIC_TIMER, 1u32 << 16);
    mmio_write(LAPIC_TIMER_INITIAL, u32::MAX);
    let (start, from) = timer_and_tsc();
    let (mut elapsed, mut to) = (0, from);
    while elapsed < CALIBRATION_US * LAPIC_TIMER_PER_US {
        let (current, at) = timer_and_tsc();
        (elapsed, to) = (start.wrapping_sub(current), at);
    }
    let ticks = to.saturating_sub(from);
    mmio_write(LAPIC_TIMER_INITIAL, 0u32);
    ticks * u64::from(1_000 * LAPIC_TIMER_PER_US) / u64::from(elapsed)
}

/// Ticks of the TSC in a millisecond. [`calibrate`] comes first.
pub fn tsc_per_ms() -> u64 {
    TSC_PER_MS.load(Ordering::Relaxed).max(1)
}

/// Microseconds since the TSC was zero. [`calibrate`] comes first.
pub fn now_us() -> u64 {
    let per_ms = TSC_PER_MS.load(Ordering::Relaxed).max(1);
    let ticks = tsc();
    ticks / per_ms * 1_000 + ticks % per_ms * 1_000 / per_ms
}

/// Most that counts of the time between two looks at the clock: if it is more, the machine was saved or its processor taken away
/// meanwhile, and nothing that is waited for could come. Where KVM can't offset the TSC, it goes on during a snapshot.
const LONGEST_LOOK_US: u64 = 10_000;

/// Waits until `condition` holds, at most `us` microseconds of the machine's running; tells whether it came to hold.
pub fn wait_until(us: u64, mut condition: impl FnMut() -> bool) -> bool {
    let (mut left, mut last) = (us, now_us());
    loop {
        if condition() {
            return true;
        }
        let now = now_us();
        let passed = now.saturating_sub(last).min(LONGEST_LOOK_US);
        if passed >= left {
            return false;
        }
        (left, last) = (left - passed, now);
        core::hint::spin_loop();
    }
}

/// Where the fault stubs return to, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn fault_entry() -> ! {
    let [vector, error, rip, address] = [0, 1, 2, 3].map(|n: usize| FAULT[n].load(Ordering::Relaxed));
    println!("FAIL mote-guest: fault {vector} error {error:#x} at {rip:#x} address {address:#x}");
    power::reset()
}
