//! Host aggregates: hosts that have something in common. For admins; the scheduler compares their metadata with flavors'
//! `aggregate_instance_extra_specs`, and the key `availability_zone` makes a zone of their hosts.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use http::StatusCode;
use serde_json::{Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::{
    servers::input::{Fields, invalid},
    versions::Version,
};
use crate::{
    app::App,
    db::{Conn, Tx, is_unique_violation, now_us, rfc3339_us},
    hosts::{ZONE_KEY, settle_zones},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Longest name, zone, key or value, as in Nova.
const MAX_TEXT: usize = 255;
/// Most aggregates of a cloud, and most metadata of one.
const MAX_AGGREGATES: i64 = 1000;
const MAX_METADATA: usize = 128;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-aggregates", get(list).post(create))
        .route("/os-aggregates/{id}", get(show).put(update).delete(delete))
        .route("/os-aggregates/{id}/action", post(act))
        .route("/os-aggregates/{id}/images", post(cache_images))
}

#[derive(Debug, FromRow)]
struct Row {
    id: i64,
    uuid: String,
    name: String,
    created_us: i64,
    updated_us: Option<i64>,
}

/// With its hosts' names and its metadata.
#[derive(Debug)]
struct Aggregate {
    row: Row,
    hosts: Vec<String>,
    metadata: BTreeMap<String, String>,
}

impl Aggregate {
    /// Without hosts and metadata, as Nova answers a request that made it.
    fn brief(&self, version: Version) -> Value {
        let time = |us: i64| rfc3339_us(us).trim_end_matches('Z').to_owned();
        let mut document = json!({
            "id": self.row.id, "name": self.row.name, "availability_zone": self.metadata.get(ZONE_KEY),
            "created_at": time(self.row.created_us), "updated_at": self.row.updated_us.map(time),
            "deleted": false, "deleted_at": null,
        });
        if version.has(41) {
            document["uuid"] = json!(self.row.uuid);
        }
        document
    }

    fn document(&self, version: Version) -> Value {
        let mut document = self.brief(version);
        document["hosts"] = json!(self.hosts);
        document["metadata"] = json!(self.metadata);
        document
    }
}

/// All aggregates, or the one of an id.
async fn load(conn: &mut Conn, only: Option<i64>) -> Result<Vec<Aggregate>, ApiError> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT id, uuid, name, created_us, updated_us FROM aggregates WHERE id = $1 OR $1 IS NULL ORDER BY id",
    )
    .bind(only)
    .fetch_all(&mut *conn)
    .await?;
    let hosts: Vec<(i64, String)> = sqlx::query_as(
        "SELECT a.aggregate_id, h.name FROM aggregate_hosts a JOIN hosts h ON h.id = a.host_id
         WHERE a.aggregate_id = $1 OR $1 IS NULL ORDER BY h.name",
    )
    .bind(only)
    .fetch_all(&mut *conn)
    .await?;
    let metadata: Vec<(i64, String, String)> = sqlx::query_as(
        "SELECT aggregate_id, key, value FROM aggregate_metadata WHERE aggregate_id = $1 OR $1 IS NULL",
    )
    .bind(only)
    .fetch_all(&mut *conn)
    .await?;
    let whole = |row: Row| (row.id, Aggregate { row, hosts: Vec::new(), metadata: BTreeMap::new() });
    let mut found: BTreeMap<i64, Aggregate> = rows.into_iter().map(whole).collect();
    for (id, name) in hosts {
        found.entry(id).and_modify(|aggregate| aggregate.hosts.push(name));
    }
    for (id, key, value) in metadata {
        found.entry(id).and_modify(|aggregate| drop(aggregate.metadata.insert(key, value)));
    }
    Ok(found.into_values().collect())
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::NotFound(format!("Aggregate {id} could not be found."))
}

async fn one(conn: &mut Conn, id: &str) -> Result<Aggregate, ApiError> {
    let number = id.parse().map_err(|_| not_found(id))?;
    load(conn, Some(number)).await?.pop().ok_or_else(|| not_found(id))
}

/// A name or a zone's name, without the blanks around it.
fn name(fields: &mut Fields, field: &str) -> Result<Option<String>, ApiError> {
    let Some(text) = fields.string(field)? else { return Ok(None) };
    let trimmed = text.trim();
    let fits = (1..=MAX_TEXT).contains(&trimmed.chars().count()) && !trimmed.chars().any(char::is_control);
    match fits && (field != ZONE_KEY || !trimmed.contains(':')) {
        true => Ok(Some(trimmed.to_owned())),
        false => {
            Err(invalid(field, &text.into(), "is not a name of 1 to 255 characters (a zone's has no ':')"))
        }
    }
}

async fn list(State(app): State<App>, _ctx: Ctx, version: Version) -> Result<Json<Value>, ApiError> {
    let all = load(&mut *app.db.acquire().await?, None).await?;
    let documents: Vec<Value> = all.iter().map(|aggregate| aggregate.document(version)).collect();
    Ok(Json(json!({ "aggregates": documents })))
}

async fn show(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let found = one(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"aggregate": found.document(version)})))
}

async fn create(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::open(body, "aggregate", &[])?;
    let name_wanted = name(&mut fields, "name")?;
    let name_wanted = name_wanted
        .ok_or_else(|| ApiError::BadRequest("Invalid input: 'name' is a required property.".into()))?;
    let zone = name(&mut fields, ZONE_KEY)?;
    fields.finish()?;
    let mut tx = app.begin().await?;
    let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM aggregates").fetch_one(&mut *tx).await?;
    if count >= MAX_AGGREGATES {
        return Err(ApiError::Conflict(format!("There are {MAX_AGGREGATES} aggregates already.")));
    }
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO aggregates (id, uuid, name, created_us)
         VALUES ((SELECT COALESCE(MAX(id), 0) + 1 FROM aggregates), $1, $2, $3) RETURNING id",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(&name_wanted)
    .bind(now_us())
    .fetch_one(&mut *tx)
    .await
    .map_err(|error| exists(error, &name_wanted))?;
    if let Some(zone) = zone {
        set(&mut tx, id, ZONE_KEY, Some(&zone)).await?;
    }
    let made = one(&mut tx, &id.to_string()).await?.brief(version);
    tx.commit().await?;
    Ok(Json(json!({ "aggregate": made })))
}

fn exists(error: sqlx::Error, name: &str) -> ApiError {
    match is_unique_violation(&error) {
        true => ApiError::Conflict(format!("Aggregate {name} already exists.")),
        false => error.into(),
    }
}

/// Sets or takes away one piece of metadata.
async fn set(tx: &mut Conn, id: i64, key: &str, value: Option<&str>) -> Result<(), ApiError> {
    let sql = match value {
        Some(_) => {
            "INSERT INTO aggregate_metadata (aggregate_id, key, value) VALUES ($1, $2, $3)
             ON CONFLICT (aggregate_id, key) DO UPDATE SET value = excluded.value"
        }
        None => {
            "DELETE FROM aggregate_metadata WHERE aggregate_id = $1 AND key = $2 AND CAST($3 AS TEXT) IS NULL"
        }
    };
    sqlx::query(sql).bind(id).bind(key).bind(value).execute(tx).await?;
    Ok(())
}

/// Writes down that it changed, lets the hosts' zones follow, and shows it.
async fn finish(mut tx: Tx, id: &str, version: Version) -> Result<Json<Value>, ApiError> {
    let found = one(&mut tx, id).await?;
    sqlx::query("UPDATE aggregates SET updated_us = $2 WHERE id = $1")
        .bind(found.row.id)
        .bind(now_us())
        .execute(&mut *tx)
        .await?;
    settle_zones(&mut tx).await?;
    let document = one(&mut tx, id).await?.document(version);
    tx.commit().await?;
    Ok(Json(json!({ "aggregate": document })))
}

/// As Nova: what hosts' servers forbid is a 400 here and a 409 where a host is named.
fn bad(error: ApiError) -> ApiError {
    match error {
        ApiError::Conflict(text) => ApiError::BadRequest(text),
        other => other,
    }
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::open(body, "aggregate", &[])?;
    let (new_name, zone) = (name(&mut fields, "name")?, name(&mut fields, ZONE_KEY)?);
    fields.finish()?;
    if new_name.is_none() && zone.is_none() {
        return Err(ApiError::BadRequest("Invalid input: name or availability_zone is needed.".into()));
    }
    let mut tx = app.begin().await?;
    let found = one(&mut tx, &id).await?;
    if let Some(name) = new_name {
        let renamed = sqlx::query("UPDATE aggregates SET name = $2 WHERE id = $1")
            .bind(found.row.id)
            .bind(&name)
            .execute(&mut *tx)
            .await;
        renamed.map_err(|error| exists(error, &name))?;
    }
    if let Some(zone) = zone {
        set(&mut tx, found.row.id, ZONE_KEY, Some(&zone)).await?;
        settle_zones(&mut tx).await.map_err(bad)?;
    }
    finish(tx, &id, version).await
}

async fn delete(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let found = one(&mut tx, &id).await?;
    if !found.hosts.is_empty() {
        return Err(ApiError::BadRequest(format!("Cannot delete aggregate {id}. Reason: it has hosts.")));
    }
    sqlx::query("DELETE FROM aggregates WHERE id = $1").bind(found.row.id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::OK)
}

/// `add_host`, `remove_host`, `set_metadata`.
async fn act(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let action = body.as_object().filter(|body| body.len() == 1).and_then(|body| body.keys().next());
    let action = action.cloned().unwrap_or_default();
    if !["add_host", "remove_host", "set_metadata"].contains(&action.as_str()) {
        return Err(ApiError::BadRequest("add_host, remove_host or set_metadata is needed.".into()));
    }
    let mut fields = Fields::open(body, &action, &[])?;
    let mut tx = app.begin().await?;
    let found = one(&mut tx, &id).await?;
    if action == "set_metadata" {
        let metadata = metadata(&mut fields)?;
        fields.finish()?;
        for (key, value) in metadata {
            set(&mut tx, found.row.id, &key, value.as_deref()).await?;
        }
        if one(&mut tx, &id).await?.metadata.len() > MAX_METADATA {
            return Err(ApiError::BadRequest(format!("metadata: an aggregate has {MAX_METADATA} at most.")));
        }
        settle_zones(&mut tx).await.map_err(bad)?;
        return finish(tx, &id, version).await;
    }
    let host = fields.string("host")?;
    let host =
        host.ok_or_else(|| ApiError::BadRequest("Invalid input: 'host' is a required property.".into()))?;
    fields.finish()?;
    change_host(&mut tx, &found, &host, action == "add_host").await?;
    finish(tx, &id, version).await
}

async fn change_host(tx: &mut Conn, found: &Aggregate, host: &str, adds: bool) -> Result<(), ApiError> {
    let id = found.row.id;
    let known: Option<String> = sqlx::query_scalar("SELECT id FROM hosts WHERE name = $1")
        .bind(host)
        .fetch_optional(&mut *tx)
        .await?;
    let there = found.hosts.iter().any(|name| name == host);
    let shown: String = host.chars().take(64).collect();
    let sql = match (known.is_some(), adds, there) {
        (false, true, _) => {
            return Err(ApiError::NotFound(format!("Compute host {shown} could not be found.")));
        }
        (true, true, true) => {
            return Err(ApiError::Conflict(format!("Aggregate {id} already has host {shown}.")));
        }
        (true, true, false) => "INSERT INTO aggregate_hosts (aggregate_id, host_id) VALUES ($1, $2)",
        (true, false, true) => "DELETE FROM aggregate_hosts WHERE aggregate_id = $1 AND host_id = $2",
        (_, false, _) => {
            return Err(ApiError::NotFound(format!("Cannot remove host {shown} in aggregate {id}")));
        }
    };
    sqlx::query(sql).bind(id).bind(known).execute(tx).await?;
    Ok(())
}

/// What to set, and by `null` what to take away.
fn metadata(fields: &mut Fields) -> Result<Vec<(String, Option<String>)>, ApiError> {
    let given = match fields.take("metadata") {
        Some(Value::Object(given)) => given,
        _ => return Err(ApiError::BadRequest("Invalid input: 'metadata' must be an object.".into())),
    };
    let mut metadata = Vec::with_capacity(given.len());
    for (key, value) in given {
        let fits = |text: &str| text.chars().count() <= MAX_TEXT;
        let value = match value {
            Value::Null => None,
            Value::String(text) if fits(&text) && (key != ZONE_KEY || zone_fits(&text)) => Some(text),
            other => {
                return Err(invalid(
                    &key,
                    &other,
                    "is not a text of 255 characters at most (a zone has a name without ':')",
                ));
            }
        };
        if key.is_empty() || !fits(&key) {
            return Err(invalid("metadata", &key.into(), "is not a key of 1 to 255 characters"));
        }
        metadata.push((key, value));
    }
    Ok(metadata)
}

fn zone_fits(text: &str) -> bool {
    !text.is_empty() && text.trim() == text && !text.contains(':')
}

/// Since 2.81: hosts get images when a server needs them, and keep those that were used last.
async fn cache_images(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    one(&mut *app.db.acquire().await?, &id).await?;
    Err(ApiError::NotImplemented("Hosts can't be asked to fetch images before a server needs them.".into()))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    const URL: &str = "/compute/v2.1/os-aggregates";

    struct Cloud {
        test: TestApp,
    }

    impl Cloud {
        async fn new() -> Self {
            let test = TestApp::new().await;
            for (name, zone) in [("h1", "nova"), ("h2", "nova")] {
                fixtures::host(&test.app, name, zone).await;
            }
            Self { test }
        }

        async fn make(&self, name: &str, zone: Value) -> i64 {
            let body = json!({"aggregate": {"name": name, "availability_zone": zone}});
            self.test.post(URL, &self.test.admin_token, body).await.expect(200)["aggregate"]["id"]
                .as_i64()
                .unwrap()
        }

        async fn act(&self, id: i64, action: Value) -> crate::testing::Answer {
            self.test.post(&format!("{URL}/{id}/action"), &self.test.admin_token, action).await
        }

        async fn zone_of(&self, host: &str) -> String {
            let sql = "SELECT availability_zone FROM hosts WHERE name = $1";
            sqlx::query_scalar(sql).bind(host).fetch_one(&self.test.app.db).await.unwrap()
        }
    }

    #[tokio::test]
    async fn an_aggregate_is_made_shown_changed_and_removed() {
        let cloud = Cloud::new().await;
        let (test, admin) = (&cloud.test, &cloud.test.admin_token);
        let body = json!({"aggregate": {"name": " fast ", "availability_zone": "east"}});
        let made = test.post_at(URL, admin, 41, body.clone()).await.expect(200)["aggregate"].take();
        assert_eq!(
            (&made["name"], &made["availability_zone"], &made["deleted"]),
            (&json!("fast"), &json!("east"), &json!(false))
        );
        assert!(made["uuid"].is_string() && made.get("hosts").is_none() && made["updated_at"].is_null());
        test.post(URL, admin, body).await.expect(409);
        let one = format!("{URL}/{}", made["id"]);
        let shown = test.get(&one, admin).await.expect(200)["aggregate"].take();
        assert_eq!(
            (&shown["hosts"], &shown["metadata"]),
            (&json!([]), &json!({"availability_zone": "east"}))
        );
        assert!(shown.get("uuid").is_none());
        let body = json!({"aggregate": {"name": "faster", "availability_zone": "west"}});
        let changed = test.call(Method::PUT, &one, admin, body).await.expect(200);
        assert_eq!(
            (&changed["aggregate"]["name"], &changed["aggregate"]["availability_zone"]),
            (&json!("faster"), &json!("west"))
        );
        for wrong in [
            json!({"aggregate": {}}),
            json!({"aggregate": {"name": ""}}),
            json!({"aggregate": {"name": "x", "host": "y"}}),
            json!({"aggregate": {"name": "x", "availability_zone": "a:b"}}),
            json!({}),
        ] {
            test.post(URL, admin, wrong).await.expect(400);
        }
        assert_eq!(test.get(URL, admin).await.expect(200)["aggregates"].as_array().unwrap().len(), 1);
        test.delete(&one, admin).await.expect(200);
        test.get(&one, admin).await.expect(404);
        test.get(&format!("{URL}/x"), admin).await.expect(404);
    }

    #[tokio::test]
    async fn hosts_come_and_go_and_the_zone_follows() {
        let cloud = Cloud::new().await;
        let (east, west) = (cloud.make("a", json!("east")).await, cloud.make("b", json!("west")).await);
        let plain = cloud.make("c", Value::Null).await;
        let shown = cloud.act(east, json!({"add_host": {"host": "h1"}})).await.expect(200);
        assert_eq!(shown["aggregate"]["hosts"], json!(["h1"]));
        assert_eq!(cloud.zone_of("h1").await, "east");
        cloud.act(east, json!({"add_host": {"host": "h1"}})).await.expect(409);
        cloud.act(east, json!({"add_host": {"host": "none"}})).await.expect(404);
        // In one zone only, but in any number of aggregates.
        cloud.act(west, json!({"add_host": {"host": "h1"}})).await.expect(409);
        cloud.act(plain, json!({"add_host": {"host": "h1"}})).await.expect(200);
        cloud
            .act(plain, json!({"set_metadata": {"metadata": {"availability_zone": "west"}}}))
            .await
            .expect(400);
        let (test, admin) = (&cloud.test, &cloud.test.admin_token);
        test.delete(&format!("{URL}/{east}"), admin).await.expect(400);
        let zones = test.get("/compute/v2.1/os-availability-zone", admin).await.expect(200);
        let names: Vec<&Value> =
            zones["availabilityZoneInfo"].as_array().unwrap().iter().map(|z| &z["zoneName"]).collect();
        assert_eq!(names, ["east", "nova"]);
        cloud.act(east, json!({"remove_host": {"host": "h1"}})).await.expect(200);
        cloud.act(east, json!({"remove_host": {"host": "h1"}})).await.expect(404);
        assert_eq!(cloud.zone_of("h1").await, "nova");
    }

    #[tokio::test]
    async fn a_host_with_servers_stays_in_its_zone() {
        let cloud = Cloud::new().await;
        let east = cloud.make("a", json!("east")).await;
        let host: String = sqlx::query_scalar("SELECT id FROM hosts WHERE name = 'h2'")
            .fetch_one(&cloud.test.app.db)
            .await
            .unwrap();
        fixtures::server(&cloud.test.app, "p", Some(&host), "active").await;
        cloud.act(east, json!({"add_host": {"host": "h2"}})).await.expect(409);
        let plain = cloud.make("b", Value::Null).await;
        cloud.act(plain, json!({"add_host": {"host": "h2"}})).await.expect(200);
        cloud.act(plain, json!({"set_metadata": {"metadata": {"availability_zone": "x"}}})).await.expect(400);
        cloud.act(plain, json!({"set_metadata": {"metadata": {"ssd": "true"}}})).await.expect(200);
        assert_eq!(cloud.zone_of("h2").await, "nova");
    }

    #[tokio::test]
    async fn metadata_is_merged_and_taken_away_by_null() {
        let cloud = Cloud::new().await;
        let id = cloud.make("a", Value::Null).await;
        let set = |metadata: Value| json!({"set_metadata": {"metadata": metadata}});
        cloud.act(id, set(json!({"ssd": "true", "gpu": "no"}))).await.expect(200);
        let shown =
            cloud.act(id, set(json!({"gpu": null, "rack": "7", "availability_zone": "z"}))).await.expect(200);
        assert_eq!(
            shown["aggregate"]["metadata"],
            json!({"ssd": "true", "rack": "7", "availability_zone": "z"})
        );
        assert_eq!(shown["aggregate"]["availability_zone"], "z");
        for wrong in [json!({"a": 1}), json!({"": "x"}), json!({"availability_zone": ""}), json!("x")] {
            cloud.act(id, set(wrong)).await.expect(400);
        }
        cloud.act(id, json!({"rename": {}})).await.expect(400);
    }
}
