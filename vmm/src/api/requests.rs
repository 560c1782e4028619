//! Which action a request means, and which answer an action's result is: Firecracker's routes and rules.
//!
//! Fields that Firecracker has and this program does not are accepted only with the value that changes nothing
//! (`"vcpu_features": null`); otherwise the fault names the field.

use mote_vmm_api::{
    Action, ActionType, BalloonHintingStart, Drive, DrivePatch, MachineConfigPatch, NetworkInterface,
    NetworkInterfacePatch, Pmem, PmemPatch, VmConfig, VmState, VmStatePatch,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::http::{Request, Response};
use crate::controller::{ActionError, Answer, VmmAction};
use crate::error_chain;
use crate::mmds::MmdsError;

/// A request that means no action.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No such route.
    #[error("Invalid request method and/or path: {method} {path}.")]
    InvalidPathMethod {
        /// Method.
        method: String,
        /// Path.
        path: String,
    },
    /// A body with GET.
    #[error("GET request cannot have a body.")]
    GetWithBody,
    /// A body with DELETE.
    #[error("DELETE request cannot have a body.")]
    DeleteWithBody,
    /// No body.
    #[error("Empty {0} request.")]
    Empty(String),
    /// The body is not what it should be.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(serde_json::Error),
    /// A feature of Firecracker that is not there.
    #[error("The field `{0}` is not supported by mote-vmm; leave it out{hint}.", hint = hint(.0))]
    Unsupported(&'static str),
    /// No id in the path.
    #[error("The ID cannot be empty.")]
    EmptyId,
    /// The ids in path and body differ.
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    IdMismatch {
        /// In the path.
        path: String,
        /// In the body.
        body: String,
    },
}

/// What to do instead.
fn hint(field: &str) -> &'static str {
    match field {
        "reg_modifiers" | "vcpu_features" => " (it is for arm64)",
        _ => "",
    }
}

/// A field of Firecracker's and the value (beside null) that means the same as leaving it out.
type Neutral = (&'static str, Option<&'static str>);

/// Nothing is missing; fields of ours may be null.
const MACHINE: &[Neutral] = &[];
const DRIVE: &[Neutral] = &[];
/// Fields of ours that may be null.
const SNAPSHOT_LOAD: &[Neutral] = &[("vsock_override", None)];
/// What of a CPU template is for another architecture.
const CPU: &[Neutral] = &[("reg_modifiers", None), ("vcpu_features", None)];
/// Fields of ours that may be null.
const CONFIG: &[Neutral] = &[("memory-hotplug", None), ("pmem", None)];
/// Fields of ours that Firecracker allows to be null.
const NULLABLE: [&str; 4] = ["is_read_only", "io_engine", "huge_pages", "path_on_host"];

/// Removes the neutral fields of `value`; the others are refused.
fn strip(value: &mut Value, fields: &[Neutral]) -> Result<(), RequestError> {
    let Value::Object(object) = value else { return Ok(()) };
    for (field, neutral) in fields {
        match object.get(*field) {
            None => {}
            Some(Value::Null) => drop(object.remove(*field)),
            Some(Value::String(text)) if Some(text.as_str()) == *neutral => drop(object.remove(*field)),
            Some(_) => return Err(RequestError::Unsupported(field)),
        }
    }
    for field in NULLABLE {
        if object.get(field).is_some_and(Value::is_null) {
            object.remove(field);
        }
    }
    Ok(())
}

fn body<T: DeserializeOwned>(request: &Request, neutral: &[Neutral]) -> Result<T, RequestError> {
    // Parsed twice only where something has to be removed: errors then keep their line and column.
    let direct = serde_json::from_slice(&request.body);
    let Err(error) = direct else { return direct.map_err(RequestError::Json) };
    let Ok(mut value) = serde_json::from_slice::<Value>(&request.body) else {
        return Err(RequestError::Json(error));
    };
    let before = value.clone();
    strip(&mut value, neutral)?;
    if value == before {
        Err(RequestError::Json(error))
    } else {
        serde_json::from_value(value).map_err(RequestError::Json)
    }
}

/// Reads a config file, with the same leniency as the API.
///
/// # Errors
/// It is no JSON, or not a VM's configuration.
pub fn parse_config_file(bytes: &[u8]) -> Result<VmConfig, RequestError> {
    let direct = serde_json::from_slice(bytes);
    let Err(error) = direct else { return direct.map_err(RequestError::Json) };
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else { return Err(RequestError::Json(error)) };
    let before = value.clone();
    strip(&mut value, CONFIG)?;
    let each = |value: &mut Value, name: &str, fields| match value.get_mut(name) {
        Some(Value::Array(items)) => items.iter_mut().try_for_each(|item| strip(item, fields)),
        Some(item) => strip(item, fields),
        None => Ok(()),
    };
    each(&mut value, "machine-config", MACHINE)?;
    each(&mut value, "drives", DRIVE)?;
    if value == before {
        Err(RequestError::Json(error))
    } else {
        serde_json::from_value(value).map_err(RequestError::Json)
    }
}

/// What body a route takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyRule {
    /// None: with one, the request is refused.
    Forbidden,
    /// One.
    Required,
    /// One or none.
    Optional,
}

/// One method of one path.
struct Route {
    method: &'static str,
    /// As in OpenAPI: `{…}` is an id.
    path: &'static str,
    body: BodyRule,
    action: fn(&Request, &str) -> Result<VmmAction, RequestError>,
}

type ActionOf = fn(&Request, &str) -> Result<VmmAction, RequestError>;

const fn get(path: &'static str, action: ActionOf) -> Route {
    Route { method: "GET", path, body: BodyRule::Forbidden, action }
}

const fn put(path: &'static str, action: ActionOf) -> Route {
    Route { method: "PUT", path, body: BodyRule::Required, action }
}

const fn patch(path: &'static str, action: ActionOf) -> Route {
    Route { method: "PATCH", path, body: BodyRule::Required, action }
}

const fn delete(path: &'static str, action: ActionOf) -> Route {
    Route { method: "DELETE", path, body: BodyRule::Forbidden, action }
}

/// Everything that is answered. `vmm/api/src/openapi.rs` describes the same.
const ROUTES: &[Route] = &[
    get("/", |_, _| Ok(VmmAction::GetInstanceInfo)),
    put("/actions", |request, _| {
        body::<Action>(request, &[]).map(|action| match action.action_type {
            ActionType::InstanceStart => VmmAction::Start,
            ActionType::SendCtrlAltDel => VmmAction::SendCtrlAltDel,
            ActionType::FlushMetrics => VmmAction::FlushMetrics,
        })
    }),
    get("/balloon", |_, _| Ok(VmmAction::GetBalloon)),
    put("/balloon", |request, _| body(request, &[]).map(VmmAction::SetBalloon)),
    patch("/balloon", |request, _| body(request, &[]).map(VmmAction::PatchBalloon)),
    get("/balloon/statistics", |_, _| Ok(VmmAction::GetBalloonStatistics)),
    patch("/balloon/statistics", |request, _| body(request, &[]).map(VmmAction::PatchBalloonStatistics)),
    Route {
        method: "PATCH",
        path: "/balloon/hinting/start",
        body: BodyRule::Optional,
        action: |request, _| {
            let start =
                if request.body.is_empty() { Ok(BalloonHintingStart::default()) } else { body(request, &[]) };
            start.map(VmmAction::StartBalloonHinting)
        },
    },
    get("/balloon/hinting/status", |_, _| Ok(VmmAction::GetBalloonHinting)),
    Route {
        method: "PATCH",
        path: "/balloon/hinting/stop",
        body: BodyRule::Optional,
        action: |_, _| Ok(VmmAction::StopBalloonHinting),
    },
    put("/boot-source", |request, _| body(request, &[]).map(VmmAction::SetBootSource)),
    put("/cpu-config", |request, _| body(request, CPU).map(VmmAction::SetCpuConfig)),
    put("/drives/{drive_id}", |request, id| {
        with_id(request, id, DRIVE, |drive: &Drive| &drive.drive_id).map(VmmAction::SetDrive)
    }),
    patch("/drives/{drive_id}", |request, id| {
        with_id(request, id, &[], |patch: &DrivePatch| &patch.drive_id).map(VmmAction::PatchDrive)
    }),
    delete("/drives/{drive_id}", |_, id| Ok(VmmAction::RemoveDrive(id.to_owned()))),
    put("/entropy", |request, _| body(request, &[]).map(VmmAction::SetEntropy)),
    get("/hotplug/memory", |_, _| Ok(VmmAction::GetMemoryHotplug)),
    put("/hotplug/memory", |request, _| body(request, &[]).map(VmmAction::SetMemoryHotplug)),
    patch("/hotplug/memory", |request, _| body(request, &[]).map(VmmAction::PatchMemoryHotplug)),
    put("/logger", |request, _| body(request, &[]).map(VmmAction::SetLogger)),
    get("/machine-config", |_, _| Ok(VmmAction::GetMachineConfig)),
    put("/machine-config", |request, _| body(request, MACHINE).map(VmmAction::SetMachineConfig)),
    patch("/machine-config", patch_machine),
    put("/metrics", |request, _| body(request, &[]).map(VmmAction::SetMetrics)),
    get("/mmds", |_, _| Ok(VmmAction::GetMmds)),
    put("/mmds", |request, _| body(request, &[]).map(VmmAction::PutMmds)),
    patch("/mmds", |request, _| body(request, &[]).map(VmmAction::PatchMmds)),
    put("/mmds/config", |request, _| body(request, &[]).map(VmmAction::SetMmdsConfig)),
    put("/mote/console", |request, _| body(request, &[]).map(VmmAction::SetConsole)),
    put("/mote/smbios", |request, _| body(request, &[]).map(VmmAction::SetSmbios)),
    delete("/network-interfaces/{iface_id}", |_, id| Ok(VmmAction::RemoveNetworkInterface(id.to_owned()))),
    put("/network-interfaces/{iface_id}", |request, id| {
        with_id(request, id, &[], |interface: &NetworkInterface| &interface.iface_id)
            .map(VmmAction::SetNetworkInterface)
    }),
    patch("/network-interfaces/{iface_id}", |request, id| {
        with_id(request, id, &[], |patch: &NetworkInterfacePatch| &patch.iface_id)
            .map(VmmAction::PatchNetworkInterface)
    }),
    put("/pmem/{id}", |request, id| {
        with_id(request, id, &[], |pmem: &Pmem| &pmem.id).map(VmmAction::SetPmem)
    }),
    patch("/pmem/{id}", |request, id| {
        with_id(request, id, &[], |patch: &PmemPatch| &patch.id).map(VmmAction::PatchPmem)
    }),
    put("/serial", |request, _| body(request, &[]).map(VmmAction::SetSerial)),
    put("/snapshot/create", |request, _| body(request, &[]).map(VmmAction::CreateSnapshot)),
    put("/snapshot/load", |request, _| body(request, SNAPSHOT_LOAD).map(VmmAction::LoadSnapshot)),
    get("/version", |_, _| Ok(VmmAction::GetVersion)),
    patch("/vm", |request, _| {
        Ok(match body::<VmStatePatch>(request, &[])?.state {
            VmState::Paused => VmmAction::Pause,
            VmState::Resumed => VmmAction::Resume,
        })
    }),
    get("/vm/config", |_, _| Ok(VmmAction::GetVmConfig)),
    put("/vsock", |request, _| body(request, &[]).map(VmmAction::SetVsock)),
];

/// The id in `path` (nothing if `template` has none), if `path` is one of `template`.
fn matched<'p>(template: &str, path: &'p str) -> Option<&'p str> {
    match template.split_once('{') {
        None => (template.trim_end_matches('/') == path).then_some(""),
        Some((before, _)) => path.strip_prefix(before).filter(|id| !id.contains('/')),
    }
}

/// The action that a request means.
///
/// # Errors
/// It means none.
pub fn parse(request: &Request) -> Result<VmmAction, RequestError> {
    let method = request.method.as_str();
    // A slash more or less at an end means nothing.
    let path = format!("/{}", request.path.trim_start_matches('/'));
    let path = path.trim_end_matches('/');
    let found = |route: &'static Route| {
        let id = (route.method == method).then(|| matched(route.path, path)).flatten()?;
        Some((route, id))
    };
    let found = ROUTES.iter().find_map(found);
    let rule = found.map(|(route, _)| route.body);
    match (method, request.body.is_empty()) {
        ("GET", false) => return Err(RequestError::GetWithBody),
        ("DELETE", false) => return Err(RequestError::DeleteWithBody),
        ("PUT" | "PATCH", true) if rule != Some(BodyRule::Optional) => {
            return Err(RequestError::Empty(method.to_owned()));
        }
        _ => {}
    }
    if let Some((route, id)) = found {
        return (route.action)(request, id);
    }
    let lacks_id = |route: &Route| {
        route.method == method && route.path.split_once("/{").is_some_and(|(before, _)| before == path)
    };
    Err(if ROUTES.iter().any(lacks_id) {
        RequestError::EmptyId
    } else {
        RequestError::InvalidPathMethod { method: method.to_owned(), path: request.path.clone() }
    })
}

fn with_id<T: DeserializeOwned>(
    request: &Request,
    path: &str,
    neutral: &[Neutral],
    id_of: impl Fn(&T) -> &String,
) -> Result<T, RequestError> {
    let item: T = body(request, neutral)?;
    let body = id_of(&item).clone();
    if path == body { Ok(item) } else { Err(RequestError::IdMismatch { path: path.to_owned(), body }) }
}

fn patch_machine(request: &Request, _: &str) -> Result<VmmAction, RequestError> {
    let patch: MachineConfigPatch = body(request, MACHINE)?;
    if patch == MachineConfigPatch::default() {
        return Err(RequestError::Empty("PATCH".to_owned()));
    }
    Ok(VmmAction::PatchMachineConfig(patch))
}

/// The answer to a request whose action was carried out, or not.
pub fn respond(result: &Result<Answer, ActionError>) -> Response {
    match result {
        Ok(Answer::Empty) => Response::empty(),
        Ok(Answer::InstanceInfo(info)) => Response::json(info),
        Ok(Answer::Version(version)) => Response::json(version),
        Ok(Answer::VmConfig(config)) => Response::json(config),
        Ok(Answer::Balloon(balloon)) => Response::json(balloon),
        Ok(Answer::BalloonStatistics(statistics)) => Response::json(statistics),
        Ok(Answer::BalloonHinting(status)) => Response::json(status),
        Ok(Answer::MachineConfig(machine)) => Response::json(machine),
        Ok(Answer::MemoryHotplug(status)) => Response::json(status),
        Ok(Answer::Mmds(document)) => Response::json(document),
        Err(ActionError::Mmds(MmdsError::DataStoreLimitExceeded)) => {
            Response::fault(413, MmdsError::DataStoreLimitExceeded.to_string())
        }
        Err(error) => Response::fault(400, error_chain(error)),
    }
}

#[cfg(test)]
mod tests {
    use mote_vmm_api::{Entropy, MmdsVersion};
    use proptest::prelude::*;

    use super::*;

    fn request(method: &str, path: &str, body: &str) -> Request {
        let body = body.as_bytes().to_vec();
        Request { method: method.to_owned(), path: path.to_owned(), body, keep_alive: true }
    }

    fn fault(method: &str, path: &str, body: &str) -> String {
        parse(&request(method, path, body)).unwrap_err().to_string()
    }

    #[test]
    fn routes_lead_to_their_actions() {
        let action = |method, path, body| parse(&request(method, path, body)).unwrap();
        assert_eq!(action("GET", "/", ""), VmmAction::GetInstanceInfo);
        assert_eq!(action("GET", "/vm/config", ""), VmmAction::GetVmConfig);
        assert_eq!(action("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#), VmmAction::Start);
        assert_eq!(action("PATCH", "/vm", r#"{"state":"Paused"}"#), VmmAction::Pause);
        assert_eq!(action("DELETE", "/drives/a", ""), VmmAction::RemoveDrive("a".to_owned()));
        let removed = VmmAction::RemoveNetworkInterface("e".to_owned());
        assert_eq!(action("DELETE", "/network-interfaces/e", ""), removed);
        assert_eq!(action("PUT", "/entropy", "{}"), VmmAction::SetEntropy(Entropy::default()));
        let machine = action("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#);
        assert!(matches!(machine, VmmAction::SetMachineConfig(machine) if machine.vcpu_count == 2));
        assert_eq!(action("GET", "/mmds", ""), VmmAction::GetMmds);
        assert_eq!(action("PUT", "/mmds", "[1]"), VmmAction::PutMmds(serde_json::json!([1])));
        assert_eq!(action("PATCH", "/mmds", "null"), VmmAction::PatchMmds(Value::Null));
        let service = action("PUT", "/mmds/config", r#"{"version":"V2","network_interfaces":["e"]}"#);
        assert!(
            matches!(service, VmmAction::SetMmdsConfig(service) if service.version == MmdsVersion::V2 && !service.imds_compat)
        );
    }

    #[test]
    fn faults_have_firecrackers_words() {
        assert_eq!(fault("GET", "/", "{}"), "GET request cannot have a body.");
        assert_eq!(fault("PUT", "/entropy", ""), "Empty PUT request.");
        assert_eq!(fault("PATCH", "/machine-config", "{}"), "Empty PATCH request.");
        assert_eq!(fault("PUT", "/drives", r#"{"a":1}"#), "The ID cannot be empty.");
        assert_eq!(fault("PUT", "/drives/", r#"{"a":1}"#), "The ID cannot be empty.");
        assert_eq!(fault("PUT", "/drives/a/b", "{}"), "Invalid request method and/or path: PUT /drives/a/b.");
        assert_eq!(fault("PUT", "/no", ""), "Empty PUT request.");
        assert_eq!(fault("DELETE", "/x", ""), "Invalid request method and/or path: DELETE /x.");
        let drive = r#"{"drive_id":"b","path_on_host":"/x","is_root_device":false}"#;
        assert!(fault("PUT", "/drives/a", drive).contains("does not match the id from the body"));
    }

    /// `vmm/api/openapi.json`.
    fn openapi() -> Value {
        serde_json::from_str(include_str!("../../api/openapi.json")).unwrap()
    }

    #[test]
    fn the_openapi_file_describes_the_routes_and_nothing_else() {
        let openapi = openapi();
        let described = openapi["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| (method.to_uppercase(), path.clone()))
        });
        let routes = ROUTES.iter().map(|route| (route.method.to_owned(), route.path.to_owned()));
        let set = |pairs: Vec<_>| pairs.into_iter().collect::<std::collections::BTreeSet<_>>();
        assert_eq!(set(described.collect()), set(routes.collect()));
        for route in ROUTES {
            let required =
                &openapi["paths"][route.path][route.method.to_lowercase()]["requestBody"]["required"];
            assert_eq!(
                *required == true,
                route.body == BodyRule::Required,
                "{} {}",
                route.method,
                route.path
            );
        }
    }

    /// Firecracker's paths and their methods (`firecracker.yaml`, 1.17).
    const FIRECRACKER_PATHS: &[(&str, &[&str])] = &[
        ("/", &["GET"]),
        ("/actions", &["PUT"]),
        ("/balloon", &["GET", "PATCH", "PUT"]),
        ("/balloon/statistics", &["GET", "PATCH"]),
        ("/balloon/hinting/start", &["PATCH"]),
        ("/balloon/hinting/status", &["GET"]),
        ("/balloon/hinting/stop", &["PATCH"]),
        ("/boot-source", &["PUT"]),
        ("/cpu-config", &["PUT"]),
        ("/drives/x", &["PATCH", "PUT"]),
        ("/pmem/x", &["PATCH", "PUT"]),
        ("/logger", &["PUT"]),
        ("/machine-config", &["GET", "PATCH", "PUT"]),
        ("/metrics", &["PUT"]),
        ("/mmds", &["GET", "PATCH", "PUT"]),
        ("/mmds/config", &["PUT"]),
        ("/entropy", &["PUT"]),
        ("/serial", &["PUT"]),
        ("/hotplug/memory", &["GET", "PATCH", "PUT"]),
        ("/network-interfaces/x", &["PATCH", "PUT"]),
        ("/snapshot/create", &["PUT"]),
        ("/snapshot/load", &["PUT"]),
        ("/version", &["GET"]),
        ("/vm", &["PATCH"]),
        ("/vm/config", &["GET"]),
        ("/vsock", &["PUT"]),
    ];

    #[test]
    fn every_path_of_firecracker_is_there() {
        for (path, methods) in FIRECRACKER_PATHS {
            for method in *methods {
                let body = if *method == "GET" { "" } else { "{}" };
                if let Err(error @ RequestError::InvalidPathMethod { .. }) =
                    parse(&request(method, path, body))
                {
                    panic!("{error}");
                }
            }
        }
    }

    /// Firecracker's fields by our name of the type (`firecracker.yaml`, 1.17), and those that are refused unless neutral.
    const FIRECRACKER_FIELDS: &[(&str, &str, &[Neutral])] = &[
        (
            "Balloon",
            "amount_mib deflate_on_oom stats_polling_interval_s free_page_hinting free_page_reporting",
            &[],
        ),
        ("BalloonPatch", "amount_mib", &[]),
        (
            "BalloonStats",
            "target_pages actual_pages target_mib actual_mib swap_in swap_out major_faults minor_faults free_memory \
             total_memory available_memory disk_caches hugetlb_allocations hugetlb_failures oom_kill alloc_stall \
             async_scan direct_scan async_reclaim direct_reclaim",
            &[],
        ),
        ("BalloonHintingStart", "acknowledge_on_stop", &[]),
        ("BalloonHintingStatus", "host_cmd guest_cmd", &[]),
        ("BalloonStatsPatch", "stats_polling_interval_s", &[]),
        ("BootSource", "boot_args initrd_path kernel_image_path", &[]),
        (
            "Drive",
            "drive_id partuuid is_root_device cache_type is_read_only path_on_host rate_limiter io_engine socket",
            DRIVE,
        ),
        ("Fault", "fault_message", &[]),
        (
            "VmConfig",
            "balloon drives boot-source cpu-config logger machine-config metrics memory-hotplug mmds-config \
             network-interfaces pmem vsock entropy",
            &[],
        ),
        ("Action", "action_type", &[]),
        ("InstanceInfo", "app_name id state vmm_version", &[]),
        ("Logger", "level log_path show_level show_log_origin module", &[]),
        ("MachineConfig", "cpu_template smt mem_size_mib track_dirty_pages vcpu_count huge_pages", &[]),
        ("MemoryBackend", "backend_type backend_path", &[]),
        ("Metrics", "metrics_path emit_id properties", &[]),
        ("MmdsConfig", "version network_interfaces ipv4_address imds_compat", &[]),
        ("NetworkInterface", "guest_mac host_dev_name iface_id mtu rx_rate_limiter tx_rate_limiter", &[]),
        ("CpuConfig", "kvm_capabilities cpuid_modifiers msr_modifiers reg_modifiers vcpu_features", CPU),
        ("CpuidLeafModifier", "leaf subleaf flags modifiers", &[]),
        ("CpuidRegisterModifier", "register bitmap", &[]),
        ("MsrModifier", "addr bitmap", &[]),
        ("DrivePatch", "drive_id path_on_host rate_limiter", &[]),
        ("MemoryHotplug", "total_size_mib slot_size_mib block_size_mib", &[]),
        ("MemoryHotplugPatch", "requested_size_mib", &[]),
        (
            "MemoryHotplugStatus",
            "total_size_mib slot_size_mib block_size_mib plugged_size_mib requested_size_mib",
            &[],
        ),
        ("Pmem", "id path_on_host root_device read_only rate_limiter", &[]),
        ("PmemPatch", "id rate_limiter", &[]),
        ("NetworkInterfacePatch", "iface_id rx_rate_limiter tx_rate_limiter", &[]),
        ("RateLimiter", "bandwidth ops", &[]),
        ("SnapshotCreate", "mem_file_path snapshot_path snapshot_type", &[]),
        ("NetworkOverride", "iface_id host_dev_name", &[]),
        ("VsockOverride", "uds_path", &[]),
        (
            "SnapshotLoad",
            "enable_diff_snapshots track_dirty_pages mem_file_path mem_backend snapshot_path resume_vm \
             network_overrides vsock_override clock_realtime huge_pages",
            &[],
        ),
        ("TokenBucket", "one_time_burst refill_time size", &[]),
        ("VmStatePatch", "state", &[]),
        ("Entropy", "rate_limiter", &[]),
        ("Serial", "serial_out_path rate_limiter", &[]),
        ("Version", "firecracker_version", &[]),
        ("Vsock", "guest_cid uds_path vsock_id", &[]),
    ];

    #[test]
    fn every_field_of_firecracker_is_there_or_refused_by_name() {
        let openapi = openapi();
        for (name, fields, refused) in FIRECRACKER_FIELDS {
            let ours = openapi["components"]["schemas"][name]["properties"].as_object();
            let ours = ours.unwrap_or_else(|| panic!("no schema {name}"));
            for field in fields.split_whitespace() {
                let is_refused = refused.iter().any(|(other, _)| *other == field);
                assert_ne!(ours.contains_key(field), is_refused, "{name}.{field}");
            }
        }
    }

    #[test]
    fn unknown_fields_are_refused_with_their_place() {
        let text = fault("PUT", "/boot-source", r#"{"kernel_image_path":"/k","foo":1}"#);
        assert!(text.contains("unknown field `foo`") && text.contains("line 1"), "{text}");
    }

    #[test]
    fn neutral_values_of_missing_features_are_accepted_and_others_named() {
        let drive = |field: &str| {
            let body = format!(r#"{{"drive_id":"a","path_on_host":"/x","is_root_device":true,{field}}}"#);
            parse(&request("PUT", "/drives/a", &body))
        };
        for field in [r#""rate_limiter":null"#, r#""socket":null"#, r#""is_read_only":null,"io_engine":null"#]
        {
            assert!(drive(field).is_ok(), "{field}");
        }
        let served = r#"{"drive_id":"a","socket":"/s","is_root_device":true,"path_on_host":null}"#;
        let served = parse(&request("PUT", "/drives/a", served)).unwrap();
        assert!(
            matches!(served, VmmAction::SetDrive(drive) if drive.socket.as_deref() == Some("/s".as_ref()))
        );
        assert!(drive(r#""socket":null,"io_engine":"Async""#).is_ok());
        let error = drive(r#""io_engine":"Threads""#).unwrap_err().to_string();
        assert!(error.contains("`Threads`"), "{error}");
        let patch =
            r#"{"drive_id":"a","path_on_host":"/y","rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#;
        let patch = parse(&request("PATCH", "/drives/a", patch)).unwrap();
        assert!(
            matches!(patch, VmmAction::PatchDrive(patch) if patch.rate_limiter.unwrap().bandwidth.is_none())
        );
        assert!(
            fault("PATCH", "/drives/a", r#"{"drive_id":"a","is_read_only":true}"#).contains("is_read_only")
        );
        let machine = |value: &str| {
            let body =
                format!(r#"{{"vcpu_count":1,"mem_size_mib":64,"huge_pages":{value},"cpu_template":"None"}}"#);
            parse(&request("PUT", "/machine-config", &body))
        };
        assert!(machine(r#""None""#).is_ok());
        let template = |name| {
            let body = format!(r#"{{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"{name}"}}"#);
            parse(&request("PUT", "/machine-config", &body))
        };
        for name in ["C3", "T2", "T2S", "T2CL", "T2A", "None"] {
            assert!(template(name).is_ok(), "{name}");
        }
        let text = template("V1N1").unwrap_err().to_string();
        assert!(text.contains("`V1N1`") && text.contains("`T2CL`"), "{text}");
        assert!(fault("PUT", "/cpu-config", r#"{"vcpu_features":[]}"#).contains("arm64"));
        assert!(parse(&request("PUT", "/cpu-config", r#"{"vcpu_features":null}"#)).is_ok());
        assert!(machine("null").is_ok() && machine(r#""2M""#).is_ok());
        assert!(machine(r#""1G""#).unwrap_err().to_string().contains("`1G`"));
        let patch = parse(&request("PATCH", "/machine-config", r#"{"smt":null,"vcpu_count":2}"#)).unwrap();
        assert!(matches!(patch, VmmAction::PatchMachineConfig(patch) if patch.vcpu_count == Some(2)));
    }

    #[test]
    fn a_firecracker_config_file_with_nulls_is_read() {
        let config = parse_config_file(
            br#"{"boot-source":{"kernel_image_path":"/k","boot_args":null,"initrd_path":null},
                "drives":[{"drive_id":"r","path_on_host":"/d","is_root_device":true,"partuuid":null,
                           "is_read_only":false,"cache_type":"Unsafe","io_engine":"Sync","rate_limiter":null}],
                "machine-config":{"vcpu_count":2,"mem_size_mib":1024,"huge_pages":"None"},
                "cpu-config":null,"balloon":null,"network-interfaces":[],"vsock":null,"logger":null,
                "metrics":null,"mmds-config":null,"entropy":null}"#,
        )
        .unwrap();
        assert_eq!((config.drives.len(), config.machine_config.vcpu_count), (1, 2));
        let later = parse_config_file(br#"{"memory-hotplug":null,"pmem":null}"#).unwrap();
        assert_eq!(later, VmConfig::default());
        let hotplug = parse_config_file(br#"{"memory-hotplug":{"total_size_mib":256}}"#).unwrap();
        let sizes = hotplug.memory_hotplug.map(|hotplug| (hotplug.block_size_mib, hotplug.slot_size_mib));
        assert_eq!(sizes, Some((2, 128)));
        assert!(parse_config_file(b"{").is_err());
    }

    proptest! {
        #[test]
        fn any_body_is_answered_without_panic(body in ".{0,80}", path in "/[a-z/-]{0,30}") {
            for method in ["GET", "PUT", "PATCH", "DELETE"] {
                let _ = parse(&request(method, &path, &body));
            }
            let _ = parse_config_file(body.as_bytes());
        }
    }
}
