use domain::base::message_builder::QuestionBuilder;
use proptest::prelude::*;

use super::{super::zone, *};

fn asked(name: &str, kind: Rtype, edns: Option<u16>) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(0x1234);
    builder.header_mut().set_rd(true);
    let mut builder: QuestionBuilder<_> = builder.question();
    builder.push((name.parse::<Name<Vec<u8>>>().unwrap(), kind)).unwrap();
    let mut builder = builder.additional();
    if let Some(size) = edns {
        builder
            .opt(|opt| {
                opt.set_udp_payload_size(size);
                Ok(())
            })
            .unwrap();
    }
    builder.finish()
}

fn answer(bytes: &[u8], forwards: bool) -> Message<Vec<u8>> {
    match respond(&zone::example(), bytes, Transport::Udp, forwards) {
        Outcome::Answer(bytes) => Message::from_octets(bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn forwarded(bytes: &[u8], transport: Transport) -> Query {
    match respond(&zone::example(), bytes, transport, true) {
        Outcome::Forward(query) => query,
        other => panic!("{other:?}"),
    }
}

#[test]
fn own_names_are_answered_with_authority_in_whatever_case() {
    for (name, kind, count) in [
        ("web.openstacklocal", Rtype::A, 1),
        ("WEB.OpenStackLocal", Rtype::AAAA, 1),
        ("web", Rtype::A, 1),
        ("web", Rtype::ANY, 2),
        ("web", Rtype::MX, 0),
        ("10.0.0.10.in-addr.arpa", Rtype::PTR, 1),
        ("10.0.0.10.in-addr.arpa", Rtype::A, 0),
    ] {
        let message = answer(&asked(name, kind, None), true);
        let header = message.header();
        assert_eq!(
            (header.rcode(), header.id(), header.aa()),
            (Rcode::NOERROR, 0x1234, true),
            "{name} {kind}"
        );
        assert_eq!(message.header_counts().ancount(), count, "{name} {kind}");
        assert_eq!(message.header_counts().arcount(), 0, "no OPT for who sent none");
    }
    assert!(answer(&asked("web", Rtype::A, Some(4096)), true).opt().is_some());
}

#[test]
fn names_that_nobody_has_do_not_exist_and_are_not_asked_for_elsewhere() {
    for name in ["nobody.openstacklocal", "nobody", "localhost", "11.0.0.10.in-addr.arpa"] {
        assert_eq!(answer(&asked(name, Rtype::A, None), true).header().rcode(), Rcode::NXDOMAIN, "{name}");
    }
}

#[test]
fn other_names_are_refused_unless_there_is_somebody_to_ask() {
    let bytes = asked("www.example.com", Rtype::A, None);
    assert_eq!(answer(&bytes, false).header().rcode(), Rcode::REFUSED);
    forwarded(&bytes, Transport::Udp);
    // Who doesn't want recursion gets none, and nobody gets transfers or everything.
    let mut unrecursive = bytes.clone();
    unrecursive[2] &= !1;
    assert_eq!(answer(&unrecursive, true).header().rcode(), Rcode::REFUSED);
    for kind in [Rtype::AXFR, Rtype::IXFR, Rtype::ANY] {
        assert_eq!(
            answer(&asked("example.com", kind, None), true).header().rcode(),
            Rcode::REFUSED,
            "{kind}"
        );
    }
}

#[test]
fn what_is_no_question_gets_no_answer_and_what_is_malformed_an_error() {
    let zone = zone::example();
    let bytes = asked("web", Rtype::A, None);
    let mut reply = bytes.clone();
    reply[2] |= 0x80;
    for ignored in [&reply[..], &bytes[..11], &[]] {
        assert_eq!(respond(&zone, ignored, Transport::Udp, true), Outcome::Ignore);
    }
    let mut update = bytes.clone();
    update[2] |= 5 << 3;
    assert_eq!(answer(&update, true).header().rcode(), Rcode::NOTIMP);
    let mut two = bytes.clone();
    two[5] = 2;
    assert_eq!(answer(&two, true).header().rcode(), Rcode::FORMERR);
    let mut version = asked("web", Rtype::A, Some(1232));
    let at = version.len() - 5;
    version[at] = 1;
    let message = answer(&version, true);
    assert_eq!(message.opt_rcode(), OptRcode::BADVERS);
}

#[test]
fn a_forwarded_question_carries_nothing_of_the_client_but_its_question() {
    let mut bytes = asked("www.example.com", Rtype::A, Some(4096));
    bytes.extend_from_slice(b"whatever follows");
    let query = forwarded(&bytes, Transport::Udp);
    let sent = query.with_id(7);
    assert!(!sent.windows(8).any(|window| window == b"whatever"));
    let message = Message::from_octets(sent.as_slice()).unwrap();
    assert_eq!((message.header().id(), message.header().rd()), (7, true));
    assert_eq!(message.opt().unwrap().udp_payload_size(), DATAGRAM_MAX as u16);
}

#[test]
fn only_the_reply_to_a_question_is_believed_and_the_client_gets_its_own_id() {
    let query = forwarded(&asked("www.example.com", Rtype::A, None), Transport::Udp);
    let reply = |id, name: &str| {
        let mut bytes = asked(name, Rtype::A, None);
        bytes[..2].copy_from_slice(&u16::to_be_bytes(id));
        bytes[2] |= 0x80;
        bytes
    };
    let accepted = query.accept(7, &reply(7, "WWW.example.com")).unwrap();
    assert_eq!(accepted[..2], [0x12, 0x34]);
    assert_eq!(query.accept(7, &reply(8, "www.example.com")), None, "another id");
    assert_eq!(query.accept(7, &reply(7, "www.example.org")), None, "another question");
    let mut question = reply(7, "www.example.com");
    question[2] &= 0x7f;
    assert_eq!(query.accept(7, &question), None, "a question");
    assert_eq!(query.accept(7, &[]), None);
}

#[test]
fn a_reply_that_is_too_long_for_its_client_is_cut_and_says_so() {
    let bytes = asked("www.example.com", Rtype::A, None);
    let mut long = bytes.clone();
    long[..2].copy_from_slice(&[0, 7]);
    long[2] |= 0x80;
    long.resize(600, 0);
    let cut = forwarded(&bytes, Transport::Udp).accept(7, &long).unwrap();
    let message = Message::from_octets(cut.as_slice()).unwrap();
    assert!(message.header().tc() && cut.len() < 512);
    assert_eq!(forwarded(&bytes, Transport::Tcp).accept(7, &long).unwrap().len(), 600);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        plausible: bool,
        tcp: bool,
    ) {
        let mut bytes = bytes;
        if plausible && bytes.len() >= 12 {
            bytes[2] &= 1;
            bytes[4..6].copy_from_slice(&[0, 1]);
        }
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        match respond(&zone::example(), &bytes, transport, true) {
            Outcome::Answer(answer) => {
                prop_assert!(Message::from_octets(answer.as_slice()).unwrap().header().qr());
                prop_assert!(tcp || answer.len() <= DATAGRAM_MAX);
            }
            Outcome::Forward(query) => {
                prop_assert!(query.with_id(1).len() <= 300);
                let _ = query.accept(1, &bytes);
            }
            Outcome::Ignore => {}
        }
    }

    #[test]
    fn replies_of_other_resolvers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let query = forwarded(&asked("www.example.com", Rtype::A, None), Transport::Udp);
        let mut bytes = bytes;
        if bytes.len() > 12 {
            bytes[..6].copy_from_slice(&[0, 1, 0x80, 0, 0, 1]);
        }
        let _ = query.accept(1, &bytes);
    }
}
