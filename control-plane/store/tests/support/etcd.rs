//! An etcd server of one member, in a folder of its own. `etcd` must be on the path.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use exo_store::{EtcdConfig, EtcdError, EtcdTls, Store};
use exo_trust::{Authority, Subject};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::LIMIT;

pub struct Server {
    process: Child,
    address: SocketAddr,
    tls: Option<EtcdTls>,
    _dir: TempDir,
}

/// Whether there is an etcd to test with.
pub fn is_there() -> bool {
    let found = Command::new("etcd").arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "etcd is missing in CI");
    if !found {
        eprintln!("etcd is not on the path: this test did not run");
    }
    found
}

impl Server {
    pub fn start() -> Self {
        Self::start_with("http", TempDir::new().unwrap(), &[], None)
    }

    /// One that talks TLS, and only to those who show a certificate.
    pub fn start_with_tls() -> Self {
        let dir = TempDir::new().unwrap();
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let authority = Authority::open_or_create(&dir.path().join("pki"), now_s).unwrap();
        let subject = |name: &str| Subject { name: name.to_owned(), groups: Vec::new() };
        let own = [[127, 0, 0, 1].into()];
        let server = authority.issue(&subject("etcd"), Some(&own), now_s).unwrap();
        let client = authority.issue(&subject("exo"), None, now_s).unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let args = [
            "--client-cert-auth".to_owned(),
            format!("--cert-file={}", file("server.crt", &server.certificate_pem)),
            format!("--key-file={}", file("server.key", &server.key_pem)),
            format!("--trusted-ca-file={}", file("ca.crt", authority.certificate_pem())),
        ];
        let tls = EtcdTls {
            ca: authority.certificate_pem().to_owned(),
            identity: Some((client.certificate_pem, client.key_pem)),
        };
        Self::start_with("https", dir, &args, Some(tls))
    }

    fn start_with(scheme: &str, dir: TempDir, args: &[String], tls: Option<EtcdTls>) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = free();
        let (client, peer) = (format!("{scheme}://{address}"), format!("http://{}", free()));
        let process = Command::new("etcd")
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--data-dir"])
            .arg(dir.path().join("data"))
            .args(args)
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is on the path");
        Self { process, address, tls, _dir: dir }
    }

    pub fn config(&self) -> EtcdConfig {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        EtcdConfig {
            endpoints: vec![format!("{scheme}://{}", self.address)],
            user: None,
            tls: self.tls.clone(),
            address: "127.0.0.1:8443".to_owned(),
        }
    }

    /// One try with these settings.
    pub async fn try_open(&self, config: EtcdConfig) -> Result<Store, EtcdError> {
        Store::etcd(config).await
    }

    /// A node whose store is there; the first one leads.
    pub async fn open(&self) -> Store {
        let config = self.config();
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
