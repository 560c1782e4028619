//! Which address a port gets: pools (pure), and taking an address within the transaction that makes the port.
//!
//! An address is a row of `fixed_ips` whose primary key is (subnet, address): that two ports share one is impossible,
//! whatever else goes wrong. The search for a free one starts where the last ended, so that a freed address rests for a
//! round (neighbours' ARP caches), and asks the index for the first gap: it reads only as many rows as there are taken
//! addresses in a run from there. Addresses of both families are ordered by a 64-bit [`key`].

use crate::db::Conn;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::attributes::invalid;
use crate::http::error::ApiError;

/// A range of addresses for ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pool {
    /// First.
    pub(super) start: IpAddr,
    /// Last.
    pub(super) end: IpAddr,
}

impl Pool {
    fn contains(&self, ip: IpAddr) -> bool {
        (self.start..=self.end).contains(&ip)
    }
}

/// What IPAM needs of a subnet.
#[derive(Debug, Clone)]
pub(super) struct Range {
    /// Subnet.
    pub(super) subnet_id: String,
    /// All addresses.
    pub(super) cidr: IpNet,
    /// Those for ports that don't ask for a certain one.
    pub(super) pools: Vec<Pool>,
    /// Addresses follow from the ports' MACs (SLAAC, stateless DHCPv6).
    pub(super) automatic: bool,
}

/// The address as the database orders it: an IPv4 address as it is; of an IPv6 address the last 64 bits (subnets have at
/// least 64 bits of prefix), the first one flipped so that a signed number orders them.
pub(super) fn key(ip: IpAddr) -> i64 {
    match ip {
        IpAddr::V4(ip) => i64::from(u32::from(ip)),
        IpAddr::V6(ip) => {
            let low = u128::from(ip) & u128::from(u64::MAX);
            u64::try_from(low).unwrap_or(u64::MAX).cast_signed() ^ i64::MIN
        }
    }
}

/// The address of a subnet that a [`key`] stands for.
pub(super) fn address_of(cidr: IpNet, key: i64) -> Result<IpAddr, ApiError> {
    match cidr {
        IpNet::V4(_) => u32::try_from(key).map(|ip| Ipv4Addr::from(ip).into()).map_err(ApiError::internal),
        IpNet::V6(net) => {
            let prefix = u128::from(net.network()) & !u128::from(u64::MAX);
            Ok(Ipv6Addr::from(prefix | u128::from((key ^ i64::MIN).cast_unsigned())).into())
        }
    }
}

/// The key from which the search of a new subnet starts.
pub(super) fn first_key(cidr: IpNet) -> i64 {
    key(cidr.network())
}

/// First and last address that a device can have: without the network's own and the broadcast address. In IPv6 the first
/// is every router's (RFC 4291 §2.6.1), and the last is left out so that a key has a successor.
pub(super) fn device_range(cidr: IpNet) -> (IpAddr, IpAddr) {
    match cidr {
        IpNet::V4(cidr) => {
            let (network, broadcast) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
            (
                Ipv4Addr::from(network.saturating_add(1)).into(),
                Ipv4Addr::from(broadcast.saturating_sub(1)).into(),
            )
        }
        IpNet::V6(cidr) => {
            let (network, last) = (u128::from(cidr.network()), u128::from(cidr.broadcast()));
            (Ipv6Addr::from(network.saturating_add(1)).into(), Ipv6Addr::from(last.saturating_sub(1)).into())
        }
    }
}

/// Whether a device can have this address.
pub(super) fn is_device_address(cidr: IpNet, ip: IpAddr) -> bool {
    let (first, last) = device_range(cidr);
    cidr.contains(&ip) && (first..=last).contains(&ip)
}

fn step(ip: IpAddr, by: i8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).saturating_add_signed(by.into())).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).saturating_add_signed(by.into())).into(),
    }
}

/// All addresses but the gateway's.
pub(super) fn default_pools(cidr: IpNet, gateway: Option<IpAddr>) -> Vec<Pool> {
    let (start, end) = device_range(cidr);
    let Some(gateway) = gateway.filter(|ip| cidr.contains(ip) && (start..=end).contains(ip)) else {
        return vec![Pool { start, end }];
    };
    let before = Pool { start, end: step(gateway, -1) };
    let after = Pool { start: step(gateway, 1), end };
    [before, after].into_iter().filter(|pool| pool.start <= pool.end).collect()
}

/// The address that a device makes of a prefix and its MAC (RFC 4291 appendix A).
pub(super) fn eui64(cidr: IpNet, mac: &str) -> Option<IpAddr> {
    let IpNet::V6(cidr) = cidr else { return None };
    let bytes: Vec<u8> = mac.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let [a, b, c, d, e, f] = bytes[..] else { return None };
    let interface = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    let prefix = u128::from(cidr.network()) & !u128::from(u64::MAX);
    Some(Ipv6Addr::from(prefix | u128::from(interface)).into())
}

/// Sorts pools, and refuses those that are not within the subnet, overlap, or hold the gateway.
///
/// # Errors
/// 400 (Neutron's `InvalidAllocationPool`, `OutOfBoundsAllocationPool`, `OverlappingAllocationPools`), 409 with the gateway.
pub(super) fn check_pools(
    cidr: IpNet,
    gateway: Option<IpAddr>,
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
            let text = format!(
                "Found overlapping allocation pools: {} {} for subnet {cidr}.",
                named(&pair[0]),
                named(&pair[1])
            );
            return Err(ApiError::Conflict(text).named("OverlappingAllocationPools"));
        }
    }
    Ok(pools)
}

/// The pools as ranges of keys in the order of the search: from `next` on, then the rest from the start.
fn ring(pools: &[Pool], next: i64) -> Vec<(i64, i64)> {
    let ranges = || pools.iter().map(|pool| (key(pool.start), key(pool.end)));
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
    ip: IpAddr,
    port_id: &str,
    position: i64,
) -> Result<(), ApiError> {
    if !is_device_address(range.cidr, ip) {
        let text = format!("IP address {ip} is not a valid IP for the specified subnet.");
        return Err(ApiError::BadRequest(text).named("InvalidIpForSubnet"));
    }
    if !is_free(tx, &range.subnet_id, key(ip)).await? {
        let text = format!("IP address {ip} already allocated in subnet {}", range.subnet_id);
        return Err(ApiError::Conflict(text).named("IpAddressAlreadyAllocated"));
    }
    insert(tx, &range.subnet_id, ip, port_id, position).await
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
) -> Result<Option<IpAddr>, ApiError> {
    // The position in the database, not the one that was read with the subnet: this transaction may have moved it.
    let next: i64 = sqlx::query_scalar("SELECT next_ip FROM subnets WHERE id = $1")
        .bind(&range.subnet_id)
        .fetch_one(&mut *tx)
        .await?;
    for (first, last) in ring(&range.pools, next) {
        let Some(free) = first_free(tx, &range.subnet_id, first, last).await? else { continue };
        let ip = address_of(range.cidr, free)?;
        insert(tx, &range.subnet_id, ip, port_id, position).await?;
        sqlx::query("UPDATE subnets SET next_ip = $1 WHERE id = $2")
            .bind(free.saturating_add(1))
            .bind(&range.subnet_id)
            .execute(tx)
            .await?;
        return Ok(Some(ip));
    }
    Ok(None)
}

/// Neutron's answer when a network is full.
pub(super) fn exhausted(network_id: &str) -> ApiError {
    ApiError::Conflict(format!("No more IP addresses available on network {network_id}."))
        .named("IpAddressGenerationFailure")
}

/// An address range out of a request, checked against nothing but its form.
pub(super) fn parse_cidr(text: &str) -> Result<IpNet, ApiError> {
    let cidr: IpNet =
        text.parse().map_err(|_| invalid("cidr", format!("'{text}' is not a valid IP subnet")))?;
    match cidr.addr() == cidr.network() {
        true => Ok(cidr),
        false => {
            Err(invalid("cidr", format!("'{text}' isn't a recognized IP subnet cidr, '{}' is", cidr.trunc())))
        }
    }
}

async fn first_free(tx: &mut Conn, subnet_id: &str, first: i64, last: i64) -> Result<Option<i64>, ApiError> {
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
    .bind(first)
    .bind(last)
    .fetch_optional(tx)
    .await?;
    Ok(gap)
}

async fn is_free(tx: &mut Conn, subnet_id: &str, key: i64) -> Result<bool, ApiError> {
    let taken: Option<i64> = sqlx::query_scalar("SELECT ip FROM fixed_ips WHERE subnet_id = $1 AND ip = $2")
        .bind(subnet_id)
        .bind(key)
        .fetch_optional(tx)
        .await?;
    Ok(taken.is_none())
}

async fn insert(
    tx: &mut Conn,
    subnet_id: &str,
    ip: IpAddr,
    port_id: &str,
    position: i64,
) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO fixed_ips (subnet_id, ip, address, port_id, position) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(subnet_id)
    .bind(key(ip))
    .bind(ip.to_string())
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

    fn net(text: &str) -> IpNet {
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
        assert!(parse_cidr("fd00::/64").is_ok() && parse_cidr("fd00::1/64").is_err());
    }

    #[test]
    fn an_eui64_address_is_that_of_the_rfc() {
        let address = eui64(net("2001:db8::/64"), "fa:16:3e:33:44:55").unwrap();
        assert_eq!(address.to_string(), "2001:db8::f816:3eff:fe33:4455");
        assert_eq!(eui64(net("10.0.0.0/8"), "fa:16:3e:33:44:55"), None);
    }

    proptest! {
        /// Keys order as addresses do, and give them back.
        #[test]
        fn keys_keep_the_order_of_addresses(a: u64, b: u64) {
            let cidr = net("2001:db8:0:7::/64");
            let address = |low: u64| IpAddr::from(Ipv6Addr::from(0x2001_0db8_0000_0007_u128 << 64 | u128::from(low)));
            prop_assert_eq!(key(address(a)).cmp(&key(address(b))), a.cmp(&b));
            prop_assert_eq!(address_of(cidr, key(address(a))).unwrap(), address(a));
        }

        /// From wherever the search starts, it covers every address of the pools exactly once.
        #[test]
        fn the_ring_covers_the_pools_exactly_once(
            start in 10..40u32, length in 0..20u32, gap in 1..5u32, second in 0..20u32, next in 0..100i64,
        ) {
            let address = |ip: u32| IpAddr::from(Ipv4Addr::from(ip));
            let pools = [
                Pool { start: address(start), end: address(start + length) },
                Pool { start: address(start + length + gap), end: address(start + length + gap + second) },
            ];
            let covered: Vec<i64> = ring(&pools, next).into_iter().flat_map(|(first, last)| first..=last).collect();
            let wrapped = covered.windows(2).filter(|pair| pair[1] < pair[0]).count();
            prop_assert!(wrapped <= 1);
            let mut sorted = covered.clone();
            sorted.sort_unstable();
            let all: Vec<i64> = (start..=start + length)
                .chain(start + length + gap..=start + length + gap + second)
                .map(i64::from)
                .collect();
            prop_assert_eq!(sorted, all);
        }
    }
}
