//! The agent of one host: it makes real what the controller wants there, and keeps it so.
//!
//! ```text
//! controller ◄─HTTP, always asked by the host─► connection ──desired──► agent ──► task ──► image_cache, disk
//!                                                   ▲                   │  ▲       │──────► wiring (mote-network)
//!                                                   └──────snapshot─────┘  │       └──────► vmm (mote-vmm processes)
//!                                                                    reconcile
//! ```
//!
//! - [`reconcile`]: what to do next, a pure function of what is wanted and what is seen.
//! - [`agent`]: the owner of what is seen; it asks the reconciler and hands out [`task`]s.
//! - [`config_drive`]: the disk that tells a server what it is.
//! - [`ledger`]: what survives a crash of this program or of the host.
//! - [`connection`], [`controller`], [`requests`]: the host protocol. [`status`]: the same for a local person.
//! - [`parts`]: the world as traits; [`vmm`], [`wiring`], [`image_cache`] are the real one, [`sim`] is a simulated one.
//!
//! # What holds
//! - Servers outlive this program: `SIGTERM`, `kill -9` and restarts leave VMMs alone; they are found again in /proc by
//!   `--id` and `--api-sock`, never by a number in a file alone.
//! - A server whose VMM does not run is started again only if its policy, its user, or a reboot of the host says so. After
//!   a reboot of the host, what ran before is started again as it was.
//! - VMMs are children in sessions of their own, but stay in this program's cgroup: a service manager must end the main
//!   process only (systemd: `KillMode=process`).
//! - Without the controller the last complete desired state holds.
//!
//! Decisions: docs/decisions/0008-host-agent.md.

pub mod agent;
pub mod backoff;
pub mod clock;
pub mod config_drive;
pub mod connection;
pub mod console;
pub mod controller;
pub mod daemon;
pub mod diagnostics;
pub mod errors;
pub mod files;
pub mod identity;
pub mod image_cache;
pub mod inventory;
pub mod jail;
pub mod kvm_check;
pub mod ledger;
pub mod lock;
pub mod meter;
pub mod parts;
pub mod paths;
pub mod process;
pub mod reconcile;
pub mod requests;
pub mod sim;
pub mod status;
mod swap;
pub mod task;
pub mod vmm;
pub mod wiring;
