//! Certificates as public keys of users: what WinRM of a Windows guest takes instead of a password.
//!
//! The private half is what Nova gives: a PKCS#12 file (RFC 7292) of key and certificate with an empty password, base64. An
//! empty password hides nothing, so the key is in it as it is; the file's MAC is there because many programs want one.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, OtherNameValue,
    PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use ring::{
    digest::{SHA1_FOR_LEGACY_USE_ONLY as SHA1, digest},
    hmac,
};
use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject as _};
use yasna::{
    ASN1Error, ASN1ErrorKind, ASN1Result, BERReader, DERWriter, Tag, construct_der, models::ObjectIdentifier,
    tags::TAG_SEQUENCE,
};

use crate::http::error::ApiError;

/// Years for which a certificate that is made here is good, Nova's.
const YEARS: i32 = 10;
/// Microsoft's user principal name, as a subject's alternative name.
const UPN: [u64; 10] = [1, 3, 6, 1, 4, 1, 311, 20, 2, 3];
/// Object identifiers of PKCS#12 and what it is built of.
const DATA: [u64; 7] = [1, 2, 840, 113_549, 1, 7, 1];
const KEY_BAG: [u64; 9] = [1, 2, 840, 113_549, 1, 12, 10, 1, 1];
const CERTIFICATE_BAG: [u64; 9] = [1, 2, 840, 113_549, 1, 12, 10, 1, 3];
const X509_CERTIFICATE: [u64; 8] = [1, 2, 840, 113_549, 1, 9, 22, 1];
const LOCAL_KEY_ID: [u64; 7] = [1, 2, 840, 113_549, 1, 9, 21];
const SHA_1: [u64; 6] = [1, 3, 14, 3, 2, 26];
/// Rounds of the derivation of the MAC's key: the password is empty, they protect nothing.
const ROUNDS: u32 = 1;
const SALT: usize = 8;

/// The fingerprint of the one certificate that a PEM text has: SHA-1 of it, as pairs of hex digits with colons.
///
/// # Errors
/// What is wrong with the text.
pub(super) fn fingerprint(pem: &str) -> Result<String, &'static str> {
    let mut found = CertificateDer::pem_slice_iter(pem.as_bytes());
    let certificate = match (found.next(), found.next()) {
        (Some(Ok(one)), None) => one,
        (Some(Ok(_)), Some(_)) => return Err("there is more than one certificate"),
        _ => return Err("there is no certificate in PEM (\"-----BEGIN CERTIFICATE-----\")"),
    };
    yasna::parse_der(&certificate, certificate_form).map_err(|_| "what is in the PEM is no certificate")?;
    let digits: Vec<String> =
        digest(&SHA1, &certificate).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digits.join(":"))
}

/// Reads a certificate over (RFC 5280, section 4.1).
fn certificate_form(reader: BERReader<'_, '_>) -> ASN1Result<()> {
    reader.read_sequence(|parts| {
        parts.next().read_sequence(|fields| {
            fields
                .read_optional(|version| version.read_tagged(Tag::context(0), |number| number.read_u8()))?;
            fields.next().read_bigint_bytes()?;
            // Algorithm, issuer, validity, subject, public key.
            for _ in 0..5 {
                sequence(fields.next())?;
            }
            while fields.read_optional(|extra| extra.read_tagged_der())?.is_some() {}
            Ok(())
        })?;
        sequence(parts.next())?;
        parts.next().read_bitvec_bytes().map(drop)
    })
}

fn sequence(reader: BERReader<'_, '_>) -> ASN1Result<()> {
    match reader.lookahead_tag()? == TAG_SEQUENCE {
        true => reader.read_der().map(drop),
        false => Err(ASN1Error::new(ASN1ErrorKind::Invalid)),
    }
}

/// A new pair for a user: the certificate in PEM, and the PKCS#12 file in base64.
///
/// # Errors
/// 500 if the kernel gives no random numbers.
pub(super) fn generate(user_id: &str) -> Result<(String, String), ApiError> {
    let failed = |error: rcgen::Error| ApiError::internal(error.to_string());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, user_id);
    let today = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    let month = u8::try_from(today.month()).map_err(ApiError::internal)?;
    // Every month has a 28th, also in ten years.
    let day = u8::try_from(today.day().min(28)).map_err(ApiError::internal)?;
    let mut wanted = CertificateParams::default();
    wanted.not_before = date_time_ymd(today.year().into(), month, day);
    wanted.not_after = date_time_ymd(i32::from(today.year()) + YEARS, month, day);
    wanted.distinguished_name = subject;
    wanted.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let name = OtherNameValue::Utf8String(format!("{user_id}@localhost"));
    wanted.subject_alt_names = vec![SanType::OtherName((UPN.to_vec(), name))];
    let certificate = wanted.self_signed(&key).map_err(failed)?;
    let mut salt = [0; SALT];
    getrandom::fill(&mut salt).map_err(|error| ApiError::internal(error.to_string()))?;
    let file = pkcs12(&key.serialize_der(), certificate.der(), &salt);
    Ok((certificate.pem(), STANDARD.encode(file)))
}

fn oid(numbers: &[u64]) -> ObjectIdentifier {
    ObjectIdentifier::from_slice(numbers)
}

/// PKCS#7 content of the type `data`.
fn data(writer: DERWriter<'_>, bytes: &[u8]) {
    writer.write_sequence(|content| {
        content.next().write_oid(&oid(&DATA));
        content.next().write_tagged(Tag::context(0), |inner| inner.write_bytes(bytes));
    });
}

/// A bag with the attribute that says which key and certificate belong together.
fn bag(writer: DERWriter<'_>, kind: &[u64], value: impl FnOnce(DERWriter<'_>)) {
    writer.write_sequence(|bag| {
        bag.next().write_oid(&oid(kind));
        bag.next().write_tagged(Tag::context(0), value);
        bag.next().write_set(|attributes| {
            attributes.next().write_sequence(|attribute| {
                attribute.next().write_oid(&oid(&LOCAL_KEY_ID));
                attribute.next().write_set(|values| values.next().write_bytes(&[1]));
            });
        });
    });
}

fn pkcs12(key: &[u8], certificate: &[u8], salt: &[u8; SALT]) -> Vec<u8> {
    let bags = construct_der(|writer| {
        writer.write_sequence(|bags| {
            bag(bags.next(), &CERTIFICATE_BAG, |value| {
                value.write_sequence(|inner| {
                    inner.next().write_oid(&oid(&X509_CERTIFICATE));
                    inner.next().write_tagged(Tag::context(0), |bytes| bytes.write_bytes(certificate));
                });
            });
            bag(bags.next(), &KEY_BAG, |value| value.write_der(key));
        });
    });
    let safe = construct_der(|writer| writer.write_sequence(|all| data(all.next(), &bags)));
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &mac_key(salt)), &safe);
    construct_der(|writer| {
        writer.write_sequence(|file| {
            file.next().write_u8(3);
            data(file.next(), &safe);
            file.next().write_sequence(|parts| {
                parts.next().write_sequence(|digest| {
                    digest.next().write_sequence(|algorithm| {
                        algorithm.next().write_oid(&oid(&SHA_1));
                        algorithm.next().write_null();
                    });
                    digest.next().write_bytes(mac.as_ref());
                });
                parts.next().write_bytes(salt);
                parts.next().write_u32(ROUNDS);
            });
        });
    })
}

/// RFC 7292, appendix B.2, of the empty password (which is its terminating zero) for a MAC: one block of SHA-1 is all.
fn mac_key(salt: &[u8; SALT]) -> Vec<u8> {
    /// SHA-1's block, bytes.
    const BLOCK: usize = 64;
    /// "Key material for a MAC".
    const PURPOSE: u8 = 3;
    let salts = salt.iter().copied().cycle().take(BLOCK);
    let text: Vec<u8> = std::iter::repeat_n(PURPOSE, BLOCK).chain(salts).chain([0; BLOCK]).collect();
    let first = digest(&SHA1, &text);
    (1..ROUNDS).fold(first, |last, _| digest(&SHA1, last.as_ref())).as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use proptest::prelude::*;

    use super::*;

    /// What openssl makes of an input; none where there is no openssl.
    fn openssl(arguments: &[&str], input: &[u8]) -> Option<String> {
        let mut command = Command::new("openssl");
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let Ok(mut child) = command.spawn() else {
            eprintln!("SKIPPED: there is no openssl");
            return None;
        };
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn openssl_reads_the_certificate_and_finds_its_key_in_the_file() {
        let (certificate, file) = generate("0123ab").unwrap();
        let Some(text) =
            openssl(&["x509", "-noout", "-text", "-fingerprint", "-sha1"], certificate.as_bytes())
        else {
            return;
        };
        for part in ["Subject: CN = 0123ab", "TLS Web Client Authentication", "UPN::0123ab@localhost"] {
            assert!(text.replace("CN=", "CN = ").replace("othername: ", "").contains(part), "{part}: {text}");
        }
        let shown = text.lines().find_map(|line| line.split_once("Fingerprint=")).unwrap().1;
        assert_eq!(fingerprint(&certificate).unwrap(), shown.to_lowercase());
        let file = STANDARD.decode(file).unwrap();
        let inside = openssl(&["pkcs12", "-passin", "pass:", "-nodes"], &file).unwrap();
        assert!(inside.contains(certificate.trim()), "{inside}");
        let key = &inside[inside.find("-----BEGIN PRIVATE KEY-----").unwrap()..];
        let of_key = openssl(&["pkey", "-pubout"], key.as_bytes());
        assert_eq!(of_key, openssl(&["x509", "-noout", "-pubkey"], certificate.as_bytes()));
    }

    #[test]
    fn what_is_no_single_certificate_is_refused() {
        let (certificate, _) = generate("u").unwrap();
        fingerprint(&format!("Subject: u\n{certificate}")).unwrap();
        let key = certificate.replace("CERTIFICATE", "PUBLIC KEY");
        let cut =
            certificate.lines().take(4).chain(["-----END CERTIFICATE-----"]).collect::<Vec<_>>().join("\n");
        for wrong in ["", "ssh-ed25519 AAAA", &key, &cut, &format!("{certificate}{certificate}")] {
            fingerprint(wrong).unwrap_err();
        }
    }

    proptest! {
        /// Whatever is changed in a certificate, reading it ends.
        #[test]
        fn no_bytes_make_the_reader_fail_otherwise_than_by_an_error(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let (certificate, _) = generate("u").unwrap();
            let mut der = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap().to_vec();
            for (at, byte) in changes {
                let at = at.index(der.len());
                der[at] = byte;
            }
            let _ = yasna::parse_der(&der, certificate_form);
        }
    }
}
