//! Bodies of identity. Keystone's clients send `null` for what they don't set, which is as if absent; most things
//! also have fields of the client's own.

use super::{
    Row,
    Type::{self, Any, Either, Flag, List, Map, Maybe, Need, New, Number, Object, Open, Partly, Text, Word},
};

/// Of a thing that has one.
const NAME: Type = Text(1, 255);
/// Of a project or a domain.
const SHORT_NAME: Type = Text(1, 64);
/// Longest free text.
const TEXT: Type = Text(0, 16 << 10);
const WORDS: Type = Maybe(&TEXT);
const ENABLED: Type = Maybe(&Flag);
/// There are none.
const OPTIONS: Type = Maybe(&Object(&[]));
const TAGS: Type = List(&Text(1, 255), 0, 80);
/// By id or by name.
const REFERENCE: Type = Object(&[("id", WORDS), ("name", WORDS)]);
const OF_PROJECT: Type = Object(&[("id", WORDS), ("name", WORDS), ("domain", Maybe(&REFERENCE))]);

const PASSWORD: Type = Object(&[(
    "user",
    Need(&Object(&[
        ("id", WORDS),
        ("name", WORDS),
        ("domain", Maybe(&REFERENCE)),
        ("password", Need(&TEXT)),
    ])),
)]);

const APPLICATION_CREDENTIAL: Type =
    Object(&[("id", WORDS), ("name", WORDS), ("user", Maybe(&OF_PROJECT)), ("secret", Need(&TEXT))]);

const SCOPE: Type = Either(&[
    TEXT,
    Object(&[
        ("project", Maybe(&OF_PROJECT)),
        ("domain", Maybe(&REFERENCE)),
        ("system", Any),
        ("OS-TRUST:trust", Maybe(&Object(&[("id", Need(&TEXT))]))),
        ("unscoped", Any),
    ]),
]);

/// Methods that aren't there are refused by name, whatever they bring.
const AUTH: Type = Object(&[
    (
        "identity",
        Need(&Open(
            &[
                ("methods", Need(&List(&TEXT, 0, 16))),
                ("password", Maybe(&PASSWORD)),
                ("token", Maybe(&Object(&[("id", Need(&TEXT))]))),
                ("application_credential", Maybe(&APPLICATION_CREDENTIAL)),
            ],
            &Any,
        )),
    ),
    ("scope", Maybe(&SCOPE)),
]);

const DOMAIN: Type = Open(
    &[
        ("name", Need(&SHORT_NAME)),
        ("description", WORDS),
        ("enabled", ENABLED),
        ("options", OPTIONS),
        // There are none.
        ("tags", Maybe(&List(&TEXT, 0, 0))),
    ],
    &Any,
);

const PROJECT: Type = Open(
    &[
        ("name", Need(&SHORT_NAME)),
        ("description", WORDS),
        ("enabled", ENABLED),
        ("domain_id", WORDS),
        ("parent_id", WORDS),
        ("is_domain", Maybe(&Flag)),
        ("tags", Maybe(&TAGS)),
        ("options", OPTIONS),
    ],
    &Any,
);

const USER: Type = Open(
    &[
        ("name", Need(&NAME)),
        ("password", WORDS),
        ("enabled", ENABLED),
        ("domain_id", WORDS),
        ("default_project_id", WORDS),
        ("options", OPTIONS),
    ],
    &Any,
);
const PASSWORDS: Type = Object(&[("original_password", Need(&TEXT)), ("password", Need(&TEXT))]);

const GROUP: Type = Open(&[("name", Need(&NAME)), ("description", WORDS), ("domain_id", WORDS)], &Any);

const ROLE: Type = Open(
    &[("name", Need(&NAME)), ("description", WORDS), ("domain_id", New(&WORDS)), ("options", OPTIONS)],
    &Any,
);

const APPLICATION_CREDENTIALS: Type = Object(&[
    ("name", Need(&NAME)),
    ("secret", WORDS),
    ("description", WORDS),
    ("expires_at", WORDS),
    ("project_id", WORDS),
    ("roles", Maybe(&List(&REFERENCE, 0, 1000))),
    ("unrestricted", Maybe(&Flag)),
    ("access_rules", Maybe(&List(&ACCESS_RULE, 0, 100))),
]);
const ACCESS_RULE: Type = Either(&[
    Object(&[("id", Need(&TEXT))]),
    Object(&[
        ("service", Need(&Text(1, 255))),
        ("method", Need(&Word(&["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]))),
        ("path", Need(&Text(0, 128))),
    ]),
]);

const TRUST: Type = Object(&[
    ("trustor_user_id", Need(&TEXT)),
    ("trustee_user_id", Need(&TEXT)),
    ("project_id", Need(&TEXT)),
    ("impersonation", Need(&Flag)),
    ("roles", Maybe(&List(&REFERENCE, 0, 1000))),
    ("expires_at", WORDS),
    ("remaining_uses", Maybe(&Number(1, i32::MAX as i64))),
    ("allow_redelegation", ENABLED),
    ("redelegation_count", Maybe(&Number(0, i32::MAX as i64))),
    ("redelegated_trust_id", WORDS),
]);

const CREDENTIAL: Type =
    Open(&[("type", Need(&TEXT)), ("blob", Need(&TEXT)), ("user_id", WORDS), ("project_id", WORDS)], &Any);

const SIGNED: Type = Open(
    &[
        ("access", Need(&TEXT)),
        ("signature", Need(&TEXT)),
        ("host", TEXT),
        ("verb", TEXT),
        ("path", TEXT),
        ("params", Map(&TEXT)),
        ("headers", Map(&TEXT)),
        ("body_hash", TEXT),
    ],
    &Any,
);

const REGION: Type = Open(&[("id", New(&WORDS)), ("description", WORDS), ("parent_region_id", WORDS)], &Any);

const SERVICE: Type =
    Open(&[("type", Need(&NAME)), ("name", WORDS), ("description", WORDS), ("enabled", ENABLED)], &Any);

const INTERFACE: Type = Word(&["public", "internal", "admin"]);
const ENDPOINT: Type = Open(
    &[
        ("service_id", Need(&TEXT)),
        ("interface", Need(&INTERFACE)),
        ("url", Need(&Text(1, 2048))),
        ("region_id", WORDS),
        ("region", WORDS),
        ("enabled", ENABLED),
    ],
    &Any,
);

const ENDPOINT_GROUP: Type = Object(&[
    ("name", Need(&NAME)),
    ("description", WORDS),
    (
        "filters",
        Need(&Maybe(&Object(&[("service_id", TEXT), ("region_id", WORDS), ("interface", INTERFACE)]))),
    ),
]);

/// -1 is without limit.
const AMOUNT: Type = Number(-1, i32::MAX as i64);
const REGISTERED_LIMIT: Type = Object(&[
    ("service_id", Need(&TEXT)),
    ("region_id", WORDS),
    ("resource_name", Need(&NAME)),
    ("default_limit", Need(&AMOUNT)),
    ("description", WORDS),
]);
const LIMIT: Type = Object(&[
    ("service_id", New(&Need(&TEXT))),
    ("region_id", New(&WORDS)),
    ("resource_name", New(&Need(&NAME))),
    ("project_id", New(&WORDS)),
    ("domain_id", New(&WORDS)),
    ("resource_limit", Need(&AMOUNT)),
    ("description", WORDS),
]);

/// Below `/identity`.
pub(super) const BODIES: &[Row] = &[
    ("POST", "/v3/auth/tokens", Object(&[("auth", Need(&AUTH))])),
    ("POST", "/v3/domains", Object(&[("domain", Need(&DOMAIN))])),
    ("PATCH", "/v3/domains/{id}", Object(&[("domain", Need(&Partly(&DOMAIN)))])),
    ("POST", "/v3/projects", Object(&[("project", Need(&PROJECT))])),
    ("PATCH", "/v3/projects/{id}", Object(&[("project", Need(&Partly(&PROJECT)))])),
    ("PUT", "/v3/projects/{id}/tags", Object(&[("tags", Need(&TAGS))])),
    ("POST", "/v3/users", Object(&[("user", Need(&USER))])),
    ("PATCH", "/v3/users/{user}", Object(&[("user", Need(&Partly(&USER)))])),
    ("POST", "/v3/users/{user}/password", Object(&[("user", Need(&PASSWORDS))])),
    ("POST", "/v3/groups", Object(&[("group", Need(&GROUP))])),
    ("PATCH", "/v3/groups/{id}", Object(&[("group", Need(&Partly(&GROUP)))])),
    ("POST", "/v3/roles", Object(&[("role", Need(&ROLE))])),
    ("PATCH", "/v3/roles/{id}", Object(&[("role", Need(&Partly(&ROLE)))])),
    (
        "POST",
        "/v3/users/{user}/application_credentials",
        Object(&[("application_credential", Need(&APPLICATION_CREDENTIALS))]),
    ),
    ("POST", "/v3/users/{user}/credentials/OS-EC2", Object(&[("tenant_id", Need(&TEXT))])),
    (
        "POST",
        "/v3/ec2tokens",
        Either(&[
            Object(&[("ec2Credentials", Need(&SIGNED))]),
            Object(&[("credentials", Need(&SIGNED)), ("auth", Any)]),
        ]),
    ),
    ("POST", "/v3/OS-EP-FILTER/endpoint_groups", Object(&[("endpoint_group", Need(&ENDPOINT_GROUP))])),
    (
        "PATCH",
        "/v3/OS-EP-FILTER/endpoint_groups/{id}",
        Object(&[("endpoint_group", Need(&Partly(&ENDPOINT_GROUP)))]),
    ),
    ("POST", "/v3/OS-TRUST/trusts", Object(&[("trust", Need(&TRUST))])),
    ("POST", "/v3/credentials", Object(&[("credential", Need(&CREDENTIAL))])),
    ("PATCH", "/v3/credentials/{id}", Object(&[("credential", Need(&Partly(&CREDENTIAL)))])),
    (
        "POST",
        "/v3/registered_limits",
        Object(&[("registered_limits", Need(&List(&REGISTERED_LIMIT, 1, 1000)))]),
    ),
    (
        "PATCH",
        "/v3/registered_limits/{id}",
        Object(&[("registered_limit", Need(&Partly(&REGISTERED_LIMIT)))]),
    ),
    ("POST", "/v3/limits", Object(&[("limits", Need(&List(&LIMIT, 1, 1000)))])),
    ("PATCH", "/v3/limits/{id}", Object(&[("limit", Need(&Partly(&LIMIT)))])),
    ("POST", "/v3/regions", Object(&[("region", Need(&REGION))])),
    ("PUT", "/v3/regions/{id}", Object(&[("region", Need(&REGION))])),
    ("PATCH", "/v3/regions/{id}", Object(&[("region", Need(&Partly(&REGION)))])),
    ("POST", "/v3/services", Object(&[("service", Need(&SERVICE))])),
    ("PATCH", "/v3/services/{id}", Object(&[("service", Need(&Partly(&SERVICE)))])),
    ("POST", "/v3/endpoints", Object(&[("endpoint", Need(&ENDPOINT))])),
    ("PATCH", "/v3/endpoints/{id}", Object(&[("endpoint", Need(&Partly(&ENDPOINT)))])),
];
