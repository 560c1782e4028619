//! The addresses of ports.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    super::{
        ipam::{self, Range},
        networks::NetworkRow,
        subnets,
    },
    INTERFACE_OWNER, SERVICE_OWNER,
    store::{self, Groups, NewPort, Port},
};
use crate::{db::Conn, http::error::ApiError};

/// The addresses that a port shall get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum FixedIps {
    /// One of each version of IP that has a subnet, and those that follow from the MAC.
    Any,
    /// These, possibly none, and those that follow from the MAC.
    These(Vec<FixedIpWish>),
    /// These and no others.
    Exactly(Vec<FixedIpWish>),
}

/// A wish for one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct FixedIpWish {
    /// In this subnet.
    pub(in super::super) subnet_id: Option<String>,
    /// This one.
    pub(in super::super) ip: Option<IpAddr>,
}

/// Gives a new port its addresses, and says how many.
pub(super) async fn take(
    tx: &mut Conn,
    network_id: &str,
    [port_id, mac]: [&str; 2],
    fixed_ips: &FixedIps,
) -> Result<i64, ApiError> {
    let ranges = subnets::ranges(tx, network_id).await?;
    match fixed_ips {
        FixedIps::Any => {
            let position = take_any(tx, network_id, &ranges, port_id).await?;
            take_automatic(tx, &ranges, [port_id, mac], position).await
        }
        FixedIps::Exactly(wishes) => {
            take_these(tx, network_id, &ranges, [port_id, mac], wishes).await?;
            i64::try_from(wishes.len()).map_err(ApiError::internal)
        }
        FixedIps::These(wishes) => {
            take_these(tx, network_id, &ranges, [port_id, mac], wishes).await?;
            let position = i64::try_from(wishes.len()).map_err(ApiError::internal)?;
            match wishes.is_empty() {
                true => Ok(0),
                false => take_automatic(tx, &ranges, [port_id, mac], position).await,
            }
        }
    }
}

/// One address of each version; gives the next position.
async fn take_any(tx: &mut Conn, network_id: &str, ranges: &[Range], port_id: &str) -> Result<i64, ApiError> {
    let mut position = 0;
    for ipv4 in [true, false] {
        let of_version = |range: &&Range| matches!(range.cidr, IpNet::V4(_)) == ipv4 && !range.automatic;
        let candidates: Vec<&Range> = ranges.iter().filter(of_version).collect();
        let mut taken = candidates.is_empty();
        for range in candidates {
            if ipam::take_next(tx, range, port_id, position).await?.is_some() {
                (taken, position) = (true, position + 1);
                break;
            }
        }
        if !taken {
            return Err(ipam::exhausted(network_id));
        }
    }
    Ok(position)
}

/// The addresses that follow from the MAC, as far as the port doesn't have them yet; gives the next position.
async fn take_automatic(
    tx: &mut Conn,
    ranges: &[Range],
    [port_id, mac]: [&str; 2],
    mut position: i64,
) -> Result<i64, ApiError> {
    for range in ranges.iter().filter(|range| range.automatic) {
        let there: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM fixed_ips WHERE port_id = $1 AND subnet_id = $2)",
        )
        .bind(port_id)
        .bind(&range.subnet_id)
        .fetch_one(&mut *tx)
        .await?;
        if there {
            continue;
        }
        take_eui64(tx, range, [port_id, mac], position).await?;
        position += 1;
    }
    Ok(position)
}

/// Gives a port whose MAC has changed the addresses that follow from the new one.
pub(super) async fn follow_mac(tx: &mut Conn, port: &Port, mac: &str) -> Result<(), ApiError> {
    let ranges = subnets::ranges(tx, &port.row.network_id).await?;
    for range in ranges.iter().filter(|range| range.automatic) {
        let there = port.fixed_ips.iter().any(|(subnet, _)| *subnet == range.subnet_id);
        if there {
            take_address(tx, &port.row.id, &range.subnet_id).await?;
            let position = i64::try_from(port.fixed_ips.len()).map_err(ApiError::internal)?;
            take_eui64(tx, range, [&port.row.id, mac], position).await?;
        }
    }
    Ok(())
}

async fn take_eui64(
    tx: &mut Conn,
    range: &Range,
    [port_id, mac]: [&str; 2],
    position: i64,
) -> Result<(), ApiError> {
    let ip = ipam::eui64(range.cidr, mac)
        .ok_or_else(|| ApiError::internal("a subnet with automatic addresses has no prefix of IPv6"))?;
    ipam::take(tx, range, ip, port_id, position).await
}

async fn take_these(
    tx: &mut Conn,
    network_id: &str,
    ranges: &[Range],
    [port_id, mac]: [&str; 2],
    wishes: &[FixedIpWish],
) -> Result<(), ApiError> {
    // Certain addresses first, so that a wish for any address doesn't take one of them; the order stays.
    let ordered = wishes.iter().enumerate();
    let (certain, any): (Vec<_>, Vec<_>) = ordered.partition(|(_, wish)| wish.ip.is_some());
    for (index, wish) in certain.into_iter().chain(any) {
        let position = i64::try_from(index).map_err(ApiError::internal)?;
        let range = range_of(network_id, ranges, wish)?;
        match wish.ip {
            Some(ip) => take_certain(tx, range, ip, [port_id, mac], position).await?,
            None if range.automatic => take_eui64(tx, range, [port_id, mac], position).await?,
            None => {
                let taken = ipam::take_next(tx, range, port_id, position).await?;
                taken.ok_or_else(|| ipam::exhausted(network_id))?;
            }
        }
    }
    Ok(())
}

/// An address that was asked for; where addresses follow from the MAC only that one is possible, or the router's.
async fn take_certain(
    tx: &mut Conn,
    range: &Range,
    ip: IpAddr,
    [port_id, mac]: [&str; 2],
    position: i64,
) -> Result<(), ApiError> {
    if range.automatic && ipam::eui64(range.cidr, mac) != Some(ip) {
        let owner: String = sqlx::query_scalar("SELECT device_owner FROM ports WHERE id = $1")
            .bind(port_id)
            .fetch_one(&mut *tx)
            .await?;
        if owner != INTERFACE_OWNER {
            let text = format!(
                "IPv6 address {ip} cannot be directly assigned to a port on subnet {} as the subnet is configured for \
                 automatic addresses",
                range.subnet_id
            );
            return Err(ApiError::BadRequest(text).named("AllocationOnAutoAddressSubnet"));
        }
    }
    ipam::take(tx, range, ip, port_id, position).await
}

fn range_of<'a>(network_id: &str, ranges: &'a [Range], wish: &FixedIpWish) -> Result<&'a Range, ApiError> {
    match (&wish.subnet_id, wish.ip) {
        (Some(subnet), _) => ranges.iter().find(|range| range.subnet_id == *subnet).ok_or_else(|| {
            let text = format!(
                "Invalid input for operation: Failed to create port on network {network_id}, because fixed_ips \
                 included invalid subnet {subnet}."
            );
            ApiError::BadRequest(text).named("InvalidInput")
        }),
        (None, Some(ip)) => ranges.iter().find(|range| range.cidr.contains(&ip)).ok_or_else(|| {
            let text =
                format!("IP address {ip} is not a valid IP for any of the subnets on the specified network.");
            ApiError::BadRequest(text).named("InvalidIpForNetwork")
        }),
        (None, None) => ranges.first().ok_or_else(|| ipam::exhausted(network_id)),
    }
}

/// Gives a port other addresses. Where it shall have some address of a subnet that it has one of, it keeps that.
pub(in super::super) async fn replace(tx: &mut Conn, port: &Port, wanted: FixedIps) -> Result<(), ApiError> {
    let (FixedIps::These(mut wishes) | FixedIps::Exactly(mut wishes)) = wanted else { return Ok(()) };
    let mut kept: Vec<_> =
        port.fixed_ips.iter().filter(|(_, ip)| !wishes.iter().any(|wish| wish.ip == Some(*ip))).collect();
    for wish in wishes.iter_mut().filter(|wish| wish.ip.is_none()) {
        let same = kept.iter().position(|(subnet, _)| Some(subnet) == wish.subnet_id.as_ref());
        wish.ip = same.map(|at| kept.remove(at).1);
    }
    sqlx::query("DELETE FROM fixed_ips WHERE port_id = $1").bind(&port.row.id).execute(&mut *tx).await?;
    let mac: String = sqlx::query_scalar("SELECT mac_address FROM ports WHERE id = $1")
        .bind(&port.row.id)
        .fetch_one(&mut *tx)
        .await?;
    take(tx, &port.row.network_id, [&port.row.id, &mac], &FixedIps::These(wishes)).await?;
    Ok(())
}

/// Gives a port one more address: this one, or the next free one of the subnet.
pub(in super::super) async fn give_address(
    tx: &mut Conn,
    port: &Port,
    subnet_id: &str,
    ip: Option<IpAddr>,
) -> Result<(), ApiError> {
    let ranges = subnets::ranges(tx, &port.row.network_id).await?;
    let wish = FixedIpWish { subnet_id: Some(subnet_id.to_owned()), ip };
    let range = range_of(&port.row.network_id, &ranges, &wish)?;
    let position = i64::try_from(port.fixed_ips.len()).map_err(ApiError::internal)?;
    match ip {
        Some(ip) => ipam::take(tx, range, ip, &port.row.id, position).await,
        None => {
            let taken = ipam::take_next(tx, range, &port.row.id, position).await?;
            taken.map(|_| ()).ok_or_else(|| ipam::exhausted(&port.row.network_id))
        }
    }
}

/// Takes the address that a port has in a subnet back.
pub(in super::super) async fn take_address(
    tx: &mut Conn,
    port_id: &str,
    subnet_id: &str,
) -> Result<(), ApiError> {
    sqlx::query("DELETE FROM fixed_ips WHERE port_id = $1 AND subnet_id = $2")
        .bind(port_id)
        .bind(subnet_id)
        .execute(tx)
        .await?;
    Ok(())
}

/// Gives the network's service port (made with the first subnet) an address in a new subnet.
pub(in super::super) async fn add_service_address(
    tx: &mut Conn,
    network: &NetworkRow,
    subnet_id: &str,
) -> Result<(), ApiError> {
    let port_id = match service_port(tx, &network.id).await? {
        Some(id) => id,
        None => {
            let new = NewPort {
                port_security: Some(false),
                groups: Groups::These(Vec::new()),
                ..NewPort::own(
                    &network.project_id,
                    SERVICE_OWNER,
                    &format!("mote-{}", network.id),
                    FixedIps::Exactly(Vec::new()),
                )
            };
            store::insert(tx, &network.id, &new).await?
        }
    };
    let ranges = subnets::ranges(tx, &network.id).await?;
    let range = ranges.iter().find(|range| range.subnet_id == subnet_id);
    let range = range.ok_or_else(|| ApiError::internal("the subnet that was just made is not there"))?;
    let taken = ipam::take_next(tx, range, &port_id, 0).await?;
    taken.map(|_| ()).ok_or_else(|| ipam::exhausted(&network.id))
}

/// Takes the service port's address in a subnet back, and the port with its last address.
pub(in super::super) async fn remove_service_address(
    tx: &mut Conn,
    network_id: &str,
    subnet_id: &str,
) -> Result<(), ApiError> {
    let Some(port_id) = service_port(tx, network_id).await? else { return Ok(()) };
    take_address(tx, &port_id, subnet_id).await?;
    sqlx::query(
        "DELETE FROM ports WHERE id = $1 AND NOT EXISTS (SELECT 1 FROM fixed_ips WHERE port_id = $1)",
    )
    .bind(&port_id)
    .execute(&mut *tx)
    .await?;
    Ok(())
}

async fn service_port(tx: &mut Conn, network_id: &str) -> Result<Option<String>, ApiError> {
    let sql = "SELECT id FROM ports WHERE network_id = $1 AND device_owner = $2";
    Ok(sqlx::query_scalar(sql).bind(network_id).bind(SERVICE_OWNER).fetch_optional(tx).await?)
}

/// Gives the ports of a network their addresses in a new subnet in which they follow from the MACs.
pub(in super::super) async fn add_automatic_addresses(
    tx: &mut Conn,
    network_id: &str,
    subnet_id: &str,
) -> Result<(), ApiError> {
    let ranges = subnets::ranges(tx, network_id).await?;
    let Some(range) = ranges.iter().find(|range| range.subnet_id == subnet_id && range.automatic) else {
        return Ok(());
    };
    let ports: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT ports.id, ports.mac_address, COUNT(*) FROM ports JOIN fixed_ips ON fixed_ips.port_id = ports.id
         WHERE ports.network_id = $1 AND ports.device_owner NOT LIKE 'network:%'
         GROUP BY ports.id, ports.mac_address",
    )
    .bind(network_id)
    .fetch_all(&mut *tx)
    .await?;
    for (id, mac, position) in ports {
        take_eui64(tx, range, [&id, &mac], position).await?;
    }
    Ok(())
}

/// Takes them back; routers keep theirs.
pub(in super::super) async fn remove_automatic_addresses(
    tx: &mut Conn,
    subnet_id: &str,
) -> Result<(), ApiError> {
    sqlx::query(
        "DELETE FROM fixed_ips WHERE subnet_id = $1
             AND port_id IN (SELECT id FROM ports WHERE device_owner NOT LIKE 'network:%')",
    )
    .bind(subnet_id)
    .execute(tx)
    .await?;
    Ok(())
}
