//! How errors are told.

/// Longest message that is recorded or reported, in bytes; what is longer is cut. A guest can influence some of them.
pub const MESSAGE_MAX: usize = 1000;

/// An error with all its causes on one line, cut to [`MESSAGE_MAX`].
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    bounded(&text)
}

/// One line of at most [`MESSAGE_MAX`] bytes without control characters.
pub fn bounded(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > MESSAGE_MAX {
        let mut end = MESSAGE_MAX - '…'.len_utf8();
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_joined_and_length_is_bounded() {
        let error =
            crate::files::FileError::Read { path: "/x".into(), source: std::io::Error::other("line\nbreak") };
        assert_eq!(one_line(&error), "cannot read /x: line break");
        assert!(bounded(&"é".repeat(2000)).len() <= MESSAGE_MAX);
    }
}
