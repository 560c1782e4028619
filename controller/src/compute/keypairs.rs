//! Key pairs of users: public keys only, of SSH or (since 2.2) certificates. A private key that is made here is told once and kept nowhere.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::StatusCode;
use md5::{Digest, Md5};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::Sha256;
use sqlx::FromRow;

use super::{
    openssh,
    quotas::{self, Resource},
    versions::Version,
    x509,
};
use crate::{
    app::App,
    db::{is_unique_violation, now_us, rfc3339_us},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Longest name, as in Nova.
const MAX_NAME: usize = 255;
/// Longest public key with its comment: an RSA key of 16384 bits takes less than 3 KiB.
const MAX_PUBLIC_KEY: usize = 16 << 10;
/// Fewest bytes of an RSA modulus: 1024 bits and a leading zero byte at most.
const MIN_RSA_BYTES: usize = 128;

/// A key pair as stored.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct KeyPair {
    user_id: String,
    /// Name.
    pub(crate) name: String,
    /// OpenSSH's line.
    pub(crate) public_key: String,
    fingerprint: String,
    created_us: i64,
    kind: String,
}

impl KeyPair {
    /// Nova shows the number of a row. There are none here: it is made of what names the key pair, as a number of 31 bits.
    fn number(&self) -> u32 {
        let digest = Sha256::digest(format!("{}/{}", self.user_id, self.name));
        u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) >> 1
    }

    fn brief(&self, version: Version) -> Value {
        let mut document =
            json!({"name": self.name, "public_key": self.public_key, "fingerprint": self.fingerprint});
        if version.has(2) {
            document["type"] = json!(self.kind);
        }
        document
    }
}

/// What a public key is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// A line of OpenSSH.
    #[default]
    Ssh,
    /// A certificate in PEM.
    X509,
}

impl Kind {
    /// As clients and the database have it.
    fn word(self) -> &'static str {
        match self {
            Self::Ssh => "ssh",
            Self::X509 => "x509",
        }
    }

    /// Checks a public key; gives it without surrounding white space, and its fingerprint as Nova's.
    fn parse(self, public_key: &str) -> Result<(String, String), ApiError> {
        let text = public_key.trim();
        if text.len() > MAX_PUBLIC_KEY {
            return Err(bad(format!(
                "Keypair data is invalid: the public key is longer than {MAX_PUBLIC_KEY} bytes."
            )));
        }
        let fingerprint = match self {
            Self::Ssh => ssh_fingerprint(text),
            Self::X509 => x509::fingerprint(text),
        };
        let fingerprint = fingerprint.map_err(|why| bad(format!("Keypair data is invalid: {why}.")))?;
        Ok((text.to_owned(), fingerprint))
    }
}

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// Whose key pairs: since 2.10 an administrator can name another user.
fn owner<'a>(ctx: &'a Ctx, version: Version, wanted: Option<&'a str>) -> Result<&'a str, ApiError> {
    match wanted.filter(|_| version.has(10)) {
        Some(user) if user != ctx.user_id => ctx.require_admin().map(|()| user),
        _ => Ok(&ctx.user_id),
    }
}

/// The key pair of a user by its name.
///
/// # Errors
/// Of the database.
pub(crate) async fn find(conn: &mut Conn, user_id: &str, name: &str) -> Result<Option<KeyPair>, ApiError> {
    let sql = "SELECT * FROM keypairs WHERE user_id = $1 AND name = $2";
    Ok(sqlx::query_as(sql).bind(user_id).bind(name).fetch_optional(conn).await?)
}

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-keypairs", get(list).post(create))
        .route("/os-keypairs/{name}", get(show).delete(delete))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    keypair: New,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct New {
    name: String,
    public_key: Option<String>,
    #[serde(rename = "type")]
    kind: Option<Kind>,
    user_id: Option<String>,
}

fn bad(text: impl Into<String>) -> ApiError {
    ApiError::BadRequest(text.into())
}

fn not_found(user: &str, name: &str) -> ApiError {
    ApiError::NotFound(format!("Keypair {name} not found for user {user}"))
}

/// Letters, digits, and what Nova's newest microversion takes besides.
fn check_name(name: &str) -> Result<(), ApiError> {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, ' ' | '_' | '-' | '.' | '@');
    match !name.is_empty() && name.len() <= MAX_NAME && name.trim() == name && name.chars().all(safe) {
        true => Ok(()),
        false => Err(bad(format!(
            "Keypair data is invalid: a name has 1 to {MAX_NAME} letters, digits, spaces (not at its ends), '_', '-', '.' and '@'."
        ))),
    }
}

/// Takes one length-prefixed string of RFC 4251, section 5.
fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (string, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(string)
}

/// Whether a blob is a public key of that type (RFC 4253 section 6.6, RFC 5656, RFC 8709, OpenSSH's PROTOCOL.u2f).
fn is_key(kind: &str, blob: &[u8]) -> bool {
    let mut rest = blob;
    let mut next = || take(&mut rest).unwrap_or_default();
    if next() != kind.as_bytes() {
        return false;
    }
    let curve = |curve: &[u8], point: &[u8]| {
        let bytes = match curve {
            b"nistp256" => 32,
            b"nistp384" => 48,
            b"nistp521" => 66,
            _ => return false,
        };
        point.len() == 1 + 2 * bytes && point[0] == 4
    };
    let good = match kind {
        "ssh-rsa" => !next().is_empty() && next().len() >= MIN_RSA_BYTES,
        "ssh-ed25519" => next().len() == 32,
        "sk-ssh-ed25519@openssh.com" => next().len() == 32 && !next().is_empty(),
        "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" | "ecdsa-sha2-nistp521" => {
            let name = next();
            kind.as_bytes().ends_with(name) && curve(name, next())
        }
        "sk-ecdsa-sha2-nistp256@openssh.com" => {
            let name = next();
            name == b"nistp256" && curve(name, next()) && !next().is_empty()
        }
        _ => false,
    };
    good && rest.is_empty()
}

/// The fingerprint of a line of OpenSSH's `.pub` files: MD5 of the key, as pairs of hex digits with colons.
fn ssh_fingerprint(line: &str) -> Result<String, &'static str> {
    if line.chars().any(char::is_control) {
        return Err("the public key must be one line");
    }
    let mut words = line.split(' ').filter(|word| !word.is_empty());
    let (kind, blob) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let blob = STANDARD.decode(blob).unwrap_or_default();
    if !is_key(kind, &blob) {
        return Err(
            "the public key must be one of OpenSSH (\"ssh-ed25519 AAAA… comment\"; RSA, ECDSA or Ed25519)",
        );
    }
    let digits: Vec<String> = Md5::digest(&blob).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digits.join(":"))
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let user = owner(&ctx, version, params.get("user_id"))?;
    let mut keys: Vec<KeyPair> = sqlx::query_as("SELECT * FROM keypairs WHERE user_id = $1 ORDER BY name")
        .bind(user)
        .fetch_all(&app.db)
        .await?;
    let mut next = None;
    if version.has(35) {
        if let Some(marker) = params.get("marker") {
            let at = keys.iter().position(|key| key.name == marker);
            let at = at.ok_or_else(|| bad(format!("marker [{marker}] not found")))?;
            keys.drain(..=at);
        }
        let limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = keys.len() > limit;
        keys.truncate(limit);
        next = keys.last().filter(|_| more).map(|last| {
            let base = &app.config.public_url;
            let marker = last.name.replace(' ', "%20");
            format!("{base}/compute/v2.1/os-keypairs?limit={limit}&marker={marker}")
        });
    }
    let keys: Vec<Value> = keys.iter().map(|key| json!({"keypair": key.brief(version)})).collect();
    let mut answer = json!({ "keypairs": keys });
    if let Some(href) = next {
        answer["keypairs_links"] = json!([{"rel": "next", "href": href}]);
    }
    Ok(Json(answer))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    JsonBody(Body { keypair: new }): JsonBody<Body>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    check_name(&new.name)?;
    for (field, given, since) in [("type", new.kind.is_some(), 2), ("user_id", new.user_id.is_some(), 10)] {
        if given && !version.has(since) {
            return Err(bad(format!(
                "Invalid input: Additional properties are not allowed ('{field}' was unexpected)."
            )));
        }
    }
    let kind = new.kind.unwrap_or_default();
    let user = owner(&ctx, version, new.user_id.as_deref())?;
    let (public_key, private_key) = match new.public_key {
        Some(public_key) => (public_key, None),
        None => {
            let made = match kind {
                Kind::Ssh => openssh::generate(&new.name),
                Kind::X509 => x509::generate(user),
            };
            made.map(|(public, private)| (public, Some(private)))?
        }
    };
    let (public_key, fingerprint) = kind.parse(&public_key)?;
    let mut tx = app.begin().await?;
    // A limit of the project, for each of its users, as in Nova.
    let limit = quotas::limit(&mut tx, ctx.require_project()?, Resource::KeyPairs).await?;
    let used: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM keypairs WHERE user_id = $1")
        .bind(user)
        .fetch_one(&mut *tx)
        .await?;
    if limit >= 0 && used >= limit {
        return Err(ApiError::OverQuota("Quota exceeded, too many key pairs.".into()));
    }
    let row: KeyPair = sqlx::query_as(
        "INSERT INTO keypairs (user_id, name, public_key, fingerprint, created_us, kind)
         VALUES ($1, $2, $3, $4, $5, $6) RETURNING *",
    )
    .bind(user)
    .bind(&new.name)
    .bind(public_key)
    .bind(fingerprint)
    .bind(now_us())
    .bind(kind.word())
    .fetch_one(&mut *tx)
    .await
    .map_err(|error| match is_unique_violation(&error) {
        true => ApiError::Conflict(format!("Key pair '{}' already exists.", new.name)),
        false => error.into(),
    })?;
    tx.commit().await?;
    let mut document = row.brief(version);
    document["user_id"] = json!(row.user_id);
    if let Some(private_key) = private_key {
        document["private_key"] = json!(private_key);
    }
    let status = if version.has(2) { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(json!({"keypair": document}))))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(name): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let user = owner(&ctx, version, params.get("user_id"))?;
    let row = find(&mut *app.db.acquire().await?, user, &name).await?;
    let row = row.ok_or_else(|| not_found(user, &name))?;
    let mut document = row.brief(version);
    document["user_id"] = json!(row.user_id);
    document["id"] = json!(row.number());
    document["created_at"] = json!(rfc3339_us(row.created_us).trim_end_matches('Z'));
    document["deleted"] = json!(false);
    document["deleted_at"] = Value::Null;
    document["updated_at"] = Value::Null;
    Ok(Json(json!({"keypair": document})))
}

async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(name): Path<String>,
    params: Params,
) -> Result<StatusCode, ApiError> {
    let user = owner(&ctx, version, params.get("user_id"))?;
    let mut tx = app.begin().await?;
    let gone = sqlx::query("DELETE FROM keypairs WHERE user_id = $1 AND name = $2")
        .bind(user)
        .bind(&name)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found(user, &name));
    }
    tx.commit().await?;
    Ok(if version.has(2) { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestApp;

    const URL: &str = "/compute/v2.1/os-keypairs";

    fn string(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
    }

    fn ed25519() -> String {
        let blob = [string(b"ssh-ed25519"), string(&[7; 32])].concat();
        format!("ssh-ed25519 {} ada@home", STANDARD.encode(blob))
    }

    #[tokio::test]
    async fn a_key_is_imported_shown_and_deleted_by_its_user_only() {
        let test = TestApp::new().await;
        let (_, ada) = test.tenant("ada", "member").await;
        let body = json!({"keypair": {"name": "home", "public_key": format!("{}\n", ed25519())}});
        let made = test.post(URL, &ada, body.clone()).await.expect(200);
        assert_eq!(made["keypair"]["public_key"], json!(ed25519()));
        test.post(URL, &ada, body.clone()).await.expect(409);
        let shown = test.get(&format!("{URL}/home"), &ada).await.expect(200);
        assert_eq!(shown["keypair"]["fingerprint"], made["keypair"]["fingerprint"]);
        assert_eq!(test.get(URL, &ada).await.expect(200)["keypairs"].as_array().unwrap().len(), 1);
        test.get(&format!("{URL}/home"), &test.admin_token).await.expect(404);
        test.post(URL, &test.admin_token, body).await.expect(200);
        test.delete(&format!("{URL}/home"), &ada).await.expect(202);
        test.delete(&format!("{URL}/home"), &ada).await.expect(404);
        test.get(&format!("{URL}/home"), &test.admin_token).await.expect(200);
    }

    #[tokio::test]
    async fn what_is_no_public_key_is_refused() {
        let test = TestApp::new().await;
        for key in
            ["", "ssh-ed25519", "ssh-rsa AAAA", "-----BEGIN", &ed25519().replace("ssh-ed25519", "ssh-rsa")]
        {
            let body = json!({"keypair": {"name": "k", "public_key": key}});
            test.post(URL, &test.admin_token, body).await.expect(400);
        }
        let two = format!("{}\n{}", ed25519(), ed25519());
        test.post(URL, &test.admin_token, json!({"keypair": {"name": "k", "public_key": two}}))
            .await
            .expect(400);
        let body = json!({"keypair": {"name": "a/b", "public_key": ed25519()}});
        test.post(URL, &test.admin_token, body).await.expect(400);
    }

    #[tokio::test]
    async fn without_a_public_key_one_is_made_and_its_private_half_is_told_once() {
        let test = TestApp::new().await;
        let body = json!({"keypair": {"name": "k"}});
        let made = test.post(URL, &test.admin_token, body).await.expect(200)["keypair"].take();
        assert!(made["private_key"].as_str().unwrap().starts_with("-----BEGIN OPENSSH PRIVATE KEY-----"));
        let shown = test.get(&format!("{URL}/k"), &test.admin_token).await.expect(200)["keypair"].take();
        assert_eq!(
            (&shown["public_key"], &shown["fingerprint"]),
            (&made["public_key"], &made["fingerprint"])
        );
        assert!(shown["private_key"].is_null());
        assert!(shown["id"].as_u64().is_some());
    }

    #[tokio::test]
    async fn certificates_are_made_and_imported_since_their_microversion() {
        let test = TestApp::new().await;
        let token = &test.admin_token;
        let made = json!({"keypair": {"name": "made", "type": "x509"}});
        test.post(URL, token, made.clone()).await.expect(400);
        let made = test.post_at(URL, token, 2, made).await.expect(201)["keypair"].take();
        assert_eq!(
            (&made["type"], made["fingerprint"].as_str().unwrap().len()),
            (&json!("x509"), 20 * 3 - 1)
        );
        assert!(made["private_key"].is_string());
        let certificate = made["public_key"].as_str().unwrap();
        assert!(certificate.starts_with("-----BEGIN CERTIFICATE-----"));
        let import = |name: &str, kind: &str, key: &str| json!({"keypair": {"name": name, "type": kind, "public_key": key}});
        let taken = test.post_at(URL, token, 2, import("taken", "x509", certificate)).await.expect(201);
        assert_eq!(taken["keypair"]["fingerprint"], made["fingerprint"]);
        let shown = test.get_at(&format!("{URL}/taken"), token, 2).await.expect(200);
        assert_eq!(
            (&shown["keypair"]["type"], &shown["keypair"]["public_key"]),
            (&json!("x509"), &json!(certificate))
        );
        let listed = test.get_at(URL, token, 2).await.expect(200);
        assert_eq!(listed["keypairs"][1]["keypair"]["type"], "x509");
        for (kind, key) in [("x509", ed25519().as_str()), ("ssh", certificate), ("pgp", certificate)] {
            test.post_at(URL, token, 2, import("wrong", kind, key)).await.expect(400);
        }
    }

    #[tokio::test]
    async fn microversions_bring_types_other_users_and_pages() {
        let test = TestApp::new().await;
        let (_, ada) = test.tenant("ada", "member").await;
        let user = test.get("/identity/v3/users?name=ada", &test.admin_token).await.expect(200);
        let user = user["users"][0]["id"].as_str().unwrap();
        let body = |name: &str| json!({"keypair": {"name": name, "public_key": ed25519(), "type": "ssh"}});
        test.post(URL, &ada, body("a")).await.expect(400);
        let made = test.post_at(URL, &ada, 2, body("a")).await.expect(201);
        assert_eq!(made["keypair"]["type"], "ssh");
        let of_ada = json!({"keypair": {"name": "b", "public_key": ed25519(), "user_id": user}});
        test.post_at(URL, &test.admin_token, 9, of_ada.clone()).await.expect(400);
        test.post_at(URL, &test.admin_token, 10, of_ada).await.expect(201);
        let page = test.get_at(&format!("{URL}?limit=1"), &ada, 35).await.expect(200);
        assert_eq!(page["keypairs"].as_array().unwrap().len(), 1);
        let next =
            page["keypairs_links"][0]["href"].as_str().unwrap().split_once(":8774").unwrap().1.to_owned();
        let last = test.get_at(&next, &ada, 35).await.expect(200);
        assert_eq!(last["keypairs"][0]["keypair"]["name"], "b");
        let others = format!("{URL}?user_id={user}");
        assert_eq!(
            test.get_at(&others, &test.admin_token, 10).await.expect(200)["keypairs"]
                .as_array()
                .unwrap()
                .len(),
            2
        );
        let admin = test.get("/identity/v3/users?name=admin", &test.admin_token).await.expect(200);
        let admin = admin["users"][0]["id"].as_str().unwrap().to_owned();
        test.get_at(&format!("{URL}?user_id={admin}"), &ada, 10).await.expect(403);
        let gone = test.call_at(http::Method::DELETE, &format!("{URL}/b"), &ada, 2, Value::Null).await;
        gone.expect(204);
    }

    #[tokio::test]
    async fn key_pairs_are_limited() {
        let test = TestApp::new().await;
        let path = format!("/compute/v2.1/os-quota-sets/{}", test.admin.project_id);
        let quota = json!({"quota_set": {"key_pairs": 1}});
        test.call(http::Method::PUT, &path, &test.admin_token, quota).await.expect(200);
        for (name, status) in [("a", 200), ("b", 403)] {
            let body = json!({"keypair": {"name": name, "public_key": ed25519()}});
            test.post(URL, &test.admin_token, body).await.expect(status);
        }
    }

    #[test]
    fn the_fingerprint_is_that_of_openssh() {
        // From `ssh-keygen -l -E md5`.
        for (key, fingerprint) in [
            (
                "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB1QJuUAIJUjWzoF2b8ntQaZuEtaJMqski/APnnbKgmD t",
                "2a:08:b0:61:81:0b:22:d2:21:53:90:a6:6d:be:31:b6",
            ),
            (
                "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBF7andSMN9uiCOl3E8bUBduSjAcFug2t2z+eb3MlHJLQzXsfI6DHVaA6nWKXqos57FTTR/2w5wa9i8yq47lDkPU= t",
                "84:56:11:2c:07:b8:a8:b0:ea:c7:17:79:27:cd:17:84",
            ),
            (
                "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQCgGxRnFHEovGfJ8Cwv0Fac4AJ7pAMjKdYUFUdtG80MKAN9LQQXMs5bQJpSIaGG+efI0DKkAvkC9ODBuAfP7EacHooBKScFqFNqeBQ1QAW8T757gUcfmLSzWbaLSYnLatKI3vd+DylLmz/rR6NpQdlHeXHxKZtYJvRboO1Mp3FJkrdxc6pnnPnDPH4z16Nunx/oUXwjXMQC3ads8LpOYwluiq9kUeBsMj28XdLFxQzVHZVxJWqJOZsFqrvbkRCBT8RP+UnH+zJoUB6yNEusK3tLOBC6S7SkQulPKHkShJtcmveVXHyGV9tHdG7Fsq9b8tE6sE9SZW4b3T3kfPpO/66nW8c06Aviwup9VEdxf63gMghY4U6sbHR5xsjsq9qFARExNkDrCg22sbQPQ40MsaD0G4Pw3vx2wrValFs0yd9Rtexl94XCJACMoKlbt/XiNtVm6XMEn62u6oliX4nG8yGBJB26FDZWMG/oQK+7cQaCHU5LV5ioYy1gPbWUF4HNcCE= t",
                "a4:a6:79:2e:39:e6:8b:f1:ff:a5:6b:c6:b8:da:b0:4a",
            ),
        ] {
            assert_eq!(Kind::Ssh.parse(key).unwrap().1, fingerprint);
        }
    }
}
