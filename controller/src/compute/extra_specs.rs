//! What a flavor's extra specs may say, and what the devices of its servers get of it.
//!
//! Keys are Nova's (its configuration reference, "Extra specs"). Those of Nova's namespaces that nothing here would act upon
//! are refused, as Nova refuses those that it doesn't know; keys without a namespace and with others are the operator's own.

use std::collections::BTreeMap;

use mote_host_api::{Bucket, DeviceSpec};
use serde_json::Value;

use crate::http::error::ApiError;

/// Longest key and value.
const MAX_TEXT: usize = 255;
/// Namespaces in which Nova gives every key a meaning.
const NOVAS: [&str; 12] = [
    "accel",
    "capabilities",
    "hw",
    "hw_rng",
    "hw_video",
    "os",
    "pci_passthrough",
    "pcf",
    "powervm",
    "quota",
    "resources",
    "vmware",
];
/// `hw_rng:rate_period` where only the bytes are given, in milliseconds.
const RANDOM_PERIOD_MS: u64 = 1000;
/// A bucket without a burst holds what flows in this time, in milliseconds.
const BURST_MS: u64 = 100;
/// Largest rate: more than any device moves, and far from what arithmetic can hold.
const MAX_RATE: u64 = 1 << 50;

/// What a value has to be.
#[derive(Clone, Copy)]
enum Kind {
    /// Whole, from 1.
    Rate,
    Flag,
    /// The only values that say what is so anyway.
    Only(&'static [&'static str]),
}

/// Keys with a meaning, besides `trait:…` and `aggregate_instance_extra_specs:…`.
const KEYS: &[(&str, Kind)] = &[
    ("quota:disk_total_bytes_sec", Kind::Rate),
    ("quota:disk_total_iops_sec", Kind::Rate),
    ("quota:vif_inbound_average", Kind::Rate),
    ("quota:vif_inbound_burst", Kind::Rate),
    ("quota:vif_outbound_average", Kind::Rate),
    ("quota:vif_outbound_burst", Kind::Rate),
    ("hw_rng:allowed", Kind::Flag),
    ("hw_rng:rate_bytes", Kind::Rate),
    ("hw_rng:rate_period", Kind::Rate),
    ("hw:cpu_policy", Kind::Only(&["shared"])),
    ("hw:mem_page_size", Kind::Only(&["small", "any"])),
    ("hw:numa_nodes", Kind::Only(&["1"])),
    ("hw:vif_multiqueue_enabled", Kind::Only(&["false", "no", "0"])),
];

/// The value of a key as it is stored.
pub(super) fn checked(key: &str, value: &Value) -> Result<String, ApiError> {
    let fits = (1..=MAX_TEXT).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b" -_.:".contains(&b));
    if !fits {
        return Err(bad(format!(
            "extra_specs: a key has 1 to {MAX_TEXT} letters, digits and - _ . : or space."
        )));
    }
    let value = match value {
        Value::String(text) if text.chars().count() <= MAX_TEXT => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => {
            return Err(bad(format!(
                "extra_specs: the value of {key} must be a text of {MAX_TEXT} characters at most."
            )));
        }
    };
    match wrong(key, &value) {
        Some(why) => Err(bad(format!("Validation failed; extra spec {key} {why}."))),
        None => Ok(value),
    }
}

fn bad(text: String) -> ApiError {
    ApiError::BadRequest(text)
}

fn wrong(key: &str, value: &str) -> Option<String> {
    let (namespace, _) = key.split_once(':')?;
    if namespace == "trait" {
        let known = matches!(value, "required" | "forbidden");
        return (!known).then(|| "must be required or forbidden".to_owned());
    }
    match KEYS.iter().find(|(name, _)| *name == key) {
        Some((_, Kind::Rate)) if rate(value).is_none() => {
            Some(format!("must be a whole number from 1 to {MAX_RATE}"))
        }
        Some((_, Kind::Flag)) if flag(value).is_none() => Some("must be true or false".to_owned()),
        Some((_, Kind::Only(known))) if !known.contains(&value.to_ascii_lowercase().as_str()) => {
            Some(format!("can only be {} here", known.join(" or ")))
        }
        Some(_) => None,
        None if NOVAS.contains(&namespace) => {
            let known: Vec<_> = KEYS.iter().map(|(name, _)| *name).collect();
            Some(format!("would have no effect; those that have one are {}", known.join(", ")))
        }
        None => None,
    }
}

fn rate(value: &str) -> Option<u64> {
    value.parse().ok().filter(|rate| (1..=MAX_RATE).contains(rate))
}

fn flag(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "yes" | "1" => Some(true),
        "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// What the devices of a server get of its flavor's extra specs. What was stored before it was checked counts only where it
/// makes sense.
pub(crate) fn devices(specs: &BTreeMap<String, String>) -> DeviceSpec {
    let given = |key: &str| specs.get(key).and_then(|value| rate(value));
    // Nova's rates of interfaces count 1,000 bytes, as libvirt does.
    let interface = |way: &str| {
        let average = given(&format!("quota:vif_{way}_average"))?;
        let burst = given(&format!("quota:vif_{way}_burst"));
        Some(bucket(average.saturating_mul(1000), burst.map(|burst| burst.saturating_mul(1000))))
    };
    let period = given("hw_rng:rate_period").unwrap_or(RANDOM_PERIOD_MS);
    DeviceSpec {
        without_random: specs.get("hw_rng:allowed").and_then(|value| flag(value)) == Some(false),
        random_bytes: given("hw_rng:rate_bytes").map(|tokens| Bucket { tokens, refill_ms: period }),
        disk_bytes: given("quota:disk_total_bytes_sec").map(|rate| bucket(rate, None)),
        disk_operations: given("quota:disk_total_iops_sec").map(|rate| bucket(rate, None)),
        received_bytes: interface("inbound"),
        sent_bytes: interface("outbound"),
    }
}

/// A bucket through which `rate` tokens flow in a second.
fn bucket(rate: u64, burst: Option<u64>) -> Bucket {
    let tokens = burst.unwrap_or(rate.saturating_mul(BURST_MS) / 1000).max(1);
    // Rounded up: never more than was asked for.
    let refill_ms = u128::from(tokens).saturating_mul(1000).div_ceil(u128::from(rate));
    Bucket { tokens, refill_ms: u64::try_from(refill_ms).unwrap_or(u64::MAX).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn specs(given: &[(&str, &str)]) -> BTreeMap<String, String> {
        given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_would_have_no_effect_is_refused() {
        for (key, value) in [
            ("hw:cpu_policy", "dedicated"),
            ("hw:mem_page_size", "large"),
            ("hw:watchdog_action", "reset"),
            ("quota:disk_read_bytes_sec", "1"),
            ("quota:disk_total_bytes_sec", "many"),
            ("quota:disk_total_bytes_sec", "0"),
            ("hw_rng:allowed", "perhaps"),
            ("resources:VGPU", "1"),
            ("trait:X", "yes"),
        ] {
            assert!(checked(key, &json!(value)).is_err(), "{key}={value}");
        }
        for (key, value) in [
            ("hw:cpu_policy", "shared"),
            ("hw:mem_page_size", "any"),
            ("hw_rng:allowed", "True"),
            ("quota:vif_inbound_average", "1024"),
            ("trait:X", "required"),
            ("trait_of_ours", "x"),
            ("acme:color", "blue"),
            ("aggregate_instance_extra_specs:rack", "7"),
        ] {
            assert_eq!(checked(key, &json!(value)).unwrap(), value, "{key}");
        }
        assert_eq!(checked("quota:vif_inbound_burst", &json!(7)).unwrap(), "7");
    }

    #[test]
    fn devices_get_buckets_and_nothing_of_what_makes_no_sense() {
        let given = specs(&[
            ("quota:disk_total_bytes_sec", "10000000"),
            ("quota:disk_total_iops_sec", "5"),
            ("quota:vif_inbound_average", "1024"),
            ("quota:vif_inbound_burst", "4096"),
            ("quota:vif_outbound_burst", "4096"),
            ("hw_rng:allowed", "no"),
            ("hw_rng:rate_bytes", "64"),
            ("quota:vif_outbound_average", "fast"),
        ]);
        let wanted = DeviceSpec {
            without_random: true,
            random_bytes: Some(Bucket { tokens: 64, refill_ms: 1000 }),
            disk_bytes: Some(Bucket { tokens: 1_000_000, refill_ms: 100 }),
            disk_operations: Some(Bucket { tokens: 1, refill_ms: 200 }),
            received_bytes: Some(Bucket { tokens: 4_096_000, refill_ms: 4000 }),
            sent_bytes: None,
        };
        assert_eq!(devices(&given), wanted);
        assert_eq!(devices(&specs(&[])), DeviceSpec::default());
    }

    proptest! {
        #[test]
        fn no_more_flows_than_was_asked_for(rate in 1..=MAX_RATE, burst in prop::option::of(1..=MAX_RATE)) {
            let bucket = bucket(rate, burst);
            prop_assert!(u128::from(bucket.tokens) * 1000 <= u128::from(rate) * u128::from(bucket.refill_ms));
            prop_assert!(bucket.tokens > 0 && bucket.refill_ms > 0);
        }
    }
}
