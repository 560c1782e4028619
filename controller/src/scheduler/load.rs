//! How full a host is, as an exact fraction.

use std::cmp::Ordering;

use super::{AllocationRatios, HostView};

/// The larger of the promised shares of vCPUs and memory: a fraction that compares exactly.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    used: u64,
    limit: u64,
}

impl Load {
    /// The load of `host`.
    pub fn of(host: &HostView, ratios: &AllocationRatios) -> Load {
        let limit = ratios.apply(host.capacity);
        let vcpus = Load::new(host.used.vcpus, limit.vcpus);
        let memory = Load::new(host.used.memory_mib, limit.memory_mib);
        vcpus.max(memory)
    }

    /// `used / limit`; a host without any counts as full.
    fn new(used: u64, limit: u64) -> Load {
        if limit == 0 { Load { used: 1, limit: 1 } } else { Load { used, limit } }
    }
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> Ordering {
        let left = u128::from(self.used) * u128::from(other.limit);
        let right = u128::from(other.used) * u128::from(self.limit);
        left.cmp(&right)
    }
}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Load {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Load {}
