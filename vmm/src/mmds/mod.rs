//! The microVM metadata service (MMDS): a JSON document that the host writes by API and the guest reads by HTTP at
//! 169.254.169.254, without a network behind it. Versions 1 and 2 as Firecracker has them.
//!
//! ```text
//!   API ──► Mmds (store, session tokens) ◄── request ◄── Endpoint (ARP, TCP/IP) ◄── frames of one interface
//! ```
//! [`Mmds`] is one for the machine, and data in, data out. An [`Endpoint`] is one for each interface that may reach the
//! service: the network device hands it the frames that go to the service's address and gives its frames to the guest.
//! What comes from the guest is hostile: connections, queues, requests and answers are bounded, see the constants of each
//! part.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod endpoint;
mod request;
mod store;
mod token;

pub use endpoint::{Endpoint, PEEK_BYTES};
pub use request::respond;
pub use store::{Format, Mmds, MmdsError};

/// The machine's metadata, shared by the API and all endpoints.
#[derive(Debug, Clone)]
pub struct SharedMmds(Arc<Mutex<Mmds>>);

impl SharedMmds {
    /// Shares it.
    pub fn new(mmds: Mmds) -> Self {
        Self(Arc::new(Mutex::new(mmds)))
    }

    /// Held for one request at a time.
    pub fn lock(&self) -> MutexGuard<'_, Mmds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
