//! Sharing, tags, QoS, quotas, views, extensions.

use super::*;

#[tokio::test]
async fn a_network_is_seen_by_those_it_is_shared_with_and_by_no_others() {
    let test = TestApp::new().await;
    let (ada, eve, bob) = (
        Client::tenant(&test, "ada").await,
        Client::tenant(&test, "eve").await,
        Client::tenant(&test, "bob").await,
    );
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let path = format!("networks/{network}");
    refused(eve.get(&path).await, 404, "NetworkNotFound");
    let share = |target: &str| {
        json!({"rbac_policy": {"object_type": "network", "object_id": network, "action": "access_as_shared",
                               "target_tenant": target}})
    };
    refused(eve.post("rbac-policies", share(&eve.project)).await, 404, "NetworkNotFound");
    refused(ada.post("rbac-policies", share("*")).await, 403, "PolicyNotAuthorized");
    let policy = ada.post("rbac-policies", share(&eve.project)).await.expect(201)["rbac_policy"].take();
    refused(ada.post("rbac-policies", share(&eve.project)).await, 409, "DuplicateRbacPolicy");
    assert_eq!(eve.get(&path).await.expect(200)["network"]["shared"], true);
    assert_eq!(ada.get(&path).await.expect(200)["network"]["shared"], false);
    refused(bob.get(&path).await, 404, "NetworkNotFound");
    assert_eq!(eve.get("subnets").await.expect(200)["subnets"].as_array().unwrap().len(), 1);
    let port = eve.port(&network, json!({})).await;
    // Who doesn't own the network doesn't choose in it.
    for more in [
        json!({"fixed_ips": [{"ip_address": "10.0.0.9"}]}),
        json!({"mac_address": "fa:16:3e:00:00:09"}),
        json!({"port_security_enabled": false}),
        json!({"allowed_address_pairs": [{"ip_address": "10.0.0.9"}]}),
    ] {
        let mut body = json!({ "network_id": network });
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        refused(eve.post("ports", json!({ "port": body })).await, 403, "PolicyNotAuthorized");
    }
    refused(eve.put(&path, json!({"network": {"name": "mine"}})).await, 403, "PolicyNotAuthorized");
    let policy = format!("rbac-policies/{}", id(&policy));
    refused(eve.get(&policy).await, 404, "RbacPolicyNotFound");
    refused(ada.delete(&policy).await, 409, "RbacPolicyInUse");
    eve.delete(&format!("ports/{}", id(&port))).await.expect(204);
    ada.delete(&policy).await.expect(204);
    refused(eve.get(&path).await, 404, "NetworkNotFound");
}

#[tokio::test]
async fn sharing_with_all_and_its_policy_are_one() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let network = id(&admin.make("networks", "network", json!({"shared": true})).await);
    let policies = admin.get(&format!("rbac-policies?object_id={network}")).await.expect(200);
    assert_eq!(policies["rbac_policies"][0]["target_tenant"], "*");
    assert_eq!(ada.get(&format!("networks/{network}")).await.expect(200)["network"]["shared"], true);
    admin.delete(&format!("rbac-policies/{}", id(&policies["rbac_policies"][0]))).await.expect(204);
    assert_eq!(admin.get(&format!("networks/{network}")).await.expect(200)["network"]["shared"], false);
    refused(ada.get(&format!("networks/{network}")).await, 404, "NetworkNotFound");
    let external = json!({"rbac_policy": {"object_type": "network", "object_id": network,
                                          "action": "access_as_external", "target_tenant": "*"}});
    admin.post("rbac-policies", external).await.expect(201);
    assert_eq!(ada.get(&format!("networks/{network}")).await.expect(200)["network"]["router:external"], true);
    // A shared security group may be used, not changed.
    let group = admin.make("security-groups", "security_group", json!({"name": "g"})).await;
    let share = json!({"rbac_policy": {"object_type": "security_group", "object_id": group["id"],
                                       "action": "access_as_shared", "target_tenant": ada.project}});
    admin.post("rbac-policies", share).await.expect(201);
    let inside = ada.network("n").await;
    ada.subnet(&inside, "10.0.0.0/24").await;
    ada.port(&inside, json!({"security_groups": [group["id"]]})).await;
    refused(ada.delete(&format!("security-groups/{}", id(&group))).await, 403, "PolicyNotAuthorized");
}

#[tokio::test]
async fn tags_are_set_asked_for_and_removed() {
    let test = TestApp::new().await;
    let (ada, eve) = (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await);
    let body = json!({"name": "n", "tags": ["red", "blue"]});
    let network = ada.make("networks", "network", body).await;
    assert_eq!(network["tags"], json!(["blue", "red"]));
    let path = format!("networks/{}/tags", id(&network));
    ada.put(&format!("{path}/green"), Value::Null).await.expect(201);
    assert_eq!(ada.get(&path).await.expect(200)["tags"], json!(["blue", "green", "red"]));
    ada.get(&format!("{path}/green")).await.expect(204);
    refused(ada.get(&format!("{path}/pink")).await, 404, "TagNotFound");
    ada.delete(&format!("{path}/green")).await.expect(204);
    refused(ada.delete(&format!("{path}/green")).await, 404, "TagNotFound");
    let other = ada.network("other").await;
    let count = async |query: &str| {
        ada.get(&format!("networks?{query}")).await.expect(200)["networks"].as_array().unwrap().len()
    };
    assert_eq!(count("tags=red,blue").await, 1);
    assert_eq!(count("tags-any=red,pink").await, 1);
    assert_eq!(count("not-tags-any=red").await, 1);
    let set = ada.put(&format!("networks/{other}/tags"), json!({"tags": ["x"]})).await.expect(200);
    assert_eq!(set["tags"], json!(["x"]));
    refused(ada.put(&path, json!({"tags": [""]})).await, 400, "InvalidInput");
    refused(
        ada.put(&path, json!({"tags": (0..51).map(|n| n.to_string()).collect::<Vec<_>>()})).await,
        400,
        "HTTPBadRequest",
    );
    refused(eve.put(&format!("{path}/green"), Value::Null).await, 404, "NetworkNotFound");
    ada.delete(&path).await.expect(204);
    assert_eq!(ada.get(&path).await.expect(200)["tags"], json!([]));
}

#[tokio::test]
async fn qos_policies_are_admins_and_shared_ones_everybodys() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    refused(ada.post("qos/policies", json!({"policy": {"name": "p"}})).await, 403, "PolicyNotAuthorized");
    let policy = id(&admin.make("qos/policies", "policy", json!({"name": "p"})).await);
    let path = format!("qos/policies/{policy}");
    refused(ada.get(&path).await, 404, "QosPolicyNotFound");
    let limits = format!("{path}/bandwidth_limit_rules");
    let limit = |kbps: i64, direction: &str| json!({"bandwidth_limit_rule": {"max_kbps": kbps, "max_burst_kbps": 800, "direction": direction}});
    let rule = admin.post(&limits, limit(1000, "egress")).await.expect(201)["bandwidth_limit_rule"].take();
    refused(admin.post(&limits, limit(2000, "egress")).await, 409, "QoSRulesConflict");
    admin.post(&limits, limit(2000, "ingress")).await.expect(201);
    refused(admin.post(&limits, limit(0, "ingress")).await, 400, "HTTPBadRequest");
    let marks = format!("{path}/dscp_marking_rules");
    refused(admin.post(&marks, json!({"dscp_marking_rule": {"dscp_mark": 5}})).await, 400, "HTTPBadRequest");
    admin.post(&marks, json!({"dscp_marking_rule": {"dscp_mark": 26}})).await.expect(201);
    let shown = admin.get(&path).await.expect(200);
    assert_eq!(shown["policy"]["rules"].as_array().unwrap().len(), 3);
    let change = json!({"bandwidth_limit_rule": {"max_kbps": 1500}});
    let changed = admin.put(&format!("{limits}/{}", id(&rule)), change).await.expect(200);
    assert_eq!(changed["bandwidth_limit_rule"]["max_kbps"], 1500);
    refused(admin.get(&format!("{limits}/{policy}")).await, 404, "QosRuleNotFound");
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let body = json!({"port": {"network_id": network, "qos_policy_id": policy}});
    refused(ada.post("ports", body.clone()).await, 404, "QosPolicyNotFound");
    admin.put(&path, json!({"policy": {"shared": true}})).await.expect(200);
    let port = ada.post("ports", body).await.expect(201)["port"].take();
    assert_eq!(port["qos_policy_id"], json!(policy));
    refused(ada.post(&limits, limit(1, "egress")).await, 403, "PolicyNotAuthorized");
    refused(admin.delete(&path).await, 409, "QosPolicyInUse");
    let off = json!({"port": {"qos_policy_id": null}});
    ada.put(&format!("ports/{}", id(&port)), off).await.expect(200);
    admin.delete(&path).await.expect(204);
    assert_eq!(ada.get("qos/rule-types").await.expect(200)["rule_types"].as_array().unwrap().len(), 2);
    refused(admin.get("qos/rule-types/minimum_bandwidth").await, 404, "QosRuleTypeNotFound");
}

#[tokio::test]
async fn quotas_count_what_is_there() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    ada.make("routers", "router", json!({})).await;
    let path = format!("quotas/{}", ada.project);
    admin.put(&path, json!({"quota": {"router": 1, "floatingip": 0, "network": 0}})).await.expect(200);
    refused(ada.post("routers", json!({"router": {}})).await, 409, "OverQuota");
    let checked = json!({"quota": {"router": 0, "check_limit": true}});
    refused(admin.put(&path, checked).await, 409, "InvalidQuotaValue");
    refused(ada.post("networks", json!({"network": {}})).await, 409, "OverQuota");
    let details = ada.get(&format!("{path}/details")).await.expect(200);
    assert_eq!(details["quota"]["router"], json!({"limit": 1, "used": 1, "reserved": 0}));
    refused(ada.put(&path, json!({"quota": {"router": 100}})).await, 403, "PolicyNotAuthorized");
    admin.delete(&path).await.expect(204);
    assert_eq!(ada.get(&path).await.expect(200)["quota"]["router"], 10);
}

#[tokio::test]
async fn views_are_admins_and_extensions_say_what_is_there() {
    let test = TestApp::new().await;
    let (ada, admin) = (Client::tenant(&test, "ada").await, Client::admin(&test));
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    ada.subnet(&network, "fd00::/64").await;
    refused(ada.get("network-ip-availabilities").await, 403, "PolicyNotAuthorized");
    let seen = admin.get(&format!("network-ip-availabilities/{network}")).await.expect(200);
    let seen = &seen["network_ip_availability"];
    assert_eq!(seen["subnet_ip_availability"][0]["total_ips"], 253);
    assert_eq!((&seen["used_ips"], &seen["network_name"]), (&json!(1), &json!("n")));
    admin.get("network-ip-availabilities?network_name=n").await.expect(200);
    refused(ada.get("agents").await, 403, "PolicyNotAuthorized");
    assert_eq!(admin.get("agents").await.expect(200)["agents"], json!([]));
    let extensions = ada.get("extensions").await.expect(200);
    let aliases: Vec<&str> =
        extensions["extensions"].as_array().unwrap().iter().map(|e| e["alias"].as_str().unwrap()).collect();
    for alias in ["security-group", "router", "qos", "port-security", "rbac-policies", "standard-attr-tag"] {
        assert!(aliases.contains(&alias), "{alias}");
    }
    for alias in ["trunk", "dvr", "l3-ha", "metering"] {
        assert!(!aliases.contains(&alias), "{alias}");
    }
    // Each resource that is announced answers.
    let resources = test.get(BASE, "").await.expect(200);
    for resource in resources["resources"].as_array().unwrap() {
        admin.get(resource["collection"].as_str().unwrap()).await.expect(200);
    }
}
