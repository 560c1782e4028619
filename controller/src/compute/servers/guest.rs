//! What a request asks of the inside of a guest: that its root file system grows or not (`OS-DCF:diskConfig`), and a
//! password (`adminPass`).
//!
//! Nobody reaches into a guest. What is asked for is vendor data, a cloud-config that cloud-init reads at a server's first
//! boot and after a rebuild, from the metadata service or the config drive.

use serde_json::Value;
use sha_crypt::{Algorithm, Params, PasswordHasher, ShaCrypt};

use super::{
    create::random,
    input::{Fields, invalid},
};
use crate::http::error::ApiError;

/// Longest password.
const MAX_PASSWORD: usize = 255;
/// Rounds of SHA-512: as many as crypt(3) makes unless told otherwise.
const ROUNDS: u32 = 5000;

/// `OS-DCF:diskConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskConfig {
    /// The guest's own tools grow its root file system to the size of the disk.
    Auto,
    /// They leave it as it is.
    Manual,
}

impl DiskConfig {
    /// Its word in the API and the database.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Auto => "AUTO",
            Self::Manual => "MANUAL",
        }
    }

    /// From the database.
    pub(crate) fn from_word(word: &str) -> Self {
        if word == "MANUAL" { Self::Manual } else { Self::Auto }
    }

    /// As a request asks for it, if it does.
    pub(super) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        const NAME: &str = "OS-DCF:diskConfig";
        match fields.string(NAME)?.as_deref() {
            None => Ok(None),
            Some("AUTO") => Ok(Some(Self::Auto)),
            Some("MANUAL") => Ok(Some(Self::Manual)),
            Some(other) => Err(invalid(NAME, &Value::from(other), "is neither AUTO nor MANUAL")),
        }
    }
}

/// `adminPass`, if a request has one: its crypt(3) hash. The password itself is kept nowhere.
pub(super) fn password_hash(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(password) = fields.string("adminPass")? else { return Ok(None) };
    if password.is_empty() || password.len() > MAX_PASSWORD || password.chars().any(char::is_control) {
        let text = format!("adminPass: a password has 1 to {MAX_PASSWORD} printable characters.");
        return Err(ApiError::BadRequest(text));
    }
    let params = Params::new(ROUNDS).map_err(|e| ApiError::internal(e.to_string()))?;
    let hasher = ShaCrypt::new(Algorithm::Sha512Crypt, params);
    // 16 letters that salts are made of.
    let salt = hex::encode(random::<8>()?);
    let hash = hasher.hash_password_with_salt(password.as_bytes(), salt.as_bytes());
    Ok(Some(hash.map_err(|e| ApiError::internal(e.to_string()))?.to_string()))
}

/// The cloud-config that says so; none where there is nothing to say.
pub(crate) fn vendor_data(disk: DiskConfig, password_hash: Option<&str>) -> Option<String> {
    let mut text = String::new();
    if disk == DiskConfig::Manual {
        text += "growpart: {mode: 'off'}\nresize_rootfs: false\n";
    }
    if let Some(hash) = password_hash {
        // A hash has no quotes and no line breaks.
        text += &format!("password: '{hash}'\nchpasswd: {{expire: false}}\n");
    }
    (!text.is_empty()).then(|| format!("#cloud-config\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::open(json!({ "server": value }), "server", &[]).unwrap()
    }

    #[test]
    fn a_password_is_kept_as_a_hash_that_crypt_understands() {
        let hash = password_hash(&mut fields(json!({"adminPass": "se cret"}))).unwrap().unwrap();
        assert!(hash.starts_with("$6$"), "{hash}");
        assert!(!hash.contains("cret"));
        let again = password_hash(&mut fields(json!({"adminPass": "se cret"}))).unwrap().unwrap();
        assert_ne!(hash, again, "each has a salt of its own");
        assert_eq!(password_hash(&mut fields(json!({}))).unwrap(), None);
        for wrong in [json!(""), json!("a\nb"), json!("x".repeat(256)), json!(1)] {
            assert!(password_hash(&mut fields(json!({"adminPass": wrong}))).is_err());
        }
    }

    #[test]
    fn vendor_data_say_what_was_asked_for() {
        assert_eq!(vendor_data(DiskConfig::Auto, None), None);
        let text = vendor_data(DiskConfig::Manual, Some("$6$salt$hash")).unwrap();
        assert_eq!(
            text,
            "#cloud-config\ngrowpart: {mode: 'off'}\nresize_rootfs: false\npassword: '$6$salt$hash'\nchpasswd: {expire: false}\n"
        );
    }
}
