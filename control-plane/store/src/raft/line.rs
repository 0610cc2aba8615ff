//! A connection to one other node that is driven by the task which uses it: a call on it waits for no
//! other task's turn, neither on its way out nor on its way back.
//!
//! For a task that makes one call after the other, where no harm is done by a call that is carried
//! out twice. Owns the connection; what travels on it is [`call`](super::call)'s.

use std::{future::Future as _, io, pin::Pin, sync::Arc, task::Poll, time::Duration};

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
    /// `None` when the connection is over: calls that wait for it end with it.
    driver: Option<Pin<Box<Driver>>>,
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
        Ok(Self { sender, driver: Some(Box::pin(driver)) })
    }

    fn if_open(self) -> Option<Self> {
        self.driver.is_some().then_some(self)
    }

    async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), hyper::Error> {
        let Self { sender, driver } = self;
        let mut exchange = std::pin::pin!(async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok((status, response.into_body().collect().await?.to_bytes()))
        });
        std::future::poll_fn(|context| {
            // First what there is to send; then whatever arrived, or the end.
            if let Poll::Ready(answer) = exchange.as_mut().poll(context) {
                return Poll::Ready(answer);
            }
            if driver.as_mut().is_some_and(|driver| driver.as_mut().poll(context).is_ready()) {
                *driver = None;
            }
            exchange.as_mut().poll(context)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        net::SocketAddr,
        sync::{
            Mutex,
            atomic::{AtomicU64, Ordering},
        },
    };

    use axum::{Router, extract::ConnectInfo, routing::post};
    use tokio::{net::TcpListener, sync::oneshot};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Answers with what it was sent; to the first `late` not in the time that the test gives.
    struct Echo {
        address: SocketAddr,
        /// The far ends of all connections that brought a call.
        seen: Arc<Mutex<BTreeSet<SocketAddr>>>,
        stop: oneshot::Sender<()>,
        server: tokio::task::JoinHandle<()>,
    }

    impl Echo {
        async fn start(address: &str) -> Self {
            let listener = TcpListener::bind(address).await.unwrap();
            let address = listener.local_addr().unwrap();
            let seen = Arc::new(Mutex::new(BTreeSet::new()));
            let calls = AtomicU64::new(0);
            let (noted, calls) = (Arc::clone(&seen), Arc::new(calls));
            let echo = move |ConnectInfo(from): ConnectInfo<SocketAddr>, body: String| async move {
                noted.lock().unwrap().insert(from);
                if body == "late" && calls.fetch_add(1, Ordering::Relaxed) == 0 {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                body
            };
            let app = Router::new().route("/echo", post(echo));
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let (stop, stopped) = oneshot::channel::<()>();
            let server = tokio::spawn(async move {
                let stopped = async { drop(stopped.await) };
                axum::serve(listener, app).with_graceful_shutdown(stopped).await.unwrap();
            });
            Self { address, seen, stop, server }
        }

        fn connections(&self) -> usize {
            self.seen.lock().unwrap().len()
        }

        async fn stop(self) {
            self.stop.send(()).unwrap();
            self.server.await.unwrap();
        }
    }

    async fn ask(
        line: &mut Line,
        address: SocketAddr,
        body: &str,
        limit: Duration,
    ) -> Result<String, CallError> {
        let to = Target { id: 7, address: address.to_string() };
        let request = Request::post("/echo")
            .header("host", address.to_string())
            .body(Full::new(Bytes::from(body.to_owned())))
            .unwrap();
        let (status, body) = line.exchange(&to, None, request, limit).await?;
        assert_eq!(status, StatusCode::OK);
        Ok(String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn calls_share_a_connection() {
        let (echo, mut line) = (Echo::start("127.0.0.1:0").await, Line::default());
        let large = "x".repeat(1 << 20);
        for body in ["a", &large, "", "b"] {
            assert_eq!(ask(&mut line, echo.address, body, LIMIT).await.unwrap(), body);
        }
        assert_eq!(echo.connections(), 1);
    }

    #[tokio::test]
    async fn a_node_that_was_started_again_is_called_at_once() {
        let (echo, mut line) = (Echo::start("127.0.0.1:0").await, Line::default());
        assert_eq!(ask(&mut line, echo.address, "a", LIMIT).await.unwrap(), "a");
        let address = echo.address;
        echo.stop().await;
        let error = ask(&mut line, address, "b", LIMIT).await.unwrap_err();
        assert!(matches!(&error, CallError::NotDone(text) if text.contains("node 7")), "{error}");
        let _echo = Echo::start(&address.to_string()).await;
        assert_eq!(ask(&mut line, address, "c", LIMIT).await.unwrap(), "c");
    }

    #[tokio::test]
    async fn an_answer_that_comes_too_late_is_not_taken_for_another_ones() {
        let (echo, mut line) = (Echo::start("127.0.0.1:0").await, Line::default());
        assert_eq!(ask(&mut line, echo.address, "a", LIMIT).await.unwrap(), "a");
        let short = Duration::from_millis(20);
        let error = ask(&mut line, echo.address, "late", short).await.unwrap_err();
        assert!(matches!(&error, CallError::Unknown(text) if text.contains("20 ms")), "{error}");
        assert_eq!(ask(&mut line, echo.address, "b", LIMIT).await.unwrap(), "b");
        assert_eq!(echo.connections(), 2);
    }
}
