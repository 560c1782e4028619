//! The kernel command line.

/// A kernel command line: words separated by blanks, `key` or `key=value`.
#[derive(Debug, Clone, Copy)]
pub struct CommandLine<'a>(pub &'a str);

/// One `virtio_mmio.device=SIZE@ADDRESS:IRQ[:ID]` (Linux, drivers/virtio/virtio_mmio.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Bytes of the register window.
    pub size: u64,
    /// Physical address of the register window.
    pub address: u64,
    /// Number of its interrupt.
    pub irq: u32,
}

impl<'a> CommandLine<'a> {
    /// Whether the word `key` or `key=…` is there.
    pub fn has(&self, key: &str) -> bool {
        self.0.split_ascii_whitespace().any(|word| word == key) || self.value(key).is_some()
    }

    /// The value of the first `key=value`.
    pub fn value(&self, key: &str) -> Option<&'a str> {
        self.values(key).next()
    }

    /// The value of the first `key=value` as a number.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(number)
    }

    /// The virtio-mmio devices that are named, in order. What can't be understood is left out.
    pub fn mmio_devices(&self) -> impl Iterator<Item = MmioDevice> + use<'a> {
        self.values("virtio_mmio.device").filter_map(mmio_device)
    }

    fn values<'k>(&self, key: &'k str) -> impl Iterator<Item = &'a str> + use<'a, 'k> {
        self.0.split_ascii_whitespace().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

fn mmio_device(text: &str) -> Option<MmioDevice> {
    let (size, rest) = text.split_once('@')?;
    let mut parts = rest.split(':');
    let address = number(parts.next()?)?;
    let irq = u32::try_from(number(parts.next()?)?).ok()?;
    Some(MmioDevice { size: number(size)?, address, irq })
}

/// Decimal or `0x…`, with an optional K, M or G.
fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    value.ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn devices_are_found_in_order() {
        let line = CommandLine(
            "mote.test virtio_mmio.device=4K@0xd0000000:5 x virtio_mmio.device=0x1000@3489665024:6:1",
        );
        let found: Vec<_> = line.mmio_devices().collect();
        assert_eq!(found[0], MmioDevice { size: 4096, address: 0xd000_0000, irq: 5 });
        assert_eq!(found[1], MmioDevice { size: 4096, address: 0xd000_1000, irq: 6 });
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn broken_devices_are_left_out() {
        for text in ["4K@0xd0000000", "@1:2", "4K@z:5", "4K@1:-1", "99999999999G@1:2", ""] {
            assert_eq!(mmio_device(text), None, "{text}");
        }
    }

    #[test]
    fn a_word_is_no_prefix_of_another() {
        let line = CommandLine("mote.testing mote.hello=1");
        assert!(!line.has("mote.test"));
        assert!(line.has("mote.hello"));
        assert_eq!(line.number("mote.hello"), Some(1));
        assert_eq!(line.value("mote"), None);
    }
}
