//! `os-services`: one `nova-compute` for each host. For admins.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, put},
};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::FromRow;

use crate::{
    app::App,
    db::rfc3339_us,
    hosts::is_up,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// The only kind of service.
const BINARY: &str = "nova-compute";
/// Longest reason, as in Nova.
const MAX_REASON: usize = 255;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/os-services", get(list)).route("/os-services/{action}", put(change))
}

#[derive(Debug, FromRow)]
struct Row {
    number: i64,
    name: String,
    availability_zone: String,
    enabled: bool,
    disabled_reason: Option<String>,
    last_seen_us: i64,
}

async fn list(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let sql = "SELECT number, name, availability_zone, enabled, disabled_reason, last_seen_us FROM hosts ORDER BY number";
    let rows: Vec<Row> = sqlx::query_as(sql).fetch_all(&app.db).await?;
    let wanted = |row: &Row| {
        params.get("host").is_none_or(|host| host == row.name)
            && params.get("binary").is_none_or(|binary| binary == BINARY)
    };
    let document = |row: &Row| {
        json!({
            "id": row.number,
            "binary": BINARY,
            "host": row.name,
            "zone": row.availability_zone,
            "status": if row.enabled { "enabled" } else { "disabled" },
            "state": if is_up(row.last_seen_us) { "up" } else { "down" },
            "disabled_reason": row.disabled_reason,
            "updated_at": rfc3339_us(row.last_seen_us).trim_end_matches('Z'),
        })
    };
    let services: Vec<Value> = rows.iter().filter(|row| wanted(row)).map(document).collect();
    Ok(Json(json!({"services": services})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    host: String,
    binary: String,
    disabled_reason: Option<String>,
}

/// `PUT os-services/{enable,disable,disable-log-reason}`: whether the scheduler may choose the host.
async fn change(
    State(app): State<App>,
    ctx: Ctx,
    Path(action): Path<String>,
    JsonBody(change): JsonBody<Change>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let (enabled, reason) = match (action.as_str(), change.disabled_reason) {
        ("enable", None) => (true, None),
        ("disable", None) => (false, None),
        ("disable-log-reason", Some(reason)) => (false, Some(reason)),
        ("enable" | "disable", Some(_)) => {
            return Err(ApiError::BadRequest("disabled_reason: belongs to disable-log-reason.".into()));
        }
        ("disable-log-reason", None) => {
            return Err(ApiError::BadRequest("disabled_reason: is required.".into()));
        }
        _ => return Err(ApiError::NotFound("Unknown action".into())),
    };
    if reason.as_ref().is_some_and(|reason| reason.trim().is_empty() || reason.len() > MAX_REASON) {
        return Err(ApiError::BadRequest(format!("disabled_reason: must have 1 to {MAX_REASON} bytes.")));
    }
    if change.binary != BINARY {
        return Err(ApiError::NotFound(format!(
            "Could not find binary {} on host {}.",
            change.binary, change.host
        )));
    }
    let mut tx = app.begin().await?;
    let known = sqlx::query("UPDATE hosts SET enabled = $2, disabled_reason = $3 WHERE name = $1")
        .bind(&change.host)
        .bind(enabled)
        .bind(&reason)
        .execute(&mut *tx)
        .await?;
    if known.rows_affected() == 0 {
        return Err(ApiError::NotFound(format!("Compute host {} could not be found.", change.host)));
    }
    tx.commit().await?;
    let status = if enabled { "enabled" } else { "disabled" };
    let mut service = json!({"host": change.host, "binary": BINARY, "status": status});
    if let Some(reason) = reason {
        service["disabled_reason"] = json!(reason);
    }
    Ok(Json(json!({"service": service})))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    #[tokio::test]
    async fn each_host_has_a_service_that_admins_enable_and_disable() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let admin = &test.admin_token;
        let url = "/compute/v2.1/os-services";
        fixtures::host(&test.app, "h1", "nova").await;
        fixtures::host(&test.app, "h2", "nova").await;
        test.get(url, &token).await.expect(403);
        let body = json!({"host": "h1", "binary": "nova-compute", "disabled_reason": "disk"});
        let path = format!("{url}/disable-log-reason");
        test.call(Method::PUT, &path, &token, body.clone()).await.expect(403);
        test.call(Method::PUT, &path, admin, body.clone()).await.expect(200);
        let list = test.get(url, admin).await.expect(200);
        let service = &list["services"][0];
        assert_eq!(
            (&service["host"], &service["status"], &service["state"], &service["disabled_reason"]),
            (&json!("h1"), &json!("disabled"), &json!("up"), &json!("disk"))
        );
        let one = test.get(&format!("{url}?host=h2"), admin).await.expect(200);
        assert_eq!(
            (one["services"].as_array().unwrap().len(), &one["services"][0]["status"]),
            (1, &json!("enabled"))
        );
        test.call(Method::PUT, &format!("{url}/enable"), admin, body).await.expect(400);
        let body = json!({"host": "h1", "binary": "nova-compute"});
        test.call(Method::PUT, &format!("{url}/enable"), admin, body).await.expect(200);
        assert_eq!(test.get(url, admin).await.expect(200)["services"][0]["disabled_reason"], Value::Null);
        let body = json!({"host": "h3", "binary": "nova-compute"});
        test.call(Method::PUT, &format!("{url}/disable"), admin, body).await.expect(404);
    }
}
