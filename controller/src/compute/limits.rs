//! `GET /limits`: what a project may use and uses.

use axum::{Json, Router, extract::State, routing::get};
use serde_json::{Value, json};

use super::{
    quotas::{self, Resource},
    servers::input,
    versions::Version,
};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, query::Params},
    image::attributes,
};

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new().route("/limits", get(show))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let project = match params.get("tenant_id") {
        Some(project) => project,
        None => ctx.require_project()?,
    };
    quotas::may_see(&ctx, project)?;
    let mut db = app.db.acquire().await?;
    let used = quotas::used(&mut db, project).await?;
    let [instances, cores, ram, key_pairs, groups, members] =
        quotas::limits_of(&mut db, project, Resource::ALL).await?;
    let mut limits = json!({
        "maxTotalInstances": instances,
        "maxTotalCores": cores,
        "maxTotalRAMSize": ram,
        "maxTotalKeypairs": key_pairs,
        "maxServerGroups": groups,
        "maxServerGroupMembers": members,
        "maxServerMeta": input::MAX_METADATA,
        "totalServerGroupsUsed": used.server_groups,
        "totalInstancesUsed": used.instances,
        "totalCoresUsed": used.cores,
        "totalRAMUsed": used.ram,
    });
    // What other services limit, and files that nothing takes: shown as long as Nova showed them.
    if !version.has(36) {
        for name in ["maxTotalFloatingIps", "maxSecurityGroups", "maxSecurityGroupRules"] {
            limits[name] = json!(-1);
        }
        for (name, table) in
            [("totalFloatingIpsUsed", "floating_ips"), ("totalSecurityGroupsUsed", "security_groups")]
        {
            let count = format!("SELECT COUNT(*) FROM {table} WHERE project_id = $1");
            let count: i64 =
                sqlx::query_scalar(sqlx::AssertSqlSafe(count)).bind(project).fetch_one(&mut *db).await?;
            limits[name] = json!(count);
        }
    }
    if !version.has(39) {
        limits["maxImageMeta"] = json!(attributes::MAX_PROPERTIES);
    }
    if !version.has(57) {
        limits["maxPersonality"] = json!(0);
        limits["maxPersonalitySize"] = json!(0);
    }
    Ok(Json(json!({"limits": {"rate": [], "absolute": limits}})))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compute::fixtures, testing::TestApp};

    #[tokio::test]
    async fn limits_show_what_the_servers_of_the_project_use() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "reader").await;
        let host = fixtures::host(&test.app, "h1", "nova").await;
        fixtures::server(&test.app, &project, Some(&host), "active").await;
        fixtures::server(&test.app, &project, None, "error").await;
        fixtures::server(&test.app, "another", Some(&host), "active").await;
        let limits = test.get("/compute/v2.1/limits", &token).await.expect(200);
        let absolute = &limits["limits"]["absolute"];
        assert_eq!(absolute["maxTotalRAMSize"], 51_200);
        assert_eq!(
            (&absolute["totalInstancesUsed"], &absolute["totalCoresUsed"], &absolute["totalRAMUsed"]),
            (&json!(2), &json!(4), &json!(1024))
        );
        test.get("/compute/v2.1/limits?tenant_id=another", &token).await.expect(403);
        let path = "/compute/v2.1/limits?tenant_id=another";
        let other = test.get(path, &test.admin_token).await.expect(200);
        assert_eq!(other["limits"]["absolute"]["totalInstancesUsed"], 1);
    }
}
