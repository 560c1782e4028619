//! What queries may say: part of the tests only, which check that a handler asks for no parameter that isn't here, and for
//! each in the way that is here. Queries of network follow from its collections' attributes.

use axum::extract::MatchedPath;
use http::{Method, request::Parts};
use serde_json::{Value, json};

use super::{
    Member, TEXT,
    Type::{self, Any, Number, Since, Word, Yes},
    render,
};

/// Whole path of a `GET` (or the method before it), parameters.
pub(crate) type Row = (&'static str, &'static [Member]);

const COUNT: Type = Number(0, i64::MAX);
const DIRECTION: Type = Word(&["asc", "desc"]);
/// Keystone's flags: anything but `0` and `false`, even nothing, is yes.
const FLAG: Type = Any;

/// Nothing counts as well.
const MAYBE_EMPTY: Type = Type::Either(&[Yes, Word(&[""])]);

const SERVERS: &[Member] = &[
    ("limit", COUNT),
    ("marker", TEXT),
    (
        "sort_key",
        Word(&[
            "availability_zone",
            "created_at",
            "display_description",
            "display_name",
            "host",
            "node",
            "image_ref",
            "instance_type_id",
            "key_name",
            "launch_index",
            "launched_at",
            "locked",
            "project_id",
            "task_state",
            "updated_at",
            "user_id",
            "uuid",
            "vm_state",
        ]),
    ),
    ("sort_dir", DIRECTION),
    ("all_tenants", MAYBE_EMPTY),
    ("name", TEXT),
    ("status", TEXT),
    ("host", TEXT),
    ("node", TEXT),
    ("changes-since", TEXT),
    ("deleted", Yes),
    ("user_id", TEXT),
    ("project_id", TEXT),
    ("tenant_id", TEXT),
    ("uuid", TEXT),
    ("flavor", TEXT),
    ("image", TEXT),
    ("ip", TEXT),
    ("key_name", TEXT),
    ("availability_zone", TEXT),
    ("vm_state", TEXT),
    ("task_state", TEXT),
    ("hostname", TEXT),
    ("reservation_id", TEXT),
    ("access_ip_v4", TEXT),
    ("access_ip_v6", TEXT),
    ("auto_disk_config", TEXT),
    ("description", TEXT),
    ("power_state", COUNT),
    ("launch_index", COUNT),
    ("config_drive", MAYBE_EMPTY),
    ("tags", Since(26, &TEXT)),
    ("tags-any", Since(26, &TEXT)),
    ("not-tags", Since(26, &TEXT)),
    ("not-tags-any", Since(26, &TEXT)),
    ("changes-before", Since(66, &TEXT)),
    ("locked", Since(73, &Yes)),
];

const FLAVORS: &[Member] = &[
    ("limit", COUNT),
    ("marker", TEXT),
    ("sort_key", TEXT),
    ("sort_dir", DIRECTION),
    ("minRam", COUNT),
    ("minDisk", COUNT),
    ("is_public", Type::Either(&[Yes, Word(&["None", "none"])])),
];

const HYPERVISORS: &[Member] = &[
    ("hypervisor_hostname_pattern", Since(53, &TEXT)),
    ("marker", Since(33, &TEXT)),
    ("limit", Since(33, &COUNT)),
    ("with_servers", Since(53, &Yes)),
];

const USAGE: &[Member] = &[
    ("start", TEXT),
    ("end", TEXT),
    ("detailed", TEXT),
    ("marker", Since(40, &TEXT)),
    ("limit", Since(40, &COUNT)),
];

/// Of the image service's list, until 2.35.
const IMAGES: &[Member] = &[
    ("limit", COUNT),
    ("marker", TEXT),
    ("name", TEXT),
    ("status", TEXT),
    ("server", TEXT),
    ("type", TEXT),
    ("minDisk", COUNT),
    ("minRam", COUNT),
    ("changes-since", TEXT),
];

/// Of what is in a namespace of definitions of metadata.
const PARTS: &[Member] = &[
    ("limit", COUNT),
    ("marker", TEXT),
    ("sort_key", Word(&["created_at", "updated_at", "name"])),
    ("sort_dir", DIRECTION),
];

/// All of them but network's.
pub(crate) const QUERIES: &[Row] = &[
    ("POST /identity/v3/auth/tokens", &[("nocatalog", FLAG)]),
    ("/identity/v3/auth/tokens", &[("allow_expired", FLAG), ("nocatalog", FLAG)]),
    ("/identity/v3/domains", &[("name", TEXT), ("enabled", Yes)]),
    (
        "/identity/v3/projects",
        &[
            ("name", TEXT),
            ("domain_id", TEXT),
            ("parent_id", TEXT),
            ("enabled", Yes),
            ("is_domain", FLAG),
            ("tags", TEXT),
            ("tags-any", TEXT),
            ("not-tags", TEXT),
            ("not-tags-any", TEXT),
        ],
    ),
    (
        "/identity/v3/projects/{id}",
        &[
            ("parents_as_list", FLAG),
            ("parents_as_ids", FLAG),
            ("subtree_as_list", FLAG),
            ("subtree_as_ids", FLAG),
        ],
    ),
    ("/identity/v3/users", &[("name", TEXT), ("domain_id", TEXT), ("enabled", Yes)]),
    ("/identity/v3/users/{user}/groups", &[("name", TEXT)]),
    ("/identity/v3/users/{user}/application_credentials", &[("name", TEXT)]),
    ("/identity/v3/groups", &[("name", TEXT), ("domain_id", TEXT)]),
    ("/identity/v3/groups/{id}/users", &[("name", TEXT)]),
    ("/identity/v3/roles", &[("name", TEXT), ("domain_id", TEXT)]),
    (
        "/identity/v3/role_assignments",
        &[
            ("user.id", TEXT),
            ("group.id", TEXT),
            ("role.id", TEXT),
            ("scope.project.id", TEXT),
            ("scope.domain.id", TEXT),
            ("scope.system", TEXT),
            ("scope.OS-INHERIT:inherited_to", TEXT),
            ("effective", FLAG),
            ("include_names", FLAG),
            ("include_subtree", FLAG),
        ],
    ),
    ("/identity/v3/OS-EP-FILTER/endpoint_groups", &[("name", TEXT)]),
    ("/identity/v3/OS-TRUST/trusts", &[("trustor_user_id", TEXT), ("trustee_user_id", TEXT)]),
    ("/identity/v3/credentials", &[("user_id", TEXT), ("type", TEXT)]),
    ("/identity/v3/registered_limits", &[("service_id", TEXT), ("region_id", TEXT), ("resource_name", TEXT)]),
    (
        "/identity/v3/limits",
        &[
            ("service_id", TEXT),
            ("region_id", TEXT),
            ("resource_name", TEXT),
            ("project_id", TEXT),
            ("domain_id", TEXT),
        ],
    ),
    ("/identity/v3/regions", &[("parent_region_id", TEXT)]),
    ("/identity/v3/services", &[("type", TEXT), ("name", TEXT)]),
    (
        "/identity/v3/endpoints",
        &[("service_id", TEXT), ("interface", TEXT), ("region_id", TEXT), ("region", TEXT)],
    ),
    (
        "/image/v2/images",
        &[
            ("limit", COUNT),
            ("marker", TEXT),
            ("sort", TEXT),
            ("sort_key", TEXT),
            ("sort_dir", DIRECTION),
            ("id", TEXT),
            ("name", TEXT),
            ("status", TEXT),
            ("visibility", Word(&["all", "community", "private", "public", "shared", ""])),
            ("member_status", Word(&["accepted", "pending", "rejected", "all"])),
            ("owner", TEXT),
            ("tag", TEXT),
            ("container_format", TEXT),
            ("disk_format", TEXT),
            ("checksum", TEXT),
            ("os_hash_value", TEXT),
            ("protected", Yes),
            ("os_hidden", Yes),
            ("size_min", COUNT),
            ("size_max", COUNT),
            ("min_ram", COUNT),
            ("min_disk", COUNT),
            ("created_at", TEXT),
            ("updated_at", TEXT),
        ],
    ),
    (
        "/image/v2/tasks",
        &[
            ("limit", COUNT),
            ("marker", TEXT),
            ("sort_key", Word(&["created_at", "updated_at"])),
            ("sort_dir", DIRECTION),
            ("status", TEXT),
            ("type", TEXT),
            ("owner", TEXT),
            ("image_id", TEXT),
        ],
    ),
    (
        "/image/v2/metadefs/namespaces",
        &[
            ("limit", COUNT),
            ("marker", TEXT),
            (
                "sort_key",
                Word(&["created_at", "updated_at", "namespace", "display_name", "visibility", "owner"]),
            ),
            ("sort_dir", DIRECTION),
            ("visibility", Word(&["public", "private"])),
            ("resource_types", TEXT),
        ],
    ),
    ("/image/v2/metadefs/namespaces/{namespace}", &[("resource_type", TEXT)]),
    ("/image/v2/metadefs/namespaces/{namespace}/objects", PARTS),
    ("/image/v2/metadefs/namespaces/{namespace}/properties/{property}", &[("resource_type", TEXT)]),
    ("/image/v2/metadefs/namespaces/{namespace}/tags", PARTS),
    ("/compute/v2.1/images", IMAGES),
    ("/compute/v2.1/images/detail", IMAGES),
    ("/compute/v2.1/servers", SERVERS),
    ("/compute/v2.1/servers/detail", SERVERS),
    (
        "/compute/v2.1/servers/{id}/os-instance-actions",
        &[
            ("limit", Since(58, &COUNT)),
            ("marker", Since(58, &TEXT)),
            ("changes-since", Since(58, &TEXT)),
            ("changes-before", Since(66, &TEXT)),
        ],
    ),
    ("/compute/v2.1/flavors", FLAVORS),
    ("/compute/v2.1/flavors/detail", FLAVORS),
    ("/compute/v2.1/limits", &[("tenant_id", TEXT)]),
    (
        "/compute/v2.1/os-keypairs",
        &[("limit", Since(35, &COUNT)), ("marker", Since(35, &TEXT)), ("user_id", Since(10, &TEXT))],
    ),
    ("/compute/v2.1/os-keypairs/{name}", &[("user_id", Since(10, &TEXT))]),
    ("DELETE /compute/v2.1/os-keypairs/{name}", &[("user_id", Since(10, &TEXT))]),
    ("/compute/v2.1/os-server-groups", &[("limit", COUNT), ("offset", COUNT), ("all_projects", FLAG)]),
    ("/compute/v2.1/os-services", &[("host", TEXT), ("binary", TEXT)]),
    ("/compute/v2.1/os-hypervisors", HYPERVISORS),
    ("/compute/v2.1/os-hypervisors/detail", HYPERVISORS),
    ("/compute/v2.1/os-hypervisors/{id}", &[("with_servers", Since(53, &Yes))]),
    ("/compute/v2.1/os-simple-tenant-usage", USAGE),
    ("/compute/v2.1/os-simple-tenant-usage/{project}", USAGE),
    (
        "/compute/v2.1/os-migrations",
        &[
            ("limit", Since(59, &COUNT)),
            ("marker", Since(59, &TEXT)),
            ("host", TEXT),
            ("source_compute", TEXT),
            ("status", TEXT),
            ("instance_uuid", TEXT),
            ("migration_type", TEXT),
            ("hidden", Yes),
            ("changes-since", Since(59, &TEXT)),
            ("changes-before", Since(66, &TEXT)),
            ("user_id", Since(80, &TEXT)),
            ("project_id", Since(80, &TEXT)),
        ],
    ),
    ("/mote/v1/events", &[("after", TEXT), ("limit", COUNT), ("all_projects", Yes), ("wait_s", COUNT)]),
    ("/mote/v1/hosts/{id}/desired", &[("after", COUNT), ("wait", COUNT)]),
    ("/mote/v1/hosts/{id}/requests", &[("wait", COUNT)]),
    (
        "/mote/v1/metering/ports",
        &[
            ("limit", COUNT),
            ("marker", TEXT),
            ("project_id", TEXT),
            ("server_id", TEXT),
            ("network_id", TEXT),
            ("port_id", TEXT),
        ],
    ),
    ("/mote/v1/serial-console", &[("token", TEXT)]),
    ("/mote/v1/servers/{id}/console", &[("offset", COUNT), ("wait_ms", COUNT)]),
];

/// The parameters of a route.
pub(crate) fn of(method: &str, path: &str) -> Option<&'static [Member]> {
    let method = method.to_ascii_uppercase();
    let is = |row: &&Row| match row.0.split_once(' ') {
        Some((other, of)) => (other, of) == (method.as_str(), path),
        None => method == "GET" && row.0 == path,
    };
    QUERIES.iter().find(is).map(|row| row.1)
}

/// The parameters of lists of network and of single resources, as OpenAPI has them: any attribute is a filter.
pub(crate) fn of_network(path: &str) -> Vec<(String, Value)> {
    let text = || render::schema(&TEXT);
    let fields = || ("fields".to_owned(), text());
    let collections = crate::network::collections();
    if let Some((_, attributes)) = collections.iter().find(|(list, _)| list == path) {
        let filters = attributes.iter().map(|name| ((*name).to_owned(), text()));
        let tags = ["tags-any", "not-tags", "not-tags-any"].map(|name| (name.to_owned(), text()));
        let paging = [
            ("limit".to_owned(), render::schema(&COUNT)),
            ("marker".to_owned(), text()),
            ("page_reverse".to_owned(), render::schema(&Yes)),
            ("sort_key".to_owned(), json!({"enum": attributes})),
            ("sort_dir".to_owned(), render::schema(&DIRECTION)),
            fields(),
        ];
        let tags = tags.into_iter().filter(|_| attributes.contains(&"tags"));
        return paging.into_iter().chain(filters).chain(tags).collect();
    }
    let one = path.strip_suffix("/{id}").and_then(|list| collections.iter().find(|(of, _)| of == list));
    one.map(|_| fields()).into_iter().collect()
}

/// The parameters of a request's route; none at all if the tables don't have it.
pub(crate) fn of_request(request: &Parts) -> Option<&'static [Member]> {
    let matched = request.extensions.get::<MatchedPath>()?;
    let method = if request.method == Method::HEAD { "GET" } else { request.method.as_str() };
    Some(of(method, matched.as_str()).unwrap_or_default())
}

/// Whether a handler may ask for a parameter in this way.
pub(crate) fn allows(known: &[Member], name: &str, way: Way) -> bool {
    let of = known.iter().find(|(known, _)| *known == name).map(|(_, of)| of.within());
    match way {
        Way::Text => of.is_some(),
        Way::Flag => matches!(of, Some(Any)),
        Way::Boolean => matches!(of, Some(Yes | Type::Either(_))),
        Way::Number => matches!(of, Some(Number(..))),
    }
}

/// How a parameter is asked for, as the methods of [`crate::http::query::Params`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Text,
    Flag,
    Boolean,
    Number,
}
