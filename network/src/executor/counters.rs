//! What the kernel has counted of ports' taps.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use mote_host_api::Traffic;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, Stats64};

use super::{Executor, ExecutorError, netlink::Netlink};
use crate::{
    names::{NetworkKey, TAP_PREFIX},
    namespace::{self, NamespaceError},
};

impl Executor {
    /// The counters of every tap of this host's networks by its name, since it was made, as its guest sees them: what the
    /// kernel receives from a tap, the guest has sent.
    ///
    /// # Errors
    /// [`ExecutorError`]; a network that goes meanwhile is none.
    pub async fn counters(&self) -> Result<BTreeMap<String, Traffic>, ExecutorError> {
        let mut counted = BTreeMap::new();
        let names = namespace::list().map_err(ExecutorError::List)?;
        let ours =
            |name: &&String| name.strip_prefix(&self.config.prefix).and_then(NetworkKey::parse).is_some();
        for namespace in names.iter().filter(ours) {
            let netlink = match Netlink::connect(namespace).await {
                Ok(netlink) => netlink,
                Err(ExecutorError::Namespace(
                    NamespaceError::Missing(_) | NamespaceError::NotANamespace(_) | NamespaceError::Own(_),
                )) => continue,
                Err(error) => return Err(error),
            };
            let links = netlink.handle.link().get().execute().try_collect::<Vec<LinkMessage>>();
            let links = links.await.map_err(netlink.failed("read the counters of links"))?;
            counted.extend(links.iter().filter_map(counters_of));
        }
        Ok(counted)
    }
}

fn counters_of(link: &LinkMessage) -> Option<(String, Traffic)> {
    let mut found: (Option<&String>, Option<&Stats64>) = (None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.0 = Some(name),
            LinkAttribute::Stats64(stats) => found.1 = Some(stats),
            _ => {}
        }
    }
    let (Some(name), Some(stats)) = found else { return None };
    let traffic = Traffic {
        rx_bytes: stats.tx_bytes,
        rx_packets: stats.tx_packets,
        rx_dropped: stats.tx_dropped,
        tx_bytes: stats.rx_bytes,
        tx_packets: stats.rx_packets,
        tx_dropped: stats.rx_dropped,
    };
    name.starts_with(TAP_PREFIX).then(|| (name.clone(), traffic))
}
