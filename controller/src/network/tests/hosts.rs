//! What hosts are told, and which of them.

use mote_host_api::{GatewayPlace, Remote, SegmentSpec};

use super::*;
use crate::{
    db::now_us,
    network::{
        desired::{self, HostNetworks},
        gateways,
        ports::server::{self, NicWish, PluggedServer},
    },
};

async fn host(test: &TestApp, number: i64) -> String {
    connected_host(test, number, &["public"]).await
}

async fn connected_host(test: &TestApp, number: i64, physical: &[&str]) -> String {
    let id = uuid::Uuid::new_v4().to_string();
    let mut tx = test.app.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO hosts (id, number, name, availability_zone, own_zone, secret_hash, vcpus, memory_mib, disk_gib, kernel,
             version, traits, last_seen_us, created_us, tunnel_ip, physical_networks)
         VALUES ($1, $2, $3, 'nova', 'nova', '', 8, 1024, 100, '', '', '[]', $4, $4, $5, $6)",
    )
    .bind(&id)
    .bind(number)
    .bind(format!("h{number}"))
    .bind(now_us())
    .bind(format!("192.0.2.{number}"))
    .bind(json!(physical).to_string())
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    id
}

/// A server on a host with a NIC; gives its id and that of its port.
async fn plugged(client: &Client<'_>, host: &str, network: &str, groups: &[String]) -> (String, String) {
    let id = uuid::Uuid::new_v4().to_string();
    let mut tx = client.test.app.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index, availability_zone,
             host_id, desired_power, run_generation, changed_generation, vm_state, created_us, updated_us)
         VALUES ($1, $2, 'u', 's', 'web', 'f', 'small', 1, 64, 0, 0, 'i', '{}', '{}', 'never', 0, 'nova', $3,
             'running', 1, 1, 'active', $4, $4)",
    )
    .bind(&id)
    .bind(&client.project)
    .bind(host)
    .bind(now_us())
    .execute(&mut *tx)
    .await
    .unwrap();
    let server =
        PluggedServer { id: &id, project_id: &client.project, zone: "nova", security_groups: groups };
    let wish = NicWish::Network { id: network.to_owned(), fixed_ip: None };
    let _ = server::plug(&mut tx, &server, &[wish]).await.unwrap();
    let port = sqlx::query_scalar("SELECT id FROM ports WHERE server_id = $1")
        .bind(&id)
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    (id, port)
}

async fn told(test: &TestApp, host: &str) -> HostNetworks {
    let mut db = test.app.db.acquire().await.unwrap();
    let servers: Vec<String> =
        sqlx::query_scalar("SELECT id FROM servers WHERE host_id = $1 AND NOT deleting")
            .bind(host)
            .fetch_all(&mut *db)
            .await
            .unwrap();
    desired::read(&mut db, host, &servers).await.unwrap()
}

async fn generations(test: &TestApp, hosts: &[&String]) -> Vec<i64> {
    let mut found = Vec::new();
    for host in hosts {
        let sql = "SELECT generation FROM hosts WHERE id = $1";
        found.push(sqlx::query_scalar(sql).bind(host).fetch_one(&test.app.db).await.unwrap());
    }
    found
}

/// Which of the hosts got a new generation by what is done.
async fn touched(test: &TestApp, hosts: &[&String], done: impl Future<Output = ()>) -> Vec<bool> {
    let before = generations(test, hosts).await;
    done.await;
    let after = generations(test, hosts).await;
    before.into_iter().zip(after).map(|(before, after)| after > before).collect()
}

#[tokio::test]
async fn a_host_is_told_its_ports_filters_and_neighbours_and_nothing_else() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let (a, b, c) = (host(&test, 1).await, host(&test, 2).await, host(&test, 3).await);
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let web = id(&ada.make("security-groups", "security_group", json!({"name": "web"})).await);
    let rule = json!({"security_group_id": web, "direction": "ingress", "remote_group_id": web, "protocol": "tcp",
                      "port_range_min": 80, "port_range_max": 81});
    ada.make("security-group-rules", "security_group_rule", rule).await;
    let (_, port_a) = plugged(&ada, &a, &network, std::slice::from_ref(&web)).await;
    let (server_b, port_b) = plugged(&ada, &b, &network, std::slice::from_ref(&web)).await;
    let other = ada.network("other").await;
    ada.subnet(&other, "10.9.0.0/24").await;
    plugged(&ada, &c, &other, &[]).await;
    let state = told(&test, &a).await;
    assert_eq!(state.tunnel.unwrap().local_ip.to_string(), "192.0.2.1");
    let [spec] = &state.networks[..] else { panic!("{state:?}") };
    assert!(matches!(spec.segment, Some(SegmentSpec::Vxlan { vni }) if vni > 0));
    assert_eq!(
        spec.ports.iter().map(|port| port.id.to_string()).collect::<Vec<_>>(),
        std::slice::from_ref(&port_a)
    );
    assert!(spec.ports[0].port_security);
    assert_eq!(spec.remote_ports.len(), 1);
    assert_eq!(spec.remote_ports[0].tunnel_ip.to_string(), "192.0.2.2");
    assert_eq!(spec.dns_names.len(), 2);
    let [group] = &state.security_groups[..] else { panic!("{state:?}") };
    assert_eq!((group.id.to_string(), group.rules.len(), group.stateful), (web.clone(), 3, true));
    assert!(
        group
            .rules
            .iter()
            .any(|rule| matches!(rule.remote, Some(Remote::Set(set)) if set.to_string() == web))
    );
    let [set] = &state.address_sets[..] else { panic!("{state:?}") };
    assert_eq!(set.addresses.len(), 2);
    assert_eq!(told(&test, &c).await.networks[0].id.to_string(), other);

    let hosts = [&a, &b, &c];
    let rule = json!({"security_group_id": web, "direction": "ingress", "protocol": "icmp"});
    let by_rule = touched(&test, &hosts, async {
        ada.make("security-group-rules", "security_group_rule", rule).await;
    });
    assert_eq!(by_rule.await, [true, true, false]);
    let by_pair = touched(&test, &hosts, async {
        let body = json!({"port": {"allowed_address_pairs": [{"ip_address": "10.0.0.240/28"}]}});
        ada.put(&format!("ports/{port_b}"), body).await.expect(200);
    });
    assert_eq!(by_pair.await, [true, true, false]);
    assert_eq!(told(&test, &a).await.address_sets[0].addresses.len(), 3);
    let by_subnet = touched(&test, &hosts, async {
        ada.subnet(&other, "10.8.0.0/24").await;
    });
    assert_eq!(by_subnet.await, [false, false, true]);
    // A port that is nowhere yet matters to those whose rules name its group.
    let lone = touched(&test, &hosts, async {
        ada.port(&other, json!({"security_groups": [web]})).await;
    });
    assert_eq!(lone.await, [true, true, false]);
    let by_name = touched(&test, &hosts, async {
        ada.put(&format!("security-groups/{web}"), json!({"security_group": {"name": "www"}}))
            .await
            .expect(200);
    });
    assert_eq!(by_name.await, [false, false, false]);
    // A server that leaves is told to the others.
    let mut tx = test.app.begin().await.unwrap();
    let others = server::touch_others(&mut tx, &server_b).await.unwrap();
    sqlx::query("UPDATE servers SET deleting = TRUE WHERE id = $1")
        .bind(&server_b)
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    assert_eq!(
        others.iter().map(|touched| touched.0.to_string()).collect::<Vec<_>>(),
        std::slice::from_ref(&a)
    );
    assert!(told(&test, &a).await.networks[0].remote_ports.is_empty());
}

#[tokio::test]
async fn routers_are_on_every_host_that_needs_them_and_their_gateway_on_one() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let (a, b, c) = (host(&test, 1).await, host(&test, 2).await, host(&test, 3).await);
    let (external, _) = admin.external().await;
    let (one, two) = (ada.network("one").await, ada.network("two").await);
    let (subnet_one, subnet_two) =
        (ada.subnet(&one, "10.1.0.0/24").await, ada.subnet(&two, "10.2.0.0/24").await);
    let (_, port) = plugged(&ada, &a, &one, &[]).await;
    plugged(&ada, &b, &two, &[]).await;
    let body = json!({"external_gateway_info": {"network_id": external}});
    let router = id(&ada.make("routers", "router", body).await);
    let path = format!("routers/{router}/add_router_interface");
    let hosts = [&a, &b, &c];
    let joined = touched(&test, &hosts, async {
        ada.put(&path, json!({"subnet_id": subnet_one})).await.expect(200);
        ada.put(&path, json!({"subnet_id": subnet_two})).await.expect(200);
    });
    let joined = joined.await;
    assert!(joined[0] && joined[1], "{joined:?}");
    // On a and b: both networks, the router with both interfaces, the other's port as a remote one.
    for (host, own, other) in [(&a, &one, &two), (&b, &two, &one)] {
        let state = told(&test, host).await;
        let of = |id: &String| state.networks.iter().find(|network| network.id.to_string() == *id).unwrap();
        assert_eq!((of(own).ports.len(), of(own).remote_ports.len()), (1, 0));
        assert_eq!((of(other).ports.len(), of(other).remote_ports.len()), (0, 1));
        assert_eq!(state.routers[0].interfaces.len(), 2);
        assert_eq!(state.routers[0].interfaces[0].addresses[0].prefix_len(), 24);
    }
    let floating = ada.make("floatingips", "floatingip", json!({"floating_network_id": external})).await;
    let associate = json!({"floatingip": {"port_id": port}});
    ada.put(&format!("floatingips/{}", id(&floating)), associate).await.expect(200);
    let holder: String = sqlx::query_scalar("SELECT gateway_host_id FROM routers WHERE id = $1")
        .bind(&router)
        .fetch_one(&test.app.db)
        .await
        .unwrap();
    for host in hosts {
        let state = told(&test, host).await;
        if *host != holder && *host == c {
            assert_eq!(state.routers, []);
            continue;
        }
        let gateway = state.routers[0].gateway.as_ref().unwrap();
        assert_eq!(gateway.place == GatewayPlace::Here, *host == holder);
        assert_eq!(gateway.next_hop.unwrap().to_string(), "203.0.113.1");
        assert_eq!(gateway.floating_ips.len(), 1);
        let outside = state.networks.iter().any(|network| network.id.to_string() == external);
        assert_eq!(outside, *host == holder);
    }
    // The holder is lost: another host's report moves the gateway.
    let heir = hosts.into_iter().find(|host| **host != holder).unwrap();
    let mut tx = test.app.begin().await.unwrap();
    let number: i64 = sqlx::query_scalar("SELECT number FROM hosts WHERE id = $1")
        .bind(heir)
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    let ip = format!("192.0.2.{number}").parse().ok();
    assert_eq!(gateways::heard(&mut tx, heir, ip).await.unwrap(), []);
    sqlx::query("UPDATE hosts SET last_seen_us = 0 WHERE id = $1")
        .bind(&holder)
        .execute(&mut *tx)
        .await
        .unwrap();
    assert!(!gateways::heard(&mut tx, heir, ip).await.unwrap().is_empty());
    let now: String = sqlx::query_scalar("SELECT gateway_host_id FROM routers WHERE id = $1")
        .bind(&router)
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    assert_ne!(now, holder);
    assert_eq!(told(&test, &now).await.routers[0].gateway.as_ref().unwrap().place, GatewayPlace::Here);
}

#[tokio::test]
async fn ipv6_and_qos_reach_the_host() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let a = host(&test, 1).await;
    let policy = id(&admin.make("qos/policies", "policy", json!({"name": "p", "shared": true})).await);
    let rule = json!({"bandwidth_limit_rule": {"max_kbps": 1000}});
    admin.post(&format!("qos/policies/{policy}/bandwidth_limit_rules"), rule).await.expect(201);
    let body = json!({"name": "n", "qos_policy_id": policy});
    let network = id(&ada.make("networks", "network", body).await);
    ada.subnet(&network, "10.0.0.0/24").await;
    let body = json!({"network_id": network, "ip_version": 6, "cidr": "fd00::/64", "ipv6_ra_mode": "slaac",
                      "ipv6_address_mode": "slaac"});
    ada.make("subnets", "subnet", body).await;
    plugged(&ada, &a, &network, &[]).await;
    let state = told(&test, &a).await;
    let port = &state.networks[0].ports[0];
    assert_eq!((port.fixed_ips.len(), port.fixed_ips_v6.len()), (1, 1));
    assert_eq!(port.qos.as_ref().unwrap().egress.unwrap().max_kbps, 1000);
    let subnet = &state.networks[0].subnets_v6[0];
    let slaac = Some(mote_host_api::Ipv6Mode::Slaac);
    assert_eq!((subnet.ra_mode, subnet.address_mode), (slaac, slaac));
    let path = format!("qos/policies/{policy}/dscp_marking_rules");
    let hosts = [&a];
    let by_mark = touched(&test, &hosts, async {
        admin.post(&path, json!({"dscp_marking_rule": {"dscp_mark": 46}})).await.expect(201);
    });
    assert_eq!(by_mark.await, [true]);
    assert_eq!(told(&test, &a).await.networks[0].ports[0].qos.as_ref().unwrap().dscp_mark, Some(46));
}

#[tokio::test]
async fn all_gateways_of_a_router_are_on_a_host_that_is_connected_to_all_their_networks() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let (external, _) = admin.external().await;
    let (second, _) = admin.external_at("second", "198.18.0.0/24").await;
    let poor = host(&test, 1).await;
    let network = ada.network("n").await;
    let subnet = ada.subnet(&network, "10.0.0.0/24").await;
    let info = json!({"external_gateway_info": {"network_id": external}});
    let router = id(&ada.make("routers", "router", info).await);
    let path = format!("routers/{router}");
    ada.put(&format!("{path}/add_router_interface"), json!({"subnet_id": subnet})).await.expect(200);
    let (_, port) = plugged(&ada, &poor, &network, &[]).await;
    assert_eq!(told(&test, &poor).await.routers[0].gateway.as_ref().unwrap().place, GatewayPlace::Here);
    // A second gateway doesn't take the first one away.
    let add = format!("{path}/add_external_gateways");
    let more = json!({"router": {"external_gateways": [{"network_id": second}]}});
    let text = refused(ada.put(&add, more.clone()).await, 400, "UnableToAddExtraGateways");
    assert!(text.contains("connected to all"), "{text}");
    assert!(told(&test, &poor).await.routers[0].extra_gateways.is_empty());
    let rich = connected_host(&test, 2, &["public", "second"]).await;
    let hosts = [&poor, &rich];
    let heard = touched(&test, &hosts, async {
        ada.put(&add, more).await.expect(200);
    });
    assert_eq!(heard.await, [true, true]);
    // Each gateway has the floating IPs of its network.
    for network in [&second, &external] {
        let body = json!({"floating_network_id": network, "port_id": port});
        ada.make("floatingips", "floatingip", body).await;
    }
    let body = json!({"router": {"enable_default_route_ecmp": true}});
    admin.put(&path, body).await.expect(200);
    for host in hosts {
        let state = told(&test, host).await;
        let router = &state.routers[0];
        assert!(router.default_route_ecmp);
        let hops: Vec<_> = router.gateways().map(|gateway| gateway.next_hop.unwrap().to_string()).collect();
        assert_eq!(hops, ["203.0.113.1", "198.18.0.1"]);
        for (gateway, prefix) in router.gateways().zip(["203.0.113.", "198.18.0."]) {
            assert_eq!(gateway.place == GatewayPlace::Here, *host == rich);
            let [floating] = &gateway.floating_ips[..] else { panic!("{gateway:?}") };
            assert!(floating.floating_ip_address.to_string().starts_with(prefix));
        }
        for outside in [&external, &second] {
            let knows = state.networks.iter().any(|network| network.id.to_string() == *outside);
            assert_eq!(knows, *host == rich);
        }
    }
    // The first becomes the second, and nothing moves.
    let swapped =
        json!({"router": {"external_gateways": [{"network_id": second}, {"network_id": external}]}});
    ada.put(&format!("{path}/update_external_gateways"), swapped).await.expect(200);
    let state = told(&test, &rich).await;
    let networks: Vec<_> =
        state.routers[0].gateways().map(|gateway| gateway.network_id.to_string()).collect();
    assert_eq!(networks, [second.clone(), external.clone()]);
    // The host is lost, and another one like it comes.
    let heir = connected_host(&test, 3, &["second", "public"]).await;
    let mut tx = test.app.begin().await.unwrap();
    let lost = "UPDATE hosts SET last_seen_us = 0 WHERE id = $1";
    sqlx::query(lost).bind(&rich).execute(&mut *tx).await.unwrap();
    assert!(
        !gateways::heard(&mut tx, &poor, "192.0.2.1".parse().ok()).await.unwrap().is_empty(),
        "the gateways move"
    );
    tx.commit().await.unwrap();
    let state = told(&test, &heir).await;
    assert_eq!(state.routers[0].gateways().filter(|g| g.place == GatewayPlace::Here).count(), 2);
}
