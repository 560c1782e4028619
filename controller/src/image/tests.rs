//! Glance's API, asked in process.

use axum::body::Body;
use http::{Method, Request};
use serde_json::{Value, json};

use super::image_for_boot;
use crate::testing::{Answer, TestApp};

pub(super) const IMAGES: &str = "/image/v2/images";

impl TestApp {
    async fn image(&self, token: &str, body: Value) -> String {
        let image = self.post(IMAGES, token, body).await.expect(201);
        image["id"].as_str().unwrap().to_owned()
    }

    async fn put_bytes(&self, token: &str, id: &str, bytes: impl Into<Body>) -> Answer {
        let request = Request::put(format!("{IMAGES}/{id}/file"))
            .header("x-auth-token", token)
            .header("content-type", "application/octet-stream");
        self.send(request.body(bytes.into()).unwrap()).await
    }

    async fn raw_image(&self, token: &str, name: &str, bytes: &'static [u8]) -> String {
        let body = json!({"name": name, "disk_format": "raw", "container_format": "bare"});
        let id = self.image(token, body).await;
        self.put_bytes(token, &id, bytes).await.expect(204);
        id
    }

    async fn patch(&self, token: &str, id: &str, operations: Value) -> Answer {
        let request = Request::patch(format!("{IMAGES}/{id}"))
            .header("x-auth-token", token)
            .header("content-type", super::patch::MEDIA_TYPE);
        self.send(request.body(Body::from(operations.to_string())).unwrap()).await
    }

    fn blobs(&self) -> usize {
        self.app.images.list().unwrap().len()
    }
}

/// A freestanding ELF as [`mote_images::kernel::check_kernel`] wants it: one segment at 1 MiB with the entry in it.
pub(super) fn kernel() -> Vec<u8> {
    let mut elf = vec![0_u8; 0x1100];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
    elf[20..24].copy_from_slice(&1_u32.to_le_bytes());
    elf[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
    elf[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    let segment = [1 | 5 << 32, 0x1000, 0x10_0000, 0x10_0000, 0x100, 0x100, 0x1000_u64];
    for (index, field) in segment.iter().enumerate() {
        elf[64 + 8 * index..72 + 8 * index].copy_from_slice(&field.to_le_bytes());
    }
    elf
}

#[tokio::test]
async fn version_documents_need_no_token_and_the_rest_does() {
    let test = TestApp::new().await;
    let body = test.get("/image/", "").await.expect(300);
    assert_eq!(body["versions"][0]["links"][0]["href"], "http://cloud.test:8774/image/v2/");
    test.get("/image/versions", "").await.expect(200);
    for path in [IMAGES, "/image/v2/schemas/image", "/image/v2/info/import"] {
        test.get(path, "").await.expect(401);
        test.get(path, "rubbish").await.expect(401);
        test.get(path, &test.admin_token).await.expect(200);
    }
    test.get("/image/v2/schemas/other", &test.admin_token).await.expect(404);
}

#[tokio::test]
async fn an_image_lives_from_create_to_delete() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "member").await;
    let body = json!({
        "name": "disk", "disk_format": "raw", "container_format": "bare", "min_disk": 1, "tags": ["x"],
        "os_command_line": "quiet", "trait:CUSTOM_KVM": "required",
    });
    let answer = test.post(IMAGES, &token, body).await;
    let location = answer.header("location").to_owned();
    let image = answer.expect(201);
    let id = image["id"].as_str().unwrap();
    assert_eq!(location, format!("http://cloud.test:8774{IMAGES}/{id}"));
    assert_eq!((&image["status"], &image["visibility"]), (&json!("queued"), &json!("shared")));
    assert_eq!((&image["owner"], &image["size"]), (&json!(project), &Value::Null));
    assert_eq!(test.get(&format!("{IMAGES}/{id}/file"), &token).await.status, 204);
    test.put_bytes(&token, id, "some bytes").await.expect(204);
    let image = test.get(&format!("{IMAGES}/{id}"), &token).await.expect(200);
    assert_eq!((&image["status"], &image["size"]), (&json!("active"), &json!(10)));
    assert_eq!(image["checksum"], "9d0568469d206c1aedf1b71f12f474bc");
    assert!(image["os_hash_value"].as_str().unwrap().starts_with("aebf42e044550433718c9a147a1d6394"));
    assert_eq!((&image["os_command_line"], &image["tags"]), (&json!("quiet"), &json!(["x"])));
    let file = test.get(&format!("{IMAGES}/{id}/file"), &token).await;
    assert_eq!(
        (file.header("content-length"), file.header("content-md5")),
        ("10", image["checksum"].as_str().unwrap())
    );
    assert_eq!(file.bytes, b"some bytes");
    test.put_bytes(&token, id, "other bytes").await.expect(409);
    test.delete(&format!("{IMAGES}/{id}"), &token).await.expect(204);
    test.get(&format!("{IMAGES}/{id}"), &token).await.expect(404);
    assert_eq!(test.blobs(), 0);
}

#[tokio::test]
async fn a_range_gives_a_part() {
    let test = TestApp::new().await;
    let id = test.raw_image(&test.admin_token, "r", b"0123456789").await;
    let ask = |range: &str| {
        let request = Request::get(format!("{IMAGES}/{id}/file")).header("x-auth-token", &test.admin_token);
        test.send(request.header("range", range).body(Body::empty()).unwrap())
    };
    let part = ask("bytes=2-4").await;
    assert_eq!((part.status.as_u16(), part.bytes.as_slice()), (206, b"234".as_slice()));
    assert_eq!(part.header("content-range"), "bytes 2-4/10");
    let outside = ask("bytes=10-").await;
    assert_eq!(outside.header("content-range"), "bytes */10");
    outside.expect(416);
}

#[tokio::test]
async fn others_images_are_unknown_and_public_ones_only_to_be_read() {
    let test = TestApp::new().await;
    let admin = test.admin_token.clone();
    let (_, one) = test.tenant("t1", "member").await;
    let (_, two) = test.tenant("t2", "member").await;
    let private = test.raw_image(&one, "mine", b"secret").await;
    for path in [format!("{IMAGES}/{private}"), format!("{IMAGES}/{private}/file")] {
        test.get(&path, &two).await.expect(404);
        test.get(&path, &one).await;
    }
    test.delete(&format!("{IMAGES}/{private}"), &two).await.expect(404);
    test.patch(&two, &private, json!([{"op": "replace", "path": "/name", "value": "x"}])).await.expect(404);
    test.put_bytes(&two, &private, "x").await.expect(404);
    let listed = test.get(IMAGES, &two).await.expect(200);
    assert_eq!(listed["images"], json!([]));
    // Public: by the administrator only.
    test.post(IMAGES, &one, json!({"name": "p", "visibility": "public"})).await.expect(403);
    let public = test.raw_image(&admin, "public", b"for all").await;
    test.patch(&admin, &public, json!([{"op": "replace", "path": "/visibility", "value": "public"}]))
        .await
        .expect(200);
    let listed = test.get(IMAGES, &two).await.expect(200);
    assert_eq!(listed["images"][0]["id"], public.as_str());
    test.delete(&format!("{IMAGES}/{public}"), &two).await.expect(403);
    test.patch(&two, &public, json!([{"op": "replace", "path": "/name", "value": "x"}])).await.expect(403);
}

#[tokio::test]
async fn a_reader_may_look_but_not_change() {
    let test = TestApp::new().await;
    let (_, reader) = test.tenant("t1", "reader").await;
    test.get(IMAGES, &reader).await.expect(200);
    test.post(IMAGES, &reader, json!({"name": "x"})).await.expect(403);
}

#[tokio::test]
async fn a_shared_image_is_listed_once_it_is_accepted() {
    let test = TestApp::new().await;
    let (_, one) = test.tenant("t1", "member").await;
    let (project, two) = test.tenant("t2", "member").await;
    let id = test.raw_image(&one, "s", b"shared").await;
    let members = format!("{IMAGES}/{id}/members");
    let member = test.post(&members, &one, json!({"member": project})).await.expect(200);
    assert_eq!(member["status"], "pending");
    test.post(&members, &one, json!({"member": project})).await.expect(409);
    test.get(&format!("{IMAGES}/{id}"), &two).await.expect(200);
    assert_eq!(test.get(IMAGES, &two).await.expect(200)["images"], json!([]));
    let own = format!("{members}/{project}");
    test.call(Method::PUT, &own, &one, json!({"status": "accepted"})).await.expect(403);
    test.call(Method::PUT, &own, &two, json!({"status": "accepted"})).await.expect(200);
    assert_eq!(test.get(IMAGES, &two).await.expect(200)["images"][0]["id"], id.as_str());
    test.delete(&format!("{IMAGES}/{id}"), &two).await.expect(403);
    test.delete(&own, &one).await.expect(204);
    test.get(&format!("{IMAGES}/{id}"), &two).await.expect(404);
}

#[tokio::test]
async fn content_that_is_not_what_was_declared_is_refused_and_leaves_nothing() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let kernel = kernel();
    let long_qcow2 = [b"QFI\xfb".to_vec(), vec![7; 300_000]].concat();
    let broken_kernel = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec();
    for (format, container, bytes, text) in [
        ("raw", "bare", long_qcow2, "qcow2"),
        ("raw", "bare", kernel.clone(), "ELF"),
        ("raw", "bare", Vec::new(), "empty"),
        ("aki", "aki", b"no kernel".to_vec(), "kernel"),
        ("aki", "aki", broken_kernel, "kernel"),
        ("ari", "ari", b"no ramdisk".to_vec(), "initial RAM disk"),
    ] {
        let id = test.image(token, json!({"disk_format": format, "container_format": container})).await;
        let error = test.put_bytes(token, &id, bytes).await.expect(400);
        assert!(error["error"]["message"].as_str().unwrap().contains(text), "{format} {error}");
        // Back to queued: the right bytes can follow.
        let image = test.get(&format!("{IMAGES}/{id}"), token).await.expect(200);
        assert_eq!(image["status"], "queued");
    }
    assert_eq!(test.blobs(), 0);
    assert_eq!(std::fs::read_dir(test.dir().join("images/tmp")).unwrap().count(), 0);
    let id = test.image(token, json!({"disk_format": "aki", "container_format": "aki"})).await;
    test.put_bytes(token, &id, kernel).await.expect(204);
}

#[tokio::test]
async fn uploads_are_limited_and_checked_against_their_headers() {
    let test = TestApp::with(|config| config.max_image_bytes = 1000).await;
    let token = test.admin_token.as_str();
    let id = test.image(token, json!({"disk_format": "raw", "container_format": "bare"})).await;
    // Announced, and not announced (a stream).
    test.put_bytes(token, &id, vec![1; 1001]).await.expect(413);
    let stream = || {
        Body::from_stream(futures_util::stream::iter((0..11).map(|_| Ok::<_, std::io::Error>(vec![1; 100]))))
    };
    test.put_bytes(token, &id, stream()).await.expect(413);
    let request = |name: &str, value: &str| {
        let request = Request::put(format!("{IMAGES}/{id}/file")).header("x-auth-token", token);
        let request = request.header("content-type", "application/octet-stream").header(name, value);
        test.send(request.body(Body::from("12345")).unwrap())
    };
    request("x-openstack-image-size", "6").await.expect(400);
    request("x-openstack-image-size", "five").await.expect(400);
    let untyped = Request::put(format!("{IMAGES}/{id}/file")).header("x-auth-token", token);
    test.send(untyped.body(Body::from("12345")).unwrap()).await.expect(415);
    test.put_bytes(token, &id, vec![1; 1000]).await.expect(204);
}

#[tokio::test]
async fn an_upload_that_breaks_off_can_be_repeated() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.image(token, json!({"disk_format": "raw", "container_format": "bare"})).await;
    let pieces = [Ok("some"), Err(std::io::Error::other("gone"))];
    let broken = Body::from_stream(futures_util::stream::iter(pieces));
    test.put_bytes(token, &id, broken).await.expect(400);
    test.put_bytes(token, &id, "some bytes").await.expect(204);
    assert_eq!(test.blobs(), 1);
}

#[tokio::test]
async fn the_same_bytes_stay_until_the_last_image_is_deleted() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let one = test.raw_image(token, "one", b"same").await;
    let two = test.raw_image(token, "two", b"same").await;
    assert_eq!(test.blobs(), 1);
    test.delete(&format!("{IMAGES}/{one}"), token).await.expect(204);
    assert_eq!(test.get(&format!("{IMAGES}/{two}/file"), token).await.bytes, b"same");
    test.patch(token, &two, json!([{"op": "replace", "path": "/protected", "value": true}]))
        .await
        .expect(200);
    test.delete(&format!("{IMAGES}/{two}"), token).await.expect(403);
    test.patch(token, &two, json!([{"op": "replace", "path": "/protected", "value": false}]))
        .await
        .expect(200);
    test.delete(&format!("{IMAGES}/{two}"), token).await.expect(204);
    assert_eq!(test.blobs(), 0);
}

#[tokio::test]
async fn bytes_stay_as_long_as_a_server_boots_from_them() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.raw_image(token, "n", b"needed").await;
    let digest = test.app.images.list().unwrap()[0].sha256.clone();
    let mut tx = test.app.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib, disk_gib,
             disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index, availability_zone, desired_power,
             run_generation, changed_generation, vm_state, created_us, updated_us)
         VALUES ('s', $1, 'u', 'n', 'n', '1', 'f', 1, 64, 0, 1, $2, $3, '{}', 'never', 0, '', 'running', 0, 0, 'active', 0, 0)",
    )
    .bind(&test.admin.project_id)
    .bind(&id)
    .bind(json!({"disk": {"sha256": digest, "size": 6}}).to_string())
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    test.delete(&format!("{IMAGES}/{id}"), token).await.expect(204);
    super::blobs::recover(&test.app).await.unwrap();
    assert_eq!(test.blobs(), 1);
    let project = format!("/identity/v3/projects/{}", test.admin.project_id);
    let error = test.delete(&project, token).await.expect(409);
    assert!(error["error"]["message"].as_str().unwrap().contains("servers"), "{error}");
    let mut tx = test.app.begin().await.unwrap();
    sqlx::query("DELETE FROM servers").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    super::blobs::release(&test.app, &[digest]).await.unwrap();
    assert_eq!(test.blobs(), 0);
}

#[tokio::test]
async fn what_a_crash_left_is_put_in_order_at_the_start() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let kept = test.raw_image(token, "kept", b"kept").await;
    let id = test.image(token, json!({"disk_format": "raw", "container_format": "bare"})).await;
    sqlx::query("UPDATE images SET status = 'saving', upload_id = 'u' WHERE id = $1")
        .bind(&id)
        .execute(&test.app.db)
        .await
        .unwrap();
    let mut orphan = test.app.images.writer().unwrap();
    std::io::Write::write_all(&mut orphan, b"orphan").unwrap();
    orphan.commit(None).unwrap();
    super::blobs::recover(&test.app).await.unwrap();
    assert_eq!(test.blobs(), 1);
    assert_eq!(test.get(&format!("{IMAGES}/{kept}/file"), token).await.bytes, b"kept");
    test.put_bytes(token, &id, "again").await.expect(204);
}

#[tokio::test]
async fn impossible_records_are_refused_with_a_reason() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    for (body, status, text) in [
        (json!({"disk_format": "vmdk", "container_format": "bare"}), 400, "qemu-img convert"),
        (json!({"disk_format": "raw", "container_format": "aki"}), 400, "bare"),
        (json!({"name": 7}), 400, "'name'"),
        (json!({"status": "active"}), 403, "read-only"),
        (json!({"deleted": "true"}), 403, "reserved"),
        (json!({"color": 7}), 400, "color"),
        (json!({"visibility": "secret"}), 400, "visibility"),
        (json!({"id": "x"}), 400, "UUID"),
        (json!({"tags": [""]}), 400, "tags"),
        (json!([]), 400, "Invalid input"),
    ] {
        let error = test.post(IMAGES, token, body).await.expect(status);
        assert!(error["error"]["message"].as_str().unwrap().contains(text), "{error}");
    }
    let id = "6BA7B810-9dad-11d1-80b4-00c04fd430c8";
    assert_eq!(test.image(token, json!({"id": id})).await, id.to_lowercase());
    test.post(IMAGES, token, json!({"id": id})).await.expect(409);
    let broken = Request::post(IMAGES).header("x-auth-token", token).body(Body::from("{\"name\"")).unwrap();
    let error = test.send(broken).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("Malformed JSON"), "{error}");
    test.put_bytes(token, id, "x").await.expect(404);
    let formless = test.image(token, json!({"name": "formless"})).await;
    test.put_bytes(token, &formless, "x").await.expect(400);
}

#[tokio::test]
async fn lists_are_filtered_sorted_and_paged() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let mut ids = Vec::new();
    for name in ["b", "a", "c", "a"] {
        let body = json!({"name": name, "tags": [format!("tag-{name}")], "letter": name});
        ids.push(test.image(token, body).await);
    }
    let names = |query: String| {
        let test = &test;
        async move {
            let listed = test.get(&format!("{IMAGES}{query}"), token).await.expect(200);
            let images = listed["images"].as_array().unwrap();
            images.iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>().concat()
        }
    };
    assert_eq!(names(String::new()).await, "acab");
    assert_eq!(names("?name=a".into()).await, "aa");
    assert_eq!(names("?name=in:b,c&sort=name:asc".into()).await, "bc");
    assert_eq!(names("?tag=tag-b".into()).await, "b");
    assert_eq!(names("?letter=c".into()).await, "c");
    assert_eq!(names("?letter=c&visibility=".into()).await, "c");
    test.get(&format!("{IMAGES}?visibility=secret"), token).await.expect(400);
    assert_eq!(names("?status=active".into()).await, "");
    assert_eq!(names(format!("?id=in:{},{}&sort=created_at:asc", ids[0], ids[2])).await, "bc");
    assert_eq!(names("?sort_key=name&sort_dir=desc".into()).await, "cbaa");
    assert_eq!(names("?created_at=gt:2020-01-01T00:00:00Z&limit=0".into()).await, "");
    // By pages of one, following the links, all come once in order.
    for (sort, expected) in
        [("name:asc", "aabc"), ("created_at:desc", "acab"), ("size:asc,name:desc", "cbaa")]
    {
        let (mut path, mut seen) = (format!("/v2/images?limit=1&sort={sort}"), String::new());
        loop {
            let page = test.get(&format!("/image{path}"), token).await.expect(200);
            seen.push_str(page["images"][0]["name"].as_str().unwrap());
            match page["next"].as_str() {
                Some(next) => path = next.to_owned(),
                None => break,
            }
        }
        assert_eq!(seen, expected, "{sort}");
    }
    for bad in ["?limit=x", "?sort=color", "?marker=nowhere", "?protected=maybe", "?created_at=gt:x"] {
        test.get(&format!("{IMAGES}{bad}"), token).await.expect(400);
    }
}

#[tokio::test]
async fn patch_wants_its_media_type_and_tags_have_routes() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.image(token, json!({"name": "n"})).await;
    let path = format!("{IMAGES}/{id}");
    test.call(Method::PATCH, &path, token, json!([])).await.expect(415);
    let image =
        test.patch(token, &id, json!([{"op": "add", "path": "/color", "value": "red"}])).await.expect(200);
    assert_eq!(image["color"], "red");
    test.patch(token, &id, json!([{"op": "jump", "path": "/color"}])).await.expect(400);
    test.call(Method::PUT, &format!("{path}/tags/blue"), token, Value::Null).await.expect(204);
    test.delete(&format!("{path}/tags/blue"), token).await.expect(204);
    test.delete(&format!("{path}/tags/blue"), token).await.expect(404);
}

#[tokio::test]
async fn a_deactivated_image_gives_its_bytes_only_to_administrators() {
    let test = TestApp::new().await;
    let (_, token) = test.tenant("t1", "member").await;
    let id = test.raw_image(&token, "n", b"bytes").await;
    let path = format!("{IMAGES}/{id}");
    let act = |token: String, action: &str| {
        let path = format!("{path}/actions/{action}");
        let test = &test;
        async move { test.post(&path, &token, Value::Null).await }
    };
    let (_, stranger) = test.tenant("t2", "member").await;
    act(stranger, "deactivate").await.expect(404);
    act(token.clone(), "deactivate").await.expect(204);
    test.get(&format!("{path}/file"), &token).await.expect(403);
    assert_eq!(test.get(&format!("{path}/file"), &test.admin_token).await.bytes, b"bytes");
    act(test.admin_token.clone(), "reactivate").await.expect(204);
    assert_eq!(test.get(&format!("{path}/file"), &token).await.bytes, b"bytes");
}

#[tokio::test]
async fn a_boot_finds_kernel_and_ramdisk_or_says_what_is_missing() {
    let test = TestApp::new().await;
    let (_, token) = test.tenant("t1", "member").await;
    let principal = crate::identity::principal_of(&test.app, &token).await.unwrap();
    let ctx = principal.as_ref().clone().into_ctx();
    let boot = async |id: &str| {
        let mut conn = test.app.db.acquire().await.unwrap();
        image_for_boot(&mut conn, id, &ctx).await
    };
    let disk = test.raw_image(&token, "disk", b"disk").await;
    assert_eq!(boot(&disk).await.unwrap().kernel, None, "a whole disk");
    let set = async |name: &str, value: &str| {
        let operations = json!([{"op": "add", "path": format!("/{name}"), "value": value}]);
        test.patch(&token, &disk, operations).await.expect(200);
        boot(&disk).await
    };
    assert!(set("ramdisk_id", "nowhere").await.unwrap_err().to_string().contains("No image found"));
    assert_eq!(set("ramdisk_id", "").await.unwrap().kernel, None);
    assert!(set("kernel_id", "nowhere").await.unwrap_err().to_string().contains("No image found"));
    assert!(set("kernel_id", &disk).await.unwrap_err().to_string().contains("aki"));
    // Another project's kernel is as good as none.
    let record = json!({"disk_format": "aki", "container_format": "aki"});
    let foreign = test.image(&test.admin_token, record.clone()).await;
    test.put_bytes(&test.admin_token, &foreign, kernel()).await.expect(204);
    assert!(set("kernel_id", &foreign).await.unwrap_err().to_string().contains("No image found"));
    let own = test.image(&token, record).await;
    assert!(set("kernel_id", &own).await.unwrap_err().to_string().contains("not active"));
    test.put_bytes(&token, &own, kernel()).await.expect(204);
    let found = set("os_command_line", "quiet").await.unwrap();
    assert_eq!((found.kernel.as_ref().unwrap().id.as_str(), found.disk.size), (own.as_str(), 4));
    assert_eq!((found.command_line.as_deref(), &found.ramdisk), (Some("quiet"), &None));
    let found = set("trait:CUSTOM_A", "required").await.unwrap();
    assert_eq!(found.required_traits, ["CUSTOM_A"]);
    assert!(set("trait:CUSTOM_B", "perhaps").await.is_err());
    assert!(matches!(boot("nowhere").await, Err(crate::http::error::ApiError::NotFound(_))));
}
