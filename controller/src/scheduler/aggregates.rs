//! What a flavor asks of the aggregates that a host is in (`aggregate_instance_extra_specs:KEY`), as Nova's
//! `AggregateInstanceExtraSpecsFilter` has it.

use std::collections::{BTreeMap, BTreeSet};

/// Metadata of all aggregates of a host: an aggregate's value may be several, separated by commas.
pub type Metadata = BTreeMap<String, BTreeSet<String>>;

/// The first key of which no aggregate of the host has a value that is asked for.
pub fn lacking<'a>(asked: &'a BTreeMap<String, String>, there: &Metadata) -> Option<&'a str> {
    let met = |key: &String, wish: &String| {
        there.get(key).is_some_and(|values| values.iter().any(|value| matches(value, wish)))
    };
    asked.iter().find(|(key, wish)| !met(key, wish)).map(|(key, _)| key.as_str())
}

/// Whether a value is as wished: `OPERATOR OPERAND`, several of `<or> A <or> B`, or the value itself.
fn matches(value: &str, wish: &str) -> bool {
    let mut words = wish.split_whitespace();
    let operator = words.next().unwrap_or_default();
    let mut rest = words.clone();
    let number = |text: &str| text.parse::<f64>().ok();
    let numbers = |compare: fn(&f64, &f64) -> bool| {
        let pair = number(value).zip(words.clone().next().and_then(number));
        pair.is_some_and(|(value, wanted)| compare(&value, &wanted))
    };
    let texts =
        |compare: fn(&str, &str) -> bool| words.clone().next().is_some_and(|wanted| compare(value, wanted));
    match operator {
        "<or>" => rest.any(|word| word == value && word != "<or>"),
        "<in>" => texts(|value, wanted| value.contains(wanted)),
        "<all-in>" => rest.next().is_some() && words.all(|wanted| value.contains(wanted)),
        "=" | ">=" => numbers(f64::ge),
        "==" => numbers(f64::eq),
        "!=" => numbers(f64::ne),
        "<=" => numbers(f64::le),
        "s==" => texts(|value, wanted| value == wanted),
        "s!=" => texts(|value, wanted| value != wanted),
        "s<" => texts(|value, wanted| value < wanted),
        "s<=" => texts(|value, wanted| value <= wanted),
        "s>" => texts(|value, wanted| value > wanted),
        "s>=" => texts(|value, wanted| value >= wanted),
        _ => value == wish,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_compared_as_the_operator_says() {
        for (value, wish) in [
            ("ssd", "ssd"),
            ("two words", "two words"),
            ("ssd", "<or> hdd <or> ssd"),
            ("ssd-fast", "<in> ssd"),
            ("avx avx2 aes", "<all-in> aes avx"),
            ("8", "= 4"),
            ("8", ">= 8"),
            ("8.0", "== 8"),
            ("8", "!= 9"),
            ("8", "<= 9"),
            ("b", "s== b"),
            ("b", "s!= a"),
            ("b", "s> a"),
            ("b", "s>= b"),
            ("b", "s< c"),
            ("b", "s<= b"),
        ] {
            assert!(matches(value, wish), "{value} {wish}");
        }
        for (value, wish) in [
            ("ssd", "hdd"),
            ("ssd", "<or> hdd <or> tape"),
            ("<or>", "<or> hdd <or> tape"),
            ("ssd", "<in>"),
            ("ssd", "<all-in>"),
            ("avx", "<all-in> aes avx"),
            ("2", "= 4"),
            ("much", ">= 8"),
            ("8", ">= much"),
            ("b", "s< b"),
        ] {
            assert!(!matches(value, wish), "{value} {wish}");
        }
    }

    #[test]
    fn each_key_needs_a_value_of_some_aggregate() {
        let set = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect();
        let there = Metadata::from([("disk".into(), set(&["ssd", "nvme"])), ("gpu".into(), set(&["no"]))]);
        let asked = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, wish)| ((*key).to_owned(), (*wish).to_owned())).collect()
        };
        assert_eq!(lacking(&asked(&[]), &there), None);
        assert_eq!(lacking(&asked(&[("disk", "nvme"), ("gpu", "no")]), &there), None);
        assert_eq!(lacking(&asked(&[("disk", "nvme"), ("gpu", "yes")]), &there), Some("gpu"));
        assert_eq!(lacking(&asked(&[("rack", "s!= 1")]), &there), Some("rack"));
    }
}
