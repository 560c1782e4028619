//! Bandwidth limits and DSCP marks of ports: policers in the bridge family, before everything else that costs time.
//!
//! A policer drops what is over the limit (as Neutron's Open vSwitch driver does for what guests send): it is exact for the
//! sum of what passes, keeps no queue that a guest could fill, and is part of the same transaction as the filter. What the
//! host itself sends (DHCP, metadata) doesn't count.

use mote_host_api::{BandwidthLimit, QosSpec};

use crate::spec::SpecProblem;

/// Bytes per second of one kbit/s.
const BYTES_PER_KBIT: u64 = 125;
/// Smallest bucket: two packets of a device that segments in hardware, else the largest would never pass.
const BURST_MIN: u64 = 2 * 65_536;
/// Bytes of the bucket per kbit/s if none is asked for: 80 % of a second.
const DEFAULT_BURST: u64 = 100;
const DSCP_MAX: u8 = 63;

/// Rules for what the guest sends, and for what it gets.
pub(super) fn limits(qos: Option<&QosSpec>) -> Result<(Vec<String>, Vec<String>), SpecProblem> {
    let Some(qos) = qos else { return Ok((Vec::new(), Vec::new())) };
    let mut out: Vec<String> = qos.egress.map(policer).transpose()?.into_iter().collect();
    if let Some(dscp) = qos.dscp_mark {
        let dscp = checked_dscp(dscp)?;
        out.push(format!("ether type ip ip dscp set {dscp}"));
        out.push(format!("ether type ip6 ip6 dscp set {dscp}"));
    }
    Ok((out, qos.ingress.map(policer).transpose()?.into_iter().collect()))
}

/// A DSCP that fits into its field.
pub(crate) fn checked_dscp(dscp: u8) -> Result<u8, SpecProblem> {
    if dscp > DSCP_MAX { Err(SpecProblem::Qos("a DSCP mark is 0 to 63")) } else { Ok(dscp) }
}

/// A rule that drops what is over a limit.
pub(crate) fn policer(limit: BandwidthLimit) -> Result<String, SpecProblem> {
    let kbit = u64::from(limit.max_kbps);
    if kbit == 0 {
        return Err(SpecProblem::Qos("a bandwidth limit is at least 1 kbit/s"));
    }
    let burst = match u64::from(limit.max_burst_kbps) {
        0 => kbit * DEFAULT_BURST,
        burst => burst * BYTES_PER_KBIT,
    };
    // nft reads 32 bits.
    let burst = burst.clamp(BURST_MIN, u32::MAX.into());
    Ok(format!("limit rate over {} bytes/second burst {burst} bytes counter drop", kbit * BYTES_PER_KBIT))
}
