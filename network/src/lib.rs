//! Tenant networks on one host.
//!
//! One network on one host is one network namespace, named `<prefix><first 11 hex digits of the network id>` under
//! /run/netns (so `ip netns exec` works). In it: the bridge `br0` with the `service_ip` of each subnet and
//! 169.254.169.254/32, one tap per port, `lo`, and the sockets of this process's DHCP, DNS and metadata servers. Nothing in
//! it leads out: a guest reaches the other ports of its network and these two services, and nothing else of the host.
//!
//! ```text
//!  NetworkSpec ──► spec::validate ──► plan::plan ──► Step, Step, … ──► Executor::execute ──► kernel
//!                                        ▲                                                    │
//!                                        └───────────── Executor::observe ◄───────────────────┘
//! ```
//!
//! Policy is pure ([`mod@plan`], [`services::dhcp::message`], [`services::metadata`]'s documents); the kernel is touched by
//! [`executor`], [`namespace`], [`tap`] and the sockets of [`services`] only.
//!
//! # Order of calls
//! [`converge`] is one pass and keeps this order; who calls the parts one by one must keep it, too:
//! 1. [`services::Services::update`]: stops the services of networks that are no longer wanted (their sockets would keep
//!    a deleted namespace alive);
//! 2. [`Executor::observe`], [`Executor::plan`] ([`plan::plan`]), [`Session::execute`] for each step;
//! 3. [`services::Services::update`] again: starts what was waiting for its namespace, restarts what lost it;
//! 4. [`Executor::open_tap`] for each server that is about to be started.
//!
//! Why it is made this way: docs/decisions/0007-networks-on-a-host.md.

use std::{collections::BTreeMap, net::IpAddr};

mod converge;
mod desired;
pub mod executor;
pub mod filter;
pub mod names;
pub mod namespace;
mod nftables;
pub mod observed;
pub mod plan;
pub mod router;
pub mod services;
pub mod spec;
pub mod tap;

pub use converge::{Converged, converge};
pub use desired::Desired;
pub use executor::{Executor, ExecutorError, Session};
pub use names::{MacAddress, NetworkKey};
pub use plan::{Plan, Step, plan};
pub use router::{RouterKey, plan_routers};
pub use services::Services;
pub use spec::SpecError;

/// What all parts need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What the names of this host's namespaces start with. Every namespace `<prefix><11 hex digits>` belongs to the one
    /// hostd with this prefix, which deletes what it does not want: two hostds that share a /run/netns need two prefixes.
    pub prefix: String,
    /// The namespace under /run/netns in which the host's own interfaces are; none: that of this process.
    pub host_namespace: Option<String>,
    /// Physical networks by name, with the interface or bridge of the host that leads there.
    pub physical_networks: BTreeMap<String, String>,
    /// Resolvers that are asked, from the host's network, for names that are none of a tenant network's; none: such names
    /// are refused.
    pub dns_forwarders: Vec<IpAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            prefix: "mote-".to_owned(),
            host_namespace: None,
            physical_networks: BTreeMap::new(),
            dns_forwarders: Vec::new(),
        }
    }
}
