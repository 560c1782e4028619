//! A project with one of everything, and everybody who might ask for it.

use std::collections::BTreeMap;

use axum::body::Body;
use http::{Method, Request};
use serde_json::{Value, json};

use crate::{
    hosts::fake::{FakeHost, inventory, join_body},
    testing::{Answer, TestApp},
};

/// What doesn't exist, as each service's ids look.
const NOTHING: &str = "00000000-0000-4000-8000-000000000000";
const NOTHING_HEX: &str = "00000000000040008000000000000000";

/// A user with a token in a project.
pub(super) struct Person {
    pub(super) project: String,
    pub(super) user: String,
    pub(super) token: String,
}

pub(super) struct World {
    test: TestApp,
    host: FakeHost,
    other_host: FakeHost,
    /// `member` of the project that has everything.
    pub(super) ada: Person,
    /// Tokens of the same project.
    pub(super) reader: String,
    pub(super) manager: String,
    /// `member` of another project.
    pub(super) eve: Person,
    pub(super) admin: String,
    pub(super) system_reader: String,
    pub(super) expired: String,
    /// A token to be looked at and revoked.
    subject: String,
    /// Ids by the pattern up to them.
    things: BTreeMap<String, String>,
}

impl Answer {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl World {
    pub(super) async fn new() -> Self {
        let test = TestApp::new().await;
        let admin = test.admin_token.clone();
        let (host, other_host) = (FakeHost::join(&test, "h1").await, FakeHost::join(&test, "h2").await);
        let ada = person(&test, "ada").await;
        let eve = person(&test, "eve").await;
        let reader = beside(&test, &ada.project, "rita", "reader").await;
        let manager = beside(&test, &ada.project, "manu", "manager").await;
        let role = role(&test, "reader").await;
        beside(&test, &ada.project, "sam", "reader").await;
        let sam = user(&test, "sam").await;
        let path = format!("/identity/v3/system/users/{sam}/roles/{role}");
        test.call(Method::PUT, &path, &admin, Value::Null).await.expect(204);
        let system = test.log_in("sam", "pw", json!({"system": {"all": true}})).await;
        let system_reader = system.header("x-subject-token").to_owned();
        let mut claims = crate::identity::principal_of(&test.app, &admin).await.unwrap().claims.clone();
        claims.expires_us = crate::db::now_us() - 1;
        let expired = test.app.identity.keys.tokens.seal(&claims).unwrap();
        let subject = test.token("ada", "pw", Some("ada")).await;
        let things = BTreeMap::new();
        let mut world = Self {
            test,
            host,
            other_host,
            ada,
            reader,
            manager,
            eve,
            admin,
            system_reader,
            expired,
            subject,
            things,
        };
        world.identity(&role).await;
        world.networks().await;
        world.images().await;
        world.compute().await;
        let host = world.host.id();
        world.know("/mote/v1/hosts/{id}", &host);
        // Hosts that are down are not waited for.
        let mut tx = world.test.app.begin().await.unwrap();
        sqlx::query("UPDATE hosts SET last_seen_us = 0").execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        world
    }

    fn know(&mut self, pattern: &str, id: &str) {
        self.things.insert(pattern.to_owned(), id.to_owned());
    }

    /// Makes something; gives its document.
    async fn make(&self, path: &str, token: &str, body: Value) -> Value {
        let answer = self.test.call_at(Method::POST, path, token, 90, body).await;
        assert!(answer.status.is_success(), "{path}: {} {}", answer.status, answer.text());
        answer.json()
    }

    /// One of a collection, known by its pattern.
    async fn one(&mut self, path: &str, token: &str, body: Value) -> String {
        let made = self.make(path, token, body).await;
        let inner = made.as_object().unwrap().values().next().unwrap();
        let id = made["id"].as_str().or(inner["id"].as_str()).unwrap().to_owned();
        self.know(&format!("{path}/{{id}}"), &id);
        id
    }

    async fn identity(&mut self, role: &str) {
        let (admin, token) = (self.admin.clone(), self.ada.token.clone());
        let (project, user) = (self.ada.project.clone(), self.ada.user.clone());
        self.know("{user}", &user);
        self.know("{project}", &project);
        self.know("/identity/v3/projects/{id}", &project);
        for (target, actor) in [("{target}", "{actor}"), ("{role}", "{implied}")] {
            self.know(target, if target == "{role}" { role } else { &project });
            self.know(actor, if actor == "{implied}" { role } else { &user });
        }
        self.know("/identity/v3/roles/{id}", role);
        self.one("/identity/v3/domains", &admin, json!({"domain": {"name": "elsewhere"}})).await;
        self.one("/identity/v3/groups", &admin, json!({"group": {"name": "crew"}})).await;
        let service = json!({"service": {"type": "test", "name": "test"}});
        let service = self.one("/identity/v3/services", &admin, service).await;
        let body = json!({"endpoint": {"interface": "public", "service_id": &service, "url": "http://x"}});
        let endpoint = self.one("/identity/v3/endpoints", &admin, body).await;
        self.know("{endpoint}", &endpoint);
        let body = json!({"endpoint_group": {"name": "some", "filters": {"interface": "admin"}}});
        let group = self.one("/identity/v3/OS-EP-FILTER/endpoint_groups", &admin, body).await;
        let path = format!("/identity/v3/OS-EP-FILTER/endpoint_groups/{group}/projects/{project}");
        self.test.call(Method::PUT, &path, &admin, Value::Null).await.expect(204);
        self.one("/identity/v3/regions", &admin, json!({"region": {"id": "north"}})).await;
        let body =
            json!({"registered_limits": [{"service_id": service, "resource_name": "x", "default_limit": 1}]});
        let made = self.make("/identity/v3/registered_limits", &admin, body).await;
        let id = made["registered_limits"][0]["id"].as_str().unwrap();
        self.know("/identity/v3/registered_limits/{id}", id);
        let limit =
            json!({"service_id": service, "resource_name": "x", "resource_limit": 2, "project_id": project});
        let made = self.make("/identity/v3/limits", &admin, json!({"limits": [limit]})).await;
        self.know("/identity/v3/limits/{id}", made["limits"][0]["id"].as_str().unwrap());
        let body = json!({"credential": {"type": "totp", "blob": "secret of ada"}});
        self.one("/identity/v3/credentials", &token, body).await;
        let friend = self::user(&self.test, "manu").await;
        let body = json!({"trust": {"trustor_user_id": user, "trustee_user_id": friend, "project_id": project,
            "impersonation": true, "roles": [{"id": role}]}});
        self.one("/identity/v3/OS-TRUST/trusts", &token, body).await;
        let users = format!("/identity/v3/users/{user}");
        let rule = json!([{"path": "/v2.1/servers", "method": "GET", "service": "compute"}]);
        let body = json!({"application_credential": {"name": "robot", "access_rules": rule}});
        let made = self.make(&format!("{users}/application_credentials"), &token, body).await;
        let made = &made["application_credential"];
        let pattern = "/identity/v3/users/{user}";
        let id = made["id"].as_str().unwrap();
        self.know(&format!("{pattern}/application_credentials/{{id}}"), id);
        let rule = made["access_rules"][0]["id"].as_str().unwrap();
        self.know(&format!("{pattern}/access_rules/{{id}}"), rule);
        let body = json!({"tenant_id": project});
        let made = self.make(&format!("{users}/credentials/OS-EC2"), &token, body).await;
        let access = made["credential"]["access"].as_str().unwrap();
        self.know(&format!("{pattern}/credentials/OS-EC2/{{id}}"), access);
    }

    async fn networks(&mut self) {
        let (admin, token, eve) = (self.admin.clone(), self.ada.token.clone(), self.eve.project.clone());
        let base = "/network/v2.0";
        let at = |path: &str| format!("{base}/{path}");
        let body = json!({"network": {"name": "public", "router:external": true,
            "provider:network_type": "flat", "provider:physical_network": "public"}});
        let outside = self.one(&at("networks"), &admin, body).await;
        let body = json!({"subnet": {"network_id": outside, "cidr": "203.0.113.0/24", "ip_version": 4}});
        self.one(&at("subnets"), &admin, body).await;
        let body = json!({"router": {"name": "r", "external_gateway_info": {"network_id": outside}}});
        let router = self.one(&at("routers"), &token, body).await;
        let body = json!({"floatingip": {"floating_network_id": outside}});
        let floating = self.one(&at("floatingips"), &token, body).await;
        let network = self.one(&at("networks"), &token, json!({"network": {"name": "inside"}})).await;
        let body = json!({"subnet": {"network_id": network, "cidr": "10.1.0.0/24", "ip_version": 4}});
        let subnet = self.one(&at("subnets"), &token, body).await;
        let body = json!({"subnet": {"network_id": network, "cidr": "10.3.0.0/24", "ip_version": 4}});
        let second = self.make(&at("subnets"), &token, body).await;
        self.know("second", second["subnet"]["id"].as_str().unwrap());
        let path = format!("{base}/routers/{router}/add_router_interface");
        self.test.call(Method::PUT, &path, &token, json!({"subnet_id": subnet})).await.expect(200);
        let port = self.one(&at("ports"), &token, json!({"port": {"network_id": network}})).await;
        let address = self.test.get(&format!("{base}/ports/{port}"), &token).await.expect(200);
        let ip = address["port"]["fixed_ips"][0]["ip_address"].as_str().unwrap().to_owned();
        self.know("address", &ip);
        let body = json!({"port_forwarding": {"internal_port_id": port, "internal_port": 80, "external_port": 80,
            "internal_ip_address": ip, "protocol": "tcp"}});
        let made = self.make(&format!("{base}/floatingips/{floating}/port_forwardings"), &token, body).await;
        let id = made["port_forwarding"]["id"].as_str().unwrap();
        self.know(&at("floatingips/{parent}"), &floating);
        self.know(&at("floatingips/{parent}/port_forwardings/{id}"), id);
        let group = self.one(&at("security-groups"), &token, json!({"security_group": {"name": "g"}})).await;
        let body = json!({"security_group_rule": {"security_group_id": group, "direction": "ingress"}});
        self.one(&at("security-group-rules"), &token, body).await;
        let body = json!({"subnetpool": {"name": "p", "prefixes": ["10.9.0.0/16"], "default_prefixlen": 24}});
        self.one(&at("subnetpools"), &token, body).await;
        let body = json!({"address_group": {"name": "a", "addresses": ["10.0.0.0/8"]}});
        let group = self.one(&at("address-groups"), &token, body).await;
        // Shared with neither of the two: what is shared is not secret.
        let body = json!({"rbac_policy": {"object_type": "address_group", "object_id": group,
            "action": "access_as_shared", "target_tenant": "somebody"}});
        self.one(&at("rbac-policies"), &token, body).await;
        let body = json!({"policy": {"name": "q", "project_id": self.ada.project}});
        let policy = self.one(&at("qos/policies"), &admin, body).await;
        let parent = at("qos/policies/{parent}");
        self.know(&parent, &policy);
        for (kind, rules, body) in [
            ("bandwidth_limit_rule", "bandwidth_limit_rules", json!({"max_kbps": 1000})),
            ("dscp_marking_rule", "dscp_marking_rules", json!({"dscp_mark": 26})),
        ] {
            let path = format!("{base}/qos/policies/{policy}/{rules}");
            let made = self.make(&path, &admin, json!({ kind: body })).await;
            self.know(&format!("{parent}/{rules}/{{id}}"), made[kind]["id"].as_str().unwrap());
        }
        self.know(&at("agents/{id}"), &self.host.id());
        self.know(&at("network-ip-availabilities/{id}"), &network);
        self.know("{network}", "inside");
        let of = [
            ("network", network),
            ("subnet", subnet),
            ("router", router),
            ("eve", eve),
            ("outside", outside),
        ];
        for (name, id) in of {
            self.know(name, &id);
        }
        for path in [
            "address-groups",
            "floatingips",
            "networks",
            "ports",
            "qos/policies",
            "routers",
            "security-groups",
            "subnetpools",
            "subnets",
        ] {
            let id = self.things[&at(&format!("{path}/{{id}}"))].clone();
            let path = format!("{base}/{path}/{id}/tags/t");
            assert!(
                self.test.call(Method::PUT, &path, &token, Value::Null).await.status.is_success(),
                "{path}"
            );
        }
    }

    async fn images(&mut self) {
        let token = self.ada.token.clone();
        let images = "/image/v2/images";
        let body = json!({"name": "disk", "disk_format": "raw", "container_format": "bare"});
        let image = self.one(images, &token, body).await;
        let bytes = || Body::from(vec![7_u8; 4096]);
        for action in ["stage"] {
            let request = Request::put(format!("{images}/{image}/{action}"))
                .header("x-auth-token", &token)
                .header("content-type", "application/octet-stream");
            self.test.send(request.body(bytes()).unwrap()).await.expect(204);
        }
        let body = json!({"method": {"name": "glance-direct"}});
        self.test.post(&format!("{images}/{image}/import"), &token, body).await.expect(202);
        loop {
            let shown = self.test.get(&format!("{images}/{image}"), &token).await.expect(200);
            if shown["status"] == "active" {
                break;
            }
            assert_ne!(shown["status"], "killed", "{shown}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let tasks = self.test.get("/image/v2/tasks", &token).await.expect(200);
        self.know("/image/v2/tasks/{id}", tasks["tasks"][0]["id"].as_str().unwrap());
        self.make(&format!("{images}/{image}/members"), &token, json!({"member": "somebody"})).await;
        self.know("{member}", "somebody");
        let path = format!("{images}/{image}/tags/t");
        self.test.call(Method::PUT, &path, &token, Value::Null).await.expect(204);
        self.know("image", &image);
        self.metadefs().await;
    }

    /// A namespace that is the project's own.
    async fn metadefs(&mut self) {
        let admin = self.admin.clone();
        let name = "Secret::Definitions::Of::Ada";
        let property = json!({"title": "t", "type": "string"});
        let body = json!({"namespace": name, "owner": self.ada.project, "properties": {"colour": property},
            "objects": [{"name": "paint"}], "tags": [{"name": "t"}],
            "resource_type_associations": [{"name": "OS::Glance::Image"}]});
        self.make("/image/v2/metadefs/namespaces", &admin, body).await;
        for (pattern, name) in [
            ("{namespace}", name),
            ("{object}", "paint"),
            ("{property}", "colour"),
            ("{resource_type}", "OS::Glance::Image"),
        ] {
            self.know(pattern, name);
        }
    }

    async fn compute(&mut self) {
        let (admin, token) = (self.admin.clone(), self.ada.token.clone());
        let base = "/compute/v2.1";
        let body = json!({"server": {"name": "web", "imageRef": self.things["image"], "flavorRef": "1",
            "networks": [{"uuid": self.things["network"]}], "metadata": {"k": "v"}, "tags": ["t"]}});
        let server = self.one(&format!("{base}/servers"), &token, body).await;
        self.host.settle(&self.test).await;
        self.other_host.settle(&self.test).await;
        let pattern = format!("{base}/servers/{{id}}");
        let ports = self.test.get(&format!("{base}/servers/{server}/os-interface"), &token).await.expect(200);
        let port = ports["interfaceAttachments"][0]["port_id"].as_str().unwrap();
        self.know(&format!("{pattern}/os-interface/{{port}}"), port);
        let path = format!("{base}/servers/{server}/os-instance-actions");
        let actions = self.test.get(&path, &token).await.expect(200);
        let request = actions["instanceActions"][0]["request_id"].as_str().unwrap();
        self.know("{request}", request);
        for part in ["{key}", "{tag}"] {
            self.know(part, &part[1..2]);
        }
        self.know("/mote/v1/servers/{id}", &server);
        let body = json!({"server_group": {"name": "g", "policy": "affinity"}});
        self.one(&format!("{base}/os-server-groups"), &token, body).await;
        let body = json!({"keypair": {"name": "ada-s", "public_key": KEY}});
        self.make(&format!("{base}/os-keypairs"), &token, body).await;
        self.know("{name}", "ada-s");
        let body = json!({"flavor": {"name": "own", "vcpus": 1, "ram": 64, "disk": 0, "id": "own",
            "os-flavor-access:is_public": false}});
        self.one(&format!("{base}/flavors"), &admin, body).await;
        let path = format!("{base}/flavors/own/os-extra_specs");
        self.make(&path, &admin, json!({"extra_specs": {"k": "v"}})).await;
        self.know(&format!("{base}/os-hypervisors/{{id}}"), &self.host.id());
        self.know("{pattern}", "h1");
        self.know("{migration}", "1");
        self.know("{token}", NOTHING_HEX);
        let body = json!({"aggregate": {"name": "fast"}});
        let made = self.make(&format!("{base}/os-aggregates"), &admin, body).await;
        self.know(&format!("{base}/os-aggregates/{{id}}"), &made["aggregate"]["id"].to_string());
        let image = self.things["image"].clone();
        self.know(&format!("{base}/images/{{id}}"), &image);
        self.know("{action}", "reactivate");
    }

    /// The pattern with its things, of which those from `nothing` on don't exist; `user` is whose they are.
    fn fill(&self, pattern: &str, user: &str, nothing: usize) -> String {
        let (mut known, mut path, mut index) = (String::new(), String::new(), 0);
        for segment in pattern.split('/').skip(1) {
            known = format!("{known}/{segment}");
            let value = match segment {
                "{kinds}" => "projects",
                "{actors}" => "users",
                named if named.starts_with('{') => {
                    let thing = self.things.get(&known).or_else(|| self.things.get(named));
                    let thing = constant(pattern, named).or(thing.map(String::as_str));
                    let thing = thing.unwrap_or_else(|| panic!("there is no example for {pattern}"));
                    index += 1;
                    match index > nothing && !matches!(named, "{key}" | "{tag}") {
                        true if pattern.starts_with("/identity") || named == "{project}" => NOTHING_HEX,
                        true => NOTHING,
                        false if named == "{user}" => user,
                        false => thing,
                    }
                }
                segment => segment,
            };
            path = format!("{path}/{value}");
        }
        if pattern == "/" { "/".into() } else { path }
    }

    /// A pattern with what the project has.
    pub(super) fn path(&self, pattern: &str) -> String {
        self.fill(pattern, &self.ada.user, usize::MAX)
    }

    /// A pattern with what doesn't exist.
    pub(super) fn path_to_nothing(&self, pattern: &str) -> String {
        self.fill(pattern, &self.ada.user, 0)
    }

    /// Paths to what the other project must not tell from what doesn't exist, each with one to that.
    pub(super) fn hidden(&self, pattern: &str) -> Vec<(String, String)> {
        let mut paths = vec![(self.path(pattern), self.path_to_nothing(pattern))];
        if pattern.contains("/{user}/") && pattern.matches('{').count() == 2 && !pattern.contains("/groups/")
        {
            // What is somebody else's, below oneself.
            let eve = &self.eve.user;
            paths.push((self.fill(pattern, eve, usize::MAX), self.fill(pattern, eve, 1)));
        }
        paths
    }

    /// What nobody else may see.
    pub(super) fn secrets(&self) -> Vec<String> {
        let shared = [
            "eve",
            "outside",
            "{role}",
            "{implied}",
            "{endpoint}",
            "/identity/v3/roles/{id}",
            "/identity/v3/regions/{id}",
        ];
        let of = |(pattern, _): &(&String, &String)| {
            !shared.contains(&pattern.as_str())
                && !["roles", "services", "endpoints", "registered_limits"]
                    .iter()
                    .any(|kind| pattern.contains(&format!("/v3/{kind}/")))
        };
        // Words of a few letters are no ids.
        let mut secrets: Vec<String> =
            self.things.iter().filter(of).map(|(_, id)| id.clone()).filter(|id| id.len() > 20).collect();
        let agents = [self.host.id(), self.other_host.id()];
        secrets.retain(|id| !agents.contains(id));
        secrets
    }

    /// A text in which all ids are the same.
    pub(super) fn without_ids(&self, text: &str) -> String {
        let ids = self.things.values().map(String::as_str).filter(|id| id.len() > 4);
        let text =
            ids.chain([NOTHING, NOTHING_HEX, "own"]).fold(text.to_owned(), |text, id| text.replace(id, "ID"));
        match text.find("req-") {
            Some(at) => text[..at].to_owned(),
            None => text,
        }
    }

    /// A request with a fitting body.
    pub(super) async fn ask(&self, method: &str, pattern: &str, path: &str, token: &str) -> Answer {
        let body = self.bodies(method, pattern).remove(0);
        self.send(method, pattern, path, token, body).await
    }

    pub(super) async fn send(
        &self,
        method: &str,
        pattern: &str,
        path: &str,
        token: &str,
        body: Value,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            let host = pattern.starts_with("/mote/v1/hosts/{id}/");
            request = match host {
                true => request.header("authorization", format!("Bearer {token}")),
                false => request.header("x-auth-token", token).header("x-subject-token", &self.subject),
            };
        }
        if pattern.starts_with("/compute") {
            request = request.header("openstack-api-version", "compute 2.90");
        }
        let kind = match pattern {
            "/image/v2/images/{id}" => "application/openstack-images-v2.1-json-patch",
            _ if octets(pattern) => "application/octet-stream",
            _ => "application/json",
        };
        let body = match (method, body) {
            ("GET" | "DELETE", _) | (_, Value::Null) => Body::empty(),
            (_, Value::String(bytes)) => Body::from(bytes),
            (_, body) => Body::from(body.to_string()),
        };
        self.test.send(request.header("content-type", kind).body(body).unwrap()).await
    }

    /// By another host than that of the path.
    pub(super) async fn ask_as_host(&self, method: &str, pattern: &str) -> Answer {
        self.ask(method, pattern, &self.path(pattern), &self.other_host.joined.secret).await
    }

    /// Bodies that are right.
    pub(super) fn bodies(&self, method: &str, pattern: &str) -> Vec<Value> {
        if method == "GET" || method == "DELETE" {
            return vec![Value::Null];
        }
        if octets(pattern) {
            return vec!["bytes".into()];
        }
        if let Some(path) = pattern.strip_prefix("/network/v2.0/") {
            return vec![self.network_body(method, path)];
        }
        if pattern == "/compute/v2.1/servers/{id}/action" {
            return actions(&self.things["image"]);
        }
        let body = match (method, pattern) {
            ("POST", "/compute/v2.1/servers") => json!({"server": {"name": "x", "flavorRef": "1",
                "imageRef": self.things["image"], "networks": [{"uuid": self.things["network"]}]}}),
            (_, "/compute/v2.1/servers/{id}") => json!({"server": {"name": "x"}}),
            (_, "/compute/v2.1/servers/{id}/remote-consoles") => {
                json!({"remote_console": {"protocol": "serial", "type": "serial"}})
            }
            (_, "/compute/v2.1/servers/{id}/metadata") => json!({"metadata": {"k": "w"}}),
            (_, "/compute/v2.1/servers/{id}/metadata/{key}") => json!({"meta": {"k": "w"}}),
            (_, "/compute/v2.1/servers/{id}/os-interface") => {
                json!({"interfaceAttachment": {"net_id": self.things["network"]}})
            }
            (_, "/compute/v2.1/servers/{id}/tags") => json!({"tags": ["t"]}),
            (_, "/compute/v2.1/servers/{id}/tags/{tag}") | (_, "/image/v2/images/{id}/tags/{tag}") => {
                Value::Null
            }
            (_, "/compute/v2.1/os-server-groups") => {
                json!({"server_group": {"name": "h", "policy": "affinity"}})
            }
            (_, "/compute/v2.1/os-keypairs") => json!({"keypair": {"name": "n", "public_key": KEY}}),
            ("POST", "/image/v2/images") => json!({"name": "x"}),
            (_, "/image/v2/images/{id}") => json!([{"op": "replace", "path": "/name", "value": "y"}]),
            (_, "/image/v2/images/{id}/import") => json!({"method": {"name": "glance-direct"}}),
            (_, "/image/v2/images/{id}/members") => json!({"member": "another"}),
            (_, "/image/v2/images/{id}/members/{member}") => json!({"status": "accepted"}),
            (_, "/identity/v3/projects/{id}/tags") => json!({"tags": []}),
            (_, "/identity/v3/users/{user}/application_credentials") => {
                json!({"application_credential": {"name": "n"}})
            }
            ("PATCH", "/identity/v3/credentials/{id}") => json!({"credential": {}}),
            (_, "/mote/v1/servers/{id}/console") => json!({"data": "aGkK"}),
            (_, "/mote/v1/hosts") => join_body("rubbish", "h3"),
            (_, "/mote/v1/hosts/{id}/observed") => json!({"host_id": self.host.id(), "servers": [],
                "inventory": inventory(), "applied_generation": 1}),
            (_, "/mote/v1/hosts/{id}/requests/{request_id}") => json!({"reply": "done"}),
            _ => json!({}),
        };
        vec![body]
    }

    fn network_body(&self, method: &str, path: &str) -> Value {
        let thing = |name: &str| self.things[name].as_str();
        let one = |path: &str| self.things[&format!("/network/v2.0/{path}/{{id}}")].clone();
        match path {
            _ if path.ends_with("/tags") => return json!({"tags": ["t"]}),
            _ if path.ends_with("/tags/{tag}") => return Value::Null,
            "routers/{id}/add_router_interface" => return json!({"subnet_id": thing("second")}),
            "routers/{id}/remove_router_interface" => return json!({"subnet_id": thing("subnet")}),
            "routers/{id}/add_external_gateways"
            | "routers/{id}/update_external_gateways"
            | "routers/{id}/remove_external_gateways" => return json!({"router": {}}),
            "routers/{id}/add_extraroutes" | "routers/{id}/remove_extraroutes" => {
                return json!({"router": {"routes": []}});
            }
            "address-groups/{id}/add_addresses" => return json!({"addresses": ["192.0.2.0/24"]}),
            "address-groups/{id}/remove_addresses" => return json!({"addresses": ["10.0.0.0/8"]}),
            _ => {}
        }
        let collection = path.trim_end_matches("/{id}").rsplit('/').next().unwrap();
        let kind = match collection {
            "policies" => "policy".to_owned(),
            "rbac-policies" => "rbac_policy".to_owned(),
            other => other.trim_end_matches('s').replace('-', "_"),
        };
        let creates = method == "POST";
        let fields = match collection {
            "networks" | "routers" | "security-groups" => json!({"name": "n"}),
            "ports" if creates => json!({"network_id": thing("network")}),
            "subnets" if creates => {
                json!({"network_id": thing("network"), "cidr": "10.2.0.0/24", "ip_version": 4})
            }
            "floatingips" if creates => json!({"floating_network_id": thing("outside")}),
            "security-group-rules" if creates => {
                json!({"security_group_id": one("security-groups"), "direction": "egress"})
            }
            "subnetpools" if creates => json!({"name": "n", "prefixes": ["10.8.0.0/16"]}),
            "rbac-policies" if creates => json!({"object_type": "address_group", "target_tenant": "another",
                "object_id": one("address-groups"), "action": "access_as_shared"}),
            "rbac-policies" => json!({"target_tenant": "third"}),
            "port_forwardings" if creates => json!({"internal_port_id": one("ports"), "internal_port": 81,
                "external_port": 81, "internal_ip_address": thing("address"), "protocol": "tcp"}),
            "port_forwardings" => json!({"external_port": 8080}),
            "bandwidth_limit_rules" => json!({"max_kbps": 2000}),
            "dscp_marking_rules" => json!({"dscp_mark": 28}),
            "floatingips" | "security-group-rules" => json!({"description": "d"}),
            _ => json!({"name": "n"}),
        };
        json!({ kind: fields })
    }
}

/// What isn't a thing of anybody's.
fn constant(pattern: &str, named: &str) -> Option<&'static str> {
    match (pattern.split('/').nth(1)?, named) {
        ("compute", "{class}") => Some("default"),
        ("network", "{alias}") => Some("quotas"),
        ("network", "{type}") => Some("dscp_marking"),
        ("image", "{name}") => Some("image"),
        ("mote", "{sha256}") => Some("5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"),
        ("mote", "{request_id}" | "{image_id}") => Some(NOTHING),
        _ => None,
    }
}

fn octets(pattern: &str) -> bool {
    pattern.ends_with("/file") || pattern.ends_with("/stage") || pattern.contains("/captures/")
}

/// Every action, so that none looks at less than the others. The first leaves the server as it is.
fn actions(image: &str) -> Vec<Value> {
    let mut actions = vec![json!({"lock": null}), json!({"unlock": null})];
    for name in [
        "os-start",
        "os-stop",
        "pause",
        "unpause",
        "suspend",
        "resume",
        "shelve",
        "shelveOffload",
        "unshelve",
        "unrescue",
        "confirmResize",
        "revertResize",
        "forceDelete",
    ] {
        actions.push(json!({ name: null }));
    }
    actions.extend([
        json!({"reboot": {"type": "SOFT"}}),
        json!({"rebuild": {"imageRef": image}}),
        json!({"rescue": {"rescue_image_ref": image}}),
        json!({"createImage": {"name": "copy"}}),
        json!({"createBackup": {"name": "copy", "backup_type": "daily", "rotation": 1}}),
        json!({"resize": {"flavorRef": "2"}}),
        json!({"changePassword": {"adminPass": "x"}}),
        json!({"os-getConsoleOutput": {}}),
        json!({"os-getSerialConsole": {"type": "serial"}}),
        json!({"os-resetState": {"state": "active"}}),
    ]);
    actions
}

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl test";

async fn user(test: &TestApp, name: &str) -> String {
    let path = format!("/identity/v3/users?name={name}");
    let users = test.get(&path, &test.admin_token).await.expect(200);
    users["users"][0]["id"].as_str().unwrap().to_owned()
}

async fn role(test: &TestApp, name: &str) -> String {
    let path = format!("/identity/v3/roles?name={name}");
    let roles = test.get(&path, &test.admin_token).await.expect(200);
    roles["roles"][0]["id"].as_str().unwrap().to_owned()
}

async fn person(test: &TestApp, name: &str) -> Person {
    let (project, token) = test.tenant(name, "member").await;
    Person { project, token, user: user(test, name).await }
}

/// Another user with a role in a project; gives its token there.
async fn beside(test: &TestApp, project: &str, name: &str, role_name: &str) -> String {
    let admin = test.admin_token.as_str();
    let body = json!({"user": {"name": name, "password": "pw"}});
    let made = test.post("/identity/v3/users", admin, body).await.expect(201);
    let user = made["user"]["id"].as_str().unwrap();
    let role = role(test, role_name).await;
    let path = format!("/identity/v3/projects/{project}/users/{user}/roles/{role}");
    test.call(Method::PUT, &path, admin, Value::Null).await.expect(204);
    let answer = test.log_in(name, "pw", json!({"project": {"id": project}})).await;
    assert_eq!(answer.status, 201);
    answer.header("x-subject-token").to_owned()
}
