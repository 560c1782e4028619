//! `kill -9` of the controller again and again while clients make and delete servers: what was acknowledged holds, what was
//! not is whole or not there, and quota and claims are the sum of what there is. On SQLite and on PostgreSQL, with simulated
//! hosts.

#[allow(unused_imports, unused_macros, reason = "simulated hosts need nothing of the machine")]
mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use common::guest_image;
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey,
    postgres::{self, Server},
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Clients at the same time.
const CLIENTS: u32 = 4;
/// How often the controller is killed.
const KILLS: u32 = 5;
/// Servers that the project may have: fewer than the clients would make.
const QUOTA: usize = 12;
/// vCPUs and MiB of one.
const SIZE: (i64, i64) = (1, 64);
/// Longest time until everything that was begun has come to its end.
const SETTLED: Duration = Duration::from_secs(120);

/// Runs a test whose clients go on while it waits for a daemon.
fn run<F: Future<Output = anyhow::Result<()>>>(test: F) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().expect("a runtime starts");
    if let Err(e) = runtime.block_on(test) {
        panic!("{e:#}");
    }
}

#[test]
fn a_controller_that_is_killed_under_load_loses_and_invents_nothing() {
    run(killed_under_load(None));
}

#[test]
fn a_controller_that_is_killed_under_load_loses_and_invents_nothing_on_postgresql() {
    if let Some(reason) = postgres::why_none() {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let server = Server::start().expect("PostgreSQL starts");
    run(killed_under_load(Some(server.url("postgres"))));
}

/// What one client was told.
#[derive(Debug, Default)]
struct Told {
    /// Servers whose making was acknowledged and whose deletion was never asked for.
    made: Vec<String>,
    /// Servers whose deletion was acknowledged.
    deleted: Vec<String>,
    /// Servers whose deletion was asked for without an answer.
    in_doubt: Vec<String>,
    /// Requests that got no answer, or one of a controller that was not ready.
    unanswered: u32,
    /// Requests that the quota refused.
    over_quota: u32,
}

/// What all clients ask for.
#[derive(Debug, Clone)]
struct Wish {
    image: String,
    flavor: String,
    network: String,
}

async fn killed_under_load(database: Option<String>) -> anyhow::Result<()> {
    let cloud = Cloud::start_on(database.as_deref(), "127.0.0.1", &["--simulated-hosts", "2"])?;
    let client = Arc::new(cloud.client().await?);
    let project = project(&client).await?;
    let quota = json!({"quota_set": {"instances": QUOTA, "cores": -1, "ram": -1}});
    client.put(Service::Compute, &format!("/os-quota-sets/{project}"), quota).await?;
    let wish = Wish {
        image: guest_image(&client, "mote.serve").await?,
        flavor: client.resolve(Service::Compute, "/flavors", "flavors", "m1.nano").await?["id"]
            .as_str()
            .context("a flavor")?
            .to_owned(),
        network: journey::network(&client, "load", "10.40.0.0/24").await?,
    };
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| tokio::spawn(load(client.clone(), number, wish.clone(), over.clone())))
        .collect();
    for kill in 0..KILLS {
        serves(&client).await?;
        tokio::time::sleep(Duration::from_millis(400 + 170 * u64::from(kill))).await;
        tokio::task::block_in_place(|| cloud.kill9_daemon("mote-controller"))?;
    }
    serves(&client).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    over.store(true, Ordering::Relaxed);
    let mut told = Told::default();
    for one in clients {
        let one = one.await.context("a client panicked")??;
        told.made.extend(one.made);
        told.deleted.extend(one.deleted);
        told.in_doubt.extend(one.in_doubt);
        told.unanswered += one.unanswered;
        told.over_quota += one.over_quota;
    }
    let (made, deleted) = (told.made.len(), told.deleted.len());
    println!(
        "{made} kept, {deleted} deleted, {} unanswered, {} over quota",
        told.unanswered, told.over_quota
    );
    ensure!(
        made > 0 && deleted > 0 && told.unanswered > 0 && told.over_quota > 0,
        "it was no load: {told:?}"
    );

    let servers = settled(&client).await?;
    what_was_told_holds(&servers, &told)?;
    sums_are_exact(&client, &project, &servers).await?;
    for server in &servers {
        let id = server["id"].as_str().context("an id")?;
        client.delete(Service::Compute, &format!("/servers/{id}")).await?;
    }
    let begun = Instant::now();
    while !list(&client).await?.is_empty() {
        ensure!(begun.elapsed() < SETTLED, "servers are not removed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    sums_are_exact(&client, &project, &[]).await
}

async fn project(client: &Client) -> anyhow::Result<String> {
    let networks = client.list(Service::Network, "/v2.0/networks", "networks").await?;
    let own = networks.iter().find_map(|network| network["project_id"].as_str());
    Ok(own.context("the administrator's project has a network")?.to_owned())
}

/// Waits until the controller answers.
async fn serves(client: &Client) -> anyhow::Result<()> {
    let begun = Instant::now();
    while client.get(Service::Compute, "/limits").await.is_err() {
        ensure!(begun.elapsed() < SETTLED, "the controller does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Makes and deletes servers until it is over.
async fn load(client: Arc<Client>, number: u32, wish: Wish, over: Arc<AtomicBool>) -> anyhow::Result<Told> {
    let mut told = Told::default();
    for count in 0.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let body = json!({"server": {
            "name": format!("load-{number}-{count}"), "imageRef": wish.image, "flavorRef": wish.flavor,
            "networks": [{"uuid": wish.network}],
        }});
        match ask(&client, Method::POST, "/servers", Some(&body)).await? {
            Some((StatusCode::ACCEPTED, body)) => {
                told.made.push(body["server"]["id"].as_str().context("an id")?.to_owned());
            }
            Some((StatusCode::FORBIDDEN, _)) => told.over_quota += 1,
            Some((status, body)) => bail!("making a server: {status} {body}"),
            None => {
                told.unanswered += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        // Two stay, so that there is something to lose.
        if told.made.len() > 2 {
            let id = told.made.remove(0);
            match ask(&client, Method::DELETE, &format!("/servers/{id}"), None).await? {
                Some((StatusCode::NO_CONTENT, _)) => told.deleted.push(id),
                Some((status, body)) => bail!("deleting a server: {status} {body}"),
                None => {
                    told.unanswered += 1;
                    told.in_doubt.push(id);
                }
            }
        }
    }
    Ok(told)
}

/// `None`: no answer, or that of a controller which can't answer now.
async fn ask(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Option<(StatusCode, Value)>> {
    let mut request = client.request(method, Service::Compute, path)?.timeout(Duration::from_secs(30));
    if let Some(body) = body {
        request = request.json(body);
    }
    let Ok(answer) = request.send().await else { return Ok(None) };
    let status = answer.status();
    if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::INTERNAL_SERVER_ERROR) {
        return Ok(None);
    }
    match answer.bytes().await {
        Ok(bytes) => Ok(Some((status, serde_json::from_slice(&bytes).unwrap_or_default()))),
        Err(_) => Ok(None),
    }
}

async fn list(client: &Client) -> anyhow::Result<Vec<Value>> {
    client.list(Service::Compute, "/servers/detail", "servers").await
}

/// All servers, once each has come to rest.
async fn settled(client: &Client) -> anyhow::Result<Vec<Value>> {
    let begun = Instant::now();
    loop {
        let servers = list(client).await?;
        let moving =
            |server: &&Value| server["status"] != "ACTIVE" || !server["OS-EXT-STS:task_state"].is_null();
        let Some(one) = servers.iter().find(moving) else { return Ok(servers) };
        ensure!(begun.elapsed() < SETTLED, "a server is half made: {one}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn what_was_told_holds(servers: &[Value], told: &Told) -> anyhow::Result<()> {
    let there = |id: &String| servers.iter().any(|server| server["id"] == json!(id));
    let lost: Vec<_> = told.made.iter().filter(|id| !there(id)).collect();
    ensure!(lost.is_empty(), "acknowledged servers are lost: {lost:?}");
    let back: Vec<_> = told.deleted.iter().filter(|id| there(id)).collect();
    ensure!(back.is_empty(), "deleted servers are there: {back:?}");
    ensure!(servers.len() <= QUOTA, "{} servers with a quota of {QUOTA}", servers.len());
    for server in servers {
        let addresses = server["addresses"]["load"].as_array().map_or(0, Vec::len);
        ensure!(addresses == 1, "{addresses} addresses: {server}");
    }
    Ok(())
}

/// Quota, ports and the hosts' claims are those of these servers.
async fn sums_are_exact(client: &Client, project: &str, servers: &[Value]) -> anyhow::Result<()> {
    let count = i64::try_from(servers.len())?;
    let (vcpus, memory_mib) = (SIZE.0 * count, SIZE.1 * count);
    let quota = client.get(Service::Compute, &format!("/os-quota-sets/{project}/detail")).await?;
    let used = |name: &str| quota["quota_set"][name]["in_use"].as_i64();
    let found = [used("instances"), used("cores"), used("ram")];
    ensure!(found == [Some(count), Some(vcpus), Some(memory_mib)], "{count} servers use {found:?}");
    let ports = client.list(Service::Network, "/v2.0/ports", "ports").await?;
    let of_server = |port: &&Value| port["device_owner"].as_str().is_some_and(|o| o.starts_with("compute:"));
    let mut owners: Vec<&Value> = ports.iter().filter(of_server).map(|port| &port["device_id"]).collect();
    let mut ids: Vec<&Value> = servers.iter().map(|server| &server["id"]).collect();
    owners.sort_by_key(|id| id.to_string());
    ids.sort_by_key(|id| id.to_string());
    ensure!(owners == ids, "ports of {owners:?}, servers {ids:?}");
    let statistics = client.get(Service::Compute, "/os-hypervisors/statistics").await?;
    let claimed = &statistics["hypervisor_statistics"];
    let found = [&claimed["running_vms"], &claimed["vcpus_used"], &claimed["memory_mb_used"]];
    ensure!(found.map(Value::as_i64) == [Some(count), Some(vcpus), Some(memory_mib)], "claims: {claimed}");
    Ok(())
}
