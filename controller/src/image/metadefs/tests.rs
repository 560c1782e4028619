//! Definitions of metadata, asked in process.

use http::{Method, Request};
use serde_json::{Value, json};

use crate::testing::TestApp;

const NAMESPACES: &str = "/image/v2/metadefs/namespaces";

fn at(rest: &str) -> String {
    format!("{NAMESPACES}/{rest}")
}

fn names<'a>(list: &'a Value, name: &str) -> Vec<&'a str> {
    list.as_array().unwrap().iter().map(|one| one[name].as_str().unwrap()).collect()
}

impl TestApp {
    async fn replace(&self, path: &str, body: Value) -> crate::testing::Answer {
        self.call(Method::PUT, path, &self.admin_token, body).await
    }
}

#[tokio::test]
async fn a_namespace_is_made_with_what_is_in_it_changed_and_deleted() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let body = json!({
        "namespace": "Own::Paint", "display_name": "Paint", "visibility": "public", "protected": true,
        "resource_type_associations": [{"name": "OS::Glance::Image", "prefix": "hw_"}, {"name": "Own::Thing"}],
        "properties": {"colour": {"title": "Colour", "type": "string", "enum": ["red", "blue"], "default": "red"}},
        "objects": [{"name": "coat", "required": ["layers"],
            "properties": {"layers": {"title": "Layers", "type": "integer", "minimum": 1}}}],
        "tags": [{"name": "wet"}],
    });
    let answer = test.post(NAMESPACES, admin, body.clone()).await;
    assert_eq!(
        answer.header("location"),
        "http://cloud.test:8774/image/v2/metadefs/namespaces/Own%3A%3APaint"
    );
    let made = answer.expect(201);
    assert_eq!((&made["owner"], &made["protected"]), (&json!(test.admin.project_id), &json!(true)));
    assert_eq!(made["self"], "/v2/metadefs/namespaces/Own::Paint");
    assert!(made.get("description").is_none(), "{made}");
    test.post(NAMESPACES, admin, body).await.expect(409);
    let shown = test.get(&at("Own::Paint"), admin).await.expect(200);
    assert_eq!(shown, made);
    assert_eq!(shown["properties"]["colour"]["enum"], json!(["red", "blue"]));
    assert_eq!(names(&shown["resource_type_associations"], "name"), ["OS::Glance::Image", "Own::Thing"]);
    // With the prefix that names have on images; none on things that have none.
    let prefixed = test.get(&at("Own::Paint?resource_type=OS::Glance::Image"), admin).await.expect(200);
    assert_eq!(prefixed["properties"]["hw_colour"], shown["properties"]["colour"]);
    assert_eq!(prefixed["objects"][0]["required"], json!(["hw_layers"]));
    assert_eq!(prefixed["objects"][0]["properties"]["hw_layers"]["minimum"], 1);
    let plain = test.get(&at("Own::Paint?resource_type=Own::Thing"), admin).await.expect(200);
    assert_eq!(plain, shown);
    // The kind of thing that was new is known now.
    let types = test.get("/image/v2/metadefs/resource_types", admin).await.expect(200);
    assert!(names(&types["resource_types"], "name").contains(&"Own::Thing"), "{types}");
    // What is protected loses nothing.
    for path in [
        "Own::Paint",
        "Own::Paint/objects",
        "Own::Paint/objects/coat",
        "Own::Paint/properties",
        "Own::Paint/properties/colour",
        "Own::Paint/tags",
        "Own::Paint/tags/wet",
        "Own::Paint/resource_types/Own::Thing",
    ] {
        test.delete(&at(path), admin).await.expect(403);
    }
    assert_eq!(test.get(&at("Own::Paint"), admin).await.expect(200), made);
    // What a change doesn't say is as in a new one; what is in it stays.
    let changed = json!({"namespace": "Own::Colours", "description": "d"});
    let changed = test.replace(&at("Own::Paint"), changed).await.expect(200);
    assert_eq!((&changed["visibility"], &changed["protected"]), (&json!("private"), &json!(false)));
    assert!(changed.get("display_name").is_none(), "{changed}");
    test.get(&at("Own::Paint"), admin).await.expect(404);
    let shown = test.get(&at("Own::Colours"), admin).await.expect(200);
    assert_eq!(shown["tags"], json!([{"name": "wet"}]));
    test.post(NAMESPACES, admin, json!({"namespace": "Other"})).await.expect(201);
    test.replace(&at("Other"), json!({"namespace": "Own::Colours"})).await.expect(409);
    test.delete(&at("Own::Colours"), admin).await.expect(204);
    test.get(&at("Own::Colours"), admin).await.expect(404);
    // Nothing of what is wrong is kept, also not the namespace around it.
    for (body, status) in [
        (json!({}), 400),
        (json!({"namespace": ""}), 400),
        (json!({"namespace": "x", "visibility": "shared"}), 400),
        (json!({"namespace": "x", "color": 1}), 400),
        (json!({"namespace": "x", "created_at": "now"}), 403),
        (json!({"namespace": "x", "properties": {"p": {"title": "t"}}}), 400),
        (json!({"namespace": "x", "tags": [{"name": "a"}, {"name": "a"}]}), 409),
        (json!({"namespace": "x", "objects": [{"name": "o", "self": "/"}]}), 403),
    ] {
        test.post(NAMESPACES, admin, body).await.expect(status);
        test.get(&at("x"), admin).await.expect(404);
    }
    test.replace(&at("Other"), json!({"namespace": "Other", "tags": []})).await.expect(400);
    test.replace(&at("Other"), json!({"namespace": "Other", "self": "/"})).await.expect(403);
}

#[tokio::test]
async fn namespaces_are_listed_by_who_may_see_them_filtered_and_in_pages() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    let (project, token) = test.tenant("t1", "reader").await;
    let (_, other) = test.tenant("t2", "member").await;
    for (name, visibility, owner, kind) in [
        ("a", "public", &test.admin.project_id, "OS::Nova::Flavor"),
        ("b", "private", &project, "OS::Nova::Server"),
        ("c", "private", &test.admin.project_id, "OS::Nova::Flavor"),
        ("d", "public", &project, "OS::Glance::Image"),
    ] {
        let body = json!({"namespace": name, "visibility": visibility, "owner": owner,
            "resource_type_associations": [{"name": kind}]});
        test.post(NAMESPACES, admin, body).await.expect(201);
    }
    let list = async |token: &str, query: &str| {
        let listed = test.get(&format!("{NAMESPACES}?{query}"), token).await.expect(200);
        names(&listed["namespaces"], "namespace").join("")
    };
    // The newest first.
    assert_eq!(list(admin, "").await, "dcba");
    assert_eq!(list(&token, "").await, "dba");
    assert_eq!(list(&other, "").await, "da");
    assert_eq!(list(admin, "sort_key=namespace&sort_dir=asc").await, "abcd");
    assert_eq!(list(&token, "visibility=private").await, "b");
    assert_eq!(list(&other, "visibility=private").await, "");
    assert_eq!(list(admin, "resource_types=OS::Nova::Flavor,OS::Glance::Image").await, "dca");
    assert_eq!(list(admin, "resource_types=nothing").await, "");
    assert_eq!(list(admin, "sort_dir=asc&marker=b").await, "cd");
    assert_eq!(list(admin, "limit=0").await, "");
    let first = test.get(&format!("{NAMESPACES}?limit=2"), &token).await.expect(200);
    assert_eq!(first["first"], "/v2/metadefs/namespaces?limit=2");
    assert_eq!(first["next"], "/v2/metadefs/namespaces?limit=2&marker=b");
    assert_eq!(first["namespaces"][0]["resource_type_associations"][0]["name"], "OS::Glance::Image");
    let next = format!("/image{}", first["next"].as_str().unwrap());
    let second = test.get(&next, &token).await.expect(200);
    assert_eq!((names(&second["namespaces"], "namespace"), second.get("next")), (vec!["a"], None));
    for (query, status) in [
        ("marker=nothing", 404),
        // Not to be told from what isn't there.
        ("marker=c", 404),
        ("limit=x", 400),
        ("limit=-1", 400),
        ("sort_dir=up", 400),
        ("sort_key=id", 400),
        ("visibility=shared", 400),
    ] {
        test.get(&format!("{NAMESPACES}?{query}"), &token).await.expect(status);
    }
    for path in ["c", "c/objects", "c/properties", "c/tags", "c/resource_types", "c/tags/t", "c/properties/p"]
    {
        test.get(&at(path), &token).await.expect(404);
    }
    // Its own it sees, and doesn't write.
    test.get(&at("b"), &token).await.expect(200);
    test.get(&at("b"), &other).await.expect(404);
    test.post(NAMESPACES, &other, json!({"namespace": "e"})).await.expect(403);
    test.post(&at("d/tags/t"), &other, Value::Null).await.expect(403);
    test.delete(&at("b"), &token).await.expect(403);
}

#[tokio::test]
async fn properties_objects_and_tags_are_made_listed_replaced_renamed_and_deleted() {
    let test = TestApp::new().await;
    let admin = test.admin_token.as_str();
    test.post(NAMESPACES, admin, json!({"namespace": "n"})).await.expect(201);
    let property =
        json!({"name": "p", "title": "P", "type": "array", "items": {"type": "string"}, "uniqueItems": true});
    let object =
        json!({"name": "o", "description": "d", "properties": {"q": {"title": "Q", "type": "boolean"}}});
    assert_eq!(test.post(&at("n/properties"), admin, property.clone()).await.expect(201), property);
    let made = test.post(&at("n/objects"), admin, object).await.expect(201);
    assert_eq!(
        (&made["self"], &made["description"]),
        (&json!("/v2/metadefs/namespaces/n/objects/o"), &json!("d"))
    );
    let tag = test.post(&at("n/tags/wet"), admin, Value::Null).await.expect(201);
    assert_eq!(tag["name"], "wet");
    // There already, or not as it has to be.
    test.post(&at("n/properties"), admin, property).await.expect(409);
    test.post(&at("n/tags/wet"), admin, Value::Null).await.expect(409);
    test.post(&at(&format!("n/tags/{}", "x".repeat(81))), admin, Value::Null).await.expect(400);
    test.post(&at("n/properties"), admin, json!({"name": "x", "title": "X"})).await.expect(400);
    test.post(&at("n/properties"), admin, json!({"name": "x", "title": "X", "type": "text"}))
        .await
        .expect(400);
    test.post(&at("n/objects"), admin, json!({"name": "x", "schema": "s"})).await.expect(403);
    test.post(&at("nothing/objects"), admin, json!({"name": "x"})).await.expect(404);
    // Looked at.
    let listed = test.get(&at("n/properties"), admin).await.expect(200);
    assert_eq!(listed["properties"]["p"]["items"]["type"], "string");
    assert_eq!(test.get(&at("n/objects"), admin).await.expect(200)["objects"], json!([made]));
    assert_eq!(test.get(&at("n/objects/o"), admin).await.expect(200), made);
    assert_eq!(test.get(&at("n/tags/wet"), admin).await.expect(200), tag);
    // On a thing with a prefix a property has another name.
    let prefix = json!({"name": "OS::Nova::Flavor", "prefix": "hw:"});
    test.post(&at("n/resource_types"), admin, prefix.clone()).await.expect(201);
    test.post(&at("n/resource_types"), admin, prefix).await.expect(409);
    let of_flavors = "resource_type=OS::Nova::Flavor";
    let shown = test.get(&at(&format!("n/properties/hw:p?{of_flavors}")), admin).await.expect(200);
    assert_eq!(shown["name"], "p");
    test.get(&at(&format!("n/properties/p?{of_flavors}")), admin).await.expect(404);
    test.get(&at("n/properties/p?resource_type=OS::Nova::Server"), admin).await.expect(404);
    // Replaced as a whole, under another name.
    let changed = test.replace(&at("n/objects/o"), json!({"name": "oo"})).await.expect(200);
    assert_eq!((&changed["name"], changed.get("description")), (&json!("oo"), None));
    assert_eq!(changed["created_at"], made["created_at"]);
    test.get(&at("n/objects/o"), admin).await.expect(404);
    test.replace(&at("n/objects/o"), json!({"name": "o"})).await.expect(404);
    test.replace(&at("n/properties/p"), json!({"name": "p", "title": "New", "type": "string"}))
        .await
        .expect(200);
    assert_eq!(test.replace(&at("n/tags/wet"), json!({"name": "dry"})).await.expect(200)["name"], "dry");
    test.post(&at("n/tags/wet"), admin, Value::Null).await.expect(201);
    test.replace(&at("n/tags/wet"), json!({"name": "dry"})).await.expect(409);
    // Tags in place of those that were, or beside them.
    let tags = json!({"tags": [{"name": "a"}, {"name": "b"}]});
    let set = test.post(&at("n/tags"), admin, tags).await.expect(201);
    assert_eq!(names(&set["tags"], "name"), ["a", "b"]);
    let append = Request::post(at("n/tags"))
        .header("x-auth-token", admin)
        .header("x-openstack-append", "True")
        .header("content-type", "application/json")
        .body(json!({"tags": [{"name": "c"}]}).to_string().into());
    test.send(append.unwrap()).await.expect(201);
    let sorted = test.get(&at("n/tags?sort_key=name&sort_dir=asc&limit=2&marker=a"), admin).await.expect(200);
    assert_eq!(names(&sorted["tags"], "name"), ["b", "c"]);
    test.get(&at("n/tags?marker=nothing"), admin).await.expect(404);
    // Gone.
    for path in ["n/properties/p", "n/objects/oo", "n/tags/a", "n/resource_types/OS::Nova::Flavor"] {
        test.delete(&at(path), admin).await.expect(204);
        test.delete(&at(path), admin).await.expect(404);
    }
    test.delete(&at("n/tags"), admin).await.expect(204);
    assert_eq!(test.get(&at("n/tags"), admin).await.expect(200)["tags"], json!([]));
    let types = test.get(&at("n/resource_types"), admin).await.expect(200);
    assert_eq!(types["resource_type_associations"], json!([]));
}

#[tokio::test]
async fn each_schema_of_metadefs_has_its_name() {
    let test = TestApp::new().await;
    let (_, token) = test.tenant("t1", "reader").await;
    for (path, name) in [
        ("namespace", "namespace"),
        ("namespaces", "namespaces"),
        ("resource_type", "resource_type_association"),
        ("resource_types", "resource_type_associations"),
        ("property", "property"),
        ("properties", "properties"),
        ("object", "object"),
        ("objects", "objects"),
        ("tag", "tag"),
        ("tags", "tags"),
    ] {
        let schema = test.get(&format!("/image/v2/schemas/metadefs/{path}"), &token).await.expect(200);
        assert_eq!(schema["name"], name);
        assert!(schema["properties"].as_object().unwrap().len() > 2, "{schema}");
    }
    test.get("/image/v2/schemas/metadefs/image", &token).await.expect(404);
}
