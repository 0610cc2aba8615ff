//! Who may talk to whom: the cluster's certificate authority, the certificates it issues, and the
//! TLS listener and clients that both halves of a node use, and serving with limits.
//!
//! Every member holds a key of its own and a certificate signed by the cluster's authority. All
//! node certificates carry the name [`NODE_DNS_NAME`]; members verify that name instead of an
//! address, because a Mac's addresses change. Never: policy on who may join.

mod authority;
mod client;
mod identity;
mod listener;
mod serve;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{ServerConfig, crypto::CryptoProvider, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};

pub use authority::{
    Authority, Issued, Request, Subject, certificate_expired, certificate_renewal_due,
    certificate_subject,
};
pub use client::{bootstrap_client, client_config, reqwest_client};
pub use listener::{Peer, TlsListener};
pub use serve::{ServeLimits, serve};

/// The DNS name in every node's certificate.
pub const NODE_DNS_NAME: &str = "node.exo.internal";
/// Organisation of certificates that may do everything.
pub const GROUP_ADMINS: &str = "system:masters";
/// Organisation of node certificates.
pub const GROUP_NODES: &str = "system:nodes";
/// The same for nodes that hold the cluster's store and its authority's key.
pub const GROUP_CONTROL_PLANE: &str = "exo:control-plane";

/// Files of one member: authority's certificate, own certificate, own key, all PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsPaths {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What went wrong with keys, certificates or TLS.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("writing {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} holds no usable PEM data")]
    Pem {
        path: PathBuf,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("making or signing a certificate")]
    Certificate(#[from] rcgen::Error),
    #[error("not a certificate: {0}")]
    Parse(String),
    #[error("setting up TLS")]
    Tls(#[from] rustls::Error),
    #[error("setting up certificate checks")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
    #[error("making an HTTP client")]
    Client(#[from] reqwest::Error),
}

impl TlsPaths {
    /// The three files under their usual names in `dir`.
    pub fn in_dir(dir: &Path) -> Self {
        Self { ca: dir.join("ca.crt"), cert: dir.join("node.crt"), key: dir.join("node.key") }
    }

    pub(crate) fn read_ca(&self) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        read_certificates(&self.ca)
    }

    pub(crate) fn read_identity(
        &self,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TrustError> {
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|source| TrustError::Pem { path: self.key.clone(), source })?;
        Ok((read_certificates(&self.cert)?, key))
    }
}

/// Whether a server demands a client certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Connections without a certificate of the cluster are refused.
    Required,
    /// They are let in without a [`Peer::certificate`]; routes decide.
    Optional,
}

/// TLS server side: presents the member's certificate, accepts clients of the same cluster. A
/// certificate that is renewed in its file is presented from the next handshake on.
pub fn server_config(paths: &TlsPaths, auth: ClientAuth) -> Result<ServerConfig, TrustError> {
    let roots = Arc::new(client::root_store(&paths.read_ca()?)?);
    let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    if auth == ClientAuth::Optional {
        verifier = verifier.allow_unauthenticated();
    }
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier.build()?)
        .with_cert_resolver(identity::Identity::open(paths)?);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Makes ring the process's cryptography for libraries that don't name one. Idempotent.
pub fn install_crypto() {
    // An error only says that a provider is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    fs::read(path).map_err(|source| TrustError::Read { path: path.to_owned(), source })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let pem = |source| TrustError::Pem { path: path.to_owned(), source };
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<_, _>>().map_err(pem)?;
    if found.is_empty() { Err(pem(rustls_pki_types::pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// Writes a file that only its owner can read, whole or not at all. One that holds this already is
/// left as it is: that needs no room on the disk.
pub fn write_private(path: &Path, data: &[u8]) -> Result<(), TrustError> {
    if is_private(path) && fs::read(path).is_ok_and(|present| present == data) {
        return Ok(());
    }
    let part = path.with_extension("part");
    let write = || -> io::Result<()> {
        let _ = fs::remove_file(&part);
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&part)?;
        file.write_all(data)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&part);
        TrustError::Write { path: path.to_owned(), source }
    })
}

impl TrustError {
    /// A file could not be written because its disk is full.
    pub fn is_full_disk(&self) -> bool {
        let Self::Write { source, .. } = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Whether this is a file that only its owner can read.
fn is_private(path: &Path) -> bool {
    let Ok(found) = fs::symlink_metadata(path) else { return false };
    #[cfg(unix)]
    let is_closed = std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o077 == 0;
    #[cfg(not(unix))]
    let is_closed = true;
    found.is_file() && is_closed
}
