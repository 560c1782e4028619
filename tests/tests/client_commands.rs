//! Hundreds of commands of the unmodified `openstack` client, and the calls of openstacksdk and gophercloud, all in
//! tests/clients, against a cloud with simulated hosts, which needs neither KVM nor root: once with SQLite, once with
//! PostgreSQL.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use mote_tests::{
    cloud::Cloud,
    postgres::{self, Server},
    programs,
};

/// A script, and the fewest commands or checks that it must have run.
type Script = (&'static str, u32);
const COMMANDS: Script = ("openstack_commands.py", 600);
const SDK: Script = ("sdk.py", 170);

#[test]
fn commands_of_the_openstack_client_do_what_they_say() {
    on_sqlite(COMMANDS);
}

#[test]
fn commands_of_the_openstack_client_do_what_they_say_on_postgresql() {
    on_postgresql(COMMANDS);
}

#[test]
fn programs_that_use_openstacksdk_or_gophercloud_get_what_they_expect() {
    on_sqlite(SDK);
}

#[test]
fn programs_that_use_openstacksdk_or_gophercloud_get_what_they_expect_on_postgresql() {
    on_postgresql(SDK);
}

fn on_sqlite(script: Script) {
    let Some(python) = client() else { return };
    run(&python, script, None);
}

fn on_postgresql(script: Script) {
    let Some(python) = client() else { return };
    if let Some(reason) = postgres::why_none() {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let server = Server::start().expect("PostgreSQL starts");
    run(&python, script, Some(&server.url("postgres")));
}

/// The Python of the client's virtual environment.
fn client() -> Option<PathBuf> {
    let program = std::env::var_os("MOTE_OPENSTACK").map(PathBuf::from);
    if program.is_none() {
        eprintln!("SKIPPED: MOTE_OPENSTACK doesn't name the openstack client (./test installs it)");
    }
    Some(program?.with_file_name("python"))
}

fn run(python: &Path, (script, least): Script, database: Option<&str>) {
    let cloud = Cloud::start_on(database, "127.0.0.1", &["--simulated-hosts", "2"]).expect("a cloud starts");
    let credentials = cloud.credentials().expect("there is an openrc file");
    let home = tempfile::tempdir().expect("a directory can be made");
    let output = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script))
        .arg(programs::guest())
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home.path())
        .env("OS_AUTH_URL", credentials.auth_url)
        .env("OS_USERNAME", credentials.username)
        .env("OS_PASSWORD", credentials.password)
        .env("OS_PROJECT_NAME", credentials.project)
        .env("OS_USER_DOMAIN_NAME", credentials.user_domain)
        .env("OS_PROJECT_DOMAIN_NAME", credentials.project_domain)
        .env("OS_IDENTITY_API_VERSION", "3")
        .output()
        .expect("the client's Python starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    let last = said.lines().last().unwrap_or_default();
    let count = last.split(' ').next().and_then(|count| count.parse::<u32>().ok());
    assert!(count.is_some_and(|count| count >= least), "{last}");
}
