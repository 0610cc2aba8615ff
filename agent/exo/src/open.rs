//! Opens the cluster's store: this node's part of it, or the one in etcd.

use std::{net::SocketAddr, path::Path};

use anyhow::{anyhow, bail};
use exo_store::{Begin, OpenError, Peering, RaftConfig, Store, Txn};
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
    let node_id = exo_store::node_id(&dir).map_err(|error| unopened(&dir, error.into()))?;
    let begin = match start {
        Start::Join(_) => Begin::Join,
        Start::Found | Start::Resume => Begin::Found,
    };
    let name = config.node_name.clone();
    let config = RaftConfig { dir: dir.clone(), node_id, name, address: api.to_string() };
    let client = reqwest_client(&data.tls())?;
    let tls = Some(client_config(&data.tls())?.into());
    let peering = Peering { client, tls, begin };
    let store = Store::raft_with_peers(config, peering).await;
    Ok((store.map_err(|error| unopened(&dir, error))?, node_id))
}

/// Why the store does not open, and the cure if it is damaged: nobody should have to look for it. What
/// only can't be opened now stays, for it may hold all that there is.
fn unopened(dir: &Path, error: OpenError) -> anyhow::Error {
    let is_damaged = error.is_damage();
    let error = anyhow::Error::from(error).context("opening the store");
    match is_damaged {
        true => anyhow!(
            "{error:#}\n  If other nodes have the control plane, they have the data: remove {} and \
             start with --peers HOST:PORT, the address of one of them",
            dir.display()
        ),
        false => error,
    }
}

/// Beside the API's resources, which are all under another prefix.
const AUTHORITY: &str = "/exo/authority";

/// Whether this node belongs to the cluster whose state is in a store that is nobody's part of: nodes
/// with certificates of another authority would be in it and never reach the others.
///
/// # Errors
/// The store's cluster has another authority than `own`, or this node has none yet; or the store
/// can't be asked.
pub(crate) async fn check_authority(store: &Store, own: Option<&str>) -> anyhow::Result<()> {
    let known = store.get(AUTHORITY).await?;
    match (known, own) {
        (Some(known), Some(own)) if known.value.trim() == own.trim() => Ok(()),
        (Some(_), Some(_)) => bail!(
            "the data directory belongs to another cluster than the one in etcd: give this node \
             another --data-dir and --peers HOST:PORT, the address of one of its nodes"
        ),
        (Some(_), None) => bail!(
            "there is a cluster in etcd already: to join it, add --peers HOST:PORT, the address of \
             one of its nodes"
        ),
        (None, _) => Ok(()),
    }
}

/// Writes down whose cluster is in the store, if nobody has.
///
/// # Errors
/// As [`check_authority`].
pub(crate) async fn claim(store: &Store, own: &str) -> anyhow::Result<()> {
    // Whoever was first is the one.
    store.txn(Txn::create(AUTHORITY, own)).await?;
    check_authority(store, Some(own)).await
}

#[cfg(feature = "etcd")]
pub(crate) async fn etcd(etcd: &Etcd, api: SocketAddr) -> anyhow::Result<Store> {
    use anyhow::Context as _;

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
    let endpoints = etcd.endpoints.join(", ");
    Store::etcd(config).await.with_context(|| format!("--store: using etcd at {endpoints}"))
}

#[cfg(not(feature = "etcd"))]
pub(crate) async fn etcd(_etcd: &Etcd, _api: SocketAddr) -> anyhow::Result<Store> {
    anyhow::bail!("this exo was built without etcd")
}

#[cfg(test)]
mod tests {
    use std::{io::ErrorKind, path::PathBuf};

    use exo_store::DiskError;

    use super::*;

    #[test]
    fn a_damaged_store_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("store.redb"), vec![7; 8192]).unwrap();
        let error = exo_store::node_id(dir.path()).unwrap_err();
        let text = format!("{:#}", unopened(dir.path(), error.into()));
        let cure = format!("remove {} and start with --peers", dir.path().display());
        assert!(text.starts_with("opening the store: ") && text.contains(&cure), "{text}");
        let other = DiskError::OtherNode { path: "x".into(), found: 1, expected: 2 };
        let text = format!("{:#}", unopened(dir.path(), other.into()));
        assert!(!text.contains("remove"), "{text}");
    }

    #[tokio::test]
    async fn a_store_is_one_clusters() {
        let store = Store::memory();
        check_authority(&store, None).await.unwrap();
        claim(&store, "pem a\n").await.unwrap();
        claim(&store, "pem a").await.unwrap();
        check_authority(&store, Some("pem a")).await.unwrap();
        let error = check_authority(&store, None).await.unwrap_err().to_string();
        assert!(error.contains("add --peers"), "{error}");
        let error = claim(&store, "pem b").await.unwrap_err().to_string();
        assert!(error.contains("another cluster"), "{error}");
    }

    #[test]
    fn nothing_is_to_be_removed_for_what_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let text = |error: DiskError| format!("{:#}", unopened(dir.path(), error.into()));
        let path = PathBuf::from("store.mark");
        // As after a start by another user.
        let denied = DiskError::Mark { path, source: ErrorKind::PermissionDenied.into() };
        let denied = text(denied);
        assert!(denied.contains("permission denied") && !denied.contains("remove"), "{denied}");
        // No file can be opened there, by root either.
        std::fs::create_dir(dir.path().join("store.redb")).unwrap();
        let unopened = text(exo_store::node_id(dir.path()).unwrap_err());
        assert!(!unopened.contains("remove"), "{unopened}");
    }
}
