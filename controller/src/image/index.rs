//! `GET /v2/images`: filters, order and pages.

use crate::db::{Conn, Db};
use axum::{Json, extract::State};
use serde_json::{Value, json};
use sqlx::QueryBuilder;

use super::{
    not_found,
    record::{self, Image},
};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Images on a page if the client doesn't say (Glance's `limit_param_default`).
const DEFAULT_LIMIT: u64 = 25;
/// Most images on a page (Glance's `api_limit_max`).
pub(crate) const MAX_LIMIT: u64 = 1000;
/// Most values of `in:`.
const MAX_IN: usize = 1000;
/// Most keys to sort by.
const MAX_SORT_KEYS: usize = 5;
/// What `visibility` may be in a list.
const VISIBILITIES: [&str; 5] = ["all", "community", "private", "public", "shared"];
/// Parameters that are not filters.
const PAGING: [&str; 7] = ["limit", "marker", "sort", "sort_key", "sort_dir", "member_status", "tag"];

/// What an image shows as its status, see [`record::Status`].
const STATUS: &str = "COALESCE(i.import_state, i.status)";

type Query = QueryBuilder<Db>;

/// A column to sort by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    /// SQL that is never NULL.
    column: &'static str,
    is_number: bool,
    descending: bool,
}

/// Lists images that the asker may see: own, public, and those whose sharing was accepted; community images only when
/// asked for by `visibility`.
///
/// # Errors
/// 400 for impossible parameters.
pub async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let (images, more) = page(&app, &ctx, &params, DEFAULT_LIMIT).await?;
    let mut body = json!({
        "images": images.iter().map(Image::json).collect::<Vec<_>>(),
        "first": params.link("/v2/images", None),
        "schema": "/v2/schemas/images",
    });
    if let (true, Some(last)) = (more, images.last()) {
        body["next"] = json!(params.link("/v2/images", Some(&last.id)));
    }
    Ok(Json(body))
}

/// A page, and whether there are more after it.
///
/// # Errors
/// As [`index`].
pub(crate) async fn page(
    app: &App,
    ctx: &Ctx,
    params: &Params,
    default_limit: u64,
) -> Result<(Vec<Image>, bool), ApiError> {
    let limit = params.number("limit")?.unwrap_or(default_limit).min(MAX_LIMIT);
    let keys = sort_keys(params)?;
    let mut conn = app.db.acquire().await?;
    let mut query = Query::new("SELECT i.* FROM images i WHERE ");
    push_visible(&mut query, ctx, params)?;
    push_filters(&mut query, params)?;
    if let Some(marker) = params.get("marker") {
        let marker = record::find(&mut conn, marker, ctx)
            .await
            .map_err(|_| ApiError::BadRequest(format!("Invalid marker: {}", not_found(marker))))?;
        push_after(&mut conn, &mut query, &keys, &marker).await?;
    }
    push_order(&mut query, &keys);
    query.push(" LIMIT ").push_bind(i64::try_from(limit + 1).unwrap_or(i64::MAX));
    let mut images = record::fetch(&mut conn, query).await?;
    let more = images.len() as u64 > limit;
    images.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    Ok((images, more))
}

fn push_visible(query: &mut Query, ctx: &Ctx, params: &Params) -> Result<(), ApiError> {
    let member_status = params.get("member_status").unwrap_or("accepted");
    if !["accepted", "pending", "rejected", "all"].contains(&member_status) {
        let text = "member_status must be one of accepted, pending, rejected, all.";
        return Err(ApiError::BadRequest(text.into()));
    }
    // An empty one chooses nothing, as in Glance.
    let visibility = params.get("visibility").filter(|visibility| !visibility.is_empty());
    if let Some(wrong) = visibility.filter(|visibility| !VISIBILITIES.contains(visibility)) {
        let wrong: String = wrong.chars().take(64).collect();
        return Err(ApiError::BadRequest(format!("Invalid visibility value: {wrong}")));
    }
    if ctx.is_admin {
        query.push("TRUE");
        return Ok(());
    }
    let project = ctx.project_id.clone();
    query.push("(i.owner = ").push_bind(project.clone()).push(" OR i.visibility = 'public'");
    if matches!(visibility, Some("community" | "all")) || params.get("id").is_some() {
        query.push(" OR i.visibility = 'community'");
    }
    query.push(
        " OR (i.visibility = 'shared' AND EXISTS (
             SELECT 1 FROM image_members m WHERE m.image_id = i.id AND m.member_id = ",
    );
    query.push_bind(project);
    if member_status != "all" {
        query.push(" AND m.status = ").push_bind(member_status.to_owned());
    }
    query.push(")))");
    Ok(())
}

fn push_filters(query: &mut Query, params: &Params) -> Result<(), ApiError> {
    let mut hidden_asked = false;
    for (name, value) in params.iter().filter(|(name, _)| !PAGING.contains(name)) {
        match name {
            "visibility" if matches!(value, "all" | "") => {}
            "visibility" | "status" | "name" | "id" | "container_format" | "disk_format" => {
                push_equal_or_in(query, text_column(name), value)?;
            }
            "owner" => push_text(query, "i.owner", value),
            "checksum" => push_text(query, "i.md5", value),
            "os_hash_value" => push_text(query, "i.sha512", value),
            "size_min" | "size_max" | "min_ram" | "min_disk" => push_number(query, name, value)?,
            "protected" => push_boolean(query, "i.protected", name, value)?,
            "os_hidden" => {
                hidden_asked = true;
                push_boolean(query, "i.hidden", name, value)?;
            }
            "created_at" | "updated_at" => push_time(query, name, value)?,
            _ => push_property(query, name, value),
        }
    }
    for tag in params.all("tag") {
        query.push(" AND EXISTS (SELECT 1 FROM image_tags t WHERE t.image_id = i.id AND t.tag = ");
        query.push_bind(tag.to_owned()).push(")");
    }
    // By id an image is found although it is hidden from lists.
    if !hidden_asked && params.get("id").is_none() {
        query.push(" AND NOT i.hidden");
    }
    Ok(())
}

fn text_column(name: &str) -> &'static str {
    match name {
        "visibility" => "i.visibility",
        "status" => STATUS,
        "name" => "i.name",
        "container_format" => "i.container_format",
        "disk_format" => "i.disk_format",
        _ => "i.id",
    }
}

fn push_text(query: &mut Query, column: &'static str, value: &str) {
    query.push(" AND ").push(column).push(" = ").push_bind(value.to_owned());
}

/// `value` or `in:a,b,"c,d"`.
fn push_equal_or_in(query: &mut Query, column: &'static str, value: &str) -> Result<(), ApiError> {
    let Some(list) = value.strip_prefix("in:") else {
        push_text(query, column, value);
        return Ok(());
    };
    let values = split_list(list);
    if values.is_empty() || values.len() > MAX_IN {
        return Err(ApiError::BadRequest(format!("in: needs 1 to {MAX_IN} values.")));
    }
    query.push(" AND ").push(column).push(" IN (");
    let mut list = query.separated(", ");
    for value in values {
        list.push_bind(value);
    }
    query.push(")");
    Ok(())
}

/// Comma-separated; what is in double quotes may contain commas.
fn split_list(list: &str) -> Vec<String> {
    let mut values = vec![String::new()];
    let mut quoted = false;
    for c in list.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => values.push(String::new()),
            c => values.last_mut().expect("there is always a last value").push(c),
        }
    }
    values.retain(|value| !value.is_empty());
    values
}

fn push_number(query: &mut Query, name: &str, value: &str) -> Result<(), ApiError> {
    let number: i64 = value.parse().ok().filter(|number| *number >= 0).ok_or_else(|| {
        ApiError::BadRequest(format!("The parameter {name} must be a whole number, at least 0."))
    })?;
    let sql = match name {
        "size_min" => " AND i.size >= ",
        "size_max" => " AND i.size <= ",
        "min_ram" => " AND i.min_ram_mib = ",
        _ => " AND i.min_disk_gib = ",
    };
    query.push(sql).push_bind(number);
    Ok(())
}

fn push_boolean(query: &mut Query, column: &'static str, name: &str, value: &str) -> Result<(), ApiError> {
    let wanted = Params::from([(name, value)]).boolean(name)?.unwrap_or_default();
    query.push(" AND ").push(column).push(" = ").push_bind(wanted);
    Ok(())
}

/// `gt:2026-11-23T03:00:00Z` and the like.
fn push_time(query: &mut Query, name: &str, value: &str) -> Result<(), ApiError> {
    let (operator, time) = value.split_once(':').unwrap_or_default();
    let (operator, time) = match operator {
        "gt" => (" > ", time),
        "gte" => (" >= ", time),
        "lt" => (" < ", time),
        "lte" => (" <= ", time),
        "eq" => (" = ", time),
        "neq" => (" <> ", time),
        _ => (" = ", value),
    };
    let refused =
        |_| ApiError::BadRequest(format!("The parameter {name} must be [gt:]YYYY-MM-DDThh:mm:ssZ."));
    let time: jiff::Timestamp = time.parse().map_err(refused)?;
    // Clients see, and so mean, whole seconds.
    let column = if name == "created_at" { "i.created_us" } else { "i.updated_us" };
    query.push(" AND ").push(column).push(" / 1000000").push(operator).push_bind(time.as_second());
    Ok(())
}

fn push_property(query: &mut Query, name: &str, value: &str) {
    query.push(" AND EXISTS (SELECT 1 FROM image_properties p WHERE p.image_id = i.id AND p.name = ");
    query.push_bind(name.to_owned()).push(" AND p.value = ").push_bind(value.to_owned()).push(")");
}

/// `sort=name:asc,size` or `sort_key=name&sort_dir=asc`, by default the newest first. The id makes the order total.
fn sort_keys(params: &Params) -> Result<Vec<Key>, ApiError> {
    let mut wanted: Vec<(String, Option<String>)> = Vec::new();
    if let Some(sort) = params.get("sort") {
        for part in sort.split(',') {
            let (key, dir) = part.split_once(':').map_or((part, None), |(key, dir)| (key, Some(dir)));
            wanted.push((key.trim().to_owned(), dir.map(|dir| dir.trim().to_owned())));
        }
    } else {
        let mut directions = params.all("sort_dir").map(str::to_owned);
        let first = directions.next();
        for key in params.all("sort_key") {
            let dir =
                if wanted.is_empty() { first.clone() } else { directions.next().or_else(|| first.clone()) };
            wanted.push((key.to_owned(), dir));
        }
        if wanted.is_empty() {
            wanted.push(("created_at".into(), first));
        }
    }
    if wanted.len() > MAX_SORT_KEYS {
        return Err(ApiError::BadRequest(format!("At most {MAX_SORT_KEYS} keys to sort by.")));
    }
    let mut keys = Vec::new();
    for (name, dir) in &wanted {
        let descending = match dir.as_deref() {
            None | Some("desc") => true,
            Some("asc") => false,
            Some(_) => {
                return Err(ApiError::BadRequest("The direction of a sort must be asc or desc.".into()));
            }
        };
        keys.push(key(name, descending)?);
    }
    let descending = keys.last().is_none_or(|key| key.descending);
    keys.push(Key { column: "i.id", is_number: false, descending });
    Ok(keys)
}

fn key(name: &str, descending: bool) -> Result<Key, ApiError> {
    let (column, is_number) = match name {
        "name" => ("COALESCE(i.name, '')", false),
        "status" => (STATUS, false),
        "container_format" => ("COALESCE(i.container_format, '')", false),
        "disk_format" => ("COALESCE(i.disk_format, '')", false),
        "size" => ("COALESCE(i.size, -1)", true),
        "id" => ("i.id", false),
        "created_at" => ("i.created_us", true),
        "updated_at" => ("i.updated_us", true),
        _ => {
            let name: String = name.chars().take(64).collect();
            return Err(ApiError::BadRequest(format!("Images can't be sorted by {name:?}.")));
        }
    };
    Ok(Key { column, is_number, descending })
}

/// Only what comes after the marker: for keys a, b, c this is a > x OR (a = x AND (b > y OR (b = y AND c > z))).
async fn push_after(
    conn: &mut Conn,
    query: &mut Query,
    keys: &[Key],
    marker: &Image,
) -> Result<(), ApiError> {
    query.push(" AND (");
    for (index, key) in keys.iter().enumerate() {
        let operator = if key.descending { " < " } else { " > " };
        let last = index + 1 == keys.len();
        for operator in [operator, " = "].into_iter().take(if last { 1 } else { 2 }) {
            query.push(key.column).push(operator);
            push_marker_value(conn, query, *key, marker).await?;
            query.push(match (operator, last) {
                (" = ", _) => " AND (",
                (_, true) => "",
                _ => " OR (",
            });
        }
    }
    query.push(")".repeat(2 * (keys.len() - 1) + 1));
    Ok(())
}

async fn push_marker_value(
    conn: &mut Conn,
    query: &mut Query,
    key: Key,
    marker: &Image,
) -> Result<(), ApiError> {
    let mut value = Query::new("SELECT ");
    value.push(key.column).push(" FROM images i WHERE i.id = ").push_bind(marker.id.clone());
    if key.is_number {
        let value: i64 = value.build_query_scalar().fetch_one(conn).await?;
        query.push_bind(value);
    } else {
        let value: String = value.build_query_scalar().fetch_one(conn).await?;
        query.push_bind(value);
    }
    Ok(())
}

fn push_order(query: &mut Query, keys: &[Key]) {
    query.push(" ORDER BY ");
    let mut list = query.separated(", ");
    for key in keys {
        list.push(key.column);
        list.push_unseparated(if key.descending { " DESC" } else { " ASC" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_may_be_quoted() {
        assert_eq!(split_list("a,\"b,c\",,d"), ["a", "b,c", "d"]);
        assert!(split_list("").is_empty());
    }

    #[test]
    fn sort_is_understood_in_both_forms() {
        let order = |params: Params| {
            sort_keys(&params).map(|keys| keys.iter().map(|k| (k.column, k.descending)).collect::<Vec<_>>())
        };
        assert_eq!(order(Params::default()).unwrap(), [("i.created_us", true), ("i.id", true)]);
        let expected = [("COALESCE(i.name, '')", false), ("COALESCE(i.size, -1)", true), ("i.id", true)];
        assert_eq!(order(Params::from([("sort", "name:asc,size:desc")])).unwrap(), expected);
        let params = Params::from([
            ("sort_key", "name"),
            ("sort_dir", "asc"),
            ("sort_key", "size"),
            ("sort_dir", "desc"),
        ]);
        assert_eq!(order(params).unwrap(), expected);
        assert!(order(Params::from([("sort", "password")])).is_err());
        assert!(order(Params::from([("sort", "name:up")])).is_err());
    }

    #[test]
    fn links_keep_the_filters_and_escape_them() {
        let params = Params::from([("name", "a b&c"), ("marker", "old"), ("limit", "2")]);
        assert_eq!(params.link("/v2/images", Some("new")), "/v2/images?name=a%20b%26c&limit=2&marker=new");
        assert_eq!(Params::default().link("/v2/images", None), "/v2/images");
    }
}
