use super::*;

fn parse(arguments: &[&str]) -> Result<JailOptions, argh::EarlyExit> {
    JailOptions::from_args(&["mote-vmm jail"], arguments)
}

#[test]
fn options_are_those_of_firecrackers_jailer() {
    let options = parse(&[
        "--id",
        "a-1",
        "--exec-file",
        "/bin/true",
        "--uid",
        "1",
        "--gid",
        "2",
        "--chroot-base-dir",
        "/x",
        "--netns",
        "/run/netns/a",
        "--cgroup",
        "cpu.shares=5",
        "--cgroup",
        "pids.max=9",
        "--cgroup-version",
        "2",
        "--parent-cgroup",
        "p/q",
        "--resource-limit",
        "fsize=7",
        "--resource-limit",
        "no-file=8",
        "--daemonize",
        "--new-pid-ns",
        "--",
        "--no-api",
        "--config-file",
        "/c",
    ])
    .unwrap();
    assert_eq!(options.limits, [Limit::FileSize(7), Limit::NoFile(8)]);
    assert_eq!(options.arguments, ["--no-api", "--config-file", "/c"]);
    assert_eq!((options.cgroups.len(), options.cgroup_version), (2, 2));
}

#[test]
fn what_is_missing_or_wrong_is_refused() {
    assert!(parse(&["--id", "a", "--uid", "1"]).is_err());
    for extra in [
        ["--id", "../a"],
        ["--cgroup-version", "3"],
        ["--parent-cgroup", "../x"],
        ["--resource-limit", "cpu=1"],
        ["--resource-limit", "no-file=-1"],
        ["--cgroup", "a=1"],
    ] {
        let mut arguments = vec!["--uid", "1", "--gid", "1"];
        if extra[0] != "--id" {
            arguments.extend(["--id", "a"]);
        }
        arguments.extend(extra);
        assert!(parse(&arguments).is_err(), "{extra:?}");
    }
}

#[test]
fn a_dynamic_program_is_told_from_a_static_one() {
    assert!(chroot::is_dynamic(Path::new("/proc/self/exe")).unwrap());
    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "#!/bin/sh\n").unwrap();
    assert!(!chroot::is_dynamic(text.path()).unwrap());
}
