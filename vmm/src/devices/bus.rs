//! Address → device: one [`Bus`] for memory-mapped I/O and one for ports.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device reached by reads and writes of vCPUs. `offset` counts from the start of the device's range; an access never
/// reaches past the end of the range. Any width at any offset must be harmless.
pub trait BusDevice: Send {
    /// Fills `data`; what the device doesn't know how to answer must still be defined (zeros).
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`; what makes no sense is ignored.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus holds it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range can't be put on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or wraps around the end of the address space.
    #[error("bus range {base:#x} + {len:#x} is empty or too long")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device is there.
    #[error("bus range {base:#x} + {len:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the device in the way.
        other: u64,
    },
}

struct Range {
    base: u64,
    /// Last address of the range: inclusive, so that a range may end at the top of the address space.
    last: u64,
    device: SharedDevice,
}

/// Devices by address range. Ranges come and go while vCPUs use the bus (the registers of PCI functions move), and no
/// lock of the bus is held while a device is used: a device may change the bus it is on.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, disjoint.
    ranges: RwLock<Vec<Range>>,
}

impl Bus {
    /// An empty bus.
    pub const fn new() -> Self {
        Self { ranges: RwLock::new(Vec::new()) }
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// The range is empty, wraps around, or overlaps another one.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(BusError::BadRange { base, len })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|range| range.last < base);
        if let Some(next) = ranges.get(at)
            && next.base <= last
        {
            return Err(BusError::Overlap { base, len, other: next.base });
        }
        ranges.insert(at, Range { base, last, device });
        Ok(())
    }

    /// Takes the range that starts at `base` off the bus and returns its device.
    pub fn remove(&self, base: u64) -> Option<SharedDevice> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.binary_search_by_key(&base, |range| range.base).ok()?;
        Some(ranges.remove(at).device)
    }

    /// The device whose range holds the whole of `address..address + len`, and the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(SharedDevice, u64)> {
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let range = ranges.get(ranges.partition_point(|range| range.last < address))?;
        (range.base <= address && last <= range.last).then(|| (range.device.clone(), address - range.base))
    }

    /// Reads `data.len()` bytes; false, with `data` untouched, if no device answers.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((device, offset)) = self.find(address, data.len()) else { return false };
        // A device that panicked is still a memory-safe device: its lock may be taken again.
        device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        true
    }

    /// Writes `data`; false if no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(address, data.len()) else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers reads with its own number and remembers the last write.
    #[derive(Default)]
    struct Probe {
        number: u8,
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.number.wrapping_add(offset as u8));
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }
    }

    fn probe(number: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { number, written: None }))
    }

    #[test]
    fn access_reaches_the_device_of_the_range_with_its_offset() {
        let bus = Bus::new();
        let (a, b) = (probe(1), probe(100));
        bus.insert(0x1000, 0x100, b.clone()).unwrap();
        bus.insert(0x10, 0x10, a.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [3, 3]);
        assert!(bus.write(0x10ff, &[7]));
        assert_eq!(b.lock().unwrap().written, Some((0xff, vec![7])));
        assert_eq!(a.lock().unwrap().written, None);
    }

    #[test]
    fn access_outside_or_across_the_end_of_a_range_reaches_nobody() {
        let bus = Bus::new();
        bus.insert(0x10, 0x10, probe(1)).unwrap();
        let mut data = [9; 4];
        for address in [0, 0xc, 0xf, 0x1d, 0x20, u64::MAX, u64::MAX - 1] {
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert!(!bus.write(address, &data));
        }
        assert!(!bus.read(0x10, &mut []));
        assert_eq!(data, [9; 4]);
    }

    #[test]
    fn a_removed_range_is_free_again() {
        let bus = Bus::new();
        bus.insert(0x10, 0x10, probe(1)).unwrap();
        assert!(bus.remove(0x11).is_none());
        assert!(bus.remove(0x10).is_some());
        assert!(!bus.write(0x10, &[0]));
        bus.insert(0x18, 0x10, probe(2)).unwrap();
    }

    #[test]
    fn empty_wrapping_and_overlapping_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x10, 0x10, probe(0)).unwrap();
        assert_eq!(bus.insert(0, 0, probe(0)), Err(BusError::BadRange { base: 0, len: 0 }));
        assert!(matches!(bus.insert(u64::MAX, 2, probe(0)), Err(BusError::BadRange { .. })));
        for (base, len) in [(0x10, 0x10), (0, 0x11), (0x1f, 1), (0x8, 0x100), (0x14, 2)] {
            let refused = BusError::Overlap { base, len, other: 0x10 };
            assert_eq!(bus.insert(base, len, probe(0)), Err(refused));
        }
        bus.insert(u64::MAX, 1, probe(0)).unwrap();
        bus.insert(0, 0x10, probe(0)).unwrap();
        bus.insert(0x20, 1, probe(0)).unwrap();
    }

    proptest! {
        /// Whatever is inserted, a lookup agrees with a linear search over the accepted ranges.
        #[test]
        fn lookup_agrees_with_linear_search(
            ranges in proptest::collection::vec((0u64..512, 0u64..64), 0..24),
            accesses in proptest::collection::vec((0u64..600, 1usize..9), 0..64),
        ) {
            let bus = Bus::new();
            let mut accepted: Vec<(u64, u64, u8)> = Vec::new();
            for (number, (base, len)) in ranges.into_iter().enumerate() {
                let free = len > 0 && accepted.iter().all(|(b, l, _)| base + len <= *b || b + l <= base);
                let inserted = bus.insert(base, len, probe(number as u8)).is_ok();
                prop_assert_eq!(inserted, free);
                if free {
                    accepted.push((base, len, number as u8));
                }
            }
            for (address, len) in accesses {
                let want = accepted.iter().find(|(b, l, _)| *b <= address && address + len as u64 <= b + l);
                let mut data = vec![0; len];
                prop_assert_eq!(bus.read(address, &mut data), want.is_some());
                if let Some((base, _, number)) = want {
                    prop_assert_eq!(data[0], number.wrapping_add((address - base) as u8));
                }
            }
        }
    }
}
