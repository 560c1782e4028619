//! What is done to a server, from its first report to its end.

use super::*;

#[tokio::test]
async fn stop_start_and_reboot_are_wishes_until_the_host_reports_them() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let refused = fault(cloud.act(&id, json!({"os-start": null})).await, 409, "conflictingRequest");
    assert_eq!(refused, format!("Cannot 'start' instance {id} while it is in vm_state active"));
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", "powering-off", 1]));
    let refused = fault(cloud.act(&id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    assert_eq!(refused, format!("Cannot 'stop' instance {id} while it is in task_state powering-off"));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SHUTOFF", "stopped", null, 4]));
    cloud.act(&id, json!({"os-start": null})).await.expect(202);
    assert_eq!(cloud.states(&id).await, json!(["SHUTOFF", "stopped", "powering-on", 4]));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    for (kind, status) in [("SOFT", "REBOOT"), ("HARD", "HARD_REBOOT")] {
        let before = cloud.host.desired(&cloud.test, 0).await.servers[0].run_generation;
        cloud.act(&id, json!({"reboot": {"type": kind}})).await.expect(202);
        assert_eq!(cloud.states(&id).await[0], status);
        assert_eq!(cloud.host.desired(&cloud.test, 0).await.servers[0].run_generation, before + 1);
        cloud.settle().await;
        assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    }
}

#[tokio::test]
async fn a_delete_ends_when_the_host_has_no_trace_left_and_frees_what_it_used() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.delete(&format!("/{id}")).await.expect(204);
    assert_eq!(cloud.states(&id).await[2], "deleting");
    // Again is no error, and everything else is.
    cloud.delete(&format!("/{id}")).await.expect(204);
    let refused = fault(cloud.act(&id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    assert!(refused.contains("task_state deleting"), "{refused}");
    cloud.settle().await;
    fault(cloud.get(&format!("/{id}")).await, 404, "itemNotFound");
    let limits = cloud.test.get("/compute/v2.1/limits", &cloud.token).await.expect(200);
    assert_eq!(limits["limits"]["absolute"]["totalInstancesUsed"], 0);
    let ports =
        cloud.test.get(&format!("/network/v2.0/ports?device_id={id}"), &cloud.token).await.expect(200);
    assert_eq!(ports["ports"], json!([]));
}

#[tokio::test]
async fn an_action_that_is_none_is_refused() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    for action in [
        json!({"fly": null}),
        json!({}),
        json!({"os-stop": null, "os-start": null}),
        json!([]),
        json!({"os-stop": {"x": 1}}),
        json!({"reboot": null}),
        json!({"reboot": {"type": "WARM"}}),
        json!({"reboot": {"type": "SOFT", "x": 1}}),
    ] {
        fault(cloud.act(&id, action).await, 400, "badRequest");
    }
    let nowhere = cloud.act("6dbd8f5b-0000-4000-8000-000000000001", json!({"os-stop": null})).await;
    fault(nowhere, 404, "itemNotFound");
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
}

#[tokio::test]
async fn strangers_do_not_see_a_server_and_readers_do_not_change_it() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let (_, stranger) = cloud.test.tenant("bob", "member").await;
    let test = &cloud.test;
    let at = |path: &str| format!("{SERVERS}/{id}{path}");
    for path in ["", "/ips", "/metadata", "/os-interface", "/os-instance-actions", "/os-volume_attachments"] {
        fault(test.get(&at(path), &stranger).await, 404, "itemNotFound");
        test.get(&at(path), &test.admin_token).await.expect(200);
        test.get(&at(path), "").await.expect(401);
    }
    fault(test.delete(&at(""), &stranger).await, 404, "itemNotFound");
    fault(test.post(&at("/action"), &stranger, json!({"os-stop": null})).await, 404, "itemNotFound");
    let body = json!({"server": {"name": "x"}});
    fault(test.call(Method::PUT, &at(""), &stranger, body.clone()).await, 404, "itemNotFound");
    // A reader of the same project sees it, and no more.
    let body_of = json!({"user": {"name": "rita", "password": "pw"}});
    let user = test.post("/identity/v3/users", &test.admin_token, body_of).await.expect(201);
    let roles = test.get("/identity/v3/roles?name=reader", &test.admin_token).await.expect(200);
    let path = format!(
        "/identity/v3/projects/{}/users/{}/roles/{}",
        cloud.project,
        user["user"]["id"].as_str().unwrap(),
        roles["roles"][0]["id"].as_str().unwrap()
    );
    test.call(Method::PUT, &path, &test.admin_token, Value::Null).await.expect(204);
    let reader = test.token("rita", "pw", Some("ada")).await;
    test.get(&at(""), &reader).await.expect(200);
    fault(test.delete(&at(""), &reader).await, 403, "forbidden");
    fault(test.post(&at("/action"), &reader, json!({"os-stop": null})).await, 403, "forbidden");
    fault(test.call(Method::PUT, &at(""), &reader, body).await, 403, "forbidden");
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
}

#[tokio::test]
async fn a_new_name_is_shown_and_told_to_the_host() {
    let cloud = Cloud::new().await;
    let id = cloud.run("old").await;
    let body = json!({"server": {"name": " new "}});
    let changed = cloud.put(&format!("/{id}"), body).await.expect(200);
    assert_eq!(changed["server"]["name"], "new");
    let spec = cloud.host.desired(&cloud.test, 0).await.servers.remove(0);
    assert_eq!((spec.metadata.name.as_str(), spec.metadata.hostname.as_str()), ("new", "old"));
    for body in [json!({"server": {"name": ""}}), json!({"server": {"flavor": "2"}}), json!({})] {
        fault(cloud.put(&format!("/{id}"), body).await, 400, "badRequest");
    }
}

#[tokio::test]
async fn what_was_done_is_recorded_with_its_request() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let answer = cloud.act(&id, json!({"os-stop": null})).await;
    let request = answer.header("x-openstack-request-id").to_owned();
    answer.expect(202);
    let actions = cloud.get(&format!("/{id}/os-instance-actions")).await.expect(200);
    let list = actions["instanceActions"].as_array().unwrap();
    assert_eq!((&list[0]["action"], &list[1]["action"]), (&json!("stop"), &json!("create")));
    assert_eq!((&list[0]["request_id"], &list[0]["project_id"]), (&json!(request), &json!(cloud.project)));
    let one = cloud.get(&format!("/{id}/os-instance-actions/{request}")).await.expect(200);
    assert_eq!(one["instanceAction"]["action"], "stop");
    fault(cloud.get(&format!("/{id}/os-instance-actions/req-x")).await, 404, "itemNotFound");
}
