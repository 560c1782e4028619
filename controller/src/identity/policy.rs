//! Who may do what in identity: one table. docs/policy.md shows it, and a test compares the two.
//!
//! [`Ctx`](crate::http::context::Ctx) asks it as soon as a token is known, so that no handler that needs a token can
//! forget to: a route that is not in the table is refused.

use http::Method;

use crate::http::{context::Ctx, error::ApiError};

/// Who may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Everybody, without a token.
    Public,
    /// Whoever has a valid token.
    Token,
    /// Role `admin`.
    Admin,
    /// Role `admin`, or `reader` on the system as a whole.
    Read,
    /// The user of the path, or role `admin`.
    Owner,
    /// The user of the path, or as [`Rule::Read`].
    OwnerRead,
    /// Whoever has a valid token, and the handler looks further, as the text says.
    Further(&'static str),
}

use Rule::{Admin, Further, Owner, OwnerRead, Public, Read, Token};

/// Method, path below `/identity`, who may. `HEAD` is as `GET`.
pub const POLICY: &[(&str, &str, Rule)] = &[
    ("GET", "/", Public),
    ("GET", "/v3", Public),
    ("POST", "/v3/auth/tokens", Public),
    ("GET", "/v3/auth/tokens", Further("one's own token; all tokens with the role admin or service")),
    ("DELETE", "/v3/auth/tokens", Further("one's own token; all tokens with the role admin or service")),
    ("GET", "/v3/auth/projects", Token),
    ("GET", "/v3/auth/domains", Token),
    ("GET", "/v3/auth/system", Token),
    ("GET", "/v3/auth/catalog", Further("tokens with a scope")),
    ("GET", "/v3/domains", Read),
    ("POST", "/v3/domains", Admin),
    ("GET", "/v3/domains/{id}", Further("the domain of the token's user or project; others as read")),
    ("PATCH", "/v3/domains/{id}", Admin),
    ("DELETE", "/v3/domains/{id}", Admin),
    ("GET", "/v3/projects", Read),
    ("POST", "/v3/projects", Admin),
    ("GET", "/v3/projects/{id}", Further("the token's project; others as read")),
    ("PATCH", "/v3/projects/{id}", Admin),
    ("DELETE", "/v3/projects/{id}", Admin),
    ("GET", "/v3/projects/{id}/tags", Further("the token's project; others as read")),
    ("PUT", "/v3/projects/{id}/tags", Admin),
    ("DELETE", "/v3/projects/{id}/tags", Admin),
    ("GET", "/v3/projects/{id}/tags/{tag}", Further("the token's project; others as read")),
    ("PUT", "/v3/projects/{id}/tags/{tag}", Admin),
    ("DELETE", "/v3/projects/{id}/tags/{tag}", Admin),
    ("GET", "/v3/users", Read),
    ("POST", "/v3/users", Admin),
    ("GET", "/v3/users/{user}", OwnerRead),
    ("PATCH", "/v3/users/{user}", Admin),
    ("DELETE", "/v3/users/{user}", Admin),
    ("POST", "/v3/users/{user}/password", Public),
    ("GET", "/v3/users/{user}/projects", OwnerRead),
    ("GET", "/v3/users/{user}/groups", OwnerRead),
    ("GET", "/v3/groups", Read),
    ("POST", "/v3/groups", Admin),
    ("GET", "/v3/groups/{id}", Read),
    ("PATCH", "/v3/groups/{id}", Admin),
    ("DELETE", "/v3/groups/{id}", Admin),
    ("GET", "/v3/groups/{id}/users", Read),
    ("GET", "/v3/groups/{id}/users/{user}", OwnerRead),
    ("PUT", "/v3/groups/{id}/users/{user}", Admin),
    ("DELETE", "/v3/groups/{id}/users/{user}", Admin),
    ("GET", "/v3/roles", Read),
    ("POST", "/v3/roles", Admin),
    ("GET", "/v3/roles/{id}", Read),
    ("PATCH", "/v3/roles/{id}", Admin),
    ("DELETE", "/v3/roles/{id}", Admin),
    ("GET", "/v3/role_inferences", Read),
    ("GET", "/v3/roles/{id}/implies", Read),
    ("GET", "/v3/roles/{id}/implies/{implied}", Read),
    ("PUT", "/v3/roles/{id}/implies/{implied}", Admin),
    ("DELETE", "/v3/roles/{id}/implies/{implied}", Admin),
    ("GET", "/v3/role_assignments", Further("with user.id of oneself; others as read")),
    ("GET", "/v3/{kinds}/{target}/{actors}/{actor}/roles", Read),
    ("GET", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", Read),
    ("PUT", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", Admin),
    ("DELETE", "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}", Admin),
    ("GET", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/inherited_to_projects", Read),
    ("GET", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", Read),
    ("PUT", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", Admin),
    ("DELETE", "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles/{role}/inherited_to_projects", Admin),
    ("GET", "/v3/system/{actors}/{actor}/roles", Read),
    ("GET", "/v3/system/{actors}/{actor}/roles/{role}", Read),
    ("PUT", "/v3/system/{actors}/{actor}/roles/{role}", Admin),
    ("DELETE", "/v3/system/{actors}/{actor}/roles/{role}", Admin),
    ("GET", "/v3/users/{user}/application_credentials", OwnerRead),
    (
        "POST",
        "/v3/users/{user}/application_credentials",
        Further("the user of the path alone, not with a restricted application credential"),
    ),
    ("GET", "/v3/users/{user}/application_credentials/{id}", OwnerRead),
    ("DELETE", "/v3/users/{user}/application_credentials/{id}", Owner),
    ("GET", "/v3/users/{user}/access_rules", OwnerRead),
    ("GET", "/v3/users/{user}/access_rules/{id}", OwnerRead),
    ("DELETE", "/v3/users/{user}/access_rules/{id}", Owner),
    ("GET", "/v3/users/{user}/credentials/OS-EC2", OwnerRead),
    ("POST", "/v3/users/{user}/credentials/OS-EC2", Owner),
    ("GET", "/v3/users/{user}/credentials/OS-EC2/{id}", OwnerRead),
    ("DELETE", "/v3/users/{user}/credentials/OS-EC2/{id}", Owner),
    ("GET", "/v3/credentials", Further("one's own; all as read")),
    ("POST", "/v3/credentials", Further("for oneself; for others with the role admin")),
    ("GET", "/v3/credentials/{id}", Further("one's own; all as read")),
    ("PATCH", "/v3/credentials/{id}", Further("one's own; all with the role admin")),
    ("DELETE", "/v3/credentials/{id}", Further("one's own; all with the role admin")),
    ("GET", "/v3/regions", Token),
    ("POST", "/v3/regions", Admin),
    ("GET", "/v3/regions/{id}", Token),
    ("PUT", "/v3/regions/{id}", Admin),
    ("PATCH", "/v3/regions/{id}", Admin),
    ("DELETE", "/v3/regions/{id}", Admin),
    ("GET", "/v3/services", Read),
    ("POST", "/v3/services", Admin),
    ("GET", "/v3/services/{id}", Read),
    ("PATCH", "/v3/services/{id}", Admin),
    ("DELETE", "/v3/services/{id}", Admin),
    ("GET", "/v3/endpoints", Read),
    ("POST", "/v3/endpoints", Admin),
    ("GET", "/v3/endpoints/{id}", Read),
    ("PATCH", "/v3/endpoints/{id}", Admin),
    ("DELETE", "/v3/endpoints/{id}", Admin),
];

impl Rule {
    /// In words, as docs/policy.md has it.
    pub fn words(self) -> &'static str {
        match self {
            Public => "everybody",
            Token => "every valid token",
            Admin => "`admin`",
            Read => "`admin`, or `reader` on the system",
            Owner => "the user itself, or `admin`",
            OwnerRead => "the user itself, `admin`, or `reader` on the system",
            Further(words) => words,
        }
    }
}

/// Asks the table. `matched` is the route's pattern and `path` the request's path, both with `/identity`.
///
/// # Errors
/// 403.
pub fn check(ctx: &Ctx, method: &Method, matched: &str, path: &str) -> Result<(), ApiError> {
    let Some(pattern) = matched.strip_prefix("/identity") else { return Ok(()) };
    let pattern = if pattern.is_empty() { "/" } else { pattern };
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    let row = POLICY.iter().find(|(m, p, _)| *m == method && *p == pattern);
    let owns = || user_of(matched, path).is_some_and(|user| user == ctx.user_id);
    let allowed = match row.map(|row| row.2) {
        Some(Public | Token | Further(_)) => true,
        Some(Admin) => ctx.is_admin,
        Some(Read) => may_read(ctx),
        Some(Owner) => ctx.is_admin || owns(),
        Some(OwnerRead) => may_read(ctx) || owns(),
        None => false,
    };
    match allowed {
        true => Ok(()),
        false => Err(ApiError::Forbidden(format!(
            "You are not authorized to perform the requested action: {method} {pattern}."
        ))),
    }
}

/// May look at everything in identity.
pub fn may_read(ctx: &Ctx) -> bool {
    ctx.is_admin || (ctx.system && ctx.has_role(&["reader"]))
}

/// What stands in the path where the pattern has `{user}`.
fn user_of<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let path = path.trim_start_matches('/').split('/');
    pattern.trim_start_matches('/').split('/').zip(path).find(|(p, _)| *p == "{user}").map(|(_, value)| value)
}

/// The table as docs/policy.md has it.
pub fn table() -> String {
    let mut text = String::from("| Method | Path below `/identity` | Who |\n|---|---|---|\n");
    for (method, path, rule) in POLICY {
        text.push_str(&format!("| {method} | `{path}` | {} |\n", rule.words()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&table()), "docs/policy.md must have this table:\n{}", table());
    }

    #[test]
    fn the_user_of_a_path_is_found_by_its_pattern() {
        let pattern = "/identity/v3/groups/{id}/users/{user}";
        assert_eq!(user_of(pattern, "/identity/v3/groups/g/users/u"), Some("u"));
        assert_eq!(user_of("/identity/v3/users", "/identity/v3/users"), None);
    }
}
