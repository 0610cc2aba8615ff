//! kube-rs' runtime: reflector, controller with finalizers, waiting, server-side apply, and one
//! leader by a lease.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use exo_crds::{InferenceInstance, Shard};
use futures::StreamExt as _;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{
        Controller, WatchStreamExt as _,
        controller::Action,
        finalizer::{self, finalizer},
        reflector,
        wait::{await_condition, conditions},
        watcher,
    },
};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::{instance, shard, support};

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `done` says so.
async fn until(what: &str, done: impl Fn() -> bool) {
    let look = async {
        while !done() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(LIMIT, look).await.is_ok(), "never: {what}");
}

#[tokio::test]
async fn a_reflector_holds_what_the_server_has() {
    let server = support::start();
    let api: Api<Shard> = Api::default_namespaced(server.client());
    api.create(&PostParams::default(), &shard("a", "m1", 0)).await.unwrap();
    let (reader, writer) = reflector::store();
    let stream = reflector::reflector(writer, watcher(api.clone(), watcher::Config::default()));
    let following = tokio::spawn(stream.default_backoff().for_each(async |_| {}));
    timeout(LIMIT, reader.wait_until_ready()).await.unwrap().unwrap();
    let names = || {
        let mut names: Vec<String> = reader.state().iter().map(|s| s.name_any()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["a"]);
    api.create(&PostParams::default(), &shard("b", "m1", 1)).await.unwrap();
    api.delete("a", &DeleteParams::default()).await.unwrap();
    until("b alone", || names() == ["b"]).await;
    // The watch's place is lost: the reflector lists anew and goes on.
    for rank in 0..20 {
        let name = format!("c{rank}");
        api.create(&PostParams::default(), &shard(&name, "m1", 0)).await.unwrap();
    }
    server.store.compact(server.store.revision()).await.unwrap();
    api.delete("b", &DeleteParams::default()).await.unwrap();
    until("all but b", || names().len() == 20 && names()[0] == "c0").await;
    following.abort();
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

struct Context {
    api: Api<InferenceInstance>,
    log: Arc<Mutex<Vec<String>>>,
}

async fn reconcile(
    object: Arc<InferenceInstance>,
    context: Arc<Context>,
) -> Result<Action, Failed> {
    finalizer(&context.api, "exo.dev/test", object, |event| async {
        let line = match event {
            finalizer::Event::Apply(object) => format!("apply {}", object.spec.replicas),
            finalizer::Event::Cleanup(_) => "cleanup".to_owned(),
        };
        context.log.lock().unwrap().push(line);
        Ok::<_, Failed>(Action::await_change())
    })
    .await
    .map_err(|error| Failed(error.to_string()))
}

#[tokio::test]
async fn a_controller_cleans_up_before_an_object_goes() {
    let server = support::start();
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let context = Arc::new(Context { api: api.clone(), log: Arc::clone(&log) });
    let controller = Controller::new(api.clone(), watcher::Config::default())
        .run(reconcile, |_, _, _| Action::requeue(Duration::from_millis(50)), context)
        .for_each(async |_| {});
    let running = tokio::spawn(controller);

    api.create(&PostParams::default(), &instance("a")).await.unwrap();
    until("applied", || log.lock().unwrap().contains(&"apply 1".to_owned())).await;
    let patch = Patch::Merge(json!({"spec": {"replicas": 2}}));
    let object = api.patch("a", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(object.finalizers(), ["exo.dev/test"]);
    until("applied again", || log.lock().unwrap().contains(&"apply 2".to_owned())).await;
    let uid = object.uid().unwrap();
    api.delete("a", &DeleteParams::default()).await.unwrap();
    let gone = await_condition(api, "a", conditions::is_deleted(&uid));
    timeout(LIMIT, gone).await.unwrap().unwrap();
    assert_eq!(log.lock().unwrap().last().unwrap(), "cleanup");
    running.abort();
}

#[tokio::test]
async fn definitions_are_established() {
    let server = support::start();
    let api: Api<CustomResourceDefinition> = Api::all(server.client());
    let established = await_condition(api, "shards.exo.dev", conditions::is_crd_established());
    assert!(timeout(LIMIT, established).await.unwrap().unwrap().is_some());
}

#[tokio::test]
async fn typed_objects_are_applied_by_the_server() {
    let server = support::start();
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    let mut wanted = instance("a");
    wanted.spec.replicas = 2;
    let params = PatchParams::apply("one");
    let made = api.patch("a", &params, &Patch::Apply(&wanted)).await.unwrap();
    assert_eq!(made.spec.replicas, 2);
    wanted.spec.replicas = 3;
    let other = PatchParams::apply("two");
    let refused = api.patch("a", &other, &Patch::Apply(&wanted)).await.unwrap_err();
    assert!(matches!(&refused, kube::Error::Api(s) if s.code == 409), "{refused}");
    let forced = api.patch("a", &other.force(), &Patch::Apply(&wanted)).await.unwrap();
    assert_eq!(forced.spec.replicas, 3);
    let managers: Vec<_> =
        forced.managed_fields().iter().filter_map(|m| m.manager.clone()).collect();
    assert_eq!(managers, ["one", "two"]);
}

/// One candidate: takes the lease while nobody holds it, and puts it down again after a while.
async fn stand(client: Client, name: String, leaders: Arc<AtomicU32>, terms: Arc<AtomicU32>) {
    let api: Api<Lease> = Api::default_namespaced(client);
    loop {
        let lease = api.get("leader").await.unwrap();
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone());
        if holder.is_some_and(|holder| !holder.is_empty()) {
            if terms.load(Ordering::SeqCst) >= 12 {
                return;
            }
            tokio::task::yield_now().await;
            continue;
        }
        let mut mine = lease.clone();
        mine.spec = Some(LeaseSpec {
            holder_identity: Some(name.clone()),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        });
        // Only one of those who saw it free gets it.
        let Ok(held) = api.replace("leader", &PostParams::default(), &mine).await else {
            continue;
        };
        assert_eq!(leaders.fetch_add(1, Ordering::SeqCst), 0, "two lead at once");
        tokio::task::yield_now().await;
        leaders.fetch_sub(1, Ordering::SeqCst);
        let is_last = terms.fetch_add(1, Ordering::SeqCst) >= 11;
        let mut free = held;
        free.spec =
            Some(LeaseSpec { holder_identity: Some(String::new()), ..LeaseSpec::default() });
        api.replace("leader", &PostParams::default(), &free).await.unwrap();
        if is_last {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lease_has_one_holder_at_a_time() {
    let server = support::start();
    let api: Api<Lease> = Api::default_namespaced(server.client());
    let lease = Lease {
        metadata: ObjectMeta { name: Some("leader".into()), ..ObjectMeta::default() },
        spec: None,
    };
    api.create(&PostParams::default(), &lease).await.unwrap();
    let (leaders, terms) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let candidates: Vec<_> = (0..4)
        .map(|n| {
            let (leaders, terms) = (Arc::clone(&leaders), Arc::clone(&terms));
            tokio::spawn(stand(server.client(), format!("c{n}"), leaders, terms))
        })
        .collect();
    until("twelve terms", || terms.load(Ordering::SeqCst) >= 12).await;
    for candidate in candidates {
        candidate.abort();
        if let Err(error) = candidate.await {
            assert!(error.is_cancelled(), "{error}");
        }
    }
}
