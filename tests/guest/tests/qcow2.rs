//! The conformance guest's block tests on a qcow2 image over a raw file, on this machine's /dev/kvm. Skipped where
//! /dev/kvm or qemu-img is absent or the programs aren't built.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use mote_guest::host::{self, Monitor};
use mote_vmm_api::{BackingFile, DriveFormat};

const TIMEOUT: Duration = Duration::from_secs(60);
const BASE_BYTES: usize = 4 << 20;
/// The image is longer than what it is based on.
const IMAGE_BYTES: &str = "8M";

fn qemu_img(arguments: &[&str], files: &[&Path]) -> Option<()> {
    let output = Command::new("qemu-img").args(arguments).args(files).output().ok()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    Some(())
}

#[test]
fn a_layered_image_passes_the_block_tests_and_is_sound_afterwards() {
    let programs = host::kvm_usable().and_then(|()| Ok((host::vmm_path()?, host::guest_path()?)));
    let (vmm, guest) = match programs {
        Ok(programs) => programs,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (base, image) = (directory.path().join("base"), directory.path().join("image"));
    let content: Vec<u8> = (0..BASE_BYTES).map(|at| (at / 512) as u8).collect();
    fs::write(&base, &content).expect("a raw file");
    if qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b"], &[&base, &image]).is_none() {
        return eprintln!("SKIPPED: no qemu-img");
    }
    qemu_img(&["resize", "-q", "-f", "qcow2"], &[&image, Path::new(IMAGE_BYTES)]).expect("qemu-img");
    let mut config = host::config(&guest, "mote.test mote.expect=0,1,0 mote.block_ids=layered");
    host::add_drive(&mut config, "layered", &image, false);
    config.drives[0].format = DriveFormat::Qcow2;
    config.drives[0].backing_files =
        vec![BackingFile { path_on_host: base.clone(), ..BackingFile::default() }];
    let outcome = host::run(&Monitor::Mote(vmm), &config, TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    outcome.report().verdict().unwrap_or_else(|error| panic!("{error}"));
    qemu_img(&["check", "-q", "-f", "qcow2"], &[&image]).expect("qemu-img");
    assert!(fs::read(&base).expect("the raw file") == content, "the backing file was changed");
}
