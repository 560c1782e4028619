//! Flavors: public, without ephemeral disk and swap.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Map, Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use crate::{
    app::App,
    db::{is_unique_violation, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Nova's largest integer.
const MAX_NUMBER: i64 = 0x7FFF_FFFF;
/// Longest id and name.
const MAX_TEXT: usize = 255;
/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// A flavor as stored.
#[derive(Debug, Clone, FromRow)]
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
}

impl Flavor {
    fn brief(&self, app: &App) -> Value {
        let base = &app.config.public_url;
        json!({"id": self.id, "name": self.name, "links": [
            {"rel": "self", "href": format!("{base}/compute/v2.1/flavors/{}", self.id)},
            {"rel": "bookmark", "href": format!("{base}/compute/flavors/{}", self.id)},
        ]})
    }

    fn document(&self, app: &App) -> Value {
        let mut document = self.brief(app);
        document["vcpus"] = json!(self.vcpus);
        document["ram"] = json!(self.memory_mib);
        document["disk"] = json!(self.disk_gib);
        document["swap"] = json!("");
        document["rxtx_factor"] = json!(1.0);
        document["OS-FLV-DISABLED:disabled"] = json!(false);
        document["OS-FLV-EXT-DATA:ephemeral"] = json!(0);
        document["os-flavor-access:is_public"] = json!(true);
        document
    }
}

/// The flavor of an id.
///
/// # Errors
/// 404 if there is none.
pub(crate) async fn find(conn: &mut Conn, id: &str) -> Result<Flavor, ApiError> {
    let sql = "SELECT id, name, vcpus, memory_mib, disk_gib FROM flavors WHERE id = $1";
    let flavor: Option<Flavor> = sqlx::query_as(sql).bind(id).fetch_optional(conn).await?;
    flavor.ok_or_else(|| ApiError::NotFound(format!("Flavor {id} could not be found.")))
}

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/flavors", get(list).post(create))
        .route("/flavors/detail", get(detail))
        .route("/flavors/{id}", get(show).delete(delete))
        .route("/flavors/{id}/os-extra_specs", get(extra_specs))
        .route("/flavors/{id}/os-extra_specs/{key}", get(extra_spec))
}

fn bad(text: impl Into<String>) -> ApiError {
    ApiError::BadRequest(text.into())
}

/// The page of a list, and the query of the next one.
async fn page(app: &App, ctx: &Ctx, params: &Params) -> Result<(Vec<Flavor>, Option<String>), ApiError> {
    // Every flavor is public: an admin who asks for the others gets none. (Others see public ones whatever they ask.)
    let is_public = params.get("is_public").filter(|text| !text.eq_ignore_ascii_case("none"));
    if is_public.is_some() && ctx.is_admin && params.boolean("is_public")? == Some(false) {
        return Ok((Vec::new(), None));
    }
    let key = params.get("sort_key").unwrap_or("flavorid");
    let descending = match params.get("sort_dir") {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(_) => return Err(bad("sort_dir: must be asc or desc.")),
    };
    let (min_ram, min_disk) = (params.number("minRam")?.unwrap_or(0), params.number("minDisk")?.unwrap_or(0));
    let sql = "SELECT id, name, vcpus, memory_mib, disk_gib FROM flavors ORDER BY id";
    let mut flavors: Vec<Flavor> = sqlx::query_as(sql).fetch_all(&app.db).await?;
    match key {
        "flavorid" | "id" => {}
        "name" => flavors.sort_by(|a, b| a.name.cmp(&b.name)),
        "vcpus" => flavors.sort_by_key(|flavor| flavor.vcpus),
        "memory_mb" => flavors.sort_by_key(|flavor| flavor.memory_mib),
        "root_gb" => flavors.sort_by_key(|flavor| flavor.disk_gib),
        _ => return Err(bad("sort_key: must be flavorid, name, vcpus, memory_mb or root_gb.")),
    }
    if descending {
        flavors.reverse();
    }
    let at_least = |value: i64, least: u64| u64::try_from(value).is_ok_and(|value| value >= least);
    flavors.retain(|flavor| at_least(flavor.memory_mib, min_ram) && at_least(flavor.disk_gib, min_disk));
    if let Some(marker) = params.get("marker") {
        let at = flavors.iter().position(|flavor| flavor.id == marker);
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
            last.id.replace(' ', "%20")
        )
    });
    Ok((flavors, next))
}

fn answer(app: &App, flavors: Vec<Value>, path: &str, next: Option<String>) -> Json<Value> {
    let mut body = json!({"flavors": flavors});
    if let Some(next) = next {
        let href = format!("{}/compute/v2.1/{path}?{next}", app.config.public_url);
        body["flavors_links"] = json!([{"rel": "next", "href": href}]);
    }
    Json(body)
}

async fn list(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let (flavors, next) = page(&app, &ctx, &params).await?;
    Ok(answer(&app, flavors.iter().map(|flavor| flavor.brief(&app)).collect(), "flavors", next))
}

async fn detail(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let (flavors, next) = page(&app, &ctx, &params).await?;
    Ok(answer(&app, flavors.iter().map(|flavor| flavor.document(&app)).collect(), "flavors/detail", next))
}

async fn show(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let flavor = find(&mut *app.db.acquire().await?, &id).await?;
    Ok(Json(json!({"flavor": flavor.document(&app)})))
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

fn new_flavor(body: Value) -> Result<Flavor, ApiError> {
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
    };
    if !new.id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b' ')) {
        return Err(bad("id: must consist of letters, digits, '.', '_', '-' and spaces."));
    }
    for name in ["OS-FLV-EXT-DATA:ephemeral", "swap"] {
        if number(body, name, 0)?.is_some_and(|size| size != 0) {
            return Err(bad(format!("{name}: flavors have no such disk here, it must be 0.")));
        }
    }
    let factor = body.remove("rxtx_factor").filter(|factor| !factor.is_null());
    if factor.is_some_and(|f| f.as_f64().or_else(|| f.as_str()?.parse().ok()) != Some(1.0)) {
        return Err(bad("rxtx_factor: must be 1."));
    }
    match body.remove("os-flavor-access:is_public") {
        None | Some(Value::Bool(true)) => {}
        Some(_) => {
            return Err(bad("os-flavor-access:is_public: every flavor is public here, it must be true."));
        }
    }
    match body.keys().next() {
        Some(name) => Err(bad(format!("{name}: flavors have no such property."))),
        None => Ok(new),
    }
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let new = new_flavor(body)?;
    let mut tx = app.begin().await?;
    insert(&mut tx, &new).await.map_err(|error| match is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "A flavor with the ID {} or the name {} already exists.",
            new.id, new.name
        )),
        false => error.into(),
    })?;
    tx.commit().await?;
    Ok(Json(json!({"flavor": new.document(&app)})))
}

/// Adds a flavor.
pub(super) async fn insert(tx: &mut Conn, new: &Flavor) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO flavors (id, name, vcpus, memory_mib, disk_gib, created_us) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&new.id)
    .bind(&new.name)
    .bind(new.vcpus)
    .bind(new.memory_mib)
    .bind(new.disk_gib)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// Servers keep what they were made with.
async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    find(&mut tx, &id).await?;
    sqlx::query("DELETE FROM flavors WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED)
}

async fn specs(app: &App, id: &str) -> Result<Map<String, Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    find(&mut db, id).await?;
    let sql = "SELECT key, value FROM flavor_extra_specs WHERE flavor_id = $1";
    let specs: Vec<(String, String)> = sqlx::query_as(sql).bind(id).fetch_all(&mut *db).await?;
    Ok(specs.into_iter().map(|(key, value)| (key, value.into())).collect())
}

async fn extra_specs(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({"extra_specs": specs(&app, &id).await?})))
}

async fn extra_spec(
    State(app): State<App>,
    _ctx: Ctx,
    Path((id, key)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    match specs(&app, &id).await?.remove(&key) {
        Some(value) => Ok(Json(json!({key: value}))),
        None => Err(ApiError::NotFound(format!("Flavor {id} has no extra specs with key {key}."))),
    }
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
            "name": "big", "id": null, "vcpus": 8, "ram": "16384", "disk": 40, "swap": 0, "rxtx_factor": 1.0,
            "OS-FLV-EXT-DATA:ephemeral": 0, "os-flavor-access:is_public": true,
        }});
        test.post(URL, &token, body.clone()).await.expect(403);
        let made = test.post(URL, &test.admin_token, body.clone()).await.expect(200);
        test.post(URL, &test.admin_token, body).await.expect(409);
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
    async fn what_a_flavor_cannot_have_is_refused() {
        let test = TestApp::new().await;
        for (name, value) in [
            ("swap", json!(1)),
            ("OS-FLV-EXT-DATA:ephemeral", json!(1)),
            ("rxtx_factor", json!(2)),
            ("os-flavor-access:is_public", json!(false)),
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
