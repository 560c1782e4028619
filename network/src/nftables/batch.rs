//! A transaction: messages that take effect together.

use super::{
    LanguageError,
    attributes::{Attributes, parse, text, u16_at, u32_at},
    expression::{ANONYMOUS, Verdict},
    rule::{self, AnonymousSet},
    value::{Kind, Value},
};
use crate::filter::{Family, TABLE};

pub(super) const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
pub(super) const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const DELETE_SET: u16 = 11;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;
const NEW_OBJECT: u16 = 18;
const DELETE_OBJECT: u16 = 20;
/// NFT_OBJECT_COUNTER
pub(super) const COUNTER: u32 = 1;

pub(super) const MESSAGE_HEADER: usize = 16;
/// struct nfgenmsg: family, version, and in network order the subsystem of a batch.
pub(super) const FAMILY_HEADER: usize = 4;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const CREATE: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_CREATE) as u16;
const APPEND: u16 = CREATE | libc::NLM_F_APPEND as u16;
const ACKNOWLEDGE: u16 = libc::NLM_F_ACK as u16;
/// Elements per message: their attribute is shorter than 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 500;

/// NFT_SET_…
const SET_ANONYMOUS: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_INTERVAL: u32 = 4;
const SET_MAP: u32 = 8;
/// NFT_SET_ELEM_INTERVAL_END
const INTERVAL_END: u32 = 1;
/// NFT_DATA_VERDICT
const VERDICT_TYPE: u32 = 0xffff_ff00;

/// Where a base chain is called: type, hook, priority, policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    kind: String,
    number: u32,
    priority: i32,
    accept: bool,
}

impl Hook {
    /// Reads `type filter hook forward priority 0; policy drop;`.
    pub(crate) fn read(text: &str) -> Result<Self, LanguageError> {
        let words: Vec<&str> = text.split([' ', ';']).filter(|word| !word.is_empty()).collect();
        let [
            "type",
            kind @ ("filter" | "nat" | "route"),
            "hook",
            hook,
            "priority",
            priority,
            "policy",
            policy,
        ] = words[..]
        else {
            return Err(LanguageError::new(text, "no type, hook, priority and policy"));
        };
        let hooks = ["prerouting", "input", "forward", "output", "postrouting"];
        let number = hooks.iter().position(|other| *other == hook);
        let number = number.ok_or_else(|| LanguageError::new(text, "an unknown hook"))? as u32;
        let priority = priority.parse().map_err(|_| LanguageError::new(text, "no priority"))?;
        let accept = match policy {
            "accept" => true,
            "drop" => false,
            _ => return Err(LanguageError::new(text, "an unknown policy")),
        };
        Ok(Self { kind: kind.to_owned(), number, priority, accept })
    }
}

/// What the values of a map are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Verdict,
    Value(Kind),
}

/// Type of a set or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetType {
    key: Kind,
    data: Option<Data>,
    interval: bool,
}

impl SetType {
    /// Reads `type ipv4_addr; flags interval;` or `type mark : verdict;`.
    pub(crate) fn read(text: &str) -> Result<Self, LanguageError> {
        let refuse = || LanguageError::new(text, "an unknown type of set");
        let mut parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
        let kind = parts.next().and_then(|part| part.strip_prefix("type ")).ok_or_else(refuse)?;
        let interval = match (parts.next(), parts.next()) {
            (None, None) => false,
            (Some("flags interval"), None) => true,
            _ => return Err(refuse()),
        };
        let (key, data) = kind.split_once(" : ").map_or((kind, None), |(key, data)| (key, Some(data)));
        let data = match data {
            None => None,
            Some("verdict") => Some(Data::Verdict),
            Some(word) => Some(Data::Value(Kind::of_set(word).ok_or_else(refuse)?)),
        };
        Ok(Self { key: Kind::of_set(key).ok_or_else(refuse)?, data, interval })
    }
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    key: Value,
    data: Option<ElementData>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ElementData {
    Verdict(Verdict),
    Value(Vec<u8>),
}

impl Element {
    /// Reads a key, and for maps a value.
    pub(crate) fn read(kind: SetType, key: &str, data: Option<&str>) -> Result<Self, LanguageError> {
        let refuse = |text: &str| LanguageError::new(text, "no element of the set's type");
        let value = kind.key.read(key).ok_or_else(|| refuse(key))?;
        let data = match (kind.data, data) {
            (None, None) => None,
            (Some(Data::Verdict), Some(text)) => {
                let verdict = match text.split_once(' ') {
                    None if text == "drop" => Verdict::Drop,
                    None if text == "accept" => Verdict::Accept,
                    Some(("jump", chain)) => Verdict::Jump(chain.to_owned()),
                    Some(("goto", chain)) => Verdict::Goto(chain.to_owned()),
                    _ => return Err(refuse(text)),
                };
                Some(ElementData::Verdict(verdict))
            }
            (Some(Data::Value(kind)), Some(text)) => {
                Some(ElementData::Value(kind.read(text).ok_or_else(|| refuse(text))?.first))
            }
            _ => return Err(refuse(key)),
        };
        Ok(Self { key: value, data })
    }

    /// NFTA_LIST_ELEM { NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA }
    fn put(&self, list: &mut Attributes, interval: bool) {
        list.nest(1, |element| {
            element.nest(1, |key| key.bytes(1, &self.key.first));
            match &self.data {
                None => {}
                Some(ElementData::Verdict(verdict)) => element.nest(2, |data| verdict.put(data)),
                Some(ElementData::Value(value)) => element.nest(2, |data| data.bytes(1, value)),
            }
        });
        let end = interval.then(|| self.key.end()).flatten();
        if let Some(end) = end {
            list.nest(1, |element| {
                element.u32(3, INTERVAL_END);
                element.nest(1, |key| key.bytes(1, &end));
            });
        }
    }
}

/// A set that something is said about: its table's family and its name.
pub(crate) type Name<'a> = (Family, &'a str);

/// A transaction.
#[derive(Debug)]
pub(crate) struct Batch {
    messages: Vec<u8>,
    count: u32,
    /// Where the last message starts.
    last: usize,
    next_set: u32,
}

impl Batch {
    /// Without anything.
    pub(crate) fn new() -> Self {
        let mut batch = Self { messages: Vec::new(), count: 0, last: 0, next_set: 1 };
        batch.message(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM, |_| {});
        batch
    }

    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Attributes),
    ) {
        self.last = self.messages.len();
        let mut message = Attributes(std::mem::take(&mut self.messages));
        let bytes = &mut message.0;
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(self.count.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        fill(&mut message);
        self.messages = message.0;
        let length = (self.messages.len() - self.last) as u32;
        self.messages[self.last..self.last + 4].copy_from_slice(&length.to_ne_bytes());
        self.count += 1;
    }

    fn change(&mut self, kind: u16, flags: u16, family: Family, fill: impl FnOnce(&mut Attributes)) {
        self.message(SUBSYSTEM << 8 | kind, flags, family.number(), 0, fill);
    }

    /// Adds a table, unless there is one.
    pub(crate) fn add_table(&mut self, family: Family, name: &str) {
        self.change(NEW_TABLE, CREATE, family, |message| message.text(1, name));
    }

    /// Deletes a table with all that is in it.
    pub(crate) fn delete_table(&mut self, family: Family, name: &str) {
        self.change(DELETE_TABLE, REQUEST, family, |message| message.text(1, name));
    }

    /// Adds a chain, with a hook if the kernel shall call it.
    pub(crate) fn add_chain(&mut self, (family, name): Name<'_>, hook: Option<&Hook>) {
        self.change(NEW_CHAIN, CREATE, family, |message| {
            message.text(1, TABLE);
            message.text(3, name);
            if let Some(hook) = hook {
                message.nest(4, |attributes| {
                    attributes.u32(1, hook.number);
                    attributes.bytes(2, &hook.priority.to_be_bytes());
                });
                message.u32(5, hook.accept.into());
                message.text(7, &hook.kind);
            }
        });
    }

    /// Deletes a chain without rules.
    pub(crate) fn delete_chain(&mut self, (family, name): Name<'_>) {
        self.change(DELETE_CHAIN, REQUEST, family, |message| {
            message.text(1, TABLE);
            message.text(3, name);
        });
    }

    /// Deletes all rules of a chain.
    pub(crate) fn flush_chain(&mut self, (family, name): Name<'_>) {
        self.change(DELETE_RULE, REQUEST, family, |message| {
            message.text(1, TABLE);
            message.text(2, name);
        });
    }

    /// Appends a rule to a chain.
    pub(crate) fn add_rule(&mut self, (family, chain): Name<'_>, text: &str) -> Result<(), LanguageError> {
        let rule = rule::compile(text, family, &mut self.next_set)?;
        for set in &rule.sets {
            self.add_anonymous(family, set);
        }
        self.change(NEW_RULE, APPEND, family, |message| {
            message.text(1, TABLE);
            message.text(2, chain);
            message.nest(4, |list| rule.expressions.iter().for_each(|expression| expression.put(list)));
        });
        Ok(())
    }

    fn add_anonymous(&mut self, family: Family, set: &AnonymousSet) {
        let interval = set.values.iter().any(Value::is_range);
        let flags = SET_ANONYMOUS | SET_CONSTANT | if interval { SET_INTERVAL } else { 0 };
        self.change(NEW_SET, CREATE, family, |message| {
            put_set(message, ANONYMOUS, set.id, set.kind, flags);
            if !interval {
                message.nest(9, |description| description.u32(1, set.values.len() as u32));
            }
        });
        let elements: Vec<Element> =
            set.values.iter().map(|value| Element { key: value.clone(), data: None }).collect();
        self.elements(NEW_ELEMENT, (family, ANONYMOUS), Some(set.id), interval, &elements);
    }

    /// Adds an empty set or map.
    pub(crate) fn add_set(&mut self, (family, name): Name<'_>, kind: SetType) {
        let flags =
            if kind.interval { SET_INTERVAL } else { 0 } | if kind.data.is_some() { SET_MAP } else { 0 };
        let id = self.next_set;
        self.next_set += 1;
        self.change(NEW_SET, CREATE, family, |message| {
            put_set(message, name, id, kind.key, flags);
            match kind.data {
                None => {}
                Some(Data::Verdict) => {
                    message.u32(6, VERDICT_TYPE);
                    message.u32(7, 0);
                }
                Some(Data::Value(kind)) => {
                    message.u32(6, kind.number());
                    message.u32(7, kind.length());
                }
            }
        });
    }

    /// Deletes a set or map.
    pub(crate) fn delete_set(&mut self, (family, name): Name<'_>) {
        self.change(DELETE_SET, REQUEST, family, |message| {
            message.text(1, TABLE);
            message.text(2, name);
        });
    }

    /// Adds elements to a set or map.
    pub(crate) fn add_elements(&mut self, name: Name<'_>, kind: SetType, elements: &[Element]) {
        self.elements(NEW_ELEMENT, name, None, kind.interval, elements);
    }

    /// Deletes elements of a set or map.
    pub(crate) fn delete_elements(&mut self, name: Name<'_>, kind: SetType, elements: &[Element]) {
        self.elements(DELETE_ELEMENT, name, None, kind.interval, elements);
    }

    fn elements(
        &mut self,
        message: u16,
        (family, name): Name<'_>,
        id: Option<u32>,
        interval: bool,
        elements: &[Element],
    ) {
        let flags = if message == NEW_ELEMENT { CREATE } else { REQUEST };
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.change(message, flags, family, |message| {
                message.text(1, TABLE);
                message.text(2, name);
                if let Some(id) = id {
                    message.u32(4, id);
                }
                message.nest(3, |list| part.iter().for_each(|element| element.put(list, interval)));
            });
        }
    }

    /// Adds a named counter.
    pub(crate) fn add_counter(&mut self, (family, name): Name<'_>) {
        self.change(NEW_OBJECT, CREATE, family, |message| {
            message.text(1, TABLE);
            message.text(2, name);
            message.u32(3, COUNTER);
            message.nest(4, |_| {});
        });
    }

    /// Deletes a named counter.
    pub(crate) fn delete_counter(&mut self, (family, name): Name<'_>) {
        self.change(DELETE_OBJECT, REQUEST, family, |message| {
            message.text(1, TABLE);
            message.text(2, name);
            message.u32(3, COUNTER);
        });
    }

    /// The whole, with the number of the message that the kernel shall acknowledge (the last but the end). Without an end
    /// the kernel only checks.
    pub(super) fn finish(mut self, end: bool) -> (Vec<u8>, u32) {
        let flags = self.last + 6;
        let with = u16_at(&self.messages, flags).unwrap_or_default() | ACKNOWLEDGE;
        self.messages[flags..flags + 2].copy_from_slice(&with.to_ne_bytes());
        let acknowledged = self.count - 1;
        if end {
            self.message(BATCH_END, REQUEST, 0, SUBSYSTEM, |_| {});
        }
        (self.messages, acknowledged)
    }
}

fn put_set(message: &mut Attributes, name: &str, id: u32, key: Kind, flags: u32) {
    message.text(1, TABLE);
    message.text(2, name);
    message.u32(3, flags);
    message.u32(4, key.number());
    message.u32(5, key.length());
    message.u32(10, id);
    // NFTNL_UDATA_SET_KEYBYTEORDER, for nft(8): 1 host, 2 network.
    let order: u32 = if key.is_host_order() { 1 } else { 2 };
    message.bytes(13, &[&[0, 4], order.to_ne_bytes().as_slice()].concat());
}

/// Says what the message with that number was about.
pub(super) fn describe(messages: &[u8], number: u32) -> String {
    let mut rest = messages;
    while let (Some(length), Some(kind), Some(sequence)) = (u32_at(rest, 0), u16_at(rest, 4), u32_at(rest, 8))
    {
        let Some(message) = rest.get(MESSAGE_HEADER + FAMILY_HEADER..length as usize) else { break };
        if sequence == number {
            let what = match kind & 0xff {
                NEW_TABLE => "add table",
                DELETE_TABLE => "delete table",
                NEW_CHAIN => "add chain",
                DELETE_CHAIN => "delete chain",
                NEW_RULE => "add rule",
                DELETE_RULE => "flush chain",
                NEW_SET => "add set",
                DELETE_SET => "delete set",
                NEW_ELEMENT => "add element",
                DELETE_ELEMENT => "delete element",
                NEW_OBJECT => "add counter",
                DELETE_OBJECT => "delete counter",
                _ => "commit",
            };
            // The names of table, and of what is in it, come first.
            let names: Vec<String> = parse(message).take(2).map(|(_, value)| text(value)).collect();
            return format!("{what} {}", names.join(" "));
        }
        rest = rest.get(length as usize..).unwrap_or_default();
    }
    "commit".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_can_be_described_by_its_number() {
        let mut batch = Batch::new();
        batch.add_table(Family::Inet, TABLE);
        batch.add_chain((Family::Inet, "input"), None);
        batch.add_rule((Family::Inet, "input"), "tcp dport { 1, 2 } accept").unwrap();
        let (messages, last) = batch.finish(true);
        assert_eq!(describe(&messages, 2), "add chain mote input");
        assert_eq!(describe(&messages, last), "add rule mote input");
        assert_eq!(describe(&messages, 99), "commit");
    }

    #[test]
    fn hooks_and_types_of_sets_are_read_strictly() {
        assert!(Hook::read("type filter hook forward priority -200; policy drop;").is_ok());
        for text in
            ["", "type filter hook ingress priority 0; policy drop;", "type filter hook input priority 0;"]
        {
            assert!(Hook::read(text).is_err(), "{text}");
        }
        let kind = SetType::read("type ifname : verdict;").unwrap();
        assert!(Element::read(kind, "\"tap0\"", Some("jump a")).is_ok());
        assert!(Element::read(kind, "\"tap0\"", None).is_err());
        assert!(Element::read(kind, "\"tap0\"", Some("fly a")).is_err());
        for text in ["type ipv4_addr; flags timeout;", "ipv4_addr;", "type ipv5_addr;"] {
            assert!(SetType::read(text).is_err(), "{text}");
        }
    }
}
