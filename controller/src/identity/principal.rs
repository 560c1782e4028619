//! Who a token speaks for, as the database says now.

use crate::db::Conn;
use serde_json::{Value, json};

use super::{
    tokens::{Claims, Scope},
    trusts::{self, TrustRow},
};
use crate::{
    db,
    http::context::{Ctx, Delegation},
};

/// Id of the system as a target of grants.
pub const SYSTEM: &str = "all";

/// A name with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
}

impl Named {
    pub(super) fn json(&self) -> Value {
        json!({"id": self.id, "name": self.name})
    }
}

/// What the principal can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nothing.
    Unscoped,
    /// A project, and its domain.
    Project(Named, Named),
    /// A domain.
    Domain(Named),
    /// The whole cloud.
    System,
}

/// What an application credential's token may be used for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restriction {
    /// The credential's id.
    pub id: String,
    /// May be used to make and delete application credentials.
    pub unrestricted: bool,
    /// When the credential ends, µs since 1970.
    pub expires_us: Option<i64>,
    /// The only requests that may be made, if not all.
    pub rules: Option<Vec<AccessRule>>,
}

/// A kind of request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRule {
    /// Id.
    pub id: String,
    /// Service's type, as in the catalog.
    pub service: String,
    /// HTTP method.
    pub method: String,
    /// Path with `*` or `{name}` for one segment and `**` for any number.
    pub path: String,
}

/// Claims of which all was found true.
#[derive(Debug, Clone)]
pub struct Principal {
    /// The token's claims.
    pub claims: Claims,
    /// User.
    pub user: Named,
    /// User's domain.
    pub user_domain: Named,
    /// Target.
    pub target: Target,
    /// Roles on the target with those that they imply, ordered by name.
    pub roles: Vec<Named>,
    /// `identity_version` when all this was found.
    pub version: i64,
    /// Of the application credential, if it was had with one.
    pub restriction: Option<Restriction>,
    /// The trust that it was had with.
    pub trust: Option<TrustRow>,
}

impl Principal {
    /// For handlers (without the request id).
    pub fn into_ctx(self) -> Ctx {
        let system = self.target == Target::System;
        let credential = self.restriction.map(|restriction| Delegation::ApplicationCredential {
            id: restriction.id,
            unrestricted: restriction.unrestricted,
        });
        let delegation = self.trust.map(|trust| Delegation::Trust(trust.id().to_owned())).or(credential);
        let (project, project_domain, domain) = match self.target {
            Target::Unscoped | Target::System => (None, None, None),
            Target::Project(project, domain) => (Some(project), Some(domain), None),
            Target::Domain(domain) => (None, None, Some(domain)),
        };
        let (project_id, project_name) = project.map(|p| (p.id, p.name)).unzip();
        Ctx {
            user_id: self.user.id,
            user_name: self.user.name,
            user_domain_id: self.user_domain.id,
            project_id,
            project_name,
            project_domain_id: project_domain.map(|d| d.id),
            domain_id: domain.map(|d| d.id),
            is_admin: self.roles.iter().any(|role| role.name == "admin"),
            roles: self.roles.into_iter().map(|role| role.name).collect(),
            audit_ids: self.claims.audit_ids,
            expires_at_us: self.claims.expires_us,
            request_id: String::new(),
            system,
            delegation,
        }
    }

    /// Keystone's `token` object, without the catalog.
    pub fn token_json(&self) -> Value {
        let mut token = json!({
            "methods": self.claims.methods,
            "user": {
                "id": self.user.id,
                "name": self.user.name,
                "domain": self.user_domain.json(),
                "password_expires_at": null,
            },
            "audit_ids": self.claims.audit_ids,
            "issued_at": db::rfc3339_us(self.claims.issued_us),
            "expires_at": db::rfc3339_us(self.claims.expires_us),
        });
        match &self.target {
            Target::Unscoped => return token,
            Target::Project(project, domain) => {
                token["is_domain"] = json!(false);
                token["project"] = json!({"id": project.id, "name": project.name, "domain": domain.json()});
            }
            Target::Domain(domain) => token["domain"] = domain.json(),
            Target::System => token["system"] = json!({"all": true}),
        }
        if let Some(restriction) = &self.restriction {
            let mut credential = json!({"id": restriction.id, "restricted": !restriction.unrestricted});
            if let Some(rules) = &restriction.rules {
                credential["access_rules"] = rules.iter().map(AccessRule::json).collect();
            }
            token["application_credential"] = credential;
        }
        if let Some(trust) = &self.trust {
            token["OS-TRUST:trust"] = trust.token_json();
        }
        token["roles"] = self.roles.iter().map(Named::json).collect();
        token
    }
}

/// Checks all claims; `None` if one no longer holds.
///
/// # Errors
/// Of the database.
pub async fn load(conn: &mut Conn, claims: Claims, version: i64) -> Result<Option<Principal>, sqlx::Error> {
    let Some((mut user, mut user_domain)) = load_user(conn, &claims.user_id, &claims).await? else {
        return Ok(None);
    };
    let target = match &claims.scope {
        Scope::Unscoped => Some(Target::Unscoped),
        Scope::Project(id) => load_project(conn, id).await?,
        Scope::Domain(id) => load_domain(conn, id).await?,
        Scope::System => Some(Target::System),
    };
    let Some(target) = target else { return Ok(None) };
    let trusted = match &claims.trust {
        Some(id) => match trusts::entrusted(conn, id, &claims).await? {
            None => return Ok(None),
            trusted => trusted,
        },
        None => None,
    };
    let mut roles = match &claims.scope {
        _ if trusted.is_some() => Vec::new(),
        Scope::Unscoped => Vec::new(),
        Scope::Project(id) => effective_roles(conn, &claims.user_id, "project", id).await?,
        Scope::Domain(id) => effective_roles(conn, &claims.user_id, "domain", id).await?,
        Scope::System => effective_roles(conn, &claims.user_id, "system", SYSTEM).await?,
    };
    let mut restriction = None;
    if let Some(id) = &claims.application_credential {
        let Some((found, granted)) = load_restriction(conn, id, &claims.user_id).await? else {
            return Ok(None);
        };
        // Never more than the user still has.
        roles.retain(|role| granted.contains(&role.id));
        restriction = Some(found);
    }
    let trust = trusted.map(|trusted| {
        roles = trusted.roles;
        (user, user_domain) = trusted.user.unwrap_or((user.clone(), user_domain.clone()));
        trusted.trust
    });
    if roles.is_empty() && target != Target::Unscoped {
        return Ok(None);
    }
    Ok(Some(Principal { claims, user, user_domain, target, roles, version, restriction, trust }))
}

/// The credential, and the ids of the roles that it gives with those that they imply; `None` when it is over or gone.
async fn load_restriction(
    conn: &mut Conn,
    id: &str,
    user_id: &str,
) -> Result<Option<(Restriction, Vec<String>)>, sqlx::Error> {
    let row: Option<(bool, Option<i64>)> = sqlx::query_as(
        "SELECT unrestricted, expires_us FROM application_credentials WHERE id = $1 AND user_id = $2",
    )
    .bind(id)
    .bind(user_id)
    .fetch_optional(&mut *conn)
    .await?;
    let Some((unrestricted, expires_us)) = row else { return Ok(None) };
    if expires_us.is_some_and(|end| end <= db::now_us()) {
        return Ok(None);
    }
    let roles: Vec<String> = sqlx::query_scalar(
        "SELECT role_id FROM application_credential_roles WHERE credential_id = $1
         UNION SELECT i.implied_role_id FROM application_credential_roles r
         JOIN role_implications i ON i.prior_role_id = r.role_id WHERE r.credential_id = $1",
    )
    .bind(id)
    .fetch_all(&mut *conn)
    .await?;
    let rules = access_rules(conn, id).await?;
    let rules = (!rules.is_empty()).then_some(rules);
    Ok(Some((Restriction { id: id.to_owned(), unrestricted, expires_us, rules }, roles)))
}

/// The access rules of an application credential.
///
/// # Errors
/// Of the database.
pub async fn access_rules(conn: &mut Conn, credential: &str) -> Result<Vec<AccessRule>, sqlx::Error> {
    let rows: Vec<(String, String, String, String)> = sqlx::query_as(
        "SELECT r.id, r.service, r.method, r.path FROM access_rules r
         JOIN application_credential_rules c ON c.rule_id = r.id WHERE c.credential_id = $1 ORDER BY r.id",
    )
    .bind(credential)
    .fetch_all(conn)
    .await?;
    let rule = |(id, service, method, path)| AccessRule { id, service, method, path };
    Ok(rows.into_iter().map(rule).collect())
}

impl AccessRule {
    /// As Keystone shows it.
    pub fn json(&self) -> Value {
        json!({"id": self.id, "service": self.service, "method": self.method, "path": self.path})
    }

    /// Whether a request to a service (the path is that below the service's own) is of this kind.
    pub fn covers(&self, service: &str, method: &str, path: &str) -> bool {
        let same =
            self.service == service && (self.method == method || self.method == "GET" && method == "HEAD");
        let segments =
            |text: &str| -> Vec<String> { text.trim_matches('/').split('/').map(str::to_owned).collect() };
        same && path_fits(&segments(&self.path), &segments(path))
    }
}

fn path_fits(pattern: &[String], path: &[String]) -> bool {
    // Which patterns' beginnings fit the path so far: linear in both, whatever the pattern.
    let mut fits = vec![false; pattern.len() + 1];
    fits[0] = true;
    let skip = |fits: &mut Vec<bool>| {
        for (index, part) in pattern.iter().enumerate() {
            if part == "**" && fits[index] {
                fits[index + 1] = true;
            }
        }
    };
    skip(&mut fits);
    for segment in path {
        let mut next = vec![false; pattern.len() + 1];
        for (index, part) in pattern.iter().enumerate() {
            match part.as_str() {
                "**" => next[index] |= fits[index],
                "*" => next[index + 1] |= fits[index],
                part if part.starts_with('{') && part.ends_with('}') => next[index + 1] |= fits[index],
                part => next[index + 1] |= fits[index] && part == segment,
            }
            if part == "**" {
                next[index + 1] |= fits[index];
            }
        }
        skip(&mut next);
        fits = next;
    }
    fits[pattern.len()]
}

/// A user and its domain, if both are enabled and the token isn't older than what ended all of the user's.
///
/// # Errors
/// Of the database.
pub(super) async fn load_user(
    conn: &mut Conn,
    user_id: &str,
    claims: &Claims,
) -> Result<Option<(Named, Named)>, sqlx::Error> {
    let row: Option<(String, String, String, i64, bool)> = sqlx::query_as(
        "SELECT u.name, d.id, d.name, u.tokens_valid_from_us,
                EXISTS (SELECT 1 FROM revoked_tokens r WHERE r.audit_id = $2)
         FROM users u JOIN domains d ON d.id = u.domain_id
         WHERE u.id = $1 AND u.enabled AND d.enabled",
    )
    .bind(user_id)
    .bind(claims.audit_id())
    .fetch_optional(conn)
    .await?;
    Ok(row.filter(|(_, _, _, valid_from_us, revoked)| !revoked && claims.issued_us >= *valid_from_us).map(
        |(name, domain_id, domain_name, _, _)| {
            (Named { id: user_id.to_owned(), name }, Named { id: domain_id, name: domain_name })
        },
    ))
}

async fn load_project(conn: &mut Conn, id: &str) -> Result<Option<Target>, sqlx::Error> {
    let row: Option<(String, String, String, String)> = sqlx::query_as(
        "SELECT p.id, p.name, d.id, d.name FROM projects p JOIN domains d ON d.id = p.domain_id
         WHERE p.id = $1 AND p.enabled AND d.enabled",
    )
    .bind(id)
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|(id, name, domain_id, domain_name)| {
        Target::Project(Named { id, name }, Named { id: domain_id, name: domain_name })
    }))
}

async fn load_domain(conn: &mut Conn, id: &str) -> Result<Option<Target>, sqlx::Error> {
    let row: Option<(String, String)> =
        sqlx::query_as("SELECT id, name FROM domains WHERE id = $1 AND enabled")
            .bind(id)
            .fetch_optional(conn)
            .await?;
    Ok(row.map(|(id, name)| Target::Domain(Named { id, name })))
}

/// The roles of a user on a project or domain, with the implied ones.
///
/// # Errors
/// Of the database.
pub async fn effective_roles(
    conn: &mut Conn,
    user_id: &str,
    target_kind: &str,
    target_id: &str,
) -> Result<Vec<Named>, sqlx::Error> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "SELECT r.id, r.name FROM roles r WHERE r.id IN (
             SELECT e.role_id FROM effective_roles e
             WHERE e.user_id = $1 AND e.target_kind = $2 AND e.target_id = $3)
         ORDER BY r.name",
    )
    .bind(user_id)
    .bind(target_kind)
    .bind(target_id)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|(id, name)| Named { id, name }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_rules_cover_what_they_say_and_nothing_else() {
        let rule = |path: &str| AccessRule {
            id: String::new(),
            service: "compute".into(),
            method: "GET".into(),
            path: path.into(),
        };
        let covers = |pattern: &str, path: &str| rule(pattern).covers("compute", "GET", path);
        assert!(covers("/v2.1/servers", "/v2.1/servers") && covers("/v2.1/servers", "/v2.1/servers/"));
        assert!(!covers("/v2.1/servers", "/v2.1/servers/x"));
        assert!(covers("/v2.1/servers/{id}", "/v2.1/servers/x") && covers("/v2.1/*/x", "/v2.1/servers/x"));
        assert!(!covers("/v2.1/*", "/v2.1/servers/x"));
        assert!(covers("/v2.1/**", "/v2.1/servers/x") && covers("**", "/v2.1") && covers("/**/x", "/a/b/x"));
        assert!(covers("/v2.1/**/x", "/v2.1/x"));
        assert!(!rule("**").covers("image", "GET", "/v2") && !rule("**").covers("compute", "POST", "/v2"));
        assert!(rule("**").covers("compute", "HEAD", "/v2"));
    }
}
