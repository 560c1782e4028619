//! kill -9 in the middle of any step of random plans, on a real kernel: the next pass of another process gives exactly what
//! is desired, as a host has it that never knew anything else, and the pass after that has nothing to do. Networks,
//! routers, the overlay, uplinks, filters, QoS.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use harness::{
    cloud::Cloud,
    plans::{Random, blocks, desired},
    run,
};
use mote_network::{Config, Desired, Executor, namespace, plan, plan_routers};

/// One pass. Everything must succeed, unless this process is there to be killed.
async fn pass(executor: &Executor, desired: &Desired) -> usize {
    let steps = plan(desired, executor.conntrack().await, &executor.observe().await.unwrap());
    assert_eq!(steps.refused, []);
    for step in &steps.steps {
        executor.execute(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
    let (routers, refused) = plan_routers(desired, &executor.observe_routers().await.unwrap());
    assert_eq!(refused, []);
    for step in &routers {
        executor.execute_router(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
    steps.steps.len() + routers.len()
}

/// One pass leads there, and another has nothing to do.
async fn reach(executor: &Executor, desired: &Desired) {
    pass(executor, desired).await;
    assert_eq!(pass(executor, desired).await, 0, "a second pass has nothing to do");
}

/// Everything that a kernel has of it, by the rest of the namespaces' names.
fn contents(prefix: &str) -> BTreeMap<String, Vec<String>> {
    let names = namespace::list().unwrap();
    let own = names.iter().filter_map(|name| Some((name, name.strip_prefix(prefix)?)));
    own.map(|(name, rest)| (rest.to_owned(), content(name))).collect()
}

fn content(namespace: &str) -> Vec<String> {
    let inside = |script: &str| run("ip", ["netns", "exec", namespace, "sh", "-c", script]);
    let sorted = |text: String, keep: fn(&str) -> bool| {
        let mut lines: Vec<String> = text.lines().filter(|line| keep(line)).map(without_index).collect();
        lines.sort_unstable();
        lines
    };
    let mut all = blocks(&inside("nft list ruleset"));
    // Devices that a kernel puts into every namespace by itself are the same everywhere.
    // The carrier follows a little later.
    let link = |line: &str| !line.contains("@if") || line.contains("rtr") || line.contains("uplink");
    all.extend(sorted(
        inside(
            "ip -o link | cut -d' ' -f2-5 | sed 's/@[^ :]*//; s/NO-CARRIER,//; s/,LOWER_UP//; s/,M-DOWN//'",
        ),
        link,
    ));
    all.extend(sorted(inside("ip -o address show scope global; ip -o address show scope host"), |_| true));
    all.extend(sorted(inside("ip route; ip -6 route show proto static"), |_| true));
    let tables = "ip route show table all proto static; ip -6 route show table all proto static";
    all.extend(sorted(inside(&format!("{tables}; ip rule; ip -6 rule")), |_| true));
    all.extend(sorted(inside("ip neighbour show nud permanent"), |_| true));
    let pushed = |line: &str| line.contains(" dst ") || line.contains(" static");
    all.extend(sorted(inside("bridge fdb show"), pushed));
    all.extend(sorted(inside("bridge -d -o link show | sed 's/state [a-z]*//; s/@[^ :]*//'"), |_| true));
    all
}

/// Without the leading index of a link, and runs of spaces.
fn without_index(line: &str) -> String {
    let line =
        line.split_once(": ").filter(|(index, _)| index.parse::<u32>().is_ok()).map_or(line, |(_, l)| l);
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Set in the process that shall be killed: prefix, host's namespace, first seed.
const VICTIM: &str = "MOTE_TEST_CRASH_VICTIM";
const NAME: &str = "what_a_process_leaves_that_is_killed_anywhere_is_made_exactly_what_is_desired";

fn config(prefix: &str, host: &str) -> Config {
    Config {
        prefix: prefix.to_owned(),
        host_namespace: Some(host.to_owned()),
        physical_networks: ["public", "second"].map(|name| (name.to_owned(), format!("br-{name}"))).into(),
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_process_leaves_that_is_killed_anywhere_is_made_exactly_what_is_desired() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")));
    if let Ok(victim) = std::env::var(VICTIM) {
        let [prefix, host, seed] = victim.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let executor = Executor::new(config(prefix, host));
        for seed in seed.parse().unwrap().. {
            println!("pass {seed}");
            pass(&executor, &desired(seed)).await;
        }
    }
    let rounds = std::env::var("MOTE_TEST_CRASHES").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let start: u64 = rounds * u64::from(std::process::id());
    println!("seeds from {start}");
    // The second host never crashes and is made anew in each round.
    let cloud = Cloud::new(2);
    cloud.second_world();
    let [subject, twin] = &cloud.hosts[..] else { panic!() };
    for round in 0..rounds {
        let seed = start + 1000 * round;
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", NAME, "--nocapture"]).stdout(Stdio::piped());
        victim.env(VICTIM, format!("{} {} {seed}", subject.lab.prefix, subject.namespace));
        let mut victim = victim.spawn().unwrap();
        let mut output = BufReader::new(victim.stdout.take().unwrap()).lines();
        let passes = 1 + Random(seed).below(3);
        for _ in 0..passes {
            assert!(output.any(|line| line.unwrap().contains("pass")), "the victim ended by itself");
        }
        std::thread::sleep(Duration::from_micros(Random(seed).next() % 400_000));
        victim.kill().unwrap();
        victim.wait().unwrap();

        let goal = desired(seed + 500);
        let successor = Executor::new(config(&subject.lab.prefix, &subject.namespace));
        reach(&successor, &goal).await;
        reach(&twin.lab.executor, &goal).await;
        let (left, right) = (contents(&subject.lab.prefix), contents(&twin.lab.prefix));
        assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>(), "seed {seed}");
        for (name, content) in &left {
            let other = &right[name];
            let only =
                |a: &[String], b: &[String]| a.iter().filter(|l| !b.contains(l)).cloned().collect::<Vec<_>>();
            assert_eq!((only(content, other), only(other, content)), (vec![], vec![]), "seed {seed}, {name}");
            assert_eq!(content.len(), other.len(), "seed {seed}, {name}");
        }
        reach(&twin.lab.executor, &Desired::default()).await;
    }
    reach(&subject.lab.executor, &Desired::default()).await;
    for host in &cloud.hosts {
        assert_eq!(host.lab.names(), Vec::<String>::new());
    }
}
