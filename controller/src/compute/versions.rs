//! Nova's version documents, and the negotiation of microversions: there is 2.1, and nothing above.

use axum::{
    Json, Router,
    extract::{OriginalUri, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};

use crate::{app::App, config::Config, http::error::ApiError};

/// The only microversion.
const MICROVERSION: &str = "2.1";
const GENERAL: &str = "openstack-api-version";
const LEGACY: &str = "x-openstack-nova-api-version";

/// Routes below `/compute`; they need no token.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/", get(versions)).route("/v2.1", get(version))
}

fn v2_1(config: &Config) -> Value {
    json!({
        "id": "v2.1",
        "status": "CURRENT",
        "version": MICROVERSION,
        "min_version": MICROVERSION,
        "updated": "2013-07-23T11:33:21Z",
        "links": [{"rel": "self", "href": format!("{}/compute/v2.1/", config.public_url)}],
    })
}

async fn versions(State(app): State<App>) -> Json<Value> {
    Json(json!({"versions": [v2_1(&app.config)]}))
}

async fn version(State(app): State<App>) -> Json<Value> {
    let mut version = v2_1(&app.config);
    version["media-types"] =
        json!([{"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2.1"}]);
    Json(json!({"version": version}))
}

/// Refuses other microversions, and says in every answer which one it is.
pub(super) async fn negotiate(request: Request, next: Next) -> Response {
    let path = request.extensions().get::<OriginalUri>().map_or(request.uri().path(), |uri| uri.0.path());
    let is_document = matches!(path.trim_end_matches('/'), "/compute" | "/compute/v2.1");
    let refused = if is_document { Ok(()) } else { accepts(request.headers()) };
    let mut response = match refused {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(GENERAL, HeaderValue::from_static("compute 2.1"));
    headers.insert(LEGACY, HeaderValue::from_static(MICROVERSION));
    headers.append(
        header::VARY,
        HeaderValue::from_static("OpenStack-API-Version, X-OpenStack-Nova-API-Version"),
    );
    response
}

/// The general header goes before the older one, as in Nova.
fn accepts(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |value: &HeaderValue| value.to_str().unwrap_or("?").to_owned();
    let general: Vec<String> = headers.get_all(GENERAL).iter().map(text).collect();
    let of_compute = general.iter().flat_map(|value| value.split(',')).find_map(|part| {
        let (service, version) = part.trim().split_once(' ')?;
        service.eq_ignore_ascii_case("compute").then(|| version.trim().to_owned())
    });
    let wanted = of_compute.or_else(|| headers.get(LEGACY).map(text));
    let Some(wanted) = wanted else { return Ok(()) };
    if wanted == MICROVERSION || wanted == "latest" {
        return Ok(());
    }
    let number = |text: &str| !text.is_empty() && text.len() < 6 && text.bytes().all(|b| b.is_ascii_digit());
    match wanted.split_once('.').is_some_and(|(major, minor)| number(major) && number(minor)) {
        true => Err(ApiError::NotAcceptable(format!(
            "Version {wanted} is not supported by the API. Minimum is {MICROVERSION} and maximum is {MICROVERSION}."
        ))),
        false => Err(ApiError::BadRequest(
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
    async fn documents_name_the_one_microversion_and_need_no_token() {
        let test = TestApp::new().await;
        for path in ["/compute", "/compute/"] {
            let list = test.get(path, "").await.expect(200);
            assert_eq!(list["versions"][0]["version"], "2.1");
        }
        for path in ["/compute/v2.1", "/compute/v2.1/"] {
            let one = test.get(path, "").await.expect(200);
            assert_eq!(
                (&one["version"]["min_version"], &one["version"]["version"]),
                (&json!("2.1"), &json!("2.1"))
            );
            assert_eq!(one["version"]["links"][0]["href"], "http://cloud.test:8774/compute/v2.1/");
        }
    }

    #[tokio::test]
    async fn other_microversions_are_refused_and_answers_name_theirs() {
        let test = TestApp::new().await;
        for (name, value, status) in [
            (GENERAL, "compute 2.1", 200),
            (GENERAL, "compute latest", 200),
            (GENERAL, "volume 3.60", 200),
            (GENERAL, "volume 3.60, compute 2.90", 406),
            (GENERAL, "compute x", 400),
            (LEGACY, "2.1", 200),
            (LEGACY, "2.2", 406),
        ] {
            let answer = ask(&test, name, value).await;
            assert_eq!(answer.status.as_u16(), status, "{name}: {value}");
            assert_eq!(answer.header(GENERAL), "compute 2.1");
            assert_eq!(answer.header(LEGACY), "2.1");
            assert_eq!(answer.header("vary"), "OpenStack-API-Version, X-OpenStack-Nova-API-Version");
        }
        let answer = test.get("/compute/v2.1/flavors/none", &test.admin_token).await;
        assert_eq!((answer.status.as_u16(), answer.header(LEGACY)), (404, "2.1"));
    }
}
