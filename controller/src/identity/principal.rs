//! Who a token speaks for, as the database says now.

use crate::db::Conn;
use serde_json::{Value, json};

use super::tokens::{Claims, Scope};
use crate::{db, http::context::Ctx};

/// A name with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Id.
    pub id: String,
    /// Name.
    pub name: String,
}

impl Named {
    fn json(&self) -> Value {
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
}

impl Principal {
    /// For handlers (without the request id).
    pub fn into_ctx(self) -> Ctx {
        let (project, project_domain, domain) = match self.target {
            Target::Unscoped => (None, None, None),
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
        }
        token["roles"] = self.roles.iter().map(Named::json).collect();
        token
    }
}

/// Checks all claims; `None` if one no longer holds.
///
/// # Errors
/// Of the database.
pub async fn load(conn: &mut Conn, claims: Claims) -> Result<Option<Principal>, sqlx::Error> {
    let Some((user, user_domain)) = load_user(conn, &claims).await? else { return Ok(None) };
    let target = match &claims.scope {
        Scope::Unscoped => Some(Target::Unscoped),
        Scope::Project(id) => load_project(conn, id).await?,
        Scope::Domain(id) => load_domain(conn, id).await?,
    };
    let Some(target) = target else { return Ok(None) };
    let roles = match &claims.scope {
        Scope::Unscoped => Vec::new(),
        Scope::Project(id) => effective_roles(conn, &claims.user_id, "project", id).await?,
        Scope::Domain(id) => effective_roles(conn, &claims.user_id, "domain", id).await?,
    };
    if roles.is_empty() && target != Target::Unscoped {
        return Ok(None);
    }
    Ok(Some(Principal { claims, user, user_domain, target, roles }))
}

async fn load_user(conn: &mut Conn, claims: &Claims) -> Result<Option<(Named, Named)>, sqlx::Error> {
    let row: Option<(String, String, String, i64, bool)> = sqlx::query_as(
        "SELECT u.name, d.id, d.name, u.tokens_valid_from_us,
                EXISTS (SELECT 1 FROM revoked_tokens r WHERE r.audit_id = $2)
         FROM users u JOIN domains d ON d.id = u.domain_id
         WHERE u.id = $1 AND u.enabled AND d.enabled",
    )
    .bind(&claims.user_id)
    .bind(claims.audit_id())
    .fetch_optional(conn)
    .await?;
    Ok(row.filter(|(_, _, _, valid_from_us, revoked)| !revoked && claims.issued_us >= *valid_from_us).map(
        |(name, domain_id, domain_name, _, _)| {
            (Named { id: claims.user_id.clone(), name }, Named { id: domain_id, name: domain_name })
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
             SELECT a.role_id FROM role_assignments a
             WHERE a.user_id = $1 AND a.target_kind = $2 AND a.target_id = $3
             UNION
             SELECT i.implied_role_id FROM role_assignments a
             JOIN role_implications i ON i.prior_role_id = a.role_id
             WHERE a.user_id = $1 AND a.target_kind = $2 AND a.target_id = $3)
         ORDER BY r.name",
    )
    .bind(user_id)
    .bind(target_kind)
    .bind(target_id)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|(id, name)| Named { id, name }).collect())
}
