//! Field managers, subresources and Kubernetes' own types, on the wire and through kube-rs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode},
};
use exo_apiserver::{ApiServer, Identity, Limits, app, collect_garbage, in_process};
use exo_crds::InferenceInstance;
use exo_store::Store;
use k8s_openapi::api::{
    authorization::v1::SelfSubjectAccessReview, coordination::v1::Lease, core::v1,
    events::v1 as events,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use support::{INSTANCES, SHARDS, Server, instance, shard};
use tower::ServiceExt as _;

async fn apply(server: &Server, name: &str, query: &str, object: &Value) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(Method::PATCH)
        .uri(format!("{INSTANCES}/{name}?{query}"))
        .header("content-type", "application/apply-patch+yaml")
        .body(Body::from(object.to_string()))
        .unwrap();
    let (code, _, body) = server.send(request).await;
    (code, body)
}

#[tokio::test]
async fn conflicts_name_managers_and_fields() {
    let server = support::start();
    let mut object = instance("a");
    object["spec"]["replicas"] = json!(2);
    let (code, body) = apply(&server, "a", "fieldManager=one", &object).await;
    assert_eq!(code, StatusCode::CREATED, "{body}");
    let fields = &body["metadata"]["managedFields"][0]["fieldsV1"];
    assert_eq!(*fields, json!({"f:spec": {"f:model": {}, "f:replicas": {}}}));
    let (_, same) = apply(&server, "a", "fieldManager=one", &object).await;
    assert_eq!(same, body, "nothing new is nothing written");

    object["spec"]["replicas"] = json!(3);
    let (code, body) = apply(&server, "a", "fieldManager=two", &object).await;
    assert_eq!(code, StatusCode::CONFLICT);
    assert_eq!(body["reason"], "Conflict");
    assert_eq!(
        body["message"],
        "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas"
    );
    assert_eq!(
        body["details"]["causes"],
        json!([{
            "reason": "FieldManagerConflict", "message": "conflict with \"one\"",
            "field": ".spec.replicas"
        }])
    );
    let (code, _) = apply(&server, "a", "fieldManager=two&force=true", &object).await;
    assert_eq!(code, StatusCode::OK);
    // What nobody applies any more is the default again.
    object["spec"].as_object_mut().unwrap().remove("replicas");
    let (_, body) = apply(&server, "a", "fieldManager=two", &object).await;
    assert_eq!(body["spec"]["replicas"], 1);
    let (code, body) = apply(&server, "a", "", &object).await;
    assert_eq!(
        (code.as_u16(), &body["details"]["causes"][0]["field"]),
        (422, &json!("fieldManager"))
    );
}

/// Which object it is, the path says too.
#[tokio::test]
async fn a_configuration_without_a_name_has_that_of_its_path() {
    let server = support::start();
    let nameless = |replicas: u32| {
        json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "spec": {"model": "tiny", "replicas": replicas},
        })
    };
    let (code, body) = apply(&server, "a", "fieldManager=one", &nameless(2)).await;
    assert_eq!(code, StatusCode::CREATED, "{body}");
    let metadata = &body["metadata"];
    assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("a"), &json!("default")));
    let (code, body) = apply(&server, "a", "fieldManager=one", &nameless(3)).await;
    assert_eq!((code, &body["spec"]["replicas"]), (StatusCode::OK, &json!(3)));
    for name in [json!("b"), json!(5), json!({})] {
        let mut other = nameless(4);
        other["metadata"] = json!({"name": name});
        let (code, body) = apply(&server, "a", "fieldManager=one", &other).await;
        assert_eq!(code, StatusCode::BAD_REQUEST, "{name}: {body}");
    }
}

/// kubectl finds there what it applied last, whichever way it did.
#[tokio::test]
async fn what_kubectl_applied_last_is_renewed() {
    const LAST: &str = "kubectl.kubernetes.io/last-applied-configuration";
    let server = support::start();
    let mut created = instance("a");
    created["metadata"]["annotations"] = json!({LAST: instance("a").to_string(), "x": "y"});
    server.call(Method::POST, INSTANCES, Some(created)).await;
    let mut config = instance("a");
    config["spec"]["replicas"] = json!(3);
    let last = |object: &Value| {
        let text = object["metadata"]["annotations"][LAST].as_str()?;
        Some(serde_json::from_str::<Value>(text).unwrap())
    };
    let (_, other) = apply(&server, "a", "fieldManager=other&force=true", &config).await;
    assert_eq!(last(&other), Some(instance("a")), "that is kubectl's alone");
    config["metadata"]["annotations"] = json!({"x": "y"});
    let (code, applied) = apply(&server, "a", "fieldManager=kubectl&force=true", &config).await;
    config["metadata"]["namespace"] = json!("default");
    assert_eq!((code.as_u16(), last(&applied)), (200, Some(config.clone())), "{applied}");
    let (_, again) = apply(&server, "a", "fieldManager=kubectl", &config).await;
    assert_eq!(again["metadata"]["resourceVersion"], applied["metadata"]["resourceVersion"]);
    // Where it would be too long there is none, and the object can be applied all the same.
    config["metadata"]["annotations"]["x"] = json!("y".repeat(200 << 10));
    let (code, applied) = apply(&server, "a", "fieldManager=kubectl", &config).await;
    assert_eq!((code.as_u16(), last(&applied)), (200, None), "{:.300}", applied.to_string());
    // It doesn't contain itself.
    let mut given = instance("c");
    given["metadata"]["annotations"] = json!({LAST: "{}"});
    apply(&server, "c", "fieldManager=kubectl", &given).await;
    let (_, applied) = apply(&server, "c", "fieldManager=kubectl", &given).await;
    let mut expect = instance("c");
    expect["metadata"] = json!({"name": "c", "namespace": "default", "annotations": {}});
    assert_eq!(last(&applied), Some(expect));
    let mut empty = instance("d");
    empty["metadata"]["annotations"] = json!({LAST: ""});
    let (_, applied) = apply(&server, "d", "fieldManager=kubectl", &empty).await;
    assert_eq!(applied["metadata"]["annotations"], json!({LAST: ""}), "an empty one stays");
    // Who never applied without the server gets none.
    let (_, new) = apply(&server, "b", "fieldManager=kubectl", &instance("b")).await;
    assert_eq!(last(&new), None);
}

#[tokio::test]
async fn applied_fields_must_be_declared() {
    let server = support::start();
    for query in ["", "&fieldValidation=Ignore", "&fieldValidation=Warn"] {
        let mut config = instance("a");
        config["spec"]["bogus"] = json!(1);
        let query = format!("fieldManager=one{query}");
        let (code, body) = apply(&server, "a", &query, &config).await;
        let said = "failed to create typed patch object (default/a; exo.dev/v1alpha1, \
                    Kind=InferenceInstance): .spec.bogus: field not declared in schema";
        assert_eq!((code.as_u16(), &body["message"]), (400, &json!(said)));
    }
    assert_eq!(server.get(&format!("{INSTANCES}/a")).await.0, 404);
}

#[tokio::test]
async fn conditions_of_several_managers_are_merged() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    for (manager, kind) in [("one", "Ready"), ("two", "Placed"), ("two", "Other")] {
        let patch = json!({
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
            "status": {"conditions": [{
                "type": kind, "status": "True", "reason": "R", "message": "m",
                "lastTransitionTime": "2026-01-01T00:00:00Z"
            }]}
        });
        let mut patch = patch;
        patch["metadata"] = json!({"name": "a"});
        api.patch_status("a", &PatchParams::apply(manager), &Patch::Apply(patch)).await.unwrap();
    }
    let conditions = api.get("a").await.unwrap().status.unwrap().conditions;
    let kinds: Vec<_> = conditions.iter().map(|c| c.type_.as_str()).collect();
    assert_eq!(kinds, ["Ready", "Other"], "each has what its manager applied last");
}

#[tokio::test]
async fn replicas_are_scaled() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
    let patch = Patch::Merge(json!({"spec": {"replicas": 3}}));
    let scale = api.patch_scale("a", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(3));
    let object = api.get("a").await.unwrap();
    assert_eq!((object.spec.replicas, object.metadata.generation), (3, Some(2)));
    let path = format!("{INSTANCES}/a/scale");
    let bad = json!({"spec": {"replicas": -1}});
    assert_eq!(server.call(Method::PATCH, &path, Some(bad)).await.0.as_u16(), 422);
    let old = json!({"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 1}});
    assert_eq!(server.call(Method::PUT, &path, Some(old)).await.0.as_u16(), 409);
}

#[tokio::test]
async fn events_have_two_names_and_leases_one_holder() {
    let server = support::start();
    let client = server.client();
    let api: Api<events::Event> = Api::default_namespaced(client.clone());
    let event: events::Event = serde_json::from_value(json!({
        "metadata": {"name": "e"}, "note": "hello", "reason": "Placed", "type": "Normal",
        "regarding": {"kind": "Shard", "name": "s"}, "eventTime": "2026-01-01T00:00:00.000000Z",
        "action": "Place", "reportingController": "c", "reportingInstance": "i"
    }))
    .unwrap();
    api.create(&PostParams::default(), &event).await.unwrap();
    assert_eq!(api.get("e").await.unwrap().note.as_deref(), Some("hello"));
    let core: Api<v1::Event> = Api::default_namespaced(client.clone());
    let about = kube::api::ListParams::default().fields("involvedObject.name=s");
    let found = core.list(&about).await.unwrap().items;
    assert_eq!(found[0].message.as_deref(), Some("hello"));
    assert_eq!(found[0].involved_object.kind.as_deref(), Some("Shard"));
    // What it said stays, but for what comes again; through the older group it never did.
    let own = "/apis/events.k8s.io/v1/namespaces/default/events/e";
    let other = json!({"note": "other", "regarding": {"name": "t"}});
    let (code, refused) = server.call(Method::PATCH, own, Some(other)).await;
    assert_eq!((code.as_u16(), &refused["reason"]), (422, &json!("Invalid")), "{refused}");
    let causes = refused["details"]["causes"].as_array().unwrap();
    let fields: Vec<&str> = causes.iter().map(|c| c["field"].as_str().unwrap()).collect();
    assert_eq!(fields, ["regarding", "note"]);
    let again = json!({"series": {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}});
    assert_eq!(server.call(Method::PATCH, own, Some(again)).await.0, StatusCode::OK);
    let core_path = "/api/v1/namespaces/default/events/e";
    let other = json!({"message": "other"});
    assert_eq!(server.call(Method::PATCH, core_path, Some(other)).await.0, StatusCode::OK);
    let (code, refused) = server.call(Method::PATCH, core_path, Some(json!({"action": ""}))).await;
    assert_eq!((code.as_u16(), &refused["details"]["causes"][0]["field"]), (422, &json!("action")));

    let leases: Api<Lease> = Api::default_namespaced(client);
    let lease: Lease = serde_json::from_value(json!({
        "metadata": {"name": "l"}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15}
    }))
    .unwrap();
    let lease = leases.create(&PostParams::default(), &lease).await.unwrap();
    let mut taken = lease.clone();
    taken.spec.as_mut().unwrap().holder_identity = Some("b".into());
    leases.replace("l", &PostParams::default(), &taken).await.unwrap();
    let late = leases.replace("l", &PostParams::default(), &lease).await;
    assert!(matches!(late, Err(kube::Error::Api(status)) if status.code == 409));
}

async fn until_gone(server: &Server, path: &str) {
    let mut watch = server.store.watch("/registry/", 0);
    let gone = async {
        while server.get(path).await.0 != StatusCode::NOT_FOUND {
            watch.next().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
}

#[tokio::test]
async fn owners_go_last_or_leave_their_dependents() {
    let server = support::start();
    tokio::spawn(collect_garbage(server.server.clone(), std::future::pending()));
    for (owner, policy, stays) in [("a", "Foreground", false), ("b", "Orphan", true)] {
        let (_, made) = server.call(Method::POST, INSTANCES, Some(instance(owner))).await;
        let mut dependent = shard(owner, "m", 0);
        dependent["metadata"]["finalizers"] = json!(["exo.dev/runner"]);
        dependent["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance", "name": owner,
            "uid": made["metadata"]["uid"], "blockOwnerDeletion": true
        }]);
        let (code, body) = server.call(Method::POST, SHARDS, Some(dependent)).await;
        assert_eq!(code, StatusCode::CREATED, "{body}");
        let api: Api<InferenceInstance> = Api::default_namespaced(server.client());
        let params = match policy {
            "Foreground" => DeleteParams::foreground(),
            _ => DeleteParams::orphan(),
        };
        api.delete(owner, &params).await.unwrap();
        let path = format!("{SHARDS}/{owner}");
        if stays {
            until_gone(&server, &format!("{INSTANCES}/{owner}")).await;
            let (_, left) = server.get(&path).await;
            let metadata = left["metadata"].as_object().unwrap();
            assert!(!metadata.contains_key("ownerReferences"), "{left}");
            assert!(!metadata.contains_key("deletionTimestamp"), "{left}");
        } else {
            assert_eq!(server.get(&format!("{INSTANCES}/{owner}")).await.0, StatusCode::OK);
            let release = json!({"metadata": {"finalizers": null}});
            server.call(Method::PATCH, &path, Some(release)).await;
            until_gone(&server, &path).await;
            until_gone(&server, &format!("{INSTANCES}/{owner}")).await;
        }
    }
}

#[tokio::test]
async fn secrets_and_namespaces_mind_their_own_rules() {
    let server = support::start();
    let secrets = "/api/v1/namespaces/default/secrets";
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"a": "Yg=="},
    });
    server.call(Method::POST, secrets, Some(secret)).await;
    let change = async |patch: Value| {
        let (code, body) = server.call(Method::PATCH, &format!("{secrets}/s"), Some(patch)).await;
        (code.as_u16(), body["details"]["causes"][0]["field"].clone())
    };
    assert_eq!(change(json!({"data": {"a": "Yw=="}})).await.0, 200);
    assert_eq!(change(json!({"type": "other"})).await, (422, json!("type")));
    assert_eq!(change(json!({"immutable": true})).await.0, 200);
    assert_eq!(change(json!({"data": {"b": "Yw=="}})).await, (422, json!("data")));
    assert_eq!(change(json!({"stringData": {"a": "d"}})).await, (422, json!("data")));
    assert_eq!(change(json!({"immutable": null})).await, (422, json!("immutable")));
    assert_eq!(change(json!({"metadata": {"labels": {"a": "b"}}})).await.0, 200);
    for (bytes, code) in [(1 << 20, 201), ((1 << 20) + 1, 422)] {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": format!("s{code}")},
            "stringData": {"a": "x".repeat(bytes - 1), "b": "y"},
        });
        let (found, body) = server.call(Method::POST, secrets, Some(secret)).await;
        assert_eq!(found.as_u16(), code, "{:.300}", body.to_string());
        if code == 422 {
            let cause = &body["details"]["causes"][0];
            assert_eq!(
                (&cause["field"], &cause["reason"]),
                (&json!("data"), &json!("FieldValueTooLong"))
            );
        }
    }
    for (name, more, field) in [
        (
            "t",
            json!({"type": "kubernetes.io/tls", "stringData": {"tls.crt": "c"}}),
            "data[tls.key]",
        ),
        ("k", json!({"stringData": {"a/b": "c"}}), "data[a/b]"),
    ] {
        let mut secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}});
        json_patch::merge(&mut secret, &more);
        let (code, body) = server.call(Method::POST, secrets, Some(secret)).await;
        assert_eq!((code.as_u16(), &body["details"]["causes"][0]["field"]), (422, &json!(field)));
    }

    let team = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}});
    server.call(Method::POST, "/api/v1/namespaces", Some(team)).await;
    // Nobody collects here: it stays as it is while it goes.
    let (code, going) = server.call(Method::DELETE, "/api/v1/namespaces/team", None).await;
    assert_eq!((code.as_u16(), &going["status"]["phase"]), (200, &json!("Terminating")), "{going}");
    let path = INSTANCES.replace("default", "team");
    let (code, refused) = server.call(Method::POST, &path, Some(instance("a"))).await;
    assert_eq!((code.as_u16(), &refused["reason"]), (403, &json!("Forbidden")));
    assert_eq!(refused["details"]["causes"][0]["reason"], "NamespaceTerminating", "{refused}");
}

#[tokio::test]
async fn too_much_at_once_is_refused_and_versions_are_minded() {
    let registry = prometheus::Registry::new();
    let (in_flight, watches_per_client) = (1, 1);
    let body = Duration::from_millis(500);
    let limits = Limits { in_flight, watches_per_client, body, ..Limits::default() };
    let server =
        ApiServer::with_limits(Store::memory(), &exo_crds::all(), &registry, limits).unwrap();
    let identity = Identity { name: "test".into(), groups: Vec::new() };
    let router = in_process(app(server), identity);
    let watch = || Request::get(format!("{INSTANCES}?watch=1")).body(Body::empty()).unwrap();
    let running = router.clone().oneshot(watch()).await.unwrap();
    assert_eq!(running.status(), StatusCode::OK);
    let refused = router.clone().oneshot(watch()).await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    drop(running);
    assert_eq!(router.clone().oneshot(watch()).await.unwrap().status(), StatusCode::OK);
    // A request whose body is still under way holds the one place.
    let body = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let request = Request::post(INSTANCES).body(body).unwrap();
    let slow = tokio::spawn(router.clone().oneshot(request));
    let list = || Request::get(INSTANCES).body(Body::empty()).unwrap();
    let refused = async {
        while router.clone().oneshot(list()).await.unwrap().status()
            != StatusCode::TOO_MANY_REQUESTS
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap();
    // It doesn't hold it for ever.
    assert_eq!(slow.await.unwrap().unwrap().status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(router.clone().oneshot(list()).await.unwrap().status(), StatusCode::OK);

    let server = support::start();
    for (query, code) in [
        ("resourceVersion=999", 504),
        ("resourceVersion=999&resourceVersionMatch=NotOlderThan", 504),
        ("resourceVersion=0&resourceVersionMatch=NotOlderThan", 200),
        ("resourceVersionMatch=Exact", 422),
        ("resourceVersion=0&resourceVersionMatch=Exact", 422),
        ("resourceVersion=1&resourceVersionMatch=Newest", 422),
        ("resourceVersion=1&resourceVersionMatch=Exact&continue=x", 422),
    ] {
        assert_eq!(server.get(&format!("{INSTANCES}?{query}")).await.0.as_u16(), code, "{query}");
    }
    // What selects is named as such, whatever is done with it.
    for query in ["resourceVersionMatch=Exact", "resourceVersion=1&resourceVersionMatch=Newest"] {
        let path = format!("{INSTANCES}?{query}");
        let (status, refusal) = server.call(Method::DELETE, &path, None).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{refusal}");
        assert_eq!(refusal["details"]["kind"], "ListOptions", "{refusal}");
    }
}

#[tokio::test]
async fn discovery_is_aggregated_and_health_is_told() {
    let server = support::start();
    let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let request = Request::get("/apis").header("accept", accept).body(Body::empty()).unwrap();
    let (_, headers, body) = server.send(request).await;
    assert_eq!(headers["content-type"], accept);
    let groups = body["items"].as_array().unwrap();
    let group = groups.iter().find(|g| g["metadata"]["name"] == "exo.dev").unwrap();
    let resources = group["versions"][0]["resources"].as_array().unwrap();
    let instances = resources.iter().find(|r| r["resource"] == "inferenceinstances").unwrap();
    assert_eq!(instances["subresources"][0]["subresource"], "status");
    assert_eq!(instances["subresources"][1]["responseKind"]["group"], "autoscaling");
    let (_, text) = server.get("/readyz?verbose").await;
    assert_eq!(text, "[+]ping ok\n[+]store ok\n[+]disk ok\nreadyz check passed\n");
    assert_eq!(server.get("/readyz").await.1, "ok");
}

#[tokio::test]
async fn access_is_reviewed_by_the_policy() {
    let registry = prometheus::Registry::new();
    let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
    let server = server.with_policy(Arc::new(|asked| match asked.verb {
        "get" if asked.resource == "shards" => Ok(()),
        _ => Err("no".to_owned()),
    }));
    let identity = Identity { name: "test".into(), groups: vec!["g".into()] };
    let client = kube::Client::new(in_process(app(server), identity), "default");
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client);
    for (verb, allowed) in [("get", true), ("delete", false), ("*", false), ("fly", false)] {
        let review: SelfSubjectAccessReview = serde_json::from_value(json!({
            "metadata": {}, "spec": {"resourceAttributes": {
                "verb": verb, "group": "exo.dev", "resource": "shards", "namespace": "default"
            }}
        }))
        .unwrap();
        let answer = reviews.create(&PostParams::default(), &review).await.unwrap();
        assert_eq!(answer.status.unwrap().allowed, allowed, "{verb}");
    }
}

#[tokio::test]
async fn who_may_asks_in_anothers_name_and_with_the_others_rights() {
    let registry = prometheus::Registry::new();
    let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
    let server = server.with_policy(Arc::new(|asked| {
        let is_admin = asked.identity.groups.iter().any(|group| group == "admins");
        if is_admin || asked.verb == "get" { Ok(()) } else { Err("no".to_owned()) }
    }));
    let router = app(server);
    let me = Identity { name: "me".into(), groups: Vec::new() };
    let request = Request::get(INSTANCES).body(Body::empty()).unwrap();
    let refused = in_process(router.clone(), me).oneshot(request).await.unwrap();
    let refused = axum::body::to_bytes(refused.into_body(), usize::MAX).await.unwrap();
    let refused: Value = serde_json::from_slice(&refused).unwrap();
    let details = json!({"name": "", "group": "exo.dev", "kind": "inferenceinstances"});
    assert_eq!(refused["details"], details, "{refused}");
    let ask = async |group: &str, headers: &[(&str, &str)]| {
        let identity = Identity { name: "me".into(), groups: vec![group.into()] };
        let mut request = Request::get(INSTANCES);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        in_process(router.clone(), identity).oneshot(request).await.unwrap().status().as_u16()
    };
    assert_eq!(ask("admins", &[]).await, 200);
    assert_eq!(ask("people", &[]).await, 403, "it is a list");
    assert_eq!(ask("admins", &[("impersonate-user", "you")]).await, 403);
    let both = [("impersonate-user", "you"), ("impersonate-group", "admins")];
    assert_eq!(ask("admins", &both).await, 200);
    assert_eq!(ask("people", &both).await, 403, "nobody gets more rights by asking");
    assert_eq!(ask("admins", &[("impersonate-group", "admins")]).await, 400);
    let uid = [("impersonate-user", "you"), ("impersonate-uid", "1")];
    assert_eq!(ask("admins", &uid).await, 400);
}
