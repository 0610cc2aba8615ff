//! Kubernetes clients: of another node's API server, and of the one in this process. Each says which
//! part of exo it is, so that objects tell who changed them.

use std::time::Duration;

use axum::{Router, middleware};
use exo_apiserver::{Identity, in_process};
use exo_trust::{GROUP_ADMINS, TlsPaths, client_config};
use http::{HeaderValue, header};
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
    let named = |request| name(request, "exo-agent");
    let layers = ServiceBuilder::new().map_request(named).layer(config.base_uri_layer());
    Ok(Client::new(layers.service(http), "default"))
}

/// The API server in this process.
#[derive(Clone)]
pub(crate) struct OwnApi(Router);

impl OwnApi {
    pub(crate) fn new(router: Router) -> Self {
        Self(router)
    }

    /// A client for one part of exo, with all rights.
    pub(crate) fn client(&self, part: &'static str) -> Client {
        let own = Identity { name: "system:exo".to_owned(), groups: vec![GROUP_ADMINS.to_owned()] };
        let named = move |request: axum::extract::Request| async move { name(request, part) };
        let router = self.0.clone().layer(middleware::map_request(named));
        Client::new(in_process(router, own), "default")
    }
}

fn name<B>(mut request: http::Request<B>, part: &'static str) -> http::Request<B> {
    request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(part));
    request
}

#[cfg(test)]
mod tests {
    use exo_apiserver::{ApiServer, app};
    use exo_crds::{Node, NodeSpec};
    use exo_store::Store;
    use kube::{Api, api::PostParams};

    use super::*;

    #[tokio::test]
    async fn objects_say_which_part_changed_them() {
        let registry = prometheus::Registry::new();
        let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
        let own = OwnApi::new(app(server));
        let nodes: Api<Node> = Api::all(own.client("exo-agent"));
        let node = Node::new("a", NodeSpec::default());
        let node = nodes.create(&PostParams::default(), &node).await.unwrap();
        let managers = node.metadata.managed_fields.unwrap();
        assert_eq!(managers[0].manager.as_deref(), Some("exo-agent"));
    }
}
