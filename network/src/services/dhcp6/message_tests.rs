use dhcproto::{
    Decodable, Decoder,
    v6::{ORO, OptionCode},
};
use proptest::prelude::*;

use super::*;

const CLIENT: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xf816, 0x3eff, 0xfe00, 1);
const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x10);
const OLD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x99);

fn lease(addresses: &[Ipv6Addr]) -> BTreeMap<Ipv6Addr, LeaseV6> {
    let dns = vec!["fd00::53".parse().unwrap()];
    let domain = "openstacklocal".to_owned();
    BTreeMap::from([(CLIENT, LeaseV6 { addresses: addresses.to_vec(), dns, domain })])
}

fn server() -> Vec<u8> {
    server_id(MacAddress([2, 0, 0, 0, 0, 1]))
}

fn message(kind: MessageType, options: impl IntoIterator<Item = DhcpOption>) -> Vec<u8> {
    let mut message = Message::new_with_id(kind, [1, 2, 3]);
    message.opts_mut().insert(DhcpOption::ORO(ORO { opts: vec![OptionCode::DomainNameServers] }));
    options.into_iter().for_each(|option| message.opts_mut().insert(option));
    message.to_vec().unwrap()
}

fn client() -> DhcpOption {
    DhcpOption::ClientId(vec![0, 4, 1, 2, 3])
}

fn ia(addresses: &[Ipv6Addr]) -> DhcpOption {
    let opts = addresses.iter().map(|ip| address(*ip, 60)).collect();
    DhcpOption::IANA(IANA { id: 7, t1: 0, t2: 0, opts })
}

fn ask(addresses: &[Ipv6Addr], bytes: &[u8]) -> Result<Message, Ignored> {
    let reply = respond(&lease(addresses), &server(), CLIENT, bytes)?;
    Ok(Message::decode(&mut Decoder::new(&reply)).unwrap())
}

fn given(reply: &Message) -> Vec<(Ipv6Addr, u32)> {
    let Some(DhcpOption::IANA(ia)) = reply.opts().get(OptionCode::IANA) else { panic!("{reply:?}") };
    assert_eq!(ia.id, 7);
    let address = |option: &DhcpOption| match option {
        DhcpOption::IAAddr(address) => Some((address.addr, address.valid_life)),
        _ => None,
    };
    ia.opts.iter().filter_map(address).collect()
}

fn status_of(options: &DhcpOptions) -> Status {
    let Some(DhcpOption::StatusCode(code)) = options.get(OptionCode::StatusCode) else {
        panic!("{options:?}")
    };
    code.status
}

#[test]
fn a_port_gets_its_address_by_four_messages_or_by_two() {
    let advertise = ask(&[ADDRESS], &message(MessageType::Solicit, [client(), ia(&[])])).unwrap();
    assert_eq!((advertise.msg_type(), advertise.xid()), (MessageType::Advertise, [1, 2, 3]));
    assert_eq!(given(&advertise), [(ADDRESS, LIFETIME_S)]);
    assert_eq!(advertise.opts().get(OptionCode::ClientId), Some(&client()));
    assert_eq!(advertise.opts().get(OptionCode::ServerId), Some(&DhcpOption::ServerId(server())));
    let own = DhcpOption::ServerId(server());
    for kind in [MessageType::Request, MessageType::Renew] {
        let reply = ask(&[ADDRESS], &message(kind, [client(), own.clone(), ia(&[ADDRESS])])).unwrap();
        assert_eq!((reply.msg_type(), given(&reply)), (MessageType::Reply, vec![(ADDRESS, LIFETIME_S)]));
        let dns = DhcpOption::DomainNameServers(vec!["fd00::53".parse().unwrap()]);
        assert_eq!(reply.opts().get(OptionCode::DomainNameServers), Some(&dns));
    }
    let rapid = [client(), DhcpOption::RapidCommit, ia(&[])];
    let reply = ask(&[ADDRESS], &message(MessageType::Solicit, rapid)).unwrap();
    assert_eq!(reply.msg_type(), MessageType::Reply);
    assert!(reply.opts().get(OptionCode::RapidCommit).is_some());
}

#[test]
fn an_address_that_is_no_longer_the_ports_is_taken_away_and_not_confirmed() {
    let rebind = message(MessageType::Rebind, [client(), ia(&[OLD])]);
    let mut addresses = given(&ask(&[ADDRESS], &rebind).unwrap());
    addresses.sort_unstable();
    assert_eq!(addresses, [(ADDRESS, LIFETIME_S), (OLD, 0)]);
    for (address, expected) in [(ADDRESS, Status::Success), (OLD, Status::NotOnLink)] {
        let reply = ask(&[ADDRESS], &message(MessageType::Confirm, [client(), ia(&[address])])).unwrap();
        assert_eq!(status_of(reply.opts()), expected);
    }
}

#[test]
fn information_is_given_without_addresses_and_addresses_are_not_where_there_are_none() {
    for options in [vec![], vec![client()]] {
        let reply = ask(&[], &message(MessageType::InformationRequest, options)).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Reply);
        let Some(DhcpOption::DomainSearchList(names)) = reply.opts().get(OptionCode::DomainSearchList) else {
            panic!("{reply:?}")
        };
        assert_eq!(names[0].to_ascii(), "openstacklocal.");
    }
    let reply = ask(&[], &message(MessageType::Solicit, [client(), ia(&[])])).unwrap();
    let Some(DhcpOption::IANA(ia)) = reply.opts().get(OptionCode::IANA) else { panic!("{reply:?}") };
    assert_eq!(status_of(&ia.opts), Status::NoAddrsAvail);
}

#[test]
fn second_associations_temporary_ones_and_prefixes_get_nothing() {
    let second = DhcpOption::IANA(IANA { id: 8, t1: 0, t2: 0, opts: DhcpOptions::new() });
    let temporary = DhcpOption::IATA(IATA { id: 9, opts: DhcpOptions::new() });
    let prefix = DhcpOption::IAPD(IAPD { id: 10, t1: 0, t2: 0, opts: DhcpOptions::new() });
    let options = [client(), ia(&[]), second, temporary, prefix];
    let reply = ask(&[ADDRESS], &message(MessageType::Solicit, options)).unwrap();
    let ias = reply.opts().get_all(OptionCode::IANA).unwrap();
    let addresses = ias.iter().filter(|ia| matches!(ia, DhcpOption::IANA(ia) if !ia.opts.clone().into_iter().any(|o| matches!(o, DhcpOption::StatusCode(_)))));
    assert_eq!((ias.len(), addresses.count()), (2, 1));
    let Some(DhcpOption::IATA(ia)) = reply.opts().get(OptionCode::IATA) else { panic!("{reply:?}") };
    assert_eq!(status_of(&ia.opts), Status::NoAddrsAvail);
    let Some(DhcpOption::IAPD(ia)) = reply.opts().get(OptionCode::IAPD) else { panic!("{reply:?}") };
    assert_eq!(status_of(&ia.opts), Status::NoPrefixAvail);
}

#[test]
fn what_is_not_for_this_server_or_not_allowed_is_ignored() {
    let own = DhcpOption::ServerId(server());
    let other = DhcpOption::ServerId(vec![9; 10]);
    let ignored = |kind, options: Vec<DhcpOption>| ask(&[ADDRESS], &message(kind, options)).unwrap_err();
    assert_eq!(ignored(MessageType::Request, vec![client(), other, ia(&[])]), Ignored::OtherServer(CLIENT));
    for (kind, options) in [
        (MessageType::Solicit, vec![ia(&[])]),
        (MessageType::Solicit, vec![client(), own.clone()]),
        (MessageType::Request, vec![client(), ia(&[])]),
        (MessageType::Confirm, vec![client(), ia(&[])]),
        (MessageType::InformationRequest, vec![ia(&[])]),
        (MessageType::Advertise, vec![client(), own.clone()]),
        (MessageType::Reply, vec![client(), own.clone()]),
        (MessageType::RelayForw, vec![client()]),
    ] {
        assert_eq!(ignored(kind, options), Ignored::Malformed, "{kind:?}");
    }
    let solicit = message(MessageType::Solicit, [client(), ia(&[])]);
    let stranger = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    let answer = respond(&lease(&[ADDRESS]), &server(), stranger, &solicit);
    assert_eq!(answer, Err(Ignored::UnknownClient(stranger)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        let _ = respond(&lease(&[ADDRESS]), &server(), CLIENT, &bytes);
    }

    #[test]
    fn arbitrary_options_never_panic_and_never_get_another_ports_address(
        kind in 1u8..14,
        options in prop::collection::vec((prop_oneof![0u16..64, any::<u16>()], prop::collection::vec(any::<u8>(), 0..80)), 0..12),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = vec![kind, 1, 2, 3, 0, 1, 0, 2, 0, 4];
        for (code, data) in options {
            bytes.extend(code.to_be_bytes());
            bytes.extend((data.len() as u16).to_be_bytes());
            bytes.extend(data);
        }
        let _ = respond(&lease(&[ADDRESS]), &server(), CLIENT, &bytes[..cut.index(bytes.len())]);
        if let Ok(reply) = respond(&lease(&[ADDRESS]), &server(), CLIENT, &bytes) {
            prop_assert!(reply.len() < 4096);
        }
    }
}
