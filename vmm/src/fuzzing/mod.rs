//! What reads the bytes of guests and tenants, as functions of bytes.
//!
//! `cargo xtask fuzz` runs each under libFuzzer (the program in `vmm/fuzz`); a test replays the kept corpus. A target must come
//! back from any input; a panic is a finding. Only there with `cfg(test)` and the feature `fuzzing`.

mod devices;
mod files;
mod network;
mod ports;
#[cfg(test)]
mod tests;

/// A target: its name, which is also that of its corpus, and what it does with an input.
pub struct Target {
    /// Name.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "balloon", run: devices::balloon },
    Target { name: "block", run: devices::block },
    Target { name: "console", run: devices::console },
    Target { name: "disk", run: files::disk },
    Target { name: "http", run: network::http },
    Target { name: "kernel", run: files::kernel },
    Target { name: "mem", run: devices::mem },
    Target { name: "mmds", run: network::mmds },
    Target { name: "net", run: devices::net },
    Target { name: "pci", run: devices::pci },
    Target { name: "pmem", run: devices::pmem },
    Target { name: "ports", run: ports::ports },
    Target { name: "qcow2", run: files::qcow2 },
    Target { name: "rng", run: devices::rng },
    Target { name: "snapshot", run: ports::snapshot },
    Target { name: "vhost", run: devices::vhost },
    Target { name: "vsock", run: devices::vsock },
];

/// An input as a stream of numbers and pieces.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// As many bytes as a length before them says, or what is left.
    fn piece(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.u16()?).min(self.0.len());
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(piece)
    }
}
