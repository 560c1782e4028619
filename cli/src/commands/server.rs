//! `mote server`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{
    Global,
    client::{Client, Service},
    console, output,
};

/// How often a waiting command asks.
const POLL_EVERY: Duration = Duration::from_millis(200);

/// Servers.
#[derive(Subcommand)]
pub enum ServerCommand {
    /// List servers.
    List,
    /// Show one server.
    Show {
        /// Name or id.
        server: String,
    },
    /// Make a server.
    Create(CreateArgs),
    /// Delete servers and wait until nothing is left of them.
    Delete {
        /// Names or ids.
        #[arg(required = true)]
        servers: Vec<String>,
    },
    /// Start a stopped server.
    Start {
        /// Name or id.
        server: String,
    },
    /// Stop a running server; its disk is kept.
    Stop {
        /// Name or id.
        server: String,
    },
    /// Reboot a server.
    Reboot {
        /// Name or id.
        server: String,
    },
    /// Print the console log.
    Log {
        /// Name or id.
        server: String,
        /// Only the last lines.
        #[arg(long)]
        lines: Option<u32>,
    },
    /// Attach the serial console (leave with Ctrl-]).
    Console {
        /// Name or id.
        server: String,
    },
}

/// What a server is made of.
#[derive(Args, Clone)]
pub struct CreateArgs {
    /// Name.
    pub name: String,
    /// Image, by name or id.
    #[arg(long)]
    pub image: String,
    /// The rest.
    #[command(flatten)]
    pub options: CreateOptions,
    /// Don't wait until it runs.
    #[arg(long)]
    pub no_wait: bool,
}

/// What has a default.
#[derive(Args, Clone)]
pub struct CreateOptions {
    /// Flavor, by name or id.
    #[arg(long, default_value = "m1.tiny")]
    pub flavor: String,
    /// Network, by name or id; may be given several times. Default: the only one there is.
    #[arg(long = "network")]
    pub networks: Vec<String>,
    /// Name of a key pair to inject.
    #[arg(long)]
    pub key_name: Option<String>,
    /// Availability zone.
    #[arg(long)]
    pub availability_zone: Option<String>,
    /// File with user data.
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<std::path::PathBuf>,
    /// Metadata, such as mote:restart_policy=on-failure.
    #[arg(long = "property", value_name = "KEY=VALUE")]
    pub properties: Vec<String>,
    /// How long to wait until it runs, in seconds.
    #[arg(long, default_value_t = 120)]
    pub timeout: u64,
}

/// `mote server …`.
pub async fn run(global: &Global, command: ServerCommand) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    match command {
        ServerCommand::List => {
            let rows = client.list(Service::Compute, "/servers/detail", "servers").await?;
            let rows: Vec<Value> = rows.into_iter().map(with_addresses).collect();
            let columns =
                [("ID", "id"), ("NAME", "name"), ("STATUS", "status"), ("ADDRESSES", "mote_addresses")];
            output::list(global.json, &rows, &columns);
        }
        ServerCommand::Show { server } => output::show(global.json, &resolve(&client, &server).await?),
        ServerCommand::Create(args) => {
            let id = create(&client, &args.name, &args.image, &args.options).await?;
            let server = if args.no_wait {
                get(&client, &id).await?.context("the server is gone already")?
            } else {
                wait_active(&client, &id, args.options.timeout).await?
            };
            output::show(global.json, &server);
        }
        ServerCommand::Delete { servers } => {
            for server in servers {
                let id = id_of(&resolve(&client, &server).await?)?;
                delete(&client, &id).await?;
            }
        }
        ServerCommand::Start { server } => {
            action(&client, &server, json!({"os-start": null}), "ACTIVE").await?
        }
        ServerCommand::Stop { server } => {
            action(&client, &server, json!({"os-stop": null}), "SHUTOFF").await?
        }
        ServerCommand::Reboot { server } => {
            action(&client, &server, json!({"reboot": {"type": "HARD"}}), "ACTIVE").await?;
        }
        ServerCommand::Log { server, lines } => {
            let id = id_of(&resolve(&client, &server).await?)?;
            print!("{}", log(&client, &id, lines).await?);
        }
        ServerCommand::Console { server } => {
            let id = id_of(&resolve(&client, &server).await?)?;
            console::attach(&client, &id).await?;
        }
    }
    Ok(())
}

/// Asks for a server and gives its id.
pub async fn create(
    client: &Client,
    name: &str,
    image: &str,
    options: &CreateOptions,
) -> anyhow::Result<String> {
    let image = client.resolve(Service::Image, "/v2/images", "images", image).await?;
    let flavor = client.resolve(Service::Compute, "/flavors", "flavors", &options.flavor).await?;
    let mut server = json!({"name": name, "imageRef": image["id"], "flavorRef": flavor["id"]});
    let mut networks = Vec::new();
    for network in &options.networks {
        let network = client.resolve(Service::Network, "/v2.0/networks", "networks", network).await?;
        networks.push(json!({"uuid": network["id"]}));
    }
    if !networks.is_empty() {
        server["networks"] = Value::Array(networks);
    }
    if let Some(key) = &options.key_name {
        server["key_name"] = json!(key);
    }
    if let Some(zone) = &options.availability_zone {
        server["availability_zone"] = json!(zone);
    }
    if let Some(path) = &options.user_data {
        let data = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        server["user_data"] = json!(BASE64.encode(data));
    }
    for property in &options.properties {
        let (key, value) =
            property.split_once('=').with_context(|| format!("--property {property:?} is not KEY=VALUE"))?;
        server["metadata"][key] = json!(value);
    }
    let answer = client.post(Service::Compute, "/servers", json!({"server": server})).await?;
    id_of(&answer["server"])
}

/// Waits until a server is ACTIVE; an ERROR becomes an error with the server's fault.
pub async fn wait_active(client: &Client, id: &str, timeout_s: u64) -> anyhow::Result<Value> {
    let bar = output::spinner("asking for the server");
    let deadline = Instant::now() + Duration::from_secs(timeout_s);
    loop {
        let server = get(client, id).await?.context("the server was deleted while it was being made")?;
        match server["status"].as_str().unwrap_or_default() {
            "ACTIVE" => {
                bar.finish_and_clear();
                return Ok(server);
            }
            "ERROR" => bail!(
                "server {id} is in ERROR: {}",
                server["fault"]["message"].as_str().unwrap_or("no reason is given")
            ),
            status => bar
                .set_message(format!("{status} {}", server["OS-EXT-STS:task_state"].as_str().unwrap_or(""))),
        }
        if Instant::now() > deadline {
            bail!(
                "server {id} is still {} after {timeout_s} s (see `mote server show {id}`)",
                server["status"]
            );
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// Deletes a server and waits until it is gone.
pub async fn delete(client: &Client, id: &str) -> anyhow::Result<()> {
    client.delete(Service::Compute, &format!("/servers/{id}")).await?;
    let bar = output::spinner(format!("deleting {id}"));
    let deadline = Instant::now() + Duration::from_secs(60);
    while get(client, id).await?.is_some() {
        if Instant::now() > deadline {
            bail!("server {id} is not gone after 60 s: is its host up? (see `mote host list`)");
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
    bar.finish_and_clear();
    Ok(())
}

/// The console log.
pub async fn log(client: &Client, id: &str, lines: Option<u32>) -> anyhow::Result<String> {
    let body = json!({"os-getConsoleOutput": {"length": lines}});
    let answer = client.post(Service::Compute, &format!("/servers/{id}/action"), body).await?;
    Ok(answer["output"].as_str().unwrap_or_default().to_owned())
}

async fn action(client: &Client, server: &str, body: Value, wanted: &str) -> anyhow::Result<()> {
    let id = id_of(&resolve(client, server).await?)?;
    client.post(Service::Compute, &format!("/servers/{id}/action"), body).await?;
    let bar = output::spinner(format!("waiting for {wanted}"));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let server = get(client, &id).await?.context("the server is gone")?;
        if server["status"] == wanted && server["OS-EXT-STS:task_state"].is_null() {
            bar.finish_and_clear();
            return Ok(());
        }
        if server["status"] == "ERROR" {
            bail!(
                "server {id} is in ERROR: {}",
                server["fault"]["message"].as_str().unwrap_or("no reason is given")
            );
        }
        if Instant::now() > deadline {
            bail!("server {id} is {} and not {wanted} after 60 s", server["status"]);
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

async fn get(client: &Client, id: &str) -> anyhow::Result<Option<Value>> {
    Ok(client
        .find(Service::Compute, &format!("/servers/{id}"))
        .await?
        .map(|mut answer| answer["server"].take()))
}

async fn resolve(client: &Client, server: &str) -> anyhow::Result<Value> {
    client.resolve(Service::Compute, "/servers/detail", "servers", server).await
}

fn id_of(server: &Value) -> anyhow::Result<String> {
    Ok(server["id"].as_str().context("the answer has no id")?.to_owned())
}

/// Adds the addresses in one string, for the table.
fn with_addresses(mut server: Value) -> Value {
    let mut found = Vec::new();
    for (network, addresses) in server["addresses"].as_object().into_iter().flatten() {
        let addresses: Vec<&str> =
            addresses.as_array().into_iter().flatten().filter_map(|a| a["addr"].as_str()).collect();
        found.push(format!("{network}={}", addresses.join(",")));
    }
    server["mote_addresses"] = json!(found.join(" "));
    server
}
