//! The data directory: one process at a time, keys, the admin's kubeconfig.
//!
//! ```text
//! lock            held while a process runs
//! kubeconfig      for people and exoctl, mode 0600
//! pki/            ca.crt node.crt node.key, and ca.key where the control plane runs
//! raft/           the replicated store
//! joining         while this node is not yet a member of a cluster's control plane: whom it asks
//! node            the names under which this node is in its cluster
//! members         API addresses of the other nodes of the control plane, as last heard
//! shards/         one folder per shard that runs here
//! ```

use std::{
    fs::{self, File, TryLockError},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use exo_trust::{
    Authority, GROUP_CONTROL_PLANE, GROUP_NODES, Issued, Subject, TlsPaths, certificate_expired,
    certificate_renewal_due, certificate_subject, reqwest_client, write_private,
};
use serde_json::json;

use crate::{config::Config, kubeconfig};

/// What the name of a node's user begins with, as in Kubernetes.
pub(crate) const NODE_USER_PREFIX: &str = "system:node:";

/// The subject of a node's certificate.
pub(crate) fn node_subject(node_name: &str) -> Subject {
    Subject { name: format!("{NODE_USER_PREFIX}{node_name}"), groups: vec![GROUP_NODES.to_owned()] }
}

/// What a data directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Nothing,
    /// A control plane: the one that was founded here, or a part of one.
    ControlPlane,
    /// A cluster's authority without a store: somebody removed it, or it was never made.
    Authority,
    /// Half of that: this node is not a member yet, and asked these peers.
    Joining(Vec<String>),
    /// The certificate of a node that runs models only.
    Agent,
}

/// An open data directory; locked until dropped.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl DataDir {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let make = |dir: &Path| {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true);
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(dir).with_context(|| format!("making {}", dir.display()))
        };
        if path.exists() && !path.is_dir() {
            bail!("--data-dir: {} is a file, and a folder is needed", path.display());
        }
        make(path)?;
        make(&path.join("pki"))?;
        let lock_path = path.join("lock");
        let lock =
            File::create(&lock_path).with_context(|| format!("making {}", lock_path.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => bail!(
                "{} is in use by another exo: stop that one, or give this one its own --data-dir",
                path.display()
            ),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("locking {}", lock_path.display()))
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn raft(&self) -> PathBuf {
        self.path.join("raft")
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.path.join("pki")
    }

    pub(crate) fn tls(&self) -> TlsPaths {
        TlsPaths::in_dir(&self.path.join("pki"))
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path.join("kubeconfig")
    }

    pub(crate) fn standing(&self) -> Standing {
        if let Ok(peers) = fs::read_to_string(self.path.join("joining")) {
            return Standing::Joining(peers.lines().map(str::to_owned).collect());
        }
        let has = |file: &str| self.path.join(file).exists();
        if has("raft/store.redb") {
            Standing::ControlPlane
        } else if has("pki/ca.key") {
            Standing::Authority
        } else if has("pki/ca.crt") {
            Standing::Agent
        } else {
            Standing::Nothing
        }
    }

    /// Remembers that this node is on its way into a control plane: until it is a member, it must
    /// not found a cluster of its own with what it was given.
    pub(crate) fn begin_joining(&self, peers: &[String]) -> anyhow::Result<()> {
        Ok(write_private(&self.path.join("joining"), peers.join("\n").as_bytes())?)
    }

    pub(crate) fn end_joining(&self) -> anyhow::Result<()> {
        let path = self.path.join("joining");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| path.display().to_string())
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Takes the names under which this node belongs to its cluster already, or did before its store
    /// was removed: others know it by them.
    ///
    /// # Errors
    /// When the command line asks for others while it belongs to one, or the file can't be read.
    pub(crate) fn settle_names(&self, config: &mut Config) -> anyhow::Result<()> {
        let standing = self.standing();
        if standing == Standing::Nothing {
            return Ok(());
        }
        let belongs = matches!(standing, Standing::ControlPlane | Standing::Agent);
        let path = self.path.join("node");
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.with_context(|| format!("reading {}", path.display()))?,
        };
        let known: serde_json::Value = serde_json::from_str(&text).with_context(|| {
            format!("{} is damaged: remove it, and give --name", path.display())
        })?;
        let named = config.named;
        for (field, flag, was_given, value) in [
            ("name", "--name", named.node, &mut config.node_name),
            ("cluster", "--cluster", named.cluster, &mut config.cluster),
        ] {
            let Some(known) = known[field].as_str() else { continue };
            if was_given && !belongs {
                continue;
            }
            if was_given && known != value {
                bail!(
                    "{flag}: {} is the data of {field} `{known}`, not `{value}`: leave {flag} out, or \
                     give another --data-dir",
                    self.path.display()
                );
            }
            known.clone_into(value);
        }
        Ok(())
    }

    /// Keeps the names for the next start; this node is in its cluster now.
    pub(crate) fn keep_names(&self, config: &Config) -> anyhow::Result<()> {
        let names = json!({"name": config.node_name, "cluster": config.cluster});
        Ok(write_private(&self.path.join("node"), names.to_string().as_bytes())?)
    }

    /// The certificate of the cluster's authority, PEM.
    pub(crate) fn authority_pem(&self) -> anyhow::Result<String> {
        let path = self.tls().ca;
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Takes over the cluster's authority; its certificate came with this node's own.
    pub(crate) fn adopt_authority(&self, key_pem: &str) -> anyhow::Result<()> {
        Authority::adopt(&self.path.join("pki"), key_pem)
            .context("taking over the cluster's certificate authority")
    }

    /// API addresses of the control plane, as this node heard of them last.
    pub(crate) fn known_members(&self) -> Vec<String> {
        known_members(&self.path)
    }

    pub(crate) fn save_members(&self, addresses: &[String]) -> anyhow::Result<()> {
        save_members(&self.path, addresses)
    }

    /// Whether this node has joined a cluster before, under this name, and its certificate is not
    /// about to end.
    pub(crate) fn has_current_identity(&self, name: &str) -> bool {
        let paths = self.tls();
        let is_current = |pem: String| {
            let subject = certificate_subject(&pem);
            subject.is_ok_and(|subject| subject.name == node_subject(name).name)
                && !certificate_renewal_due(&pem, now_s())
        };
        paths.ca.exists()
            && paths.key.exists()
            && fs::read_to_string(&paths.cert).is_ok_and(is_current)
    }

    /// Whether this node has a certificate that it can still show.
    pub(crate) fn has_usable_identity(&self) -> bool {
        reqwest_client(&self.tls()).is_ok()
            && fs::read_to_string(self.tls().cert)
                .is_ok_and(|pem| !certificate_expired(&pem, now_s()))
    }

    /// Writes what joining gave. The old certificate goes first and the new one comes last: if this
    /// is cut short there is none, and the node joins anew.
    pub(crate) fn write_identity(&self, ca_pem: &str, issued: &Issued) -> anyhow::Result<()> {
        let paths = self.tls();
        match fs::remove_file(&paths.cert) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| paths.cert.display().to_string());
            }
            _ => {}
        }
        write_private(&paths.ca, ca_pem.as_bytes())?;
        write_private(&paths.key, issued.key_pem.as_bytes())?;
        write_private(&paths.cert, issued.certificate_pem.as_bytes())?;
        Ok(())
    }

    /// Opens or makes the cluster's authority and gives this node a certificate, unless it has one
    /// that is as good as new: a start needs no room on the disk.
    pub(crate) fn authority(&self, node_name: &str, ip: IpAddr) -> anyhow::Result<Authority> {
        let authority = Authority::open_or_create(&self.path.join("pki"), now_s())
            .context("opening the cluster's certificate authority")?;
        let mut subject = node_subject(node_name);
        subject.groups = vec![GROUP_CONTROL_PLANE.to_owned()];
        let addresses = certificate_addresses(ip);
        if let Some(present) = self.identity()
            && authority.has_issued(&present, &subject, Some(&addresses), now_s())
        {
            return Ok(authority);
        }
        let issued = authority.issue(&subject, Some(&addresses), now_s())?;
        self.write_identity(authority.certificate_pem(), &issued)?;
        Ok(authority)
    }

    /// This node's certificate and key, if they can be read.
    fn identity(&self) -> Option<Issued> {
        let paths = self.tls();
        let certificate_pem = fs::read_to_string(paths.cert).ok()?;
        let key_pem = fs::read_to_string(paths.key).ok()?;
        Some(Issued { certificate_pem, key_pem })
    }

    /// Writes the admin's kubeconfig; see [`kubeconfig::write`].
    pub(crate) fn write_kubeconfig(
        &self,
        authority: &Authority,
        api: SocketAddr,
    ) -> anyhow::Result<()> {
        kubeconfig::write(&self.kubeconfig(), authority, api, now_s())
    }
}

/// Addresses that a node's certificate names: its own and loopback.
pub(crate) fn certificate_addresses(own: IpAddr) -> Vec<IpAddr> {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    if !addresses.contains(&own) {
        addresses.push(own);
    }
    addresses
}

/// As [`DataDir::save_members`], in the data directory at `path`.
pub(crate) fn save_members(path: &Path, addresses: &[String]) -> anyhow::Result<()> {
    Ok(write_private(&path.join("members"), addresses.join("\n").as_bytes())?)
}

/// As [`DataDir::known_members`], of the data directory at `path`.
pub(crate) fn known_members(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path.join("members")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Named;

    #[test]
    fn a_node_keeps_its_names_with_its_data() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let config = |name: &str, cluster: &str, named: bool| Config {
            node_name: name.to_owned(),
            cluster: cluster.to_owned(),
            named: Named { node: named, cluster: named },
            ..Config::for_tests(dir.path())
        };
        let settled = |mut config: Config| {
            data.settle_names(&mut config).map(|()| (config.node_name, config.cluster))
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        data.keep_names(&config("second", "home", true)).unwrap();
        // Not in a cluster yet: the names are free.
        assert_eq!(settled(config("vm", "exo", false)).unwrap(), pair("vm", "exo"));
        // No longer, but with its certificates: others may be given.
        fs::write(dir.path().join("pki/ca.key"), "").unwrap();
        assert_eq!(settled(config("vm", "exo", true)).unwrap(), pair("vm", "exo"));
        assert_eq!(settled(config("vm", "exo", false)).unwrap(), pair("second", "home"));

        fs::create_dir(dir.path().join("raft")).unwrap();
        fs::write(dir.path().join("raft/store.redb"), "").unwrap();
        assert_eq!(settled(config("vm", "exo", false)).unwrap(), pair("second", "home"));
        assert_eq!(settled(config("second", "home", true)).unwrap(), pair("second", "home"));
        for (name, cluster, wanted) in
            [("vm", "home", "--name: "), ("second", "exo", "--cluster: ")]
        {
            let error = settled(config(name, cluster, true)).unwrap_err().to_string();
            assert!(error.starts_with(wanted) && error.contains("--data-dir"), "{error}");
        }
        fs::write(dir.path().join("node"), "{").unwrap();
        let error = settled(config("vm", "exo", false)).unwrap_err();
        assert!(format!("{error:#}").contains("node is damaged"), "{error:#}");
        fs::remove_file(dir.path().join("node")).unwrap();
        assert_eq!(settled(config("vm", "exo", false)).unwrap(), pair("vm", "exo"));
    }

    #[test]
    fn a_certificate_that_is_as_good_as_new_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let own = |ip: &str| data.authority("a", ip.parse().unwrap()).unwrap();
        own("192.0.2.1");
        let first = fs::read(data.tls().cert).unwrap();
        own("192.0.2.1");
        assert_eq!(fs::read(data.tls().cert).unwrap(), first);
        own("192.0.2.2");
        let moved = fs::read(data.tls().cert).unwrap();
        assert_ne!(moved, first);
        // The key of another one.
        let other = tempfile::tempdir().unwrap();
        let other = DataDir::open(other.path()).unwrap();
        other.authority("a", "192.0.2.2".parse().unwrap()).unwrap();
        fs::copy(other.tls().key, data.tls().key).unwrap();
        own("192.0.2.2");
        assert_ne!(fs::read(data.tls().cert).unwrap(), moved);
        // Another cluster's.
        for (from, to) in [(other.tls().key, data.tls().key), (other.tls().cert, data.tls().cert)] {
            fs::copy(from, to).unwrap();
        }
        own("192.0.2.2");
        assert_ne!(fs::read(data.tls().cert).unwrap(), fs::read(other.tls().cert).unwrap());
        assert!(data.has_usable_identity());
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        let error = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("--data-dir"), "{error}");
        drop(first);
        DataDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_file_is_no_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = DataDir::open(&file).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    }

    #[test]
    fn a_folder_says_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert_eq!(data.standing(), Standing::Nothing);
        let founder = tempfile::tempdir().unwrap();
        let founder = DataDir::open(founder.path()).unwrap();
        let authority = founder.authority("a", Ipv4Addr::LOCALHOST.into()).unwrap();
        assert_eq!(founder.standing(), Standing::Authority);
        fs::create_dir(founder.path().join("raft")).unwrap();
        fs::write(founder.path().join("raft/store.redb"), "").unwrap();
        assert_eq!(founder.standing(), Standing::ControlPlane);

        let own = node_subject("b");
        let issued = authority.issue(&own, Some(&[]), now_s()).unwrap();
        data.write_identity(authority.certificate_pem(), &issued).unwrap();
        assert_eq!(data.standing(), Standing::Agent);
        let peers = vec!["a:1".to_owned(), "b:2".to_owned()];
        data.begin_joining(&peers).unwrap();
        data.adopt_authority(authority.key_pem()).unwrap();
        assert_eq!(data.standing(), Standing::Joining(peers));
        data.end_joining().unwrap();
        assert_eq!(data.standing(), Standing::Authority);
    }
}
