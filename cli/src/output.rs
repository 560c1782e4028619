//! What people and programs see: tables, JSON, progress.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// Prints rows as a table with a header, or the whole value as JSON.
pub fn list(json: bool, rows: &[Value], columns: &[(&str, &str)]) {
    if json {
        return print_json(&Value::Array(rows.to_vec()));
    }
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| columns.iter().map(|(_, path)| text(lookup(row, path))).collect()).collect();
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(i, (title, _))| {
            cells.iter().map(|r| r[i].chars().count()).max().unwrap_or(0).max(title.chars().count())
        })
        .collect();
    let line = |fields: &mut dyn Iterator<Item = &str>| {
        let joined: Vec<String> = fields.zip(&widths).map(|(f, w)| format!("{f:<w$}")).collect();
        println!("{}", joined.join("  ").trim_end());
    };
    line(&mut columns.iter().map(|(title, _)| *title));
    for row in &cells {
        line(&mut row.iter().map(String::as_str));
    }
}

/// Prints one object field by field, or as JSON.
pub fn show(json: bool, value: &Value) {
    match value {
        Value::Object(fields) if !json => {
            let width = fields.keys().map(String::len).max().unwrap_or(0);
            for (key, value) in fields {
                println!("{key:<width$}  {}", text(value));
            }
        }
        _ => print_json(value),
    }
}

/// Prints JSON.
pub fn print_json(value: &Value) {
    println!("{value:#}");
}

/// A value by a path of names separated by `/`.
fn lookup<'a>(row: &'a Value, path: &str) -> &'a Value {
    path.split('/').fold(row, |value, key| &value[key])
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

/// A line on stderr that shows that something is going on; invisible where stderr is no terminal.
pub fn spinner(message: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::new_spinner()
        .with_style(
            ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        )
        .with_message(message.into());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A bar for bytes.
pub fn byte_bar(total: u64, message: impl Into<String>) -> ProgressBar {
    ProgressBar::new(total)
        .with_style(
            ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        )
        .with_message(message.into())
}
