//! Nova v2.1 below `/compute`: servers and what they need.

use axum::{Router, middleware::from_fn};

use crate::app::App;

mod aggregates;
pub(crate) mod defaults;
pub(crate) mod extra_specs;
#[cfg(test)]
mod fixtures;
pub(crate) mod flavors;
mod hypervisors;
mod images;
pub(crate) mod keypairs;
mod limits;
pub(crate) mod migrations;
mod openssh;
pub(crate) mod quotas;
mod server_groups;
pub(crate) mod servers;
mod services;
pub(crate) mod state;
mod usage;
pub(crate) mod versions;
mod x509;
mod zones;

pub(crate) use versions::HEADERS as MICROVERSION_HEADERS;

/// The routes.
pub fn router() -> Router<App> {
    let v2_1 = Router::new()
        .merge(servers::routes())
        .merge(server_groups::routes())
        .merge(flavors::routes())
        .merge(keypairs::routes())
        .merge(limits::routes())
        .merge(quotas::routes())
        .merge(zones::routes())
        .merge(aggregates::routes())
        .merge(migrations::routes())
        .merge(hypervisors::routes())
        .merge(services::routes())
        .merge(images::routes())
        .merge(usage::routes());
    Router::new().merge(versions::routes()).nest("/v2.1", v2_1).layer(from_fn(versions::negotiate))
}
