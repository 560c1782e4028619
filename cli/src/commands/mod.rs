//! The subcommands that speak the API, one file per resource.

pub mod flavor;
pub mod host;
pub mod image;
pub mod keypair;
pub mod network;
pub mod run;
pub mod server;
