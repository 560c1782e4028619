//! Small files of the formats, for the tests of all who take them.

/// A qcow2 disk of version 3 with this many clusters of 64 KiB, of which the first is all `7` and the others are zeros. Its
/// header, L1 table, L2 table and data are one cluster each, in this order.
pub fn qcow2(clusters: u64) -> Vec<u8> {
    let mut file = vec![0_u8; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(clusters << 16).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(1_u64 << 16).to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(1 << 16, &(2_u64 << 16).to_be_bytes());
    put(2 << 16, &(3_u64 << 16).to_be_bytes());
    file[3 << 16..].fill(7);
    file
}
