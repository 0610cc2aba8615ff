//! Whether a member of the control plane still is where it was last.

use std::time::Duration;

use tokio::time::sleep;

use crate::control::{CLUSTER_PATH, ClusterInfo};

/// A member that is busy, or being started again, is not taken for gone at once.
const LOOKS: u32 = 3;
const BETWEEN: Duration = Duration::from_secs(1);
/// One look takes this long at most; all of them less than who asks to join waits.
pub(crate) const LIMIT: Duration = Duration::from_secs(3);

/// Whether the member `id` serves at `address`. `client` must take answers of this cluster's nodes
/// alone: whoever else has that address by now is not the member, nor is a node that says another
/// id. A node that says none is of an older version, and may be it.
pub(crate) async fn is_there(
    client: &reqwest::Client,
    (id, address): (u64, &str),
    limit: Duration,
) -> bool {
    let url = format!("https://{address}{CLUSTER_PATH}");
    for look in 0..LOOKS {
        if look > 0 {
            sleep(BETWEEN).await;
        }
        if let Ok(answer) = client.get(&url).timeout(limit).send().await {
            let info = answer.json::<ClusterInfo>().await;
            return info.ok().and_then(|info| info.member).is_none_or(|member| member == id);
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::net::TcpListener;

    use super::*;

    async fn look(address: SocketAddr) -> bool {
        let client = exo_trust::bootstrap_client().unwrap();
        is_there(&client, (7, &address.to_string()), Duration::from_millis(100)).await
    }

    #[tokio::test]
    async fn who_gives_no_answer_is_asked_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let calls = tokio::spawn(async move {
            let mut open = Vec::new();
            for _ in 0..LOOKS {
                open.push(listener.accept().await.unwrap());
            }
        });
        assert!(!look(address).await);
        calls.await.unwrap();
        // Nobody listens there any more.
        assert!(!look(address).await);
    }
}
