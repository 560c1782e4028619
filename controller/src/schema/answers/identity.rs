//! Answers of identity.

use super::{
    INTEGER, LINKS, NONE, PAGE, Row, SELF, TAGS, TEXT,
    Type::{self, Any, Each, Either, Flag, Map, Maybe, Null, Shown, ShownWith},
};

const ACCESS_RULE: Type = Shown(&[("id", TEXT), ("method", TEXT), ("path", TEXT), ("service", TEXT)]);
const APPLICATION_CREDENTIAL: Type = Shown(&[
    ("access_rules", Each(&Shown(&[("id", TEXT), ("method", TEXT), ("path", TEXT), ("service", TEXT)]))),
    ("description", TEXT),
    ("expires_at", Maybe(&TEXT)),
    ("id", TEXT),
    ("links", SELF),
    ("name", TEXT),
    ("project_id", TEXT),
    ("roles", Each(&Shown(&[("domain_id", Maybe(&TEXT)), ("id", TEXT), ("name", TEXT)]))),
    ("secret", TEXT),
    ("system", Any),
    ("unrestricted", Flag),
    ("user_id", TEXT),
]);
const CREDENTIAL: Type = Shown(&[
    ("access", TEXT),
    ("blob", TEXT),
    ("id", TEXT),
    ("links", SELF),
    ("project_id", Maybe(&TEXT)),
    ("secret", TEXT),
    ("tenant_id", TEXT),
    ("trust_id", Any),
    ("type", TEXT),
    ("user_id", TEXT),
]);
const DOMAIN: Type = Shown(&[
    ("description", TEXT),
    ("enabled", Flag),
    ("id", TEXT),
    ("links", SELF),
    ("name", TEXT),
    ("options", Shown(&[])),
    ("tags", Each(&Any)),
]);
const ENDPOINT: Type = Shown(&[
    ("enabled", Flag),
    ("id", TEXT),
    ("interface", TEXT),
    ("links", SELF),
    ("region", Maybe(&TEXT)),
    ("region_id", Maybe(&TEXT)),
    ("service_id", TEXT),
    ("url", TEXT),
]);
const ENDPOINT_GROUP: Type = Shown(&[
    ("description", Maybe(&TEXT)),
    ("filters", Shown(&[("interface", TEXT), ("region_id", Maybe(&TEXT)), ("service_id", TEXT)])),
    ("id", TEXT),
    ("links", SELF),
    ("name", TEXT),
]);
const ENDPOINT_GROUPS: &[(u16, Type)] =
    &[(200, Shown(&[("endpoint_groups", Each(&ENDPOINT_GROUP)), ("links", PAGE)]))];
const ENDPOINTS: &[(u16, Type)] = &[(200, Shown(&[("endpoints", Each(&ENDPOINT)), ("links", PAGE)]))];
const PROJECTS: &[(u16, Type)] = &[(200, Shown(&[("links", PAGE), ("projects", Each(&PROJECT))]))];
const GROUP: Type =
    Shown(&[("description", TEXT), ("domain_id", TEXT), ("id", TEXT), ("links", SELF), ("name", TEXT)]);
const LIMIT: Type = Shown(&[
    ("description", Maybe(&TEXT)),
    ("domain_id", Maybe(&TEXT)),
    ("id", TEXT),
    ("links", SELF),
    ("project_id", Maybe(&TEXT)),
    ("region_id", Maybe(&TEXT)),
    ("resource_limit", INTEGER),
    ("resource_name", TEXT),
    ("service_id", TEXT),
]);
const MODEL: Type = Shown(&[("description", TEXT), ("name", TEXT)]);
const PROJECT: Type = ShownWith(
    &[
        ("description", TEXT),
        ("domain_id", TEXT),
        ("enabled", Flag),
        ("id", TEXT),
        ("is_domain", Flag),
        ("links", SELF),
        ("name", TEXT),
        ("options", Shown(&[])),
        ("parent_id", TEXT),
        ("parents", Maybe(&Either(&[Each(&Map(&Any)), Map(&Any)]))),
        ("subtree", Maybe(&Either(&[Each(&Map(&Any)), Map(&Any)]))),
        ("tags", Each(&TEXT)),
    ],
    &Any,
);
const REGION: Type =
    Shown(&[("description", TEXT), ("id", TEXT), ("links", SELF), ("parent_region_id", Maybe(&TEXT))]);
const REGISTERED_LIMIT: Type = Shown(&[
    ("default_limit", INTEGER),
    ("description", Maybe(&TEXT)),
    ("id", TEXT),
    ("links", SELF),
    ("region_id", Maybe(&TEXT)),
    ("resource_name", TEXT),
    ("service_id", TEXT),
]);
const ROLE: Type = Shown(&[
    ("description", TEXT),
    ("domain_id", Maybe(&TEXT)),
    ("id", TEXT),
    ("links", SELF),
    ("name", TEXT),
    ("options", Shown(&[])),
]);
const ROLE_ASSIGNMENT: Type = Shown(&[
    ("group", Shown(&[("domain", Shown(&[("id", TEXT), ("name", TEXT)])), ("id", TEXT), ("name", TEXT)])),
    ("links", Shown(&[("assignment", TEXT)])),
    ("role", Shown(&[("id", TEXT), ("name", TEXT)])),
    (
        "scope",
        Shown(&[
            ("OS-INHERIT:inherited_to", TEXT),
            ("domain", Shown(&[("id", TEXT), ("name", TEXT)])),
            (
                "project",
                Shown(&[("domain", Shown(&[("id", TEXT), ("name", TEXT)])), ("id", TEXT), ("name", TEXT)]),
            ),
            ("system", Shown(&[("all", Flag)])),
        ]),
    ),
    ("user", Shown(&[("domain", Shown(&[("id", TEXT), ("name", TEXT)])), ("id", TEXT), ("name", TEXT)])),
]);
const ROLE_INFERENCE: Type = Shown(&[
    (
        "implies",
        Either(&[
            Each(&Shown(&[("id", TEXT), ("links", SELF), ("name", TEXT)])),
            Shown(&[("id", TEXT), ("links", SELF), ("name", TEXT)]),
        ]),
    ),
    ("prior_role", Shown(&[("id", TEXT), ("links", SELF), ("name", TEXT)])),
]);
const SERVICE: Type = Shown(&[
    ("description", TEXT),
    ("enabled", Flag),
    ("id", TEXT),
    ("links", SELF),
    ("name", TEXT),
    ("type", TEXT),
]);
const SYSTEM: Type = Shown(&[("all", Flag)]);
const TRUST: Type = Shown(&[
    ("deleted_at", Maybe(&TEXT)),
    ("expires_at", Maybe(&TEXT)),
    ("id", TEXT),
    ("impersonation", Flag),
    ("links", SELF),
    ("project_id", TEXT),
    ("redelegated_trust_id", Maybe(&TEXT)),
    ("redelegation_count", INTEGER),
    ("remaining_uses", Maybe(&INTEGER)),
    ("roles", Each(&ROLE)),
    ("roles_links", PAGE),
    ("trustee_user_id", TEXT),
    ("trustor_user_id", TEXT),
]);
const TOKEN: Type = Shown(&[
    (
        "OS-TRUST:trust",
        Shown(&[
            ("id", TEXT),
            ("impersonation", Flag),
            ("trustee_user", Shown(&[("id", TEXT)])),
            ("trustor_user", Shown(&[("id", TEXT)])),
        ]),
    ),
    (
        "application_credential",
        Shown(&[
            (
                "access_rules",
                Each(&Shown(&[("id", TEXT), ("method", TEXT), ("path", TEXT), ("service", TEXT)])),
            ),
            ("id", TEXT),
            ("restricted", Flag),
        ]),
    ),
    ("audit_ids", Each(&TEXT)),
    (
        "catalog",
        Each(&Shown(&[
            (
                "endpoints",
                Each(&Shown(&[
                    ("id", TEXT),
                    ("interface", TEXT),
                    ("region", Maybe(&TEXT)),
                    ("region_id", Maybe(&TEXT)),
                    ("url", TEXT),
                ])),
            ),
            ("id", TEXT),
            ("name", TEXT),
            ("type", TEXT),
        ])),
    ),
    ("domain", Shown(&[("id", TEXT), ("name", TEXT)])),
    ("expires_at", TEXT),
    ("is_domain", Flag),
    ("issued_at", TEXT),
    ("methods", Each(&TEXT)),
    ("project", Shown(&[("domain", Shown(&[("id", TEXT), ("name", TEXT)])), ("id", TEXT), ("name", TEXT)])),
    ("roles", Each(&Shown(&[("id", TEXT), ("name", TEXT)]))),
    ("system", Shown(&[("all", Flag)])),
    (
        "user",
        Shown(&[
            ("domain", Shown(&[("id", TEXT), ("name", TEXT)])),
            ("id", TEXT),
            ("name", TEXT),
            ("password_expires_at", Any),
        ]),
    ),
]);
const USER: Type = ShownWith(
    &[
        ("default_project_id", Maybe(&TEXT)),
        ("description", TEXT),
        ("domain_id", TEXT),
        ("email", TEXT),
        ("enabled", Flag),
        ("id", TEXT),
        ("links", SELF),
        ("name", TEXT),
        ("options", Shown(&[])),
        ("password_expires_at", Any),
    ],
    &Any,
);

/// Below `/identity`.
pub(super) const ANSWERS: &[Row] = &[
    (
        "GET",
        "",
        &[(
            300,
            Shown(&[(
                "versions",
                Shown(&[(
                    "values",
                    Each(&Shown(&[
                        ("id", TEXT),
                        ("links", LINKS),
                        ("media-types", Each(&Shown(&[("base", TEXT), ("type", TEXT)]))),
                        ("status", TEXT),
                        ("updated", TEXT),
                    ])),
                )]),
            )]),
        )],
    ),
    (
        "GET",
        "/v3",
        &[(
            200,
            Shown(&[(
                "version",
                Shown(&[
                    ("id", TEXT),
                    ("links", LINKS),
                    ("media-types", Each(&Shown(&[("base", TEXT), ("type", TEXT)]))),
                    ("status", TEXT),
                    ("updated", TEXT),
                ]),
            )]),
        )],
    ),
    (
        "GET",
        "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/inherited_to_projects",
        &[(200, Shown(&[("links", PAGE), ("roles", Each(&ROLE))]))],
    ),
    ("DELETE", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", NONE),
    ("GET", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", NONE),
    ("PUT", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", NONE),
    (
        "GET",
        "/v3/auth/catalog",
        &[(
            200,
            Shown(&[
                (
                    "catalog",
                    Each(&Shown(&[
                        (
                            "endpoints",
                            Each(&Shown(&[
                                ("id", TEXT),
                                ("interface", TEXT),
                                ("region", Maybe(&TEXT)),
                                ("region_id", Maybe(&TEXT)),
                                ("url", TEXT),
                            ])),
                        ),
                        ("id", TEXT),
                        ("name", TEXT),
                        ("type", TEXT),
                    ])),
                ),
                ("links", PAGE),
            ]),
        )],
    ),
    ("GET", "/v3/auth/domains", &[(200, Shown(&[("domains", Each(&DOMAIN)), ("links", PAGE)]))]),
    ("GET", "/v3/auth/projects", &[(200, Shown(&[("links", PAGE), ("projects", Each(&PROJECT))]))]),
    ("GET", "/v3/auth/system", &[(200, Shown(&[("links", PAGE), ("system", Each(&SYSTEM))]))]),
    ("GET", "/v3/OS-EP-FILTER/endpoint_groups", ENDPOINT_GROUPS),
    ("POST", "/v3/OS-EP-FILTER/endpoint_groups", &[(201, Shown(&[("endpoint_group", ENDPOINT_GROUP)]))]),
    ("DELETE", "/v3/OS-EP-FILTER/endpoint_groups/{id}", NONE),
    ("GET", "/v3/OS-EP-FILTER/endpoint_groups/{id}", &[(200, Shown(&[("endpoint_group", ENDPOINT_GROUP)]))]),
    (
        "PATCH",
        "/v3/OS-EP-FILTER/endpoint_groups/{id}",
        &[(200, Shown(&[("endpoint_group", ENDPOINT_GROUP)]))],
    ),
    ("GET", "/v3/OS-EP-FILTER/endpoint_groups/{id}/endpoints", ENDPOINTS),
    ("GET", "/v3/OS-EP-FILTER/endpoint_groups/{id}/projects", PROJECTS),
    ("DELETE", "/v3/OS-EP-FILTER/endpoint_groups/{id}/projects/{project}", NONE),
    (
        "GET",
        "/v3/OS-EP-FILTER/endpoint_groups/{id}/projects/{project}",
        &[(
            200,
            Shown(&[(
                "project_endpoint_group",
                Shown(&[("endpoint_group_id", TEXT), ("links", SELF), ("project_id", TEXT)]),
            )]),
        )],
    ),
    ("PUT", "/v3/OS-EP-FILTER/endpoint_groups/{id}/projects/{project}", NONE),
    ("GET", "/v3/OS-EP-FILTER/endpoints/{endpoint}/projects", PROJECTS),
    ("GET", "/v3/OS-EP-FILTER/projects/{project}/endpoint_groups", ENDPOINT_GROUPS),
    ("GET", "/v3/OS-EP-FILTER/projects/{project}/endpoints", ENDPOINTS),
    ("DELETE", "/v3/OS-EP-FILTER/projects/{project}/endpoints/{endpoint}", NONE),
    ("GET", "/v3/OS-EP-FILTER/projects/{project}/endpoints/{endpoint}", NONE),
    ("PUT", "/v3/OS-EP-FILTER/projects/{project}/endpoints/{endpoint}", NONE),
    ("GET", "/v3/OS-TRUST/trusts", &[(200, Shown(&[("links", PAGE), ("trusts", Each(&TRUST))]))]),
    ("POST", "/v3/OS-TRUST/trusts", &[(201, Shown(&[("trust", TRUST)]))]),
    ("DELETE", "/v3/OS-TRUST/trusts/{id}", NONE),
    ("GET", "/v3/OS-TRUST/trusts/{id}", &[(200, Shown(&[("trust", TRUST)]))]),
    ("GET", "/v3/OS-TRUST/trusts/{id}/roles", &[(200, Shown(&[("links", PAGE), ("roles", Each(&ROLE))]))]),
    ("GET", "/v3/OS-TRUST/trusts/{id}/roles/{role}", &[(200, Shown(&[("role", ROLE)]))]),
    ("DELETE", "/v3/auth/tokens", NONE),
    ("GET", "/v3/auth/tokens", &[(200, Shown(&[("token", TOKEN)]))]),
    ("POST", "/v3/auth/tokens", &[(201, Shown(&[("token", TOKEN)]))]),
    ("GET", "/v3/credentials", &[(200, Shown(&[("credentials", Each(&CREDENTIAL)), ("links", PAGE)]))]),
    ("POST", "/v3/credentials", &[(201, Shown(&[("credential", CREDENTIAL)]))]),
    ("DELETE", "/v3/credentials/{id}", NONE),
    ("GET", "/v3/credentials/{id}", &[(200, Shown(&[("credential", CREDENTIAL)]))]),
    ("PATCH", "/v3/credentials/{id}", &[(200, Shown(&[("credential", CREDENTIAL)]))]),
    ("GET", "/v3/domains", &[(200, Shown(&[("domains", Each(&DOMAIN)), ("links", PAGE)]))]),
    ("POST", "/v3/domains", &[(201, Shown(&[("domain", DOMAIN)]))]),
    ("DELETE", "/v3/domains/{id}", NONE),
    ("GET", "/v3/domains/{id}", &[(200, Shown(&[("domain", DOMAIN)]))]),
    ("PATCH", "/v3/domains/{id}", &[(200, Shown(&[("domain", DOMAIN)]))]),
    ("POST", "/v3/ec2tokens", &[(200, Shown(&[("token", TOKEN)]))]),
    ("GET", "/v3/endpoints", &[(200, Shown(&[("endpoints", Each(&ENDPOINT)), ("links", PAGE)]))]),
    ("POST", "/v3/endpoints", &[(201, Shown(&[("endpoint", ENDPOINT)]))]),
    ("DELETE", "/v3/endpoints/{id}", NONE),
    ("GET", "/v3/endpoints/{id}", &[(200, Shown(&[("endpoint", ENDPOINT)]))]),
    ("PATCH", "/v3/endpoints/{id}", &[(200, Shown(&[("endpoint", ENDPOINT)]))]),
    ("GET", "/v3/groups", &[(200, Shown(&[("groups", Each(&GROUP)), ("links", PAGE)]))]),
    ("POST", "/v3/groups", &[(201, Shown(&[("group", GROUP)]))]),
    ("DELETE", "/v3/groups/{id}", NONE),
    ("GET", "/v3/groups/{id}", &[(200, Shown(&[("group", GROUP)]))]),
    ("PATCH", "/v3/groups/{id}", &[(200, Shown(&[("group", GROUP)]))]),
    ("GET", "/v3/groups/{id}/users", &[(200, Shown(&[("links", PAGE), ("users", Each(&USER))]))]),
    ("DELETE", "/v3/groups/{id}/users/{user}", NONE),
    ("GET", "/v3/groups/{id}/users/{user}", NONE),
    ("PUT", "/v3/groups/{id}/users/{user}", NONE),
    ("GET", "/v3/limits", &[(200, Shown(&[("limits", Each(&LIMIT)), ("links", PAGE)]))]),
    ("POST", "/v3/limits", &[(201, Shown(&[("limits", Each(&LIMIT)), ("links", PAGE)]))]),
    ("GET", "/v3/limits/model", &[(200, Shown(&[("model", MODEL)]))]),
    ("DELETE", "/v3/limits/{id}", NONE),
    ("GET", "/v3/limits/{id}", &[(200, Shown(&[("limit", LIMIT)]))]),
    ("PATCH", "/v3/limits/{id}", &[(200, Shown(&[("limit", LIMIT)]))]),
    ("GET", "/v3/projects", &[(200, Shown(&[("links", PAGE), ("projects", Each(&PROJECT))]))]),
    ("POST", "/v3/projects", &[(201, Shown(&[("project", PROJECT)]))]),
    ("DELETE", "/v3/projects/{id}", NONE),
    ("GET", "/v3/projects/{id}", &[(200, Shown(&[("project", PROJECT)]))]),
    ("PATCH", "/v3/projects/{id}", &[(200, Shown(&[("project", PROJECT)]))]),
    ("DELETE", "/v3/projects/{id}/tags", NONE),
    ("GET", "/v3/projects/{id}/tags", TAGS),
    ("PUT", "/v3/projects/{id}/tags", TAGS),
    ("DELETE", "/v3/projects/{id}/tags/{tag}", NONE),
    ("GET", "/v3/projects/{id}/tags/{tag}", NONE),
    ("PUT", "/v3/projects/{id}/tags/{tag}", &[(201, Null)]),
    ("GET", "/v3/regions", &[(200, Shown(&[("links", PAGE), ("regions", Each(&REGION))]))]),
    ("POST", "/v3/regions", &[(201, Shown(&[("region", REGION)]))]),
    ("DELETE", "/v3/regions/{id}", NONE),
    ("GET", "/v3/regions/{id}", &[(200, Shown(&[("region", REGION)]))]),
    ("PATCH", "/v3/regions/{id}", &[(200, Shown(&[("region", REGION)]))]),
    ("PUT", "/v3/regions/{id}", &[(201, Shown(&[("region", REGION)]))]),
    (
        "GET",
        "/v3/registered_limits",
        &[(200, Shown(&[("links", PAGE), ("registered_limits", Each(&REGISTERED_LIMIT))]))],
    ),
    (
        "POST",
        "/v3/registered_limits",
        &[(201, Shown(&[("links", PAGE), ("registered_limits", Each(&REGISTERED_LIMIT))]))],
    ),
    ("DELETE", "/v3/registered_limits/{id}", NONE),
    ("GET", "/v3/registered_limits/{id}", &[(200, Shown(&[("registered_limit", REGISTERED_LIMIT)]))]),
    ("PATCH", "/v3/registered_limits/{id}", &[(200, Shown(&[("registered_limit", REGISTERED_LIMIT)]))]),
    (
        "GET",
        "/v3/role_assignments",
        &[(200, Shown(&[("links", PAGE), ("role_assignments", Each(&ROLE_ASSIGNMENT))]))],
    ),
    (
        "GET",
        "/v3/role_inferences",
        &[(200, Shown(&[("links", PAGE), ("role_inferences", Each(&ROLE_INFERENCE))]))],
    ),
    ("GET", "/v3/roles", &[(200, Shown(&[("links", PAGE), ("roles", Each(&ROLE))]))]),
    ("POST", "/v3/roles", &[(201, Shown(&[("role", ROLE)]))]),
    ("DELETE", "/v3/roles/{id}", NONE),
    ("GET", "/v3/roles/{id}", &[(200, Shown(&[("role", ROLE)]))]),
    ("PATCH", "/v3/roles/{id}", &[(200, Shown(&[("role", ROLE)]))]),
    (
        "GET",
        "/v3/roles/{id}/implies",
        &[(200, Shown(&[("links", SELF), ("role_inference", ROLE_INFERENCE)]))],
    ),
    ("DELETE", "/v3/roles/{id}/implies/{implied}", NONE),
    (
        "GET",
        "/v3/roles/{id}/implies/{implied}",
        &[(200, Shown(&[("links", SELF), ("role_inference", ROLE_INFERENCE)]))],
    ),
    (
        "PUT",
        "/v3/roles/{id}/implies/{implied}",
        &[(201, Shown(&[("links", SELF), ("role_inference", ROLE_INFERENCE)]))],
    ),
    ("GET", "/v3/services", &[(200, Shown(&[("links", PAGE), ("services", Each(&SERVICE))]))]),
    ("POST", "/v3/services", &[(201, Shown(&[("service", SERVICE)]))]),
    ("DELETE", "/v3/services/{id}", NONE),
    ("GET", "/v3/services/{id}", &[(200, Shown(&[("service", SERVICE)]))]),
    ("PATCH", "/v3/services/{id}", &[(200, Shown(&[("service", SERVICE)]))]),
    ("GET", "/v3/system/{actors}/{actor}/roles", &[(200, Shown(&[("links", PAGE), ("roles", Each(&ROLE))]))]),
    ("DELETE", "/v3/system/{actors}/{actor}/roles/{role}", NONE),
    ("GET", "/v3/system/{actors}/{actor}/roles/{role}", NONE),
    ("PUT", "/v3/system/{actors}/{actor}/roles/{role}", NONE),
    ("GET", "/v3/users", &[(200, Shown(&[("links", PAGE), ("users", Each(&USER))]))]),
    ("POST", "/v3/users", &[(201, Shown(&[("user", USER)]))]),
    ("DELETE", "/v3/users/{user}", NONE),
    ("GET", "/v3/users/{user}", &[(200, Shown(&[("user", USER)]))]),
    ("PATCH", "/v3/users/{user}", &[(200, Shown(&[("user", USER)]))]),
    (
        "GET",
        "/v3/users/{user}/access_rules",
        &[(200, Shown(&[("access_rules", Each(&ACCESS_RULE)), ("links", PAGE)]))],
    ),
    ("DELETE", "/v3/users/{user}/access_rules/{id}", NONE),
    ("GET", "/v3/users/{user}/access_rules/{id}", &[(200, Shown(&[("access_rule", ACCESS_RULE)]))]),
    (
        "GET",
        "/v3/users/{user}/application_credentials",
        &[(200, Shown(&[("application_credentials", Each(&APPLICATION_CREDENTIAL)), ("links", PAGE)]))],
    ),
    (
        "POST",
        "/v3/users/{user}/application_credentials",
        &[(201, Shown(&[("application_credential", APPLICATION_CREDENTIAL)]))],
    ),
    ("DELETE", "/v3/users/{user}/application_credentials/{id}", NONE),
    (
        "GET",
        "/v3/users/{user}/application_credentials/{id}",
        &[(200, Shown(&[("application_credential", APPLICATION_CREDENTIAL)]))],
    ),
    (
        "GET",
        "/v3/users/{user}/credentials/OS-EC2",
        &[(200, Shown(&[("credentials", Each(&CREDENTIAL)), ("links", PAGE)]))],
    ),
    ("POST", "/v3/users/{user}/credentials/OS-EC2", &[(201, Shown(&[("credential", CREDENTIAL)]))]),
    ("DELETE", "/v3/users/{user}/credentials/OS-EC2/{id}", NONE),
    ("GET", "/v3/users/{user}/credentials/OS-EC2/{id}", &[(200, Shown(&[("credential", CREDENTIAL)]))]),
    ("GET", "/v3/users/{user}/groups", &[(200, Shown(&[("groups", Each(&GROUP)), ("links", PAGE)]))]),
    ("POST", "/v3/users/{user}/password", NONE),
    ("GET", "/v3/users/{user}/projects", &[(200, Shown(&[("links", PAGE), ("projects", Each(&PROJECT))]))]),
    (
        "GET",
        "/v3/{kinds}/{target}/{actors}/{actor}/roles",
        &[(200, Shown(&[("links", PAGE), ("roles", Each(&ROLE))]))],
    ),
    ("DELETE", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", NONE),
    ("GET", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", NONE),
    ("PUT", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", NONE),
];
