//! A packet filter as data, and the transaction that makes it or makes it from another one.
//!
//! Each transaction of the kernel leaves no moment without a filter and none with half of one. Which ruleset is loaded can
//! be read back: the transaction leaves an empty table whose name is the ruleset's digest. A change removes the old
//! digest's table first, so that it fails as a whole when something else is loaded than it started from.
//!
//! A ruleset consists of fragments, one for each port, group and address set: what hasn't changed is neither written anew
//! nor compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    sync::Arc,
};

use mote_host_api::{AddressSetId, EtherType, PortId, SecurityGroupId};
use sha2::{Digest as _, Sha256};

use crate::nftables::{Batch, Element, Hook, LanguageError, SetType};

/// Name of all tables but one.
pub const TABLE: &str = "mote";
/// What the name of the table that carries the digest starts with.
pub const MARKER: &str = "mote-digest-";
/// Stands in rules for what follows from the digest of all of them.
pub const GENERATION: &str = "GENERATION";

/// Family of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Frames of bridges.
    Bridge,
    /// IPv4 and IPv6 packets.
    Inet,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::Bridge, Self::Inet];

    fn word(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Inet => "inet",
        }
    }

    /// NFPROTO_…
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Bridge => 7,
            Self::Inet => 1,
        }
    }
}

/// Which ruleset it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// The name of the table that stands for it.
    pub fn marker(self) -> String {
        format!("{MARKER}{:016x}", self.0)
    }

    /// From the name of a table, if it is a marker.
    pub fn from_marker(table: &str) -> Option<Self> {
        let digits = table.strip_prefix(MARKER).filter(|digits| digits.len() == 16)?;
        u64::from_str_radix(digits, 16).ok().map(Self)
    }

    fn of(bytes: &[u8]) -> Self {
        let hash = Sha256::digest(bytes);
        Self(hash.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

type Name = (Family, String);

fn borrowed(name: &Name) -> (Family, &str) {
    (name.0, &name.1)
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// `type … hook … priority …; policy …;`, for a base chain. It stays the same under a name.
    pub hook: Option<&'static str>,
    /// Its rules.
    pub rules: Vec<String>,
}

impl Chain {
    fn has_generation(&self) -> bool {
        self.rules.iter().any(|rule| rule.contains(GENERATION))
    }
}

/// A set, or with values a map; or a fragment's part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// `type …; flags …;`. It stays the same under a name.
    pub kind: &'static str,
    /// Elements, with values for a map.
    pub elements: BTreeMap<String, Option<String>>,
}

/// What a fragment of a ruleset is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FragmentKey {
    /// The whole.
    Base,
    /// An address set, by version of IP.
    Set(AddressSetId, EtherType),
    /// A security group.
    Group(SecurityGroupId),
    /// A port.
    Port(PortId),
}

/// A part of a ruleset: chains and counters of its own, and elements of sets, which it may share with others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fragment {
    chains: BTreeMap<Name, Chain>,
    sets: BTreeMap<Name, Set>,
    counters: BTreeSet<Name>,
    digest: Digest,
}

impl Fragment {
    /// Puts a chain.
    pub fn chain(&mut self, family: Family, name: impl Into<String>, chain: Chain) {
        self.chains.insert((family, name.into()), chain);
    }

    /// Puts a chain without a hook.
    pub fn rules(&mut self, family: Family, name: impl Into<String>, rules: Vec<String>) {
        self.chain(family, name, Chain { hook: None, rules });
    }

    /// Puts a set or map, or this fragment's part of it.
    pub fn set(&mut self, family: Family, name: impl Into<String>, kind: &'static str) -> &mut Set {
        self.sets.entry((family, name.into())).or_insert(Set { kind, elements: BTreeMap::new() })
    }

    /// Puts a named counter.
    pub fn counter(&mut self, family: Family, name: impl Into<String>) {
        self.counters.insert((family, name.into()));
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty()
    }

    /// With its digest: it doesn't change any more.
    pub fn finish(mut self) -> Arc<Self> {
        let mut text = String::new();
        write_fragment(&mut text, &self);
        self.digest = Digest::of(text.as_bytes());
        Arc::new(self)
    }
}

/// A whole filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    fragments: BTreeMap<FragmentKey, Arc<Fragment>>,
    digest: Digest,
}

impl FromIterator<(FragmentKey, Arc<Fragment>)> for Ruleset {
    fn from_iter<I: IntoIterator<Item = (FragmentKey, Arc<Fragment>)>>(fragments: I) -> Self {
        let fragments: BTreeMap<FragmentKey, Arc<Fragment>> =
            fragments.into_iter().filter(|(_, fragment)| !fragment.is_empty()).collect();
        let digests: Vec<u8> =
            fragments.values().flat_map(|fragment| fragment.digest.0.to_be_bytes()).collect();
        Self { fragments, digest: Digest::of(&digests) }
    }
}

impl From<Fragment> for Ruleset {
    fn from(fragment: Fragment) -> Self {
        [(FragmentKey::Base, fragment.finish())].into_iter().collect()
    }
}

/// Two states of a fragment; one of them may not be there.
type Change<'a> = (Option<&'a Fragment>, Option<&'a Fragment>);

impl Ruleset {
    /// Whether nothing is filtered.
    pub fn is_empty(&self) -> bool {
        self.fragments.is_empty()
    }

    /// Of all its text.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What connections that it lets through are marked with.
    fn generation(&self) -> String {
        format!("0x{:08x}", self.digest.0 as u32 | 1)
    }

    /// The text for nft(8) that loads it where nothing is loaded: what the transaction of [`Self::replace`] is compared
    /// with.
    pub fn script(&self) -> String {
        let mut text = String::new();
        if self.is_empty() {
            return text;
        }
        for family in Family::ALL {
            line(&mut text, format_args!("add table {} {TABLE}", family.word()));
        }
        let mut parts = [const { String::new() }; 3];
        for fragment in self.fragments.values() {
            write_declarations(&mut parts[0], fragment);
            write_elements(&mut parts[1], fragment);
            write_rules(&mut parts[2], fragment);
        }
        text.extend(parts);
        line(&mut text, format_args!("add table inet {}", self.digest.marker()));
        text.replace(GENERATION, &self.generation())
    }

    /// The transaction that puts it in the place of whatever there is. `tables`: the names of the inet family's.
    pub(crate) fn replace(&self, tables: &[String]) -> Result<Batch, LanguageError> {
        let mut batch = Batch::new();
        for table in tables.iter().filter(|table| Digest::from_marker(table).is_some()) {
            batch.delete_table(Family::Inet, table);
        }
        for family in Family::ALL {
            // Added first: deleting what isn't there would be an error.
            batch.add_table(family, TABLE);
            batch.delete_table(family, TABLE);
        }
        if self.is_empty() {
            return Ok(batch);
        }
        for family in Family::ALL {
            batch.add_table(family, TABLE);
        }
        self.write_delta(&Self::default(), &mut batch)?;
        batch.add_table(Family::Inet, &self.digest.marker());
        Ok(batch)
    }

    /// The transaction that makes it from `old`, which is loaded (else it fails and changes nothing). None if one of them
    /// is empty.
    pub(crate) fn change(&self, old: &Self) -> Result<Option<Batch>, LanguageError> {
        if self.is_empty() || old.is_empty() {
            return Ok(None);
        }
        let mut batch = Batch::new();
        batch.delete_table(Family::Inet, &old.digest.marker());
        self.write_delta(old, &mut batch)?;
        batch.add_table(Family::Inet, &self.digest.marker());
        Ok(Some(batch))
    }

    /// The fragments that differ.
    fn changes<'a>(&'a self, old: &'a Self) -> Vec<Change<'a>> {
        let same_generation = self.digest == old.digest;
        let mut changes = Vec::new();
        for (key, new) in &self.fragments {
            let before = old.fragments.get(key);
            let same = before.is_some_and(|before| before.digest == new.digest);
            // Its rules follow from all fragments.
            if !same || (*key == FragmentKey::Base && !same_generation) {
                changes.push((before.map(AsRef::as_ref), Some(new.as_ref())));
            }
        }
        let gone = old.fragments.iter().filter(|(key, _)| !self.fragments.contains_key(key));
        changes.extend(gone.map(|(_, before)| (Some(before.as_ref()), None)));
        changes
    }

    /// Whether a set is declared by any fragment.
    fn declares(&self, name: &Name) -> bool {
        // Mostly it is the first one's.
        self.fragments.values().any(|fragment| fragment.sets.contains_key(name))
    }

    fn write_delta(&self, old: &Self, batch: &mut Batch) -> Result<(), LanguageError> {
        let changes = self.changes(old);
        // Everything that is referred to first, empty; then what refers; what is no longer referred to last.
        for (before, after) in &changes {
            for name in names(*after, |f| f.counters.iter()) {
                if !has(*before, |f| f.counters.contains(name)) {
                    batch.add_counter(borrowed(name));
                }
            }
            for (name, chain) in names(*after, |f| f.chains.iter()) {
                if !has(*before, |f| f.chains.contains_key(name)) {
                    let hook = chain.hook.map(Hook::read).transpose()?;
                    batch.add_chain(borrowed(name), hook.as_ref());
                }
            }
        }
        let sets = Sets::of(&changes);
        for (name, set) in &sets.0 {
            if set.after.is_some() && !old.declares(name) {
                batch.add_set(borrowed(name), SetType::read(set.kind)?);
            }
        }
        for (name, set) in &sets.0 {
            set.write(borrowed(name), batch)?;
        }
        let generation = self.generation();
        for (before, after) in &changes {
            for (name, chain) in names(*after, |f| f.chains.iter()) {
                let old = before.and_then(|before| before.chains.get(name));
                if old.is_some_and(|old| old.rules == chain.rules && !chain.has_generation()) {
                    continue;
                }
                if old.is_some() {
                    batch.flush_chain(borrowed(name));
                }
                for rule in &chain.rules {
                    batch.add_rule(borrowed(name), &rule.replace(GENERATION, &generation))?;
                }
            }
        }
        self.write_gone(&changes, &sets, batch);
        Ok(())
    }

    fn write_gone(&self, changes: &[Change<'_>], sets: &Sets<'_>, batch: &mut Batch) {
        let gone: Vec<&Name> = changes
            .iter()
            .flat_map(|(before, after)| {
                let chains = names(*before, |f| f.chains.keys());
                chains.filter(|name| !has(*after, |f| f.chains.contains_key(*name)))
            })
            .collect();
        gone.iter().for_each(|name| batch.flush_chain(borrowed(name)));
        gone.iter().for_each(|name| batch.delete_chain(borrowed(name)));
        for (name, set) in &sets.0 {
            if set.before.is_some() && !self.declares(name) {
                batch.delete_set(borrowed(name));
            }
        }
        for (before, after) in changes {
            for name in names(*before, |f| f.counters.iter()) {
                if !has(*after, |f| f.counters.contains(name)) {
                    batch.delete_counter(borrowed(name));
                }
            }
        }
    }
}

fn names<'a, I: Iterator + 'a>(
    fragment: Option<&'a Fragment>,
    of: impl Fn(&'a Fragment) -> I,
) -> impl Iterator<Item = I::Item> {
    fragment.into_iter().flat_map(of)
}

fn has(fragment: Option<&Fragment>, what: impl Fn(&Fragment) -> bool) -> bool {
    fragment.is_some_and(what)
}

type Elements<'a> = BTreeMap<&'a str, Option<&'a str>>;

/// The sets that differ, each with those elements that were and are in fragments that differ.
struct Sets<'a>(BTreeMap<Name, SetChange<'a>>);

struct SetChange<'a> {
    kind: &'static str,
    before: Option<Elements<'a>>,
    after: Option<Elements<'a>>,
}

impl<'a> Sets<'a> {
    fn of(changes: &[Change<'a>]) -> Self {
        let mut sets: BTreeMap<Name, SetChange<'a>> = BTreeMap::new();
        for (before, after) in changes {
            for (is_new, fragment) in [(false, before), (true, after)] {
                for (name, set) in names(*fragment, |f| f.sets.iter()) {
                    let change = sets.entry(name.clone()).or_insert(SetChange {
                        kind: set.kind,
                        before: None,
                        after: None,
                    });
                    let side = if is_new { &mut change.after } else { &mut change.before };
                    let elements = set.elements.iter().map(|(key, value)| (key.as_str(), value.as_deref()));
                    side.get_or_insert_default().extend(elements);
                }
            }
        }
        Self(sets)
    }
}

impl SetChange<'_> {
    fn write(&self, name: (Family, &str), batch: &mut Batch) -> Result<(), LanguageError> {
        let empty = Elements::new();
        let (before, after) = (self.before.as_ref().unwrap_or(&empty), self.after.as_ref().unwrap_or(&empty));
        let kind = SetType::read(self.kind)?;
        let differing = |from: &Elements<'_>, other: &Elements<'_>| -> Result<Vec<Element>, LanguageError> {
            let differing = from.iter().filter(|(key, value)| other.get(*key) != Some(value));
            differing.map(|(key, value)| Element::read(kind, key, *value)).collect()
        };
        let (gone, new) = (differing(before, after)?, differing(after, before)?);
        batch.delete_elements(name, kind, &gone);
        batch.add_elements(name, kind, &new);
        Ok(())
    }
}

fn write_fragment(text: &mut String, fragment: &Fragment) {
    write_declarations(text, fragment);
    write_elements(text, fragment);
    write_rules(text, fragment);
}

fn write_declarations(text: &mut String, fragment: &Fragment) {
    for (family, name) in &fragment.counters {
        line(text, format_args!("add counter {} {TABLE} {name}", family.word()));
    }
    for ((family, name), chain) in &fragment.chains {
        let hook = chain.hook.map(|hook| format!(" {{ {hook} }}")).unwrap_or_default();
        line(text, format_args!("add chain {} {TABLE} {name}{hook}", family.word()));
    }
    for ((family, name), set) in &fragment.sets {
        let what = if set.kind.contains(" : ") { "map" } else { "set" };
        line(text, format_args!("add {what} {} {TABLE} {name} {{ {} }}", family.word(), set.kind));
    }
}

fn write_elements(text: &mut String, fragment: &Fragment) {
    for ((family, name), set) in &fragment.sets {
        let element = |(key, value): (&String, &Option<String>)| match value {
            Some(value) => format!("{key} : {value}"),
            None => key.clone(),
        };
        let elements: Vec<String> = set.elements.iter().map(element).collect();
        if !elements.is_empty() {
            let family = family.word();
            line(text, format_args!("add element {family} {TABLE} {name} {{ {} }}", elements.join(", ")));
        }
    }
}

fn write_rules(text: &mut String, fragment: &Fragment) {
    for ((family, name), chain) in &fragment.chains {
        for rule in &chain.rules {
            line(text, format_args!("add rule {} {TABLE} {name} {rule}", family.word()));
        }
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{arguments}");
}
