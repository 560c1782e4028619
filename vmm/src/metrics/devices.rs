//! What devices and processors count. A device makes its group when it is made ([`device`]); the numbers of one that is gone
//! are gone with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Counter;

/// Counters that are told together.
pub trait Group: Send + Sync {
    /// Names, as Firecracker has them, and counters.
    fn counters(&self) -> Vec<(&'static str, &Counter)>;
}

macro_rules! group {
    ($(#[$doc:meta])* $name:ident { $($(#[$of_field:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            $($(#[$of_field])* pub $field: Counter,)*
        }

        impl $name {
            /// Nothing counted yet.
            pub const fn new() -> Self {
                Self { $($field: Counter::new(),)* }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl Group for $name {
            fn counters(&self) -> Vec<(&'static str, &Counter)> {
                vec![$((stringify!($field), &self.$field),)*]
            }
        }
    };
}

group! {
    /// A drive.
    BlockMetrics {
        /// Bytes that the guest has read.
        read_bytes,
        /// Bytes that the guest has written.
        write_bytes,
        /// Reads that were successful.
        read_count,
        /// Writes that were successful.
        write_count,
        /// Flushes that were successful.
        flush_count,
        /// Requests that failed.
        execute_fails,
        /// Requests that were nonsense or are not supported.
        invalid_reqs_count,
        /// Times that a request waited for the rate limit.
        rate_limiter_throttled_events,
        /// Changes by the API.
        update_count,
        /// Changes by the API that failed.
        update_fails,
    }
}

group! {
    /// A drive that another process serves. Times are added up.
    VhostUserBlockMetrics {
        /// Times that the queues could not be handed over.
        activate_fails,
        /// Times that the configuration could not be read again.
        cfg_fails,
        /// Microseconds of connecting.
        init_time_us,
        /// Microseconds of handing over the queues.
        activate_time_us,
        /// Microseconds of reading the configuration again.
        config_change_time_us,
        /// Times that the backend went away.
        disconnects,
    }
}

group! {
    /// A network interface.
    NetMetrics {
        /// Bytes of frames to the guest.
        rx_bytes_count,
        /// Frames to the guest.
        rx_packets_count,
        /// Times that the guest had no buffer for a frame.
        no_rx_avail_buffer,
        /// Times that frames to the guest waited for the rate limit.
        rx_rate_limiter_throttled,
        /// Times that the tap could not be read.
        tap_read_fails,
        /// Bytes of frames from the guest.
        tx_bytes_count,
        /// Frames from the guest.
        tx_packets_count,
        /// Frames that the tap did not take.
        tap_write_fails,
        /// Frames of an impossible length.
        tx_malformed_frames,
        /// Times that frames from the guest waited for the rate limit.
        tx_rate_limiter_throttled,
        /// Frames from another address than the guest's.
        tx_spoofed_mac_count,
    }
}

group! {
    /// The socket device.
    VsockMetrics {
        /// Bytes of packets to the guest.
        rx_bytes_count,
        /// Packets to the guest.
        rx_packets_count,
        /// Bytes of packets from the guest.
        tx_bytes_count,
        /// Packets from the guest.
        tx_packets_count,
        /// Connections that began.
        conns_added,
        /// Connections that ended.
        conns_removed,
    }
}

group! {
    /// The balloon.
    BalloonMetrics {
        /// Buffers with pages that the guest gave.
        inflate_count,
        /// Buffers with pages that it took back.
        deflate_count,
        /// Statistics that it told.
        stats_updates_count,
        /// Ranges of free pages that it reported.
        free_page_report_count,
        /// Bytes of them.
        free_page_report_freed,
        /// Ranges of free pages that it hinted.
        free_page_hint_count,
        /// Bytes of them.
        free_page_hint_freed,
    }
}

group! {
    /// The virtio console.
    ConsoleMetrics {
        /// Bytes of input that the guest was given.
        rx_bytes_count,
        /// Bytes of the guest's output.
        tx_bytes_count,
        /// Buffers that were nonsense, or gave more than one may.
        invalid_reqs_count,
    }
}

group! {
    /// Memory that can be plugged.
    MemoryHotplugMetrics {
        /// Requests to plug.
        plug_count,
        /// Those that were refused.
        plug_fails,
        /// Bytes that were plugged.
        plug_bytes,
        /// Requests to unplug.
        unplug_count,
        /// Those that were refused.
        unplug_fails,
        /// Bytes that were unplugged.
        unplug_bytes,
        /// Requests to unplug everything.
        unplug_all_count,
        /// Those that were refused.
        unplug_all_fails,
        /// Questions for the state of blocks, and requests of no known kind.
        state_count,
        /// Those that were refused.
        state_fails,
    }
}

group! {
    /// A persistent memory device.
    PmemMetrics {
        /// Times that flushes were served; those that come together are one.
        queue_event_count,
        /// Requests that were nonsense, and flushes that failed.
        event_fails,
        /// Times that a flush waited for the rate limit.
        rate_limiter_throttled_events,
    }
}

group! {
    /// The entropy device.
    EntropyMetrics {
        /// Requests that were served.
        entropy_event_count,
        /// Random bytes that the guest was given.
        entropy_bytes,
        /// Times that a request waited for the rate limit.
        entropy_rate_limiter_throttled,
    }
}

group! {
    /// Exits of all processors.
    VcpuMetrics {
        /// Reads of a port.
        exit_io_in,
        /// Writes of a port.
        exit_io_out,
        /// Reads of a device's register in memory.
        exit_mmio_read,
        /// Writes of a device's register in memory.
        exit_mmio_write,
        /// Times that KVM failed or the guest crashed.
        failures,
    }
}

group! {
    /// The serial port.
    UartMetrics {
        /// Reads of a register.
        read_count,
        /// Bytes of output.
        write_count,
        /// Times that output was written out.
        flush_count,
        /// Reads of no register.
        missed_read_count,
        /// Writes of no register.
        missed_write_count,
        /// Bytes that the limit let not pass.
        rate_limiter_dropped_bytes,
    }
}

group! {
    /// The keyboard controller.
    I8042Metrics {
        /// Reads.
        read_count,
        /// Writes.
        write_count,
        /// Resets of the machine.
        reset_count,
        /// Reads of several bytes.
        missed_read_count,
        /// Writes of several bytes.
        missed_write_count,
    }
}

group! {
    /// Signals that the process got for a limit.
    SignalMetrics {
        /// A file was to grow beyond the limit.
        sigxfsz,
        /// More processor time was used than the limit.
        sigxcpu,
    }
}

group! {
    /// The seccomp filters.
    SeccompMetrics {
        /// Calls that were refused: one, and then the process ends.
        num_faults,
    }
}

group! {
    /// The metadata service, of all interfaces together.
    MmdsMetrics {
        /// Frames that went to the service instead of the network.
        rx_accepted,
        /// Requests that are no HTTP.
        rx_accepted_err,
        /// Frames without an Ethernet header.
        rx_bad_eth,
        /// Frames that were understood.
        rx_count,
        /// Requests with a token that is not good.
        rx_invalid_token,
        /// Requests without a token.
        rx_no_token,
        /// Bytes of frames to the guest.
        tx_bytes,
        /// Times that a frame was given to the guest.
        tx_count,
        /// Frames to the guest.
        tx_frames,
        /// TCP connections that began.
        connections_created,
        /// TCP connections that ended.
        connections_destroyed,
    }
}

/// A device's group.
struct Registered {
    kind: &'static str,
    id: Option<String>,
    group: Weak<dyn Group>,
}

static DEVICES: Mutex<Vec<Registered>> = Mutex::new(Vec::new());

fn devices() -> MutexGuard<'static, Vec<Registered>> {
    DEVICES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The group of a new device; `kind` is Firecracker's name for such devices, `id` tells several apart.
pub fn device<G: Group + Default + 'static>(kind: &'static str, id: Option<&str>) -> Arc<G> {
    let group = Arc::new(G::default());
    let as_group: Arc<dyn Group> = group.clone();
    let mut devices = devices();
    devices.retain(|device| device.group.strong_count() > 0);
    devices.push(Registered { kind, id: id.map(str::to_owned), group: Arc::downgrade(&as_group) });
    group
}

/// What each group of the devices that there are grew by since the last call: those of a kind together under the kind's
/// name, and those with an id also under `KIND_ID`.
pub(super) fn growth() -> BTreeMap<String, BTreeMap<&'static str, u64>> {
    let mut groups: BTreeMap<String, BTreeMap<&'static str, u64>> = BTreeMap::new();
    for device in devices().iter() {
        let Some(group) = device.group.upgrade() else { continue };
        for (name, counter) in group.counters() {
            let grown = counter.take_growth();
            let all = groups.entry(device.kind.to_owned()).or_default().entry(name).or_default();
            *all = all.wrapping_add(grown);
            if let Some(id) = &device.id {
                groups.entry(format!("{}_{id}", device.kind)).or_default().insert(name, grown);
            }
        }
    }
    groups
}

/// The totals of each counter of a kind, by device: labels and value.
pub(super) fn totals() -> BTreeMap<(&'static str, &'static str), Vec<(String, u64)>> {
    let mut families: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for device in devices().iter() {
        let Some(group) = device.group.upgrade() else { continue };
        for (name, counter) in group.counters() {
            // An id has letters, digits and underscores only.
            let labels = device.id.as_ref().map_or_else(String::new, |id| format!(",id=\"{id}\""));
            families.entry((device.kind, name)).or_default().push((labels, counter.total()));
        }
    }
    families
}
