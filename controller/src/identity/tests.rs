//! Keystone's API, asked in process.

use http::Method;
use serde_json::{Value, json};

use crate::testing::TestApp;

const TOKENS: &str = "/identity/v3/auth/tokens";

#[tokio::test]
async fn version_documents_need_no_token() {
    let test = TestApp::new().await;
    for path in ["/identity", "/identity/"] {
        let body = test.get(path, "").await.expect(300);
        assert_eq!(body["versions"]["values"][0]["id"], "v3.14");
    }
    for path in ["/identity/v3", "/identity/v3/"] {
        let body = test.get(path, "").await.expect(200);
        assert_eq!(body["version"]["links"][0]["href"], "http://cloud.test:8774/identity/v3/");
    }
}

#[tokio::test]
async fn password_gives_a_scoped_token_with_catalog_and_implied_roles() {
    let test = TestApp::new().await;
    let scope = json!({"project": {"id": test.admin.project_id}});
    let answer = test.log_in("admin", "adminpw", scope).await;
    assert!(answer.header("x-openstack-request-id").starts_with("req-"));
    assert!(!answer.header("x-subject-token").is_empty());
    let token = &answer.expect(201)["token"];
    assert_eq!(token["project"]["name"], "admin");
    assert_eq!(token["project"]["domain"], json!({"id": "default", "name": "Default"}));
    assert_eq!(token["methods"], json!(["password"]));
    let roles: Vec<&str> =
        token["roles"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(roles, ["admin", "manager", "member", "reader"]);
    let catalog = token["catalog"].as_array().unwrap();
    let find =
        |kind: &str| catalog.iter().find(|s| s["type"] == kind).unwrap()["endpoints"][0]["url"].clone();
    assert_eq!(find("compute"), "http://cloud.test:8774/compute/v2.1");
    assert_eq!(find("identity"), "http://cloud.test:8774/identity/v3");
}

#[tokio::test]
async fn wrong_password_and_unknown_user_look_the_same() {
    let test = TestApp::new().await;
    let wrong = test.log_in("admin", "no", Value::Null).await;
    assert!(wrong.header("www-authenticate").contains("Keystone uri="));
    let unknown = test.log_in("nobody", "no", Value::Null).await.expect(401);
    let wrong = wrong.expect(401);
    assert_eq!(wrong, unknown);
    assert_eq!(wrong["error"]["message"], "The request you have made requires authentication.");
}

#[tokio::test]
async fn malformed_requests_for_a_token_are_400_and_say_why() {
    let test = TestApp::new().await;
    let cases = [
        (json!({}), "'auth' is a required"),
        (json!({"auth": {"identity": {"methods": []}}}), "No authentication method"),
        (json!({"auth": {"identity": {"methods": ["password"]}}}), "auth.identity.password is missing"),
        (json!({"auth": {"identity": {"methods": ["saml2"]}}}), "saml2"),
        (
            json!({"auth": {"identity": {"methods": ["token"], "token": {"id": "x"}}, "scope": {}}}),
            "exactly one",
        ),
    ];
    for (body, text) in cases {
        let error = test.post(TOKENS, "", body).await.expect(400);
        assert!(error["error"]["message"].as_str().unwrap().contains(text), "{error}");
    }
    let broken =
        http::Request::post(TOKENS).header("content-type", "application/json").body("{".into()).unwrap();
    let error = test.send(broken).await.expect(400);
    assert!(error["error"]["message"].as_str().unwrap().contains("Malformed JSON"), "{error}");
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_413() {
    let test = TestApp::new().await;
    let body = json!({"auth": "x".repeat(2 << 20)});
    test.post(TOKENS, "", body).await.expect(413);
}

#[tokio::test]
async fn scope_without_a_role_is_401_and_unscoped_has_no_catalog() {
    let test = TestApp::new().await;
    let (_, token) = test.tenant("t1", "member").await;
    let scope = json!({"project": {"id": test.admin.project_id}});
    test.log_in("t1", "pw", scope).await.expect(401);
    test.log_in("t1", "pw", json!({"project": {"id": "nowhere"}})).await.expect(401);
    let unscoped = test.log_in("t1", "pw", json!("unscoped")).await.expect(201);
    assert!(unscoped["token"].get("catalog").is_none() && unscoped["token"].get("project").is_none());
    test.get("/identity/v3/users", &token).await.expect(403);
    test.get("/identity/v3/users", "").await.expect(401);
    test.get("/identity/v3/users", "rubbish").await.expect(401);
}

#[tokio::test]
async fn a_token_can_be_rescoped_validated_and_revoked() {
    let test = TestApp::new().await;
    let unscoped = test.token("admin", "adminpw", None).await;
    let body = json!({"auth": {
        "identity": {"methods": ["token"], "token": {"id": unscoped}},
        "scope": {"project": {"name": "admin", "domain": {"name": "Default"}}},
    }});
    let answer = test.post(TOKENS, "", body).await;
    let scoped = answer.header("x-subject-token").to_owned();
    let token = answer.expect(201);
    assert_eq!(token["token"]["methods"], json!(["token", "password"]));
    assert_eq!(token["token"]["audit_ids"].as_array().unwrap().len(), 2);
    let ask = |method: Method, subject: &str| {
        let request = http::Request::builder().method(method).uri(TOKENS);
        let request = request.header("x-auth-token", &test.admin_token).header("x-subject-token", subject);
        test.send(request.body(axum::body::Body::empty()).unwrap())
    };
    let shown = ask(Method::GET, &scoped).await.expect(200);
    assert_eq!(shown["token"]["expires_at"], token["token"]["expires_at"]);
    assert_eq!(ask(Method::HEAD, &scoped).await.status, 200);
    ask(Method::DELETE, &scoped).await.expect(204);
    ask(Method::GET, &scoped).await.expect(404);
    ask(Method::GET, "rubbish").await.expect(404);
    test.get("/identity/v3/projects", &scoped).await.expect(401);
    test.get("/identity/v3/auth/projects", &unscoped).await.expect(200);
}

#[tokio::test]
async fn tokens_end_at_once_when_what_they_say_is_no_longer_true() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let (project, token) = test.tenant("t1", "member").await;
    let whoami = "/identity/v3/auth/projects";
    let listed = test.get(whoami, &token).await.expect(200);
    assert_eq!(listed["projects"][0]["id"], project.as_str());
    // The project disabled, then enabled again.
    for (enabled, status) in [(false, 401), (true, 200)] {
        let body = json!({"project": {"enabled": enabled}});
        test.call(Method::PATCH, &format!("/identity/v3/projects/{project}"), admin, body).await.expect(200);
        test.get(whoami, &token).await.expect(status);
    }
    // The password changed by the user; the old one no longer works, either.
    let users = test.get("/identity/v3/users?name=t1", admin).await.expect(200);
    let user = users["users"][0]["id"].as_str().unwrap().to_owned();
    let change = |old: &str| json!({"user": {"original_password": old, "password": "pw2"}});
    let path = format!("/identity/v3/users/{user}/password");
    test.post(&path, &token, change("wrong")).await.expect(401);
    test.post(&path, &token, change("pw")).await.expect(204);
    test.get(whoami, &token).await.expect(401);
    test.log_in("t1", "pw", Value::Null).await.expect(401);
    let token = test.token("t1", "pw2", Some("t1")).await;
    // The role taken away.
    let path = format!("/identity/v3/projects/{project}/users/{user}/roles");
    let roles = test.get(&path, admin).await.expect(200);
    let role = roles["roles"][0]["id"].as_str().unwrap().to_owned();
    test.delete(&format!("{path}/{role}"), admin).await.expect(204);
    test.get(whoami, &token).await.expect(401);
    test.delete(&format!("{path}/{role}"), admin).await.expect(404);
}

#[tokio::test]
async fn a_token_of_another_cloud_is_401() {
    let (one, other) = (TestApp::new().await, TestApp::new().await);
    one.get("/identity/v3/projects", &other.admin_token).await.expect(401);
}

#[tokio::test]
async fn projects_are_made_found_changed_and_deleted() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let body = json!({"project": {"name": "p1", "description": "d", "tags": ["b", "a"], "color": "red"}});
    let project =
        test.post("/identity/v3/projects", admin, body.clone()).await.expect(201)["project"].clone();
    assert_eq!((&project["color"], &project["tags"]), (&json!("red"), &json!(["a", "b"])));
    assert_eq!((&project["domain_id"], &project["parent_id"]), (&json!("default"), &json!("default")));
    test.post("/identity/v3/projects", admin, body).await.expect(409);
    for bad in [json!({"name": ""}), json!({"name": 1}), json!({}), json!({"name": "x", "parent_id": "y"})] {
        test.post("/identity/v3/projects", admin, json!({ "project": bad })).await.expect(400);
    }
    let nowhere = json!({"project": {"name": "x", "domain_id": "y"}});
    let error = test.post("/identity/v3/projects", admin, nowhere).await;
    assert!(matches!(error.status.as_u16(), 404), "{:?}", error.json());
    let found = test.get("/identity/v3/projects?name=p1&domain_id=default&tags=a", admin).await.expect(200);
    assert_eq!(found["projects"], json!([project]));
    let path = format!("/identity/v3/projects/{}", project["id"].as_str().unwrap());
    let changed = json!({"project": {"name": "p2", "color": null}});
    let changed = test.call(Method::PATCH, &path, admin, changed).await.expect(200);
    assert_eq!((&changed["project"]["name"], changed["project"].get("color")), (&json!("p2"), None));
    test.delete(&path, admin).await.expect(204);
    let error = test.get(&path, admin).await.expect(404);
    assert!(error["error"]["message"].as_str().unwrap().starts_with("Could not find project"), "{error}");
}

#[tokio::test]
async fn users_never_show_a_password_and_end_with_their_roles() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let (project, token) = test.tenant("t1", "reader").await;
    let users = test.get("/identity/v3/users?name=t1", admin).await.expect(200);
    assert!(!users.to_string().contains("argon2") && !users.to_string().contains("\"pw\""), "{users}");
    let user = users["users"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/identity/v3/users/{user}");
    // A user sees himself and nobody else.
    test.get(&path, &token).await.expect(200);
    test.get(&format!("{path}/projects"), &token).await.expect(200);
    test.get(&format!("/identity/v3/role_assignments?user.id={user}"), &token).await.expect(200);
    test.get("/identity/v3/role_assignments", &token).await.expect(403);
    test.delete(&path, &token).await.expect(403);
    let query =
        format!("/identity/v3/role_assignments?scope.project.id={project}&include_names=true&effective");
    let listed = test.get(&query, admin).await.expect(200);
    let listed = &listed["role_assignments"].as_array().unwrap()[0];
    assert_eq!((&listed["role"]["name"], &listed["user"]["name"]), (&json!("reader"), &json!("t1")));
    test.delete(&path, admin).await.expect(204);
    test.get("/identity/v3/auth/projects", &token).await.expect(401);
    let listed = test.get(&query, admin).await.expect(200);
    assert_eq!(listed["role_assignments"], json!([]));
}

#[tokio::test]
async fn the_catalog_is_rows_that_an_administrator_changes() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let services = test.get("/identity/v3/services?type=image", admin).await.expect(200);
    assert_eq!(services["services"][0]["name"], "glance");
    let id = services["services"][0]["id"].as_str().unwrap();
    let endpoints = test.get(&format!("/identity/v3/endpoints?service_id={id}"), admin).await.expect(200);
    assert_eq!(endpoints["endpoints"].as_array().unwrap().len(), 3);
    assert_eq!(endpoints["endpoints"][0]["url"], "http://cloud.test:8774/image");
    test.get("/identity/v3/regions/RegionOne", admin).await.expect(200);
    let region = json!({"region": {"id": "North", "parent_region_id": "RegionOne"}});
    test.post("/identity/v3/regions", admin, region.clone()).await.expect(201);
    test.post("/identity/v3/regions", admin, region).await.expect(409);
    let ring = json!({"region": {"parent_region_id": "North"}});
    test.call(Method::PATCH, "/identity/v3/regions/RegionOne", admin, ring).await.expect(400);
    test.delete("/identity/v3/regions/RegionOne", admin).await.expect(409);
    let body = json!({"service": {"type": "object-store", "name": "swift"}});
    let service = test.post("/identity/v3/services", admin, body).await.expect(201)["service"].clone();
    let endpoint = |url: &str| json!({"endpoint": {"service_id": service["id"], "interface": "public", "region_id": "North", "url": url}});
    test.post("/identity/v3/endpoints", admin, endpoint("ftp://x")).await.expect(400);
    let made = test.post("/identity/v3/endpoints", admin, endpoint("http://o/v1/AUTH_$(project_id)s")).await;
    let made = made.expect(201);
    let catalog = test.get("/identity/v3/auth/catalog", admin).await.expect(200);
    let find = |catalog: &Value| {
        catalog["catalog"].as_array().unwrap().iter().find(|s| s["type"] == "object-store").cloned()
    };
    let url = format!("http://o/v1/AUTH_{}", test.admin.project_id);
    assert_eq!(find(&catalog).unwrap()["endpoints"][0]["url"], url);
    let path = format!("/identity/v3/endpoints/{}", made["endpoint"]["id"].as_str().unwrap());
    let off = json!({"endpoint": {"enabled": false}});
    test.call(Method::PATCH, &path, admin, off).await.expect(200);
    assert_eq!(find(&test.get("/identity/v3/auth/catalog", admin).await.expect(200)), None);
    test.delete(&format!("/identity/v3/services/{}", service["id"].as_str().unwrap()), admin)
        .await
        .expect(204);
    test.get(&path, admin).await.expect(404);
}

#[tokio::test]
async fn built_in_roles_and_the_default_domain_stay() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let roles = test.get("/identity/v3/roles?name=admin", admin).await.expect(200);
    let role = format!("/identity/v3/roles/{}", roles["roles"][0]["id"].as_str().unwrap());
    test.delete(&role, admin).await.expect(403);
    test.call(Method::PATCH, &role, admin, json!({"role": {"name": "x"}})).await.expect(403);
    let role = test.post("/identity/v3/roles", admin, json!({"role": {"name": "auditor"}})).await.expect(201);
    let role = format!("/identity/v3/roles/{}", role["role"]["id"].as_str().unwrap());
    test.delete(&role, admin).await.expect(204);
    let domain = "/identity/v3/domains/default";
    test.call(Method::PATCH, domain, admin, json!({"domain": {"enabled": false}})).await.expect(403);
    test.delete(domain, admin).await.expect(403);
    let made = test.post("/identity/v3/domains", admin, json!({"domain": {"name": "d"}})).await.expect(201);
    let domain = format!("/identity/v3/domains/{}", made["domain"]["id"].as_str().unwrap());
    test.delete(&domain, admin).await.expect(403);
    test.call(Method::PATCH, &domain, admin, json!({"domain": {"enabled": false}})).await.expect(200);
    test.delete(&domain, admin).await.expect(204);
}

#[tokio::test]
async fn bootstrap_again_keeps_the_password_unless_told_otherwise() {
    let test = TestApp::new().await;
    let again = super::bootstrap::bootstrap(&test.app, Some("other".into()), false).await.unwrap();
    assert_eq!((again.password, &again.project_id), (None, &test.admin.project_id));
    test.token("admin", "adminpw", Some("admin")).await;
    let reset = super::bootstrap::bootstrap(&test.app, None, true).await.unwrap();
    test.log_in("admin", "adminpw", Value::Null).await.expect(401);
    test.token("admin", reset.password.as_deref().unwrap(), Some("admin")).await;
}

#[tokio::test]
async fn unknown_paths_and_methods_are_the_services_errors() {
    let test = TestApp::new().await;
    let error = test.get("/identity/v3/nothing", "").await.expect(404);
    assert_eq!(error["error"]["title"], "Not Found");
    test.call(Method::PUT, "/identity/v3/users", "", Value::Null).await.expect(405);
    let error = test.get("/nowhere", "").await.expect(404);
    assert_eq!(error["error"]["code"], 404);
}

#[tokio::test]
async fn fields_of_the_clients_own_are_kept_and_shown_where_keystone_keeps_them() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let service =
        test.get("/identity/v3/services?type=image", admin).await.expect(200)["services"][0].clone();
    for (plural, one, needed) in [
        ("users", "user", json!({"name": "u"})),
        ("groups", "group", json!({"name": "g"})),
        ("projects", "project", json!({"name": "p"})),
        ("roles", "role", json!({"name": "r"})),
        ("domains", "domain", json!({"name": "d"})),
        ("regions", "region", json!({"id": "North"})),
        ("services", "service", json!({"type": "test"})),
        (
            "endpoints",
            "endpoint",
            json!({"service_id": service["id"], "interface": "public", "url": "http://x"}),
        ),
        ("credentials", "credential", json!({"type": "totp", "blob": "x"})),
    ] {
        let mut wish = needed;
        // What is a thing's own can't be hidden.
        wish.as_object_mut().unwrap().extend([
            ("color".into(), json!({"name": "red"})),
            ("size".into(), json!(7)),
            ("links".into(), json!("mine")),
        ]);
        let made =
            test.post(&format!("/identity/v3/{plural}"), admin, json!({ one: wish })).await.expect(201);
        let made = &made[one];
        assert_eq!((&made["color"]["name"], &made["size"]), (&json!("red"), &json!(7)), "{made}");
        let path = format!("/identity/v3/{plural}/{}", made["id"].as_str().unwrap());
        assert_eq!(test.get(&path, admin).await.expect(200)[one], *made);
        let change = json!({ one: {"color": null, "size": 8} });
        let changed = test.call(Method::PATCH, &path, admin, change).await.expect(200);
        assert_eq!((changed[one].get("color"), &changed[one]["size"]), (None, &json!(8)), "{plural}");
        assert!(changed[one]["links"]["self"].as_str().unwrap().ends_with(made["id"].as_str().unwrap()));
        assert_eq!(test.get(&path, admin).await.expect(200), changed);
        if !["users", "projects"].contains(&plural) {
            let other = json!({ one: {"id": "another"} });
            test.call(Method::PATCH, &path, admin, other).await.expect(400);
        }
    }
    let tagged = json!({"domain": {"name": "e", "tags": ["x"]}});
    test.post("/identity/v3/domains", admin, tagged).await.expect(400);
    let of_domain = json!({"role": {"name": "s", "domain_id": "default"}});
    test.post("/identity/v3/roles", admin, of_domain).await.expect(400);
}

#[tokio::test]
async fn a_disabled_domain_goes_with_its_users_groups_and_projects_unless_one_owns_something() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let make = async |plural: &str, one: &str, body: Value| {
        let made =
            test.post(&format!("/identity/v3/{plural}"), admin, json!({ one: body })).await.expect(201);
        made[one]["id"].as_str().unwrap().to_owned()
    };
    let domain = make("domains", "domain", json!({"name": "d"})).await;
    let user = json!({"name": "u", "password": "pw", "domain_id": domain});
    let user = make("users", "user", user).await;
    let group = make("groups", "group", json!({"name": "g", "domain_id": domain})).await;
    let project = make("projects", "project", json!({"name": "p", "domain_id": domain})).await;
    let child = make("projects", "project", json!({"name": "q", "parent_id": project})).await;
    let roles = test.get("/identity/v3/roles?name=member", admin).await.expect(200);
    let role = roles["roles"][0]["id"].as_str().unwrap();
    for target in [format!("projects/{child}"), format!("domains/{domain}")] {
        let grant = format!("/identity/v3/{target}/users/{user}/roles/{role}");
        test.call(Method::PUT, &grant, admin, Value::Null).await.expect(204);
    }
    let body = json!({"network": {"name": "n", "project_id": child}});
    let network = test.post("/network/v2.0/networks", admin, body).await.expect(201);
    let path = format!("/identity/v3/domains/{domain}");
    test.delete(&path, admin).await.expect(403);
    test.call(Method::PATCH, &path, admin, json!({"domain": {"enabled": false}})).await.expect(200);
    let error = test.delete(&path, admin).await.expect(409);
    assert!(error["error"]["message"].as_str().unwrap().contains("networks"), "{error}");
    // Nothing of it has gone.
    test.get(&format!("/identity/v3/users/{user}"), admin).await.expect(200);
    let network = network["network"]["id"].as_str().unwrap();
    test.delete(&format!("/network/v2.0/networks/{network}"), admin).await.expect(204);
    test.delete(&path, admin).await.expect(204);
    for gone in [
        path,
        format!("/identity/v3/users/{user}"),
        format!("/identity/v3/groups/{group}"),
        format!("/identity/v3/projects/{project}"),
        format!("/identity/v3/projects/{child}"),
    ] {
        test.get(&gone, admin).await.expect(404);
    }
    let query = format!("/identity/v3/role_assignments?user.id={user}");
    assert_eq!(test.get(&query, admin).await.expect(200)["role_assignments"], json!([]));
}

#[tokio::test]
async fn an_ec2_credential_keeps_its_id_when_its_keys_change_and_is_found_by_the_new_one() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let body = |access: &str| {
        let blob = json!({"access": access, "secret": format!("{access}-secret")}).to_string();
        json!({"credential": {"type": "ec2", "project_id": test.admin.project_id, "blob": blob}})
    };
    let made = test.post("/identity/v3/credentials", admin, body("first")).await.expect(201);
    let id = made["credential"]["id"].as_str().unwrap();
    // The SHA-256 of "first".
    assert_eq!(id, "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e");
    test.post("/identity/v3/credentials", admin, body("first")).await.expect(409);
    let path = format!("/identity/v3/credentials/{id}");
    let new = json!({"credential": {"blob": body("second")["credential"]["blob"]}});
    let changed = test.call(Method::PATCH, &path, admin, new.clone()).await.expect(200);
    assert_eq!(changed["credential"]["id"], id);
    let find = async |access: &str| {
        let found = super::credentials::of_access_key(&test.app, access).await.unwrap();
        found.map(|pair| pair.secret)
    };
    assert_eq!(find("first").await, None);
    assert_eq!(find("second").await.as_deref(), Some("second-secret"));
    // The first key is free again; that of another isn't.
    let body = json!({"credential": {"type": "ec2", "project_id": test.admin.project_id,
        "blob": json!({"access": "third", "secret": "s"}).to_string()}});
    let third = test.post("/identity/v3/credentials", admin, body).await.expect(201);
    let path = format!("/identity/v3/credentials/{}", third["credential"]["id"].as_str().unwrap());
    test.call(Method::PATCH, &path, admin, new).await.expect(409);
}
