//! What answers say: part of the tests only, in which [`watch`] holds every answer of every handler against these tables.
//! docs/openapi.json is rendered from them.

use axum::{
    body::{Body, to_bytes},
    extract::{MatchedPath, Request},
    middleware::Next,
    response::Response,
};
use http::{header, response::Parts};
use serde_json::{Value, json};

use super::{TEXT, Type, body_of, fits};
use crate::policy::{self, Rule};

mod compute;
mod identity;
mod image;
mod mote;
mod network;

/// Method, path below the service's, status and body of each answer that is no error.
pub(crate) type Row = (&'static str, &'static str, &'static [(u16, Type)]);

/// The services' paths and rows; what belongs to none comes last.
pub(crate) const TABLES: &[(&str, &[Row])] = &[
    ("/identity", identity::ANSWERS),
    ("/image", image::ANSWERS),
    ("/compute", compute::ANSWERS),
    ("/network", network::ANSWERS),
    ("", mote::ANSWERS),
];

const INTEGER: Type = Type::Number(i64::MIN, i64::MAX);
/// To other pages.
const LINKS: Type = Type::Each(&Type::Shown(&[("href", TEXT), ("rel", TEXT)]));
/// Keystone's link of a thing, and of a list.
const SELF: Type = Type::Shown(&[("self", TEXT)]);
const PAGE: Type =
    Type::Shown(&[("next", Type::Maybe(&TEXT)), ("previous", Type::Maybe(&TEXT)), ("self", TEXT)]);

/// 204.
const NONE: &[(u16, Type)] = &[(204, Type::Null)];
const TAGS: &[(u16, Type)] = &[(200, Type::Shown(&[("tags", Type::Each(&TEXT))]))];

/// Largest answer that is looked at.
const MAX_ANSWER: usize = 64 << 20;

/// The answers of a route that are no errors.
pub(crate) fn of(method: &str, path: &str) -> Option<&'static [(u16, Type)]> {
    let in_table = |(service, rows): &(&str, &'static [Row])| {
        let below = path.strip_prefix(service)?;
        rows.iter().find(|(m, p, _)| m.eq_ignore_ascii_case(method) && *p == below).map(|row| row.2)
    };
    TABLES.iter().find_map(in_table)
}

/// The errors that a route can answer.
pub(crate) fn errors(method: &str, path: &str) -> Vec<u16> {
    let method = method.to_ascii_uppercase();
    let (compute, network) = (path.starts_with("/compute"), path.starts_with("/network"));
    let rule = policy::rule_of(&method, path);
    let asks_who =
        !matches!(rule, Some(Rule::Public)) || path.ends_with("/auth/tokens") || path.ends_with("/password");
    let body = body_of(&method, path);
    let writes = method != "GET";
    let all = [
        (400, true),
        (401, asks_who),
        (403, asks_who),
        (404, true),
        (405, network && path.starts_with("/network/v2.0/security-group-rules/")),
        (406, compute),
        (408, true),
        (409, writes || path.ends_with("/console")),
        (410, path.starts_with("/image")),
        (412, network && ["PUT", "DELETE"].contains(&method.as_str())),
        (413, body.is_some() || path.starts_with("/image")),
        (415, body.is_some()),
        (416, path == "/image/v2/images/{id}/file" && !writes),
        (429, true),
        (501, compute && (writes || path.ends_with("/uptime"))),
        (503, true),
    ];
    all.into_iter().filter(|(_, is)| *is).map(|(status, _)| status).collect()
}

/// Looks at every answer.
pub(crate) async fn watch(request: Request, next: Next) -> Response {
    let method = request.method().as_str().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let response = next.run(request).await;
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
    let Some(matched) = matched else { return response };
    let (head, body) = response.into_parts();
    let (body, value) = match is_json {
        true => {
            let bytes = to_bytes(body, MAX_ANSWER).await.unwrap();
            let value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            (Body::from(bytes), value)
        }
        false => (body, Value::Null),
    };
    let version = head.headers.get("openstack-api-version").and_then(|text| text.to_str().ok());
    let version: u16 = version.and_then(|text| text.rsplit('.').next()?.parse().ok()).unwrap_or(0);
    if let Some(file) = std::env::var_os("MOTE_RECORD") {
        use std::io::Write;
        let line = json!([method, matched, head.status.as_u16(), version, query, value, is_json]);
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    } else if head.status.as_u16() != 500 && method != "HEAD" {
        assert_documented(&method, &matched, &head, (&value, version));
    }
    Response::from_parts(head, body)
}

/// Fails the test whose answer isn't in the documentation.
fn assert_documented(method: &str, path: &str, head: &Parts, (value, version): (&Value, u16)) {
    let status = head.status.as_u16();
    if policy::rule_of(method, path).is_none() {
        return; // Another method than the path has.
    }
    if status >= 400 {
        assert!(
            errors(method, path).contains(&status),
            "{method} {path}: {status} is not documented: {value}"
        );
        return;
    }
    let answers = of(method, path).unwrap_or_default();
    let of = answers.iter().find(|answer| answer.0 == status);
    let (_, of) = of.unwrap_or_else(|| panic!("{method} {path}: {status} is not documented: {value}"));
    if let Err(wrong) = fits(of, "body", value, version) {
        panic!("{method} {path}: {status} is not as documented: {wrong:?} in {value}");
    }
}
