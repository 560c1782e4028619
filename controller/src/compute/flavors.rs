//! Flavors: public ones, and others that some projects may use.

use crate::db::Conn;
use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::{extra_specs, quotas, versions::Version};
use crate::{
    app::App,
    db::{is_unique_violation, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Nova's largest integer.
const MAX_NUMBER: i64 = 0x7FFF_FFFF;
const MIB_PER_GIB: i64 = 1024;
/// Longest id and name.
const MAX_TEXT: usize = 255;
/// Longest description, as in Nova.
const MAX_DESCRIPTION: usize = 65_535;
/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// Most extra specs of one flavor.
const MAX_SPECS: usize = 128;

/// A flavor as stored.
#[derive(Debug, Clone, PartialEq, Eq, FromRow, Serialize, Deserialize)]
pub(crate) struct Flavor {
    /// Id.
    pub(crate) id: String,
    /// Name.
    pub(crate) name: String,
    /// vCPUs.
    pub(crate) vcpus: i64,
    /// Memory, MiB.
    pub(crate) memory_mib: i64,
    /// Disk, GiB; 0: as large as the image.
    pub(crate) disk_gib: i64,
    /// Of the disks beside it together, GiB.
    #[serde(default)]
    pub(crate) ephemeral_gib: i64,
    /// Swap space, MiB.
    #[serde(default)]
    pub(crate) swap_mib: i64,
}

impl Flavor {
    /// What its disks beside the root disk take, GiB.
    pub(crate) fn local_gib(&self) -> i64 {
        self.ephemeral_gib.saturating_add(self.swap_mib.saturating_add(MIB_PER_GIB - 1) / MIB_PER_GIB)
    }
}

/// What is shown of a flavor besides.
#[derive(Debug, Clone, FromRow)]
struct Shown {
    #[sqlx(flatten)]
    flavor: Flavor,
    description: Option<String>,
    is_public: bool,
}

const SELECT: &str = "SELECT id, name, vcpus, memory_mib, disk_gib, ephemeral_gib, swap_mib, description, is_public FROM flavors ";

impl Shown {
    fn brief(&self, app: &App, version: Version) -> Value {
        let (base, id) = (&app.config.public_url, &self.flavor.id);
        let mut document = json!({"id": id, "name": self.flavor.name, "links": [
            {"rel": "self", "href": format!("{base}/compute/v2.1/flavors/{id}")},
            {"rel": "bookmark", "href": format!("{base}/compute/flavors/{id}")},
        ]});
        if version.has(55) {
            document["description"] = json!(self.description);
        }
        document
    }

    fn document(&self, app: &App, version: Version, specs: &BTreeMap<String, String>) -> Value {
        let mut document = self.brief(app, version);
        document["vcpus"] = json!(self.flavor.vcpus);
        document["ram"] = json!(self.flavor.memory_mib);
        document["disk"] = json!(self.flavor.disk_gib);
        document["swap"] = match self.flavor.swap_mib {
            0 if !version.has(75) => json!(""),
            swap => json!(swap),
        };
        document["rxtx_factor"] = json!(1.0);
        document["OS-FLV-DISABLED:disabled"] = json!(false);
        document["OS-FLV-EXT-DATA:ephemeral"] = json!(self.flavor.ephemeral_gib);
        document["os-flavor-access:is_public"] = json!(self.is_public);
        if version.has(61) {
            document["extra_specs"] = json!(specs);
        }
        document
    }
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(MAX_TEXT).collect();
    ApiError::NotFound(format!("Flavor {id} could not be found."))
}

/// Whether a project may use a flavor that isn't public.
async fn has_access(conn: &mut Conn, id: &str, project: Option<&str>) -> Result<bool, ApiError> {
    let sql = "SELECT COUNT(*) FROM flavor_access WHERE flavor_id = $1 AND project_id = $2";
    let count: i64 =
        sqlx::query_scalar(sql).bind(id).bind(project.unwrap_or_default()).fetch_one(conn).await?;
    Ok(count > 0)
}

/// The flavor of an id, if the asker sees it.
async fn shown(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<Shown, ApiError> {
    let mut query = sqlx::QueryBuilder::<crate::db::Db>::new(SELECT);
    query.push(" WHERE id = ").push_bind(id.to_owned());
    let found: Option<Shown> = query.build_query_as().fetch_optional(&mut *conn).await?;
    match found {
        Some(found)
            if found.is_public || ctx.is_admin || has_access(conn, id, ctx.project_id.as_deref()).await? =>
        {
            Ok(found)
        }
        _ => Err(not_found(id)),
    }
}

/// The flavor of an id, if the asker may use it.
///
/// # Errors
/// 404 if there is none.
pub(crate) async fn usable(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<Flavor, ApiError> {
    Ok(shown(conn, ctx, id).await?.flavor)
}

/// The extra specs of a flavor.
///
/// # Errors
/// Of the database.
pub(crate) async fn extra_specs(conn: &mut Conn, id: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let sql = "SELECT key, value FROM flavor_extra_specs WHERE flavor_id = $1";
    let specs: Vec<(String, String)> = sqlx::query_as(sql).bind(id).fetch_all(conn).await?;
    Ok(specs.into_iter().collect())
}

/// The extra specs of all flavors.
async fn all_specs(conn: &mut Conn) -> Result<BTreeMap<String, BTreeMap<String, String>>, ApiError> {
    let sql = "SELECT flavor_id, key, value FROM flavor_extra_specs";
    let specs: Vec<(String, String, String)> = sqlx::query_as(sql).fetch_all(conn).await?;
    let mut of_flavors: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (flavor, key, value) in specs {
        of_flavors.entry(flavor).or_default().insert(key, value);
    }
    Ok(of_flavors)
}

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/flavors", get(list).post(create))
        .route("/flavors/detail", get(detail))
        .route("/flavors/{id}", get(show).put(describe).delete(delete))
        .route("/flavors/{id}/action", post(act))
        .route("/flavors/{id}/os-flavor-access", get(access))
        .route("/flavors/{id}/os-extra_specs", get(specs).post(add_specs))
        .route("/flavors/{id}/os-extra_specs/{key}", get(spec).put(set_spec).delete(remove_spec))
}

fn bad(text: impl Into<String>) -> ApiError {
    ApiError::BadRequest(text.into())
}

/// The page of a list, and the query of the next one.
async fn page(
    app: &App,
    ctx: &Ctx,
    params: &Params,
) -> Result<(Vec<Shown>, BTreeMap<String, BTreeMap<String, String>>, Option<String>), ApiError> {
    // Who is no admin sees public flavors and those that the project may use, whatever is asked for.
    let any = params.get("is_public").is_some_and(|text| text.eq_ignore_ascii_case("none"));
    let is_public = match ctx.is_admin {
        true if any => None,
        true => Some(params.boolean("is_public")?.unwrap_or(true)),
        false => None,
    };
    let key = params.get("sort_key").unwrap_or("flavorid");
    let descending = match params.get("sort_dir") {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(_) => return Err(bad("sort_dir: must be asc or desc.")),
    };
    let (min_ram, min_disk) = (params.number("minRam")?.unwrap_or(0), params.number("minDisk")?.unwrap_or(0));
    let mut db = app.db.acquire().await?;
    let mut query = sqlx::QueryBuilder::<crate::db::Db>::new(SELECT);
    query.push(" ORDER BY id");
    let mut flavors: Vec<Shown> = query.build_query_as().fetch_all(&mut *db).await?;
    let own: Vec<String> = sqlx::query_scalar("SELECT flavor_id FROM flavor_access WHERE project_id = $1")
        .bind(ctx.project_id.as_deref().unwrap_or_default())
        .fetch_all(&mut *db)
        .await?;
    flavors.retain(|one| match is_public {
        Some(public) => one.is_public == public,
        None => one.is_public || ctx.is_admin || own.contains(&one.flavor.id),
    });
    match key {
        "flavorid" | "id" => {}
        "name" => flavors.sort_by(|a, b| a.flavor.name.cmp(&b.flavor.name)),
        "vcpus" => flavors.sort_by_key(|one| one.flavor.vcpus),
        "memory_mb" => flavors.sort_by_key(|one| one.flavor.memory_mib),
        "root_gb" => flavors.sort_by_key(|one| one.flavor.disk_gib),
        _ => return Err(bad("sort_key: must be flavorid, name, vcpus, memory_mb or root_gb.")),
    }
    if descending {
        flavors.reverse();
    }
    let at_least = |value: i64, least: u64| u64::try_from(value).is_ok_and(|value| value >= least);
    flavors.retain(|one| at_least(one.flavor.memory_mib, min_ram) && at_least(one.flavor.disk_gib, min_disk));
    if let Some(marker) = params.get("marker") {
        let at = flavors.iter().position(|one| one.flavor.id == marker);
        let at = at.ok_or_else(|| bad(format!("marker [{marker}] not found")))?;
        flavors.drain(..=at);
    }
    let limit = params.number("limit")?.filter(|limit| *limit > 0).unwrap_or(MAX_PAGE).min(MAX_PAGE);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = flavors.len() > limit;
    flavors.truncate(limit);
    let next = flavors.last().filter(|_| more).map(|last| {
        let direction = if descending { "desc" } else { "asc" };
        format!(
            "limit={limit}&marker={}&sort_key={key}&sort_dir={direction}&minRam={min_ram}&minDisk={min_disk}",
            last.flavor.id.replace(' ', "%20")
        )
    });
    let specs = all_specs(&mut db).await?;
    Ok((flavors, specs, next))
}

fn answer(app: &App, flavors: Vec<Value>, path: &str, next: Option<String>) -> Json<Value> {
    let mut body = json!({"flavors": flavors});
    if let Some(next) = next {
        let href = format!("{}/compute/v2.1/{path}?{next}", app.config.public_url);
        body["flavors_links"] = json!([{"rel": "next", "href": href}]);
    }
    Json(body)
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (flavors, _, next) = page(&app, &ctx, &params).await?;
    Ok(answer(&app, flavors.iter().map(|one| one.brief(&app, version)).collect(), "flavors", next))
}

async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let (flavors, specs, next) = page(&app, &ctx, &params).await?;
    let none = BTreeMap::new();
    let document = |one: &Shown| one.document(&app, version, specs.get(&one.flavor.id).unwrap_or(&none));
    Ok(answer(&app, flavors.iter().map(document).collect(), "flavors/detail", next))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    let one = shown(&mut db, &ctx, &id).await?;
    let specs = extra_specs(&mut db, &id).await?;
    Ok(Json(json!({"flavor": one.document(&app, version, &specs)})))
}

/// A whole number, also as a text; absent or null is `None`.
fn number(body: &mut Map<String, Value>, name: &str, least: i64) -> Result<Option<i64>, ApiError> {
    let value = match body.remove(name) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    let number = value.as_i64().or_else(|| value.as_str()?.parse().ok());
    match number.filter(|number| (least..=MAX_NUMBER).contains(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(bad(format!("{name}: must be a whole number from {least} to {MAX_NUMBER}."))),
    }
}

/// An id ("auto" or none: a random one) or a name.
fn text(body: &mut Map<String, Value>, name: &str) -> Result<Option<String>, ApiError> {
    let text = match body.remove(name) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text,
        Some(Value::Number(number)) if name == "id" => number.to_string(),
        Some(_) => return Err(bad(format!("{name}: must be a string."))),
    };
    match !text.is_empty()
        && text.len() <= MAX_TEXT
        && text.trim() == text
        && !text.contains(char::is_control)
    {
        true => Ok(Some(text)),
        false => Err(bad(format!("{name}: must have 1 to {MAX_TEXT} printable characters."))),
    }
}

/// `description` (2.55): a text of one or more lines, or `null`.
fn description(body: &mut Map<String, Value>) -> Result<Option<String>, ApiError> {
    match body.remove("description") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.len() <= MAX_DESCRIPTION && !text.contains('\0') => Ok(Some(text)),
        Some(_) => Err(bad(format!("description: must be a text of {MAX_DESCRIPTION} bytes at most."))),
    }
}

fn new_flavor(body: Value, version: Version) -> Result<Shown, ApiError> {
    let Some(Value::Object(mut flavor)) = body.as_object().and_then(|body| body.get("flavor").cloned())
    else {
        return Err(bad("flavor: an object is required."));
    };
    let body = &mut flavor;
    let required = |name: &str| bad(format!("{name}: is required."));
    let new = Flavor {
        name: text(body, "name")?.ok_or_else(|| required("name"))?,
        id: match text(body, "id")?.filter(|id| id != "auto") {
            None => Uuid::new_v4().to_string(),
            Some(id) => id,
        },
        vcpus: number(body, "vcpus", 1)?.ok_or_else(|| required("vcpus"))?,
        memory_mib: number(body, "ram", 1)?.ok_or_else(|| required("ram"))?,
        disk_gib: number(body, "disk", 0)?.ok_or_else(|| required("disk"))?,
        ephemeral_gib: number(body, "OS-FLV-EXT-DATA:ephemeral", 0)?.unwrap_or(0),
        swap_mib: match body.get("swap").is_some_and(|swap| *swap == "") {
            // As it is shown where there is none.
            true => body.remove("swap").map_or(0, |_| 0),
            false => number(body, "swap", 0)?.unwrap_or(0),
        },
    };
    if !new.id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b' ')) {
        return Err(bad("id: must consist of letters, digits, '.', '_', '-' and spaces."));
    }
    let description = if version.has(55) { description(body)? } else { None };
    let factor = body.remove("rxtx_factor").filter(|factor| !factor.is_null());
    if factor.is_some_and(|f| f.as_f64().or_else(|| f.as_str()?.parse().ok()) != Some(1.0)) {
        return Err(bad("rxtx_factor: must be 1."));
    }
    let is_public = match body.remove("os-flavor-access:is_public") {
        None => true,
        Some(Value::Bool(public)) => public,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => true,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => false,
        Some(_) => return Err(bad("os-flavor-access:is_public: must be true or false.")),
    };
    match body.keys().next() {
        Some(name) => Err(bad(format!("{name}: flavors have no such property."))),
        None => Ok(Shown { flavor: new, description, is_public }),
    }
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let new = new_flavor(body, version)?;
    let mut tx = app.begin().await?;
    insert(&mut tx, &new.flavor).await.map_err(|error| match is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "A flavor with the ID {} or the name {} already exists.",
            new.flavor.id, new.flavor.name
        )),
        false => error.into(),
    })?;
    sqlx::query("UPDATE flavors SET description = $2, is_public = $3 WHERE id = $1")
        .bind(&new.flavor.id)
        .bind(&new.description)
        .bind(new.is_public)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Json(json!({"flavor": new.document(&app, version, &BTreeMap::new())})))
}

/// `PUT /flavors/{id}` (2.55): another description.
async fn describe(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    if !version.has(55) {
        return Err(ApiError::NotFound("The resource could not be found.".into()));
    }
    let mut flavor = match body.get("flavor") {
        Some(Value::Object(flavor)) if flavor.contains_key("description") => flavor.clone(),
        _ => return Err(bad("flavor: an object with description is required.")),
    };
    let description = description(&mut flavor)?;
    if let Some(name) = flavor.keys().next() {
        return Err(bad(format!("{name}: only the description of a flavor can be changed.")));
    }
    let mut tx = app.begin().await?;
    shown(&mut tx, &ctx, &id).await?;
    sqlx::query("UPDATE flavors SET description = $2 WHERE id = $1")
        .bind(&id)
        .bind(description)
        .execute(&mut *tx)
        .await?;
    let one = shown(&mut tx, &ctx, &id).await?;
    let specs = extra_specs(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(Json(json!({"flavor": one.document(&app, version, &specs)})))
}

/// Adds a flavor.
pub(super) async fn insert(tx: &mut Conn, new: &Flavor) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO flavors (id, name, vcpus, memory_mib, disk_gib, created_us, ephemeral_gib, swap_mib)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(&new.id)
    .bind(&new.name)
    .bind(new.vcpus)
    .bind(new.memory_mib)
    .bind(new.disk_gib)
    .bind(now_us())
    .bind(new.ephemeral_gib)
    .bind(new.swap_mib)
    .execute(tx)
    .await?;
    Ok(())
}

/// Servers keep what they were made with.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    shown(&mut tx, &ctx, &id).await?;
    sqlx::query("DELETE FROM flavors WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED)
}

/// The projects that may use a flavor that isn't public.
async fn projects(conn: &mut Conn, id: &str) -> Result<Value, ApiError> {
    let sql = "SELECT project_id FROM flavor_access WHERE flavor_id = $1 ORDER BY project_id";
    let projects: Vec<String> = sqlx::query_scalar(sql).bind(id).fetch_all(conn).await?;
    let list: Vec<Value> =
        projects.iter().map(|project| json!({"flavor_id": id, "tenant_id": project})).collect();
    Ok(json!({ "flavor_access": list }))
}

async fn access(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut db = app.db.acquire().await?;
    if shown(&mut db, &ctx, &id).await?.is_public {
        return Err(ApiError::NotFound("Access list not available for public flavors.".into()));
    }
    Ok(Json(projects(&mut db, &id).await?))
}

/// `addTenantAccess`, `removeTenantAccess`.
async fn act(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let one = body.as_object().filter(|body| body.len() == 1).and_then(|body| body.iter().next());
    let (name, argument) = one.ok_or_else(|| bad("The body must be an object with one action."))?;
    let project = argument.get("tenant").and_then(Value::as_str);
    let project =
        project.ok_or_else(|| bad(format!("{name}: {{\"tenant\": \"project id\"}} is required.")))?;
    let mut tx = app.begin().await?;
    let one = shown(&mut tx, &ctx, &id).await?;
    match name.as_str() {
        "addTenantAccess" => {
            if one.is_public {
                return Err(ApiError::Conflict("Can not add access to a public flavor.".into()));
            }
            quotas::require_known_project(&mut tx, project).await?;
            let sql = "INSERT INTO flavor_access (flavor_id, project_id) VALUES ($1, $2)";
            let added = sqlx::query(sql).bind(&id).bind(project).execute(&mut *tx).await;
            added.map_err(|error| match is_unique_violation(&error) {
                true => ApiError::Conflict(format!(
                    "Flavor access already exists for flavor {id} and project {project} combination."
                )),
                false => error.into(),
            })?;
        }
        "removeTenantAccess" => {
            let sql = "DELETE FROM flavor_access WHERE flavor_id = $1 AND project_id = $2";
            let gone = sqlx::query(sql).bind(&id).bind(project).execute(&mut *tx).await?;
            if gone.rows_affected() == 0 {
                return Err(ApiError::NotFound(format!(
                    "Flavor access not found for {id} / {project} combination."
                )));
            }
        }
        other => {
            let other: String = other.chars().take(64).collect();
            return Err(bad(format!("There is no such action: {other}")));
        }
    }
    let answer = projects(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(Json(answer))
}

async fn specs(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    shown(&mut db, &ctx, &id).await?;
    Ok(Json(json!({"extra_specs": extra_specs(&mut db, &id).await?})))
}

async fn spec(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    shown(&mut db, &ctx, &id).await?;
    match extra_specs(&mut db, &id).await?.remove(&key) {
        Some(value) => Ok(Json(json!({key: value}))),
        None => Err(no_spec(&id, &key)),
    }
}

fn no_spec(id: &str, key: &str) -> ApiError {
    let key: String = key.chars().take(MAX_TEXT).collect();
    ApiError::NotFound(format!("Flavor {id} has no extra specs with key {key}."))
}

async fn write_specs(app: &App, ctx: &Ctx, id: &str, new: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    shown(&mut tx, ctx, id).await?;
    for (key, value) in new {
        sqlx::query(
            "INSERT INTO flavor_extra_specs (flavor_id, key, value) VALUES ($1, $2, $3)
             ON CONFLICT (flavor_id, key) DO UPDATE SET value = excluded.value",
        )
        .bind(id)
        .bind(key)
        .bind(value)
        .execute(&mut *tx)
        .await?;
    }
    if extra_specs(&mut tx, id).await?.len() > MAX_SPECS {
        return Err(bad(format!("extra_specs: a flavor has {MAX_SPECS} at most.")));
    }
    tx.commit().await?;
    Ok(())
}

async fn add_specs(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let Some(Value::Object(given)) = body.get("extra_specs") else {
        return Err(bad("extra_specs: an object is required."));
    };
    let mut new = BTreeMap::new();
    for (key, value) in given {
        new.insert(key.clone(), extra_specs::checked(key, value)?);
    }
    write_specs(&app, &ctx, &id, &new).await?;
    Ok(Json(json!({ "extra_specs": new })))
}

async fn set_spec(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let value = body.get(&key).filter(|_| body.as_object().is_some_and(|body| body.len() == 1));
    let value = value.ok_or_else(|| bad("Request body and URI mismatch"))?;
    let new = BTreeMap::from([(key.clone(), extra_specs::checked(&key, value)?)]);
    write_specs(&app, &ctx, &id, &new).await?;
    Ok(Json(json!(new)))
}

async fn remove_spec(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    shown(&mut tx, &ctx, &id).await?;
    let sql = "DELETE FROM flavor_extra_specs WHERE flavor_id = $1 AND key = $2";
    let gone = sqlx::query(sql).bind(&id).bind(&key).execute(&mut *tx).await?;
    if gone.rows_affected() == 0 {
        return Err(no_spec(&id, &key));
    }
    tx.commit().await?;
    Ok(StatusCode::OK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestApp;

    const URL: &str = "/compute/v2.1/flavors";

    fn names(list: &Value) -> Vec<&str> {
        list["flavors"].as_array().unwrap().iter().map(|flavor| flavor["name"].as_str().unwrap()).collect()
    }

    #[tokio::test]
    async fn the_default_flavors_are_listed_in_pages() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "reader").await;
        let all = test.get(&format!("{URL}/detail?is_public=None"), &token).await.expect(200);
        assert_eq!(names(&all), ["m1.nano", "m1.tiny", "m1.small", "m1.medium", "m1.large"]);
        assert_eq!(
            all["flavors"][0],
            json!({
                "id": "1", "name": "m1.nano", "vcpus": 1, "ram": 64, "disk": 0, "swap": "", "rxtx_factor": 1.0,
                "OS-FLV-DISABLED:disabled": false, "OS-FLV-EXT-DATA:ephemeral": 0, "os-flavor-access:is_public": true,
                "links": [
                    {"rel": "self", "href": "http://cloud.test:8774/compute/v2.1/flavors/1"},
                    {"rel": "bookmark", "href": "http://cloud.test:8774/compute/flavors/1"},
                ],
            })
        );
        let page = test.get(&format!("{URL}?limit=3&sort_key=name&minRam=512"), &token).await.expect(200);
        assert_eq!(names(&page), ["m1.large", "m1.medium", "m1.small"]);
        let next =
            page["flavors_links"][0]["href"].as_str().unwrap().trim_start_matches("http://cloud.test:8774");
        let last = test.get(next, &token).await.expect(200);
        assert_eq!((names(&last), last["flavors_links"].is_null()), (vec!["m1.tiny"], true));
        let none = test.get(&format!("{URL}?is_public=false"), &test.admin_token).await.expect(200);
        assert_eq!(names(&none), [""; 0]);
        for query in ["marker=x", "limit=-1", "sort_key=x", "sort_dir=x"] {
            test.get(&format!("{URL}?{query}"), &token).await.expect(400);
        }
        test.get(URL, "").await.expect(401);
    }

    #[tokio::test]
    async fn admins_make_and_delete_flavors() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let body = json!({"flavor": {
            "name": "big", "id": null, "vcpus": 8, "ram": "16384", "disk": 40, "swap": "64", "rxtx_factor": 1.0,
            "OS-FLV-EXT-DATA:ephemeral": 3, "os-flavor-access:is_public": true,
        }});
        test.post(URL, &token, body.clone()).await.expect(403);
        let made = test.post(URL, &test.admin_token, body.clone()).await.expect(200);
        test.post(URL, &test.admin_token, body).await.expect(409);
        let (swap, ephemeral) = (&made["flavor"]["swap"], &made["flavor"]["OS-FLV-EXT-DATA:ephemeral"]);
        assert_eq!((swap, ephemeral), (&json!(64), &json!(3)));
        let path = format!("{URL}/{}", made["flavor"]["id"].as_str().unwrap());
        assert_eq!(test.get(&path, &token).await.expect(200), made);
        let specs = test.get(&format!("{path}/os-extra_specs"), &token).await.expect(200);
        assert_eq!(specs, json!({"extra_specs": {}}));
        test.get(&format!("{path}/os-extra_specs/x"), &token).await.expect(404);
        test.delete(&path, &token).await.expect(403);
        test.delete(&path, &test.admin_token).await.expect(202);
        test.get(&path, &token).await.expect(404);
        test.delete(&path, &test.admin_token).await.expect(404);
    }

    #[tokio::test]
    async fn a_flavor_that_is_not_public_is_for_the_projects_that_have_access() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "member").await;
        let admin = &test.admin_token;
        let body = json!({"flavor": {
            "name": "own", "id": "own", "vcpus": 1, "ram": 64, "disk": 0, "os-flavor-access:is_public": false,
        }});
        test.post(URL, admin, body).await.expect(200);
        let path = format!("{URL}/own");
        test.get(&path, &token).await.expect(404);
        let add = json!({"addTenantAccess": {"tenant": project}});
        test.post(&format!("{path}/action"), &token, add.clone()).await.expect(403);
        let access = test.post(&format!("{path}/action"), admin, add.clone()).await.expect(200);
        assert_eq!(access, json!({"flavor_access": [{"flavor_id": "own", "tenant_id": project}]}));
        test.post(&format!("{path}/action"), admin, add).await.expect(409);
        assert_eq!(test.get(&format!("{path}/os-flavor-access"), admin).await.expect(200), access);
        test.get(&path, &token).await.expect(200);
        assert!(names(&test.get(URL, &token).await.expect(200)).contains(&"own"));
        let listed = test.get(&format!("{URL}?is_public=false"), admin).await.expect(200);
        assert_eq!(names(&listed), ["own"]);
        let remove = json!({"removeTenantAccess": {"tenant": project}});
        test.post(&format!("{path}/action"), admin, remove.clone()).await.expect(200);
        test.post(&format!("{path}/action"), admin, remove).await.expect(404);
        assert!(!names(&test.get(URL, &token).await.expect(200)).contains(&"own"));
        test.get(&format!("{URL}/1/os-flavor-access"), admin).await.expect(404);
        let nobody = json!({"addTenantAccess": {"tenant": "nobody"}});
        test.post(&format!("{path}/action"), admin, nobody).await.expect(400);
    }

    #[tokio::test]
    async fn extra_specs_and_descriptions_are_set_shown_and_removed() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let admin = &test.admin_token;
        let path = format!("{URL}/1/os-extra_specs");
        let body = json!({"extra_specs": {"trait:CUSTOM_KVM": "required", "a": "1"}});
        test.post(&path, &token, body.clone()).await.expect(403);
        assert_eq!(test.post(&path, admin, body.clone()).await.expect(200), body);
        let one = format!("{path}/a");
        let put = async |body: Value| test.call(http::Method::PUT, &one, admin, body).await;
        assert_eq!(put(json!({"a": "2"})).await.expect(200), json!({"a": "2"}));
        put(json!({"b": "2"})).await.expect(400);
        for wrong in [
            json!({"trait:X": "yes"}),
            json!({"hw:cpu_policy": "dedicated"}),
            json!({"": "x"}),
            json!({"a": []}),
            json!("x"),
        ] {
            test.post(&path, admin, json!({ "extra_specs": wrong })).await.expect(400);
        }
        let shown = test.get_at(&format!("{URL}/1"), &token, 61).await.expect(200)["flavor"].take();
        assert_eq!(shown["extra_specs"], json!({"trait:CUSTOM_KVM": "required", "a": "2"}));
        test.delete(&one, admin).await.expect(200);
        test.delete(&one, admin).await.expect(404);
        let detail = test.get_at(&format!("{URL}/detail"), &token, 75).await.expect(200);
        assert_eq!(detail["flavors"][0]["extra_specs"], json!({"trait:CUSTOM_KVM": "required"}));
        assert_eq!(
            (&detail["flavors"][0]["swap"], &detail["flavors"][0]["description"]),
            (&json!(0), &json!(null))
        );
        let body = json!({"flavor": {"description": "small"}});
        let changed = test.call_at(http::Method::PUT, &format!("{URL}/1"), admin, 55, body.clone()).await;
        assert_eq!(changed.expect(200)["flavor"]["description"], "small");
        test.call_at(http::Method::PUT, &format!("{URL}/1"), admin, 54, body).await.expect(404);
        let wrong = json!({"flavor": {"description": "x", "ram": 1}});
        test.call_at(http::Method::PUT, &format!("{URL}/1"), admin, 55, wrong).await.expect(400);
    }

    #[tokio::test]
    async fn what_a_flavor_cannot_have_is_refused() {
        let test = TestApp::new().await;
        for (name, value) in [
            ("swap", json!(-1)),
            ("OS-FLV-EXT-DATA:ephemeral", json!("much")),
            ("rxtx_factor", json!(2)),
            ("os-flavor-access:is_public", json!("some")),
            ("vcpus", json!(0)),
            ("ram", json!(null)),
            ("disk", json!(-1)),
            ("id", json!("a/b")),
            ("name", json!("")),
            ("description", json!("x")),
        ] {
            let mut body = json!({"flavor": {"name": "f", "vcpus": 1, "ram": 64, "disk": 0}});
            body["flavor"][name] = value;
            let refused = test.post(URL, &test.admin_token, body).await.expect(400);
            assert!(refused["badRequest"]["message"].as_str().unwrap().contains(name), "{refused}");
        }
    }
}
