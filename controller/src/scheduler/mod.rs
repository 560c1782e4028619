//! Which host takes a server: a pure function over what the database knows of the hosts.
//!
//! Filters first (each says why it refuses a host), then the order that the policy gives to those that are left. The
//! caller holds the write transaction in which the claim (the server's row with its host) is written, so that two
//! requests can't both take the last place.
//!
//! | Policy | Order |
//! |---|---|
//! | `least-loaded` (default) | smallest share of vCPUs or memory in use, whichever is larger; then fewest servers |
//! | `by-zone` | the zone with the fewest servers first, within it as `least-loaded` |
//! | `random` | any, evenly |

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use mote_host_api::HostId;
use serde::{Deserialize, Serialize};

pub mod aggregates;
mod load;
#[cfg(test)]
mod tests;

pub use load::Load;

/// How hosts that pass all filters are ordered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Spread by load.
    #[default]
    LeastLoaded,
    /// Any host that fits.
    Random,
    /// Spread over availability zones, then by load.
    ByZone,
}

impl Policy {
    /// All policies, for messages and documents.
    pub const ALL: [Policy; 3] = [Policy::LeastLoaded, Policy::Random, Policy::ByZone];

    /// The name in the API and the database.
    pub fn name(self) -> &'static str {
        match self {
            Policy::LeastLoaded => "least-loaded",
            Policy::Random => "random",
            Policy::ByZone => "by-zone",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Policy> {
        Policy::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// Amounts of what hosts have and servers take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// vCPUs.
    pub vcpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in GiB.
    pub disk_gib: u64,
}

impl Resources {
    fn plus(self, other: Resources) -> Resources {
        Resources {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_gib: self.disk_gib.saturating_add(other.disk_gib),
        }
    }
}

/// How much of a host may be promised, in hundredths of what it has (400 = four times).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocationRatios {
    /// vCPUs; guests rarely use all of theirs at once.
    pub vcpus: u64,
    /// Memory.
    pub memory: u64,
    /// Disk.
    pub disk: u64,
    /// Memory that is never promised, for the host itself, in MiB.
    pub reserved_memory_mib: u64,
}

impl Default for AllocationRatios {
    /// Nova's ratios for vCPUs and memory (4.0 and 1.0). Disks are copy-on-write, but a full disk hurts all servers of a
    /// host: not overcommitted.
    fn default() -> Self {
        Self { vcpus: 400, memory: 100, disk: 100, reserved_memory_mib: 256 }
    }
}

impl AllocationRatios {
    /// What may be promised of `capacity`.
    pub fn apply(&self, capacity: Resources) -> Resources {
        let part = |amount: u64, ratio: u64| amount.saturating_mul(ratio) / 100;
        Resources {
            vcpus: part(capacity.vcpus, self.vcpus),
            memory_mib: part(capacity.memory_mib.saturating_sub(self.reserved_memory_mib), self.memory),
            disk_gib: part(capacity.disk_gib, self.disk),
        }
    }
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostView {
    /// Id.
    pub id: HostId,
    /// Name.
    pub name: String,
    /// Availability zone.
    pub zone: String,
    /// It has reported lately.
    pub up: bool,
    /// An admin lets it take new servers.
    pub enabled: bool,
    /// What it can do.
    pub traits: BTreeSet<String>,
    /// Metadata of the aggregates that it is in.
    pub aggregates: aggregates::Metadata,
    /// What it has.
    pub capacity: Resources,
    /// What servers on it have been promised.
    pub used: Resources,
    /// Number of servers on it.
    pub servers: u32,
}

impl HostView {
    /// Books one more server, for the next decision of the same request.
    pub fn claim(&mut self, wanted: Resources) {
        self.used = self.used.plus(wanted);
        self.servers += 1;
    }
}

/// What a server needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Amounts.
    pub resources: Resources,
    /// Traits that the host must have (flavor extra specs and image properties `trait:NAME=required`).
    pub required_traits: BTreeSet<String>,
    /// Traits that the host must not have (`trait:NAME=forbidden`).
    pub forbidden_traits: BTreeSet<String>,
    /// What its aggregates must have (`aggregate_instance_extra_specs:KEY` of the flavor).
    pub aggregate_specs: BTreeMap<String, String>,
    /// Only hosts of this zone.
    pub zone: Option<String>,
    /// Only the host of this name (`availability_zone: "zone:host"` of an admin).
    pub host: Option<String>,
}

/// How to decide.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// Order.
    pub policy: Policy,
    /// Overcommitment.
    pub ratios: AllocationRatios,
}

/// Why one host can't take a server.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// Not the host that was named.
    NotNamed,
    /// In another zone.
    OtherZone,
    /// Has not reported lately.
    Down,
    /// Disabled by an admin.
    Disabled,
    /// Lacks a trait.
    LacksTrait(String),
    /// Has a trait that it must not have.
    HasTrait(String),
    /// No aggregate of it has what the flavor wants of this key.
    Aggregate(String),
    /// Too few vCPUs left.
    Vcpus,
    /// Too little memory left.
    Memory,
    /// Too little disk left.
    Disk,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotNamed => f.write_str("not the requested host"),
            Refusal::OtherZone => f.write_str("in another availability zone"),
            Refusal::Down => f.write_str("down"),
            Refusal::Disabled => f.write_str("disabled"),
            Refusal::LacksTrait(name) => write!(f, "lacks trait {name}"),
            Refusal::HasTrait(name) => write!(f, "has the forbidden trait {name}"),
            Refusal::Aggregate(key) => write!(f, "in no aggregate with the {key} that the flavor wants"),
            Refusal::Vcpus => f.write_str("too few vCPUs left"),
            Refusal::Memory => f.write_str("too little memory left"),
            Refusal::Disk => f.write_str("too little disk left"),
        }
    }
}

/// No host fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoValidHost {
    /// Each host with the first filter that refused it.
    pub reasons: Vec<(HostId, Refusal)>,
}

impl fmt::Display for NoValidHost {
    /// Nova's words, then how many hosts were refused for which reason (no host names: tenants read this).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("No valid host was found. ")?;
        if self.reasons.is_empty() {
            return f.write_str("No host has joined this cloud.");
        }
        let mut counts = BTreeMap::<&Refusal, usize>::new();
        for (_, refusal) in &self.reasons {
            *counts.entry(refusal).or_default() += 1;
        }
        let parts: Vec<String> =
            counts.into_iter().map(|(refusal, count)| format!("{refusal} ({count})")).collect();
        write!(f, "Hosts refused: {}.", parts.join(", "))
    }
}

impl std::error::Error for NoValidHost {}

/// Chooses the host for one server.
///
/// # Errors
/// [`NoValidHost`] with the reason per host.
pub fn schedule(
    request: &Request,
    hosts: &[HostView],
    rules: &Rules,
    rng: &mut Rng,
) -> Result<HostId, NoValidHost> {
    let mut fitting = Vec::new();
    let mut reasons = Vec::new();
    for host in hosts {
        match refusal(request, host, &rules.ratios) {
            Some(reason) => reasons.push((host.id, reason)),
            None => fitting.push(host),
        }
    }
    let load = |host: &HostView| Load::of(host, &rules.ratios);
    let chosen = match rules.policy {
        Policy::LeastLoaded => fitting.into_iter().min_by_key(|host| (load(host), host.servers, host.id)),
        Policy::ByZone => {
            let servers = servers_per_zone(hosts);
            fitting.into_iter().min_by_key(|host| {
                (servers[host.zone.as_str()], &host.zone, load(host), host.servers, host.id)
            })
        }
        Policy::Random if fitting.is_empty() => None,
        Policy::Random => Some(fitting[rng.below(fitting.len())]),
    };
    chosen.map(|host| host.id).ok_or(NoValidHost { reasons })
}

/// The first filter that refuses `host`, if any.
fn refusal(request: &Request, host: &HostView, ratios: &AllocationRatios) -> Option<Refusal> {
    if request.host.as_ref().is_some_and(|name| *name != host.name) {
        return Some(Refusal::NotNamed);
    }
    if request.zone.as_ref().is_some_and(|zone| *zone != host.zone) {
        return Some(Refusal::OtherZone);
    }
    if !host.enabled {
        return Some(Refusal::Disabled);
    }
    if !host.up {
        return Some(Refusal::Down);
    }
    if let Some(lacking) = request.required_traits.iter().find(|name| !host.traits.contains(*name)) {
        return Some(Refusal::LacksTrait(lacking.clone()));
    }
    if let Some(forbidden) = request.forbidden_traits.iter().find(|name| host.traits.contains(*name)) {
        return Some(Refusal::HasTrait(forbidden.clone()));
    }
    if let Some(key) = aggregates::lacking(&request.aggregate_specs, &host.aggregates) {
        return Some(Refusal::Aggregate(key.to_owned()));
    }
    let wanted = request.resources;
    // A guest with more vCPUs than the host has CPUs would only fight with itself, whatever the ratio says.
    if wanted.vcpus > host.capacity.vcpus {
        return Some(Refusal::Vcpus);
    }
    let (after, limit) = (host.used.plus(wanted), ratios.apply(host.capacity));
    if after.vcpus > limit.vcpus {
        Some(Refusal::Vcpus)
    } else if after.memory_mib > limit.memory_mib {
        Some(Refusal::Memory)
    } else if after.disk_gib > limit.disk_gib && wanted.disk_gib > 0 {
        Some(Refusal::Disk)
    } else {
        None
    }
}

fn servers_per_zone(hosts: &[HostView]) -> BTreeMap<&str, u64> {
    let mut servers = BTreeMap::new();
    for host in hosts {
        *servers.entry(host.zone.as_str()).or_default() += u64::from(host.servers);
    }
    servers
}

/// A small seeded generator (SplitMix64): even enough for placement, repeatable in tests; not for secrets.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The generator of that seed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// An even choice of 0..n (n > 0), by the multiply-shift method.
    fn below(&mut self, n: usize) -> usize {
        let product = u128::from(self.next()) * n as u128;
        usize::try_from(product >> 64).expect("product of a u64 and n, shifted by 64, is below n")
    }
}
