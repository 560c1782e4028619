//! Ephemeral disks and swap space.

use mote_host_api::LocalDiskSpec;

use super::*;

fn disk(number: u32, copy_of: Option<u32>, size_mib: u64, swap: bool) -> LocalDiskSpec {
    LocalDiskSpec { number, copy_of, size_mib, swap }
}

impl Cloud {
    async fn flavor(&self, id: &str, ephemeral: i64, swap: i64) {
        let body = json!({"flavor": {
            "name": id, "id": id, "vcpus": 1, "ram": 64, "disk": 1, "OS-FLV-EXT-DATA:ephemeral": ephemeral,
            "swap": swap,
        }});
        self.test.post("/compute/v2.1/flavors", &self.test.admin_token, body).await.expect(200);
    }

    async fn promised(&self) -> i64 {
        sqlx::query_scalar("SELECT promised_disk_gib FROM hosts").fetch_one(&self.test.app.db).await.unwrap()
    }

    async fn numbers(&self) -> (u32, Vec<LocalDiskSpec>, Vec<u32>) {
        let spec = self.spec().await;
        (spec.disk.number, spec.local_disks, spec.kept_local_disks)
    }
}

#[tokio::test]
async fn a_flavors_disks_are_made_counted_told_and_follow_the_servers_life() {
    let cloud = Cloud::new().await;
    cloud.flavor("small", 1, 64).await;
    cloud.flavor("large", 3, 32).await;
    cloud.flavor("none", 0, 0).await;
    let mut wish = cloud.wish("s");
    wish["server"]["flavorRef"] = json!("small");
    let made = cloud.test.post(SERVERS, &cloud.token, wish).await.expect(202);
    let id = made["server"]["id"].as_str().unwrap().to_owned();
    assert_eq!(cloud.promised().await, 1 + 1 + 1);
    let spec = cloud.spec().await;
    let first = vec![disk(2, None, 1024, false), disk(3, None, 64, true)];
    assert_eq!((&spec.local_disks, spec.kept_local_disks.len()), (&first, 0));
    let told = [("ephemeral0", "/dev/vdb"), ("swap", "/dev/vdc")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(spec.metadata.block_devices, told.into());
    cloud.settle().await;
    let shown = cloud.show_at(&id, 47).await;
    assert_eq!((&shown["flavor"]["ephemeral"], &shown["flavor"]["swap"]), (&json!(1), &json!(64)));
    // Rescued, they come after one more disk.
    cloud.act(&id, json!({"rescue": null})).await.expect(200);
    assert_eq!(cloud.spec().await.metadata.block_devices["swap"], "/dev/vdd");
    cloud.settle().await;
    cloud.act(&id, json!({"unrescue": null})).await.expect(202);
    cloud.settle().await;
    assert_eq!(cloud.numbers().await, (1, first.clone(), vec![]));
    // Copies are larger, swap is new; taken back, all is as it was.
    cloud.act(&id, json!({"resize": {"flavorRef": "large"}})).await.expect(202);
    assert_eq!(cloud.promised().await, 3 + 1 + 3 + 1);
    let larger = vec![disk(6, Some(2), 3072, false), disk(7, None, 32, true)];
    assert_eq!(cloud.numbers().await, (5, larger, vec![2, 3]));
    cloud.settle().await;
    cloud.act(&id, json!({"revertResize": null})).await.expect(202);
    cloud.settle().await;
    assert_eq!(cloud.numbers().await, (1, first, vec![]));
    assert_eq!(cloud.promised().await, 3);
    fault(cloud.act(&id, json!({"resize": {"flavorRef": "none"}})).await, 400, "badRequest");
    cloud.act(&id, json!({"resize": {"flavorRef": "large"}})).await.expect(202);
    cloud.settle().await;
    cloud.act(&id, json!({"confirmResize": null})).await.expect(204);
    cloud.settle().await;
    let larger = vec![disk(9, Some(2), 3072, false), disk(10, None, 32, true)];
    assert_eq!(cloud.numbers().await, (8, larger, vec![]));
    assert_eq!(cloud.promised().await, 5);
    // A rebuilt server's are new and empty.
    cloud.act(&id, json!({"rebuild": {"imageRef": cloud.image}})).await.expect(202);
    let new = vec![disk(12, None, 3072, false), disk(13, None, 32, true)];
    assert_eq!(cloud.numbers().await, (11, new, vec![]));
    assert_eq!(cloud.promised().await, 5);
    cloud.settle().await;
    let usage = format!("/compute/v2.1/os-simple-tenant-usage/{}?detailed=1", cloud.project);
    let usage = cloud.test.get(&usage, &cloud.token).await.expect(200)["tenant_usage"].take();
    assert_eq!(usage["server_usages"][0]["local_gb"], 4);
    cloud.delete(&format!("/{id}")).await.expect(204);
    cloud.settle().await;
    assert_eq!(cloud.promised().await, 0);
}

#[tokio::test]
async fn a_request_names_the_disks_that_it_wants_of_its_flavor() {
    let cloud = Cloud::new().await;
    cloud.flavor("f", 3, 64).await;
    let wish = |devices: Value| {
        let mut wish = cloud.wish("s");
        wish["server"]["flavorRef"] = json!("f");
        wish["server"]["block_device_mapping_v2"] = devices;
        wish
    };
    // As the openstack client writes them.
    let root = json!({
        "uuid": cloud.image, "source_type": "image", "destination_type": "local", "boot_index": 0,
        "delete_on_termination": true,
    });
    let blank = |more: Value| {
        let mut device = json!({
            "source_type": "blank", "destination_type": "local", "boot_index": -1, "delete_on_termination": true,
        });
        device.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        device
    };
    let devices = json!([
        root,
        blank(json!({"guest_format": "swap", "volume_size": 32})),
        blank(json!({"volume_size": 1})),
        blank(json!({"volume_size": "2"})),
    ]);
    let made = cloud.test.post(SERVERS, &cloud.token, wish(devices)).await.expect(202);
    let expected = vec![disk(2, None, 1024, false), disk(3, None, 2048, false), disk(4, None, 32, true)];
    assert_eq!(cloud.spec().await.local_disks, expected);
    cloud.settle().await;
    let id = made["server"]["id"].as_str().unwrap();
    cloud.act(id, json!({"shelve": null})).await.expect(202);
    for wrong in [
        json!([root, root]),
        json!([blank(json!({"volume_size": 4}))]),
        json!([blank(json!({"guest_format": "swap", "volume_size": 65}))]),
        json!([blank(json!({"guest_format": "swap"})), blank(json!({"guest_format": "swap"}))]),
        json!([blank(json!({"guest_format": "ext4"}))]),
        json!([blank(json!({"delete_on_termination": false}))]),
        json!([blank(json!({"boot_index": 0}))]),
        json!([blank(json!({"destination_type": "volume"}))]),
        json!([{"source_type": "volume", "uuid": cloud.image, "boot_index": 0}]),
    ] {
        fault(cloud.test.post(SERVERS, &cloud.token, wish(wrong)).await, 400, "badRequest");
    }
}
