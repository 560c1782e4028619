//! What a new cloud starts with: flavors, and a network for the administrator's project.

use crate::db::Conn;
use ipnet::Ipv4Net;

use super::flavors::{self, Flavor};
use crate::{
    http::error::ApiError,
    network::{
        networks::{self, NewNetwork},
        subnets::{self, SubnetConfig},
    },
};

/// Id, name, vCPUs, MiB, GiB.
const FLAVORS: [(&str, &str, i64, i64, i64); 5] = [
    ("1", "m1.nano", 1, 64, 0),
    ("2", "m1.tiny", 1, 512, 0),
    ("3", "m1.small", 1, 1024, 5),
    ("4", "m1.medium", 2, 2048, 10),
    ("5", "m1.large", 4, 4096, 20),
];
/// The setting that says that they were made: what is deleted later is not made again.
const SETTING: &str = "defaults_made";
const NETWORK: &str = "default";
const SUBNET: &str = "default-subnet";
const CIDR: &str = "10.0.0.0/24";

/// Makes the defaults the first time; later it does nothing. A cloud that has flavors or networks already keeps its own.
///
/// # Errors
/// Of the database.
pub(crate) async fn bootstrap(tx: &mut Conn, admin_project: &str) -> Result<(), ApiError> {
    let first = sqlx::query("INSERT INTO settings (name, value) VALUES ($1, 'yes') ON CONFLICT DO NOTHING")
        .bind(SETTING)
        .execute(&mut *tx)
        .await?;
    if first.rows_affected() == 0 {
        return Ok(());
    }
    let known: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM flavors").fetch_one(&mut *tx).await?;
    if known == 0 {
        for (id, name, vcpus, memory_mib, disk_gib) in FLAVORS {
            let (id, name) = (id.into(), name.into());
            let flavor = Flavor { id, name, vcpus, memory_mib, disk_gib, ephemeral_gib: 0, swap_mib: 0 };
            flavors::insert(tx, &flavor).await?;
        }
    }
    let known: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM networks WHERE project_id = $1")
        .bind(admin_project)
        .fetch_one(&mut *tx)
        .await?;
    if known == 0 {
        let network = networks::insert(tx, &NewNetwork::tenant(admin_project, NETWORK)).await?;
        let cidr: Ipv4Net = CIDR.parse().map_err(ApiError::internal)?;
        subnets::insert(tx, &network, admin_project, &SubnetConfig::plain(SUBNET, cidr)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::{identity::bootstrap, testing::TestApp};

    #[tokio::test]
    async fn the_defaults_are_made_once() {
        let test = TestApp::new().await;
        let admin = &test.admin_token;
        let networks = test.get("/network/v2.0/networks", admin).await.expect(200);
        let network = &networks["networks"][0];
        assert_eq!((&network["name"], &network["shared"]), (&"default".into(), &false.into()));
        assert_eq!(network["project_id"], test.admin.project_id.as_str());
        let subnets = test.get("/network/v2.0/subnets", admin).await.expect(200);
        assert_eq!(subnets["subnets"][0]["name"], "default-subnet");
        assert_eq!(subnets["subnets"][0]["cidr"], "10.0.0.0/24");
        let id = network["id"].as_str().unwrap();
        test.delete(&format!("/network/v2.0/networks/{id}"), admin).await.expect(204);
        test.delete("/compute/v2.1/flavors/1", admin).await.expect(202);
        bootstrap::bootstrap(&test.app, None, false).await.unwrap();
        let networks = test.get("/network/v2.0/networks", admin).await.expect(200);
        assert_eq!(networks["networks"].as_array().unwrap().len(), 0);
        test.get("/compute/v2.1/flavors/1", admin).await.expect(404);
        let (_, token) = test.tenant("ada", "member").await;
        assert_eq!(
            test.get("/network/v2.0/networks", &token).await.expect(200)["networks"],
            serde_json::json!([])
        );
    }
}
