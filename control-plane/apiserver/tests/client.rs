//! The server as kube-rs sees it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "client/runtime.rs"]
mod runtime;
mod support;

use exo_crds::{InferenceInstance, InferenceInstanceStatus, InstancePhase, Shard};
use futures::{StreamExt as _, TryStreamExt as _, pin_mut};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    discovery::Discovery,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;
use support::SHARDS;

fn instance(name: &str) -> InferenceInstance {
    serde_json::from_value(support::instance(name)).unwrap()
}

fn shard(name: &str, node: &str, rank: u32) -> Shard {
    serde_json::from_value(support::shard(name, node, rank)).unwrap()
}

#[tokio::test]
async fn an_object_lives_through_all_verbs() {
    let server = support::start();
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());

    let created = api.create(&PostParams::default(), &instance("a")).await.unwrap();
    assert_eq!(created.namespace().as_deref(), Some("default"));
    assert_eq!(created.metadata.generation, Some(1));
    assert!(created.uid().is_some() && created.creation_timestamp().is_some());
    assert_eq!(created.spec.replicas, 1);

    let error = api.create(&PostParams::default(), &instance("a")).await.unwrap_err();
    let kube::Error::Api(status) = error else { panic!("{error}") };
    assert_eq!((status.code, status.reason.as_str()), (409, "AlreadyExists"));

    let mut wanted = api.get("a").await.unwrap();
    assert_eq!(wanted, created);
    wanted.spec.replicas = 2;
    wanted.status =
        Some(InferenceInstanceStatus { phase: Some(InstancePhase::Ready), ..Default::default() });
    let updated = api.replace("a", &PostParams::default(), &wanted).await.unwrap();
    assert_eq!(updated.metadata.generation, Some(2));
    assert_eq!(updated.spec.replicas, 2);
    assert_eq!(updated.status, None, "the status has its own endpoint");

    // The old resource version is refused.
    let error = api.replace("a", &PostParams::default(), &wanted).await.unwrap_err();
    let kube::Error::Api(status) = error else { panic!("{error}") };
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"));

    let patch = json!({"status": {"phase": "Ready"}, "spec": {"replicas": 7}});
    let patched =
        api.patch_status("a", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!(patched.status.as_ref().unwrap().phase, Some(InstancePhase::Ready));
    assert_eq!(patched.spec.replicas, 2, "the spec is not the status endpoint's");
    assert_eq!(patched.metadata.generation, Some(2));

    let patched = api
        .patch("a", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 3}})))
        .await
        .unwrap();
    assert_eq!((patched.spec.replicas, patched.metadata.generation), (3, Some(3)));
    assert!(patched.status.is_some());

    let same = api
        .patch("a", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 3}})))
        .await
        .unwrap();
    assert_eq!(same.resource_version(), patched.resource_version(), "nothing changed");

    let json_patch = serde_json::from_value(json!([
        {"op": "test", "path": "/spec/replicas", "value": 3},
        {"op": "replace", "path": "/spec/replicas", "value": 4}
    ]))
    .unwrap();
    let patched =
        api.patch("a", &PatchParams::default(), &Patch::<()>::Json(json_patch)).await.unwrap();
    assert_eq!(patched.spec.replicas, 4);

    let deleted = api.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(deleted.is_right(), "a status, for nothing holds the object");
    assert!(api.get_opt("a").await.unwrap().is_none());
}

#[tokio::test]
async fn finalizers_hold_an_object() {
    let server = support::start();
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    let mut object = instance("a");
    object.metadata.finalizers = Some(vec!["exo.dev/hold".into()]);
    api.create(&PostParams::default(), &object).await.unwrap();

    let marked = api.delete("a", &DeleteParams::default()).await.unwrap();
    let marked = marked.left().expect("still there");
    assert!(marked.metadata.deletion_timestamp.is_some());
    let again = api.delete("a", &DeleteParams::default()).await.unwrap();
    assert_eq!(again.left().unwrap(), marked, "asking again changes nothing");

    let more = json!({"metadata": {"finalizers": ["exo.dev/hold", "exo.dev/more"]}});
    let error = api.patch("a", &PatchParams::default(), &Patch::Merge(&more)).await.unwrap_err();
    assert!(error.to_string().contains("no new finalizers"), "{error}");

    let free = json!({"metadata": {"finalizers": null}});
    api.patch("a", &PatchParams::default(), &Patch::Merge(&free)).await.unwrap();
    assert!(api.get_opt("a").await.unwrap().is_none());
}

#[tokio::test]
async fn lists_are_paged_and_selected() {
    let server = support::start();
    let api: Api<Shard> = Api::default_namespaced(server.client());
    for (name, node, rank) in [("a", "m1", 0), ("b", "m2", 1), ("c", "m1", 1)] {
        api.create(&PostParams::default(), &shard(name, node, rank)).await.unwrap();
    }
    let names = |list: &kube::core::ObjectList<Shard>| -> Vec<String> {
        list.items.iter().map(|s| s.name_any()).collect()
    };
    let on_m1 = ListParams::default().fields("spec.node=m1");
    assert_eq!(names(&api.list(&on_m1).await.unwrap()), ["a", "c"]);
    let by_label = ListParams::default().labels("exo.dev/instance=other");
    assert!(api.list(&by_label).await.unwrap().items.is_empty());

    let first = api.list(&ListParams::default().limit(2)).await.unwrap();
    assert_eq!(names(&first), ["a", "b"]);
    // What comes meanwhile is not in the later pages.
    api.create(&PostParams::default(), &shard("d", "m1", 0)).await.unwrap();
    let token = first.metadata.continue_.clone().unwrap();
    let rest = api.list(&ListParams::default().limit(2).continue_token(&token)).await.unwrap();
    assert_eq!(names(&rest), ["c"]);
    assert_eq!(rest.metadata.continue_, None);
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);

    let all: Api<Shard> = Api::all(server.client());
    assert_eq!(all.list(&ListParams::default()).await.unwrap().items.len(), 4);
    let gone = api.delete_collection(&DeleteParams::default(), &on_m1).await.unwrap();
    assert_eq!(names(&gone.left().unwrap()), ["a", "c", "d"]);
    assert_eq!(names(&api.list(&ListParams::default()).await.unwrap()), ["b"]);
}

#[tokio::test]
async fn a_watch_tells_everything_after_the_list() {
    let server = support::start();
    let api: Api<Shard> = Api::default_namespaced(server.client());
    api.create(&PostParams::default(), &shard("a", "m1", 0)).await.unwrap();
    let list = api.list(&ListParams::default()).await.unwrap();
    let version = list.metadata.resource_version.unwrap();

    api.create(&PostParams::default(), &shard("b", "m1", 1)).await.unwrap();
    api.create(&PostParams::default(), &shard("c", "m2", 1)).await.unwrap();
    let patch = json!({"status": {"phase": "Ready"}});
    api.patch_status("b", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    api.delete("a", &DeleteParams::default()).await.unwrap();

    let params = WatchParams::default().fields("spec.node=m1");
    let stream = api.watch(&params, &version).await.unwrap();
    pin_mut!(stream);
    let mut told = Vec::new();
    while told.len() < 3 {
        told.push(match stream.try_next().await.unwrap().unwrap() {
            WatchEvent::Added(s) => format!("+{}", s.name_any()),
            WatchEvent::Modified(s) => format!("~{}", s.name_any()),
            WatchEvent::Deleted(s) => format!("-{}", s.name_any()),
            WatchEvent::Bookmark(_) => continue,
            WatchEvent::Error(error) => panic!("{error:?}"),
        });
    }
    assert_eq!(told, ["+b", "~b", "-a"]);
}

#[tokio::test]
async fn a_watcher_follows_creations_and_deletions() {
    let server = support::start();
    let api: Api<Shard> = Api::default_namespaced(server.client());
    api.create(&PostParams::default(), &shard("a", "m1", 0)).await.unwrap();
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let stream = watcher(api.clone(), config).applied_objects();
        pin_mut!(stream);
        assert_eq!(stream.try_next().await.unwrap().unwrap().name_any(), "a");
        let name = format!("b{}", server.store.revision());
        api.create(&PostParams::default(), &shard(&name, "m1", 1)).await.unwrap();
        loop {
            let next = stream.next().await.unwrap().unwrap().name_any();
            if next == name {
                break;
            }
        }
        api.delete(&name, &DeleteParams::default()).await.unwrap();
    }
}

#[tokio::test]
async fn a_position_from_before_history_is_gone() {
    let server = support::start();
    let api: Api<Shard> = Api::default_namespaced(server.client());
    for name in ["a", "b", "c"] {
        api.create(&PostParams::default(), &shard(name, "m1", 0)).await.unwrap();
    }
    let page = api.list(&ListParams::default().limit(1)).await.unwrap();
    api.create(&PostParams::default(), &shard("d", "m1", 0)).await.unwrap();
    server.store.compact(server.store.revision()).await.unwrap();

    let stream = api.watch(&WatchParams::default(), "1").await.unwrap();
    pin_mut!(stream);
    match stream.try_next().await.unwrap().unwrap() {
        WatchEvent::Error(status) => {
            assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));
        }
        other => panic!("{other:?}"),
    }
    assert!(stream.try_next().await.unwrap().is_none(), "the stream ends");

    // A position in the future is of another store.
    let stream = api.watch(&WatchParams::default(), "999").await.unwrap();
    pin_mut!(stream);
    match stream.try_next().await.unwrap().unwrap() {
        WatchEvent::Error(status) => assert_eq!(status.code, 410),
        other => panic!("{other:?}"),
    }

    let token = page.metadata.continue_.unwrap();
    let error = api.list(&ListParams::default().limit(1).continue_token(&token)).await.unwrap_err();
    let kube::Error::Api(status) = error else { panic!("{error}") };
    assert_eq!(status.code, 410);
    // Who doesn't mind goes on with what is there now.
    let path = |token: &str| format!("{SHARDS}?limit=1&continue={token}");
    let (code, refused) = server.get(&path(&token)).await;
    assert_eq!((code.as_u16(), &refused["reason"]), (410, &json!("Expired")));
    let token = refused["metadata"]["continue"].as_str().unwrap();
    api.delete("b", &DeleteParams::default()).await.unwrap();
    let (_, page) = server.get(&path(token)).await;
    assert_eq!(page["items"][0]["metadata"]["name"], "c", "{page}");
    assert_eq!(page["metadata"]["remainingItemCount"], 1);
    let token = page["metadata"]["continue"].as_str().unwrap();
    api.delete("d", &DeleteParams::default()).await.unwrap();
    let (_, last) = server.get(&path(token)).await;
    assert_eq!(last["items"][0]["metadata"]["name"], "d", "from there on it is consistent");
    // Without a position there is none to go on from.
    let (code, refused) =
        server.get(&format!("{SHARDS}?resourceVersion=1&resourceVersionMatch=Exact")).await;
    assert_eq!((code.as_u16(), &refused["metadata"]), (410, &json!({})));
}

#[tokio::test]
async fn kinds_are_discovered() {
    let server = support::start();
    let discovery = Discovery::new(server.client()).run().await.unwrap();
    let shards = discovery.get("exo.dev").unwrap().recommended_kind("Shard").unwrap();
    assert_eq!((shards.0.plural.as_str(), shards.0.version.as_str()), ("shards", "v1alpha1"));
    let version = server.client().apiserver_version().await.unwrap();
    assert_eq!(version.major, "1");
}

#[tokio::test]
async fn concurrent_patches_all_count() {
    let server = support::start();
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    api.create(&PostParams::default(), &instance("a")).await.unwrap();
    let patches = (0..8).map(|i| {
        let api = api.clone();
        async move {
            let patch = json!({"metadata": {"labels": {format!("l{i}"): "x"}}});
            api.patch("a", &PatchParams::default(), &Patch::Merge(&patch)).await
        }
    });
    for result in futures::future::join_all(patches).await {
        result.unwrap();
    }
    assert_eq!(api.get("a").await.unwrap().labels().len(), 8);
}
