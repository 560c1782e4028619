//! Rules of security groups, checked as Neutron checks them.

use std::collections::HashMap;

use ipnet::IpNet;
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope, address_groups,
    attributes::{Attributes, range},
    listing::{Collection, Query},
    quotas, reach,
    resource::{Change, Resource},
    security_groups,
};
use crate::{
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Protocols that have names, with their numbers (IANA; Neutron's list).
const PROTOCOLS: [(&str, u8); 25] = [
    ("ah", 51),
    ("dccp", 33),
    ("egp", 8),
    ("esp", 50),
    ("gre", 47),
    ("hopopt", 0),
    ("icmp", 1),
    ("igmp", 2),
    ("ip", 0),
    ("ipip", 4),
    ("ipv6-encap", 41),
    ("ipv6-frag", 44),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("ipv6-nonxt", 59),
    ("ipv6-opts", 60),
    ("ipv6-route", 43),
    ("ospf", 89),
    ("pgm", 113),
    ("rsvp", 46),
    ("sctp", 132),
    ("tcp", 6),
    ("udp", 17),
    ("udplite", 136),
    ("vrrp", 112),
];
/// Protocols whose rules can have ports: what hosts can match (Neutron also lets UDP-Lite and DCCP have them).
const WITH_PORTS: [u8; 3] = [6, 17, 132];
const ICMP: [u8; 2] = [1, 58];

/// Rules as resources.
pub(super) struct SecurityGroupRules;

/// A rule as stored.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct RuleRow {
    /// Id.
    pub(crate) id: String,
    /// Its group.
    pub(crate) security_group_id: String,
    project_id: String,
    description: String,
    /// `ingress` or `egress`.
    pub(crate) direction: String,
    /// `IPv4` or `IPv6`.
    pub(crate) ethertype: String,
    /// Name or number.
    pub(crate) protocol: Option<String>,
    /// First port, or ICMP type.
    pub(crate) port_range_min: Option<i64>,
    /// Last port, or ICMP code.
    pub(crate) port_range_max: Option<i64>,
    /// The other side's addresses.
    pub(crate) remote_ip_prefix: Option<String>,
    /// The other side's group.
    pub(crate) remote_group_id: Option<String>,
    /// The other side's addresses by name.
    pub(crate) remote_address_group_id: Option<String>,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

impl RuleRow {
    /// A rule that lets TCP in from the members of a group, for rehearsals.
    pub(super) fn tcp_between(id: &str, group: &str, remote: Option<&str>) -> Self {
        Self {
            id: id.into(),
            security_group_id: group.into(),
            project_id: String::new(),
            description: String::new(),
            direction: "ingress".into(),
            ethertype: "IPv4".into(),
            protocol: Some("tcp".into()),
            port_range_min: Some(80),
            port_range_max: Some(80),
            remote_ip_prefix: None,
            remote_group_id: remote.map(str::to_owned),
            remote_address_group_id: None,
            revision: 1,
            created_us: 0,
            updated_us: 0,
        }
    }
}

impl RuleRow {
    /// The document.
    pub(super) fn document(&self) -> Value {
        let normalized = self.remote_ip_prefix.as_ref().and_then(|text| text.parse::<IpNet>().ok());
        json!({
            "id": self.id, "security_group_id": self.security_group_id, "project_id": self.project_id,
            "tenant_id": self.project_id, "description": self.description, "direction": self.direction,
            "ethertype": self.ethertype, "protocol": self.protocol, "port_range_min": self.port_range_min,
            "port_range_max": self.port_range_max, "remote_ip_prefix": self.remote_ip_prefix,
            "normalized_cidr": normalized.map(|net| net.trunc().to_string()),
            "remote_group_id": self.remote_group_id, "remote_address_group_id": self.remote_address_group_id,
            "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        })
    }
}

/// The number of a protocol's name or number.
pub(crate) fn protocol_number(text: &str) -> Option<u8> {
    let named = PROTOCOLS.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
    named.or_else(|| text.parse().ok())
}

/// What a rule says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Rule {
    direction: &'static str,
    ethertype: &'static str,
    protocol: Option<String>,
    ports: Option<(i64, i64)>,
    /// Type and code of ICMP.
    icmp: (Option<i64>, Option<i64>),
    remote_ip_prefix: Option<String>,
    remote_group_id: Option<String>,
    remote_address_group_id: Option<String>,
}

fn refused(name: &'static str, text: impl Into<String>) -> ApiError {
    ApiError::BadRequest(text.into()).named(name)
}

fn ethertype(body: &mut Attributes) -> Result<&'static str, ApiError> {
    let Some(value) = body.value("ethertype").filter(|value| !value.is_null()) else { return Ok("IPv4") };
    let text = value.as_str().unwrap_or_default();
    let known = ["IPv4", "IPv6"].into_iter().find(|known| known.eq_ignore_ascii_case(text));
    known.ok_or_else(|| {
        let text = format!(
            "Security group rule for ethertype '{text}' not supported. Allowed values are ['IPv4', 'IPv6']."
        );
        refused("SecurityGroupRuleInvalidEtherType", text)
    })
}

fn protocol(body: &mut Attributes, ethertype: &str) -> Result<Option<String>, ApiError> {
    let text = match body.value("protocol") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text.to_ascii_lowercase(),
        Some(other) => other.to_string(),
    };
    if text == "any" {
        return Ok(None);
    }
    let Some(number) = protocol_number(&text) else {
        let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
        let text = format!(
            "Security group rule protocol {text} not supported. Only protocol values {names:?} and integer \
             representations [0 to 255] are supported."
        );
        return Err(refused("SecurityGroupRuleInvalidProtocol", text));
    };
    // ICMP's old names mean that of the ethertype.
    let text = match (ethertype, text.as_str()) {
        ("IPv6", "icmp" | "icmpv6") => "ipv6-icmp".to_owned(),
        ("IPv6", "1") => "58".to_owned(),
        _ => text,
    };
    let only_ipv6 = text.starts_with("ipv6-") && text != "ipv6-encap" || text == "icmpv6" || number == 58;
    match ethertype == "IPv4" && only_ipv6 {
        true => Err(refused(
            "SecurityGroupEthertypeConflictWithProtocol",
            format!("Invalid ethertype {ethertype} for protocol {text}."),
        )),
        false => Ok(Some(text)),
    }
}

fn port(body: &mut Attributes, name: &str) -> Result<Option<i64>, ApiError> {
    let value = match body.value(name) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    let number = value.as_i64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
    number.filter(|number| (0..=65535).contains(number)).map(Some).ok_or_else(|| {
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        refused("SecurityGroupInvalidPortValue", format!("Invalid value for port {shown}"))
    })
}

impl Rule {
    fn parse(body: &mut Attributes) -> Result<Self, ApiError> {
        let direction = body.word("direction", &["ingress", "egress"])?.ok_or_else(|| {
            ApiError::BadRequest(
                "Failed to parse request. Required attribute 'direction' not specified".into(),
            )
        })?;
        let ethertype = ethertype(body)?;
        let mut rule = Self { direction, ethertype, protocol: protocol(body, ethertype)?, ..Self::default() };
        let (min, max) = (port(body, "port_range_min")?, port(body, "port_range_max")?);
        rule.set_ports(min, max)?;
        rule.remote_ip_prefix =
            match body.nullable("remote_ip_prefix")?.flatten().filter(|text| !text.is_empty()) {
                Some(text) => Some(rule.prefix(&text)?),
                None => None,
            };
        // Neutron looks it up whatever it looks like: what isn't an id is a group that isn't there.
        rule.remote_group_id = body.nullable("remote_group_id")?.flatten();
        rule.remote_address_group_id = body.nullable_id("remote_address_group_id")?.flatten();
        let remotes = [&rule.remote_ip_prefix, &rule.remote_group_id, &rule.remote_address_group_id];
        match remotes.into_iter().flatten().count() > 1 {
            true => Err(refused(
                "SecurityGroupMultipleRemoteEntites",
                "Only one of remote_ip_prefix or remote_group_id or remote_address_group_id may be provided.",
            )),
            false => Ok(rule),
        }
    }

    fn prefix(&self, text: &str) -> Result<String, ApiError> {
        let net = range(text)?;
        match matches!(net, IpNet::V4(_)) == (self.ethertype == "IPv4") {
            true => Ok(net.to_string()),
            false => Err(refused(
                "SecurityGroupRuleParameterConflict",
                format!("Conflicting value ethertype {} for CIDR {text}", self.ethertype),
            )),
        }
    }

    fn set_ports(&mut self, min: Option<i64>, max: Option<i64>) -> Result<(), ApiError> {
        if min.is_none() && max.is_none() {
            return Ok(());
        }
        let Some(name) = &self.protocol else {
            return Err(refused(
                "SecurityGroupProtocolRequiredWithPorts",
                "Must also specify protocol if port range is given.",
            ));
        };
        let number = protocol_number(name).unwrap_or_default();
        if WITH_PORTS.contains(&number) {
            return match (min, max) {
                (Some(0), _) | (_, Some(0)) => {
                    Err(refused("SecurityGroupInvalidPortValue", "Invalid value for port 0"))
                }
                // All ports are the protocol without ports.
                (Some(1), Some(65535)) => Ok(()),
                (Some(min), Some(max)) if min <= max => {
                    self.ports = Some((min, max));
                    Ok(())
                }
                _ => Err(refused(
                    "SecurityGroupInvalidPortRange",
                    "For TCP/UDP protocols, port_range_min must be <= port_range_max",
                )),
            };
        }
        if !ICMP.contains(&number) {
            let text = format!(
                "Ports cannot be specified for protocol {name}. Ports are only supported for tcp, udp, sctp."
            );
            return Err(refused("SecurityGroupInvalidProtocolForPort", text));
        }
        for (value, attribute, field) in [(min, "port_range_min", "type"), (max, "port_range_max", "code")] {
            if let Some(value) = value.filter(|value| *value > 255) {
                let text =
                    format!("Invalid value for ICMP {field} ({attribute}) {value}. It must be 0 to 255.");
                return Err(refused("SecurityGroupInvalidIcmpValue", text));
            }
        }
        if let (None, Some(code)) = (min, max) {
            let text = format!(
                "ICMP code (port-range-max) {code} is provided but ICMP type (port-range-min) is missing."
            );
            return Err(refused("SecurityGroupMissingIcmpType", text));
        }
        self.icmp = (min, max);
        Ok(())
    }

    /// Minimum and maximum as they are stored.
    fn stored_ports(&self) -> (Option<i64>, Option<i64>) {
        match self.ports {
            Some((min, max)) => (Some(min), Some(max)),
            None => self.icmp,
        }
    }

    /// Whether a stored rule says the same.
    fn is(&self, row: &RuleRow) -> bool {
        let number = |text: &Option<String>| text.as_deref().and_then(protocol_number);
        let net = |text: &Option<String>| -> Option<IpNet> {
            // Everywhere is the same as no prefix.
            let net = text.as_ref()?.parse::<IpNet>().ok()?.trunc();
            Some(net).filter(|net| net.prefix_len() > 0)
        };
        self.direction == row.direction
            && self.ethertype == row.ethertype
            && number(&self.protocol) == number(&row.protocol)
            && self.stored_ports() == (row.port_range_min, row.port_range_max)
            && net(&self.remote_ip_prefix) == net(&row.remote_ip_prefix)
            && self.remote_group_id == row.remote_group_id
            && self.remote_address_group_id == row.remote_address_group_id
    }
}

async fn insert(
    tx: &mut Conn,
    [project_id, group_id, description]: [&str; 3],
    rule: &Rule,
) -> Result<String, ApiError> {
    let id = Uuid::new_v4().to_string();
    let (min, max) = rule.stored_ports();
    sqlx::query(
        "INSERT INTO security_group_rules (id, security_group_id, project_id, description, direction, ethertype,
             protocol, port_range_min, port_range_max, remote_ip_prefix, remote_group_id, remote_address_group_id,
             created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $13)",
    )
    .bind(&id)
    .bind(group_id)
    .bind(project_id)
    .bind(description)
    .bind(rule.direction)
    .bind(rule.ethertype)
    .bind(&rule.protocol)
    .bind(min)
    .bind(max)
    .bind(&rule.remote_ip_prefix)
    .bind(&rule.remote_group_id)
    .bind(&rule.remote_address_group_id)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(id)
}

/// Lets everything out, as every new group does.
pub(super) async fn insert_open(
    tx: &mut Conn,
    project_id: &str,
    group_id: &str,
    ethertype: &'static str,
) -> Result<(), ApiError> {
    let rule = Rule { direction: "egress", ethertype, ..Rule::default() };
    insert(tx, [project_id, group_id, ""], &rule).await.map(drop)
}

/// Lets the members of the group in, as the default group does.
pub(super) async fn insert_remote(
    tx: &mut Conn,
    project_id: &str,
    group_id: &str,
    ethertype: &'static str,
) -> Result<(), ApiError> {
    let rule = Rule {
        direction: "ingress",
        ethertype,
        remote_group_id: Some(group_id.to_owned()),
        ..Rule::default()
    };
    insert(tx, [project_id, group_id, ""], &rule).await.map(drop)
}

/// The rules of one group or of all, by group.
pub(super) async fn by_group(
    db: &mut Conn,
    group_id: Option<&str>,
) -> Result<HashMap<String, Vec<RuleRow>>, ApiError> {
    let rows: Vec<RuleRow> = match group_id {
        Some(id) => {
            sqlx::query_as(
                "SELECT * FROM security_group_rules WHERE security_group_id = $1 ORDER BY created_us, id",
            )
            .bind(id)
            .fetch_all(db)
            .await?
        }
        None => {
            sqlx::query_as("SELECT * FROM security_group_rules ORDER BY created_us, id").fetch_all(db).await?
        }
    };
    let mut rules: HashMap<String, Vec<RuleRow>> = HashMap::new();
    for row in rows {
        rules.entry(row.security_group_id.clone()).or_default().push(row);
    }
    Ok(rules)
}

/// The group's hosts hear of its rules; its revision grows.
async fn changed(change: &mut Change, group_id: &str) -> Result<(), ApiError> {
    sqlx::query("UPDATE security_groups SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(group_id)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::with_group(&mut change.tx, group_id).await?;
    change.concern(hosts);
    Ok(())
}

impl Resource for SecurityGroupRules {
    const NAME: &'static str = "security_group_rule";
    const PATH: &'static str = "security-group-rules";
    const COLLECTION: Collection = Collection {
        name: "security_group_rules",
        attributes: &[
            "created_at",
            "description",
            "direction",
            "ethertype",
            "id",
            "normalized_cidr",
            "port_range_max",
            "port_range_min",
            "project_id",
            "protocol",
            "remote_address_group_id",
            "remote_group_id",
            "remote_ip_prefix",
            "revision_number",
            "security_group_id",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Security group rule {id} does not exist"))
            .named("SecurityGroupRuleNotFound")
    }

    async fn prepare(app: &crate::app::App, scope: &Scope) -> Result<(), ApiError> {
        security_groups::SecurityGroups::prepare(app, scope).await
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = QueryBuilder::new(
            "SELECT security_group_rules.* FROM security_group_rules
                 JOIN security_groups ON security_groups.id = security_group_rules.security_group_id WHERE (",
        );
        statement.push_bind(scope.admin).push(" OR security_groups.project_id = ");
        statement.push_bind(scope.project.clone()).push(")");
        let columns = [
            ("id", "security_group_rules.id"),
            ("security_group_id", "security_group_rules.security_group_id"),
            ("project_id", "security_group_rules.project_id"),
        ];
        query.narrow(&mut statement, &columns);
        statement.push(" ORDER BY security_group_rules.created_us, security_group_rules.id");
        let rows: Vec<RuleRow> = statement.build_query_as().fetch_all(db).await?;
        Ok(rows.iter().map(RuleRow::document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        change.scope.owner(&mut body)?;
        let group_id = body.required("security_group_id")?;
        let description = body.string("description")?.unwrap_or_default();
        let mut rule = Rule::parse(&mut body)?;
        body.finish()?;
        let group = security_groups::owned(&mut change.tx, &group_id, &change.scope).await?;
        if let Some(remote) = &rule.remote_group_id {
            rule.remote_group_id =
                Some(security_groups::visible(&mut change.tx, remote, &change.scope).await?.id);
        }
        if let Some(remote) = &rule.remote_address_group_id {
            address_groups::visible(&mut change.tx, remote, &change.scope).await?;
        }
        quotas::check(&mut change.tx, &group.project_id, quotas::Resource::SecurityGroupRule).await?;
        let there = by_group(&mut change.tx, Some(&group.id)).await?.remove(&group.id).unwrap_or_default();
        if let Some(twice) = there.iter().find(|row| rule.is(row)) {
            let text = format!("Security group rule already exists. Rule id is {}.", twice.id);
            return Err(ApiError::Conflict(text).named("SecurityGroupRuleExists"));
        }
        let id = insert(&mut change.tx, [&group.project_id, &group.id, &description], &rule).await?;
        changed(change, &group.id).await?;
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, _body: Attributes) -> Result<(), ApiError> {
        let found = Self::read(&mut change.tx, &change.scope, &Query::of_id(id, &Query::default())).await?;
        match found.is_empty() {
            true => Err(Self::missing(id)),
            false => {
                Err(ApiError::MethodNotAllowed("A rule can't be changed: delete it and make another.".into()))
            }
        }
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let group: Option<String> =
            sqlx::query_scalar("SELECT security_group_id FROM security_group_rules WHERE id = $1")
                .bind(id)
                .fetch_optional(&mut *change.tx)
                .await?;
        let group = group.ok_or_else(|| Self::missing(id))?;
        let row = security_groups::visible(&mut change.tx, &group, &change.scope).await;
        if row.map_or(true, |row| !change.scope.owns(&row.project_id)) {
            return Err(Self::missing(id));
        }
        sqlx::query("DELETE FROM security_group_rules WHERE id = $1")
            .bind(id)
            .execute(&mut *change.tx)
            .await?;
        changed(change, &group).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<Rule, String> {
        let mut value = value;
        value["direction"] = json!("ingress");
        let mut body = Attributes::of("rule", value).unwrap();
        Rule::parse(&mut body).map_err(|error| match error {
            ApiError::Named(name, _) => name.to_owned(),
            other => other.to_string(),
        })
    }

    #[test]
    fn what_makes_no_sense_has_neutrons_name() {
        for (value, name) in [
            (json!({"protocol": "foo"}), "SecurityGroupRuleInvalidProtocol"),
            (json!({"protocol": 256}), "SecurityGroupRuleInvalidProtocol"),
            (json!({"ethertype": "ARP"}), "SecurityGroupRuleInvalidEtherType"),
            (json!({"protocol": "ipv6-icmp"}), "SecurityGroupEthertypeConflictWithProtocol"),
            (json!({"port_range_min": 1}), "SecurityGroupProtocolRequiredWithPorts"),
            (json!({"protocol": "tcp", "port_range_min": 70000}), "SecurityGroupInvalidPortValue"),
            (
                json!({"protocol": "tcp", "port_range_min": 0, "port_range_max": 9}),
                "SecurityGroupInvalidPortValue",
            ),
            (json!({"protocol": "tcp", "port_range_min": 9}), "SecurityGroupInvalidPortRange"),
            (
                json!({"protocol": "tcp", "port_range_min": 9, "port_range_max": 8}),
                "SecurityGroupInvalidPortRange",
            ),
            (
                json!({"protocol": "gre", "port_range_min": 9, "port_range_max": 9}),
                "SecurityGroupInvalidProtocolForPort",
            ),
            (json!({"protocol": "icmp", "port_range_min": 256}), "SecurityGroupInvalidIcmpValue"),
            (json!({"protocol": "icmp", "port_range_max": 0}), "SecurityGroupMissingIcmpType"),
            (json!({"remote_ip_prefix": "fd00::/64"}), "SecurityGroupRuleParameterConflict"),
            (json!({"remote_ip_prefix": "10.0.0.0/33"}), "InvalidCIDR"),
            (
                json!({"remote_ip_prefix": "10.0.0.0/8", "remote_group_id": "6dbd8f5b-0000-4000-8000-000000000001"}),
                "SecurityGroupMultipleRemoteEntites",
            ),
        ] {
            assert_eq!(parse(value.clone()).unwrap_err(), name, "{value}");
        }
    }

    #[test]
    fn rules_are_stored_in_one_form() {
        let rule = parse(json!({"protocol": "ICMP", "ethertype": "ipv6", "port_range_min": 128})).unwrap();
        assert_eq!((rule.protocol.as_deref(), rule.ethertype), (Some("ipv6-icmp"), "IPv6"));
        assert_eq!(rule.stored_ports(), (Some(128), None));
        let rule = parse(json!({"protocol": 6, "port_range_min": "1", "port_range_max": 65535})).unwrap();
        assert_eq!((rule.protocol.as_deref(), rule.stored_ports()), (Some("6"), (None, None)));
        let rule = parse(json!({"protocol": "any", "remote_ip_prefix": "10.1.2.3"})).unwrap();
        assert_eq!((rule.protocol, rule.remote_ip_prefix.as_deref()), (None, Some("10.1.2.3/32")));
    }
}
