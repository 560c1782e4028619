//! Which endpoints a project's catalog has.

use std::collections::BTreeSet;

use http::Method;
use serde_json::{Value, json};

use crate::testing::TestApp;

const BASE: &str = "/identity/v3/OS-EP-FILTER";

/// The type of service and the interface of each endpoint.
fn endpoints(catalog: &Value) -> BTreeSet<String> {
    let of = |service: &Value| {
        let kind = service["type"].as_str().unwrap().to_owned();
        let interfaces = service["endpoints"].as_array().unwrap().clone();
        interfaces.into_iter().map(move |one| format!("{kind} {}", one["interface"].as_str().unwrap()))
    };
    catalog.as_array().unwrap().iter().flat_map(of).collect()
}

impl TestApp {
    /// What a token's catalog has, as it is asked for and as a new token brings it.
    async fn catalog(&self, user: &str, token: &str) -> BTreeSet<String> {
        let asked = self.get("/identity/v3/auth/catalog", token).await.expect(200);
        let scope = json!({"project": {"name": user, "domain": {"id": "default"}}});
        let issued = self.log_in(user, "pw", scope).await.expect(201);
        assert_eq!(issued["token"]["catalog"], asked["catalog"]);
        endpoints(&asked["catalog"])
    }

    async fn endpoint(&self, kind: &str, interface: &str) -> String {
        let services = self.get(&format!("/identity/v3/services?type={kind}"), &self.admin_token).await;
        let service = services.expect(200)["services"][0]["id"].as_str().unwrap().to_owned();
        let path = format!("/identity/v3/endpoints?service_id={service}&interface={interface}");
        let endpoints = self.get(&path, &self.admin_token).await.expect(200);
        endpoints["endpoints"][0]["id"].as_str().unwrap().to_owned()
    }

    async fn ask(&self, method: Method, path: &str, status: u16) -> Value {
        self.call(method, &format!("{BASE}/{path}"), &self.admin_token, Value::Null).await.expect(status)
    }
}

fn set(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|one| (*one).to_owned()).collect()
}

#[tokio::test]
async fn a_project_sees_the_endpoints_that_it_is_associated_with_or_all() {
    let test = TestApp::new().await;
    let (project, token) = test.tenant("t1", "reader").await;
    let (_, other) = test.tenant("t2", "reader").await;
    let all = test.catalog("t1", &token).await;
    assert_eq!(all.len(), 12);
    let identity = test.endpoint("identity", "public").await;
    let image = test.endpoint("image", "public").await;
    let at = |endpoint: &str| format!("projects/{project}/endpoints/{endpoint}");
    test.ask(Method::GET, &at(&identity), 404).await;
    test.ask(Method::PUT, &at(&identity), 204).await;
    test.ask(Method::PUT, &at(&identity), 409).await;
    test.ask(Method::GET, &at(&identity), 204).await;
    test.ask(Method::HEAD, &at(&identity), 204).await;
    assert_eq!(test.catalog("t1", &token).await, set(&["identity public"]));
    // Others, and tokens without a project, see all.
    assert_eq!(test.catalog("t2", &other).await, all);
    let scope = json!({"system": {"all": true}});
    let system = test.log_in("admin", "adminpw", scope).await.expect(201);
    assert_eq!(endpoints(&system["token"]["catalog"]), all);
    test.ask(Method::PUT, &at(&image), 204).await;
    assert_eq!(test.catalog("t1", &token).await, set(&["identity public", "image public"]));
    let listed = test.ask(Method::GET, &format!("projects/{project}/endpoints"), 200).await;
    assert_eq!(listed["endpoints"].as_array().unwrap().len(), 2);
    let listed = test.ask(Method::GET, &format!("endpoints/{image}/projects"), 200).await;
    assert_eq!(
        (&listed["projects"][0]["id"], listed["projects"].as_array().unwrap().len()),
        (&json!(project), 1)
    );
    // One that is off is seen by nobody, and is still what the project is associated with.
    test.ask(Method::DELETE, &at(&identity), 204).await;
    let off = json!({"endpoint": {"enabled": false}});
    let path = format!("/identity/v3/endpoints/{image}");
    test.call(Method::PATCH, &path, &test.admin_token, off).await.expect(200);
    assert_eq!(test.catalog("t1", &token).await, set(&[]));
    // The endpoint goes, and the association with it: all are seen again.
    test.delete(&path, &test.admin_token).await.expect(204);
    test.ask(Method::DELETE, &at(&image), 404).await;
    assert_eq!(test.catalog("t1", &token).await.len(), 11);
    for path in [at("nothing"), format!("projects/nothing/endpoints/{identity}")] {
        test.ask(Method::PUT, &path, 404).await;
    }
    test.ask(Method::GET, "projects/nothing/endpoints", 404).await;
    test.ask(Method::GET, "endpoints/nothing/projects", 404).await;
    let answer = test.call(Method::PUT, &format!("{BASE}/{}", at(&identity)), &token, Value::Null).await;
    assert_eq!(answer.status, 403);
}

#[tokio::test]
async fn a_group_of_endpoints_is_whatever_its_filters_choose_now() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let (project, token) = test.tenant("t1", "reader").await;
    let groups = format!("{BASE}/endpoint_groups");
    let identity = test.endpoint("identity", "admin").await;
    let service = test.get(&format!("/identity/v3/endpoints/{identity}"), admin).await.expect(200);
    let service = service["endpoint"]["service_id"].clone();
    for (filters, status) in [
        (json!({}), 400),
        (json!({"enabled": true}), 400),
        (json!({"interface": "outer"}), 400),
        (json!("all"), 400),
    ] {
        let body = json!({"endpoint_group": {"name": "g", "filters": filters}});
        test.post(&groups, admin, body).await.expect(status);
    }
    test.post(&groups, admin, json!({"endpoint_group": {"name": "g"}})).await.expect(400);
    let body = json!({"endpoint_group": {"name": "g", "description": "d",
        "filters": {"interface": "admin", "region_id": "RegionOne"}}});
    let made = test.post(&groups, admin, body).await.expect(201)["endpoint_group"].clone();
    let id = made["id"].as_str().unwrap();
    let of = |rest: &str| format!("endpoint_groups/{id}{rest}");
    assert_eq!(test.ask(Method::GET, &of(""), 200).await["endpoint_group"], made);
    let listed = test.ask(Method::GET, "endpoint_groups?name=g", 200).await;
    assert_eq!(listed["endpoint_groups"], json!([made]));
    assert_eq!(test.ask(Method::GET, "endpoint_groups?name=h", 200).await["endpoint_groups"], json!([]));
    let within = test.ask(Method::GET, &of("/endpoints"), 200).await;
    assert_eq!(within["endpoints"].as_array().unwrap().len(), 4);
    // Associated with a project.
    let association = of(&format!("/projects/{project}"));
    test.ask(Method::GET, &association, 404).await;
    test.ask(Method::PUT, &association, 204).await;
    test.ask(Method::PUT, &association, 409).await;
    let shown = test.ask(Method::GET, &association, 200).await;
    assert_eq!(shown["project_endpoint_group"]["project_id"], json!(project));
    let listed = test.ask(Method::GET, &of("/projects"), 200).await;
    assert_eq!(listed["projects"][0]["id"], json!(project));
    let listed = test.ask(Method::GET, &format!("projects/{project}/endpoint_groups"), 200).await;
    assert_eq!(listed["endpoint_groups"], json!([made]));
    let admins = set(&["compute admin", "identity admin", "image admin", "network admin"]);
    assert_eq!(test.catalog("t1", &token).await, admins);
    // Beside an endpoint of the project's own.
    let public = test.endpoint("image", "public").await;
    test.ask(Method::PUT, &format!("projects/{project}/endpoints/{public}"), 204).await;
    let both = test.catalog("t1", &token).await;
    assert_eq!(both, admins.union(&set(&["image public"])).cloned().collect());
    // Changed filters, and a new endpoint, act at once.
    let change = json!({"endpoint_group": {"filters": {"service_id": service, "interface": "internal"}}});
    let path = format!("{BASE}/{}", of(""));
    let changed = test.call(Method::PATCH, &path, admin, change).await.expect(200);
    assert_eq!(
        (&changed["endpoint_group"]["name"], &changed["endpoint_group"]["description"]),
        (&json!("g"), &json!("d"))
    );
    assert_eq!(test.catalog("t1", &token).await, set(&["identity internal", "image public"]));
    let new = json!({"endpoint": {"service_id": service, "interface": "internal", "url": "http://second"}});
    test.post("/identity/v3/endpoints", admin, new).await.expect(201);
    let listed = test.ask(Method::GET, &format!("projects/{project}/endpoints"), 200).await;
    assert_eq!(listed["endpoints"].as_array().unwrap().len(), 3);
    let empty = json!({"endpoint_group": {"filters": {}}});
    test.call(Method::PATCH, &path, admin, empty).await.expect(400);
    // Gone from the project, and gone at all.
    test.ask(Method::DELETE, &association, 204).await;
    test.ask(Method::DELETE, &association, 404).await;
    assert_eq!(test.catalog("t1", &token).await, set(&["image public"]));
    test.ask(Method::PUT, &association, 204).await;
    test.ask(Method::DELETE, &of(""), 204).await;
    test.ask(Method::GET, &of(""), 404).await;
    assert_eq!(test.catalog("t1", &token).await, set(&["image public"]));
    // The project goes with its associations.
    test.delete(&format!("/identity/v3/projects/{project}"), admin).await.expect(204);
    let listed = test.ask(Method::GET, &format!("endpoints/{public}/projects"), 200).await;
    assert_eq!(listed["projects"], json!([]));
}
