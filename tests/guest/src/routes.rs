//! DHCP option 121, classless static routes (RFC 3442).

use core::net::Ipv4Addr;

/// One route: destinations whose first `prefix_length` bits equal `destination`'s go through `router`; 0.0.0.0 means
/// that they are on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination network.
    pub destination: Ipv4Addr,
    /// 0–32.
    pub prefix_length: u8,
    /// Next hop.
    pub router: Ipv4Addr,
}

impl Route {
    /// Whether `address` is one of the destinations.
    pub fn covers(&self, address: Ipv4Addr) -> bool {
        let shift = 32 - u32::from(self.prefix_length);
        let prefix = |a: Ipv4Addr| u64::from(u32::from(a)) >> shift;
        prefix(address) == prefix(self.destination)
    }
}

/// The routes in an option's data, up to the first that is cut short or has a prefix longer than 32.
pub fn classless(mut data: &[u8]) -> impl Iterator<Item = Route> {
    core::iter::from_fn(move || {
        let (&prefix_length, rest) = data.split_first()?;
        let significant = usize::from(prefix_length).div_ceil(8);
        if prefix_length > 32 || rest.len() < significant + 4 {
            return None;
        }
        let mut destination = [0; 4];
        destination[..significant].copy_from_slice(&rest[..significant]);
        let router = <[u8; 4]>::try_from(&rest[significant..significant + 4]).ok()?;
        data = &rest[significant + 4..];
        Some(Route { destination: destination.into(), prefix_length, router: router.into() })
    })
}

/// The next hop for `address` by the longest prefix; `None` if no route covers it.
pub fn next_hop(data: &[u8], address: Ipv4Addr) -> Option<Ipv4Addr> {
    let best =
        classless(data).filter(|route| route.covers(address)).max_by_key(|route| route.prefix_length)?;
    Some(if best.router.is_unspecified() { address } else { best.router })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    #[test]
    fn the_longest_prefix_wins() {
        let data = [0, 10, 0, 0, 1, 32, 169, 254, 169, 254, 10, 0, 0, 2, 16, 169, 254, 10, 0, 0, 3];
        assert_eq!(next_hop(&data, METADATA), Some(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(next_hop(&data, Ipv4Addr::new(8, 8, 8, 8)), Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(classless(&data).count(), 3);
    }

    #[test]
    fn router_zero_means_on_the_link() {
        assert_eq!(next_hop(&[32, 169, 254, 169, 254, 0, 0, 0, 0], METADATA), Some(METADATA));
    }

    proptest! {
        #[test]
        fn any_data_ends_without_a_panic(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            next_hop(&data, METADATA);
        }
    }
}
