//! Which attributes an image can be given, and what they may be. Pure: used by create and by PATCH.

use std::collections::BTreeSet;

use serde_json::Value;

use super::record::{Image, Status};
use crate::http::{context::Ctx, error::ApiError};

/// Most properties of an image (Glance's `image_property_quota`).
pub(crate) const MAX_PROPERTIES: usize = 128;
/// Most tags of an image (Glance's `image_tag_quota`).
const MAX_TAGS: usize = 128;
/// Longest name of an image, a property or a tag, in characters.
const MAX_NAME_CHARS: usize = 255;
/// Names and values of all properties together.
const MAX_PROPERTY_BYTES: usize = 64 << 10;
/// Largest `min_disk` and `min_ram`, as Glance's 32-bit integers.
const MAX_MINIMUM: i64 = i32::MAX as i64;

/// What Glance itself decides: refused in requests.
const READ_ONLY: [&str; 15] = [
    "checksum",
    "created_at",
    "direct_url",
    "file",
    "locations",
    "os_hash_algo",
    "os_hash_value",
    "schema",
    "self",
    "size",
    "status",
    "stores",
    "updated_at",
    "upload_id",
    "virtual_size",
];
/// Names that no property may have (Glance's `_reserved_properties`).
const RESERVED: [&str; 5] = ["deleted", "deleted_at", "is_public", "members", "properties"];
/// Properties with it are Glance's own.
const OWN_PREFIX: &str = "os_glance_";
/// What Mote takes as `disk_format`.
pub const DISK_FORMATS: [&str; 5] = ["raw", "qcow2", "iso", "aki", "ari"];
/// What Mote takes as `container_format`.
pub const CONTAINER_FORMATS: [&str; 3] = ["bare", "aki", "ari"];
/// Attributes that can be set but not removed.
const BASE: [&str; 10] = [
    "container_format",
    "disk_format",
    "min_disk",
    "min_ram",
    "name",
    "os_hidden",
    "owner",
    "protected",
    "tags",
    "visibility",
];

/// Whether an attribute is one of Glance's own.
pub fn is_base(name: &str) -> bool {
    BASE.contains(&name) || name == "id" || READ_ONLY.contains(&name)
}

/// Sets an attribute or property.
///
/// # Errors
/// 400 for an impossible value, 403 for what may not be set.
pub fn set(image: &mut Image, name: &str, value: &Value, ctx: &Ctx) -> Result<(), ApiError> {
    match name {
        "name" => image.name = text_or_null(name, value, MAX_NAME_CHARS)?,
        "visibility" => set_visibility(image, value, ctx)?,
        "protected" => image.protected = boolean(name, value)?,
        "os_hidden" => image.hidden = boolean(name, value)?,
        "min_disk" => image.min_disk_gib = minimum(name, value)?,
        "min_ram" => image.min_ram_mib = minimum(name, value)?,
        "tags" => image.tags = tags(value)?,
        "owner" => {
            let owner = text_or_null(name, value, MAX_NAME_CHARS)?;
            if owner.as_ref() != Some(&image.owner) {
                ctx.require_admin()?;
            }
            image.owner = owner.ok_or_else(|| invalid(name, "can't be null"))?;
        }
        "disk_format" | "container_format" => set_format(image, name, value)?,
        "id" => return Err(ApiError::Forbidden("Attribute 'id' is read-only.".into())),
        _ if READ_ONLY.contains(&name) => {
            return Err(ApiError::Forbidden(format!("Attribute '{name}' is read-only.")));
        }
        _ if RESERVED.contains(&name) || name.starts_with(OWN_PREFIX) => {
            return Err(ApiError::Forbidden(format!("Attribute '{name}' is reserved.")));
        }
        _ => set_property(image, name, value)?,
    }
    Ok(())
}

/// Removes a property.
///
/// # Errors
/// 403 for an attribute of Glance's own, 409 if there is no such property.
pub fn remove(image: &mut Image, name: &str) -> Result<(), ApiError> {
    if is_base(name) || RESERVED.contains(&name) {
        return Err(ApiError::Forbidden(format!("Property {name} may not be removed.")));
    }
    let gone = image.properties.remove(name);
    gone.map(drop).ok_or_else(|| ApiError::Conflict(format!("Property {} does not exist.", shorten(name))))
}

/// What must hold of the whole image after all changes.
///
/// # Errors
/// 400 for formats that don't go together, 413 for too many properties or tags.
pub fn check(image: &Image) -> Result<(), ApiError> {
    if let (Some(disk), Some(container)) = (&image.disk_format, &image.container_format) {
        let wanted = if ["aki", "ari"].contains(&disk.as_str()) { disk } else { "bare" };
        if container != wanted {
            let text = format!("An image of disk_format '{disk}' must have the container_format '{wanted}'.");
            return Err(ApiError::BadRequest(text));
        }
    }
    let bytes: usize = image.properties.iter().map(|(name, value)| name.len() + value.len()).sum();
    if image.properties.len() > MAX_PROPERTIES || bytes > MAX_PROPERTY_BYTES {
        let text = format!(
            "An image can have at most {MAX_PROPERTIES} properties of together {MAX_PROPERTY_BYTES} bytes."
        );
        return Err(ApiError::TooLarge(text));
    }
    match image.tags.len() > MAX_TAGS {
        true => Err(ApiError::TooLarge(format!("An image can have at most {MAX_TAGS} tags."))),
        false => Ok(()),
    }
}

/// A tag that is fit to be one.
///
/// # Errors
/// 400.
pub fn checked_tag(tag: &str) -> Result<String, ApiError> {
    match tag.is_empty() || tag.chars().count() > MAX_NAME_CHARS {
        true => Err(invalid("tags", "must be strings of 1 to 255 characters")),
        false => Ok(tag.to_owned()),
    }
}

fn set_visibility(image: &mut Image, value: &Value, ctx: &Ctx) -> Result<(), ApiError> {
    let visibility = value.as_str().unwrap_or_default();
    if !["public", "community", "shared", "private"].contains(&visibility) {
        return Err(invalid("visibility", "must be one of public, community, shared, private"));
    }
    if visibility == "public" && image.visibility != "public" && !ctx.is_admin {
        return Err(ApiError::Forbidden("Only administrators may make an image public.".into()));
    }
    image.visibility = visibility.to_owned();
    Ok(())
}

fn set_format(image: &mut Image, name: &str, value: &Value) -> Result<(), ApiError> {
    let format = text_or_null(name, value, MAX_NAME_CHARS)?;
    let known = match name {
        "disk_format" => &DISK_FORMATS[..],
        _ => &CONTAINER_FORMATS,
    };
    if let Some(format) = &format
        && !known.contains(&format.as_str())
    {
        let hint = match format.as_str() {
            "vmdk" | "vdi" | "vhd" | "vhdx" => ": convert the image with `qemu-img convert -O qcow2`",
            _ => "",
        };
        let format = shorten(format);
        let text = format!("The {name} '{format}' is not supported, only {}{hint}.", known.join(", "));
        return Err(ApiError::BadRequest(text));
    }
    let place = if name == "disk_format" { &mut image.disk_format } else { &mut image.container_format };
    if *place != format && image.status != Status::Queued {
        return Err(ApiError::Forbidden(format!(
            "Attribute {name} can be only replaced for a queued image."
        )));
    }
    *place = format;
    Ok(())
}

fn set_property(image: &mut Image, name: &str, value: &Value) -> Result<(), ApiError> {
    if name.is_empty() || name.chars().count() > MAX_NAME_CHARS {
        return Err(ApiError::BadRequest("The name of a property must have 1 to 255 characters.".into()));
    }
    let Value::String(text) = value else {
        let name = shorten(name);
        return Err(ApiError::BadRequest(format!("The value of the property '{name}' must be a string.")));
    };
    image.properties.insert(name.to_owned(), text.clone());
    Ok(())
}

fn text_or_null(name: &str, value: &Value, max_chars: usize) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if text.chars().count() <= max_chars => Ok(Some(text.clone())),
        Value::String(_) => Err(invalid(name, &format!("may have at most {max_chars} characters"))),
        _ => Err(invalid(name, "must be a string")),
    }
}

fn boolean(name: &str, value: &Value) -> Result<bool, ApiError> {
    value.as_bool().ok_or_else(|| invalid(name, "must be true or false"))
}

fn minimum(name: &str, value: &Value) -> Result<i64, ApiError> {
    let number = value.as_i64().filter(|number| (0..=MAX_MINIMUM).contains(number));
    number.ok_or_else(|| invalid(name, &format!("must be a whole number from 0 to {MAX_MINIMUM}")))
}

fn tags(value: &Value) -> Result<BTreeSet<String>, ApiError> {
    let list = value.as_array().ok_or_else(|| invalid("tags", "must be a list"))?;
    list.iter().map(|tag| checked_tag(tag.as_str().unwrap_or_default())).collect()
}

fn invalid(name: &str, what: &str) -> ApiError {
    ApiError::BadRequest(format!("Invalid value for '{name}': it {what}."))
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}
