//! External gateways of routers. The first one is `external_gateway_info`, as it always was; the others come and go by
//! `add_external_gateways`, `update_external_gateways` and `remove_external_gateways`. All of a router's are on one host.

use std::net::IpAddr;

use axum::{
    Json,
    extract::{Path, State},
};
use ipnet::IpNet;
use serde_json::{Value, json};
use sqlx::FromRow;

use super::{
    super::{
        Id, Scope,
        attributes::{Attributes, invalid},
        gateways,
        listing::Query,
        networks,
        ports::{self, FixedIpWish, FixedIps, GATEWAY_OWNER, INTERFACE_OWNER, NewPort, wishes},
        reach,
        resource::{self, Change, Resource},
        revision::IfMatch,
        subnets,
    },
    RouterAddress, RouterRow, Routers, addresses, bad_request, owned, refuse_overlap, routes, touch,
};
use crate::{
    app::App,
    db::Conn,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Gateways of one router: what a host takes.
const MAX_GATEWAYS: usize = 16;

/// A gateway as stored.
#[derive(Debug, Clone, FromRow)]
pub(super) struct GatewayRow {
    port_id: String,
    network_id: String,
    enable_snat: bool,
}

/// One `external_gateway_info`.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    network_id: String,
    enable_snat: Option<bool>,
    fixed_ips: Option<Vec<FixedIpWish>>,
}

impl GatewayRow {
    fn addresses<'a>(&self, all: &'a [RouterAddress]) -> impl Iterator<Item = &'a RouterAddress> {
        all.iter().filter(move |address| address.port_id == self.port_id)
    }

    fn document(&self, all: &[RouterAddress]) -> Value {
        let fixed =
            |address: &RouterAddress| json!({"subnet_id": address.subnet_id, "ip_address": address.address});
        let fixed: Vec<Value> = self.addresses(all).map(fixed).collect();
        json!({"network_id": self.network_id, "enable_snat": self.enable_snat, "external_fixed_ips": fixed})
    }

    /// Whether a wish means this gateway: by its network, and where it names addresses by one of them.
    fn is_meant(&self, wish: &Wish, all: &[RouterAddress]) -> bool {
        let named = wish.fixed_ips.as_deref().unwrap_or_default();
        let is_one = |address: &RouterAddress| {
            named.iter().any(|wish| match wish.ip {
                Some(ip) => ip.to_string() == address.address,
                None => wish.subnet_id.as_ref() == Some(&address.subnet_id),
            })
        };
        self.network_id == wish.network_id && (named.is_empty() || self.addresses(all).any(is_one))
    }
}

/// A router's gateways, the first one first.
pub(super) async fn of(db: &mut Conn, router_id: &str) -> Result<Vec<GatewayRow>, ApiError> {
    Ok(sqlx::query_as(
        "SELECT router_gateways.port_id, ports.network_id, router_gateways.enable_snat
         FROM router_gateways JOIN ports ON ports.id = router_gateways.port_id
         WHERE router_gateways.router_id = $1 ORDER BY router_gateways.position, router_gateways.port_id",
    )
    .bind(router_id)
    .fetch_all(db)
    .await?)
}

/// `external_gateways`.
pub(super) fn documents(gateways: &[GatewayRow], addresses: &[RouterAddress]) -> Vec<Value> {
    gateways.iter().map(|gateway| gateway.document(addresses)).collect()
}

impl Wish {
    /// One `external_gateway_info`. `chooses`: whether it decides about SNAT and addresses, which is for admins.
    fn parse(value: Value, scope: &Scope, chooses: bool) -> Result<Self, ApiError> {
        let mut info = Attributes::of("external_gateway_info", value)?;
        let wish = Self {
            network_id: info.required("network_id")?,
            enable_snat: info.boolean("enable_snat")?,
            fixed_ips: info.list("external_fixed_ips")?.map(wishes).transpose()?,
        };
        info.only(&[("qos_policy_id", json!(""))])?;
        info.finish()?;
        // As in Neutron's policy: both spend or spare addresses of the cloud's.
        if chooses && (wish.enable_snat.is_some() || wish.fixed_ips.is_some()) && !scope.admin {
            return Err(ApiError::Forbidden(
                "Only an admin can choose SNAT and the addresses of a router's gateway.".into(),
            ));
        }
        Ok(wish)
    }
}

/// Takes `external_gateway_info`. None: not asked for; `Some(None)`: none wanted.
pub(super) fn first(body: &mut Attributes, scope: &Scope) -> Result<Option<Option<Wish>>, ApiError> {
    match body.value("external_gateway_info") {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(None)),
        Some(Value::Object(map)) if map.is_empty() => Ok(Some(None)),
        Some(value) => Wish::parse(value, scope, true).map(|wish| Some(Some(wish))),
    }
}

/// Neutron's `UnableToMatchGateways`.
fn no_match(router_id: &str, reason: impl std::fmt::Display) -> ApiError {
    let text = format!(
        "Unable to match a requested gateway port to existing gateway ports for router {router_id}: {reason}"
    );
    ApiError::BadRequest(text).named("UnableToMatchGateways")
}

/// Refuses to leave floating IPs without a gateway on their network.
async fn refuse_in_use(tx: &mut Conn, router_id: &str, remaining: &[String]) -> Result<(), ApiError> {
    let used: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT floating_network_id FROM floating_ips WHERE router_id = $1 ORDER BY floating_network_id",
    )
    .bind(router_id)
    .fetch_all(tx)
    .await?;
    match used.into_iter().find(|network| !remaining.contains(network)) {
        None => Ok(()),
        Some(network) => Err(ApiError::Conflict(format!(
            "Gateway cannot be updated for router {router_id}, since a gateway to external network {network} is \
             required by one or more floating IPs."
        ))
        .named("RouterExternalGatewayInUseByFloatingIp")),
    }
}

/// What shall be: gateways that are there, and new ones.
enum Part {
    Kept(GatewayRow, Option<Wish>),
    New(Wish),
}

impl Part {
    fn network_id(&self) -> &str {
        match self {
            Self::Kept(row, _) => &row.network_id,
            Self::New(wish) => &wish.network_id,
        }
    }
}

/// A router's subnets outside and inside don't overlap, but gateways may share a network.
async fn refuse_overlaps(change: &mut Change, router_id: &str, network_id: &str) -> Result<(), ApiError> {
    let mut there = addresses(&mut change.tx, router_id).await?;
    there.retain(|address| address.device_owner == INTERFACE_OWNER);
    let mut others: Vec<(String, IpNet)> = Vec::new();
    for gateway in of(&mut change.tx, router_id).await? {
        if gateway.network_id != network_id {
            for subnet in subnets::of_network(&mut change.tx, &gateway.network_id).await? {
                others.push((subnet.id.clone(), subnet.net()?));
            }
        }
    }
    for subnet in subnets::of_network(&mut change.tx, network_id).await? {
        let cidr = subnet.net()?;
        refuse_overlap(&there, &subnet.id, cidr)?;
        let overlaps = |(_, net): &&(String, IpNet)| net.contains(&cidr) || cidr.contains(net);
        if let Some((other, net)) = others.iter().find(overlaps) {
            let id = &subnet.id;
            let text = format!("Cidr {cidr} of subnet {id} overlaps with cidr {net} of subnet {other}");
            return Err(bad_request("router", text));
        }
    }
    Ok(())
}

async fn insert(change: &mut Change, router_id: &str, wish: Wish) -> Result<String, ApiError> {
    let network = networks::visible(&mut change.tx, &wish.network_id, &change.scope).await?;
    if !network.external {
        return Err(bad_request("router", format!("Network {} is not an external network", network.id)));
    }
    refuse_overlaps(change, router_id, &network.id).await?;
    let fixed_ips = wish.fixed_ips.filter(|fixed| !fixed.is_empty());
    let fixed_ips = fixed_ips.map_or(FixedIps::Any, FixedIps::These);
    let own = NewPort::own("", GATEWAY_OWNER, router_id, fixed_ips);
    let new = NewPort { router_id: Some(router_id.to_owned()), ..own };
    let port = ports::insert(&mut change.tx, &network.id, &new).await?;
    let addressed = ports::find(&mut change.tx, &port).await?.is_some_and(|port| !port.fixed_ips.is_empty());
    if !addressed {
        return Err(bad_request(
            "router",
            format!("No subnet of network {} has an address left", network.id),
        ));
    }
    sqlx::query(
        "INSERT INTO router_gateways (port_id, router_id, position, enable_snat) VALUES ($1, $2, $3, $4)",
    )
    .bind(&port)
    .bind(router_id)
    .bind(i64::MAX)
    .bind(wish.enable_snat.unwrap_or(true))
    .execute(&mut *change.tx)
    .await?;
    Ok(port)
}

async fn change_kept(change: &mut Change, row: &GatewayRow, wish: Option<Wish>) -> Result<(), ApiError> {
    let Some(wish) = wish else { return Ok(()) };
    if let Some(snat) = wish.enable_snat {
        sqlx::query("UPDATE router_gateways SET enable_snat = $2 WHERE port_id = $1")
            .bind(&row.port_id)
            .bind(snat)
            .execute(&mut *change.tx)
            .await?;
    }
    let Some(fixed) = wish.fixed_ips.filter(|fixed| !fixed.is_empty()) else { return Ok(()) };
    let port = ports::find(&mut change.tx, &row.port_id).await?;
    let port = port.ok_or_else(|| ports::missing(&row.port_id))?;
    ports::replace_addresses(&mut change.tx, &port, FixedIps::These(fixed)).await
}

/// Makes a router's gateways what they shall be, in this order, and finds a host for them.
async fn become_these(change: &mut Change, router_id: &str, parts: Vec<Part>) -> Result<(), ApiError> {
    if parts.len() > MAX_GATEWAYS {
        let text = format!("A router has at most {MAX_GATEWAYS} external gateways");
        return Err(bad_request("router", text));
    }
    let remaining: Vec<String> = parts.iter().map(|part| part.network_id().to_owned()).collect();
    refuse_in_use(&mut change.tx, router_id, &remaining).await?;
    let kept = |row: &GatewayRow| {
        let is_it = |part: &Part| matches!(part, Part::Kept(other, _) if other.port_id == row.port_id);
        parts.iter().any(is_it)
    };
    let before = of(&mut change.tx, router_id).await?;
    for row in before.iter().filter(|row| !kept(row)) {
        ports::remove(&mut change.tx, &row.port_id).await?;
    }
    let several = parts.len() > 1;
    for (position, part) in (0i64..).zip(parts) {
        let port = match part {
            Part::Kept(row, wish) => {
                change_kept(change, &row, wish).await?;
                row.port_id
            }
            Part::New(wish) => insert(change, router_id, wish).await?,
        };
        sqlx::query("UPDATE router_gateways SET position = $2 WHERE port_id = $1")
            .bind(&port)
            .bind(position)
            .execute(&mut *change.tx)
            .await?;
    }
    let had_host = gateways::held_by(&mut change.tx, router_id).await?.is_some();
    let has_host = gateways::place(&mut change.tx, router_id).await?;
    if several && had_host && !has_host {
        let text = format!(
            "Unable to add extra gateways to a router {router_id}: no host that is up is connected to all of its external \
             networks"
        );
        return Err(ApiError::BadRequest(text).named("UnableToAddExtraGateways"));
    }
    Ok(())
}

fn all_kept(rows: Vec<GatewayRow>) -> Vec<Part> {
    rows.into_iter().map(|row| Part::Kept(row, None)).collect()
}

/// `external_gateway_info`: only the first gateway changes. When it goes, the next one takes its place.
pub(super) async fn set_first(
    change: &mut Change,
    router_id: &str,
    wish: Option<Wish>,
) -> Result<(), ApiError> {
    let mut rows = of(&mut change.tx, router_id).await?;
    let old = (!rows.is_empty()).then(|| rows.remove(0));
    let first = match (old, wish) {
        (_, None) => None,
        (Some(row), Some(wish)) if row.network_id == wish.network_id => Some(Part::Kept(row, Some(wish))),
        (_, Some(wish)) => Some(Part::New(wish)),
    };
    become_these(change, router_id, first.into_iter().chain(all_kept(rows)).collect()).await
}

/// Takes all gateways of a router that goes.
pub(super) async fn clear(change: &mut Change, router_id: &str) -> Result<(), ApiError> {
    become_these(change, router_id, Vec::new()).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Update,
    Remove,
}

/// The gateway of those that a wish means.
fn meant(
    router_id: &str,
    rows: &mut Vec<GatewayRow>,
    wish: &Wish,
    all: &[RouterAddress],
) -> Result<Option<GatewayRow>, ApiError> {
    let mut meant = (0..rows.len()).filter(|at| rows[*at].is_meant(wish, all));
    let (found, other) = (meant.next(), meant.next());
    if other.is_some() {
        let reason =
            format!("several gateways are on network {}; name one by external_fixed_ips", wish.network_id);
        return Err(no_match(router_id, reason));
    }
    Ok(found.map(|at| rows.remove(at)))
}

fn parts_of(
    router_id: &str,
    verb: Verb,
    mut rows: Vec<GatewayRow>,
    wishes: Vec<Wish>,
    all: &[RouterAddress],
) -> Result<Vec<Part>, ApiError> {
    match verb {
        Verb::Add => Ok(all_kept(rows).into_iter().chain(wishes.into_iter().map(Part::New)).collect()),
        Verb::Update => wishes
            .into_iter()
            .map(|wish| {
                Ok(match meant(router_id, &mut rows, &wish, all)? {
                    Some(row) => Part::Kept(row, Some(wish)),
                    None => Part::New(wish),
                })
            })
            .collect(),
        Verb::Remove if rows.is_empty() && !wishes.is_empty() => {
            let text = format!(
                "Unable to remove extra gateways from a router {router_id}: it does not have any external gateways"
            );
            Err(ApiError::BadRequest(text).named("UnableToRemoveGateways"))
        }
        Verb::Remove => {
            for wish in &wishes {
                if meant(router_id, &mut rows, wish, all)?.is_none() {
                    let fixed = wish.fixed_ips.iter().flatten().filter_map(|fixed| fixed.ip);
                    let fixed: Vec<IpAddr> = fixed.collect();
                    let reason = format!("it has none on network {} with {fixed:?}", wish.network_id);
                    return Err(no_match(router_id, reason));
                }
            }
            Ok(all_kept(rows))
        }
    }
}

async fn edit(
    app: App,
    ctx: Ctx,
    (id, revision): (String, IfMatch),
    body: Value,
    verb: Verb,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, Routers::NAME)?;
    let given = match body.value("external_gateways") {
        // Neutron takes nothing in any form; `openstack router unset --external-gateway` sends an empty object.
        Some(Value::Null) => Some(Vec::new()),
        Some(Value::Object(map)) if map.is_empty() => Some(Vec::new()),
        Some(Value::Array(list)) => Some(list),
        Some(other) => return Err(invalid("external_gateways", format!("'{other}' is not a list"))),
        None => None,
    };
    body.finish()?;
    let parse = |value| Wish::parse(value, &scope, verb != Verb::Remove);
    let wishes: Option<Vec<Wish>> =
        given.map(|list| list.into_iter().map(parse).collect::<Result<_, _>>()).transpose()?;
    let mut change = Change::begin(&app, scope).await?;
    revision.check::<Routers>(&mut change, &id).await?;
    let row: RouterRow = owned(&mut change.tx, &id, &change.scope).await?;
    if let Some(wishes) = wishes {
        let hosts = reach::of_router(&mut change.tx, &id).await?;
        change.concern(hosts);
        let rows = of(&mut change.tx, &id).await?;
        let all = addresses(&mut change.tx, &id).await?;
        let parts = parts_of(&id, verb, rows, wishes, &all)?;
        become_these(&mut change, &id, parts).await?;
        // Routes by the network of a gateway that went would lead nowhere.
        routes::write(&mut change.tx, &id, &row.routes()?).await?;
        touch(&mut change.tx, &id).await?;
        let hosts = reach::of_router(&mut change.tx, &id).await?;
        change.concern(hosts);
    }
    let document =
        resource::document::<Routers>(&mut change.tx, &change.scope, &id, &Query::default()).await?;
    change.commit(&app).await?;
    Ok(Json(json!({"router": document})))
}

/// `PUT /v2.0/routers/{id}/add_external_gateways`.
pub(in super::super) async fn add(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    revision: IfMatch,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, (id, revision), body, Verb::Add).await
}

/// `PUT /v2.0/routers/{id}/update_external_gateways`.
pub(in super::super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    revision: IfMatch,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, (id, revision), body, Verb::Update).await
}

/// `PUT /v2.0/routers/{id}/remove_external_gateways`.
pub(in super::super) async fn remove(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    revision: IfMatch,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, (id, revision), body, Verb::Remove).await
}
