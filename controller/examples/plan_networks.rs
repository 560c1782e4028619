//! Plans a change of a group of 1,000 members for all hosts that it concerns, for `mote-bench network`. Prints as JSON how many hosts
//! these are, and the milliseconds of each round.

use anyhow::Context;
use mote_controller::network::desired::rehearsal;

fn main() -> anyhow::Result<()> {
    let rounds: u32 = std::env::args().nth(1).context("usage: plan_networks ROUNDS")?.parse()?;
    let (mut hosts, mut concerned, mut ms) = (0, 0, Vec::new());
    for _ in 0..rounds {
        let rehearsal = rehearsal::member_changed().map_err(|error| anyhow::anyhow!("{error:?}"))?;
        (hosts, concerned) = (rehearsal.hosts, rehearsal.concerned);
        ms.push(rehearsal.time.as_secs_f64() * 1e3);
    }
    println!("{}", serde_json::json!({"hosts": hosts, "concerned": concerned, "ms": ms}));
    Ok(())
}
