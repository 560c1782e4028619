//! `os-simple-tenant-usage`: how long servers were there within a period, times what they were given.
//!
//! A server counts from its launch (one that never ran counts nothing) to its deletion, as in Nova also while it is stopped.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use jiff::{civil::DateTime, tz::TimeZone};
use serde_json::{Value, json};
use sqlx::FromRow;

use super::versions::Version;
use crate::{
    app::App,
    db::{now_us, rfc3339_us},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Most servers in one answer: a longer period must be asked in parts.
const MAX_SERVERS: usize = 100_000;

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-simple-tenant-usage", get(list))
        .route("/os-simple-tenant-usage/{project}", get(show))
}

#[derive(Debug, FromRow)]
struct Row {
    server_id: String,
    project_id: String,
    name: String,
    flavor_name: String,
    vcpus: i64,
    memory_mib: i64,
    disk_gib: i64,
    started_us: i64,
    ended_us: Option<i64>,
    state: String,
}

/// µs since 1970, UTC.
#[derive(Debug, Clone, Copy)]
struct Period {
    start: i64,
    end: i64,
    now: i64,
}

impl Period {
    fn parse(params: &Params) -> Result<Self, ApiError> {
        let now = now_us();
        let time = |name: &str| -> Result<i64, ApiError> {
            let Some(text) = params.get(name) else { return Ok(now) };
            let bad = || {
                ApiError::BadRequest(format!("{name}: must be a time in UTC such as 2026-11-23T03:00:00."))
            };
            let time: DateTime = text.parse().map_err(|_| bad())?;
            Ok(time.to_zoned(TimeZone::UTC).map_err(|_| bad())?.timestamp().as_microsecond())
        };
        let (start, end) = (time("start")?, time("end")?);
        match start > end {
            true => Err(ApiError::BadRequest(
                "Invalid start time. The start time cannot occur after the end time.".into(),
            )),
            false => Ok(Self { start, end, now }),
        }
    }

    /// How long a server was there within the period, hours.
    fn hours(&self, row: &Row) -> f64 {
        let end = row.ended_us.unwrap_or(self.now).min(self.end);
        let us = end.saturating_sub(row.started_us.max(self.start)).max(0);
        us as f64 / 3_600_000_000.0
    }
}

fn time(us: i64) -> String {
    rfc3339_us(us).trim_end_matches('Z').to_owned()
}

async fn rows(app: &App, project: Option<&str>, period: Period) -> Result<Vec<Row>, ApiError> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT id AS server_id, project_id, name, flavor_name, vcpus, memory_mib, disk_gib + ephemeral_gib AS disk_gib,
             launched_us AS started_us,
             NULL AS ended_us, vm_state AS state
         FROM servers WHERE launched_us <= $2 AND ($1 IS NULL OR project_id = $1)
         UNION ALL
         SELECT server_id, project_id, name, flavor_name, vcpus, memory_mib, disk_gib, started_us, ended_us,
             'terminated' AS state
         FROM server_usage WHERE started_us <= $2 AND ended_us >= $3 AND ($1 IS NULL OR project_id = $1)
         ORDER BY started_us, server_id LIMIT $4",
    )
    .bind(project)
    .bind(period.end)
    .bind(period.start)
    .bind(i64::try_from(MAX_SERVERS + 1).unwrap_or(i64::MAX))
    .fetch_all(&app.db)
    .await?;
    match rows.len() > MAX_SERVERS {
        true => {
            Err(ApiError::BadRequest(format!("More than {MAX_SERVERS} servers: ask for a shorter period.")))
        }
        false => Ok(rows),
    }
}

fn server_usage(row: &Row, period: Period) -> Value {
    let until = row.ended_us.unwrap_or(period.now);
    json!({
        "instance_id": row.server_id,
        "tenant_id": row.project_id,
        "name": row.name,
        "flavor": row.flavor_name,
        "vcpus": row.vcpus,
        "memory_mb": row.memory_mib,
        "local_gb": row.disk_gib,
        "hours": period.hours(row),
        "started_at": time(row.started_us),
        "ended_at": row.ended_us.map(time),
        "state": row.state,
        "uptime": until.saturating_sub(row.started_us).max(0) / 1_000_000,
    })
}

fn document(project: &str, rows: &[Row], period: Period, detailed: bool) -> Value {
    let sum = |factor: fn(&Row) -> i64| -> f64 {
        rows.iter().map(|row| period.hours(row) * factor(row) as f64).sum::<f64>() + 0.0
    };
    let mut document = json!({
        "tenant_id": project,
        "start": time(period.start),
        "stop": time(period.end),
        "total_hours": sum(|_| 1),
        "total_vcpus_usage": sum(|row| row.vcpus),
        "total_memory_mb_usage": sum(|row| row.memory_mib),
        "total_local_gb_usage": sum(|row| row.disk_gib),
    });
    if detailed {
        document["server_usages"] = rows.iter().map(|row| server_usage(row, period)).collect();
    }
    document
}

/// Since 2.40 an answer is a page of servers; gives the query of the next one.
fn page(rows: &mut Vec<Row>, version: Version, params: &Params) -> Result<Option<String>, ApiError> {
    if !version.has(40) {
        return Ok(None);
    }
    if let Some(marker) = params.get("marker") {
        let at = rows.iter().position(|row| row.server_id == marker);
        let at = at.ok_or_else(|| ApiError::BadRequest("marker not found".into()))?;
        rows.drain(..=at);
    }
    let limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    let Some(last) = rows.last().filter(|_| more) else { return Ok(None) };
    let mut query = format!("limit={limit}&marker={}", last.server_id);
    for name in ["start", "end", "detailed"] {
        if let Some(value) = params.get(name) {
            query.push_str(&format!("&{name}={}", value.replace(' ', "+")));
        }
    }
    Ok(Some(query))
}

fn links(app: &App, path: &str, next: &str) -> Value {
    let href = format!("{}/compute/v2.1/os-simple-tenant-usage{path}?{next}", app.config.public_url);
    json!([{"rel": "next", "href": href}])
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let period = Period::parse(&params)?;
    let mut projects = BTreeMap::<String, Vec<Row>>::new();
    let mut rows = rows(&app, None, period).await?;
    let next = page(&mut rows, version, &params)?;
    for row in rows {
        projects.entry(row.project_id.clone()).or_default().push(row);
    }
    let detailed = params.get("detailed") == Some("1");
    let usages: Vec<Value> =
        projects.iter().map(|(project, rows)| document(project, rows, period, detailed)).collect();
    let mut answer = json!({ "tenant_usages": usages });
    if let Some(next) = next {
        answer["tenant_usages_links"] = links(&app, "", &next);
    }
    Ok(Json(answer))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(project): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    if !ctx.is_admin && ctx.require_project()? != project {
        return Err(ApiError::Forbidden("Only an admin can see the usage of other projects.".into()));
    }
    let period = Period::parse(&params)?;
    let mut rows = rows(&app, Some(&project), period).await?;
    let next = page(&mut rows, version, &params)?;
    // Nova shows nothing at all of a project without servers.
    let mut answer = match rows.is_empty() {
        true => json!({"tenant_usage": {}}),
        false => json!({"tenant_usage": document(&project, &rows, period, true)}),
    };
    if let Some(next) = next {
        answer["tenant_usage_links"] = links(&app, &format!("/{project}"), &next);
    }
    Ok(Json(answer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    const URL: &str = "/compute/v2.1/os-simple-tenant-usage";

    #[tokio::test]
    async fn usage_counts_servers_that_are_there_and_that_are_gone() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "reader").await;
        let host = fixtures::host(&test.app, "h1", "nova").await;
        fixtures::server(&test.app, &project, Some(&host), "active").await;
        fixtures::server(&test.app, &project, None, "error").await;
        let mut tx = test.app.begin().await.unwrap();
        sqlx::query("INSERT INTO server_usage VALUES ('gone', $1, 'g', 'f', 4, 1024, 8, 0, 7200000000)")
            .bind(&project)
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        // The second of its two hours.
        let path = format!("{URL}/{project}?start=1970-01-01T01:00:00&end=1970-01-02T00:00:00.000000");
        let usage = test.get(&path, &token).await.expect(200)["tenant_usage"].take();
        assert_eq!(
            (&usage["total_hours"], &usage["total_vcpus_usage"], &usage["total_memory_mb_usage"]),
            (&json!(1.0), &json!(4.0), &json!(1024.0))
        );
        assert_eq!(usage["server_usages"][0]["ended_at"], "1970-01-01T02:00:00.000000");
        let path = format!("{URL}?start=1970-01-01T00:00:00");
        test.get(&path, &token).await.expect(403);
        let all = test.get(&path, &test.admin_token).await.expect(200);
        let hours = all["tenant_usages"][0]["total_hours"].as_f64().unwrap();
        assert!(hours >= 3.0, "{hours}");
        assert!(all["tenant_usages"][0]["server_usages"].is_null());
        test.get(&format!("{URL}/other"), &token).await.expect(403);
        // Pages of servers since 2.40.
        let path = format!("{URL}/{project}?start=1970-01-01T00:00:00&limit=1");
        let page = test.get_at(&path, &token, 40).await.expect(200);
        assert_eq!(page["tenant_usage"]["server_usages"].as_array().unwrap().len(), 1);
        let next = page["tenant_usage_links"][0]["href"].as_str().unwrap().split_once(":8774").unwrap().1;
        let rest = test.get_at(next, &token, 40).await.expect(200);
        assert_eq!(rest["tenant_usage"]["server_usages"].as_array().unwrap().len(), 1);
        assert!(rest["tenant_usage_links"].is_null());
        for query in ["start=x", "start=2026-01-02T00:00:00&end=2026-01-01T00:00:00"] {
            test.get(&format!("{URL}/{project}?{query}"), &token).await.expect(400);
        }
    }
}
