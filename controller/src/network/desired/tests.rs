//! The plan at scale: 10,000 ports on 100 hosts.

use mote_host_api::Remote;

use super::{
    plan::plan,
    rehearsal::{HOSTS, cloud, concerned, id},
    rows::*,
};

#[test]
fn a_change_of_a_group_of_1000_is_told_to_its_hosts_only() {
    let mut rows = cloud();
    let group = id(6, 0);
    assert_eq!(rows.members.iter().filter(|member| member.security_group_id == group).count(), 1000);
    let before: Vec<_> = {
        let index = Index::new(&rows).unwrap();
        rows.hosts.iter().map(|host| plan(&index, &host.id).unwrap()).collect()
    };
    let member = rows.members.iter_mut().find(|member| member.security_group_id == group).unwrap();
    member.address = Some("10.99.0.1".into());
    let hosts = concerned(&rows, &group);
    let index = Index::new(&rows).unwrap();
    let told: Vec<_> = hosts.iter().map(|host| plan(&index, host).unwrap()).collect();
    assert!(hosts.len() < HOSTS as usize, "{}", hosts.len());
    for (state, host) in told.iter().zip(&hosts) {
        let set = state.address_sets.iter().find(|set| set.id.to_string() == group).unwrap();
        assert_eq!(set.addresses.len(), 1000, "{host}");
        let rules = state.security_groups.iter().flat_map(|group| &group.rules);
        assert!(
            rules.clone().count() > 0
                && rules.into_iter().all(|rule| matches!(rule.remote, Some(Remote::Set(_))))
        );
    }
    // Who is not concerned is told the same as before; who is, is not.
    for (host, before) in rows.hosts.iter().zip(&before) {
        let same = plan(&index, &host.id).unwrap() == *before;
        assert_eq!(same, !hosts.contains(&host.id), "{}", host.id);
    }
}

#[test]
fn a_host_without_ports_is_told_nothing_but_its_tunnel() {
    let mut rows = cloud();
    rows.hosts.push(HostRow { id: id(4, 500), tunnel_ip: None });
    let state = plan(&Index::new(&rows).unwrap(), &id(4, 500)).unwrap();
    assert_eq!(state, super::HostNetworks::default());
}
