//! `/v2/metadefs`: definitions of metadata. A namespace ([`namespaces`]) says which kinds of things it is for
//! ([`resource_types`]), and has properties, objects (groups of properties) and tags ([`parts`]); dashboards offer them where
//! somebody sets metadata of an image or a flavor. They bind nobody: Mote itself reads none of them.
//!
//! Administrators write them. A project sees those that are public, and its own.

mod namespaces;
mod parts;
mod resource_types;
mod schemas;
#[cfg(test)]
mod tests;

use axum::{
    Router,
    routing::{delete, get},
};
use serde_json::{Map, Value};

use crate::{
    app::App,
    db::Conn,
    http::{context::Ctx, error::ApiError, query::Params},
};
use namespaces::NamespaceRow;
use parts::{Objects, Properties, Tags};

/// Most namespaces of the cloud.
const MAX_NAMESPACES: i64 = 1000;
/// Most objects, properties, tags or associations of a namespace.
const MAX_PARTS: i64 = 1000;
/// Most things on a page.
const MAX_LIMIT: u64 = 1000;
/// What the service itself says of a thing.
const READ_ONLY: [&str; 4] = ["self", "schema", "created_at", "updated_at"];

/// Routes.
pub(super) fn router() -> Router<App> {
    let base = "/v2/metadefs/namespaces";
    let within = |rest: &str| format!("{base}/{{namespace}}/{rest}");
    Router::new()
        .route("/v2/schemas/metadefs/{name}", get(schemas::show))
        .route("/v2/metadefs/resource_types", get(resource_types::index))
        .route(base, get(namespaces::index).post(namespaces::create))
        .route(
            &format!("{base}/{{namespace}}"),
            get(namespaces::show).put(namespaces::update).delete(namespaces::delete),
        )
        .route(&within("resource_types"), get(resource_types::of_namespace).post(resource_types::associate))
        .route(&within("resource_types/{resource_type}"), delete(resource_types::dissociate))
        .route(
            &within("objects"),
            get(parts::objects).post(parts::create::<Objects>).delete(parts::clear::<Objects>),
        )
        .route(
            &within("objects/{object}"),
            get(parts::show::<Objects>).put(parts::update::<Objects>).delete(parts::delete::<Objects>),
        )
        .route(
            &within("properties"),
            get(parts::properties).post(parts::create::<Properties>).delete(parts::clear::<Properties>),
        )
        .route(
            &within("properties/{property}"),
            get(parts::property).put(parts::update::<Properties>).delete(parts::delete::<Properties>),
        )
        .route(&within("tags"), get(parts::tags).post(parts::set_tags).delete(parts::clear::<Tags>))
        .route(
            &within("tags/{tag}"),
            get(parts::show::<Tags>)
                .post(parts::create_tag)
                .put(parts::update::<Tags>)
                .delete(parts::delete::<Tags>),
        )
}

fn unknown(what: &str, name: &str) -> ApiError {
    let name: String = name.chars().take(80).collect();
    ApiError::NotFound(format!("{what} {name} not found"))
}

/// A namespace that the asker may see.
async fn find(conn: &mut Conn, ctx: &Ctx, name: &str) -> Result<NamespaceRow, ApiError> {
    let row: Option<NamespaceRow> = sqlx::query_as("SELECT * FROM metadef_namespaces WHERE namespace = $1")
        .bind(name)
        .fetch_optional(conn)
        .await?;
    row.filter(|row| row.is_visible_to(ctx)).ok_or_else(|| unknown("Namespace", name))
}

/// Nobody says what the service says itself.
fn refuse_read_only(body: &Map<String, Value>) -> Result<(), ApiError> {
    match READ_ONLY.iter().find(|name| body.contains_key(**name)) {
        Some(name) => Err(ApiError::Forbidden(format!("Attribute '{name}' is read-only."))),
        None => Ok(()),
    }
}

/// Members without those that are null: Glance leaves out what is not there.
fn present(mut shown: Value) -> Value {
    if let Value::Object(members) = &mut shown {
        members.retain(|_, value| !value.is_null());
    }
    shown
}

/// What a list can be sorted by.
trait Sortable {
    /// The value of a key as it sorts; `None` if there is no such key.
    fn key(&self, name: &str) -> Option<String>;
    /// The unique name, which markers are.
    fn name(&self) -> &str;
    /// µs since 1970.
    fn created_us(&self) -> i64;
}

/// A time as a text that sorts.
fn time_key(us: i64) -> String {
    format!("{us:020}")
}

/// The things of a list in the order that is asked for, those after the marker, as many as asked for; `true` if the page is
/// full, so that there may be more.
fn page<T: Sortable>(
    params: &Params,
    mut rows: Vec<T>,
    default_limit: u64,
) -> Result<(Vec<T>, bool), ApiError> {
    let limit = params.number("limit")?.unwrap_or(default_limit).min(MAX_LIMIT);
    let sort_key = params.get("sort_key").unwrap_or("created_at");
    let descending = match params.get("sort_dir").unwrap_or("desc") {
        "desc" => true,
        "asc" => false,
        other => {
            let other: String = other.chars().take(64).collect();
            return Err(ApiError::BadRequest(format!("Invalid sort direction: {other}")));
        }
    };
    if rows.first().is_some_and(|row| row.key(sort_key).is_none()) {
        let sort_key: String = sort_key.chars().take(64).collect();
        return Err(ApiError::BadRequest(format!("Sort key supplied is invalid: {sort_key}")));
    }
    rows.sort_by_cached_key(|row| (row.key(sort_key), row.created_us(), row.name().to_owned()));
    if descending {
        rows.reverse();
    }
    if let Some(marker) = params.get("marker") {
        let at = rows.iter().position(|row| row.name() == marker);
        let at = at.ok_or_else(|| unknown("Marker", marker))?;
        rows.drain(..=at);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    rows.truncate(limit);
    let is_full = rows.len() == limit && limit > 0;
    Ok((rows, is_full))
}
