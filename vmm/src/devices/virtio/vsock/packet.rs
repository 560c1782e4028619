//! The header of a vsock packet, `struct virtio_vsock_hdr` (virtio 1.2 §5.10.6), little-endian.

/// Length of the header.
pub const HEADER_BYTES: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type here.
pub const TYPE_STREAM: u16 = 1;

/// Operations (virtio 1.2 §5.10.6).
pub mod op {
    /// Open a connection.
    pub const REQUEST: u16 = 1;
    /// It is open.
    pub const RESPONSE: u16 = 2;
    /// There is no such connection (any more).
    pub const RST: u16 = 3;
    /// No more data in one direction or both.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// `buf_alloc` and `fwd_cnt` are told.
    pub const CREDIT_UPDATE: u16 = 6;
    /// They are wanted.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `SHUTDOWN`: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN`: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// `SHUTDOWN`: neither.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of `SHUTDOWN`.
    pub flags: u32,
    /// Bytes that the sender of this packet has room for in all.
    pub buf_alloc: u32,
    /// Bytes that the sender's user has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads one.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u64_at = |at: usize| (0..8).rev().fold(0, |value, n| value << 8 | u64::from(bytes[at + n]));
        let u32_at = |at: usize| (0..4).rev().fold(0, |value, n| value << 8 | u32::from(bytes[at + n]));
        let u16_at = |at: usize| u16::from(bytes[at]) | u16::from(bytes[at + 1]) << 8;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_become_the_header_they_were_made_from(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let bytes: [u8; HEADER_BYTES] = [&bytes[..], &tail[..]].concat().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header =
            Header { src_cid: 3, dst_port: 0x0403_0201, op: op::RW, fwd_cnt: 9, ..Header::default() };
        let bytes = header.to_bytes();
        assert_eq!((bytes[0], &bytes[20..24], bytes[30], bytes[40]), (3, &[1, 2, 3, 4][..], 5, 9));
    }
}
