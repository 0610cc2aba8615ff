//! Requests and answers as they are on the wire.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    body::Body,
    http::{Method, Request, StatusCode},
};
use bytes::Bytes;
use exo_apiserver::{ApiServer, app};
use exo_store::Store;
use futures::StreamExt as _;
use serde_json::{Value, json};
use support::{INSTANCES, NODES, SHARDS, instance, node, shard};
use tower::ServiceExt as _;

fn without(mut object: Value, pointer: &str, field: &str) -> Value {
    object.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(field);
    object
}

fn with(mut object: Value, pointer: &str, field: &str, value: Value) -> Value {
    object.pointer_mut(pointer).unwrap()[field] = value;
    object
}

/// Code, reason, message and the causes' fields of a refusal.
fn refusal(answer: &(StatusCode, Value)) -> (u16, &str, &str, Vec<&str>) {
    let (code, body) = answer;
    assert_eq!(body["kind"], "Status", "{body}");
    assert_eq!(body["code"], code.as_u16());
    let causes = body["details"]["causes"].as_array().map_or(&[][..], Vec::as_slice);
    (
        code.as_u16(),
        body["reason"].as_str().unwrap(),
        body["message"].as_str().unwrap(),
        causes.iter().map(|c| c["field"].as_str().unwrap_or_default()).collect(),
    )
}

#[tokio::test]
async fn bad_objects_are_refused_and_nothing_is_created() {
    let server = support::start();
    let strict = format!("{INSTANCES}?fieldValidation=Strict");
    let check = async |path: &str, body: Value, code: u16, fields: &[&str], part: &str| {
        let answer = server.call(Method::POST, path, Some(body)).await;
        let (found, _, message, causes) = refusal(&answer);
        assert_eq!((found, causes.as_slice()), (code, fields), "{message}");
        assert!(message.contains(part), "{message}");
    };
    let a = || instance("a");
    check(&strict, with(a(), "/spec", "modle", json!(1)), 400, &[], "unknown field \"spec.modle\"")
        .await;
    check(
        &strict,
        with(a(), "/spec", "nodes", json!({"mim": 1})),
        400,
        &[],
        "unknown field \"spec.nodes.mim\"",
    )
    .await;
    check(
        INSTANCES,
        with(a(), "/spec", "nodes", json!({"min": "two"})),
        422,
        &["spec.nodes.min"],
        "InferenceInstance.exo.dev \"a\" is invalid: spec.nodes.min: Invalid value",
    )
    .await;
    check(INSTANCES, without(a(), "/spec", "model"), 422, &["spec.model"], "Required value").await;
    check(INSTANCES, without(a(), "", "spec"), 422, &["spec"], "Required value").await;
    check(
        INSTANCES,
        with(a(), "/spec", "sharding", json!("Diagonal")),
        422,
        &["spec.sharding"],
        "supported values: \"Auto\", \"Pipeline\", \"Tensor\"",
    )
    .await;
    check(INSTANCES, instance("Not_A_Name"), 422, &["metadata.name"], "RFC 1123").await;
    let long = instance(&"a".repeat(254));
    let why = "metadata.name: Invalid value: must be no more than 253 characters";
    check(INSTANCES, long, 422, &["metadata.name"], why).await;
    check(INSTANCES, without(a(), "/metadata", "name"), 422, &["metadata.name"], "Required").await;
    check(INSTANCES, node("a"), 400, &[], "InferenceInstance of exo.dev/v1alpha1 is expected")
        .await;
    check(
        INSTANCES,
        with(a(), "/metadata", "namespace", json!("other")),
        400,
        &[],
        "namespace of the provided object does not match",
    )
    .await;
    check(
        INSTANCES,
        with(a(), "/metadata", "resourceVersion", json!("5")),
        400,
        &[],
        "resourceVersion should not be set",
    )
    .await;
    check(
        &strict,
        with(a(), "/metadata", "lables", json!({})),
        400,
        &[],
        "unknown field \"metadata.lables\"",
    )
    .await;
    check(INSTANCES, json!([1]), 400, &[], "not an object").await;
    for (query, option) in [("fieldValidation=Maybe", "fieldValidation"), ("dryRun=Some", "dryRun")]
    {
        let path = format!("{INSTANCES}?{query}");
        let said =
            format!("CreateOptions.meta.k8s.io \"\" is invalid: {option}: Unsupported value");
        check(&path, a(), 422, &[option], &said).await;
    }
    let (_, list) = server.get(INSTANCES).await;
    assert_eq!(list["items"], json!([]), "nothing was created");
}

/// Who lists objects into a type reads none of them if there is one that doesn't fit.
#[tokio::test]
async fn what_fits_no_type_is_refused_or_made_to_fit() {
    let server = support::start();
    let a = || instance("a");
    let s = || shard("s", "m", 0);
    let n = || node("n");
    let owner = json!([{"apiVersion": "v", "kind": "k", "name": "n", "uid": "u", "controller": 1}]);
    for (path, body, field) in [
        (
            INSTANCES,
            with(a(), "/spec", "contextLength", json!(5_000_000_000_u64)),
            "spec.contextLength",
        ),
        (INSTANCES, with(a(), "/spec", "seed", json!(1e20)), "spec.seed"),
        (INSTANCES, with(a(), "/metadata", "generateName", json!(1)), "metadata.generateName"),
        (
            INSTANCES,
            with(a(), "/metadata", "ownerReferences", owner),
            "metadata.ownerReferences[0].controller",
        ),
        (SHARDS, with(s(), "/spec", "layers", json!("5-3")), "spec.layers"),
        (SHARDS, with(s(), "/spec", "layers", json!("0-4294967295")), "spec.layers"),
        (NODES, with(n(), "/spec", "memoryReserve", json!("99999999Ti")), "spec.memoryReserve"),
    ] {
        let answer = server.call(Method::POST, path, Some(body)).await;
        let (code, _, message, causes) = refusal(&answer);
        assert_eq!((code, causes.as_slice()), (422, &[field][..]), "{message}");
    }
    let fits = with(with(a(), "/spec", "replicas", json!(2.0)), "/spec", "seed", json!(1e19));
    let (_, made) = server.call(Method::POST, INSTANCES, Some(fits)).await;
    assert_eq!(made["spec"]["replicas"].to_string(), "2");
    assert_eq!(made["spec"]["seed"].to_string(), "10000000000000000000");
    let claimed = json!({"metadata": {"managedFields": [{
        "manager": "m", "operation": "Update", "apiVersion": "v", "time": "noon",
        "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}},
    }]}});
    let (code, same) = server.call(Method::PATCH, &format!("{INSTANCES}/a"), Some(claimed)).await;
    assert_eq!((code, &same), (StatusCode::OK, &made), "claims that can't be read are passed over");
    let late = json!({"status": {"lastHeartbeatTime": "9999-12-31T23:59:59Z"}});
    server.call(Method::POST, NODES, Some(n())).await;
    let answer = server.call(Method::PATCH, &format!("{NODES}/n/status"), Some(late)).await;
    assert_eq!(refusal(&answer).3, ["status.lastHeartbeatTime"]);
}

#[tokio::test]
async fn defaults_of_the_schema_are_stored() {
    let server = support::start();
    let (_, created) = server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    assert_eq!(
        created["spec"],
        json!({
            "model": "tiny", "replicas": 1, "sharding": "Auto", "transport": "Auto", "nodes": {},
            "maxConcurrency": 16, "fastSynch": true
        })
    );
    let (_, read) = server.get(&format!("{INSTANCES}/a")).await;
    assert_eq!(read, created);
    let mut keys: Vec<_> = created["metadata"].as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "creationTimestamp",
            "generation",
            "managedFields",
            "name",
            "namespace",
            "resourceVersion",
            "uid"
        ]
    );
}

#[tokio::test]
async fn requests_that_make_no_sense_have_their_codes() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let a = &format!("{INSTANCES}/a");
    let get = Method::GET;
    for (method, path, code, reason) in [
        (&get, "/apis/exo.dev/v1alpha1/nothings", 404, "NotFound"),
        (&get, "/apis/exo.dev/v2/nodes", 404, "NotFound"),
        (&get, "/apis/other.dev", 404, "NotFound"),
        (&get, "/nonsense", 404, "NotFound"),
        (&get, "/apis/exo.dev/v1alpha1/namespaces/x/nodes", 404, "NotFound"),
        (&get, "/apis/exo.dev/v1alpha1/shards/a", 404, "NotFound"),
        (&get, &format!("{INSTANCES}/b"), 404, "NotFound"),
        (&get, &format!("{a}/scales"), 404, "NotFound"),
        (&Method::DELETE, &format!("{INSTANCES}/b"), 404, "NotFound"),
        (&Method::POST, a, 405, "MethodNotAllowed"),
        (&Method::PUT, INSTANCES, 405, "MethodNotAllowed"),
        (&Method::DELETE, &format!("{a}/status"), 405, "MethodNotAllowed"),
        (&Method::POST, "/apis/exo.dev/v1alpha1/shards", 405, "MethodNotAllowed"),
        (&Method::POST, "/apis", 405, "MethodNotAllowed"),
        (&Method::POST, "/api/v1/namespaces/default/pods/a/eviction", 404, "NotFound"),
        (&get, &format!("{INSTANCES}?fieldSelector=spec.replicas=x"), 400, "BadRequest"),
        (&get, &format!("{INSTANCES}?labelSelector=a+b"), 400, "BadRequest"),
        (&get, &format!("{INSTANCES}?limit=many"), 400, "BadRequest"),
        (&get, &format!("{INSTANCES}?continue=garbage"), 400, "BadRequest"),
        (&get, &format!("{INSTANCES}?watch=1&resourceVersion=x"), 400, "BadRequest"),
        (
            &get,
            &format!("{INSTANCES}?resourceVersion=7&resourceVersionMatch=Exact"),
            504,
            "Timeout",
        ),
        (&get, &format!("{INSTANCES}?sendInitialEvents=true"), 422, "Invalid"),
    ] {
        let answer = server.call(method.clone(), path, None).await;
        let (found, said, message, _) = refusal(&answer);
        assert_eq!((found, said), (code, reason), "{method} {path}: {message}");
    }
    assert_eq!(
        refusal(&server.get(&format!("{INSTANCES}/b")).await).2,
        "inferenceinstances.exo.dev \"b\" not found"
    );
}

#[tokio::test]
async fn media_types_and_sizes_are_checked() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let a = format!("{INSTANCES}/a");
    let send =
        async |method: Method, path: &str, content_type: &str, accept: &str, body: String| {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("content-type", content_type)
                .header("accept", accept)
                .body(Body::from(body))
                .unwrap();
            server.send(request).await.0.as_u16()
        };
    let json = "application/json";
    let strategic = "application/strategic-merge-patch+json";
    let yaml = "apiVersion: exo.dev/v1alpha1\nkind: InferenceInstance\n\
                metadata: {name: y}\nspec: {model: tiny}\n";
    assert_eq!(send(Method::PATCH, &a, strategic, json, "{}".into()).await, 415);
    assert_eq!(send(Method::POST, INSTANCES, "text/plain", json, "{}".into()).await, 415);
    assert_eq!(send(Method::GET, &a, json, "text/html", String::new()).await, 406);
    assert_eq!(send(Method::POST, INSTANCES, json, json, "{".into()).await, 400);
    assert_eq!(send(Method::POST, INSTANCES, "application/yaml", json, yaml.into()).await, 201);
    let unnamed = instance("unnamed").to_string();
    assert_eq!(send(Method::POST, INSTANCES, "", json, unnamed).await, 201, "as if not said");
    let merge = "application/merge-patch+json";
    assert_eq!(send(Method::PATCH, &a, merge, json, "[]".into()).await, 400);
    let json_patch = "application/json-patch+json";
    let fails = r#"[{"op": "test", "path": "/spec/model", "value": "other"}]"#;
    assert_eq!(send(Method::PATCH, &a, json_patch, json, fails.into()).await, 422);
    let absent = r#"[{"op": "test", "path": "/spec/seed", "value": null}]"#;
    assert_eq!(send(Method::PATCH, &a, json_patch, json, absent.into()).await, 200);
    let present = r#"[{"op": "test", "path": "/spec/model", "value": null}]"#;
    assert_eq!(send(Method::PATCH, &a, json_patch, json, present.into()).await, 422);
    let nowhere = r#"[{"op": "test", "path": "/other/seed", "value": null}]"#;
    assert_eq!(send(Method::PATCH, &a, json_patch, json, nowhere.into()).await, 422);
    let destroys = r#"[{"op": "replace", "path": "", "value": 5}]"#;
    assert_eq!(send(Method::PATCH, &a, json_patch, json, destroys.into()).await, 422);
    let mut doubles = vec![json!({"op": "add", "path": "/spec/environment", "value": {"a": "x"}})];
    for i in 0..60 {
        let path = format!("/spec/environment/k{i}");
        doubles.push(json!({"op": "copy", "from": "/spec/environment", "path": path}));
    }
    let doubles = Value::from(doubles).to_string();
    assert_eq!(send(Method::PATCH, &a, json_patch, json, doubles).await, 413);
    let huge = " ".repeat((3 << 20) + 1);
    assert_eq!(send(Method::POST, INSTANCES, json, json, huge).await, 413);
    let deep = "[".repeat(100_000);
    assert_eq!(send(Method::POST, INSTANCES, json, json, deep).await, 400);
}

/// Over HTTP/2 a client that is cut off while it sends never sees why.
#[tokio::test]
async fn bodies_that_are_too_large_are_read_to_their_end() {
    let server = support::start();
    let part = Bytes::from(vec![b' '; 1 << 20]);
    for (parts, is_read) in [(4, true), (100, false)] {
        let left = Arc::new(AtomicUsize::new(parts));
        let counted = Arc::clone(&left);
        let part = part.clone();
        let stream = futures::stream::repeat_with(move || {
            counted.fetch_sub(1, Ordering::Relaxed);
            Ok::<_, Infallible>(part.clone())
        });
        let body = Body::from_stream(stream.take(parts));
        let request = Request::post(INSTANCES).header("content-type", "application/json");
        let (code, _, _) = server.send(request.body(body).unwrap()).await;
        assert_eq!(code.as_u16(), 413);
        assert_eq!(left.load(Ordering::Relaxed) == 0, is_read, "{parts} MiB");
    }
}

#[tokio::test]
async fn deletions_of_many_leave_none() {
    let server = support::start();
    for n in 0..100 {
        let mut object = shard(&format!("s{n}"), "m", n);
        if n % 10 == 0 {
            object["metadata"]["finalizers"] = json!(["a.b/c"]);
        }
        server.call(Method::POST, SHARDS, Some(object)).await;
    }
    let (code, list) = server.call(Method::DELETE, SHARDS, None).await;
    assert_eq!((code.as_u16(), list["items"].as_array().unwrap().len()), (200, 100));
    let (_, left) = server.get(SHARDS).await;
    let left = left["items"].as_array().unwrap();
    assert_eq!(left.len(), 10, "their finalizers hold them");
    assert!(left.iter().all(|s| s["metadata"]["deletionTimestamp"].is_string()));
}

#[tokio::test]
async fn without_identity_only_health_and_version_answer() {
    let registry = prometheus::Registry::new();
    let server = ApiServer::new(Store::memory(), &exo_crds::all(), &registry).unwrap();
    let router = app(server);
    for (path, code) in [
        ("/healthz", 200),
        ("/livez", 200),
        ("/readyz", 200),
        ("/version", 200),
        ("/version/", 200),
        ("/apis", 401),
        ("/openapi/v3", 401),
        (NODES, 401),
        ("/nonsense", 401),
    ] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status().as_u16(), code, "{path}");
    }
}

#[tokio::test]
async fn updates_and_deletions_mind_their_preconditions() {
    let server = support::start();
    let (_, created) = server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let a = &format!("{INSTANCES}/a");
    let uid = created["metadata"]["uid"].clone();

    let blind = without(created.clone(), "/metadata", "resourceVersion");
    let answer = server.call(Method::PUT, a, Some(blind)).await;
    assert_eq!(refusal(&answer).3, ["metadata.resourceVersion"]);
    let absent = server.call(Method::PUT, &format!("{INSTANCES}/new"), Some(instance("new"))).await;
    let said = "inferenceinstances.exo.dev \"new\" not found";
    assert_eq!(refusal(&absent), (404, "NotFound", said, vec![]));
    let renamed = with(created.clone(), "/metadata", "name", json!("b"));
    assert_eq!(server.call(Method::PUT, a, Some(renamed)).await.0, 400);
    let other = with(created.clone(), "/metadata", "uid", json!("other"));
    assert_eq!(server.call(Method::PUT, a, Some(other)).await.0, 409);
    let made = created["metadata"]["creationTimestamp"].as_str().unwrap();
    for (time, code) in [
        (json!(made), 200),
        (json!(made.replace('Z', "+00:00")), 200),
        (json!(null), 200),
        (json!("2020-01-01T00:00:00Z"), 422),
        (json!("yesterday"), 422),
    ] {
        let patch = json!({"metadata": {"creationTimestamp": time}});
        let (found, body) = server.call(Method::PATCH, a, Some(patch)).await;
        assert_eq!(found.as_u16(), code, "{time}: {body}");
    }
    let stale = json!({"metadata": {"resourceVersion": "99"}, "spec": {"replicas": 3}});
    assert_eq!(server.call(Method::PATCH, a, Some(stale)).await.0, 409);

    let dry = format!("{a}?dryRun=All");
    let (code, body) =
        server.call(Method::PATCH, &dry, Some(json!({"spec": {"replicas": 3}}))).await;
    assert_eq!((code.as_u16(), &body["spec"]["replicas"]), (200, &json!(3)));
    assert_eq!(server.call(Method::DELETE, &dry, None).await.0, 200);
    let held = format!("{a}?dryRun=All&propagationPolicy=Foreground");
    let (code, body) = server.call(Method::DELETE, &held, None).await;
    assert_eq!(code, StatusCode::OK, "{body}");
    assert_eq!(body["metadata"]["finalizers"], json!(["foregroundDeletion"]), "it would wait");
    assert!(body["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(server.get(a).await.1, created, "it was only tried");

    let other = json!({"kind": "Scale", "apiVersion": "autoscaling/v1"});
    assert_eq!(server.call(Method::DELETE, a, Some(other)).await.0, 400);
    let wrong = json!({"preconditions": {"uid": "other"}});
    assert_eq!(server.call(Method::DELETE, a, Some(wrong)).await.0, 409);
    let policy = json!({"propagationPolicy": "Sideways"});
    assert_eq!(server.call(Method::DELETE, a, Some(policy)).await.0, 422);
    let right = json!({
        "kind": "DeleteOptions", "apiVersion": "exo.dev/v1alpha1", "preconditions": {"uid": uid},
        "propagationPolicy": "Background",
    });
    let (code, body) = server.call(Method::DELETE, a, Some(right)).await;
    assert_eq!(code, StatusCode::OK);
    assert_eq!(
        (&body["status"], &body["details"]["name"], &body["details"]["uid"]),
        (&json!("Success"), &json!("a"), &uid)
    );
}

#[tokio::test]
async fn objects_from_before_a_stricter_schema_stay_usable() {
    let server = support::start();
    let old = json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
        "metadata": {"name": "a", "namespace": "default", "uid": "u", "generation": 1,
                     "creationTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["exo.dev/x"]},
        "spec": {"model": "tiny", "replicas": -3, "gone": true}
    });
    let key = "/registry/exo.dev/inferenceinstances/default/a";
    server.store.txn(exo_store::Txn::create(key, old.to_string())).await.unwrap();
    let a = &format!("{INSTANCES}/a?fieldValidation=Strict");
    let status = json!({"status": {"phase": "Failed"}});
    let path = format!("{INSTANCES}/a/status?fieldValidation=Strict");
    let (code, body) = server.call(Method::PATCH, &path, Some(status)).await;
    assert_eq!((code.as_u16(), &body["status"]["phase"]), (200, &json!("Failed")), "{body}");
    let worse = json!({"spec": {"replicas": -4}});
    let answer = server.call(Method::PATCH, a, Some(worse)).await;
    assert_eq!(refusal(&answer).3, ["spec.replicas"]);
    server.call(Method::DELETE, &format!("{INSTANCES}/a"), None).await;
    let free = json!({"metadata": {"finalizers": null}});
    assert_eq!(server.call(Method::PATCH, a, Some(free)).await.0, 200);
    assert_eq!(server.get(a).await.0, 404);
}

#[tokio::test]
async fn generated_names_are_unique() {
    let server = support::start();
    let mut object = without(instance("x"), "/metadata", "name");
    object["metadata"]["generateName"] = json!("run-");
    let mut names = Vec::new();
    for _ in 0..5 {
        let (code, body) = server.call(Method::POST, INSTANCES, Some(object.clone())).await;
        assert_eq!(code, StatusCode::CREATED, "{body}");
        names.push(body["metadata"]["name"].as_str().unwrap().to_owned());
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 5);
    assert!(names.iter().all(|n| n.starts_with("run-") && n.len() == 9), "{names:?}");
}

#[tokio::test]
async fn discovery_lists_what_is_served() {
    let server = support::start();
    assert_eq!(server.get("/api").await.1["versions"], json!(["v1"]));
    let (_, groups) = server.get("/apis").await;
    let preferred: Vec<_> = groups["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|group| group["preferredVersion"]["groupVersion"].as_str().unwrap())
        .collect();
    assert_eq!(
        preferred,
        [
            "apiextensions.k8s.io/v1",
            "authentication.k8s.io/v1",
            "authorization.k8s.io/v1",
            "coordination.k8s.io/v1",
            "events.k8s.io/v1",
            "exo.dev/v1alpha1"
        ]
    );
    let (_, group) = server.get("/apis/exo.dev").await;
    assert_eq!((&group["kind"], &group["name"]), (&json!("APIGroup"), &json!("exo.dev")));
    let (_, list) = server.get("/apis/exo.dev/v1alpha1").await;
    let names: Vec<_> = list["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| format!("{}:{}:{}", r["name"], r["kind"], r["namespaced"]).replace('"', ""))
        .collect();
    for expect in [
        "nodes:Node:false",
        "nodes/status:Node:false",
        "models:Model:false",
        "inferenceinstances:InferenceInstance:true",
        "shards:Shard:true",
        "shards/status:Shard:true",
        "inferenceinstances/scale:Scale:true",
    ] {
        assert!(names.iter().any(|n| n == expect), "{expect} in {names:?}");
    }
    let (_, old) = server.get("/openapi/v2").await;
    assert_eq!(old["swagger"], "2.0");
    let schema = &old["definitions"]["dev.exo.v1alpha1.Shard"];
    assert_eq!(schema["properties"]["spec"]["properties"]["rank"]["type"], "integer");
    let reference = &schema["properties"]["metadata"]["allOf"][0]["$ref"];
    assert_eq!(reference, "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta");
    let (_, index) = server.get("/openapi/v3").await;
    let url = &index["paths"]["apis/exo.dev/v1alpha1"]["serverRelativeURL"];
    let (_, document) = server.get(url.as_str().unwrap()).await;
    let schema = &document["components"]["schemas"]["dev.exo.v1alpha1.Shard"];
    assert_eq!(schema["properties"]["spec"]["properties"]["rank"]["type"], "integer");
}

#[tokio::test]
async fn declared_fields_select() {
    let server = support::start();
    for (name, model) in [("a", "tiny"), ("b", "large")] {
        let object = with(instance(name), "/spec", "model", json!(model));
        server.call(Method::POST, INSTANCES, Some(object)).await;
        server.call(Method::POST, SHARDS, Some(shard(name, &format!("m-{name}"), 0))).await;
        server.call(Method::POST, NODES, Some(node(name))).await;
    }
    let cordon = json!({"spec": {"unschedulable": true}});
    server.call(Method::PATCH, &format!("{NODES}/b"), Some(cordon)).await;
    for kind in [INSTANCES, SHARDS] {
        let ready = json!({"status": {"phase": "Ready"}});
        let (code, body) =
            server.call(Method::PATCH, &format!("{kind}/b/status"), Some(ready)).await;
        assert_eq!(code, StatusCode::OK, "{body}");
    }
    for (path, selector, expect) in [
        (INSTANCES, "spec.model=tiny", "a"),
        (INSTANCES, "spec.model!=tiny", "b"),
        (INSTANCES, "status.phase=Ready", "b"),
        (INSTANCES, "status.phase!=Ready", "a"),
        (SHARDS, "spec.node=m-a", "a"),
        (SHARDS, "spec.nodeName=m-b", "b"),
        (SHARDS, "status.phase=Ready", "b"),
        (NODES, "spec.unschedulable=true", "b"),
        (NODES, "spec.unschedulable!=true", "a"),
        (NODES, "spec.unschedulable=false", "a"),
        (NODES, "spec.unschedulable!=false", "b"),
    ] {
        let (_, list) = server.get(&format!("{path}?fieldSelector={selector}")).await;
        let items = list["items"].as_array().unwrap_or_else(|| panic!("{selector}: {list}"));
        let names: Vec<_> = items.iter().map(|i| i["metadata"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, [expect], "{selector}");
    }
    // Where nothing has a node, there is none to select by.
    let answer = server.get(&format!("{INSTANCES}?fieldSelector=spec.nodeName=m")).await;
    assert!(refusal(&answer).2.contains("not supported: spec.nodeName"), "{}", answer.1);
}

/// Paths of the fields below a schema that nothing is said of.
fn undescribed(schema: &Value, path: &str, found: &mut Vec<String>) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(str::is_empty) {
            found.push(path.clone());
        }
        undescribed(field, &path, found);
        undescribed(&field["items"], &path, found);
    }
}

#[tokio::test]
async fn kubernetes_own_types_are_described() {
    let server = support::start();
    let mut found = Vec::new();
    let mut kinds = Vec::new();
    for path in [
        "api/v1",
        "apis/coordination.k8s.io/v1",
        "apis/events.k8s.io/v1",
        "apis/apiextensions.k8s.io/v1",
    ] {
        let (_, document) = server.get(&format!("/openapi/v3/{path}")).await;
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            if name.ends_with("List") {
                continue;
            }
            assert!(schema["description"].is_string(), "{name}");
            kinds.extend(name.rsplit('.').next().map(str::to_owned));
            undescribed(schema, name, &mut found);
        }
    }
    assert!(found.is_empty(), "{found:?}");
    for kind in ["Namespace", "Secret", "Event", "Lease", "CustomResourceDefinition"] {
        assert!(kinds.iter().any(|k| k == kind), "{kind} in {kinds:?}");
    }
}

/// The cells of a Table, as rows of text.
fn rows(table: &Value) -> Vec<String> {
    let rows = table["rows"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let cells = row["cells"].as_array().unwrap().iter();
            let cells = cells.map(|c| c.as_str().map_or_else(|| c.to_string(), str::to_owned));
            cells.collect::<Vec<_>>().join(" | ")
        })
        .collect()
}

#[tokio::test]
async fn tables_have_the_printer_columns() {
    let server = support::start();
    for (name, node, rank) in [("llama-0-a1-0", "studio-1", 0), ("llama-0-a1-1", "studio-2", 1)] {
        server.call(Method::POST, SHARDS, Some(shard(name, node, rank))).await;
    }
    let status = json!({"status": {
        "phase": "Ready", "progress": "100%", "memory": "19Gi",
        "failure": {"reason": "R", "message": "the message", "permanent": false}
    }});
    server.call(Method::PATCH, &format!("{SHARDS}/llama-0-a1-0/status"), Some(status)).await;
    let as_table = |path: String| {
        Request::get(path)
            .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")
            .body(Body::empty())
            .unwrap()
    };
    let (_, _, table) = server.send(as_table(SHARDS.to_owned())).await;
    let columns = table["columnDefinitions"].as_array().unwrap();
    let names: Vec<_> = columns
        .iter()
        .map(|c| format!("{}:{}", c["name"].as_str().unwrap(), c["priority"]))
        .collect();
    assert_eq!(
        names.join(" "),
        "Name:0 Instance:0 Rank:0 Node:0 Layers:0 Sharding:0 Backend:0 Phase:0 Progress:0 \
         Memory:0 Error:1 Age:0"
    );
    let rows: Vec<_> = rows(&table)
        .into_iter()
        // The age depends on the second in which the test runs.
        .map(|row| row.rsplit_once(" | ").unwrap().0.to_owned())
        .collect();
    assert_eq!(
        rows,
        [
            "llama-0-a1-0 | llama | 0 | studio-1 | 0-39 | Pipeline | jaccl | Ready | 100% | 19Gi \
             | the message",
            "llama-0-a1-1 | llama | 1 | studio-2 | 40-79 | Pipeline | jaccl | null | null | null \
             | null"
        ]
    );
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(table["metadata"]["resourceVersion"], server.store.revision().to_string());

    let condition = json!({"status": {"conditions": [
        {"type": "Placed", "status": "True", "reason": "R", "message": "no",
         "lastTransitionTime": "2026-01-01T00:00:00Z"},
        {"type": "Ready", "status": "False", "reason": "R", "message": "not yet",
         "lastTransitionTime": "2026-01-01T00:00:00Z"}
    ]}});
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let answer =
        server.call(Method::PATCH, &format!("{INSTANCES}/a/status"), Some(condition)).await;
    assert_eq!(answer.0, StatusCode::OK, "{}", answer.1);
    let (_, _, table) = server.send(as_table(format!("{INSTANCES}/a"))).await;
    let columns = table["columnDefinitions"].as_array().unwrap();
    let message = columns.iter().position(|c| c["name"] == "Message").unwrap();
    assert_eq!(table["rows"][0]["cells"][message], "not yet");
}

#[tokio::test]
async fn metadata_alone_can_be_asked_for() {
    let server = support::start();
    server.call(Method::POST, NODES, Some(node("a"))).await;
    let request = Request::get(NODES)
        .header("accept", "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io")
        .body(Body::empty())
        .unwrap();
    let (_, _, list) = server.send(request).await;
    assert_eq!(list["kind"], "PartialObjectMetadataList");
    assert_eq!(list["items"][0]["metadata"]["name"], "a");
    assert_eq!(list["items"][0].get("spec"), None);
}

#[tokio::test]
async fn requests_are_counted_by_verb_resource_and_code() {
    let server = support::start();
    server.get(NODES).await;
    server.get(&format!("{NODES}/absent")).await;
    server.get("/apis/exo.dev/v1alpha1/made-up").await;
    let text = prometheus::TextEncoder::new().encode_to_string(&server.registry.gather()).unwrap();
    let count = "apiserver_request_duration_seconds_count";
    for line in [
        format!("{count}{{code=\"200\",resource=\"nodes\",verb=\"LIST\"}} 1"),
        format!("{count}{{code=\"404\",resource=\"nodes\",verb=\"GET\"}} 1"),
    ] {
        assert!(text.contains(&line), "{line} in {text}");
    }
    assert!(!text.contains("made-up"), "{text}");
}
