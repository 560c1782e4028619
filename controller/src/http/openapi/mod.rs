//! `GET /openapi.json`: OpenAPI 3.1 of every route, checked in as docs/openapi.json.
//!
//! The file is made of the router itself and of the tables of who may do what ([`crate::policy`]) and what bodies, queries
//! and answers say ([`crate::schema`]), by `generate`, which is part of the tests only. A test compares the two, and writes the file anew when it is run with
//! `MOTE_UPDATE=1`.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};

use crate::app::App;

#[cfg(test)]
pub(crate) mod generate;

/// The document, with [`SERVER`] as its server.
const DOCUMENT: &str = include_str!("../../../../docs/openapi.json");
/// The default address, which becomes the public URL.
const SERVER: &str = "\"http://127.0.0.1:8774\"";

/// The document.
pub async fn document(State(app): State<App>) -> Response {
    let server = serde_json::Value::from(app.config.public_url.as_str()).to_string();
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, DOCUMENT.replacen(SERVER, &server, 1)).into_response()
}
