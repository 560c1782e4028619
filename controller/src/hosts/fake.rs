//! A host that is played by a test: it speaks the protocol and does at once whatever is wanted.

use axum::body::Body;
use http::{Method, Request};
use jiff::Timestamp;
use mote_host_api::{
    DesiredPower, DesiredState, Inventory, JoinResponse, ObservedServer, ObservedState, ServerSpec,
    ServerState,
};
use serde_json::{Value, json};

use crate::testing::{Answer, TestApp};

/// What it has.
pub(crate) fn inventory() -> Inventory {
    Inventory {
        vcpus: 8,
        memory_mib: 16384,
        disk_gib: 200,
        kernel: "Linux 6.12".into(),
        version: "0.1.0".into(),
        traits: vec!["CUSTOM_KVM".into()],
        ..Inventory::default()
    }
}

pub(crate) fn join_body(token: &str, name: &str) -> Value {
    json!({"token": token, "name": name, "availability_zone": "nova", "inventory": inventory()})
}

/// A host that has joined.
pub(crate) struct FakeHost {
    /// What the controller answered.
    pub(crate) joined: JoinResponse,
}

impl FakeHost {
    pub(crate) async fn join(test: &TestApp, name: &str) -> Self {
        let made = test.post("/mote/v1/join-tokens", &test.admin_token, Value::Null).await.expect(201);
        let token = made["token"].as_str().unwrap();
        let answer = test.post("/mote/v1/hosts", "", join_body(token, name)).await.expect(201);
        Self { joined: serde_json::from_value(answer).unwrap() }
    }

    pub(crate) fn id(&self) -> String {
        self.joined.host_id.to_string()
    }

    pub(crate) async fn call(&self, test: &TestApp, method: Method, path: &str, body: Value) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(format!("/mote/v1/hosts/{}/{path}", self.id()))
            .header("authorization", format!("Bearer {}", self.joined.secret))
            .header("content-type", "application/json");
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        test.send(request.body(body).unwrap()).await
    }

    pub(crate) async fn desired(&self, test: &TestApp, after: u64) -> DesiredState {
        let answer =
            self.call(test, Method::GET, &format!("desired?after={after}&wait=30"), Value::Null).await;
        serde_json::from_value(answer.expect(200)).unwrap()
    }

    pub(crate) async fn report(
        &self,
        test: &TestApp,
        applied_generation: u64,
        servers: Vec<ObservedServer>,
    ) -> Answer {
        let host_id = self.joined.host_id;
        let inventory = inventory();
        let observed = ObservedState { host_id, inventory, applied_generation, servers, traffic: vec![] };
        self.call(test, Method::PUT, "observed", serde_json::to_value(observed).unwrap()).await
    }

    /// Carries out all that is wanted, and reports it.
    pub(crate) async fn settle(&self, test: &TestApp) {
        let desired = self.desired(test, 0).await;
        let servers = desired.servers.iter().map(as_wanted).collect();
        self.report(test, desired.generation, servers).await.expect(204);
    }
}

/// A server exactly as it is wanted.
pub(crate) fn as_wanted(spec: &ServerSpec) -> ObservedServer {
    let state = match spec.power {
        DesiredPower::Running => ServerState::Running,
        DesiredPower::Paused => ServerState::Paused,
        DesiredPower::Stopped => ServerState::Stopped,
        DesiredPower::Suspended => ServerState::Suspended,
    };
    ObservedServer {
        id: spec.id,
        state,
        run_generation: spec.run_generation,
        disks: [Some(spec.disk.number), spec.kept_disk]
            .into_iter()
            .flatten()
            .chain(spec.local_disks.iter().map(|disk| disk.number))
            .chain(spec.kept_local_disks.iter().copied())
            .collect(),
        ports: (spec.power == DesiredPower::Running).then(|| spec.ports.iter().copied().collect()),
        since: Timestamp::UNIX_EPOCH,
        message: None,
        given_up: Vec::new(),
    }
}
