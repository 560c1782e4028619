//! Availability zones: those that hosts are in, by an aggregate or as they said when they joined.

use std::collections::BTreeMap;

use axum::{Json, Router, extract::State, routing::get};
use serde_json::{Map, Value, json};
use sqlx::FromRow;

use crate::{
    app::App,
    db::rfc3339_us,
    hosts::is_up,
    http::{context::Ctx, error::ApiError},
};

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/os-availability-zone", get(list)).route("/os-availability-zone/detail", get(detail))
}

#[derive(Debug, FromRow)]
struct Row {
    name: String,
    availability_zone: String,
    enabled: bool,
    last_seen_us: i64,
}

async fn zones(app: &App) -> Result<BTreeMap<String, Vec<Row>>, ApiError> {
    let sql = "SELECT name, availability_zone, enabled, last_seen_us FROM hosts ORDER BY name";
    let rows: Vec<Row> = sqlx::query_as(sql).fetch_all(&app.db).await?;
    let mut zones = BTreeMap::<String, Vec<Row>>::new();
    for row in rows {
        zones.entry(row.availability_zone.clone()).or_default().push(row);
    }
    Ok(zones)
}

/// A zone is available as long as one of its hosts is enabled, as in Nova.
fn document(name: &str, hosts: &[Row], shown: Value) -> Value {
    let available = hosts.iter().any(|host| host.enabled);
    json!({"zoneName": name, "zoneState": {"available": available}, "hosts": shown})
}

async fn list(State(app): State<App>, _ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let zones = zones(&app).await?;
    let zones: Vec<Value> = zones.iter().map(|(name, hosts)| document(name, hosts, Value::Null)).collect();
    Ok(Json(json!({"availabilityZoneInfo": zones})))
}

async fn detail(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let zones = zones(&app).await?;
    let with_hosts = |(name, hosts): (&String, &Vec<Row>)| {
        let shown: Map<String, Value> = hosts.iter().map(|host| (host.name.clone(), service(host))).collect();
        document(name, hosts, shown.into())
    };
    let zones: Vec<Value> = zones.iter().map(with_hosts).collect();
    Ok(Json(json!({"availabilityZoneInfo": zones})))
}

fn service(host: &Row) -> Value {
    json!({"nova-compute": {
        "available": is_up(host.last_seen_us),
        "active": host.enabled,
        "updated_at": rfc3339_us(host.last_seen_us).trim_end_matches('Z'),
    }})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    #[tokio::test]
    async fn the_zones_of_hosts_are_shown_with_hosts_to_admins() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "reader").await;
        let url = "/compute/v2.1/os-availability-zone";
        assert_eq!(test.get(url, &token).await.expect(200), json!({"availabilityZoneInfo": []}));
        for (name, zone) in [("h2", "north"), ("h1", "north"), ("h3", "east")] {
            fixtures::host(&test.app, name, zone).await;
        }
        let zones = test.get(url, &token).await.expect(200);
        let zone = |name: &str| json!({"zoneName": name, "zoneState": {"available": true}, "hosts": null});
        assert_eq!(zones, json!({"availabilityZoneInfo": [zone("east"), zone("north")]}));
        test.get(&format!("{url}/detail"), &token).await.expect(403);
        let detail = test.get(&format!("{url}/detail"), &test.admin_token).await.expect(200);
        let hosts = detail["availabilityZoneInfo"][1]["hosts"].as_object().unwrap();
        assert_eq!(hosts.keys().collect::<Vec<_>>(), ["h1", "h2"]);
        assert_eq!(hosts["h1"]["nova-compute"]["available"], true);
    }
}
