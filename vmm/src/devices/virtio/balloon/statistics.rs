//! The guest's memory statistics: pairs of a tag and a value (virtio 1.2 §5.5.6.3, and the later tags of Linux).

use mote_vmm_api::BalloonStats;
use serde::{Deserialize, Serialize};

use crate::devices::virtio::buffers::GuestBuffers;

/// Bytes of a pair: `__le16` tag, `__le64` value.
const PAIR_BYTES: usize = 10;
/// Tags that are known.
const TAGS: usize = 16;
/// Most pairs of one buffer that are looked at.
const MAX_PAIRS: usize = 64;

/// The last values.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Statistics([Option<u64>; TAGS]);

impl Statistics {
    /// Takes what is in the buffer. Unknown tags are passed over.
    pub fn read(&mut self, buffer: &GuestBuffers) {
        for number in 0..MAX_PAIRS {
            let mut pair = [0; PAIR_BYTES];
            if buffer.read_at(number * PAIR_BYTES, &mut pair) < PAIR_BYTES {
                break;
            }
            let [tag_low, tag_high, value @ ..] = pair;
            if let Some(slot) = self.0.get_mut(usize::from(u16::from_le_bytes([tag_low, tag_high]))) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
    }

    /// `answer` with these values.
    pub const fn answer(&self, answer: BalloonStats) -> BalloonStats {
        let [
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
        ] = self.0;
        BalloonStats {
            swap_in,
            swap_out,
            major_faults,
            minor_faults,
            free_memory,
            total_memory,
            available_memory,
            disk_caches,
            hugetlb_allocations,
            hugetlb_failures,
            oom_kill,
            alloc_stall,
            async_scan,
            direct_scan,
            async_reclaim,
            direct_reclaim,
            ..answer
        }
    }
}
