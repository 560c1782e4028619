//! nf_tables' expressions: what a rule is made of in the kernel. Each reads or writes registers; a comparison that fails ends
//! the rule.

use super::attributes::Attributes;

/// A register of 16 bytes (NFT_REG_1).
pub(super) const REGISTER: u32 = 1;
/// The second word of it (NFT_REG32_01): of a key of two addresses.
pub(super) const SECOND_WORD: u32 = 9;
/// Another register (NFT_REG_2).
pub(super) const OTHER: u32 = 2;
/// The verdict's register.
const VERDICT_REGISTER: u32 = 0;

/// Where a payload is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// Part of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Payload {
    pub(super) base: Base,
    pub(super) offset: u32,
    pub(super) length: u32,
}

/// What is known of a packet beside its bytes (NFT_META_…).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meta {
    Protocol = 1,
    Mark = 3,
    InputName = 6,
    OutputName = 7,
    NfProto = 15,
    L4Proto = 16,
}

/// What is known of its connection (NFT_CT_…).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ct {
    State = 0,
    Direction = 1,
    Status = 2,
    Mark = 3,
    ProtoDestination = 12,
    Source = 19,
    Destination = 20,
    SourceV6 = 21,
    DestinationV6 = 22,
}

/// What a register is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    Payload(Payload),
    Meta(Meta),
    /// With the direction of the tuple: 0 original, 1 reply.
    Ct(Ct, Option<u8>),
    /// Two bytes of an IPv6 packet's fragment header, wherever it is; nothing matches without one.
    FragmentOffset,
}

/// How values are compared (NFT_CMP_…).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal = 0,
    NotEqual = 1,
    AtMost = 3,
    AtLeast = 5,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
}

impl Verdict {
    pub(super) fn put(&self, attributes: &mut Attributes) {
        let (code, chain) = match self {
            Self::Drop => (0, None),
            Self::Accept => (1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
        };
        // NFTA_DATA_VERDICT { NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN }
        attributes.nest(2, |verdict| {
            verdict.bytes(1, &i32::to_be_bytes(code));
            if let Some(chain) = chain {
                verdict.text(2, chain);
            }
        });
    }
}

/// A set that a lookup names: by its name, or one of this transaction without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SetName {
    Named(String),
    Anonymous(u32),
}

/// What nf_tables calls sets without a name.
pub(super) const ANONYMOUS: &str = "__set%d";

/// What a lookup does with what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    GoOn,
    Fail,
    Verdict,
    Value,
}

/// Checksum of the header that a part of a packet is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checksum {
    pub(super) offset: u32,
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expression {
    Load {
        what: Load,
        register: u32,
    },
    Compare {
        how: Comparison,
        with: Vec<u8>,
    },
    /// register = register & mask ^ xor
    Bitwise {
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Lookup {
        set: SetName,
        found: Found,
    },
    Immediate {
        register: u32,
        value: Vec<u8>,
    },
    Verdict(Verdict),
    SetMeta(Meta),
    SetCt(Ct),
    WritePayload(Payload, Option<Checksum>),
    Counter,
    NamedCounter(String),
    /// Matches what is over the limit, in bytes per second.
    OverLimit {
        rate: u64,
        burst: u32,
    },
    /// Translates the address in the register, and the port in the other one.
    Nat {
        destination: bool,
        port: bool,
    },
}

impl Expression {
    fn name(&self) -> &'static str {
        match self {
            Self::Load { what: Load::Payload(_), .. } | Self::WritePayload(..) => "payload",
            Self::Load { what: Load::Meta(_), .. } | Self::SetMeta(_) => "meta",
            Self::Load { what: Load::Ct(..), .. } | Self::SetCt(_) => "ct",
            Self::Load { what: Load::FragmentOffset, .. } => "exthdr",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } => "lookup",
            Self::Immediate { .. } | Self::Verdict(_) => "immediate",
            Self::Counter => "counter",
            Self::NamedCounter(_) => "objref",
            Self::OverLimit { .. } => "limit",
            Self::Nat { .. } => "nat",
        }
    }

    /// NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA }
    pub(super) fn put(&self, attributes: &mut Attributes) {
        attributes.nest(1, |expression| {
            expression.text(1, self.name());
            expression.nest(2, |data| self.put_data(data));
        });
    }

    /// The numbers are those of NFTA_PAYLOAD_…, NFTA_META_…, NFTA_CT_…, NFTA_CMP_… and so on.
    fn put_data(&self, data: &mut Attributes) {
        match self {
            Self::Load { what: Load::Payload(payload), register } => {
                data.u32(1, *register);
                put_place(data, *payload);
            }
            Self::Load { what: Load::Meta(key), register } => {
                data.u32(2, *key as u32);
                data.u32(1, *register);
            }
            Self::Load { what: Load::Ct(key, direction), register } => {
                data.u32(2, *key as u32);
                data.u32(1, *register);
                if let Some(direction) = direction {
                    data.bytes(3, &[*direction]);
                }
            }
            Self::Load { what: Load::FragmentOffset, register } => {
                data.u32(1, *register);
                // IPPROTO_FRAGMENT, and where its offset is (RFC 8200 §4.5).
                data.bytes(2, &[44]);
                data.u32(3, 2);
                data.u32(4, 2);
            }
            Self::Compare { how, with } => {
                data.u32(1, REGISTER);
                data.u32(2, *how as u32);
                put_value(data, 3, with);
            }
            Self::Bitwise { mask, xor } => {
                data.u32(1, REGISTER);
                data.u32(2, REGISTER);
                data.u32(3, mask.len() as u32);
                put_value(data, 4, mask);
                put_value(data, 5, xor);
            }
            Self::Lookup { set, found } => put_lookup(data, set, *found),
            Self::Immediate { register, value } => {
                data.u32(1, *register);
                put_value(data, 2, value);
            }
            Self::Verdict(verdict) => {
                data.u32(1, VERDICT_REGISTER);
                data.nest(2, |value| verdict.put(value));
            }
            Self::SetMeta(key) => {
                data.u32(2, *key as u32);
                data.u32(3, REGISTER);
            }
            Self::SetCt(key) => {
                data.u32(2, *key as u32);
                data.u32(4, REGISTER);
            }
            Self::WritePayload(payload, checksum) => {
                data.u32(5, REGISTER);
                put_place(data, *payload);
                // NFT_PAYLOAD_CSUM_INET
                data.u32(6, u32::from(checksum.is_some()));
                data.u32(7, checksum.map_or(0, |checksum| checksum.offset));
            }
            Self::Counter => {}
            Self::NamedCounter(name) => {
                data.u32(1, super::batch::COUNTER);
                data.text(2, name);
            }
            Self::OverLimit { rate, burst } => {
                data.u64(1, *rate);
                data.u64(2, 1);
                data.u32(3, *burst);
                // NFT_LIMIT_PKT_BYTES, NFT_LIMIT_F_INV
                data.u32(4, 1);
                data.u32(5, 1);
            }
            Self::Nat { destination, port } => {
                data.u32(1, u32::from(*destination));
                data.u32(2, super::IPV4.into());
                data.u32(3, REGISTER);
                if *port {
                    data.u32(5, OTHER);
                    // NF_NAT_RANGE_PROTO_SPECIFIED
                    data.u32(7, 2);
                }
            }
        }
    }
}

fn put_place(data: &mut Attributes, payload: Payload) {
    data.u32(2, payload.base as u32);
    data.u32(3, payload.offset);
    data.u32(4, payload.length);
}

/// NFTA_DATA_VALUE in an attribute of that kind.
fn put_value(data: &mut Attributes, kind: u16, value: &[u8]) {
    data.nest(kind, |inner| inner.bytes(1, value));
}

fn put_lookup(data: &mut Attributes, set: &SetName, found: Found) {
    data.u32(2, REGISTER);
    match set {
        SetName::Named(name) => data.text(1, name),
        SetName::Anonymous(id) => {
            data.text(1, ANONYMOUS);
            data.u32(4, *id);
        }
    }
    match found {
        Found::GoOn => {}
        // NFT_LOOKUP_F_INV
        Found::Fail => data.u32(5, 1),
        Found::Verdict => data.u32(3, VERDICT_REGISTER),
        Found::Value => data.u32(3, REGISTER),
    }
}
