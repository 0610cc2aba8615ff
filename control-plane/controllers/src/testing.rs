//! What the tests of several controllers share.

use exo_crds::Shard;
use serde_json::json;

/// The only shard of an instance of the namespace `default`.
pub(crate) fn shard(name: &str, node: &str) -> Shard {
    let shard = json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "Shard",
        "metadata": {"namespace": "default", "name": name},
        "spec": {"instance": "chat", "replica": 0, "epoch": 1, "node": node, "rank": 0,
            "worldSize": 1, "sharding": "Pipeline", "layers": "0-7", "transport": "ring",
            "seed": 1, "contextLength": 128, "maxConcurrency": 4, "fastSynch": true,
            "model": {"name": "m", "source": {"path": "m"}, "modelType": "llama", "layers": 8}},
    });
    serde_json::from_value(shard).unwrap()
}
