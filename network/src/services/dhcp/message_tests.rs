use dhcproto::{Decodable, Decoder};
use proptest::prelude::*;

use super::*;

const MAC: MacAddress = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fn lease() -> Lease {
    Lease {
        address: ADDRESS,
        subnet: "10.0.0.0/24".parse().unwrap(),
        server: SERVER,
        router: Some(GATEWAY),
        dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
        domain: Some("openstacklocal".to_owned()),
        routes: vec![("169.254.169.254/32".parse().unwrap(), SERVER), (Ipv4Net::default(), GATEWAY)],
        mtu: 1450,
        hostname: Some("web-1".to_owned()),
    }
}

fn leases() -> BTreeMap<MacAddress, Lease> {
    BTreeMap::from([(MAC, lease())])
}

fn request(kind: MessageType, options: impl IntoIterator<Item = DhcpOption>) -> Message {
    let mut message = Message::default();
    message.set_chaddr(&MAC.0).set_xid(0x1234_5678);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    options.into_iter().for_each(|option| _ = message.opts_mut().insert(option));
    message
}

fn ask(message: &Message) -> Result<(Reply, Message), Ignored> {
    let reply = respond(&leases(), &message.to_vec().unwrap())?;
    let decoded = Message::decode(&mut Decoder::new(&reply.payload)).unwrap();
    assert_eq!(decoded.opts().msg_type(), Some(reply.kind));
    assert_eq!(decoded.xid(), message.xid());
    assert_eq!(decoded.chaddr(), MAC.0);
    assert!(reply.payload.len() >= BOOTP_LEN);
    Ok((reply, decoded))
}

fn option(message: &Message, code: OptionCode) -> DhcpOption {
    message.opts().get(code).unwrap_or_else(|| panic!("no {code:?}")).clone()
}

#[test]
fn discover_is_answered_with_an_offer_that_has_everything() {
    let (reply, offer) = ask(&request(MessageType::Discover, [])).unwrap();
    assert_eq!((reply.kind, reply.server), (MessageType::Offer, SERVER));
    assert_eq!((reply.mac, reply.ip), (MAC, ADDRESS), "a client that takes unicast gets unicast");
    assert_eq!((offer.opcode(), offer.yiaddr()), (Opcode::BootReply, ADDRESS));
    let expected = [
        DhcpOption::ServerIdentifier(SERVER),
        DhcpOption::AddressLeaseTime(86_400),
        DhcpOption::Renewal(43_200),
        DhcpOption::Rebinding(75_600),
        DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 0, 0, 255)),
        DhcpOption::Router(vec![GATEWAY]),
        DhcpOption::DomainNameServer(vec![Ipv4Addr::new(9, 9, 9, 9)]),
        DhcpOption::InterfaceMtu(1450),
        DhcpOption::Hostname("web-1".to_owned()),
    ];
    for wanted in expected {
        assert_eq!(option(&offer, OptionCode::from(&wanted)), wanted);
    }
    // RFC 3442: 169.254.169.254/32 by the service address, then the default route.
    let routes = [32, 169, 254, 169, 254, 10, 0, 0, 2, 0, 10, 0, 0, 1];
    let raw: Vec<u8> = [121, routes.len() as u8].into_iter().chain(routes).collect();
    assert!(reply.payload.windows(raw.len()).any(|window| window == raw));
}

#[test]
fn broadcast_flag_makes_the_reply_a_broadcast() {
    let mut discover = request(MessageType::Discover, []);
    discover.set_flags(Flags::default().set_broadcast());
    let (reply, offer) = ask(&discover).unwrap();
    assert_eq!((reply.mac, reply.ip), (MacAddress::BROADCAST, Ipv4Addr::BROADCAST));
    assert!(offer.flags().broadcast());
}

#[test]
fn request_of_the_offered_address_is_acknowledged_and_any_other_is_not() {
    let wants = |ip| {
        let options = [DhcpOption::ServerIdentifier(SERVER), DhcpOption::RequestedIpAddress(ip)];
        ask(&request(MessageType::Request, options)).unwrap()
    };
    let (reply, ack) = wants(ADDRESS);
    assert_eq!((reply.kind, ack.yiaddr()), (MessageType::Ack, ADDRESS));
    let (reply, nak) = wants(Ipv4Addr::new(10, 0, 0, 11));
    assert_eq!((reply.kind, nak.yiaddr()), (MessageType::Nak, Ipv4Addr::UNSPECIFIED));
    assert_eq!((reply.mac, reply.ip), (MacAddress::BROADCAST, Ipv4Addr::BROADCAST));
    assert!(nak.opts().get(OptionCode::AddressLeaseTime).is_none());
}

#[test]
fn reboot_with_the_right_address_is_acknowledged_and_with_a_wrong_one_is_not() {
    let right = request(MessageType::Request, [DhcpOption::RequestedIpAddress(ADDRESS)]);
    assert_eq!(ask(&right).unwrap().0.kind, MessageType::Ack);
    let wrong =
        request(MessageType::Request, [DhcpOption::RequestedIpAddress(Ipv4Addr::new(192, 168, 0, 4))]);
    assert_eq!(ask(&wrong).unwrap().0.kind, MessageType::Nak);
}

#[test]
fn renewal_is_acknowledged_by_unicast() {
    let mut renewal = request(MessageType::Request, []);
    renewal.set_ciaddr(ADDRESS);
    let (reply, ack) = ask(&renewal).unwrap();
    assert_eq!((reply.kind, reply.mac, reply.ip), (MessageType::Ack, MAC, ADDRESS));
    assert_eq!((ack.ciaddr(), ack.yiaddr()), (ADDRESS, ADDRESS));
    renewal.set_ciaddr(Ipv4Addr::new(10, 0, 0, 99));
    let (reply, _) = ask(&renewal).unwrap();
    assert_eq!((reply.kind, reply.ip), (MessageType::Nak, Ipv4Addr::BROADCAST));
}

#[test]
fn inform_is_acknowledged_without_an_address_or_a_lease() {
    let mut inform = request(MessageType::Inform, []);
    assert_eq!(ask(&inform).unwrap_err(), Ignored::Malformed);
    inform.set_ciaddr(ADDRESS);
    let (reply, ack) = ask(&inform).unwrap();
    assert_eq!((reply.kind, ack.yiaddr()), (MessageType::Ack, Ipv4Addr::UNSPECIFIED));
    assert!(ack.opts().get(OptionCode::AddressLeaseTime).is_none());
    assert_eq!(option(&ack, OptionCode::Router), DhcpOption::Router(vec![GATEWAY]));
}

#[test]
fn what_is_not_for_this_server_is_ignored() {
    let other = [DhcpOption::ServerIdentifier(GATEWAY), DhcpOption::RequestedIpAddress(ADDRESS)];
    assert_eq!(ask(&request(MessageType::Request, other)).unwrap_err(), Ignored::OtherServer(MAC));
    assert_eq!(ask(&request(MessageType::Request, [])).unwrap_err(), Ignored::Malformed);
    assert_eq!(ask(&request(MessageType::Release, [])).unwrap_err(), Ignored::Released(MAC));
    assert_eq!(ask(&request(MessageType::Decline, [])).unwrap_err(), Ignored::Declined(MAC, ADDRESS));
    assert_eq!(ask(&request(MessageType::Offer, [])).unwrap_err(), Ignored::Malformed);

    let mut relayed = request(MessageType::Discover, []);
    relayed.set_giaddr(GATEWAY);
    assert_eq!(ask(&relayed).unwrap_err(), Ignored::Malformed);
    let mut reply = request(MessageType::Discover, []);
    reply.set_opcode(Opcode::BootReply);
    assert_eq!(ask(&reply).unwrap_err(), Ignored::Malformed);

    let stranger = MacAddress([2; 6]);
    let mut unknown = request(MessageType::Discover, []);
    unknown.set_chaddr(&stranger.0);
    let bytes = unknown.to_vec().unwrap();
    assert_eq!(respond(&leases(), &bytes).unwrap_err(), Ignored::UnknownClient(stranger));
}

#[test]
fn client_identifier_comes_back() {
    let id = DhcpOption::ClientIdentifier(vec![0xff, 1, 2, 3]);
    let (_, offer) = ask(&request(MessageType::Discover, [id.clone()])).unwrap();
    assert_eq!(option(&offer, OptionCode::ClientIdentifier), id);
}

#[test]
fn reply_goes_without_the_dispensable_for_a_client_that_takes_little() {
    let mut leases = leases();
    let route = ("10.1.0.0/24".parse().unwrap(), GATEWAY);
    leases.get_mut(&MAC).unwrap().routes.extend(vec![route; 30]);
    let options = |size| {
        let bytes = request(MessageType::Discover, [DhcpOption::MaxMessageSize(size)]).to_vec().unwrap();
        let payload = respond(&leases, &bytes).unwrap().payload;
        assert!(payload.len() + IP_UDP_LEN <= usize::from(size.max(DATAGRAM_MIN)));
        Message::decode(&mut Decoder::new(&payload)).unwrap().opts().clone()
    };
    assert!(!options(576).contains(OptionCode::Hostname));
    assert!(options(576).contains(OptionCode::ClasslessStaticRoute));
    assert!(options(1400).contains(OptionCode::Hostname));
}

/// A request with a well-formed head, so that the options are reached.
fn plausible(options: &[u8], hlen: u8, flags: u16) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[..4].copy_from_slice(&[1, 1, hlen, 0]);
    bytes[10..12].copy_from_slice(&flags.to_be_bytes());
    bytes[28..34].copy_from_slice(&MAC.0);
    bytes[236..240].copy_from_slice(&[99, 130, 83, 99]);
    bytes.extend_from_slice(options);
    bytes
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = respond(&leases(), &bytes);
    }

    #[test]
    fn arbitrary_options_never_panic_and_never_send_elsewhere(
        options in prop::collection::vec(any::<u8>(), 0..600),
        kind in 0u8..20,
        hlen in prop_oneof![9 => Just(6u8), 1 => any::<u8>()],
        flags: u16,
        truncated in any::<prop::sample::Index>(),
    ) {
        let options: Vec<u8> = [53, 1, kind].into_iter().chain(options).collect();
        let bytes = plausible(&options, hlen, flags);
        let _ = respond(&leases(), &bytes[..truncated.index(bytes.len())]);
        if let Ok(reply) = respond(&leases(), &bytes) {
            prop_assert!(reply.mac == MAC || reply.mac == MacAddress::BROADCAST);
            prop_assert!(reply.payload.len() <= 1024);
        }
    }
}
