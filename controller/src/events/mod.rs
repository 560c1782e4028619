//! The event stream: a table that only grows, written in the transactions that change things.
//!
//! | Call | By | |
//! |---|---|---|
//! | `GET /mote/v1/events?after=&limit=&wait_s=` | project | → `{events: […], next}`: those after the cursor, waiting up to `wait_s` for the first |
//! | the same with `Accept: text/event-stream` | project | server-sent events; `id` is the cursor, `Last-Event-ID` goes before `after` |
//!
//! With `all_projects=true` an administrator sees those of all projects. `after` is the `sequence` of the last event that
//! was seen (0: from the beginning; `now`: only new ones). Sequences grow without gaps in the order of commits, since
//! one transaction writes at a time; so a reader that keeps its cursor misses none and sees none twice.
//!
//! | `type` | when | `payload` |
//! |---|---|---|
//! | `server.action` | a user asked for something | `action` |
//! | `server.state` | a server came into another state | `vm_state`, `task_state`, `fault` |
//! | `server.interface` | a NIC was plugged into a server that runs, or is gone from it | `port_id`, `state`: `attached`, `detached` |
//! | `server.deleted` | nothing is left of it | `name`, `flavor`, `vcpus`, `memory_mib`, `disk_gib`, `started_at`, `ended_at` |

use std::{convert::Infallible, sync::LazyLock, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
    routing::get,
};
use futures_util::stream;
use http::{HeaderMap, header};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    app::App,
    db::{Conn, Db, now_us, rfc3339_us},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Most events in one answer, and in one read of a stream.
const MAX_PAGE: u64 = 1000;
/// Longest wait for an event.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// Pause between two looks at the table: other controllers write to it as well.
const PAUSE: Duration = Duration::from_millis(500);
/// Streams of one controller at a time.
const MAX_STREAMS: usize = 256;
/// A stream ends after this time and is taken up again with its cursor, so that a token that was revoked ends, too.
const STREAM_TIME: Duration = Duration::from_secs(300);

static STREAMS: LazyLock<std::sync::Arc<Semaphore>> =
    LazyLock::new(|| std::sync::Arc::new(Semaphore::new(MAX_STREAMS)));

/// What happened.
#[derive(Debug)]
pub(crate) struct NewEvent<'a> {
    /// See the module's table.
    pub(crate) kind: &'static str,
    /// Whose it is.
    pub(crate) project_id: &'a str,
    /// Who asked, and by which request.
    pub(crate) by: Option<&'a Ctx>,
    /// What it happened to.
    pub(crate) resource_id: &'a str,
    /// An object.
    pub(crate) payload: Value,
}

/// Writes an event, in the transaction of what it tells of.
pub(crate) async fn note(tx: &mut Conn, event: &NewEvent<'_>) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO events (sequence, at_us, type, project_id, user_id, request_id, resource_id, payload)
         VALUES ((SELECT COALESCE(MAX(sequence), 0) + 1 FROM events), $1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(now_us())
    .bind(event.kind)
    .bind(event.project_id)
    .bind(event.by.map(|ctx| ctx.user_id.as_str()))
    .bind(event.by.map(|ctx| ctx.request_id.as_str()))
    .bind(event.resource_id)
    .bind(event.payload.to_string())
    .execute(tx)
    .await?;
    Ok(())
}

/// The routes, below `/mote/v1`.
pub(crate) fn routes() -> Router<App> {
    Router::new().route("/events", get(read))
}

#[derive(Debug, FromRow)]
struct Row {
    sequence: i64,
    at_us: i64,
    #[sqlx(rename = "type")]
    kind: String,
    project_id: String,
    user_id: Option<String>,
    request_id: Option<String>,
    resource_id: String,
    payload: String,
}

impl Row {
    fn document(&self) -> Result<Value, ApiError> {
        let payload: Value = serde_json::from_str(&self.payload).map_err(ApiError::internal)?;
        Ok(json!({
            "sequence": self.sequence, "time": rfc3339_us(self.at_us), "type": self.kind,
            "project_id": self.project_id, "user_id": self.user_id, "request_id": self.request_id,
            "resource_id": self.resource_id, "payload": payload,
        }))
    }
}

/// Who reads what from where.
struct Reader {
    app: App,
    /// None: all.
    project: Option<String>,
    after: i64,
    limit: i64,
}

impl Reader {
    async fn open(app: App, ctx: &Ctx, params: &Params, headers: &HeaderMap) -> Result<Self, ApiError> {
        let project = match params.boolean("all_projects")? {
            Some(true) => ctx.require_admin().map(|()| None)?,
            _ => Some(ctx.require_project()?.to_owned()),
        };
        let last = headers.get("last-event-id").and_then(|value| value.to_str().ok());
        let after = match last.or(params.get("after")) {
            None => 0,
            Some("now") => {
                sqlx::query_scalar("SELECT COALESCE(MAX(sequence), 0) FROM events").fetch_one(&app.db).await?
            }
            Some(text) => text.parse().ok().filter(|after| *after >= 0).ok_or_else(|| {
                ApiError::BadRequest("after: must be the sequence of an event, 0 or \"now\".".into())
            })?,
        };
        let limit = params.number("limit")?.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
        Ok(Self { app, project, after, limit: i64::try_from(limit).map_err(ApiError::internal)? })
    }

    /// The next ones, and moves on.
    async fn next(&mut self) -> Result<Vec<Row>, ApiError> {
        let mut query = QueryBuilder::<Db>::new(
            "SELECT sequence, at_us, type, project_id, user_id, request_id, resource_id, payload FROM events
             WHERE sequence > ",
        );
        query.push_bind(self.after);
        if let Some(project) = &self.project {
            query.push(" AND project_id = ").push_bind(project.clone());
        }
        query.push(" ORDER BY sequence LIMIT ").push_bind(self.limit);
        let rows: Vec<Row> = query.build_query_as().fetch_all(&self.app.db).await?;
        if let Some(last) = rows.last() {
            self.after = last.sequence;
        }
        Ok(rows)
    }

    /// The same, waiting for the first until then.
    async fn wait(&mut self, deadline: Instant) -> Result<Vec<Row>, ApiError> {
        loop {
            let rows = self.next().await?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !rows.is_empty() || left.is_zero() {
                return Ok(rows);
            }
            tokio::time::sleep(PAUSE.min(left)).await;
        }
    }
}

async fn read(
    State(app): State<App>,
    ctx: Ctx,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut reader = Reader::open(app, &ctx, &params, &headers).await?;
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/event-stream") {
        return stream_to(reader, &ctx);
    }
    let wait = Duration::from_secs(params.number("wait_s")?.unwrap_or(0)).min(MAX_WAIT);
    let rows = reader.wait(Instant::now() + wait).await?;
    let events = rows.iter().map(Row::document).collect::<Result<Vec<_>, _>>()?;
    Ok(Json(json!({"events": events, "next": reader.after})).into_response())
}

/// A stream that has its place among the others.
struct Streamed {
    reader: Reader,
    end: Instant,
    _place: OwnedSemaphorePermit,
}

fn stream_to(reader: Reader, ctx: &Ctx) -> Result<Response, ApiError> {
    let place = STREAMS
        .clone()
        .try_acquire_owned()
        .map_err(|_| ApiError::Unavailable("Too many event streams are open; ask again later.".into()))?;
    let token_us = u64::try_from(ctx.expires_at_us.saturating_sub(now_us())).unwrap_or(0);
    let end = Instant::now() + STREAM_TIME.min(Duration::from_micros(token_us));
    let state = Streamed { reader, end, _place: place };
    let batches = stream::unfold(state, |mut state| async move {
        let rows = match state.reader.wait(state.end).await {
            Ok(rows) if !rows.is_empty() => rows,
            Ok(_) => return None,
            Err(error) => {
                tracing::warn!(%error, "an event stream ends");
                return None;
            }
        };
        let events: Vec<Result<Event, Infallible>> = rows.iter().filter_map(sse).map(Ok).collect();
        Some((stream::iter(events), state))
    });
    let events = futures_util::StreamExt::flatten(batches);
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

fn sse(row: &Row) -> Option<Event> {
    let document = row.document().ok()?;
    Some(Event::default().id(row.sequence.to_string()).event(&row.kind).data(document.to_string()))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use futures_util::StreamExt;
    use http::Request;
    use tower::ServiceExt;

    use super::*;
    use crate::testing::TestApp;

    const URL: &str = "/mote/v1/events";

    async fn happen(test: &TestApp, project: &str, resource: &str) {
        let mut tx = test.app.begin().await.unwrap();
        let payload = json!({"action": "start"});
        let event =
            NewEvent { kind: "server.action", project_id: project, by: None, resource_id: resource, payload };
        note(&mut tx, &event).await.unwrap();
        tx.commit().await.unwrap();
    }

    #[tokio::test]
    async fn a_cursor_misses_no_event_and_sees_none_twice() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "reader").await;
        for resource in ["a", "b", "c"] {
            happen(&test, &project, resource).await;
            happen(&test, "another", resource).await;
        }
        let page = test.get(&format!("{URL}?limit=2"), &token).await.expect(200);
        let resources: Vec<&Value> =
            page["events"].as_array().unwrap().iter().map(|event| &event["resource_id"]).collect();
        assert_eq!(resources, ["a", "b"]);
        let rest = test.get(&format!("{URL}?after={}", page["next"]), &token).await.expect(200);
        assert_eq!(
            (&rest["events"][0]["resource_id"], rest["events"].as_array().unwrap().len()),
            (&json!("c"), 1)
        );
        assert_eq!(rest["events"][0]["payload"], json!({"action": "start"}));
        let none = test.get(&format!("{URL}?after={}", rest["next"]), &token).await.expect(200);
        assert_eq!(none, json!({"events": [], "next": rest["next"]}));
        let all = test.get(&format!("{URL}?all_projects=true"), &test.admin_token).await.expect(200);
        assert_eq!(all["events"].as_array().unwrap().len(), 6);
        test.get(&format!("{URL}?all_projects=true"), &token).await.expect(403);
        test.get(URL, "").await.expect(401);
        for query in ["after=x", "after=-1", "limit=x", "wait_s=x"] {
            test.get(&format!("{URL}?{query}"), &token).await.expect(400);
        }
    }

    #[tokio::test]
    async fn who_waits_gets_the_event_that_comes() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "reader").await;
        let path = format!("{URL}?after=now&wait_s=30");
        let (answer, ()) = tokio::join!(test.get(&path, &token), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            happen(&test, &project, "late").await;
        });
        assert_eq!(answer.expect(200)["events"][0]["resource_id"], "late");
    }

    #[tokio::test]
    async fn a_stream_tells_what_was_and_what_comes() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "reader").await;
        happen(&test, &project, "before").await;
        happen(&test, &project, "first").await;
        let request = Request::get(URL)
            .header("x-auth-token", &token)
            .header("accept", "text/event-stream")
            .header("last-event-id", "1")
            .body(Body::empty())
            .unwrap();
        let response = test.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut body = response.into_body().into_data_stream();
        let mut next = async || String::from_utf8(body.next().await.unwrap().unwrap().to_vec()).unwrap();
        let first = next().await;
        assert!(first.contains("id: 2\n") && first.contains("event: server.action\n"), "{first}");
        happen(&test, &project, "second").await;
        let second = next().await;
        assert!(second.contains("id: 3\n") && second.contains("\"second\""), "{second}");
    }
}
