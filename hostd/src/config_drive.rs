//! Config drives: a small disk with a server's metadata, as Nova's with `config_drive_format=vfat`.
//!
//! A guest (cloud-init's ConfigDrive) finds it by its label and reads the documents that the metadata service would give
//! it, without a network. The disk is one FAT file system without a partition table. All names in it are ours; what a
//! tenant has chosen is only ever the content of a file.

use std::io::{self, Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use mote_network::services::metadata::{Guest, config_drive};

/// The label by which guests find it, padded as FAT has it. Lower case as Nova's.
const LABEL: &[u8; 11] = b"config-2   ";
/// Largest drive in bytes; Nova's have this size. The limits of the API allow no more than a few MiB.
pub const CONFIG_DRIVE_MAX: usize = 64 << 20;
/// Sizes are multiples of this.
const MIB: usize = 1 << 20;

/// Why there is no drive.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDriveError {
    /// It says too much.
    #[error("the server's metadata and user data ({bytes} bytes) do not fit into a config drive")]
    TooLarge {
        /// Of all files.
        bytes: usize,
    },
    /// Writing the file system, in memory.
    #[error("cannot make the file system of the config drive")]
    Write {
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The drive of a server, whole: a multiple of 1 MiB.
///
/// # Errors
/// [`ConfigDriveError`].
pub fn image(guest: &Guest) -> Result<Vec<u8>, ConfigDriveError> {
    let files = config_drive(guest);
    let bytes: usize = files.iter().map(|(_, body)| body.len()).sum();
    // One MiB more holds the tables, the directories, and the unused ends of some ten files' last clusters.
    let size = (bytes + MIB).next_multiple_of(MIB);
    if size > CONFIG_DRIVE_MAX {
        return Err(ConfigDriveError::TooLarge { bytes });
    }
    // Two drives in one guest shall not have one id.
    let volume_id = (guest.metadata.uuid.0.as_u128() >> 96) as u32;
    write(&files, size, volume_id).map_err(|source| ConfigDriveError::Write { source })
}

fn write(files: &[(String, Vec<u8>)], size: usize, volume_id: u32) -> io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; size]);
    format_volume(&mut disk, FormatVolumeOptions::new().volume_label(*LABEL).volume_id(volume_id))?;
    let system = FileSystem::new(&mut disk, FsOptions::new())?;
    for (path, body) in files {
        let root = system.root_dir();
        for (end, _) in path.match_indices('/') {
            // One that is there is opened.
            root.create_dir(&path[..end])?;
        }
        let mut file = root.create_file(path)?;
        file.write_all(body)?;
        file.flush()?;
    }
    system.unmount()?;
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::{io::Read, process::Command};

    use mote_host_api::InstanceMetadata;
    use proptest::prelude::*;

    use super::*;
    use crate::sim::server_spec;

    fn metadata() -> InstanceMetadata {
        server_spec(&[]).metadata
    }

    fn guest(metadata: &InstanceMetadata) -> Guest {
        Guest::of_server(metadata, &[], &[])
    }

    /// Every file, read by the same library from the bytes alone.
    fn read(drive: &[u8]) -> Vec<(String, Vec<u8>)> {
        fn walk(dir: &fatfs::Dir<'_, Cursor<Vec<u8>>>, path: &str, found: &mut Vec<(String, Vec<u8>)>) {
            for entry in dir.iter().map(Result::unwrap) {
                let name = entry.file_name();
                match entry.is_dir() {
                    true if matches!(name.as_str(), "." | "..") => {}
                    true => walk(&entry.to_dir(), &format!("{path}{name}/"), found),
                    false => {
                        let mut body = Vec::new();
                        entry.to_file().read_to_end(&mut body).unwrap();
                        found.push((format!("{path}{name}"), body));
                    }
                }
            }
        }
        let system = FileSystem::new(Cursor::new(drive.to_vec()), FsOptions::new()).unwrap();
        assert_eq!(system.read_volume_label_from_root_dir_as_bytes().unwrap().as_ref(), Some(LABEL));
        let mut found = Vec::new();
        walk(&system.root_dir(), "", &mut found);
        found.sort();
        found
    }

    /// The documents, without the random bytes that each reading of them has anew.
    fn comparable(mut files: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
        for (path, body) in &mut files {
            if path.ends_with("/meta_data.json") {
                let mut data: serde_json::Value = serde_json::from_slice(body).unwrap();
                assert!(data.as_object_mut().unwrap().remove("random_seed").is_some());
                *body = data.to_string().into_bytes();
            }
        }
        files.sort();
        files
    }

    #[test]
    fn a_drive_has_the_documents_of_the_metadata_service_and_the_label_that_is_looked_for() {
        let mut metadata = metadata();
        metadata.user_data = Some("I2Nsb3VkLWNvbmZpZw==".into());
        let guest = guest(&metadata);
        let drive = image(&guest).unwrap();
        let files = read(&drive);
        assert_eq!(comparable(files.clone()), comparable(config_drive(&guest)));
        let file = |path: &str| &files.iter().find(|(found, _)| found == path).unwrap().1;
        assert_eq!(file("openstack/latest/user_data"), b"#cloud-config");
        assert_eq!(file("openstack/latest/vendor_data.json"), b"{}");

        // As cloud-init looks for it.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drive");
        std::fs::write(&path, drive).unwrap();
        match Command::new("blkid").args(["-o", "export", "-p"]).arg(&path).output() {
            Err(_) => println!("SKIPPED: blkid's look at it: there is no blkid here"),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(said.contains("LABEL=config-2\n") && said.contains("TYPE=vfat\n"), "{said}");
            }
        }
    }

    #[test]
    fn the_most_that_the_api_lets_a_tenant_say_fits() {
        let mut metadata = metadata();
        // A control character is six in JSON.
        metadata.meta = (0..128).map(|n| (format!("{n:0255}"), "\u{1}".repeat(255))).collect();
        metadata.public_keys = [("k".repeat(255), "x".repeat(16 << 10))].into();
        metadata.user_data = Some("QUFB".repeat(65_535 / 4));
        let guest = guest(&metadata);
        let drive = image(&guest).unwrap();
        assert_eq!(comparable(read(&drive)), comparable(config_drive(&guest)));
        metadata.meta.insert("too much".into(), "x".repeat(CONFIG_DRIVE_MAX / 2));
        assert!(matches!(image(&self::guest(&metadata)), Err(ConfigDriveError::TooLarge { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn whatever_a_tenant_says_is_content_and_comes_back_as_it_was(
            name in ".{0,255}",
            key in ".{0,255}",
            value in ".{0,255}",
            user_data in proptest::option::of("[A-Za-z0-9+/=!\n]{0,4096}"),
        ) {
            let mut metadata = metadata();
            metadata.name = name.clone();
            metadata.public_keys = [(name, value.clone())].into();
            metadata.meta = [(key, value)].into();
            metadata.user_data = user_data;
            let guest = guest(&metadata);
            prop_assert_eq!(comparable(read(&image(&guest).unwrap())), comparable(config_drive(&guest)));
        }
    }
}
