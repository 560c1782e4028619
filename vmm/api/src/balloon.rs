//! Firecracker's balloon.

use serde::{Deserialize, Serialize};

/// `/balloon`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Memory that the guest is asked for, in MiB.
    pub amount_mib: u32,
    /// The guest may take memory back when it has no other.
    pub deflate_on_oom: bool,
    /// Seconds between two statistics; 0 means that there are none.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Free page hinting can be started.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest gives memory that it has freed back by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// See [`Balloon::amount_mib`].
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsPatch {
    /// See [`Balloon::stats_polling_interval_s`]. Cannot be changed from or to 0.
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonHintingStart {
    /// Let the guest use its pages again as soon as it has hinted all.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for BalloonHintingStart {
    fn default() -> Self {
        Self { acknowledge_on_stop: true }
    }
}

const fn yes() -> bool {
    true
}

/// `GET /balloon/hinting/status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BalloonHintingStatus {
    /// The host's last command: 0 stop, 1 done, else the id of a run.
    pub host_cmd: u32,
    /// The guest's.
    pub guest_cmd: Option<u32>,
}

/// `GET /balloon/statistics`. A page has 4 KiB. What the guest has not told is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BalloonStats {
    /// Pages that the guest is asked for.
    pub target_pages: u32,
    /// Pages that it has given.
    pub actual_pages: u32,
    /// The same in MiB.
    pub target_mib: u32,
    /// The same in MiB.
    pub actual_mib: u32,
    /// Memory swapped in, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Memory swapped out, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that didn't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Memory that is not used, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// All memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Estimate of the memory that new programs could have without swapping, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Memory that can be reclaimed without I/O, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for want of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Allocations that had to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Memory scanned in the background.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// Memory scanned by those who needed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Memory reclaimed in the background.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// Memory reclaimed by those who needed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}
