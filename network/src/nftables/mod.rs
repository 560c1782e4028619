//! The kernel's packet filter, spoken to directly: rules in nft(8)'s language are compiled to nf_tables' expressions, and a
//! transaction is one netlink message that takes effect as a whole or not at all.
//!
//! ```text
//!  "ip saddr 10.0.0.0/8 accept" ──► rule::compile ──► Expression, Expression, … ──► Batch ──► Socket::commit
//! ```
//!
//! The language is the subset that [`crate::filter`] and [`crate::router`] write; another word is an error, never a rule
//! that means something else. nft(8) itself is needed by tests only, which compare what it makes of the same text.
//!
//! Sources: linux/netfilter/nf_tables.h, nfnetlink.h, nf_tables_compat.h (numbers); libnftables' datatypes (the types of
//! sets' keys, which only nft(8) looks at).

mod attributes;
mod batch;
mod expression;
mod rule;
mod socket;
mod value;

pub(crate) use batch::{Batch, Element, Hook, SetType};
pub(crate) use socket::Socket;

/// A text that isn't of the subset of nft's language that is understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot compile the packet filter's {text:?}: {problem}")]
pub struct LanguageError {
    /// The whole text.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl LanguageError {
    fn new(text: &str, problem: impl Into<String>) -> Self {
        Self { text: text.to_owned(), problem: problem.into() }
    }
}

/// NFPROTO_IPV4.
const IPV4: u8 = 2;
/// NFPROTO_IPV6.
const IPV6: u8 = 10;
