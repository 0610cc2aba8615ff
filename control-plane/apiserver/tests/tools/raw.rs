//! kubectl as a way to the API itself: raw requests, its proxy, watches of every form, subresources,
//! whole sets of objects.

use std::time::Duration;

use axum::http::Method;
use exo_apiserver::collect_garbage;
use exo_crds::InferenceInstance;
use futures::{TryStreamExt as _, pin_mut};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{ListParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{
    kubectl::{LIMIT, Running, post, start},
    objects::instance,
    support::{INSTANCES, Server},
};

async fn create(server: &Server, name: &str) {
    post(server, INSTANCES, crate::support::instance(name)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_asked_as_they_are() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    let object = crate::support::instance("raw").to_string();
    let made = kubectl.ok(&format!("create --raw {INSTANCES} -f -"), &object).await;
    let mut made: Value = serde_json::from_str(&made).unwrap();
    assert_eq!(made["metadata"]["generation"], 1);
    let path = format!("{INSTANCES}/raw");
    made["spec"]["replicas"] = json!(3);
    kubectl.ok(&format!("replace --raw {path} -f -"), &made.to_string()).await;
    let replicas = kubectl.ok(&format!("get --raw {path}/scale"), "").await;
    assert!(replicas.contains("\"replicas\":3"), "{replicas}");
    let stale = kubectl.fails(&format!("replace --raw {path} -f -"), &made.to_string()).await;
    assert!(stale.contains("Conflict"), "{stale}");
    let one = format!("get --raw {INSTANCES}?limit=1&fieldSelector=metadata.name%3Draw");
    let list: Value = serde_json::from_str(&kubectl.ok(&one, "").await).unwrap();
    assert_eq!(list["items"][0]["spec"]["replicas"], 3);
    let gone = kubectl.ok(&format!("delete --raw {path}"), "").await;
    assert!(gone.contains("\"status\":\"Success\""), "{gone}");
    assert!(kubectl.fails(&format!("get --raw {path}"), "").await.contains("NotFound"));
}

/// Whoever speaks plain HTTP gets through `kubectl proxy` what others get.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_passes_lists_writes_and_watches() {
    let Some((_, kubectl)) = start().await else {
        return;
    };
    let mut proxy = Running::start(&kubectl, "proxy --port=0");
    let said = proxy.line().await;
    let address = said.rsplit(' ').next().unwrap();
    let config = Config::new(format!("http://{address}").parse().unwrap());
    let api: Api<InferenceInstance> = Api::default_namespaced(Client::try_from(config).unwrap());
    let object = serde_json::from_value(crate::support::instance("a")).unwrap();
    let made = api.create(&PostParams::default(), &object).await.unwrap();
    let list = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(list.items[0].uid(), made.uid());
    let events = api.watch(&WatchParams::default(), "0").await.unwrap();
    pin_mut!(events);
    let first = timeout(LIMIT, events.try_next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(first, WatchEvent::Added(object) if object.name_any() == "a"));
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_print_in_every_form() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    create(&server, "one").await;
    let mut names = Running::start(&kubectl, r#"get ii -w -o jsonpath={.metadata.name}{"\n"}"#);
    assert_eq!(names.line().await, "one");
    create(&server, "two").await;
    assert_eq!(names.line().await, "two");

    let mut whole = Running::start(&kubectl, "get ii one -w -o json");
    let mut text = String::new();
    let first: Value = loop {
        text += &whole.line().await;
        match serde_json::from_str(&text) {
            Ok(object) => break object,
            Err(error) => assert!(error.is_eof(), "{error} in {text}"),
        }
    };
    assert_eq!(
        (&first["kind"], &first["metadata"]["name"]),
        (&json!("InferenceInstance"), &json!("one"))
    );

    // It says nothing of what was there; when it begins to look nobody can tell.
    let mut only = Running::start(&kubectl, "get ii --watch-only -o name");
    let line = {
        let line = only.line();
        pin_mut!(line);
        let mut number = 0;
        loop {
            create(&server, &format!("late-{number}")).await;
            number += 1;
            tokio::select! {
                // Cancel safe: it is not dropped before it is done.
                line = &mut line => break line,
                () = sleep(Duration::from_millis(100)) => {}
            }
        }
    };
    assert!(line.starts_with("inferenceinstance.exo.dev/late-"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subresources_are_shown_and_changed_by_themselves() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    if !kubectl.is_recent().await {
        return;
    }
    create(&server, "one").await;
    let shown = kubectl.ok("get ii one --subresource=scale", "").await;
    assert!(shown.contains("one"), "{shown}");
    let scale = r#"patch ii one --subresource=scale --type=merge -p {"spec":{"replicas":2}}"#;
    kubectl.ok(scale, "").await;
    let replicas = "get ii one --subresource=scale -o jsonpath={.kind}/{.spec.replicas}";
    assert_eq!(kubectl.ok(replicas, "").await, "Scale/2");
    let both = r#"patch ii one --subresource=status --type=merge
        -p {"status":{"phase":"Ready"},"spec":{"replicas":9}}"#;
    let both: Vec<&str> = both.split_whitespace().collect();
    kubectl.ok(&both.join(" "), "").await;
    let left = "get ii one --subresource=status -o jsonpath={.status.phase}/{.spec.replicas}";
    assert_eq!(kubectl.ok(left, "").await, "Ready/2");
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_of_objects_are_pruned_and_listed() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    let labelled = |name: &str| {
        let object =
            instance("1").replace("name: llama", &format!("name: {name}, labels: {{app: x}}"));
        format!("---\n{object}")
    };
    kubectl.ok("apply -f -", &(labelled("one") + &labelled("two") + &instance("1"))).await;
    let list = if kubectl.is_recent().await { "allowlist" } else { "whitelist" };
    let prune =
        format!("apply -f - --prune -l app=x --prune-{list}=exo.dev/v1alpha1/InferenceInstance");
    let said = kubectl.ok(&prune, &labelled("two")).await;
    assert!(said.contains("inferenceinstance.exo.dev/one pruned"), "{said}");
    let names = kubectl.ok("get ii -o name", "").await;
    assert_eq!(names, "inferenceinstance.exo.dev/llama\ninferenceinstance.exo.dev/two\n");

    // What was read can be written back.
    let read = kubectl.ok("get ii two -o yaml", "").await;
    kubectl.ok("replace -f -", &read).await;
    let read = kubectl.ok("get ii two -o yaml", "").await;
    let said = kubectl.ok("apply -f -", &read).await;
    assert!(said.starts_with("inferenceinstance.exo.dev/two "), "{said}");
    let tried = "apply --server-side --dry-run=server --force-conflicts -f -";
    let tried = kubectl.ok(tried, &instance("7")).await;
    assert!(tried.contains("server dry run"), "{tried}");
    let replicas = "get ii llama -o jsonpath={.spec.replicas}";
    assert_eq!(kubectl.ok(replicas, "").await, "1");

    // Every kind that can be listed.
    let kinds = kubectl.ok("api-resources --verbs=list --namespaced -o name", "").await;
    let kinds: Vec<&str> = kinds.lines().collect();
    let listed = kubectl.ok(&format!("get {} -o name", kinds.join(",")), "").await;
    assert!(listed.contains("inferenceinstance.exo.dev/two"), "{listed}");
    let described = kubectl.ok("describe ns default", "").await;
    assert!(described.contains("Status:") && described.contains("Active"), "{described}");
    kubectl.ok("create secret generic key --from-literal=a=b", "").await;
    let described = kubectl.ok("describe secret key", "").await;
    assert!(described.contains("a:  1 bytes"), "{described}");
    let described = kubectl.ok("describe crd shards.exo.dev", "").await;
    assert!(described.contains("Established"), "{described}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_and_goes_is_waited_for() {
    let Some((server, kubectl)) = start().await else {
        return;
    };
    let kubectl = std::sync::Arc::new(kubectl);
    let waits = |args: &'static str| {
        let kubectl = std::sync::Arc::clone(&kubectl);
        tokio::spawn(async move { kubectl.ok(args, "").await })
    };
    if kubectl.minor().await >= 31 {
        let waiting = waits("wait ii/one --for=create --timeout=60s");
        create(&server, "one").await;
        assert_eq!(waiting.await.unwrap(), "inferenceinstance.exo.dev/one condition met\n");
    } else {
        create(&server, "one").await;
    }
    let hold = json!({"metadata": {"finalizers": ["exo.dev/hold"]}});
    let path = format!("{INSTANCES}/one");
    server.call(Method::PATCH, &path, Some(hold)).await;
    let deleting = waits("delete ii one --timeout=60s");
    let deleted = waits("wait ii/one --for=delete --timeout=60s");
    timeout(LIMIT, async {
        while server.get(&path).await.1["metadata"].get("deletionTimestamp").is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    let free = json!({"metadata": {"finalizers": null}});
    server.call(Method::PATCH, &path, Some(free)).await;
    assert!(deleting.await.unwrap().contains("deleted"));
    if kubectl.is_recent().await {
        deleted.await.unwrap();
    }
}
