//! The program itself: what it says when it can't start, and that what it has acknowledged survives its death.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long the program may take to start or stop.
const LIMIT: Duration = Duration::from_secs(60);

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mote-controller"));
    command.env_remove("RUST_LOG").env_remove("MOTE_CONTROLLER_STATE_DIR").stdin(Stdio::null());
    command
}

fn bootstrap(dir: &Path) -> Value {
    let output = program()
        .args(["bootstrap", "--public-url", "http://cloud.test", "--state-dir"])
        .arg(dir)
        .env("MOTE_ADMIN_PASSWORD", "pw")
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("credentials are JSON")
}

/// Runs with a port that is free now; ends with the test.
struct Running {
    child: Child,
    port: u16,
}

impl Running {
    fn start(dir: &Path) -> Self {
        let port = free_port();
        let mut child = program()
            .args(["run", "--listen", &format!("127.0.0.1:{port}"), "--state-dir"])
            .arg(dir)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stderr = child.stderr.take().expect("stderr is piped");
        let mut lines = BufReader::new(stderr).lines();
        // Serving is announced once the socket listens.
        assert!(lines.any(|line| line.is_ok_and(|line| line.contains("serving"))), "it ended at once");
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, port }
    }

    /// Status, head and body of an answer.
    fn ask(&self, method: &str, path: &str, token: &str, body: &str) -> (u16, String, Value) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a time-out can be set");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Auth-Token: {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("the request is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer comes");
        let (head, body) = answer.split_once("\r\n\r\n").expect("the answer has a head");
        let status = head[9..12].parse().expect("the status is a number");
        (status, head.to_owned(), serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn token(&self) -> String {
        let body = r#"{"auth": {"identity": {"methods": ["password"], "password": {"user":
            {"name": "admin", "domain": {"id": "default"}, "password": "pw"}}}}}"#;
        let (status, head, body) = self.ask("POST", "/identity/v3/auth/tokens", "", body);
        assert_eq!(status, 201, "{body}");
        let line = head.lines().find_map(|line| line.strip_prefix("x-subject-token: "));
        line.expect("the token is in the head").to_owned()
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(done.expect("kill runs").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

fn failure(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().expect("the program starts");
    assert_eq!(status.code(), Some(1));
    String::from_utf8_lossy(&stderr).into_owned()
}

#[test]
fn a_port_or_directory_in_use_and_a_bad_url_are_each_one_clear_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Running::start(dir.path());
    let other = tempfile::tempdir().expect("a directory");
    let taken = format!("127.0.0.1:{}", running.port);
    let text = failure(program().args(["run", "--listen", &taken, "--state-dir"]).arg(other.path()));
    assert!(text.contains(&taken) && text.contains("in use") && text.lines().count() == 1, "{text}");
    let text = failure(program().args(["run", "--listen", "127.0.0.1:0", "--state-dir"]).arg(dir.path()));
    assert!(text.contains("another mote-controller is running"), "{text}");
    let text = failure(program().args(["run", "--public-url", "nowhere", "--state-dir"]).arg(other.path()));
    assert!(text.contains("nowhere"), "{text}");
}

#[test]
fn acknowledged_writes_and_tokens_survive_kill_9() {
    let dir = tempfile::tempdir().expect("a directory");
    let credentials = bootstrap(dir.path());
    assert_eq!(credentials["auth_url"], "http://cloud.test/identity/v3");
    let running = Running::start(dir.path());
    let token = running.token();
    for name in ["one", "two", "three"] {
        let body = format!(r#"{{"project": {{"name": "{name}"}}}}"#);
        assert_eq!(running.ask("POST", "/identity/v3/projects", &token, &body).0, 201);
    }
    running.signal("KILL");
    drop(running);
    let running = Running::start(dir.path());
    let (status, _, body) = running.ask("GET", "/identity/v3/projects", &token, "");
    let names: Vec<&str> =
        body["projects"].as_array().into_iter().flatten().filter_map(|p| p["name"].as_str()).collect();
    assert_eq!((status, names.as_slice()), (200, ["admin", "one", "three", "two"].as_slice()));
}

#[test]
fn sigterm_ends_it_cleanly() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut running = Running::start(dir.path());
    running.signal("TERM");
    let started = Instant::now();
    let status = loop {
        if let Some(status) = running.child.try_wait().expect("it can be waited for") {
            break status;
        }
        assert!(started.elapsed() < LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success());
}
