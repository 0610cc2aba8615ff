//! No request, however odd, makes the server fail.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use axum::{body::Body, http::Request};
use proptest::prelude::*;
use serde_json::{Value, json};

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
        3 => prop::sample::select(vec![
            support::INSTANCES.to_owned(),
            format!("{}/a", support::INSTANCES),
            format!("{}/a/status", support::INSTANCES),
            support::NODES.to_owned(),
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
        "other",
    ]);
    let value = prop_oneof![
        Just("0".to_owned()),
        Just("99999999999999999999".to_owned()),
        Just("All".to_owned()),
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

/// A good object with some of its fields replaced, or anything.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let field = prop::sample::select(vec!["metadata", "spec", "status", "kind", "apiVersion"]);
    prop_oneof![
        4 => (field, value()).prop_map(|(field, value)| {
            let mut object = support::instance("a");
            object[field] = value;
            object.to_string().into_bytes()
        }),
        2 => value().prop_map(|v| v.to_string().into_bytes()),
        1 => prop::collection::vec(value(), 0..3).prop_map(|v| json!(v).to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn odd_requests_get_an_answer(
        method in prop::sample::select(vec!["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "X"]),
        path in path(),
        query in query(),
        content_type in prop::sample::select(vec![
            "application/json", "application/yaml", "application/merge-patch+json",
            "application/json-patch+json", "nonsense",
        ]),
        accept in prop::sample::select(vec![
            "application/json", "*/*", "application/json;as=Table;v=v1;g=meta.k8s.io", "a;=,;",
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
        let (status, answer) = runtime.block_on(async {
            let server = support::start();
            server.call(http::Method::POST, support::INSTANCES, Some(support::instance("a"))).await;
            let (status, _, answer) = server.send(request).await;
            (status, answer)
        });
        prop_assert!(status.as_u16() < 500, "{status} {answer}");
        if status.as_u16() >= 400 && method != "HEAD" {
            prop_assert_eq!(&answer["kind"], "Status");
        }
    }
}
