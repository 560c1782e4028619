//! Which action a request means, and which answer an action's result is: Firecracker's routes and rules.
//!
//! Fields that Firecracker has and this program does not are accepted only with the value that changes nothing
//! (`"rate_limiter": null`, `"huge_pages": "None"`); otherwise the fault names the field.

use mote_vmm_api::{
    Action, ActionType, BalloonHintingStart, Drive, DrivePatch, Entropy, MachineConfigPatch,
    NetworkInterface, NetworkInterfacePatch, VmConfig, VmState, VmStatePatch,
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
    /// No body.
    #[error("Empty {0} request.")]
    Empty(String),
    /// The body is not what it should be.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(serde_json::Error),
    /// A feature of Firecracker that is not there.
    #[error("The field `{0}` is not supported by mote-vmm; leave it out.")]
    Unsupported(&'static str),
    /// A path of Firecracker that is not there.
    #[error("{0} is not supported by this version of mote-vmm.")]
    Missing(&'static str),
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

/// A field of Firecracker's and the value (beside null) that means the same as leaving it out.
type Neutral = (&'static str, Option<&'static str>);

const MACHINE: &[Neutral] = &[("cpu_template", Some("None")), ("huge_pages", Some("None"))];
const DRIVE: &[Neutral] = &[("socket", None)];
/// Fields of ours that may be null.
const SNAPSHOT_LOAD: &[Neutral] = &[("vsock_override", None)];
const LIMITED: &[Neutral] = &[("rate_limiter", None)];
const CONFIG: &[Neutral] = &[("cpu-config", None), ("memory-hotplug", None), ("pmem", None)];
/// Fields of ours that Firecracker allows to be null.
const NULLABLE: [&str; 2] = ["is_read_only", "io_engine"];

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
    each(&mut value, "serial", LIMITED)?;
    if value == before {
        Err(RequestError::Json(error))
    } else {
        serde_json::from_value(value).map_err(RequestError::Json)
    }
}

/// The action that a request means.
///
/// # Errors
/// It means none.
pub fn parse(request: &Request) -> Result<VmmAction, RequestError> {
    let mut path = request.path.trim_start_matches('/').split_terminator('/');
    let resource = path.next().unwrap_or("");
    let rest: Vec<&str> = path.collect();
    let method = request.method.as_str();
    let no_route =
        || RequestError::InvalidPathMethod { method: method.to_owned(), path: request.path.clone() };
    if let Some(missing) = missing(method, resource, &rest) {
        return Err(RequestError::Missing(missing));
    }
    match (method, request.body.is_empty()) {
        ("GET", true) => match (resource, rest.as_slice()) {
            ("", []) => Ok(VmmAction::GetInstanceInfo),
            ("balloon", []) => Ok(VmmAction::GetBalloon),
            ("balloon", ["statistics"]) => Ok(VmmAction::GetBalloonStatistics),
            ("balloon", ["hinting", "status"]) => Ok(VmmAction::GetBalloonHinting),
            ("version", []) => Ok(VmmAction::GetVersion),
            ("machine-config", []) => Ok(VmmAction::GetMachineConfig),
            ("mmds", []) => Ok(VmmAction::GetMmds),
            ("vm", ["config"]) => Ok(VmmAction::GetVmConfig),
            _ => Err(no_route()),
        },
        ("GET", false) => Err(RequestError::GetWithBody),
        // These need no body.
        ("PATCH", true) if (resource, rest.as_slice()) == ("balloon", &["hinting", "start"]) => {
            Ok(VmmAction::StartBalloonHinting(BalloonHintingStart::default()))
        }
        ("PATCH", _) if (resource, rest.as_slice()) == ("balloon", &["hinting", "stop"]) => {
            Ok(VmmAction::StopBalloonHinting)
        }
        ("PUT" | "PATCH", true) => Err(RequestError::Empty(method.to_owned())),
        ("PUT", false) => match (resource, rest.as_slice()) {
            ("drives", id) => put_drive(request, id),
            ("network-interfaces", id) => put_network_interface(request, id),
            ("mmds", ["config"]) => body(request, &[]).map(VmmAction::SetMmdsConfig),
            ("snapshot", ["create"]) => body(request, &[]).map(VmmAction::CreateSnapshot),
            ("mote", ["smbios"]) => body(request, &[]).map(VmmAction::SetSmbios),
            ("snapshot", ["load"]) => body(request, SNAPSHOT_LOAD).map(VmmAction::LoadSnapshot),
            (resource, []) => put(request, resource).unwrap_or_else(|| Err(no_route())),
            _ => Err(no_route()),
        },
        ("PATCH", false) => match (resource, rest.as_slice()) {
            ("machine-config", []) => patch_machine(request),
            ("mmds", []) => body(request, &[]).map(VmmAction::PatchMmds),
            ("network-interfaces", id) => patch_network_interface(request, id),
            ("drives", id) => {
                with_id(request, id, &[], |patch: &DrivePatch| &patch.drive_id).map(VmmAction::PatchDrive)
            }
            ("balloon", []) => body(request, &[]).map(VmmAction::PatchBalloon),
            ("balloon", ["statistics"]) => body(request, &[]).map(VmmAction::PatchBalloonStatistics),
            ("balloon", ["hinting", "start"]) => body(request, &[]).map(VmmAction::StartBalloonHinting),
            ("vm", []) => Ok(match body::<VmStatePatch>(request, &[])?.state {
                VmState::Paused => VmmAction::Pause,
                VmState::Resumed => VmmAction::Resume,
            }),
            _ => Err(no_route()),
        },
        _ => Err(no_route()),
    }
}

/// The paths that Firecracker has and this program has not.
fn missing(method: &str, resource: &str, rest: &[&str]) -> Option<&'static str> {
    match (method, resource, rest) {
        ("PUT", "cpu-config", []) => Some("/cpu-config"),
        ("PUT" | "PATCH", "pmem", [_]) => Some("/pmem"),
        ("GET" | "PUT" | "PATCH", "hotplug", ["memory"]) => Some("/hotplug/memory"),
        _ => None,
    }
}

/// PUT of a resource without id.
fn put(request: &Request, resource: &str) -> Option<Result<VmmAction, RequestError>> {
    Some(match resource {
        "machine-config" => body(request, MACHINE).map(VmmAction::SetMachineConfig),
        "boot-source" => body(request, &[]).map(VmmAction::SetBootSource),
        "logger" => body(request, &[]).map(VmmAction::SetLogger),
        "metrics" => body(request, &[]).map(VmmAction::SetMetrics),
        "entropy" => body::<Entropy>(request, &[]).map(VmmAction::SetEntropy),
        "balloon" => body(request, &[]).map(VmmAction::SetBalloon),
        "mmds" => body(request, &[]).map(VmmAction::PutMmds),
        "vsock" => body(request, &[]).map(VmmAction::SetVsock),
        "serial" => body(request, LIMITED).map(VmmAction::SetSerial),
        "actions" => body::<Action>(request, &[]).map(|action| match action.action_type {
            ActionType::InstanceStart => VmmAction::Start,
            ActionType::SendCtrlAltDel => VmmAction::SendCtrlAltDel,
            ActionType::FlushMetrics => VmmAction::FlushMetrics,
        }),
        _ => return None,
    })
}

fn put_drive(request: &Request, id: &[&str]) -> Result<VmmAction, RequestError> {
    let drive: Drive = with_id(request, id, DRIVE, |drive: &Drive| &drive.drive_id)?;
    Ok(VmmAction::SetDrive(drive))
}

fn put_network_interface(request: &Request, id: &[&str]) -> Result<VmmAction, RequestError> {
    let interface = with_id(request, id, &[], |interface: &NetworkInterface| &interface.iface_id)?;
    Ok(VmmAction::SetNetworkInterface(interface))
}

fn patch_network_interface(request: &Request, id: &[&str]) -> Result<VmmAction, RequestError> {
    let patch = with_id(request, id, &[], |patch: &NetworkInterfacePatch| &patch.iface_id)?;
    Ok(VmmAction::PatchNetworkInterface(patch))
}

fn with_id<T: DeserializeOwned>(
    request: &Request,
    id: &[&str],
    neutral: &[Neutral],
    id_of: impl Fn(&T) -> &String,
) -> Result<T, RequestError> {
    let &[path] = id else { return Err(RequestError::EmptyId) };
    let item: T = body(request, neutral)?;
    let body = id_of(&item).clone();
    if path == body { Ok(item) } else { Err(RequestError::IdMismatch { path: path.to_owned(), body }) }
}

fn patch_machine(request: &Request) -> Result<VmmAction, RequestError> {
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
        Ok(Answer::Mmds(document)) => Response::json(document),
        Err(ActionError::Mmds(MmdsError::DataStoreLimitExceeded)) => {
            Response::fault(413, MmdsError::DataStoreLimitExceeded.to_string())
        }
        Err(error) => Response::fault(400, error_chain(error)),
    }
}

#[cfg(test)]
mod tests {
    use mote_vmm_api::MmdsVersion;
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
        assert_eq!(fault("DELETE", "/x", ""), "Invalid request method and/or path: DELETE /x.");
        let drive = r#"{"drive_id":"b","path_on_host":"/x","is_root_device":false}"#;
        assert!(fault("PUT", "/drives/a", drive).contains("does not match the id from the body"));
    }

    #[test]
    fn paths_of_firecracker_that_do_not_exist_are_refused_by_name() {
        for (method, path) in [("PUT", "/cpu-config"), ("PUT", "/pmem/a"), ("PATCH", "/hotplug/memory")] {
            let text = fault(method, path, "{}");
            assert!(text.contains("is not supported by this version"), "{method} {path}: {text}");
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
        let error = drive(r#""socket":"/s""#).unwrap_err().to_string();
        assert!(error.contains("`socket`"), "{error}");
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
        assert!(machine(r#""2M""#).unwrap_err().to_string().contains("`huge_pages`"));
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
        assert!(parse_config_file(br#"{"pmem":[]}"#).unwrap_err().to_string().contains("`pmem`"));
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
