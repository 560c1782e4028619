//! Packet filters as the executor loads them, beside what nft(8) makes of the same text.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{fs, sync::Arc};

use harness::{
    cloud::Cloud,
    plans::{blocks, desired},
    run,
};
use mote_network::{
    Desired, Executor, filter::Ruleset, namespace, plan, plan::Action, plan_routers, router::RouterAction,
};

/// The filters of all namespaces of a description, by their names.
async fn filters(executor: &Executor, prefix: &str, desired: &Desired) -> Vec<(String, Arc<Ruleset>)> {
    let (mut filters, plan) = (Vec::new(), plan(desired, executor.conntrack().await, &[]));
    for step in plan.steps {
        if let Action::SetFilter { filter } = step.action {
            filters.push((executor.namespace(step.network), filter));
        }
    }
    for step in plan_routers(desired, &[]).0 {
        if let RouterAction::SetFilter { filter } = step.action {
            filters.push((step.router.namespace(prefix), filter));
        }
    }
    filters
}

fn shown(namespace: &str) -> Vec<String> {
    blocks(&run("ip", ["netns", "exec", namespace, "nft", "list", "ruleset"]))
}

async fn converge(executor: &Executor, desired: &Desired) {
    let plan = executor.plan(desired, &executor.observe().await.unwrap()).await;
    assert_eq!(plan.refused, []);
    let mut session = executor.session();
    for step in &plan.steps {
        session.execute(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
    for step in &plan_routers(desired, &executor.observe_routers().await.unwrap()).0 {
        executor.execute_router(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
}

/// One executor goes from description to description, which makes small changes; nft(8) gets the whole of each.
#[tokio::test]
async fn a_filter_that_was_changed_again_and_again_is_what_nft_makes_of_the_whole_text() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    let rounds = std::env::var("MOTE_TEST_FILTERS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let start = 1000 * u64::from(std::process::id());
    println!("seeds from {start}");
    let cloud = Cloud::new(1);
    cloud.second_world();
    let [host] = &cloud.hosts[..] else { panic!() };
    let (executor, prefix) = (&host.lab.executor, &host.lab.prefix);
    let oracle = format!("{prefix}oracle");
    namespace::create_blocking(&oracle).unwrap();
    let mut compared = 0;
    for seed in start..start + rounds {
        let desired = desired(seed);
        converge(executor, &desired).await;
        for (namespace, filter) in filters(executor, prefix, &desired).await {
            let text = host.lab.directory.join("ruleset.nft");
            fs::write(&text, format!("flush ruleset\n{}", filter.script())).unwrap();
            run("ip", ["netns", "exec", &oracle, "nft", "-f", &text.to_string_lossy()]);
            let (ours, theirs) = (shown(&namespace), shown(&oracle));
            let only =
                |a: &[String], b: &[String]| a.iter().filter(|l| !b.contains(l)).cloned().collect::<Vec<_>>();
            assert_eq!((only(&ours, &theirs), only(&theirs, &ours)), (vec![], vec![]), "seed {seed}");
            assert_eq!(ours.len(), theirs.len(), "seed {seed}");
            compared += usize::from(!filter.is_empty());
        }
    }
    assert!(compared > 0);
}
