//! How docs/openapi.json is made.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::bodies::{BODIES, Kind, QUERIES};
use crate::{
    app,
    policy::{self, Rule},
};

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];
/// Methods by path, as the router's own description has them: there is no other way to ask it.
pub(crate) fn routes() -> BTreeMap<String, Vec<&'static str>> {
    let text = format!("{:?}", app::api());
    let (routes, rest) = text.split_once("routes: {").unwrap().1.split_once("node: Node { paths: {").unwrap();
    let paths = rest.split_once('}').map(|_| rest.split("} }").next().unwrap()).unwrap();
    let mut found = BTreeMap::new();
    for entry in paths.split("RouteId(").skip(1) {
        let (id, path) = entry.split_once("): \"").unwrap();
        let path = path.split('"').next().unwrap().to_owned();
        let start = routes.find(&format!("RouteId({id}): MethodRouter")).unwrap();
        let description = &routes[start..][..routes[start..].find("allow_header").unwrap()];
        let methods = METHODS.into_iter().filter(|method| !description.contains(&format!("{method}: None")));
        found.insert(path, methods.collect());
    }
    found
}

fn document() -> Value {
    let mut paths = Map::new();
    for (path, methods) in routes() {
        let mut item = Map::new();
        let parameters = parameters(&path);
        if !parameters.is_empty() {
            item.insert("parameters".into(), Value::Array(parameters));
        }
        for method in methods {
            item.insert(method.into(), operation(method, &path));
        }
        paths.insert(path, Value::Object(item));
    }
    let text = || json!({"type": "string"});
    let fault = json!({
        "type": "object", "required": ["code", "message"], "properties": {"code": {"type": "integer"}, "message": text()},
    });
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Mote", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0"}},
        "servers": [{"url": super::SERVER.trim_matches('"')}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": "X-Auth-Token"},
                "host": {"type": "http", "scheme": "bearer"},
            },
            "responses": error_responses(),
            "schemas": {
                "Error": {
                    "type": "object", "required": ["error"],
                    "properties": {"error": {
                        "type": "object", "required": ["code", "title", "message"],
                        "properties": {"code": {"type": "integer"}, "title": text(), "message": text()},
                    }},
                },
                "ComputeFault": {
                    "description": "One property, named by the kind of fault.",
                    "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": fault,
                },
                "NeutronError": {
                    "type": "object", "required": ["NeutronError"],
                    "properties": {"NeutronError": {
                        "type": "object", "required": ["type", "message", "detail"],
                        "properties": {"type": text(), "message": text(), "detail": text()},
                    }},
                },
            },
        },
    })
}

fn parameters(path: &str) -> Vec<Value> {
    path.split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}))
        .collect()
}

fn schema(kind: Kind) -> Value {
    match kind {
        Kind::Text => json!({"type": "string"}),
        Kind::Perhaps => json!({"type": ["string", "null"]}),
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Number => json!({"type": "integer"}),
        Kind::Object => json!({"type": "object"}),
        Kind::Texts => json!({"type": "array", "items": {"type": "string"}}),
        Kind::Objects => json!({"type": "array", "items": {"type": "object"}}),
    }
}

/// The collection that a path belongs to: itself, or what it is one of.
fn collection(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some((collection, last)) if last.starts_with('{') => collection,
        _ => path,
    }
}

fn body(method: &str, path: &str) -> Value {
    let octets = path.ends_with("/file") || path.ends_with("/stage") || path.contains("/captures/");
    if octets {
        return json!({"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}});
    }
    if method == "patch" && path == "/image/v2/images/{id}" {
        let operation = json!({
            "type": "object", "required": ["op", "path"],
            "properties": {
                "op": {"type": "string", "enum": ["add", "remove", "replace"]}, "path": {"type": "string"}, "value": {},
            },
        });
        let schema = json!({"type": "array", "items": operation});
        return json!({"content": {"application/openstack-images-v2.1-json-patch": {"schema": schema}}});
    }
    let known = BODIES.iter().find(|(of, ..)| *of == collection(path));
    let schema = known.map_or_else(
        || json!({"type": "object"}),
        |(_, name, properties)| {
            let properties: Map<String, Value> =
                properties.iter().map(|(name, kind)| ((*name).to_owned(), schema(*kind))).collect();
            let inner = json!({"type": "object", "properties": properties});
            match name.is_empty() {
                true => inner,
                false => json!({"type": "object", "required": [name], "properties": {*name: inner}}),
            }
        },
    );
    json!({"content": {"application/json": {"schema": schema}}})
}

fn operation(method: &str, path: &str) -> Value {
    let service =
        path.split('/').nth(1).filter(|first| ["identity", "image", "compute", "network"].contains(first));
    let (tag, error_schema) = match service {
        Some(service @ "compute") => (service, "ComputeFault"),
        Some(service @ "network") => (service, "NeutronError"),
        Some(service) => (service, "Error"),
        None => ("mote", "Error"),
    };
    let mut operation = json!({
        "operationId": format!("{method} {path}"),
        "tags": [tag],
        "responses": responses(method, path, error_schema),
    });
    let rule = policy::rule_of(method, path).unwrap();
    operation["description"] = json!(format!("Who may: {}.", rule.words()));
    match rule {
        // A host that joins has no secret yet.
        Rule::Host if path == "/mote/v1/hosts" => {}
        Rule::Host => operation["security"] = json!([{"host": []}]),
        Rule::Public | Rule::Console => {}
        _ if path == "/metrics" => {}
        _ => operation["security"] = json!([{"token": []}]),
    }
    if ["post", "put", "patch"].contains(&method) {
        operation["requestBody"] = body(method, path);
    }
    if let Some((_, parameters)) = QUERIES.iter().find(|(of, _)| method == "get" && *of == path) {
        let parameter =
            |(name, kind): &(&str, Kind)| json!({"name": name, "in": "query", "schema": schema(*kind)});
        operation["parameters"] = parameters.iter().map(parameter).collect();
    }
    operation
}

/// Errors that all services have.
const ERRORS: [(&str, &str); 15] = [
    ("400", "The request makes no sense; the text says why"),
    ("401", "No valid token, or a wrong password"),
    ("403", "Not allowed"),
    ("404", "Does not exist, or is not yours to see"),
    ("405", "Not with this method"),
    ("406", "No such version of the API"),
    ("408", "The body did not arrive in time"),
    ("409", "Not in the present state"),
    ("410", "Was deleted meanwhile"),
    ("412", "Not of the revision that the request named"),
    ("413", "The body is too large, or there are too many"),
    ("415", "The body is of another type"),
    ("429", "Too often"),
    ("501", "A part of the API that Mote does not have"),
    ("503", "Can't be answered now"),
];

fn responses(method: &str, path: &str, error_schema: &str) -> Value {
    let done: &[&str] = match method {
        "get" => &["200", "204", "206", "300"],
        "patch" => &["200"],
        "delete" => &["200", "202", "204"],
        _ => &["200", "201", "202", "204"],
    };
    let mut responses: Map<String, Value> =
        done.iter().map(|status| ((*status).to_owned(), json!({"description": "Done"}))).collect();
    for (status, _) in ERRORS {
        let elsewhere = (status == "501" && !path.starts_with("/compute"))
            || (status == "410" && !path.starts_with("/image"))
            || (status == "412" && !(path.starts_with("/network") && ["put", "delete"].contains(&method)));
        if !elsewhere {
            let name = format!("#/components/responses/{error_schema}{status}");
            responses.insert(status.into(), json!({ "$ref": name }));
        }
    }
    if path.ends_with("/file") && method == "get" {
        responses.insert("416".into(), json!({"description": "The range is outside of the image"}));
    }
    Value::Object(responses)
}

/// The answers that [`responses`] refers to.
fn error_responses() -> Value {
    let mut all = Map::new();
    for schema in ["Error", "ComputeFault", "NeutronError"] {
        for (status, text) in ERRORS {
            let content =
                json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}});
            all.insert(format!("{schema}{status}"), json!({"description": text, "content": content}));
        }
    }
    Value::Object(all)
}

/// JSON with a line for each path, so that a change of one is a change of one line.
fn lines(document: &Value) -> String {
    let object = |value: &Value| value.as_object().unwrap().clone();
    let paths: Vec<String> =
        object(&document["paths"]).iter().map(|(path, item)| format!("{}:{item}", json!(path))).collect();
    let members = object(document).into_iter().map(|(name, value)| match name.as_str() {
        "paths" => format!("\"paths\":{{\n{}\n}}", paths.join(",\n")),
        _ => format!("{}:{value}", json!(name)),
    });
    format!("{{\n{}\n}}\n", members.collect::<Vec<_>>().join(",\n"))
}

#[test]
fn the_document_is_that_of_the_router() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let wanted = lines(&document());
    if std::env::var_os("MOTE_UPDATE").is_some() {
        std::fs::write(path, &wanted).unwrap();
        return;
    }
    let there = std::fs::read_to_string(path).unwrap();
    assert!(there == wanted, "docs/openapi.json is not up to date: run this test with MOTE_UPDATE=1");
}

#[test]
fn bodies_and_queries_are_those_of_routes() {
    let routes = routes();
    assert!(routes.len() > 150 && routes["/compute/v2.1/servers"] == ["get", "post"], "{routes:?}");
    for (path, ..) in BODIES {
        assert!(
            routes.contains_key(*path) || routes.keys().any(|known| collection(known) == *path),
            "{path}"
        );
    }
    for (path, _) in QUERIES {
        assert!(routes[*path].contains(&"get"), "{path}");
    }
}
