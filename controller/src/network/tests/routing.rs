//! Routers, external networks, floating IPs, port forwardings.

use super::*;

/// A tenant's network behind a router that leads outside, and a port.
struct Behind {
    network: String,
    subnet: String,
    router: String,
    port: Value,
}

async fn behind(client: &Client<'_>, external: &str, cidr: &str) -> Behind {
    let network = client.network("n").await;
    let subnet = client.subnet(&network, cidr).await;
    let body = json!({"name": "r", "external_gateway_info": {"network_id": external}});
    let router = id(&client.make("routers", "router", body).await);
    let path = format!("routers/{router}/add_router_interface");
    client.put(&path, json!({"subnet_id": subnet})).await.expect(200);
    let port = client.port(&network, json!({})).await;
    Behind { network, subnet, router, port }
}

#[tokio::test]
async fn interfaces_are_added_by_subnet_and_by_port_and_removed() {
    let test = TestApp::new().await;
    let (ada, eve) = (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await);
    let network = ada.network("n").await;
    let subnet = ada.subnet(&network, "10.0.0.0/24").await;
    let router = ada.make("routers", "router", json!({"name": "r"})).await;
    assert_eq!((&router["external_gateway_info"], &router["routes"]), (&Value::Null, &json!([])));
    let router = id(&router);
    let (add, remove) = (
        format!("routers/{router}/add_router_interface"),
        format!("routers/{router}/remove_router_interface"),
    );
    let added = ada.put(&add, json!({"subnet_id": subnet})).await.expect(200);
    assert_eq!((&added["id"], &added["subnet_ids"]), (&json!(router), &json!([subnet])));
    let port = ada.get(&format!("ports/{}", added["port_id"].as_str().unwrap())).await.expect(200);
    assert_eq!(port["port"]["device_owner"], "network:router_interface");
    assert_eq!(port["port"]["fixed_ips"][0]["ip_address"], "10.0.0.1");
    refused(ada.delete(&format!("ports/{}", id(&port["port"]))).await, 409, "ServicePortInUse");
    refused(ada.put(&add, json!({"subnet_id": subnet})).await, 400, "BadRequest");
    refused(ada.put(&add, json!({})).await, 400, "BadRequest");
    refused(ada.put(&add, json!({"subnet_id": subnet, "port_id": subnet})).await, 400, "BadRequest");
    // Another network with an overlapping range.
    let other = ada.network("o").await;
    let overlapping = ada.subnet(&other, "10.0.0.0/25").await;
    let text = refused(ada.put(&add, json!({"subnet_id": overlapping})).await, 400, "BadRequest");
    assert!(text.contains("overlaps"), "{text}");
    let third = ada.network("t").await;
    ada.subnet(&third, "10.3.0.0/24").await;
    let port = ada.port(&third, json!({})).await;
    let by_port = ada.put(&add, json!({"port_id": port["id"]})).await.expect(200);
    assert_eq!(by_port["port_id"], port["id"]);
    let port = ada.get(&format!("ports/{}", id(&port))).await.expect(200);
    assert_eq!((&port["port"]["device_id"], &port["port"]["security_groups"]), (&json!(router), &json!([])));
    refused(ada.delete(&format!("routers/{router}")).await, 409, "RouterInUse");
    refused(ada.delete(&format!("subnets/{subnet}")).await, 409, "SubnetInUse");
    // Another tenant's eyes.
    refused(eve.get(&format!("routers/{router}")).await, 404, "RouterNotFound");
    refused(eve.put(&add, json!({"subnet_id": subnet})).await, 404, "RouterNotFound");
    let hers = id(&eve.make("routers", "router", json!({})).await);
    let spy = eve.put(&format!("routers/{hers}/add_router_interface"), json!({"subnet_id": subnet})).await;
    refused(spy, 404, "SubnetNotFound");
    refused(
        ada.put(&remove, json!({"subnet_id": overlapping})).await,
        404,
        "RouterInterfaceNotFoundForSubnet",
    );
    refused(ada.put(&remove, json!({"port_id": overlapping})).await, 404, "RouterInterfaceNotFound");
    ada.put(&remove, json!({"subnet_id": subnet})).await.expect(200);
    ada.put(&remove, json!({"port_id": port["port"]["id"]})).await.expect(200);
    ada.delete(&format!("routers/{router}")).await.expect(204);
    ada.delete(&format!("networks/{network}")).await.expect(204);
}

#[tokio::test]
async fn gateways_take_an_address_outside_and_admins_choose_snat() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let (external, _) = admin.external().await;
    let inside = ada.network("n").await;
    let body = json!({"router": {"external_gateway_info": {"network_id": inside}}});
    refused(ada.post("routers", body).await, 400, "BadRequest");
    let body = json!({"router": {"external_gateway_info": {"network_id": external, "enable_snat": false}}});
    refused(ada.post("routers", body).await, 403, "PolicyNotAuthorized");
    let body = json!({"external_gateway_info": {"network_id": external}});
    let router = ada.make("routers", "router", body).await;
    let info = &router["external_gateway_info"];
    assert_eq!(info["enable_snat"], true);
    let address = info["external_fixed_ips"][0]["ip_address"].as_str().unwrap();
    assert!(address.starts_with("203.0.113."), "{address}");
    refused(admin.delete(&format!("networks/{external}")).await, 409, "NetworkInUse");
    let not_external = json!({"network": {"router:external": false}});
    refused(admin.put(&format!("networks/{external}"), not_external).await, 409, "ExternalNetworkInUse");
    let path = format!("routers/{}", id(&router));
    let body = json!({"router": {"external_gateway_info": {
        "network_id": external, "enable_snat": false, "external_fixed_ips": [{"ip_address": "203.0.113.200"}]}}});
    let changed = admin.put(&path, body).await.expect(200);
    let info = &changed["router"]["external_gateway_info"];
    assert_eq!(
        (&info["enable_snat"], &info["external_fixed_ips"][0]["ip_address"]),
        (&json!(false), &json!("203.0.113.200"))
    );
    let cleared = ada.put(&path, json!({"router": {"external_gateway_info": null}})).await.expect(200);
    assert_eq!(cleared["router"]["external_gateway_info"], Value::Null);
    ada.delete(&path).await.expect(204);
    admin.delete(&format!("networks/{external}")).await.expect(204);
}

#[tokio::test]
async fn several_gateways_are_added_matched_ordered_and_removed() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let (external, _) = admin.external().await;
    let (second, subnet) = admin.external_at("second", "198.18.0.0/24").await;
    let router = id(&ada.make("routers", "router", json!({})).await);
    let path = format!("routers/{router}");
    let list = |gateways: Value| json!({"router": {"external_gateways": gateways}});
    let [add, update, remove] =
        ["add", "update", "remove"].map(|verb| format!("{path}/{verb}_external_gateways"));
    let networks = |answer: &Value| -> Vec<String> {
        let gateways = answer["router"]["external_gateways"].as_array().unwrap();
        assert_eq!(
            answer["router"]["external_gateway_info"],
            gateways.first().cloned().unwrap_or(Value::Null)
        );
        gateways.iter().map(|gateway| gateway["network_id"].as_str().unwrap().to_owned()).collect()
    };
    let (one, two) = (json!({"network_id": external}), json!({"network_id": second}));
    // The list is no attribute that a router is made or changed with.
    let inside = json!({"router": {"external_gateways": [one]}});
    refused(ada.put(&path, inside).await, 400, "HTTPBadRequest");
    refused(ada.put(&remove, list(json!([one]))).await, 400, "UnableToRemoveGateways");
    let added = ada.put(&add, list(json!([one, two]))).await.expect(200);
    assert_eq!(networks(&added), [external.clone(), second.clone()]);
    assert_eq!(added["router"]["external_gateways"][1]["enable_snat"], true);
    // What an admin alone decides.
    for chosen in [json!({"enable_snat": false}), json!({"external_fixed_ips": [{"subnet_id": subnet}]})] {
        let mut info = two.clone();
        info.as_object_mut().unwrap().extend(chosen.as_object().unwrap().clone());
        refused(ada.put(&add, list(json!([info]))).await, 403, "PolicyNotAuthorized");
    }
    let ecmp = json!({"router": {"enable_default_route_ecmp": true}});
    refused(ada.put(&path, ecmp.clone()).await, 403, "PolicyNotAuthorized");
    assert_eq!(admin.put(&path, ecmp).await.expect(200)["router"]["enable_default_route_ecmp"], true);
    let bfd = json!({"router": {"enable_default_route_bfd": true}});
    let text = refused(admin.put(&path, bfd).await, 400, "HTTPBadRequest");
    assert!(text.contains("enable_default_route_bfd"), "{text}");
    // A third one on a network that there is a gateway on: that network alone doesn't say which is meant.
    let chosen = json!([{"network_id": second, "enable_snat": false,
                         "external_fixed_ips": [{"ip_address": "198.18.0.77"}]}]);
    let third = admin.put(&add, list(chosen.clone())).await.expect(200);
    assert_eq!(networks(&third), [external.clone(), second.clone(), second.clone()]);
    assert_eq!(third["router"]["external_gateways"][2]["enable_snat"], false);
    refused(ada.put(&remove, list(json!([two]))).await, 400, "UnableToMatchGateways");
    let other = json!([{"network_id": second, "external_fixed_ips": [{"ip_address": "198.18.0.99"}]}]);
    refused(ada.put(&remove, list(other)).await, 400, "UnableToMatchGateways");
    let left = ada.put(&remove, list(chosen)).await.expect(200);
    assert_eq!(networks(&left), [external.clone(), second.clone()]);
    // A floating IP needs its own network's gateway, and no other.
    let inner = ada.network("n").await;
    let inside = ada.subnet(&inner, "10.0.0.0/24").await;
    ada.put(&format!("{path}/add_router_interface"), json!({"subnet_id": inside})).await.expect(200);
    let port = ada.port(&inner, json!({})).await;
    let body = json!({"floating_network_id": second, "port_id": port["id"]});
    let floating = id(&ada.make("floatingips", "floatingip", body).await);
    refused(ada.put(&remove, list(json!([two]))).await, 409, "RouterExternalGatewayInUseByFloatingIp");
    // The second takes the first one's place, by either call.
    let swapped = ada.put(&update, list(json!([two, one]))).await.expect(200);
    assert_eq!(networks(&swapped), [second.clone(), external.clone()]);
    ada.put(&update, list(json!([one, two]))).await.expect(200);
    let cleared = ada.put(&path, json!({"router": {"external_gateway_info": {}}})).await.expect(200);
    assert_eq!(networks(&cleared), std::slice::from_ref(&second));
    // An address of the same gateway is changed in place.
    let chosen = json!([{"network_id": second, "external_fixed_ips": [{"ip_address": "198.18.0.50"}]}]);
    refused(admin.put(&remove, list(chosen.clone())).await, 400, "UnableToMatchGateways");
    let info = json!({"router": {"external_gateway_info": chosen[0]}});
    let changed = admin.put(&path, info).await.expect(200);
    let fixed = &changed["router"]["external_gateways"][0]["external_fixed_ips"];
    assert_eq!((fixed.as_array().unwrap().len(), &fixed[0]["ip_address"]), (1, &json!("198.18.0.50")));
    // Ranges outside don't overlap, neither with each other nor with those inside.
    let (overlapping, _) = admin.external_at("third", "198.18.0.0/25").await;
    let (inner, _) = admin.external_at("fourth", "10.0.0.0/16").await;
    for network in [overlapping, inner] {
        let text = refused(ada.put(&add, list(json!([{"network_id": network}]))).await, 400, "BadRequest");
        assert!(text.contains("overlaps"), "{text}");
    }
    ada.delete(&format!("floatingips/{floating}")).await.expect(204);
    let none = ada.put(&update, list(json!([]))).await.expect(200);
    assert_eq!(networks(&none), Vec::<String>::new());
    // As the client says it.
    ada.put(&remove, list(json!({}))).await.expect(200);
    // A router that goes takes them along.
    ada.put(&add, list(json!([one, two]))).await.expect(200);
    ada.put(&format!("{path}/remove_router_interface"), json!({"subnet_id": inside})).await.expect(200);
    ada.delete(&path).await.expect(204);
    admin.delete(&format!("networks/{external}")).await.expect(204);
    admin.delete(&format!("networks/{second}")).await.expect(204);
}

#[tokio::test]
async fn routes_lead_to_connected_hops_only() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    let subnet = ada.subnet(&network, "10.0.0.0/24").await;
    let router = id(&ada.make("routers", "router", json!({})).await);
    let interface = format!("routers/{router}/add_router_interface");
    ada.put(&interface, json!({"subnet_id": subnet})).await.expect(200);
    let path = format!("routers/{router}");
    let routes = |destination: &str, nexthop: &str| json!({"router": {"routes": [{"destination": destination, "nexthop": nexthop}]}});
    for (destination, nexthop) in [
        ("192.0.2.0/24", "10.9.0.1"),
        ("192.0.2.0/24", "10.0.0.1"),
        ("192.0.2.0", "x"),
        ("fd00::/64", "10.0.0.9"),
    ] {
        refused(ada.put(&path, routes(destination, nexthop)).await, 400, "InvalidRoutes");
    }
    let set = ada.put(&path, routes("192.0.2.0/24", "10.0.0.9")).await.expect(200);
    assert_eq!(set["router"]["routes"], json!([{"destination": "192.0.2.0/24", "nexthop": "10.0.0.9"}]));
    let remove = format!("routers/{router}/remove_router_interface");
    refused(ada.put(&remove, json!({"subnet_id": subnet})).await, 409, "RouterInterfaceInUseByRoute");
    let more =
        ada.put(&format!("{path}/add_extraroutes"), routes("198.51.100.0/24", "10.0.0.8")).await.expect(200);
    assert_eq!(more["router"]["routes"].as_array().unwrap().len(), 2);
    let less =
        ada.put(&format!("{path}/remove_extraroutes"), routes("192.0.2.0/24", "10.0.0.9")).await.expect(200);
    assert_eq!(less["router"]["routes"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn floating_ips_are_made_associated_moved_and_released() {
    let test = TestApp::new().await;
    let (ada, eve, admin) =
        (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await, Client::admin(&test));
    let (external, _) = admin.external().await;
    let body = json!({"floatingip": {"floating_network_id": ada.network("inside").await}});
    refused(ada.post("floatingips", body).await, 400, "BadRequest");
    let floating = ada.make("floatingips", "floatingip", json!({"floating_network_id": external})).await;
    assert_eq!((&floating["status"], &floating["port_details"]), (&json!("DOWN"), &Value::Null));
    let path = format!("floatingips/{}", id(&floating));
    let to = |port: &Value| json!({"floatingip": {"port_id": port["id"]}});
    let lonely = ada.network("lonely").await;
    ada.subnet(&lonely, "10.7.0.0/24").await;
    let unreachable = ada.port(&lonely, json!({})).await;
    refused(ada.put(&path, to(&unreachable)).await, 404, "ExternalGatewayForFloatingIPNotFound");
    let place = behind(&ada, &external, "10.0.0.0/24").await;
    let set = ada.put(&path, to(&place.port)).await.expect(200)["floatingip"].take();
    assert_eq!((&set["status"], &set["router_id"]), (&json!("ACTIVE"), &json!(place.router)));
    assert_eq!(set["fixed_ip_address"], place.port["fixed_ips"][0]["ip_address"]);
    assert_eq!(set["port_details"]["mac_address"], place.port["mac_address"]);
    let second = ada.make("floatingips", "floatingip", json!({"floating_network_id": external})).await;
    let second = format!("floatingips/{}", id(&second));
    refused(ada.put(&second, to(&place.port)).await, 409, "FloatingIPPortAlreadyAssociated");
    // What it needs stays.
    let clear = json!({"router": {"external_gateway_info": null}});
    let router = format!("routers/{}", place.router);
    refused(ada.put(&router, clear).await, 409, "RouterExternalGatewayInUseByFloatingIp");
    let remove =
        ada.put(&format!("{router}/remove_router_interface"), json!({"subnet_id": place.subnet})).await;
    refused(remove, 409, "RouterInterfaceInUseByFloatingIP");
    let moved = json!({"port": {"fixed_ips": [{"ip_address": "10.0.0.99"}]}});
    refused(ada.put(&format!("ports/{}", id(&place.port)), moved).await, 409, "FipAssociated");
    // Moved to another port, and let go when that port goes.
    let other = ada.port(&place.network, json!({})).await;
    let moved = ada.put(&path, to(&other)).await.expect(200);
    assert_eq!(moved["floatingip"]["port_id"], other["id"]);
    ada.delete(&format!("ports/{}", id(&other))).await.expect(204);
    let free = ada.get(&path).await.expect(200);
    assert_eq!(
        (&free["floatingip"]["port_id"], &free["floatingip"]["status"]),
        (&Value::Null, &json!("DOWN"))
    );
    ada.put(&path, to(&place.port)).await.expect(200);
    let off = ada.put(&path, json!({"floatingip": {"port_id": null}})).await.expect(200);
    assert_eq!(off["floatingip"]["router_id"], Value::Null);
    refused(eve.get(&path).await, 404, "FloatingIPNotFound");
    refused(eve.delete(&path).await, 404, "FloatingIPNotFound");
    let hers = eve.make("floatingips", "floatingip", json!({"floating_network_id": external})).await;
    refused(eve.put(&format!("floatingips/{}", id(&hers)), to(&place.port)).await, 404, "PortNotFound");
    let wanted =
        json!({"floatingip": {"floating_network_id": external, "floating_ip_address": "203.0.113.77"}});
    refused(ada.post("floatingips", wanted.clone()).await, 403, "PolicyNotAuthorized");
    assert_eq!(
        admin.post("floatingips", wanted).await.expect(201)["floatingip"]["floating_ip_address"],
        "203.0.113.77"
    );
    ada.delete(&path).await.expect(204);
}

#[tokio::test]
async fn port_forwardings_share_a_floating_ip() {
    let test = TestApp::new().await;
    let (ada, eve, admin) =
        (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await, Client::admin(&test));
    let (external, _) = admin.external().await;
    let place = behind(&ada, &external, "10.0.0.0/24").await;
    let floating = ada.make("floatingips", "floatingip", json!({"floating_network_id": external})).await;
    let path = format!("floatingips/{}/port_forwardings", id(&floating));
    let ip = place.port["fixed_ips"][0]["ip_address"].clone();
    let forward = |outside: i64, inside: i64| {
        json!({"port_forwarding": {"protocol": "tcp", "external_port": outside, "internal_port": inside,
            "internal_port_id": place.port["id"], "internal_ip_address": ip}})
    };
    let made = ada.post(&path, forward(2222, 22)).await.expect(201)["port_forwarding"].take();
    assert_eq!((&made["external_port"], &made["internal_port"]), (&json!(2222), &json!(22)));
    refused(ada.post(&path, forward(2222, 23)).await, 400, "BadRequest");
    refused(ada.post(&path, forward(2223, 22)).await, 400, "BadRequest");
    refused(ada.post(&path, forward(70000, 22)).await, 400, "HTTPBadRequest");
    let shown = ada.get(&format!("floatingips/{}", id(&floating))).await.expect(200);
    assert_eq!(shown["floatingip"]["status"], "ACTIVE");
    assert_eq!(shown["floatingip"]["port_forwardings"][0]["external_port"], 2222);
    let associate = json!({"floatingip": {"port_id": place.port["id"]}});
    let answer = ada.put(&format!("floatingips/{}", id(&floating)), associate).await;
    refused(answer, 409, "FipInUseByPortForwarding");
    let one = format!("{path}/{}", id(&made));
    let changed = ada.put(&one, json!({"port_forwarding": {"external_port": 2200}})).await.expect(200);
    assert_eq!(changed["port_forwarding"]["external_port"], 2200);
    assert_eq!(
        ada.get(&format!("{path}?external_port=2200")).await.expect(200)["port_forwardings"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    refused(eve.get(&path).await, 404, "FloatingIPNotFound");
    refused(eve.get(&one).await, 404, "FloatingIPNotFound");
    ada.delete(&one).await.expect(204);
    refused(ada.get(&one).await, 404, "PortForwardingNotFound");
    let shown = ada.get(&format!("floatingips/{}", id(&floating))).await.expect(200);
    assert_eq!(
        (&shown["floatingip"]["status"], &shown["floatingip"]["port_forwardings"]),
        (&json!("DOWN"), &json!([]))
    );
}

#[tokio::test]
async fn segments_are_chosen_by_admins_and_never_shared() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let vlan = |number: Value| {
        json!({"network": {"provider:network_type": "vlan", "provider:physical_network": "p",
                           "provider:segmentation_id": number}})
    };
    refused(ada.post("networks", vlan(json!(5))).await, 403, "PolicyNotAuthorized");
    let made = admin.post("networks", vlan(json!(5))).await.expect(201);
    assert_eq!(
        (&made["network"]["provider:segmentation_id"], &made["network"]["mtu"]),
        (&json!(5), &json!(1500))
    );
    refused(admin.post("networks", vlan(json!(5))).await, 409, "VlanIdInUse");
    refused(admin.post("networks", vlan(json!(4095))).await, 400, "InvalidInput");
    let next = admin.post("networks", vlan(Value::Null)).await.expect(201);
    assert_eq!(next["network"]["provider:segmentation_id"], 1);
    let flat = json!({"network": {"provider:network_type": "flat", "provider:physical_network": "q"}});
    admin.post("networks", flat.clone()).await.expect(201);
    refused(admin.post("networks", flat).await, 409, "FlatNetworkInUse");
    let tunnel = json!({"network": {"provider:network_type": "vxlan", "provider:segmentation_id": 77}});
    admin.post("networks", tunnel.clone()).await.expect(201);
    refused(admin.post("networks", tunnel).await, 409, "TunnelIdInUse");
    // Tenants' networks have numbers of their own, which tenants don't see.
    let body = json!({"network": {"name": "n"}});
    let all = futures_util::future::join_all((0..30).map(|_| ada.post("networks", body.clone()))).await;
    let mut numbers = std::collections::BTreeSet::new();
    for answer in all {
        let network = answer.expect(201)["network"].take();
        assert!(network.get("provider:segmentation_id").is_none());
        let seen = admin.get(&format!("networks/{}", id(&network))).await.expect(200);
        numbers.insert(seen["network"]["provider:segmentation_id"].as_i64().unwrap());
    }
    assert_eq!(numbers.len(), 30);
    let change = json!({"network": {"provider:segmentation_id": 9}});
    refused(admin.put(&format!("networks/{}", id(&made["network"])), change).await, 400, "InvalidInput");
}
