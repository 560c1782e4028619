//! The only place that calls KVM: the VM, its memory slots, interrupts and vCPUs.
//!
//! The order of the calls matters for start-up and was measured: memory slots are registered *before* the interrupt
//! controllers are made, because each change of the slots afterwards waits for a grace period of KVM's readers.

mod cpuid;
mod registers;
mod slots;
mod state;
mod static_templates;
mod template;
mod vcpu;
mod wiring;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use mote_vmm_api::CpuConfig;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

pub use cpuid::Topology;
pub use registers::{Entry, Protocol};
pub use slots::PluggableSlots;
pub use state::{Clock, ClockState, CpuMismatch, VcpuState};
pub use template::{ProcessorView, TemplateError};
pub use vcpu::{Kick, Stop, Vcpu, install_kick_handler};
pub use wiring::{Doorbell, InterruptRoutes, Message, MessageInterrupt, Wiring};

use crate::layout;
use crate::mapping::Mapping;
use crate::memory::GuestMemory;

type Errno = kvm_ioctls::Error;

/// A call to KVM failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm could not be opened.
    #[error("cannot open /dev/kvm: {}", open_hint(.0))]
    Open(#[source] Errno),
    /// KVM speaks another version of its interface.
    #[error("/dev/kvm is not a KVM of this kind: its API version is {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0:?}, which is in every kernel since 5.10")]
    Capability(Cap),
    /// A call failed; the name is that of the ioctl.
    #[error("{0} failed")]
    Call(&'static str, #[source] Errno),
    /// vCPU call.
    #[error("{call} of vCPU {vcpu} failed")]
    Vcpu {
        /// Name of the ioctl.
        call: &'static str,
        /// Index.
        vcpu: u8,
        /// Cause.
        #[source]
        source: Errno,
    },
    /// KVM_SET_MSRS stopped early.
    #[error("KVM refused MSR {index:#x} of vCPU {vcpu}")]
    Msr {
        /// MSR number.
        index: u32,
        /// Index.
        vcpu: u8,
    },
    /// A snapshot's CPUID.
    #[error("{0} CPUID leaves are more than KVM takes")]
    TooManyLeaves(usize),
    /// A snapshot with fewer processors than its configuration says.
    #[error("the snapshot has no state of vCPU {0}")]
    MissingVcpu(u8),
    /// A snapshot's XSAVE area.
    #[error("the snapshot's processor state has {saved} bytes, this host's processors have {here}")]
    XsaveSize {
        /// In the snapshot.
        saved: usize,
        /// Of this host.
        here: usize,
    },
    /// A snapshot of another processor.
    #[error(transparent)]
    CpuMismatch(#[from] CpuMismatch),
    /// A CPU template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Boot tables could not be written.
    #[error("cannot write the boot processor's tables into guest memory")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// Guest memory ends beyond what the processor can address.
    #[error("guest memory ends at {end:#x}, but this host's guests have {bits} physical address bits")]
    AddressBits {
        /// End of guest memory.
        end: u64,
        /// Width.
        bits: u8,
    },
}

/// What a person can do about a /dev/kvm that cannot be opened.
fn open_hint(error: &Errno) -> &'static str {
    match error.errno() {
        libc::ENOENT => {
            "it does not exist; load kvm_intel or kvm_amd, and enable VT-x/AMD-V in the firmware (or nested \
             virtualization, if this host is itself a VM)"
        }
        libc::EACCES | libc::EPERM => "no permission; run as a member of group kvm",
        libc::ENODEV | libc::ENXIO => {
            "no hardware virtualization behind it; enable VT-x/AMD-V in the firmware"
        }
        _ => "it is there but unusable",
    }
}

/// The CPUID leaves KVM supports: guests are never shown more.
fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    /// Newest kernels may report more than the 80 entries that older ones allowed.
    const MOST_ENTRIES: usize = 256;
    match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Err(error) if error.errno() == libc::E2BIG => kvm.get_supported_cpuid(MOST_ENTRIES),
        result => result,
    }
    .map_err(|source| KvmError::Call("KVM_GET_SUPPORTED_CPUID", source))
}

/// A virtual machine without devices.
#[derive(Debug)]
pub struct Vm {
    shared: Arc<Shared>,
}

/// What must live as long as anything of the VM.
#[derive(Debug)]
struct Shared {
    kvm: Kvm,
    fd: VmFd,
    /// Keeps the memory mapped as long as KVM has it.
    memory: GuestMemory,
    /// Of the slots that `memory` is in.
    memory_flags: u32,
    /// Kept as `memory` is.
    mappings: Mutex<Vec<Mapping>>,
    routes: Mutex<wiring::Routes>,
    /// Memory slots given out so far.
    slots: AtomicU32,
    /// Last physical address of what the guest has beside `memory`.
    end: AtomicU64,
}

impl Shared {
    fn check_address_bits(&self, supported: &CpuId) -> Result<(), KvmError> {
        let bits = cpuid::physical_address_bits(supported);
        let end = self.memory.last_addr().raw_value().max(self.end.load(Ordering::Relaxed));
        if bits < 64 && end >> bits != 0 {
            return Err(KvmError::AddressBits { end, bits });
        }
        Ok(())
    }
}

impl Vm {
    /// Opens /dev/kvm, makes a VM, and gives it `memory`.
    pub fn create(memory: &GuestMemory, track_dirty_pages: bool) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Open)?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion(version));
        }
        for capability in template::ALWAYS_NEEDED {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Capability(capability));
            }
        }
        let fd = kvm.create_vm().map_err(|source| KvmError::Call("KVM_CREATE_VM", source))?;
        let shared = Shared {
            kvm,
            fd,
            memory: memory.clone(),
            memory_flags: if track_dirty_pages { kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            mappings: Mutex::default(),
            routes: Mutex::default(),
            slots: AtomicU32::new(memory.num_regions() as u32),
            end: AtomicU64::new(0),
        };
        let vm = Self { shared: Arc::new(shared) };
        vm.add_memory()?;
        Ok(vm)
    }

    fn add_memory(&self) -> Result<(), KvmError> {
        // What can be plugged is not there yet.
        let always = self.shared.memory.iter().filter(|region| region.blocks().is_none());
        for (slot, region) in always.enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: self.shared.memory_flags,
            };
            // SAFETY: the range is a mapping of exactly this length that `self.shared.memory` keeps until after the VM's
            // descriptor is closed (field order), and slots do not overlap since regions do not.
            unsafe { self.shared.fd.set_user_memory_region(slot) }
                .map_err(|source| KvmError::Call("KVM_SET_USER_MEMORY_REGION", source))?;
        }
        Ok(())
    }

    /// Makes the local APICs inside KVM; the I/O APIC is ours (see `ioapic`) and there is neither PIC nor PIT.
    /// Must come before the vCPUs.
    pub fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        let fd = &self.shared.fd;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(|source| KvmError::Call("KVM_SET_IDENTITY_MAP_ADDR", source))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(|source| KvmError::Call("KVM_SET_TSS_ADDR", source))?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = u64::from(layout::LAST_IRQ) + 1;
        fd.enable_cap(&split).map_err(|source| KvmError::Call("KVM_ENABLE_CAP (split irqchip)", source))
    }

    /// What connects eventfds with the guest.
    pub fn wiring(&self) -> Wiring {
        Wiring { shared: self.shared.clone() }
    }

    /// Makes the `count` vCPUs: processor identification on each, the boot processor ready to run at `entry`.
    ///
    /// # Errors
    /// KVM refused, or the template doesn't fit this host.
    pub fn create_vcpus(
        self,
        topology: Topology,
        template: Option<&CpuConfig>,
        entry: &Entry,
    ) -> Result<Vec<Vcpu>, KvmError> {
        self.each_vcpu(topology, template, |vcpu, cpuid| {
            registers::identify(vcpu, cpuid, template)?;
            registers::set_up(vcpu.fd(), vcpu.index(), entry, &self.shared.memory)
        })
    }

    /// Makes the vCPUs of a snapshot, in the order of their indices.
    ///
    /// # Errors
    /// KVM refused, or this host's processors can't stand in for those of the snapshot.
    pub fn restore_vcpus(self, topology: Topology, states: &[VcpuState]) -> Result<Vec<Vcpu>, KvmError> {
        let mut states = states.iter();
        // What a template changed is in the states.
        self.each_vcpu(topology, None, |vcpu, _| match states.next() {
            Some(state) => vcpu.restore(state),
            None => Err(KvmError::MissingVcpu(vcpu.index())),
        })
    }

    fn each_vcpu(
        &self,
        topology: Topology,
        template: Option<&CpuConfig>,
        mut set_up: impl FnMut(&mut Vcpu, &[kvm_cpuid_entry2]) -> Result<(), KvmError>,
    ) -> Result<Vec<Vcpu>, KvmError> {
        let mut supported = supported_cpuid(&self.shared.kvm)?;
        if let Some(template) = template {
            template::check_capabilities(&self.shared.kvm, template)?;
            supported = template::change_leaves(&supported, template)?;
        }
        self.shared.check_address_bits(&supported)?;
        let deadline_timer = self.shared.kvm.check_extension(Cap::TscDeadlineTimer);
        (0..topology.vcpus)
            .map(|index| {
                let fd = self.shared.fd.create_vcpu(index.into()).map_err(|source| KvmError::Vcpu {
                    call: "KVM_CREATE_VCPU",
                    vcpu: index,
                    source,
                })?;
                let cpuid = cpuid::for_vcpu(&supported, topology, index, deadline_timer);
                let mut vcpu = Vcpu::new(fd, index, self.shared.clone(), &cpuid);
                set_up(&mut vcpu, &cpuid)?;
                Ok(vcpu)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_names_what_to_do() {
        let error = KvmError::Open(Errno::new(libc::ENOENT));
        assert!(error.to_string().contains("load kvm_intel or kvm_amd"), "{error}");
        assert!(KvmError::Open(Errno::new(libc::EACCES)).to_string().contains("group kvm"));
    }
}
