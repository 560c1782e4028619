//! The API's and the metadata service's bytes.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use mote_vmm_api::{MmdsConfig, MmdsVersion};
use serde_json::json;

use super::Input;
use crate::api::http::{self, MAX_BODY, Parse};
use crate::api::requests;
use crate::mmds::{Endpoint, Mmds, SharedMmds};

/// Most frames of one input.
const MAX_STEPS: usize = 200;

/// What a client of the API socket sends, and what stands in a config file.
pub fn http(data: &[u8]) {
    let mut rest = data;
    while let Parse::Complete(request, length) = http::parse(rest, MAX_BODY) {
        assert!(length > 0 && length <= rest.len());
        let _ = requests::parse(&request);
        rest = &rest[length..];
    }
    let _ = requests::parse_config_file(data);
}

/// Frames of a guest: as they are, or with the headers of a segment to the service that fits what it said last.
pub fn mmds(data: &[u8]) {
    let mut mmds = Mmds::new("fuzz", 100_000).expect("random numbers");
    mmds.configure(&MmdsConfig { version: MmdsVersion::V2, ..MmdsConfig::default() });
    mmds.put(json!({"a": {"b": "c"}, "long": "x".repeat(20_000)})).expect("it fits");
    let address = Ipv4Addr::new(169, 254, 169, 254);
    let mut endpoint = Endpoint::new(SharedMmds::new(mmds), address).expect("random numbers");
    let mut now = Instant::now();
    let mut input = Input(data);
    // The service's next byte and the guest's.
    let (mut theirs, mut ours) = (0u32, 1u32);
    for _ in 0..MAX_STEPS {
        let Some(step) = input.byte() else { break };
        match step % 8 {
            0 => {
                let Some(frame) = input.piece() else { break };
                let _ = endpoint.wants(frame);
                endpoint.receive(frame, now);
            }
            1 => now += Duration::from_millis(input.u16().unwrap_or(0).into()),
            2 => endpoint.reset(),
            kind => {
                let Some(payload) = input.piece() else { break };
                let flags = [0x02, 0x18, 0x10, 0x11, step >> 3][usize::from(kind) - 3];
                let port = 5000 + u16::from(step >> 6);
                endpoint.receive(&segment(port, ours, theirs, flags, payload), now);
                ours = ours.wrapping_add(payload.len() as u32 + u32::from(flags & 3 != 0));
            }
        }
        while let Some(frame) = endpoint.next_frame(now) {
            assert!(frame.len() <= 1514);
            if let Some(sequence) = frame.get(38..42).and_then(|bytes| bytes.try_into().ok()) {
                theirs = u32::from_be_bytes(sequence).wrapping_add(1);
            }
        }
        assert!(endpoint.delay(now).is_none_or(|delay| delay <= Duration::from_secs(100)));
    }
}

/// A TCP segment from a guest, in an Ethernet frame.
fn segment(port: u16, sequence: u32, acknowledged: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = 40 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 169, 254, 1, 3, 169, 254, 169, 254]);
    let sum: u32 = ip.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(port.to_be_bytes());
    ip.extend([0, 80]);
    ip.extend(sequence.to_be_bytes());
    ip.extend(acknowledged.to_be_bytes());
    ip.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    ip.extend(payload);
    [&[6, 1, 0x23, 0x45, 0x67, 1, 6, 0, 0, 0, 0, 2, 8, 0], &ip[..]].concat()
}
