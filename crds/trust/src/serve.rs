//! Serves a router on a listener, with limits on clients that hold connections and send nothing.
//!
//! It is `axum::serve` with those limits, which that has no way to set. A peer that is gone without
//! a word, or that only pretends to ask, costs a socket for a minute, not for ever.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request},
    serve::Listener,
};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::Sleep,
};
use tower::ServiceExt as _;
use tracing::debug;

/// Of one stream's answer, beyond what its client takes in: thousands of watches may stand still.
const SEND_BUFFER_BYTES: usize = 64 << 10;

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct ServeLimits {
    /// For the first bytes of a connection, by which its protocol is told.
    pub first_bytes: Duration,
    /// For the head of a request, counted from the end of the answer before it: also how long a
    /// connection of HTTP/1 may idle.
    pub head: Duration,
    /// Between pings on idle HTTP/2 connections.
    pub ping_every: Duration,
    /// For the answer to a ping.
    pub ping: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            // A handshake has preceded it, or the client has just connected.
            first_bytes: Duration::from_secs(15),
            // Clients keep idle connections for a few seconds to a minute.
            head: Duration::from_secs(60),
            // A Mac that went to sleep is noticed while its user walks to it.
            ping_every: Duration::from_secs(20),
            ping: Duration::from_secs(20),
        }
    }
}

/// Serves `app` until `stop` ends; then takes no more connections, and returns when the requests
/// that are on their way have been answered. Handlers find the caller as `ConnectInfo<L::Addr>`.
pub async fn serve<L>(
    mut listener: L,
    app: Router,
    limits: ServeLimits,
    stop: impl Future<Output = ()>,
) where
    L: Listener,
    L::Addr: Clone + Send + Sync + 'static,
{
    let (stopping, stopped) = watch::channel(());
    let (running, all_done) = watch::channel(());
    let mut stop = pin!(stop);
    loop {
        // Cancel-safe: `accept` of the listeners used here keeps what it has not returned.
        let (io, peer) = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let (app, stopped, done) = (app.clone(), stopped.clone(), all_done.clone());
        tokio::spawn(async move {
            connection(io, peer, app, limits, stopped).await;
            drop(done);
        });
    }
    drop((listener, stopping, all_done));
    running.closed().await;
}

async fn connection<I, P>(
    io: I,
    peer: P,
    app: Router,
    limits: ServeLimits,
    mut stopped: watch::Receiver<()>,
) where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    P: Clone + Send + Sync + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request: Request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer.clone()));
        let app = app.clone();
        async move { Ok::<_, Infallible>(app.oneshot(request).await.unwrap_or_else(|e| match e {})) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.head);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(limits.ping_every)
        .keep_alive_timeout(limits.ping);
    let io = TokioIo::new(Sniffed::new(io, limits.first_bytes));
    let mut serving = pin!(builder.serve_connection_with_upgrades(io, service));
    // Cancel-safe: the connection is polled on after it was told to end.
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        _ = stopped.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        debug!("a connection ended early: {error}");
    }
}

/// What a connection of HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose first bytes must come within a limit: as many as it takes to tell HTTP/2 from
/// HTTP/1, which has limits of its own from then on.
struct Sniffed<I> {
    io: I,
    /// Bytes of [`PREFACE`] seen.
    seen: usize,
    limit: Option<Pin<Box<Sleep>>>,
}

impl<I> Sniffed<I> {
    fn new(io: I, limit: Duration) -> Self {
        Self { io, seen: 0, limit: Some(Box::pin(tokio::time::sleep(limit))) }
    }

    fn look_at(&mut self, bytes: &[u8]) {
        let rest = &PREFACE[self.seen..];
        let same = rest.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        self.seen += same;
        if same < bytes.len() || self.seen == PREFACE.len() {
            self.limit = None;
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Sniffed<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let this = &mut *self;
        match Pin::new(&mut this.io).poll_read(cx, buffer) {
            Poll::Ready(result) => {
                if this.limit.is_some() {
                    this.look_at(&buffer.filled()[before..]);
                }
                Poll::Ready(result)
            }
            Poll::Pending => {
                if let Some(limit) = &mut this.limit {
                    ready!(limit.as_mut().poll(cx));
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
                Poll::Pending
            }
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Sniffed<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }
}
