//! The one thing that the guest reads from a JSON document: a string member of the outermost object.

use alloc::string::String;

/// The string value of `key` in the object `text`, unescaped. `None` if it is not there, no string, or the text isn't
/// JSON as far as it was read. Values are skipped by counting brackets, not validated.
pub fn string_member(text: &str, key: &str) -> Option<String> {
    let mut rest = text.trim_start().strip_prefix('{')?;
    loop {
        let (name, after) = string(rest.trim_start())?;
        let value = after.trim_start().strip_prefix(':')?.trim_start();
        if name == key {
            return string(value).map(|(value, _)| value);
        }
        rest = skip_value(value)?.trim_start().strip_prefix(',')?;
    }
}

/// Reads a string literal; returns it and what follows.
fn string(text: &str) -> Option<(String, &str)> {
    let body = text.strip_prefix('"')?;
    let mut value = String::new();
    let mut characters = body.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &body[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                'b' => '\u{8}',
                'f' => '\u{c}',
                'u' => {
                    let mut code = 0;
                    for _ in 0..4 {
                        code = code * 16 + characters.next()?.1.to_digit(16)?;
                    }
                    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
                }
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

fn skip_value(text: &str) -> Option<&str> {
    let mut depth = 0_usize;
    let mut rest = text;
    loop {
        let first = rest.chars().next()?;
        match first {
            '"' => rest = string(rest)?.1,
            '{' | '[' => (depth, rest) = (depth + 1, &rest[1..]),
            '}' | ']' if depth > 0 => (depth, rest) = (depth - 1, &rest[1..]),
            ',' | '}' | ']' if depth == 0 => return Some(rest),
            other => rest = &rest[other.len_utf8()..],
        }
        if depth == 0 && matches!(first, '"' | '}' | ']') {
            return Some(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_member_of_the_outermost_object_is_taken() {
        let text = r#" {"meta": {"hostname": "no", "l": [1, "]}"]}, "n": -1.5e3, "hostname": "a\u00e4\"b", "z": null}"#;
        assert_eq!(string_member(text, "hostname").as_deref(), Some("aä\"b"));
        assert_eq!(string_member(text, "z"), None);
        assert_eq!(string_member(text, "n"), None);
        assert_eq!(string_member(text, "l"), None);
    }

    proptest! {
        #[test]
        fn any_text_ends_without_a_panic(text in ".{0,80}", json in r#"[{}\[\],:"\\a1 u]{0,60}"#) {
            string_member(&text, "a");
            string_member(&json, "a");
        }
    }
}
