//! The controller's API under load: latency and rate of single calls, with a full database.
//!
//! The client is one thread by connection over loopback and does little else than wait; it shares the machine with the
//! controller, as clients' proxies would.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The administrator's password in the benchmark's own controller.
const PASSWORD: &str = "bench-password";
/// Requests that aren't counted, so that caches are as in a long-running service.
const WARM_UP: Duration = Duration::from_millis(300);
/// Longest answer that is read.
const MAX_BODY_BYTES: usize = 64 << 20;
/// How long the controller may take to listen.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Servers made.
const CREATES: usize = 200;
/// What a create of a server adds to SQLite's log: some forty pages.
const COMMIT_BYTES: usize = 40 * 4096;
/// Servers of a page, as the target says.
const PAGE: usize = 1000;

/// What `api` measures.
#[derive(Debug, clap::Args)]
pub struct ApiArguments {
    /// mote-controller [default: beside this program]
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
    /// The program that fills the database [default: examples/fill_database beside this program]
    #[arg(long, value_name = "PATH")]
    fill: Option<PathBuf>,
    /// PostgreSQL, in place of SQLite: an empty database
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Servers in the database
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    servers: u32,
    /// Users in the database
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    users: u32,
    /// Images in the database
    #[arg(long, value_name = "N", default_value_t = 500)]
    images: u32,
    /// Connections at the same time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=512))]
    connections: u16,
    /// Seconds of each measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One kind of request.
#[derive(Debug, Serialize)]
pub struct Case {
    name: String,
    connections: u16,
    requests: usize,
    per_second: f64,
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where the rows are.
    database: &'static str,
    cases: Vec<Case>,
    /// Resident set before the first request, in MiB, with the full database.
    idle_mib: f64,
    /// The same after all requests.
    after_mib: f64,
}

/// A controller that ends with this value.
struct Controller {
    child: Child,
    address: SocketAddr,
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fills a database, starts a controller and measures.
pub fn run(arguments: &ApiArguments) -> Result<Report> {
    let beside = std::env::current_exe()?.parent().context("this program is in a directory")?.to_owned();
    let of = |given: &Option<PathBuf>, name: &str| given.clone().unwrap_or_else(|| beside.join(name));
    let program = of(&arguments.controller, "mote-controller");
    let state = tempfile::tempdir()?;
    let filled = prepare(arguments, &program, &of(&arguments.fill, "examples/fill_database"), state.path())?;
    let controller = start(arguments, &program, state.path())?;
    thread::sleep(Duration::from_millis(500));
    let idle_mib = resident_mib(&controller)?;
    let at = controller.address;
    let token = token(at)?;
    let get = |path: &str, more: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: bench\r\nX-Auth-Token: {token}\r\n{more}\r\n")
    };
    let validate = get("/identity/v3/auth/tokens", &format!("X-Subject-Token: {token}\r\n"));
    let show = get(&format!("/compute/v2.1/servers/{}", filled.server), "");
    let detail = get(&format!("/compute/v2.1/servers/detail?limit={PAGE}"), "");
    let measured = Duration::from_secs(arguments.seconds.into());
    let many = arguments.connections;
    let cases = vec![
        case("floor: a route without database", &get("/", ""), at, many, measured)?,
        case("token by password", &log_in(), at, 4, measured)?,
        case("validate token", &validate, at, many, measured)?,
        case("validate token", &validate, at, 1, measured)?,
        case("show server", &show, at, many, measured)?,
        case("show server", &show, at, 1, measured)?,
        case("list 1,000 servers in detail", &detail, at, 1, measured)?,
        all_pages(at, &token, arguments.servers)?,
        flushes(state.path())?,
        creates(at, &token, &filled)?,
    ];
    let database = if arguments.database.is_some() { "PostgreSQL" } else { "SQLite" };
    Ok(Report { database, cases, idle_mib, after_mib: resident_mib(&controller)? })
}

fn command(arguments: &ApiArguments, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("MOTE_ADMIN_PASSWORD", PASSWORD).env("RUST_LOG", "warn").stdin(Stdio::null());
    match &arguments.database {
        Some(url) => command.env("MOTE_DATABASE", url),
        None => command.env_remove("MOTE_DATABASE"),
    };
    command
}

/// What is in the filled database.
#[derive(Debug, Deserialize)]
struct Filled {
    /// A server.
    server: String,
    /// An image that servers can be made of.
    image: String,
    /// Networks without a server yet.
    networks: Vec<String>,
}

fn prepare(arguments: &ApiArguments, program: &Path, fill: &Path, state: &Path) -> Result<Filled> {
    let made = command(arguments, program).args(["bootstrap", "--state-dir"]).arg(state).output()?;
    ensure!(made.status.success(), "bootstrap: {}", String::from_utf8_lossy(&made.stderr));
    let counts = [arguments.servers, arguments.users, arguments.images].map(|count| count.to_string());
    let filled = command(arguments, fill).arg(state).args(counts).output();
    let filled = filled.with_context(|| {
        format!("{} (cargo build --release -p mote-controller --example fill_database)", fill.display())
    })?;
    ensure!(filled.status.success(), "filling: {}", String::from_utf8_lossy(&filled.stderr));
    Ok(serde_json::from_slice(&filled.stdout)?)
}

fn start(arguments: &ApiArguments, program: &Path, state: &Path) -> Result<Controller> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut run = command(arguments, program);
    run.args(["run", "--login-rate", "0", "--listen", &address.to_string(), "--state-dir"]).arg(state);
    let controller = Controller { child: run.spawn()?, address };
    let end = Instant::now() + START_LIMIT;
    let ready = b"GET /readyz HTTP/1.1\r\nHost: bench\r\n\r\n";
    let serves = || -> Result<bool> {
        let mut connection = Connection::open(address)?;
        let (status, ..) = connection.ask(ready)?;
        Ok(status == 200)
    };
    while !serves().unwrap_or(false) {
        ensure!(Instant::now() < end, "the controller does not serve");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(controller)
}

fn resident_mib(controller: &Controller) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", controller.child.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
}

/// A kept connection.
struct Connection {
    stream: BufReader<TcpStream>,
    body: Vec<u8>,
}

impl Connection {
    fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { stream: BufReader::with_capacity(64 << 10, stream), body: Vec::new() })
    }

    /// Status, the header X-Subject-Token, and the body.
    fn ask(&mut self, request: &[u8]) -> Result<(u16, Option<String>, &[u8])> {
        self.stream.get_mut().write_all(request)?;
        let (mut status, mut length, mut token) = (0, 0, None);
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.stream.read_line(&mut line)? > 0, "the connection was closed");
            let text = line.trim_end();
            if text.is_empty() {
                break;
            }
            match text.split_once(": ") {
                None => status = text.get(9..12).context("a status line")?.parse()?,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse()?
                }
                Some((name, value)) if name.eq_ignore_ascii_case("x-subject-token") => {
                    token = Some(value.to_owned());
                }
                Some(_) => {}
            }
        }
        ensure!(length <= MAX_BODY_BYTES, "an answer of {length} bytes");
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body)?;
        Ok((status, token, &self.body))
    }
}

fn log_in() -> String {
    let body = format!(
        r#"{{"auth": {{"identity": {{"methods": ["password"], "password": {{"user": {{"name": "admin",
        "domain": {{"id": "default"}}, "password": "{PASSWORD}"}}}}}}}}}}"#
    );
    format!(
        "POST /identity/v3/auth/tokens HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn token(address: SocketAddr) -> Result<String> {
    let mut connection = Connection::open(address)?;
    let (status, token, body) = connection.ask(log_in().as_bytes())?;
    ensure!(status == 201, "{status} {}", String::from_utf8_lossy(body));
    token.context("a token")
}

/// Asks the same on several connections, each as soon as its last answer is there.
fn case(
    name: &str,
    request: &str,
    address: SocketAddr,
    connections: u16,
    measured: Duration,
) -> Result<Case> {
    let (measuring, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let together = Barrier::new(usize::from(connections) + 1);
    let (times, took) = thread::scope(|scope| -> Result<(Vec<Duration>, Duration)> {
        let client = || -> Result<Vec<Duration>> {
            let connection = Connection::open(address);
            together.wait();
            let mut connection = connection?;
            let mut times = Vec::with_capacity(1 << 16);
            while !ended.load(Ordering::Relaxed) {
                let counted = measuring.load(Ordering::Relaxed);
                let begun = Instant::now();
                let (status, _, body) = connection.ask(request.as_bytes())?;
                if !(200..300).contains(&status) {
                    bail!("{status} {}", String::from_utf8_lossy(body));
                }
                if counted {
                    times.push(begun.elapsed());
                }
            }
            Ok(times)
        };
        let clients: Vec<_> = (0..connections).map(|_| scope.spawn(client)).collect();
        together.wait();
        thread::sleep(WARM_UP);
        let begun = Instant::now();
        measuring.store(true, Ordering::Relaxed);
        thread::sleep(measured);
        ended.store(true, Ordering::Relaxed);
        let took = begun.elapsed();
        let mut times = Vec::new();
        for client in clients {
            times.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??);
        }
        Ok((times, took))
    })
    .with_context(|| name.to_owned())?;
    summary(name, connections, times, took)
}

/// Pages through all servers, once.
fn all_pages(address: SocketAddr, token: &str, servers: u32) -> Result<Case> {
    let mut connection = Connection::open(address)?;
    let (mut times, mut seen, mut marker) = (Vec::new(), 0, String::new());
    let begun = Instant::now();
    loop {
        let after = if marker.is_empty() { String::new() } else { format!("&marker={marker}") };
        let request = format!(
            "GET /compute/v2.1/servers/detail?limit={PAGE}{after} HTTP/1.1\r\nHost: bench\r\n\
             X-Auth-Token: {token}\r\n\r\n"
        );
        let asked = Instant::now();
        let (status, _, body) = connection.ask(request.as_bytes())?;
        times.push(asked.elapsed());
        ensure!(status == 200, "{status} {}", String::from_utf8_lossy(body));
        let answer: serde_json::Value = serde_json::from_slice(body)?;
        let page = answer["servers"].as_array().context("servers")?;
        seen += page.len();
        match page.last() {
            Some(last) if page.len() == PAGE => last["id"].as_str().context("id")?.clone_into(&mut marker),
            _ => break,
        }
    }
    ensure!(seen == usize::try_from(servers)?, "{seen} of {servers} servers were listed");
    summary("all servers, page by page of 1,000", 1, times, begun.elapsed())
}

/// What a commit can't do without: as many bytes as a create writes into SQLite's log, on the same disk and flushed.
fn flushes(dir: &Path) -> Result<Case> {
    let file = std::fs::File::create(dir.join("floor"))?;
    let bytes = vec![1_u8; COMMIT_BYTES];
    let mut times = Vec::with_capacity(CREATES);
    let begun = Instant::now();
    for _ in 0..CREATES {
        let asked = Instant::now();
        (&file).write_all(&bytes)?;
        file.sync_data()?;
        times.push(asked.elapsed());
    }
    summary("floor: one flush of a commit's bytes", 1, times, begun.elapsed())
}

/// Makes servers one after the other, each on one of a few small networks: an answer means that it is scheduled, since that
/// is part of the transaction that makes it.
fn creates(address: SocketAddr, token: &str, filled: &Filled) -> Result<Case> {
    let mut connection = Connection::open(address)?;
    let head =
        format!("HTTP/1.1\r\nHost: bench\r\nX-Auth-Token: {token}\r\nContent-Type: application/json\r\n");
    let project = {
        let subject = format!("GET /identity/v3/auth/tokens {head}X-Subject-Token: {token}\r\n\r\n");
        let (_, _, body) = connection.ask(subject.as_bytes())?;
        let answer: serde_json::Value = serde_json::from_slice(body)?;
        answer["token"]["project"]["id"].as_str().context("a project")?.to_owned()
    };
    let mut send = |method: &str, path: &str, body: &serde_json::Value| -> Result<serde_json::Value> {
        let body = body.to_string();
        let request = format!("{method} {path} {head}Content-Length: {}\r\n\r\n{body}", body.len());
        let (status, _, body) = connection.ask(request.as_bytes())?;
        ensure!((200..300).contains(&status), "{status} {}", String::from_utf8_lossy(body));
        Ok(serde_json::from_slice(body)?)
    };
    let unlimited = json!({"quota_set": {"instances": -1, "cores": -1, "ram": -1}});
    send("PUT", &format!("/compute/v2.1/os-quota-sets/{project}"), &unlimited)?;
    let unlimited = json!({"quota": {"port": -1}});
    send("PUT", &format!("/network/v2.0/quotas/{project}"), &unlimited)?;
    let mut times = Vec::with_capacity(CREATES);
    let begun = Instant::now();
    for network in filled.networks.iter().cycle().take(CREATES) {
        let server = json!({"server": {
            "name": "new", "imageRef": filled.image, "flavorRef": "1", "networks": [{"uuid": network}],
        }});
        let asked = Instant::now();
        send("POST", "/compute/v2.1/servers", &server)?;
        times.push(asked.elapsed());
    }
    let took = begun.elapsed();
    let servers = json!(null);
    let list = send("GET", &format!("/compute/v2.1/servers/detail?limit={CREATES}"), &servers)?;
    let scheduled = |server: &&serde_json::Value| server["OS-EXT-STS:task_state"] == "scheduling";
    let count = list["servers"].as_array().context("servers")?.iter().filter(scheduled).count();
    ensure!(count == CREATES, "{count} of {CREATES} servers were scheduled");
    summary("create → scheduled", 1, times, took)
}

fn summary(name: &str, connections: u16, mut times: Vec<Duration>, took: Duration) -> Result<Case> {
    ensure!(!times.is_empty(), "{name}: no answer in time");
    times.sort_unstable();
    let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    Ok(Case {
        name: name.to_owned(),
        connections,
        requests: times.len(),
        per_second: times.len() as f64 / took.as_secs_f64(),
        p50_ms: at(50),
        p95_ms: at(95),
        p99_ms: at(99),
        max_ms: at(100),
    })
}

/// As a table.
pub fn render(report: &Report) -> String {
    let mut text = format!("{}\n{:<38}{:>6}{:>10}", report.database, "", "conns", "req/s");
    text.push_str("   p50 ms   p95 ms   p99 ms   max ms\n");
    for case in &report.cases {
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:<38}{:>6}{:>10.0}{:>9.2}{:>9.2}{:>9.2}{:>9.2}",
            case.name, case.connections, case.per_second, case.p50_ms, case.p95_ms, case.p99_ms, case.max_ms
        );
    }
    let _ =
        writeln!(text, "resident memory: {:.1} MiB idle, {:.1} MiB after", report.idle_mib, report.after_mib);
    text
}
