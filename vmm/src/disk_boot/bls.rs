//! Boot loader entries, type 1 (The Boot Loader Specification, UAPI group): one small file for each kernel.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::{Entry, expand};

/// The entries' directory, below the one that the kernels' paths start at.
pub const DIRECTORY: &str = "/loader/entries";

/// An entry as it is in its file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parsed {
    name: String,
    sort_key: Option<String>,
    version: String,
    entry: Entry,
}

/// The entry that a boot loader would start: the first in the order of sort key, version and file name, the newest version
/// first. `files` are names (without `.conf`) and contents, `environment` the variables for options that name some.
pub fn choose(files: &[(String, String)], environment: &BTreeMap<String, String>) -> Option<Entry> {
    let parsed = files.iter().map(|(name, text)| parse(name, text, environment));
    let usable = parsed.filter(|parsed| !parsed.entry.linux.is_empty() && !parsed.name.ends_with("rescue"));
    usable.min_by(order).map(|parsed| parsed.entry)
}

fn order(a: &Parsed, b: &Parsed) -> Ordering {
    let with_key = |parsed: &Parsed| parsed.sort_key.is_none();
    with_key(a)
        .cmp(&with_key(b))
        .then_with(|| a.sort_key.cmp(&b.sort_key))
        .then_with(|| compare_versions(&b.version, &a.version))
        .then_with(|| compare_versions(&b.name, &a.name))
}

fn parse(name: &str, text: &str, environment: &BTreeMap<String, String>) -> Parsed {
    let mut parsed = Parsed { name: name.to_owned(), ..Parsed::default() };
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        match key {
            "linux" => parsed.entry.linux = value.to_owned(),
            // Fedora writes variables here, and several files in one line.
            "initrd" => {
                let value = expand(value, environment);
                parsed.entry.initrds.extend(value.split_whitespace().map(str::to_owned));
            }
            "options" => {
                let value = expand(value, environment);
                if !parsed.entry.options.is_empty() {
                    parsed.entry.options.push(' ');
                }
                parsed.entry.options.push_str(value.trim());
            }
            "version" => parsed.version = value.to_owned(),
            "sort-key" => parsed.sort_key = Some(value.to_owned()),
            _ => {}
        }
    }
    parsed
}

/// Numbers by their value, the rest by its bytes; `~` sorts before everything, also before the end.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        match (a.split_first(), b.split_first()) {
            (None, None) => return Ordering::Equal,
            (Some((b'~', _)), None) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (None, Some((b'~', _))) => return Ordering::Greater,
            (None, Some(_)) => return Ordering::Less,
            (Some((x, _)), Some((y, _))) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let ((x, rest_a), (y, rest_b)) = (number(a), number(b));
                match (x.len(), x).cmp(&(y.len(), y)) {
                    Ordering::Equal => (a, b) = (rest_a, rest_b),
                    other => return other,
                }
            }
            (Some((x, rest_a)), Some((y, rest_b))) => {
                let rank = |byte: u8| (byte != b'~', byte);
                match rank(*x).cmp(&rank(*y)) {
                    Ordering::Equal => (a, b) = (rest_a, rest_b),
                    other => return other,
                }
            }
        }
    }
}

/// The digits at the start without leading zeros, and what follows.
fn number(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let zeros = text[..end].iter().take_while(|byte| **byte == b'0').count();
    (&text[zeros..end], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> (String, String) {
        (name.to_owned(), text.to_owned())
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        for (older, newer) in [
            ("6.1.0-9", "6.1.0-10"),
            ("6.9", "6.12"),
            ("6.1~rc1", "6.1"),
            ("6.1", "6.1.1"),
            ("6.01", "6.2"),
            ("", "1"),
        ] {
            assert_eq!(compare_versions(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare_versions(newer, older), Ordering::Greater, "{newer} {older}");
        }
        assert_eq!(compare_versions("6.1", "6.1"), Ordering::Equal);
    }

    #[test]
    fn the_newest_entry_is_chosen_with_all_its_lines() {
        let files = [
            file("a-6.9.0", "title Old\nversion 6.9.0\nlinux /vmlinuz-6.9.0\n"),
            file(
                "a-6.12.0",
                "# comment\ntitle New\nversion 6.12.0\nlinux\t/vmlinuz-6.12.0\ninitrd /one $more\ninitrd /two\n\
                 options root=UUID=1 ro\noptions $extra quiet\n",
            ),
            file("a-0-rescue", "version 9\nlinux /rescue\n"),
            file("broken", "nonsense"),
        ];
        let environment = BTreeMap::from([("extra".to_owned(), "crashkernel=1M".to_owned())]);
        let entry = choose(&files, &environment).unwrap();
        assert_eq!(entry.linux, "/vmlinuz-6.12.0");
        assert_eq!(entry.initrds, ["/one", "/two"]);
        assert_eq!(entry.options, "root=UUID=1 ro crashkernel=1M quiet");
        assert_eq!(choose(&files[3..], &environment), None);
    }

    #[test]
    fn a_sort_key_comes_first() {
        let files = [
            file("b", "version 9\nlinux /without\n"),
            file("a", "version 1\nsort-key debian\nlinux /with\n"),
        ];
        assert_eq!(choose(&files, &BTreeMap::new()).unwrap().linux, "/with");
    }
}
