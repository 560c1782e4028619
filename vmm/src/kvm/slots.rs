//! Parts of the guest's physical memory beside its RAM.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::Cap;

use super::{KvmError, Shared, Wiring};
use crate::mapping::Mapping;

impl Shared {
    /// A number that no slot has. They are never given back: KVM has 32,764 of them, and each device takes its own once.
    fn slot_number(&self) -> u32 {
        self.slots.fetch_add(1, Ordering::Relaxed)
    }
}

impl Wiring {
    /// Lets the guest see all of `mapping` at `address` for the VM's whole life. Nothing else may be there. Writes to a read-only
    /// one go to the bus, where nobody is.
    ///
    /// # Errors
    /// KVM refused.
    pub fn map(&self, mapping: Mapping, address: u64, read_only: bool) -> Result<(), KvmError> {
        let shared = &self.shared;
        if read_only && !shared.kvm.check_extension(Cap::ReadonlyMem) {
            return Err(KvmError::Capability(Cap::ReadonlyMem));
        }
        let slot = kvm_userspace_memory_region {
            slot: shared.slot_number(),
            guest_phys_addr: address,
            memory_size: mapping.len() as u64,
            userspace_addr: mapping.address() as u64,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the slot is exactly the mapping, which lives until after the VM's descriptor is closed if KVM takes it (below,
        // and the order of the fields of `Shared`).
        unsafe { shared.fd.set_user_memory_region(slot) }
            .map_err(|source| KvmError::Call("KVM_SET_USER_MEMORY_REGION", source))?;
        shared.end.fetch_max(address.saturating_add(mapping.len() as u64 - 1), Ordering::Relaxed);
        shared.mappings.lock().unwrap_or_else(PoisonError::into_inner).push(mapping);
        Ok(())
    }
}
