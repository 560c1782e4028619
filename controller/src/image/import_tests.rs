//! Conversion and import, asked in process.

use axum::{Router, body::Body, routing::get};
use http::{Method, Request, StatusCode, header};
use serde_json::{Value, json};

use super::tests::IMAGES;
use crate::testing::{Answer, TestApp};

/// A qcow2 disk of 8 clusters of 64 KiB, of which the first is all `7`.
fn qcow2() -> Vec<u8> {
    mote_images::samples::qcow2(8)
}

impl TestApp {
    async fn record(&self, token: &str, disk_format: &str) -> String {
        let body = json!({"name": "n", "disk_format": disk_format, "container_format": "bare"});
        let image = self.post(IMAGES, token, body).await.expect(201);
        image["id"].as_str().unwrap().to_owned()
    }

    pub(super) async fn send_bytes(
        &self,
        token: &str,
        id: &str,
        what: &str,
        bytes: impl Into<Body>,
    ) -> Answer {
        let request = Request::put(format!("{IMAGES}/{id}/{what}"))
            .header("x-auth-token", token)
            .header("content-type", "application/octet-stream");
        self.send(request.body(bytes.into()).unwrap()).await
    }

    async fn show_image(&self, token: &str, id: &str) -> Value {
        self.get(&format!("{IMAGES}/{id}"), token).await.expect(200)
    }

    async fn import(&self, token: &str, id: &str, method: Value) -> Answer {
        self.post(&format!("{IMAGES}/{id}/import"), token, json!({ "method": method })).await
    }

    /// The only task of an image, once it has ended.
    pub(super) async fn ended_task(&self, token: &str, id: &str) -> Value {
        loop {
            let tasks = self.get(&format!("{IMAGES}/{id}/tasks"), token).await.expect(200);
            let task = tasks["tasks"][0].clone();
            if ["success", "failure"].contains(&task["status"].as_str().unwrap()) {
                return task;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn of_a_qcow2_disk_hosts_get_the_raw_one_and_clients_their_own_bytes() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.record(token, "qcow2").await;
    test.send_bytes(token, &id, "file", qcow2()).await.expect(204);
    let image = test.show_image(token, &id).await;
    assert_eq!((&image["size"], &image["virtual_size"]), (&json!(4 << 16), &json!(8 << 16)));
    assert_eq!(test.get(&format!("{IMAGES}/{id}/file"), token).await.bytes, qcow2());
    let principal = crate::identity::principal_of(&test.app, token).await.unwrap();
    let ctx = principal.as_ref().clone().into_ctx();
    let kernel = json!({"disk_format": "aki", "container_format": "aki"});
    let kernel = test.post(IMAGES, token, kernel).await.expect(201)["id"].as_str().unwrap().to_owned();
    test.send_bytes(token, &kernel, "file", super::tests::kernel()).await.expect(204);
    let set = json!([{"op": "add", "path": "/kernel_id", "value": kernel}]);
    let request = Request::patch(format!("{IMAGES}/{id}"))
        .header("x-auth-token", token)
        .header("content-type", super::patch::MEDIA_TYPE);
    test.send(request.body(Body::from(set.to_string())).unwrap()).await.expect(200);
    let boot = super::image_for_boot(&mut test.app.db.acquire().await.unwrap(), &id, &ctx).await.unwrap();
    assert_eq!(boot.disk.size, 8 << 16);
    let raw = std::fs::read(test.app.images.path(&boot.disk.sha256).unwrap()).unwrap();
    assert!(raw[..1 << 16].iter().all(|b| *b == 7) && raw[1 << 16..].iter().all(|b| *b == 0));
    super::blobs::recover(&test.app).await.unwrap();
    assert_eq!(test.app.images.list().unwrap().len(), 3);
    test.delete(&format!("{IMAGES}/{id}"), token).await.expect(204);
    assert_eq!(test.app.images.list().unwrap().len(), 1, "only the kernel is left");
}

#[tokio::test]
async fn hostile_disks_are_refused_with_a_reason_and_leave_nothing() {
    let test = TestApp::with(|config| config.max_image_bytes = 1 << 20).await;
    let token = test.admin_token.as_str();
    let with = |at: usize, bytes: &[u8]| {
        let mut disk = qcow2();
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        disk
    };
    let mut bomb = qcow2();
    for entry in 0..8 {
        let at = (2 << 16) + entry * 8;
        bomb[at..at + 8].copy_from_slice(&(3_u64 << 16).to_be_bytes());
    }
    // A qcow2 disk in the qcow2 disk, which names a file of the host.
    let mut nested = qcow2();
    nested[3 << 16..(3 << 16) + 8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    for (disk, words) in [
        (with(8, &200_u64.to_be_bytes()), "backing file"),
        (with(72, &4_u64.to_be_bytes()), "another file"),
        (with(24, &(1_u64 << 40).to_be_bytes()), "at most 1048576"),
        (with(20, &99_u32.to_be_bytes()), "clusters"),
        (bomb, "bomb"),
        (nested, "inside the qcow2 disk is a qcow2 disk"),
        (b"raw bytes".to_vec(), "declared as 'qcow2'"),
    ] {
        let id = test.record(token, "qcow2").await;
        let error = test.send_bytes(token, &id, "file", disk).await.expect(400);
        assert!(error["error"]["message"].as_str().unwrap().contains(words), "{words}: {error}");
        assert_eq!(test.show_image(token, &id).await["status"], "queued");
    }
    assert_eq!(test.app.images.list().unwrap().len(), 0);
    let id = test.record(token, "raw").await;
    test.send_bytes(token, &id, "file", qcow2()).await.expect(400);
}

#[tokio::test]
async fn an_iso_is_a_disk() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.record(token, "iso").await;
    test.send_bytes(token, &id, "file", "no iso").await.expect(400);
    let mut iso = vec![0; 0x8800];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    test.send_bytes(token, &id, "file", iso).await.expect(204);
    assert_eq!(test.show_image(token, &id).await["status"], "active");
}

#[tokio::test]
async fn staged_bytes_become_the_content_by_their_import() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "member").await;
    let (_, other) = test.tenant("t2", "member").await;
    let id = test.record(&token, "qcow2").await;
    test.import(&token, &id, json!({"name": "glance-direct"})).await.expect(409);
    test.send_bytes(&token, &id, "stage", "first, wrong").await.expect(204);
    let image = test.show_image(&token, &id).await;
    assert_eq!((&image["status"], &image["checksum"]), (&json!("uploading"), &Value::Null));
    assert_eq!(test.get(&format!("{IMAGES}/{id}/file"), &token).await.status, StatusCode::NO_CONTENT);
    let listed = test.get(&format!("{IMAGES}?status=uploading"), &token).await.expect(200);
    assert_eq!(listed["images"][0]["id"], id.as_str());
    test.send_bytes(&token, &id, "file", qcow2()).await.expect(409);
    // It can be staged anew, and what was there before goes.
    test.send_bytes(&token, &id, "stage", qcow2()).await.expect(204);
    assert_eq!(test.app.images.list().unwrap().len(), 1);
    super::blobs::recover(&test.app).await.unwrap();
    assert_eq!(test.app.images.list().unwrap().len(), 1, "staged bytes are needed");
    let usage = test.get("/image/v2/info/usage", &token).await.expect(200);
    assert_eq!(usage["usage"]["image_stage_total"]["usage"], 4 << 16);
    test.import(&other, &id, json!({"name": "glance-direct"})).await.expect(404);
    test.import(&token, &id, json!({"name": "glance-direct"})).await.expect(202);
    let task = test.ended_task(&token, &id).await;
    assert_eq!((&task["status"], &task["owner"]), (&json!("success"), &json!(project)), "{task}");
    assert_eq!(task["input"]["import_req"]["method"]["name"], "glance-direct");
    let image = test.show_image(&token, &id).await;
    assert_eq!((&image["status"], &image["virtual_size"]), (&json!("active"), &json!(8 << 16)));
    assert_eq!(test.get(&format!("{IMAGES}/{id}/file"), &token).await.bytes, qcow2());
    test.import(&token, &id, json!({"name": "glance-direct"})).await.expect(409);
    // Tasks are the project's.
    let path = format!("/image/v2/tasks/{}", task["id"].as_str().unwrap());
    assert_eq!(test.get(&path, &token).await.expect(200)["result"]["image_id"], id.as_str());
    test.get(&path, &other).await.expect(404);
    assert_eq!(test.get("/image/v2/tasks", &other).await.expect(200)["tasks"], json!([]));
    for query in ["status=success", "type=api_image_import", "sort_key=updated_at&sort_dir=asc&limit=1"] {
        let tasks = test.get(&format!("/image/v2/tasks?{query}"), &test.admin_token).await.expect(200);
        assert_eq!(tasks["tasks"][0]["id"], task["id"], "{query}");
    }
    assert_eq!(test.get("/image/v2/tasks?type=export", &token).await.expect(200)["tasks"], json!([]));
    test.get("/image/v2/tasks?color=red", &token).await.expect(400);
    test.post("/image/v2/tasks", &token, json!({"type": "import"})).await.expect(403);
    for schema in ["task", "tasks"] {
        test.get(&format!("/image/v2/schemas/{schema}"), &token).await.expect(200);
    }
}

#[tokio::test]
async fn an_import_that_fails_gives_the_image_back_and_says_why() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.record(token, "qcow2").await;
    let mut disk = qcow2();
    disk[15] = 1;
    test.send_bytes(token, &id, "stage", disk).await.expect(204);
    test.import(token, &id, json!({"name": "glance-direct"})).await.expect(202);
    let task = test.ended_task(token, &id).await;
    assert_eq!(task["status"], "failure");
    assert!(task["message"].as_str().unwrap().contains("backing file"), "{task}");
    assert_eq!(test.show_image(token, &id).await["status"], "queued");
    assert_eq!(test.app.images.list().unwrap().len(), 0);
    test.send_bytes(token, &id, "file", qcow2()).await.expect(204);
}

#[tokio::test]
async fn an_import_that_a_crash_broke_off_is_a_failed_task_and_a_queued_image() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.record(token, "raw").await;
    test.send_bytes(token, &id, "stage", "bytes").await.expect(204);
    test.import(token, &id, json!({"name": "glance-direct"})).await.expect(202);
    test.ended_task(token, &id).await;
    // As if the controller with the number 0 had been killed over it.
    for sql in [
        "UPDATE images SET status = 'saving', import_state = 'importing', upload_id = '0:x'",
        "UPDATE image_tasks SET status = 'processing', upload_id = '0:x'",
    ] {
        sqlx::query(sql).execute(&test.app.db).await.unwrap();
    }
    assert_eq!(test.show_image(token, &id).await["status"], "importing");
    super::blobs::recover(&test.app).await.unwrap();
    assert_eq!(test.show_image(token, &id).await["status"], "queued");
    let task = test.ended_task(token, &id).await;
    assert!(task["message"].as_str().unwrap().contains("stopped"), "{task}");
    assert_eq!(test.app.images.list().unwrap().len(), 0);
}

#[tokio::test]
async fn methods_and_stores_that_are_not_there_are_refused_by_name() {
    let test = TestApp::new().await;
    let token = test.admin_token.as_str();
    let id = test.record(token, "raw").await;
    let methods = test.get("/image/v2/info/import", token).await.expect(200);
    assert_eq!(methods["import-methods"]["value"], json!(["glance-direct"]));
    let made = test.post(IMAGES, token, json!({"name": "x"})).await;
    assert_eq!(made.header("openstack-image-import-methods"), "glance-direct");
    for (method, words) in [
        (json!({"name": "web-download", "uri": "http://cloud.test/"}), "--image-download-host"),
        (json!({"name": "copy-image"}), "only one store"),
        (json!({"name": "teleport"}), "glance-direct"),
        (json!({"name": "glance-direct", "uri": "x"}), "no uri"),
        (json!({"name": "glance-direct", "color": 1}), "color"),
    ] {
        let error = test.import(token, &id, method).await.expect(400);
        assert!(error["error"]["message"].as_str().unwrap().contains(words), "{words}: {error}");
    }
    let body = json!({"method": {"name": "glance-direct"}, "stores": ["local", "moon"]});
    let error = test.post(&format!("{IMAGES}/{id}/import"), token, body).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("moon"), "{error}");
    let request = Request::put(format!("{IMAGES}/{id}/file"))
        .header("x-auth-token", token)
        .header("content-type", "application/octet-stream")
        .header("x-image-meta-store", "moon");
    test.send(request.body(Body::from("x")).unwrap()).await.expect(400);
    let (_, member) = test.tenant("t1", "member").await;
    test.get("/image/v2/info/stores/detail", &member).await.expect(403);
    assert_eq!(test.get("/image/v2/info/stores", &member).await.expect(200)["stores"][0]["id"], "local");
    test.call(Method::PUT, "/image/v2/tasks", token, Value::Null).await.expect(405);
}

#[tokio::test]
async fn a_download_comes_only_from_allowed_hosts_also_by_redirection() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let away = |to: &'static str| move || async move { (StatusCode::FOUND, [(header::LOCATION, to)]) };
    let site = Router::new()
        .route("/disk", get(|| async { "some bytes" }))
        .route("/moved", get(away("/disk")))
        .route("/inside", get(away("http://169.254.169.254/latest")))
        .route("/loop", get(away("/loop")))
        .route("/empty", get(|| async { "" }));
    drop(tokio::spawn(crate::server::serve(listener, None, site, std::future::pending())));
    let test = TestApp::with(|config| config.image_download_hosts = vec![host.clone()]).await;
    let token = test.admin_token.as_str();
    for (path, words) in [
        ("disk", ""),
        ("moved", ""),
        ("inside", "not allowed"),
        ("loop", "redirections"),
        ("empty", "empty"),
        ("no", "404"),
    ] {
        let id = test.record(token, "raw").await;
        let uri = format!("http://{host}/{path}");
        test.import(token, &id, json!({"name": "web-download", "uri": uri})).await.expect(202);
        let task = test.ended_task(token, &id).await;
        assert!(task["message"].as_str().unwrap().contains(words), "{path}: {task}");
        let image = test.show_image(token, &id).await;
        let expected = if words.is_empty() { "active" } else { "queued" };
        assert_eq!(image["status"], expected, "{path}: {task}");
    }
    let id = test.record(token, "raw").await;
    let elsewhere = json!({"name": "web-download", "uri": "http://127.0.0.1:1/"});
    test.import(token, &id, elsewhere).await.expect(403);
    test.import(token, &id, json!({"name": "web-download"})).await.expect(400);
    test.send_bytes(token, &id, "stage", "x").await.expect(204);
    let again = json!({"name": "web-download", "uri": format!("http://{host}/disk")});
    test.import(token, &id, again).await.expect(409);
}
