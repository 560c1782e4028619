//! `GET /servers` and `/servers/detail`.

use crate::db::{Conn, Db};
use std::collections::HashMap;

use axum::{Json, extract::State};
use jiff::Timestamp;
use serde_json::{Value, json};
use sqlx::QueryBuilder;

use super::{
    super::state::has_status,
    row::{SELECT, ServerRow},
    view,
};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, query::Params},
    network::ports::server::{self, ServerAddress},
};

/// Nova's `max_limit`: most servers in one answer.
const MAX_LIMIT: usize = 1000;

/// Parameters that choose servers or pages here.
const KNOWN: [&str; 21] = [
    "all_tenants",
    "name",
    "status",
    "host",
    "limit",
    "marker",
    "changes-since",
    "changes-before",
    "deleted",
    "user_id",
    "project_id",
    "tenant_id",
    "uuid",
    "flavor",
    "image",
    "ip",
    "key_name",
    "availability_zone",
    "vm_state",
    "task_state",
    "sort_key",
];

/// Short.
pub(super) async fn brief(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let page = page(&app, &ctx, &params).await?;
    let servers: Vec<Value> = page.rows.iter().map(|row| view::brief(&app, row)).collect();
    Ok(Json(page.answer(&app, &params, "servers", servers)))
}

/// Full.
pub(super) async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let page = page(&app, &ctx, &params).await?;
    let none = Vec::new();
    let servers = page
        .rows
        .iter()
        .map(|row| view::document(&app, &ctx, row, page.addresses.get(&row.id).unwrap_or(&none)))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Json(page.answer(&app, &params, "servers/detail", servers)))
}

struct Page {
    rows: Vec<ServerRow>,
    addresses: HashMap<String, Vec<ServerAddress>>,
    more: bool,
}

impl Page {
    fn answer(&self, app: &App, params: &Params, path: &str, servers: Vec<Value>) -> Value {
        let mut answer = json!({ "servers": servers });
        if let (true, Some(last)) = (self.more, self.rows.last()) {
            let mut query = url_query(params.iter().filter(|(name, _)| *name != "marker"));
            query.push_str(&format!("marker={}", last.id));
            let href = format!("{}/compute/v2.1/{path}?{query}", app.config.public_url);
            answer["servers_links"] = json!([{"rel": "next", "href": href}]);
        }
        answer
    }
}

/// `a=b&` for each, percent-encoded.
fn url_query<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let encode = |text: &str| -> String {
        let byte = |byte: u8| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        };
        text.bytes().map(byte).collect()
    };
    pairs.map(|(name, value)| format!("{}={}&", encode(name), encode(value))).collect()
}

async fn page(app: &App, ctx: &Ctx, params: &Params) -> Result<Page, ApiError> {
    let own = ctx.require_project()?;
    if let Some((unknown, _)) = params.iter().find(|(name, _)| !KNOWN.contains(name) && *name != "sort_dir") {
        let unknown: String = unknown.chars().take(64).collect();
        return Err(ApiError::BadRequest(format!("The parameter {unknown} is not supported here.")));
    }
    let all = params.boolean("all_tenants").or_else(|error| match params.get("all_tenants") {
        // As a flag without a value it is a yes.
        Some("") => Ok(Some(true)),
        _ => Err(error),
    })?;
    let project = match all == Some(true) {
        true => {
            ctx.require_admin()?;
            params.get("project_id").or(params.get("tenant_id"))
        }
        false => Some(own),
    };
    if params.boolean("deleted")? == Some(true) {
        ctx.require_admin()?;
        // Mote keeps no deleted servers.
        return Ok(Page { rows: Vec::new(), addresses: HashMap::new(), more: false });
    }
    let mut db = app.db.acquire().await?;
    let mut rows = rows(&mut db, project, params, ctx.is_admin).await?;
    let addresses = addresses(&mut db, project).await?;
    let filters = Filters::parse(params)?;
    let no_address = Vec::new();
    rows.retain(|row| filters.pass(row, addresses.get(&row.id).unwrap_or(&no_address)));
    sort(&mut rows, params)?;
    if let Some(marker) = params.get("marker") {
        let shown: String = marker.chars().take(64).collect();
        let found = rows.iter().position(|row| row.id == marker);
        let at = found.ok_or_else(|| ApiError::BadRequest(format!("marker [{shown}] not found")))?;
        rows.drain(..=at);
    }
    let limit = match params.number("limit")? {
        Some(limit) => usize::try_from(limit).unwrap_or(MAX_LIMIT).min(MAX_LIMIT),
        None => MAX_LIMIT,
    };
    let more = rows.len() > limit;
    rows.truncate(limit);
    Ok(Page { rows, addresses, more })
}

/// The rows, narrowed by what is compared for equality.
async fn rows(
    db: &mut Conn,
    project: Option<&str>,
    params: &Params,
    admin: bool,
) -> Result<Vec<ServerRow>, ApiError> {
    let mut query = QueryBuilder::<Db>::new(SELECT);
    query.push(" WHERE TRUE");
    if let Some(project) = project {
        query.push(" AND servers.project_id = ").push_bind(project.to_owned());
    }
    for (name, column) in [
        ("uuid", "servers.id"),
        ("user_id", "servers.user_id"),
        ("flavor", "servers.flavor_id"),
        ("image", "servers.image_id"),
        ("key_name", "servers.key_name"),
        ("availability_zone", "servers.availability_zone"),
        ("vm_state", "servers.vm_state"),
        ("task_state", "servers.task_state"),
        ("host", "hosts.name"),
    ] {
        let Some(value) = params.get(name) else { continue };
        if name == "host" && !admin {
            continue; // As in Nova: this filter is for admins, others' are without effect.
        }
        query.push(" AND ").push(column).push(" = ").push_bind(value.to_owned());
    }
    query.push(" ORDER BY servers.created_us DESC, servers.id DESC");
    Ok(query.build_query_as().fetch_all(db).await?)
}

async fn addresses(
    db: &mut Conn,
    project: Option<&str>,
) -> Result<HashMap<String, Vec<ServerAddress>>, ApiError> {
    let mut of_server = HashMap::<String, Vec<ServerAddress>>::new();
    for address in server::addresses(db, None, project).await? {
        of_server.entry(address.server_id.clone()).or_default().push(address);
    }
    Ok(of_server)
}

/// Filters that aren't equality.
struct Filters {
    name: Option<Pattern>,
    ip: Option<Pattern>,
    statuses: Vec<String>,
    since_us: Option<i64>,
    before_us: Option<i64>,
}

impl Filters {
    fn parse(params: &Params) -> Result<Self, ApiError> {
        Ok(Self {
            name: params.get("name").map(Pattern::parse),
            ip: params.get("ip").map(Pattern::parse),
            statuses: params.all("status").map(str::to_owned).collect(),
            since_us: time(params, "changes-since")?,
            before_us: time(params, "changes-before")?,
        })
    }

    fn pass(&self, row: &ServerRow, addresses: &[ServerAddress]) -> bool {
        let is = |status: &String| has_status(row.vm_state(), row.task_state(), status);
        let has = |pattern: &Pattern| {
            addresses.iter().filter_map(ServerAddress::ip).any(|ip| pattern.matches(&ip.to_string()))
        };
        self.name.as_ref().is_none_or(|pattern| pattern.matches(&row.name))
            && self.ip.as_ref().is_none_or(has)
            && (self.statuses.is_empty() || self.statuses.iter().any(is))
            && self.since_us.is_none_or(|since| row.updated_us >= since)
            && self.before_us.is_none_or(|before| row.updated_us <= before)
    }
}

fn time(params: &Params, name: &str) -> Result<Option<i64>, ApiError> {
    let Some(text) = params.get(name) else { return Ok(None) };
    let zoned = text.parse::<Timestamp>().or_else(|_| format!("{text}Z").parse::<Timestamp>());
    let refused = |_| ApiError::BadRequest(format!("The parameter {name} must be a time as in ISO 8601."));
    zoned.map(|time| Some(time.as_microsecond())).map_err(refused)
}

/// Of Nova's regular expressions: the text anywhere, `^` and `$` for start and end, `\` before what is meant as it is.
#[derive(Debug, PartialEq, Eq)]
struct Pattern {
    text: String,
    start: bool,
    end: bool,
}

impl Pattern {
    fn parse(text: &str) -> Self {
        let start = text.starts_with('^');
        let text = text.strip_prefix('^').unwrap_or(text);
        let end = text.ends_with('$') && !text.ends_with("\\$");
        let text = if end { &text[..text.len() - 1] } else { text };
        Self { text: text.replace('\\', ""), start, end }
    }

    fn matches(&self, value: &str) -> bool {
        match (self.start, self.end) {
            (true, true) => value == self.text,
            (true, false) => value.starts_with(&self.text),
            (false, true) => value.ends_with(&self.text),
            (false, false) => value.contains(&self.text),
        }
    }
}

/// By `sort_key` and `sort_dir` (one of each); newest first without.
fn sort(rows: &mut [ServerRow], params: &Params) -> Result<(), ApiError> {
    let refused =
        |name: &str| Err(ApiError::BadRequest(format!("The parameter {name} has an unsupported value.")));
    match params.get("sort_key").unwrap_or("created_at") {
        "created_at" => {}
        "display_name" => rows.sort_by(|a, b| b.name.cmp(&a.name)),
        "updated_at" => rows.sort_by_key(|row| std::cmp::Reverse(row.updated_us)),
        "uuid" => rows.sort_by(|a, b| b.id.cmp(&a.id)),
        _ => return refused("sort_key"),
    }
    match params.get("sort_dir").unwrap_or("desc") {
        "desc" => Ok(()),
        "asc" => {
            rows.reverse();
            Ok(())
        }
        _ => refused("sort_dir"),
    }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn names_are_matched_as_clients_ask() {
        for (pattern, value, matches) in [
            ("web", "my-web-1", true),
            ("^web$", "web", true),
            ("^web$", "web-1", false),
            ("^a\\.b$", "a.b", true),
            ("b$", "ab", true),
            ("^b", "ab", false),
        ] {
            assert_eq!(Pattern::parse(pattern).matches(value), matches, "{pattern} {value}");
        }
    }
}
