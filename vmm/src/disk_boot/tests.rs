//! Whole disks with real file systems, good and damaged, through the whole of it: the forked reader included.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use proptest::prelude::*;
use tempfile::TempDir;

use super::partitions::tests::{LINUX_TYPE, with_gpt};
use super::*;

const LIMIT: u64 = 8 << 20;
const FIRST: u64 = 64;
const FS_BYTES: usize = 2 << 20;

/// An ext4 file system with these files; None without mke2fs.
fn ext4(files: &[(&str, &[u8])]) -> Option<Vec<u8>> {
    let directory = TempDir::new().unwrap();
    let (tree, image) = (directory.path().join("tree"), directory.path().join("image"));
    fs::create_dir(&tree).unwrap();
    for (path, content) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix(b"->") {
            Some(target) => std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), path).unwrap(),
            None => fs::write(path, content).unwrap(),
        }
    }
    fs::File::create(&image).unwrap().set_len(FS_BYTES as u64).unwrap();
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image);
    let output = match command.output() {
        Err(error) => {
            eprintln!("SKIPPED: mke2fs: {error}");
            return None;
        }
        Ok(output) => output,
    };
    assert!(output.status.success(), "{output:?}");
    Some(fs::read(image).unwrap())
}

/// A disk with one partition for each file system.
fn disk(file_systems: &[Vec<u8>]) -> Vec<u8> {
    let mut disk = vec![0; FIRST as usize * 512];
    let mut partitions = Vec::new();
    for fs in file_systems {
        let first = disk.len() as u64 / 512;
        disk.extend(fs);
        partitions.push((LINUX_TYPE, first, disk.len() as u64 / 512 - 1));
    }
    disk.resize(disk.len() + 64 * 512, 0);
    with_gpt(disk, &partitions)
}

const MENU: &[u8] = b"set default=\"0\"\nmenuentry 'x' --id y {\nlinux /boot/vmlinuz root=PARTUUID=1 ro\n\
    initrd /boot/one /boot/two\n}\n";

fn debian() -> Option<Vec<u8>> {
    static MADE: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let make = || ext4(&DEBIAN);
    MADE.get_or_init(make).clone()
}

const DEBIAN: [(&str, &[u8]); 6] = [
    ("boot/grub/grub.cfg", MENU),
    ("boot/vmlinuz-6.12", &[7; 300_000]),
    ("boot/vmlinuz", b"->vmlinuz-6.12"),
    ("boot/one", b"12345"),
    ("boot/two", b"67"),
    ("etc/hostname", b"x"),
];

fn content(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn refusal(disk: Vec<u8>) -> String {
    reader::read(Box::new(disk), LIMIT).unwrap_err().to_string()
}

#[test]
fn kernel_initrds_and_options_of_the_default_entry_are_read() {
    let Some(fs) = debian() else { return };
    // In a partition, and on the bare disk.
    for disk in [disk(std::slice::from_ref(&fs)), fs] {
        let found = reader::read(Box::new(disk), LIMIT).unwrap();
        assert_eq!(content(&found.kernel), [7; 300_000]);
        // The second begins at a multiple of four.
        assert_eq!(content(&found.initrd.unwrap()), b"12345\0\0\x0067");
        assert_eq!(found.options, "root=PARTUUID=1 ro");
    }
}

#[test]
fn a_boot_partition_of_its_own_has_the_files_at_its_top() {
    let root = ext4(&[("etc/hostname", b"x")]);
    let boot = ext4(&[
        (
            "loader/entries/fedora-6.12.conf",
            b"title F\nversion 6.12\nlinux /vmlinuz\noptions $kernelopts quiet\n",
        ),
        ("grub2/grubenv", b"# GRUB Environment Block\nkernelopts=root=UUID=5 ro\n####"),
        ("vmlinuz", b"kernel"),
    ]);
    let (Some(root), Some(boot)) = (root, boot) else { return };
    let found = reader::read(Box::new(disk(&[root, boot])), LIMIT).unwrap();
    assert_eq!(content(&found.kernel), b"kernel");
    assert!(found.initrd.is_none());
    assert_eq!(found.options, "root=UUID=5 ro quiet");
}

#[test]
fn what_cannot_be_booted_is_refused_with_the_reason() {
    assert!(refusal(vec![0; 1 << 20]).contains("no ext4 file system with boot loader entries"));
    assert!(refusal(Vec::new()).contains("no ext4 file system"));
    let Some(empty) = ext4(&[("etc/hostname", b"x")]) else { return };
    assert!(refusal(disk(&[empty])).contains("no boot loader entry"));
    let Some(missing) = ext4(&[("boot/grub/grub.cfg", MENU)]) else { return };
    assert!(refusal(disk(&[missing])).contains("/boot/vmlinuz, which isn't there"));
    let Some(large) = debian() else { return };
    let error = reader::read(Box::new(disk(&[large])), 100_000).unwrap_err().to_string();
    assert!(error.contains("300000 bytes"), "{error}");
}

#[test]
fn a_qcow2_root_over_a_backing_file_is_read() {
    let Some(fs) = debian() else { return };
    let directory = TempDir::new().unwrap();
    let (base, image) = (directory.path().join("base"), directory.path().join("image"));
    fs::write(&base, disk(&[fs])).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&base).arg(&image);
    match command.output() {
        Err(error) => return eprintln!("SKIPPED: qemu-img: {error}"),
        Ok(output) => assert!(output.status.success(), "{output:?}"),
    }
    let drive = |path: &Path| Drive {
        drive_id: "root".to_owned(),
        path_on_host: path.to_owned(),
        is_root_device: true,
        ..Drive::default()
    };
    let layered = Drive {
        format: mote_vmm_api::DriveFormat::Qcow2,
        backing_files: vec![mote_vmm_api::BackingFile { path_on_host: base.clone(), ..Default::default() }],
        ..drive(&image)
    };
    for drive in [layered, drive(&base)] {
        assert_eq!(read(&[drive], LIMIT).unwrap().options, "root=PARTUUID=1 ro");
    }
    assert!(matches!(read(&[], LIMIT), Err(DiskBootError::NoRoot)));
}

/// A disk whose reading would never end, or go beyond its limits.
struct Bottomless;

impl Disk for Bottomless {
    fn bytes(&self) -> u64 {
        u64::MAX
    }

    fn read(&mut self, _offset: u64, _to: &mut [u8]) -> io::Result<()> {
        // SAFETY: getppid has no arguments; it stands for any call that the reader has no use for.
        unsafe { libc::syscall(libc::SYS_getppid) };
        Ok(())
    }
}

#[test]
fn a_reader_that_leaves_its_bounds_is_ended_and_the_disk_is_to_blame() {
    assert!(matches!(reader::read(Box::new(Bottomless), LIMIT), Err(DiskBootError::Broken)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Bytes of the file system's structures are changed; whatever it says then, this process goes on.
    #[test]
    fn damaged_disks_are_read_or_refused(
        changes in proptest::collection::vec((prop_oneof![0_usize..0x8000, 0_usize..FS_BYTES], any::<u8>()), 1..40),
    ) {
        let Some(mut fs) = debian() else { return Ok(()) };
        for (at, value) in changes {
            fs[at] = value;
        }
        let _ = reader::read(Box::new(disk(&[fs])), LIMIT);
    }
}
