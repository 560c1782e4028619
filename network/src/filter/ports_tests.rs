//! The text for nft, in the family that this machine's kernel may not have, too.

use mote_host_api::{FixedIp, FixedIpV6, Protocol, SecurityGroupRule, SubnetId};

use super::*;

fn network() -> (NetworkSpec, SecurityGroupSpec, AddressSetSpec) {
    let set = AddressSetSpec {
        id: AddressSetId::new(),
        addresses: ["10.0.0.10/32", "fd00::10/128"].map(|range| range.parse().unwrap()).into(),
    };
    let rule =
        |direction, ethertype, protocol, remote| SecurityGroupRule { direction, ethertype, protocol, remote };
    let group = SecurityGroupSpec {
        id: SecurityGroupId::new(),
        stateful: true,
        rules: vec![
            rule(Direction::Ingress, EtherType::Ipv4, Protocol::Tcp { ports: Some((80, 80)) }, None),
            rule(Direction::Ingress, EtherType::Ipv6, Protocol::Any, Some(Remote::Set(set.id))),
            rule(Direction::Egress, EtherType::Ipv4, Protocol::Any, None),
        ],
    };
    let port = PortSpec {
        id: "0123abcd-ef45-4789-8abc-def012345678".parse().unwrap(),
        mac_address: "fa:16:3e:00:00:0a".to_owned(),
        fixed_ips: vec![FixedIp { subnet_id: SubnetId::new(), ip_address: [10, 0, 0, 10].into() }],
        fixed_ips_v6: vec![FixedIpV6 { subnet_id: SubnetId::new(), ip_address: "fd00::10".parse().unwrap() }],
        port_security: true,
        security_groups: vec![group.id],
        ..PortSpec::default()
    };
    (NetworkSpec { ports: vec![port], ..NetworkSpec::default() }, group, set)
}

fn script(conntrack: Conntrack) -> String {
    let (network, group, set) = network();
    let (groups, sets) = ([group], [set]);
    filter(&network, &Surroundings::new(&groups, &sets, conntrack), &mut Memory::default()).unwrap().script()
}

#[test]
fn where_the_kernel_has_conntrack_for_bridges_all_of_it_is_in_the_bridge_family() {
    let text = script(Conntrack::Bridge);
    for line in [
        "add chain bridge mote egress { type filter hook forward priority 0; policy drop; }",
        "add chain bridge mote ingress { type filter hook forward priority 1; policy drop; }",
        "add chain bridge mote commit { type filter hook forward priority 2; policy accept; }",
    ] {
        assert!(text.lines().any(|other| other == line), "{line} is not in {text}");
    }
    // The version of IP is looked at in the frame, and conntrack and groups are where the frames are.
    assert!(text.contains("ether type ip meta l4proto 6 ct original proto-dst 80 accept"), "{text}");
    assert!(text.contains("ether type ip6 ct original ip6 saddr @s6-"), "{text}");
    let inet: Vec<&str> =
        text.lines().filter(|line| line.contains(" inet ") && line.starts_with("add rule")).collect();
    assert!(inet.iter().all(|line| line.contains(" mote input ")), "{inet:?}");
    assert!(!text.contains("nfproto"));
}

#[test]
fn elsewhere_what_needs_conntrack_is_in_the_inet_family() {
    let text = script(Conntrack::BridgeNetfilter);
    assert!(
        text.contains("add chain inet mote egress { type filter hook forward priority 0; policy drop; }")
    );
    assert!(text.contains("meta nfproto ipv4 meta l4proto 6 ct original proto-dst 80 accept"), "{text}");
    let with_state = |line: &&str| line.contains(" bridge ") && line.contains(" ct ");
    assert_eq!(text.lines().find(with_state), None);
}

#[test]
fn a_port_with_one_address_of_each_version_has_no_set_of_its_own() {
    for conntrack in [Conntrack::Bridge, Conntrack::BridgeNetfilter] {
        let text = script(conntrack);
        let own =
            text.lines().filter(|line| line.starts_with("add rule") && line.contains("tap0123abcdef4 "));
        let own: Vec<&str> = own.collect();
        assert!(own.len() > 15, "{own:#?}");
        assert_eq!(own.iter().find(|line| line.contains('{')), None);
        assert!(
            own.iter().any(|line| line.ends_with("ether saddr fa:16:3e:00:00:0a ip saddr 10.0.0.10 accept"))
        );
    }
}
