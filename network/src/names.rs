//! Names and addresses that follow from ids.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use mote_host_api::{NetworkId, PortId};

/// The bridge of a network, in its namespace.
pub const BRIDGE: &str = "br0";
/// The VXLAN link of a network, in its namespace.
pub const VXLAN: &str = "vxlan0";
/// The link of a network to a physical one, in its namespace.
pub const UPLINK: &str = "uplink";
/// The metadata service's address (IPv4 link-local, the one that cloud-init and EC2's clients know).
pub const METADATA_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The metadata service's IPv6 address.
pub const METADATA_IP_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe);
/// Hex digits of an id that a kernel object's name carries: "tap" and these are 14 bytes, IFNAMSIZ allows 15.
pub const KEY_DIGITS: usize = 11;

const KEY_BITS: u32 = 4 * KEY_DIGITS as u32;

/// The first 11 hex digits of a network's id: what its namespace is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkKey(u64);

impl NetworkKey {
    /// The key that `text` (11 lower-case hex digits) writes.
    pub fn parse(text: &str) -> Option<Self> {
        let canonical =
            text.len() == KEY_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        canonical.then(|| u64::from_str_radix(text, 16).ok().map(Self)).flatten()
    }

    /// Name of the namespace under /run/netns.
    pub fn namespace(self, prefix: &str) -> String {
        format!("{prefix}{self}")
    }
}

impl From<NetworkId> for NetworkKey {
    fn from(id: NetworkId) -> Self {
        Self(leading_bits(id.0.as_u128()))
    }
}

impl fmt::Display for NetworkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0width$x}", self.0, width = KEY_DIGITS)
    }
}

/// What the names of ports' taps start with.
pub const TAP_PREFIX: &str = "tap";

/// Name of a port's tap.
pub fn tap_name(port: PortId) -> String {
    format!("{TAP_PREFIX}{:0width$x}", leading_bits(port.0.as_u128()), width = KEY_DIGITS)
}

/// Name of the end of a router's interface in its network's namespace.
pub fn router_port_name(port: PortId) -> String {
    format!("rtr{:0width$x}", leading_bits(port.0.as_u128()), width = KEY_DIGITS)
}

/// Address of a network's bridge: the same on every host and for ever, so that guests' neighbour tables stay right when
/// taps come and go (a bridge without one takes the lowest of its ports').
pub fn bridge_mac(network: NetworkId) -> MacAddress {
    let [a, b, c, d, e, ..] = *network.0.as_bytes();
    // Locally administered, unicast.
    MacAddress([0x02, a, b, c, d, e])
}

pub(crate) fn leading_bits(id: u128) -> u64 {
    (id >> (u128::BITS - KEY_BITS)) as u64
}

/// An Ethernet address, written `fa:16:3e:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// The link-local IPv6 address that follows from it (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
    }

    /// Whether one station can have it: neither a group address nor zero.
    pub fn is_station(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: six pairs of hex digits with colons are needed")]
pub struct ParseMacError;

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = u8::from_str_radix(part.ok_or(ParseMacError)?, 16).map_err(|_| ParseMacError)?;
        }
        if parts.next().is_some() { Err(ParseMacError) } else { Ok(Self(octets)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_first_eleven_digits() {
        let id: NetworkId = "0123abcd-ef45-4789-8abc-def012345678".parse().unwrap();
        let key = NetworkKey::from(id);
        assert_eq!(key.namespace("mote-"), "mote-0123abcdef4");
        assert_eq!(NetworkKey::parse("0123abcdef4"), Some(key));
        assert_eq!(tap_name(PortId(id.0)), "tap0123abcdef4");
        assert_eq!(bridge_mac(id).to_string(), "02:01:23:ab:cd:ef");
    }

    #[test]
    fn keys_of_other_forms_are_refused() {
        for text in ["", "0123ABCDEF4", "0123abcdef", "0123abcdef45", "+123abcdef4", "0123abcdefg"] {
            assert_eq!(NetworkKey::parse(text), None, "{text}");
        }
    }

    #[test]
    fn mac_addresses_are_read_strictly() {
        assert_eq!("fa:16:3e:00:0A:ff".parse(), Ok(MacAddress([0xfa, 0x16, 0x3e, 0, 0x0a, 0xff])));
        for text in [
            "",
            "fa:16:3e:00:00",
            "fa:16:3e:00:00:01:02",
            "fa:16:3e:0:00:01",
            "fa:16:3e:+1:00:01",
            "fa-16-3e-00-00-01",
        ] {
            assert_eq!(text.parse::<MacAddress>(), Err(ParseMacError), "{text}");
        }
        assert!(!MacAddress::BROADCAST.is_station());
    }
}
