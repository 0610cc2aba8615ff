//! The cluster's certificate authority.

use std::{collections::BTreeSet, net::IpAddr, path::Path, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject as _};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use crate::{NODE_DNS_NAME, TrustError, client::root_store, provider, write_private};

/// Ten years: nothing rotates the authority, and its loss means joining again.
const CA_DAYS: u64 = 3650;
/// A year; members renew in the last third.
const LEAF_DAYS: u64 = 365;
const DAY_S: u64 = 86_400;
/// Clocks of Macs on one LAN may differ by this much.
const SKEW_S: u64 = 3600;

/// Signs certificates. Its key is in the data directories of the control plane's nodes, and nowhere
/// else.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    key_pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is nobody's business.
        f.debug_struct("Authority").field("certificate_pem", &self.certificate_pem).finish()
    }
}

/// Whom a certificate speaks for; becomes CN and O of its subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub name: String,
    pub groups: Vec<String>,
}

/// A certificate with the key that was made for it, both PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate_pem: String,
    pub key_pem: String,
}

/// A signing request made by a joining node; the key stays there.
#[derive(Clone, Debug)]
pub struct Request {
    pub csr_pem: String,
    pub key_pem: String,
}

impl Authority {
    /// Opens the authority in `dir` (`ca.crt`, `ca.key`), or makes one. `now_s`: Unix time.
    pub fn open_or_create(dir: &Path, now_s: u64) -> Result<Self, TrustError> {
        let (cert_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        // The certificate is written last: without it there is a torn creation, made anew. Without
        // its key there was an authority once, which must not be replaced in silence.
        if cert_path.exists() {
            let text = |path: &Path| {
                std::fs::read_to_string(path)
                    .map_err(|source| TrustError::Read { path: path.to_owned(), source })
            };
            return Self::from_pem(text(&cert_path)?, text(&key_path)?);
        }
        std::fs::create_dir_all(dir)
            .map_err(|source| TrustError::Write { path: dir.to_owned(), source })?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = distinguished_name(&Subject {
            name: "exo cluster authority".to_owned(),
            groups: Vec::new(),
        });
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, now_s, CA_DAYS);
        let certificate_pem = params.self_signed(&key)?.pem();
        write_private(&key_path, key.serialize_pem().as_bytes())?;
        write_private(&cert_path, certificate_pem.as_bytes())?;
        Self::from_pem(certificate_pem, key.serialize_pem())
    }

    /// Writes an authority that another node has handed over into `dir`. Its certificate is there
    /// already, and the key must be the one that belongs to it.
    pub fn adopt(dir: &Path, key_pem: &str) -> Result<(), TrustError> {
        let cert_path = dir.join("ca.crt");
        let certificate_pem = std::fs::read_to_string(&cert_path)
            .map_err(|source| TrustError::Read { path: cert_path, source })?;
        Self::from_pem(certificate_pem, key_pem.to_owned())?;
        write_private(&dir.join("ca.key"), key_pem.as_bytes())
    }

    fn from_pem(certificate_pem: String, key_pem: String) -> Result<Self, TrustError> {
        let key = KeyPair::from_pem(&key_pem)?;
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| TrustError::Parse(error.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&der)
            .map_err(|error| TrustError::Parse(error.to_string()))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(TrustError::Parse(
                "the authority's key doesn't belong to its certificate".to_owned(),
            ));
        }
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)?;
        Ok(Self { issuer, certificate_pem, key_pem })
    }

    /// The private key, PEM: for a node that takes part in the control plane.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The authority's own certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Issues a certificate with a new key. Nodes pass their addresses; people pass none.
    pub fn issue(
        &self,
        subject: &Subject,
        addresses: Option<&[IpAddr]>,
        now_s: u64,
    ) -> Result<Issued, TrustError> {
        let key_pem = KeyPair::generate()?.serialize_pem();
        let certificate_pem = self.renew(subject, addresses, &key_pem, now_s)?;
        Ok(Issued { certificate_pem, key_pem })
    }

    /// Issues a certificate for a key that is there already, so that only one file need be replaced.
    pub fn renew(
        &self,
        subject: &Subject,
        addresses: Option<&[IpAddr]>,
        key_pem: &str,
        now_s: u64,
    ) -> Result<String, TrustError> {
        let key = KeyPair::from_pem(key_pem)?;
        Ok(leaf(subject, addresses, now_s)?.signed_by(&key, &self.issuer)?.pem())
    }

    /// Whether this is what [`issue`](Self::issue) could have given for these, and is not about to
    /// end.
    pub fn has_issued(
        &self,
        issued: &Issued,
        subject: &Subject,
        addresses: Option<&[IpAddr]>,
        now_s: u64,
    ) -> bool {
        !certificate_renewal_due(&issued.certificate_pem, now_s)
            && self.is_same(issued, subject, addresses, now_s).unwrap_or(false)
    }

    fn is_same(
        &self,
        issued: &Issued,
        subject: &Subject,
        addresses: Option<&[IpAddr]>,
        now_s: u64,
    ) -> Result<bool, TrustError> {
        let unread = |error: &dyn std::error::Error| TrustError::Parse(error.to_string());
        let der =
            |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| unread(&e));
        let leaf_der = der(&issued.certificate_pem)?;
        let (_, certificate) = X509Certificate::from_der(&leaf_der).map_err(|e| unread(&e))?;
        let key = KeyPair::from_pem(&issued.key_pem)?;
        let wanted = leaf(subject, addresses, now_s)?;
        let roots = Arc::new(root_store(&[der(&self.certificate_pem)?])?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now_s));
        Ok(certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw()
            && subject_of(&leaf_der)? == *subject
            && names_in(&certificate) == wanted.subject_alt_names.iter().map(name_text).collect()
            && verifier.verify_client_cert(&leaf_der, &[], now).is_ok())
    }

    /// Signs a node's request. Only its public key is taken over; subject and names are ours.
    pub fn sign(
        &self,
        csr_pem: &str,
        subject: &Subject,
        addresses: &[IpAddr],
        now_s: u64,
    ) -> Result<String, TrustError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)?;
        request.params = leaf(subject, Some(addresses), now_s)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }
}

impl Request {
    /// Makes a key and a request for it.
    pub fn new() -> Result<Self, TrustError> {
        Self::of_key(KeyPair::generate()?.serialize_pem())
    }

    /// Makes a request for a key that is there already.
    pub fn of_key(key_pem: String) -> Result<Self, TrustError> {
        let key = KeyPair::from_pem(&key_pem)?;
        let csr_pem = CertificateParams::new(Vec::new())?.serialize_request(&key)?.pem()?;
        Ok(Self { csr_pem, key_pem })
    }
}

/// Whether a certificate (PEM) is in the last third of its life or unreadable.
pub fn certificate_renewal_due(certificate_pem: &str, now_s: u64) -> bool {
    ends_within(certificate_pem, now_s, LEAF_DAYS * DAY_S / 3)
}

/// Whether a certificate (PEM) is past its end or unreadable.
pub fn certificate_expired(certificate_pem: &str, now_s: u64) -> bool {
    ends_within(certificate_pem, now_s, 0)
}

fn ends_within(certificate_pem: &str, now_s: u64, seconds: u64) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(certificate_pem.as_bytes()) else {
        return true;
    };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else {
        return true;
    };
    let end = certificate.validity().not_after.timestamp();
    u64::try_from(end).unwrap_or(0) < now_s.saturating_add(seconds)
}

/// Whom a certificate (PEM) speaks for.
pub fn certificate_subject(certificate_pem: &str) -> Result<Subject, TrustError> {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
        .map_err(|error| TrustError::Parse(error.to_string()))?;
    subject_of(&der)
}

/// CN and O of a certificate in DER form.
pub(crate) fn subject_of(der: &CertificateDer<'_>) -> Result<Subject, TrustError> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| TrustError::Parse(error.to_string()))?;
    let subject = certificate.subject();
    let text = |value: &x509_parser::x509::AttributeTypeAndValue<'_>| {
        value.as_str().map(str::to_owned).map_err(|error| TrustError::Parse(error.to_string()))
    };
    let name = subject
        .iter_common_name()
        .next()
        .ok_or_else(|| TrustError::Parse("the subject has no common name".to_owned()))?;
    Ok(Subject {
        name: text(name)?,
        groups: subject.iter_organization().map(text).collect::<Result<_, _>>()?,
    })
}

fn leaf(
    subject: &Subject,
    addresses: Option<&[IpAddr]>,
    now_s: u64,
) -> Result<CertificateParams, TrustError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = distinguished_name(subject);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if let Some(addresses) = addresses {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        let mut names = vec![NODE_DNS_NAME, "localhost"];
        names.extend(is_dns_name(&subject.name).then_some(subject.name.as_str()));
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    }
    set_validity(&mut params, now_s, LEAF_DAYS);
    Ok(params)
}

/// For whom a certificate is, besides its subject.
fn names_in(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return BTreeSet::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => (*name).to_owned(),
        GeneralName::IPAddress(bytes) => {
            match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
                (Ok(v4), _) => IpAddr::from(v4).to_string(),
                (_, Ok(v6)) => IpAddr::from(v6).to_string(),
                _ => name.to_string(),
            }
        }
        name => name.to_string(),
    };
    names.value.general_names.iter().map(text).collect()
}

/// The same of one that is to be.
fn name_text(name: &SanType) -> String {
    match name {
        SanType::DnsName(name) => name.as_str().to_owned(),
        SanType::IpAddress(address) => address.to_string(),
        other => format!("{other:?}"),
    }
}

fn is_dns_name(name: &str) -> bool {
    rustls_pki_types::DnsName::try_from(name).is_ok()
}

fn distinguished_name(subject: &Subject) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for group in &subject.groups {
        name.push(DnType::OrganizationName, group.as_str());
    }
    name.push(DnType::CommonName, subject.name.as_str());
    name
}

fn set_validity(params: &mut CertificateParams, now_s: u64, days: u64) {
    let at = |seconds: u64| {
        let now = i64::try_from(seconds).unwrap_or(i64::MAX);
        time::OffsetDateTime::from_unix_timestamp(now).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
    };
    params.not_before = at(now_s.saturating_sub(SKEW_S));
    params.not_after = at(now_s + days * DAY_S);
}
