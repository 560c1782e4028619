//! Fills the database of a bootstrapped controller for the benchmark `mote-bench api`: hosts, servers with ports, users and
//! images as rows, in the administrator's project. Prints as JSON what the benchmark asks for.

use std::path::PathBuf;

use anyhow::Context;
use mote_controller::db::{self, Conn, now_us};
use uuid::Uuid;

/// Hosts that the servers are spread over.
const HOSTS: u32 = 100;
/// Servers of one network.
const SERVERS_OF_NETWORK: u32 = 100;
/// Networks without a server yet.
const EMPTY_NETWORKS: u32 = 20;
/// Hosts count as seen until then: a day ahead.
const SEEN_AHEAD_US: i64 = 86_400_000_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: fill_database STATE_DIR SERVERS USERS IMAGES";
    let dir: PathBuf = arguments.next().context(usage)?.into();
    let mut number = || -> anyhow::Result<u32> { Ok(arguments.next().context(usage)?.parse()?) };
    let (servers, users, images) = (number()?, number()?, number()?);
    let database = std::env::var("MOTE_DATABASE").ok();
    let pools = db::open(&dir, database.as_deref()).await?;
    let mut tx = db::begin_immediate(&pools.write).await?;
    let project: String = sqlx::query_scalar("SELECT id FROM projects WHERE name = 'admin'")
        .fetch_one(&mut *tx)
        .await
        .context("bootstrap first")?;
    for index in 0..users {
        user(&mut tx, index).await?;
    }
    for index in 0..images {
        image(&mut tx, &project, index).await?;
    }
    let mut hosts = Vec::new();
    for index in 0..HOSTS {
        hosts.push(host(&mut tx, index).await?);
    }
    let (mut last, mut subnet) = (String::new(), None);
    for index in 0..servers {
        let place = index % SERVERS_OF_NETWORK;
        if place == 0 {
            subnet = Some(network(&mut tx, &project, index / SERVERS_OF_NETWORK).await?);
        }
        let (network, subnet) = subnet.as_ref().context("a network is made first")?;
        last = server(&mut tx, &project, &hosts[(index % HOSTS) as usize], index).await?;
        port(&mut tx, &project, (network, subnet), &last, index).await?;
    }
    let mut empty = Vec::new();
    for index in 0..EMPTY_NETWORKS {
        empty.push(network(&mut tx, &project, servers / SERVERS_OF_NETWORK + 1 + index).await?.0);
    }
    let bootable = bootable(&mut tx, &project).await?;
    tx.commit().await?;
    println!("{}", serde_json::json!({"server": last, "image": bootable, "networks": empty}));
    Ok(())
}

async fn host(tx: &mut Conn, index: u32) -> anyhow::Result<String> {
    let id = Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO hosts (id, number, name, availability_zone, own_zone, secret_hash, vcpus, memory_mib, disk_gib, kernel,
             version, traits, last_seen_us, created_us, tunnel_ip)
         VALUES ($1, $2, $3, 'nova', 'nova', '', 1000, 1000000, 100000, '', '', '[]', $4, $5, $6)",
    )
    .bind(&id)
    .bind(i64::from(index) + 1)
    .bind(format!("bench-host-{index}"))
    .bind(now_us() + SEEN_AHEAD_US)
    .bind(now_us())
    .bind(format!("192.0.2.{}", index + 1))
    .execute(tx)
    .await?;
    Ok(id)
}

/// A network with a subnet: their ids.
async fn network(tx: &mut Conn, project: &str, index: u32) -> anyhow::Result<(String, String)> {
    let (id, subnet) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    sqlx::query(
        "INSERT INTO networks (id, project_id, name, description, shared, mtu, created_us, updated_us,
             segmentation_id)
         VALUES ($1, $2, $3, '', FALSE, 1450, $4, $4, $5)",
    )
    .bind(&id)
    .bind(project)
    .bind(format!("bench-network-{index}"))
    .bind(now_us())
    .bind(i64::from(index) + 100_000)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "INSERT INTO subnets (id, network_id, project_id, name, description, cidr, gateway_ip, enable_dhcp,
             dns_nameservers, host_routes, allocation_pools, next_ip, created_us, updated_us)
         VALUES ($1, $2, $3, '', '', '10.0.0.0/16', '10.0.0.1', TRUE, '[]', '[]',
             '[{\"start\":\"10.0.0.2\",\"end\":\"10.0.255.254\"}]', $4, $5, $5)",
    )
    .bind(&subnet)
    .bind(&id)
    .bind(project)
    .bind(FIRST_IP)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok((id, subnet))
}

/// 10.0.0.2 as a number.
const FIRST_IP: i64 = 0x0a00_0002;

async fn port(
    tx: &mut Conn,
    project: &str,
    (network, subnet): (&str, &str),
    server: &str,
    index: u32,
) -> anyhow::Result<()> {
    let id = Uuid::new_v4().to_string();
    let [_, a, b, c] = index.to_be_bytes();
    sqlx::query(
        "INSERT INTO ports (id, network_id, project_id, name, description, mac_address, device_id, device_owner,
             server_id, made_by_server, created_us, updated_us)
         VALUES ($1, $2, $3, '', '', $4, $5, 'compute:nova', $5, TRUE, $6, $6)",
    )
    .bind(&id)
    .bind(network)
    .bind(project)
    .bind(format!("fa:16:3e:{a:02x}:{b:02x}:{c:02x}"))
    .bind(server)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    let place = i64::from(index % SERVERS_OF_NETWORK);
    sqlx::query(
        "INSERT INTO fixed_ips (subnet_id, ip, port_id, position, address) VALUES ($1, $2, $3, 0, $4)",
    )
    .bind(subnet)
    .bind(FIRST_IP + place)
    .bind(&id)
    .bind(format!("10.0.0.{}", place + 2))
    .execute(tx)
    .await?;
    Ok(())
}

/// An image that servers can be made of, as far as the database tells: there are no bytes.
async fn bootable(tx: &mut Conn, project: &str) -> anyhow::Result<String> {
    let mut ids = Vec::new();
    for format in ["aki", "raw"] {
        let id = Uuid::new_v4().to_string();
        sqlx::query(
            "INSERT INTO images (id, owner, name, status, visibility, protected, hidden, disk_format,
                 container_format, min_disk_gib, min_ram_mib, created_us, updated_us, size, sha256, sha512, md5)
             VALUES ($1, $2, 'bench-boot', 'active', 'private', FALSE, FALSE, $3, 'bare', 0, 0, $4, $4, 4096, $5,
                 '', '')",
        )
        .bind(&id)
        .bind(project)
        .bind(format)
        .bind(now_us())
        .bind(format!("{:064x}", ids.len() + 1))
        .execute(&mut *tx)
        .await?;
        ids.push(id);
    }
    sqlx::query("INSERT INTO image_properties (image_id, name, value) VALUES ($1, 'kernel_id', $2)")
        .bind(&ids[1])
        .bind(&ids[0])
        .execute(tx)
        .await?;
    Ok(ids.remove(1))
}

async fn user(tx: &mut Conn, index: u32) -> anyhow::Result<()> {
    sqlx::query("INSERT INTO users (id, domain_id, name) VALUES ($1, 'default', $2)")
        .bind(Uuid::new_v4().simple().to_string())
        .bind(format!("bench-user-{index}"))
        .execute(tx)
        .await?;
    Ok(())
}

async fn image(tx: &mut Conn, project: &str, index: u32) -> anyhow::Result<()> {
    sqlx::query(
        "INSERT INTO images (id, owner, name, status, visibility, protected, hidden, disk_format, container_format,
             min_disk_gib, min_ram_mib, created_us, updated_us)
         VALUES ($1, $2, $3, 'queued', 'private', FALSE, FALSE, 'raw', 'bare', 0, 0, $4, $4)",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(project)
    .bind(format!("bench-image-{index}"))
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

async fn server(tx: &mut Conn, project: &str, host: &str, index: u32) -> anyhow::Result<String> {
    let id = Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index, availability_zone,
             desired_power, run_generation, changed_generation, vm_state, created_us, updated_us, launched_us,
             host_id)
         VALUES ($1, $2, 'u', $3, $3, '1', 'm1.small', 1, 512, 5, 5, 'i', '{}', '{\"role\":\"bench\"}', 'never', 0,
             'nova', 'running', 1, 1, 'active', $4, $4, $4, $5)",
    )
    .bind(&id)
    .bind(project)
    .bind(format!("bench-server-{index}"))
    .bind(now_us())
    .bind(host)
    .execute(tx)
    .await?;
    Ok(id)
}
