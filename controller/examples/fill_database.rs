//! Fills the database of a bootstrapped controller for the benchmark `mote-bench api`: servers, users and images as rows,
//! in the administrator's project. Prints the id of one server.

use std::path::PathBuf;

use anyhow::Context;
use mote_controller::db::{self, Conn, now_us};
use uuid::Uuid;

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
    let mut last = String::new();
    for index in 0..servers {
        last = server(&mut tx, &project, index).await?;
    }
    tx.commit().await?;
    println!("{last}");
    Ok(())
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

async fn server(tx: &mut Conn, project: &str, index: u32) -> anyhow::Result<String> {
    let id = Uuid::new_v4().to_string();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index, availability_zone,
             desired_power, run_generation, changed_generation, vm_state, created_us, updated_us, launched_us)
         VALUES ($1, $2, 'u', $3, $3, '1', 'm1.small', 1, 512, 5, 5, 'i', '{}', '{\"role\":\"bench\"}', 'never', 0,
             'nova', 'running', 1, 1, 'active', $4, $4, $4)",
    )
    .bind(&id)
    .bind(project)
    .bind(format!("bench-server-{index}"))
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(id)
}
