//! What is shown of servers beside their rows: addresses, tags, groups. One query, for one server as for a page of them.

use std::{collections::HashMap, net::IpAddr, sync::LazyLock};

use crate::{db::Conn, http::error::ApiError};

/// Most servers of one statement.
const BATCH: usize = 250;
/// A statement is prepared once for each of these numbers of servers; in between, the last id is repeated.
const SIZES: [usize; 3] = [1, 16, BATCH];

/// The statements of [`SIZES`].
static STATEMENTS: LazyLock<[String; 3]> = LazyLock::new(|| SIZES.map(statement));

/// What a row of the query tells of.
const FIXED: i64 = 1;
const FLOATING: i64 = 2;
const TAG: i64 = 3;
const GROUP: i64 = 4;
const SECURITY_GROUP: i64 = 5;

fn statement(servers: usize) -> String {
    let ids: Vec<String> = (1..=servers).map(|number| format!("${number}")).collect();
    let ids = ids.join(",");
    format!(
        "SELECT p.server_id, CAST({FIXED} AS BIGINT) AS kind, f.address AS text, n.name AS network_name,
             p.mac_address, p.device_index AS first, f.position AS second
         FROM ports p JOIN networks n ON n.id = p.network_id JOIN fixed_ips f ON f.port_id = p.id
         WHERE p.server_id IN ({ids})
         UNION ALL
         SELECT p.server_id, {FLOATING}, v.floating_ip_address, n.name, p.mac_address, p.device_index, f.position
         FROM ports p JOIN networks n ON n.id = p.network_id JOIN floating_ips v ON v.fixed_port_id = p.id
             JOIN fixed_ips f ON f.port_id = p.id AND f.address = v.fixed_ip_address
         WHERE p.server_id IN ({ids})
         UNION ALL
         SELECT server_id, {TAG}, tag, NULL, NULL, 0, 0 FROM server_tags WHERE server_id IN ({ids})
         UNION ALL
         SELECT server_id, {GROUP}, group_id, NULL, NULL, 0, 0 FROM server_group_members WHERE server_id IN ({ids})
         UNION ALL
         SELECT p.server_id, {SECURITY_GROUP}, g.name, NULL, NULL, 0, 0
         FROM ports p JOIN port_security_groups m ON m.port_id = p.id
             JOIN security_groups g ON g.id = m.security_group_id
         WHERE p.server_id IN ({ids})
         ORDER BY 6, 7, 2, 3"
    )
}

/// An address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// The network's name.
    pub(super) network: String,
    pub(super) mac_address: String,
    pub(super) ip: IpAddr,
    /// It is a floating IP, and not the port's own.
    pub(super) floating: bool,
}

/// What is shown of a server beside its row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Details {
    /// In the order of its NICs; each floating IP after the address that it leads to.
    pub(super) addresses: Vec<Address>,
    pub(super) tags: Vec<String>,
    /// Ids of server groups.
    pub(super) groups: Vec<String>,
    /// Names of its ports' security groups, each once.
    pub(super) security_groups: Vec<String>,
}

impl Details {
    /// Those of one server.
    pub(super) async fn of(db: &mut Conn, server_id: &str) -> Result<Self, ApiError> {
        Ok(Self::of_all(db, &[server_id]).await?.remove(server_id).unwrap_or_default())
    }

    /// Those of many, by id; servers of which there is nothing to tell are not among them.
    pub(super) async fn of_all(
        db: &mut Conn,
        server_ids: &[&str],
    ) -> Result<HashMap<String, Self>, ApiError> {
        let mut all = HashMap::with_capacity(server_ids.len());
        for batch in server_ids.chunks(BATCH) {
            let rows = read(db, batch).await?;
            rows.into_iter().for_each(|row| add(&mut all, row));
        }
        Ok(all)
    }
}

/// Server, what the row tells of, the text; of an address the network's name and the Ethernet address.
type Row = (String, i64, String, Option<String>, Option<String>);

/// The rows of one statement.
async fn read(db: &mut Conn, batch: &[&str]) -> Result<Vec<Row>, ApiError> {
    let Some(last) = batch.last() else { return Ok(Vec::new()) };
    let place = SIZES.iter().position(|size| batch.len() <= *size).unwrap_or(SIZES.len() - 1);
    let mut query = sqlx::query_as(STATEMENTS[place].as_str());
    for index in 0..SIZES[place] {
        query = query.bind((*batch.get(index).unwrap_or(last)).to_owned());
    }
    Ok(query.fetch_all(db).await?)
}

fn add(all: &mut HashMap<String, Details>, (server, kind, text, network, mac_address): Row) {
    let details = all.entry(server).or_default();
    match (kind, network, mac_address) {
        (FIXED | FLOATING, Some(network), Some(mac_address)) => {
            if let Ok(ip) = text.parse() {
                details.addresses.push(Address { network, mac_address, ip, floating: kind == FLOATING });
            }
        }
        (TAG, ..) => details.tags.push(text),
        (GROUP, ..) => details.groups.push(text),
        // Ordered by name, so that those of several ports are neighbours.
        (SECURITY_GROUP, ..) if details.security_groups.last() != Some(&text) => {
            details.security_groups.push(text);
        }
        _ => {}
    }
}
