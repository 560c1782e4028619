//! Who may do what: one table of every route. docs/policy.md shows it, and tests compare the two, the router with the table,
//! and what each route answers to whom.
//!
//! [`Ctx`] asks it as soon as a token is known, so that no handler that needs a token can forget to: a route that is not in
//! the table is refused. Which things a handler then finds is its own affair: what isn't the asker's to see doesn't exist.

use http::Method;

use crate::http::{context::Ctx, error::ApiError};

mod compute;
mod identity;
mod image;
mod mote;
mod network;
#[cfg(test)]
mod tests;

/// Who may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Everybody, without a token.
    Public,
    /// Whoever has a valid token.
    Token,
    /// Any role in a project, about what that project sees.
    Reader,
    /// Role `member` (and whatever implies it), about what its project has.
    Member,
    /// Role `admin`.
    Admin,
    /// Role `admin`, or `reader` on the system as a whole.
    Read,
    /// The user of the path, or role `admin`.
    Owner,
    /// The user of the path, or as [`Rule::Read`].
    OwnerRead,
    /// A host by its secret, or one that joins by a token to join.
    Host,
    /// Whoever has the URL of a console.
    Console,
    /// Whoever has a valid token, and the handler looks further, as the text says.
    Further(&'static str),
}

use Rule::{Admin, Console, Further, Host, Member, Owner, OwnerRead, Public, Read, Reader, Token};

/// Method, path below the service's, who may. `HEAD` is as `GET`.
pub type Row = (&'static str, &'static str, Rule);

/// What more than one service says of quotas.
const PROJECT: Rule = Further("the token's project; others: `admin`");

/// The services' paths and rows; what belongs to none comes last.
pub const TABLES: &[(&str, &[Row])] = &[
    ("/identity", identity::ROWS),
    ("/image", image::ROWS),
    ("/compute", compute::ROWS),
    ("/network", network::ROWS),
    ("", mote::ROWS),
];

impl Rule {
    /// In words, as docs/policy.md has it.
    pub fn words(self) -> &'static str {
        match self {
            Public => "everybody",
            Token => "every valid token",
            Reader => "`reader`",
            Member => "`member`",
            Admin => "`admin`",
            Read => "`admin`, or `reader` on the system",
            Owner => "the user itself, or `admin`",
            OwnerRead => "the user itself, `admin`, or `reader` on the system",
            Host => "hosts",
            Console => "whoever has the console's URL",
            Further(words) => words,
        }
    }
}

/// The table of a route with the rest of its pattern.
fn table_of(matched: &str) -> (&'static [Row], &str) {
    let below =
        |service: &str| matched.strip_prefix(service).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let found = TABLES.iter().find_map(|(service, rows)| below(service).map(|rest| (*rows, rest)));
    let (rows, rest) = found.unwrap_or((&[], matched));
    (rows, if rest.is_empty() { "/" } else { rest })
}

/// Who may use a route, by its whole pattern; `None` if the table doesn't say.
pub fn rule_of(method: &str, matched: &str) -> Option<Rule> {
    let (rows, pattern) = table_of(matched);
    rows.iter().find(|(m, p, _)| m.eq_ignore_ascii_case(method) && *p == pattern).map(|row| row.2)
}

/// Asks the table. `matched` is the route's pattern and `path` the request's path, both whole.
///
/// # Errors
/// 403.
pub fn check(ctx: &Ctx, method: &Method, matched: &str, path: &str) -> Result<(), ApiError> {
    let name = if method == Method::HEAD { "GET" } else { method.as_str() };
    let owns = || user_of(matched, path).is_some_and(|user| user == ctx.user_id);
    let allowed = match rule_of(name, matched) {
        Some(Public | Token | Further(_)) => true,
        Some(Reader) => return ctx.require_project().map(drop),
        Some(Member) => return ctx.require_writer(),
        Some(Admin) => ctx.is_admin,
        Some(Read) => may_read(ctx),
        Some(Owner) => ctx.is_admin || owns(),
        Some(OwnerRead) => may_read(ctx) || owns(),
        Some(Host | Console) | None => false,
    };
    match allowed {
        true => Ok(()),
        false => {
            let pattern = table_of(matched).1;
            let text = format!("You are not authorized to perform the requested action: {name} {pattern}.");
            Err(ApiError::Forbidden(text))
        }
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

/// A service's table as docs/policy.md has it.
#[cfg(test)]
fn markdown(service: &str, rows: &[Row]) -> String {
    let below = if service.is_empty() { String::new() } else { format!(" below `{service}`") };
    let mut text = format!("| Method | Path{below} | Who |\n|---|---|---|\n");
    for (method, path, rule) in rows {
        text.push_str(&format!("| {method} | `{path}` | {} |\n", rule.words()));
    }
    text
}
