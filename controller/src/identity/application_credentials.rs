//! `/v3/users/{user}/application_credentials` and `/v3/users/{user}/access_rules`: a user's keys for programs, with the
//! roles of one project and no password.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    MAX_LIST, begin,
    fields::{Fields, invalid},
    list, new_id, not_found,
    principal::{self, AccessRule},
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Bytes of a secret that is made here.
const SECRET_BYTES: usize = 48;
/// Most application credentials of a user.
const MAX_PER_USER: i64 = 1000;
/// Most access rules of one.
const MAX_RULES: usize = 100;
/// Longest path of a rule (Keystone's limit is 128).
const MAX_PATH_BYTES: usize = 128;

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/users/{user}/application_credentials", get(index).post(create))
        .route("/v3/users/{user}/application_credentials/{id}", get(show).delete(delete))
        .route("/v3/users/{user}/access_rules", get(rules))
        .route("/v3/users/{user}/access_rules/{id}", get(rule).delete(delete_rule))
}

#[derive(Debug, sqlx::FromRow)]
struct CredentialRow {
    id: String,
    user_id: String,
    project_id: String,
    name: String,
    description: String,
    unrestricted: bool,
    expires_us: Option<i64>,
}

const COLUMNS: &str = "id, user_id, project_id, name, description, unrestricted, expires_us";

impl CredentialRow {
    async fn json(&self, app: &App, conn: &mut Conn) -> Result<Value, ApiError> {
        let roles: Vec<(String, String)> = sqlx::query_as(
            "SELECT r.id, r.name FROM roles r JOIN application_credential_roles c ON c.role_id = r.id
             WHERE c.credential_id = $1 ORDER BY r.name",
        )
        .bind(&self.id)
        .fetch_all(&mut *conn)
        .await?;
        let roles: Vec<Value> =
            roles.into_iter().map(|(id, name)| json!({"id": id, "name": name, "domain_id": null})).collect();
        let rules = principal::access_rules(conn, &self.id).await?;
        let path = format!("users/{}/application_credentials/{}", self.user_id, self.id);
        let mut shown = json!({
            "id": self.id,
            "user_id": self.user_id,
            "project_id": self.project_id,
            "name": self.name,
            "description": self.description,
            "unrestricted": self.unrestricted,
            // Keystone writes this one without a zone.
            "expires_at": self.expires_us.map(|us| db::rfc3339_us(us).trim_end_matches('Z').to_owned()),
            "system": null,
            "roles": roles,
            "links": {"self": format!("{}/identity/v3/{path}", app.config.public_url)},
        });
        if !rules.is_empty() {
            shown["access_rules"] = rules.iter().map(AccessRule::json).collect();
        }
        Ok(shown)
    }
}

/// What is made with a trust's token would outlive the trust, and what is there is not the trustee's to see.
fn refuse_trusts(ctx: &Ctx) -> Result<(), ApiError> {
    match ctx.trust() {
        Some(_) => Err(ApiError::Forbidden(
            "Cannot manage application credentials with a token issued via delegation.".into(),
        )),
        None => Ok(()),
    }
}

async fn find(conn: &mut Conn, user: &str, id: &str) -> Result<CredentialRow, ApiError> {
    let sql = format!("SELECT {COLUMNS} FROM application_credentials WHERE user_id = $1 AND id = $2");
    sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(user)
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("application credential", id))
}

async fn index(
    State(app): State<App>,
    ctx: Ctx,
    Path(user): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    refuse_trusts(&ctx)?;
    let mut conn = app.db.acquire().await?;
    super::users::require(&mut conn, &user).await?;
    let sql = format!(
        "SELECT {COLUMNS} FROM application_credentials
         WHERE user_id = $1 AND (CAST($2 AS TEXT) IS NULL OR name = $2) ORDER BY name LIMIT $3"
    );
    let rows: Vec<CredentialRow> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(&user)
        .bind(params.get("name"))
        .bind(MAX_LIST + 1)
        .fetch_all(&mut *conn)
        .await?;
    let mut items = Vec::with_capacity(rows.len());
    for row in &rows {
        items.push(row.json(&app, &mut conn).await?);
    }
    let path = format!("/v3/users/{user}/application_credentials");
    Ok(Json(list(&app, "application_credentials", &path, items)))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, id)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    refuse_trusts(&ctx)?;
    let mut conn = app.db.acquire().await?;
    let row = find(&mut conn, &user, &id).await?;
    Ok(Json(json!({"application_credential": row.json(&app, &mut conn).await?})))
}

/// What a client wants.
struct Wish {
    row: CredentialRow,
    secret: String,
    roles: Option<Vec<Value>>,
    rules: Vec<AccessRule>,
}

fn wish(ctx: &Ctx, user: &str, body: Value) -> Result<Wish, ApiError> {
    let mut fields = Fields::of(body, "application_credential")?;
    let name = fields.name()?;
    let name = name.ok_or_else(|| ApiError::BadRequest("An application credential needs a name.".into()))?;
    let expires_us = fields.later_time("expires_at")?;
    let project = ctx.require_project()?.to_owned();
    if fields.text("project_id")?.is_some_and(|wanted| wanted != project) {
        return Err(invalid("project_id", "must be the project of the token"));
    }
    let secret = match fields.text("secret")? {
        Some(secret) => secret,
        None => random_secret()?,
    };
    let row = CredentialRow {
        id: new_id(),
        user_id: user.to_owned(),
        project_id: project,
        name,
        description: fields.text("description")?.unwrap_or_default(),
        unrestricted: fields.boolean("unrestricted")?.unwrap_or(false),
        expires_us,
    };
    let roles = fields.values("roles")?;
    let rules = fields.values("access_rules")?.unwrap_or_default();
    if rules.len() > MAX_RULES {
        return Err(invalid("access_rules", "has more than 100 rules"));
    }
    let rules = rules.iter().map(access_rule).collect::<Result<_, _>>()?;
    Ok(Wish { row, secret, roles, rules })
}

fn access_rule(value: &Value) -> Result<AccessRule, ApiError> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    // An existing rule may be named by its id; looked up by the caller.
    if let Some(id) = text("id") {
        return Ok(AccessRule { id, service: String::new(), method: String::new(), path: String::new() });
    }
    let (Some(service), Some(method), Some(path)) = (text("service"), text("method"), text("path")) else {
        return Err(invalid("access_rules", "must have rules with an id, or with service, method and path"));
    };
    let methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];
    if !methods.contains(&method.as_str()) || path.len() > MAX_PATH_BYTES || service.is_empty() {
        return Err(invalid("access_rules", "has a rule with an unknown method, a long path or no service"));
    }
    Ok(AccessRule { id: String::new(), service, method, path })
}

fn random_secret() -> Result<String, ApiError> {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    let mut bytes = [0; SECRET_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Only for oneself: nobody can make a key that speaks for somebody else.
async fn create(
    State(app): State<App>,
    ctx: Ctx,
    Path(user): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    refuse_trusts(&ctx)?;
    if ctx.user_id != user || ctx.is_restricted() {
        return Err(ApiError::Forbidden(
            "An application credential is made by its own user, and not with a restricted one.".into(),
        ));
    }
    let Wish { row, secret, roles, rules } = wish(&ctx, &user, body)?;
    let hash = app.identity.passwords.hash(&secret).await?;
    let mut tx = app.begin().await?;
    let used: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM application_credentials WHERE user_id = $1")
        .bind(&user)
        .fetch_one(&mut *tx)
        .await?;
    if used >= MAX_PER_USER {
        return Err(ApiError::OverQuota(format!(
            "A user has at most {MAX_PER_USER} application credentials."
        )));
    }
    let roles = chosen_roles(&mut tx, &ctx, &row, roles).await?;
    sqlx::query(
        "INSERT INTO application_credentials
             (id, user_id, project_id, name, description, secret_hash, unrestricted, expires_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(&row.id)
    .bind(&row.user_id)
    .bind(&row.project_id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(hash)
    .bind(row.unrestricted)
    .bind(row.expires_us)
    .execute(&mut *tx)
    .await
    .map_err(|error| match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "Conflict occurred: there is already an application credential named {:?}.",
            row.name
        )),
        false => error.into(),
    })?;
    for role in roles {
        sqlx::query("INSERT INTO application_credential_roles (credential_id, role_id) VALUES ($1, $2)")
            .bind(&row.id)
            .bind(role)
            .execute(&mut *tx)
            .await?;
    }
    for rule in rules {
        keep_rule(&mut tx, &row, rule).await?;
    }
    let mut shown = row.json(&app, &mut tx).await?;
    tx.commit().await?;
    // Shown once.
    shown["secret"] = json!(secret);
    Ok((StatusCode::CREATED, Json(json!({"application_credential": shown}))))
}

/// The ids of the wanted roles (all that the token has, if none is named): never more than the token's, which may be of an
/// application credential with fewer roles than its user.
async fn chosen_roles(
    conn: &mut Conn,
    ctx: &Ctx,
    row: &CredentialRow,
    wanted: Option<Vec<Value>>,
) -> Result<Vec<String>, ApiError> {
    let mut held = principal::effective_roles(conn, &row.user_id, "project", &row.project_id).await?;
    held.retain(|role| ctx.roles.contains(&role.name));
    let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) else {
        return Ok(held.into_iter().map(|role| role.id).collect());
    };
    let mut chosen = Vec::new();
    for one in &wanted {
        let fits = |role: &&principal::Named| {
            one["id"].as_str().is_some_and(|id| id == role.id)
                || (one["id"].is_null() && one["name"].as_str().is_some_and(|name| name == role.name))
        };
        let role = held.iter().find(fits);
        let role =
            role.ok_or_else(|| invalid("roles", "names a role that you don't have in this project"))?;
        if !chosen.contains(&role.id) {
            chosen.push(role.id.clone());
        }
    }
    Ok(chosen)
}

async fn keep_rule(conn: &mut Conn, row: &CredentialRow, rule: AccessRule) -> Result<(), ApiError> {
    let known: Option<String> = sqlx::query_scalar(
        "SELECT id FROM access_rules WHERE user_id = $1 AND (id = $2 OR (service = $3 AND method = $4 AND path = $5))",
    )
    .bind(&row.user_id)
    .bind(&rule.id)
    .bind(&rule.service)
    .bind(&rule.method)
    .bind(&rule.path)
    .fetch_optional(&mut *conn)
    .await?;
    let id = match known {
        Some(id) => id,
        None if !rule.id.is_empty() => return Err(not_found("access rule", &rule.id)),
        None => {
            let id = new_id();
            sqlx::query(
                "INSERT INTO access_rules (id, user_id, service, method, path) VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(&id)
            .bind(&row.user_id)
            .bind(&rule.service)
            .bind(&rule.method)
            .bind(&rule.path)
            .execute(&mut *conn)
            .await?;
            id
        }
    };
    sqlx::query(
        "INSERT INTO application_credential_rules (credential_id, rule_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
    )
    .bind(&row.id)
    .bind(id)
    .execute(conn)
    .await?;
    Ok(())
}

/// Its tokens end at once.
async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, id)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    refuse_trusts(&ctx)?;
    if ctx.is_restricted() {
        return Err(ApiError::Forbidden("A restricted application credential can't delete one.".into()));
    }
    let mut tx = begin(&app).await?;
    find(&mut tx, &user, &id).await?;
    sqlx::query("DELETE FROM application_credentials WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn rules_of(conn: &mut Conn, user: &str) -> Result<Vec<AccessRule>, ApiError> {
    let rows: Vec<(String, String, String, String)> = sqlx::query_as(
        "SELECT id, service, method, path FROM access_rules WHERE user_id = $1 ORDER BY service, path, method LIMIT $2",
    )
    .bind(user)
    .bind(MAX_LIST + 1)
    .fetch_all(conn)
    .await?;
    let rule = |(id, service, method, path)| AccessRule { id, service, method, path };
    Ok(rows.into_iter().map(rule).collect())
}

async fn rules(State(app): State<App>, ctx: Ctx, Path(user): Path<String>) -> Result<Json<Value>, ApiError> {
    refuse_trusts(&ctx)?;
    let rules = rules_of(&mut *app.db.acquire().await?, &user).await?;
    let items = rules.iter().map(AccessRule::json).collect();
    Ok(Json(list(&app, "access_rules", &format!("/v3/users/{user}/access_rules"), items)))
}

async fn rule(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, id)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    refuse_trusts(&ctx)?;
    let rules = rules_of(&mut *app.db.acquire().await?, &user).await?;
    let rule = rules.iter().find(|rule| rule.id == id).ok_or_else(|| not_found("access rule", &id))?;
    Ok(Json(json!({"access_rule": rule.json()})))
}

async fn delete_rule(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, id)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    refuse_trusts(&ctx)?;
    let mut tx = app.begin().await?;
    let used: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM application_credential_rules u JOIN access_rules r ON r.id = u.rule_id
             WHERE r.id = $1 AND r.user_id = $2)",
    )
    .bind(&id)
    .bind(&user)
    .fetch_one(&mut *tx)
    .await?;
    if used {
        return Err(ApiError::Forbidden("An application credential uses this access rule.".into()));
    }
    let gone = sqlx::query("DELETE FROM access_rules WHERE id = $1 AND user_id = $2")
        .bind(&id)
        .bind(&user)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("access rule", &id));
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
