//! `/v3/OS-TRUST/trusts`: a user (the trustor) lets another one (the trustee) act in a project with some of its roles there,
//! as itself or, impersonated, as the trustor. The trustee asks for a token with the trust as its scope.
//!
//! A trustee with such a token may hand on what a trust gives (redelegation), as deep as the first one says: each trust of
//! the chain ends with the one before. Whatever a trust says, its tokens give no more than the first trustor has now, and
//! nothing at all unless that is all of the trust's roles.

use std::collections::BTreeSet;

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
    principal::{self, Named},
    projects,
    roles::RoleRow,
    tokens::Claims,
    users,
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{
        context::{Ctx, Delegation},
        error::ApiError,
        json::JsonBody,
        query::Params,
    },
    policy,
};

/// How often a trust may be handed on (Keystone's `[trust] max_redelegation_count`).
const MAX_REDELEGATIONS: i64 = 3;
/// Most trusts of a trustor.
const MAX_PER_USER: i64 = 1000;

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/OS-TRUST/trusts", get(index).post(create))
        .route("/v3/OS-TRUST/trusts/{id}", get(show).delete(delete))
        .route("/v3/OS-TRUST/trusts/{id}/roles", get(roles))
        .route("/v3/OS-TRUST/trusts/{id}/roles/{role}", get(role))
}

/// A stored trust.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct TrustRow {
    id: String,
    trustor_user_id: String,
    trustee_user_id: String,
    project_id: String,
    impersonation: bool,
    expires_us: Option<i64>,
    remaining_uses: Option<i64>,
    redelegated_trust_id: Option<String>,
    redelegation_count: i64,
}

impl TrustRow {
    fn json(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/OS-TRUST/trusts/{}", app.config.public_url, self.id);
        json!({
            "id": self.id,
            "trustor_user_id": self.trustor_user_id,
            "trustee_user_id": self.trustee_user_id,
            "project_id": self.project_id,
            "impersonation": self.impersonation,
            "expires_at": self.expires_us.map(db::rfc3339_us),
            "remaining_uses": self.remaining_uses,
            "redelegated_trust_id": self.redelegated_trust_id,
            "redelegation_count": self.redelegation_count,
            "deleted_at": null,
            "links": {"self": url},
        })
    }

    /// With its roles, as one trust is shown.
    async fn whole(&self, app: &App, conn: &mut Conn) -> Result<Value, ApiError> {
        let mut shown = self.json(app);
        let url = format!("{}/identity/v3/OS-TRUST/trusts/{}/roles", app.config.public_url, self.id);
        let roles = roles_of(conn, &self.id).await?;
        shown["roles"] = roles.iter().map(|role| role.json(app)).collect();
        shown["roles_links"] = json!({"self": url, "previous": null, "next": null});
        Ok(shown)
    }

    /// What a token of it shows.
    pub(super) fn token_json(&self) -> Value {
        json!({
            "id": self.id,
            "impersonation": self.impersonation,
            "trustor_user": {"id": self.trustor_user_id},
            "trustee_user": {"id": self.trustee_user_id},
        })
    }

    /// The trust's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Who may use it.
    pub(super) fn trustee(&self) -> &str {
        &self.trustee_user_id
    }

    /// The user of its tokens.
    pub(super) fn speaks_for(&self) -> &str {
        if self.impersonation { &self.trustor_user_id } else { &self.trustee_user_id }
    }

    /// Where it gives a token.
    pub(super) fn project(&self) -> &str {
        &self.project_id
    }

    /// When it ends, µs since 1970.
    pub(super) fn expires_us(&self) -> Option<i64> {
        self.expires_us
    }

    fn is_over(&self) -> bool {
        self.expires_us.is_some_and(|end| end <= db::now_us())
    }
}

async fn get_row(conn: &mut Conn, id: &str) -> Result<Option<TrustRow>, sqlx::Error> {
    sqlx::query_as("SELECT * FROM trusts WHERE id = $1").bind(id).fetch_optional(conn).await
}

/// A trust that tokens can be had with: neither over nor used up.
///
/// # Errors
/// Of the database.
pub(super) async fn usable(conn: &mut Conn, id: &str) -> Result<Option<TrustRow>, sqlx::Error> {
    let row = get_row(conn, id).await?;
    Ok(row.filter(|row| !row.is_over() && row.remaining_uses.is_none_or(|uses| uses > 0)))
}

/// Takes one use of a trust, if there is a limit; `false` if none is left, or the trust has gone.
///
/// # Errors
/// Of the database.
pub(super) async fn use_once(app: &App, trust: &TrustRow) -> Result<bool, ApiError> {
    if trust.remaining_uses.is_none() {
        return Ok(true);
    }
    let mut tx = app.begin().await?;
    let taken = sqlx::query(
        "UPDATE trusts SET remaining_uses = remaining_uses - 1 WHERE id = $1 AND remaining_uses > 0",
    )
    .bind(&trust.id)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(taken.rows_affected() == 1)
}

/// The trust, the one that it hands on, and so on to the first; empty if there is none. As long as
/// [`MAX_REDELEGATIONS`] and one.
async fn pedigree(conn: &mut Conn, id: &str) -> Result<Vec<TrustRow>, sqlx::Error> {
    let mut chain = Vec::new();
    let mut next = Some(id.to_owned());
    while let Some(id) = next.take() {
        let Some(row) = get_row(conn, &id).await? else { return Ok(Vec::new()) };
        next.clone_from(&row.redelegated_trust_id);
        chain.push(row);
    }
    Ok(chain)
}

/// What a trust's token speaks for.
pub(super) struct Entrusted {
    pub(super) trust: TrustRow,
    /// The trustor, if it is impersonated.
    pub(super) user: Option<(Named, Named)>,
    pub(super) roles: Vec<Named>,
}

/// What a trust gives now to who has a token of it; `None` if that is nothing: it is gone or over, one of those who handed
/// it on is disabled, or the first of them lacks one of its roles.
///
/// # Errors
/// Of the database.
pub(super) async fn entrusted(
    conn: &mut Conn,
    id: &str,
    claims: &Claims,
) -> Result<Option<Entrusted>, sqlx::Error> {
    let chain = pedigree(conn, id).await?;
    let (Some(trust), Some(first)) = (chain.first(), chain.last()) else { return Ok(None) };
    let is_his =
        trust.trustee_user_id == claims.user_id && claims.scope.project() == Some(trust.project_id.as_str());
    if !is_his || chain.iter().any(TrustRow::is_over) {
        return Ok(None);
    }
    // The trustee of all but the newest has handed it on; that of the newest is who asks, and was looked at.
    let handed_on = chain.iter().skip(1).map(|trust| trust.trustee_user_id.as_str());
    let users: BTreeSet<&str> =
        chain.iter().map(|trust| trust.trustor_user_id.as_str()).chain(handed_on).collect();
    for user in users {
        let enabled: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM users u JOIN domains d ON d.id = u.domain_id
                 WHERE u.id = $1 AND u.enabled AND d.enabled)",
        )
        .bind(user)
        .fetch_one(&mut *conn)
        .await?;
        if !enabled {
            return Ok(None);
        }
    }
    let Some(trustor) = principal::load_user(conn, &trust.trustor_user_id, claims).await? else {
        return Ok(None);
    };
    let held = principal::effective_roles(conn, &first.trustor_user_id, "project", &trust.project_id).await?;
    let given = given_roles(conn, id).await?;
    if given.iter().any(|id| held.iter().all(|role| role.id != *id)) {
        return Ok(None);
    }
    let roles = held.into_iter().filter(|role| given.contains(&role.id)).collect();
    let user = trust.impersonation.then_some(trustor);
    Ok(Some(Entrusted { trust: trust.clone(), user, roles }))
}

/// The ids of a trust's roles with those that they imply.
async fn given_roles(conn: &mut Conn, id: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT role_id FROM trust_roles WHERE trust_id = $1
         UNION SELECT i.implied_role_id FROM trust_roles r
         JOIN role_implications i ON i.prior_role_id = r.role_id WHERE r.trust_id = $1",
    )
    .bind(id)
    .fetch_all(conn)
    .await
}

async fn roles_of(conn: &mut Conn, id: &str) -> Result<Vec<RoleRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT r.* FROM roles r JOIN trust_roles t ON t.role_id = r.id WHERE t.trust_id = $1 ORDER BY r.name",
    )
    .bind(id)
    .fetch_all(conn)
    .await
}

/// An application credential is for one project, and has nothing to do with what its user lets others do.
fn refuse_application_credentials(ctx: &Ctx) -> Result<(), ApiError> {
    match ctx.delegation {
        Some(Delegation::ApplicationCredential { .. }) => Err(ApiError::Forbidden(
            "Using method 'application_credential' is not allowed for managing trusts.".into(),
        )),
        _ => Ok(()),
    }
}

/// A trust that the asker has to do with, or that somebody looks at who may read all.
async fn find(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<TrustRow, ApiError> {
    refuse_application_credentials(ctx)?;
    let row = get_row(conn, id).await?;
    let concerns = |row: &TrustRow| [&row.trustor_user_id, &row.trustee_user_id].contains(&&ctx.user_id);
    row.filter(|row| concerns(row) || policy::may_read(ctx)).ok_or_else(|| not_found("trust", id))
}

/// As [`find`], but one that is over or used up is as if it were gone, as in Keystone.
async fn find_usable(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<TrustRow, ApiError> {
    find(conn, ctx, id).await?;
    usable(conn, id).await?.ok_or_else(|| not_found("trust", id))
}

/// All for who may read all; those of oneself as trustor or as trustee for everybody.
async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    refuse_application_credentials(&ctx)?;
    let (trustor, trustee) = (params.get("trustor_user_id"), params.get("trustee_user_id"));
    let own = Some(ctx.user_id.as_str());
    if trustor != own && trustee != own && !policy::may_read(&ctx) {
        let text = "You may list trusts only with trustor_user_id or trustee_user_id of yourself.";
        return Err(ApiError::Forbidden(text.into()));
    }
    let rows: Vec<TrustRow> = sqlx::query_as(
        "SELECT * FROM trusts WHERE (CAST($1 AS TEXT) IS NULL OR trustor_user_id = $1)
         AND (CAST($2 AS TEXT) IS NULL OR trustee_user_id = $2) ORDER BY id LIMIT $3",
    )
    .bind(trustor)
    .bind(trustee)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "trusts", "/v3/OS-TRUST/trusts", items)))
}

async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let row = find_usable(&mut conn, &ctx, &id).await?;
    Ok(Json(json!({"trust": row.whole(&app, &mut conn).await?})))
}

/// What a client wants.
struct Wish {
    row: TrustRow,
    roles: Vec<Value>,
    /// Whether the trustee may hand it on, and how deep.
    redelegation: Option<Option<i64>>,
}

fn wish(body: Value) -> Result<Wish, ApiError> {
    let mut fields = Fields::of(body, "trust")?;
    let needed = |name: &str, text: Option<String>| text.ok_or_else(|| invalid(name, "is missing"));
    let count = fields.integer("redelegation_count")?;
    let allowed = fields.boolean("allow_redelegation")?.unwrap_or(false) && count != Some(0);
    let row = TrustRow {
        id: new_id(),
        trustor_user_id: needed("trustor_user_id", fields.text("trustor_user_id")?)?,
        trustee_user_id: needed("trustee_user_id", fields.text("trustee_user_id")?)?,
        project_id: needed("project_id", fields.text("project_id")?)?,
        impersonation: fields.boolean("impersonation")?.unwrap_or(false),
        expires_us: fields.later_time("expires_at")?,
        remaining_uses: fields.integer("remaining_uses")?,
        redelegated_trust_id: fields.text("redelegated_trust_id")?,
        redelegation_count: 0,
    };
    let roles = fields.values("roles")?.unwrap_or_default();
    Ok(Wish { row, roles, redelegation: allowed.then_some(count) })
}

impl Wish {
    /// How deep it may be handed on; `above` is what it hands on itself.
    fn depth(&self, above: Option<&TrustRow>) -> Result<i64, ApiError> {
        let Some(wanted) = self.redelegation else { return Ok(0) };
        if self.row.remaining_uses.is_some() {
            return Err(invalid("remaining_uses", "must not be set if redelegation is allowed"));
        }
        let Some(above) = above else {
            return match wanted {
                Some(count) if count > MAX_REDELEGATIONS => Err(ApiError::Forbidden(format!(
                    "Requested redelegation depth of {count} is greater than allowed {MAX_REDELEGATIONS}"
                ))),
                _ => Ok(wanted.unwrap_or(MAX_REDELEGATIONS)),
            };
        };
        let left = above.redelegation_count - 1;
        match wanted {
            Some(count) if count != left => Err(ApiError::Forbidden(
                "Modifying \"redelegation_count\" upon redelegation is forbidden. Omitting this parameter is advised.".into(),
            )),
            _ => Ok(left),
        }
    }

    /// Whether a trust may be handed on as this one.
    async fn fits_below(
        &mut self,
        conn: &mut Conn,
        above: &TrustRow,
        roles: &[String],
    ) -> Result<(), ApiError> {
        let refused = |text: String| Err(ApiError::Forbidden(text));
        if above.redelegation_count <= 0 {
            return refused(format!(
                "Remaining redelegation depth of {} out of allowed range of [0..{MAX_REDELEGATIONS}]",
                above.redelegation_count
            ));
        }
        if self.row.remaining_uses.is_some() {
            return refused("\"remaining_uses\" must not be set in order to redelegate a trust".into());
        }
        if self.row.project_id != above.project_id {
            return refused("A trust can be redelegated for its own project only.".into());
        }
        match (self.row.expires_us, above.expires_us) {
            (Some(wanted), Some(end)) if wanted > end => {
                return refused(
                    "Requested expiration time is more than redelegated trust can provide".into(),
                );
            }
            (None, end) => self.row.expires_us = end,
            _ => {}
        }
        let given: Vec<String> = sqlx::query_scalar("SELECT role_id FROM trust_roles WHERE trust_id = $1")
            .bind(&above.id)
            .fetch_all(conn)
            .await?;
        if !roles.iter().all(|role| given.contains(role)) {
            return refused("Some of requested roles are not in redelegated trust".into());
        }
        if self.row.impersonation && !above.impersonation {
            return refused(format!(
                "Impersonation is not allowed because redelegated trust does not specify impersonation. \
                 Redelegated trust id: {}",
                above.id
            ));
        }
        Ok(())
    }
}

/// The ids of the wanted roles, all of which `user` has in the project.
async fn chosen_roles(
    conn: &mut Conn,
    user: &str,
    project: &str,
    wanted: &[Value],
) -> Result<Vec<String>, ApiError> {
    let held = principal::effective_roles(conn, user, "project", project).await?;
    let mut chosen = BTreeSet::new();
    for one in wanted {
        let (id, name) = (one["id"].as_str(), one["name"].as_str());
        let role = held.iter().find(|role| match id {
            Some(id) => role.id == id,
            None => name == Some(role.name.as_str()),
        });
        let role = role.ok_or_else(|| not_found("role", id.or(name).unwrap_or_default()))?;
        chosen.insert(role.id.clone());
    }
    Ok(chosen.into_iter().collect())
}

/// Only for oneself as trustor. With a token of a trust, that one is handed on.
async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    refuse_application_credentials(&ctx)?;
    let mut wish = wish(body)?;
    if wish.roles.is_empty() {
        return Err(ApiError::Forbidden("At least one role should be specified".into()));
    }
    if wish.row.trustor_user_id != ctx.user_id {
        return Err(ApiError::Forbidden("The authenticated user should match the trustor".into()));
    }
    let above = ctx.trust().map(str::to_owned);
    if wish.row.redelegated_trust_id.is_some() && wish.row.redelegated_trust_id != above {
        return Err(ApiError::Forbidden("A trust is handed on with a token of it.".into()));
    }
    wish.row.redelegated_trust_id.clone_from(&above);
    let mut tx = app.begin().await?;
    users::require(&mut tx, &wish.row.trustee_user_id).await?;
    projects::require(&mut tx, &wish.row.project_id).await?;
    let chain = match &above {
        Some(id) => pedigree(&mut tx, id).await?,
        None => Vec::new(),
    };
    let trustor = chain.last().map_or(&wish.row.trustor_user_id, |first| &first.trustor_user_id);
    let roles = chosen_roles(&mut tx, trustor, &wish.row.project_id, &wish.roles).await?;
    wish.row.redelegation_count = wish.depth(chain.first())?;
    for above in &chain {
        wish.fits_below(&mut tx, above, &roles).await?;
    }
    insert(&mut tx, &wish.row, &roles).await?;
    let shown = wish.row.whole(&app, &mut tx).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({ "trust": shown }))))
}

async fn insert(conn: &mut Conn, row: &TrustRow, roles: &[String]) -> Result<(), ApiError> {
    let used: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM trusts WHERE trustor_user_id = $1")
        .bind(&row.trustor_user_id)
        .fetch_one(&mut *conn)
        .await?;
    if used >= MAX_PER_USER {
        return Err(ApiError::OverQuota(format!("A user has at most {MAX_PER_USER} trusts.")));
    }
    sqlx::query(
        "INSERT INTO trusts (id, trustor_user_id, trustee_user_id, project_id, impersonation, expires_us,
             remaining_uses, redelegated_trust_id, redelegation_count)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(&row.id)
    .bind(&row.trustor_user_id)
    .bind(&row.trustee_user_id)
    .bind(&row.project_id)
    .bind(row.impersonation)
    .bind(row.expires_us)
    .bind(row.remaining_uses)
    .bind(&row.redelegated_trust_id)
    .bind(row.redelegation_count)
    .execute(&mut *conn)
    .await
    .map_err(|error| match db::is_unique_violation(&error) {
        true => ApiError::Conflict(
            "Conflict occurred: there is already a trust of these users and this project with the same end."
                .into(),
        ),
        false => error.into(),
    })?;
    for role in roles {
        sqlx::query("INSERT INTO trust_roles (trust_id, role_id) VALUES ($1, $2)")
            .bind(&row.id)
            .bind(role)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// By its trustor or an administrator. Its tokens end at once, and those of all trusts that hand it on.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    let row = find(&mut tx, &ctx, &id).await?;
    if row.trustor_user_id != ctx.user_id && !ctx.is_admin {
        return Err(ApiError::Forbidden("Only admin or trustor can delete a trust".into()));
    }
    sqlx::query("DELETE FROM trusts WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn roles(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    find_usable(&mut conn, &ctx, &id).await?;
    let items = roles_of(&mut conn, &id).await?.iter().map(|role| role.json(&app)).collect();
    Ok(Json(list(&app, "roles", &format!("/v3/OS-TRUST/trusts/{id}/roles"), items)))
}

async fn role(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, role)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    find_usable(&mut conn, &ctx, &id).await?;
    let roles = roles_of(&mut conn, &id).await?;
    let found = roles.iter().find(|one| one.id() == role).ok_or_else(|| not_found("role", &role))?;
    Ok(Json(json!({"role": found.json(&app)})))
}
