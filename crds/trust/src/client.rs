//! TLS clients: members of the cluster, and the one that asks to join.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::{NODE_DNS_NAME, TlsPaths, TrustError, identity::Identity, provider};

/// TLS client side of a member: presents its certificate, accepts any node of the same cluster
/// whatever address it was reached at. A renewed certificate is used from the next handshake on.
pub fn client_config(paths: &TlsPaths) -> Result<ClientConfig, TrustError> {
    let roots = Arc::new(root_store(&paths.read_ca()?)?);
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider()).build()?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NodeVerifier { inner }))
        .with_client_cert_resolver(Identity::open(paths)?);
    Ok(config)
}

/// An HTTP client of a member; see [`client_config`]. No overall time-out: answers stream.
pub fn reqwest_client(paths: &TlsPaths) -> Result<reqwest::Client, TrustError> {
    Ok(reqwest::Client::builder()
        .tls_backend_preconfigured(client_config(paths)?)
        .no_proxy()
        .tcp_nodelay(true)
        .connect_timeout(std::time::Duration::from_secs(3))
        .build()?)
}

/// An HTTP client that trusts whoever answers, for the one request by which a node without
/// certificates joins a cluster of a trusted LAN.
pub fn bootstrap_client() -> Result<reqwest::Client, TrustError> {
    crate::install_crypto();
    Ok(reqwest::Client::builder()
        .tls_danger_accept_invalid_certs(true)
        .no_proxy()
        .timeout(std::time::Duration::from_secs(10))
        .build()?)
}

pub(crate) fn root_store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, TrustError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}

/// Checks the chain and the name that all nodes share, not the address that was dialled.
#[derive(Debug)]
struct NodeVerifier {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let name = ServerName::try_from(NODE_DNS_NAME).expect("the constant is a DNS name");
        self.inner.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
