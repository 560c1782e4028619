//! Groups, inheritance, implied roles, application credentials, lock-out, several controllers.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use crate::{
    app::{self, App},
    config::Lockout,
    testing::TestApp,
};

const WHOAMI: &str = "/identity/v3/auth/projects";

impl TestApp {
    async fn made(&self, path: &str, key: &str, body: Value) -> String {
        let made = self.post(path, &self.admin_token, json!({ key: body })).await.expect(201);
        made[key]["id"].as_str().unwrap().to_owned()
    }

    async fn put(&self, path: &str) {
        self.call(Method::PUT, path, &self.admin_token, Value::Null).await.expect(204);
    }

    async fn role(&self, name: &str) -> String {
        let roles = self.get(&format!("/identity/v3/roles?name={name}"), &self.admin_token).await.expect(200);
        roles["roles"][0]["id"].as_str().unwrap().to_owned()
    }

    async fn user(&self, name: &str) -> String {
        self.made("/identity/v3/users", "user", json!({"name": name, "password": "pw"})).await
    }

    async fn roles_in(&self, user: &str, project: &str) -> Vec<String> {
        let answer = self.log_in(user, "pw", json!({"project": {"id": project}})).await;
        if answer.status == 401 {
            return Vec::new();
        }
        let token = answer.expect(201);
        let roles = token["token"]["roles"].as_array().unwrap().iter();
        roles.map(|role| role["name"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test]
async fn a_group_gives_its_members_roles_until_they_leave() {
    let test = TestApp::new().await;
    let (user, role) = (test.user("u").await, test.role("member").await);
    let project = test.made("/identity/v3/projects", "project", json!({"name": "p"})).await;
    let group = test.made("/identity/v3/groups", "group", json!({"name": "g"})).await;
    test.put(&format!("/identity/v3/projects/{project}/groups/{group}/roles/{role}")).await;
    assert_eq!(test.roles_in("u", &project).await, [""; 0]);
    let member = format!("/identity/v3/groups/{group}/users/{user}");
    test.put(&member).await;
    assert_eq!(test.roles_in("u", &project).await, ["member", "reader"]);
    let token = test.token("u", "pw", Some("p")).await;
    test.get(WHOAMI, &token).await.expect(200);
    assert_eq!(test.get(&member, &test.admin_token).await.status, 204);
    let path = format!("/identity/v3/role_assignments?user.id={user}&effective&include_names");
    let listed = test.get(&path, &token).await.expect(200);
    let names: Vec<&Value> =
        listed["role_assignments"].as_array().unwrap().iter().map(|a| &a["role"]["name"]).collect();
    assert_eq!(names, ["member", "reader"]);
    test.delete(&member, &test.admin_token).await.expect(204);
    test.get(WHOAMI, &token).await.expect(401);
    test.delete(&format!("/identity/v3/groups/{group}"), &test.admin_token).await.expect(204);
    let listed =
        test.get(&format!("/identity/v3/role_assignments?group.id={group}"), &test.admin_token).await;
    assert_eq!(listed.expect(200)["role_assignments"], json!([]));
}

#[tokio::test]
async fn inherited_roles_hold_on_all_projects_below_and_not_there() {
    let test = TestApp::new().await;
    let (user, role) = (test.user("u").await, test.role("reader").await);
    let projects = "/identity/v3/projects";
    let root = test.made(projects, "project", json!({"name": "root"})).await;
    let middle = test.made(projects, "project", json!({"name": "middle", "parent_id": root})).await;
    let leaf = test.made(projects, "project", json!({"name": "leaf", "parent_id": middle})).await;
    let base = format!("/identity/v3/OS-INHERIT/projects/{root}/users/{user}/roles");
    let path = format!("{base}/{role}/inherited_to_projects");
    test.put(&path).await;
    assert_eq!(test.roles_in("u", &root).await, [""; 0]);
    for below in [&middle, &leaf] {
        assert_eq!(test.roles_in("u", below).await, ["reader"]);
    }
    let listed = test.get(&format!("{base}/inherited_to_projects"), &test.admin_token).await.expect(200);
    assert_eq!(listed["roles"][0]["name"], "reader");
    let listed = test.get(&format!("/identity/v3/role_assignments?user.id={user}"), &test.admin_token).await;
    assert_eq!(listed.expect(200)["role_assignments"][0]["scope"]["OS-INHERIT:inherited_to"], "projects");
    test.delete(&path, &test.admin_token).await.expect(204);
    assert_eq!(test.roles_in("u", &leaf).await, [""; 0]);
    // Of the domain: all of its projects.
    let domain =
        format!("/identity/v3/OS-INHERIT/domains/default/users/{user}/roles/{role}/inherited_to_projects");
    test.put(&domain).await;
    for project in [&root, &leaf] {
        assert_eq!(test.roles_in("u", project).await, ["reader"]);
    }
    test.log_in("u", "pw", json!({"domain": {"id": "default"}})).await.expect(401);
}

#[tokio::test]
async fn project_trees_are_shown_and_bounded() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let projects = "/identity/v3/projects";
    let mut chain = vec![test.made(projects, "project", json!({"name": "p0"})).await];
    for depth in 1..5 {
        let body = json!({"name": format!("p{depth}"), "parent_id": chain[depth - 1]});
        chain.push(test.made(projects, "project", body).await);
    }
    let deeper = json!({"project": {"name": "p5", "parent_id": chain[4]}});
    test.post(projects, admin, deeper).await.expect(403);
    let shown = test.get(&format!("{projects}/{}?parents_as_list", chain[2]), admin).await.expect(200);
    let names: Vec<&Value> =
        shown["project"]["parents"].as_array().unwrap().iter().map(|p| &p["project"]["name"]).collect();
    assert_eq!(names, ["p1", "p0"]);
    let shown = test.get(&format!("{projects}/{}?subtree_as_ids", chain[2]), admin).await.expect(200);
    assert_eq!(shown["project"]["subtree"], json!({ chain[3].as_str(): { chain[4].as_str(): null } }));
    let shown = test.get(&format!("{projects}/{}?parents_as_ids", chain[2]), admin).await.expect(200);
    assert_eq!(shown["project"]["parents"], json!({ chain[1].as_str(): { chain[0].as_str(): null } }));
    test.delete(&format!("{projects}/{}", chain[1]), admin).await.expect(403);
    let moved = json!({"project": {"parent_id": chain[0]}});
    test.call(Method::PATCH, &format!("{projects}/{}", chain[4]), admin, moved).await.expect(400);
    let listed = test.get(&format!("{projects}?parent_id={}", chain[3]), admin).await.expect(200);
    assert_eq!(listed["projects"][0]["id"], chain[4].as_str());
    let tags = format!("{projects}/{}/tags", chain[0]);
    test.call(Method::PUT, &format!("{tags}/red"), admin, Value::Null).await.expect(201);
    assert_eq!(test.get(&tags, admin).await.expect(200)["tags"], json!(["red"]));
    test.delete(&format!("{tags}/red"), admin).await.expect(204);
    test.get(&format!("{tags}/red"), admin).await.expect(404);
}

#[tokio::test]
async fn implied_roles_follow_over_any_number_of_steps_and_never_in_a_ring() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let (project, _) = test.tenant("t1", "reader").await;
    let user = test.get("/identity/v3/users?name=t1", admin).await.expect(200)["users"][0]["id"].clone();
    let auditor = test.made("/identity/v3/roles", "role", json!({"name": "auditor"})).await;
    let clerk = test.made("/identity/v3/roles", "role", json!({"name": "clerk"})).await;
    let path = format!("/identity/v3/projects/{project}/users/{}/roles/{auditor}", user.as_str().unwrap());
    test.put(&path).await;
    let implies = |prior: &str, implied: &str| format!("/identity/v3/roles/{prior}/implies/{implied}");
    test.call(Method::PUT, &implies(&auditor, &clerk), admin, Value::Null).await.expect(201);
    test.call(Method::PUT, &implies(&clerk, &test.role("member").await), admin, Value::Null)
        .await
        .expect(201);
    let roles = ["auditor", "clerk", "member", "reader"];
    assert_eq!(test.roles_in("t1", &project).await, roles);
    test.call(Method::PUT, &implies(&clerk, &auditor), admin, Value::Null).await.expect(400);
    test.call(Method::PUT, &implies(&clerk, &test.role("admin").await), admin, Value::Null).await.expect(403);
    let listed = test.get(&format!("/identity/v3/roles/{auditor}/implies"), admin).await.expect(200);
    assert_eq!(listed["role_inference"]["implies"][0]["name"], "clerk");
    let all = test.get("/identity/v3/role_inferences", admin).await.expect(200);
    assert_eq!(all["role_inferences"].as_array().unwrap().len(), 5);
    test.delete(&implies(&auditor, &clerk), admin).await.expect(204);
    assert_eq!(test.roles_in("t1", &project).await, ["auditor", "reader"]);
}

impl TestApp {
    async fn by_credential(&self, id: &str, secret: &str) -> crate::testing::Answer {
        let body = json!({"auth": {"identity": {
            "methods": ["application_credential"], "application_credential": {"id": id, "secret": secret},
        }}});
        self.post("/identity/v3/auth/tokens", "", body).await
    }
}

#[tokio::test]
async fn an_application_credential_has_its_roles_its_rules_and_its_end() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "member").await;
    let users = test.get("/identity/v3/users?name=t1", &test.admin_token).await.expect(200);
    let user = users["users"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/identity/v3/users/{user}/application_credentials");
    let body = |more: Value| {
        let mut wish = json!({"name": "ci", "roles": [{"name": "reader"}]});
        wish.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"application_credential": wish})
    };
    test.post(&path, &token, body(json!({"roles": [{"name": "admin"}]}))).await.expect(400);
    test.post(&path, &token, body(json!({"expires_at": "2001-01-01T00:00:00Z"}))).await.expect(400);
    test.post(&path, &test.admin_token, body(json!({}))).await.expect(403);
    let rules = json!([{"service": "identity", "method": "GET", "path": "/v3/auth/*"}]);
    let made = test.post(&path, &token, body(json!({"access_rules": rules}))).await.expect(201);
    let made = &made["application_credential"];
    test.post(&path, &token, body(json!({}))).await.expect(409);
    let (id, secret) = (made["id"].as_str().unwrap(), made["secret"].as_str().unwrap());
    test.by_credential(id, "wrong").await.expect(401);
    test.by_credential("nowhere", secret).await.expect(401);
    let answer = test.by_credential(id, secret).await;
    let key = answer.header("x-subject-token").to_owned();
    let shown = answer.expect(201)["token"].clone();
    assert_eq!(
        (&shown["project"]["id"], &shown["methods"]),
        (&json!(project), &json!(["application_credential"]))
    );
    assert_eq!(shown["roles"].as_array().unwrap().len(), 1);
    assert_eq!(shown["application_credential"]["restricted"], true);
    // Only what the rules say, and the secret is not shown again.
    test.get(WHOAMI, &key).await.expect(200);
    test.get(&format!("/identity/v3/users/{user}"), &key).await.expect(401);
    test.get("/compute/v2.1/servers", &key).await.expect(401);
    let listed = test.get(&path, &token).await.expect(200);
    assert!(listed["application_credentials"][0].get("secret").is_none(), "{listed}");
    // A token by that token is as restricted, and stays in the project.
    let rescope = json!({"auth": {"identity": {"methods": ["token"], "token": {"id": key}}}});
    let answer = test.post("/identity/v3/auth/tokens", "", rescope).await;
    let rescoped = answer.header("x-subject-token").to_owned();
    answer.expect(201);
    test.get("/compute/v2.1/servers", &rescoped).await.expect(401);
    // The rule is in use; the credential goes, and its tokens with it.
    let rule = made["access_rules"][0]["id"].as_str().unwrap();
    let rule = format!("/identity/v3/users/{user}/access_rules/{rule}");
    test.delete(&rule, &token).await.expect(403);
    test.delete(&format!("{path}/{id}"), &token).await.expect(204);
    for gone in [&key, &rescoped] {
        test.get(WHOAMI, gone).await.expect(401);
    }
    test.delete(&rule, &token).await.expect(204);
}

#[tokio::test]
async fn an_application_credential_loses_what_its_user_loses() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "member").await;
    let users = test.get("/identity/v3/users?name=t1", &test.admin_token).await.expect(200);
    let user = users["users"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/identity/v3/users/{user}/application_credentials");
    let body = json!({"application_credential": {"name": "ci", "secret": "chosen", "unrestricted": true}});
    let made = test.post(&path, &token, body).await.expect(201);
    let id = made["application_credential"]["id"].as_str().unwrap();
    let key = test.by_credential(id, "chosen").await.header("x-subject-token").to_owned();
    let another = json!({"application_credential": {"name": "second"}});
    test.post(&path, &key, another).await.expect(201);
    let role = test.role("member").await;
    test.delete(&format!("/identity/v3/projects/{project}/users/{user}/roles/{role}"), &test.admin_token)
        .await
        .expect(204);
    test.get(WHOAMI, &key).await.expect(401);
    test.by_credential(id, "chosen").await.expect(401);
}

#[tokio::test]
async fn ec2_keys_are_the_users_own_and_sealed_in_the_database() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "member").await;
    let users = test.get("/identity/v3/users?name=t1", &test.admin_token).await.expect(200);
    let path = format!("/identity/v3/users/{}/credentials/OS-EC2", users["users"][0]["id"].as_str().unwrap());
    test.post(&path, &token, json!({"tenant_id": test.admin.project_id})).await.expect(403);
    let made = test.post(&path, &token, json!({"tenant_id": project})).await.expect(201);
    let (access, secret) = (made["credential"]["access"].as_str().unwrap(), &made["credential"]["secret"]);
    let shown = test.get(&format!("{path}/{access}"), &token).await.expect(200);
    assert_eq!(shown["credential"]["secret"], *secret);
    let stored: String =
        sqlx::query_scalar("SELECT blob FROM credentials").fetch_one(&test.app.db).await.unwrap();
    assert!(!stored.contains(secret.as_str().unwrap()));
    test.delete(&format!("{path}/{access}"), &token).await.expect(204);
    assert_eq!(test.get(&path, &token).await.expect(200)["credentials"], json!([]));
}

#[tokio::test]
async fn after_failed_log_ins_even_the_right_password_is_refused_for_a_while() {
    let lockout = Lockout { attempts: 3, duration: Duration::from_secs(3600) };
    let test = TestApp::with(|config| config.lockout = lockout).await;
    let user = test.user("u").await;
    let unscoped = || json!("unscoped");
    for _ in 0..2 {
        test.log_in("u", "wrong", unscoped()).await.expect(401);
    }
    test.log_in("u", "pw", unscoped()).await.expect(201);
    for _ in 0..3 {
        test.log_in("u", "wrong", unscoped()).await.expect(401);
    }
    test.log_in("u", "pw", unscoped()).await.expect(401);
    let change = json!({"user": {"original_password": "pw", "password": "other"}});
    test.post(&format!("/identity/v3/users/{user}/password"), "", change).await.expect(401);
    // The time is over.
    sqlx::query("UPDATE users SET failed_us = 1").execute(&test.app.db).await.unwrap();
    test.log_in("u", "pw", unscoped()).await.expect(201);
}

#[tokio::test]
async fn short_passwords_are_refused_where_there_is_a_rule() {
    let test = TestApp::with(|config| config.password_min_chars = 12).await;
    let admin = test.admin_token.as_str();
    let body = |password: &str| json!({"user": {"name": "u", "password": password}});
    let error = test.post("/identity/v3/users", admin, body("short")).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("12"), "{error}");
    let made = test.post("/identity/v3/users", admin, body("long enough it is")).await.expect(201);
    let path = format!("/identity/v3/users/{}/password", made["user"]["id"].as_str().unwrap());
    let change = |new: &str| json!({"user": {"original_password": "long enough it is", "password": new}});
    test.post(&path, "", change("short")).await.expect(400);
    test.post(&path, "", change("long enough it is")).await.expect(400);
    test.post(&path, "", change("another long one")).await.expect(204);
}

#[tokio::test]
async fn two_controllers_of_one_database_agree_at_once_and_across_new_keys() {
    let one = TestApp::new().await;
    let app = App::open(one.app.config.as_ref().clone()).await.unwrap();
    let two = one.beside(app.clone(), app::router(app.clone()));
    let (_, token) = one.tenant("t1", "member").await;
    two.get(WHOAMI, &token).await.expect(200);
    // Revoked at the other.
    let revoke = http::Request::delete("/identity/v3/auth/tokens")
        .header("x-auth-token", &token)
        .header("x-subject-token", &token);
    two.send(revoke.body(axum::body::Body::empty()).unwrap()).await.expect(204);
    one.get(WHOAMI, &token).await.expect(401);
    // The other makes a new key, of which the first knows nothing yet.
    let old = one.token("t1", "pw", Some("t1")).await;
    let pools = crate::db::open(one.dir(), one.app.config.database.as_deref()).await.unwrap();
    let later = crate::db::now_us() + 2 * 24 * 3600 * 1_000_000;
    app.identity.keys.rotate(&pools, later, Duration::from_secs(3600)).await.unwrap();
    let new = two.token("t1", "pw", Some("t1")).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    one.get(WHOAMI, &new).await.expect(200);
    for controller in [&one, &two] {
        controller.get(WHOAMI, &old).await.expect(200);
    }
}
