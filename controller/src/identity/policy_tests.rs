//! Every route of identity, asked by everybody who may not and by those who may.

use http::Method;
use serde_json::{Value, json};

use super::policy::{POLICY, Rule};
use crate::testing::TestApp;

/// A pattern of the table with things in it that don't exist, or the given user.
fn path_of(pattern: &str, user: &str) -> String {
    let segments = pattern.split('/').map(|segment| match segment {
        "{kinds}" => "projects",
        "{actors}" => "users",
        "{user}" => user,
        segment if segment.starts_with('{') => "nowhere",
        segment => segment,
    });
    format!("/identity{}", segments.collect::<Vec<_>>().join("/"))
}

struct Askers {
    reader: String,
    member: String,
    manager: String,
    member_id: String,
    system_reader: String,
    expired: String,
}

async fn askers(test: &TestApp) -> Askers {
    let (_, reader) = test.tenant("reader", "reader").await;
    let (_, member) = test.tenant("member", "member").await;
    let (_, manager) = test.tenant("manager", "manager").await;
    let admin = test.admin_token.as_str();
    let id = |name: &str| {
        let path = format!("/identity/v3/users?name={name}");
        async move { test.get(&path, admin).await.expect(200)["users"][0]["id"].as_str().unwrap().to_owned() }
    };
    let roles = test.get("/identity/v3/roles?name=reader", admin).await.expect(200);
    let role = roles["roles"][0]["id"].as_str().unwrap();
    let path = format!("/identity/v3/system/users/{}/roles/{role}", id("reader").await);
    test.call(Method::PUT, &path, admin, Value::Null).await.expect(204);
    let answer = test.log_in("reader", "pw", json!({"system": {"all": true}})).await;
    let system_reader = answer.header("x-subject-token").to_owned();
    let token = answer.expect(201);
    assert_eq!(token["token"]["system"], json!({"all": true}));
    let mut claims = super::principal_of(&test.app, admin).await.unwrap().claims.clone();
    claims.expires_us = crate::db::now_us() - 1;
    let expired = test.app.identity.keys.tokens.seal(&claims).unwrap();
    Askers { reader, member, manager, member_id: id("member").await, system_reader, expired }
}

#[tokio::test]
async fn each_route_answers_each_role_as_the_table_says() {
    let test = TestApp::new().await;
    let askers = askers(&test).await;
    for (method, pattern, rule) in POLICY {
        if *rule == Rule::Public {
            continue;
        }
        let call = |token: &str, user: &str| {
            let body = if *method == "GET" || *method == "DELETE" { Value::Null } else { json!({}) };
            let (method, path) = (method.parse().unwrap(), path_of(pattern, user));
            let token = token.to_owned();
            let test = &test;
            async move { test.call(method, &path, &token, body).await.status.as_u16() }
        };
        let refused = |status: u16| status == 401 || status == 403;
        for token in ["", "rubbish", askers.expired.as_str()] {
            assert_eq!(call(token, "nowhere").await, 401, "{method} {pattern} with token {token:?}");
        }
        let admin = call(&test.admin_token, "nowhere").await;
        let only_self = *pattern == "/v3/users/{user}/application_credentials" && *method == "POST";
        if !only_self {
            assert!(!refused(admin) && admin != 405 && admin < 500, "{method} {pattern} as admin: {admin}");
        }
        let system_reader = call(&askers.system_reader, "nowhere").await;
        match rule {
            Rule::Admin | Rule::Owner => {
                assert_eq!(system_reader, 403, "{method} {pattern} as system reader")
            }
            Rule::Read | Rule::OwnerRead => {
                assert!(!refused(system_reader), "{method} {pattern} as system reader: {system_reader}");
            }
            _ => {}
        }
        for tenant in [&askers.reader, &askers.member, &askers.manager] {
            let status = call(tenant, "nowhere").await;
            match rule {
                Rule::Token => assert!(!refused(status), "{method} {pattern}: {status}"),
                Rule::Further(_) => assert!(status < 500 && status != 405, "{method} {pattern}: {status}"),
                _ => assert_eq!(status, 403, "{method} {pattern} as tenant"),
            }
        }
        if matches!(rule, Rule::Owner | Rule::OwnerRead) {
            let status = call(&askers.member, &askers.member_id).await;
            assert!(!refused(status) && status < 500, "{method} {pattern} of oneself: {status}");
        }
    }
}

#[tokio::test]
async fn what_is_somebody_elses_is_not_shown() {
    let test = TestApp::new().await;
    let askers = askers(&test).await;
    let other = &test.admin.project_id;
    for path in [
        format!("/identity/v3/projects/{other}"),
        "/identity/v3/projects/nowhere".to_owned(),
        "/identity/v3/domains/nowhere".to_owned(),
        "/identity/v3/role_assignments".to_owned(),
        format!("/identity/v3/role_assignments?scope.project.id={other}"),
    ] {
        // The same whether it exists or not.
        test.get(&path, &askers.member).await.expect(403);
    }
    let body = json!({"credential": {"type": "totp", "blob": "secret of the administrator"}});
    let made = test.post("/identity/v3/credentials", &test.admin_token, body).await.expect(201);
    let path = format!("/identity/v3/credentials/{}", made["credential"]["id"].as_str().unwrap());
    for method in [Method::GET, Method::PATCH, Method::DELETE] {
        let body = if method == Method::PATCH { json!({"credential": {}}) } else { Value::Null };
        test.call(method, &path, &askers.member, body).await.expect(404);
    }
    let listed = test.get("/identity/v3/credentials", &askers.member).await.expect(200);
    assert_eq!(listed["credentials"], json!([]));
    let validate = http::Request::get("/identity/v3/auth/tokens")
        .header("x-auth-token", &askers.member)
        .header("x-subject-token", &test.admin_token);
    test.send(validate.body(axum::body::Body::empty()).unwrap()).await.expect(403);
}
