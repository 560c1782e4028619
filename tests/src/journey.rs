//! The whole life of a server by REST: token → image → network → server → ACTIVE → console → ping and page through the
//! tenant network → delete → nothing is left.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mote::client::{Client, Service};
use serde_json::{Value, json};

use crate::{place::Place, steps::Steps};

/// An image made of files.
#[derive(Debug, Clone)]
pub struct ImageFiles {
    /// Name in the cloud.
    pub name: String,
    /// Root disk.
    pub disk: PathBuf,
    /// Kernel; none for a whole disk that brings its own.
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk.
    pub ramdisk: Option<PathBuf>,
    /// Properties such as `os_command_line`.
    pub properties: Vec<(String, String)>,
}

impl ImageFiles {
    /// The conformance guest as a server; its empty disk is made in `scratch`.
    ///
    /// # Errors
    /// If the disk can't be made.
    pub fn guest(name: &str, guest: &Path, scratch: &Path) -> anyhow::Result<Self> {
        let disk = scratch.join("guest.raw");
        std::fs::write(&disk, vec![0; 1 << 20]).context("making a disk")?;
        let properties = vec![("os_command_line".into(), "mote.serve".into())];
        Ok(Self { name: name.into(), disk, kernel: Some(guest.into()), ramdisk: None, properties })
    }

    /// What `mote-image` made in a directory.
    ///
    /// # Errors
    /// If there is no complete image.
    pub fn bundle(name: &str, dir: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(dir.join("image.json"))
            .with_context(|| format!("reading {}/image.json", dir.display()))?;
        let bundle: Value = serde_json::from_slice(&text).context("reading image.json")?;
        let file = |key: &str| {
            bundle[key].as_str().map(|f| dir.join(f)).with_context(|| format!("image.json names no {key}"))
        };
        let properties = bundle["properties"].as_object().into_iter().flatten();
        Ok(Self {
            name: name.into(),
            disk: file("disk")?,
            kernel: Some(file("kernel")?),
            ramdisk: Some(file("ramdisk")?),
            properties: properties.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().into())).collect(),
        })
    }
}

/// What to travel with.
#[derive(Debug, Clone)]
pub struct Journey {
    /// Flavor's name.
    pub flavor: String,
    /// Id of the image.
    pub image_id: String,
    /// Where its host is.
    pub place: Place,
    /// Zone that leads there.
    pub zone: Option<String>,
    /// Directories in which the host may leave files.
    pub dirs: Vec<String>,
    /// What the console shows when the guest is ready.
    pub console_mark: String,
    /// Limit for each thing that a guest does.
    pub patience: Duration,
    /// File of an SSH key whose public half is `<file>.pub`, to log in with as root.
    pub ssh_key: Option<PathBuf>,
}

/// A server with its network.
#[derive(Debug, Clone)]
pub struct Server {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Its network's id.
    pub network_id: String,
    /// Its first address.
    pub address: String,
}

/// Uploads an image unless the cloud has one of this name.
pub async fn image(client: &Client, files: &ImageFiles) -> anyhow::Result<String> {
    let found = client.list(Service::Image, &format!("/v2/images?name={}", files.name), "images").await?;
    if let Some(image) = found.first() {
        return id_of(image);
    }
    let mut body = json!({"name": files.name, "disk_format": "raw", "container_format": "bare"});
    for (key, value) in &files.properties {
        body[key] = json!(value);
    }
    if let Some(kernel) = &files.kernel {
        let record = json!({"name": format!("{}-kernel", files.name), "disk_format": "aki", "container_format": "aki"});
        body["kernel_id"] = json!(upload(client, record, kernel).await?);
    }
    if let Some(ramdisk) = &files.ramdisk {
        let record = json!({"name": format!("{}-ramdisk", files.name), "disk_format": "ari", "container_format": "ari"});
        body["ramdisk_id"] = json!(upload(client, record, ramdisk).await?);
    }
    upload(client, body, &files.disk).await
}

async fn upload(client: &Client, record: Value, file: &PathBuf) -> anyhow::Result<String> {
    let id = id_of(&client.post(Service::Image, "/v2/images", record).await?)?;
    let handle = tokio::fs::File::open(file).await.with_context(|| format!("opening {}", file.display()))?;
    let request = client
        .request(reqwest::Method::PUT, Service::Image, &format!("/v2/images/{id}/file"))?
        .header("Content-Type", "application/octet-stream")
        .body(handle);
    client.send(request).await.with_context(|| format!("uploading {}", file.display()))?;
    Ok(id)
}

/// Makes a network with one subnet and gives its id.
pub async fn network(client: &Client, name: &str, cidr: &str) -> anyhow::Result<String> {
    let answer = client.post(Service::Network, "/v2.0/networks", json!({"network": {"name": name}})).await?;
    let id = id_of(&answer["network"])?;
    let subnet = json!({"subnet": {"network_id": id, "ip_version": 4, "cidr": cidr}});
    client.post(Service::Network, "/v2.0/subnets", subnet).await?;
    open(client).await?;
    Ok(id)
}

/// Lets ICMP and TCP in: the default group lets in nothing but what its members send.
async fn open(client: &Client) -> anyhow::Result<()> {
    let groups =
        client.list(Service::Network, "/v2.0/security-groups?name=default", "security_groups").await?;
    for group in &groups {
        let id = id_of(group)?;
        for protocol in ["icmp", "tcp"] {
            let there = format!(
                "/v2.0/security-group-rules?security_group_id={id}&direction=ingress&protocol={protocol}"
            );
            if client.list(Service::Network, &there, "security_group_rules").await?.is_empty() {
                let rule = json!({"security_group_rule": {"security_group_id": id, "direction": "ingress",
                                                          "protocol": protocol}});
                client.post(Service::Network, "/v2.0/security-group-rules", rule).await?;
            }
        }
    }
    Ok(())
}

impl Journey {
    /// With the conformance guest on this machine.
    pub fn guest(image_id: String, dirs: Vec<String>) -> Self {
        Self {
            flavor: "m1.nano".into(),
            image_id,
            place: Place::Here,
            zone: None,
            dirs,
            console_mark: "mote-guest: serving on".into(),
            patience: Duration::from_secs(60),
            ssh_key: None,
        }
    }

    /// Asks for a server on a network and waits until it is ACTIVE.
    pub async fn server(
        &self,
        client: &Client,
        name: &str,
        network_id: &str,
        more: Value,
    ) -> anyhow::Result<Server> {
        let flavor = client.resolve(Service::Compute, "/flavors", "flavors", &self.flavor).await?;
        let mut body = json!({"name": name, "imageRef": self.image_id, "flavorRef": flavor["id"],
                              "networks": [{"uuid": network_id}]});
        if let Some(zone) = &self.zone {
            body["availability_zone"] = json!(zone);
        }
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let id = id_of(&client.post(Service::Compute, "/servers", json!({"server": body})).await?["server"])?;
        let server = self.wait_status(client, &id, "ACTIVE").await?;
        let address = server["addresses"]
            .as_object()
            .and_then(|networks| networks.values().next())
            .and_then(|addresses| addresses[0]["addr"].as_str())
            .context("the server has no address")?
            .to_owned();
        Ok(Server { id, name: name.to_owned(), network_id: network_id.to_owned(), address })
    }

    /// Waits for a status; ERROR ends the wait.
    pub async fn wait_status(&self, client: &Client, id: &str, wanted: &str) -> anyhow::Result<Value> {
        let deadline = Instant::now() + self.patience;
        loop {
            let answer = client.get(Service::Compute, &format!("/servers/{id}")).await?;
            let server = &answer["server"];
            match server["status"].as_str() {
                Some(status) if status == wanted => return Ok(server.clone()),
                Some("ERROR") => bail!("server {id} is in ERROR: {}", server["fault"]["message"]),
                status if Instant::now() > deadline => {
                    bail!("server {id} is {status:?}, not {wanted}, after {:?}", self.patience)
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until the console shows the mark of a guest that is ready, and gives that line.
    pub async fn wait_console(&self, client: &Client, server: &Server) -> anyhow::Result<String> {
        let deadline = Instant::now() + self.patience;
        loop {
            let log = console(client, &server.id).await?;
            if let Some(line) = log.lines().find(|l| l.contains(&self.console_mark)) {
                return Ok(line.trim().to_owned());
            }
            if Instant::now() > deadline {
                bail!(
                    "the console of {} never showed {:?}; it shows:\n{log}",
                    server.name,
                    self.console_mark
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Pings the server from inside its network.
    pub fn ping(&self, server: &Server) -> anyhow::Result<String> {
        let namespace = self.namespace(server)?;
        let output = self
            .place
            .sh(&format!("ip netns exec {namespace} ping -n -c 3 -i 0.2 -W 5 {}", server.address))?;
        Ok(output.lines().last().unwrap_or_default().to_owned())
    }

    /// Fetches the server's page from inside its network; it must show the host name and the instance id.
    pub fn page(&self, server: &Server) -> anyhow::Result<String> {
        let namespace = self.namespace(server)?;
        let page = self.place.sh(&format!(
            "ip netns exec {namespace} curl -sS --noproxy '*' --max-time 20 --retry 5 --retry-connrefused http://{}/",
            server.address
        ))?;
        for wanted in [&server.name, &server.id] {
            if !page.contains(wanted.as_str()) {
                bail!("the page of {} doesn't show {wanted}:\n{page}", server.name);
            }
        }
        Ok(page)
    }

    fn namespace(&self, server: &Server) -> anyhow::Result<String> {
        self.place
            .namespace_of(&server.network_id)?
            .with_context(|| format!("network {} has no namespace", server.network_id))
    }

    /// Deletes a server and waits until it is gone.
    pub async fn delete(&self, client: &Client, server: &Server) -> anyhow::Result<()> {
        mote::commands::server::delete(client, &server.id).await
    }

    /// The whole way, printed step by step.
    pub async fn travel(&self, client: &Client, name: &str, steps: &mut Steps) -> anyhow::Result<()> {
        let before = rows(client).await?;
        let network_id = network(client, &format!("{name}-net"), "192.168.77.0/24").await?;
        steps.done("network and subnet 192.168.77.0/24 made");
        let mut more = json!({});
        if let Some(key) = &self.ssh_key {
            let public =
                std::fs::read_to_string(key.with_extension("pub")).context("reading the public key")?;
            let body = json!({"keypair": {"name": format!("{name}-key"), "public_key": public.trim()}});
            client.post(Service::Compute, "/os-keypairs", body).await?;
            more["key_name"] = json!(format!("{name}-key"));
        }
        let server = self.server(client, name, &network_id, more).await?;
        steps.done(format!("server {} is ACTIVE with address {}", server.id, server.address));
        let line = self.wait_console(client, &server).await?;
        steps.done(format!("its console says: {line}"));
        steps.done(format!("it answers ping through the tenant network: {}", self.ping(&server)?));
        let page = match self.page(&server) {
            Ok(page) => page,
            Err(error) => {
                let log =
                    console(client, &server.id).await.unwrap_or_else(|e| format!("(no console log: {e})"));
                return Err(error.context(format!("the console log of {}:\n{log}", server.name)));
            }
        };
        steps.done(format!(
            "its page: {}",
            page.lines().map(str::trim).filter(|l| !l.is_empty()).take(6).collect::<Vec<_>>().join(" | ")
        ));
        if let Some(key) = &self.ssh_key {
            let said = self.ssh(&server, key)?;
            steps.done(format!("it lets the key pair's owner in by SSH: {said}"));
            client.delete(Service::Compute, &format!("/os-keypairs/{name}-key")).await?;
        }
        self.delete(client, &server).await?;
        client.delete(Service::Network, &format!("/v2.0/networks/{network_id}")).await?;
        steps.done("server and network are deleted");
        let left = self.place.leftovers(&self.dirs, &server.id, Some(&network_id))?;
        if !left.is_empty() {
            bail!("something is left:\n{left}");
        }
        let after = rows(client).await?;
        if before != after {
            bail!("rows are left: {before:?} before, {after:?} after");
        }
        steps.done("no process, tap, bridge, namespace, file or row is left");
        Ok(())
    }

    fn ssh(&self, server: &Server, key: &Path) -> anyhow::Result<String> {
        let namespace = self.namespace(server)?;
        let output = self.place.sh(&format!(
            "cp {key} /run/mote-ssh-key && chmod 600 /run/mote-ssh-key && ip netns exec {namespace} ssh -i /run/mote-ssh-key \
             -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=60 -o LogLevel=ERROR \
             root@{address} 'echo I am $(hostname)'; s=$?; rm -f /run/mote-ssh-key; exit $s",
            key = key.display(),
            address = server.address,
        ))?;
        let said = output.trim().to_owned();
        if said != format!("I am {}", server.name) {
            bail!("by SSH it says {said:?}");
        }
        Ok(said)
    }
}

/// The console log of a server.
pub async fn console(client: &Client, server_id: &str) -> anyhow::Result<String> {
    mote::commands::server::log(client, server_id, None).await
}

/// How many of each resource there are.
pub async fn rows(client: &Client) -> anyhow::Result<Vec<(&'static str, usize)>> {
    let mut counts = Vec::new();
    for (service, path, name) in [
        (Service::Compute, "/servers?all_tenants=1", "servers"),
        (Service::Compute, "/os-keypairs", "keypairs"),
        (Service::Network, "/v2.0/networks", "networks"),
        (Service::Network, "/v2.0/subnets", "subnets"),
        (Service::Network, "/v2.0/ports", "ports"),
    ] {
        counts.push((name, client.list(service, path, name).await?.len()));
    }
    Ok(counts)
}

/// The id in a resource.
pub fn id_of(resource: &Value) -> anyhow::Result<String> {
    Ok(resource["id"].as_str().with_context(|| format!("no id in {resource}"))?.to_owned())
}
