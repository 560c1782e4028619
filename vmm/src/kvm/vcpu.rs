//! Running a vCPU: exits are handed to the buses until something ends or interrupts it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use kvm_bindings::{kvm_cpuid_entry2, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::state::{Leaf, Processor};
use super::{KvmError, Shared, VcpuState};
use crate::devices::bus::Bus;
use crate::metrics::VCPU;

/// The real-time signal that makes a vCPU leave the guest.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the (empty) handler of the kick signal for the process. Must come before the first [`Kick::kick`].
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all-zero is a valid `sigaction`: no flags (so that calls return EINTR), empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialized and its handler does nothing, which is safe at any moment.
    match unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Interrupts a vCPU from another thread.
#[derive(Debug, Clone, Copy)]
pub struct Kick {
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is to a byte of the vCPU's shared page, accessed atomically only; `kick` demands that the page
// is still mapped.
unsafe impl Send for Kick {}

impl Kick {
    /// Makes the vCPU's current or next [`Vcpu::run`] on `thread` return [`Stop::Interrupted`].
    ///
    /// # Safety
    /// The [`Vcpu`] must not have been dropped, and `thread` must not have been joined.
    pub unsafe fn kick(&self, thread: libc::pthread_t) {
        // The flag makes KVM_RUN return at once if the signal comes just before the thread enters it.
        // SAFETY: the page is mapped as long as the vCPU lives, as the caller promises.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
        // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler that does nothing.
        unsafe { libc::pthread_kill(thread, kick_signal()) };
    }
}

/// Why a vCPU stopped running.
#[derive(Debug)]
pub enum Stop {
    /// It was kicked, or the machine is ending; running it again goes on where it was.
    Interrupted,
    /// The guest's processor cannot go on.
    Crash(Crash),
    /// KVM failed.
    Failed(KvmError),
}

/// What is known about a guest's crash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// Index of the vCPU.
    pub vcpu: u8,
    /// What KVM said.
    pub what: String,
    /// Instruction pointer, if it could be read.
    pub rip: Option<u64>,
    /// CR0, CR3, CR4, RSP and CS base.
    pub state: [u64; 5],
    /// Instruction bytes at RIP, as far as they are known.
    pub instruction: Vec<u8>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest crash: {} on vCPU {}", self.what, self.vcpu)?;
        let Some(rip) = self.rip else { return Ok(()) };
        let [cr0, cr3, cr4, rsp, cs_base] = self.state;
        write!(f, ", rip {rip:#x} rsp {rsp:#x} cs base {cs_base:#x} cr0 {cr0:#x} cr3 {cr3:#x} cr4 {cr4:#x}")?;
        write!(f, ", bytes at rip:")?;
        if self.instruction.is_empty() {
            return write!(f, " unknown");
        }
        self.instruction.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

/// Reads from a bus; where no device is, all bits are set, as on a PC.
fn read(bus: &Bus, address: u64, data: &mut [u8]) {
    if !bus.read(address, data) {
        data.fill(0xff);
    }
}

/// One virtual processor.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    /// The page shared with KVM; it lives as long as `fd`.
    run: *mut kvm_run,
    /// Keeps the guest's memory mapped as long as this processor may touch it.
    vm: Arc<Shared>,
    /// The identification that the guest was given.
    cpuid: Vec<Leaf>,
}

// SAFETY: `run` points into the mapping that `fd` owns, which may be used from any thread.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, index: u8, vm: Arc<Shared>, cpuid: &[kvm_cpuid_entry2]) -> Self {
        let run = &raw mut *fd.get_kvm_run();
        Self { fd, index, run, vm, cpuid: cpuid.iter().map(Leaf::new).collect() }
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    pub(super) fn processor(&self) -> Processor<'_> {
        Processor { fd: &self.fd, index: self.index, vm: &self.vm, cpuid: &self.cpuid }
    }

    /// Its state for a snapshot. It must have left the guest by [`Stop::Interrupted`]: what an exit began is finished then.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        self.processor().save()
    }

    /// Brings a processor that has not run into a saved state, with the saved identification.
    pub(super) fn restore(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        self.processor().restore(state)?;
        self.cpuid = state.cpuid().to_vec();
        Ok(())
    }

    /// Its number; 0 is the boot processor.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Tells a guest that uses KVM's clock that its processor was stopped, so that its watchdogs do not bark.
    pub fn tell_guest_of_pause(&self) {
        // Fails for a guest that does not use that clock, which is fine.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// The handle to interrupt it with.
    pub fn kick_handle(&self) -> Kick {
        Kick { immediate_exit: self.immediate_exit() }
    }

    fn immediate_exit(&self) -> *const AtomicU8 {
        // SAFETY: `run` points to the mapped page; only the address of the field is taken.
        unsafe { &raw const (*self.run).immediate_exit }.cast()
    }

    /// Width of one access of the port I/O exit that just happened (string instructions make several at once).
    fn port_width(run: *const kvm_run) -> usize {
        // SAFETY: the page is mapped, and after KVM_EXIT_IO this is the member the kernel filled.
        usize::from(unsafe { (*run).__bindgen_anon_1.io.size }).max(1)
    }

    /// Runs the guest until it is kicked, crashes, or `ending` is set (looked at after each exit).
    pub fn run(&mut self, ports: &Bus, mmio: &Bus, ending: &AtomicBool) -> Stop {
        let run = self.run;
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    VCPU.exit_io_out.add_one();
                    data.chunks(Self::port_width(run)).for_each(|access| {
                        ports.write(port.into(), access);
                    });
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    VCPU.exit_io_in.add_one();
                    data.chunks_mut(Self::port_width(run))
                        .for_each(|access| read(ports, port.into(), access));
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    VCPU.exit_mmio_write.add_one();
                    mmio.write(address, data);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    VCPU.exit_mmio_read.add_one();
                    read(mmio, address, data);
                }
                // The I/O APIC has no state that an end of interrupt changes.
                Ok(VcpuExit::IoapicEoi(_)) => {}
                Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Shutdown) => return Stop::Crash(self.crash("triple fault".to_owned())),
                Ok(VcpuExit::InternalError) => return Stop::Crash(self.internal_error()),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Stop::Crash(
                        self.crash(format!("the processor refused to enter the guest (reason {reason:#x})")),
                    );
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    return Stop::Crash(self.crash(format!("KVM system event {kind}")));
                }
                Ok(other) => {
                    let what = format!("unexpected KVM exit {other:?}");
                    return Stop::Crash(self.crash(what));
                }
                Err(error) if error.errno() == libc::EINTR => {
                    // SAFETY: the page is mapped as long as `self.fd` lives.
                    unsafe { &*self.immediate_exit() }.store(0, Ordering::SeqCst);
                    return Stop::Interrupted;
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(source) => {
                    return Stop::Failed(KvmError::Vcpu { call: "KVM_RUN", vcpu: self.index, source });
                }
            }
            if ending.load(Ordering::Relaxed) {
                return Stop::Interrupted;
            }
        }
    }

    fn crash(&self, what: String) -> Crash {
        let regs = self.fd.get_regs().ok();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        let rsp = regs.map_or(0, |regs| regs.rsp);
        Crash {
            vcpu: self.index,
            what,
            rip: regs.map(|regs| regs.rip),
            state: [sregs.cr0, sregs.cr3, sregs.cr4, rsp, sregs.cs.base],
            instruction: Vec::new(),
        }
    }

    /// KVM could not go on: a sub-error, and for a failed emulation the instruction's bytes.
    fn internal_error(&self) -> Crash {
        const EMULATION: u32 = 1;
        const HAS_BYTES: u64 = 1;
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so this is the member the kernel filled.
        let error = unsafe { (*self.run).__bindgen_anon_1.emulation_failure };
        let mut crash = self.crash(match error.suberror {
            EMULATION => "KVM internal error, suberror 1 (an instruction KVM cannot emulate)".to_owned(),
            other => format!("KVM internal error, suberror {other}"),
        });
        // The instruction is there if `ndata` covers flags, size and 15 bytes, and the flag says so.
        if error.suberror == EMULATION && error.ndata >= 3 && error.flags & HAS_BYTES != 0 {
            // SAFETY: plain integers, filled by the kernel as checked above.
            let bytes = unsafe { error.__bindgen_anon_1.__bindgen_anon_1 };
            let size = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            crash.instruction = bytes.insn_bytes[..size].to_vec();
        }
        crash
    }
}
