//! Metadata, addresses and NICs of a server.

use super::*;
use crate::hosts::fake::as_wanted;

#[tokio::test]
async fn metadata_is_added_to_replaced_and_removed_and_told_to_the_host() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let path = format!("/{id}/metadata");
    let body = json!({"metadata": {"a": "1", "b": "2"}});
    let url = format!("{SERVERS}{path}");
    cloud.test.post(&url, &cloud.token, body.clone()).await.expect(200);
    let more = cloud.test.post(&url, &cloud.token, json!({"metadata": {"c": "3"}})).await.expect(200);
    assert_eq!(more, json!({"metadata": {"a": "1", "b": "2", "c": "3"}}));
    let one = cloud.put(&format!("{path}/a"), json!({"meta": {"a": "9"}})).await.expect(200);
    assert_eq!(one, json!({"meta": {"a": "9"}}));
    assert_eq!(cloud.get(&format!("{path}/a")).await.expect(200), json!({"meta": {"a": "9"}}));
    assert_eq!(cloud.host.desired(&cloud.test, 0).await.servers[0].metadata.meta["a"], "9");
    cloud.delete(&format!("{path}/a")).await.expect(204);
    fault(cloud.get(&format!("{path}/a")).await, 404, "itemNotFound");
    fault(cloud.delete(&format!("{path}/a")).await, 404, "itemNotFound");
    fault(cloud.put(&format!("{path}/x"), json!({"meta": {"a": "9"}})).await, 400, "badRequest");
    assert_eq!(cloud.put(&path, body.clone()).await.expect(200), body);
    assert_eq!(cloud.show(&id).await["metadata"], body["metadata"]);
    for wrong in [json!({"metadata": {"": "x"}}), json!({"metadata": {"a": 1}}), json!({"metadata": []})] {
        fault(cloud.put(&path, wrong).await, 400, "badRequest");
    }
}

#[tokio::test]
async fn addresses_are_listed_by_network() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let ips = cloud.get(&format!("/{id}/ips")).await.expect(200);
    let address = ips["addresses"]["net"][0].clone();
    assert_eq!(address.as_object().unwrap().len(), 2, "version and addr: {address}");
    assert_eq!(cloud.get(&format!("/{id}/ips/net")).await.expect(200), json!({"net": [address]}));
    fault(cloud.get(&format!("/{id}/ips/other")).await, 404, "itemNotFound");
    let nics = cloud.get(&format!("/{id}/os-interface")).await.expect(200);
    let nic = &nics["interfaceAttachments"][0];
    assert_eq!((&nic["net_id"], &nic["port_state"]), (&json!(cloud.network), &json!("ACTIVE")));
    assert_eq!(nic["fixed_ips"][0]["ip_address"], address["addr"]);
}

#[tokio::test]
async fn a_floating_ip_is_shown_behind_the_address_that_it_leads_to() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let port = cloud.get(&format!("/{id}/os-interface")).await.expect(200)["interfaceAttachments"][0].take();
    let admin = cloud.test.admin_token.clone();
    let post = async |what: &str, token: &str, body: Value| {
        cloud.test.post(&format!("/network/v2.0/{what}"), token, body).await.expect(201)
    };
    let outside = json!({"network": {"name": "outside", "router:external": true}});
    let outside = post("networks", &admin, outside).await["network"]["id"].take();
    let subnet =
        json!({"network_id": outside, "cidr": "203.0.113.0/24", "ip_version": 4, "enable_dhcp": false});
    post("subnets", &admin, json!({ "subnet": subnet })).await;
    let router = json!({"router": {"external_gateway_info": {"network_id": outside}}});
    let router = post("routers", &cloud.token, router).await["router"]["id"].take();
    let subnet = &port["fixed_ips"][0]["subnet_id"];
    let path = format!("/network/v2.0/routers/{}/add_router_interface", router.as_str().unwrap());
    let body = json!({ "subnet_id": subnet });
    cloud.test.call(Method::PUT, &path, &cloud.token, body).await.expect(200);
    let floating = json!({"floatingip": {"floating_network_id": outside, "port_id": port["port_id"]}});
    let floating =
        post("floatingips", &cloud.token, floating).await["floatingip"]["floating_ip_address"].take();

    let net = cloud.show(&id).await["addresses"]["net"].take();
    let kinds: Vec<_> = net.as_array().unwrap().iter().map(|address| &address["OS-EXT-IPS:type"]).collect();
    assert_eq!(kinds, [&json!("fixed"), &json!("floating")]);
    assert_eq!(net[1]["addr"], floating);
    assert_eq!(net[1]["OS-EXT-IPS-MAC:mac_addr"], port["mac_addr"]);
    let ips = cloud.get(&format!("/{id}/ips/net")).await.expect(200);
    assert_eq!(ips["net"][1], json!({"version": 4, "addr": floating}));
    let found = async |ip: &Value| {
        let path = format!("{SERVERS}?ip={}", ip.as_str().unwrap().replace('.', "\\."));
        cloud.test.get(&path, &cloud.token).await.expect(200)["servers"].as_array().unwrap().len()
    };
    assert_eq!(
        (found(&net[0]["addr"]).await, found(&floating).await),
        (1, 0),
        "the filter knows ports' addresses"
    );
}

#[tokio::test]
async fn a_server_gets_another_address_on_a_network_of_its_own_and_loses_it() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let addresses = async || {
        let ips = cloud.get(&format!("/{id}/ips")).await.expect(200);
        let ips = ips["addresses"]["net"].as_array().cloned().unwrap_or_default();
        ips.iter().map(|ip| ip["addr"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = (addresses().await, cloud.host.desired(&cloud.test, 0).await.generation);
    cloud.act(&id, json!({"addFixedIp": {"networkId": cloud.network}})).await.expect(202);
    let after = addresses().await;
    assert_eq!((after.len(), &after[0]), (before.0.len() + 1, &before.0[0]));
    assert!(cloud.host.desired(&cloud.test, 0).await.generation > before.1, "the host hears of it");
    let gone = json!({"removeFixedIp": {"address": after[1]}});
    cloud.act(&id, gone.clone()).await.expect(202);
    assert_eq!(addresses().await, before.0);
    fault(cloud.act(&id, gone.clone()).await, 404, "itemNotFound");
    let nowhere = json!({"addFixedIp": {"networkId": "6dbd8f5b-0000-4000-8000-000000000001"}});
    fault(cloud.act(&id, nowhere).await, 404, "itemNotFound");
    fault(cloud.act(&id, json!({"removeFixedIp": {"address": "x"}})).await, 400, "badRequest");
    let path = format!("{SERVERS}/{id}/action");
    fault(cloud.test.post_at(&path, &cloud.token, 44, gone).await, 404, "itemNotFound");
}

#[tokio::test]
async fn a_port_of_ones_own_is_used_kept_and_free_again() {
    let cloud = Cloud::new().await;
    let body = json!({"port": {"network_id": cloud.network, "name": "mine"}});
    let port = cloud.test.post("/network/v2.0/ports", &cloud.token, body).await.expect(201);
    let port = port["port"]["id"].as_str().unwrap();
    let mut wish = cloud.wish("s");
    wish["server"]["networks"] = json!([{"port": port}]);
    let made = cloud.test.post(SERVERS, &cloud.token, wish.clone()).await.expect(202);
    let id = made["server"]["id"].as_str().unwrap();
    fault(cloud.test.post(SERVERS, &cloud.token, wish).await, 409, "conflictingRequest");
    cloud.settle().await;
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    let shown = cloud.test.get(&format!("/network/v2.0/ports/{port}"), &cloud.token).await.expect(200);
    assert_eq!((&shown["port"]["device_id"], &shown["port"]["name"]), (&json!(""), &json!("mine")));
}

/// The `status` of a port.
async fn status(cloud: &Cloud, port: &str) -> String {
    let shown = cloud.test.get(&format!("/network/v2.0/ports/{port}"), &cloud.token).await.expect(200);
    shown["port"]["status"].as_str().unwrap().to_owned()
}

/// The NICs of a server, with their states.
async fn nics(cloud: &Cloud, id: &str) -> Vec<(String, String)> {
    let listed = cloud.get(&format!("/{id}/os-interface")).await.expect(200);
    let text = |nic: &Value, name: &str| nic[name].as_str().unwrap().to_owned();
    let nics = listed["interfaceAttachments"].as_array().unwrap();
    nics.iter().map(|nic| (text(nic, "port_id"), text(nic, "port_state"))).collect()
}

async fn attach(cloud: &Cloud, id: &str, wish: Value) -> String {
    let wish = json!({ "interfaceAttachment": wish });
    let made = cloud.test.post(&format!("{SERVERS}/{id}/os-interface"), &cloud.token, wish).await.expect(200);
    made["interfaceAttachment"]["port_id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn nics_come_to_and_go_from_a_server_that_runs_when_its_host_says_so() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let body = json!({"port": {"network_id": cloud.network, "name": "mine"}});
    let own = cloud.test.post("/network/v2.0/ports", &cloud.token, body).await.expect(201);
    let own = own["port"]["id"].as_str().unwrap().to_owned();
    assert_eq!(attach(&cloud, &id, json!({"port_id": own})).await, own);
    let made = attach(&cloud, &id, json!({"net_id": cloud.network})).await;
    for port in [&own, &made] {
        assert!(nics(&cloud, &id).await.contains(&(port.clone(), "BUILD".into())));
        assert_eq!(status(&cloud, port).await, "BUILD");
    }
    let before = cloud.host.desired(&cloud.test, 0).await;
    let wanted: Vec<String> = before.servers[0].ports.iter().map(ToString::to_string).collect();
    assert_eq!((wanted.len(), &wanted[1..]), (3, [own.clone(), made.clone()].as_slice()));
    cloud.settle().await;
    assert_eq!(status(&cloud, &own).await, "ACTIVE");
    assert!(nics(&cloud, &id).await.iter().all(|(_, state)| state == "ACTIVE"));

    for port in [&own, &made] {
        cloud.delete(&format!("/{id}/os-interface/{port}")).await.expect(202);
        cloud.delete(&format!("/{id}/os-interface/{port}")).await.expect(202);
    }
    let after = cloud.host.desired(&cloud.test, 0).await;
    assert_eq!(after.servers[0].ports.len(), 1);
    assert_eq!(after.networks[0].ports.len(), 3, "its filter and its addresses stay until it is gone");
    // The host has heard of it, and its guest has not given them up yet.
    let mut clinging = as_wanted(&after.servers[0]);
    clinging.ports = Some(before.servers[0].ports.iter().copied().collect());
    cloud.host.report(&cloud.test, after.generation, vec![clinging.clone()]).await.expect(204);
    assert_eq!(nics(&cloud, &id).await.len(), 3);
    // What it said before it heard of it doesn't count.
    clinging.ports = Some([after.servers[0].ports[0]].into());
    cloud.host.report(&cloud.test, before.generation, vec![clinging.clone()]).await.expect(204);
    assert_eq!(nics(&cloud, &id).await.len(), 3);
    // Nor does a VMM whose NICs it doesn't know.
    clinging.ports = None;
    cloud.host.report(&cloud.test, after.generation, vec![clinging]).await.expect(204);
    assert_eq!(nics(&cloud, &id).await.len(), 3);
    let wish = json!({"interfaceAttachment": {"port_id": own}});
    let url = format!("{SERVERS}/{id}/os-interface");
    fault(cloud.test.post(&url, &cloud.token, wish).await, 409, "conflictingRequest");

    cloud.settle().await;
    assert_eq!(nics(&cloud, &id).await.len(), 1);
    cloud.test.get(&format!("/network/v2.0/ports/{made}"), &cloud.token).await.expect(404);
    let kept = cloud.test.get(&format!("/network/v2.0/ports/{own}"), &cloud.token).await.expect(200);
    assert_eq!((&kept["port"]["device_id"], &kept["port"]["status"]), (&json!(""), &json!("DOWN")));
    fault(cloud.delete(&format!("/{id}/os-interface/{own}")).await, 404, "itemNotFound");
    let actions =
        cloud.get(&format!("/{id}/os-instance-actions")).await.expect(200)["instanceActions"].take();
    let named = |name: &str| actions.as_array().unwrap().iter().filter(|one| one["action"] == name).count();
    assert_eq!((named("attach_interface"), named("detach_interface")), (2, 4));
    let events =
        cloud.test.get("/mote/v1/events?limit=1000", &cloud.token).await.expect(200)["events"].take();
    let told = |state: &str| {
        let is_so = |one: &&Value| one["type"] == "server.interface" && one["payload"]["state"] == state;
        events.as_array().unwrap().iter().filter(is_so).count()
    };
    assert_eq!((told("attached"), told("detached")), (2, 2));
}

#[tokio::test]
async fn a_port_that_is_deleted_leaves_its_server_first() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let (first, second) = (
        attach(&cloud, &id, json!({"net_id": cloud.network})).await,
        attach(&cloud, &id, json!({"net_id": cloud.network})).await,
    );
    cloud.settle().await;
    let path = |port: &str| format!("/network/v2.0/ports/{port}");
    cloud.test.delete(&path(&first), &cloud.token).await.expect(204);
    // It is asked to detach it as well: it is deleted all the same.
    cloud.delete(&format!("/{id}/os-interface/{first}")).await.expect(202);
    assert_eq!(nics(&cloud, &id).await.len(), 3);
    cloud.settle().await;
    assert_eq!(nics(&cloud, &id).await.len(), 2);
    cloud.test.get(&path(&first), &cloud.token).await.expect(404);
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    cloud.test.delete(&path(&second), &cloud.token).await.expect(204);
    cloud.test.get(&path(&second), &cloud.token).await.expect(404);
    assert_eq!(nics(&cloud, &id).await.len(), 1);
    assert_eq!(cloud.host.desired(&cloud.test, 0).await.servers[0].ports.len(), 1);
}

#[tokio::test]
async fn nics_of_a_paused_server_change_when_it_goes_on_and_those_of_a_suspended_one_do_not() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"pause": null})).await.expect(202);
    cloud.settle().await;
    let port = attach(&cloud, &id, json!({"net_id": cloud.network})).await;
    cloud.settle().await;
    assert_eq!(status(&cloud, &port).await, "DOWN");
    cloud.act(&id, json!({"unpause": null})).await.expect(202);
    cloud.settle().await;
    assert_eq!(status(&cloud, &port).await, "ACTIVE");
    cloud.act(&id, json!({"suspend": null})).await.expect(202);
    cloud.settle().await;
    let text = fault(cloud.delete(&format!("/{id}/os-interface/{port}")).await, 409, "conflictingRequest");
    assert!(text.contains("'detach_interface'") && text.contains("vm_state suspended"), "{text}");
    // A port that is deleted stays until the server, whose memory knows of it, goes on.
    cloud.test.delete(&format!("/network/v2.0/ports/{port}"), &cloud.token).await.expect(204);
    cloud.settle().await;
    assert_eq!(nics(&cloud, &id).await.len(), 2);
    cloud.act(&id, json!({"resume": null})).await.expect(202);
    cloud.settle().await;
    assert_eq!(nics(&cloud, &id).await.len(), 1);
}

#[tokio::test]
async fn nics_are_plugged_in_and_out_while_the_server_is_off() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let url = format!("{SERVERS}/{id}/os-interface");
    let wish = json!({"interfaceAttachment": {"net_id": cloud.network}});
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    let made = cloud.test.post(&url, &cloud.token, wish).await.expect(200)["interfaceAttachment"].take();
    let port = made["port_id"].as_str().unwrap().to_owned();
    assert_eq!(
        cloud.get(&format!("/{id}/os-interface/{port}")).await.expect(200)["interfaceAttachment"],
        made
    );
    let ports = cloud.host.desired(&cloud.test, 0).await.servers[0].ports.clone();
    assert_eq!((ports.len(), ports[1].to_string()), (2, port.clone()), "it is the last one");
    let body = json!({"port": {"network_id": cloud.network, "name": "mine"}});
    let own = cloud.test.post("/network/v2.0/ports", &cloud.token, body).await.expect(201);
    let own = own["port"]["id"].as_str().unwrap().to_owned();
    let wish = json!({"interfaceAttachment": {"port_id": own}});
    cloud.test.post(&url, &cloud.token, wish.clone()).await.expect(200);
    fault(cloud.test.post(&url, &cloud.token, wish).await, 409, "conflictingRequest");
    for port in [&port, &own] {
        cloud.delete(&format!("/{id}/os-interface/{port}")).await.expect(202);
        fault(cloud.delete(&format!("/{id}/os-interface/{port}")).await, 404, "itemNotFound");
    }
    cloud.test.get(&format!("/network/v2.0/ports/{port}"), &cloud.token).await.expect(404);
    let kept = cloud.test.get(&format!("/network/v2.0/ports/{own}"), &cloud.token).await.expect(200);
    assert_eq!((&kept["port"]["name"], &kept["port"]["device_id"]), (&json!("mine"), &json!("")));
    for wrong in
        [json!({"net_id": "x"}), json!({"net_id": cloud.network, "port_id": own}), json!({"fixed_ips": [{}]})]
    {
        let answer = cloud.test.post(&url, &cloud.token, json!({ "interfaceAttachment": wrong })).await;
        fault(answer, 400, "badRequest");
    }
}

#[tokio::test]
async fn tags_are_set_found_and_removed() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let other = cloud.run("t").await;
    let path = format!("{SERVERS}/{id}/tags");
    let at = async |method: Method, path: &str, body: Value| {
        cloud.test.call_at(method, path, &cloud.token, 26, body).await
    };
    cloud.get(&format!("/{id}/tags")).await.expect(404);
    let body = json!({"tags": ["web", "prod", "web"]});
    assert_eq!(at(Method::PUT, &path, body).await.expect(200), json!({"tags": ["prod", "web"]}));
    assert_eq!(at(Method::PUT, &format!("{path}/new"), Value::Null).await.status, 201);
    assert_eq!(at(Method::PUT, &format!("{path}/new"), Value::Null).await.status, 204);
    at(Method::GET, &format!("{path}/new"), Value::Null).await.expect(204);
    at(Method::DELETE, &format!("{path}/new"), Value::Null).await.expect(204);
    at(Method::DELETE, &format!("{path}/new"), Value::Null).await.expect(404);
    assert_eq!(cloud.show_at(&id, 26).await["tags"], json!(["prod", "web"]));
    for (query, expected) in [
        ("tags=web", vec![&id]),
        ("tags=web,none", vec![]),
        ("tags-any=web,none", vec![&id]),
        ("not-tags=web", vec![&other]),
        ("not-tags-any=prod", vec![&other]),
    ] {
        let list = at(Method::GET, &format!("{SERVERS}?{query}"), Value::Null).await.expect(200);
        let ids: Vec<&str> =
            list["servers"].as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap()).collect();
        assert_eq!(ids, expected, "{query}");
    }
    for wrong in [json!({"tags": ["a,b"]}), json!({"tags": [1]}), json!({"tags": [""]}), json!([])] {
        fault(at(Method::PUT, &path, wrong).await, 400, "badRequest");
    }
    at(Method::DELETE, &path, Value::Null).await.expect(204);
    assert_eq!(at(Method::GET, &path, Value::Null).await.expect(200), json!({"tags": []}));
}

#[tokio::test]
async fn later_microversions_show_more_of_a_server() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("s");
    wish["server"]["description"] = json!("what for");
    wish["server"]["hostname"] = json!("box");
    wish["server"]["tags"] = json!(["a"]);
    let made = cloud.test.post_at(SERVERS, &cloud.token, 90, wish.clone()).await.expect(202);
    let id = made["server"]["id"].as_str().unwrap();
    fault(cloud.test.post_at(SERVERS, &cloud.token, 18, wish).await, 400, "badRequest");
    assert_eq!(cloud.spec().await.metadata.hostname, "box");
    for (field, since) in [
        ("locked", 9),
        ("description", 19),
        ("tags", 26),
        ("trusted_image_certificates", 63),
        ("server_groups", 71),
        ("locked_reason", 73),
        ("OS-EXT-SRV-ATTR:hostname", 90),
    ] {
        assert!(cloud.show_at(id, since).await.get(field).is_some(), "{field}");
        assert!(cloud.show_at(id, since - 1).await.get(field).is_none(), "{field}");
    }
    let newest = cloud.show_at(id, 90).await;
    assert_eq!((&newest["description"], &newest["tags"]), (&json!("what for"), &json!(["a"])));
    assert_eq!(
        (&newest["flavor"]["original_name"], &newest["flavor"]["ram"]),
        (&json!("m1.nano"), &json!(64))
    );
    assert!(cloud.show_at(id, 46).await["flavor"]["id"].is_string());
    let path = format!("{SERVERS}/{id}");
    let body = json!({"server": {"description": null, "hostname": "other"}});
    let changed = cloud.test.call_at(Method::PUT, &path, &cloud.token, 90, body).await.expect(200);
    assert_eq!(changed["server"]["description"], Value::Null);
    assert_eq!(cloud.spec().await.metadata.hostname, "other");
    // What a client asks for that nobody knows is refused since 2.75, and without effect before.
    cloud.test.get_at(&format!("{SERVERS}?unheard=1"), &cloud.token, 74).await.expect(200);
    cloud.test.get_at(&format!("{SERVERS}?unheard=1"), &cloud.token, 75).await.expect(400);
    cloud.test.get_at(&format!("{SERVERS}?status=FLYING"), &cloud.token, 37).await.expect(200);
    cloud.test.get_at(&format!("{SERVERS}?status=FLYING"), &cloud.token, 38).await.expect(400);
    cloud.test.get_at(&format!("{path}/topology"), &cloud.token, 78).await.expect(200);
}

#[tokio::test]
async fn what_happens_to_a_server_is_in_the_event_stream() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    let events = cloud.test.get("/mote/v1/events", &cloud.token).await.expect(200);
    let told: Vec<String> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| {
            assert_eq!(event["resource_id"], id.as_str());
            let payload = &event["payload"];
            let what = payload["action"].as_str().or(payload["vm_state"].as_str()).unwrap_or_default();
            format!("{} {what}", event["type"].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        told,
        [
            "server.action create",
            "server.state active",
            "server.action stop",
            "server.state stopped",
            "server.action delete",
            "server.deleted ",
        ]
    );
}
