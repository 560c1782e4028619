//! Disks of servers beside the root disk: ephemeral disks, of which a flavor says how large they are together, and swap space.
//!
//! They are numbered with the root disk, and as with it another number is another disk: they are made anew, empty, when the
//! root disk is (rebuild, unshelve), and copied when it is (resize).

use mote_host_api::LocalDiskSpec;

use super::super::flavors::Flavor;
use crate::http::error::ApiError;

const MIB_PER_GIB: u64 = 1024;

/// A disk that a request names; without a size it has the flavor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// GiB.
    Ephemeral(Option<u64>),
    /// MiB.
    Swap(Option<u64>),
}

fn amount(stored: i64) -> u64 {
    u64::try_from(stored).unwrap_or(0)
}

fn bad<T>(text: impl Into<String>) -> Result<T, ApiError> {
    Err(ApiError::BadRequest(text.into()))
}

/// What a server of a flavor gets: what the request names of it, else all that the flavor has. The root disk has number 1.
pub(super) fn of_request(flavor: &Flavor, wishes: &[Wish]) -> Result<Vec<LocalDiskSpec>, ApiError> {
    let (mut ephemeral, mut swap) = (Vec::new(), Vec::new());
    for wish in wishes {
        match wish {
            Wish::Ephemeral(size) => ephemeral.push(size.unwrap_or(amount(flavor.ephemeral_gib))),
            Wish::Swap(size) => swap.push(size.unwrap_or(amount(flavor.swap_mib))),
        }
    }
    if ephemeral.is_empty() {
        ephemeral.push(amount(flavor.ephemeral_gib));
    } else if ephemeral.iter().sum::<u64>() > amount(flavor.ephemeral_gib) {
        return bad(format!(
            "Ephemeral disks requested are larger than the instance type allows ({} GiB).",
            flavor.ephemeral_gib
        ));
    }
    match swap.as_slice() {
        [] => swap.push(amount(flavor.swap_mib)),
        [size] if *size <= amount(flavor.swap_mib) => {}
        [_] => {
            return bad(format!(
                "Swap drive requested is larger than instance type allows ({} MiB).",
                flavor.swap_mib
            ));
        }
        _ => return bad("More than one swap drive requested."),
    }
    let ephemeral = ephemeral.into_iter().map(|gib| (gib.saturating_mul(MIB_PER_GIB), false));
    let sizes = ephemeral.chain(swap.into_iter().map(|mib| (mib, true))).filter(|(size, _)| *size > 0);
    (2..)
        .zip(sizes)
        .map(|(number, (size_mib, swap))| Ok(LocalDiskSpec { number, copy_of: None, size_mib, swap }))
        .collect()
}

/// Number of the last one, or of the root disk if there are none.
pub(super) fn last(root: i64, disks: &[LocalDiskSpec]) -> i64 {
    disks.iter().map(|disk| i64::from(disk.number)).fold(root, i64::max)
}

fn numbered(root: i64, disks: impl Iterator<Item = LocalDiskSpec>) -> Result<Vec<LocalDiskSpec>, ApiError> {
    let first = u32::try_from(root).map_err(ApiError::internal)?.saturating_add(1);
    Ok((first..).zip(disks).map(|(number, disk)| LocalDiskSpec { number, ..disk }).collect())
}

/// The same, empty, with numbers after that of a new root disk.
pub(super) fn anew(root: i64, disks: &[LocalDiskSpec]) -> Result<Vec<LocalDiskSpec>, ApiError> {
    numbered(root, disks.iter().map(|disk| LocalDiskSpec { copy_of: None, ..*disk }))
}

/// Those of another flavor, with numbers after that of the root disk's copy: copies of the ephemeral disks, of which a
/// single one becomes as large as the flavor says, and new swap space.
pub(super) fn resized(
    root: i64,
    disks: &[LocalDiskSpec],
    flavor: &Flavor,
) -> Result<Vec<LocalDiskSpec>, ApiError> {
    let mut ephemeral: Vec<LocalDiskSpec> = disks.iter().filter(|disk| !disk.swap).copied().collect();
    let wanted = amount(flavor.ephemeral_gib).saturating_mul(MIB_PER_GIB);
    if ephemeral.iter().map(|disk| disk.size_mib).sum::<u64>() > wanted {
        return bad("Unable to resize disk down.");
    }
    for disk in &mut ephemeral {
        disk.copy_of = Some(disk.number);
    }
    let new = |size_mib, swap| LocalDiskSpec { number: 0, copy_of: None, size_mib, swap };
    match ephemeral.as_mut_slice() {
        [] => ephemeral.extend(Some(new(wanted, false)).filter(|_| wanted > 0)),
        [one] => one.size_mib = wanted,
        _ => {}
    }
    let swap = amount(flavor.swap_mib);
    numbered(root, ephemeral.into_iter().chain(Some(new(swap, true)).filter(|_| swap > 0)))
}

/// EC2's names of a server's disks and where its guest finds them: after the root disk, and after what a rescued one boots.
pub(crate) fn names(disks: &[LocalDiskSpec], rescued: bool) -> impl Iterator<Item = (String, String)> + '_ {
    let first = if rescued { b'c' } else { b'b' };
    let mut ephemeral = 0..;
    (first..=b'z').zip(disks).map(move |(letter, disk)| {
        let name = match disk.swap {
            true => "swap".to_owned(),
            false => format!("ephemeral{}", ephemeral.next().unwrap_or(0)),
        };
        (name, format!("/dev/vd{}", char::from(letter)))
    })
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    fn flavor(ephemeral_gib: i64, swap_mib: i64) -> Flavor {
        let (id, name) = ("f".to_owned(), "f".to_owned());
        Flavor { id, name, vcpus: 1, memory_mib: 64, disk_gib: 1, ephemeral_gib, swap_mib }
    }

    fn disk(number: u32, copy_of: Option<u32>, size_mib: u64, swap: bool) -> LocalDiskSpec {
        LocalDiskSpec { number, copy_of, size_mib, swap }
    }

    #[test]
    fn a_request_gets_what_its_flavor_has_or_less() {
        assert_eq!(of_request(&flavor(0, 0), &[]).unwrap(), []);
        let both = of_request(&flavor(2, 64), &[]).unwrap();
        assert_eq!(both, [disk(2, None, 2048, false), disk(3, None, 64, true)]);
        let wishes = [Wish::Swap(Some(32)), Wish::Ephemeral(Some(1)), Wish::Ephemeral(Some(1))];
        let less = of_request(&flavor(2, 64), &wishes).unwrap();
        assert_eq!(less, [disk(2, None, 1024, false), disk(3, None, 1024, false), disk(4, None, 32, true)]);
        for wishes in [
            &[Wish::Swap(Some(65))][..],
            &[Wish::Swap(None), Wish::Swap(None)],
            &[Wish::Ephemeral(Some(1)), Wish::Ephemeral(Some(2))],
        ] {
            of_request(&flavor(2, 64), wishes).unwrap_err();
        }
        assert_eq!(flavor(2, 64).local_gib(), 3);
    }

    #[test]
    fn a_resize_copies_and_grows_what_can_be_lost() {
        let old = [disk(2, None, 1024, false), disk(3, None, 64, true)];
        let grown = resized(4, &old, &flavor(2, 32)).unwrap();
        assert_eq!(grown, [disk(5, Some(2), 2048, false), disk(6, None, 32, true)]);
        assert_eq!(last(4, &grown), 6);
        assert_eq!(resized(4, &old, &flavor(1, 0)).unwrap(), [disk(5, Some(2), 1024, false)]);
        assert_eq!(resized(4, &[], &flavor(1, 0)).unwrap(), [disk(5, None, 1024, false)]);
        resized(4, &old, &flavor(0, 64)).unwrap_err();
        assert_eq!(anew(7, &grown).unwrap(), [disk(8, None, 2048, false), disk(9, None, 32, true)]);
        assert_eq!(last(7, &[]), 7);
    }

    #[test]
    fn guests_are_told_where_their_disks_are() {
        let disks = [disk(2, None, 1, false), disk(3, None, 1, false), disk(4, None, 1, true)];
        let told: Vec<_> = names(&disks, false).collect();
        let pair = |name: &str, device: &str| (name.to_owned(), device.to_owned());
        assert_eq!(
            told,
            [pair("ephemeral0", "/dev/vdb"), pair("ephemeral1", "/dev/vdc"), pair("swap", "/dev/vdd")]
        );
        assert_eq!(names(&disks, true).next(), Some(pair("ephemeral0", "/dev/vdc")));
    }
}
