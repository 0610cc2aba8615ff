//! The admin's kubeconfig. Any Kubernetes client can use it; `exoctl` also finds there the other
//! nodes that serve the API, and asks them when this one is down.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use exo_crds::{KUBECONFIG_SERVERS, yaml};
use exo_trust::{Authority, GROUP_ADMINS, Subject, TrustError, write_private};
use serde_json::{Value, json};

use crate::data_dir::known_members;

/// Held from reading to writing: the certificate and the servers change independently.
static CHANGING: Mutex<()> = Mutex::new(());

/// Writes it with a fresh client certificate, and with the servers that the data directory around it
/// knows of. On a full disk the one that is there stays: it is most likely as good.
pub(crate) fn write(
    path: &Path,
    authority: &Authority,
    api: SocketAddr,
    now_s: u64,
) -> anyhow::Result<()> {
    let admin = Subject { name: "exo-admin".to_owned(), groups: vec![GROUP_ADMINS.to_owned()] };
    let issued = authority.issue(&admin, None, now_s)?;
    let host = match api.ip() {
        ip if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), api.port()),
        _ => api,
    };
    let encode = |text: &str| BASE64_STANDARD.encode(text);
    let mut config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "exo", "cluster": {
            "server": format!("https://{host}"),
            "certificate-authority-data": encode(authority.certificate_pem()),
        }}],
        "users": [{"name": "exo-admin", "user": {
            "client-certificate-data": encode(&issued.certificate_pem),
            "client-key-data": encode(&issued.key_pem),
        }}],
        "contexts": [{"name": "exo", "context": {"cluster": "exo", "user": "exo-admin"}}],
        "current-context": "exo",
    });
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    name_servers(&mut config, &path.parent().map(known_members).unwrap_or_default());
    match save(path, &config) {
        Err(error) if is_full_disk(&error) && path.exists() => {
            tracing::warn!("the kubeconfig of before stays: {error:#}");
            Ok(())
        }
        saved => saved,
    }
}

fn is_full_disk(error: &anyhow::Error) -> bool {
    error.downcast_ref::<TrustError>().is_some_and(TrustError::is_full_disk)
}

/// Has the file at `path` name these servers (`HOST:PORT`) besides its own. One that people have
/// removed stays away.
pub(crate) fn set_servers(path: &Path, servers: &[String]) -> anyhow::Result<()> {
    let reading = || format!("reading {}", path.display());
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read.with_context(reading)?,
    };
    let documents = yaml::documents(&text).with_context(reading)?;
    let mut config = documents.into_iter().next().with_context(reading)?;
    name_servers(&mut config, servers);
    save(path, &config)
}

fn name_servers(config: &mut Value, servers: &[String]) {
    if let Some(cluster) = config.pointer_mut("/clusters/0/cluster").and_then(Value::as_object_mut)
    {
        let servers = json!([{"name": KUBECONFIG_SERVERS, "extension": {"servers": servers}}]);
        cluster.insert("extensions".to_owned(), servers);
    }
}

fn save(path: &Path, config: &Value) -> anyhow::Result<()> {
    let text = yaml::to_string(config).context("writing the kubeconfig")?;
    Ok(write_private(path, text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_dir::DataDir;

    #[cfg(unix)]
    #[test]
    fn the_kubeconfig_is_private_and_names_the_server() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let authority = data.authority("a", Ipv4Addr::LOCALHOST.into()).unwrap();
        assert!(data.has_current_identity("a") && !data.has_current_identity("b"));
        data.write_kubeconfig(&authority, "0.0.0.0:8443".parse().unwrap()).unwrap();
        let mode = fs::metadata(data.kubeconfig()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = fs::read_to_string(data.kubeconfig()).unwrap();
        assert!(text.contains("server: https://127.0.0.1:8443"), "{text}");
    }

    #[test]
    fn other_servers_are_named_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let authority = data.authority("a", Ipv4Addr::LOCALHOST.into()).unwrap();
        data.write_kubeconfig(&authority, "0.0.0.0:8443".parse().unwrap()).unwrap();
        let read = || -> Value {
            let text = fs::read_to_string(data.kubeconfig()).unwrap();
            yaml::documents(&text).unwrap().remove(0)
        };
        let servers = |config: &Value| {
            config.pointer("/clusters/0/cluster/extensions/0/extension/servers").cloned()
        };
        let mut before = read();
        assert_eq!(servers(&before), Some(json!([])));
        let others = ["192.0.2.2:8443".to_owned(), "192.0.2.3:8443".to_owned()];
        set_servers(&data.kubeconfig(), &others).unwrap();
        assert_eq!(servers(&read()), Some(json!(others)));
        name_servers(&mut before, &others);
        assert_eq!(read(), before);
        // What was heard of is there after the next start too.
        data.save_members(&others).unwrap();
        data.write_kubeconfig(&authority, "0.0.0.0:8443".parse().unwrap()).unwrap();
        assert_eq!(servers(&read()), Some(json!(others)));
    }

    #[test]
    fn certificate_and_servers_may_change_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let authority = data.authority("a", Ipv4Addr::LOCALHOST.into()).unwrap();
        let api = "127.0.0.1:8443".parse().unwrap();
        data.write_kubeconfig(&authority, api).unwrap();
        let read = || -> Value {
            let text = fs::read_to_string(data.kubeconfig()).unwrap();
            yaml::documents(&text).unwrap().remove(0)
        };
        let certificate = "/users/0/user/client-certificate-data";
        for round in 0..50 {
            let others = vec![format!("192.0.2.2:{}", 8000 + round)];
            data.save_members(&others).unwrap();
            let before = read();
            std::thread::scope(|scope| {
                scope.spawn(|| data.write_kubeconfig(&authority, api).unwrap());
                scope.spawn(|| set_servers(&data.kubeconfig(), &others).unwrap());
            });
            let after = read();
            let servers = "/clusters/0/cluster/extensions/0/extension/servers";
            assert_eq!(after.pointer(servers), Some(&json!(others)));
            assert_ne!(after.pointer(certificate), before.pointer(certificate));
        }
    }

    #[test]
    fn a_kubeconfig_that_was_removed_stays_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        set_servers(&path, &["192.0.2.2:8443".to_owned()]).unwrap();
        assert!(!path.exists());
    }
}
