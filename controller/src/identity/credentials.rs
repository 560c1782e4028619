//! `/v3/credentials`: what users keep here for services (sealed in the database), and their EC2 keys.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, patch, post},
};
use http::StatusCode;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    MAX_LIST,
    fields::{Fields, invalid, merge_extra, with_extra},
    list, new_id, not_found,
    resource::{self, Filters, Query, Resource},
};
use crate::{
    app::App,
    db::Conn,
    http::{
        context::{Ctx, Delegation},
        error::ApiError,
        json::JsonBody,
    },
};

const EC2: &str = "ec2";
/// Longest blob.
const MAX_BLOB_BYTES: usize = 16 << 10;
/// Most credentials of a user.
const MAX_PER_USER: i64 = 1000;

/// Routes.
pub fn router() -> Router<App> {
    resource::routes::<CredentialRow>(post(create), patch(update))
        .route("/v3/users/{user}/credentials/OS-EC2", get(ec2_index).post(ec2_create))
        .route("/v3/users/{user}/credentials/OS-EC2/{id}", get(ec2_show).delete(ec2_delete))
}

#[derive(Debug, sqlx::FromRow)]
struct CredentialRow {
    id: String,
    user_id: String,
    project_id: Option<String>,
    r#type: String,
    blob: String,
    /// Of type ec2: by what signatures find it.
    access_hash: Option<String>,
    extra: String,
}

impl Resource for CredentialRow {
    const NAME: &'static str = "credential";
    const PATH: &'static str = "/v3/credentials";
    const TABLE: &'static str = "credentials";
    const FILTERS: Filters = &["user_id", "type"];
    const ORDER: &'static str = "id";
    const MATTERS: bool = false;

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        self.json(app)
    }

    fn push_own(query: &mut Query, ctx: &Ctx) {
        query.push("user_id = ").push_bind(ctx.user_id.clone());
    }

    fn is_for(&self, app: &App, ctx: &Ctx) -> Result<bool, ApiError> {
        concerns(app, ctx, self)
    }
}

impl CredentialRow {
    fn json(&self, app: &App) -> Result<Value, ApiError> {
        let own = json!({
            "id": self.id, "user_id": self.user_id, "project_id": self.project_id, "type": self.r#type,
            "blob": app.identity.keys.unseal(&self.blob)?,
            "links": {"self": format!("{}/identity/v3/credentials/{}", app.config.public_url, self.id)},
        });
        Ok(with_extra(&self.extra, own))
    }

    /// As `/OS-EC2` shows it.
    fn ec2_json(&self, app: &App) -> Result<Value, ApiError> {
        let blob = app.identity.keys.unseal(&self.blob)?;
        let blob: Value = serde_json::from_str(&blob).map_err(ApiError::internal)?;
        let access = blob["access"].as_str().unwrap_or_default();
        let url = format!(
            "{}/identity/v3/users/{}/credentials/OS-EC2/{access}",
            app.config.public_url, self.user_id
        );
        Ok(json!({
            "access": access, "secret": blob["secret"], "user_id": self.user_id, "tenant_id": self.project_id,
            "trust_id": blob["trust_id"], "links": {"self": url},
        }))
    }
}

/// Members of an EC2 key pair's blob that name what it was made with: a token of the pair is as limited.
const MADE_WITH: [&str; 2] = ["trust_id", "app_cred_id"];

/// What a blob of type ec2 shall say of what it was made with, in the order of [`MADE_WITH`].
fn made_with(ctx: &Ctx) -> [Value; 2] {
    match &ctx.delegation {
        None => [Value::Null, Value::Null],
        Some(Delegation::Trust(id)) => [json!(id), Value::Null],
        Some(Delegation::ApplicationCredential { id, .. }) => [Value::Null, json!(id)],
    }
}

/// A token of a trust or of an application credential has to do with what belongs to its project only, and with EC2 key
/// pairs only if they were made with the same: others speak for all that the user may do.
fn concerns(app: &App, ctx: &Ctx, row: &CredentialRow) -> Result<bool, ApiError> {
    if ctx.delegation.is_none() {
        return Ok(true);
    }
    if row.project_id.is_none() || row.project_id != ctx.project_id {
        return Ok(false);
    }
    if row.r#type != EC2 {
        return Ok(true);
    }
    let blob: Value =
        serde_json::from_str(&app.identity.keys.unseal(&row.blob)?).map_err(ApiError::internal)?;
    Ok(MADE_WITH.iter().zip(made_with(ctx)).all(|(name, wanted)| blob[name] == wanted))
}

fn concerning(app: &App, ctx: &Ctx, rows: Vec<CredentialRow>) -> Result<Vec<CredentialRow>, ApiError> {
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        if concerns(app, ctx, &row)? {
            found.push(row);
        }
    }
    Ok(found)
}

/// A restricted application credential makes nothing that outlives it.
fn may_keep(ctx: &Ctx) -> Result<(), ApiError> {
    match ctx.is_restricted() {
        true => {
            Err(ApiError::Forbidden("A restricted application credential can't make credentials.".into()))
        }
        false => Ok(()),
    }
}

/// The digest of the access key of a blob of type ec2, by which it is found; `None` for other types.
fn access_hash(kind: &str, blob: &str) -> Result<Option<String>, ApiError> {
    if kind != EC2 {
        return Ok(None);
    }
    let blob: Value =
        serde_json::from_str(blob).map_err(|_| invalid("blob", "is not JSON, as type ec2 needs"))?;
    let access =
        blob["access"].as_str().ok_or_else(|| invalid("blob", "has no access key, as type ec2 needs"))?;
    Ok(Some(hex::encode(Sha256::digest(access))))
}

fn conflict(error: sqlx::Error) -> ApiError {
    match crate::db::is_unique_violation(&error) {
        true => ApiError::Conflict("Conflict occurred: there is already a credential of this key.".into()),
        false => error.into(),
    }
}

async fn insert(app: &App, row: &CredentialRow) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    super::users::require(&mut tx, &row.user_id).await?;
    let used: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM credentials WHERE user_id = $1")
        .bind(&row.user_id)
        .fetch_one(&mut *tx)
        .await?;
    if used >= MAX_PER_USER {
        return Err(ApiError::OverQuota(format!("A user has at most {MAX_PER_USER} credentials.")));
    }
    sqlx::query(
        "INSERT INTO credentials (id, user_id, project_id, type, blob, access_hash, extra)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&row.id)
    .bind(&row.user_id)
    .bind(&row.project_id)
    .bind(&row.r#type)
    .bind(&row.blob)
    .bind(&row.access_hash)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await
    .map_err(conflict)?;
    tx.commit().await?;
    Ok(())
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    may_keep(&ctx)?;
    let mut fields = Fields::of(body, "credential")?;
    let user_id = fields.text("user_id")?.unwrap_or_else(|| ctx.user_id.clone());
    if user_id != ctx.user_id {
        ctx.require_admin()?;
    }
    let missing = |name: &str| ApiError::BadRequest(format!("A credential needs a {name}."));
    let kind = fields.text("type")?.ok_or_else(|| missing("type"))?;
    let blob = blob(&mut fields)?.ok_or_else(|| missing("blob"))?;
    let project_id = fields.text("project_id")?;
    if kind == EC2 && project_id.is_none() {
        return Err(invalid("project_id", "is missing, as type ec2 needs it"));
    }
    if ctx.delegation.is_some() && (project_id.is_none() || project_id != ctx.project_id) {
        return Err(ApiError::Forbidden(
            "Credential project does not match the project scope of the delegated token".into(),
        ));
    }
    let access_hash = access_hash(&kind, &blob)?;
    let blob = if kind == EC2 { with_delegation(&ctx, &blob)? } else { blob };
    let row = CredentialRow {
        // As in Keystone.
        id: access_hash.clone().unwrap_or_else(new_id),
        user_id,
        project_id,
        r#type: kind,
        blob: app.identity.keys.seal(&blob)?,
        access_hash,
        extra: merge_extra("{}", fields.rest_of("")?),
    };
    insert(&app, &row).await?;
    Ok((StatusCode::CREATED, Json(json!({"credential": row.json(&app)?}))))
}

/// An EC2 key pair's blob that says what it was made with, whatever the client says.
fn with_delegation(ctx: &Ctx, blob: &str) -> Result<String, ApiError> {
    let mut blob: Value = serde_json::from_str(blob).map_err(ApiError::internal)?;
    for (name, value) in MADE_WITH.into_iter().zip(made_with(ctx)) {
        if !value.is_null() || blob.get(name).is_some() {
            blob[name] = value;
        }
    }
    Ok(blob.to_string())
}

fn blob(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let blob = fields.text("blob")?;
    match blob.as_ref().is_some_and(|blob| blob.len() > MAX_BLOB_BYTES) {
        true => Err(invalid("blob", "has more than 16384 bytes")),
        false => Ok(blob),
    }
}

async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "credential")?;
    let mut tx = app.begin().await?;
    let mut row: CredentialRow = resource::find_for(&app, &mut tx, (&ctx, ctx.is_admin), &id).await?;
    fields.unchanged("user_id", &row.user_id)?;
    fields.unchanged("type", &row.r#type)?;
    if let Some(project) = fields.nullable_text("project_id")? {
        row.project_id = project;
    }
    if let Some(blob) = blob(&mut fields)? {
        if row.r#type == EC2 {
            check_made_alike(&app, &row, &blob)?;
        }
        row.access_hash = access_hash(&row.r#type, &blob)?;
        row.blob = app.identity.keys.seal(&blob)?;
    }
    row.extra = merge_extra(&row.extra, fields.rest_of(&row.id)?);
    sqlx::query(
        "UPDATE credentials SET project_id = $2, blob = $3, access_hash = $4, extra = $5 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.project_id)
    .bind(&row.blob)
    .bind(&row.access_hash)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await
    .map_err(conflict)?;
    tx.commit().await?;
    Ok(Json(json!({"credential": row.json(&app)?})))
}

/// What an EC2 key pair was made with stays.
fn check_made_alike(app: &App, row: &CredentialRow, blob: &str) -> Result<(), ApiError> {
    let read = |text: &str| {
        serde_json::from_str::<Value>(text).map_err(|_| invalid("blob", "is not JSON, as type ec2 needs"))
    };
    let (before, after) = (read(&app.identity.keys.unseal(&row.blob)?)?, read(blob)?);
    match MADE_WITH.iter().find(|name| before[**name] != after[**name]) {
        Some(name) => Err(invalid("blob", &format!("has another {name}, which can't be changed"))),
        None => Ok(()),
    }
}

async fn ec2_index(
    State(app): State<App>,
    ctx: Ctx,
    Path(user): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    super::users::require(&mut conn, &user).await?;
    let rows: Vec<CredentialRow> =
        sqlx::query_as("SELECT * FROM credentials WHERE user_id = $1 AND type = 'ec2' ORDER BY id LIMIT $2")
            .bind(&user)
            .bind(MAX_LIST + 1)
            .fetch_all(&mut *conn)
            .await?;
    let rows = concerning(&app, &ctx, rows)?;
    let items = rows.iter().map(|row| row.ec2_json(&app)).collect::<Result<_, _>>()?;
    Ok(Json(list(&app, "credentials", &format!("/v3/users/{user}/credentials/OS-EC2"), items)))
}

async fn ec2_create(
    State(app): State<App>,
    ctx: Ctx,
    Path(user): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    may_keep(&ctx)?;
    let project = body["tenant_id"].as_str().ok_or_else(|| invalid("tenant_id", "is missing"))?;
    if ctx.delegation.is_some() {
        if ctx.project_id.as_deref() != Some(project) || ctx.user_id != user {
            return Err(ApiError::Forbidden(
                "EC2 credential project does not match the project scope of the delegated token".into(),
            ));
        }
    } else {
        let mut conn = app.db.acquire().await?;
        let roles = super::principal::effective_roles(&mut conn, &user, "project", project).await?;
        if roles.is_empty() {
            return Err(ApiError::Forbidden("The user has no role in this project.".into()));
        }
    }
    let blob = json!({"access": new_id(), "secret": new_id(), "trust_id": null}).to_string();
    let blob = with_delegation(&ctx, &blob)?;
    let access_hash = access_hash(EC2, &blob)?;
    let row = CredentialRow {
        id: access_hash.clone().unwrap_or_else(new_id),
        user_id: user,
        project_id: Some(project.to_owned()),
        r#type: EC2.into(),
        blob: app.identity.keys.seal(&blob)?,
        access_hash,
        extra: "{}".into(),
    };
    insert(&app, &row).await?;
    Ok((StatusCode::CREATED, Json(json!({"credential": row.ec2_json(&app)?}))))
}

/// An EC2 key pair, as a signature is checked with it.
#[derive(Debug)]
pub(super) struct KeyPair {
    /// Whose.
    pub(super) user_id: String,
    /// Where it gives a token.
    pub(super) project_id: String,
    /// Secret.
    pub(super) secret: String,
    /// The trust that it was made with.
    pub(super) trust_id: Option<String>,
    /// The application credential that it was made with.
    pub(super) application_credential: Option<String>,
}

/// The key pair of an access key.
///
/// # Errors
/// Of the database.
pub(super) async fn of_access_key(app: &App, access: &str) -> Result<Option<KeyPair>, ApiError> {
    let row: Option<CredentialRow> = sqlx::query_as("SELECT * FROM credentials WHERE access_hash = $1")
        .bind(hex::encode(Sha256::digest(access)))
        .fetch_optional(&app.db)
        .await?;
    let Some((row, project_id)) = row.and_then(|row| row.project_id.clone().map(|project| (row, project)))
    else {
        return Ok(None);
    };
    let blob: Value =
        serde_json::from_str(&app.identity.keys.unseal(&row.blob)?).map_err(ApiError::internal)?;
    let text = |name: &str| blob[name].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    Ok(text("secret").map(|secret| KeyPair {
        user_id: row.user_id,
        project_id,
        secret,
        trust_id: text("trust_id"),
        application_credential: text("app_cred_id"),
    }))
}

async fn find_ec2(
    app: &App,
    conn: &mut Conn,
    ctx: &Ctx,
    user: &str,
    access: &str,
) -> Result<CredentialRow, ApiError> {
    let row: Option<CredentialRow> =
        sqlx::query_as("SELECT * FROM credentials WHERE access_hash = $1 AND user_id = $2")
            .bind(hex::encode(Sha256::digest(access)))
            .bind(user)
            .fetch_optional(conn)
            .await?;
    match row {
        Some(row) if concerns(app, ctx, &row)? => Ok(row),
        _ => Err(not_found("credential", access)),
    }
}

async fn ec2_show(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, access)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let row = find_ec2(&app, &mut *app.db.acquire().await?, &ctx, &user, &access).await?;
    Ok(Json(json!({"credential": row.ec2_json(&app)?})))
}

async fn ec2_delete(
    State(app): State<App>,
    ctx: Ctx,
    Path((user, access)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let row = find_ec2(&app, &mut tx, &ctx, &user, &access).await?;
    sqlx::query("DELETE FROM credentials WHERE id = $1").bind(&row.id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
