//! Eventfds wired to the guest: interrupts out (irqfd with message routes), notifications in (ioeventfd).
//!
//! KVM has one table of routes from interrupt numbers ("GSIs") to messages, and takes it whole each time. The first
//! [`INPUTS`] numbers are the inputs of the I/O APIC, the others the MSI-X vectors of PCI functions.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Clock, KvmError, Shared};
use crate::layout;

/// Inputs of the I/O APIC.
const INPUTS: u32 = layout::LAST_IRQ + 1;
/// KVM's limit of routes on x86 (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: u32 = 4096;

/// A message signalled interrupt: what is written to which address of the local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// The routes as KVM was told last.
#[derive(Debug, Default)]
pub(super) struct Routes {
    inputs: Vec<Option<Message>>,
    vectors: BTreeMap<u32, Message>,
    /// Numbers that were given back.
    free: Vec<u32>,
    /// Numbers given out so far, counted from [`INPUTS`].
    given: u32,
}

impl Routes {
    fn allocate(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let gsi = INPUTS + self.given;
            (gsi < MAX_ROUTES).then(|| {
                self.given += 1;
                gsi
            })
        })
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let inputs = (0..).zip(&self.inputs).filter_map(|(gsi, message)| Some((gsi, (*message)?)));
        let vectors = self.vectors.iter().map(|(gsi, message)| (*gsi, *message));
        inputs.chain(vectors).map(|(gsi, message)| routing_entry(gsi, message)).collect()
    }
}

fn routing_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    // A union of plain integers: the high half of the address lies beside `data`.
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the routes and tells KVM; what KVM refuses is undone by `undo`.
    fn change_routes(
        &self,
        change: impl FnOnce(&mut Routes),
        undo: impl FnOnce(&mut Routes),
    ) -> io::Result<()> {
        let mut routes = self.routes();
        change(&mut routes);
        let result = KvmIrqRouting::from_entries(&routes.entries())
            .map_err(|_| io::Error::other("too many interrupts"))
            .and_then(|table| Ok(self.fd.set_gsi_routing(&table)?));
        if result.is_err() {
            undo(&mut routes);
        }
        result
    }
}

/// The messages that the inputs of the I/O APIC send.
#[derive(Debug)]
pub struct InterruptRoutes {
    shared: Arc<Shared>,
}

impl InterruptRoutes {
    /// Sets the message of each interrupt, whose number is its place; `None` drops what comes.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set(&self, routes: &[Option<Message>]) -> io::Result<()> {
        self.shared.change_routes(|table| table.inputs = routes.to_vec(), |_| {})
    }
}

/// Makes connections between eventfds and the guest, also while it runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Wiring {
    pub(super) shared: Arc<Shared>,
}

impl Wiring {
    /// The messages that the inputs of the I/O APIC send.
    pub fn interrupt_routes(&self) -> InterruptRoutes {
        InterruptRoutes { shared: self.shared.clone() }
    }

    /// The clock that guests have their time from.
    pub fn clock(&self) -> Clock {
        Clock { shared: self.shared.clone() }
    }

    /// Makes a write to `event` raise input `irq` of the I/O APIC (edge-triggered).
    pub fn connect_interrupt(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.shared.fd.register_irqfd(event, irq).map_err(|source| KvmError::Call("KVM_IRQFD", source))
    }

    /// Makes the guest's 32-bit write of `value` to `address` signal `event` without leaving the kernel.
    pub fn connect_notifier(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.shared
            .fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(|source| KvmError::Call("KVM_IOEVENTFD", source))
    }

    /// A new MSI-X vector, not connected.
    ///
    /// # Errors
    /// KVM's interrupt numbers are used up, or there is no descriptor for an eventfd.
    pub fn message_interrupt(&self) -> io::Result<MessageInterrupt> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let gsi = self
            .shared
            .routes()
            .allocate()
            .ok_or_else(|| io::Error::other("all of KVM's interrupt numbers are used"))?;
        Ok(MessageInterrupt { shared: self.shared.clone(), gsi, event, connected: false })
    }

    /// A doorbell that signals `event`, nowhere yet.
    pub fn doorbell(&self, event: Arc<EventFd>) -> Doorbell {
        Doorbell { shared: self.shared.clone(), event, address: None }
    }
}

/// An eventfd that sends a message to a local APIC while it is connected. While it isn't, what is written to it stays
/// there and is sent on connection.
#[derive(Debug)]
pub struct MessageInterrupt {
    shared: Arc<Shared>,
    gsi: u32,
    event: Arc<EventFd>,
    connected: bool,
}

impl MessageInterrupt {
    /// The eventfd.
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// Sends `message` from now on, and now if something was written while it was not connected.
    ///
    /// # Errors
    /// KVM refused: nothing is connected then.
    pub fn connect(&mut self, message: Message) -> io::Result<()> {
        let gsi = self.gsi;
        let old = self.shared.routes().vectors.get(&gsi).copied();
        if old != Some(message) {
            let set = self.shared.change_routes(
                |routes| {
                    routes.vectors.insert(gsi, message);
                },
                |routes| {
                    routes.vectors.remove(&gsi);
                },
            );
            if let Err(error) = set {
                self.disconnect();
                return Err(error);
            }
        }
        if !self.connected {
            // KVM looks for a pending event when it takes the descriptor, but leaves the counter as it is; counted
            // again, it would be told as pending at the next mask.
            let pending = self.event.read().is_ok();
            self.shared.fd.register_irqfd(&self.event, gsi)?;
            self.connected = true;
            if pending {
                // Cannot fail: the counter was just read.
                let _ = self.event.write(1);
            }
        }
        Ok(())
    }

    /// Sends nothing any more; what is written from now on waits.
    pub fn disconnect(&mut self) {
        if self.connected {
            // Fails only for what is not connected.
            let _ = self.shared.fd.unregister_irqfd(&self.event, self.gsi);
            self.connected = false;
        }
    }
}

impl Drop for MessageInterrupt {
    fn drop(&mut self) {
        self.disconnect();
        let mut routes = self.shared.routes();
        // KVM keeps a route of this number until the next change: nothing uses it.
        routes.vectors.remove(&self.gsi);
        routes.free.push(self.gsi);
    }
}

/// An address in the guest whose writes, of any width and value, signal an eventfd.
#[derive(Debug)]
pub struct Doorbell {
    shared: Arc<Shared>,
    event: Arc<EventFd>,
    address: Option<u64>,
}

impl Doorbell {
    /// Puts it at `address`, or nowhere.
    ///
    /// # Errors
    /// KVM refused: it is nowhere then.
    pub fn place(&mut self, address: Option<u64>) -> io::Result<()> {
        if let Some(old) = self.address.take() {
            // Fails only for what is not there.
            let _ = self.shared.fd.unregister_ioevent(&self.event, &IoEventAddress::Mmio(old), NoDatamatch);
        }
        if let Some(new) = address {
            self.shared.fd.register_ioevent(&self.event, &IoEventAddress::Mmio(new), NoDatamatch)?;
            self.address = Some(new);
        }
        Ok(())
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        let _ = self.place(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_start_after_the_io_apic_are_reused_and_end() {
        let mut routes = Routes::default();
        assert_eq!(routes.allocate(), Some(24));
        assert_eq!(routes.allocate(), Some(25));
        routes.free.push(24);
        assert_eq!(routes.allocate(), Some(24));
        while routes.allocate().is_some() {}
        assert_eq!(routes.given, MAX_ROUTES - INPUTS);
    }

    #[test]
    fn the_table_has_inputs_and_vectors_with_the_whole_address() {
        let inputs = vec![None, Some(Message { address: 0xfee0_0000, data: 1 })];
        let mut routes = Routes { inputs, ..Routes::default() };
        routes.vectors.insert(30, Message { address: 0x1_fee0_0000, data: 2 });
        let entries = routes.entries();
        assert_eq!(entries.iter().map(|entry| entry.gsi).collect::<Vec<_>>(), [1, 30]);
        // SAFETY: written just above as this member.
        let (low, high) = unsafe { (entries[1].u.msi.address_lo, entries[1].u.msi.address_hi) };
        assert_eq!((low, high), (0xfee0_0000, 1));
    }
}
