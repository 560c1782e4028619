//! `/v3/auth`: tokens, and what a user can have tokens for.

use crate::db::{Conn, Db};
use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json, Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::pool::PoolConnection;

use super::{
    catalog,
    credentials::KeyPair,
    principal::{self, Principal, SYSTEM, Target},
    projects,
    tokens::{Claims, Method, Scope, new_audit_id},
    trusts::{self, TrustRow},
};
use crate::{
    app::App,
    db,
    http::{
        context::{Ctx, SeenVersion},
        error::ApiError,
        json::JsonBody,
        query::Params,
    },
};

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/auth/tokens", get(validate).head(validate).post(issue).delete(revoke))
        .route("/v3/auth/projects", get(projects_of_asker))
        .route("/v3/auth/domains", get(domains_of_asker))
        .route("/v3/auth/system", get(system_of_asker))
        .route("/v3/auth/catalog", get(catalog::of_asker))
}

/// Body of `POST /v3/auth/tokens`.
#[derive(Debug, Deserialize)]
struct AuthBody {
    auth: Auth,
}

#[derive(Debug, Deserialize)]
struct Auth {
    identity: IdentityPart,
    scope: Option<ScopePart>,
}

#[derive(Debug, Deserialize)]
struct IdentityPart {
    methods: Vec<String>,
    password: Option<PasswordPart>,
    token: Option<TokenPart>,
    application_credential: Option<CredentialPart>,
}

#[derive(Debug, Deserialize)]
struct CredentialPart {
    id: Option<String>,
    name: Option<String>,
    user: Option<CredentialUser>,
    secret: String,
}

#[derive(Debug, Deserialize)]
struct CredentialUser {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Reference>,
}

#[derive(Debug, Deserialize)]
struct PasswordPart {
    user: UserPart,
}

#[derive(Debug, Deserialize)]
struct UserPart {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Reference>,
    password: String,
}

#[derive(Debug, Deserialize)]
struct TokenPart {
    id: String,
}

/// By id or by name.
#[derive(Debug, Deserialize)]
struct Reference {
    id: Option<String>,
    name: Option<String>,
}

/// `"unscoped"`, or an object with exactly one kind.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ScopePart {
    Word(String),
    Object(Box<ScopeObject>),
}

#[derive(Debug, Deserialize)]
struct ScopeObject {
    project: Option<ProjectPart>,
    domain: Option<Reference>,
    system: Option<Value>,
    #[serde(rename = "OS-TRUST:trust")]
    trust: Option<TrustPart>,
    unscoped: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct TrustPart {
    id: String,
}

#[derive(Debug, Deserialize)]
struct ProjectPart {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Reference>,
}

/// A user who proved to be one.
struct Authenticated {
    user_id: String,
    methods: Vec<Method>,
    /// The token that was the proof.
    parent: Option<Claims>,
    /// The application credential that was the proof, and its project: there is no other scope with it.
    credential: Option<(String, String)>,
    /// The trust that the token shall be of.
    trust: Option<TrustRow>,
}

impl Authenticated {
    fn new(user_id: String, method: Method) -> Self {
        Self { user_id, methods: vec![method], parent: None, credential: None, trust: None }
    }
}

async fn issue(
    State(app): State<App>,
    params: Params,
    JsonBody(body): JsonBody<AuthBody>,
) -> Result<Response, ApiError> {
    let AuthBody { auth: Auth { identity, scope } } = body;
    let asked = scope.map(wanted_scope).transpose()?;
    let mut authenticated = authenticate(&app, identity).await?;
    let mut conn = app.db.acquire().await?;
    let scope = match asked {
        _ if authenticated.credential.is_some() => credential_scope(asked, &authenticated)?,
        Some(Wanted::Trust(id)) => {
            let trust = trusts::usable(&mut conn, &id).await?.ok_or(ApiError::Unauthorized)?;
            trust_scope(trust, &mut authenticated)?
        }
        Some(wanted) => resolve_scope(&mut conn, wanted).await?.ok_or(ApiError::Unauthorized)?,
        None => default_scope(&mut conn, &authenticated.user_id).await?,
    };
    let with_catalog = !params.flag("nocatalog");
    issued(&app, conn, authenticated, scope, (StatusCode::CREATED, with_catalog)).await
}

/// The answer with a token for somebody who proved to be who it is.
async fn issued(
    app: &App,
    mut conn: PoolConnection<Db>,
    mut authenticated: Authenticated,
    scope: Scope,
    (status, with_catalog): (StatusCode, bool),
) -> Result<Response, ApiError> {
    let trust = authenticated.trust.take();
    let claims = new_claims(app, authenticated, scope, trust.as_ref());
    let version = super::version(&mut conn).await?;
    // The same check that each later use makes: enabled, and at least one role there.
    let principal = principal::load(&mut conn, claims, version).await?;
    drop(conn);
    let principal = principal.ok_or_else(|| match &trust {
        Some(_) => ApiError::Forbidden(NOTHING_ENTRUSTED.into()),
        None => ApiError::Unauthorized,
    })?;
    if let Some(trust) = &trust
        && !trusts::use_once(app, trust).await?
    {
        return Err(ApiError::Unauthorized);
    }
    let token = app.identity.keys.tokens.seal(&principal.claims)?;
    let body = token_body(app, &principal, with_catalog).await?;
    Ok((status, [("x-subject-token", token)], vary(), Json(body)).into_response())
}

/// A token for whoever signed a request with an EC2 key pair, in the key pair's project.
///
/// # Errors
/// 401 if the user or the project is disabled, or the user has no role there any more.
pub(super) async fn issue_by_ec2(app: &App, pair: KeyPair) -> Result<Response, ApiError> {
    let mut authenticated = Authenticated::new(pair.user_id, Method::Ec2Credential);
    let mut scope = Scope::Project(pair.project_id.clone());
    let mut conn = app.db.acquire().await?;
    if let Some(id) = pair.trust_id {
        let trust = trusts::usable(&mut conn, &id).await?.ok_or(ApiError::Unauthorized)?;
        // The pair was made by whom the trust's tokens speak for.
        if trust.speaks_for() != authenticated.user_id || trust.project() != pair.project_id {
            return Err(ApiError::Unauthorized);
        }
        trust.trustee().clone_into(&mut authenticated.user_id);
        scope = trust_scope(trust, &mut authenticated)?;
    }
    authenticated.credential = pair.application_credential.map(|id| (id, pair.project_id));
    issued(app, conn, authenticated, scope, (StatusCode::OK, true)).await
}

const NOTHING_ENTRUSTED: &str = "Trustee has no delegated roles: trustor and project must be enabled, and the trustor \
    must still have every role of the trust.";

/// The trust's project, for its trustee.
fn trust_scope(trust: TrustRow, authenticated: &mut Authenticated) -> Result<Scope, ApiError> {
    if trust.trustee() != authenticated.user_id {
        return Err(ApiError::Forbidden("User is not a trustee.".into()));
    }
    let scope = Scope::Project(trust.project().to_owned());
    authenticated.trust = Some(trust);
    Ok(scope)
}

/// The project of the application credential, whether it is asked for or nothing is.
fn credential_scope(asked: Option<Wanted>, authenticated: &Authenticated) -> Result<Scope, ApiError> {
    let (_, project) = authenticated.credential.as_ref().ok_or(ApiError::Unauthorized)?;
    match asked {
        None => Ok(Scope::Project(project.clone())),
        Some(Wanted::Project(ProjectPart { id: Some(id), .. })) if id == *project => Ok(Scope::Project(id)),
        Some(_) => Err(ApiError::Unauthorized),
    }
}

fn vary() -> [(header::HeaderName, &'static str); 1] {
    [(header::VARY, "X-Auth-Token")]
}

async fn token_body(app: &App, principal: &Principal, with_catalog: bool) -> Result<Value, ApiError> {
    let mut token = principal.token_json();
    if with_catalog && principal.target != Target::Unscoped {
        let project = match &principal.target {
            Target::Project(project, _) => Some(project.id.as_str()),
            _ => None,
        };
        token["catalog"] = catalog::catalog(app, principal.version, project).await?;
    }
    Ok(json!({ "token": token }))
}

fn new_claims(app: &App, authenticated: Authenticated, scope: Scope, trust: Option<&TrustRow>) -> Claims {
    let issued_us = db::now_us();
    let lifetime_us =
        i64::try_from(app.config.token_lifetime_s).unwrap_or(i64::MAX / 2).saturating_mul(1_000_000);
    let mut audit_ids = vec![new_audit_id()];
    let mut application_credential = authenticated.credential.map(|(id, _)| id);
    let mut expires_us = issued_us.saturating_add(lifetime_us);
    if let Some(parent) = authenticated.parent {
        // A token by a token ends with it, and its chain can be followed.
        expires_us = parent.expires_us;
        audit_ids.extend(parent.audit_ids.last().cloned());
        // And can't do more.
        application_credential = application_credential.or(parent.application_credential);
    }
    if let Some(end) = trust.and_then(TrustRow::expires_us) {
        expires_us = expires_us.min(end);
    }
    Claims {
        user_id: authenticated.user_id,
        scope,
        methods: authenticated.methods,
        issued_us,
        expires_us,
        audit_ids,
        application_credential,
        trust: trust.map(|trust| trust.id().to_owned()),
    }
}

/// Every named method must prove the same user.
async fn authenticate(app: &App, identity: IdentityPart) -> Result<Authenticated, ApiError> {
    let mut proven: BTreeMap<String, Authenticated> = BTreeMap::new();
    for method in &identity.methods {
        let one = match method.as_str() {
            "password" => {
                let part = identity.password.as_ref().ok_or_else(|| missing("password"))?;
                by_password(app, &part.user).await?
            }
            "application_credential" => {
                let part = identity.application_credential.as_ref();
                by_credential(app, part.ok_or_else(|| missing("application_credential"))?).await?
            }
            "token" => by_token(app, &identity.token.as_ref().ok_or_else(|| missing("token"))?.id).await?,
            other => {
                let other: String = other.chars().take(64).collect();
                let text = format!(
                    "The authentication method {other:?} is not supported: use password, token or application_credential."
                );
                return Err(ApiError::BadRequest(text));
            }
        };
        if identity.methods.len() > 3 {
            return Err(ApiError::BadRequest("Each authentication method may be named once.".into()));
        }
        match proven.get_mut(&one.user_id) {
            None => drop(proven.insert(one.user_id.clone(), one)),
            Some(before) => {
                before.methods.extend(one.methods);
                before.parent = before.parent.take().or(one.parent);
                before.credential = before.credential.take().or(one.credential);
            }
        }
    }
    match proven.len() {
        0 => Err(ApiError::BadRequest("No authentication method is named in auth.identity.methods.".into())),
        1 => proven.into_values().next().ok_or(ApiError::Unauthorized),
        _ => Err(ApiError::Unauthorized),
    }
}

fn missing(method: &str) -> ApiError {
    ApiError::BadRequest(format!("The method {method} is named, but auth.identity.{method} is missing."))
}

/// A user's row as far as logging in needs it.
#[derive(Debug, sqlx::FromRow)]
struct LogIn {
    id: String,
    password_hash: Option<String>,
    failed_logins: i64,
    failed_us: i64,
}

async fn find_user(
    app: &App,
    id: Option<&str>,
    name: Option<&str>,
    domain: Option<&Reference>,
    place: &str,
) -> Result<Option<LogIn>, ApiError> {
    const COLUMNS: &str = "SELECT u.id, u.password_hash, u.failed_logins, u.failed_us FROM users u";
    let query = match (id, name) {
        (Some(id), _) => {
            let sql = format!("{COLUMNS} WHERE u.id = $1");
            sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(id.to_owned())
        }
        (None, Some(name)) => {
            let (domain_id, domain_name) = reference(domain, &format!("{place}.domain"))?;
            let sql = format!(
                "{COLUMNS} JOIN domains d ON d.id = u.domain_id WHERE u.name = $1 AND (d.id = $2 OR d.name = $3)"
            );
            let query = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(name.to_owned());
            query.bind(domain_id.map(str::to_owned)).bind(domain_name.map(str::to_owned))
        }
        (None, None) => {
            return Err(ApiError::BadRequest(format!("{place} needs an id, or a name and a domain.")));
        }
    };
    Ok(query.fetch_optional(&app.db).await?)
}

async fn by_password(app: &App, user: &UserPart) -> Result<Authenticated, ApiError> {
    let place = "auth.identity.password.user";
    let (id, name) = (user.id.as_deref(), user.name.as_deref());
    let row = find_user(app, id, name, user.domain.as_ref(), place).await?;
    // Somebody who is locked out takes as long as a wrong password, and looks like one.
    let locked = row.as_ref().is_some_and(|row| is_locked(app, row.failed_logins, row.failed_us));
    let hash = row.as_ref().and_then(|row| row.password_hash.as_deref()).filter(|_| !locked);
    let fits = app.identity.passwords.verify(&user.password, hash).await?;
    let Some(row) = row else { return Err(ApiError::Unauthorized) };
    if !locked {
        count_failures(app, &row.id, fits).await?;
    }
    match fits {
        true => Ok(Authenticated::new(row.id, Method::Password)),
        false => Err(ApiError::Unauthorized),
    }
}

/// Whether so many log-ins failed lately that none is let in for a while.
pub(super) fn is_locked(app: &App, failed_logins: i64, failed_us: i64) -> bool {
    let lockout = &app.config.lockout;
    let end = failed_us.saturating_add(i64::try_from(lockout.duration.as_micros()).unwrap_or(i64::MAX));
    lockout.attempts > 0 && failed_logins >= i64::from(lockout.attempts) && db::now_us() < end
}

/// Counts failed log-ins; one that succeeds, or that comes after the lock-out, begins anew.
///
/// # Errors
/// Of the database.
pub(super) async fn count_failures(app: &App, user_id: &str, fits: bool) -> Result<(), ApiError> {
    let attempts = i64::from(app.config.lockout.attempts);
    if attempts == 0 {
        return Ok(());
    }
    if fits {
        let failed: Option<i64> = sqlx::query_scalar("SELECT failed_logins FROM users WHERE id = $1")
            .bind(user_id)
            .fetch_optional(&app.db)
            .await?;
        if failed.unwrap_or(0) == 0 {
            return Ok(());
        }
    }
    let sql = match fits {
        true => "UPDATE users SET failed_logins = 0, failed_us = $2 WHERE id = $1 AND failed_logins < $3 + 1",
        false => {
            "UPDATE users SET failed_us = $2,
                 failed_logins = CASE WHEN failed_logins >= $3 THEN 1 ELSE failed_logins + 1 END WHERE id = $1"
        }
    };
    let mut tx = app.begin().await?;
    sqlx::query(sql).bind(user_id).bind(db::now_us()).bind(attempts).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(())
}

async fn by_credential(app: &App, part: &CredentialPart) -> Result<Authenticated, ApiError> {
    let place = "auth.identity.application_credential";
    let row: Option<(String, String, String, String)> = match (&part.id, &part.name, &part.user) {
        (Some(id), _, _) => {
            sqlx::query_as(
                "SELECT id, user_id, project_id, secret_hash FROM application_credentials WHERE id = $1",
            )
            .bind(id)
            .fetch_optional(&app.db)
            .await?
        }
        (None, Some(name), Some(user)) => {
            let (id, user_name) = (user.id.as_deref(), user.name.as_deref());
            let user = find_user(app, id, user_name, user.domain.as_ref(), &format!("{place}.user")).await?;
            sqlx::query_as(
                "SELECT id, user_id, project_id, secret_hash FROM application_credentials
                 WHERE user_id = $1 AND name = $2",
            )
            .bind(user.map(|user| user.id))
            .bind(name)
            .fetch_optional(&app.db)
            .await?
        }
        _ => return Err(ApiError::BadRequest(format!("{place} needs an id, or a name and a user."))),
    };
    let hash = row.as_ref().map(|row| row.3.as_str());
    let fits = app.identity.passwords.verify(&part.secret, hash).await?;
    match row {
        Some((id, user_id, project_id, _)) if fits => Ok(Authenticated {
            credential: Some((id, project_id)),
            ..Authenticated::new(user_id, Method::ApplicationCredential)
        }),
        _ => Err(ApiError::Unauthorized),
    }
}

async fn by_token(app: &App, token: &str) -> Result<Authenticated, ApiError> {
    let principal = super::principal_of(app, token).await?;
    if principal.trust.is_some() {
        let text =
            "Using trust-scoped token to create another token. Create a new trust-scoped token instead";
        return Err(ApiError::Forbidden(text.into()));
    }
    let mut methods = vec![Method::Token];
    methods.extend(principal.claims.methods.iter().copied().filter(|method| *method != Method::Token));
    let credential = match (&principal.claims.application_credential, &principal.claims.scope) {
        (Some(id), Scope::Project(project)) => Some((id.clone(), project.clone())),
        _ => None,
    };
    let user_id = principal.user.id.clone();
    Ok(Authenticated { user_id, methods, parent: Some(principal.claims.clone()), credential, trust: None })
}

/// Exactly one of id and name, as (id, name).
fn reference<'a>(
    reference: Option<&'a Reference>,
    place: &str,
) -> Result<(Option<&'a str>, Option<&'a str>), ApiError> {
    match reference {
        Some(Reference { id: Some(id), .. }) => Ok((Some(id), None)),
        Some(Reference { name: Some(name), .. }) => Ok((None, Some(name))),
        _ => Err(ApiError::BadRequest(format!("{place} needs an id or a name."))),
    }
}

/// What [`wanted_scope`] understood.
enum Wanted {
    Unscoped,
    Project(ProjectPart),
    Domain(Reference),
    System,
    Trust(String),
}

fn wanted_scope(part: ScopePart) -> Result<Wanted, ApiError> {
    let refused = |text: &str| Err(ApiError::BadRequest(text.into()));
    match part {
        ScopePart::Word(word) if word == "unscoped" => Ok(Wanted::Unscoped),
        ScopePart::Object(scope) => match *scope {
            ScopeObject {
                system: Some(system),
                project: None,
                domain: None,
                unscoped: None,
                trust: None,
            } => match system == json!({"all": true}) {
                true => Ok(Wanted::System),
                false => refused("auth.scope.system must be {\"all\": true}."),
            },
            ScopeObject { trust: Some(trust), project: None, domain: None, unscoped: None, system: None } => {
                Ok(Wanted::Trust(trust.id))
            }
            ScopeObject {
                project: Some(project),
                domain: None,
                unscoped: None,
                system: None,
                trust: None,
            } => Ok(Wanted::Project(project)),
            ScopeObject {
                project: None,
                domain: Some(domain),
                unscoped: None,
                system: None,
                trust: None,
            } => Ok(Wanted::Domain(domain)),
            ScopeObject { project: None, domain: None, unscoped: Some(_), system: None, trust: None } => {
                Ok(Wanted::Unscoped)
            }
            _ => refused(
                "auth.scope must name exactly one of project, domain, system, OS-TRUST:trust and unscoped.",
            ),
        },
        ScopePart::Word(_) => refused("auth.scope must be an object or \"unscoped\"."),
    }
}

/// `None`: there is no such project or domain.
async fn resolve_scope(conn: &mut Conn, wanted: Wanted) -> Result<Option<Scope>, ApiError> {
    match wanted {
        // Looked up by who asks.
        Wanted::Trust(_) => Ok(None),
        Wanted::Unscoped => Ok(Some(Scope::Unscoped)),
        Wanted::System => Ok(Some(Scope::System)),
        Wanted::Project(ProjectPart { id: Some(id), .. }) => Ok(Some(Scope::Project(id))),
        Wanted::Project(ProjectPart { id: None, name: Some(name), domain }) => {
            let (domain_id, domain_name) = reference(domain.as_ref(), "auth.scope.project.domain")?;
            let id: Option<String> = sqlx::query_scalar(
                "SELECT p.id FROM projects p JOIN domains d ON d.id = p.domain_id
                 WHERE p.name = $1 AND (d.id = $2 OR d.name = $3)",
            )
            .bind(name)
            .bind(domain_id)
            .bind(domain_name)
            .fetch_optional(conn)
            .await?;
            Ok(id.map(Scope::Project))
        }
        Wanted::Project(_) => Err(ApiError::BadRequest("auth.scope.project needs an id, or a name.".into())),
        Wanted::Domain(domain) => {
            let (id, name) = reference(Some(&domain), "auth.scope.domain")?;
            let id: Option<String> = sqlx::query_scalar("SELECT id FROM domains WHERE id = $1 OR name = $2")
                .bind(id)
                .bind(name)
                .fetch_optional(conn)
                .await?;
            Ok(id.map(Scope::Domain))
        }
    }
}

/// Without a scope: the user's default project if there is one and the user has a role there, as Keystone.
async fn default_scope(conn: &mut Conn, user_id: &str) -> Result<Scope, ApiError> {
    let project: Option<String> = sqlx::query_scalar(
        "SELECT p.id FROM users u JOIN projects p ON p.id = u.default_project_id AND p.enabled
         WHERE u.id = $1 AND EXISTS (
             SELECT 1 FROM held_roles a
             WHERE a.user_id = u.id AND a.target_kind = 'project' AND a.target_id = p.id)",
    )
    .bind(user_id)
    .fetch_optional(conn)
    .await?;
    Ok(project.map_or(Scope::Unscoped, Scope::Project))
}

/// The token of `X-Subject-Token`; 404 if it is not valid, or the asker may not know.
async fn subject(
    app: &App,
    ctx: &Ctx,
    asker: SeenVersion,
    headers: &HeaderMap,
) -> Result<(Arc<Principal>, String), ApiError> {
    let token = headers
        .get("x-subject-token")
        .ok_or_else(|| ApiError::BadRequest("The header X-Subject-Token is missing.".into()))?
        .to_str()
        .unwrap_or_default();
    let principal = match super::principal_at(app, token, asker.0) {
        Some(principal) => principal,
        None => super::principal_of(app, token).await.map_err(|error| match error {
            ApiError::Unauthorized => ApiError::NotFound("Could not find token.".into()),
            other => other,
        })?,
    };
    if principal.user.id != ctx.user_id && !ctx.is_admin && !ctx.has_role(&["service"]) {
        return Err(ApiError::Forbidden(
            "Policy does not allow this: it is the token of another user.".into(),
        ));
    }
    Ok((principal, token.to_owned()))
}

async fn validate(
    State(app): State<App>,
    ctx: Ctx,
    Extension(seen): Extension<SeenVersion>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if params.flag("allow_expired") {
        return Err(ApiError::BadRequest("allow_expired is not supported: an expired token is none.".into()));
    }
    let (principal, token) = subject(&app, &ctx, seen, &headers).await?;
    let body = token_body(&app, &principal, !params.flag("nocatalog")).await?;
    Ok(([("x-subject-token", token)], vary(), Json(body)).into_response())
}

async fn revoke(
    State(app): State<App>,
    ctx: Ctx,
    Extension(seen): Extension<SeenVersion>,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let (principal, _) = subject(&app, &ctx, seen, &headers).await?;
    let mut tx = super::begin(&app).await?;
    sqlx::query("DELETE FROM revoked_tokens WHERE expires_us < $1")
        .bind(db::now_us())
        .execute(&mut *tx)
        .await?;
    sqlx::query("INSERT INTO revoked_tokens (audit_id, expires_us) VALUES ($1, $2) ON CONFLICT DO NOTHING")
        .bind(principal.claims.audit_id())
        .bind(principal.claims.expires_us)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn projects_of_asker(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let items = projects::of_user(&app, &ctx.user_id, true).await?;
    Ok(Json(super::list(&app, "projects", "/v3/auth/projects", items)))
}

async fn domains_of_asker(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let rows: Vec<super::domains::DomainRow> = sqlx::query_as(
        "SELECT * FROM domains d WHERE d.enabled AND EXISTS (
             SELECT 1 FROM held_roles a
             WHERE a.user_id = $1 AND a.target_kind = 'domain' AND a.target_id = d.id)
         ORDER BY d.name LIMIT $2",
    )
    .bind(&ctx.user_id)
    .bind(super::MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(super::list(&app, "domains", "/v3/auth/domains", items)))
}

/// `{"system": [{"all": true}]}` for who has a role there.
async fn system_of_asker(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let roles =
        principal::effective_roles(&mut *app.db.acquire().await?, &ctx.user_id, "system", SYSTEM).await?;
    let items = if roles.is_empty() { Vec::new() } else { vec![json!({"all": true})] };
    Ok(Json(super::list(&app, "system", "/v3/auth/system", items)))
}
