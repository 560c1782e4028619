//! schemathesis (PyPI) makes requests from the controller's own OpenAPI document, right and wrong ones: none may be answered by
//! a server's error, by a status, a media type or a body that the document doesn't have, and none that the document refuses may
//! be let in. `MOTE_SCHEMATHESIS_SECONDS` says for how long (./test: a minute).

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use mote::client::Service;
use mote_tests::{
    cloud::Cloud,
    postgres::{self, Server},
};

/// What hosts alone ask (it waits for long, by design), and the stream of events, which has no end.
const EXCLUDED: &str = "^/mote/v1/hosts/\\{id\\}/|^/mote/v1/events";
/// How long, if nobody says.
const SECONDS: &str = "60";
/// That a right request is accepted can't be asked: what it names has to exist.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
                      negative_data_rejection";

#[test]
fn no_request_of_the_documents_making_is_answered_outside_of_it() {
    hold(None);
}

#[test]
fn the_same_holds_on_postgresql() {
    // The first covers the document; this one is for when somebody asks for long runs.
    let unasked = std::env::var_os("MOTE_SCHEMATHESIS_SECONDS").is_none();
    let unasked = unasked.then(|| "MOTE_SCHEMATHESIS_SECONDS is not set".to_owned());
    if let Some(reason) = unasked.or_else(postgres::why_none) {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let server = Server::start().expect("PostgreSQL starts");
    hold(Some(&server.url("postgres")));
}

fn hold(database: Option<&str>) {
    let Some(program) = std::env::var_os("MOTE_SCHEMATHESIS").map(PathBuf::from) else {
        eprintln!("SKIPPED: MOTE_SCHEMATHESIS doesn't name schemathesis (./test installs it)");
        return;
    };
    let seconds = std::env::var("MOTE_SCHEMATHESIS_SECONDS").unwrap_or_else(|_| SECONDS.into());
    let cloud = Cloud::start_on(database, "127.0.0.1", &["--simulated-hosts", "1"]).expect("a cloud starts");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    let client = runtime.block_on(cloud.client()).expect("the administrator has a token");
    let home = tempfile::tempdir().expect("a directory can be made");
    let clients = concat!(env!("CARGO_MANIFEST_DIR"), "/clients");
    let output = Command::new(program)
        .args(["--config-file", &format!("{clients}/schemathesis.toml")])
        .args(["run", &format!("{}/openapi.json", cloud.url), "--max-time", &seconds, "--workers", "2"])
        .args(["--checks", CHECKS, "--phases", "examples,fuzzing"])
        .args(["--exclude-path-regex", EXCLUDED, "--request-timeout", "40", "--no-color", "--no-shrink"])
        .args(["--header", &format!("X-Auth-Token: {}", client.token()), "--max-failures", "20"])
        .args(["--suppress-health-check", "all", "--warnings", "off"])
        .current_dir(home.path())
        .env("HOME", home.path())
        .env("PYTHONPATH", clients)
        .env("SCHEMATHESIS_HOOKS", "schemathesis_hooks")
        .stdin(Stdio::null())
        .output()
        .expect("schemathesis starts");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    // The cloud is still one.
    runtime.block_on(client.get(Service::Compute, "/servers")).expect("servers can be listed");
}
