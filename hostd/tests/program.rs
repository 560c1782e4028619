//! The program as a person and a service manager see it, and `kill -9` of it.
#![expect(clippy::unwrap_used, reason = "tests: what goes wrong shall stop them")]

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use common::{PATIENCE, Script};
use mote_host_api::{CloudId, DesiredState, HostId, ImageSpec, JoinResponse, ServerSpec, ServerState};
use mote_hostd::{
    paths::{RunDir, StateDir},
    process,
    sim::{World, server_spec},
    status::{self, Status},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest, Sha256};

fn hostd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mote-hostd"));
    command.env("RUST_LOG", "info").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = hostd().args(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn wrong_usage_is_2_and_what_does_not_work_is_1_with_one_clear_line() {
    assert_eq!(run(&["--version"]).0, Some(0));
    assert!(run(&["join", "--help"]).1.contains("secret"));
    for wrong in [&["fly"][..], &["join"], &["join", "http://x"], &["run", "--vmmm", "x"], &[]] {
        assert_eq!(run(wrong).0, Some(2), "{wrong:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let (code, _, said) = run(&["run", "--state-dir", place, "--run-dir", place]);
    assert_eq!(code, Some(1));
    assert!(said.starts_with("mote-hostd: this host has not joined a cloud: run `mote-hostd join"), "{said}");
    let (code, _, said) = run(&["status", "--run-dir", place]);
    assert!(code == Some(1) && said.starts_with("mote-hostd: mote-hostd does not run here"), "{said}");
    let (code, _, said) = run(&["join", "https://x", "--token", "t", "--state-dir", place]);
    assert!(code == Some(1) && said.contains("http://192.0.2.1:8774"), "{said}");
}

#[test]
fn check_says_what_it_found_in_json_and_by_its_exit_code() {
    let (code, out, _) = run(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, Some(if report["works"].as_bool().unwrap() { 0 } else { 1 }));
    assert_eq!(report["verdict"] == "ready", report["message"] == "");
}

/// A joined host with a scripted controller and `examples/fake_vmm`.
struct Host {
    dir: tempfile::TempDir,
    script: Arc<Script>,
    desired: DesiredState,
    daemon: Option<Child>,
}

impl Host {
    /// None, with the reason told, without what a jail takes.
    async fn join() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: not root");
            return None;
        }
        let (script, url) = Script::start().await;
        let dir = tempfile::tempdir().unwrap();
        let (cloud_id, host_id) = (CloudId::new(), HostId::new());
        let answer = JoinResponse { cloud_id, host_id, secret: "s".into() };
        script.say("POST /mote/v1/hosts", 201, serde_json::to_vec(&answer).unwrap());
        let desired = DesiredState {
            cloud_id,
            host_id,
            generation: 1,
            networks: vec![],
            servers: vec![],
            ..DesiredState::default()
        };
        let mut host = Self { dir, script, desired, daemon: None };
        let mut join = host.command("join");
        join.args([&url, "--token", "t", "--name", "h"]);
        let status = tokio::task::spawn_blocking(move || join.status()).await.unwrap().unwrap();
        assert!(status.success());
        host.start();
        Some(host)
    }

    fn command(&self, command: &str) -> Command {
        let mut hostd = hostd();
        hostd
            .arg(command)
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .arg("--run-dir")
            .arg(self.run());
        hostd
    }

    fn run(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn start(&mut self) {
        let log =
            std::fs::OpenOptions::new().append(true).create(true).open(self.dir.path().join("log")).unwrap();
        let mut command = self.command("run");
        let fake_vmm = Path::new(env!("CARGO_BIN_EXE_mote-hostd")).with_file_name("examples/fake_vmm");
        command.arg("--vmm").arg(fake_vmm);
        self.daemon = Some(command.stderr(log).spawn().unwrap());
    }

    fn signal(&mut self, signal: Signal) {
        let mut daemon = self.daemon.take().unwrap();
        kill(Pid::from_raw(daemon.id().cast_signed()), signal).unwrap();
        daemon.wait().unwrap();
    }

    fn want(&mut self, servers: &[ServerSpec]) {
        self.desired.generation += 1;
        self.desired.servers = servers.to_vec();
        self.script.want(&self.desired);
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let begun = Instant::now();
        loop {
            let status = status::ask(&RunDir::new(self.run())).await;
            match status {
                Ok(status) if is_so(&status) => return status,
                other if begun.elapsed() > PATIENCE => {
                    let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap();
                    panic!("not {what}: {other:?}\n{log}");
                }
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    fn vmms(&self) -> Vec<process::ProcessIdentity> {
        process::scan(&StateDir::new(self.dir.path().join("state")))
            .unwrap()
            .into_iter()
            .map(|(_, process)| process)
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for process in self.vmms() {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
    }
}

/// A server without ports, whose images the controller has.
fn server(host: &Host) -> ServerSpec {
    let image_dir = tempfile::tempdir().unwrap();
    World::new(image_dir.path()).unwrap();
    let image = std::fs::read(image_dir.path().join("image")).unwrap();
    let spec = ImageSpec { sha256: hex::encode(Sha256::digest(&image)), size: image.len() as u64 };
    for _ in 0..50 {
        host.script.say("/images/", 200, image.clone());
    }
    let mut server = server_spec(&[]);
    server.boot.disk = spec.clone();
    server.boot.kernel = Some(spec);
    server
}

fn running(status: &Status) -> bool {
    let servers = &status.snapshot.servers;
    !servers.is_empty()
        && servers.iter().all(|s| s.observed.state == ServerState::Running && s.pids.len() == 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_and_kill_9_leave_the_vmm_and_the_next_one_takes_it_over() {
    let Some(mut host) = Host::join().await else { return };
    let server = server(&host);
    host.want(std::slice::from_ref(&server));
    host.until("running", running).await;
    let before = host.vmms();
    assert_eq!(before.len(), 1);

    let second = host.command("run").arg("--vmm").arg("/bin/true").output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(1) && said.contains("another mote-hostd (process "), "{said}");

    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM] {
        host.signal(signal);
        assert_eq!(host.vmms(), before);
        host.start();
        host.until("running again", running).await;
        assert_eq!(host.vmms(), before, "the same process after {signal}");
    }
    let status = host.until("running", running).await;
    assert!(status::text(&status).contains("running"));

    host.signal(Signal::SIGTERM);
    host.want(&[]);
    host.start();
    host.until("gone", |s| s.snapshot.servers.is_empty() && s.snapshot.applied_generation > 2).await;
    assert!(host.vmms().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_moment_of_a_start_ends_in_one_vmm() {
    let Some(mut host) = Host::join().await else { return };
    let state = StateDir::new(host.dir.path().join("state"));
    for pause_ms in [0, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40] {
        let server = server(&host);
        host.want(std::slice::from_ref(&server));
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        host.signal(Signal::SIGKILL);
        host.start();
        host.until("running", |s| running(s) && s.snapshot.servers[0].observed.id == server.id).await;
        assert_eq!(host.vmms().len(), 1, "killed after {pause_ms} ms");
        let dir = state.server(server.id);
        assert_eq!(dir.other_config_drives(1), [""; 0].map(std::path::PathBuf::from), "nothing half-made");
        let drive = std::fs::read(dir.config_drive(1)).unwrap();
        assert!(drive.len() == 2 << 20 && drive[510..512] == [0x55, 0xaa], "a whole drive");
        host.want(&[]);
        let generation = host.desired.generation;
        host.until("gone", |s| s.snapshot.servers.is_empty() && s.snapshot.applied_generation == generation)
            .await;
        assert_eq!(host.vmms(), [], "killed after {pause_ms} ms");
        assert_eq!(std::fs::read_dir(state.servers()).unwrap().count(), 0);
    }
}
