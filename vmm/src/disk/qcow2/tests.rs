//! Against qemu-img, which makes the images, checks them and reads them back.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Size of the test's disks: no multiple of any cluster but the smallest.
const SIZE: usize = 3 * (1 << 20) + 1536;

fn qemu_img(arguments: &[&str]) -> Option<String> {
    let output = Command::new("qemu-img").args(arguments).output().ok()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    Some(text)
}

/// Whether the tests can run; says so if not.
fn has_qemu_img() -> bool {
    let found = qemu_img(&["--version"]).is_some();
    if !found {
        println!("SKIPPED: no qemu-img");
    }
    found
}

struct Place(TempDir);

impl Place {
    /// In memory where that is possible: images are synced often.
    fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn create(&self, name: &str, options: &str, size: usize) {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &self.text(name), &size.to_string()]);
    }

    /// A raw file with a pattern, with stretches of zeros in it.
    fn raw(&self, name: &str, size: usize) -> Vec<u8> {
        let content: Vec<u8> = (0..size)
            .map(|at| if at / 40_000 % 3 == 1 { 0 } else { (at / 512 * 31 + at % 251) as u8 })
            .collect();
        fs::write(self.path(name), &content).unwrap();
        content
    }

    fn open(&self, name: &str, writable: bool, backing: Option<Backing>) -> Result<Qcow2, FormatError> {
        Qcow2::open(&self.path(name), writable, backing)
    }

    fn raw_backing(&self, name: &str) -> Option<Backing> {
        let file = File::open(self.path(name)).unwrap();
        let bytes = file.metadata().unwrap().len();
        Some(Backing::Raw(file, bytes))
    }

    /// What qemu-img reads, after it has found the image sound.
    fn checked(&self, name: &str) -> Vec<u8> {
        let text = qemu_img(&["check", "-f", "qcow2", &self.text(name)]).unwrap();
        assert!(text.contains("No errors were found"), "{text}");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &self.text(name), &self.text("read.raw")]);
        fs::read(self.path("read.raw")).unwrap()
    }
}

fn read(image: &mut Qcow2, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read(&mut Bytes::new(&mut bytes), offset as u64, len).unwrap();
    bytes
}

fn write(image: &mut Qcow2, offset: usize, data: &[u8]) {
    image.write(&mut &*data, offset as u64, data.len()).unwrap();
}

#[test]
fn a_new_image_reads_as_zeros_and_keeps_what_is_written() {
    if !has_qemu_img() {
        return;
    }
    for options in [
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,cluster_size=512",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,refcount_bits=1,cluster_size=4k",
        "compat=1.1,refcount_bits=64,cluster_size=1k",
        "compat=1.1,preallocation=metadata",
    ] {
        let place = Place::new();
        place.create("image", options, SIZE);
        let mut model = vec![0; SIZE];
        let mut image = place.open("image", true, None).unwrap();
        assert_eq!(image.size(), SIZE as u64);
        assert_eq!(read(&mut image, 0, SIZE), model, "{options}");
        for (offset, len) in
            [(0, 512), (65_536 - 512, 1024), (1 << 20, 300_000 / 512 * 512), (SIZE - 512, 512)]
        {
            let data: Vec<u8> = (0..len).map(|n| (n * 3 + offset) as u8 | 1).collect();
            write(&mut image, offset, &data);
            model[offset..offset + len].copy_from_slice(&data);
        }
        assert_eq!(read(&mut image, 0, SIZE), model, "{options}");
        drop(image);
        assert!(place.checked("image") == model, "{options}");
        let mut again = place.open("image", false, None).unwrap();
        assert_eq!(read(&mut again, 0, SIZE), model);
    }
}

#[test]
fn a_small_refcount_table_grows() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    // A table of one cluster has 64 blocks of 64 counts: 2 MiB.
    let size = 12 << 20;
    place.create("image", "compat=1.1,cluster_size=512,refcount_bits=64", size);
    let model: Vec<u8> = (0..size).map(|at| (at / 512) as u8 | 1).collect();
    let mut image = place.open("image", true, None).unwrap();
    for (number, piece) in model.chunks(64 << 10).enumerate() {
        write(&mut image, number * (64 << 10), piece);
    }
    drop(image);
    assert!(place.checked("image") == model);
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    if !has_qemu_img() {
        return;
    }
    for options in ["compat=1.1", "compat=0.10,cluster_size=4k"] {
        let place = Place::new();
        let mut model = place.raw("content", SIZE);
        let (from, to) = (place.text("content"), place.text("image"));
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &from, &to]);
        let mut image = place.open("image", true, None).unwrap();
        assert!(read(&mut image, 0, SIZE) == model);
        for offset in [512, 700 * 1024, 701 * 1024, 2 << 20] {
            write(&mut image, offset, &[9; 1536]);
            model[offset..offset + 1536].fill(9);
        }
        assert!(read(&mut image, 0, SIZE) == model);
        drop(image);
        assert!(place.checked("image") == model, "{options}");
    }
}

#[test]
fn a_chain_of_images_is_read_through_and_only_the_top_is_written() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    // Each is longer than what it is based on.
    let mut model = place.raw("base", 1 << 20);
    let (middle, top) = (place.text("middle"), place.text("top"));
    let base = place.text("base");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &middle, "2M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top, &SIZE.to_string()]);
    model.resize(2 << 20, 0);
    let mut image = place.open("middle", true, place.raw_backing("base")).unwrap();
    write(&mut image, 70_000 / 512 * 512, &[1; 2048]);
    model[70_000 / 512 * 512..][..2048].fill(1);
    write(&mut image, (1 << 20) - 512, &[2; 1024]);
    model[(1 << 20) - 512..][..1024].fill(2);
    drop(image);
    model.resize(SIZE, 0);
    let before = (fs::read(place.path("base")).unwrap(), fs::read(place.path("middle")).unwrap());
    let middle = place.open("middle", false, place.raw_backing("base")).unwrap();
    let mut image = place.open("top", true, Some(Backing::Qcow2(Box::new(middle)))).unwrap();
    assert!(read(&mut image, 0, SIZE) == model);
    write(&mut image, 512, &[3; 512]);
    model[512..1024].fill(3);
    image.write_zeroes(65_536, 131_072).unwrap();
    model[65_536..][..131_072].fill(0);
    image.write_zeroes((2 << 20) - 512, 2048).unwrap();
    model[(2 << 20) - 512..][..2048].fill(0);
    assert!(read(&mut image, 0, SIZE) == model);
    drop(image);
    assert!(place.checked("top") == model);
    assert!(before == (fs::read(place.path("base")).unwrap(), fs::read(place.path("middle")).unwrap()));
}

#[test]
fn the_chain_is_the_configurations_and_not_the_images() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    place.raw("base", 1 << 20);
    place.create("plain", "compat=1.1", SIZE);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &place.text("base"), "-F", "raw", &place.text("top")]);
    let refused = |name, backing| place.open(name, true, backing).err().unwrap().to_string();
    assert!(refused("top", None).contains("backing_files"));
    assert!(refused("plain", place.raw_backing("base")).contains("backing_files"));
    // The name in the image is not looked at.
    fs::rename(place.path("base"), place.path("moved")).unwrap();
    place.open("top", true, place.raw_backing("moved")).unwrap();
}

#[test]
fn an_image_has_one_writer() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    place.create("image", "compat=1.1", SIZE);
    let writer = place.open("image", true, None).unwrap();
    for writable in [true, false] {
        assert!(matches!(place.open("image", writable, None), Err(FormatError::InUse)));
    }
    drop(writer);
    let _first = place.open("image", false, None).unwrap();
    place.open("image", false, None).unwrap();
}

#[test]
fn a_process_that_was_killed_leaves_leaks_at_most() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    place.create("image", "compat=1.1", SIZE);
    let mut image = place.open("image", true, None).unwrap();
    write(&mut image, 0, &[5; 200_000 / 512 * 512]);
    // Nothing is closed.
    std::mem::forget(image);
    let output = Command::new("qemu-img").args(["check", &place.text("image")]).output().unwrap();
    // 3: leaked clusters, no errors.
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn images_that_cannot_be_served_are_refused_by_what_they_use() {
    if !has_qemu_img() {
        return;
    }
    let place = Place::new();
    let refused = |name: &str| place.open(name, true, None).err().unwrap().to_string();
    place.raw("raw", 4096);
    assert!(refused("raw").contains("no qcow2 image"));
    place.create("extended", "compat=1.1,extended_l2=on,cluster_size=64k", SIZE);
    assert!(refused("extended").contains("extended L2"));
    place.create("external", &format!("compat=1.1,data_file={}", place.text("data")), SIZE);
    assert!(refused("external").contains("external data file"));
    place.create("snapshots", "compat=1.1", SIZE);
    qemu_img(&["snapshot", "-c", "one", &place.text("snapshots")]);
    assert!(refused("snapshots").contains("snapshots"));
    place.open("snapshots", false, None).unwrap();
    assert!(matches!(place.open("none", true, None), Err(FormatError::Io(_))));
    assert!(matches!(Qcow2::open(Path::new("/dev/null"), true, None), Err(FormatError::NotAFile)));
}

/// One thing that a guest does: what, where, how much (in sectors).
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Discard(usize, usize),
    Flush,
    Reopen,
}

fn step(sectors: usize) -> impl Strategy<Value = Step> {
    let range = (0..sectors, prop_oneof![4 => 1usize..20, 1 => 100usize..500])
        .prop_map(move |(first, count)| (first, count.min(sectors - first)));
    let (writes, zeroes, discards) = (range.clone(), range.clone(), range);
    prop_oneof![
        6 => (writes, 1u8..).prop_map(|((first, count), value)| Step::Write(first, count, value)),
        2 => zeroes.prop_map(|(first, count)| Step::Zero(first, count)),
        1 => discards.prop_map(|(first, count)| Step::Discard(first, count)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever a guest does, it reads what it wrote, and qemu-img finds the image sound and reads the same.
    #[test]
    fn images_stay_sound_and_agree_with_qemu(
        steps in proptest::collection::vec(step(1 << 11), 1..40),
        options in prop_oneof![
            Just("compat=1.1,cluster_size=4k"), Just("compat=0.10,cluster_size=4k"), Just("compat=1.1,cluster_size=512"),
            Just("compat=1.1,refcount_bits=2,cluster_size=1k"), Just("compat=1.1"),
        ],
        kind in 0..3,
    ) {
        if qemu_img(&["--version"]).is_none() {
            return Ok(());
        }
        let place = Place::new();
        let size = 1 << 20;
        let image_path = place.text("image");
        let mut model = vec![0; size];
        let backing = |place: &Place| if kind == 1 { place.raw_backing("base") } else { None };
        match kind {
            0 => place.create("image", options, size),
            1 => {
                let content = place.raw("base", size / 2);
                model[..size / 2].copy_from_slice(&content);
                let base = place.text("base");
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", &base, "-F", "raw", &image_path, "1M"]);
            }
            _ => {
                model = place.raw("base", size);
                let base = place.text("base");
                qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &base, &image_path]);
            }
        }
        let mut image = place.open("image", true, backing(&place)).unwrap();
        for step in steps {
            match step {
                Step::Write(first, count, value) => {
                    let data: Vec<u8> = (0..count * 512).map(|at| value.wrapping_add((at / 100) as u8)).collect();
                    write(&mut image, first * 512, &data);
                    model[first * 512..][..count * 512].copy_from_slice(&data);
                }
                Step::Zero(first, count) => {
                    image.write_zeroes(first as u64 * 512, count as u64 * 512).unwrap();
                    model[first * 512..][..count * 512].fill(0);
                }
                Step::Discard(first, count) => {
                    image.discard(first as u64 * 512, count as u64 * 512).unwrap();
                    // Each cluster is as it was, or zeros.
                    let now = read(&mut image, first * 512, count * 512);
                    for (new, old) in now.iter().zip(&mut model[first * 512..]) {
                        prop_assert!(*new == *old || *new == 0);
                        *old = *new;
                    }
                }
                Step::Flush => image.flush().unwrap(),
                Step::Reopen => {
                    drop(image);
                    image = place.open("image", true, backing(&place)).unwrap();
                }
            }
        }
        prop_assert!(read(&mut image, 0, size) == model);
        drop(image);
        prop_assert!(place.checked("image") == model);
    }

    /// Whatever an image says, reading and writing it ends, without a panic and without growing beyond what is written.
    #[test]
    fn hostile_images_give_errors_at_worst(
        damage in proptest::collection::vec(
            (prop_oneof![3 => 4usize..112, 3 => 0usize..0x5_0000, 2 => 0x3_0000usize..0x3_0100, 2 => 0x4_0000usize..0x4_0100], any::<u8>()),
            1..12,
        ),
        compressed in any::<bool>(),
    ) {
        if qemu_img(&["--version"]).is_none() {
            return Ok(());
        }
        let place = Place::new();
        place.raw("base", 1 << 20);
        let (base, image_path) = (place.text("base"), place.text("image"));
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
        if compressed {
            arguments.push("-c");
        }
        qemu_img(&[&arguments[..], &[&base, &image_path]].concat());
        let mut bytes = fs::read(place.path("image")).unwrap();
        for (at, value) in damage {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        fs::write(place.path("image"), &bytes).unwrap();
        if let Ok(mut image) = place.open("image", true, None) {
            let size = image.size().min(1 << 20) / 512 * 512;
            for offset in (0..size).step_by(100 * 512) {
                let len = (size - offset).min(70_000 / 512 * 512) as usize;
                let mut data = vec![0; len];
                let _ = image.read(&mut Bytes::new(&mut data), offset, len);
                let _ = image.write(&mut &*data, offset, len.min(1024));
                let _ = image.write_zeroes(offset, len as u64);
                let _ = image.discard(offset, len as u64);
            }
            let _ = image.flush();
        }
        let grown = fs::metadata(place.path("image")).unwrap().len();
        prop_assert!(grown <= (bytes.len() as u64).next_multiple_of(2 << 20) + (64 << 20), "{grown}");
    }
}
