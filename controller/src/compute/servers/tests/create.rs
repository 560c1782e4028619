//! `POST /servers`.

use super::*;

#[tokio::test]
async fn a_server_is_promised_with_its_place_and_address_and_shown_as_building() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("web 1");
    wish["server"]["metadata"] = json!({"role": "web"});
    wish["server"]["user_data"] = json!("I2Nsb3Vk");
    let answer = cloud.test.post(SERVERS, &cloud.token, wish).await;
    let location = answer.header("location").to_owned();
    let made = answer.expect(202)["server"].take();
    let id = made["id"].as_str().unwrap();
    assert_eq!(location, format!("http://cloud.test:8774{SERVERS}/{id}"));
    assert_eq!(made["links"][1]["href"], format!("http://cloud.test:8774/compute/servers/{id}"));
    assert!(made["adminPass"].is_null(), "a password is set if one is given, and never made");
    assert_eq!(made["OS-DCF:diskConfig"], "AUTO");
    let server = cloud.show(id).await;
    assert_eq!(cloud.states(id).await, json!(["BUILD", "building", "scheduling", 0]));
    assert_eq!((&server["name"], &server["tenant_id"]), (&json!("web 1"), &json!(cloud.project)));
    assert_eq!((&server["image"]["id"], &server["metadata"]["role"]), (&json!(cloud.image), &json!("web")));
    assert!(server["hostId"].as_str().is_some_and(|text| text.len() == 56));
    assert!(server["OS-EXT-SRV-ATTR:host"].is_null(), "hosts are for admins");
    let address = &server["addresses"]["net"][0];
    assert_eq!((&address["version"], &address["OS-EXT-IPS:type"]), (&json!(4), &json!("fixed")));
    assert!(address["addr"].as_str().unwrap().starts_with("10.1.0."));

    // The host is told all of it.
    let desired = cloud.host.desired(&cloud.test, 0).await;
    let spec = &desired.servers[0];
    assert_eq!((spec.id.to_string().as_str(), spec.memory_mib, spec.boot.disk.size), (id, 64, 4096));
    assert_eq!(
        (spec.metadata.hostname.as_str(), spec.metadata.user_data.as_deref()),
        ("web-1", Some("I2Nsb3Vk"))
    );
    assert_eq!(spec.boot.command_line.as_deref(), Some("quiet"));
    let ip = desired.networks[0].ports[0].fixed_ips[0].ip_address.to_string();
    assert_eq!(address["addr"], ip);
    cloud.settle().await;
    assert_eq!(cloud.states(id).await, json!(["ACTIVE", "active", null, 1]));
    let admin = cloud.test.get(&format!("{SERVERS}/{id}"), &cloud.test.admin_token).await.expect(200);
    assert_eq!(admin["server"]["OS-EXT-SRV-ATTR:host"], "h1");
}

#[tokio::test]
async fn a_password_and_a_disk_that_does_not_grow_are_told_to_the_guest() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("s");
    for (name, value) in [
        ("adminPass", "se cret"),
        ("OS-DCF:diskConfig", "MANUAL"),
        ("accessIPv4", "192.0.2.7"),
        ("accessIPv6", "2001:DB8::7"),
    ] {
        wish["server"][name] = json!(value);
    }
    let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202)["server"].take();
    assert_eq!(made["OS-DCF:diskConfig"], "MANUAL");
    let text = cloud.spec().await.metadata.vendor_data.unwrap();
    assert!(text.contains("resize_rootfs: false") && text.contains("password: '$6$"), "{text}");
    assert!(!text.contains("cret"));
    let id = made["id"].as_str().unwrap();
    let shown = cloud.show(id).await;
    assert_eq!((&shown["accessIPv4"], &shown["accessIPv6"]), (&json!("192.0.2.7"), &json!("2001:db8::7")));
    let change = json!({"server": {"accessIPv4": "", "OS-DCF:diskConfig": "AUTO"}});
    let changed = cloud.put(&format!("/{id}"), change).await.expect(200)["server"].take();
    assert_eq!((&changed["accessIPv4"], &changed["OS-DCF:diskConfig"]), (&json!(""), &json!("AUTO")));
    assert!(changed["OS-EXT-STS:vm_state"].is_null(), "what extensions add is shown since 2.75");
    assert!(!cloud.spec().await.metadata.vendor_data.unwrap().contains("growpart"));
    for (query, found) in
        [("access_ip_v6=2001:db8::7", 1), ("access_ip_v4=192.0.2.7", 0), ("auto_disk_config=AUTO", 1)]
    {
        let admin = &cloud.test.admin_token;
        let list = cloud.test.get(&format!("{SERVERS}?all_tenants=1&{query}"), admin).await.expect(200);
        assert_eq!(list["servers"].as_array().unwrap().len(), found, "{query}");
    }
    let wrong = json!({"server": {"accessIPv4": "2001:db8::7"}});
    cloud.put(&format!("/{id}"), wrong).await.expect(400);
}

#[tokio::test]
async fn the_servers_of_one_request_have_its_number() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("s");
    wish["server"]["min_count"] = json!(2);
    wish["server"]["return_reservation_id"] = json!(true);
    let answer = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let number = answer["reservation_id"].as_str().unwrap();
    let path = format!("{SERVERS}/detail?all_tenants=1&reservation_id={number}");
    let list = cloud.test.get_at(&path, &cloud.test.admin_token, 3).await.expect(200);
    assert_eq!(list["servers"].as_array().unwrap().len(), 2);
    assert_eq!(list["servers"][0]["OS-EXT-SRV-ATTR:reservation_id"], number);
}

#[tokio::test]
async fn before_2_37_a_project_without_a_network_gets_a_server_without_a_nic() {
    let cloud = Cloud::new().await;
    let (_, other) = cloud.test.tenant("eve", "member").await;
    let image = bootable(&cloud.test, &other, "its own", 9).await;
    let body = json!({"server": {"name": "s", "imageRef": image, "flavorRef": "1"}});
    let made = cloud.test.post(SERVERS, &other, body.clone()).await.expect(202)["server"].take();
    let path = format!("{SERVERS}/{}", made["id"].as_str().unwrap());
    assert_eq!(cloud.test.get(&path, &other).await.expect(200)["server"]["addresses"], json!({}));
    cloud.test.post_at(SERVERS, &other, 37, body).await.expect(400);
}

#[tokio::test]
async fn the_flavors_limits_reach_the_host() {
    let cloud = Cloud::new().await;
    let wish = cloud.wish("slow");
    let flavor = wish["server"]["flavorRef"].as_str().unwrap();
    let path = format!("/compute/v2.1/flavors/{flavor}/os-extra_specs");
    let specs = json!({"extra_specs": {"quota:disk_total_iops_sec": "100", "hw_rng:allowed": "false"}});
    cloud.test.post(&path, &cloud.test.admin_token, specs).await.expect(200);
    cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let devices = cloud.spec().await.devices;
    assert_eq!(devices.disk_operations, Some(mote_host_api::Bucket { tokens: 10, refill_ms: 100 }));
    assert!(devices.without_random);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_the_field_and_leaves_nothing() {
    let cloud = Cloud::new().await;
    for (field, value, part) in [
        ("name", json!(""), "name"),
        ("name", json!("x".repeat(256)), "name"),
        ("flavorRef", json!("none"), "flavorRef"),
        ("imageRef", json!("6dbd8f5b-0000-4000-8000-000000000001"), "imageRef"),
        ("imageRef", json!("x"), "imageRef"),
        ("networks", json!([{"uuid": "6dbd8f5b-0000-4000-8000-000000000001"}]), "could not be found"),
        ("networks", json!([{"uuid": cloud.network, "fixed_ip": "192.0.2.1"}]), "192.0.2.1"),
        ("networks", json!([{"port": "6dbd8f5b-0000-4000-8000-000000000001"}]), "could not be found"),
        ("key_name", json!("none"), "key_name"),
        ("user_data", json!("!"), "user_data"),
        ("availability_zone", json!("moon"), "availability_zone"),
        ("min_count", json!(0), "min_count"),
        ("max_count", json!(101), "max_count"),
        ("metadata", json!({"a": 1}), "Invalid input"),
        ("unheard_of", json!(1), "unheard_of"),
    ] {
        let mut wish = cloud.wish("s");
        wish["server"][field] = value.clone();
        let answer = cloud.test.post(SERVERS, &cloud.token, wish).await;
        let message = fault(answer, 400, "badRequest");
        assert!(message.contains(part), "{field} = {value}: {message}");
    }
    for field in ["name", "flavorRef", "imageRef"] {
        let mut wish = cloud.wish("s");
        wish["server"].as_object_mut().unwrap().remove(field);
        let message = fault(cloud.test.post(SERVERS, &cloud.token, wish).await, 400, "badRequest");
        assert!(message.contains(field), "{message}");
    }
    assert_eq!(cloud.get("").await.expect(200), json!({"servers": []}));
    let ports = cloud.test.get("/network/v2.0/ports", &cloud.token).await.expect(200);
    let of_servers = ports["ports"].as_array().unwrap().iter().filter(|port| port["device_id"] != "");
    assert_eq!(of_servers.filter(|port| port["device_owner"] != "network:distributed").count(), 0);
}

#[tokio::test]
async fn readers_and_those_without_a_token_create_nothing() {
    let cloud = Cloud::new().await;
    let (_, reader) = cloud.test.tenant("eve", "reader").await;
    cloud.test.post(SERVERS, "", cloud.wish("s")).await.expect(401);
    fault(cloud.test.post(SERVERS, &reader, cloud.wish("s")).await, 403, "forbidden");
    // The image and the network are another project's: they do not exist for this one.
    let (_, other) = cloud.test.tenant("bob", "member").await;
    let message = fault(cloud.test.post(SERVERS, &other, cloud.wish("s")).await, 400, "badRequest");
    assert!(message.contains("imageRef"), "{message}");
}

#[tokio::test]
async fn a_hundred_at_once_at_a_quota_of_ten_give_exactly_ten() {
    let cloud = Cloud::new().await;
    let tasks: Vec<_> = (0..100)
        .map(|index| {
            let (test, token) = (cloud.test.clone(), cloud.token.clone());
            let wish = cloud.wish(&format!("s{index}"));
            tokio::spawn(async move { test.post(SERVERS, &token, wish).await.status.as_u16() })
        })
        .collect();
    let mut statuses = Vec::new();
    for task in tasks {
        statuses.push(task.await.unwrap());
    }
    let count = |status: u16| statuses.iter().filter(|s| **s == status).count();
    assert_eq!((count(202), count(403)), (10, 90), "{statuses:?}");
    let listed = cloud.get("").await.expect(200);
    assert_eq!(listed["servers"].as_array().unwrap().len(), 10);
    let limits = cloud.test.get("/compute/v2.1/limits", &cloud.token).await.expect(200);
    assert_eq!(limits["limits"]["absolute"]["totalInstancesUsed"], 10);
    let message = fault(cloud.test.post(SERVERS, &cloud.token, cloud.wish("s")).await, 403, "forbidden");
    assert_eq!(message, "Quota exceeded for instances: Requested 1, but already used 10 of 10 instances");
}

#[tokio::test]
async fn a_request_for_several_makes_at_least_the_least_and_at_most_what_the_quota_leaves() {
    let cloud = Cloud::new().await;
    cloud.quota(json!({"instances": 3})).await;
    let mut wish = cloud.wish("many");
    (wish["server"]["min_count"], wish["server"]["max_count"]) = (json!(2), json!(8));
    cloud.test.post(SERVERS, &cloud.token, wish.clone()).await.expect(202);
    let listed = cloud.get("?sort_key=display_name&sort_dir=asc").await.expect(200);
    let names: Vec<&str> =
        listed["servers"].as_array().unwrap().iter().map(|server| server["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["many-1", "many-2", "many-3"]);
    fault(cloud.test.post(SERVERS, &cloud.token, wish).await, 403, "forbidden");
    cloud.quota(json!({"instances": 10, "ram": 200})).await;
    let message = fault(cloud.test.post(SERVERS, &cloud.token, cloud.wish("s")).await, 403, "forbidden");
    assert!(message.starts_with("Quota exceeded for ram"), "{message}");
}

#[tokio::test]
async fn without_a_fitting_host_the_server_is_an_error_that_says_why_and_goes_at_once() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("huge");
    wish["server"]["flavorRef"] = json!("5");
    let flavor = json!({"flavor": {"name": "huge", "id": "huge", "vcpus": 9, "ram": 64, "disk": 0}});
    cloud.test.post("/compute/v2.1/flavors", &cloud.test.admin_token, flavor).await.expect(200);
    wish["server"]["flavorRef"] = json!("huge");
    let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let id = made["server"]["id"].as_str().unwrap();
    let server = cloud.show(id).await;
    assert_eq!((&server["status"], &server["fault"]["code"]), (&json!("ERROR"), &json!(500)));
    let message = server["fault"]["message"].as_str().unwrap();
    assert_eq!(message, "No valid host was found. Hosts refused: too few vCPUs left (1).");
    assert_eq!(cloud.host.desired(&cloud.test, 0).await.servers, []);
    fault(cloud.act(id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    cloud.delete(&format!("/{id}")).await.expect(204);
    fault(cloud.get(&format!("/{id}")).await, 404, "itemNotFound");
}

#[tokio::test]
async fn only_admins_choose_a_host() {
    let cloud = Cloud::new().await;
    let mut wish = cloud.wish("s");
    wish["server"]["availability_zone"] = json!("nova:h1");
    fault(cloud.test.post(SERVERS, &cloud.token, wish.clone()).await, 403, "forbidden");
    wish["server"]["availability_zone"] = json!("nova");
    let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let server = cloud.show(made["server"]["id"].as_str().unwrap()).await;
    assert_eq!(server["OS-EXT-AZ:availability_zone"], "nova");
}

#[tokio::test]
async fn a_config_drive_is_told_to_the_host_and_shown_and_made_anew_by_a_rebuild_only() {
    let cloud = Cloud::new().await;
    for wanted in [json!(false), json!(""), json!("False"), json!(null)] {
        let mut wish = cloud.wish("without");
        wish["server"]["config_drive"] = wanted;
        let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
        let id = made["server"]["id"].as_str().unwrap();
        assert_eq!(cloud.show(id).await["config_drive"], "");
        assert_eq!(cloud.spec().await.config_drive, None);
        cloud.delete(&format!("/{id}")).await.expect(204);
        cloud.settle().await;
    }
    for wanted in [json!("perhaps"), json!(2), json!([true])] {
        let mut wish = cloud.wish("s");
        wish["server"]["config_drive"] = wanted;
        let message = fault(cloud.test.post(SERVERS, &cloud.token, wish).await, 400, "badRequest");
        assert!(message.contains("config_drive"), "{message}");
    }
    let mut wish = cloud.wish("with");
    wish["server"]["config_drive"] = json!("True");
    let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let id = made["server"]["id"].as_str().unwrap();
    cloud.settle().await;
    assert_eq!(cloud.show(id).await["config_drive"], "True");
    let other = cloud.run("without").await;
    for (query, found) in [
        ("config_drive=true", vec![id]),
        ("config_drive=True", vec![id]),
        ("config_drive=false", vec![other.as_str()]),
        ("config_drive=", vec![other.as_str()]),
    ] {
        let list = cloud.test.get_at(&format!("{SERVERS}?{query}"), &cloud.token, 90).await.expect(200);
        let ids: Vec<&str> =
            list["servers"].as_array().unwrap().iter().map(|server| server["id"].as_str().unwrap()).collect();
        assert_eq!(ids, found, "{query}");
    }
    fault(cloud.get("?config_drive=perhaps").await, 400, "badRequest");
    cloud.delete(&format!("/{other}")).await.expect(204);
    cloud.settle().await;

    assert_eq!(cloud.spec().await.config_drive, Some(1));
    cloud.act(id, json!({"reboot": {"type": "HARD"}})).await.expect(202);
    cloud.settle().await;
    cloud.act(id, json!({"resize": {"flavorRef": "2"}})).await.expect(202);
    cloud.settle().await;
    cloud.act(id, json!({"confirmResize": null})).await.expect(204);
    cloud.settle().await;
    let spec = cloud.spec().await;
    assert_eq!((spec.config_drive, spec.disk.number), (Some(1), 2), "kept, with a new root disk");
    let rebuilt = cloud.act(id, json!({"rebuild": {"imageRef": cloud.image}})).await.expect(202);
    assert!(rebuilt["server"]["config_drive"].is_null(), "not in the answer of a rebuild before 2.75");
    assert_eq!(cloud.show(id).await["config_drive"], "True");
    assert_eq!(cloud.spec().await.config_drive, Some(3));
}

#[tokio::test]
async fn zones_and_metadata_of_aggregates_decide_where_servers_go() {
    let cloud = Cloud::new().await;
    let (test, admin) = (&cloud.test, cloud.test.admin_token.as_str());
    let second = FakeHost::join(test, "h2").await;
    let aggregates = "/compute/v2.1/os-aggregates";
    let body = json!({"aggregate": {"name": "fast", "availability_zone": "east"}});
    let made = test.post(aggregates, admin, body).await.expect(200);
    let path = format!("{aggregates}/{}/action", made["aggregate"]["id"]);
    test.post(&path, admin, json!({"add_host": {"host": "h2"}})).await.expect(200);
    let body = json!({"set_metadata": {"metadata": {"disk": "nvme,ssd"}}});
    test.post(&path, admin, body).await.expect(200);
    let mut wish = cloud.wish("s");
    wish["server"]["availability_zone"] = json!("east");
    for _ in 0..2 {
        test.post(SERVERS, &cloud.token, wish.clone()).await.expect(202);
    }
    assert_eq!(second.desired(test, 0).await.servers.len(), 2);
    wish["server"]["availability_zone"] = json!("west");
    fault(test.post(SERVERS, &cloud.token, wish).await, 400, "badRequest");
    let specs = "/compute/v2.1/flavors/1/os-extra_specs";
    let host_with = async |spec: &str| {
        let body = json!({"extra_specs": {"aggregate_instance_extra_specs:disk": spec}});
        test.post(specs, admin, body).await.expect(200);
        let id = cloud.create("s").await;
        let path = format!("{SERVERS}/{id}");
        test.get(&path, admin).await.expect(200)["server"]["OS-EXT-SRV-ATTR:host"].take()
    };
    for _ in 0..2 {
        assert_eq!(host_with("<or> tape <or> nvme").await, "h2");
    }
    assert_eq!(host_with("tape").await, Value::Null);
}
