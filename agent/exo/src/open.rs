//! Opens the cluster's store: this node's part of it, or the one in etcd.

use std::net::SocketAddr;

use anyhow::Context as _;
use exo_store::{Begin, Peering, RaftConfig, Store};
use exo_trust::{client_config, reqwest_client};

use crate::{
    config::{Config, Etcd},
    control::Start,
    data_dir::DataDir,
};

/// The store on this node's disk, and this node's id in it.
pub(crate) async fn raft(
    config: &Config,
    data: &DataDir,
    start: &Start,
    api: SocketAddr,
) -> anyhow::Result<(Store, u64)> {
    let dir = data.raft();
    let node_id = exo_store::node_id(&dir).context("opening the store")?;
    let begin = match start {
        Start::Join(_) => Begin::Join,
        Start::Found | Start::Resume => Begin::Found,
    };
    let name = config.node_name.clone();
    let config = RaftConfig { dir, node_id, name, address: api.to_string() };
    let client = reqwest_client(&data.tls())?;
    let tls = Some(client_config(&data.tls())?.into());
    let peering = Peering { client, tls, begin };
    let store = Store::raft_with_peers(config, peering).await.context("opening the store")?;
    Ok((store, node_id))
}

#[cfg(feature = "etcd")]
pub(crate) async fn etcd(etcd: &Etcd, api: SocketAddr) -> anyhow::Result<Store> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
    };
    let tls = match &etcd.ca {
        Some(ca) => {
            let identity = match &etcd.identity {
                Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
                None => None,
            };
            Some(exo_store::EtcdTls { ca: read(ca)?, identity })
        }
        None => None,
    };
    let config = exo_store::EtcdConfig {
        endpoints: etcd.endpoints.clone(),
        user: etcd.user.clone(),
        tls,
        address: api.to_string(),
    };
    Ok(Store::etcd(config).await?)
}

#[cfg(not(feature = "etcd"))]
pub(crate) async fn etcd(_etcd: &Etcd, _api: SocketAddr) -> anyhow::Result<Store> {
    anyhow::bail!("this exo was built without etcd")
}
