//! Fields that are unknown, or given twice: refused, warned of or passed over, as the client wants.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use axum::{
    body::Body,
    http::{Method, Request, StatusCode},
};
use serde_json::{Value, json};
use support::{INSTANCES, instance};

const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const MERGE: &str = "application/merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";

/// Code, warnings and answer.
async fn send(
    server: &support::Server,
    (method, path): (Method, &str),
    content_type: &str,
    body: &str,
) -> (u16, Vec<String>, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content_type)
        .body(Body::from(body.to_owned()))
        .unwrap();
    let (code, headers, answer) = server.send(request).await;
    let warnings = headers.get_all("warning").iter().map(|w| w.to_str().unwrap().to_owned());
    (code.as_u16(), warnings.collect(), answer)
}

#[tokio::test]
async fn unknown_fields_are_pruned_with_a_warning_unless_ignored() {
    let server = support::start();
    let mut unknown = instance("a");
    unknown["spec"]["modle"] = json!(1);
    let post = (Method::POST, INSTANCES);
    let (code, warnings, object) = send(&server, post, JSON, &unknown.to_string()).await;
    assert_eq!((code, object["spec"].get("modle")), (201, None));
    assert_eq!(warnings, ["299 - \"unknown field \\\"spec.modle\\\"\""]);
    unknown["metadata"]["name"] = json!("b");
    let path = format!("{INSTANCES}?fieldValidation=Ignore");
    let ignored = send(&server, (Method::POST, &path), JSON, &unknown.to_string()).await;
    assert_eq!((ignored.0, ignored.1.len()), (201, 0));
}

const TWICE: &str = r#"{"apiVersion": "exo.dev/v1alpha1", "kind": "InferenceInstance",
    "metadata": {"name": "a"}, "spec": {"model": "x", "model": "tiny", "modle": 1}}"#;
const TWICE_YAML: &str = "apiVersion: exo.dev/v1alpha1\nkind: InferenceInstance\n\
                          metadata: {name: a}\nspec: {model: x, model: tiny, modle: 1}\n";

#[tokio::test]
async fn fields_given_twice_are_refused_warned_of_or_ignored() {
    let server = support::start();
    let strict = format!("{INSTANCES}?fieldValidation=Strict");
    let ignoring = format!("{INSTANCES}?fieldValidation=Ignore");
    for (content_type, body) in [(JSON, TWICE), (YAML, TWICE_YAML)] {
        let (code, _, answer) = send(&server, (Method::POST, &strict), content_type, body).await;
        assert_eq!(code, 400, "{answer}");
        let told = "InferenceInstance in version \"v1alpha1\" cannot be handled as an \
                    InferenceInstance: strict decoding error: duplicate field \"spec.model\", \
                    unknown field \"spec.modle\"";
        assert_eq!(answer["message"], told);
        assert_eq!(server.get(&format!("{INSTANCES}/a")).await.0, StatusCode::NOT_FOUND);

        let (code, warnings, object) =
            send(&server, (Method::POST, INSTANCES), content_type, body).await;
        // The last one counts, as in Kubernetes.
        assert_eq!((code, &object["spec"]["model"]), (201, &json!("tiny")));
        assert_eq!(warnings[0], "299 - \"duplicate field \\\"spec.model\\\"\"");
        assert_eq!(warnings[1], "299 - \"unknown field \\\"spec.modle\\\"\"");
        server.call(Method::DELETE, &format!("{INSTANCES}/a"), None).await;

        let (code, warnings, _) =
            send(&server, (Method::POST, &ignoring), content_type, body).await;
        assert_eq!((code, warnings.len()), (201, 0));
        server.call(Method::DELETE, &format!("{INSTANCES}/a"), None).await;
    }
}

#[tokio::test]
async fn changes_are_read_as_strictly() {
    let server = support::start();
    let (_, made) = server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let a = format!("{INSTANCES}/a");
    let scale = format!("{a}/scale");
    let whole =
        made.to_string().replace("\"model\":\"tiny\"", "\"model\":\"x\",\"model\":\"tiny\"");
    let json_patch = "application/json-patch+json";
    let operation = r#"[{"op": "add", "path": "/spec/seed", "path": "/spec/seed", "value": 1}]"#;
    let scaled = r#"{"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": {"name": "a"},
                     "spec": {"replicas": 1, "replicas": 1}}"#;
    let applied = format!("{a}?fieldManager=m&force=1");
    // What is applied must be known besides.
    let [json, yaml] = [TWICE, TWICE_YAML].map(|text| text.replace("modle", "seed"));
    for (method, path, content_type, body, told) in [
        (Method::PUT, &a, JSON, whole.as_str(), "duplicate field \"spec.model\""),
        (Method::PATCH, &a, MERGE, r#"{"spec": {"seed": 1, "seed": 1}}"#, "\"spec.seed\""),
        (Method::PATCH, &a, json_patch, operation, "json patch duplicate field \"[0].path\""),
        (Method::PATCH, &applied, APPLY, &json, "duplicate field \"spec.model\""),
        (Method::PATCH, &applied, APPLY, &yaml, "duplicate field \"spec.model\""),
        (Method::PUT, &scale, JSON, scaled, "duplicate field \"spec.replicas\""),
        (Method::PATCH, &scale, MERGE, r#"{"spec": {"replicas": 1, "replicas": 1}}"#, "replicas"),
    ] {
        let and = if path.contains('?') { '&' } else { '?' };
        let strict = format!("{path}{and}fieldValidation=Strict");
        let (code, _, answer) = send(&server, (method.clone(), &strict), content_type, body).await;
        let message = answer["message"].as_str().unwrap();
        assert!(code == 400 && message.contains(told), "{method} {path}: {answer}");
        assert_eq!(server.get(&a).await.1, made, "refused means unchanged");
        let dry = format!("{path}{and}dryRun=All");
        let (code, warnings, answer) = send(&server, (method, &dry), content_type, body).await;
        assert_eq!(code, 200, "{answer}");
        assert!(warnings[0].contains("duplicate field"), "{warnings:?}");
    }
}

/// A header can't hold more than some thousands of lines.
#[tokio::test]
async fn very_many_unknown_fields_are_told_of_in_part() {
    let server = support::start();
    let fields: Vec<String> = (0..100_000).map(|i| format!("\"x{i}\": 1")).collect();
    let body = TWICE.replace("\"modle\": 1", &fields.join(","));
    let post = (Method::POST, INSTANCES);
    let (code, warnings, _) = send(&server, post, JSON, &body).await;
    assert_eq!(code, 201);
    assert!((50..=101).contains(&warnings.len()), "{}", warnings.len());
    let strict = format!("{INSTANCES}?fieldValidation=Strict");
    let (code, _, answer) = send(&server, (Method::POST, &strict), JSON, &body).await;
    assert_eq!(code, 400);
    assert!(answer["message"].as_str().unwrap().len() < 10_000);
}

/// Found by seed 357 of the odd requests: written back as it was, it changed.
#[tokio::test]
async fn what_is_empty_without_its_nulls_is_not_stored() {
    let server = support::start();
    let secrets = "/api/v1/namespaces/default/secrets";
    let secret = json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "s", "labels": {"a": null}}});
    let (code, made) = server.call(Method::POST, secrets, Some(secret)).await;
    assert_eq!((code.as_u16(), made["metadata"].get("labels")), (201, None), "{made}");
}
