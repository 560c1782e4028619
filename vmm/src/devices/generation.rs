//! VM Generation ID (Microsoft, "Virtual Machine Generation ID", 2018): 16 random bytes in reserved memory that are other ones in every machine
//! that was made from a snapshot. An ACPI device says where they are, and a notification that they have changed. Linux mixes them into
//! its random number generator, so that two machines from one snapshot don't draw the same numbers.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::GuestMemory;

/// Bytes of an id.
pub const ID_BYTES: usize = 16;

/// The id could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No random numbers.
    #[error("cannot draw a VM generation id")]
    Random(#[source] std::io::Error),
    /// Guest memory ends below it.
    #[error("cannot write the VM generation id into guest memory")]
    Write(#[from] GuestMemoryError),
    /// The guest can't be told.
    #[error("cannot notify the guest of its new VM generation id")]
    Notify(#[source] std::io::Error),
}

/// Gives a machine its first id.
///
/// # Errors
/// See [`GenerationError`].
pub fn write(memory: &GuestMemory) -> Result<(), GenerationError> {
    let mut id = [0; ID_BYTES];
    let mut drawn = 0;
    while drawn < ID_BYTES {
        let rest = &mut id[drawn..];
        // SAFETY: the pointer and the length are those of `rest`.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => drawn += n,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(GenerationError::Random(error));
                }
            }
        }
    }
    Ok(memory.write_slice(&id, GuestAddress(layout::VM_GENERATION_ID))?)
}

/// Gives a machine from a snapshot another id and raises the interrupt of its notification, whose processors must have their
/// saved state already.
///
/// # Errors
/// See [`GenerationError`].
pub fn renew(memory: &GuestMemory, interrupt: &EventFd) -> Result<(), GenerationError> {
    write(memory)?;
    interrupt.write(1).map_err(GenerationError::Notify)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn an_id_is_never_the_one_before_and_its_change_is_told() {
        let memory = crate::memory::create(1).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let id = || memory.read_obj::<u128>(GuestAddress(layout::VM_GENERATION_ID)).unwrap();
        write(&memory).unwrap();
        let first = id();
        assert_ne!(first, 0);
        assert!(interrupt.read().is_err());
        renew(&memory, &interrupt).unwrap();
        assert_ne!(id(), first);
        assert_eq!(interrupt.read().unwrap(), 1);
    }
}
