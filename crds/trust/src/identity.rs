//! A member's own certificate and key, as they are in their files now.
//!
//! Certificates are renewed while processes run. Whoever serves or dials looks at the file before
//! each handshake, so that a renewed one is in use at once and nothing needs a restart.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tracing::{info, warn};

use crate::{TlsPaths, TrustError, provider};

/// Presents a member's certificate, the renewed one as soon as it is there.
#[derive(Debug)]
pub(crate) struct Identity {
    paths: TlsPaths,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    key: Arc<CertifiedKey>,
    stamp: Option<Stamp>,
    /// A state of the file that can't be used; it was told of once.
    refused: Option<Stamp>,
}

/// What changes with a file's content: renewals replace the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    bytes: u64,
}

impl Identity {
    /// Reads the files.
    ///
    /// # Errors
    /// When one can't be read, or key and certificate are not of each other.
    pub(crate) fn open(paths: &TlsPaths) -> Result<Arc<Self>, TrustError> {
        let stamp = stamp(paths);
        let held = Held { key: load(paths)?, stamp, refused: None };
        Ok(Arc::new(Self { paths: paths.clone(), held: Mutex::new(held) }))
    }

    fn current(&self) -> Arc<CertifiedKey> {
        let stamp = stamp(&self.paths);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if stamp.is_some() && stamp != held.stamp {
            match load(&self.paths) {
                Ok(key) => {
                    info!(certificate = %self.paths.cert.display(), "using the renewed certificate");
                    *held = Held { key, stamp, refused: None };
                }
                // Half of the files may be new: looked at again with the next handshake.
                Err(error) if stamp != held.refused => {
                    warn!("keeping the old certificate: {:#}", chain(&error));
                    held.refused = stamp;
                }
                Err(_) => {}
            }
        }
        held.key.clone()
    }
}

fn stamp(paths: &TlsPaths) -> Option<Stamp> {
    let metadata = fs::metadata(&paths.cert).ok()?;
    Some(Stamp { modified: metadata.modified().ok()?, bytes: metadata.len() })
}

fn load(paths: &TlsPaths) -> Result<Arc<CertifiedKey>, TrustError> {
    let (chain, key) = paths.read_identity()?;
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider())?))
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
