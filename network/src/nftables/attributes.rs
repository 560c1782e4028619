//! Netlink attributes: length and kind (16 bits each, native order), then the value, padded to four bytes.

/// Marks an attribute that consists of attributes.
const NESTED: u16 = 0x8000;
const HEADER: usize = 4;
const ALIGNMENT: usize = 4;

/// Attributes, as they are sent.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    /// An attribute of these bytes, of which there are less than 64 KiB.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let start = self.begin(kind);
        self.0.extend_from_slice(value);
        self.end(start);
    }

    /// Text, ended by a zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        let start = self.begin(kind);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.end(start);
    }

    /// A number in network order, as all numbers of nf_tables are.
    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// As [`Self::u32`].
    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// An attribute that consists of those that `fill` puts.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.begin(kind | NESTED);
        fill(self);
        self.end(start);
    }

    fn begin(&mut self, kind: u16) -> usize {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        start
    }

    fn end(&mut self, start: usize) {
        // A longer one is never made: rules and parts of sets have limits. The kernel would refuse the rest.
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// Goes through attributes: kind without flags, value. Stops at what isn't well formed.
pub(super) fn parse(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (u16_at(bytes, 0)?, u16_at(bytes, 2)?);
        let length = usize::from(length);
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    })
}

/// Text of an attribute.
pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_can_be_read_back() {
        let mut attributes = Attributes::default();
        attributes.text(1, "mote");
        attributes.nest(2, |inner| inner.u32(3, 7));
        assert_eq!(attributes.0.len(), 12 + 12);
        let read: Vec<(u16, &[u8])> = parse(&attributes.0).collect();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].0, text(read[0].1)), (1, "mote".to_owned()));
        assert_eq!(parse(read[1].1).collect::<Vec<_>>(), [(3, [0, 0, 0, 7].as_slice())]);
    }

    #[test]
    fn what_is_cut_off_ends_the_reading() {
        let mut attributes = Attributes::default();
        attributes.u32(1, 1);
        for length in 0..8 {
            assert_eq!(parse(&attributes.0[..length]).count(), 0, "{length}");
        }
    }
}
