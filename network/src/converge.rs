//! One pass from what is to what shall be.

use std::collections::{BTreeSet, HashMap};

use mote_host_api::{InstanceMetadata, ServerId};

use crate::{
    Desired,
    executor::{Executor, ExecutorError},
    names::NetworkKey,
    plan::Step,
    router::{RouterError, RouterKey, RouterStep, plan_routers},
    services::{Services, UpdateOutcome},
    spec::SpecError,
};

/// What came of a pass.
#[derive(Debug)]
pub struct Converged {
    /// Steps carried out; 0 when everything was right already.
    pub executed: usize,
    /// Steps that failed. The later steps of their networks were left out; the next pass tries again.
    pub failed: Vec<(Step, ExecutorError)>,
    /// The same for routers.
    pub failed_routers: Vec<(RouterStep, ExecutorError)>,
    /// Routers that can't be made as described.
    pub refused_routers: Vec<RouterError>,
    /// Networks that can't be made as described.
    pub refused: Vec<SpecError>,
    /// State of the services.
    pub services: UpdateOutcome,
}

/// One pass: stops services that aren't wanted, makes the kernel's state the desired one, starts services.
///
/// # Errors
/// Only when the kernel's state can't be observed. What fails for one network does not stop the others.
pub async fn converge(
    executor: &Executor,
    services: &mut Services,
    desired: &Desired,
    metadata: &HashMap<ServerId, InstanceMetadata>,
) -> Result<Converged, ExecutorError> {
    services.set_routers(&desired.routers);
    services.update(&desired.networks, metadata).await;
    let plan = executor.plan(desired, &executor.observe().await?).await;
    let mut stuck: BTreeSet<NetworkKey> = BTreeSet::new();
    let mut failed = Vec::new();
    let mut executed = 0;
    let mut session = executor.session();
    for step in plan.steps {
        if stuck.contains(&step.network) {
            continue;
        }
        match session.execute(&step).await {
            Ok(()) => executed += 1,
            Err(error) => {
                stuck.insert(step.network);
                failed.push((step, error));
            }
        }
    }
    let (router_steps, refused_routers) = plan_routers(desired, &executor.observe_routers().await?);
    let mut stuck: BTreeSet<RouterKey> = BTreeSet::new();
    let mut failed_routers = Vec::new();
    for step in router_steps {
        if stuck.contains(&step.router) {
            continue;
        }
        match executor.execute_router(&step).await {
            Ok(()) => executed += 1,
            Err(error) => {
                stuck.insert(step.router);
                failed_routers.push((step, error));
            }
        }
    }
    let services = services.update(&desired.networks, metadata).await;
    Ok(Converged { executed, failed, failed_routers, refused: plan.refused, refused_routers, services })
}
