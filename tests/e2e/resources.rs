//! Bad manifests are refused with the field's path and leave nothing behind.

use exo_tests::Cluster;

const INSTANCE: &str = "
apiVersion: exo.dev/v1alpha1
kind: InferenceInstance
metadata: {name: bad}
spec:
";

#[test]
fn bad_manifests_are_refused_and_nothing_is_created() {
    let cluster = Cluster::start().unwrap();
    for (spec, needle) in [
        ("  model: tiny\n  replicaas: 2\n", "spec.replicaas"),
        ("  model: tiny\n  replicas: two\n", "spec.replicas"),
        ("  model: tiny\n  nodes: {min: -1}\n", "spec.nodes.min"),
        ("  model: tiny\n  nodes: {most: 2}\n", "spec.nodes.most"),
        ("  model: tiny\n  sharding: Diagonal\n", "spec.sharding"),
        ("  replicas: 1\n", "spec.model"),
    ] {
        let output = cluster.apply(&format!("{INSTANCE}{spec}"), false).unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{spec}: {text}");
        assert!(text.contains(needle), "{spec}: {text}");
    }
    for (text, needle) in [
        ("a: [1", "manifest.yaml"),
        ("apiVersion: exo.dev/v1alpha1\nkind: Shrad\nmetadata: {name: a}\n", "Shrad"),
        ("kind: Model\nmetadata: {name: a}\n", "apiVersion"),
    ] {
        let output = cluster.apply(text, false).unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}: {stderr}");
        assert!(stderr.contains(needle), "{text}: {stderr}");
    }
    assert_eq!(cluster.exoctl_ok(&["get", "instances", "-o", "name"]).unwrap(), "");

    // A model that nobody defined is no error of form; the instance waits and says for what.
    let output = cluster.apply(&format!("{INSTANCE}  model: nowhere\n"), false).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    exo_tests::wait_for("a condition that names the model", || {
        let text = cluster.exoctl_ok(&["get", "instance", "bad", "-o", "json"])?;
        let instance: serde_json::Value = serde_json::from_str(&text)?;
        let conditions = instance["status"]["conditions"].to_string();
        Ok((instance["status"]["phase"] == "Pending" && conditions.contains("nowhere"))
            .then_some(()))
    })
    .unwrap();
    let described = cluster.exoctl_ok(&["describe", "instance", "bad"]).unwrap();
    assert!(described.contains("nowhere"), "{described}");
    cluster.exoctl_ok(&["delete", "instance", "bad"]).unwrap();
    assert_eq!(cluster.exoctl_ok(&["get", "instances", "-o", "name"]).unwrap(), "");
}
