//! How answers go over the wire: as YAML, indented, compressed, by tag, in pages that say how many
//! are left; and the health checks, each by itself.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::Read as _;

use axum::{
    body::Body,
    http::{HeaderMap, Method, Request},
};
use exo_apiserver::app;
use flate2::read::GzDecoder;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use support::{INSTANCES, NODES, SHARDS, Server, instance, node, shard};
use tower::ServiceExt as _;

/// Code, headers and body of what is asked for with these headers.
async fn fetch(server: &Server, path: &str, headers: &[(&str, &str)]) -> (u16, HeaderMap, Vec<u8>) {
    let mut request = Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::empty()).unwrap();
    let (parts, body) = server.router.clone().oneshot(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    (parts.status.as_u16(), parts.headers, body)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn yaml_is_answered_where_it_is_asked_for() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let (_, list) = server.get(INSTANCES).await;
    let (_, object) = server.get(&format!("{INSTANCES}/a")).await;
    let (_, absent) = server.get(&format!("{INSTANCES}/b")).await;
    let (_, groups) = server.get("/apis").await;
    for (path, expect) in
        [("", &list), ("/a", &object), ("/b", &absent), ("/a?pretty=true", &object)]
    {
        let path = format!("{INSTANCES}{path}");
        let (_, headers, body) = fetch(&server, &path, &[("accept", "application/yaml")]).await;
        assert_eq!(header(&headers, "content-type"), "application/yaml", "{path}");
        let text = String::from_utf8(body).unwrap();
        assert!(text.starts_with("apiVersion: ") || text.starts_with("kind: "), "{text}");
        assert_eq!(exo_crds::yaml::documents(&text).unwrap(), std::slice::from_ref(expect));
    }
    let (_, _, body) = fetch(&server, "/apis", &[("accept", "application/yaml")]).await;
    let found = exo_crds::yaml::documents(std::str::from_utf8(&body).unwrap()).unwrap();
    assert_eq!(found, [groups]);
    // What is named first counts, of what can be had.
    for (accept, expect) in [
        ("application/json, application/yaml", "application/json"),
        ("*/*, application/yaml", "application/json"),
        ("text/html, application/yaml;q=0.9, application/json", "application/yaml"),
        ("application/yaml;as=Table;g=meta.k8s.io;v=v1", "application/yaml"),
    ] {
        let (code, headers, _) = fetch(&server, INSTANCES, &[("accept", accept)]).await;
        assert_eq!((code, header(&headers, "content-type")), (200, expect), "{accept}");
    }
    // There are no streams of YAML.
    let watch = format!("{INSTANCES}?watch=1&timeoutSeconds=1");
    assert_eq!(fetch(&server, &watch, &[("accept", "application/yaml")]).await.0, 406);
    let both = "application/yaml, application/json";
    let (code, headers, body) = fetch(&server, &watch, &[("accept", both)]).await;
    assert_eq!((code, header(&headers, "content-type")), (200, "application/json"));
    let line = body.split(|byte| *byte == b'\n').next().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(line).unwrap()["type"], "ADDED");
}

#[tokio::test]
async fn answers_are_indented_for_people() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("a"))).await;
    let a = format!("{INSTANCES}/a");
    let (_, object) = server.get(&a).await;
    let (_, _, body) = fetch(&server, &format!("{a}?pretty=true"), &[]).await;
    let text = String::from_utf8(body).unwrap();
    assert!(text.contains("\n  \"spec\": {\n    \"model\": \"tiny\""), "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), object);
    let (_, _, body) = fetch(&server, &format!("{a}?pretty=false"), &[]).await;
    assert_eq!(body, object.to_string().as_bytes());
    // Lines are what parts the events of a watch.
    let watch = format!("{INSTANCES}?watch=1&pretty=1&timeoutSeconds=1");
    let (_, _, body) = fetch(&server, &watch, &[]).await;
    let line = body.split(|byte| *byte == b'\n').next().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(line).unwrap()["object"], object);
}

#[tokio::test]
async fn long_answers_are_compressed_for_who_takes_it() {
    let server = support::start();
    server.call(Method::POST, INSTANCES, Some(instance("small"))).await;
    let gzip = &[("accept-encoding", "br, gzip")];
    let (_, headers, body) = fetch(&server, INSTANCES, gzip).await;
    assert_eq!(header(&headers, "content-encoding"), "", "it is short");
    serde_json::from_slice::<Value>(&body).unwrap();
    // An object that is long itself, and a list that goes out in parts.
    let mut large = instance("large");
    let values: serde_json::Map<String, Value> =
        (0..50).map(|n| (format!("k{n}"), json!(format!("{n} ").repeat(1_500)))).collect();
    large["spec"]["environment"] = values.into();
    server.call(Method::POST, INSTANCES, Some(large)).await;
    for path in [INSTANCES.to_owned(), format!("{INSTANCES}/large")] {
        let (_, plain_headers, plain) = fetch(&server, &path, &[]).await;
        assert_eq!(header(&plain_headers, "content-encoding"), "");
        assert!(plain.len() > 128 << 10, "{}", plain.len());
        let (code, headers, packed) = fetch(&server, &path, gzip).await;
        assert_eq!((code, header(&headers, "content-encoding")), (200, "gzip"), "{path}");
        assert_eq!(header(&headers, "vary"), "Accept-Encoding");
        assert!(packed.len() < plain.len() / 10, "{} of {}", packed.len(), plain.len());
        let mut unpacked = Vec::new();
        GzDecoder::new(&*packed).read_to_end(&mut unpacked).unwrap();
        assert_eq!(unpacked, plain, "{path}");
        let (_, headers, body) = fetch(&server, &path, &[("accept-encoding", "gzip;q=0")]).await;
        assert_eq!((header(&headers, "content-encoding"), body), ("", plain));
    }
    let both = [("accept-encoding", "gzip"), ("accept", "application/yaml")];
    let (_, headers, packed) = fetch(&server, INSTANCES, &both).await;
    assert_eq!(header(&headers, "content-type"), "application/yaml");
    let mut yaml = String::new();
    GzDecoder::new(&*packed).read_to_string(&mut yaml).unwrap();
    assert!(yaml.starts_with("apiVersion: "), "{yaml:.80}");
    // Each event of a watch goes out when it happens, however much there is.
    let watch = format!("{INSTANCES}?watch=1&timeoutSeconds=1");
    let (_, headers, body) = fetch(&server, &watch, gzip).await;
    assert_eq!(header(&headers, "content-encoding"), "");
    assert!(body.len() > 128 << 10 && body.starts_with(b"{\"type\":\"ADDED\""));
}

#[tokio::test]
async fn documents_are_loaded_once() {
    let server = support::start();
    let (_, index) = server.get("/openapi/v3").await;
    for (path, place) in index["paths"].as_object().unwrap() {
        let url = place["serverRelativeURL"].as_str().unwrap();
        let (bare, hash) = url.split_once("?hash=").unwrap();
        assert_eq!(bare, format!("/openapi/v3/{path}"));
        let (code, headers, body) = fetch(&server, url, &[]).await;
        let tag = header(&headers, "etag");
        assert_eq!((code, tag), (200, &*format!("\"{hash}\"")));
        assert_eq!(header(&headers, "cache-control"), "public, immutable");
        let expires = header(&headers, "expires");
        assert!(expires.ends_with(" GMT") && expires.len() == 29, "{expires}");
        let (code, again, none) = fetch(&server, url, &[("if-none-match", tag)]).await;
        assert_eq!((code, header(&again, "etag"), none.len()), (304, tag, 0));
        // Without a hash the document may be another one tomorrow.
        let (code, headers, same) = fetch(&server, bare, &[("if-none-match", "\"other\"")]).await;
        assert_eq!((code, header(&headers, "cache-control"), &same), (200, "", &body));
        // The hash of another version leads to this one's.
        let (code, headers, _) = fetch(&server, &format!("{bare}?hash=OLD"), &[]).await;
        assert_eq!((code, header(&headers, "location")), (301, url));
    }
    assert_eq!(fetch(&server, "/openapi/v3/apis/exo.dev/v9?hash=1", &[]).await.0, 404);

    let protobuf = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
    let aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let mut tags = Vec::new();
    for (path, accept) in [
        ("/openapi/v3", "*/*"),
        ("/openapi/v2", "application/json"),
        ("/openapi/v2", protobuf),
        ("/api", aggregated),
        ("/apis", aggregated),
    ] {
        let (code, headers, body) = fetch(&server, path, &[("accept", accept)]).await;
        let tag = header(&headers, "etag").to_owned();
        assert!(code == 200 && tag.len() > 2 && !body.is_empty(), "{path} {accept}: {tag}");
        assert_eq!(header(&headers, "vary"), "Accept");
        for (known, expect) in [(tag.clone(), 304), (format!("\"x\", W/{tag}"), 304)] {
            let asked = [("accept", accept), ("if-none-match", &*known)];
            assert_eq!(fetch(&server, path, &asked).await.0, expect, "{path} {accept} {known}");
        }
        assert!(!tags.contains(&tag), "{path} {accept}: each has its own");
        tags.push(tag);
    }
    // Another server has the same.
    let other = support::start();
    assert_eq!(other.get("/openapi/v3").await.1, index);
}

#[tokio::test]
async fn pages_say_how_many_are_left() {
    let server = support::start();
    for n in 0..5 {
        server.call(Method::POST, NODES, Some(node(&format!("n{n}")))).await;
        server.call(Method::POST, SHARDS, Some(shard(&format!("s{n}"), "m", n))).await;
    }
    let remaining = |list: &Value| list["metadata"].get("remainingItemCount").cloned();
    let (_, first) = server.get(&format!("{NODES}?limit=2")).await;
    assert_eq!(remaining(&first), Some(json!(3)));
    // As of the revision of the first page.
    server.call(Method::DELETE, &format!("{NODES}/n4"), None).await;
    server.call(Method::POST, NODES, Some(node("n5"))).await;
    server.call(Method::POST, NODES, Some(node("n6"))).await;
    let token = first["metadata"]["continue"].as_str().unwrap();
    let (_, second) = server.get(&format!("{NODES}?limit=2&continue={token}")).await;
    assert_eq!(remaining(&second), Some(json!(1)));
    for (version, code) in [("0", 200), ("5", 400)] {
        let path = format!("{NODES}?limit=2&continue={token}&resourceVersion={version}");
        assert_eq!(server.get(&path).await.0, code, "the token says it already");
    }
    let token = second["metadata"]["continue"].as_str().unwrap();
    let (_, last) = server.get(&format!("{NODES}?limit=2&continue={token}")).await;
    assert_eq!(
        (last["items"][0]["metadata"]["name"].as_str(), remaining(&last)),
        (Some("n4"), None)
    );
    for whole in
        ["", "?limit=5", "?limit=2&labelSelector=a!%3Db", "?limit=1&fieldSelector=spec.rank"]
    {
        let (_, list) = server.get(&format!("{SHARDS}{whole}")).await;
        assert_eq!(remaining(&list), None, "{whole}");
    }
    let narrowed = format!("{SHARDS}?limit=2&labelSelector=a!%3Db");
    assert!(server.get(&narrowed).await.1["metadata"]["continue"].is_string());
}

#[tokio::test]
async fn health_checks_answer_each_by_itself() {
    let server = support::start();
    for path in ["/livez/ping", "/readyz/ping", "/readyz/store", "/readyz/disk", "/healthz/ping"] {
        assert_eq!(server.get(path).await, (200.try_into().unwrap(), json!("ok")), "{path}");
    }
    assert_eq!(server.get("/livez/store").await.0, 404, "being alive doesn't take a store");
    assert_eq!(server.get("/readyz/other").await.0, 404);
    let (_, text) = server.get("/readyz?verbose&exclude=store&exclude=other").await;
    assert_eq!(
        text,
        "[+]ping ok\n[+]store excluded: ok\n[+]disk ok\nwarn: there is no check other to exclude\n\
         readyz check passed\n"
    );
    server.store.shutdown().await;
    let (code, text) = server.get("/readyz/store").await;
    assert!(code == 503 && text.as_str().unwrap().starts_with("store failed: "), "{text}");
    assert_eq!(server.get("/readyz/ping").await.0, 200);
    assert_eq!(server.get("/readyz").await.0, 503);
    assert_eq!(server.get("/readyz?exclude=store").await.0, 200);
    // Who may ask how it is may not ask why, without saying who asks.
    let nobody = app(server.server.clone());
    let request = Request::get("/readyz/store").body(Body::empty()).unwrap();
    assert_eq!(nobody.oneshot(request).await.unwrap().status(), 401);
}
