//! Actions of servers that really happen: with the conformance guest in a real microVM, and what it does is looked at from
//! its network and its disk rather than from the API alone.

mod common;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use common::{guest_journey, need_servers, run};
use mote::client::{Client, Service};
use mote_tests::{
    cloud::Cloud,
    journey::{self, Journey, Server},
    place::Place,
};
use serde_json::{Value, json};

/// A server of the conformance guest, with all that is needed to ask for things and look at them.
struct Subject {
    cloud: Cloud,
    client: Client,
    journey: Journey,
    server: Server,
}

impl Subject {
    async fn start(name: &str, cidr: &str) -> anyhow::Result<Self> {
        Self::start_with(name, cidr, json!({})).await
    }

    async fn start_with(name: &str, cidr: &str, more: Value) -> anyhow::Result<Self> {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, name, cidr).await?;
        let server = journey.server(&client, name, &network, more).await?;
        journey.wait_console(&client, &server).await?;
        journey.page(&server)?;
        Ok(Self { cloud, client, journey, server })
    }

    async fn act(&self, action: Value) -> anyhow::Result<Value> {
        let path = format!("/servers/{}/action", self.server.id);
        self.client.post(Service::Compute, &path, action).await
    }

    /// Waits until it has that status and nothing is going on.
    async fn rests(&self, status: &str) -> anyhow::Result<Value> {
        loop {
            let server = self.journey.wait_status(&self.client, &self.server.id, status).await?;
            if server["OS-EXT-STS:task_state"].is_null() {
                return Ok(server);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether it answers one ping within a second.
    fn answers(&self) -> anyhow::Result<bool> {
        let place = &self.journey.place;
        let Some(namespace) = place.namespace_of(&self.server.network_id)? else { return Ok(false) };
        let ping = format!(
            "ip netns exec {namespace} ping -n -c 1 -W 1 {} >/dev/null && echo yes || echo no",
            self.server.address
        );
        Ok(place.sh(&ping)?.trim() == "yes")
    }

    /// Numbers of the disks that its host keeps for it, by file name.
    fn disks(&self) -> anyhow::Result<Vec<String>> {
        let dir = self.cloud.state_dir().join("host/servers").join(&self.server.id).join("vm");
        let mut names: Vec<String> = std::fs::read_dir(&dir)
            .with_context(|| format!("looking into {}", dir.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".img"))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Waits until its host keeps exactly these.
    async fn keeps(&self, wanted: &[&str]) -> anyhow::Result<()> {
        for _ in 0..300 {
            if self.disks()? == wanted {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::bail!("its host keeps {:?}, not {wanted:?}", self.disks()?)
    }

    /// What its VMM was told.
    fn vmm_config(&self) -> anyhow::Result<Value> {
        let path = self.cloud.state_dir().join("host/servers").join(&self.server.id).join("vm/vmm.json");
        Ok(serde_json::from_slice(&std::fs::read(&path).context("reading vmm.json")?)?)
    }

    /// A file that its host keeps for it.
    fn file(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let path = self.cloud.state_dir().join("host/servers").join(&self.server.id).join("vm").join(name);
        std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Memory that its VMM was told to give it, MiB.
    fn memory_mib(&self) -> anyhow::Result<u64> {
        let config = self.vmm_config()?;
        config["machine-config"]["mem_size_mib"].as_u64().context("vmm.json names no memory")
    }

    async fn end(self) -> anyhow::Result<()> {
        self.journey.delete(&self.client, &self.server).await?;
        self.client.delete(Service::Network, &format!("/v2.0/networks/{}", self.server.network_id)).await?;
        let left = self.cloud.leftovers(&self.server.id, Some(&self.server.network_id))?;
        ensure!(left.is_empty(), "something is left:\n{left}");
        Ok(())
    }
}

#[test]
fn a_paused_guest_is_silent_and_goes_on_where_it_was() {
    need_servers!();
    run(async {
        let subject = Subject::start("pause", "10.30.0.0/24").await?;
        let vmm = Cloud::vmm(&subject.server.id);
        ensure!(subject.answers()?, "it answers before");
        subject.act(json!({"pause": null})).await?;
        subject.rests("PAUSED").await?;
        ensure!(!subject.answers()?, "a paused guest answers nothing");
        // The agent may go down meanwhile: the guest stays as it is.
        subject.cloud.kill9_daemon("mote-hostd")?;
        ensure!(!subject.answers()?, "a paused guest answers nothing");
        subject.act(json!({"unpause": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        ensure!(Cloud::vmm(&subject.server.id) == vmm, "it is the same VMM");
        subject.end().await
    });
}

/// Asks a guest for its page by half, and for the rest as soon as a file is there: gives what came.
fn half_a_request(namespace: &str, address: &str, begun: &Path, go_on: &Path) -> String {
    format!(
        "ip netns exec {namespace} bash -c 'exec 3<>/dev/tcp/{address}/80; printf \"GET / HTTP/1.1\\r\\n\" >&3; \
         touch {}; while [ ! -e {} ]; do sleep 0.05; done; printf \"Host: x\\r\\n\\r\\n\" >&3; timeout 20 cat <&3'",
        begun.display(),
        go_on.display()
    )
}

#[test]
fn a_suspended_guest_has_no_process_and_goes_on_where_it_was() {
    need_servers!();
    run(async {
        let subject = Subject::start("suspend", "10.32.0.0/24").await?;
        let id = &subject.server.id;
        let vmm = Cloud::vmm(id).context("it runs")?;
        // A connection that the guest's memory knows of.
        let dir = tempfile::tempdir()?;
        let (begun, go_on) = (dir.path().join("begun"), dir.path().join("go-on"));
        let namespace =
            subject.journey.place.namespace_of(&subject.server.network_id)?.context("a network")?;
        let script = half_a_request(&namespace, &subject.server.address, &begun, &go_on);
        let asking = std::thread::spawn(move || Place::Here.sh(&script));
        while !begun.exists() {
            ensure!(!asking.is_finished(), "the guest does not take a connection");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;

        subject.act(json!({"suspend": null})).await?;
        let server = subject.rests("SUSPENDED").await?;
        ensure!(server["OS-EXT-STS:power_state"] == 4, "{server}");
        ensure!(Cloud::vmm(id).is_none(), "its memory is free");
        // Whoever inherited the process takes note of its end at leisure.
        for _ in 0..100 {
            if !Path::new(&format!("/proc/{vmm}")).exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ensure!(!Path::new(&format!("/proc/{vmm}")).exists(), "its process is gone");
        ensure!(!subject.answers()?, "nobody answers");
        // Its disk can be copied all the same, and it stays what it is.
        subject.act(json!({"createImage": {"name": "asleep"}})).await?;
        subject.rests("SUSPENDED").await?;
        let images = subject.client.list(Service::Image, "/v2/images?name=asleep", "images").await?;
        ensure!(images[0]["status"] == "active" && images[0]["size"] == 1 << 20, "{images:?}");
        let path = format!("/v2/images/{}", journey::id_of(&images[0])?);
        subject.client.delete(Service::Image, &path).await?;
        subject.cloud.kill9_daemon("mote-hostd")?;
        subject.act(json!({"resume": null})).await?;
        subject.rests("ACTIVE").await?;
        ensure!(Cloud::vmm(id).is_some_and(|now| now != vmm), "it is another process");
        std::fs::write(&go_on, "")?;
        let page = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        ensure!(page.contains(id.as_str()), "the connection of before brought: {page}");
        subject.journey.page(&subject.server)?;
        let state = subject.cloud.state_dir().join("host/servers").join(id).join("vm");
        ensure!(!state.join("suspended").exists(), "the files of a moment that is over are gone");

        // Deleted while it is suspended, it leaves nothing either.
        subject.act(json!({"suspend": null})).await?;
        subject.rests("SUSPENDED").await?;
        ensure!(state.join("suspended/memory").exists(), "its memory is in a file");
        subject.end().await
    });
}

#[test]
fn ephemeral_disks_and_swap_space_of_a_flavor_are_drives_of_the_machine() {
    need_servers!();
    run(async {
        let subject = Subject::start("local", "10.33.0.0/24").await?;
        let body = json!({"flavor": {
            "name": "roomy", "vcpus": 1, "ram": 64, "disk": 0, "OS-FLV-EXT-DATA:ephemeral": 1, "swap": 64,
        }});
        let flavor = subject.client.post(Service::Compute, "/flavors", body).await?;
        subject.act(json!({"resize": {"flavorRef": flavor["flavor"]["id"]}})).await?;
        subject.rests("VERIFY_RESIZE").await?;
        subject.act(json!({"confirmResize": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-2.img", "root-3.img", "root-4.img"]).await?;
        let vm = subject.cloud.state_dir().join("host/servers").join(&subject.server.id).join("vm");
        let (ephemeral, swap) = (vm.join("root-3.img"), vm.join("root-4.img"));
        ensure!(std::fs::metadata(&ephemeral)?.len() == 1 << 30, "a GiB of nothing");
        let header = std::fs::read(&swap)?;
        ensure!(header.len() == 64 << 20 && &header[4086..4096] == b"SWAPSPACE2", "swap space");
        let config: Value = serde_json::from_slice(&std::fs::read(vm.join("vmm.json"))?)?;
        let drives: Vec<_> =
            config["drives"].as_array().into_iter().flatten().map(|d| &d["drive_id"]).collect();
        ensure!(drives.starts_with(&[&json!("root"), &json!("local3"), &json!("local4")]), "{drives:?}");

        // They outlive a stop, a start and a suspension.
        let mark = b"written by the guest";
        let file = std::fs::OpenOptions::new().write(true).open(&ephemeral)?;
        std::os::unix::fs::FileExt::write_all_at(&file, mark, 1 << 20)?;
        for (action, state) in
            [("os-stop", "SHUTOFF"), ("os-start", "ACTIVE"), ("suspend", "SUSPENDED"), ("resume", "ACTIVE")]
        {
            subject.act(json!({ action: null })).await?;
            subject.rests(state).await?;
        }
        subject.journey.page(&subject.server)?;
        let mut read = [0; 20];
        std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::open(&ephemeral)?, &mut read, 1 << 20)?;
        ensure!(&read == mark, "the ephemeral disk is what it was");
        // A rebuilt server's are others.
        subject.act(json!({"rebuild": {"imageRef": subject.journey.image_id}})).await?;
        subject.rests("ACTIVE").await?;
        subject.keeps(&["root-5.img", "root-6.img", "root-7.img"]).await?;
        subject.end().await
    });
}

#[test]
fn rebuild_resize_and_rescue_change_what_the_machine_is_made_of() {
    need_servers!();
    run(async {
        let subject = Subject::start("parts", "10.31.0.0/24").await?;
        subject.keeps(&["root.img"]).await?;
        subject.act(json!({"rebuild": {"imageRef": subject.journey.image_id}})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-2.img"]).await?;

        let flavor = async |name: &str| -> anyhow::Result<Value> {
            Ok(subject.client.resolve(Service::Compute, "/flavors", "flavors", name).await?["id"].clone())
        };
        ensure!(subject.memory_mib()? == 64, "m1.nano");
        subject.act(json!({"resize": {"flavorRef": flavor("m1.tiny").await?}})).await?;
        subject.rests("VERIFY_RESIZE").await?;
        ensure!(subject.memory_mib()? == 512, "m1.tiny");
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-2.img", "root-3.img"]).await?;
        subject.act(json!({"revertResize": null})).await?;
        subject.rests("ACTIVE").await?;
        ensure!(subject.memory_mib()? == 64, "m1.nano again");
        subject.keeps(&["root-2.img"]).await?;
        subject.act(json!({"resize": {"flavorRef": flavor("m1.tiny").await?}})).await?;
        subject.rests("VERIFY_RESIZE").await?;
        subject.act(json!({"confirmResize": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.keeps(&["root-4.img"]).await?;

        subject.act(json!({"rescue": {"rescue_image_ref": subject.journey.image_id}})).await?;
        subject.rests("RESCUE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-4.img", "root-5.img"]).await?;
        subject.act(json!({"unrescue": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-4.img"]).await?;
        subject.end().await
    });
}

#[test]
fn an_image_of_a_server_boots_and_a_shelved_server_comes_back_at_its_address() {
    need_servers!();
    run(async {
        let subject = Subject::start("shelf", "10.32.0.0/24").await?;
        // What a guest has written is in the image: here by the hand of the test, which the guest doesn't notice.
        let disk =
            subject.cloud.state_dir().join("host/servers").join(&subject.server.id).join("vm/root.img");
        let mark = b"written by the guest";
        std::os::unix::fs::FileExt::write_all_at(
            &std::fs::OpenOptions::new().write(true).open(&disk).context("opening the disk")?,
            mark,
            4096,
        )?;
        subject.act(json!({"createImage": {"name": "copy"}})).await?;
        subject.rests("ACTIVE").await?;
        let images = subject.client.list(Service::Image, "/v2/images?name=copy", "images").await?;
        let image = images.first().context("there is an image")?;
        ensure!(image["status"] == "active" && image["size"] == 1 << 20, "{image}");
        let id = journey::id_of(image)?;
        let request =
            subject.client.request(reqwest::Method::GET, Service::Image, &format!("/v2/images/{id}/file"))?;
        let bytes = request.send().await?.bytes().await?;
        ensure!(bytes.get(4096..4096 + mark.len()) == Some(&mark[..]), "the mark is in the image");
        ensure!(subject.answers()?, "the guest goes on");

        let mut clone = subject.journey.clone();
        clone.image_id = id.clone();
        let second = clone.server(&subject.client, "clone", &subject.server.network_id, json!({})).await?;
        clone.wait_console(&subject.client, &second).await?;
        clone.page(&second)?;
        clone.delete(&subject.client, &second).await?;
        subject.client.delete(Service::Image, &format!("/v2/images/{id}")).await?;

        subject.act(json!({"shelve": null})).await?;
        subject.rests("SHELVED_OFFLOADED").await?;
        ensure!(Cloud::vmm(&subject.server.id).is_none(), "no VMM is left");
        let left = subject.cloud.leftovers(&subject.server.id, None)?;
        ensure!(left.is_empty(), "something is left on the host:\n{left}");
        subject.act(json!({"unshelve": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["root-2.img"]).await?;
        let disk = disk.with_file_name("root-2.img");
        let disk = std::fs::read(&disk).context("reading the disk")?;
        ensure!(disk.get(4096..4096 + mark.len()) == Some(&mark[..]), "its disk is what it was");
        subject.end().await
    });
}

#[test]
fn a_guest_finds_its_config_drive_as_a_read_only_disk_after_its_root_disk() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        // The guest looks at its devices itself, prints what it found and switches itself off.
        let mode = "mote.test mote.expect=1,2,1 mote.read_only=1 mote.block_ids=root,config";
        let mut journey = guest_journey(&cloud, &client, mode).await?;
        journey.console_mark = " passed, ".into();
        let network_id = journey::network(&client, "drive", "10.33.0.0/24").await?;
        let flavor = client.resolve(Service::Compute, "/flavors", "flavors", &journey.flavor).await?;
        let body = json!({"server": {
            "name": "drive", "imageRef": journey.image_id, "flavorRef": flavor["id"],
            "networks": [{"uuid": network_id}], "config_drive": true,
        }});
        let id = journey::id_of(&client.post(Service::Compute, "/servers", body).await?["server"])?;
        let server = Server { id, name: "drive".into(), network_id, address: String::new() };
        // It may have been active and be off again before anybody looks; its console is there from then on.
        while client.get(Service::Compute, &format!("/servers/{}", server.id)).await?["server"]["status"]
            == "BUILD"
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let line = journey.wait_console(&client, &server).await?;
        ensure!(line.ends_with(", 0 failed"), "{}", journey::console(&client, &server.id).await?);
        journey.delete(&client, &server).await?;
        let left = cloud.leftovers(&server.id, None)?;
        ensure!(left.is_empty(), "something is left:\n{left}");
        Ok(())
    });
}

/// Whether a text is in a drive: its files are in one piece each.
fn tells(drive: &[u8], text: &str) -> bool {
    drive.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn a_config_drive_is_kept_until_a_rebuild_and_goes_with_its_server() {
    need_servers!();
    run(async {
        // The user data is "#first boot".
        let more =
            json!({"config_drive": true, "user_data": "I2ZpcnN0IGJvb3Q=", "metadata": {"role": "first"}});
        let subject = Subject::start_with("drives", "10.34.0.0/24", more).await?;
        let id = subject.server.id.clone();
        subject.keeps(&["config-1.img", "root.img"]).await?;
        let drive = subject.file("config-1.img")?;
        for text in ["#first boot", "\"role\":\"first\"", &id, &subject.server.address] {
            ensure!(tells(&drive, text), "{text} is not on the drive");
        }
        let path = subject.cloud.state_dir().join("host/servers").join(&id).join("vm/config-1.img");
        let seen = Place::Here.sh(&format!("blkid -p -o export {}", path.display()))?;
        ensure!(seen.contains("LABEL=config-2\n") && seen.contains("TYPE=vfat\n"), "{seen}");

        subject.act(json!({"suspend": null})).await?;
        subject.rests("SUSPENDED").await?;
        subject.cloud.kill9_daemon("mote-hostd")?;
        subject.act(json!({"resume": null})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.act(json!({"reboot": {"type": "HARD"}})).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        let drives = |config: &Value| -> Vec<String> {
            let drives = config["drives"].as_array().into_iter().flatten();
            drives.map(|drive| drive["drive_id"].as_str().unwrap_or_default().to_owned()).collect()
        };
        ensure!(drives(&subject.vmm_config()?) == ["root", "config"], "{}", subject.vmm_config()?);
        subject.act(json!({"rescue": {"rescue_image_ref": subject.journey.image_id}})).await?;
        subject.rests("RESCUE").await?;
        ensure!(drives(&subject.vmm_config()?) == ["rescue", "root", "config"], "{}", subject.vmm_config()?);
        subject.act(json!({"unrescue": null})).await?;
        subject.rests("ACTIVE").await?;
        ensure!(subject.file("config-1.img")? == drive, "it is the same drive");

        let rebuild =
            json!({"rebuild": {"imageRef": subject.journey.image_id, "metadata": {"role": "second"}}});
        subject.act(rebuild).await?;
        subject.rests("ACTIVE").await?;
        subject.journey.page(&subject.server)?;
        subject.keeps(&["config-3.img", "root-3.img"]).await?;
        let drive = subject.file("config-3.img")?;
        ensure!(tells(&drive, "\"role\":\"second\"") && !tells(&drive, "\"role\":\"first\""), "made anew");

        subject.act(json!({"shelve": null})).await?;
        subject.rests("SHELVED_OFFLOADED").await?;
        let left = subject.cloud.leftovers(&id, None)?;
        ensure!(left.is_empty(), "something is left on the host:\n{left}");
        subject.act(json!({"unshelve": null})).await?;
        let server = subject.rests("ACTIVE").await?;
        ensure!(server["config_drive"] == "True", "{server}");
        ensure!(tells(&subject.file("config-3.img")?, "\"role\":\"second\""), "it is there again");
        subject.end().await
    });
}

/// Waits until the guest has said something.
async fn says(subject: &Subject, text: &str) -> anyhow::Result<()> {
    for _ in 0..1500 {
        if journey::console(&subject.client, &subject.server.id).await?.contains(text) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    let log = journey::console(&subject.client, &subject.server.id).await?;
    anyhow::bail!("the guest never says {text:?}; it says:\n{log}")
}

/// Waits until the server has so many NICs and all are `ACTIVE`.
async fn has_nics(subject: &Subject, count: usize) -> anyhow::Result<Vec<Value>> {
    let path = format!("/servers/{}/os-interface", subject.server.id);
    let mut last = Vec::new();
    for _ in 0..1500 {
        let listed = subject.client.get(Service::Compute, &path).await?;
        last = listed["interfaceAttachments"].as_array().cloned().unwrap_or_default();
        if last.len() == count && last.iter().all(|nic| nic["port_state"] == "ACTIVE") {
            return Ok(last);
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    anyhow::bail!("it has these NICs, not {count}: {last:?}")
}

/// Taps that the server's VMM has open.
fn taps(vmm: i32) -> anyhow::Result<usize> {
    let open = std::fs::read_dir(format!("/proc/{vmm}/fd")).context("looking at its descriptors")?;
    let is_tap = |path: &std::path::PathBuf| path.ends_with("net/tun");
    Ok(open.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).filter(is_tap).count())
}

#[test]
fn a_running_guest_gets_a_nic_uses_it_and_loses_it_whatever_dies_meanwhile() {
    need_servers!();
    run(async {
        let subject = Subject::start("nics", "10.34.0.0/24").await?;
        let id = &subject.server.id;
        let vmm = Cloud::vmm(id).context("it runs")?;
        let network = journey::network(&subject.client, "more", "10.35.0.0/24").await?;
        let path = format!("/servers/{id}/os-interface");
        let wish = json!({"interfaceAttachment": {"net_id": network}});
        let made = subject.client.post(Service::Compute, &path, wish.clone()).await?;
        let nic = &made["interfaceAttachment"];
        let address = nic["fixed_ips"][0]["ip_address"].as_str().context("an address")?;
        let port = nic["port_id"].as_str().context("a port")?;
        // It gets its address and its metadata by the new NIC.
        says(&subject, &format!(" has {address} as ")).await?;
        has_nics(&subject, 2).await?;
        ensure!(taps(vmm)? == 2, "its VMM has two taps");

        subject.client.delete(Service::Compute, &format!("{path}/{port}")).await?;
        says(&subject, "gave up slot").await?;
        has_nics(&subject, 1).await?;
        ensure!(taps(vmm)? == 1, "its VMM has closed the tap");
        let gone = subject.client.get(Service::Network, &format!("/v2.0/ports/{port}")).await;
        ensure!(gone.is_err(), "the port that was made for it is gone: {gone:?}");

        // What is wanted while the agent is down is done by the next one.
        subject.cloud.kill9_daemon("mote-hostd")?;
        let made = subject.client.post(Service::Compute, &path, wish).await?;
        let port = made["interfaceAttachment"]["port_id"].as_str().context("a port")?.to_owned();
        has_nics(&subject, 2).await?;
        ensure!(Cloud::vmm(id) == Some(vmm) && taps(vmm)? == 2, "it is the same VMM, with two taps");

        // A suspended server has it again when it goes on, and a NIC that was there at the start goes as well.
        subject.act(json!({"suspend": null})).await?;
        subject.rests("SUSPENDED").await?;
        subject.act(json!({"resume": null})).await?;
        subject.rests("ACTIVE").await?;
        has_nics(&subject, 2).await?;
        let vmm = Cloud::vmm(id).context("it runs")?;
        ensure!(taps(vmm)? == 2, "it has both");
        subject.journey.page(&subject.server)?;
        subject.client.delete(Service::Network, &format!("/v2.0/ports/{port}")).await?;
        has_nics(&subject, 1).await?;
        ensure!(Cloud::vmm(id) == Some(vmm) && taps(vmm)? == 1, "it has lost it without a start");
        subject.journey.page(&subject.server)?;
        subject.client.delete(Service::Network, &format!("/v2.0/networks/{network}")).await?;
        subject.end().await
    });
}
