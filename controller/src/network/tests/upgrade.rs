//! What was made by an earlier version.

use super::*;
use crate::network::upgrade;

const UNTOUCHED: &str = "10000000-0000-4000-8000-000000000001";
const OWN: &str = "10000000-0000-4000-8000-000000000002";
/// A network with a tenant's port and its service's, as the schema was before there were security groups.
const BEFORE_GROUPS: &[&str] = &[
    "INSERT INTO networks (id, project_id, name, description, shared, mtu, created_us, updated_us)
     VALUES ('20000000-0000-4000-8000-000000000001', 'p1', 'n', '', FALSE, 1450, 1, 1)",
    "INSERT INTO ports (id, network_id, project_id, name, description, mac_address, device_id, device_owner,
         created_us, updated_us)
     VALUES ('10000000-0000-4000-8000-000000000001', '20000000-0000-4000-8000-000000000001', 'p1', '', '',
         'fa:16:3e:00:00:01', '', '', 1, 1),
         ('10000000-0000-4000-8000-000000000002', '20000000-0000-4000-8000-000000000001', '', '', '',
         'fa:16:3e:00:00:02', '', 'network:distributed', 1, 1)",
];

#[tokio::test]
async fn ports_from_before_security_groups_get_the_default_group_once() {
    let test = TestApp::from_before(40, BEFORE_GROUPS).await;
    let admin = Client::admin(&test);
    let port = async |id: &str| admin.get(&format!("ports/{id}")).await.expect(200)["port"].take();
    let untouched = port(UNTOUCHED).await;
    assert_eq!(untouched["port_security_enabled"], true);
    let groups = admin.get("security-groups?project_id=p1&name=default").await.expect(200);
    let default = &groups["security_groups"][0];
    assert_eq!(untouched["security_groups"], json!([default["id"]]));
    assert_eq!(default["security_group_rules"].as_array().unwrap().len(), 4);
    // The network's own port has none.
    assert_eq!(port(OWN).await["port_security_enabled"], false);
    // What somebody decides from now on stays.
    let off = json!({"port": {"security_groups": [], "port_security_enabled": false}});
    admin.put(&format!("ports/{UNTOUCHED}"), off).await.expect(200);
    upgrade::run(&test.app).await.unwrap();
    assert_eq!(port(UNTOUCHED).await["port_security_enabled"], false);
}

#[tokio::test]
async fn a_port_that_was_changed_since_or_made_without_a_filter_stays_as_it_is() {
    let test = TestApp::from_before(40, BEFORE_GROUPS).await;
    let admin = Client::admin(&test);
    let network = "20000000-0000-4000-8000-000000000001";
    let new = admin.port(network, json!({"port_security_enabled": false})).await;
    // As if it hadn't been looked at yet, and somebody had changed the old one.
    let mut tx = test.app.begin().await.unwrap();
    for sql in [
        "DELETE FROM settings WHERE name = 'ports from before security groups'",
        "DELETE FROM port_security_groups",
        "UPDATE ports SET port_security_enabled = FALSE",
    ] {
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
    }
    // A new port is made more than a second after the schema was.
    sqlx::query("UPDATE ports SET created_us = created_us + 2000000 WHERE id = $1")
        .bind(id(&new))
        .execute(&mut *tx)
        .await
        .unwrap();
    sqlx::query("UPDATE ports SET updated_us = $1 WHERE id = $2")
        .bind(crate::db::now_us() + 2_000_000)
        .bind(UNTOUCHED)
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    upgrade::run(&test.app).await.unwrap();
    for id in [UNTOUCHED.to_owned(), id(&new)] {
        let port = admin.get(&format!("ports/{id}")).await.expect(200);
        assert_eq!(port["port"]["port_security_enabled"], false, "{id}");
    }
}

#[tokio::test]
async fn a_router_from_before_several_gateways_keeps_its_gateway() {
    let made = [
        BEFORE_GROUPS[0],
        "INSERT INTO routers (id, project_id, name, description, admin_state_up, external_network_id, enable_snat,
             created_us, updated_us)
         VALUES ('30000000-0000-4000-8000-000000000001', 'p1', 'r', '', TRUE,
             '20000000-0000-4000-8000-000000000001', FALSE, 1, 1),
             ('30000000-0000-4000-8000-000000000002', 'p1', 'none', '', TRUE, NULL, TRUE, 1, 1)",
        "INSERT INTO ports (id, network_id, project_id, name, description, mac_address, device_id, device_owner,
             router_id, port_security_enabled, created_us, updated_us)
         VALUES ('10000000-0000-4000-8000-000000000003', '20000000-0000-4000-8000-000000000001', '', '', '',
             'fa:16:3e:00:00:03', '30000000-0000-4000-8000-000000000001', 'network:router_gateway',
             '30000000-0000-4000-8000-000000000001', FALSE, 1, 1)",
    ];
    let test = TestApp::from_before(90, &made).await;
    let admin = Client::admin(&test);
    let router =
        async |name: &str| admin.get(&format!("routers?name={name}")).await.expect(200)["routers"][0].take();
    let gateway = json!({"network_id": "20000000-0000-4000-8000-000000000001", "enable_snat": false,
                         "external_fixed_ips": []});
    let with = router("r").await;
    assert_eq!((&with["external_gateway_info"], &with["external_gateways"]), (&gateway, &json!([gateway])));
    assert_eq!(router("none").await["external_gateways"], json!([]));
}
