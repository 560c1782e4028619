//! Where in a bzImage its compressed kernel may begin.

/// The unpacker's program and the magic bytes it starts with.
const FORMATS: [(&str, &[u8]); 3] =
    [("zstd", b"\x28\xb5\x2f\xfd"), ("xz", b"\xfd7zXZ\0"), ("gzip", b"\x1f\x8b\x08")];
/// Places that are tried at most of each format.
const MAX_CANDIDATES: usize = 8;

/// Programs and offsets to try, in order.
pub(crate) fn candidates(image: &[u8]) -> Vec<(&'static str, usize)> {
    FORMATS
        .iter()
        .flat_map(|(program, magic)| {
            let places = image.windows(magic.len()).enumerate().filter(|(_, window)| window == magic);
            places.map(|(at, _)| (*program, at)).take(MAX_CANDIDATES).collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_with_a_known_magic_is_tried_and_no_more_than_the_limit() {
        assert_eq!(candidates(b"abc\x28\xb5\x2f\xfdxx\x1f\x8b\x08"), [("zstd", 3), ("gzip", 9)]);
        assert_eq!(candidates(&b"\x1f\x8b\x08".repeat(100)).len(), MAX_CANDIDATES);
        assert!(candidates(b"").is_empty());
    }
}
