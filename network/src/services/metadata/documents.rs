//! Nova's metadata in its two layouts: a path in, a document out. Pure.
//!
//! Sources: Nova's user guide, "Metadata"; fields by version as Nova's own service has them.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;

use super::guest::Guest;

/// Versions of the OpenStack layout, each with what came with it.
const OPENSTACK_VERSIONS: [&str; 10] = [
    "2012-08-10",
    RANDOM_SEED,
    VENDOR_DATA,
    PROJECT_AND_NETWORK,
    DEVICES,
    VENDOR_DATA_2,
    "2017-02-22",
    ROCKY,
    DEDICATED_CPUS,
    "2025-04-04",
];
const RANDOM_SEED: &str = "2013-04-04";
const VENDOR_DATA: &str = "2013-10-17";
const PROJECT_AND_NETWORK: &str = "2015-10-15";
const DEVICES: &str = "2016-06-30";
const VENDOR_DATA_2: &str = "2016-10-06";
/// The newest version that cloud-init looks for by its date, before `latest`.
const ROCKY: &str = "2018-08-27";
const DEDICATED_CPUS: &str = "2020-10-14";

/// Versions of the EC2 layout; all have the same content here (that of the last one).
const EC2_VERSIONS: [&str; 9] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    EC2_NEWEST,
];
const EC2_NEWEST: &str = "2009-04-04";
const LATEST: &str = "latest";
/// Random bytes in `meta_data.json`, as Nova gives them.
const SEED_LEN: usize = 512;
/// What no public key of SSH has, and every certificate.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
/// Path segments; no document is as deep.
const DEPTH_MAX: usize = 8;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// `Content-Type`.
    pub content_type: &'static str,
    /// Bytes.
    pub body: Vec<u8>,
}

impl Document {
    fn text(body: impl Into<Vec<u8>>) -> Option<Self> {
        Some(Self { content_type: "text/plain; charset=UTF-8", body: body.into() })
    }

    fn bytes(body: &[u8]) -> Option<Self> {
        Some(Self { content_type: "application/octet-stream", body: body.to_vec() })
    }

    fn json(value: &serde_json::Value) -> Option<Self> {
        Some(Self { content_type: "application/json", body: value.to_string().into_bytes() })
    }

    fn listing<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        Self::text(names.into_iter().collect::<Vec<_>>().join("\n"))
    }
}

/// The document at a path; `None` if there is none.
pub fn lookup(guest: &Guest, path: &str) -> Option<Document> {
    let segments: Vec<&str> =
        path.split('/').filter(|segment| !segment.is_empty()).take(DEPTH_MAX + 1).collect();
    match segments.as_slice() {
        ["openstack"] => Document::listing(OPENSTACK_VERSIONS.into_iter().chain([LATEST])),
        ["openstack", version, rest @ ..] => openstack(guest, version, rest),
        ["ec2", rest @ ..] => ec2(guest, rest),
        rest => ec2(guest, rest),
    }
}

/// The files of a server's config drive by their paths: what [`lookup`] says under the same paths, except that EC2's tree
/// of metadata is one file, as Nova writes it.
pub fn config_drive(guest: &Guest) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for version in [ROCKY, LATEST] {
        for name in openstack_files(guest, newest(version)) {
            let document = openstack(guest, version, &[name]);
            files.extend(document.map(|document| (format!("openstack/{version}/{name}"), document.body)));
        }
    }
    for version in [EC2_NEWEST, LATEST] {
        let data = ec2_tree(guest).child("meta-data").map(Node::json).unwrap_or_default();
        files.push((format!("ec2/{version}/meta-data.json"), data.to_string().into_bytes()));
        let user_data = guest.user_data.clone();
        files.extend(user_data.map(|user_data| (format!("ec2/{version}/user-data"), user_data)));
    }
    files
}

/// The version that a name of one means.
fn newest(version: &str) -> &str {
    if version == LATEST { OPENSTACK_VERSIONS[OPENSTACK_VERSIONS.len() - 1] } else { version }
}

/// Names of the files of a version.
fn openstack_files<'a>(guest: &Guest, version: &'a str) -> impl Iterator<Item = &'static str> + use<'a> {
    // Versions are dates: their order is that of the texts.
    let files = [
        ("meta_data.json", true),
        ("user_data", guest.user_data.is_some()),
        ("vendor_data.json", version >= VENDOR_DATA),
        ("network_data.json", version >= PROJECT_AND_NETWORK),
        ("vendor_data2.json", version >= VENDOR_DATA_2),
    ];
    files.into_iter().filter(|(_, exists)| *exists).map(|(name, _)| name)
}

fn openstack(guest: &Guest, version: &str, rest: &[&str]) -> Option<Document> {
    let version = newest(version);
    if !OPENSTACK_VERSIONS.contains(&version) {
        return None;
    }
    let since = |first: &str| version >= first;
    match rest {
        [] => Document::listing(openstack_files(guest, version)),
        ["meta_data.json"] => Document::json(&meta_data(guest, since)),
        ["user_data"] => Document::bytes(guest.user_data.as_deref()?),
        ["vendor_data.json"] if since(VENDOR_DATA) => Document::json(&vendor_data(guest)),
        ["network_data.json"] if since(PROJECT_AND_NETWORK) => Document::json(&guest.network_data),
        ["vendor_data2.json"] if since(VENDOR_DATA_2) => Document::json(&json!({"static": {}})),
        _ => None,
    }
}

/// What cloud-init takes under its own name.
fn vendor_data(guest: &Guest) -> serde_json::Value {
    match &guest.metadata.vendor_data {
        Some(text) => json!({ "cloud-init": text }),
        None => json!({}),
    }
}

fn meta_data(guest: &Guest, since: impl Fn(&str) -> bool) -> serde_json::Value {
    let metadata = &guest.metadata;
    let mut data = json!({
        "uuid": metadata.uuid,
        "name": metadata.name,
        "hostname": metadata.hostname,
        "launch_index": metadata.launch_index,
        "availability_zone": metadata.availability_zone,
    });
    if !metadata.meta.is_empty() {
        data["meta"] = json!(metadata.meta);
    }
    if !metadata.public_keys.is_empty() {
        let keys = metadata.public_keys.iter();
        data["public_keys"] = json!(metadata.public_keys);
        data["keys"] = keys
            .map(|(name, key)| {
                let kind = if key.contains(CERTIFICATE) { "x509" } else { "ssh" };
                json!({"name": name, "type": kind, "data": key})
            })
            .collect();
    }
    if since(RANDOM_SEED) {
        let mut seed = [0; SEED_LEN];
        // Without a source of randomness there is no seed rather than a constant one.
        if getrandom::fill(&mut seed).is_ok() {
            data["random_seed"] = json!(STANDARD.encode(seed));
        }
    }
    if since(PROJECT_AND_NETWORK) {
        data["project_id"] = json!(metadata.project_id);
    }
    if since(DEVICES) {
        // Only tagged devices are listed, and there are no tags yet.
        data["devices"] = json!([]);
    }
    if since(DEDICATED_CPUS) {
        data["dedicated_cpus"] = json!([]);
    }
    data
}

/// The EC2 layout is a tree whose inner nodes list their children.
enum Node {
    Leaf(Vec<u8>),
    Directory(BTreeMap<String, Node>),
    /// `public-keys`: its listing has `0=name` for a child `0`.
    Keys(Vec<(String, Node)>),
}

impl Node {
    fn leaf(text: impl ToString) -> Self {
        Self::Leaf(text.to_string().into_bytes())
    }

    fn directory<const N: usize>(children: [(&str, Self); N]) -> Self {
        Self::Directory(children.into_iter().map(|(name, node)| (name.to_owned(), node)).collect())
    }

    fn child(self, name: &str) -> Option<Self> {
        match self {
            Self::Leaf(_) => None,
            Self::Directory(mut children) => children.remove(name),
            Self::Keys(keys) => {
                let mut keys = keys.into_iter().enumerate();
                keys.find(|(index, _)| name == index.to_string()).map(|(_, (_, node))| node)
            }
        }
    }

    /// As one document, like Nova's: objects, and texts in them.
    fn json(self) -> serde_json::Value {
        match self {
            Self::Leaf(text) => String::from_utf8_lossy(&text).into(),
            Self::Directory(children) => {
                children.into_iter().map(|(name, node)| (name, node.json())).collect()
            }
            Self::Keys(keys) => keys
                .into_iter()
                .enumerate()
                .map(|(index, (_, node))| (index.to_string(), node.json()))
                .collect(),
        }
    }

    fn document(self) -> Option<Document> {
        match self {
            Self::Leaf(text) => Document::text(text),
            Self::Directory(children) => {
                let line = |(name, node): (&String, &Self)| match node {
                    Self::Leaf(_) => name.clone(),
                    _ => format!("{name}/"),
                };
                Document::text(children.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            Self::Keys(keys) => {
                let lines = keys.iter().enumerate().map(|(index, (name, _))| format!("{index}={name}"));
                Document::text(lines.collect::<Vec<_>>().join("\n"))
            }
        }
    }
}

fn ec2(guest: &Guest, path: &[&str]) -> Option<Document> {
    let [version, rest @ ..] = path else {
        return Document::listing(EC2_VERSIONS.into_iter().chain([LATEST]));
    };
    if *version != LATEST && !EC2_VERSIONS.contains(version) {
        return None;
    }
    if let (["user-data"], Some(user_data)) = (rest, &guest.user_data) {
        return Document::bytes(user_data);
    }
    let mut node = ec2_tree(guest);
    for name in rest {
        node = node.child(name)?;
    }
    node.document()
}

fn ec2_tree(guest: &Guest) -> Node {
    let metadata = &guest.metadata;
    let mut leaves = BTreeMap::from([
        ("ami-launch-index".to_owned(), Node::leaf(metadata.launch_index)),
        (
            "block-device-mapping".to_owned(),
            Node::Directory(
                [("ami", "vda"), ("root", "/dev/vda")]
                    .into_iter()
                    .chain(
                        metadata.block_devices.iter().map(|(name, device)| (name.as_str(), device.as_str())),
                    )
                    .map(|(name, device)| (name.to_owned(), Node::leaf(device)))
                    .collect(),
            ),
        ),
        ("hostname".to_owned(), Node::leaf(&metadata.hostname)),
        ("instance-action".to_owned(), Node::leaf("none")),
        ("instance-id".to_owned(), Node::leaf(ec2_instance_id(guest))),
        ("local-hostname".to_owned(), Node::leaf(&metadata.hostname)),
        (
            "placement".to_owned(),
            Node::directory([("availability-zone", Node::leaf(&metadata.availability_zone))]),
        ),
        ("public-hostname".to_owned(), Node::leaf(&metadata.hostname)),
    ]);
    if let Some(address) = guest.local_ipv4 {
        leaves.insert("local-ipv4".to_owned(), Node::leaf(address));
    }
    if !metadata.public_keys.is_empty() {
        let keys = metadata.public_keys.iter();
        let keys =
            keys.map(|(name, key)| (name.clone(), Node::directory([("openssh-key", Node::leaf(key))])));
        leaves.insert("public-keys".to_owned(), Node::Keys(keys.collect()));
    }
    let mut root = BTreeMap::from([("meta-data".to_owned(), Node::Directory(leaves))]);
    if guest.user_data.is_some() {
        // For the listing; the content is served without a copy of the tree.
        root.insert("user-data".to_owned(), Node::Leaf(Vec::new()));
    }
    Node::Directory(root)
}

/// `i-` and 8 hex digits as EC2 has it. Nova counts; here they are the first of the server's id, so that all hosts agree.
fn ec2_instance_id(guest: &Guest) -> String {
    format!("i-{:08x}", (guest.metadata.uuid.0.as_u128() >> 96) as u32)
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;
