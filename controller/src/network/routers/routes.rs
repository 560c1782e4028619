//! Static routes of routers.

use std::net::IpAddr;

use axum::{
    Json,
    extract::{Path, State},
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    super::{
        Id, Scope,
        attributes::Attributes,
        listing::Query,
        reach,
        resource::{self, Change, Resource},
    },
    Route, Routers, addresses, owned,
};
use crate::{
    app::App,
    db::{Conn, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Neutron's `max_routes`.
const MAX_ROUTES: usize = 30;

fn refused(routes: &[Route], reason: &str) -> ApiError {
    let text = format!("Invalid format for routes: {}, {reason}", json!(routes));
    ApiError::BadRequest(text).named("InvalidRoutes")
}

/// Takes `routes`.
pub(super) fn parse(body: &mut Attributes) -> Result<Option<Vec<Route>>, ApiError> {
    let list = match body.value("routes") {
        None => return Ok(None),
        Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(refused(&[], "a list is needed")),
    };
    let mut routes = Vec::with_capacity(list.len());
    for value in list {
        let route: Route = serde_json::from_value(value).map_err(|error| refused(&[], &error.to_string()))?;
        let versions = (matches!(route.destination, IpNet::V4(_)), matches!(route.nexthop, IpAddr::V4(_)));
        if versions.0 != versions.1 {
            return Err(refused(&[route], "destination and nexthop are of different versions of IP"));
        }
        let route = Route { destination: route.destination.trunc(), ..route };
        if routes.contains(&route) {
            return Err(refused(&[route], "the route is there twice"));
        }
        routes.push(route);
    }
    Ok(Some(routes))
}

/// Checks routes against the router's subnets, and stores them.
pub(super) async fn write(tx: &mut Conn, router_id: &str, routes: &[Route]) -> Result<(), ApiError> {
    if routes.len() > MAX_ROUTES {
        let text = format!(
            "Unable to complete operation for {router_id}. The number of routes exceeds the maximum {MAX_ROUTES}."
        );
        return Err(ApiError::BadRequest(text).named("RoutesExhausted"));
    }
    let addresses = addresses(tx, router_id).await?;
    for route in routes {
        let mut connected = false;
        for address in &addresses {
            let net: IpNet = address.cidr.parse().map_err(ApiError::internal)?;
            connected |= net.contains(&route.nexthop);
            if address.address == route.nexthop.to_string() {
                return Err(refused(routes, "the nexthop is used by router"));
            }
        }
        if !connected {
            return Err(refused(routes, "the nexthop is not connected with router"));
        }
    }
    sqlx::query("UPDATE routers SET routes = $2 WHERE id = $1")
        .bind(router_id)
        .bind(json!(routes).to_string())
        .execute(tx)
        .await?;
    Ok(())
}

async fn edit(app: App, ctx: Ctx, id: String, body: Value, adds: bool) -> Result<Json<Value>, ApiError> {
    let mut body = Attributes::open(body, Routers::NAME)?;
    let given = parse(&mut body)?.unwrap_or_default();
    body.finish()?;
    let mut change = Change::begin(&app, Scope::writing(&ctx)?).await?;
    let row = owned(&mut change.tx, &id, &change.scope).await?;
    let mut routes = row.routes()?;
    // Both are idempotent, as in Neutron.
    routes.retain(|route| !given.contains(route));
    if adds {
        routes.extend(given);
    }
    write(&mut change.tx, &id, &routes).await?;
    sqlx::query("UPDATE routers SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(&id)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::of_router(&mut change.tx, &id).await?;
    change.concern(hosts);
    let document =
        resource::document::<Routers>(&mut change.tx, &change.scope, &id, &Query::default()).await?;
    change.commit(&app).await?;
    Ok(Json(json!({"router": document})))
}

/// `PUT /v2.0/routers/{id}/add_extraroutes`.
pub(in super::super) async fn add(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, id, body, true).await
}

/// `PUT /v2.0/routers/{id}/remove_extraroutes`.
pub(in super::super) async fn remove(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, id, body, false).await
}
