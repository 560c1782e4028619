//! `os-hypervisors`: hosts, what they have, and what their servers use. For admins.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use serde_json::{Map, Value, json};
use sqlx::FromRow;

use super::versions::Version;
use crate::{
    app::App,
    hosts::is_up,
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-hypervisors", get(list))
        .route("/os-hypervisors/detail", get(detail))
        .route("/os-hypervisors/statistics", get(statistics))
        .route("/os-hypervisors/{id}", get(show))
        .route("/os-hypervisors/{id}/uptime", get(uptime))
        .route("/os-hypervisors/{pattern}/search", get(search))
        .route("/os-hypervisors/{pattern}/servers", get(servers))
}

#[derive(Debug, FromRow)]
struct Row {
    id: String,
    number: i64,
    name: String,
    enabled: bool,
    disabled_reason: Option<String>,
    vcpus: i64,
    memory_mib: i64,
    disk_gib: i64,
    version: String,
    last_seen_us: i64,
    vcpus_used: i64,
    memory_used: i64,
    disk_used: i64,
    running: i64,
    busy: i64,
}

impl Row {
    fn is_up(&self) -> bool {
        is_up(self.last_seen_us)
    }

    fn brief(&self, version: Version) -> Value {
        json!({
            "id": if version.has(53) { json!(self.id) } else { json!(self.number) },
            "hypervisor_hostname": self.name,
            "state": if self.is_up() { "up" } else { "down" },
            "status": if self.enabled { "enabled" } else { "disabled" },
        })
    }

    fn document(&self, version: Version) -> Value {
        let mut document = self.brief(version);
        let mut more = json!({
            "vcpus": self.vcpus,
            "vcpus_used": self.vcpus_used,
            "memory_mb": self.memory_mib,
            "memory_mb_used": self.memory_used,
            "free_ram_mb": self.memory_mib - self.memory_used,
            "local_gb": self.disk_gib,
            "local_gb_used": self.disk_used,
            "free_disk_gb": self.disk_gib - self.disk_used,
            "disk_available_least": null, // hosts report their size only
            "running_vms": self.running,
            "current_workload": self.busy,
            "hypervisor_type": "mote-vmm",
            "hypervisor_version": version_number(&self.version),
            "cpu_info": if version.has(28) { json!({}) } else { json!("") },
            "host_ip": null, // a host is not reached: it asks
            "service": {
                "id": if version.has(53) { json!(self.id) } else { json!(self.number) },
                "host": self.name, "disabled_reason": self.disabled_reason,
            },
        });
        if version.has(88) {
            for name in SUMS.iter().chain(&["cpu_info", "disk_available_least"]) {
                more.as_object_mut().map(|more| more.remove(*name));
            }
            more["uptime"] = Value::Null; // hosts do not report it
        }
        if let (Some(document), Value::Object(more)) = (document.as_object_mut(), more) {
            document.extend(more);
        }
        document
    }
}

/// Nova's integer: 1002003 for 1.2.3.
fn version_number(version: &str) -> i64 {
    let part = |text: &str| -> i64 {
        let digits: String = text.chars().take_while(char::is_ascii_digit).take(3).collect();
        digits.parse().unwrap_or(0)
    };
    let mut parts = version.split('.').map(part);
    let mut next = || parts.next().unwrap_or(0);
    next() * 1_000_000 + next() * 1_000 + next()
}

async fn rows(app: &App, ctx: &Ctx) -> Result<Vec<Row>, ApiError> {
    ctx.require_admin()?;
    let sql =
        "SELECT h.id, h.number, h.name, h.enabled, h.disabled_reason, h.vcpus, h.memory_mib, h.disk_gib,
            h.version, h.last_seen_us,
            CAST(COALESCE(SUM(s.vcpus), 0) AS BIGINT) AS vcpus_used,
            CAST(COALESCE(SUM(s.memory_mib), 0) AS BIGINT) AS memory_used,
            CAST(COALESCE(SUM(s.disk_claim_gib), 0) AS BIGINT) AS disk_used,
            COUNT(CASE WHEN s.vm_state = 'active' THEN 1 END) AS running,
            COUNT(s.task_state) AS busy
        FROM hosts h LEFT JOIN servers s ON s.host_id = h.id GROUP BY h.id ORDER BY h.number";
    Ok(sqlx::query_as(sql).fetch_all(&app.db).await?)
}

fn not_found(id: &str) -> ApiError {
    ApiError::NotFound(format!("Hypervisor with ID '{id}' could not be found."))
}

/// By Nova's number, since 2.53 by the host's UUID; both are always taken.
async fn one(app: &App, ctx: &Ctx, id: &str) -> Result<Row, ApiError> {
    let rows = rows(app, ctx).await?;
    let is_it = |row: &Row| row.id == id || row.number.to_string() == id;
    rows.into_iter().find(is_it).ok_or_else(|| not_found(id))
}

/// What is wanted of the list since 2.53 (pattern, servers) and 2.33 (pages).
async fn page(
    app: &App,
    ctx: &Ctx,
    version: Version,
    params: &Params,
) -> Result<(Vec<Row>, Option<String>), ApiError> {
    // Also where there is no host that it would be asked of.
    if version.has(53) {
        params.boolean("with_servers")?;
    }
    let mut rows = match params.get("hypervisor_hostname_pattern").filter(|_| version.has(53)) {
        Some(pattern) => matching(app, ctx, pattern).await?,
        None => rows(app, ctx).await?,
    };
    if !version.has(33) {
        return Ok((rows, None));
    }
    let key = |row: &Row| if version.has(53) { row.id.clone() } else { row.number.to_string() };
    if let Some(marker) = params.get("marker") {
        let at = rows.iter().position(|row| key(row) == marker);
        let at = at.ok_or_else(|| ApiError::BadRequest(format!("marker [{marker}] not found")))?;
        rows.drain(..=at);
    }
    let limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = rows.last().filter(|_| more).map(|last| format!("limit={limit}&marker={}", key(last)));
    Ok((rows, next))
}

fn answer(app: &App, hypervisors: Vec<Value>, path: &str, next: Option<String>) -> Json<Value> {
    let mut answer = json!({ "hypervisors": hypervisors });
    if let Some(next) = next {
        let href = format!("{}/compute/v2.1/{path}?{next}", app.config.public_url);
        answer["hypervisors_links"] = json!([{"rel": "next", "href": href}]);
    }
    Json(answer)
}

/// The servers of a host, if they are asked for.
async fn with_servers(
    app: &App,
    version: Version,
    params: &Params,
    row: &Row,
    mut document: Value,
) -> Result<Value, ApiError> {
    if version.has(53) && params.boolean("with_servers")? == Some(true) {
        let servers = servers_of(app, row).await?;
        if version.has(75) || !servers.is_empty() {
            document["servers"] = servers.into();
        }
    }
    Ok(document)
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (rows, next) = page(&app, &ctx, version, &params).await?;
    let mut documents = Vec::new();
    for row in &rows {
        documents.push(with_servers(&app, version, &params, row, row.brief(version)).await?);
    }
    Ok(answer(&app, documents, "os-hypervisors", next))
}

async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (rows, next) = page(&app, &ctx, version, &params).await?;
    let mut documents = Vec::new();
    for row in &rows {
        documents.push(with_servers(&app, version, &params, row, row.document(version)).await?);
    }
    Ok(answer(&app, documents, "os-hypervisors/detail", next))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let row = one(&app, &ctx, &id).await?;
    let document = with_servers(&app, version, &params, &row, row.document(version)).await?;
    Ok(Json(json!({ "hypervisor": document })))
}

/// Until 2.87, and then as Nova's drivers that don't know it.
async fn uptime(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    until(version, 87)?;
    one(&app, &ctx, &id).await?;
    Err(ApiError::NotImplemented("Hosts do not report their uptime.".into()))
}

/// Routes that a later microversion took away.
fn until(version: Version, last: u16) -> Result<(), ApiError> {
    match version.has(last + 1) {
        true => Err(ApiError::NotFound("The resource could not be found.".into())),
        false => Ok(()),
    }
}

async fn matching(app: &App, ctx: &Ctx, pattern: &str) -> Result<Vec<Row>, ApiError> {
    let mut rows = rows(app, ctx).await?;
    rows.retain(|row| row.name.contains(pattern));
    match rows.is_empty() {
        true => {
            let pattern: String = pattern.chars().take(64).collect();
            Err(ApiError::NotFound(format!("No hypervisor matching '{pattern}' could be found.")))
        }
        false => Ok(rows),
    }
}

async fn search(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(pattern): Path<String>,
) -> Result<Json<Value>, ApiError> {
    until(version, 52)?;
    let rows = matching(&app, &ctx, &pattern).await?;
    Ok(Json(json!({"hypervisors": rows.iter().map(|row| row.brief(version)).collect::<Vec<_>>()})))
}

async fn servers_of(app: &App, row: &Row) -> Result<Vec<Value>, ApiError> {
    let sql = "SELECT id FROM servers WHERE host_id = $1 ORDER BY created_us, id";
    let ids: Vec<String> = sqlx::query_scalar(sql).bind(&row.id).fetch_all(&app.db).await?;
    Ok(ids.iter().map(|id| json!({"uuid": id, "name": id})).collect())
}

async fn servers(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(pattern): Path<String>,
) -> Result<Json<Value>, ApiError> {
    until(version, 52)?;
    let mut hypervisors = Vec::new();
    for row in matching(&app, &ctx, &pattern).await? {
        let mut document = row.brief(version);
        let servers = servers_of(&app, &row).await?;
        if !servers.is_empty() {
            document["servers"] = servers.into();
        }
        hypervisors.push(document);
    }
    Ok(Json(json!({"hypervisors": hypervisors})))
}

/// What [`statistics`] adds up; gone with it from 2.88 on.
const SUMS: [&str; 10] = [
    "vcpus",
    "vcpus_used",
    "memory_mb",
    "memory_mb_used",
    "free_ram_mb",
    "local_gb",
    "local_gb_used",
    "free_disk_gb",
    "running_vms",
    "current_workload",
];

/// Sums over the enabled hosts.
async fn statistics(State(app): State<App>, ctx: Ctx, version: Version) -> Result<Json<Value>, ApiError> {
    until(version, 87)?;
    let documents: Vec<Value> =
        rows(&app, &ctx).await?.iter().filter(|row| row.enabled).map(|row| row.document(version)).collect();
    let mut sums = Map::new();
    for name in SUMS {
        let sum: i64 = documents.iter().filter_map(|document| document[name].as_i64()).sum();
        sums.insert(name.into(), sum.into());
    }
    sums.insert("count".into(), documents.len().into());
    sums.insert("disk_available_least".into(), Value::Null);
    Ok(Json(json!({"hypervisor_statistics": sums})))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    const URL: &str = "/compute/v2.1/os-hypervisors";

    #[tokio::test]
    async fn admins_see_what_hosts_have_and_their_servers_use() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let admin = &test.admin_token;
        let host = fixtures::host(&test.app, "h1", "nova").await;
        fixtures::host(&test.app, "h2", "nova").await;
        fixtures::server(&test.app, "p", Some(&host), "active").await;
        let stopped = fixtures::server(&test.app, "p", Some(&host), "stopped").await;
        for path in ["", "/detail", "/statistics", "/1"] {
            test.get(&format!("{URL}{path}"), &token).await.expect(403);
        }
        let list = test.get(URL, admin).await.expect(200);
        let expected = json!({"id": 1, "hypervisor_hostname": "h1", "state": "up", "status": "enabled"});
        assert_eq!((list["hypervisors"].as_array().unwrap().len(), &list["hypervisors"][0]), (2, &expected));
        let shown = test.get(&format!("{URL}/1"), admin).await.expect(200)["hypervisor"].take();
        for (name, value) in [
            ("vcpus", 8),
            ("vcpus_used", 4),
            ("memory_mb", 16384),
            ("memory_mb_used", 1024),
            ("free_ram_mb", 15360),
            ("local_gb", 100),
            ("local_gb_used", 10),
            ("free_disk_gb", 90),
            ("running_vms", 1),
            ("current_workload", 0),
            ("hypervisor_version", 2001),
        ] {
            assert_eq!(shown[name], json!(value), "{name}");
        }
        let detail = test.get(&format!("{URL}/detail"), admin).await.expect(200);
        assert_eq!(detail["hypervisors"][0], shown);
        let sums = test.get(&format!("{URL}/statistics"), admin).await.expect(200);
        assert_eq!(sums["hypervisor_statistics"]["vcpus"], 16);
        assert_eq!(sums["hypervisor_statistics"]["count"], 2);
        let found = test.get(&format!("{URL}/h1/servers"), admin).await.expect(200);
        let servers = found["hypervisors"][0]["servers"].as_array().unwrap();
        assert!(servers.iter().any(|server| server["uuid"] == json!(stopped)), "{found}");
        test.get(&format!("{URL}/nothing/search"), admin).await.expect(404);
        test.get(&format!("{URL}/9"), admin).await.expect(404);
        test.get(&format!("{URL}/1/uptime"), admin).await.expect(501);
        // Later microversions.
        let page = test.get_at(&format!("{URL}?limit=1"), admin, 53).await.expect(200);
        assert_eq!(page["hypervisors"][0]["id"], json!(host));
        let next =
            page["hypervisors_links"][0]["href"].as_str().unwrap().split_once(":8774").unwrap().1.to_owned();
        let rest = test.get_at(&next, admin, 53).await.expect(200);
        assert_eq!(rest["hypervisors"][0]["hypervisor_hostname"], "h2");
        let path = format!("{URL}/{host}?with_servers=true");
        let shown = test.get_at(&path, admin, 88).await.expect(200)["hypervisor"].take();
        assert_eq!((shown["servers"].as_array().unwrap().len(), &shown["service"]["id"]), (2, &json!(host)));
        assert!(shown["vcpus"].is_null() && shown["uptime"].is_null());
        let found = test.get_at(&format!("{URL}?hypervisor_hostname_pattern=2"), admin, 53).await.expect(200);
        assert_eq!(found["hypervisors"].as_array().unwrap().len(), 1);
        test.get_at(&format!("{URL}/h1/search"), admin, 53).await.expect(404);
        test.get_at(&format!("{URL}/statistics"), admin, 88).await.expect(404);
        test.get_at(&format!("{URL}/{host}/uptime"), admin, 88).await.expect(404);
    }
}
