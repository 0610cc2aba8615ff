//! The cluster's state in etcd, instead of on the nodes.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::ensure;
use exo_tests::{Admin, Exo, Place, TRIES, binary, in_the_end, wait_for};
use reqwest::StatusCode;
use serde_json::{Value, json};

struct Etcd {
    process: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Etcd {
    /// `None` where there is no etcd, or this build of exo can't use one.
    fn start() -> Option<Self> {
        let refusal = Command::new(binary("exo").unwrap())
            .args(["--store", "etcd://127.0.0.1:1", "--no-agent", "--no-control-plane"])
            .output()
            .unwrap();
        let is_built_in = !String::from_utf8_lossy(&refusal.stderr).contains("without etcd");
        let is_there = Command::new("etcd").arg("--version").output().is_ok();
        if !(is_built_in && is_there) {
            assert!(std::env::var_os("CI").is_none(), "CI has etcd, and an exo that uses it");
            eprintln!("no etcd here, or an exo without it: this test did not run");
            return None;
        }
        // Somebody else may get one of its ports before it does.
        let started = (0..TRIES).find_map(|_| Self::try_start());
        Some(started.expect("etcd starts"))
    }

    /// `None` when it ended at once.
    fn try_start() -> Option<Self> {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (address, peer) = (free(), format!("http://{}", free()));
        let (client, dir) = (format!("http://{address}"), tempfile::tempdir().unwrap());
        let process = Command::new("etcd")
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--data-dir"])
            .arg(dir.path().join("etcd"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut started = Self { process, address, dir };
        let is_up = wait_for("etcd", || {
            let has_ended = started.process.try_wait()?.is_some();
            Ok((has_ended || TcpStream::connect(address).is_ok()).then_some(!has_ended))
        });
        is_up.unwrap().then_some(started)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Where it has ended there is nothing to kill.
        let _ = self.process.kill();
        self.process.wait().unwrap();
    }
}

#[test]
fn two_control_planes_share_an_etcd() {
    let Some(etcd) = Etcd::start() else { return };
    let url = format!("etcd://{}", etcd.address);
    let place = Place::loopback(etcd.dir.path(), etcd.dir.path());
    let common = ["--port", "0", "--api-port", "0", "--no-agent", "--store", &url];
    let mut first = Exo::start(&place, "mac-1", &common).unwrap();
    let peer = first.api().unwrap().trim_start_matches("https://").to_owned();
    let args: Vec<&str> = common.into_iter().chain(["--peers", &peer]).collect();
    let second = Exo::start(&place, "mac-2", &args).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let admin = |exo: &Exo| Admin::of(exo, Duration::from_secs(10)).unwrap();
    let (one, two) = (admin(&first), admin(&second));
    let create = |admin: &Admin, name: &str| {
        let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": name}, "spec": {}});
        let ask = async || {
            let answer = admin.client.post(admin.leases()).json(&body).send().await?;
            // A try whose end is unknown may have made it.
            let is_made = answer.status().is_success() || answer.status() == StatusCode::CONFLICT;
            ensure!(is_made, "{}", answer.text().await?);
            Ok(())
        };
        in_the_end("a write", || runtime.block_on(ask())).unwrap();
    };
    let names = |admin: &Admin| -> Vec<String> {
        let ask = async || {
            let answer = admin.client.get(admin.leases()).send().await?;
            Ok(answer.error_for_status()?.json::<Value>().await?)
        };
        let list = in_the_end("a list", || runtime.block_on(ask())).unwrap();
        let items = list["items"].as_array().unwrap();
        items.iter().map(|l| l["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    create(&one, "a");
    create(&two, "b");
    assert_eq!(names(&one), ["a", "b"]);
    assert_eq!(names(&two), ["a", "b"]);
    first.kill().unwrap();
    create(&two, "c");
    // It comes back by its data, and the flag.
    first.restart().unwrap();
    wait_for("the first one to have everything", || {
        Ok((names(&admin(&first)) == ["a", "b", "c"]).then_some(()))
    })
    .unwrap();
}
