//! Bodies of compute, with the microversions in which a field is there. Clients send `null` for what they leave out of a
//! new server, which is as if absent.

use super::{
    Row, TEXT,
    Type::{
        self, Any, Digits, Either, Flag, Id, List, Map, Maybe, Need, Number, Object, Partly, Since, Text,
        Until, Word,
    },
};

const NAME: Type = Text(1, 255);
const WORDS: Type = Maybe(&TEXT);
const DISK_CONFIG: Type = Maybe(&Word(&["AUTO", "MANUAL"]));
const METADATA: Type = Map(&Text(0, 255));
/// Base64, up to 65,535 characters without white space.
const USER_DATA: Type = Maybe(&Text(0, 2 * 65_535));
const PASSWORD: Type = Maybe(&Text(1, 255));
const DESCRIPTION: Type = Maybe(&Text(0, 255));
const HOST_NAME: Type = Maybe(&Text(1, 63));
const FLAVOR_REF: Type = Either(&[Text(1, 2048), Number(0, i64::MAX)]);
/// Of an action that needs none.
const NOTHING: Type = Maybe(&Object(&[]));
const NUMBER: Type = Digits(1, i32::MAX as i64);

const NIC: Type = Object(&[("uuid", Maybe(&Id)), ("port", Maybe(&Id)), ("fixed_ip", WORDS)]);
/// The disk that is made of the image, and those beside it.
const DEVICE: Type = Either(&[ROOT_DEVICE, LOCAL_DEVICE]);
const LOCAL_DEVICE: Type = Object(&[
    ("source_type", Need(&Word(&["blank"]))),
    ("destination_type", Need(&Word(&["local"]))),
    ("boot_index", Maybe(&Digits(-1, -1))),
    ("delete_on_termination", Maybe(&Flag)),
    ("guest_format", Maybe(&Word(&["swap"]))),
    ("volume_size", Maybe(&NUMBER)),
]);
const ROOT_DEVICE: Type = Object(&[
    ("uuid", Need(&Id)),
    ("source_type", Need(&Word(&["image"]))),
    ("destination_type", Maybe(&Word(&["local"]))),
    ("boot_index", Maybe(&Digits(0, 0))),
    ("delete_on_termination", Maybe(&Flag)),
]);
const SERVERS: Type = Maybe(&Either(&[Id, List(&Id, 0, 100)]));
const HINTS: Type = Object(&[("group", Maybe(&Id)), ("same_host", SERVERS), ("different_host", SERVERS)]);
const YES_OR_NO: Type = Maybe(&Either(&[
    Flag,
    Word(&[
        "", "True", "true", "TRUE", "1", "On", "on", "ON", "Yes", "yes", "YES", "y", "Y", "t", "T", "False",
        "false", "FALSE", "0", "Off", "off", "OFF", "No", "no", "NO", "n", "N", "f", "F",
    ]),
]));

const NEW_SERVER: Type = Object(&[
    ("name", Need(&NAME)),
    ("imageRef", Maybe(&Either(&[Id, Word(&[""])]))),
    ("flavorRef", Need(&FLAVOR_REF)),
    ("networks", Until(37, &Maybe(&List(&NIC, 0, 8)))),
    ("networks", Since(37, &Need(&Either(&[Word(&["auto", "none"]), List(&NIC, 0, 8)])))),
    ("block_device_mapping_v2", Maybe(&List(&DEVICE, 0, 8))),
    ("min_count", Maybe(&Digits(1, 100))),
    ("max_count", Maybe(&Digits(1, 100))),
    ("metadata", Maybe(&METADATA)),
    ("availability_zone", WORDS),
    ("key_name", WORDS),
    ("user_data", USER_DATA),
    ("security_groups", Maybe(&List(&Object(&[("name", Need(&TEXT))]), 0, 50))),
    ("config_drive", YES_OR_NO),
    ("accessIPv4", WORDS),
    ("accessIPv6", WORDS),
    ("adminPass", PASSWORD),
    ("return_reservation_id", Maybe(&Flag)),
    ("OS-DCF:diskConfig", DISK_CONFIG),
    ("description", Since(19, &DESCRIPTION)),
    ("tags", Since(52, &Maybe(&List(&Text(1, 60), 0, 50)))),
    ("personality", Until(57, &Maybe(&List(&Any, 0, 0)))),
    ("trusted_image_certificates", Since(63, &Maybe(&List(&Any, 0, 0)))),
    ("host", Since(74, &WORDS)),
    ("hypervisor_hostname", Since(74, &WORDS)),
    ("hostname", Since(90, &HOST_NAME)),
]);

const SERVER: Type = Object(&[
    ("name", Maybe(&NAME)),
    ("accessIPv4", WORDS),
    ("accessIPv6", WORDS),
    ("OS-DCF:diskConfig", DISK_CONFIG),
    ("description", Since(19, &DESCRIPTION)),
    ("hostname", Since(90, &HOST_NAME)),
]);

const REBUILD: Type = Object(&[
    ("imageRef", Need(&Id)),
    ("name", Maybe(&NAME)),
    ("metadata", Maybe(&METADATA)),
    ("preserve_ephemeral", Maybe(&Flag)),
    ("OS-DCF:diskConfig", DISK_CONFIG),
    ("adminPass", PASSWORD),
    ("accessIPv4", WORDS),
    ("accessIPv6", WORDS),
    ("key_name", Since(54, &WORDS)),
    ("description", Since(19, &DESCRIPTION)),
    ("user_data", Since(57, &USER_DATA)),
    ("hostname", Since(90, &HOST_NAME)),
]);

const GROUP_NAME: Type = Object(&[("name", Need(&TEXT))]);

/// One of these; those at the end are refused with 501 (what they need isn't there).
const ACTION: Type = Either(&[
    Object(&[("os-start", Need(&NOTHING))]),
    Object(&[("os-stop", Need(&NOTHING))]),
    Object(&[(
        "reboot",
        Need(&Object(&[("type", Need(&Word(&["SOFT", "HARD", "soft", "hard", "Soft", "Hard"])))])),
    )]),
    Object(&[("pause", Need(&NOTHING))]),
    Object(&[("unpause", Need(&NOTHING))]),
    Object(&[("suspend", Need(&NOTHING))]),
    Object(&[("resume", Need(&NOTHING))]),
    Object(&[("lock", Need(&Maybe(&Object(&[("locked_reason", Since(73, &Text(1, 255)))]))))]),
    Object(&[("unlock", Need(&NOTHING))]),
    Object(&[("rebuild", Need(&REBUILD))]),
    Object(&[(
        "rescue",
        Need(&Maybe(&Object(&[("rescue_image_ref", Maybe(&Id)), ("adminPass", PASSWORD)]))),
    )]),
    Object(&[("unrescue", Need(&NOTHING))]),
    Object(&[("createImage", Need(&Object(&[("name", Need(&NAME)), ("metadata", Maybe(&METADATA))])))]),
    Object(&[("shelve", Need(&NOTHING))]),
    Object(&[("shelveOffload", Need(&NOTHING))]),
    Object(&[("unshelve", Need(&Maybe(&Object(&[("availability_zone", Since(77, &TEXT))]))))]),
    Object(&[(
        "resize",
        Need(&Object(&[("flavorRef", Need(&FLAVOR_REF)), ("OS-DCF:diskConfig", DISK_CONFIG)])),
    )]),
    Object(&[("confirmResize", Need(&NOTHING))]),
    Object(&[("revertResize", Need(&NOTHING))]),
    Object(&[("addSecurityGroup", Need(&GROUP_NAME))]),
    Object(&[("removeSecurityGroup", Need(&GROUP_NAME))]),
    Object(&[("addFixedIp", Need(&Object(&[("networkId", Need(&Id))])))]),
    Object(&[("removeFixedIp", Need(&Object(&[("address", Need(&TEXT))])))]),
    Object(&[("forceDelete", Need(&NOTHING))]),
    Object(&[("changePassword", Need(&Object(&[("adminPass", Need(&TEXT))])))]),
    Object(&[("os-resetState", Need(&Object(&[("state", Need(&Word(&["active", "error"])))])))]),
    Object(&[("os-getConsoleOutput", Need(&Object(&[("length", Maybe(&Digits(-1, i64::MAX)))])))]),
    Object(&[("os-getSerialConsole", Need(&Object(&[("type", Need(&TEXT))])))]),
    Object(&[("migrate", Need(&Any))]),
    Object(&[("os-migrateLive", Need(&Any))]),
    Object(&[("evacuate", Need(&Any))]),
    Object(&[(
        "createBackup",
        Need(&Object(&[
            ("name", Need(&NAME)),
            ("backup_type", Need(&Text(1, 255))),
            ("rotation", Need(&Digits(0, i32::MAX as i64))),
            ("metadata", Maybe(&METADATA)),
        ])),
    )]),
    Object(&[("restore", Need(&NOTHING))]),
    Object(&[("trigger_crash_dump", Need(&Any))]),
    Object(&[("resetNetwork", Need(&Any))]),
    Object(&[("injectNetworkInfo", Need(&Any))]),
    Object(&[("os-getVNCConsole", Need(&Any))]),
    Object(&[("os-getSPICEConsole", Need(&Any))]),
    Object(&[("os-getRDPConsole", Need(&Any))]),
]);

const ATTACHMENT: Type = Object(&[
    ("net_id", Maybe(&Id)),
    ("port_id", Maybe(&Id)),
    ("fixed_ips", Maybe(&List(&Object(&[("ip_address", Need(&TEXT))]), 0, 1))),
]);

const FLAVOR: Type = Object(&[
    ("name", Need(&NAME)),
    ("id", Maybe(&Either(&[NAME, Number(0, i64::MAX)]))),
    ("ram", Need(&NUMBER)),
    ("vcpus", Need(&NUMBER)),
    ("disk", Need(&Digits(0, i32::MAX as i64))),
    ("OS-FLV-EXT-DATA:ephemeral", Maybe(&Digits(0, i32::MAX as i64))),
    ("swap", Maybe(&Either(&[Digits(0, i32::MAX as i64), Word(&[""])]))),
    ("rxtx_factor", Any),
    (
        "os-flavor-access:is_public",
        Either(&[Flag, Word(&["True", "true", "TRUE", "False", "false", "FALSE"])]),
    ),
    ("description", Since(55, &Maybe(&Text(0, 65_535)))),
]);
const TENANT: Type = Object(&[("tenant", Need(&TEXT))]);
const SPEC: Type = Either(&[Text(0, 255), Number(i64::MIN, i64::MAX)]);

const KEY_PAIR: Type = Object(&[
    ("name", Need(&NAME)),
    ("public_key", WORDS),
    ("type", Since(2, &Maybe(&Word(&["ssh", "x509"])))),
    ("user_id", Since(10, &WORDS)),
]);

const GROUP: Type = Object(&[
    ("name", Need(&NAME)),
    ("policies", Until(64, &Need(&List(&TEXT, 0, 1)))),
    (
        "policy",
        Since(64, &Need(&Word(&["affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity"]))),
    ),
    ("rules", Since(64, &Maybe(&Object(&[("max_server_per_host", NUMBER)])))),
]);

const AGGREGATE: Type = Object(&[("name", Need(&NAME)), ("availability_zone", Maybe(&NAME))]);
const HOST: Type = Object(&[("host", Need(&TEXT))]);

const LIMIT: Type = Digits(-1, i32::MAX as i64);
const QUOTAS: Type = Object(&[
    ("instances", LIMIT),
    ("cores", LIMIT),
    ("ram", LIMIT),
    ("key_pairs", LIMIT),
    ("server_groups", LIMIT),
    ("server_group_members", LIMIT),
    // These can't be changed.
    ("metadata_items", LIMIT),
    ("floating_ips", Until(36, &LIMIT)),
    ("fixed_ips", Until(36, &LIMIT)),
    ("security_groups", Until(36, &LIMIT)),
    ("security_group_rules", Until(36, &LIMIT)),
    ("injected_files", Until(57, &LIMIT)),
    ("injected_file_content_bytes", Until(57, &LIMIT)),
    ("injected_file_path_bytes", Until(57, &LIMIT)),
    ("force", Flag),
    ("tenant_id", WORDS),
]);

const CLASS_QUOTAS: Type = Object(&[
    ("instances", LIMIT),
    ("cores", LIMIT),
    ("ram", LIMIT),
    ("key_pairs", LIMIT),
    ("server_groups", LIMIT),
    ("server_group_members", LIMIT),
    // These can't be changed.
    ("metadata_items", LIMIT),
    ("floating_ips", Until(50, &LIMIT)),
    ("fixed_ips", Until(50, &LIMIT)),
    ("security_groups", Until(50, &LIMIT)),
    ("security_group_rules", Until(50, &LIMIT)),
    ("injected_files", Until(57, &LIMIT)),
    ("injected_file_content_bytes", Until(57, &LIMIT)),
    ("injected_file_path_bytes", Until(57, &LIMIT)),
]);

const SERVICE: Type = Object(&[
    ("host", Until(53, &Need(&TEXT))),
    ("binary", Until(53, &Need(&TEXT))),
    ("disabled_reason", Maybe(&Text(1, 255))),
    ("status", Since(53, &Word(&["enabled", "disabled"]))),
    ("forced_down", Since(53, &Flag)),
]);

/// Below `/compute`.
pub(super) const BODIES: &[Row] = &[
    (
        "POST",
        "/v2.1/servers",
        Object(&[
            ("server", Need(&NEW_SERVER)),
            ("os:scheduler_hints", HINTS),
            ("OS-SCH-HNT:scheduler_hints", HINTS),
        ]),
    ),
    ("PUT", "/v2.1/servers/{id}", Object(&[("server", Need(&SERVER))])),
    ("POST", "/v2.1/servers/{id}/action", ACTION),
    ("POST", "/v2.1/servers/{id}/metadata", Object(&[("metadata", Need(&METADATA))])),
    ("PUT", "/v2.1/servers/{id}/metadata", Object(&[("metadata", Need(&METADATA))])),
    ("PUT", "/v2.1/servers/{id}/metadata/{key}", Object(&[("meta", Need(&METADATA))])),
    ("POST", "/v2.1/servers/{id}/os-interface", Object(&[("interfaceAttachment", Need(&ATTACHMENT))])),
    (
        "POST",
        "/v2.1/servers/{id}/remote-consoles",
        Object(&[(
            "remote_console",
            Need(&Object(&[
                ("protocol", Need(&Word(&["vnc", "spice", "rdp", "serial", "mks"]))),
                ("type", Need(&TEXT)),
            ])),
        )]),
    ),
    ("PUT", "/v2.1/servers/{id}/tags", Object(&[("tags", Need(&List(&Text(1, 60), 0, 50)))])),
    ("POST", "/v2.1/flavors", Object(&[("flavor", Need(&FLAVOR))])),
    (
        "PUT",
        "/v2.1/flavors/{id}",
        Object(&[("flavor", Need(&Object(&[("description", Need(&Maybe(&Text(0, 65_535))))])))]),
    ),
    (
        "POST",
        "/v2.1/flavors/{id}/action",
        Either(&[
            Object(&[("addTenantAccess", Need(&TENANT))]),
            Object(&[("removeTenantAccess", Need(&TENANT))]),
        ]),
    ),
    ("POST", "/v2.1/flavors/{id}/os-extra_specs", Object(&[("extra_specs", Need(&Map(&SPEC)))])),
    ("PUT", "/v2.1/flavors/{id}/os-extra_specs/{key}", Map(&SPEC)),
    ("POST", "/v2.1/os-keypairs", Object(&[("keypair", Need(&KEY_PAIR))])),
    ("POST", "/v2.1/os-server-groups", Object(&[("server_group", Need(&GROUP))])),
    ("POST", "/v2.1/os-aggregates", Object(&[("aggregate", Need(&AGGREGATE))])),
    ("PUT", "/v2.1/os-aggregates/{id}", Object(&[("aggregate", Need(&Partly(&AGGREGATE)))])),
    (
        "POST",
        "/v2.1/os-aggregates/{id}/action",
        Either(&[
            Object(&[("add_host", Need(&HOST))]),
            Object(&[("remove_host", Need(&HOST))]),
            Object(&[("set_metadata", Need(&Object(&[("metadata", Need(&Map(&Maybe(&Text(0, 255)))))])))]),
        ]),
    ),
    ("PUT", "/v2.1/os-quota-sets/{project}", Object(&[("quota_set", Need(&QUOTAS))])),
    ("PUT", "/v2.1/os-quota-class-sets/{class}", Object(&[("quota_class_set", Need(&CLASS_QUOTAS))])),
    ("PUT", "/v2.1/os-services/{action}", SERVICE),
];
