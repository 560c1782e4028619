//! How docs/openapi.json is made.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    app,
    image::patch::MEDIA_TYPE as PATCH,
    policy::{self, Rule},
    schema::{self, Type, answers, queries, render},
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

/// What the table of bodies has for a route.
fn body(method: &str, path: &str) -> Option<Value> {
    let of = schema::body_of(method, path)?;
    let media = match of {
        Type::Octets => "application/octet-stream",
        _ if (method, path) == ("patch", "/image/v2/images/{id}") => PATCH,
        _ => "application/json",
    };
    let content = json!({media: {"schema": render::schema(of)}});
    Some(json!({"required": !matches!(of, Type::Optional(_)), "content": content}))
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
    if let Some(body) = body(method, path) {
        operation["requestBody"] = body;
    }
    let of_table = queries::of(method, path).unwrap_or_default();
    let mut parameters: Vec<(String, Value)> =
        of_table.iter().map(|(name, of)| ((*name).to_owned(), render::schema(of))).collect();
    if method == "get" {
        parameters.extend(queries::of_network(path));
    }
    if !parameters.is_empty() {
        let parameter = |(name, schema)| json!({"name": name, "in": "query", "schema": schema});
        operation["parameters"] = parameters.into_iter().map(parameter).collect();
    }
    operation
}

/// What errors mean; which of them a route can answer says [`answers::errors`].
const ERRORS: [(u16, &str); 16] = [
    (400, "The request makes no sense; the text says why"),
    (401, "No valid token, or a wrong password"),
    (403, "Not allowed"),
    (404, "Does not exist, or is not yours to see"),
    (405, "Not with this method"),
    (406, "No such version of the API"),
    (408, "The body did not arrive in time"),
    (409, "Not in the present state"),
    (410, "Was deleted meanwhile"),
    (412, "Not of the revision that the request named"),
    (413, "The body is too large, or there are too many"),
    (415, "The body is of another type"),
    (416, "The range is outside of the image"),
    (429, "Too often"),
    (501, "A part of the API that Mote does not have"),
    (503, "Can't be answered now"),
];

fn responses(method: &str, path: &str, error_schema: &str) -> Value {
    let mut responses = Map::new();
    for (status, of) in answers::of(method, path).unwrap_or_default() {
        let media = match of {
            Type::Octets if path == "/metrics" => "text/plain",
            Type::Octets if path.ends_with("/events") => "text/event-stream",
            Type::Octets => "application/octet-stream",
            _ => "application/json",
        };
        let mut response = json!({"description": "Done"});
        if !matches!(of, Type::Null) {
            response["content"] = json!({media: {"schema": render::schema(of)}});
        }
        responses.insert(status.to_string(), response);
    }
    for status in answers::errors(method, path) {
        let name = format!("#/components/responses/{error_schema}{status}");
        responses.insert(status.to_string(), json!({ "$ref": name }));
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

/// Names what more than one answer has, so that each is described once: moves it to `components`.
fn hoist(document: &mut Value) {
    let mut found: BTreeMap<String, (String, usize)> = BTreeMap::new();
    each_object(&mut document["paths"], "", &mut |name, schema| {
        found.entry(schema.to_string()).or_insert_with(|| (name.to_owned(), 0)).1 += 1;
    });
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for (schema, (name, count)) in found {
        if count > 1 {
            let number = names.values().filter(|known| known.split('.').next() == Some(&name)).count();
            let name = if number == 0 { name } else { format!("{name}.{}", number + 1) };
            document["components"]["schemas"][&name] = schema.parse().unwrap();
            names.insert(schema, name);
        }
    }
    each_object(&mut document["paths"], "", &mut |_, schema| {
        if let Some(name) = names.get(&schema.to_string()) {
            *schema = json!({"$ref": format!("#/components/schemas/{name}")});
        }
    });
}

/// Calls `each` for every schema of an object with several members, with the name of what has it.
fn each_object(value: &mut Value, name: &str, each: &mut dyn FnMut(&str, &mut Value)) {
    const LEAST: usize = 4;
    match value {
        Value::Array(list) => list.iter_mut().for_each(|one| each_object(one, name, each)),
        Value::Object(members)
            if members
                .get("properties")
                .and_then(Value::as_object)
                .is_some_and(|members| members.len() >= LEAST) =>
        {
            each(name, value);
        }
        Value::Object(members) => {
            for (key, value) in members {
                let keyword = ["schema", "items", "anyOf", "properties", "content", "responses"]
                    .contains(&key.as_str());
                let service = key.strip_prefix('/').map(|path| path.split('/').next().unwrap_or_default());
                let name = match service {
                    Some(service) => service.to_owned(),
                    None if keyword || key.contains('/') || key.parse::<u16>().is_ok() => name.to_owned(),
                    None => {
                        let service = name.split('_').next().unwrap_or_default();
                        format!("{service}_{}", key.trim_end_matches('s').replace([':', '/'], "_"))
                    }
                };
                each_object(value, &name, each);
            }
        }
        _ => {}
    }
}

/// JSON with a line for each path and component, so that a change of one is a change of one line.
fn lines(document: &Value) -> String {
    let each = |value: &Value, line: &dyn Fn(&str, &Value) -> String| {
        let members = value.as_object().unwrap().iter().map(|(name, value)| line(name, value));
        format!("{{\n{}\n}}", members.collect::<Vec<_>>().join(",\n"))
    };
    let plain = |name: &str, value: &Value| format!("{}:{value}", json!(name));
    let components = |name: &str, value: &Value| format!("{}:{}", json!(name), each(value, &plain));
    let members = |name: &str, value: &Value| match name {
        "paths" => format!("\"paths\":{}", each(value, &plain)),
        "components" => format!("\"components\":{}", each(value, &components)),
        _ => plain(name, value),
    };
    each(document, &members) + "\n"
}

#[test]
fn the_document_is_that_of_the_router() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let mut document = document();
    hoist(&mut document);
    let wanted = lines(&document);
    if std::env::var_os("MOTE_UPDATE").is_some() {
        std::fs::write(path, &wanted).unwrap();
        return;
    }
    let there = std::fs::read_to_string(path).unwrap();
    assert!(there == wanted, "docs/openapi.json is not up to date: run this test with MOTE_UPDATE=1");
}

#[test]
fn tables_are_those_of_routes() {
    let routes = routes();
    assert!(routes.len() > 150 && routes["/compute/v2.1/servers"] == ["get", "post"], "{routes:?}");
    for (service, rows) in schema::TABLES {
        for (method, path, _) in *rows {
            let known = routes.get(&format!("{service}{path}"));
            let method = method.to_ascii_lowercase();
            assert!(
                known.is_some_and(|methods| methods.contains(&method.as_str())),
                "{method} {service}{path}"
            );
        }
    }
    for (path, methods) in &routes {
        for method in methods {
            assert!(answers::of(method, path).is_some(), "no answer is known of {method} {path}");
        }
    }
    for (row, _) in queries::QUERIES {
        let (method, path) = row.split_once(' ').unwrap_or(("GET", row));
        let method = method.to_ascii_lowercase();
        assert!(routes[path].contains(&method.as_str()), "{row}");
    }
}
