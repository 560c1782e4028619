//! Compiles a rule in nft's language.
//!
//! Two things that nft(8) does by itself are done here, too: what a key implies is checked first ("udp dport" only in a
//! packet that is UDP), unless the rule has said it already; and parts of the packet that lie side by side are compared at
//! once.

use super::{
    IPV4, IPV6, LanguageError,
    expression::{
        Base, Checksum, Comparison, Ct, Expression, Found, Load, Meta, OTHER, Payload, REGISTER, SECOND_WORD,
        SetName, Verdict,
    },
    value::{Kind, Value, mask},
};
use crate::filter::Family;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ETHER_TYPE: Payload = Payload { base: Base::Link, offset: 12, length: 2 };
/// Where IPv4 has the checksum of its header.
const IPV4_CHECKSUM: Checksum = Checksum { offset: 10 };
/// Bytes that a register holds, and that one instruction compares quickly.
const REGISTER_BYTES: u32 = 16;
const FAST_BYTES: u32 = 4;

/// A set that a rule has for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AnonymousSet {
    pub(super) id: u32,
    pub(super) kind: Kind,
    pub(super) values: Vec<Value>,
}

/// A rule as the kernel gets it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) sets: Vec<AnonymousSet>,
    pub(super) expressions: Vec<Expression>,
}

/// Versions of IP and ARP, by their numbers in frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    V4,
    V6,
    Arp,
}

impl Network {
    fn ether_type(self) -> [u8; 2] {
        let number: u16 = match self {
            Self::V4 => 0x0800,
            Self::V6 => 0x86dd,
            Self::Arp => 0x0806,
        };
        number.to_be_bytes()
    }
}

/// Compiles a rule for a table of this family. `next_id` numbers the sets of a transaction.
pub(super) fn compile(text: &str, family: Family, next_id: &mut u32) -> Result<Rule, LanguageError> {
    let refuse = |problem: String| LanguageError::new(text, problem);
    let mut compiler = Compiler {
        family,
        tokens: tokens(text).map_err(refuse)?.into_iter(),
        rule: Rule::default(),
        network: None,
        transport: None,
        next_id,
    };
    while let Some(token) = compiler.tokens.next() {
        compiler.statement(token).map_err(refuse)?;
    }
    let mut rule = compiler.rule;
    rule.expressions = merged(rule.expressions);
    Ok(rule)
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    List(Vec<&'a str>),
}

fn tokens(text: &str) -> Result<Vec<Token<'_>>, String> {
    let mut tokens = Vec::new();
    let mut words = text.split_ascii_whitespace();
    while let Some(word) = words.next() {
        if word != "{" {
            tokens.push(Token::Word(word));
            continue;
        }
        let mut list = Vec::new();
        loop {
            match words.next() {
                Some("}") => break,
                Some(item) => list.push(item.trim_end_matches(',')),
                None => return Err("a list without end".to_owned()),
            }
        }
        tokens.push(Token::List(list));
    }
    Ok(tokens)
}

/// What is looked at.
#[derive(Debug, Clone, Copy)]
struct Key {
    load: Load,
    kind: Kind,
}

impl Key {
    fn payload(base: Base, offset: u32, kind: Kind) -> Self {
        Self { load: Load::Payload(Payload { base, offset, length: kind.length() }), kind }
    }

    fn meta(meta: Meta, kind: Kind) -> Self {
        Self { load: Load::Meta(meta), kind }
    }
}

struct Compiler<'a, 'id> {
    family: Family,
    tokens: std::vec::IntoIter<Token<'a>>,
    rule: Rule,
    /// What the rule has made sure of so far.
    network: Option<Network>,
    transport: Option<u8>,
    next_id: &'id mut u32,
}

type Outcome<T = ()> = Result<T, String>;

impl<'a> Compiler<'a, '_> {
    fn push(&mut self, expression: Expression) {
        self.rule.expressions.push(expression);
    }

    fn load(&mut self, what: Load) {
        self.push(Expression::Load { what, register: REGISTER });
    }

    fn word(&mut self) -> Outcome<&'a str> {
        match self.tokens.next() {
            Some(Token::Word(word)) => Ok(word),
            Some(Token::List(_)) => Err("a list where a word is needed".to_owned()),
            None => Err("it ends too early".to_owned()),
        }
    }

    fn expect(&mut self, words: &[&str]) -> Outcome {
        for expected in words {
            let word = self.word()?;
            if word != *expected {
                return Err(format!("{word:?} where {expected:?} is needed"));
            }
        }
        Ok(())
    }

    fn peek(&self) -> Option<&'a str> {
        match self.tokens.as_slice().first() {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    /// Takes the next word if it is this one.
    fn takes(&mut self, word: &str) -> bool {
        let takes = self.peek() == Some(word);
        if takes {
            self.tokens.next();
        }
        takes
    }

    fn statement(&mut self, token: Token<'a>) -> Outcome {
        let Token::Word(word) = token else { return Err("a list without a key".to_owned()) };
        match word {
            "accept" => self.push(Expression::Verdict(Verdict::Accept)),
            "drop" => self.push(Expression::Verdict(Verdict::Drop)),
            "jump" => {
                let chain = self.word()?.to_owned();
                self.push(Expression::Verdict(Verdict::Jump(chain)));
            }
            "goto" => {
                let chain = self.word()?.to_owned();
                self.push(Expression::Verdict(Verdict::Goto(chain)));
            }
            "counter" if self.takes("name") => {
                let name = self.word()?.to_owned();
                self.push(Expression::NamedCounter(name));
            }
            "counter" => self.push(Expression::Counter),
            "limit" => self.limit()?,
            "dnat" | "snat" => self.nat(word == "dnat")?,
            "meta" if self.peek() == Some("mark") && self.second() == Some("set") => self.set_mark(None)?,
            "ct" if self.peek() == Some("mark") && self.second() == Some("set") => {
                self.set_mark(Some(Ct::Mark))?;
            }
            "ip" | "ip6" if self.peek() == Some("dscp") => self.set_dscp(word == "ip6")?,
            _ => {
                let key = self.key(word)?;
                self.relation(key)?;
            }
        }
        Ok(())
    }

    fn second(&self) -> Option<&'a str> {
        match self.tokens.as_slice().get(1) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    /// `limit rate over N bytes/second burst N bytes`
    fn limit(&mut self) -> Outcome {
        self.expect(&["rate", "over"])?;
        let rate = number(self.word()?)?;
        self.expect(&["bytes/second", "burst"])?;
        let burst = number(self.word()?)?;
        self.expect(&["bytes"])?;
        let burst = u32::try_from(burst).map_err(|_| "a burst of 4 GiB or more".to_owned())?;
        self.push(Expression::OverLimit { rate, burst });
        Ok(())
    }

    /// `dnat ip to ADDRESS`, `… ADDRESS:PORT`, `… ip daddr map @MAP`
    fn nat(&mut self, destination: bool) -> Outcome {
        self.expect(&["ip", "to"])?;
        let word = self.word()?;
        if word == "ip" {
            let key = self.key(word)?;
            self.load(key.load);
            self.expect(&["map"])?;
            let set = self.set()?;
            self.push(Expression::Lookup { set, found: Found::Value });
            self.push(Expression::Nat { destination, port: false });
            return Ok(());
        }
        let (address, port) = word.split_once(':').map_or((word, None), |(a, p)| (a, Some(p)));
        let address = read(Kind::V4, address)?.first;
        self.push(Expression::Immediate { register: REGISTER, value: address });
        if let Some(port) = port {
            self.push(Expression::Immediate { register: OTHER, value: read(Kind::Port, port)?.first });
        }
        self.push(Expression::Nat { destination, port: port.is_some() });
        Ok(())
    }

    /// `mark set 0x…`, `mark set meta mark and 0x… or 0x…`
    fn set_mark(&mut self, ct: Option<Ct>) -> Outcome {
        self.expect(&["mark", "set"])?;
        let word = self.word()?;
        if word == "meta" {
            self.expect(&["mark", "and"])?;
            let mask = read(Kind::Mark, self.word()?)?.first;
            self.expect(&["or"])?;
            let or = read(Kind::Mark, self.word()?)?.first;
            self.load(Load::Meta(Meta::Mark));
            // Bits that are set in any case are first cleared.
            let mask = mask.iter().zip(&or).map(|(mask, or)| mask & !or).collect();
            self.push(Expression::Bitwise { mask, xor: or });
        } else {
            self.push(Expression::Immediate { register: REGISTER, value: read(Kind::Mark, word)?.first });
        }
        self.push(ct.map_or(Expression::SetMeta(Meta::Mark), Expression::SetCt));
        Ok(())
    }

    /// `dscp set N`: six bits in the first two bytes of either version's header.
    fn set_dscp(&mut self, v6: bool) -> Outcome {
        const DSCP_MAX: u64 = 63;
        self.expect(&["dscp", "set"])?;
        let dscp = number(self.word()?)?;
        if dscp > DSCP_MAX {
            return Err(format!("{dscp} is no DSCP"));
        }
        self.needs_network(if v6 { Network::V6 } else { Network::V4 });
        let shift = if v6 { 6 } else { 2 };
        let mask = !((DSCP_MAX as u16) << shift);
        let place = Payload { base: Base::Network, offset: 0, length: 2 };
        self.load(Load::Payload(place));
        let xor = ((dscp as u16) << shift).to_be_bytes().to_vec();
        self.push(Expression::Bitwise { mask: mask.to_be_bytes().to_vec(), xor });
        self.push(Expression::WritePayload(place, (!v6).then_some(IPV4_CHECKSUM)));
        Ok(())
    }

    /// A key, after what it implies has been checked.
    fn key(&mut self, word: &str) -> Outcome<Key> {
        Ok(match word {
            "iifname" => Key::meta(Meta::InputName, Kind::Interface),
            "oifname" => Key::meta(Meta::OutputName, Kind::Interface),
            "meta" => match self.word()? {
                "mark" => Key::meta(Meta::Mark, Kind::Mark),
                "l4proto" => Key::meta(Meta::L4Proto, Kind::Protocol),
                "nfproto" => Key::meta(Meta::NfProto, Kind::NfProto),
                other => return Err(unknown("meta", other)),
            },
            "ct" => self.ct_key()?,
            "ether" => match self.word()? {
                "daddr" => Key::payload(Base::Link, 0, Kind::Mac),
                "saddr" => Key::payload(Base::Link, 6, Kind::Mac),
                "type" => Key::payload(Base::Link, ETHER_TYPE.offset, Kind::EtherType),
                other => return Err(unknown(word, other)),
            },
            "arp" => {
                self.needs_network(Network::Arp);
                self.expect(&["saddr"])?;
                match self.word()? {
                    "ether" => Key::payload(Base::Network, 8, Kind::Mac),
                    "ip" => Key::payload(Base::Network, 14, Kind::V4),
                    other => return Err(unknown("arp saddr", other)),
                }
            }
            "ip" => {
                self.needs_network(Network::V4);
                if self.takes("frag-off") {
                    return Ok(Key::payload(Base::Network, 6, Kind::Bits));
                }
                Key::payload(Base::Network, if self.is_source(word)? { 12 } else { 16 }, Kind::V4)
            }
            "ip6" => {
                self.needs_network(Network::V6);
                Key::payload(Base::Network, if self.is_source(word)? { 8 } else { 24 }, Kind::V6)
            }
            "tcp" | "udp" | "sctp" => {
                self.needs_transport(match word {
                    "tcp" => 6,
                    "udp" => 17,
                    _ => 132,
                });
                match self.word()? {
                    "sport" => Key::payload(Base::Transport, 0, Kind::Port),
                    "dport" => Key::payload(Base::Transport, 2, Kind::Port),
                    other => return Err(unknown(word, other)),
                }
            }
            "icmp" | "icmpv6" => self.icmp_key(word)?,
            "frag" => {
                self.expect(&["frag-off"])?;
                self.needs_network_of_frame(Network::V6);
                Key { load: Load::FragmentOffset, kind: Kind::FragmentOffset }
            }
            "@th,64,128" => Key::payload(Base::Transport, 8, Kind::Raw),
            other => return Err(format!("{other:?} is unknown")),
        })
    }

    fn is_source(&mut self, word: &str) -> Outcome<bool> {
        match self.word()? {
            "saddr" => Ok(true),
            "daddr" => Ok(false),
            other => Err(unknown(word, other)),
        }
    }

    fn icmp_key(&mut self, word: &str) -> Outcome<Key> {
        let v6 = word == "icmpv6";
        let network = if v6 { Network::V6 } else { Network::V4 };
        self.needs_network_of_frame(network);
        self.needs_transport(if v6 { ICMPV6 } else { ICMP });
        match self.word()? {
            "type" => {
                Ok(Key::payload(Base::Transport, 0, if v6 { Kind::IcmpV6Type } else { Kind::IcmpType }))
            }
            "code" => Ok(Key::payload(Base::Transport, 1, Kind::IcmpCode)),
            other => Err(unknown(word, other)),
        }
    }

    fn ct_key(&mut self) -> Outcome<Key> {
        let key = |ct, direction, kind| Ok(Key { load: Load::Ct(ct, direction), kind });
        let direction = match self.word()? {
            "state" => return key(Ct::State, None, Kind::CtState),
            "status" => return key(Ct::Status, None, Kind::CtStatus),
            "mark" => return key(Ct::Mark, None, Kind::Mark),
            "direction" => return key(Ct::Direction, None, Kind::CtDirection),
            "original" => Some(0),
            "reply" => Some(1),
            other => return Err(unknown("ct", other)),
        };
        match self.word()? {
            "proto-dst" => key(Ct::ProtoDestination, direction, Kind::Port),
            "ip" => {
                let ct = if self.is_source("ct ip")? { Ct::Source } else { Ct::Destination };
                key(ct, direction, Kind::V4)
            }
            "ip6" => {
                let ct = if self.is_source("ct ip6")? { Ct::SourceV6 } else { Ct::DestinationV6 };
                key(ct, direction, Kind::V6)
            }
            other => Err(unknown("ct", other)),
        }
    }

    fn equals(&mut self, value: impl Into<Vec<u8>>) {
        self.push(Expression::Compare { how: Comparison::Equal, with: value.into() });
    }

    fn needs_network(&mut self, network: Network) {
        if self.network == Some(network) {
            return;
        }
        match (self.family, network) {
            (Family::Inet, Network::V4 | Network::V6) => {
                self.load(Load::Meta(Meta::NfProto));
                self.equals([if network == Network::V4 { IPV4 } else { IPV6 }]);
            }
            (Family::Bridge, _) | (Family::Inet, Network::Arp) => {
                self.load(Load::Meta(Meta::Protocol));
                self.equals(network.ether_type());
            }
        }
        self.network = Some(network);
    }

    /// In a bridge by the frame, as nft does it for what isn't a part of IP's first header.
    fn needs_network_of_frame(&mut self, network: Network) {
        match self.family {
            Family::Bridge if self.network != Some(network) => {
                self.load(Load::Payload(ETHER_TYPE));
                self.equals(network.ether_type());
                self.network = Some(network);
            }
            _ => self.needs_network(network),
        }
    }

    fn needs_transport(&mut self, protocol: u8) {
        if self.transport != Some(protocol) {
            self.load(Load::Meta(Meta::L4Proto));
            self.equals([protocol]);
            self.transport = Some(protocol);
        }
    }

    /// `@NAME`
    fn set(&mut self) -> Outcome<SetName> {
        let word = self.word()?;
        let name = word.strip_prefix('@').ok_or_else(|| format!("{word:?} where a set is needed"))?;
        Ok(SetName::Named(name.to_owned()))
    }

    /// What a key is compared with.
    fn relation(&mut self, key: Key) -> Outcome {
        let start = self.rule.expressions.len();
        self.load(key.load);
        if self.takes(".") {
            let word = self.word()?;
            let other = self.key(word)?;
            if (key.kind, other.kind) != (Kind::V4, Kind::V4) {
                return Err("only pairs of IPv4 addresses are possible".to_owned());
            }
            self.push(Expression::Load { what: other.load, register: SECOND_WORD });
        }
        if key.kind == Kind::FragmentOffset {
            self.push(Expression::Bitwise { mask: vec![0xff, 0xf8], xor: vec![0; 2] });
        }
        if self.takes("and") {
            let mask = read(key.kind, self.word()?)?.first;
            self.push(Expression::Bitwise { xor: vec![0; mask.len()], mask });
        }
        if self.takes("vmap") {
            let set = self.set()?;
            self.push(Expression::Lookup { set, found: Found::Verdict });
            return Ok(());
        }
        let negated = self.takes("!=");
        if !negated {
            self.takes("==");
        }
        let found = if negated { Found::Fail } else { Found::GoOn };
        if self.peek().is_some_and(|word| word.starts_with('@')) {
            let set = self.set()?;
            self.push(Expression::Lookup { set, found });
            return Ok(());
        }
        match self.tokens.next() {
            Some(Token::Word(word)) => self.compare(start, key, &read(key.kind, word)?, negated),
            // One value needs no set.
            Some(Token::List(items)) if items.len() == 1 => {
                self.compare(start, key, &read(key.kind, items[0])?, negated)
            }
            Some(Token::List(items)) => {
                let values: Outcome<Vec<Value>> = items.iter().map(|item| read(key.kind, item)).collect();
                let id = *self.next_id;
                *self.next_id += 1;
                self.rule.sets.push(AnonymousSet { id, kind: key.kind, values: joined(values?) });
                self.push(Expression::Lookup { set: SetName::Anonymous(id), found });
                Ok(())
            }
            None => Err("it ends too early".to_owned()),
        }
    }

    /// With one value, prefix or range. The key's load is the expression at `start`.
    fn compare(&mut self, start: usize, key: Key, value: &Value, negated: bool) -> Outcome {
        let how = if negated { Comparison::NotEqual } else { Comparison::Equal };
        let with = |bytes: &[u8]| Expression::Compare { how, with: bytes.to_vec() };
        match (key.kind, value.prefix) {
            (Kind::CtState | Kind::CtStatus, _) => {
                if negated {
                    return Err("flags can't be negated".to_owned());
                }
                self.push(Expression::Bitwise { mask: value.first.clone(), xor: vec![0; 4] });
                self.push(Expression::Compare { how: Comparison::NotEqual, with: vec![0; 4] });
            }
            (_, Some(0)) if negated => return Err("nothing is outside of all".to_owned()),
            // Everything is in it.
            (_, Some(0)) => self.rule.expressions.truncate(start),
            (_, Some(length)) if length % 8 == 0 => {
                let bytes = usize::from(length / 8);
                if let Some(Expression::Load { what: Load::Payload(payload), .. }) =
                    self.rule.expressions.get_mut(start)
                {
                    payload.length = bytes as u32;
                }
                self.push(with(&value.first[..bytes]));
            }
            (_, Some(length)) => {
                let size = value.first.len();
                self.push(Expression::Bitwise { mask: mask(length, size), xor: vec![0; size] });
                self.push(with(&value.first));
            }
            (_, None) if value.is_range() => {
                if negated {
                    return Err("a range can't be negated".to_owned());
                }
                self.push(Expression::Compare { how: Comparison::AtLeast, with: value.first.clone() });
                self.push(Expression::Compare { how: Comparison::AtMost, with: value.last.clone() });
            }
            (_, None) => {
                self.push(with(&value.first));
                if !negated {
                    self.learn(key, &value.first);
                }
            }
        }
        Ok(())
    }

    /// What is sure after a comparison that succeeded.
    fn learn(&mut self, key: Key, value: &[u8]) {
        let networks = [Network::V4, Network::V6, Network::Arp];
        match key.kind {
            Kind::EtherType => self.network = networks.into_iter().find(|n| n.ether_type() == value),
            Kind::NfProto => {
                self.network = Some(if value == [IPV4] { Network::V4 } else { Network::V6 });
            }
            Kind::Protocol => self.transport = value.first().copied(),
            _ => {}
        }
    }
}

/// Ranges that follow each other become one, as nft does it. Single values stay.
fn joined(mut values: Vec<Value>) -> Vec<Value> {
    if !values.iter().any(Value::is_range) {
        return values;
    }
    values.sort_by(|a, b| a.first.cmp(&b.first));
    let mut all: Vec<Value> = Vec::with_capacity(values.len());
    for value in values {
        match all.last_mut() {
            Some(last) if last.end().is_none_or(|end| value.first <= end) => {
                last.last = value.last.max(std::mem::take(&mut last.last));
                last.prefix = None;
            }
            _ => all.push(value),
        }
    }
    all
}

fn unknown(key: &str, word: &str) -> String {
    format!("{word:?} is unknown after {key:?}")
}

fn number(word: &str) -> Outcome<u64> {
    word.parse().map_err(|_| format!("{word:?} is no number"))
}

fn read(kind: Kind, text: &str) -> Outcome<Value> {
    kind.read(text).ok_or_else(|| format!("{text:?} is no value of the kind {kind:?}"))
}

/// Compares neighbouring parts of the packet at once where that saves an instruction.
fn merged(expressions: Vec<Expression>) -> Vec<Expression> {
    let mut all: Vec<Expression> = Vec::with_capacity(expressions.len());
    for expression in expressions {
        all.push(expression);
        let Some(tail) = all.last_chunk::<4>() else { continue };
        if let Some(pair) = merged_pair(tail) {
            all.truncate(all.len() - 4);
            all.extend(pair);
        }
    }
    all
}

fn merged_pair(tail: &[Expression; 4]) -> Option<[Expression; 2]> {
    use Expression::{Compare, Load as Get};
    let [
        Get { what: Load::Payload(one), .. },
        Compare { how: Comparison::Equal, with: a },
        Get { what: Load::Payload(other), .. },
        Compare { how: Comparison::Equal, with: b },
    ] = tail
    else {
        return None;
    };
    let length = one.length + other.length;
    // Short ones are compared by an instruction of their own, which is quicker than a long comparison.
    let is_fast = |length: u32| length <= FAST_BYTES && length.is_power_of_two();
    if one.base != other.base
        || length > REGISTER_BYTES
        || (length > FAST_BYTES && is_fast(one.length) && is_fast(other.length))
    {
        return None;
    }
    let (first, with) = if one.offset + one.length == other.offset {
        (one, [a.as_slice(), b].concat())
    } else if other.offset + other.length == one.offset {
        (other, [b.as_slice(), a].concat())
    } else {
        return None;
    };
    let what = Load::Payload(Payload { length, ..*first });
    Some([Get { what, register: REGISTER }, Compare { how: Comparison::Equal, with }])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(text: &str, family: Family) -> Vec<Expression> {
        compile(text, family, &mut 1).unwrap().expressions
    }

    #[test]
    fn what_a_key_implies_is_checked_once() {
        let loads = |text, family| {
            let is_meta = |e: &&Expression| matches!(e, Expression::Load { what: Load::Meta(_), .. });
            compiled(text, family).iter().filter(is_meta).count()
        };
        assert_eq!(loads("udp sport 67 udp dport 68 drop", Family::Inet), 1);
        assert_eq!(loads("meta l4proto udp udp dport 68 drop", Family::Inet), 1);
        assert_eq!(loads("ip saddr 10.0.0.1 ip daddr 10.0.0.2 drop", Family::Bridge), 1);
        assert_eq!(loads("meta nfproto ipv4 icmp type 8 accept", Family::Inet), 2);
    }

    #[test]
    fn neighbours_are_compared_at_once() {
        let text = "ether type arp ether saddr fa:16:3e:00:00:0a accept";
        let expected = Payload { base: Base::Link, offset: 6, length: 8 };
        let all = compiled(text, Family::Bridge);
        assert_eq!(all[0], Expression::Load { what: Load::Payload(expected), register: REGISTER });
        assert_eq!(all.len(), 3, "{all:?}");
        // Two words that each take one quick instruction stay apart.
        assert_eq!(compiled("ip saddr 10.0.0.1 ip daddr 10.0.0.2 drop", Family::Inet).len(), 2 + 4 + 1);
    }

    #[test]
    fn ranges_of_a_list_that_follow_each_other_become_one() {
        let rule = compile("ip saddr { 10.2.0.0/15, 10.1.0.0/16, 10.9.0.1 } accept", Family::Inet, &mut 1);
        let ranges: Vec<_> =
            rule.unwrap().sets[0].values.iter().map(|v| (v.first.clone(), v.last.clone())).collect();
        let (first, last) = (vec![10, 1, 0, 0], vec![10, 3, 255, 255]);
        assert_eq!(ranges, [(first, last), (vec![10, 9, 0, 1], vec![10, 9, 0, 1])]);
    }

    #[test]
    fn another_language_is_refused() {
        for text in [
            "ip saddr",
            "ip saddr 10.0.0.0/33 accept",
            "tcp dport { 1, 2",
            "ct state != new accept",
            "udp dport != 1-2 drop",
            "vlan id 5 drop",
            "frag more-fragments 1 drop",
            "frag frag-off 8192 drop",
            "ip dscp set 64",
            "{ 1 } accept",
            "meta mark 5 accept",
            "limit rate over 1 bytes/second burst 99999999999 bytes drop",
        ] {
            assert!(compile(text, Family::Inet, &mut 1).is_err(), "{text}");
        }
    }
}
