//! Objects as kubectl applies, shows and deletes them.

use std::{path::Path, process::Stdio, time::Duration};

use axum::http::Method;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::timeout,
};

use crate::{
    kubectl::start,
    support::{INSTANCES, SHARDS, shard},
};

pub(crate) fn instance(replicas: &str) -> String {
    format!(
        "apiVersion: exo.dev/v1alpha1\nkind: InferenceInstance\nmetadata: {{name: llama}}\n\
         spec: {{model: tiny, replicas: {replicas}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_applied_shown_and_deleted() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    let apply = "apply -f -";
    let name = "inferenceinstance.exo.dev/llama";
    assert_eq!(kubectl.ok(apply, &instance("1")).await, format!("{name} created\n"));
    assert_eq!(kubectl.ok(apply, &instance("1")).await, format!("{name} unchanged\n"));
    assert_eq!(kubectl.ok(apply, &instance("3")).await, format!("{name} configured\n"));
    let replicas = "get ii llama -o jsonpath={.spec.replicas}/{.metadata.generation}";
    assert_eq!(kubectl.ok(replicas, "").await, "3/2");

    let unknown = instance("3, modle: x");
    let message = if kubectl.is_recent().await {
        kubectl.fails(apply, &unknown).await
    } else {
        String::from_utf8(kubectl.run(apply, &unknown).await.stderr).unwrap()
    };
    // Old ones find it themselves, by the definition.
    let is_named = message.contains("unknown field \"spec.modle\"");
    assert!(is_named || message.contains("unknown field \"modle\""), "{message}");
    let message = kubectl.fails(apply, &instance("many")).await;
    let is_named = message.contains("spec.replicas: Invalid value");
    assert!(is_named || message.contains("spec.replicas): invalid type"), "{message}");
    assert_eq!(kubectl.ok(replicas, "").await, "3/2", "refused means unchanged");

    let status = json!({"status": {"conditions": [{
        "type": "Ready", "status": "True", "reason": "R", "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z"
    }]}});
    server.call(Method::PATCH, &format!("{INSTANCES}/llama/status"), Some(status)).await;
    let wait = "wait ii/llama --for=condition=Ready --timeout=20s";
    assert_eq!(kubectl.ok(wait, "").await, format!("{name} condition met\n"));
    let described = kubectl.ok("describe ii llama", "").await;
    assert!(described.contains("Model:") && described.contains("Conditions:"), "{described}");
    let explained = kubectl.ok("explain inferenceinstances.spec.replicas", "").await;
    assert!(explained.contains("Copies of the model"), "{explained}");

    kubectl.ok("label ii llama team=a", "").await;
    assert_eq!(kubectl.ok("get ii -l team=a -o name", "").await, format!("{name}\n"));
    assert_eq!(
        kubectl.ok("delete ii llama --timeout=20s", "").await,
        "inferenceinstance.exo.dev \"llama\" deleted\n"
    );
    let message = kubectl.fails("get ii llama", "").await;
    assert!(message.contains("(NotFound): inferenceinstances.exo.dev \"llama\" not found"));
    let nothing = kubectl.run("get ii", "").await;
    assert_eq!(
        String::from_utf8_lossy(&nothing.stderr),
        "No resources found in default namespace.\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_printed_and_watched() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    for (name, node, rank) in [("llama-0-a1-0", "studio-1", 0), ("llama-0-a1-1", "studio-2", 1)] {
        server.call(Method::POST, SHARDS, Some(shard(name, node, rank))).await;
    }
    let status = json!({"status": {"phase": "Ready", "progress": "100%", "memory": "19Gi"}});
    let first = format!("{SHARDS}/llama-0-a1-0/status");
    server.call(Method::PATCH, &first, Some(status)).await;
    let printed = kubectl.ok("get shards", "").await;
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines[1].rsplit_once(' ').unwrap().1.ends_with('s'), "an age: {printed}");
    let without_age: Vec<&str> =
        lines.iter().map(|line| line.trim_end().rsplit_once(' ').unwrap().0.trim_end()).collect();
    assert_eq!(
        without_age,
        [
            "NAME           INSTANCE   RANK   NODE       LAYERS   SHARDING   BACKEND   PHASE   \
             PROGRESS   MEMORY",
            "llama-0-a1-0   llama      0      studio-1   0-39     Pipeline   jaccl     Ready   \
             100%       19Gi",
            "llama-0-a1-1   llama      1      studio-2   40-79    Pipeline   jaccl",
        ]
    );
    let on_node = "get shards --field-selector spec.node=studio-2 -o name";
    assert_eq!(kubectl.ok(on_node, "").await, "shard.exo.dev/llama-0-a1-1\n");

    let mut watch =
        kubectl.command("get shards -w --no-headers").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = timeout(Duration::from_secs(60), lines.next_line()).await;
        let line = line.expect("kubectl prints something").unwrap().unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(next().await[0], "llama-0-a1-0");
    assert_eq!(next().await[0], "llama-0-a1-1");
    let failed = json!({"status": {"phase": "Failed"}});
    server.call(Method::PATCH, &first, Some(failed)).await;
    let row = next().await;
    assert_eq!((row[0].as_str(), row[7].as_str()), ("llama-0-a1-0", "Failed"), "{row:?}");
    watch.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_are_discovered_and_samples_apply() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    let resources = kubectl.ok("api-resources --api-group=exo.dev --no-headers", "").await;
    let kinds: Vec<&str> = resources.lines().filter_map(|l| l.split_whitespace().last()).collect();
    assert_eq!(kinds, ["InferenceInstance", "Model", "Node", "Shard"]);
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/samples");
    let apply = format!("apply -f {}", manifests.join("tiny.yaml").display());
    assert!(kubectl.ok(&apply, "").await.contains("created"));
    let namespaces = kubectl.ok("get ns --no-headers", "").await;
    assert!(namespaces.starts_with("default   Active   "), "{namespaces}");
    assert_eq!(namespaces.lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_are_applied_by_several_managers() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    let name = "inferenceinstance.exo.dev/llama";
    let apply = "apply --server-side -f -";
    // What was applied by the client is taken over without a conflict.
    kubectl.ok("apply -f -", &instance("1")).await;
    let applied = kubectl.ok(apply, &instance("2")).await;
    assert_eq!(applied, format!("{name} serverside-applied\n"));
    // The client finds what it applied so, and takes away what it leaves out later.
    let longer = instance("2").replace("replicas: 2", "replicas: 2, contextLength: 512");
    kubectl.ok(apply, &longer).await;
    let last = kubectl.ok("apply view-last-applied ii llama", "").await;
    assert!(last.contains("contextLength: 512") && last.contains("replicas: 2"), "{last}");
    kubectl.ok("apply -f -", &instance("2")).await;
    assert_eq!(kubectl.ok("get ii llama -o jsonpath={.spec.contextLength}", "").await, "");
    let other = format!("{apply} --field-manager=other");
    let message = kubectl.fails(&other, &instance("3")).await;
    assert!(message.contains("conflict with \"kubectl\": .spec.replicas"), "{message}");
    kubectl.ok(&format!("{other} --force-conflicts"), &instance("3")).await;
    let replicas = "get ii llama -o jsonpath={.spec.replicas}";
    assert_eq!(kubectl.ok(replicas, "").await, "3");

    kubectl.ok("scale ii llama --replicas=5", "").await;
    assert_eq!(kubectl.ok(replicas, "").await, "5");
    if !kubectl.is_recent().await {
        // It always shows the managers, and asks OpenAPI 2 whether there is a dry run.
        return;
    }
    let managers = "get ii llama --show-managed-fields \
                    -o jsonpath={.metadata.managedFields[*].subresource}";
    assert_eq!(kubectl.ok(managers, "").await, "scale");
    let diff = kubectl.run("diff --server-side --force-conflicts -f -", &instance("4")).await;
    let diff = String::from_utf8(diff.stdout).unwrap();
    assert!(diff.contains("-  replicas: 5") && diff.contains("+  replicas: 4"), "{diff}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_own_types_are_served() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let garbage = exo_apiserver::collect_garbage(server.server.clone(), async {
        stopped.await.ok();
    });
    let garbage = tokio::spawn(garbage);
    let message = kubectl.fails("-n team apply -f -", &instance("1")).await;
    assert!(message.contains("namespaces \"team\" not found"), "{message}");
    let team = "apiVersion: v1\nkind: Namespace\nmetadata: {name: team}\n";
    kubectl.ok("apply -f -", team).await;
    kubectl.ok("-n team apply -f -", &instance("1")).await;
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: key}\nstringData: {a: b}\n";
    kubectl.ok("-n team apply -f -", secret).await;
    let secret = "-n team get secret key -o jsonpath={.type}/{.data.a}";
    assert_eq!(kubectl.ok(secret, "").await, "Opaque/Yg==");
    kubectl.ok("-n team annotate secret key note=x", "").await;
    kubectl.ok("label namespace team a=b", "").await;
    assert_eq!(kubectl.ok("auth can-i create shards", "").await, "yes\n");
    if kubectl.knows_itself().await {
        assert!(kubectl.ok("auth whoami", "").await.contains("system:masters"));
    }
    let crds = kubectl.ok("get crd -o name", "").await;
    assert!(crds.contains("customresourcedefinition.apiextensions.k8s.io/shards.exo.dev"));
    kubectl.ok("delete namespace team --timeout=30s", "").await;
    let message = kubectl.fails("-n team get ii llama", "").await;
    assert!(message.contains("not found"), "{message}");
    assert!(kubectl.fails("delete namespace default", "").await.contains("forbidden"));
    stop.send(()).unwrap();
    garbage.await.unwrap();
}
