//! DNS messages (RFC 1035, 6891): a question's bytes in, what to do about it out. Pure, and safe with any bytes.

use std::net::IpAddr;

use domain::{
    base::{
        Message, MessageBuilder, Name, ParsedName, Question, Rtype,
        iana::{Class, Opcode, OptRcode, Rcode},
        message_builder::{AdditionalBuilder, AnswerBuilder},
        name::ToLabelIter,
    },
    rdata::{A, Aaaa, Ptr},
};

use super::zone::{Found, Zone};

/// What is sent over UDP at most, in bytes: no fragments on any path (DNS flag day 2020).
pub const DATAGRAM_MAX: usize = 1232;
/// What a client without EDNS takes, in bytes (RFC 1035 §4.2.1).
const DATAGRAM_MIN: usize = 512;
/// Length of an OPT record without options, in bytes.
const OPT_LEN: usize = 11;
/// How long clients may keep an answer, in seconds: servers come and go.
const TTL_S: u32 = 5;

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// Over a connection.
    Tcp,
}

/// What to do with a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Say nothing: what isn't a question gets no answer, else two servers could talk for ever.
    Ignore,
    /// Send this.
    Answer(Vec<u8>),
    /// Ask somebody else.
    Forward(Query),
}

/// A question for another resolver. It is written anew: nothing of the client's bytes goes further but its question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The question as it came.
    client: Vec<u8>,
    /// What to send, with an id of 0.
    bytes: Vec<u8>,
    /// Bytes that the client takes.
    longest: usize,
}

/// What a client said of itself by EDNS.
#[derive(Debug, Clone, Copy)]
struct Edns {
    size: u16,
    dnssec_ok: bool,
}

type Asked<'a> = Question<ParsedName<&'a [u8]>>;

/// Decides on a message. `forwards`: whether there is another resolver to ask.
pub fn respond(zone: &Zone, bytes: &[u8], transport: Transport, forwards: bool) -> Outcome {
    let Ok(message) = Message::from_octets(bytes) else { return Outcome::Ignore };
    let header = message.header();
    if header.qr() {
        return Outcome::Ignore;
    }
    let reply = |rcode| Reply { message: &message, rcode, transport, forwards };
    if header.opcode() != Opcode::QUERY {
        return reply(Rcode::NOTIMP).finish();
    }
    let Ok(question) = message.sole_question() else { return reply(Rcode::FORMERR).finish() };
    if message.opt().is_some_and(|opt| opt.version() != 0) {
        return reply(Rcode::NOERROR).bad_version();
    }
    let transfer = matches!(question.qtype(), Rtype::AXFR | Rtype::IXFR);
    if question.qclass() != Class::IN || transfer {
        return reply(Rcode::REFUSED).finish();
    }
    match text(question.qname()).map(|name| (zone.find(&name), name)) {
        Some((Found::Addresses(addresses), _)) => reply(Rcode::NOERROR).addresses(&question, &addresses),
        Some((Found::Pointers(names), _)) => reply(Rcode::NOERROR).pointers(&question, &names),
        Some((Found::Nothing, _)) => reply(Rcode::NOERROR).authoritative(),
        Some((Found::NoName, _)) => reply(Rcode::NXDOMAIN).authoritative(),
        // A plain name that nobody here has isn't asked for elsewhere.
        Some((Found::Foreign, name)) if is_plain(&name) && is_address(question.qtype()) => {
            reply(Rcode::NXDOMAIN).finish()
        }
        _ if !forwards || !header.rd() || question.qtype() == Rtype::ANY => reply(Rcode::REFUSED).finish(),
        _ => query(&message, &question, transport).map_or_else(|| servfail(bytes), Outcome::Forward),
    }
}

/// The answer to a question that can't be answered now.
pub fn servfail(bytes: &[u8]) -> Outcome {
    let Ok(message) = Message::from_octets(bytes) else { return Outcome::Ignore };
    Reply { message: &message, rcode: Rcode::SERVFAIL, transport: Transport::Udp, forwards: true }.finish()
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.contains('.')
}

fn is_address(kind: Rtype) -> bool {
    matches!(kind, Rtype::A | Rtype::AAAA)
}

/// The name in lower case, without the closing dot; none if it can't be that of a server.
fn text(name: &ParsedName<&[u8]>) -> Option<String> {
    let mut text = String::new();
    for label in name.iter_labels().filter(|label| !label.is_root()) {
        let label = label.as_slice();
        if !label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    Some(text)
}

fn edns(message: &Message<&[u8]>) -> Option<Edns> {
    let opt = message.opt()?;
    Some(Edns { size: opt.udp_payload_size(), dnssec_ok: opt.dnssec_ok() })
}

fn longest(edns: Option<Edns>, transport: Transport) -> usize {
    match (transport, edns) {
        (Transport::Tcp, _) => u16::MAX.into(),
        (Transport::Udp, None) => DATAGRAM_MIN,
        (Transport::Udp, Some(edns)) => usize::from(edns.size).clamp(DATAGRAM_MIN, DATAGRAM_MAX),
    }
}

fn query(message: &Message<&[u8]>, question: &Asked<'_>, transport: Transport) -> Option<Query> {
    let edns = edns(message);
    let longest = longest(edns, transport);
    let mut builder = MessageBuilder::new_vec();
    let header = builder.header_mut();
    header.set_rd(true);
    header.set_cd(message.header().cd());
    header.set_ad(message.header().ad());
    let mut builder = builder.question();
    builder.push(question).ok()?;
    let mut builder = builder.additional();
    if let Some(edns) = edns {
        let written = builder.opt(|opt| {
            opt.set_udp_payload_size(longest.min(DATAGRAM_MAX) as u16);
            opt.set_dnssec_ok(edns.dnssec_ok);
            Ok(())
        });
        written.ok()?;
    }
    Some(Query { client: message.as_slice().to_vec(), bytes: builder.finish(), longest })
}

impl Query {
    /// The bytes to send to another resolver.
    pub fn with_id(&self, id: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        bytes
    }

    /// What the client gets of a resolver's reply; none if it is no reply to this.
    pub fn accept(&self, id: u16, reply: &[u8]) -> Option<Vec<u8>> {
        let message = Message::from_octets(reply).ok()?;
        let own = Message::from_octets(self.bytes.as_slice()).ok()?;
        let header = message.header();
        if !header.qr() || header.id() != id || header.opcode() != Opcode::QUERY {
            return None;
        }
        if message.sole_question().ok()? != own.sole_question().ok()? {
            return None;
        }
        let client = self.client.get(..2)?;
        if reply.len() > self.longest {
            let client = Message::from_octets(self.client.as_slice()).ok()?;
            return truncated(&client, header.rcode());
        }
        Some([client, &reply[2..]].concat())
    }

    /// What the client gets when nobody answers.
    pub fn failed(&self) -> Option<Vec<u8>> {
        match servfail(&self.client) {
            Outcome::Answer(bytes) => Some(bytes),
            _ => None,
        }
    }
}

fn truncated(client: &Message<&[u8]>, rcode: Rcode) -> Option<Vec<u8>> {
    let mut builder = MessageBuilder::new_vec().start_answer(client, rcode).ok()?;
    builder.header_mut().set_tc(true);
    builder.header_mut().set_ra(true);
    Some(builder.finish())
}

/// An answer of this resolver's own.
struct Reply<'a> {
    message: &'a Message<&'a [u8]>,
    rcode: Rcode,
    transport: Transport,
    forwards: bool,
}

impl Reply<'_> {
    fn finish(&self) -> Outcome {
        self.write(false, |_| true)
    }

    fn authoritative(&self) -> Outcome {
        self.write(true, |_| true)
    }

    fn addresses(&self, question: &Asked<'_>, addresses: &[IpAddr]) -> Outcome {
        let (name, kind) = (question.qname(), question.qtype());
        let wanted = |address: &&IpAddr| match kind {
            Rtype::ANY => true,
            Rtype::A => address.is_ipv4(),
            Rtype::AAAA => address.is_ipv6(),
            _ => false,
        };
        self.write(true, |answer| {
            addresses.iter().filter(wanted).all(|address| match address {
                IpAddr::V4(ip) => answer.push((name, TTL_S, A::new(*ip))).is_ok(),
                IpAddr::V6(ip) => answer.push((name, TTL_S, Aaaa::new(*ip))).is_ok(),
            })
        })
    }

    fn pointers(&self, question: &Asked<'_>, names: &[String]) -> Outcome {
        let asked = matches!(question.qtype(), Rtype::PTR | Rtype::ANY);
        self.write(true, |answer| {
            let names = names.iter().filter(|_| asked).filter_map(|name| name.parse::<Name<Vec<u8>>>().ok());
            names.into_iter().all(|name| answer.push((question.qname(), TTL_S, Ptr::new(name))).is_ok())
        })
    }

    /// `fill` says whether everything found its place.
    fn write(&self, authoritative: bool, fill: impl FnOnce(&mut AnswerBuilder<Vec<u8>>) -> bool) -> Outcome {
        let edns = edns(self.message);
        let mut answer = MessageBuilder::new_vec().start_error(self.message, self.rcode);
        answer.header_mut().set_aa(authoritative);
        answer.header_mut().set_ra(self.forwards);
        let limit = longest(edns, self.transport);
        answer.set_push_limit(limit - OPT_LEN);
        let complete = fill(&mut answer);
        answer.clear_push_limit();
        answer.header_mut().set_tc(!complete);
        let mut additional = answer.additional();
        if edns.is_some() && own_opt(&mut additional, None).is_none() {
            return Outcome::Ignore;
        }
        Outcome::Answer(additional.finish())
    }

    /// RFC 6891 §6.1.3.
    fn bad_version(&self) -> Outcome {
        let mut additional = MessageBuilder::new_vec().start_error(self.message, self.rcode).additional();
        match own_opt(&mut additional, Some(OptRcode::BADVERS)) {
            Some(()) => Outcome::Answer(additional.finish()),
            None => Outcome::Ignore,
        }
    }
}

fn own_opt(additional: &mut AdditionalBuilder<Vec<u8>>, rcode: Option<OptRcode>) -> Option<()> {
    let written = additional.opt(|opt| {
        opt.set_udp_payload_size(DATAGRAM_MAX as u16);
        if let Some(rcode) = rcode {
            opt.set_rcode(rcode);
        }
        Ok(())
    });
    written.ok()
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
