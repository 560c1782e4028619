//! Which address a port gets: pools (pure), and taking an address within the transaction that makes the port.
//!
//! An address is a row of `fixed_ips` whose primary key is (subnet, address): that two ports share one is impossible,
//! whatever else goes wrong. The search for a free one starts where the last ended, so that a freed address rests for a
//! round (neighbours' ARP caches), and asks the index for the first gap: it reads only as many rows as there are taken
//! addresses in a run from there.

use crate::db::Conn;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::attributes::invalid;
use crate::http::error::ApiError;

/// A range of addresses for ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pool {
    /// First.
    pub(super) start: Ipv4Addr,
    /// Last.
    pub(super) end: Ipv4Addr,
}

impl Pool {
    fn contains(&self, ip: Ipv4Addr) -> bool {
        (self.start..=self.end).contains(&ip)
    }
}

/// What IPAM needs of a subnet.
#[derive(Debug, Clone)]
pub(super) struct Range {
    /// Subnet.
    pub(super) subnet_id: String,
    /// All addresses.
    pub(super) cidr: Ipv4Net,
    /// Those for ports that don't ask for a certain one.
    pub(super) pools: Vec<Pool>,
    /// Where the search starts.
    pub(super) next: u32,
}

/// First and last address that a device can have: without the network's own and the broadcast address.
pub(super) fn device_range(cidr: Ipv4Net) -> (Ipv4Addr, Ipv4Addr) {
    let (network, broadcast) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
    (Ipv4Addr::from(network.saturating_add(1)), Ipv4Addr::from(broadcast.saturating_sub(1)))
}

/// Whether a device can have this address.
pub(super) fn is_device_address(cidr: Ipv4Net, ip: Ipv4Addr) -> bool {
    let (first, last) = device_range(cidr);
    (first..=last).contains(&ip)
}

/// All addresses but the gateway's.
pub(super) fn default_pools(cidr: Ipv4Net, gateway: Option<Ipv4Addr>) -> Vec<Pool> {
    let (start, end) = device_range(cidr);
    let Some(gateway) = gateway.filter(|ip| (start..=end).contains(ip)) else {
        return vec![Pool { start, end }];
    };
    let gateway = u32::from(gateway);
    let before = Pool { start, end: Ipv4Addr::from(gateway - 1) };
    let after = Pool { start: Ipv4Addr::from(gateway + 1), end };
    [before, after].into_iter().filter(|pool| pool.start <= pool.end).collect()
}

/// Sorts pools, and refuses those that are not within the subnet, overlap, or hold the gateway.
///
/// # Errors
/// 400 (Neutron's `InvalidAllocationPool`, `OutOfBoundsAllocationPool`, `OverlappingAllocationPools`), 409 with the gateway.
pub(super) fn check_pools(
    cidr: Ipv4Net,
    gateway: Option<Ipv4Addr>,
    mut pools: Vec<Pool>,
) -> Result<Vec<Pool>, ApiError> {
    let named = |pool: &Pool| format!("{}-{}", pool.start, pool.end);
    pools.sort_by_key(|pool| pool.start);
    for pool in &pools {
        if pool.start > pool.end {
            let text = format!("The allocation pool {} is not valid.", named(pool));
            return Err(ApiError::BadRequest(text).named("InvalidAllocationPool"));
        }
        if !is_device_address(cidr, pool.start) || !is_device_address(cidr, pool.end) {
            let text = format!("The allocation pool {} spans beyond the subnet cidr {cidr}.", named(pool));
            return Err(ApiError::BadRequest(text).named("OutOfBoundsAllocationPool"));
        }
        if let Some(gateway) = gateway.filter(|gateway| pool.contains(*gateway)) {
            let text = format!("Gateway ip {gateway} conflicts with allocation pool {}.", named(pool));
            return Err(ApiError::Conflict(text).named("GatewayConflictWithAllocationPools"));
        }
    }
    for pair in pools.windows(2) {
        if pair[1].start <= pair[0].end {
            let text =
                format!("Found overlapping allocation pools: {} {}.", named(&pair[0]), named(&pair[1]));
            return Err(ApiError::Conflict(text).named("OverlappingAllocationPools"));
        }
    }
    Ok(pools)
}

/// The pools as ranges in the order of the search: from `next` on, then the rest from the start.
fn ring(pools: &[Pool], next: u32) -> Vec<(u32, u32)> {
    let ranges = || pools.iter().map(|pool| (u32::from(pool.start), u32::from(pool.end)));
    let from_next = ranges().filter(|(_, end)| *end >= next).map(|(start, end)| (start.max(next), end));
    let before = ranges().filter(|(start, _)| *start < next).map(|(start, end)| (start, end.min(next - 1)));
    from_next.chain(before).collect()
}

/// Gives a port the address that it asks for.
///
/// # Errors
/// 400 if no device of this subnet can have it, 409 if another has it.
pub(super) async fn take(
    tx: &mut Conn,
    range: &Range,
    ip: Ipv4Addr,
    port_id: &str,
    position: i64,
) -> Result<(), ApiError> {
    if !is_device_address(range.cidr, ip) {
        let text = format!("IP address {ip} is not a valid IP for the specified subnet.");
        return Err(ApiError::BadRequest(text).named("InvalidIpForSubnet"));
    }
    if !is_free(tx, &range.subnet_id, u32::from(ip)).await? {
        let text = format!("IP address {ip} already allocated in subnet {}", range.subnet_id);
        return Err(ApiError::Conflict(text).named("IpAddressAlreadyAllocated"));
    }
    insert(tx, &range.subnet_id, u32::from(ip), port_id, position).await
}

/// Gives a port the next free address of the subnet; `None` if there is none.
///
/// # Errors
/// Database only.
pub(super) async fn take_next(
    tx: &mut Conn,
    range: &Range,
    port_id: &str,
    position: i64,
) -> Result<Option<Ipv4Addr>, ApiError> {
    for (first, last) in ring(&range.pools, range.next) {
        let Some(free) = first_free(tx, &range.subnet_id, first, last).await? else { continue };
        insert(tx, &range.subnet_id, free, port_id, position).await?;
        sqlx::query("UPDATE subnets SET next_ip = $1 WHERE id = $2")
            .bind(i64::from(free) + 1)
            .bind(&range.subnet_id)
            .execute(tx)
            .await?;
        return Ok(Some(Ipv4Addr::from(free)));
    }
    Ok(None)
}

/// Neutron's answer when a network is full.
pub(super) fn exhausted(network_id: &str) -> ApiError {
    ApiError::Conflict(format!("No more IP addresses available on network {network_id}."))
        .named("IpAddressGenerationFailure")
}

/// An address out of a request, checked against nothing but its form.
pub(super) fn parse_cidr(text: &str) -> Result<Ipv4Net, ApiError> {
    let cidr: Ipv4Net =
        text.parse().map_err(|_| invalid("cidr", format!("'{text}' is not a valid IPv4 subnet")))?;
    match cidr.addr() == cidr.network() {
        true => Ok(cidr),
        false => {
            Err(invalid("cidr", format!("'{text}' isn't a recognized IP subnet cidr, '{}' is", cidr.trunc())))
        }
    }
}

async fn first_free(tx: &mut Conn, subnet_id: &str, first: u32, last: u32) -> Result<Option<u32>, ApiError> {
    if is_free(tx, subnet_id, first).await? {
        return Ok(Some(first));
    }
    let gap: Option<i64> = sqlx::query_scalar(
        "SELECT taken.ip + 1 FROM fixed_ips AS taken
         WHERE taken.subnet_id = $1 AND taken.ip >= $2 AND taken.ip < $3 AND NOT EXISTS
             (SELECT 1 FROM fixed_ips AS next WHERE next.subnet_id = $1 AND next.ip = taken.ip + 1)
         ORDER BY taken.ip LIMIT 1",
    )
    .bind(subnet_id)
    .bind(i64::from(first))
    .bind(i64::from(last))
    .fetch_optional(tx)
    .await?;
    gap.map(u32::try_from).transpose().map_err(ApiError::internal)
}

async fn is_free(tx: &mut Conn, subnet_id: &str, ip: u32) -> Result<bool, ApiError> {
    let taken: Option<i64> = sqlx::query_scalar("SELECT ip FROM fixed_ips WHERE subnet_id = $1 AND ip = $2")
        .bind(subnet_id)
        .bind(i64::from(ip))
        .fetch_optional(tx)
        .await?;
    Ok(taken.is_none())
}

async fn insert(
    tx: &mut Conn,
    subnet_id: &str,
    ip: u32,
    port_id: &str,
    position: i64,
) -> Result<(), ApiError> {
    sqlx::query("INSERT INTO fixed_ips (subnet_id, ip, port_id, position) VALUES ($1, $2, $3, $4)")
        .bind(subnet_id)
        .bind(i64::from(ip))
        .bind(port_id)
        .bind(position)
        .execute(tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn pool(start: &str, end: &str) -> Pool {
        Pool { start: start.parse().unwrap(), end: end.parse().unwrap() }
    }

    #[test]
    fn default_pools_leave_out_network_broadcast_and_gateway() {
        let gateway = |text: &str| Some(text.parse().unwrap());
        assert_eq!(default_pools(net("10.0.0.0/24"), gateway("10.0.0.1")), [pool("10.0.0.2", "10.0.0.254")]);
        assert_eq!(
            default_pools(net("10.0.0.0/29"), gateway("10.0.0.4")),
            [pool("10.0.0.1", "10.0.0.3"), pool("10.0.0.5", "10.0.0.6")]
        );
        assert_eq!(default_pools(net("10.0.0.0/29"), None), [pool("10.0.0.1", "10.0.0.6")]);
        assert_eq!(default_pools(net("10.0.0.0/29"), gateway("10.0.0.6")), [pool("10.0.0.1", "10.0.0.5")]);
    }

    #[test]
    fn pools_that_make_no_sense_are_refused() {
        let cidr = net("10.0.0.0/24");
        let check = |pools: &[Pool]| check_pools(cidr, Some("10.0.0.1".parse().unwrap()), pools.to_vec());
        assert!(check(&[pool("10.0.0.20", "10.0.0.30"), pool("10.0.0.2", "10.0.0.9")]).is_ok());
        for pools in [
            vec![pool("10.0.0.9", "10.0.0.2")],
            vec![pool("10.0.1.2", "10.0.1.9")],
            vec![pool("10.0.0.0", "10.0.0.9")],
            vec![pool("10.0.0.9", "10.0.0.255")],
            vec![pool("10.0.0.1", "10.0.0.9")],
            vec![pool("10.0.0.2", "10.0.0.9"), pool("10.0.0.9", "10.0.0.12")],
        ] {
            assert!(check(&pools).is_err(), "{pools:?}");
        }
    }

    #[test]
    fn a_cidr_names_its_own_network() {
        assert!(parse_cidr("10.0.0.0/24").is_ok());
        let error = parse_cidr("10.0.0.5/24").unwrap_err().to_string();
        assert!(error.contains("'10.0.0.0/24' is"), "{error}");
        assert!(parse_cidr("fd00::/64").is_err());
    }

    proptest! {
        /// From wherever the search starts, it covers every address of the pools exactly once.
        #[test]
        fn the_ring_covers_the_pools_exactly_once(
            start in 10..40u32, length in 0..20u32, gap in 1..5u32, second in 0..20u32, next in 0..100u32,
        ) {
            let address = Ipv4Addr::from;
            let pools = [
                Pool { start: address(start), end: address(start + length) },
                Pool { start: address(start + length + gap), end: address(start + length + gap + second) },
            ];
            let covered: Vec<u32> = ring(&pools, next).into_iter().flat_map(|(first, last)| first..=last).collect();
            let wrapped = covered.windows(2).filter(|pair| pair[1] < pair[0]).count();
            prop_assert!(wrapped <= 1);
            let mut sorted = covered.clone();
            sorted.sort_unstable();
            let all: Vec<u32> = (start..=start + length).chain(start + length + gap..=start + length + gap + second).collect();
            prop_assert_eq!(sorted, all);
        }
    }
}
