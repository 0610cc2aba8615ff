//! No request, however odd, makes the server fail.
//!
//! How long, and from which seed: see `exo_test_support::fuzz`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use axum::{body::Body, http::Request};
use exo_crds::{InferenceInstance, Model, Node, Shard};
use exo_store::{Entry, ListQuery, Txn};
use exo_test_support::fuzz;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{self, Namespace, Secret},
    events::v1 as events,
};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tower::ServiceExt as _;

/// Inputs of an ordinary run.
const INPUTS: u64 = 400;
/// For one request; a debug build on a busy machine takes far less.
const TIME_LIMIT: Duration = Duration::from_secs(10);

const MODELS: &str = "/apis/exo.dev/v1alpha1/models";
const NAMESPACES: &str = "/api/v1/namespaces";
const CORE_EVENTS: &str = "/api/v1/namespaces/default/events";
const SECRETS: &str = "/api/v1/namespaces/default/secrets";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/default/leases";

fn segment() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec![
            "api", "apis", "v1", "exo.dev", "v1alpha1", "namespaces", "default", "nodes", "shards",
            "inferenceinstances", "status", "scale", "a", "openapi", "v3", "", "%2F", "%zz", "..",
        ]).prop_map(str::to_owned),
        1 => "[a-zA-Z0-9%._~!$&'()*+,;=:@-]{0,12}",
    ]
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec![
            support::INSTANCES.to_owned(),
            format!("{}/a", support::INSTANCES),
            format!("{}/a/status", support::INSTANCES),
            format!("{}/a/scale", support::INSTANCES),
            support::NODES.to_owned(),
            support::SHARDS.to_owned(),
            "/api/v1/namespaces".to_owned(),
            "/api/v1/namespaces/default".to_owned(),
            format!("{SECRETS}/s"),
            SECRETS.to_owned(),
            EVENTS.to_owned(),
            LEASES.to_owned(),
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews".to_owned(),
        ]),
        1 => prop::collection::vec(segment(), 0..9).prop_map(|s| format!("/{}", s.join("/"))),
    ]
}

fn query() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "limit",
        "continue",
        "labelSelector",
        "fieldSelector",
        "resourceVersion",
        "resourceVersionMatch",
        "fieldValidation",
        "dryRun",
        "propagationPolicy",
        "fieldManager",
        "force",
        "watch",
        "sendInitialEvents",
        "allowWatchBookmarks",
        "timeoutSeconds",
        "includeObject",
        "other",
    ]);
    let value = prop_oneof![
        Just("0".to_owned()),
        Just("99999999999999999999".to_owned()),
        Just("All".to_owned()),
        Just("true".to_owned()),
        Just("Exact".to_owned()),
        Just("Strict".to_owned()),
        Just("eyJyIjoxfQ".to_owned()),
        Just("a+in+(b,c)".to_owned()),
        Just("metadata.name%3Da".to_owned()),
        "[a-z=!,()%0-9.+-]{0,12}",
    ];
    prop::collection::vec((name, value), 0..4).prop_map(|pairs| {
        let pairs = pairs.into_iter().map(|(n, v)| format!("{n}={v}"));
        pairs.collect::<Vec<_>>().join("&")
    })
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let key = prop_oneof![
            prop::sample::select(vec![
                "metadata",
                "name",
                "labels",
                "annotations",
                "finalizers",
                "ownerReferences",
                "spec",
                "status",
                "model",
                "nodes",
                "min",
                "environment",
                "conditions",
                "uid",
                "resourceVersion",
                "deletionTimestamp",
                "generateName",
                "op",
                "path",
                "value",
                "from",
                "data",
                "stringData",
                "type",
                "holderIdentity",
                "regarding",
                "source",
                "repo",
                "managedFields",
                "fieldsV1",
                "replicas",
                "$patch",
                "kind",
                "apiVersion",
            ])
            .prop_map(str::to_owned),
            "[a-z/~]{0,4}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A good object with some of its fields replaced, or anything, in JSON or as a protocol buffer.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let field = prop::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "kind",
        "apiVersion",
        "data",
        "regarding",
        "type",
    ]);
    let object = prop::sample::select(vec![
        support::instance("a"),
        support::node("n"),
        support::shard("s", "n", 0),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}}),
        json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}}),
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}}),
        json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "a"}}),
    ]);
    prop_oneof![
        6 => (object, field, value()).prop_map(|(mut object, field, value)| {
            object[field] = value;
            object.to_string().into_bytes()
        }),
        1 => prop::collection::vec(any::<u8>(), 0..64)
            .prop_map(|bytes| [b"k8s\0\x0a\x0c\x0a\x02v1\x12\x06Secret\x12", &bytes[..]].concat()),
        2 => value().prop_map(|v| v.to_string().into_bytes()),
        1 => prop::collection::vec(value(), 0..3).prop_map(|v| json!(v).to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ]
}

/// One request, as it is sent.
#[derive(Clone, Debug)]
struct Sent {
    method: &'static str,
    path: String,
    query: String,
    content_type: &'static str,
    accept: &'static str,
    body: Vec<u8>,
}

/// Anything to anywhere: most of it is refused at once.
fn wild() -> impl Strategy<Value = Sent> {
    let method = prop::sample::select(vec![
        "GET", "POST", "POST", "PUT", "PATCH", "PATCH", "DELETE", "HEAD", "OPTIONS", "X",
    ]);
    let content_type = prop::sample::select(vec![
        "application/json",
        "application/yaml",
        "application/merge-patch+json",
        "application/json-patch+json",
        "application/strategic-merge-patch+json",
        "application/apply-patch+yaml",
        "application/vnd.kubernetes.protobuf",
        "nonsense",
    ]);
    let accept = prop::sample::select(vec![
        "application/json",
        "*/*",
        "application/json;as=Table;v=v1;g=meta.k8s.io",
        "a;=,;",
        "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io",
    ]);
    (method, path(), query(), content_type, accept, body()).prop_map(
        |(method, path, query, content_type, accept, body)| Sent {
            method,
            path,
            query,
            content_type,
            accept,
            body,
        },
    )
}

/// Operations on fields that there are, or could be.
fn operations() -> impl Strategy<Value = Value> {
    let path = || {
        prop::sample::select(vec![
            "",
            "/spec",
            "/spec/model",
            "/spec/environment",
            "/spec/environment/a",
            "/spec/nodes/min",
            "/metadata",
            "/metadata/labels",
            "/metadata/labels/a~1b",
            "/metadata/finalizers",
            "/metadata/finalizers/-",
            "/metadata/managedFields/0",
            "/metadata/ownerReferences/0/uid",
            "/status",
            "/kind",
            "/data",
            "nothing",
        ])
    };
    let op = prop::sample::select(vec!["add", "remove", "replace", "move", "copy", "test", "x"]);
    let operation = (op, path(), path(), value()).prop_map(
        |(op, path, from, value)| json!({"op": op, "path": path, "from": from, "value": value}),
    );
    prop::collection::vec(operation, 0..5).prop_map(Value::from)
}

/// What is odd for numbers, times, quantities and the like.
fn telling() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        Value::Null,
        json!(true),
        json!(1),
        json!(2.0),
        json!(-0.0),
        json!(0.5),
        json!(-1),
        json!(4_294_967_296_u64),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e19),
        json!(1e300),
        json!(""),
        json!("Ready"),
        json!("2026-01-01T00:00:00Z"),
        json!("2026-01-01t00:00:00.123456789+23:59"),
        json!("2026-12-31T23:59:60Z"),
        json!("0000-01-01T00:00:00Z"),
        json!("9999-12-31T23:59:59Z"),
        json!("0-39"),
        json!("5-3"),
        json!("01-2"),
        json!("0-4294967295"),
        json!("1.5Gi"),
        json!("9999999999999999999.999"),
        json!("99999999999999999999Gi"),
        json!({}),
        json!([]),
    ])
}

/// A field, and what a client might take for its value.
fn change() -> impl Strategy<Value = (&'static str, Value)> {
    let field = prop::sample::select(vec![
        "/metadata",
        "/metadata/generateName",
        "/metadata/labels",
        "/metadata/annotations/a",
        "/metadata/finalizers",
        "/metadata/ownerReferences",
        "/metadata/managedFields",
        "/metadata/resourceVersion",
        "/spec",
        "/spec/nodes",
        "/spec/environment",
        "/spec/environment/a",
        "/spec/replicas",
        "/spec/contextLength",
        "/spec/maxConcurrency",
        "/spec/seed",
        "/spec/memoryReserve",
        "/spec/layers",
        "/spec/rank",
        "/spec/epoch",
        "/spec/model/layers",
        "/spec/source",
        "/spec/architecture/heads",
        "/spec/weights/layer",
        "/spec/quantization",
        "/spec/holderIdentity",
        "/spec/leaseDurationSeconds",
        "/spec/renewTime",
        "/status",
        "/status/phase",
        "/status/memory",
        "/status/memoryBytes",
        "/status/observedGeneration",
        "/status/lastHeartbeatTime",
        "/status/replicas",
        "/data",
        "/data/a",
        "/stringData",
        "/immutable",
        "/regarding",
        "/deprecatedCount",
        "/eventTime",
        "/series/count",
        "/propagationPolicy",
        "/preconditions",
    ]);
    let condition = telling().prop_map(|odd| {
        let condition = json!({
            "type": "Ready", "status": "True", "reason": "R", "message": "m",
            "lastTransitionTime": odd, "observedGeneration": odd,
        });
        ("/status/conditions", json!([condition]))
    });
    let owner = telling().prop_map(|odd| {
        let owner = json!({
            "apiVersion": "v1", "kind": "Secret", "name": "s", "uid": "u", "controller": odd,
        });
        ("/metadata/ownerReferences", json!([owner]))
    });
    let manager = telling().prop_map(|odd| {
        let entry = json!({
            "manager": "m", "operation": "Update", "apiVersion": "v1", "time": odd,
            "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}},
        });
        ("/metadata/managedFields", json!([entry]))
    });
    prop_oneof![
        4 => (field.clone(), telling()),
        4 => (field, value()),
        1 => condition,
        1 => owner,
        1 => manager,
    ]
}

fn model() -> Value {
    json!({
        "apiVersion": "exo.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"},
        "spec": {
            "source": {"path": "m"}, "weights": {"layer": 1, "embedding": 1, "head": 1},
            "architecture": {
                "modelType": "llama", "layers": 1, "hiddenSize": 1, "heads": 1, "kvHeads": 1,
                "headDim": 1, "vocabSize": 1, "contextLength": 1,
            },
        },
    })
}

/// What clients send, but for a field or two.
fn aimed() -> impl Strategy<Value = Sent> {
    let place = prop::sample::select(vec![
        (MODELS, model()),
        (support::INSTANCES, support::instance("a")),
        (support::INSTANCES, support::instance("b")),
        (support::NODES, support::node("n")),
        (support::SHARDS, support::shard("s", "n", 0)),
        (SECRETS, json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}})),
        (
            NAMESPACES,
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}),
        ),
        (
            EVENTS,
            json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}}),
        ),
        (
            LEASES,
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}
            }),
        ),
    ]);
    let action = prop::sample::select(vec![
        "create", "create", "update", "merge", "merge", "json", "json", "apply", "apply", "delete",
        "get", "list",
    ]);
    let subresource = prop::sample::select(vec!["", "", "", "/status", "/scale"]);
    let query = prop_oneof![2 => Just(String::new()), 1 => query()];
    let changes = prop::collection::vec(change(), 0..3);
    (place, action, subresource, changes, operations(), query).prop_map(
        |((collection, mut object), action, subresource, changes, operations, mut query)| {
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            let path = format!("{collection}/{name}{subresource}");
            for (field, value) in changes {
                put(&mut object, field, value);
            }
            let (method, path, content_type, body) = match action {
                "create" => ("POST", collection.to_owned(), "application/json", object),
                "update" => ("PUT", path, "application/json", object),
                "merge" => ("PATCH", path, "application/merge-patch+json", object),
                "json" => ("PATCH", path, "application/json-patch+json", operations),
                "apply" => {
                    query = format!("fieldManager=m&{query}");
                    ("PATCH", path, "application/apply-patch+yaml", object)
                }
                "delete" => ("DELETE", path, "application/json", json!({})),
                "get" => ("GET", path, "application/json", Value::Null),
                _ => ("GET", collection.to_owned(), "application/json", Value::Null),
            };
            let accept = "application/json";
            let body = body.to_string().into_bytes();
            Sent { method, path, query, content_type, accept, body }
        },
    )
}

/// Makes the map on the way.
fn put(object: &mut Value, pointer: &str, value: Value) {
    let mut place = object;
    for field in pointer.split('/').skip(1) {
        if !place.is_object() {
            *place = json!({});
        }
        place = &mut place[field];
    }
    *place = value;
}

fn sent() -> impl Strategy<Value = Sent> {
    prop_oneof![1 => wild(), 3 => aimed()]
}

/// A server that is set back to where it began after each input: to make a new one takes longer
/// than all the rest.
struct Bench {
    server: support::Server,
    runtime: tokio::runtime::Runtime,
    beginning: BTreeMap<String, Entry>,
    /// How often each method was answered with each code.
    codes: RefCell<BTreeMap<String, u64>>,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = support::start();
        runtime.block_on(async {
            // What the server itself makes, and one object.
            server.get("/api/v1/namespaces").await;
            let made =
                server.call(http::Method::POST, support::INSTANCES, Some(support::instance("a")));
            assert_eq!(made.await.0.as_u16(), 201);
        });
        let beginning = entries(&server);
        Self { server, runtime, beginning, codes: RefCell::default() }
    }

    fn reset(&self) {
        self.runtime.block_on(async {
            let now = entries(&self.server);
            for (key, entry) in &now {
                let txn = match self.beginning.get(key) {
                    Some(first) if first.value == entry.value => continue,
                    Some(first) => {
                        Txn::replace(key.as_str(), entry.mod_revision, first.value.to_string())
                    }
                    None => Txn::delete(key.as_str(), entry.mod_revision),
                };
                self.server.store.txn(txn).await.unwrap();
            }
            for (key, first) in self.beginning.iter().filter(|(key, _)| !now.contains_key(*key)) {
                let txn = Txn::create(key.as_str(), first.value.to_string());
                self.server.store.txn(txn).await.unwrap();
            }
        });
    }

    /// Sends the requests one after the other, and looks at what is stored then.
    fn check(&self, requests: &[Sent]) -> Result<(), TestCaseError> {
        self.reset();
        self.runtime.block_on(async {
            for request in requests {
                let began = Instant::now();
                self.send(request).await?;
                prop_assert!(began.elapsed() < TIME_LIMIT, "it took {:?}", began.elapsed());
            }
            check_stored(&self.server).await
        })
    }

    /// What replaces an object names the version that is there, in most cases.
    async fn body(&self, sent: &Sent) -> Vec<u8> {
        let wanted: Option<Value> = serde_json::from_slice(&sent.body).ok();
        match wanted {
            Some(mut wanted)
                if sent.method == "PUT"
                    && wanted["metadata"].is_object()
                    && sent.path.parse::<http::Uri>().is_ok() =>
            {
                let (_, current) = self.server.get(&sent.path).await;
                let version = &current["metadata"]["resourceVersion"];
                if version.is_string() && wanted["metadata"].get("resourceVersion").is_none() {
                    wanted["metadata"]["resourceVersion"] = version.clone();
                }
                wanted.to_string().into_bytes()
            }
            _ => sent.body.clone(),
        }
    }

    async fn send(&self, sent: &Sent) -> Result<(), TestCaseError> {
        let request = Request::builder()
            .method(sent.method)
            .uri(format!("{}?{}", sent.path, sent.query))
            .header("content-type", sent.content_type)
            .header("accept", sent.accept)
            .body(Body::from(self.body(sent).await));
        // What isn't HTTP at all doesn't reach the server.
        let Ok(request) = request else { return Ok(()) };
        let before = self.server.store.revision();
        let count = |code: u16| {
            *self.codes.borrow_mut().entry(format!("{} {code}", sent.method)).or_default() += 1;
        };
        if sent.query.contains("watch=") {
            // Its body may go on for half an hour.
            let answer = self.server.router.clone().oneshot(request).await.unwrap();
            let code = answer.status().as_u16();
            count(code);
            prop_assert!(code < 500 || code == 504, "{}", code);
            return Ok(());
        }
        let (status, _, answer) = self.server.send(request).await;
        let code = status.as_u16();
        count(code);
        // 504 is Kubernetes' own word for a version that is not there yet.
        let is_future = answer["reason"] == "Timeout";
        prop_assert!(code < 500 || is_future, "{} {}", code, answer);
        if code >= 400 {
            if sent.method != "HEAD" {
                prop_assert_eq!(&answer["kind"], "Status");
            }
            prop_assert_eq!(self.server.store.revision(), before, "refused and yet written");
        }
        Ok(())
    }
}

fn entries(server: &support::Server) -> BTreeMap<String, Entry> {
    let listing = server.store.list_local(&ListQuery::default()).unwrap();
    listing.entries.into_iter().map(|entry| (entry.key.to_string(), entry)).collect()
}

type Reader = fn(&Value) -> Result<(), serde_json::Error>;

/// Collections, and how clients read their objects.
const READERS: [(&str, Reader); 9] = [
    (support::INSTANCES, reads::<InferenceInstance>),
    (support::NODES, reads::<Node>),
    (support::SHARDS, reads::<Shard>),
    (MODELS, reads::<Model>),
    (SECRETS, reads::<Secret>),
    (EVENTS, reads::<events::Event>),
    (CORE_EVENTS, reads::<v1::Event>),
    (LEASES, reads::<Lease>),
    (NAMESPACES, reads::<Namespace>),
];

fn reads<T: DeserializeOwned>(object: &Value) -> Result<(), serde_json::Error> {
    T::deserialize(object).map(drop)
}

/// Everything that is stored can be read and is valid: writing it back as it is changes nothing.
async fn check_stored(server: &support::Server) -> Result<(), TestCaseError> {
    for (collection, read) in READERS {
        let (status, list) = server.get(collection).await;
        prop_assert_eq!(status.as_u16(), 200, "{}", list);
        for item in list["items"].as_array().into_iter().flatten() {
            // Who lists objects of a type can read none if there is one that it can't read.
            let problem = read(item).err();
            prop_assert!(problem.is_none(), "{:?} reading {}", problem, item);
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            let path = format!("{collection}/{name}");
            let (status, answer) = server.call(http::Method::PUT, &path, Some(item.clone())).await;
            prop_assert_eq!(status.as_u16(), 200, "{}: {}", item, answer);
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            prop_assert_eq!(version(&answer), version(item), "{} and {}", item, answer);
        }
    }
    Ok(())
}

#[test]
fn odd_requests_get_an_answer() {
    let bench = Bench::new();
    let inputs = prop::collection::vec(sent(), 1..5);
    let mut seeds = fuzz::Seeds::new(INPUTS);
    for seed in seeds.by_ref() {
        fuzz::check(&inputs, seed, |requests| bench.check(&requests));
    }
    println!("{seeds}: {:?}", bench.codes.borrow());
}
