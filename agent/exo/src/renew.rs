//! Keeps this node's certificate current while it runs, however long that is.
//!
//! The key stays and only the certificate's file is replaced, in one step: whoever reads the pair at
//! that moment reads one that fits. Listeners and clients take the new one by themselves.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use exo_trust::{Authority, TlsPaths, certificate_renewal_due, certificate_subject, write_private};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    data_dir::{certificate_addresses, known_members, now_s},
    join, kubeconfig,
};

/// A certificate is due for months before it ends: an hour is often.
const CHECK_EVERY: Duration = Duration::from_secs(3600);

/// What is renewed, and how.
#[derive(Clone, Debug)]
pub(crate) struct Renewal {
    pub(crate) tls: TlsPaths,
    pub(crate) node_name: String,
    pub(crate) issuer: Issuer,
}

/// Who signs.
#[derive(Clone, Debug)]
pub(crate) enum Issuer {
    /// The cluster's authority, which is here; the admin's kubeconfig gets a new certificate too.
    Here { pki: PathBuf, address: IpAddr, kubeconfig: PathBuf, api: SocketAddr },
    /// The first node that answers: of those last heard of, then of these.
    Peers { data: PathBuf, peers: Vec<String>, cluster: String },
}

/// Looks after the certificate until `stop`.
pub(crate) async fn keep_current(renewal: Renewal, stop: CancellationToken) {
    loop {
        // Cancel-safe: nothing is under way while this waits.
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(CHECK_EVERY) => {}
        }
        match renewal.renew_if_due(now_s()).await {
            Ok(false) => {}
            Ok(true) => info!("the node's certificate was renewed"),
            Err(error) => warn!("the node's certificate can't be renewed now: {error:#}"),
        }
    }
}

impl Renewal {
    /// Whether the certificate was due and is renewed now.
    pub(crate) async fn renew_if_due(&self, now_s: u64) -> anyhow::Result<bool> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        let old = read(&self.tls.cert)?;
        if !certificate_renewal_due(&old, now_s) {
            return Ok(false);
        }
        let key = read(&self.tls.key)?;
        let certificate = match &self.issuer {
            Issuer::Here { pki, address, kubeconfig: file, api } => {
                let authority = Authority::open_or_create(pki, now_s)?;
                kubeconfig::write(file, &authority, *api, now_s)?;
                let subject = certificate_subject(&old)?;
                let addresses = certificate_addresses(*address);
                authority.renew(&subject, Some(&addresses), &key, now_s)?
            }
            Issuer::Peers { data, peers, cluster } => {
                let mut all = known_members(data);
                all.extend_from_slice(peers);
                join::renew(&self.tls, &all, (&self.node_name, cluster), key).await?
            }
        };
        write_private(&self.tls.cert, certificate.as_bytes())?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::data_dir::DataDir;

    #[tokio::test]
    async fn a_due_certificate_is_replaced_and_its_key_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let (address, api) = (Ipv4Addr::LOCALHOST.into(), "127.0.0.1:8443".parse().unwrap());
        let authority = data.authority("a", address).unwrap();
        data.write_kubeconfig(&authority, api).unwrap();
        let renewal = Renewal {
            tls: data.tls(),
            node_name: "a".to_owned(),
            issuer: Issuer::Here {
                pki: dir.path().join("pki"),
                address,
                kubeconfig: data.kubeconfig(),
                api,
            },
        };
        let files = || {
            [data.tls().cert, data.tls().key, data.kubeconfig()]
                .map(|path| fs::read_to_string(path).unwrap())
        };
        let before = files();
        assert!(!renewal.renew_if_due(now_s()).await.unwrap());
        assert_eq!(files(), before);

        let later = now_s() + 300 * 86_400;
        assert!(renewal.renew_if_due(later).await.unwrap());
        let after = files();
        assert_ne!(after[0], before[0]);
        assert_eq!(after[1], before[1]);
        assert_ne!(after[2], before[2], "the admin's certificate would end as well");
        assert!(!certificate_renewal_due(&after[0], later));
        assert_eq!(
            certificate_subject(&after[0]).unwrap(),
            certificate_subject(&before[0]).unwrap()
        );
        // Key and certificate still are of each other.
        exo_trust::client_config(&data.tls()).unwrap();
    }
}
