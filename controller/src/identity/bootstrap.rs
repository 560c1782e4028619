//! What must exist before the first log-in: the default domain, the roles, and the administrator in a project of its own.

use crate::db::Conn;
use serde::Serialize;

use super::{assignments, begin, domains::DEFAULT_DOMAIN, new_id, principal::SYSTEM, roles};
use crate::{app::App, compute, config::REGION, db, http::error::ApiError};

/// The built-in roles; of the first four each implies those after it.
pub const ROLES: [&str; 5] = ["admin", "manager", "member", "reader", "service"];
/// How many of [`ROLES`] are in that chain.
const CHAIN: usize = 4;
const ADMIN: &str = "admin";
/// Characters of generated passwords: without those that look alike.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// 24 characters of 5 bits: 120 bits.
const PASSWORD_CHARS: usize = 24;

/// Credentials, as `mote-controller bootstrap` prints them.
#[derive(Debug, Clone, Serialize)]
pub struct Credentials {
    /// For `OS_AUTH_URL`.
    pub auth_url: String,
    /// User's name.
    pub username: String,
    /// `None`: the user was there already and keeps the password.
    pub password: Option<String>,
    /// Domain of the user.
    pub user_domain_name: String,
    /// Project's name.
    pub project_name: String,
    /// Project's id.
    pub project_id: String,
    /// Domain of the project.
    pub project_domain_name: String,
    /// Region.
    pub region_name: String,
}

/// Makes what is missing; what is there stays as it is, also the password, unless `reset_password`.
///
/// # Errors
/// Of the database, or 400 for an impossible password.
pub async fn bootstrap(
    app: &App,
    password: Option<String>,
    reset_password: bool,
) -> Result<Credentials, ApiError> {
    let password = match password {
        Some(password) => password,
        None => random_password()?,
    };
    let hash = app.identity.passwords.hash(&password).await?;
    let mut tx = begin(app).await?;
    insert_domain_and_roles(&mut tx).await?;
    let project_id = admin_project(&mut tx).await?;
    let (user_id, password_set) = admin_user(&mut tx, &project_id, &hash, reset_password).await?;
    let role: String =
        sqlx::query_scalar("SELECT id FROM roles WHERE name = $1").bind(ADMIN).fetch_one(&mut *tx).await?;
    assignments::assign(&mut tx, &user_id, &role, "project", &project_id).await?;
    assignments::assign(&mut tx, &user_id, &role, "domain", DEFAULT_DOMAIN).await?;
    assignments::assign(&mut tx, &user_id, &role, "system", SYSTEM).await?;
    compute::defaults::bootstrap(&mut tx, &project_id).await?;
    tx.commit().await?;
    Ok(Credentials {
        auth_url: format!("{}/identity/v3", app.config.public_url),
        username: ADMIN.into(),
        password: password_set.then_some(password),
        user_domain_name: "Default".into(),
        project_name: ADMIN.into(),
        project_id,
        project_domain_name: "Default".into(),
        region_name: REGION.into(),
    })
}

async fn insert_domain_and_roles(conn: &mut Conn) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO domains (id, name, description) VALUES ($1, 'Default', 'The default domain') ON CONFLICT DO NOTHING")
        .bind(DEFAULT_DOMAIN)
        .execute(&mut *conn)
        .await?;
    for role in ROLES {
        sqlx::query("INSERT INTO roles (id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING")
            .bind(new_id())
            .bind(role)
            .execute(&mut *conn)
            .await?;
    }
    for pair in ROLES[..CHAIN].windows(2) {
        sqlx::query(
            "INSERT INTO role_inferences (prior_role_id, implied_role_id)
             SELECT p.id, i.id FROM roles p, roles i WHERE p.name = $1 AND i.name = $2
             ON CONFLICT DO NOTHING",
        )
        .bind(pair[0])
        .bind(pair[1])
        .execute(&mut *conn)
        .await?;
    }
    roles::close(conn).await?;
    Ok(())
}

async fn admin_project(conn: &mut Conn) -> Result<String, sqlx::Error> {
    sqlx::query(
        "INSERT INTO projects (id, domain_id, name, description)
         VALUES ($1, $2, $3, 'Project of the cloud''s administrator') ON CONFLICT DO NOTHING",
    )
    .bind(new_id())
    .bind(DEFAULT_DOMAIN)
    .bind(ADMIN)
    .execute(&mut *conn)
    .await?;
    sqlx::query_scalar("SELECT id FROM projects WHERE domain_id = $1 AND name = $2")
        .bind(DEFAULT_DOMAIN)
        .bind(ADMIN)
        .fetch_one(conn)
        .await
}

/// The user's id, and whether the password was set.
async fn admin_user(
    conn: &mut Conn,
    project_id: &str,
    hash: &str,
    reset_password: bool,
) -> Result<(String, bool), sqlx::Error> {
    let now = db::now_us();
    let made = sqlx::query(
        "INSERT INTO users (id, domain_id, name, default_project_id, password_hash, password_changed_us)
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
    )
    .bind(new_id())
    .bind(DEFAULT_DOMAIN)
    .bind(ADMIN)
    .bind(project_id)
    .bind(hash)
    .bind(now)
    .execute(&mut *conn)
    .await?;
    let made = made.rows_affected() > 0;
    if reset_password && !made {
        // The way back in also undoes a lock-out.
        sqlx::query(
            "UPDATE users SET password_hash = $3, password_changed_us = $4, tokens_valid_from_us = $4, enabled = TRUE,
                 failed_logins = 0
             WHERE domain_id = $1 AND name = $2",
        )
        .bind(DEFAULT_DOMAIN)
        .bind(ADMIN)
        .bind(hash)
        .bind(now)
        .execute(&mut *conn)
        .await?;
    }
    let id = sqlx::query_scalar("SELECT id FROM users WHERE domain_id = $1 AND name = $2")
        .bind(DEFAULT_DOMAIN)
        .bind(ADMIN)
        .fetch_one(conn)
        .await?;
    Ok((id, made || reset_password))
}

fn random_password() -> Result<String, ApiError> {
    let mut bytes = [0; PASSWORD_CHARS];
    getrandom::fill(&mut bytes).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}
