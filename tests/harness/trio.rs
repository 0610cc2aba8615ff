//! Three nodes that hold the control plane together.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Exo, Place, exoctl, exoctl_ok, models_in, net::Net, wait_for};

/// Three control planes: `mac-1` founded the cluster, `mac-2` and `mac-3` joined it.
pub struct Trio {
    pub nodes: Vec<Exo>,
    pub place: Place,
    // Last: processes end before their folders go.
    _dir: TempDir,
}

impl Trio {
    /// On this machine's loopback; `args` go to each process.
    pub fn start(args: &[&str]) -> anyhow::Result<Self> {
        Self::start_at(args, |place, _| place)
    }

    /// The same with more environment.
    pub fn start_with(args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<Self> {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let env: Vec<_> = env.collect();
        Self::start_at(args, |place, _| Place { env: env.clone(), ..place })
    }

    /// In a network namespace each, without agents.
    pub fn start_in(net: &Net, args: &[&str]) -> anyhow::Result<Self> {
        Self::start_at(args, |place, host| Place {
            listen: net.address(host),
            space: Some(net.space(host)),
            ..place
        })
    }

    /// The same, each at a place of its own.
    pub fn start_at(args: &[&str], at: impl Fn(Place, usize) -> Place) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("exo-trio-").tempdir()?;
        let models = models_in(dir.path())?;
        let place = Place::loopback(dir.path(), &models);
        let mut nodes: Vec<Exo> = Vec::new();
        for host in 0..3 {
            let mut args: Vec<&str> = ["--port", "0", "--api-port", "0"]
                .into_iter()
                .chain(args.iter().copied())
                .collect();
            let peer = match nodes.first() {
                Some(first) => first.api()?.trim_start_matches("https://").to_owned(),
                None => String::new(),
            };
            if !peer.is_empty() {
                args.extend(["--peers", &peer]);
            }
            nodes.push(Exo::start(&at(place.clone(), host), &format!("mac-{}", host + 1), &args)?);
        }
        let trio = Self { nodes, place, _dir: dir };
        trio.wait_for_voters(0, 3)?;
        Ok(trio)
    }

    /// Waits until a node knows of so many voters.
    pub fn wait_for_voters(&self, at: usize, count: usize) -> anyhow::Result<()> {
        wait_for(&format!("{count} voters"), || {
            let answer = members(&self.nodes[at])?;
            let members = answer["members"].as_array().context("a list of members")?;
            let voters = members.iter().filter(|m| m["voter"] == true).count();
            Ok((voters == count).then_some(()))
        })
        .with_context(|| self.logs())
    }

    /// The node that leads, among some of them.
    pub fn leader_among(&self, nodes: &[usize]) -> anyhow::Result<usize> {
        wait_for("a leader", || {
            let leads = |at: &&usize| {
                members(&self.nodes[**at]).is_ok_and(|answer| answer["leads"] == true)
            };
            Ok(nodes.iter().find(leads).copied())
        })
        .with_context(|| self.logs())
    }

    pub fn leader(&self) -> anyhow::Result<usize> {
        self.leader_among(&[0, 1, 2])
    }

    /// Runs exoctl as the admin, through one node and once.
    pub fn exoctl(&self, at: usize, args: &[&str]) -> anyhow::Result<Output> {
        exoctl(&self.nodes[at].data_dir.join("kubeconfig"), args)
    }

    /// The same, again while there is no leader; anything but success is an error. Returns stdout.
    pub fn exoctl_ok(&self, at: usize, args: &[&str]) -> anyhow::Result<String> {
        exoctl_ok(&self.nodes[at].data_dir.join("kubeconfig"), args, || self.logs())
    }

    pub fn logs(&self) -> String {
        self.nodes.iter().map(Exo::log_tail).collect()
    }
}

/// What a node says of the control plane, asked with its own certificate. It may have to find out
/// first who leads.
pub fn members(exo: &Exo) -> anyhow::Result<Value> {
    let pki = exo.data_dir.join("pki");
    let file = |name: &str| -> PathBuf { pki.join(name) };
    let output = Command::new("curl")
        .args(["-sf", "--max-time", "20", "--cacert"])
        .arg(file("ca.crt"))
        .arg("--cert")
        .arg(file("node.crt"))
        .arg("--key")
        .arg(file("node.key"))
        .arg(format!("{}/exo/v1/control-plane/members", exo.api()?))
        .output()?;
    ensure!(output.status.success(), "{} does not answer", exo.name);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// An HTTP client with the admin's certificate, for calls to one node's API.
#[derive(Clone)]
pub struct Admin {
    pub client: reqwest::Client,
    pub url: String,
}

impl Admin {
    /// `limit`: for each call.
    pub fn of(exo: &Exo, limit: Duration) -> anyhow::Result<Self> {
        Self::from_kubeconfig(&exo.data_dir.join("kubeconfig"), exo.api()?, limit)
    }

    fn from_kubeconfig(path: &Path, url: &str, limit: Duration) -> anyhow::Result<Self> {
        exo_trust::install_crypto();
        let text = std::fs::read_to_string(path)?;
        let documents: Vec<Value> = exo_crds::yaml::documents(&text)?;
        let config = documents.first().context("a kubeconfig")?;
        let pem = |value: &Value| -> anyhow::Result<Vec<u8>> {
            Ok(BASE64_STANDARD.decode(value.as_str().context("base64 data")?)?)
        };
        let user = &config["users"][0]["user"];
        let mut identity = pem(&user["client-certificate-data"])?;
        identity.extend(pem(&user["client-key-data"])?);
        let ca = pem(&config["clusters"][0]["cluster"]["certificate-authority-data"])?;
        let client = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&ca)?])
            .identity(reqwest::Identity::from_pem(&identity)?)
            .no_proxy()
            .timeout(limit)
            .connect_timeout(Duration::from_secs(2))
            .build()?;
        Ok(Self { client, url: url.to_owned() })
    }

    pub fn leases(&self) -> String {
        format!("{}/apis/coordination.k8s.io/v1/namespaces/default/leases", self.url)
    }
}
