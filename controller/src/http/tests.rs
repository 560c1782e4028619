//! What is around the services.

use axum::body::Body;
use http::Request;
use serde_json::{Value, json};

use super::limits::Rate;
use crate::{server::Peer, testing::TestApp};

fn from(address: &str, mut request: Request<Body>) -> Request<Body> {
    request.extensions_mut().insert(Peer(address.parse().unwrap()));
    request
}

#[tokio::test]
async fn log_ins_of_one_address_are_limited_and_those_of_others_are_not() {
    let test = TestApp::with(|config| config.login_rate = Rate { per_second: 1, burst: 3 }).await;
    let log_in = |address: &str| {
        let body = json!({"auth": {"identity": {"methods": []}}}).to_string();
        let request = Request::post("/identity/v3/auth/tokens").header("content-type", "application/json");
        test.send(from(address, request.body(body.into()).unwrap()))
    };
    let mut limited = None;
    for _ in 0..6 {
        let answer = log_in("192.0.2.1").await;
        if answer.status == 429 {
            limited = Some(answer);
        }
    }
    let limited = limited.expect("the fourth at the latest");
    assert_eq!(limited.header("retry-after"), "1");
    assert_eq!(limited.json()["error"]["code"], 429);
    log_in("192.0.2.2").await.expect(400);
    // Only log-ins.
    let other = Request::get("/identity/v3").body(Body::empty()).unwrap();
    test.send(from("192.0.2.1", other)).await.expect(200);
}

#[tokio::test]
async fn requests_of_one_project_are_limited_and_those_of_others_are_not() {
    let test = TestApp::with(|config| config.project_rate = Rate { per_second: 1, burst: 30 }).await;
    let (_, token) = test.tenant("t1", "member").await;
    let mut statuses = Vec::new();
    for _ in 0..60 {
        statuses.push(test.get("/identity/v3/auth/projects", &token).await.status.as_u16());
    }
    assert_eq!(statuses[0], 200);
    assert_eq!(statuses[59], 429);
    let (_, other) = test.tenant("t2", "member").await;
    test.get("/identity/v3/auth/projects", &other).await.expect(200);
}

#[tokio::test]
async fn metrics_are_for_this_machine_and_for_administrators() {
    let test = TestApp::new().await;
    let (_, token) = test.tenant("t1", "member").await;
    let get = || Request::get("/metrics").body(Body::empty()).unwrap();
    test.send(from("192.0.2.1", get())).await.expect(401);
    test.get("/metrics", &token).await.expect(403);
    assert_eq!(test.get("/metrics", &test.admin_token).await.status, 200);
    let answer = test.send(from("127.0.0.1", get())).await;
    let text = String::from_utf8(answer.bytes).unwrap();
    assert!(text.contains("mote_http_requests_total{service=\"identity\",status=\"2xx\"}"), "{text}");
    assert!(text.contains("mote_http_requests_under_way 1\n"), "only this one: {text}");
    let all = text.lines().find(|line| line.contains("_count{service=\"identity\"}")).unwrap();
    let all: u64 = all.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(all >= 5, "{all}");
}

#[tokio::test]
async fn health_readiness_and_the_description_need_no_token() {
    let test = TestApp::new().await;
    test.get("/healthz", "").await.expect(200);
    test.get("/readyz", "").await.expect(200);
    let document = test.get("/openapi.json", "").await.expect(200);
    assert_eq!(document["openapi"], "3.1.0");
    test.app.db.close().await;
    test.get("/readyz", "").await.expect(503);
}

#[tokio::test]
async fn a_body_header_or_query_beyond_its_limit_is_refused() {
    let test = TestApp::new().await;
    let many = (0..200).map(|n| format!("a{n}=1")).collect::<Vec<_>>().join("&");
    test.get(&format!("/identity/v3/users?{many}"), &test.admin_token).await.expect(400);
    let long = Request::get("/identity/v3/users").header("x-auth-token", "x".repeat(10_000));
    test.send(long.body(Body::empty()).unwrap()).await.expect(401);
    let nul = json!({"user": {"name": "a\u{0}b"}});
    let status = test.post("/identity/v3/users", &test.admin_token, nul).await.status.as_u16();
    // SQLite keeps it, PostgreSQL can't.
    assert!(status == 201 || status == 400, "{status}");
    test.post("/identity/v3/users", &test.admin_token, Value::Null).await.expect(400);
}
