//! The protocol and Mote's own API with a host that is played by the test.

use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use http::Method;
use jiff::Timestamp;
use mote_host_api::{
    BootSpec, DesiredPower, HostReply, HostRequest, HostRequestKind, ImageSpec, JoinResponse, ObservedServer,
    ObservedState, ServerId, ServerState,
};
use serde_json::{Value, json};
use tokio_tungstenite::{
    connect_async,
    tungstenite::{self, Message, client::IntoClientRequest},
};

use super::{
    fake::{FakeHost, inventory, join_body},
    policy, touch, views,
};
use crate::{
    db::now_us,
    network::ports::server::{NicWish, PluggedServer, plug},
    scheduler::Policy,
    testing::TestApp,
};

fn observed(id: ServerId, state: ServerState, run_generation: u64) -> ObservedServer {
    ObservedServer {
        id,
        state,
        run_generation,
        disks: [1].into(),
        ports: None,
        since: Timestamp::UNIX_EPOCH,
        message: Some("why".into()),
        given_up: Vec::new(),
    }
}

async fn text(test: &TestApp, sql: &'static str) -> String {
    sqlx::query_scalar(sql).fetch_one(&test.app.db).await.unwrap()
}

async fn count(test: &TestApp, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&test.app.db).await.unwrap()
}

/// A network with a subnet; gives its id.
pub(super) async fn network(test: &TestApp, token: &str) -> String {
    let body = json!({"network": {"name": "n"}});
    let network = test.post("/network/v2.0/networks", token, body).await.expect(201);
    let id = network["network"]["id"].as_str().unwrap().to_owned();
    let body = json!({"subnet": {
        "network_id": id, "ip_version": 4, "cidr": "10.1.0.0/24", "dns_nameservers": ["192.0.2.53"],
        "host_routes": [{"destination": "192.0.2.0/24", "nexthop": "10.1.0.9"}],
    }});
    test.post("/network/v2.0/subnets", token, body).await.expect(201);
    id
}

/// A server on the host, as a create request leaves it, with a NIC on the network.
pub(super) async fn server(
    test: &TestApp,
    host: &FakeHost,
    project: &str,
    network: &str,
    disk: &str,
) -> ServerId {
    let id = ServerId::new();
    let image = |sha256: &str| ImageSpec { sha256: sha256.into(), size: 5 };
    let boot = BootSpec {
        disk: image(disk),
        kernel: Some(image(&"b".repeat(64))),
        ramdisk: None,
        command_line: None,
    };
    let mut tx = test.app.begin().await.unwrap();
    let (touched, generation) = touch(&mut tx, &host.id()).await.unwrap();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, key_name, public_key, metadata, restart_policy, launch_index,
             availability_zone, host_id, desired_power, run_generation, changed_generation, vm_state, task_state,
             created_us, updated_us)
         VALUES ($1, $2, 'u', 'A b', 'a-b', 'f', 'small', 2, 512, 0, 3, 'i', $3, 'k', 'ssh-ed25519 AAAA',
             '{\"role\": \"web\"}', 'never', 0, 'nova', $4, 'running', 1, $5, 'building', 'scheduling', $6, $6)",
    )
    .bind(id.to_string())
    .bind(project)
    .bind(serde_json::to_string(&boot).unwrap())
    .bind(host.id())
    .bind(generation)
    .bind(now_us())
    .execute(&mut *tx)
    .await
    .unwrap();
    let key = id.to_string();
    let plugged = PluggedServer { id: &key, project_id: project, zone: "nova", security_groups: &[] };
    let wish = NicWish::Network { id: network.into(), fixed_ip: None };
    let others = plug(&mut tx, &plugged, &[wish]).await.unwrap();
    tx.commit().await.unwrap();
    test.app.hub.wake_all(others);
    test.app.hub.wake(touched);
    id
}

/// As a delete request does it.
pub(super) async fn delete(test: &TestApp, host: &FakeHost, id: ServerId) -> u64 {
    let mut tx = test.app.begin().await.unwrap();
    let (touched, generation) = touch(&mut tx, &host.id()).await.unwrap();
    sqlx::query(
        "UPDATE servers SET deleting = TRUE, task_state = 'deleting', changed_generation = $2 WHERE id = $1",
    )
    .bind(id.to_string())
    .bind(generation)
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    test.app.hub.wake(touched);
    u64::try_from(generation).unwrap()
}

#[tokio::test]
async fn only_a_valid_token_lets_a_host_join_and_joining_again_changes_its_secret() {
    let test = TestApp::new().await;
    let wrong = test.post("/mote/v1/hosts", "", join_body("nonsense", "h1")).await.expect(401);
    assert_eq!(wrong["error"]["code"], 401);
    let (_, tenant) = test.tenant("t", "member").await;
    test.post("/mote/v1/join-tokens", &tenant, Value::Null).await.expect(403);
    let once = json!({"uses": 1, "lifetime_s": 60});
    let made = test.post("/mote/v1/join-tokens", &test.admin_token, once).await.expect(201);
    let token = made["token"].as_str().unwrap();
    assert!(made["expires_at"].as_str().unwrap().ends_with('Z'));
    test.post("/mote/v1/hosts", "", join_body(token, "a/b")).await.expect(400);
    test.post("/mote/v1/hosts", "", join_body(token, "h0")).await.expect(201);
    test.post("/mote/v1/hosts", "", join_body(token, "h9")).await.expect(401);
    sqlx::query("UPDATE join_tokens SET uses_left = NULL, expires_us = 1")
        .execute(&test.app.db)
        .await
        .unwrap();
    test.post("/mote/v1/hosts", "", join_body(token, "h9")).await.expect(401);

    let (first, second) = (FakeHost::join(&test, "h1").await, FakeHost::join(&test, "h1").await);
    assert_eq!(first.joined.host_id, second.joined.host_id);
    assert_eq!(first.joined.cloud_id, second.joined.cloud_id);
    assert_ne!(first.joined.secret, second.joined.secret);
    first.call(&test, Method::GET, "desired?after=0", Value::Null).await.expect(401);
    second.call(&test, Method::GET, "desired?after=0", Value::Null).await.expect(200);
    let other = FakeHost::join(&test, "h2").await;
    let stolen = FakeHost { joined: JoinResponse { host_id: second.joined.host_id, ..other.joined } };
    stolen.report(&test, 0, vec![]).await.expect(401);
    let stored = text(&test, "SELECT secret_hash FROM hosts WHERE name = 'h1'").await;
    assert_ne!(stored, second.joined.secret);
}

#[tokio::test]
async fn desired_state_is_whole_and_wakes_the_host_that_waits() {
    let test = TestApp::new().await;
    let host = FakeHost::join(&test, "h1").await;
    let empty = host.desired(&test, 0).await;
    assert_eq!((empty.generation, empty.servers.len(), empty.networks.len()), (1, 0, 0));
    assert_eq!(empty.cloud_id, host.joined.cloud_id);
    host.call(&test, Method::GET, "desired?after=1&wait=0", Value::Null).await.expect(204);

    let (project, token) = test.tenant("t", "member").await;
    let network = network(&test, &token).await;
    let disk = "a".repeat(64);
    let (state, id) = tokio::join!(host.desired(&test, 1), server(&test, &host, &project, &network, &disk));
    assert_eq!(state.generation, 2);
    let spec = &state.servers[0];
    assert_eq!((spec.id, spec.power, spec.vcpus, spec.memory_mib), (id, DesiredPower::Running, 2, 512));
    assert_eq!(spec.boot.disk.sha256, disk);
    assert_eq!(spec.metadata.public_keys["k"], "ssh-ed25519 AAAA");
    assert_eq!(spec.metadata.meta["role"], "web");
    let on = &state.networks[0];
    assert_eq!((on.id.to_string(), on.ports.len(), on.subnets.len()), (network, 1, 1));
    assert_eq!(spec.ports, [on.ports[0].id]);
    assert_eq!(on.ports[0].fixed_ips[0].subnet_id, on.subnets[0].id);
    assert!(on.subnets[0].cidr.contains(&on.subnets[0].service_ip));
    assert_ne!(on.subnets[0].service_ip, on.ports[0].fixed_ips[0].ip_address);
    assert_eq!(on.subnets[0].host_routes.len(), 1);

    // A host that knows a generation of the future gets what there is.
    assert_eq!(host.desired(&test, 99).await.generation, 2);
    // Servers of other hosts are not told.
    let other = FakeHost::join(&test, "h2").await;
    assert_eq!(other.desired(&test, 0).await.servers, []);
}

#[tokio::test]
async fn reports_move_servers_and_end_deletions() {
    let test = TestApp::new().await;
    let host = FakeHost::join(&test, "h1").await;
    let (project, token) = test.tenant("t", "member").await;
    let network = network(&test, &token).await;
    let id = server(&test, &host, &project, &network, &"a".repeat(64)).await;
    host.report(&test, 1, vec![observed(id, ServerState::Preparing, 0)]).await.expect(204);
    assert_eq!(text(&test, "SELECT task_state FROM servers").await, "spawning");
    host.report(&test, 2, vec![observed(id, ServerState::Running, 1)]).await.expect(204);
    assert_eq!(text(&test, "SELECT vm_state FROM servers WHERE launched_us IS NOT NULL").await, "active");

    // A guest that powers itself off changes what is wanted.
    host.report(&test, 2, vec![observed(id, ServerState::Stopped, 1)]).await.expect(204);
    let state = host.desired(&test, 2).await;
    assert_eq!((state.generation, state.servers[0].power), (3, DesiredPower::Stopped));

    let generation = delete(&test, &host, id).await;
    assert_eq!(host.desired(&test, 3).await.servers, []);
    let there = || count(&test, "SELECT COUNT(*) FROM servers");
    // Not applied yet; still there; applied in a future that never was: in none of them is it gone.
    host.report(&test, generation - 1, vec![]).await.expect(204);
    host.report(&test, generation, vec![observed(id, ServerState::Removing, 1)]).await.expect(204);
    host.report(&test, u64::MAX, vec![]).await.expect(204);
    assert_eq!(there().await, 1);
    host.report(&test, generation, vec![]).await.expect(204);
    assert_eq!(there().await, 0);
    assert_eq!(
        count(&test, "SELECT COUNT(*) FROM ports WHERE device_owner != 'network:distributed'").await,
        0
    );
    assert_eq!(count(&test, "SELECT COUNT(*) FROM server_usage WHERE ended_us > started_us").await, 1);
    // Repeating it is harmless.
    host.report(&test, generation, vec![]).await.expect(204);

    let other = FakeHost::join(&test, "h2").await;
    let mine = ObservedState {
        host_id: host.joined.host_id,
        inventory: inventory(),
        applied_generation: 0,
        servers: vec![],
        traffic: vec![],
    };
    other.call(&test, Method::PUT, "observed", serde_json::to_value(mine).unwrap()).await.expect(400);
}

#[tokio::test]
async fn a_failure_is_an_error_with_its_reason() {
    let test = TestApp::new().await;
    let host = FakeHost::join(&test, "h1").await;
    let (project, token) = test.tenant("t", "member").await;
    let network = network(&test, &token).await;
    let id = server(&test, &host, &project, &network, &"a".repeat(64)).await;
    host.report(&test, 2, vec![observed(id, ServerState::Failed, 0)]).await.expect(204);
    assert_eq!(text(&test, "SELECT vm_state || ' ' || fault_message FROM servers").await, "error why");
    host.report(&test, 2, vec![observed(id, ServerState::Running, 1)]).await.expect(204);
    assert_eq!(count(&test, "SELECT COUNT(*) FROM servers WHERE fault_message IS NULL").await, 1);
}

#[tokio::test]
async fn bytes_are_given_to_the_hosts_that_boot_them_only_and_go_with_the_server() {
    use std::io::Write;
    let test = TestApp::new().await;
    let mut writer = test.app.images.writer().unwrap();
    writer.write_all(b"bytes").unwrap();
    let digest = writer.commit(None).unwrap().sha256;
    let (host, other) = (FakeHost::join(&test, "h1").await, FakeHost::join(&test, "h2").await);
    let (project, token) = test.tenant("t", "member").await;
    let network = network(&test, &token).await;
    let path = format!("images/{digest}");
    host.call(&test, Method::GET, &path, Value::Null).await.expect(404);
    let id = server(&test, &host, &project, &network, &digest).await;
    let answer = host.call(&test, Method::GET, &path, Value::Null).await;
    assert_eq!((answer.status.as_u16(), answer.header("content-length")), (200, "5"));
    assert_eq!(answer.bytes, b"bytes");
    other.call(&test, Method::GET, &path, Value::Null).await.expect(404);
    for wrong in ["images/%25", "images/abc", &format!("images/{}", "b".repeat(64))] {
        host.call(&test, Method::GET, wrong, Value::Null).await.expect(404);
    }
    let generation = delete(&test, &host, id).await;
    host.report(&test, generation, vec![]).await.expect(204);
    assert_eq!(test.app.images.path(&digest), None);
}

#[tokio::test]
async fn consoles_are_reached_through_the_host_by_their_project_only() {
    let test = TestApp::new().await;
    let host = FakeHost::join(&test, "h1").await;
    let (project, token) = test.tenant("t", "member").await;
    let (_, stranger) = test.tenant("s", "member").await;
    let network = network(&test, &token).await;
    let id = server(&test, &host, &project, &network, &"a".repeat(64)).await;
    let path = format!("/mote/v1/servers/{id}/console");
    test.get(&path, &stranger).await.expect(404);
    test.get(&path, "").await.expect(401);
    test.post(&path, &token, json!({"data": "not base64!"})).await.expect(400);
    host.call(&test, Method::GET, "requests?wait=0", Value::Null).await.expect(204);
    let serve = async |reply: HostReply| {
        let asked = host.call(&test, Method::GET, "requests?wait=30", Value::Null).await.expect(200);
        let asked: Vec<HostRequest> = serde_json::from_value(asked).unwrap();
        let reply = serde_json::to_value(reply).unwrap();
        let path = format!("requests/{}", asked[0].id);
        host.call(&test, Method::POST, &path, reply.clone()).await.expect(204);
        host.call(&test, Method::POST, &path, reply).await.expect(404);
        asked[0].kind.clone()
    };
    let query = format!("{path}?offset=7&wait_ms=99999");
    let reply = HostReply::ConsoleRead { next_offset: 9, data: "aGk=".into() };
    let (answer, kind) = tokio::join!(test.get(&query, &token), serve(reply));
    assert_eq!(answer.expect(200), json!({"next_offset": 9, "data": "aGk="}));
    assert_eq!(kind, HostRequestKind::ConsoleRead { server_id: id, offset: 7, wait_ms: 10_000 });
    let (answer, kind) =
        tokio::join!(test.post(&path, &token, json!({"data": "aGk="})), serve(HostReply::Done));
    answer.expect(204);
    assert_eq!(kind, HostRequestKind::ConsoleWrite { server_id: id, data: "aGk=".into() });
    let refusal = HostReply::Error { message: "it does not run".into() };
    let (answer, _) = tokio::join!(test.get(&path, &token), serve(refusal));
    assert_eq!(answer.expect(409)["error"]["message"], "it does not run");
    sqlx::query("UPDATE hosts SET last_seen_us = 1").execute(&test.app.db).await.unwrap();
    test.get(&path, &token).await.expect(503);
}

#[tokio::test]
async fn administrators_see_hosts_and_choose_the_policy() {
    let test = TestApp::new().await;
    let host = FakeHost::join(&test, "h1").await;
    let (project, token) = test.tenant("t", "member").await;
    let network = network(&test, &token).await;
    let id = server(&test, &host, &project, &network, &"a".repeat(64)).await;
    test.get("/mote/v1/hosts", &token).await.expect(403);
    let list = test.get("/mote/v1/hosts", &test.admin_token).await.expect(200);
    assert_eq!(
        list["hosts"][0],
        json!({
            "id": host.id(), "name": "h1", "availability_zone": "nova", "state": "up", "enabled": true,
            "inventory": {"vcpus": 8, "memory_mib": 16384, "disk_gib": 200, "kernel": "Linux 6.12",
                "version": "0.1.0", "traits": ["CUSTOM_KVM"]},
            "usage": {"servers": 1, "vcpus": 2, "memory_mib": 512, "disk_gib": 3},
        })
    );
    let path = format!("/mote/v1/hosts/{}", host.id());
    let off = test.call(Method::PUT, &path, &test.admin_token, json!({"enabled": false})).await.expect(200);
    assert_eq!(off["host"]["enabled"], false);
    sqlx::query("UPDATE hosts SET last_seen_us = 1").execute(&test.app.db).await.unwrap();
    assert_eq!(test.get(&path, &test.admin_token).await.expect(200)["host"]["state"], "down");
    test.delete(&path, &test.admin_token).await.expect(409);
    let generation = delete(&test, &host, id).await;
    host.report(&test, generation, vec![]).await.expect(204);
    test.delete(&path, &test.admin_token).await.expect(204);
    test.delete(&path, &test.admin_token).await.expect(404);
    host.report(&test, generation, vec![]).await.expect(401);

    let scheduler = "/mote/v1/scheduler";
    let admin = test.admin_token.as_str();
    assert_eq!(test.get(scheduler, admin).await.expect(200), json!({"policy": "least-loaded"}));
    test.call(Method::PUT, scheduler, &token, json!({"policy": "random"})).await.expect(403);
    test.call(Method::PUT, scheduler, admin, json!({"policy": "best"})).await.expect(400);
    test.call(Method::PUT, scheduler, admin, json!({"policy": "by-zone"})).await.expect(200);
    let mut conn = test.app.db.acquire().await.unwrap();
    assert_eq!(policy(&mut conn).await.unwrap(), Policy::ByZone);
    assert!(views(&mut conn).await.unwrap().is_empty());
}

/// Answers a host's questions as a machine would that says back, in capitals, what is typed.
async fn echoing(test: &TestApp, host: &FakeHost) {
    let (mut said, mut waiting) = (b"earlier output".to_vec(), Vec::new());
    loop {
        let asked = host.call(test, Method::GET, "requests?wait=30", Value::Null).await;
        let asked: Vec<HostRequest> = match asked.status.as_u16() {
            200 => serde_json::from_value(asked.json()).unwrap(),
            _ => Vec::new(),
        };
        waiting.extend(asked);
        let mut unanswered = Vec::new();
        // What is typed comes first, so that who waits for output gets its answer.
        waiting
            .sort_by_key(|request: &HostRequest| matches!(request.kind, HostRequestKind::ConsoleRead { .. }));
        for request in waiting.drain(..) {
            let reply = match &request.kind {
                HostRequestKind::ConsoleWrite { data, .. } => {
                    let typed = STANDARD.decode(data).unwrap();
                    match typed.as_slice() {
                        b"reboot" => said = b"BOOTED".to_vec(),
                        typed => said.extend(typed.to_ascii_uppercase()),
                    }
                    HostReply::Done
                }
                HostRequestKind::ConsoleRead { offset, wait_ms, .. } => {
                    let from = usize::try_from(*offset).unwrap().min(said.len());
                    if *offset == said.len() as u64 && *wait_ms > 0 {
                        unanswered.push(request);
                        continue;
                    }
                    HostReply::ConsoleRead {
                        next_offset: said.len() as u64,
                        data: STANDARD.encode(&said[from..]),
                    }
                }
                other => panic!("{other:?}"),
            };
            let path = format!("requests/{}", request.id);
            host.call(test, Method::POST, &path, serde_json::to_value(reply).unwrap()).await;
        }
        waiting = unanswered;
    }
}

/// The status that a WebSocket was refused with.
async fn refused(url: &str) -> u16 {
    match connect_async(url).await {
        Err(tungstenite::Error::Http(answer)) => answer.status().as_u16(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_serial_console_is_a_websocket_that_carries_bytes_both_ways() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let public = format!("http://{}", listener.local_addr().unwrap());
    let url = public.clone();
    let test = TestApp::with(move |config| config.public_url = url).await;
    let serving =
        tokio::spawn(crate::server::serve(listener, None, test.router.clone(), std::future::pending()));
    let host = FakeHost::join(&test, "h1").await;
    let (project, token) = test.tenant("t", "member").await;
    let (_, stranger) = test.tenant("s", "member").await;
    let network = network(&test, &token).await;
    let id = server(&test, &host, &project, &network, &"a".repeat(64)).await;
    let consoles = format!("/compute/v2.1/servers/{id}/remote-consoles");
    let wish = |protocol: &str, kind: &str| json!({"remote_console": {"protocol": protocol, "type": kind}});
    test.post_at(&consoles, &token, 6, wish("serial", "serial")).await.expect(409);
    host.settle(&test).await;
    test.post_at(&consoles, &stranger, 6, wish("serial", "serial")).await.expect(404);
    test.post_at(&consoles, &token, 5, wish("serial", "serial")).await.expect(404);
    for (protocol, kind) in [("vnc", "novnc"), ("serial", "novnc"), ("telnet", "serial")] {
        test.post_at(&consoles, &token, 6, wish(protocol, kind)).await.expect(400);
    }
    let made = test.post_at(&consoles, &token, 6, wish("serial", "serial")).await.expect(200);
    let url = made["remote_console"]["url"].as_str().unwrap().to_owned();
    assert!(
        url.starts_with(&format!("ws{}/mote/v1/serial-console?token=", public.trim_start_matches("http"))),
        "{url}"
    );
    let old = json!({"os-getSerialConsole": {"type": "serial"}});
    let action = format!("/compute/v2.1/servers/{id}/action");
    let made = test.post(&action, &token, old.clone()).await.expect(200);
    assert!(made["console"]["url"].as_str().is_some_and(|other| other.starts_with("ws://") && *other != url));
    test.post_at(&action, &token, 6, old).await.expect(404);

    let talk = async {
        let mut request = url.as_str().into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", "binary, base64".parse().unwrap());
        let (mut socket, answer) = connect_async(request).await.unwrap();
        assert_eq!(answer.headers()["sec-websocket-protocol"], "binary");
        // The first answer says where the output ends: only what comes after it is shown.
        assert!(matches!(socket.next().await.unwrap().unwrap(), Message::Ping(_)));
        for (typed, said) in [("hello\r", "HELLO\r"), ("\u{1}\u{0}x", "\u{1}\u{0}X"), ("reboot", "BOOTED")] {
            socket.send(Message::binary(typed.as_bytes().to_vec())).await.unwrap();
            let mut heard = Vec::new();
            while heard.len() < said.len() {
                if let Message::Binary(bytes) = socket.next().await.unwrap().unwrap() {
                    heard.extend_from_slice(&bytes);
                }
            }
            assert_eq!(String::from_utf8(heard).unwrap(), said);
        }
        socket.close(None).await.unwrap();
    };
    tokio::select! {
        () = echoing(&test, &host) => unreachable!("it never ends"),
        () = talk => {}
    }
    let base = url.split("token=").next().unwrap();
    assert_eq!(refused(&format!("{base}token=none")).await, 401);
    assert_eq!(refused(base.trim_end_matches('?')).await, 401);
    let token_of_url = url.rsplit('=').next().unwrap();
    let shown = format!("/compute/v2.1/os-console-auth-tokens/{token_of_url}");
    let found = test.get_at(&shown, &test.admin_token, 31).await.expect(200);
    assert_eq!((&found["console"]["instance_uuid"], &found["console"]["host"]), (&json!(id), &json!("h1")));
    sqlx::query("UPDATE console_tokens SET expires_us = 1").execute(&test.app.db).await.unwrap();
    assert_eq!(refused(&url).await, 401);
    test.get_at(&shown, &test.admin_token, 31).await.expect(404);
    serving.abort();
}
