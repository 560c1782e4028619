//! DHCPv4 (RFC 2131, 2132, 3442, 6842): a request's bytes in, a reply out. Pure, and safe with any bytes.
//!
//! The server keeps no state: a port's address is its for ever, so there is nothing to allocate, release or expire.

use std::{collections::BTreeMap, net::Ipv4Addr};

use dhcproto::{
    Encodable,
    v4::{DhcpOption, Flags, HType, Message, MessageType, Opcode, OptionCode, borrowed},
};
use ipnet::Ipv4Net;

use crate::names::MacAddress;

/// Lease time in seconds (Neutron's default: a day).
pub const LEASE_S: u32 = 86_400;
/// T1, RFC 2131 §4.4.5: half of the lease.
pub const RENEWAL_S: u32 = LEASE_S / 2;
/// T2: seven eighths of it.
pub const REBINDING_S: u32 = LEASE_S / 8 * 7;

/// Fixed part and cookie, in bytes.
const HEADER_LEN: usize = 240;
/// What every client accepts as an IP datagram, in bytes (RFC 2131 §2).
const DATAGRAM_MIN: u16 = 576;
/// IP and UDP headers, in bytes.
const IP_UDP_LEN: usize = 28;
/// Replies are padded to the length of a BOOTP message, in bytes (RFC 951), which old clients insist on.
const BOOTP_LEN: usize = 300;
/// Longest client identifier that is returned, in bytes: one option's.
const CLIENT_ID_MAX: usize = 255;
/// What a reply that is too long for its client goes without, in this order.
const DISPENSABLE: [OptionCode; 4] =
    [OptionCode::DomainName, OptionCode::Hostname, OptionCode::BroadcastAddr, OptionCode::DomainNameServer];

/// What a port gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its address.
    pub address: Ipv4Addr,
    /// Range of its subnet.
    pub subnet: Ipv4Net,
    /// The server's address in this subnet (its identifier).
    pub server: Ipv4Addr,
    /// Default router.
    pub router: Option<Ipv4Addr>,
    /// DNS servers.
    pub dns: Vec<Ipv4Addr>,
    /// The domain in which the client looks for names.
    pub domain: Option<String>,
    /// All static routes, the default route included (RFC 3442): destination, next hop.
    pub routes: Vec<(Ipv4Net, Ipv4Addr)>,
    /// MTU in bytes.
    pub mtu: u16,
    /// Host name.
    pub hostname: Option<String>,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// OFFER, ACK or NAK.
    pub kind: MessageType,
    /// Source address.
    pub server: Ipv4Addr,
    /// Ethernet address to send to.
    pub mac: MacAddress,
    /// IP address to send to.
    pub ip: Ipv4Addr,
    /// UDP payload.
    pub payload: Vec<u8>,
}

/// Why there is no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// No DHCP request of an Ethernet client that is directly attached.
    #[error("not a DHCP request from an Ethernet client on this network")]
    Malformed,
    /// No port with this address has a lease.
    #[error("no port with an address to lease has {0}")]
    UnknownClient(MacAddress),
    /// Another server's.
    #[error("{0} takes the offer of another server")]
    OtherServer(MacAddress),
    /// The client found its address in use. Nothing can be done: it has no other.
    #[error("{0} declines its address {1}: another machine on the network uses it")]
    Declined(MacAddress, Ipv4Addr),
    /// Nothing to do.
    #[error("{0} releases its address")]
    Released(MacAddress),
    /// The reply can't be written.
    #[error("the reply to {0} can't be encoded")]
    Encoding(MacAddress),
}

/// The parts of a request that matter.
struct Request<'a> {
    raw: borrowed::Message<'a>,
    mac: MacAddress,
    kind: MessageType,
    server: Option<Ipv4Addr>,
    requested: Option<Ipv4Addr>,
    datagram_max: u16,
    client_id: Option<Vec<u8>>,
}

/// Answers a request.
pub fn respond(leases: &BTreeMap<MacAddress, Lease>, bytes: &[u8]) -> Result<Reply, Ignored> {
    let request = parse(bytes).ok_or(Ignored::Malformed)?;
    let mac = request.mac;
    let lease = leases.get(&mac).ok_or(Ignored::UnknownClient(mac))?;
    let kind = match request.kind {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => answer_to_request(&request, lease)?,
        MessageType::Inform if !request.raw.ciaddr().is_unspecified() => MessageType::Ack,
        MessageType::Decline => return Err(Ignored::Declined(mac, lease.address)),
        MessageType::Release => return Err(Ignored::Released(mac)),
        _ => return Err(Ignored::Malformed),
    };
    let payload = encode(&request, lease, kind).ok_or(Ignored::Encoding(mac))?;
    let (to_mac, to_ip) = destination(&request, lease, kind);
    Ok(Reply { kind, server: lease.server, mac: to_mac, ip: to_ip, payload })
}

/// RFC 2131 §4.3.2, by the state that the client is in.
fn answer_to_request(request: &Request<'_>, lease: &Lease) -> Result<MessageType, Ignored> {
    let ciaddr = request.raw.ciaddr();
    let wanted = match (request.server, request.requested) {
        (Some(server), _) if server != lease.server => return Err(Ignored::OtherServer(request.mac)),
        // SELECTING, INIT-REBOOT.
        (_, Some(requested)) => requested,
        // RENEWING, REBINDING.
        (_, None) if !ciaddr.is_unspecified() => ciaddr,
        (_, None) => return Err(Ignored::Malformed),
    };
    Ok(if wanted == lease.address { MessageType::Ack } else { MessageType::Nak })
}

/// RFC 2131 §4.1. A client is reached at the port's own Ethernet address or by broadcast, never at any other: nobody can
/// make this server send to a third party.
fn destination(request: &Request<'_>, lease: &Lease, kind: MessageType) -> (MacAddress, Ipv4Addr) {
    let broadcast = (MacAddress::BROADCAST, Ipv4Addr::BROADCAST);
    let ciaddr = request.raw.ciaddr();
    match kind {
        MessageType::Nak => broadcast,
        _ if !ciaddr.is_unspecified() => (request.mac, ciaddr),
        _ if request.raw.flags().broadcast() => broadcast,
        _ => (request.mac, lease.address),
    }
}

fn parse(bytes: &[u8]) -> Option<Request<'_>> {
    if bytes.len() < HEADER_LEN {
        return None;
    }
    let raw = borrowed::Message::new(bytes).ok()?;
    // The length is checked before the address is read, which relies on it. Relayed requests aren't for this server.
    let ethernet = raw.opcode() == Opcode::BootRequest && raw.htype() == HType::Eth && raw.hlen() == 6;
    if !ethernet || !raw.giaddr().is_unspecified() {
        return None;
    }
    let mac = MacAddress(raw.chaddr().try_into().ok()?);
    let mut kind = None;
    let mut server = None;
    let mut requested = None;
    let mut datagram_max = DATAGRAM_MIN;
    let mut client_id = None;
    for option in raw.opts() {
        let data = option.data();
        match option.code() {
            OptionCode::MessageType => kind = data.first().map(|kind| MessageType::from(*kind)),
            OptionCode::ServerIdentifier => server = Some(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?)),
            OptionCode::RequestedIpAddress => {
                requested = Some(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?))
            }
            OptionCode::MaxMessageSize => {
                datagram_max = u16::from_be_bytes(data.try_into().ok()?).max(DATAGRAM_MIN);
            }
            OptionCode::ClientIdentifier if data.len() <= CLIENT_ID_MAX => client_id = Some(data.to_vec()),
            _ => {}
        }
    }
    Some(Request { raw, mac, kind: kind?, server, requested, datagram_max, client_id })
}

fn encode(request: &Request<'_>, lease: &Lease, kind: MessageType) -> Option<Vec<u8>> {
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootReply)
        .set_htype(HType::Eth)
        .set_xid(request.raw.xid())
        .set_flags(Flags::new(u16::from(request.raw.flags()) & 0x8000))
        .set_chaddr(&request.mac.0);
    if kind != MessageType::Nak {
        message.set_ciaddr(request.raw.ciaddr());
    }
    if kind != MessageType::Nak && request.kind != MessageType::Inform {
        message.set_yiaddr(lease.address);
    }
    for option in options(request, lease, kind) {
        message.opts_mut().insert(option);
    }
    let longest = usize::from(request.datagram_max.min(lease.mtu)).saturating_sub(IP_UDP_LEN);
    let mut payload = message.to_vec().ok()?;
    for code in DISPENSABLE {
        if payload.len() > longest {
            message.opts_mut().remove(code);
            payload = message.to_vec().ok()?;
        }
    }
    payload.resize(payload.len().max(BOOTP_LEN), 0);
    Some(payload)
}

/// RFC 2131 table 3.
fn options(request: &Request<'_>, lease: &Lease, kind: MessageType) -> Vec<DhcpOption> {
    let mut options = vec![DhcpOption::MessageType(kind), DhcpOption::ServerIdentifier(lease.server)];
    // RFC 6842 §3.
    options.extend(request.client_id.clone().map(DhcpOption::ClientIdentifier));
    if kind == MessageType::Nak {
        return options;
    }
    if request.kind != MessageType::Inform {
        options.extend([
            DhcpOption::AddressLeaseTime(LEASE_S),
            DhcpOption::Renewal(RENEWAL_S),
            DhcpOption::Rebinding(REBINDING_S),
        ]);
    }
    options.extend([
        DhcpOption::SubnetMask(lease.subnet.netmask()),
        DhcpOption::BroadcastAddr(lease.subnet.broadcast()),
        DhcpOption::InterfaceMtu(lease.mtu),
        DhcpOption::ClasslessStaticRoute(lease.routes.clone()),
    ]);
    options.extend(lease.router.map(|router| DhcpOption::Router(vec![router])));
    options.extend(lease.hostname.clone().map(DhcpOption::Hostname));
    options.extend(lease.domain.clone().map(DhcpOption::DomainName));
    if !lease.dns.is_empty() {
        options.push(DhcpOption::DomainNameServer(lease.dns.clone()));
    }
    options
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
