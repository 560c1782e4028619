use std::collections::{BTreeMap, BTreeSet};

use mote_host_api::HostId;
use proptest::prelude::*;
use uuid::Uuid;

use super::{Rng, *};

fn host(number: u128, zone: &str) -> HostView {
    HostView {
        id: HostId(Uuid::from_u128(number)),
        name: format!("host-{number}"),
        zone: zone.into(),
        up: true,
        enabled: true,
        aggregates: aggregates::Metadata::new(),
        traits: BTreeSet::from(["CUSTOM_KVM".to_owned()]),
        capacity: Resources { vcpus: 4, memory_mib: 4096, disk_gib: 100 },
        used: Resources::default(),
        servers: 0,
    }
}

fn small() -> Request {
    Request { resources: Resources { vcpus: 1, memory_mib: 256, disk_gib: 1 }, ..Request::default() }
}

fn place(hosts: &mut [HostView], request: &Request, policy: Policy, count: usize) -> Vec<HostId> {
    let rules = Rules { policy, ..Rules::default() };
    let mut rng = Rng::seeded(7);
    (0..count)
        .map(|_| {
            let id = schedule(request, hosts, &rules, &mut rng).expect("a host fits");
            hosts.iter_mut().find(|host| host.id == id).expect("known").claim(request.resources);
            id
        })
        .collect()
}

#[test]
fn least_loaded_spreads_four_servers_over_two_hosts_evenly() {
    let mut hosts = [host(1, "nova"), host(2, "nova")];
    place(&mut hosts, &small(), Policy::LeastLoaded, 4);
    assert_eq!(hosts.each_ref().map(|host| host.servers), [2, 2]);
}

#[test]
fn by_zone_evens_zones_before_hosts() {
    let mut hosts = [host(1, "a"), host(2, "a"), host(3, "b")];
    place(&mut hosts, &small(), Policy::ByZone, 6);
    assert_eq!(hosts.iter().map(|host| host.servers).collect::<Vec<_>>(), [2, 1, 3]);
}

#[test]
fn random_with_one_seed_repeats_and_uses_every_host() {
    let mut first = [host(1, "nova"), host(2, "nova"), host(3, "nova")];
    let mut second = first.clone();
    let chosen = place(&mut first, &small(), Policy::Random, 12);
    assert_eq!(chosen, place(&mut second, &small(), Policy::Random, 12));
    assert!(first.iter().all(|host| host.servers > 0), "{first:?}");
}

#[test]
fn each_filter_names_its_reason() {
    let mut hosts: Vec<HostView> = (1..=7).map(|number| host(number, "nova")).collect();
    hosts[0].up = false;
    hosts[1].enabled = false;
    hosts[2].zone = "other".into();
    hosts[3].traits.clear();
    hosts[4].used.vcpus = 16;
    hosts[5].used.memory_mib = 3700;
    hosts[6].used.disk_gib = 100;
    let request = Request {
        zone: Some("nova".into()),
        required_traits: BTreeSet::from(["CUSTOM_KVM".to_owned()]),
        ..small()
    };
    let error = schedule(&request, &hosts, &Rules::default(), &mut Rng::seeded(0)).expect_err("none fits");
    let reasons: Vec<Refusal> = error.reasons.iter().map(|(_, refusal)| refusal.clone()).collect();
    assert_eq!(
        reasons,
        [
            Refusal::Down,
            Refusal::Disabled,
            Refusal::OtherZone,
            Refusal::LacksTrait("CUSTOM_KVM".into()),
            Refusal::Vcpus,
            Refusal::Memory,
            Refusal::Disk,
        ]
    );
    let text = error.to_string();
    assert!(text.starts_with("No valid host was found. "), "{text}");
    assert!(text.contains("lacks trait CUSTOM_KVM (1)") && !text.contains("host-"), "{text}");
}

#[test]
fn a_named_host_is_the_only_candidate() {
    let hosts = [host(1, "nova"), host(2, "nova")];
    let request = Request { host: Some("host-2".into()), ..small() };
    let chosen = schedule(&request, &hosts, &Rules::default(), &mut Rng::seeded(0));
    assert_eq!(chosen, Ok(hosts[1].id));
}

#[test]
fn a_guest_wider_than_the_host_is_refused_in_spite_of_overcommitment() {
    let mut request = small();
    request.resources.vcpus = 5;
    let error = schedule(&request, &[host(1, "nova")], &Rules::default(), &mut Rng::seeded(0));
    assert_eq!(error.expect_err("5 of 4").reasons[0].1, Refusal::Vcpus);
}

#[test]
fn policy_names_round_trip() {
    for policy in Policy::ALL {
        assert_eq!(Policy::from_name(policy.name()), Some(policy));
        assert_eq!(serde_json::to_value(policy).expect("serializes"), policy.name());
    }
    assert_eq!(Policy::from_name("best"), None);
}

fn any_host(number: u128) -> impl Strategy<Value = HostView> {
    let numbers = (1..16u64, 512..8192u64, 0..50u64, 0..20u64, 0..4096u64, 0..20u64, 0..9u32);
    (numbers, any::<bool>(), any::<bool>(), any::<bool>(), 0..3u8).prop_map(
        move |(
            (vcpus, memory_mib, disk_gib, used_vcpus, used_memory, used_disk, servers),
            up,
            enabled,
            kvm,
            zone,
        )| {
            HostView {
                zone: format!("zone-{zone}"),
                up,
                enabled,
                traits: kvm.then(|| "CUSTOM_KVM".to_owned()).into_iter().collect(),
                capacity: Resources { vcpus, memory_mib, disk_gib },
                used: Resources { vcpus: used_vcpus, memory_mib: used_memory, disk_gib: used_disk },
                servers,
                ..host(number, "")
            }
        },
    )
}

fn any_hosts() -> impl Strategy<Value = Vec<HostView>> {
    (0..8usize).prop_flat_map(|count| (0..count).map(|n| any_host(n as u128 + 1)).collect::<Vec<_>>())
}

fn any_request() -> impl Strategy<Value = Request> {
    (1..8u64, 64..4096u64, 0..20u64, any::<bool>(), proptest::option::of(0..3u8)).prop_map(
        |(vcpus, memory_mib, disk_gib, kvm, zone)| Request {
            resources: Resources { vcpus, memory_mib, disk_gib },
            required_traits: kvm.then(|| "CUSTOM_KVM".to_owned()).into_iter().collect(),
            zone: zone.map(|zone| format!("zone-{zone}")),
            ..Request::default()
        },
    )
}

proptest! {
    /// What is chosen fits by every rule; what is refused is refused for every host, whatever the policy.
    #[test]
    fn a_choice_fits_and_a_refusal_is_complete(
        hosts in any_hosts(), request in any_request(), policy in 0..3usize, seed in any::<u64>(),
    ) {
        let rules = Rules { policy: Policy::ALL[policy], ..Rules::default() };
        let limit = |host: &HostView| rules.ratios.apply(host.capacity);
        let fits = |host: &HostView| {
            let (free, want) = (limit(host), request.resources);
            host.up && host.enabled
                && request.zone.as_ref().is_none_or(|zone| *zone == host.zone)
                && request.required_traits.is_subset(&host.traits)
                && want.vcpus <= host.capacity.vcpus
                && host.used.vcpus + want.vcpus <= free.vcpus
                && host.used.memory_mib + want.memory_mib <= free.memory_mib
                && (want.disk_gib == 0 || host.used.disk_gib + want.disk_gib <= free.disk_gib)
        };
        match schedule(&request, &hosts, &rules, &mut Rng::seeded(seed)) {
            Ok(id) => {
                let chosen = hosts.iter().find(|host| host.id == id).expect("one of the given");
                prop_assert!(fits(chosen));
                if rules.policy == Policy::LeastLoaded {
                    let load = |host: &HostView| Load::of(host, &rules.ratios);
                    prop_assert!(hosts.iter().filter(|host| fits(host)).all(|host| load(chosen) <= load(host)));
                }
            }
            Err(error) => {
                prop_assert!(!hosts.iter().any(fits));
                let named: BTreeMap<_, _> = error.reasons.into_iter().collect();
                prop_assert_eq!(named.len(), hosts.len());
            }
        }
    }

    /// Filling a cloud by any policy never promises more than the ratios allow.
    #[test]
    fn filling_up_never_overcommits(mut hosts in any_hosts(), policy in 0..3usize, seed in any::<u64>()) {
        for host in &mut hosts {
            host.used = Resources::default();
        }
        let rules = Rules { policy: Policy::ALL[policy], ..Rules::default() };
        let mut rng = Rng::seeded(seed);
        while let Ok(id) = schedule(&small(), &hosts, &rules, &mut rng) {
            hosts.iter_mut().find(|host| host.id == id).expect("known").claim(small().resources);
        }
        for host in &hosts {
            let limit = rules.ratios.apply(host.capacity);
            prop_assert!(host.used.vcpus <= limit.vcpus && host.used.memory_mib <= limit.memory_mib);
            prop_assert!(host.used.disk_gib <= limit.disk_gib);
        }
    }
}
