use mote_host_api::{
    FixedIp, FixedIpV6, HostRoute, InstanceMetadata, Ipv6Mode, NetworkId, NetworkSpec, PortId, PortSpec,
    ServerId, SubnetId, SubnetSpec, SubnetV6Spec,
};
use proptest::prelude::*;
use serde_json::Value;
use uuid::Uuid;

use super::*;

fn guest() -> Guest {
    let server = ServerId(Uuid::from_u128(0xd8e0_2d56_2648_49a3_bf97_6be8_f120_4f38));
    let metadata = InstanceMetadata {
        uuid: server,
        name: "My Server".into(),
        hostname: "my-server".into(),
        project_id: "f7ac731cc11f40efbc03a9f9e1d1d21f".into(),
        availability_zone: "nova".into(),
        public_keys: [("mykey".into(), "ssh-ed25519 AAAA me".into())].into(),
        meta: [("role".into(), "web".into())].into(),
        user_data: Some(STANDARD.encode(b"#!/bin/sh\n\xff")),
        launch_index: 3,
        vendor_data: None,
        block_devices: [("ephemeral0".into(), "/dev/vdb".into()), ("swap".into(), "/dev/vdc".into())].into(),
    };
    let subnet = |third: u8, enable_dhcp| SubnetSpec {
        id: SubnetId(Uuid::from_u128(third.into())),
        cidr: format!("10.0.{third}.0/24").parse().unwrap(),
        gateway_ip: Some([10, 0, third, 1].into()),
        service_ip: [10, 0, third, 2].into(),
        enable_dhcp,
        dns_nameservers: vec![[9, 9, 9, 9].into()],
        host_routes: vec![HostRoute {
            destination: "10.9.0.0/16".parse().unwrap(),
            nexthop: [10, 0, 0, 7].into(),
        }],
    };
    let port = |third: u8| PortSpec {
        id: PortId(Uuid::from_u128(u128::from(third) << 120)),
        server_id: server,
        mac_address: format!("fa:16:3e:00:00:0{third}"),
        fixed_ips: vec![FixedIp {
            subnet_id: SubnetId(Uuid::from_u128(third.into())),
            ip_address: [10, 0, third, 5].into(),
        }],
        ..PortSpec::default()
    };
    let network = |third, dhcp| NetworkSpec {
        id: NetworkId(Uuid::from_u128(third)),
        mtu: 1450,
        subnets: vec![subnet(third as u8, dhcp)],
        ports: vec![port(third as u8)],
        ..NetworkSpec::default()
    };
    let (a, b) = (network(1, true), network(2, false));
    Guest::new(&metadata, Some(&a.ports[0]), &[(&a, &a.ports[0]), (&b, &b.ports[0])])
}

fn text(path: &str) -> String {
    let document = lookup(&guest(), path).unwrap_or_else(|| panic!("nothing at {path}"));
    assert_eq!(document.content_type, "text/plain; charset=UTF-8");
    String::from_utf8(document.body).unwrap()
}

fn json_at(path: &str) -> Value {
    let document = lookup(&guest(), path).unwrap_or_else(|| panic!("nothing at {path}"));
    assert_eq!(document.content_type, "application/json");
    serde_json::from_slice(&document.body).unwrap()
}

#[test]
fn versions_are_listed() {
    assert!(text("/openstack").starts_with("2012-08-10\n2013-04-04\n2013-10-17\n2015-10-15\n2016-06-30\n"));
    assert!(text("/openstack/").ends_with("\n2025-04-04\nlatest"));
    assert!(OPENSTACK_VERSIONS.is_sorted());
    assert_eq!(text("/"), text(""));
    assert!(text("/").starts_with("1.0\n2007-01-19\n"));
    assert!(text("/").ends_with("2009-04-04\nlatest"));
    let files = "meta_data.json\nuser_data\nvendor_data.json\nnetwork_data.json\nvendor_data2.json";
    assert_eq!(text("/openstack/latest"), files);
    assert_eq!(text("/openstack/2012-08-10/"), "meta_data.json\nuser_data");
}

#[test]
fn meta_data_has_novas_fields() {
    let mut data = json_at("/openstack/latest/meta_data.json");
    let seed = data.as_object_mut().unwrap().remove("random_seed").unwrap();
    assert_eq!(STANDARD.decode(seed.as_str().unwrap()).unwrap().len(), 512);
    let expected = json!({
        "uuid": "d8e02d56-2648-49a3-bf97-6be8f1204f38",
        "name": "My Server",
        "hostname": "my-server",
        "launch_index": 3,
        "availability_zone": "nova",
        "project_id": "f7ac731cc11f40efbc03a9f9e1d1d21f",
        "meta": {"role": "web"},
        "public_keys": {"mykey": "ssh-ed25519 AAAA me"},
        "keys": [{"name": "mykey", "type": "ssh", "data": "ssh-ed25519 AAAA me"}],
        "devices": [],
        "dedicated_cpus": [],
    });
    assert_eq!(data, expected);
    let first = json_at("/openstack/2012-08-10/meta_data.json");
    for later in ["random_seed", "project_id", "devices", "dedicated_cpus"] {
        assert!(first.get(later).is_none(), "{later}");
    }
}

#[test]
fn network_data_has_novas_fields() {
    let expected = json!({
        "links": [
            {"id": "tap01000000000", "vif_id": "01000000-0000-0000-0000-000000000000", "type": "bridge", "mtu": 1450,
             "ethernet_mac_address": "fa:16:3e:00:00:01"},
            {"id": "tap02000000000", "vif_id": "02000000-0000-0000-0000-000000000000", "type": "bridge", "mtu": 1450,
             "ethernet_mac_address": "fa:16:3e:00:00:02"},
        ],
        "networks": [
            {"id": "network0", "type": "ipv4_dhcp", "link": "tap01000000000",
             "network_id": "00000000-0000-0000-0000-000000000001"},
            {"id": "network1", "type": "ipv4", "link": "tap02000000000",
             "network_id": "00000000-0000-0000-0000-000000000002",
             "ip_address": "10.0.2.5", "netmask": "255.255.255.0",
             "routes": [
                 {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.2.1"},
                 {"network": "10.9.0.0", "netmask": "255.255.0.0", "gateway": "10.0.0.7"},
             ],
             "services": [{"type": "dns", "address": "9.9.9.9"}]},
        ],
        "services": [{"type": "dns", "address": "9.9.9.9"}],
    });
    assert_eq!(json_at("/openstack/2018-08-27/network_data.json"), expected);
    assert_eq!(lookup(&guest(), "/openstack/2013-10-17/network_data.json"), None);
}

#[test]
fn network_data_says_how_ipv6_addresses_are_got() {
    for (mode, kind) in [
        (None, "ipv6"),
        (Some(Ipv6Mode::Slaac), "ipv6_slaac"),
        (Some(Ipv6Mode::Dhcpv6Stateful), "ipv6_dhcpv6-stateful"),
        (Some(Ipv6Mode::Dhcpv6Stateless), "ipv6_dhcpv6-stateless"),
    ] {
        let id = SubnetId(Uuid::from_u128(7));
        let subnet = SubnetV6Spec {
            id,
            cidr: "fd00::/64".parse().unwrap(),
            gateway_ip: Some("fd00::1".parse().unwrap()),
            ra_mode: mode,
            address_mode: mode,
            dns_nameservers: vec!["fd00::53".parse().unwrap()],
        };
        let fixed = FixedIpV6 { subnet_id: id, ip_address: "fd00::5".parse().unwrap() };
        let port = PortSpec { fixed_ips_v6: vec![fixed], ..PortSpec::default() };
        let network = NetworkSpec { subnets_v6: vec![subnet], ..NetworkSpec::default() };
        let data = Guest::new(&guest().metadata, Some(&port), &[(&network, &port)]).network_data;
        let dns = json!([{"type": "dns", "address": "fd00::53"}]);
        let expected = json!([{
            "id": "network0",
            "type": kind,
            "link": "tap00000000000",
            "network_id": "00000000-0000-0000-0000-000000000000",
            "ip_address": "fd00::5",
            "netmask": "ffff:ffff:ffff:ffff::",
            "routes": [{"network": "::", "netmask": "::", "gateway": "fd00::1"}],
            "services": dns,
        }]);
        assert_eq!((&data["networks"], &data["services"]), (&expected, &dns));
    }
}

#[test]
fn user_and_vendor_data_are_served() {
    for path in
        ["/openstack/latest/user_data", "/latest/user-data", "/2009-04-04/user-data", "/ec2/latest/user-data"]
    {
        assert_eq!(lookup(&guest(), path).unwrap().body, b"#!/bin/sh\n\xff", "{path}");
    }
    assert_eq!(json_at("/openstack/latest/vendor_data.json"), json!({}));
    assert_eq!(json_at("/openstack/latest/vendor_data2.json"), json!({"static": {}}));
    let mut without = guest();
    without.user_data = None;
    assert_eq!(lookup(&without, "/openstack/latest/user_data"), None);
    assert_eq!(lookup(&without, "/latest/user-data"), None);
    assert_eq!(lookup(&without, "/latest").unwrap().body, b"meta-data/");
}

#[test]
fn ec2_tree_is_listed_and_its_leaves_are_served() {
    assert_eq!(text("/latest/"), "meta-data/\nuser-data");
    let names = "ami-launch-index\nblock-device-mapping/\nhostname\ninstance-action\ninstance-id\nlocal-hostname\n\
                 local-ipv4\nplacement/\npublic-hostname\npublic-keys/";
    assert_eq!(text("/latest/meta-data/"), names);
    let leaves = [
        ("ami-launch-index", "3"),
        ("block-device-mapping", "ami\nephemeral0\nroot\nswap"),
        ("block-device-mapping/swap", "/dev/vdc"),
        ("block-device-mapping/root", "/dev/vda"),
        ("hostname", "my-server"),
        ("instance-id", "i-d8e02d56"),
        ("local-hostname", "my-server"),
        ("local-ipv4", "10.0.1.5"),
        ("placement", "availability-zone"),
        ("placement/availability-zone", "nova"),
        ("public-keys", "0=mykey"),
        ("public-keys/0", "openssh-key"),
        ("public-keys/0/openssh-key", "ssh-ed25519 AAAA me"),
    ];
    for (path, expected) in leaves {
        assert_eq!(text(&format!("/latest/meta-data/{path}")), expected, "{path}");
        assert_eq!(text(&format!("/2009-04-04//meta-data/{path}/")), expected, "{path}");
    }
}

#[test]
fn what_is_not_there_is_not_found() {
    let paths = [
        "/openstack/1999-01-01/meta_data.json",
        "/openstack/latest/password",
        "/openstack/latest/meta_data.json/x",
        "/openstack/latest/../latest/meta_data.json",
        "/latest/meta-data/ami-id",
        "/latest/meta-data/public-keys/1/openssh-key",
        "/latest/meta-data/public-keys/mykey",
        "/latest/meta-data/hostname/x",
        "/latest/meta-data/a/b/c/d/e/f/g/h/i/j",
        "/latest/api/token",
        "/index.html",
    ];
    for path in paths {
        assert_eq!(lookup(&guest(), path), None, "{path}");
    }
}

proptest! {
    #[test]
    fn arbitrary_paths_never_panic(path in "(/(openstack|latest|meta-data|public-keys|0|\\PC{0,8})){0,10}") {
        let _ = lookup(&guest(), &path);
    }
}

#[test]
fn a_config_drive_has_the_services_documents_in_the_layouts_that_are_looked_for() {
    let guest = guest();
    let files: std::collections::BTreeMap<_, _> = config_drive(&guest).into_iter().collect();
    let names = ["meta_data.json", "network_data.json", "user_data", "vendor_data.json", "vendor_data2.json"];
    let mut expected: Vec<String> = ["2009-04-04", "latest"]
        .iter()
        .flat_map(|v| ["meta-data.json", "user-data"].map(|n| format!("ec2/{v}/{n}")))
        .collect();
    expected
        .extend(["2018-08-27", "latest"].iter().flat_map(|v| names.map(|n| format!("openstack/{v}/{n}"))));
    assert_eq!(files.keys().cloned().collect::<Vec<_>>(), expected);
    for (path, body) in &files {
        if path.ends_with("/meta_data.json") || path.starts_with("ec2/") && path.ends_with(".json") {
            continue;
        }
        assert_eq!(*body, lookup(&guest, path).unwrap().body, "{path}");
    }
    let json = |path: &str| serde_json::from_slice::<Value>(&files[path]).unwrap();
    let (mut drive, mut service) = (
        json("openstack/latest/meta_data.json"),
        serde_json::from_slice::<Value>(&lookup(&guest, "openstack/latest/meta_data.json").unwrap().body)
            .unwrap(),
    );
    for data in [&mut drive, &mut service] {
        assert!(data.as_object_mut().unwrap().remove("random_seed").is_some());
    }
    assert_eq!(drive, service);
    assert_eq!(json("openstack/latest/vendor_data.json"), json!({}));
    let ec2 = json("ec2/latest/meta-data.json");
    assert_eq!(ec2["public-keys"], json!({"0": {"openssh-key": "ssh-ed25519 AAAA me"}}));
    assert_eq!(
        (&ec2["hostname"], &ec2["placement"]["availability-zone"]),
        (&json!("my-server"), &json!("nova"))
    );
}

#[test]
fn a_certificate_is_told_as_one() {
    let mut metadata = guest().metadata;
    let certificate = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----";
    metadata.public_keys = [("k".to_owned(), certificate.to_owned())].into();
    let files: std::collections::BTreeMap<_, _> =
        config_drive(&Guest::of_server(&metadata, &[], &[])).into_iter().collect();
    let data: Value = serde_json::from_slice(&files["openstack/latest/meta_data.json"]).unwrap();
    assert_eq!(data["keys"], json!([{"name": "k", "type": "x509", "data": certificate}]));
}

#[test]
fn a_server_without_ports_and_user_data_has_a_config_drive_as_well() {
    let mut metadata = guest().metadata;
    metadata.user_data = None;
    let guest = Guest::of_server(&metadata, &[], &[]);
    let files: std::collections::BTreeMap<_, _> = config_drive(&guest).into_iter().collect();
    assert!(!files.keys().any(|path| path.contains("user")), "{:?}", files.keys());
    let network: Value = serde_json::from_slice(&files["openstack/latest/network_data.json"]).unwrap();
    assert_eq!(network, json!({"links": [], "networks": [], "services": []}));
}
