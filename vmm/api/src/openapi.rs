//! The OpenAPI file of the API, made from the types: `vmm/api/openapi.json`, which the test here keeps fresh.
//!
//! **To add an operation:** a line in [`OPERATIONS`], a route in `vmm/src/api/requests.rs` (a test there compares both), then
//! `MOTE_UPDATE=1 cargo test --release -p mote-vmm-api openapi`, which writes the file.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::*;

/// Where a generated schema goes.
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// What is sent, if anything.
    request: Option<SchemaOf>,
    /// What comes back; nothing is 204.
    response: Option<SchemaOf>,
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const fn get(path: &'static str, summary: &'static str, response: SchemaOf) -> Operation {
    Operation { method: "get", path, summary, request: None, response: Some(response) }
}

const fn put(path: &'static str, summary: &'static str, request: SchemaOf) -> Operation {
    Operation { method: "put", path, summary, request: Some(request), response: None }
}

const fn patch(path: &'static str, summary: &'static str, request: SchemaOf) -> Operation {
    Operation { method: "patch", path, summary, request: Some(request), response: None }
}

const fn delete(path: &'static str, summary: &'static str) -> Operation {
    Operation { method: "delete", path, summary, request: None, response: None }
}

const OPERATIONS: &[Operation] = &[
    get("/", "What this process is and its VM's state", of::<InstanceInfo>),
    put("/actions", "Starts the VM, presses Ctrl+Alt+Del, or writes metrics", of::<Action>),
    get("/balloon", "The balloon's configuration", of::<Balloon>),
    put("/balloon", "Sets the balloon before the start", of::<Balloon>),
    patch("/balloon", "Changes the balloon's size after the start", of::<BalloonPatch>),
    get("/balloon/statistics", "What the guest has told of its memory", of::<BalloonStats>),
    patch("/balloon/statistics", "Changes how often the guest is asked", of::<BalloonStatsPatch>),
    patch("/balloon/hinting/start", "Begins free page hinting", of::<BalloonHintingStart>),
    get("/balloon/hinting/status", "How far free page hinting is", of::<BalloonHintingStatus>),
    Operation {
        method: "patch",
        path: "/balloon/hinting/stop",
        summary: "Ends free page hinting",
        request: None,
        response: None,
    },
    put("/boot-source", "Sets kernel, initrd and command line before the start", of::<BootSource>),
    put("/cpu-config", "Sets a custom CPU template before the start", of::<CpuConfig>),
    put(
        "/drives/{drive_id}",
        "Adds or replaces a drive before the start; after it, adds one on PCI",
        of::<Drive>,
    ),
    delete("/drives/{drive_id}", "Asks the guest to give up a drive on PCI"),
    patch("/drives/{drive_id}", "Changes a drive after the start", of::<DrivePatch>),
    put("/entropy", "Adds the entropy device before the start", of::<Entropy>),
    get("/hotplug/memory", "Sizes of the memory that can be plugged", of::<MemoryHotplugStatus>),
    put(
        "/hotplug/memory",
        "Sets memory that the guest can be given later, before the start",
        of::<MemoryHotplug>,
    ),
    patch(
        "/hotplug/memory",
        "Asks the guest to have so much of it, after the start",
        of::<MemoryHotplugPatch>,
    ),
    put("/logger", "Sets the log before the start", of::<Logger>),
    get("/machine-config", "vCPUs and memory", of::<MachineConfig>),
    put("/machine-config", "Sets vCPUs and memory before the start", of::<MachineConfig>),
    patch("/machine-config", "Changes some of them before the start", of::<MachineConfigPatch>),
    put("/metrics", "Sets where metrics go, before the start and once", of::<Metrics>),
    get("/mmds", "The guest's metadata", of::<Value>),
    put("/mmds", "Replaces the guest's metadata", of::<Value>),
    patch("/mmds", "Changes parts of the guest's metadata (RFC 7396)", of::<Value>),
    put("/mmds/config", "Sets how the guest reaches its metadata, before the start", of::<MmdsConfig>),
    put("/mote/console", "Adds a virtio console before the start", of::<Console>),
    put("/mote/smbios", "Sets strings of the SMBIOS tables before the start", of::<Smbios>),
    put(
        "/network-interfaces/{iface_id}",
        "Adds or replaces an interface before the start; after it, adds one on PCI",
        of::<NetworkInterface>,
    ),
    delete("/network-interfaces/{iface_id}", "Asks the guest to give up an interface on PCI"),
    patch(
        "/network-interfaces/{iface_id}",
        "Changes an interface after the start",
        of::<NetworkInterfacePatch>,
    ),
    put("/pmem/{id}", "Adds or replaces a persistent memory device before the start", of::<Pmem>),
    patch("/pmem/{id}", "Changes a persistent memory device's limits after the start", of::<PmemPatch>),
    put("/serial", "Sets where the serial port leads, before the start", of::<Serial>),
    put("/snapshot/create", "Writes the paused VM to files", of::<SnapshotCreate>),
    put("/snapshot/load", "Makes the VM from files, before anything is configured", of::<SnapshotLoad>),
    get("/version", "Versions", of::<Version>),
    patch("/vm", "Pauses or resumes the VM", of::<VmStatePatch>),
    get("/vm/config", "The whole configuration", of::<VmConfig>),
    put("/vsock", "Sets the socket device before the start", of::<Vsock>),
];

fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    let fault = json!({
        "description": "It was not done: what is wrong and what to change",
        "content": {"application/json": {"schema": of::<Fault>(&mut generator)}},
    });
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let success = match operation.response {
            None => json!({"204": {"description": "Done"}}),
            Some(schema) => json!({"200": {
                "description": "The answer",
                "content": {"application/json": {"schema": schema(&mut generator)}},
            }}),
        };
        let mut entry = json!({"summary": operation.summary, "responses": success});
        entry["responses"]["default"] = fault.clone();
        if let Some(schema) = operation.request {
            entry["requestBody"] = json!({
                // Hinting has defaults for everything.
                "required": operation.path != "/balloon/hinting/start",
                "content": {"application/json": {"schema": schema(&mut generator)}},
            });
        }
        if let Some((_, id)) = operation.path.split_once('{') {
            let id = id.trim_end_matches('}');
            entry["parameters"] =
                json!([{"name": id, "in": "path", "required": true, "schema": {"type": "string"}}]);
        }
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = entry;
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mote-vmm",
            "description": "Firecracker's API on a Unix socket. What is marked Mote is an addition.",
            "version": FIRECRACKER_API_VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost", "description": "On the Unix socket of --api-sock"}],
        "paths": paths,
        "components": {"schemas": generator.take_definitions(true)},
    });
    plain_descriptions(&mut document);
    document
}

/// Rust's links to items become their names, lines of a paragraph one line.
fn plain_descriptions(value: &mut Value) {
    match value {
        Value::Object(object) => object.iter_mut().for_each(|(name, value)| match value {
            Value::String(text) if name == "description" => {
                *text = text.replace("[`", "`").replace("`]", "`").replace('\n', " ");
            }
            value => plain_descriptions(value),
        }),
        Value::Array(items) => items.iter_mut().for_each(plain_descriptions),
        _ => {}
    }
}

#[test]
fn the_openapi_file_is_fresh() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let mut wanted = serde_json::to_string_pretty(&document()).unwrap();
    wanted.push('\n');
    if std::env::var_os("MOTE_UPDATE").is_some() {
        std::fs::write(path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == wanted,
        "vmm/api/openapi.json is stale: MOTE_UPDATE=1 cargo test --release -p mote-vmm-api openapi writes it"
    );
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let text = document.to_string();
    let mut references = 0;
    for part in text.split(r##""$ref":"#"##).skip(1) {
        let pointer = part.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
        references += 1;
    }
    assert!(references > 30, "{references}");
}
