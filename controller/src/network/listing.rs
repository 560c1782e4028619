//! Filters, fields, sorting and pages of list calls, on the documents themselves.
//!
//! As in Neutron: `?name=a&name=b` is either, different names all hold; `fields` picks attributes; `sort_key`/`sort_dir`
//! come in pairs; `limit` with `marker` (the id before the page, or after it with `page_reverse`). A filter that isn't an
//! attribute is 400 (extension `filter-validation`). `tags=a,b` asks for both tags, `tags-any` for one of them, `not-tags`
//! and `not-tags-any` for the opposites.

use std::cmp::Ordering;

use serde_json::{Map, Value, json};
use sqlx::QueryBuilder;

use super::attributes::{invalid, parse_bool};
use crate::{db::Db, http::error::ApiError};

/// One kind of resource.
#[derive(Debug, Clone, Copy)]
pub(super) struct Collection {
    /// `networks`.
    pub(super) name: &'static str,
    /// All attributes of its documents.
    pub(super) attributes: &'static [&'static str],
}

/// What a list call asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    filters: Vec<(String, Vec<String>)>,
    fields: Vec<String>,
    sort: Vec<(String, bool)>,
    limit: Option<usize>,
    marker: Option<String>,
    reverse: bool,
    tags: Vec<(&'static str, Vec<String>)>,
}

/// The filters by tags.
const TAG_FILTERS: [&str; 4] = ["tags", "tags-any", "not-tags", "not-tags-any"];

impl Query {
    /// Asks for one resource by id, with these fields.
    pub(super) fn of_id(id: &str, fields: &Query) -> Self {
        let filters = vec![("id".to_owned(), vec![id.to_owned()])];
        Self { filters, fields: fields.fields.clone(), ..Self::default() }
    }

    /// Parses the pairs of a query string.
    ///
    /// # Errors
    /// 400 for what isn't an attribute of the collection, or isn't a number where one belongs.
    pub(super) fn parse(pairs: Vec<(String, String)>, collection: Collection) -> Result<Self, ApiError> {
        let mut query = Query::default();
        let mut directions = Vec::new();
        for (key, value) in pairs {
            match key.as_str() {
                "fields" => query.fields.push(value),
                "sort_key" => query.sort.push((value, false)),
                "sort_dir" => directions.push(descending(&value)?),
                "limit" => {
                    let limit =
                        value.parse().map_err(|_| invalid("limit", format!("'{value}' is no number")))?;
                    query.limit = (limit > 0).then_some(limit);
                }
                "marker" => query.marker = Some(value),
                "page_reverse" => {
                    query.reverse =
                        parse_bool(&value).ok_or_else(|| invalid("page_reverse", "it is no truth value"))?;
                }
                // Tags match as a set, not one by one.
                _ if TAG_FILTERS.contains(&key.as_str()) && collection.attributes.contains(&"tags") => {
                    let name = TAG_FILTERS.into_iter().find(|name| *name == key).unwrap_or("tags");
                    query.tags.push((name, value.split(',').map(str::to_owned).collect()));
                }
                _ => query.add_filter(key, value),
            }
        }
        for (pair, descending) in query.sort.iter_mut().zip(directions) {
            pair.1 = descending;
        }
        let asked = query.filters.iter().map(|(key, _)| key).chain(query.sort.iter().map(|(key, _)| key));
        let unknown: Vec<&str> =
            asked.map(String::as_str).filter(|key| !collection.attributes.contains(key)).collect();
        match unknown.is_empty() {
            true => Ok(query),
            false => Err(ApiError::BadRequest(format!(
                "['{}'] is invalid attribute for filter",
                unknown.join("', '")
            ))),
        }
    }

    fn add_filter(&mut self, key: String, value: String) {
        match self.filters.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => self.filters.push((key, vec![value])),
        }
    }

    /// The values of a filter, for those that the database applies first.
    pub(super) fn values(&self, key: &str) -> Option<&[String]> {
        self.filters.iter().find(|(known, _)| known == key).map(|(_, values)| values.as_slice())
    }

    /// The answer: `{"networks": […], "networks_links": […]}`.
    ///
    /// # Errors
    /// 400 for a marker that is not there.
    pub(super) fn answer(
        &self,
        mut documents: Vec<Value>,
        collection: Collection,
        url: &str,
    ) -> Result<Value, ApiError> {
        documents.retain(|document| self.filters.iter().all(|(key, values)| matches(&document[key], values)));
        documents.retain(|document| self.tags.iter().all(|(how, tags)| tagged(&document["tags"], how, tags)));
        documents.sort_by(|a, b| self.order(a, b));
        let mut answer = Map::new();
        if let Some(links) = self.page(&mut documents, url)? {
            answer.insert(format!("{}_links", collection.name), links);
        }
        for document in &mut documents {
            self.pick(document);
        }
        answer.insert(collection.name.into(), Value::Array(documents));
        Ok(Value::Object(answer))
    }

    /// Leaves the documents of the page, and gives the links to those around it if the asker asked for pages.
    fn page(&self, documents: &mut Vec<Value>, url: &str) -> Result<Option<Value>, ApiError> {
        let (mut before, mut after) = (false, false);
        if let Some(marker) = &self.marker {
            let at = documents.iter().position(|document| document["id"] == **marker);
            let at = at.ok_or_else(|| invalid("marker", format!("'{marker}' could not be found")))?;
            match self.reverse {
                true => documents.truncate(at),
                false => drop(documents.drain(..=at)),
            }
            (before, after) = (!self.reverse, self.reverse);
        }
        let Some(limit) = self.limit else { return Ok(None) };
        let surplus = documents.len().saturating_sub(limit);
        match self.reverse {
            true => drop(documents.drain(..surplus)),
            false => documents.truncate(limit),
        }
        (before, after) = (before || (self.reverse && surplus > 0), after || (!self.reverse && surplus > 0));
        let link = |rel: &str, document: Option<&Value>| {
            let marker = document?["id"].as_str()?;
            let reverse = if rel == "previous" { "&page_reverse=True" } else { "" };
            let href = format!("{url}?limit={limit}&marker={marker}{reverse}{}", self.rest());
            Some(json!({"rel": rel, "href": href}))
        };
        let next = link("next", documents.last().filter(|_| after));
        let links: Vec<Value> =
            next.into_iter().chain(link("previous", documents.first().filter(|_| before))).collect();
        Ok((!links.is_empty()).then_some(Value::Array(links)))
    }

    fn order(&self, a: &Value, b: &Value) -> Ordering {
        let compare = |key: &str| match (&a[key], &b[key]) {
            (Value::Number(a), Value::Number(b)) => {
                a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(Ordering::Equal)
            }
            (a, b) => text(a).cmp(&text(b)),
        };
        self.sort.iter().fold(Ordering::Equal, |order, (key, descending)| {
            order.then_with(|| if *descending { compare(key).reverse() } else { compare(key) })
        })
    }

    /// What else was asked, for the link to the next page.
    fn rest(&self) -> String {
        let filters = self
            .filters
            .iter()
            .flat_map(|(key, values)| values.iter().map(move |value| (key.as_str(), value)));
        let mut rest = String::new();
        for (key, value) in filters.chain(self.fields.iter().map(|field| ("fields", field))) {
            rest.push_str(&format!("&{}={}", encode(key), encode(value)));
        }
        for (key, descending) in &self.sort {
            rest.push_str(&format!(
                "&sort_key={}&sort_dir={}",
                encode(key),
                if *descending { "desc" } else { "asc" }
            ));
        }
        rest
    }

    /// Adds to a statement what of the filters its columns can decide, each as `AND column IN (…)`.
    pub(super) fn narrow(&self, statement: &mut QueryBuilder<Db>, columns: &[(&str, &'static str)]) {
        for (filter, column) in columns {
            let Some(values) = self.values(filter) else { continue };
            statement.push(" AND ").push(column).push(" IN (");
            let mut list = statement.separated(", ");
            for value in values {
                list.push_bind(value.clone());
            }
            statement.push(")");
        }
    }

    /// Leaves only the fields that were asked for.
    pub(super) fn pick(&self, document: &mut Value) {
        if let (false, Value::Object(map)) = (self.fields.is_empty(), document) {
            map.retain(|key, _| self.fields.iter().any(|field| field == key));
        }
    }
}

fn descending(direction: &str) -> Result<bool, ApiError> {
    match direction {
        "asc" => Ok(false),
        "desc" => Ok(true),
        other => Err(invalid("sort_dir", format!("'{other}' is neither asc nor desc"))),
    }
}

/// Whether a list of tags has what a filter asks for.
fn tagged(value: &Value, how: &str, wanted: &[String]) -> bool {
    let there =
        |tag: &String| value.as_array().is_some_and(|tags| tags.iter().any(|one| one == tag.as_str()));
    match how {
        "tags" => wanted.iter().all(there),
        "tags-any" => wanted.iter().any(there),
        "not-tags" => !wanted.iter().all(there),
        _ => !wanted.iter().any(there),
    }
}

/// Whether an attribute has one of these values. A list has what one of its members has; `key=value` (as in
/// `fixed_ips=ip_address=10.0.0.5`) asks for a member of an object.
fn matches(value: &Value, wanted: &[String]) -> bool {
    wanted.iter().any(|wanted| has(value, wanted))
}

fn has(value: &Value, wanted: &str) -> bool {
    match value {
        Value::Bool(truth) => parse_bool(wanted) == Some(*truth),
        Value::Array(members) => members.iter().any(|member| has(member, wanted)),
        Value::Object(map) => {
            wanted.split_once('=').is_some_and(|(key, wanted)| match key.strip_suffix("_substr") {
                Some(key) => map.get(key).is_some_and(|member| text(member).contains(wanted)),
                None => map.get(key).is_some_and(|member| has(member, wanted)),
            })
        }
        other => text(other) == wanted,
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Percent-encodes for a query string (RFC 3986 unreserved characters stay).
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    const THINGS: Collection = Collection {
        name: "things",
        attributes: &["id", "name", "shared", "fixed_ips", "mtu", "gateway_ip"],
    };

    fn things() -> Vec<Value> {
        vec![
            json!({"id": "1", "name": "b", "shared": true, "mtu": 1500, "gateway_ip": null, "fixed_ips": []}),
            json!({"id": "2", "name": "a", "shared": false, "mtu": 900, "gateway_ip": "10.0.0.1",
                   "fixed_ips": [{"ip_address": "10.0.0.5", "subnet_id": "s"}]}),
            json!({"id": "3", "name": "c d", "shared": false, "mtu": 1500, "gateway_ip": null, "fixed_ips": []}),
        ]
    }

    fn ask(pairs: &[(&str, &str)]) -> Result<Value, ApiError> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Query::parse(pairs, THINGS)?.answer(things(), THINGS, "http://h/things")
    }

    fn ids(pairs: &[(&str, &str)]) -> String {
        let answer = ask(pairs).unwrap();
        answer["things"].as_array().unwrap().iter().map(|thing| thing["id"].as_str().unwrap()).collect()
    }

    #[test]
    fn filters_compare_by_the_attributes_type() {
        assert_eq!(ids(&[]), "123");
        assert_eq!(ids(&[("name", "a"), ("name", "b")]), "12");
        assert_eq!(ids(&[("shared", "False"), ("mtu", "1500")]), "3");
        assert_eq!(ids(&[("fixed_ips", "ip_address=10.0.0.5")]), "2");
        assert_eq!(ids(&[("fixed_ips", "ip_address=10.0.0.6")]), "");
        assert_eq!(ids(&[("gateway_ip", "")]), "13");
    }

    #[test]
    fn sorting_and_pages_reach_every_document_once() {
        assert_eq!(
            ids(&[("sort_key", "mtu"), ("sort_key", "name"), ("sort_dir", "desc"), ("sort_dir", "asc")]),
            "132"
        );
        let page = ask(&[("limit", "2"), ("shared", "False"), ("fields", "id"), ("limit", "1")]).unwrap();
        assert_eq!(page["things"], json!([{"id": "2"}]));
        let next = page["things_links"][0]["href"].as_str().unwrap();
        assert_eq!(next, "http://h/things?limit=1&marker=2&shared=False&fields=id");
        assert_eq!(ids(&[("limit", "1"), ("marker", "2"), ("shared", "False")]), "3");
        assert_eq!(ask(&[("limit", "1"), ("marker", "3")]).unwrap().get("things_links"), None);
    }

    #[test]
    fn pages_go_backwards_too() {
        assert_eq!(ids(&[("limit", "1"), ("marker", "3"), ("page_reverse", "True")]), "2");
        let page = ask(&[("limit", "1"), ("marker", "3"), ("page_reverse", "True")]).unwrap();
        let rels: Vec<&str> = page["things_links"]
            .as_array()
            .unwrap()
            .iter()
            .map(|link| link["rel"].as_str().unwrap())
            .collect();
        assert_eq!(rels, ["next", "previous"]);
        assert_eq!(
            page["things_links"][1]["href"].as_str().unwrap(),
            "http://h/things?limit=1&marker=2&page_reverse=True"
        );
        assert_eq!(ids(&[("limit", "1"), ("marker", "2"), ("page_reverse", "True")]), "1");
    }

    #[test]
    fn tags_are_asked_for_as_sets() {
        let tags = json!(["a", "b"]);
        let has = |how: &str, wanted: &[&str]| {
            tagged(&tags, how, &wanted.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>())
        };
        assert!(has("tags", &["a", "b"]) && !has("tags", &["a", "c"]));
        assert!(has("tags-any", &["a", "c"]) && !has("tags-any", &["c"]));
        assert!(has("not-tags", &["a", "c"]) && !has("not-tags", &["a", "b"]));
        assert!(has("not-tags-any", &["c"]) && !has("not-tags-any", &["b", "c"]));
    }

    #[test]
    fn unknown_filters_markers_and_directions_are_refused() {
        for pairs in [
            [("colour", "red")],
            [("marker", "9")],
            [("limit", "x")],
            [("sort_key", "q")],
            [("sort_dir", "up")],
        ] {
            assert!(ask(&pairs).is_err(), "{pairs:?}");
        }
    }
}
