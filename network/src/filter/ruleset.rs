//! A packet filter as data, and the text of nft(8) that makes it or makes it from another one.
//!
//! Each text is one transaction of the kernel: there is no moment without a filter and none with half of one. Which
//! ruleset is loaded can be read back: the transaction leaves an empty chain whose name is the ruleset's digest. A change
//! removes the old digest's chain first, so that it fails as a whole when something else is loaded than it started from.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use sha2::{Digest as _, Sha256};

/// Name of all tables.
pub const TABLE: &str = "mote";
/// What the name of the chain that carries the digest starts with.
pub const MARKER: &str = "digest-";

/// Family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Frames of bridges.
    Bridge,
    /// IPv4 and IPv6 packets.
    Inet,
}

impl Family {
    const ALL: [Self; 2] = [Self::Bridge, Self::Inet];

    fn word(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Inet => "inet",
        }
    }
}

/// Which ruleset it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// The name of the chain that stands for it.
    pub fn marker(self) -> String {
        format!("{MARKER}{:016x}", self.0)
    }

    /// From the name of a chain, if it is a marker.
    pub fn from_marker(chain: &str) -> Option<Self> {
        let digits = chain.strip_prefix(MARKER).filter(|digits| digits.len() == 16)?;
        u64::from_str_radix(digits, 16).ok().map(Self)
    }
}

type Name = (Family, String);

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// `type … hook … priority …; policy …;`, for a base chain. It stays the same under a name.
    pub hook: Option<&'static str>,
    /// Its rules.
    pub rules: Vec<String>,
}

/// A set, or with values a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// `type …; flags …;`. It stays the same under a name.
    pub kind: &'static str,
    /// Elements, with values for a map.
    pub elements: BTreeMap<String, Option<String>>,
}

/// A whole filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    chains: BTreeMap<Name, Chain>,
    sets: BTreeMap<Name, Set>,
    counters: BTreeSet<Name>,
}

impl Ruleset {
    /// Whether nothing is filtered.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty()
    }

    /// Puts a chain.
    pub fn chain(&mut self, family: Family, name: impl Into<String>, chain: Chain) {
        self.chains.insert((family, name.into()), chain);
    }

    /// Puts a chain without a hook.
    pub fn rules(&mut self, family: Family, name: impl Into<String>, rules: Vec<String>) {
        self.chain(family, name, Chain { hook: None, rules });
    }

    /// Puts a set or map.
    pub fn set(&mut self, family: Family, name: impl Into<String>, kind: &'static str) -> &mut Set {
        self.sets.entry((family, name.into())).or_insert(Set { kind, elements: BTreeMap::new() })
    }

    /// Puts a named counter.
    pub fn counter(&mut self, family: Family, name: impl Into<String>) {
        self.counters.insert((family, name.into()));
    }

    /// Replaces a text in all rules: what follows from the digest of the rest.
    pub fn replace(&mut self, what: &str, with: &str) {
        for rule in self.chains.values_mut().flat_map(|chain| &mut chain.rules) {
            if rule.contains(what) {
                *rule = rule.replace(what, with);
            }
        }
    }

    /// Of all its text.
    pub fn digest(&self) -> Digest {
        let mut text = String::new();
        self.write_delta(&Self::default(), &mut text);
        let hash = Sha256::digest(text.as_bytes());
        Digest(hash.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Replaces whatever there is.
    pub fn script(&self) -> String {
        let mut text = String::new();
        for family in Family::ALL {
            let table = format!("{} {TABLE}", family.word());
            // "add" first: deleting what isn't there would be an error.
            line(&mut text, format_args!("add table {table}\ndelete table {table}"));
        }
        if self.is_empty() {
            return text;
        }
        for family in Family::ALL {
            line(&mut text, format_args!("add table {} {TABLE}", family.word()));
        }
        self.write_delta(&Self::default(), &mut text);
        line(&mut text, format_args!("add chain inet {TABLE} {}", self.digest().marker()));
        text
    }

    /// Makes it from `old`, which is loaded (else it fails and changes nothing).
    pub fn script_from(&self, old: &Self) -> String {
        if self.is_empty() || old.is_empty() {
            return self.script();
        }
        let mut text = String::new();
        line(&mut text, format_args!("delete chain inet {TABLE} {}", old.digest().marker()));
        self.write_delta(old, &mut text);
        line(&mut text, format_args!("add chain inet {TABLE} {}", self.digest().marker()));
        text
    }

    fn write_delta(&self, old: &Self, text: &mut String) {
        // Everything that is referred to first, empty; then what refers; what is no longer referred to last.
        for (family, name) in self.counters.difference(&old.counters) {
            line(text, format_args!("add counter {} {TABLE} {name}", family.word()));
        }
        for ((family, name), chain) in &self.chains {
            if !old.chains.contains_key(&(*family, name.clone())) {
                let hook = chain.hook.map(|hook| format!(" {{ {hook} }}")).unwrap_or_default();
                line(text, format_args!("add chain {} {TABLE} {name}{hook}", family.word()));
            }
        }
        for ((family, name), set) in &self.sets {
            let before = old.sets.get(&(*family, name.clone()));
            write_set(text, *family, name, set, before);
        }
        for ((family, name), chain) in &self.chains {
            let before = old.chains.get(&(*family, name.clone()));
            if before.is_some_and(|before| before.rules == chain.rules) {
                continue;
            }
            let family = family.word();
            if before.is_some() {
                line(text, format_args!("flush chain {family} {TABLE} {name}"));
            }
            for rule in &chain.rules {
                line(text, format_args!("add rule {family} {TABLE} {name} {rule}"));
            }
        }
        let gone = |(name, _): &(&Name, &Chain)| !self.chains.contains_key(*name);
        let gone: Vec<_> = old.chains.iter().filter(gone).collect();
        for ((family, name), _) in &gone {
            line(text, format_args!("flush chain {} {TABLE} {name}", family.word()));
        }
        for ((family, name), _) in &gone {
            line(text, format_args!("delete chain {} {TABLE} {name}", family.word()));
        }
        for (family, name) in old.sets.keys().filter(|name| !self.sets.contains_key(*name)) {
            line(text, format_args!("delete set {} {TABLE} {name}", family.word()));
        }
        for (family, name) in old.counters.difference(&self.counters) {
            line(text, format_args!("delete counter {} {TABLE} {name}", family.word()));
        }
    }
}

/// Elements per command, so that no line grows without bound.
const ELEMENTS_PER_LINE: usize = 500;

fn write_set(text: &mut String, family: Family, name: &str, set: &Set, before: Option<&Set>) {
    let family = family.word();
    let what = if set.kind.contains(" : ") { "map" } else { "set" };
    if before.is_none() {
        line(text, format_args!("add {what} {family} {TABLE} {name} {{ {} }}", set.kind));
    }
    let empty = BTreeMap::new();
    // Parts of an interval set are not deleted one by one: nft would have to know how the kernel has joined them.
    let refill =
        set.kind.contains("interval") && before.is_some_and(|before| before.elements != set.elements);
    if refill {
        line(text, format_args!("flush {what} {family} {TABLE} {name}"));
    }
    let before = before.filter(|_| !refill);
    let before = before.map_or(&empty, |before| &before.elements);
    let element = |(key, value): &(&String, &Option<String>)| match value {
        Some(value) => format!("{key} : {value}"),
        None => (*key).clone(),
    };
    let gone: Vec<_> = before
        .iter()
        .filter(|(key, value)| set.elements.get(*key) != Some(value))
        .map(|e| element(&e))
        .collect();
    let new: Vec<_> = set
        .elements
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|e| element(&e))
        .collect();
    for (verb, elements) in [("delete", gone), ("add", new)] {
        for chunk in elements.chunks(ELEMENTS_PER_LINE) {
            line(text, format_args!("{verb} element {family} {TABLE} {name} {{ {} }}", chunk.join(", ")));
        }
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{arguments}");
}
