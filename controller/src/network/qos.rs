//! QoS policies and their rules: bandwidth limits in both directions, DSCP marks.

use axum::{
    Json,
    extract::{Path, Query as Params, State},
};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Id, Scope,
    attributes::{Attributes, invalid},
    base,
    listing::{Collection, Query},
    rbac, reach,
    resource::{Change, Resource},
};
use crate::{
    app::App,
    db::{Conn, now_us, rfc3339_s},
    http::{context::Ctx, error::ApiError},
};

/// Neutron's largest rate (`DB_INTEGER_MAX_VALUE`).
const MAX_KBPS: i64 = 2_147_483_647;
/// The marks that have a meaning (RFC 2474, 2597, 3246, 5865; Neutron's list).
const DSCP_MARKS: [i64; 22] =
    [0, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 44, 46, 48, 56];

/// QoS policies as resources.
pub(super) struct Policies;
/// Bandwidth limits as resources below a policy.
pub(super) struct BandwidthLimits;
/// DSCP marks as resources below a policy.
pub(super) struct DscpMarks;

/// A policy as stored.
#[derive(Debug, FromRow)]
pub(super) struct PolicyRow {
    id: String,
    /// Owner.
    pub(super) project_id: String,
    name: String,
    description: String,
    is_default: bool,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    shared: bool,
}

#[derive(Debug, Clone, FromRow)]
struct RuleRow {
    id: String,
    policy_id: String,
    kind: String,
    direction: String,
    max_kbps: i64,
    max_burst_kbps: i64,
    dscp_mark: i64,
}

impl RuleRow {
    fn document(&self) -> Value {
        let mut document = json!({"id": self.id, "qos_policy_id": self.policy_id});
        match self.kind.as_str() {
            "bandwidth_limit" => {
                document["max_kbps"] = json!(self.max_kbps);
                document["max_burst_kbps"] = json!(self.max_burst_kbps);
                document["direction"] = json!(self.direction);
            }
            _ => document["dscp_mark"] = json!(self.dscp_mark),
        }
        document
    }
}

fn select(scope: &Scope) -> QueryBuilder<crate::db::Db> {
    let mut query = QueryBuilder::new(
        "SELECT qos_policies.*, EXISTS (SELECT 1 FROM rbac_policies WHERE rbac_policies.object_id = qos_policies.id
             AND rbac_policies.target_project = '*') AS shared FROM qos_policies WHERE ",
    );
    rbac::push_visible(&mut query, ["qos_policies.id", "qos_policies.project_id"], scope);
    query
}

/// The policy of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<PolicyRow, ApiError> {
    let mut query = select(scope);
    query.push(" AND qos_policies.id = ").push_bind(id.to_owned());
    let row: Option<PolicyRow> = query.build_query_as().fetch_optional(db).await?;
    row.ok_or_else(|| Policies::missing(id))
}

/// Neutron's policy: limits are the cloud's, so admins set them.
async fn changeable(db: &mut Conn, id: &str, scope: &Scope) -> Result<PolicyRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.admin {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only an admin can change QoS policies.".into())),
    }
}

async fn only_default(tx: &mut Conn, project_id: &str) -> Result<(), ApiError> {
    let there: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM qos_policies WHERE project_id = $1 AND is_default)")
            .bind(project_id)
            .fetch_one(tx)
            .await?;
    match there {
        true => Err(ApiError::Conflict(format!("A default QoS policy exists for project {project_id}."))
            .named("QoSPolicyDefaultAlreadyExists")),
        false => Ok(()),
    }
}

/// Lets the policy for all projects follow `shared`.
async fn share(tx: &mut Conn, row_id: &str, owner: &str, shared: Option<bool>) -> Result<(), ApiError> {
    let Some(shared) = shared else { return Ok(()) };
    if !shared {
        sqlx::query("DELETE FROM rbac_policies WHERE object_id = $1 AND target_project = '*'")
            .bind(row_id)
            .execute(tx)
            .await?;
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO rbac_policies (id, project_id, object_type, object_id, action, target_project, created_us)
         VALUES ($1, $2, 'qos_policy', $3, 'access_as_shared', '*', $4) ON CONFLICT DO NOTHING",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(owner)
    .bind(row_id)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

impl Resource for Policies {
    const NAME: &'static str = "policy";
    const PATH: &'static str = "qos/policies";
    const COLLECTION: Collection = Collection {
        name: "policies",
        attributes: &[
            "created_at",
            "description",
            "id",
            "is_default",
            "name",
            "project_id",
            "revision_number",
            "rules",
            "shared",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("QoS policy {id} could not be found.")).named("QosPolicyNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = select(scope);
        query.narrow(&mut statement, &[("id", "qos_policies.id")]);
        statement.push(" ORDER BY qos_policies.created_us, qos_policies.id");
        let rows: Vec<PolicyRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let rules: Vec<RuleRow> =
            sqlx::query_as("SELECT * FROM qos_rules ORDER BY created_us, id").fetch_all(db).await?;
        let rules_of = |id: &str| -> Vec<Value> {
            let own = rules.iter().filter(|rule| rule.policy_id == id);
            own.map(|rule| {
                let mut document = rule.document();
                document["type"] = json!(rule.kind);
                document
            })
            .collect()
        };
        let document = |row: &PolicyRow| {
            json!({
                "id": row.id, "name": row.name, "description": row.description, "project_id": row.project_id,
                "tenant_id": row.project_id, "shared": row.shared, "is_default": row.is_default,
                "rules": rules_of(&row.id), "revision_number": row.revision,
                "created_at": rfc3339_s(row.created_us), "updated_at": rfc3339_s(row.updated_us),
            })
        };
        Ok(rows.iter().map(document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        if !change.scope.admin {
            return Err(ApiError::Forbidden("Only an admin can make QoS policies.".into()));
        }
        let project_id = change.scope.owner(&mut body)?;
        let name = body.required("name")?;
        let description = body.string("description")?.unwrap_or_default();
        let (shared, is_default) = (body.boolean("shared")?, body.boolean("is_default")?.unwrap_or(false));
        body.finish()?;
        if is_default {
            only_default(&mut change.tx, &project_id).await?;
        }
        let id = Uuid::new_v4().to_string();
        sqlx::query(
            "INSERT INTO qos_policies (id, project_id, name, description, is_default, created_us, updated_us)
             VALUES ($1, $2, $3, $4, $5, $6, $6)",
        )
        .bind(&id)
        .bind(&project_id)
        .bind(name)
        .bind(description)
        .bind(is_default)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        share(&mut change.tx, &id, &project_id, shared).await?;
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let (name, description) = (body.string("name")?, body.string("description")?);
        let (shared, is_default) = (body.boolean("shared")?, body.boolean("is_default")?);
        body.finish()?;
        let row = changeable(&mut change.tx, id, &change.scope).await?;
        if is_default == Some(true) && !row.is_default {
            only_default(&mut change.tx, &row.project_id).await?;
        }
        share(&mut change.tx, id, &row.project_id, shared).await?;
        sqlx::query(
            "UPDATE qos_policies SET name = COALESCE($2, name), description = COALESCE($3, description),
                 is_default = COALESCE($4, is_default), revision = revision + 1, updated_us = $5 WHERE id = $1",
        )
        .bind(id)
        .bind(name)
        .bind(description)
        .bind(is_default)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        changeable(&mut change.tx, id, &change.scope).await?;
        let user: Option<(String, String)> = sqlx::query_as(
            "SELECT 'port', id FROM ports WHERE qos_policy_id = $1 UNION ALL
             SELECT 'network', id FROM networks WHERE qos_policy_id = $1 UNION ALL
             SELECT 'floatingip', id FROM floating_ips WHERE qos_policy_id = $1 LIMIT 1",
        )
        .bind(id)
        .fetch_optional(&mut *change.tx)
        .await?;
        if let Some((kind, user)) = user {
            let text = format!("QoS Policy {id} is used by {kind} {user}.");
            return Err(ApiError::Conflict(text).named("QosPolicyInUse"));
        }
        for sql in
            ["DELETE FROM rbac_policies WHERE object_id = $1", "DELETE FROM qos_policies WHERE id = $1"]
        {
            sqlx::query(sql).bind(id).execute(&mut *change.tx).await?;
        }
        Ok(())
    }
}

fn missing_rule(id: &str) -> ApiError {
    ApiError::NotFound(format!("QoS rule {id} could not be found.")).named("QosRuleNotFound")
}

async fn rules(db: &mut Conn, scope: &Scope, kind: &str) -> Result<Vec<RuleRow>, ApiError> {
    visible(db, &scope.parent, scope).await?;
    let sql = "SELECT * FROM qos_rules WHERE policy_id = $1 AND kind = $2 ORDER BY created_us, id";
    Ok(sqlx::query_as(sql).bind(&scope.parent).bind(kind).fetch_all(db).await?)
}

async fn rule(change: &mut Change, kind: &str, id: &str) -> Result<RuleRow, ApiError> {
    changeable(&mut change.tx, &change.scope.parent, &change.scope).await?;
    let rules = rules(&mut change.tx, &change.scope, kind).await?;
    rules.into_iter().find(|rule| rule.id == id).ok_or_else(|| missing_rule(id))
}

/// Writes a rule, new or changed, and lets its hosts and its policy's revision know.
async fn write(change: &mut Change, rule: &RuleRow) -> Result<(), ApiError> {
    let other: Option<String> = sqlx::query_scalar(
        "SELECT id FROM qos_rules WHERE policy_id = $1 AND kind = $2 AND direction = $3 AND id != $4",
    )
    .bind(&rule.policy_id)
    .bind(&rule.kind)
    .bind(&rule.direction)
    .bind(&rule.id)
    .fetch_optional(&mut *change.tx)
    .await?;
    if let Some(other) = other {
        let text = format!(
            "Rule {} conflicts with rule {other} which already exists in QoS Policy {}.",
            rule.kind, rule.policy_id
        );
        return Err(ApiError::Conflict(text).named("QoSRulesConflict"));
    }
    sqlx::query(
        "INSERT INTO qos_rules (id, policy_id, kind, direction, max_kbps, max_burst_kbps, dscp_mark, created_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (id) DO UPDATE SET direction = excluded.direction, max_kbps = excluded.max_kbps,
             max_burst_kbps = excluded.max_burst_kbps, dscp_mark = excluded.dscp_mark",
    )
    .bind(&rule.id)
    .bind(&rule.policy_id)
    .bind(&rule.kind)
    .bind(&rule.direction)
    .bind(rule.max_kbps)
    .bind(rule.max_burst_kbps)
    .bind(rule.dscp_mark)
    .bind(now_us())
    .execute(&mut *change.tx)
    .await?;
    changed(change, &rule.policy_id).await
}

async fn changed(change: &mut Change, policy_id: &str) -> Result<(), ApiError> {
    sqlx::query("UPDATE qos_policies SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(policy_id)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::of_policy(&mut change.tx, policy_id).await?;
    change.concern(hosts);
    Ok(())
}

async fn remove(change: &mut Change, kind: &str, id: &str) -> Result<(), ApiError> {
    let rule = rule(change, kind, id).await?;
    sqlx::query("DELETE FROM qos_rules WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
    changed(change, &rule.policy_id).await
}

fn new_rule(policy_id: &str, kind: &str) -> RuleRow {
    RuleRow {
        id: Uuid::new_v4().to_string(),
        policy_id: policy_id.into(),
        kind: kind.into(),
        direction: "egress".into(),
        max_kbps: 0,
        max_burst_kbps: 0,
        dscp_mark: 0,
    }
}

fn rate(body: &mut Attributes, name: &str) -> Result<Option<i64>, ApiError> {
    let Some(rate) = body.integer(name)? else { return Ok(None) };
    match (0..=MAX_KBPS).contains(&rate) {
        true => Ok(Some(rate)),
        false => Err(invalid(name, format!("'{rate}' is not in range 0 through {MAX_KBPS}"))),
    }
}

fn limit(rule: &mut RuleRow, body: &mut Attributes) -> Result<(), ApiError> {
    rule.max_kbps = rate(body, "max_kbps")?.unwrap_or(rule.max_kbps);
    rule.max_burst_kbps = rate(body, "max_burst_kbps")?.unwrap_or(rule.max_burst_kbps);
    if let Some(direction) = body.word("direction", &["egress", "ingress"])? {
        rule.direction = direction.into();
    }
    match rule.max_kbps {
        0 => Err(invalid("max_kbps", "a limit must be at least 1")),
        _ => Ok(()),
    }
}

fn mark(rule: &mut RuleRow, body: &mut Attributes) -> Result<(), ApiError> {
    let Some(mark) = body.integer("dscp_mark")? else { return Ok(()) };
    match DSCP_MARKS.contains(&mark) {
        true => {
            rule.dscp_mark = mark;
            Ok(())
        }
        false => Err(invalid("dscp_mark", format!("'{mark}' is not in {DSCP_MARKS:?}"))),
    }
}

impl Resource for BandwidthLimits {
    const NAME: &'static str = "bandwidth_limit_rule";
    const PATH: &'static str = "bandwidth_limit_rules";
    const COLLECTION: Collection = Collection {
        name: "bandwidth_limit_rules",
        attributes: &["direction", "id", "max_burst_kbps", "max_kbps", "qos_policy_id"],
    };

    fn missing(id: &str) -> ApiError {
        missing_rule(id)
    }

    async fn read(db: &mut Conn, scope: &Scope, _query: &Query) -> Result<Vec<Value>, ApiError> {
        let rules = rules(db, scope, "bandwidth_limit").await?;
        Ok(rules.iter().map(RuleRow::document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let policy = changeable(&mut change.tx, &change.scope.parent, &change.scope).await?;
        let mut rule = new_rule(&policy.id, "bandwidth_limit");
        limit(&mut rule, &mut body)?;
        body.finish()?;
        write(change, &rule).await?;
        Ok(rule.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let mut rule = rule(change, "bandwidth_limit", id).await?;
        limit(&mut rule, &mut body)?;
        body.finish()?;
        write(change, &rule).await
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        remove(change, "bandwidth_limit", id).await
    }
}

impl Resource for DscpMarks {
    const NAME: &'static str = "dscp_marking_rule";
    const PATH: &'static str = "dscp_marking_rules";
    const COLLECTION: Collection =
        Collection { name: "dscp_marking_rules", attributes: &["dscp_mark", "id", "qos_policy_id"] };

    fn missing(id: &str) -> ApiError {
        missing_rule(id)
    }

    async fn read(db: &mut Conn, scope: &Scope, _query: &Query) -> Result<Vec<Value>, ApiError> {
        let rules = rules(db, scope, "dscp_marking").await?;
        Ok(rules.iter().map(RuleRow::document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let policy = changeable(&mut change.tx, &change.scope.parent, &change.scope).await?;
        let mut rule = new_rule(&policy.id, "dscp_marking");
        if !body.has("dscp_mark") {
            body.required("dscp_mark")?;
        }
        mark(&mut rule, &mut body)?;
        body.finish()?;
        write(change, &rule).await?;
        Ok(rule.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let mut rule = rule(change, "dscp_marking", id).await?;
        mark(&mut rule, &mut body)?;
        body.finish()?;
        write(change, &rule).await
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        remove(change, "dscp_marking", id).await
    }
}

const RULE_TYPES: [&str; 2] = ["bandwidth_limit", "dscp_marking"];

/// `GET /v2.0/qos/rule-types`.
pub(super) async fn rule_types(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_project()?;
    let kinds = Collection { name: "rule_types", attributes: &["type"] };
    let query = Query::parse(pairs, kinds)?;
    let documents = RULE_TYPES.map(|kind| json!({"type": kind})).into();
    query.answer(documents, kinds, &format!("{}/qos/rule-types", base(&app))).map(Json)
}

/// `GET /v2.0/qos/rule-types/{type}` (admin).
pub(super) async fn rule_type(ctx: Ctx, Path(kind): Id) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let parameters = match kind.as_str() {
        "bandwidth_limit" => json!([
            {"parameter_name": "max_kbps", "parameter_type": "range",
             "parameter_values": {"start": 1, "end": MAX_KBPS}},
            {"parameter_name": "max_burst_kbps", "parameter_type": "range",
             "parameter_values": {"start": 0, "end": MAX_KBPS}},
            {"parameter_name": "direction", "parameter_type": "choices",
             "parameter_values": ["ingress", "egress"]},
        ]),
        "dscp_marking" => json!([
            {"parameter_name": "dscp_mark", "parameter_type": "choices", "parameter_values": DSCP_MARKS},
        ]),
        _ => {
            return Err(ApiError::NotFound(format!("QoS rule type {kind} could not be found."))
                .named("QosRuleTypeNotFound"));
        }
    };
    let drivers = json!([{"name": "mote", "supported_parameters": parameters}]);
    Ok(Json(json!({"rule_type": {"type": kind, "drivers": drivers}})))
}
