//! An etcd server of one member, in a folder of its own. `etcd` must be on the path.

use std::{
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
};

use exo_store::{EtcdConfig, Store};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::LIMIT;

pub struct Server {
    process: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl Server {
    pub fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (address, dir) = (free(), TempDir::new().unwrap());
        let (client, peer) = (format!("http://{address}"), format!("http://{}", free()));
        let process = Command::new("etcd")
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--data-dir"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is on the path");
        Self { process, address, _dir: dir }
    }

    /// A node whose store is there; the first one leads.
    pub async fn open(&self) -> Store {
        let config = EtcdConfig {
            endpoints: vec![format!("http://{}", self.address)],
            user: None,
            tls: None,
            address: "127.0.0.1:8443".to_owned(),
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            match Store::etcd(config.clone()).await {
                Ok(store) => return store,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}
