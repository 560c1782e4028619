//! `GET /openapi.json`: OpenAPI 3.1 of the routes that are in a table, which today is identity's
//! ([`crate::identity::policy`]), and of what is around the services.

use axum::{Json, extract::State};
use serde_json::{Map, Value, json};

use crate::{
    app::App,
    identity::policy::{POLICY, Rule},
};

/// The document.
pub async fn document(State(app): State<App>) -> Json<Value> {
    Json(openapi(&app.config.public_url))
}

fn openapi(public_url: &str) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for (method, path, rule) in POLICY {
        let path = format!("/identity{}", path.trim_end_matches('/'));
        let item = paths.entry(path.clone()).or_insert_with(|| json!({"parameters": parameters(&path)}));
        item[method.to_ascii_lowercase()] = operation(method, &path, *rule);
    }
    for (path, summary) in [
        ("/healthz", "Whether the process serves"),
        ("/readyz", "Whether requests can be answered now"),
        ("/openapi.json", "This document"),
    ] {
        let responses = json!({"200": {"description": "Yes"}, "503": error("Not now")});
        paths.insert(path.into(), json!({"get": {"summary": summary, "responses": responses}}));
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Mote", "version": env!("CARGO_PKG_VERSION")},
        "servers": [{"url": public_url}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "apiKey", "in": "header", "name": "X-Auth-Token"}},
            "schemas": {"Error": {
                "type": "object", "required": ["error"],
                "properties": {"error": {
                    "type": "object", "required": ["code", "title", "message"],
                    "properties": {
                        "code": {"type": "integer"}, "title": {"type": "string"}, "message": {"type": "string"},
                    },
                }},
            }},
        },
    })
}

fn parameters(path: &str) -> Value {
    path.split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect()
}

fn error(description: &str) -> Value {
    let schema = json!({"$ref": "#/components/schemas/Error"});
    json!({"description": description, "content": {"application/json": {"schema": schema}}})
}

fn operation(method: &str, path: &str, rule: Rule) -> Value {
    let mut responses = Map::new();
    for status in ["200", "201", "204", "300"] {
        responses.insert(status.into(), json!({"description": "Done"}));
    }
    for (status, text) in [
        ("400", "The request makes no sense; the text says why"),
        ("401", "No valid token, or a wrong password"),
        ("403", "Not allowed"),
        ("404", "Does not exist, or is not yours to see"),
        ("408", "The body did not arrive in time"),
        ("409", "Not in the present state"),
        ("413", "The body is too large"),
        ("415", "The body is not JSON"),
        ("429", "Too often"),
        ("503", "Can't be answered now"),
    ] {
        responses.insert(status.into(), error(text));
    }
    let mut operation = json!({
        "operationId": format!("{} {path}", method.to_ascii_lowercase()),
        "tags": ["identity"],
        "description": format!("Who may: {}.", rule.words()),
        "responses": responses,
    });
    if rule != Rule::Public {
        operation["security"] = json!([{"token": []}]);
    }
    if ["POST", "PUT", "PATCH"].contains(&method) {
        operation["requestBody"] = json!({"content": {"application/json": {"schema": {"type": "object"}}}});
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_of_the_table_is_an_operation_with_its_parameters() {
        let document = openapi("http://h");
        for (method, path, _) in POLICY {
            let path = format!("/identity{}", path.trim_end_matches('/'));
            let item = &document["paths"][&path];
            assert!(item[method.to_ascii_lowercase()]["responses"].is_object(), "{method} {path}");
            assert_eq!(item["parameters"].as_array().unwrap().len(), path.matches('{').count());
        }
    }
}
