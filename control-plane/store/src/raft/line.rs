//! A connection to one other node that is driven by the task which uses it: a call on it waits for no
//! other task's turn, neither on its way out nor on its way back.
//!
//! For a task that makes one call after the other, where no harm is done by a call that is carried
//! out twice. Owns the connection; what travels on it is [`call`](super::call)'s.

use std::{future::Future as _, io, pin::Pin, sync::Arc, time::Duration};

use axum::http::{Request, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

use super::call::{CallError, Target, chain};

trait Wire: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Wire for T {}

type Driver = http1::Connection<TokioIo<Box<dyn Wire>>, Full<Bytes>>;

/// The way to one node; connected when it is first used, and anew after every fault.
#[derive(Default)]
pub(super) struct Line(Option<Connection>);

impl Line {
    /// Sends a request, and receives the whole answer.
    ///
    /// # Errors
    /// [`CallError::NotDone`] when the node can't be reached, otherwise [`CallError::Unknown`].
    pub(super) async fn exchange(
        &mut self,
        to: &Target,
        tls: Option<&Arc<ClientConfig>>,
        request: Request<Full<Bytes>>,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), CallError> {
        let Target { id, address } = to;
        let text = |error: &dyn std::error::Error| {
            format!("calling node {id} at {address}: {}", chain(error))
        };
        let exchange = async {
            // Taken out: a call that is given up leaves no connection behind on which its answer
            // may still come.
            if let Some(mut connection) = self.0.take() {
                // The other side may have closed it since.
                if let Ok(answer) = connection.exchange(request.clone()).await {
                    self.0 = connection.if_open();
                    return Ok(answer);
                }
            }
            let opened = Connection::open(address, tls).await;
            let mut connection = opened.map_err(|error| CallError::NotDone(text(&error)))?;
            let answer = connection.exchange(request).await;
            let answer = answer.map_err(|error| CallError::Unknown(text(&error)))?;
            self.0 = connection.if_open();
            Ok(answer)
        };
        let late =
            || format!("calling node {id} at {address}: no answer in {} ms", limit.as_millis());
        timeout(limit, exchange).await.unwrap_or_else(|_| Err(CallError::Unknown(late())))
    }
}

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: Pin<Box<Driver>>,
    is_over: bool,
}

impl Connection {
    async fn open(address: &str, tls: Option<&Arc<ClientConfig>>) -> io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let wire: Box<dyn Wire> = match tls {
            Some(config) => {
                let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(host).map_err(io::Error::other)?;
                Box::new(TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?)
            }
            None => Box::new(tcp),
        };
        let (sender, driver) =
            http1::handshake(TokioIo::new(wire)).await.map_err(io::Error::other)?;
        Ok(Self { sender, driver: Box::pin(driver), is_over: false })
    }

    fn if_open(self) -> Option<Self> {
        (!self.is_over).then_some(self)
    }

    async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), hyper::Error> {
        let Self { sender, driver, is_over } = self;
        let mut exchange = std::pin::pin!(async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok((status, response.into_body().collect().await?.to_bytes()))
        });
        std::future::poll_fn(|context| {
            // First what there is to send; then whatever arrived, or the end.
            if let std::task::Poll::Ready(answer) = exchange.as_mut().poll(context) {
                return std::task::Poll::Ready(answer);
            }
            if !*is_over {
                *is_over = driver.as_mut().poll(context).is_ready();
            }
            exchange.as_mut().poll(context)
        })
        .await
    }
}
