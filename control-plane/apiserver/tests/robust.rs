//! No request, however odd, makes the server fail.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use axum::{body::Body, http::Request};
use proptest::prelude::*;
use serde_json::{Value, json};
use tower::ServiceExt as _;

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

/// Everything that is stored can be read and is valid: writing it back as it is changes nothing.
async fn check_stored(server: &support::Server) -> Result<(), TestCaseError> {
    for collection in [support::INSTANCES, support::NODES, support::SHARDS, SECRETS, EVENTS, LEASES]
    {
        let (status, list) = server.get(collection).await;
        prop_assert_eq!(status.as_u16(), 200, "{}", list);
        for item in list["items"].as_array().into_iter().flatten() {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]
    #[test]
    fn odd_requests_get_an_answer(
        method in prop::sample::select(vec![
            "GET", "POST", "POST", "PUT", "PATCH", "PATCH", "DELETE", "HEAD", "OPTIONS", "X",
        ]),
        path in path(),
        query in query(),
        content_type in prop::sample::select(vec![
            "application/json", "application/yaml", "application/merge-patch+json",
            "application/json-patch+json", "application/strategic-merge-patch+json",
            "application/apply-patch+yaml", "application/vnd.kubernetes.protobuf", "nonsense",
        ]),
        accept in prop::sample::select(vec![
            "application/json", "*/*", "application/json;as=Table;v=v1;g=meta.k8s.io", "a;=,;",
            "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io",
        ]),
        body in body(),
    ) {
        let request = Request::builder()
            .method(method)
            .uri(format!("{path}?{query}"))
            .header("content-type", content_type)
            .header("accept", accept)
            .body(Body::from(body));
        // What isn't HTTP at all doesn't reach the server.
        let Ok(request) = request else { return Ok(()) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = support::start();
            server.call(http::Method::POST, support::INSTANCES, Some(support::instance("a"))).await;
            let before = server.store.revision();
            if query.contains("watch=") {
                // Its body may go on for half an hour.
                let status = server.router.clone().oneshot(request).await.unwrap().status();
                prop_assert!(status.as_u16() < 500, "{}", status);
                return Ok(());
            }
            let (status, _, answer) = server.send(request).await;
            // 504 is Kubernetes' own word for a version that is not there yet.
            let is_future = answer["reason"] == "Timeout";
            prop_assert!(status.as_u16() < 500 || is_future, "{status} {answer}");
            if status.as_u16() >= 400 {
                if method != "HEAD" {
                    prop_assert_eq!(&answer["kind"], "Status");
                }
                prop_assert_eq!(server.store.revision(), before, "refused and yet written");
            }
            check_stored(&server).await
        })?;
    }
}

/// More of them on demand: `EXO_FUZZ_CASES=100000`.
fn cases() -> u32 {
    let wanted = std::env::var("EXO_FUZZ_CASES").ok();
    wanted.and_then(|cases| cases.parse().ok()).unwrap_or(150)
}
