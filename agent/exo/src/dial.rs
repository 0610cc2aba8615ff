//! A Kubernetes client of another node's API server.

use std::time::Duration;

use exo_trust::{TlsPaths, client_config};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioExecutor};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _},
};
use tower::ServiceBuilder;

/// A machine on the LAN answers sooner or not at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// The client of `peer` (`HOST:PORT`), with this node's certificate. One that is renewed is used
/// from the next connection on, which kube's own way of reading certificates would not do.
pub(crate) fn kube_client(tls: &TlsPaths, peer: &str) -> anyhow::Result<Client> {
    let config = Config::new(format!("https://{peer}").parse()?);
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_LIMIT));
    // A peer that has gone without a word must not hold a watch for ever.
    tcp.set_keepalive(Some(Duration::from_secs(15)));
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(client_config(tls)?)
        .https_only()
        .enable_http1()
        .wrap_connector(tcp);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new().layer(config.base_uri_layer()).service(http);
    Ok(Client::new(service, "default"))
}
