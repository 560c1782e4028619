//! What the end-to-end tests and the quickstart share: a cloud of one's own ([`cloud::Cloud`]), the place where its servers
//! run ([`place::Place`]: this machine or the lab), and the whole life of a server by REST ([`journey`]).
#![forbid(unsafe_code)]

pub mod cloud;
pub mod journey;
pub mod lab;
pub mod place;
pub mod postgres;
pub mod programs;
pub mod steps;
