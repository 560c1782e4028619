//! `GET /servers` and `/servers/detail`.

use crate::db::{Conn, Db};
use std::{cmp::Ordering, collections::HashMap};

use axum::{Json, extract::State};
use jiff::Timestamp;
use serde_json::{Value, json};
use sqlx::QueryBuilder;

use super::{
    super::{
        state::{STATUSES, TaskState, has_status, power_state},
        versions::Version,
    },
    row::{SELECT, ServerRow},
    tags, view,
};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, query::Params},
    network::ports::server::{self, ServerAddress},
};

/// Nova's `max_limit`: most servers in one answer.
const MAX_LIMIT: usize = 1000;

/// Keys of `sort_key` that mean something here.
const SORT_KEYS: [&str; 18] = [
    "availability_zone",
    "created_at",
    "display_description",
    "display_name",
    "host",
    "image_ref",
    "instance_type_id",
    "key_name",
    "launch_index",
    "launched_at",
    "locked",
    "node",
    "project_id",
    "task_state",
    "updated_at",
    "user_id",
    "uuid",
    "vm_state",
];
/// Parameters that later microversions brought, and which.
const SINCE: [(&str, u16); 6] = [
    ("tags", 26),
    ("tags-any", 26),
    ("not-tags", 26),
    ("not-tags-any", 26),
    ("changes-before", 66),
    ("locked", 73),
];
/// Filters of Nova's that choose nothing here: to ignore them would show servers that were not asked for.
const NOT_HERE: [&str; 12] = [
    "access_ip_v4",
    "access_ip_v6",
    "auto_disk_config",
    "config_drive",
    "ip6",
    "kernel_id",
    "ramdisk_id",
    "reservation_id",
    "root_device_name",
    "soft_deleted",
    "terminated_at",
    "created_at",
];
/// Parameters that choose servers or pages here.
const KNOWN: [&str; 26] = [
    "all_tenants",
    "name",
    "status",
    "host",
    "limit",
    "marker",
    "changes-since",
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
    "sort_dir",
    "node",
    "hostname",
    "description",
    "power_state",
    "launch_index",
];

/// Short.
pub(super) async fn brief(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let page = page(&app, &ctx, version, &params).await?;
    let servers: Vec<Value> = page.rows.iter().map(|row| view::brief(&app, row)).collect();
    Ok(Json(page.answer(&app, &params, "servers", servers)))
}

/// Full.
pub(super) async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut page = page(&app, &ctx, version, &params).await?;
    let mut tags = std::mem::take(&mut page.tags);
    let none = Vec::new();
    let servers = page
        .rows
        .iter()
        .map(|row| {
            let details = view::Details { tags: tags.remove(&row.id).unwrap_or_default(), groups: None };
            let addresses = page.addresses.get(&row.id).unwrap_or(&none);
            view::document(&app, &ctx, version, row, addresses, &details)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Json(page.answer(&app, &params, "servers/detail", servers)))
}

struct Page {
    rows: Vec<ServerRow>,
    addresses: HashMap<String, Vec<ServerAddress>>,
    tags: HashMap<String, Vec<String>>,
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

/// Refuses what does not act: since 2.75 all that Nova does not know either, and always what Nova knows and Mote doesn't.
fn check_names(version: Version, params: &Params) -> Result<(), ApiError> {
    for (name, _) in params.iter() {
        let since = SINCE.iter().find(|(known, _)| *known == name).map(|(_, since)| *since);
        let known = KNOWN.contains(&name) || since.is_some_and(|since| version.has(since));
        if !known && (version.has(75) || NOT_HERE.contains(&name)) {
            let name: String = name.chars().take(64).collect();
            return Err(ApiError::BadRequest(format!("The parameter {name} is not supported here.")));
        }
    }
    Ok(())
}

async fn page(app: &App, ctx: &Ctx, version: Version, params: &Params) -> Result<Page, ApiError> {
    let own = ctx.require_project()?;
    check_names(version, params)?;
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
        return Ok(Page { rows: Vec::new(), addresses: HashMap::new(), tags: HashMap::new(), more: false });
    }
    let mut db = app.db.acquire().await?;
    let mut rows = rows(&mut db, project, params, ctx.is_admin).await?;
    let addresses = addresses(&mut db, project).await?;
    let filters = Filters::parse(version, params)?;
    let tags = match version.has(26) {
        true => tags::of_servers(&mut db, project).await?,
        false => HashMap::new(),
    };
    let (no_address, no_tag) = (Vec::new(), Vec::new());
    rows.retain(|row| {
        filters.pass(row, addresses.get(&row.id).unwrap_or(&no_address))
            && filters.tags.pass(tags.get(&row.id).unwrap_or(&no_tag))
    });
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
    Ok(Page { rows, addresses, tags, more })
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
        ("node", "hosts.name"),
        ("hostname", "servers.hostname"),
    ] {
        let Some(value) = params.get(name) else { continue };
        if matches!(name, "host" | "node") && !admin {
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
    description: Option<Pattern>,
    locked: Option<bool>,
    power_state: Option<u64>,
    launch_index: Option<u64>,
    tags: tags::Filter,
}

impl Filters {
    fn parse(version: Version, params: &Params) -> Result<Self, ApiError> {
        let unknown = params.all("status").find(|status| {
            !STATUSES.iter().any(|known| known.eq_ignore_ascii_case(status)) && version.has(38)
        });
        if unknown.is_some() {
            return Err(ApiError::BadRequest("Invalid status value".into()));
        }
        Ok(Self {
            description: params.get("description").map(Pattern::parse),
            locked: if version.has(73) { params.boolean("locked")? } else { None },
            power_state: params.number("power_state")?,
            launch_index: params.number("launch_index")?,
            tags: match version.has(26) {
                true => tags::Filter::parse(|name| params.get(name)),
                false => tags::Filter::default(),
            },
            name: params.get("name").map(Pattern::parse),
            ip: params.get("ip").map(Pattern::parse),
            statuses: params.all("status").map(str::to_owned).collect(),
            since_us: time(params, "changes-since")?,
            before_us: if version.has(66) { time(params, "changes-before")? } else { None },
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
            && self
                .description
                .as_ref()
                .is_none_or(|pattern| pattern.matches(row.description.as_deref().unwrap_or_default()))
            && self.locked.is_none_or(|locked| locked == row.locked_by.is_some())
            && self
                .power_state
                .is_none_or(|state| u64::from(power_state(row.vm_state(), row.desired_power())) == state)
            && self.launch_index.is_none_or(|index| u64::try_from(row.launch_index) == Ok(index))
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

/// By `sort_key` and `sort_dir`, each as often as wanted; newest first without.
fn sort(rows: &mut [ServerRow], params: &Params) -> Result<(), ApiError> {
    let refused =
        |name: &str| ApiError::BadRequest(format!("The parameter {name} has an unsupported value."));
    let mut keys: Vec<&str> = params.all("sort_key").collect();
    let directions: Vec<&str> = params.all("sort_dir").collect();
    if let Some(unknown) = keys.iter().find(|key| !SORT_KEYS.contains(key)) {
        let unknown: String = unknown.chars().take(64).collect();
        return Err(refused(&format!("sort_key ({unknown})")));
    }
    if directions.iter().any(|direction| !matches!(*direction, "asc" | "desc")) {
        return Err(refused("sort_dir"));
    }
    let wanted = keys.len();
    keys.extend(["created_at", "uuid"]);
    rows.sort_by(|a, b| {
        let by_key = |(index, key): (usize, &&str)| {
            let direction = directions.get(index).filter(|_| index < wanted.max(1));
            match direction.or(directions.first().filter(|_| wanted == 0)) {
                Some(&"asc") => compare(a, b, key),
                _ => compare(b, a, key),
            }
        };
        keys.iter().enumerate().map(by_key).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
    });
    Ok(())
}

fn compare(a: &ServerRow, b: &ServerRow, key: &str) -> Ordering {
    let word = |row: &ServerRow| row.task_state().map(TaskState::word);
    match key {
        "display_name" => a.name.cmp(&b.name),
        "display_description" => a.description.cmp(&b.description),
        "updated_at" => a.updated_us.cmp(&b.updated_us),
        "launched_at" => a.launched_us.cmp(&b.launched_us),
        "launch_index" => a.launch_index.cmp(&b.launch_index),
        "uuid" => a.id.cmp(&b.id),
        "host" | "node" => a.host_name.cmp(&b.host_name),
        "availability_zone" => a.availability_zone.cmp(&b.availability_zone),
        "instance_type_id" => a.flavor_id.cmp(&b.flavor_id),
        "image_ref" => a.image_id.cmp(&b.image_id),
        "key_name" => a.key_name.cmp(&b.key_name),
        "project_id" => a.project_id.cmp(&b.project_id),
        "user_id" => a.user_id.cmp(&b.user_id),
        "vm_state" => a.vm_state().word().cmp(b.vm_state().word()),
        "task_state" => word(a).cmp(&word(b)),
        "locked" => a.locked_by.is_some().cmp(&b.locked_by.is_some()),
        _ => a.created_us.cmp(&b.created_us),
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
