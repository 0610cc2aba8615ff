//! Damaged model folders: the shard fails and names what is wrong with the files.

use std::{collections::BTreeMap, fs, path::Path};

use exo_tests::{Cluster, root, wait_for};
use serde_json::{Value, json};

/// Header and data of a safetensors file, taken apart and put together again.
struct Tensors(BTreeMap<String, (Value, Vec<u8>)>);

impl Tensors {
    fn read(path: &Path) -> Self {
        let data = fs::read(path).unwrap();
        let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> = serde_json::from_slice(&data[8..8 + length]).unwrap();
        let body = &data[8 + length..];
        let range = |tensor: &Value| {
            let offset = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
            offset(0)..offset(1)
        };
        let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
        Self(
            tensors
                .map(|(name, tensor)| (name, (tensor.clone(), body[range(&tensor)].to_vec())))
                .collect(),
        )
    }

    fn write(&self, path: &Path) {
        let (mut header, mut body) = (BTreeMap::new(), Vec::new());
        for (name, (tensor, data)) in &self.0 {
            let mut tensor = tensor.clone();
            tensor["data_offsets"] = json!([body.len(), body.len() + data.len()]);
            body.extend_from_slice(data);
            header.insert(name, tensor);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(body);
        fs::write(path, file).unwrap();
    }
}

/// A copy of the tiny model with changed tensors, in the folder that the nodes search.
fn damaged(cluster: &Cluster, name: &str, damage: impl FnOnce(&mut Tensors)) {
    let source = root().join("manifests/models/tiny");
    let target = cluster.models.join(name);
    fs::create_dir(&target).unwrap();
    for entry in fs::read_dir(&source).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
    let mut tensors = Tensors::read(&source.join("model.safetensors"));
    damage(&mut tensors);
    tensors.write(&target.join("model.safetensors"));
}

fn apply(cluster: &Cluster, name: &str) {
    let sample = fs::read_to_string(root().join("manifests/samples/tiny.yaml")).unwrap();
    let text = sample
        .replace("name: tiny", &format!("name: {name}"))
        .replace("path: tiny", &format!("path: {name}"))
        .replace("model: tiny", &format!("model: {name}"));
    let output = cluster.apply(&text, false).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until a shard of the instance has failed with a message that holds `needle`, and checks
/// that the instance says so too.
fn expect_failure(cluster: &Cluster, name: &str, needle: &str, permanent: bool) {
    apply(cluster, name);
    wait_for(&format!("{name}: a failed shard that names {needle}"), || {
        let failed = cluster.shards()?.into_iter().any(|shard| {
            shard["spec"]["instance"] == name
                && shard["status"]["phase"] == "Failed"
                && shard["status"]["failure"]["permanent"] == permanent
                && shard["status"]["failure"]["message"].to_string().contains(needle)
        });
        Ok(failed.then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}{:?}{}", cluster.shards(), cluster.logs()));
    wait_for("the instance to say so", || {
        let text = cluster.exoctl_ok(&["get", "instance", name, "-o", "json"])?;
        let instance: Value = serde_json::from_str(&text)?;
        Ok((instance["status"]["phase"] == "Failed"
            && instance["status"]["conditions"].to_string().contains(needle))
        .then_some(()))
    })
    .unwrap();
    cluster.exoctl_ok(&["delete", "instance", name]).unwrap();
    wait_for("its shards to go", || Ok(cluster.shards()?.is_empty().then_some(()))).unwrap();
}

#[test]
fn damaged_weights_fail_with_the_tensors_name() {
    let cluster = Cluster::start().unwrap();
    let missing = "model.layers.1.mlp.up_proj.weight";
    damaged(&cluster, "missing", |tensors| drop(tensors.0.remove(missing)));
    expect_failure(&cluster, "missing", missing, true);

    let unknown = "model.layers.6.mlp.side_proj.weight";
    damaged(&cluster, "unknown", |tensors| {
        let copy = tensors.0["model.layers.6.mlp.up_proj.weight"].clone();
        tensors.0.insert(unknown.to_owned(), copy);
    });
    expect_failure(&cluster, "unknown", unknown, true);

    let misshaped = "model.layers.7.self_attn.o_proj.weight";
    damaged(&cluster, "misshaped", |tensors| {
        let (tensor, data) = tensors.0.get_mut(misshaped).unwrap();
        tensor["shape"] = json!([128, 256]);
        data.truncate(data.len() / 2);
    });
    expect_failure(&cluster, "misshaped", misshaped, true);

    // A folder that no node has yet: somebody may be copying it.
    expect_failure(&cluster, "nowhere", "nowhere", false);
}
