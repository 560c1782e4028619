//! A whole controller in a temporary directory, asked in process: for the tests of the handlers.

use axum::{Router, body::Body};
use http::{HeaderMap, Method, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

mod postgres;

use crate::{
    app::{self, App},
    config::Config,
    db,
    identity::bootstrap::{Credentials, bootstrap},
};

/// Largest answer that a test reads.
const MAX_ANSWER: usize = 64 << 20;

/// A controller with its administrator.
pub(crate) struct TestApp {
    pub app: App,
    pub router: Router,
    pub admin: Credentials,
    /// Token of the administrator in the project `admin`.
    pub admin_token: String,
    dir: std::sync::Arc<tempfile::TempDir>,
}

/// A PostgreSQL server for tests: tests named below ask it for a database each. See [`postgres`].
pub(crate) const POSTGRES_VARIABLE: &str = "MOTE_TEST_POSTGRES";

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    /// The body as JSON; `null` if it is empty.
    pub fn json(&self) -> Value {
        if self.bytes.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.bytes).unwrap()
    }

    /// Asserts the status, and gives the JSON.
    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        assert_eq!(self.status.as_u16(), status, "{text}");
        self.json()
    }

    /// A header as text, empty if absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }
}

impl TestApp {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// One whose database was made by a version that had the migrations before this one, with what these statements
    /// make.
    pub async fn from_before(migration: i64, made: &[&'static str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let database = postgres::empty().await;
        db::make_old(dir.path(), database.as_deref(), migration, made).await;
        Self::open(dir, database, |_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::open(tempfile::tempdir().unwrap(), postgres::database().await, change).await
    }

    async fn open(
        dir: tempfile::TempDir,
        database: Option<String>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let listen = ([127, 0, 0, 1], 8774).into();
        let mut config = Config::new(listen, dir.path().to_owned(), "http://cloud.test:8774").unwrap();
        config.database = database;
        change(&mut config);
        let app = App::open(config).await.unwrap();
        let admin = bootstrap(&app, Some("adminpw".into()), false).await.unwrap();
        let router = app::router(app.clone());
        let mut test = Self { app, router, admin, admin_token: String::new(), dir: std::sync::Arc::new(dir) };
        test.admin_token = test.token("admin", "adminpw", Some("admin")).await;
        test
    }

    /// Another controller beside this one.
    pub fn beside(&self, app: App, router: Router) -> Self {
        let (admin, admin_token, dir) = (self.admin.clone(), self.admin_token.clone(), self.dir.clone());
        Self { app, router, admin, admin_token, dir }
    }

    /// The state directory.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, MAX_ANSWER).await.unwrap().to_vec();
        Answer { status: head.status, headers: head.headers, bytes }
    }

    /// A request with a token (none if empty) and a JSON body (none if `null`).
    pub async fn call(&self, method: Method, path: &str, token: &str, body: Value) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("x-auth-token", token);
        }
        let request = match body {
            Value::Null => request.body(Body::empty()),
            body => request.header("content-type", "application/json").body(Body::from(body.to_string())),
        };
        self.send(request.unwrap()).await
    }

    pub async fn get(&self, path: &str, token: &str) -> Answer {
        self.call(Method::GET, path, token, Value::Null).await
    }

    pub async fn post(&self, path: &str, token: &str, body: Value) -> Answer {
        self.call(Method::POST, path, token, body).await
    }

    pub async fn delete(&self, path: &str, token: &str) -> Answer {
        self.call(Method::DELETE, path, token, Value::Null).await
    }

    /// Asks for a token by password.
    pub async fn log_in(&self, user: &str, password: &str, scope: Value) -> Answer {
        let user = json!({"name": user, "domain": {"id": "default"}, "password": password});
        let mut auth = json!({"identity": {"methods": ["password"], "password": {"user": user}}});
        if !scope.is_null() {
            auth["scope"] = scope;
        }
        self.post("/identity/v3/auth/tokens", "", json!({ "auth": auth })).await
    }

    /// A token in a project of the default domain, or an unscoped one.
    pub async fn token(&self, user: &str, password: &str, project: Option<&str>) -> String {
        let scope = match project {
            Some(name) => json!({"project": {"name": name, "domain": {"id": "default"}}}),
            None => json!("unscoped"),
        };
        let answer = self.log_in(user, password, scope).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", String::from_utf8_lossy(&answer.bytes));
        answer.header("x-subject-token").to_owned()
    }

    /// A new project with a new user of the same name, whose password is "pw"; gives the project's id and a token.
    pub async fn tenant(&self, name: &str, role: &str) -> (String, String) {
        let admin = self.admin_token.as_str();
        let project =
            self.post("/identity/v3/projects", admin, json!({"project": {"name": name}})).await.expect(201);
        let project = project["project"]["id"].as_str().unwrap().to_owned();
        let user = json!({"user": {"name": name, "password": "pw"}});
        let user = self.post("/identity/v3/users", admin, user).await.expect(201);
        let user = user["user"]["id"].as_str().unwrap().to_owned();
        let roles = self.get(&format!("/identity/v3/roles?name={role}"), admin).await.expect(200);
        let role = roles["roles"][0]["id"].as_str().unwrap().to_owned();
        let path = format!("/identity/v3/projects/{project}/users/{user}/roles/{role}");
        self.call(Method::PUT, &path, admin, Value::Null).await.expect(204);
        (project, self.token(name, "pw", Some(name)).await)
    }
}
