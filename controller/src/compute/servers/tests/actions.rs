//! Each row of the table in `compute::state`, with a host that does what is wanted.

use mote_host_api::{DesiredPower, DiskSpec, GivenUp, ObservedServer, ServerState, Wish};

use super::*;
use crate::hosts::fake::as_wanted;

#[tokio::test]
async fn a_paused_server_stands_still_until_it_goes_on() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let begun = cloud.begun(&id, json!({"pause": null})).await;
    assert_eq!(begun, json!(["ACTIVE", "active", "pausing", 1]));
    let spec = cloud.spec().await;
    assert_eq!((spec.power, spec.run_generation), (DesiredPower::Paused, 1));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["PAUSED", "paused", null, 3]));
    fault(cloud.act(&id, json!({"pause": null})).await, 409, "conflictingRequest");
    fault(cloud.act(&id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    let begun = cloud.begun(&id, json!({"unpause": null})).await;
    assert_eq!(begun, json!(["PAUSED", "paused", "unpausing", 3]));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    fault(cloud.act(&id, json!({"unpause": null})).await, 409, "conflictingRequest");
}

/// Reports all as it is wanted but what the host has given up.
async fn give_up(cloud: &Cloud, state: ServerState, wish: Wish) {
    let desired = cloud.host.desired(&cloud.test, 0).await;
    let given_up = vec![GivenUp { wish, message: "No space left on device".into() }];
    let mut server = as_wanted(&desired.servers[0]);
    (server.state, server.given_up) = (state, given_up);
    cloud.host.report(&cloud.test, desired.generation, vec![server]).await.expect(204);
}

/// The newest action with its event, as of microversion 2.84.
async fn last_action(cloud: &Cloud, id: &str) -> Value {
    let path = format!("{SERVERS}/{id}/os-instance-actions");
    let all = cloud.test.get(&path, &cloud.token).await.expect(200);
    let request = all["instanceActions"][0]["request_id"].as_str().unwrap().to_owned();
    let path = format!("{path}/{request}");
    cloud.test.get_at(&path, &cloud.token, 84).await.expect(200)["instanceAction"].take()
}

#[tokio::test]
async fn a_suspension_that_a_host_gives_up_is_taken_back_and_the_action_says_why() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let old = cloud.host.desired(&cloud.test, 0).await.generation;
    cloud.begun(&id, json!({"suspend": null})).await;
    // What was said before the host knew of this wish is of another one.
    let spec = cloud.spec().await;
    let given_up = vec![GivenUp { wish: Wish::Suspend, message: "x".into() }];
    let early = ObservedServer { state: ServerState::Running, given_up, ..as_wanted(&spec) };
    cloud.host.report(&cloud.test, old, vec![early]).await.expect(204);
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", "suspending", 1]));
    give_up(&cloud, ServerState::Running, Wish::Suspend).await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert_eq!(cloud.spec().await.power, DesiredPower::Running);
    let action = last_action(&cloud, &id).await;
    assert_eq!((&action["action"], &action["message"]), (&json!("suspend"), &json!("Error")));
    let event = &action["events"][0];
    assert_eq!(event["result"], "Error");
    assert!(event["details"].as_str().unwrap().contains("No space left on device"), "{event}");
    // It can be asked for again, and then it works.
    cloud.begun(&id, json!({"suspend": null})).await;
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SUSPENDED", "suspended", null, 4]));
}

#[tokio::test]
async fn an_image_whose_disk_a_host_can_not_copy_goes_and_the_action_says_why() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let answer = cloud.act(&id, json!({"createImage": {"name": "copy"}})).await;
    assert_eq!(answer.status.as_u16(), 202);
    let image = cloud.spec().await.captures[0].image_id;
    give_up(&cloud, ServerState::Running, Wish::Capture(image)).await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert!(cloud.spec().await.captures.is_empty());
    cloud.test.get(&format!("/image/v2/images/{image}"), &cloud.token).await.expect(404);
    let action = last_action(&cloud, &id).await;
    assert_eq!((&action["action"], &action["events"][0]["result"]), (&json!("createImage"), &json!("Error")));
}

#[tokio::test]
async fn a_suspended_server_keeps_its_run_and_goes_on_or_is_rebooted() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    fault(cloud.act(&id, json!({"resume": null})).await, 409, "conflictingRequest");
    fault(cloud.act(&id, json!({"suspend": {"a": 1}})).await, 400, "badRequest");
    let begun = cloud.begun(&id, json!({"suspend": null})).await;
    assert_eq!(begun, json!(["ACTIVE", "active", "suspending", 1]));
    let spec = cloud.spec().await;
    assert_eq!((spec.power, spec.run_generation), (DesiredPower::Suspended, 1));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SUSPENDED", "suspended", null, 4]));
    for name in ["suspend", "pause", "unpause", "os-start", "os-stop"] {
        fault(cloud.act(&id, json!({ name: null })).await, 409, "conflictingRequest");
    }
    fault(cloud.act(&id, json!({"reboot": {"type": "SOFT"}})).await, 409, "conflictingRequest");
    let listed = cloud.get("?status=SUSPENDED").await.expect(200);
    assert_eq!(listed["servers"][0]["id"], json!(id));
    // What it has stays promised to it.
    let limits = cloud.test.get("/compute/v2.1/limits", &cloud.token).await.expect(200);
    assert_eq!(limits["limits"]["absolute"]["totalCoresUsed"], 1);
    let begun = cloud.begun(&id, json!({"resume": null})).await;
    assert_eq!(begun, json!(["SUSPENDED", "suspended", "resuming", 4]));
    let spec = cloud.spec().await;
    assert_eq!((spec.power, spec.run_generation), (DesiredPower::Running, 1));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));

    cloud.begun(&id, json!({"suspend": null})).await;
    cloud.settle().await;
    let begun = cloud.begun(&id, json!({"reboot": {"type": "HARD"}})).await;
    assert_eq!(begun, json!(["HARD_REBOOT", "suspended", "rebooting_hard", 4]));
    assert_eq!(cloud.spec().await.run_generation, 2);
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    let actions = cloud.get(&format!("/{id}/os-instance-actions")).await.expect(200);
    let actions: Vec<&str> = actions["instanceActions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|action| action["action"].as_str().unwrap())
        .collect();
    assert_eq!(actions, ["reboot", "suspend", "resume", "suspend", "create"]);
    cloud.begun(&id, json!({"suspend": null})).await;
    cloud.settle().await;
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    cloud.get(&format!("/{id}")).await.expect(404);
}

#[tokio::test]
async fn a_locked_server_is_changed_by_admins_only() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"lock": null})).await.expect(202);
    assert_eq!(cloud.show_at(&id, 9).await["locked"], true);
    let text = fault(cloud.act(&id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    assert_eq!(text, format!("Instance {id} is locked"));
    fault(cloud.delete(&format!("/{id}")).await, 409, "conflictingRequest");
    let body = json!({"metadata": {"a": "1"}});
    fault(cloud.put(&format!("/{id}/metadata"), body).await, 409, "conflictingRequest");
    cloud.act(&id, json!({"unlock": null})).await.expect(202);
    // An administrator's lock is not the owner's to open.
    let path = format!("{SERVERS}/{id}/action");
    let admin = &cloud.test.admin_token;
    let lock = json!({"lock": {"locked_reason": "audit"}});
    cloud.test.post(&path, admin, lock.clone()).await.expect(400);
    cloud.test.post_at(&path, admin, 73, lock).await.expect(202);
    assert_eq!(cloud.show_at(&id, 73).await["locked_reason"], "audit");
    fault(cloud.act(&id, json!({"unlock": null})).await, 403, "forbidden");
    let listed = cloud.test.get_at(&format!("{SERVERS}?locked=true"), &cloud.token, 73).await.expect(200);
    assert_eq!(listed["servers"].as_array().unwrap().len(), 1);
    cloud.test.post(&path, admin, json!({"os-stop": null})).await.expect(202);
    cloud.test.post(&path, admin, json!({"unlock": null})).await.expect(202);
    assert_eq!(cloud.show_at(&id, 73).await["locked_reason"], Value::Null);
}

#[tokio::test]
async fn a_server_joins_a_security_group_and_leaves_it_with_all_its_ports() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let body = json!({"security_group": {"name": "web"}});
    let groups = "/network/v2.0/security-groups";
    let made = cloud.test.post(groups, &cloud.token, body).await.expect(201)["security_group"].take();
    let names = async || {
        let list = cloud.get(&format!("/{id}/os-security-groups")).await.expect(200);
        let names = list["security_groups"].as_array().unwrap().iter();
        names.map(|group| group["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = cloud.host.desired(&cloud.test, 0).await.generation;
    cloud.act(&id, json!({"addSecurityGroup": {"name": "web"}})).await.expect(202);
    assert_eq!(names().await.len(), 2);
    let desired = cloud.host.desired(&cloud.test, 0).await;
    assert!(desired.generation > before, "the host hears of it");
    let group = made["id"].as_str().unwrap();
    assert!(desired.security_groups.iter().any(|spec| spec.id.to_string() == group));
    cloud.act(&id, json!({"addSecurityGroup": {"name": group}})).await.expect(202);
    cloud.act(&id, json!({"removeSecurityGroup": {"name": "web"}})).await.expect(202);
    assert_eq!(names().await, ["default"]);
    cloud.act(&id, json!({"removeSecurityGroup": {"name": "web"}})).await.expect(404);
    fault(cloud.act(&id, json!({"addSecurityGroup": {"name": "none"}})).await, 400, "badRequest");
    fault(cloud.act(&id, json!({"addSecurityGroup": {}})).await, 400, "badRequest");
}

#[tokio::test]
async fn what_is_not_there_comes_before_what_cannot_be_done() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let nobody = "6dbd8f5b-0000-4000-8000-000000000001";
    fault(cloud.act(nobody, json!({"migrate": null})).await, 404, "itemNotFound");
    fault(cloud.act(&id, json!({"migrate": null})).await, 501, "notImplemented");
}

#[tokio::test]
async fn a_rebuild_makes_a_new_disk_of_another_image_and_keeps_the_rest() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let before = cloud.show(&id).await;
    let other = bootable(&cloud.test, &cloud.token, "other", 9).await;
    let action =
        json!({"rebuild": {"imageRef": other, "name": "t", "metadata": {"a": "b"}, "adminPass": "pw"}});
    let rebuilt = cloud.act(&id, action).await.expect(202)["server"].take();
    assert_eq!((&rebuilt["status"], &rebuilt["adminPass"]), (&json!("REBUILD"), &Value::Null));
    assert_eq!((&rebuilt["image"]["id"], &rebuilt["name"]), (&json!(other), &json!("t")));
    let spec = cloud.spec().await;
    assert_eq!((spec.disk, spec.run_generation), (DiskSpec { number: 2, copy_of: None }, 2));
    assert!(spec.metadata.vendor_data.unwrap().contains("password: '$6$"));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    let after = cloud.show(&id).await;
    assert_eq!((&after["addresses"], &after["metadata"]), (&before["addresses"], &json!({"a": "b"})));
    // One that is off stays off, and gets its disk all the same.
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    let begun = cloud.begun(&id, json!({"rebuild": {"imageRef": cloud.image}})).await;
    assert_eq!(begun, json!(["REBUILD", "stopped", "rebuilding", 4]));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SHUTOFF", "stopped", null, 4]));
    for wrong in [json!(null), json!({}), json!({"imageRef": "x"}), json!({"imageRef": other, "x": 1})] {
        fault(cloud.act(&id, json!({ "rebuild": wrong })).await, 400, "badRequest");
    }
    let nobody = json!({"rebuild": {"imageRef": "6dbd8f5b-0000-4000-8000-000000000001"}});
    fault(cloud.act(&id, nobody).await, 400, "badRequest");
}

#[tokio::test]
async fn a_resize_keeps_what_was_until_it_is_confirmed() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let used = async || {
        let limits = cloud.test.get("/compute/v2.1/limits", &cloud.token).await.expect(200);
        limits["limits"]["absolute"]["totalRAMUsed"].clone()
    };
    for wrong in [json!({"flavorRef": "1"}), json!({"flavorRef": "none"}), json!({}), json!(null)] {
        fault(cloud.act(&id, json!({ "resize": wrong })).await, 400, "badRequest");
    }
    let begun = cloud.begun(&id, json!({"resize": {"flavorRef": "2"}})).await;
    assert_eq!(begun, json!(["RESIZE", "active", "resize_finish", 1]));
    let spec = cloud.spec().await;
    assert_eq!((spec.disk, spec.kept_disk), (DiskSpec { number: 2, copy_of: Some(1) }, Some(1)));
    assert_eq!((spec.memory_mib, spec.run_generation), (512, 2));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["VERIFY_RESIZE", "resized", null, 1]));
    assert_eq!(cloud.show(&id).await["flavor"]["id"], "2");
    fault(cloud.act(&id, json!({"os-stop": null})).await, 409, "conflictingRequest");
    assert_eq!(used().await, 512);
    assert_eq!(cloud.act(&id, json!({"confirmResize": null})).await.status, 204);
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert_eq!(cloud.spec().await.kept_disk, None);
    fault(cloud.act(&id, json!({"confirmResize": null})).await, 409, "conflictingRequest");

    // Back to a smaller one: both are counted until that is settled.
    cloud.begun(&id, json!({"resize": {"flavorRef": "1"}})).await;
    cloud.settle().await;
    assert_eq!(used().await, 512, "it can be taken back");
    cloud.act(&id, json!({"confirmResize": null})).await;
    assert_eq!(used().await, 64);
}

#[tokio::test]
async fn a_resize_that_is_taken_back_leaves_the_server_as_it_was() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.begun(&id, json!({"resize": {"flavorRef": "2"}})).await;
    cloud.settle().await;
    let begun = cloud.begun(&id, json!({"revertResize": null})).await;
    assert_eq!(begun, json!(["REVERT_RESIZE", "resized", "resize_reverting", 1]));
    let spec = cloud.spec().await;
    assert_eq!((spec.disk, spec.kept_disk), (DiskSpec { number: 1, copy_of: None }, None));
    assert_eq!((spec.memory_mib, spec.run_generation), (64, 3));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert_eq!(cloud.show(&id).await["flavor"]["id"], "1");
    // The number of the disk that was given up is never used again.
    cloud.begun(&id, json!({"resize": {"flavorRef": "2"}})).await;
    assert_eq!(cloud.spec().await.disk, DiskSpec { number: 3, copy_of: Some(1) });
    cloud.settle().await;
    cloud.act(&id, json!({"confirmResize": null})).await;
    // One that is off is resized as well, and stays off.
    cloud.act(&id, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    cloud.begun(&id, json!({"resize": {"flavorRef": "1"}})).await;
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["VERIFY_RESIZE", "resized", null, 4]));
    cloud.act(&id, json!({"confirmResize": null})).await;
    assert_eq!(cloud.states(&id).await, json!(["SHUTOFF", "stopped", null, 4]));
}

#[tokio::test]
async fn a_resize_is_refused_beyond_the_quota_and_the_host() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let flavor = |ram: u64, vcpus: u64| json!({"flavor": {"name": format!("f{ram}"), "id": format!("f{ram}"), "vcpus": vcpus, "ram": ram, "disk": 0}});
    for (ram, vcpus) in [(16_300, 1), (65, 9)] {
        cloud
            .test
            .post("/compute/v2.1/flavors", &cloud.test.admin_token, flavor(ram, vcpus))
            .await
            .expect(200);
    }
    cloud.quota(json!({"ram": 500})).await;
    fault(cloud.act(&id, json!({"resize": {"flavorRef": "2"}})).await, 403, "forbidden");
    cloud.quota(json!({"ram": -1})).await;
    let text = fault(cloud.act(&id, json!({"resize": {"flavorRef": "f16300"}})).await, 400, "badRequest");
    assert!(
        text.starts_with("No valid host was found. Hosts refused: too little memory left (1)."),
        "{text}"
    );
    fault(cloud.act(&id, json!({"resize": {"flavorRef": "f65"}})).await, 400, "badRequest");
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
}

#[tokio::test]
async fn a_rescued_server_boots_from_another_disk_and_comes_back() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let rescuer = bootable(&cloud.test, &cloud.token, "rescuer", 5).await;
    let answer = cloud.act(&id, json!({"rescue": {"adminPass": "pw", "rescue_image_ref": rescuer}})).await;
    assert_eq!(answer.expect(200), json!({}));
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", "rescuing", 1]));
    let spec = cloud.spec().await;
    let rescue = spec.rescue.unwrap();
    assert_eq!((spec.disk.number, rescue.disk, spec.run_generation), (1, 2, 2));
    assert_ne!(rescue.boot.disk.sha256, spec.boot.disk.sha256);
    // The bytes are for the host, also when the image is deleted meanwhile.
    cloud.test.delete(&format!("{IMAGES}/{rescuer}"), &cloud.token).await.expect(204);
    let path = format!("images/{}", rescue.boot.disk.sha256);
    cloud.host.call(&cloud.test, Method::GET, &path, Value::Null).await;
    assert!(cloud.test.app.images.path(&rescue.boot.disk.sha256).is_some());
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["RESCUE", "rescued", null, 1]));
    fault(cloud.act(&id, json!({"pause": null})).await, 409, "conflictingRequest");
    let begun = cloud.begun(&id, json!({"unrescue": null})).await;
    assert_eq!(begun, json!(["RESCUE", "rescued", "unrescuing", 1]));
    assert_eq!(cloud.spec().await.rescue, None);
    assert!(cloud.test.app.images.path(&rescue.boot.disk.sha256).is_none(), "nobody needs them now");
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    cloud.act(&id, json!({"rescue": null})).await.expect(200);
    assert_eq!(cloud.spec().await.rescue.unwrap().disk, 3);
}

/// The host sends the copy that is asked for.
async fn send_capture(cloud: &Cloud, bytes: &'static [u8]) -> (String, u16) {
    let spec = cloud.spec().await;
    let image = spec.captures[0].image_id.to_string();
    let request = Request::put(format!("/mote/v1/hosts/{}/captures/{image}", cloud.host.id()))
        .header("authorization", format!("Bearer {}", cloud.host.joined.secret))
        .header("content-type", "application/octet-stream");
    let answer = cloud.test.send(request.body(Body::from(bytes)).unwrap()).await;
    (image, answer.status.as_u16())
}

#[tokio::test]
async fn an_image_is_made_of_a_servers_disk_and_boots() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let action = json!({"createImage": {"name": "copy", "metadata": {"a": "b"}}});
    let answer = cloud.act(&id, action.clone()).await;
    let location = answer.header("location").to_owned();
    answer.expect(202);
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", "image_uploading", 1]));
    fault(cloud.act(&id, action).await, 409, "conflictingRequest");
    // A report in between ends nothing.
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await[2], "image_uploading");
    let (image, status) = send_capture(&cloud, b"the disk's bytes").await;
    assert_eq!((status, location), (204, format!("http://cloud.test:8774{IMAGES}/{image}")));
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert_eq!(cloud.spec().await.captures, []);
    let shown = cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(200);
    assert_eq!((&shown["status"], &shown["size"], &shown["a"]), (&json!("active"), &json!(16), &json!("b")));
    assert_eq!((&shown["image_type"], &shown["instance_uuid"]), (&json!("snapshot"), &json!(id)));
    assert_eq!(shown["owner"], cloud.project);
    let mut wish = cloud.wish("clone");
    wish["server"]["imageRef"] = json!(image);
    cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    // Later microversions answer with the id.
    let path = format!("{SERVERS}/{id}/action");
    let made =
        cloud.test.post_at(&path, &cloud.token, 45, json!({"createImage": {"name": "2"}})).await.expect(202);
    assert!(made["image_id"].is_string());
    // Reserved names are no properties, and a host that knows of no such wish gets nothing taken.
    let wrong = json!({"createImage": {"name": "x", "metadata": {"status": "active"}}});
    let second = cloud.run("t").await;
    fault(cloud.act(&second, wrong).await, 400, "badRequest");
    let nobody = cloud
        .host
        .call(&cloud.test, Method::PUT, "captures/6dbd8f5b-0000-4000-8000-000000000001", json!({}))
        .await;
    nobody.expect(404);
}

#[tokio::test]
async fn backups_of_a_kind_are_kept_as_many_as_were_asked_for() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let backup = |name: &str, kind: &str, rotation: i64| json!({"createBackup": {"name": name, "backup_type": kind, "rotation": rotation, "metadata": {"a": name}}});
    let names = async |kind: &str| -> Vec<Value> {
        let query = format!("{IMAGES}?image_type=backup&backup_type={kind}&sort=created_at:asc");
        let found = cloud.test.get(&query, &cloud.token).await.expect(200);
        found["images"].as_array().unwrap().iter().map(|image| image["name"].clone()).collect()
    };
    for (name, kind, rotation, bytes) in [
        ("w1", "weekly", 1, b"1"),
        ("d1", "daily", 2, b"2"),
        ("d2", "daily", 2, b"3"),
        ("d3", "daily", 2, b"4"),
        ("d4", "daily", 2, b"5"),
    ] {
        let answer = cloud.act(&id, backup(name, kind, rotation)).await;
        let location = answer.header("location").to_owned();
        answer.expect(202);
        assert_eq!(cloud.states(&id).await[2], "image_uploading");
        let (image, status) = send_capture(&cloud, bytes).await;
        assert_eq!((status, location), (204, format!("http://cloud.test:8774{IMAGES}/{image}")));
        assert_eq!(cloud.states(&id).await[2], Value::Null);
        if name == "d2" {
            let mut tx = cloud.test.app.begin().await.unwrap();
            let sql = "UPDATE images SET protected = TRUE WHERE id = $1";
            sqlx::query(sql).bind(&image).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
    // The second is protected.
    assert_eq!(names("daily").await, ["d2", "d3", "d4"]);
    assert_eq!(names("weekly").await, ["w1"]);
    let digest = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(b"2"));
    assert!(cloud.test.app.images.path(&digest).is_none(), "the bytes of what was rotated out are gone");
    // None is kept: there is no image to be pointed at.
    let answer = cloud.act(&id, backup("w2", "weekly", 0)).await;
    assert_eq!((answer.status.as_u16(), answer.header("location")), (202, ""));
    send_capture(&cloud, b"6").await;
    assert_eq!(names("weekly").await, Vec::<Value>::new());
    let made =
        cloud.test.post_at(&format!("{SERVERS}/{id}/action"), &cloud.token, 45, backup("x", "m", 1)).await;
    assert!(made.expect(202)["image_id"].is_string());
    for wrong in [
        json!({"createBackup": {"name": "x", "backup_type": "daily"}}),
        json!({"createBackup": {"name": "x", "backup_type": "daily", "rotation": -1}}),
        json!({"createBackup": null}),
    ] {
        fault(cloud.act(&id, wrong).await, 400, "badRequest");
    }
}

#[tokio::test]
async fn an_image_is_made_of_a_suspended_server_which_stays_so_and_it_can_be_shelved() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"suspend": null})).await.expect(202);
    cloud.settle().await;
    let begun = cloud.begun(&id, json!({"createImage": {"name": "copy"}})).await;
    assert_eq!(begun, json!(["SUSPENDED", "suspended", "image_uploading", 4]));
    cloud.settle().await;
    assert_eq!(cloud.spec().await.power, DesiredPower::Suspended);
    let (image, status) = send_capture(&cloud, b"bytes").await;
    assert_eq!(status, 204);
    assert_eq!(cloud.states(&id).await, json!(["SUSPENDED", "suspended", null, 4]));
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(200);
    cloud.act(&id, json!({"shelve": null})).await.expect(202);
    assert_eq!(cloud.spec().await.power, DesiredPower::Stopped);
    cloud.settle().await;
    send_capture(&cloud, b"bytes").await;
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await[0], "SHELVED_OFFLOADED");
}

#[tokio::test]
async fn a_copy_that_is_no_disk_ends_the_wish_without_an_image() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"createImage": {"name": "copy"}})).await.expect(202);
    // A guest can write a header that names files of the host; it becomes no raw image.
    let (image, status) = send_capture(&cloud, b"QFI\xfb\0\0\0\x03 and so on").await;
    assert_eq!(status, 400);
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(404);
    assert_eq!(cloud.spec().await.captures, []);
}

#[tokio::test]
async fn an_image_whose_server_goes_before_it_is_sent_goes_with_it() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"createImage": {"name": "copy"}})).await.expect(202);
    let image = cloud.spec().await.captures[0].image_id.to_string();
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(200);
    cloud.settle().await;
    cloud.get(&format!("/{id}")).await.expect(404);
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(404);
}

#[tokio::test]
async fn a_shelved_server_leaves_its_host_and_comes_back_with_its_address() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let before = cloud.show(&id).await;
    let begun = cloud.begun(&id, json!({"shelve": null})).await;
    assert_eq!(begun, json!(["ACTIVE", "active", "shelving_image_uploading", 1]));
    assert_eq!(cloud.spec().await.power, DesiredPower::Stopped);
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SHUTOFF", "stopped", "shelving_image_uploading", 4]));
    let (image, status) = send_capture(&cloud, b"the disk's bytes").await;
    assert_eq!(status, 204);
    assert_eq!(cloud.states(&id).await[2], "shelving_offloading");
    assert_eq!(cloud.host.desired(&cloud.test, 0).await.servers, []);
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["SHELVED_OFFLOADED", "shelved_offloaded", null, 0]));
    let shelved = cloud.show(&id).await;
    assert_eq!((&shelved["addresses"], &shelved["hostId"]), (&before["addresses"], &json!("")));
    fault(cloud.act(&id, json!({"os-start": null})).await, 409, "conflictingRequest");
    fault(cloud.act(&id, json!({"shelveOffload": null})).await, 409, "conflictingRequest");
    let begun = cloud.begun(&id, json!({"unshelve": null})).await;
    assert_eq!(begun, json!(["SHELVED_OFFLOADED", "shelved_offloaded", "spawning", 0]));
    let spec = cloud.spec().await;
    assert_eq!((spec.boot.disk.size, spec.power, spec.disk.number), (16, DesiredPower::Running, 2));
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    assert_eq!(cloud.show(&id).await["addresses"], before["addresses"]);
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(404);
    assert!(cloud.test.app.images.path(&spec.boot.disk.sha256).is_some(), "the server still boots them");
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    assert!(cloud.test.app.images.path(&spec.boot.disk.sha256).is_none());
}

#[tokio::test]
async fn a_shelved_server_can_be_deleted_with_its_image() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"shelve": null})).await.expect(202);
    cloud.settle().await;
    let (image, _) = send_capture(&cloud, b"the disk's bytes").await;
    cloud.settle().await;
    cloud.act(&id, json!({"forceDelete": null})).await.expect(202);
    fault(cloud.get(&format!("/{id}")).await, 404, "itemNotFound");
    cloud.test.get(&format!("{IMAGES}/{image}"), &cloud.token).await.expect(404);
}

#[tokio::test]
async fn what_is_not_there_says_so() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    let text =
        fault(cloud.act(&id, json!({"changePassword": {"adminPass": "x"}})).await, 501, "notImplemented");
    assert!(text.contains("no agent"), "{text}");
    fault(cloud.act(&id, json!({"changePassword": null})).await, 400, "badRequest");
    // Nothing is deleted softly.
    fault(cloud.act(&id, json!({"restore": null})).await, 409, "conflictingRequest");
    let nobody = "6dbd8f5b-0000-4000-8000-000000000001";
    fault(cloud.act(nobody, json!({"restore": null})).await, 404, "itemNotFound");
    for name in ["migrate", "evacuate"] {
        let text = fault(cloud.act(&id, json!({ name: null })).await, 501, "notImplemented");
        assert!(text.contains(name), "{text}");
    }
}

#[tokio::test]
async fn a_state_is_reset_by_admins_until_the_next_report() {
    let cloud = Cloud::new().await;
    let id = cloud.run("s").await;
    fault(cloud.act(&id, json!({"os-resetState": {"state": "error"}})).await, 403, "forbidden");
    let path = format!("{SERVERS}/{id}/action");
    let reset = json!({"os-resetState": {"state": "error"}});
    cloud.test.post(&path, &cloud.test.admin_token, reset).await.expect(202);
    assert_eq!(cloud.states(&id).await[0], "ERROR");
    cloud.settle().await;
    assert_eq!(cloud.states(&id).await, json!(["ACTIVE", "active", null, 1]));
    let wrong = json!({"os-resetState": {"state": "paused"}});
    fault(cloud.test.post(&path, &cloud.test.admin_token, wrong).await, 400, "badRequest");
}

#[tokio::test]
async fn anti_affinity_keeps_servers_apart_and_affinity_together() {
    let cloud = Cloud::new().await;
    FakeHost::join(&cloud.test, "h2").await;
    let group = async |policy: &str| {
        let body = json!({"server_group": {"name": "g", "policies": [policy]}});
        let made =
            cloud.test.post_at("/compute/v2.1/os-server-groups", &cloud.token, 15, body).await.expect(200);
        made["server_group"]["id"].as_str().unwrap().to_owned()
    };
    let create = async |group: &str| {
        let mut wish = cloud.wish("s");
        wish["os:scheduler_hints"] = json!({ "group": group });
        let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
        let id = made["server"]["id"].as_str().unwrap().to_owned();
        let path = format!("{SERVERS}/{id}");
        let shown = cloud.test.get_at(&path, &cloud.test.admin_token, 71).await.expect(200);
        assert_eq!(shown["server"]["server_groups"], json!([group]));
        (shown["server"]["OS-EXT-SRV-ATTR:host"].clone(), shown["server"]["status"].clone())
    };
    let apart = group("anti-affinity").await;
    let (first, second, third) = (create(&apart).await, create(&apart).await, create(&apart).await);
    assert_ne!(first.0, second.0);
    assert_eq!(third.1, "ERROR");
    for policy in ["affinity", "soft-affinity"] {
        let together = group(policy).await;
        let first = create(&together).await;
        assert_eq!(create(&together).await.0, first.0, "{policy}");
    }
    let rather_apart = group("soft-anti-affinity").await;
    let hosts = [create(&rather_apart).await.0, create(&rather_apart).await.0];
    assert_ne!(hosts[0], hosts[1]);
}

#[tokio::test]
async fn scheduler_hints_name_servers_to_be_near_or_not() {
    let cloud = Cloud::new().await;
    FakeHost::join(&cloud.test, "h2").await;
    let first = cloud.create("a").await;
    let host = async |id: &str| {
        let path = format!("{SERVERS}/{id}");
        cloud.test.get(&path, &cloud.test.admin_token).await.expect(200)["server"]["OS-EXT-SRV-ATTR:host"]
            .clone()
    };
    for (hint, same) in [("same_host", true), ("different_host", false)] {
        let mut wish = cloud.wish("b");
        wish["os:scheduler_hints"] = json!({ hint: [first] });
        let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
        let id = made["server"]["id"].as_str().unwrap();
        assert_eq!(host(id).await == host(&first).await, same, "{hint}");
    }
    let mut wish = cloud.wish("c");
    wish["os:scheduler_hints"] = json!({"build_near_host_ip": "192.0.2.1"});
    fault(cloud.test.post(SERVERS, &cloud.token, wish).await, 400, "badRequest");
}

#[tokio::test]
async fn changes_of_flavor_are_listed_as_migrations() {
    let cloud = Cloud::new().await;
    let admin = cloud.test.admin_token.as_str();
    let list = async |query: &str| {
        let path = format!("/compute/v2.1/os-migrations{query}");
        cloud.test.get_at(&path, admin, 80).await.expect(200)["migrations"].take()
    };
    let statuses = async || {
        let found = list("").await;
        found
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["status"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let id = cloud.run("s").await;
    cloud.act(&id, json!({"resize": {"flavorRef": "2"}})).await.expect(202);
    assert_eq!(statuses().await, ["migrating"]);
    cloud.settle().await;
    assert_eq!(statuses().await, ["finished"]);
    cloud.act(&id, json!({"revertResize": null})).await.expect(202);
    assert_eq!(statuses().await, ["reverting"]);
    cloud.settle().await;
    cloud.act(&id, json!({"resize": {"flavorRef": "2"}})).await.expect(202);
    cloud.settle().await;
    cloud.act(&id, json!({"confirmResize": null})).await.expect(204);
    assert_eq!(statuses().await, ["confirmed", "reverted"]);
    let newest = list("?limit=1").await[0].clone();
    assert_eq!(newest["instance_uuid"], id);
    assert_eq!((&newest["old_instance_type_id"], &newest["new_instance_type_id"]), (&json!(1), &json!(2)));
    assert_eq!((&newest["source_compute"], &newest["migration_type"]), (&json!("h1"), &json!("resize")));
    assert_eq!(newest["project_id"], cloud.project);
    let marker = newest["uuid"].as_str().unwrap();
    assert_eq!(list(&format!("?marker={marker}")).await[0]["status"], "reverted");
    for (query, count) in [
        ("?status=confirmed", 1),
        ("?status=error", 0),
        ("?host=h1", 2),
        ("?host=h2", 0),
        ("?migration_type=live-migration", 0),
        ("?migration_type=resize", 2),
        ("?hidden=true", 0),
        ("?user_id=nobody", 0),
        ("?changes-since=2100-01-01T00:00:00Z", 0),
        ("?changes-since=2020-01-01T00:00:00Z", 2),
        ("?changes-before=2020-01-01T00:00:00Z", 0),
    ] {
        assert_eq!(list(query).await.as_array().unwrap().len(), count, "{query}");
    }
    for wrong in ["?migration_type=flight", "?fly=1", "?limit=x", "?marker=none", "?changes-since=x"] {
        cloud.test.get_at(&format!("/compute/v2.1/os-migrations{wrong}"), admin, 80).await.expect(400);
    }
    let old = cloud.test.get("/compute/v2.1/os-migrations", admin).await.expect(200)["migrations"][0].take();
    assert!(old.get("uuid").is_none() && old.get("migration_type").is_none() && old.get("user_id").is_none());
    cloud.test.get("/compute/v2.1/os-migrations", &cloud.token).await.expect(403);
    // Live migrations there are none.
    let live = format!("{SERVERS}/{id}/migrations");
    assert_eq!(cloud.test.get_at(&live, admin, 90).await.expect(200), json!({"migrations": []}));
    cloud.test.get_at(&format!("{live}/1"), admin, 90).await.expect(404);
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    assert_eq!(list("").await, json!([]));
}
