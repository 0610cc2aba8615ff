//! Clients that hold a connection and send nothing, and what becomes of the others.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{Router, extract::ConnectInfo, routing::get};
use exo_trust::{ServeLimits, serve};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    time::timeout,
};

/// Every wait ends as soon as what it waits for is there.
const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(200);

fn limits() -> ServeLimits {
    ServeLimits { first_bytes: SHORT, head: SHORT, ping_every: SHORT, ping: SHORT }
}

async fn start(
    app: Router,
    stop: oneshot::Receiver<()>,
) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = async {
        let _ = stop.await;
    };
    (address, tokio::spawn(serve(listener, app, limits(), stop)))
}

fn hello() -> Router {
    let handler = |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.ip().to_string() };
    Router::new().route("/", get(handler))
}

/// What comes until the server closes.
async fn rest(mut stream: TcpStream) -> String {
    let mut text = String::new();
    // A reset is an end as well.
    let _ = timeout(PATIENCE, stream.read_to_string(&mut text)).await.expect("it is closed");
    text
}

#[tokio::test]
async fn whoever_sends_nothing_or_half_a_head_is_cut_off() {
    let (_stop, stopped) = oneshot::channel();
    let (address, _server) = start(hello(), stopped).await;
    for sent in ["", "P", "PRI * HTTP/2.0\r\n\r\nSM", "GET / HTTP/1.1\r\nHost: a\r\n"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let answer = rest(stream).await;
        assert!(!answer.contains("200 OK"), "{sent:?}: {answer}");
    }
}

#[tokio::test]
async fn an_idle_connection_ends_and_a_slow_answer_does_not() {
    let (_stop, stopped) = oneshot::channel();
    let slow = Router::new().route(
        "/",
        get(|| async {
            tokio::time::sleep(SHORT * 3).await;
            "slow"
        }),
    );
    let (address, _server) = start(slow, stopped).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    // The answer is longer in coming than any limit; then the connection idles and is closed.
    let answer = rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("slow"), "{answer}");
}

#[tokio::test]
async fn both_protocols_are_served_and_know_the_caller() {
    let (_stop, stopped) = oneshot::channel();
    let (address, _server) = start(hello(), stopped).await;
    let url = format!("http://{address}/");
    exo_trust::install_crypto();
    for client in [
        reqwest::Client::builder().no_proxy().build().unwrap(),
        reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap(),
    ] {
        let answer = client.get(&url).send().await.unwrap();
        assert_eq!(answer.text().await.unwrap(), "127.0.0.1");
    }
}

#[tokio::test]
async fn stopping_lets_answers_end_and_takes_no_more() {
    let (stop, stopped) = oneshot::channel();
    let begun: &'static Notify = Box::leak(Box::new(Notify::new()));
    let go: &'static Notify = Box::leak(Box::new(Notify::new()));
    let app = Router::new().route(
        "/",
        get(move || async {
            begun.notify_one();
            go.notified().await;
            "done"
        }),
    );
    let (address, server) = start(app, stopped).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    timeout(PATIENCE, begun.notified()).await.unwrap();
    stop.send(()).unwrap();
    // The socket is closed once nobody listens any more.
    let closed = async { while TcpStream::connect(address).await.is_ok() {} };
    timeout(PATIENCE, closed).await.unwrap();
    assert!(!server.is_finished());
    go.notify_one();
    assert!(rest(stream).await.ends_with("done"));
    timeout(PATIENCE, server).await.unwrap().unwrap();
}
