//! Functions that come and go while the guest runs, by ACPI: what its methods read and write (see `acpi`), and who is in which slot.
//!
//! ```text
//!   add:     VMM puts the function on the bus ─► INSERTED ─► interrupt ─► guest scans the slot
//!   remove:  VMM asks ─► LEAVING ─► interrupt ─► guest stops its driver ─► EJECT ─► off the bus, and closed by the main thread
//! ```
//!
//! | offset | width | |
//! |---|---|---|
//! | 0 | 4, read | INSERTED: slots with a new function, a bit each; reading clears them |
//! | 4 | 4, read | LEAVING: slots that the guest is asked to give up; reading clears them |
//! | 8 | 4, write | EJECT: slots that it gives up; those that it was not asked for are ignored |

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::{PciHost, SharedFunction, Slot};
use crate::devices::EventSource;
use crate::devices::bus::BusDevice;
use crate::snapshot::{DeviceState, StateError, Stateful};

/// What the registers hold in a snapshot, and who is in which slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HotPlugState {
    inserted: u32,
    leaving: u32,
    /// Slots that the guest may eject.
    removing: u32,
    /// Slot numbers by the functions' names.
    pub slots: BTreeMap<String, u8>,
}

/// The registers. A [`BusDevice`] of [`HotPlug::PORTS`] ports.
pub struct HotPlug {
    host: Arc<Mutex<PciHost>>,
    interrupt: EventFd,
    state: HotPlugState,
    /// Functions that are off the bus, for the main thread to close.
    ejected: Vec<(String, SharedFunction)>,
    /// Readable when there are some.
    has_ejected: Arc<EventFd>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HotPlug {
    /// Number of ports.
    pub const PORTS: u64 = 12;

    /// Over a bus; `interrupt` makes the guest look.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(host: Arc<Mutex<PciHost>>, interrupt: EventFd) -> std::io::Result<Self> {
        let has_ejected = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { host, interrupt, state: HotPlugState::default(), ejected: Vec::new(), has_ejected })
    }

    /// Notes who is in a slot.
    pub fn occupy(&mut self, slot: Slot, name: &str) {
        self.state.slots.insert(name.to_owned(), slot.number() as u8);
    }

    fn bit(&self, name: &str) -> Option<u32> {
        self.state.slots.get(name).map(|slot| 1 << slot)
    }

    fn notify(&self) {
        // Fails only if the counter is full, and then the guest is being told anyway.
        let _ = self.interrupt.write(1);
    }

    /// Tells the guest of a function that was put on the bus.
    pub fn announce(&mut self, name: &str) {
        self.state.inserted |= self.bit(name).unwrap_or(0);
        self.notify();
    }

    /// Asks the guest to give a function up; false if there is none of this name. Twice asks twice.
    pub fn ask(&mut self, name: &str) -> bool {
        let Some(bit) = self.bit(name) else { return false };
        self.state.leaving |= bit;
        self.state.removing |= bit;
        self.notify();
        true
    }

    /// Takes a function off the bus that the guest was not told of.
    pub fn withdraw(&mut self, name: &str) {
        if let Some(slot) = self.state.slots.remove(name).and_then(|slot| Slot::new(slot.into())) {
            lock(&self.host).remove(slot);
        }
    }

    /// Names of the functions that are gone since the last call; they are closed when the last reference to them is dropped.
    pub fn take_ejected(&mut self) -> Vec<String> {
        std::mem::take(&mut self.ejected).into_iter().map(|(name, _)| name).collect()
    }

    /// What the main loop watches, to call for [`HotPlug::take_ejected`].
    pub fn event_source(&self) -> Ejections {
        Ejections(self.has_ejected.clone())
    }

    fn eject(&mut self, slots: u32) {
        let asked = slots & self.state.removing;
        let number_of = |slot: u8| asked & 1 << slot != 0;
        let names = self.state.slots.iter().filter(|(_, slot)| number_of(**slot));
        let names: Vec<_> = names.map(|(name, slot)| (name.clone(), *slot)).collect();
        for (name, number) in names {
            self.state.slots.remove(&name);
            let function = Slot::new(number.into()).and_then(|slot| lock(&self.host).remove(slot));
            // Dropped by the main thread: a vCPU may not close what a device holds.
            self.ejected.extend(function.map(|function| (name, function)));
        }
        self.state.inserted &= !asked;
        self.state.leaving &= !asked;
        self.state.removing &= !asked;
        if asked != 0 {
            let _ = self.has_ejected.write(1);
        }
    }
}

impl BusDevice for HotPlug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            0 => std::mem::take(&mut self.state.inserted),
            4 => std::mem::take(&mut self.state.leaving),
            _ => 0,
        };
        *word = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (8, Ok(word)) = (offset, data.try_into()) {
            self.eject(u32::from_le_bytes(word));
        }
    }
}

impl Stateful for HotPlug {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.state)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: HotPlugState = state.get()?;
        if state.slots != self.state.slots {
            return Err(StateError::new(
                "the snapshot has other functions on its PCI bus than its configuration",
            ));
        }
        self.state = state;
        Ok(())
    }
}

/// Wakes the main loop after an ejection.
pub struct Ejections(Arc<EventFd>);

impl EventSource for Ejections {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn ready(&mut self) {
        // It was readable a moment ago, and nobody else reads it.
        let _ = self.0.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::bus::Bus;
    use crate::devices::pci::PciFunction;

    struct Function;

    impl BusDevice for Function {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    impl PciFunction for Function {
        fn read_config(&mut self, _register: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn write_config(&mut self, _register: u64, _data: &[u8]) {}
        fn wanted_range(&self) -> Option<(u64, u64)> {
            None
        }
        fn placed(&mut self, _base: Option<u64>) {}
    }

    fn read(hot_plug: &mut HotPlug, offset: u64) -> u32 {
        let mut data = [0; 4];
        hot_plug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn with(names: &[&str]) -> HotPlug {
        let host = Arc::new(Mutex::new(PciHost::new(Arc::new(Bus::new()))));
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut hot_plug = HotPlug::new(host.clone(), interrupt).unwrap();
        for name in names {
            let slot = lock(&host).free_slot().unwrap();
            lock(&host).insert(slot, Arc::new(Mutex::new(Function)));
            hot_plug.occupy(slot, name);
        }
        hot_plug
    }

    #[test]
    fn a_new_function_is_told_once() {
        let mut hot_plug = with(&["a", "b"]);
        assert!(hot_plug.interrupt.read().is_err());
        hot_plug.announce("b");
        assert_eq!(hot_plug.interrupt.read().unwrap(), 1);
        assert_eq!((read(&mut hot_plug, 0), read(&mut hot_plug, 0)), (1 << 2, 0));
    }

    #[test]
    fn a_function_leaves_when_the_guest_was_asked_and_gives_it_up() {
        let mut hot_plug = with(&["a", "b"]);
        hot_plug.write(8, &6_u32.to_le_bytes());
        assert_eq!(hot_plug.state.slots.len(), 2, "nobody asked");
        assert!(!hot_plug.ask("c"));
        assert!(hot_plug.ask("a"));
        assert_eq!((read(&mut hot_plug, 4), read(&mut hot_plug, 4)), (1 << 1, 0));
        assert!(hot_plug.take_ejected().is_empty());
        let mut source = hot_plug.event_source();
        assert!(hot_plug.has_ejected.read().is_err());
        hot_plug.write(8, &6_u32.to_le_bytes());
        source.ready();
        assert_eq!(hot_plug.take_ejected(), ["a"]);
        assert_eq!(hot_plug.state.slots, BTreeMap::from([("b".to_owned(), 2)]));
        assert_eq!(lock(&hot_plug.host).free_slot(), Slot::new(1));
        // Once.
        hot_plug.write(8, &u32::MAX.to_le_bytes());
        assert!(hot_plug.take_ejected().is_empty());
    }

    #[test]
    fn other_widths_and_offsets_do_nothing() {
        let mut hot_plug = with(&["a"]);
        hot_plug.announce("a");
        hot_plug.ask("a");
        for offset in 0..12 {
            for width in [1, 2, 8] {
                let mut data = vec![1; width];
                hot_plug.write(offset, &data);
                hot_plug.read(offset, &mut data);
                assert_eq!(data, vec![0; width]);
            }
        }
        assert!(hot_plug.take_ejected().is_empty());
        assert_eq!((read(&mut hot_plug, 0), read(&mut hot_plug, 4)), (2, 2));
    }

    #[test]
    fn registers_are_saved_and_other_functions_are_refused() {
        let mut hot_plug = with(&["a", "b"]);
        hot_plug.ask("b");
        let state = hot_plug.save().unwrap();
        let mut loaded = with(&["a", "b"]);
        loaded.restore(&state).unwrap();
        assert_eq!(read(&mut loaded, 4), 1 << 2);
        loaded.write(8, &4_u32.to_le_bytes());
        assert_eq!(loaded.take_ejected(), ["b"]);
        assert!(with(&["b", "a"]).restore(&state).is_err());
    }
}
