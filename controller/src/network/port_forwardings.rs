//! Port forwardings: single ports of a floating IP that lead to ports of tenants' addresses.

use std::net::IpAddr;

use serde_json::{Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::{
    Scope,
    attributes::{Attributes, address, invalid},
    floating_ips::{self, FloatingIpRow, not_reachable, router_between},
    listing::{Collection, Query},
    ports, reach,
    resource::{Change, Resource},
    routers::bad_request,
};
use crate::{
    db::{Conn, now_us},
    http::error::ApiError,
};

/// Port forwardings as resources below a floating IP.
pub(super) struct PortForwardings;

#[derive(Debug, Clone, FromRow)]
struct ForwardingRow {
    id: String,
    floatingip_id: String,
    internal_port_id: String,
    internal_ip_address: String,
    internal_port: i64,
    external_port: i64,
    protocol: String,
    description: String,
}

impl ForwardingRow {
    fn document(&self) -> Value {
        json!({
            "id": self.id, "internal_port_id": self.internal_port_id,
            "internal_ip_address": self.internal_ip_address, "internal_port": self.internal_port,
            "external_port": self.external_port, "protocol": self.protocol, "description": self.description,
        })
    }
}

async fn rows(db: &mut Conn, floating_ip: &str) -> Result<Vec<ForwardingRow>, ApiError> {
    let sql = "SELECT * FROM port_forwardings WHERE floatingip_id = $1 ORDER BY created_us, id";
    Ok(sqlx::query_as(sql).bind(floating_ip).fetch_all(db).await?)
}

/// Those of a floating IP, as it shows them.
pub(super) async fn of(db: &mut Conn, floating_ip: &str) -> Result<Vec<Value>, ApiError> {
    let rows = rows(db, floating_ip).await?;
    Ok(rows.iter().map(ForwardingRow::document).collect())
}

fn port_number(body: &mut Attributes, name: &str) -> Result<Option<i64>, ApiError> {
    let Some(number) = body.integer(name)? else { return Ok(None) };
    match (1..=65535).contains(&number) {
        true => Ok(Some(number)),
        false => Err(invalid(name, format!("'{number}' is not in range 1 through 65535"))),
    }
}

/// What a request changes of a row.
fn merge(row: &mut ForwardingRow, body: &mut Attributes) -> Result<(), ApiError> {
    if let Some(protocol) = body.word("protocol", &["tcp", "udp"])? {
        row.protocol = protocol.into();
    }
    row.external_port = port_number(body, "external_port")?.unwrap_or(row.external_port);
    row.internal_port = port_number(body, "internal_port")?.unwrap_or(row.internal_port);
    if let Some(port) = body.nullable_id("internal_port_id")?.flatten() {
        row.internal_port_id = port;
    }
    if let Some(ip) = body.value("internal_ip_address") {
        row.internal_ip_address = address("internal_ip_address", &ip)?.to_string();
    }
    row.description = body.long_description()?.unwrap_or_else(|| row.description.clone());
    Ok(())
}

/// Checks a row against its port and its floating IP; gives the router that leads there.
async fn check(
    change: &mut Change,
    row: &ForwardingRow,
    floating: &FloatingIpRow,
) -> Result<String, ApiError> {
    let port_id = &row.internal_port_id;
    let port = ports::find(&mut change.tx, port_id).await?;
    let port = port
        .filter(|port| change.scope.owns(&port.row.project_id))
        .ok_or_else(|| ports::Ports::missing(port_id))?;
    let ip: IpAddr = row.internal_ip_address.parse().map_err(ApiError::internal)?;
    let (subnet_id, _) = floating_ips::fixed_address(&port, Some(ip))?;
    let bound: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM floating_ips WHERE fixed_port_id = $1 AND fixed_ip_address = $2)",
    )
    .bind(port_id)
    .bind(&row.internal_ip_address)
    .fetch_one(&mut *change.tx)
    .await?;
    if bound {
        let text = format!(
            "Cannot create port forwarding to floating IP {} ({}) with port {port_id} using fixed IP {ip}, as that port \
             already has a binding floating IP.",
            floating.floating_ip_address, floating.id
        );
        return Err(ApiError::Conflict(text).named("PortHasBindingFloatingIP"));
    }
    for other in rows(&mut change.tx, &floating.id).await? {
        let same_protocol = other.id != row.id && other.protocol == row.protocol;
        let outside = other.external_port == row.external_port;
        let inside = (&other.internal_port_id, &other.internal_ip_address, other.internal_port)
            == (&row.internal_port_id, &row.internal_ip_address, row.internal_port);
        if same_protocol && (outside || inside) {
            return Err(bad_request(
                "port_forwarding",
                format!(
                    "A duplicate port forwarding entry with same attributes already exists, conflicting values are {}",
                    other.document()
                ),
            ));
        }
    }
    let router = router_between(&mut change.tx, &subnet_id, &floating.floating_network_id).await?;
    let router = router.ok_or_else(|| not_reachable(&floating.floating_network_id, &subnet_id, port_id))?;
    match floating.router_id.as_ref().is_some_and(|used| *used != router) {
        true => Err(bad_request(
            "port_forwarding",
            format!("the floating IP's other port forwardings use another router than {router}"),
        )),
        false => Ok(router),
    }
}

async fn write(change: &mut Change, row: &ForwardingRow, router: &str) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO port_forwardings (id, floatingip_id, internal_port_id, internal_ip_address, internal_port,
             external_port, protocol, description, created_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         ON CONFLICT (id) DO UPDATE SET internal_port_id = excluded.internal_port_id,
             internal_ip_address = excluded.internal_ip_address, internal_port = excluded.internal_port,
             external_port = excluded.external_port, protocol = excluded.protocol,
             description = excluded.description",
    )
    .bind(&row.id)
    .bind(&row.floatingip_id)
    .bind(&row.internal_port_id)
    .bind(&row.internal_ip_address)
    .bind(row.internal_port)
    .bind(row.external_port)
    .bind(&row.protocol)
    .bind(&row.description)
    .bind(now_us())
    .execute(&mut *change.tx)
    .await?;
    sqlx::query("UPDATE floating_ips SET router_id = $2 WHERE id = $1")
        .bind(&row.floatingip_id)
        .bind(router)
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::of_router(&mut change.tx, router).await?;
    change.concern(hosts);
    Ok(())
}

async fn find(change: &mut Change, floating: &FloatingIpRow, id: &str) -> Result<ForwardingRow, ApiError> {
    let rows = rows(&mut change.tx, &floating.id).await?;
    rows.into_iter().find(|row| row.id == id).ok_or_else(|| PortForwardings::missing(id))
}

impl Resource for PortForwardings {
    const NAME: &'static str = "port_forwarding";
    const PATH: &'static str = "port_forwardings";
    const COLLECTION: Collection = Collection {
        name: "port_forwardings",
        attributes: &[
            "description",
            "external_port",
            "id",
            "internal_ip_address",
            "internal_port",
            "internal_port_id",
            "protocol",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Port Forwarding {id} could not be found."))
            .named("PortForwardingNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, _query: &Query) -> Result<Vec<Value>, ApiError> {
        let floating = floating_ips::owned(db, &scope.parent, scope).await?;
        of(db, &floating.id).await
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let floating = floating_ips::owned(&mut change.tx, &change.scope.parent, &change.scope).await?;
        for name in ["protocol", "external_port", "internal_port", "internal_port_id", "internal_ip_address"]
        {
            if !body.has(name) {
                body.required(name)?;
            }
        }
        let mut row = ForwardingRow {
            id: Uuid::new_v4().to_string(),
            floatingip_id: floating.id.clone(),
            internal_port_id: String::new(),
            internal_ip_address: String::new(),
            internal_port: 0,
            external_port: 0,
            protocol: String::new(),
            description: String::new(),
        };
        merge(&mut row, &mut body)?;
        body.finish()?;
        if floating.fixed_port_id.is_some() {
            let text = format!(
                "Cannot create port forwarding: floating IP {} is associated with a port.",
                floating.id
            );
            return Err(ApiError::Conflict(text).named("FloatingIPPortAlreadyAssociated"));
        }
        let router = check(change, &row, &floating).await?;
        write(change, &row, &router).await?;
        Ok(row.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let floating = floating_ips::owned(&mut change.tx, &change.scope.parent, &change.scope).await?;
        let mut row = find(change, &floating, id).await?;
        merge(&mut row, &mut body)?;
        body.finish()?;
        let router = check(change, &row, &floating).await?;
        write(change, &row, &router).await
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let floating = floating_ips::owned(&mut change.tx, &change.scope.parent, &change.scope).await?;
        find(change, &floating, id).await?;
        if let Some(router) = &floating.router_id {
            let hosts = reach::of_router(&mut change.tx, router).await?;
            change.concern(hosts);
        }
        sqlx::query("DELETE FROM port_forwardings WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        sqlx::query(
            "UPDATE floating_ips SET router_id = NULL WHERE id = $1 AND fixed_port_id IS NULL
                 AND NOT EXISTS (SELECT 1 FROM port_forwardings WHERE floatingip_id = $1)",
        )
        .bind(&floating.id)
        .execute(&mut *change.tx)
        .await?;
        Ok(())
    }
}
