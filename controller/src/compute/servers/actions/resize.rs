//! resize, confirmResize, revertResize: another flavor on the same host.
//!
//! The root disk and ephemeral disks are copied, so that the change can be taken back with all that the guest has written since undone, as in
//! Nova; both disks and the larger of both flavors stay promised until then.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use mote_host_api::{DesiredPower, LocalDiskSpec};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    super::{
        super::{
            flavors::{self, Flavor},
            migrations,
            quotas::{self, Resource},
        },
        create,
        guest::DiskConfig,
        input::{self, Fields},
        local,
    },
    Act, ApiError, Asked, Rule, TaskState, VmState,
};
use crate::{
    hosts,
    scheduler::{self, Resources, Rng, Rules},
};

const RESIZE: Rule = Rule::new("resize", &[VmState::Active, VmState::Stopped]);
const CONFIRM: Rule = Rule::new("confirmResize", &[VmState::Resized]);
const REVERT: Rule = Rule::new("revertResize", &[VmState::Resized]);

/// The server as it was, in `resized_from`.
#[derive(Debug, Serialize, Deserialize)]
struct Before {
    flavor: Flavor,
    extra_specs: std::collections::BTreeMap<String, String>,
    disk_claim_gib: i64,
    disk_number: i64,
    #[serde(default)]
    local_disks: Vec<LocalDiskSpec>,
}

pub(super) async fn resize(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let mut fields = Fields::open(json!({ "resize": asked.argument }), "resize", &[])?;
    let flavor_id = input::flavor_ref(&mut fields)?;
    let disk_config = DiskConfig::take(&mut fields)?;
    fields.finish()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &RESIZE).await?;
    let flavor = create::flavor(&mut act.tx, asked.ctx, &flavor_id).await?;
    if flavor.id == act.row.flavor_id {
        return Err(ApiError::BadRequest("When resizing, instances must change flavor!".into()));
    }
    if flavor.disk_gib < act.row.disk_gib {
        return Err(ApiError::BadRequest("Unable to resize disk down.".into()));
    }
    check_quota(&mut act, &flavor).await?;
    let needed = create::gib(act.row.boot()?.disk.size)?;
    if flavor.disk_gib > 0 && flavor.disk_gib < needed {
        return Err(ApiError::BadRequest("Flavor's disk is too small for requested image.".into()));
    }
    let old = act.row.local_disks()?;
    let number = act.row.disk_last + 1;
    let local_disks = local::resized(number, &old, &flavor)?;
    let kept: Vec<u32> = old.iter().map(|disk| disk.number).collect();
    let claim = flavor.disk_gib.max(needed) + flavor.local_gib();
    check_host(&mut act, &flavor, claim).await?;
    let extra_specs = flavors::extra_specs(&mut act.tx, &flavor.id).await?;
    let before = Before {
        flavor: act.row.flavor(),
        extra_specs: act.row.extra_specs()?,
        disk_claim_gib: act.row.disk_claim_gib,
        disk_number: act.row.disk_number,
        local_disks: old,
    };
    sqlx::query(
        "UPDATE servers SET flavor_id = $2, flavor_name = $3, vcpus = $4, memory_mib = $5, disk_gib = $6,
             flavor_extra_specs = $7, disk_claim_gib = disk_claim_gib + $8, held_vcpus = $9, held_memory_mib = $10,
             disk_number = $11, disk_copy_of = $12, disk_kept = $12, resized_from = $13,
             run_generation = run_generation + $14, disk_config = COALESCE($15, disk_config), ephemeral_gib = $16,
             swap_mib = $17, local_disks = $18, local_disks_kept = $19, disk_last = $20 WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(&flavor.id)
    .bind(&flavor.name)
    .bind(flavor.vcpus)
    .bind(flavor.memory_mib)
    .bind(flavor.disk_gib)
    .bind(serde_json::to_string(&extra_specs).map_err(ApiError::internal)?)
    .bind(claim)
    .bind((act.row.vcpus - flavor.vcpus).max(0))
    .bind((act.row.memory_mib - flavor.memory_mib).max(0))
    .bind(number)
    .bind(act.row.disk_number)
    .bind(serde_json::to_string(&before).map_err(ApiError::internal)?)
    .bind(i64::from(act.row.desired_power() != DesiredPower::Stopped))
    .bind(disk_config.map(DiskConfig::word))
    .bind(flavor.ephemeral_gib)
    .bind(flavor.swap_mib)
    .bind(serde_json::to_string(&local_disks).map_err(ApiError::internal)?)
    .bind(serde_json::to_string(&kept).map_err(ApiError::internal)?)
    .bind(local::last(number, &local_disks))
    .execute(&mut *act.tx)
    .await?;
    let record = migrations::New {
        server_id: &act.row.id,
        project_id: &act.row.project_id,
        host: act.row.host_name.as_deref().unwrap_or_default(),
        old_flavor_id: &act.row.flavor_id,
        new_flavor_id: &flavor.id,
    };
    migrations::begin(&mut act.tx, asked.ctx, &record).await?;
    act.finish(asked.app, asked.ctx, &RESIZE, Some(TaskState::ResizeFinish)).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// What grows must fit into the quota.
async fn check_quota(act: &mut Act, flavor: &Flavor) -> Result<(), ApiError> {
    let used = quotas::used(&mut act.tx, &act.row.project_id).await?;
    for (resource, name, used, more) in [
        (Resource::Cores, "cores", used.cores, flavor.vcpus - act.row.vcpus),
        (Resource::Ram, "ram", used.ram, flavor.memory_mib - act.row.memory_mib),
    ] {
        let limit = quotas::limit(&mut act.tx, &act.row.project_id, resource).await?;
        if limit >= 0 && more > 0 && used + more > limit {
            return Err(ApiError::OverQuota(format!(
                "Quota exceeded for {name}: Requested {more}, but already used {used} of {limit} {name}"
            )));
        }
    }
    Ok(())
}

/// The host must have room for the new flavor and for what is kept of the old one.
async fn check_host(act: &mut Act, flavor: &Flavor, claim: i64) -> Result<(), ApiError> {
    let amount = |stored: i64| u64::try_from(stored).unwrap_or(0);
    let mut host = hosts::views(&mut act.tx).await?;
    host.retain(|host| host.id.to_string() == act.host);
    for host in &mut host {
        // It is there already, so it needs no permission to come; and its own share is its own.
        host.enabled = true;
        host.used.vcpus = host.used.vcpus.saturating_sub(amount(act.row.vcpus));
        host.used.memory_mib = host.used.memory_mib.saturating_sub(amount(act.row.memory_mib));
    }
    let needs = create::needs(&flavors::extra_specs(&mut act.tx, &flavor.id).await?)?;
    let resources = Resources {
        vcpus: amount(flavor.vcpus.max(act.row.vcpus)),
        memory_mib: amount(flavor.memory_mib.max(act.row.memory_mib)),
        disk_gib: amount(claim),
    };
    let request = scheduler::Request { resources, ..needs };
    match scheduler::schedule(&request, &host, &Rules::default(), &mut Rng::seeded(0)) {
        Ok(_) => Ok(()),
        Err(refused) => Err(ApiError::BadRequest(format!(
            "{refused} (A server is resized on the host that it is on; shelve and unshelve moves it to another.)"
        ))),
    }
}

fn before(act: &Act) -> Result<Before, ApiError> {
    let text = act.row.resized_from.as_deref();
    let text = text.ok_or_else(|| ApiError::internal("a resized server without its flavor of before"))?;
    serde_json::from_str(text).map_err(ApiError::internal)
}

pub(super) async fn confirm(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &CONFIRM).await?;
    let before = before(&act)?;
    let rests = match act.row.desired_power() {
        DesiredPower::Stopped => VmState::Stopped,
        DesiredPower::Paused => VmState::Paused,
        DesiredPower::Suspended => VmState::Suspended,
        DesiredPower::Running => VmState::Active,
    };
    sqlx::query(
        "UPDATE servers SET resized_from = NULL, disk_kept = NULL, local_disks_kept = '[]', held_vcpus = 0, held_memory_mib = 0,
             disk_claim_gib = disk_claim_gib - $2, vm_state = $3 WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(before.disk_claim_gib)
    .bind(rests.word())
    .execute(&mut *act.tx)
    .await?;
    migrations::becomes(&mut act.tx, &act.row.id, "finished", "confirmed").await?;
    act.finish(asked.app, asked.ctx, &CONFIRM, None).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn revert(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &REVERT).await?;
    let Before { flavor, extra_specs, disk_claim_gib, disk_number, local_disks } = before(&act)?;
    sqlx::query(
        "UPDATE servers SET flavor_id = $2, flavor_name = $3, vcpus = $4, memory_mib = $5, disk_gib = $6,
             flavor_extra_specs = $7, disk_claim_gib = $8, held_vcpus = 0, held_memory_mib = 0, disk_number = $9,
             disk_copy_of = NULL, disk_kept = NULL, resized_from = NULL, run_generation = run_generation + $10,
             ephemeral_gib = $11, swap_mib = $12, local_disks = $13, local_disks_kept = '[]'
         WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(&flavor.id)
    .bind(&flavor.name)
    .bind(flavor.vcpus)
    .bind(flavor.memory_mib)
    .bind(flavor.disk_gib)
    .bind(serde_json::to_string(&extra_specs).map_err(ApiError::internal)?)
    .bind(disk_claim_gib)
    .bind(disk_number)
    .bind(i64::from(act.row.desired_power() != DesiredPower::Stopped))
    .bind(flavor.ephemeral_gib)
    .bind(flavor.swap_mib)
    .bind(serde_json::to_string(&local_disks).map_err(ApiError::internal)?)
    .execute(&mut *act.tx)
    .await?;
    migrations::becomes(&mut act.tx, &act.row.id, "finished", "reverting").await?;
    act.finish(asked.app, asked.ctx, &REVERT, Some(TaskState::ResizeReverting)).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}
