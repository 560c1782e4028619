//! The list of extensions: what Mote's Neutron has beyond the core, and nothing else.

use axum::{Json, extract::Path};
use serde_json::{Value, json};

use crate::http::{context::Ctx, error::ApiError};

/// Alias, name, description, date of the last change in Neutron.
const EXTENSIONS: [(&str, &str, &str, &str); 11] = [
    (
        "availability_zone",
        "Availability Zone",
        "The availability zone extension.",
        "2015-01-01T10:00:00-00:00",
    ),
    (
        "binding",
        "Port Binding",
        "Expose port bindings of a virtual port to external application",
        "2014-02-03T10:00:00-00:00",
    ),
    (
        "filter-validation",
        "Filter parameters validation",
        "Provides validation on filter parameters.",
        "2018-03-21T10:00:00-00:00",
    ),
    ("net-mtu", "Network MTU", "Provides MTU attribute for a network resource.", "2015-03-25T10:00:00-00:00"),
    (
        "net-mtu-writable",
        "Network MTU (writable)",
        "Provides a writable MTU attribute for a network resource.",
        "2017-07-12T00:00:00-00:00",
    ),
    (
        "pagination",
        "Pagination support",
        "Extension that indicates that pagination is enabled.",
        "2016-06-12T00:00:00-00:00",
    ),
    (
        "project-id",
        "project_id field enabled",
        "Extension that indicates that project_id field is enabled.",
        "2016-09-09T09:09:09-09:09",
    ),
    (
        "quotas",
        "Quota management support",
        "Expose functions for quotas management per project",
        "2012-07-29T10:00:00-00:00",
    ),
    (
        "sorting",
        "Sorting support",
        "Extension that indicates that sorting is enabled.",
        "2016-06-12T00:00:00-00:00",
    ),
    (
        "standard-attr-revisions",
        "Resource revision numbers",
        "This extension will display the revision number of neutron resources.",
        "2016-04-11T10:00:00-00:00",
    ),
    (
        "standard-attr-timestamp",
        "Resource timestamps",
        "Adds created_at and updated_at fields to all Neutron resources that have Neutron standard attributes.",
        "2016-09-12T10:00:00-00:00",
    ),
];

fn document((alias, name, description, updated): (&str, &str, &str, &str)) -> Value {
    json!({"alias": alias, "name": name, "description": description, "updated": updated, "links": []})
}

/// `GET /v2.0/extensions`.
pub(super) async fn list(ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_project()?;
    Ok(Json(json!({"extensions": EXTENSIONS.map(document)})))
}

/// `GET /v2.0/extensions/{alias}`.
pub(super) async fn show(ctx: Ctx, Path(alias): Path<String>) -> Result<Json<Value>, ApiError> {
    ctx.require_project()?;
    let extension = EXTENSIONS.into_iter().find(|extension| extension.0 == alias);
    let missing = || {
        ApiError::NotFound(format!("Extension with alias {alias} does not exist")).named("ExtensionNotFound")
    };
    Ok(Json(json!({"extension": document(extension.ok_or_else(missing)?)})))
}
