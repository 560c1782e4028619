//! Nova's version documents, and the negotiation of microversions.

use axum::{
    Json, Router,
    extract::{FromRequestParts, OriginalUri, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, HeaderValue, header, request::Parts};
use serde_json::{Value, json};

use crate::{app::App, config::Config, http::error::ApiError};

/// The first microversion, and what a request gets that asks for none.
const MIN: Version = Version(1);
/// The newest. Every difference up to it holds for what there is here; what a version adds to something that is not
/// there (volumes, live migration, NUMA) is refused as that is.
const MAX: Version = Version(90);
const GENERAL: &str = "openstack-api-version";
const LEGACY: &str = "x-openstack-nova-api-version";
/// The headers that ask for a microversion.
pub(crate) const HEADERS: [&str; 2] = [GENERAL, LEGACY];

/// The microversion of a request: `Version(90)` is 2.90. As an argument of a handler it is the one that was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u16);

impl Version {
    /// Whether this version has what 2.`minor` brought.
    pub(crate) fn has(self, minor: u16) -> bool {
        self.0 >= minor
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "2.{}", self.0)
    }
}

impl<S: Sync> FromRequestParts<S> for Version {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Self>().copied().unwrap_or(MIN))
    }
}

/// Routes below `/compute`; they need no token.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/", get(versions)).route("/v2", get(older)).route("/v2.1", get(version))
}

fn v2_1(config: &Config) -> Value {
    json!({
        "id": "v2.1",
        "status": "CURRENT",
        "version": MAX.to_string(),
        "min_version": MIN.to_string(),
        "updated": "2013-07-23T11:33:21Z",
        "links": [{"rel": "self", "href": format!("{}/compute/v2.1/", config.public_url)}],
    })
}

/// The API without microversions; what is below it is what 2.1 has, see `http::middleware`.
fn v2(config: &Config) -> Value {
    json!({
        "id": "v2.0",
        "status": "SUPPORTED",
        "version": "",
        "min_version": "",
        "updated": "2011-01-21T11:33:21Z",
        "links": [{"rel": "self", "href": format!("{}/compute/v2/", config.public_url)}],
    })
}

async fn versions(State(app): State<App>) -> Json<Value> {
    Json(json!({"versions": [v2(&app.config), v2_1(&app.config)]}))
}

async fn older(State(app): State<App>) -> Json<Value> {
    let mut version = v2(&app.config);
    version["media-types"] =
        json!([{"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2"}]);
    Json(json!({"version": version}))
}

async fn version(State(app): State<App>) -> Json<Value> {
    let mut version = v2_1(&app.config);
    version["media-types"] =
        json!([{"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2.1"}]);
    Json(json!({"version": version}))
}

/// Finds out which microversion is wanted, refuses those that aren't there, and says in every answer which one it is.
pub(super) async fn negotiate(mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<OriginalUri>().map_or(request.uri().path(), |uri| uri.0.path());
    let is_document = matches!(path.trim_end_matches('/'), "/compute" | "/compute/v2" | "/compute/v2.1");
    let wanted = if is_document { Ok(MIN) } else { wanted(request.headers()) };
    let (mut response, version) = match wanted {
        Ok(version) => {
            request.extensions_mut().insert(version);
            (next.run(request).await, version)
        }
        Err(error) => (error.into_response(), MIN),
    };
    let headers = response.headers_mut();
    for (name, text) in [(GENERAL, format!("compute {version}")), (LEGACY, version.to_string())] {
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(name, value);
        }
    }
    headers.append(
        header::VARY,
        HeaderValue::from_static("OpenStack-API-Version, X-OpenStack-Nova-API-Version"),
    );
    response
}

/// The general header goes before the older one, as in Nova.
fn wanted(headers: &HeaderMap) -> Result<Version, ApiError> {
    let text = |value: &HeaderValue| value.to_str().unwrap_or("?").to_owned();
    let general: Vec<String> = headers.get_all(GENERAL).iter().map(text).collect();
    let of_compute = general.iter().flat_map(|value| value.split(',')).find_map(|part| {
        let (service, version) = part.trim().split_once(' ')?;
        service.eq_ignore_ascii_case("compute").then(|| version.trim().to_owned())
    });
    let Some(wanted) = of_compute.or_else(|| headers.get(LEGACY).map(text)) else { return Ok(MIN) };
    if wanted == "latest" {
        return Ok(MAX);
    }
    let number = |text: &str| -> Option<u16> {
        let digits = !text.is_empty() && text.len() < 6 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(u16::MAX))
    };
    let parts = wanted.split_once('.').and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
    match parts {
        Some((2, minor)) if (MIN..=MAX).contains(&Version(minor)) => Ok(Version(minor)),
        Some(_) => Err(ApiError::NotAcceptable(format!(
            "Version {wanted} is not supported by the API. Minimum is {MIN} and maximum is {MAX}."
        ))),
        None => Err(ApiError::BadRequest(
            "API Version String is of invalid format. It must be of format MajorNum.MinorNum.".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;
    use crate::testing::{Answer, TestApp};

    async fn ask(test: &TestApp, name: &str, value: &str) -> Answer {
        let request = Request::get("/compute/v2.1/flavors").header("x-auth-token", &test.admin_token);
        test.send(request.header(name, value).body(Body::empty()).unwrap()).await
    }

    #[tokio::test]
    async fn documents_name_the_range_and_need_no_token() {
        let test = TestApp::new().await;
        for path in ["/compute", "/compute/"] {
            let list = test.get(path, "").await.expect(200);
            assert_eq!(list["versions"][0]["id"], "v2.0");
            assert_eq!(list["versions"][1]["version"], MAX.to_string());
        }
        for path in ["/compute/v2.1", "/compute/v2.1/"] {
            let one = test.get(path, "").await.expect(200);
            assert_eq!(
                (&one["version"]["min_version"], &one["version"]["version"]),
                (&json!("2.1"), &json!(MAX.to_string()))
            );
            assert_eq!(one["version"]["links"][0]["href"], "http://cloud.test:8774/compute/v2.1/");
        }
    }

    #[tokio::test]
    async fn versions_are_negotiated_and_answers_name_theirs() {
        let test = TestApp::new().await;
        let newest = MAX.to_string();
        let newer = Version(MAX.0 + 1).to_string();
        for (name, value, status, answered) in [
            (GENERAL, "compute 2.1", 200, "2.1"),
            (GENERAL, "compute latest", 200, &newest),
            (GENERAL, "volume 3.60", 200, "2.1"),
            (GENERAL, "volume 3.60, compute 2.53", 200, "2.53"),
            (GENERAL, &format!("compute {newer}"), 406, "2.1"),
            (GENERAL, "compute 2.0", 406, "2.1"),
            (GENERAL, "compute 3.1", 406, "2.1"),
            (GENERAL, "compute x", 400, "2.1"),
            (LEGACY, "2.1", 200, "2.1"),
            (LEGACY, "2.2", 200, "2.2"),
            (LEGACY, "2.99999", 406, "2.1"),
            (LEGACY, "2.999999", 400, "2.1"),
        ] {
            let answer = ask(&test, name, value).await;
            assert_eq!(answer.status.as_u16(), status, "{name}: {value}");
            assert_eq!(answer.header(GENERAL), format!("compute {answered}"));
            assert_eq!(answer.header(LEGACY), answered);
            assert_eq!(answer.header("vary"), "OpenStack-API-Version, X-OpenStack-Nova-API-Version");
        }
        let answer = test.get("/compute/v2.1/flavors/none", &test.admin_token).await;
        assert_eq!((answer.status.as_u16(), answer.header(LEGACY)), (404, "2.1"));
    }
}
