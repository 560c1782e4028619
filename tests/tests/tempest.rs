//! OpenStack's own test suite, Tempest, as it comes from PyPI, against a cloud with simulated hosts: the tests of compute,
//! identity, image and network. What is left out and why is in tests/clients/tempest-excluded.txt.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, ImageFiles, id_of},
    programs,
};
use reqwest::Method;
use serde_json::json;

/// The fewest tests that must have passed.
const LEAST: u32 = 600;
/// Tests that run at once: they mostly wait.
const WORKERS: u32 = 4;

#[test]
fn openstacks_own_test_suite_passes() {
    let Some(tempest) = std::env::var_os("MOTE_TEMPEST").map(PathBuf::from) else {
        eprintln!("SKIPPED: MOTE_TEMPEST doesn't name tempest (./test installs it)");
        return;
    };
    if !programs::guest().exists() {
        eprintln!("SKIPPED: the guest is not built (./test builds everything)");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    if let Err(e) = runtime.expect("a runtime starts").block_on(passes(&tempest)) {
        panic!("{e:#}");
    }
}

async fn passes(tempest: &Path) -> anyhow::Result<()> {
    let cloud = Cloud::start_on(None, "127.0.0.1", &["--simulated-hosts", "2"])?;
    let client = cloud.client().await?;
    let place = tempfile::tempdir()?;
    let workspace = place.path().join("workspace");
    let command = |arguments: &[&str], directory: &Path| {
        let mut command = Command::new(tempest);
        command.args(arguments).current_dir(directory).stdin(Stdio::null());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", place.path());
        // It starts others of its environment by their names.
        let beside = tempest.parent().map(Path::display);
        command.env("PATH", format!("{}:/usr/bin:/bin", beside.context("tempest is in a directory")?));
        command.output().context("running tempest")
    };
    let made = command(&["init", "workspace"], place.path())?;
    if !made.status.success() {
        bail!("tempest init: {}", String::from_utf8_lossy(&made.stderr));
    }
    let configuration = configuration(&cloud, &client, place.path()).await?;
    fs::write(workspace.join("etc/tempest.conf"), configuration).context("writing tempest.conf")?;
    let excluded = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/tempest-excluded.txt");
    let run = command(
        &[
            "run",
            "--regex",
            r"^tempest\.api\.(compute|identity|image|network)\.",
            "--exclude-list",
            &excluded.display().to_string(),
            "--concurrency",
            &WORKERS.to_string(),
        ],
        &workspace,
    )?;
    let said = String::from_utf8_lossy(&run.stdout);
    let count = |word: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(&format!("- {word}: ")));
        line.and_then(|number| number.parse::<u32>().ok())
    };
    let (passed, failed) = (count("Passed"), count("Failed"));
    let skipped = count("Skipped").unwrap_or_default();
    println!("tempest: {} passed, {skipped} skipped", passed.unwrap_or_default());
    match (passed, failed) {
        (Some(passed), Some(0)) if run.status.success() && passed >= LEAST => Ok(()),
        _ => bail!("{}\n{}", failures(&said), String::from_utf8_lossy(&run.stderr)),
    }
}

/// What tempest says of the tests that failed, without the log of their requests.
fn failures(said: &str) -> String {
    let mut text = String::new();
    let mut shown = false;
    for line in said.lines() {
        if line.starts_with('{') {
            shown = line.ends_with("FAILED");
        } else if line.starts_with("Captured pythonlogging") {
            shown = false;
        } else if line.starts_with("======") {
            shown = true;
        }
        if shown && writeln!(text, "{line}").is_err() {
            break;
        }
    }
    text
}

async fn image(client: &Client, name: &str, scratch: &Path) -> anyhow::Result<String> {
    let id = journey::image(client, &ImageFiles::guest(name, &programs::guest(), scratch)?).await?;
    let document = client.get(Service::Image, &format!("/v2/images/{id}")).await?;
    for public in [Some(id.as_str()), document["kernel_id"].as_str()].into_iter().flatten() {
        let request = client
            .request(Method::PATCH, Service::Image, &format!("/v2/images/{public}"))?
            .header("Content-Type", "application/openstack-images-v2.1-json-patch")
            .body(json!([{"op": "replace", "path": "/visibility", "value": "public"}]).to_string());
        client.send(request).await?;
    }
    Ok(id)
}

/// What it has to know of the cloud.
async fn configuration(cloud: &Cloud, client: &Client, place: &Path) -> anyhow::Result<String> {
    let body = json!({"network": {"name": "public", "router:external": true}});
    let public = client.post(Service::Network, "/v2.0/networks", body).await?;
    let public = id_of(&public["network"])?;
    let body = json!({"subnet": {"network_id": public, "ip_version": 4, "cidr": "203.0.113.0/24", "enable_dhcp": false}});
    client.post(Service::Network, "/v2.0/subnets", body).await?;
    let extensions = client.list(Service::Network, "/v2.0/extensions", "extensions").await?;
    let extensions: Vec<&str> = extensions.iter().filter_map(|one| one["alias"].as_str()).collect();
    let small = client.resolve(Service::Compute, "/flavors", "flavors", "m1.nano").await?;
    let large = client.resolve(Service::Compute, "/flavors", "flavors", "m1.tiny").await?;
    let credentials = cloud.credentials()?;
    Ok(format!(
        "[DEFAULT]
log_file = tempest.log
[oslo_concurrency]
lock_path = {lock}
[auth]
use_dynamic_credentials = true
admin_username = {user}
admin_password = {password}
admin_project_name = {project}
admin_domain_name = {domain}
[identity]
uri_v3 = {url}
auth_version = v3
v3_endpoint_type = public
[identity-feature-enabled]
api_v2 = false
api_v2_admin = false
application_credentials = true
access_rules = true
project_tags = true
[compute]
image_ref = {image}
image_ref_alt = {other_image}
flavor_ref = {flavor}
flavor_ref_alt = {other_flavor}
min_microversion = 2.1
max_microversion = latest
build_timeout = 120
build_interval = 1
min_compute_nodes = 2
[compute-feature-enabled]
cold_migration = false
live_migration = false
rescue = true
config_drive = true
change_password = false
personality = false
enable_instance_password = false
vnc_console = false
swap_volume = false
attach_encrypted_volume = false
[image]
container_formats = bare,aki,ari
disk_formats = raw,qcow2,aki,ari,iso
[image-feature-enabled]
import_image = true
[network]
public_network_id = {public}
floating_network_name = public
[network-feature-enabled]
ipv6 = true
api_extensions = {extensions}
[service_available]
cinder = false
swift = false
nova = true
glance = true
neutron = true
[validation]
run_validation = false
",
        lock = place.join("lock").display(),
        user = credentials.username,
        password = credentials.password,
        project = credentials.project,
        domain = credentials.user_domain,
        url = credentials.auth_url,
        image = image(client, "one", place).await?,
        other_image = image(client, "other", place).await?,
        flavor = id_of(&small)?,
        other_flavor = id_of(&large)?,
        extensions = extensions.join(","),
    ))
}
