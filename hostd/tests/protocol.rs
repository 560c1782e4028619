//! The host protocol against a tiny controller on loopback.
#![expect(clippy::unwrap_used, reason = "tests: what goes wrong shall stop them")]

mod common;

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use common::{PATIENCE, Script};
use mote_host_api::{
    CloudId, DesiredState, HostId, HostRequest, HostRequestKind, JoinResponse, ObservedState, RequestId,
    ServerId,
};
use mote_hostd::{
    agent::Snapshot,
    connection::{Connection, ConnectionStatus},
    controller::HttpController,
    identity::{self, Identity, IdentityError, Join},
    image_cache::{FetchError, ImageCache, ImageSource},
    inventory,
    parts::{ImageError, Images},
    paths::StateDir,
    requests::Requests,
    sim::{World, server_spec},
};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, sync::watch};

fn identity(url: &str) -> Identity {
    Identity {
        cloud_id: CloudId::new(),
        host_id: HostId::new(),
        name: "h".into(),
        availability_zone: "nova".into(),
        url: url.to_owned(),
        secret: "s1".into(),
    }
}

fn desired(identity: &Identity, generation: u64) -> DesiredState {
    DesiredState {
        cloud_id: identity.cloud_id,
        host_id: identity.host_id,
        generation,
        networks: vec![],
        servers: vec![server_spec(&[])],
        ..DesiredState::default()
    }
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn connection(dir: &tempfile::TempDir, identity: &Identity) -> Arc<Connection> {
    let identity = watch::Sender::new(identity.clone());
    Arc::new(Connection {
        controller: Arc::new(HttpController::new(identity.subscribe()).unwrap()),
        state: StateDir::new(dir.path()),
        identity,
        status: watch::Sender::new(ConnectionStatus::unknown(jiff::Timestamp::now())),
        desired: watch::Sender::new(None),
        meter: World::new(dir.path()).unwrap().meter(),
    })
}

async fn generation(connection: &Connection, generation: u64) {
    let mut desired = connection.desired.subscribe();
    let is_so = |d: &Option<Arc<DesiredState>>| d.as_ref().is_some_and(|d| d.generation == generation);
    tokio::time::timeout(PATIENCE, desired.wait_for(is_so)).await.expect("in time").expect("alive");
}

#[tokio::test]
async fn joining_stores_a_private_identity_and_joining_again_keeps_the_host() {
    let (script, url) = Script::start().await;
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path().join("new"));
    let join = |name: Option<&str>| Join {
        url: &url,
        token: "t",
        name: name.map(str::to_owned),
        zone: "z1",
        state: &state,
    };
    let mut answer = JoinResponse { cloud_id: CloudId::new(), host_id: HostId::new(), secret: "s1".into() };
    script.say("POST /mote/v1/hosts", 201, json(&answer));
    let first = identity::join(join(Some("host-a"))).await.unwrap();
    let mode = std::fs::metadata(state.identity()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let asked: mote_host_api::JoinRequest =
        serde_json::from_slice(&script.call("POST", 0).await.body).unwrap();
    assert_eq!(
        (asked.token.as_str(), asked.name.as_str(), asked.availability_zone.as_str()),
        ("t", "host-a", "z1")
    );
    assert!(asked.inventory.vcpus > 0);

    answer.secret = "s2".into();
    script.say("POST /mote/v1/hosts", 201, json(&answer));
    let again = identity::join(join(None)).await.unwrap();
    assert_eq!((again.host_id, again.name.as_str(), again.secret.as_str()), (first.host_id, "host-a", "s2"));
    assert_eq!(identity::load(&state).unwrap(), again);

    script.say(
        "POST /mote/v1/hosts",
        401,
        br#"{"error": {"code": 401, "message": "The join token is wrong."}}"#,
    );
    let refused = identity::join(join(None)).await.unwrap_err();
    assert_eq!(
        mote_hostd::errors::one_line(&refused),
        "cannot join: the controller does not take this join token: it is wrong, expired or used up; make a new one with `mote host join-token`"
    );
    assert_eq!(identity::load(&state).unwrap(), again, "nothing has changed");

    // Another cloud: not while servers of the first are here, but then.
    answer.cloud_id = CloudId::new();
    std::fs::create_dir_all(state.servers().join(ServerId::new().to_string())).unwrap();
    std::fs::write(state.desired(), "{}").unwrap();
    script.say("POST /mote/v1/hosts", 201, json(&answer));
    assert!(matches!(identity::join(join(None)).await, Err(IdentityError::OtherCloud { .. })));
    std::fs::remove_dir_all(state.servers()).unwrap();
    script.say("POST /mote/v1/hosts", 201, json(&answer));
    assert_eq!(identity::join(join(None)).await.unwrap().cloud_id, answer.cloud_id);
    assert!(!state.desired().exists(), "what the old cloud wanted is forgotten");
}

#[tokio::test]
async fn nobody_there_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path());
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let join = Join { url: &url, token: "t", name: Some("h".into()), zone: "nova", state: &state };
    let error = identity::join(join).await.unwrap_err();
    let text = mote_hostd::errors::one_line(&error);
    assert!(
        text.starts_with("cannot join: no answer from the controller") && text.contains("refused"),
        "{text}"
    );
    assert!(matches!(identity::load(&state), Err(IdentityError::NotJoined(_))));
}

#[tokio::test]
async fn desired_state_is_followed_and_only_a_complete_one_of_ours_is_acted_upon() {
    let (script, url) = Script::start().await;
    let dir = tempfile::tempdir().unwrap();
    let us = identity(&url);
    let connection = connection(&dir, &us);
    let following = tokio::spawn({
        let connection = connection.clone();
        async move { connection.follow_desired().await }
    });
    let part = "/desired";
    let first = script.call(part, 0).await;
    assert_eq!(first.line, format!("GET /mote/v1/hosts/{}/desired?after=0&wait=0", us.host_id));
    assert_eq!(first.token, "Bearer s1");
    script.say(part, 204, "");
    assert!(script.call(part, 1).await.line.ends_with("after=0&wait=30"));
    script.say(part, 200, json(&desired(&us, 7)));
    generation(&connection, 7).await;
    assert!(script.call(part, 2).await.line.ends_with("after=7&wait=30"));
    script.say(part, 204, "");

    // None of these may change anything.
    script.call(part, 3).await;
    let whole = json(&desired(&us, 8));
    let foreign = json(&DesiredState { cloud_id: CloudId::new(), ..desired(&us, 8) });
    let without_servers = format!(
        r#"{{"cloud_id":"{}","host_id":"{}","generation":8,"networks":[]}}"#,
        us.cloud_id, us.host_id
    );
    script.say(part, 200, &whole[..whole.len() - 2]);
    script.say(part, 200, without_servers);
    script.say(part, 200, "{}");
    script.say(part, 500, "oops");
    script.say(part, 200, foreign);
    script.call(part, 8).await;
    assert_eq!(connection.desired.borrow().as_ref().unwrap().generation, 7);
    assert!(!connection.status.borrow().connected);
    assert!(connection.status.borrow().error.is_some());

    // After trouble all is asked for anew, and a smaller generation (a restored database) counts.
    script.say(part, 200, json(&desired(&us, 3)));
    generation(&connection, 3).await;
    assert!(script.call(part, 9).await.line.ends_with("after=3&wait=30"));
    assert!(connection.status.borrow().connected);
    following.abort();

    // A new process starts from what this one was told last.
    let next = self::connection(&dir, &us);
    next.recall();
    assert_eq!(next.desired.borrow().as_ref().unwrap().generation, 3);
    let other = self::connection(&dir, &identity(&url));
    other.recall();
    assert!(other.desired.borrow().is_none(), "not for another identity");
}

#[tokio::test]
async fn reports_are_sent_at_once_after_a_change_and_a_new_secret_is_taken_up() {
    let (script, url) = Script::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut us = identity(&url);
    let connection = connection(&dir, &us);
    let snapshots = watch::Sender::new(Snapshot::default());
    let (_inventory, inventory) = watch::channel(inventory::inventory(dir.path()).unwrap());
    let (conversation, receiver) = (connection.clone(), snapshots.subscribe());
    let reporting = tokio::spawn(async move { conversation.report(receiver, inventory).await });
    let part = "/observed";
    script.say(part, 204, "");
    let first = script.call(part, 0).await;
    assert_eq!(first.line, format!("PUT /mote/v1/hosts/{}/observed", us.host_id));
    snapshots.send_modify(|s| s.applied_generation = 4);
    let observed: ObservedState = serde_json::from_slice(&script.call(part, 1).await.body).unwrap();
    assert_eq!((observed.applied_generation, observed.host_id), (4, us.host_id));

    us.secret = "s2".into();
    std::fs::write(StateDir::new(dir.path()).identity(), json(&us)).unwrap();
    script.say(part, 401, r#"{"error": {"code": 401, "message": "no"}}"#);
    assert_eq!(script.call(part, 2).await.token, "Bearer s2");
    reporting.abort();
}

#[tokio::test]
async fn questions_are_answered() {
    let (script, url) = Script::start().await;
    let dir = tempfile::tempdir().unwrap();
    let us = identity(&url);
    let connection = connection(&dir, &us);
    let requests = Requests { state: StateDir::new(dir.path()), meter: connection.meter.clone() };
    let server_id = ServerId::new();
    let server = requests.state.server(server_id);
    std::fs::create_dir_all(server.vm_run()).unwrap();
    std::fs::write(server.console_log(), "one\ntwo\n").unwrap();
    let answering = tokio::spawn({
        let connection = connection.clone();
        async move { connection.answer(Arc::new(requests)).await }
    });
    let output = |server_id| HostRequestKind::ConsoleOutput { server_id, lines: Some(1) };
    let questions = [
        HostRequest { id: RequestId::new(), kind: output(server_id) },
        HostRequest { id: RequestId::new(), kind: output(ServerId::new()) },
    ];
    script.say("GET", 200, json(&questions));
    for (question, expected) in questions.iter().zip(["two", "not on this host"]) {
        let call = script.call(&format!("requests/{}", question.id), 0).await;
        let body = String::from_utf8(call.body).unwrap();
        assert!(call.line.starts_with("POST") && body.contains(expected), "{body}");
    }
    answering.abort();
}

#[tokio::test]
async fn images_are_fetched_whole_or_not_at_all() {
    let (script, url) = Script::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (_sender, receiver) = watch::channel(identity(&url));
    let controller = Arc::new(HttpController::new(receiver).unwrap());
    let store = mote_images::Store::open(dir.path()).unwrap();
    let cache = ImageCache::new(store, controller.clone());
    let content = b"x".repeat(300_000);
    let image = mote_host_api::ImageSpec {
        sha256: hex::encode(Sha256::digest(&content)),
        size: content.len() as u64,
    };
    let part = "/images/";
    script.say(part, 404, r#"{"error": {"code": 404, "message": "gone"}}"#);
    assert!(matches!(cache.ensure(&image).await, Err(ImageError::Unknown { .. })));
    script.say(part, 503, "");
    assert!(matches!(cache.ensure(&image).await, Err(ImageError::Away { .. })));
    script.say(part, 200, &content[1..]);
    assert!(matches!(cache.ensure(&image).await, Err(ImageError::Wrong { .. })));
    script.say(part, 200, content.clone());
    let path = cache.ensure(&image).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), content);
    assert_eq!(script.call(part, 0).await.token, "Bearer s1");
    script.say(part, 404, "");
    assert!(matches!(controller.fetch(&image.sha256).await.err(), Some(FetchError::Unknown)));
}
