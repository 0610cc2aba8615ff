//! The API servers of one cluster: the kubeconfig's own, and those that it names beside it.
//!
//! # Guarantees
//! A request goes to a further server only when the one before did nothing: it took no connection,
//! or says so (503). A read does so also when it got no answer; a write whose outcome is unknown is
//! never repeated.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use futures::{StreamExt as _, stream::FuturesUnordered};
use http::{Method, Request, Response, StatusCode};
use kube::{Client, Config, client::Body};
use tokio::{
    net::TcpStream,
    sync::OnceCell,
    time::{sleep, timeout},
};
use tower::BoxError;

use crate::config::NODE_NAME;

/// A server on the LAN takes a connection at once or not at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// The next server is tried so long after the one before: one that is there has answered by then.
const HEAD_START: Duration = Duration::from_millis(250);

type Answer = Result<Response<Body>, kube::Error>;

/// Known servers, and the one in use.
pub(crate) struct Servers {
    /// Never empty.
    known: Vec<Known>,
    /// Its place among them.
    current: AtomicUsize,
}

struct Known {
    /// `HOST:PORT`.
    address: String,
    config: Config,
    client: OnceCell<Client>,
}

impl Known {
    fn new(address: String, config: Config) -> Self {
        Self { address, config, client: OnceCell::new() }
    }

    async fn client(&self) -> Result<&Client, kube::Error> {
        self.client.get_or_try_init(async || Client::try_from(self.config.clone())).await
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        self.client().await?.send(request).await
    }
}

impl Servers {
    /// The server of `config`, and `others` of its cluster. Where it takes no connection, the first
    /// of them that does is in use; then there is a note for people who is asked instead of whom.
    /// Only connections are tried: no request is sent that a server might carry out.
    ///
    /// # Errors
    /// When the configuration can't be used.
    pub(crate) async fn connect(
        config: &Config,
        others: &[String],
    ) -> anyhow::Result<(Arc<Self>, Option<String>)> {
        let servers = Self::new(config, others);
        servers.known[0].client().await.context("using the kubeconfig")?;
        let all: Vec<usize> = (0..servers.known.len()).collect();
        let first = match all.len() {
            1 => 0,
            _ => servers.first_to_connect(&all).await.unwrap_or(0),
        };
        servers.current.store(first, Ordering::Relaxed);
        let note = (first > 0).then(|| {
            let [own, other] = [0, first].map(|at| &servers.known[at].address);
            format!("{own} does not answer: asking {other}")
        });
        Ok((Arc::new(servers), note))
    }

    fn new(config: &Config, others: &[String]) -> Self {
        let scheme = config.cluster_url.scheme_str().unwrap_or("https").to_owned();
        let port = config.cluster_url.port_u16().unwrap_or(443);
        let own = format!("{}:{port}", config.cluster_url.host().unwrap_or_default());
        let mut known = vec![Known::new(own, config.clone())];
        // Through a proxy there is one way only.
        let others = if config.proxy_url.is_some() { &[] } else { others };
        for other in others {
            let Ok(url) = format!("{scheme}://{other}/").parse() else { continue };
            if known.iter().any(|known| known.address == *other) {
                continue;
            }
            let tls_server_name = Some(NODE_NAME.to_owned());
            let mut config = config.clone();
            (config.cluster_url, config.tls_server_name) = (url, tls_server_name);
            known.push(Known::new(other.clone(), config));
        }
        Self { known, current: AtomicUsize::new(0) }
    }

    /// A client of whichever server is in use.
    pub(crate) fn client(self: &Arc<Self>) -> Client {
        let servers = Arc::clone(self);
        let service = tower::service_fn(move |request: Request<Body>| {
            let servers = Arc::clone(&servers);
            async move { servers.send(request).await }
        });
        Client::new(service, self.known[0].config.default_namespace.clone())
    }

    /// Of the server in use.
    pub(crate) fn url(&self) -> String {
        let current = &self.known[self.current.load(Ordering::Relaxed)];
        current.config.cluster_url.to_string().trim_end_matches('/').to_owned()
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let current = self.current.load(Ordering::Relaxed);
        // A body that comes in pieces can be sent once only.
        let Some(kept) = copy(&request) else {
            return Ok(self.known[current].send(request).await?);
        };
        let method = &request.method().clone();
        let answer = self.known[current].send(request).await;
        let Some(why) = does_nothing(method, &answer) else { return Ok(answer?) };
        let mut left: Vec<usize> = (0..self.known.len()).filter(|at| *at != current).collect();
        while let Some(next) = self.first_to_connect(&left).await {
            left.retain(|at| *at != next);
            let Some(again) = copy(&kept) else { break };
            let answer = self.known[next].send(again).await;
            if does_nothing(method, &answer).is_none() {
                self.current.store(next, Ordering::Relaxed);
                let [own, other] = [current, next].map(|at| &self.known[at].address);
                eprintln!("{own} {why}: asking {other}");
                return Ok(answer?);
            }
        }
        // What the first one says is as true as what the others do.
        Ok(answer?)
    }

    /// Of those at `places` the one that takes a connection first; each has a head start before the
    /// next, which comes at once when all before it have failed.
    async fn first_to_connect(&self, places: &[usize]) -> Option<usize> {
        let mut waiting = places.iter().copied();
        let mut trying = FuturesUnordered::new();
        loop {
            if let Some(at) = waiting.next() {
                let address = &self.known[at].address;
                trying.push(async move { takes_connections(address).await.then_some(at) });
            }
            // Cancel-safe: attempts stay where they are.
            tokio::select! {
                tried = trying.next() => match tried {
                    Some(Some(at)) => return Some(at),
                    Some(None) => {}
                    None => return None,
                },
                () = sleep(HEAD_START), if waiting.len() > 0 => {}
            }
        }
    }
}

fn copy(request: &Request<Body>) -> Option<Request<Body>> {
    let body = request.body().try_clone()?;
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

/// Why another server may be given the request, if it may.
fn does_nothing(method: &Method, answer: &Answer) -> Option<&'static str> {
    let is_read = [Method::GET, Method::HEAD].contains(method);
    match answer {
        Ok(answer) => {
            (answer.status() == StatusCode::SERVICE_UNAVAILABLE).then_some("can't do this now")
        }
        Err(error) => (is_read || was_not_sent(error)).then_some("does not answer"),
    }
}

/// There was no connection to send it on.
fn was_not_sent(error: &kube::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        let error_of_client = error.downcast_ref::<hyper_util::client::legacy::Error>();
        if error_of_client.is_some_and(hyper_util::client::legacy::Error::is_connect) {
            return true;
        }
        cause = error.source();
    }
    false
}

async fn takes_connections(address: &str) -> bool {
    matches!(timeout(CONNECT_LIMIT, TcpStream::connect(address)).await, Ok(Ok(_)))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpSocket},
        time::Instant,
    };

    use super::*;

    /// Nobody listens there: the port was free a moment ago, and is not given out again so soon.
    async fn nobody() -> String {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
    }

    /// A host that neither takes connections nor refuses them: its queue is full for good.
    struct Silent {
        address: String,
        _queue: (TcpListener, Vec<TcpStream>),
    }

    async fn silent() -> Silent {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) =
            timeout(Duration::from_millis(300), TcpStream::connect(address)).await
        {
            queue.push(stream.unwrap());
        }
        Silent { address: address.to_string(), _queue: (listener, queue) }
    }

    fn config(address: &str) -> Config {
        let mut config = Config::new(format!("http://{address}").parse().unwrap());
        config.default_retry = false;
        config
    }

    #[tokio::test]
    async fn another_server_is_asked_when_the_first_takes_no_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let up = listener.local_addr().unwrap().to_string();
        let (down, hung, hung_too) = (nobody().await, silent().await, silent().await);
        let check = async |own: &str, others: &[&str], expect: &str, noted: bool| {
            let others: Vec<String> = others.iter().map(|other| (*other).to_owned()).collect();
            let begun = Instant::now();
            let (servers, note) = Servers::connect(&config(own), &others).await.unwrap();
            assert_eq!(servers.url(), format!("http://{expect}"));
            assert_eq!(note.is_some(), noted, "{note:?}");
            let current = &servers.known[servers.current.load(Ordering::Relaxed)];
            assert_eq!(current.config.tls_server_name.is_some(), noted);
            begun.elapsed()
        };
        check(&up, &[&down], &up, false).await;
        check(&down, &[&down, &up], &up, true).await;
        check(&down, &[], &down, false).await;
        check(&down, &[&down, "no address"], &down, false).await;
        // They are not waited for one after the other.
        let took = check(&hung.address, &[&hung_too.address, &down, &up], &up, true).await;
        assert!(took < CONNECT_LIMIT, "{took:?}");
    }

    /// What a server does with all requests.
    #[derive(Clone, Copy)]
    enum Does {
        Answer(u16),
        /// Takes the request and goes away.
        HangUp,
    }

    /// Its address, and how many requests came.
    async fn server(does: Does) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let count = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&count);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                    let mut bytes = [0; 1024];
                    match stream.read(&mut bytes).await {
                        Ok(length @ 1..) => head.extend_from_slice(&bytes[..length]),
                        Ok(0) | Err(_) => break,
                    }
                }
                // One that only looked whether there is a server.
                if head.is_empty() {
                    continue;
                }
                counting.fetch_add(1, Ordering::Relaxed);
                if let Does::Answer(status) = does {
                    let answer = format!(
                        "HTTP/1.1 {status} Done\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        (address, count)
    }

    #[tokio::test]
    async fn a_request_moves_on_only_when_nothing_was_done() {
        // The status of the answer, and how many requests came to the first and to the second.
        let check = async |method: Method, first: Does, expect: (Option<u16>, usize, usize)| {
            let (own, count) = server(first).await;
            let (other, other_count) = server(Does::Answer(200)).await;
            let others = std::slice::from_ref(&other);
            let (servers, _) = Servers::connect(&config(&own), others).await.unwrap();
            let request = || {
                let request = Request::builder().method(method.clone()).uri("/x");
                request.body(Body::empty()).unwrap()
            };
            let answer = servers.client().send(request()).await;
            let seen = (
                answer.ok().map(|answer| answer.status().as_u16()),
                count.load(Ordering::Relaxed),
                other_count.load(Ordering::Relaxed),
            );
            assert_eq!(seen, expect, "{method}");
            let moved = expect.2 > 0;
            assert_eq!(servers.url(), format!("http://{}", if moved { &other } else { &own }));
            if moved {
                // What comes next goes there at once.
                assert_eq!(servers.client().send(request()).await.unwrap().status(), 200);
                assert_eq!(count.load(Ordering::Relaxed), 1);
            }
        };
        check(Method::GET, Does::Answer(200), (Some(200), 1, 0)).await;
        check(Method::GET, Does::Answer(404), (Some(404), 1, 0)).await;
        check(Method::GET, Does::Answer(503), (Some(200), 1, 1)).await;
        check(Method::GET, Does::HangUp, (Some(200), 1, 1)).await;
        check(Method::PATCH, Does::Answer(503), (Some(200), 1, 1)).await;
        // It may have been done.
        check(Method::PATCH, Does::Answer(504), (Some(504), 1, 0)).await;
        check(Method::PATCH, Does::HangUp, (None, 1, 0)).await;
        check(Method::POST, Does::HangUp, (None, 1, 0)).await;
    }

    #[tokio::test]
    async fn one_that_went_away_is_left_for_the_next_that_can() {
        let (minority, asked) = server(Does::Answer(503)).await;
        let (up, _) = server(Does::Answer(201)).await;
        let others = [minority, nobody().await, up.clone()];
        let servers = Arc::new(Servers::new(&config(&nobody().await), &others));
        let request = Request::post("/x").body(Body::from(b"{}".to_vec())).unwrap();
        assert_eq!(servers.client().send(request).await.unwrap().status(), 201);
        assert_eq!(servers.url(), format!("http://{up}"));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn where_nobody_can_the_first_one_answers() {
        let (own, own_count) = server(Does::Answer(503)).await;
        let (other, other_count) = server(Does::Answer(503)).await;
        let (servers, _) = Servers::connect(&config(&own), &[other]).await.unwrap();
        let request = Request::delete("/x").body(Body::empty()).unwrap();
        assert_eq!(servers.client().send(request).await.unwrap().status(), 503);
        assert_eq!(servers.url(), format!("http://{own}"));
        let counts = [own_count, other_count].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counts, [1, 1]);
    }
}
