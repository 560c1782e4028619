use http::Method;
use mote_host_api::{ObservedState, PortId};
use serde_json::Value;

use super::super::{
    fake::{FakeHost, inventory},
    tests::{delete, network, server},
};
use super::*;
use crate::testing::TestApp;

struct Site {
    test: TestApp,
    host: FakeHost,
    project: String,
    token: String,
    port: PortId,
    server: mote_host_api::ServerId,
}

impl Site {
    async fn new() -> Self {
        let test = TestApp::new().await;
        let host = FakeHost::join(&test, "h1").await;
        let (project, token) = test.tenant("t", "member").await;
        let network = network(&test, &token).await;
        let server = server(&test, &host, &project, &network, &"a".repeat(64)).await;
        let port: String = sqlx::query_scalar("SELECT id FROM ports WHERE server_id = $1")
            .bind(server.to_string())
            .fetch_one(&test.app.db)
            .await
            .unwrap();
        Self { test, host, project, token, port: port.parse().unwrap(), server }
    }

    /// A report of `host` with these series and bytes sent.
    async fn tell(&self, host: &FakeHost, applied_generation: u64, series: &[(&str, u64)]) -> u16 {
        let traffic = series.iter().map(|(series, bytes)| PortTraffic {
            port_id: self.port,
            series: (*series).to_owned(),
            traffic: Traffic { tx_bytes: *bytes, tx_packets: *bytes / 100, ..Traffic::default() },
        });
        let observed = ObservedState {
            host_id: host.joined.host_id,
            inventory: inventory(),
            applied_generation,
            servers: vec![],
            traffic: traffic.collect(),
        };
        let body = serde_json::to_value(observed).unwrap();
        host.call(&self.test, Method::PUT, "observed", body).await.status.as_u16()
    }

    async fn list(&self, query: &str) -> Vec<Value> {
        let path = format!("/mote/v1/metering/ports{query}");
        let found = self.test.get(&path, &self.test.admin_token).await.expect(200);
        found["ports"].as_array().unwrap().clone()
    }

    async fn sent(&self) -> u64 {
        self.list("").await.iter().map(|port| port["tx_bytes"].as_u64().unwrap()).sum()
    }

    async fn rows(&self) -> i64 {
        sqlx::query_scalar("SELECT COUNT(*) FROM port_traffic").fetch_one(&self.test.app.db).await.unwrap()
    }
}

#[tokio::test]
async fn what_is_told_twice_late_or_by_another_host_is_counted_once() {
    let site = Site::new().await;
    assert_eq!(site.tell(&site.host, 0, &[("one", 1000)]).await, 204);
    assert_eq!(site.sent().await, 1000);
    site.tell(&site.host, 0, &[("one", 1000)]).await;
    site.tell(&site.host, 0, &[("one", 1500)]).await;
    site.tell(&site.host, 0, &[("one", 1000)]).await;
    assert_eq!(site.sent().await, 1500);
    // Another VMM, told together with what the first still had to say.
    site.tell(&site.host, 0, &[("one", 1600), ("two", 300)]).await;
    assert_eq!(site.sent().await, 1900);
    let other = FakeHost::join(&site.test, "h2").await;
    assert_eq!(site.tell(&other, 0, &[("three", 5000)]).await, 204);
    assert_eq!(site.sent().await, 1900);
    assert_eq!(site.tell(&site.host, 0, &[("", 1)]).await, 400);
    assert_eq!(site.tell(&site.host, 0, &[(&"x".repeat(200), 1)]).await, 400);
}

#[tokio::test]
async fn old_series_are_added_up_and_what_a_deleted_port_has_carried_stays() {
    let site = Site::new().await;
    for (number, series) in ["a", "b", "c", "d"].iter().enumerate() {
        site.tell(&site.host, 0, &[(series, 100)]).await;
        assert_eq!(site.sent().await, 100 * (number as u64 + 1));
        sqlx::query("UPDATE port_traffic SET updated_us = 1").execute(&site.test.app.db).await.unwrap();
    }
    assert_eq!(site.rows().await, 2, "the sum, and the newest");
    let generation = delete(&site.test, &site.host, site.server).await;
    // The report in which the server is gone has the end of its traffic.
    site.tell(&site.host, generation, &[("d", 150)]).await;
    let left: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM servers").fetch_one(&site.test.app.db).await.unwrap();
    assert_eq!((left, site.sent().await), (0, 450));
}

#[tokio::test]
async fn administrators_read_it_by_whose_it_is() {
    let site = Site::new().await;
    site.tell(&site.host, 0, &[("one", 1000)]).await;
    let port = &site.list("").await[0];
    assert_eq!((&port["project_id"], &port["rx_bytes"]), (&json!(site.project), &json!(0)));
    assert_eq!(port["server_id"], json!(site.server));
    for query in [format!("?project_id={}", site.project), format!("?port_id={}&limit=1", site.port)] {
        assert_eq!(site.list(&query).await.len(), 1, "{query}");
    }
    for query in ["?project_id=another".to_owned(), format!("?marker={}", site.port)] {
        assert!(site.list(&query).await.is_empty(), "{query}");
    }
    site.test.get("/mote/v1/metering/ports", &site.token).await.expect(403);
    site.test.get("/mote/v1/metering/ports?project=x", &site.test.admin_token).await.expect(400);
}
