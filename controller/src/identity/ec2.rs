//! `POST /v3/ec2tokens`: a token for whoever signed a request to a service with an EC2 key pair. The service hands in what
//! was signed, with a token of its own (role `service` or `admin`): nobody else may try signatures.
//!
//! Signatures of version 4 (`AWS4-HMAC-SHA256`) and of version 2 with `HmacSHA256`; older ones rest on SHA-1 and are
//! refused.

use std::collections::BTreeMap;

use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::post,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use serde::Deserialize;
use serde_json::Value;
use subtle::ConstantTimeEq;

use super::{auth, credentials};
use crate::{
    app::App,
    db::now_us,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::escaped},
    image::store::sign::{hmac, sha256_hex},
};

/// How far a request's time may be from now, as Keystone's `[credential] auth_ttl`.
const MAX_AGE_US: i64 = 15 * 60 * 1_000_000;
/// The only algorithm of version 4.
const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// Routes.
pub fn router() -> Router<App> {
    Router::new().route("/v3/ec2tokens", post(issue))
}

/// What was signed, and how.
#[derive(Debug, Clone, Default, Deserialize)]
struct Signed {
    access: String,
    signature: String,
    #[serde(default)]
    host: String,
    #[serde(default)]
    verb: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    params: BTreeMap<String, String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    body_hash: String,
}

async fn issue(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(mut body): JsonBody<Value>,
) -> Result<Response, ApiError> {
    if !ctx.is_admin && !ctx.has_role(&["service"]) {
        return Err(ApiError::Forbidden("The role service or admin is needed to hand in signatures.".into()));
    }
    let given =
        ["credentials", "ec2Credentials"].into_iter().find_map(|name| body.get_mut(name).map(Value::take));
    let given =
        given.ok_or_else(|| ApiError::BadRequest("The body must have an object \"credentials\".".into()))?;
    let signed: Signed = serde_json::from_value(given)
        .map_err(|error| ApiError::BadRequest(format!("Invalid input for credentials: {error}.")))?;
    let found = credentials::of_access_key(&app, &signed.access).await?.ok_or(ApiError::Unauthorized)?;
    if !signed.is_recent(now_us()) {
        return Err(ApiError::Unauthorized);
    }
    // Clients differ in whether the port is part of the host that they sign.
    let bare = signed.host.rsplit_once(':').map(|(host, _)| Signed { host: host.into(), ..signed.clone() });
    let fits = std::iter::once(&signed).chain(&bare).any(|signed| {
        let right = signed.right_signature(&found.secret);
        right.is_some_and(|right| right.as_bytes().ct_eq(signed.signature.as_bytes()).into())
    });
    match fits {
        true => auth::issue_by_ec2(&app, found).await.map(IntoResponse::into_response),
        false => Err(ApiError::Unauthorized),
    }
}

impl Signed {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The header `Authorization` of version 4: its parts by name.
    fn authorization(&self) -> Option<BTreeMap<&str, &str>> {
        let parts = self.header("authorization")?.strip_prefix(ALGORITHM)?;
        Some(parts.split(',').filter_map(|part| part.trim().split_once('=')).collect())
    }

    /// A part of version 4's signature: of the header, or of the query of a request that was signed in its URL.
    fn part(&self, name: &str) -> Option<&str> {
        match self.authorization() {
            Some(parts) => parts.get(name).copied(),
            None => self.params.get(&format!("X-Amz-{name}")).map(String::as_str),
        }
    }

    /// `20130524T000000Z`.
    fn amz_date(&self) -> Option<&str> {
        self.params.get("X-Amz-Date").map(String::as_str).or_else(|| self.header("x-amz-date"))
    }

    fn is_recent(&self, now_us: i64) -> bool {
        if let Some(end) = self.params.get("Expires") {
            return moment(end, "%Y-%m-%dT%H:%M:%SZ").is_some_and(|end| now_us <= end);
        }
        let at = match self.params.get("Timestamp") {
            Some(at) => moment(at, "%Y-%m-%dT%H:%M:%SZ"),
            None => self.amz_date().and_then(|at| moment(at, "%Y%m%dT%H%M%SZ")),
        };
        at.is_some_and(|at| now_us.abs_diff(at) <= MAX_AGE_US.unsigned_abs())
    }

    /// What the signature must be; `None` if it is of a kind that is not taken.
    fn right_signature(&self, secret: &str) -> Option<String> {
        let v4 = self.authorization().is_some()
            || self.params.get("X-Amz-Algorithm").is_some_and(|algorithm| algorithm == ALGORITHM);
        match v4 {
            true => self.version_4(secret),
            false => self.version_2(secret),
        }
    }

    /// The query as it is signed: sorted, percent-encoded.
    fn query(&self) -> String {
        let pairs =
            self.params.iter().filter(|(name, _)| !["Signature", "X-Amz-Signature"].contains(&name.as_str()));
        let pairs: Vec<String> =
            pairs.map(|(name, value)| format!("{}={}", escaped(name), escaped(value))).collect();
        pairs.join("&")
    }

    fn version_2(&self, secret: &str) -> Option<String> {
        let is = |name: &str, value: &str| self.params.get(name).is_some_and(|given| given == value);
        if !is("SignatureVersion", "2") || !is("SignatureMethod", "HmacSHA256") {
            return None;
        }
        let text = format!("{}\n{}\n{}\n{}", self.verb, self.host, self.path, self.query());
        Some(STANDARD.encode(hmac(secret.as_bytes(), text.as_bytes())))
    }

    fn version_4(&self, secret: &str) -> Option<String> {
        let scope = self.part("Credential")?.split_once('/')?.1;
        let mut parts = scope.split('/');
        let (day, rest) = (parts.next()?, parts);
        let time = self.amz_date().filter(|time| time.starts_with(day))?;
        let names = self.part("SignedHeaders")?;
        let line =
            |name: &str| self.header(name).map(|value| format!("{}:{value}\n", name.to_ascii_lowercase()));
        let headers: String = names.split(';').filter_map(line).collect();
        // A form's parameters are in its body.
        let query = if self.verb.eq_ignore_ascii_case("POST") { String::new() } else { self.query() };
        let Self { verb, path, body_hash, .. } = self;
        let canonical = format!("{verb}\n{path}\n{query}\n{headers}\n{names}\n{body_hash}");
        let text = format!("{ALGORITHM}\n{time}\n{scope}\n{}", sha256_hex(canonical.as_bytes()));
        let key = hmac(format!("AWS4{secret}").as_bytes(), day.as_bytes());
        let key = rest.fold(key, |key, part| hmac(&key, part.as_bytes()));
        Some(hex::encode(hmac(&key, text.as_bytes())))
    }
}

/// A time of UTC, µs since 1970.
fn moment(text: &str, format: &str) -> Option<i64> {
    let time = DateTime::strptime(format, text).ok()?;
    time.to_zoned(TimeZone::UTC).ok().map(|zoned| Timestamp::as_microsecond(zoned.timestamp()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::TestApp;

    /// The example "GET Object" of Amazon's "Authenticating Requests (AWS Signature Version 4)".
    #[test]
    fn the_signature_of_version_4_is_that_of_amazons_example() {
        let hash = sha256_hex(b"");
        let signed: Signed = serde_json::from_value(json!({
            "access": "AKIAIOSFODNN7EXAMPLE", "signature": "", "verb": "GET", "path": "/test.txt", "body_hash": hash,
            "host": "examplebucket.s3.amazonaws.com",
            "headers": {
                "Host": "examplebucket.s3.amazonaws.com", "Range": "bytes=0-9", "X-Amz-Content-Sha256": hash,
                "X-Amz-Date": "20130524T000000Z",
                "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, \
                                  SignedHeaders=host;range;x-amz-content-sha256;x-amz-date, Signature=x",
            },
        }))
        .unwrap();
        assert_eq!(
            signed.right_signature("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY").unwrap(),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let at = moment("20130524T000000Z", "%Y%m%dT%H%M%SZ").unwrap();
        assert!(signed.is_recent(at + MAX_AGE_US) && !signed.is_recent(at + MAX_AGE_US + 1));
    }

    /// The example of Amazon's "Signature Version 2 Signing Process".
    #[test]
    fn the_signature_of_version_2_is_that_of_amazons_example() {
        let signed: Signed = serde_json::from_value(json!({
            "access": "AKIAIOSFODNN7EXAMPLE", "signature": "", "verb": "GET", "path": "/",
            "host": "elasticmapreduce.amazonaws.com",
            "params": {
                "AWSAccessKeyId": "AKIAIOSFODNN7EXAMPLE", "Action": "DescribeJobFlows",
                "SignatureMethod": "HmacSHA256", "SignatureVersion": "2", "Timestamp": "2011-10-03T15:19:30",
                "Version": "2009-03-31",
            },
        }))
        .unwrap();
        assert_eq!(
            signed.right_signature("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY").unwrap(),
            "i91nKc4PWAt0JJIdXwz9HxZCJDdiy6cf/Mj6vPxyYIs="
        );
    }

    #[tokio::test]
    async fn who_signed_with_a_key_pair_gets_a_token_of_its_project() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "member").await;
        let users = test.get("/identity/v3/users?name=ada", &test.admin_token).await.expect(200);
        let user = users["users"][0]["id"].as_str().unwrap();
        let path = format!("/identity/v3/users/{user}/credentials/OS-EC2");
        let made = test.post(&path, &token, json!({"tenant_id": project})).await.expect(201);
        let (access, secret) =
            (&made["credential"]["access"], made["credential"]["secret"].as_str().unwrap());
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut signed: Signed = serde_json::from_value(json!({
            "access": access, "signature": "", "verb": "GET", "path": "/", "host": "ec2.test",
            "params": {"SignatureMethod": "HmacSHA256", "SignatureVersion": "2", "Timestamp": time, "Action": "a b"},
        }))
        .unwrap();
        signed.signature = signed.right_signature(secret).unwrap();
        let body = |signed: &Signed, host: &str| {
            json!({"credentials": {"access": signed.access, "signature": signed.signature, "verb": "GET", "path": "/",
                                   "host": host, "params": signed.params}})
        };
        let tokens = "/identity/v3/ec2tokens";
        test.post(tokens, "", body(&signed, "ec2.test")).await.expect(401);
        test.post(tokens, &token, body(&signed, "ec2.test")).await.expect(403);
        let admin = test.admin_token.as_str();
        for host in ["ec2.test", "ec2.test:8788"] {
            let answer = test.post(tokens, admin, body(&signed, host)).await;
            let new = answer.header("x-subject-token").to_owned();
            let document = answer.expect(200);
            assert_eq!(document["token"]["methods"], json!(["ec2credential"]));
            assert_eq!(
                (&document["token"]["user"]["id"], &document["token"]["project"]["id"]),
                (&json!(user), &json!(project))
            );
            test.get("/compute/v2.1/servers", &new).await.expect(200);
        }
        test.post(tokens, admin, body(&signed, "other.test")).await.expect(401);
        test.post(tokens, admin, json!({"credentials": {}})).await.expect(400);
        let forged = Signed { signature: "x".into(), ..signed.clone() };
        test.post(tokens, admin, body(&forged, "ec2.test")).await.expect(401);
        let mut unknown = signed.clone();
        unknown.access = "nobody".into();
        test.post(tokens, admin, body(&unknown, "ec2.test")).await.expect(401);
        let mut old = signed.clone();
        old.params.insert("Timestamp".into(), "2020-01-01T00:00:00Z".into());
        old.signature = old.right_signature(secret).unwrap();
        test.post(tokens, admin, body(&old, "ec2.test")).await.expect(401);
        // A key pair is worth what its user may do now.
        test.delete(&format!("{path}/{}", access.as_str().unwrap()), &token).await.expect(204);
        test.post(tokens, admin, body(&signed, "ec2.test")).await.expect(401);
    }
}
