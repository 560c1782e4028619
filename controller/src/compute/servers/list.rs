//! `GET /servers` and `/servers/detail`.

use crate::db::{Conn, Db};
use std::collections::HashMap;

use axum::{extract::State, response::Response};
use jiff::Timestamp;
use serde::Serialize;
use sqlx::QueryBuilder;

use super::{
    super::{
        state::{STATUSES, has_status, power_state},
        versions::Version,
    },
    details::Details,
    row::{SELECT_ALL, SELECT_LISTED, SELECT_LISTED_SHORT, ServerRow},
    tags, view,
};
use crate::{
    app::App,
    hosts,
    http::{context::Ctx, error::ApiError, json::answer, query::Params},
};

/// Nova's `max_limit`: most servers in one answer.
const MAX_LIMIT: usize = 1000;

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
const NOT_HERE: [&str; 7] =
    ["ip6", "kernel_id", "ramdisk_id", "root_device_name", "soft_deleted", "terminated_at", "created_at"];
/// Parameters that choose servers or pages here.
const KNOWN: [&str; 31] = [
    "reservation_id",
    "access_ip_v4",
    "access_ip_v6",
    "auto_disk_config",
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
    "config_drive",
];

/// Rows read at a time while filters that aren't SQL choose among them.
const CHUNK: usize = 1000;

/// Short.
pub(super) async fn brief(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Response, ApiError> {
    let page = Page::read(&app, &ctx, version, &params, Form::Brief).await?;
    answer(&Answer {
        servers: page.rows.iter().map(|row| view::brief(&app, row)).collect(),
        servers_links: page.next(&app, &params, "servers"),
    })
}

/// Full.
pub(super) async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Response, ApiError> {
    let page = Page::read(&app, &ctx, version, &params, Form::Detailed).await?;
    let none = Details::default();
    let document = |row: &ServerRow| page.details.get(&row.id).unwrap_or(&none);
    answer(&Answer {
        servers: page
            .rows
            .iter()
            .map(|row| view::document(&app, &ctx, (version, view::Form::Listed), row, document(row)))
            .collect::<Result<Vec<_>, _>>()?,
        servers_links: page.next(&app, &params, "servers/detail"),
    })
}

#[derive(Debug, Serialize)]
struct Answer<T> {
    servers: Vec<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    servers_links: Option<[Next; 1]>,
}

#[derive(Debug, Serialize)]
struct Next {
    rel: &'static str,
    href: String,
}

/// What of each server is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Brief,
    Detailed,
}

/// A page of servers.
#[derive(Debug, Default)]
struct Page {
    rows: Vec<ServerRow>,
    details: HashMap<String, Details>,
    more: bool,
}

impl Page {
    async fn read(
        app: &App,
        ctx: &Ctx,
        version: Version,
        params: &Params,
        form: Form,
    ) -> Result<Self, ApiError> {
        let project = project(ctx, version, params)?;
        let limit = match params.number("limit")? {
            Some(limit) => usize::try_from(limit).unwrap_or(MAX_LIMIT).min(MAX_LIMIT),
            None => MAX_LIMIT,
        };
        let filters = Filters::parse(version, params)?;
        let of = Of::parse(ctx, params, &filters)?;
        let kept_since = hosts::kept_since(&app.config);
        let order = order(params)?;
        let wish = Wish { of, kept_since, project, params, order, filters: &filters, ctx, version };
        // One snapshot: what is read after a server is what followed it then.
        let mut tx = app.db.begin().await?;
        let page = wish.page(&mut tx, limit, form).await?;
        tx.commit().await?;
        Ok(page)
    }

    /// Where the next page is, if there is one.
    fn next(&self, app: &App, params: &Params, path: &str) -> Option<[Next; 1]> {
        let last = self.rows.last().filter(|_| self.more)?;
        let mut query = url_query(params.iter().filter(|(name, _)| *name != "marker"));
        query.push_str(&format!("marker={}", last.id));
        let href = format!("{}/compute/v2.1/{path}?{query}", app.config.public_url);
        Some([Next { rel: "next", href }])
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

/// Whose servers are asked for; `None` for all.
fn project<'a>(ctx: &'a Ctx, version: Version, params: &'a Params) -> Result<Option<&'a str>, ApiError> {
    let own = ctx.require_project()?;
    check_names(version, params)?;
    let all = params.boolean("all_tenants").or_else(|error| match params.get("all_tenants") {
        // As a flag without a value it is a yes.
        Some("") => Ok(Some(true)),
        _ => Err(error),
    })?;
    match all == Some(true) {
        true => {
            ctx.require_admin()?;
            Ok(params.get("project_id").or(params.get("tenant_id")))
        }
        false => Ok(Some(own)),
    }
}

/// Whether deleted servers are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Present,
    Deleted,
    Both,
}

impl Of {
    /// Who asks for changes hears of deletions, too; else they are for admins who ask for them.
    fn parse(ctx: &Ctx, params: &Params, filters: &Filters) -> Result<Self, ApiError> {
        let by_status = filters.statuses.iter().any(|status| status.eq_ignore_ascii_case("deleted"));
        let asked = if by_status { Some(true) } else { params.boolean("deleted")? };
        match asked {
            Some(true) => ctx.require_admin().map(|()| Self::Deleted),
            None if filters.since_us.is_some() || filters.before_us.is_some() => Ok(Self::Both),
            _ => Ok(Self::Present),
        }
    }

    /// What is read.
    fn table(self) -> &'static str {
        match self {
            Self::Present => "servers",
            Self::Deleted | Self::Both => "all_servers AS servers",
        }
    }
}

/// What is asked for.
struct Wish<'a> {
    of: Of,
    /// Servers that were deleted before this are not shown any more.
    kept_since: i64,
    project: Option<&'a str>,
    params: &'a Params,
    order: Vec<Key>,
    filters: &'a Filters,
    ctx: &'a Ctx,
    version: Version,
}

impl Wish<'_> {
    async fn page(&self, db: &mut Conn, limit: usize, form: Form) -> Result<Page, ApiError> {
        let mut page = Page::default();
        let mut after = self.params.get("marker").map(str::to_owned);
        if let Some(marker) = &after {
            self.check_marker(db, marker).await?;
        }
        // One more than is shown tells whether there are more.
        while page.rows.len() <= limit {
            let wanted = if self.filters.in_sql() { limit + 1 - page.rows.len() } else { CHUNK };
            let mut rows = self.rows(db, after.as_deref(), wanted).await?;
            let ended = rows.len() < wanted;
            after = rows.last().map(|row| row.id.clone());
            rows.retain(|row| self.filters.pass(row));
            if self.filters.need_details() {
                let details = details(db, &rows).await?;
                let none = Details::default();
                rows.retain(|row| self.filters.pass_details(details.get(&row.id).unwrap_or(&none)));
            }
            page.rows.append(&mut rows);
            if ended {
                break;
            }
        }
        page.more = page.rows.len() > limit;
        page.rows.truncate(limit);
        if form == Form::Detailed {
            page.details = details(db, &page.rows).await?;
        }
        Ok(page)
    }

    /// A marker is any server that the asker may see here.
    async fn check_marker(&self, db: &mut Conn, marker: &str) -> Result<(), ApiError> {
        let mut query = QueryBuilder::<Db>::new("SELECT servers.project_id FROM ");
        query.push(self.of.table()).push(" WHERE servers.id = ").push_bind(marker.to_owned());
        let owner: Option<String> = query.build_query_scalar().fetch_optional(db).await?;
        match owner.is_some_and(|owner| self.project.is_none_or(|project| project == owner)) {
            true => Ok(()),
            false => {
                let shown: String = marker.chars().take(64).collect();
                Err(ApiError::BadRequest(format!("marker [{shown}] not found")))
            }
        }
    }

    /// The next rows after a server in the wanted order, as far as SQL chooses among them.
    async fn rows(
        &self,
        db: &mut Conn,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ServerRow>, ApiError> {
        let with_user_data = self.ctx.is_admin && self.version.has(3);
        let mut query = QueryBuilder::<Db>::new(match self.of {
            Of::Present if with_user_data => SELECT_LISTED,
            Of::Present => SELECT_LISTED_SHORT,
            Of::Deleted | Of::Both => SELECT_ALL,
        });
        query.push(match self.of {
            Of::Present => " WHERE TRUE",
            Of::Deleted => " WHERE servers.deleted_us >= ",
            Of::Both => " WHERE (servers.deleted_us IS NULL OR servers.deleted_us >= ",
        });
        match self.of {
            Of::Present => {}
            Of::Deleted => drop(query.push_bind(self.kept_since)),
            Of::Both => drop(query.push_bind(self.kept_since).push(")")),
        }
        if let Some(project) = self.project {
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
            ("access_ip_v4", "servers.access_ipv4"),
            ("access_ip_v6", "servers.access_ipv6"),
            ("auto_disk_config", "servers.disk_config"),
            ("reservation_id", "servers.reservation_id"),
        ] {
            let Some(value) = self.params.get(name) else { continue };
            if matches!(name, "host" | "node") && !self.ctx.is_admin {
                continue; // As in Nova: this filter is for admins, others' are without effect.
            }
            query.push(" AND ").push(column).push(" = ").push_bind(value.to_owned());
        }
        self.filters.push(&mut query);
        if let Some(id) = after {
            push_after(&mut query, &self.order, self.of, id);
        }
        query.push(" ORDER BY ");
        let mut keys = query.separated(", ");
        for key in &self.order {
            keys.push(key.expression).push_unseparated(if key.ascending { " ASC" } else { " DESC" });
        }
        query.push(" LIMIT ").push_bind(i64::try_from(limit).map_err(ApiError::internal)?);
        Ok(query.build_query_as().fetch_all(db).await?)
    }
}

async fn details(db: &mut Conn, rows: &[ServerRow]) -> Result<HashMap<String, Details>, ApiError> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    Details::of_all(db, &ids).await
}

/// Narrows to what comes after the server of this id, which is there.
fn push_after(query: &mut QueryBuilder<Db>, order: &[Key], of: Of, id: &str) {
    let from =
        format!(" FROM {} LEFT JOIN hosts ON hosts.id = servers.host_id WHERE servers.id = ", of.table());
    let ascending = |key: &Key| key.ascending;
    let expressions = |keys: &[Key]| keys.iter().map(|key| key.expression).collect::<Vec<_>>().join(", ");
    if order.iter().all(ascending) || !order.iter().any(ascending) {
        // What an index can be searched for.
        let all = expressions(order);
        let sign = if order.iter().all(ascending) { ">" } else { "<" };
        query.push(format!(" AND ({all}) {sign} (SELECT {all}{from}")).push_bind(id.to_owned()).push(")");
        return;
    }
    query.push(" AND (FALSE");
    for (index, key) in order.iter().enumerate() {
        let (equal, sign) = (&order[..index], if key.ascending { ">" } else { "<" });
        query.push(" OR (");
        if !equal.is_empty() {
            let all = expressions(equal);
            query.push(format!("({all}) = (SELECT {all}{from}")).push_bind(id.to_owned()).push(") AND ");
        }
        let of = key.expression;
        query.push(format!("{of} {sign} (SELECT {of}{from}")).push_bind(id.to_owned()).push("))");
    }
    query.push(")");
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
    config_drive: Option<bool>,
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
            config_drive: match params.get("config_drive") {
                // As in server documents.
                Some("") => Some(false),
                _ => params.boolean("config_drive")?,
            },
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

    /// Those that are comparisons of columns.
    fn push(&self, query: &mut QueryBuilder<Db>) {
        if let Some(since) = self.since_us {
            query.push(" AND servers.updated_us >= ").push_bind(since);
        }
        if let Some(before) = self.before_us {
            query.push(" AND servers.updated_us <= ").push_bind(before);
        }
        if let Some(locked) = self.locked {
            query.push(if locked {
                " AND servers.locked_by IS NOT NULL"
            } else {
                " AND servers.locked_by IS NULL"
            });
        }
        if let Some(wanted) = self.config_drive {
            query.push(if wanted {
                " AND servers.config_drive IS NOT NULL"
            } else {
                " AND servers.config_drive IS NULL"
            });
        }
        if let Some(index) = self.launch_index {
            query.push(" AND servers.launch_index = ").push_bind(i64::try_from(index).unwrap_or(-1));
        }
    }

    /// Whether SQL alone chooses.
    fn in_sql(&self) -> bool {
        self.name.is_none()
            && self.statuses.is_empty()
            && self.description.is_none()
            && self.power_state.is_none()
            && !self.need_details()
    }

    /// What the row tells.
    fn pass(&self, row: &ServerRow) -> bool {
        let is = |status: &String| has_status(row.vm_state(), row.task_state(), status);
        let description = || row.description.as_deref().unwrap_or_default();
        let power = || u64::from(power_state(row.vm_state(), row.desired_power()));
        self.name.as_ref().is_none_or(|pattern| pattern.matches(&row.name))
            && (self.statuses.is_empty() || self.statuses.iter().any(is))
            && self.description.as_ref().is_none_or(|pattern| pattern.matches(description()))
            && self.power_state.is_none_or(|state| power() == state)
    }

    /// Whether [`Filters::pass_details`] chooses.
    fn need_details(&self) -> bool {
        self.ip.is_some() || !self.tags.is_empty()
    }

    /// What is told beside the row.
    fn pass_details(&self, details: &Details) -> bool {
        let has = |pattern: &Pattern| {
            let mut own = details.addresses.iter().filter(|address| !address.floating);
            own.any(|address| pattern.matches(&address.ip.to_string()))
        };
        self.ip.as_ref().is_none_or(has) && self.tags.pass(&details.tags)
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

/// What a list is ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    expression: &'static str,
    ascending: bool,
}

/// By `sort_key` and `sort_dir`, each as often as wanted; newest first without.
fn order(params: &Params) -> Result<Vec<Key>, ApiError> {
    let refused =
        |name: &str| ApiError::BadRequest(format!("The parameter {name} has an unsupported value."));
    let mut keys: Vec<&str> = params.all("sort_key").collect();
    let directions: Vec<&str> = params.all("sort_dir").collect();
    if let Some(unknown) = keys.iter().find(|key| expression(key).is_none()) {
        let unknown: String = unknown.chars().take(64).collect();
        return Err(refused(&format!("sort_key ({unknown})")));
    }
    if directions.iter().any(|direction| !matches!(*direction, "asc" | "desc")) {
        return Err(refused("sort_dir"));
    }
    let wanted = keys.len();
    keys.extend(["created_at", "uuid"]);
    let mut order: Vec<Key> = Vec::new();
    for (index, expression) in keys.into_iter().filter_map(expression).enumerate() {
        let direction = match wanted {
            0 => directions.first(),
            _ => directions.get(index).filter(|_| index < wanted),
        };
        // The second time a key says nothing.
        if !order.iter().any(|key| key.expression == expression) {
            order.push(Key { expression, ascending: direction == Some(&"asc") });
        }
    }
    Ok(order)
}

/// What a key means. Never NULL, so that comparisons are the same on both databases.
fn expression(key: &str) -> Option<&'static str> {
    Some(match key {
        "availability_zone" => "servers.availability_zone",
        "created_at" => "servers.created_us",
        "display_description" => "COALESCE(servers.description, '')",
        "display_name" => "servers.name",
        "host" | "node" => "COALESCE(hosts.name, '')",
        "image_ref" => "servers.image_id",
        "instance_type_id" => "servers.flavor_id",
        "key_name" => "COALESCE(servers.key_name, '')",
        "launch_index" => "servers.launch_index",
        "launched_at" => "COALESCE(servers.launched_us, 0)",
        "locked" => "CASE WHEN servers.locked_by IS NULL THEN 0 ELSE 1 END",
        "project_id" => "servers.project_id",
        "task_state" => "COALESCE(servers.task_state, '')",
        "updated_at" => "servers.updated_us",
        "user_id" => "servers.user_id",
        "uuid" => "servers.id",
        "vm_state" => "servers.vm_state",
        _ => return None,
    })
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
