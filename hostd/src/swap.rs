//! The first page of swap space, as `mkswap` writes it and Linux reads it (`union swap_header` in include/linux/swap.h).
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 1024 | 4 | version, 1 |
//! | 1028 | 4 | number of the last page |
//! | 1032 | 4 | how many bad pages, 0 |
//! | 1036 | 16 | UUID |
//! | 1052 | 16 | label |
//! | 4086 | 10 | `SWAPSPACE2` |

use uuid::Uuid;

/// Bytes of a page of x86.
pub const PAGE: usize = 4096;
const MAGIC: &[u8; 10] = b"SWAPSPACE2";
const BOOT_BLOCK: usize = 1024;

/// The header of swap space of so many bytes.
pub fn header(size: u64) -> [u8; PAGE] {
    let last_page = (size / PAGE as u64).saturating_sub(1);
    let mut page = [0; PAGE];
    let fields = &mut page[BOOT_BLOCK..];
    fields[..4].copy_from_slice(&1_u32.to_le_bytes());
    // Linux uses no more pages than the field can say.
    fields[4..8].copy_from_slice(&u32::try_from(last_page).unwrap_or(u32::MAX).to_le_bytes());
    fields[12..28].copy_from_slice(Uuid::new_v4().as_bytes());
    page[PAGE - MAGIC.len()..].copy_from_slice(MAGIC);
    page
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn util_linux_finds_swap_space_with_a_uuid_of_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = 64 << 20;
        file.as_file().set_len(size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &header(size), 0).unwrap();
        assert_ne!(header(size), header(size));
        let Ok(found) = Command::new("blkid").args(["-p", "-o", "export"]).arg(file.path()).output() else {
            eprintln!("SKIPPED: there is no blkid");
            return;
        };
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        assert!(found.contains("TYPE=swap") && found.contains("VERSION=1"), "{found}");
    }
}
