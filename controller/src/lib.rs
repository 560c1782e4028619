//! `mote-controller`: Mote's public APIs (Keystone v3, Glance v2, Nova v2.1, Neutron v2.0, Mote's own) over one database.
//!
//! | Module | What is there |
//! |---|---|
//! | [`http`] | what every request passes: limits, ids, authentication, errors in each service's own shape |
//! | [`db`] | the database, its migrations and the one way to write |
//! | [`identity`] | Keystone v3: users, projects, roles, tokens, catalog |
//! | [`image`] | Glance v2: image records and their bytes |
//! | [`compute`], [`network`] | Nova v2.1 and Neutron v2.0 |
//! | [`policy`], [`schema`] | who may do what, and what bodies may say: a table of every route each |
//! | `events` | what happened, as a table with a cursor and as a stream |
//! | [`hosts`], [`scheduler`] | the protocol with hosts (Mote's own API), and which host a server goes to |
//!
//! A request goes from [`http`] to a handler of a service, which reads or writes in [`db`] in one transaction.
#![forbid(unsafe_code)]

pub mod app;
pub mod compute;
pub mod config;
pub mod db;
pub(crate) mod events;
pub mod hosts;
pub mod http;
pub mod identity;
pub mod image;
pub mod network;
pub mod policy;
pub mod scheduler;
pub mod schema;
pub mod server;
#[cfg(test)]
pub(crate) mod testing;
