//! Security groups and anti-spoofing of a network on this host: a pure function from the description to a [`Ruleset`].
//!
//! ```text
//!  frame of a guest                                                    to another port of the bridge
//!        │                                                                          ▲
//!  bridge prerouting: per port, what it may send as (Ethernet, ARP, IPv4, IPv6, ND) │
//!        │   and which filtered port it comes from → upper half of the mark         │
//!        ├──► br0: only DHCP, DNS, metadata, ping (inet input)                      │
//!  bridge forward: which filtered port it goes to → lower half of the mark          │
//!        │                                                                          │
//!  egress (of the sender) ──► ingress (of the receiver) ──► commit ─────────────────┘
//! ```
//!
//! `egress`, `ingress` and `commit` need conntrack. Where the kernel has it for bridges they are in the bridge family, else
//! in the inet family, to which br_netfilter hands what is bridged; there the bridge's ports have no names any more, which
//! is what the mark is for.
//!
//! A connection that was let through carries the *generation* of the ruleset in its mark (`ct mark`). When the rules have
//! changed, the next packet of each connection is judged anew, in the direction in which the connection was opened: what
//! is still allowed goes on, what isn't is cut, and nobody has to walk through the table of connections.

mod limits;
mod memory;
mod ports;
mod rules;
mod ruleset;

pub(crate) use limits::{checked_dscp, policer};
pub use memory::Memory;
pub use ports::{Conntrack, Surroundings, filter};
pub use ruleset::{Chain, Digest, Family, Fragment, FragmentKey, MARKER, Ruleset, TABLE};
