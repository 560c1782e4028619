//! MSI-X (PCI Local Bus Specification 3.0 §6.8.2): a table of messages and an array of pending bits.
//!
//! A vector is *open* when MSI-X is on, neither function nor vector is masked, and the function may be bus master. An
//! open vector's eventfd is connected to KVM; a closed one's keeps what is written to it, and that is its pending bit.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::report;
use crate::kvm::{Message, MessageInterrupt};

/// Bytes of a table entry: message address, data, vector control.
pub const ENTRY: u64 = 16;
/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Offset of the high byte of message control in the capability: enable and function mask.
pub const CONTROL_HIGH: usize = 3;
/// Bits of that byte that the guest may write.
pub const CONTROL_HIGH_WRITABLE: u8 = CONTROL_ENABLE | CONTROL_MASK;
const CONTROL_ENABLE: u8 = 1 << 7;
const CONTROL_MASK: u8 = 1 << 6;
/// Vector control: masked.
const VECTOR_MASKED: u32 = 1;

/// Where a vector's messages go.
pub trait Sink: Send {
    /// What a device writes to for an interrupt.
    fn event(&self) -> &Arc<EventFd>;
    /// Sends `message` for each write from now on, and for what was written before.
    ///
    /// # Errors
    /// The message is no interrupt.
    fn connect(&mut self, message: Message) -> io::Result<()>;
    /// Keeps what is written.
    fn disconnect(&mut self);
}

impl Sink for MessageInterrupt {
    fn event(&self) -> &Arc<EventFd> {
        Self::event(self)
    }
    fn connect(&mut self, message: Message) -> io::Result<()> {
        Self::connect(self, message)
    }
    fn disconnect(&mut self) {
        Self::disconnect(self);
    }
}

/// A table entry as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control; only the mask bit exists.
    pub control: u32,
}

struct Vector {
    entry: Entry,
    sink: Box<dyn Sink>,
    /// The message that the sink is connected with.
    open: Option<Message>,
}

/// The table, the pending bits and the enable bits.
pub struct MsiX {
    vectors: Vec<Vector>,
    enabled: bool,
    masked: bool,
    bus_master: bool,
    failed: bool,
}

impl MsiX {
    /// All vectors masked, MSI-X off.
    pub fn new(sinks: impl IntoIterator<Item = Box<dyn Sink>>) -> Self {
        let entry = Entry { address: 0, data: 0, control: VECTOR_MASKED };
        let vectors = sinks.into_iter().map(|sink| Vector { entry, sink, open: None }).collect();
        Self { vectors, enabled: false, masked: false, bus_master: false, failed: false }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Whether there is no vector.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Body of the capability (what follows id and link): table and pending bits at these offsets of register 0.
    pub fn capability(&self, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&self.len().saturating_sub(1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// The eventfds of the vectors, in order.
    pub fn events(&self) -> Vec<Arc<EventFd>> {
        self.vectors.iter().map(|vector| vector.sink.event().clone()).collect()
    }

    /// Whether MSI-X is on.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Takes the high byte of message control, and whether the function may be bus master.
    pub fn set_control(&mut self, control_high: u8, bus_master: bool) {
        self.enabled = control_high & CONTROL_ENABLE != 0;
        self.masked = control_high & CONTROL_MASK != 0;
        self.bus_master = bus_master;
        (0..self.vectors.len()).for_each(|vector| self.update(vector));
    }

    fn update(&mut self, vector: usize) {
        let open = self.enabled && !self.masked && self.bus_master;
        let Some(vector) = self.vectors.get_mut(vector) else { return };
        let Entry { address, data, control } = vector.entry;
        let wanted = (open && control & VECTOR_MASKED == 0).then_some(Message { address, data });
        if wanted == vector.open {
            return;
        }
        vector.open = wanted;
        match wanted {
            None => vector.sink.disconnect(),
            Some(message) => {
                if let Err(error) = vector.sink.connect(message)
                    && !self.failed
                {
                    // Told once: the guest can make it happen again and again.
                    self.failed = true;
                    report("an interrupt of a PCI function", &error);
                }
            }
        }
    }

    /// Reads the table, any width at any offset.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vector = usize::try_from(at / ENTRY).ok().and_then(|index| self.vectors.get(index));
            *byte = vector.map_or(0, |vector| entry_bytes(&vector.entry)[(at % ENTRY) as usize]);
        }
    }

    /// Writes aligned doublewords or quadwords of the table; ignores anything else (§6.8.2).
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let index = usize::try_from(offset / ENTRY).unwrap_or(usize::MAX);
        if !aligned {
            return;
        }
        let Some(vector) = self.vectors.get_mut(index) else { return };
        let mut bytes = entry_bytes(&vector.entry);
        let at = (offset % ENTRY) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, c0, ..] = bytes;
        vector.entry = Entry {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
            control: u32::from(c0) & VECTOR_MASKED,
        };
        self.update(index);
    }

    /// Reads the pending bits, any width at any offset.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            let bit = |bit: usize| u8::from(self.is_pending(first.saturating_add(bit))) << bit;
            *byte = (0..8).map(bit).fold(0, |byte, bit| byte | bit);
        }
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.vectors
            .get(vector)
            .is_some_and(|vector| vector.open.is_none() && has_been_written(vector.sink.event()))
    }
}

fn entry_bytes(entry: &Entry) -> [u8; ENTRY as usize] {
    let mut bytes = [0; ENTRY as usize];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
    bytes
}

/// Looks at an eventfd without taking what is in it.
fn has_been_written(event: &EventFd) -> bool {
    // SAFETY: borrowed for the call only, while `event` lives.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// Remembers what it is connected with.
    pub struct Recorder {
        event: Arc<EventFd>,
        /// The message it is connected with.
        pub connected: Arc<Mutex<Option<Message>>>,
    }

    impl Recorder {
        /// Not connected.
        pub fn new() -> Self {
            Self { event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), connected: Arc::default() }
        }
    }

    impl Sink for Recorder {
        fn event(&self) -> &Arc<EventFd> {
            &self.event
        }
        fn connect(&mut self, message: Message) -> io::Result<()> {
            *self.connected.lock().unwrap() = Some(message);
            Ok(())
        }
        fn disconnect(&mut self) {
            *self.connected.lock().unwrap() = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::testing::Recorder;
    use super::*;

    type Connection = Arc<Mutex<Option<Message>>>;

    fn msix(vectors: usize) -> (MsiX, Vec<Connection>) {
        let sinks: Vec<_> = (0..vectors).map(|_| Recorder::new()).collect();
        let connections = sinks.iter().map(|sink| sink.connected.clone()).collect();
        (MsiX::new(sinks.into_iter().map(|sink| Box::new(sink) as Box<dyn Sink>)), connections)
    }

    fn write(msix: &mut MsiX, offset: u64, value: u32) {
        msix.write_table(offset, &value.to_le_bytes());
    }

    #[test]
    fn a_vector_is_connected_while_nothing_masks_it() {
        let (mut msix, connections) = msix(2);
        let connected = || *connections[1].lock().unwrap();
        write(&mut msix, 16, 0xfee0_1000);
        write(&mut msix, 24, 0x41);
        write(&mut msix, 28, 0);
        assert_eq!(connected(), None, "MSI-X is off");
        msix.set_control(0x80, false);
        assert_eq!(connected(), None, "not bus master");
        msix.set_control(0x80, true);
        assert_eq!(connected(), Some(Message { address: 0xfee0_1000, data: 0x41 }));
        assert_eq!(*connections[0].lock().unwrap(), None, "the other one is masked");
        msix.set_control(0xc0, true);
        assert_eq!(connected(), None, "the function is masked");
        msix.set_control(0x80, true);
        msix.write_table(16, &0x0000_0001_fee0_2000u64.to_le_bytes());
        assert_eq!(connected(), Some(Message { address: 0x1_fee0_2000, data: 0x41 }), "changed while open");
        write(&mut msix, 28, u32::MAX);
        assert_eq!(connected(), None);
        let mut control = [0; 4];
        msix.read_table(28, &mut control);
        assert_eq!(u32::from_le_bytes(control), 1, "other bits are reserved");
    }

    #[test]
    fn what_a_closed_vector_is_told_is_pending() {
        let (mut msix, _connections) = msix(10);
        msix.events()[9].write(1).unwrap();
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0, 2, 0, 0, 0, 0, 0, 0]);
        write(&mut msix, 9 * 16 + 12, 0);
        msix.set_control(0x80, true);
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0; 8], "an open vector sends");
    }

    proptest! {
        #[test]
        fn any_access_is_harmless_and_only_open_vectors_are_connected(
            accesses in proptest::collection::vec(
                (0u64..80, proptest::collection::vec(any::<u8>(), 0..9), any::<u8>(), any::<bool>()), 0..64),
        ) {
            let (mut msix, connections) = msix(3);
            for (offset, mut data, control, master) in accesses {
                msix.write_table(offset, &data);
                msix.set_control(control, master);
                for (vector, connection) in msix.vectors.iter().zip(&connections) {
                    let open = control & 0xc0 == 0x80 && master && vector.entry.control == 0;
                    let message = Message { address: vector.entry.address, data: vector.entry.data };
                    prop_assert_eq!(*connection.lock().unwrap(), open.then_some(message));
                }
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data);
            }
        }
    }
}
