//! What else kubectl can do to objects: patches of all types, edits, labels, cascades, waiting,
//! Kubernetes' own types made by kubectl's own forms, events.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use axum::http::Method;
use exo_apiserver::collect_garbage;
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use crate::{
    kubectl::{Kubectl, post, start},
    objects::instance,
    support::{INSTANCES, NODES, SHARDS, Server, node, shard},
};

const NAME: &str = "inferenceinstance.exo.dev/llama";

#[tokio::test(flavor = "multi_thread")]
async fn patches_of_every_type() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    kubectl.ok("create -f -", &instance("1")).await;
    let replicas = "get ii llama -o jsonpath={.spec.replicas}";
    kubectl.ok(r#"patch ii llama --type=merge -p {"spec":{"replicas":2}}"#, "").await;
    assert_eq!(kubectl.ok(replicas, "").await, "2");
    let json =
        r#"patch ii llama --type=json -p [{"op":"replace","path":"/spec/replicas","value":3}]"#;
    kubectl.ok(json, "").await;
    assert_eq!(kubectl.ok(replicas, "").await, "3");
    let wrong =
        r#"patch ii llama --type=json -p [{"op":"test","path":"/spec/replicas","value":9}]"#;
    kubectl.fails(wrong, "").await;
    // Definitions have no strategies, as in Kubernetes.
    let strategic = r#"patch ii llama --type=strategic -p {"spec":{"replicas":4}}"#;
    let message = kubectl.fails(strategic, "").await;
    let is_refused = message.contains("not supported by exo.dev/v1alpha1");
    assert!(is_refused || message.contains("unknown format"), "{message}");
    assert_eq!(kubectl.ok(replicas, "").await, "3");
    let bad = r#"patch ii llama --type=merge -p {"spec":{"nodes":{"min":3,"max":2}}}"#;
    let message = kubectl.fails(bad, "").await;
    assert!(message.contains("spec.nodes.min: Invalid value: 3: min must not be above max"));
    let status =
        r#"patch ii llama --subresource=status --type=merge -p {"status":{"phase":"Ready"}}"#;
    if kubectl.is_recent().await {
        kubectl.ok(status, "").await;
        assert_eq!(kubectl.ok("get ii llama -o jsonpath={.status.phase}", "").await, "Ready");
    }
    let dry = r#"patch ii llama --dry-run=server --type=merge -p {"spec":{"replicas":9}}"#;
    kubectl.ok(dry, "").await;
    assert_eq!(kubectl.ok(replicas, "").await, "3", "it was only tried");
}

/// An editor that changes what it is given by a script for `sed`.
fn editor(kubectl: &Kubectl, script: &str) -> PathBuf {
    let path = kubectl.dir.path().join("editor");
    std::fs::write(&path, format!("#!/bin/sh\nexec sed -i {script} \"$1\"\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

async fn edit(kubectl: &Kubectl, script: &str) -> (bool, String) {
    let editor = editor(kubectl, script);
    let output = kubectl.command("edit ii llama").env("KUBE_EDITOR", editor).output();
    let output = timeout(Duration::from_secs(60), output).await.unwrap().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_edited() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    kubectl.ok("create -f -", &instance("1")).await;
    let (done, said) = edit(&kubectl, "'s/replicas: 1/replicas: 2/'").await;
    assert!(done && said.contains("edited"), "{said}");
    let replicas = "get ii llama -o jsonpath={.spec.replicas}";
    assert_eq!(kubectl.ok(replicas, "").await, "2");
    let (done, said) = edit(&kubectl, "-n p").await;
    assert!(done && said.contains("no changes made"), "{said}");
    // Refused, edited again in vain, given up.
    let (done, said) = edit(&kubectl, "'s/replicas: 2/replicas: -2/'").await;
    assert!(!done && said.contains("\"llama\" is invalid"), "{said}");
    assert_eq!(kubectl.ok(replicas, "").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_annotations_and_whole_objects_are_replaced() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    kubectl.ok("create -f -", &instance("1")).await;
    kubectl.ok("label ii llama team=a", "").await;
    let message = kubectl.fails("label ii llama team=b", "").await;
    assert!(message.contains("--overwrite"), "{message}");
    kubectl.ok("label ii llama team=b --overwrite", "").await;
    kubectl.ok("label ii --all tier=x", "").await;
    let selected = kubectl.ok("get ii -l team=b,tier!=y,tier -o name", "").await;
    assert_eq!(selected, format!("{NAME}\n"));
    kubectl.ok("label ii llama team-", "").await;
    assert_eq!(kubectl.ok("get ii -l team -o name", "").await, "");
    kubectl.ok("annotate ii llama note=one", "").await;
    assert_eq!(
        kubectl.ok("get ii llama -o jsonpath={.metadata.annotations.note}", "").await,
        "one"
    );
    kubectl.ok("annotate ii llama note-", "").await;
    let notes = kubectl.ok("get ii llama -o jsonpath={.metadata.annotations}", "").await;
    assert_eq!(notes, "");

    kubectl.ok("replace -f -", &instance("4")).await;
    let scaled = "scale ii llama --current-replicas=1 --replicas=2";
    let message = kubectl.fails(scaled, "").await;
    assert!(message.contains("Expected replicas to be 1, was 4"), "{message}");
    kubectl.ok("scale ii llama --current-replicas=4 --replicas=2", "").await;
    kubectl.ok("replace --force -f -", &instance("5")).await;
    let shown = kubectl.ok("get ii -o custom-columns=N:.metadata.name,R:.spec.replicas", "").await;
    assert_eq!(shown, "N       R\nllama   5\n");
    let diff = kubectl.run("diff -f -", &instance("6")).await;
    assert_eq!(diff.status.code(), Some(1));
    let diff = String::from_utf8(diff.stdout).unwrap();
    assert!(diff.contains("-  replicas: 5") && diff.contains("+  replicas: 6"), "{diff}");
}

fn owned(name: &str, owner: &Value) -> Value {
    let mut shard = shard(name, "m1", 0);
    shard["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance", "name": "llama",
        "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true,
    }]);
    shard
}

async fn with_dependent(server: &Server, kubectl: &Kubectl) {
    kubectl.ok("create -f -", &instance("1")).await;
    let (_, owner) = server.get(&format!("{INSTANCES}/llama")).await;
    post(server, SHARDS, owned("one", &owner)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_cascade_as_told() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    for cascade in ["foreground", "background"] {
        with_dependent(&server, &kubectl).await;
        kubectl.ok(&format!("delete ii llama --cascade={cascade} --timeout=30s"), "").await;
        // Old ones complain of what is gone already.
        kubectl.run("wait shard/one --for=delete --timeout=30s", "").await;
        assert!(kubectl.fails("get shard one", "").await.contains("NotFound"));
    }
    with_dependent(&server, &kubectl).await;
    kubectl.ok("delete ii llama --cascade=orphan --timeout=30s", "").await;
    let owners = kubectl.ok("get shard one -o jsonpath={.metadata.ownerReferences}", "").await;
    assert_eq!(owners, "");
    kubectl.ok("delete shards --all --timeout=30s", "").await;
    assert_eq!(kubectl.ok("get shards -o name", "").await, "");
    assert_eq!(kubectl.ok("delete ii llama --ignore-not-found", "").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_waits_for_what_is_to_come() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    kubectl.ok("create -f -", &instance("1")).await;
    let absent = "wait ii/llama --for=condition=Ready --timeout=1s";
    assert!(kubectl.fails(absent, "").await.contains("timed out"));
    let waits = |args: &str| {
        let mut command: Command = kubectl.command(args);
        command.output()
    };
    let ready = waits("wait ii/llama --for=condition=Ready --timeout=60s");
    let condition = json!({"status": {"phase": "Ready", "conditions": [{
        "type": "Ready", "status": "True", "reason": "R", "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z"
    }]}});
    let path = format!("{INSTANCES}/llama/status");
    let (output, _) = tokio::join!(ready, server.call(Method::PATCH, &path, Some(condition)));
    assert!(output.unwrap().status.success());
    if kubectl.is_recent().await {
        let phase = "wait ii/llama --for=jsonpath={.status.phase}=Ready --timeout=60s";
        kubectl.ok(phase, "").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_own_types_are_made_by_their_forms() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    kubectl.ok("create namespace team", "").await;
    assert!(kubectl.fails("create namespace team", "").await.contains("AlreadyExists"));
    kubectl.ok("-n team create secret generic key --from-literal=a=b", "").await;
    let secret = "-n team get secret key -o jsonpath={.type}/{.data.a}";
    assert_eq!(kubectl.ok(secret, "").await, "Opaque/Yg==");
    // For these there are strategies.
    kubectl.ok(r#"-n team patch secret key -p {"stringData":{"c":"d"}}"#, "").await;
    assert_eq!(kubectl.ok("-n team get secret key -o jsonpath={.data.c}", "").await, "ZA==");
    kubectl.ok("-n team label secret key x=y", "").await;
    assert_eq!(kubectl.ok("-n team get secret -l x=y -o name", "").await, "secret/key\n");
    let forbidden = kubectl.fails("-n team create secret generic UPPER", "").await;
    assert!(forbidden.contains("metadata.name"), "{forbidden}");
    kubectl.ok("-n team delete secret key", "").await;
    kubectl.ok("delete namespace team --timeout=60s", "").await;
    assert!(kubectl.fails("get namespace team", "").await.contains("NotFound"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_served_is_explained() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    let resources = kubectl.ok("api-resources -o name", "").await;
    for name in ["inferenceinstances.exo.dev", "secrets", "events", "leases.coordination.k8s.io"] {
        assert!(resources.lines().any(|line| line == name), "{name} in {resources}");
    }
    assert!(kubectl.ok("api-versions", "").await.contains("exo.dev/v1alpha1\n"));
    assert!(kubectl.ok("version", "").await.contains("exo"), "the server's version");
    assert!(kubectl.ok("get --raw /", "").await.contains("/apis/exo.dev/v1alpha1"));
    for check in ["readyz", "readyz/store", "livez/ping"] {
        assert_eq!(kubectl.ok(&format!("get --raw /{check}"), "").await, "ok", "{check}");
    }
    let explained = kubectl.ok("explain ii.spec.nodes", "").await;
    assert!(explained.contains("At most this many"), "{explained}");
    for (field, about) in [
        ("ns.spec", "How the namespace is to behave"),
        ("secret.data", "in base64"),
        ("lease.spec.holderIdentity", "Who holds the lease"),
        ("event.involvedObject.name", "Name of the object"),
    ] {
        let explained = kubectl.ok(&format!("explain {field}"), "").await;
        assert!(explained.contains(about), "{field}: {explained}");
    }
    if kubectl.is_recent().await {
        let explained = kubectl.ok("explain secret --recursive", "").await;
        assert!(explained.contains("stringData"), "{explained}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_listed_and_described() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    kubectl.ok("create -f -", &instance("1")).await;
    post(&server, NODES, node("mac")).await;
    let (_, about) = server.get(&format!("{INSTANCES}/llama")).await;
    let event = |name: &str, about: &Value, kind: &str, reason: &str| {
        json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": name},
            "involvedObject": {
                "apiVersion": "exo.dev/v1alpha1", "kind": kind, "uid": about["metadata"]["uid"],
                "name": about["metadata"]["name"], "namespace": about["metadata"]["namespace"],
            },
            "type": "Warning", "reason": reason, "message": format!("why {reason}"), "count": 3,
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z",
            "source": {"component": "exo-controllers", "host": "leader"},
            "reportingComponent": "exo-controllers",
        })
    };
    let events = "/api/v1/namespaces/default/events";
    let first = event("llama.1", &about, "InferenceInstance", "Unplaceable");
    post(&server, events, first).await;
    let (_, mac) = server.get(&format!("{NODES}/mac")).await;
    let second = event("mac.1", &mac, "Node", "NodeLost");
    post(&server, events, second).await;

    let listed = kubectl.ok("get events", "").await;
    let header: Vec<&str> = listed.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]);
    assert!(listed.contains("inferenceinstance/llama") && listed.contains("why Unplaceable"));
    let described = kubectl.ok("describe ii llama", "").await;
    let (_, told) = described.split_once("Events:").unwrap();
    assert!(told.contains("Unplaceable") && told.contains("(x3 over"), "{told}");
    assert!(told.contains("exo-controllers"), "{told}");
    assert!(!told.contains("NodeLost"), "{told}");
    let described = kubectl.ok("describe nodes.exo.dev mac", "").await;
    let (_, told) = described.split_once("Events:").unwrap();
    assert!(told.contains("NodeLost") && !told.contains("Unplaceable"), "{told}");
    if kubectl.is_recent().await {
        let told = kubectl.ok("events --for inferenceinstance/llama", "").await;
        assert!(told.contains("Unplaceable") && !told.contains("NodeLost"), "{told}");
    }
}
