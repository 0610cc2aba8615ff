//! What people do to a running cluster with `exoctl`.

use exo_tests::{Cluster, wait_for};

/// The one shard's node, once it is Ready.
fn home(cluster: &Cluster, but: Option<&str>) -> String {
    wait_for("one ready shard", || {
        let shards = cluster.shards()?;
        let ready = shards.len() == 1 && shards[0]["status"]["phase"] == "Ready";
        let node = shards.first().and_then(|shard| shard["spec"]["node"].as_str());
        Ok(node.filter(|node| ready && Some(*node) != but).map(str::to_owned))
    })
    .unwrap_or_else(|error| panic!("{error:#}{:?}{}", cluster.shards(), cluster.logs()))
}

#[test]
fn a_drained_nodes_shards_move_to_the_others() {
    let cluster = Cluster::start().unwrap();
    let sample = std::fs::read_to_string(exo_tests::root().join("manifests/samples/tiny.yaml"));
    let output = cluster.apply(&sample.unwrap().replace("min: 2", "min: 1"), true).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let first = home(&cluster, None);
    let drained = cluster.exoctl_ok(&["drain", &first, "--timeout", "180s"]).unwrap();
    assert!(drained.contains(&format!("node.exo.dev/{first} drained")), "{drained}");
    let second = home(&cluster, Some(&first));
    let described = cluster.exoctl_ok(&["describe", "node", &second]).unwrap();
    assert!(described.contains("Shards:\n"), "{described}");

    // Nothing moves back by itself; the node may be used again.
    cluster.exoctl_ok(&["uncordon", &first]).unwrap();
    let instance = sample_instance(&cluster);
    let scale = ["scale", "instance", &instance, "--replicas", "2", "--wait", "--timeout", "5m"];
    cluster.exoctl_ok(&scale).unwrap();
    cluster.wait_for_shards(2).unwrap();
}

fn sample_instance(cluster: &Cluster) -> String {
    let path = "jsonpath={.items[0].metadata.name}";
    cluster.exoctl_ok(&["get", "instances", "-o", path]).unwrap()
}
