//! Requests of tenants and admins, as clients make them.

use http::Method;
use serde_json::{Value, json};

use crate::testing::{Answer, TestApp};

mod addresses;
mod filters;
mod hosts;
mod routing;
mod sharing;
mod upgrade;

const BASE: &str = "/network/v2.0";

/// A tenant's or the admin's view.
struct Client<'a> {
    test: &'a TestApp,
    token: String,
    project: String,
}

impl<'a> Client<'a> {
    async fn tenant(test: &'a TestApp, name: &str) -> Self {
        let (project, token) = test.tenant(name, "member").await;
        Self { test, token, project }
    }

    fn admin(test: &'a TestApp) -> Self {
        Self { test, token: test.admin_token.clone(), project: test.admin.project_id.clone() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.test.get(&format!("{BASE}/{path}"), &self.token).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.test.post(&format!("{BASE}/{path}"), &self.token, body).await
    }

    async fn put(&self, path: &str, body: Value) -> Answer {
        self.test.call(Method::PUT, &format!("{BASE}/{path}"), &self.token, body).await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.test.delete(&format!("{BASE}/{path}"), &self.token).await
    }

    async fn delete_port(&self, port: &str) -> Answer {
        self.delete(&format!("ports/{port}")).await
    }

    /// Makes a resource; gives its document.
    async fn make(&self, path: &str, kind: &str, body: Value) -> Value {
        self.post(path, json!({ kind: body })).await.expect(201)[kind].take()
    }

    async fn network(&self, name: &str) -> String {
        id(&self.make("networks", "network", json!({ "name": name })).await)
    }

    async fn subnet(&self, network: &str, cidr: &str) -> String {
        let version = if cidr.contains(':') { 6 } else { 4 };
        let body = json!({"network_id": network, "cidr": cidr, "ip_version": version});
        id(&self.make("subnets", "subnet", body).await)
    }

    async fn port(&self, network: &str, more: Value) -> Value {
        let mut body = json!({ "network_id": network });
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        self.make("ports", "port", body).await
    }

    /// The network and subnet of an admin that lead to the outside.
    async fn external(&self) -> (String, String) {
        self.external_at("public", "203.0.113.0/24").await
    }

    /// As [`Self::external`], on this physical network.
    async fn external_at(&self, physical: &str, cidr: &str) -> (String, String) {
        let body = json!({"name": physical, "router:external": true, "provider:network_type": "flat",
                          "provider:physical_network": physical});
        let network = id(&self.make("networks", "network", body).await);
        let body = json!({"network_id": network, "cidr": cidr, "ip_version": 4, "enable_dhcp": false});
        let subnet = id(&self.make("subnets", "subnet", body).await);
        (network, subnet)
    }
}

fn id(document: &Value) -> String {
    document["id"].as_str().unwrap().to_owned()
}

/// Asserts the status and the type of an error.
#[track_caller]
fn refused(answer: Answer, status: u16, kind: &str) -> String {
    let body = answer.expect(status);
    assert_eq!(body["NeutronError"]["type"], kind, "{body}");
    assert_eq!(body["NeutronError"]["detail"], "");
    body["NeutronError"]["message"].as_str().unwrap().to_owned()
}

fn ids(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(id).collect()
}
