//! An Ethernet frame with a UDP datagram of IPv4 (RFC 791, 768), complete with checksums: guests' clients read DHCP from
//! raw sockets and don't know of checksums that a device would still fill in.

use std::net::Ipv4Addr;

use crate::names::MacAddress;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const IP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const TTL: u8 = 64;
const DONT_FRAGMENT: [u8; 2] = [0x40, 0x00];

/// One end of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Ethernet address.
    pub mac: MacAddress,
    /// IPv4 address.
    pub ip: Ipv4Addr,
    /// UDP port.
    pub port: u16,
}

/// The frame, or `None` when the payload doesn't fit into a datagram.
pub fn udp_frame(from: Endpoint, to: Endpoint, payload: &[u8]) -> Option<Vec<u8>> {
    let udp_len = u16::try_from(UDP_HEADER_LEN + payload.len()).ok()?;
    let ip_len = udp_len.checked_add(IP_HEADER_LEN as u16)?;

    let mut ip = Vec::with_capacity(IP_HEADER_LEN);
    ip.extend([0x45, 0]);
    ip.extend(ip_len.to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(DONT_FRAGMENT);
    ip.extend([TTL, PROTOCOL_UDP, 0, 0]);
    ip.extend(from.ip.octets());
    ip.extend(to.ip.octets());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());

    let mut udp = Vec::with_capacity(usize::from(udp_len));
    udp.extend(from.port.to_be_bytes());
    udp.extend(to.port.to_be_bytes());
    udp.extend(udp_len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend_from_slice(payload);
    let [len_high, len_low] = udp_len.to_be_bytes();
    let pseudo = [0, PROTOCOL_UDP, len_high, len_low];
    let sum = match checksum(&[&from.ip.octets(), &to.ip.octets(), &pseudo, &udp]) {
        // Zero means "none".
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());

    let ethernet: [&[u8]; 3] = [&to.mac.0, &from.mac.0, &ETHERTYPE_IPV4];
    Some([&ethernet.concat(), &ip, &udp].into_iter().flatten().copied().collect())
}

/// RFC 1071 over the concatenation of the parts; all but the last have even lengths.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u64 =
        words.map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0))).sum();
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded >> 16) + (folded & 0xffff);
    }
    !(folded as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(last: u8, port: u16) -> Endpoint {
        Endpoint { mac: MacAddress([2, 0, 0, 0, 0, last]), ip: Ipv4Addr::new(10, 0, 0, last), port }
    }

    #[test]
    fn checksums_verify_and_lengths_are_right() {
        for payload in [&b"even"[..], b"odd", b"", &[0xff; 1400]] {
            let frame = udp_frame(endpoint(1, 67), endpoint(2, 68), payload).unwrap();
            assert_eq!(frame.len(), 14 + 28 + payload.len());
            assert_eq!(&frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
            let (ip, udp) = frame[14..].split_at(20);
            assert_eq!(checksum(&[ip]), 0);
            let length = (udp.len() as u16).to_be_bytes();
            assert_eq!(checksum(&[&ip[12..20], &[0, 17], &length, udp]), 0);
            assert_eq!(&udp[..4], [0, 67, 0, 68]);
        }
    }

    #[test]
    fn a_header_of_the_literature_has_its_checksum() {
        // The example of RFC 1071 §3.
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    }

    #[test]
    fn payload_beyond_a_datagram_is_refused() {
        assert!(udp_frame(endpoint(1, 67), endpoint(2, 68), &vec![0; 65508]).is_none());
        assert!(udp_frame(endpoint(1, 67), endpoint(2, 68), &vec![0; 65507]).is_some());
    }
}
