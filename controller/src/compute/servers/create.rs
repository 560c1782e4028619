//! `POST /servers`: everything that is read and written is in one transaction, so that two requests can't both take the
//! last of a quota, of a host or of a network's addresses.

use crate::db::Conn;
use std::collections::BTreeMap;

use axum::{Json, extract::State};
use http::{HeaderName, StatusCode, header};
use mote_host_api::{BootSpec, ImageSpec};
use serde_json::{Value, json};

use uuid::Uuid;

use super::{
    super::{
        flavors::{self, Flavor},
        keypairs,
        quotas::{self, Resource},
        server_groups::Company,
        state::{TaskState, VmState},
        versions::Version,
    },
    input::{self, Nics, Place, Wanted},
    local, row, view,
};
use crate::{
    app::App,
    db::now_us,
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError, json::JsonBody},
    image::{self, BootImages, ImageBytes},
    network::{
        networks,
        ports::server::{self as nics, NicWish, PluggedServer},
    },
    scheduler::{self, HostView, Resources, Rng, Rules},
};

/// Longest label of a host name (RFC 1035).
const MAX_HOSTNAME: usize = 63;
/// Longest id of a flavor, as in Nova.
const MAX_FLAVOR_ID: usize = 255;
const GIB: u64 = 1 << 30;
/// The fault of a server that no host takes, as in Nova.
const NO_VALID_HOST: i64 = 500;

/// What all servers of one request have in common.
struct Plan<'a> {
    ctx: &'a Ctx,
    project: &'a str,
    wanted: &'a Wanted,
    flavor: Flavor,
    image_id: String,
    boot: String,
    disk_claim_gib: i64,
    /// Those beside the root disk, JSON; and the number of the last one.
    local_disks: (String, i64),
    public_key: Option<String>,
    metadata: String,
    restart_policy: &'static str,
    nics: Vec<NicWish>,
    request: scheduler::Request,
    security_groups: Vec<String>,
    /// The flavor's, JSON.
    extra_specs: String,
    company: Company,
    /// Of all servers of the request.
    reservation_id: String,
}

/// The handler.
pub(super) async fn create(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<Value>), ApiError> {
    ctx.require_writer()?;
    let wanted = input::parse(body, version)?;
    let mut tx = app.begin().await?;
    let mut plan = prepare(&mut tx, &ctx, &wanted).await?;
    let count = within_quota(&mut tx, &plan).await?;
    nics::check(&mut tx, &ctx, &plan.nics, usize::try_from(count).map_err(ApiError::internal)?).await?;
    let mut views = hosts::views(&mut tx).await?;
    plan.company = Company::read(&mut tx, &ctx, &wanted).await?;
    let rules = Rules { policy: hosts::policy(&mut tx).await?, ..Rules::default() };
    let mut rng = Rng::seeded(u64::from_le_bytes(random()?));
    let mut touched: Vec<Touched> = Vec::new();
    let mut first = None;
    for index in 0..count {
        let name = match count {
            1 => wanted.name.clone(),
            _ => format!("{}-{}", wanted.name, index + 1),
        };
        let chosen = choose(&plan, &mut views, &rules, &mut rng);
        let one = One { id: Uuid::new_v4().to_string(), name, launch_index: index };
        let host = chosen.as_ref().ok().map(|host| host.id.to_string());
        touched.extend(insert(&mut tx, &plan, &one, chosen).await?);
        plan.company.join(&mut tx, &one.id, host.as_deref()).await?;
        row::add_tags(&mut tx, &one.id, &wanted.tags).await?;
        row::record_action(&mut tx, &ctx, &one.id, "create").await?;
        first.get_or_insert(one.id);
    }
    let id = first.ok_or_else(|| ApiError::internal("a request for no server passed the checks"))?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    if wanted.return_reservation_id {
        let answer = json!({"reservation_id": plan.reservation_id});
        return Ok((StatusCode::ACCEPTED, [(header::LOCATION, view::url(&app, &id))], Json(answer)));
    }
    let (links, location) = (view::links(&app, &id), view::url(&app, &id));
    let server = json!({
        "id": id, "links": links, "OS-DCF:diskConfig": wanted.disk_config.word(),
        "security_groups": group_names(&wanted.security_groups),
    });
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(json!({"server": server}))))
}

/// The groups as the answer repeats them.
fn group_names(asked: &[String]) -> Value {
    match asked {
        [] => json!([{"name": "default"}]),
        names => names.iter().map(|name| json!({ "name": name })).collect(),
    }
}

/// Bytes of the kernel's random numbers.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ApiError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(bytes)
}

async fn prepare<'a>(tx: &mut Conn, ctx: &'a Ctx, wanted: &'a Wanted) -> Result<Plan<'a>, ApiError> {
    let project = ctx.require_project()?;
    let flavor = flavor(tx, ctx, &wanted.flavor_id).await?;
    let images = match image::image_for_boot(tx, &wanted.image_id, ctx).await {
        Err(ApiError::NotFound(text)) => return Err(ApiError::BadRequest(format!("imageRef: {text}."))),
        other => other?,
    };
    let disk_claim_gib = fits(&flavor, &images)?;
    let local_disks = local::of_request(&flavor, &wanted.local_disks)?;
    check_place(tx, ctx, &wanted.place).await?;
    let public_key = match &wanted.key_name {
        None => None,
        Some(name) => Some(public_key(tx, ctx, name).await?),
    };
    let amount = |stored: i64| u64::try_from(stored).unwrap_or(0);
    let extra_specs = flavors::extra_specs(tx, &flavor.id).await?;
    let mut request = needs(&extra_specs)?;
    request.required_traits.extend(images.required_traits.iter().cloned());
    request.forbidden_traits.extend(images.forbidden_traits.iter().cloned());
    request.resources = Resources {
        vcpus: amount(flavor.vcpus),
        memory_mib: amount(flavor.memory_mib),
        disk_gib: amount(disk_claim_gib),
    };
    request.zone.clone_from(&wanted.place.zone);
    request.host.clone_from(&wanted.place.host);
    Ok(Plan {
        ctx,
        project,
        wanted,
        image_id: images.disk.id.clone(),
        boot: serde_json::to_string(&boot_spec(images)).map_err(ApiError::internal)?,
        extra_specs: serde_json::to_string(&extra_specs).map_err(ApiError::internal)?,
        flavor,
        disk_claim_gib,
        local_disks: (
            serde_json::to_string(&local_disks).map_err(ApiError::internal)?,
            local::last(1, &local_disks),
        ),
        public_key,
        metadata: serde_json::to_string(&wanted.metadata).map_err(ApiError::internal)?,
        restart_policy: input::restart_policy(&wanted.metadata)?,
        nics: nic_wishes(tx, project, &wanted.nics).await?,
        request,
        security_groups: nics::group_ids(tx, ctx, &wanted.security_groups).await?,
        company: Company::default(),
        reservation_id: format!("r-{}", hex::encode(random::<4>()?)),
    })
}

/// The public key of the asker's key pair of that name.
pub(super) async fn public_key(tx: &mut Conn, ctx: &Ctx, name: &str) -> Result<String, ApiError> {
    let found = keypairs::find(tx, &ctx.user_id, name).await?;
    let refused =
        || ApiError::BadRequest(format!("Invalid key_name provided: there is no key pair {name:?}."));
    Ok(found.ok_or_else(refused)?.public_key)
}

/// The flavor that a request names.
pub(super) async fn flavor(tx: &mut Conn, ctx: &Ctx, id: &str) -> Result<Flavor, ApiError> {
    let id: String = id.chars().take(MAX_FLAVOR_ID).collect();
    flavors::usable(tx, ctx, &id).await.map_err(|error| match error {
        ApiError::NotFound(text) => ApiError::BadRequest(format!("flavorRef: {text}")),
        other => other,
    })
}

/// What a flavor's extra specs ask of a host: traits (`trait:NAME`) and aggregates (`aggregate_instance_extra_specs:KEY`).
pub(super) fn needs(extra_specs: &BTreeMap<String, String>) -> Result<scheduler::Request, ApiError> {
    let mut request = scheduler::Request::default();
    for (key, value) in extra_specs {
        if let Some(key) = key.strip_prefix("aggregate_instance_extra_specs:") {
            request.aggregate_specs.insert(key.to_owned(), value.clone());
        }
        let Some(name) = key.strip_prefix("trait:") else { continue };
        match value.as_str() {
            "required" => request.required_traits.insert(name.to_owned()),
            "forbidden" => request.forbidden_traits.insert(name.to_owned()),
            _ => {
                let text = format!("The flavor's extra spec {key} is neither required nor forbidden.");
                return Err(ApiError::BadRequest(text));
            }
        };
    }
    Ok(request)
}

/// Whole GiB that so many bytes need.
pub(super) fn gib(bytes: u64) -> Result<i64, ApiError> {
    i64::try_from(bytes.div_ceil(GIB)).map_err(ApiError::internal)
}

/// Whether the image fits into the flavor; gives the GiB of disk that the server may come to use.
pub(super) fn fits(flavor: &Flavor, images: &BootImages) -> Result<i64, ApiError> {
    let refused = |text: &str| Err(ApiError::BadRequest(text.into()));
    let (memory, disk) =
        (u64::try_from(flavor.memory_mib).unwrap_or(0), u64::try_from(flavor.disk_gib).unwrap_or(0));
    if memory < images.min_ram_mib {
        return refused("Flavor's memory is too small for requested image.");
    }
    let needed = images.disk.size.div_ceil(GIB).max(images.min_disk_gib);
    if disk > 0 && disk < needed {
        return refused("Flavor's disk is too small for requested image.");
    }
    let root = i64::try_from(disk.max(needed)).map_err(ApiError::internal)?;
    Ok(root.saturating_add(flavor.local_gib()))
}

/// What a host is told of an image that is booted.
pub(super) fn boot_spec(images: BootImages) -> BootSpec {
    let spec = |bytes: ImageBytes| ImageSpec { sha256: bytes.sha256, size: bytes.size };
    BootSpec {
        disk: spec(images.disk),
        kernel: images.kernel.map(spec),
        ramdisk: images.ramdisk.map(spec),
        command_line: images.command_line,
    }
}

async fn check_place(tx: &mut Conn, ctx: &Ctx, place: &Place) -> Result<(), ApiError> {
    if place.host.is_some() && !ctx.is_admin {
        return Err(ApiError::Forbidden(
            "Policy does not allow to choose a host: the role admin is needed.".into(),
        ));
    }
    if let Some(zone) = &place.zone {
        let known: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM hosts WHERE availability_zone = $1)")
                .bind(zone)
                .fetch_one(&mut *tx)
                .await?;
        if !known {
            return Err(input::invalid(
                "availability_zone",
                &zone.as_str().into(),
                "is not an availability zone here",
            ));
        }
    }
    if let Some(host) = &place.host {
        let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM hosts WHERE name = $1)")
            .bind(host)
            .fetch_one(&mut *tx)
            .await?;
        if !known {
            return Err(input::invalid("availability_zone", &host.as_str().into(), "is not a host here"));
        }
    }
    Ok(())
}

async fn nic_wishes(tx: &mut Conn, project: &str, nics: &Nics) -> Result<Vec<NicWish>, ApiError> {
    match nics {
        Nics::None => Ok(Vec::new()),
        Nics::These(wishes) => Ok(wishes.clone()),
        Nics::Auto => Ok(vec![only_network(tx, project).await?]),
        Nics::Any if networks::usable(tx, project).await?.is_empty() => Ok(Vec::new()),
        Nics::Any => Ok(vec![only_network(tx, project).await?]),
    }
}

/// A NIC on the only network that the project has.
pub(super) async fn only_network(tx: &mut Conn, project: &str) -> Result<NicWish, ApiError> {
    match networks::usable(tx, project).await?.as_slice() {
        [one] => Ok(NicWish::Network { id: one.id.clone(), fixed_ip: None }),
        [] => Err(ApiError::BadRequest(
            "networks: the project has no network; make one, or ask for none with \"none\".".into(),
        )),
        _ => Err(ApiError::Conflict(
            "Multiple possible networks found, use a Network ID to be more specific.".into(),
        )),
    }
}

/// How many servers the quota leaves room for, at least `min_count` and at most `max_count`.
async fn within_quota(tx: &mut Conn, plan: &Plan<'_>) -> Result<u64, ApiError> {
    let used = quotas::used(tx, plan.project).await?;
    let limited = [Resource::Instances, Resource::Cores, Resource::Ram];
    let limits = quotas::limits_of(tx, plan.project, limited).await?;
    let mut count = plan.wanted.max_count;
    let mut over = Vec::new();
    for (limit, name, used, each) in [
        (limits[0], "instances", used.instances, 1),
        (limits[1], "cores", used.cores, plan.flavor.vcpus),
        (limits[2], "ram", used.ram, plan.flavor.memory_mib),
    ] {
        if limit < 0 || each <= 0 {
            continue;
        }
        let room = u64::try_from((limit - used) / each).unwrap_or(0);
        count = count.min(room);
        if room < plan.wanted.min_count {
            let asked = u64::try_from(each).unwrap_or(0).saturating_mul(plan.wanted.min_count);
            over.push((name, format!("Requested {asked}, but already used {used} of {limit} {name}")));
        }
    }
    if over.is_empty() {
        return Ok(count);
    }
    let names: Vec<&str> = over.iter().map(|(name, _)| *name).collect();
    let texts: Vec<&str> = over.iter().map(|(_, text)| text.as_str()).collect();
    Err(ApiError::OverQuota(format!("Quota exceeded for {}: {}", names.join(", "), texts.join("; "))))
}

/// The chosen host's view, with this server booked; or the fault.
fn choose<'a>(
    plan: &Plan<'_>,
    views: &'a mut [HostView],
    rules: &Rules,
    rng: &mut Rng,
) -> Result<&'a HostView, String> {
    let id = plan.company.choose(views, |hosts| scheduler::schedule(&plan.request, hosts, rules, rng))?;
    let host = views.iter_mut().find(|host| host.id == id).ok_or("No valid host was found.")?;
    host.claim(plan.request.resources);
    Ok(host)
}

/// One of the servers of a request.
struct One {
    id: String,
    name: String,
    launch_index: u64,
}

/// Writes the row, and with a host also the NICs and the host's new generation.
async fn insert(
    tx: &mut Conn,
    plan: &Plan<'_>,
    one: &One,
    chosen: Result<&HostView, String>,
) -> Result<Vec<Touched>, ApiError> {
    let (host, fault) = match chosen {
        Ok(host) => (Some((host.id.to_string(), host.zone.as_str())), None),
        Err(text) => (None, Some(text)),
    };
    let (touched, generation) = match &host {
        Some((id, _)) => {
            let (touched, generation) = hosts::touch(tx, id).await?;
            (Some(touched), generation)
        }
        None => (None, 0),
    };
    let (vm_state, task_state) = match host {
        Some(_) => (VmState::Building, Some(TaskState::Scheduling)),
        None => (VmState::Error, None),
    };
    let now = now_us();
    sqlx::query(
        "INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus, memory_mib,
             disk_gib, disk_claim_gib, image_id, boot, key_name, public_key, user_data, metadata, restart_policy,
             launch_index, availability_zone, host_id, desired_power, run_generation, changed_generation, vm_state,
             task_state, fault_code, fault_message, fault_us, created_us, updated_us, description, flavor_extra_specs,
             config_drive, access_ipv4, access_ipv6, disk_config, admin_password_hash, reservation_id, ephemeral_gib,
             swap_mib, local_disks, disk_last)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21,
             'running', 1, $22, $23, $24, $25, $26, $27, $28, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39,
             $40)",
    )
    .bind(&one.id)
    .bind(plan.project)
    .bind(&plan.ctx.user_id)
    .bind(&one.name)
    .bind(host_name(plan, one))
    .bind(&plan.flavor.id)
    .bind(&plan.flavor.name)
    .bind(plan.flavor.vcpus)
    .bind(plan.flavor.memory_mib)
    .bind(plan.flavor.disk_gib)
    .bind(plan.disk_claim_gib)
    .bind(&plan.image_id)
    .bind(&plan.boot)
    .bind(&plan.wanted.key_name)
    .bind(&plan.public_key)
    .bind(&plan.wanted.user_data)
    .bind(&plan.metadata)
    .bind(plan.restart_policy)
    .bind(i64::try_from(one.launch_index).map_err(ApiError::internal)?)
    .bind(host.as_ref().map_or("", |(_, zone)| *zone))
    .bind(host.as_ref().map(|(id, _)| id))
    .bind(generation)
    .bind(vm_state.word())
    .bind(task_state.map(TaskState::word))
    .bind(fault.as_ref().map(|_| NO_VALID_HOST))
    .bind(&fault)
    .bind(fault.as_ref().map(|_| now))
    .bind(now)
    .bind(plan.wanted.description.as_ref().unwrap_or(&one.name))
    .bind(&plan.extra_specs)
    .bind(plan.wanted.config_drive.then_some(1_i64))
    .bind(plan.wanted.access.ipv4.as_deref().unwrap_or_default())
    .bind(plan.wanted.access.ipv6.as_deref().unwrap_or_default())
    .bind(plan.wanted.disk_config.word())
    .bind(&plan.wanted.admin_password_hash)
    .bind(&plan.reservation_id)
    .bind(plan.flavor.ephemeral_gib)
    .bind(plan.flavor.swap_mib)
    .bind(&plan.local_disks.0)
    .bind(plan.local_disks.1)
    .execute(&mut *tx)
    .await?;
    if let Some((_, zone)) = host {
        let security_groups = &plan.security_groups;
        let server = PluggedServer { id: &one.id, project_id: plan.project, zone, security_groups };
        let mut others = nics::plug(tx, &server, &plan.nics).await?;
        others.extend(touched);
        return Ok(others);
    }
    Ok(touched.into_iter().collect())
}

/// The one that was asked for, with a number if it is for several servers.
fn host_name(plan: &Plan<'_>, one: &One) -> String {
    match &plan.wanted.hostname {
        None => hostname(&one.name, &one.id),
        Some(wanted) if plan.wanted.max_count > 1 => {
            let number = format!("-{}", one.launch_index + 1);
            let kept = MAX_HOSTNAME.saturating_sub(number.len());
            format!("{}{number}", wanted.chars().take(kept).collect::<String>())
        }
        Some(wanted) => wanted.clone(),
    }
}

/// A host name made of a display name: one label of letters, digits and hyphens.
fn hostname(name: &str, id: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let label: String = name.chars().map(fit).collect();
    let label: String = label.trim_matches('-').chars().take(MAX_HOSTNAME).collect();
    match label.trim_end_matches('-') {
        "" => format!("server-{id}"),
        label => label.to_owned(),
    }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn host_names_are_one_label_of_dns() {
        assert_eq!(hostname("Web_1.example", "x"), "web-1-example");
        assert_eq!(hostname("…", "x"), "server-x");
        assert_eq!(hostname(&"ab".repeat(100), "x").len(), MAX_HOSTNAME);
    }
}
