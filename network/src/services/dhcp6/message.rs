//! DHCPv6 (RFC 8415, 3646): a message's bytes in, a reply out. Pure, and safe with any bytes.
//!
//! As with DHCPv4 the server keeps no state. A client is known by its link-local address, which follows from its port's
//! Ethernet address. Options are taken apart here, since the codec's decoder panics on some lengths; replies are written
//! by the codec.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use dhcproto::{
    Encodable, Name,
    v6::{DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, IATA, Message, MessageType, Status, StatusCode},
};

use crate::names::MacAddress;

/// Valid and preferred lifetime in seconds (Neutron's default: a day).
pub const LIFETIME_S: u32 = 86_400;
/// T1: half of it.
pub const RENEWAL_S: u32 = LIFETIME_S / 2;
/// T2: four fifths of it.
pub const REBINDING_S: u32 = LIFETIME_S / 5 * 4;

/// Type and transaction id.
const HEADER_LEN: usize = 4;
/// Identity associations of one message that are looked at.
const ASSOCIATIONS_MAX: usize = 8;
/// Addresses in one association that are looked at.
const ADDRESSES_MAX: usize = 64;
/// Longest DUID (RFC 8415 §11.1).
const DUID_MAX: usize = 130;

// Option codes (RFC 8415 §21).
const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_TA: u16 = 4;
const IA_ADDR: u16 = 5;
const RAPID_COMMIT: u16 = 14;
const IA_PD: u16 = 25;

/// What a port gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseV6 {
    /// Its addresses in subnets with `dhcpv6-stateful`.
    pub addresses: Vec<Ipv6Addr>,
    /// DNS servers.
    pub dns: Vec<Ipv6Addr>,
    /// The domain in which the client looks for names.
    pub domain: String,
}

/// Why there is no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// Not what the RFC says a client sends.
    #[error("not a DHCPv6 message of a client on this network")]
    Malformed,
    /// No port on a subnet with DHCPv6 has this link-local address.
    #[error("no port with DHCPv6 has the link-local address {0}")]
    UnknownClient(Ipv6Addr),
    /// Another server's.
    #[error("{0} talks to another server")]
    OtherServer(Ipv6Addr),
    /// The reply can't be written.
    #[error("the reply to {0} can't be encoded")]
    Encoding(Ipv6Addr),
}

/// This server's identifier (DUID-LL, RFC 8415 §11.4): the same on every host of a network.
pub fn server_id(bridge: MacAddress) -> Vec<u8> {
    [&[0, 3, 0, 1], &bridge.0[..]].concat()
}

/// An identity association.
struct Association {
    code: u16,
    id: u32,
    addresses: BTreeSet<Ipv6Addr>,
}

/// The parts of a message that matter.
struct Request {
    kind: MessageType,
    transaction: [u8; 3],
    client: Option<Vec<u8>>,
    server: Option<Vec<u8>>,
    rapid: bool,
    associations: Vec<Association>,
}

/// Answers a message from a link-local address.
pub fn respond(
    leases: &BTreeMap<Ipv6Addr, LeaseV6>,
    server: &[u8],
    from: Ipv6Addr,
    bytes: &[u8],
) -> Result<Vec<u8>, Ignored> {
    let request = parse(bytes).ok_or(Ignored::Malformed)?;
    let lease = leases.get(&from).ok_or(Ignored::UnknownClient(from))?;
    if request.server.as_ref().is_some_and(|other| other != server) {
        return Err(Ignored::OtherServer(from));
    }
    let kind = reply_kind(&request).ok_or(Ignored::Malformed)?;
    let mut reply = Message::new_with_id(kind, request.transaction);
    let options = reply.opts_mut();
    options.insert(DhcpOption::ServerId(server.to_vec()));
    if let Some(client) = &request.client {
        options.insert(DhcpOption::ClientId(client.clone()));
    }
    match request.kind {
        MessageType::Solicit | MessageType::Request | MessageType::Renew | MessageType::Rebind => {
            if request.kind == MessageType::Solicit && request.rapid {
                options.insert(DhcpOption::RapidCommit);
            }
            associate(&request, lease, options);
        }
        MessageType::Confirm => {
            let confirmed: BTreeSet<_> = request.associations.iter().flat_map(|ia| &ia.addresses).collect();
            if confirmed.is_empty() {
                return Err(Ignored::Malformed);
            }
            let on_link = confirmed.iter().all(|address| lease.addresses.contains(address));
            options.insert(status(if on_link { Status::Success } else { Status::NotOnLink }));
        }
        // The address stays the port's.
        MessageType::Release | MessageType::Decline => options.insert(status(Status::Success)),
        _ => {}
    }
    configure(lease, options);
    reply.to_vec().map_err(|_| Ignored::Encoding(from))
}

/// RFC 8415 §16 (which messages are valid) and §18.3 (what answers them).
fn reply_kind(request: &Request) -> Option<MessageType> {
    let (client, server) = (request.client.is_some(), request.server.is_some());
    let valid = match request.kind {
        MessageType::Solicit | MessageType::Confirm | MessageType::Rebind => client && !server,
        MessageType::Request | MessageType::Renew | MessageType::Release | MessageType::Decline => {
            client && server
        }
        MessageType::InformationRequest => request.associations.is_empty(),
        _ => false,
    };
    let advertise = request.kind == MessageType::Solicit && !request.rapid;
    valid.then_some(if advertise { MessageType::Advertise } else { MessageType::Reply })
}

/// The first association gets all addresses of the port, others get none.
fn associate(request: &Request, lease: &LeaseV6, options: &mut DhcpOptions) {
    let mut addresses = Some(&lease.addresses).filter(|addresses| !addresses.is_empty());
    for ia in &request.associations {
        let mut inner = DhcpOptions::new();
        match (ia.code, addresses) {
            (IA_NA, Some(given)) => {
                addresses = None;
                given.iter().for_each(|ip| inner.insert(address(*ip, LIFETIME_S)));
                // What it must no longer use (RFC 8415 §18.3.4).
                let gone = ia.addresses.iter().filter(|ip| !given.contains(ip));
                gone.for_each(|ip| inner.insert(address(*ip, 0)));
                let ia = IANA { id: ia.id, t1: RENEWAL_S, t2: REBINDING_S, opts: inner };
                options.insert(DhcpOption::IANA(ia));
            }
            (IA_NA, None) => {
                inner.insert(status(Status::NoAddrsAvail));
                options.insert(DhcpOption::IANA(IANA { id: ia.id, t1: 0, t2: 0, opts: inner }));
            }
            (IA_TA, _) => {
                inner.insert(status(Status::NoAddrsAvail));
                options.insert(DhcpOption::IATA(IATA { id: ia.id, opts: inner }));
            }
            _ => {
                inner.insert(status(Status::NoPrefixAvail));
                options.insert(DhcpOption::IAPD(IAPD { id: ia.id, t1: 0, t2: 0, opts: inner }));
            }
        }
    }
}

fn address(addr: Ipv6Addr, lifetime_s: u32) -> DhcpOption {
    DhcpOption::IAAddr(IAAddr {
        addr,
        preferred_life: lifetime_s,
        valid_life: lifetime_s,
        opts: DhcpOptions::new(),
    })
}

fn status(status: Status) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode { status, msg: String::new() })
}

fn configure(lease: &LeaseV6, options: &mut DhcpOptions) {
    if !lease.dns.is_empty() {
        options.insert(DhcpOption::DomainNameServers(lease.dns.clone()));
    }
    if let Ok(mut name) = Name::from_ascii(&lease.domain) {
        name.set_fqdn(true);
        options.insert(DhcpOption::DomainSearchList(vec![name]));
    }
}

fn parse(bytes: &[u8]) -> Option<Request> {
    let (header, rest) = bytes.split_at_checked(HEADER_LEN)?;
    let mut request = Request {
        kind: MessageType::from(header[0]),
        transaction: [header[1], header[2], header[3]],
        client: None,
        server: None,
        rapid: false,
        associations: Vec::new(),
    };
    for option in options(rest) {
        let (code, data) = option?;
        match code {
            CLIENT_ID | SERVER_ID => {
                let id = Some(data.to_vec()).filter(|id| (1..=DUID_MAX).contains(&id.len()));
                *(if code == CLIENT_ID { &mut request.client } else { &mut request.server }) = Some(id?);
            }
            RAPID_COMMIT => request.rapid = true,
            IA_NA | IA_TA | IA_PD if request.associations.len() < ASSOCIATIONS_MAX => {
                request.associations.push(association(code, data)?);
            }
            _ => {}
        }
    }
    Some(request)
}

fn association(code: u16, data: &[u8]) -> Option<Association> {
    let (id, rest) = data.split_first_chunk::<4>()?;
    let times = if code == IA_TA { 0 } else { 8 };
    let (_, rest) = rest.split_at_checked(times)?;
    let mut addresses = BTreeSet::new();
    for option in options(rest).take(ADDRESSES_MAX) {
        if let (IA_ADDR, data) = option? {
            addresses.insert(Ipv6Addr::from(*data.first_chunk::<16>()?));
        }
    }
    Some(Association { code, id: u32::from_be_bytes(*id), addresses })
}

/// Options one after another; `None` for one that is cut.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u16, &[u8])>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let whole = (|| {
            let ([a, b, c, d], rest) = bytes.split_first_chunk::<4>()?;
            let (data, rest) = rest.split_at_checked(u16::from_be_bytes([*c, *d]).into())?;
            Some((u16::from_be_bytes([*a, *b]), data, rest))
        })();
        bytes = whole.map_or(&[], |(_, _, rest)| rest);
        Some(whole.map(|(code, data, _)| (code, data)))
    })
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
