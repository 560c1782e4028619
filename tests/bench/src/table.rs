//! Results for people.

use std::fmt::Write;

use crate::candidate::{FIRECRACKER, FLOOR};
use crate::startup::{Results, Row, Spread};

type Column = (&'static str, fn(&Row) -> Spread, usize);

/// Title, value, decimals.
const COLUMNS: [Column; 5] = [
    ("first byte ms", |row| row.first_byte_ms, 2),
    ("exit ms", |row| row.exit_ms, 2),
    ("CPU ms", |row| row.cpu_ms, 2),
    ("peak resident KiB", |row| row.peak_resident_kib, 0),
    ("private dirty KiB", |row| row.private_dirty_kib, 0),
];
const NAME_WIDTH: usize = 17;
const COLUMN_WIDTH: usize = 22;

/// A table of min/median/max, then the ratios of the medians.
pub fn render(results: &Results) -> String {
    let mut text = String::new();
    let devices = if results.devices { ", a disk and a network interface" } else { "" };
    let title =
        format!("{} runs of each, {} MiB{devices}; min / median / max", results.runs, results.memory_mib);
    line(&mut text, &title, []);
    line(&mut text, "", COLUMNS.map(|(title, ..)| title.to_owned()));
    for row in &results.rows {
        let cells = COLUMNS.map(|(_, value, decimals)| {
            let Spread { min, median, max } = value(row);
            format!("{min:.decimals$} / {median:.decimals$} / {max:.decimals$}")
        });
        line(&mut text, &row.name, cells);
    }
    for base in [FLOOR, FIRECRACKER] {
        let Some(base) = results.rows.iter().find(|row| row.name == base) else { continue };
        line(&mut text, "", []);
        line(&mut text, &format!("medians relative to {}", base.name), []);
        for row in results.rows.iter().filter(|row| row.name != base.name) {
            let cells = COLUMNS.map(|(_, value, _)| format!("{:.2}", value(row).median / value(base).median));
            line(&mut text, &row.name, cells);
        }
    }
    for (program, ms) in &results.vcpu_ms {
        let _ = writeln!(text, "\none vCPU more costs {program} {ms:.3} ms until the first byte");
    }
    text
}

fn line(text: &mut String, name: &str, cells: impl IntoIterator<Item = String>) {
    let mut whole = format!("{name:NAME_WIDTH$}");
    for cell in cells {
        let _ = write!(whole, "{cell:>COLUMN_WIDTH$}");
    }
    let _ = writeln!(text, "{}", whole.trim_end());
}
