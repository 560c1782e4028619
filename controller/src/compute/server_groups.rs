//! Server groups: servers that shall be near each other, or not.
//!
//! `affinity` and `anti-affinity` are filters of hosts, their soft forms an order of them. A server is a member from its
//! creation (scheduler hint `group`) to its end. The hints `same_host` and `different_host` work in the same place.

use std::collections::HashMap;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    quotas::{self, Resource},
    servers::input::{self, Fields, Wanted, invalid},
    versions::Version,
};
use crate::{
    app::App,
    db::{Conn, Db, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
    scheduler::{HostView, NoValidHost},
};

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;

/// How the servers of a group are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Affinity,
    AntiAffinity,
    SoftAffinity,
    SoftAntiAffinity,
}

impl Policy {
    const ALL: [Self; 4] = [Self::Affinity, Self::AntiAffinity, Self::SoftAffinity, Self::SoftAntiAffinity];

    fn word(self) -> &'static str {
        match self {
            Self::Affinity => "affinity",
            Self::AntiAffinity => "anti-affinity",
            Self::SoftAffinity => "soft-affinity",
            Self::SoftAntiAffinity => "soft-anti-affinity",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.word() == word)
    }

    /// The microversion that brought it.
    fn since(self) -> u16 {
        match self {
            Self::Affinity | Self::AntiAffinity => 1,
            Self::SoftAffinity | Self::SoftAntiAffinity => 15,
        }
    }
}

#[derive(Debug, FromRow)]
struct Row {
    id: String,
    project_id: String,
    user_id: String,
    name: String,
    policy: String,
    max_server_per_host: i64,
}

const SELECT: &str = "SELECT id, project_id, user_id, name, policy, max_server_per_host FROM server_groups ";

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-server-groups", get(list).post(create))
        .route("/os-server-groups/{id}", get(show).delete(delete))
}

fn document(row: &Row, members: &[String], version: Version) -> Value {
    let mut group = json!({"id": row.id, "name": row.name, "members": members});
    if version.has(13) {
        group["project_id"] = json!(row.project_id);
        group["user_id"] = json!(row.user_id);
    }
    if version.has(64) {
        group["policy"] = json!(row.policy);
        group["rules"] = match row.policy == Policy::AntiAffinity.word() {
            true => json!({"max_server_per_host": row.max_server_per_host}),
            false => json!({}),
        };
    } else {
        group["policies"] = json!([row.policy]);
        group["metadata"] = json!({});
    }
    group
}

async fn members(conn: &mut Conn, id: &str) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT server_id FROM server_group_members WHERE group_id = $1 ORDER BY server_id";
    Ok(sqlx::query_scalar(sql).bind(id).fetch_all(conn).await?)
}

async fn find(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<Row, ApiError> {
    let project = ctx.require_project()?;
    let mut query = QueryBuilder::<Db>::new(SELECT);
    query.push(" WHERE id = ").push_bind(id.to_owned());
    let row: Option<Row> = query.build_query_as().fetch_optional(conn).await?;
    row.filter(|row| ctx.is_admin || row.project_id == project).ok_or_else(|| {
        let id: String = id.chars().take(64).collect();
        ApiError::NotFound(format!("Instance group {id} could not be found."))
    })
}

async fn list(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let project = ctx.require_project()?;
    let all = params.flag("all_projects") && ctx.is_admin;
    let limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
    let offset = params.number("offset")?.unwrap_or(0).min(u64::from(u32::MAX));
    let mut db = app.db.acquire().await?;
    let mut query = QueryBuilder::<Db>::new(SELECT);
    if !all {
        query.push(" WHERE project_id = ").push_bind(project.to_owned());
    }
    query
        .push(" ORDER BY created_us, id LIMIT ")
        .push_bind(i64::try_from(limit).map_err(ApiError::internal)?);
    query.push(" OFFSET ").push_bind(i64::try_from(offset).map_err(ApiError::internal)?);
    let rows: Vec<Row> = query.build_query_as().fetch_all(&mut *db).await?;
    let mut groups = Vec::new();
    for row in &rows {
        groups.push(document(row, &members(&mut db, &row.id).await?, version));
    }
    Ok(Json(json!({"server_groups": groups})))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut db = app.db.acquire().await?;
    let row = find(&mut db, &ctx, &id).await?;
    Ok(Json(json!({"server_group": document(&row, &members(&mut db, &row.id).await?, version)})))
}

/// `policy` and `rules` since 2.64, before that a list `policies` of one.
fn policy(fields: &mut Fields, version: Version) -> Result<(Policy, i64), ApiError> {
    let (field, word) = match version.has(64) {
        true => ("policy", fields.take("policy")),
        false => match fields.take("policies") {
            Some(Value::Array(mut list)) if list.len() == 1 => ("policies", list.pop()),
            other => ("policies", other),
        },
    };
    let word = word.ok_or_else(|| input::required(field))?;
    let known = word.as_str().and_then(Policy::parse).filter(|policy| version.has(policy.since()));
    let policy = known.ok_or_else(|| invalid(field, &word, "is not a policy of server groups"))?;
    let mut most = 1;
    if let Some(rules) = fields.take("rules").filter(|_| version.has(64)) {
        let number = rules.get("max_server_per_host").and_then(input::number).filter(|number| *number > 0);
        let only = rules.as_object().is_some_and(|rules| rules.len() <= 1);
        match number.and_then(|number| i64::try_from(number).ok()) {
            Some(number) if only && policy == Policy::AntiAffinity => most = number,
            None if rules == json!({}) => {}
            _ => {
                let why = "is not {\"max_server_per_host\": 1 or more} of the policy anti-affinity";
                return Err(invalid("rules", &rules, why));
            }
        }
    }
    Ok((policy, most))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_writer()?;
    let mut fields = Fields::open(body, "server_group", &[])?;
    let name = input::server_name(&mut fields)?;
    let (policy, max_server_per_host) = policy(&mut fields, version)?;
    fields.finish()?;
    let row = Row {
        id: Uuid::new_v4().to_string(),
        project_id: ctx.require_project()?.to_owned(),
        user_id: ctx.user_id.clone(),
        name,
        policy: policy.word().into(),
        max_server_per_host,
    };
    let mut tx = app.begin().await?;
    let limit = quotas::limit(&mut tx, &row.project_id, Resource::ServerGroups).await?;
    if limit >= 0 && quotas::used(&mut tx, &row.project_id).await?.server_groups >= limit {
        return Err(ApiError::OverQuota("Quota exceeded, too many server groups.".into()));
    }
    sqlx::query(
        "INSERT INTO server_groups (id, project_id, user_id, name, policy, max_server_per_host, created_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&row.id)
    .bind(&row.project_id)
    .bind(&row.user_id)
    .bind(&row.name)
    .bind(&row.policy)
    .bind(row.max_server_per_host)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Json(json!({"server_group": document(&row, &[], version)})))
}

async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_writer()?;
    let mut tx = app.begin().await?;
    let row = find(&mut tx, &ctx, &id).await?;
    sqlx::query("DELETE FROM server_groups WHERE id = $1").bind(&row.id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What new servers have to do with others when a host is chosen.
#[derive(Debug, Default)]
pub(super) struct Company {
    group: Option<Row>,
    /// Number of the group's servers per host.
    on_hosts: HashMap<String, i64>,
    /// Hosts that are to be used, if any are named, and those that are not.
    same: Option<Vec<String>>,
    different: Vec<String>,
}

impl Company {
    /// Reads what the scheduler hints say, in the transaction that places the servers.
    pub(super) async fn read(tx: &mut Conn, ctx: &Ctx, wanted: &Wanted) -> Result<Self, ApiError> {
        let mut company = Self::default();
        if let Some(id) = &wanted.group {
            let group = find(tx, ctx, id).await.map_err(|error| match error {
                ApiError::NotFound(text) => ApiError::BadRequest(text),
                other => other,
            })?;
            let there = i64::try_from(members(tx, &group.id).await?.len()).unwrap_or(i64::MAX);
            let limit = quotas::limit(tx, &group.project_id, Resource::ServerGroupMembers).await?;
            let more = i64::try_from(wanted.max_count).unwrap_or(i64::MAX);
            if limit >= 0 && there.saturating_add(more) > limit {
                return Err(ApiError::OverQuota("Quota exceeded, too many servers in group".into()));
            }
            let sql =
                "SELECT s.host_id, COUNT(*) FROM server_group_members m JOIN servers s ON s.id = m.server_id
                 WHERE m.group_id = $1 AND s.host_id IS NOT NULL GROUP BY s.host_id";
            let rows: Vec<(String, i64)> = sqlx::query_as(sql).bind(&group.id).fetch_all(&mut *tx).await?;
            company.on_hosts = rows.into_iter().collect();
            company.group = Some(group);
        }
        if !wanted.same_host.is_empty() {
            company.same = Some(hosts_of(tx, ctx, &wanted.same_host).await?);
        }
        company.different = hosts_of(tx, ctx, &wanted.different_host).await?;
        Ok(company)
    }

    fn policy(&self) -> Option<Policy> {
        self.group.as_ref().and_then(|group| Policy::parse(&group.policy))
    }

    fn number_on(&self, host: &HostView) -> i64 {
        self.on_hosts.get(&host.id.to_string()).copied().unwrap_or(0)
    }

    fn allows(&self, host: &HostView) -> bool {
        let id = host.id.to_string();
        let most = self.group.as_ref().map_or(1, |group| group.max_server_per_host);
        let by_group = match self.policy() {
            Some(Policy::Affinity) => self.on_hosts.is_empty() || self.number_on(host) > 0,
            Some(Policy::AntiAffinity) => self.number_on(host) < most,
            _ => true,
        };
        by_group && self.same.as_ref().is_none_or(|same| same.contains(&id)) && !self.different.contains(&id)
    }

    /// Chooses among the hosts that are allowed; by a soft policy the best of them first.
    pub(super) fn choose<T>(
        &self,
        hosts: &[HostView],
        mut schedule: impl FnMut(&[HostView]) -> Result<T, NoValidHost>,
    ) -> Result<T, String> {
        let allowed: Vec<HostView> = hosts.iter().filter(|host| self.allows(host)).cloned().collect();
        if allowed.is_empty() && !hosts.is_empty() {
            let why = "No valid host was found. The group's policy or the scheduler hints leave none.";
            return Err(why.into());
        }
        let soft = match self.policy() {
            Some(Policy::SoftAffinity) => -1,
            Some(Policy::SoftAntiAffinity) => 1,
            _ => return schedule(&allowed).map_err(|refused| refused.to_string()),
        };
        let mut ranks: Vec<i64> = allowed.iter().map(|host| soft * self.number_on(host)).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let mut refused = None;
        for rank in ranks {
            let best: Vec<HostView> =
                allowed.iter().filter(|host| soft * self.number_on(host) == rank).cloned().collect();
            match schedule(&best) {
                Ok(chosen) => return Ok(chosen),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.map_or_else(|| "No valid host was found.".to_owned(), |refused| refused.to_string()))
    }

    /// Makes a new server a member of the group.
    pub(super) async fn join(
        &mut self,
        tx: &mut Conn,
        server: &str,
        host: Option<&str>,
    ) -> Result<(), ApiError> {
        let Some(group) = &self.group else { return Ok(()) };
        sqlx::query("INSERT INTO server_group_members (group_id, server_id) VALUES ($1, $2)")
            .bind(&group.id)
            .bind(server)
            .execute(tx)
            .await?;
        if let Some(host) = host {
            *self.on_hosts.entry(host.to_owned()).or_default() += 1;
        }
        Ok(())
    }
}

/// The hosts of these servers, as far as the asker may know of them.
async fn hosts_of(tx: &mut Conn, ctx: &Ctx, servers: &[String]) -> Result<Vec<String>, ApiError> {
    let mut hosts = Vec::new();
    for id in servers {
        let host: Option<Option<String>> =
            sqlx::query_scalar("SELECT host_id FROM servers WHERE id = $1 AND ($2 OR project_id = $3)")
                .bind(id)
                .bind(ctx.is_admin)
                .bind(ctx.require_project()?)
                .fetch_optional(&mut *tx)
                .await?;
        hosts.extend(host.flatten());
    }
    Ok(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestApp;

    const URL: &str = "/compute/v2.1/os-server-groups";

    #[tokio::test]
    async fn groups_are_made_listed_and_deleted_by_their_project() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "member").await;
        let (_, other) = test.tenant("bob", "member").await;
        let body = json!({"server_group": {"name": "g", "policies": ["affinity"]}});
        let group = test.post(URL, &token, body.clone()).await.expect(200)["server_group"].take();
        assert_eq!((&group["policies"], &group["members"]), (&json!(["affinity"]), &json!([])));
        let path = format!("{URL}/{}", group["id"].as_str().unwrap());
        assert_eq!(test.get(&path, &token).await.expect(200)["server_group"], group);
        test.get(&path, &other).await.expect(404);
        assert_eq!(test.get(URL, &other).await.expect(200), json!({"server_groups": []}));
        let all = test.get(&format!("{URL}?all_projects=1"), &test.admin_token).await.expect(200);
        assert_eq!(all["server_groups"][0]["name"], "g");
        let new = json!({"server_group": {"name": "a", "policy": "anti-affinity", "rules": {"max_server_per_host": 2}}});
        let group = test.post_at(URL, &token, 64, new).await.expect(200)["server_group"].take();
        assert_eq!(
            (&group["policy"], &group["rules"]["max_server_per_host"]),
            (&json!("anti-affinity"), &json!(2))
        );
        assert_eq!(group["project_id"], project);
        test.delete(&path, &other).await.expect(404);
        test.delete(&path, &token).await.expect(204);
        test.get(&path, &token).await.expect(404);
        for (version, wrong) in [
            (1, json!({"name": "g"})),
            (1, json!({"name": "g", "policies": ["soft-affinity"]})),
            (1, json!({"name": "g", "policies": ["affinity", "anti-affinity"]})),
            (1, json!({"name": "g", "policy": "affinity"})),
            (64, json!({"name": "g", "policies": ["affinity"]})),
            (64, json!({"name": "g", "policy": "affinity", "rules": {"max_server_per_host": 2}})),
            (64, json!({"name": "", "policy": "affinity"})),
        ] {
            test.post_at(URL, &token, version, json!({"server_group": wrong})).await.expect(400);
        }
        for _ in 1..10 {
            test.post(URL, &token, body.clone()).await.expect(200);
        }
        test.post(URL, &token, body).await.expect(403);
    }
}
