//! `mote up` and `mote down`: controller and hostd on this machine as two supervised processes.
//!
//! `up` checks what can be checked before anything is started (KVM, the port), bootstraps the database, joins this machine
//! as a host and then keeps both daemons running. Servers are processes of their own: they outlive the daemons and `mote up`.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{
    Global,
    client::Client,
    output,
    rc::{Credentials, OPENRC},
};

/// How long the controller may take until it answers.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a daemon may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause before a daemon that ended is started again; doubles up to [`RESTART_MAX`].
const RESTART_MIN: Duration = Duration::from_millis(200);
/// Longest pause.
const RESTART_MAX: Duration = Duration::from_secs(5);
/// Most simulated hosts: each is a process.
const MAX_SIMULATED: i64 = 32;
/// A daemon that ran this long counts as healthy again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// Run a whole cloud on this machine.
#[derive(Args, Clone)]
pub struct UpArgs {
    /// Address and port of the API.
    #[arg(long, default_value = "127.0.0.1:8774", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// URL under which clients reach it; default: http://ADDR:PORT.
    #[arg(long, value_name = "URL")]
    public_url: Option<String>,
    /// Directory for sockets.
    #[arg(long, default_value = "/run/mote", value_name = "DIR")]
    run_dir: PathBuf,
    /// Name of this host in the cloud; default: the machine's host name.
    #[arg(long, value_name = "NAME")]
    host_name: Option<String>,
    /// Availability zone of this host.
    #[arg(long, default_value = "nova", value_name = "ZONE")]
    zone: String,
    /// Only the controller: this machine runs no servers, others join it.
    #[arg(long)]
    no_host: bool,
    /// Instead of this machine, so many simulated hosts: servers have all their states but no machine behind them. For
    /// trying out the API on a machine without KVM, and for tests of clients.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "no_host", value_parser = clap::value_parser!(u16).range(0..=MAX_SIMULATED))]
    simulated_hosts: u16,
    /// Go to the background once the cloud answers.
    #[arg(long)]
    detach: bool,
}

/// Stop what `mote up` started.
#[derive(Args)]
pub struct DownArgs {}

/// `mote up`.
pub async fn up(global: &Global, args: UpArgs) -> anyhow::Result<()> {
    if args.detach {
        return detach(global, &args).await;
    }
    fs::create_dir_all(&global.state_dir)
        .with_context(|| format!("making {}", global.state_dir.display()))?;
    let _lock = lock(&global.state_dir)?;
    check_port(args.listen)?;
    let places = places(global, &args);
    if args.simulated_hosts == 0 && !args.no_host {
        check_kvm().await?;
    }
    let url = args.public_url.clone().unwrap_or_else(|| format!("http://{}", args.listen));
    let credentials = bootstrap(&global.state_dir, &url).await?;

    let mut controller = Daemon::new(controller_command(global, &args, &url)?, "mote-controller");
    controller.start()?;
    let started = tokio::select! {
        ready = wait_ready(&url) => ready,
        status = controller.ended() => Err(anyhow::anyhow!("mote-controller ended at once ({status}); its message is above")),
    };
    started?;
    let mut hostds = Vec::new();
    for place in &places {
        join(global, &args, place, &url).await?;
        let mut daemon = Daemon::new(hostd_command(place)?, "mote-hostd");
        daemon.start()?;
        hostds.push(daemon);
    }
    Client::login(&credentials)
        .await
        .context("the cloud is up but doesn't take the administrator's password")?;
    print_ready(global, &url);
    supervise(controller, hostds).await
}

/// `mote down`.
pub async fn down(global: &Global, _args: DownArgs) -> anyhow::Result<()> {
    let Some(pid) = running_pid(&global.state_dir)? else {
        eprintln!("mote: no `mote up` runs with state directory {}", global.state_dir.display());
        return Ok(());
    };
    kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("stopping process {pid}"))?;
    let deadline = Instant::now() + STOP_TIMEOUT * 3;
    while running_pid(&global.state_dir)?.is_some() {
        if Instant::now() > deadline {
            bail!("process {pid} doesn't stop");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eprintln!("mote: stopped; servers that run go on running and are found again by the next `mote up`");
    Ok(())
}

/// Starts `mote up` in the background and waits until it says that the cloud answers.
async fn detach(global: &Global, args: &UpArgs) -> anyhow::Result<()> {
    fs::create_dir_all(&global.state_dir)
        .with_context(|| format!("making {}", global.state_dir.display()))?;
    if let Some(pid) = running_pid(&global.state_dir)? {
        bail!("a cloud already runs with state directory {} (process {pid})", global.state_dir.display());
    }
    check_port(args.listen)?;
    let log_path = global.state_dir.join("mote-up.log");
    let log = fs::File::create(&log_path).with_context(|| format!("making {}", log_path.display()))?;
    let mut command = std::process::Command::new(std::env::current_exe().context("finding this program")?);
    // The same arguments without --detach.
    command.args(std::env::args_os().skip(1).filter(|a| a != "--detach"));
    command.env("MOTE_STATE_DIR", &global.state_dir);
    command.stdin(Stdio::null()).stdout(log.try_clone().context("sharing the log")?).stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("starting mote up")?;
    let bar = output::spinner("starting the cloud");
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let said = fs::read_to_string(&log_path).unwrap_or_default();
        if said.contains(READY_MARK) {
            bar.finish_and_clear();
            if !global.json {
                eprintln!("mote: log in {}", log_path.display());
            }
            print_ready(global, args.public_url.as_deref().unwrap_or(&format!("http://{}", args.listen)));
            return Ok(());
        }
        if let Some(status) = child.try_wait().context("waiting for mote up")? {
            bar.finish_and_clear();
            bail!("the cloud did not start ({status}):\n{}", said.trim_end());
        }
        if Instant::now() > deadline {
            bar.finish_and_clear();
            bail!("the cloud is not up after {READY_TIMEOUT:?}; see {}", log_path.display());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The line by which `--detach` knows that its child is ready.
const READY_MARK: &str = "\"ready\":true";

/// Tells a person (and a program) how to use the cloud.
fn print_ready(global: &Global, url: &str) {
    let openrc = global.state_dir.join(OPENRC);
    if global.json || !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        println!("{}", serde_json::json!({"ready": true, "url": url, "openrc": openrc}));
    }
    eprintln!(
        "mote: the cloud is up at {url}\n\n  source {}\n  mote run IMAGE              # or any OpenStack client\n",
        openrc.display()
    );
}

fn pid_path(state_dir: &Path) -> PathBuf {
    state_dir.join("mote-up.pid")
}

/// Holds the pid file locked as long as this process lives.
fn lock(state_dir: &Path) -> anyhow::Result<Flock<fs::File>> {
    let path = pid_path(state_dir);
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "a cloud already runs with state directory {} ({errno}); stop it with `mote down`",
            state_dir.display()
        )
    })?;
    lock.set_len(0)
        .and_then(|()| (&*lock).write_all(std::process::id().to_string().as_bytes()))
        .context("writing the pid file")?;
    Ok(lock)
}

/// The process that holds the lock, if any.
fn running_pid(state_dir: &Path) -> anyhow::Result<Option<i32>> {
    let Ok(mut file) = fs::File::open(pid_path(state_dir)) else { return Ok(None) };
    let mut text = String::new();
    file.read_to_string(&mut text).context("reading the pid file")?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_unheld) => Ok(None),
        Err(_) => Ok(Some(text.trim().parse().context("the pid file holds no pid")?)),
    }
}

fn check_port(listen: SocketAddr) -> anyhow::Result<()> {
    TcpListener::bind(listen)
        .map(drop)
        .with_context(|| format!("can't listen on {listen} (choose another address with --listen)"))
}

/// A program of ours, beside this one.
pub(crate) fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe().context("finding this program")?.with_file_name(name);
    if !path.exists() {
        bail!("{} is missing: it belongs beside mote", path.display());
    }
    Ok(path)
}

/// Says what KVM can do here; only a KVM that doesn't work at all is an error.
async fn check_kvm() -> anyhow::Result<()> {
    let check = Command::new(program("mote-hostd")?)
        .args(["check", "--json"])
        .output()
        .await
        .context("running mote-hostd")?;
    let report: Value = serde_json::from_slice(&check.stdout).unwrap_or(Value::Null);
    let message = report["message"]
        .as_str()
        .map_or_else(|| String::from_utf8_lossy(&check.stderr).into_owned(), str::to_owned);
    if !check.status.success() {
        bail!(
            "this machine can't run servers: {}\n(`mote up --no-host` runs a controller for other hosts)",
            message.trim()
        );
    }
    if !message.is_empty() {
        eprintln!("mote: {}", message.trim());
    }
    Ok(())
}

/// Makes the database with its administrator, and the openrc file, once.
async fn bootstrap(state_dir: &Path, url: &str) -> anyhow::Result<Credentials> {
    let openrc = state_dir.join(OPENRC);
    if openrc.exists() {
        // Nothing to make but the URL may be another one now.
        let mut credentials = Credentials::read(&openrc)?;
        credentials.auth_url = format!("{url}/identity/v3");
        write_private(&openrc, &credentials.to_openrc())?;
        bootstrap_controller(state_dir, url, &credentials.password).await?;
        return Ok(credentials);
    }
    let credentials = Credentials {
        auth_url: format!("{url}/identity/v3"),
        username: "admin".into(),
        password: random_password()?,
        user_domain: "Default".into(),
        project: "admin".into(),
        project_domain: "Default".into(),
    };
    write_private(&openrc, &credentials.to_openrc())?;
    bootstrap_controller(state_dir, url, &credentials.password).await?;
    Ok(credentials)
}

async fn bootstrap_controller(state_dir: &Path, url: &str, password: &str) -> anyhow::Result<()> {
    let done = Command::new(program("mote-controller")?)
        .args(["bootstrap", "--public-url", url, "--state-dir"])
        .arg(state_dir.join("controller"))
        .env("MOTE_ADMIN_PASSWORD", password)
        .stdout(Stdio::null())
        .status()
        .await
        .context("running mote-controller bootstrap")?;
    if !done.success() {
        bail!("mote-controller bootstrap failed ({done}); its message is above");
    }
    Ok(())
}

/// 24 characters from the kernel's random numbers.
fn random_password() -> anyhow::Result<String> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0u8; 24];
    fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|b| char::from(LETTERS[usize::from(b % 32)])).collect())
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut options = fs::OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    options
        .open(&temporary)
        .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("writing {}", path.display()))
}

fn controller_command(global: &Global, args: &UpArgs, url: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(program("mote-controller")?);
    command.args(["run", "--listen", &args.listen.to_string(), "--public-url", url, "--state-dir"]);
    command.arg(global.state_dir.join("controller"));
    Ok(command)
}

/// A host that `mote up` runs.
struct HostPlace {
    /// None: the machine's name.
    name: Option<String>,
    state_dir: PathBuf,
    run_dir: PathBuf,
    simulated: bool,
}

fn places(global: &Global, args: &UpArgs) -> Vec<HostPlace> {
    let simulated = |number: u16| HostPlace {
        name: Some(format!("{}-{number}", args.host_name.as_deref().unwrap_or("simulated"))),
        state_dir: global.state_dir.join(format!("simulated-{number}")),
        run_dir: args.run_dir.join(format!("s{number}")),
        simulated: true,
    };
    let this = HostPlace {
        name: args.host_name.clone(),
        state_dir: global.state_dir.join("host"),
        run_dir: args.run_dir.clone(),
        simulated: false,
    };
    match args.simulated_hosts {
        0 if args.no_host => Vec::new(),
        0 => vec![this],
        count => (1..=count).map(simulated).collect(),
    }
}

fn hostd_command(place: &HostPlace) -> anyhow::Result<Command> {
    let mut command = Command::new(program("mote-hostd")?);
    command.arg("run").arg("--state-dir").arg(&place.state_dir).arg("--run-dir").arg(&place.run_dir);
    if place.simulated {
        command.arg("--simulated");
    }
    Ok(command)
}

async fn wait_ready(url: &str) -> anyhow::Result<()> {
    let http = reqwest::Client::builder().no_proxy().build().context("making an HTTP client")?;
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let answer = http.get(format!("{url}/identity/v3")).timeout(Duration::from_secs(5)).send().await;
        match answer {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            outcome if Instant::now() > deadline => {
                bail!("the controller doesn't answer at {url} after {READY_TIMEOUT:?}: {outcome:?}");
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Joins this machine to its own controller; a machine that has joined stays the host it is.
async fn join(global: &Global, args: &UpArgs, place: &HostPlace, url: &str) -> anyhow::Result<()> {
    let token = Command::new(program("mote-controller")?)
        .arg("join-token")
        .arg("--state-dir")
        .arg(global.state_dir.join("controller"))
        .output()
        .await
        .context("running mote-controller join-token")?;
    if !token.status.success() {
        bail!("mote-controller join-token failed: {}", String::from_utf8_lossy(&token.stderr).trim());
    }
    let token = String::from_utf8(token.stdout).context("the join token is no text")?;
    let mut command = Command::new(program("mote-hostd")?);
    command.args(["join", url, "--token", token.trim(), "--zone", &args.zone]);
    if let Some(name) = &place.name {
        command.args(["--name", name]);
    }
    command.arg("--state-dir").arg(&place.state_dir).arg("--run-dir").arg(&place.run_dir);
    let joined = command.stdout(Stdio::null()).status().await.context("running mote-hostd join")?;
    if !joined.success() {
        bail!("this machine could not join its own cloud; the message is above");
    }
    Ok(())
}

/// A child process that is started again when it ends.
struct Daemon {
    name: &'static str,
    command: Command,
    child: Option<Child>,
    started: Instant,
    pause: Duration,
}

impl Daemon {
    fn new(mut command: Command, name: &'static str) -> Self {
        command.stdin(Stdio::null());
        stop_with_parent(&mut command);
        Self { name, command, child: None, started: Instant::now(), pause: RESTART_MIN }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.started = Instant::now();
        self.child = Some(self.command.spawn().with_context(|| format!("starting {}", self.name))?);
        Ok(())
    }

    /// Waits for its end.
    async fn ended(&mut self) -> String {
        match &mut self.child {
            None => std::future::pending().await,
            Some(child) => {
                let status = child.wait().await.map_or_else(|e| e.to_string(), |s| s.to_string());
                self.child = None;
                status
            }
        }
    }

    /// Keeps it running for ever.
    async fn keep(&mut self) -> anyhow::Result<std::convert::Infallible> {
        loop {
            let status = self.ended().await;
            if self.started.elapsed() > HEALTHY_AFTER {
                self.pause = RESTART_MIN;
            }
            eprintln!("mote: {} ended ({status}); starting it again in {:?}", self.name, self.pause);
            tokio::time::sleep(self.pause).await;
            self.pause = (self.pause * 2).min(RESTART_MAX);
            self.start()?;
        }
    }

    async fn stop(&mut self) {
        let Some(child) = &mut self.child else { return };
        if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
            // It may have ended in this moment: then there is nothing to stop.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, child.wait()).await.is_err() {
            eprintln!("mote: {} doesn't stop, killing it", self.name);
            let _ = child.kill().await;
        }
    }
}

/// Lets the kernel end a daemon when this process dies, so that `kill -9` of `mote up` leaves no daemon behind that holds
/// the port.
fn stop_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent, which is all that may be done between fork and
    // exec.
    #[expect(unsafe_code, reason = "the only way to ask for the parent-death signal")]
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).map_err(Into::into));
    }
}

/// Keeps all of them running; ends when one can't be started any more.
async fn keep_any(daemons: &mut [Daemon]) -> anyhow::Result<std::convert::Infallible> {
    if daemons.is_empty() {
        return std::future::pending().await;
    }
    let all = daemons.iter_mut().map(|daemon| Box::pin(daemon.keep()));
    futures_util::future::select_all(all).await.0
}

async fn supervise(mut controller: Daemon, mut hostds: Vec<Daemon>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("waiting for signals")?;
    let outcome = tokio::select! {
        failed = controller.keep() => failed.map(drop),
        failed = keep_any(&mut hostds) => failed.map(drop),
        _ = terminate.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    eprintln!("mote: stopping the daemons; servers go on running");
    futures_util::future::join_all(hostds.iter_mut().map(Daemon::stop)).await;
    controller.stop().await;
    outcome
}
