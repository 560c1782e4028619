//! Networks: those of tenants, shared ones, external ones, and their segments (provider attributes).

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::{Attributes, invalid},
    listing::{Collection, Query},
    ports, quotas, rbac, reach,
    resource::{Change, Resource, forget_tags},
    segments::{self, Segment},
    zones,
};
use crate::{
    db::{Conn, Db, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Every IPv4 host takes datagrams of this size (RFC 791).
const MIN_MTU: i64 = 576;
/// Every link of IPv6 carries packets of this size (RFC 8200 §5).
pub(super) const MIN_MTU_IPV6: i64 = 1280;
/// Jumbo frames.
const MAX_MTU: i64 = 9000;

/// Networks as resources.
pub(super) struct Networks;

const NETWORKS: Collection = Collection {
    name: "networks",
    attributes: &[
        "admin_state_up",
        "availability_zone_hints",
        "availability_zones",
        "created_at",
        "description",
        "id",
        "ipv4_address_scope",
        "ipv6_address_scope",
        "is_default",
        "mtu",
        "name",
        "port_security_enabled",
        "project_id",
        "provider:network_type",
        "provider:physical_network",
        "provider:segmentation_id",
        "qos_policy_id",
        "revision_number",
        "router:external",
        "shared",
        "status",
        "subnets",
        "tags",
        "tenant_id",
        "updated_at",
    ],
};

/// A network as stored.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct NetworkRow {
    /// Id.
    pub(crate) id: String,
    /// Owner.
    pub(crate) project_id: String,
    /// Name.
    pub(crate) name: String,
    description: String,
    /// Every project may use it.
    pub(crate) shared: bool,
    /// MTU.
    pub(crate) mtu: i64,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    admin_state_up: bool,
    pub(super) port_security_enabled: bool,
    /// Leads to the outside: routers' gateways and floating IPs are on it.
    pub(crate) external: bool,
    network_type: String,
    physical_network: String,
    segmentation_id: i64,
    pub(super) qos_policy_id: Option<String>,
    /// Whether it is shared with the asker, by all projects or by a policy.
    #[sqlx(default)]
    pub(super) shared_here: bool,
}

/// A network that shall be made.
#[derive(Debug, Clone)]
pub(crate) struct NewNetwork {
    project_id: String,
    name: String,
    description: String,
    shared: bool,
    mtu: Option<u16>,
    admin_state_up: bool,
    port_security_enabled: bool,
    external: bool,
    qos_policy_id: Option<String>,
    segment: segments::Wish,
}

impl NewNetwork {
    /// A tenant's network with every default.
    pub(crate) fn tenant(project_id: &str, name: &str) -> Self {
        Self {
            project_id: project_id.into(),
            name: name.into(),
            description: String::new(),
            shared: false,
            mtu: None,
            admin_state_up: true,
            port_security_enabled: true,
            external: false,
            qos_policy_id: None,
            segment: segments::Wish::default(),
        }
    }
}

impl NetworkRow {
    fn document(&self, admin: bool, subnets: &[String], zones: &[String]) -> Value {
        let mut document = json!({
            "id": self.id, "name": self.name, "description": self.description,
            "project_id": self.project_id, "tenant_id": self.project_id,
            "admin_state_up": self.admin_state_up, "status": if self.admin_state_up { "ACTIVE" } else { "DOWN" },
            "shared": self.shared || self.shared_here, "router:external": self.external, "mtu": self.mtu,
            "port_security_enabled": self.port_security_enabled, "qos_policy_id": self.qos_policy_id,
            "subnets": subnets, "availability_zone_hints": [], "availability_zones": zones,
            "ipv4_address_scope": null, "ipv6_address_scope": null, "is_default": false,
            "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        });
        if admin {
            let segment = self.segment();
            document["provider:network_type"] = json!(segment.network_type());
            document["provider:physical_network"] = json!(segment.physical_network());
            document["provider:segmentation_id"] = json!(segment.segmentation_id());
        }
        document
    }

    /// Its segment.
    pub(super) fn segment(&self) -> Segment {
        Segment::stored(&self.network_type, &self.physical_network, self.segmentation_id)
    }
}

/// Begins a statement that selects networks: those that the asker may see, with whether they are shared with it.
fn select(scope: &Scope) -> QueryBuilder<Db> {
    let mut query = QueryBuilder::new("SELECT networks.*, ");
    rbac::push_shared(&mut query, "networks.id", scope);
    query.push(" AS shared_here FROM networks WHERE ");
    push_visible(&mut query, scope);
    query
}

/// Adds the condition that the asker may see the network.
pub(super) fn push_visible(query: &mut QueryBuilder<Db>, scope: &Scope) {
    query.push("(").push_bind(scope.admin);
    query.push(" OR networks.shared OR networks.external OR networks.project_id = ");
    query.push_bind(scope.project.clone()).push(" OR ");
    rbac::push_any(query, "networks.id", scope);
    query.push(")");
}

/// The network of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<NetworkRow, ApiError> {
    let mut query = select(scope);
    query.push(" AND networks.id = ").push_bind(id.to_owned());
    let row: Option<NetworkRow> = query.build_query_as().fetch_optional(db).await?;
    row.ok_or_else(|| Networks::missing(id))
}

/// The network of that id, if the asker may change it; 403 if it may only see it.
async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<NetworkRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only the owner of a network and admins can change it.".into())),
    }
}

/// Networks that a server of the project can be on without naming one: its own and those shared with it, but not those
/// that lead to the outside.
pub(crate) async fn usable(tx: &mut Conn, project_id: &str) -> Result<Vec<NetworkRow>, ApiError> {
    let scope = Scope::of_project(project_id);
    let mut query = select(&scope);
    query.push(" AND NOT networks.external ORDER BY created_us, id");
    Ok(query.build_query_as().fetch_all(tx).await?)
}

/// Adds a network, within its owner's quota, on a free segment.
pub(crate) async fn insert(tx: &mut Conn, new: &NewNetwork) -> Result<NetworkRow, ApiError> {
    quotas::check(tx, &new.project_id, quotas::Resource::Network).await?;
    let segment = segments::allocate(tx, &new.segment).await?;
    let mtu = new.mtu.unwrap_or(segment.default_mtu());
    let now = now_us();
    let row = sqlx::query_as(
        "INSERT INTO networks (id, project_id, name, description, shared, mtu, admin_state_up,
             port_security_enabled, external, network_type, physical_network, segmentation_id, qos_policy_id,
             created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $14) RETURNING *",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(&new.project_id)
    .bind(&new.name)
    .bind(&new.description)
    .bind(new.shared)
    .bind(i64::from(mtu))
    .bind(new.admin_state_up)
    .bind(new.port_security_enabled)
    .bind(new.external)
    .bind(segment.network_type())
    .bind(segment.physical_network().unwrap_or_default())
    .bind(segment.segmentation_id().unwrap_or_default())
    .bind(&new.qos_policy_id)
    .bind(now)
    .fetch_one(&mut *tx)
    .await?;
    let row: NetworkRow = row;
    rbac::follow(tx, &row.project_id, &row.id, "access_as_shared", new.shared).await?;
    rbac::follow(tx, &row.project_id, &row.id, "access_as_external", new.external).await?;
    Ok(row)
}

/// Attributes of networks that have one value here.
fn constants() -> [(&'static str, Value); 5] {
    [
        ("availability_zone_hints", json!([])),
        ("vlan_transparent", json!(false)),
        ("is_default", json!(false)),
        ("dns_domain", json!("")),
        ("segments", json!([])),
    ]
}

fn mtu(body: &mut Attributes) -> Result<Option<u16>, ApiError> {
    let Some(mtu) = body.integer("mtu")? else { return Ok(None) };
    let known =
        Some(mtu).filter(|mtu| (MIN_MTU..=MAX_MTU).contains(mtu)).and_then(|mtu| u16::try_from(mtu).ok());
    match known {
        Some(mtu) => Ok(Some(mtu)),
        None if mtu == 0 => Ok(None),
        None => Err(invalid("mtu", format!("'{mtu}' is not in range {MIN_MTU} through {MAX_MTU}"))),
    }
}

/// Neutron's policy: what only an admin may ask for.
fn only_admins(scope: &Scope, asked: bool, what: &str) -> Result<(), ApiError> {
    match asked && !scope.admin {
        true => Err(ApiError::Forbidden(format!("Only an admin can {what}."))),
        false => Ok(()),
    }
}

/// What may be given at creation and changed later.
struct Wanted {
    name: Option<String>,
    description: Option<String>,
    shared: Option<bool>,
    external: Option<bool>,
    mtu: Option<u16>,
    admin_state_up: Option<bool>,
    port_security_enabled: Option<bool>,
    qos_policy_id: Option<Option<String>>,
}

impl Wanted {
    fn parse(body: &mut Attributes, scope: &Scope) -> Result<Self, ApiError> {
        body.only(&constants())?;
        let wanted = Self {
            name: body.string("name")?,
            description: body.string("description")?,
            shared: body.boolean("shared")?,
            external: body.boolean("router:external")?,
            mtu: mtu(body)?,
            admin_state_up: body.boolean("admin_state_up")?,
            port_security_enabled: body.boolean("port_security_enabled")?,
            qos_policy_id: body.nullable_id("qos_policy_id")?,
        };
        only_admins(scope, wanted.shared == Some(true), "share a network with all projects")?;
        only_admins(scope, wanted.external == Some(true), "make a network external")?;
        Ok(wanted)
    }
}

async fn subnets_by_network(
    db: &mut Conn,
) -> Result<std::collections::HashMap<String, Vec<String>>, ApiError> {
    let subnets: Vec<(String, String)> =
        sqlx::query_as("SELECT network_id, id FROM subnets ORDER BY created_us, id").fetch_all(db).await?;
    let mut of_network = std::collections::HashMap::<String, Vec<String>>::new();
    for (network, subnet) in subnets {
        of_network.entry(network).or_default().push(subnet);
    }
    Ok(of_network)
}

/// Whether the asker may attach a policy: one that it may see.
async fn check_policy(db: &mut Conn, scope: &Scope, policy: Option<&Option<String>>) -> Result<(), ApiError> {
    match policy {
        Some(Some(id)) => super::qos::visible(db, id, scope).await.map(drop),
        _ => Ok(()),
    }
}

impl Resource for Networks {
    const NAME: &'static str = "network";
    const PATH: &'static str = "networks";
    const COLLECTION: Collection = NETWORKS;

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Network {id} could not be found.")).named("NetworkNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = select(scope);
        query.narrow(&mut statement, &[("id", "networks.id"), ("name", "networks.name")]);
        statement.push(" ORDER BY created_us, id");
        let networks: Vec<NetworkRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let mut subnets = match networks.as_slice() {
            [one] => {
                let sql = "SELECT id FROM subnets WHERE network_id = $1 ORDER BY created_us, id";
                let ids = sqlx::query_scalar(sql).bind(&one.id).fetch_all(&mut *db).await?;
                std::iter::once((one.id.clone(), ids)).collect()
            }
            _ => subnets_by_network(db).await?,
        };
        let zones = zones(db).await?;
        let document = |network: &NetworkRow| {
            network.document(scope.admin, &subnets.remove(&network.id).unwrap_or_default(), &zones)
        };
        Ok(networks.iter().map(document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let wanted = Wanted::parse(&mut body, &change.scope)?;
        let segment = segments::Wish::parse(&mut body)?;
        only_admins(&change.scope, segment.is_given(), "choose the segment of a network")?;
        let new = NewNetwork {
            project_id: change.scope.owner(&mut body)?,
            name: wanted.name.unwrap_or_default(),
            description: wanted.description.unwrap_or_default(),
            shared: wanted.shared.unwrap_or(false),
            mtu: wanted.mtu,
            admin_state_up: wanted.admin_state_up.unwrap_or(true),
            port_security_enabled: wanted.port_security_enabled.unwrap_or(true),
            external: wanted.external.unwrap_or(false),
            qos_policy_id: wanted.qos_policy_id.clone().flatten(),
            segment,
        };
        body.finish()?;
        check_policy(&mut change.tx, &change.scope, wanted.qos_policy_id.as_ref()).await?;
        Ok(insert(&mut change.tx, &new).await?.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let wanted = Wanted::parse(&mut body, &change.scope)?;
        let row = owned(&mut change.tx, id, &change.scope).await?;
        segments::Wish::parse(&mut body)?.unchanged(&row.segment())?;
        body.finish()?;
        check_policy(&mut change.tx, &change.scope, wanted.qos_policy_id.as_ref()).await?;
        reshare(&mut change.tx, &row, &wanted).await?;
        let hosts = reach::of_network(&mut change.tx, id).await?;
        change.concern(hosts);
        sqlx::query(
            "UPDATE networks SET name = COALESCE($2, name), description = COALESCE($3, description),
                 shared = COALESCE($4, shared), mtu = COALESCE($5, mtu), admin_state_up = COALESCE($6, admin_state_up),
                 port_security_enabled = COALESCE($7, port_security_enabled), external = COALESCE($8, external),
                 qos_policy_id = $9, revision = revision + 1, updated_us = $10
             WHERE id = $1",
        )
        .bind(id)
        .bind(wanted.name)
        .bind(wanted.description)
        .bind(wanted.shared)
        .bind(wanted.mtu.map(i64::from))
        .bind(wanted.admin_state_up)
        .bind(wanted.port_security_enabled)
        .bind(wanted.external)
        .bind(wanted.qos_policy_id.unwrap_or(row.qos_policy_id))
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        owned(&mut change.tx, id, &change.scope).await?;
        if ports::in_use(&mut change.tx, id).await? {
            let text = format!(
                "Unable to complete operation on network {id}. There are one or more ports still in use on the network."
            );
            return Err(ApiError::Conflict(text).named("NetworkInUse"));
        }
        let subnets: Vec<String> = sqlx::query_scalar("SELECT id FROM subnets WHERE network_id = $1")
            .bind(id)
            .fetch_all(&mut *change.tx)
            .await?;
        for subnet in subnets {
            forget_tags(&mut change.tx, &subnet).await?;
        }
        for sql in [
            "DELETE FROM rbac_policies WHERE object_id = $1",
            "DELETE FROM ports WHERE network_id = $1",
            "DELETE FROM subnets WHERE network_id = $1",
            "DELETE FROM networks WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id).execute(&mut *change.tx).await?;
        }
        Ok(())
    }
}

/// Checks a change of who may use a network, and lets the policies follow.
async fn reshare(tx: &mut Conn, row: &NetworkRow, wanted: &Wanted) -> Result<(), ApiError> {
    let id = &row.id;
    if wanted.mtu.is_some_and(|mtu| i64::from(mtu) < MIN_MTU_IPV6) {
        super::subnets::refuse_ipv6(tx, id).await?;
    }
    if let Some(shared) = wanted.shared.filter(|shared| *shared != row.shared) {
        if row.shared && ports::of_others(tx, row).await? {
            let text = format!(
                "Unable to reconfigure sharing settings for network {id}. Multiple projects are using it."
            );
            return Err(ApiError::Conflict(text).named("InvalidSharedSetting"));
        }
        rbac::follow(tx, &row.project_id, id, "access_as_shared", shared).await?;
    }
    if let Some(external) = wanted.external.filter(|external| *external != row.external) {
        if row.external && ports::leads_outside(tx, id).await? {
            let text = format!(
                "External network {id} cannot be updated to be made non-external, since it has existing gateway ports."
            );
            return Err(ApiError::Conflict(text).named("ExternalNetworkInUse"));
        }
        rbac::follow(tx, &row.project_id, id, "access_as_external", external).await?;
    }
    Ok(())
}
