//! Security groups, address groups, port security.

use super::*;

#[tokio::test]
async fn each_project_has_one_default_group_that_was_made_on_demand() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let (first, second) = tokio::join!(ada.get("security-groups"), ada.get("security-groups"));
    let (first, second) = (first.expect(200), second.expect(200));
    let groups = first["security_groups"].as_array().unwrap();
    assert_eq!(groups.len(), 1);
    assert_eq!(ids(&first["security_groups"]), ids(&second["security_groups"]));
    let group = &groups[0];
    assert_eq!((&group["name"], &group["project_id"]), (&json!("default"), &json!(ada.project)));
    let rules = group["security_group_rules"].as_array().unwrap();
    let kind = |rule: &Value| format!("{} {}", rule["direction"], rule["ethertype"]).replace('"', "");
    let mut kinds: Vec<String> = rules.iter().map(kind).collect();
    kinds.sort();
    assert_eq!(kinds, ["egress IPv4", "egress IPv6", "ingress IPv4", "ingress IPv6"]);
    for rule in rules {
        let own = if rule["direction"] == "ingress" { group["id"].clone() } else { Value::Null };
        assert_eq!(rule["remote_group_id"], own);
    }
    let path = format!("security-groups/{}", id(group));
    refused(ada.delete(&path).await, 409, "SecurityGroupCannotRemoveDefault");
    let rename = json!({"security_group": {"name": "other"}});
    refused(ada.put(&path, rename).await, 409, "SecurityGroupCannotUpdateDefault");
    let twice = json!({"security_group": {"name": "default"}});
    refused(ada.post("security-groups", twice).await, 409, "SecurityGroupDefaultAlreadyExists");
    // Admins see all projects' groups, tenants only their own.
    let eve = Client::tenant(&test, "eve").await;
    assert_eq!(eve.get("security-groups").await.expect(200)["security_groups"].as_array().unwrap().len(), 1);
    refused(eve.get(&path).await, 404, "SecurityGroupNotFound");
    refused(eve.delete(&path).await, 404, "SecurityGroupNotFound");
    let all = Client::admin(&test).get("security-groups").await.expect(200);
    assert!(all["security_groups"].as_array().unwrap().len() >= 3);
}

#[tokio::test]
async fn groups_are_made_changed_listed_and_deleted() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let web = ada.make("security-groups", "security_group", json!({"name": "web", "description": "d"})).await;
    assert_eq!(
        (&web["stateful"], &web["revision_number"], &web["tags"]),
        (&json!(true), &json!(1), &json!([]))
    );
    assert_eq!(web["security_group_rules"].as_array().unwrap().len(), 2);
    let path = format!("security-groups/{}", id(&web));
    let body = json!({"security_group": {"name": "www"}});
    let changed = ada.put(&path, body).await.expect(200);
    assert_eq!(changed["security_group"]["name"], "www");
    assert_eq!(changed["security_group"]["revision_number"], 2);
    let list = ada.get("security-groups?name=www&fields=id&fields=name").await.expect(200);
    assert_eq!(list["security_groups"], json!([{"id": web["id"], "name": "www"}]));
    let sorted = ada.get("security-groups?sort_key=name&sort_dir=desc&limit=1").await.expect(200);
    assert_eq!(sorted["security_groups"][0]["name"], "www");
    assert!(sorted["security_groups_links"][0]["href"].as_str().unwrap().contains("marker="));
    refused(ada.get("security-groups?colour=red").await, 400, "HTTPBadRequest");
    refused(
        ada.post("security-groups", json!({"security_group": {"colour": 1}})).await,
        400,
        "HTTPBadRequest",
    );
    ada.delete(&path).await.expect(204);
    refused(ada.get(&path).await, 404, "SecurityGroupNotFound");
    let (_, reader) = test.tenant("rea", "reader").await;
    test.post(&format!("{BASE}/security-groups"), &reader, json!({"security_group": {}})).await.expect(403);
}

#[tokio::test]
async fn rules_are_checked_kept_apart_and_counted() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let eve = Client::tenant(&test, "eve").await;
    let group = id(&ada.make("security-groups", "security_group", json!({"name": "web"})).await);
    let hers = id(&eve.make("security-groups", "security_group", json!({"name": "web"})).await);
    let rule = |more: Value| {
        let mut rule = json!({"security_group_id": group, "direction": "ingress"});
        for (name, value) in more.as_object().unwrap() {
            rule[name] = value.clone();
        }
        json!({"security_group_rule": rule})
    };
    let http = json!({"protocol": "tcp", "port_range_min": 80, "port_range_max": 80, "remote_ip_prefix": "10.1.2.3/8"});
    let made = ada.post("security-group-rules", rule(http.clone())).await.expect(201);
    let made = &made["security_group_rule"];
    assert_eq!(
        (&made["remote_ip_prefix"], &made["normalized_cidr"]),
        (&json!("10.1.2.3/8"), &json!("10.0.0.0/8"))
    );
    let text = refused(ada.post("security-group-rules", rule(http)).await, 409, "SecurityGroupRuleExists");
    assert!(text.contains(&id(made)), "{text}");
    for (more, status, kind) in [
        (
            json!({"protocol": "tcp", "port_range_min": 9, "port_range_max": 1}),
            400,
            "SecurityGroupInvalidPortRange",
        ),
        (json!({"remote_group_id": hers}), 404, "SecurityGroupNotFound"),
        (json!({"security_group_id": hers}), 404, "SecurityGroupNotFound"),
        (json!({"remote_address_group_id": hers}), 404, "AddressGroupNotFound"),
        (json!({"direction": "sideways"}), 400, "HTTPBadRequest"),
        (json!({"colour": "red"}), 400, "HTTPBadRequest"),
    ] {
        refused(ada.post("security-group-rules", rule(more)).await, status, kind);
    }
    let path = format!("security-group-rules/{}", id(made));
    refused(eve.get(&path).await, 404, "SecurityGroupRuleNotFound");
    refused(eve.delete(&path).await, 404, "SecurityGroupRuleNotFound");
    let change = json!({"security_group_rule": {"protocol": "udp"}});
    refused(ada.put(&path, change).await, 405, "HTTPMethodNotAllowed");
    let list =
        ada.get(&format!("security-group-rules?security_group_id={group}&protocol=tcp")).await.expect(200);
    assert_eq!(ids(&list["security_group_rules"]), [id(made)]);
    // Bulk: all or nothing.
    let member = |port: i64| {
        json!({"security_group_id": group, "direction": "ingress", "protocol": "udp", "port_range_min": port,
               "port_range_max": port})
    };
    let bulk = json!({"security_group_rules": [member(53), member(0)]});
    refused(ada.post("security-group-rules", bulk).await, 400, "SecurityGroupInvalidPortValue");
    let bulk = json!({"security_group_rules": [member(53), member(54)]});
    let made = ada.post("security-group-rules", bulk).await.expect(201);
    assert_eq!(made["security_group_rules"].as_array().unwrap().len(), 2);
    ada.delete(&path).await.expect(204);
    let quota = json!({"quota": {"security_group_rule": 0}});
    Client::admin(&test).put(&format!("quotas/{}", ada.project), quota).await.expect(200);
    refused(ada.post("security-group-rules", rule(json!({}))).await, 409, "OverQuota");
}

#[tokio::test]
async fn a_group_that_goes_takes_the_rules_that_name_it() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let (a, b) = (
        id(&ada.make("security-groups", "security_group", json!({"name": "a"})).await),
        id(&ada.make("security-groups", "security_group", json!({"name": "b"})).await),
    );
    let rule = json!({"security_group_id": a, "direction": "ingress", "remote_group_id": b});
    let rule = id(&ada.make("security-group-rules", "security_group_rule", rule).await);
    ada.delete(&format!("security-groups/{b}")).await.expect(204);
    refused(ada.get(&format!("security-group-rules/{rule}")).await, 404, "SecurityGroupRuleNotFound");
}

#[tokio::test]
async fn ports_get_the_default_group_or_those_that_are_asked_for() {
    let test = TestApp::new().await;
    let (ada, eve) = (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await);
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let port = ada.port(&network, json!({})).await;
    let default = ada.get("security-groups?name=default").await.expect(200);
    assert_eq!(port["security_groups"], json!([default["security_groups"][0]["id"]]));
    assert_eq!(port["port_security_enabled"], true);
    let web = id(&ada.make("security-groups", "security_group", json!({"name": "web"})).await);
    let path = format!("ports/{}", id(&port));
    let set = |value: Value| json!({ "port": value });
    let changed = ada.put(&path, set(json!({"security_groups": [web]}))).await.expect(200);
    assert_eq!(changed["port"]["security_groups"], json!([web]));
    refused(ada.delete(&format!("security-groups/{web}")).await, 409, "SecurityGroupInUse");
    let list = ada.get(&format!("ports?security_groups={web}")).await.expect(200);
    assert_eq!(ids(&list["ports"]), [id(&port)]);
    let hers = eve.get("security-groups").await.expect(200);
    let theirs = id(&hers["security_groups"][0]);
    refused(ada.put(&path, set(json!({"security_groups": [theirs]}))).await, 404, "SecurityGroupNotFound");
    refused(
        ada.put(&path, set(json!({"port_security_enabled": false}))).await,
        409,
        "PortSecurityPortHasSecurityGroup",
    );
    let off = json!({"port_security_enabled": false, "security_groups": []});
    ada.put(&path, set(off)).await.expect(200);
    refused(
        ada.put(&path, set(json!({"security_groups": [web]}))).await,
        400,
        "PortSecurityAndIPRequiredForSecurityGroups",
    );
    let pair = json!({"allowed_address_pairs": [{"ip_address": "10.0.0.99"}]});
    refused(ada.put(&path, set(pair.clone())).await, 409, "AddressPairAndPortSecurityRequired");
    ada.put(&path, set(json!({"port_security_enabled": true}))).await.expect(200);
    let changed = ada.put(&path, set(pair)).await.expect(200);
    assert_eq!(
        changed["port"]["allowed_address_pairs"],
        json!([{"ip_address": "10.0.0.99", "mac_address": port["mac_address"]}])
    );
    for (pairs, kind) in [
        (json!([{"mac_address": "fa:16:3e:00:00:01"}]), "AllowedAddressPairsMissingIP"),
        (json!([{"ip_address": "10.0.0.9"}, {"ip_address": "10.0.0.9"}]), "DuplicateAddressPairInRequest"),
        (
            json!((0..11).map(|n| json!({"ip_address": format!("10.0.0.{n}")})).collect::<Vec<_>>()),
            "AllowedAddressPairExhausted",
        ),
        (json!([{"ip_address": "10.0.0.x"}]), "InvalidCIDR"),
    ] {
        refused(ada.put(&path, set(json!({"allowed_address_pairs": pairs}))).await, 400, kind);
    }
    // A network may do without.
    let open = json!({"name": "open", "port_security_enabled": false});
    let open = id(&ada.make("networks", "network", open).await);
    ada.subnet(&open, "10.2.0.0/24").await;
    let port = ada.port(&open, json!({})).await;
    assert_eq!((&port["security_groups"], &port["port_security_enabled"]), (&json!([]), &json!(false)));
}

#[tokio::test]
async fn stateful_and_stateless_groups_do_not_mix_on_a_port() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let network = ada.network("n").await;
    ada.subnet(&network, "10.0.0.0/24").await;
    let a = id(&ada.make("security-groups", "security_group", json!({"name": "a"})).await);
    let b = id(&ada.make("security-groups", "security_group", json!({"name": "b", "stateful": false})).await);
    let body = json!({"port": {"network_id": network, "security_groups": [a, b]}});
    refused(ada.post("ports", body).await, 409, "SecurityGroupConflict");
    ada.port(&network, json!({"security_groups": [b]})).await;
    let change = json!({"security_group": {"stateful": true}});
    refused(ada.put(&format!("security-groups/{b}"), change).await, 409, "SecurityGroupInUse");
}

#[tokio::test]
async fn address_groups_hold_ranges_for_rules() {
    let test = TestApp::new().await;
    let (ada, eve) = (Client::tenant(&test, "ada").await, Client::tenant(&test, "eve").await);
    let body = json!({"name": "office", "addresses": ["192.0.2.1", "198.51.100.7/24", "2001:db8::/64"]});
    let group = ada.make("address-groups", "address_group", body).await;
    assert_eq!(group["addresses"], json!(["192.0.2.1/32", "198.51.100.0/24", "2001:db8::/64"]));
    let path = format!("address-groups/{}", id(&group));
    let addresses = |list: Value| json!({"address_group": {"addresses": list}});
    let twice = ada.put(&format!("{path}/add_addresses"), addresses(json!(["192.0.2.1/32"]))).await;
    refused(twice, 400, "AddressesAlreadyExist");
    ada.put(&format!("{path}/add_addresses"), addresses(json!(["192.0.2.2"]))).await.expect(200);
    let bare = json!({"addresses": ["192.0.2.3"]});
    ada.put(&format!("{path}/add_addresses"), bare.clone()).await.expect(200);
    ada.put(&format!("{path}/remove_addresses"), bare).await.expect(200);
    let absent = ada.put(&format!("{path}/remove_addresses"), addresses(json!(["192.0.2.9"]))).await;
    refused(absent, 404, "AddressesNotFound");
    let left =
        ada.put(&format!("{path}/remove_addresses"), addresses(json!(["192.0.2.1"]))).await.expect(200);
    assert_eq!(
        left["address_group"]["addresses"],
        json!(["192.0.2.2/32", "198.51.100.0/24", "2001:db8::/64"])
    );
    refused(eve.get(&path).await, 404, "AddressGroupNotFound");
    refused(
        eve.put(&format!("{path}/add_addresses"), addresses(json!(["1.1.1.1"]))).await,
        404,
        "AddressGroupNotFound",
    );
    let web = id(&ada.make("security-groups", "security_group", json!({"name": "web"})).await);
    let rule =
        json!({"security_group_id": web, "direction": "ingress", "remote_address_group_id": group["id"]});
    let rule = id(&ada.make("security-group-rules", "security_group_rule", rule).await);
    refused(ada.delete(&path).await, 409, "AddressGroupInUse");
    ada.delete(&format!("security-group-rules/{rule}")).await.expect(204);
    ada.delete(&path).await.expect(204);
}

/// The status and type of a change that names a revision.
async fn with_revision(client: &Client<'_>, method: Method, path: &str, text: &str, body: &str) -> Answer {
    let request = http::Request::builder()
        .method(method)
        .uri(format!("{BASE}/{path}"))
        .header("x-auth-token", &client.token)
        .header("content-type", "application/json")
        .header("if-match", text);
    client.test.send(request.body(axum::body::Body::from(body.to_owned())).unwrap()).await
}

#[tokio::test]
async fn a_change_that_names_a_revision_is_refused_once_the_resource_has_another() {
    let test = TestApp::new().await;
    let ada = Client::tenant(&test, "ada").await;
    let eve = Client::tenant(&test, "eve").await;
    let web = ada.make("security-groups", "security_group", json!({"name": "web"})).await;
    let path = format!("security-groups/{}", id(&web));
    let body = r#"{"security_group": {"description": "seen"}}"#;
    let seen = "revision_number=1";
    let changed = with_revision(&ada, Method::PUT, &path, seen, body).await.expect(200);
    assert_eq!(changed["security_group"]["revision_number"], 2);
    for (method, body) in
        [(Method::PUT, r#"{"security_group": {"description": "late"}}"#), (Method::DELETE, "")]
    {
        let answer = with_revision(&ada, method, &path, seen, body).await;
        let message = refused(answer, 412, "RevisionNumberConstraintFailed");
        assert_eq!(message, "Constrained to 1, but current revision is 2");
    }
    assert_eq!(ada.get(&path).await.expect(200)["security_group"]["description"], "seen");
    for wrong in ["1", "revision_number=", "revision_number=x", "\"etag\"", "*"] {
        refused(with_revision(&ada, Method::PUT, &path, wrong, body).await, 400, "HTTPBadRequest");
    }
    // Who may not see it learns nothing of its revision.
    for revision in [1, 2] {
        let text = format!("revision_number={revision}");
        refused(with_revision(&eve, Method::DELETE, &path, &text, "").await, 404, "SecurityGroupNotFound");
    }
    with_revision(&ada, Method::DELETE, &path, "revision_number=2", "").await.expect(204);
    refused(ada.get(&path).await, 404, "SecurityGroupNotFound");
}

#[tokio::test]
async fn views_take_filters_and_long_descriptions_are_kept() {
    let test = TestApp::new().await;
    let admin = Client::admin(&test);
    let network = admin.network("dual").await;
    admin.subnet(&network, "10.0.0.0/24").await;
    admin.subnet(&network, "fd00::/64").await;
    for (filter, subnets) in
        [("", 2), ("&ip_version=4", 1), ("&ip_version=6", 1), ("&ip_version=4&ip_version=6", 2)]
    {
        let path = format!("network-ip-availabilities?network_id={network}{filter}");
        let found = admin.get(&path).await.expect(200);
        let [view] = &found["network_ip_availabilities"].as_array().unwrap()[..] else { panic!("{found}") };
        assert_eq!(view["subnet_ip_availability"].as_array().unwrap().len(), subnets, "{filter}");
        assert!(view.get("ip_version").is_none());
    }
    let none = admin.get("availability_zones?resource=compute").await.expect(200);
    assert_eq!(none["availability_zones"], json!([]));
    refused(admin.get("availability_zones?color=red").await, 400, "HTTPBadRequest");
    let kinds = admin.get("qos/rule-types?type=dscp_marking").await.expect(200);
    assert_eq!(kinds["rule_types"], json!([{"type": "dscp_marking"}]));
    for kind in ["bandwidth_limit", "dscp_marking"] {
        let shown = admin.get(&format!("qos/rule-types/{kind}")).await.expect(200);
        assert_eq!(shown["rule_type"]["type"], kind);
    }
    refused(admin.get("qos/rule-types?all_rules=true").await, 400, "HTTPBadRequest");
    let long = "d".repeat(1024);
    let body = json!({"name": "friends", "description": long, "addresses": []});
    assert_eq!(admin.make("address-groups", "address_group", body).await["description"], json!(long));
    let body = json!({"network": {"name": "n", "description": long}});
    refused(admin.post("networks", body).await, 400, "HTTPBadRequest");
    let policy = id(&admin.make("qos/policies", "policy", json!({"name": "p"})).await);
    // VOICE-ADMIT (RFC 5865).
    let mark = json!({"dscp_marking_rule": {"dscp_mark": 44}});
    admin.post(&format!("qos/policies/{policy}/dscp_marking_rules"), mark).await.expect(201);
}
