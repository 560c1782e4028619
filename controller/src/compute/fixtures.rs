//! Hosts and servers as rows, for the tests of what only reads them.

use axum::body::Body;
use http::{Method, Request};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    app::App,
    db::now_us,
    testing::{Answer, TestApp},
};

impl TestApp {
    /// A request of microversion 2.`minor`.
    pub(crate) async fn call_at(
        &self,
        method: Method,
        path: &str,
        token: &str,
        minor: u16,
        body: Value,
    ) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-auth-token", token)
            .header("openstack-api-version", format!("compute 2.{minor}"));
        let request = match body {
            Value::Null => request.body(Body::empty()),
            body => request.header("content-type", "application/json").body(Body::from(body.to_string())),
        };
        self.send(request.unwrap()).await
    }

    pub(crate) async fn get_at(&self, path: &str, token: &str, minor: u16) -> Answer {
        self.call_at(Method::GET, path, token, minor, Value::Null).await
    }

    pub(crate) async fn post_at(&self, path: &str, token: &str, minor: u16, body: Value) -> Answer {
        self.call_at(Method::POST, path, token, minor, body).await
    }
}

/// A host that was seen just now: 8 vCPUs, 16 GiB of memory, 100 GiB of disk.
pub(super) async fn host(app: &App, name: &str, zone: &str) -> String {
    let id = Uuid::new_v4().to_string();
    let mut tx = app.begin().await.unwrap();
    sqlx::query(
        "INSERT INTO hosts (id, number, name, availability_zone, own_zone, secret_hash, vcpus, memory_mib, disk_gib, kernel,
             version, traits, last_seen_us, created_us)
         VALUES ($1, (SELECT COALESCE(MAX(number), 0) + 1 FROM hosts), $2, $3, $3, '', 8, 16384, 100, '6.1', '0.2.1',
             '[]', $4, $4)",
    )
    .bind(&id)
    .bind(name)
    .bind(zone)
    .bind(now_us())
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    id
}

/// A server of 2 vCPUs, 512 MiB and 5 GiB, launched an hour ago if it is on a host.
pub(super) async fn server(app: &App, project: &str, host: Option<&str>, vm_state: &str) -> String {
    let id = Uuid::new_v4().to_string();
    let mut tx = app.begin().await.unwrap();
    let now = now_us();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index, availability_zone,
             host_id, desired_power, run_generation, changed_generation, vm_state, created_us, updated_us, launched_us)
         VALUES ($1, $2, 'u', 's', 's', '1', 'f', 2, 512, 5, 5, 'i', '{}', '{}', 'never', 0, '', $3, 'running', 1, 1,
             $4, $5, $5, $6)",
    )
    .bind(&id)
    .bind(project)
    .bind(host)
    .bind(vm_state)
    .bind(now)
    .bind(host.map(|_| now - 3_600_000_000))
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    id
}
