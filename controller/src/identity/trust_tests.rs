//! Trusts: what they give, to whom, how often, how deep, and when they end.

use http::Method;
use serde_json::{Value, json};

use crate::testing::{Answer, TestApp};

const TRUSTS: &str = "/identity/v3/OS-TRUST/trusts";
const WHOAMI: &str = "/identity/v3/auth/projects";

/// A trustor with a project, who is a member there, and two others.
struct Friends {
    test: TestApp,
    project: String,
    ada: String,
    ada_token: String,
    bob: String,
    cyd: String,
}

impl Friends {
    async fn new() -> Self {
        let test = TestApp::new().await;
        let (project, ada_token) = test.tenant("ada", "member").await;
        test.tenant("bob", "reader").await;
        test.tenant("cyd", "reader").await;
        let (ada, bob, cyd) = (id(&test, "ada").await, id(&test, "bob").await, id(&test, "cyd").await);
        Self { test, project, ada, ada_token, bob, cyd }
    }

    /// A wish for a trust from Ada to Bob with the role reader, and more.
    fn wish(&self, more: Value) -> Value {
        let mut trust = json!({"trustor_user_id": self.ada, "trustee_user_id": self.bob,
            "project_id": self.project, "impersonation": false, "roles": [{"name": "reader"}]});
        trust.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "trust": trust })
    }

    async fn trust(&self, token: &str, more: Value) -> Value {
        self.test.post(TRUSTS, token, self.wish(more)).await.expect(201)["trust"].clone()
    }

    async fn log_in(&self, user: &str, trust: &Value) -> Answer {
        self.test.log_in(user, "pw", json!({"OS-TRUST:trust": {"id": trust["id"]}})).await
    }

    async fn token(&self, user: &str, trust: &Value) -> String {
        let answer = self.log_in(user, trust).await;
        let token = answer.header("x-subject-token").to_owned();
        answer.expect(201);
        token
    }

    async fn patch(&self, path: &str, body: Value) {
        self.test.call(Method::PATCH, path, &self.test.admin_token, body).await.expect(200);
    }
}

async fn id(test: &TestApp, name: &str) -> String {
    let users = test.get(&format!("/identity/v3/users?name={name}"), &test.admin_token).await.expect(200);
    users["users"][0]["id"].as_str().unwrap().to_owned()
}

fn path(trust: &Value) -> String {
    format!("{TRUSTS}/{}", trust["id"].as_str().unwrap())
}

#[tokio::test]
async fn a_trust_gives_its_trustee_its_roles_and_is_seen_by_both() {
    let friends = Friends::new().await;
    let test = &friends.test;
    let bob_token = test.token("bob", "pw", Some("bob")).await;
    let cyd_token = test.token("cyd", "pw", Some("cyd")).await;
    let trust = friends.trust(&friends.ada_token, json!({})).await;
    assert_eq!((&trust["redelegation_count"], &trust["expires_at"]), (&json!(0), &Value::Null));
    assert_eq!((trust["roles"].as_array().unwrap().len(), &trust["roles"][0]["name"]), (1, &json!("reader")));
    // Seen by its two, by an administrator, and by nobody else.
    for token in [&friends.ada_token, &bob_token, &test.admin_token] {
        let shown = test.get(&path(&trust), token).await.expect(200);
        assert_eq!(shown["trust"], trust);
    }
    test.get(&path(&trust), &cyd_token).await.expect(404);
    test.delete(&path(&trust), &cyd_token).await.expect(404);
    test.delete(&path(&trust), &bob_token).await.expect(403);
    let query = |kind: &str, user: &str| format!("{TRUSTS}?{kind}={user}");
    for (token, query, status, found) in [
        (&friends.ada_token, query("trustor_user_id", &friends.ada), 200, 1),
        (&bob_token, query("trustee_user_id", &friends.bob), 200, 1),
        (&bob_token, query("trustor_user_id", &friends.bob), 200, 0),
        (&test.admin_token, TRUSTS.to_owned(), 200, 1),
        (&bob_token, query("trustor_user_id", &friends.ada), 403, 0),
        (&friends.ada_token, TRUSTS.to_owned(), 403, 0),
    ] {
        let listed = test.get(&query, token).await.expect(status);
        assert_eq!(listed["trusts"].as_array().map_or(0, Vec::len), found, "{query}");
    }
    // Its roles.
    let roles = format!("{}/roles", path(&trust));
    let listed = test.get(&roles, &bob_token).await.expect(200);
    let role = listed["roles"][0]["id"].as_str().unwrap();
    assert_eq!(test.get(&format!("{roles}/{role}"), &bob_token).await.expect(200)["role"]["name"], "reader");
    let head = test.call(Method::HEAD, &format!("{roles}/{role}"), &bob_token, Value::Null).await;
    assert_eq!(head.status, 200);
    test.get(&format!("{roles}/nowhere"), &bob_token).await.expect(404);
    test.get(&roles, &cyd_token).await.expect(404);
    // A token of it is the trustee's, with those roles in that project.
    let answer = friends.log_in("bob", &trust).await;
    let token = answer.header("x-subject-token").to_owned();
    let shown = answer.expect(201)["token"].clone();
    assert_eq!(
        (&shown["user"]["id"], &shown["project"]["id"]),
        (&json!(friends.bob), &json!(friends.project))
    );
    let names: Vec<&Value> = shown["roles"].as_array().unwrap().iter().map(|role| &role["name"]).collect();
    assert_eq!(names, ["reader"]);
    assert_eq!(shown["OS-TRUST:trust"]["trustor_user"]["id"], json!(friends.ada));
    assert_eq!(shown["OS-TRUST:trust"]["impersonation"], false);
    test.get("/compute/v2.1/servers", &token).await.expect(200);
    test.post("/network/v2.0/networks", &token, json!({"network": {}})).await.expect(403);
    friends.log_in("cyd", &trust).await.expect(403);
    friends.log_in("bob", &json!({"id": "nowhere"})).await.expect(401);
    // Impersonated, it is the trustor's.
    let trust = friends.trust(&friends.ada_token, json!({"impersonation": true})).await;
    let shown = friends.log_in("bob", &trust).await.expect(201);
    assert_eq!(shown["token"]["user"]["id"], json!(friends.ada));
    assert_eq!(shown["token"]["OS-TRUST:trust"]["trustee_user"]["id"], json!(friends.bob));
}

#[tokio::test]
async fn a_trust_is_made_by_its_trustor_of_roles_that_the_trustor_has() {
    let friends = Friends::new().await;
    let test = &friends.test;
    let bob_token = test.token("bob", "pw", Some("bob")).await;
    for (token, more, status) in [
        (&bob_token, json!({}), 403),
        (&test.admin_token, json!({}), 403),
        (&friends.ada_token, json!({"roles": [{"name": "admin"}]}), 404),
        (&friends.ada_token, json!({"roles": []}), 403),
        (&friends.ada_token, json!({"trustee_user_id": "nobody"}), 404),
        (&friends.ada_token, json!({"project_id": "nowhere"}), 404),
        (&friends.ada_token, json!({"expires_at": "bad.123Z"}), 400),
        (&friends.ada_token, json!({"expires_at": "2001-01-01T00:00:00Z"}), 400),
        (&friends.ada_token, json!({"remaining_uses": 0}), 400),
        (&friends.ada_token, json!({"remaining_uses": 2, "allow_redelegation": true}), 400),
        (&friends.ada_token, json!({"allow_redelegation": true, "redelegation_count": 4}), 403),
        (&friends.ada_token, json!({"redelegated_trust_id": "another"}), 403),
        (&friends.ada_token, json!({"color": "red"}), 400),
    ] {
        test.post(TRUSTS, token, friends.wish(more)).await.expect(status);
    }
    let end = json!({"expires_at": "2999-01-01T00:00:00"});
    let made = friends.trust(&friends.ada_token, end.clone()).await;
    assert_eq!(made["expires_at"], "2999-01-01T00:00:00.000000Z");
    test.post(TRUSTS, &friends.ada_token, friends.wish(end)).await.expect(409);
    // Application credentials have nothing to do with trusts.
    let credentials = format!("/identity/v3/users/{}/application_credentials", friends.ada);
    let body = json!({"application_credential": {"name": "ci", "secret": "s", "unrestricted": true}});
    let credential = test.post(&credentials, &friends.ada_token, body).await.expect(201);
    let auth = json!({"auth": {"identity": {"methods": ["application_credential"],
        "application_credential": {"id": credential["application_credential"]["id"], "secret": "s"}}}});
    let key = test.post("/identity/v3/auth/tokens", "", auth).await.header("x-subject-token").to_owned();
    test.post(TRUSTS, &key, friends.wish(json!({}))).await.expect(403);
    test.get(&path(&made), &key).await.expect(403);
    test.get(&format!("{TRUSTS}?trustor_user_id={}", friends.ada), &key).await.expect(403);
}

#[tokio::test]
async fn a_trust_with_so_many_uses_gives_exactly_so_many_tokens() {
    let friends = Friends::new().await;
    let trust = friends.trust(&friends.ada_token, json!({"remaining_uses": 3})).await;
    let all = (0..8).map(|_| friends.log_in("bob", &trust));
    let answers = futures_util::future::join_all(all).await;
    let given = answers.iter().filter(|answer| answer.status == 201).count();
    let refused = answers.iter().filter(|answer| answer.status == 401).count();
    assert_eq!((given, refused), (3, 5));
    // Those that were given stay; the trust is no longer shown, and its trustor can end them.
    let token =
        answers.iter().find(|answer| answer.status == 201).unwrap().header("x-subject-token").to_owned();
    friends.test.get(WHOAMI, &token).await.expect(200);
    friends.test.get(&path(&trust), &friends.ada_token).await.expect(404);
    friends.test.delete(&path(&trust), &friends.ada_token).await.expect(204);
    friends.test.get(WHOAMI, &token).await.expect(401);
}

#[tokio::test]
async fn a_trusts_tokens_end_with_whatever_it_rests_on() {
    let friends = Friends::new().await;
    let (test, admin) = (&friends.test, friends.test.admin_token.as_str());
    let trust = friends.trust(&friends.ada_token, json!({"impersonation": true})).await;
    let users = "/identity/v3/users";
    // Trustor, trustee or project disabled. What ended with a user stays ended.
    for (place, kind) in [
        (format!("{users}/{}", friends.ada), "user"),
        (format!("{users}/{}", friends.bob), "user"),
        (format!("/identity/v3/projects/{}", friends.project), "project"),
    ] {
        let token = friends.token("bob", &trust).await;
        test.get(WHOAMI, &token).await.expect(200);
        friends.patch(&place, json!({ kind: {"enabled": false} })).await;
        test.get(WHOAMI, &token).await.expect(401);
        let status = friends.log_in("bob", &trust).await.status;
        assert!(status == 403 || status == 401, "{place}: {status}");
        friends.patch(&place, json!({ kind: {"enabled": true} })).await;
        test.get(WHOAMI, &token).await.expect(if kind == "user" { 401 } else { 200 });
    }
    // The role taken away: one of two is enough.
    let token = friends.token("bob", &trust).await;
    let role = |name: &str| format!("/identity/v3/roles?name={name}");
    let roles = test.get(&role("member"), admin).await.expect(200);
    let member = roles["roles"][0]["id"].as_str().unwrap().to_owned();
    let both = json!({"roles": [{"name": "reader"}, {"name": "member"}]});
    let both = friends.trust(&test.token("ada", "pw", Some("ada")).await, both).await;
    let token_of_both = friends.token("bob", &both).await;
    let reader = test.get(&role("reader"), admin).await.expect(200);
    let grants = format!("/identity/v3/projects/{}/users/{}/roles", friends.project, friends.ada);
    let reader = format!("{grants}/{}", reader["roles"][0]["id"].as_str().unwrap());
    test.call(Method::PUT, &reader, admin, Value::Null).await.expect(204);
    test.delete(&format!("{grants}/{member}"), admin).await.expect(204);
    test.get(WHOAMI, &token).await.expect(200);
    test.get(WHOAMI, &token_of_both).await.expect(401);
    friends.log_in("bob", &both).await.expect(403);
    test.delete(&reader, admin).await.expect(204);
    test.get(WHOAMI, &token).await.expect(401);
    // The user who gave it goes, and the trust with it.
    test.delete(&format!("{users}/{}", friends.ada), admin).await.expect(204);
    test.get(&path(&trust), admin).await.expect(404);
    assert_eq!(test.get(TRUSTS, admin).await.expect(200)["trusts"], json!([]));
}

#[tokio::test]
async fn a_trust_and_its_tokens_end_in_time_and_with_its_project() {
    let friends = Friends::new().await;
    let test = &friends.test;
    let end = crate::db::rfc3339_us(crate::db::now_us() + 600_000_000);
    let trust = friends.trust(&friends.ada_token, json!({"expires_at": end})).await;
    let answer = friends.log_in("bob", &trust).await;
    let token = answer.header("x-subject-token").to_owned();
    // So that nobody who remembers the token takes it for longer.
    assert_eq!(answer.expect(201)["token"]["expires_at"], trust["expires_at"]);
    test.get(WHOAMI, &token).await.expect(200);
    // The time is over.
    let mut tx = super::begin(&test.app).await.unwrap();
    sqlx::query("UPDATE trusts SET expires_us = 1").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    test.get(WHOAMI, &token).await.expect(401);
    friends.log_in("bob", &trust).await.expect(401);
    test.get(&path(&trust), &friends.ada_token).await.expect(404);
    let trust = friends.trust(&friends.ada_token, json!({})).await;
    test.delete(&format!("/identity/v3/projects/{}", friends.project), &test.admin_token).await.expect(204);
    test.get(&path(&trust), &test.admin_token).await.expect(404);
}

#[tokio::test]
async fn a_trust_is_handed_on_as_deep_as_it_says_and_ends_with_the_first() {
    let friends = Friends::new().await;
    let test = &friends.test;
    let more =
        json!({"allow_redelegation": true, "redelegation_count": 2, "expires_at": "2999-01-01T00:00:00Z"});
    let first = friends.trust(&friends.ada_token, more).await;
    assert_eq!(first["redelegation_count"], 2);
    let bob_token = friends.token("bob", &first).await;
    // Bob hands on to Cyd, as himself, since nobody is impersonated.
    let on = |more: Value| {
        let mut trust = json!({"trustor_user_id": friends.bob, "trustee_user_id": friends.cyd});
        trust.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        trust
    };
    for (more, status) in [
        (json!({"impersonation": true}), 403),
        (json!({"roles": [{"name": "member"}]}), 403),
        (json!({"remaining_uses": 1}), 403),
        (json!({"expires_at": "2999-01-01T00:00:01Z"}), 403),
        (json!({"allow_redelegation": true, "redelegation_count": 2}), 403),
    ] {
        test.post(TRUSTS, &bob_token, friends.wish(on(more))).await.expect(status);
    }
    let second = friends.trust(&bob_token, on(json!({"allow_redelegation": true}))).await;
    assert_eq!(second["redelegated_trust_id"], first["id"]);
    assert_eq!((&second["redelegation_count"], &second["expires_at"]), (&json!(1), &first["expires_at"]));
    let cyd_token = friends.token("cyd", &second).await;
    test.get("/compute/v2.1/servers", &cyd_token).await.expect(200);
    let back =
        json!({"trustor_user_id": friends.cyd, "trustee_user_id": friends.bob, "allow_redelegation": true});
    let third = friends.trust(&cyd_token, back).await;
    assert_eq!(third["redelegation_count"], 0);
    let bob_token = friends.token("bob", &third).await;
    test.post(TRUSTS, &bob_token, friends.wish(on(json!({})))).await.expect(403);
    // Who handed it on is disabled: what comes after gives nothing meanwhile.
    friends.patch(&format!("/identity/v3/users/{}", friends.cyd), json!({"user": {"enabled": false}})).await;
    test.get(WHOAMI, &bob_token).await.expect(401);
    friends.patch(&format!("/identity/v3/users/{}", friends.cyd), json!({"user": {"enabled": true}})).await;
    let bob_token = friends.token("bob", &third).await;
    // The first goes, and all with it.
    test.delete(&path(&first), &friends.ada_token).await.expect(204);
    test.get(WHOAMI, &bob_token).await.expect(401);
    for trust in [&second, &third] {
        test.get(&path(trust), &test.admin_token).await.expect(404);
    }
    // What may not be handed on isn't.
    let closed = friends.trust(&friends.ada_token, json!({})).await;
    let bob_token = friends.token("bob", &closed).await;
    test.post(TRUSTS, &bob_token, friends.wish(on(json!({})))).await.expect(403);
}

#[tokio::test]
async fn a_trusts_token_makes_nothing_that_outlives_the_trust() {
    let friends = Friends::new().await;
    let test = &friends.test;
    let ec2 = format!("/identity/v3/users/{}/credentials/OS-EC2", friends.ada);
    let project = json!({"tenant_id": friends.project});
    let own = test.post(&ec2, &friends.ada_token, project.clone()).await.expect(201);
    let own = own["credential"]["access"].as_str().unwrap();
    let body = json!({"credential": {"type": "totp", "blob": "secret of ada"}});
    let totp = test.post("/identity/v3/credentials", &friends.ada_token, body.clone()).await.expect(201);
    let totp = format!("/identity/v3/credentials/{}", totp["credential"]["id"].as_str().unwrap());
    let trust = friends.trust(&friends.ada_token, json!({"impersonation": true})).await;
    let token = friends.token("bob", &trust).await;
    // Neither application credentials nor tokens by this token.
    let credentials = format!("/identity/v3/users/{}/application_credentials", friends.ada);
    test.get(&credentials, &token).await.expect(403);
    let wish = json!({"application_credential": {"name": "x"}});
    test.post(&credentials, &token, wish).await.expect(403);
    test.get(&format!("/identity/v3/users/{}/access_rules", friends.ada), &token).await.expect(403);
    let rescope = json!({"auth": {"identity": {"methods": ["token"], "token": {"id": token}}}});
    test.post("/identity/v3/auth/tokens", "", rescope).await.expect(403);
    // The trustor's own secrets aren't the trustee's.
    test.get(&totp, &token).await.expect(404);
    test.post("/identity/v3/credentials", &token, body).await.expect(403);
    test.get(&format!("{ec2}/{own}"), &token).await.expect(404);
    assert_eq!(test.get(&ec2, &token).await.expect(200)["credentials"], json!([]));
    assert_eq!(test.get("/identity/v3/credentials", &token).await.expect(200)["credentials"], json!([]));
    // A key pair is as limited as the trust, and can't be made more.
    let pair = test.post(&ec2, &token, project).await.expect(201)["credential"].clone();
    assert_eq!(pair["trust_id"], trust["id"]);
    let kept = test.get("/identity/v3/credentials", &token).await.expect(200);
    let kept = format!("/identity/v3/credentials/{}", kept["credentials"][0]["id"].as_str().unwrap());
    let free = json!({"access": pair["access"], "secret": "x"}).to_string();
    let free = json!({"credential": {"blob": free}});
    test.call(Method::PATCH, &kept, &token, free).await.expect(400);
    let found = super::credentials::of_access_key(&test.app, pair["access"].as_str().unwrap()).await.unwrap();
    let answer = super::auth::issue_by_ec2(&test.app, found.unwrap()).await.unwrap();
    let key = answer.headers()["x-subject-token"].to_str().unwrap().to_owned();
    test.get("/compute/v2.1/servers", &key).await.expect(200);
    test.post("/network/v2.0/networks", &key, json!({"network": {}})).await.expect(403);
    test.delete(&path(&trust), &friends.ada_token).await.expect(204);
    test.get(WHOAMI, &key).await.expect(401);
    let found = super::credentials::of_access_key(&test.app, pair["access"].as_str().unwrap()).await.unwrap();
    assert!(super::auth::issue_by_ec2(&test.app, found.unwrap()).await.is_err());
}
