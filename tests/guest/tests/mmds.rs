//! The metadata service of mote-vmm, read by the guest over virtio-net, on mmio and on PCI. Skipped where /dev/kvm, root or
//! /dev/net/tun is absent or the programs aren't built.

use std::thread;
use std::time::Duration;

use mote_guest::host::{self, Running, Unavailable, request};
use mote_vmm_api::{MmdsConfig, MmdsVersion};

const TIMEOUT: Duration = Duration::from_secs(60);
const METADATA: &str = r#"{"latest":{"meta-data":{"ami-id":"ami-12345678"}}}"#;

fn in_thread(test: impl FnOnce() -> Result<(), Unavailable> + Send + 'static) {
    match thread::spawn(test).join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => eprintln!("SKIPPED: {why}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn reads_metadata(pci: bool) -> Result<(), Unavailable> {
    host::kvm_usable()?;
    let (vmm, guest) = (host::vmm_path()?, host::guest_path()?);
    host::enter_network(&["10.77.0.1/24"])?;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name);
    let mut config = host::config(&guest, "mote.mmds=169.254.100.2/16");
    host::add_tap(&mut config, "tap0", "06:00:ac:10:00:02");
    config.mmds_config = Some(MmdsConfig {
        version: MmdsVersion::V2,
        network_interfaces: vec!["eth0".into()],
        ..MmdsConfig::default()
    });
    std::fs::write(path("metadata"), METADATA).expect("a file");
    let socket = path("socket");
    let mut arguments = vec!["--api-sock".into(), socket.clone().into()];
    arguments.extend(["--metadata".into(), path("metadata").into()]);
    arguments.extend(["--metrics-path".into(), path("metrics").into()]);
    if pci {
        arguments.push("--enable-pci".into());
    }
    let mut running = Running::start_program(&vmm, &arguments).expect("the monitor starts");

    // As a client of Firecracker does it, with the document changed before the start.
    let expect = |method: &str, path: &str, body: &str, status: u16| {
        let answer = request(&socket, method, path, body).expect("an answer");
        assert_eq!(answer.0, status, "{method} {path}: {}", answer.1);
        answer.1
    };
    let put = |path: &str, body: serde_json::Value| expect("PUT", path, &body.to_string(), 204);
    put("/machine-config", serde_json::json!(config.machine_config));
    put("/boot-source", serde_json::json!(config.boot_source));
    put("/network-interfaces/eth0", serde_json::json!(config.network_interfaces[0]));
    put("/mmds/config", serde_json::json!(config.mmds_config));
    assert_eq!(expect("GET", "/mmds", "", 200), METADATA);
    let patch =
        serde_json::json!({"latest": {"meta-data": {"ami-id": "ami-87654321", "long": "l".repeat(40_000)}}});
    expect("PATCH", "/mmds", &patch.to_string(), 204);
    let longer = serde_json::json!({"longer": "l".repeat(20_000)});
    expect("PATCH", "/mmds", &longer.to_string(), 413);
    assert!(expect("GET", "/vm/config", "", 200).contains(r#""ipv4_address":"169.254.169.254""#));
    put("/actions", serde_json::json!({"action_type": "InstanceStart"}));

    running.wait_for_line(" passed, ", TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    let outcome = running.finish(TIMEOUT).unwrap_or_else(|error| panic!("{error}"));
    outcome.report().verdict().unwrap_or_else(|error| panic!("{error}\n{}{}", outcome.output, outcome.log));
    assert_eq!(outcome.code, Some(0), "{}", outcome.log);

    let metrics = std::fs::read_to_string(path("metrics")).expect("metrics");
    let last: serde_json::Value =
        serde_json::from_str(metrics.lines().last().expect("a line")).expect("JSON");
    let mmds = &last["mmds"];
    assert_eq!((&mmds["rx_no_token"], &mmds["rx_invalid_token"]), (&1.into(), &1.into()), "{mmds}");
    assert!(mmds["connections_created"].as_u64() > Some(50), "{mmds}");
    assert_eq!(last["net"]["rx_packets_count"], last["net_eth0"]["rx_packets_count"], "{last}");
    assert!(last["net_eth0"]["rx_packets_count"].as_u64() >= mmds["tx_frames"].as_u64(), "{last}");
    assert!(last["vcpu"]["exit_io_out"].as_u64() > Some(0), "{last}");
    Ok(())
}

#[test]
fn the_guest_reads_metadata_with_a_token_on_mmio() {
    in_thread(|| reads_metadata(false));
}

#[test]
fn the_guest_reads_metadata_with_a_token_on_pci() {
    in_thread(|| reads_metadata(true));
}
