//! A client of the public API: a token, the catalog, and calls that turn every failure into one clear line.

use std::{collections::HashMap, path::Path, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::rc::Credentials;

/// How long an idle connection is kept: well below the time after which the controller closes it, so that no request meets
/// a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one call; uploads have none.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A client that has a token.
pub struct Client {
    http: reqwest::Client,
    token: String,
    endpoints: HashMap<String, String>,
    mote: String,
}

/// One of the services in the catalog.
#[derive(Debug, Clone, Copy)]
pub enum Service {
    /// Glance.
    Image,
    /// Nova.
    Compute,
    /// Neutron.
    Network,
    /// Mote's own API beside OpenStack's.
    Mote,
}

impl Client {
    /// Takes a token for the cloud that the environment or the state directory names.
    pub async fn connect(state_dir: &Path) -> anyhow::Result<Self> {
        Self::login(&Credentials::find(state_dir)?).await
    }

    /// Takes a token.
    pub async fn login(credentials: &Credentials) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build()
            .context("making an HTTP client")?;
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": credentials.username, "password": credentials.password,
                "domain": {"name": credentials.user_domain}}}},
            "scope": {"project": {"name": credentials.project, "domain": {"name": credentials.project_domain}}}}});
        let url = format!("{}/auth/tokens", credentials.auth_url);
        let answer = http.post(&url).timeout(CALL_TIMEOUT).json(&body).send().await;
        let answer =
            check(answer.with_context(|| format!("no answer from {url}"))?).await.with_context(|| {
                format!("taking a token as {} at {}", credentials.username, credentials.auth_url)
            })?;
        let token = answer
            .headers()
            .get("X-Subject-Token")
            .and_then(|v| v.to_str().ok())
            .context("the answer carries no X-Subject-Token: is this an identity service?")?
            .to_owned();
        let body: Value = answer.json().await.context("reading the token's answer")?;
        let origin = credentials.auth_url.trim_end_matches("/identity/v3");
        Ok(Self { http, token, endpoints: public_endpoints(&body), mote: format!("{origin}/mote") })
    }

    /// The full URL of a path of a service.
    fn url(&self, service: Service, path: &str) -> anyhow::Result<String> {
        let base = match service {
            Service::Mote => &self.mote,
            Service::Image => self.endpoint("image")?,
            Service::Compute => self.endpoint("compute")?,
            Service::Network => self.endpoint("network")?,
        };
        Ok(format!("{base}{path}"))
    }

    fn endpoint(&self, kind: &str) -> anyhow::Result<&String> {
        self.endpoints.get(kind).with_context(|| format!("this cloud's catalog has no {kind} service"))
    }

    /// The token, for other programs.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// A request with the token set, for calls that are not JSON in, JSON out.
    pub fn request(
        &self,
        method: Method,
        service: Service,
        path: &str,
    ) -> anyhow::Result<reqwest::RequestBuilder> {
        Ok(self.http.request(method, self.url(service, path)?).header("X-Auth-Token", &self.token))
    }

    /// Sends, and turns an error status into an error with the service's own message.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Response> {
        check(request.send().await.map_err(|e| anyhow!(e.without_url()).context("the cloud doesn't answer"))?)
            .await
    }

    async fn call(
        &self,
        method: Method,
        service: Service,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        let mut request = self.request(method, service, path)?.timeout(CALL_TIMEOUT);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let bytes = self.send(request).await?.bytes().await.context("reading the answer")?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).context("the answer is not JSON")
    }

    /// GET.
    pub async fn get(&self, service: Service, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, service, path, None).await
    }

    /// POST.
    pub async fn post(&self, service: Service, path: &str, body: Value) -> anyhow::Result<Value> {
        self.call(Method::POST, service, path, Some(body)).await
    }

    /// PUT.
    pub async fn put(&self, service: Service, path: &str, body: Value) -> anyhow::Result<Value> {
        self.call(Method::PUT, service, path, Some(body)).await
    }

    /// DELETE.
    pub async fn delete(&self, service: Service, path: &str) -> anyhow::Result<()> {
        self.call(Method::DELETE, service, path, None).await.map(drop)
    }

    /// GET that gives `None` for 404.
    pub async fn find(&self, service: Service, path: &str) -> anyhow::Result<Option<Value>> {
        let request = self.request(Method::GET, service, path)?.timeout(CALL_TIMEOUT);
        let answer =
            request.send().await.map_err(|e| anyhow!(e.without_url()).context("the cloud doesn't answer"))?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        Ok(Some(check(answer).await?.json().await.context("the answer is not JSON")?))
    }

    /// Everything of a collection (`collection` is the key in the answer).
    pub async fn list(&self, service: Service, path: &str, collection: &str) -> anyhow::Result<Vec<Value>> {
        match self.get(service, path).await?[collection].take() {
            Value::Array(rows) => Ok(rows),
            _ => bail!("the answer to {path} has no {collection:?}"),
        }
    }

    /// The one member of a collection that has this id or this name.
    pub async fn resolve(
        &self,
        service: Service,
        path: &str,
        collection: &str,
        wanted: &str,
    ) -> anyhow::Result<Value> {
        let rows = self.list(service, path, collection).await?;
        let kind = collection.trim_end_matches('s');
        if let Some(row) = rows.iter().find(|r| r["id"] == wanted) {
            return Ok(row.clone());
        }
        let mut named = rows.into_iter().filter(|r| r["name"] == wanted);
        match (named.next(), named.next()) {
            (Some(row), None) => Ok(row),
            (Some(_), Some(_)) => bail!("there are several {collection} named {wanted:?}: use an id"),
            (None, _) => bail!("no {kind} has the name or id {wanted:?} (see `mote {kind} list`)"),
        }
    }
}

fn public_endpoints(token: &Value) -> HashMap<String, String> {
    let mut endpoints = HashMap::new();
    for service in token["token"]["catalog"].as_array().into_iter().flatten() {
        let url = service["endpoints"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|e| e["interface"] == "public")
            .and_then(|e| e["url"].as_str());
        if let (Some(kind), Some(url)) = (service["type"].as_str(), url) {
            endpoints.insert(kind.to_owned(), url.trim_end_matches('/').to_owned());
        }
    }
    endpoints
}

/// Turns an error status into an error that carries what the service said.
async fn check(answer: Response) -> anyhow::Result<Response> {
    let status = answer.status();
    if !status.is_client_error() && !status.is_server_error() {
        return Ok(answer);
    }
    let body = answer.text().await.unwrap_or_default();
    Err(anyhow!("{} (HTTP {})", fault_message(&body), status.as_u16()))
}

/// The message inside any of the services' error bodies.
fn fault_message(body: &str) -> String {
    let parsed: Value = serde_json::from_str(body).unwrap_or(Value::Null);
    let nested = parsed.as_object().and_then(|o| o.values().next());
    nested
        .and_then(|v| v["message"].as_str())
        .or_else(|| parsed["message"].as_str())
        .map_or_else(|| body.trim().chars().take(500).collect(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_each_services_error_body_is_found() {
        let nova = r#"{"badRequest": {"code": 400, "message": "Can not find requested image"}}"#;
        let neutron =
            r#"{"NeutronError": {"type": "X", "message": "Network n could not be found.", "detail": ""}}"#;
        let keystone = r#"{"error": {"code": 401, "message": "The request you have made requires authentication.", "title": "Unauthorized"}}"#;
        assert_eq!(fault_message(nova), "Can not find requested image");
        assert_eq!(fault_message(neutron), "Network n could not be found.");
        assert_eq!(fault_message(keystone), "The request you have made requires authentication.");
        assert_eq!(fault_message("plain text\n"), "plain text");
    }
}
