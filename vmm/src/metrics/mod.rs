//! Counters, in Firecracker's JSON layout (one line for each flush, each counter with what it grew by since the last one)
//! and in Prometheus' text format (totals).
//!
//! Only what is really counted is there: a group of Firecracker's that is missing here has no numbers, rather than zeros.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mote_vmm_api::Metrics as MetricsConfig;
use serde_json::{Map, Value, json};

mod devices;

pub use devices::{
    BalloonMetrics, BlockMetrics, ConsoleMetrics, EntropyMetrics, Group, I8042Metrics, MemoryHotplugMetrics,
    MmdsMetrics, NetMetrics, PmemMetrics, SeccompMetrics, SignalMetrics, UartMetrics, VcpuMetrics,
    VhostUserBlockMetrics, VsockMetrics, device,
};

/// Time between two lines, as Firecracker has it.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// A number that only grows.
#[derive(Debug)]
pub struct Counter {
    total: AtomicU64,
    flushed: AtomicU64,
}

impl Counter {
    const fn new() -> Self {
        Self { total: AtomicU64::new(0), flushed: AtomicU64::new(0) }
    }

    /// One more.
    pub fn add_one(&self) {
        self.total.fetch_add(1, Ordering::Relaxed);
    }

    /// `count` more.
    pub fn add(&self, count: u64) {
        self.total.fetch_add(count, Ordering::Relaxed);
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// What it grew by since the last call.
    fn take_growth(&self) -> u64 {
        let total = self.total.load(Ordering::Relaxed);
        total.wrapping_sub(self.flushed.swap(total, Ordering::Relaxed))
    }
}

/// A number that is set.
pub type Gauge = AtomicU64;

/// Requests of one kind.
struct Requests {
    method: &'static str,
    /// First part of the path.
    resource: &'static str,
    /// Firecracker's name for it.
    name: &'static str,
    count: Counter,
    fails: Counter,
}

const fn requests(method: &'static str, resource: &'static str, name: &'static str) -> Requests {
    Requests { method, resource, name, count: Counter::new(), fails: Counter::new() }
}

static REQUESTS: [Requests; 24] = [
    requests("GET", "", "instance_info"),
    requests("GET", "hotplug", "hotplug_memory"),
    requests("GET", "machine-config", "machine_cfg"),
    requests("GET", "mmds", "mmds"),
    requests("GET", "version", "vmm_version"),
    requests("PUT", "actions", "actions"),
    requests("PUT", "boot-source", "boot_source"),
    requests("PUT", "cpu-config", "cpu_cfg"),
    requests("PUT", "drives", "drive"),
    requests("PUT", "hotplug", "hotplug_memory"),
    requests("PUT", "logger", "logger"),
    requests("PUT", "machine-config", "machine_cfg"),
    requests("PUT", "metrics", "metrics"),
    requests("PUT", "mmds", "mmds"),
    requests("PUT", "network-interfaces", "network"),
    requests("PUT", "pmem", "pmem"),
    requests("PUT", "serial", "serial"),
    requests("PUT", "vsock", "vsock"),
    requests("PATCH", "drives", "drive"),
    requests("PATCH", "hotplug", "hotplug_memory"),
    requests("PATCH", "machine-config", "machine_cfg"),
    requests("PATCH", "mmds", "mmds"),
    requests("PATCH", "network-interfaces", "network"),
    requests("PATCH", "pmem", "pmem"),
];

/// Log lines that could not be written.
pub static MISSED_LOG_COUNT: Counter = Counter::new();
/// Metrics that could not be written.
static MISSED_METRICS_COUNT: Counter = Counter::new();

/// The metadata service.
pub static MMDS: MmdsMetrics = MmdsMetrics::new();
/// The processors.
pub static VCPU: VcpuMetrics = VcpuMetrics::new();
/// Signals.
pub static SIGNALS: SignalMetrics = SignalMetrics::new();
/// The seccomp filters.
pub static SECCOMP: SeccompMetrics = SeccompMetrics::new();
/// The serial port.
pub static UART: UartMetrics = UartMetrics::new();
/// The keyboard controller.
pub static I8042: I8042Metrics = I8042Metrics::new();

/// Groups that there is one of.
fn single_groups() -> [(&'static str, &'static dyn Group); 6] {
    [
        ("i8042", &I8042),
        ("mmds", &MMDS),
        ("seccomp", &SECCOMP),
        ("signals", &SIGNALS),
        ("uart", &UART),
        ("vcpu", &VCPU),
    ]
}

/// Descriptor of the metrics' file for [`write_refusal`]; -1 if there is none.
static FILE: AtomicI32 = AtomicI32::new(-1);

/// Appends a line that says that a system call was refused, and nothing else: the process ends, and the thread may be in the
/// middle of anything. Only makes an async-signal-safe call.
pub fn write_refusal() {
    const LINE: &[u8] = b"{\"seccomp\":{\"num_faults\":1}}\n";
    let file = FILE.load(Ordering::Acquire);
    if file >= 0 {
        // SAFETY: the buffer is valid for its length; the descriptor stays open as long as the process has metrics.
        unsafe { libc::write(file, LINE.as_ptr().cast(), LINE.len()) };
    }
}

/// How long the last of each operation took, in microseconds; 0 if there was none.
pub static PAUSE_VM_US: Gauge = Gauge::new(0);
/// See [`PAUSE_VM_US`].
pub static RESUME_VM_US: Gauge = Gauge::new(0);
/// See [`PAUSE_VM_US`].
pub static FULL_CREATE_SNAPSHOT_US: Gauge = Gauge::new(0);
/// See [`PAUSE_VM_US`].
pub static LOAD_SNAPSHOT_US: Gauge = Gauge::new(0);
/// From `--start-time-us` to the command line's end; 0 without it.
pub static PROCESS_STARTUP_TIME_US: Gauge = Gauge::new(0);
/// The same in CPU time, from `--start-time-cpu-us` with `--parent-cpu-time-us` added.
pub static PROCESS_STARTUP_TIME_CPU_US: Gauge = Gauge::new(0);

static LATENCIES: [(&str, &Gauge); 4] = [
    ("full_create_snapshot", &FULL_CREATE_SNAPSHOT_US),
    ("load_snapshot", &LOAD_SNAPSHOT_US),
    ("pause_vm", &PAUSE_VM_US),
    ("resume_vm", &RESUME_VM_US),
];
static STARTUP: [(&str, &Gauge); 2] = [
    ("process_startup_time_us", &PROCESS_STARTUP_TIME_US),
    ("process_startup_time_cpu_us", &PROCESS_STARTUP_TIME_CPU_US),
];

/// Runs `operation` and remembers how long it took, if it was successful.
pub fn timed<T, E>(gauge: &Gauge, operation: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let start = Instant::now();
    let result = operation()?;
    gauge.store(start.elapsed().as_micros() as u64, Ordering::Relaxed);
    Ok(result)
}

/// A request was answered.
pub fn count_request(method: &str, path: &str, failed: bool) {
    let resource = path.trim_start_matches('/').split('/').next().unwrap_or("");
    let kind = REQUESTS.iter().find(|kind| (kind.method, kind.resource) == (method, resource));
    let Some(kind) = kind else { return };
    kind.count.add_one();
    if failed {
        kind.fails.add_one();
    }
}

/// Everything since the last call, in Firecracker's layout.
fn growth() -> Map<String, Value> {
    let mut groups = Map::new();
    let mut set = |group: &str, name: String, value: u64| {
        let group = groups.entry(group).or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(group) = group {
            group.insert(name, value.into());
        }
    };
    for (name, gauge) in &STARTUP {
        set("api_server", (*name).to_owned(), gauge.load(Ordering::Relaxed));
    }
    for kind in &REQUESTS {
        let group = format!("{}_api_requests", kind.method.to_ascii_lowercase());
        set(&group, format!("{}_count", kind.name), kind.count.take_growth());
        if kind.method != "GET" {
            set(&group, format!("{}_fails", kind.name), kind.fails.take_growth());
        }
    }
    for (name, gauge) in &LATENCIES {
        set("latencies_us", (*name).to_owned(), gauge.load(Ordering::Relaxed));
    }
    for (group, counters) in single_groups() {
        for (name, counter) in counters.counters() {
            set(group, name.to_owned(), counter.take_growth());
        }
    }
    for (group, counters) in devices::growth() {
        for (name, value) in counters {
            set(&group, name.to_owned(), value);
        }
    }
    set("logger", "missed_log_count".to_owned(), MISSED_LOG_COUNT.take_growth());
    set("logger", "missed_metrics_count".to_owned(), MISSED_METRICS_COUNT.take_growth());
    groups
}

/// Prometheus' text format 0.0.4: the totals.
fn prometheus(id: &str) -> String {
    // An id has letters, digits and hyphens only.
    let vm = format!("vm=\"{id}\"");
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, u64)>| {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for (labels, value) in samples {
            text.push_str(&format!("{name}{{{vm}{labels}}} {value}\n"));
        }
    };
    let load = Counter::total;
    let labels = |kind: &Requests| format!(",method=\"{}\",resource=\"{}\"", kind.method, kind.name);
    let each = |value: fn(&Requests) -> &Counter| {
        REQUESTS.iter().map(|kind| (labels(kind), load(value(kind)))).collect::<Vec<_>>()
    };
    family("mote_vmm_api_requests_total", "counter", "API requests.", each(|kind| &kind.count));
    family("mote_vmm_api_failures_total", "counter", "API requests that failed.", each(|kind| &kind.fails));
    let latencies = LATENCIES
        .iter()
        .map(|(name, gauge)| (format!(",operation=\"{name}\""), gauge.load(Ordering::Relaxed)));
    let help = "How long the last such operation took; 0 before the first.";
    family("mote_vmm_operation_microseconds", "gauge", help, latencies.collect());
    for (group, counters) in single_groups() {
        for (name, counter) in counters.counters() {
            let samples = vec![(String::new(), load(counter))];
            family(&family_name(group, name), "counter", &help_of(group, name), samples);
        }
    }
    for ((kind, name), samples) in devices::totals() {
        family(&family_name(kind, name), "counter", &help_of(kind, name), samples);
    }
    let missed = vec![(String::new(), load(&MISSED_LOG_COUNT))];
    family("mote_vmm_missed_log_lines_total", "counter", "Log lines that could not be written.", missed);
    text
}

/// Prometheus wants totals to be named so.
fn family_name(group: &str, name: &str) -> String {
    format!("mote_vmm_{group}_{}_total", name.strip_suffix("_count").unwrap_or(name))
}

fn help_of(group: &str, name: &str) -> String {
    format!("As {name} of Firecracker's group {group}.")
}

/// Where the numbers go.
#[derive(Debug)]
pub struct Sink {
    id: String,
    config: MetricsConfig,
    file: File,
    last: Instant,
}

/// The file can't be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot open metrics_path {}", .path.display())]
pub struct OpenError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Opens a file or named pipe to append to. Read access keeps a pipe without a reader from being refused; nothing blocks.
pub fn open_appending(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)
}

impl Sink {
    /// Opens the file.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(id: &str, config: MetricsConfig) -> Result<Self, OpenError> {
        let file = open_appending(&config.metrics_path)
            .map_err(|source| OpenError { path: config.metrics_path.clone(), source })?;
        FILE.store(file.as_raw_fd(), Ordering::Release);
        Ok(Self { id: id.to_owned(), config, file, last: Instant::now() })
    }

    /// Time until the next line is due.
    pub fn due_in(&self) -> Duration {
        INTERVAL.saturating_sub(self.last.elapsed())
    }

    /// Writes a line now.
    ///
    /// # Errors
    /// It could not be written; the numbers are lost for the JSON lines and kept in the totals.
    pub fn flush(&mut self) -> io::Result<()> {
        self.last = Instant::now();
        let written = self.write();
        if written.is_err() {
            MISSED_METRICS_COUNT.add_one();
        }
        written
    }

    fn write(&mut self) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
        let mut line = growth();
        line.insert("utc_timestamp_ms".to_owned(), now.into());
        if self.config.emit_id {
            line.insert("id".to_owned(), self.id.clone().into());
        }
        if !self.config.properties.is_empty() {
            line.insert("properties".to_owned(), json!(self.config.properties));
        }
        let mut line = Value::Object(line).to_string();
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        if let Some(path) = &self.config.prometheus_path {
            let mut temporary = path.as_os_str().to_owned();
            temporary.push(".tmp");
            std::fs::write(&temporary, prometheus(&self.id))?;
            std::fs::rename(&temporary, path)?;
        }
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // Unless another one has come meanwhile.
        let own = self.file.as_raw_fd();
        let _ = FILE.compare_exchange(own, -1, Ordering::AcqRel, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_was_counted_since_the_last_one_and_prometheus_the_totals() {
        let directory = tempfile::tempdir().unwrap();
        let (path, prometheus) = (directory.path().join("m"), directory.path().join("p"));
        let config = serde_json::from_value(json!({
            "metrics_path": path, "emit_id": true, "properties": {"a": "b"}, "prometheus_path": prometheus,
        }));
        let mut sink = Sink::open("vm-1", config.unwrap()).unwrap();
        count_request("PUT", "/vsock", false);
        count_request("PUT", "/vsock", true);
        count_request("PUT", "/no-such-thing", true);
        sink.flush().unwrap();
        sink.flush().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        let requests = |line: &Value| {
            let group = &line["put_api_requests"];
            (group["vsock_count"].as_u64(), group["vsock_fails"].as_u64())
        };
        assert_eq!((requests(&lines[0]), requests(&lines[1])), ((Some(2), Some(1)), (Some(0), Some(0))));
        assert_eq!((&lines[0]["id"], &lines[0]["properties"]["a"]), (&json!("vm-1"), &json!("b")));
        assert!(lines[0]["utc_timestamp_ms"].as_u64() > Some(0));
        let totals = std::fs::read_to_string(&prometheus).unwrap();
        let sample = r#"mote_vmm_api_requests_total{vm="vm-1",method="PUT",resource="vsock"} 2"#;
        assert!(totals.contains(sample), "{totals}");
    }

    /// Groups and their counters in docs/metrics.md: `| group | \`a\` \`b\` … |`, with `_ID` for a device's id.
    fn documented() -> std::collections::BTreeSet<String> {
        let text = include_str!("../../../docs/metrics.md");
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
        rows.flat_map(|row| {
            let (group, rest) = row.split_once("` |").unwrap();
            let names = rest.split('`').skip(1).step_by(2);
            names.map(|name| format!("{group}.{name}")).collect::<Vec<_>>()
        })
        .collect()
    }

    #[test]
    fn the_documented_names_are_exactly_those_emitted() {
        let ids = ["x1", "x2"];
        let blocks = ids.map(|id| device::<BlockMetrics>("block", Some(id)));
        let nets = ids.map(|id| device::<NetMetrics>("net", Some(id)));
        let (vsock, balloon): (_, std::sync::Arc<BalloonMetrics>) =
            (device::<VsockMetrics>("vsock", None), device("balloon", None));
        let entropy = device::<EntropyMetrics>("entropy", None);
        let hotplug = device::<MemoryHotplugMetrics>("memory_hotplug", None);
        let console = device::<ConsoleMetrics>("console", None);
        let pmem = ids.map(|id| device::<PmemMetrics>("pmem", Some(id)));
        let served = ids.map(|id| device::<VhostUserBlockMetrics>("vhost_user_block", Some(id)));
        blocks[0].read_bytes.add(5);
        blocks[1].read_bytes.add(7);
        nets[1].tx_bytes_count.add(9);
        let line = growth();
        assert_eq!((&line["block"]["read_bytes"], &line["block_x2"]["read_bytes"]), (&json!(12), &json!(7)));
        let emitted = line.iter().flat_map(|(group, counters)| {
            let group = group.replace("_x1", "_ID").replace("_x2", "_ID");
            counters.as_object().unwrap().keys().map(move |name| format!("{group}.{name}"))
        });
        assert_eq!(emitted.collect::<std::collections::BTreeSet<_>>(), documented());
        // Prometheus has the same.
        let text = prometheus("vm-1");
        assert!(text.contains("mote_vmm_block_read_bytes_total{vm=\"vm-1\",id=\"x2\"} 7\n"), "{text}");
        assert!(text.contains("mote_vmm_net_tx_bytes_total{vm=\"vm-1\",id=\"x2\"} 9\n"), "{text}");
        let mut families: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let count = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), count, "a family is there once");
        drop((blocks, nets, vsock, balloon, entropy, pmem, hotplug, served, console));
        assert!(growth().get("vsock").is_none(), "devices that are gone are not told of");
    }

    #[test]
    fn only_success_is_timed() {
        let gauge = Gauge::new(7);
        assert_eq!(timed(&gauge, || Err::<(), _>("no")), Err("no"));
        assert_eq!(gauge.load(Ordering::Relaxed), 7);
        timed::<_, ()>(&gauge, || {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        })
        .unwrap();
        assert!(gauge.load(Ordering::Relaxed) >= 1000);
    }

    #[test]
    fn a_path_that_cannot_be_opened_is_named() {
        let config = serde_json::from_value(json!({"metrics_path": "/no/such/place"})).unwrap();
        assert!(Sink::open("x", config).unwrap_err().to_string().contains("/no/such/place"));
    }
}
