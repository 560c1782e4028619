//! `os-services`: one `nova-compute` for each host. For admins.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, put},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::FromRow;

use super::{servers::input::Fields, versions::Version};
use crate::{
    app::App,
    db::{Conn, rfc3339_us},
    hosts::{self, is_up},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// The only kind of service.
const BINARY: &str = "nova-compute";
/// Longest reason, as in Nova.
const MAX_REASON: usize = 255;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/os-services", get(list)).route("/os-services/{action}", put(change).delete(delete))
}

#[derive(Debug, FromRow)]
struct Row {
    id: String,
    number: i64,
    name: String,
    availability_zone: String,
    enabled: bool,
    disabled_reason: Option<String>,
    last_seen_us: i64,
}

impl Row {
    fn document(&self, version: Version) -> Value {
        let mut document = json!({
            "id": if version.has(53) { json!(self.id) } else { json!(self.number) },
            "binary": BINARY,
            "host": self.name,
            "zone": self.availability_zone,
            "status": if self.enabled { "enabled" } else { "disabled" },
            "state": if is_up(self.last_seen_us) { "up" } else { "down" },
            "disabled_reason": self.disabled_reason,
            "updated_at": rfc3339_us(self.last_seen_us).trim_end_matches('Z'),
        });
        if version.has(11) {
            // A host that does not report is down, and nobody need say so.
            document["forced_down"] = json!(false);
        }
        document
    }
}

async fn rows(conn: &mut Conn) -> Result<Vec<Row>, ApiError> {
    let sql = "SELECT id, number, name, availability_zone, enabled, disabled_reason, last_seen_us FROM hosts
         ORDER BY number";
    Ok(sqlx::query_as(sql).fetch_all(conn).await?)
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let rows = rows(&mut *app.db.acquire().await?).await?;
    let wanted = |row: &Row| {
        params.get("host").is_none_or(|host| host == row.name)
            && params.get("binary").is_none_or(|binary| binary == BINARY)
    };
    let services: Vec<Value> =
        rows.iter().filter(|row| wanted(row)).map(|row| row.document(version)).collect();
    Ok(Json(json!({"services": services})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    host: String,
    binary: String,
    disabled_reason: Option<String>,
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::NotFound(format!("Service {id} could not be found."))
}

/// Since 2.53: `PUT os-services/{id}` with `status`, `disabled_reason`.
async fn change_by_id(app: &App, version: Version, id: &str, body: Value) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::open(json!({ "service": body }), "service", &[])?;
    let status = fields.string("status")?;
    let reason = fields.string("disabled_reason")?;
    fields.only("forced_down", &[false.into()])?;
    fields.finish()?;
    let enabled = match status.as_deref() {
        Some("enabled") if reason.is_none() => true,
        Some("disabled") => false,
        Some("enabled") => {
            return Err(ApiError::BadRequest(
                "Specifying 'disabled_reason' when status is 'enabled' is invalid.".into(),
            ));
        }
        Some(_) => return Err(ApiError::BadRequest("status: must be enabled or disabled.".into())),
        None => return Err(ApiError::BadRequest("No updates were requested: status is missing.".into())),
    };
    check_reason(reason.as_deref())?;
    let mut tx = app.begin().await?;
    sqlx::query("UPDATE hosts SET enabled = $2, disabled_reason = $3 WHERE id = $1")
        .bind(id)
        .bind(enabled)
        .bind(&reason)
        .execute(&mut *tx)
        .await?;
    let row = rows(&mut tx).await?.into_iter().find(|row| row.id == id).ok_or_else(|| not_found(id))?;
    tx.commit().await?;
    Ok(Json(json!({"service": row.document(version)})))
}

fn check_reason(reason: Option<&str>) -> Result<(), ApiError> {
    match reason.is_some_and(|reason| reason.trim().is_empty() || reason.len() > MAX_REASON) {
        true => Err(ApiError::BadRequest(format!("disabled_reason: must have 1 to {MAX_REASON} bytes."))),
        false => Ok(()),
    }
}

/// A host without servers leaves the cloud.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    let row = rows(&mut tx).await?.into_iter().find(|row| row.id == id || row.number.to_string() == id);
    let row = row.ok_or_else(|| not_found(&id))?;
    hosts::remove(&mut tx, &row.id).await?;
    tx.commit().await?;
    app.hub.forget(row.id.parse().map_err(ApiError::internal)?);
    Ok(StatusCode::NO_CONTENT)
}

/// `PUT os-services/{enable,disable,disable-log-reason}`: whether the scheduler may choose the host.
async fn change(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(action): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    if version.has(53) {
        return change_by_id(&app, version, &action, body).await;
    }
    let change: Change = serde_json::from_value(body)
        .map_err(|error| ApiError::BadRequest(format!("Invalid input: {error}.")))?;
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
    check_reason(reason.as_deref())?;
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
        // Since 2.53 by id.
        let list = test.get_at(url, admin, 53).await.expect(200);
        let path = format!("{url}/{}", list["services"][0]["id"].as_str().unwrap());
        assert_eq!(list["services"][0]["forced_down"], false);
        let body = json!({"status": "disabled", "disabled_reason": "disk"});
        let changed = test.call_at(Method::PUT, &path, admin, 53, body.clone()).await.expect(200);
        assert_eq!(changed["service"]["disabled_reason"], "disk");
        test.call_at(Method::PUT, &format!("{url}/none"), admin, 53, body).await.expect(404);
        let body = json!({"status": "enabled", "disabled_reason": "disk"});
        test.call_at(Method::PUT, &path, admin, 53, body).await.expect(400);
        test.call_at(Method::PUT, &path, admin, 53, json!({"forced_down": true})).await.expect(400);
        test.delete(&path, &token).await.expect(403);
        test.delete(&path, admin).await.expect(204);
        test.delete(&path, admin).await.expect(404);
    }
}
