//! Values: what keys of rules and sets are compared with.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use crate::names::MacAddress;

/// What kind of value a key has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Interface,
    EtherType,
    Mac,
    V4,
    V6,
    Port,
    Protocol,
    IcmpType,
    IcmpV6Type,
    IcmpCode,
    Mark,
    CtState,
    CtStatus,
    CtDirection,
    NfProto,
    /// 16 bits of a packet.
    Bits,
    /// Where a fragment begins, in an IPv6 header of its own: 13 bits, then 3 of something else.
    FragmentOffset,
    /// 128 bits of a packet.
    Raw,
    /// Two IPv4 addresses, the key of a set.
    Pair,
}

/// Values from the first to the last, of which there may be but one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) first: Vec<u8>,
    pub(super) last: Vec<u8>,
    /// Leading bits that are equal in all, where the value is a prefix.
    pub(super) prefix: Option<u8>,
}

impl Value {
    fn one(bytes: impl Into<Vec<u8>>) -> Self {
        let first: Vec<u8> = bytes.into();
        Self { last: first.clone(), first, prefix: None }
    }

    /// Whether it is more than one value, or written as if it could be.
    pub(super) fn is_range(&self) -> bool {
        self.prefix.is_some() || self.first != self.last
    }

    /// The first value after it; none if there is none.
    pub(super) fn end(&self) -> Option<Vec<u8>> {
        let mut end = self.last.clone();
        for byte in end.iter_mut().rev() {
            let (next, overflow) = byte.overflowing_add(1);
            *byte = next;
            if !overflow {
                return Some(end);
            }
        }
        None
    }
}

impl Kind {
    /// Of the type that a set's declaration names.
    pub(super) fn of_set(word: &str) -> Option<Self> {
        Some(match word {
            "ether_type" => Self::EtherType,
            "icmpv6_type" => Self::IcmpV6Type,
            "ifname" => Self::Interface,
            "mark" => Self::Mark,
            "ipv4_addr" => Self::V4,
            "ipv6_addr" => Self::V6,
            "ipv4_addr . ipv4_addr" => Self::Pair,
            _ => return None,
        })
    }

    /// Bytes of a value.
    pub(super) fn length(self) -> u32 {
        match self {
            Self::Protocol
            | Self::IcmpType
            | Self::IcmpV6Type
            | Self::IcmpCode
            | Self::CtDirection
            | Self::NfProto => 1,
            Self::EtherType | Self::Port | Self::Bits | Self::FragmentOffset => 2,
            Self::V4 | Self::Mark | Self::CtState | Self::CtStatus => 4,
            Self::Mac => 6,
            Self::Pair => 8,
            Self::Interface | Self::V6 | Self::Raw => 16,
        }
    }

    /// libnftables' number of the type, by which nft(8) knows how to show a set.
    pub(super) fn number(self) -> u32 {
        const BITS: u32 = 6;
        match self {
            Self::NfProto => 2,
            Self::Raw | Self::Bits | Self::FragmentOffset => 4,
            Self::V4 => 7,
            Self::V6 => 8,
            Self::Mac => 9,
            Self::EtherType => 10,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::IcmpType => 14,
            Self::Mark => 19,
            Self::CtState => 26,
            Self::CtDirection => 27,
            Self::CtStatus => 28,
            Self::IcmpV6Type => 29,
            Self::IcmpCode => 32,
            Self::Interface => 41,
            Self::Pair => 7 << BITS | 7,
        }
    }

    /// Whether numbers are in the host's order.
    pub(super) fn is_host_order(self) -> bool {
        matches!(self, Self::Interface | Self::Mark | Self::CtState | Self::CtStatus)
    }

    /// Reads a value; none if it isn't one of this kind.
    pub(super) fn read(self, text: &str) -> Option<Value> {
        match self {
            Self::Interface => interface(text),
            Self::EtherType => {
                let number: u16 = match text {
                    "arp" => 0x0806,
                    "ip" => 0x0800,
                    "ip6" => 0x86dd,
                    _ => return None,
                };
                Some(Value::one(number.to_be_bytes()))
            }
            Self::Mac => Some(Value::one(MacAddress::from_str(text).ok()?.0)),
            Self::V4 => prefix(text, |address| Some(address.parse::<Ipv4Addr>().ok()?.octets().to_vec())),
            Self::V6 => prefix(text, |address| Some(address.parse::<Ipv6Addr>().ok()?.octets().to_vec())),
            Self::Port => range(text, |number| Some(number.parse::<u16>().ok()?.to_be_bytes().to_vec())),
            Self::Protocol => match text {
                "tcp" => Some(Value::one([6])),
                "udp" => Some(Value::one([17])),
                number => Some(Value::one([number.parse::<u8>().ok()?])),
            },
            Self::IcmpType | Self::IcmpV6Type | Self::IcmpCode => {
                range(text, |number| Some(vec![number.parse::<u8>().ok()?]))
            }
            Self::Mark => Some(Value::one(hexadecimal(text)?.to_ne_bytes())),
            Self::CtState => Some(Value::one(flags(text, ct_state)?.to_ne_bytes())),
            Self::CtStatus => Some(Value::one(flags(text, ct_status)?.to_ne_bytes())),
            Self::CtDirection => Some(Value::one([match text {
                "original" => 0,
                "reply" => 1,
                _ => return None,
            }])),
            Self::NfProto => Some(Value::one([match text {
                "ipv4" => super::IPV4,
                "ipv6" => super::IPV6,
                _ => return None,
            }])),
            Self::Bits => {
                let number = match text.strip_prefix("0x") {
                    Some(digits) => u16::from_str_radix(digits, 16),
                    None => text.parse::<u16>(),
                };
                Some(Value::one(number.ok()?.to_be_bytes()))
            }
            Self::FragmentOffset => {
                let eights = text.parse::<u16>().ok().filter(|eights| *eights < 1 << 13)?;
                Some(Value::one((eights << 3).to_be_bytes()))
            }
            Self::Raw => {
                let digits = text.strip_prefix("0x")?;
                Some(Value::one(u128::from_str_radix(digits, 16).ok()?.to_be_bytes()))
            }
            Self::Pair => {
                let (one, other) = text.split_once(" . ")?;
                let mut both = one.parse::<Ipv4Addr>().ok()?.octets().to_vec();
                both.extend(other.parse::<Ipv4Addr>().ok()?.octets());
                Some(Value::one(both))
            }
        }
    }
}

/// `0x…`, 32 bits.
fn hexadecimal(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn interface(text: &str) -> Option<Value> {
    let name = text.strip_prefix('"')?.strip_suffix('"')?;
    if name.len() >= libc::IFNAMSIZ {
        return None;
    }
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(libc::IFNAMSIZ, 0);
    Some(Value::one(bytes))
}

fn range(text: &str, one: impl Fn(&str) -> Option<Vec<u8>>) -> Option<Value> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (one(first)?, one(last)?);
    (first <= last).then_some(Value { first, last, prefix: None })
}

fn prefix(text: &str, address: impl Fn(&str) -> Option<Vec<u8>>) -> Option<Value> {
    let Some((text, length)) = text.split_once('/') else { return Some(Value::one(address(text)?)) };
    let (mut first, length): (Vec<u8>, u8) = (address(text)?, length.parse().ok()?);
    if usize::from(length) > 8 * first.len() {
        return None;
    }
    let mask = mask(length, first.len());
    first.iter_mut().zip(&mask).for_each(|(byte, mask)| *byte &= mask);
    let last = first.iter().zip(&mask).map(|(byte, mask)| byte | !mask).collect();
    Some(Value { first, last, prefix: Some(length) })
}

/// Bytes of which the first `length` bits are ones.
pub(super) fn mask(length: u8, bytes: usize) -> Vec<u8> {
    let ones = |at: usize| usize::from(length).saturating_sub(8 * at).min(8) as u32;
    (0..bytes).map(|at| !0xffu8.checked_shr(ones(at)).unwrap_or(0)).collect()
}

/// Words with commas in between, as the bits that they stand for.
fn flags(text: &str, bit: fn(&str) -> Option<u32>) -> Option<u32> {
    text.split(',').map(bit).try_fold(0, |all, one| Some(all | one?))
}

/// NF_CT_STATE_BIT, NF_CT_STATE_INVALID_BIT, NF_CT_STATE_UNTRACKED_BIT.
fn ct_state(word: &str) -> Option<u32> {
    Some(match word {
        "invalid" => 1,
        "established" => 2,
        "related" => 4,
        "new" => 8,
        "untracked" => 64,
        _ => return None,
    })
}

/// IPS_SRC_NAT, IPS_DST_NAT.
fn ct_status(word: &str) -> Option<u32> {
    Some(match word {
        "snat" => 16,
        "dnat" => 32,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_a_first_a_last_and_an_end() {
        let value = Kind::V4.read("10.1.2.3/23").unwrap();
        assert_eq!(
            (value.first.as_slice(), value.last.as_slice()),
            (&[10, 1, 2, 0][..], &[10, 1, 3, 255][..])
        );
        assert_eq!(value.end(), Some(vec![10, 1, 4, 0]));
        assert_eq!(Kind::V4.read("0.0.0.0/0").unwrap().end(), None);
        assert_eq!(mask(0, 2), [0, 0]);
        assert_eq!(mask(9, 2), [0xff, 0x80]);
        assert_eq!(mask(16, 2), [0xff, 0xff]);
    }

    #[test]
    fn values_of_another_kind_are_none() {
        for (kind, text) in [
            (Kind::V4, "fd00::1"),
            (Kind::V4, "10.0.0.0/33"),
            (Kind::Port, "2-1"),
            (Kind::Port, "70000"),
            (Kind::Bits, "0x10000"),
            (Kind::FragmentOffset, "8192"),
            (Kind::Interface, "\"a-name-that-is-too-long\""),
            (Kind::Mark, "1"),
            (Kind::CtState, "new,old"),
            (Kind::EtherType, "vlan"),
        ] {
            assert_eq!(kind.read(text), None, "{kind:?} {text}");
        }
    }
}
