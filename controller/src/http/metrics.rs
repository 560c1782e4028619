//! `GET /metrics`: counters for Prometheus. Which series there are is fixed: nothing that a client sends makes a new one.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::error::Service;
use crate::db::Pool;

const SERVICES: [(Service, &str); 5] = [
    (Service::Identity, "identity"),
    (Service::Image, "image"),
    (Service::Compute, "compute"),
    (Service::Network, "network"),
    (Service::Mote, "mote"),
];
/// Upper ends of the histogram's buckets in seconds, as text, and in microseconds.
const BUCKETS: [(&str, u64); 10] = [
    ("0.001", 1_000),
    ("0.0025", 2_500),
    ("0.005", 5_000),
    ("0.01", 10_000),
    ("0.025", 25_000),
    ("0.1", 100_000),
    ("0.5", 500_000),
    ("1", 1_000_000),
    ("5", 5_000_000),
    ("30", 30_000_000),
];

#[derive(Debug, Default)]
struct OfService {
    /// 1xx to 5xx.
    by_class: [AtomicU64; 5],
    /// One more than [`BUCKETS`]: what took longer.
    by_time: [AtomicU64; BUCKETS.len() + 1],
    total_us: AtomicU64,
}

/// The counters of this controller since its start.
#[derive(Debug, Default)]
pub struct Metrics {
    services: [OfService; SERVICES.len()],
    under_way: AtomicU64,
    limited: AtomicU64,
}

impl Metrics {
    /// A request has begun.
    pub fn begun(&self) {
        self.under_way.fetch_add(1, Relaxed);
    }

    /// It was answered.
    pub fn answered(&self, service: Service, status: u16, took: Duration) {
        self.under_way.fetch_sub(1, Relaxed);
        if status == 429 {
            self.limited.fetch_add(1, Relaxed);
        }
        let index = SERVICES.iter().position(|(one, _)| *one == service).unwrap_or(SERVICES.len() - 1);
        let of = &self.services[index];
        let class = usize::from(status / 100).clamp(1, 5) - 1;
        of.by_class[class].fetch_add(1, Relaxed);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.iter().position(|(_, end)| us <= *end).unwrap_or(BUCKETS.len());
        of.by_time[bucket].fetch_add(1, Relaxed);
        of.total_us.fetch_add(us, Relaxed);
    }

    /// All as text.
    pub fn text(&self, read: &Pool, write: &Pool) -> String {
        let mut text = String::with_capacity(8 << 10);
        // Writing to a String can't fail.
        let _ = self.write(&mut text, read, write);
        text
    }

    fn write(&self, text: &mut String, read: &Pool, write: &Pool) -> std::fmt::Result {
        head(text, "mote_http_requests_total", "counter", "Requests answered, by class of status.")?;
        for ((_, name), of) in SERVICES.iter().zip(&self.services) {
            for (class, count) in of.by_class.iter().enumerate() {
                let class = class + 1;
                let count = count.load(Relaxed);
                writeln!(
                    text,
                    "mote_http_requests_total{{service=\"{name}\",status=\"{class}xx\"}} {count}"
                )?;
            }
        }
        let series = "mote_http_request_duration_seconds";
        head(text, series, "histogram", "From the request's head to the answer's.")?;
        for ((_, name), of) in SERVICES.iter().zip(&self.services) {
            let mut below = 0;
            for ((end, _), count) in BUCKETS.iter().zip(&of.by_time) {
                below += count.load(Relaxed);
                writeln!(text, "{series}_bucket{{service=\"{name}\",le=\"{end}\"}} {below}")?;
            }
            below += of.by_time[BUCKETS.len()].load(Relaxed);
            writeln!(text, "{series}_bucket{{service=\"{name}\",le=\"+Inf\"}} {below}")?;
            let sum = Duration::from_micros(of.total_us.load(Relaxed)).as_secs_f64();
            writeln!(text, "{series}_sum{{service=\"{name}\"}} {sum}")?;
            writeln!(text, "{series}_count{{service=\"{name}\"}} {below}")?;
        }
        head(text, "mote_http_requests_under_way", "gauge", "Requests that are not answered yet.")?;
        writeln!(text, "mote_http_requests_under_way {}", self.under_way.load(Relaxed))?;
        head(text, "mote_http_requests_limited_total", "counter", "Requests refused by a rate limit.")?;
        writeln!(text, "mote_http_requests_limited_total {}", self.limited.load(Relaxed))?;
        head(text, "mote_db_connections", "gauge", "Connections to the database, by state.")?;
        for (name, pool) in [("read", read), ("write", write)] {
            let idle = pool.num_idle();
            let busy = usize::try_from(pool.size()).unwrap_or(idle).saturating_sub(idle);
            writeln!(text, "mote_db_connections{{pool=\"{name}\",state=\"idle\"}} {idle}")?;
            writeln!(text, "mote_db_connections{{pool=\"{name}\",state=\"busy\"}} {busy}")?;
        }
        if let Some(bytes) = resident_bytes() {
            head(text, "process_resident_memory_bytes", "gauge", "Memory of this process.")?;
            writeln!(text, "process_resident_memory_bytes {bytes}")?;
        }
        Ok(())
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// `VmRSS` of proc(5).
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
