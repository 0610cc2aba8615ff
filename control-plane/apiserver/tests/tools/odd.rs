//! What people who know kubectl try on a cluster that they don't know.

use axum::http::Method;
use exo_apiserver::collect_garbage;
use serde_json::json;

use crate::{
    kubectl::{Kubectl, Running, post, start},
    objects::instance,
    support::{INSTANCES, NODES, SHARDS, Server, node, shard},
};

/// Two labelled instances and a shard.
async fn populated() -> Option<(Server, Kubectl)> {
    let (server, kubectl) = start().await?;
    for (name, team) in [("one", "a"), ("two", "b")] {
        let mut object = crate::support::instance(name);
        object["metadata"]["labels"] = json!({"team": team});
        post(&server, INSTANCES, object).await;
    }
    post(&server, SHARDS, shard("one-0-a1-0", "mac", 0)).await;
    post(&server, NODES, node("mac")).await;
    Some((server, kubectl))
}

fn first_words(table: &str) -> Vec<&str> {
    table.lines().filter_map(|line| line.split_whitespace().next()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_every_form() {
    let Some((_, kubectl)) = populated().await else {
        return;
    };
    let mut set = kubectl.command("get ii -o name -l");
    let set = set.arg("team in (b,c)").output().await.unwrap();
    assert_eq!(String::from_utf8(set.stdout).unwrap(), "inferenceinstance.exo.dev/two\n");
    let parts = kubectl.ok("get ii --chunk-size=1 --no-headers", "").await;
    assert_eq!(first_words(&parts), ["one", "two"]);
    let sorted = kubectl.ok("get ii --sort-by=.metadata.labels.team --no-headers", "").await;
    assert_eq!(first_words(&sorted), ["one", "two"]);
    let labels = kubectl.ok("get ii one -L team --show-labels", "").await;
    assert!(labels.lines().next().unwrap().ends_with("TEAM   LABELS"), "{labels}");
    assert!(labels.trim_end().ends_with("a      team=a"), "{labels}");
    let plain = kubectl.ok("get ii one --server-print=false", "").await;
    assert_eq!(
        plain.lines().next().unwrap().split_whitespace().collect::<Vec<_>>(),
        ["NAME", "AGE"]
    );
    let columns = kubectl.ok("get ii -o custom-columns=N:.metadata.name,M:.spec.model", "").await;
    assert_eq!(columns, "N     M\none   tiny\ntwo   tiny\n");
    let template =
        kubectl.ok("get ii -o go-template={{range.items}}{{.metadata.name}};{{end}}", "");
    assert_eq!(template.await, "one;two;");
    // Both kinds are of the category.
    let all = kubectl.ok("get all -o name", "").await;
    let expect =
        "inferenceinstance.exo.dev/one\ninferenceinstance.exo.dev/two\nshard.exo.dev/one-0-a1-0\n";
    assert_eq!(all, expect);
    let several = kubectl.ok("get ii/one node.exo.dev/mac ns/default -o name", "").await;
    assert_eq!(several, "inferenceinstance.exo.dev/one\nnode.exo.dev/mac\nnamespace/default\n");
    let raw = format!("get --raw {INSTANCES}/one/scale");
    let raw: serde_json::Value = serde_json::from_str(&kubectl.ok(&raw, "").await).unwrap();
    assert_eq!((&raw["kind"], &raw["spec"]["replicas"]), (&json!("Scale"), &json!(1)));
    let wide = kubectl.ok("api-resources --api-group=exo.dev -o wide --no-headers", "").await;
    let shards = wide.lines().find(|line| line.starts_with("shards ")).unwrap();
    for verb in ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    {
        assert!(shards.contains(verb), "{verb} in {shards}");
    }
    let explained = kubectl.ok("explain shards", "").await;
    assert!(explained.contains("One rank of one copy of a model"), "{explained}");
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_name_their_events() {
    let Some((server, kubectl)) = populated().await else {
        return;
    };
    let mut watch = Running::start(&kubectl, "get ii -w --output-watch-events --no-headers");
    let mut next = async || {
        let line = watch.line().await;
        line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(next().await, "ADDED one");
    assert_eq!(next().await, "ADDED two");
    let path = format!("{INSTANCES}/two");
    server.call(Method::PATCH, &path, Some(json!({"spec": {"replicas": 2}}))).await;
    assert_eq!(next().await, "MODIFIED two");
    server.call(Method::DELETE, &path, None).await;
    assert_eq!(next().await, "DELETED two");
}

#[tokio::test(flavor = "multi_thread")]
async fn tries_replacements_and_deletions() {
    let Some((server, kubectl)) = populated().await else {
        return;
    };
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    let created = kubectl.ok("create -f - --dry-run=server -o json", &instance("1")).await;
    let created: serde_json::Value = serde_json::from_str(&created).unwrap();
    let metadata = &created["metadata"];
    assert!(metadata["uid"].is_string() && metadata.get("resourceVersion").is_none(), "{metadata}");
    assert!(kubectl.fails("get ii llama", "").await.contains("NotFound"));
    let taken = instance("1").replace("llama", "one");
    let message = kubectl.fails("create -f - --dry-run=server", &taken).await;
    assert!(message.contains("AlreadyExists"), "{message}");

    kubectl.ok("apply -f -", &instance("1")).await;
    let uid = "get ii llama -o jsonpath={.metadata.uid}/{.spec.replicas}";
    let before = kubectl.ok(uid, "").await;
    kubectl.ok("replace --force -f -", &instance("4")).await;
    let after = kubectl.ok(uid, "").await;
    assert!(after.ends_with("/4") && after[..36] != before[..36], "another object: {after}");
    let named = "apiVersion: exo.dev/v1alpha1\nkind: InferenceInstance\n\
                 metadata: {generateName: run-}\nspec: {model: tiny}\n";
    let made = kubectl.ok("create -f - -o name", named).await;
    assert!(made.starts_with("inferenceinstance.exo.dev/run-"), "{made}");

    kubectl.ok("delete ii one --grace-period=30 --dry-run=server", "").await;
    kubectl.ok("get ii one", "").await;
    kubectl.ok("delete ii one --grace-period=0 --force", "").await;
    assert!(kubectl.fails("get ii one", "").await.contains("NotFound"));
    kubectl.ok("delete ii -l team=b --now", "").await;
    kubectl.ok("delete ii llama --wait=false", "").await;
    kubectl.ok("delete all --all", "").await;
    assert_eq!(kubectl.ok("get all -o name", "").await, "");
    assert!(kubectl.fails("create ns a.b", "").await.contains("RFC 1123 label"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_listed_and_others_impersonated() {
    let Some((_, kubectl)) = populated().await else {
        return;
    };
    let listed = kubectl.ok("auth can-i --list", "").await;
    let shards = listed.lines().find(|line| line.starts_with("shards.exo.dev ")).unwrap();
    assert!(shards.contains("deletecollection") && shards.contains("watch"), "{listed}");
    assert!(listed.contains("shards.exo.dev/status"), "{listed}");
    assert_eq!(kubectl.ok("auth can-i * *", "").await, "yes\n");
    if kubectl.knows_itself().await {
        let me = kubectl.ok("auth whoami --as=somebody --as-group=people", "").await;
        assert!(me.contains("somebody") && me.contains("[people]"), "{me}");
        let message = kubectl.fails("get ii --as=somebody --as-uid=1", "").await;
        assert!(message.contains("BadRequest"), "not passed over: {message}");
    }
}

/// Each is refused with a sentence, none hangs or succeeds in vain.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_for_pods_is_refused() {
    let Some((_, kubectl)) = populated().await else {
        return;
    };
    for args in [
        "rollout status ii/one",
        "rollout restart ii/one",
        "exec one -- ls",
        "exec ii/one -- ls",
        "logs ii/one",
        "attach ii/one",
        "port-forward ii/one 1:1",
        "cordon mac",
        "drain mac",
        "taint nodes mac a=b:NoSchedule",
        "top nodes",
        "run x --image=y",
        "expose ii one --port=1",
        "autoscale ii one --max=3",
        "get pods",
        "get ii/absent",
        "create configmap x",
    ] {
        let message = kubectl.fails(args, "").await;
        assert!(message.to_lowercase().contains("error"), "{args}: {message}");
    }
    let missing = r#"patch ii one --type=json -p [{"op":"remove","path":"/spec/seed"}]"#;
    let message = kubectl.fails(missing, "").await;
    assert!(message.contains("/spec/seed"), "{message}");
    assert_eq!(kubectl.ok("get ii -o name", "").await.lines().count(), 2, "nothing has changed");
}
