//! Addresses: IPAM under load, IPv6, subnet pools.

use std::collections::BTreeSet;

use super::*;

#[tokio::test]
async fn many_parallel_port_creations_never_share_an_address_nor_leak_one() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    // 126 addresses: one is the gateway's, one the service's.
    let subnet = ada.subnet(&network, "10.0.0.0/25").await;
    let body = json!({"port": {"network_id": network}});
    let all = futures_util::future::join_all((0..150).map(|_| ada.post("ports", body.clone()))).await;
    let (made, full): (Vec<_>, Vec<_>) = all.into_iter().partition(|answer| answer.status == 201);
    assert_eq!((made.len(), full.len()), (124, 26));
    for answer in full {
        refused(answer, 409, "IpAddressGenerationFailure");
    }
    let ports: Vec<Value> = made.into_iter().map(|answer| answer.json()["port"].take()).collect();
    let ips: BTreeSet<&str> =
        ports.iter().map(|port| port["fixed_ips"][0]["ip_address"].as_str().unwrap()).collect();
    assert_eq!(ips.len(), 124);
    // What failed left nothing: 124 ports, the service's, and as many addresses.
    let rows: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM fixed_ips WHERE subnet_id = $1")
        .bind(&subnet)
        .fetch_one(&test.app.db)
        .await
        .unwrap();
    assert_eq!(rows, 125);
    let listed = ada.get(&format!("ports?network_id={network}&fields=id")).await.expect(200);
    assert_eq!(listed["ports"].as_array().unwrap().len(), 125);
    // Freed addresses are given out again, deletions and creations at the same time.
    let gone: Vec<String> = ports.iter().take(50).map(id).collect();
    let deletions = gone.iter().map(|port| ada.delete_port(port));
    let creations = (0..50).map(|_| async { ada.post("ports", body.clone()).await.status });
    let (deleted, _) =
        tokio::join!(futures_util::future::join_all(deletions), futures_util::future::join_all(creations));
    assert!(deleted.iter().all(|answer| answer.status == 204));
    let (rows, distinct): (i64, i64) =
        sqlx::query_as("SELECT COUNT(*), COUNT(DISTINCT ip) FROM fixed_ips WHERE subnet_id = $1")
            .bind(&subnet)
            .fetch_one(&test.app.db)
            .await
            .unwrap();
    assert_eq!(rows, distinct);
    let orphans: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM fixed_ips WHERE port_id NOT IN (SELECT id FROM ports)")
            .fetch_one(&test.app.db)
            .await
            .unwrap();
    assert_eq!(orphans, 0);
}

#[tokio::test]
async fn one_address_that_many_ask_for_goes_to_one() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let body = json!({"port": {"network_id": network, "fixed_ips": [{"ip_address": "10.0.0.77"}]}});
    let all = futures_util::future::join_all((0..20).map(|_| ada.post("ports", body.clone()))).await;
    let (made, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|answer| answer.status == 201);
    assert_eq!(made.len(), 1);
    for answer in others {
        refused(answer, 409, "IpAddressAlreadyAllocated");
    }
}

#[tokio::test]
async fn ipv6_addresses_follow_from_the_mac_or_from_the_pool() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let mac = "fa:16:3e:33:44:55";
    let early = ada.port(&network, json!({ "mac_address": mac })).await;
    let body = json!({"network_id": network, "ip_version": 6, "cidr": "2001:db8::/64",
                      "ipv6_address_mode": "slaac", "ipv6_ra_mode": "slaac", "dns_nameservers": ["2001:db8::53"]});
    let slaac = ada.make("subnets", "subnet", body).await;
    assert_eq!(slaac["gateway_ip"], "2001:db8::1");
    // A port that was there before gets its address, too.
    let early = ada.get(&format!("ports/{}", id(&early))).await.expect(200);
    let ips = |port: &Value| -> Vec<String> {
        let ips = port["fixed_ips"].as_array().unwrap();
        ips.iter().map(|ip| ip["ip_address"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ips(&early["port"])[1], "2001:db8::f816:3eff:fe33:4455");
    let wrong = json!({"port": {"network_id": network, "fixed_ips": [{"ip_address": "2001:db8::5"}]}});
    refused(ada.post("ports", wrong).await, 400, "AllocationOnAutoAddressSubnet");
    let body = json!({"network_id": network, "ip_version": 6, "cidr": "2001:db8:1::/64",
                      "ipv6_address_mode": "dhcpv6-stateful", "ipv6_ra_mode": "dhcpv6-stateful"});
    ada.make("subnets", "subnet", body).await;
    let port = ada.port(&network, json!({})).await;
    let ips = ips(&port);
    assert_eq!(ips.len(), 3, "{ips:?}");
    assert!(ips[0].starts_with("10.0.0.") && ips[1].starts_with("2001:db8:1::"), "{ips:?}");
    assert!(ips[2].contains("ff:fe"), "{ips:?}");
    // Deleting the subnet takes the addresses along.
    ada.delete(&format!("subnets/{}", id(&slaac))).await.expect(204);
    let port = ada.get(&format!("ports/{}", id(&port))).await.expect(200);
    assert_eq!(port["port"]["fixed_ips"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn ipv6_subnets_that_make_no_sense_are_refused() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    for (more, kind) in [
        (json!({"cidr": "2001:db8::/64", "ip_version": 4}), "InvalidInput"),
        (json!({"cidr": "10.0.0.0/24", "ipv6_ra_mode": "slaac"}), "InvalidInput"),
        (
            json!({"cidr": "2001:db8::/64", "ipv6_ra_mode": "slaac", "ipv6_address_mode": "dhcpv6-stateful"}),
            "InvalidInput",
        ),
        (json!({"cidr": "2001:db8::/80", "ipv6_ra_mode": "slaac"}), "InvalidInput"),
        (json!({"cidr": "2001:db8::/64", "ipv6_ra_mode": "slaac", "enable_dhcp": false}), "InvalidInput"),
        (json!({"cidr": "2001:db8::/64", "ipv6_ra_mode": "magic"}), "HTTPBadRequest"),
        (json!({"cidr": "2001:db8::/48"}), "HTTPBadRequest"),
        (json!({"cidr": "fe80::/64"}), "HTTPBadRequest"),
        (json!({"cidr": "2001:db8::/64", "dns_nameservers": ["192.0.2.1"]}), "HTTPBadRequest"),
        (json!({"cidr": "10.0.0.0/24", "gateway_ip": "10.1.0.1"}), "HTTPBadRequest"),
        (json!({}), "BadRequest"),
    ] {
        let mut body = json!({"network_id": network});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        refused(ada.post("subnets", json!({"subnet": body})).await, 400, kind);
    }
    let small = id(&ada.make("networks", "network", json!({"mtu": 1000})).await);
    let body = json!({"subnet": {"network_id": small, "cidr": "2001:db8::/64"}});
    refused(ada.post("subnets", body).await, 400, "InvalidInput");
}

#[tokio::test]
async fn subnets_come_out_of_pools() {
    let test = TestApp::new().await;
    let (ada, eve, admin) =
        (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await, Client::admin(&test));
    let body =
        json!({"name": "p", "prefixes": ["10.8.0.0/23"], "default_prefixlen": 24, "min_prefixlen": 24});
    let pool = ada.make("subnetpools", "subnetpool", body).await;
    assert_eq!((&pool["ip_version"], &pool["max_prefixlen"]), (&json!(4), &json!(32)));
    let network = ada.network("n").await;
    let subnet = |more: Value| {
        let mut body = json!({"network_id": network, "subnetpool_id": pool["id"], "ip_version": 4});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        json!({ "subnet": body })
    };
    let first = ada.post("subnets", subnet(json!({}))).await.expect(201);
    assert_eq!(first["subnet"]["cidr"], "10.8.0.0/24");
    assert_eq!(first["subnet"]["subnetpool_id"], pool["id"]);
    refused(
        ada.post("subnets", subnet(json!({"prefixlen": 20}))).await,
        400,
        "MinPrefixSubnetAllocationError",
    );
    refused(ada.post("subnets", subnet(json!({"cidr": "10.8.0.0/25"}))).await, 409, "SubnetAllocationError");
    let second = ada.post("subnets", subnet(json!({"prefixlen": 25}))).await.expect(201);
    assert_eq!(second["subnet"]["cidr"], "10.8.1.0/25");
    refused(ada.post("subnets", subnet(json!({}))).await, 409, "SubnetAllocationError");
    let path = format!("subnetpools/{}", id(&pool));
    refused(ada.delete(&path).await, 409, "SubnetPoolDeleteError");
    let shrink = json!({"subnetpool": {"prefixes": ["10.9.0.0/23"]}});
    refused(ada.put(&path, shrink).await, 400, "IllegalSubnetPoolUpdate");
    let grow = json!({"subnetpool": {"prefixes": ["10.8.0.0/23", "10.9.0.0/24"]}});
    ada.put(&path, grow).await.expect(200);
    let third = ada.post("subnets", subnet(json!({}))).await.expect(201);
    assert_eq!(third["subnet"]["cidr"], "10.9.0.0/24");
    refused(eve.get(&path).await, 404, "SubnetPoolNotFound");
    let wrong = json!({"subnetpool": {"name": "w", "prefixes": ["10.0.0.0/8"], "min_prefixlen": 30, "max_prefixlen": 20}});
    refused(ada.post("subnetpools", wrong).await, 400, "IllegalSubnetPoolPrefixBounds");
    let mixed = json!({"subnetpool": {"name": "w", "prefixes": ["10.0.0.0/8", "fd00::/48"]}});
    refused(ada.post("subnetpools", mixed).await, 400, "PrefixVersionMismatch");
    // The default pool of an admin.
    let hers = eve.network("n").await;
    let by_default = json!({"subnet": {"network_id": hers, "ip_version": 6, "use_default_subnetpool": true}});
    refused(eve.post("subnets", by_default.clone()).await, 404, "DefaultSubnetPoolNotFound");
    let body = json!({"name": "v6", "prefixes": ["fd00::/48"], "is_default": true, "shared": true});
    admin.make("subnetpools", "subnetpool", body).await;
    assert_eq!(eve.post("subnets", by_default).await.expect(201)["subnet"]["cidr"], "fd00::/64");
}
