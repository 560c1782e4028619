//! `GET /servers` and `/servers/detail`.

use super::*;

fn names(list: &Value) -> Vec<String> {
    let list = list["servers"].as_array().unwrap();
    list.iter().map(|server| server["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn filters_choose_and_unknown_ones_are_refused() {
    let cloud = Cloud::new().await;
    let web = cloud.create("web-1").await;
    let db = cloud.create("db").await;
    cloud.settle().await;
    cloud.act(&db, json!({"os-stop": null})).await.expect(202);
    cloud.settle().await;
    let address = cloud.show(&web).await["addresses"]["net"][0]["addr"].as_str().unwrap().to_owned();
    for (query, expected) in [
        ("", &["db", "web-1"][..]),
        ("name=web", &["web-1"]),
        ("name=%5Edb%24", &["db"]),
        ("name=none", &[]),
        ("status=ACTIVE", &["web-1"]),
        ("status=shutoff", &["db"]),
        ("status=ACTIVE&status=SHUTOFF", &["db", "web-1"]),
        ("vm_state=stopped", &["db"]),
        (&format!("uuid={web}"), &["web-1"]),
        (&format!("ip={}", address.replace('.', "%5C.") + "$"), &["web-1"]),
        (&format!("image={}", cloud.image), &["db", "web-1"]),
        ("flavor=1&name=db", &["db"]),
        ("flavor=2", &[]),
        ("availability_zone=nova", &["db", "web-1"]),
        ("changes-since=2000-01-01T00:00:00Z", &["db", "web-1"]),
        ("changes-since=2100-01-01T00:00:00Z", &[]),
        ("sort_key=display_name&sort_dir=desc", &["web-1", "db"]),
    ] {
        for path in ["", "/detail"] {
            let list = cloud.get(&format!("{path}?{query}")).await.expect(200);
            assert_eq!(names(&list), expected, "{path} {query}");
        }
    }
    let path = format!("{SERVERS}?changes-before=2000-01-01T00:00:00Z");
    assert_eq!(names(&cloud.test.get_at(&path, &cloud.token, 66).await.expect(200)), [""; 0]);
    for query in ["sort_key=fly", "sort_dir=up", "limit=x", "marker=none", "changes-since=x", "deleted=maybe"]
    {
        fault(cloud.get(&format!("?{query}")).await, 400, "badRequest");
    }
}

/// Names and statuses of a list of microversion 2.`minor`.
async fn stated(cloud: &Cloud, token: &str, minor: u16, query: &str) -> Vec<(String, String)> {
    let list = cloud.test.get_at(&format!("{SERVERS}/detail?{query}"), token, minor).await.expect(200);
    let word = |server: &Value, name: &str| server[name].as_str().unwrap().to_owned();
    let list = list["servers"].as_array().unwrap();
    list.iter().map(|server| (word(server, "name"), word(server, "status"))).collect()
}

fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
    wanted.iter().map(|(name, status)| ((*name).to_owned(), (*status).to_owned())).collect()
}

#[tokio::test]
async fn deleted_servers_are_in_lists_of_changes_and_shown_to_admins_and_nothing_else_counts_them() {
    let cloud = Cloud::new().await;
    let before = jiff::Timestamp::now();
    let gone = cloud.run("gone").await;
    cloud.run("here").await;
    cloud.delete(&format!("/{gone}")).await.expect(204);
    cloud.settle().await;
    fault(cloud.get(&format!("/{gone}")).await, 404, "itemNotFound");
    let (ada, admin) = (cloud.token.as_str(), cloud.test.admin_token.as_str());
    let both = pairs(&[("here", "ACTIVE"), ("gone", "DELETED")]);
    assert_eq!(stated(&cloud, ada, 1, "").await, both[..1]);
    assert_eq!(stated(&cloud, ada, 1, &format!("changes-since={before}")).await, both);
    assert_eq!(stated(&cloud, ada, 66, "changes-before=2100-01-01T00:00:00Z").await, both);
    assert_eq!(stated(&cloud, ada, 1, &format!("changes-since={before}&deleted=false")).await, both[..1]);
    assert_eq!(stated(&cloud, admin, 3, "deleted=true&all_tenants=1").await, both[1..]);
    assert_eq!(stated(&cloud, admin, 3, "status=deleted&all_tenants=1").await, both[1..]);
    for query in ["deleted=true", "status=DELETED"] {
        fault(cloud.get(&format!("?{query}")).await, 403, "forbidden");
    }
    // Pages go across both kinds, also from a deleted one on.
    let page = cloud.get(&format!("/detail?changes-since={before}&limit=1&sort_dir=asc")).await.expect(200);
    assert_eq!(names(&page), ["gone"]);
    let shown = &page["servers"][0];
    assert_eq!(
        (&shown["OS-EXT-STS:vm_state"], &shown["OS-EXT-STS:power_state"]),
        (&json!("deleted"), &json!(0))
    );
    assert!(shown["OS-SRV-USG:terminated_at"].is_string());
    assert_eq!(shown["addresses"], json!({}));
    let next = page["servers_links"][0]["href"].as_str().unwrap().split_once(":8774").unwrap().1;
    assert_eq!(names(&cloud.test.get(next, ada).await.expect(200)), ["here"]);
    fault(cloud.get(&format!("?marker={gone}")).await, 400, "badRequest");
    // What was done to it, since 2.21, and nobody else's business.
    let actions = format!("{SERVERS}/{gone}/os-instance-actions");
    fault(cloud.test.get_at(&actions, ada, 20).await, 404, "itemNotFound");
    let list = cloud.test.get_at(&actions, ada, 21).await.expect(200);
    let list = list["instanceActions"].as_array().unwrap();
    assert_eq!(list.iter().map(|action| &action["action"]).collect::<Vec<_>>(), ["delete", "create"]);
    let one = format!("{actions}/{}", list[0]["request_id"].as_str().unwrap());
    cloud.test.get_at(&one, admin, 21).await.expect(200);
    let (_, eve) = cloud.test.tenant("eve", "admin").await;
    let (_, bob) = cloud.test.tenant("bob", "member").await;
    fault(cloud.test.get_at(&actions, &bob, 21).await, 404, "itemNotFound");
    assert_eq!(stated(&cloud, &bob, 1, &format!("changes-since={before}")).await, pairs(&[]));
    assert_eq!(stated(&cloud, &eve, 1, &format!("changes-since={before}")).await, pairs(&[]));
    let limits = cloud.test.get("/compute/v2.1/limits", ada).await.expect(200);
    assert_eq!(limits["limits"]["absolute"]["totalInstancesUsed"], 1);
}

#[tokio::test]
async fn deleted_servers_are_forgotten_when_their_time_is_over() {
    let cloud = Cloud::new().await;
    let old = cloud.run("old").await;
    cloud.delete(&format!("/{old}")).await.expect(204);
    cloud.settle().await;
    let mut tx = cloud.test.app.begin().await.unwrap();
    let sql = "UPDATE deleted_servers SET deleted_us = deleted_us - $1";
    let kept = i64::try_from(cloud.test.app.config.keep_deleted.as_micros()).unwrap();
    sqlx::query(sql).bind(kept).execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let since = "changes-since=2000-01-01T00:00:00Z";
    assert_eq!(stated(&cloud, &cloud.token, 1, since).await, pairs(&[]));
    assert_eq!(stated(&cloud, &cloud.test.admin_token, 1, "deleted=true&all_tenants=1").await, pairs(&[]));
    let actions = format!("{SERVERS}/{old}/os-instance-actions");
    fault(cloud.test.get_at(&actions, &cloud.token, 21).await, 404, "itemNotFound");
    // The next deletion takes what is left of it along.
    let new = cloud.run("new").await;
    cloud.delete(&format!("/{new}")).await.expect(204);
    cloud.settle().await;
    let left: Vec<String> =
        sqlx::query_scalar("SELECT name FROM deleted_servers").fetch_all(&cloud.test.app.db).await.unwrap();
    assert_eq!(left, ["new"]);
    let left: i64 = sqlx::query_scalar("SELECT COUNT(DISTINCT server_id) FROM deleted_server_actions")
        .fetch_one(&cloud.test.app.db)
        .await
        .unwrap();
    assert_eq!(left, 1);
}

#[tokio::test]
async fn pages_follow_each_other_without_a_gap() {
    let cloud = Cloud::new().await;
    for index in 0..5 {
        cloud.create(&format!("s{index}")).await;
    }
    let mut seen = Vec::new();
    let mut path = "/detail?limit=2&sort_key=display_name&sort_dir=asc".to_owned();
    for _ in 0..3 {
        let page = cloud.get(&path).await.expect(200);
        seen.extend(names(&page));
        let Some(next) = page["servers_links"][0]["href"].as_str() else { break };
        assert_eq!(page["servers_links"][0]["rel"], "next");
        path = next.split_once("/v2.1/servers").unwrap().1.to_owned();
    }
    assert_eq!(seen, ["s0", "s1", "s2", "s3", "s4"]);
}

#[tokio::test]
async fn pages_in_any_order_are_the_whole_list_cut_in_pieces() {
    let cloud = Cloud::new().await;
    for index in 0..7 {
        let id = cloud.create(&format!("s{}", index % 3)).await;
        if index % 2 == 0 {
            cloud.act(&id, json!({"lock": null})).await.expect(202);
        }
    }
    let ids = |list: &Value| -> Vec<String> {
        let list = list["servers"].as_array().unwrap();
        list.iter().map(|server| server["id"].as_str().unwrap().to_owned()).collect()
    };
    for query in [
        "",
        "sort_dir=asc",
        "sort_key=display_name",
        "sort_key=display_name&sort_dir=asc",
        "sort_key=display_name&sort_dir=asc&sort_key=uuid&sort_dir=asc&sort_key=display_name&sort_dir=desc",
        "sort_key=locked&sort_key=display_name&sort_dir=desc&sort_dir=asc",
        "sort_key=host&sort_key=key_name&sort_key=launched_at&sort_key=task_state&sort_dir=asc",
        // Chosen in SQL, and by what is read of each.
        "locked=true&sort_key=display_name&sort_dir=asc",
        "name=s%5B0%5D%7C1",
        "name=s1",
        "ip=10.",
    ] {
        let whole =
            ids(&cloud.test.get_at(&format!("{SERVERS}?{query}"), &cloud.token, 90).await.expect(200));
        let mut seen = Vec::new();
        let mut path = format!("{SERVERS}/detail?limit=2&{query}");
        for _ in 0..5 {
            let page = cloud.test.get_at(&path, &cloud.token, 90).await.expect(200);
            seen.extend(ids(&page));
            let Some(next) = page["servers_links"][0]["href"].as_str() else { break };
            path = next.split_once("cloud.test:8774").unwrap().1.to_owned();
        }
        assert_eq!(seen, whole, "{query}");
    }
    assert_eq!(ids(&cloud.get("?locked=true").await.expect(200)).len(), 7, "before 2.73 it means nothing");
    let locked = cloud.test.get_at(&format!("{SERVERS}?locked=true"), &cloud.token, 90).await.expect(200);
    assert_eq!(ids(&locked).len(), 4);
    let none = cloud.get("?limit=0").await.expect(200);
    assert_eq!((ids(&none).len(), &none["servers_links"]), (0, &Value::Null));
}

#[tokio::test]
async fn another_projects_server_is_no_marker() {
    let cloud = Cloud::new().await;
    let id = cloud.create("mine").await;
    let (_, other) = cloud.test.tenant("bob", "member").await;
    let path = format!("{SERVERS}?marker={id}");
    fault(cloud.test.get(&path, &other).await, 400, "badRequest");
    assert_eq!(names(&cloud.test.get(&path, &cloud.token).await.expect(200)), [""; 0]);
    let all = format!("{path}&all_tenants=1");
    assert_eq!(names(&cloud.test.get(&all, &cloud.test.admin_token).await.expect(200)), [""; 0]);
}

#[tokio::test]
async fn security_groups_are_in_the_document_by_name() {
    let cloud = Cloud::new().await;
    let id = cloud.create("web").await;
    let expected = json!([{"name": "default"}]);
    assert_eq!(cloud.show(&id).await["security_groups"], expected);
    assert_eq!(cloud.get("/detail").await.expect(200)["servers"][0]["security_groups"], expected);
}

#[tokio::test]
async fn everybody_lists_their_own_and_admins_all() {
    let cloud = Cloud::new().await;
    cloud.create("mine").await;
    let (_, other) = cloud.test.tenant("bob", "member").await;
    let list = cloud.test.get(SERVERS, &other).await.expect(200);
    assert_eq!(names(&list), [""; 0]);
    let all = format!("{SERVERS}?all_tenants=1");
    fault(cloud.test.get(&all, &other).await, 403, "forbidden");
    let list = cloud.test.get(&all, &cloud.test.admin_token).await.expect(200);
    assert_eq!(names(&list), ["mine"]);
    let path = format!("{SERVERS}/detail?all_tenants=true&project_id={}", cloud.project);
    let list = cloud.test.get(&path, &cloud.test.admin_token).await.expect(200);
    assert_eq!(list["servers"][0]["OS-EXT-SRV-ATTR:host"], "h1");
    let list = cloud.test.get(SERVERS, &cloud.test.admin_token).await.expect(200);
    assert_eq!(names(&list), [""; 0], "without all_tenants an admin sees the own project");
}
