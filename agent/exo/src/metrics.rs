//! `/metrics` by TLS, and who asks for it.

use std::net::SocketAddr;

use axum::{
    Extension, Router,
    extract::{ConnectInfo, Request},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::get,
};
use exo_apiserver::Identity;
use exo_trust::{ClientAuth, Peer, ServeLimits, TlsListener, serve, server_config};
use prometheus::{Registry, TextEncoder};
use tokio::net::TcpListener;
use tracing::info;

use crate::{config::Config, data_dir::DataDir, part::Part, run::bind};

/// Turns the connection's certificate into the identity that the API server asks for.
pub(crate) async fn identify(
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    if let Some(subject) = peer.certificate {
        let identity = Identity { name: subject.name, groups: subject.groups };
        request.extensions_mut().insert(identity);
    }
    next.run(request).await
}

/// For callers with a certificate.
pub(crate) fn route(registry: Registry) -> Router {
    let handler = move |identity: Option<Extension<Identity>>| async move {
        let refuse = |code, text: String| (code, text).into_response();
        if identity.is_none() {
            let needed = "a client certificate is needed".to_owned();
            return refuse(StatusCode::UNAUTHORIZED, needed);
        }
        match TextEncoder::new().encode_to_string(&registry.gather()) {
            Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
            Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    };
    Router::new().route("/metrics", get(handler))
}

/// `/metrics` of a node without a control plane, on the API port or any free one, for callers with
/// a certificate of the cluster.
pub(crate) async fn serve_alone(
    config: &Config,
    data: &DataDir,
    registry: &Registry,
) -> anyhow::Result<Part> {
    let socket = match TcpListener::bind(config.metrics).await {
        Ok(socket) => socket,
        // Two nodes on one machine: the other one has the port.
        Err(_) => bind(SocketAddr::new(config.metrics.ip(), 0), "--api-port").await?,
    };
    info!(address = %socket.local_addr()?, "serving /metrics");
    let listener = TlsListener::new(socket, server_config(&data.tls(), ClientAuth::Required)?)?;
    let app = route(registry.clone()).layer(middleware::from_fn(identify));
    Ok(Part::start("metrics server", |stop| async move {
        serve(listener, app, ServeLimits::default(), stop.cancelled_owned()).await;
        Ok(())
    }))
}
