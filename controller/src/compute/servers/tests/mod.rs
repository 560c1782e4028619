//! Whole requests, asked in process, with a host that is played by the test.

use std::sync::Arc;

use axum::body::Body;
use http::{Method, Request};
use serde_json::{Value, json};

use crate::{
    hosts::fake::FakeHost,
    testing::{Answer, TestApp},
};

mod actions;
mod create;
mod life;
mod list;
mod local;
mod parts;

const SERVERS: &str = "/compute/v2.1/servers";
const IMAGES: &str = "/image/v2/images";

/// A cloud with one host and one tenant, whose project has an image that boots and a network.
struct Cloud {
    test: Arc<TestApp>,
    host: FakeHost,
    project: String,
    token: String,
    image: String,
    network: String,
}

/// A freestanding ELF as `mote_images::kernel::check_kernel` wants it: one segment at 1 MiB with the entry in it.
fn kernel() -> Vec<u8> {
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

/// An active image of these bytes.
async fn image(test: &TestApp, token: &str, body: Value, bytes: Vec<u8>) -> String {
    let image = test.post(IMAGES, token, body).await.expect(201);
    let id = image["id"].as_str().unwrap().to_owned();
    let request = Request::put(format!("{IMAGES}/{id}/file"))
        .header("x-auth-token", token)
        .header("content-type", "application/octet-stream");
    test.send(request.body(Body::from(bytes)).unwrap()).await.expect(204);
    id
}

/// A disk image with a kernel.
async fn bootable(test: &TestApp, token: &str, name: &str, content: u8) -> String {
    let body = json!({"name": "kernel", "disk_format": "aki", "container_format": "aki"});
    let kernel = image(test, token, body, kernel()).await;
    let body = json!({
        "name": name, "disk_format": "raw", "container_format": "bare", "kernel_id": kernel,
        "os_command_line": "quiet",
    });
    image(test, token, body, vec![content; 4096]).await
}

/// A network with a subnet of 10.1.0.0/24.
async fn network(test: &TestApp, token: &str, name: &str) -> String {
    let body = json!({"network": {"name": name}});
    let network = test.post("/network/v2.0/networks", token, body).await.expect(201);
    let id = network["network"]["id"].as_str().unwrap().to_owned();
    let body = json!({"subnet": {"network_id": id, "ip_version": 4, "cidr": "10.1.0.0/24"}});
    test.post("/network/v2.0/subnets", token, body).await.expect(201);
    id
}

impl Cloud {
    async fn new() -> Self {
        let test = Arc::new(TestApp::new().await);
        let host = FakeHost::join(&test, "h1").await;
        let (project, token) = test.tenant("ada", "member").await;
        let image = bootable(&test, &token, "disk", 7).await;
        let network = network(&test, &token, "net").await;
        Self { test, host, project, token, image, network }
    }

    /// The body of a request for a small server.
    fn wish(&self, name: &str) -> Value {
        json!({"server": {
            "name": name, "imageRef": self.image, "flavorRef": "1", "networks": [{"uuid": self.network}],
        }})
    }

    /// A small server that its host has not seen yet.
    async fn create(&self, name: &str) -> String {
        let made = self.test.post(SERVERS, &self.token, self.wish(name)).await.expect(202);
        made["server"]["id"].as_str().unwrap().to_owned()
    }

    /// A small server that runs.
    async fn run(&self, name: &str) -> String {
        let id = self.create(name).await;
        self.settle().await;
        id
    }

    /// The host does all that is wanted.
    async fn settle(&self) {
        self.test.usage_is_exact().await;
        self.host.settle(&self.test).await;
        self.test.usage_is_exact().await;
    }

    async fn get(&self, path: &str) -> Answer {
        self.test.get(&format!("{SERVERS}{path}"), &self.token).await
    }

    /// The server in full.
    async fn show(&self, id: &str) -> Value {
        self.get(&format!("/{id}")).await.expect(200)["server"].take()
    }

    /// Its `status`, `vm_state`, `task_state` and `power_state`.
    async fn states(&self, id: &str) -> Value {
        let server = self.show(id).await;
        json!([
            server["status"],
            server["OS-EXT-STS:vm_state"],
            server["OS-EXT-STS:task_state"],
            server["OS-EXT-STS:power_state"]
        ])
    }

    /// As of microversion 2.`minor`.
    async fn show_at(&self, id: &str, minor: u16) -> Value {
        let path = format!("{SERVERS}/{id}");
        self.test.get_at(&path, &self.token, minor).await.expect(200)["server"].take()
    }

    /// An action that is accepted; gives the states while it is under way.
    async fn begun(&self, id: &str, action: Value) -> Value {
        let answer = self.act(id, action).await;
        assert_eq!(answer.status.as_u16(), 202, "{}", String::from_utf8_lossy(&answer.bytes));
        self.states(id).await
    }

    /// What the host is told of its only server.
    async fn spec(&self) -> mote_host_api::ServerSpec {
        self.host.desired(&self.test, 0).await.servers.remove(0)
    }

    async fn act(&self, id: &str, action: Value) -> Answer {
        self.test.post(&format!("{SERVERS}/{id}/action"), &self.token, action).await
    }

    async fn put(&self, path: &str, body: Value) -> Answer {
        self.test.call(Method::PUT, &format!("{SERVERS}{path}"), &self.token, body).await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.test.delete(&format!("{SERVERS}{path}"), &self.token).await
    }

    /// Sets a quota of the project.
    async fn quota(&self, quota: Value) {
        let path = format!("/compute/v2.1/os-quota-sets/{}", self.project);
        let body = json!({ "quota_set": quota });
        self.test.call(Method::PUT, &path, &self.test.admin_token, body).await.expect(200);
    }
}

/// The message of an error of Nova's with that status and name.
#[track_caller]
fn fault(answer: Answer, status: u16, name: &str) -> String {
    let body = answer.expect(status);
    assert_eq!(body[name]["code"], status, "{body}");
    body[name]["message"].as_str().unwrap().to_owned()
}
