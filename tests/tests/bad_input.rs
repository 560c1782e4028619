//! Bad input meets a clear error with the right status, and nothing is left of the attempt.

mod common;

use std::{fs, io::Write as _, net::TcpListener, process::Command};

use anyhow::{Context as _, bail};
use common::{guest_image, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{cloud::Cloud, journey, programs::program};
use serde_json::{Value, json};

/// Sends a body as it is and gives status and text.
async fn raw(
    client: &Client,
    service: Service,
    method: &str,
    path: &str,
    body: Vec<u8>,
) -> anyhow::Result<(u16, String)> {
    let answer = client
        .request(method.parse()?, service, path)?
        .header("Content-Type", "application/json")
        .body(body)
        .send()
        .await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

async fn refused(
    client: &Client,
    service: Service,
    path: &str,
    body: Value,
    status: u16,
    says: &str,
) -> anyhow::Result<()> {
    let (got, text) = raw(client, service, "POST", path, body.to_string().into_bytes()).await?;
    if got != status || !text.to_lowercase().contains(&says.to_lowercase()) {
        bail!("POST {path} {body}\n  gave {got} {text}\n  wanted {status} with {says:?}");
    }
    Ok(())
}

#[test]
fn a_server_with_a_wrong_part_is_refused_and_leaves_no_row() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let image = guest_image(&client, "mote.serve").await?;
        let flavor = client.resolve(Service::Compute, "/flavors", "flavors", "m1.nano").await?["id"].take();
        let network = journey::network(&client, "bad", "10.30.0.0/24").await?;
        let before = journey::rows(&client).await?;
        let nobody = "00000000-0000-4000-8000-000000000000";
        let good =
            json!({"name": "s", "imageRef": image, "flavorRef": flavor, "networks": [{"uuid": network}]});
        for (field, value, status, says) in [
            ("imageRef", json!(nobody), 400, "image"),
            ("imageRef", json!("no-uuid"), 400, "imageRef"),
            ("flavorRef", json!(nobody), 400, "flavor"),
            ("networks", json!([{"uuid": nobody}]), 400, nobody),
            ("key_name", json!("no-such-key"), 400, "key"),
            ("user_data", json!("this is not base64!"), 400, "user_data"),
            ("name", json!(""), 400, "name"),
            ("name", json!(7), 400, "name"),
            ("metadata", json!({"mote:restart_policy": "sometimes"}), 400, "mote:restart_policy"),
            ("availability_zone", json!("no-such-zone"), 400, "zone"),
            ("no_such_field", json!(1), 400, "no_such_field"),
        ] {
            let mut server = good.clone();
            server[field] = value;
            refused(&client, Service::Compute, "/servers", json!({"server": server}), status, says).await?;
        }
        for malformed in [&b"{\"server\": "[..], b"not json", b"[]", b"", b"\xff\xfe"] {
            let (status, text) =
                raw(&client, Service::Compute, "POST", "/servers", malformed.to_vec()).await?;
            assert_eq!(status, 400, "{malformed:?} gave {text}");
            assert!(text.contains("badRequest"), "Nova's error body: {text}");
        }
        assert_eq!(before, journey::rows(&client).await?);
        Ok(())
    });
}

#[test]
fn networks_with_wrong_addresses_are_refused_in_neutrons_words() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let network = journey::network(&client, "addresses", "10.31.0.0/24").await?;
        for (field, value, status) in [
            ("cidr", json!("10.31.0.0/33"), 400),
            ("cidr", json!("hello"), 400),
            ("cidr", json!("10.31.0.128/25"), 400),
            ("ip_version", json!(5), 400),
            ("network_id", json!("00000000-0000-4000-8000-000000000000"), 404),
        ] {
            let mut subnet = json!({"network_id": network, "ip_version": 4, "cidr": "10.32.0.0/24"});
            subnet[field] = value;
            refused(
                &client,
                Service::Network,
                "/v2.0/subnets",
                json!({"subnet": subnet}),
                status,
                "NeutronError",
            )
            .await?;
        }
        refused(
            &client,
            Service::Network,
            "/v2.0/ports",
            json!({"port": {"network_id": network, "fixed_ips": [{"ip_address": "10.99.0.1"}]}}),
            400,
            "10.99.0.1",
        )
        .await?;
        Ok(())
    });
}

#[test]
fn an_image_that_is_no_image_and_a_kernel_that_is_no_kernel_are_refused() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let dir = tempfile::tempdir()?;
        let file = |name: &str, bytes: &[u8]| -> anyhow::Result<String> {
            let path = dir.path().join(name);
            fs::File::create(&path)?.write_all(bytes)?;
            Ok(path.display().to_string())
        };
        let blobs = || count_files(&cloud.state_dir().join("controller"), "sha256");
        let before = blobs();
        for (bytes, format, says) in [
            (&b"#!/bin/sh\necho I am a script, no kernel\n"[..], "aki", "kernel"),
            (b"QFI\xfb\0\0\0\x03 a qcow2 file by its magic", "raw", "qcow2"),
            (b"", "raw", "empty"),
            (b"whatever", "qcow2", "qcow2"),
            (b"whatever", "floppy", "disk_format"),
        ] {
            let path = file("blob", bytes)?;
            let error = cloud
                .mote(&["image", "create", "bad", "--disk-format", format, "--file", &path])
                .expect_err("a bad image is refused")
                .to_string();
            assert!(error.contains(says), "{format}: {error}");
        }
        assert_eq!(blobs(), before, "no bytes are left in the store");
        let client = cloud.client().await?;
        for image in client.list(Service::Image, "/v2/images", "images").await? {
            assert_ne!(image["status"], "active", "nothing bad became active: {image}");
        }
        Ok(())
    });
}

fn count_files(dir: &std::path::Path, under: &str) -> usize {
    let script = format!("find {} -path '*/{under}/*' -type f | wc -l", dir.display());
    mote_tests::place::Place::Here.sh(&script).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(usize::MAX)
}

#[test]
fn a_wrong_password_is_401_in_keystones_words_and_names_no_user() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let mut messages = Vec::new();
        for user in ["admin", "nobody-of-this-name"] {
            let mut credentials = cloud.credentials()?;
            credentials.username = user.into();
            credentials.password = "wrong".into();
            let Err(error) = Client::login(&credentials).await else { bail!("a wrong password is taken") };
            messages.push(format!("{error:#}").replace(user, "USER"));
        }
        assert!(messages[0].contains("401"), "{messages:?}");
        assert_eq!(messages[0], messages[1], "a known and an unknown user can't be told apart");
        Ok(())
    });
}

#[test]
fn mote_up_says_what_is_wrong_with_the_port_and_with_kvm() {
    need_servers!();
    let dir = tempfile::tempdir().expect("a directory");
    let up = |listen: &str, before: &str| {
        let script = format!(
            "{before} MOTE_STATE_DIR={state} exec {mote} up --listen {listen} --run-dir {run}",
            state = dir.path().join("state").display(),
            run = dir.path().join("run").display(),
            mote = program("mote").display()
        );
        let output = Command::new("unshare")
            .args(["-m", "sh", "-c", &script])
            .output()
            .context("running unshare")
            .expect("it runs");
        assert!(!output.status.success(), "it refuses to start");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let said = up(&address, "");
    assert!(said.contains(&address) && said.contains("--listen"), "{said}");

    let said = up("127.0.0.1:0", "mount --bind /dev/null /dev/kvm;");
    assert!(said.contains("/dev/kvm"), "{said}");
    let said = up("127.0.0.1:0", "mount -t tmpfs none /dev;");
    assert!(said.contains("/dev/kvm"), "{said}");
}
