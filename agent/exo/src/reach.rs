//! Other nodes as far as they can be reached: why one can't be, in a person's words, and which of the
//! addresses that a person names are this node's own.

use std::{
    error::Error,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{anyhow, bail};
use tokio::{net::lookup_host, time::timeout};
use tracing::{info, warn};

/// Whoever waits for longer is told so.
const SILENCE: Duration = Duration::from_secs(2);

/// Sends a request, whose time-out is `limit`; says so when no answer comes for a while.
pub(crate) async fn send(
    peer: &str,
    request: reqwest::RequestBuilder,
    limit: Duration,
) -> anyhow::Result<reqwest::Response> {
    let mut sent = std::pin::pin!(request.send());
    let answer = match timeout(SILENCE, &mut sent).await {
        Ok(answer) => answer,
        Err(_) => {
            info!(peer, "no answer yet, waiting for {} s at most", limit.as_secs());
            sent.await
        }
    };
    answer.map_err(|error| anyhow!(cause(&error)))
}

/// Why a node can't be asked: in one clause, whose subject is that node.
pub(crate) fn cause(error: &reqwest::Error) -> String {
    let mut last: &dyn Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    match last.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(ErrorKind::ConnectionRefused) => {
            "refused the connection: is exo running there, and the port right?".to_owned()
        }
        Some(ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => {
            format!("can't be reached: {last}")
        }
        Some(ErrorKind::TimedOut) => NO_ANSWER.to_owned(),
        _ if error.is_timeout() => NO_ANSWER.to_owned(),
        // What rustls makes of an answer in plain text.
        _ if last.to_string().contains("InvalidContentType") => {
            "speaks no TLS: --peers takes the API port (8443), not the gateway's".to_owned()
        }
        _ => format!("can't be reached: {last}"),
    }
}

const NO_ANSWER: &str =
    "gave no answer: is the machine on, and does a firewall stand between the two?";

/// The peers that are other nodes: this one, which listens on `own`, can't let itself in. So all
/// nodes may be started with the same list.
///
/// # Errors
/// When there were peers and none is left.
pub(crate) async fn others(peers: Vec<String>, own: SocketAddr) -> anyhow::Result<Vec<String>> {
    let mut others = Vec::new();
    for peer in &peers {
        // Names that mean nothing now are left to whoever asks them.
        let found = lookup_host(peer.as_str()).await.into_iter().flatten();
        let addresses: Vec<SocketAddr> = found.collect();
        if names_only(&addresses, own) {
            warn!(peer, "this is the node itself: it is not asked");
        } else {
            others.push(peer.clone());
        }
    }
    if others.is_empty() && !peers.is_empty() {
        bail!(
            "--peers names this node itself only ({}): name another machine. A further node on this \
             machine needs its own --api-port; to begin a cluster, leave out --peers",
            peers.join(", ")
        );
    }
    Ok(others)
}

/// Whether what a peer's name stands for is this node and no other. One name may stand for several
/// nodes; that of this machine, for several addresses of which not all are listened on.
fn names_only(addresses: &[SocketAddr], own: SocketAddr) -> bool {
    let is_other = |a: &SocketAddr| !is_own(*a, own) && !a.ip().is_loopback();
    addresses.iter().any(|a| is_own(*a, own)) && !addresses.iter().any(is_other)
}

/// Whether a call to `address` would reach the listener at `own`.
fn is_own(address: SocketAddr, own: SocketAddr) -> bool {
    let here = match own.ip().is_unspecified() {
        true => is_here(address.ip()),
        false => address.ip() == own.ip(),
    };
    here && address.port() == own.port()
}

/// Only addresses of this machine can be bound.
fn is_here(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpListener};

    use super::*;

    async fn asked(address: SocketAddr) -> String {
        let client = exo_trust::bootstrap_client().unwrap();
        let limit = Duration::from_millis(300);
        let request = client.post(format!("https://{address}/")).timeout(limit);
        send("peer", request, limit).await.unwrap_err().to_string()
    }

    #[test]
    fn a_name_of_several_nodes_is_not_this_node_alone() {
        let check = |addresses: &[&str], own: &str, wanted: bool| {
            let parsed: Vec<SocketAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            assert_eq!(names_only(&parsed, own.parse().unwrap()), wanted, "{addresses:?} {own}");
        };
        check(&["127.0.0.1:8443"], "127.0.0.1:8443", true);
        check(&["[::1]:8443", "127.0.0.1:8443"], "127.0.0.1:8443", true);
        check(&["127.0.0.1:8444"], "127.0.0.1:8443", false);
        check(&["192.0.2.1:8443"], "192.0.2.1:8443", true);
        check(&["192.0.2.1:8443", "192.0.2.2:8443"], "192.0.2.1:8443", false);
        check(&[], "192.0.2.1:8443", false);
    }

    #[tokio::test]
    async fn a_failure_is_named_as_what_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(asked(address).await.starts_with("gave no answer"), "nobody accepts");
        let plain = tokio::spawn(async move {
            // The call of above waits there too.
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            }
        });
        let text = asked(address).await;
        assert!(text.contains("the API port (8443)"), "{text}");
        plain.abort();
        let _ = plain.await;
        let text = asked(address).await;
        assert!(text.starts_with("refused the connection"), "{text}");
        assert!(!text.contains("error sending request"), "{text}");
    }

    #[tokio::test]
    async fn a_node_does_not_ask_itself() {
        let any = "0.0.0.0:8443".parse().unwrap();
        let list = |peers: &[&str]| peers.iter().map(|peer| (*peer).to_owned()).collect::<Vec<_>>();
        // 192.0.2.0/24 is nobody's (RFC 5737).
        let mixed = list(&["127.0.0.1:8443", "192.0.2.1:8443", "127.0.0.1:8444"]);
        let left = others(mixed.clone(), any).await.unwrap();
        assert_eq!(left, ["192.0.2.1:8443", "127.0.0.1:8444"]);
        let alone = others(list(&["localhost:8443"]), any).await.unwrap_err().to_string();
        assert!(alone.contains("localhost:8443") && alone.contains("--api-port"), "{alone}");
        // Listening on one address only, another one of this machine may be another node's.
        let left = others(mixed.clone(), "127.0.0.2:8443".parse().unwrap()).await.unwrap();
        assert_eq!(left, mixed);
        assert_eq!(others(Vec::new(), any).await.unwrap(), [""; 0]);
    }
}
