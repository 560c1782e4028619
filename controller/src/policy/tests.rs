//! Every route, asked by everybody who may not and by those who may.

use std::collections::BTreeSet;

use super::*;
use crate::http::openapi::generate::routes;

mod world;

use world::World;

/// Every row with its whole pattern.
fn rows() -> Vec<(&'static str, String, Rule)> {
    let whole = |service: &str, path: &str| match (service, path) {
        ("", path) => path.to_owned(),
        (service, "/") => service.to_owned(),
        (service, path) => format!("{service}{path}"),
    };
    let of = |(service, rows): &(&'static str, &'static [Row])| {
        let service = *service;
        rows.iter().map(move |(method, path, rule)| (*method, whole(service, path), *rule))
    };
    TABLES.iter().flat_map(of).collect()
}

#[test]
fn every_route_is_in_the_table_and_the_other_way_round() {
    let there: BTreeSet<(String, String)> = routes()
        .into_iter()
        .flat_map(|(path, methods)| methods.into_iter().map(move |m| (m.to_uppercase(), path.clone())))
        .collect();
    let said: BTreeSet<(String, String)> =
        rows().into_iter().map(|(method, path, _)| (method.to_owned(), path)).collect();
    assert_eq!(
        there.difference(&said).collect::<Vec<_>>(),
        Vec::<&(String, String)>::new(),
        "not in the table"
    );
    assert_eq!(said.difference(&there).collect::<Vec<_>>(), Vec::<&(String, String)>::new(), "no routes");
    assert_eq!(said.len(), rows().len(), "a route has one row");
    for (method, pattern, rule) in rows() {
        assert_eq!(rule_of(method, &pattern), Some(rule), "{method} {pattern}");
    }
}

/// `MOTE_UPDATE=1` writes it anew.
#[test]
fn the_documentation_has_these_tables() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (told, tables) = text.split_once("\n| Method |").unwrap_or((&text, ""));
    let wanted: Vec<String> = TABLES.iter().map(|(service, rows)| markdown(service, rows)).collect();
    let wanted = wanted.join("\n");
    if std::env::var_os("MOTE_UPDATE").is_some() {
        return std::fs::write(path, format!("{}\n\n{wanted}", told.trim_end())).unwrap();
    }
    assert!(
        format!("| Method |{tables}") == wanted,
        "docs/policy.md is not up to date: run this test with MOTE_UPDATE=1"
    );
}

#[test]
fn the_user_of_a_path_is_found_by_its_pattern() {
    let pattern = "/identity/v3/groups/{id}/users/{user}";
    assert_eq!(user_of(pattern, "/identity/v3/groups/g/users/u"), Some("u"));
    assert_eq!(user_of("/identity/v3/users", "/identity/v3/users"), None);
}

fn refused(status: u16) -> bool {
    status == 401 || status == 403
}

/// Answered, if not always as wished; 501 is what Mote doesn't have.
fn sound(status: u16) -> bool {
    status != 405 && (status < 500 || status == 501)
}

/// What is not as it should be: all of it, not only the first.
#[derive(Default)]
struct Findings(Vec<String>);

/// Notes what doesn't hold.
macro_rules! hold {
    ($found:ident, $condition:expr, $($text:tt)+) => {
        if !$condition {
            $found.0.push(format!($($text)+));
        }
    };
}

impl Findings {
    #[track_caller]
    fn none(self) {
        assert!(self.0.is_empty(), "{} findings:\n{}", self.0.len(), self.0.join("\n"));
    }
}

#[tokio::test]
async fn without_a_valid_token_every_route_but_the_public_ones_is_closed() {
    let world = World::new().await;
    let mut found = Findings::default();
    for (method, pattern, rule) in rows() {
        if rule == Public || pattern == "/metrics" {
            continue;
        }
        for token in ["", "rubbish", world.expired.as_str()] {
            for path in [world.path(&pattern), world.path_to_nothing(&pattern)] {
                let answer = world.ask(method, &pattern, &path, token).await;
                hold!(found, answer.status == 401, "{method} {path} with token {token:?}: {}", answer.text());
            }
        }
        if rule == Host {
            // Neither an administrator nor another host is the host.
            let answer = world.ask(method, &pattern, &world.path(&pattern), &world.admin).await;
            hold!(found, answer.status == 401, "{method} {pattern} as admin");
            let answer = world.ask_as_host(method, &pattern).await;
            hold!(
                found,
                refused(answer.status.as_u16()),
                "{method} {pattern} as another host: {}",
                answer.status
            );
        }
    }
    found.none();
}

#[tokio::test]
async fn each_route_answers_each_role_as_the_table_says() {
    let world = World::new().await;
    let mut found = Findings::default();
    for (method, pattern, rule) in rows() {
        if matches!(rule, Public | Host | Console) {
            continue;
        }
        // Nothing is changed: what is named doesn't exist.
        let nothing = world.path_to_nothing(&pattern);
        let of = |token: &str| {
            let (token, world, pattern, nothing) = (token.to_owned(), &world, &pattern, &nothing);
            async move { world.ask(method, pattern, nothing, &token).await.status.as_u16() }
        };
        let admin = of(&world.admin).await;
        // Nobody may make tasks by hand, and application credentials nobody but their user.
        let nobody = pattern.ends_with("/v2/tasks") && method == "POST";
        let only_self = pattern.ends_with("/application_credentials") && method == "POST";
        let removed = pattern.ends_with("/uptime");
        if !nobody && !only_self {
            hold!(
                found,
                !refused(admin) && (sound(admin) || removed),
                "{method} {pattern} as admin: {admin}"
            );
        }
        let system = of(&world.system_reader).await;
        match rule {
            Read | OwnerRead => {
                hold!(found, !refused(system), "{method} {pattern} as system reader: {system}");
            }
            Token => {
                hold!(
                    found,
                    !refused(system) && sound(system),
                    "{method} {pattern} as system reader: {system}"
                )
            }
            Further(_) => hold!(found, sound(system), "{method} {pattern} as system reader: {system}"),
            _ => hold!(found, system == 403, "{method} {pattern} as system reader: {system}"),
        }
        for (role, token) in
            [("reader", &world.reader), ("member", &world.ada.token), ("manager", &world.manager)]
        {
            let status = of(token).await;
            let may = match rule {
                Token | Reader => true,
                Member => role != "reader",
                Further(_) => {
                    hold!(found, sound(status), "{method} {pattern} as {role}: {status}");
                    continue;
                }
                _ => false,
            };
            hold!(found, refused(status) != may, "{method} {pattern} as {role}: {status}");
            hold!(found, sound(status), "{method} {pattern} as {role}: {status}");
        }
    }
    found.none();
}

#[tokio::test]
async fn what_is_another_projects_is_answered_like_what_does_not_exist() {
    let world = World::new().await;
    let mut found = Findings::default();
    let secrets = world.secrets();
    for (method, pattern, rule) in rows() {
        if matches!(rule, Public | Host | Console | Token)
            || pattern == "/metrics"
            || pattern.contains("/extensions/{alias}")
        {
            continue;
        }
        let (path, nothing) = (world.path(&pattern), world.path_to_nothing(&pattern));
        if path == nothing {
            let answer = world.ask(method, &pattern, &path, &world.eve.token).await;
            // What is made in one's own project may name what it is made of.
            if method == "GET" {
                let text = answer.text();
                let seen: Vec<&String> = secrets.iter().filter(|id| text.contains(id.as_str())).collect();
                hold!(found, seen.is_empty(), "{method} {path} shows {seen:?}: {text}");
            }
            continue;
        }
        let eve = world.eve.token.as_str();
        for ((path, nothing), body) in world.hidden(&pattern).into_iter().flat_map(|paths| {
            world.bodies(method, &pattern).into_iter().map(move |body| (paths.clone(), body))
        }) {
            let real = world.send(method, &pattern, &path, eve, body.clone()).await;
            let fake = world.send(method, &pattern, &nothing, eve, body.clone()).await;
            let status = real.status.as_u16();
            hold!(found, status == 404 || status == 403, "{method} {path} {body}: {status} {}", real.text());
            let same = world.without_ids(&real.text()) == world.without_ids(&fake.text());
            hold!(
                found,
                status == fake.status.as_u16() && same,
                "{method} {path} {body}: {} but {}",
                real.text(),
                fake.text()
            );
        }
    }
    // All that is still there.
    for (method, pattern, rule) in rows() {
        if method == "GET" && rule == Reader {
            let answer = world.ask(method, &pattern, &world.path(&pattern), &world.ada.token).await;
            hold!(
                found,
                answer.status.is_success(),
                "{pattern} as its owner: {} {}",
                answer.status,
                answer.text()
            );
        }
    }
    found.none();
}

#[tokio::test]
async fn who_has_the_role_is_let_at_what_its_project_has() {
    let world = World::new().await;
    let mut found = Findings::default();
    let mut rows = rows();
    // What goes, goes last, and parts before the whole.
    rows.sort_by_key(|(method, pattern, _)| match *method {
        "GET" => (0, 0),
        "DELETE" if pattern.contains("/rbac-policies/") => (1, 1),
        "DELETE" => (2, 99 - pattern.matches('/').count()),
        _ => (1, 0),
    });
    for (method, pattern, rule) in rows {
        if !matches!(rule, Reader | Member) {
            continue;
        }
        let path = world.path(&pattern);
        let reader = world.ask(method, &pattern, &path, &world.reader).await;
        let member = match rule {
            Reader => {
                hold!(
                    found,
                    reader.status.is_success(),
                    "{method} {path} as reader: {} {}",
                    reader.status,
                    reader.text()
                );
                world.ask(method, &pattern, &path, &world.ada.token).await
            }
            _ => {
                hold!(found, reader.status == 403, "{method} {path} as reader: {}", reader.text());
                world.ask(method, &pattern, &path, &world.ada.token).await
            }
        };
        // Rules can't be changed, the host that could answer is down, and the newest microversion has no images.
        let status = member.status.as_u16();
        let down = pattern.ends_with("/console") && status == 503;
        let gone = pattern.starts_with("/compute/v2.1/images/") && status == 404;
        let constant = pattern.ends_with("/security-group-rules/{id}") && method == "PUT" && status == 405;
        hold!(
            found,
            constant || down || gone || (!refused(status) && status != 404 && status != 400 && sound(status)),
            "{method} {path} as member: {status} {}",
            member.text()
        );
    }
    found.none();
}
