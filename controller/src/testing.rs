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

/// Hosts and projects of which what triggers have counted (migration 0096) isn't what there is.
const WRONGLY_COUNTED: &str = "SELECT
    (SELECT COUNT(*) FROM hosts h WHERE
        promised_servers != (SELECT COUNT(*) FROM servers s WHERE s.host_id = h.id)
        OR promised_vcpus != (SELECT COALESCE(SUM(s.vcpus + s.held_vcpus), 0) FROM servers s WHERE s.host_id = h.id)
        OR promised_memory_mib !=
            (SELECT COALESCE(SUM(s.memory_mib + s.held_memory_mib), 0) FROM servers s WHERE s.host_id = h.id)
        OR promised_disk_gib != (SELECT COALESCE(SUM(s.disk_claim_gib), 0) FROM servers s WHERE s.host_id = h.id))
    + (SELECT COUNT(*) FROM (SELECT project_id FROM servers UNION SELECT project_id FROM ports
            UNION SELECT project_id FROM project_usage) AS p
        LEFT JOIN project_usage u ON u.project_id = p.project_id WHERE
        COALESCE(u.instances, 0) != (SELECT COUNT(*) FROM servers s WHERE s.project_id = p.project_id)
        OR COALESCE(u.cores, 0) !=
            (SELECT COALESCE(SUM(s.vcpus + s.held_vcpus), 0) FROM servers s WHERE s.project_id = p.project_id)
        OR COALESCE(u.ram_mib, 0) !=
            (SELECT COALESCE(SUM(s.memory_mib + s.held_memory_mib), 0) FROM servers s WHERE s.project_id = p.project_id)
        OR COALESCE(u.ports, 0) != (SELECT COUNT(*) FROM ports o
            WHERE o.project_id = p.project_id AND o.device_owner != 'network:distributed'))";

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
    /// Asserts that what triggers count is what there is.
    pub async fn usage_is_exact(&self) {
        let wrong: i64 = sqlx::query_scalar(WRONGLY_COUNTED).fetch_one(&self.app.db).await.unwrap();
        assert_eq!(wrong, 0, "hosts or projects whose usage is not what their servers and ports sum up to");
    }

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
