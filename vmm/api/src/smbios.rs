//! *Mote*: what the firmware of a real machine would say of it.

use serde::{Deserialize, Serialize};

/// *Mote*: `/mote/smbios`, and `smbios` in the config file: strings of the SMBIOS tables, which a guest's programs read from
/// `/sys/class/dmi/id` or with `dmidecode`; cloud-init finds out by `product_name` which cloud it is in. Each string has 1 to
/// 255 characters of printable ASCII. What is absent has no string in the tables, except manufacturer (`Mote`) and product
/// name (`microVM`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Smbios {
    /// System manufacturer (`sys_vendor`), also of the chassis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// System product name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product_name: Option<String>,
    /// System version (`product_version`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// System serial number (`product_serial`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// System UUID in its usual form with hyphens (`product_uuid`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// System SKU number (`product_sku`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sku_number: Option<String>,
    /// System family (`product_family`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Asset tag of the chassis (`chassis_asset_tag`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// OEM strings (type 11), at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub oem_strings: Vec<String>,
}
