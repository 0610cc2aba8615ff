//! A connection to one other node that is driven by the task which uses it: a call on it waits for no
//! other task's turn, neither on its way out nor on its way back.
//!
//! For a task that makes one call after the other, where no harm is done by a call that is carried
//! out twice. Owns the connection; what travels on it is [`call`](super::call)'s.

use std::{
    error::Error,
    future::Future as _,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use axum::http::{Request, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

use super::call::{CallError, NO_CALL, Target, bottom};

/// A machine on the LAN answers sooner or not at all.
const OPEN_LIMIT: Duration = Duration::from_secs(3);
/// Longer answers are refused: none of these calls has one.
const ANSWER_BYTES: usize = 1 << 20;

trait Wire: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Wire for T {}

type Driver = http1::Connection<TokioIo<Box<dyn Wire>>, Full<Bytes>>;

/// The way to one node; opened when it is first used, and anew after every fault.
#[derive(Default)]
pub(super) struct Line {
    open: Option<Connection>,
    /// One that is being opened, for as long as that takes: calls may have less time. Not more than
    /// one.
    opening: JoinSet<io::Result<Connection>>,
}

impl Line {
    /// Sends a request, and receives the whole answer.
    ///
    /// # Errors
    /// [`CallError::NotDone`] when the node was not reached, by a connection that was open until then
    /// or by another one; otherwise [`CallError::Unknown`].
    pub(super) async fn exchange(
        &mut self,
        to: &Target,
        tls: Option<&Arc<ClientConfig>>,
        request: Request<Full<Bytes>>,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), CallError> {
        let is_sent = AtomicBool::new(false);
        let outcome = timeout(limit, self.exchange_anew(to, tls, request, &is_sent)).await;
        outcome
            .unwrap_or_else(|_| Err(format!("no answer in {} ms", limit.as_millis()).into()))
            .map_err(|error| {
                let text = format!("{NO_CALL}{} at {}: {}", to.id, to.address, bottom(&*error));
                if is_sent.load(Ordering::Relaxed) {
                    CallError::Unknown(text)
                } else {
                    CallError::NotDone(text)
                }
            })
    }

    async fn exchange_anew(
        &mut self,
        to: &Target,
        tls: Option<&Arc<ClientConfig>>,
        request: Request<Full<Bytes>>,
        is_sent: &AtomicBool,
    ) -> Exchanged {
        // Taken out: a call that is given up leaves no connection behind on which its answer may
        // still come.
        if let Some(mut connection) = self.open.take() {
            // The other side may have closed it since.
            if let Ok(answer) = connection.exchange(request.clone(), is_sent).await {
                self.open = connection.if_open();
                return Ok(answer);
            }
            is_sent.store(false, Ordering::Relaxed);
        }
        if self.opening.is_empty() {
            self.opening.spawn(Connection::open(to.address.clone(), tls.cloned()));
        }
        let opened = self.opening.join_next().await.ok_or("nothing is being opened")?;
        let mut connection = opened??;
        let answer = connection.exchange(request, is_sent).await?;
        self.open = connection.if_open();
        Ok(answer)
    }
}

type Exchanged = Result<(StatusCode, Bytes), Box<dyn Error + Send + Sync>>;

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None` when the connection is over: calls that wait for it end with it.
    driver: Option<Pin<Box<Driver>>>,
}

impl Connection {
    async fn open(address: String, tls: Option<Arc<ClientConfig>>) -> io::Result<Self> {
        let opening = async {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            let wire: Box<dyn Wire> = match tls {
                Some(config) => {
                    let host = address.rsplit_once(':').map_or(&*address, |(host, _)| host);
                    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                    let name = ServerName::try_from(host).map_err(io::Error::other)?;
                    Box::new(TlsConnector::from(config).connect(name, tcp).await?)
                }
                None => Box::new(tcp),
            };
            let (sender, driver) =
                http1::handshake(TokioIo::new(wire)).await.map_err(io::Error::other)?;
            Ok(Self { sender, driver: Some(Box::pin(driver)) })
        };
        timeout(OPEN_LIMIT, opening).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn if_open(self) -> Option<Self> {
        self.driver.is_some().then_some(self)
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>, is_sent: &AtomicBool) -> Exchanged {
        let Self { sender, driver } = self;
        let mut exchange = std::pin::pin!(async {
            sender.ready().await?;
            is_sent.store(true, Ordering::Relaxed);
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await?;
            Ok((status, body.to_bytes()))
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
        sync::{Mutex, atomic::AtomicU64},
    };

    use axum::{Router, extract::ConnectInfo, routing::post};
    use tokio::{net::TcpListener, sync::oneshot};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Answers with what it was sent; but the first `late` not in the time that the test gives.
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
    async fn a_call_that_ends_before_there_is_a_connection_was_not_sent() {
        // Nobody takes what is connected there, so that a handshake does not end.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tls = Some(Arc::new(exo_trust::client_config(&member(dir.path(), "a")).unwrap()));
        let to = Target { id: 7, address: address.to_string() };
        let mut line = Line::default();
        for _ in 0..3 {
            let request = Request::post("/echo").body(Full::default()).unwrap();
            let short = Duration::from_millis(20);
            let error = line.exchange(&to, tls.as_ref(), request, short).await.unwrap_err();
            assert!(matches!(&error, CallError::NotDone(_)), "{error}");
        }
        listener.accept().await.unwrap();
        let second = timeout(Duration::from_millis(100), listener.accept()).await;
        assert!(second.is_err(), "the calls share one attempt");
    }

    /// A member of a cluster of its own.
    fn member(dir: &std::path::Path, name: &str) -> exo_trust::TlsPaths {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let authority =
            exo_trust::Authority::open_or_create(&dir.join("pki"), now.as_secs()).unwrap();
        let groups = vec![exo_trust::GROUP_NODES.to_owned()];
        let subject = exo_trust::Subject { name: name.to_owned(), groups };
        let issued = authority.issue(&subject, Some(&[]), now.as_secs()).unwrap();
        let paths = exo_trust::TlsPaths::in_dir(&dir);
        exo_trust::write_private(&paths.ca, authority.certificate_pem().as_bytes()).unwrap();
        exo_trust::write_private(&paths.cert, issued.certificate_pem.as_bytes()).unwrap();
        exo_trust::write_private(&paths.key, issued.key_pem.as_bytes()).unwrap();
        paths
    }

    #[tokio::test]
    async fn whoever_is_no_member_gets_no_call() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (member(dir.path(), "a"), member(dir.path(), "b"));
        let app = || Router::new().route("/echo", post(|body: String| async move { body }));
        let mut answers = Vec::new();
        for server in [&own, &other] {
            let config = exo_trust::server_config(server, exo_trust::ClientAuth::Required).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let listener = exo_trust::TlsListener::new(listener, config).unwrap();
            tokio::spawn(async move { axum::serve(listener, app()).await });
            let tls = Arc::new(exo_trust::client_config(&own).unwrap());
            let to = Target { id: 7, address: address.to_string() };
            let request = Request::post("/echo").header("host", "a").body("x".into()).unwrap();
            answers.push(Line::default().exchange(&to, Some(&tls), request, LIMIT).await);
        }
        assert_eq!(answers[0].as_ref().unwrap(), &(StatusCode::OK, Bytes::from("x")));
        assert!(matches!(answers[1], Err(CallError::NotDone(_))), "{:?}", answers[1]);
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
