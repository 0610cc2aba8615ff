//! `exoctl kubeconfig`: what another Kubernetes client needs to reach the same server.

use std::io::Write;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{
    cli::{Global, Kubeconfig},
    config::{self, NODE_NAME},
};

pub(super) fn run(args: &Kubeconfig, global: &Global, out: &mut dyn Write) -> anyhow::Result<()> {
    let (kubeconfig, from) = config::find(global)?;
    if args.path {
        writeln!(out, "{from}")?;
        return Ok(());
    }
    let mut value = serde_json::to_value(kubeconfig).context("reading the kubeconfig")?;
    if let Some(context) = &global.context {
        value["current-context"] = context.as_str().into();
    }
    if let Some(server) = &args.server {
        point_to(&mut value, server)?;
    }
    write!(out, "{}", exo_crds::yaml::to_string(&value)?)?;
    Ok(())
}

/// Has the current context's cluster reached at another address.
fn point_to(kubeconfig: &mut Value, server: &str) -> anyhow::Result<()> {
    let well_formed = server
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !well_formed || server.contains('/') {
        bail!("--server: `{server}` is not HOST:PORT");
    }
    let named = |list: &Value, name: &Value, field: &str| {
        let entry = list.as_array()?.iter().find(|entry| entry["name"] == *name)?;
        Some(entry[field].clone())
    };
    let current = kubeconfig["current-context"].clone();
    let context = named(&kubeconfig["contexts"], &current, "context");
    let cluster = context.map(|context| context["cluster"].clone()).unwrap_or_default();
    let clusters = kubeconfig["clusters"].as_array_mut();
    let cluster = clusters.into_iter().flatten().find(|entry| entry["name"] == cluster);
    let cluster = cluster.context("the kubeconfig's current context names no cluster")?;
    cluster["cluster"]["server"] = format!("https://{server}").into();
    // Its certificate need not name that address.
    cluster["cluster"]["tls-server-name"] = NODE_NAME.into();
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_current_cluster_moves() {
        let mut config = json!({
            "current-context": "b",
            "contexts": [{"name": "a", "context": {"cluster": "one"}},
                         {"name": "b", "context": {"cluster": "two"}}],
            "clusters": [{"name": "one", "cluster": {"server": "https://x"}},
                         {"name": "two", "cluster": {"server": "https://y"}}],
        });
        point_to(&mut config, "studio-1.local:8443").unwrap();
        assert_eq!(config["clusters"][0]["cluster"], json!({"server": "https://x"}));
        assert_eq!(
            config["clusters"][1]["cluster"],
            json!({"server": "https://studio-1.local:8443", "tls-server-name": NODE_NAME})
        );
        for bad in ["studio", "https://a:1", ":1", "a:b"] {
            assert!(point_to(&mut config, bad).is_err(), "{bad}");
        }
        config["current-context"] = json!("c");
        assert!(point_to(&mut config, "a:1").is_err());
    }
}
