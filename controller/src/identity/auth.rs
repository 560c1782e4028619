//! `/v3/auth`: tokens, and what a user can have tokens for.

use crate::db::Conn;
use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    catalog,
    principal::{self, Principal, Target},
    projects,
    tokens::{Claims, Method, Scope, new_audit_id},
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
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
    trust: Option<Value>,
    unscoped: Option<Value>,
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
}

async fn issue(
    State(app): State<App>,
    params: Params,
    JsonBody(body): JsonBody<AuthBody>,
) -> Result<Response, ApiError> {
    let AuthBody { auth: Auth { identity, scope } } = body;
    let asked = scope.map(wanted_scope).transpose()?;
    let authenticated = authenticate(&app, identity).await?;
    let mut conn = app.db.acquire().await?;
    let scope = match asked {
        Some(wanted) => resolve_scope(&mut conn, wanted).await?.ok_or(ApiError::Unauthorized)?,
        None => default_scope(&mut conn, &authenticated.user_id).await?,
    };
    let claims = new_claims(&app, authenticated, scope);
    // The same check that each later use makes: enabled, and at least one role there.
    let principal = principal::load(&mut conn, claims).await?.ok_or(ApiError::Unauthorized)?;
    drop(conn);
    let token = app.identity.tokens.seal(&principal.claims)?;
    let body = token_body(&app, &principal, !params.flag("nocatalog"));
    Ok((StatusCode::CREATED, [("x-subject-token", token)], vary(), Json(body)).into_response())
}

fn vary() -> [(header::HeaderName, &'static str); 1] {
    [(header::VARY, "X-Auth-Token")]
}

fn token_body(app: &App, principal: &Principal, with_catalog: bool) -> Value {
    let mut token = principal.token_json();
    if with_catalog && principal.target != Target::Unscoped {
        token["catalog"] = catalog::catalog(&app.config);
    }
    json!({ "token": token })
}

fn new_claims(app: &App, authenticated: Authenticated, scope: Scope) -> Claims {
    let issued_us = db::now_us();
    let lifetime_us =
        i64::try_from(app.config.token_lifetime_s).unwrap_or(i64::MAX / 2).saturating_mul(1_000_000);
    let mut audit_ids = vec![new_audit_id()];
    let mut expires_us = issued_us.saturating_add(lifetime_us);
    if let Some(parent) = authenticated.parent {
        // A token by a token ends with it, and its chain can be followed.
        expires_us = parent.expires_us;
        audit_ids.extend(parent.audit_ids.last().cloned());
    }
    Claims {
        user_id: authenticated.user_id,
        scope,
        methods: authenticated.methods,
        issued_us,
        expires_us,
        audit_ids,
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
            "token" => by_token(app, &identity.token.as_ref().ok_or_else(|| missing("token"))?.id).await?,
            other => {
                let other: String = other.chars().take(64).collect();
                let text =
                    format!("The authentication method {other:?} is not supported: use password or token.");
                return Err(ApiError::BadRequest(text));
            }
        };
        if identity.methods.len() > 2 {
            return Err(ApiError::BadRequest("Each authentication method may be named once.".into()));
        }
        match proven.get_mut(&one.user_id) {
            None => drop(proven.insert(one.user_id.clone(), one)),
            Some(before) => {
                before.methods.extend(one.methods);
                before.parent = before.parent.take().or(one.parent);
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

async fn by_password(app: &App, user: &UserPart) -> Result<Authenticated, ApiError> {
    let row: Option<(String, Option<String>)> = match (&user.id, &user.name) {
        (Some(id), _) => {
            sqlx::query_as("SELECT id, password_hash FROM users WHERE id = $1")
                .bind(id)
                .fetch_optional(&app.db)
                .await?
        }
        (None, Some(name)) => {
            let (domain_id, domain_name) =
                reference(user.domain.as_ref(), "auth.identity.password.user.domain")?;
            sqlx::query_as(
                "SELECT u.id, u.password_hash FROM users u JOIN domains d ON d.id = u.domain_id
                 WHERE u.name = $1 AND (d.id = $2 OR d.name = $3)",
            )
            .bind(name)
            .bind(domain_id)
            .bind(domain_name)
            .fetch_optional(&app.db)
            .await?
        }
        (None, None) => {
            let text = "auth.identity.password.user needs an id, or a name and a domain.";
            return Err(ApiError::BadRequest(text.into()));
        }
    };
    let (user_id, hash) = row.map_or((None, None), |(id, hash)| (Some(id), hash));
    let fits = app.identity.passwords.verify(&user.password, hash.as_deref()).await?;
    match user_id {
        Some(user_id) if fits => Ok(Authenticated { user_id, methods: vec![Method::Password], parent: None }),
        _ => Err(ApiError::Unauthorized),
    }
}

async fn by_token(app: &App, token: &str) -> Result<Authenticated, ApiError> {
    let claims = app.identity.tokens.open(token, db::now_us()).ok_or(ApiError::Unauthorized)?;
    let mut conn = app.db.acquire().await?;
    let principal = principal::load(&mut conn, claims).await?.ok_or(ApiError::Unauthorized)?;
    let mut methods = vec![Method::Token];
    methods.extend(principal.claims.methods.iter().copied().filter(|method| *method != Method::Token));
    Ok(Authenticated { user_id: principal.user.id, methods, parent: Some(principal.claims) })
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
}

fn wanted_scope(part: ScopePart) -> Result<Wanted, ApiError> {
    let refused = |text: &str| Err(ApiError::BadRequest(text.into()));
    match part {
        ScopePart::Word(word) if word == "unscoped" => Ok(Wanted::Unscoped),
        ScopePart::Object(scope) => match *scope {
            ScopeObject { system: Some(_), .. } => {
                refused("System scope is not supported: use the role admin on a project.")
            }
            ScopeObject { trust: Some(_), .. } => refused("Trusts are not supported."),
            ScopeObject { project: Some(project), domain: None, unscoped: None, .. } => {
                Ok(Wanted::Project(project))
            }
            ScopeObject { project: None, domain: Some(domain), unscoped: None, .. } => {
                Ok(Wanted::Domain(domain))
            }
            ScopeObject { project: None, domain: None, unscoped: Some(_), .. } => Ok(Wanted::Unscoped),
            _ => refused("auth.scope must name exactly one of project, domain and unscoped."),
        },
        ScopePart::Word(_) => refused("auth.scope must be an object or \"unscoped\"."),
    }
}

/// `None`: there is no such project or domain.
async fn resolve_scope(conn: &mut Conn, wanted: Wanted) -> Result<Option<Scope>, ApiError> {
    match wanted {
        Wanted::Unscoped => Ok(Some(Scope::Unscoped)),
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
             SELECT 1 FROM role_assignments a
             WHERE a.user_id = u.id AND a.target_kind = 'project' AND a.target_id = p.id)",
    )
    .bind(user_id)
    .fetch_optional(conn)
    .await?;
    Ok(project.map_or(Scope::Unscoped, Scope::Project))
}

/// The token of `X-Subject-Token`; 404 if it is not valid, or the asker may not know.
async fn subject(app: &App, ctx: &Ctx, headers: &HeaderMap) -> Result<(Principal, String), ApiError> {
    let token = headers
        .get("x-subject-token")
        .ok_or_else(|| ApiError::BadRequest("The header X-Subject-Token is missing.".into()))?
        .to_str()
        .unwrap_or_default();
    let unknown = || ApiError::NotFound("Could not find token.".into());
    let claims = app.identity.tokens.open(token, db::now_us()).ok_or_else(unknown)?;
    let mut conn = app.db.acquire().await?;
    let principal = principal::load(&mut conn, claims).await?.ok_or_else(unknown)?;
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
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (principal, token) = subject(&app, &ctx, &headers).await?;
    let body = token_body(&app, &principal, !params.flag("nocatalog"));
    Ok(([("x-subject-token", token)], vary(), Json(body)).into_response())
}

async fn revoke(State(app): State<App>, ctx: Ctx, headers: HeaderMap) -> Result<StatusCode, ApiError> {
    let (principal, _) = subject(&app, &ctx, &headers).await?;
    let mut tx = app.begin().await?;
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
             SELECT 1 FROM role_assignments a
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

/// Nobody has a role on the system as a whole.
async fn system_of_asker(State(app): State<App>, _ctx: Ctx) -> Json<Value> {
    Json(super::list(&app, "system", "/v3/auth/system", Vec::new()))
}
